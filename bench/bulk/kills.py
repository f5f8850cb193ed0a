"""A large file through the whole local stack while workers are killed, compared with a tenth of it."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass
from typing import Final

import httpx

from bench.bulk.calls import counting
from bench.bulk.stack import MODEL, TENANT, Stack, kill_one, say, stack

FUNCTIONS: Final = ("batches", "ranges")
PATIENCE_SECONDS: Final = 3_600


@dataclass(frozen=True, slots=True)
class Outcome:
    """Results of a file."""

    lines: int
    seconds: float
    results: int
    in_order: bool
    twice: int
    errors: list[int]
    repeated_calls: int
    aws_calls: Counter[str]
    """AWS calls of both functions, by operation."""


def run(lines: int, bad: int, kills: int) -> int:
    """Run both files; return 0 if every guarantee holds."""
    small = _once(lines // 10, bad // 10, 0)
    large = _once(lines, bad, kills)
    failed = [
        what
        for outcome in (small, large)
        for what, good in _promises(outcome, bad * outcome.lines // lines).items()
        if not good
    ]
    print(f"{'':>22} {small.lines:>12,} {large.lines:>12,}")
    for what in ("seconds", "results", "twice", "repeated_calls"):
        print(f"{what:>22} {getattr(small, what):>12,.0f} {getattr(large, what):>12,.0f}")
    print(f"{'bad lines reported':>22} {len(small.errors):>12,} {len(large.errors):>12,}")
    print("AWS calls per 1,000 rows of the larger file:")
    for what, count in large.aws_calls.most_common():
        print(f"{what:>22} {count * 1000 / large.lines:>12,.1f}")
    for what in failed:
        print(f"NOT AS PROMISED: {what}")
    return 1 if failed else 0


def _once(lines: int, bad: int, kills: int) -> Outcome:
    wrong = {line * (lines // bad) + 1 for line in range(bad)} if bad else set()
    with counting() as calls_of, stack() as started:
        began = time.monotonic()
        started.drop("bulk", _file(lines, wrong))
        _watch(started, lines, kills)
        seconds = time.monotonic() - began
        aws_calls = sum(map(calls_of, FUNCTIONS), Counter[str]())
        return _outcome(started, lines, wrong, seconds, aws_calls)


def _file(lines: int, wrong: set[int]) -> bytes:
    rows = []
    for number in range(lines):
        params = {
            "model": MODEL,
            "max_tokens": 64,
            "messages": [{"role": "user", "content": f"Row {number}: what does it say?"}],
            "metadata": {"user_id": f"bulk/{number}"},
        }
        row = json.dumps({"custom_id": f"row-{number}", "params": params})
        rows.append(row[: len(row) // 2] if number in wrong else row)
    return ("\n".join(rows) + "\n").encode()


def _watch(started: Stack, lines: int, kills: int) -> None:
    """Wait for the end; kill a worker each time another share of the rows has been sent."""
    end = time.monotonic() + PATIENCE_SECONDS
    killed, said = 0, 0.0
    while started.of_bucket(f"out/{TENANT}/bulk/summary.json") is None:
        if time.monotonic() > end:
            raise TimeoutError(f"{lines:,} lines did not end")
        stats = httpx.get(f"{started.claude_url}/_simulator/stats").json()
        done = stats["requests"]
        if killed < kills and done > (killed + 1) * lines // (kills + 1):
            killed += kill_one(started, "ranges")
            say(f"killed a worker after {done:,} calls")
        if time.monotonic() - said > 15:  # noqa: PLR2004 - seconds
            said = time.monotonic()
            say(f"{done:,} calls of {lines:,}")
        time.sleep(0.5)


def _outcome(
    started: Stack, lines: int, wrong: set[int], seconds: float, aws_calls: Counter[str]
) -> Outcome:
    results = (started.of_bucket(f"out/{TENANT}/bulk/results.jsonl") or b"").splitlines()
    numbers = [int(json.loads(line)["custom_id"].removeprefix("row-")) for line in results]
    errors = (started.of_bucket(f"out/{TENANT}/bulk/errors.jsonl") or b"").splitlines()
    stats = httpx.get(f"{started.claude_url}/_simulator/stats").json()
    return Outcome(
        lines=lines,
        seconds=seconds,
        results=len(numbers),
        in_order=numbers == [number for number in range(lines) if number not in wrong],
        twice=len(numbers) - len(set(numbers)),
        errors=sorted(json.loads(line)["line"] for line in errors),
        repeated_calls=stats["duplicates"]["extra_calls"],
        aws_calls=aws_calls,
    )


def _promises(outcome: Outcome, bad: int) -> dict[str, bool]:
    wrong = [line * (outcome.lines // bad) + 2 for line in range(bad)] if bad else []
    return {
        f"{outcome.lines:,} lines: every good row has its result, in order": outcome.in_order,
        f"{outcome.lines:,} lines: no result twice": outcome.twice == 0,
        f"{outcome.lines:,} lines: every bad line is reported by number": outcome.errors == wrong,
    }
