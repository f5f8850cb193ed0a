"""What functions do with AWS only when something rare happens, on a running stack: each grant is there for a reason.

The calls are recorded as in every test (tests/conftest.py); without these some grants would seem to be for nothing.
"""

from __future__ import annotations

import json
import random
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Final, TypeVar

import httpx
import pytest

from scripts.claude_simulator import read, running
from scripts.local_stack import LocalStack, Ready
from sluice.adapters.batch_records import DynamoBatches
from sluice.adapters.dynamodb import DynamoJobs, DynamoLedger
from sluice.adapters.s3 import Objects
from sluice.adapters.system import SystemClock
from sluice.bulk.assemble import MOST_RANGES_AT_ONCE
from sluice.domain.batches import LATE_MS, Phase, claim_range, row_job_id
from sluice.domain.jobs import AttemptOutcome, Job, State, claim
from sluice.domain.pricing import LedgerRow, Usage, utc_day
from sluice.domain.waits import BOOKING_MS, LEASE_MS
from sluice.intake.batches import MOST_STARTED
from sluice.ports.batches import Stored

CLIENT_KEY: Final = "sluice_rare_of_acme"
UPSTREAM_KEY: Final = "sk-ant-test-rare"
ADMIN_KEY: Final = "sk-ant-admin-test-rare"
ORGANIZATION: Final = "org-rare"
MODEL: Final = "claude-haiku-5-5"
TENANT: Final = "acme"
WITHIN_SECONDS: Final = 90.0
LONG_DAYS: Final = 90
"""More than objects under params/ are kept: large requests go under long-params/."""

Found = TypeVar("Found")


@dataclass(frozen=True)
class Stack:
    ready: Ready
    http: httpx.Client
    batches: DynamoBatches
    jobs: DynamoJobs
    ledger: DynamoLedger

    def calls_of(self, job_id: str) -> Sequence[LedgerRow]:
        today = utc_day(SystemClock().now())
        days = [today - timedelta(days=1), today]
        return self.ledger.calls_of(TENANT, days, job_id)

    @property
    def bucket(self) -> str:
        return self.ready.resources["DataBucket"]

    def pause(self, mapping: str) -> None:
        """Switch a mapping off, and wait until an invocation that looks for more messages has ended."""
        uuid = self.ready.resources[mapping]
        self.ready.client("lambda").update_event_source_mapping(UUID=uuid, Enabled=False)
        time.sleep(2)

    def resume(self, mapping: str) -> None:
        uuid = self.ready.resources[mapping]
        self.ready.client("lambda").update_event_source_mapping(UUID=uuid, Enabled=True)

    def govern(self) -> None:
        answer = self.ready.client("lambda").invoke(
            FunctionName=self.ready.resources["GovernorFunction"], Payload=b"{}"
        )
        assert "FunctionError" not in answer, answer["Payload"].read()

    def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get(f"/jobs/{job_id}").json()
        return found

    def ended(self, job_id: str) -> dict[str, Any]:
        return within(
            lambda: job if (job := self.job(job_id))["state"] not in {"queued", "running"} else None
        )

    def delete_all(self, prefix: str) -> int:
        s3 = self.ready.client("s3")
        found = s3.list_objects_v2(Bucket=self.bucket, Prefix=prefix).get("Contents", [])
        for each in found:
            s3.delete_object(Bucket=self.bucket, Key=each["Key"])
        return len(found)

    def planned(self, name: str) -> str:
        """Drop a file of one row; return its batch's id when it is planned."""
        line = {"custom_id": "one", "params": {**params("Say hello."), "max_tokens": 5}}
        self.ready.client("s3").put_object(
            Bucket=self.bucket, Key=f"in/{TENANT}/{name}", Body=json.dumps(line).encode() + b"\n"
        )

        def found() -> str | None:
            for each in self.http.get("/batches").json()["data"]:
                stored = self.batches.get(each["id"])
                file = stored and (stored.given_key or stored.input_key)
                if stored and stored.plan and file and file.endswith(f"/{name}"):
                    return str(each["id"])
            return None

        return within(found)

    def letters(self, body: str) -> Callable[[], bool]:
        """Return a condition: a message with this body is stored as a dead letter."""
        s3 = self.ready.client("s3")

        def kept() -> bool:
            listed = s3.list_objects_v2(Bucket=self.bucket, Prefix="dead-letters/")
            return any(
                body in s3.get_object(Bucket=self.bucket, Key=each["Key"])["Body"].read().decode()
                for each in listed.get("Contents", [])
            )

        return kept


