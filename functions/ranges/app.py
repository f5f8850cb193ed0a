"""Woken by the ranges queue: runs the rows of one range of a batch on one event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from sluice.ports.messages import batch_messages
from sluice.wiring import ranges as wiring
from sluice.wiring import shared
from sluice.worker.ranges import RangePointer

if TYPE_CHECKING:
    from aws_lambda_powertools.utilities.typing import LambdaContext

# One loop for the life of the environment: pooled connections belong to the loop they were opened on.
_loop = asyncio.new_event_loop()


def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Run each range (the mapping sends one); report those that are not done."""
    stop_at = shared.stop_at(context.get_remaining_time_in_millis())
    failures = []
    try:
        for each in batch_messages(event["Records"]):
            pointer = RangePointer(each.message, each.batch_id, each.range)
            run = wiring.run_ranges()(pointer, stop_at, owner=context.aws_request_id)
            if not _loop.run_until_complete(run):
                failures.append({"itemIdentifier": each.message.message_id})
    finally:
        shared.telemetry().flush()
    return {"batchItemFailures": failures}
