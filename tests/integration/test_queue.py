"""The jobs queue: both its sides against SQS, and the reading of what Lambda delivers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Final, Protocol

import pytest
from botocore.stub import Stubber

from sluice.adapters import aws
from sluice.adapters.sqs import ENTRY_ATTEMPTS, SqsInbox, SqsQueue
from sluice.domain.errors import StoreBusy
from sluice.ports.jobs import Inbox, JobQueue, Pointer, Received
from sluice.ports.messages import reason_of, received
from tests.fakes import NOON, SECOND, FrozenClock, MemoryQueue
from tests.moto_aws import Aws, in_memory

URL: Final = "https://sqs.us-east-1.amazonaws.com/123456789012/JobsQueue"
HIDDEN_MS: Final = 120 * SECOND
DEAD_LETTERS: Final = "https://sqs.us-east-1.amazonaws.com/123456789012/DeadLettersQueue"
JOB_ID: Final = "job_0123456789abcdef0123456789abcdef"


GROUPS: Final = {"claude-a": "a", "claude-a-2": "a"}


def job_id(number: int) -> str:
    return f"job_{number:032x}"


def pointer(number: int, tenant: str = "acme", model: str = "claude-a") -> Pointer:
    return Pointer(job_id(number), tenant, model)


@pytest.fixture
def cloud() -> Iterator[Aws]:
    with in_memory() as running:
        yield running


@pytest.fixture
def client(cloud: Aws) -> Any:  # noqa: ARG001 - its credentials
    return aws.sqs()


def everything_on(cloud: Aws, url: str) -> list[dict[str, Any]]:
    messages: list[Any] = []
    while True:
        some = cloud.sqs.receive_message(
            QueueUrl=url,
            MaxNumberOfMessages=10,
            MessageSystemAttributeNames=["All"],
            MessageAttributeNames=["All"],
        ).get("Messages", [])
        if not some:
            return messages
        messages += some


def as_lambda_delivers(message: dict[str, Any]) -> dict[str, Any]:
    return {
        "messageId": message["MessageId"],
        "receiptHandle": message["ReceiptHandle"],
        "body": message["Body"],
        "attributes": message["Attributes"],
        "messageAttributes": {
            name: {"stringValue": value["StringValue"], "dataType": value["DataType"]}
            for name, value in message.get("MessageAttributes", {}).items()
        },
    }


def a_message(number: int = 1) -> Received:
    return Received(f"message-{number}", f"receipt-{number}", "{}", job_id(number))


# Sending -------------------------------------------------------------------------------------------------------


def test_a_long_list_of_jobs_arrives_whole_each_in_its_fair_group(cloud: Aws) -> None:
    """Neither a tenant's backlog nor that of a blocked limit group delays the others."""
    queue = SqsQueue(cloud.sqs, cloud.jobs_queue, GROUPS)
    models = ("claude-a", "claude-a-2", "claude-a-2-20260101", "claude-new")
    jobs = [pointer(n, f"tenant-{n % 3}", models[n % 4]) for n in range(25)]

    assert [] == queue.send(jobs)
    assert 25 == queue.depth()

    arrived = everything_on(cloud, cloud.jobs_queue)
    groups = {
        message.job_id: record["Attributes"]["MessageGroupId"]
        for record in arrived
        for message in received([as_lambda_delivers(record)])
    }
    names = ("a", "a", "a", "unknown:tenant-{}")
    assert groups == {job_id(n): f"tenant-{n % 3}/{names[n % 4].format(n % 3)}" for n in range(25)}
    assert all({"v": 1, "job_id": json.loads(r["Body"])["job_id"]} == json.loads(r["Body"])
               for r in arrived)  # fmt: skip


@pytest.mark.parametrize("model", ["us.anthropic/claude opus", "modèle", "m" * 200])
def test_a_model_of_any_name_has_a_group_of_its_own_that_sqs_takes(cloud: Aws, model: str) -> None:
    queue = SqsQueue(cloud.sqs, cloud.jobs_queue, GROUPS)

    assert [] == queue.send([pointer(1, model=model), pointer(2, model=model), pointer(3)])

    groups = [
        record["Attributes"]["MessageGroupId"] for record in everything_on(cloud, cloud.jobs_queue)
    ]
    assert 2 == len(set(groups))
    assert all(re.fullmatch(r"[!-~]{1,128}", each) for each in groups)


