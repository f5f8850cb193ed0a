"""The limiter as a worker uses it: reserve a block for many jobs in one write, wait for the start, settle later.

Jobs call `admit`, `settle` and the reactions; behind them one planner per worker reads and writes the shared groups.
A write carries everything that has gathered for its group: new reservations, settlements, observed headers, blocks.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from typing import Final, Self

from sluice.domain.errors import Stale, StoreBusy
from sluice.domain.keys import PLACEHOLDER
from sluice.domain.limits import (
    DIMENSIONS,
    DRAINED_MS,
    MOST_CHARS_PER_TOKEN,
    UNUSED,
    WAITING_MS,
    Cost,
    Group,
    Observation,
    Settlement,
    advanced,
    block,
    circuit_failed,
    circuit_served,
    drained,
    group_id,
    grown,
    is_bound_by_output,
    known,
    lined_up,
    moved,
    new_group,
    next_start,
    observe,
    recalled,
    reserve,
    restated,
    settle,
    start_on,
    usual_gap,
)
from sluice.domain.waits import USUAL, Waits
from sluice.ports.claude import NO_HEADERS, Headers
from sluice.ports.limits import LimitStore
from sluice.ports.world import Blocking, Clock, Events, Jitter

HORIZON_MS: Final = 3_000
"""How far ahead start times are given out. Short, so that a correction is soon felt by everybody."""

LEAST_BLOCK: Final = 16
"""Jobs a write should carry where the rate allows it; at slow rates the horizon grows to hold that many."""

LONGEST_HORIZON_MS: Final = 15_000
WATCH_MS: Final = 800
"""How old the shared state may be while jobs wait for it."""

SETTLE_MS: Final = 10_000
"""How long settlements may wait for a reservation to travel with."""

REFUND_MS: Final = 300
"""The same for what was reserved and not used."""

FRESH_MS: Final = 50
"""How old the view of a group may be when a block is reserved on it: a read is cheaper than a lost race."""

SOON_MS: Final = 100
PATIENCE_MS: Final = 10_000
"""After this time a large job stops giving way to small ones that others bring."""

BUSY_MS: Final = 10_000
"""How long jobs stay away that could not be admitted because the limits could not be read."""

BLOCK_MS: Final = 15_000
"""Jobs wait inside a worker for the end of a block up to this long: they must not keep other groups' jobs out."""

MOST_RECENT: Final = 16
"""Writes that a group remembers; after so many others, one whose reply was lost counts as not done."""

CONFLICT_MS: Final = 20


@dataclass(frozen=True, slots=True)
class Claimant:
    """A limit group a job could use and the key that would pay, with the pool's weight for it."""

    group: str
    organization: str
    model_group: str
    key_id: str
    stated: tuple[tuple[str, int], ...] = ()
    """Limits the key pool states for this key, per dimension."""
    circuits: tuple[str, ...] = ()
    """The breakers of what a call needs: its model and its endpoint."""


@dataclass(eq=False, slots=True)
class Admission:
    """A start time in a limit group. `settle` it exactly once, whatever happens."""

    claimant: Claimant
    start: int
    epoch: int
    reserved: Cost
    input_chars: int
    is_probe: bool = False
    """A breaker is open, and this call is to find out whether it still has to be."""
    started_at: int | None = None
    revoked: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(frozen=True, slots=True)
class Later:
    """Not in this invocation: the earliest start that can be expected, in epoch milliseconds."""

    at: int
    reason: str


@dataclass(frozen=True, slots=True)
class TooLarge:
    """The request needs more input tokens than the limit group can ever save up."""

    input_tokens: int
    limit: int


@dataclass(frozen=True, slots=True)
class Again:
    """The group is known under another name now: choose again."""


Admitted = Admission | Later | TooLarge | Again


