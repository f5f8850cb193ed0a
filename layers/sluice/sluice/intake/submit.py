"""Accepting jobs: each is stored first and sent to the queue afterwards, so that no accepted job is lost.

Each job has its own outcome, whatever fails. An accepted job is stored and has a message or a due time. A rejected job
can be resent under the same name without duplicates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, Final, TypeVar

from sluice.domain.errors import (
    Conflict,
    InvalidRequest,
    SluiceError,
    StoreBusy,
    Unexpected,
)
from sluice.domain.jobs import Job, State, derived_job_id, park, random_job_id
from sluice.domain.params import NEWEST_VERSION, input_chars, request_body
from sluice.ports.jobs import JobQueue, JobStore, Params, ParamsStore, Pointer
from sluice.ports.swap import insert, swap
from sluice.ports.world import Clock, Events, RandomBytes

T = TypeVar("T")

PARALLEL_WRITES: Final = 16

STORED_AT_ONCE: Final = 25
"""Statements in one call to DynamoDB."""

SENT_AT_ONCE: Final = 10
"""Messages in one call to SQS."""

START_WITHIN_MS: Final = 8_000
"""Jobs whose store calls have not started by then are rejected as busy, to leave time to send the stored ones."""

RESEND_WINDOW_MS: Final = 600_000
"""An SDK resends a request within this time; an equal request that arrives later is a new one."""


@dataclass(frozen=True, slots=True)
class Submission:
    """One job as submitted; already validated."""

    params: Mapping[str, Any]
    custom_id: str | None = None
    deadline: int | None = None
    """Epoch milliseconds."""
    fallback_models: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    lane: str = "live"
    webhook: str | None = None


@dataclass(frozen=True, slots=True)
class Sender:
    """The caller and the headers of a submit."""

    tenant: str
    idempotency_key: str | None = None
    anthropic_version: str | None = None
    anthropic_beta: str | None = None
    webhook: str | None = None
    """For jobs without a webhook of their own."""
    resends: int | None = None
    """The SDK's own count of how often it has sent this request before; None if the client does not count."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The job of one submission: a new one, or the existing one of an earlier, equal submit."""

    job: Job
    is_repeat: bool = False


@dataclass(frozen=True, slots=True)
class Rejected:
    """Why one submission was rejected; the others of its list are not affected."""

    error: SluiceError


Outcome = Accepted | Rejected


@dataclass(frozen=True, slots=True)
class _Draft:
    """A job before it is stored."""

    job: Job
    body: bytes
    resend_ids: tuple[str, ...] = ()
    """The ids under which a resend finds a job without custom_id, newest first; empty if the client does not count."""
    is_resend: bool = False

    @property
    def first(self) -> Job:
        """The job under the id that is tried first: its newest resend id if it has one."""
        return replace(self.job, job_id=self.resend_ids[0]) if self.resend_ids else self.job

    @property
    def is_late(self) -> bool:
        """Return whether its deadline is in the past."""
        return self.job.deadline is not None and self.job.deadline <= self.job.created_at


