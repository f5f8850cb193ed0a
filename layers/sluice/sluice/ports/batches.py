"""Batches, their ranges, the objects they consist of, and their queues."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sluice.domain.batches import Batch, Progress, RangeState, Tally


@dataclass(frozen=True, slots=True)
class BatchPage:
    """Some batches of a listing, newest first, and whether it goes on."""

    batches: tuple[Batch, ...]
    has_more: bool


class BatchStore(Protocol):
    """The records of batches and of their ranges, and the counting of what is done."""

    def add(self, batch: Batch) -> None:
        """Store a new batch; raises Stale with the batch that has the id already."""
        ...

    def get(self, batch_id: str) -> Batch | None:
        """Return the batch as last written."""
        ...

    def replace(self, batch: Batch, expected_version: int) -> None:
        """Write the batch if its stored version is the expected one; raises Stale with the present one otherwise."""
        ...

    def listing(
        self, tenant: str, limit: int, *, after: Batch | None = None, before: Batch | None = None
    ) -> BatchPage:
        """Return the tenant's batches, newest first: those older than `after`, or the next newer than `before`."""
        ...

    def range_state(self, batch: Batch, number: int) -> RangeState:
        """Return what is known of a range; one that nobody claimed yet has version 0."""
        ...

    def replace_range(self, state: RangeState, expected_version: int) -> None:
        """Write it if its stored version is the expected one (0: not stored); raises Stale otherwise."""
        ...

    def mark(self, batch_id: str, group: str, member: int, tally: Tally) -> Progress:
        """Count a member of a group as done, once however often it is said; return the group as it is then."""
        ...

    def note_running(self, batch_id: str, group: str, member: int, tally: Tally) -> None:
        """Note the sums of a member so far; does nothing once the member is done."""
        ...

    def groups(self, batch_id: str, prefix: str) -> Mapping[str, Progress]:
        """Return all groups whose names begin so, by name and in the order of their names."""
        ...

    def name_create(self, tenant: str, name: str, batch_id: str, since: int, *, fresh: bool) -> str:
        """Return the batch that a create of this name made after `since`; note `batch_id` when there is none.

        `fresh`: it is a create of its own whatever went before, and takes the name over.
        """
        ...


class WaitingRanges(Protocol):
    """Ranges and batches that somebody has to look at again, as the sweep sees them."""

    def due(self, now: int, limit: int) -> Sequence[DueRange]:
        """Return what is due, longest due first."""
        ...

    def postpone(self, due: DueRange, until: int) -> DueRange | None:
        """Take it: it is due again at `until`, unless released. None when somebody else was quicker."""
        ...

    def remove(self, due: DueRange) -> None:
        """Forget that it was due, because its message is sent."""
        ...


@dataclass(frozen=True, slots=True)
class DueRange:
    """A range that waits outside the queue, or a batch that should have gone on by now (`number` is None)."""

    batch_id: str
    number: int | None
    tenant: str
    due_at: int
    model: str | None = None


class RangesQueue(Protocol):
    """The sending side of the ranges queue."""

    def send_ranges(self, batch: Batch, numbers: Sequence[int]) -> list[int]:
        """Send a pointer for each range; return the numbers that were not taken."""
        ...


class BatchesQueue(Protocol):
    """The sending side of the batches queue.

    The function that this queue invokes must not have it: Lambda stops a function that sends to its own queue as a
    recursive loop, and its role does not allow it.
    """

    def send_plan(self, batch_id: str) -> None:
        """Have a batch planned; raises StoreBusy."""
        ...

    def send_join(self, batch_id: str, section: int) -> None:
        """Have a section's results joined; raises StoreBusy."""
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """What is known of an object without reading it."""

    key: str
    size: int
    etag: str
    written_at: int
    metadata: Mapping[str, str] = field(default_factory=dict)


class Writer(Protocol):
    """An object being written, in memory that does not grow with it. Nothing is there until `close`."""

    def write(self, data: bytes) -> None:
        """Write on."""
        ...

    def close(self) -> int:
        """Finish the object; return its size."""
        ...

    def abort(self) -> None:
        """Leave nothing behind; nothing happens after `close`."""
        ...


class Objects(Protocol):
    """The data bucket."""

    def put(self, key: str, body: bytes) -> str:
        """Store an object; return its ETag."""
        ...

    def get(self, key: str) -> bytes | None:
        """Return an object, None when there is none."""
        ...

    def head(self, key: str) -> Stored | None:
        """Return what is known of an object."""
        ...

    def read(self, key: str, first: int, size: int, etag: str | None = None) -> bytes:
        """Return a piece of an object; raises InputMissing when it is not there, or not the one with this ETag."""
        ...

    def stream(self, key: str) -> Iterator[bytes]:
        """Yield the object piece by piece; raises InputMissing."""
        ...

    def listing(self, prefix: str) -> Iterator[Stored]:
        """Yield the objects whose keys begin so, in the order of their keys."""
        ...

    def writer(self, key: str) -> Writer:
        """Begin an object."""
        ...

    def link(self, key: str, seconds: int) -> str:
        """Return an address from which anybody may read the object for so long."""
        ...

    def assemble(self, key: str, sources: Mapping[int, str], sizes: Mapping[int, int]) -> int:
        """Make one object of several, in order; return its size. Large ones are copied and not read."""
        ...


class PartLinks(Protocol):
    """Uploads by signed links: the parts go into the bucket past us."""

    def begin(self, key: str) -> str:
        """Begin an upload; return its id."""
        ...

    def links(self, key: str, upload_id: str, parts: Sequence[int]) -> Mapping[int, str]:
        """Return where each part is to be PUT, by number."""
        ...

    def complete(self, key: str, upload_id: str, etags: Mapping[int, str]) -> None:
        """Put the parts together; raises InvalidRequest when they do not make an object."""
        ...

    def abort(self, key: str, upload_id: str) -> None:
        """Forget the parts; nothing happens when there is no such upload."""
        ...
