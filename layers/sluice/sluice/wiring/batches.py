"""The batches function: plans files and assembles results."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from sluice.adapters.sqs import Hidden
from sluice.bulk.assemble import Assemble
from sluice.bulk.plan import PlanBatch
from sluice.domain.batches import longest_wait_ms
from sluice.wiring.batch_stores import batches, lane_choice, ranges_queue, upstream_records
from sluice.wiring.notices import notices
from sluice.wiring.shared import CLOCK, settings, sqs, telemetry
from sluice.wiring.stores import objects

if TYPE_CHECKING:
    from sluice.ports.jobs import Received


def hidden(message: Received) -> Hidden:
    """Keep a message of the batches queue hidden while it is processed."""
    return Hidden(sqs(), settings().batches_queue_url, message)


@cache
def assemble() -> Assemble:
    """Return the use case that assembles results."""
    return Assemble(batches(), objects(), notices(), CLOCK, telemetry())


@cache
def plan_batch() -> PlanBatch:
    """Return the use case that divides files into ranges."""
    return PlanBatch(
        batches(),
        objects(),
        ranges_queue(),
        assemble(),
        settings().webhook_networks,
        CLOCK,
        telemetry(),
        upstream_records(),
        lane_choice(),
        longest_wait_ms(settings().retention_days),
        settings().default_lane,
    )
