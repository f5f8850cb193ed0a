"""What a tenant may see and do."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date

import pytest

from sluice.domain.errors import InvalidRequest, JobNotFound, StoreBusy
from sluice.domain.jobs import Job, State, claim, finish_waiting, lost_row
from sluice.domain.limits import moved, new_group
from sluice.domain.models import KnownModels
from sluice.domain.pricing import Spend
from sluice.intake.accounts import Account
from tests.fakes import (
    MESSAGE,
    NOON,
    SECOND,
    FrozenClock,
    MemoryJobs,
    MemoryLedger,
    MemoryLimits,
    MemoryResults,
    RecordingEvents,
    a_job,
)

DAY = date(2026, 11, 20)


@dataclass
class Office:
    """One tenant's account and the stores behind it."""

    jobs: MemoryJobs = field(default_factory=MemoryJobs)
    results: MemoryResults = field(default_factory=MemoryResults)
    limits: MemoryLimits = field(default_factory=MemoryLimits)
    ledger: MemoryLedger = field(default_factory=MemoryLedger)
    events: RecordingEvents = field(default_factory=RecordingEvents)
    clock: FrozenClock = field(default_factory=FrozenClock)

    def account(self, tenant: str = "acme") -> Account:
        return Account(
            tenant, self.jobs, self.results, self.limits, self.ledger, self.clock, self.events
        )

    def keep(self, *jobs: Job) -> None:
        for job in jobs:
            self.jobs.add(job)


@pytest.fixture
def office() -> Office:
    return Office()


def running(job: Job) -> Job:
    return claim(job, "worker-1", NOON, NOON + 120 * SECOND)


# Seeing ----------------------------------------------------------------------------------------------------


def test_a_tenant_sees_its_own_job(office: Office) -> None:
    office.keep(a_job())

    assert a_job() == office.account().job("job_1")


def test_another_tenants_job_does_not_exist(office: Office) -> None:
    office.keep(a_job(tenant="zenith"))

    with pytest.raises(JobNotFound, match="job 'job_1' does not exist"):
        office.account().job("job_1")
    with pytest.raises(JobNotFound):
        office.account().cancel("job_1")
    assert [] == office.account().some_jobs(["job_1"])
    assert State.QUEUED == office.jobs.stored["job_1"].state


def test_an_unknown_job_does_not_exist(office: Office) -> None:
    with pytest.raises(JobNotFound) as missing:
        office.account().job("job_404")
    assert "job_404" == missing.value.job_id


def test_a_message_is_returned_as_claude_returned_it(office: Office) -> None:
    small = replace(a_job(), result=office.results.put("job_1", MESSAGE))
    large = replace(a_job(), result=MemoryResults(inline_bytes=0).put("job_1", MESSAGE))

    assert MESSAGE == office.account().message(small)
    assert office.account().message(a_job()) is None
    with pytest.raises(JobNotFound):  # its object is in another bucket, or deleted
        office.account().message(large)


def test_jobs_are_returned_once_in_the_requested_order(office: Office) -> None:
    office.keep(a_job("job_1"), a_job("job_2"), a_job("job_3"))

    found = office.account().some_jobs(["job_3", "job_404", "job_1", "job_3"])

    assert ["job_3", "job_1"] == [job.job_id for job in found]


