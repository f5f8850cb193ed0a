"""A deployment and a rollback with unfinished jobs: each release reads what the other wrote.

`tests/fixtures/written_by_0_1_0.json` holds what the first release wrote, taken from its own adapters. Never change it;
a release that writes otherwise adds a file.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import pytest

from sluice.adapters import job_records
from sluice.adapters.dynamodb import DynamoJobs, DynamoLimits, DynamoParams
from sluice.adapters.s3 import DeadLetterObjects, Objects
from sluice.adapters.sqs import SqsQueue
from sluice.domain.jobs import (
    AttemptOutcome,
    DueFor,
    Job,
    JobError,
    Result,
    State,
    cancel_running,
    claim,
    finish_waiting,
    give_up,
    park,
    redrive,
    request_cancel,
    retry,
    snooze,
    succeed,
)
from sluice.domain.pricing import Usage
from sluice.ports.jobs import Pointer
from sluice.ports.messages import received
from tests.fakes import NOON, SECOND, FrozenClock, a_job
from tests.moto_aws import BUCKET, Aws, in_memory

FIXTURE: Final = Path(__file__).parents[1] / "fixtures" / "written_by_0_1_0.json"
WRITTEN: Final[dict[str, Any]] = json.loads(FIXTURE.read_text(encoding="utf-8"))
JOBS: Final[dict[str, Any]] = WRITTEN["jobs"]
JOB_ID: Final = f"job_{1:032x}"


@pytest.fixture(scope="module")
def cloud() -> Iterator[Aws]:
    with in_memory() as running:
        yield running


def stored(item: Mapping[str, Any]) -> dict[str, Any]:
    """An item of the fixture as DynamoDB holds it."""
    return {
        name: {"B": b64decode(value["B"])} if "B" in value else dict(value)
        for name, value in item.items()
    }


def plain(value: Any) -> Any:
    """What the fixture says of a job, in JSON's types."""
    if isinstance(value, bytes):
        return b64encode(value).decode()
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value


def pointer(body: str) -> str | None:
    (message,) = received([{"messageId": "m", "body": body}])
    return message.job_id


# Deployed: what the first release wrote is read by this one -----------------------------------------------------


@pytest.mark.parametrize("name", JOBS)
def test_a_job_of_the_first_release_is_read_as_it_was(cloud: Aws, name: str) -> None:
    item, meant = stored(JOBS[name]["item"]), JOBS[name]["job"]
    cloud.dynamodb.put_item(TableName="JobsTable", Item=item)

    job = DynamoJobs(cloud.dynamodb, "JobsTable", 30).get(meant["job_id"])

    assert job is not None
    read = {each: plain(value) for each, value in asdict(job).items() if each in meant}
    for attempt in read["attempts"]:
        # Written by later releases; for these attempts it is unknown.
        later = {"alone": False, "version": 0, "organization": None, "key_id": ""}
        assert later == {name: attempt.pop(name) for name in later}
    assert meant == read


@pytest.mark.parametrize(
    ("name", "goes_on"),
    [
        ("new", lambda job, now: claim(job, "new-worker", now, now + SECOND)),
        ("retried", lambda job, now: claim(job, "new-worker", now, now + SECOND)),
        ("parked", lambda job, now: claim(job, "new-worker", now, now + SECOND)),
        ("running", lambda job, now: claim(job, "new-worker", now, now + SECOND)),
        ("asked to stop", lambda job, now: finish_waiting(job, State.CANCELED, now)),
        ("dead letter", redrive),
    ],
)
def test_a_job_of_the_first_release_goes_on(cloud: Aws, name: str, goes_on: Any) -> None:
    jobs = DynamoJobs(cloud.dynamodb, "JobsTable", 30)
    cloud.dynamodb.put_item(TableName="JobsTable", Item=stored(JOBS[name]["item"]))
    job = jobs.get(JOBS[name]["job"]["job_id"])
    assert job is not None

    after = goes_on(job, NOON + 24 * 3_600 * SECOND)
    jobs.replace(after, job.version)

    assert after == jobs.get(job.job_id)


def test_parked_jobs_of_the_first_release_are_due(cloud: Aws) -> None:
    cloud.create_table("upgraded", like="JobsTable")
    for name in ("new", "retried", "parked"):
        cloud.dynamodb.put_item(TableName="upgraded", Item=stored(JOBS[name]["item"]))

    due = DynamoJobs(cloud.dynamodb, "upgraded", 30).due(
        DueFor.CALL, NOON + 24 * 3_600 * SECOND, 100
    )

    resting = [JOBS[name]["job"]["job_id"] for name in ("retried", "parked")]
    assert sorted(resting) == sorted(each.job_id for each in due)


def test_a_message_of_the_first_release_names_its_job() -> None:
    assert JOB_ID == pointer(WRITTEN["message"])


