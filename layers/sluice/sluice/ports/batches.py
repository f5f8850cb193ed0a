"""Batches and their ranges, objects and queues."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from sluice.domain.batches import Batch, Progress, RangeState, Tally
from sluice.domain.capacity import Backlog

RANK: Final = "sluice-rank"
"""The metadata of an object with the rank of what was copied there."""


@dataclass(frozen=True, slots=True)
class BatchPage:
    """A page of a listing of batches, newest first."""

    batches: tuple[Batch, ...]
    has_more: bool


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A small batch with ranges that no worker may have claimed yet."""

    tenant: str
    batch_id: str


class Newcomers(Protocol):
    """The list of newcomers, in order of tenants. It only saves time: each range has its message in the queue."""

    def announce(self, newcomer: Newcomer) -> None:
        """Add a batch to the list."""
        ...

    def newcomer(self, after: str) -> Newcomer | None:
        """Return the first newcomer of the tenant behind this one; None behind the last, `""` is before the first."""
        ...

    def welcome(self, newcomer: Newcomer) -> None:
        """Remove a batch from the list, if it is there: its ranges are claimed."""
        ...


class Turns(Protocol):
    """Whose turn it is among the batches of each tenant, for steps that take minutes."""

    def take_turn(self, tenant: str, batch_id: str, now: int, until: int) -> bool:
        """Give the tenant's turn to a batch until a time; False if another batch has it now."""
        ...

    def end_turn(self, tenant: str, batch_id: str) -> None:
        """End the turn, if the batch has it."""
        ...


class BatchStore(Newcomers, Turns, Protocol):
    """The records of batches and of their ranges, and the counts of what is done."""

    def add(self, batch: Batch) -> None:
        """Store a new batch; raises Stale with the stored batch if its id is in use."""
        ...

    def get(self, batch_id: str) -> Batch | None:
        """Return the batch as last written."""
        ...

    def replace(self, batch: Batch, expected_version: int) -> None:
        """Write the batch if its stored version is the expected one; otherwise raises Stale with the stored one."""
        ...

    def listing(
        self, tenant: str, limit: int, *, after: Batch | None = None, before: Batch | None = None
    ) -> BatchPage:
        """Return the tenant's batches, newest first: those older than `after`, or the next newer than `before`."""
        ...

    def range_state(self, batch: Batch, number: int) -> RangeState:
        """Return the state of a range; its version is 0 if it was never claimed."""
        ...

    def seen_ranges(self, batch_id: str, numbers: range) -> Mapping[int, SeenRange]:
        """Return those of consecutive ranges that were ever claimed."""
        ...

    def replace_range(self, state: RangeState, expected_version: int) -> None:
        """Write the state if its stored version is the expected one (0: not stored); otherwise raises Stale."""
        ...

    def mark(self, batch_id: str, group: str, member: int, tally: Tally) -> Progress:
        """Count a member of a group as done, only once even if repeated; return the progress of the group."""
        ...

    def note_running(self, batch_id: str, group: str, member: int, tally: Tally) -> None:
        """Note the sums of a member so far; does nothing once the member is done."""
        ...

    def groups(self, batch_id: str, prefix: str) -> Mapping[str, Progress]:
        """Return the progress of all groups whose names have this prefix, by name, in order of names."""
        ...

    def latest_of_name(self, batch: Batch) -> str:
        """Record the batch as the latest of its tenant and name, unless a later one is; return the latest one's id."""
        ...

    def name_create(self, tenant: str, name: str, batch_id: str, since: int, *, fresh: bool) -> str:
        """Return the id of the batch created under this name after `since`; else record and return `batch_id`.

        `fresh`: always record `batch_id`, because the request is not a resend.
        """
        ...


@dataclass(frozen=True, slots=True)
class SeenRange:
    """A range that was claimed, as the planner sees it."""

    state: RangeState
    is_parked: bool
    """The sweep will send it."""


class WaitingRanges(Protocol):
    """Parked ranges and running batches, as the sweep sees them: by the time at which they are due."""

    def due(self, now: int, share: int) -> Sequence[DueRange]:
        """Return what is due, longest due first: about `share` of each tenant and model at most.

        So the backlog of one hides none of another. Batches that must be checked have a share of their own.
        """
        ...

    def postpone(self, due: DueRange, until: int) -> DueRange | None:
        """Make it due again at `until` only, unless removed; None if another sweep was first."""
        ...

    def remove(self, due: DueRange) -> None:
        """Remove it from what is due, because its message was sent."""
        ...