class Submit:
    """The use case behind `POST /jobs`."""

    def __init__(  # noqa: PLR0913, PLR0917 - its tools
        self,
        jobs: JobStore,
        params: ParamsStore,
        queue: JobQueue,
        clock: Clock,
        random_bytes: RandomBytes,
        events: Events,
    ) -> None:
        self._jobs = jobs
        self._params = params
        self._queue = queue
        self._clock = clock
        self._random_bytes = random_bytes
        self._events = events

    def __call__(
        self, submissions: Sequence[Submission | SluiceError], sender: Sender
    ) -> list[Outcome]:
        """Store and enqueue jobs; return one outcome per submission, in order.

        Entries that are errors already (failed validation) are returned as rejected, in their places.
        """
        now = self._clock.now()
        drafts = self._drafts(submissions, sender, now)
        with ThreadPoolExecutor(max_workers=min(PARALLEL_WRITES, len(drafts))) as threads:
            # A resend, or a job with a deadline in the past, may exist already: each is looked up first.
            new = [
                each
                for each in drafts
                if isinstance(each, _Draft) and not each.is_resend and not each.is_late
            ]
            done: dict[str, Outcome] = {}
            if len(new) > 1:
                for some in threads.map(self._stored_together, _parcels(new, STORED_AT_ONCE)):
                    done |= some
            outcomes = list(threads.map(lambda each: self._stored(each, done), drafts))
            fresh = [
                each.job for each in outcomes if isinstance(each, Accepted) and _waits(each.job)
            ]
            parcels = _parcels(fresh, SENT_AT_ONCE)
            unsent = {job_id for unsent in threads.map(self._sent, parcels) for job_id in unsent}
            if unsent:
                self._events.problem("queue busy, jobs parked", jobs=len(unsent))
                outcomes = list(threads.map(lambda each: self._parked(each, unsent, now), outcomes))
        accepted = sum(isinstance(each, Accepted) and not each.is_repeat for each in outcomes)
        if accepted:
            self._events.count("JobsAccepted", accepted)
        return outcomes

    def _sent(self, jobs: Sequence[Job]) -> list[str]:
        """Send the messages of stored jobs; return the ids of those that have none. Never raises."""
        try:
            pointers = [Pointer(job.job_id, job.tenant, job.current_model) for job in jobs]
            return self._queue.send(pointers)
        except Exception:  # noqa: BLE001 - the jobs are stored, so each must get a due time
            self._events.problem("messages not sent", jobs=len(jobs))
            return [job.job_id for job in jobs]

    def _parked(self, outcome: Outcome, unsent: set[str], now: int) -> Outcome:
        """Park a stored job that the queue did not accept; the sweep sends it."""
        if not isinstance(outcome, Accepted) or outcome.job.job_id not in unsent:
            return outcome
        parked = park(outcome.job, now, reason="queue busy", not_before=now)
        try:
            stored = swap(self._jobs.replace, parked, outcome.job.version)
        except StoreBusy as error:
            after_all = self._taken_after_all(parked, error)
            if after_all is None:
                # It is stored, and the sweep checks jobs that were not written for long.
                self._events.problem("job not parked", job_id=outcome.job.job_id)
            return after_all or outcome
        # Another writer may have been first: the job was canceled, or a repeat of it was parked or started.
        if stored is None:
            return Rejected(StoreBusy("the jobs table"))
        return Accepted(stored, outcome.is_repeat)

    def _drafts(
        self, submissions: Sequence[Submission | SluiceError], sender: Sender, now: int
    ) -> list[_Draft | SluiceError]:
        seen: dict[str, int] = {}
        drafts: list[_Draft | SluiceError] = []
        for position, submission in enumerate(submissions):
            if isinstance(submission, SluiceError):
                drafts.append(submission)
                continue
            name = submission.custom_id
            if name is not None and name in seen:
                drafts.append(
                    InvalidRequest(f"duplicate custom_id {name!r}; first used by item {seen[name]}")
                )
                continue
            if name is not None:
                seen[name] = position
            try:
                drafts.append(self._draft(submission, sender, position, now))
            except RecursionError:
                drafts.append(InvalidRequest("the job is nested too deeply"))
            except UnicodeEncodeError:
                drafts.append(InvalidRequest("the job has text that is not valid Unicode"))
        if sender.resends is None or sender.idempotency_key is not None:
            return drafts
        return _findable(drafts, sender.resends, now)

    def _draft(self, submission: Submission, sender: Sender, position: int, now: int) -> _Draft:
        body = request_body(submission.params)
        version = sender.anthropic_version or NEWEST_VERSION
        if sender.idempotency_key is not None:
            job_id = derived_job_id(sender.tenant, "key", f"{position}\x00{sender.idempotency_key}")
        elif submission.custom_id is not None:
            job_id = _id_by_name(sender.tenant, submission.custom_id)
        else:
            job_id = random_job_id(self._random_bytes(16))
        webhook = submission.webhook or sender.webhook
        everything: list[object] = [
            submission.params, submission.custom_id, submission.deadline,
            submission.fallback_models, submission.metadata, submission.lane,
            version, sender.anthropic_beta,
        ]  # fmt: skip
        if webhook is not None:
            # Only if set, so that a repeat finds a job that a release without webhooks accepted.
            everything.append(webhook)
        canonical = json.dumps(everything, sort_keys=True, separators=(",", ":"))
        job = Job(
            job_id=job_id,
            tenant=sender.tenant,
            model=str(submission.params["model"]),
            created_at=now,
            request_hash=sha256(canonical.encode()).hexdigest(),
            input_chars=input_chars(submission.params),
            request_bytes=len(body),
            max_tokens=int(submission.params["max_tokens"]),
            anthropic_version=version,
            anthropic_beta=sender.anthropic_beta,
            lane=submission.lane,
            custom_id=submission.custom_id,
            deadline=submission.deadline,
            fallback_models=submission.fallback_models,
            metadata=submission.metadata,
            webhook=webhook,
        )
        return _Draft(job, body)

    def _stored_together(self, drafts: Sequence[_Draft]) -> Mapping[str, Outcome]:
        """Store new jobs in two calls; return the outcomes that are known, by id. Never raises.

        The other jobs are then stored one by one, which finds out which of them are repeats and which fail.
        """
        jobs = [draft.first for draft in drafts]
        stored: set[str] = set()
        with_params: set[str] = set()
        try:
            with_params = self._params.add_new(
                [
                    Params(job.job_id, draft.body, job.request_hash)
                    for job, draft in zip(jobs, drafts, strict=True)
                ]
            )
            stored = self._jobs.add_new([job for job in jobs if job.job_id in with_params])
        except StoreBusy as busy:
            if with_params and busy.may_be_done:
                # A job that may have been stored here must not be reported as a repeat.
                return {name: Rejected(busy) for name in with_params}
        except Exception:  # noqa: BLE001 - stored params without a job are harmless
            self._events.problem("list not stored together", jobs=len(drafts))
        return {job.job_id: Accepted(job) for job in jobs if job.job_id in stored}

    def _stored(self, draft: _Draft | SluiceError, done: Mapping[str, Outcome]) -> Outcome:
        """Store one job, unless its outcome is known. An error is the outcome of this job only."""
        if isinstance(draft, SluiceError):
            return Rejected(draft)
        name = draft.resend_ids[0] if draft.resend_ids else draft.job.job_id
        if name in done:
            return done[name]
        try:
            return self._found_or_added(draft)
        except SluiceError as error:
            return Rejected(error)
        except Exception:  # noqa: BLE001 - the other jobs of the list must still be stored and sent
            self._events.problem("job not stored", job_id=draft.job.job_id)
            return Rejected(Unexpected())

    def _found_or_added(self, draft: _Draft) -> Outcome:
        job = draft.job
        if self._clock.now() - job.created_at >= START_WITHIN_MS:
            raise StoreBusy("the gateway")
        if draft.is_resend:
            earlier = self._sent_before(draft)
            if earlier is not None:
                return Accepted(earlier, is_repeat=True)
        if draft.is_late:
            return self._too_late(job)
        if not draft.resend_ids:
            return self._added(job, draft.body)
        # The resend id may be taken by an equal request that is not a resend; then the job gets a random id.
        in_place = self._added(draft.first, draft.body)
        if isinstance(in_place, Accepted) and in_place.is_repeat and not draft.is_resend:
            return self._added(job, draft.body)
        return in_place

    def _added(self, job: Job, body: bytes) -> Outcome:
        """Store the params, then the job, so that every stored job has its params."""
        try:
            self._store_params(Params(job.job_id, body, job.request_hash))
            stored = insert(self._jobs.add, job)
        except Conflict:
            return Rejected(_conflict(job))
        except StoreBusy as error:
            return self._taken_after_all(job, error) or Rejected(error)
        if stored is None or stored.request_hash != job.request_hash:
            return Rejected(_conflict(job))
        return Accepted(stored, is_repeat=stored is not job)

    def _store_params(self, params: Params) -> None:
        """Store a request; raises Conflict if its id belongs to a job with a different one.

        A request may be kept longer than its job: the name of a deleted job is free.
        """
        try:
            self._params.add(params)
        except Conflict:
            if self._jobs.get(params.job_id) is not None:
                raise
            self._params.add(params, over_leftover=True)

    def _sent_before(self, draft: _Draft) -> Job | None:
        """Return the job that an earlier try of the same request created."""
        found = self._jobs.get_many(draft.resend_ids)
        since = draft.job.created_at - RESEND_WINDOW_MS
        recent = (found[each] for each in draft.resend_ids if each in found)
        return next((job for job in recent if job.created_at > since), None)

    def _taken_after_all(self, job: Job, error: StoreBusy) -> Accepted | None:
        """Check whether a write was done although its response was lost: such a job runs, so it is accepted."""
        if not error.may_be_done:
            return None
        try:
            written = self._jobs.get(job.job_id)
        except StoreBusy:
            return None
        if written is None or written.version < job.version:
            return None
        return Accepted(written) if written.request_hash == job.request_hash else None

    def _too_late(self, job: Job) -> Outcome:
        """Reject a deadline in the past, unless the job was accepted before its deadline."""
        earlier = self._jobs.get(job.job_id)
        if earlier is not None and earlier.request_hash == job.request_hash:
            return Accepted(earlier, is_repeat=True)
        return Rejected(InvalidRequest("deadline is in the past; send a later time"))