def within(find: Callable[[], Found | None]) -> Found:
    end = time.monotonic() + WITHIN_SECONDS
    while time.monotonic() < end:
        if found := find():
            return found
        time.sleep(0.2)
    pytest.fail(f"not within {WITHIN_SECONDS} s")


def large(seed: int) -> str:
    """Text that no compression brings below what a table item holds."""
    return b64encode(random.Random(seed).randbytes(400_000)).decode()  # noqa: S311 - no secret


def params(content: str) -> dict[str, Any]:
    return {
        "model": MODEL,
        "max_tokens": 20,
        "messages": [{"role": "user", "content": content}],
    }


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    organization = {"id": ORGANIZATION, "keys": [UPSTREAM_KEY], "admin_keys": [ADMIN_KEY]}
    with running(read({"organisations": [organization]})) as claude:
        keys = {"id": "main", "api_key": UPSTREAM_KEY, "organization": ORGANIZATION}
        admin = {"organization": ORGANIZATION, "api_key": ADMIN_KEY}
        pool = {
            "keys": [{**keys, "base_url": claude.url}],
            "admin_keys": [{**admin, "base_url": claude.url}],
        }
        local = LocalStack(
            key_pool=pool,
            client_key=CLIENT_KEY,
            tenant=TENANT,
            environment={"SLUICE_RETENTION_DAYS": str(LONG_DAYS)},
        )
        headers = {"x-api-key": CLIENT_KEY}
        with (
            local.running() as ready,
            httpx.Client(base_url=ready.api_url, headers=headers, timeout=30) as http,
        ):
            batches = DynamoBatches(
                ready.client("dynamodb"), ready.resources["BatchesTable"], LONG_DAYS, SystemClock()
            )
            tables = ready.resources
            jobs = DynamoJobs(ready.client("dynamodb"), tables["JobsTable"], LONG_DAYS)
            ledger = DynamoLedger(
                ready.client("dynamodb"), tables["LedgerTable"], tables["UsageTable"]
            )
            yield Stack(ready, http, batches, jobs, ledger)


def test_a_large_request_that_is_kept_for_long_is_read_and_runs(stack: Stack) -> None:
    accepted = stack.http.post("/jobs", json={"params": params(large(1))}).json()

    assert "succeeded" == stack.ended(accepted["id"])["state"]


def test_a_large_request_that_is_missing_ends_its_job(stack: Stack) -> None:
    stack.delete_all("long-params/")
    stack.pause("WorkerMapping")
    accepted = stack.http.post("/jobs", json={"params": params(large(2))}).json()
    assert 1 == stack.delete_all("long-params/")

    stack.resume("WorkerMapping")
    ended = stack.ended(accepted["id"])

    assert ("errored", "request_lost") == (ended["state"], ended["error"]["type"])


def test_a_file_that_is_missing_when_its_rows_are_to_run(stack: Stack) -> None:
    stack.pause("RangesMapping")
    batch_id = stack.planned("missing.jsonl")
    # The copy, not the file of the tenant, which may be deleted at any time.
    assert 1 == stack.delete_all(f"batches/{batch_id}/rows.jsonl")

    stack.resume("RangesMapping")
    shown = within(
        lambda: (
            found
            if (found := stack.http.get(f"/batches/{batch_id}").json())["ended_at"] is not None
            else None
        )
    )

    assert 0 == shown["rows"]["succeeded"], shown


