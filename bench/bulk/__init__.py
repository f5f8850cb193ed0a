"""The benchmark of batches: a large file through the whole local stack, and a huge one through the planner.

`python -m bench.bulk kills` runs 10,000 and 100,000 lines and kills three workers of the second.
`python -m bench.bulk half_price` runs 250,000 rows through Message Batches, and says what AWS charges for it.
`python -m bench.bulk planner` plans 5 GB that are never uploaded.
"""
