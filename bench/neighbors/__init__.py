"""The benchmark of neighbors: how much longer a quiet tenant waits beside an attack than beside a harmless load.

`python -m bench.neighbors` runs every attack of `attacks.py` on the local stack, each beside a harmless load of the
same rows and bytes. To add an attack: write its two loads, and add an entry to `ATTACKS`.
"""
