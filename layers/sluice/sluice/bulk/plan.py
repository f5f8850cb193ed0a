"""The planner: from an object in the bucket to messages for its ranges, without reading the object."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from typing import Any, Final

from sluice.bulk.assemble import SECTIONS_PREFIX, Assemble
from sluice.bulk.lane_choice import LaneChoice
from sluice.bulk.turns import in_turn
from sluice.domain import upstream_batches
from sluice.domain.batches import (
    BOM,
    LONGEST_MS,
    MOST_KEY_BYTES,
    MOST_LINE_BYTES,
    MOST_ROWS,
    MOST_UNSUPPORTED,
    PLANNING_MS,
    SAMPLE_BYTES,
    SECTIONS,
    WATCH_MS,
    AskedLane,
    Batch,
    Options,
    Phase,
    Plan,
    RangeState,
    Source,
    decide_lane,
    file_batch_id,
    is_held,
    is_over,
    late_ms,
    lost_ranges,
    mark_sent,
    older_file_batch_id,
    plan_batch,
    planned,
    prefix_of_upload,
    refused_lane,
    sample_places,
    start_batch,
    usual_rows,
)
from sluice.domain.errors import InputMissing, InvalidRequest, StoreBusy
from sluice.domain.forms import (
    DOCUMENT_TYPES,
    FOLDER_OPTIONS,
    MOST_ROWS_BYTES,
    BadForm,
    csv_rows,
    document_row,
    ending_of,
    ends_lines_with_cr,
    is_utf_16,
    named_document,
    unpacked,
    with_line_ends,
)
from sluice.domain.pricing import LIVE_LANE
from sluice.domain.upstream_batches import UpstreamBatch
from sluice.domain.webhooks import Network
from sluice.intake.requests import decode, read_options, unread
from sluice.ports.batches import BatchStore, Newcomer, Objects, RangesQueue, Stored
from sluice.ports.swap import Deleted, change, insert
from sluice.ports.upstream_records import UpstreamRecords, Waiting
from sluice.ports.world import Clock, Events

OPTIONS_ENDING: Final = ".options.json"
METADATA_PREFIX: Final = "sluice-"
MOST_OPTIONS_BYTES: Final = 256 * 1024
SEND_ROUNDS: Final = 5

MOST_COPIED_BYTES: Final = 200 * 1024**3
"""S3 copies so much within minutes. A larger file is read where it is, and must not be replaced while it runs."""

CONVERT_MS: Final = 10 * 60_000
"""Maximum time to make the rows of a file that is not plain JSONL: another invocation would start from nothing."""

QUICK_TO_CONVERT_BYTES: Final = 1024 * 1024
QUICK_TO_COPY_BYTES: Final = 1024**3
QUICK_DOCUMENTS: Final = 100
"""The rows of files up to these sizes, and of so many documents, are made or copied within seconds (docs/bounds.md)."""

JOIN_MS: Final = 5 * 60_000
"""After this time no further section is joined in this check of a batch; ten minutes remain for the last one."""

_KEY: Final = re.compile(r"in/(?P<tenant>[^/]{1,128})/(?P<path>.+)")
_ENDING: Final = re.compile(r"\.(jsonl|ndjson|csv)(\.gz)?$", re.IGNORECASE)
_GZIP: Final = b"\x1f\x8b"

PIECE_BYTES: Final = 8 * 1024 * 1024
"""Bytes of a file read at once while it is converted."""

MOST_LISTED: Final = 1_000
"""Files of a folder among which documents are looked for when an unsupported file arrives there."""


class BadOptions(Exception):
    """The options of a file cannot be used; the message says why."""

    webhook: str | None = None
    """The URL to notify of the failure, if this option is valid."""


@dataclass(frozen=True, slots=True)
class _File:
    """An object under `in/`."""

    tenant: str
    path: str
    """Its name, as it was uploaded or copied."""
    stored: Stored
    older_etag: str
    """By which an older release knew its content."""
    is_folder: bool = False
    """The object is the folder's options, and its ETag is a digest of all documents."""

    @property
    def key(self) -> str:
        """The key by which its content is known: uploads of one name have different ones in the bucket."""
        return f"in/{self.tenant}/{self.path}"

    @property
    def name(self) -> str:
        """The name of the batch: the path without its ending."""
        return (
            self.path.removesuffix(f"/{FOLDER_OPTIONS}") if self.is_folder else stem_of(self.path)
        )

    @property
    def options_key(self) -> str:
        """The object with its options."""
        key = self.stored.key
        return key if self.is_folder else f"{stem_of(key)}{OPTIONS_ENDING}"


