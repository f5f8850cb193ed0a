"""What must hold in every story, whatever fails. Each check is a class with the hooks it needs.

To add one: write a class with any of the hooks of `Check` and put it into `CHECKS`. Report a violation with
`world.fail(self.name, ...)`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sluice.domain.jobs import (
    DEAD_LETTER,
    TRANSITIONS,
    Attempt,
    AttemptOutcome,
    DueFor,
    Job,
    LeaseCondition,
    Party,
    State,
)
from sluice.domain.limits import DIMENSIONS, FULL_RATE, SCALE, Group, advanced
from sluice.domain.pricing import LedgerRow
from sluice.domain.waits import LEASE_MS
from sluice.ports.jobs import Received
from sluice.worker.memory import ANSWER_FACTOR, REQUEST_FACTOR
from tests.fakes import MINUTE, SECOND
from tests.simulation.machines import Machine
from tests.simulation.upstream import Call

if TYPE_CHECKING:
    from tests.simulation.world import World, Write

MOST_LOST_BESIDE_OTHERS: Final = 4
MOST_LOST_ALONE: Final = 3
"""How many workers a job may take with it: three with whatever was in flight, one with a few others, three alone."""

GRACE_MS: Final = 5 * SECOND
"""What clocks that are off, rounded visibilities and slow steps may add."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was broken."""

    check: str
    what: str
    at: int


class Check:
    """Something that must be true in every story."""

    name = ""

    def wrote(self, world: World, write: Write) -> None:
        """A job was written."""

    def wrote_group(self, world: World, before: Group | None, after: Group) -> None:
        """A limit group was written."""

    def accepted(self, world: World, job_id: str) -> None:
        """A caller received the response that a job is accepted."""

    def acknowledged(self, world: World, message: Received) -> None:
        """A message is about to be deleted."""

    def used_receipts(self, world: World, machine: Machine, messages: Sequence[Received]) -> None:
        """A worker used the receipts of these messages."""

    def holds_more(self, world: World, machine: Machine) -> None:
        """A worker holds more of a request, or of an answer, than before."""

    def died(self, world: World, machine: Machine) -> None:
        """A machine died."""

    def called(self, world: World, call: Call) -> None:
        """A call to Claude begins; what becomes of it is not decided yet."""

    def call_ended(self, world: World, call: Call) -> None:
        """A call to Claude has ended for its worker."""

    def canceled(self, world: World, job: Job) -> None:
        """A caller received the response that a job is canceled; `job` as it was before."""

    def ended(self, world: World) -> None:
        """The story is over."""


class EveryChangeIsAllowed(Check):
    """Each stored change is a transition of the state machine, by a permitted actor, under the required lease."""

    name = "every change is allowed"

    def wrote(self, world: World, write: Write) -> None:
        before, after = write.before, write.after
        party = write.machine.party if write.machine else None
        who = write.machine.name if write.machine else "nobody"
        if before is None:
            if (party, after.state) != (Party.API, State.QUEUED):
                world.fail(self.name, f"{who} stored a new job as {after.state}")
            return
        if after.version != before.version + 1:
            world.fail(self.name, f"{who} wrote version {after.version} over {before.version}")
        now = write.machine.now() if write.machine else write.at
        allowed = any(
            before.state in rule.sources
            and after.state is rule.target
            and party in rule.who
            and _held_as(rule.lease, world, write, before, now)
            for rule in TRANSITIONS.values()
        )
        if not allowed:
            lease = before.lease.owner if before.lease else "nobody"
            world.fail(
                self.name,
                f"{who} ({party}) made {world.name_of(after.job_id)} {before.state} -> {after.state} "
                f"while leased to {lease}",
            )


def _held_as(hold: LeaseCondition, world: World, write: Write, before: Job, now: int) -> bool:
    is_live = before.lease is not None and before.lease.until > now
    if hold is LeaseCondition.NONE:
        return not is_live
    if hold is LeaseCondition.LIVE:
        return is_live
    environment = world.environment_of(write.machine) if write.machine else None
    return (
        environment is not None
        and before.lease is not None
        and before.lease.owner == environment.line.owner
    )


class EveryJobEndsOnce(Check):
    """An accepted job reaches a final state, once, and stays there."""

    name = "every job ends once"

    def ended(self, world: World) -> None:
        for job_id, order in world.accepted.items():
            if job_id not in world.jobs.stored:
                world.fail(self.name, f"a job of {order.names} is missing")
        ends = Counter(write.after.job_id for write in world.writes if write.after.state.is_final)
        for job_id, count in ends.items():
            if count > 1 + len(world.jobs.stored[job_id].redrives):
                world.fail(self.name, f"{world.name_of(job_id)} ended {count} times")


