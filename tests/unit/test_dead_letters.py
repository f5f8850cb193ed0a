"""Dead letters are kept, and their jobs end with the reason; what ended so can be redriven."""

from dataclasses import replace

import pytest

from sluice.domain.errors import StoreBusy
from sluice.domain.jobs import (
    Attempt,
    AttemptOutcome,
    DueFor,
    Job,
    JobError,
    State,
    claim,
    finish_waiting,
    park,
    redrive,
    request_cancel,
    snooze,
    why_not_redriven,
)
from sluice.domain.limits import new_group
from sluice.domain.pricing import LedgerRow, Spend, Usage, utc_day
from sluice.domain.waits import BOOKING_MS
from sluice.ports.jobs import Params, Received
from sluice.upkeep.dead_letters import DeadLetter, Estimate, Redriver, TakeDeadLetter
from tests.fakes import (
    MINUTE,
    NOON,
    SECOND,
    FrozenClock,
    MemoryGraveyard,
    MemoryJobs,
    MemoryLedger,
    MemoryLimits,
    MemoryParams,
    RecordingEvents,
    a_job,
    price_list,
)

LEASE_END = NOON + 120 * SECOND
ANSWERED = Attempt(
    2, "claude-a", NOON, NOON + 1, AttemptOutcome.SUCCEEDED, usage=Usage(output_tokens=7), version=2
)
DEAD = JobError("dead_letter", "received 1001 times without being deleted")


class Scene:
    def __init__(self) -> None:
        self.jobs = MemoryJobs()
        self.graveyard = MemoryGraveyard()
        self.clock = FrozenClock()
        self.events = RecordingEvents()
        self.ledger = MemoryLedger()
        self.take = TakeDeadLetter(self.jobs, self.graveyard, self.ledger, self.clock, self.events)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def letter(
    job_id: str | None = "job_1", reason: str | None = None, sent_at: int = NOON
) -> DeadLetter:
    message = Received("m-1", "receipt", "{}", job_id, receive_count=1_001, sent_at=sent_at)
    return DeadLetter(message, reason)


def test_the_job_ends_as_errored_with_the_reason(scene: Scene) -> None:
    scene.jobs.add(a_job())

    scene.take(letter())

    job = scene.jobs.stored["job_1"]
    assert State.ERRORED == job.state
    assert JobError("dead_letter", "received 1001 times without being deleted") == job.error
    assert (1, 1) == (scene.events.counted("DeadLetters"), scene.events.counted("JobsErrored"))
    assert ["dead letter"] == scene.events.problem_names


def test_the_workers_own_reason_goes_first(scene: Scene) -> None:
    scene.take(letter(None, "not a message of Sluice's"))

    (kept,) = scene.graveyard.kept.values()
    assert ("m-1", "{}", "not a message of Sluice's") == (kept.message_id, kept.body, kept.reason)
    assert 0 == scene.events.counted("JobsErrored")


def test_a_letter_about_an_unknown_job_is_kept(scene: Scene) -> None:
    scene.take(letter("job_404"))

    assert 1 == len(scene.graveyard.kept)


@pytest.mark.parametrize("state", [State.EXPIRED, State.CANCELED, State.ERRORED])
def test_a_job_that_has_ended_stays_as_it_is(scene: Scene, state: State) -> None:
    ended = finish_waiting(a_job(), state, NOON)
    scene.jobs.add(ended)

    scene.take(letter())

    assert ended == scene.jobs.stored["job_1"]
    assert 1 == len(scene.graveyard.kept)


def test_the_call_of_a_job_that_has_ended_is_booked_once(scene: Scene) -> None:
    """Its worker may have died between the end of the job and the ledger; the letter is the last word of it."""
    owed = LedgerRow(
        "acme", utc_day(NOON), "job_1#1", "job_1", "claude-a", "live", None, "key-0", None,
        "worker_lost", Spend(calls=1, uncertain_calls=1),
    )  # fmt: skip
    scene.jobs.add(a_job(state=State.SUCCEEDED, attempts=(ANSWERED,), unbooked=(owed,)))

    for _ in range(2):
        assert scene.take(letter())

    assert {"job_1#1", "job_1#2"} == {row.call_id for row in scene.ledger.rows.values()}
    assert 7 == sum(spend.output_tokens for spend in scene.ledger.sums.values())


