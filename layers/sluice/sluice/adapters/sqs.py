"""The jobs queue. Messages are small pointers; a worker changes their visibility and never re-sends them."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, Self

from botocore.exceptions import ClientError

from sluice.adapters import aws
from sluice.domain.batches import Batch
from sluice.domain.capacity import Backlog
from sluice.domain.errors import StoreBusy
from sluice.domain.jobs import SCHEMA_VERSION
from sluice.domain.limits import model_group
from sluice.ports.jobs import Pointer, Received
from sluice.ports.messages import pointer_of

if TYPE_CHECKING:
    from mypy_boto3_sqs import SQSClient

_GROUP_ID: Final = re.compile(r"[!-~]{1,128}")

AT_ONCE: Final = 10
"""SQS's limit for batch calls."""

LOOK_SECONDS: Final = 1
"""Without a wait SQS asks only some of its servers, and what it does not find may be there all the same."""

SENDS_AT_ONCE: Final = 32
"""Calls in flight while a large batch is planned."""

HIDE_SECONDS: Final = 90
"""A batch's message whose worker died is visible again after this time."""

FIRST_RETRY_SECONDS: Final = 15
LONGEST_RETRY_SECONDS: Final = 900
"""What failed is done again after 30, 60, 120 ... 900 s."""

LONGEST_VISIBILITY_SECONDS: Final = 43_200

MOST_MESSAGE_BYTES: Final = 1_048_576
"""SQS's limit for a message, its attributes (name, type and value) included."""

ENTRY_ATTEMPTS: Final = 3
"""How often a message is put back that SQS could not change while it changed others of the same call."""


def message_group(name: str) -> str:
    """Return the MessageGroupId of a name, which may be anything: SQS takes 128 letters, digits and punctuation."""
    return name if _GROUP_ID.fullmatch(name) else sha256(name.encode()).hexdigest()


class SqsQueue:
    """The sending side."""

    def __init__(self, client: SQSClient, url: str, model_groups: Mapping[str, str]) -> None:
        self._client = client
        self._url = url
        self._model_groups = model_groups

    def send(self, jobs: Sequence[Pointer]) -> list[str]:
        """Send a message for each job; return the ids of those that were not taken."""
        unsent: list[str] = []
        for start in range(0, len(jobs), AT_ONCE):
            some = jobs[start : start + AT_ONCE]
            entries: Any = [
                {
                    "Id": str(position),
                    "MessageBody": json.dumps({"v": SCHEMA_VERSION, "job_id": job.job_id}),
                    "MessageGroupId": self._fair_group(job),
                }
                for position, job in enumerate(some)
            ]
            try:
                answer = aws.patiently(
                    "the jobs queue",
                    self._client.send_message_batch,
                    QueueUrl=self._url,
                    Entries=entries,
                )
            except StoreBusy:
                unsent.extend(job.job_id for job in some)
                continue
            unsent.extend(some[int(each["Id"])].job_id for each in answer.get("Failed", ()))
        return unsent

    def _fair_group(self, job: Pointer) -> str:
        """A fair queue: neither a tenant's backlog nor that of a blocked limit group delays the others."""
        name = f"{job.tenant}/{model_group(job.model, self._model_groups)}"
        return message_group(name)

    def depth(self) -> int:
        """Return about how many messages wait or are at work."""
        return self.backlog().total

    def backlog(self) -> Backlog:
        """Return the same, told apart."""
        return depth_of(self._client, self._url, "the jobs queue")


def depth_of(client: SQSClient, url: str, what: str) -> Backlog:
    """Return about how many messages a queue holds; `what` names it in errors."""
    answer = aws.patiently(
        what,
        client.get_queue_attributes,
        QueueUrl=url,
        AttributeNames=[
            "ApproximateNumberOfMessages",
            "ApproximateNumberOfMessagesNotVisible",
            "ApproximateNumberOfMessagesDelayed",
        ],
    )
    numbers = answer["Attributes"]
    return Backlog(
        visible=int(numbers["ApproximateNumberOfMessages"]),
        in_flight=int(numbers["ApproximateNumberOfMessagesNotVisible"]),
        delayed=int(numbers["ApproximateNumberOfMessagesDelayed"]),
    )


class SqsRangesQueue:
    """The sending side of the ranges queue."""

    def __init__(self, client: SQSClient, url: str) -> None:
        self._client = client
        self._url = url

    def send_ranges(self, batch: Batch, numbers: Sequence[int]) -> list[int]:
        """Send a pointer for each range, ten at a time and many calls at once; return the numbers not taken."""
        some = [numbers[start : start + AT_ONCE] for start in range(0, len(numbers), AT_ONCE)]
        with ThreadPoolExecutor(SENDS_AT_ONCE) as threads:
            unsent = threads.map(lambda each: self._send_ten(batch, each), some)
            return [number for each in unsent for number in each]

    def _send_ten(self, batch: Batch, numbers: Sequence[int]) -> list[int]:
        entries: Any = [
            {
                "Id": str(number),
                "MessageBody": json.dumps(
                    {"v": SCHEMA_VERSION, "batch_id": batch.batch_id, "range": number}
                ),
                # A fair queue: one tenant's large batch does not delay the others' small ones.
                "MessageGroupId": batch.tenant,
            }
            for number in numbers
        ]
        try:
            answer = aws.patiently(
                "the ranges queue",
                self._client.send_message_batch,
                QueueUrl=self._url,
                Entries=entries,
            )
        except StoreBusy:
            return list(numbers)
        return [int(each["Id"]) for each in answer.get("Failed", ())]


