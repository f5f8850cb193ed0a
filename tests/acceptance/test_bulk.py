"""Files as batches, from outside: dropped in the bucket or uploaded by the command line, on the local stack."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx
import pytest
from standardwebhooks.webhooks import Webhook

from scripts.claude_simulator import Running, read, running
from scripts.local_stack import LocalStack, Ready
from sluice.domain.capacity import ROWS_AT_ONCE

UPSTREAM_KEY: Final = "sk-ant-test-bulk"
CLIENT_KEY: Final = "sluice_bulk_of_acme"
PATIENCE_SECONDS: Final = 120.0

Found = TypeVar("Found")


@dataclass(frozen=True)
class Gateway:
    """The gateway as a caller sees it, and the stack behind it."""

    http: httpx.Client
    ready: Ready
    claude: Running

    def drop(self, name: str, body: bytes) -> None:
        """Put a file where it is found."""
        self.ready.client("s3").put_object(
            Bucket=self.ready.resources["DataBucket"], Key=f"in/acme/{name}", Body=body
        )

    def of_bucket(self, key: str) -> bytes | None:
        client = self.ready.client("s3")
        try:
            answer = client.get_object(Bucket=self.ready.resources["DataBucket"], Key=key)
        except client.exceptions.NoSuchKey:
            return None
        body: bytes = answer["Body"].read()
        return body

    def rows(self, key: str) -> list[Any]:
        return [json.loads(line) for line in (self.of_bucket(key) or b"").splitlines()]

    def ended(self, name: str) -> Any:
        """Wait for the batch of a file to end; return its summary."""
        return json.loads(within(lambda: self.of_bucket(f"out/acme/{name}/summary.json")))

    def called(self, run: str) -> Counter[str]:
        """Return how often each row of a run was called upstream, and answered."""
        text = httpx.get(f"{self.claude.url}/_simulator/ledger").text
        users = [json.loads(row)["user_id"] or "" for row in text.splitlines()]
        return Counter(user for user in users if user.startswith(f"{run}/"))


def within(find: Callable[[], Found | None], seconds: float = PATIENCE_SECONDS) -> Found:
    """Ask again until there is an answer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := find():
            return found
        time.sleep(0.1)
    pytest.fail(f"not within {seconds} s")


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    organisation = {
        "id": "org-bulk",
        "keys": [UPSTREAM_KEY],
        "limits": {"default": {"rpm": 60_000, "itpm": 60_000_000, "otpm": 60_000_000}},
    }
    service = {"ttft_seconds": 0.3, "tokens_per_second": None, "output_tokens": 50}
    with running(read({"service": service, "organisations": [organisation]})) as claude:
        pool = {"keys": [{"id": "main", "api_key": UPSTREAM_KEY, "base_url": claude.url}]}
        stack = LocalStack(key_pool=pool, client_key=CLIENT_KEY, tenant="acme")
        with (
            stack.running() as ready,
            httpx.Client(
                base_url=ready.api_url, headers={"x-api-key": CLIENT_KEY}, timeout=30
            ) as client,
        ):
            yield Gateway(client, ready, claude)


def a_row(run: str, number: int, **more: Any) -> dict[str, Any]:
    params = {
        "model": "claude-haiku-5-5",
        "max_tokens": 64,
        "messages": [{"role": "user", "content": f"Row {number}"}],
        "metadata": {"user_id": f"{run}/{number}"},
    }
    return {"custom_id": f"row-{number}", "params": params | more}


