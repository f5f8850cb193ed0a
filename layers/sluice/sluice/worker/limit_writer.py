"""Reads and writes the shared limit groups for one worker.

A write contains all pending changes of its group: reservations, settlements, observed headers, blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from sluice.domain.errors import StoreBusy
from sluice.domain.limits import (
    DRAINED_MS,
    WAITING_MS,
    Cost,
    Group,
    Observation,
    breakers_of,
    drained,
    free_at,
    is_bound_by_output,
    lined_up,
    new_group,
    observe,
    reserve,
    restated,
    settle,
    taken,
)
from sluice.domain.waits import Waits
from sluice.ports.limits import LimitStore
from sluice.ports.swap import swap
from sluice.ports.world import Blocking, Clock, Events, Jitter
from sluice.worker.limit_books import (
    LEAST_BLOCK,
    Admission,
    Books,
    Claimant,
    Line,
    Moved,
    Parcel,
    Settles,
    Unsure,
    Waiter,
)

WATCH_MS: Final = 800
"""Maximum age of the shared state while jobs wait for it."""

FRESH_MS: Final = 50
"""Maximum age of the view of a group for a reservation: a read is cheaper than a lost race."""

SOON_MS: Final = 100
"""A block that starts within this time is written even if it is small."""

MOST_RECENT: Final = 16
"""Number of writes that a group remembers; after that many others, one whose response was lost counts as not done."""

CONFLICT_MS: Final = 20
"""Longest pause after a lost race."""

MOST_CONFLICTS: Final = 100
"""Races that one write may lose in a row: about two seconds."""

assert FRESH_MS < WATCH_MS


@dataclass(frozen=True, slots=True)
class _Plan:
    """One write as it is planned: the group before and after, and the waiters that get a start time."""

    now: int
    before: Group
    after: Group
    waiting: Sequence[Waiter]
    costs: Sequence[Cost]
    probes: Sequence[bool]
    starts: Sequence[int]

    @property
    def is_news(self) -> bool:
        """Whether anything but the numbers of waiting jobs changes."""
        return replace(self.after, waiting=self.before.waiting) != self.before

    @property
    def is_worth_its_write(self) -> bool:
        """Whether the block is full, or starts soon."""
        if not self.starts:
            return False
        is_full = len(self.starts) >= min(LEAST_BLOCK, len(self.waiting))
        return is_full or min(self.starts) <= self.now + SOON_MS


class LimitWriter:
    """One worker's views of all groups it uses, synchronized with the store."""

    def __init__(  # noqa: PLR0913, PLR0917 - what a limiter needs of the world
        self,
        store: LimitStore,
        blocking: Blocking,
        clock: Clock,
        jitter: Jitter,
        events: Events,
        waits: Waits,
        line: Line,
        limiter: Settles,
    ) -> None:
        self._store = store
        self._blocking = blocking
        self._clock = clock
        self._jitter = jitter
        self._name = f"{int(jitter() * 2**48):012x}"
        """Distinguishes this worker's writes from those of others."""
        self._events = events
        self._waits = waits
        self._line = line
        self._limiter = limiter
        self.books: dict[str, Books] = {}
        self.moved: dict[str, str] = {}
        """Groups created under a key's name, with the organization that each belongs to."""
        self.writes = 0
        """Conditional writes tried since the worker started."""

    # Reading ----------------------------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Read the groups for which jobs wait, unless their views are recent."""
        now = self._clock.now()
        wanted = {
            claimant.group: claimant
            for waiter in self._line.waiters
            for claimant in waiter.claimants
        }
        ahead = [group for group, books in self.books.items() if books.has_start_ahead]
        stale = [
            group
            for group in dict.fromkeys([*wanted, *ahead])
            if group not in self.books or now - self.books[group].read_at >= WATCH_MS
        ]
        if not stale:
            return
        found = await self._blocking(self._store.load, stale)
        now = self._clock.now()
        for name in stale:
            self._take_in(name, found.get(name), wanted.get(name), now)
        for name, claimant in wanted.items():
            stated = dict(claimant.stated)
            if self.books[name].group.stated != stated:
                self.books[name].change(partial(_restated, stated), now)

    def _take_in(
        self, name: str, current: Group | None, claimant: Claimant | None, now: int
    ) -> None:
        """Use the group as read, maybe for the first time."""
        books = self.books.get(name)
        if books is None:
            assert claimant is not None
            stated = dict(claimant.stated)
            fresh = new_group(claimant.organization, claimant.model_group, now, stated)
            books = self.books[name] = Books(current or fresh, now)
        elif current is None and books.group.version:
            self._start_anew(books, now)
        self._learn(books, current or books.group, now)

    @staticmethod
    def _start_anew(books: Books, now: int) -> None:
        """Forget a group whose item was deleted, so that its limits and blocks are learned again."""
        old = books.group
        fresh = new_group(old.organization, old.model_group, now, old.stated)
        books.group = replace(fresh, epoch=old.epoch + 1)
        books.revoke()

    def _learn(self, books: Books, current: Group, now: int, *, certain: bool = False) -> None:
        """Use the stored group, and revoke start times that it invalidates."""
        books.read_at = now
        if current.version < books.group.version and not certain:
            return
        if current.epoch != books.group.epoch:
            books.revoke(current.epoch)
        books.group = current
        if current.moved_to is not None:
            self.moved[current.id] = current.moved_to
            for waiter in list(self._line.waiters):
                if any(claimant.group == current.id for claimant in waiter.claimants):
                    self._line.answer(waiter, Moved())

    async def _look_again(self, books: Books) -> None:
        """Read the group, unless this was just done: a read is cheaper than a lost race."""
        if self._clock.now() - books.read_at > FRESH_MS:
            found = await self._blocking(self._store.load, [books.group.id])
            self._learn(books, found.get(books.group.id, books.group), self._clock.now())

    async def _make_sure(self, books: Books) -> None:
        """Find out which writes whose response was lost were done; raises StoreBusy if that cannot be read either."""
        found = await self._blocking(self._store.load, [books.group.id])
        current = found.get(books.group.id)
        if current is not None:
            self._learn(books, current, self._clock.now())
        unsure, books.unsure = books.unsure, []
        for each in reversed(unsure):
            if current is None or each.token not in current.recent_writes:
                books.put_back(each.parcel)
                continue
            for cost in each.reserved:
                # No job got these start times.
                books.give_back(each.epoch, cost, self._clock.now())

    # Writing ----------------------------------------------------------------------------------------------------

    def as_in_line(self, group: Group, count: int, now: int) -> Group:
        """Return the group with the number of jobs that wait here."""
        return lined_up(group, self._name, count, now)

    def owes_word(self, group: Group, now: int) -> bool:
        """Return whether other workers may take their jobs for the last, not knowing of those here."""
        is_drained = now - max(self._line.drained_at, group.drained_at) < DRAINED_MS
        if not is_drained or not is_bound_by_output(group):
            return False
        _, said_at = group.waiting.get(self._name, (0, 0))
        return now - said_at >= WAITING_MS // 2 and self._line.counts()[group.id] > 0

    async def write(self, books: Books, waiters: Sequence[Waiter] = ()) -> None:
        """Write all pending changes to the shared group, in one conditional write."""
        async with books.writing:
            if books.unsure:
                await self._make_sure(books)
            must = books.urgent or self._clock.now() >= books.due_at
            if waiters and not books.urgent:
                await self._look_again(books)
            parcel = books.take()
            for _ in range(MOST_CONFLICTS):
                plan = self._plan(books, parcel, waiters)
                if not plan.is_news and not self.owes_word(plan.before, plan.now):
                    return
                if waiters and not must and not plan.is_worth_its_write:
                    # Another worker was quicker: settlements can be written with the next block.
                    books.put_back(parcel)
                    return
                if await self._is_written(books, parcel, plan):
                    return
                await self._clock.sleep(int(CONFLICT_MS * self._jitter()) + 1)
            books.put_back(parcel)
            what = f"the limit group, changed concurrently {MOST_CONFLICTS} times,"
            raise StoreBusy(what)

    def _plan(self, books: Books, parcel: Parcel, waiters: Sequence[Waiter]) -> _Plan:
        """Return the write of all pending changes to the group as known now."""
        now, group = self._clock.now(), books.group
        waiting = [waiter for waiter in waiters if not waiter.answer.done()]
        in_line = self._line.counts()[group.id]
        new = self._posted(books, parcel, self.as_in_line(group, in_line, now), now)
        priced = ((waiter, waiter.cost(new)) for waiter in waiting)
        timed = ((waiter, cost, waiter.horizon(new, cost, now)) for waiter, cost in priced)
        # One whose breaker or workspace was closed meanwhile must not keep the others from their start times.
        in_time = [each for each in timed if free_at(new, each[1], now) <= now + each[2]]
        waiting = [waiter for waiter, _, _ in in_time]
        costs = [cost for _, cost, _ in in_time]
        horizons = [horizon_ms for _, _, horizon_ms in in_time]
        probes = [bool(breakers_of(new, cost.ties)) for cost in costs]
        new, starts = reserve(new, costs, now, horizons, self._waits)
        given = zip(waiting[: len(starts)], costs, strict=False)
        new = taken(new, [(waiter.owner, cost) for waiter, cost in given], now)
        return _Plan(now, group, new, waiting, costs, probes, starts)

    def _posted(self, books: Books, parcel: Parcel, group: Group, now: int) -> Group:
        """Return the group with the changes of the parcel."""
        new = settle(group, parcel.settlements, now)
        for at, headers in parcel.observations[-1:]:
            new = observe(new, Observation(at, headers.seen, books.pending(at)), now)
        for change in parcel.changes:
            new = change(new, now)
        # With the time of the observation: meanwhile jobs may wait again.
        return drained(new, self._line.drained_at)

    async def _is_written(self, books: Books, parcel: Parcel, plan: _Plan) -> bool:
        """Write, and answer the waiters with their start times; False if another worker was quicker."""
        group, left = plan.before, self._line.counts()[plan.before.id] - len(plan.starts)
        token = f"{self._name}.{self.writes}"
        written = replace(
            self.as_in_line(plan.after, left, plan.now),
            version=group.version + 1,
            recent_writes=(*group.recent_writes, token)[-MOST_RECENT:],
        )
        self.writes += 1
        try:
            stored = await self._blocking(swap, self._store.replace, written, group.version)
        except StoreBusy:
            # It may have been done: the next write finds out before it repeats anything.
            reserved = plan.costs[: len(plan.starts)]
            books.unsure.append(Unsure(token, written.epoch, parcel, reserved))
            books.due_at = self._clock.now()
            raise
        now = self._clock.now()
        if stored is None:
            self._start_anew(books, now)
            return False
        if stored != written:
            # The store is right, even with a lower version: the item may have been deleted.
            self._learn(books, stored, now, certain=True)
            return False
        self._learn(books, written, now)
        self._report_block(group, written, plan.now)
        self._give_out(books, written, plan)
        return True

    def _report_block(self, before: Group, after: Group, now: int) -> None:
        for name, each in after.workspaces.items():
            known = before.workspaces.get(name)
            if each.blocked_until > max(now, known.blocked_until if known else 0):
                self._events.note(
                    "workspace blocked",
                    limit_group=after.id,
                    workspace=name,
                    until=each.blocked_until,
                    seconds=(each.blocked_until - now) // 1000,
                    reason=each.blocked_reason,
                    by=each.blocked_by,
                )
        if after.blocked_until > max(now, before.blocked_until):
            self._events.note(
                "limit group blocked",
                limit_group=after.id,
                until=after.blocked_until,
                seconds=(after.blocked_until - now) // 1000,
                reason=after.blocked_reason,
                by=after.blocked_by,
            )

    def _give_out(self, books: Books, group: Group, plan: _Plan) -> None:
        planned = zip(plan.waiting, plan.starts, plan.costs, plan.probes, strict=False)
        for waiter, start, cost, is_probe in planned:
            if waiter.answer.done():
                # It left while its reservation was written: release that.
                books.give_back(group.epoch, cost, self._clock.now())
                continue
            admission = Admission(
                self._limiter,
                waiter.claimant(group.id),
                start,
                group.epoch,
                cost,
                waiter.input_chars,
                is_probe,
            )
            books.open.append(admission)
            self._line.answer(waiter, admission)


def _restated(stated: Mapping[str, int], group: Group, now: int) -> Group:
    return restated(group, stated, now)
