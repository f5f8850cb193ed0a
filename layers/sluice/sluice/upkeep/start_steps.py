"""Starts the steps of upstream batches that are due. While there is none, that is two small reads a minute."""

from __future__ import annotations

from typing import Final

from sluice.domain.errors import StoreBusy
from sluice.domain.turns import in_turns
from sluice.ports.limits import Executions
from sluice.ports.upstream_records import DueStep, Steps, UpstreamRecords
from sluice.ports.world import Clock, Events

MOST_STARTED: Final = 20
"""Upstream batches advanced per run, each by an invocation of its own: one that fails delays no other. Tenants take
turns, so that many of one do not delay those of another."""

EXECUTIONS_PER_STEP: Final = 50
"""With fewer concurrent executions in the account, fewer are advanced at once, but always one."""


class StartSteps:
    """The part of the schedule for the batch lane."""

    def __init__(
        self,
        records: UpstreamRecords,
        steps: Steps,
        executions: Executions,
        clock: Clock,
        events: Events,
    ) -> None:
        self._records = records
        self._steps = steps
        self._executions = executions
        self._clock = clock
        self._events = events

    def __call__(self) -> None:
        """Start an invocation for each upstream batch that is due, and one that collects if a batch waits."""
        now = self._clock.now()
        due: list[str | None] = []
        if found := self._records.due(now, MOST_STARTED):
            most = min(MOST_STARTED, max(1, self._executions.at_once() // EXECUTIONS_PER_STEP))
            due += [each.upstream_id for each in in_turns(found, _tenant)[:most]]
        if self._records.waiting(1):
            due.append(None)
        for each in due:
            try:
                self._steps.start(each)
            except StoreBusy as busy:
                # It stays due.
                self._events.problem("step not started", what=busy.what, upstream_id=each)


def _tenant(due: DueStep) -> str:
    return due.tenant
