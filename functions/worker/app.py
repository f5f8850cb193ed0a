"""Woken by the jobs queue: runs the whole batch of jobs side by side on one event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from sluice import wiring
from sluice.messages import received

if TYPE_CHECKING:
    from aws_lambda_powertools.utilities.typing import LambdaContext

SAFETY_MS: Final = 15_000
"""What remains of the invocation for writing down what came, after the last call must have ended."""

# One loop for the life of the environment: pooled connections belong to the loop they were opened on.
_loop = asyncio.new_event_loop()


def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Run a batch; report the messages that are not done, each with its own visibility."""
    remaining = context.get_remaining_time_in_millis()
    # Short time-outs keep a share of their time, so that a test's two seconds are enough to work in.
    stop_at = wiring.CLOCK.now() + remaining - min(SAFETY_MS, remaining // 4)
    messages = received(event["Records"])
    wiring.hold_while_starting(messages)
    try:
        not_done = _loop.run_until_complete(
            wiring.worker().run(messages, stop_at, owner=context.aws_request_id)
        )
    finally:
        wiring.telemetry().flush()
    return {"batchItemFailures": [{"itemIdentifier": each} for each in not_done]}
