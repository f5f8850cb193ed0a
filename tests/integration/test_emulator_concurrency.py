"""The emulator's account limit has the consequences it has on AWS. That the stack copes is bench/account_limit.py."""

from __future__ import annotations

import io
import json
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final

import pytest

from scripts.local_stack import LocalStack, StackError
from scripts.local_stack.emulator import Emulator, call

LIMIT: Final = 2
WITHIN_SECONDS: Final = 60.0
TRUST: Final = {
    "Version": "2012-10-17",
    "Statement": [
        {
            "Effect": "Allow",
            "Principal": {"Service": "lambda.amazonaws.com"},
            "Action": "sts:AssumeRole",
        }
    ],
}
CONSUME: Final = {
    "Version": "2012-10-17",
    "Statement": [
        {
            "Effect": "Allow",
            "Action": ["sqs:ReceiveMessage", "sqs:DeleteMessage", "sqs:GetQueueAttributes"],
            "Resource": "arn:aws:sqs:*:*:queue",
        }
    ],
}
HANDLER: Final = """
import os, time

def handler(event, context):
    queued = [each["attributes"]["ApproximateReceiveCount"] for each in event.get("Records", [])]
    name = event.get("hold") or event.get("detail", {}).get("write")
    path = os.path.join(os.environ["FOLDER"], name or "queued")
    with open(path, "a") as file:
        file.write(f"{','.join(queued)}\\n")
    while event.get("hold") and not os.path.exists(os.path.join(os.environ["FOLDER"], "over")):
        time.sleep(0.05)
    return {"statusCode": 200, "body": "done"}
"""


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    started = Emulator(account_concurrency=LIMIT)
    try:
        started.wait_until_it_answers()
        yield started
    finally:
        started.stop()


@pytest.fixture
def function(emulator: Emulator, tmp_path: Any) -> str:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("app.py", HANDLER)
    iam = emulator.client("iam")
    role = iam.create_role(RoleName="held", AssumeRolePolicyDocument=json.dumps(TRUST))["Role"]
    iam.put_role_policy(RoleName="held", PolicyName="it", PolicyDocument=json.dumps(CONSUME))
    created = emulator.client("lambda").create_function(
        FunctionName="held",
        Runtime="python3.13",
        Role=role["Arn"],
        Handler="app.handler",
        Timeout=60,
        Code={"ZipFile": buffer.getvalue()},
        Environment={"Variables": {"FOLDER": str(tmp_path)}},
    )
    return str(created["FunctionArn"])


