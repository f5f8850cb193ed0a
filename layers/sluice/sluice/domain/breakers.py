"""Circuit breakers: what fails again and again is set aside, probed by single calls, and taken back without flapping.

A limit group keeps one for each model that is overloaded (529) and one for each endpoint that does not work (lost
connections, 5xx). They say nothing of limits: buckets and rates stay as they are. Times are epoch milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from sluice.domain.waits import USUAL, Waits

STREAK: Final = 5
"""That many failures in a row open a breaker; a single one is only that job's bad luck."""

PROBES: Final = 2
"""That many probes in a row must be served before everybody may call again."""


@dataclass(frozen=True, slots=True)
class Breaker:
    """One thing that calls depend on and that has failed lately."""

    streak: int = 0
    """Failures since it last worked."""
    open_until: int = 0
    """Nobody calls before; then one probe does."""
    proved: int = 0
    """Probes served in a row since it opened."""

    @property
    def is_open(self) -> bool:
        """Return whether calls have to wait, or to be probes."""
        return self.streak >= STREAK


def failed(breaker: Breaker, now: int, waits: Waits = USUAL) -> Breaker:
    """Count a failure. From the fifth in a row on it is open, for 5 s, then 10, 20, ... up to a minute."""
    counted = replace(breaker, streak=breaker.streak + 1, proved=0)
    if not counted.is_open:
        return counted
    until = now + _pause(counted.streak, waits)
    return replace(counted, open_until=max(breaker.open_until, until))


def served(breaker: Breaker) -> Breaker | None:
    """Count a call that was served; None: it works, and is forgotten."""
    if not breaker.is_open or breaker.proved + 1 >= PROBES:
        return None
    return replace(breaker, proved=breaker.proved + 1, open_until=0)


def probed(breaker: Breaker, start: int, waits: Waits = USUAL) -> Breaker:
    """Let one probe through at `start`: the next one may go a pause later, or as soon as this one was served."""
    if not breaker.is_open:
        return breaker
    return replace(breaker, open_until=start + _pause(breaker.streak, waits))


def _pause(streak: int, waits: Waits) -> int:
    doublings = min(max(0, streak - STREAK), 10)
    return min(waits.breaker_pause_cap_ms, waits.breaker_pause_ms << doublings)
