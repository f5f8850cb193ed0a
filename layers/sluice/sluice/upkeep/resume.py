"""The sweep of batches: sends messages for parked ranges that are due, and checks batches that make no progress.

As with jobs, workers never send to their own queue. What is due is postponed before it is sent, so that concurrent
sweeps send it once. It is due again later unless it is removed, so that a sweep that dies loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sluice.domain.batches import LINES_PER_RANGE, WATCH_MS
from sluice.domain.capacity import startable
from sluice.domain.limits import Group
from sluice.domain.models import model_group
from sluice.domain.turns import in_turns
from sluice.ports.batches import BatchStore, DueRange, Plans, RangesQueue, WaitingRanges
from sluice.ports.limits import LimitStore
from sluice.ports.world import Clock, Events
from sluice.upkeep.schedule import RUN_MS, UNSENT_MS

DUE_SHARE: Final = 1_000
"""Maximum due ranges of each tenant and model considered per run, and due batches of each tenant."""


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
        plans: Plans,
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
        """Send due ranges that can start soon, and have due batches checked; start nothing after `stop_at`."""
        now = self._clock.now()
        due = self._waiting.due(now, DUE_SHARE)
        if not due:
            return Resumed()
        ranges = batches = 0
        for each in self._paced(due, self._limits.groups(), now):
            if self._clock.now() >= stop_at:
                break
            if each.number is None:
                batches += self._check(each)
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

    def _check(self, due: DueRange) -> bool:
        """Have the planner send the missing messages of a batch, now and every 20 minutes."""
        if self._waiting.postpone(due, self._clock.now() + WATCH_MS) is None:
            return False
        self._plans.send_plan(due.batch_id, due.tenant)
        return True

    def _send(self, due: DueRange, number: int) -> bool:
        batch = self._batches.get(due.batch_id)
        postponed = self._waiting.postpone(due, self._clock.now() + UNSENT_MS)
        if batch is None or postponed is None or self._ranges.send_ranges(batch, [number]):
            return False
        self._waiting.remove(postponed)
        return True

    def _paced(self, due: Sequence[DueRange], groups: Sequence[Group], now: int) -> list[DueRange]:
        """Return the ranges whose rows can start before the next run, but one of each tenant and model group.

        Tenants take turns, and the batches of each tenant: a run that ends early has done something for each of them.
        One range of a blocked group finds out whether its tenant has a key of another organization. A range without a
        model wakes for the end of a row, which needs no limit.
        """
        room: dict[str, int] = {}
        seen: set[tuple[str, str]] = set()
        by_model = {**self._model_groups, **self._limits.models().groups()}
        chosen: list[DueRange] = []
        for each in in_turns(due, _tenant, _batch):
            if each.number is not None and each.model is not None:
                name = model_group(each.model, by_model, each.tenant)
                if name not in room:
                    room[name] = startable(groups, name, now, now + RUN_MS) // LINES_PER_RANGE
                is_first = (each.tenant, name) not in seen
                if room[name] <= 0 and not is_first:
                    continue
                seen.add((each.tenant, name))
                room[name] -= 1
            chosen.append(each)
        return chosen


def _tenant(due: DueRange) -> str:
    return due.tenant


def _batch(due: DueRange) -> str:
    return due.batch_id
