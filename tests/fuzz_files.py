"""Random files for `tests.fuzz`. The references: Python's csv and json, and the table that a file was made of."""

from __future__ import annotations

import csv
import io
import json
import random
import re
from collections.abc import Iterator
from typing import Any, Final

from sluice.domain.batches import Options
from sluice.domain.csv_files import CsvFile, Record
from sluice.domain.forms import PROBLEM, csv_rows
from sluice.domain.rows import BadRow, Row, lines
from sluice.intake.requests import read_row

LINE_ENDS: Final = ("\n", "\r\n", "\r")
BOM: Final = "\ufeff"


def in_pieces(body: bytes, chance: random.Random) -> Iterator[bytes]:
    """Yield a body in pieces of random sizes."""
    most, at = chance.choice([1, 5, 200, 5_000]), 0
    while at < len(body):
        size = chance.randint(1, most)
        yield body[at : at + size]
        at += size


# CSV: Python's module reads what is valid --------------------------------------------------------------------------


def read_csv(chance: random.Random) -> None:
    """What Python's module reads is read the same; and no line is left out, whatever the file is."""
    delimiter = chance.choice(",;\t")
    alphabet = chance.choice(['ab,"\n\r', 'a;,"\n', '"\n', 'ä€\t",\r\n', 'a,b"\0\n'])
    text = "".join(chance.choices(alphabet, k=chance.randrange(40)))
    body = (chance.choice(["", BOM]) + text).encode()
    found = list(CsvFile(in_pieces(body, chance)).records(delimiter))
    _is_gapless(found, text)
    try:
        expected = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error:
        assert any(record.problem for record in found), "a broken file was accepted"
        return
    # A blank line is a record with one empty field here, and one without fields there.
    assert [(fields or [""]) for fields in expected] == [list(record.fields) for record in found]
    assert not any(record.problem for record in found)


def _is_gapless(found: list[Record], text: str) -> None:
    line = 1
    for record in found:
        assert record.line == line
        line += record.lines
    ends = len(re.findall(r"\r\n|\n|\r", text))
    assert line - 1 == ends + (bool(text) and text[-1] not in "\r\n")


# CSV files: what they were made of ---------------------------------------------------------------------------------

_TEXTS: Final = (
    "",
    "x",
    "a,b;c\td",
    'say "hi"',
    "two\nlines",
    "three\r\nlines\r",
    "ä€😀",
    " ",
    '5"',
)
_ROWS_TEXT: Final = Options(prompt="Say {text}")


def convert_csv(chance: random.Random) -> None:
    """Each record has its row, or its error under its own id and line; a bad one costs no other."""
    end, delimiter = chance.choice(LINE_ENDS), chance.choice(",;\t")
    # With CR as line end, Python's module does not quote a field for its LF.
    quotes_all = end == "\r" or chance.random() < 0.5
    made = io.StringIO()
    writer = csv.writer(
        made,
        delimiter=delimiter,
        lineterminator=end,
        quoting=csv.QUOTE_ALL if quotes_all else csv.QUOTE_MINIMAL,
    )
    names = ["custom_id", "text", "more"]
    chance.shuffle(names)
    writer.writerow(names)
    expected: list[tuple[int, str | None, str | None]] = []
    for number in range(chance.randrange(8)):
        line = _lines_in(made.getvalue()) + 1
        fields = {"custom_id": f"id-{number}", "text": chance.choice(_TEXTS), "more": "m"}
        record = [fields[name] for name in names]
        kind = chance.choice(["good", "good", "blank", "short", "long", "quote", "bytes"])
        if kind == "blank":
            made.write(end)
        elif kind in {"good", "short", "long"}:
            record = {"good": record, "short": record[:2], "long": [*record, "extra"]}[kind]
            writer.writerow(record)
            custom_id = f"id-{number}" if "custom_id" in names[: len(record)] else None
            said = f"Say {fields['text']}" if kind == "good" else None
            expected.append((line, custom_id, said))
        elif kind == "quote":
            # A quote inside a quoted field, which is the last of its line.
            at = names.index("text")
            before = [fields[name] for name in names[:at]]
            made.write(delimiter.join([*before, f'"a "x{delimiter}b" c']) + end)
            expected.append((line, _id_before(names, at, number), None))
        else:
            made.write(
                delimiter.join([f"id-{number}" if n == "custom_id" else "\udcff" for n in names])
                + end
            )
            expected.append((line, f"id-{number}", None))
    body = (chance.choice(["", BOM]) + made.getvalue()).encode(errors="surrogateescape")
    rows = b"".join(csv_rows(in_pieces(body, chance), _ROWS_TEXT)).split(b"\n")
    found = [(number, json.loads(row)) for number, row in enumerate(rows, start=1) if row]
    assert expected == [(number, row.get("custom_id"), _said(row)) for number, row in found]


