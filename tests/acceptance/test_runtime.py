"""The worker under Lambda's own runtime: awslambdaric inside the interface emulator that the SAM CLI includes.

Around it the local stack replaces AWS and the simulator replaces Claude, over real HTTP; this test is the mapping.
It shows what the embedded emulator cannot: more than ten messages as Lambda passes them, the exact form of the answer,
and a timeout that kills the environment.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import httpx
import pytest

from scripts.claude_simulator import Running, read, running
from scripts.local_stack import LocalStack, Ready
from scripts.local_stack.emulator import REGION, clean_environment, free_port
from sluice.adapters.sqs import LOOK_SECONDS

ROOT: Final = Path(__file__).parents[2]
MACHINES: Final = {"x86_64": "x86_64", "aarch64": "arm64"}
UPSTREAM_KEY: Final = "sk-ant-test-runtime"
CLIENT_KEY: Final = "sluice_runtime_of_acme"
MODEL: Final = "claude-haiku-5-5"
PATIENCE_SECONDS: Final = 60.0
QUIET_TURNS: Final = 3
FROZEN_SECONDS: Final = 16
"""Of an invocation that is to end by its timeout: a cold start on a busy machine takes several."""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in MACHINES,
    reason="Lambda's runtime interface emulator runs on Linux only (x86_64, arm64)",
)


def interface_emulator() -> Path:
    """What the SAM CLI runs functions with."""
    name = f"aws-lambda-rie-{MACHINES[platform.machine()]}"
    found = list((ROOT / ".venv-sam").glob(f"lib/python3*/site-packages/samcli/local/rapid/{name}"))
    assert found, "no SAM CLI here; `make acceptance` installs it"
    return found[0]


class Environment:
    """One execution environment of the worker. It takes one invocation at a time, as Lambda's do."""

    def __init__(self, variables: dict[str, str], seconds: int, log: Path) -> None:
        port = free_port(0)
        self._url = f"http://127.0.0.1:{port}/2015-03-31/functions/function/invocations"
        self.seconds = seconds
        self._log = log.open("wb")
        self._process = subprocess.Popen(
            [
                interface_emulator(),
                *("--runtime-interface-emulator-address", f"127.0.0.1:{port}"),
                *("--runtime-api-address", f"127.0.0.1:{free_port(0)}"),
                *(sys.executable, "-m", "awslambdaric", "app.handler"),
            ],
            cwd=ROOT / "functions" / "worker",
            env=clean_environment()
            | variables
            | {
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(ROOT / "layers" / "sluice"),
                "AWS_LAMBDA_FUNCTION_NAME": "worker",
                "AWS_LAMBDA_FUNCTION_TIMEOUT": str(seconds),
                "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "512",
            },
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.wait()
        self._log.close()

    def invoke(self, records: list[dict[str, Any]]) -> httpx.Response:
        """Send messages once the environment is ready; return the raw answer."""
        body = json.dumps({"Records": records}).encode()
        give_up = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return httpx.post(self._url, content=body, timeout=PATIENCE_SECONDS)
            except httpx.ConnectError:
                assert time.monotonic() < give_up, "the interface emulator did not start"
                time.sleep(0.05)


class Freezer:
    """Stands before the emulated AWS, and can stop answering in the middle of anything."""

    def __init__(self, port: int) -> None:
        self._to = port
        # A loop and a stream know their tasks weakly: one that waits for a side that is silent would be collected.
        self._connections: set[asyncio.Task[None] | None] = set()
        self._loop = asyncio.new_event_loop()
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._server = self._loop.run_until_complete(
            asyncio.start_server(self._connection, "127.0.0.1", 0)
        )
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def freeze(self) -> None:
        self._loop.call_soon_threadsafe(self._thawed.clear)

    def thaw(self) -> None:
        self._loop.call_soon_threadsafe(self._thawed.set)

    def stop(self) -> None:
        async def close() -> None:
            self._server.close()
            # A connection that was just accepted gets its task in a later turn of the loop.
            quiet_turns = 0
            while quiet_turns < QUIET_TURNS:
                others = asyncio.all_tasks() - {asyncio.current_task()}
                for each in others:
                    each.cancel()
                if others:
                    await asyncio.wait(others, timeout=1)
                quiet_turns = 0 if others else quiet_turns + 1
                await asyncio.sleep(0.05)

        asyncio.run_coroutine_threadsafe(close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _connection(self, down: asyncio.StreamReader, up: asyncio.StreamWriter) -> None:
        self._connections.add(asyncio.current_task())
        ends = [up]
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._to)
            ends.append(writer)
            await asyncio.gather(self._carry(down, writer), self._carry(reader, up))
        except (OSError, asyncio.CancelledError):
            pass  # one side has closed, or this test is over
        finally:
            for each in ends:
                each.close()

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65_536):
            if not self._thawed.is_set():
                await self._thawed.wait()
                return  # what was on its way then is lost
            sink.write(data)
            await sink.drain()
        with suppress(OSError):
            sink.write_eof()


