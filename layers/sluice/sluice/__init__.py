"""Sluice: a job gateway for Claude.

Floors, imports point down only::

    functions/*/app.py    thin handlers: decode, one call, encode
    routes/               handlers of the HTTP API, by subject
    wiring/               composition root, one module per function: the only folder that names adapters
    adapters/             the outside world: DynamoDB, SQS, S3, Secrets Manager, Claude
    intake/ worker/ ...   use cases, one folder per subject; ports/ says what they need of the world
    domain/               rules: jobs, limits, retries, pricing, errors
"""

__version__ = "0.1.0"
