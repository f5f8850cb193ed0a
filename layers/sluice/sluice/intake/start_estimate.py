"""Estimating when a new job starts, from the depth of the queue and the known rate limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from sluice.domain.limits import Group, expected_start
from sluice.domain.models import model_group
from sluice.ports.jobs import JobQueue
from sluice.ports.limits import LimitStore
from sluice.ports.world import Clock, Events

MOST_AGE_MS: Final = 5_000
"""Queue depth and limits are read at most this often, not for every job."""


class StartEstimate:
    """The `estimated_start` of jobs that are submitted now."""

    def __init__(
        self,
        queue: JobQueue,
        limits: LimitStore,
        model_groups: Mapping[str, str],
        clock: Clock,
        events: Events,
    ) -> None:
        self._queue = queue
        self._limits = limits
        self._model_groups = model_groups
        self._clock = clock
        self._events = events
        self._read_at = -MOST_AGE_MS
        self._read: tuple[int, Sequence[Group], Mapping[str, str]] | None = None

    def estimated_start(self, model: str, tenant: str) -> int | None:
        """Return the approximate start (epoch ms) of a job submitted now, None if unknown. Never raises.

        Assumes that the whole queue waits for the group of this model, at the requests per minute known for it.
        """
        now = self._clock.now()
        if now - self._read_at >= MOST_AGE_MS:
            # A failed read counts too: a busy store is not read again by every submit.
            self._read_at = now
            self._read = self._depth_and_groups()
        if self._read is None:
            return None
        depth, groups, by_model = self._read
        return expected_start(groups, model_group(model, by_model, tenant), depth, now)

    def _depth_and_groups(self) -> tuple[int, Sequence[Group], Mapping[str, str]] | None:
        try:
            by_model = {**self._model_groups, **self._limits.models().groups()}
            return self._queue.depth(), self._limits.groups(), by_model
        except Exception:  # noqa: BLE001 - the jobs are accepted already; a missing estimate must not fail the request
            self._events.problem("start not estimated")
            return None
