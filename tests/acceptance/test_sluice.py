"""What the README promises, from outside: the local stack and the simulator as a user starts them, HTTP and CLI."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import anthropic
import httpx
import httpx2
import pytest

from scripts.claude_simulator import Running, read, running
from scripts.local_stack import LocalStack, Ready
from scripts.local_stack.emulator import REGION
from sluice.adapters.dynamodb import DynamoJobs, DynamoParams
from sluice.adapters.s3 import Objects
from sluice.adapters.system import SystemClock
from sluice.domain import client_keys
from sluice.domain.jobs import Job
from sluice.ports.jobs import Params

REPOSITORY: Final = Path(__file__).resolve().parents[2]
README: Final = REPOSITORY / "README.md"
UPSTREAM_KEY: Final = "sk-ant-test-acceptance"
CLIENT_KEY: Final = "sluice_acceptance_of_acme"
OTHER_KEY: Final = "sluice_acceptance_of_another"
FINAL: Final = {"succeeded", "errored", "canceled", "expired"}
PATIENCE_SECONDS: Final = 60.0
"""How long anything here may take before the test says what it was waiting for."""

MODEL: Final = "claude-haiku-5-5"
LIMITED: Final = "claude-sonnet-5-5"
"""600 requests a minute with a burst of six seconds, so that 200 jobs need to be paced."""

Found = TypeVar("Found")


@dataclass(frozen=True)
class Gateway:
    """The gateway as a caller sees it, and the stack behind it."""

    http: httpx.Client
    ready: Ready
    claude: Running

    def post(self, body: object, **headers: str) -> httpx.Response:
        return self.http.post("/jobs", json=body, headers=headers)

    def submit(self, *jobs: dict[str, Any]) -> list[str]:
        """Have jobs accepted, a hundred at a time; return their ids."""
        ids = []
        for start in range(0, len(jobs), 100):
            answer = self.post({"jobs": jobs[start : start + 100]})
            assert 202 == answer.status_code, answer.text
            ids += [item["job"]["id"] for item in answer.json()["data"]]
        return ids

    def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get(f"/jobs/{job_id}").json()
        return found

    def ended(self, *ids: str) -> list[dict[str, Any]]:
        """Wait for jobs to end; return them."""

        def all_final() -> bool:
            for start in range(0, len(ids), 100):
                some = self.http.get("/jobs", params={"ids": ",".join(ids[start : start + 100])})
                if any(job["state"] not in FINAL for job in some.json()["data"]):
                    return False
            return True

        within(PATIENCE_SECONDS, all_final)
        return [self.job(job_id) for job_id in ids]

    def ledger(self, run: str) -> list[dict[str, Any]]:
        """Return the simulator's rows of one run, found by its name at the end of the user ids."""
        rows = httpx.get(f"{self.claude.url}/_simulator/ledger").text.splitlines()
        parsed = [json.loads(row) for row in rows]
        return [row for row in parsed if (row["user_id"] or "").split(" ")[-1] == run]


