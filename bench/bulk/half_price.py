"""A large file on the batch lane: its Message Batches, the steps of each, peak memory, and what AWS charges."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import httpx

from bench.bulk.calls import counting
from bench.bulk.stack import MODEL, SETTINGS, TENANT, Stack, say, stack, workers
from bench.limits.meters import invocations
from bench.memory.cloud import memory_sizes
from bench.memory.peak import peak_mb
from sluice.domain.upstream_batches import MOST_REQUESTS, SPARE_REQUESTS

NAME: Final = "half"
FUNCTIONS: Final = ("batches", "upstream", "ranges")
SCHEDULE: Final = Path(__file__).parents[2] / "events" / "schedule.json"
PATIENCE_SECONDS: Final = 3_600
SAY_EVERY_SECONDS: Final = 15.0
LAST_SECONDS: Final = 60
"""A Message Batch is done so long after its batch at the latest."""

LOGGED_SECONDS: Final = 2.0
"""The last lines of a log come with the end of the invocation."""

HALF_SETTINGS: Final[dict[str, Any]] = SETTINGS | {
    "batches": {"items_per_second": 20_000},
    "organisations": [
        each | {"batch_limits": {"queued_requests": None}} for each in SETTINGS["organisations"]
    ],
}
ENVIRONMENT: Final = {"SLUICE_GATHER_SECONDS": "1", "SLUICE_WAITS": '{"poll_ms": 1000}'}

MOST_GROWTH_MB: Final = 96
"""Between the first Message Batch and the last: the pieces of results in memory vary, and nothing else may grow."""

MOST_DOLLARS_PER_MILLION: Final = 0.30
ROWS_OF_THE_TARGET: Final = 10_000
"""Of fewer rows, what each batch costs is more than what each row costs."""

DOLLARS_PER_MILLION_CALLS: Final[Mapping[str, float]] = {
    # docs/costs.md has the list prices. Records are below 1 KB, and a consistent read of one is a unit.
    "dynamodb:PutItem": 0.625,
    "dynamodb:UpdateItem": 0.625,
    "dynamodb:DeleteItem": 0.625,
    "dynamodb:BatchWriteItem": 0.625,
    "dynamodb:GetItem": 0.125,
    "dynamodb:BatchGetItem": 0.125,
    "dynamodb:Query": 0.125,
    "dynamodb:Scan": 0.125,
    "s3:PutObject": 5.0,
    "s3:CreateMultipartUpload": 5.0,
    "s3:UploadPart": 5.0,
    "s3:UploadPartCopy": 5.0,
    "s3:CompleteMultipartUpload": 5.0,
    "s3:CopyObject": 5.0,
    "s3:ListObjectsV2": 5.0,
    "s3:GetObject": 0.4,
    "s3:HeadObject": 0.4,
    "events:PutEvents": 1.0,
}
FREE: Final = (
    "s3:DeleteObject",
    "s3:DeleteObjects",
    "s3:AbortMultipartUpload",
    "s3:ReadCopySource",
)
QUEUE_DOLLARS: Final = 0.5
SECRET_DOLLARS: Final = 5.0
GB_SECOND_DOLLARS: Final = 13.33e-6
INVOCATION_DOLLARS: Final = 0.2e-6
LOG_DOLLARS_PER_BYTE: Final = 0.5e-9
QUEUE_CALLS_PER_INVOCATION: Final = {"ranges": 2, "batches": 2}
"""Lambda's poller receives the message of an invocation and deletes it; every message comes alone at worst."""

MOST_LOGGED: Final = 10_000
"""Lines that the emulator gives of a log."""

STEPS: Final = ("collected", "prepared", "created", "ended", "applied")
_STEP: Final = re.compile(rf"upstream batch ({'|'.join(STEPS)})")


@dataclass(slots=True)
class MessageBatch:
    """What the logs say about one."""

    requests: int = 0
    steps: dict[str, float] = field(default_factory=dict)
    """Seconds from the arrival of the file to each step."""


@dataclass(frozen=True, slots=True)
class Used:
    """What one function used."""

    calls: Counter[str]
    runs: int
    seconds: float
    log_bytes: float
    memory_mb: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Results of a file."""

    rows: int
    seconds: float
    planned: float
    last_range: float
    batches: list[MessageBatch]
    succeeded: int
    in_order: bool
    live_calls: int
    peaks: list[int]
    """Peak MB of the upstream function's processes, each time a Message Batch was applied."""
    used: dict[str, Used]
    problems: Counter[str]
    """Warnings and errors in the logs."""


def run(rows: int) -> int:
    """Run a file; return 0 if every promise is kept."""
    with counting() as calls_of, stack(settings=HALF_SETTINGS, environment=ENVIRONMENT) as started:
        began = time.time()
        started.drop(NAME, _file(rows), lane="batch")
        peaks = _watch(started, rows, began)
        seconds = time.time() - began
        time.sleep(LOGGED_SECONDS)
        outcome = _outcome(started, rows, began, seconds, peaks, calls_of)
    for line in _report(outcome):
        print(line)
    broken = [what for what, good in _promises(outcome).items() if not good]
    for what in broken:
        print(f"NOT AS PROMISED: {what}")
    return 1 if broken else 0


