"""Plans start times: assigns each waiting job to the group that can start it first, in blocks worth a write."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Final

from sluice.domain.breakers import model_circuit
from sluice.domain.errors import StoreBusy
from sluice.domain.limits import (
    MOST_CHARS_PER_TOKEN,
    Cost,
    Group,
    advanced,
    blocked,
    breakers_of,
    free_at,
    is_held_back,
    next_start,
    reserve,
    start_on,
    usual_gap,
)
from sluice.domain.turns import Owner, in_turns, precedence
from sluice.domain.waits import ROW_STAY_MS, Waits
from sluice.ports.world import Clock, Events, Jitter
from sluice.worker.limit_books import (
    LEAST_BLOCK,
    NO_CAPACITY,
    Admitted,
    Later,
    Line,
    Moved,
    Overloaded,
    TooLarge,
    Waiter,
)
from sluice.worker.limit_writer import CONFLICT_MS, SOON_MS, WATCH_MS, LimitWriter
from sluice.worker.timeouts import wait_at_most

BUSY_MS: Final = 10_000
"""Wait of jobs that could not be admitted because the limits could not be read."""

BLOCK_MS: Final = 15_000
"""Jobs wait in a worker at most this long for the end of a block, so that they do not keep out jobs of other groups."""

MOST_HELD_BACK: Final = 30
"""Jobs that wait in a worker for their own circuit breaker or workspace; more than probe it would only use up slots."""

HELD_BACK_MS: Final = 45_000
"""Others of them are returned for at least this time. Rows of a range stay in their invocation meanwhile."""

assert HELD_BACK_MS < ROW_STAY_MS


@dataclass(eq=False, slots=True)
class _Draft:
    """A group with the reservations planned in this turn."""

    group: Group
    full_at: int | None = None
    behind: int = 0

    def start(self, cost: Cost, now: int) -> int:
        """Return the next start; beyond the horizon, an estimate from the usual gap."""
        if self.full_at is None:
            return start_on(self.group, cost, now)
        estimate = self.full_at + self.behind * usual_gap(self.group)
        return max(estimate, free_at(self.group, cost, now))

    def leave_waiting(self, start: int) -> None:
        """Note a waiter that does not start in this turn."""
        if self.full_at is None:
            self.full_at = start
        self.behind += 1


class Planner:
    """One worker's."""

    def __init__(  # noqa: PLR0913, PLR0917 - the line, the books, and what time and chance say
        self,
        line: Line,
        writer: LimitWriter,
        clock: Clock,
        jitter: Jitter,
        events: Events,
        waits: Waits,
    ) -> None:
        self._line = line
        self._writer = writer
        self._books = writer.books
        self._clock = clock
        self._jitter = jitter
        self._events = events
        self._waits = waits
        self._wake = asyncio.Event()
        self._is_idle = False
        self._stopping = False
        self.held_back = 0
        """The number of jobs that waited for their own circuit breaker or workspace at the last turn."""

    def wake(self, *, if_idle: bool = False) -> None:
        """Start the next turn now; with `if_idle` only if none is scheduled."""
        if self._is_idle or not if_idle:
            self._wake.set()

    def start(self) -> asyncio.Task[None]:
        """Start planning until `stop`."""
        self._wake = asyncio.Event()
        self._stopping = False
        return asyncio.create_task(self._run(), name="limiter")

    def stop(self) -> None:
        """Stop it, but not during a write: it would be unknown whether it was done."""
        self._stopping = True
        self._wake.set()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            pause = await self._turn_or_problem()
            if self._stopping:
                return
            if pause is None:
                self._is_idle = True
                await self._wake.wait()
                self._is_idle = False
                continue
            # A short pause even if woken at once, so that jobs that arrive together share a write.
            await self._clock.sleep(min(pause, CONFLICT_MS))
            await wait_at_most(self._wake, self._clock, pause - CONFLICT_MS)

    async def _turn_or_problem(self) -> int | None:
        try:
            return await self._turn()
        except StoreBusy:
            self._events.problem("limits table busy")
            now = self._clock.now()
            self._line.send_away(now, Later(now + BUSY_MS, "limits table busy"))
        except Exception as error:  # noqa: BLE001 - raised in all waiting jobs
            # They must not wait forever for a failing planner.
            self._events.problem("limiter failed")
            self._line.fail(error)
        return WATCH_MS

    async def _turn(self) -> int | None:
        """Do what is due; return the milliseconds until the next task, None if none is known."""
        await self._writer.refresh()
        now = self._clock.now()
        planned = self._plan(now)
        for books in self._books.values():
            if self._writer.owes_word(books.group, now):
                books.gather(now, 0)
        due = [
            books
            for group, books in self._books.items()
            if planned.get(group) or books.urgent or now >= books.due_at
        ]
        writes = (self._writer.write(books, planned.get(books.group.id, ())) for books in due)
        # No write outlasts its turn, also if another one failed: after the last turn the worker may be frozen.
        for outcome in await asyncio.gather(*writes, return_exceptions=True):
            if outcome is not None:
                raise outcome
        return self._pause()

    def _plan(self, now: int) -> dict[str, list[Waiter]]:
        """Choose a group for each waiter that can start soon, on copies; answer those that cannot start in time."""
        counts = self._line.counts()
        drafts = {
            name: _Draft(advanced(self._writer.as_in_line(books.group, counts[name], now), now))
            for name, books in self._books.items()
        }
        planned: dict[str, list[Waiter]] = {}
        self.held_back = 0
        for waiter in self._in_turns():
            if any(claimant.group not in drafts for claimant in waiter.claimants):
                # It arrived while the groups were read: the next turn includes it.
                continue
            best = _best(waiter, drafts, now)
            if isinstance(best, TooLarge):
                self._line.answer(waiter, best)
                continue
            start, draft, cost = best
            held_back = is_held_back(draft.group, cost, now)
            if held_back and (elsewhere := _elsewhere(waiter, draft.group, now)):
                self._line.answer(waiter, elsewhere)
                continue
            if start <= min(now + waiter.horizon(draft.group, cost, now), waiter.latest_start):
                draft.group, _ = reserve(draft.group, [cost], now, start - now, self._waits)
                planned.setdefault(draft.group.id, []).append(waiter)
                continue
            later = _later(waiter, draft.group, cost, start, now)
            if held_back and later is None and self.held_back >= MOST_HELD_BACK:
                later = Later(max(start, now + HELD_BACK_MS), "others wait for the same")
            if not held_back:
                draft.leave_waiting(start)
            if later is not None:
                self._line.answer(waiter, later)
            else:
                self.held_back += held_back
        return {
            name: waiters
            for name, waiters in planned.items()
            if self._is_worth_a_write(name, waiters, now)
        }

    def _in_turns(self) -> Sequence[Waiter]:
        """Return the waiters in turns over tenants and batches, those first whose owner has had less than its share."""
        waiters = in_turns(self._line.waiters, _tenant, _owner)
        return sorted(waiters, key=self._precedence, reverse=True)

    def _precedence(self, waiter: Waiter) -> int:
        names = {claimant.group for claimant in waiter.claimants} & self._books.keys()
        groups = (self._books[name].group for name in names)
        return max((precedence(each.portions, waiter.owner) for each in groups), default=0)

    def _is_worth_a_write(self, name: str, waiters: Sequence[Waiter], now: int) -> bool:
        """Wait for a fuller block while its first job would not start at once anyway.

        A block with all that go before others is full: until those behind them may reserve, it would be too late.
        """
        group = self._books[name].group
        in_line = [
            precedence(group.portions, waiter.owner)
            for waiter in self._line.waiters
            if any(claimant.group == name for claimant in waiter.claimants)
        ]
        first = in_line.count(max(in_line, default=0))
        if len(waiters) >= min(LEAST_BLOCK, first):
            return True
        return next_start(group, waiters[0].cost(group), now) <= now + SOON_MS

    def _pause(self) -> int | None:
        now = self._clock.now()
        times: list[int] = []
        if self._line:
            times.append(now + WATCH_MS)
            for claimant in self._line.waiters[0].claimants:
                if claimant.group not in self._books:
                    return CONFLICT_MS
                times.append(self._next_look(self._books[claimant.group].group, now))
        for books in self._books.values():
            if books.urgent:
                times.append(now)
            elif books.due_at < inf:
                times.append(int(books.due_at))
            if books.has_start_ahead:
                times.append(books.read_at + WATCH_MS)
        return max(CONFLICT_MS, min(times) - now) if times else None

    def _next_look(self, group: Group, now: int) -> int:
        """Return when to write a block: once it is full, at the latest some time before its first start.

        Workers choose different moments, so that they do not all write at once.
        """
        first = self._line.waiters[0]
        cost = first.cost(group)
        start = next_start(group, cost, now)
        block = min(LEAST_BLOCK, len(self._line))
        full = start + (block - 1) * usual_gap(group) - first.horizon(group, cost, now)
        latest = start - SOON_MS // 2
        return latest if full >= latest else full + int(self._jitter() * (latest - full))


