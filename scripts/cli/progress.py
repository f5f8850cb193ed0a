"""Waiting for jobs: their known states, when to poll again, and progress as plain lines."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, Self, TextIO

from scripts.cli import terminal
from scripts.cli.client import FINAL_STATES, MAX_IDS_PER_LOOK, Json
from scripts.cli.errors import CommandFailed, GatewayRefused, GatewayUnreachable

RATE_WINDOW_SECONDS = 20.0
# Before this time, the rate would describe the first answers, not the run.
RATE_NEEDS_SECONDS = 4.0
ETA_NEEDS_CALLS = 10
LIMITS_EVERY_SECONDS = 10.0
LINES_EVERY_SECONDS = 5.0

SOONEST_LOOK_SECONDS = 0.5
LATEST_LOOK_SECONDS = 5.0
IDS_PER_ROUND = 10 * MAX_IDS_PER_LOOK
LOOKS_IN_FLIGHT = 4
# Give up if the gateway has not responded for this long.
UNREACHABLE_PATIENCE_SECONDS = 900.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the progress display shows at a point in time."""

    total: int
    succeeded: int
    failed: int
    running: int
    waiting: int
    cost_micro_usd: int
    per_minute: float | None
    limit_per_minute: int | None
    eta_seconds: float | None
    unknown_costs: int = 0
    """Calls whose cost is unknown and not in `cost_micro_usd`."""
    uncertain_calls: int = 0
    """Calls that may have been billed."""

    @property
    def cost(self) -> str:
        """The cost so far, as text."""
        return cost_text(self.cost_micro_usd, self.unknown_costs, self.uncertain_calls)

    @property
    def done(self) -> int:
        """Jobs in a final state."""
        return self.succeeded + self.failed

    def text(self) -> str:
        """All counts on one line."""
        parts = [
            f"{self.failed} failed",
            f"{self.waiting} waiting",
            f"{self.running} running",
        ]
        if self.per_minute is not None:
            limit = "" if self.limit_per_minute is None else f" of {self.limit_per_minute:,}"
            parts.append(f"{self.per_minute:,.0f}{limit} requests/min")
        elif self.limit_per_minute is not None:
            parts.append(f"limit {self.limit_per_minute:,} requests/min")
        if self.eta_seconds is not None:
            parts.append(f"ETA {span(self.eta_seconds)}")
        parts.append(self.cost)
        return " · ".join(parts)


def batch_snapshot(batch: Json, now: datetime) -> Snapshot:
    """Return the progress of a batch, whose rows only the gateway knows."""
    rows = batch["rows"]
    end = batch["estimated_end_at"]
    failed = rows["errored"] + rows["canceled"] + rows["expired"] + rows["invalid"]
    return Snapshot(
        total=max(rows["expected"], rows["done"]),
        succeeded=rows["succeeded"],
        failed=failed,
        running=0,
        waiting=max(0, rows["expected"] - rows["done"]),
        cost_micro_usd=batch.get("known_cost_micro_usd") or batch["cost_micro_usd"] or 0,
        unknown_costs=batch.get("unknown_costs", 0),
        uncertain_calls=batch.get("uncertain_calls", 0),
        per_minute=None,
        limit_per_minute=None,
        eta_seconds=(
            max(0.0, (datetime.fromisoformat(end) - now).total_seconds()) if end else None
        ),
    )


