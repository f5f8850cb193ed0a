"""Woken by the jobs queue: runs the whole batch of jobs side by side on one event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from sluice.ports.messages import received
from sluice.wiring import shared
from sluice.wiring import worker as wiring

if TYPE_CHECKING:
    from aws_lambda_powertools.utilities.typing import LambdaContext

# One loop for the life of the environment: pooled connections belong to the loop they were opened on.
_loop = asyncio.new_event_loop()


def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Run a batch; report the messages that are not done, each with its own visibility."""
    stop_at = shared.stop_at(context.get_remaining_time_in_millis())
    messages = received(event["Records"])
    wiring.hold_while_starting(messages)
    try:
        not_done = _loop.run_until_complete(
            wiring.run_jobs()(messages, stop_at, owner=context.aws_request_id)
        )
    finally:
        shared.telemetry().flush()
    return {"batchItemFailures": [{"itemIdentifier": each} for each in not_done]}