def test_a_letter_waits_while_the_worker_of_an_ended_job_may_book_its_call(scene: Scene) -> None:
    """Both would add it to the sums."""
    ended = a_job(state=State.SUCCEEDED, attempts=(ANSWERED,), finished_at=scene.clock.now())
    scene.jobs.add(ended)

    assert not scene.take(letter())
    assert not scene.graveyard.kept
    assert not scene.ledger.rows

    scene.clock.at += BOOKING_MS
    assert scene.take(letter())
    assert 1 == len(scene.ledger.rows)


def test_a_letter_comes_again_while_the_ledger_is_busy(scene: Scene) -> None:
    scene.jobs.add(a_job(state=State.SUCCEEDED, attempts=(ANSWERED,)))
    scene.ledger.fail_next("record_missing")

    with pytest.raises(StoreBusy):
        scene.take(letter())


def test_while_a_worker_is_at_the_job_its_letter_waits(scene: Scene) -> None:
    """It will end the job; or put it back, with a message that is not in the queue any more."""
    running = claim(a_job(), "worker-1", NOON, LEASE_END)
    scene.jobs.add(running)

    assert not scene.take(letter())
    assert running == scene.jobs.stored["job_1"]
    assert not scene.graveyard.kept

    scene.jobs.replace(snooze(running, "worker-1", NOON, reason="rate limited"), 2)

    assert scene.take(letter())
    assert State.ERRORED == scene.jobs.stored["job_1"].state


def test_a_dead_letter_waits_for_a_worker_that_has_claimed_its_job(scene: Scene) -> None:
    scene.jobs.add(a_job())
    running = claim(a_job(), "worker-1", NOON, LEASE_END)
    scene.jobs.before_replace.append(lambda: scene.jobs.stored.update(job_1=running))

    assert not scene.take(letter())
    assert running == scene.jobs.stored["job_1"]


def test_a_job_that_rests_is_left_to_the_sweep_that_sends_it_another_message(scene: Scene) -> None:
    parked = park(a_job(), NOON, reason="spend limit", not_before=NOON + SECOND)
    scene.jobs.add(parked)

    assert scene.take(letter())
    assert parked == scene.jobs.stored["job_1"]
    assert 1 == len(scene.graveyard.kept)


def test_a_job_whose_rest_is_over_ends(scene: Scene) -> None:
    scene.jobs.add(park(a_job(), NOON, reason="spend limit", not_before=NOON))

    assert scene.take(letter())
    assert State.ERRORED == scene.jobs.stored["job_1"].state


@pytest.mark.parametrize(("sent_at", "state"), [(NOON, State.QUEUED), (NOON + 1, State.ERRORED)])
def test_a_letter_from_before_a_redrive_does_not_end_the_job_again(
    scene: Scene, sent_at: int, state: State
) -> None:
    scene.jobs.add(redrive(finish_waiting(a_job(), State.ERRORED, NOON, DEAD), NOON))

    assert scene.take(letter(sent_at=sent_at))
    assert state == scene.jobs.stored["job_1"].state


def test_a_job_whose_worker_died_ends_with_its_attempt_lost(scene: Scene) -> None:
    scene.jobs.add(claim(a_job(), "worker-1", NOON, LEASE_END))
    scene.clock.at = LEASE_END

    scene.take(letter())

    job = scene.jobs.stored["job_1"]
    assert (State.ERRORED, AttemptOutcome.LOST) == (job.state, job.attempts[0].outcome)


def test_a_concurrently_changed_job_is_checked_again(scene: Scene) -> None:
    scene.jobs.add(a_job())
    canceled = request_cancel(a_job(), NOON)
    scene.jobs.before_replace.append(lambda: scene.jobs.stored.update(job_1=canceled))

    scene.take(letter())

    assert canceled == scene.jobs.stored["job_1"]
    assert 0 == scene.events.counted("JobsErrored")


