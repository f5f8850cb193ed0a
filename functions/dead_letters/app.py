"""Woken by the dead-letter queue: keeps each letter and marks its job errored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sluice.ports.messages import reason_of, received
from sluice.upkeep.dead_letters import DeadLetter
from sluice.wiring import dead_letters as wiring
from sluice.wiring import shared

if TYPE_CHECKING:
    from aws_lambda_powertools.utilities.typing import LambdaContext


def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:  # noqa: ARG001 - Lambda's signature
    """Take each letter; those that could not be taken come again."""
    failures = []
    records = event["Records"]
    for record, message in zip(records, received(records), strict=True):
        try:
            taken = wiring.take_dead_letter()(DeadLetter(message, reason_of(record)))
        except Exception:  # noqa: BLE001 - one letter must not keep the others
            shared.telemetry().problem("dead letter not taken", message_id=message.message_id)
            taken = False
        if not taken:
            failures.append({"itemIdentifier": message.message_id})
    shared.telemetry().flush()
    return {"batchItemFailures": failures}
