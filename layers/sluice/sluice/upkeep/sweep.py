"""The sweep: sends messages for due jobs, as fast as the limits can start them.

A worker parks a job that must wait longer than 15 minutes: it acknowledges the message and leaves the job `queued` with
`not_before`. Workers never send to their own queue; only the sweep sends a new message for a parked job. A due job is
postponed before it is sent, so that concurrent sweeps send it once. It is due again soon unless the send is confirmed,
so that a sweep that dies loses no job.

Any other job that was not written for long is checked: its message may be lost, or was never sent. An extra message is
harmless, because the lease decides which worker runs the job.

A job that ended without a worker, or while the ledger was busy, still owes rows of its calls: the sweep writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from typing import Final

from sluice.domain.capacity import NEW_POOL_MS, Backlog, is_new, startable
from sluice.domain.errors import StoreBusy
from sluice.domain.jobs import WATCH_MS, DueFor, JobError, State, finish_waiting
from sluice.domain.limits import Group
from sluice.domain.models import model_group
from sluice.domain.turns import in_turns
from sluice.domain.waits import LONGEST_PARK_MS
from sluice.notices.report import report_end
from sluice.ports.jobs import CallBooks, Due, DueJobs, JobQueue, JobStore, Pointer
from sluice.ports.limits import LimitStore, PoolHistory
from sluice.ports.swap import swap
from sluice.ports.world import Clock, Events
from sluice.upkeep.booking import book
from sluice.upkeep.schedule import RUN_MS, UNSENT_MS

MARGIN_MS: Final = 15_000
"""The next run may be late by this time: jobs that can start until then are sent now."""

assert MARGIN_MS < RUN_MS, "a run sends little that the next run could send"

DUE_SHARE: Final = 10_000
"""Maximum due jobs of each tenant and model considered per run."""

UNHEARD_SHARE: Final = 1_000
"""Maximum jobs of each tenant and model checked per run because their messages may be lost."""

QUIET_MS: Final = LONGEST_PARK_MS
"""While the queue holds more than can start, a job's message is assumed to be in it for this time."""

AT_ONCE: Final = 100
"""Jobs postponed, sent and confirmed in one step; the sweep may stop between two steps."""

NEW_KEYS_MS: Final = LONGEST_PARK_MS + NEW_POOL_MS
"""A key pool written this recently may have keys for jobs whose groups are all blocked; by then each was due once."""

PARALLEL_WRITES: Final = 16

Pause = Callable[[Due], int | None]


@dataclass(frozen=True, slots=True)
class Swept:
    """What one sweep did."""

    due: int = 0
    sent: int = 0
    expired: int = 0
    left: int = 0
    """Due, but not sent, or not startable soon; they stay due."""
    rescued: int = 0
    """Sent because their messages may be lost."""


