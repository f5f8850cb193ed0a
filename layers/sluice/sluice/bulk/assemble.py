"""Joining a batch's results: ranges into sections, sections into one object, in the order of the input.

The end of a batch consists of steps that each take seconds or minutes, and whose results are kept
(`bulk/sections.py`): an invocation does as many as it has time for, and the next one continues. Every step can be
repeated, because its message may be delivered again; it then writes the same.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from sluice.bulk.sections import Places, Sections, shares_of
from sluice.bulk.turns import in_turn
from sluice.domain.batches import (
    OUTPUTS,
    SECTIONS,
    SUMMARY,
    Batch,
    Phase,
    Plan,
    Tally,
    end_batch,
    fail_batch,
    mark_notified,
    moved_by_id,
)
from sluice.domain.pricing import cost_facts, usd
from sluice.domain.rows import error_line, numbered
from sluice.domain.times import rfc3339
from sluice.ports.batches import BatchStore, Joins, Objects
from sluice.ports.swap import Written, change, swap
from sluice.ports.world import Clock, Events, Notice, Notices

END_MS: Final = 2 * 60_000
"""After this time no further step of the end of a batch starts. Other batches get their turn; then it continues."""

MOST_PACKED_BYTES: Final = 32 * 1024 * 1024
"""Results up to this size are also stored gzipped, for the API."""

ENDED: Final = "Batch Ended"
"""The event's `detail-type`."""

MOST_RANGES_AT_ONCE: Final = 20
MOST_TOKENS_AT_ONCE: Final = 2_000_000
"""A batch of one section with at most this many ranges and output tokens (about 8 MB) is joined in a second or two, by
the function that ran its last range."""

QUICK_TO_END_RANGES: Final = 1_000
"""A batch of so many ranges, some 100,000 rows, ends within seconds once its sections are joined."""

SECTIONS_PREFIX: Final = "section"
"""Common prefix of that group and of the groups of each section's ranges."""


