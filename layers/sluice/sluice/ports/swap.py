"""Compare-and-swap on versioned records, for every store that raises Stale: one way to write, one loop to retry.

The functions block, as the stores do. A worker runs them through `Blocking`:
`await blocking(swap, jobs.replace, job, job.version)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from sluice.domain.errors import Stale, StoreBusy

MOST_TRIES: Final = 10
"""Each try starts from what the writer before has stored, so this many in a row fail only under constant contention."""


class Versioned(Protocol):
    """A record under an optimistic lock: every write raises its version by one."""

    @property
    def version(self) -> int:
        """The version; 0 for a record that is not stored."""
        ...


Record = TypeVar("Record", bound=Versioned)


@dataclass(frozen=True, slots=True)
class Written(Generic[Record]):
    """The record was changed."""

    record: Record


@dataclass(frozen=True, slots=True)
class Kept(Generic[Record]):
    """The rule made no change to the record as it is stored."""

    record: Record


@dataclass(frozen=True, slots=True)
class Deleted:
    """Another writer deleted the record."""


def insert(add: Callable[[Record], None], wanted: Record) -> Record | None:
    """Store a new record; return the stored one: `wanted` itself, or the one that already has the id."""
    try:
        add(wanted)
    except Stale as stale:
        current: Record | None = stale.current
        return current
    return wanted


def swap(
    replace: Callable[[Record, int], None], wanted: Record, expected_version: int
) -> Record | None:
    """Write `wanted` over the expected version; return the stored record, None if another writer deleted it.

    `stored is wanted` if this call wrote it. `stored == wanted` is weaker: true also if the response to the write was
    lost and the store's retry found the record, and if another writer stored an equal one.
    """
    try:
        replace(wanted, expected_version)
    except Stale as stale:
        current: Record | None = stale.current
        return current
    return wanted


def change(
    replace: Callable[[Record, int], None],
    record: Record,
    rule: Callable[[Record], Record],
    what: str,
) -> Written[Record] | Kept[Record] | Deleted:
    """Apply a rule to a record and write the result; after a concurrent change apply it again to what is stored.

    A rule that returns its argument makes no change. Raises StoreBusy(`what`) after `MOST_TRIES` concurrent changes.
    """
    for _ in range(MOST_TRIES):
        wanted = rule(record)
        if wanted is record:
            return Kept(record)
        stored = swap(replace, wanted, record.version)
        if stored is None:
            return Deleted()
        if stored is wanted:
            return Written(stored)
        record = stored
    raise StoreBusy(f"{what}, changed concurrently {MOST_TRIES} times,")