def within(seconds: float, find: Callable[[], Found | None]) -> Found:
    """Ask again until there is an answer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := find():
            return found
        time.sleep(0.2)
    pytest.fail(f"not within {seconds} s")


@pytest.fixture(scope="module")
def claude() -> Iterator[Running]:
    organisation = {
        "id": "org-acceptance",
        "keys": [UPSTREAM_KEY],
        "burst_seconds": 6,
        "limits": {
            "default": {"rpm": 60_000, "itpm": 60_000_000, "otpm": 60_000_000},
            "sonnet-5-5": {"rpm": 600, "itpm": 60_000_000, "otpm": 60_000_000},
        },
    }
    service = {"ttft_seconds": 0.05, "tokens_per_second": None, "output_tokens": 50}
    with running(read({"service": service, "organisations": [organisation]})) as started:
        yield started


@pytest.fixture(scope="module")
def gateway(claude: Running) -> Iterator[Gateway]:
    pool = {"keys": [{"id": "main", "api_key": UPSTREAM_KEY, "base_url": claude.url}]}
    stack = LocalStack(key_pool=pool, client_key=CLIENT_KEY, tenant="acme")
    with (
        stack.running() as ready,
        httpx.Client(
            base_url=ready.api_url, headers={"x-api-key": CLIENT_KEY}, timeout=30
        ) as client,
    ):
        yield Gateway(client, ready, claude)


def a_job(run: str, marker: str = "", number: int = 0, **more: Any) -> dict[str, Any]:
    """A job of a run. `marker` instructs the simulator."""
    user = f"sim:{marker} {run}" if marker else run
    params = {
        "model": more.pop("model", MODEL),
        "max_tokens": more.pop("max_tokens", 64),
        "messages": [{"role": "user", "content": f"Job {number} of {run}"}],
        "metadata": {"user_id": user},
        **more.pop("params", {}),
    }
    return {"params": params, **more}


# The main job --------------------------------------------------------------------------------------------------


def test_two_hundred_jobs_all_succeed_and_each_is_paid_for_once(gateway: Gateway) -> None:
    jobs = [a_job("main-run", number=number, model=LIMITED) for number in range(200)]

    done = gateway.ended(*gateway.submit(*jobs))

    assert {"succeeded"} == {job["state"] for job in done}
    billed = [row for row in gateway.ledger("main-run") if row["billed"]]
    assert 200 == len(billed)
    assert 200 == len({row["body_hash"] for row in billed})
    # No 429 has used an attempt of a job.
    assert {1} == {job["attempts_used"] for job in done}
    assert {1} == {len(job["attempts"]) for job in done}
    assert 200 == len({job["message"]["id"] for job in done})


def test_jobs_that_only_meet_429s_use_no_attempt(gateway: Gateway) -> None:
    jobs = [
        a_job("429-run", "429x2,retry_after=1", number, model="claude-opus-5")
        for number in range(5)
    ]

    done = gateway.ended(*gateway.submit(*jobs))

    assert {("succeeded", 1)} == {(job["state"], job["attempts_used"]) for job in done}
    assert {2} == {job["snoozes"] for job in done}
    assert 5 == sum(row["billed"] for row in gateway.ledger("429-run"))


def test_a_failed_call_is_shown_and_tried_again(gateway: Gateway) -> None:
    ids = gateway.submit(
        a_job("retry-run", "500x1", 1),
        a_job("retry-run", "drop_before_billingx1", 2),
        a_job("retry-run", "400", 3),
    )

    failed, dropped, refused = gateway.ended(*ids)

    assert [("retry", 500), ("succeeded", None)] == [
        (each["outcome"], (each["error"] or {}).get("status")) for each in failed["attempts"]
    ]
    assert ("succeeded", 2) == (dropped["state"], dropped["attempts_used"])
    assert "connection_error" == dropped["attempts"][0]["error"]["type"]
    assert ("errored", "invalid_request_error") == (refused["state"], refused["error"]["type"])
    assert 1 == refused["attempts_used"]


def test_the_text_of_an_answer_is_that_of_its_text_blocks_only(gateway: Gateway) -> None:
    ids = gateway.submit(
        a_job("text-run", "thinking", 1),
        a_job("text-run", "redacted_thinking", 2),
        a_job("text-run", "", 3),
    )

    for job, kinds in zip(
        gateway.ended(*ids), (["thinking", "text"], ["redacted_thinking", "text"], ["text"]),
        strict=True,
    ):  # fmt: skip
        content = job["message"]["content"]
        assert kinds == [block["type"] for block in content]
        assert content[-1]["text"] == job["text"]
        assert job["text"].startswith("Answer ")


def test_a_long_output_is_streamed_and_arrives_whole(gateway: Gateway) -> None:
    job = a_job("long-run", "tokens=16000", max_tokens=16_000)

    (done,) = gateway.ended(*gateway.submit(job))

    assert "succeeded" == done["state"]
    assert 16_000 == done["usage"]["output_tokens"] == done["message"]["usage"]["output_tokens"]
    assert 60_000 < len(done["text"])


def test_a_refusal_moves_to_the_fallback_model(gateway: Gateway) -> None:
    """The simulator refuses by the marker, whatever the model: so the fallback refuses too, and that is the answer."""
    job = a_job("fallback-run", "refusal", fallback_models=["claude-haiku-4-5"])

    (done,) = gateway.ended(*gateway.submit(job))

    assert ["claude-haiku-5-5", "claude-haiku-4-5"] == [each["model"] for each in done["attempts"]]
    assert ["fallback", "succeeded"] == [each["outcome"] for each in done["attempts"]]
    assert "claude-haiku-4-5-20251001" == done["message"]["model"]
    assert "refusal" == done["message"]["stop_reason"]
    rows = gateway.ledger("fallback-run")
    assert ["claude-haiku-5-5", "claude-haiku-4-5-20251001"] == [row["model"] for row in rows]


def test_the_version_a_caller_names_goes_up_with_its_job(gateway: Gateway) -> None:
    """One that Claude does not know is refused by Claude; without one the newest we know goes up."""
    good = gateway.post(a_job("version-run", number=1), **{"anthropic-version": "2023-06-01"})
    odd = gateway.post(a_job("version-run", number=2), **{"anthropic-version": "1999-01-01"})

    good_job, odd_job = gateway.ended(good.json()["id"], odd.json()["id"])

    assert ("succeeded", "errored") == (good_job["state"], odd_job["state"])
    assert 400 == odd_job["attempts"][0]["error"]["status"]
    assert "version" in odd_job["error"]["message"]


def test_a_repeat_under_an_idempotency_key_makes_no_second_job(gateway: Gateway) -> None:
    jobs = {"jobs": [a_job("repeat-run", number=number) for number in range(3)]}

    first = gateway.post(jobs, **{"idempotency-key": "repeat-run-1"})
    gateway.ended(*[item["job"]["id"] for item in first.json()["data"]])
    again = gateway.post(jobs, **{"idempotency-key": "repeat-run-1"})

    assert [item["job"]["id"] for item in first.json()["data"]] == [
        item["job"]["id"] for item in again.json()["data"]
    ]
    assert {"succeeded"} == {item["job"]["state"] for item in again.json()["data"]}
    assert 3 == len(gateway.ledger("repeat-run"))


def test_anthropics_own_client_makes_no_second_job_when_a_reply_is_lost(gateway: Gateway) -> None:
    """It sends no idempotency key, and sends a POST again by itself."""
    sent: list[str | None] = []

    class LosesTheFirstReply(httpx2.HTTPTransport):
        def handle_request(self, request: httpx2.Request) -> httpx2.Response:
            answer = super().handle_request(request)
            sent.append(request.headers.get("x-stainless-retry-count"))
            if len(sent) == 1:
                answer.read()
                raise httpx2.ReadError("the reply was lost")
            return answer

    marker = {"run": "a lost reply"}
    message = {"role": "user", "content": "Two and two?"}
    job = {
        "params": {"model": MODEL, "max_tokens": 20, "messages": [message]},
        "metadata": marker,
    }
    with anthropic.Anthropic(
        base_url=gateway.ready.api_url,
        api_key=CLIENT_KEY,
        http_client=httpx2.Client(transport=LosesTheFirstReply()),
    ) as client:
        got: Any = client.post("/jobs", body=job, cast_to=object)

    newest = gateway.http.get("/jobs", params={"limit": 20}).json()["data"]
    made = [each["id"] for each in newest if gateway.job(each["id"])["metadata"] == marker]
    assert ["0", "1"] == sent
    assert [got["id"]] == made


def test_a_job_canceled_before_its_call_is_never_called(gateway: Gateway) -> None:
    """Behind jobs that take the whole limit of their group for a while."""
    gateway.submit(*[a_job("busy-run", number=number, model=LIMITED) for number in range(100)])
    (job_id,) = gateway.submit(a_job("cancel-run", model=LIMITED))

    answer = gateway.http.delete(f"/jobs/{job_id}")

    assert (200, "canceled") == (answer.status_code, answer.json()["state"])
    other = gateway.submit(a_job("cancel-after"))
    gateway.ended(*other)
    assert [] == gateway.ledger("cancel-run")


def test_usage_is_the_sum_of_the_jobs(gateway: Gateway) -> None:
    """In a tenant of its own, so that no other test's jobs are in it."""
    with new_tenant(gateway, "usage", "sluice_acceptance_usage") as client:
        mine = Gateway(client, gateway.ready, gateway.claude)
        done = mine.ended(*mine.submit(*[a_job("usage-run", number=n) for n in range(10)]))

        def added_up() -> dict[str, Any] | None:
            # Sums are written when the batch has ended, a moment after its jobs.
            day = (datetime.now(UTC) - timedelta(days=1)).date()
            report: dict[str, Any] = client.get("/usage", params={"from": str(day)}).json()
            return report if report["total"]["calls"] == len(done) else None

        total = within(PATIENCE_SECONDS, added_up)["total"]

    assert sum(job["cost_micro_usd"] for job in done) == total["cost_micro_usd"] > 0
    for kind in ("input_tokens", "output_tokens", "cache_read_input_tokens"):
        assert sum(job["usage"][kind] for job in done) == total[kind]
    rows = gateway.ledger("usage-run")
    assert sum(row["output_tokens"] for row in rows) == total["output_tokens"]


