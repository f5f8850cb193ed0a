"""Whose turn it is: work is taken in turns over tenants and batches, so that a large backlog delays nobody else's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Final, Generic, TypeVar

FIRST_RANGES: Final = 5
MOST_RANGES_APART: Final = 50
"""Messages of ranges do not wait behind the bulk of their tenant's ranges if they are the first ones of their batch
(about 500 rows), or if the batch has no more than so many (about 5,000 rows)."""

SLOTS: Final = 4
"""Fair queue groups for the first ranges of a tenant's batches.

SQS delivers a group later while it has more than a tenth of the processing time. With a group for each batch, a tenant
with many batches would have no such group, and would delay the others.
"""

T = TypeVar("T")
H = TypeVar("H", bound=Hashable)


def in_turns(items: Iterable[T], *owners: Callable[[T], Hashable]) -> list[T]:
    """Return the items in turns: the first one of each owner, then the second one of each, and so on.

    Several kinds of owners take turns within each other, the first kind outermost: with tenant and batch, the tenants
    take turns, and so do the batches of each tenant. What has one owner keeps its order.
    """
    ordered = list(items)
    for owner in reversed(owners):
        turns: Counter[Hashable] = Counter()
        numbered: list[tuple[int, T]] = []
        for item in ordered:
            turns[owner(item)] += 1
            numbered.append((turns[owner(item)], item))
        # Sorting is stable: within a turn, the owner whose item came first stays first.
        ordered = [item for _, item in sorted(numbered, key=lambda each: each[0])]
    return ordered


HALF_LIFE_MS: Final = 30_000
"""What an owner has taken of a limit group counts half after this time: what it took long ago is no reason to wait."""

MOST_PORTIONS: Final = 32
"""Owners whose portions are kept, the largest ones: one that is missing counts as having taken nothing."""

TENANT_BEHIND: Final = 2
BATCH_BEHIND: Final = 1
"""How far a job goes before others: its tenant has had less than its share, or its batch less than its siblings."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose job it is."""

    tenant: str = ""
    batch_id: str = ""
    """Empty for a single job: those of a tenant share its limits with its batches as one more batch would."""

    @property
    def names(self) -> tuple[str, str]:
        """The names of its portions: its tenant's, and that of the batch. Short, for there are many in a record."""
        tenant = _short(self.tenant)
        return tenant, f"{tenant}/{_short(self.batch_id)}"


@lru_cache(maxsize=1_000)
def _short(name: str) -> str:
    return sha256(name.encode()).hexdigest()[:8]


Portions = tuple[tuple[str, int], ...]
"""What each owner has recently taken of a limit group, as milliseconds of its refill; of each tenant and each batch."""


def portions_after(
    portions: Portions, passed_ms: int, taken: Iterable[tuple[Owner, int]]
) -> Portions:
    """Return the portions after a time, and after these owners have taken something."""
    sums: Counter[str] = Counter()
    for name, portion in portions:
        sums[name] = int(portion * 0.5 ** (max(0, passed_ms) / HALF_LIFE_MS))
    for owner, milliseconds in taken:
        for name in owner.names:
            sums[name] += milliseconds
    return tuple(each for each in sums.most_common(MOST_PORTIONS) if each[1] > 0)


@lru_cache(maxsize=1_000)
def precedence(portions: Portions, owner: Owner) -> int:
    """Return how far a job of this owner goes before others; 0: it has had its share.

    A tenant is behind if it has taken less than the owner of the average millisecond that was taken, who is rather one
    with much than one with little: so idle tenants do not make the others appear to have enough. Likewise a batch
    among those of its tenant. What a tenant takes by many batches puts it behind no other tenant.
    """
    tenant, batch = owner.names
    had = dict(portions)
    if _is_behind(had.get(tenant, 0), [part for name, part in portions if "/" not in name]):
        return TENANT_BEHIND
    siblings = [part for name, part in portions if name.startswith(f"{tenant}/")]
    return BATCH_BEHIND if _is_behind(had.get(batch, 0), siblings) else 0


def _is_behind(own: int, portions: Sequence[int]) -> bool:
    return own * sum(portions) < sum(portion * portion for portion in portions)


class Shares(Generic[H]):
    """Collects items, each once, and at most so many of each owner."""

    def __init__(self, owner: Callable[[H], Hashable], share: int) -> None:
        self._owner = owner
        self._share = share
        self._taken: Counter[Hashable] = Counter()
        self.items: dict[H, None] = {}

    def add(self, item: H) -> None:
        """Take an item unless its owner has its share."""
        owner = self._owner(item)
        if self._taken[owner] < self._share and item not in self.items:
            self._taken[owner] += 1
            self.items[item] = None


def group_of_range(tenant: str, batch_id: str, number: int, of: int) -> str:
    """Return the fair queue group of the message of one of `of` ranges.

    Smaller batches, and the first ranges of large ones, share a few groups with the tenant's other batches. All later
    ranges have the tenant's group: so a large batch delays neither other tenants nor the smaller batches of its own.
    """
    if number >= FIRST_RANGES and of > MOST_RANGES_APART:
        return tenant
    return f"{tenant}/{sha256(batch_id.encode()).digest()[0] % SLOTS}"
