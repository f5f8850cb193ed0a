"""The quiet tenant: a small batch and a few jobs, again and again, and how long each waits."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any, Final

import httpx

from bench.neighbors.side import Side
from scripts.local_stack import StackError

BATCH_ROWS: Final = 30
JOBS: Final = 10
LOOK_SECONDS: Final = 0.2
PATIENCE_SECONDS: Final = 900.0
FINAL: Final = frozenset({"succeeded", "errored", "canceled", "expired"})


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
        lost += _round(quiet, number, submitted)
        total += time.time() - began
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


def _round(quiet: Side, number: int, submitted: dict[str, float]) -> int:
    """Submit a batch and some jobs, and wait for them; return how many did not succeed."""
    rows, jobs = quiet.rows(f"row-{number}", BATCH_ROWS), quiet.rows(f"job-{number}", JOBS)
    submitted |= dict.fromkeys((each["custom_id"] for each in rows), time.time())
    batch_id = quiet.create(rows)
    submitted |= dict.fromkeys((each["custom_id"] for each in jobs), time.time())
    job_ids = quiet.submit(jobs)
    until = time.time() + PATIENCE_SECONDS
    batch: dict[str, Any] = {}
    waiting, succeeded = list(job_ids), 0
    while time.time() < until and (waiting or not batch.get("ended_at")):
        if reason := quiet.ready.ended():
            raise StackError(reason)
        time.sleep(LOOK_SECONDS)
        if not batch.get("ended_at"):
            batch = quiet.get(f"/v1/messages/batches/{batch_id}")
        if waiting:
            ended = {
                job["id"]: job["state"]
                for job in quiet.get(f"/jobs?ids={','.join(waiting)}")["data"]
                if job["state"] in FINAL
            }
            succeeded += sum(state == "succeeded" for state in ended.values())
            waiting = [each for each in waiting if each not in ended]
    good = batch.get("request_counts", {}).get("succeeded", 0) if batch.get("ended_at") else 0
    return BATCH_ROWS + JOBS - good - succeeded


def _calls(claude_url: str) -> list[dict[str, Any]]:
    text = httpx.get(f"{claude_url}/_simulator/ledger", trust_env=False, timeout=60).text
    return [json.loads(line) for line in text.splitlines()]
