"""What a worker knows of each limit group, what it must still write to it, and which jobs wait for a start in it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Final, Protocol, Self

from sluice.domain.breakers import is_endpoint
from sluice.domain.limits import (
    DIMENSIONS,
    NO_TIES,
    UNUSED,
    Cost,
    Group,
    Settlement,
    Ties,
    breakers_of,
    group_id,
    usual_gap,
)
from sluice.domain.turns import Owner, precedence
from sluice.ports.claude import Headers

HORIZON_MS: Final = 3_000
"""How far ahead start times are reserved. Short, so that all workers soon use a correction."""

LEAST_BLOCK: Final = 16
"""Jobs that a write should reserve for, if the rate permits; at slow rates the horizon grows to include them."""

LONGEST_HORIZON_MS: Final = 15_000

PRECEDENCE_MS: Final = 1_500
"""How much further ahead a job reserves for each step of precedence: beyond the start times that others reserve."""

SETTLE_MS: Final = 10_000
"""How long settlements may wait to be written together with a reservation."""

REFUND_MS: Final = 300
"""The same for unused reservations."""

PATIENCE_MS: Final = 10_000
"""After this time a large job no longer yields to small ones of other workers."""

NOBODY: Final = Owner()

assert HORIZON_MS < LONGEST_HORIZON_MS
assert REFUND_MS < SETTLE_MS


@dataclass(frozen=True, slots=True)
class Claimant:
    """A limit group that a job could use, with the key and its weight in the pool."""

    group: str
    organization: str
    model_group: str
    key_id: str
    stated: tuple[tuple[str, int], ...] = ()
    """Limits the key pool states for this key, per dimension."""
    ties: Ties = NO_TIES
    has_other: bool = False
    """The job may use another key of the group, which may have another workspace or endpoint."""

    def is_free(self, group: Group, now: int) -> bool:
        """Return whether the workspace and the endpoint of the key accept calls now."""
        workspace = group.workspaces.get(self.ties.workspace)
        if workspace is not None and workspace.blocked_until > now:
            return False
        breakers = breakers_of(group, self.ties).items()
        return all(each.open_until <= now for name, each in breakers if is_endpoint(name))


def claimant_for(
    organization: str,
    model_group: str,
    key_id: str,
    stated: Mapping[str, int] | None = None,
    ties: Ties = NO_TIES,
) -> Claimant:
    """Return the claimant of one key of the pool."""
    return Claimant(
        group_id(organization, model_group),
        organization,
        model_group,
        key_id,
        tuple(sorted((stated or {}).items())),
        ties,
    )


class Settles(Protocol):
    """The interface that settles an admission."""

    def settle(
        self, admission: Admission, used: Cost | None, *, answered: bool, cached: bool
    ) -> None:
        """Report what a call used."""
        ...


@dataclass(eq=False, slots=True)
class Admission:
    """A start time in a limit group: reserved, and settled exactly once.

    As a context manager it releases the reservation on leaving, unless `settle` has reported the usage.
    """

    limiter: Settles
    claimant: Claimant
    start: int
    epoch: int
    reserved: Cost
    input_chars: int
    is_probe: bool = False
    """A circuit breaker is open; this call is its probe."""
    started_at: int | None = None
    revoked: asyncio.Event = field(default_factory=asyncio.Event)
    is_settled: bool = False

    def settle(self, used: Cost | None, *, answered: bool = False, cached: bool = False) -> None:
        """Report what the call used, as `Limiter.settle`."""
        self.limiter.settle(self, used, answered=answered, cached=cached)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.is_settled:
            self.settle(None)


NO_CAPACITY: Final = "no capacity soon"
"""Why a job cannot start in an invocation although nothing is blocked."""


@dataclass(frozen=True, slots=True)
class Later:
    """No start in this invocation; the earliest expected start, in epoch milliseconds."""

    at: int
    reason: str


@dataclass(frozen=True, slots=True)
class TooLarge:
    """The request needs more input tokens than the limit group can ever save up."""

    input_tokens: int
    limit: int


@dataclass(frozen=True, slots=True)
class Moved:
    """Choose again: the group now has another name, or another key of it may start sooner."""


@dataclass(frozen=True, slots=True)
class Overloaded:
    """The model's circuit breaker is open, and the job has a fallback model."""


Admitted = Admission | Later | TooLarge | Moved | Overloaded


@dataclass(eq=False, slots=True)
class Waiter:
    """A job that waits for an admission."""

    claimants: Sequence[Claimant]
    input_chars: int
    max_tokens: int
    latest_start: int
    since: int
    answer: asyncio.Future[Admitted]
    owner: Owner = NOBODY
    """Whose job it is: the owners of the jobs in a line take turns."""
    may_fall_back: bool = False
    """The job has a fallback model: it does not wait for the circuit breaker of its model."""

    def horizon(self, group: Group, cost: Cost, now: int) -> int:
        """Return how far ahead it may reserve, at its `cost` in this group.

        At slow rates further, so that a block is worth its write, but not if another group could still be quicker; and
        further if its owner has had less than its share. A large job that has waited long reserves further ahead.
        """
        usual = HORIZON_MS
        if len(self.claimants) == 1:
            usual = min(LONGEST_HORIZON_MS, max(usual, LEAST_BLOCK * usual_gap(group)))
        usual += PRECEDENCE_MS * precedence(group.portions, self.owner)
        if now - self.since < PATIENCE_MS:
            return usual
        is_large = any(
            cost.of(name) * 60_000 > group.bucket(name).limit * usual for name in DIMENSIONS
        )
        return max(usual, self.latest_start - now) if is_large else usual

    def cost(self, group: Group, claimant: Claimant | None = None) -> Cost:
        """Return the estimated cost of its call in this group."""
        claimant = claimant or self.claimant(group.id)
        estimate = group.estimate(self.input_chars, self.max_tokens)
        return replace(estimate, ties=claimant.ties)

    def claimant(self, group: str) -> Claimant:
        """Return its claimant for a group."""
        return next(each for each in self.claimants if each.group == group)


