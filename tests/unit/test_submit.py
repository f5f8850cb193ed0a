"""Intake: stored first, then sent; a repeat finds what the first time made."""

import json
from collections.abc import Iterator, Sequence
from itertools import count
from threading import Lock
from typing import Any

import pytest

from sluice.domain.errors import Conflict, InvalidRequest, SluiceError, StoreBusy, Unexpected
from sluice.domain.jobs import (
    DueFor,
    Job,
    State,
    claim,
    derived_job_id,
    finish_waiting,
    request_cancel,
)
from sluice.domain.limits import SAFE_START, block, new_group
from sluice.domain.params import IMAGE_CHARS, MOST_MEDIA_CHARS, NEWEST_VERSION
from sluice.intake.start_estimate import MOST_AGE_MS, StartEstimate
from sluice.intake.submit import (
    PARALLEL_WRITES,
    START_WITHIN_MS,
    Accepted,
    Outcome,
    Rejected,
    Sender,
    Submission,
    Submit,
)
from sluice.ports.jobs import Params
from tests.fakes import (
    MINUTE,
    NOON,
    SECOND,
    FrozenClock,
    MemoryJobs,
    MemoryLimits,
    MemoryParams,
    MemoryQueue,
    RecordingEvents,
)

ACME = Sender("acme")


class Killed(BaseException):
    """The function's environment has ended."""


class Intake:
    def __init__(self, jobs: Any = None, params: MemoryParams | None = None) -> None:
        self.journal: list[str] = []
        self.clock = FrozenClock()
        self.jobs = MemoryJobs(journal=self.journal) if jobs is None else jobs
        self.params = MemoryParams(self.journal) if params is None else params
        self.queue = MemoryQueue(self.clock.now, self.journal)
        self.events = RecordingEvents()
        numbers: Iterator[int] = count(1)
        self.submit = Submit(
            self.jobs,
            self.params,
            self.queue,
            self.clock,
            lambda size: next(numbers).to_bytes(size, "big"),
            self.events,
        )

    def __call__(
        self, *submissions: Submission | SluiceError, sender: Sender = ACME
    ) -> list[Outcome]:
        return self.submit(submissions, sender)

    def one(self, submission: Submission, sender: Sender = ACME) -> Job:
        (outcome,) = self(submission, sender=sender)
        return accepted(outcome)

    @property
    def sent(self) -> list[str | None]:
        return [message.job_id for message in self.queue.deliver()]


@pytest.fixture
def intake() -> Intake:
    return Intake()