def _file(rows: int) -> bytes:
    lines = []
    for number in range(rows):
        messages = [{"role": "user", "content": f"Row {number}: what does it say?"}]
        params = {"model": MODEL, "max_tokens": 64, "messages": messages}
        lines.append(json.dumps({"custom_id": f"row-{number}", "params": params}))
    return ("\n".join(lines) + "\n").encode()


# While it runs -------------------------------------------------------------------------------------------------


def _watch(started: Stack, rows: int, began: float) -> list[int]:
    """Wait for the end, running the governor each second; return the peaks."""
    end, said = time.monotonic() + PATIENCE_SECONDS, 0.0
    peaks: list[int] = []
    highest = 0
    steps = Counter[str]()
    left = LAST_SECONDS
    # The batch may end before its last Message Batch is done.
    while left > 0:
        if started.of_bucket(f"out/{TENANT}/{NAME}/summary.json") is not None:
            left = 0 if 0 < steps["collected"] <= steps["applied"] else left - 1
        if time.monotonic() > end:
            raise TimeoutError(f"{rows:,} rows did not end")
        started.ready.client("lambda").invoke(
            FunctionName=started.ready.resources["GovernorFunction"],
            Payload=SCHEDULE.read_bytes(),
        )
        steps = Counter(step for step, _ in _steps(started, began))
        highest = max([highest, *_peaks(started)])
        peaks += [highest] * (steps["applied"] - len(peaks))
        if time.monotonic() - said > SAY_EVERY_SECONDS:
            said = time.monotonic()
            say(", ".join(f"{steps[step]} {step}" for step in STEPS))
            for problem, count in _problems(started, began).items():
                say(f"in the logs, {count} times: {problem}")
        time.sleep(1)
    return peaks


def _peaks(started: Stack) -> Iterator[int]:
    for process in workers(started, "upstream"):
        try:
            peak = peak_mb(process) if Path(f"/proc/{process}/status").exists() else 0
        except (OSError, IndexError):
            # It ends just now.
            continue
        yield peak


