"""Where the time of a batch goes, step by step, from `messages.batches.create` to `ended`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from statistics import median
from typing import Any, Final

import httpx
from anthropic import Anthropic

from bench.bulk.stack import MODEL, Stack, stack
from bench.limits.doors import BatchesDoor, end_processes
from bench.limits.meters import invocations

FUNCTIONS: Final = ("api", "batches", "ranges")
PATIENCE_SECONDS: Final = 120.0
LOOK_EVERY_SECONDS: Final = 0.1
WARM_WORKERS: Final = 4
"""Maximum ranges that run at once on the local stack."""

WARM_ROWS: Final = 20
MOST_UNTIL_FIRST_CALL: Final = 1.5
MOST_UNTIL_ENDED: Final = 1.5
FEW_ROWS: Final = 10
MOST_BESIDE_SLOWEST_CALL: Final = 3.0


@dataclass(frozen=True, slots=True)
class Timeline:
    """Seconds from the moment of the create to each step; None if the step was not logged."""

    created: float | None
    """The create was answered."""
    planned: float | None
    """All range messages were sent, and that was stored."""
    range_started: float | None
    """The first invocation of the ranges function began."""
    first_call: float | None
    last_answer: float | None
    parts_stored: float | None
    """The last range was run, its part stored, and counted as done."""
    ended: float
    slowest_call: float
    """Not a step, but how long the slowest upstream call took."""

    @property
    def until_ended(self) -> float:
        """Seconds from the last answer to `ended`."""
        return self.ended - (self.last_answer or 0.0)


HEADS: Final = tuple(each.name for each in fields(Timeline))


def run(rows: Sequence[int], repeat: int, *, cold: bool) -> int:
    """Print the table of the medians; return 1 if a target is missed. There is none for a cold start."""
    print(f"{'rows':>6} " + " ".join(f"{head:>13}" for head in HEADS) + f" {'until_ended':>13}")
    missed: list[str] = []
    with stack() as started, httpx.Client(base_url=started.claude_url) as claude:
        door = BatchesDoor(started.ready)
        door.warm_up([_params(f"warm {each}") for each in range(WARM_ROWS)], WARM_WORKERS)
        for count in rows:
            found = [_once(started, claude, count, cold=cold) for _ in range(repeat)]
            shown = Timeline(*(_median(found, head) for head in HEADS))
            cells = [*(getattr(shown, head) for head in HEADS), shown.until_ended]
            print(f"{count:>6,} " + " ".join(_cell(each) for each in cells), flush=True)
            missed += [] if cold else _missed(count, shown)
    for what in missed:
        print(f"missed: {what}")
    return 1 if missed else 0


def _missed(rows: int, shown: Timeline) -> Iterator[str]:
    if (shown.first_call or 0.0) > MOST_UNTIL_FIRST_CALL:
        yield f"{rows} rows: first call after {shown.first_call:.2f} s, not {MOST_UNTIL_FIRST_CALL}"
    if shown.until_ended > MOST_UNTIL_ENDED:
        yield f"{rows} rows: `ended` after {shown.until_ended:.2f} s, not {MOST_UNTIL_ENDED}"
    beside = shown.ended - shown.slowest_call
    if rows <= FEW_ROWS and beside > MOST_BESIDE_SLOWEST_CALL:
        yield f"{rows} rows: {beside:.2f} s beside the slowest call, not {MOST_BESIDE_SLOWEST_CALL}"


def _once(started: Stack, claude: httpx.Client, rows: int, *, cold: bool) -> Timeline:
    if cold:
        end_processes(started.ready, BatchesDoor.functions)
    requests: Any = [
        {"custom_id": f"row-{each}", "params": _params(f"row {each} of {time.time_ns()}")}
        for each in range(rows)
    ]
    sdk = Anthropic(base_url=started.ready.api_url, api_key=started.ready.client_key)
    began_at = time.time()
    batch_id = sdk.messages.batches.create(requests=requests).id
    created = time.time() - began_at
    ended_at = _ended_at(sdk, batch_id)
    # The last lines of a log come with the end of the invocation.
    time.sleep(1)
    calls = [
        row
        for row in map(json.loads, claude.get("/_simulator/ledger").text.splitlines())
        if row["at"] >= began_at
    ]
    return Timeline(
        created=created,
        planned=_last(started, began_at, "batch planned"),
        range_started=_range_started(started, began_at),
        first_call=min(call["at"] for call in calls) - began_at,
        last_answer=max(call["ended_at"] for call in calls) - began_at,
        parts_stored=_last(started, began_at, "range run"),
        ended=ended_at - began_at,
        slowest_call=max(call["ended_at"] - call["at"] for call in calls),
    )


def _ended_at(sdk: Anthropic, batch_id: str) -> float:
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        ended_at = sdk.messages.batches.retrieve(batch_id).ended_at
        if ended_at is not None:
            return ended_at.timestamp()
        time.sleep(LOOK_EVERY_SECONDS)
    raise TimeoutError(f"{batch_id} did not end")


def _last(started: Stack, began_at: float, message: str) -> float | None:
    """Return when a line was logged last."""
    moments = [
        datetime.strptime(line["timestamp"], "%Y-%m-%d %H:%M:%S,%f%z").timestamp()
        for function in FUNCTIONS
        for line in started.logged(function, f'"{message}"', began_at)
        if line.get("message") == message
    ]
    return max((each - began_at for each in moments if each >= began_at), default=None)


def _range_started(started: Stack, began_at: float) -> float | None:
    pages = started.ready.client("logs").get_paginator("filter_log_events")
    events = [
        event
        for page in pages.paginate(
            logGroupName="/aws/lambda/sluice-local-ranges", startTime=int(began_at * 1000)
        )
        for event in page["events"]
    ]
    ends = [each["timestamp"] / 1000 for each in events if each["message"].startswith("REPORT ")]
    found = zip(ends, invocations(events, 0), strict=True)
    return min((end - each.seconds - began_at for end, each in found), default=None)


def _params(text: str) -> dict[str, Any]:
    return {
        "model": MODEL,
        "max_tokens": 64,
        "messages": [{"role": "user", "content": text}],
    }


def _median(found: Sequence[Timeline], head: str) -> Any:
    numbers = [number for each in found if (number := getattr(each, head)) is not None]
    return median(numbers) if numbers else None


def _cell(number: float | None) -> str:
    return f"{'–' if number is None else f'{number:.2f}':>13}"  # noqa: RUF001
