"""Due jobs in the store: one suite for the fake the sweep is tested with and for DynamoDB itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from typing import Any, Final, Protocol

import pytest
from botocore.stub import Stubber

from sluice.adapters import aws, job_records, tables
from sluice.adapters.dynamodb import (
    JOBS_NOTES_ID,
    DynamoGovernorNotes,
    DynamoJobs,
    notes_id,
)
from sluice.domain.errors import StoreBusy
from sluice.domain.jobs import DueFor, Job, JobError, claim, give_up, request_cancel, snooze
from sluice.domain.shares import Note
from sluice.ports.jobs import Due, DueJobs, JobStore
from sluice.ports.limits import GovernorNotes
from sluice.settings import MAPPINGS
from sluice.upkeep.sweep import Sweep, Swept
from tests.fakes import (
    MINUTE,
    NOON,
    FrozenClock,
    MemoryGovernorNotes,
    MemoryJobs,
    MemoryLedger,
    MemoryLimits,
    MemoryQueue,
    PoolWritten,
    RecordingEvents,
    a_job,
)
from tests.moto_aws import Aws, in_memory

PLENTY: Final = 10_000
LATER: Final = NOON + 2 * MINUTE


class Store(JobStore, DueJobs, Protocol):
    """The job records as worker and sweep use them together."""


@pytest.fixture(scope="module")
def cloud() -> Iterator[Aws]:
    with in_memory() as running:
        yield running


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A table that no other test uses: what is due is asked of the whole table."""
    return f"test-{sha256(request.node.name.encode()).hexdigest()[:16]}"


@pytest.fixture(params=["fake", "aws"])
def jobs(request: pytest.FixtureRequest, cloud: Aws, name: str) -> Store:
    if request.param == "fake":
        return MemoryJobs()
    cloud.create_table(name, like="JobsTable")
    return DynamoJobs(cloud.dynamodb, name, retention_days=30)


@pytest.fixture(params=["fake", "aws"])
def notes(request: pytest.FixtureRequest, cloud: Aws, name: str) -> GovernorNotes:
    if request.param == "fake":
        return MemoryGovernorNotes()
    cloud.create_table(name, like="LimitsTable")
    return DynamoGovernorNotes(cloud.dynamodb, name, JOBS_NOTES_ID)


def parked(job_id: str, due: int = NOON, **facts: Any) -> Job:
    return a_job(job_id, not_before=due, **facts)


def add(jobs: JobStore, *some: Job) -> None:
    for job in some:
        jobs.add(job)


def due_ids(
    jobs: DueJobs, now: int = NOON, share: int = PLENTY, why: DueFor = DueFor.CALL
) -> list[str]:
    return [each.job_id for each in jobs.due(why, now, share)]


def the_one_due(jobs: DueJobs, now: int = NOON) -> Due:
    (found,) = jobs.due(DueFor.CALL, now, PLENTY)
    return found


def test_nothing_is_due_where_nothing_is_parked(jobs: Store) -> None:
    add(jobs, a_job("job_1"), a_job("job_2", deadline=NOON + 1))

    assert [] == due_ids(jobs)


def test_a_parked_job_is_due_when_its_time_has_come(jobs: Store) -> None:
    add(jobs, parked("job_1", NOON + 1))

    assert [] == due_ids(jobs, NOON)
    assert ["job_1"] == due_ids(jobs, NOON + 1)


def test_a_due_job_comes_with_what_the_sweep_needs(jobs: Store) -> None:
    fallen_back = parked(
        "job_1",
        NOON,
        tenant="zenith",
        fallback_models=("claude-b",),
        fallbacks_used=1,
        deadline=NOON + MINUTE,
    )
    add(jobs, fallen_back)

    assert Due("job_1", "zenith", "claude-b", NOON, NOON + MINUTE) == the_one_due(jobs)


def test_a_deadline_makes_a_job_due_before_its_time(jobs: Store) -> None:
    add(jobs, parked("job_1", NOON + 60 * MINUTE, deadline=NOON))

    assert (NOON, NOON) == (the_one_due(jobs).due_at, the_one_due(jobs).deadline)


def test_the_longest_due_jobs_are_first(jobs: Store) -> None:
    add(jobs, *(parked(f"job_{number:02}", NOON - 7 * number % 50) for number in range(50)))

    found = [each.due_at for each in jobs.due(DueFor.CALL, NOON, PLENTY)]

    assert 50 == len(found)
    assert sorted(found) == found