def test_sending_nothing_is_no_call(client: Any) -> None:
    with Stubber(client):
        assert [] == SqsQueue(client, URL, GROUPS).send([])


def test_entries_that_were_not_accepted_are_reported_by_their_jobs(client: Any) -> None:
    with Stubber(client) as stub:
        failed = [{"Id": each, "SenderFault": False, "Code": "InternalError"} for each in "27"]
        stub.add_response("send_message_batch", {"Successful": [], "Failed": failed})
        stub.add_response("send_message_batch", {"Successful": [], "Failed": failed[:1]})

        unsent = SqsQueue(client, URL, GROUPS).send([pointer(number) for number in range(15)])

    assert [job_id(2), job_id(7), job_id(12)] == unsent


def test_a_busy_queue_keeps_one_ten_and_takes_the_next(client: Any) -> None:
    with Stubber(client) as stub:
        for _ in range(4):
            stub.add_client_error("send_message_batch", "RequestThrottled", http_status_code=403)
        stub.add_response("send_message_batch", {"Successful": [], "Failed": []})

        unsent = SqsQueue(client, URL, GROUPS).send([pointer(number) for number in range(12)])

        stub.assert_no_pending_responses()
    assert [job_id(number) for number in range(10)] == unsent


def test_the_depth_counts_what_waits_is_hidden_and_is_delayed(client: Any) -> None:
    with Stubber(client) as stub:
        stub.add_response(
            "get_queue_attributes",
            {
                "Attributes": {
                    "ApproximateNumberOfMessages": "5",
                    "ApproximateNumberOfMessagesNotVisible": "70",
                    "ApproximateNumberOfMessagesDelayed": "600",
                }
            },
        )

        assert 675 == SqsQueue(client, URL, GROUPS).depth()


# Taking --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["SQS", "fake"])
def inbox(request: pytest.FixtureRequest, cloud: Aws) -> Inbox:
    """A queue of 25 jobs, from the receiving side: what the fake promises, SQS keeps."""
    jobs = [pointer(number) for number in range(25)]
    if request.param == "fake":
        memory = MemoryQueue(lambda: NOON)
        memory.send(jobs)
        return memory
    SqsQueue(cloud.sqs, cloud.jobs_queue, GROUPS).send(jobs)
    return SqsInbox(cloud.sqs, cloud.jobs_queue, cloud.dead_letters_queue)


def test_ten_messages_are_taken_at_once_at_the_most_and_each_once(inbox: Inbox) -> None:
    taken = [
        inbox.receive(10, HIDDEN_MS),
        inbox.receive(3, HIDDEN_MS),
        inbox.receive(50, HIDDEN_MS),
        inbox.receive(10, HIDDEN_MS),
    ]

    assert [10, 3, 10, 2] == [len(each) for each in taken]
    assert [] == list(inbox.receive(10, HIDDEN_MS))
    messages = [message for some in taken for message in some]
    assert {job_id(number) for number in range(25)} == {each.job_id for each in messages}
    assert {1} == {each.receive_count for each in messages}
    assert all(each.sent_at > 0 for each in messages)


def test_what_is_deleted_is_not_received_again_and_what_is_put_back_is(inbox: Inbox) -> None:
    messages = [
        *inbox.receive(10, HIDDEN_MS),
        *inbox.receive(10, HIDDEN_MS),
        *inbox.receive(10, HIDDEN_MS),
    ]

    inbox.delete(messages[:12])
    inbox.put_back([(each, 0) for each in messages])

    back = [*inbox.receive(10, HIDDEN_MS), *inbox.receive(10, HIDDEN_MS)]
    assert {each.job_id for each in messages[12:]} == {each.job_id for each in back}
    assert {2} == {each.receive_count for each in back}


def test_what_was_deleted_may_be_deleted_again(inbox: Inbox) -> None:
    messages = inbox.receive(10, HIDDEN_MS)

    inbox.delete(messages)
    inbox.delete(messages)

    assert 15 == sum(len(inbox.receive(10, HIDDEN_MS)) for _ in range(3))


def test_messages_are_taken_without_waiting_for_any(client: Any) -> None:
    """A worker has calls in flight; another second will bring what this one does not."""
    with Stubber(client) as stub:
        stub.add_response(
            "receive_message",
            {},
            {
                "QueueUrl": URL,
                "MaxNumberOfMessages": 10,
                "VisibilityTimeout": 120,
                "WaitTimeSeconds": 1,
                "MessageSystemAttributeNames": ["ApproximateReceiveCount", "SentTimestamp"],
            },
        )

        assert [] == SqsInbox(client, URL, DEAD_LETTERS).receive(50, HIDDEN_MS)