@dataclass(frozen=True)
class Stack:
    """The local stack with its own worker switched off: this test takes its place."""

    ready: Ready
    claude: Running
    http: httpx.Client

    def submit(self, *markers: str) -> list[str]:
        jobs = [
            {
                "params": {
                    "model": MODEL,
                    "max_tokens": 20,
                    "messages": [{"role": "user", "content": "Two and two?"}],
                    "metadata": {"user_id": f"sim:{marker}"},
                }
            }
            for marker in markers
        ]
        answer = self.http.post("/jobs", json={"jobs": jobs})
        assert 202 == answer.status_code, answer.text
        return [item["job"]["id"] for item in answer.json()["data"]]

    def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get(f"/jobs/{job_id}").json()
        return found

    def purge(self) -> None:
        self.ready.client("sqs").purge_queue(QueueUrl=self.ready.outputs["JobsQueueUrl"])

    def received(self, count: int, output: str = "JobsQueueUrl") -> list[dict[str, Any]]:
        """Receive messages and return them as Lambda hands them over."""
        records: list[dict[str, Any]] = []
        while len(records) < count:
            some = self.ready.client("sqs").receive_message(
                QueueUrl=self.ready.outputs[output],
                MaxNumberOfMessages=min(10, count - len(records)),
                MessageSystemAttributeNames=["All"],
                MessageAttributeNames=["All"],
                WaitTimeSeconds=2,
            )
            assert some.get("Messages"), f"only {len(records)} of {count} messages came"
            records += [
                {
                    "messageId": each["MessageId"],
                    "receiptHandle": each["ReceiptHandle"],
                    "body": each["Body"],
                    "attributes": each["Attributes"],
                    "messageAttributes": {},
                    "eventSource": "aws:sqs",
                    "eventSourceARN": f"arn:aws:sqs:{REGION}:000000000000:jobs",
                    "awsRegion": REGION,
                }
                for each in some["Messages"]
            ]
        return records

    def variables(self, endpoint_url: str | None = None) -> dict[str, str]:
        """What Lambda sets for the worker, with AWS where it is here."""
        function = self.ready.client("lambda").get_function_configuration(
            FunctionName=self.ready.resources["WorkerFunction"]
        )
        return dict(function["Environment"]["Variables"]) | {
            "AWS_ENDPOINT_URL": endpoint_url or self.ready.endpoint_url,
            **self.ready.credentials.as_environment(),
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    organisation = {
        "id": "org-runtime",
        "keys": [UPSTREAM_KEY],
        "burst_seconds": 6,
        "limits": {"default": {"rpm": 60_000, "itpm": 60_000_000, "otpm": 60_000_000}},
    }
    service = {"ttft_seconds": 0.05, "tokens_per_second": None}
    with running(read({"service": service, "organisations": [organisation]})) as claude:
        pool = {"keys": [{"id": "main", "api_key": UPSTREAM_KEY, "base_url": claude.url}]}
        local = LocalStack(key_pool=pool, client_key=CLIENT_KEY, tenant="acme")
        headers = {"x-api-key": CLIENT_KEY}
        with (
            local.running() as ready,
            httpx.Client(base_url=ready.api_url, headers=headers, timeout=30) as client,
        ):
            lambdas = ready.client("lambda")
            mapping = ready.outputs["WorkerMappingId"]
            lambdas.update_event_source_mapping(UUID=mapping, Enabled=False)
            within(
                lambda: (
                    lambdas.get_event_source_mapping(UUID=mapping)["State"] == "Disabled" or None
                )
            )
            # A running worker, here with the stack's own probe, polls for more messages for a second.
            time.sleep(LOOK_SECONDS + 1)
            yield Stack(ready, claude, client)


@pytest.fixture(autouse=True)
def nothing_waits(stack: Stack) -> None:
    """What an earlier test put back is not this one's."""
    stack.purge()
    stack.claude.engine.reset()


def within(find: Callable[[], Any]) -> Any:
    """Ask again until there is an answer."""
    give_up = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < give_up:
        if (found := find()) is not None:
            return found
        time.sleep(0.02)
    pytest.fail(f"not within {PATIENCE_SECONDS} s")


@contextmanager
def in_the_background(call: Callable[[], httpx.Response]) -> Iterator[list[httpx.Response]]:
    """Make a call concurrently with the test; its answer is available at the end."""
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(call()))
    thread.start()
    try:
        yield answers
    finally:
        thread.join(PATIENCE_SECONDS)