async def until(event: asyncio.Event, clock: Clock, milliseconds: int) -> None:
    """Wait for the event, but no longer than that."""
    if milliseconds <= 0 or event.is_set():
        return
    sleeping = asyncio.ensure_future(clock.sleep(milliseconds))
    happened = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({sleeping, happened}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        sleeping.cancel()
        happened.cancel()


@dataclass(eq=False, slots=True)
class _Waiter:
    claimants: Sequence[Claimant]
    input_chars: int
    max_tokens: int
    latest_start: int
    since: int
    answer: asyncio.Future[Admitted]

    def horizon(self, group: Group, cost: Cost, now: int) -> int:
        """Return how far ahead it may reserve, at its `cost` in this group.

        At slow rates further, so that a block is worth its write; but not where it could still go to another group
        that turns out to be quicker. A large one that has waited long takes its place in the line.
        """
        usual = HORIZON_MS
        if len(self.claimants) == 1:
            usual = min(LONGEST_HORIZON_MS, max(usual, LEAST_BLOCK * usual_gap(group)))
        if now - self.since < PATIENCE_MS:
            return usual
        is_large = any(
            cost.of(name) * 60_000 > group.bucket(name).limit * usual for name in DIMENSIONS
        )
        return max(usual, self.latest_start - now) if is_large else usual

    def cost(self, group: Group, claimant: Claimant | None = None) -> Cost:
        """Return what its call will probably take, and the breakers it depends on in this group."""
        claimant = claimant or next(each for each in self.claimants if each.group == group.id)
        estimate = group.estimate(self.input_chars, self.max_tokens)
        return replace(estimate, circuits=claimant.circuits)


Change = Callable[[Group, int], Group]


@dataclass(eq=False, slots=True)
class _Draft:
    """A group as it would be after what is planned in this turn."""

    group: Group
    full_at: int | None = None
    behind: int = 0

    def start(self, cost: Cost, now: int) -> int:
        """Return the next start; once the horizon is full, a guess by the usual gap is good enough."""
        if self.full_at is None:
            return start_on(self.group, cost, now)
        return self.full_at + self.behind * usual_gap(self.group)

    def leave_waiting(self, start: int) -> None:
        """Note a waiter that does not start in this turn."""
        if self.full_at is None:
            self.full_at = start
        self.behind += 1


@dataclass(frozen=True, slots=True)
class _Parcel:
    """What one write carries beside reservations."""

    changes: list[Change]
    settlements: list[Settlement]
    observations: list[tuple[int, Headers]]
    due_at: float
    urgent: bool


@dataclass(frozen=True, slots=True)
class _Unsure:
    """A write of which nobody knows yet whether it was done."""

    token: str
    epoch: int
    parcel: _Parcel
    reserved: Sequence[Cost]


@dataclass(eq=False, slots=True)
class _Books:
    """This worker's view of one group."""

    group: Group
    read_at: int
    changes: list[Change] = field(default_factory=list)
    settlements: list[Settlement] = field(default_factory=list)
    observations: list[tuple[int, Headers]] = field(default_factory=list)
    due_at: float = inf
    """When what has gathered must be written even if no reservation takes it along."""
    urgent: bool = False
    unsure: list[_Unsure] = field(default_factory=list)
    open: list[Admission] = field(default_factory=list)
    """Reserved and not settled."""
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def change(self, change: Change, now: int) -> None:
        """Note a change that everybody should see at once."""
        self.changes.append(change)
        self.urgent = True
        self.gather(now)

    def foreseen(self, now: int) -> Group:
        """Return the group as it will be with the changes that wait to be written."""
        group = self.group
        for change in self.changes:
            group = change(group, now)
        return group

    def take(self) -> _Parcel:
        """Take out what waits to be written."""
        parcel = _Parcel(
            self.changes, self.settlements, self.observations, self.due_at, self.urgent
        )
        self.changes, self.settlements, self.observations = [], [], []
        self.due_at, self.urgent = inf, False
        return parcel

    def put_back(self, parcel: _Parcel) -> None:
        """Put it back, before what has come since."""
        self.changes[:0] = parcel.changes
        self.settlements[:0] = parcel.settlements
        self.observations[:0] = parcel.observations
        self.due_at = min(parcel.due_at, self.due_at)
        self.urgent = self.urgent or parcel.urgent

    def gather(self, now: int, within_ms: int = SETTLE_MS) -> None:
        """Note that something waits to be written."""
        self.due_at = min(self.due_at, now + within_ms)

    def give_back(self, epoch: int, reserved: Cost, now: int) -> None:
        """Note a reservation that was not used: what it holds is there for others."""
        self.settlements.append(Settlement(epoch, reserved, UNUSED))
        self.gather(now, REFUND_MS)


class Limiter:
    """One worker's door to the shared limits. Use as an async context manager around an invocation."""

    def __init__(  # noqa: PLR0913, PLR0917 - what a limiter needs of the world
        self,
        store: LimitStore,
        blocking: Blocking,
        clock: Clock,
        jitter: Jitter,
        events: Events,
        waits: Waits = USUAL,
    ) -> None:
        self._store = store
        self._blocking = blocking
        self._clock = clock
        self._jitter = jitter
        self._name = f"{int(jitter() * 2**48):012x}"
        """Tells this worker's writes from others'."""
        self._events = events
        self._waits = waits
        self._drained_at = 0
        self._books: dict[str, _Books] = {}
        self._waiters: list[_Waiter] = []
        self._wake = asyncio.Event()
        self._planner: asyncio.Task[None] | None = None
        self._idle = False
        self._stopping = False
        self.moved: dict[str, str] = {}
        """Groups begun under a key's name, and the organisation each turned out to belong to."""
        self._successors: dict[str, str] = {}
        self.writes = 0
        """Conditional writes tried since the worker started, for benches."""

    async def __aenter__(self) -> Self:
        # What was learned in the last invocation is old by now: read again before the first use.
        for books in self._books.values():
            books.read_at = 0
        self._wake = asyncio.Event()
        self._stopping = False
        self._planner = asyncio.create_task(self._plan(), name="limiter")
        return self

    async def __aexit__(self, *_: object) -> None:
        # Never in the middle of a write: it would not be known whether it was done.
        self._stopping = True
        self._wake.set()
        if self._planner is not None:
            await self._planner
            self._planner = None
        for waiter in self._waiters:
            waiter.answer.cancel()
        self._waiters.clear()
        for books in self._books.values():
            if books.due_at < inf or books.unsure:
                try:
                    await self._write(books)
                except StoreBusy:
                    # The group heals by itself: what was reserved is refilled with time.
                    self._events.problem("limits table busy", limit_group=books.group.id)

    async def admit(
        self, claimants: Sequence[Claimant], input_chars: int, max_tokens: int, latest_start: int
    ) -> Admitted:
        """Wait for a reservation in the group that can start first; Later if none starts by `latest_start`."""
        answer: asyncio.Future[Admitted] = asyncio.get_running_loop().create_future()
        since = self._clock.now()
        waiter = _Waiter(claimants, input_chars, max_tokens, latest_start, since, answer)
        self._waiters.append(waiter)
        self._wake.set()
        try:
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled():
                given = answer.result()
                if isinstance(given, Admission):
                    self.settle(given, None)
            raise
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    async def wait_for_start(self, admission: Admission) -> bool:
        """Wait until the start time. False when the plan changed meanwhile: give the reservation back and ask again."""
        await until(admission.revoked, self._clock, admission.start - self._clock.now())
        if admission.revoked.is_set() or self._is_cut_off(admission):
            return False
        admission.started_at = self._clock.now()
        return True

    def _is_cut_off(self, admission: Admission) -> bool:
        """Tell whether a breaker has opened since the start time was given."""
        return not admission.is_probe and any(
            self.is_open(admission.claimant.group, name) for name in admission.claimant.circuits
        )

    def is_open(self, group: str, circuit: str) -> bool:
        """Tell whether a breaker is open, as far as this worker knows."""
        books = self._books.get(group)
        breaker = books and books.group.circuits.get(circuit)
        return bool(breaker and breaker.is_open)

    def settle(
        self,
        admission: Admission,
        used: Cost | None,
        *,
        answered: bool = False,
        cached: bool = False,
    ) -> None:
        """Tell what the call used; None when it was never sent, so that all of it is given back.

        `answered`: `used` is real usage and teaches the estimates; `cached`: its input was partly cached.
        """
        now = self._clock.now()
        call_ms = max(1, now - (admission.started_at or now)) if answered else 0
        books = self._books[admission.claimant.group]
        if admission in books.open:
            books.open.remove(admission)
        if used is None:
            books.give_back(admission.epoch, admission.reserved, now)
        else:
            chars = admission.input_chars if answered and not cached else 0
            books.settlements.append(
                Settlement(admission.epoch, admission.reserved, used, chars, call_ms)
            )
            books.gather(now)
        if self._idle:
            self._wake.set()

    def heard(self, admission: Admission, headers: Headers, *, served: bool) -> None:
        """Take in a response's headers; `served` when it brought an answer."""
        books = self._books[admission.claimant.group]
        now = self._clock.now()
        if headers.seen:
            books.observations.append((now, headers))
            books.urgent = books.urgent or not all(
                known(books.group, dimension, seen) for dimension, seen in headers.seen.items()
            )
        if served and len(headers.seen) < len(DIMENSIONS):
            # Limits that upstream does not name are explored by its answers.
            books.changes.append(lambda group, _: grown(group))
            books.gather(now)
        if headers.seen or books.urgent:
            books.gather(now)
        if books.urgent or self._idle:
            self._wake.set()

    def throttled(  # noqa: PLR0913 - the facts of one 429
        self,
        admission: Admission,
        until: int,
        reason: str,
        *,
        ramp: bool = False,
        headers: Headers = NO_HEADERS,
        request_id: str | None = None,
    ) -> None:
        """Stop the whole group until a time: a 429, or a spend cap."""
        empty = {dimension for dimension, seen in headers.seen.items() if seen.remaining == 0}
        by = " ".join(filter(None, (admission.claimant.key_id, request_id)))
        overdrawn = empty == {"output_tokens"}
        self._react(
            admission,
            lambda group, now: block(
                group, until, reason, now, by=by, ramp=ramp, overdrawn=overdrawn
            ),
        )

    def recall(self, admission: Admission) -> None:
        """Take back the start times of a call's group, from all workers: its key is no longer accepted."""
        self._react(admission, recalled)

    def drained(self) -> None:
        """Note that nobody waits behind the jobs in hand."""
        self._drained_at = self._clock.now()

    def failed(self, admission: Admission, circuit: str) -> None:
        """Count a failure of a model or an endpoint against its breaker."""
        change = partial(
            circuit_failed, name=circuit, was_probe=admission.is_probe, waits=self._waits
        )
        self._react(admission, change)

    def works(self, admission: Admission, circuit: str) -> None:
        """Note that a model or an endpoint has served a call."""
        if circuit in self._books[admission.claimant.group].group.circuits:
            self._react(admission, partial(circuit_served, name=circuit))

    def belongs(self, admission: Admission, organization: str, headers: Headers) -> None:
        """Note whose limits a key draws on, for a group that was begun under the key's name.

        What the first answer said of the limits is the organisation's, and opens its group.
        """
        claimant = admission.claimant
        begun_by_key = claimant.organization.startswith(PLACEHOLDER)
        if not begun_by_key or claimant.group in self._successors:
            return
        now = self._clock.now()
        name = group_id(organization, claimant.model_group)
        if name not in self._books:
            self._books[name] = _Books(new_group(organization, claimant.model_group, now), 0)
        if headers.seen:
            self._books[name].observations.append((now, headers))
            self._books[name].urgent = True
            self._books[name].gather(now)
        self._books[claimant.group].change(lambda group, _: moved(group, organization), now)
        self._successors[claimant.group] = name
        self._wake.set()

    def knows(self, admission: Admission) -> bool:
        """Tell whether the limits of the call's group are known, and not a guess."""
        return self._books[admission.claimant.group].group.has_answers

    def starts_in(self, milliseconds: int) -> int:
        """Return how many calls about can start in a time, in the groups of the jobs in hand."""
        groups = self._in_line()
        in_use = [books for name, books in self._books.items() if name in groups or books.open]
        return sum(milliseconds // usual_gap(books.group) for books in in_use)

    def group(self, group: str) -> Group | None:
        """Return this worker's view of a group."""
        books = self._books.get(group)
        return books.group if books else None

    def _react(self, admission: Admission, change: Change) -> None:
        name = admission.claimant.group
        # What a first answer says holds for the organisation, not only for the key it was asked with.
        now = self._clock.now()
        for each in dict.fromkeys((name, self._successors.get(name, name))):
            books = self._books[each]
            # What changes nothing for others travels with the next reservation.
            before = books.foreseen(now)
            if _is_news(change(before, now), before):
                books.change(change, now)
            else:
                books.changes.append(change)
                books.gather(now)
        self._wake.set()

    # The planner -----------------------------------------------------------------------------------------------

    async def _plan(self) -> None:
        while True:
            self._wake.clear()
            try:
                pause = await self._turn()
            except StoreBusy:
                self._events.problem("limits table busy")
                self._send_late_ones_away()
                pause = WATCH_MS
            except Exception as error:  # noqa: BLE001 - told to whoever waits
                # Whoever waits must not wait for ever on a planner that cannot plan.
                self._events.problem("limiter failed")
                self._fail_all(error)
                pause = WATCH_MS
            if self._stopping:
                return
            if pause is None:
                self._idle = True
                await self._wake.wait()
                self._idle = False
                continue
            # A moment's rest even when woken at once, so that what arrives together travels together.
            await self._clock.sleep(min(pause, CONFLICT_MS))
            rest = pause - CONFLICT_MS
            await until(self._wake, self._clock, rest)

    def _send_late_ones_away(self) -> None:
        now = self._clock.now()
        for waiter in list(self._waiters):
            if now > waiter.latest_start:
                self._answer(waiter, Later(now + BUSY_MS, "limits table busy"))

    def _fail_all(self, error: Exception) -> None:
        for waiter in self._waiters:
            if not waiter.answer.done():
                waiter.answer.set_exception(error)
        self._waiters.clear()

    async def _turn(self) -> int | None:
        """Do what is due; return the milliseconds until something else is, or None when nothing is known to come."""
        await self._refresh()
        now = self._clock.now()
        planned = self._draft(now)
        for books in self._books.values():
            if self._owes_word(books.group, now):
                books.gather(now, 0)
        due = [
            books
            for group, books in self._books.items()
            if planned.get(group) or books.urgent or now >= books.due_at
        ]
        await asyncio.gather(
            *(self._write(books, planned.get(books.group.id, ())) for books in due)
        )
        return self._pause()

    async def _refresh(self) -> None:
        """Read the groups that somebody waits for, unless the view of them is fresh."""
        now = self._clock.now()
        wanted: dict[str, Claimant] = {
            claimant.group: claimant for waiter in self._waiters for claimant in waiter.claimants
        }
        sleeping = [
            group
            for group, books in self._books.items()
            if any(admission.started_at is None for admission in books.open)
        ]
        stale = [
            group
            for group in dict.fromkeys([*wanted, *sleeping])
            if group not in self._books or now - self._books[group].read_at >= WATCH_MS
        ]
        if not stale:
            return
        found = await self._blocking(self._store.load, stale)
        now = self._clock.now()
        for name in stale:
            current = found.get(name)
            books = self._books.get(name)
            if books is None:
                claimant = wanted[name]
                stated = dict(claimant.stated)
                if current is None:
                    current = new_group(claimant.organization, claimant.model_group, now, stated)
                books = self._books[name] = _Books(current, now)
            elif current is None and books.group.version:
                self._start_anew(books, now)
            self._learn(books, current or books.group, now)
        for name, claimant in wanted.items():
            stated = dict(claimant.stated)
            if self._books[name].group.stated != stated:
                self._books[name].change(partial(_restated, stated), now)

    @staticmethod
    def _start_anew(books: _Books, now: int) -> None:
        """Forget a group whose item somebody deleted, so that its limits and blocks are learned again."""
        old = books.group
        fresh = new_group(old.organization, old.model_group, now, old.stated)
        books.group = replace(fresh, epoch=old.epoch + 1)
        for admission in books.open:
            if admission.started_at is None:
                admission.revoked.set()

    def _learn(self, books: _Books, current: Group, now: int, *, certain: bool = False) -> None:
        """Take in what the store says, and take back start times that it made void."""
        books.read_at = now
        if current.version < books.group.version and not certain:
            return
        if current.epoch != books.group.epoch:
            for admission in books.open:
                if admission.started_at is None and admission.epoch != current.epoch:
                    admission.revoked.set()
        books.group = current
        if current.moved_to is not None:
            self.moved[current.id] = current.moved_to
            for waiter in list(self._waiters):
                if any(claimant.group == current.id for claimant in waiter.claimants):
                    self._answer(waiter, Again())

    def _draft(self, now: int) -> dict[str, list[_Waiter]]:
        """Choose a group for every waiter that can start soon, on copies; answer those that cannot start in time."""
        in_line = self._in_line()
        drafts = {
            name: _Draft(advanced(lined_up(books.group, self._name, in_line[name], now), now))
            for name, books in self._books.items()
        }
        planned: dict[str, list[_Waiter]] = {}
        for waiter in list(self._waiters):
            if any(claimant.group not in drafts for claimant in waiter.claimants):
                # It came while the groups were read: its turn is next.
                continue
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
            if best is None:
                assert too_large is not None
                self._answer(waiter, too_large)
                continue
            start, draft, cost = best
            if start <= min(now + waiter.horizon(draft.group, cost, now), waiter.latest_start):
                draft.group, _ = reserve(draft.group, [cost], now, start - now, self._waits)
                planned.setdefault(draft.group.id, []).append(waiter)
                continue
            draft.leave_waiting(start)
            # Before the first answer the rate is only a safe guess: who leaves now would come back too late.
            is_blocked = draft.group.blocked_until > min(waiter.latest_start, now + BLOCK_MS)
            knows = draft.group.has_answers or now > waiter.latest_start
            if is_blocked or (start > waiter.latest_start and knows):
                reason = draft.group.blocked_reason if is_blocked else None
                self._answer(waiter, Later(start, reason or "no capacity soon"))
        return {
            name: waiters
            for name, waiters in planned.items()
            if self._worth_a_write(name, waiters, now)
        }

    def _worth_a_write(self, name: str, waiters: Sequence[_Waiter], now: int) -> bool:
        """Wait for a fuller block while the first of it would not start at once anyway."""
        if len(waiters) >= min(LEAST_BLOCK, self._in_line()[name]):
            return True
        group = self._books[name].group
        cost = waiters[0].cost(group)
        return next_start(group, cost, now) <= now + SOON_MS

    def _owes_word(self, group: Group, now: int) -> bool:
        """Tell whether others, not knowing of the jobs that wait here, may take theirs for the last."""
        is_drained = now - max(self._drained_at, group.drained_at) < DRAINED_MS
        if not is_drained or not is_bound_by_output(group):
            return False
        _, said_at = group.waiting.get(self._name, (0, 0))
        return now - said_at >= WAITING_MS // 2 and self._in_line()[group.id] > 0

    def _in_line(self) -> Counter[str]:
        """Return how many of the jobs that wait could start in each group."""
        return Counter(each.group for waiter in self._waiters for each in waiter.claimants)

    def _answer(self, waiter: _Waiter, answer: Admitted) -> None:
        self._waiters.remove(waiter)
        if not waiter.answer.done():
            waiter.answer.set_result(answer)

    def _pause(self) -> int | None:
        now = self._clock.now()
        times: list[int] = []
        if self._waiters:
            times.append(now + WATCH_MS)
            for claimant in self._waiters[0].claimants:
                if claimant.group not in self._books:
                    return CONFLICT_MS
                times.append(self._next_look(self._books[claimant.group].group, now))
        for books in self._books.values():
            if books.urgent:
                times.append(now)
            elif books.due_at < inf:
                times.append(int(books.due_at))
            if any(admission.started_at is None for admission in books.open):
                times.append(books.read_at + WATCH_MS)
        return max(CONFLICT_MS, min(times) - now) if times else None

    def _next_look(self, group: Group, now: int) -> int:
        """Return when a block will be worth a write: some time before its first start, when it is full.

        Workers look at different moments, so that they do not all write at once.
        """
        first = self._waiters[0]
        cost = first.cost(group)
        start = next_start(group, cost, now)
        block = min(LEAST_BLOCK, len(self._waiters))
        full = start + (block - 1) * usual_gap(group) - first.horizon(group, cost, now)
        latest = start - SOON_MS // 2
        return latest if full >= latest else full + int(self._jitter() * (latest - full))

    async def _write(self, books: _Books, waiters: Sequence[_Waiter] = ()) -> None:
        """Bring the shared group up to date with all that has gathered, in one conditional write."""
        async with books.writing:
            if books.unsure:
                await self._make_sure(books)
            must = books.urgent or self._clock.now() >= books.due_at
            if waiters and not books.urgent:
                await self._look_again(books)
            parcel = books.take()
            group = books.group
            while True:
                now = self._clock.now()
                waiting = [waiter for waiter in waiters if not waiter.answer.done()]
                in_line = self._in_line()[group.id]
                new = self._posted(books, parcel, lined_up(group, self._name, in_line, now), now)
                costs = [each.cost(new) for each in waiting]
                probes = [bool(_open(new).intersection(cost.circuits)) for cost in costs]
                horizons = [
                    waiter.horizon(new, cost, now)
                    for waiter, cost in zip(waiting, costs, strict=True)
                ]
                new, starts = reserve(new, costs, now, horizons, self._waits)
                is_news = replace(new, waiting=group.waiting) != group
                if not is_news and not self._owes_word(group, now):
                    return
                if waiters and not must and _too_few(starts, waiting, now):
                    # Somebody else was quicker: what there is to settle can travel with the next block.
                    books.put_back(parcel)
                    return
                token = f"{self._name}.{self.writes}"
                recent = (*group.recent_writes, token)[-MOST_RECENT:]
                new = lined_up(new, self._name, in_line - len(starts), now)
                written = replace(new, version=group.version + 1, recent_writes=recent)
                try:
                    self.writes += 1
                    await self._blocking(self._store.replace, written, group.version)
                except Stale as stale:
                    if isinstance(stale.current, Group):
                        # The store is right, even with a lower version: somebody may have deleted the item.
                        self._learn(books, stale.current, self._clock.now(), certain=True)
                    else:
                        self._start_anew(books, self._clock.now())
                    group = books.group
                    await self._clock.sleep(int(CONFLICT_MS * self._jitter()) + 1)
                    continue
                except StoreBusy:
                    # It may have been done all the same: the next write looks before it says anything twice.
                    reserved = costs[: len(starts)]
                    books.unsure.append(_Unsure(token, written.epoch, parcel, reserved))
                    books.due_at = self._clock.now()
                    raise
                break
            self._learn(books, written, self._clock.now())
            self._tell(group, written, now)
            self._admit_all(books, written, list(zip(waiting, starts, costs, probes, strict=False)))

    async def _make_sure(self, books: _Books) -> None:
        """Find out which writes whose reply was lost were done; raises StoreBusy when that cannot be read either."""
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
                # Nobody was told of these start times.
                books.give_back(each.epoch, cost, self._clock.now())

    async def _look_again(self, books: _Books) -> None:
        """Read the group, unless that has just been done: a read is cheaper than a lost race."""
        if self._clock.now() - books.read_at > FRESH_MS:
            found = await self._blocking(self._store.load, [books.group.id])
            self._learn(books, found.get(books.group.id, books.group), self._clock.now())

    def _posted(self, books: _Books, parcel: _Parcel, group: Group, now: int) -> Group:
        """Return the group with everything in the parcel entered."""
        new = settle(group, parcel.settlements, now)
        for at, headers in parcel.observations[-1:]:
            new = observe(new, Observation(at, headers.seen, self._pending(books, at)), now)
        for change in parcel.changes:
            new = change(new, now)
        # As of when it was seen: by the time of this write somebody may wait again.
        return drained(new, self._drained_at)

    def _tell(self, before: Group, after: Group, now: int) -> None:
        if after.blocked_until > max(now, before.blocked_until):
            self._events.note(
                "limit group blocked",
                limit_group=after.id,
                until=after.blocked_until,
                seconds=(after.blocked_until - now) // 1000,
                reason=after.blocked_reason,
                by=after.blocked_by,
            )

    def _admit_all(
        self, books: _Books, group: Group, planned: Sequence[tuple[_Waiter, int, Cost, bool]]
    ) -> None:
        for waiter, start, cost, is_probe in planned:
            if waiter.answer.done():
                # It went away while its reservation was written: give that back.
                books.give_back(group.epoch, cost, self._clock.now())
                continue
            claimant = next(each for each in waiter.claimants if each.group == group.id)
            admission = Admission(claimant, start, group.epoch, cost, waiter.input_chars, is_probe)
            books.open.append(admission)
            self._answer(waiter, admission)

    def _pending(self, books: _Books, at: int) -> Cost:
        """What this worker had reserved but not sent at a moment. Output tokens are counted in the shared group."""
        unsent = [
            admission.reserved
            for admission in books.open
            if admission.started_at is None or admission.started_at > at
        ]
        return Cost(
            requests=sum(cost.requests for cost in unsent),
            input_tokens=sum(cost.input_tokens for cost in unsent),
        )


def _restated(stated: Mapping[str, int], group: Group, now: int) -> Group:
    return restated(group, stated, now)


def _is_news(after: Group, before: Group) -> bool:
    """Tell whether others have to know at once: a block, or a breaker that opens or closes."""
    return after.epoch != before.epoch or _open(after) != _open(before)


def _open(group: Group) -> set[str]:
    return {name for name, breaker in group.circuits.items() if breaker.is_open}


def _too_few(starts: Sequence[int], waiting: Sequence[_Waiter], now: int) -> bool:
    """Tell whether a block is not worth its write yet."""
    if not starts:
        return True
    return len(starts) < min(LEAST_BLOCK, len(waiting)) and starts[0] > now + SOON_MS


def _never_fits(group: Group, input_chars: int) -> bool:
    # An estimate must not end a job: only what is too large by any count is refused without a call.
    bucket = group.input_tokens
    return bucket.learned and input_chars > bucket.limit * MOST_CHARS_PER_TOKEN


def claimant_for(
    organization: str,
    model_group: str,
    key_id: str,
    stated: Mapping[str, int] | None = None,
    circuits: tuple[str, ...] = (),
) -> Claimant:
    """Return the claimant of one key of the pool."""
    return Claimant(
        group_id(organization, model_group),
        organization,
        model_group,
        key_id,
        tuple(sorted((stated or {}).items())),
        circuits,
    )
