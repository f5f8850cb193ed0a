"""What the steps of an upstream batch need from the world."""

from __future__ import annotations

from dataclasses import dataclass

from sluice.bulk.lane_choice import LaneChoice
from sluice.domain.pricing import PriceList
from sluice.domain.retries import RetryPolicy
from sluice.ports.batches import RangesQueue
from sluice.ports.limits import KeyPool, LimitStore
from sluice.ports.upstream import UpstreamBatches
from sluice.ports.upstream_records import UpstreamRecords
from sluice.worker.range_claim import ClaimTools


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamTools(ClaimTools):
    """The ports of upstream batches, besides those of their ranges, and the rules of the deployment."""

    records: UpstreamRecords
    queue: RangesQueue
    claude: UpstreamBatches
    keys: KeyPool
    limits: LimitStore
    prices: PriceList
    policy: RetryPolicy
    poll_ms: int
    """The first pause between two polls."""
    lanes: LaneChoice
