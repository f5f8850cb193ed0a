"""The life of a job: every transition there is, every other refused, and what each leaves in the record."""

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Final

import pytest

from sluice.adapters import job_records
from sluice.adapters.s3 import MOST_INLINE_BYTES
from sluice.domain.errors import IllegalTransition, LeaseLost
from sluice.domain.jobs import (
    FEW,
    MOST_REMEMBERED,
    TRANSITIONS,
    AttemptOutcome,
    DueFor,
    Job,
    JobError,
    Lease,
    Redrive,
    Result,
    Snooze,
    State,
    Step,
    cancel_running,
    claim,
    derived_job_id,
    due,
    fall_back,
    finish_waiting,
    give_up,
    most_in_flight,
    next_step,
    park,
    random_job_id,
    redrive,
    renew,
    request_cancel,
    retry,
    snooze,
    succeed,
    why_not_redriven,
    without_loss,
)
from sluice.domain.pricing import Usage
from tests.fakes import MINUTE, NOON, SECOND, a_job

LATER = NOON + 10 * SECOND
LEASE_END = NOON + 120 * SECOND
AFTER_LEASE = LEASE_END + 1
DEAD = JobError("dead_letter", "received 1001 times without being deleted")
BOOM = JobError("api_error", "boom", 500)
USED = Usage(input_tokens=7, output_tokens=3)


def claimed(job: Job | None = None, owner: str = "worker-1", now: int = NOON) -> Job:
    return claim(job or a_job(), owner, now, now + 120 * SECOND)


def succeeded(job: Job) -> Job:
    return succeed(
        job,
        "worker-1",
        LATER,
        result=Result(inline=b"x"),
        usage=USED,
        cost_micro_usd=37,
        request_id="req_1",
    )


ALLOWED = {(source, rule.target) for rule in TRANSITIONS.values() for source in rule.sources}

# Every way there is to change a job, by the state it starts in.
FROM_QUEUED: dict[State, Callable[[Job], Job]] = {
    State.RUNNING: lambda job: claimed(job, now=LATER),
    State.CANCELED: lambda job: request_cancel(job, LATER),
    State.EXPIRED: lambda job: finish_waiting(job, State.EXPIRED, LATER),
    State.ERRORED: lambda job: finish_waiting(job, State.ERRORED, LATER, BOOM),
}
FROM_RUNNING: dict[State, Callable[[Job], Job]] = {
    State.RUNNING: lambda job: renew(job, "worker-1", AFTER_LEASE),
    State.QUEUED: lambda job: snooze(job, "worker-1", LATER, reason="rate limited"),
    State.SUCCEEDED: succeeded,
    State.ERRORED: lambda job: give_up(job, "worker-1", LATER, error=BOOM),
    State.CANCELED: lambda job: cancel_running(job, "worker-1", LATER),
    State.EXPIRED: lambda job: finish_waiting(job, State.EXPIRED, AFTER_LEASE),
}
FROM_QUEUED[State.QUEUED] = lambda job: park(
    job, LATER, reason="spend limit", not_before=LATER + 3_600 * SECOND
)
WAYS: dict[State, dict[State, Callable[[Job], Job]]] = {
    State.QUEUED: FROM_QUEUED,
    State.RUNNING: FROM_RUNNING,
    State.ERRORED: {State.QUEUED: lambda job: redrive(job, LATER)},
}
IN_STATE: dict[State, Job] = {
    State.QUEUED: a_job(),
    State.RUNNING: claimed(),
    State.SUCCEEDED: succeeded(claimed()),
    State.ERRORED: finish_waiting(a_job(), State.ERRORED, LATER, DEAD),
    State.CANCELED: request_cancel(a_job(), LATER),
    State.EXPIRED: finish_waiting(a_job(), State.EXPIRED, LATER),
}


@pytest.mark.parametrize(
    ("before", "after"),
    sorted(ALLOWED),
)
def test_every_transition_can_be_taken(before: State, after: State) -> None:
    job = IN_STATE[before]

    moved = WAYS[before][after](job)

    assert after == moved.state
    assert job.version + 1 == moved.version
    assert after.is_final == (moved.finished_at is not None)