@pytest.mark.parametrize("where", ["inline", "in S3"])
def test_a_request_of_the_first_release_is_read(cloud: Aws, where: str) -> None:
    item = stored(WRITTEN["params"][where])
    objects = Objects(cloud.s3, BUCKET)
    if where == "in S3":
        # The object is only gzip; what counts is that it is found under the name on record.
        inline = stored(WRITTEN["params"]["inline"])["body"]["B"]
        objects.put(item["object_key"]["S"], inline)
    cloud.dynamodb.put_item(TableName="ParamsTable", Item=item)
    params = DynamoParams(cloud.dynamodb, "ParamsTable", objects, FrozenClock(), 30)

    (found,) = params.get_many([item["job_id"]["S"]]).values()

    assert {"model": "claude-haiku-5-5", "max_tokens": 100} == json.loads(found.body)
    assert item["request_hash"]["S"] == found.request_hash


def test_limits_that_the_first_release_learned_are_kept(cloud: Aws) -> None:
    for item in (WRITTEN["group"]["item"], WRITTEN["key_mark"]):
        cloud.dynamodb.put_item(TableName="LimitsTable", Item=stored(item))
    limits = DynamoLimits(cloud.dynamodb, "LimitsTable")

    group = limits.load(["org-one/haiku-5-5"])["org-one/haiku-5-5"]
    mark = limits.marks(["main"])["main"]

    meant = WRITTEN["group"]["group"]
    assert (meant["version"], meant["blocked_until"]) == (group.version, group.blocked_until)
    assert [meant[name]["limit"] for name in ("requests", "input_tokens", "output_tokens")] == [
        group.requests.limit, group.input_tokens.limit, group.output_tokens.limit,
    ]  # fmt: skip
    assert "org-one" == mark.organization


def test_a_dead_letter_of_the_first_release_is_read(cloud: Aws) -> None:
    body = WRITTEN["dead_letter"].encode()
    cloud.s3.put_object(Bucket=BUCKET, Key="dead-letters/m-1.json", Body=body)

    letter = DeadLetterObjects(Objects(cloud.s3, BUCKET)).letter("m-1")

    assert letter is not None
    assert ("received 1001 times without an end", 1_001) == (letter.reason, letter.receive_count)


# Rolled back: what this release writes is read by the first one --------------------------------------------------


class FirstRelease:
    """How the first release reads a job: by these names, these words, and without asking for any other."""

    TEXTS: Final = ("job_id", "tenant", "state", "model", "lane", "custom_id")
    NUMBERS: Final = (
        "version", "created_at", "finished_at", "cost_micro_usd", "attempts_used", "snoozes",
    )  # fmt: skip
    REST: Final = (
        "request_hash", "input_chars", "max_tokens", "anthropic_version", "anthropic_beta",
        "deadline", "fallback_models", "metadata", "fallbacks_used", "not_before", "started_at",
        "cancel_requested", "full_window",
    )  # fmt: skip
    NEEDED: Final[dict[str, set[str]]] = {
        "lease": {"owner", "until"},
        "last_snooze": {"at", "reason"},
        "error": {"type", "message"},
        "usage": set(),
    }

    def job(self, item: Mapping[str, Any]) -> dict[str, Any]:
        record = json.loads(item["record"]["S"])
        read: dict[str, Any] = {name: item[name]["S"] for name in self.TEXTS if name in item}
        read |= {name: int(item[name]["N"]) for name in self.NUMBERS if name in item}
        assert read["state"] in WRITTEN["states"]
        read |= {name: record[name] for name in self.REST if name in record}
        for name, needed in self.NEEDED.items():
            if name in record:
                assert needed <= record[name].keys()
                read[name] = record[name]
        read["attempts"] = [self._attempt(each) for each in record.get("attempts", ())]
        if "result" in item or "result_key" in item:
            read["result"] = {
                "inline": plain(item["result"]["B"]) if "result" in item else None,
                "object_key": item["result_key"]["S"] if "result_key" in item else None,
            }
        return read

    def _attempt(self, attempt: Mapping[str, Any]) -> Mapping[str, Any]:
        assert {"number", "model", "at"} <= attempt.keys()
        assert attempt.get("outcome") in {None, *WRITTEN["outcomes"]}
        if "error" in attempt:
            assert {"type", "message"} <= attempt["error"].keys()
        return attempt

    @staticmethod
    def names(body: str) -> str | None:
        read = json.loads(body)
        return read["job_id"] if read["v"] == 1 else None