class ResultsMatchTheirCalls(Check):
    """The stored answer is the one of the call that the job's last attempt names, with its usage."""

    name = "results match their calls"

    def ended(self, world: World) -> None:
        by_id = {call.request_id: call for call in world.upstream.calls}
        for job in world.jobs.stored.values():
            if job.state is not State.SUCCEEDED:
                if job.result is not None:
                    world.fail(self.name, f"{job.custom_id} is {job.state} and has a result")
                continue
            last = job.attempts[-1]
            call = by_id.get(last.request_id or "")
            if call is None or job.result is None:
                world.fail(self.name, f"{job.custom_id} succeeded without a call")
                continue
            text = json.loads(world.results.get(job.result))["content"][0]["text"]
            if text != f"{job.custom_id} by call {call.number}" or job.usage != call.usage:
                world.fail(self.name, f"{job.custom_id} has the answer {text!r}")


class BilledTwiceOnlyForACause(Check):
    """More than one billed call of a job has a cause for each that brought no result, and the ledger names it."""

    name = "billed twice only for a cause"

    def ended(self, world: World) -> None:
        rows = list(world.ledger.rows.values())
        by_request = {row.request_id: row for row in rows if row.request_id}
        for job in world.jobs.stored.values():
            billed = [
                call for call in world.upstream.calls if call.billed and call.name == job.custom_id
            ]
            attempts = {each.request_id: each for each in job.attempts if each.request_id}
            kept = [call for call in billed if _is_result(attempts.get(call.request_id))]
            nameless = sum(row.job_id == job.job_id and not row.request_id for row in rows)
            for call in billed:
                if call in kept:
                    continue
                if len(billed) > 1 and not _has_cause(call):
                    world.fail(
                        self.name,
                        f"{job.custom_id}: call {call.number} was {call.fate}, and made again",
                    )
                row = by_request.get(call.request_id)
                if row is not None or call.request_id in attempts:
                    continue
                if nameless:
                    nameless -= 1
                else:
                    world.fail(self.name, f"{job.custom_id}: call {call.number} is in no ledger")


def _is_result(attempt: Attempt | None) -> bool:
    return attempt is not None and attempt.outcome in {
        AttemptOutcome.SUCCEEDED,
        AttemptOutcome.FALLBACK,
    }


def _has_cause(call: Call) -> bool:
    if call.fate in {"died", "lost", "timed out", "stopped"}:
        return True
    # The answer was there, but not its record: its worker died before it was written, or the store was away.
    return call.machine.died_at is not None or bool(call.machine.troubles)


class TheLedgerHasEveryCall(Check):
    """In a story without deaths and without an outage of the ledger every billed call has one row, with its price."""

    name = "the ledger has every call"

    def ended(self, world: World) -> None:
        if world.is_troubled:
            return
        rows: dict[str | None, LedgerRow] = {
            row.request_id: row for row in world.ledger.rows.values()
        }
        for call in world.upstream.calls:
            if call.fate != "answered":
                continue
            row = rows.get(call.request_id)
            if row is None:
                world.fail(self.name, f"call {call.number} for {call.name} has no row")
            elif row.spend.output_tokens != call.usage.output_tokens:
                world.fail(self.name, f"call {call.number} has another usage in the ledger")
        for key, spend in world.ledger.sums.items():
            total = sum(
                row.spend.cost_micro_usd
                for row in world.ledger.rows.values()
                if (row.tenant, row.day, row.model, row.lane) == key
            )
            if total != spend.cost_micro_usd:
                world.fail(self.name, f"the sum of {key} is {spend.cost_micro_usd}, not {total}")


class AttemptsCountRealFailures(Check):
    """An attempt is a call that was not rejected, or a lease whose worker died or could not write."""

    name = "attempts count real failures"

    def wrote(self, world: World, write: Write) -> None:
        job = write.after
        since = job.redrives[-1].at if job.redrives else 0
        kept = [each for each in job.attempts if each.at >= since]
        innocent = sum(each.outcome is AttemptOutcome.LOST and not each.alone for each in kept)
        if job.attempts_used != len(kept) - innocent:
            world.fail(
                self.name,
                f"{job.custom_id}: {job.attempts_used} used, {len(kept)} kept, "
                f"{innocent} lost beside others",
            )

    def ended(self, world: World) -> None:
        excused: Counter[str] = Counter()
        for write in world.writes:
            if write.machine is None or write.before is None or write.after.lease is None:
                continue
            began = write.before.lease is None or (
                write.before.lease.owner != write.after.lease.owner
            )
            machine = write.machine
            if began and (machine.died_at is not None or machine.troubles):
                excused[write.after.custom_id or ""] += 1
        for job in world.jobs.stored.values():
            calls = sum(
                call.name == job.custom_id and not call.is_snooze for call in world.upstream.calls
            )
            most = calls + excused[job.custom_id or ""]
            if job.attempts_used > most:
                world.fail(
                    self.name, f"{job.custom_id}: {job.attempts_used} attempts, {most} causes"
                )


