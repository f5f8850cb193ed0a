"""The sweep: sends jobs that wait without a message, as fast as their limits can start them.

A worker parks a job that must wait for longer than 15 minutes: it acknowledges the message and leaves the job `queued`
with `not_before`. Workers never re-send; only here a parked job gets another message. Taken before it is sent, so
that two sweeps at once send it once; due again soon unless the send was seen to the end, so that a sweep that dies
loses nothing.

Every other job that has not ended is looked at when nothing was written of it for long: its message may never have
been sent, or be lost. One message too many does no harm, for the lease decides who runs the job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from sluice.domain.capacity import NEW_POOL_MS, Backlog, is_new, startable
from sluice.domain.errors import StoreBusy
from sluice.domain.jobs import WATCH_MS, DueFor, JobError, State, finish_waiting
from sluice.domain.limits import Group, model_group
from sluice.domain.waits import LONGEST_PARK_MS
from sluice.notices.report import report_end
from sluice.ports.jobs import Due, DueJobs, JobQueue, JobStore, Pointer
from sluice.ports.limits import LimitStore, PoolHistory
from sluice.ports.swap import swap
from sluice.ports.world import Clock, Events

RUN_MS: Final = 60_000
"""The time from one scheduled run to the next, as in template.yaml."""

MARGIN_MS: Final = 15_000
"""Sent beyond what can start until the next run, which may come late."""

HOLD_MS: Final = 120_000
"""A job whose sending was not finished is due again after this time: longer than a run lasts."""

LOOK_AT: Final = 10_000
"""Due jobs looked at per run."""

CARE_FOR: Final = 1_000
"""Jobs looked at per run whose message may be lost."""

QUIET_MS: Final = LONGEST_PARK_MS
"""While more waits in the queue than can start, a job's message is probably there: it is believed for so long."""

AT_ONCE: Final = 100
"""Jobs taken, sent and noted together; between two such steps the sweep may stop."""

NEW_KEYS_MS: Final = LONGEST_PARK_MS + NEW_POOL_MS
"""A key pool written this recently may serve jobs whose known groups are all blocked: until then each was due once."""

PARALLEL_WRITES: Final = 16

Pause = Callable[[Due], int | None]


@dataclass(frozen=True, slots=True)
class Swept:
    """What one sweep did."""

    due: int = 0
    sent: int = 0
    expired: int = 0
    left: int = 0
    """Due, but beyond what can start soon, or not sent; they stay due."""
    rescued: int = 0
    """Sent in case their message was lost."""


