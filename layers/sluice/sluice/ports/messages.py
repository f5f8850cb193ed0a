"""The formats of the queues' messages: small JSON pointers to jobs, batches, ranges and webhooks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sluice.domain.jobs import SCHEMA_VERSION
from sluice.ports.jobs import Received
from sluice.ports.world import Webhook

_JOB_ID: Final = re.compile(r"job_[0-9a-f]{32}")
_BATCH_ID: Final = re.compile(r"msgbatch_[0-9a-f]{32}")
_CANARY: Final = re.compile(r"[!-~]{1,100}")


def received(records: Iterable[Mapping[str, Any]]) -> list[Received]:
    """Read the records of a Lambda SQS event. `job_id` is None for a message that is not Sluice's."""
    return [
        pointer_of(
            message_id=str(record["messageId"]),
            receipt=str(record.get("receiptHandle", "")),
            body=str(record.get("body", "")),
            attributes=record.get("attributes", {}),
        )
        for record in records
    ]


def pointer_of(
    *, message_id: str, receipt: str, body: str, attributes: Mapping[str, Any]
) -> Received:
    """Read one message. `job_id` is None for a message that is not Sluice's."""
    pointer = _pointer(body)
    return Received(
        message_id=message_id,
        receipt=receipt,
        body=body,
        job_id=_named(pointer, "job_id", _JOB_ID),
        canary=_named(pointer, "canary", _CANARY),
        receive_count=int(attributes.get("ApproximateReceiveCount", 1)),
        sent_at=int(attributes.get("SentTimestamp", 0)),
    )


@dataclass(frozen=True, slots=True)
class BatchMessage:
    """A message of the batches or ranges queue: a batch with a range or section, or the key of a new file.

    A message without any of these is not Sluice's.
    """

    message: Received
    batch_id: str | None = None
    range: int | None = None
    join: int | None = None
    key: str | None = None


def batch_messages(records: Sequence[Mapping[str, Any]]) -> list[BatchMessage]:
    """Read the records of a Lambda SQS event from the batches or ranges queue."""
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


def webhook_of(message: Received) -> Webhook | None:
    """Read a message of the webhooks queue; None for a message that is not Sluice's."""
    said = _pointer(message.body)
    fields = [said.get(name) for name in ("webhook", "tenant", "url", "body")]
    texts = [each for each in fields if isinstance(each, str)]
    return Webhook(*texts) if len(texts) == len(fields) else None


def _arrived(body: str) -> str | None:
    """Return the key of the new object in an EventBridge event of S3."""
    try:
        event = json.loads(body)
        is_ours = event["source"] == "aws.s3" and event["detail-type"] == "Object Created"
        return str(event["detail"]["object"]["key"]) if is_ours else None
    except (ValueError, RecursionError, KeyError, TypeError):
        return None


def reason_of(record: Mapping[str, Any]) -> str | None:
    """Return the reason that a worker added when it sent the message to the dead-letter queue."""
    attribute = record.get("messageAttributes", {}).get("reason", {})
    value = attribute.get("stringValue")
    return str(value) if value else None


def _pointer(body: str) -> Mapping[str, Any]:
    try:
        pointer = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(pointer, dict):
        return {}
    version = pointer.get("v")
    # A later release may have written it before a rollback: its pointer still has the job id.
    is_ours = type(version) is int and version >= SCHEMA_VERSION
    return pointer if is_ours else {}


def _named(pointer: Mapping[str, Any], name: str, form: re.Pattern[str]) -> str | None:
    """Return a field with a valid id; DynamoDB could reject a whole request for one invalid id."""
    value = pointer.get(name)
    return value if isinstance(value, str) and form.fullmatch(value) else None
