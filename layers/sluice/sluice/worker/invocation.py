"""What everything in one invocation of a worker shares."""

from __future__ import annotations

from dataclasses import dataclass

from sluice.domain.jobs import Job
from sluice.domain.waits import LONGEST_DELAY_MS, Place, place_of, window_of
from sluice.worker.endings import Wait
from sluice.worker.keys import KeyChoice
from sluice.worker.ledger import Ledger
from sluice.worker.limiter import Limiter
from sluice.worker.memory import Memory
from sluice.worker.requests import RequestReader
from sluice.worker.source import Held
from sluice.worker.tools import Rules, Tools


@dataclass(frozen=True, slots=True)
class Invocation:
    """One invocation: its time, and what its jobs share."""

    tools: Tools
    rules: Rules
    limiter: Limiter
    keys: KeyChoice
    ledger: Ledger
    memory: Memory
    requests: RequestReader
    held: Held
    owner: str
    """Owner of the leases it takes."""
    started: int
    """Epoch milliseconds."""
    stop_at: int
    """When calls must have ended, in epoch milliseconds."""

    @property
    def whole_ms(self) -> int:
        """The time for calls, from its start."""
        return self.stop_at - self.started

    def now(self) -> int:
        """Return the time in epoch milliseconds."""
        return self.tools.clock.now()

    def left(self) -> int:
        """Return the milliseconds that are left for calls."""
        return self.stop_at - self.now()

    def spread(self, milliseconds: int) -> int:
        """Return a random time up to this one."""
        return int(self.tools.jitter() * milliseconds)

    def window(self, job: Job) -> int:
        """Return the milliseconds that a call of this job should have before it."""
        return window_of(job.max_tokens, self.whole_ms, full_window=job.full_window)

    def in_queue(self, delay_ms: int) -> Wait:
        """Return a wait in the queue."""
        return Wait(self.now() + min(delay_ms, LONGEST_DELAY_MS), Place.QUEUE)

    def after_call(self, delay_ms: int, job: Job) -> Wait:
        """Return the wait of a job after a call that brought no answer."""
        place = place_of(
            delay_ms,
            stay_ms=self.rules.waits.rest_ms,
            left_ms=self.left(),
            window_ms=self.window(job),
        )
        return Wait(self.now() + delay_ms, place, job)
