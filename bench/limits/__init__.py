"""The public benchmark of Sluice's limiter: `python -m bench.limits`, or `make bench-limits`.

Each scenario is a piece of work for one Claude simulator with real token buckets. Each client gets the
same work, its own simulator with full buckets, and the machine to itself. `docs/bench.md` explains the
columns.

    scenarios.py     the scenarios as data, and the targets for Sluice
    ideal.py         the earliest time by which the buckets can have admitted the work
    scoring.py       the score of a run, from the simulator's ledger
    runners.py       one scenario with one client, from the start to the score
    direct.py        the clients that call Claude directly: SDK with a semaphore, tutorial key pool
    with_litellm.py  LiteLLM's Router, in its own environment
    child.py         runs such a client in its own process: work on stdin, results on stdout
    meters.py        what Sluice's workers used: processor, writes, receives, Lambda time
    report.py        the table, in the terminal and in docs/bench.md
    virtual.py       the same on a virtual clock, for comparing rules
    backlog.py       a backlog far above the limit, on a virtual clock
    chart.py         admitted requests per second against the limit, as an SVG
"""
