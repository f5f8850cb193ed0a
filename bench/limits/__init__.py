"""The public benchmark of Sluice's limiter: `python -m bench.limits`, or `make bench-limits`.

Each scenario is a piece of work for one Claude simulator with true buckets. Each client gets the same
work, a simulator of its own with full buckets, and the machine to itself. `docs/bench.md` says what
the columns mean.

    scenarios.py     what is run, as data, and which figures Sluice is to reach
    ideal.py         the time before which the buckets cannot have let the work through
    scoring.py       what a run was worth, from the simulator's ledger
    runners.py       one scenario with one client, from empty books to the score
    direct.py        the clients that call Claude themselves: SDK with a semaphore, tutorial key pool
    with_litellm.py  LiteLLM's Router, in an environment of its own
    child.py         how such a client is told what to do, and tells what it did
    meters.py        what Sluice's workers spent: processor, writes, receives, Lambda time
    report.py        the table, in the terminal and in docs/bench.md
    virtual.py       the same on a virtual clock, for comparing rules
    backlog.py       a backlog far above the limit, on a virtual clock
    chart.py         admitted requests per second against the limit, as an SVG
"""
