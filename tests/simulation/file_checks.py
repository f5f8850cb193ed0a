"""What must be true of files: each row has one result, its own; each batch ends, soon, and its sums are right."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from sluice.domain.batches import Batch, Phase, Source
from sluice.domain.pricing import BATCH_LANE
from tests.fakes import MINUTE
from tests.simulation.accounts import cost_of
from tests.simulation.checks import Check
from tests.simulation.faults import RangeDeadLettered, RangeSeenTwice
from tests.simulation.upstream import Call

if TYPE_CHECKING:
    from tests.simulation.story import Upload
    from tests.simulation.world import World

SOON_MS: Final = 40 * MINUTE
"""A batch whose rows nobody keeps from running ends so long after the last fault: two looks of the sweep."""

CANCEL_MS: Final = 10 * MINUTE
"""A canceled batch ends so long after its cancel and its last call: its ranges wait for a worker like others."""

NOTICED_MS: Final = MINUTE
"""A ranges worker looks for a cancel when it renews its lease."""

LOST_MS: Final = 20 * MINUTE
"""A batch of which a message was lost is looked after at the next check only."""

EXPIRY_MS: Final = 30 * MINUTE
"""A batch ends so long after its deadline and its last call."""

MOST_ATTEMPTS: Final = 5

LONG: Final = frozenset({"LongBlocks", "ParkedByHand", "SpendLimit"})
"""Faults after which rows may wait for long."""


def ended_batches(world: World) -> list[tuple[Batch, Upload]]:
    """Return the batches that have ended, with what was uploaded."""
    files = world.files
    return [
        (batch, files.accepted[batch.batch_id])
        for batch in files.batches.stored.values()
        if batch.phase is Phase.ENDED and batch.batch_id in files.accepted
    ]


def lines_of(world: World, key: str) -> list[dict[str, Any]]:
    """Return an object of JSON lines."""
    return [json.loads(line) for line in world.files.objects.stored.get(key, b"").splitlines()]


def calls_by_name(world: World) -> Mapping[str, list[Call]]:
    """Return the calls of each job and row."""
    found: dict[str, list[Call]] = defaultdict(list)
    for call in world.upstream.calls:
        found[call.name].append(call)
    return found


class EveryBatchEnds(Check):
    """Each file becomes a batch, and each batch ends, once."""

    name = "every batch ends"

    def ended(self, world: World) -> None:
        files = world.files
        known = {id(each) for each in files.accepted.values()}
        for key, upload in files.dropped.items():
            if id(upload) not in known:
                world.fail(self.name, f"{key} became no batch")
        for batch in files.batches.stored.values():
            if batch.phase is not Phase.ENDED or not batch.told:
                world.fail(self.name, f"{batch.name} is {batch.phase}, notified: {batch.told}")


class BatchesEndSoon(Check):
    """A batch ends soon after the last fault, its cancel, or its deadline."""

    name = "batches end soon"

    def ended(self, world: World) -> None:
        long = any(type(fault).__name__ in LONG for fault in world.faults)
        calls = calls_by_name(world)
        calm_at = world.time.start + world.story.calm_at_ms
        for batch, upload in ended_batches(world):
            ended_at = batch.ended_at or 0
            last = max(
                [batch.created_at]
                + [each.ended_at or 0 for name in upload.names for each in calls[name]]
            )
            if not long and batch.lane != BATCH_LANE:
                self._by(world, batch, "the calm", max(last, calm_at) + SOON_MS, ended_at)
            if world.has_troubled_functions:
                continue
            lost = LOST_MS if batch.batch_id in world.files.lost else 0
            canceled_at = world.files.canceled.get(batch.batch_id)
            if canceled_at is not None:
                self._by(
                    world, batch, "its cancel", max(last, canceled_at) + CANCEL_MS + lost, ended_at
                )
            if upload.deadline_at is not None:
                latest = max(last, upload.deadline_at) + EXPIRY_MS + lost
                self._by(world, batch, "its deadline", latest, ended_at)

    @staticmethod
    def _by(world: World, batch: Batch, what: str, latest: int, ended_at: int) -> None:
        if ended_at > latest:
            late = (ended_at - latest) // 1000
            world.fail(f"a batch ends soon after {what}", f"{batch.name}: {late} s too late")


class EachRowHasOneResult(Check):
    """Each row has exactly one line of results, its own; what is no row has a line of errors."""

    name = "each row has one result"

    def ended(self, world: World) -> None:
        calls = {call.number: call for call in world.upstream.calls}
        for batch, upload in ended_batches(world):
            if batch.problem is not None:
                if not (batch.plan is None and world.files.was_replaced(batch)):
                    world.fail(self.name, f"{batch.name} could not be run: {batch.problem}")
                continue
            results = lines_of(world, batch.results_key)
            found = [each["custom_id"] for each in results]
            if found != upload.names:
                wrong = Counter(found) - Counter(upload.names)
                missing = Counter(upload.names) - Counter(found)
                world.fail(self.name, f"{batch.name}: missing {missing}, too many {wrong}")
            for each in results:
                result = each["result"]
                if result["type"] != "succeeded":
                    continue
                text = result["message"]["content"][0]["text"] if result["message"] else ""
                if world.files.lane.claude.texts.get(text) == each["custom_id"]:
                    continue
                call = calls.get(int(text.rpartition(" ")[2] or 0))
                if call is None or text != f"{each['custom_id']} by call {call.number}":
                    world.fail(self.name, f"{each['custom_id']} has the answer {text!r}")
            errors = lines_of(world, batch.errors_key)
            blank = sum(line in {b"", b"  "} for line in upload.lines)
            wanted = len(upload.lines) - len(upload.names) - blank
            if len(errors) != wanted:
                world.fail(self.name, f"{batch.name}: {len(errors)} errors, not {wanted}")


class TheLatestOfANameIsCopied(Check):
    """Under a file's name are the results, errors and summary of the batch of that name that was accepted last."""

    name = "the latest of a name is copied"

    def ended(self, world: World) -> None:
        stored = world.files.objects.stored
        latest: dict[tuple[str, str], Batch] = {}
        for batch, _ in ended_batches(world):
            known = latest.setdefault((batch.tenant, batch.name), batch)
            if (batch.created_at, batch.batch_id) > (known.created_at, known.batch_id):
                latest[batch.tenant, batch.name] = batch
        for (tenant, name), batch in latest.items():
            copies = (
                {}
                if batch.source is not Source.FILE
                else {
                    f"out/{tenant}/{name}/results.jsonl": batch.results_key,
                    f"out/{tenant}/{name}/errors.jsonl": batch.errors_key,
                    f"out/{tenant}/{name}/summary.json": batch.summary_key,
                }
            )
            for copy, own in copies.items():
                if stored.get(copy) != stored[own]:
                    world.fail(self.name, f"{copy} is not that of {batch.batch_id}")