@pytest.mark.parametrize(
    ("before", "after"),
    [(a, b) for a, b in product(State, State) if (a, b) not in ALLOWED and b is not State.QUEUED],
)
def test_every_other_transition_is_refused(before: State, after: State) -> None:
    job = IN_STATE[before]

    if after is State.RUNNING:
        with pytest.raises(IllegalTransition, match=f"is {before} and cannot become running"):
            claim(job, "worker-2", AFTER_LEASE, AFTER_LEASE + 1)
    elif after is State.SUCCEEDED:
        with pytest.raises(LeaseLost):
            succeeded(job)
    else:
        with pytest.raises(IllegalTransition, match=f"cannot become {after}"):
            finish_waiting(job, after, AFTER_LEASE)


def test_a_waiting_job_is_not_queued_again() -> None:
    with pytest.raises(LeaseLost):
        snooze(a_job(), "worker-1", NOON, reason="rate limited")


@pytest.mark.parametrize("state", State)
def test_final_states_have_no_way_out_but_an_operators(state: State) -> None:
    final = {State.SUCCEEDED, State.ERRORED, State.CANCELED, State.EXPIRED}
    ways_out = {after for before, after in ALLOWED if before is state}
    an_operators = {State.QUEUED} if state is State.ERRORED else set()

    assert (state in final) == state.is_final == (ways_out == an_operators)


# Redriving -------------------------------------------------------------------------------------------------


def test_a_record_fits_into_an_item_however_often_it_fails_and_is_redriven() -> None:
    """An item of DynamoDB has at most 400 KiB, an answer included; upstream's text 2,000 characters of four bytes."""
    long = JobError("api_error", "\U0001f600" * 2_000, 500)
    dead, job = replace(long, type="dead_letter"), a_job()
    for number in range(60):
        for _ in range(20):
            job = retry(claimed(job, now=NOON), "worker-1", NOON, error=long)
        job = redrive(finish_waiting(job, State.ERRORED, NOON, dead), NOON)
        assert (number + 1) * 20 == job.attempts[-1].number, "the numbers go on"
    job = finish_waiting(claimed(job), State.ERRORED, AFTER_LEASE, long)

    item = json.dumps(job_records.encode(job, 30), ensure_ascii=False)
    assert len(item.encode()) < 400 * 1024 - MOST_INLINE_BYTES
    assert long == job.attempts[-2].error, "the newest texts are whole"
    assert MOST_REMEMBERED >= len(job.redrives)
    assert MOST_REMEMBERED + 1 >= len(job.attempts)


def test_a_redriven_job_is_as_new_and_keeps_its_past() -> None:
    job = a_job(fallback_models=("claude-b",))
    for owner in ("worker-1", "worker-2"):
        job = retry(claimed(job, owner), owner, LATER, error=BOOM)
    job = fall_back(claimed(job), "worker-1", LATER, reason="overloaded")
    dead = finish_waiting(job, State.ERRORED, LATER, DEAD)

    redriven = redrive(dead, AFTER_LEASE)

    assert (State.QUEUED, 0, "claude-a") == (
        redriven.state,
        redriven.attempts_used,
        redriven.current_model,
    )
    assert [BOOM, BOOM] == [attempt.error for attempt in redriven.attempts]
    assert (Redrive(AFTER_LEASE, DEAD),) == redriven.redrives
    assert (None, None) == (redriven.error, redriven.finished_at)
    assert (DueFor.CALL, AFTER_LEASE) == due(redriven), "the sweep sends it"
    assert Step.RUN == next_step(redriven, AFTER_LEASE, 2)
    assert 3 == claimed(redriven, now=AFTER_LEASE).attempts[-1].number


def test_each_redrive_is_counted() -> None:
    job = a_job()
    for at in (LATER, AFTER_LEASE):
        job = redrive(finish_waiting(job, State.ERRORED, at, DEAD), at)

    assert [LATER, AFTER_LEASE] == [each.at for each in job.redrives]


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (a_job(), "the job is queued"),
        (claimed(), "the job is running"),
        (succeeded(claimed()), "the job is succeeded"),
        (finish_waiting(a_job(), State.ERRORED, LATER), "the job is errored"),
        (
            give_up(claimed(), "worker-1", LATER, error=BOOM),
            "the job ended with api_error, not because of a dead letter",
        ),
        (
            finish_waiting(a_job(cancel_requested=True), State.ERRORED, LATER, DEAD),
            "the job was canceled by its caller",
        ),
        (
            finish_waiting(a_job(deadline=LATER), State.ERRORED, NOON, DEAD),
            "the deadline has passed",
        ),
    ],
)
def test_what_did_not_end_by_its_letter_is_not_redriven(job: Job, reason: str) -> None:
    assert reason == why_not_redriven(job, LATER)
    with pytest.raises(IllegalTransition, match="redriven"):
        redrive(job, LATER)


