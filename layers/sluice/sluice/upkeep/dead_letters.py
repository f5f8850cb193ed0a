"""Dead letters: each is stored and ends its job as errored; an operator can redrive such jobs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Protocol

from sluice.domain.errors import IllegalTransition, StoreBusy
from sluice.domain.jobs import (
    DEAD_LETTER,
    Job,
    JobError,
    State,
    billed_rows,
    finish_waiting,
    left_to_worker_ms,
    redrive,
    why_not_redriven,
)
from sluice.domain.limits import new_group
from sluice.domain.models import model_group
from sluice.domain.pricing import PriceList, Usage, utc_day
from sluice.ports.jobs import CallBooks, JobStore, ParamsStore, Received
from sluice.ports.limits import LimitStore
from sluice.ports.swap import Deleted, Kept, Written, change, swap
from sluice.ports.world import Clock, Events
from sluice.upkeep.booking import book

PARALLEL_READS: Final = 16


@dataclass(frozen=True, slots=True)
class KeptLetter:
    """A stored dead letter: the message, the reason, and when it was stored (epoch ms)."""

    message_id: str
    job_id: str | None
    reason: str
    receive_count: int
    sent_at: int
    body: str
    kept_at: int


class DeadLetterStore(Protocol):
    """The stored dead letters."""

    def keep(self, message: Received, reason: str) -> None:
        """Store a message with its reason; storing it again changes nothing."""
        ...

    def letters(self) -> Iterator[KeptLetter]:
        """Return all letters, in no particular order."""
        ...

    def letter(self, message_id: str) -> KeptLetter | None:
        """Return one letter."""
        ...


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message of the dead-letter queue; `reason` is set if a worker sent it there."""

    message: Received
    reason: str | None