# Bad input -----------------------------------------------------------------------------------------------------

GOOD: Final = a_job("bad-run")
BAD: Final[dict[str, tuple[int, str, Any]]] = {
    "malformed JSON": (400, "invalid_request_error", '{"params": '),
    "unknown field": (400, "invalid_request_error", GOOD | {"prioirty": 1}),
    "missing max_tokens": (400, "invalid_request_error", {"params": {"model": "m"}}),
    "wrong type": (400, "invalid_request_error", a_job("bad-run", max_tokens="many")),
    "empty list": (400, "invalid_request_error", {"jobs": []}),
    "five megabytes": (413, "request_too_large", GOOD | {"metadata": {"x": "x" * 5_000_000}}),
    "deadline in the past": (
        400, "invalid_request_error", GOOD | {"deadline": "2020-01-01T00:00:00Z"},
    ),
    "unknown lane": (400, "invalid_request_error", GOOD | {"lane": "fast"}),
}  # fmt: skip


@pytest.mark.parametrize(("status", "kind", "body"), BAD.values(), ids=BAD.keys())
def test_bad_input_gets_a_clear_error_and_makes_no_job(
    gateway: Gateway, status: int, kind: str, body: Any
) -> None:
    text = body if isinstance(body, str) else json.dumps(body)

    # As JSON: a body of any other type becomes a third larger on its way to the function, and five megabytes too large.
    headers = {"content-type": "application/json"}
    answer = gateway.http.post("/jobs", content=text, headers=headers)

    assert status == answer.status_code
    is_an_error(answer, kind)
    assert [] == gateway.ledger("bad-run")


