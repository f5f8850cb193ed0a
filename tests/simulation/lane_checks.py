"""What must be true of the batch lane, whatever dies: nothing is paid twice without a cause, or forgotten."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from sluice.domain.batches import Batch, row_job_id
from sluice.domain.params import NEWEST_VERSION
from sluice.domain.pricing import BATCH_LANE
from sluice.domain.upstream_batches import UpstreamBatch
from sluice.upkeep.start_steps import MOST_STARTED
from sluice.upstream.advance import MOST_UNREAD
from tests.fakes import MINUTE, SECOND
from tests.simulation.checks import Check
from tests.simulation.file_checks import calls_by_name, ended_batches, lines_of
from tests.simulation.message_batches import Made, Request
from tests.upstream_fakes import DAY

if TYPE_CHECKING:
    from tests.simulation.story import Upload
    from tests.simulation.world import World

STEP_MS: Final = MINUTE + 30 * SECOND
"""A step that is due is made so soon: the governor runs each minute, and starts it."""

CANCELED_MS: Final = MINUTE + STEP_MS
"""Upstream is asked to cancel so soon after all owners gave up: the planner notices first."""

READ_AGAIN: Final = 4
"""So often results are read, before rows without a line are taken for rows without a result."""


def ours(world: World) -> list[Made]:
    """Return the Message Batches that Sluice created."""
    return [each for each in world.files.lane.claude.made.values() if not each.is_foreign]


def record_of(world: World, made: Made) -> UpstreamBatch | None:
    """Return the record that created a Message Batch."""
    records = world.files.lane.records.stored.values()
    return next((each for each in records if each.prefix == made.prefix), None)


def given_up(record: UpstreamBatch) -> bool:
    """Return whether the results of a batch were not waited for any longer."""
    problem = record.problem or ""
    return problem.startswith(("upstream did not", "its create had no reply"))


class EachUpstreamBatchEnds(Check):
    """Each upstream batch reaches its last phase, and each range leaves the collector."""

    name = "each upstream batch ends"

    def ended(self, world: World) -> None:
        for record in world.files.lane.open():
            world.fail(self.name, f"{record.prefix} is still {record.phase}")
        for batch in world.files.batches.stored.values():
            named = {upstream_id for upstream_id, *_ in batch.upstream}
            if missing := named - set(world.files.lane.records.stored):
                world.fail(self.name, f"{batch.name} names {missing}, which do not exist")


class PaidRowsAreSentOnce(Check):
    """A row that was paid in a Message Batch is sent again, in another or live, only for a cause that has a name."""

    name = "paid rows are sent once"

    def __init__(self) -> None:
        self.causes: Counter[str] = Counter()
        """How many rows were paid twice, by what explains it."""

    def ended(self, world: World) -> None:
        calls = calls_by_name(world)
        sent: dict[str, list[tuple[Made, Request]]] = defaultdict(list)
        for made in ours(world):
            for request in made.rows:
                sent[request.name].append((made, request))
        for name, found in sent.items():
            for position, (made, request) in enumerate(found):
                later = [f"again in {other.id}" for other, _ in found[position + 1 :]]
                later += [f"live by call {call.number}" for call in calls[name]]
                earlier = [each for each in calls[name] if each.at < made.created_at]
                if earlier:
                    world.fail(self.name, f"{name} is in {made.id} after a live call")
                if not later or request not in made.done() or request.fate != "end_turn":
                    continue
                cause = self._cause(world, made, request)
                if cause is None:
                    world.fail(self.name, f"{name} was paid in {made.id}, and sent {later[0]}")
                else:
                    self.causes[cause] += 1
        for cause, count in self.causes.items():
            world.note(f"{count} rows were paid in a Message Batch and sent again: {cause}")

    @staticmethod
    def _cause(world: World, made: Made, request: Request) -> str | None:
        record = record_of(world, made)
        assert record is not None
        if record.message_batch_id == made.id:
            if given_up(record) and request.custom_id not in made.read:
                return "its batch was given up"
            if made.opened >= READ_AGAIN and made.reads and request.custom_id not in made.read:
                return "its results were short"
            if not made.reads and record.tries >= MOST_UNREAD:
                return "its results could not be read"
        return None


class UpstreamIsCanceledSoon(Check):
    """Once the owners of all rows of a Message Batch gave up, upstream is soon asked to cancel it."""

    name = "upstream is canceled soon"

    def ended(self, world: World) -> None:
        files = world.files
        for made in ours(world):
            record = record_of(world, made)
            if record is None or record.message_batch_id != made.id or not record.accepted_at:
                continue
            times = [files.canceled.get(each.batch_id) for each in record.slices]
            if None in times:
                continue
            since = max(each for each in times if each is not None)
            # Until it is found, nobody knows which one is ours.
            since = max(since, record.accepted_at)
            if has_trouble(world, since, since + CANCELED_MS):
                continue
            stopped_at = min([*made.asked_at, made.ends_at, made.created_at + DAY])
            if stopped_at > since + CANCELED_MS:
                late = (stopped_at - since) // SECOND
                world.fail(self.name, f"{made.id} was canceled {late} s after its last owner")


def has_trouble(world: World, since: int, until: int) -> bool:
    """Return whether anything went wrong meanwhile with what makes or starts steps, or just before."""
    return any(
        (each.troubles or each.died_at is not None)
        and each.started_at <= until
        and each.name.partition("-")[0] in {"upstream", "governor", "batches", "api"}
        and (each.started_at >= since - 2 * MINUTE or (each.died_at or 0) >= since)
        for each in world.machines
    )


class NobodyElsesBatchIsCanceled(Check):
    """Batches of other clients are left alone, unless a reply was lost and one looks like ours until it ends."""

    name = "nobody else's batch is canceled"

    def ended(self, world: World) -> None:
        machines = (each for some in world.files.lane.machines.values() for each in some)
        if any(each.troubles or each.died_at is not None for each in machines):
            return
        for made in world.files.lane.claude.made.values():
            if made.is_foreign and made.asked_at:
                world.fail(self.name, f"{made.id} was asked to be canceled")


class UpstreamBillsAreBookedOnce(Check):
    """What upstream bills for a Message Batch is in the ledger, once, whatever died, and in the sums of usage."""

    name = "upstream bills are booked once"

    def ended(self, world: World) -> None:
        booked: Counter[str] = Counter()
        uncertain: Counter[str] = Counter()
        for row in world.ledger.rows.values():
            if row.lane == BATCH_LANE:
                uncertain[row.request_id or ""] += row.spend.uncertain_calls
                booked[row.request_id or ""] += row.spend.cost_micro_usd
        for made in ours(world):
            record = record_of(world, made)
            assert record is not None
            read: set[str] = set()
            if record.message_batch_id == made.id:
                # What was booked first stays, also if its function died and the results were read again.
                read = next(
                    (each for each in made.reads if self._cost(made, each) == booked[made.id]), read
                )
            if booked[made.id] != self._cost(made, read):
                world.fail(self.name, f"{made.id}: {booked[made.id]} is booked of {made.billed()}")
            unread = sum(1 for each in made.done() if each.cost and each.custom_id not in read)
            if uncertain[made.id] < unread:
                world.fail(self.name, f"{made.id}: {unread} requests are on no record")
        strange = set(booked) - {each.id for each in ours(world)}
        if strange:
            world.fail(self.name, f"{strange} are booked, which nobody made")
        if not world.has_troubled_functions and not world.is_troubled:
            self._usage(world, booked.total())

    @staticmethod
    def _cost(made: Made, read: set[str]) -> int:
        return sum(each.cost for each in made.done() if each.custom_id in read)

    def _usage(self, world: World, booked: int) -> None:
        spent = sum(
            spend.cost_micro_usd
            for (*_, lane), spend in world.ledger.sums.items()
            if lane == BATCH_LANE
        )
        if spent != booked:
            world.fail(self.name, f"usage has {spent}, the ledger {booked}")


class SumsOfLaneBatchesAddUp(Check):
    """A batch's cost is that of its rows' results from upstream, and of its rows' live calls, each once."""

    name = "sums of batches on the batch lane add up"

    def ended(self, world: World) -> None:
        if any("ledger" in trouble for each in world.worker_machines for trouble in each.troubles):
            return
        for batch, upload in ended_batches(world):
            if batch.lane != BATCH_LANE or batch.problem is not None:
                continue
            live = sum(
                row.spend.cost_micro_usd
                for row in world.ledger.rows.values()
                if row.job_id in self._job_ids(world, batch)
            )
            upstream = sum(each.cost for each in self._used(world, upload))
            found = batch.tally.cost_micro_usd
            is_over = batch.batch_id in world.files.asked_to_cancel or self._has_expired(
                world, batch
            )
            if found != live + upstream and not (is_over and live <= found <= live + upstream):
                world.fail(self.name, f"{batch.name}: {found}, not {live} + {upstream}")

    @staticmethod
    def _used(world: World, upload: Upload) -> Iterator[Request]:
        """Yield the finished requests whose results were read for the batch."""
        for made in ours(world):
            record = record_of(world, made)
            if record is None or record.message_batch_id != made.id:
                continue
            for each in made.done():
                if each.name in upload.names and each.custom_id in made.read:
                    yield each

    @staticmethod
    def _has_expired(world: World, batch: Batch) -> bool:
        kinds = {each["result"]["type"] for each in lines_of(world, batch.results_key)}
        return "expired" in kinds

    @staticmethod
    def _job_ids(world: World, batch: Batch) -> set[str]:
        found, offset = set(), 0
        for line in world.files.objects.stored[batch.input_key].splitlines(keepends=True):
            found.add(row_job_id(batch.batch_id, offset))
            offset += len(line)
        return found


