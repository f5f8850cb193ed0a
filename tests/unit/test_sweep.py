"""The sweep: parked jobs are sent when they are due, each once, and no faster than they can start."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from sluice.domain.errors import NotStorable, StoreBusy
from sluice.domain.jobs import (
    WATCH_MS,
    DueFor,
    Job,
    JobError,
    Lease,
    State,
    claim,
    request_cancel,
    snooze,
)
from sluice.domain.limits import Group, new_group
from sluice.upkeep.schedule import UNSENT_MS
from sluice.upkeep.sweep import NEW_KEYS_MS, QUIET_MS, Sweep, Swept
from tests.fakes import (
    MINUTE,
    NOON,
    SECOND,
    FrozenClock,
    MemoryJobs,
    MemoryLedger,
    MemoryLimits,
    MemoryQueue,
    PoolWritten,
    RecordingEvents,
    a_job,
    known_group,
    paced,
)

FOREVER = NOON + 24 * 60 * MINUTE
NO_JOB = Swept()


class Scene:
    """Jobs that a worker parked, some limit groups, and the queue."""

    def __init__(self, *jobs: Job, groups: tuple[Group, ...] = ()) -> None:
        self.clock = FrozenClock()
        self.jobs = MemoryJobs(*jobs)
        self.queue = MemoryQueue(self.clock.now)
        self.ledger = MemoryLedger()
        self.limits = MemoryLimits(*groups)
        self.pool = PoolWritten(None)
        self.events = RecordingEvents()

    def sweep(self, stop_at: int = FOREVER) -> Swept:
        use_case = Sweep(
            self.jobs,
            self.jobs,
            self.ledger,
            self.queue,
            self.limits,
            self.pool,
            {"claude-a": "a", "claude-b": "b"},
            self.clock,
            self.events,
        )
        return use_case(stop_at)

    def sent(self) -> list[str | None]:
        return [message.job_id for message in self.queue.deliver(10_000)]


def test_a_job_that_ended_without_a_worker_is_booked_once_by_the_sweep() -> None:
    """Its worker died during its call, and its caller canceled it: nobody else writes the row."""
    dead = claim(a_job(), "a worker that died", NOON - 10 * MINUTE, NOON - 8 * MINUTE)
    scene = Scene(request_cancel(dead, NOON))
    scene.ledger.fail_next("record_missing")

    scene.sweep()
    assert {} == scene.ledger.rows
    scene.sweep()
    scene.sweep()

    (row,) = scene.ledger.rows.values()
    assert ("worker_lost", "job_1#2", False) == (row.outcome, row.call_id, row.certain)
    assert [row.spend] == list(scene.ledger.sums.values())
    assert {} == scene.jobs.due_jobs


def test_a_row_that_the_ledger_cannot_take_holds_back_no_other() -> None:
    jobs = []
    for job_id in ("job_1", "job_2"):
        dead = claim(a_job(job_id), "a worker that died", NOON - 10 * MINUTE, NOON - 8 * MINUTE)
        jobs.append(request_cancel(dead, NOON))
    scene = Scene(*jobs)
    scene.ledger.fail_next("record_missing", error=NotStorable("the ledger", "too large"))

    scene.sweep()

    assert ["", "claude-a"] == [row.model for row in scene.ledger.rows.values()]
    assert {} == scene.jobs.due_jobs


def parked(job_id: str = "job_1", minutes: float = 0, **facts: object) -> Job:
    """A parked job, due after this many minutes."""
    owner = Lease("worker", NOON)
    running = claim(a_job(job_id, **facts), owner.owner, NOON - MINUTE, NOON)
    not_before = NOON + int(minutes * MINUTE)
    return snooze(running, owner.owner, NOON - MINUTE, reason="spend limit", not_before=not_before)


def slow_group(rpm: int, model_group: str = "a", **facts: object) -> Group:
    return replace(
        known_group(model_group=model_group, seen=paced(rpm, 1)),
        **facts,  # type: ignore[arg-type]
    )


def test_a_parked_job_gets_another_message_when_it_is_due() -> None:
    scene = Scene(parked(minutes=20))

    scene.clock.at = NOON + 20 * MINUTE - 1
    assert (NO_JOB, []) == (scene.sweep(), scene.sent())
    scene.clock.at = NOON + 20 * MINUTE
    swept = scene.sweep()

    assert (Swept(due=1, sent=1), ["job_1"]) == (swept, scene.sent())
    assert State.QUEUED == scene.jobs.stored["job_1"].state
    assert "acme" == scene.queue.tenants["job_1"]
    counts = {"due": 1, "sent": 1, "expired": 0, "left": 0, "rescued": 0}
    assert [("due jobs swept", counts)] == scene.events.notes


def test_it_is_sent_once() -> None:
    scene = Scene(parked())
    scene.sweep()
    scene.clock.at += 10 * MINUTE

    assert NO_JOB == scene.sweep()
    assert ["job_1"] == scene.sent()


def test_a_job_with_a_message_is_not_the_sweeps_business() -> None:
    waiting = a_job("job_1")
    running = claim(a_job("job_2"), "worker", NOON, NOON + MINUTE)
    snoozed = snooze(running, "worker", NOON, reason="rate limited")
    canceled = request_cancel(parked("job_3"), NOON)
    scene = Scene(waiting, replace(running, job_id="job_4"), snoozed, canceled)

    assert NO_JOB == scene.sweep()
    assert [] == scene.sent()


def test_two_sweeps_at_once_send_it_once() -> None:
    scene = Scene(parked())
    seen = scene.jobs.due(DueFor.CALL, NOON, 10)
    scene.sweep()

    (late,) = seen
    assert scene.jobs.postpone(late, NOON + UNSENT_MS) is None
    assert ["job_1"] == scene.sent()


def expired_at(scene: Scene) -> int:
    """Sweep once a minute beside a long queue until job_1 expires; return when."""
    for number in range(5_000):
        scene.queue.post(job_id=f"other_{number}")
    while not scene.jobs.stored["job_1"].state.is_final:
        scene.clock.at += MINUTE
        scene.sweep()
    assert State.EXPIRED == scene.jobs.stored["job_1"].state
    return scene.clock.at


@pytest.mark.parametrize("others", [0, 1_500])
@pytest.mark.parametrize("minutes", [40, 50, 100, 300])
def test_a_deadline_is_seen_though_the_queue_is_long(minutes: int, others: int) -> None:
    """A job's message waits in the queue for hours, beside many other jobs that do."""
    deadline = NOON + minutes * MINUTE
    waiting = [a_job(f"job_{number}") for number in range(2, 2 + others)]
    scene = Scene(a_job(deadline=deadline), *waiting, groups=(slow_group(60),))

    assert deadline <= expired_at(scene) <= deadline + MINUTE