# The lease -------------------------------------------------------------------------------------------------


def test_a_claim_counts_an_attempt_so_that_a_crash_counts() -> None:
    job = claimed()

    assert 1 == job.attempts_used
    (attempt,) = job.attempts
    assert (1, "claude-a", NOON, None) == (
        attempt.number,
        attempt.model,
        attempt.at,
        attempt.outcome,
    )
    assert NOON == job.started_at


def test_a_lease_is_not_taken_while_it_holds() -> None:
    with pytest.raises(IllegalTransition, match="leased to worker-1"):
        claim(claimed(), "worker-2", LEASE_END - 1, AFTER_LEASE)


def test_a_takeover_closes_the_open_attempt_as_lost() -> None:
    taken_over = claim(claimed(), "worker-2", LEASE_END, LEASE_END + 1)

    lost, second = taken_over.attempts
    assert (AttemptOutcome.LOST, LEASE_END) == (lost.outcome, lost.ended_at)
    assert lost.error is not None
    assert "may have been billed" in lost.error.message
    assert (2, None) == (second.number, second.outcome)
    # Whatever killed that worker, it need not have been this job.
    assert 1 == taken_over.attempts_used
    assert NOON == taken_over.started_at


@pytest.mark.parametrize(
    "change",
    [
        lambda job: renew(job, "worker-1", AFTER_LEASE),
        lambda job: snooze(job, "worker-1", LATER, reason="rate limited"),
        lambda job: fall_back(job, "worker-1", LATER, reason="overloaded"),
        lambda job: retry(job, "worker-1", LATER, error=BOOM),
        succeeded,
        lambda job: give_up(job, "worker-1", LATER, error=BOOM),
        lambda job: cancel_running(job, "worker-1", LATER),
    ],
    ids=["renew", "snooze", "fall back", "retry", "succeed", "give up", "cancel"],
)
def test_a_job_that_was_taken_over_is_not_changed_by_its_old_worker(
    change: Callable[[Job], Job],
) -> None:
    taken_over = claim(claimed(), "worker-2", LEASE_END, LEASE_END + 1)

    with pytest.raises(LeaseLost) as lost:
        change(taken_over)
    assert "job_1" == lost.value.job_id


def test_a_renewal_extends_only_the_lease() -> None:
    job = claimed()

    renewed = renew(job, "worker-1", AFTER_LEASE)

    assert replace(job, lease=Lease("worker-1", AFTER_LEASE), version=3) == renewed


# Snooze, retry, fall back ----------------------------------------------------------------------------------


def test_a_snooze_gives_the_attempt_back() -> None:
    job = snooze(claimed(), "worker-1", LATER, reason="rate limited", not_before=AFTER_LEASE)

    assert (State.QUEUED, 0, (), 1) == (job.state, job.attempts_used, job.attempts, job.snoozes)
    assert Snooze(LATER, "rate limited") == job.last_snooze
    assert (None, AFTER_LEASE) == (job.lease, job.not_before)


def test_snoozes_in_any_number_use_no_attempt() -> None:
    job = a_job()
    for turn in range(100):
        now = NOON + turn * SECOND
        job = snooze(claimed(job, now=now), "worker-1", now, reason="overloaded")

    assert (0, 100) == (job.attempts_used, job.snoozes)
    assert Step.RUN == next_step(job, LATER, max_attempts=1)


def test_a_snooze_keeps_the_attempts_of_before() -> None:
    failed = retry(claimed(), "worker-1", LATER, error=BOOM)

    snoozed = snooze(claimed(failed, now=LATER), "worker-1", LATER, reason="rate limited")

    assert failed.attempts == snoozed.attempts
    assert 1 == snoozed.attempts_used


def test_a_retry_uses_the_attempt_and_keeps_its_error() -> None:
    job = retry(
        claimed(),
        "worker-1",
        LATER,
        error=BOOM,
        not_before=AFTER_LEASE,
        request_id="req_1",
        usage=USED,
        cost_micro_usd=5,
        full_window=True,
    )

    assert (State.QUEUED, 1, 0) == (job.state, job.attempts_used, job.snoozes)
    (attempt,) = job.attempts
    assert (AttemptOutcome.RETRY, BOOM, "req_1", USED, 5, LATER) == (
        attempt.outcome,
        attempt.error,
        attempt.request_id,
        attempt.usage,
        attempt.cost_micro_usd,
        attempt.ended_at,
    )
    assert (5, True, AFTER_LEASE) == (job.cost_micro_usd, job.full_window, job.not_before)


