"""The benchmark of the lane choice: `python -m bench.lanes`, or `make bench-lanes`.

A week of files with deadlines is played on a virtual clock, once for each policy: all live, all batch, the product's
choice, and a clairvoyant. `docs/bench.md` explains the table.

    week.py      the files, slow days, outages and the spend cap of a week, from a seed
    world.py     upstream and the live lane: what they accept, finish and charge
    policies.py  who decides which rows go where, and when
    __main__.py  the command, the table and the targets
"""