def params(text: str = "Two and two?", **more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": text}
    return {"model": "claude-a", "max_tokens": 64, "messages": [message]} | more


def media(media_type: str, length: int) -> dict[str, Any]:
    return {"source": {"type": "base64", "media_type": media_type, "data": "A" * length}}


def ask(text: str = "Two and two?", **facts: Any) -> Submission:
    return Submission(params(text), **facts)


def accepted(outcome: Outcome) -> Job:
    assert isinstance(outcome, Accepted)
    return outcome.job


def rejected(outcome: Outcome) -> SluiceError:
    assert isinstance(outcome, Rejected)
    return outcome.error


# One job ---------------------------------------------------------------------------------------------------


def test_a_job_is_stored_request_first_and_then_sent(intake: Intake) -> None:
    """A job on record always has its request; a message always has its job."""
    job = intake.one(ask())

    assert [
        f"the params table: add {job.job_id}",
        f"the jobs table: add {job.job_id}",
        f"the jobs queue: send {job.job_id}",
    ] == intake.journal
    assert "acme" == intake.queue.tenants[job.job_id]
    assert 1 == intake.events.counted("JobsAccepted")


def test_a_job_knows_what_was_asked_for(intake: Intake) -> None:
    job = intake.one(
        ask(
            custom_id="row-1",
            deadline=NOON + MINUTE,
            fallback_models=("claude-b",),
            metadata={"run": "7"},
        ),
        Sender("acme", anthropic_version="2023-06-01", anthropic_beta="files-api"),
    )

    assert intake.jobs.stored[job.job_id] == job
    assert (State.QUEUED, "claude-a", 64, NOON) == (
        job.state,
        job.model,
        job.max_tokens,
        job.created_at,
    )
    assert ("row-1", NOON + MINUTE, ("claude-b",), {"run": "7"}) == (
        job.custom_id,
        job.deadline,
        job.fallback_models,
        job.metadata,
    )
    assert ("2023-06-01", "files-api") == (job.anthropic_version, job.anthropic_beta)


def test_the_newest_version_is_used_where_none_is_named(intake: Intake) -> None:
    assert NEWEST_VERSION == intake.one(ask()).anthropic_version


def test_the_request_is_kept_as_it_is(intake: Intake) -> None:
    request = params("Grüße, 世界", temperature=0.5, unheard_of={"deep": [1, None]})

    job = intake.one(Submission(request))

    assert request == json.loads(intake.params.stored[job.job_id].body)
    assert list(request) == list(json.loads(intake.params.stored[job.job_id].body))


@pytest.mark.parametrize(
    ("request_", "chars"),
    [
        (params("x" * 100), 100 + len("user")),
        (params("x", system="y" * 50), 1 + 4 + 50),
        (params("x", tools=[{"name": "z" * 10}]), 1 + 4 + 10),
        # Numbers and booleans are about a token's worth of nothing.
        (params("x", tools=[{"strict": True, "max": 5}]), 1 + 4 + 2),
        # Text is text, whatever it is called.
        (params("x", system=[{"source": {"type": "text", "data": "A" * 2_000}}]), 1 + 4 + 2_004),
        # An image has as many tokens as any other, a document by its size.
        (params("x", system=[media("image/png", 2_000)]), 1 + 4 + IMAGE_CHARS),
        (params("x", system=[media("image/png", 4_000_000)]), 1 + 4 + IMAGE_CHARS),
        (params("x", system=[media("application/pdf", 2_000)]), 1 + 4 + IMAGE_CHARS),
        (params("x", system=[media("application/pdf", 4_000_000)]), 1 + 4 + 50_000),
        # Also in the result of a tool, and together.
        (params("x", system=[{"content": [media("image/png", 9)] * 3}]), 1 + 4 + 3 * IMAGE_CHARS),
        # Never more than a new group can start in a minute.
        (params("x", system=[media("image/png", 9)] * 100), 1 + 4 + MOST_MEDIA_CHARS),
        (params("x", system=[media("application/pdf", 9_000_000)]), 1 + 4 + MOST_MEDIA_CHARS),
        # What is no prompt does not count.
        (params("x", temperature=1, stop_sequences=["s" * 100]), 1 + 4),
    ],
)
def test_the_characters_that_become_input_tokens_are_counted(
    intake: Intake, request_: dict[str, Any], chars: int
) -> None:
    assert chars == intake.one(Submission(request_)).input_chars


def test_images_alone_are_not_too_large_for_a_small_organization() -> None:
    group = new_group("org", "a", NOON)

    cost = group.estimate(MOST_MEDIA_CHARS, max_tokens=1)

    assert cost.input_tokens < SAFE_START["input_tokens"]


# Repeats ---------------------------------------------------------------------------------------------------


def test_a_repeat_with_the_same_idempotency_key_returns_the_same_jobs(intake: Intake) -> None:
    sender = Sender("acme", idempotency_key="run-1")
    first = [accepted(each) for each in intake(ask("a"), ask("b"), sender=sender)]
    intake.clock.at += SECOND

    second = [accepted(each) for each in intake(ask("a"), ask("b"), sender=sender)]

    assert first == second
    assert 2 == len(intake.jobs.stored)


def test_a_repeat_with_the_same_custom_id_returns_the_same_job(intake: Intake) -> None:
    first = intake.one(ask(custom_id="row-1"))

    assert first == intake.one(ask(custom_id="row-1"))
    assert derived_job_id("acme", "custom_id", "row-1") == first.job_id


def test_jobs_without_a_name_are_always_new(intake: Intake) -> None:
    assert intake.one(ask()).job_id != intake.one(ask()).job_id


def test_a_repeat_shows_the_job_as_it_is_by_now(intake: Intake) -> None:
    job = intake.one(ask(custom_id="row-1"))
    done = finish_waiting(job, State.CANCELED, NOON)
    intake.jobs.replace(done, job.version)

    assert done == intake.one(ask(custom_id="row-1"))


def test_a_repeat_sends_the_message_of_a_job_that_still_waits(intake: Intake) -> None:
    """The first submit may have died between storing and sending."""
    sender = Sender("acme", idempotency_key="run-1")
    intake.queue.break_down("send", Killed())  # type: ignore[arg-type]
    with pytest.raises(Killed):
        intake(ask(), sender=sender)
    intake.queue.recover()

    job = intake.one(ask(), sender)

    assert [job.job_id] == intake.sent


def test_a_repeat_of_a_parked_job_leaves_the_sending_to_the_sweep(intake: Intake) -> None:
    intake.queue.fail_next("send")
    parked = intake.one(ask(custom_id="row-1"))

    assert parked == intake.one(ask(custom_id="row-1"))
    assert [] == intake.sent


def test_a_repeat_of_a_running_job_sends_nothing(intake: Intake) -> None:
    job = intake.one(ask(custom_id="row-1"))
    intake.jobs.replace(claim(job, "worker-1", NOON, NOON + MINUTE), job.version)
    assert [job.job_id] == intake.sent

    intake.one(ask(custom_id="row-1"))

    assert [] == intake.sent


def test_a_repeat_after_the_job_record_was_not_written_completes_it(intake: Intake) -> None:
    intake.jobs.fail_next("add")
    assert isinstance(rejected(intake(ask(custom_id="row-1"))[0]), StoreBusy)
    assert [] == intake.sent

    job = intake.one(ask(custom_id="row-1"))

    assert [job.job_id] == intake.sent


@pytest.mark.parametrize(
    ("sender", "first", "second", "name"),
    [
        (ACME, ask("a", custom_id="row-1"), ask("b", custom_id="row-1"), "custom_id 'row-1'"),
        (
            ACME,
            ask(custom_id="row-1"),
            ask(custom_id="row-1", metadata={"run": "8"}),
            "custom_id 'row-1'",
        ),
        (
            ACME,
            ask(custom_id="row-1"),
            ask(custom_id="row-1", fallback_models=("claude-b",)),
            "custom_id 'row-1'",
        ),
        (Sender("acme", "run-1"), ask("a"), ask("b"), "this Idempotency-Key"),
    ],
)
def test_another_request_under_the_same_name_is_a_conflict(
    intake: Intake, sender: Sender, first: Submission, second: Submission, name: str
) -> None:
    job = intake.one(first, sender)

    error = rejected(intake(second, sender=sender)[0])

    assert isinstance(error, Conflict)
    assert f"{name} was already used for a different request (job {job.job_id})" in str(error)
    assert job == intake.jobs.stored[job.job_id]
    assert [job.job_id] == intake.sent


def test_a_conflict_is_found_even_when_the_first_request_has_expired(intake: Intake) -> None:
    """Job and request expire apart; what is left of either still speaks."""
    job = intake.one(ask("a", custom_id="row-1"))
    intake.params.stored.clear()

    assert isinstance(rejected(intake(ask("b", custom_id="row-1"))[0]), Conflict)
    assert job == intake.jobs.stored[job.job_id]


def test_the_name_of_a_deleted_job_is_free_though_its_request_is_still_stored(
    intake: Intake,
) -> None:
    job = intake.one(ask("a", custom_id="row-1"))
    intake.jobs.delete(job.job_id)
    intake.params.leftovers.add(job.job_id)

    again = intake.one(ask("b", custom_id="row-1"))

    assert job.job_id == again.job_id
    assert again.request_hash == intake.params.stored[again.job_id].request_hash


def test_a_request_of_a_submit_in_progress_is_not_replaced(intake: Intake) -> None:
    """Its job is stored in a moment, and must find its own request."""
    job = intake.one(ask("a", custom_id="row-1"))
    intake.jobs.delete(job.job_id)

    assert isinstance(rejected(intake(ask("b", custom_id="row-1"))[0]), Conflict)
    assert job.request_hash == intake.params.stored[job.job_id].request_hash


def test_other_headers_make_another_request(intake: Intake) -> None:
    intake.one(ask(custom_id="row-1"))

    beta = Sender("acme", anthropic_beta="files-api")

    assert isinstance(rejected(intake(ask(custom_id="row-1"), sender=beta)[0]), Conflict)


def test_the_order_of_fields_makes_no_other_request(intake: Intake) -> None:
    request = params()
    turned = dict(reversed(list(request.items())))

    first = intake.one(Submission(request, custom_id="row-1"))

    assert first == intake.one(Submission(turned, custom_id="row-1"))


def test_tenants_do_not_meet(intake: Intake) -> None:
    first = intake.one(ask("a", custom_id="row-1"))
    second = intake.one(ask("b", custom_id="row-1"), Sender("zenith"))

    assert first.job_id != second.job_id


def test_position_distinguishes_equal_jobs_of_one_list(intake: Intake) -> None:
    outcomes = intake(ask(), ask(), sender=Sender("acme", idempotency_key="run-1"))

    assert 2 == len({accepted(each).job_id for each in outcomes})


def test_a_webhook_is_part_of_the_request_and_its_absence_changes_nothing(intake: Intake) -> None:
    """A job that a release without webhooks took is found by its repeat."""
    without = intake.one(ask())
    own = intake.one(
        ask(webhook="https://own.example/"), Sender("acme", webhook="https://a.example/")
    )
    header = intake.one(ask(), Sender("acme", webhook="https://a.example/"))

    assert [None, "https://own.example/", "https://a.example/"] == [
        job.webhook for job in (without, own, header)
    ]
    assert 3 == len({job.request_hash for job in (without, own, header)})


def test_a_repeat_finds_its_job_even_after_the_deadline(intake: Intake) -> None:
    """The first reply may have been lost; the job was accepted while the deadline lay ahead."""
    urgent = ask(custom_id="row-1", deadline=NOON + MINUTE)
    job = intake.one(urgent)
    intake.clock.at = NOON + 2 * MINUTE

    assert job.job_id == intake.one(urgent).job_id
    assert 1 == intake.events.counted("JobsAccepted")


# SDKs that send again ----------------------------------------------------------------------------------------


FIRST, AGAIN = Sender("acme", resends=0), Sender("acme", resends=1)


def test_an_sdk_that_sends_again_finds_the_jobs_of_its_first_try(intake: Intake) -> None:
    """Its requests carry no Idempotency-Key, and the reply to the first one may have been lost."""
    first = [accepted(each) for each in intake(ask("a"), ask("b"), ask("a"), sender=FIRST)]
    intake.clock.at += SECOND

    again = [accepted(each) for each in intake(ask("a"), ask("b"), ask("a"), sender=AGAIN)]

    assert first == again
    assert 3 == len({job.job_id for job in first}) == len(intake.jobs.stored)
    assert 3 == intake.events.counted("JobsAccepted")


def test_a_resend_whose_first_try_never_arrived_makes_the_job(intake: Intake) -> None:
    job = intake.one(ask(), AGAIN)

    assert [job.job_id] == intake.sent
    assert job == intake.one(ask(), Sender("acme", resends=2))


def test_two_equal_requests_of_an_sdk_are_two_jobs(intake: Intake) -> None:
    first, second = intake.one(ask(), FIRST), intake.one(ask(), FIRST)

    assert first.job_id != second.job_id
    assert first.request_hash == second.request_hash
    assert {first.job_id, second.job_id} == set(intake.sent)
    assert intake.one(ask(), AGAIN) == first


@pytest.mark.parametrize(
    ("later", "is_the_same"),
    [(0, True), (599_999, True), (600_000, False), (20 * MINUTE, False)],
)
@pytest.mark.parametrize("start", [NOON, NOON + 300_000, NOON + 599_999])
def test_a_resend_is_looked_for_among_the_last_ten_minutes(
    intake: Intake, start: int, later: int, *, is_the_same: bool
) -> None:
    intake.clock.at = start
    first = intake.one(ask(), FIRST)
    intake.clock.at += later

    assert is_the_same == (first.job_id == intake.one(ask(), AGAIN).job_id)


@pytest.mark.parametrize(
    "other",
    [
        (ask("a"), ask("c")),
        (ask("a"),),
        (ask("b"), ask("a")),
        (ask("a"), ask("b"), InvalidRequest("a third")),
        (ask("a", metadata={"run": "8"}), ask("b")),
    ],
)
def test_a_resend_of_another_body_is_another_request(
    intake: Intake, other: tuple[Submission | SluiceError, ...]
) -> None:
    first = {accepted(each).job_id for each in intake(ask("a"), ask("b"), sender=FIRST)}

    again = {each.job.job_id for each in intake(*other, sender=AGAIN) if isinstance(each, Accepted)}

    assert not first & again


def test_a_resend_of_another_tenant_finds_nothing(intake: Intake) -> None:
    first = intake.one(ask(), FIRST)

    assert first.job_id != intake.one(ask(), Sender("zenith", resends=1)).job_id


def test_a_name_goes_before_the_count_of_resends(intake: Intake) -> None:
    named = intake.one(ask(custom_id="row-1"), FIRST)
    keyed = intake.one(ask(), Sender("acme", "run-1", resends=0))

    assert derived_job_id("acme", "custom_id", "row-1") == named.job_id
    assert keyed == intake.one(ask(), Sender("acme", "run-1", resends=1))
    assert keyed.job_id != intake.one(ask(), AGAIN).job_id


def test_a_resend_sends_the_message_that_the_first_try_did_not_send(intake: Intake) -> None:
    intake.queue.break_down("send", Killed())  # type: ignore[arg-type]
    with pytest.raises(Killed):
        intake(ask(), sender=FIRST)
    intake.queue.recover()

    job = intake.one(ask(), AGAIN)

    assert [job.job_id] == intake.sent
    assert 1 == len(intake.jobs.stored)


def test_a_resend_finds_its_job_after_the_deadline(intake: Intake) -> None:
    urgent = ask(deadline=NOON + SECOND)
    job = intake.one(urgent, FIRST)
    intake.clock.at += MINUTE

    assert job == intake.one(urgent, AGAIN)


# Lists -----------------------------------------------------------------------------------------------------


def test_every_item_has_its_own_outcome_in_its_own_place(intake: Intake) -> None:
    bad_form = InvalidRequest("max_tokens: Field required")
    intake.one(ask("other", custom_id="taken"))

    outcomes = intake(
        ask("a", custom_id="row-1"),
        bad_form,
        ask("b", custom_id="taken"),
        ask("c", deadline=NOON),
        ask("d", custom_id="row-1"),
        ask("e"),
    )

    assert [True, False, False, False, False, True] == [
        isinstance(each, Accepted) for each in outcomes
    ]
    assert bad_form is rejected(outcomes[1])
    assert isinstance(rejected(outcomes[2]), Conflict)
    assert str(rejected(outcomes[3])).startswith("deadline is in the past")
    assert "duplicate custom_id 'row-1'; first used by item 0" == str(rejected(outcomes[4]))
    assert 1 + 2 == len(intake.jobs.stored)
    assert 1 + 2 == intake.events.counted("JobsAccepted")


def test_a_long_list_keeps_its_order(intake: Intake) -> None:
    outcomes = intake(*(ask(str(n), custom_id=f"row-{n}") for n in range(100)))

    assert [f"row-{n}" for n in range(100)] == [accepted(each).custom_id for each in outcomes]
    assert [accepted(each).job_id for each in outcomes[:50]] == intake.sent


def test_a_list_is_stored_by_two_calls_for_each_25_jobs(intake: Intake) -> None:
    outcomes = intake(*(ask() for _ in range(40)))

    assert 40 == len({accepted(each).job_id for each in outcomes}) == len(intake.sent)
    stored = [line for line in intake.journal if "add" in line]
    assert 4 == len(stored) == sum("add_new" in line for line in stored)


def test_what_of_a_list_is_there_already_is_a_repeat_and_the_rest_is_new(intake: Intake) -> None:
    rows = [ask(custom_id=f"row-{n}") for n in range(4)]
    earlier = intake.one(rows[1])
    intake.one(ask("another", custom_id="row-3"))

    outcomes = intake(*rows)
    again = intake(*rows)

    assert [False, True, False] == [
        isinstance(each, Accepted) and each.is_repeat for each in outcomes[:3]
    ]
    assert earlier == accepted(outcomes[1])
    assert isinstance(rejected(outcomes[3]), Conflict)
    assert [True, True, True, False] == [isinstance(each, Accepted) for each in again]
    assert all(each.is_repeat for each in again if isinstance(each, Accepted))
    assert 4 == len(intake.jobs.stored)


def test_a_list_that_may_be_stored_is_rejected_and_found_by_a_repeat() -> None:
    """If they were not recognized as repeats, unnamed jobs would be stored a second time, and billed."""
    intake = Intake(jobs := LostReply())
    jobs.lost = 1

    errors = [rejected(each) for each in intake(ask(), ask(), sender=FIRST)]
    later = [accepted(each) for each in intake(ask(), ask(), sender=AGAIN)]

    assert [StoreBusy, StoreBusy] == [type(error) for error in errors]
    assert list(jobs.stored) == [job.job_id for job in later] == intake.sent


def test_a_list_of_nothing_but_errors_stores_nothing(intake: Intake) -> None:
    errors = [InvalidRequest("one"), InvalidRequest("two")]

    assert errors == [rejected(each) for each in intake(*errors)]
    assert not intake.jobs.stored
    assert 0 == intake.events.counted("JobsAccepted")


@pytest.mark.parametrize("store", ["params", "jobs"])
def test_a_busy_store_rejects_only_what_it_did_not_take(intake: Intake, store: str) -> None:
    getattr(intake, store).fail_next("add_new")
    getattr(intake, store).fail_next("add")

    outcomes = intake(ask("a"), ask("b"), ask("c"))

    busy = [each for each in outcomes if isinstance(each, Rejected)]
    assert [StoreBusy] == [type(each.error) for each in busy]
    assert 2 == len(intake.sent)


def test_a_job_nested_too_deeply_is_refused_and_the_others_are_taken(intake: Intake) -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]

    outcomes = intake(Submission(params() | {"system": deep}), ask())

    assert "nested too deeply" in str(rejected(outcomes[0]))
    assert accepted(outcomes[1]).job_id in intake.sent