def is_an_error(answer: httpx.Response, kind: str) -> None:
    body = answer.json()
    assert "error" == body["type"]
    assert kind == body["error"]["type"]
    assert body["error"]["message"]
    assert answer.headers["request-id"] == body["request_id"]
    assert "Traceback" not in answer.text


@pytest.mark.parametrize("headers", [{}, {"x-api-key": "sluice_nobody_knows_me"}])
def test_a_wrong_or_missing_key_is_refused(gateway: Gateway, headers: dict[str, str]) -> None:
    for method, path in (("GET", "/jobs"), ("POST", "/jobs"), ("GET", "/usage")):
        answer = httpx.request(method, f"{gateway.ready.api_url}{path}", headers=headers)

        assert 401 == answer.status_code
        is_an_error(answer, "authentication_error")


def test_either_header_authenticates(gateway: Gateway) -> None:
    bearer = {"authorization": f"Bearer {CLIENT_KEY}"}

    assert 200 == httpx.get(f"{gateway.ready.api_url}/jobs", headers=bearer).status_code


class new_tenant:  # noqa: N801 - used as a context manager
    """A client of another tenant, with a client key of its own."""

    def __init__(self, gateway: Gateway, tenant: str, key: str) -> None:
        ready = gateway.ready
        pepper = ready.client("secretsmanager").get_secret_value(
            SecretId=ready.resources["ClientKeyPepper"]
        )["SecretString"]
        self.table, self.key_id = (
            ready.resources["ClientKeysTable"],
            client_keys.key_id(pepper, key),
        )
        self.dynamodb = ready.client("dynamodb")
        self.dynamodb.put_item(
            TableName=self.table,
            Item={
                "key_id": {"S": self.key_id},
                "hash": {"S": client_keys.verifier(pepper, key)},
                "tenant": {"S": tenant},
                "name": {"S": tenant},
                "created_at": {"S": "2026-11-20T12:00:00Z"},
            },
        )
        self.client = httpx.Client(base_url=ready.api_url, headers={"x-api-key": key}, timeout=30)

    def __enter__(self) -> httpx.Client:
        return self.client

    def __exit__(self, *_: object) -> None:
        self.client.close()


def test_another_tenants_job_does_not_exist(gateway: Gateway) -> None:
    (job_id,) = gateway.submit(a_job("tenant-run", custom_id="same-name"))

    with new_tenant(gateway, "another", OTHER_KEY) as another:
        for method in ("GET", "DELETE"):
            answer = another.request(method, f"/jobs/{job_id}")
            assert 404 == answer.status_code
            is_an_error(answer, "not_found_error")
        assert [] == another.get("/jobs").json()["data"]
        # A name belongs to its tenant: the same one is free here.
        answer = another.post("/jobs", json=a_job("tenant-run", custom_id="same-name"))
        assert 202 == answer.status_code
        assert job_id != answer.json()["id"]


