"""Woken by the stream of the jobs table, which shows the jobs that have ended: tells whoever listens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sluice.wiring import job_ends as wiring
from sluice.wiring import shared

if TYPE_CHECKING:
    from aws_lambda_powertools.utilities.typing import LambdaContext


def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:  # noqa: ARG001 - Lambda's signature
    """Tell of each; the stream begins again at the one that could not be told of."""
    try:
        ended = wiring.ended_jobs(event["Records"])
        told = wiring.publish()([job for _, job in ended])
    finally:
        shared.telemetry().flush()
    return {"batchItemFailures": [{"itemIdentifier": name} for name, _ in ended[told : told + 1]]}
