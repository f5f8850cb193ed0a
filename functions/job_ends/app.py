"""Invoked by the stream of the jobs table, with the jobs that have ended: publishes their events and webhooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sluice.wiring import job_ends as wiring
from sluice.wiring import shared

if TYPE_CHECKING:
    from aws_lambda_powertools.utilities.typing import LambdaContext


def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:  # noqa: ARG001 - Lambda's signature
    """Publish each; the stream resumes at the first one that was not published."""
    try:
        ended = wiring.ended_jobs(event["Records"])
        told = wiring.publish()([job for _, job in ended])
    finally:
        shared.telemetry().flush()
    return {"batchItemFailures": [{"itemIdentifier": name} for name, _ in ended[told : told + 1]]}
