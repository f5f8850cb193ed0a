"""What a chaos run is to show, from the books of both sides."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from rich.table import Table

from scripts.cli.client import Json
from sluice.domain.jobs import Job
from sluice.domain.waits import LEASE_MS

BOUND_SECONDS: Final = LEASE_MS / 1000 + 60
"""A lease; a poll and a batching window; and 10 to 40 s when the next worker puts it back for a throttled store."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much of it is done."""

    jobs: int = 2_000
    seconds: int = 150
    """Over this time the jobs come, and what can break is broken."""
    outage_jobs: int = 60
    outage_receives: int = 101
    """The outage lasts until each of its jobs was received so often."""
    kills: bool = True


@dataclass(slots=True)
class Kill:
    """One worker process that was killed, with the jobs it held."""

    at: float
    job_ids: Sequence[str]


@dataclass(frozen=True, slots=True)
class Found:
    """What the books of both sides say at the end."""

    accepted: int
    succeeded: int
    ended_otherwise: int
    made_twice: int
    """Unknown jobs: a repeated POST did not find those of the first one."""
    explained: int
    """Calls that were billed and brought no result, and that Sluice's ledger names."""
    unexplained: int
    dead_letters: int
    workers_killed: int
    recovery_seconds: Sequence[float]
    """For each job that a killed worker held."""
    most_held: int
    """Jobs that one worker was seen with: 0 when the workers' notes do not come."""
    restarts: int
    throttled_seconds: float
    outage_seconds: float
    outage_receives: int

    @property
    def lost(self) -> int:
        """Jobs that were accepted and never ended."""
        return self.accepted - self.succeeded - self.ended_otherwise

    @property
    def worst_recovery_seconds(self) -> float:
        """The longest that a job of a killed worker waited."""
        return max(self.recovery_seconds, default=0.0)


def table(found: Found) -> Table:
    """Return it as a table."""
    shown = Table("chaos", "", title="Results", title_justify="left")
    recovered = found.recovery_seconds or [0.0]
    worst = found.worst_recovery_seconds
    outage = f"{found.outage_seconds:.0f} s, {found.outage_receives} receives or more"
    for name, value in (
        ("accepted", f"{found.accepted} jobs"),
        ("succeeded", f"{found.succeeded}"),
        ("ended otherwise", f"{found.ended_otherwise}"),
        ("lost", f"{found.lost}"),
        ("made twice by a POST sent again", f"{found.made_twice}"),
        ("billed twice, explained", f"{found.explained} calls"),
        ("billed twice, unexplained", f"{found.unexplained} calls"),
        ("dead letters", f"{found.dead_letters}"),
        ("workers killed", f"{found.workers_killed}"),
        ("jobs in their hands", f"{len(found.recovery_seconds)}"),
        ("recovery after a kill, median", f"{median(recovered):.1f} s"),
        ("recovery after a kill, worst", f"{worst:.1f} s (bound {BOUND_SECONDS:.0f} s)"),
        ("simulator restarts", f"{found.restarts}"),
        ("DynamoDB throttled", f"{found.throttled_seconds:.0f} s"),
        ("outage of 529s", outage),
    ):
        shown.add_row(name, value)
    return shown


def not_as_promised(size: Size, found: Found) -> list[str]:
    """Return the promises that were not kept."""
    receives = size.outage_receives
    kept = {
        f"{size.jobs} jobs accepted": found.accepted == size.jobs,
        "every job succeeded": found.succeeded == size.jobs,
        "no job lost": not found.lost,
        "no job made twice": not found.made_twice,
        "nothing billed twice without a cause": not found.unexplained,
        "no dead letter": not found.dead_letters,
        f"recovery within {BOUND_SECONDS:.0f} s": found.worst_recovery_seconds <= BOUND_SECONDS,
        f"{receives} receives in the outage": found.outage_receives >= receives,
        "workers seen holding jobs": found.most_held > 0,
        "workers killed": found.workers_killed > 0 or not size.kills,
    }
    return [what for what, good in kept.items() if not good]


def billed_twice(
    jobs: Sequence[Job], rows: Sequence[Json], books: Sequence[Json]
) -> tuple[int, int]:
    """Return how many billed calls brought no result, with and without a cause that Sluice's ledger names."""
    billed: dict[str, list[str]] = defaultdict(list)
    for each in books:
        if each["billed"]:
            billed[each["user_id"]].append(each["request_id"])
    named = {row["request_id"] for row in rows if row.get("note") and row.get("request_id")}
    nameless = Counter(row["job_id"] for row in rows if not row.get("request_id"))
    explained = unexplained = 0
    for job in jobs:
        kept = {attempt.request_id for attempt in job.attempts}
        extra = [call_id for call_id in billed[job.custom_id or ""] if call_id not in kept]
        for call_id in extra:
            if call_id in named:
                explained += 1
            elif nameless[job.job_id]:
                nameless[job.job_id] -= 1
                explained += 1
            else:
                unexplained += 1
    return explained, unexplained


def recovery(kills: Sequence[Kill], records: dict[str, Job]) -> list[float]:
    """Return after how many seconds each job of a killed worker went on; if that worker was killed too, until then."""
    killed: dict[str, list[float]] = defaultdict(list)
    for kill in kills:
        for job_id in kill.job_ids:
            killed[job_id].append(kill.at * 1000)
    seconds = []
    for kill in kills:
        at = kill.at * 1000
        for job_id in kill.job_ids:
            job = records.get(job_id)
            if job is None or job.finished_at is None or job.finished_at <= at:
                continue
            signs = [attempt.at for attempt in job.attempts] + killed[job_id]
            went_on = min((sign for sign in signs if sign > at), default=job.finished_at)
            seconds.append((went_on - at) / 1000)
    return seconds
