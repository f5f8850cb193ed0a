"""Sections of a batch's results: joined from the parts of their ranges, and rewritten when a custom_id is repeated.

Everything streams: no step holds more than a few parts of ranges or pieces of objects, whatever the size of the batch.
What a step writes last shows that it is done: the index of a joined section, the repeats that a search has found, the
counts of a finished section.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from struct import iter_unpack
from typing import Final

from sluice.domain.batches import Batch, Plan, Tally
from sluice.domain.errors import InputMissing
from sluice.domain.rows import Encoded, Record, error_line, numbered, split
from sluice.ports.batches import Objects, Stored

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

ENTRIES_AT_ONCE: Final = 400_000
"""Compared in memory at once: about 45 MB. A batch of 100 million rows has 256 searches of this size."""

READS_AT_ONCE: Final = 16

PART_MISSING: Final = "the results of the rows from here on were deleted before they were joined"


class Sections:
    """The objects of sections."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    # Joining ---------------------------------------------------------------------------------------------------

    def is_joined(self, batch: Batch, section: int) -> bool:
        """Return whether a section is joined."""
        return self._objects.head(batch.section_key(section, "index")) is not None

    def join(self, batch: Batch, plan: Plan, section: int) -> None:
        """Write a section's results, errors and index."""
        index = Index()
        self._write(batch, plan, section, Places(), index)
        self._write_index(batch.section_key(section, "index"), index)

    def _write(
        self, batch: Batch, plan: Plan, section: int, repeated: Places, index: Index
    ) -> None:
        """Write results and errors; without repeats under other keys, because a slow invocation may still join it."""
        results = self._objects.writer(batch.section_key(section, _results(repeated)))
        errors = self._objects.writer(batch.section_key(section, _errors(repeated)))
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
            waiting: deque[tuple[str, int, Future[bytes]]] = deque()
            for number in plan.members(section):
                key, (start, _) = batch.part_key(number), plan.bounds(number)
                first = threads.submit(self._objects.read, key, 0, AHEAD_BYTES)
                waiting.append((key, start, first))
                if len(waiting) > PARTS_AHEAD:
                    yield self._pieces(*waiting.popleft())
            while waiting:
                yield self._pieces(*waiting.popleft())

    def _pieces(self, key: str, start: int, first: Future[bytes]) -> Iterator[bytes]:
        try:
            piece, at = first.result(), 0
        except InputMissing:
            # Deleted by hand, or after its retention: the others still have their results.
            yield Record("E", start, 0, "", Tally(), error_line(start, PART_MISSING)).encoded()
            return
        while piece:
            yield piece
            at += len(piece)
            if len(piece) < AHEAD_BYTES:
                return
            piece = self._objects.read(key, at, AHEAD_BYTES)

    # Repeated custom_ids -----------------------------------------------------------------------------------------

    def unsearched(self, batch: Batch, shares: int) -> list[int]:
        """Return the shares of all custom_ids in which repeats were not searched yet."""
        found = self._heads(batch, range(shares), "repeats")
        return [share for share in range(shares) if found[share] is None]

    def search(self, batch: Batch, plan: Plan, share: int, shares: int) -> None:
        """Find the results in a share of all hashes whose custom_id an earlier row has."""
        first, last = share * BUCKETS // shares, (share + 1) * BUCKETS // shares

        def entries_of(section: int) -> bytes:
            key = batch.section_key(section, "index")
            table = self._objects.read(key, 0, TABLE_BYTES)
            return self._objects.read(key, *_span(table, first, last))

        with ThreadPoolExecutor(READS_AT_ONCE) as threads:
            found = b"".join(
                section.to_bytes(4) + place.to_bytes(4)
                for section, place in _later_ones(threads.map(entries_of, range(plan.sections)))
            )
        self._objects.put(batch.section_key(share, "repeats"), found)

    def repeated(self, batch: Batch, shares: int) -> dict[int, Places]:
        """Return the places of all repeats found, by section."""
        repeated: dict[int, Places] = {}
        for share in range(shares):
            found = self._objects.get(batch.section_key(share, "repeats")) or b""
            for section, place in iter_unpack(">II", found):
                repeated.setdefault(section, Places()).add(place)
        return repeated

    # Finishing ---------------------------------------------------------------------------------------------------

    def with_errors(self, batch: Batch, plan: Plan, repeated: Mapping[int, Places]) -> list[int]:
        """Return the sections that have lines of errors, or will have some."""
        found = self._heads(batch, range(plan.sections), "errors")
        return [
            each for each, stored in found.items() if each in repeated or (stored and stored.size)
        ]

    def unfinished(self, batch: Batch, sections: Sequence[int]) -> set[int]:
        """Return the sections that are not finished yet."""
        found = self._heads(batch, sections, "counts")
        return {each for each in sections if found[each] is None}

    def finish(self, batch: Batch, plan: Plan, section: int, repeated: Places, base: int) -> None:
        """Make errors of repeated results, and count the lines of errors from the start of the file: `base`."""
        if repeated:
            self._write(batch, plan, section, repeated, Index())
        errors = self._objects.writer(batch.section_key(section, "numbered"))
        changed, duplicates = Tally(), 0
        try:
            stored = self._objects.stream(batch.section_key(section, _errors(repeated)))
            for line in split(stored):
                record = Record.decoded(line)
                number = base + record.line
                text = numbered(record.body, number, with_offset=batch.has_offsets)
                errors.write(f"{text}\n".encode())
                if record.tally.rows:
                    duplicates += 1
                    changed += _negative(record.tally)
            errors.close()
        finally:
            errors.abort()
        counts = {"duplicates": duplicates, "changed": changed.as_dict()}
        self._objects.put(batch.section_key(section, "counts"), json.dumps(counts).encode())

    def changes(self, batch: Batch, repeated: Mapping[int, Places]) -> tuple[Tally, int]:
        """Return how the sums change by the results that became errors, and the number of those."""
        changed, duplicates = Tally(), 0
        for section in repeated:
            counts = json.loads(self._objects.get(batch.section_key(section, "counts")) or b"{}")
            changed += Tally.of(counts["changed"])
            duplicates += counts["duplicates"]
        return changed, duplicates

    def assemble(
        self, batch: Batch, plan: Plan, repeated: Mapping[int, Places], errors: Sequence[int]
    ) -> int:
        """Write the errors and the results of all sections; return the size of the results."""
        kinds = {each: _results(repeated.get(each)) for each in range(plan.sections)}
        self._assemble(batch, batch.errors_key, dict.fromkeys(errors, "numbered"))
        return self._assemble(batch, batch.results_key, kinds)

    def _assemble(self, batch: Batch, whole: str, kinds: Mapping[int, str]) -> int:
        sources = {each: batch.section_key(each, kind) for each, kind in kinds.items()}
        with ThreadPoolExecutor(READS_AT_ONCE) as threads:
            found = list(threads.map(self._objects.head, sources.values()))
        sizes = {each: stored.size for each, stored in zip(sources, found, strict=True) if stored}
        return self._objects.assemble(whole, sources, sizes)

    def _heads(self, batch: Batch, numbers: Iterable[int], kind: str) -> dict[int, Stored | None]:
        keys = {each: batch.section_key(each, kind) for each in numbers}
        with ThreadPoolExecutor(READS_AT_ONCE) as threads:
            return dict(zip(keys, threads.map(self._objects.head, keys.values()), strict=True))


def shares_of(rows: int) -> int:
    """Return in how many shares the custom_ids of so many rows are searched for repeats."""
    return min(BUCKETS, max(1, -(-rows // ENTRIES_AT_ONCE)))


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


def _results(repeated: Places | None) -> str:
    """Return the kind of object with the results of a section with these repeats."""
    return "unique" if repeated else "results"


def _errors(repeated: Places | None) -> str:
    """Return the kind of object with its errors, whose lines count from the start of the section."""
    return "unique_errors" if repeated else "errors"