def test_errors_of_attempts_stand_oldest_first() -> None:
    job = a_job()
    for status in (500, 502, 504):
        failure = JobError("api_error", "boom", status)
        job = retry(claimed(job), "worker-1", NOON, error=failure)

    assert [500, 502, 504] == [attempt.error and attempt.error.status for attempt in job.attempts]
    assert [1, 2, 3] == [attempt.number for attempt in job.attempts]


def test_a_full_window_once_needed_stays_needed() -> None:
    job = retry(claimed(), "worker-1", NOON, error=BOOM, full_window=True)

    again = retry(claimed(job), "worker-1", NOON, error=BOOM)

    assert again.full_window


def test_falling_back_moves_to_the_next_model_without_an_attempt() -> None:
    job = claimed(a_job(fallback_models=("claude-b", "claude-c")))

    moved = fall_back(job, "worker-1", LATER, reason="overloaded")

    assert ("claude-b", 0, True) == (moved.current_model, moved.attempts_used, moved.has_fallback)
    last = fall_back(claimed(moved), "worker-1", LATER, reason="overloaded")
    assert ("claude-c", False) == (last.current_model, last.has_fallback)
    assert "claude-a" == last.model


def test_a_refusal_moves_to_the_next_model_and_uses_the_attempt_it_paid_for() -> None:
    job = claimed(a_job(fallback_models=("claude-b",)))

    moved = retry(
        job,
        "worker-1",
        LATER,
        error=JobError("refusal", "refused"),
        outcome=AttemptOutcome.FALLBACK,
        usage=USED,
        cost_micro_usd=9,
    )

    assert ("claude-b", 1, 9) == (moved.current_model, moved.attempts_used, moved.cost_micro_usd)
    assert AttemptOutcome.FALLBACK == moved.attempts[0].outcome


# Endings ---------------------------------------------------------------------------------------------------


def test_a_success_adds_up_the_cost_of_all_attempts() -> None:
    failed = retry(claimed(), "worker-1", NOON, error=BOOM, usage=USED, cost_micro_usd=5)

    job = succeeded(claimed(failed))

    assert (State.SUCCEEDED, 5 + 37, USED) == (job.state, job.cost_micro_usd, job.usage)
    assert (Result(inline=b"x"), None, None) == (job.result, job.error, job.lease)
    assert AttemptOutcome.SUCCEEDED == job.attempts[-1].outcome


def test_giving_up_keeps_the_error_on_job_and_attempt() -> None:
    job = give_up(claimed(), "worker-1", LATER, error=BOOM, request_id="req_1")

    assert (State.ERRORED, BOOM, LATER) == (job.state, job.error, job.finished_at)
    assert (AttemptOutcome.GIVE_UP, BOOM) == (job.attempts[0].outcome, job.attempts[0].error)


def test_a_job_whose_worker_died_ends_with_its_attempt_lost() -> None:
    job = finish_waiting(claimed(), State.ERRORED, AFTER_LEASE, BOOM)

    assert AttemptOutcome.LOST == job.attempts[0].outcome
    assert BOOM == job.error


def test_a_running_job_is_not_ended_from_outside() -> None:
    with pytest.raises(IllegalTransition, match="leased to worker-1"):
        finish_waiting(claimed(), State.EXPIRED, LATER)


# Cancel ----------------------------------------------------------------------------------------------------


def test_a_waiting_job_is_canceled_at_once() -> None:
    job = request_cancel(a_job(), LATER)

    assert (State.CANCELED, True, LATER) == (job.state, job.cancel_requested, job.finished_at)


def test_a_running_job_is_only_asked_to_stop() -> None:
    job = request_cancel(claimed(), LATER)

    assert (State.RUNNING, True, 3) == (job.state, job.cancel_requested, job.version)
    assert claimed().lease == job.lease


def test_a_job_whose_worker_died_is_canceled_at_once() -> None:
    job = request_cancel(claimed(), AFTER_LEASE)

    assert State.CANCELED == job.state
    assert AttemptOutcome.LOST == job.attempts[0].outcome


@pytest.mark.parametrize("state", [state for state in State if state.is_final])
def test_a_final_job_stays_as_it_is(state: State) -> None:
    job = IN_STATE[state]

    assert job is request_cancel(job, LATER)


