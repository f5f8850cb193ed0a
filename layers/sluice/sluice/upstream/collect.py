"""Collects ranges of batches into upstream batches: when one is full, or its oldest batch has waited long enough.

A batch and its upstream batch name each other. The batch is written first: an upstream batch that is missing after a
crash is made again of what names it, and what it does not name in turn is collected anew. So no row is in two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from sluice.domain.batches import Batch, Phase, in_upstream, is_over, not_in_upstream
from sluice.domain.errors import StoreBusy
from sluice.domain.params import NEWEST_VERSION
from sluice.domain.upstream_batches import (
    FULL_BYTES,
    FULL_REQUESTS,
    Slice,
    UpstreamBatch,
    upstream_id_of,
)
from sluice.ports.batches import BatchStore
from sluice.ports.swap import Deleted, change, insert
from sluice.ports.upstream_records import UpstreamRecords, Waiting
from sluice.ports.world import Clock, Events

MOST_WAITING: Final = 1_000
"""Batches considered by one run; the others wait for the next one, a minute later."""


@dataclass(slots=True)
class _Pack:
    """Slices that become one upstream batch."""

    slices: list[tuple[Batch, Slice]] = field(default_factory=list)
    requests: int = 0
    size: int = 0

    def room(self, batch: Batch) -> int:
        """Return how many ranges of a batch fit in."""
        assert batch.plan is not None
        rows, size = _rows_per_range(batch), batch.plan.range_bytes
        full = min(map(_most_requests, (batch, *(each for each, _ in self.slices))))
        by_rows = (full - self.requests) // rows
        return max(0, min(by_rows, (FULL_BYTES - self.size) // size))

    def add(self, batch: Batch, part: Slice) -> None:
        """Add a slice."""
        assert batch.plan is not None
        self.slices.append((batch, part))
        self.requests += (part.end - part.first) * _rows_per_range(batch)
        self.size += (part.end - part.first) * batch.plan.range_bytes


class Collect:
    """The use case of the upstream function for the batches that wait."""

    def __init__(
        self,
        records: UpstreamRecords,
        batches: BatchStore,
        gather_ms: int,
        clock: Clock,
        events: Events,
    ) -> None:
        """`gather_ms` is how long a batch waits for others to fill an upstream batch with it."""
        self._records = records
        self._batches = batches
        self._gather_ms = gather_ms
        self._clock = clock
        self._events = events

    def __call__(self, stop_at: int) -> None:
        """Make upstream batches of what waits, until `stop_at`."""
        groups: dict[tuple[str, str, str | None], list[tuple[Waiting, Batch]]] = {}
        try:
            for waiting in self._records.waiting(MOST_WAITING):
                batch = self._known(waiting)
                if batch is not None:
                    version = batch.options.anthropic_version or NEWEST_VERSION
                    kind = (batch.tenant, version, batch.options.anthropic_beta)
                    groups.setdefault(kind, []).append((waiting, batch))
            for members in groups.values():
                if self._clock.now() >= stop_at:
                    break
                self._of_group(members)
        except StoreBusy as busy:
            # What waits stays on the list.
            self._events.problem("store busy", what=busy.what)

    def _of_group(self, members: Sequence[tuple[Waiting, Batch]]) -> None:
        """Make upstream batches of what may be together in one."""
        oldest = min(waiting.since for waiting, _ in members)
        is_old = self._clock.now() >= oldest + self._gather_ms
        current = {batch.batch_id: batch for _, batch in members}
        for pack, is_full in _packs([batch for _, batch in members]):
            if is_full or is_old:
                self._make(pack, current)
        for waiting, _ in members:
            self._known(waiting)

    def _known(self, waiting: Waiting) -> Batch | None:
        """Return a batch that waits; one that is collected or over is removed from the list."""
        batch = self._batches.get(waiting.batch_id)
        if batch is not None and batch.plan is not None and batch.phase is not Phase.ENDED:
            batch = self._repaired(batch)
            assert batch.plan is not None
            is_left = batch.collected < batch.plan.ranges
            if is_left and not is_over(batch, self._clock.now()):
                return batch
        self._records.collected(waiting)
        return None

    def _repaired(self, batch: Batch) -> Batch:
        """Return the batch after what a collector that died has left: only its last upstream batch may be missing."""
        if not batch.upstream:
            return batch
        upstream_id, first, end = batch.upstream[-1]
        part = Slice(batch.batch_id, first, end)
        record = self._records.get(upstream_id)
        if record is None:
            record = insert(self._records.add, self._record(upstream_id, [(batch, part)]))
        if record is not None and part in record.slices:
            return batch
        return self._changed(batch, lambda current: not_in_upstream(current, upstream_id))

    def _make(self, pack: _Pack, current: dict[str, Batch]) -> None:
        """Make an upstream batch, unless others were quicker. `current` has the batches as they were last written."""
        first = pack.slices[0][1]
        upstream_id = upstream_id_of(first, current[first.batch_id].version)
        named: list[tuple[Batch, Slice]] = []
        for batch, part in pack.slices:
            mark = (upstream_id, part.first, part.end)
            known = self._changed(
                current[batch.batch_id],
                lambda known, mark=mark: in_upstream(known, mark),  # type: ignore[misc]
            )
            current[batch.batch_id] = known
            if known.upstream and known.upstream[-1] == mark:
                named.append((known, part))
            elif not named:
                # Its id follows from the first slice, which is in another one.
                return
        wanted = self._record(upstream_id, named)
        stored = insert(self._records.add, wanted)
        if stored is not wanted:
            # The next run compares its members.
            return
        self._events.note(
            "upstream batch collected",
            upstream_id=upstream_id,
            tenant=wanted.tenant,
            batches=len(named),
            requests=pack.requests,
        )

    def _record(self, upstream_id: str, members: Sequence[tuple[Batch, Slice]]) -> UpstreamBatch:
        now = self._clock.now()
        batch = members[0][0]
        expires_at = min(each.expires_at for each, _ in members)
        return UpstreamBatch(
            upstream_id=upstream_id,
            tenant=batch.tenant,
            slices=tuple(part for _, part in members),
            anthropic_version=batch.options.anthropic_version or NEWEST_VERSION,
            anthropic_beta=batch.options.anthropic_beta,
            created_at=now,
            expires_at=expires_at,
            due_at=now,
            expected=sum((part.end - part.first) * _rows_per_range(each) for each, part in members),
            deadline=min(
                (each.options.deadline for each, _ in members if each.options.deadline),
                default=None,
            ),
            is_assured=all(
                each.decision is None or each.decision.is_assured for each, _ in members
            ),
        )

    def _changed(self, batch: Batch, rule: Callable[[Batch], Batch]) -> Batch:
        result = change(self._batches.replace, batch, rule, f"batch {batch.batch_id}")
        return batch if isinstance(result, Deleted) else result.record


def _most_requests(batch: Batch) -> int:
    """Return how many rows an upstream batch may have that the batch is in."""
    wanted = batch.decision.most_requests if batch.decision else 0
    return min(wanted or FULL_REQUESTS, FULL_REQUESTS)


def _rows_per_range(batch: Batch) -> int:
    assert batch.plan is not None
    return max(1, -(-batch.plan.estimated_rows // batch.plan.ranges))


def _packs(batches: Sequence[Batch]) -> Iterator[tuple[_Pack, bool]]:
    """Yield what becomes an upstream batch each, and whether it is full. Batches keep their order."""
    pack = _Pack()
    for batch in batches:
        assert batch.plan is not None
        first = batch.collected
        while first < batch.plan.ranges:
            if pack.slices and not pack.room(batch):
                yield pack, True
                pack = _Pack()
            # A range that is larger than an upstream batch may be has one of its own, and what does not fit runs live.
            end = min(batch.plan.ranges, first + max(1, pack.room(batch)))
            pack.add(batch, Slice(batch.batch_id, first, end))
            first = end
    if pack.slices:
        yield pack, False