def test_a_batch_of_fifty_with_rubbish_in_it_is_answered_as_lambda_demands(
    stack: Stack, tmp_path: Path
) -> None:
    """An answer with an id that is not of the batch, or is empty, is for Lambda a failure of the whole batch."""
    rubbish = ["hello", "{}", '{"v": 1, "job_id": 5}', '{"v": 1, "job_id": "job_' + "0" * 32 + '"}']
    ids = stack.submit(*["slow=0.3"] * 45, "500x1")
    for body in rubbish:
        stack.ready.client("sqs").send_message(
            QueueUrl=stack.ready.outputs["JobsQueueUrl"], MessageBody=body
        )
    records = stack.received(50)
    by_job = {
        json.loads(each["body"])["job_id"]: each["messageId"]
        for each in records
        if each["body"] not in rubbish
    }
    for each in records[:2]:  # what a later release of SQS may send or leave out
        each["attributes"] = {"SomethingNew": "1"}
        each |= {"somethingNew": {"deep": [1]}}

    with Environment(stack.variables(), 60, tmp_path / "log") as environment:
        answered = environment.invoke(records)

        assert 200 == answered.status_code
        assert {"batchItemFailures": [{"itemIdentifier": by_job[ids[45]]}]} == answered.json()
        assert ["succeeded"] * 45 == [stack.job(job_id)["state"] for job_id in ids[:45]]
        failed = stack.job(ids[45])
        assert ("queued", ["retry"]) == (
            failed["state"],
            [a["outcome"] for a in failed["attempts"]],
        )
        assert 45 == stack.claude.engine.stats()["billed"]

        # The same environment again, with what is done by now: warm, on the loop it keeps. What was put back must not
        # be there, or the worker would take it from the queue itself.
        stack.purge()
        again = environment.invoke(
            [each for each in records if each["messageId"] != by_job[ids[45]]]
        )

        # Jobs that ended just now: their messages are returned until the ledger rows of their worker must be written.
        assert {"batchItemFailures"} == again.json().keys()
        returned = {each["itemIdentifier"] for each in again.json()["batchItemFailures"]}
        assert returned == {by_job[job_id] for job_id in ids[:45]}
        assert 45 == stack.claude.engine.stats()["billed"]
    letters = within(lambda: _letters(stack, len(rubbish)))
    assert set(rubbish) == {letter["body"] for letter in letters}


def _letters(stack: Stack, count: int) -> list[dict[str, Any]] | None:
    """Return the dead letters that the stack's own function has kept, when they are so many."""
    s3, bucket = stack.ready.client("s3"), stack.ready.outputs["DataBucketName"]
    found = s3.list_objects_v2(Bucket=bucket, Prefix="dead-letters/").get("Contents", [])
    if len(found) < count:
        return None
    bodies = [s3.get_object(Bucket=bucket, Key=each["Key"])["Body"].read() for each in found]
    return [json.loads(body) for body in bodies]


def test_a_call_longer_than_the_invocation_ends_before_lambda_ends_it(
    stack: Stack, tmp_path: Path
) -> None:
    (job_id,) = stack.submit("slow=30")
    records = stack.received(1)

    with Environment(stack.variables(), 8, tmp_path / "log") as environment:
        answered = environment.invoke(records)

    # Whether the call had almost the whole invocation, and so would never fit, is for the machine's pace to say.
    job = stack.job(job_id)
    (attempt,) = job["attempts"]
    nothing: list[dict[str, str]] = []
    ended = ({"batchItemFailures": nothing}, "errored", "give_up")
    put_back = (
        {"batchItemFailures": [{"itemIdentifier": records[0]["messageId"]}]},
        "queued",
        "retry",
    )
    assert (answered.json(), job["state"], attempt["outcome"]) in (ended, put_back)
    assert "output_timeout" == attempt["error"]["type"]


def test_a_timed_out_invocation_loses_no_job_and_its_lease_keeps_others_away(
    stack: Stack, tmp_path: Path
) -> None:
    """AWS stops answering in the middle of a call, so the worker cannot write down what came."""
    freezer = Freezer(int(stack.ready.endpoint_url.rpartition(":")[2]))
    try:
        (job_id,) = stack.submit("slow=2")
        records = stack.received(1)
        with Environment(
            stack.variables(freezer.url), FROZEN_SECONDS, tmp_path / "log"
        ) as environment:
            with in_the_background(lambda: environment.invoke(records)) as answers:
                within(lambda: stack.job(job_id)["state"] == "running" or None)
                freezer.freeze()

            assert f"timed out after {FROZEN_SECONDS}" in answers[0].text
            job = stack.job(job_id)
            assert ("running", [None]) == (
                job["state"],
                [each["outcome"] for each in job["attempts"]],
            )

            # The next environment finds the lease of the dead one, and leaves the job alone.
            freezer.thaw()
            again = environment.invoke(records)

            failures = [{"itemIdentifier": records[0]["messageId"]}]
            assert {"batchItemFailures": failures} == again.json()
            assert 1 == stack.claude.engine.stats()["billed"]
            assert "running" == stack.job(job_id)["state"]
    finally:
        freezer.thaw()
        freezer.stop()
