"""From JSON Lines to accepted jobs: read, pack into lists, send a few lists at a time."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from scripts.cli.client import Json
from scripts.cli.errors import CommandFailed, GatewayRefused
from sluice.domain.finite_json import FINITE, NotFinite

MAX_JOBS_PER_LIST = 100
# Lambda accepts 6 MB per call; base64 or escaping in transit may add a third.
MAX_BYTES_PER_LIST = 4_000_000
LISTS_IN_FLIGHT = 4
# Any other error would reject the next list as well.
ABOUT_ONE_LIST = frozenset({400, 409, 413, 422})

_BODY_OPENS = b'{"jobs":['
_BODY_CLOSES = b"]}"
# Room for the fields beside `jobs` of a batch.
_BYTES_BESIDE_JOBS = 100
_SPAN = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


class Submits(Protocol):
    """What `send` needs of a gateway."""

    def submit(self, body: bytes, idempotency_key: str) -> list[Json]:
        """Create the jobs of a list, once per idempotency key."""


@dataclass(frozen=True, slots=True)
class Line:
    """A job as it will be sent, and its line number."""

    number: int
    body: bytes
    custom_id: str | None


@dataclass(frozen=True, slots=True)
class Accepted:
    """A job that the gateway accepted."""

    line: int
    job_id: str
    custom_id: str | None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A line that is not a job or was rejected, and why."""

    line: int
    error_type: str
    message: str


@dataclass(slots=True)
class Outcome:
    """The outcome of every line. `stopped` is set if sending ended before the last one."""

    accepted: list[Accepted] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    stopped: CommandFailed | None = None

    def sort(self) -> None:
        """Sort the lines into the order of the file."""
        self.accepted.sort(key=lambda job: job.line)
        self.rejected.sort(key=lambda line: line.line)


def read_jobs(lines: Iterable[bytes], defaults: Mapping[str, object]) -> Iterator[Line | Rejected]:
    """Yield each line as a job, or as rejected with the reason. Empty lines are skipped.

    `defaults` are fields for jobs that do not set their own; metadata is merged.
    """
    line_of: dict[str, int] = {}
    for number, raw in enumerate(lines, start=1):
        text = raw.strip().removeprefix(b"\xef\xbb\xbf")
        if not text:
            continue
        item = _read_job(number, text, defaults)
        if isinstance(item, Line) and item.custom_id is not None:
            first = line_of.setdefault(item.custom_id, number)
            if first != number:
                # The gateway checks one list at a time; only the client sees the whole file.
                reason = f'duplicate custom_id "{item.custom_id}"; first used in line {first}'
                item = Rejected(number, "invalid_request_error", reason)
        yield item


def _read_job(number: int, text: bytes, defaults: Mapping[str, object]) -> Line | Rejected:
    try:
        job = _decoded(text)
        body = _encoded(_completed(job, defaults))
    except ValueError as error:
        return Rejected(number, "invalid_request_error", str(error))
    except RecursionError:
        return Rejected(number, "invalid_request_error", "not usable JSON: nested too deeply")
    custom_id = job.get("custom_id")
    room = MAX_BYTES_PER_LIST - len(_BODY_OPENS) - len(_BODY_CLOSES)
    if len(body) > room:
        too_large = f"the job has {len(body):,} bytes; the maximum is {room:,}"
        return Rejected(number, "request_too_large", too_large)
    return Line(number, body, custom_id if isinstance(custom_id, str) else None)


def _decoded(text: bytes) -> dict[str, Any]:
    """Return the job in a line; raise ValueError with the reason."""
    try:
        job = FINITE.decode(text.decode())
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except NotFinite as error:
        raise ValueError(f"not valid JSON: {error} is not a number that a double holds") from None
    if not isinstance(job, dict):
        raise ValueError('not a JSON object; a line is {"params": {...}}')  # noqa: TRY004
    if not isinstance(job.get("params"), dict):
        hint = "wrap the request" if "messages" in job else "a line is"
        raise ValueError(f'no "params" object; {hint}: {{"params": {{...}}}}')  # noqa: TRY004
    return job


def _completed(job: Mapping[str, Any], defaults: Mapping[str, object]) -> dict[str, Any]:
    merged = {**defaults, **job}
    own, common = job.get("metadata"), defaults.get("metadata")
    if isinstance(own, dict) and isinstance(common, dict):
        merged["metadata"] = {**common, **own}
    return merged


