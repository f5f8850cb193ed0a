"""The sweep: sends jobs that waited outside the queue again, as fast as their limits can start them.

A worker parks a job that must wait for longer than 15 minutes: it acknowledges the message and leaves the job `queued`
with `not_before`. Workers never re-send; only here a parked job gets another message. Taken before it is sent, so
that two sweeps at once send it once; due again later unless it was released, so that a sweep that dies loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from sluice.domain import jobs as life
from sluice.domain.capacity import NEW_POOL_MS, Backlog, is_new, startable
from sluice.domain.errors import Stale, StoreBusy
from sluice.domain.jobs import Job, JobError, State
from sluice.domain.limits import Group, model_group
from sluice.ports import (
    Clock,
    Events,
    JobQueue,
    JobStore,
    LimitStore,
    Parked,
    ParkedJobs,
    Pointer,
    PoolHistory,
)

RUN_MS: Final = 60_000
"""The time from one scheduled run to the next, as in template.yaml."""

MARGIN_MS: Final = 15_000
"""Sent beyond what can start until the next run, which may come late."""

HOLD_MS: Final = 120_000
"""A job whose sending was not finished is due again after this time: longer than a run lasts."""

LOOK_AT: Final = 10_000
"""Due jobs looked at per run."""

AT_ONCE: Final = 100
"""Jobs taken, sent and released together; between two such steps the sweep may stop."""

NEW_KEYS_MS: Final = life.LONGEST_PARK_MS + NEW_POOL_MS
"""A key pool written this recently may serve jobs whose known groups are all blocked: until then each was due once."""

PARALLEL_WRITES: Final = 16


@dataclass(frozen=True, slots=True)
class Swept:
    """What one sweep did."""

    due: int = 0
    sent: int = 0
    expired: int = 0
    left: int = 0
    """Due, but beyond what can start soon, or not sent; they stay due."""


class Sweep:
    """The use case behind the schedule, together with the governor."""

    def __init__(  # noqa: PLR0913, PLR0917 - its tools
        self,
        jobs: JobStore,
        parked: ParkedJobs,
        queue: JobQueue,
        limits: LimitStore,
        pool: PoolHistory,
        model_groups: Mapping[str, str],
        clock: Clock,
        events: Events,
    ) -> None:
        self._jobs = jobs
        self._parked = parked
        self._queue = queue
        self._limits = limits
        self._pool = pool
        self._model_groups = model_groups
        self._clock = clock
        self._events = events

    def __call__(self, stop_at: int) -> Swept:
        """Send what is due and can start soon, end what is past its deadline; begin no further step after `stop_at`."""
        now = self._clock.now()
        due = self._parked.due(now, LOOK_AT)
        if not due:
            return Swept()
        late = [each for each in due if each.deadline is not None and each.deadline <= now]
        waiting = [each for each in due if each.deadline is None or each.deadline > now]
        chosen = self._paced(waiting, self._limits.groups(), self._queue.backlog(), now)
        sent = expired = 0
        with ThreadPoolExecutor(PARALLEL_WRITES) as threads:
            for some in self._steps(late, stop_at):
                expired += sum(threads.map(self._expire, some))
            for some in self._steps(chosen, stop_at):
                until = self._clock.now() + HOLD_MS
                taken = [
                    each
                    for each in threads.map(lambda each: self._parked.hold(each, until), some)  # noqa: B023 - used at once
                    if each is not None
                ]
                unsent = set(
                    self._queue.send(
                        [Pointer(each.job_id, each.tenant, each.model) for each in taken]
                    )
                )
                gone = [each for each in taken if each.job_id not in unsent]
                list(threads.map(self._parked.release, gone))
                sent += len(gone)
        swept = Swept(len(due), sent, expired, len(due) - sent - expired)
        self._events.note(
            "parked jobs swept",
            due=swept.due,
            sent=swept.sent,
            expired=swept.expired,
            left=swept.left,
        )
        return swept

    def _steps(self, parked: Sequence[Parked], stop_at: int) -> Iterator[Sequence[Parked]]:
        for start in range(0, len(parked), AT_ONCE):
            if self._clock.now() >= stop_at:
                return
            yield parked[start : start + AT_ONCE]

    def _paced(
        self, due: Sequence[Parked], groups: Sequence[Group], backlog: Backlog, now: int
    ) -> list[Parked]:
        """Choose the longest due of each model group, as many as it can start until the next run and a little after.

        While more waits in the queue than that, a quarter of them: parked jobs are the older ones, so they never
        stand still behind new ones, but a queue that is full already gets no fuller by them.
        """
        by_group: dict[str, list[Parked]] = {}
        for each in due:
            by_group.setdefault(model_group(each.model, self._model_groups), []).append(each)
        until, new_pool = now + RUN_MS + MARGIN_MS, self._has_new_pool(now)
        room = {name: startable(groups, name, now, until, new_pool=new_pool) for name in by_group}
        if backlog.visible > sum(room.values()):
            room = {name: -(-count // 4) for name, count in room.items()}
        chosen = [each for name, some in by_group.items() for each in some[: room[name]]]
        return sorted(chosen, key=lambda each: (each.due_at, each.job_id))

    def _has_new_pool(self, now: int) -> bool:
        """Tell whether a key of another organisation may have come for jobs whose known groups are all blocked.

        Only a job that a worker holds finds that out, so some must be sent though no known group can start them.
        """
        try:
            return is_new(self._pool.changed_at(), now, NEW_KEYS_MS)
        except StoreBusy as busy:
            # The next minute will tell; what the known groups can start must not wait for it.
            self._events.problem("store busy", what=busy.what)
            return False

    def _expire(self, parked: Parked) -> bool:
        """End a job whose deadline passed while it was parked; False when it has gone on meanwhile."""
        job = self._jobs.get(parked.job_id)
        now = self._clock.now()
        if job is None or life.due_at(job) is None or job.deadline is None or job.deadline > now:
            return False
        error = JobError("deadline_exceeded", "the deadline passed before an answer came")
        ended = life.finish_waiting(job, State.EXPIRED, now, error)
        try:
            self._jobs.replace(ended, job.version)
        except Stale:
            return False
        self._tell_of(ended)
        return True

    def _tell_of(self, job: Job) -> None:
        self._events.count("JobsExpired")
        self._events.note(
            f"job {job.state}",
            job_id=job.job_id,
            tenant=job.tenant,
            model=job.current_model,
            attempts_used=job.attempts_used,
            snoozes=job.snoozes,
            error_type=job.error.type if job.error else None,
        )
