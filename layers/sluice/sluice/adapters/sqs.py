"""The jobs queue. Messages are small pointers; a worker changes their visibility and never re-sends them."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, Self

from botocore.exceptions import ClientError

from sluice.adapters import aws
from sluice.domain.batches import Batch
from sluice.domain.capacity import Backlog
from sluice.domain.errors import StoreBusy
from sluice.domain.jobs import SCHEMA_VERSION
from sluice.ports import Received

if TYPE_CHECKING:
    from mypy_boto3_sqs import SQSClient

AT_ONCE: Final = 10
"""SQS's limit for batch calls."""

SENDS_AT_ONCE: Final = 32
"""Calls in flight while a large batch is planned."""

HIDE_SECONDS: Final = 90
"""A batch's message whose worker died is visible again after this time."""

FIRST_RETRY_SECONDS: Final = 15
LONGEST_RETRY_SECONDS: Final = 900
"""What failed is done again after 30, 60, 120 ... 900 s."""

LONGEST_VISIBILITY_SECONDS: Final = 43_200

ENTRY_ATTEMPTS: Final = 3
"""How often a message is put back that SQS could not change while it changed others of the same call."""


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
        return self.backlog().total

    def backlog(self) -> Backlog:
        """Return the same, told apart."""
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
        numbers = answer["Attributes"]
        return Backlog(
            visible=int(numbers["ApproximateNumberOfMessages"]),
            in_flight=int(numbers["ApproximateNumberOfMessagesNotVisible"]),
            delayed=int(numbers["ApproximateNumberOfMessagesDelayed"]),
        )


class SqsBatchQueues:
    """The sending side of the queues of batches and of ranges."""

    def __init__(self, client: SQSClient, batches_url: str, ranges_url: str) -> None:
        self._client = client
        self._batches_url = batches_url
        self._ranges_url = ranges_url

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
                QueueUrl=self._ranges_url,
                Entries=entries,
            )
        except StoreBusy:
            return list(numbers)
        return [int(each["Id"]) for each in answer.get("Failed", ())]

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
            QueueUrl=self._batches_url,
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


class SqsReturns:
    """The receiving side."""

    def __init__(
        self, client: SQSClient, url: str, dead_letters_url: str, name: str = "the jobs queue"
    ) -> None:
        self._client = client
        self._url = url
        self._dead_letters_url = dead_letters_url
        self._name = name

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
                    "VisibilityTimeout": min(
                        LONGEST_VISIBILITY_SECONDS, max(0, -(-delay_ms // 1000))
                    ),
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

    def bury(self, message: Received, reason: str) -> None:
        """Send a message that is not ours to the dead-letter queue, with the reason."""
        aws.patiently(
            "the dead-letter queue",
            self._client.send_message,
            QueueUrl=self._dead_letters_url,
            MessageBody=message.body,
            MessageAttributes={"reason": {"DataType": "String", "StringValue": reason}},
        )