def _steps(started: Stack, began: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each step that is logged, with its line."""
    for line in started.logged("upstream", '"upstream batch"', began):
        found = _STEP.fullmatch(str(line.get("message")))
        if found:
            yield found[1], line


# Afterwards ----------------------------------------------------------------------------------------------------


def _outcome(  # noqa: PLR0913, PLR0917 - a run and its meters
    started: Stack,
    rows: int,
    began: float,
    seconds: float,
    peaks: list[int],
    calls_of: Callable[[str], Counter[str]],
) -> Outcome:
    batches: dict[str, MessageBatch] = {}
    for step, line in _steps(started, began):
        batch = batches.setdefault(line["upstream_id"], MessageBatch())
        batch.steps[step] = _moment(line) - began
        if step == "created":
            batch.requests = line["requests"]
    results = (started.of_bucket(f"out/{TENANT}/{NAME}/results.jsonl") or b"").splitlines()
    summary = json.loads(started.of_bucket(f"out/{TENANT}/{NAME}/summary.json") or b"{}")
    stats = httpx.get(f"{started.claude_url}/_simulator/stats").json()
    memory = memory_sizes()
    return Outcome(
        rows=rows,
        seconds=seconds,
        planned=_last(started, "batches", "batch planned", began),
        last_range=_last(started, "ranges", "range run", began),
        batches=sorted(batches.values(), key=lambda each: each.steps.get("created", 0.0)),
        succeeded=summary["counts"]["succeeded"],
        in_order=[json.loads(line)["custom_id"] for line in results]
        == [f"row-{number}" for number in range(rows)],
        live_calls=stats["requests"],
        peaks=peaks,
        problems=_problems(started, began),
        used={each: _used(started, each, calls_of(each), memory[each]) for each in FUNCTIONS},
    )


def _problems(started: Stack, began: float) -> Counter[str]:
    return Counter(
        f"{function}: {line.get('message')} {line.get('what', '')}"
        for function in FUNCTIONS
        for level in ("WARNING", "ERROR")
        for line in started.logged(function, level, began)
        if line.get("level") == level
    )


def _used(started: Stack, function: str, calls: Counter[str], memory_mb: int) -> Used:
    """Return what a function used; the bytes of its log are those of the first lines, projected to all invocations."""
    reports = list(invocations(_events(started, function, "REPORT"), 0))
    some = _events(started, function, "")
    if len(some) >= MOST_LOGGED:
        say(f"the log of {function} is longer than the emulator gives: its bytes are estimated")
    seen = sum(event["message"].startswith("REPORT ") for event in some)
    size = sum(len(event["message"].encode()) for event in some)
    return Used(
        calls=calls,
        runs=len(reports),
        seconds=sum(each.seconds for each in reports),
        log_bytes=size * len(reports) / max(1, seen),
        memory_mb=memory_mb,
    )


def _events(started: Stack, function: str, word: str) -> list[Any]:
    pages = started.ready.client("logs").get_paginator("filter_log_events")
    found = pages.paginate(logGroupName=f"/aws/lambda/sluice-local-{function}", filterPattern=word)
    return [event for page in found for event in page["events"]]


def _last(started: Stack, function: str, message: str, began: float) -> float:
    lines = started.logged(function, f'"{message}"', began)
    return max((_moment(line) - began for line in lines), default=0.0)


def _moment(line: Mapping[str, Any]) -> float:
    return datetime.strptime(line["timestamp"], "%Y-%m-%d %H:%M:%S,%f%z").timestamp()


# What it says --------------------------------------------------------------------------------------------------


def _report(outcome: Outcome) -> Iterator[str]:
    rows = outcome.rows
    order = "in the order of the file" if outcome.in_order else "NOT in the order of the file"
    yield f"{rows:,} rows in {outcome.seconds:.0f} s: {outcome.succeeded:,} succeeded, {order}"
    yield f"live calls: {outcome.live_calls}"
    for problem, count in outcome.problems.most_common():
        yield f"in the logs, {count} times: {problem}"
    yield f"planned after {outcome.planned:.1f} s, last range ended after {outcome.last_range:.1f} s"
    yield ""
    yield f"{'Message Batch':>14} {'requests':>9} " + " ".join(f"{step:>10}" for step in STEPS)
    for number, batch in enumerate(outcome.batches, 1):
        moments = " ".join(f"{batch.steps.get(step, 0.0):>8.1f} s" for step in STEPS)
        yield f"{number:>14} {batch.requests:>9,} {moments}"
    first, last = (outcome.peaks[0], outcome.peaks[-1]) if outcome.peaks else (0, 0)
    yield f"peak memory of the upstream function: {first} MB after the first, {last} MB after the last"
    yield ""
    yield f"{'function':>10} {'operation':<30} {'per 1,000 rows':>15} {'$ per million rows':>19}"
    for function, used in outcome.used.items():
        for what, amount, dollars in _costs(function, used):
            share = f"{amount * 1000 / rows:,.2f}"
            yield f"{function:>10} {what:<30} {share:>15} {dollars * 1e6 / rows:>19.4f}"
        whole = sum(dollars for _, _, dollars in _costs(function, used))
        yield f"{function:>10} {'together':<30} {'':>15} {whole * 1e6 / rows:>19.4f}"
    yield f"all functions: ${_dollars_per_million(outcome):.3f} per million rows at list prices"


def _costs(function: str, used: Used) -> Iterator[tuple[str, float, float]]:
    """Yield what a function used of each kind, and its price in dollars."""
    for what, count in used.calls.most_common():
        yield what, count, count * _price(what) / 1e6
    polls = QUEUE_CALLS_PER_INVOCATION.get(function, 0) * used.runs
    if polls:
        yield "receives and deletes by Lambda", polls, polls * QUEUE_DOLLARS / 1e6
    yield "invocations", used.runs, used.runs * INVOCATION_DOLLARS
    gb_seconds = used.seconds * used.memory_mb / 1024
    yield "GB-seconds", gb_seconds, gb_seconds * GB_SECOND_DOLLARS
    yield "KB of logs", used.log_bytes / 1e3, used.log_bytes * LOG_DOLLARS_PER_BYTE


def _price(operation: str) -> float:
    """Return the dollars per million calls; raises KeyError for one without a price."""
    if operation in FREE:
        return 0.0
    if operation.startswith("sqs:"):
        return QUEUE_DOLLARS
    if operation.startswith("secretsmanager:"):
        return SECRET_DOLLARS
    known = operation.partition(" ")[0]
    return DOLLARS_PER_MILLION_CALLS[known]


def _dollars_per_million(outcome: Outcome) -> float:
    dollars = sum(
        each for function, used in outcome.used.items() for _, _, each in _costs(function, used)
    )
    return dollars * 1e6 / outcome.rows


def _promises(outcome: Outcome) -> dict[str, bool]:
    requests = [batch.requests for batch in outcome.batches]
    growth = outcome.peaks[-1] - outcome.peaks[0] if outcome.peaks else 0
    is_large = outcome.rows >= ROWS_OF_THE_TARGET
    return {
        "every row has its result, once, in order": outcome.in_order,
        "every row succeeded": outcome.succeeded == outcome.rows,
        "each row is in one Message Batch, or was left out of it and ran live": sum(requests)
        + outcome.live_calls
        == outcome.rows,
        "few rows run live": outcome.live_calls <= SPARE_REQUESTS * len(requests),
        "no Message Batch is too large": max(requests, default=0) <= MOST_REQUESTS,
        "every Message Batch is done": all("applied" in each.steps for each in outcome.batches),
        "the memory does not grow with the rows": growth <= MOST_GROWTH_MB,
        f"less than ${MOST_DOLLARS_PER_MILLION:.2f} per million rows": not is_large
        or _dollars_per_million(outcome) < MOST_DOLLARS_PER_MILLION,
    }