class StepsAreMadeInTime(Check):
    """A step that is due is made soon, whatever becomes of the upstream batches of others."""

    name = "steps are made in time"

    def ended(self, world: World) -> None:
        lane = world.files.lane
        for taken in lane.records.taken:
            late = taken.at - taken.due_at
            if late <= STEP_MS + MINUTE * (len(lane.records.stored) // MOST_STARTED):
                continue
            own = lane.machines.get(taken.upstream_id, [])
            starters = [each for each in world.machines if each.name.startswith("governor")]
            excused = any(
                (each.troubles or each.died_at is not None)
                and taken.due_at - 2 * MINUTE <= each.started_at <= taken.at
                for each in (*own, *starters)
            )
            if not excused:
                world.fail(self.name, f"{taken.upstream_id} waited {late // SECOND} s for a step")


class MessageBatchesAreOfOneKind(Check):
    """A Message Batch has rows of one tenant, version and beta, each once, and no more than the limit."""

    name = "Message Batches are of one kind"

    def ended(self, world: World) -> None:
        for made in ours(world):
            kinds = set()
            for request in made.rows:
                upload = world.orders[request.name]
                version = getattr(upload, "anthropic_version", None) or NEWEST_VERSION
                kinds.add((upload.tenant, version, getattr(upload, "anthropic_beta", None)))
            access = made.access
            assert access is not None
            if {each[1:] for each in kinds} != {(access.anthropic_version, access.anthropic_beta)}:
                world.fail(self.name, f"{made.id} was made with {access.anthropic_version}")
            if len(kinds) != 1:
                world.fail(self.name, f"{made.id} mixes {kinds}")
            ids = [each.custom_id for each in made.rows]
            if len(set(ids)) < len(ids) or len(ids) > world.facts.most_requests:
                world.fail(self.name, f"{made.id} has {len(ids)} requests")


class LateBatchesAreRescued(Check):
    """Where nothing went wrong, no row of the batch lane expires that had the time for a Message Batch and a rescue."""

    name = "late batches are rescued"

    def ended(self, world: World) -> None:
        if world.faults:
            return
        for batch, upload in ended_batches(world):
            if batch.lane != BATCH_LANE or upload.deadline_at is None:
                continue
            if upload.deadline_at < batch.created_at + 40 * MINUTE:
                continue
            for each in lines_of(world, batch.results_key):
                if each["result"]["type"] == "expired":
                    world.fail(self.name, f"{each['custom_id']} expired")


LANE_CHECKS: Final[Sequence[type[Check]]] = (
    EachUpstreamBatchEnds,
    PaidRowsAreSentOnce,
    UpstreamIsCanceledSoon,
    NobodyElsesBatchIsCanceled,
    UpstreamBillsAreBookedOnce,
    SumsOfLaneBatchesAddUp,
    StepsAreMadeInTime,
    MessageBatchesAreOfOneKind,
    LateBatchesAreRescued,
)
