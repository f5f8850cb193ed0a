"""The results of an upstream batch, line by line: whatever a line has in it, it is a value of bounded size."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import httpx2

from sluice.adapters.claude_answers import Partial, is_error, message_of, refusal, too_large
from sluice.adapters.claude_bodies import (
    AnswerTooLarge,
    object_of,
    parsed,
    pieces_of,
    raw_member,
)
from sluice.domain.errors import ResultsInterrupted
from sluice.domain.retries import Failure
from sluice.ports.claude import Refused
from sluice.ports.upstream import ResultRow, RowKind
from sluice.worker.memory import BUDGET, MEBIBYTE

MOST_LINE_BYTES: Final = BUDGET.most_answer + MEBIBYTE
"""Maximum size of a line of the results: the largest answer that is read, and what is around it."""

_CUSTOM_ID: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_BEGINNING: Final = re.compile(rb'[ \t]*\{[ \t]*"custom_id"[ \t]*:[ \t]*"([a-zA-Z0-9_-]{1,64})"')
_TO_MESSAGE: Final = re.compile(
    rb'\{"custom_id":[ ]?"([a-zA-Z0-9_-]{1,64})",[ ]?"result":[ ]?\{"type":[ ]?"succeeded",[ ]?"message":'
)
"""The beginning of a succeeded row as Anthropic writes it."""

_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


@dataclass(eq=False, slots=True)
class SdkRows:
    """The results of a batch, while they are read."""

    _batch_id: str
    _response: httpx2.Response
    _count: int = field(default=0, init=False)

    def __iter__(self) -> Iterator[ResultRow]:
        """Yield each line once; holds one line at a time. Raises ResultsInterrupted."""
        try:
            for line in _lines(pieces_of(self._response)):
                row = row_of(line.text, is_whole=line.is_whole)
                if row.kind is RowKind.BROKEN:
                    self._check_connection(line)
                yield row
                self._count += 1
        except httpx2.HTTPError as error:
            raise self._interrupted(type(error).__name__) from error
        finally:
            self.close()

    def close(self) -> None:
        """Close the connection."""
        self._response.close()

    def _check_connection(self, line: _Line) -> None:
        """Raise ResultsInterrupted if a broken line is an error that follows the 200, or half a line at the end."""
        try:
            document = _read(line.text)[0] if line.is_whole else None
        except (ValueError, AnswerTooLarge):
            document = None
            if not line.has_end:
                raise self._interrupted("the last line is not complete") from None
        if is_error(document) and "custom_id" not in object_of(document):
            raise self._interrupted(refusal(document, 200, Partial(), {}).failure.type)

    def _interrupted(self, reason: str) -> ResultsInterrupted:
        return ResultsInterrupted(self._batch_id, self._count, reason)


@dataclass(frozen=True, slots=True)
class _Line:
    text: bytes
    is_whole: bool
    """False: the line is too long, and only its beginning was kept."""
    has_end: bool


def _lines(pieces: Iterable[bytes]) -> Iterator[_Line]:
    """Yield each line that is not blank."""
    held, size = bytearray(), 0
    for piece in pieces:
        start = 0
        while (end := piece.find(b"\n", start)) >= 0:
            held += piece[start : min(end, start + MOST_LINE_BYTES - len(held))]
            size += end - start
            if text := _trimmed(held):
                yield _Line(text, size <= MOST_LINE_BYTES, has_end=True)
            held, size, start = bytearray(), 0, end + 1
        held += piece[start : start + MOST_LINE_BYTES - len(held)]
        size += len(piece) - start
    if text := _trimmed(held):
        yield _Line(text, size <= MOST_LINE_BYTES, has_end=False)


def _trimmed(line: bytearray) -> bytes:
    return bytes(line).removeprefix(_BYTE_ORDER_MARK).strip()


def _read(line: bytes) -> tuple[Any, bool]:
    """Return the document of a line, and whether its bytes can be kept; raises ValueError, AnswerTooLarge."""
    try:
        return parsed(line.decode())
    except UnicodeDecodeError:
        return parsed(line.decode("utf-8", "replace"))[0], False


def row_of(line: bytes, *, is_whole: bool = True) -> ResultRow:
    """Return the row in a line of the results, of which only the beginning may be there."""
    beginning = _BEGINNING.match(line)
    custom_id = beginning.group(1).decode() if beginning else None
    if not is_whole:
        return _too_large(custom_id)
    try:
        return _usual(line) or _other(line)
    except ValueError:
        return _broken(custom_id, "is not JSON")
    except AnswerTooLarge:
        return _too_large(custom_id)


def _usual(line: bytes) -> ResultRow | None:
    """Return the row of a line that is written as Anthropic does, which is read three times as fast; None for others.

    If what is between its beginning and its end is JSON, so is the line, and it has no other members.
    """
    beginning = _TO_MESSAGE.match(line)
    if beginning is None or not line.endswith(b"}}"):
        return None
    raw = line[beginning.end() : -2].strip()
    try:
        message, is_exact = _read(raw)
    except ValueError:
        return None
    return _succeeded(beginning.group(1).decode(), message, raw if is_exact else None)


def _other(line: bytes) -> ResultRow:
    """Return the row of any line; raises ValueError, AnswerTooLarge."""
    document, is_exact = _read(line)
    said = object_of(document)
    custom_id = said.get("custom_id")
    if not isinstance(custom_id, str) or not _CUSTOM_ID.fullmatch(custom_id):
        return _broken(None, "has no valid custom_id")
    result = object_of(said.get("result"))
    if result.get("type") != RowKind.SUCCEEDED:
        return _without_message(custom_id, result)
    raw = raw_member(line, b"result", b"message") if is_exact else None
    return _succeeded(custom_id, result.get("message"), raw)


def _without_message(custom_id: str, result: Mapping[str, Any]) -> ResultRow:
    kind = result.get("type")
    if kind == RowKind.ERRORED:
        failure = refusal(result.get("error"), 200, Partial(), {}).failure
        return ResultRow(custom_id, RowKind.ERRORED, failure=failure)
    if kind in (RowKind.CANCELED, RowKind.EXPIRED):
        return ResultRow(custom_id, RowKind(kind))
    return _broken(custom_id, "has an unknown type of result")


def _succeeded(custom_id: str, message: Any, raw: bytes | None) -> ResultRow:
    if raw is not None and len(raw) > BUDGET.most_answer:
        return _too_large(custom_id)
    read = message_of(message, None if raw is None else raw.decode(), Partial())
    if isinstance(read, Refused):
        return ResultRow(
            custom_id, RowKind.BROKEN, failure=replace(read.failure, may_be_billed=True)
        )
    return ResultRow(
        custom_id,
        RowKind.SUCCEEDED,
        read.message.encode(),
        stop_reason=read.stop_reason,
        bill=read.bill,
    )


def _too_large(custom_id: str | None) -> ResultRow:
    return ResultRow(custom_id, RowKind.BROKEN, failure=too_large(Partial()).failure)


def _broken(custom_id: str | None, what: str) -> ResultRow:
    failure = Failure(
        "api_error", f"the line of the results {what}", status=502, may_be_billed=True
    )
    return ResultRow(custom_id, RowKind.BROKEN, failure=failure)
