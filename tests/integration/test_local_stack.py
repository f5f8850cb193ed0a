"""The local stack against the real emulator: this repository's template, with functions that look.

The functions here report what a Lambda function sees, so that a failure is the local stack's own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from scripts.local_stack import LocalStack, Ready, StackError
from scripts.local_stack.emulator import Emulator, call
from scripts.local_stack.recording.recorder import FOLDER_VARIABLE
from sluice.domain import client_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REPOSITORY = Path(__file__).resolve().parents[2]
CLAUDE_URL = "http://127.0.0.1:9"
CLIENT_KEY = "sluice_local_for_this_test"
WITHIN_SECONDS = 30.0
Found = TypeVar("Found")

LOOKING_API = """
import json, os, sys, time
import sluice

def handler(event, context):
    if event["rawPath"] == "/health":
        return {"statusCode": 200, "body": json.dumps({
            "environment": dict(os.environ),
            "executable": sys.executable,
            "layer": sluice.__file__,
            "processes": [os.getpid(), os.getppid()],
        })}
    print(json.dumps({
        "_aws": {"Timestamp": int(time.time() * 1000), "CloudWatchMetrics": [{
            "Namespace": "Sluice", "Dimensions": [["service"]],
            "Metrics": [{"Name": "Refused", "Unit": "Count"}]}]},
        "service": "sluice", "Refused": 1}))
    return {"statusCode": 401, "body": "{}"}
"""

LOOKING_WORKER = """
import json, os, time
import boto3

dynamodb = boto3.client("dynamodb")
sqs = boto3.client("sqs")

def handler(event, context):
    failures = []
    for record in event["Records"]:
        message = json.loads(record["body"])
        name = message.get("canary", "")
        received = int(record["attributes"]["ApproximateReceiveCount"])
        if "snooze_seconds" in message and received == 1:
            sqs.change_message_visibility(
                QueueUrl=os.environ["SLUICE_JOBS_QUEUE_URL"],
                ReceiptHandle=record["receiptHandle"],
                VisibilityTimeout=message["snooze_seconds"])
            failures.append({"itemIdentifier": record["messageId"]})
        write(f"canary#{name}", at=time.time(), received=received, batch=len(event["Records"]))
    return {"batchItemFailures": failures}

def write(name, **numbers):
    dynamodb.put_item(TableName=os.environ["SLUICE_LIMITS_TABLE"], Item={
        "id": {"S": name}, **{key: {"N": str(value)} for key, value in numbers.items()}})
"""

LOOKING_DEAD_LETTERS = """
def handler(event, context):
    return {"batchItemFailures": []}
"""

LOOKING_GOVERNOR = """
def handler(event, context):
    pass
"""

SERVE = """
import sys
from pathlib import Path
from scripts.local_stack.stack import LocalStack, serve
sys.exit(serve(LocalStack(template=Path(sys.argv[1]), claude_url="http://127.0.0.1:9")))
"""


@pytest.fixture(scope="module", autouse=True)
def unrecorded() -> Iterator[None]:
    """What the functions here call says nothing of the product's."""
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv(FOLDER_VARIABLE)
        yield


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This repository's template beside functions that look."""
    folder = tmp_path_factory.mktemp("looking")
    return _project(folder, api=LOOKING_API, worker=LOOKING_WORKER)


@pytest.fixture(scope="module")
def ready(template: Path) -> Iterator[Ready]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_PROFILE", "the-real-account")
        environment.setenv("ANTHROPIC_API_KEY", "sk-ant-test-of-the-user")
        environment.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        environment.setenv("http_proxy", "http://127.0.0.1:9")
        stack = LocalStack(
            claude_url=CLAUDE_URL, client_key=CLIENT_KEY, tenant="team", template=template
        )
        with stack.running() as running:
            yield running


def test_functions_run_with_this_interpreter_and_know_nothing_of_the_user(ready: Ready) -> None:
    _status, seen = call("GET", f"{ready.api_url}/health")

    assert seen["executable"] == sys.executable
    assert "ministack" in seen["layer"]  # unpacked from the layer, and not this repository's
    assert seen["environment"]["AWS_ENDPOINT_URL"] == ready.endpoint_url
    assert not {"AWS_PROFILE", "ANTHROPIC_API_KEY", "HTTP_PROXY"} & set(seen["environment"])