class RowsErrForACauseOfTheirOwn(Check):
    """A row errs for what Claude said to its own calls, and a paid answer is never dropped."""

    name = "rows err for a cause of their own"

    def ended(self, world: World) -> None:
        calls = calls_by_name(world)
        invalid = {
            request.name
            for made in world.files.lane.claude.made.values()
            for request in made.rows
            if request.fate == "invalid"
        }
        for batch, upload in ended_batches(world):
            results = lines_of(world, batch.results_key)
            for each in results:
                if each["custom_id"] not in upload.names:
                    continue
                name, kind = each["custom_id"], each["result"]["type"]
                is_upstreams = name in invalid
                if kind == "errored" and not (is_upstreams or self._has_cause(calls[name])):
                    error = each["result"]["error"]["error"]
                    world.fail(self.name, f"{name}: {error}")
                if kind == "expired" and upload.deadline_at is None:
                    world.fail(self.name, f"{name} expired without a deadline")
                if kind == "canceled" and batch.batch_id not in world.files.asked_to_cancel:
                    world.fail(self.name, f"{name} was canceled by nobody")

    @staticmethod
    def _has_cause(calls: Sequence[Call]) -> bool:
        real = 0
        for call in calls:
            if call.plan.reply is not None and call.plan.reply.failure.status == 400:
                return True
            if call.fate == "timed out" and call.request.full_window:
                return True
            is_refusal = call.plan.stop_reason == "refusal"
            real += not call.is_snooze and (call.fate != "answered" or is_refusal)
        return real >= MOST_ATTEMPTS