class Assemble:
    """Joins sections, and ends batches."""

    def __init__(
        self,
        batches: BatchStore,
        objects: Objects,
        notices: Notices,
        clock: Clock,
        events: Events,
    ) -> None:
        self._batches = batches
        self._objects = objects
        self._sections = Sections(objects)
        self._notices = notices
        self._clock = clock
        self._events = events

    def join(self, batch_id: str, section: int, latest: int | None = None) -> bool:
        """Join a section; the last one ends the batch. False: some of the end is left, and the same call continues.

        No step of the end starts after `latest`. Raises NotItsTurn if another large batch of the tenant ends now.
        """
        latest = self._clock.now() + END_MS if latest is None else latest
        batch = self._batches.get(batch_id)
        if batch is None or batch.plan is None:
            return True
        if batch.phase is Phase.ENDED:
            self.notify(batch)
            return True
        if not self._sections.is_joined(batch, section):
            self._sections.join(batch, batch.plan, section)
        progress = self._batches.mark(batch_id, SECTIONS, section, Tally())
        if progress.members < batch.plan.sections:
            return True
        is_long = batch.plan.ranges > QUICK_TO_END_RANGES
        with in_turn(self._batches, self._clock, self._events, batch, is_long=is_long):
            return self._finish(batch, batch.plan, latest)

    def is_small(self, batch_id: str, section: int) -> bool:
        """Return whether a complete section is a whole batch and takes no longer to join than to send elsewhere."""
        batch = self._batches.get(batch_id)
        plan = batch.plan if batch else None
        if plan is None or plan.sections > 1 or plan.ranges > MOST_RANGES_AT_ONCE:
            return False
        name = f"section#{section:06d}"
        found = self._batches.groups(batch_id, name)
        return name in found and found[name].tally.output_tokens <= MOST_TOKENS_AT_ONCE

    def notify(self, batch: Batch) -> None:
        """Publish that a batch has ended, unless this was done already: at least once per batch."""
        if batch.told:
            return
        ended = Notice(
            id=batch.batch_id,
            kind=ENDED,
            at=batch.ended_at or self._clock.now(),
            tenant=batch.tenant,
            facts=summary(batch),
            webhook=batch.options.webhook,
        )
        self._notices.publish([ended])
        notified = mark_notified(batch)
        if swap(self._batches.replace, notified, batch.version) is not notified:
            # Meanwhile deleted, or published by another invocation.
            self._events.note("batch changed during its notification", batch_id=batch.batch_id)

    def fail(self, batch: Batch, problem: str) -> None:
        """End a batch whose object cannot be run at all, with the reason as the only line of errors.jsonl."""
        ended = fail_batch(batch, self._clock.now(), problem)
        error = numbered(error_line(0, problem), 1, with_offset=batch.has_offsets)
        self._objects.put(batch.errors_key, f"{error}\n".encode())
        self._objects.put(batch.results_key, b"")
        self._pack(ended)
        self._write(batch, ended)

    # The whole -------------------------------------------------------------------------------------------------

    def _finish(self, batch: Batch, plan: Plan, latest: int) -> bool:
        """Do what is left of the end, in steps whose results are kept: at least one. False if no more may start."""
        groups = self._batches.groups(batch.batch_id, "section#")
        tally = sum((group.tally for group in groups.values()), Tally())
        shares = shares_of(tally.rows)
        for share in self._sections.unsearched(batch, shares):
            self._sections.search(batch, plan, share, shares)
            if self._clock.now() > latest:
                return False
        repeated = self._sections.repeated(batch, shares)
        # Reading what was found takes up to a minute, and is no step: it would be all that an invocation does.
        latest = max(latest, self._clock.now() + END_MS)
        errors = self._sections.with_errors(batch, plan, repeated)
        unfinished = self._sections.unfinished(batch, errors)
        base = 1
        for section in range(plan.sections):
            if section in unfinished:
                self._sections.finish(batch, plan, section, repeated.get(section, Places()), base)
                if self._clock.now() > latest:
                    return False
            base += groups[f"section#{section:06d}"].tally.lines
        changed, duplicates = self._sections.changes(batch, repeated)
        size = self._sections.assemble(batch, plan, repeated, errors)
        ended = end_batch(batch, self._clock.now(), tally + changed, duplicates, size)
        self._pack(ended)
        self._write(batch, ended)
        return True

    def _pack(self, batch: Batch) -> None:
        if batch.results_bytes > MOST_PACKED_BYTES:
            return
        packer = zlib.compressobj(wbits=31)  # the gzip format
        packed = self._objects.writer(batch.packed_key)
        try:
            for piece in self._objects.stream(batch.results_key):
                packed.write(packer.compress(piece))
            packed.write(packer.flush())
            packed.close()
        finally:
            packed.abort()

    def _write(self, batch: Batch, ended: Batch) -> None:
        """Store the summary and the copies, then the ended batch; a concurrent cancel stays recorded.

        The batch can be deleted only afterwards, so that a DELETE reaches the copies.
        """

        def summed_up(current: Batch) -> Batch:
            if current.phase is Phase.ENDED:
                return current
            wanted = replace(
                ended,
                version=current.version + 1,
                cancel_initiated_at=current.cancel_initiated_at,
                plan=current.plan,
            )
            text = json.dumps(summary(wanted), indent=2)
            self._objects.put(wanted.summary_key, text.encode())
            self._copy_out(wanted)
            return wanted

        result = change(self._batches.replace, batch, summed_up, f"batch {batch.batch_id}")
        if not isinstance(result, Written):
            return
        ended = result.record
        self._events.note(
            "batch ended",
            batch_id=ended.batch_id,
            tenant=ended.tenant,
            problem=ended.problem,
            duplicates=ended.duplicates,
            seconds=((ended.ended_at or 0) - ended.created_at) / 1000,
            **ended.tally.as_dict(),
        )
        self.notify(ended)

    def _copy_out(self, batch: Batch) -> None:
        """Copy the results to where those of the latest batch of this name are, if it is this one."""
        if not batch.has_copy or self._batches.latest_of_name(batch) != batch.batch_id:
            return
        self._keep_older(batch)
        for name in OUTPUTS:
            stored = self._objects.head(f"{batch.folder}{name}")
            if stored is not None:
                self._objects.copy_latest(stored, f"{batch.named_folder}{name}", batch.rank)

    def _keep_older(self, batch: Batch) -> None:
        """Copy what an older release stored there, and nowhere else, to the place of its batch."""
        there = self._objects.head(f"{batch.named_folder}{SUMMARY}")
        if there is None or there.rank:
            return
        older = self._batches.get(owner_of(self._objects.get(there.key)) or "")
        if older is None or older.by_id or older.phase is not Phase.ENDED or older.deleted:
            return
        own = moved_by_id(older)
        for name in OUTPUTS:
            stored = self._objects.head(f"{older.folder}{name}")
            if stored is not None:
                self._objects.copy(stored, f"{own.folder}{name}")
        change(self._batches.replace, older, moved_by_id, f"batch {older.batch_id}")


