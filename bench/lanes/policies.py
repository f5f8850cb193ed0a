"""Who decides which rows go where, and when. A policy is played tick by tick; all obey the limits of `world.py`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from math import exp
from statistics import NormalDist
from typing import Final

from bench.lanes.week import LEAST, MINUTE, SECOND, File, Week
from bench.lanes.world import CANCEL, QUEUE, TICK, Batch, Failed, World
from sluice.domain import lanes
from sluice.domain.completions import CompletionTimes, Law, Observation
from sluice.domain.lanes import (
    LEAD_MS,
    PACE_PERCENT,
    READY_MS,
    SEND_MS,
    STEP_MS,
    TAIL_MS,
    Choice,
    Lane,
    LiveLane,
    Request,
    Situation,
    UnfinishedBatch,
)
from sluice.domain.upstream_batches import CANCEL_MS, MOST_REQUESTS

RESULTS: Final = 30 * SECOND
ROWS_READ_PER_SECOND: Final = 4_000
"""To read and save the results of an upstream batch: half a minute, and more for many rows."""

CANCELS: Final = 50
"""Cancels whose times `Auto` remembers."""

LAW_MS: Final = 5 * MINUTE
"""How often `Auto` computes the distribution again."""


class Policy:
    """The base: what all have in common is a world and the files that arrive in it."""

    def __init__(self, world: World) -> None:
        self.world = world

    def arrived(self, file: File) -> None:
        """Accept a file."""
        raise NotImplementedError

    def tick(self) -> None:
        """Do what is due."""


def play(week: Week, rpm: int, policy: Callable[[World], Policy]) -> World:
    """Play a week to its end: until every row has a result."""
    world = World(week, rpm)
    player = policy(world)
    files = iter([*week.files, None])
    file = next(files)
    while not world.is_over:
        while file is not None and file.at <= world.now:
            player.arrived(file)
            file = next(files)
        player.tick()
        world.tick()
    return world


class AllLive(Policy):
    """Every row is a live call at once."""

    def arrived(self, file: File) -> None:
        """Send it."""
        self.world.send_live(file, file.rows)


@dataclass(slots=True)
class _Piece:
    """A part of a file for which an upstream batch is to be created."""

    name: str
    file: File
    rows: int
    ready_at: int
    is_assured: bool = True

    def seen(self) -> UnfinishedBatch:
        return UnfinishedBatch(self.name, self.rows, self.file.due, is_assured=self.is_assured)


class _Steps(Policy):
    """Creates, polls and reads upstream batches, in a step a minute, as the product does."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.pieces: dict[str, _Piece] = {}
        self.results: list[tuple[int, Batch]] = []
        """Batches that are being read, and when this is done."""

    def tick(self) -> None:
        """Send the unfinished rows of what has been read; once a minute, do a step."""
        now = self.world.now
        saved = [each for each in self.results if each[0] <= now]
        for each in sorted(saved, key=lambda each: each[1].file.due):
            self.results.remove(each)
            self.unfinished(each[1], self.world.read(each[1], each[0]))
        if now % STEP_MS == 0:
            self.step()

    def step(self) -> None:
        """Create what is ready, poll what is open."""
        world = self.world
        for piece in [each for each in self.pieces.values() if each.ready_at <= world.now]:
            try:
                world.create(piece.name, piece.file, piece.rows)
            except Failed:
                continue
            del self.pieces[piece.name]
        reading = {each.name for _, each in self.results}
        for batch in [each for each in world.batches.values() if each.name not in reading]:
            try:
                if not world.has_ended(batch):
                    continue
            except Failed:
                continue
            takes = RESULTS + batch.rows * SECOND // ROWS_READ_PER_SECOND
            self.results.append((world.now + takes, batch))

    def unfinished(self, batch: Batch, rows: int) -> None:
        """Go on with the rows of an ended batch that have no result."""
        raise NotImplementedError


class AllBatch(_Steps):
    """Every row is in an upstream batch; rows that expire go into another one."""

    def arrived(self, file: File) -> None:
        """Cut it into as few pieces as possible."""
        for start in range(0, file.rows, MOST_REQUESTS):
            name, rows = f"{file.number}.{start}", min(MOST_REQUESTS, file.rows - start)
            self.pieces[name] = _Piece(name, file, rows, self.world.now + SEND_MS)

    def unfinished(self, batch: Batch, rows: int) -> None:
        """Try again."""
        if rows:
            name = f"{batch.name}+"
            self.pieces[name] = _Piece(name, batch.file, rows, self.world.now + SEND_MS)


