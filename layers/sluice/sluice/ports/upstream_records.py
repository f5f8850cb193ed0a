"""The records of upstream batches, and the list of batches that wait to become some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from sluice.domain.completions import CompletionTimes, Observation
from sluice.domain.upstream_batches import UpstreamBatch

MOST_OPEN: Final = 1_000
"""Open upstream batches of a tenant that are considered."""

_FAR_MS: Final = 60 * 86_400_000
"""Each one that is not done is due before."""

MOST_CANCELS: Final = 50
"""Cancels that are remembered."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A batch with ranges that are in no upstream batch yet."""

    tenant: str
    batch_id: str
    since: int
    """When it began to wait (epoch milliseconds)."""


@dataclass(frozen=True, slots=True)
class DueStep:
    """An upstream batch whose next step is due."""

    upstream_id: str
    tenant: str


@dataclass(frozen=True, slots=True)
class Learned:
    """What was learned from upstream batches."""

    times: CompletionTimes = field(default_factory=CompletionTimes)
    cancels_ms: tuple[int, ...] = ()
    """How long the last cancels took."""

    def observed(self, seen: Observation, cancel_ms: int | None) -> Learned:
        """Return it with one more upstream batch."""
        cancels = self.cancels_ms if cancel_ms is None else (*self.cancels_ms, cancel_ms)
        return Learned(self.times.observed(seen), cancels[-MOST_CANCELS:])


class WaitingList(Protocol):
    """The batches that wait for the collector, longest waiting first."""

    def wait(self, waiting: Waiting) -> None:
        """Add a batch; one that is on the list since the same time stays there once."""
        ...

    def waiting(self, most: int) -> Sequence[Waiting]:
        """Return the first batches of the list."""
        ...

    def collected(self, waiting: Waiting) -> None:
        """Remove a batch, if it is on the list."""
        ...


class UpstreamRecords(WaitingList, Protocol):
    """The records of upstream batches, each under an optimistic lock."""

    def add(self, record: UpstreamBatch) -> None:
        """Store a new record; raises Stale with the stored one if its id is in use."""
        ...

    def get(self, upstream_id: str) -> UpstreamBatch | None:
        """Return the record as last written."""
        ...

    def replace(self, record: UpstreamBatch, expected_version: int) -> None:
        """Write the record if its stored version is the expected one; otherwise raises Stale with the stored one."""
        ...

    def learned(self) -> Learned:
        """Return what was learned from upstream batches."""
        ...

    def observe(self, seen: Observation, cancel_ms: int | None = None) -> None:
        """Learn from an upstream batch that ended, and how long its cancel took if there was one; raises StoreBusy."""
        ...

    def due(self, until: int, share: int) -> Sequence[DueStep]:
        """Return those whose next step is due until a time, longest due first: at most `share` of each tenant.

        One that is done never is.
        """
        ...


def open_batches(records: UpstreamRecords, now: int) -> list[UpstreamBatch]:
    """Return the upstream batches that are not done."""
    found = (records.get(each.upstream_id) for each in records.due(now + _FAR_MS, MOST_OPEN))
    return [each for each in found if each is not None]


class Steps(Protocol):
    """Starts invocations of the upstream function, which make the steps that are due."""

    def start(self, upstream_id: str | None) -> None:
        """Have the next step of an upstream batch made, or batches collected if None; raises StoreBusy."""
        ...