def jobs_of_this_release() -> dict[str, Job]:
    """Return a job in every state, with every kind of history."""
    boom, dead = JobError("api_error", "boom", 500), JobError("dead_letter", "why")
    used = Usage(input_tokens=7, cache_read_input_tokens=5, output_tokens=3)
    new = a_job(
        JOB_ID,
        custom_id="row-1",
        deadline=NOON + 3_600 * SECOND,
        fallback_models=("claude-b",),
        metadata={"run": "7"},
        anthropic_beta="files-api",
    )

    def claimed(job: Job, now: int = NOON) -> Job:
        return claim(job, "w", now, now + 120 * SECOND)

    def retried(job: Job, **facts: Any) -> Job:
        return retry(claimed(job), "w", NOON, error=boom, usage=used, **facts)

    errored = finish_waiting(retried(new), State.ERRORED, NOON, dead)
    large = Result(object_key="results/x")
    return {
        "new": new,
        "running": claimed(new),
        "asked to stop": request_cancel(claimed(new), NOON),
        "snoozed": snooze(claimed(new), "w", NOON, reason="rate limited"),
        "parked": park(new, NOON, reason="spend limit", not_before=NOON + SECOND),
        "retried": retried(new, not_before=NOON + SECOND, full_window=True),
        "moved": retried(new, outcome=AttemptOutcome.FALLBACK),
        "lost": claimed(claimed(new), NOON + 3_000 * SECOND),
        "errored": errored,
        "redriven": redrive(errored, NOON),
        "redriven and running": claimed(redrive(errored, NOON)),
        "given up": give_up(claimed(new), "w", NOON, error=boom),
        "canceled": request_cancel(new, NOON),
        "stopped": cancel_running(claimed(new), "w", NOON, usage=used),
        "expired": finish_waiting(new, State.EXPIRED, NOON),
        **{
            f"succeeded {where}": succeed(
                claimed(new), "w", NOON, result=result, usage=used, cost_micro_usd=1, request_id="r"
            )
            for where, result in (("inline", Result(inline=b"x")), ("in S3", large))
        },
    }


def test_the_stories_reach_every_state_and_outcome() -> None:
    jobs = jobs_of_this_release().values()

    assert set(State) == {job.state for job in jobs}
    outcomes = {attempt.outcome for job in jobs for attempt in job.attempts}
    assert set(AttemptOutcome) == outcomes - {None}


@pytest.mark.parametrize("name", jobs_of_this_release())
def test_the_first_release_reads_a_job_of_this_one(name: str) -> None:
    job = jobs_of_this_release()[name]

    read = FirstRelease().job(job_records.encode(job, 30))

    meant = plain(asdict(job))
    for field, value in read.items():
        if isinstance(value, dict) and field not in {"metadata", "result"}:
            assert value.items() <= meant[field].items()
        elif field == "attempts":
            assert [each["outcome"] for each in meant[field]] == [
                each.get("outcome") for each in value
            ]
        else:
            assert meant[field] == value, field
    assert job.custom_id == read["custom_id"]
    assert ("lease" in read) == (job.lease is not None)
    assert ("error" in read) == (job.error is not None)


def test_what_the_first_release_wrote_is_read_by_its_own_rules() -> None:
    """Or else the reader above proves nothing."""
    for each in JOBS.values():
        read = FirstRelease().job(stored(each["item"]))
        assert (each["job"]["state"], each["job"]["version"]) == (read["state"], read["version"])


def test_the_first_release_reads_a_message_of_this_one(cloud: Aws) -> None:
    url = cloud.jobs_queue
    assert [] == SqsQueue(cloud.sqs, url, {}).send([Pointer(JOB_ID, "acme", "claude-a")])

    (message,) = cloud.sqs.receive_message(QueueUrl=url)["Messages"]

    assert JOB_ID == FirstRelease.names(message["Body"])
    assert message["Body"] == WRITTEN["message"].replace(pointer(WRITTEN["message"]) or "", JOB_ID)


def test_a_message_of_a_later_release_still_names_its_job() -> None:
    """So that a roll-back from there loses none: whatever else it says, the record is what counts."""
    later = {"v": 2, "job_id": JOB_ID, "news": [1]}

    assert JOB_ID == pointer(json.dumps(later))
    assert pointer(json.dumps(later | {"job_id": "work_1"})) is None


def test_a_record_of_a_later_release_is_read_without_its_news(cloud: Aws) -> None:
    jobs = DynamoJobs(cloud.dynamodb, "JobsTable", 30)
    job = replace(a_job(f"job_{99:032x}"), metadata={"run": "7"})
    item = job_records.encode(job, 30)
    record = json.loads(item["record"]["S"]) | {"news": {"deep": 1}}
    item |= {"record": {"S": json.dumps(record)}, "schema": {"N": "2"}, "fresh": {"S": "x"}}
    cloud.dynamodb.put_item(TableName="JobsTable", Item=item)

    assert job == jobs.get(job.job_id)