class PlanBatch:
    """The use case behind the batches queue, together with `Assemble`."""

    def __init__(  # noqa: PLR0913, PLR0917 - its tools
        self,
        batches: BatchStore,
        objects: Objects,
        queue: RangesQueue,
        assemble: Assemble,
        networks: Sequence[Network],
        clock: Clock,
        events: Events,
        upstream: UpstreamRecords,
        lanes: LaneChoice,
        longest_ms: int = LONGEST_MS,
        default_lane: AskedLane = "live",
    ) -> None:
        """`longest_ms` is how long rows may wait, `default_lane` is for files that ask for none."""
        self._longest_ms = longest_ms
        self._default_lane = default_lane
        self._batches = batches
        self._upstream = upstream
        self._lanes = lanes
        self._objects = objects
        self._queue = queue
        self._assemble = assemble
        self._networks = networks
        self._clock = clock
        self._events = events

    def arrived(self, key: str) -> None:
        """Create a batch from an object under `in/` and plan it, once per content, however often the event arrives."""
        match = _KEY.fullmatch(key)
        if match is None or key.endswith(("/", OPTIONS_ENDING)):
            return
        if not is_known(key) and not _is_folder(key) and self._is_of_a_folder(key):
            self._events.note("document waits for the options of its folder", key=key)
            return
        try:
            batch, problem = self._registered(key)
        except InputMissing:
            self._events.note("file deleted", key=key)
            return
        if batch.phase is not Phase.PLANNING:
            self._events.note("file already known", key=key, batch_id=batch.batch_id)
        elif problem is not None:
            self._assemble.fail(batch, problem)
        else:
            self._plan(batch)

    def _is_of_a_folder(self, key: str) -> bool:
        """Return whether a document runs, or an unsupported file is reported, when the options of its folder arrive."""
        *_, folder = _folders_of(key) or ("",)
        if ending_of(key) in DOCUMENT_TYPES or not folder:
            return bool(folder)
        some = islice(self._objects.listing(folder), MOST_LISTED)
        return any(ending_of(each.key) in DOCUMENT_TYPES for each in some) or any(
            self._objects.head(f"{each}{FOLDER_OPTIONS}") for each in _folders_of(key)
        )

    def register(self, key: str) -> Batch:
        """Record the batch of an object under `in/`, for the response to its upload; the object's event plans it."""
        batch, _ = self._registered(key)
        if batch.deleted:
            raise InvalidRequest(
                "the batch of this file and these options was deleted; set the option run to run it again"
            )
        return batch

    def _registered(self, key: str) -> tuple[Batch, str | None]:
        """Return the batch of a file, and what is wrong with its options."""
        match = _KEY.fullmatch(key)
        stored = self._objects.head(key)
        if match is None or stored is None:
            raise InputMissing(key)
        file = self._file(match["tenant"], match["path"], stored)
        problem = _unsupported(file)
        try:
            options = self._options(file)
        except BadOptions as error:
            options, problem = Options(webhook=error.webhook), problem or str(error)
        batch = self._batch(file, options, problem)
        recorded = self._older(file, options) or insert(self._batches.add, batch) or batch
        if recorded is batch:
            self._events.note("batch created", batch_id=batch.batch_id, tenant=batch.tenant)
        if recorded.phase is not Phase.ENDED:
            # Also of a batch whose planner died between the two writes.
            self._batches.latest_of_name(recorded)
        return recorded, problem

    def _older(self, file: _File, options: Options) -> Batch | None:
        """Return the batch that an older release made of the same file and options; its id has no options."""
        batch_id = older_file_batch_id(file.tenant, file.key, file.older_etag, options.run)
        older = self._batches.get(batch_id)
        return older if older is not None and older.options == options else None

    def _file(self, tenant: str, path: str, stored: Stored) -> _File:
        folder, _, name = path.rpartition("/")
        if name != FOLDER_OPTIONS or not folder:
            upload = prefix_of_upload(stored.key) or f"in/{tenant}/"
            return _File(tenant, stored.key.removeprefix(upload), stored, stored.etag)
        # A folder is unchanged if its options and all its documents are.
        # The digest of a JSON list of them, computed one by one, because there may be millions.
        digest, older = (sha256(f"[{json.dumps(stored.etag)}".encode()) for _ in range(2))
        for each in self._documents(f"in/{tenant}/{folder}/"):
            said = f", {json.dumps([each.key, each.etag])}".encode()
            digest.update(said)
            if ending_of(each.key) in DOCUMENT_TYPES:
                older.update(said)
        digest.update(b"]")
        older.update(b"]")
        stored = replace(stored, etag=digest.hexdigest())
        return _File(tenant, path, stored, older.hexdigest(), is_folder=True)

    def _documents(self, prefix: str) -> Iterator[Stored]:
        """Yield the files of a folder, also of unsupported types, but not those that are batches of their own."""
        for each in self._objects.listing(prefix):
            name = each.key.rpartition("/")[2]
            if (
                name
                and name != FOLDER_OPTIONS
                and not name.endswith(OPTIONS_ENDING)
                and not is_known(name)
            ):
                yield each

    def plan(self, batch_id: str) -> None:
        """Plan a recorded batch, or do what it still needs: join sections, and send lost messages again."""
        batch = self._batches.get(batch_id)
        if batch is None:
            return
        if batch.phase is Phase.ENDED:
            self._assemble.notify(batch)
        elif batch.phase is Phase.RUNNING and batch.plan is not None:
            self._check(batch, batch.plan)
        elif batch.plan is None and self._clock.now() >= batch.expires_at + PLANNING_MS:
            self._assemble.fail(batch, "the file could not be planned before its rows expired")
        else:
            # Also if it is over: each of its rows must have a result.
            self._plan(batch)

    def _check(self, batch: Batch, plan: Plan) -> None:
        """Send ranges again that would never or too late be run, and join sections whose ranges are done."""
        groups = self._batches.groups(batch.batch_id, SECTIONS_PREFIX)
        complete: list[int] = []
        missing: dict[int, Sequence[int]] = {}
        for section in range(plan.sections):
            found = groups.get(f"section#{section:06d}")
            done = found.done if found else ()
            missing[section] = [each for each in plan.members(section) if each not in done]
            if not missing[section]:
                complete.append(section)
        self._send_again(batch, plan, missing)
        joined = groups[SECTIONS].members if SECTIONS in groups else 0
        if joined < len(complete) or len(complete) == plan.sections:
            self._join(batch, complete)

    def _send_again(self, batch: Batch, plan: Plan, missing: Mapping[int, Sequence[int]]) -> None:
        """Send ranges whose messages are probably lost, and wake those that wait although their batch is over."""
        now = self._clock.now()
        elsewhere = self._on_batch_lane(batch, plan)
        asleep: list[int] = []
        late: dict[int, int] = {}
        for section, numbers in missing.items():
            if not numbers:
                continue
            seen = self._batches.seen_ranges(batch.batch_id, plan.members(section))
            for number in numbers:
                if any(number in each for each in elsewhere):
                    continue
                known = seen.get(number)
                state = known.state if known else RangeState(batch.batch_id, number, batch.tenant)
                if (known and known.is_parked) or state.expected_at > now:
                    asleep.append(number)
                elif not is_held(state, now):
                    late[number] = late_ms(batch, state, now)
        lost = lost_ranges(batch, late, is_queue_empty=False) or (
            lost_ranges(batch, late, is_queue_empty=True) if late and self._is_empty() else []
        )
        if lost:
            self._events.problem("ranges lost", batch_id=batch.batch_id, ranges=len(lost))
        wanted = [*lost, *(asleep if is_over(batch, now) else ())]
        if wanted:
            self._send(batch, wanted)
            self._changed(batch, lambda current: mark_sent(current, now))

    def _decided(self, batch: Batch, plan: Plan) -> Batch:
        """Return a batch with the lane that it runs on."""
        if batch.lane == LIVE_LANE or batch.decision is not None:
            return batch
        decision = self._lanes.decide(batch, plan)
        self._events.note(
            "lane chosen", batch_id=batch.batch_id, tenant=batch.tenant, asked=batch.lane,
            lane=decision.lane, reason=decision.reason,
        )  # fmt: skip
        return self._changed(batch, lambda current: decide_lane(current, decision))

    def _wait(self, batch: Batch) -> None:
        """Have the ranges of a batch collected into upstream batches."""
        self._upstream.wait(Waiting(batch.tenant, batch.batch_id, batch.created_at))

    def _on_batch_lane(self, batch: Batch, plan: Plan) -> list[range]:
        """Return the ranges that no worker may have now: in upstream batches, or waiting for the collector.

        Of a batch that is over, upstream is canceled, unless it works for others too; then its own rows end at once.
        """
        if not batch.is_on_batch_lane:
            return []
        now = self._clock.now()
        has_ended = is_over(batch, now)
        elsewhere: list[range] = []
        for upstream_id, first, end in batch.upstream:
            record = self._upstream.get(upstream_id)
            part = upstream_batches.Slice(batch.batch_id, first, end)
            if record is None or part not in record.slices:
                # Of a collector that died: the next one repairs it.
                self._wait(batch)
                elsewhere.append(range(first, end))
            elif record.phase is not upstream_batches.Phase.DONE:
                is_shared = has_ended and self._is_wanted(record, now)
                if not is_shared:
                    elsewhere.append(range(first, end))
                if has_ended and not is_shared:
                    self._cancel_upstream(record, now)
        if not has_ended and batch.collected < plan.ranges:
            # Also if the entry of the list was lost.
            self._wait(batch)
            elsewhere.append(range(batch.collected, plan.ranges))
        return elsewhere

    def _is_wanted(self, record: UpstreamBatch, now: int) -> bool:
        """Return whether a batch in an upstream batch is not over."""
        batches = (self._batches.get(each.batch_id) for each in record.slices)
        return any(each is not None and not is_over(each, now) for each in batches)

    def _cancel_upstream(self, record: UpstreamBatch, now: int) -> None:
        change(
            self._upstream.replace,
            record,
            lambda current: upstream_batches.ask_cancel(current, "its batches are over", now),
            f"upstream batch {record.upstream_id}",
        )

    def _is_empty(self) -> bool:
        """Return whether no message waits in the ranges queue."""
        try:
            return not self._queue.backlog().visible
        except StoreBusy as busy:
            self._events.problem("store busy", what=busy.what)
            return False

    def _join(self, batch: Batch, sections: Sequence[int]) -> None:
        """Join sections in this invocation, because this function must not send to the queue that invokes it.

        A section that is already joined costs two reads. What is left, the next check does, or the message of the last
        section, which is repeated until the batch has ended.
        """
        latest = self._clock.now() + JOIN_MS
        for section in sections:
            if self._clock.now() > latest or not self._assemble.join(
                batch.batch_id, section, latest
            ):
                self._events.note("sections left to the next check", batch_id=batch.batch_id)
                return

    def _send(self, batch: Batch, numbers: Sequence[int]) -> None:
        for _ in range(SEND_ROUNDS):
            if not numbers:
                return
            numbers = self._queue.send_ranges(batch, numbers)
        if numbers:
            what = "the ranges queue"
            raise StoreBusy(what)

    def again(self, batch_id: str, number: int) -> None:
        """Send a range again whose message became a dead letter, after a very long wait or many failures.

        A row that kills its workers is ended by the count of losses in its range.
        """
        batch = self._batches.get(batch_id)
        if batch is None or batch.phase is Phase.ENDED:
            return
        self._events.count("DeadLetters")
        self._events.problem("range sent again", batch_id=batch_id, range=number)
        if self._queue.send_ranges(batch, [number]):
            what = "the ranges queue"
            raise StoreBusy(what)

    def _batch(self, file: _File, options: Options, problem: str | None) -> Batch:
        now = self._clock.now()
        latest = now + self._longest_ms
        return Batch(
            batch_id=file_batch_id(file.tenant, file.key, file.stored.etag, options, problem),
            tenant=file.tenant,
            name=file.name,
            source=Source.FILE,
            created_at=now,
            expires_at=min(options.deadline or latest, latest),
            input_key=file.stored.key,
            input_etag=file.stored.etag,
            options=options,
            due_at=now + WATCH_MS,
            lane=options.lane or self._default_lane,
        )

    def _plan(self, batch: Batch) -> None:
        try:
            batch = batch if batch.plan else self._cut(batch)
        except (InputMissing, BadForm) as error:
            self._assemble.fail(batch, str(error))
            return
        plan = batch.plan
        if plan is None:
            # Meanwhile ended by another invocation.
            return
        if not plan.ranges:
            self._assemble.fail(batch, "the file is empty")
            return
        batch = self._decided(batch, plan)
        refusal = refused_lane(batch)
        if refusal is not None:
            self._assemble.fail(batch, refusal)
            return
        if batch.is_on_batch_lane and not is_over(batch, self._clock.now()):
            self._wait(batch)
        else:
            if plan.is_small:
                self._batches.announce(Newcomer(batch.tenant, batch.batch_id))
            self._send(batch, range(plan.ranges))
        self._changed(batch, lambda current: start_batch(current, self._clock.now()))
        self._events.note(
            "batch planned", batch_id=batch.batch_id, tenant=batch.tenant, ranges=plan.ranges,
            bytes=plan.size,
        )  # fmt: skip

    def _cut(self, batch: Batch) -> Batch:
        key, etag, rows_etag = batch.input_key, batch.input_etag, None
        made = None if _is_folder(key) else self._objects.head(batch.rows_key)
        if made is not None:
            # By a planner that died later. The file itself may have been replaced since.
            key, etag, rows_etag = batch.rows_key, made.etag, made.etag
        sample = b"" if _is_folder(key) else self._objects.read(key, 0, SAMPLE_BYTES, etag)
        problem = None if _is_folder(key) else _unreadable(sample)
        if problem is not None:
            self._assemble.fail(batch, problem)
            return batch
        unsupported: Sequence[str] = ()
        if made is None:
            is_converted = _has_no_lines(key, sample)
            stored = None if is_converted else self._to_copy(batch)
            is_long = self._is_long_to_convert(batch) if is_converted else _is_long_to_copy(stored)
            with in_turn(self._batches, self._clock, self._events, batch, is_long=is_long):
                if is_converted:
                    if _is_folder(key):
                        unsupported = self._named(batch)
                    rows_etag = etag = self._made_rows(batch, sample)
                    key = batch.rows_key
                    sample = self._objects.read(key, 0, SAMPLE_BYTES, etag)
                elif stored is not None:
                    key = batch.rows_key
                    rows_etag = etag = self._objects.copy(stored, key)
        stored = self._objects.head(key)
        if stored is None or stored.etag != etag:
            raise InputMissing(batch.input_key)
        samples = [sample, *self._samples(key, stored.size, etag)]
        plan = planned(stored.size, *samples, lane=batch.lane)
        problem = _unreadable(sample) or _too_long(usual_rows(stored.size, samples))
        if problem is not None:
            self._assemble.fail(batch, problem)
            return batch

        def with_plan(current: Batch) -> Batch:
            # If another planner was quicker, the ranges of its plan are sent.
            is_planned = current.plan is not None or current.phase is Phase.ENDED
            return current if is_planned else plan_batch(current, plan, rows_etag, unsupported)

        return self._changed(batch, with_plan)

    def _is_long_to_convert(self, batch: Batch) -> bool:
        """Return whether it may take long to make the rows of a file or a folder."""
        if _is_folder(batch.input_key):
            folder = batch.input_key.removesuffix(FOLDER_OPTIONS)
            return len(list(islice(self._documents(folder), QUICK_DOCUMENTS + 1))) > QUICK_DOCUMENTS
        stored = self._objects.head(batch.input_key)
        return stored is not None and stored.size > QUICK_TO_CONVERT_BYTES

    def _samples(self, key: str, size: int, etag: str) -> Iterator[bytes]:
        """Read the samples of an object except the first."""
        for place in sample_places(size)[1:]:
            yield self._objects.read(key, place, SAMPLE_BYTES, etag)

    def _to_copy(self, batch: Batch) -> Stored | None:
        """Return a file to copy, because its owner may replace it at any time; None if it is read where it is."""
        key = batch.input_key
        if batch.source is not Source.FILE or prefix_of_upload(key):
            return None
        stored = self._objects.head(key)
        if stored is None or stored.etag != batch.input_etag:
            raise InputMissing(key)
        return None if stored.size > MOST_COPIED_BYTES else stored

    def _named(self, batch: Batch) -> list[str]:
        """Store which document has which `custom_id`; return the first ones of unsupported types."""
        folder = batch.input_key.removesuffix(FOLDER_OPTIONS)
        unsupported: list[str] = []
        names = self._objects.writer(batch.documents_key)
        try:
            for each in self._documents(folder):
                name = each.key.removeprefix(folder)
                names.write(named_document(name))
                if ending_of(name) not in DOCUMENT_TYPES and len(unsupported) < MOST_UNSUPPORTED:
                    unsupported.append(name)
            names.close()
        finally:
            names.abort()
        return unsupported

    def _made_rows(self, batch: Batch, sample: bytes) -> str:
        """Stream the rows of a file to an object; return its ETag."""
        rows = self._objects.writer(batch.rows_key)
        written, latest = 0, self._clock.now() + CONVERT_MS
        try:
            for piece in self._rows_of(batch, sample):
                written += len(piece)
                if written > MOST_ROWS_BYTES:
                    raise BadForm(f"the rows made from the file exceed {MOST_ROWS_BYTES:,} bytes")
                if self._clock.now() > latest:
                    raise BadForm(
                        f"the file could not be converted to rows within {CONVERT_MS // 60_000} minutes; "
                        "split it, or upload it as plain JSONL, which is not converted"
                    )
                rows.write(piece)
            rows.close()
        finally:
            rows.abort()
        stored = self._objects.head(batch.rows_key)
        if stored is None:
            raise InputMissing(batch.rows_key)
        return stored.etag

    def _rows_of(self, batch: Batch, sample: bytes) -> Iterator[bytes]:
        key = batch.input_key
        if _is_folder(key):
            folder = key.removesuffix(FOLDER_OPTIONS)
            if batch.options.prompt is None:
                raise BadForm(f'{key} requires a "prompt" to apply to each document')
            for each in self._documents(folder):
                is_read = ending_of(each.key) in DOCUMENT_TYPES and each.size <= MOST_LINE_BYTES
                body = self._objects.read(each.key, 0, each.size, each.etag) if is_read else b""
                yield document_row(each.key.removeprefix(folder), each.size, body, batch.options)
            return
        pieces = self._pieces(key, batch.input_etag)
        if sample.startswith(_GZIP) or key.lower().endswith(".gz"):
            pieces = unpacked(pieces)
        is_csv = key.lower().removesuffix(".gz").endswith(".csv")
        yield from csv_rows(pieces, batch.options) if is_csv else with_line_ends(pieces)

    def _pieces(self, key: str, etag: str) -> Iterator[bytes]:
        """Read a file while it is the same; raises InputMissing."""
        at = 0
        while piece := self._objects.read(key, at, PIECE_BYTES, etag):
            yield piece
            at += len(piece)

    def _changed(self, batch: Batch, rule: Callable[[Batch], Batch]) -> Batch:
        result = change(self._batches.replace, batch, rule, f"batch {batch.batch_id}")
        return batch if isinstance(result, Deleted) else result.record

    # Options ---------------------------------------------------------------------------------------------------

    def _options(self, file: _File) -> Options:
        """Read the options file next to the file, and its metadata, which takes precedence."""
        said: dict[str, Any] = {}
        key = file.options_key
        stored = None if len(key.encode()) > MOST_KEY_BYTES else self._objects.head(key)
        if stored is not None:
            if stored.size > MOST_OPTIONS_BYTES:
                raise BadOptions(f"{key} exceeds {MOST_OPTIONS_BYTES:,} bytes")
            text = self._objects.read(key, 0, stored.size).removeprefix(BOM)
            try:
                said = decode(text.decode(errors="surrogateescape"))
            except ValueError as error:
                raise BadOptions(f"{key} {unread(error)}") from error
            if not isinstance(said, dict):
                raise BadOptions(f"{key} is not a JSON object")
        metadata = {
            name.removeprefix(METADATA_PREFIX).replace("-", "_"): _from_metadata(name, value)
            for name, value in file.stored.metadata.items()
            if name.startswith(METADATA_PREFIX)
        }
        said |= metadata
        try:
            return self.read_options(said)
        except InvalidRequest as error:
            bad = BadOptions(str(error))
            with suppress(InvalidRequest):
                bad.webhook = self.read_options({"webhook": said.get("webhook")}).webhook
            raise bad from error

    def read_options(self, said: Mapping[str, Any]) -> Options:
        """Return the options of a file; raises InvalidRequest."""
        return read_options(said, self._networks)


