"""What a chaos run is to show, from the books of both sides."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from rich.table import Table

from scripts.cli.client import Json
from sluice.domain.jobs import LOSSES_TO_SUSPECT, AttemptOutcome, Job
from sluice.domain.waits import RECOVERY_MS
from sluice.worker.suspects import REFILL_MS

BOUND_SECONDS: Final = RECOVERY_MS / 1000
"""Within this time another worker goes on with the job of a killed one (`sluice.domain.waits`)."""

LOST: Final = AttemptOutcome.LOST


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
class Take:
    """A delivery of a job to a worker, with the receive count of its message."""

    at: float
    count: int


@dataclass(slots=True)
class Deliveries:
    """What workers noted of a job."""

    taken: list[Take] = field(default_factory=list)
    returned: list[float] = field(default_factory=list)
    """When a worker that lives acknowledged or returned its message: it had decided what the job waits for."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """How long a job of a killed worker waited until it went on."""

    seconds: float
    is_suspect: bool = False
    """It had lost three workers, so that it waited until its worker ran nothing else."""


@dataclass(frozen=True, slots=True)
class KilledCalls:
    """What one kill did to calls."""

    held: int
    """Jobs that the worker held."""
    in_flight: int
    """Its calls in flight, or answered and not recorded."""
    named: int
    """Those of them that the ledger names."""
    repeated: int
    """Those of them that were made again."""

    @property
    def agree(self) -> bool:
        """Whether each call in flight is in the ledger and was made again, as every job succeeds."""
        return self.in_flight == self.named == self.repeated


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
    recoveries: Sequence[Recovery]
    """For each job that a killed worker held."""
    killed_calls: Sequence[KilledCalls]
    """For each kill."""
    longest_call_seconds: float
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

    def worst_recovery_seconds(self, *, suspects: bool) -> float:
        """The longest that a job of a killed worker waited."""
        chosen = (each for each in self.recoveries if each.is_suspect is suspects)
        return max((each.seconds for each in chosen), default=0.0)

    @property
    def suspects_bound_seconds(self) -> float:
        """Within this time a suspect goes on: its worker takes other jobs for a while, and their calls must end."""
        return BOUND_SECONDS + REFILL_MS / 1000 + self.longest_call_seconds


def table(found: Found) -> Table:
    """Return it as a table."""
    shown = Table("chaos", "", title="Results", title_justify="left")
    recovered = [each.seconds for each in found.recoveries] or [0.0]
    worst = found.worst_recovery_seconds(suspects=False)
    of_suspects = found.worst_recovery_seconds(suspects=True)
    lost = sum(each.in_flight for each in found.killed_calls)
    repeated = sum(each.repeated for each in found.killed_calls)
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
        ("jobs in their hands", f"{sum(each.held for each in found.killed_calls)}"),
        ("calls in flight at the kills", f"{lost}"),
        ("of these in the ledger", f"{sum(each.named for each in found.killed_calls)}"),
        ("of these made again", f"{repeated}"),
        ("recovery after a kill, median", f"{median(recovered):.1f} s"),
        ("recovery after a kill, worst", f"{worst:.1f} s (bound {BOUND_SECONDS:.0f} s)"),
        (
            "the same, of suspects",
            f"{of_suspects:.1f} s (bound {found.suspects_bound_seconds:.0f} s)",
        ),
        ("simulator restarts", f"{found.restarts}"),
        ("DynamoDB throttled", f"{found.throttled_seconds:.0f} s"),
        ("outage of 529s", outage),
    ):
        shown.add_row(name, value)
    return shown


def kills_table(found: Found) -> Table:
    """Return for each kill which calls were in flight, and which were made again."""
    shown = Table("kill", "jobs held", "calls in flight", "in the ledger", "made again", "agree")
    for number, each in enumerate(found.killed_calls, start=1):
        counts = (number, each.held, each.in_flight, each.named, each.repeated)
        shown.add_row(*map(str, counts), "yes" if each.agree else "NO")
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
        "calls in flight at a kill are in the ledger and are those made again": all(
            each.agree for each in found.killed_calls
        ),
        f"recovery within {BOUND_SECONDS:.0f} s": (
            found.worst_recovery_seconds(suspects=False) <= BOUND_SECONDS
        ),
        "recovery of suspects within their bound": (
            found.worst_recovery_seconds(suspects=True) <= found.suspects_bound_seconds
        ),
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


def recovery(
    kills: Sequence[Kill], records: Mapping[str, Job], noted: Mapping[str, Deliveries]
) -> list[Recovery]:
    """Return after how long each job of a killed worker went on; if that worker was killed too, until then.

    A job that its next worker returns waits like any other, for the limits or behind them in the queue.
    """
    killed: dict[str, list[float]] = defaultdict(list)
    for kill in kills:
        for job_id in kill.job_ids:
            killed[job_id].append(kill.at * 1000)
    found = []
    for kill in kills:
        at = kill.at * 1000
        for job_id in kill.job_ids:
            job = records.get(job_id)
            if job is None or job.finished_at is None or job.finished_at <= at:
                continue
            own = noted.get(job_id, Deliveries())
            signs = [*_signs(job), *killed[job_id], *(each * 1000 for each in own.returned)]
            went_on = min((sign for sign in signs if sign > at), default=job.finished_at)
            lost = sum(each.outcome is LOST and each.at <= at for each in job.attempts)
            # Each worker that died after it had received the job and before it could note that took a lease more.
            workers = 1 + _unnoted(own.taken, at / 1000, went_on / 1000)
            seconds = (went_on - at) / 1000 / workers
            found.append(Recovery(seconds, is_suspect=lost >= LOSSES_TO_SUSPECT))
    return found


def _signs(job: Job) -> list[int]:
    """Return when workers went on with a job: they started an attempt, or closed that of a dead worker."""
    lost = [each.ended_at for each in job.attempts if each.outcome is LOST and each.ended_at]
    return [*(each.at for each in job.attempts), *lost]


def _unnoted(taken: Sequence[Take], since: float, until: float) -> int:
    """Return how many deliveries of a job no worker has noted, from the receive counts of those before and after."""
    before = max((take.count for take in taken if take.at <= since), default=0)
    after = min((take.count for take in taken if since < take.at <= until + 1), default=before + 1)
    return max(0, after - before - 1)


def killed_calls(
    kills: Sequence[Kill], records: Mapping[str, Job], rows: Sequence[Json], books: Sequence[Json]
) -> list[KilledCalls]:
    """Return for each kill the calls in flight, by the records of jobs, and those made again, by upstream's books."""
    booked = {row["call_id"] for row in rows}
    called: dict[str, list[float]] = defaultdict(list)
    for each in books:
        called[each["user_id"]].append(each["at"])
    found = []
    for kill in kills:
        lost = [
            (records[job_id], attempt)
            for job_id in kill.job_ids
            if job_id in records
            for attempt in records[job_id].attempts
            if attempt.outcome is LOST and attempt.at <= kill.at * 1000 < (attempt.ended_at or 0)
        ]
        found.append(
            KilledCalls(
                held=len(kill.job_ids),
                in_flight=len(lost),
                named=sum(f"{job.job_id}#{each.version}" in booked for job, each in lost),
                repeated=sum(
                    any(at > kill.at for at in called[job.custom_id or ""]) for job, _ in lost
                ),
            )
        )
    return found