@dataclass(frozen=True, slots=True)
class DueRange:
    """A parked range that is due, or a batch that must be checked (`number` is None)."""

    batch_id: str
    number: int | None
    tenant: str
    due_at: int
    model: str | None = None


class RangesQueue(Protocol):
    """Sends messages to the ranges queue."""

    def send_ranges(self, batch: Batch, numbers: Sequence[int]) -> list[int]:
        """Send a pointer to each range; return the numbers that were not accepted."""
        ...

    def backlog(self) -> Backlog:
        """Return the approximate numbers of messages; raises StoreBusy."""
        ...


class Plans(Protocol):
    """Where batches are sent to be planned: the batches queue.

    The function that this queue invokes must not use it, nor the one below: Lambda stops a function that sends to its
    own queue (recursive loop detection), and its role does not permit it.
    """

    def send_plan(self, batch_id: str, tenant: str) -> None:
        """Have a tenant's batch planned; raises StoreBusy."""
        ...


class Joins(Protocol):
    """Where sections are sent to be joined: the batches queue, or a section of a small batch at once."""

    def send_join(self, batch_id: str, section: int, tenant: str) -> None:
        """Have the results of a section of a tenant's batch joined; raises StoreBusy."""
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """The metadata of an object."""

    key: str
    size: int
    etag: str
    written_at: int
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def rank(self) -> str:
        """The rank with which it was copied; empty for any other object."""
        return self.metadata.get(RANK, "")


class Writer(Protocol):
    """Writes an object in parts, with constant memory. The object exists only after `close`."""

    def write(self, data: bytes) -> None:
        """Append data."""
        ...

    def close(self) -> int:
        """Finish the object; return its size."""
        ...

    def abort(self) -> None:
        """Discard the parts; does nothing after `close`."""
        ...


class Objects(Protocol):
    """The data bucket."""

    def put(self, key: str, body: bytes) -> str:
        """Store an object; return its ETag."""
        ...

    def get(self, key: str) -> bytes | None:
        """Return an object; None if it does not exist."""
        ...

    def head(self, key: str) -> Stored | None:
        """Return the metadata of an object; None if it does not exist."""
        ...

    def read(self, key: str, first: int, size: int, etag: str | None = None) -> bytes:
        """Return a piece of an object; raises InputMissing if it does not exist or has another ETag."""
        ...

    def stream(self, key: str) -> Iterator[bytes]:
        """Yield an object piece by piece; raises InputMissing."""
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Delete up to 1,000 objects, also those that do not exist; raises StoreBusy."""
        ...

    def listing(self, prefix: str) -> Iterator[Stored]:
        """Yield the objects whose keys have this prefix, in order of keys."""
        ...

    def writer(self, key: str) -> Writer:
        """Return a writer of a new object."""
        ...

    def link(self, key: str, seconds: int) -> str:
        """Return a presigned URL to read the object, valid for this many seconds."""
        ...

    def copy(self, source: Stored, key: str) -> str:
        """Copy an object, as it was when its metadata were read; return the copy's ETag. Raises InputMissing."""
        ...

    def copy_latest(self, source: Stored, key: str, rank: str) -> bool:
        """Copy an object, unless the object there was copied with a greater rank; return whether it was copied.

        The comparison and the write are one step: whatever the order of two writers, the greater rank stays.
        """
        ...

    def assemble(self, key: str, sources: Mapping[int, str], sizes: Mapping[int, int]) -> int:
        """Join objects in order into one; return its size. Large ones are copied, not read."""
        ...


class PartLinks(Protocol):
    """Multipart uploads by presigned URLs: clients send the parts directly to S3."""

    def begin(self, key: str) -> str:
        """Start an upload; return its id."""
        ...

    def links(self, key: str, upload_id: str, sizes: Mapping[int, int]) -> Mapping[int, str]:
        """Return the presigned PUT URL of each part, by number; S3 accepts exactly the given number of bytes."""
        ...

    def complete(self, key: str, upload_id: str, etags: Mapping[int, str]) -> None:
        """Complete an upload; raises InvalidRequest if its parts are not valid."""
        ...

    def abort(self, key: str, upload_id: str) -> None:
        """Discard the parts; does nothing if the upload does not exist."""
        ...
