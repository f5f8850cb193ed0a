"""The records of batches and ranges, and their queues."""

from __future__ import annotations

from functools import cache

from sluice.adapters.batch_records import DynamoBatches
from sluice.adapters.sqs import SqsBatchesQueue, SqsRangesQueue
from sluice.adapters.upstream_records import DynamoUpstreamRecords
from sluice.bulk.lane_choice import LaneChoice
from sluice.wiring.shared import CLOCK, dynamodb, settings, sqs, telemetry
from sluice.wiring.stores import limits


@cache
def batches() -> DynamoBatches:
    """Return the records of batches and ranges."""
    return DynamoBatches(dynamodb(), settings().batches_table, settings().retention_days, CLOCK)


@cache
def upstream_records() -> DynamoUpstreamRecords:
    """Return the records of upstream batches."""
    return DynamoUpstreamRecords(
        dynamodb(), settings().batches_table, settings().retention_days, CLOCK
    )


@cache
def batches_queue() -> SqsBatchesQueue:
    """Return the batches queue, to send to it."""
    return SqsBatchesQueue(sqs(), settings().batches_queue_url)


@cache
def ranges_queue() -> SqsRangesQueue:
    """Return the ranges queue, to send to it."""
    return SqsRangesQueue(sqs(), settings().ranges_queue_url)


@cache
def lane_choice() -> LaneChoice:
    """Return what chooses lanes, and plans rescues."""
    return LaneChoice(upstream_records(), limits(), ranges_queue(), CLOCK, telemetry())
