"""Rows of a batch: from bytes to requests, and from ended jobs to lines of results.

A row is one line of a JSONL object in the format of Anthropic's batch items, `{"custom_id", "params"}`, or in the older
one with `method`, `url` and `body`. An invalid line is a value, not an exception: the other lines of its range run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from sluice.domain.batches import BOM, MOST_LINE_BYTES, Options, Tally
from sluice.domain.forms import PROBLEM
from sluice.domain.jobs import Job, JobError, State
from sluice.domain.times import parse_rfc3339

CUSTOM_ID: Final = re.compile(r"[a-zA-Z0-9_-]{1,64}")

MESSAGES_URL: Final = "/v1/messages"

_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")
"""In UTF-8 text an unpaired surrogate can occur only as an escape."""

_ANTHROPIC_TYPES: Final = frozenset(
    {
        "invalid_request_error",
        "authentication_error",
        "billing_error",
        "permission_error",
        "not_found_error",
        "request_too_large",
        "rate_limit_error",
        "timeout_error",
        "api_error",
        "overloaded_error",
    }
)
"""The types that clients of Anthropic's batches know; Sluice's own types are reported as `api_error`."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line: its number in the range (from 0), its offset in the object, its text without the line end."""

    number: int
    offset: int
    text: bytes
    too_long: bool = False
    """`text` is only its beginning."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request."""

    custom_id: str
    params: Mapping[str, Any]
    deadline: int | None = None
    """Deadline of this row; the batch may have another one."""
    fallback_models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BadRow:
    """Why a line cannot become a job. With a valid `custom_id` it has an errored result as well."""

    message: str
    custom_id: str | None = None


class _Unusable(Exception):
    """The message of a bad row, raised by a check."""


_BEGINNING: Final = 200
"""Bytes kept of a line that is too long."""


def lines(pieces: Iterable[bytes], start: int, end: int, first: int) -> Iterator[Line]:
    """Yield the lines that begin in [start, end), holding at most one of them in memory.

    `pieces` are consecutive from the byte before `start` (which shows whether a line begins at `start`), or from
    `first` if the range starts there. No piece is read after the end of the last line, nor to find the end of a line
    that is too long.
    """
    at = max(first, start - 1)
    is_ours = start == first
    held: list[bytes] = []
    length = number = 0

    def line() -> Line:
        too_long = length > MOST_LINE_BYTES
        text = b"".join(held)[:_BEGINNING] if too_long else b"".join(held)
        return Line(number, at, text.removesuffix(b"\r"), too_long)

    for piece in pieces:
        position = 0
        while (stop := piece.find(b"\n", position)) >= 0:
            length += stop - position
            if is_ours:
                held.append(piece[position:stop])
                yield line()
                number += 1
            at, position = at + length + 1, stop + 1
            is_ours, length = True, 0
            held.clear()
            if at >= end:
                return
        length += len(piece) - position
        if is_ours and length <= MOST_LINE_BYTES:
            held.append(piece[position:])
        elif is_ours:
            held[:] = [b"".join([*held, piece[position:]])[:_BEGINNING]]
        if at + length + 1 >= end and (not is_ours or length > MOST_LINE_BYTES):
            break
    if is_ours and length:
        yield line()