def test_a_queue_that_is_busy_gives_nothing_and_says_so(client: Any) -> None:
    with Stubber(client) as stub:
        for _ in range(4):
            stub.add_client_error("receive_message", "RequestThrottled", http_status_code=403)

        with pytest.raises(StoreBusy, match="the jobs queue"):
            SqsInbox(client, URL, DEAD_LETTERS).receive(10, HIDDEN_MS)


def test_one_busy_call_does_not_keep_the_others_from_being_deleted(client: Any) -> None:
    with Stubber(client) as stub:
        for _ in range(4):
            stub.add_client_error(
                "delete_message_batch", "ServiceUnavailable", http_status_code=503
            )
        stub.add_response(
            "delete_message_batch",
            {"Successful": [], "Failed": []},
            {
                "QueueUrl": URL,
                "Entries": [
                    {"Id": "0", "ReceiptHandle": "receipt-10"},
                    {"Id": "1", "ReceiptHandle": "receipt-11"},
                ],
            },
        )

        with pytest.raises(StoreBusy):
            SqsInbox(client, URL, DEAD_LETTERS).delete([a_message(n) for n in range(12)])

        stub.assert_no_pending_responses()


# Both sides, of the fake the use cases are tested with and of SQS itself ------------------------------------


class Side(Protocol):
    """A queue as its sender, its worker and Lambda's poller use it."""

    @property
    def queue(self) -> JobQueue: ...
    @property
    def inbox(self) -> Inbox: ...
    def receive(self) -> list[Received]: ...


class FakeSide:
    def __init__(self) -> None:
        self.queue = MemoryQueue(FrozenClock().now)
        self.inbox = self.queue

    def receive(self) -> list[Received]:
        return self.queue.deliver(1_000)


class SqsSide:
    def __init__(self, cloud: Aws) -> None:
        self._cloud = cloud
        self.queue = SqsQueue(cloud.sqs, cloud.jobs_queue, GROUPS)
        self.inbox = SqsInbox(cloud.sqs, cloud.jobs_queue, cloud.dead_letters_queue)

    def receive(self) -> list[Received]:
        records = everything_on(self._cloud, self._cloud.jobs_queue)
        return received(map(as_lambda_delivers, records))


@pytest.fixture(params=["fake", "aws"])
def side(request: pytest.FixtureRequest, cloud: Aws) -> Side:
    return FakeSide() if request.param == "fake" else SqsSide(cloud)


def some_jobs(count: int) -> list[Pointer]:
    return [pointer(number) for number in range(count)]


def test_what_is_sent_is_received_once(side: Side) -> None:
    assert [] == side.queue.send(some_jobs(25))

    assert {each.job_id for each in some_jobs(25)} == {each.job_id for each in side.receive()}
    assert [] == side.receive()


def test_what_is_with_a_worker_is_in_flight(side: Side) -> None:
    side.queue.send(some_jobs(3))
    assert (3, 0) == (side.queue.backlog().visible, side.queue.backlog().in_flight)

    side.receive()

    assert (0, 3) == (side.queue.backlog().visible, side.queue.backlog().in_flight)
    assert 3 == side.queue.depth()


def test_what_is_put_back_at_once_is_received_again_under_another_receipt(side: Side) -> None:
    side.queue.send(some_jobs(1))
    (first,) = side.receive()

    side.inbox.put_back([(first, 0)])

    (second,) = side.receive()
    assert (first.message_id, 1, 2) == (
        second.message_id,
        first.receive_count,
        second.receive_count,
    )
    assert first.receipt != second.receipt


def test_what_is_put_back_with_a_delay_stays_hidden(side: Side) -> None:
    side.queue.send(some_jobs(1))
    (message,) = side.receive()

    side.inbox.put_back([(message, 60_000)])

    assert [] == side.receive()


def test_what_is_kept_hidden_for_no_time_is_visible(side: Side) -> None:
    """The time counts from now, whatever it was before."""
    side.queue.send(some_jobs(12))
    messages = side.receive()

    side.inbox.keep_hidden(messages, 60_000)
    assert [] == side.receive()
    side.inbox.keep_hidden(messages, 0)

    assert 12 == len(side.receive())


