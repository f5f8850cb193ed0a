"""A batch: a stored JSONL object whose rows are jobs, planned by arithmetic and put together again by counting.

An object is cut into *ranges* of bytes without being read; a range is what one invocation runs, by a lease like a
job's. A hundred ranges in a row are a *section*: the unit in which progress is counted and results are joined.
Times are epoch milliseconds. Nothing here is written; stores write records on the condition of their `version`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from hashlib import sha256
from typing import Final

from sluice.domain.errors import LeaseLost, RangeBusy

LINES_PER_RANGE: Final = 100
"""About: what one invocation runs, and what one message stands for."""

RANGES_PER_SECTION: Final = 100
"""About 10,000 rows: their results are well above the 5 MiB that S3 asks of a part, and a thousand such parts are
10 million rows."""

MOST_RANGE_BYTES: Final = 8 * 1024 * 1024
"""Of objects with fewer than `MOST_RANGES` ranges. Memory does not depend on it: a range is run window by window."""

MOST_RANGES: Final = 200_000
"""Of one object: above, ranges get longer instead of more."""

MOST_LINE_BYTES: Final = 8 * 1024 * 1024
"""A longer line is a bad row. One such line must fit into memory a few times over."""

SAMPLE_BYTES: Final = 64 * 1024
SAMPLES: Final = 8
"""The planner reads so many pieces of so many bytes of an object to estimate the length of its lines."""

BOM: Final = b"\xef\xbb\xbf"

LOSSES_UNTIL_ALONE: Final = 3
"""Each worker that a window loses reduces how many of its rows run at once; after so many losses it is one row."""

MOST_LOST_ALONE: Final = 3
"""A row that loses so many workers while nothing else of its range is in flight ends `errored`."""

CLAIM_VERSIONS: Final = 100_000
"""Versions that a row's job may go through under one claim of its range; what makes a call's id unique."""


class Source(StrEnum):
    """How a batch came in. It makes no difference afterwards."""

    FILE = "file"
    """An object under `in/`, dropped there or uploaded through the API."""
    MESSAGES_BATCHES = "messages_batches"
    """`POST /v1/messages/batches`."""
    JOBS = "jobs"
    """`POST /jobs` with a long list."""


class Phase(StrEnum):
    """Where a batch is in its life."""

    PLANNING = "planning"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Options:
    """What holds for all rows of a batch that do not say otherwise themselves."""

    model: str | None = None
    max_tokens: int | None = None
    deadline: int | None = None
    fallback_models: tuple[str, ...] = ()
    anthropic_version: str | None = None
    anthropic_beta: str | None = None
    prompt: str | None = None
    """The template that makes rows of CSV lines and documents."""
    system: str | None = None
    run: str | None = None
    """A name for this run: the same file under another one runs again."""
    webhook: str | None = None
    """Who is to be told of the batch's end."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Sums over rows. Addition is exact and in any order."""

    lines: int = 0
    """Physical lines, blank and broken ones among them."""
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
    """What the same tokens cost on the lane that was not taken."""

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
    """How an object is cut: ranges of equal length, a line belonging to the range in which it starts."""

    first: int
    """Where the rows begin: behind a byte order mark."""
    size: int
    range_bytes: int
    ranges: int
    line_bytes: int
    """The estimated length of a line."""

    @property
    def sections(self) -> int:
        """How many sections there are."""
        return -(-self.ranges // RANGES_PER_SECTION)

    @property
    def estimated_rows(self) -> int:
        """About how many lines the object has."""
        return max(1, round((self.size - self.first) / self.line_bytes))

    def bounds(self, number: int) -> tuple[int, int]:
        """Return the first byte of a range, and the byte behind its last."""
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
    """A named set of jobs submitted together, and where its object and its results are."""

    batch_id: str
    tenant: str
    name: str
    """The file's name without its ending; the batch's id where there was no file."""
    source: Source
    created_at: int
    expires_at: int
    """No row starts any more after this time; the rest ends `expired`."""
    input_key: str
    """The file. Where it is no JSONL that can be cut, its rows take its place when it is planned."""
    input_etag: str
    given_key: str | None = None
    """The file as it came, once its rows took its place."""
    options: Options = field(default_factory=Options)
    rows: int | None = None
    """How many there are, where that was known from the start."""
    version: int = 1
    phase: Phase = Phase.PLANNING
    plan: Plan | None = None
    due_at: int | None = None
    """When somebody has to look whether it still goes on."""
    cancel_initiated_at: int | None = None
    ended_at: int | None = None
    tally: Tally = field(default_factory=Tally)
    """Final once the batch has ended."""
    duplicates: int = 0
    """Rows whose `custom_id` another row had already; their answers are in errors.jsonl."""
    problem: str | None = None
    """Why the object as a whole could not be run."""
    results_bytes: int = 0
    told: bool = False
    """Whoever listens has heard of the end."""
    deleted: bool = False

    @property
    def results_key(self) -> str:
        """Where the results are, once the batch has ended."""
        return f"out/{self.tenant}/{self.name}/results.jsonl"

    @property
    def errors_key(self) -> str:
        """Where the lines are that could not become jobs."""
        return f"out/{self.tenant}/{self.name}/errors.jsonl"

    @property
    def summary_key(self) -> str:
        """Where counts, cost and time stand."""
        return f"out/{self.tenant}/{self.name}/summary.json"

    @property
    def rows_key(self) -> str:
        """Where the rows of a file go that cannot be cut as it is."""
        return f"batches/{self.batch_id}/rows.jsonl"

    @property
    def packed_key(self) -> str:
        """Where small results stand gzipped, for the API."""
        return f"batches/{self.batch_id}/results.jsonl.gz"

    @property
    def rows_expected(self) -> int:
        """How many rows there are: known at the end, estimated before."""
        if self.phase is Phase.ENDED:
            return self.tally.rows
        if self.rows is not None:
            return self.rows
        return self.plan.estimated_rows if self.plan else 0

    def part_key(self, number: int) -> str:
        """Where a range's outcome is."""
        return f"batches/{self.batch_id}/parts/{number:08d}"

    def chunk_key(self, number: int, chunk: str) -> str:
        """Where what a range has so far is saved."""
        return f"batches/{self.batch_id}/chunks/{number:08d}/{chunk}"

    def section_key(self, section: int, kind: str) -> str:
        """Where a section's joined results, errors or index are."""
        return f"batches/{self.batch_id}/sections/{section:06d}.{kind}"


TELL_MS: Final = 2 * 60_000
"""An end that nobody was told of after this time is told again."""

WATCH_MS: Final = 20 * 60_000
"""A batch is looked after so often, until it has ended."""


def file_batch_id(tenant: str, key: str, etag: str, run: str | None) -> str:
    """Return the id that a repeated event, or the same file uploaded again, finds again."""
    return _batch_id("file", tenant, key, etag, run or "")


def named_batch_id(tenant: str, name: str) -> str:
    """Return the id of the batch that an Idempotency-Key names."""
    return _batch_id("key", tenant, name)


def random_batch_id(random_bytes: bytes) -> str:
    """Return a fresh id from 16 random bytes."""
    return f"msgbatch_{random_bytes.hex()[:32]}"


def row_job_id(batch_id: str, offset: int) -> str:
    """Return the id of the job that the row at a byte offset is."""
    digest = sha256(f"{batch_id}\x00{offset}".encode()).hexdigest()
    return f"job_{digest[:32]}"


def _batch_id(*parts: str) -> str:
    return f"msgbatch_{sha256(chr(0).join(parts).encode()).hexdigest()[:32]}"


def sample_places(size: int) -> list[int]:
    """Return where the planner reads its samples: at the start, at the end, and at equal distances between them."""
    last = max(0, size - SAMPLE_BYTES)
    count = max(1, min(SAMPLES, -(-size // SAMPLE_BYTES)))
    return [last * place // max(1, count - 1) for place in range(count)]


def planned(size: int, sample: bytes, *more: bytes) -> Plan:
    """Cut an object of `size` bytes that begins with `sample` into ranges of about a hundred lines.

    `more`: samples from elsewhere. The estimate is bytes per line over all samples together, so that a few very long
    lines where a sample happens to be do not decide it; a sample without an end of line counts with its bytes.
    It is an estimate: what a range holds in memory is bounded where it is run.
    """
    first = len(BOM) if sample.startswith(BOM) else 0
    lines = covered = 0
    for each in (sample[first:], *more):
        lines += each.count(b"\n")
        # Behind the last end of line a line is cut off.
        covered += each.rfind(b"\n") + 1 or len(each)
    line_bytes = max(1, covered // max(1, lines))
    length = max(0, size - first)
    wanted = min(line_bytes * LINES_PER_RANGE, MOST_RANGE_BYTES)
    range_bytes = max(wanted, -(-length // MOST_RANGES), 1)
    whole, rest = divmod(length, range_bytes)
    if whole and 2 * rest < range_bytes:
        # The last few lines are no range of their own: it would start when the others end.
        range_bytes = max(range_bytes, min(-(-length // whole), MOST_RANGE_BYTES))
    return Plan(first, size, range_bytes, -(-length // range_bytes), line_bytes)


# Life ----------------------------------------------------------------------------------------------------------


def plan_batch(batch: Batch, plan: Plan, rows_etag: str | None = None) -> Batch:
    """Fix the ranges; from now on their messages may be sent, again and again until all were taken.

    `rows_etag`: they are ranges of the rows that were made of the file, not of the file itself.
    """
    if rows_etag is None:
        return _changed(batch, plan=plan)
    return _changed(
        batch,
        plan=plan,
        given_key=batch.input_key,
        input_key=batch.rows_key,
        input_etag=rows_etag,
    )


def begin(batch: Batch, now: int) -> Batch:
    """Note that all ranges are on their way. Ranges that were quick may have ended the batch already."""
    if batch.phase is not Phase.PLANNING:
        return batch
    return _changed(batch, phase=Phase.RUNNING, due_at=now + WATCH_MS)


def is_overdue(batch: Batch, now: int) -> bool:
    """Tell whether a batch should have ended: its rows expired a while ago, so messages of it must be lost."""
    return now >= batch.expires_at + WATCH_MS


def cancel(batch: Batch, now: int) -> Batch:
    """Ask for the end: rows that wait are canceled, calls under way are stopped. A batch that ended stays as it is."""
    if batch.phase is Phase.ENDED or batch.cancel_initiated_at is not None:
        return batch
    return _changed(batch, cancel_initiated_at=now)


def end(batch: Batch, now: int, tally: Tally, duplicates: int, results_bytes: int) -> Batch:
    """Note that the results are put together."""
    return _changed(
        batch,
        phase=Phase.ENDED,
        due_at=now + TELL_MS,
        ended_at=now,
        tally=tally,
        duplicates=duplicates,
        results_bytes=results_bytes,
    )


def fail(batch: Batch, now: int, problem: str) -> Batch:
    """End a batch whose object as a whole cannot be run."""
    ended = end(batch, now, Tally(invalid=1), 0, 0)
    return replace(ended, problem=problem)


def tell(batch: Batch) -> Batch:
    """Note that whoever listens has heard of the end."""
    return _changed(batch, told=True, due_at=None)


def delete(batch: Batch) -> Batch:
    """Take an ended batch out of sight; its objects go with their retention."""
    return batch if batch.deleted else _changed(batch, deleted=True)


def _changed(batch: Batch, **changes: object) -> Batch:
    return replace(batch, version=batch.version + 1, **changes)  # type: ignore[arg-type]


# Ranges --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RangeState:
    """What is known of one range: who runs it, and where what it has so far is saved."""

    batch_id: str
    number: int
    tenant: str
    version: int = 0
    """0: not on record yet; ranges are recorded when they are first claimed."""
    owner: str | None = None
    lease_until: int = 0
    claims: int = 0
    losses: int = 0
    """Steps of the search for a row that kills its workers: workers lost in this window, up to `LOSSES_UNTIL_ALONE`. 0
    again when none of the suspects is left."""
    chunks: tuple[str, ...] = ()
    windows: int = 0
    """So many of the chunks, from the first, hold a window each: rows that have all ended, in order, with the bad lines
    between them."""
    resume_at: int = 0
    """The byte offset at which the windows end. 0: there is none yet."""
    resume_line: int = 0
    """How many lines the windows have."""
    done: bool = False
    not_before: int | None = None
    """The range waits outside the queue until then, and is sent again."""
    model: str | None = None
    """Of the row that is due first, while the range waits outside the queue."""
    running: tuple[int, ...] = ()
    """The byte offsets of the rows in flight: on record while a killer is searched for, or when a row runs apart."""
    suspects: tuple[int, ...] = ()
    """The rows that were in flight when the last worker was lost, unless they have ended. Empty with losses: any row of
    the window may be the killer."""
    blamed: tuple[int, ...] = ()
    """The row of each worker that was lost while it ran this row alone."""


def claim_range(state: RangeState, owner: str, now: int, lease_until: int) -> RangeState:
    """Take the lease; raises RangeBusy while somebody else holds it. A lease that ran out was lost by a dead worker."""
    if state.owner is not None and state.lease_until > now:
        raise RangeBusy(state.batch_id, state.number, state.lease_until)
    known = state if state.owner is None else _after_loss(state)
    return _moved(
        known,
        owner=owner,
        lease_until=lease_until,
        claims=state.claims + 1,
        running=(),
        not_before=None,
        model=None,
    )


def _after_loss(state: RangeState) -> RangeState:
    """Narrow the search for a killer down to the rows that were in flight when the worker died."""
    if len(state.running) == 1:
        (alone,) = state.running
        if alone in state.blamed or state.losses >= LOSSES_UNTIL_ALONE:
            return replace(_without(state, state.running), blamed=(*state.blamed, alone))
    if state.losses and not state.running:
        # Nothing was in flight: no row is to blame.
        return state
    # Before the first loss the record of rows in flight is not complete.
    suspects = state.running if state.losses else ()
    return replace(state, losses=min(state.losses + 1, LOSSES_UNTIL_ALONE), suspects=suspects)


def _without(state: RangeState, rows: Collection[int]) -> RangeState:
    """Clear rows of suspicion; the search is over when the last suspect is cleared."""
    left = tuple(row for row in state.suspects if row not in rows)
    is_over = bool(state.suspects) and not left
    return replace(state, suspects=left, losses=0 if is_over else state.losses)


def killers(state: RangeState) -> frozenset[int]:
    """Return the rows that have lost so many workers alone that they are not tried again."""
    blamed = state.blamed
    return frozenset(row for row in blamed if blamed.count(row) >= MOST_LOST_ALONE)


def note_running(state: RangeState, owner: str, rows: Sequence[int]) -> RangeState:
    """Record the rows in flight, before their requests are made."""
    _owned(state, owner)
    return state if tuple(rows) == state.running else _moved(state, running=tuple(rows))


def keep_range(state: RangeState, owner: str, lease_until: int) -> RangeState:
    """Extend the owner's lease."""
    _owned(state, owner)
    return _moved(state, lease_until=lease_until)


def save_chunk(
    state: RangeState, owner: str, lease_until: int, chunk: str, rows: Collection[int]
) -> RangeState:
    """Note that another chunk of ended rows is saved, those at these byte offsets."""
    _owned(state, owner)
    return _moved(
        _without(state, rows),
        lease_until=lease_until,
        chunks=(*state.chunks, chunk),
        running=tuple(row for row in state.running if row not in rows),
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
    """Note that a chunk holds another window whole; `others` hold rows of later windows."""
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
        suspects=(),
        blamed=(),
    )


def release_range(
    state: RangeState,
    owner: str,
    *,
    chunks: Sequence[str],
    not_before: int | None = None,
    model: str | None = None,
) -> RangeState:
    """Give the range back with rows that are not done; `chunks` then hold all of it. Suspects remain suspects."""
    _owned(state, owner)
    return _moved(
        state,
        owner=None,
        lease_until=0,
        chunks=tuple(chunks),
        running=(),
        not_before=not_before,
        model=model,
    )


def finish_range(state: RangeState, owner: str) -> RangeState:
    """Note that the range's part is stored."""
    _owned(state, owner)
    return _moved(
        state,
        owner=None,
        lease_until=0,
        chunks=(),
        windows=0,
        done=True,
        losses=0,
        running=(),
        suspects=(),
        blamed=(),
    )


def _owned(state: RangeState, owner: str) -> None:
    if state.owner != owner:
        raise LeaseLost(f"range {state.number} of {state.batch_id}")


def _moved(state: RangeState, **changes: object) -> RangeState:
    return replace(state, version=state.version + 1, **changes)  # type: ignore[arg-type]


# Putting together ----------------------------------------------------------------------------------------------

MOST_COPY_BYTES: Final = 4 * 1024**3
"""S3 copies up to 5 GiB as one part."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The members of one group (ranges of a section, sections of a batch) that are done, and their sums."""

    members: int
    tally: Tally
    running: Tally = field(default_factory=Tally)
    """Sums of the members that are not done, as last noted: for progress alone."""


@dataclass(frozen=True, slots=True)
class Copied:
    """A part that S3 copies by itself: these bytes of that section."""

    section: int
    first: int
    size: int


@dataclass(frozen=True, slots=True)
class Streamed:
    """A part that is read and written: these slices, one after the other."""

    slices: tuple[Copied, ...]


def parts(sizes: Mapping[int, int], least: int) -> Iterator[Copied | Streamed]:
    """Cut sections of these sizes into parts of at least `least` bytes (the last one may be smaller), in their order.

    A streamed part has less than twice `least`: memory is bounded, and large sections are never read.
    """
    waiting: list[Copied] = []
    held = 0
    for section, size in sizes.items():
        first = 0
        if held:
            rest = size - (least - held)
            # Fill the part up, and let S3 copy what remains if that is enough for a part of its own.
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