class CancelsReachRows(Check):
    """No call of a canceled batch begins a while after its cancel."""

    name = "cancels reach rows"

    def called(self, world: World, call: Call) -> None:
        upload = world.orders[call.name]
        if not world.files.canceled or call.machine.troubles:
            return
        for batch_id, at in world.files.canceled.items():
            late = world.time.now() - at
            if world.files.accepted[batch_id] is upload and late > NOTICED_MS:
                world.fail(self.name, f"{call.name} was called {late // 1000} s after its cancel")


class RowsAreBilledOnce(Check):
    """A row is called again only after a failure, a refusal, or the death or trouble of its worker."""

    name = "rows are billed once"

    def ended(self, world: World) -> None:
        for calls in self._of_rows(world):
            for call in calls[:-1]:
                excused = (
                    call.fate != "answered"
                    or call.plan.stop_reason == "refusal"
                    or not call.machine.is_alive
                    or call.machine.troubles
                )
                if not excused:
                    world.fail(self.name, f"{call.name}: call {call.number} was made again")

    @staticmethod
    def _of_rows(world: World) -> list[list[Call]]:
        # Lines with the same custom_id are rows of their own, until they are compared at the end.
        lines = Counter(line for each in world.story.uploads for line in each.lines)
        names = {name for name, count in lines.items() if count == 1}
        return [calls for name, calls in calls_by_name(world).items() if name in names]


class SumsOfBatchesAddUp(Check):
    """Where no worker was in trouble, a batch's sums are those of its calls, and the ledger has each of them."""

    name = "sums of batches add up"

    def ended(self, world: World) -> None:
        if world.is_troubled:
            return
        by_request = {row.request_id for row in world.ledger.rows.values()}
        calls = calls_by_name(world)
        for batch, upload in ended_batches(world):
            if batch.lane == BATCH_LANE:
                # See `lane_checks`.
                continue
            own = [each for name in upload.names for each in calls[name]]
            paid = [each for each in own if each.fate == "answered"]
            right = (
                sum(cost_of(each.request.model, each.usage) for each in paid),
                sum(
                    each.usage.output_tokens for each in paid if each.plan.stop_reason != "refusal"
                ),
            )
            found = (batch.tally.cost_micro_usd, batch.tally.output_tokens)
            if right[0] != found[0] or right[1] > found[1]:
                world.fail(self.name, f"{batch.name}: {found}, not {right}")
            summary = json.loads(world.files.objects.stored[batch.summary_key])
            if summary["cost_micro_usd"] != right[0]:
                world.fail(self.name, f"{batch.name}: {summary['cost_micro_usd']} in its summary")
            for call in paid:
                if call.request_id not in by_request:
                    world.fail(self.name, f"call {call.number} of {batch.name} is in no ledger")


class RangesAndSectionsAreDoneOnce(Check):
    """A range is done once, and where nobody was in trouble a section is joined once."""

    name = "ranges and sections are done once"

    def ended(self, world: World) -> None:
        files = world.files
        for (batch_id, number), count in files.batches.done.items():
            if count > 1:
                world.fail(self.name, f"range {number} of {batch_id} was done {count} times")
        if world.has_troubled_functions or any(
            isinstance(each, RangeSeenTwice | RangeDeadLettered) for each in world.faults
        ):
            # Two who run the last range of a section at the same moment both have it joined: one by a second message,
            # which is also sent if the first one becomes a dead letter while a worker holds it.
            return
        for key, count in files.objects.joined.items():
            if count > 1:
                world.fail(self.name, f"{key} was joined {count} times")


FILE_CHECKS: Final[Sequence[type[Check]]] = (
    EveryBatchEnds,
    BatchesEndSoon,
    EachRowHasOneResult,
    TheLatestOfANameIsCopied,
    RowsErrForACauseOfTheirOwn,
    CancelsReachRows,
    RowsAreBilledOnce,
    SumsOfBatchesAddUp,
    RangesAndSectionsAreDoneOnce,
)
