"""Accepting jobs: stored first, then sent, so that nothing is accepted and forgotten."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final

from sluice.domain import jobs as life
from sluice.domain.errors import Conflict, InvalidRequest, SluiceError, Stale, StoreBusy
from sluice.domain.jobs import Job, derived_job_id, random_job_id
from sluice.domain.limits import Group, expected_start
from sluice.ports import (
    Clock,
    Events,
    JobQueue,
    JobStore,
    LimitStore,
    Params,
    ParamsStore,
    RandomBytes,
)

NEWEST_VERSION: Final = "2026-10-21"
"""The newest `anthropic-version` we know; sent upstream for jobs that name none."""

PARALLEL_WRITES: Final = 16

IMAGE_CHARS: Final = 5_600
"""About 1,600 tokens, what a large image takes, at 3.5 characters per token."""

MOST_MEDIA_CHARS: Final = 100_000
"""All images and documents of a request count as no more: under 30,000 tokens, the rate a new limit group starts at."""


@dataclass(frozen=True, slots=True)
class Submission:
    """One job as a caller asks for it, its form already checked."""

    params: Mapping[str, Any]
    custom_id: str | None = None
    deadline: int | None = None
    """Epoch milliseconds."""
    fallback_models: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    lane: str = "live"


@dataclass(frozen=True, slots=True)
class Sender:
    """What a submit says beside its jobs."""

    tenant: str
    idempotency_key: str | None = None
    anthropic_version: str | None = None
    anthropic_beta: str | None = None


@dataclass(frozen=True, slots=True)
class Accepted:
    """The job that stands for one submission: a new one, or the one that an earlier equal submit made."""

    job: Job
    is_repeat: bool = False


@dataclass(frozen=True, slots=True)
class Rejected:
    """Why one submission was not taken; the others of its list are not touched by it."""

    error: SluiceError


Outcome = Accepted | Rejected


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

        Entries that are errors already (bad form) keep their place and are passed through.
        """
        now = self._clock.now()
        drafts = self._drafts(submissions, sender, now)
        with ThreadPoolExecutor(max_workers=min(PARALLEL_WRITES, len(drafts))) as threads:
            outcomes = list(threads.map(self._stored, drafts))
            fresh = [
                each.job for each in outcomes if isinstance(each, Accepted) and _waits(each.job)
            ]
            unsent = set(self._queue.send([(job.job_id, job.tenant) for job in fresh]))
            if unsent:
                self._events.problem("queue busy, jobs parked", jobs=len(unsent))
                outcomes = list(threads.map(lambda each: self._parked(each, unsent, now), outcomes))
        accepted = sum(isinstance(each, Accepted) and not each.is_repeat for each in outcomes)
        if accepted:
            self._events.count("JobsAccepted", accepted)
        return outcomes

    def _parked(self, outcome: Outcome, unsent: set[str], now: int) -> Outcome:
        """Park a stored job that the queue did not take, so that the sweep sends it: else it would wait for ever."""
        if not isinstance(outcome, Accepted) or outcome.job.job_id not in unsent:
            return outcome
        parked = life.park(outcome.job, now, reason="queue busy", not_before=now)
        try:
            self._jobs.replace(parked, outcome.job.version)
        except StoreBusy as error:
            return Rejected(error)
        except Stale as stale:
            # Somebody went on with it meanwhile: canceled, parked by a repeat, or sent by one and begun.
            if not isinstance(stale.current, Job):
                return Rejected(StoreBusy("the jobs table"))
            return Accepted(stale.current, outcome.is_repeat)
        return Accepted(parked, outcome.is_repeat)

    def _drafts(
        self, submissions: Sequence[Submission | SluiceError], sender: Sender, now: int
    ) -> list[tuple[Job, str] | SluiceError]:
        seen: dict[str, int] = {}
        drafts: list[tuple[Job, str] | SluiceError] = []
        for position, submission in enumerate(submissions):
            if isinstance(submission, SluiceError):
                drafts.append(submission)
                continue
            name = submission.custom_id
            if name is not None and name in seen:
                drafts.append(
                    InvalidRequest(
                        f"custom_id {name!r} stands at item {seen[name]} of the list already"
                    )
                )
                continue
            if name is not None:
                seen[name] = position
            try:
                drafts.append(self._draft(submission, sender, position, now))
            except RecursionError:
                drafts.append(InvalidRequest("the job is nested too deeply"))
        return drafts

    def _draft(
        self, submission: Submission, sender: Sender, position: int, now: int
    ) -> tuple[Job, str]:
        body = params_text(submission.params)
        version = sender.anthropic_version or NEWEST_VERSION
        if sender.idempotency_key is not None:
            job_id = derived_job_id(sender.tenant, "key", f"{position}\x00{sender.idempotency_key}")
        elif submission.custom_id is not None:
            job_id = _id_by_name(sender.tenant, submission.custom_id)
        else:
            job_id = random_job_id(self._random_bytes(16))
        everything = [
            submission.params, submission.custom_id, submission.deadline,
            submission.fallback_models, submission.metadata, submission.lane,
            version, sender.anthropic_beta,
        ]  # fmt: skip
        canonical = json.dumps(everything, sort_keys=True, separators=(",", ":"))
        job = Job(
            job_id=job_id,
            tenant=sender.tenant,
            model=str(submission.params["model"]),
            created_at=now,
            request_hash=sha256(canonical.encode()).hexdigest(),
            input_chars=input_chars(submission.params),
            max_tokens=int(submission.params["max_tokens"]),
            anthropic_version=version,
            anthropic_beta=sender.anthropic_beta,
            lane=submission.lane,
            custom_id=submission.custom_id,
            deadline=submission.deadline,
            fallback_models=submission.fallback_models,
            metadata=submission.metadata,
        )
        return job, body

    def _stored(  # noqa: PLR0911 - one return per outcome
        self, draft: tuple[Job, str] | SluiceError
    ) -> Outcome:
        """Store params, then the job: a job on record always has its request."""
        if isinstance(draft, SluiceError):
            return Rejected(draft)
        job, body = draft
        try:
            if job.deadline is not None and job.deadline <= job.created_at:
                return self._too_late(job)
            self._params.add(Params(job.job_id, body, job.request_hash))
            self._jobs.add(job)
        except Stale as stale:
            earlier = stale.current
            if isinstance(earlier, Job) and earlier.request_hash == job.request_hash:
                return Accepted(earlier, is_repeat=True)
            return Rejected(_conflict(job))
        except Conflict:
            return Rejected(_conflict(job))
        except StoreBusy as error:
            return Rejected(error)
        return Accepted(job)

    def _too_late(self, job: Job) -> Outcome:
        """A deadline in the past is an error, unless the job was accepted when it still lay ahead."""
        earlier = self._jobs.get(job.job_id)
        if earlier is not None and earlier.request_hash == job.request_hash:
            return Accepted(earlier, is_repeat=True)
        return Rejected(
            InvalidRequest("deadline: it has passed already; give a time that lies ahead")
        )