class Sweep:
    """The use case behind the schedule, together with the governor."""

    def __init__(  # noqa: PLR0913, PLR0917 - its tools
        self,
        jobs: JobStore,
        due: DueJobs,
        ledger: CallBooks,
        queue: JobQueue,
        limits: LimitStore,
        pool: PoolHistory,
        model_groups: Mapping[str, str],
        clock: Clock,
        events: Events,
    ) -> None:
        self._jobs = jobs
        self._due = due
        self._ledger = ledger
        self._queue = queue
        self._limits = limits
        self._pool = pool
        self._model_groups = model_groups
        self._clock = clock
        self._events = events

    def __call__(self, stop_at: int) -> Swept:
        """Send due jobs that can start soon, end jobs past their deadline; start no further step after `stop_at`."""
        swept = self._swept(stop_at)
        self._book(stop_at)
        return swept

    def _swept(self, stop_at: int) -> Swept:
        now = self._clock.now()
        due = self._due.due(DueFor.CALL, now, DUE_SHARE)
        unheard = self._due.due(DueFor.CHECK, now, UNHEARD_SHARE)
        if not due and not unheard:
            return Swept()
        # Before anything else is read: whatever is busy, a deadline ends its job.
        late = [each for each in (*due, *unheard) if _is_late(each, now)]
        waiting = [each for each in due if not _is_late(each, now)]
        silent = [each for each in unheard if not _is_late(each, now)]
        found = len(late) + len(waiting)
        sent = expired = rescued = 0
        with ThreadPoolExecutor(PARALLEL_WRITES) as threads:
            # Half of the time at most, so that many of them do not keep the others from being sent.
            late_steps, half = _steps(late), now + (stop_at - now) // 2
            while self._clock.now() < half and (some := next(late_steps, None)):
                expired += sum(threads.map(self._expire, some))
            groups, backlog = self._limits.groups(), self._queue.backlog()
            by_model = {**self._model_groups, **self._limits.models().groups()}
            chosen = self._paced(waiting, by_model, groups, backlog, now)
            lost = self._probably_lost(silent, by_model, groups, backlog, now)
            if len(unheard) >= UNHEARD_SHARE:
                self._list_deadlines(threads, set(silent) - set(lost))
            for due_ones, lost_ones, late_ones in zip_longest(
                _steps(chosen), _steps(lost), late_steps, fillvalue=()
            ):
                if self._clock.now() >= stop_at:
                    break
                sent += self._send(threads, due_ones, lambda _: WATCH_MS)
                rescued += self._send(threads, lost_ones, self._check)
                expired += sum(threads.map(self._expire, late_ones))
        swept = Swept(found, sent, expired, found - sent - expired, rescued)
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
        """Postpone jobs, send their messages, and watch the sent ones; return their number.

        `pause` returns after which time to check a job again; None: it needs no message.
        """
        if not due:
            return 0
        until = self._clock.now() + UNSENT_MS
        pauses = {
            each: after
            for each, after in zip(due, threads.map(pause, due), strict=True)
            if after is not None
        }
        postponed = list(threads.map(lambda each: self._due.postpone(each, until), pauses))
        after = {
            taken: pause_ms
            for taken, pause_ms in zip(postponed, pauses.values(), strict=True)
            if taken is not None
        }
        pointers = [Pointer(each.job_id, each.tenant, each.model) for each in after]
        unsent = set(self._queue.send(pointers))
        sent = [each for each in after if each.job_id not in unsent]
        now = self._clock.now()
        list(threads.map(lambda each: self._due.watch(each, now + after[each]), sent))
        return len(sent)

    def _probably_lost(
        self,
        unheard: Sequence[Due],
        by_model: Mapping[str, str],
        groups: Sequence[Group],
        backlog: Backlog,
        now: int,
    ) -> list[Due]:
        """Return the jobs whose message may be lost, because they were not written for long.

        Messages of a long queue are not lost: then these are only the jobs that have waited for hours.
        """
        names = {model_group(each.model, by_model, each.tenant) for each in unheard}
        until = now + RUN_MS + MARGIN_MS
        room = sum(startable(groups, name, now, until) for name in names)
        if backlog.visible + backlog.in_flight <= room:
            return list(unheard)
        return [each for each in unheard if each.due_at <= now - QUIET_MS]

    def _list_deadlines(self, threads: ThreadPoolExecutor, waiting: Iterable[Due]) -> None:
        """List jobs of a long queue by their deadlines: beside so many others these would not be seen."""
        with_deadline = [each for each in waiting if each.deadline is not None]
        list(threads.map(lambda each: self._due.watch(each, each.due_at + QUIET_MS), with_deadline))

    def _check(self, due: Due) -> int | None:
        """Return after which time to check a job again that needs a message; None if it is running or has ended."""
        job = self._jobs.get(due.job_id)
        now = self._clock.now()
        if job is None or job.state.is_final:
            return None
        if job.is_leased(now):
            self._due.postpone(due, now + WATCH_MS)
            return None
        # Twice as long each time: a job that waits for hours gets a few extra messages, not hundreds.
        return max(WATCH_MS, now - job.created_at)

    def _book(self, stop_at: int) -> None:
        """Write the rows that ended jobs owe to the ledger; while it is busy, the next run tries again."""
        try:
            for owing in self._due.due(DueFor.BOOKS, self._clock.now(), UNHEARD_SHARE):
                if self._clock.now() >= stop_at:
                    return
                job = self._jobs.get(owing.job_id)
                book(self._ledger, job.unbooked if job else (), self._events)
                self._due.forget(owing)
        except StoreBusy as busy:
            self._events.problem("ledger rows not written", what=busy.what)

    def _paced(
        self,
        due: Sequence[Due],
        by_model: Mapping[str, str],
        groups: Sequence[Group],
        backlog: Backlog,
        now: int,
    ) -> list[Due]:
        """Return due jobs of each model group, as many as it can start until shortly after the next run.

        Tenants take turns, so that the many jobs of one do not use up what the jobs of another could use.

        If the queue holds more than that, return a quarter of them: parked jobs are older than those in the queue and
        must not wait behind them, but must not fill a full queue further.
        """
        by_group: dict[str, list[Due]] = {}
        for each in in_turns(due, _tenant):
            name = model_group(each.model, by_model, each.tenant)
            by_group.setdefault(name, []).append(each)
        until, new_pool = now + RUN_MS + MARGIN_MS, self._has_new_pool(now)
        room = {name: startable(groups, name, now, until, new_pool=new_pool) for name in by_group}
        if backlog.visible > sum(room.values()):
            room = {name: -(-count // 4) for name, count in room.items()}
        return [each for name, some in by_group.items() for each in some[: room[name]]]

    def _has_new_pool(self, now: int) -> bool:
        """Return whether the pool may have a key of another organization for jobs whose known groups are all blocked.

        Only workers with jobs find that out, so some jobs must be sent although no known group can start them.
        """
        try:
            return is_new(self._pool.changed_at(), now, NEW_KEYS_MS)
        except StoreBusy as busy:
            # The next run tries again; jobs that the known groups can start must not wait for it.
            self._events.problem("store busy", what=busy.what)
            return False

    def _expire(self, due: Due) -> bool:
        """End a job whose deadline has passed; False if it is running or has ended."""
        job = self._jobs.get(due.job_id)
        now = self._clock.now()
        if job is None or job.state.is_final or job.deadline is None or job.deadline > now:
            return False
        if job.lease is not None and job.lease.until > now:
            # Its call may still be answered. If its worker died, the job is ended after the lease.
            self._due.postpone(due, job.lease.until)
            return False
        error = JobError("deadline_exceeded", "the deadline passed before an answer arrived")
        ended = finish_waiting(job, State.EXPIRED, now, error)
        if swap(self._jobs.replace, ended, job.version) is not ended:
            return False
        report_end(self._events, ended)
        return True


def _is_late(due: Due, now: int) -> bool:
    return due.deadline is not None and due.deadline <= now


def _tenant(due: Due) -> str:
    return due.tenant


def _steps(due: Sequence[Due]) -> Iterator[Sequence[Due]]:
    """Yield jobs that are handled together; tenants take turns."""
    ordered = in_turns(due, _tenant)
    for start in range(0, len(ordered), AT_ONCE):
        yield ordered[start : start + AT_ONCE]
