"""Messages of the jobs queue as Lambda hands them over: small pointers, ours or not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sluice.domain.jobs import SCHEMA_VERSION
from sluice.ports import Received

_JOB_ID: Final = re.compile(r"job_[0-9a-f]{32}")
_BATCH_ID: Final = re.compile(r"msgbatch_[0-9a-f]{32}")
_CANARY: Final = re.compile(r"[!-~]{1,100}")


def received(records: Iterable[Mapping[str, Any]]) -> list[Received]:
    """Read the records of a Lambda SQS event. A body that is not ours keeps `job_id` None."""
    messages = []
    for record in records:
        pointer = _pointer(str(record.get("body", "")))
        attributes = record.get("attributes", {})
        messages.append(
            Received(
                message_id=str(record["messageId"]),
                receipt=str(record.get("receiptHandle", "")),
                body=str(record.get("body", "")),
                job_id=_named(pointer, "job_id", _JOB_ID),
                canary=_named(pointer, "canary", _CANARY),
                receive_count=int(attributes.get("ApproximateReceiveCount", 1)),
                sent_at=int(attributes.get("SentTimestamp", 0)),
            )
        )
    return messages


@dataclass(frozen=True, slots=True)
class BatchMessage:
    """A message of the queues of batches and of ranges: what to do with which batch, or which file has arrived.

    Without any of it the message is not ours.
    """

    message: Received
    batch_id: str | None = None
    range: int | None = None
    join: int | None = None
    key: str | None = None


def batch_messages(records: Sequence[Mapping[str, Any]]) -> list[BatchMessage]:
    """Read the records of a Lambda SQS event from the queues of batches or of ranges."""
    read = []
    for record, message in zip(records, received(records), strict=True):
        body = str(record.get("body", ""))
        pointer = _pointer(body)
        batch_id = _named(pointer, "batch_id", _BATCH_ID)
        numbers = {
            name: pointer[name]
            for name in ("range", "join")
            if batch_id and type(pointer.get(name)) is int and pointer[name] >= 0
        }
        read.append(BatchMessage(message, batch_id, key=_arrived(body), **numbers))
    return read


def _arrived(body: str) -> str | None:
    """Return the key of an object that EventBridge tells of."""
    try:
        event = json.loads(body)
        is_ours = event["source"] == "aws.s3" and event["detail-type"] == "Object Created"
        return str(event["detail"]["object"]["key"]) if is_ours else None
    except (ValueError, RecursionError, KeyError, TypeError):
        return None


def reason_of(record: Mapping[str, Any]) -> str | None:
    """Return the reason the worker wrote on a message that it buried."""
    attribute = record.get("messageAttributes", {}).get("reason", {})
    value = attribute.get("stringValue")
    return str(value) if value else None


def _pointer(body: str) -> Mapping[str, Any]:
    try:
        pointer = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(pointer, dict) or pointer.get("v") != SCHEMA_VERSION:
        return {}
    return pointer


def _named(pointer: Mapping[str, Any], name: str, form: re.Pattern[str]) -> str | None:
    """Return an id of ours; one of another form, which DynamoDB may refuse with its whole batch, is nobody's."""
    value = pointer.get(name)
    return value if isinstance(value, str) and form.fullmatch(value) else None
