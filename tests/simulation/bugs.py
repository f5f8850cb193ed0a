"""Deliberate bugs: each breaks one rule or adapter while it is applied, and the simulation must notice.

To add one: write a function that changes something and puts it back, and enter it in `BUGS`.
`python -m tests.simulation --bug NAME` shows which story finds it, and by which check.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from sluice.domain import jobs as life
from sluice.domain import waits
from sluice.domain.jobs import Job, State, Step
from sluice.domain.limits import Cost, Group, Observation, observe
from sluice.intake import accounts
from sluice.intake.submit import Outcome, Submit
from sluice.ports.claude import Body
from sluice.ports.jobs import Due, Received
from sluice.worker import limit_writer
from sluice.worker.limit_books import Admission
from sluice.worker.limiter import Limiter
from sluice.worker.memory import Grant, Memory
from sluice.worker.queue_source import RunJobs
from sluice.worker.suspects import Suspects
from tests.fakes import MemoryJobs, MemoryQueue
from tests.simulation.bugs_of_files import BUGS_OF_FILES
from tests.simulation.bugs_of_limits import BUGS_OF_LIMITS
from tests.simulation.bugs_of_sizes import BUGS_OF_SIZES
from tests.simulation.bugs_of_the_lane import BUGS_OF_THE_LANE
from tests.simulation.bugs_of_the_ledger import BUGS_OF_THE_LEDGER
from tests.simulation.deliberate import Bug, instead
from tests.simulation.upstream import Upstream
from tests.simulation.world import StoryQueue

BUG_SEEDS: Final = Path(__file__).with_name("bug_seeds.json")
"""By bug: the seed of a story that notices it."""


@contextmanager
def _skip_the_claim() -> Iterator[None]:
    next_step, put = life.next_step, MemoryJobs.replace

    def never_busy(job: Job, now: int, max_attempts: int) -> Step:
        step = next_step(job, now, max_attempts)
        return Step.RUN if step is Step.BUSY else step

    def claimed_by_nobody(job: Job, owner: str, now: int, lease_until: int) -> Job:
        return life_claim(replace(job, lease=None), owner, now, lease_until)

    def unconditional(store: MemoryJobs, job: Job, expected_version: int) -> None:
        current = store.stored.get(job.job_id)
        began = job.state is State.RUNNING and job.attempts and job.attempts[-1].outcome is None
        put(store, job, current.version if began and current else expected_version)

    life_claim = life.claim
    with (
        instead(life, "next_step", never_busy),
        instead(life, "claim", claimed_by_nobody),
        instead(MemoryJobs, "replace", unconditional),
    ):
        yield


@contextmanager
def _acknowledge_before_storing() -> Iterator[None]:
    send = Upstream.send

    async def acknowledge_and_send(
        upstream: Upstream, machine: Any, owner: str, request: Any
    ) -> Any:
        answer = await send(upstream, machine, owner, request)
        environment = upstream.world.environment_of(machine)
        for message in list(environment.held.values()) if environment else ():
            if upstream.calls[-1].name == upstream.world.name_of(message.job_id or ""):
                upstream.world.acknowledge(machine, message)
        return answer

    with instead(Upstream, "send", acknowledge_and_send):
        yield


@contextmanager
def _count_a_snooze() -> Iterator[None]:
    snooze = life.snooze

    def counting(job: Job, owner: str, now: int, **facts: Any) -> Job:
        snoozed = snooze(job, owner, now, **facts)
        return replace(snoozed, attempts_used=job.attempts_used, attempts=job.attempts)

    with instead(life, "snooze", counting):
        yield


@contextmanager
def _lease_shorter_than_the_call() -> Iterator[None]:
    with instead(waits, "LEASE_MS", 10_000):
        yield


@contextmanager
def _settle_twice() -> Iterator[None]:
    settle = Limiter.settle

    def twice(self: Limiter, admission: Admission, used: Cost | None, **facts: bool) -> None:
        settle(self, admission, used, **facts)
        admission.is_settled = False
        settle(self, admission, used, **facts)

    with instead(Limiter, "settle", twice):
        yield


@contextmanager
def _lose_a_refund() -> Iterator[None]:
    settle = Limiter.settle

    def forgetful(self: Limiter, admission: Admission, used: Cost | None, **facts: bool) -> None:
        if used is not None:
            settle(self, admission, used, **facts)

    with instead(Limiter, "settle", forgetful):
        yield


@contextmanager
def _trust_a_stale_header() -> Iterator[None]:
    def trusting(group: Group, observation: Observation, now: int) -> Group:
        return observe(replace(group, observed_at=0), observation, now)

    with instead(limit_writer, "observe", trusting):
        yield


@contextmanager
def _two_sweeps_at_once() -> Iterator[None]:
    def postpone(store: MemoryJobs, due: Due, until: int) -> Due:
        held = replace(due, due_at=until)
        why, _ = store.due_jobs.get(due.job_id, (life.DueFor.CALL, due))
        store.due_jobs[due.job_id] = why, held
        return held

    with instead(MemoryJobs, "postpone", postpone):
        yield


@contextmanager
def _reuse_a_receipt_handle() -> Iterator[None]:
    run = RunJobs.__call__

    async def with_old_receipts(
        self: RunJobs, messages: list[Received], stop_at: int, owner: str
    ) -> list[str]:
        known = self.worker.__dict__.setdefault("_receipts", {})
        old = [known.setdefault(message.message_id, message) for message in messages]
        return await run(self, old, stop_at, owner)

    with instead(RunJobs, "__call__", with_old_receipts):
        yield


@contextmanager
def _forget_what_was_not_sent() -> Iterator[None]:
    def forget(self: Submit, outcome: Outcome, *_: object) -> Outcome:
        del self
        return outcome

    with instead(Submit, "_parked", forget):
        yield


@contextmanager
def _release_the_lease_on_cancel() -> Iterator[None]:
    request_cancel = life.request_cancel

    def at_once(job: Job, now: int) -> Job:
        is_running = job.state is State.RUNNING
        return request_cancel(replace(job, lease=None) if is_running else job, now)

    with instead(accounts, "request_cancel", at_once):
        yield


@contextmanager
def _forget_to_give_memory_back() -> Iterator[None]:
    def keep(self: Memory, grant: Grant) -> None:
        del self, grant

    def leave(grant: Grant, *_: object) -> None:
        grant.memory.forget(grant)

    with instead(Memory, "forget", keep), instead(Grant, "__exit__", leave):
        yield


@contextmanager
def _read_without_asking() -> Iterator[None]:
    def at_once(grant: Grant, request_bytes: int) -> bool:
        del grant, request_bytes
        return True

    with instead(Grant, "take_now", at_once):
        yield


@contextmanager
def _hold_requests_to_the_end() -> Iterator[None]:
    release = Body.release
    kept: list[bytes] = []

    def and_keep(body: Body) -> None:
        kept.extend([body.data] if body._data is not None else [])  # noqa: SLF001 - what a bug may do
        release(body)

    with instead(Body, "release", and_keep):
        yield


@contextmanager
def _read_answers_without_room() -> Iterator[None]:
    async def grow(grant: Grant, answer_bytes: int) -> None:
        del grant, answer_bytes

    with instead(Grant, "grow", grow):
        yield


@contextmanager
def _charge_neighbors_for_a_loss() -> Iterator[None]:
    without_loss = life.without_loss

    def charged(job: Job, now: int) -> Job:
        return replace(without_loss(job, now), attempts_used=job.attempts_used)

    with instead(life, "without_loss", charged):
        yield


@contextmanager
def _let_suspects_mingle() -> Iterator[None]:
    @asynccontextmanager
    async def at_once(self: Suspects, most: int) -> AsyncIterator[None]:
        del self, most
        yield

    with instead(Suspects, "turn", at_once):
        yield


@contextmanager
def _never_suspect_a_job() -> Iterator[None]:
    def any_number(job: Job) -> None:
        del job

    with instead(life, "most_in_flight", any_number):
        yield


# Real bugs, found in Sluice by the simulation or while its checks were written ------------


@contextmanager
def _leave_messages_to_the_queue() -> Iterator[None]:
    def keep_hidden(_: MemoryQueue, __: Sequence[Received], ___: int) -> None:
        return

    with instead(StoryQueue, "keep_hidden", keep_hidden):
        yield


@contextmanager
def _care_for_parked_jobs_only() -> Iterator[None]:
    due = MemoryJobs.due

    def parked_only(store: MemoryJobs, why: life.DueFor, now: int, limit: int) -> Sequence[Due]:
        return due(store, why, now, limit) if why is life.DueFor.CALL else []

    with instead(MemoryJobs, "due", parked_only):
        yield


@contextmanager
def _keep_silent_about_lost_calls() -> Iterator[None]:
    without_loss = life.without_loss

    def silent(job: Job, now: int) -> Job:
        return replace(without_loss(job, now), unbooked=job.unbooked)

    with instead(life, "without_loss", silent):
        yield


BUGS: Final[Mapping[str, Bug]] = {
    "skip_the_claim": Bug(
        "a worker starts a job without the condition that no other worker holds it", _skip_the_claim
    ),
    "acknowledge_before_storing": Bug(
        "the message is deleted when the answer arrives, before the answer is stored",
        _acknowledge_before_storing,
    ),
    "count_a_snooze": Bug("a snooze uses up an attempt", _count_a_snooze),
    "lease_shorter_than_the_call": Bug(
        "a lease lasts 10 s, shorter than most calls and than the renewal interval",
        _lease_shorter_than_the_call,
    ),
    "settle_twice": Bug("a reservation of the limiter is settled twice", _settle_twice),
    "lose_a_refund": Bug("a reservation whose call was never sent is not refunded", _lose_a_refund),
    "trust_a_stale_header": Bug(
        "limit headers are applied although newer ones were already received", _trust_a_stale_header
    ),
    "two_sweeps_at_once": Bug(
        "a sweep takes a due job without the condition that no other sweep took it",
        _two_sweeps_at_once,
    ),
    "reuse_a_receipt_handle": Bug(
        "a worker keeps using the receipt handle of a message's first delivery",
        _reuse_a_receipt_handle,
    ),
    "forget_what_was_not_sent": Bug(
        "a job that was stored but whose message was not sent is accepted without being parked",
        _forget_what_was_not_sent,
    ),
    "release_the_lease_on_cancel": Bug(
        "a cancel ends a running job at once while its call is still in flight",
        _release_the_lease_on_cancel,
    ),
    "forget_to_give_memory_back": Bug(
        "the memory grant of a call is not released when the call ends",
        _forget_to_give_memory_back,
    ),
    "read_without_asking": Bug(
        "a large request is read without a memory grant", _read_without_asking
    ),
    "hold_requests_to_the_end": Bug(
        "the memory of a request is released when it is sent, although the request is still held",
        _hold_requests_to_the_end,
    ),
    "read_answers_without_room": Bug(
        "an answer is read further without a memory grant", _read_answers_without_room
    ),
    "charge_neighbors_for_a_loss": Bug(
        "a job whose worker died uses an attempt although other jobs were in flight beside it",
        _charge_neighbors_for_a_loss,
    ),
    "let_suspects_mingle": Bug(
        "a job that has lost many workers runs beside other jobs", _let_suspects_mingle
    ),
    "never_suspect_a_job": Bug(
        "a job that kills every worker runs beside other jobs again and again", _never_suspect_a_job
    ),
    "leave_messages_to_the_queue": Bug(
        "a worker does not shorten its messages' visibility timeout, so they stay hidden for 90 minutes if it dies",
        _leave_messages_to_the_queue,
    ),
    "care_for_parked_jobs_only": Bug(
        "the sweep ignores jobs whose message is lost", _care_for_parked_jobs_only
    ),
    "keep_silent_about_lost_calls": Bug(
        "a call whose worker died has no ledger row", _keep_silent_about_lost_calls
    ),
    **BUGS_OF_LIMITS,
    **BUGS_OF_FILES,
    **BUGS_OF_SIZES,
    **BUGS_OF_THE_LEDGER,
    **BUGS_OF_THE_LANE,
}
