"""A job and its life.

Every function here takes a job and returns the job as it is afterwards; nothing is written. Stores write the result
with the condition that `version` is still what it was, so two writers can never both win. Times are epoch
milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from hashlib import sha256
from typing import Final

from sluice.domain.errors import IllegalTransition, LeaseLost
from sluice.domain.pricing import Usage

LEASE_MS: Final = 120_000
"""Longer than any gap between renewals; a job whose worker died is free again after this time at the latest."""

RENEW_MS: Final = 45_000
"""How often a worker says that it is alive: to the jobs it runs, and to the queue about the messages it holds."""

LONGEST_PARK_MS: Final = 6 * 3_600_000
"""A parked job looks again after this time at the latest: what it waits for may have been mended by then."""

WATCH_MS: Final = 30 * 60_000
"""A job of which nothing was written for so long may have lost its message: the sweep looks at it."""

WATCH_GRAIN_MS: Final = 15 * 60_000
"""Such times are rounded up to whole quarters of an hour, so that most writes of a job leave its index entry alone."""

LOSSES_TO_SUSPECT: Final = 3
"""A job that has lost so many workers may be what kills them: from then on it runs with few others, at first.

Not sooner: deploys, timeouts and broken machines lose dozens of jobs at once, and those must not wait for one another.
"""

FEW: Final = 8
"""A suspect's first try apart: at most so many in flight in its worker, itself included. After that it runs alone."""

MOST_LOST_ALONE: Final = 3
"""A job that loses so many workers while it runs alone ends `errored`: nobody else can have killed them."""

SCHEMA_VERSION: Final = 1
"""Of the stored record and of the queue message."""


class State(StrEnum):
    """Where a job is in its life. Final states are Anthropic's batch words."""

    QUEUED = "queued"
    """Waiting: for the first time, after a snooze or before a retry."""
    RUNNING = "running"
    """Leased to a worker."""
    SUCCEEDED = "succeeded"
    ERRORED = "errored"
    CANCELED = "canceled"
    EXPIRED = "expired"
    """Its deadline passed before an answer came."""

    @property
    def is_final(self) -> bool:
        """Tell whether the job has ended. It never changes again by itself; an operator may redrive an errored one."""
        return self not in _WAITING


class Party(StrEnum):
    """Who changes jobs."""

    API = "api"
    WORKER = "worker"
    SWEEP = "sweep"
    DEAD_LETTERS = "dead letters"
    OPERATOR = "operator"


class Hold(StrEnum):
    """What must be true of the lease for a change to be allowed."""

    NOBODY = "no live lease"
    """Nobody has the job, or the lease of the one who had it has run out."""
    WRITER = "the writer's own"
    """Also after it ran out, for as long as nobody has taken the job over."""
    SOMEBODY = "a live lease"


class Change(StrEnum):
    """Every change a stored job can go through."""

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
    """From where to where a change leads, who may make it, and what the lease must be."""

    sources: tuple[State, ...]
    target: State
    who: tuple[Party, ...]
    lease: Hold
    when: str


_WAITING: Final = (State.QUEUED, State.RUNNING)
"""A job whose worker died is `running` on record until somebody finds it: as good as waiting once its lease is over."""

