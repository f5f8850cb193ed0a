"""The dead letters function."""

from __future__ import annotations

from functools import cache

from sluice.adapters.s3 import DeadLetterObjects
from sluice.upkeep.dead_letters import TakeDeadLetter
from sluice.wiring.shared import CLOCK, telemetry
from sluice.wiring.stores import jobs, ledger, objects


@cache
def take_dead_letter() -> TakeDeadLetter:
    """Return the use case behind the dead-letter queue."""
    return TakeDeadLetter(jobs(), DeadLetterObjects(objects()), ledger(), CLOCK, telemetry())
