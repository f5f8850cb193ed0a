"""The objects of one range: chunks with the records of saved rows, windows that have ended, and its part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain

from sluice.domain.batches import Batch, RangeState, Tally
from sluice.domain.errors import InputMissing
from sluice.domain.jobs import Job
from sluice.domain.rows import Encoded, Record, split
from sluice.ports.batches import Objects
from sluice.worker.range_rows import HELD_BYTES, Ended, Seat
from sluice.worker.range_windows import Saved, Window


class Sums:
    """Adds up records, one at a time: there may be millions."""

    def __init__(self, lines: int = 0) -> None:
        """Start from lines that are counted already."""
        self._sums = Counter(lines=lines)

    @property
    def tally(self) -> Tally:
        """The sums so far."""
        return Tally.of(self._sums)

    def add(self, line: bytes) -> bytes:
        """Add a record's line, and return it."""
        for name, number in Encoded.of(line).counts().items():
            self._sums[name] += number
        return line


def stored_tally(objects: Objects, part_key: str) -> Tally:
    """Return the sums of a part that is stored already."""
    sums = Sums()
    with suppress(InputMissing):
        for line in split(objects.stream(part_key)):
            sums.add(line)
    return sums.tally


class RangeChunks:
    """Reads and writes the objects of one range, for one claim. All methods block."""

    def __init__(
        self,
        objects: Objects,
        batch: Batch,
        state: RangeState,
        text_of_job: Callable[[Job], str],
        job_of_text: Callable[[str], Job],
    ) -> None:
        self._objects = objects
        self._batch = batch
        self._number = state.number
        self._claims = state.claims
        self._text_of_job = text_of_job
        self._job_of_text = job_of_text
        self._written = 0
        self._reach: dict[str, int] = {}
        """The last byte offset of a record in each chunk."""

    def restored(self, state: RangeState) -> Saved:
        """Read what earlier workers saved, keeping no more records in memory than a window does."""
        saved = Saved()
        held = 0
        for chunk in state.chunks[state.windows :]:
            first = 0
            # A chunk that is missing has outlived its retention: its rows run again.
            with suppress(InputMissing):
                for line in split(self._objects.stream(self._key(chunk))):
                    record, size = Encoded.of(line), len(line) + 1
                    self._reach[chunk] = max(self._reach.get(chunk, 0), record.offset)
                    if record.kind == "J":
                        job = self._job_of_text(record.body.decode())
                        saved.jobs[job.job_id] = job
                    else:
                        held += size
                        text = line + b"\n" if held <= HELD_BYTES else None
                        ended = Ended(record.line, size, text, chunk, first)
                        saved.records[record.offset] = ended
                    first += size
        return saved

    def of_later_rows(self, state: RangeState, offset: int) -> list[str]:
        """Return the chunks that hold records of rows from an offset on."""
        chunks = state.chunks[state.windows :]
        return [chunk for chunk in chunks if self._reach.get(chunk, 0) >= offset]

    def save(self, seats: Sequence[Seat]) -> str:
        """Store the records of rows that have ended; return the chunk's name."""
        name = self._new_name()
        texts = (seat.ended.text for seat in seats if seat.ended)
        self._objects.put(self._key(name), b"".join(text for text in texts if text is not None))
        return name

    def save_whole(self, ended: Sequence[Ended], waiting: Sequence[Seat]) -> str:
        """Store the records of ended rows, and the jobs of others, as one chunk; return its name."""
        name = self._new_name()
        self._write(self._key(name), chain(map(self._text, ended), map(self._job_record, waiting)))
        return name

    def write_window(self, window: Window, ended: Sequence[Ended]) -> str:
        """Store all records of a window as one chunk, in order; return its name."""
        name = self._new_name()
        self._write(self._key(name), self._records(window, ended))
        return name

    def write_part(self, state: RangeState, window: Window, ended: Sequence[Ended]) -> Tally:
        """Store the range's part: the records of all windows, in order, and how many lines there are."""
        sums = Sums(window.lines)
        self._write(self._batch.part_key(self._number), self._part(state, window, ended, sums))
        return sums.tally

    def _part(
        self, state: RangeState, window: Window, ended: Sequence[Ended], sums: Sums
    ) -> Iterator[bytes]:
        for name in state.chunks[: state.windows]:
            for line in split(self._objects.stream(self._key(name))):
                yield sums.add(line) + b"\n"
        for text in self._records(window, ended):
            yield sums.add(text)
        # Last, because the count is known only now. Readers of a part accept it at any position.
        yield Record("H", 0, window.lines, "", Tally(lines=window.lines), "").encoded()

    def _records(self, window: Window, ended: Sequence[Ended]) -> Iterator[bytes]:
        """Yield a window's records in the order of their lines, a result behind the error of the same line."""
        found: list[tuple[int, str, Ended | Record]] = [
            *((each.line, "R", each) for each in (*window.others, *ended)),
            *((each.line, each.kind, each) for each in window.bad),
        ]
        for _, _, each in sorted(found, key=lambda one: one[:2]):
            yield each.encoded() if isinstance(each, Record) else self._text(each)

    def _text(self, ended: Ended) -> bytes:
        """Return a record, from its chunk if it was too much to hold."""
        if ended.text is not None:
            return ended.text
        return self._objects.read(self._key(ended.chunk or ""), ended.first, ended.size)

    def _job_record(self, seat: Seat) -> bytes:
        text = self._text_of_job(seat.job)
        return Record("J", seat.line.offset, seat.line.number, "", Tally(), text).encoded()

    def _write(self, key: str, texts: Iterable[bytes]) -> None:
        """Write an object piece by piece."""
        writer = self._objects.writer(key)
        try:
            for text in texts:
                writer.write(text)
            writer.close()
        finally:
            writer.abort()

    def _new_name(self) -> str:
        self._written += 1
        return f"{self._claims}-{self._written}"

    def _key(self, name: str) -> str:
        return self._batch.chunk_key(self._number, name)