CHANGES: Final[Mapping[Change, Rule]] = {
    Change.CLAIM: Rule(
        (State.QUEUED,), State.RUNNING, (Party.WORKER,), Hold.NOBODY,
        "its start time has been reached: a worker takes the lease",
    ),
    Change.TAKE_OVER: Rule(
        (State.RUNNING,), State.RUNNING, (Party.WORKER,), Hold.NOBODY,
        "the same, after the lease of a dead worker has expired: its attempt is closed as lost, and not counted unless "
        "it ran alone",
    ),
    Change.RENEW: Rule(
        (State.RUNNING,), State.RUNNING, (Party.WORKER,), Hold.WRITER,
        "the call continues: the lease is renewed",
    ),
    Change.ASK_TO_CANCEL: Rule(
        (State.RUNNING,), State.RUNNING, (Party.API,), Hold.SOMEBODY,
        "canceled during the call: sets a flag, which the worker reads within 15 s",
    ),
    Change.SNOOZE: Rule(
        (State.RUNNING,), State.QUEUED, (Party.WORKER,), Hold.WRITER,
        "rate limited, overloaded, key rejected, spend limit reached: the attempt is not counted",
    ),
    Change.RETRY: Rule(
        (State.RUNNING,), State.QUEUED, (Party.WORKER,), Hold.WRITER,
        "the call failed, or Claude refused and there is a fallback model: the attempt is counted",
    ),
    Change.FALL_BACK: Rule(
        (State.RUNNING,), State.QUEUED, (Party.WORKER,), Hold.WRITER,
        "overloaded, and there is a fallback model: the attempt is not counted",
    ),
    Change.PARK: Rule(
        _WAITING, State.QUEUED, (Party.API, Party.WORKER), Hold.NOBODY,
        "it must wait for more than 15 minutes, or the queue did not accept its message: the sweep sends it",
    ),
    Change.SUCCEED: Rule(
        (State.RUNNING,), State.SUCCEEDED, (Party.WORKER,), Hold.WRITER,
        "the answer is stored",
    ),
    Change.GIVE_UP: Rule(
        (State.RUNNING,), State.ERRORED, (Party.WORKER,), Hold.WRITER,
        "the call failed permanently, or at the last attempt",
    ),
    Change.STOP: Rule(
        (State.RUNNING,), State.CANCELED, (Party.WORKER,), Hold.WRITER,
        "canceled during the call, which is stopped",
    ),
    Change.CANCEL: Rule(
        _WAITING, State.CANCELED, (Party.API, Party.WORKER), Hold.NOBODY,
        "canceled before a call",
    ),
    Change.EXPIRE: Rule(
        _WAITING, State.EXPIRED, (Party.WORKER, Party.SWEEP), Hold.NOBODY,
        "its deadline has passed",
    ),
    Change.FAIL: Rule(
        _WAITING, State.ERRORED, (Party.WORKER, Party.DEAD_LETTERS), Hold.NOBODY,
        "attempts used up, workers lost to it alone, no key allowed, too large for the limit, or its message is a dead "
        "letter",
    ),
    Change.REDRIVE: Rule(
        (State.ERRORED,), State.QUEUED, (Party.OPERATOR,), Hold.NOBODY,
        "it ended by a dead letter, its deadline is in the future, and it was not canceled: parked until now",
    ),
}  # fmt: skip
"""The state machine. Every function below that changes a job obeys it, and `docs/state_machine.md` is made from it."""

ENDINGS: Final[Mapping[State, Change]] = {
    State.CANCELED: Change.CANCEL,
    State.EXPIRED: Change.EXPIRE,
    State.ERRORED: Change.FAIL,
}
"""How a job ends that nobody runs."""

DEAD_LETTER: Final = "dead_letter"
"""The error type of a job that ended because its message became a dead letter."""


class AttemptOutcome(StrEnum):
    """How an attempt ended. A snooze leaves no attempt behind."""

    SUCCEEDED = "succeeded"
    RETRY = "retry"
    GIVE_UP = "give_up"
    FALLBACK = "fallback"
    """Claude refused or was overloaded, and the job moved on to its next fallback model."""
    CANCELED = "canceled"
    LOST = "lost"
    """The worker died during the call, which may have been billed."""


@dataclass(frozen=True, slots=True)
class JobError:
    """Why an attempt or a job failed: Anthropic's `type` and `message`, and the HTTP status where there was one."""

    type: str
    message: str
    status: int | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One leased try. Counted when the lease is taken; taken back by a snooze, and by a loss that was not its own."""

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
    """The worker had nothing else in flight: if it dies, it was this job."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker's right to run the job until a time."""

    owner: str
    until: int


@dataclass(frozen=True, slots=True)
class Snooze:
    """The last time the job was put back without using an attempt."""

    at: int
    reason: str


@dataclass(frozen=True, slots=True)
class Redrive:
    """An operator has sent an errored job back: when, and what it had ended with."""

    at: int
    error: JobError


