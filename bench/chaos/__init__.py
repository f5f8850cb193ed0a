"""Sluice under chaos: `python -m bench.chaos`, or `make chaos`."""
