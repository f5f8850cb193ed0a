"""Upstream and the live lane of a played week: what they accept, finish and charge.

live lane      starts rows in the order in which they came, `rpm` a minute; an answer takes 10 s. Calls that fail
               in an outage or are refused by the spend cap cost nothing and are made again
upstream batch takes a time drawn for it; its rows finish evenly over this time and cost half. A cancel stops it
               at once and ends it two minutes later; rows that have not finished then are not billed. After 24 h
               it expires, with the same result
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Final

from bench.lanes.week import EXPIRES, MINUTE, SECOND, File, Week

TICK: Final = 15 * SECOND
ANSWER: Final = 10 * SECOND
CANCEL: Final = 2 * MINUTE
QUEUE: Final = 500_000
"""Requests in processing that upstream permits an organization of 4,000 RPM."""

LIVE_MICRO_USD: Final = 7_000
BATCH_MICRO_USD: Final = LIVE_MICRO_USD // 2
"""A row of 2,000 input and 300 output tokens of `claude-sonnet-5-5`. Only the quotient matters here."""


class Failed(Exception):
    """Upstream did not do it: an outage, the spend cap, or its queue is full."""


@dataclass(slots=True)
class Batch:
    """An upstream batch."""

    name: str
    file: File
    rows: int
    created_at: int
    takes: int
    """Only a clairvoyant may read it before the batch has ended."""
    canceled_at: int | None = None

    @property
    def stopped_after(self) -> int:
        """The age after which no row finishes."""
        age = EXPIRES if self.canceled_at is None else self.canceled_at - self.created_at
        return min(age, self.takes)

    @property
    def ends_at(self) -> int:
        """When it shows as ended."""
        if self.canceled_at is not None and self.canceled_at - self.created_at < self.takes:
            return self.canceled_at + CANCEL
        return self.created_at + self.stopped_after

    @property
    def done(self) -> int:
        """Rows with a result, once it has ended."""
        return self.rows * self.stopped_after // self.takes


@dataclass(slots=True)
class Score:
    """What a policy reached."""

    rows: int = 0
    met: int = 0
    outside: int = 0
    """Rows whose deadline no outage or cap excuses."""
    met_outside: int = 0
    lanes: Counter[str] = field(default_factory=Counter)
    """Rows billed, by lane."""

    @property
    def micro_usd(self) -> int:
        """The bill."""
        return self.lanes["live"] * LIVE_MICRO_USD + self.lanes["batch"] * BATCH_MICRO_USD

    @property
    def twice(self) -> int:
        """Rows that were billed more than once."""
        return self.lanes.total() - self.rows

    def add(self, other: Score) -> None:
        """Add another week."""
        self.rows += other.rows
        self.met += other.met
        self.outside += other.outside
        self.met_outside += other.met_outside
        self.lanes += other.lanes


class World:
    """Everything outside of a policy."""

    def __init__(self, week: Week, rpm: int) -> None:
        self.week = week
        self.rpm = rpm
        self.now = 0
        self.score = Score()
        self.batches: dict[str, Batch] = {}
        """Those that have not been read."""
        self.waiting: deque[tuple[File, int]] = deque()
        """Rows that were sent to the live lane and have not started."""
        self._credit = 0
        self._done: Counter[int] = Counter()

    # What a policy may call

    @property
    def is_refused(self) -> bool:
        """Whether live calls fail or are refused at the moment, as each of them shows."""
        return self.week.is_out(self.now) or self.week.is_capped(self.now)

    @property
    def ahead(self) -> int:
        """Rows that wait on the live lane."""
        return sum(rows for _, rows in self.waiting)

    def send_live(self, file: File, rows: int) -> None:
        """Append rows to the live lane."""
        if rows:
            self.waiting.append((file, rows))

    def create(self, name: str, file: File, rows: int) -> Batch:
        """Create an upstream batch. Raises Failed."""
        if self.is_refused or self.in_processing + rows > QUEUE:
            raise Failed
        made = Batch(name, file, rows, self.now, self.week.takes(name, self.now))
        self.batches[name] = made
        return made

    @property
    def in_processing(self) -> int:
        """Requests in upstream's queue."""
        return sum(each.rows for each in self.batches.values() if each.ends_at > self.now)

    def has_ended(self, batch: Batch) -> bool:
        """Poll an upstream batch. Raises Failed."""
        self._reach()
        return batch.ends_at <= self.now

    def cancel(self, batch: Batch) -> None:
        """Cancel an upstream batch. Raises Failed."""
        self._reach()
        if batch.canceled_at is None and batch.ends_at > self.now:
            batch.canceled_at = self.now

    def read(self, batch: Batch, saved_at: int) -> int:
        """Read the results of an ended batch, which are saved at a time; return how many rows have none."""
        del self.batches[batch.name]
        self._finished(batch.file, batch.done, saved_at, "batch")
        return batch.rows - batch.done

    # The clock

    def tick(self) -> None:
        """Start what the live lane may start until the next tick."""
        if self.is_refused or not self.waiting:
            self._credit = 0
        else:
            self._credit += self.rpm * TICK // MINUTE
            while self._credit and self.waiting:
                file, rows = self.waiting.popleft()
                run = min(rows, self._credit)
                self._credit -= run
                if run < rows:
                    self.waiting.appendleft((file, rows - run))
                self._finished(file, run, self.now + TICK + ANSWER, "live")
        self.now += TICK

    @property
    def is_over(self) -> bool:
        """Whether every row has a result."""
        return self.score.rows == sum(each.rows for each in self.week.files)

    def _reach(self) -> None:
        if self.week.is_out(self.now):
            raise Failed

    def _finished(self, file: File, rows: int, at: int, lane: str) -> None:
        self.score.lanes[lane] += rows
        new = min(rows, file.rows - self._done[file.number])
        self._done[file.number] += new
        self.score.rows += new
        met = new if at <= file.due else 0
        self.score.met += met
        if not self.week.is_excused(file.due):
            self.score.outside += new
            self.score.met_outside += met