def test_the_client_key_is_authenticated_by_its_hash_alone(ready: Ready) -> None:
    pepper = ready.client("secretsmanager").get_secret_value(
        SecretId=ready.resources["ClientKeyPepper"]
    )["SecretString"]

    item = ready.client("dynamodb").get_item(
        TableName=ready.resources["ClientKeysTable"],
        Key={"key_id": {"S": client_keys.key_id(pepper, CLIENT_KEY)}},
    )["Item"]

    assert client_keys.matches(pepper, CLIENT_KEY, item["hash"]["S"])
    assert item["tenant"] == {"S": "team"}
    assert item["disabled"] == {"BOOL": False}
    assert CLIENT_KEY not in json.dumps(item)


def test_the_key_pool_holds_one_test_key_for_the_given_claude(ready: Ready) -> None:
    secret = ready.client("secretsmanager").get_secret_value(
        SecretId=ready.resources["KeyPoolSecret"]
    )

    (key,) = json.loads(secret["SecretString"])["keys"]
    assert key["api_key"] == "sk-ant-test-local"
    assert key["base_url"] == CLAUDE_URL


def test_the_canary_leaves_nothing_behind(ready: Ready) -> None:
    items = ready.client("dynamodb").scan(TableName=ready.resources["LimitsTable"])["Items"]

    assert not [item for item in items if item["id"]["S"].startswith("canary#local-")]


def test_one_invocation_takes_a_batch_of_fifty(ready: Ready) -> None:
    for start in range(0, 50, 10):
        ready.client("sqs").send_message_batch(
            QueueUrl=ready.resources["JobsQueue"],
            Entries=[
                {"Id": str(number), "MessageBody": json.dumps({"canary": f"batch-{number}"})}
                for number in range(start, start + 10)
            ],
        )

    batches = [_seen(ready, f"batch-{number}")["batch"] for number in range(50)]

    assert batches == [50.0] * 50


def test_messages_that_trickle_in_are_gathered_over_the_window(ready: Ready) -> None:
    for number in range(3):
        _send(ready, {"canary": f"trickle-{number}"})

    batches = [_seen(ready, f"trickle-{number}")["batch"] for number in range(3)]

    assert batches == [3.0] * 3


def test_a_snoozed_message_becomes_visible_after_its_delay(ready: Ready) -> None:
    _send(ready, {"canary": "snoozed", "snooze_seconds": 1})
    first = _seen(ready, "snoozed")

    second = _seen(ready, "snoozed", lambda item: item["received"] == 2)

    assert second["at"] - first["at"] >= 1


def test_metrics_in_logs_become_metrics(ready: Ready) -> None:
    def refused() -> float:
        ready.carry_metrics()
        found = ready.client("cloudwatch").get_metric_statistics(
            Namespace="Sluice",
            MetricName="Refused",
            Dimensions=[{"Name": "service", "Value": "sluice"}],
            StartTime=time.time() - 3600,
            EndTime=time.time() + 3600,
            Period=86_400,
            Statistics=["Sum"],
        )
        return sum(float(point["Sum"]) for point in found["Datapoints"])

    before = refused()
    for _ in range(3):
        call("POST", f"{ready.api_url}/jobs")

    assert refused() - before == 3
    assert refused() - before == 3  # carried over once


def test_dynamodb_fails_as_often_as_the_file_says(tmp_path: Path) -> None:
    faults = tmp_path / "faults.json"
    faults.write_text("{}")
    emulator = Emulator(dynamodb_faults=faults)
    try:
        emulator.wait_until_it_answers()
        dynamodb = emulator.client("dynamodb")
        dynamodb.create_table(
            TableName="Table",
            BillingMode="PAY_PER_REQUEST",
            AttributeDefinitions=[{"AttributeName": "id", "AttributeType": "S"}],
            KeySchema=[{"AttributeName": "id", "KeyType": "HASH"}],
        )

        faults.write_text('{"refuse": 1}')
        with pytest.raises(dynamodb.exceptions.ProvisionedThroughputExceededException):
            dynamodb.put_item(TableName="Table", Item={"id": {"S": "refused"}})
        faults.write_text('{"lose_reply": 1}')
        with pytest.raises(dynamodb.exceptions.InternalServerError):
            dynamodb.put_item(TableName="Table", Item={"id": {"S": "done"}})
        faults.write_text("{}")

        stored = [item["id"]["S"] for item in dynamodb.scan(TableName="Table")["Items"]]
        assert ["done"] == stored
    finally:
        emulator.stop()