def test_jobs_the_queue_did_not_take_are_parked_for_the_sweep(intake: Intake) -> None:
    """Accepted all the same: with neither a message nor a due time they would wait indefinitely."""
    lost = derived_job_id("acme", "custom_id", "row-1")
    intake.queue.untaken = {lost}

    outcomes = intake(*(ask(str(n), custom_id=f"row-{n}") for n in range(3)))

    job = accepted(outcomes[1])
    assert (lost, State.QUEUED, NOON) == (job.job_id, job.state, job.not_before)
    assert intake.jobs.stored[lost] == job
    assert [lost] == [each.job_id for each in intake.jobs.due(DueFor.CALL, NOON, 10)]
    assert 3 == intake.events.counted("JobsAccepted")
    assert lost not in intake.sent


def test_a_job_that_neither_the_queue_nor_the_table_takes_is_left_to_the_sweep(
    intake: Intake,
) -> None:
    """It is stored and will run, so that "rejected" would be untrue; a repeat sends it sooner."""
    intake.queue.fail_next("send")
    intake.jobs.fail_next("replace")

    job = intake.one(ask(custom_id="row-1"))

    assert 1 == intake.events.counted("JobsAccepted")
    assert "job not parked" in intake.events.problem_names
    cared_for = intake.jobs.due(DueFor.CHECK, NOON + 45 * MINUTE, 10)
    assert [job.job_id] == [each.job_id for each in cared_for]
    assert [intake.one(ask(custom_id="row-1")).job_id] == intake.sent