def test_a_listing_goes_page_by_page_newest_first(office: Office) -> None:
    office.keep(*(a_job(f"job_{n}", created_at=NOON + n // 2) for n in range(5)))
    office.keep(a_job("job_z", tenant="zenith"))

    pages, page = list[Sequence[str]](), None
    while True:
        found = office.account().listing(None, 2, page)
        pages.append([job.job_id for job in found.jobs])
        page = found.next_page
        if page is None:
            break

    assert [["job_4", "job_3"], ["job_2", "job_1"], ["job_0"]] == pages


def test_a_listing_can_ask_for_one_state(office: Office) -> None:
    office.keep(a_job("job_1"), running(a_job("job_2")), a_job("job_3"))

    found = office.account().listing(State.RUNNING, 10, None)

    assert (["job_2"], None) == ([job.job_id for job in found.jobs], found.next_page)


# Canceling -------------------------------------------------------------------------------------------------


def test_a_waiting_job_is_canceled_and_counted(office: Office) -> None:
    office.keep(a_job())

    assert State.CANCELED == office.account().cancel("job_1").state
    assert State.CANCELED == office.jobs.stored["job_1"].state
    assert 1 == office.events.counted("JobsCanceled")


def test_a_running_job_is_asked_to_stop_and_not_counted_yet(office: Office) -> None:
    office.keep(running(a_job()))

    job = office.account().cancel("job_1")

    assert (State.RUNNING, True) == (job.state, job.cancel_requested)
    assert 0 == office.events.counted("JobsCanceled")


def test_canceling_again_writes_nothing(office: Office) -> None:
    office.keep(a_job())
    first = office.account().cancel("job_1")

    assert first == office.account().cancel("job_1")
    assert 1 == office.events.counted("JobsCanceled")
    assert 1 == sum("replace" in line for line in office.jobs.journal)


def test_a_cancel_that_meets_a_starting_worker_asks_it_to_stop(office: Office) -> None:
    office.keep(a_job())
    office.jobs.before_replace.append(
        lambda: office.jobs.stored.update(job_1=running(office.jobs.stored["job_1"]))
    )

    job = office.account().cancel("job_1")

    assert (State.RUNNING, True) == (job.state, job.cancel_requested)


def test_a_cancel_that_meets_the_end_finds_the_job_ended(office: Office) -> None:
    office.keep(a_job())
    ended = finish_waiting(a_job(), State.EXPIRED, NOON)
    office.jobs.before_replace.append(lambda: office.jobs.stored.update(job_1=ended))

    assert ended == office.account().cancel("job_1")
    assert 0 == office.events.counted("JobsCanceled")


def test_a_job_that_vanishes_during_a_cancel_does_not_exist(office: Office) -> None:
    office.keep(a_job())
    office.jobs.before_replace.append(lambda: office.jobs.delete("job_1"))

    with pytest.raises(JobNotFound):
        office.account().cancel("job_1")


def test_a_busy_store_is_reported(office: Office) -> None:
    office.keep(a_job())
    office.jobs.fail_next("replace")

    with pytest.raises(StoreBusy, match="the jobs table is busy"):
        office.account().cancel("job_1")


# Spending --------------------------------------------------------------------------------------------------


def spent(office: Office) -> None:
    office.ledger.add_up(
        {
            ("acme", date(2026, 11, 19), "claude-a", "live"): Spend(1, cost_micro_usd=1),
            ("acme", DAY, "claude-a", "live"): Spend(2, cost_micro_usd=20),
            ("acme", DAY, "claude-b", "live"): Spend(3, cost_micro_usd=300),
            ("acme", date(2026, 11, 21), "claude-a", "live"): Spend(4, cost_micro_usd=4_000),
            ("zenith", DAY, "claude-a", "live"): Spend(5, cost_micro_usd=50_000),
        }
    )


@pytest.mark.parametrize(
    ("group_by", "rows"),
    [
        ([], [({}, 321)]),
        (["day"], [({"day": "2026-11-19"}, 1), ({"day": "2026-11-20"}, 320)]),
        (["model"], [({"model": "claude-a"}, 21), ({"model": "claude-b"}, 300)]),
        (["lane"], [({"lane": "live"}, 321)]),
        (
            ["model", "day"],
            [
                ({"model": "claude-a", "day": "2026-11-19"}, 1),
                ({"model": "claude-a", "day": "2026-11-20"}, 20),
                ({"model": "claude-b", "day": "2026-11-20"}, 300),
            ],
        ),
    ],
)
def test_usage_is_summed_up_as_asked_both_days_included(
    office: Office, group_by: list[str], rows: list[tuple[dict[str, str], int]]
) -> None:
    spent(office)

    report = office.account().usage(date(2026, 11, 19), DAY, group_by)

    assert rows == [(row.group, row.spend.cost_micro_usd) for row in report]


def test_nothing_spent_is_an_empty_report(office: Office) -> None:
    assert [] == office.account().usage(DAY, DAY, ["day"])


@pytest.mark.parametrize(
    ("first", "last", "complaint"),
    [
        (date(2026, 11, 21), DAY, "2026-11-20 is before from"),
        (date(2025, 11, 19), DAY, "at most 366 days"),
    ],
)
def test_an_impossible_span_is_refused(
    office: Office, first: date, last: date, complaint: str
) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        office.account().usage(first, last, ["day"])


def test_a_report_covers_a_leap_year(office: Office) -> None:
    assert [] == office.account().usage(date(2028, 1, 1), date(2028, 12, 31), ["day"])


def test_groups_that_moved_are_not_shown(office: Office) -> None:
    here, missing = new_group("org", "a", NOON), moved(new_group("key:main", "a", NOON), "org")
    office.limits.stored = {here.id: here, missing.id: missing}

    assert [here] == office.account().groups({"a": "a"}, {"a"})


def test_only_the_organizations_that_make_a_tenants_calls_are_shown(office: Office) -> None:
    """Others belong to keys that the pool reserves for other tenants."""
    groups = [new_group(name, "haiku", NOON) for name in ("org-1", "org-2")]
    office.limits.stored = {group.id: group for group in groups}
    office.keep(a_job("job_1", model="claude-a"), a_job("job_2", model="claude-a", tenant="other"))
    for tenant, organization in (("acme", "org-1"), ("other", "org-2")):
        job = a_job(tenant=tenant)
        row = lost_row(job, "2", "claude-a", NOON, "")
        office.ledger.record([replace(row, organization=organization)])

    shown = {
        tenant: [
            group.organization
            for group in office.account(tenant).groups({"claude-a": "haiku"}, {"claude-a"})
        ]
        for tenant in ("acme", "other", "third")
    }

    assert {"acme": ["org-1"], "other": ["org-2"], "third": []} == shown


def test_only_the_groups_of_a_tenants_own_models_are_shown(office: Office) -> None:
    groups = [
        new_group("org", name, NOON)
        for name in ("haiku", "claude-secret", "new", "unknown:acme", "unknown:other")
    ]
    office.limits.stored = {group.id: group for group in groups}
    office.limits.known_models = KnownModels(loaded={"claude-c": "new"})
    office.keep(
        a_job("job_1", model="claude-a"),
        a_job("job_2", model="claude-secret", tenant="other"),
        a_job("job_3", model="claude-c"),
    )
    day = date(2026, 11, 1)
    office.ledger.add_up({("acme", day, "claude-b", "live"): Spend(calls=1)})
    office.ledger.add_up({("other", day, "claude-secret", "live"): Spend(calls=1)})
    long_ago = date(2026, 10, 1)
    office.ledger.add_up({("acme", long_ago, "claude-secret", "live"): Spend(calls=1)})

    account = office.account()
    models = account.models()

    assert {"claude-a", "claude-b", "claude-c"} == models
    known = {"claude-a": "haiku"}
    shown = [group.model_group for group in account.groups(known, models)]
    assert ["haiku", "new", "unknown:acme"] == shown
    assert [] == office.account("third").groups(known, office.account("third").models())
