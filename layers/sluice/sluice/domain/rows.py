"""Rows of a batch: from bytes to requests, and from ended jobs to lines of results.

A row is one line of a JSONL object in the format of Anthropic's batch items, `{"custom_id", "params"}`, or in the older
one with `method`, `url` and `body`. An invalid line is a value, not an exception: the other lines of its range run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sluice.domain.batches import MOST_LINE_BYTES, Tally
from sluice.domain.jobs import Job, JobError, State
from sluice.domain.pricing import BATCH_LANE, Spend, full_price, half_price

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
        return Tally.of(self.counts())

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


def numbered(error: str, line: int, *, with_offset: bool = True) -> str:
    """Return a line of errors.jsonl with its line number, counted from 1.

    `with_offset`: the byte offset is one in the file of the caller, who never sees the rows made from it.
    """
    facts = error[1:] if with_offset else error[error.index(",") + 1 :]
    return f'{{"line":{line},{facts}'


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


def job_record(line: int, offset: int, job: Job, message: str | None, lost: Spend) -> Record:
    """Return the record of an ended job. `lost`: calls whose answers were lost with their worker."""
    custom_id = job.custom_id or ""
    usage = job.usage.as_dict() if job.usage else {}
    on_batch_lane, saved = _of_lanes(job)
    tally = Tally(
        calls=len(job.attempts),
        cost_micro_usd=job.cost_micro_usd,
        other_lane_micro_usd=on_batch_lane,
        saved_micro_usd=saved,
        unknown_costs=job.unknown_costs,
        uncertain_calls=job.uncertain_calls,
        **{job.state.value: 1},
        **{name: usage[name] for name in usage if name != "web_search_requests"},
    )
    tally += Tally.of(lost.as_dict())
    return Record("R", offset, line, custom_id, tally, result_line(custom_id, job, message))


def _of_lanes(job: Job) -> tuple[int, int]:
    """Return what the tokens of the row's last call cost on the batch lane, and what it saved if it ran there."""
    if job.usage is None or not job.attempts:
        return 0, 0
    cost = job.attempts[-1].cost_micro_usd or 0
    if job.lane == BATCH_LANE:
        return cost, full_price(job.usage, cost) - cost
    return half_price(job.usage, cost), 0
