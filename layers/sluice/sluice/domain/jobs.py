"""The record of a job and its state machine.

Every function takes a job and returns the changed job; nothing is written. Stores write it under an optimistic lock on
`version`, so that one of two concurrent writers fails. Times are epoch milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from hashlib import sha256
from typing import Final

from sluice.domain.errors import IllegalTransition, LeaseLost
from sluice.domain.pricing import LedgerRow, Spend, Usage, utc_day
from sluice.domain.waits import BOOKING_MS, LEASE_MS

MOST_REMEMBERED: Final = 30
WHOLE_TEXTS: Final = 6
SHORT_TEXT: Final = 200
"""Attempts and redrives kept in a record, how many of the newest have their whole error texts, and the characters of
the others: an item of DynamoDB holds 400 KB, however often its job is redriven. The ledger has every call."""

NOT_STORED: Final = "the answer could not be stored"
"""Why a job waits whose answer no store took to the end of its invocation: it uses no attempt."""

WATCH_MS: Final = 30 * 60_000
"""If a job is not written for this long, its message may be lost: the sweep checks it."""

WATCH_GRAIN_MS: Final = 15 * 60_000
"""Check times are rounded up to multiples of this, so that most writes of a job do not change its index entry."""

assert LEASE_MS < WATCH_MS, "a running job is not taken for a lost one"

LOSSES_TO_SUSPECT: Final = 3
"""A job that has lost this many workers may be what kills them: it is a suspect, and runs beside few other jobs.

Not sooner: deployments, timeouts and failed hosts lose dozens of jobs at once, which must not wait for one another.
"""

FEW: Final = 8
"""Maximum calls in flight in the worker at a suspect's first try, its own included. After that it runs alone."""

MOST_LOST_ALONE: Final = 3
"""A job that loses this many workers while it runs alone ends `errored`: no other job can have killed them."""

SCHEMA_VERSION: Final = 1
"""Of the stored record and of the queue message."""


class State(StrEnum):
    """The state of a job. The final states are those of Anthropic's batches."""

    QUEUED = "queued"
    """Waiting: for the first start, after a snooze or before a retry."""
    RUNNING = "running"
    """Leased to a worker."""
    SUCCEEDED = "succeeded"
    ERRORED = "errored"
    CANCELED = "canceled"
    EXPIRED = "expired"
    """Its deadline passed before an answer arrived."""

    @property
    def is_final(self) -> bool:
        """Return whether the job has ended. Only an operator's redrive changes it again."""
        return self not in _WAITING


class Party(StrEnum):
    """A part of Sluice that changes jobs."""

    API = "api"
    WORKER = "worker"
    SWEEP = "sweep"
    DEAD_LETTERS = "dead letters"
    OPERATOR = "operator"


class LeaseCondition(StrEnum):
    """The condition on the lease under which a transition is allowed."""

    NONE = "no live lease"
    """The job is not leased, or its lease has expired."""
    OWN = "the writer's own"
    """Also after it expired, until another worker takes the job over."""
    LIVE = "a live lease"


class Transition(StrEnum):
    """A transition of a stored job."""

    CLAIM = "claim"
    TAKE_OVER = "take over"
    RENEW = "renew"
    ASK_TO_CANCEL = "ask to cancel"
    SNOOZE = "snooze"
    RETRY = "retry"
    FALL_BACK = "fall back"
    PARK = "park"
    SUCCEED = "succeed"
    GIVE_UP = "give up"
    STOP = "stop"
    CANCEL = "cancel"
    EXPIRE = "expire"
    FAIL = "fail"
    REDRIVE = "redrive"


@dataclass(frozen=True, slots=True)
class Rule:
    """The source and target states of a transition, who may make it, and under which condition on the lease."""

    sources: tuple[State, ...]
    target: State
    who: tuple[Party, ...]
    lease: LeaseCondition
    when: str


_WAITING: Final = (State.QUEUED, State.RUNNING)
"""A job whose worker died stays `running` in its record; once its lease has expired it is treated as waiting."""

