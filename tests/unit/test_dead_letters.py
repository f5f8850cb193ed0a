"""Dead letters are kept, and their jobs end with the reason."""

import pytest

from sluice.dead_letters import DeadLetter, TakeDeadLetter
from sluice.domain import jobs as life
from sluice.domain.errors import StoreBusy
from sluice.domain.jobs import AttemptOutcome, JobError, State
from sluice.ports import Received
from tests.fakes import NOON, SECOND, FrozenClock, MemoryJobs, RecordingEvents, a_job

LEASE_END = NOON + 120 * SECOND


class Graveyard:
    """Keeps letters; `busy` makes it refuse."""

    def __init__(self) -> None:
        self.kept: list[tuple[Received, str]] = []
        self.busy = False

    def keep(self, message: Received, reason: str) -> None:
        if self.busy:
            raise StoreBusy("the data bucket")
        self.kept.append((message, reason))


class Scene:
    def __init__(self) -> None:
        self.jobs = MemoryJobs()
        self.graveyard = Graveyard()
        self.clock = FrozenClock()
        self.events = RecordingEvents()
        self.take = TakeDeadLetter(self.jobs, self.graveyard, self.clock, self.events)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def letter(job_id: str | None = "job_1", reason: str | None = None) -> DeadLetter:
    return DeadLetter(Received("m-1", "receipt", "{}", job_id, receive_count=1_001), reason)


def test_the_job_ends_as_errored_with_the_reason(scene: Scene) -> None:
    scene.jobs.add(a_job())

    scene.take(letter())

    job = scene.jobs.stored["job_1"]
    assert State.ERRORED == job.state
    assert JobError("dead_letter", "received 1001 times without an end") == job.error
    assert (1, 1) == (scene.events.counted("DeadLetters"), scene.events.counted("JobsErrored"))
    assert ["dead letter"] == scene.events.problem_names


def test_the_workers_own_reason_goes_first(scene: Scene) -> None:
    scene.take(letter(None, "not a message of Sluice's"))

    assert [(letter(None).message, "not a message of Sluice's")] == scene.graveyard.kept
    assert 0 == scene.events.counted("JobsErrored")


def test_a_letter_about_an_unknown_job_is_kept(scene: Scene) -> None:
    scene.take(letter("job_404"))

    assert 1 == len(scene.graveyard.kept)


@pytest.mark.parametrize("state", [State.EXPIRED, State.CANCELED, State.ERRORED])
def test_a_job_that_has_ended_stays_as_it_is(scene: Scene, state: State) -> None:
    ended = life.finish_waiting(a_job(), state, NOON)
    scene.jobs.add(ended)

    scene.take(letter())

    assert ended == scene.jobs.stored["job_1"]
    assert 1 == len(scene.graveyard.kept)


def test_a_job_at_work_is_left_to_its_worker(scene: Scene) -> None:
    running = life.claim(a_job(), "worker-1", NOON, LEASE_END)
    scene.jobs.add(running)

    scene.take(letter())

    assert running == scene.jobs.stored["job_1"]


def test_a_job_whose_worker_died_ends_with_its_attempt_lost(scene: Scene) -> None:
    scene.jobs.add(life.claim(a_job(), "worker-1", NOON, LEASE_END))
    scene.clock.at = LEASE_END

    scene.take(letter())

    job = scene.jobs.stored["job_1"]
    assert (State.ERRORED, AttemptOutcome.LOST) == (job.state, job.attempts[0].outcome)


def test_a_job_that_changes_meanwhile_is_looked_at_again(scene: Scene) -> None:
    scene.jobs.add(a_job())
    canceled = life.request_cancel(a_job(), NOON)
    scene.jobs.before_replace.append(lambda: scene.jobs.stored.update(job_1=canceled))

    scene.take(letter())

    assert canceled == scene.jobs.stored["job_1"]
    assert 0 == scene.events.counted("JobsErrored")


def test_a_job_that_changes_and_still_waits_ends(scene: Scene) -> None:
    scene.jobs.add(a_job())
    snoozed = life.snooze(
        life.claim(a_job(), "worker-1", NOON, LEASE_END), "worker-1", NOON, reason="rate limited"
    )
    scene.jobs.before_replace.append(lambda: scene.jobs.stored.update(job_1=snoozed))

    scene.take(letter())

    assert State.ERRORED == scene.jobs.stored["job_1"].state


def test_a_job_that_vanishes_meanwhile_is_no_trouble(scene: Scene) -> None:
    scene.jobs.add(a_job())
    scene.jobs.before_replace.append(lambda: scene.jobs.delete("job_1"))

    scene.take(letter())

    assert 1 == len(scene.graveyard.kept)


def test_a_letter_that_cannot_be_kept_comes_again_with_its_job_untouched(scene: Scene) -> None:
    scene.jobs.add(a_job())
    scene.graveyard.busy = True

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