@dataclass(frozen=True, slots=True)
class Result:
    """Where the answer is: the gzipped Message inline, or the key of an object that holds it."""

    inline: bytes | None = None
    object_key: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One Messages request with what we know about it. The request itself (`params`) is stored apart, once."""

    job_id: str
    tenant: str
    model: str
    """As asked for. `current_model` is the one that is tried now."""
    created_at: int
    request_hash: str
    """Of everything the caller sent for this job; tells a repeat from another request under the same name."""
    input_chars: int
    """Characters of the request, from which its input tokens are estimated."""
    max_tokens: int
    anthropic_version: str
    anthropic_beta: str | None = None
    request_bytes: int = 0
    """Of the stored request, uncompressed: a worker reserves memory by it before it reads the request. 0: unknown."""
    lane: str = "live"
    custom_id: str | None = None
    deadline: int | None = None
    fallback_models: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    webhook: str | None = None
    """Who is to be told of the job's end."""
    state: State = State.QUEUED
    version: int = 1
    attempts_used: int = 0
    snoozes: int = 0
    last_snooze: Snooze | None = None
    attempts: tuple[Attempt, ...] = ()
    fallbacks_used: int = 0
    not_before: int | None = None
    """Neither a worker nor a rescue touches the job before this time."""
    lease: Lease | None = None
    started_at: int | None = None
    finished_at: int | None = None
    cancel_requested: bool = False
    full_window: bool = False
    """The next call needs a whole invocation's time, because an earlier one ran out of a shorter one."""
    usage: Usage | None = None
    cost_micro_usd: int = 0
    result: Result | None = None
    error: JobError | None = None
    redrives: tuple[Redrive, ...] = ()
    """Oldest first. `attempts_used` counts from the last one on; `attempts` keeps them all."""

    @property
    def current_model(self) -> str:
        """The model the next call goes to: the asked one, or the fallback the job moved to."""
        return (self.model, *self.fallback_models)[self.fallbacks_used]

    @property
    def has_fallback(self) -> bool:
        """Tell whether there is another model to move to."""
        return self.fallbacks_used < len(self.fallback_models)


def open_attempt(job: Job) -> Attempt | None:
    """Return the attempt that is running, or that its worker never ended."""
    if job.attempts and job.attempts[-1].outcome is None:
        return job.attempts[-1]
    return None


def losses(job: Job) -> int:
    """Return how many workers a job has lost that nobody has leased now: since its redrive, if there was one."""
    since = job.redrives[-1].at if job.redrives else 0
    return sum(
        attempt.outcome in {None, AttemptOutcome.LOST}
        for attempt in job.attempts
        if attempt.at >= since
    )


def most_in_flight(job: Job) -> int | None:
    """Return with how many calls in flight, its own included, a worker may call for this job; None: any number."""
    lost = losses(job)
    if lost < LOSSES_TO_SUSPECT:
        return None
    return FEW if lost == LOSSES_TO_SUSPECT else 1


def without_loss(job: Job, now: int) -> Job:
    """Close the attempt of a worker that died; it is given back unless the job ran alone, as neighbors are innocent."""
    attempt = open_attempt(job)
    if attempt is None:
        return job
    error = JobError("worker_lost", "the worker died during the call, which may have been billed")
    lost = replace(attempt, ended_at=now, outcome=AttemptOutcome.LOST, error=error)
    return replace(
        job,
        attempts=(*job.attempts[:-1], lost),
        attempts_used=job.attempts_used - (not attempt.alone),
    )


class Step(StrEnum):
    """What a worker that received the job's message may do with it."""

    RUN = "run"
    DROP = "drop"
    """Final already: acknowledge the message."""
    BUSY = "busy"
    """Leased to somebody else: come back when the lease has run out."""
    EARLY = "early"
    """`not_before` lies ahead."""
    EXPIRE = "expire"
    CANCEL = "cancel"
    USED_UP = "used_up"
    KILLER = "killer"
    """No worker survives it."""


class DueFor(StrEnum):
    """Why the sweep shall look at a job."""

    CALL = "call"
    """It has no message and its time has come, or its deadline has passed: this cannot wait."""
    CARE = "care"
    """Its message should have brought it on by now. Perhaps it was never sent, or is lost."""