TRANSITIONS: Final[Mapping[Transition, Rule]] = {
    Transition.CLAIM: Rule(
        (State.QUEUED,), State.RUNNING, (Party.WORKER,), LeaseCondition.NONE,
        "its start time from the limiter has come: a worker takes the lease",
    ),
    Transition.TAKE_OVER: Rule(
        (State.RUNNING,), State.RUNNING, (Party.WORKER,), LeaseCondition.NONE,
        "the same, after the lease of a dead worker expired: that attempt is closed as lost, and not counted unless "
        "it ran alone",
    ),
    Transition.RENEW: Rule(
        (State.RUNNING,), State.RUNNING, (Party.WORKER,), LeaseCondition.OWN,
        "heartbeat during the call",
    ),
    Transition.ASK_TO_CANCEL: Rule(
        (State.RUNNING,), State.RUNNING, (Party.API,), LeaseCondition.LIVE,
        "canceled during the call: sets a flag, which the worker reads within 15 s",
    ),
    Transition.SNOOZE: Rule(
        (State.RUNNING,), State.QUEUED, (Party.WORKER,), LeaseCondition.OWN,
        "rate limited, overloaded, key rejected, spend limit: the attempt is not counted",
    ),
    Transition.RETRY: Rule(
        (State.RUNNING,), State.QUEUED, (Party.WORKER,), LeaseCondition.OWN,
        "the call failed, or Claude refused and there is a fallback model: the attempt is counted",
    ),
    Transition.FALL_BACK: Rule(
        (State.RUNNING,), State.QUEUED, (Party.WORKER,), LeaseCondition.OWN,
        "overloaded, and there is a fallback model: the attempt is not counted",
    ),
    Transition.PARK: Rule(
        _WAITING, State.QUEUED, (Party.API, Party.WORKER), LeaseCondition.NONE,
        "it must wait for more than 15 minutes, or the queue did not accept its message: the sweep sends one",
    ),
    Transition.SUCCEED: Rule(
        (State.RUNNING,), State.SUCCEEDED, (Party.WORKER,), LeaseCondition.OWN,
        "the answer is stored",
    ),
    Transition.GIVE_UP: Rule(
        (State.RUNNING,), State.ERRORED, (Party.WORKER,), LeaseCondition.OWN,
        "the call failed permanently, or at the last attempt",
    ),
    Transition.STOP: Rule(
        (State.RUNNING,), State.CANCELED, (Party.WORKER,), LeaseCondition.OWN,
        "canceled during the call, which is stopped",
    ),
    Transition.CANCEL: Rule(
        _WAITING, State.CANCELED, (Party.API, Party.WORKER), LeaseCondition.NONE,
        "canceled before a call",
    ),
    Transition.EXPIRE: Rule(
        _WAITING, State.EXPIRED, (Party.WORKER, Party.SWEEP), LeaseCondition.NONE,
        "its deadline has passed",
    ),
    Transition.FAIL: Rule(
        _WAITING, State.ERRORED, (Party.WORKER, Party.DEAD_LETTERS), LeaseCondition.NONE,
        "attempts used up, workers lost while it ran alone, no key permitted, too large for the limit, or its message "
        "became a dead letter",
    ),
    Transition.REDRIVE: Rule(
        (State.ERRORED,), State.QUEUED, (Party.OPERATOR,), LeaseCondition.NONE,
        "it ended by a dead letter, its deadline is in the future, and it was not canceled: parked, due now",
    ),
}  # fmt: skip
"""The state machine. Every function that changes a job checks it; `docs/state_machine.md` is generated from it."""

ENDINGS: Final[Mapping[State, Transition]] = {
    State.CANCELED: Transition.CANCEL,
    State.EXPIRED: Transition.EXPIRE,
    State.ERRORED: Transition.FAIL,
}
"""The transitions that end a job without a lease, by final state."""

DEAD_LETTER: Final = "dead_letter"
"""The error type of a job that ended because its message became a dead letter."""


class AttemptOutcome(StrEnum):
    """How an attempt ended. A snooze removes its attempt."""

    SUCCEEDED = "succeeded"
    RETRY = "retry"
    GIVE_UP = "give_up"
    FALLBACK = "fallback"
    """Claude refused or was overloaded; the job switched to its next fallback model."""
    CANCELED = "canceled"
    LOST = "lost"
    """The worker died during the call, which may have been billed."""


