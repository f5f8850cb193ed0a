"""Joining a batch's results: ranges into sections, sections into one object, in the order of the input.

Everything streams: no step holds more than a few parts of ranges or pieces of objects, whatever the size of the batch.
Every step can be repeated, because its message may be delivered again; it then writes the same.
"""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from typing import Any, Final

from sluice.domain.batches import (
    OUTPUTS,
    SUMMARY,
    Batch,
    Phase,
    Plan,
    Progress,
    Tally,
    end_batch,
    fail_batch,
    mark_notified,
    moved_by_id,
)
from sluice.domain.pricing import cost_facts, usd
from sluice.domain.rows import Encoded, Record, error_line, numbered, split
from sluice.domain.times import rfc3339
from sluice.ports.batches import BatchStore, Joins, Objects
from sluice.ports.swap import Written, change, swap
from sluice.ports.world import Clock, Events, Notice, Notices

PARTS_AHEAD: Final = 4
AHEAD_BYTES: Final = 4 * 1024 * 1024
"""How many parts are prefetched while a section is joined, and how many bytes of each; a part may have any size."""

HASH_BYTES: Final = 12
"""Length of the hash of a custom_id: among 10 million, two collide by chance in one of 10^15 batches."""

ENTRY: Final = HASH_BYTES + 8 + 4
"""Bytes of an index entry: hash, byte offset, place in the section's results."""

BUCKETS: Final = 256
TABLE_BYTES: Final = 4 * BUCKETS
"""An index begins with the number of entries before each first byte of a hash."""

ENTRIES_AT_ONCE: Final = 250_000
"""Maximum compared in memory at once: about 20 MB."""

READS_AT_ONCE: Final = 16

MOST_PACKED_BYTES: Final = 32 * 1024 * 1024
"""Results up to this size are also stored gzipped, for the API."""

ENDED: Final = "Batch Ended"
"""The event's `detail-type`."""

MOST_RANGES_AT_ONCE: Final = 20
MOST_TOKENS_AT_ONCE: Final = 2_000_000
"""A batch of one section with at most this many ranges and output tokens (about 8 MB) is joined in a second or two, by
the function that ran its last range."""