class Auto(_Steps):
    """The product: `sluice/domain/lanes.py`, with what polls and its own books show."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.times = CompletionTimes()
        self.unassured: set[str] = set()
        self.cancels: deque[int] = deque([CANCEL_MS], CANCELS)
        """How long the last ones took."""
        self._law: tuple[int, Law] = (-LAW_MS, self.times.law(0))

    def arrived(self, file: File) -> None:
        """Ask for the lane."""
        request = Request(file.rows, file.due, file.rows)
        answer = lanes.choose(request, self.situation())
        # Accepted with a warning, as the callers of these files want it.
        choice = answer if isinstance(answer, Choice) else answer.best
        if choice.lane is Lane.LIVE:
            self.world.send_live(file, file.rows)
            return
        for number, rows in enumerate(choice.pieces):
            name = f"{file.number}.{number}"
            ready_at = self.world.now + SEND_MS
            self.pieces[name] = _Piece(name, file, rows, ready_at, choice.is_assured)
            if not choice.is_assured:
                self.unassured.add(name)

    def situation(self) -> Situation:
        """Return what the product knows."""
        world = self.world
        # A lane whose calls fail is tried again and again. Nothing is planned before it has answered.
        blocked_until = world.now + 2 * LEAD_MS if world.is_refused else 0
        live = LiveLane(world.rpm, world.ahead, blocked_until)
        return Situation(
            world.now,
            live,
            (*(each.seen() for each in self.pieces.values()), *map(self.seen, self.waited_for())),
            self.law(),
            world.in_processing,
            QUEUE,
            max(self.cancels),
        )

    def waited_for(self) -> list[Batch]:
        """Return the batches whose results are not there."""
        return list(self.world.batches.values())

    def seen(self, batch: Batch) -> UnfinishedBatch:
        """Return a batch without what only upstream knows."""
        return UnfinishedBatch(
            batch.name,
            batch.rows,
            batch.file.due,
            batch.created_at,
            batch.canceled_at,
            is_assured=batch.name not in self.unassured,
        )

    def law(self) -> Law:
        """Return the completion times as learned, at most some minutes old."""
        at, law = self._law
        if self.world.now - at >= LAW_MS:
            at = self.world.now
            being_read = {each.name for _, each in self.results}
            law = self.times.law(
                at,
                [
                    each.created_at
                    for each in self.waited_for()
                    if each.canceled_at is None and each.name not in being_read
                ],
            )
            self._law = at, law
        return law

    def step(self) -> None:
        """Create and poll, then revise."""
        super().step()
        if not self.world.batches and not self.pieces:
            return
        being_read = {each.name for _, each in self.results}
        for name, revision in lanes.revise(self.situation()).items():
            if not revision.rescue or name in being_read:
                continue
            if name in self.pieces:
                piece = self.pieces.pop(name)
                self.world.send_live(piece.file, piece.rows)
                continue
            try:
                self.world.cancel(self.world.batches[name])
            except Failed:
                continue

    def unfinished(self, batch: Batch, rows: int) -> None:
        """Learn from the batch; the live lane runs its other rows."""
        seen = (
            Observation(batch.created_at, batch.ends_at, has_ended=True)
            if not rows
            else Observation(
                batch.created_at, batch.created_at + batch.stopped_after, has_ended=False
            )
        )
        self.times = self.times.observed(seen)
        if rows and batch.canceled_at is not None:
            self.cancels.append(batch.ends_at - batch.canceled_at)
        self.world.send_live(batch.file, rows)


# The clairvoyant

PIECE: Final = 2_000
DRAWS: Final = 400


@cache
def value_of_time(median: int, sigma: float) -> tuple[float, ...]:
    """Return, per minute left until the last moment of a rescue, the share of rows that can be had at half price.

    The mean, if each upstream batch whose time is known to be too long is canceled at once and another one is created
    after the two minutes of the cancel, whenever this gives more on average than to keep it until the last moment.
    """
    normal = NormalDist()
    times = [
        max(LEAST, median * exp(sigma * normal.inv_cdf((draw + 0.5) / DRAWS)))
        for draw in range(DRAWS)
    ]
    values = [0.0]
    for left in range(1, 24 * 60 + 1):
        # Of a batch that is canceled at once, nothing is finished.
        again = values[max(0, left - CANCEL // MINUTE)]
        values.append(sum(max(min(1.0, left * MINUTE / each), again) for each in times) / DRAWS)
    return tuple(values)


class Clairvoyant(Policy):
    """Knows the time of each upstream batch as soon as it exists, and loses no time with steps, polls and results.

    It creates an upstream batch for every piece at once. If the batch ends in time, it waits. If not, it either keeps
    it until the last moment for its rescue, which it knows exactly, because it knows how many rows will be finished,
    or it cancels it at once and creates another one, whichever gives more rows at half price on average
    (`value_of_time` computes this from the true distribution of the day). It plans with the whole live limit. It does
    not know outages, the cap, or future files.
    """

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.pieces: list[_Piece] = []
        self.late: dict[str, Batch] = {}
        """Batches that will be rescued."""
        self._numbers = count()

    def arrived(self, file: File) -> None:
        """Cut it into small pieces, whose times are independent."""
        for start in range(0, file.rows, PIECE):
            self.again(file, min(PIECE, file.rows - start))

    def again(self, file: File, rows: int) -> None:
        """Prepare an upstream batch."""
        self.pieces.append(_Piece(f"{file.number}c{next(self._numbers)}", file, rows, 0))

    def tick(self) -> None:
        """Read, create, rescue."""
        world = self.world
        if world.week.is_out(world.now):
            return
        for batch in [each for each in world.batches.values() if each.ends_at <= world.now]:
            self.late.pop(batch.name, None)
            rows = world.read(batch, world.now)
            if rows:
                self.again(batch.file, rows)
        self.give_up()
        pieces, self.pieces = self.pieces, []
        for piece in pieces:
            try:
                batch = world.create(piece.name, piece.file, piece.rows)
            except Failed:
                self.pieces.append(piece)
                continue
            if batch.created_at + batch.takes > piece.file.due - TICK:
                self.consider(batch)
        for name, interval in self.intervals().items():
            if (
                name in self.late
                and interval.start - CANCEL - TICK <= world.now
                and not world.is_refused
            ):
                world.cancel(self.late[name])

    def consider(self, batch: Batch) -> None:
        """Keep a batch that is late until its rescue, or cancel it at once."""
        world = self.world
        self.late[batch.name] = batch
        left = max(0, self.intervals()[batch.name].start - CANCEL - world.now)
        values = value_of_time(*world.week.regime(world.now))
        again = values[min(len(values) - 1, max(0, left - CANCEL) // MINUTE)]
        if again > left / batch.takes:
            world.cancel(batch)

    def intervals(self) -> dict[str, lanes.Interval]:
        """Return the intervals of what is late or waits, for the rows that upstream batches will not have finished."""
        world = self.world
        live = LiveLane(world.rpm * 100 // PACE_PERCENT, world.ahead)
        # The lead of the plan is that of the product; the clairvoyant's rows are ready at once.
        ready = world.now - READY_MS
        works = [
            *(replace(each.seen(), canceled_at=ready) for each in self.pieces),
            *(replace(self.unfinished(each), canceled_at=ready) for each in self.late.values()),
        ]
        return lanes.plan(works, live, world.now)

    def unfinished(self, batch: Batch) -> UnfinishedBatch:
        """Return a late batch with the rows that the live lane will have to run."""
        drain = batch.rows * MINUTE // self.world.rpm
        stop = batch.canceled_at or batch.file.due - TAIL_MS - drain - CANCEL
        share = min(1.0, max(0, stop - batch.created_at) / batch.takes)
        rows = batch.rows - int(batch.rows * share)
        return UnfinishedBatch(batch.name, rows, batch.file.due)

    def give_up(self) -> None:
        """Send pieces live that have no time left for an upstream batch."""
        intervals = self.intervals()
        for piece in list(self.pieces):
            if intervals[piece.name].start - TICK <= self.world.now + CANCEL:
                self.pieces.remove(piece)
                self.world.send_live(piece.file, piece.rows)