def _encoded(job: Mapping[str, object]) -> bytes:
    try:
        return json.dumps(job, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        # Half a surrogate pair has no UTF-8 encoding, only its JSON escape.
        return json.dumps(job, separators=(",", ":")).encode()


def pack(lines: Iterable[Line]) -> Iterator[list[Line]]:
    """Yield lists of up to 100 jobs and 4 MB, in the order of the lines."""
    together: list[Line] = []
    size = empty = len(_BODY_OPENS) + len(_BODY_CLOSES)
    for line in lines:
        needs = len(line.body) + 1
        if together and (
            len(together) == MAX_JOBS_PER_LIST or size + needs > MAX_BYTES_PER_LIST + 1
        ):
            yield together
            together, size = [], empty
        together.append(line)
        size += needs
    if together:
        yield together


def within_one_request(
    items: Iterable[Line | Rejected],
) -> tuple[list[Line], list[Rejected]]:
    """Return the valid and the rejected lines of a batch; raise CommandFailed once they exceed a request.

    So that of a file of any size no more than one request is in memory.
    """
    good: list[Line] = []
    rejected: list[Rejected] = []
    size = 0
    for item in items:
        if isinstance(item, Rejected):
            rejected.append(item)
            continue
        named = _named(item)
        good.append(named)
        size += len(named.body) + 1
        if size > MAX_BYTES_PER_LIST - _BYTES_BESIDE_JOBS:
            raise CommandFailed(
                f"the jobs exceed {MAX_BYTES_PER_LIST:,} bytes, the maximum of a batch of `sluice submit`; "
                "use `sluice upload`, which takes files of any size and has the option --lane too"
            )
    return good, rejected


def body_of_batch(lines: Iterable[Line], asked: Mapping[str, object]) -> bytes:
    """Return the body that makes one batch of all lines; `asked` are the fields beside `jobs`."""
    return _BODY_OPENS + b",".join(line.body for line in lines) + b"]," + _encoded(asked)[1:]


def _named(line: Line) -> Line:
    """Return a job that is named by its line if it has no custom_id."""
    job = {} if line.custom_id is not None else json.loads(line.body)
    if line.custom_id is not None or job.get("custom_id") is not None:
        return line
    name = f"line-{line.number}"
    return Line(line.number, _encoded({**job, "custom_id": name}), name)


def send(
    gateway: Submits,
    items: Iterable[Line | Rejected],
    run_key: str,
    *,
    on_progress: Callable[[Outcome], None] = lambda _: None,
    in_flight_at_once: int = LISTS_IN_FLIGHT,
) -> Outcome:
    """Send every valid line and return the outcome of each.

    List n has the Idempotency-Key `<run key>.<n>`: resending the same lines with the same run
    key returns the existing jobs.
    """
    outcome = Outcome()
    # Only this thread uses both; the threads of the pool only send bodies.
    in_flight: dict[Future[list[Json]], list[Line]] = {}

    def settle(done: Iterable[Future[list[Json]]]) -> None:
        for future in done:
            _note_reply(future, in_flight.pop(future), outcome)
        on_progress(outcome)

    with ThreadPoolExecutor(in_flight_at_once) as pool:
        for number, lines in enumerate(pack(_good(items, outcome))):
            body = _BODY_OPENS + b",".join(line.body for line in lines) + _BODY_CLOSES
            in_flight[pool.submit(gateway.submit, body, f"{run_key}.{number}")] = lines
            if len(in_flight) == in_flight_at_once:
                settle(wait(in_flight, return_when=FIRST_COMPLETED).done)
            if outcome.stopped:
                break
        settle(wait(in_flight).done)
    outcome.sort()
    return outcome


def _good(items: Iterable[Line | Rejected], outcome: Outcome) -> Iterator[Line]:
    for item in items:
        if isinstance(item, Rejected):
            outcome.rejected.append(item)
        else:
            yield item


def _note_reply(future: Future[list[Json]], lines: list[Line], outcome: Outcome) -> None:
    try:
        entries = future.result()
    except GatewayRefused as refused:
        if not refused.data:
            if refused.status in ABOUT_ONE_LIST:
                outcome.rejected += [
                    Rejected(line.number, refused.error_type, refused.message) for line in lines
                ]
            else:
                outcome.stopped = outcome.stopped or refused
            return
        entries = refused.data
    except CommandFailed as failed:
        outcome.stopped = outcome.stopped or failed
        return
    for entry in entries:
        line = lines[entry["index"]]
        if entry["status"] == "accepted":
            outcome.accepted.append(Accepted(line.number, entry["job"]["id"], line.custom_id))
        else:
            error = entry["error"]
            outcome.rejected.append(Rejected(line.number, error["type"], error["message"]))


def deadline_at(text: str, now: datetime) -> str:
    """Return the deadline in RFC 3339, from a time or a duration such as `90m`, `2h`, `1d12h`."""
    span = _SPAN.fullmatch(text.strip())
    if span and any(span.groups()):
        days, hours, minutes, seconds = (int(part or 0) for part in span.groups())
        try:
            at = now + timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
        except OverflowError:
            raise CommandFailed(f'deadline "{text}" is too far in the future') from None
    else:
        try:
            at = datetime.fromisoformat(text.strip())
        except ValueError:
            raise CommandFailed(
                f'"{text}" is not a deadline; use a duration (90m, 2h, 1d) or a time '
                "(2026-12-24T18:00:00Z)"
            ) from None
        if at.tzinfo is None:
            raise CommandFailed(
                f'deadline "{text}" has no time zone; append Z or an offset (+01:00)'
            )
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