def _is_long_to_copy(stored: Stored | None) -> bool:
    return stored is not None and stored.size > QUICK_TO_COPY_BYTES


def is_known(path: str) -> bool:
    """Return whether a file of this name can be run."""
    return _ENDING.search(path) is not None


def stem_of(path: str) -> str:
    """Return the path without its ending."""
    return _ENDING.sub("", path)


def _from_metadata(name: str, value: str) -> Any:
    """Return a value of the metadata, which is text: numbers and lists are parsed."""
    if name.endswith("max-tokens") and value.isdecimal():
        return int(value)
    if name.endswith("fallback-models"):
        return [each.strip() for each in value.split(",") if each.strip()]
    return value


def _is_folder(key: str) -> bool:
    """Return whether the object is the options of a folder of documents."""
    return key.endswith(f"/{FOLDER_OPTIONS}") and bool(_folders_of(key))


def _folders_of(key: str) -> list[str]:
    """Return the folders of an object under `in/<tenant>/`, outermost first, with their slashes at the end."""
    _, tenant, *names = key.split("/")[:-1]
    return [f"in/{tenant}/{'/'.join(names[: n + 1])}/" for n in range(len(names))]


def _unsupported(file: _File) -> str | None:
    """Return why a file of this type cannot be run, or None."""
    ending = ending_of(file.path)
    if file.is_folder or is_known(file.path):
        return None
    if ending in DOCUMENT_TYPES or file.path == FOLDER_OPTIONS:
        return (
            f"{file.path}: documents are run by folder; copy them to in/{file.tenant}/<folder>/ and then an "
            f"{FOLDER_OPTIONS} with a prompt to the same folder"
        )
    return (
        f"{file.path}: files {ending or 'without a suffix'} cannot be run; use .jsonl, .ndjson or .csv, "
        "also with .gz, or a folder of documents"
    )


def _has_no_lines(key: str, sample: bytes) -> bool:
    """Return whether the file must be converted to JSONL first: gzip, CSV and folders have no lines to divide at."""
    is_packed = key.lower().endswith(".gz") or sample.startswith(_GZIP)
    is_csv = key.lower().endswith(".csv")
    return _is_folder(key) or is_packed or is_csv or ends_lines_with_cr(sample)


def _too_long(rows: int) -> str | None:
    """Return what is wrong with a file of more rows than the end of a batch can compare."""
    if rows <= MOST_ROWS:
        return None
    return (
        f"the file has about {rows:,} rows; the maximum is {MOST_ROWS:,}. "
        "Split it into several files"
    )


def _unreadable(sample: bytes) -> str | None:
    """Return why the object cannot be lines of JSON in UTF-8; None if it can."""
    if sample.startswith(_GZIP):
        return None
    if is_utf_16(sample):
        return "the file is UTF-16; save it as UTF-8"
    if sample.startswith(b"PK\x03\x04"):
        return "the file is a ZIP archive; upload the JSONL file itself or compress it with gzip"
    if not sample.removeprefix(BOM).strip() and len(sample) < SAMPLE_BYTES:
        return "the file is empty"
    return None