@pytest.mark.parametrize("minutes", [40, 50, 300])
def test_a_deadline_is_seen_after_a_parked_job_was_sent(minutes: int) -> None:
    deadline = NOON + minutes * MINUTE
    scene = Scene(parked(minutes=20, deadline=deadline), groups=(slow_group(60),))

    assert deadline <= expired_at(scene) <= deadline + MINUTE


def test_what_the_queue_does_not_take_stays_due() -> None:
    scene = Scene(parked("job_1"), parked("job_2"))
    scene.queue.untaken = {"job_1"}

    assert Swept(due=2, sent=1, left=1) == scene.sweep()
    scene.queue.untaken = set()
    scene.clock.at += UNSENT_MS
    assert Swept(due=1, sent=1) == scene.sweep()

    assert ["job_2", "job_1"] == scene.sent()


@pytest.mark.parametrize("verb", ["postpone", "watch"])
def test_a_sweep_that_dies_loses_nothing(verb: str) -> None:
    """Dying right after sending sends it twice: the lease decides who runs it."""
    scene = Scene(parked())
    scene.jobs.fail_next(verb)

    with pytest.raises(StoreBusy):
        scene.sweep()
    scene.clock.at += UNSENT_MS
    scene.sweep()

    assert {"job_1"} == set(scene.sent())
    assert [] == scene.jobs.due(DueFor.CALL, FOREVER, 10)


def test_a_worker_that_claimed_the_job_before_the_sweep_keeps_it() -> None:
    scene = Scene(parked())

    def be_claimed() -> None:
        job = scene.jobs.stored["job_1"]
        scene.jobs.replace(claim(job, "another", NOON, NOON + MINUTE), job.version)

    scene.queue.send = _then(scene.queue.send, be_claimed)  # type: ignore[method-assign]
    scene.sweep()

    assert State.RUNNING == scene.jobs.stored["job_1"].state


