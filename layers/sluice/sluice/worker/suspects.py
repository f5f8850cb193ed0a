"""Jobs that may kill workers, kept apart from the other jobs of this worker.

A job that has lost several workers is a suspect, and so is everything that was in flight beside it. Suspects wait until
the worker holds nothing else. Then a few run concurrently, and those that lose a worker even so run alone: a job whose
worker dies then is the cause, and no other job's call is wasted. See
docs/decisions/0026-suspects-run-apart.md.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

REFILL_MS: Final = 30_000
"""How long a worker continues to take other messages while it holds a suspect."""


@dataclass(eq=False, slots=True)
class _Suspect:
    most: int
    """In flight, itself included."""
    may_run: asyncio.Event = field(default_factory=asyncio.Event)


class Suspects:
    """One invocation's."""

    def __init__(self, now: Callable[[], int], held: Callable[[], int]) -> None:
        """`held`: how many jobs the invocation has, or is about to have; suspects included."""
        self._now = now
        self._held = held
        self._waiting: deque[_Suspect] = deque()
        self._running: list[_Suspect] = []
        self._since = 0

    @property
    def refill_until(self) -> int | None:
        """Until when more messages may be taken; None without a suspect. 0 while one runs."""
        if self._running:
            return 0
        return self._since + REFILL_MS if self._waiting else None

    @asynccontextmanager
    async def turn(self, most: int | None) -> AsyncIterator[None]:
        """Wait until nothing else is held, and no more than `most` suspects run; None: the job is no suspect."""
        if most is None:
            yield
            return
        suspect = _Suspect(most)
        if not self._waiting and not self._running:
            self._since = self._now()
        self._waiting.append(suspect)
        self.look()
        try:
            await suspect.may_run.wait()
            yield
        finally:
            (self._running if suspect in self._running else self._waiting).remove(suspect)
            self.look()

    def look(self) -> None:
        """Start the suspects that may run, in order of arrival."""
        while self._waiting and self._held() == len(self._waiting) + len(self._running):
            first = self._waiting[0]
            if len(self._running) + 1 > min(each.most for each in (first, *self._running)):
                return
            self._running.append(self._waiting.popleft())
            first.may_run.set()