def test_a_deleted_batch_leaves_no_object(stack: Stack) -> None:
    """Neither the file that was uploaded, nor the copies of its results."""
    name = "Prüfung/my reviews (1) 100%+2.jsonl"
    row = {"custom_id": "one", "params": params("Hello")}
    body = json.dumps(row).encode()
    asked = {"name": name, "bytes": len(body), "options": {"model": MODEL}}
    started = stack.http.post("/uploads", json=asked).json()
    etag = httpx.put(started["links"][0]["url"], content=body).headers["etag"]
    done = {"id": started["id"], "name": name, "parts": [{"part": 1, "etag": etag}]}
    batch_id = stack.http.post("/uploads/complete", json=done).json()["id"]
    within(lambda: stack.http.get(f"/batches/{batch_id}").json()["state"] == "ended")
    bucket, s3 = stack.bucket, stack.ready.client("s3")

    def keys() -> list[str]:
        found = s3.list_objects_v2(Bucket=bucket).get("Contents", [])
        return [
            each["Key"] for each in found if "my reviews" in each["Key"] or batch_id in each["Key"]
        ]

    found = keys()
    assert {"batches", "in", "out"} == {key.split("/")[0] for key in found}
    folder = f"out/{TENANT}/{name.removesuffix('.jsonl')}/"
    assert {f"{folder}results.jsonl", f"{folder}errors.jsonl", f"{folder}summary.json"} <= set(
        found
    )
    answer = stack.http.delete(f"/v1/messages/batches/{batch_id}")

    assert answer.is_success, answer.text
    assert [] == keys()


@pytest.mark.parametrize("size", [10, 6_000_000])
def test_s3_keeps_the_copy_of_the_greater_rank(stack: Stack, size: int) -> None:
    """Its conditions on writes, in the emulator; moto has not all of them."""
    store = Objects(stack.ready.client("s3"), stack.bucket)
    sources = {}
    for rank in "123":
        store.put(f"ranks/{size}/{rank}", rank.encode() * size)
        found = store.head(f"ranks/{size}/{rank}")
        assert found is not None
        sources[rank] = found
    latest = f"ranks/{size}/latest"

    assert store.copy_latest(sources["2"], latest, "2")
    head = store.head

    def outdated(key: str) -> Stored | None:
        seen = head(key)
        if key == latest and store.head is outdated:
            store.head = head  # type: ignore[method-assign]
            store.copy_latest(sources["3"], latest, "3")
        return seen

    store.head = outdated  # type: ignore[method-assign]
    assert not store.copy_latest(sources["2"], latest, "2")
    assert b"3" * size == store.get(latest)


def test_a_deleted_batch_of_a_file_leaves_only_the_tenants_own_file(stack: Stack) -> None:
    before = everything(stack)
    batch_id = stack.planned("erased.jsonl")
    within(lambda: stack.http.get(f"/batches/{batch_id}").json()["ended_at"])
    made = everything(stack) - before
    assert {"batches", "in", "out"} == {key.split("/")[0] for key in made}

    answer = stack.http.delete(f"/v1/messages/batches/{batch_id}")

    assert answer.is_success, answer.text
    assert {f"in/{TENANT}/erased.jsonl"} == everything(stack) - before


def everything(stack: Stack) -> set[str]:
    pages = stack.ready.client("s3").get_paginator("list_objects_v2").paginate(Bucket=stack.bucket)
    return {each["Key"] for page in pages for each in page.get("Contents", ())}


def test_an_aborted_upload_is_deleted(stack: Stack) -> None:
    name = "given-up.jsonl"
    started = stack.http.post("/uploads", json={"name": name, "bytes": 200_000_000}).json()

    answer = stack.http.delete("/uploads", params={"id": started["id"], "name": name})

    assert answer.is_success, answer.text


def test_a_part_has_exactly_the_declared_size(stack: Stack) -> None:
    """The length is signed, so that a tenant cannot store more than it declared."""
    name = "measured.jsonl"
    started = stack.http.post("/uploads", json={"name": name, "bytes": 1_000}).json()
    (link,) = started["links"]

    def put(body: bytes | Iterator[bytes]) -> int:
        return httpx.put(link["url"], content=body).status_code

    assert [403, 403, 403] == [put(b"x" * size) for size in (999, 1_001, 5_000_000)]
    assert 403 == put(iter([b"x" * 1_000])), "without a length"
    assert 200 == put(b"x" * 1_000)
    stack.http.delete("/uploads", params={"id": started["id"], "name": name})