class SqsBatchesQueue:
    """The sending side of the batches queue; not for the function that this queue invokes."""

    def __init__(self, client: SQSClient, url: str) -> None:
        self._client = client
        self._url = url

    def send_plan(self, batch_id: str) -> None:
        """Have a batch planned; raises StoreBusy."""
        self._send({"v": SCHEMA_VERSION, "batch_id": batch_id})

    def send_join(self, batch_id: str, section: int) -> None:
        """Have a section's results joined; raises StoreBusy."""
        self._send({"v": SCHEMA_VERSION, "batch_id": batch_id, "join": section})

    def _send(self, body: object) -> None:
        aws.patiently(
            "the batches queue",
            self._client.send_message,
            QueueUrl=self._url,
            MessageBody=json.dumps(body),
        )


class Hidden:
    """Keeps a message hidden while somebody works on it, a little at a time, so that it comes back soon if they die."""

    def __init__(self, client: SQSClient, url: str, message: Received) -> None:
        self._client = client
        self._url = url
        self._message = message
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if kind is not None:
            doublings = min(self._message.receive_count, 6)
            self._hide(min(LONGEST_RETRY_SECONDS, FIRST_RETRY_SECONDS << doublings))

    def _keep(self) -> None:
        while True:
            self._hide(HIDE_SECONDS)
            if self._done.wait(HIDE_SECONDS / 3):
                return

    def _hide(self, seconds: int) -> None:
        try:
            aws.patiently(
                "the batches queue",
                self._client.change_message_visibility,
                QueueUrl=self._url,
                ReceiptHandle=self._message.receipt,
                VisibilityTimeout=seconds,
            )
        except (ClientError, StoreBusy):
            # It stays hidden for as long as the queue says, or is gone already.
            return


class SqsInbox:
    """The receiving side."""

    def __init__(
        self, client: SQSClient, url: str, dead_letters_url: str, name: str = "the jobs queue"
    ) -> None:
        self._client = client
        self._url = url
        self._dead_letters_url = dead_letters_url
        self._name = name

    def receive(self, most: int, hidden_ms: int) -> Sequence[Received]:
        """Take up to ten messages that are visible now, and hide them so long.

        A short wait, so that all of SQS's servers are asked.
        """
        answer: Mapping[str, Any] = aws.patiently(
            self._name,
            self._client.receive_message,
            QueueUrl=self._url,
            MaxNumberOfMessages=min(most, AT_ONCE),
            VisibilityTimeout=_seconds(hidden_ms),
            WaitTimeSeconds=LOOK_SECONDS,
            MessageSystemAttributeNames=["ApproximateReceiveCount", "SentTimestamp"],
        )
        return [
            pointer_of(
                message_id=each["MessageId"],
                receipt=each["ReceiptHandle"],
                body=each["Body"],
                attributes=each.get("Attributes", {}),
            )
            for each in answer.get("Messages", ())
        ]

    def delete(self, messages: Sequence[Received]) -> None:
        """Acknowledge messages; raises StoreBusy at the end if SQS could not be asked for some."""
        busy: StoreBusy | None = None
        for start in range(0, len(messages), AT_ONCE):
            entries: Any = [
                {"Id": str(position), "ReceiptHandle": message.receipt}
                for position, message in enumerate(messages[start : start + AT_ONCE])
            ]
            try:
                aws.patiently(
                    self._name,
                    self._client.delete_message_batch,
                    QueueUrl=self._url,
                    Entries=entries,
                )
            except StoreBusy as error:
                busy = error
        if busy is not None:
            raise busy

    def put_back(self, delays: Sequence[tuple[Received, int]]) -> None:
        """Make each message visible again after its delay in milliseconds, rounded up to seconds.

        What one call cannot change does not keep the others; raises StoreBusy at the end. A message whose receipt
        is no longer valid is somebody else's by now, or gone: nothing is left to do for it.
        """
        busy: StoreBusy | None = None
        for start in range(0, len(delays), AT_ONCE):
            entries: Any = [
                {
                    "Id": str(position),
                    "ReceiptHandle": message.receipt,
                    "VisibilityTimeout": _seconds(delay_ms),
                }
                for position, (message, delay_ms) in enumerate(delays[start : start + AT_ONCE])
            ]
            try:
                self._change(entries)
            except StoreBusy as error:
                busy = error
        if busy is not None:
            raise busy

    def _change(self, entries: Any) -> None:
        """Change the visibility of up to ten messages; raises StoreBusy when SQS fails on some of them every time."""
        for _ in range(ENTRY_ATTEMPTS):
            answer = aws.patiently(
                self._name,
                self._client.change_message_visibility_batch,
                QueueUrl=self._url,
                Entries=entries,
            )
            failed = {
                each["Id"] for each in answer.get("Failed", ()) if not each.get("SenderFault")
            }
            entries = [entry for entry in entries if entry["Id"] in failed]
            if not entries:
                return
        raise StoreBusy(self._name)

    def keep_hidden(self, messages: Sequence[Received], milliseconds: int) -> None:
        """Hide messages that are at work for a time from now; as `put_back`, ten per call."""
        self.put_back([(message, milliseconds) for message in messages])

    def reject(self, message: Received, reason: str) -> None:
        """Send a message that is not ours to the dead-letter queue, with the reason if both fit into a message."""
        size = sum(len(each.encode()) for each in (message.body, "reason", "String", reason))
        attribute: Any = {"DataType": "String", "StringValue": reason}
        aws.patiently(
            "the dead-letter queue",
            self._client.send_message,
            QueueUrl=self._dead_letters_url,
            MessageBody=message.body,
            MessageAttributes={"reason": attribute} if size <= MOST_MESSAGE_BYTES else {},
        )


def _seconds(milliseconds: int) -> int:
    return min(LONGEST_VISIBILITY_SECONDS, max(0, -(-milliseconds // 1000)))
