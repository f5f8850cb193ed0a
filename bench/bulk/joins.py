"""How fast one core joins, compares and rewrites the rows of a section.

The steps of a batch's end (`sluice/bulk/sections.py`) run on objects in memory, so that the figures are those of the
code alone; docs/bounds.md calculates from them how large a batch can be.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Final

from sluice.bulk.sections import Sections
from sluice.domain.batches import RANGES_PER_SECTION, Batch, Plan, Source, Tally
from sluice.domain.rows import Record
from tests.bulk_fakes import MemoryObjects

RESULT_BYTES: Final = 1_000


def run(rows: int) -> int:
    """Join one section, whose second half repeats the `custom_id`s of the first; print rows per second of each step."""
    a_range = rows // RANGES_PER_SECTION
    rows = a_range * RANGES_PER_SECTION
    plan = Plan(0, rows * RESULT_BYTES, a_range * RESULT_BYTES, RANGES_PER_SECTION, RESULT_BYTES)
    batch = Batch(
        "batch_joins", "bench", "joins", Source.FILE, 0, 1, "in/bench/joins.jsonl", "etag"
    )
    objects = MemoryObjects()
    for number in range(RANGES_PER_SECTION):
        lines = (_record(number * a_range + line, line, rows // 2) for line in range(a_range))
        header = Record("H", 0, 0, "", Tally(lines=a_range), "")
        objects.put(batch.part_key(number), header.encoded() + b"".join(lines))
    sections = Sections(objects)

    _print("joined", rows, lambda: sections.join(batch, plan, 0))
    _print("custom_ids compared", rows, lambda: sections.search(batch, plan, 0, 1))
    repeated = sections.repeated(batch, 1)[0]
    _print("rewritten", rows, lambda: sections.finish(batch, plan, 0, repeated, 0))

    _, duplicates = sections.changes(batch, {0: repeated})
    return 0 if duplicates == rows - rows // 2 else 1


def _record(row: int, line: int, unique: int) -> bytes:
    body = json.dumps({"custom_id": f"row-{row % unique}", "result": "x" * RESULT_BYTES})
    tally = Tally(succeeded=1, calls=1)
    return Record("R", row * RESULT_BYTES, line, f"row-{row % unique}", tally, body).encoded()


def _print(what: str, rows: int, step: Callable[[], None]) -> None:
    began = time.perf_counter()
    step()
    print(f"{what}: {rows / (time.perf_counter() - began):,.0f} rows per second")
