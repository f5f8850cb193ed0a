"""The sweep of batches: sends ranges that waited outside their queue again, and looks after batches that stand still.

As with single jobs: workers never re-send. What is due is taken before it is sent, so that two sweeps at once send it
once; it is due again later unless it was released, so that a sweep that dies loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sluice.domain.batches import LINES_PER_RANGE, WATCH_MS
from sluice.domain.capacity import startable
from sluice.domain.limits import Group, model_group
from sluice.ports.batches import BatchesQueue, BatchStore, DueRange, RangesQueue, WaitingRanges
from sluice.ports.limits import LimitStore
from sluice.ports.world import Clock, Events

RUN_MS: Final = 60_000
"""The time from one scheduled run to the next, as in template.yaml."""

HOLD_MS: Final = 120_000
"""A range whose sending was not finished is due again after this time: longer than a run lasts."""

LOOK_AT: Final = 1_000
"""Looked at per run."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """What one sweep did."""

    due: int = 0
    ranges: int = 0
    batches: int = 0


class Resume:
    """The use case behind the schedule, together with the governor and the sweep of jobs."""

    def __init__(  # noqa: PLR0913, PLR0917 - its tools
        self,
        batches: BatchStore,
        waiting: WaitingRanges,
        ranges: RangesQueue,
        plans: BatchesQueue,
        limits: LimitStore,
        model_groups: Mapping[str, str],
        clock: Clock,
        events: Events,
    ) -> None:
        self._batches = batches
        self._waiting = waiting
        self._ranges = ranges
        self._plans = plans
        self._limits = limits
        self._model_groups = model_groups
        self._clock = clock
        self._events = events

    def __call__(self, stop_at: int) -> Resumed:
        """Send ranges that are due and can start soon, have late batches looked at; begin nothing after `stop_at`."""
        now = self._clock.now()
        due = self._waiting.due(now, LOOK_AT)
        if not due:
            return Resumed()
        ranges = batches = 0
        for each in self._paced(due, self._limits.groups(), now):
            if self._clock.now() >= stop_at:
                break
            if each.number is None:
                batches += self._look_at(each)
            else:
                ranges += self._send(each, each.number)
        resumed = Resumed(len(due), ranges, batches)
        self._events.note(
            "waiting ranges swept",
            due=resumed.due,
            ranges=resumed.ranges,
            batches=resumed.batches,
        )
        return resumed

    def _look_at(self, due: DueRange) -> bool:
        """Have the planner send whatever a batch lacks, now and every 20 minutes from now on."""
        if self._waiting.postpone(due, self._clock.now() + WATCH_MS) is None:
            return False
        self._plans.send_plan(due.batch_id)
        return True

    def _send(self, due: DueRange, number: int) -> bool:
        batch = self._batches.get(due.batch_id)
        held = self._waiting.postpone(due, self._clock.now() + HOLD_MS)
        if batch is None or held is None or self._ranges.send_ranges(batch, [number]):
            return False
        self._waiting.remove(held)
        return True

    def _paced(self, due: Sequence[DueRange], groups: Sequence[Group], now: int) -> list[DueRange]:
        """Leave out ranges whose rows could not start before the next run. One of each model group always goes."""
        sent: dict[str, int] = {}
        chosen: list[DueRange] = []
        for each in due:
            if each.number is not None:
                name = model_group(each.model or "", self._model_groups)
                room = startable(groups, name, now, now + RUN_MS) // LINES_PER_RANGE + 1
                sent[name] = sent.get(name, 0) + 1
                if sent[name] > room:
                    continue
            chosen.append(each)
        return chosen