def test_asking_twice_changes_nothing() -> None:
    asked = request_cancel(claimed(), LATER)

    assert asked is request_cancel(asked, LATER)


def test_a_canceled_call_ends_the_job_and_keeps_what_it_cost() -> None:
    asked = request_cancel(claimed(), LATER)

    job = cancel_running(asked, "worker-1", LATER, usage=USED, cost_micro_usd=4)

    assert (State.CANCELED, 4, USED) == (job.state, job.cost_micro_usd, job.usage)
    assert AttemptOutcome.CANCELED == job.attempts[0].outcome


def test_an_answer_that_crossed_a_cancel_is_kept() -> None:
    """The call was made and paid."""
    asked = request_cancel(claimed(), LATER)

    assert State.SUCCEEDED == succeeded(asked).state


# What to do with a message ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "step"),
    [
        (a_job(), Step.RUN),
        # Final: whatever else is written on it.
        (IN_STATE[State.SUCCEEDED], Step.DROP),
        (replace(IN_STATE[State.ERRORED], cancel_requested=True), Step.DROP),
        # Leased: no other worker changes it, even if it is canceled or late.
        (claimed(), Step.BUSY),
        (replace(claimed(), cancel_requested=True, deadline=NOON), Step.BUSY),
        # The lease ran out: it is there to be taken, by the rules for a waiting job.
        (replace(claimed(), lease=Lease("worker-1", LATER)), Step.RUN),
        (
            replace(claimed(), lease=Lease("worker-1", LATER), cancel_requested=True),
            Step.CANCEL,
        ),
        # A cancel outranks a deadline, a deadline the attempts, the attempts a wait.
        (a_job(cancel_requested=True, deadline=NOON, attempts_used=5), Step.CANCEL),
        (a_job(deadline=LATER, attempts_used=5), Step.EXPIRE),
        (a_job(attempts_used=5, not_before=AFTER_LEASE), Step.USED_UP),
        (a_job(attempts_used=4, not_before=AFTER_LEASE), Step.EARLY),
        (a_job(attempts_used=4, not_before=LATER, deadline=LATER + 1), Step.RUN),
    ],
)
def test_what_a_message_asks_for(job: Job, step: Step) -> None:
    assert step == next_step(job, LATER, max_attempts=5)


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        # Parked: wanted at its time, or earlier to end it.
        (a_job(not_before=AFTER_LEASE), (DueFor.CALL, AFTER_LEASE)),
        (a_job(not_before=AFTER_LEASE, deadline=LATER), (DueFor.CALL, LATER)),
        (a_job(not_before=LATER, deadline=AFTER_LEASE), (DueFor.CALL, LATER)),
        # Its message will bring it on; checked long after the last that is known of it.
        (a_job(), (DueFor.CHECK, NOON + 30 * MINUTE)),
        (a_job(created_at=NOON + 1), (DueFor.CHECK, NOON + 45 * MINUTE)),
        (claimed(now=LATER), (DueFor.CHECK, NOON + 45 * MINUTE)),
        (a_job(created_at=NOON - 60 * MINUTE), (DueFor.CHECK, NOON - 30 * MINUTE)),
        (
            snooze(claimed(), "worker-1", NOON + 5 * MINUTE, reason="overloaded"),
            (DueFor.CHECK, NOON + 45 * MINUTE),
        ),
        (
            retry(claimed(), "worker-1", NOON + 20 * MINUTE, error=BOOM),
            (DueFor.CHECK, NOON + 60 * MINUTE),
        ),
        # A deadline is kept whether or not its message comes.
        (a_job(deadline=LATER), (DueFor.CALL, LATER)),
        (replace(claimed(), deadline=LATER), (DueFor.CALL, LATER)),
        (a_job(deadline=NOON + 60 * MINUTE), (DueFor.CHECK, NOON + 30 * MINUTE)),
        # Ended.
        (replace(IN_STATE[State.CANCELED], not_before=LATER), None),
        (IN_STATE[State.SUCCEEDED], None),
    ],
)
def test_when_the_sweep_checks_a_job(job: Job, expected: tuple[DueFor, int] | None) -> None:
    assert expected == due(job)


def test_most_writes_of_a_job_leave_its_place_among_the_due_jobs_alone() -> None:
    """An entry that moves costs two writes more."""
    accepted = a_job(created_at=NOON + MINUTE)
    running = claimed(accepted, now=NOON + 2 * MINUTE)
    renewed = renew(running, "worker-1", NOON + 6 * MINUTE)

    assert due(accepted) == due(running) == due(renewed)


