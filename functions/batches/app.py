"""Woken by the batches queue: plans files that arrived, and puts results together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sluice.bulk.turns import NOT_ITS_TURN_MS
from sluice.domain.errors import NotItsTurn
from sluice.domain.waits import grown
from sluice.ports.messages import BatchMessage, batch_messages
from sluice.wiring import batches as wiring
from sluice.wiring import shared

if TYPE_CHECKING:
    from aws_lambda_powertools.utilities.typing import LambdaContext


def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:  # noqa: ARG001 - Lambda's signature
    """Do what each message says (the mapping sends one); report those that are not done."""
    failures = []
    for each in batch_messages(event["Records"]):
        try:
            if each.range is not None:
                # Of another queue: a range's dead letter, sent on in a moment.
                _do(each)
            else:
                with wiring.hidden(each.message) as hidden:
                    left_ms = _left_ms(each)
                    if left_ms is not None:
                        # What it has done is kept, and another invocation continues.
                        hidden.show(left_ms // 1000)
                        failures.append({"itemIdentifier": each.message.message_id})
        except Exception:  # noqa: BLE001 - the message comes again, whatever it was
            shared.telemetry().problem("batch message not done", batch_id=each.batch_id)
            failures.append({"itemIdentifier": each.message.message_id})
    shared.telemetry().flush()
    return {"batchItemFailures": failures}


def _left_ms(each: BatchMessage) -> int | None:
    """Do what a message says; return after which time to do what is left, None if it is done."""
    try:
        return None if _do(each) else 0
    except NotItsTurn:
        return grown(NOT_ITS_TURN_MS, each.message.receive_count)


def _do(each: BatchMessage) -> bool:
    """Do what a message says; False if some of it is left."""
    if each.key is not None:
        wiring.plan_batch().arrived(each.key)
    elif each.batch_id is None:
        shared.telemetry().problem("not a message of Sluice's", message_id=each.message.message_id)
    elif each.join is not None:
        return wiring.assemble().join(each.batch_id, each.join)
    elif each.range is not None:
        wiring.plan_batch().again(each.batch_id, each.range)
    else:
        wiring.plan_batch().plan(each.batch_id)
    return True