class NeighborsOfAKillerSurvive(Check):
    """Who ends because of lost workers was alone with them; what no worker survives ends so, and soon."""

    name = "neighbors of a killer survive"

    def wrote(self, world: World, write: Write) -> None:
        job, before = write.after, write.before
        if job.lease is None or (before is not None and before.lease == job.lease):
            return
        beside = [
            each
            for each in world.jobs.stored.values()
            if each.lease is not None
            and each.lease.owner == job.lease.owner
            and each.state is State.RUNNING
        ]
        loners = [each.custom_id for each in beside if each.attempts[-1].alone]
        if loners and len(beside) > 1:
            world.fail(self.name, f"{loners[0]} is said to run alone, and {len(beside)} do")

    def ended(self, world: World) -> None:
        for job in world.jobs.stored.values():
            lost = [each for each in job.attempts if each.outcome is AttemptOutcome.LOST]
            alone = sum(each.alone for each in lost)
            beside_others = len(lost) - alone
            if beside_others > MOST_LOST_BESIDE_OTHERS or alone > MOST_LOST_ALONE:
                world.fail(self.name, f"{job.custom_id}: {beside_others} + {alone} workers lost")
            if job.error is None or job.error.type not in {"worker_lost", "attempts_used_up"}:
                continue
            own = len(job.attempts) - beside_others
            enough = world.rules.policy.max_attempts
            if job.error.type == "worker_lost":
                own, enough = alone, MOST_LOST_ALONE
            if own < enough:
                world.fail(self.name, f"{job.custom_id} ended by {job.error.type} after {own}")


class HeldBytesStayWithinTheBudget(Check):
    """What a worker holds of large requests and answers, counted by what it was given, is within its budget."""

    name = "held bytes stay within the budget"

    def holds_more(self, world: World, machine: Machine) -> None:
        budget = world.story.budget
        requests = sum(
            min(size * REQUEST_FACTOR, budget.shared) * count
            for size, count in world.params.held.get(machine, {}).items()
            if size * REQUEST_FACTOR > budget.own
        )
        answers = sum(
            max(0, call.received * ANSWER_FACTOR - budget.own)
            for call in world.upstream.calls
            if call.machine is machine and call.ended_at is None
        )
        if requests + answers > budget.shared + budget.reserve:
            world.fail(self.name, f"{machine.name} holds {requests} + {answers} bytes")
        if requests > budget.shared:
            world.fail(self.name, f"{machine.name} holds {requests} bytes of requests")


class ThrottlingCostsNoJob(Check):
    """No job errors for anything but a failure of its own."""

    name = "throttling costs no job"

    def ended(self, world: World) -> None:
        for job in world.jobs.stored.values():
            if job.state is not State.ERRORED or job.error is None:
                continue
            is_dead_letter = job.error.type == DEAD_LETTER and job.job_id not in world.dead_lettered
            if job.error.status in {429, 529, 402} or is_dead_letter:
                world.fail(self.name, f"{job.custom_id} errored: {job.error.type}")


class LeasesEndWithTheirOwners(Check):
    """A dead worker's leases expire soon, and its messages are visible again by then."""

    name = "leases end with their owners"

    def died(self, world: World, machine: Machine) -> None:
        environment = world.environment_of(machine)
        if environment is None or environment not in world.busy:
            return
        now = world.time.now()
        for job in world.jobs.stored.values():
            if job.lease is None or job.lease.owner != environment.line.owner:
                continue
            if job.lease.until > now + LEASE_MS + GRACE_MS:
                world.fail(
                    self.name, f"{job.custom_id} is leased for {job.lease.until - now} ms more"
                )
        if now - environment.invoked_at < GRACE_MS or machine.troubles:
            return
        for message in environment.held.values():
            hidden = world.queue.hidden_until(message)
            if hidden is None or hidden <= now + LEASE_MS + GRACE_MS:
                continue
            if message.receipt in world.queue.returned or message.message_id in world.queue.late:
                continue
            world.fail(
                self.name,
                f"{world.about(message)} stays hidden for {(hidden - now) // 1000} s more",
            )


class AcceptedJobsAreOnTheirWay(Check):
    """When a caller hears 202, the job has a message, or the sweep will find it: soon, if the api could say so."""

    name = "accepted jobs are on their way"

    def accepted(self, world: World, job_id: str) -> None:
        job = world.jobs.stored[job_id]
        why, _ = world.jobs.due_jobs.get(job_id, (None, None))
        is_parked = why is DueFor.CALL and job.not_before is not None
        began = job.state is not State.QUEUED or job.attempts_used or job.snoozes
        sent = world.queue.had_message(job_id)
        not_parked = ("job not parked", {"job_id": job_id}) in world.events.problems
        if not (is_parked or began or sent or not_parked):
            world.fail(self.name, f"{job.custom_id} was accepted, and nobody knows of it")


