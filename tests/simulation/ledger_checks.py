"""What must be true of the ledger whatever dies, and whenever: each call that may be billed is on record somewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from sluice.domain import waits
from sluice.domain.batches import Batch, row_job_id
from sluice.domain.jobs import most_in_flight
from sluice.domain.pricing import BATCH_LANE, LedgerRow, Spend
from tests.simulation.checks import GRACE_MS, Check
from tests.simulation.file_checks import calls_by_name, ended_batches
from tests.simulation.machines import Machine
from tests.simulation.upstream import Call

if TYPE_CHECKING:
    from tests.simulation.world import World, Write


def unnamed(calls: Sequence[Call], rows: Sequence[LedgerRow], known: Sequence[str | None]) -> int:
    """Return how many billed calls have no row: neither one with their request id, nor one of a call nobody saw end."""
    requests = {row.request_id for row in rows if row.request_id} | set(known)
    nameless = sum(row.request_id is None for row in rows)
    billed = [call for call in calls if call.billed and call.request_id not in requests]
    return max(0, len(billed) - nameless)


class CallsAreOnRecord(Check):
    """Before a job is called again, and at the end, each earlier call is in the ledger or in the job's record."""

    name = "calls are on record"

    def called(self, world: World, call: Call) -> None:
        if world.story.uploads:
            return
        earlier = [
            each for each in world.upstream.calls if each.name == call.name and each is not call
        ]
        if not earlier:
            return
        job = next(each for each in world.jobs.stored.values() if each.custom_id == call.name)
        rows = [row for row in world.ledger.rows.values() if row.job_id == job.job_id]
        own = {row.call_id for row in rows}
        rows += [row for row in job.unbooked if row.call_id not in own]
        # The call of a worker that lives, and has not written its outcome, has the attempt that is open or was lost.
        if missing := unnamed(earlier, rows, [each.request_id for each in job.attempts]):
            world.fail(self.name, f"{call.name} is called again, and {missing} calls are unnamed")

    def ended(self, world: World) -> None:
        calls = calls_by_name(world)
        for job in world.jobs.stored.values():
            rows = [row for row in world.ledger.rows.values() if row.job_id == job.job_id]
            known = [each.request_id for each in job.attempts]
            if missing := unnamed(calls[job.custom_id or ""], rows, known):
                world.fail(self.name, f"{job.custom_id}: {missing} calls are in no ledger")
            own = {row.call_id for row in rows}
            if owed := [row.call_id for row in job.unbooked if row.call_id not in own]:
                world.fail(self.name, f"{job.custom_id} still owes {owed}")


class EndedCallsAreBooked(Check):
    """The answer of a job, which may be billed, has its row at the end, whatever died."""

    name = "answers are booked"

    def ended(self, world: World) -> None:
        booked = {row.request_id for row in world.ledger.rows.values()}
        for job in world.jobs.stored.values():
            if job.job_id in world.queue.lost:
                # The message from which another worker would have learned of it. No queue loses one in the real world.
                continue
            for attempt in job.attempts:
                if attempt.usage is not None and attempt.request_id not in booked:
                    world.fail(self.name, f"{job.custom_id}: {attempt.request_id} has no row")


class RowsAreOnRecord(Check):
    """Each call of a row is in the ledger, and the sums of a batch are those of the ledger, whatever died."""

    name = "calls of rows are on record"

    def ended(self, world: World) -> None:
        if any("ledger" in trouble for each in world.worker_machines for trouble in each.troubles):
            return
        calls = calls_by_name(world)
        rows_of: dict[str, list[LedgerRow]] = {}
        for row in world.ledger.rows.values():
            rows_of.setdefault(row.job_id, []).append(row)
        for batch, upload in ended_batches(world):
            if batch.problem is not None:
                continue
            ids = self._ids(world, batch, upload.names)
            spent = Spend()
            for name, job_ids in ids.items():
                rows = [row for job_id in job_ids for row in rows_of.get(job_id, [])]
                spent = sum((row.spend for row in rows), spent)
                if missing := unnamed(calls[name], rows, ()):
                    world.fail(self.name, f"{name}: {missing} calls are in no ledger")
            if batch.lane == BATCH_LANE:
                # See `lane_checks`: an upstream batch has rows of its own in the ledger.
                continue
            tally = batch.tally
            found = (tally.cost_micro_usd, tally.uncertain_calls)
            if found != (spent.cost_micro_usd, spent.uncertain_calls):
                booked = (spent.cost_micro_usd, spent.uncertain_calls)
                world.fail(self.name, f"{batch.name} has {found}, the ledger {booked}")

    @staticmethod
    def _ids(world: World, batch: Batch, names: Sequence[str]) -> Mapping[str, Sequence[str]]:
        """Return the job ids of a batch's rows, by name: of each line with that name."""
        found: dict[str, list[str]] = {}
        offset = 0
        wanted = {f'"{name}"'.encode(): name for name in names}
        for line in world.files.objects.stored[batch.input_key].splitlines(keepends=True):
            for quoted, name in wanted.items():
                if quoted in line:
                    found.setdefault(name, []).append(row_job_id(batch.batch_id, offset))
            offset += len(line)
        return found


