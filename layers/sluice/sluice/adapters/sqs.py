"""The jobs queue. Messages are small pointers; a worker changes their visibility and never re-sends them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from sluice.adapters import aws
from sluice.domain.errors import StoreBusy
from sluice.domain.jobs import SCHEMA_VERSION
from sluice.ports import Received

if TYPE_CHECKING:
    from mypy_boto3_sqs import SQSClient

AT_ONCE: Final = 10
"""SQS's limit for batch calls."""

LONGEST_VISIBILITY_SECONDS: Final = 43_200


class SqsQueue:
    """The sending side."""

    def __init__(self, client: SQSClient, url: str) -> None:
        self._client = client
        self._url = url

    def send(self, jobs: Sequence[tuple[str, str]]) -> list[str]:
        """Send (job id, tenant) pairs; return the ids that were not taken."""
        unsent: list[str] = []
        for start in range(0, len(jobs), AT_ONCE):
            some = jobs[start : start + AT_ONCE]
            entries: Any = [
                {
                    "Id": str(position),
                    "MessageBody": json.dumps({"v": SCHEMA_VERSION, "job_id": job_id}),
                    # A fair queue: one tenant's backlog does not delay the others.
                    "MessageGroupId": tenant,
                }
                for position, (job_id, tenant) in enumerate(some)
            ]
            try:
                answer = aws.patiently(
                    "the jobs queue",
                    self._client.send_message_batch,
                    QueueUrl=self._url,
                    Entries=entries,
                )
            except StoreBusy:
                unsent.extend(job_id for job_id, _ in some)
                continue
            unsent.extend(some[int(each["Id"])][0] for each in answer.get("Failed", ()))
        return unsent

    def depth(self) -> int:
        """Return about how many messages wait or are at work."""
        answer = aws.patiently(
            "the jobs queue",
            self._client.get_queue_attributes,
            QueueUrl=self._url,
            AttributeNames=[
                "ApproximateNumberOfMessages",
                "ApproximateNumberOfMessagesNotVisible",
                "ApproximateNumberOfMessagesDelayed",
            ],
        )
        return sum(int(number) for number in answer["Attributes"].values())


class SqsReturns:
    """The receiving side."""

    def __init__(self, client: SQSClient, url: str, dead_letters_url: str) -> None:
        self._client = client
        self._url = url
        self._dead_letters_url = dead_letters_url

    def put_back(self, delays: Sequence[tuple[Received, int]]) -> None:
        """Make each message visible again after its delay in milliseconds, rounded up to seconds."""
        for start in range(0, len(delays), AT_ONCE):
            entries: Any = [
                {
                    "Id": str(position),
                    "ReceiptHandle": message.receipt,
                    "VisibilityTimeout": min(
                        LONGEST_VISIBILITY_SECONDS, max(0, -(-delay_ms // 1000))
                    ),
                }
                for position, (message, delay_ms) in enumerate(delays[start : start + AT_ONCE])
            ]
            aws.patiently(
                "the jobs queue",
                self._client.change_message_visibility_batch,
                QueueUrl=self._url,
                Entries=entries,
            )

    def bury(self, message: Received, reason: str) -> None:
        """Send a message that is not ours to the dead-letter queue, with the reason."""
        aws.patiently(
            "the dead-letter queue",
            self._client.send_message,
            QueueUrl=self._dead_letters_url,
            MessageBody=message.body,
            MessageAttributes={"reason": {"DataType": "String", "StringValue": reason}},
        )


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
                job_id=_text(pointer, "job_id"),
                canary=_text(pointer, "canary"),
                receive_count=int(attributes.get("ApproximateReceiveCount", 1)),
                sent_at=int(attributes.get("SentTimestamp", 0)),
            )
        )
    return messages


def reason_of(record: Mapping[str, Any]) -> str | None:
    """Return the reason the worker wrote on a message that it buried."""
    attribute = record.get("messageAttributes", {}).get("reason", {})
    value = attribute.get("stringValue")
    return str(value) if value else None


def _pointer(body: str) -> Mapping[str, Any]:
    try:
        pointer = json.loads(body)
    except ValueError:
        return {}
    if not isinstance(pointer, dict) or pointer.get("v") != SCHEMA_VERSION:
        return {}
    return pointer


def _text(pointer: Mapping[str, Any], name: str) -> str | None:
    value = pointer.get(name)
    return value if isinstance(value, str) and value else None
