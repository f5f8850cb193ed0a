"""The emulator refuses what AWS refuses: each limit just below and just above, through boto3 and HTTP.

What the local stack adds to the emulator is scripts/local_stack/emulator_sizes.py and emulator_memory.py; the others
ministack enforces by itself, and a release that no longer does fails here.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from botocore.exceptions import ClientError

from scripts.local_stack.emulator import Emulator
from sluice.adapters.sqs import SqsInbox
from sluice.ports.jobs import Received

ROLE: Final = "arn:aws:iam::000000000000:role/any"
SYNCHRONOUS: Final = 6_291_556
MIB: Final = 1024 * 1024
PATIENCE_SECONDS: Final = 30

HANDLER: Final = """
import json, os, time

held = []

def note(line):  # a line of the log may be missed when the machine is busy
    with open(os.environ["NOTES"], "a") as notes:
        print(line, file=notes)

def handler(event, context):
    body = event.get("body")
    asked = json.loads(body) if isinstance(body, str) and body.startswith("{") else event
    if "megabytes" in asked:
        held.append(b"x" * (asked["megabytes"] * 1024 * 1024))
        if asked.get("briefly"):
            held.clear()
        time.sleep(asked.get("seconds", 0))
    elif "seconds" in asked:
        time.sleep(asked["seconds"])
        note("went on to its end")
    if "child" in asked:
        import subprocess, sys
        code = f"import time; x = b'x' * ({asked['child']} << 20); time.sleep(20)"
        subprocess.run([sys.executable, "-c", code])
    if "answer" in asked:
        return "x" * asked["answer"]
    if "Records" in asked:
        note(f"batch of {len(asked['Records'])}")
        if any("kill" in record["body"] for record in asked["Records"]):
            held.append(b"x" * (400 * 1024 * 1024))
            time.sleep(20)
        return {"batchItemFailures": []}
    return {"statusCode": 200, "body": json.dumps({"pid": os.getpid(), "size": len(body or "")})}
"""


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    running = Emulator()
    try:
        running.wait_until_it_answers()
        trust = {"Effect": "Allow", "Principal": {"Service": "lambda.amazonaws.com"}}
        running.client("iam").create_role(
            RoleName=ROLE.rpartition("/")[2],
            AssumeRolePolicyDocument=json.dumps(
                {"Version": "2012-10-17", "Statement": [{**trust, "Action": "sts:AssumeRole"}]}
            ),
        )
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What functions note, a line each."""
    file = tmp_path_factory.mktemp("functions") / "notes"
    file.touch()
    return file


@pytest.fixture(scope="module")
def function(emulator: Emulator, notes: Path) -> str:
    return made_function(emulator, "probe", memory=256, timeout=60, notes=notes)


def made_function(
    emulator: Emulator, name: str, *, memory: int, timeout: int, notes: Path = Path(os.devnull)
) -> str:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("app.py", HANDLER)
    created = emulator.client("lambda").create_function(
        FunctionName=name,
        Runtime="python3.13",
        Handler="app.handler",
        Role=ROLE,
        Code={"ZipFile": packed.getvalue()},
        MemorySize=memory,
        Environment={"Variables": {"NOTES": str(notes)}},
        Timeout=timeout,
    )
    return str(created["FunctionArn"])


def invoked(emulator: Emulator, event: Any, name: str = "probe") -> tuple[str | None, Any]:
    """Return the function's error, None for none, and what it answered."""
    answer = emulator.client("lambda").invoke(FunctionName=name, Payload=json.dumps(event).encode())
    return answer.get("FunctionError"), json.loads(answer["Payload"].read())


def logged(emulator: Emulator, name: str = "probe") -> str:
    events = emulator.client("logs").filter_log_events(logGroupName=f"/aws/lambda/{name}")["events"]
    return "\n".join(event["message"] for event in events)


def refused(call: Callable[..., Any], **arguments: Any) -> tuple[str, int]:
    """Return the code and the HTTP status of the refusal."""
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    response = caught.value.response
    return response["Error"]["Code"], response["ResponseMetadata"]["HTTPStatusCode"]