def test_a_function_that_does_not_start_is_named_with_what_it_logged(tmp_path: Path) -> None:
    template = _project(tmp_path, api="import no_such_module", worker=LOOKING_WORKER)

    with (
        pytest.raises(StackError, match=r"GET /health returned 5\d\d.*no_such_module"),
        LocalStack(claude_url=CLAUDE_URL, template=template).running(),
    ):
        pass


def test_a_template_with_an_unknown_resource_is_refused_by_name(tmp_path: Path) -> None:
    template = tmp_path / "template.yaml"
    template.write_text("Resources: {Odd: {Type: AWS::Nowhere::Thing}}")

    with (
        pytest.raises(StackError, match=r"cannot deploy template\.yaml: .*AWS::Nowhere::Thing"),
        LocalStack(claude_url=CLAUDE_URL, template=template).running(),
    ):
        pass


def test_a_resource_that_cannot_be_created_is_named_with_the_reason(tmp_path: Path) -> None:
    template = tmp_path / "template.yaml"
    template.write_text(
        "Resources: {Rate: {Type: AWS::CloudWatch::Alarm, Properties: {EvaluationPeriods: 1, "
        "ComparisonOperator: GreaterThanThreshold, Metrics: [{Id: rate, Expression: 1}]}}}"
    )

    with (
        pytest.raises(StackError, match=r"cannot deploy template\.yaml: Rate: ."),
        LocalStack(claude_url=CLAUDE_URL, template=template).running(),
    ):
        pass


def test_with_nothing_given_this_repository_proves_itself_with_the_bundled_simulator() -> None:
    with LocalStack().running() as ready:
        status, _stats = call("GET", f"{ready.claude_url}/_simulator/stats")
        allowed, jobs = call(
            "GET", f"{ready.api_url}/jobs", headers={"x-api-key": ready.client_key}
        )

    assert status == 200
    assert allowed == 200
    assert jobs["data"] == []


# ---------------------------------------------------------------- command line


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_leaves_no_process_and_reports_success(
    template: Path, ending: signal.Signals
) -> None:
    with _serving(template) as (launcher, processes):
        launcher.send_signal(ending)

        assert launcher.wait(WITHIN_SECONDS) == 0
        assert not [process for process in processes if _lives(process)]


def test_no_key_shows_in_the_list_of_processes(tmp_path: Path) -> None:
    """With the bundled simulator, which has a key, too; and with a client key from a file."""
    file = tmp_path / "key"
    file.write_text(f"{CLIENT_KEY}\n")
    command = [sys.executable, "-m", "scripts.local_stack", "--port", "0"]
    with subprocess.Popen(
        [*command, "--client-key-file", str(file)],
        cwd=REPOSITORY,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as launcher:
        try:
            assert launcher.stdout is not None
            ready = json.loads(launcher.stdout.readline())
            lines = _command_lines(launcher.pid)
        finally:
            launcher.terminate()

    assert CLIENT_KEY == ready["client_key"]
    shown = "\n".join(lines)
    assert "scripts.claude_simulator" in shown
    assert "emulator_runner.py" in shown
    assert CLIENT_KEY not in shown
    assert "sk-ant-" not in shown


def test_killed_it_leaves_no_process_either(template: Path) -> None:
    with _serving(template) as (launcher, processes):
        launcher.kill()
        launcher.wait(WITHIN_SECONDS)

        _eventually(lambda: not [process for process in processes if _lives(process)])


def test_a_dead_emulator_ends_the_command_with_an_error(template: Path) -> None:
    with _serving(template) as (launcher, (_function, emulator)):
        os.kill(emulator, signal.SIGKILL)

        assert launcher.wait(WITHIN_SECONDS) == 1


def test_a_port_in_use_ends_the_command_with_one_line() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]

        ended = _command("--port", str(port))

    assert ended.returncode == 1
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1
    assert f"port {port}" in ended.stderr