def _then(send: Callable[..., list[str]], act: Callable[[], None]) -> Callable[..., list[str]]:
    def sending(jobs: list[tuple[str, str]]) -> list[str]:
        unsent = send(jobs)
        act()
        return unsent

    return sending


# Deadlines -------------------------------------------------------------------------------------------------


def test_a_job_past_its_deadline_expires_and_is_not_sent() -> None:
    scene = Scene(parked(minutes=60, deadline=NOON + 30 * MINUTE))

    scene.clock.at = NOON + 30 * MINUTE
    swept = scene.sweep()

    job = scene.jobs.stored["job_1"]
    assert Swept(due=1, expired=1) == swept
    assert (State.EXPIRED, scene.clock.at) == (job.state, job.finished_at)
    assert "deadline_exceeded" == (job.error or JobError("", "")).type
    assert 1 == scene.events.counted("JobsExpired")
    assert "job expired" == scene.events.notes[0][0]
    assert [] == scene.sent()


def test_a_deadline_ends_a_job_though_its_group_is_blocked() -> None:
    blocked = slow_group(600, blocked_until=FOREVER)
    scene = Scene(parked(deadline=NOON + 30 * MINUTE), parked("job_2"), groups=(blocked,))

    assert Swept(due=2, left=2) == scene.sweep()
    scene.clock.at = NOON + 30 * MINUTE

    assert Swept(due=2, expired=1, left=1) == scene.sweep()


def test_a_job_that_has_started_since_is_not_expired() -> None:
    job = parked(deadline=NOON + MINUTE)
    scene = Scene(job)
    scene.clock.at = NOON + MINUTE
    scene.jobs.before_replace.append(
        lambda: scene.jobs._put(request_cancel(job, NOON))  # noqa: SLF001 - a fake's door
    )

    assert Swept(due=1, left=1) == scene.sweep()
    assert State.CANCELED == scene.jobs.stored["job_1"].state


def test_an_index_that_is_behind_expires_nothing() -> None:
    job = parked(deadline=NOON + MINUTE)
    scene = Scene(job)
    scene.clock.at = NOON + MINUTE
    scene.jobs.stored["job_1"] = request_cancel(job, NOON)

    assert Swept(due=1, left=1) == scene.sweep()
    del scene.jobs.stored["job_1"]

    assert Swept(due=1, left=1) == scene.sweep()


# Pace ------------------------------------------------------------------------------------------------------


def test_as_many_as_can_start_until_the_next_run_and_a_little_after() -> None:
    jobs = [parked(f"job_{number:03}", minutes=number / 1000) for number in range(200)]
    scene = Scene(*jobs, groups=(slow_group(60),))
    scene.clock.at = NOON + MINUTE

    swept = scene.sweep()

    assert (75, 125) == (swept.sent, swept.left)
    assert [f"job_{number:03}" for number in range(75)] == sorted(map(str, scene.sent()))


def test_nothing_is_sent_into_a_group_that_stays_blocked() -> None:
    scene = Scene(parked(), groups=(slow_group(60, blocked_until=NOON + 5 * MINUTE),))

    assert Swept(due=1, left=1) == scene.sweep()
    scene.clock.at = NOON + 5 * MINUTE - 30 * SECOND

    assert Swept(due=1, sent=1) == scene.sweep()


def test_one_groups_backlog_does_not_hold_up_another_group() -> None:
    backlog = [parked(f"job_{number:04}", minutes=0) for number in range(1_000)]
    other = parked("job_other", minutes=1, model="claude-b")
    blocked = slow_group(60, blocked_until=FOREVER)
    scene = Scene(*backlog, other, groups=(blocked, slow_group(60, "b")))
    scene.clock.at = NOON + MINUTE

    scene.sweep()

    assert ["job_other"] == scene.sent()


def test_a_model_that_no_group_is_known_for_goes_at_the_safe_rate() -> None:
    jobs = [parked(f"job_{number:03}", model="claude-new") for number in range(100)]
    scene = Scene(*jobs, groups=(slow_group(6_000), new_group("org", "x", NOON)))

    assert 75 == scene.sweep().sent


def blocked_for_weeks(number_of_jobs: int, pool_age_ms: int | None) -> Scene:
    """Jobs that are due, of a model whose only known group has spent its month."""
    jobs = [parked(f"job_{number:03}") for number in range(number_of_jobs)]
    scene = Scene(*jobs, groups=(slow_group(600, blocked_until=FOREVER),))
    scene.pool.at = None if pool_age_ms is None else NOON - pool_age_ms
    return scene