@pytest.mark.parametrize("queue", ["RangesQueue", "WebhooksQueue"])
def test_a_foreign_message_becomes_a_dead_letter(stack: Stack, queue: str) -> None:
    body = f"not of Sluice: {queue}"
    stack.ready.client("sqs").send_message(QueueUrl=stack.ready.resources[queue], MessageBody=body)

    if queue == "WebhooksQueue":
        within(stack.letters(body))
    else:
        # It becomes a dead letter of ranges, whose function notes it and lets it go.
        within(lambda: is_noted(stack, "BatchesLogs", "not a message of Sluice's"))


def is_noted(stack: Stack, group: str, phrase: str) -> bool:
    events = stack.ready.client("logs").filter_log_events(
        logGroupName=stack.ready.resources[group]
    )["events"]
    return any(phrase in event["message"] for event in events)


def test_the_limits_of_an_organization_with_an_admin_key_are_loaded(stack: Stack) -> None:
    stack.govern()

    assert within(lambda: stack.http.get("/limits").json()["data"])


def test_a_create_too_large_for_the_api_is_started_by_the_planner(stack: Stack) -> None:
    """The API function sends the messages of small creates itself."""
    stack.pause("RangesMapping")
    rows = [
        {"custom_id": f"row-{number:05}", "params": params("Say hello.")}
        for number in range(100 * (MOST_STARTED + 1))
    ]
    created = stack.http.post("/v1/messages/batches", json={"requests": rows}).json()

    def started() -> bool:
        batch = stack.batches.get(created["id"])
        return batch is not None and batch.phase is Phase.RUNNING

    within(started)
    stack.http.post(f"/v1/messages/batches/{created['id']}/cancel")
    stack.resume("RangesMapping")
    ended = within(lambda: stack.http.get(f"/batches/{created['id']}").json()["ended_at"])

    assert ended


def test_a_larger_batch_is_joined_by_the_batches_function(stack: Stack) -> None:
    """None of its lines is a row, so that no call is made."""
    stack.ready.client("s3").put_object(
        Bucket=stack.bucket,
        Key=f"in/{TENANT}/larger.jsonl",
        Body=b"{}\n" * 100 * (MOST_RANGES_AT_ONCE + 1),
        Metadata={"sluice-webhook": "https://127.0.0.1:9/nobody-listens"},
    )

    def ended() -> dict[str, Any] | None:
        for each in stack.http.get("/batches").json()["data"]:
            if each["name"] == "larger" and each["ended_at"]:
                return dict(each)
        return None

    assert 100 * (MOST_RANGES_AT_ONCE + 1) == within(ended)["rows"]["invalid"]


def test_a_parked_range_and_a_stalled_batch_continue(
    stack: Stack,
) -> None:
    stack.pause("RangesMapping")
    batch_id = stack.planned("waits.jsonl")
    sqs, url = stack.ready.client("sqs"), stack.ready.resources["RangesQueue"]
    sqs.purge_queue(QueueUrl=url)
    batch = stack.batches.get(batch_id)
    assert batch is not None
    past = SystemClock().now() - 1_000
    waiting = stack.batches.range_state(batch, 0)
    stack.batches.replace_range(
        replace(waiting, version=1, not_before=past, model=MODEL), waiting.version
    )
    stack.batches.replace(replace(batch, version=batch.version + 1, due_at=past), batch.version)

    stack.govern()
    stack.resume("RangesMapping")
    ended = within(lambda: stack.http.get(f"/batches/{batch_id}").json()["ended_at"])

    assert ended


def killed(stack: Stack) -> Job:
    """Submit a job, and record that a worker died during its call."""
    accepted = stack.http.post("/jobs", json={"params": params("Say hello.")}).json()
    job = stack.jobs.get(accepted["id"])
    assert job is not None
    past = SystemClock().now() - LEASE_MS
    taken = claim(job, "a worker that died", past - LEASE_MS, past)
    stack.jobs.replace(taken, job.version)
    return taken