class Waiting:
    """How long a new job will probably wait. Looked up every few seconds, not for every job."""

    AGE_MS: Final = 5_000

    def __init__(self, queue: JobQueue, limits: LimitStore, clock: Clock) -> None:
        self._queue = queue
        self._limits = limits
        self._clock = clock
        self._looked_at = -self.AGE_MS
        self._depth = 0
        self._groups: Sequence[Group] = ()

    def estimated_start(self, model_group: str) -> int | None:
        """Return about when a job submitted now starts (epoch ms), or None when nobody can tell.

        The whole backlog is taken to go the same way at the requests per minute that are known for it.
        """
        now = self._clock.now()
        if now - self._looked_at >= self.AGE_MS:
            try:
                self._depth = self._queue.depth()
                self._groups = self._limits.groups()
            except StoreBusy:
                return None
            self._looked_at = now
        return expected_start(self._groups, model_group, self._depth, now)


def _waits(job: Job) -> bool:
    """A repeat sends a waiting job's message again: the first submit may have died before it was sent.

    Not a parked job's: that one the sweep sends.
    """
    began = job.attempts_used > 0 or job.snoozes > 0 or job.not_before is not None
    return not began and job.state == "queued"


def _conflict(job: Job) -> Conflict:
    named = job.custom_id is not None and job.job_id == _id_by_name(job.tenant, job.custom_id)
    name = f"custom_id {job.custom_id!r}" if named else "this Idempotency-Key"
    return Conflict(
        f"{name} stands for another request already (job {job.job_id}); "
        "use another one, or send each run with an Idempotency-Key of its own"
    )


def _id_by_name(tenant: str, custom_id: str) -> str:
    return derived_job_id(tenant, "custom_id", custom_id)


def params_text(params: Mapping[str, Any]) -> str:
    """Return a request as it is stored and sent."""
    return json.dumps(params, ensure_ascii=False, separators=(",", ":"))


def input_chars(params: Mapping[str, Any]) -> int:
    """Count the characters that become input tokens.

    Base64 data is no text: its length says little about its tokens. An image counts as the characters of about 1,600
    tokens whatever its size, a document as one character per 60 bytes and no less than an image. All of a request's
    data together counts for at most `MOST_MEDIA_CHARS`, so that such a guess alone never makes it too large for a
    limit group: what more it uses is settled after the call.
    """
    media = 0

    def count(value: object) -> int:
        nonlocal media
        if isinstance(value, str):
            return len(value)
        if isinstance(value, Mapping):
            data = value.get("data")
            if value.get("type") == "base64" and isinstance(data, str):
                is_image = str(value.get("media_type")).startswith("image/")
                media += IMAGE_CHARS if is_image else max(IMAGE_CHARS, len(data) * 3 // 4 // 60)
                return 0
            return sum(map(count, value.values()))
        if isinstance(value, Sequence):
            return sum(map(count, value))
        return 1

    text = sum(count(params.get(name, "")) for name in ("system", "messages", "tools"))
    return text + min(media, MOST_MEDIA_CHARS)
