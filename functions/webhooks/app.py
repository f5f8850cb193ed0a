"""Woken by the webhooks queue: delivers each message to the caller's own server."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from sluice.ports.messages import received
from sluice.wiring import shared
from sluice.wiring import webhooks as wiring

if TYPE_CHECKING:
    from aws_lambda_powertools.utilities.typing import LambdaContext


def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:  # noqa: ARG001 - Lambda's signature
    """Deliver them side by side; those that failed come again."""
    try:
        not_done = asyncio.run(wiring.deliver()(received(event["Records"])))
    finally:
        shared.telemetry().flush()
    return {"batchItemFailures": [{"itemIdentifier": each} for each in not_done]}