class JoinAtOnce:
    """Joins the section of a small batch in this invocation; others are left to the batches function.

    After any error the batches function joins the section: its queue retries, and has alarms.
    """

    def __init__(self, assemble: Callable[[], Assemble], queue: Joins, events: Events) -> None:
        """`assemble` is called when the first section is complete."""
        self._assemble = assemble
        self._queue = queue
        self._events = events

    def send_join(self, batch_id: str, section: int, tenant: str) -> None:
        """Join a section, or send it to the batches function; raises StoreBusy."""
        try:
            assemble = self._assemble()
            if assemble.is_small(batch_id, section) and assemble.join(batch_id, section):
                return
        except Exception:  # noqa: BLE001 - after any error the batches function joins it
            self._events.problem("batch not joined at once", batch_id=batch_id, section=section)
        self._queue.send_join(batch_id, section, tenant)


def summary(batch: Batch) -> dict[str, Any]:
    """Show the result of a batch."""
    tally = batch.tally
    tokens = {name: getattr(tally, name) for name in TOKENS}
    return {
        "batch_id": batch.batch_id,
        "name": batch.name,
        "tenant": batch.tenant,
        "source": batch.source.value,
        "input": batch.given_key or batch.input_key,
        "counts": {
            "lines": tally.lines,
            "succeeded": tally.succeeded,
            "errored": tally.errored,
            "canceled": tally.canceled,
            "expired": tally.expired,
            "invalid": tally.invalid,
            "duplicates": batch.duplicates,
        },
        "problem": batch.problem,
        "unsupported": list(batch.unsupported),
        "calls": tally.calls,
        "tokens": tokens,
        "lane": batch.lane,
        **cost_facts(tally.cost_micro_usd, tally.unknown_costs),
        "uncertain_calls": tally.uncertain_calls,
        "saved_usd": usd(tally.saved_micro_usd),
        "cost_on_batch_lane_usd": None if tally.unknown_costs else usd(tally.other_lane_micro_usd),
        "created_at": rfc3339(batch.created_at),
        "cancel_initiated_at": rfc3339(batch.cancel_initiated_at),
        "ended_at": rfc3339(batch.ended_at),
        "seconds": ((batch.ended_at or batch.created_at) - batch.created_at) / 1000,
    }


def owner_of(summary_text: bytes | None) -> str | None:
    """Return the id of the batch that a summary is of; None if it is none."""
    try:
        found = json.loads(summary_text or b"null")
    except (ValueError, RecursionError):
        return None
    batch_id = found.get("batch_id") if isinstance(found, dict) else None
    return batch_id if isinstance(batch_id, str) else None


TOKENS: Final = (
    "input_tokens",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
    "output_tokens",
)
