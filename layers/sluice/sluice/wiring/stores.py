"""The records of jobs, limits and calls, the objects, and the upstream keys: what several functions read and write."""

from __future__ import annotations

from functools import cache

from sluice.adapters.dynamodb import DynamoJobs, DynamoLedger, DynamoLimits, DynamoParams
from sluice.adapters.s3 import Objects, Results
from sluice.adapters.secrets import SecretKeyPool, SecretText
from sluice.adapters.sqs import SqsQueue
from sluice.wiring.shared import (
    CLOCK,
    dynamodb,
    model_groups,
    s3,
    secrets_manager,
    settings,
    sqs,
)


@cache
def objects() -> Objects:
    """Return the objects of the data bucket."""
    return Objects(s3(), settings().data_bucket)


@cache
def jobs() -> DynamoJobs:
    """Return the job records."""
    return DynamoJobs(dynamodb(), settings().jobs_table, settings().retention_days)


@cache
def params() -> DynamoParams:
    """Return the requests of jobs."""
    return DynamoParams(
        dynamodb(), settings().params_table, objects(), CLOCK, settings().retention_days
    )


@cache
def results() -> Results:
    """Return the answers that are too large for a job record."""
    return Results(objects())


@cache
def limits() -> DynamoLimits:
    """Return the shared limits."""
    return DynamoLimits(dynamodb(), settings().limits_table)


@cache
def ledger() -> DynamoLedger:
    """Return the ledger of upstream calls."""
    return DynamoLedger(dynamodb(), settings().ledger_table, settings().usage_table)


@cache
def queue() -> SqsQueue:
    """Return the jobs queue, to send to it."""
    return SqsQueue(sqs(), settings().jobs_queue_url, model_groups())


@cache
def key_pool() -> SecretKeyPool:
    """Return the upstream keys."""
    return SecretKeyPool(SecretText(secrets_manager(), settings().key_pool_secret, CLOCK))