def test_a_job_canceled_before_it_was_parked_stays_canceled(intake: Intake) -> None:
    lost = derived_job_id("acme", "custom_id", "row-1")

    def cancel() -> None:
        job = intake.jobs.stored[lost]
        intake.jobs.replace(request_cancel(job, NOON), job.version)

    intake.queue.fail_next("send")
    intake.jobs.before_replace.append(cancel)

    assert State.CANCELED == intake.one(ask(custom_id="row-1")).state


# Stores that do not answer as they should ---------------------------------------------------------------------


class LostReply(MemoryJobs):
    """Writes, and then the reply is lost, on all four tries."""

    lost: int = 0

    def add(self, job: Job) -> None:
        super().add(job)
        self._lose()

    def add_new(self, jobs: Sequence[Job]) -> set[str]:
        stored = super().add_new(jobs)
        self._lose()
        return stored

    def replace(self, job: Job, expected_version: int) -> None:
        super().replace(job, expected_version)
        self._lose()

    def _lose(self) -> None:
        if self.lost:
            self.lost -= 1
            raise StoreBusy("the jobs table", may_be_done=True)


@pytest.mark.parametrize("sender", [ACME, FIRST])
def test_a_job_that_was_stored_though_the_reply_was_lost_is_accepted_and_sent(
    sender: Sender,
) -> None:
    """Called rejected, it would run all the same, and once more when its caller tries again."""
    jobs = LostReply()
    jobs.lost = 1
    intake = Intake(jobs)

    job = intake.one(ask(), sender)

    assert [job.job_id] == list(intake.jobs.stored) == intake.sent


