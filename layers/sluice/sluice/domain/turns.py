"""Whose turn it is: work is taken in turns over tenants and batches, so that a large backlog delays nobody else's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
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


EARLY_STARTS: Final = 30
EARLY_AGAIN_MS: Final = 10_000
"""An owner's first jobs in a worker may reserve further ahead than others: so many, and one more each such time.

Shares of the start times go to workers, and an owner with many jobs is in many of them. A large backlog soon has used
its early starts everywhere; a small batch needs no more.
"""


@dataclass(slots=True)
class EarlyStarts:
    """The early starts that the owners have left in one worker."""

    left: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By owner: how many at a time."""

    def take(self, owner: str, now: int) -> bool:
        """Take one of the owner's early starts; False if none is left."""
        count, at = self.left.get(owner, (EARLY_STARTS, now))
        more = (now - at) // EARLY_AGAIN_MS
        count, at = min(EARLY_STARTS, count + more), at + more * EARLY_AGAIN_MS
        if count >= EARLY_STARTS:
            at = now
        self.left[owner] = max(0, count - 1), at
        return count > 0


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