def test_a_broken_key_pool_ends_the_command_with_one_line(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text('{"keys": []}')

    ended = _command("--port", "0", "--key-pool", str(file))

    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr == f"error: key pool {file} has no keys; add at least one Claude API key\n"


# ---------------------------------------------------------------- what the tests need


def _project(folder: Path, *, api: str, worker: str) -> Path:
    shutil.copy(REPOSITORY / "template.yaml", folder)
    (folder / "layers").mkdir()
    shutil.copytree(REPOSITORY / "layers" / "sluice", folder / "layers" / "sluice")
    for name, source in (
        ("api", api),
        ("worker", worker),
        ("dead_letters", LOOKING_DEAD_LETTERS),
        ("batches", LOOKING_DEAD_LETTERS),
        ("ranges", LOOKING_DEAD_LETTERS),
        ("job_ends", LOOKING_DEAD_LETTERS),
        ("webhooks", LOOKING_DEAD_LETTERS),
        ("governor", LOOKING_GOVERNOR),
        ("upstream", LOOKING_GOVERNOR),
    ):
        (folder / "functions" / name).mkdir(parents=True)
        (folder / "functions" / name / "app.py").write_text(source)
    return folder / "template.yaml"


def _send(ready: Ready, message: dict[str, Any]) -> None:
    ready.client("sqs").send_message(
        QueueUrl=ready.resources["JobsQueue"], MessageBody=json.dumps(message)
    )


def _seen(
    ready: Ready,
    canary: str,
    wanted: Callable[[dict[str, float]], bool] = lambda _item: True,
) -> dict[str, float]:
    """Wait for what the worker wrote about one message."""

    def look() -> dict[str, float] | None:
        item = ready.client("dynamodb").get_item(
            TableName=ready.resources["LimitsTable"], Key={"id": {"S": f"canary#{canary}"}}
        )
        numbers = {
            name: float(value["N"]) for name, value in item.get("Item", {}).items() if "N" in value
        }
        return numbers if numbers and wanted(numbers) else None

    found = _eventually(look)
    assert found is not None
    return found


def _eventually(look: Callable[[], Found]) -> Found:
    deadline = time.monotonic() + WITHIN_SECONDS
    while not (found := look()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {WITHIN_SECONDS:.0f} s")
        time.sleep(0.02)
    return found


def _lives(process: int) -> bool:
    """Return whether the process runs; a zombie does not."""
    state = subprocess.run(
        [shutil.which("ps") or "ps", "-o", "stat=", "-p", str(process)],
        capture_output=True,
        text=True,
        check=False,
    )
    return bool(state.stdout.strip()) and not state.stdout.strip().startswith("Z")


def _command_lines(process: int) -> list[str]:
    """The command lines of a process and of all it started, as any user of the machine sees them."""
    listed = subprocess.run(
        [shutil.which("ps") or "ps", "-axww", "-o", "pid=,ppid=,args="],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    family, lines = {process}, []
    for pid, parent, line in rows:  # a parent is older, and listed first
        if int(pid) in family or int(parent) in family:
            family.add(int(pid))
            lines.append(line)
    return lines


@contextmanager
def _serving(template: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Yield the launching process and the processes behind it: a Lambda worker, the emulator."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVE, str(template)],
        cwd=REPOSITORY,
        env=_environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as launcher:
        try:
            assert launcher.stdout is not None
            line = json.loads(launcher.stdout.readline())
            assert line["ready"] is True
            _status, seen = call("GET", f"{line['api_url']}/health")
            yield launcher, seen["processes"]
        finally:
            launcher.kill()


def _command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "scripts.local_stack", *arguments],
        cwd=REPOSITORY,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=WITHIN_SECONDS,
        check=False,
    )


def _environment() -> dict[str, str]:
    roots = (REPOSITORY, REPOSITORY / "layers" / "sluice")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, roots))}