def test_a_job_that_was_parked_though_the_reply_was_lost_is_accepted() -> None:
    jobs = LostReply()
    intake = Intake(jobs)
    intake.queue.break_down("send")
    jobs.before_replace.append(lambda: setattr(jobs, "lost", 1))

    job = intake.one(ask())

    assert NOON == job.not_before
    assert [job.job_id] == [each.job_id for each in intake.jobs.due(DueFor.CALL, NOON, 10)]


@pytest.mark.parametrize("may_be_done", [True, False])
def test_a_job_that_was_not_stored_is_rejected(intake: Intake, *, may_be_done: bool) -> None:
    error = StoreBusy("the jobs table", may_be_done=may_be_done)
    intake.jobs.fail_next("add", error=error)

    assert error is rejected(intake(ask())[0])
    assert not intake.jobs.stored
    assert [] == intake.sent


def test_after_a_lost_response_and_a_failed_read_the_repeat_decides() -> None:
    jobs = LostReply()
    jobs.lost = 1
    intake = Intake(jobs)
    intake.jobs.fail_next("get")

    assert isinstance(rejected(intake(ask(custom_id="row-1"))[0]), StoreBusy)
    assert [intake.one(ask(custom_id="row-1")).job_id] == intake.sent


@pytest.mark.parametrize("store", ["params", "jobs"])
def test_an_unexpected_error_is_the_outcome_of_one_job_only(intake: Intake, store: str) -> None:
    getattr(intake, store).fail_next("add_new", error=RuntimeError("item too large"))
    getattr(intake, store).fail_next("add", error=RuntimeError("item too large"))

    outcomes = intake(ask("a"), ask("b"), ask("c"))

    (failed,) = [each for each in outcomes if isinstance(each, Rejected)]
    assert isinstance(failed.error, Unexpected)
    assert "item too large" not in str(failed.error)
    assert 2 == len(intake.sent)
    assert ["list not stored together", "job not stored"] == intake.events.problem_names


