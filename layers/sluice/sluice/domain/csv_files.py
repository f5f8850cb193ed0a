"""Reading CSV: records with their line numbers, whatever is wrong with some of them.

The rules are those of RFC 4180: a field that begins with a quote ends with one, and a quote inside it is doubled. A
line ends with CR, LF or both. A record that breaks the rules is a value, not an exception, and costs no other record:
reading continues with the line after the one in which it begins. Python's `csv` module gives up the whole file, counts
records instead of lines, and does not read a line that ends with CR.
"""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from sluice.domain.batches import MOST_LINE_BYTES

PIECE_BYTES: Final = 1024 * 1024
"""Bytes decoded as text in one step."""

DELIMITERS: Final = (",", ";", "\t")

QUOTE: Final = '"'

_LINE_END: Final = re.compile(r"\r\n|\n|\r")


@dataclass(frozen=True, slots=True)
class Record:
    """A record of a CSV file, or the beginning of one that cannot be read."""

    line: int
    """The line in which it begins, counted from 1."""
    lines: int
    """How many lines it has: a quoted field may have several."""
    fields: tuple[str, ...]
    """Of a record that cannot be read: those before the problem."""
    problem: str | None = None

    @property
    def last_line(self) -> int:
        """The line in which it ends."""
        return self.line + self.lines - 1

    @property
    def is_blank(self) -> bool:
        """Whether it has nothing but white space."""
        return self.problem is None and len(self.fields) == 1 and not self.fields[0].strip()


class CsvFile:
    """The records of a CSV file, in order. Holds at most one record and one piece in memory."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._text = _Text(pieces)
        self._line = 1

    @property
    def line(self) -> int:
        """The line in which the next record begins."""
        return self._line

    def peek(self, delimiter: str) -> Record | None:
        """Return the next record; it is the next one again."""
        found = self._next(delimiter)
        return None if found is None else found[0]

    def skip(self, delimiter: str) -> None:
        """Skip the next record."""
        next(self.records(delimiter), None)

    def records(self, delimiter: str) -> Iterator[Record]:
        """Yield the remaining records."""
        while (found := self._next(delimiter)) is not None:
            record, after = found
            self._line += record.lines
            if after < 0:
                self._text.skip_line()
            else:
                self._text.at = after
            yield record

    def _next(self, delimiter: str) -> tuple[Record, int] | None:
        """Return the next record, and where the one after it begins: -1 if that is after the end of a long line."""
        text = self._text
        end, after = text.line_end()
        if not after:
            return None
        if end - text.at > MOST_LINE_BYTES:
            return self._bad((), f"the line exceeds {MOST_LINE_BYTES:,} characters"), -1
        line = text.held[text.at : end]
        if QUOTE not in line:
            return Record(self._line, 1, tuple(line.split(delimiter))), after
        read = _Quoted(text, delimiter).read()
        if isinstance(read, _Broken):
            # The quote that begins the field may be the wrong one: the next lines are records of their own.
            return self._bad(read.fields, read.problem), text.line_end()[1]
        lines = len(_LINE_END.findall(text.held, text.at, read.end)) + 1
        return Record(self._line, lines, read.fields), read.after

    def _bad(self, fields: tuple[str, ...], problem: str) -> Record:
        return Record(self._line, 1, fields, problem)


class _Text:
    """Decoded text, held from the record that is being read."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = _decoded(pieces)
        self.held = ""
        self.at = 0
        """Where the record begins."""

    def more(self) -> bool:
        """Hold another piece; False at the end of the file."""
        piece = next(self._pieces, "")
        # The text before the record is dropped here and not with each record, which would copy all of it each time.
        self.held, self.at = self.held[self.at :] + piece, 0
        return bool(piece)

    def line_end(self) -> tuple[int, int]:
        """Return where the line ends and where the next one begins; the second is 0 at the end of the file.

        If the line is too long, the end of the text held is its end.
        """
        looked = 0
        while True:
            match = _LINE_END.search(self.held, self.at + looked)
            # A CR at the end of the text may be half of a line end.
            if match is not None and (match[0] != "\r" or match.end() < len(self.held)):
                return match.start(), match.end()
            length = len(self.held) - self.at
            if length > MOST_LINE_BYTES:
                return len(self.held), len(self.held)
            looked = max(0, length - 1)
            if not self.more():
                end = len(self.held)
                if match is not None:
                    return end - 1, end
                return end, end if self.at < end else 0

    def skip_line(self) -> None:
        """Skip a line of any length."""
        while True:
            match = _LINE_END.search(self.held, self.at)
            if match is not None and (match[0] != "\r" or match.end() < len(self.held)):
                self.at = match.end()
                return
            # A CR is kept, because an LF may follow.
            self.at = len(self.held) - (match is not None)
            if not self.more():
                self.at = len(self.held)
                return


