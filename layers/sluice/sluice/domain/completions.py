"""How long upstream batches take: learned from those of one organization, for the choice of the lane.

An upstream batch reveals nothing before it ends, and one that was canceled or is still open only shows that it takes
longer than its age. Such observations are *censored*, and the rule is that of a life table: for each span of ages,
count the batches that reached it (exposed) and those of them that ended in it. The quotient is the chance to end in
the span; products of such chances give the whole distribution, also that of a batch of a given age.

Four sources, each of which is believed as far as it has seen enough, otherwise the one before it:

    the prior        what users report, for an organization that has learned nothing yet
    all hours        what this organization has seen in the last weeks
    an hour of day   the same, of the batches created in this hour (UTC)
    recent           the last hours, also of batches that are open: a slow day shows within hours, and is
                     forgotten within hours. They scale the chances of all spans by one factor

Times are epoch milliseconds, ages and durations milliseconds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import erf, exp, log, sqrt
from typing import Any, Final

MINUTE_MS: Final = 60_000
HOUR_MS: Final = 60 * MINUTE_MS
DAY_MS: Final = 24 * HOUR_MS

EDGES_MS: Final = tuple(
    minutes * MINUTE_MS
    for minutes in (1, 2, 3, 5, 7, 10, 15, 20, 30, 45, 60, 90, 120, 180, 240, 360, 480, 720, 1080, 1440)
)  # fmt: skip
"""The ends of the spans of ages. After the last one upstream expires a batch
(https://platform.claude.com/docs/en/build-with-claude/batch-processing: 24 hours)."""

SPANS: Final = len(EDGES_MS)
STARTS_MS: Final = (0, *EDGES_MS[:-1])

PRIOR: Final = ((0.75, 7.0, 1.68), (0.25, 21.0, 2.2))
"""Weight, median in minutes and sigma of lognormal distributions: a normal and a slow day.

Anthropic's documentation says that most batches end within an hour. The rest is fitted to what users reported in 2026:
usual times of 5 to 20 minutes, 10 % beyond an hour, single ones of 6 to 20 hours, and days on which all are slow.
"""

BELIEF_ALL_HOURS: Final = 20.0
BELIEF_HOUR: Final = 20.0
"""How many batches a source must have seen in a span to weigh as much as the source before it."""

BELIEF_RECENT: Final = 3.0
"""How many batches must have ended recently, or were expected to, to weigh as much as all that was seen before."""

FORGET_USUAL_MS: Final = 14 * DAY_MS
FORGET_RECENT_MS: Final = 2 * HOUR_MS
"""Half-lives: what was seen so long ago counts half."""

HOURS: Final = 24
VERSION: Final = 1
SCALE: Final = 1000
"""Counts are stored as integers of thousandths."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Numbers of batches per span of ages; not integers, because old ones count less."""

    exposed: tuple[float, ...] = (0.0,) * SPANS
    ended: tuple[float, ...] = (0.0,) * SPANS

    def faded(self, factor: float) -> Seen:
        """Return it with everything counting less."""
        return Seen(
            tuple(each * factor for each in self.exposed),
            tuple(each * factor for each in self.ended),
        )

    def plus(self, other: Seen) -> Seen:
        """Return the sum of both."""
        return Seen(
            tuple(one + two for one, two in zip(self.exposed, other.exposed, strict=True)),
            tuple(one + two for one, two in zip(self.ended, other.ended, strict=True)),
        )

    def hazards(self, believed: Sequence[float], belief: float) -> tuple[float, ...]:
        """Return for each span the chance to end in it, where `believed` weighs as much as `belief` batches."""
        return tuple(
            (ended + belief * before) / (exposed + belief)
            for exposed, ended, before in zip(self.exposed, self.ended, believed, strict=True)
        )

    def scaled(self, believed: Sequence[float], belief: float) -> tuple[float, ...]:
        """Return the chances scaled by one factor: how many batches ended, of those that were expected to.

        One factor for all spans shows a change after a few batches, where each span for itself would need a few.
        """
        expected = sum(
            exposed * before for exposed, before in zip(self.exposed, believed, strict=True)
        )
        factor = (sum(self.ended) + belief) / (expected + belief)
        return tuple(1 - float((1 - before) ** factor) for before in believed)


@dataclass(frozen=True, slots=True)
class Observation:
    """An upstream batch that ended, or that was given up before it ended."""

    created_at: int
    at: int
    """When it ended or was canceled. For a batch that is open: now."""
    has_ended: bool
    """It ended by itself. False: canceled, expired or open, so that it takes longer than this."""


@dataclass(frozen=True, slots=True)
class CompletionTimes:
    """What an organization has learned. Its size is bounded, whatever it has seen."""

    recent: Seen = Seen()
    hours: tuple[Seen, ...] = (Seen(),) * HOURS
    updated_at: int = 0

    def observed(self, seen: Observation) -> CompletionTimes:
        """Return it with one more batch. The order of observations does not matter (up to rounding)."""
        at = max(self.updated_at, seen.at)
        hour = seen.created_at // HOUR_MS % HOURS
        fade = _half(at - self.updated_at, FORGET_USUAL_MS)
        hours = [each.faded(fade) for each in self.hours] if fade < 1 else list(self.hours)
        hours[hour] = hours[hour].plus(_counted(seen, at, FORGET_USUAL_MS))
        recent = self.recent.faded(_half(at - self.updated_at, FORGET_RECENT_MS))
        recent = recent.plus(_counted(seen, at, FORGET_RECENT_MS))
        return CompletionTimes(recent, tuple(hours), at)

    def law(self, now: int, created: Iterable[int] = ()) -> Law:
        """Return the distribution for a batch created now. `created`: creation times of the batches that are open."""
        recent = self.recent.faded(_half(max(0, now - self.updated_at), FORGET_RECENT_MS))
        for each in sorted(created):
            recent = recent.plus(
                _counted(Observation(each, now, has_ended=False), now, FORGET_RECENT_MS)
            )
        total = Seen()
        for each_hour in self.hours:
            total = total.plus(each_hour)
        everywhere = total.hazards(PRIOR_HAZARDS, BELIEF_ALL_HOURS)
        hour = self.hours[now // HOUR_MS % HOURS].hazards(everywhere, BELIEF_HOUR)
        return Law(recent.scaled(hour, BELIEF_RECENT))

    def stored(self) -> dict[str, Any]:
        """Return it as JSON: hours that have seen nothing are left out, counts are thousandths."""
        return {
            "v": VERSION,
            "updated_at": self.updated_at,
            "recent": _written(self.recent),
            "hours": {
                str(hour): _written(seen)
                for hour, seen in enumerate(self.hours)
                if seen.exposed[0] * SCALE >= 1
            },
        }

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> CompletionTimes:
        """Return what `stored` wrote. Raises ValueError for a record of another version or with other spans."""
        if record.get("v") != VERSION:
            raise ValueError(
                f"completion times of version {record.get('v')!r} cannot be read, only version"
                f" {VERSION}: delete the record, and they are learned again"
            )
        hours = [_read(record["hours"].get(str(hour))) for hour in range(HOURS)]
        return cls(_read(record["recent"]), tuple(hours), int(record["updated_at"]))


@dataclass(frozen=True, slots=True)
class Law:
    """A distribution of completion times: the chance to end in each span, for a batch that reached it."""

    hazards: tuple[float, ...]

    def open_after(self, age: int) -> float:
        """Return the share of batches that take longer than this; after 24 hours that of those that expire."""
        left = 1.0
        for start, end, hazard in zip(STARTS_MS, EDGES_MS, self.hazards, strict=True):
            if age >= end:
                left *= 1 - hazard
            else:
                part = max(0, age - start) / (end - start)
                return left * float((1 - hazard) ** part)
        return left

    def chance(self, until: int, age: int = 0) -> float:
        """Return the chance that a batch that is open at an age ends until another age."""
        return 0.0 if until <= age else 1 - self.open_after(until) / self.open_after(age)

    def quantile(self, share: float, age: int = 0) -> int | None:
        """Return the age until which this share of those open at `age` ends; None: it is beyond 24 hours."""
        wanted = (1 - share) * self.open_after(age)
        if wanted < self.open_after(EDGES_MS[-1]):
            return None
        ends = [self.open_after(edge) for edge in EDGES_MS]
        span = bisect_left([-each for each in ends], -wanted)
        before = ends[span - 1] if span else 1.0
        part = log(wanted / before) / log(ends[span] / before)
        return max(age, STARTS_MS[span] + int(part * (EDGES_MS[span] - STARTS_MS[span])))

    def rows_done(self, until: int, age: int = 0) -> float:
        """Return the expected share of its rows that a batch open at `age` has finished at the age `until`.

        Rows are assumed to finish evenly over the time of their batch; Anthropic publishes nothing about it.
        """
        until = max(until, age)
        points = sorted({age, until, *(edge for edge in EDGES_MS if edge > age)})
        done, open_at_age = 0.0, self.open_after(age)
        for start, end in pairwise(points):
            weight = (self.open_after(start) - self.open_after(end)) / open_at_age
            # The mean of until / time over the span, where the time is longer.
            done += weight * (
                1.0 if end <= until else until * log(end / max(start, 1)) / (end - start)
            )
        # Those that take longer than 24 hours: the shortest such time would be 24 hours.
        last = max(points[-1], EDGES_MS[-1])
        return min(1.0, done + self.open_after(last) / open_at_age * min(1.0, until / (2 * last)))


def _half(elapsed: int, half_life: int) -> float:
    return float(exp(-log(2) * elapsed / half_life))


def _counted(seen: Observation, at: int, half_life: int) -> Seen:
    """Count one batch. What it showed at an early age counts less, because it showed that so long ago."""
    age = max(1, seen.at - seen.created_at)
    exposed, ended = [0.0] * SPANS, [0.0] * SPANS
    for span, (start, end) in enumerate(zip(STARTS_MS, EDGES_MS, strict=True)):
        if age <= start:
            break
        weight = _half(max(0, at - min(seen.created_at + end, seen.at)), half_life)
        ends_here = seen.has_ended and age <= end
        ended[span] = weight if ends_here else 0.0
        # A batch that was given up within the span was exposed to a part of it.
        exposed[span] = weight if ends_here else weight * min(1.0, (age - start) / (end - start))
    return Seen(tuple(exposed), tuple(ended))


def _prior_open(age: int) -> float:
    return sum(
        weight * (1 - erf((log(age / MINUTE_MS) - log(median)) / (sigma * sqrt(2)))) / 2
        for weight, median, sigma in PRIOR
    )


def _prior_hazards() -> tuple[float, ...]:
    left = (1.0, *(_prior_open(edge) for edge in EDGES_MS))
    return tuple(1 - after / before for before, after in pairwise(left))


PRIOR_HAZARDS: Final = _prior_hazards()


def _written(seen: Seen) -> list[list[int]]:
    return [[round(each * SCALE) for each in counts] for counts in (seen.exposed, seen.ended)]


def _read(written: Sequence[Sequence[int]] | None) -> Seen:
    if written is None:
        return Seen()
    exposed, ended = (tuple(each / SCALE for each in counts) for counts in written)
    if not len(exposed) == len(ended) == SPANS:
        raise ValueError(
            f"completion times with {len(exposed)} and {len(ended)} counts cannot be read, only with"
            f" {SPANS}: delete the record, and they are learned again"
        )
    return Seen(exposed, ended)
