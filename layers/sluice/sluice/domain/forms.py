"""Converting files to rows: gzip, CSV with a prompt, folders of documents.

Everything streams: input is read in pieces, rows are yielded one by one.
"""

from __future__ import annotations

import json
import re
import zlib
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any, Final

from sluice.domain.batches import BOM, MOST_LINE_BYTES, Options
from sluice.domain.csv_files import DELIMITERS, CsvFile
from sluice.domain.csv_files import Record as CsvRecord

MOST_ROWS_BYTES: Final = 20 * 1024**3
"""Maximum of the rows that are made from one file: a gzip file of any size can unpack to 1,000 times as much."""

LEAST_ROWS_BYTES: Final = 256 * 1024**2
MOST_GROWTH: Final = 100
"""Rows made from a CSV file may have the first, or so many times the bytes of the file, because each repeats the
prompt: 12 KB with a prompt of 130 KB would be half a gigabyte."""

FEED_BYTES: Final = 2 * 1024
"""Packed bytes unpacked in one step: a file can have a member in every 20 bytes."""

PIECE_BYTES: Final = 1024 * 1024
"""Bytes unpacked, or decoded as text, in one step."""

PROBLEM: Final = "sluice_problem"
"""The field of a row that is already known to be bad; its value is the reason."""

DOCUMENT_TYPES: Final[Mapping[str, str]] = {
    ".txt": "text/plain",
    ".md": "text/plain",
    ".html": "text/plain",
    ".htm": "text/plain",
    ".pdf": "application/pdf",
}
"""The media type of each document suffix; HTML is sent as plain text."""

MOST_PDF_BYTES: Final = 3 * MOST_LINE_BYTES // 4 - 64 * 1024
"""In a request a PDF is base64, which has a third more bytes; the rest is for the prompt."""

FOLDER_OPTIONS: Final = "options.json"
"""Uploaded to a folder last, it creates a batch of the documents there."""

_NOT_IN_AN_ID: Final = re.compile(r"[^a-zA-Z0-9_-]+")
_SURROGATES: Final = re.compile("[\ud800-\udfff]")
_SEPARATOR: Final = re.compile(r"sep=(.)", re.IGNORECASE)
_FIELD: Final = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
_LONGEST_ID: Final = 64


class BadForm(Exception):
    """The file cannot be converted to rows; the message says why."""