class TakeDeadLetter:
    """The use case behind the dead-letter queue."""

    def __init__(
        self,
        jobs: JobStore,
        kept: DeadLetterStore,
        ledger: CallBooks,
        clock: Clock,
        events: Events,
    ) -> None:
        self._jobs = jobs
        self._kept = kept
        self._ledger = ledger
        self._clock = clock
        self._events = events

    def __call__(self, letter: DeadLetter) -> bool:
        """Store the letter and end its job as errored, unless the job has another message to come.

        If the job has ended before, its worker may have died before it booked the calls, and no other message leads to
        them: they are booked now. Returns False if a worker runs the job, or has ended it just now: it may return the
        message that is now a dead letter, or still book the calls, so the letter must be received again.
        """
        message = letter.message
        job = self._jobs.get(message.job_id) if message.job_id is not None else None
        if job is not None and self._is_in_hands(job):
            return False
        reason = letter.reason or f"received {message.receive_count} times without being deleted"
        self._kept.keep(message, reason)
        self._events.count("DeadLetters")
        self._events.problem(
            "dead letter", message_id=message.message_id, job_id=message.job_id, reason=reason
        )
        return job is None or self._ended(job, message, JobError(DEAD_LETTER, reason))

    def _ended(self, job: Job, message: Received, error: JobError) -> bool:
        """End the job if it depends on the message; False if a worker has started it meanwhile."""

        def ended(job: Job) -> Job:
            if job.is_leased(self._clock.now()) or not self._depends_on(job, message):
                return job
            return finish_waiting(job, State.ERRORED, self._clock.now(), error)

        match change(self._jobs.replace, job, ended, f"job {job.job_id}"):
            case Written():
                self._events.count("JobsErrored")
                return True
            case Kept(job) if self._is_in_hands(job):
                return False
            case Kept(job):
                if job.state.is_final:
                    book(self._ledger, billed_rows(job), self._events)
                return True
            case Deleted():
                return True

    def _is_in_hands(self, job: Job) -> bool:
        """Return whether a worker runs the job, or has its calls to book."""
        now = self._clock.now()
        return job.is_leased(now) or (job.state.is_final and left_to_worker_ms(job, now) > 0)

    def _depends_on(self, job: Job, message: Received) -> bool:
        """Return whether the job has not ended and will get no other message than this one."""
        if job.state.is_final:
            return False
        if job.not_before is not None and job.not_before > self._clock.now():
            return False  # the sweep sends a new message
        return not job.redrives or message.sent_at > job.redrives[-1].at


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimated cost of a job in micro-dollars, from the price list."""

    likely: int
    """With the mean output of its limit group."""
    most: int
    """With `max_tokens` of output."""

    def __add__(self, other: Estimate) -> Estimate:
        return Estimate(self.likely + other.likely, self.most + other.most)


@dataclass(frozen=True, slots=True)
class Candidate:
    """The current job of a letter, and whether it can be redriven."""

    letter: KeptLetter
    job: Job | None
    hindrance: str | None = None
    """Why it cannot be redriven; None if it can."""
    estimate: Estimate | None = None
    """None if it cannot be redriven, or its model has no price."""


class Redriver:
    """The operator's use case: list dead letters, and make the jobs that ended because of them runnable again.

    It uses the stored records: the message was only a pointer to the request.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - its tools
        self,
        jobs: JobStore,
        params: ParamsStore,
        limits: LimitStore,
        kept: DeadLetterStore,
        prices: PriceList,
        model_groups: Mapping[str, str],
        clock: Clock,
    ) -> None:
        self._jobs = jobs
        self._params = params
        self._limits = limits
        self._kept = kept
        self._prices = prices
        self._model_groups = model_groups
        self._clock = clock

    def letters(self, reason: str | None = None) -> list[KeptLetter]:
        """Return the letters whose reason contains a text, oldest first."""
        wanted = (reason or "").casefold()
        found = [each for each in self._kept.letters() if wanted in each.reason.casefold()]
        return sorted(found, key=lambda each: (each.kept_at, each.message_id))

    def letter(self, message_id: str) -> KeptLetter | None:
        """Return one letter."""
        return self._kept.letter(message_id)

    def candidates(self, letters: Sequence[KeptLetter]) -> list[Candidate]:
        """Return for each letter whether its job can be redriven, and the estimated cost. Writes nothing."""
        ids = [each.job_id for each in letters if each.job_id is not None]
        found = self._jobs.get_many(list(dict.fromkeys(ids)))
        means = self._mean_outputs()
        first: dict[str, str] = {}
        for each in letters:
            if each.job_id is not None:
                first.setdefault(each.job_id, each.message_id)

        def judged(letter: KeptLetter) -> Candidate:
            if letter.job_id is None:
                return Candidate(letter, None, "not a Sluice message")
            job = found.get(letter.job_id)
            if job is None:
                return Candidate(letter, None, "job record not found")
            hindrance = why_not_redriven(job, self._clock.now())
            if hindrance is None and first[job.job_id] != letter.message_id:
                hindrance = f"duplicate of letter {first[job.job_id]} (same job)"
            if hindrance is None and not self._params.get_many([job.job_id]):
                hindrance = "the stored request has expired"
            if hindrance is not None:
                return Candidate(letter, job, hindrance)
            return Candidate(letter, job, None, self._estimate(job, means))

        with ThreadPoolExecutor(PARALLEL_READS) as threads:
            return list(threads.map(judged, letters))

    def redrive(self, candidate: Candidate) -> Candidate:
        """Make one job runnable again; return its new record, or why it was not redriven."""
        job = candidate.job
        if job is None or candidate.hindrance is not None:
            return candidate
        try:
            redriven = redrive(job, self._clock.now())
            stored = swap(self._jobs.replace, redriven, job.version)
        except IllegalTransition as late:
            return Candidate(candidate.letter, job, str(late))
        except StoreBusy as busy:
            # The other letters continue. Repeating the redrive is safe: a job is redriven once.
            return Candidate(candidate.letter, job, str(busy))
        if stored is not redriven:
            return Candidate(candidate.letter, job, "the job was changed concurrently; try again")
        return Candidate(candidate.letter, redriven, None, candidate.estimate)

    def _mean_outputs(self) -> Mapping[str, tuple[int, int]]:
        """Return the learned characters per 1,000 tokens and the mean output of each model group."""
        groups = sorted(self._limits.groups(), key=lambda group: group.samples)
        return {
            each.model_group: (each.chars_per_1000_tokens, each.output_estimate) for each in groups
        }

    def _estimate(self, job: Job, means: Mapping[str, tuple[int, int]]) -> Estimate | None:
        name = model_group(job.model, self._model_groups, job.tenant)
        guess = new_group("", name, 0)
        chars, output = means.get(name, (guess.chars_per_1000_tokens, guess.output_estimate))
        prompt = -(-job.input_chars * 1000 // chars)
        day = utc_day(self._clock.now())

        def cost(output_tokens: int) -> int | None:
            usage = Usage(input_tokens=prompt, output_tokens=output_tokens)
            return self._prices.cost_micro_usd(job.model, usage, day, batch=job.lane == "batch")

        likely, most = cost(min(output, job.max_tokens)), cost(job.max_tokens)
        return None if likely is None or most is None else Estimate(likely, most)