def test_a_custom_id_used_twice_is_a_conflict_and_a_repeat_is_none(gateway: Gateway) -> None:
    first = gateway.post(a_job("custom-run", custom_id="only-once"))
    repeat = gateway.post(a_job("custom-run", custom_id="only-once"))
    other = gateway.post(a_job("custom-run", number=2, custom_id="only-once"))

    assert first.json()["id"] == repeat.json()["id"]
    assert 409 == other.status_code
    is_an_error(other, "conflict_error")
    gateway.ended(first.json()["id"])
    assert 1 == len(gateway.ledger("custom-run"))


def test_a_message_that_is_not_ours_ends_as_a_dead_letter_with_its_reason(
    gateway: Gateway,
) -> None:
    body = '{"order": 17, "from": "somebody else"}'
    ready = gateway.ready
    ready.client("sqs").send_message(QueueUrl=ready.resources["JobsQueue"], MessageBody=body)
    s3 = ready.client("s3")

    def letter() -> dict[str, Any] | None:
        bucket = ready.resources["DataBucket"]
        found = s3.list_objects_v2(Bucket=bucket, Prefix="dead-letters/").get("Contents", [])
        for each in found:
            text = s3.get_object(Bucket=bucket, Key=each["Key"])["Body"].read()
            kept: dict[str, Any] = json.loads(text)
            if kept["body"] == body:
                return kept
        return None

    assert "not a message of Sluice's" == within(PATIENCE_SECONDS, letter)["reason"]


# The command line ----------------------------------------------------------------------------------------------


def sluice(gateway: Gateway, *arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.cli", *arguments],
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        | {
            "SLUICE_URL": gateway.ready.api_url,
            "SLUICE_KEY": CLIENT_KEY,
            **gateway.ready.credentials.as_environment(),
            "AWS_DEFAULT_REGION": REGION,
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "layers/sluice")]),
        },
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert expect == done.returncode, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_a_job_that_ended_by_a_dead_letter_is_redriven_and_runs(gateway: Gateway) -> None:
    """A job on record whose message becomes a dead letter; then the operator's commands, and the sweep."""
    ready = gateway.ready
    objects = Objects(ready.client("s3"), ready.resources["DataBucket"])
    dynamodb, clock = ready.client("dynamodb"), SystemClock()
    jobs = DynamoJobs(dynamodb, ready.resources["JobsTable"], 30)
    params = DynamoParams(dynamodb, ready.resources["ParamsTable"], objects, clock, 30)
    body = json.dumps(a_job("redriven")["params"]).encode()
    job = Job(f"job_{7:032x}", "acme", MODEL, clock.now(), "hash", 20, 20, "2026-10-21")
    params.add(Params(job.job_id, body, "hash"))
    jobs.add(job)
    ready.client("sqs").send_message(
        QueueUrl=ready.resources["DeadLettersQueue"],
        MessageBody=json.dumps({"v": 1, "job_id": job.job_id}),
    )
    within(PATIENCE_SECONDS, lambda: gateway.job(job.job_id)["state"] == "errored")
    on_stack = ("--stack", "sluice-local", "--endpoint-url", ready.endpoint_url)

    dry = sluice(gateway, "dead-letters", "redrive", "--all", "--dry-run", *on_stack)
    assert "errored" == gateway.job(job.job_id)["state"]
    done = sluice(gateway, "dead-letters", "redrive", "--all", "--yes", *on_stack)
    ready.client("lambda").invoke(FunctionName=ready.resources["GovernorFunction"])

    assert "1 job would be redriven; estimated cost $0.0" in dry.stderr
    assert "1 job redriven" in done.stderr
    (ended,) = gateway.ended(job.job_id)
    assert ("succeeded", 1, 1) == (
        ended["state"],
        ended["attempts_used"],
        len(ended["redrives"]),
    )