def eventually(look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + WITHIN_SECONDS
    while not (found := look()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {WITHIN_SECONDS:.0f} s")
        time.sleep(0.05)
    return found


@contextmanager
def used_up(emulator: Emulator, tmp_path: Any) -> Iterator[None]:
    """All executions of the account are running until the block ends."""
    client = emulator.client("lambda")

    def hold(name: str) -> None:
        client.invoke(FunctionName="held", Payload=json.dumps({"hold": name}))

    with ThreadPoolExecutor(LIMIT) as threads:
        names = [f"hold-{number}" for number in range(LIMIT)]
        for name in names:
            threads.submit(hold, name)
        eventually(lambda: all((tmp_path / name).exists() for name in names))
        try:
            yield
        finally:
            (tmp_path / "over").touch()


def throttles(emulator: Emulator) -> int:
    """Return how many executions were refused so far."""
    metrics = emulator.client("cloudwatch").get_metric_statistics(
        Namespace="AWS/Lambda",
        MetricName="Throttles",
        Dimensions=[{"Name": "FunctionName", "Value": "held"}],
        StartTime=time.time() - 3_600,
        EndTime=time.time() + 3_600,
        Period=60,
        Statistics=["Sum"],
    )
    return int(sum(point["Sum"] for point in metrics["Datapoints"]))


def test_the_account_says_what_it_allows(emulator: Emulator) -> None:
    limit = emulator.client("lambda").get_account_settings()["AccountLimit"]

    assert (LIMIT, LIMIT) == (
        limit["ConcurrentExecutions"],
        limit["UnreservedConcurrentExecutions"],
    )


@pytest.mark.usefixtures("function")
def test_above_the_limit_a_synchronous_invocation_is_refused(
    emulator: Emulator, tmp_path: Any
) -> None:
    client = emulator.client("lambda")

    with (
        used_up(emulator, tmp_path),
        pytest.raises(client.exceptions.TooManyRequestsException) as refused,
    ):
        client.invoke(FunctionName="held", Payload="{}")

    assert "ConcurrentInvocationLimitExceeded" == refused.value.response["Reason"]


def test_api_gateway_answers_503_and_serves_again_afterwards(
    emulator: Emulator, function: str, tmp_path: Any
) -> None:
    gateway = emulator.client("apigatewayv2")
    api = gateway.create_api(Name="api", ProtocolType="HTTP")["ApiId"]
    integration = gateway.create_integration(
        ApiId=api,
        IntegrationType="AWS_PROXY",
        IntegrationUri=function,
        PayloadFormatVersion="2.0",
    )["IntegrationId"]
    gateway.create_route(ApiId=api, RouteKey="$default", Target=f"integrations/{integration}")
    gateway.create_stage(ApiId=api, StageName="$default", AutoDeploy=True)
    url = f"{emulator.endpoint_url}/_aws/execute-api/{api}/anything"

    with used_up(emulator, tmp_path):
        refused = call("GET", url)

    assert (503, {"message": "Service Unavailable"}) == refused
    assert 200 == eventually(lambda: call("GET", url)[0] == 200 and 200)


def queue_with_mapping(emulator: Emulator, visibility_seconds: int) -> str:
    sqs = emulator.client("sqs")
    url = sqs.create_queue(
        QueueName="queue", Attributes={"VisibilityTimeout": str(visibility_seconds)}
    )["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=url, AttributeNames=["QueueArn"])["Attributes"]
    emulator.client("lambda").create_event_source_mapping(
        EventSourceArn=arn["QueueArn"],
        FunctionName="held",
        ScalingConfig={"MaximumConcurrency": 2},
    )
    return str(url)


@pytest.mark.usefixtures("function")
def test_a_throttled_batch_is_kept_and_tried_again(emulator: Emulator, tmp_path: Any) -> None:
    url = queue_with_mapping(emulator, visibility_seconds=600)

    with used_up(emulator, tmp_path):
        emulator.client("sqs").send_message(QueueUrl=url, MessageBody="{}")
        eventually(lambda: throttles(emulator))
        assert not (tmp_path / "queued").exists()
    eventually((tmp_path / "queued").exists)

    assert "1\n" == eventually((tmp_path / "queued").read_text)


@pytest.mark.usefixtures("function")
def test_a_batch_that_is_throttled_beyond_its_visibility_is_received_once_more(
    emulator: Emulator, tmp_path: Any
) -> None:
    url = queue_with_mapping(emulator, visibility_seconds=2)

    with used_up(emulator, tmp_path):
        emulator.client("sqs").send_message(QueueUrl=url, MessageBody="{}")
        # At once and after a second; the third time it was received again.
        eventually(lambda: throttles(emulator) > 2)
    eventually((tmp_path / "queued").exists)

    assert int(eventually((tmp_path / "queued").read_text)) > 1


def test_a_throttled_event_is_tried_again(emulator: Emulator, function: str, tmp_path: Any) -> None:
    events = emulator.client("events")
    events.put_rule(Name="rule", EventPattern=json.dumps({"source": ["test"]}))
    events.put_targets(Rule="rule", Targets=[{"Id": "it", "Arn": function}])
    entry = {"Source": "test", "DetailType": "any", "Detail": json.dumps({"write": "event"})}

    with used_up(emulator, tmp_path):
        events.put_events(Entries=[entry])
        eventually(lambda: throttles(emulator))
        assert not (tmp_path / "event").exists()

    assert eventually((tmp_path / "event").exists)


# Its option ------------------------------------------------------------------------------------------------


def test_an_account_that_allows_too_few_is_refused_before_anything_starts() -> None:
    with (
        pytest.raises(StackError, match="account concurrency 5 is below 6"),
        LocalStack(account_concurrency=5).running(),
    ):
        pass