def test_a_job_that_changes_and_still_waits_ends(scene: Scene) -> None:
    scene.jobs.add(a_job())
    snoozed = snooze(
        claim(a_job(), "worker-1", NOON, LEASE_END), "worker-1", NOON, reason="rate limited"
    )
    scene.jobs.before_replace.append(lambda: scene.jobs.stored.update(job_1=snoozed))

    scene.take(letter())

    assert State.ERRORED == scene.jobs.stored["job_1"].state


def test_a_concurrently_deleted_job_causes_no_error(scene: Scene) -> None:
    scene.jobs.add(a_job())
    scene.jobs.before_replace.append(lambda: scene.jobs.delete("job_1"))

    scene.take(letter())

    assert 1 == len(scene.graveyard.kept)


def test_a_letter_that_cannot_be_stored_is_received_again_and_its_job_is_unchanged(
    scene: Scene,
) -> None:
    scene.jobs.add(a_job())
    scene.graveyard.break_down("keep")

    with pytest.raises(StoreBusy):
        scene.take(letter())
    assert State.QUEUED == scene.jobs.stored["job_1"].state


def test_a_letter_taken_twice_changes_nothing_more(scene: Scene) -> None:
    scene.jobs.add(a_job())
    scene.take(letter())
    ended = scene.jobs.stored["job_1"]

    scene.take(letter())

    assert ended == scene.jobs.stored["job_1"]
    assert 1 == scene.events.counted("JobsErrored")


# Redriving -------------------------------------------------------------------------------------------------


class Yard:
    """Jobs that ended by a letter, and the operator's use case."""

    def __init__(self) -> None:
        self.clock = FrozenClock()
        self.jobs = MemoryJobs()
        self.params = MemoryParams()
        self.limits = MemoryLimits()
        self.graveyard = MemoryGraveyard(self.clock.now)
        self.redriver = Redriver(
            self.jobs,
            self.params,
            self.limits,
            self.graveyard,
            price_list(claude_a="10"),
            {"claude-a": "a"},
            self.clock,
        )

    def add_letter(self, name: str, reason: str = "received 1001 times", **facts: object) -> Job:
        job = finish_waiting(a_job(f"job_{name}", **facts), State.ERRORED, NOON, DEAD)
        self.jobs.add(job)
        self.params.add(Params(job.job_id, b"{}", job.request_hash))
        self.keep(name, job.job_id, reason)
        return job

    def keep(self, name: str, job_id: str | None, reason: str = "received 1001 times") -> None:
        self.graveyard.keep(Received(f"m-{name}", "", "body", job_id, receive_count=1_001), reason)
        self.clock.at += 1

    def hindrances(self) -> dict[str, str | None]:
        found = self.redriver.candidates(self.redriver.letters())
        return {each.letter.message_id: each.hindrance for each in found}


@pytest.fixture
def yard() -> Yard:
    return Yard()


def test_letters_are_found_by_words_of_their_reason_oldest_first(yard: Yard) -> None:
    yard.add_letter("b")
    yard.keep("c", None, "not a message of Sluice's")
    yard.add_letter("a")

    assert ["m-b", "m-c", "m-a"] == [each.message_id for each in yard.redriver.letters()]
    assert ["m-b", "m-a"] == [each.message_id for each in yard.redriver.letters("Received 1001")]
    assert [] == yard.redriver.letters("no such job")
    assert yard.redriver.letter("m-c") is not None
    assert yard.redriver.letter("m-d") is None


def test_what_can_be_redriven_is_redriven_and_the_sweep_finds_it(yard: Yard) -> None:
    job = yard.add_letter("1")
    (candidate,) = yard.redriver.candidates(yard.redriver.letters())
    assert candidate.hindrance is None
    assert job == yard.jobs.stored["job_1"], "looking changes nothing"

    done = yard.redriver.redrive(candidate)

    stored = yard.jobs.stored["job_1"]
    assert (None, stored) == (done.hindrance, done.job)
    assert (State.QUEUED, 1) == (stored.state, len(stored.redrives))
    assert ["job_1"] == [each.job_id for each in yard.jobs.due(DueFor.CALL, yard.clock.now(), 10)]
    assert {"m-1": "the job is queued"} == yard.hindrances()


