"""A batch: a stored JSONL object whose rows are jobs. It is planned by arithmetic; its results are joined by counting.

An object is divided into *ranges* of bytes without being read; one invocation runs a range, under a lease like a job's.
A hundred consecutive ranges are a *section*: the unit in which progress is counted and results are joined. Times are
epoch milliseconds. Nothing is written here; stores write records under an optimistic lock on `version`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from hashlib import sha256
from typing import Final, Literal

from sluice.domain.errors import LeaseLost, RangeBusy

LINES_PER_RANGE: Final = 100
"""Approximate size of a range, which is run by one invocation and has one message."""

LINES_ON_BATCH_LANE: Final = 400
"""The same on the batch lane, if the batch has a hundred ranges even so. Rows have their answers there before a worker
has the range, so that a range costs more than its rows. It is one window of a worker."""

RANGES_PER_SECTION: Final = 100
"""About 10,000 rows: their results exceed the 5 MiB that S3 requires of a part, and 1,000 such parts are 10 million
rows."""

SECTIONS: Final = "sections"
"""The group of all sections of a batch: a member is done when it is joined."""

MOST_RANGE_BYTES: Final = 8 * 1024 * 1024
"""Limit for objects with fewer than `MOST_RANGES` ranges. Memory does not depend on it: a range runs by windows."""

MOST_RANGES: Final = 200_000
"""Maximum for one object; in larger objects the ranges are longer."""

SMALL_RANGES: Final = 3
"""Busy workers run the ranges of a batch with at most this many beside their own, so that it starts within seconds."""

MOST_LINE_BYTES: Final = 8 * 1024 * 1024
"""A longer line is a bad row. Several such lines must fit into memory."""

MOST_ROWS: Final = 100_000_000
"""Maximum for one object, as the planner estimates it: their custom_ids are compared at the end."""

SAMPLE_BYTES: Final = 64 * 1024
SAMPLES: Final = 8
"""The planner reads this many samples of SAMPLE_BYTES each to estimate the length of the lines."""

BOM: Final = b"\xef\xbb\xbf"

MOST_KEY_BYTES: Final = 1_024
"""S3's limit for the key of an object."""

RESULTS: Final = "results.jsonl"
ERRORS: Final = "errors.jsonl"
SUMMARY: Final = "summary.json"
DOCUMENTS: Final = "documents.jsonl"
"""Of a folder of documents: which document has which `custom_id`."""
OUTPUTS: Final = (DOCUMENTS, RESULTS, ERRORS, SUMMARY)
"""The names of a batch's output objects, in the order in which they are written."""

MOST_UNSUPPORTED: Final = 20
"""Documents of unsupported types that a batch's record and summary name; errors.jsonl names all."""

LOSSES_UNTIL_ALONE: Final = 3
"""Each lost worker reduces how many rows of the window run at once; after this many it is one row."""

MOST_LOST_ALONE: Final = 3
"""A row that loses this many workers while no other row of its range is in flight ends `errored`."""

MOST_LOST_READING: Final = 3
"""A line at which this many workers die while they read it is a bad row, and is not read again."""

CLAIM_VERSIONS: Final = 100_000
"""Maximum versions of a row's job under one claim of its range; keeps the ids of calls unique."""


class Source(StrEnum):
    """How a batch was submitted. All run in the same way."""

    FILE = "file"
    """An object under `in/`, copied there or uploaded through the API."""
    MESSAGES_BATCHES = "messages_batches"
    """`POST /v1/messages/batches`."""
    JOBS = "jobs"
    """`POST /jobs` with more than 100 jobs."""


class Phase(StrEnum):
    """The state of a batch."""

    PLANNING = "planning"
    RUNNING = "running"
    ENDED = "ended"


AskedLane = Literal["live", "batch", "auto"]
"""What a request may ask for: one of the lanes, or the cheapest lane that meets the deadline."""

OnUnmeetable = Literal["run", "refuse"]
"""What to do with a batch whose deadline no lane can meet."""


@dataclass(frozen=True, slots=True)
class Options:
    """Settings for all rows of a batch; a row can override them."""

    model: str | None = None
    max_tokens: int | None = None
    deadline: int | None = None
    fallback_models: tuple[str, ...] = ()
    anthropic_version: str | None = None
    anthropic_beta: str | None = None
    prompt: str | None = None
    """The template for rows made from CSV lines and documents."""
    system: str | None = None
    run: str | None = None
    """Run label. Re-running an identical file requires a new label."""
    webhook: str | None = None
    """URL to notify on completion."""
    lane: AskedLane | None = None
    """None: not asked, so that the default of the deployment applies."""
    on_unmeetable: OnUnmeetable | None = None
    """None: not asked, which means `run`."""