def test_a_large_backlog_hides_no_job_of_another_tenant_or_model(jobs: Store) -> None:
    """Neither among the longest due nor among the latest."""
    add(jobs, *(parked(f"job_{number:03}", NOON - 200 + number) for number in range(200)))
    add(jobs, parked("job_model", NOON - 100, model="claude-b"))
    add(jobs, parked("job_tenant", NOON - 90, tenant="zenith"))

    found = due_ids(jobs, NOON, share=16)

    assert "job_000" == found[0]
    assert {"job_model", "job_tenant"} <= set(found)
    assert 16 <= len(found) <= 18


def test_of_more_than_is_read_the_latest_are_seen(
    cloud: Aws, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "DUE_AT_ONCE", 2)
    monkeypatch.setattr(tables, "DUE_PAGES", 2)
    cloud.create_table(name, like="JobsTable")
    jobs = DynamoJobs(cloud.dynamodb, name, retention_days=30)
    add(jobs, *(parked(f"job_{number:03}", NOON - 200 + number) for number in range(100)))
    add(jobs, parked("job_new", NOON, tenant="zenith"))

    found = due_ids(jobs)

    assert ("job_000", "job_new") == (found[0], found[-1])
    assert 8 * 2 * 2 < len(found) <= 8 * 2 * 3


def test_a_job_that_goes_on_is_not_due_any_more(jobs: Store) -> None:
    add(jobs, *(parked(f"job_{number}") for number in range(3)))
    claimed = claim(parked("job_0"), "worker", NOON, LATER)
    jobs.replace(claimed, 1)
    jobs.replace(request_cancel(parked("job_1"), NOON), 1)

    assert ["job_2"] == due_ids(jobs)


def test_a_job_parked_again_is_due_at_its_new_time(jobs: Store) -> None:
    add(jobs, parked("job_1"))
    claimed = claim(parked("job_1"), "worker", NOON, LATER)
    jobs.replace(claimed, 1)

    snoozed = snooze(claimed, "worker", NOON, reason="spend limit", not_before=LATER)
    jobs.replace(snoozed, 2)

    assert [] == due_ids(jobs)
    assert ["job_1"] == due_ids(jobs, LATER)


def test_one_of_two_takes_a_due_job(jobs: Store) -> None:
    add(jobs, parked("job_1"))
    seen = the_one_due(jobs)

    taken = jobs.postpone(seen, LATER)

    assert replace(seen, due_at=LATER) == taken
    assert jobs.postpone(seen, LATER + 1) is None
    assert [] == due_ids(jobs)


def test_a_job_that_was_taken_and_not_watched_is_due_again(jobs: Store) -> None:
    add(jobs, parked("job_1"))
    taken = jobs.postpone(the_one_due(jobs), LATER)

    assert taken == the_one_due(jobs, LATER)


def test_a_watched_job_is_not_due_for_its_call_any_more_and_else_as_it_was(jobs: Store) -> None:
    job = parked("job_1", deadline=LATER + 2)
    add(jobs, job)
    taken = jobs.postpone(the_one_due(jobs), LATER)
    assert taken is not None

    jobs.watch(taken, LATER + 1)

    assert [] == due_ids(jobs, PLENTY + LATER)
    assert [] == due_ids(jobs, LATER, why=DueFor.CHECK)
    assert ["job_1"] == due_ids(jobs, LATER + 1, why=DueFor.CHECK)
    assert job == jobs.get("job_1")
    jobs.replace(claim(job, "worker", NOON, LATER), job.version)  # no version was used up


def test_a_watched_job_is_due_at_its_deadline_if_that_is_first(jobs: Store) -> None:
    add(jobs, parked("job_1", deadline=LATER + 1))
    taken = jobs.postpone(the_one_due(jobs), LATER)
    assert taken is not None

    jobs.watch(taken, LATER + 2)

    assert [] == due_ids(jobs, LATER)
    assert ["job_1"] == due_ids(jobs, LATER + 1)
    assert [] == due_ids(jobs, LATER + 2, why=DueFor.CHECK)


def test_a_job_that_went_on_can_be_neither_taken_nor_watched(jobs: Store) -> None:
    add(jobs, parked("job_1"))
    seen = the_one_due(jobs)
    claimed = claim(parked("job_1"), "worker", NOON, LATER)
    jobs.replace(claimed, 1)

    assert jobs.postpone(seen, LATER) is None
    jobs.watch(seen, LATER)

    assert claimed == jobs.get("job_1")


def test_a_job_that_was_concurrently_parked_again_keeps_its_time(jobs: Store) -> None:
    add(jobs, parked("job_1"))
    taken = jobs.postpone(the_one_due(jobs), LATER)
    assert taken is not None
    claimed = claim(parked("job_1"), "worker", NOON, LATER)
    jobs.replace(claimed, 1)
    again = snooze(claimed, "worker", NOON, reason="x", not_before=LATER + 1)
    jobs.replace(again, 2)

    jobs.watch(taken, LATER)

    assert ["job_1"] == due_ids(jobs, LATER + 1)


