"""Sluice: a job gateway for Claude.

Floors, imports point down only::

    functions/*/app.py    thin handlers: decode, one call, encode
    wiring.py             composition root: the only file that names adapters
    adapters/             the outside world: DynamoDB, SQS, S3, Secrets Manager, Claude
    submit.py work.py ... use cases; ports.py says what they need of the world
    domain/               rules: jobs, limits, retries, pricing, errors
"""

__version__ = "0.1.0"