class Tally:
    """The known states of the jobs to wait for. It reads no clock: each call passes the time."""

    def __init__(
        self,
        job_ids: Iterable[str],
        started_at: float,
        group_of: Callable[[str], str] = str,
    ) -> None:
        self._states = dict.fromkeys(job_ids, "queued")
        self._total = len(self._states)
        self._turn = deque(self._states)
        self._counts = Counter(self._states.values())
        self._cost_micro_usd = 0
        self._unknown_costs = 0
        self._started_at = started_at
        self._finishes: deque[tuple[float, int]] = deque()
        self._limits: list[Json] = []
        self._group_of = group_of
        self._groups: set[str] = set()

    @property
    def unfinished(self) -> int:
        """Jobs that are not known to have ended."""
        return len(self._states)

    @property
    def succeeded(self) -> int:
        """Jobs that succeeded."""
        return self._counts["succeeded"]

    def next_round(self) -> list[str]:
        """Return the unfinished jobs to poll now: all of them, or the next thousand in turn."""
        names: list[str] = []
        for _ in range(len(self._turn)):
            if len(names) == IDS_PER_ROUND:
                break
            job_id = self._turn.popleft()
            if job_id in self._states:
                self._turn.append(job_id)
                names.append(job_id)
        return names

    def note(self, jobs: Iterable[Json], now: float) -> list[Json]:
        """Record the result of a poll; return the jobs that have ended since."""
        finished: list[Json] = []
        for job in jobs:
            before = self._states.get(job["id"])
            if before is None:
                continue
            state = job["state"]
            self._groups.add(self._group_of(job["model"]))
            self._counts[before] -= 1
            self._counts[state] += 1
            self._states[job["id"]] = state
            if state in FINAL_STATES:
                del self._states[job["id"]]
                cost = job.get("known_cost_micro_usd", job.get("cost_micro_usd"))
                self._cost_micro_usd += cost or 0
                self._unknown_costs += job.get("unknown_costs") or 0
                finished.append(job)
        # A job that was canceled before it started made no request.
        called = sum(job["state"] in {"succeeded", "errored"} for job in finished)
        if called:
            self._finishes.append((now, called))
        return finished

    def note_limits(self, groups: Iterable[Json]) -> None:
        """Record the limit groups."""
        self._limits = list(groups)

    def snapshot(self, now: float) -> Snapshot:
        """Return the progress at this time."""
        while self._finishes and self._finishes[0][0] < now - RATE_WINDOW_SECONDS:
            self._finishes.popleft()
        elapsed = now - self._started_at
        per_minute = eta = None
        if elapsed >= RATE_NEEDS_SECONDS:
            recent = sum(calls for _, calls in self._finishes)
            per_second = recent / min(elapsed, RATE_WINDOW_SECONDS)
            per_minute = per_second * 60
            if self.unfinished and recent >= ETA_NEEDS_CALLS:
                eta = self.unfinished / per_second
        return Snapshot(
            total=self._total,
            succeeded=self._counts["succeeded"],
            failed=sum(self._counts[state] for state in FINAL_STATES - {"succeeded"}),
            running=self._counts["running"],
            waiting=self._counts["queued"],
            cost_micro_usd=self._cost_micro_usd,
            per_minute=per_minute,
            limit_per_minute=self._limit_per_minute(),
            eta_seconds=eta,
            unknown_costs=self._unknown_costs,
        )

    def _limit_per_minute(self) -> int | None:
        """The sum of the learned request limits of all limit groups that these jobs use."""
        known = [
            group["limits"]["requests"]
            for group in self._limits
            if group["model_group"] in self._groups and group.get("limits") and group["learned"]
        ]
        return sum(limit for limit in known if limit) or None


class Looks(Protocol):
    """What `wait_for` needs of a gateway."""

    def look(self, job_ids: Sequence[str]) -> list[Json]:
        """Return the summaries of up to 100 jobs."""

    def limits(self) -> list[Json]:
        """Return all limit groups."""


class Display(Protocol):
    """Where progress is shown, inside a `with` block."""

    def __enter__(self) -> Self:
        """Start to show progress."""

    def __exit__(self, *_: object) -> None:
        """Stop; the last counts stay visible."""

    def show(self, snapshot: Snapshot, now: float) -> None:
        """Show the latest counts."""

    def note(self, text: str) -> None:
        """Show a message once, beside the counts."""


