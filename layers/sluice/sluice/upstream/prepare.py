"""Writes the body of a create: the requests of an upstream batch, read from their files line by line."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final

from sluice.domain.batches import Batch, is_over
from sluice.domain.params import not_in_batches, request_body
from sluice.domain.rows import Row
from sluice.domain.upstream_batches import (
    MOST_BYTES,
    MOST_REQUESTS,
    SPARE_REQUESTS,
    RowId,
    UpstreamBatch,
)
from sluice.intake.requests import read_row
from sluice.ports.batches import BatchStore, Objects
from sluice.worker.range_windows import range_lines

HEAD: Final = b'{"requests":['
TAIL: Final = b"]}"

MARGIN_BYTES: Final = 1_000_000

MOST_MODELS: Final = 20
"""A key is chosen that may be used for all models of an upstream batch. Rows of more models run live."""


@dataclass(slots=True)
class Body:
    """What was written."""

    requests: int = 0
    size: int = 0
    """Bytes without the tail."""
    models: list[str] = field(default_factory=list)
    earliest: int | None = None
    """The first deadline of its rows (epoch milliseconds)."""
    _ends: deque[int] = field(default_factory=lambda: deque(maxlen=SPARE_REQUESTS + 1))

    @property
    def cuts(self) -> list[int]:
        """Where the body may end instead: before its last request, before the last two, and so on."""
        return list(self._ends)[-2::-1]

    def model(self, name: str) -> int | None:
        """Return the number of a model; None if it is one too many."""
        if name not in self.models:
            if len(self.models) >= MOST_MODELS:
                return None
            self.models.append(name)
        return self.models.index(name)

    def add(self, item: bytes, deadline: int | None) -> None:
        """Count a request of these bytes."""
        self.requests += 1
        self.size += len(item)
        self._ends.append(self.size)
        if deadline is not None:
            self.earliest = min(deadline, self.earliest or deadline)


def write_body(
    objects: Objects,
    batches: BatchStore,
    state: UpstreamBatch,
    now: int,
    keep: Callable[[], None],
) -> Body:
    """Write the object with the body, holding one line in memory; raises InputMissing if a file cannot be read.

    What cannot be in a Message Batch is left out, and runs live after it: bad rows, and what exceeds a limit.
    """
    body = Body(size=len(HEAD))
    writer = objects.writer(state.body_key)
    try:
        writer.write(HEAD)
        for name, row, deadline in _rows(objects, batches, state, now):
            keep()
            model = body.model(str(row.params["model"]))
            if model is None:
                continue
            params = request_body(row.params)
            item = b'%s{"custom_id":"%s","params":%s}' % (
                b"," if body.requests else b"",
                replace(name, model=model).text(state.prefix).encode(),
                params,
            )
            if body.requests >= MOST_REQUESTS or body.size + len(item) > MOST_BYTES - MARGIN_BYTES:
                break
            writer.write(item)
            body.add(item, deadline)
        writer.close()
    finally:
        writer.abort()
    return body


def _rows(
    objects: Objects, batches: BatchStore, state: UpstreamBatch, now: int
) -> Iterator[tuple[RowId, Row, int | None]]:
    for member, part in enumerate(state.slices):
        batch = batches.get(part.batch_id)
        if batch is None or batch.plan is None or is_over(batch, now):
            continue
        # All ranges at once: one request for each of them would take longer than the rest.
        for line in range_lines(objects, batch, part.first, part.end - 1):
            row = read_row(line, batch.options)
            if isinstance(row, Row) and not_in_batches(row.params) is None:
                number = batch.plan.range_at(line.offset)
                yield RowId(member, number, line.offset), row, _deadline(batch, row)


def _deadline(batch: Batch, row: Row) -> int:
    wanted = (row.deadline, batch.options.deadline, batch.expires_at)
    return min(each for each in wanted if each is not None)