def _tenant(waiter: Waiter) -> str:
    return waiter.owner.tenant


def _owner(waiter: Waiter) -> Owner:
    return waiter.owner


def _best(
    waiter: Waiter, drafts: dict[str, _Draft], now: int
) -> tuple[int, _Draft, Cost] | TooLarge:
    """Return the group that can start a job first, with its start and cost; TooLarge if it fits into none."""
    best: tuple[int, _Draft, Cost] | None = None
    too_large: TooLarge | None = None
    for claimant in waiter.claimants:
        draft = drafts[claimant.group]
        cost = waiter.cost(draft.group, claimant)
        if _never_fits(draft.group, waiter.input_chars):
            too_large = TooLarge(cost.input_tokens, draft.group.input_tokens.limit)
            continue
        start = draft.start(cost, now)
        if best is None or start < best[0]:
            best = (start, draft, cost)
    if best is not None:
        return best
    assert too_large is not None
    return too_large


def _later(waiter: Waiter, group: Group, cost: Cost, start: int, now: int) -> Later | None:
    """Return the answer to a waiter that starts too late to wait for it in this worker; None if it is worth it."""
    blocked_until, reason = blocked(group, cost.ties)
    if blocked_until > min(waiter.latest_start, now + BLOCK_MS):
        return Later(start, reason or "blocked")
    # Before the first answer the rate is only a safe guess: a job returned now would be received too late.
    if start > waiter.latest_start and (group.has_answers or now > waiter.latest_start):
        return Later(start, NO_CAPACITY)
    return None


def _elsewhere(waiter: Waiter, group: Group, now: int) -> Admitted | None:
    """Return the answer to a waiter that need not wait for its circuit breaker or workspace; None if it must."""
    claimant = waiter.claimant(group.id)
    breaker = breakers_of(group, claimant.ties).get(model_circuit(claimant.ties.model))
    if waiter.may_fall_back and breaker is not None and breaker.open_until > now:
        return Overloaded()
    if claimant.has_other and not claimant.is_free(group, now):
        return Moved()
    return None


def _never_fits(group: Group, input_chars: int) -> bool:
    # An estimate must not end a job: only a request that is certainly too large is rejected without a call.
    bucket = group.input_tokens
    return bucket.learned and input_chars > bucket.limit * MOST_CHARS_PER_TOKEN
