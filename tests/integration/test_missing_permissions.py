"""A permission taken from a running stack: its work waits, and a log line and a metric say what is missing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import unquote

import httpx
import pytest

from scripts.local_stack import LocalStack, Ready
from scripts.local_stack.permissions import as_list
from sluice.ports.metrics import NAMESPACE

CLIENT_KEY: Final = "sluice_local_for_this_test"
PHRASE: Final = "AWS refused calls: the function's role lacks a permission"
WITHIN_SECONDS: Final = 60.0
MODEL: Final = "claude-haiku-5-5"


@pytest.fixture(scope="module")
def ready() -> Iterator[Ready]:
    with LocalStack(client_key=CLIENT_KEY, tenant="team").running() as running:
        yield running


@pytest.fixture(scope="module")
def http(ready: Ready) -> Iterator[httpx.Client]:
    headers = {"x-api-key": CLIENT_KEY}
    with httpx.Client(base_url=ready.api_url, headers=headers, timeout=30) as client:
        yield client


class Role:
    """The role of one function, which can lose an action and get it back."""

    def __init__(self, ready: Ready, function: str) -> None:
        self._iam = ready.client("iam")
        self._role = ready.resources[f"{function}Role"]
        (self._policy,) = self._iam.list_role_policies(RoleName=self._role)["PolicyNames"]
        self._before = self._document()

    def _document(self) -> dict[str, Any]:
        found = self._iam.get_role_policy(RoleName=self._role, PolicyName=self._policy)
        document = found["PolicyDocument"]
        parsed: dict[str, Any] = (
            json.loads(unquote(document)) if isinstance(document, str) else document
        )
        return parsed

    def lose(self, sid: str, action: str) -> None:
        document = self._document()
        (statement,) = [each for each in document["Statement"] if each["Sid"] == sid]
        left = [each for each in as_list(statement["Action"]) if each != action]
        assert left != as_list(statement["Action"])
        # A statement must have an action: this one is used by no function.
        statement["Action"] = left or ["sts:GetCallerIdentity"]
        self._write(document)

    def restore(self) -> None:
        self._write(self._before)

    def _write(self, document: dict[str, Any]) -> None:
        self._iam.put_role_policy(
            RoleName=self._role, PolicyName=self._policy, PolicyDocument=json.dumps(document)
        )


@pytest.fixture
def role(ready: Ready, request: pytest.FixtureRequest) -> Iterator[Role]:
    changed = Role(ready, request.param)
    yield changed
    changed.restore()


def refused(ready: Ready, group: str, since: float) -> dict[str, int]:
    """Wait for the log line; return the calls it names."""
    end = time.monotonic() + WITHIN_SECONDS
    while time.monotonic() < end:
        for event in ready.client("logs").filter_log_events(
            logGroupName=ready.resources[group], startTime=int(since * 1000)
        )["events"]:
            if PHRASE in event["message"]:
                calls: dict[str, int] = json.loads(event["message"])["calls"]
                return calls
        time.sleep(0.2)
    pytest.fail(f"{group} does not say what AWS refused")


def counted(ready: Ready) -> float:
    ready.carry_metrics()
    now = time.time()
    found = ready.client("cloudwatch").get_metric_statistics(
        Namespace=NAMESPACE,
        MetricName="AccessDenied",
        Dimensions=[{"Name": "service", "Value": "sluice-local"}],
        StartTime=now - 3600,
        EndTime=now + 60,
        Period=3600,
        Statistics=["Sum"],
    )
    return float(sum(point["Sum"] for point in found["Datapoints"]))


def job(content: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    return {"params": {"model": MODEL, "max_tokens": 20, "messages": messages}}


@pytest.mark.parametrize("role", ["WorkerFunction"], indirect=True)
def test_a_worker_that_may_not_read_requests(ready: Ready, http: httpx.Client, role: Role) -> None:
    """As the template had it: not one job ran, and nothing said why."""
    role.lose("ReadRequests", "dynamodb:BatchGetItem")
    since, before = time.time(), counted(ready)

    accepted = http.post("/jobs", json=job("Say hello."))
    calls = refused(ready, "WorkerLogs", since)

    assert 202 == accepted.status_code
    assert {"BatchGetItem on the params table"} == calls.keys()
    assert counted(ready) > before


@pytest.mark.parametrize("role", ["BatchesFunction"], indirect=True)
def test_a_planner_that_may_not_send_ranges(ready: Ready, role: Role) -> None:
    role.lose("SendRanges", "sqs:SendMessage")
    since, before = time.time(), counted(ready)
    line = {"custom_id": "one", **job("Say hello.")}

    ready.client("s3").put_object(
        Bucket=ready.resources["DataBucket"],
        Key="in/team/file.jsonl",
        Body=json.dumps(line).encode() + b"\n",
    )
    calls = refused(ready, "BatchesLogs", since)

    assert {"SendMessageBatch on the ranges queue"} == calls.keys()
    assert counted(ready) > before


@pytest.mark.parametrize("role", ["ApiFunction"], indirect=True)
def test_an_api_that_may_not_read_a_secret(ready: Ready, http: httpx.Client, role: Role) -> None:
    role.lose("DeriveSigningSecrets", "secretsmanager:GetSecretValue")
    since, before = time.time(), counted(ready)

    answer = http.get("/webhooks/secret")
    calls = refused(ready, "ApiLogs", since)

    assert (500, "api_error") == (answer.status_code, answer.json()["error"]["type"])
    assert {"GetSecretValue on Secrets Manager"} == calls.keys()
    assert counted(ready) > before