def test_what_cannot_be_redriven_says_why(yard: Yard) -> None:
    yard.keep("foreign", None, "not a message of Sluice's")
    yard.keep("unknown", "job_404", "no such job")
    yard.add_letter("late", deadline=NOON + 1)
    lost = yard.add_letter("lost")
    del yard.params.stored[lost.job_id]
    yard.add_letter("twice")
    yard.keep("again", "job_twice")

    assert {
        "m-foreign": "not a Sluice message",
        "m-unknown": "job record not found",
        "m-late": "the deadline has passed",
        "m-lost": "the stored request has expired",
        "m-twice": None,
        "m-again": "duplicate of letter m-twice (same job)",
    } == yard.hindrances()
    for each in yard.redriver.candidates(yard.redriver.letters()):
        if each.hindrance is not None:
            assert each == yard.redriver.redrive(each)
    assert {"twice"} == {
        name.removeprefix("job_")
        for name, job in yard.jobs.stored.items()
        if why_not_redriven(job, yard.clock.now()) is None and name in yard.params.stored
    }


def test_a_job_is_redriven_once_by_the_first(yard: Yard) -> None:
    yard.add_letter("1")
    (first,) = yard.redriver.candidates(yard.redriver.letters())
    (second,) = yard.redriver.candidates(yard.redriver.letters())

    yard.redriver.redrive(first)

    assert "the job was changed concurrently; try again" == yard.redriver.redrive(second).hindrance
    assert 1 == len(yard.jobs.stored["job_1"].redrives)


def test_a_busy_table_is_reported_for_one_job_and_the_others_go_on(yard: Yard) -> None:
    yard.add_letter("1")
    yard.add_letter("2")
    candidates = yard.redriver.candidates(yard.redriver.letters())
    yard.jobs.fail_next("replace")

    busy, done = map(yard.redriver.redrive, candidates)

    assert "the jobs table is busy; retry in 2 s" == busy.hindrance
    assert done.hindrance is None
    assert {"m-1": None, "m-2": "the job is queued"} == yard.hindrances()


def test_a_deadline_that_passes_while_the_operator_thinks_is_kept(yard: Yard) -> None:
    job = yard.add_letter("1", deadline=NOON + MINUTE)
    (candidate,) = yard.redriver.candidates(yard.redriver.letters())
    yard.clock.at = NOON + MINUTE

    done = yard.redriver.redrive(candidate)

    assert "the deadline has passed" in str(done.hindrance)
    assert job == yard.jobs.stored["job_1"]


def test_the_estimate_uses_the_price_list_and_the_learned_means_of_the_group(yard: Yard) -> None:
    """35 characters are 10 tokens at 3.5 each; a token costs 1 micro-dollar in and 10 out."""
    yard.add_letter("1", max_tokens=2_000)
    yard.add_letter("short", max_tokens=20)
    yard.add_letter("other", model="claude-of-a-relay")
    guess, short, unpriced = yard.redriver.candidates(yard.redriver.letters())

    assert Estimate(10 + 10 * new_group("", "a", 0).output_estimate, 10 + 20_000) == guess.estimate
    assert Estimate(10 + 200, 10 + 200) == short.estimate
    assert (None, None) == (unpriced.hindrance, unpriced.estimate)
    assert Estimate(3, 5) == Estimate(1, 2) + Estimate(2, 3)

    yard.limits.stored["org/a"] = replace(
        new_group("org", "a", NOON), output_mean=50_000, chars_per_1000_tokens=7_000, samples=99
    )
    learned, *_ = yard.redriver.candidates(yard.redriver.letters())

    mean = yard.limits.stored["org/a"].output_estimate
    assert Estimate(5 + 10 * mean, 5 + 20_000) == learned.estimate
    assert mean < new_group("", "a", 0).output_estimate
