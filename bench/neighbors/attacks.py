"""The attacks and accidents, each with a harmless load of the same rows and bytes.

A load is called in a thread of its own. It may return at once, or continue until `side.stopped` is set. What it does is
bounded by `rows`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from bench.neighbors.side import Side

Load = Callable[[Side, int], None]

SMALL_ROWS: Final = 30
CANCELED_ROWS: Final = 300
PACKED_FILES: Final = 6
PACKED_BYTES: Final = 5_000_000
FLOOD_BYTES: Final = 1_000_000
FLOOD_PAUSE_SECONDS: Final = 0.5


@dataclass(frozen=True, slots=True)
class Attack:
    """One entry of the table."""

    kind: str
    """What the attack aims at, as in docs/bench.md."""
    what: str
    load: Load
    harmless: Load
    by_the_quiet_tenant: bool = False
    """The load is the quiet tenant's own."""
    upstream: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the simulator that apply to the attack alone: those of the hostile tenant's own organization."""


def nothing(side: Side, rows: int) -> None:
    """Do nothing: the quiet tenant is alone."""


def one_file(side: Side, rows: int) -> None:
    """Upload one file."""
    side.upload("load", side.rows("load", rows))


def many_batches(side: Side, rows: int) -> None:
    """Create many small batches, one after the other."""
    for number in range(rows // SMALL_ROWS):
        if side.stopped.is_set():
            return
        with suppress(httpx.HTTPError):
            side.create(side.rows(f"batch-{number}", SMALL_ROWS))


def many_jobs(side: Side, rows: int) -> None:
    """Submit lists of single jobs, one after the other."""
    for number in range(rows // 100):
        if side.stopped.is_set():
            return
        with suppress(httpx.HTTPError):
            side.submit(side.rows(f"list-{number}", 100))


def bad_rows(side: Side, rows: int) -> None:
    """Upload a file in which every second row cannot be run, each third of those in another way."""
    side.upload("load", (_bad(side, n) if n % 2 else side.row(f"load-{n}") for n in range(rows)))


def _bad(side: Side, number: int) -> dict[str, Any] | str:
    return (
        f'{{"custom_id": "load-{number}", "params": {{"model": "x", "max_tokens": 1e400}}}}',
        '{"params": ' + "[" * 200 + "]" * 200 + "}",
        side.row(f"load-{number}", max_tokens=-1),
    )[number // 2 % 3]


def canceled_batches(side: Side, rows: int) -> None:
    """Create batches, and cancel each at once."""
    for number in range(rows // CANCELED_ROWS):
        if side.stopped.is_set():
            return
        with suppress(httpx.HTTPError):
            batch_id = side.create(side.rows(f"canceled-{number}", CANCELED_ROWS))
            side.send("POST", f"/v1/messages/batches/{batch_id}/cancel")


def invented_models(side: Side, rows: int) -> None:
    """Submit single jobs, each for a model of its own that does not exist."""
    for number in range(rows // 100):
        if side.stopped.is_set():
            return
        names = [f"list-{number}-{job}" for job in range(100)]
        with suppress(httpx.HTTPError):
            side.submit([side.row(name, model=f"claude-{name}") for name in names])


def packed_files(side: Side, rows: int) -> None:
    """Upload gzip files with a member for each byte of their rows, beside a file of the usual rows."""
    one_file(side, rows)
    member = [gzip.compress(bytes([byte]), compresslevel=0) for byte in range(256)]
    for number in range(PACKED_FILES):
        body = bytearray()
        while len(body) < PACKED_BYTES:
            line = json.dumps(side.row(f"packed-{number}-{len(body)}"))
            body += b"".join(member[byte] for byte in f"{line}\n".encode())
        side.put(f"packed-{number}.jsonl.gz", bytes(body))


def strangers(side: Side, rows: int) -> None:
    """Post large bodies without a key, beside a file of the usual rows."""
    one_file(side, rows)
    _post(side, {"x-api-key": "sluice_unknown"})


def large_bodies(side: Side, rows: int) -> None:
    """Post as many bytes with a key, in bodies that are refused for their form."""
    one_file(side, rows)
    _post(side, {})


def _post(side: Side, headers: Mapping[str, str]) -> None:
    body = b'{"jobs": [' + b" " * FLOOD_BYTES
    while not side.stopped.wait(FLOOD_PAUSE_SECONDS):
        with suppress(httpx.HTTPError):
            side.send("POST", "/jobs", body, headers)


ATTACKS: Final[Mapping[str, Attack]] = {
    "nobody": Attack("-", "nobody else, for comparison", nothing, one_file),
    "own-file": Attack(
        "starving", "a large file of the same tenant", one_file, one_file, by_the_quiet_tenant=True
    ),
    "many-batches": Attack("starving", "the rows in batches of 30", many_batches, one_file),
    "many-jobs": Attack("starving", "the rows as single jobs", many_jobs, one_file),
    "blocked-file": Attack(
        "starving",
        "a file whose own organization has spent its month",
        one_file,
        one_file,
        upstream={"blocked_by": "spend_cap"},
    ),
    "bad-rows": Attack("bad rows", "every second row cannot be run", bad_rows, one_file),
    "canceled": Attack(
        "ranges", "batches of 300 rows, each canceled at once", canceled_batches, one_file
    ),
    "invented-models": Attack(
        "sizes", "single jobs, each for a model that does not exist", invented_models, one_file
    ),
    "packed-files": Attack(
        "sizes",
        "one file, and six of 5 MB whose every byte is a gzip member",
        packed_files,
        one_file,
    ),
    "strangers": Attack(
        "before authentication", "1 MB bodies without a key, two a second", strangers, large_bodies
    ),
}