def _id_before(names: list[str], at: int, number: int) -> str | None:
    return f"id-{number}" if names.index("custom_id") < at else None


def _said(row: Any) -> str | None:
    return None if PROBLEM in row else str(row["params"]["messages"][0]["content"])


def _lines_in(text: str) -> int:
    return len(re.findall(r"\r\n|\n|\r", text))


# JSONL: Python's json module --------------------------------------------------------------------------------------

_PARAMS: Final = {
    "model": "m",
    "max_tokens": 1,
    "messages": [{"role": "user", "content": "ä\u2028\0"}],
}


def _a_line(chance: random.Random) -> bytes:
    item: Any = {"custom_id": f"id-{chance.randrange(99)}", "params": _PARAMS}
    text = json.dumps(item, ensure_ascii=chance.random() < 0.5).encode()
    at = chance.randrange(len(text))
    other: list[Any] = [None, 7, "x", [item], {**item, "custom_id": "a b"}, {**item, "params": 1}]
    return chance.choice(
        [
            text,
            text,
            b" \t" + text + b" \r",
            b"",
            b"  ",
            b"\0" * 3,
            text[:at],
            text[:at] + bytes([chance.randrange(256)]) + text[at + 1 :],
            text + text,
            json.dumps(chance.choice(other)).encode(),
        ]
    ).replace(b"\n", b"")


def read_jsonl(chance: random.Random) -> None:
    """A line is a row if Python's module reads it as one; each other line is an error of its own, or blank."""
    texts = [_a_line(chance) for _ in range(chance.randrange(12))]
    body = b"".join(text + chance.choice([b"\n", b"\r\n"]) for text in texts)
    found = list(lines(in_pieces(body, chance), 0, len(body), 0))
    assert [text.removesuffix(b"\r") for text in texts] == [
        line.text.removesuffix(b"\r") for line in found
    ]
    for line in found:
        row = read_row(line, Options())
        expected = _expected(line.text)
        if expected is None:
            assert row is None
        elif isinstance(expected, dict):
            assert isinstance(row, Row), (line.text, row)
            assert (expected["custom_id"], expected["params"]) == (row.custom_id, row.params)
        else:
            assert isinstance(row, BadRow), (line.text, row)


def _expected(text: bytes) -> dict[str, Any] | str | None:
    """Return the row of a line, why it is none, or None if it is blank."""
    if not text.strip():
        return None
    try:
        item = json.loads(text.decode())
    except ValueError as error:
        return str(error)
    if not isinstance(item, dict) or set(item) != {"custom_id", "params"}:
        return "not a row"
    named, params = item["custom_id"], item["params"]
    if not isinstance(named, str) or not re.fullmatch("[a-zA-Z0-9_-]{1,64}", named):
        return "not an id"
    is_request = (
        isinstance(params, dict)
        and isinstance(params.get("model"), str)
        and 0 < len(params["model"]) <= 256
        and type(params.get("max_tokens")) is int
        and params["max_tokens"] >= 0
        and isinstance(params.get("messages"), list)
        and all(isinstance(each, dict) for each in params["messages"])
        and len(params["messages"]) > 0
        and params.get("stream", False) is False
    )
    return {"custom_id": named, "params": params} if is_request else "not a request"