def test_jobs_are_parked_whatever_keeps_the_queue_from_taking_them(intake: Intake) -> None:
    intake.queue.break_down("send", RuntimeError("no such queue"))

    job = intake.one(ask())

    assert [job.job_id] == [each.job_id for each in intake.jobs.due(DueFor.CALL, NOON, 10)]
    assert {"messages not sent", "queue busy, jobs parked"} == set(intake.events.problem_names)


def test_jobs_not_stored_in_time_are_rejected_and_the_others_are_sent() -> None:
    """The function has 28 seconds in all, and what is stored must still be sent."""
    one_at_a_time = Lock()

    class Slow(MemoryParams):
        def add_new(self, params: Sequence[Params]) -> set[str]:  # noqa: ARG002 - large requests
            return set()

        def add(self, params: Params, *, over_leftover: bool = False) -> None:
            with one_at_a_time:
                super().add(params, over_leftover=over_leftover)
                scene.clock.at += START_WITHIN_MS // 10

    scene = Intake(params=Slow())

    outcomes = scene(*(ask(str(n)) for n in range(100)))

    taken = [accepted(each).job_id for each in outcomes if isinstance(each, Accepted)]
    late = [each.error for each in outcomes if isinstance(each, Rejected)]
    assert 10 <= len(taken) < 10 + PARALLEL_WRITES
    assert {"the gateway"} == {error.what for error in late if isinstance(error, StoreBusy)}
    assert 100 == len(taken) + len(late)
    assert set(taken) == set(scene.jobs.stored) == set(scene.sent)