def wait_for(  # noqa: PLR0913 - the last two are the outside world
    gateway: Looks,
    job_ids: Iterable[str],
    *,
    display: Display,
    group_of: Callable[[str], str] = str,
    on_finished: Callable[[list[Json]], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Snapshot:
    """Wait until every job has ended and show progress; return the final counts.

    The polling interval, 0.5 s to 5 s, halves after a change and grows by half otherwise. Its
    minimum grows with the number of unfinished jobs, because the cost of a poll is per job.
    """
    tally = Tally(job_ids, clock(), group_of)
    pause = SOONEST_LOOK_SECONDS
    limits_at = answered_at = clock()
    display.show(tally.snapshot(clock()), clock())
    with ThreadPoolExecutor(LOOKS_IN_FLIGHT) as pool:
        while tally.unfinished:
            sleep(pause)
            names = tally.next_round()
            chunks = [
                names[at : at + MAX_IDS_PER_LOOK] for at in range(0, len(names), MAX_IDS_PER_LOOK)
            ]
            try:
                seen = [job for jobs in pool.map(gateway.look, chunks) for job in jobs]
                if clock() >= limits_at:
                    tally.note_limits(gateway.limits())
                    limits_at = clock() + LIMITS_EVERY_SECONDS
            except (GatewayUnreachable, GatewayRefused) as failure:
                if _is_lasting(failure) or clock() - answered_at > UNREACHABLE_PATIENCE_SECONDS:
                    raise
                display.note(f"{failure}; the jobs keep running, retrying")
                pause = LATEST_LOOK_SECONDS
                continue
            answered_at = clock()
            finished = tally.note(seen, answered_at)
            if finished:
                on_finished(finished)
            display.show(tally.snapshot(answered_at), answered_at)
            least = min(LATEST_LOOK_SECONDS, SOONEST_LOOK_SECONDS * max(1, len(chunks)))
            pause = max(least, pause / 2) if finished else min(LATEST_LOOK_SECONDS, pause * 1.5)
    return tally.snapshot(clock())


def _is_lasting(failure: CommandFailed) -> bool:
    """Return whether another poll would get the same response."""
    return (
        isinstance(failure, GatewayRefused) and failure.status < 500 and failure.status != 429  # noqa: PLR2004
    )


class PlainLines:
    """Progress for logs and pipes: a line every five seconds, and one at the end."""

    def __init__(self, stream: TextIO, *, now: Callable[[], datetime] = datetime.now) -> None:
        self._stream = stream
        self._now = now
        self._shown_at: float | None = None

    def __enter__(self) -> Self:
        """Do nothing."""
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing."""

    def show(self, snapshot: Snapshot, now: float) -> None:
        """Print a line if one is due or all jobs have ended."""
        due = self._shown_at is None or now - self._shown_at >= LINES_EVERY_SECONDS
        if due or snapshot.done == snapshot.total > 0:
            self._shown_at = now
            self.note(f"{snapshot.done}/{snapshot.total} done · {snapshot.text()}")

    def note(self, text: str) -> None:
        """Print a line."""
        print(f"{self._now():%H:%M:%S}  {terminal.line(text)}", file=self._stream, flush=True)


def span(seconds: float) -> str:
    """Return a duration as `42 s`, `3 min 05 s` or `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:  # noqa: PLR2004
        return f"{whole} s"
    if whole < 3600:  # noqa: PLR2004
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def cost_of(facts: Json) -> str:
    """Return the cost of a job, batch or report; in words where it is unknown, never as a number too low."""
    micro_usd, unknown = facts.get("cost_micro_usd"), facts.get("unknown_costs") or 0
    uncertain = facts.get("uncertain_calls") or 0
    if micro_usd is not None:
        return cost_text(micro_usd, 0, uncertain)
    if not unknown:
        return "-"
    known = facts.get("known_cost_micro_usd") or 0
    return cost_text(known, unknown, uncertain)


def cost_text(known_micro_usd: int, unknown_costs: int, uncertain_calls: int = 0) -> str:
    """Return a cost of which some calls' part is unknown, or which has calls that may have been billed."""
    text = dollars(known_micro_usd)
    if unknown_costs:
        text = f"{text} + {_calls(unknown_costs)} of unknown cost" if known_micro_usd else "unknown"
    return f"{text} + {_calls(uncertain_calls)} possibly billed" if uncertain_calls else text


def _calls(count: int) -> str:
    return "1 call" if count == 1 else f"{count:,} calls"


def dollars(micro_usd: int) -> str:
    """Return micro-dollars as dollars: `$0.000123` below one dollar, `$4.20` from one dollar."""
    whole, rest = divmod(micro_usd, 1_000_000)
    return f"${whole:,}.{rest // 10_000:02}" if whole else f"${whole}.{rest:06}"