SECTIONS: Final = "sections"
"""The group of all sections of a batch."""

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
        self._notices = notices
        self._clock = clock
        self._events = events

    def join(self, batch_id: str, section: int) -> None:
        """Join a section; the last one ends the batch."""
        batch = self._batches.get(batch_id)
        if batch is None or batch.plan is None:
            return
        if batch.phase is Phase.ENDED:
            self.notify(batch)
            return
        if self._objects.head(batch.section_key(section, "index")) is None:
            self._join(batch, batch.plan, section, Places())
        progress = self._batches.mark(batch_id, SECTIONS, section, Tally())
        if progress.members == batch.plan.sections:
            self._finish(batch, batch.plan)

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
        error = numbered(error_line(0, problem), 1)
        self._objects.put(batch.errors_key, f"{error}\n".encode())
        self._objects.put(batch.results_key, b"")
        self._pack(ended)
        self._write(batch, ended)

    # Sections --------------------------------------------------------------------------------------------------

    def _join(self, batch: Batch, plan: Plan, section: int, repeated: Places) -> None:
        """Write a section's results, errors and index. `repeated`: the results whose custom_id an earlier row has."""
        results = self._objects.writer(batch.section_key(section, "results"))
        errors = self._objects.writer(batch.section_key(section, "errors"))
        index = Index()
        place = base = 0
        try:
            for part in self._parts(batch, plan, section):
                count = 0
                for line in split(part):
                    record = Encoded.of(line)
                    if record.kind == "H":
                        count += record.tally.lines
                        continue
                    if record.kind == "R" and place in repeated:
                        errors.write(_moved(_as_repeated(record.record()), base))
                    elif record.kind == "R":
                        results.write(record.body)
                        results.write(b"\n")
                    else:
                        errors.write(_moved(record.record(), base))
                    if record.kind == "R":
                        index.add(record, place)
                        place += 1
                base += count
            results.close()
            errors.close()
        finally:
            results.abort()
            errors.abort()
        if not repeated:
            # Written last: a section that has an index is joined.
            self._write_index(batch.section_key(section, "index"), index)

    def _write_index(self, key: str, index: Index) -> None:
        writer = self._objects.writer(key)
        try:
            for piece in index.pieces():
                writer.write(piece)
            writer.close()
        finally:
            writer.abort()

    def _parts(self, batch: Batch, plan: Plan, section: int) -> Iterator[Iterator[bytes]]:
        """Yield the parts of a section's ranges, in order and piece by piece; the first pieces are prefetched."""
        with ThreadPoolExecutor(PARTS_AHEAD) as threads:
            waiting: deque[tuple[str, Future[bytes]]] = deque()
            for number in plan.members(section):
                key = batch.part_key(number)
                waiting.append((key, threads.submit(self._objects.read, key, 0, AHEAD_BYTES)))
                if len(waiting) > PARTS_AHEAD:
                    yield self._pieces(*waiting.popleft())
            while waiting:
                yield self._pieces(*waiting.popleft())

    def _pieces(self, key: str, first: Future[bytes]) -> Iterator[bytes]:
        piece, at = first.result(), 0
        while piece:
            yield piece
            at += len(piece)
            if len(piece) < AHEAD_BYTES:
                return
            piece = self._objects.read(key, at, AHEAD_BYTES)

    # The whole -------------------------------------------------------------------------------------------------

    def _finish(self, batch: Batch, plan: Plan) -> None:
        groups = self._batches.groups(batch.batch_id, "section#")
        tally = sum((group.tally for group in groups.values()), Tally())
        repeated = self._repeated(batch, plan, tally.rows)
        for section, places in repeated.items():
            self._join(batch, plan, section, places)
        tally, duplicates = self._without(batch, tally, repeated)
        sources = {each: batch.section_key(each, "results") for each in range(plan.sections)}
        size = self._objects.assemble(batch.results_key, sources, self._sizes(sources))
        self._write_errors(batch, plan, groups)
        ended = end_batch(batch, self._clock.now(), tally, duplicates, size)
        self._pack(ended)
        self._write(batch, ended)

    def _sizes(self, keys: Mapping[int, str]) -> dict[int, int]:
        with ThreadPoolExecutor(READS_AT_ONCE) as threads:
            found = list(threads.map(self._objects.head, keys.values()))
        return {each: stored.size for each, stored in zip(keys, found, strict=True) if stored}

    def _repeated(self, batch: Batch, plan: Plan, rows: int) -> dict[int, Places]:
        """Return the places of results whose custom_id an earlier row has, by section.

        Hashes of custom_ids are compared, a part of all hashes at a time, so that memory does not grow with the batch.
        """
        keys = [batch.section_key(section, "index") for section in range(plan.sections)]
        shares = min(BUCKETS, max(1, -(-rows // ENTRIES_AT_ONCE)))
        repeated: dict[int, Places] = {}
        with ThreadPoolExecutor(READS_AT_ONCE) as threads:
            tables = list(threads.map(lambda key: self._objects.read(key, 0, TABLE_BYTES), keys))
            for share in range(shares):
                first, last = share * BUCKETS // shares, (share + 1) * BUCKETS // shares
                spans = [_span(table, first, last) for table in tables]
                pieces = threads.map(
                    lambda key, span: self._objects.read(key, span[0], span[1]), keys, spans
                )
                for section, place in _later_ones(pieces):
                    repeated.setdefault(section, Places()).add(place)
        return repeated

    def _without(
        self, batch: Batch, tally: Tally, repeated: Mapping[int, Places]
    ) -> tuple[Tally, int]:
        """Return the sums without the results that became errors, and the number of those."""
        duplicates = 0
        for section in repeated:
            key = batch.section_key(section, "errors")
            for line in split(self._objects.stream(key)):
                record = Record.decoded(line)
                if record.tally.rows:
                    duplicates += 1
                    tally += _negative(record.tally)
        return tally, duplicates

    def _write_errors(self, batch: Batch, plan: Plan, groups: Mapping[str, Progress]) -> None:
        """Write the errors of all sections, with line numbers counted from the start of the file."""
        errors = self._objects.writer(batch.errors_key)
        base = 1
        try:
            for section in range(plan.sections):
                for line in split(self._objects.stream(batch.section_key(section, "errors"))):
                    record = Record.decoded(line)
                    errors.write(f"{numbered(record.body, base + record.line)}\n".encode())
                base += groups[f"section#{section:06d}"].tally.lines
            errors.close()
        finally:
            errors.abort()

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

    def send_join(self, batch_id: str, section: int) -> None:
        """Join a section, or send it to the batches function; raises StoreBusy."""
        try:
            if self._assemble().is_small(batch_id, section):
                self._assemble().join(batch_id, section)
                return
        except Exception:  # noqa: BLE001 - after any error the batches function joins it
            self._events.problem("batch not joined at once", batch_id=batch_id, section=section)
        self._queue.send_join(batch_id, section)


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
        "calls": tally.calls,
        "tokens": tokens,
        "lane": "live",
        **cost_facts(tally.cost_micro_usd, tally.unknown_costs),
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
    except ValueError:
        return None
    batch_id = found.get("batch_id") if isinstance(found, dict) else None
    return batch_id if isinstance(batch_id, str) else None


TOKENS: Final = (
    "input_tokens",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
    "output_tokens",
)


class Index:
    """The entries of a section, by the first byte of their hash; 24 bytes per entry."""

    def __init__(self) -> None:
        self._buckets = [bytearray() for _ in range(BUCKETS)]

    def add(self, record: Encoded, place: int) -> None:
        """Add a result."""
        digest = sha256(record.custom_id.encode()).digest()[:HASH_BYTES]
        self._buckets[digest[0]] += digest + record.offset.to_bytes(8) + place.to_bytes(4)

    def pieces(self) -> Iterator[bytes]:
        """Yield the index: the number of entries before each first byte, then the entries in order."""
        table = bytearray()
        before = 0
        for bucket in self._buckets:
            table += before.to_bytes(4)
            before += len(bucket) // ENTRY
        yield bytes(table)
        for bucket in self._buckets:
            yield b"".join(sorted(_cut(bucket)))


class Places:
    """A set of places in a section's results, one bit each, because every row of a file may have the same custom_id."""

    def __init__(self) -> None:
        self._bits = bytearray()

    def add(self, place: int) -> None:
        """Add a place."""
        byte, bit = divmod(place, 8)
        if byte >= len(self._bits):
            self._bits.extend(bytes(byte + 1 - len(self._bits)))
        self._bits[byte] |= 1 << bit

    def __contains__(self, place: int) -> bool:
        byte, bit = divmod(place, 8)
        return byte < len(self._bits) and bool(self._bits[byte] >> bit & 1)

    def __bool__(self) -> bool:
        return bool(self._bits)


def _cut(entries: bytes | bytearray) -> Iterator[bytes]:
    return (bytes(entries[at : at + ENTRY]) for at in range(0, len(entries), ENTRY))


def _span(table: bytes, first: int, last: int) -> tuple[int, int]:
    """Return the offset and the length of the entries of some first bytes in an index."""
    start = int.from_bytes(table[4 * first : 4 * first + 4])
    if last == BUCKETS:
        # To the end of the object, whose length is not known here.
        return TABLE_BYTES + ENTRY * start, ENTRY * ENTRIES_AT_ONCE * 4
    stop = int.from_bytes(table[4 * last : 4 * last + 4])
    return TABLE_BYTES + ENTRY * start, ENTRY * (stop - start)


def _later_ones(pieces: Iterator[bytes]) -> Iterator[tuple[int, int]]:
    """Yield section and place of each entry whose hash an earlier entry has."""
    entries = [
        entry + section.to_bytes(4) for section, piece in enumerate(pieces) for entry in _cut(piece)
    ]
    entries.sort()
    before = b""
    for entry in entries:
        digest = entry[:HASH_BYTES]
        if digest == before:
            yield int.from_bytes(entry[ENTRY:]), int.from_bytes(entry[ENTRY - 4 : ENTRY])
        before = digest


def _as_repeated(record: Record) -> Record:
    """Return the error for a result whose custom_id an earlier row has. It contains the answer."""
    message = f"duplicate custom_id {record.custom_id!r}; an earlier line has it"
    body = error_line(record.offset, message, record.custom_id, record.body)
    return replace(record, kind="E", body=body)


def _moved(record: Record, base: int) -> bytes:
    """Return an error's line with its number counted from the section's first line."""
    return replace(record, line=base + record.line).encoded()


def _negative(tally: Tally) -> Tally:
    """Return what removes one row from the counts: its line counts as invalid, its cost remains."""
    return Tally(
        succeeded=-tally.succeeded,
        errored=-tally.errored,
        canceled=-tally.canceled,
        expired=-tally.expired,
        invalid=tally.rows,
    )