def unpacked(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the unpacked content of gzip pieces, in small pieces; raises BadForm. Several members are one file."""
    total = 0
    unpacker = zlib.decompressobj(wbits=31)
    started = False
    held = bytearray()
    try:
        for some in _fed(pieces):
            rest = some
            while rest:
                if unpacker.eof:
                    unpacker = zlib.decompressobj(wbits=31)
                started = True
                # At the end of a member the rest is copied: of all that is fed at once, for each member in it.
                held += unpacker.decompress(rest, PIECE_BYTES)
                rest = unpacker.unconsumed_tail or unpacker.unused_data
                if len(held) >= PIECE_BYTES:
                    total += PIECE_BYTES
                    yield _first_piece(held)
                if total + len(held) > MOST_ROWS_BYTES:
                    raise BadForm(f"the unpacked file exceeds {MOST_ROWS_BYTES:,} bytes")
    except zlib.error as error:
        raise BadForm(f"the file is not valid gzip: {error}") from error
    if started and not unpacker.eof:
        raise BadForm("the gzip file is truncated; upload it again")
    if held:
        yield bytes(held)


def _fed(pieces: Iterable[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        for at in range(0, len(piece), FEED_BYTES):
            yield piece[at : at + FEED_BYTES]


def _first_piece(held: bytearray) -> bytes:
    piece = bytes(held[:PIECE_BYTES])
    del held[:PIECE_BYTES]
    return piece


def csv_rows(pieces: Iterable[bytes], options: Options) -> Iterator[bytes]:
    """Yield a JSONL line for each record of a CSV file; the first record names the columns.

    The ids are those of a column `custom_id`, else `row-1`, `row-2` ... In the prompt, `{column}` is a field. Blank
    lines between the rows give each the number of its line in the file.
    """
    template = options.prompt
    if template is None:
        raise BadForm(
            'a CSV file requires a prompt: store {"prompt": "Summarize: {text}", "model": ..., '
            '"max_tokens": ...} next to it as <name>.options.json'
        )
    growth = _Growth()
    file = CsvFile(growth.read(pieces))
    header = _header(file, fields_of(template))
    written = 0
    for number, record in enumerate(file.records(header.delimiter), start=1):
        if record.is_blank:
            continue
        item = _csv_item(header.names, record, number, template)
        line = _line(item)
        if len(line) > MOST_LINE_BYTES:
            problem = f"the request has {len(line):,} bytes; the maximum is {MOST_LINE_BYTES:,}"
            line = _line({"custom_id": item["custom_id"], PROBLEM: problem})
        yield growth.written(b"\n" * (record.line - 1 - written) + line)
        written = record.line
    yield growth.written(b"\n" * (file.line - 1 - written))


@dataclass(frozen=True, slots=True)
class _Header:
    delimiter: str
    names: Sequence[str]


def _header(file: CsvFile, wanted: Sequence[str]) -> _Header:
    """Read the names of the columns, with the first delimiter under which all that are wanted are there."""
    delimiters: Sequence[str] = DELIMITERS
    while (first := file.peek(DELIMITERS[0])) is not None:
        # Excel's own first line, which names the delimiter.
        said = _SEPARATOR.fullmatch(DELIMITERS[0].join(first.fields))
        if said is not None:
            delimiters = (said[1],)
        elif not first.is_blank:
            break
        file.skip(DELIMITERS[0])
    else:
        raise BadForm("the file is empty")
    records = {each: record for each in delimiters if (record := file.peek(each)) is not None}
    if all(record.problem for record in records.values()):
        raise BadForm(f"the header in line {first.line} is not valid CSV: {first.problem}")
    headers = [
        _Header(delimiter, [name.strip() for name in record.fields])
        for delimiter, record in records.items()
        if record.problem is None
    ]
    found = next((each for each in headers if not set(wanted) - set(each.names)), None)
    header = found or max(headers, key=lambda each: len(each.names))
    if _is_broken("".join(header.names)):
        raise BadForm(f"the header in line {first.line} is not valid UTF-8; save the file as UTF-8")
    file.skip(header.delimiter)
    for name, count in Counter(header.names).items():
        if name and count > 1:
            raise BadForm(f"the header has {count} columns {name!r}; rename all but one")
    for field in wanted:
        if field not in header.names:
            columns = ", ".join(header.names)
            raise BadForm(f"the prompt uses unknown column {field!r}; the columns are {columns}")
    return header


class _Growth:
    """How much larger than the file its rows are."""

    def __init__(self) -> None:
        self._read = self._written = 0

    def read(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Count what is read."""
        for piece in pieces:
            self._read += len(piece)
            yield piece

    def written(self, line: bytes) -> bytes:
        """Count a row; raises BadForm when the rows have become too large."""
        self._written += len(line)
        if self._written > max(LEAST_ROWS_BYTES, MOST_GROWTH * self._read):
            raise BadForm(
                f"the rows made from the file exceed {LEAST_ROWS_BYTES:,} bytes and {MOST_GROWTH} times "
                'its size, because each repeats the prompt; put what all rows share into "system"'
            )
        return line


def _csv_item(
    names: Sequence[str], record: CsvRecord, number: int, template: str
) -> dict[str, Any]:
    # As a reader of CSV does: missing or additional fields are the last ones.
    fields = dict(zip(names, record.fields, strict=False))
    custom_id = fields.get("custom_id") if "custom_id" in names else f"row-{number}"
    problem = record.problem
    size = len(template) + sum(len(fields.get(name, "")) for name in fields_of(template))
    if problem is None and len(record.fields) != len(names):
        lines = f" (lines {record.line} to {record.last_line})" if record.lines > 1 else ""
        problem = f"the record{lines} has {len(record.fields)} fields; the header has {len(names)}"
    elif problem is None and _is_broken("".join(record.fields)):
        problem = "the record is not valid UTF-8; save the file as UTF-8"
    elif problem is None and size > MOST_LINE_BYTES:
        # Checked before it is filled: a template may repeat a long field thousands of times.
        problem = (
            f"the filled prompt has about {size:,} characters; the maximum is {MOST_LINE_BYTES:,}"
        )
    if problem is not None:
        named = custom_id is not None and not _is_broken(custom_id)
        return ({"custom_id": custom_id} if named else {}) | {PROBLEM: problem}
    content = filled(template, fields)
    return {
        "custom_id": custom_id,
        "params": {"messages": [{"role": "user", "content": content}]},
    }


def _is_broken(text: str) -> bool:
    """Return whether text was not UTF-8: it then has surrogates."""
    return not text.isascii() and _SURROGATES.search(text) is not None


def document_row(name: str, size: int, body: bytes, options: Options) -> bytes:
    """Return the JSONL line of one document: the document as a block, then the prompt, where `{name}` is its name.

    `size` is that of the document; of one above `MOST_LINE_BYTES`, `body` is only the beginning.
    """
    media_type = DOCUMENT_TYPES.get(ending_of(name))
    if media_type is None:
        ending = ending_of(name) or "without a suffix"
        return _bad_document(
            name, f"{name}: documents {ending} are not supported; use {', '.join(DOCUMENT_TYPES)}"
        )
    is_pdf = media_type == "application/pdf"
    if size <= MOST_LINE_BYTES:
        if not is_pdf and is_utf_16(body):
            return _bad_document(name, f"{name} is UTF-16; save it as UTF-8")
        try:
            line = _document_line(name, media_type, body, options)
        except UnicodeDecodeError:
            return _bad_document(name, f"{name} is not valid UTF-8; save it as UTF-8")
        if len(line) <= MOST_LINE_BYTES:
            return line
    limit = f"{MOST_LINE_BYTES:,} bytes" + (f", that of a PDF {MOST_PDF_BYTES:,}" if is_pdf else "")
    return _bad_document(name, f"{name} has {size:,} bytes; the limit of a request is {limit}")


def _document_line(name: str, media_type: str, body: bytes, options: Options) -> bytes:
    source = {"type": "text", "media_type": media_type, "data": ""}
    if media_type == "application/pdf":
        source |= {"type": "base64", "data": b64encode(body).decode()}
    else:
        source |= {"data": body.removeprefix(BOM).decode()}
    content = [
        {"type": "document", "source": source, "title": name[-500:]},
        {"type": "text", "text": filled(options.prompt or "", {"name": name})},
    ]
    return _line(
        {"custom_id": id_of(name), "params": {"messages": [{"role": "user", "content": content}]}}
    )


def _bad_document(name: str, problem: str) -> bytes:
    return _line({"custom_id": id_of(name), PROBLEM: problem})


def named_document(name: str) -> bytes:
    """Return the JSONL line by which the `custom_id` of a document leads back to its name."""
    return _line({"custom_id": id_of(name), "document": name})


def is_utf_16(beginning: bytes) -> bool:
    """Return whether a text is UTF-16: by its byte order mark, or because every other byte is zero."""
    some = beginning[:1_000]
    return beginning.startswith((b"\xff\xfe", b"\xfe\xff")) or 3 * some.count(0) > len(some)


def with_line_ends(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield a JSONL file with LF in place of each CR, if its lines end with CR alone."""
    is_first, ends_with_cr = True, False
    for piece in pieces:
        if is_first and piece:
            is_first, ends_with_cr = False, ends_lines_with_cr(piece)
        yield piece.replace(b"\r", b"\n") if ends_with_cr else piece


def ends_lines_with_cr(beginning: bytes) -> bool:
    """Return whether the lines of a file end with CR alone. A CR at the very end may be half of a line end."""
    return b"\r" in beginning[:-1] and b"\n" not in beginning


def ending_of(name: str) -> str:
    """Return the suffix of a file in lower case, with its dot; empty if there is none."""
    _, dot, ending = name.rpartition(".")
    return f".{ending.lower()}" if dot and "/" not in ending else ""


def id_of(name: str) -> str:
    """Return the `custom_id` of a document: its name with other characters replaced, and a digest of it."""
    plain = _NOT_IN_AN_ID.sub("-", name)
    digest = sha256(name.encode()).hexdigest()[:8]
    return f"{plain[: _LONGEST_ID - 9]}-{digest}"


@lru_cache(maxsize=4)
def _segments(template: str) -> tuple[tuple[str, str | None], ...]:
    """Return a template as text, and the field it is replaced with, None if it stays. Read once, not for each row."""
    found: list[tuple[str, str | None]] = []
    at = 0
    for match in _FIELD.finditer(template):
        found.append((template[at : match.start()], None))
        found.append((match[0], match[1].strip()) if match[1] else (match[0][0], None))
        at = match.end()
    return (*found, (template[at:], None))


def fields_of(template: str) -> list[str]:
    """Return the fields that a template uses."""
    return [field for _, field in _segments(template) if field is not None]


def filled(template: str, fields: Mapping[str, str]) -> str:
    """Fill the fields of a template; `{{` and `}}` are braces. Unknown fields are left as they are."""
    return "".join(
        text if field is None else fields.get(field, text) for text, field in _segments(template)
    )


def _line(item: Mapping[str, Any]) -> bytes:
    return json.dumps(item, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