def split(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of `pieces` without their ends, holding at most one of them and one piece in memory."""
    held: list[bytes] = []
    for piece in pieces:
        position = 0
        while (stop := piece.find(b"\n", position)) >= 0:
            held.append(piece[position:stop])
            yield b"".join(held)
            held.clear()
            position = stop + 1
        if position < len(piece):
            held.append(piece[position:])
    if held:
        yield b"".join(held)


def read_row(line: Line, options: Options) -> Row | BadRow | None:
    """Return the request of a line, why it is invalid, or None for a blank line."""
    if line.too_long:
        return BadRow(f"the line exceeds {MOST_LINE_BYTES:,} bytes")
    text = line.text.removeprefix(BOM).strip()
    if not text:
        return None
    custom_id = None
    try:
        item = _json(text)
        custom_id = _custom_id(item)
        return Row(custom_id, _params(item, options), _deadline(item), _fallback_models(item))
    except _Unusable as error:
        return BadRow(str(error), custom_id)


def _json(text: bytes) -> dict[str, Any]:
    try:
        item = json.loads(text.decode(), parse_constant=_no_constant)
        if _SURROGATE.search(text):
            # An unpaired surrogate can be parsed from an escape, but not encoded for the upstream call.
            json.dumps(item, ensure_ascii=False).encode()
    except UnicodeError as error:
        if isinstance(error, UnicodeDecodeError):
            raise _Unusable("the line is not valid UTF-8; save the file as UTF-8") from error
        raise _Unusable("the line has an unpaired surrogate escape; remove it") from error
    except json.JSONDecodeError as error:
        raise _Unusable(
            f"the line is not valid JSON: {error.msg} at column {error.colno}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise _Unusable(f"the line is not usable JSON: {error}") from error
    if not isinstance(item, dict):
        raise _Unusable(
            'the line is not a JSON object; expected {"custom_id": ..., "params": {...}}'
        )
    return item


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not valid JSON")


def _custom_id(item: Mapping[str, Any]) -> str:
    custom_id = item.get("custom_id")
    if custom_id is None:
        raise _Unusable("custom_id: Field required")
    if not isinstance(custom_id, str) or not CUSTOM_ID.fullmatch(custom_id):
        shown = json.dumps(custom_id)[:80]
        raise _Unusable(
            f"custom_id: {shown} does not match ^[a-zA-Z0-9_-]{{1,64}}$ (1 to 64 characters)"
        )
    return custom_id


def _params(item: Mapping[str, Any], options: Options) -> dict[str, Any]:
    if PROBLEM in item:
        raise _Unusable(str(item[PROBLEM]))
    params = item.get("params")
    if params is None and "body" in item:
        method, url = item.get("method", "POST"), item.get("url", MESSAGES_URL)
        if method != "POST" or url != MESSAGES_URL:
            shown = f"{json.dumps(method)} {json.dumps(url)}"[:80]
            raise _Unusable(f"method and url: {shown} is not supported; use POST {MESSAGES_URL}")
        params = item["body"]
    if params is None:
        raise _Unusable("params: Field required")
    if not isinstance(params, dict):
        raise _Unusable("params: Input should be a valid dictionary")
    return checked_params(completed(params, options))


def _deadline(item: Mapping[str, Any]) -> int | None:
    if item.get("deadline") is None:
        return None
    deadline = parse_rfc3339(item["deadline"])
    if deadline is None:
        shown = json.dumps(item["deadline"])[:80]
        raise _Unusable(f"deadline: must be an RFC 3339 string with a time zone (got {shown})")
    return deadline


def _fallback_models(item: Mapping[str, Any]) -> tuple[str, ...]:
    models = item.get("fallback_models") or []
    if not isinstance(models, list) or not all(isinstance(each, str) for each in models):
        raise _Unusable("fallback_models: Input should be a valid list of strings")
    return tuple(models)


def completed(params: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Return the request with the batch's options as defaults."""
    defaults = {
        "model": options.model,
        "max_tokens": options.max_tokens,
        "system": options.system,
    }
    return {name: value for name, value in defaults.items() if value is not None} | dict(params)


def checked_params(params: dict[str, Any]) -> dict[str, Any]:
    """Check only the fields that Sluice uses, with Anthropic's messages; Claude checks the others, row by row."""
    if params.get("stream"):
        raise _Unusable("stream: streaming is not supported in a batch")
    model = params.get("model")
    if "model" not in params:
        raise _Unusable("model: Field required")
    if not isinstance(model, str) or not 1 <= len(model) <= 256:  # noqa: PLR2004 - characters
        raise _Unusable("model: Input should be a valid string")
    max_tokens = params.get("max_tokens")
    if "max_tokens" not in params:
        raise _Unusable("max_tokens: Field required")
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool):
        raise _Unusable("max_tokens: Input should be a valid integer")
    if max_tokens < 1:
        raise _Unusable("max_tokens: must be greater than 0 in a batch")
    if "messages" not in params:
        raise _Unusable("messages: Field required")
    return {name: value for name, value in params.items() if name != "stream"}


# Results -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Record:
    """The outcome of one line: a line of results or of errors, and its counts.

    Records are stored as lines, fields first, so that joining does not parse the JSON of answers.
    """

    kind: str
    """`R`: a result; `E`: an error."""
    offset: int
    line: int
    custom_id: str
    """Empty if there is none."""
    tally: Tally
    body: str
    """One line of JSON."""

    def encoded(self) -> bytes:
        """Return the record as a line."""
        sums = json.dumps(self.tally.as_dict(), separators=(",", ":"))
        fields = (self.kind, str(self.offset), str(self.line), self.custom_id, sums, self.body)
        return "\t".join(fields).encode() + b"\n"

    @classmethod
    def decoded(cls, line: bytes) -> Record:
        """Read a record."""
        return Encoded.of(line).record()


