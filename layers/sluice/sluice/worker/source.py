"""The source of a worker's jobs, and what a source may know about its worker."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from sluice.domain.jobs import Job
from sluice.ports.jobs import Received
from sluice.ports.world import Clock
from sluice.worker.memory import Memory
from sluice.worker.suspects import Suspects
from sluice.worker.timeouts import wait_at_most


@dataclass(frozen=True, slots=True)
class Taken:
    """A message taken from a source, and the job it names."""

    message: Received
    job_id: str
    job: Job | None
    """None: it could not be read; the worker reads it on its own."""
    is_scout: bool = False
    """Taken to find out whether the queue has a job that can start at once; if it cannot, it is returned soon."""
    linger_until: int = 0
    """A job that cannot start soon is not returned before this time (epoch milliseconds)."""
    batch_id: str = ""
    """The batch of a row."""


class Source(Protocol):
    """A queue of jobs, or a range of rows."""

    async def take(self, held: Held) -> Sequence[Taken]:
        """Wait for the next jobs to run; empty if no job is held and no more will come."""
        ...

    def done(self, message: Received) -> None:
        """Note that a message is done."""
        ...

    def give_back(self, message: Received, until: int) -> None:
        """Note that the message's job continues at a time (epoch milliseconds)."""
        ...

    async def keep(self, unwritten: Collection[str], *, last: bool = False) -> bool:
        """Keep the held messages hidden, and write the noted changes; return whether all are written.

        The messages of `unwritten` jobs are not deleted: the ledger lacks calls of theirs, which the next receiver of
        such a message writes. `last`: changes that cannot be written now are logged and dropped.
        """
        ...


class Held:
    """The jobs that one invocation holds."""

    def __init__(self, clock: Clock, memory: Memory) -> None:
        self._clock = clock
        self._memory = memory
        self._tasks: set[asyncio.Task[None]] = set()
        self._calls = 0
        self._takes = 0
        self.memory_waits = 0
        """How often a job waited for memory."""
        self.changed = asyncio.Event()
        self.misses = 0
        """Jobs in a row that could not start soon, since the last call."""
        self.is_short = False
        """The last of them waits for capacity of its limit, not for the end of a block: those behind it also would."""
        self._leaving = 0
        self.suspects = Suspects(clock.now, lambda: len(self._tasks) + self._takes)

    @property
    def count(self) -> int:
        """The number of held jobs."""
        return len(self._tasks)

    @property
    def waiting(self) -> int:
        """The number of jobs that wait for their start, not counting those that wait for memory, or to be returned."""
        return len(self._tasks) - self._calls - self._memory.waiting - self._leaving

    def hold(self, task: asyncio.Task[None]) -> None:
        """Add a job; its task's end removes it."""
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Keep suspects waiting: jobs are about to be held."""
        self._takes += 1
        try:
            yield
        finally:
            self._takes -= 1
            # Not before the worker holds what was taken.
            asyncio.get_running_loop().call_soon(self.suspects.look)

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Count a job as one that waits for its answer."""
        self._calls += 1
        self.misses = 0
        self.changed.set()
        try:
            yield
        finally:
            self._calls -= 1

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Do not count a job as waiting: it will be returned."""
        self._leaving += 1
        self.changed.set()
        try:
            yield
        finally:
            self._leaving -= 1

    async def change(self, until: int | None = None) -> None:
        """Wait until something changes, or until a time (epoch milliseconds)."""
        self.changed.clear()
        if until is None:
            await self.changed.wait()
        else:
            await wait_at_most(self.changed, self._clock, until - self._clock.now())

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.remove(task)
        self.suspects.look()
        self.changed.set()
