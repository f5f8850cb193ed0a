"""A week of work, from a seed: files with deadlines, normal and slow days, outages, a spend cap."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log, sin, tau
from typing import Final

SECOND: Final = 1_000
MINUTE: Final = 60_000
HOUR: Final = 60 * MINUTE
DAY: Final = 24 * HOUR

DEADLINES: Final = ((0.2, 30 * MINUTE, HOUR), (0.3, HOUR, 4 * HOUR), (0.5, 4 * HOUR, DAY))
"""Share of the rows, and the range from which the time to the deadline is drawn."""

SIZES: Final = ((0.7, 10, 1_000), (0.3, 1_000, 50_000))
"""Share of the files, and the range of their rows; uniform in the logarithm."""

NORMAL: Final = (7 * MINUTE, 1.68)
SLOW: Final = (21 * MINUTE, 2.2)
"""Median and sigma of the lognormal time of an upstream batch, fitted to what users report."""

LEAST: Final = MINUTE
EXPIRES: Final = DAY
SLOW_SHARE: Final = 2 / 7
OUTAGES: Final = 2
OUTAGE: Final = 20 * MINUTE
CAPPED: Final = HOUR
"""From the first refusal for the spend limit until somebody raises the limit."""

SHORTEST_DEADLINE: Final = DEADLINES[0][1]


@dataclass(frozen=True, slots=True)
class File:
    """Rows that arrive together and are due together."""

    number: int
    rows: int
    at: int
    due: int


@dataclass(frozen=True, slots=True)
class Week:
    """What happens, whatever a policy does. Times are milliseconds from the start."""

    seed: int
    files: tuple[File, ...]
    slow_days: frozenset[int]
    outages: tuple[tuple[int, int], ...]
    """Every call to upstream fails, and costs nothing. Upstream batches go on."""
    capped: tuple[int, int]
    """Messages calls and creates are refused. Upstream batches go on, and can be polled, read and canceled."""

    def is_out(self, now: int) -> bool:
        """Return whether every call fails."""
        return any(start <= now < end for start, end in self.outages)

    def is_capped(self, now: int) -> bool:
        """Return whether new work is refused."""
        return self.capped[0] <= now < self.capped[1]

    def is_excused(self, due: int) -> bool:
        """Return whether an outage or the cap fell into the last half hour before a deadline."""
        troubles = (*self.outages, self.capped)
        return any(start <= due < end + SHORTEST_DEADLINE for start, end in troubles)

    def regime(self, now: int) -> tuple[int, float]:
        """Return median and sigma of the time of an upstream batch that is created now."""
        return SLOW if now // DAY in self.slow_days else NORMAL

    def takes(self, name: str, now: int) -> int:
        """Return how long an upstream batch takes. All policies share the luck of a name."""
        median, sigma = self.regime(now)
        luck = random.Random(f"{self.seed} {name}").gauss(0, 1)  # noqa: S311 - no secret
        return max(LEAST, int(median * exp(sigma * luck)))


def a_week(seed: int, rows: int, days: int) -> Week:
    """Return the week of a seed."""
    chance = random.Random(f"week {seed}")  # noqa: S311 - no secret
    slow = chance.sample(range(days), round(days * SLOW_SHARE))
    *outages, capped = _apart(chance, days, [OUTAGE] * OUTAGES + [CAPPED])
    files: list[File] = []
    missing = [share * rows for share, _, _ in DEADLINES]
    left = rows
    while left:
        size = min(left, _size(chance))
        # Shares of rows, not of files: the kind with the most rows missing is the most likely one.
        (kind,) = chance.choices(range(len(missing)), [max(1.0, each) for each in missing])
        missing[kind] -= size
        left -= size
        at = _arrival(chance, days)
        _, shortest, longest = DEADLINES[kind]
        files.append(File(len(files), size, at, at + int(chance.uniform(shortest, longest))))
    files.sort(key=lambda each: each.at)
    return Week(seed, tuple(files), frozenset(slow), tuple(outages), capped)


def _size(chance: random.Random) -> int:
    ((_, least, most),) = chance.choices(SIZES, [each[0] for each in SIZES])
    return round(exp(chance.uniform(log(least), log(most))))


def _arrival(chance: random.Random, days: int) -> int:
    """Return a time of arrival: at 14:00 nine times as many files come as at 02:00."""
    while True:
        at = int(chance.uniform(0, days * DAY))
        if chance.uniform(0, 1.8) < 1 + 0.8 * sin(tau * (at / DAY - 8 / 24)):
            return at


def _apart(chance: random.Random, days: int, lengths: list[int]) -> list[tuple[int, int]]:
    """Return spans of these lengths that do not affect the same deadlines."""
    while True:
        starts = [int(chance.uniform(0, days * DAY - each)) for each in lengths]
        spans = [(start, start + each) for start, each in zip(starts, lengths, strict=True)]
        ordered = sorted(spans)
        if all(one[1] + 2 * SHORTEST_DEADLINE < two[0] for one, two in pairwise(ordered)):
            return spans
