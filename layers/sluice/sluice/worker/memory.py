"""The memory a worker spends on the requests and answers of its jobs.

The promise: what a worker holds of requests and answers never exceeds `own` for each held job, plus `shared`, plus
the `reserve`. Everything is counted before it is read, and given back when nothing of it is held. Small jobs use their
own bytes and never wait here, whatever large ones do.

The unit is a byte of memory. What a byte of JSON costs while it is handled was measured: `REQUEST_FACTOR` and
`ANSWER_FACTOR`. See docs/decisions/0025-a-budget-of-bytes.md.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Final, Self

from sluice.ports.world import Clock
from sluice.worker.timeouts import wait_at_most

MEBIBYTE: Final = 1024 * 1024

REQUEST_FACTOR: Final = 3
"""A request is read compressed, unpacked, and sent in pieces: twice its size, and the pieces being sent."""

ANSWER_FACTOR: Final = 4
"""An answer is parsed, kept as text, and encoded and compressed to be stored."""

LARGEST_REQUEST_BYTES: Final = 8 * MEBIBYTE
"""The assumed size of a request of unknown size, of a job recorded before sizes were."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How much memory a worker may spend."""

    own: int = 256 * 1024
    """Bytes that each held job may use without a request; 30 MiB for the 120 of a worker."""
    shared: int = 96 * MEBIBYTE
    """Bytes shared by large requests and by answers beyond `own`."""
    most_answer: int = 8 * MEBIBYTE
    """The longest answer that is read, in bytes of JSON.

    The longest output is 128,000 tokens, about half a megabyte of text and a megabyte as JSON. The rest is for what
    server tools put into an answer (a PDF that was fetched, say), which nobody limits.
    """

    @property
    def reserve(self) -> int:
        """Kept for one answer that needs more when no shared memory is left, so that one can always be read."""
        return self.most_answer * ANSWER_FACTOR


BUDGET: Final = Budget()
"""Of a worker of 512 MB: 120 MB are imports, 30 its jobs' own, 96 shared, 32 the reserve."""


@dataclass(eq=False, slots=True)
class Grant:
    """The memory of one job's call. As a context manager it releases everything on leaving."""

    memory: Memory
    request: int = 0
    """Of the shared bytes, for the request."""
    answer: int = 0
    """The same, for the answer."""
    has_reserve: bool = False

    def take_now(self, request_bytes: int) -> bool:
        """Take the memory for a request if it is free and no other request waits; True also if it was taken before."""
        amount = self.memory.wants(request_bytes)
        if amount > self.request:
            if not self.memory.has_free(amount):
                return False
            self.request = amount
        return True

    async def take(self, request_bytes: int, patience_ms: int) -> bool:
        """Wait for the memory for a request; False if it does not become free in time."""
        return await self.memory.wait_in_line(self, self.memory.wants(request_bytes), patience_ms)

    def sent(self) -> None:
        """Release the memory of the request, which is no longer held."""
        self.request = 0
        self.memory.hand_out()

    async def grow(self, answer_bytes: int) -> None:
        """Wait until an answer of this total size may be held.

        Answers in flight have precedence over requests, because they release their memory sooner. There is no deadlock:
        the answer with the reserve never waits.
        """
        own = self.memory.budget.own
        more = answer_bytes * ANSWER_FACTOR - own
        if more > self.answer and not self.has_reserve:
            # In steps, so that a long stream does not request memory at each event.
            await self.memory.wait_to_grow(self, -(-more // own) * own)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.request = self.answer = 0
        self.has_reserve = False
        self.memory.forget(self)


@dataclass(eq=False, slots=True)
class _Wish:
    grant: Grant
    amount: int
    granted: asyncio.Event = field(default_factory=asyncio.Event)


class Memory:
    """One worker's."""

    def __init__(self, clock: Clock, budget: Budget = BUDGET) -> None:
        self.budget = budget
        self._clock = clock
        self._grants: set[Grant] = set()
        self._answers: deque[_Wish] = deque()
        self._requests: deque[_Wish] = deque()

    def grant(self) -> Grant:
        """Return an empty grant."""
        grant = Grant(self)
        self._grants.add(grant)
        return grant

    def wants(self, request_bytes: int) -> int:
        """Return how many shared bytes a request needs; one that is larger than all of them needs all."""
        most = (request_bytes or LARGEST_REQUEST_BYTES) * REQUEST_FACTOR
        return 0 if most <= self.budget.own else min(most, self.budget.shared)

    @property
    def waiting(self) -> int:
        """How many jobs wait for the memory for their requests."""
        return len(self._requests)

    @property
    def used(self) -> int:
        """How many of the shared bytes are taken, without the reserve."""
        return sum(grant.request + grant.answer for grant in self._grants)

    # For grants -------------------------------------------------------------------------------------------------

    def has_free(self, amount: int) -> bool:
        """Return whether this much is free and no request waits for it."""
        return not self._requests and self._fits(amount)

    async def wait_in_line(self, grant: Grant, amount: int, patience_ms: int) -> bool:
        """Wait for the memory for a request, behind earlier ones."""
        wish = _Wish(grant, amount)
        self._requests.append(wish)
        self.hand_out()
        try:
            await wait_at_most(wish.granted, self._clock, patience_ms)
        finally:
            if not wish.granted.is_set():
                self._requests.remove(wish)
                # The next one in line may be smaller.
                self.hand_out()
        return wish.granted.is_set()

    async def wait_to_grow(self, grant: Grant, amount: int) -> None:
        """Wait until an answer may take so much."""
        wish = _Wish(grant, amount)
        self._answers.append(wish)
        self.hand_out()
        try:
            await wish.granted.wait()
        finally:
            if not wish.granted.is_set():
                self._answers.remove(wish)

    def hand_out(self) -> None:
        """Give free memory to those that wait: answers first, then requests in order of arrival."""
        for wish in list(self._answers):
            if self._fits(wish.amount - wish.grant.answer):
                wish.grant.answer = wish.amount
            elif not any(grant.has_reserve for grant in self._grants):
                wish.grant.has_reserve = True
            else:
                continue
            self._answers.remove(wish)
            wish.granted.set()
        while self._requests and self._fits(self._requests[0].amount):
            wish = self._requests.popleft()
            wish.grant.request = wish.amount
            wish.granted.set()

    def forget(self, grant: Grant) -> None:
        """Note that a call has ended."""
        self._grants.discard(grant)
        self.hand_out()

    def _fits(self, amount: int) -> bool:
        return self.used + amount <= self.budget.shared
