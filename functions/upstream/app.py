"""Started by the governor: collects batches into upstream batches, or makes the next steps of one of these."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sluice.wiring import shared
from sluice.wiring import upstream as wiring

if TYPE_CHECKING:
    from aws_lambda_powertools.utilities.typing import LambdaContext


def handler(event: dict[str, Any], context: LambdaContext) -> None:
    """Advance the upstream batch that the event names; collect if it names none."""
    stop_at = shared.stop_at(context.get_remaining_time_in_millis())
    try:
        upstream_id = event.get("upstream_id")
        if upstream_id is None:
            wiring.collect()(stop_at)
        else:
            wiring.advance()(str(upstream_id), stop_at, owner=context.aws_request_id)
    finally:
        shared.telemetry().flush()