def test_what_is_acknowledged_is_deleted(side: Side) -> None:
    side.queue.send(some_jobs(1))
    (message,) = side.receive()

    side.inbox.delete([message])

    assert 0 == side.queue.depth()


def test_a_message_that_is_missing_cannot_be_put_back(side: Side) -> None:
    side.queue.send(some_jobs(1))
    (message,) = side.receive()
    side.inbox.delete([message])

    side.inbox.put_back([(message, 0)])

    assert [] == side.receive()


# Returning -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("delay_ms", "seconds"),
    [(0, 0), (-5, 0), (1, 1), (1_000, 1), (1_001, 2), (900_000, 900), (10**12, 43_200)],
)
def test_a_delay_is_rounded_up_to_what_sqs_knows(client: Any, delay_ms: int, seconds: int) -> None:
    """Never earlier than asked for, and never more than the twelve hours that SQS allows."""
    with Stubber(client) as stub:
        stub.add_response(
            "change_message_visibility_batch",
            {"Successful": [], "Failed": []},
            {
                "QueueUrl": URL,
                "Entries": [
                    {"Id": "0", "ReceiptHandle": "receipt-1", "VisibilityTimeout": seconds}
                ],
            },
        )

        SqsInbox(client, URL, DEAD_LETTERS).put_back([(a_message(), delay_ms)])

        stub.assert_no_pending_responses()


def test_messages_become_visible_after_their_own_delays(cloud: Aws) -> None:
    queue = SqsQueue(cloud.sqs, cloud.jobs_queue, GROUPS)
    queue.send([pointer(number) for number in range(25)])
    messages = received(map(as_lambda_delivers, everything_on(cloud, cloud.jobs_queue)))

    SqsInbox(cloud.sqs, cloud.jobs_queue, cloud.dead_letters_queue).put_back(
        [(each, 0 if position % 2 else 600_000) for position, each in enumerate(messages)]
    )

    back = received(map(as_lambda_delivers, everything_on(cloud, cloud.jobs_queue)))
    assert {each.job_id for each in messages[1::2]} == {each.job_id for each in back}
    assert {2} == {each.receive_count for each in back}
    assert 25 == queue.depth()


def test_one_busy_call_does_not_keep_the_other_messages(client: Any) -> None:
    with Stubber(client) as stub:
        for _ in range(4):
            stub.add_client_error(
                "change_message_visibility_batch", "ServiceUnavailable", http_status_code=503
            )
        stub.add_response("change_message_visibility_batch", {"Successful": [], "Failed": []})

        with pytest.raises(StoreBusy):
            SqsInbox(client, URL, DEAD_LETTERS).put_back(
                [(a_message(number), 0) for number in range(12)]
            )

        stub.assert_no_pending_responses()


def refusals(*positions: str, sender_fault: bool) -> dict[str, Any]:
    failed = [{"Id": each, "SenderFault": sender_fault, "Code": "Because"} for each in positions]
    return {"Successful": [], "Failed": failed}


def test_messages_sqs_failed_on_are_put_back_again_and_only_they(client: Any) -> None:
    with Stubber(client) as stub:
        call = "change_message_visibility_batch"
        stub.add_response(call, refusals("1", sender_fault=False))
        again = [{"Id": "1", "ReceiptHandle": "receipt-1", "VisibilityTimeout": 7}]
        stub.add_response(call, refusals(sender_fault=False), {"QueueUrl": URL, "Entries": again})

        SqsInbox(client, URL, DEAD_LETTERS).put_back(
            [(a_message(number), 7_000) for number in range(3)]
        )

        stub.assert_no_pending_responses()


def test_messages_sqs_fails_on_every_time_do_not_keep_the_others(client: Any) -> None:
    with Stubber(client) as stub:
        call = "change_message_visibility_batch"
        for _ in range(ENTRY_ATTEMPTS):
            stub.add_response(call, refusals("0", sender_fault=False))
        stub.add_response(call, refusals(sender_fault=False))

        with pytest.raises(StoreBusy):
            SqsInbox(client, URL, DEAD_LETTERS).put_back(
                [(a_message(number), 0) for number in range(12)]
            )

        stub.assert_no_pending_responses()