class Line:
    """The jobs of one worker that wait for an admission, longest first."""

    def __init__(self) -> None:
        self.waiters: list[Waiter] = []
        self.drained_at = 0
        """When the queue was last seen empty: no job waits behind those that workers hold."""

    def __len__(self) -> int:
        return len(self.waiters)

    def counts(self) -> Counter[str]:
        """Return how many of them could start in each group."""
        return Counter(each.group for waiter in self.waiters for each in waiter.claimants)

    def answer(self, waiter: Waiter, answer: Admitted) -> None:
        """Answer one of them."""
        self.waiters.remove(waiter)
        if not waiter.answer.done():
            waiter.answer.set_result(answer)

    def send_away(self, now: int, later: Later) -> None:
        """Answer those whose latest start is in the past."""
        for waiter in list(self.waiters):
            if now > waiter.latest_start:
                self.answer(waiter, later)

    def fail(self, error: Exception) -> None:
        """Raise an error in all of them."""
        for waiter in self.waiters:
            if not waiter.answer.done():
                waiter.answer.set_exception(error)
        self.waiters.clear()

    def cancel(self) -> None:
        """Cancel all of them."""
        for waiter in self.waiters:
            waiter.answer.cancel()
        self.waiters.clear()


Change = Callable[[Group, int], Group]


@dataclass(frozen=True, slots=True)
class Parcel:
    """What one write contains besides reservations."""

    changes: list[Change]
    settlements: list[Settlement]
    observations: list[tuple[int, Headers]]
    due_at: float
    urgent: bool


@dataclass(frozen=True, slots=True)
class Unsure:
    """A write whose response was lost: it may have been done."""

    token: str
    epoch: int
    parcel: Parcel
    reserved: Sequence[Cost]


@dataclass(eq=False, slots=True)
class Books:
    """This worker's view of one group, and what it must write to it."""

    group: Group
    read_at: int
    changes: list[Change] = field(default_factory=list)
    settlements: list[Settlement] = field(default_factory=list)
    observations: list[tuple[int, Headers]] = field(default_factory=list)
    due_at: float = inf
    """When pending changes must be written even without a reservation."""
    urgent: bool = False
    unsure: list[Unsure] = field(default_factory=list)
    open: list[Admission] = field(default_factory=list)
    """Reserved and not settled."""
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def has_start_ahead(self) -> bool:
        """Whether a job waits for its reserved start time."""
        return any(admission.started_at is None for admission in self.open)

    def change(self, change: Change, now: int) -> None:
        """Note a change that all workers should see at once."""
        self.changes.append(change)
        self.urgent = True
        self.gather(now)

    def foreseen(self, now: int) -> Group:
        """Return the group with the pending changes."""
        group = self.group
        for change in self.changes:
            group = change(group, now)
        return group

    def take(self) -> Parcel:
        """Take the pending changes, in order to write them."""
        parcel = Parcel(self.changes, self.settlements, self.observations, self.due_at, self.urgent)
        self.changes, self.settlements, self.observations = [], [], []
        self.due_at, self.urgent = inf, False
        return parcel

    def put_back(self, parcel: Parcel) -> None:
        """Put them back, before those added since."""
        self.changes[:0] = parcel.changes
        self.settlements[:0] = parcel.settlements
        self.observations[:0] = parcel.observations
        self.due_at = min(parcel.due_at, self.due_at)
        self.urgent = self.urgent or parcel.urgent

    def gather(self, now: int, within_ms: int = SETTLE_MS) -> None:
        """Note that a change is pending."""
        self.due_at = min(self.due_at, now + within_ms)

    def give_back(self, epoch: int, reserved: Cost, now: int) -> None:
        """Note an unused reservation, whose capacity others may use."""
        self.settlements.append(Settlement(epoch, reserved, UNUSED))
        self.gather(now, REFUND_MS)

    def revoke(self, epoch: int | None = None) -> None:
        """Revoke the start times that have not been used, except those of this epoch."""
        for admission in self.open:
            if admission.started_at is None and admission.epoch != epoch:
                admission.revoked.set()

    def pending(self, at: int) -> Cost:
        """Return what was reserved but not sent at a moment. Output tokens are counted in the shared group."""
        unsent = [
            admission.reserved
            for admission in self.open
            if admission.started_at is None or admission.started_at > at
        ]
        return Cost(
            requests=sum(cost.requests for cost in unsent),
            input_tokens=sum(cost.input_tokens for cost in unsent),
        )


def news(group: Group) -> object:
    """Return what other workers must learn at once if it changes: blocks, and circuit breakers that open or close."""
    breakers = {
        name: (breaker.model, breaker.tenant)
        for name, breaker in group.circuits.items()
        if breaker.is_open
    }
    workspaces = {name: each.blocked_until for name, each in group.workspaces.items()}
    return group.epoch, breakers, workspaces