@dataclass(frozen=True, slots=True)
class _Whole:
    fields: tuple[str, ...]
    end: int
    """Where its last line ends."""
    after: int
    """Where the next record begins."""


@dataclass(frozen=True, slots=True)
class _Broken:
    fields: tuple[str, ...]
    """Those before the problem."""
    problem: str


class _NeedsMore(Exception):
    """The record does not end in the text held."""


class _Quoted:
    """One record with quotes."""

    def __init__(self, text: _Text, delimiter: str) -> None:
        self._text = text
        self._delimiter = delimiter
        self._ends = re.compile(f"{re.escape(delimiter)}|\r\n|\n|\r")
        self._is_whole = False
        self._found: list[str] = []

    def read(self) -> _Whole | _Broken:
        """Return the record that begins where the text is held from."""
        text = self._text
        while True:
            try:
                return self._read()
            except _NeedsMore:
                if len(text.held) - text.at > MOST_LINE_BYTES:
                    what = f"exceeds {MOST_LINE_BYTES:,} characters, or its quote is not closed"
                    return self._broken(what)
                self._is_whole = not text.more()

    def _read(self) -> _Whole | _Broken:
        held, at = self._text.held, self._text.at
        self._found.clear()
        while True:
            if held.startswith(QUOTE, at):
                close = self._closing(at + 1)
                if close < 0:
                    return self._broken("begins with a quote that is not closed")
                value, at = held[at + 1 : close].replace('""', QUOTE), close + 1
                end = self._ends.match(held, at)
                if end is None and at < len(held):
                    return self._broken(
                        "continues after its closing quote; double the quotes inside it"
                    )
            else:
                end = self._ends.search(held, at)
                value = held[at : end.start() if end else len(held)]
            if not self._is_whole and (end is None or end.end() == len(held)):
                raise _NeedsMore
            self._found.append(value)
            if end is None or end[0] != self._delimiter:
                start, after = end.span() if end else (len(held), len(held))
                return _Whole(tuple(self._found), start, after)
            at = end.end()

    def _broken(self, what: str) -> _Broken:
        return _Broken(tuple(self._found), f"field {len(self._found) + 1} {what}")

    def _closing(self, at: int) -> int:
        """Return where the closing quote of a field is; -1 if there is none in the file."""
        held = self._text.held
        while (at := held.find(QUOTE, at)) >= 0:
            if held.startswith(QUOTE, at + 1):
                at += 2
            elif at + 1 < len(held) or self._is_whole:
                return at
            else:
                break
        if not self._is_whole:
            raise _NeedsMore
        return -1


def _decoded(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yield text without its byte order mark. What is not UTF-8 becomes surrogates, which no valid text has."""
    decoder = getincrementaldecoder("utf-8")(errors="surrogateescape")
    held: list[str] = []
    length, is_first = 0, True
    for piece in pieces:
        for at in range(0, len(piece), PIECE_BYTES):
            held.append(decoder.decode(piece[at : at + PIECE_BYTES]))
            length += len(held[-1])
            if length >= PIECE_BYTES:
                yield _joined(held, is_first=is_first)
                length, is_first = 0, False
    held.append(decoder.decode(b"", final=True))
    yield _joined(held, is_first=is_first)


def _joined(held: list[str], *, is_first: bool) -> str:
    text = "".join(held)
    held.clear()
    return text.removeprefix("\ufeff") if is_first else text