_ADDED_LATER: Final = ("lane", "on_unmeetable")
"""Options that releases with other file ids did not have."""


@dataclass(frozen=True, slots=True)
class LaneDecision:
    """Which lane a batch was given, and why."""

    lane: Literal["live", "batch"]
    reason: str
    at: int
    most_requests: int = 0
    """On the batch lane: the size of its upstream batches, so that each can be rescued alone."""
    rescue_at: int | None = None
    """When the first rescue was to be, as planned then."""
    is_assured: bool = True
    """The live lane had room to rescue all its rows."""
    is_meetable: bool = True
    """False: no lane could be relied on to meet the deadline."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Sums over rows. Addition is exact, in any order."""

    lines: int = 0
    """Physical lines, including blank and bad ones."""
    succeeded: int = 0
    errored: int = 0
    canceled: int = 0
    expired: int = 0
    invalid: int = 0
    """Lines that could not become a job."""
    calls: int = 0
    input_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens: int = 0
    cost_micro_usd: int = 0
    other_lane_micro_usd: int = 0
    """What the same tokens cost on the batch lane. The stored name of the field."""
    saved_micro_usd: int = 0
    """What the rows that ran on the batch lane would have cost more on the live lane."""
    unknown_costs: int = 0
    """Calls that were billed, but whose cost is unknown and not in `cost_micro_usd`."""
    uncertain_calls: int = 0
    """Calls that may have been billed: nobody saw how they ended."""

    @classmethod
    def of(cls, counts: Mapping[str, int]) -> Tally:
        """Return the sums by name; names that a newer release may have written are ignored."""
        return cls(**{each.name: counts[each.name] for each in fields(cls) if each.name in counts})

    @property
    def rows(self) -> int:
        """Rows that have a result."""
        return self.succeeded + self.errored + self.canceled + self.expired

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            *(getattr(self, each.name) + getattr(other, each.name) for each in fields(Tally))
        )

    def as_dict(self) -> dict[str, int]:
        """Return the sums by name, without zeros."""
        return {each.name: n for each in fields(Tally) if (n := getattr(self, each.name))}


