"""How an attempt at a job ends, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sluice.domain.jobs import Job
from sluice.domain.waits import Place


@dataclass(frozen=True, slots=True)
class Done:
    """There is nothing more to do for the message: it may be deleted."""


@dataclass(frozen=True, slots=True)
class Wait:
    """The job goes on at a time (epoch milliseconds); `where` says where it waits until then."""

    until: int
    where: Place
    job: Job | None = None
    """The record as it was written last, where it is known."""


@dataclass(frozen=True, slots=True)
class Again:
    """The job goes on at once, from this record."""

    job: Job


Ending = Done | Wait | Again
DONE: Final = Done()