@dataclass(frozen=True, slots=True)
class JobError:
    """Why an attempt or a job failed: Anthropic's `type` and `message`, and the HTTP status if there was one."""

    type: str
    message: str
    status: int | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One claimed try. Counted at the claim; not counted after a snooze, or after a loss beside other jobs."""

    number: int
    model: str
    at: int
    ended_at: int | None = None
    outcome: AttemptOutcome | None = None
    error: JobError | None = None
    request_id: str | None = None
    usage: Usage | None = None
    cost_micro_usd: int | None = None
    alone: bool = False
    """The worker has no other call in flight: if it dies, this job is the cause."""
    version: int = 0
    """Version of the job's record at the claim. It names the call in the ledger. 0: claimed by an older release."""
    organization: str | None = None
    key_id: str = ""
    """The upstream key of the call, and its organization as known at the claim."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker's exclusive right to run the job until a time."""

    owner: str
    until: int


@dataclass(frozen=True, slots=True)
class Snooze:
    """When and why the job last waited without using an attempt."""

    at: int
    reason: str


@dataclass(frozen=True, slots=True)
class Redrive:
    """When an operator made an errored job runnable again, and the error it had ended with."""

    at: int
    error: JobError


@dataclass(frozen=True, slots=True)
class Result:
    """Where the answer is: the gzipped Message inline, or the key of an object that holds it."""

    inline: bytes | None = None
    object_key: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One Messages request with its tracking data. The request itself (`params`) is stored separately, once."""

    job_id: str
    tenant: str
    model: str
    """As submitted; `current_model` is the one that the next call uses."""
    created_at: int
    request_hash: str
    """Hash of everything submitted for this job; distinguishes a repeat from a different request of the same name."""
    input_chars: int
    """Characters of the request, from which its input tokens are estimated."""
    max_tokens: int
    anthropic_version: str
    anthropic_beta: str | None = None
    request_bytes: int = 0
    """Size of the stored request, uncompressed; a worker reserves this much memory before it reads it. 0: unknown."""
    lane: str = "live"
    custom_id: str | None = None
    deadline: int | None = None
    fallback_models: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    webhook: str | None = None
    """URL to notify on completion."""
    state: State = State.QUEUED
    version: int = 1
    attempts_used: int = 0
    snoozes: int = 0
    last_snooze: Snooze | None = None
    attempts: tuple[Attempt, ...] = ()
    fallbacks_used: int = 0
    not_before: int | None = None
    """The job is not started or rescued before this time."""
    lease: Lease | None = None
    started_at: int | None = None
    finished_at: int | None = None
    cancel_requested: bool = False
    full_window: bool = False
    """The next call needs the time of a whole invocation, because an earlier call timed out with less."""
    usage: Usage | None = None
    cost_micro_usd: int = 0
    unknown_costs: int = 0
    """Calls that were billed, but whose cost is unknown and not in `cost_micro_usd`."""
    uncertain_calls: int = 0
    """Calls that may have been billed: nobody saw how they ended."""
    unbooked: tuple[LedgerRow, ...] = ()
    """Rows of its calls that the ledger may lack. Who has the ledger writes them and continues without them."""
    result: Result | None = None
    error: JobError | None = None
    redrives: tuple[Redrive, ...] = ()
    """Oldest first. `attempts_used` counts since the last one; `attempts` keeps all."""

    @property
    def current_model(self) -> str:
        """The model of the next call: the submitted one, or the fallback that the job switched to."""
        return (self.model, *self.fallback_models)[self.fallbacks_used]

    @property
    def has_fallback(self) -> bool:
        """Return whether there is another model to switch to."""
        return self.fallbacks_used < len(self.fallback_models)

    def is_leased(self, now: int) -> bool:
        """Return whether a worker has a live lease on the job."""
        return self.lease is not None and self.lease.until > now


def open_attempt(job: Job) -> Attempt | None:
    """Return the attempt that is running, or whose worker died."""
    if job.attempts and job.attempts[-1].outcome is None:
        return job.attempts[-1]
    return None


def losses(job: Job) -> int:
    """Return how many workers a job without a live lease has lost, since its last redrive if there was one."""
    since = job.redrives[-1].at if job.redrives else 0
    return sum(
        attempt.outcome in {None, AttemptOutcome.LOST}
        for attempt in job.attempts
        if attempt.at >= since
    )


def most_in_flight(job: Job) -> int | None:
    """Return the maximum calls in flight in a worker that runs this job, its own included; None: no maximum."""
    lost = losses(job)
    if lost < LOSSES_TO_SUSPECT:
        return None
    return FEW if lost == LOSSES_TO_SUSPECT else 1


def without_loss(job: Job, now: int) -> Job:
    """Close the attempt of a dead worker as lost. It is not counted unless the job ran alone and so was the cause."""
    attempt = open_attempt(job)
    if attempt is None:
        return job
    error = JobError("worker_lost", "the worker died during the call, which may have been billed")
    lost = replace(attempt, ended_at=now, outcome=AttemptOutcome.LOST, error=error)
    call = f"{attempt.version}" if attempt.version else f"lost-{attempt.number}"
    row = replace(
        lost_row(job, call, attempt.model, attempt.at, "the worker died during the call"),
        organization=attempt.organization,
        key_id=attempt.key_id,
    )
    return replace(
        job,
        attempts=(*job.attempts[:-1], lost),
        attempts_used=job.attempts_used - (not attempt.alone),
        uncertain_calls=job.uncertain_calls + 1,
        unbooked=(*job.unbooked, row),
    )


def lost_row(job: Job, call: str, model: str, at: int, note: str) -> LedgerRow:
    """Return the row of a call whose worker died: it may have been billed."""
    return LedgerRow(
        tenant=job.tenant,
        day=utc_day(at),
        call_id=f"{job.job_id}#{call}",
        job_id=job.job_id,
        model=model,
        lane=job.lane,
        organization=None,
        key_id="",
        request_id=None,
        outcome="worker_lost",
        spend=Spend.of_call(Usage(), 0, certain=False),
        certain=False,
        note=note,
    )


def billed_rows(job: Job) -> tuple[LedgerRow, ...]:
    """Return the rows of an ended job's calls, as far as its record has them: a worker may have died with them."""
    return (*job.unbooked, *(_billed_row(job, each) for each in job.attempts if _is_billed(each)))


