"""The lane of a batch, and the rescue of an upstream batch, by what is known now: `domain.lanes` with its facts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from sluice.domain import lanes
from sluice.domain.batches import LINES_PER_RANGE, Batch, LaneDecision, Plan
from sluice.domain.errors import StoreBusy
from sluice.domain.limits import Group
from sluice.domain.pricing import BATCH_LANE, LIVE_LANE
from sluice.domain.upstream_batches import CANCEL_MS, Phase, UpstreamBatch, rows_per_minute
from sluice.ports.batches import RangesQueue
from sluice.ports.limits import LimitStore
from sluice.ports.upstream_records import UpstreamRecords, open_batches
from sluice.ports.world import Clock, Events

UNFINISHED: Final = frozenset({Phase.PREPARING, Phase.READY, Phase.SENDING, Phase.OPEN})
"""Phases of upstream batches whose rows may still need the live lane."""

MOST_IN_PROCESSING: Final = 200_000
"""Requests in upstream's queue, per organization: the limit of the lowest tier (Anthropic, rate limits)."""


class LaneChoice:
    """Decides by the limits, the backlog, and the upstream batches that are open."""

    def __init__(
        self,
        records: UpstreamRecords,
        limits: LimitStore,
        queue: RangesQueue,
        clock: Clock,
        events: Events,
    ) -> None:
        self._records = records
        self._limits = limits
        self._queue = queue
        self._clock = clock
        self._events = events

    def decide(self, batch: Batch, plan: Plan) -> LaneDecision:
        """Return the lane of a batch that asks for the batch lane, or for the cheapest one."""
        now = self._clock.now()
        due = min(batch.options.deadline or batch.expires_at, batch.expires_at)
        asked = lanes.Asked(batch.lane)
        rows, situation = batch.rows or plan.estimated_rows, self.situation()
        found = lanes.choose(lanes.Request(rows, due, 0, asked), situation)
        is_meetable = isinstance(found, lanes.Choice)
        choice = found if isinstance(found, lanes.Choice) else found.best
        reason = choice.reason
        if isinstance(found, lanes.Unmeetable):
            reason += f"; warning: {found.reason} ({found.chance_percent} % may be in time)"
        is_batch = choice.lane is lanes.Lane.BATCH
        return LaneDecision(
            lane=BATCH_LANE if is_batch else LIVE_LANE,
            reason=reason,
            at=now,
            most_requests=lanes.largest_piece(rows, due, situation) if is_batch else 0,
            rescue_at=choice.rescue_at,
            is_assured=choice.is_assured,
            is_meetable=is_meetable,
        )

    def revise(self, record: UpstreamBatch) -> lanes.Revision | None:
        """Return whether to rescue an upstream batch now; None if that was decided."""
        return lanes.revise(self.situation()).get(record.upstream_id)

    def situation(self) -> lanes.Situation:
        """Return the facts of a decision."""
        now = self._clock.now()
        groups = self._limits.groups()
        records = [each for each in open_batches(self._records, now) if each.phase in UNFINISHED]
        created = [
            each.accepted_at
            for each in records
            if each.phase is Phase.OPEN and each.accepted_at is not None
        ]
        learned = self._records.learned()
        return lanes.Situation(
            now=now,
            live=lanes.LiveLane(
                rows_per_minute(groups), self._ahead(), _blocked_until(groups, now)
            ),
            batches=tuple(map(_view, records)),
            law=learned.times.law(now, created),
            cancel_ms=max(learned.cancels_ms, default=CANCEL_MS),
            in_processing=sum(
                each.requests for each in records if each.phase in {Phase.SENDING, Phase.OPEN}
            ),
            most_in_processing=MOST_IN_PROCESSING,
        )

    def _ahead(self) -> int:
        """Return about how many rows wait for the live lane."""
        try:
            backlog = self._queue.backlog()
        except StoreBusy as busy:
            self._events.problem("store busy", what=busy.what)
            return 0
        return backlog.visible * LINES_PER_RANGE


def _blocked_until(groups: Sequence[Group], now: int) -> int:
    """Return until when all groups are blocked."""
    return min((max(now, each.blocked_until) for each in groups), default=now)


def _view(record: UpstreamBatch) -> lanes.UnfinishedBatch:
    return lanes.UnfinishedBatch(
        name=record.upstream_id,
        rows=record.requests or record.expected,
        due=record.due,
        created_at=record.accepted_at or (record.sent_at or None),
        canceled_at=record.canceled_at,
        is_assured=record.is_assured,
    )