def test_a_missing_job_is_not_postponed(jobs: Store) -> None:
    missing = Due("job_missing", "acme", "claude-a", NOON)

    assert jobs.postpone(missing, LATER) is None
    jobs.watch(missing, LATER)

    assert jobs.get("job_missing") is None


def test_the_sweep_over_the_store(jobs: Store) -> None:
    add(jobs, *(parked(f"job_{number}") for number in range(30)))
    add(jobs, parked("job_late", deadline=NOON), parked("job_early", LATER))
    clock = FrozenClock()
    queue = MemoryQueue(clock.now)
    pool = PoolWritten(None)
    sweep = Sweep(
        jobs, jobs, MemoryLedger(), queue, MemoryLimits(), pool, {}, clock, RecordingEvents()
    )

    assert Swept(due=31, sent=30, expired=1) == sweep(LATER)
    assert Swept() == sweep(LATER)

    assert {f"job_{number}" for number in range(30)} == {m.job_id for m in queue.deliver(100)}


def test_due_jobs_spread_over_all_parts_of_the_index() -> None:
    parts = {job_records.due_part(f"job_{number:032x}") for number in range(200)}

    assert set(range(job_records.DUE_SHARDS)) == parts


def test_the_parts_of_each_reason_are_its_own() -> None:
    names = {job_records.due_shard(why, part) for why in DueFor for part in range(8)}

    assert 8 * len(DueFor) == len(names)
    # Those of parked jobs have been called so since before there were others: a roll-back still finds them.
    assert "3" == job_records.due_shard(DueFor.CALL, 3)


def test_a_job_is_watched_until_it_has_ended(jobs: Store) -> None:
    add(jobs, a_job("job_1"), a_job("job_2"))
    claimed = claim(a_job("job_1"), "worker", NOON, LATER)
    jobs.replace(claimed, 1)

    assert ["job_1", "job_2"] == due_ids(jobs, NOON + 45 * MINUTE, why=DueFor.CHECK)
    jobs.replace(give_up(claimed, "worker", NOON, error=JobError("x", "y")), 2)

    assert ["job_2"] == due_ids(jobs, NOON + 45 * MINUTE, why=DueFor.CHECK)


def test_a_store_that_is_busy_says_so(cloud: Aws) -> None:  # noqa: ARG001 - its credentials
    client = aws.dynamodb()
    store = DynamoJobs(client, "JobsTable", retention_days=30)
    with Stubber(client) as stub:
        for _ in range(4):
            stub.add_client_error("update_item", "ThrottlingException")
        with pytest.raises(StoreBusy):
            store.postpone(Due("job_1", "acme", "claude-a", NOON), LATER)


# What the governor remembers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "note", [Note(turned_off_at=NOON), Note(turned_on_at=NOON, left=2, left_until=LATER), Note()]
)
def test_the_governor_remembers_what_it_noted_last_and_nothing_else(
    notes: GovernorNotes, note: Note
) -> None:
    assert Note() == notes.read()

    notes.write(Note(NOON - 1, NOON - 2, 7, NOON - 3))
    notes.write(note)

    assert note == notes.read()


def test_what_it_remembers_of_one_mapping_is_not_the_others(cloud: Aws, name: str) -> None:
    cloud.create_table(name, like="LimitsTable")
    jobs = DynamoGovernorNotes(cloud.dynamodb, name, JOBS_NOTES_ID)
    ranges = DynamoGovernorNotes(cloud.dynamodb, name, notes_id("ranges"))
    ranges.write(Note(LATER))
    jobs.write(Note(NOON))
    assert (NOON, LATER) == (jobs.read().turned_off_at, ranges.read().turned_off_at)

    jobs.write(Note())

    assert (Note(), Note(LATER)) == (jobs.read(), ranges.read())


def test_every_mapping_has_a_note_of_its_own_and_two_have_those_of_the_first_release() -> None:
    assert len(MAPPINGS) == len({notes_id(each) for each in MAPPINGS})
    assert ["governor#notes", "governor#notes#ranges"] == [
        notes_id(each) for each in ("jobs", "ranges")
    ]


def test_a_note_of_the_release_that_knew_one_mapping_is_about_the_jobs(
    cloud: Aws, name: str
) -> None:
    cloud.create_table(name, like="LimitsTable")
    written = {"id": {"S": "governor#notes"}, "turned_off_at": {"N": str(NOON)}}
    cloud.dynamodb.put_item(TableName=name, Item=written)

    found = [
        DynamoGovernorNotes(cloud.dynamodb, name, notes_id(each)).read().turned_off_at
        for each in ("jobs", "ranges")
    ]

    assert [NOON, None] == found