# Ids -------------------------------------------------------------------------------------------------------


def test_a_repeat_of_a_submit_finds_the_same_id() -> None:
    first = derived_job_id("acme", "custom_id", "row-1")

    assert first == derived_job_id("acme", "custom_id", "row-1")
    assert first.startswith("job_")
    assert 36 == len(first)


def test_tenants_scopes_and_names_never_share_an_id() -> None:
    ids = {
        derived_job_id(tenant, scope, name)
        for tenant, scope, name in product(
            ("acme", "acmekey"), ("key", "custom_id"), ("row-1", "row-2")
        )
    }

    assert 8 == len(ids)


def test_a_fresh_id_shows_its_random_bytes() -> None:
    assert "job_" + "0a" * 16 == random_job_id(b"\x0a" * 16)


def test_a_canceled_job_whose_worker_died_ends_at_the_next_cancel() -> None:
    flagged = request_cancel(claimed(), LATER)
    assert State.RUNNING == flagged.state

    assert flagged is request_cancel(flagged, LATER)
    assert State.CANCELED == request_cancel(flagged, AFTER_LEASE).state


def test_a_running_job_is_not_parked() -> None:
    with pytest.raises(IllegalTransition, match="leased to worker-1"):
        park(claimed(), LEASE_END - 1, reason="spend limit", not_before=AFTER_LEASE)


def test_a_job_whose_worker_died_can_be_parked() -> None:
    parked = park(claimed(), AFTER_LEASE, reason="spend limit", not_before=2 * AFTER_LEASE)

    assert (State.QUEUED, None) == (parked.state, parked.lease)
    assert AttemptOutcome.LOST == parked.attempts[-1].outcome


def test_a_job_with_a_live_lease_is_not_parked() -> None:
    with pytest.raises(IllegalTransition, match="leased to worker-1 and cannot become queued"):
        park(claimed(), LATER, reason="spend limit", not_before=AFTER_LEASE)


def test_an_answer_that_broke_off_for_overload_counts_its_cost_wherever_the_job_goes() -> None:
    job = claimed(a_job(fallback_models=("claude-b",)))

    assert (
        40 == snooze(job, "worker-1", LATER, reason="overloaded", cost_micro_usd=40).cost_micro_usd
    )
    moved = fall_back(job, "worker-1", LATER, reason="overloaded", cost_micro_usd=40)
    assert ("claude-b", 40, 0) == (moved.current_model, moved.cost_micro_usd, moved.attempts_used)


# Lost workers ------------------------------------------------------------------------------------------------


def lost(job: Job, times: int, *, alone: bool = False) -> Job:
    """Return the job after this many workers died with it, the last one not yet noticed."""
    for _ in range(times):
        at = NOON + len(job.attempts) * MINUTE
        job = claim(job, f"dead-{len(job.attempts)}", at, at, alone=alone)
    return job


LATE: Final = NOON + 60 * MINUTE


@pytest.mark.parametrize(
    ("beside_others", "most"), [(0, None), (1, None), (2, None), (3, FEW), (4, 1), (9, 1)]
)
def test_a_job_is_kept_apart_the_more_workers_it_has_lost(
    beside_others: int, most: int | None
) -> None:
    assert most == most_in_flight(lost(a_job(), beside_others))


def test_workers_lost_beside_others_use_no_attempt() -> None:
    job = lost(a_job(), 30)

    assert Step.RUN == next_step(job, LATE, 1)
    assert 0 == without_loss(job, LATE).attempts_used
    assert 30 == len(without_loss(job, LATE).attempts)


@pytest.mark.parametrize(("alone", "step"), [(2, Step.RUN), (3, Step.KILLER), (4, Step.KILLER)])
def test_a_job_that_loses_its_workers_while_it_runs_alone_ends_errored(
    alone: int, step: Step
) -> None:
    job = lost(lost(a_job(), 4), alone, alone=True)

    assert step == next_step(job, LATE, 5)
    assert alone == without_loss(job, LATE).attempts_used


def test_workers_lost_before_a_redrive_are_not_held_against_a_job() -> None:
    ended = finish_waiting(
        lost(lost(a_job(), 4), 2, alone=True), State.ERRORED, LATE, JobError("dead_letter", "")
    )

    job = redrive(ended, LATE + 1)

    assert most_in_flight(job) is None
    assert Step.RUN == next_step(job, LATE + 1, 5)
