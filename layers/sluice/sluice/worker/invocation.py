"""What everything in one invocation of a worker shares, and how an attempt in it ends."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Final

from sluice.domain import waits
from sluice.domain.jobs import Job
from sluice.domain.waits import LONGEST_DELAY_MS, Place, place_of, window_of
from sluice.ports.claude import Body
from sluice.ports.jobs import Params
from sluice.worker.keys import KeyChoice
from sluice.worker.ledger import Ledger
from sluice.worker.limiter import Limiter
from sluice.worker.memory import Grant, Memory
from sluice.worker.source import Held
from sluice.worker.tools import Rules, Tools


@dataclass(frozen=True, slots=True)
class Done:
    """The message is done: it may be deleted."""


@dataclass(frozen=True, slots=True)
class Wait:
    """The job continues at a time (epoch milliseconds); `where` says where it waits until then."""

    until: int
    where: Place
    job: Job | None = None
    """The record as last written, if known."""


@dataclass(frozen=True, slots=True)
class Again:
    """The job continues at once, from this record."""

    job: Job


Ending = Done | Wait | Again
DONE: Final = Done()


class RequestReader:
    """Reads the stored requests of jobs that start in the same moment together."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._wanted: dict[str, asyncio.Future[Params | None]] = {}

    async def read(self, job_id: str, grant: Grant) -> Body | None:
        """Return the request, None if it is missing. Its memory is released when it is sent."""
        first = not self._wanted
        wanted = self._wanted.setdefault(job_id, asyncio.get_running_loop().create_future())
        if first:
            await self._tools.clock.sleep(0)
            await self._read_wanted()
        params = await wanted
        return None if params is None else Body(params.body, grant.sent)

    async def _read_wanted(self) -> None:
        wanted, self._wanted = self._wanted, {}
        try:
            found = await self._tools.blocking(self._tools.params.get_many, list(wanted))
        except Exception as error:  # noqa: BLE001 - raised in each that waits
            for future in wanted.values():
                future.set_exception(error)
        else:
            for job_id, future in wanted.items():
                future.set_result(found.get(job_id))


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
    """When all calls must have ended, in epoch milliseconds."""
    busy_since: dict[str, int] = field(default_factory=dict)
    """The jobs that have met a busy store in this invocation, and when each did first."""
    unconfirmed: dict[str, int] = field(default_factory=dict)
    """The jobs whose claims may be stored, although no call was made, each with the version of the claim."""

    @property
    def whole_ms(self) -> int:
        """The time for calls, from its start."""
        return self.stop_at - self.started

    def now(self) -> int:
        """Return the time in epoch milliseconds."""
        return self.tools.clock.now()

    def left(self) -> int:
        """Return the milliseconds left for calls."""
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

    def until_store(self, job_id: str, delay_ms: int, receive_count: int) -> Wait:
        """Return the wait of a job that met a busy store: in the invocation at first, which costs no receive."""
        now = self.now()
        stay_ms = self.busy_since.setdefault(job_id, now) + waits.STORE_STAY_MS - now
        place = place_of(delay_ms, stay_ms=stay_ms, left_ms=self.left())
        if place is Place.INVOCATION:
            return Wait(now + delay_ms, place)
        return self.in_queue(waits.grown(delay_ms, receive_count, waits.MOST_BUSY_MS))

    def after_call(self, delay_ms: int, job: Job) -> Wait:
        """Return the wait of a job after a call that brought no answer."""
        place = place_of(
            delay_ms,
            stay_ms=self.rules.waits.rest_ms,
            left_ms=self.left(),
            window_ms=self.window(job),
        )
        return Wait(self.now() + delay_ms, place, job)