@dataclass(frozen=True, slots=True)
class Plan:
    """How an object is divided: ranges of equal length. A line belongs to the range in which it starts."""

    first: int
    """The offset of the first row: after a byte order mark."""
    size: int
    range_bytes: int
    ranges: int
    line_bytes: int
    """The estimated length of a line."""

    @property
    def sections(self) -> int:
        """The number of sections."""
        return -(-self.ranges // RANGES_PER_SECTION)

    @property
    def is_small(self) -> bool:
        """Whether busy workers may run its ranges beside their own."""
        return 0 < self.ranges <= SMALL_RANGES

    @property
    def estimated_rows(self) -> int:
        """The estimated number of lines in the object."""
        return max(1, round((self.size - self.first) / self.line_bytes))

    def range_at(self, offset: int) -> int:
        """Return the number of the range in which a byte is."""
        return (offset - self.first) // self.range_bytes

    def bounds(self, number: int) -> tuple[int, int]:
        """Return the offset of the first byte of a range, and of the byte after its last."""
        start = self.first + number * self.range_bytes
        return start, min(self.size, start + self.range_bytes)

    def section_of(self, number: int) -> int:
        """Return the section that a range belongs to."""
        return number // RANGES_PER_SECTION

    def members(self, section: int) -> range:
        """Return the numbers of a section's ranges."""
        first = section * RANGES_PER_SECTION
        return range(first, min(self.ranges, first + RANGES_PER_SECTION))


@dataclass(frozen=True, slots=True)
class Batch:
    """A named set of jobs submitted together, with the locations of its object and its results."""

    batch_id: str
    tenant: str
    name: str
    """The file name without its suffix; the batch id if there was no file."""
    source: Source
    created_at: int
    expires_at: int
    """No row starts after this time; the remaining rows end `expired`."""
    input_key: str
    """The object with the rows: the submitted file, or its copy under the id of the batch."""
    input_etag: str
    given_key: str | None = None
    """The submitted file, once `input_key` is a copy of it or has the rows made from it."""
    options: Options = field(default_factory=Options)
    rows: int | None = None
    """The number of rows, if known at submission."""
    version: int = 1
    phase: Phase = Phase.PLANNING
    plan: Plan | None = None
    due_at: int | None = None
    """When the sweep must check the batch."""
    sent_at: int = 0
    """When messages of its ranges were last sent; 0 in records of older releases."""
    cancel_initiated_at: int | None = None
    ended_at: int | None = None
    tally: Tally = field(default_factory=Tally)
    """The final sums, once the batch has ended."""
    duplicates: int = 0
    """Rows whose `custom_id` was already used by another row; their answers are in errors.jsonl."""
    problem: str | None = None
    """Why the whole object could not be run."""
    results_bytes: int = 0
    told: bool = False
    """The notification of completion was sent. The stored name of the field."""
    deleted: bool = False
    unsupported: tuple[str, ...] = ()
    """The first documents of its folder that were not sent because of their type."""
    by_id: bool = False
    """Its results are stored under its id. Older releases stored them under its name only."""
    lane: AskedLane = "live"
    """The lane in force: the one asked for, otherwise the default of the deployment when the batch was created."""
    decision: LaneDecision | None = None
    """The lane that its planner chose, unless `lane` is `live`."""
    upstream: tuple[tuple[str, int, int], ...] = ()
    """The upstream batches it is in: their ids, each with its first range and the number after the last one."""

    @property
    def is_on_batch_lane(self) -> bool:
        """Whether its ranges become upstream batches."""
        return self.decision is not None and self.decision.lane == "batch"

    @property
    def collected(self) -> int:
        """How many of its ranges, from the first, are in upstream batches."""
        return self.upstream[-1][2] if self.upstream else 0

    @property
    def rank(self) -> str:
        """Sorts batches by acceptance: of two batches of one name, the later one has the greater rank."""
        return f"{self.created_at:015d}#{self.batch_id}"

    @property
    def named_folder(self) -> str:
        """Where the results of the latest batch of this name are copied to."""
        return f"out/{self.tenant}/{self.name}/"

    @property
    def has_copy(self) -> bool:
        """Whether its results are copied there: those of files, unless the names of the copies are too long for S3."""
        longest = f"{self.named_folder}{RESULTS}"
        return self.source is Source.FILE and len(longest.encode()) <= MOST_KEY_BYTES

    @property
    def folder(self) -> str:
        """Where the results are."""
        is_older = self.phase is Phase.ENDED and not self.by_id
        return self.named_folder if is_older else f"batches/{self.batch_id}/"

    @property
    def results_key(self) -> str:
        """The object with the results, once the batch has ended."""
        return f"{self.folder}{RESULTS}"

    @property
    def errors_key(self) -> str:
        """The object with the bad rows."""
        return f"{self.folder}{ERRORS}"

    @property
    def summary_key(self) -> str:
        """The object with counts, cost and duration."""
        return f"{self.folder}{SUMMARY}"

    @property
    def documents_key(self) -> str:
        """The object that leads from the `custom_id` of a document to its name."""
        return f"{self.folder}{DOCUMENTS}"

    @property
    def is_folder(self) -> bool:
        """Whether its rows are the documents of a folder."""
        return (self.given_key or self.input_key).endswith("/options.json")

    @property
    def has_offsets(self) -> bool:
        """Whether a byte offset in its rows is one in the submitted file, or in what a gzip file unpacks to."""
        file = (self.given_key or self.input_key).lower().removesuffix(".gz")
        return not self.is_folder and not file.endswith(".csv")

    @property
    def rows_key(self) -> str:
        """The object with the rows of a file: its copy, or what was made from it if it is not plain JSONL."""
        return f"batches/{self.batch_id}/rows.jsonl"

    @property
    def packed_key(self) -> str:
        """The object with small results, gzipped for the API."""
        return f"batches/{self.batch_id}/results.jsonl.gz"

    @property
    def rows_expected(self) -> int:
        """The number of rows: exact at the end, estimated before."""
        if self.phase is Phase.ENDED:
            return self.tally.rows
        if self.rows is not None:
            return self.rows
        return self.plan.estimated_rows if self.plan else 0

    def part_key(self, number: int) -> str:
        """The object with all results of a range."""
        return f"batches/{self.batch_id}/parts/{number:08d}"

    def chunk_key(self, number: int, chunk: str) -> str:
        """The object with one chunk of a range that still runs."""
        return f"batches/{self.batch_id}/chunks/{number:08d}/{chunk}"

    def section_key(self, section: int, kind: str) -> str:
        """The object with the joined results, errors or index of a section."""
        return f"batches/{self.batch_id}/sections/{section:06d}.{kind}"


DAY_MS: Final = 86_400_000

LONGEST_MS: Final = 13 * DAY_MS
"""A batch may wait for so long, but no longer than its messages are kept."""

JOIN_MS: Final = 2 * 60 * 60_000
"""Time after the last row may start, in which the batch ends."""


def longest_wait_ms(retention_days: int) -> int:
    """Return how long the rows of a batch may wait: its objects are needed until it ends."""
    return min(LONGEST_MS, retention_days * DAY_MS - JOIN_MS)


NOTIFY_MS: Final = 2 * 60_000
"""If the notification of completion was not confirmed after this time, it is sent again."""

WATCH_MS: Final = 20 * 60_000
"""The sweep checks a batch at this interval, until it has ended."""

assert NOTIFY_MS < WATCH_MS, "a missing notification is noticed before a lost message"

LATE_MS: Final = 90_000
"""A message of a range that is overdue for so long is lost if no message waits in the queue: a worker that meets a busy
store hides it for less."""

QUIET_MS: Final = 6 * 60 * 60_000
"""While messages wait in the queue, a range's message is assumed to be among them for this time."""

FEW_LATE: Final = 20
"""So few ranges of a batch are sent again even then: an extra message costs a receive, and a lost one the batch."""

assert LATE_MS < NOTIFY_MS < WATCH_MS < QUIET_MS

PLANNING_MS: Final = 60 * 60_000
"""A file that could not be planned so long after its rows expired ends without results."""

assert PLANNING_MS < JOIN_MS


def file_batch_id(tenant: str, key: str, etag: str, options: Options, problem: str | None) -> str:
    """Return an id that is the same for a repeated event and for the same file uploaded again with the same options.

    `problem`: why the options of the file cannot be used.
    """
    # An option that was added later counts only if it is set, so that a file uploaded again after an upgrade is known.
    counted = {
        name: value
        for name, value in asdict(options).items()
        if name not in _ADDED_LATER or value is not None
    }
    said = json.dumps([counted, problem], sort_keys=True)
    return _batch_id("file", tenant, key, etag, said)


def older_file_batch_id(tenant: str, key: str, etag: str, run: str | None) -> str:
    """Return the id that older releases gave to a file, whatever its options."""
    return _batch_id("file", tenant, key, etag, run or "")


RESERVED: Final = ".uploads/"


def upload_prefix(tenant: str, token: str) -> str:
    """Return where the objects of one upload through the API are: two uploads of one name never meet."""
    return f"in/{tenant}/{RESERVED}{token}/"


_OF_AN_UPLOAD: Final = re.compile(r"in/[^/]+/\.uploads/[0-9a-f]+/")


def prefix_of_upload(key: str) -> str | None:
    """Return the prefix of the objects of an upload through the API; None for any other object."""
    match = _OF_AN_UPLOAD.match(key)
    return None if match is None else match[0]


def named_batch_id(tenant: str, name: str) -> str:
    """Return the id of the batch created with an Idempotency-Key."""
    return _batch_id("key", tenant, name)


def random_batch_id(random_bytes: bytes) -> str:
    """Return a new batch id from 16 random bytes."""
    return f"msgbatch_{random_bytes.hex()[:32]}"


def row_job_id(batch_id: str, offset: int) -> str:
    """Return the job id of the row at a byte offset."""
    digest = sha256(f"{batch_id}\x00{offset}".encode()).hexdigest()
    return f"job_{digest[:32]}"


def _batch_id(*parts: str) -> str:
    return f"msgbatch_{sha256(chr(0).join(parts).encode()).hexdigest()[:32]}"


def sample_places(size: int) -> list[int]:
    """Return the offsets of the planner's samples: at the start, at the end, and evenly spaced between them."""
    last = max(0, size - SAMPLE_BYTES)
    count = max(1, min(SAMPLES, -(-size // SAMPLE_BYTES)))
    return [last * place // max(1, count - 1) for place in range(count)]


def planned(size: int, sample: bytes, *more: bytes, lane: AskedLane = "live") -> Plan:
    """Divide an object of `size` bytes that begins with `sample` into ranges of about a hundred lines.

    On the batch lane they have up to `LINES_ON_BATCH_LANE`, if there are many.

    `more`: samples from other offsets. The estimate is bytes per line over all samples, so that a few very long lines
    in one sample do not dominate; a sample without a line end counts with all its bytes. It is only an estimate: the
    worker limits what it holds of a range in memory.
    """
    first = len(BOM) if sample.startswith(BOM) else 0
    lines = covered = 0
    for each in (sample[first:], *more):
        lines += each.count(b"\n")
        # After the last line end the sample has an incomplete line.
        covered += each.rfind(b"\n") + 1 or len(each)
    line_bytes = max(1, covered // max(1, lines))
    length = max(0, size - first)
    per_range = LINES_PER_RANGE
    if lane == "batch":
        many = length // line_bytes // RANGES_PER_SECTION
        per_range = max(per_range, min(many, LINES_ON_BATCH_LANE))
    wanted = min(line_bytes * per_range, MOST_RANGE_BYTES)
    range_bytes = max(wanted, -(-length // MOST_RANGES), 1)
    whole, rest = divmod(length, range_bytes)
    if whole and 2 * rest < range_bytes:
        # The last few lines are no range of their own: it would start when the others end.
        range_bytes = max(range_bytes, min(-(-length // whole), MOST_RANGE_BYTES))
    return Plan(first, size, range_bytes, -(-length // range_bytes), line_bytes)


def usual_rows(size: int, samples: Sequence[bytes]) -> int:
    """Estimate the rows of an object by the sample whose lines have the median length.

    A stretch of blank lines, of which one sample may consist, must not make a file look as if it had too many rows.
    """
    lengths = sorted(
        max(1, (each.rfind(b"\n") + 1 or len(each)) // max(1, each.count(b"\n")))
        for each in samples
    )
    return size // lengths[len(lengths) // 2]


# Transitions ---------------------------------------------------------------------------------------------------


def plan_batch(
    batch: Batch, plan: Plan, rows_etag: str | None = None, unsupported: Sequence[str] = ()
) -> Batch:
    """Set the ranges. From then on their messages may be sent, and sent again until all are accepted.

    `rows_etag`: the ranges are those of `rows_key`, not of the submitted file.
    """
    if rows_etag is None:
        return _changed(batch, plan=plan)
    return _changed(
        batch,
        plan=plan,
        given_key=batch.input_key,
        input_key=batch.rows_key,
        input_etag=rows_etag,
        unsupported=tuple(unsupported),
    )


def start_batch(batch: Batch, now: int) -> Batch:
    """Record that all ranges were sent. Fast ranges may already have ended the batch, which then stays as it is."""
    if batch.phase is not Phase.PLANNING:
        return batch
    return _changed(batch, phase=Phase.RUNNING, due_at=now + WATCH_MS, sent_at=now)


def mark_sent(batch: Batch, now: int) -> Batch:
    """Record that messages of its ranges were sent again. A batch that has ended stays as it is."""
    return batch if batch.phase is Phase.ENDED else _changed(batch, sent_at=now)


def decide_lane(batch: Batch, decision: LaneDecision) -> Batch:
    """Record the lane, once: a repeated planner follows the first."""
    is_decided = batch.decision is not None or batch.phase is Phase.ENDED
    return batch if is_decided else _changed(batch, decision=decision)


def refused_lane(batch: Batch) -> str | None:
    """Return why a batch does not run that is to be refused if no lane can meet its deadline; None if it runs."""
    if batch.decision is None or batch.decision.is_meetable:
        return None
    is_refused = batch.options.on_unmeetable == "refuse"
    return f"on_unmeetable is refuse: {batch.decision.reason}" if is_refused else None


def in_upstream(batch: Batch, mark: tuple[str, int, int]) -> Batch:
    """Record that its next ranges are in an upstream batch; if others are next, the batch stays as it is."""
    is_next = mark[1] == batch.collected and batch.phase is not Phase.ENDED
    return _changed(batch, upstream=(*batch.upstream, mark)) if is_next else batch


def not_in_upstream(batch: Batch, upstream_id: str) -> Batch:
    """Record that its last ranges are not in the upstream batch that was to have them."""
    if not batch.upstream or batch.upstream[-1][0] != upstream_id:
        return batch
    return _changed(batch, upstream=batch.upstream[:-1])


def is_over(batch: Batch, now: int) -> bool:
    """Return whether no row of a batch may start: it was canceled, or has expired."""
    return batch.cancel_initiated_at is not None or now >= batch.expires_at


def cancel_batch(batch: Batch, now: int) -> Batch:
    """Cancel: waiting rows end, calls in flight are stopped. A batch that has ended stays as it is.

    The batch is checked soon, which wakes its parked ranges.
    """
    if batch.phase is Phase.ENDED or batch.cancel_initiated_at is not None:
        return batch
    return _changed(batch, cancel_initiated_at=now, due_at=now + NOTIFY_MS)


def end_batch(batch: Batch, now: int, tally: Tally, duplicates: int, results_bytes: int) -> Batch:
    """End the batch: its results are joined."""
    return _changed(
        batch,
        phase=Phase.ENDED,
        due_at=now + NOTIFY_MS,
        ended_at=now,
        by_id=True,
        tally=tally,
        duplicates=duplicates,
        results_bytes=results_bytes,
    )


def fail_batch(batch: Batch, now: int, problem: str) -> Batch:
    """End a batch whose object cannot be run as a whole."""
    ended = end_batch(batch, now, Tally(invalid=1), 0, 0)
    return replace(ended, problem=problem)


def moved_by_id(batch: Batch) -> Batch:
    """Record that the results of a batch of an older release were copied to its own place."""
    return batch if batch.by_id else _changed(batch, by_id=True)


def mark_notified(batch: Batch) -> Batch:
    """Record that the notification of completion was sent."""
    return _changed(batch, told=True, due_at=None)


def delete_batch(batch: Batch) -> Batch:
    """Mark an ended batch as deleted; its objects are deleted before."""
    return batch if batch.deleted else _changed(batch, deleted=True)


def _changed(batch: Batch, **changes: object) -> Batch:
    return replace(batch, version=batch.version + 1, **changes)  # type: ignore[arg-type]


# Ranges --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RangeState:
    """The state of one range: its lease, and where its chunks are saved."""

    batch_id: str
    number: int
    tenant: str
    version: int = 0
    """0: not stored yet; the record of a range is created when it is first claimed."""
    owner: str | None = None
    lease_until: int = 0
    claims: int = 0
    losses: int = 0
    """Steps of the search for a row that kills its workers: workers lost in this window, up to `LOSSES_UNTIL_ALONE`.
    Reset to 0 when no suspect is left."""
    chunks: tuple[str, ...] = ()
    windows: int = 0
    """This many of the chunks, from the first, hold one whole window each: all its rows in order, with the bad rows
    between them."""
    resume_at: int = 0
    """The byte offset at which the ended windows end; 0 if there is none."""
    resume_line: int = 0
    """The number of lines in the ended windows."""
    done: bool = False
    not_before: int | None = None
    """The range is parked until then; the sweep sends it."""
    model: str | None = None
    """The model of the row that is due first, while the range is parked."""
    running: tuple[int, ...] = ()
    """The byte offsets of the rows whose calls may be in flight, or have ended without being saved."""
    called: tuple[int, ...] = ()
    """The other rows with calls under this claim that may have been billed, and are in no chunk yet: they wait."""
    lost: tuple[tuple[int, int, int], ...] = ()
    """Each row that was running when a worker was lost, until it is saved: its byte offset, the number of that worker's
    claim, and the end of its lease. Calls under that claim may have been billed."""
    unsaved: tuple[tuple[int, int, int], ...] = ()
    """The same of each row that waited: its calls under that claim had ended, so that all of them are in the ledger."""
    suspects: tuple[int, ...] = ()
    """The rows that were in flight when the last worker was lost and have not ended. Empty although `losses` is not 0:
    any row of the window may be the killer."""
    blamed: tuple[int, ...] = ()
    """One entry per worker that was lost while it ran only this row."""
    is_stuck: bool = False
    """A worker was lost while no row was in flight: those after it note each line before they read it."""
    reading: int | None = None
    """The byte offset of the line that is being read, while the range is stuck."""
    unread: tuple[int, ...] = ()
    """One entry per worker that was lost while it read this line."""
    expected_at: int = 0
    """While no worker has the range: when its message is visible again. 0: it was not released since it was sent."""
    dropped: bool = False
    """The bucket refused answers to the end of an invocation: nothing is called before it takes writes again."""


NO_WORKER: Final = "upstream:"
"""What the owner begins with that gives a range the results of an upstream batch. It runs no row, so if it dies, no row
and no line is to blame."""


def claim_range(state: RangeState, owner: str, now: int, lease_until: int) -> RangeState:
    """Take the lease; raises RangeBusy while another worker holds it. An expired lease means that its worker died."""
    if is_held(state, now):
        raise RangeBusy(state.batch_id, state.number, state.lease_until)
    is_loss = state.owner is not None and not state.owner.startswith(NO_WORKER)
    known = _after_loss(state) if is_loss else state
    return _moved(
        known,
        owner=owner,
        lease_until=lease_until,
        claims=state.claims + 1,
        running=(),
        called=(),
        lost=_with_running(state),
        unsaved=_with_called(state),
        reading=None,
        not_before=None,
        model=None,
    )


def _with_running(state: RangeState) -> tuple[tuple[int, int, int], ...]:
    """Return the lost rows with those that are running: their answers will not be saved."""
    return (*state.lost, *((row, state.claims, state.lease_until) for row in state.running))


def _with_called(state: RangeState) -> tuple[tuple[int, int, int], ...]:
    """Return the unsaved rows with those that wait: their records will not be saved."""
    return (*state.unsaved, *((row, state.claims, state.lease_until) for row in state.called))


def claim_of(call_id: str) -> int:
    """Return the number of the claim under which a row was called."""
    version = call_id.rpartition("#")[2]
    return int(version) // CLAIM_VERSIONS if version.isdecimal() else 0


def _after_loss(state: RangeState) -> RangeState:
    """Reduce the suspects to the rows that were in flight when the worker died, or blame the line that it read."""
    if state.reading is not None:
        return replace(state, unread=(*state.unread, state.reading))
    if len(state.running) == 1:
        (alone,) = state.running
        if alone in state.blamed or state.losses >= LOSSES_UNTIL_ALONE:
            return replace(_without(state, state.running), blamed=(*state.blamed, alone))
    if state.losses and not state.running:
        # No row was in flight, so none killed the worker; perhaps a line that was read.
        return replace(state, is_stuck=True)
    # The first loss says little: most workers die of something else, and their rows need not run apart.
    suspects = state.running if state.losses else ()
    return replace(state, losses=min(state.losses + 1, LOSSES_UNTIL_ALONE), suspects=suspects)


def _without(state: RangeState, rows: Collection[int]) -> RangeState:
    """Remove rows from the suspects; the search ends when none is left."""
    left = tuple(row for row in state.suspects if row not in rows)
    is_over = bool(state.suspects) and not left
    return replace(state, suspects=left, losses=0 if is_over else state.losses)


def killers(state: RangeState) -> frozenset[int]:
    """Return the rows that have lost too many workers alone, and are not tried again."""
    blamed = state.blamed
    return frozenset(row for row in blamed if blamed.count(row) >= MOST_LOST_ALONE)


def unreadable(state: RangeState) -> frozenset[int]:
    """Return the lines that have lost too many workers when they were read."""
    unread = state.unread
    return frozenset(line for line in unread if unread.count(line) >= MOST_LOST_READING)


def note_reading(state: RangeState, owner: str, line: int | None) -> RangeState:
    """Record which line is read next; None: the window is read."""
    _owned(state, owner)
    return state if line == state.reading else _moved(state, reading=line)


def note_running(
    state: RangeState, owner: str, rows: Sequence[int], called: Sequence[int] = ()
) -> RangeState:
    """Record the rows in flight, before their requests are made, and those that wait with unsaved calls."""
    _owned(state, owner)
    noted = replace(state, running=tuple(rows), called=tuple(called))
    return state if noted == state else _moved(noted)


def keep_range(state: RangeState, owner: str, lease_until: int) -> RangeState:
    """Extend the owner's lease."""
    _owned(state, owner)
    return _moved(state, lease_until=lease_until)


def save_chunk(
    state: RangeState, owner: str, lease_until: int, chunk: str, rows: Collection[int]
) -> RangeState:
    """Record that another chunk is saved, with the ended rows at these byte offsets."""
    _owned(state, owner)
    return _moved(
        _without(state, rows),
        lease_until=lease_until,
        chunks=(*state.chunks, chunk),
        dropped=False,
        running=tuple(row for row in state.running if row not in rows),
        called=tuple(row for row in state.called if row not in rows),
        lost=tuple(each for each in state.lost if each[0] not in rows),
        unsaved=tuple(each for each in state.unsaved if each[0] not in rows),
        blamed=tuple(row for row in state.blamed if row not in rows),
    )


def end_window(  # noqa: PLR0913 - what the next window needs to know
    state: RangeState,
    owner: str,
    lease_until: int,
    window: str,
    *,
    others: Sequence[str],
    resume_at: int,
    resume_line: int,
) -> RangeState:
    """Record that a chunk holds another whole window; `others` hold rows of later windows."""
    _owned(state, owner)
    return _moved(
        state,
        lease_until=lease_until,
        chunks=(*state.chunks[: state.windows], window, *others),
        windows=state.windows + 1,
        resume_at=resume_at,
        resume_line=resume_line,
        losses=0,
        running=(),
        called=(),
        lost=(),
        unsaved=(),
        suspects=(),
        blamed=(),
        is_stuck=False,
        reading=None,
        unread=(),
    )


def release_range(  # noqa: PLR0913 - what the next worker and the sweep need to know
    state: RangeState,
    owner: str,
    *,
    chunks: Sequence[str],
    expected_at: int = 0,
    not_before: int | None = None,
    model: str | None = None,
    dropped: bool = False,
    called: Collection[int] = (),
) -> RangeState:
    """Release the lease of an unfinished range, of which `chunks` hold what has ended. Suspects are kept.

    `called`: the rows that wait with calls that are not saved.
    """
    _owned(state, owner)
    state = replace(
        state,
        running=tuple(row for row in state.running if row not in called),
        called=tuple(called),
    )
    return _moved(
        state,
        owner=None,
        lease_until=0,
        chunks=tuple(chunks),
        running=(),
        called=(),
        lost=_with_running(state) if dropped else state.lost,
        unsaved=_with_called(state),
        reading=None,
        expected_at=expected_at,
        not_before=not_before,
        model=model,
        dropped=dropped,
    )


def finish_range(state: RangeState, owner: str) -> RangeState:
    """Record that the part of the range is stored. Until its lease ends, the owner is about to report that."""
    _owned(state, owner)
    return _moved(
        state,
        owner=None,
        chunks=(),
        windows=0,
        done=True,
        losses=0,
        running=(),
        called=(),
        lost=(),
        unsaved=(),
        suspects=(),
        blamed=(),
        is_stuck=False,
        reading=None,
        unread=(),
    )


def is_held(state: RangeState, now: int) -> bool:
    """Return whether a worker has the lease."""
    return state.owner is not None and state.lease_until > now


def late_ms(batch: Batch, state: RangeState, now: int) -> int:
    """Return for how long the message of an unfinished range is overdue."""
    expected_at = max(batch.created_at, batch.sent_at, state.lease_until, state.expected_at)
    return max(0, now - expected_at)


def lost_ranges(batch: Batch, late: Mapping[int, int], *, is_queue_empty: bool) -> list[int]:
    """Return the ranges whose messages are probably lost, of those that are late by so many milliseconds.

    In a long queue a few are sent again at once, then after twice the time; many only after hours.
    """
    patience = LATE_MS
    if not is_queue_empty:
        few = sum(ms >= LATE_MS for ms in late.values()) <= FEW_LATE
        patience = max(LATE_MS if few else QUIET_MS, batch.sent_at - batch.created_at)
    return [number for number, ms in late.items() if ms >= patience]


def _owned(state: RangeState, owner: str) -> None:
    if state.owner != owner:
        raise LeaseLost(f"range {state.number} of {state.batch_id}")


def _moved(state: RangeState, **changes: object) -> RangeState:
    return replace(state, version=state.version + 1, **changes)  # type: ignore[arg-type]


# Joining -------------------------------------------------------------------------------------------------------

MOST_COPY_BYTES: Final = 4 * 1024**3
"""S3 copies up to 5 GiB as one part."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Which members of a group (ranges of a section, sections of a batch) are done, and their sums."""

    done: frozenset[int]
    tally: Tally
    running: Tally = field(default_factory=Tally)
    """Sums of the members that are not done, as last noted: for progress alone."""

    @property
    def members(self) -> int:
        """How many are done."""
        return len(self.done)


@dataclass(frozen=True, slots=True)
class Copied:
    """A part that S3 copies: these bytes of a section."""

    section: int
    first: int
    size: int


@dataclass(frozen=True, slots=True)
class Streamed:
    """A part that is read and written: these slices in order."""

    slices: tuple[Copied, ...]


def parts(sizes: Mapping[int, int], least: int) -> Iterator[Copied | Streamed]:
    """Divide sections of these sizes, in order, into parts of at least `least` bytes; the last one may be smaller.

    A streamed part is smaller than twice `least`, so memory is bounded and large sections are never read.
    """
    waiting: list[Copied] = []
    held = 0
    for section, size in sizes.items():
        first = 0
        if held:
            rest = size - (least - held)
            # Fill the part; S3 copies the rest of the section if that is large enough for a part of its own.
            first = least - held if rest >= least else size
            waiting.append(Copied(section, 0, first))
            held += first
        elif size < least:
            first = held = size
            waiting.append(Copied(section, 0, size))
        if held >= least:
            yield Streamed(tuple(waiting))
            waiting, held = [], 0
        if first < size:
            pieces = -(-(size - first) // MOST_COPY_BYTES)
            piece = -(-(size - first) // pieces)
            for start in range(first, size, piece):
                yield Copied(section, start, min(piece, size - start))
    if held:
        yield Streamed(tuple(waiting))