@pytest.mark.parametrize(
    ("pool_age_ms", "sent"), [(SECOND, 75), (NEW_KEYS_MS - 1, 75), (NEW_KEYS_MS, 0), (None, 0)]
)
def test_a_new_key_is_tried_though_the_known_group_stays_blocked(
    pool_age_ms: int | None, sent: int
) -> None:
    scene = blocked_for_weeks(100, pool_age_ms)

    assert sent == scene.sweep().sent


def test_a_new_key_slows_nothing_down() -> None:
    jobs = [parked(f"job_{number:03}") for number in range(200)]
    scene = Scene(*jobs, groups=(slow_group(120),))
    scene.pool.at = NOON

    assert 150 == scene.sweep().sent


def test_the_sweep_goes_on_when_the_age_of_keys_cannot_be_read() -> None:
    scene = Scene(parked(), groups=(slow_group(60),))
    scene.pool.break_down("changed_at")

    assert 1 == scene.sweep().sent
    assert ["store busy"] == scene.events.problem_names


def test_a_full_queue_gets_a_quarter() -> None:
    jobs = [parked(f"job_{number:03}") for number in range(100)]
    scene = Scene(*jobs, groups=(slow_group(60),))
    for number in range(76):
        scene.queue.post(body=str(number))

    assert 19 == scene.sweep().sent


def test_it_stops_between_steps_when_its_time_is_over() -> None:
    jobs = [parked(f"job_{number:03}") for number in range(300)]
    scene = Scene(*jobs, groups=(slow_group(6_000),))
    scene.queue.send = _then(  # type: ignore[method-assign]
        scene.queue.send, lambda: setattr(scene.clock, "at", scene.clock.at + 10 * SECOND)
    )

    assert Swept(due=300, sent=200, left=100) == scene.sweep(stop_at=NOON + 15 * SECOND)


# Jobs whose message may be lost ----------------------------------------------------------------------------


ROOMY = slow_group(6_000)


def unheard(job_id: str = "job_1", minutes: float = 0, **facts: object) -> Job:
    """A job accepted so long ago that the sweep checks it after this many minutes."""
    return a_job(job_id, created_at=NOON - WATCH_MS + int(minutes * MINUTE), **facts)


def test_a_job_whose_message_was_never_sent_is_found_and_sent() -> None:
    scene = Scene(unheard(), groups=(ROOMY,))

    assert Swept(rescued=1) == scene.sweep()
    assert ["job_1"] == scene.sent()
    assert State.QUEUED == scene.jobs.stored["job_1"].state