class Sweep:
    """The use case behind the schedule, together with the governor."""

    def __init__(  # noqa: PLR0913, PLR0917 - its tools
        self,
        jobs: JobStore,
        due: DueJobs,
        queue: JobQueue,
        limits: LimitStore,
        pool: PoolHistory,
        model_groups: Mapping[str, str],
        clock: Clock,
        events: Events,
    ) -> None:
        self._jobs = jobs
        self._due = due
        self._queue = queue
        self._limits = limits
        self._pool = pool
        self._model_groups = model_groups
        self._clock = clock
        self._events = events

    def __call__(self, stop_at: int) -> Swept:
        """Send what is due and can start soon, end what is past its deadline; begin no further step after `stop_at`."""
        now = self._clock.now()
        due = self._due.due(DueFor.CALL, now, LOOK_AT)
        unheard = self._due.due(DueFor.CHECK, now, CARE_FOR)
        if not due and not unheard:
            return Swept()
        late = [each for each in due if each.deadline is not None and each.deadline <= now]
        waiting = [each for each in due if each.deadline is None or each.deadline > now]
        groups, backlog = self._limits.groups(), self._queue.backlog()
        chosen = self._paced(waiting, groups, backlog, now)
        lost = self._probably_lost(unheard, groups, backlog, now)
        sent = expired = rescued = 0
        with ThreadPoolExecutor(PARALLEL_WRITES) as threads:
            for some in self._steps(late, stop_at):
                expired += sum(threads.map(self._expire, some))
            for some in self._steps(chosen, stop_at):
                sent += self._send(threads, some, lambda _: WATCH_MS)
            for some in self._steps(lost, stop_at):
                rescued += self._send(threads, some, self._look_after)
        swept = Swept(len(due), sent, expired, len(due) - sent - expired, rescued)
        self._events.note(
            "due jobs swept",
            due=swept.due,
            sent=swept.sent,
            expired=swept.expired,
            left=swept.left,
            rescued=swept.rescued,
        )
        return swept

    def _send(self, threads: ThreadPoolExecutor, due: Sequence[Due], pause: Pause) -> int:
        """Take jobs, send them, and have those watched that were sent; return how many.

        `pause` says after which time to look at a job again; None: it needs no message.
        """
        until = self._clock.now() + HOLD_MS
        pauses = {
            each: after
            for each, after in zip(due, threads.map(pause, due), strict=True)
            if after is not None
        }
        held = list(threads.map(lambda each: self._due.postpone(each, until), pauses))
        after = {
            taken: pause_ms
            for taken, pause_ms in zip(held, pauses.values(), strict=True)
            if taken is not None
        }
        pointers = [Pointer(each.job_id, each.tenant, each.model) for each in after]
        unsent = set(self._queue.send(pointers))
        gone = [each for each in after if each.job_id not in unsent]
        now = self._clock.now()
        list(threads.map(lambda each: self._due.watch(each, now + after[each]), gone))
        return len(gone)

    def _probably_lost(
        self, unheard: Sequence[Due], groups: Sequence[Group], backlog: Backlog, now: int
    ) -> list[Due]:
        """Choose jobs that nobody has written for so long that their message may be lost.

        What waits in a long queue is not lost: then only those that have waited for hours are looked at.
        """
        names = {model_group(each.model, self._model_groups) for each in unheard}
        until = now + RUN_MS + MARGIN_MS
        room = sum(startable(groups, name, now, until) for name in names)
        if backlog.visible + backlog.in_flight <= room:
            return list(unheard)
        return [each for each in unheard if each.due_at <= now - QUIET_MS]

    def _look_after(self, due: Due) -> int | None:
        """Return after which time to look again at a job nobody is at; None when it is well, or has ended."""
        job = self._jobs.get(due.job_id)
        now = self._clock.now()
        if job is None or job.state.is_final:
            return None
        if job.lease is not None and job.lease.until > now:
            self._due.postpone(due, now + WATCH_MS)
            return None
        # Twice as long each time: a job that waits for hours for its turn gets a handful of messages, not hundreds.
        return max(WATCH_MS, now - job.created_at)

    def _steps(self, due: Sequence[Due], stop_at: int) -> Iterator[Sequence[Due]]:
        for start in range(0, len(due), AT_ONCE):
            if self._clock.now() >= stop_at:
                return
            yield due[start : start + AT_ONCE]

    def _paced(
        self, due: Sequence[Due], groups: Sequence[Group], backlog: Backlog, now: int
    ) -> list[Due]:
        """Choose the longest due of each model group, as many as it can start until the next run and a little after.

        While more waits in the queue than that, a quarter of them: parked jobs are the older ones, so they never
        stand still behind new ones, but a queue that is full already gets no fuller by them.
        """
        by_group: dict[str, list[Due]] = {}
        for each in due:
            by_group.setdefault(model_group(each.model, self._model_groups), []).append(each)
        until, new_pool = now + RUN_MS + MARGIN_MS, self._has_new_pool(now)
        room = {name: startable(groups, name, now, until, new_pool=new_pool) for name in by_group}
        if backlog.visible > sum(room.values()):
            room = {name: -(-count // 4) for name, count in room.items()}
        chosen = [each for name, some in by_group.items() for each in some[: room[name]]]
        return sorted(chosen, key=lambda each: (each.due_at, each.job_id))

    def _has_new_pool(self, now: int) -> bool:
        """Return whether a key of another organisation may have come for jobs whose known groups are all blocked.

        Only a job that a worker holds finds that out, so some must be sent though no known group can start them.
        """
        try:
            return is_new(self._pool.changed_at(), now, NEW_KEYS_MS)
        except StoreBusy as busy:
            # The next minute will tell; what the known groups can start must not wait for it.
            self._events.problem("store busy", what=busy.what)
            return False

    def _expire(self, due: Due) -> bool:
        """End a job whose deadline has passed; False when it has ended already, or is at work."""
        job = self._jobs.get(due.job_id)
        now = self._clock.now()
        if job is None or job.state.is_final or job.deadline is None or job.deadline > now:
            return False
        if job.lease is not None and job.lease.until > now:
            # Its call may still bring an answer; if its worker is dead, nobody else will end it.
            self._due.postpone(due, job.lease.until)
            return False
        error = JobError("deadline_exceeded", "the deadline passed before an answer came")
        ended = finish_waiting(job, State.EXPIRED, now, error)
        if swap(self._jobs.replace, ended, job.version) is not ended:
            return False
        report_end(self._events, ended)
        return True