# How long it will take -------------------------------------------------------------------------------------


KNOWN = {"claude-a": "a", "claude-b": "b"}


def test_the_estimate_without_known_groups_is_about_one_start_a_second(intake: Intake) -> None:
    waiting = StartEstimate(intake.queue, MemoryLimits(), KNOWN, intake.clock, intake.events)
    intake(*(ask(str(n)) for n in range(60)))

    assert NOON + MINUTE == waiting.estimated_start("claude-a", "acme")


def test_a_block_is_waited_out_first(intake: Intake) -> None:
    group = block(new_group("org", "a", NOON), NOON + MINUTE, "rate limited", NOON)

    waiting = StartEstimate(intake.queue, MemoryLimits(group), KNOWN, intake.clock, intake.events)

    assert NOON + MINUTE == waiting.estimated_start("claude-a", "acme")
    assert NOON == waiting.estimated_start("claude-b", "acme")


def test_the_queue_is_read_every_few_seconds_only(intake: Intake) -> None:
    waiting = StartEstimate(intake.queue, MemoryLimits(), KNOWN, intake.clock, intake.events)
    before = waiting.estimated_start("claude-a", "acme")
    intake.one(ask())

    assert before == waiting.estimated_start("claude-a", "acme")
    intake.clock.at += MOST_AGE_MS
    later = waiting.estimated_start("claude-a", "acme")
    assert later is not None
    assert later > intake.clock.at


@pytest.mark.parametrize("error", [StoreBusy("the store"), RuntimeError("no such table")])
@pytest.mark.parametrize("verb", ["depth", "groups"])
def test_the_start_is_unknown_while_a_store_does_not_answer(
    intake: Intake, verb: str, error: Exception
) -> None:
    """The jobs are accepted by then, and an accepted job is never answered with an error."""
    limits = MemoryLimits()
    waiting = StartEstimate(intake.queue, limits, KNOWN, intake.clock, intake.events)
    for store in (intake.queue, limits):
        store.fail_next(verb, error=error)

    assert waiting.estimated_start("claude-a", "acme") is None
    for store in (intake.queue, limits):
        store.recover()
    assert waiting.estimated_start("claude-a", "acme") is None, "not asked again by every submit"
    intake.clock.at += MOST_AGE_MS
    assert intake.clock.at == waiting.estimated_start("claude-a", "acme")