@dataclass(frozen=True, slots=True)
class Encoded:
    """A stored record with its fields parsed and its body left as bytes, because answers are large."""

    kind: str
    offset: int
    line: int
    custom_id: str
    sums: bytes
    body: bytes

    @classmethod
    def of(cls, line: bytes) -> Encoded:
        """Read the fields of a record's line, with or without its line end."""
        kind, offset, number, custom_id, sums, body = line.split(b"\t", 5)
        return cls(
            kind.decode(), int(offset), int(number), custom_id.decode(), sums,
            body.removesuffix(b"\n"),
        )  # fmt: skip

    def counts(self) -> dict[str, int]:
        """Return the counts by name."""
        counts: dict[str, int] = json.loads(self.sums)
        return counts

    @property
    def tally(self) -> Tally:
        """The counts of the record."""
        return Tally(**self.counts())

    def record(self) -> Record:
        """Return the record with its body as text."""
        return Record(
            self.kind, self.offset, self.line, self.custom_id, self.tally, self.body.decode()
        )


def result_line(custom_id: str, job: Job, message: str | None) -> str:
    """Return an ended job as a line of results in Anthropic's format; `message` is Claude's answer as received."""
    name = json.dumps(custom_id)
    if job.state is State.SUCCEEDED:
        # Line ends in JSON text occur only between tokens.
        answer = (message or "null").replace("\r", " ").replace("\n", " ")
        return f'{{"custom_id":{name},"result":{{"type":"succeeded","message":{answer}}}}}'
    if job.state is State.ERRORED:
        error = job.error or JobError("api_error", "no reason was recorded")
        request_id = job.attempts[-1].request_id if job.attempts else None
        return errored_line(custom_id, error, request_id)
    return f'{{"custom_id":{name},"result":{{"type":"{job.state.value}"}}}}'


def errored_line(custom_id: str, error: JobError, request_id: str | None = None) -> str:
    """Return the result of a row that failed."""
    kind = error.type if error.type in _ANTHROPIC_TYPES else "api_error"
    body = {
        "custom_id": custom_id,
        "result": {
            "type": "errored",
            "error": {
                "type": "error",
                "error": {"type": kind, "message": error.message},
                "request_id": request_id,
            },
        },
    }
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))


def error_line(
    offset: int, message: str, custom_id: str | None = None, result: str | None = None
) -> str:
    """Return a line of errors.jsonl without the line number, which is known only after joining."""
    body: dict[str, Any] = {"offset": offset}
    if custom_id is not None:
        body["custom_id"] = custom_id
    body["error"] = {"type": "invalid_request_error", "message": message}
    if result is not None:
        body["result"] = json.loads(result)["result"]
    return json.dumps(body, ensure_ascii=False, separators=(",", ":"))


def numbered(error: str, line: int) -> str:
    """Return a line of errors.jsonl with its line number, counted from 1."""
    return f'{{"line":{line},{error[1:]}'


def bad_row_records(line: Line, bad: BadRow) -> list[Record]:
    """Return the records of a bad row."""
    error = error_line(line.offset, bad.message, bad.custom_id)
    if bad.custom_id is None:
        return [Record("E", line.offset, line.number, "", Tally(invalid=1), error)]
    result = errored_line(bad.custom_id, JobError("invalid_request_error", bad.message))
    return [
        Record("R", line.offset, line.number, bad.custom_id, Tally(errored=1), result),
        Record("E", line.offset, line.number, bad.custom_id, Tally(), error),
    ]


def job_record(line: int, offset: int, job: Job, message: str | None, other_lane: int) -> Record:
    """Return the record of an ended job."""
    custom_id = job.custom_id or ""
    usage = job.usage.as_dict() if job.usage else {}
    tally = Tally(
        calls=len(job.attempts),
        cost_micro_usd=job.cost_micro_usd,
        other_lane_micro_usd=other_lane,
        **{job.state.value: 1},
        **{name: usage[name] for name in usage if name != "web_search_requests"},
    )
    return Record("R", offset, line, custom_id, tally, result_line(custom_id, job, message))