def left_to_worker_ms(job: Job, now: int) -> int:
    """Return for how long the calls of an ended job are still its worker's to book; 0: from now on others may.

    The worker does so soon after the end, unless it died. Who books them beside it has them added up twice.
    """
    if not billed_rows(job):
        return 0
    return max(0, (job.finished_at or 0) + BOOKING_MS - now)


def _is_billed(attempt: Attempt) -> bool:
    is_answered = attempt.outcome is AttemptOutcome.SUCCEEDED or attempt.usage is not None
    return is_answered and attempt.version > 0


def _billed_row(job: Job, attempt: Attempt) -> LedgerRow:
    outcome = attempt.outcome or AttemptOutcome.SUCCEEDED
    return LedgerRow(
        tenant=job.tenant,
        day=utc_day(attempt.ended_at or attempt.at),
        call_id=f"{job.job_id}#{attempt.version}",
        job_id=job.job_id,
        model=attempt.model,
        lane=job.lane,
        organization=attempt.organization,
        key_id=attempt.key_id,
        request_id=attempt.request_id,
        outcome=attempt.error.type if attempt.error else outcome.value,
        spend=Spend.of_call(attempt.usage or Usage(), attempt.cost_micro_usd),
        note="from the job record",
    )


class Step(StrEnum):
    """What a worker does with a job whose message it received."""

    RUN = "run"
    DROP = "drop"
    """The job is final: acknowledge the message."""
    BUSY = "busy"
    """Leased to another worker: return the message until the lease expires."""
    EARLY = "early"
    """`not_before` is in the future."""
    EXPIRE = "expire"
    CANCEL = "cancel"
    USED_UP = "used_up"
    KILLER = "killer"
    """It has killed its workers: end it."""


class DueFor(StrEnum):
    """Why the sweep must check a job."""

    BOOKS = "books"
    """It has ended, and the ledger lacks rows of its calls."""
    CALL = "call"
    """It is parked and due, or its deadline has passed: urgent."""
    CHECK = "care"
    """It was not written for `WATCH_MS`: its message may be lost, or was never sent."""