def eventually(look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not look():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


# ---------------------------------------------------------------- memory


@pytest.mark.usefixtures("function")
def test_a_function_within_its_memory_keeps_its_environment(emulator: Emulator) -> None:
    made_function(emulator, "modest", memory=256, timeout=60)

    pids = {
        json.loads(invoked(emulator, {"megabytes": 100, "briefly": True}, "modest")[1]["body"])[
            "pid"
        ]
        for _ in range(2)
    }

    assert 1 == len(pids)
    report = next(line for line in logged(emulator, "modest").splitlines() if "REPORT" in line)
    used = int(report.partition("Max Memory Used: ")[2].split()[0])
    assert 100 < used < 200


@pytest.mark.usefixtures("function")
@pytest.mark.parametrize(
    "event",
    [
        {"megabytes": 300, "seconds": 20},
        {"megabytes": 300, "briefly": True},
        {"child": 300},
    ],
    ids=["held", "a peak", "a child's"],
)
def test_a_function_above_its_memory_is_killed_and_not_used_again(
    emulator: Emulator, event: dict[str, Any]
) -> None:
    before = json.loads(invoked(emulator, {})[1]["body"])["pid"]

    kind, answer = invoked(emulator, event)

    after = json.loads(invoked(emulator, {})[1]["body"])["pid"]
    assert "Unhandled" == kind
    assert "Runtime.ExitError" == answer["errorType"]
    assert answer["errorMessage"].startswith("RequestId: ")
    assert answer["errorMessage"].endswith("Error: Runtime exited with error: signal: killed")
    assert before != after
    log = logged(emulator)
    request_id = answer["errorMessage"].split()[1]
    assert answer["errorMessage"] in log
    assert "MB, memory size: 256 MB" in log
    (report,) = (line for line in log.splitlines() if f"REPORT RequestId: {request_id}" in line)
    assert report.endswith("Memory Size: 256 MB\tMax Memory Used: 256 MB")


def test_the_messages_of_a_killed_function_become_visible_after_their_visibility_timeout(
    emulator: Emulator,
) -> None:
    arn = made_function(emulator, "worker", memory=256, timeout=5)
    sqs = emulator.client("sqs")
    dead = sqs.create_queue(QueueName="dead")["QueueUrl"]
    redrive = {
        "deadLetterTargetArn": "arn:aws:sqs:us-east-1:000000000000:dead",
        "maxReceiveCount": "2",
    }
    queue = sqs.create_queue(
        QueueName="killing",
        Attributes={"VisibilityTimeout": "5", "RedrivePolicy": json.dumps(redrive)},
    )["QueueUrl"]
    emulator.client("lambda").create_event_source_mapping(
        EventSourceArn="arn:aws:sqs:us-east-1:000000000000:killing",
        FunctionName=arn,
        BatchSize=10,
        FunctionResponseTypes=["ReportBatchItemFailures"],
    )

    sqs.send_message(QueueUrl=queue, MessageBody="kill")

    def died() -> bool:
        found = sqs.get_queue_attributes(QueueUrl=dead, AttributeNames=["All"])["Attributes"]
        sqs.receive_message(QueueUrl=queue)  # as on AWS, a receive finds what is to be moved
        return bool(found["ApproximateNumberOfMessages"] == "1")

    eventually(died)
    assert 2 <= logged(emulator, "worker").count("Runtime.ExitError")


# ---------------------------------------------------------------- payloads


@pytest.mark.usefixtures("function")
def test_an_answer_of_a_function_has_at_most_6_mb(emulator: Emulator) -> None:
    quotes = 2

    error, answer = invoked(emulator, {"answer": SYNCHRONOUS - quotes})
    assert (None, SYNCHRONOUS - quotes) == (error, len(answer))

    error, answer = invoked(emulator, {"answer": SYNCHRONOUS - quotes + 1})
    assert "Unhandled" == error
    assert "Function.ResponseSizeTooLarge" == answer["errorType"]
    assert "Function.ResponseSizeTooLarge" in logged(emulator)


@pytest.mark.usefixtures("function")
@pytest.mark.parametrize(
    ("kind", "most"), [("RequestResponse", SYNCHRONOUS), ("Event", MIB)], ids=str
)
def test_a_request_of_a_function_has_at_most_its_size(
    emulator: Emulator, kind: str, most: int
) -> None:
    fits = json.dumps({"x": "x" * (most - 9)}).encode()
    assert most == len(fits)
    lambdas = emulator.client("lambda")

    taken = lambdas.invoke(FunctionName="probe", InvocationType=kind, Payload=fits)

    taken["Payload"].read()
    assert taken["StatusCode"] in {200, 202}
    assert ("RequestTooLargeException", 413) == refused(
        lambdas.invoke, FunctionName="probe", InvocationType=kind, Payload=fits + b" "
    )


def test_a_function_ends_with_its_timeout(emulator: Emulator) -> None:
    made_function(emulator, "impatient", memory=256, timeout=1)

    error, answer = invoked(emulator, {"seconds": 10}, "impatient")

    assert ("Unhandled", "Sandbox.Timedout") == (error, answer["errorType"])
    assert answer["errorMessage"].endswith("Task timed out after 1.00 seconds")


@pytest.fixture(scope="module")
def api(emulator: Emulator, function: str) -> str:
    """An HTTP API with the function behind it, which it gives 2 s on one route."""
    gateway = emulator.client("apigatewayv2")
    api_id = gateway.create_api(Name="probe", ProtocolType="HTTP")["ApiId"]
    for path, milliseconds in (("/patient", 30_000), ("/hasty", 2_000)):
        integration = gateway.create_integration(
            ApiId=api_id,
            IntegrationType="AWS_PROXY",
            IntegrationUri=function,
            PayloadFormatVersion="2.0",
            TimeoutInMillis=milliseconds,
        )["IntegrationId"]
        gateway.create_route(
            ApiId=api_id, RouteKey=f"POST {path}", Target=f"integrations/{integration}"
        )
    gateway.create_stage(ApiId=api_id, StageName="$default", AutoDeploy=True)
    return f"{emulator.endpoint_url}/_aws/execute-api/{api_id}"


def posted(url: str, body: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(
        url, content=content, headers={"content-type": "application/json"}, timeout=60
    )


def test_a_failed_function_is_a_plain_500_of_the_api(api: str) -> None:
    killed = posted(f"{api}/patient", {"megabytes": 300, "seconds": 20})
    too_large = posted(f"{api}/patient", {"answer": SYNCHRONOUS})

    for answer in (killed, too_large):
        assert (500, {"message": "Internal Server Error"}) == (answer.status_code, answer.json())


def test_a_body_the_api_or_the_function_cannot_take_is_a_413(api: str) -> None:
    five = posted(f"{api}/patient", b"x" * 5 * MIB)
    above_lambda = posted(f"{api}/patient", b"x" * (6 * MIB + 100))
    above_gateway = posted(f"{api}/patient", b"x" * (10 * MIB + 1))

    assert (200, 5 * MIB) == (five.status_code, five.json()["size"])
    for answer in (above_lambda, above_gateway):
        assert (413, {"message": "Request Too Long"}) == (answer.status_code, answer.json())
    assert above_lambda.headers["apigw-requestid"] != above_gateway.headers["apigw-requestid"]


def test_the_api_gives_up_on_a_slow_function_which_goes_on(api: str, notes: Path) -> None:
    said = "went on to its end"

    gave_up = posted(f"{api}/hasty", {"seconds": 4})

    assert (503, {"message": "Service Unavailable"}) == (gave_up.status_code, gave_up.json())
    assert said not in notes.read_text()
    eventually(lambda: said in notes.read_text())
    assert 200 == posted(f"{api}/hasty", {"seconds": 0.1}).status_code


# ---------------------------------------------------------------- queues


@pytest.fixture
def queue(emulator: Emulator, request: pytest.FixtureRequest) -> Iterator[str]:
    sqs = emulator.client("sqs")
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)[:80]
    url = sqs.create_queue(QueueName=name)["QueueUrl"]
    yield url
    sqs.delete_queue(QueueUrl=url)


ATTRIBUTES: Final = {"reason": {"DataType": "String", "StringValue": "y" * 100}}
ATTRIBUTES_BYTES: Final = len("reason") + len("String") + 100


def test_a_message_has_at_most_1_mib_with_its_attributes(emulator: Emulator, queue: str) -> None:
    send = emulator.client("sqs").send_message

    send(QueueUrl=queue, MessageBody="x" * MIB)
    send(QueueUrl=queue, MessageBody="x" * (MIB - ATTRIBUTES_BYTES), MessageAttributes=ATTRIBUTES)

    too_long = ("InvalidParameterValue", 400)
    assert too_long == refused(send, QueueUrl=queue, MessageBody="x" * (MIB + 1))
    assert too_long == refused(send, QueueUrl=queue, MessageBody="é" * (MIB // 2 + 1))
    assert too_long == refused(
        send,
        QueueUrl=queue,
        MessageBody="x" * (MIB - ATTRIBUTES_BYTES + 1),
        MessageAttributes=ATTRIBUTES,
    )


@pytest.mark.parametrize(("body", "reasons"), [(MIB - 100, ["why"]), (MIB, [])], ids=str)
def test_the_worker_rejects_even_the_largest_message(
    emulator: Emulator, queue: str, body: int, reasons: list[str]
) -> None:
    """It has no attributes; with the reason as an attribute it may be too large to be forwarded."""
    sqs = emulator.client("sqs")
    message = Received("message-1", "receipt-1", "x" * body, None)

    SqsInbox(sqs, queue, queue).reject(message, "why")

    (rejected,) = sqs.receive_message(QueueUrl=queue, MessageAttributeNames=["All"])["Messages"]
    assert body == len(rejected["Body"])
    attributes = rejected.get("MessageAttributes", {})
    assert reasons == [each["StringValue"] for each in attributes.values()]


def test_a_batch_has_at_most_1_mib_and_ten_messages(emulator: Emulator, queue: str) -> None:
    send = emulator.client("sqs").send_message_batch

    def entries(*sizes: int, **more: Any) -> list[dict[str, Any]]:
        return [
            {"Id": str(number), "MessageBody": "x" * size, **more}
            for number, size in enumerate(sizes)
        ]

    half = MIB // 2
    assert 2 == len(send(QueueUrl=queue, Entries=entries(half, half))["Successful"])
    assert 10 == len(send(QueueUrl=queue, Entries=entries(*[1] * 10))["Successful"])

    too_long = ("AWS.SimpleQueueService.BatchRequestTooLong", 400)
    assert too_long == refused(send, QueueUrl=queue, Entries=entries(half, half + 1))
    assert too_long == refused(
        send,
        QueueUrl=queue,
        Entries=entries(half, half - 2 * ATTRIBUTES_BYTES + 1, MessageAttributes=ATTRIBUTES),
    )
    assert ("AWS.SimpleQueueService.TooManyEntriesInBatchRequest", 400) == refused(
        send, QueueUrl=queue, Entries=entries(*[1] * 11)
    )


def test_a_message_waits_at_most_15_minutes(emulator: Emulator, queue: str) -> None:
    sqs = emulator.client("sqs")

    sqs.send_message(QueueUrl=queue, MessageBody="x", DelaySeconds=900)

    assert ("InvalidParameterValue", 400) == refused(
        sqs.send_message, QueueUrl=queue, MessageBody="x", DelaySeconds=901
    )
    answer = sqs.send_message_batch(
        QueueUrl=queue,
        Entries=[
            {"Id": "good", "MessageBody": "x", "DelaySeconds": 900},
            {"Id": "bad", "MessageBody": "x", "DelaySeconds": 901},
        ],
    )
    assert ["good"] == [each["Id"] for each in answer["Successful"]]
    assert ["bad"] == [each["Id"] for each in answer["Failed"]]


def test_a_message_is_hidden_for_at_most_12_hours_since_it_was_received(
    emulator: Emulator, queue: str
) -> None:
    sqs = emulator.client("sqs")
    sqs.send_message(QueueUrl=queue, MessageBody="x")
    (message,) = sqs.receive_message(QueueUrl=queue)["Messages"]
    one = {"QueueUrl": queue, "ReceiptHandle": message["ReceiptHandle"]}

    sqs.change_message_visibility(**one, VisibilityTimeout=43_200)

    invalid = ("InvalidParameterValue", 400)
    assert invalid == refused(sqs.change_message_visibility, **one, VisibilityTimeout=43_201)
    time.sleep(2.5)
    assert invalid == refused(sqs.change_message_visibility, **one, VisibilityTimeout=43_200)
    entry = {"ReceiptHandle": message["ReceiptHandle"]}
    answer = sqs.change_message_visibility_batch(
        QueueUrl=queue,
        Entries=[
            {"Id": "long", **entry, "VisibilityTimeout": 43_200},
            {"Id": "short", **entry, "VisibilityTimeout": 43_000},
        ],
    )
    assert (["short"], ["long"]) == (
        [each["Id"] for each in answer["Successful"]],
        [each["Id"] for each in answer["Failed"]],
    )
    assert invalid == refused(sqs.receive_message, QueueUrl=queue, VisibilityTimeout=43_201)


def test_a_batch_of_a_mapping_ends_before_6_mb(emulator: Emulator, tmp_path: Path) -> None:
    """Twelve messages of 1 MiB: five each fit into an event, six do not."""
    notes = tmp_path / "notes"
    notes.touch()
    arn = made_function(emulator, "gatherer", memory=1024, timeout=30, notes=notes)
    sqs = emulator.client("sqs")
    queue = sqs.create_queue(QueueName="large", Attributes={"VisibilityTimeout": "60"})["QueueUrl"]
    for _ in range(12):
        sqs.send_message(QueueUrl=queue, MessageBody="x" * (MIB - 1))

    emulator.client("lambda").create_event_source_mapping(
        EventSourceArn="arn:aws:sqs:us-east-1:000000000000:large",
        FunctionName=arn,
        BatchSize=50,
        MaximumBatchingWindowInSeconds=1,
    )

    def batches() -> list[int]:
        return [int(line.split()[-1]) for line in notes.read_text().splitlines()]

    eventually(lambda: sum(batches()) == 12)
    assert 5 == max(batches())


def test_a_fair_queue_delivers_a_quiet_group_before_a_noisy_one(emulator: Emulator) -> None:
    sqs = emulator.client("sqs")
    queue = sqs.create_queue(QueueName="fair", Attributes={"VisibilityTimeout": "60"})["QueueUrl"]

    def receive(most: int) -> list[str]:
        got = sqs.receive_message(QueueUrl=queue, MaxNumberOfMessages=most)
        return [each["Body"] for each in got["Messages"]]

    for _ in range(6):
        entries = [
            {"Id": str(n), "MessageBody": "noisy", "MessageGroupId": "noisy"} for n in range(10)
        ]
        sqs.send_message_batch(QueueUrl=queue, Entries=entries)
    for _ in range(4):
        receive(10)
    sqs.send_message(QueueUrl=queue, MessageBody="quiet", MessageGroupId="quiet")
    sqs.send_message(QueueUrl=queue, MessageBody="alone")

    assert ["quiet", "alone", "noisy"] == receive(3)


def test_120_000_messages_may_be_in_flight() -> None:
    """In its own process: to receive this many over HTTP takes an hour."""
    script = """
import asyncio, time
from scripts.local_stack import emulator_runner, emulator_sizes
emulator_runner.lift_batch_cap(emulator_runner.replace_poll_event())
emulator_sizes.enforce()
from ministack.services import sqs
url = sqs._act_create_queue({"QueueName": "full"}, "")["QueueUrl"]
queue = sqs._get_q(url)
later = time.time() + 1000
flying = {"visible_at": later, "receive_count": 1, "receipt_handle": "r", "sent_at": time.time()}
queue["messages"] += [dict(flying, id=str(n)) for n in range(119_999)]
for body in "ab":
    sqs._act_send_message({"QueueUrl": url, "MessageBody": body}, url)
receive = lambda: asyncio.run(sqs._HANDLERS["ReceiveMessage"]({"QueueUrl": url, "MaxNumberOfMessages": 10}, url))
print([each["Body"] for each in receive()["Messages"]])
try:
    receive()
except sqs._Err as error:
    print(error.code)
print(sqs._receive_messages_for_esm(url, 10))
queue["messages"][0]["visible_at"] = 0
queue["messages"].pop(0)
print([each["body"] for each in sqs._receive_messages_for_esm(url, 10)])
"""

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120
    )

    assert "['a']\nOverLimit\n[]\n['b']\n" == done.stdout, done.stderr


# ---------------------------------------------------------------- stores and buses


@pytest.fixture(scope="module")
def table(emulator: Emulator) -> str:
    emulator.client("dynamodb").create_table(
        TableName="probe",
        KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
        AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
        BillingMode="PAY_PER_REQUEST",
    )
    return "probe"


ITEM_BYTES: Final = 400 * 1024


def item(name: str, size: int) -> dict[str, Any]:
    """An item of exactly this many bytes: names and values count."""
    return {"id": {"S": name}, "x": {"S": "x" * (size - len("id") - len(name) - len("x"))}}


INVALID: Final = ("ValidationException", 400)


def test_an_item_has_at_most_400_kb(emulator: Emulator, table: str) -> None:
    dynamodb = emulator.client("dynamodb")

    dynamodb.put_item(TableName=table, Item=item("whole", ITEM_BYTES))

    assert INVALID == refused(
        dynamodb.put_item, TableName=table, Item=item("whole", ITEM_BYTES + 1)
    )
    assert INVALID == refused(
        dynamodb.update_item,
        TableName=table,
        Key={"id": {"S": "whole"}},
        UpdateExpression="SET y = :y",
        ExpressionAttributeValues={":y": {"S": ""}},
    )
    put = {"PutRequest": {"Item": item("whole", ITEM_BYTES + 1)}}
    assert INVALID == refused(dynamodb.batch_write_item, RequestItems={table: [put]})


def test_a_batch_of_writes_has_at_most_25(emulator: Emulator, table: str) -> None:
    dynamodb = emulator.client("dynamodb")
    puts = [{"PutRequest": {"Item": item(f"w{n:02}", 100)}} for n in range(26)]

    dynamodb.batch_write_item(RequestItems={table: puts[:25]})

    assert INVALID == refused(dynamodb.batch_write_item, RequestItems={table: puts})


def test_a_batch_of_statements_has_at_most_25(emulator: Emulator, table: str) -> None:
    dynamodb = emulator.client("dynamodb")
    one = f"SELECT * FROM {table} WHERE id = ?"  # noqa: S608 - a name of our own
    statements = [{"Statement": one, "Parameters": [{"S": f"s{n}"}]} for n in range(26)]

    dynamodb.batch_execute_statement(Statements=statements[:25])

    assert INVALID == refused(dynamodb.batch_execute_statement, Statements=statements)


def test_a_transaction_has_at_most_100_actions_and_4_mb(emulator: Emulator, table: str) -> None:
    dynamodb = emulator.client("dynamodb")

    def puts(count: int, size: int) -> list[dict[str, Any]]:
        return [{"Put": {"TableName": table, "Item": item(f"t{n:03}", size)}} for n in range(count)]

    dynamodb.transact_write_items(TransactItems=puts(100, 100))
    dynamodb.transact_write_items(TransactItems=puts(10, ITEM_BYTES))

    assert INVALID == refused(dynamodb.transact_write_items, TransactItems=puts(101, 100))
    assert INVALID == refused(dynamodb.transact_write_items, TransactItems=puts(11, ITEM_BYTES))


@pytest.fixture(scope="module")
def many(emulator: Emulator) -> list[str]:
    """Sixty items of 300 KB in a table of their own."""
    dynamodb = emulator.client("dynamodb")
    for name in ("many", "others"):
        dynamodb.create_table(
            TableName=name,
            KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
            AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
            BillingMode="PAY_PER_REQUEST",
        )
    names = [f"m{n:02}" for n in range(60)]
    for name in names:
        dynamodb.put_item(TableName="many", Item=item(name, 300 * 1024))
    return names


@pytest.mark.parametrize("projection", [{}, {"ProjectionExpression": "id"}], ids=str)
def test_a_batch_of_reads_answers_16_mb_and_names_the_other_keys(
    emulator: Emulator, many: list[str], projection: dict[str, str]
) -> None:
    """AWS's own example has 300 KB items; of 300 KiB, 54 fit into 16 MiB."""
    dynamodb = emulator.client("dynamodb")
    asked = {"many": {"Keys": [{"id": {"S": name}} for name in many], **projection}}

    answer = dynamodb.batch_get_item(RequestItems=asked)

    assert many[:54] == [each["id"]["S"] for each in answer["Responses"]["many"]]
    assert many[54:] == [each["id"]["S"] for each in answer["UnprocessedKeys"]["many"]["Keys"]]
    rest = dynamodb.batch_get_item(RequestItems=answer["UnprocessedKeys"])
    assert many[54:] == [each["id"]["S"] for each in rest["Responses"]["many"]]
    assert not rest["UnprocessedKeys"]


@pytest.mark.usefixtures("many")
def test_a_batch_of_reads_has_at_most_100_keys_in_all(emulator: Emulator) -> None:
    get = emulator.client("dynamodb").batch_get_item

    def keys(count: int) -> dict[str, Any]:
        return {"Keys": [{"id": {"S": f"k{n}"}} for n in range(count)]}

    get(RequestItems={"many": keys(100)})
    get(RequestItems={"many": keys(50), "others": keys(50)})

    assert INVALID == refused(get, RequestItems={"many": keys(101)})
    assert INVALID == refused(get, RequestItems={"many": keys(50), "others": keys(51)})


@pytest.mark.usefixtures("many")
def test_a_page_has_at_most_1_mb(emulator: Emulator) -> None:
    dynamodb = emulator.client("dynamodb")

    page = dynamodb.scan(TableName="many")

    assert 3 <= len(page["Items"]) <= 4
    assert "LastEvaluatedKey" in page


def event(size: int) -> dict[str, Any]:
    """An entry of exactly this many bytes."""
    source, detail_type, frame = "probe", "Probe", len('{"x": ""}')
    detail = json.dumps({"x": "x" * (size - len(source) - len(detail_type) - frame)})
    return {"Source": source, "DetailType": detail_type, "Detail": detail}


def test_the_entries_of_put_events_have_at_most_1_mb_together(emulator: Emulator) -> None:
    put = emulator.client("events").put_events

    assert 0 == put(Entries=[event(MIB)])["FailedEntryCount"]
    assert 0 == put(Entries=[event(MIB // 2), event(MIB // 2)])["FailedEntryCount"]
    assert 0 == put(Entries=[event(100)] * 10)["FailedEntryCount"]

    assert INVALID == refused(put, Entries=[event(MIB + 1)])
    assert INVALID == refused(put, Entries=[event(MIB // 2), event(MIB // 2 + 1)])
    assert INVALID == refused(put, Entries=[event(100)] * 11)


def test_a_secret_has_at_most_64_kb(emulator: Emulator) -> None:
    secrets = emulator.client("secretsmanager")

    secrets.create_secret(Name="whole", SecretString="x" * 65_536)
    secrets.put_secret_value(SecretId="whole", SecretString="y" * 65_536)

    long = "é" * 32_769
    assert INVALID == refused(secrets.create_secret, Name="long", SecretString=long)
    assert INVALID == refused(secrets.put_secret_value, SecretId="whole", SecretString=long)
    assert INVALID == refused(secrets.update_secret, SecretId="whole", SecretString=long)


def test_many_functions_at_once_are_watched_each_by_its_own_size(emulator: Emulator) -> None:
    made_function(emulator, "large", memory=512, timeout=60)
    made_function(emulator, "small", memory=128, timeout=60)

    with ThreadPoolExecutor(8) as pool:
        names = ["large", "small"] * 4
        found = pool.map(
            lambda name: invoked(emulator, {"megabytes": 150, "seconds": 0.5}, name)[0], names
        )

    assert [None, "Unhandled"] * 4 == list(found)
