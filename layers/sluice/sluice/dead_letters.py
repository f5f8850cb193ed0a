"""Dead letters: mark the job, keep the raw body, so that a redrive can work from the record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from sluice.domain import jobs as life
from sluice.domain.errors import Stale
from sluice.domain.jobs import Job, JobError, State
from sluice.ports import Clock, Events, JobStore, Received


class Graveyard(Protocol):
    """Keeps the raw bodies of dead letters."""

    def keep(self, message: Received, reason: str) -> None:
        """Store the body with its reason; keeping it again changes nothing."""
        ...


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message of the dead-letter queue; `reason` is what the worker wrote on it, if it was the worker."""

    message: Received
    reason: str | None


class TakeDeadLetter:
    """The use case behind the dead-letter queue."""

    def __init__(self, jobs: JobStore, graveyard: Graveyard, clock: Clock, events: Events) -> None:
        self._jobs = jobs
        self._graveyard = graveyard
        self._clock = clock
        self._events = events

    def __call__(self, letter: DeadLetter) -> None:
        """Keep the letter and end its job as errored, unless the job has ended or a worker is at it."""
        message = letter.message
        reason = letter.reason or f"received {message.receive_count} times without an end"
        self._graveyard.keep(message, reason)
        self._events.count("DeadLetters")
        self._events.problem(
            "dead letter", message_id=message.message_id, job_id=message.job_id, reason=reason
        )
        if message.job_id is None:
            return
        job = self._jobs.get(message.job_id)
        while job is not None and not job.state.is_final:
            now = self._clock.now()
            if job.lease is not None and job.lease.until > now:
                # A worker has it by another message; it will end the job itself.
                return
            ended = life.finish_waiting(job, State.ERRORED, now, JobError("dead_letter", reason))
            try:
                self._jobs.replace(ended, job.version)
            except Stale as stale:
                job = stale.current if isinstance(stale.current, Job) else None
            else:
                self._events.count("JobsErrored")
                return