def test_the_next_worker_books_the_call_of_one_that_died(stack: Stack) -> None:
    stack.pause("WorkerMapping")
    job = killed(stack)

    stack.resume("WorkerMapping")
    shown = stack.ended(job.job_id)
    rows = within(lambda: rows if len(rows := stack.calls_of(job.job_id)) > 1 else None)

    assert ("succeeded", 1) == (shown["state"], shown["uncertain_calls"])
    assert {"worker_lost", "succeeded"} == {row.outcome for row in rows}


def test_the_sweep_books_the_call_of_a_job_that_nobody_runs_again(stack: Stack) -> None:
    stack.pause("WorkerMapping")
    job = killed(stack)
    canceled = stack.http.delete(f"/jobs/{job.job_id}").json()

    stack.govern()
    stack.resume("WorkerMapping")

    assert "canceled" == canceled["state"], canceled
    assert ["worker_lost"] == [row.outcome for row in stack.calls_of(job.job_id)]
    stack.govern()
    assert 1 == len(stack.calls_of(job.job_id))


def test_a_dead_letter_books_the_call_of_a_job_whose_worker_died_after_its_end(
    stack: Stack,
) -> None:
    stack.pause("WorkerMapping")
    job = killed(stack)
    usage = Usage(input_tokens=5, output_tokens=7)
    answered = replace(job.attempts[-1], outcome=AttemptOutcome.SUCCEEDED, usage=usage)
    ended = replace(
        job,
        version=job.version + 1,
        state=State.SUCCEEDED,
        attempts=(answered,),
        lease=None,
        finished_at=SystemClock().now() - BOOKING_MS,
    )
    stack.jobs.replace(ended, job.version)

    stack.ready.client("sqs").send_message(
        QueueUrl=stack.ready.resources["DeadLettersQueue"],
        MessageBody=json.dumps({"v": 1, "job_id": job.job_id}),
    )
    rows = within(lambda: stack.calls_of(job.job_id) or None)
    stack.resume("WorkerMapping")

    assert [("succeeded", 7)] == [(row.outcome, row.spend.output_tokens) for row in rows]
    assert "succeeded" == stack.ended(job.job_id)["state"]


def test_the_next_worker_books_the_calls_of_rows_whose_worker_died(stack: Stack) -> None:
    stack.pause("RangesMapping")
    batch_id = stack.planned("died.jsonl")
    batch = stack.batches.get(batch_id)
    assert batch is not None
    waiting = stack.batches.range_state(batch, 0)
    past = SystemClock().now() - LEASE_MS
    dead = claim_range(waiting, "a worker that died", past - LEASE_MS, past)
    stack.batches.replace_range(replace(dead, running=(0,)), waiting.version)

    stack.resume("RangesMapping")
    shown = within(
        lambda: (
            each if (each := stack.http.get(f"/batches/{batch_id}").json())["ended_at"] else None
        )
    )

    assert (2, 1) == (shown["calls"], shown["uncertain_calls"])
    booked = [row.outcome for row in stack.calls_of(row_job_id(batch_id, 0))]
    assert ["succeeded", "worker_lost"] == sorted(booked)


def test_a_range_whose_message_is_lost_runs_after_the_next_check(stack: Stack) -> None:
    """It was sent again before, so that only an empty queue shows that this message is lost as well."""
    stack.pause("RangesMapping")
    batch_id = stack.planned("lost.jsonl")
    sqs, url = stack.ready.client("sqs"), stack.ready.resources["RangesQueue"]
    sqs.purge_queue(QueueUrl=url)
    batch = within(
        lambda: (
            found
            if (found := stack.batches.get(batch_id)) and found.phase is Phase.RUNNING
            else None
        )
    )
    now = SystemClock().now()
    late = replace(
        batch,
        version=batch.version + 1,
        created_at=now - 12 * LATE_MS,
        sent_at=now - 2 * LATE_MS,
        due_at=now - 1_000,
    )
    stack.batches.replace(late, batch.version)

    stack.govern()
    stack.resume("RangesMapping")
    ended = within(lambda: stack.http.get(f"/batches/{batch_id}").json()["ended_at"])

    assert ended