class TheSumsAreThoseOfTheLedger(Check):
    """Usage never has more than the ledger: an addition that may have been made is not repeated."""

    name = "usage is that of the ledger"

    def ended(self, world: World) -> None:
        booked: Counter[str] = Counter()
        for row in world.ledger.rows.values():
            booked[row.tenant] += row.spend.cost_micro_usd
        spent: Counter[str] = Counter()
        for (tenant, *_), spend in world.ledger.sums.items():
            spent[tenant] += spend.cost_micro_usd
        for tenant, cost in spent.items():
            if cost > booked[tenant] and not world.is_troubled:
                world.fail(self.name, f"{tenant} was charged {cost}, not {booked[tenant]}")


HIDING: Final = frozenset(
    {
        "LateDelivery",
        "LostMessage",
        "PoisonMessage",
        "QueueBusy",
        "VisibilityRunsOut",
        "SecretsOutage",
        "RevokedKey",
        "ChangedLimits",
        "OtherTraffic",
        "KillerJob",
        "LargeAnswers",
        "SlowUploads",
        "LongBlocks",
        "SpendLimit",
        "ParkedByHand",
        "EndpointDown",
        "ServerErrors",
        "NoConnection",
        "ModelOverloaded",
    }
)
"""Faults that hide messages, or that make jobs wait for something else."""


class JobsOfDeadWorkersGoOn(Check):
    """The job of a worker that dies is taken over in time; if its next worker dies or hangs, the time starts again."""

    name = "jobs of dead workers go on"

    def __init__(self) -> None:
        self.since: dict[str, int] = {}

    def died(self, world: World, machine: Machine) -> None:
        environment = world.environment_of(machine)
        if environment is None or {type(each).__name__ for each in world.faults} & HIDING:
            return
        now = world.time.now()
        held = {message.job_id for message in environment.held.values()}
        for job in world.jobs.stored.values():
            is_leased = job.lease is not None and job.lease.owner == environment.line.owner
            if is_leased or (job.job_id in held and job.job_id in self.since):
                self.since[job.job_id] = now
        for message in environment.held.values():
            hidden = world.queue.hidden_until(message)
            if hidden is not None and hidden > now + waits.LEASE_MS + GRACE_MS:
                # It died before its first act, which is to hide its messages for a lease only: the sweep finds them.
                self.since.pop(message.job_id or "", None)

    def wrote(self, world: World, write: Write) -> None:
        job, since = write.after, self.since.pop(write.after.job_id, None)
        if since is None:
            return
        most = most_in_flight(job)
        # No store keeps a call for so long: the worker itself hangs, which is as if it had died.
        stuck = [
            until
            for began, until in (write.machine.hangs if write.machine else ())
            if until - began > waits.STORE_STAY_MS and until <= write.at
        ]
        # Nobody has received a message whose reply was lost, and it is hidden as if its receiver had died.
        unseen = world.queue.unseen.get(job.job_id, since)
        waited = write.at - max([since, unseen, *stuck])
        if (
            most is None
            and waited > waits.RECOVERY_MS + GRACE_MS
            and not self._was_refused(world, since)
        ):
            world.fail(self.name, f"{job.custom_id} went on after {waited // 1000} s")

    @staticmethod
    def _was_refused(world: World, since: int) -> bool:
        """Return whether upstream refused calls, so that jobs wait for their limits."""
        return any(
            (call.ended_at or 0) >= since and call.fate == "refused"
            for call in world.upstream.calls
        )


LEDGER_CHECKS: Final[Sequence[type[Check]]] = (
    CallsAreOnRecord,
    EndedCallsAreBooked,
    RowsAreOnRecord,
    TheSumsAreThoseOfTheLedger,
    JobsOfDeadWorkersGoOn,
)
