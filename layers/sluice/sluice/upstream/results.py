"""The results of an upstream batch in the order of its rows: upstream returns them in any.

They are read once, sorted piece by piece, and the pieces are merged: at most `HELD_BYTES` of them are in memory.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Final

from sluice.domain.pricing import Bill
from sluice.domain.retries import Failure
from sluice.domain.rows import split
from sluice.domain.upstream_batches import RowId, UpstreamBatch, row_id
from sluice.ports.batches import Objects
from sluice.ports.upstream import ResultRow, RowKind

HELD_BYTES: Final = 64 * 1024 * 1024

MOST_PIECE_BYTES: Final = 4 * 1024 * 1024
LEAST_PIECE_BYTES: Final = 128 * 1024
"""A piece of each sorted run is in memory while they are merged: the more runs there are, the smaller the pieces."""

_ROW_BYTES: Final = 500
"""Approximate memory of a row besides its message."""

Key = tuple[int, int, int]
Results = Iterator[tuple[int, ResultRow]]
"""Byte offsets of rows in rising order, with their results."""


@dataclass(slots=True)
class Sorted:
    """The results of a batch, by range and row."""

    held: list[bytes] = field(default_factory=list)
    """All of them if they are few, else none."""
    runs: list[str] = field(default_factory=list)
    """The objects with the sorted pieces."""
    rows: int = 0
    """Rows of ours, each counted once."""
    strange: int = 0
    """Lines that name no row of ours."""
    repeated: int = 0

    def by_range(self, objects: Objects) -> Iterator[tuple[tuple[int, int], Results]]:
        """Yield slice number and range number with the results of its rows, which are read until the next range is."""
        size = piece_bytes(len(self.runs))
        runs: list[Iterable[bytes]] = [split(_pieces(objects, each, size)) for each in self.runs]
        merged = heapq.merge(self.held, *runs, key=_key_of)
        for place, lines in groupby(merged, key=lambda line: _key_of(line)[:2]):
            yield (place[0], place[1]), ((_key_of(line)[2], _decoded(line)) for line in lines)


def sort_results(
    objects: Objects,
    state: UpstreamBatch,
    rows: Iterable[ResultRow],
    counted: Callable[[str, ResultRow], None],
) -> Sorted:
    """Read all results once and sort them; raises ResultsInterrupted, after which they are read anew.

    Of a row that has several results the first one counts. `counted` gets the model of each row and its result.
    """
    found = Sorted()
    seen: set[Key] = set()
    held: list[bytes] = []
    size = 0
    for row in rows:
        name = row_id(row.custom_id or "", state.prefix)
        if name is None or not _has_place(state, name):
            found.strange += 1
            continue
        key = (name.member, name.range, name.offset)
        if key in seen:
            found.repeated += 1
            continue
        seen.add(key)
        found.rows += 1
        counted(state.models[name.model], row)
        held.append(_encoded(key, row))
        size += len(held[-1]) + _ROW_BYTES
        if size >= HELD_BYTES:
            found.runs.append(_stored(objects, state, len(found.runs), held))
            held, size = [], 0
    if found.runs and held:
        found.runs.append(_stored(objects, state, len(found.runs), held))
    else:
        found.held = sorted(held, key=_key_of)
    return found


def piece_bytes(runs: int) -> int:
    """Return how much of each run is read at once, so that all pieces together take `HELD_BYTES` at most.

    Beyond 512 runs, 32 GB of results, the pieces get no smaller: each is a request.
    """
    return min(MOST_PIECE_BYTES, max(LEAST_PIECE_BYTES, HELD_BYTES // max(1, runs)))


def _pieces(objects: Objects, key: str, size: int) -> Iterator[bytes]:
    at = 0
    while piece := objects.read(key, at, size):
        yield piece
        at += len(piece)
        if len(piece) < size:
            return


def _has_place(state: UpstreamBatch, name: RowId) -> bool:
    is_model = name.model < len(state.models)
    return is_model and name.member < len(state.slices) and name.range in state.slices[name.member]


def _stored(objects: Objects, state: UpstreamBatch, number: int, lines: list[bytes]) -> str:
    key = state.run_key(number)
    writer = objects.writer(key)
    try:
        for line in sorted(lines, key=_key_of):
            writer.write(line + b"\n")
        writer.close()
    finally:
        writer.abort()
    return key


def _key_of(line: bytes) -> Key:
    member, number, offset, _ = line.split(b"\t", 3)
    return int(member), int(number), int(offset)


def _encoded(key: Key, row: ResultRow) -> bytes:
    """Return a result as one line: the message last, byte for byte, because a Message in JSON Lines has no line end."""
    facts: dict[str, Any] = {"kind": row.kind.value}
    if row.stop_reason is not None:
        facts["stop_reason"] = row.stop_reason
    if row.failure is not None:
        facts["failure"] = {
            "type": row.failure.type,
            "message": row.failure.message,
            "status": row.failure.status,
            "error_code": row.failure.error_code,
            "request_id": row.failure.request_id,
            "may_be_billed": row.failure.may_be_billed,
        }
    said = json.dumps(facts, separators=(",", ":")).encode()
    return b"%d\t%d\t%d\t%s\t%s" % (*key, said, row.message)


def _decoded(line: bytes) -> ResultRow:
    *_, said, message = line.split(b"\t", 4)
    facts: dict[str, Any] = json.loads(said)
    kind = RowKind(facts["kind"])
    failure = Failure(**facts["failure"]) if "failure" in facts else None
    bill = None
    if kind is RowKind.SUCCEEDED:
        with suppress(ValueError):
            bill = Bill.of_message(json.loads(message))
    return ResultRow(None, kind, message, facts.get("stop_reason"), bill, failure)