def test_the_command_line_takes_a_file_of_jobs_to_its_results(
    gateway: Gateway, tmp_path: Path
) -> None:
    file, out = tmp_path / "jobs.jsonl", tmp_path / "results.jsonl"
    jobs = [a_job("cli-run", number=n, custom_id=f"cli-{n}") for n in range(5)]
    file.write_text("".join(json.dumps(job) + "\n" for job in jobs))

    sluice(gateway, "submit", str(file), "--wait", "--out", str(out))

    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {f"cli-{n}" for n in range(5)} == {row["custom_id"] for row in rows}
    assert {"succeeded"} == {row["result"]["type"] for row in rows}
    ids = [row["id"] for row in rows]
    again = sluice(gateway, "results", *ids).stdout.splitlines()
    assert {row["id"]: row["result"]["message"] for row in rows} == {
        row["id"]: row["result"]["message"] for row in map(json.loads, again)
    }
    listed = json.loads(sluice(gateway, "list", "--limit", "100", "--json").stdout)["data"]
    assert set(ids) <= {job["id"] for job in listed}
    report = json.loads(sluice(gateway, "usage", "--group-by", "model", "--json").stdout)
    assert MODEL in {row["model"] for row in report["data"]}
    shown = json.loads(sluice(gateway, "get", ids[0], "--json").stdout)
    assert shown == gateway.job(ids[0])


def test_the_command_line_says_what_a_bad_line_is(gateway: Gateway, tmp_path: Path) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_text(json.dumps(a_job("cli-bad-run")) + "\n" + "{not json\n")

    done = sluice(gateway, "submit", str(file), "--wait", expect=1)

    assert "2" in done.stderr
    assert 1 == len(gateway.ledger("cli-bad-run"))


# The README ----------------------------------------------------------------------------------------------------

_BLOCK: Final = re.compile(r"^```(?:console|bash|sh|shell)?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def curl_blocks(text: str) -> list[str]:
    """Return the blocks of commands that use curl, without prompts and without shown output."""
    blocks = []
    for block in _BLOCK.findall(text):
        if "curl " not in block:
            continue
        if re.search(r"^\$ ", block, re.MULTILINE):
            lines, wanted = [], False
            for line in block.splitlines():
                if line.startswith("$ "):
                    wanted = True
                if wanted:
                    lines.append(line.removeprefix("$ "))
                    wanted = line.endswith("\\")
            block = "\n".join(lines)  # noqa: PLW2901 - the same block, cleaned
        blocks.append(block)
    return blocks


@pytest.mark.skipif(not README.exists(), reason="README.md is not there yet")
def test_the_curl_lines_of_the_readme_work_as_they_stand(gateway: Gateway) -> None:
    blocks = curl_blocks(README.read_text(encoding="utf-8"))
    assert blocks, "the README shows no curl line"

    done = subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
        cwd=REPOSITORY,
        env=os.environ | {"SLUICE_URL": gateway.ready.api_url, "SLUICE_KEY": CLIENT_KEY},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert 0 == done.returncode, done.stderr
    assert '"type":"error"' not in done.stdout.replace(" ", "")
    assert "job_" in done.stdout


# Keys that stop working: last, for they take the gateway's only upstream key with them ---------------------------


def test_a_revoked_client_key_is_refused(gateway: Gateway) -> None:
    """Each process may remember a key for a minute; one that has not seen it yet refuses it at once."""
    tenant = new_tenant(gateway, "revoked", "sluice_acceptance_revoked")
    tenant.dynamodb.update_item(
        TableName=tenant.table,
        Key={"key_id": {"S": tenant.key_id}},
        UpdateExpression="SET disabled = :yes",
        ExpressionAttributeValues={":yes": {"BOOL": True}},
    )

    with tenant as client:
        answer = client.get("/jobs")

    assert 401 == answer.status_code
    is_an_error(answer, "authentication_error")


def test_a_revoked_upstream_key_loses_no_job(gateway: Gateway) -> None:
    """The job waits, without using an attempt, until the pool has a key that works."""
    control = f"{gateway.claude.url}/_simulator/config"
    httpx.post(control, json={"revoke": [UPSTREAM_KEY]}).raise_for_status()
    (job_id,) = gateway.submit(a_job("revoked-run"))

    within(PATIENCE_SECONDS, lambda: gateway.job(job_id)["snoozes"] > 0)

    job = gateway.job(job_id)
    assert ("queued", 0) == (job["state"], job["attempts_used"])
    ready = gateway.ready
    marks = ready.client("dynamodb").get_item(
        TableName=ready.resources["LimitsTable"], Key={"id": {"S": "key#main"}}
    )["Item"]
    assert json.loads(marks["record"]["S"])["rejected"]
