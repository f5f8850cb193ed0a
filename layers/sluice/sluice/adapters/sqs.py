"""The queues. Messages are small pointers; workers change their visibility timeouts and never send them again."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, Self

from botocore.exceptions import ClientError

from sluice.adapters import aws
from sluice.adapters.tables import chunks
from sluice.domain.batches import Batch
from sluice.domain.capacity import Backlog
from sluice.domain.errors import StoreBusy
from sluice.domain.jobs import SCHEMA_VERSION
from sluice.domain.models import model_group
from sluice.domain.turns import group_of_range
from sluice.ports.jobs import Pointer, Received
from sluice.ports.messages import pointer_of

if TYPE_CHECKING:
    from mypy_boto3_sqs import SQSClient

_GROUP_ID: Final = re.compile(r"[!-~]{1,128}")

AT_ONCE: Final = 10
"""SQS's limit for batch calls."""

LOOK_SECONDS: Final = 1
"""Long polling: without a wait SQS queries only some of its servers, and may miss messages."""

SENDS_AT_ONCE: Final = 32
"""Concurrent calls while a large batch is planned."""

HIDE_SECONDS: Final = 90
"""Visibility timeout while a message of a batch is processed; renewed until it is done."""

FIRST_RETRY_SECONDS: Final = 15
LONGEST_RETRY_SECONDS: Final = 900
"""A failed message is retried after 30, 60, 120 ... 900 s."""

LONGEST_VISIBILITY_SECONDS: Final = 43_200
"""SQS's limit."""

MOST_MESSAGE_BYTES: Final = 1_048_576
"""SQS's limit for a message, including its attributes (name, type and value)."""

ENTRY_ATTEMPTS: Final = 3
"""Tries for a message that SQS could not change although it changed others of the same call."""


def message_group(name: str) -> str:
    """Return the MessageGroupId of any name; SQS accepts 128 letters, digits and punctuation characters."""
    return name if _GROUP_ID.fullmatch(name) else sha256(name.encode()).hexdigest()


def _unsent(entries: Any, send: Callable[..., Any]) -> list[str]:
    """Send at most ten messages in one call; return the entry ids of those that were not accepted."""
    try:
        answer = send(Entries=entries)
    except StoreBusy:
        return [entry["Id"] for entry in entries]
    return [each["Id"] for each in answer.get("Failed", ())]


class SqsQueue:
    """Sends messages to the jobs queue."""

    def __init__(self, client: SQSClient, url: str, model_groups: Mapping[str, str]) -> None:
        self._client = client
        self._url = url
        self._model_groups = model_groups

    def send(self, jobs: Sequence[Pointer]) -> list[str]:
        """Send a message for each job; return the ids of those that were not accepted."""
        unsent: list[str] = []
        for some in chunks(jobs, AT_ONCE):
            entries = [
                {
                    "Id": str(position),
                    "MessageBody": json.dumps({"v": SCHEMA_VERSION, "job_id": job.job_id}),
                    "MessageGroupId": self._fair_group(job),
                }
                for position, job in enumerate(some)
            ]
            unsent += [some[int(position)].job_id for position in _unsent(entries, self._send)]
        return unsent

    def _send(self, **entries: Any) -> Any:
        return aws.patiently(
            "the jobs queue", self._client.send_message_batch, QueueUrl=self._url, **entries
        )

    def _fair_group(self, job: Pointer) -> str:
        """Fair queue: the backlog of one tenant or of a blocked limit group does not delay the others."""
        return message_group(
            f"{job.tenant}/{model_group(job.model, self._model_groups, job.tenant)}"
        )

    def depth(self) -> int:
        """Return the approximate number of messages, visible or in flight."""
        return self.backlog().total

    def backlog(self) -> Backlog:
        """Return the approximate numbers of visible, delayed and in-flight messages."""
        return depth_of(self._client, self._url, "the jobs queue")


def depth_of(client: SQSClient, url: str, what: str) -> Backlog:
    """Return the approximate number of messages in a queue; `what` names it in errors."""
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
    """Sends messages to the ranges queue."""

    def __init__(self, client: SQSClient, url: str) -> None:
        self._client = client
        self._url = url

    def send_ranges(self, batch: Batch, numbers: Sequence[int]) -> list[int]:
        """Send a pointer to each range, by concurrent calls; return the numbers that were not accepted."""
        with ThreadPoolExecutor(SENDS_AT_ONCE) as threads:
            some = chunks(numbers, AT_ONCE)
            unsent = threads.map(lambda each: self._unsent(batch, each), some)
            return [int(number) for each in unsent for number in each]

    def backlog(self) -> Backlog:
        """Return the approximate numbers of visible, delayed and in-flight messages."""
        return depth_of(self._client, self._url, "the ranges queue")

    def _unsent(self, batch: Batch, numbers: Sequence[int]) -> list[str]:
        entries = [
            {
                "Id": str(number),
                "MessageBody": json.dumps(
                    {"v": SCHEMA_VERSION, "batch_id": batch.batch_id, "range": number}
                ),
                "MessageGroupId": message_group(
                    group_of_range(
                        batch.tenant, batch.batch_id, number, batch.plan.ranges if batch.plan else 0
                    )
                ),
            }
            for number in numbers
        ]
        return _unsent(entries, self._send)

    def _send(self, **entries: Any) -> Any:
        return aws.patiently(
            "the ranges queue", self._client.send_message_batch, QueueUrl=self._url, **entries
        )