def test_a_receipt_that_is_no_longer_valid_is_ignored(client: Any) -> None:
    with Stubber(client) as stub:
        stub.add_response("change_message_visibility_batch", refusals("0", "1", sender_fault=True))

        SqsInbox(client, URL, DEAD_LETTERS).put_back(
            [(a_message(number), 0) for number in range(2)]
        )

        stub.assert_no_pending_responses()


def test_a_rejected_message_keeps_its_body_and_gets_its_reason(cloud: Aws) -> None:
    cloud.sqs.send_message(QueueUrl=cloud.jobs_queue, MessageBody="Wässrig <b>💧</b>")
    (record,) = everything_on(cloud, cloud.jobs_queue)
    (message,) = received([as_lambda_delivers(record)])

    returns = SqsInbox(cloud.sqs, cloud.jobs_queue, cloud.dead_letters_queue)
    returns.reject(message, "not a message of Sluice's")

    (rejected,) = everything_on(cloud, cloud.dead_letters_queue)
    assert "Wässrig <b>💧</b>" == rejected["Body"]
    assert "not a message of Sluice's" == reason_of(as_lambda_delivers(rejected))


def test_a_message_that_cannot_be_rejected_now_is_not_lost(client: Any) -> None:
    with Stubber(client) as stub:
        for _ in range(4):
            stub.add_client_error("send_message", "InternalError", http_status_code=500)

        with pytest.raises(StoreBusy, match="the dead-letter queue"):
            SqsInbox(client, URL, DEAD_LETTERS).reject(a_message(), "why")


# What Lambda delivers ----------------------------------------------------------------------------------------


def record(body: str, **more: Any) -> dict[str, Any]:
    return {"messageId": "message-1", "receiptHandle": "receipt-1", "body": body, **more}


def test_a_pointer_is_read_with_its_history() -> None:
    attributes = {"ApproximateReceiveCount": "7", "SentTimestamp": "1795338928412"}
    body = f'{{"v": 1, "job_id": "{JOB_ID}"}}'

    (message,) = received([record(body, attributes=attributes)])

    assert message == Received(
        "message-1", "receipt-1", body, JOB_ID, None, receive_count=7, sent_at=1795338928412
    )


def test_a_canary_is_read() -> None:
    (message,) = received([record('{"v": 1, "canary": "local-1"}')])

    assert (None, "local-1") == (message.job_id, message.canary)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "not JSON",
        "null",
        "7",
        "[]",
        '"job_1"',
        "{}",
        "NaN",
        "\x00",
        '{"v": 1}',
        f'{{"job_id": "{JOB_ID}"}}',
        f'{{"v": 0, "job_id": "{JOB_ID}"}}',
        f'{{"v": true, "job_id": "{JOB_ID}"}}',
        f'{{"v": "1", "job_id": "{JOB_ID}"}}',
        '{"v": 1, "job_id": ""}',
        '{"v": 1, "job_id": 5}',
        '{"v": 1, "job_id": null}',
        '{"v": 1, "job_id": "job_1"}',
        '{"v": 1, "job_id": "job_0123456789ABCDEF0123456789ABCDEF"}',
        f'{{"v": 1, "job_id": "{JOB_ID}\\n"}}',
        json.dumps({"v": 1, "job_id": "job_" + "0" * 5_000}),
        '{"v": 1, "canary": ""}',
        '{"v": 1, "canary": {"id": 1}}',
        json.dumps({"v": 1, "canary": "c" * 3_000}),
        "[" * 100_000,
        '{"v": ' + "9" * 5_000 + "}",
    ],
)  # fmt: skip
def test_a_foreign_body_is_kept_and_changes_no_job(body: str) -> None:
    """One such message must not keep Lambda from running the forty-nine others of its batch."""
    ours = f'{{"v": 1, "job_id": "{JOB_ID}"}}'

    messages = received([record(body), record(ours)])

    assert [(None, None, body), (JOB_ID, None, ours)] == [
        (each.job_id, each.canary, each.body) for each in messages
    ]


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"reason": {"stringValue": "why", "dataType": "String"}}, "why"),
        ({"reason": {"stringValue": "", "dataType": "String"}}, None),
        ({"reason": {"binaryValue": "d2h5", "dataType": "Binary"}}, None),
        ({}, None),
    ],
)
def test_the_reason_is_what_the_worker_wrote(
    attributes: dict[str, Any], reason: str | None
) -> None:
    assert reason == reason_of(record("", messageAttributes=attributes))
    assert reason_of(record("")) is None