class MessagesAreKeptUntilDone(Check):
    """A message is deleted when its job has ended, or waits without it: parked, or with another message."""

    name = "messages are kept until done"

    def acknowledged(self, world: World, message: Received) -> None:
        job = world.jobs.stored.get(message.job_id or "")
        if job is None or job.state.is_final or job.not_before is not None:
            return
        # The message itself may be a dead letter by now.
        if not world.queue.messages_of(job.job_id, beside=message.message_id):
            world.fail(self.name, f"{world.about(message)} is deleted while its job is {job.state}")


class ReceiptsAreThoseOfTheInvocation(Check):
    """A worker uses only receipts that were handed to it with this invocation."""

    name = "receipts are those of the invocation"

    def used_receipts(self, world: World, machine: Machine, messages: Sequence[Received]) -> None:
        environment = world.environment_of(machine)
        if environment is None:
            return
        held = {message.receipt for message in environment.held.values()}
        for message in messages:
            if message.receipt not in held:
                world.fail(self.name, f"{machine.name} used {message.receipt}")


class DueJobsAreSentOnce(Check):
    """Of several sweeps at once, one sends a due job."""

    name = "due jobs are sent once"

    def ended(self, world: World) -> None:
        for (version, due_at), count in world.jobs.taken.items():
            if count > 1:
                world.fail(self.name, f"{version}, due at {due_at}, was taken {count} times")


class EveryReservationIsSettledOnce(Check):
    """Each start time the limiter gave is settled once, unless its worker died."""

    name = "every reservation is settled once"

    def ended(self, world: World) -> None:
        for entry in world.reserved.values():
            count = len(entry.settled)
            if count > 1 or (count == 0 and entry.machine.is_alive):
                group = entry.admission.claimant.group
                world.fail(self.name, f"one of {group} by {entry.machine.name}: {count} times")


class CapacityIsConserved(Check):
    """What the limiter's buckets hold is what was refilled, less what was used. Counted in stories that allow it."""

    name = "capacity is conserved"

    def ended(self, world: World) -> None:
        if not world.story.counted or world.is_troubled:
            return
        end = (
            max([world.time.now(), *(g.requests.at for g in world.limits.stored.values())]) + MINUTE
        )
        for start in world.story.groups:
            group = advanced(world.limits.stored[start.id], end)
            if group.epoch != start.epoch or group.version == start.version:
                continue
            entries = [
                entry
                for entry in world.reserved.values()
                if entry.admission.claimant.group == start.id
            ]
            for dimension in DIMENSIONS:
                bucket = group.bucket(dimension)
                first = start.bucket(dimension)
                refilled = first.level + first.limit * FULL_RATE * (end - first.at)
                used = sum(
                    cost.of(dimension)
                    for entry in entries
                    for cost in entry.settled
                    if cost is not None
                )
                off = bucket.level - (refilled - used * SCALE)
                if off:
                    world.fail(
                        self.name,
                        f"{group.id} {dimension}: {off / SCALE:+.3f} units are in no books",
                    )


class BooksDoNotGoBack(Check):
    """Headers that are older than what a group knows already are not believed."""

    name = "books do not go back"

    def wrote_group(self, world: World, before: Group | None, after: Group) -> None:
        if before is not None and after.observed_at < before.observed_at:
            late = before.observed_at - after.observed_at
            world.fail(self.name, f"{after.id} went back to headers that are {late} ms older")


class DeadLettersAreKept(Check):
    """Every rejected message is kept with its body."""

    name = "dead letters are kept"

    def ended(self, world: World) -> None:
        for message, _ in world.queue.rejected[: world.seen_dead_letters]:
            if message.message_id not in world.graveyard.kept:
                world.fail(self.name, f"{message.message_id} ({message.body!r}) is missing")


CHECKS: Final[Sequence[type[Check]]] = (
    EveryChangeIsAllowed,
    EveryJobEndsOnce,
    ResultsMatchTheirCalls,
    BilledTwiceOnlyForACause,
    TheLedgerHasEveryCall,
    AttemptsCountRealFailures,
    NeighborsOfAKillerSurvive,
    HeldBytesStayWithinTheBudget,
    ThrottlingCostsNoJob,
    LeasesEndWithTheirOwners,
    AcceptedJobsAreOnTheirWay,
    MessagesAreKeptUntilDone,
    ReceiptsAreThoseOfTheInvocation,
    DueJobsAreSentOnce,
    EveryReservationIsSettledOnce,
    CapacityIsConserved,
    BooksDoNotGoBack,
    DeadLettersAreKept,
)