def test_it_is_checked_again_after_twice_the_time() -> None:
    scene = Scene(unheard(), groups=(ROOMY,))
    sweeps = []

    for _ in range(10 * 60):
        if scene.sweep().rescued:
            sweeps.append((scene.clock.at - NOON) // MINUTE)
            scene.queue.delete(scene.queue.deliver())
        scene.clock.at += MINUTE

    assert [0, 30, 90, 210, 450] == sweeps


def test_a_job_whose_worker_died_and_whose_message_is_lost_is_sent() -> None:
    dead = claim(unheard(), "dead worker", NOON - WATCH_MS, NOON - 28 * MINUTE)
    scene = Scene(dead, groups=(ROOMY,))

    assert 1 == scene.sweep().rescued


def test_a_job_that_is_running_is_left_alone_for_a_while() -> None:
    busy = claim(unheard(), "worker", NOON - WATCH_MS, NOON + 1)
    scene = Scene(busy, groups=(ROOMY,))

    assert (Swept(), []) == (scene.sweep(), scene.sent())
    scene.clock.at = NOON + WATCH_MS

    assert 1 == scene.sweep().rescued


def test_what_waits_in_a_long_queue_is_not_taken_for_lost() -> None:
    scene = Scene(unheard(), groups=(slow_group(60),))
    for number in range(76):
        scene.queue.post(body=str(number))

    assert Swept() == scene.sweep()
    scene.clock.at = NOON + QUIET_MS

    assert 1 == scene.sweep().rescued


def test_snoozed_messages_count_as_waiting_too() -> None:
    scene = Scene(unheard(), groups=(slow_group(60),))
    for number in range(76):
        scene.queue.post(body=str(number))
    scene.queue.deliver(100)

    assert Swept() == scene.sweep()


def test_a_job_that_ended_before_the_index_knew_is_not_sent() -> None:
    scene = Scene(unheard("job_1"), unheard("job_2"), groups=(ROOMY,))
    scene.jobs.stored["job_1"] = request_cancel(unheard("job_1"), NOON)
    del scene.jobs.stored["job_2"]

    assert (Swept(), []) == (scene.sweep(), scene.sent())


def test_a_parked_job_whose_new_message_is_lost_is_sent_again() -> None:
    scene = Scene(parked(), groups=(ROOMY,))
    scene.sweep()
    scene.sent()
    scene.clock.at = NOON + WATCH_MS

    assert 1 == scene.sweep().rescued


def test_a_job_with_a_message_expires_at_its_deadline_all_the_same() -> None:
    scene = Scene(a_job(deadline=NOON + MINUTE))
    scene.clock.at = NOON + MINUTE

    assert 1 == scene.sweep().expired
    assert State.EXPIRED == scene.jobs.stored["job_1"].state


def test_a_call_in_flight_may_end_after_the_deadline_and_a_dead_workers_job_expires_then() -> None:
    running = claim(a_job(deadline=NOON), "worker", NOON - MINUTE, NOON + MINUTE)
    scene = Scene(running)

    assert Swept(due=1, left=1) == scene.sweep()
    assert State.RUNNING == scene.jobs.stored["job_1"].state
    assert Swept() == scene.sweep()
    scene.clock.at = NOON + MINUTE

    assert Swept(due=1, expired=1) == scene.sweep()


def test_a_deadline_is_seen_after_a_parked_job_was_sent_however_long_the_queue() -> None:
    job = parked(minutes=20, deadline=NOON + 40 * MINUTE)
    quick = known_group("org", "a")
    scene = Scene(job, groups=(replace(quick, requests=replace(quick.requests, limit=60)),))
    for number in range(5_000):
        scene.queue.post(job_id=f"other-{number}")

    ended = None
    for minute in range(8 * 60):
        scene.clock.at = NOON + minute * MINUTE
        scene.sweep(scene.clock.at + 50 * SECOND)
        if scene.jobs.stored["job_1"].state.is_final:
            ended = minute
            break

    assert 40 == ended
    assert State.EXPIRED == scene.jobs.stored["job_1"].state
    assert 5_001 == scene.queue.backlog().visible, "it was sent, and nobody received it"


def test_a_deadline_is_seen_after_a_rescued_job_was_sent() -> None:
    scene = Scene(a_job(deadline=NOON + 3 * 60 * MINUTE), groups=(known_group("org", "a"),))
    ended = None
    for minute in range(8 * 60):
        scene.clock.at = NOON + minute * MINUTE
        if minute == 100:
            for number in range(5_000):
                scene.queue.post(job_id=f"other-{number}")
        scene.sweep(scene.clock.at + 50 * SECOND)
        if scene.jobs.stored["job_1"].state.is_final:
            ended = minute
            break

    assert 180 == ended


# Turns -----------------------------------------------------------------------------------------------------


def test_the_many_jobs_of_one_tenant_do_not_use_up_what_another_could_start() -> None:
    """Both use models of one group, in which 75 calls can start until shortly after the next run."""
    many = [parked(f"job_{n:03}", -60, tenant="large") for n in range(200)]
    few = [parked(f"job_few_{n}", -1, tenant="small") for n in range(3)]
    scene = Scene(*many, *few, groups=(slow_group(60),))

    swept = scene.sweep()

    assert 75 == swept.sent
    assert {"job_few_0", "job_few_1", "job_few_2"} <= set(scene.sent())


def test_expired_jobs_do_not_take_the_whole_run() -> None:
    late = [parked(f"job_{n:03}", 60, deadline=NOON - MINUTE, tenant="large") for n in range(300)]
    scene = Scene(*late, parked("job_due", tenant="small"))
    replace_job = scene.jobs.replace

    def slowly(job: Job, expected_version: int) -> None:
        scene.clock.at += SECOND
        replace_job(job, expected_version)

    scene.jobs.replace = slowly  # type: ignore[method-assign]

    scene.sweep(stop_at=NOON + 300 * SECOND)

    assert ["job_due"] == scene.sent()
