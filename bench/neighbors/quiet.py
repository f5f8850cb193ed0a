"""The quiet tenant: a small batch and a few jobs, again and again, and how long each waits."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import httpx

from bench.neighbors.side import Side
from scripts.local_stack import StackError

BATCH_ROWS: Final = 30
JOBS: Final = 10
LOOK_SECONDS: Final = 0.2
PATIENCE_SECONDS: Final = 900.0


@dataclass(frozen=True, slots=True)
class Waited:
    """How long the quiet tenant waited in one run."""

    delays: tuple[float, ...]
    """Seconds from the submission of each row and job to its first call."""
    total: float
    """Seconds from the first submission to the last end, without pauses."""
    lost: int
    """Rows and jobs that did not succeed."""
    billed_twice: int
    """Calls of anybody that were billed again."""

    @property
    def p95(self) -> float:
        """The start delay that 95 % of rows and jobs do not exceed."""
        ordered = sorted(self.delays)
        return ordered[max(0, -(-len(ordered) * 95 // 100) - 1)]


def measured(quiet: Side, claude_url: str, rounds: int) -> Waited:
    """Let the quiet tenant work, and return how long it waited."""
    submitted: dict[str, float] = {}
    total, lost = 0.0, 0
    for number in range(rounds):
        began = time.time()
        ended_at, failed = _round(quiet, number, submitted)
        total += ended_at - began
        lost += failed
    calls = _calls(claude_url)
    started: dict[str, float] = {}
    for call in calls:
        name = str(call["user_id"])
        started[name] = min(call["at"], started.get(name, call["at"]))
    billed = sum(bool(call["billed"]) for call in calls)
    contents = len({call["body_hash"] for call in calls if call["billed"]})
    return Waited(
        delays=tuple(started[name] - at for name, at in submitted.items() if name in started),
        total=total,
        lost=lost,
        billed_twice=billed - contents,
    )


def _round(quiet: Side, number: int, submitted: dict[str, float]) -> tuple[float, int]:
    """Submit a batch and some jobs; return when the last of them ended, and how many did not succeed."""
    rows, jobs = quiet.rows(f"row-{number}", BATCH_ROWS), quiet.rows(f"job-{number}", JOBS)
    submitted |= dict.fromkeys((each["custom_id"] for each in rows), time.time())
    batch_id = quiet.create(rows)
    submitted |= dict.fromkeys((each["custom_id"] for each in jobs), time.time())
    ids = ",".join(quiet.submit(jobs))
    until = time.time() + PATIENCE_SECONDS
    while time.time() < until:
        if reason := quiet.ready.ended():
            raise StackError(reason)
        time.sleep(LOOK_SECONDS)
        batch = quiet.get(f"/v1/messages/batches/{batch_id}")
        ended = [job for job in quiet.get(f"/jobs?ids={ids}")["data"] if job["finished_at"]]
        if batch["ended_at"] and len(ended) == JOBS:
            # The machine may be slow to answer: each of them records when it ended.
            ends = [batch["ended_at"], *(job["finished_at"] for job in ended)]
            good = sum(job["state"] == "succeeded" for job in ended)
            lost = BATCH_ROWS + JOBS - good - batch["request_counts"]["succeeded"]
            return max(datetime.fromisoformat(each).timestamp() for each in ends), lost
    return time.time(), BATCH_ROWS + JOBS


def _calls(claude_url: str) -> list[dict[str, Any]]:
    text = httpx.get(f"{claude_url}/_simulator/ledger", trust_env=False, timeout=60).text
    return [json.loads(line) for line in text.splitlines()]
