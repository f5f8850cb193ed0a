"""The governor function: loads limits, sets each queue's concurrency, and sends parked jobs and ranges again."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Final

from sluice.adapters import aws
from sluice.adapters.dynamodb import DynamoGovernorNotes, notes_id
from sluice.adapters.lambdas import LambdaExecutions, LambdaQueueMapping, LambdaSteps
from sluice.adapters.rate_limits import HttpRateLimits
from sluice.adapters.secrets import SecretHistory
from sluice.adapters.sqs import depth_of
from sluice.domain.capacity import REFILLED, ROWS_AT_ONCE, UNREFILLED
from sluice.domain.shares import CEILINGS
from sluice.settings import MAPPINGS
from sluice.upkeep.governor import Governed, Governor
from sluice.upkeep.load_limits import LoadLimits
from sluice.upkeep.resume import Resume
from sluice.upkeep.start_steps import StartSteps
from sluice.upkeep.sweep import Sweep
from sluice.wiring.batch_stores import batches, batches_queue, ranges_queue, upstream_records
from sluice.wiring.shared import (
    CLOCK,
    dynamodb,
    model_groups,
    secrets_manager,
    settings,
    sqs,
    telemetry,
)
from sluice.wiring.stores import jobs, key_pool, ledger, limits, queue

if TYPE_CHECKING:
    from mypy_boto3_lambda import LambdaClient

LONG_TIMEOUT_MS: Final = 900_000
SHORT_TIMEOUT_MS: Final = 60_000
SHORT: Final = frozenset({"webhooks", "dead letters"})
"""Queues whose function has a timeout of one minute, as in template.yaml; the others have 15 minutes."""


@cache
def _pool_history() -> SecretHistory:
    return SecretHistory(secrets_manager(), settings().key_pool_secret, CLOCK)


@cache
def load_limits() -> LoadLimits:
    """Return the use case that loads limits."""
    return LoadLimits(key_pool(), HttpRateLimits(), limits(), model_groups(), CLOCK, telemetry())


@cache
def governor() -> Governor:
    """Return the use case that sets how many invocations each queue's mapping may run at once."""
    client = aws.lambdas()
    governed = [_governed(name, client) for name in MAPPINGS]
    return Governor(governed, limits(), _pool_history(), _executions(), CLOCK, telemetry())


@cache
def _executions() -> LambdaExecutions:
    return LambdaExecutions(aws.lambdas(), CLOCK, settings().governed().executions)


def _governed(name: str, client: LambdaClient) -> Governed:
    """Return a mapping for the governor, by what its queue holds."""
    own = settings().governed()
    queue_urls = {
        "jobs": settings().jobs_queue_url,
        "ranges": settings().ranges_queue_url,
        "batches": settings().batches_queue_url,
        "webhooks": settings().webhooks_queue_url,
        "dead letters": settings().dead_letters_queue_url,
        "range dead letters": settings().range_dead_letters_queue_url,
    }
    ceilings = {"jobs": own.max_concurrency, "ranges": own.bulk_concurrency, **CEILINGS}
    is_ranges = name == "ranges"
    return Governed(
        name,
        LambdaQueueMapping(
            client,
            own.mappings[name],
            f"the mapping of {name}",
            slots_per_message=ROWS_AT_ONCE if is_ranges else 1,
            busy=UNREFILLED if is_ranges else REFILLED,
        ),
        partial(depth_of, sqs(), queue_urls[name], f"the queue of {name}"),
        DynamoGovernorNotes(dynamodb(), settings().limits_table, notes_id(name)),
        ceilings[name],
        timeout_ms=SHORT_TIMEOUT_MS if name in SHORT else LONG_TIMEOUT_MS,
        calls_claude=name not in CEILINGS,
        refills=name == "jobs",
    )


@cache
def sweep() -> Sweep:
    """Return the use case that sends parked jobs again."""
    return Sweep(
        jobs(),
        jobs(),
        ledger(),
        queue(),
        limits(),
        _pool_history(),
        model_groups(),
        CLOCK,
        telemetry(),
    )


@cache
def resume() -> Resume:
    """Return the use case that sends parked ranges again and restarts stalled batches."""
    return Resume(
        batches(),
        batches(),
        ranges_queue(),
        batches_queue(),
        limits(),
        model_groups(),
        CLOCK,
        telemetry(),
    )


@cache
def start_steps() -> StartSteps:
    """Return the use case that starts the steps of upstream batches."""
    steps = LambdaSteps(aws.lambdas(), settings().governed().upstream_function)
    return StartSteps(upstream_records(), steps, _executions(), CLOCK, telemetry())
