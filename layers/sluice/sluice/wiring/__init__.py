"""Composition root: the only folder that names adapters. Each function imports the module of its own name.

`shared`, `stores`, `notices` and `workers` have what several functions use. Everything is made at first use and kept.
"""
