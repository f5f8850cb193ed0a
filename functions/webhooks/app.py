"""Woken by the webhooks queue: delivers each message to the caller's own server."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from sluice import wiring
from sluice.ports.messages import received

if TYPE_CHECKING:
    from aws_lambda_powertools.utilities.typing import LambdaContext


def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:  # noqa: ARG001 - Lambda's signature
    """Deliver them side by side; those that failed come again."""
    try:
        not_done = asyncio.run(wiring.deliver()(received(event["Records"])))
    finally:
        wiring.telemetry().flush()
    return {"batchItemFailures": [{"itemIdentifier": each} for each in not_done]}