def due(job: Job) -> tuple[DueFor, int] | None:
    """Return why and when the sweep must check the job next; None once it has ended and its calls are in the ledger.

    A queued job with a `not_before` is parked: it has no message until the sweep sends one.
    """
    if job.state.is_final:
        return (DueFor.BOOKS, job.finished_at or 0) if job.unbooked else None
    if job.state is State.QUEUED and job.not_before is not None:
        why, at = DueFor.CALL, job.not_before
    else:
        last_snooze = job.last_snooze.at if job.last_snooze else 0
        last_attempt = job.attempts[-1] if job.attempts else None
        attempted = (last_attempt.ended_at or last_attempt.at) if last_attempt else 0
        latest = max(job.created_at, last_snooze, attempted)
        why, at = DueFor.CHECK, -(-(latest + WATCH_MS) // WATCH_GRAIN_MS) * WATCH_GRAIN_MS
    if job.deadline is not None and job.deadline <= at:
        return DueFor.CALL, job.deadline
    return why, at


def due_after_send(deadline: int | None, check_at: int) -> tuple[DueFor, int]:
    """Return why and when the sweep must check a job whose message it has just sent.

    At its deadline, if that is first: then it expires whether a worker has received the message or not.
    """
    if deadline is not None and deadline <= check_at:
        return DueFor.CALL, deadline
    return DueFor.CHECK, check_at


def derived_job_id(tenant: str, scope: str, name: str) -> str:
    """Return an id that is the same for a repeat of the same submit.

    `scope` is the kind of the name: `key` for an Idempotency-Key and position, `custom_id` for the caller's id.
    """
    digest = sha256(f"{tenant}\x00{scope}\x00{name}".encode()).hexdigest()
    return f"job_{digest[:32]}"


def random_job_id(random_bytes: bytes) -> str:
    """Return a new job id from 16 random bytes."""
    return f"job_{random_bytes.hex()[:32]}"


def next_step(job: Job, now: int, max_attempts: int) -> Step:  # noqa: PLR0911 - one line per rule
    """Return what a worker must do with a job whose message it received."""
    if job.state.is_final:
        return Step.DROP
    if job.is_leased(now):
        return Step.BUSY
    if job.cancel_requested:
        return Step.CANCEL
    if job.deadline is not None and job.deadline <= now:
        return Step.EXPIRE
    closed = without_loss(job, now)
    if _lost_alone(closed) >= MOST_LOST_ALONE:
        return Step.KILLER
    if closed.attempts_used >= max_attempts:
        return Step.USED_UP
    if job.not_before is not None and job.not_before > now:
        return Step.EARLY
    return Step.RUN


def claim(  # noqa: PLR0913 - the facts of one attempt
    job: Job,
    owner: str,
    now: int,
    lease_until: int,
    *,
    alone: bool = False,
    organization: str | None = None,
    key_id: str = "",
) -> Job:
    """Take the lease: `queued` becomes `running`. Taking over an expired lease closes its attempt as lost."""
    before = without_loss(job, now)
    number = (before.attempts[-1].number if before.attempts else 0) + 1
    return _changed(
        before,
        Transition.TAKE_OVER if job.state is State.RUNNING else Transition.CLAIM,
        now=now,
        lease=Lease(owner, lease_until),
        attempts_used=before.attempts_used + 1,
        attempts=(
            *_remembered(before.attempts),
            Attempt(
                number,
                job.current_model,
                now,
                alone=alone,
                version=job.version + 1,
                organization=organization,
                key_id=key_id,
            ),
        ),
        started_at=job.started_at or now,
        not_before=None,
    )


def renew(job: Job, owner: str, lease_until: int) -> Job:
    """Extend the owner's lease (heartbeat); raises LeaseLost if another worker has it."""
    return _changed(job, Transition.RENEW, owner=owner, lease=Lease(owner, lease_until))


def snooze(  # noqa: PLR0913 - the facts of one wait
    job: Job,
    owner: str,
    now: int,
    *,
    reason: str,
    not_before: int | None = None,
    cost_micro_usd: int | None = None,
) -> Job:
    """Queue the job again without using an attempt: throttled, overloaded, or not startable.

    A call has a cost if its answer broke off because of overload.
    """
    return _given_back(
        job, Transition.SNOOZE, owner, Snooze(now, reason), not_before, cost_micro_usd
    )


def park(job: Job, now: int, *, reason: str, not_before: int) -> Job:
    """Take a job without a live lease out of the queue until a time, at which the sweep sends a new message."""
    return _changed(
        without_loss(job, now),
        Transition.PARK,
        now=now,
        lease=None,
        not_before=not_before,
        last_snooze=Snooze(now, reason),
    )


def retry(  # noqa: PLR0913 - the facts of one failed attempt
    job: Job,
    owner: str,
    now: int,
    *,
    error: JobError,
    not_before: int | None = None,
    outcome: AttemptOutcome = AttemptOutcome.RETRY,
    request_id: str | None = None,
    usage: Usage | None = None,
    cost_micro_usd: int | None = None,
    full_window: bool = False,
) -> Job:
    """Queue the job again with one attempt used; `outcome=FALLBACK` switches to the next model."""
    return _changed(
        job,
        Transition.RETRY,
        owner=owner,
        lease=None,
        attempts=_closed(job, now, outcome, error, request_id, usage, cost_micro_usd),
        not_before=not_before,
        cost_micro_usd=job.cost_micro_usd + (cost_micro_usd or 0),
        fallbacks_used=job.fallbacks_used + (outcome is AttemptOutcome.FALLBACK),
        full_window=job.full_window or full_window,
    )


def fall_back(
    job: Job, owner: str, now: int, *, reason: str, cost_micro_usd: int | None = None
) -> Job:
    """Switch to the next fallback model without using an attempt: Claude was overloaded."""
    given_back = _given_back(
        job, Transition.FALL_BACK, owner, Snooze(now, reason), None, cost_micro_usd
    )
    return replace(given_back, fallbacks_used=job.fallbacks_used + 1)


def skip_model(job: Job, now: int, *, reason: str) -> Job:
    """Return a waiting job with its next fallback model, without a call of the one before; its claim writes that."""
    return replace(job, fallbacks_used=job.fallbacks_used + 1, last_snooze=Snooze(now, reason))


def succeed(  # noqa: PLR0913 - the facts of one answer
    job: Job,
    owner: str,
    now: int,
    *,
    result: Result,
    usage: Usage | None,
    cost_micro_usd: int | None,
    request_id: str | None,
) -> Job:
    """End the job with its answer. A cancel during the call does not discard an answer that was paid for."""
    return _finished(
        job,
        Transition.SUCCEED,
        now,
        owner=owner,
        attempts=_closed(
            job, now, AttemptOutcome.SUCCEEDED, None, request_id, usage, cost_micro_usd
        ),
        result=result,
        usage=usage,
        cost_micro_usd=job.cost_micro_usd + (cost_micro_usd or 0),
    )


def give_up(  # noqa: PLR0913 - the facts of one failed attempt
    job: Job,
    owner: str,
    now: int,
    *,
    error: JobError,
    request_id: str | None = None,
    usage: Usage | None = None,
    cost_micro_usd: int | None = None,
) -> Job:
    """End the job as errored, even if attempts remain."""
    return _finished(
        job,
        Transition.GIVE_UP,
        now,
        owner=owner,
        attempts=_closed(
            job, now, AttemptOutcome.GIVE_UP, error, request_id, usage, cost_micro_usd
        ),
        error=error,
        usage=usage,
        cost_micro_usd=job.cost_micro_usd + (cost_micro_usd or 0),
    )


def cancel_running(
    job: Job, owner: str, now: int, *, usage: Usage | None = None, cost_micro_usd: int | None = None
) -> Job:
    """End a running job whose call was stopped because the caller canceled it."""
    return _finished(
        job,
        Transition.STOP,
        now,
        owner=owner,
        attempts=_closed(job, now, AttemptOutcome.CANCELED, None, None, usage, cost_micro_usd),
        usage=usage,
        cost_micro_usd=job.cost_micro_usd + (cost_micro_usd or 0),
    )


def finish_waiting(job: Job, state: State, now: int, error: JobError | None = None) -> Job:
    """End a job without a live lease: canceled, expired, attempts used up, or its message became a dead letter."""
    before = without_loss(job, now)
    return _finished(before, ENDINGS[state], now, attempts=before.attempts, error=error)


def why_not_redriven(job: Job, now: int) -> str | None:
    """Return why the job cannot be redriven, as text for an operator; None if it can."""
    if job.state is not State.ERRORED or job.error is None:
        return f"the job is {job.state}"
    if job.error.type != DEAD_LETTER:
        return f"the job ended with {job.error.type}, not because of a dead letter"
    if job.cancel_requested:
        return "the job was canceled by its caller"
    if job.deadline is not None and job.deadline <= now:
        return "the deadline has passed"
    return None


def redrive(job: Job, now: int) -> Job:
    """Make a job that ended by a dead letter runnable again, with its first model and all its attempts.

    It is parked and due now: the sweep sends its message, as fast as the limits allow.
    """
    reason = why_not_redriven(job, now)
    if reason is not None or job.error is None:
        raise IllegalTransition(job.job_id, job.state, f"redriven: {reason}")
    return _changed(
        job,
        Transition.REDRIVE,
        now=now,
        attempts_used=0,
        fallbacks_used=0,
        not_before=now,
        finished_at=None,
        error=None,
        redrives=(*job.redrives, Redrive(now, _shortened(job.error)))[-MOST_REMEMBERED:],
    )


def request_cancel(job: Job, now: int) -> Job:
    """Cancel: a waiting job ends at once, a running job gets a flag for its worker, a final job stays as it is."""
    if job.state.is_final:
        return job
    if job.is_leased(now):
        if job.cancel_requested:
            return job
        return _changed(job, Transition.ASK_TO_CANCEL, now=now, cancel_requested=True)
    return finish_waiting(replace(job, cancel_requested=True), State.CANCELED, now)


def _given_back(  # noqa: PLR0913, PLR0917 - private, the facts of one wait
    job: Job,
    transition: Transition,
    owner: str,
    why: Snooze,
    not_before: int | None,
    cost_micro_usd: int | None,
) -> Job:
    return _changed(
        job,
        transition,
        owner=owner,
        lease=None,
        attempts_used=job.attempts_used - 1,
        attempts=job.attempts[:-1],
        snoozes=job.snoozes + 1,
        last_snooze=why,
        not_before=not_before,
        cost_micro_usd=job.cost_micro_usd + (cost_micro_usd or 0),
    )


def _remembered(attempts: tuple[Attempt, ...]) -> tuple[Attempt, ...]:
    """Return earlier attempts as they are kept: the last ones, of which only the newest have their whole texts."""
    return tuple(
        replace(attempt, error=attempt.error and _shortened(attempt.error))
        if place < len(attempts) - WHOLE_TEXTS
        else attempt
        for place, attempt in enumerate(attempts)
    )[-MOST_REMEMBERED:]


def _shortened(error: JobError) -> JobError:
    if len(error.message) <= SHORT_TEXT:
        return error
    return replace(error, message=f"{error.message[:SHORT_TEXT]} ...")


def _closed(  # noqa: PLR0913, PLR0917 - private, the facts of one attempt
    job: Job,
    now: int,
    outcome: AttemptOutcome,
    error: JobError | None,
    request_id: str | None,
    usage: Usage | None,
    cost_micro_usd: int | None,
) -> tuple[Attempt, ...]:
    # A job without an attempt has nothing to close; the caller does not own the lease and gets LeaseLost.
    closed = [
        replace(
            attempt,
            ended_at=now,
            outcome=outcome,
            error=error,
            request_id=request_id,
            usage=usage,
            cost_micro_usd=cost_micro_usd,
        )
        for attempt in job.attempts[-1:]
    ]
    return (*job.attempts[:-1], *closed)


def _lost_alone(job: Job) -> int:
    since = job.redrives[-1].at if job.redrives else 0
    return sum(
        attempt.outcome is AttemptOutcome.LOST and attempt.alone
        for attempt in job.attempts
        if attempt.at >= since
    )


def _finished(  # noqa: PLR0913 - private, what a final state sets
    job: Job,
    transition: Transition,
    now: int,
    *,
    attempts: tuple[Attempt, ...],
    owner: str | None = None,
    result: Result | None = None,
    usage: Usage | None = None,
    cost_micro_usd: int | None = None,
    error: JobError | None = None,
) -> Job:
    return _changed(
        job,
        transition,
        now=now,
        owner=owner,
        lease=None,
        not_before=None,
        finished_at=now,
        attempts=attempts,
        result=result,
        usage=usage or job.usage,
        error=error,
        cost_micro_usd=job.cost_micro_usd if cost_micro_usd is None else cost_micro_usd,
    )


def _changed(
    job: Job,
    transition: Transition,
    *,
    now: int | None = None,
    owner: str | None = None,
    **facts: object,
) -> Job:
    """Return the job after a transition, if its rule allows it at the time `now` and for the writer `owner`."""
    rule = TRANSITIONS[transition]
    holder = job.lease.owner if job.lease is not None else None
    if rule.lease is LeaseCondition.OWN and (job.state is not State.RUNNING or holder != owner):
        raise LeaseLost(job.job_id)
    if rule.lease is LeaseCondition.NONE and job.is_leased(now or 0):
        raise IllegalTransition(job.job_id, f"leased to {holder}", rule.target)
    if job.state not in rule.sources:
        raise IllegalTransition(job.job_id, job.state, rule.target)
    return replace(job, state=rule.target, version=job.version + 1, **facts)  # type: ignore[arg-type]