def jsonl(*rows: Any) -> bytes:
    return b"".join(
        (row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows
    )


def numbers(results: list[Any]) -> list[int]:
    return [int(row["custom_id"].removeprefix("row-")) for row in results]


def sluice(gateway: Gateway, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    return subprocess.run(
        [sys.executable, "-m", "scripts.cli", *map(str, arguments)],
        env=os.environ | {"SLUICE_URL": gateway.ready.api_url, "SLUICE_KEY": CLIENT_KEY},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )


# Files in the bucket -------------------------------------------------------------------------------------------


def test_a_file_put_into_the_bucket_produces_results(gateway: Gateway) -> None:
    rows: list[Any] = [a_row("dropped", number) for number in range(1_200)]
    for number in (17, 600, 1_199):
        rows[number] = b'{"custom_id": broken'
    rows[900] = rows[899]

    gateway.drop("dropped.jsonl", jsonl(*rows))
    summary = gateway.ended("dropped")

    results = gateway.rows("out/acme/dropped/results.jsonl")
    assert [n for n in range(1_200) if n not in {17, 600, 900, 1_199}] == numbers(results)
    assert {"succeeded"} == {row["result"]["type"] for row in results}
    errors = gateway.rows("out/acme/dropped/errors.jsonl")
    assert [18, 601, 901, 1_200] == [error["line"] for error in errors]
    assert (1_196, 4) == (summary["counts"]["succeeded"], summary["counts"]["invalid"])
    assert max(gateway.called("dropped").values()) <= 2


@contextmanager
def receiving(*statuses: int) -> Iterator[tuple[str, list[tuple[dict[str, str], bytes]]]]:
    """A caller's own server, which answers so, then with 204: its address, and what it gets."""
    got: list[tuple[dict[str, str], bytes]] = []
    left = list(statuses)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            got.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(left.pop(0) if left else 204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hooks", got
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_rule_on_the_event_bus_receives_every_end(gateway: Gateway) -> None:
    sqs, events = gateway.ready.client("sqs"), gateway.ready.client("events")
    queue = sqs.create_queue(QueueName="listener")["QueueUrl"]
    events.put_rule(Name="listener", EventPattern=json.dumps({"source": ["sluice"]}))
    arn = "arn:aws:sqs:us-east-1:000000000000:listener"
    events.put_targets(Rule="listener", Targets=[{"Id": "queue", "Arn": arn}])
    heard: dict[str, Any] = {}

    def both() -> bool:
        for message in sqs.receive_message(QueueUrl=queue).get("Messages", ()):
            event = json.loads(message["Body"])
            assert "sluice" == event["source"]
            heard[event["detail-type"]] = event["detail"]
        return len(heard) == 2

    job = gateway.http.post("/jobs", json={"params": a_row("heard", 2)["params"]}).json()
    gateway.drop("heard.jsonl", jsonl(a_row("heard", 1)))
    summary = gateway.ended("heard")
    within(both)

    assert summary == heard["Batch Ended"]
    assert (job["id"], "succeeded") == (
        heard["Job Ended"]["job_id"],
        heard["Job Ended"]["state"],
    )


def test_a_requested_webhook_is_delivered_with_a_signature(gateway: Gateway) -> None:
    secret = gateway.http.get("/webhooks/secret").json()["secret"]
    assert f"{secret}\n" == sluice(gateway, "webhook-secret").stdout
    with receiving(503) as (url, got):
        job = gateway.http.post(
            "/jobs", json={"params": a_row("hooked", 1)["params"], "webhook": url}
        ).json()
        # Rejected once, it is delivered again five seconds later.
        within(lambda: len(got) == 2)
        gateway.drop("hooked.options.json", json.dumps({"webhook": url}).encode())
        gateway.drop("hooked.jsonl", jsonl(a_row("hooked", 2)))
        summary = gateway.ended("hooked")
        within(lambda: len(got) == 3)

    first, again, third = (Webhook(secret).verify(body, headers) for headers, body in got)
    assert first == again
    assert ("job.ended", job["id"]) == (first["type"], first["data"]["job_id"])
    assert got[0][0]["webhook-id"] == got[1][0]["webhook-id"] != got[2][0]["webhook-id"]
    assert ("batch.ended", summary) == (third["type"], third["data"])


def test_the_same_file_again_runs_no_row_again(gateway: Gateway) -> None:
    body = jsonl(*(a_row("again", number) for number in range(3)))
    gateway.drop("again.jsonl", body)
    first = gateway.ended("again")

    gateway.drop("again.jsonl", body)
    within(lambda: "file already known" in logged(gateway, "batches"))

    assert first == gateway.ended("again")
    assert 3 == sum(gateway.called("again").values())


def logged(gateway: Gateway, function: str) -> str:
    events = gateway.ready.client("logs").filter_log_events(
        logGroupName=f"/aws/lambda/sluice-local-{function}"
    )["events"]
    return "".join(event["message"] for event in events)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to find a worker")
def test_a_killed_worker_loses_no_row_and_repeats_few(gateway: Gateway) -> None:
    gateway.drop("killed.jsonl", jsonl(*(a_row("killed", number) for number in range(2_000))))
    within(lambda: sum(gateway.called("killed").values()) > 300)

    os.kill(workers(gateway, "ranges")[0], signal.SIGKILL)
    summary = gateway.ended("killed")

    calls = gateway.called("killed")
    assert list(range(2_000)) == numbers(gateway.rows("out/acme/killed/results.jsonl"))
    assert 2_000 == summary["counts"]["succeeded"] == len(calls)
    assert sum(calls.values()) - 2_000 <= ROWS_AT_ONCE
    repeats = sum(calls.values()) - 2_000
    assert summary["uncertain_calls"] <= ROWS_AT_ONCE
    assert summary["calls"] >= 2_000 + repeats


def workers(gateway: Gateway, function: str) -> list[int]:
    """Return the processes in which this emulator runs a function."""
    name = f"AWS_LAMBDA_FUNCTION_NAME=sluice-local-{function}".lower().encode()
    found = []
    for folder in Path("/proc").iterdir():
        try:
            environment = (folder / "environ").read_bytes().lower()
        except OSError:
            continue
        if name in environment and gateway.ready.endpoint_url.encode() in environment:
            found.append(int(folder.name))
    return found


# The command line ----------------------------------------------------------------------------------------------


def test_a_file_is_uploaded_watched_and_its_results_fetched(
    gateway: Gateway, tmp_path: Path
) -> None:
    file = tmp_path / "my Prüfung (1) 100%.jsonl"
    rows: list[Any] = [a_row("uploaded", number) for number in range(250)]
    for row in rows:
        del row["params"]["model"]
    file.write_bytes(jsonl(*rows, b"{broken"))
    out = tmp_path / "results.jsonl"

    done = sluice(*(gateway, "upload", file, "--model", "claude-haiku-5-5", "--wait", "--out", out))

    assert 1 == done.returncode, done.stderr
    assert "250 succeeded, 0 failed" in done.stderr
    assert "1 line invalid" in done.stderr
    results = [json.loads(line) for line in out.read_text().splitlines()]
    assert list(range(250)) == numbers(results)
    batch_id = next(word for word in done.stderr.split() if word.startswith("msgbatch_"))

    shown = json.loads(sluice(gateway, "batches", "show", batch_id, "--json").stdout)
    listed = json.loads(sluice(gateway, "batches", "list", "--json").stdout)["data"]
    errors = sluice(gateway, "batches", "results", batch_id, "--errors").stdout
    again = sluice(gateway, "upload", file, "--model", "claude-haiku-5-5")

    assert ("ended", 251, 250, 1) == (
        shown["state"],
        shown["rows"]["done"],
        shown["rows"]["succeeded"],
        shown["rows"]["invalid"],
    )
    assert shown in listed
    assert 251 == json.loads(errors)["line"]
    assert batch_id == again.stdout.strip()
    assert 250 == sum(gateway.called("uploaded").values())


def test_two_files_of_one_name_keep_their_own_results(gateway: Gateway, tmp_path: Path) -> None:
    """A corrected file of the same name, and a broken one."""
    file = tmp_path / "same-name.jsonl"
    batches = []
    for run in ("monday", "tuesday"):
        rows = [a_row(run, number) | {"custom_id": f"{run}-{number}"} for number in range(3)]
        file.write_bytes(jsonl(*rows))
        batches.append(sluice(gateway, "upload", file).stdout.strip())
    file.write_bytes(b"PK\x03\x04")
    failed = json.loads(sluice(gateway, "upload", file, "--wait", "--json").stdout)
    for batch_id in batches:
        sluice(gateway, "batches", "show", batch_id, "--wait")

    results = [sluice(gateway, "batches", "results", each).stdout for each in batches]
    assert [["monday"] * 3, ["tuesday"] * 3] == [
        [json.loads(line)["custom_id"].partition("-")[0] for line in lines.splitlines()]
        for lines in results
    ]
    assert "ZIP archive" in failed["problem"]
    assert failed["id"] == gateway.ended("same-name")["batch_id"]


def test_a_batch_is_canceled_by_the_command_line(gateway: Gateway, tmp_path: Path) -> None:
    file = tmp_path / "canceled.jsonl"
    file.write_bytes(jsonl(*(a_row("canceled", number) for number in range(3_000))))
    batch_id = sluice(gateway, "upload", file).stdout.strip()

    canceled = sluice(gateway, "batches", "cancel", batch_id)
    shown = sluice(gateway, "batches", "show", batch_id, "--wait", "--json")

    assert f"{batch_id} canceling" == canceled.stdout.strip()
    rows = json.loads(shown.stdout)["rows"]
    assert 3_000 == rows["done"] == rows["succeeded"] + rows["canceled"]
    assert rows["canceled"] > 0
    assert rows["succeeded"] <= sum(gateway.called("canceled").values())


def test_the_error_for_a_missing_batch_is_clear(gateway: Gateway) -> None:
    done = sluice(gateway, "batches", "show", "msgbatch_none")

    assert 1 == done.returncode
    assert "not_found_error: message_batch: msgbatch_none does not exist" in done.stderr
