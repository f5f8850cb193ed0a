"""The upstream function: batches that are sent to Claude as Message Batches. Importing it loads the Anthropic SDK."""

from __future__ import annotations

from functools import cache

from sluice.adapters import job_records
from sluice.adapters.claude_batches import SdkUpstreamBatches
from sluice.domain.retries import RetryPolicy
from sluice.upstream.advance import Advance
from sluice.upstream.collect import Collect
from sluice.upstream.tools import UpstreamTools
from sluice.wiring.batch_stores import batches, lane_choice, ranges_queue, upstream_records
from sluice.wiring.shared import CLOCK, prices, settings, telemetry
from sluice.wiring.stores import key_pool, ledger, limits, objects


@cache
def collect() -> Collect:
    """Return the use case that makes upstream batches of what waits."""
    return Collect(
        upstream_records(), batches(), settings().gather_seconds * 1000, CLOCK, telemetry()
    )


@cache
def advance() -> Advance:
    """Return the use case that makes the steps of an upstream batch."""
    return Advance(
        UpstreamTools(
            records=upstream_records(),
            batches=batches(),
            objects=objects(),
            queue=ranges_queue(),
            claude=SdkUpstreamBatches(CLOCK),
            keys=key_pool(),
            limits=limits(),
            ledger=ledger(),
            prices=prices(),
            policy=RetryPolicy(max_attempts=settings().max_attempts),
            poll_ms=settings().waits.poll_ms,
            lanes=lane_choice(),
            text_of_job=job_records.as_text,
            job_of_text=job_records.of_text,
            clock=CLOCK,
            events=telemetry(),
        )
    )