def due(job: Job) -> tuple[DueFor, int] | None:
    """Return why and when the sweep shall look at the job next; None once it has ended.

    Parked is a waiting job with a `not_before`: its message has left the queue, and the sweep sends another one.
    """
    if job.state.is_final:
        return None
    if job.state is State.QUEUED and job.not_before is not None:
        why, at = DueFor.CALL, job.not_before
    else:
        last_snooze = job.last_snooze.at if job.last_snooze else 0
        last_attempt = job.attempts[-1] if job.attempts else None
        attempted = (last_attempt.ended_at or last_attempt.at) if last_attempt else 0
        latest = max(job.created_at, last_snooze, attempted)
        why, at = DueFor.CARE, -(-(latest + WATCH_MS) // WATCH_GRAIN_MS) * WATCH_GRAIN_MS
    if job.deadline is not None and job.deadline <= at:
        return DueFor.CALL, job.deadline
    return why, at


def derived_job_id(tenant: str, scope: str, name: str) -> str:
    """Return the id that a repeat of the same submit finds again.

    `scope` says what `name` is: `key` for an Idempotency-Key and position, `custom_id` for the caller's own name.
    """
    digest = sha256(f"{tenant}\x00{scope}\x00{name}".encode()).hexdigest()
    return f"job_{digest[:32]}"


def random_job_id(random_bytes: bytes) -> str:
    """Return a fresh job id from 16 random bytes."""
    return f"job_{random_bytes.hex()[:32]}"


def next_step(job: Job, now: int, max_attempts: int) -> Step:  # noqa: PLR0911 - one line per rule
    """Tell what to do with a job whose message has arrived."""
    if job.state.is_final:
        return Step.DROP
    if job.state is State.RUNNING and job.lease is not None and job.lease.until > now:
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


def claim(job: Job, owner: str, now: int, lease_until: int, *, alone: bool = False) -> Job:
    """Take the lease: `queued` becomes `running`; a lease that ran out is taken over, its attempt closed as lost."""
    before = without_loss(job, now)
    number = (before.attempts[-1].number if before.attempts else 0) + 1
    return _changed(
        before,
        Change.TAKE_OVER if job.state is State.RUNNING else Change.CLAIM,
        now=now,
        lease=Lease(owner, lease_until),
        attempts_used=before.attempts_used + 1,
        attempts=(*before.attempts, Attempt(number, job.current_model, now, alone=alone)),
        started_at=job.started_at or now,
        not_before=None,
    )


def renew(job: Job, owner: str, lease_until: int) -> Job:
    """Extend the owner's lease (heartbeat); raises LeaseLost when it is somebody else's by now."""
    return _changed(job, Change.RENEW, owner=owner, lease=Lease(owner, lease_until))


def snooze(  # noqa: PLR0913 - the facts of one wait
    job: Job,
    owner: str,
    now: int,
    *,
    reason: str,
    not_before: int | None = None,
    cost_micro_usd: int | None = None,
) -> Job:
    """Put the job back without using an attempt: throttled, overloaded, or not startable after all.

    An answer that broke off for overload may have cost something all the same.
    """
    return _given_back(job, Change.SNOOZE, owner, Snooze(now, reason), not_before, cost_micro_usd)


def park(job: Job, now: int, *, reason: str, not_before: int) -> Job:
    """Take a job that nobody runs out of the queue until a time: its message goes, the sweep will send another one."""
    return _changed(
        without_loss(job, now),
        Change.PARK,
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
    """Put the job back with one attempt used; with `outcome=FALLBACK` its next model is up."""
    return _changed(
        job,
        Change.RETRY,
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
    """Move to the next fallback model without using an attempt: Claude was overloaded."""
    given_back = _given_back(
        job, Change.FALL_BACK, owner, Snooze(now, reason), None, cost_micro_usd
    )
    return replace(given_back, fallbacks_used=job.fallbacks_used + 1)


def succeed(  # noqa: PLR0913 - the facts of one answer
    job: Job,
    owner: str,
    now: int,
    *,
    result: Result,
    usage: Usage,
    cost_micro_usd: int | None,
    request_id: str | None,
) -> Job:
    """Store the answer. It is kept even if a cancel arrived meanwhile: the call was made and paid."""
    return _finished(
        job,
        Change.SUCCEED,
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
    """End the job as errored, whatever attempts remain."""
    return _finished(
        job,
        Change.GIVE_UP,
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
        Change.STOP,
        now,
        owner=owner,
        attempts=_closed(job, now, AttemptOutcome.CANCELED, None, None, usage, cost_micro_usd),
        usage=usage,
        cost_micro_usd=job.cost_micro_usd + (cost_micro_usd or 0),
    )


def finish_waiting(job: Job, state: State, now: int, error: JobError | None = None) -> Job:
    """End a job that no worker holds: canceled, expired, out of attempts, or found as a dead letter."""
    before = without_loss(job, now)
    return _finished(before, ENDINGS[state], now, attempts=before.attempts, error=error)


def why_not_redriven(job: Job, now: int) -> str | None:
    """Return why the job may not be redriven, in words for an operator; None when it may."""
    if job.state is not State.ERRORED or job.error is None:
        return f"it is {job.state}"
    if job.error.type != DEAD_LETTER:
        return f"it ended with {job.error.type}, not by its letter"
    if job.cancel_requested:
        return "its caller has canceled it"
    if job.deadline is not None and job.deadline <= now:
        return "its deadline has passed"
    return None


def redrive(job: Job, now: int) -> Job:
    """Make a job that ended by a dead letter runnable again, from its first model and with all its attempts.

    It is parked until now: the sweep sends its message, as fast as the limits can start it.
    """
    reason = why_not_redriven(job, now)
    if reason is not None or job.error is None:
        raise IllegalTransition(job.job_id, job.state, f"redriven: {reason}")
    return _changed(
        job,
        Change.REDRIVE,
        now=now,
        attempts_used=0,
        fallbacks_used=0,
        not_before=now,
        finished_at=None,
        error=None,
        redrives=(*job.redrives, Redrive(now, job.error)),
    )


def request_cancel(job: Job, now: int) -> Job:
    """Cancel: at once while the job waits, by a flag for the worker while it runs, nothing once it is final."""
    if job.state.is_final:
        return job
    if job.state is State.RUNNING and job.lease is not None and job.lease.until > now:
        if job.cancel_requested:
            return job
        return _changed(job, Change.ASK_TO_CANCEL, now=now, cancel_requested=True)
    return finish_waiting(replace(job, cancel_requested=True), State.CANCELED, now)


def _given_back(  # noqa: PLR0913, PLR0917 - private, the facts of one wait
    job: Job,
    change: Change,
    owner: str,
    why: Snooze,
    not_before: int | None,
    cost_micro_usd: int | None,
) -> Job:
    return _changed(
        job,
        change,
        owner=owner,
        lease=None,
        attempts_used=job.attempts_used - 1,
        attempts=job.attempts[:-1],
        snoozes=job.snoozes + 1,
        last_snooze=why,
        not_before=not_before,
        cost_micro_usd=job.cost_micro_usd + (cost_micro_usd or 0),
    )


def _closed(  # noqa: PLR0913, PLR0917 - private, the facts of one attempt
    job: Job,
    now: int,
    outcome: AttemptOutcome,
    error: JobError | None,
    request_id: str | None,
    usage: Usage | None,
    cost_micro_usd: int | None,
) -> tuple[Attempt, ...]:
    # Of a job without an attempt nothing is closed: whoever asks for it does not own the job, and is told so.
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
    change: Change,
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
        change,
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
    job: Job, change: Change, *, now: int | None = None, owner: str | None = None, **facts: object
) -> Job:
    """Return the job after a change, if its rule allows it; `now` judges a lease, `owner` is the writer's name."""
    rule = CHANGES[change]
    holder = job.lease.owner if job.lease is not None else None
    if rule.lease is Hold.WRITER and (job.state is not State.RUNNING or holder != owner):
        raise LeaseLost(job.job_id)
    if rule.lease is Hold.NOBODY and job.lease is not None and job.lease.until > (now or 0):
        raise IllegalTransition(job.job_id, f"leased to {holder}", rule.target)
    if job.state not in rule.sources:
        raise IllegalTransition(job.job_id, job.state, rule.target)
    return replace(job, state=rule.target, version=job.version + 1, **facts)  # type: ignore[arg-type]
