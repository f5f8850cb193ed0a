"""What a started stack must show before it is called ready.

The emulator accepts much that it then ignores, so a created stack proves nothing: each function
here proves one behavior, and raises `StackError` naming what does not work.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from scripts.local_stack.deploy import Deployed, time_to_live
from scripts.local_stack.emulator import Client, Emulator, StackError, call

CANARY_SECONDS = 30.0
WRONG_KEY = "not-a-client-key-of-this-stack"


def send_canary(emulator: Emulator, deployed: Deployed) -> str:
    """Put a canary message into the jobs queue and return its id; `canary_arrives` waits for it."""
    canary = f"local-{time.time_ns()}"
    emulator.client("sqs").send_message(
        QueueUrl=deployed.resources["JobsQueue"], MessageBody=json.dumps({"v": 1, "canary": canary})
    )
    return canary


def canary_arrives(emulator: Emulator, deployed: Deployed, canary: str) -> None:
    """The worker takes messages from the queue and reaches its tables."""
    dynamodb = emulator.client("dynamodb")
    item = {
        "TableName": deployed.resources["LimitsTable"],
        "Key": {"id": {"S": f"canary#{canary}"}},
    }
    deadline = time.monotonic() + CANARY_SECONDS
    while "Item" not in dynamodb.get_item(**item, ConsistentRead=True):
        if time.monotonic() > deadline:
            raise StackError(
                "the worker did not consume the canary message from JobsQueue "
                f"in {CANARY_SECONDS:.0f} s"
                f"{_clue(emulator, deployed, 'WorkerFunction')}"
            )
        time.sleep(0.03)
    dynamodb.delete_item(**item)


def health_answers(emulator: Emulator, deployed: Deployed, api_url: str) -> None:
    """GET /health gives 200."""
    status, body = call("GET", f"{api_url}/health")
    if status != HTTPStatus.OK:
        raise StackError(
            f"GET /health returned {status} {json.dumps(body)[:200]}"
            f"{_clue(emulator, deployed, 'ApiFunction')}"
        )


def wrong_key_is_refused(emulator: Emulator, deployed: Deployed, api_url: str) -> None:
    """POST /jobs with an unknown client key gives 401."""
    status, body = call("POST", f"{api_url}/jobs", {"params": {}}, {"x-api-key": WRONG_KEY})
    if status != HTTPStatus.UNAUTHORIZED:
        raise StackError(
            f"POST /jobs with a wrong client key returned {status} instead of 401: {json.dumps(body)[:200]}"
            f"{_clue(emulator, deployed, 'ApiFunction')}"
        )


def time_to_live_is_on(emulator: Emulator, deployed: Deployed) -> None:
    """Every table that declares a time to live has it."""
    dynamodb = emulator.client("dynamodb")
    for logical_id in time_to_live(deployed.template):
        found = dynamodb.describe_time_to_live(TableName=deployed.resources[logical_id])
        status = found["TimeToLiveDescription"]["TimeToLiveStatus"]
        if status != "ENABLED":
            raise StackError(f"{logical_id}: time to live is {status}")


def concurrency_is_a_number(emulator: Emulator, deployed: Deployed) -> None:
    """Every queue's MaximumConcurrency is a JSON integer, as the emulator's poller needs it."""
    del deployed
    for mapping in mappings_as_sent(emulator.client("lambda")):
        if ":sqs:" not in mapping["EventSourceArn"]:
            continue
        concurrency = mapping.get("ScalingConfig", {}).get("MaximumConcurrency")
        if type(concurrency) is not int:
            raise StackError(
                f"MaximumConcurrency of the mapping for {mapping['FunctionArn']} is {concurrency!r}"
            )


def mappings_as_sent(client: Client) -> list[dict[str, Any]]:
    """Return the event source mappings as AWS sent them: boto3 would turn text into a number."""
    bodies: list[bytes] = []
    event, name = "before-parse.lambda.ListEventSourceMappings", "as-sent"
    client.meta.events.register(
        event, lambda response_dict, **_: bodies.append(response_dict["body"]), unique_id=name
    )
    try:
        client.list_event_source_mappings()
    finally:
        client.meta.events.unregister(event, unique_id=name)
    mappings: list[dict[str, Any]] = json.loads(bodies[0])["EventSourceMappings"]
    return mappings


def _clue(emulator: Emulator, deployed: Deployed, function: str) -> str:
    """Return what the function logged last, or else the emulator, as the end of a message."""
    found = ""
    with suppress(Exception):  # a clue is welcome, never a reason to fail differently
        configuration: Any = emulator.client("lambda").get_function_configuration(
            FunctionName=deployed.resources[function]
        )
        group = (
            configuration.get("LoggingConfig", {}).get("LogGroup")
            or f"/aws/lambda/{configuration['FunctionName']}"
        )
        events = emulator.client("logs").filter_log_events(logGroupName=group)["events"]
        lines = [event["message"].strip() for event in events]
        wrapper = ("START RequestId", "END RequestId", "REPORT RequestId")
        found = next(
            (line for line in reversed(lines) if line and not line.startswith(wrapper)), ""
        )
    found = found or emulator.child.last_words()
    return f"; last logged: {found[:400]}" if found else ""