class SqsBatchesQueue:
    """Sends messages to the batches queue; not for the function that this queue invokes."""

    def __init__(self, client: SQSClient, url: str) -> None:
        self._client = client
        self._url = url

    def send_plan(self, batch_id: str, tenant: str) -> None:
        """Have a batch planned; raises StoreBusy."""
        self._send({"v": SCHEMA_VERSION, "batch_id": batch_id}, f"{tenant}/plan")

    def send_join(self, batch_id: str, section: int, tenant: str) -> None:
        """Have the results of a section joined; raises StoreBusy."""
        body = {"v": SCHEMA_VERSION, "batch_id": batch_id, "join": section}
        self._send(body, f"{tenant}/join")

    def _send(self, body: object, fair_group: str) -> None:
        """Send a message of a fair queue: a tenant's many sections delay neither its next batch nor other tenants."""
        aws.patiently(
            "the batches queue",
            self._client.send_message,
            QueueUrl=self._url,
            MessageBody=json.dumps(body),
            MessageGroupId=message_group(fair_group),
        )


class Hidden:
    """Keeps a message hidden while it is processed, by short timeouts, so that it is retried soon after a crash."""

    def __init__(self, client: SQSClient, url: str, message: Received) -> None:
        self._client = client
        self._url = url
        self._message = message
        self._done = threading.Event()
        self._shown_after: int | None = None
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if self._shown_after is not None:
            self._hide(self._shown_after)
        elif kind is not None:
            doublings = min(self._message.receive_count, 6)
            self._hide(min(LONGEST_RETRY_SECONDS, FIRST_RETRY_SECONDS << doublings))

    def show(self, after_seconds: int = 0) -> None:
        """Make the message visible at the end, or so long after it, because some of its work is left."""
        self._shown_after = after_seconds

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
            # It stays hidden for the queue's visibility timeout, or was already deleted.
            return


class SqsInbox:
    """Receives messages, and returns or deletes them."""

    def __init__(
        self, client: SQSClient, url: str, dead_letters_url: str, name: str = "the jobs queue"
    ) -> None:
        self._client = client
        self._url = url
        self._dead_letters_url = dead_letters_url
        self._name = name

    def receive(self, most: int, hidden_ms: int) -> Sequence[Received]:
        """Receive up to ten messages that are visible now, with a visibility timeout of `hidden_ms`."""
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
        """Delete messages; raises StoreBusy at the end if some calls failed."""
        entries = [
            {"Id": str(position % AT_ONCE), "ReceiptHandle": message.receipt}
            for position, message in enumerate(messages)
        ]
        self._by_ten(entries, self._delete)

    def put_back(self, delays: Sequence[tuple[Received, int]]) -> None:
        """Make each message visible again after its delay in milliseconds, rounded up to seconds.

        A failed call does not stop the others; raises StoreBusy at the end. An invalid receipt is ignored: its message
        was received by another worker, or deleted.
        """
        entries = [
            {
                "Id": str(position % AT_ONCE),
                "ReceiptHandle": message.receipt,
                "VisibilityTimeout": _seconds(delay_ms),
            }
            for position, (message, delay_ms) in enumerate(delays)
        ]
        self._by_ten(entries, self._change)

    @staticmethod
    def _by_ten(entries: Sequence[Any], call: Callable[[Any], None]) -> None:
        """Make a call for every ten entries; raise the last StoreBusy at the end."""
        busy: StoreBusy | None = None
        for some in chunks(entries, AT_ONCE):
            try:
                call(some)
            except StoreBusy as error:
                busy = error
        if busy is not None:
            raise busy

    def _delete(self, entries: Any) -> None:
        aws.patiently(
            self._name, self._client.delete_message_batch, QueueUrl=self._url, Entries=entries
        )

    def _change(self, entries: Any) -> None:
        """Change up to ten visibility timeouts; raises StoreBusy if SQS fails for some of them at every try."""
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
        """Set the visibility timeout of these messages, counted from now."""
        self.put_back([(message, milliseconds) for message in messages])

    def reject(self, message: Received, reason: str) -> None:
        """Send a message that cannot be processed to the dead-letter queue, with the reason if it fits."""
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