def _findable(
    drafts: Sequence[_Draft | SluiceError], resends: int, now: int
) -> list[_Draft | SluiceError]:
    """Give each job without custom_id the ids under which a resend of its request finds it.

    A resend has the same tenant and equal jobs in the same order, and arrives within `RESEND_WINDOW_MS`. The ids are
    derived from these and from the time in steps of that window, so no table of past requests is needed.
    """
    whole = sha256()
    for draft in drafts:
        whole.update((draft.job.request_hash if isinstance(draft, _Draft) else "-").encode())
    step = now // RESEND_WINDOW_MS

    def with_resend_ids(position: int, draft: _Draft | SluiceError) -> _Draft | SluiceError:
        if not isinstance(draft, _Draft) or draft.job.custom_id is not None:
            return draft
        resend_ids = tuple(
            derived_job_id(draft.job.tenant, "sent", f"{when}\x00{position}\x00{whole.hexdigest()}")
            for when in (step, step - 1)
        )
        return replace(draft, resend_ids=resend_ids, is_resend=resends > 0)

    return [with_resend_ids(position, draft) for position, draft in enumerate(drafts)]


def _parcels(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _waits(job: Job) -> bool:
    """Return whether to send a message for the job: it is queued and was never started or parked.

    A repeat sends the message of such a job again, because the first submit may have died before it did. The sweep
    sends parked jobs.
    """
    started = job.attempts_used > 0 or job.snoozes > 0 or job.not_before is not None
    return not started and job.state is State.QUEUED


def _conflict(job: Job) -> Conflict:
    named = job.custom_id is not None and job.job_id == _id_by_name(job.tenant, job.custom_id)
    name = f"custom_id {job.custom_id!r}" if named else "this Idempotency-Key"
    return Conflict(
        f"{name} was already used for a different request (job {job.job_id}); "
        "use a new one, or send a new Idempotency-Key with each run"
    )


def _id_by_name(tenant: str, custom_id: str) -> str:
    return derived_job_id(tenant, "custom_id", custom_id)
