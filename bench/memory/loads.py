"""The worst legal load of each function: what must exist before it, and the events that Lambda sends."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from bench.memory.cloud import BUCKET, CLIENT_KEY, ROOT, TENANT, Cloud, record
from bench.memory.servers import EMOJI, MESSAGE_BATCH, Servers, succeeded
from sluice.adapters import job_records
from sluice.adapters.s3 import Objects
from sluice.domain import upstream_batches
from sluice.domain.batches import (
    LINES_ON_BATCH_LANE,
    MOST_LINE_BYTES,
    Batch,
    Phase,
    Plan,
    Source,
    Tally,
    claim_range,
    release_range,
)
from sluice.domain.jobs import Job, JobError, Result, State, claim, finish_waiting, park, succeed
from sluice.domain.pricing import Usage
from sluice.domain.rows import Record
from sluice.domain.upstream_batches import RowId, Slice, UpstreamBatch, upstream_id_of
from sluice.intake.admission import MOST_BYTES
from sluice.ports.jobs import Params
from sluice.wiring import batch_stores, shared, stores

MODEL: Final = "claude-haiku-5-5"
DAY_MS: Final = 86_400_000
MB: Final = 1_000_000
EVENT_BYTES: Final = 6 * MB
"""The most that Lambda passes to a function at once."""

JOBS_OF_AN_EVENT: Final = 100
MESSAGES_OF_AN_EVENT: Final = 10
"""As the mappings of template.yaml bring them."""

_CHANCE: Final = random.Random(1)  # noqa: S311 - a seed makes the same loads every time


@dataclass(frozen=True, slots=True)
class World:
    """Everything around a function."""

    cloud: Cloud
    servers: Servers
    url: str
    """Of the servers."""
    is_small: bool

    def size(self, full: int, small: int) -> int:
        """Return a figure of the load."""
        return small if self.is_small else full


@dataclass(frozen=True, slots=True)
class Load:
    """One load of one function."""

    function: str
    name: str
    events: Callable[[World], Iterator[dict[str, Any]]]
    happened: Callable[[World], bool]
    """Whether the load was carried: a peak of a function that gave up early means nothing."""
    expected: tuple[str, ...] = ("done",)
    """How the events must end, in their order; one for all if there is one."""
    seconds: float = 880
    """Of the function's time, for its invocations."""

    def __str__(self) -> str:
        return f"{self.function}: {self.name}"


def noise(size: int) -> str:
    """Return text that cannot be compressed much."""
    return "".join(_CHANCE.choices(string.ascii_letters + string.digits, k=size))


def params(text: str, **more: Any) -> dict[str, Any]:
    """Return a request."""
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "max_tokens": 64, "messages": messages} | more


def row(number: int, text: str, **more: Any) -> bytes:
    """Return a row of a file."""
    item = {"custom_id": f"r{number}", "params": params(text, **more)}
    return json.dumps(item, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


# The API ---------------------------------------------------------------------------------------------------


def _request(method: str, path: str, body: object = None) -> dict[str, Any]:
    name = "api_get.json" if body is None else "api_submit.json"
    event: dict[str, Any] = json.loads((ROOT / "events" / name).read_text())
    event["rawPath"] = event["requestContext"]["http"]["path"] = path
    event["requestContext"]["http"]["method"] = method
    event["headers"]["x-api-key"] = CLIENT_KEY
    event["headers"].pop("idempotency-key", None)
    if body is not None:
        event["body"] = json.dumps(body, separators=(",", ":"), ensure_ascii=False)
    return event


def _filled(make: Callable[[int], object], most: int) -> list[object]:
    """Return as many items as a body takes."""
    items: list[object] = []
    size = 100
    while len(items) < most:
        item = make(len(items))
        size += len(json.dumps(item, separators=(",", ":"))) + 1
        if size > MOST_BYTES:
            break
        items.append(item)
    return items


def api_lists(world: World) -> Iterator[dict[str, Any]]:
    """Lists of the most bytes: few large jobs, and a batch of many small ones."""
    each = world.size(MOST_BYTES // 100 - 200, 100)
    jobs = [{"params": params(noise(each))} for _ in range(100)]
    yield _request("POST", "/jobs", {"jobs": jobs})
    most = world.size(100_000, 200)
    small = _filled(lambda number: {"custom_id": f"r{number}", "params": params("Hi")}, most)
    yield _request("POST", "/jobs", {"jobs": small})
    yield _request("POST", "/v1/messages/batches", {"requests": small})


def api_nested(world: World) -> Iterator[dict[str, Any]]:
    """JSON whose values take many times the memory of their text."""
    blocks: list[object] = [{} for _ in range(world.size(MOST_BYTES // 3 - 100, 100))]
    request = params("")
    request["messages"] = [{"role": "user", "content": blocks}]
    yield _request("POST", "/jobs", {"params": request})


def api_answers(world: World) -> Iterator[dict[str, Any]]:
    """The largest answer of a job, and the largest results that come with an answer."""
    now = shared.CLOCK.now()
    text = EMOJI + noise(world.size(4 * MB, 1_000))
    message = json.dumps({"content": [{"type": "text", "text": text}], "stop_reason": "end_turn"})
    job = _job("job_" + "a" * 32, now)
    key = f"results/{job.job_id}-1.json.gz"
    world.cloud.drop(key, gzip.compress(message.encode()))
    claimed = claim(job, "bench", now, now + 1_000)
    ended = succeed(
        claimed,
        "bench",
        now,
        result=Result(object_key=key),
        usage=Usage(input_tokens=1, output_tokens=1),
        cost_micro_usd=1,
        request_id="req_1",
    )
    stores.jobs().add(ended)
    yield _request("GET", f"/jobs/{job.job_id}")
    batch = replace(
        _batch("f" * 32, "in/bench/results.jsonl", "etag"),
        phase=Phase.ENDED,
        ended_at=now,
        tally=Tally(succeeded=1),
    )
    batch_stores.batches().add(batch)
    results = gzip.compress(noise(world.size(5_600_000, 1_000)).encode(), 6)
    world.cloud.drop(batch.packed_key, results)
    yield _request("GET", f"/v1/messages/batches/{batch.batch_id}/results")


# Workers ---------------------------------------------------------------------------------------------------


def _job(job_id: str, now: int) -> Job:
    return Job(
        job_id=job_id,
        tenant=TENANT,
        model=MODEL,
        created_at=now,
        request_hash="0" * 64,
        input_chars=100,
        max_tokens=64,
        anthropic_version="2023-06-01",
    )


def worker_large(world: World) -> Iterator[dict[str, Any]]:
    """As many jobs as a worker holds, each of the largest size."""
    now = shared.CLOCK.now()
    count = world.size(120, 4)
    for number in range(count):
        job = _job(f"job_{number:032x}", now)
        body = json.dumps(params(noise(world.size(MOST_BYTES - 1_000, 1_000))))
        stores.params().add(Params(job.job_id, body.encode(), job.request_hash))
        stores.jobs().add(job)
        pointer = json.dumps({"v": 1, "job_id": job.job_id})
        world.cloud.client("sqs").send_message(
            QueueUrl=world.cloud.queues["JobsQueue"], MessageBody=pointer
        )
    world.servers.answer_seconds = 10.0 if not world.is_small else 0.1
    yield world.cloud.received("JobsQueue", 50)


# Ranges ----------------------------------------------------------------------------------------------------


def _batch(digits: str, key: str, etag: str, **facts: Any) -> Batch:
    now = shared.CLOCK.now()
    return Batch(
        batch_id=f"msgbatch_{digits}",
        tenant=TENANT,
        name=digits,
        source=Source.FILE,
        created_at=now,
        expires_at=now + DAY_MS,
        input_key=key,
        input_etag=etag,
        **facts,
    )


def _range(world: World, body: bytes) -> Iterator[dict[str, Any]]:
    """Store a file as one range, as a planner may cut it that saw longer lines everywhere it looked."""
    digits = f"{_CHANCE.getrandbits(128):032x}"
    key = f"in/{TENANT}/{digits}.jsonl"
    world.cloud.drop(key, body)
    stored = _objects().head(key)
    assert stored is not None  # noqa: S101 - it was stored a moment ago
    plan = Plan(0, len(body), len(body), 1, 100_000)
    batch = _batch(digits, key, stored.etag, plan=plan, phase=Phase.RUNNING)
    batch_stores.batches().add(batch)
    pointer = json.dumps({"v": 1, "batch_id": batch.batch_id, "range": 0})
    yield {"Records": [record(digits, pointer)]}


def _objects() -> Objects:
    return stores.objects()


def ranges_long_first_line(world: World) -> Iterator[dict[str, Any]]:
    """A line of 70 KB, then thousands of short ones, with answers of 20 KB."""
    world.servers.answer_bytes = world.size(20_000, 200)
    count = world.size(6_000, 50)
    rows = (row(number, "hi, you") for number in range(1, count))
    yield from _range(world, row(0, "x" * 70_000) + b"".join(rows))


def ranges_tiny_lines(world: World) -> Iterator[dict[str, Any]]:
    """Lines of one byte: 8 MiB of them, none of which can become a row."""
    yield from _range(world, row(0, "hi") + b"?\n" * world.size(4_000_000, 10_000))


def ranges_largest_lines(world: World) -> Iterator[dict[str, Any]]:
    """Lines of 8 MiB whose text takes four bytes per character in memory."""
    size = world.size(MOST_LINE_BYTES - 1_000, 10_000)
    yield from _range(world, b"".join(row(number, EMOJI + "x" * size) for number in range(4)))


def ranges_large_lines(world: World) -> Iterator[dict[str, Any]]:
    """Lines of 256 KB, as many as a window holds, called at the same time."""
    size = world.size(256 * 1024 - 1_000, 10_000)
    world.servers.answer_seconds = 2.0
    yield from _range(world, b"".join(row(number, EMOJI + "x" * size) for number in range(60)))


def ranges_nested_lines(world: World) -> Iterator[dict[str, Any]]:
    """Lines of 8 MiB of JSON whose values take 24 times the memory of their text."""
    content: list[object] = [{} for _ in range(world.size(MOST_LINE_BYTES // 3 - 1_000, 10_000))]
    item = params("")
    item["messages"] = [{"role": "user", "content": content}]
    rows = [{"custom_id": f"r{number}", "params": item} for number in range(3)]
    lines = (json.dumps(each, separators=(",", ":")).encode() + b"\n" for each in rows)
    yield from _range(world, b"".join(lines))


def ranges_large_answers(world: World) -> Iterator[dict[str, Any]]:
    """Rows with the longest answers that Claude gives, all at the same time."""
    world.servers.answer_bytes = world.size(768 * 1024, 2_000)
    world.servers.answer_seconds = 2.0
    count = world.size(150, 30)
    rows = (row(number, "hi", max_tokens=128_000) for number in range(count))
    yield from _range(world, b"".join(rows))


def ranges_answers_beyond(world: World) -> Iterator[dict[str, Any]]:
    """Answers that are far larger than their `max_tokens` let expect, as server tools return them."""
    world.servers.answer_bytes = world.size(768 * 1024, 2_000)
    world.servers.answer_seconds = 2.0
    rows = (row(number, "hi") for number in range(world.size(150, 30)))
    yield from _range(world, b"".join(rows))


# Batches ---------------------------------------------------------------------------------------------------


def _arrived(key: str) -> dict[str, Any]:
    detail = {"bucket": {"name": "data"}, "object": {"key": key}}
    body = {"source": "aws.s3", "detail-type": "Object Created", "detail": detail}
    return {"Records": [record("arrived", json.dumps(body))]}


def batches_files(world: World) -> Iterator[dict[str, Any]]:
    """A CSV file with fields as long as they may be, and gzipped JSONL; both become rows."""
    options = {"prompt": "Read {a}, {b}", "model": MODEL, "max_tokens": 64}
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["a", "b"])
    for number in range(world.size(400, 5)):
        writer.writerow([EMOJI + "x" * 120_000, str(number)])
    for name, body in (
        ("fields.csv", text.getvalue().encode()),
        ("lines.csv", b"a,b\n" + b"1,2\n" * world.size(2_000_000, 1_000)),
        ("packed.jsonl.gz", gzip.compress(row(1, "x" * 1_000) * world.size(100_000, 100))),
    ):
        key = f"in/{TENANT}/{name}"
        stem = name.partition(".")[0]
        world.cloud.drop(f"in/{TENANT}/{stem}.options.json", json.dumps(options).encode())
        world.cloud.drop(key, body)
        yield _arrived(key)


def batches_documents(world: World) -> Iterator[dict[str, Any]]:
    """A folder of documents as large as a row may be."""
    folder = f"in/{TENANT}/documents/"
    text = (EMOJI + "x" * world.size(MOST_LINE_BYTES - 2_000, 1_000)).encode()
    for number in range(4):
        world.cloud.drop(f"{folder}{number}.txt", text)
        world.cloud.drop(f"{folder}{number}.pdf", text[: len(text) * 3 // 4 - 1_000])
    options = {"prompt": "Read.", "model": MODEL, "max_tokens": 64}
    world.cloud.drop(f"{folder}options.json", json.dumps(options).encode())
    yield _arrived(f"{folder}options.json")


def _joined(
    world: World, parts: int, make: Callable[[int], Iterator[Record]]
) -> Iterator[dict[str, Any]]:
    """Store the parts of a section that is ready to be joined; the batch ends with it."""
    digits = f"{_CHANCE.getrandbits(128):032x}"
    plan = Plan(0, parts, 1, parts, 1)
    batch = _batch(digits, f"in/{TENANT}/{digits}.jsonl", "etag", plan=plan, phase=Phase.RUNNING)
    batch_stores.batches().add(batch)
    for number in range(parts):
        rows = lines = 0
        with io.BytesIO() as part:
            for each in make(number):
                part.write(each.encoded())
                rows += each.kind == "R"
                lines += 1
            part.write(Record("H", 0, lines, "", Tally(lines=lines), "").encoded())
            world.cloud.drop(batch.part_key(number), part.getvalue())
        tally = Tally(lines=lines, succeeded=rows)
        batch_stores.batches().mark(batch.batch_id, "section#000000", number, tally)
    pointer = json.dumps({"v": 1, "batch_id": batch.batch_id, "join": 0})
    yield {"Records": [record(digits, pointer)]}


def _result(number: int, offset: int, line: int, text: str) -> Record:
    name = f"r{number}"
    body = json.dumps({"custom_id": name, "result": {"type": "succeeded", "message": text}})
    return Record("R", offset, line, name, Tally(succeeded=1), body)


def batches_large_parts(world: World) -> Iterator[dict[str, Any]]:
    """Parts of 75 MB, with answers of 768 KB."""
    text = EMOJI + noise(world.size(768 * 1024, 2_000))
    rows = world.size(100, 10)

    def part(number: int) -> Iterator[Record]:
        for line in range(rows):
            yield _result(number * rows + line, line, line, text)

    yield from _joined(world, world.size(8, 2), part)


def batches_many_rows(world: World) -> Iterator[dict[str, Any]]:
    """A section of two million rows, half of which have the `custom_id` of an earlier one."""
    rows = world.size(100_000, 500)

    def part(number: int) -> Iterator[Record]:
        for line in range(rows):
            place = number * rows + line
            yield _result(place // 2, place, line, "yes")

    yield from _joined(world, world.size(20, 2), part)


# Message Batches -------------------------------------------------------------------------------------------


def _upstream(body: bytes, lines_per_range: int, **facts: Any) -> tuple[UpstreamBatch, int]:
    """Put a file of equally long lines on record as a batch in one upstream batch; return the length of a line."""
    digits = f"{_CHANCE.getrandbits(128):032x}"
    key = f"in/{TENANT}/{digits}.jsonl"
    _objects().put(key, body)
    stored = _objects().head(key)
    assert stored is not None  # noqa: S101 - it was stored a moment ago
    length = body.index(b"\n") + 1
    size = length * lines_per_range
    plan = Plan(0, len(body), size, -(-len(body) // size), length)
    batch = _batch(digits, key, stored.etag, plan=plan, phase=Phase.RUNNING, lane="batch")
    batch_stores.batches().add(batch)
    part, now = Slice(batch.batch_id, 0, plan.ranges), shared.CLOCK.now()
    record = UpstreamBatch(
        upstream_id=upstream_id_of(part, 1),
        tenant=TENANT,
        slices=(part,),
        anthropic_version="2023-06-01",
        anthropic_beta=None,
        created_at=now,
        expires_at=now + DAY_MS,
        due_at=now,
        **facts,
    )
    batch_stores.upstream_records().add(record)
    return record, length


def _message_batch(
    world: World, count: int, lines_per_range: int, answer_bytes: int
) -> Iterator[dict[str, Any]]:
    """Let a Message Batch of so many requests have ended; its results come in any order."""
    body = b"".join(row(10**6 + number, "hi") for number in range(count))
    now = shared.CLOCK.now()
    record, length = _upstream(
        body, lines_per_range, phase=upstream_batches.Phase.ENDED, requests=count, models=(MODEL,),
        key_id="main", message_batch_id=MESSAGE_BATCH, accepted_at=now, ended_at=now,
    )  # fmt: skip
    order = list(range(count))
    _CHANCE.shuffle(order)
    world.servers.answer_bytes = answer_bytes

    def results() -> Iterator[bytes]:
        text = world.servers.text()
        for number in order:
            name = RowId(0, number // lines_per_range, number * length)
            yield succeeded(name.text(record.prefix), text)

    world.servers.results = results
    yield {"upstream_id": record.upstream_id}


def upstream_results(world: World) -> Iterator[dict[str, Any]]:
    """A Message Batch with as many requests as it may have, and answers of 4 KB."""
    yield from _message_batch(world, world.size(100_000, 400), LINES_ON_BATCH_LANE, 4_000)


def upstream_one_range(world: World) -> Iterator[dict[str, Any]]:
    """All results in one range, as a planner may cut it that saw longer lines everywhere it looked."""
    count = world.size(60_000, 100)
    yield from _message_batch(world, count, count, 8_000)


def upstream_long_answers(world: World) -> Iterator[dict[str, Any]]:
    """The longest answers that Claude gives."""
    yield from _message_batch(world, world.size(4_000, 20), 100, world.size(768 * 1024, 2_000))


def upstream_body(world: World) -> Iterator[dict[str, Any]]:
    """A Message Batch with as many requests as it may have, and nearly as many bytes; the last rows do not fit."""
    count, size = world.size(100_000, 400), 2_450
    body = b"".join(row(10**6 + number, "x" * size) for number in range(count))
    record, _ = _upstream(body, 400)
    yield {"upstream_id": record.upstream_id}


def _goes_on(full: int, small: int) -> Callable[[World], bool]:
    """Say whether every range was given its results and sent on."""
    return lambda world: _queued(world, "RangesQueue") == world.size(full, small)


# The others ------------------------------------------------------------------------------------------------


def governor_due(world: World) -> Iterator[dict[str, Any]]:
    """As many parked jobs and waiting ranges as one run reads."""
    now = shared.CLOCK.now()
    client = world.cloud.client("dynamodb")
    items = []
    for number in range(world.size(10_000, 100)):
        job = replace(_job(f"job_{number:032x}", now - DAY_MS), metadata={"note": "x" * 500})
        parked = park(job, now - 7_200_000, reason="spend limit", not_before=now - 1_000)
        items.append({"PutRequest": {"Item": job_records.encode(parked, 30)}})
    for start in range(0, len(items), 25):
        client.batch_write_item(RequestItems={"JobsTable": items[start : start + 25]})
    batch = _batch("e" * 32, f"in/{TENANT}/e.jsonl", "etag", phase=Phase.RUNNING)
    batch_stores.batches().add(replace(batch, plan=Plan(0, 10**6, 100, 10**4, 1)))
    for number in range(world.size(1_000, 10)):
        state = batch_stores.batches().range_state(batch, number)
        claimed = claim_range(state, "bench", now - 10**7, now - 10**7 + 1)
        released = release_range(
            claimed, "bench", chunks=("1-1",), not_before=now - 1_000, model=MODEL
        )
        batch_stores.batches().replace_range(released, 0)
    yield json.loads((ROOT / "events" / "schedule.json").read_text())


def webhooks_slow(world: World) -> Iterator[dict[str, Any]]:
    """Ten large events at once, to receivers that answer slowly and at length."""
    body = noise(world.size(250_000, 1_000))
    message = {"v": 1, "tenant": TENANT, "url": f"{world.url}/webhook", "body": body}
    yield {
        "Records": [
            record(f"m{number}", json.dumps(message | {"webhook": f"job-{number}"}))
            for number in range(MESSAGES_OF_AN_EVENT)
        ]
    }


def _ended(now: int, number: int, error_bytes: int) -> Job:
    error = JobError("invalid_request_error", noise(error_bytes), 400)
    metadata = {f"field-{each}": noise(500) for each in range(16)}
    job = replace(
        _job(f"job_{number:032x}", now), metadata=metadata, webhook="https://example.com/hook"
    )
    return finish_waiting(job, State.ERRORED, now, error)


def job_ends_largest(world: World) -> Iterator[dict[str, Any]]:
    """A hundred ended jobs with as much in their records as an event takes."""
    now = shared.CLOCK.now()
    size = world.size(EVENT_BYTES // 100 - 11_000, 100)
    records = []
    for number in range(JOBS_OF_AN_EVENT):
        image = job_records.encode(_ended(now, number, size), 30)
        records.append(
            {
                "eventID": str(number),
                "eventName": "MODIFY",
                "eventSource": "aws:dynamodb",
                "dynamodb": {
                    "Keys": {"job_id": image["job_id"]},
                    "NewImage": image,
                    "SequenceNumber": str(number),
                },
            }
        )
    yield {"Records": records}


def dead_letters_largest(world: World) -> Iterator[dict[str, Any]]:
    """Ten messages that are as large as an event takes."""
    text = noise(world.size(EVENT_BYTES // 10 - 1_000, 1_000))
    yield {"Records": [record(f"m{number}", text) for number in range(MESSAGES_OF_AN_EVENT)]}


# What must have happened --------------------------------------------------------------------------------------


def _keys(world: World, prefix: str, ending: str = "") -> int:
    pages = world.cloud.client("s3").get_paginator("list_objects_v2")
    found = pages.paginate(Bucket=BUCKET, Prefix=prefix)
    keys = [each["Key"] for page in found for each in page.get("Contents", ())]
    return sum(key.endswith(ending) for key in keys)


def _queued(world: World, queue: str) -> int:
    return len(world.cloud.received(queue, 20_000)["Records"])


def _answered(world: World) -> bool:
    """The statuses say it all."""
    return world is not None


def _called(full: int, small: int) -> Callable[[World], bool]:
    """Say whether Claude was called so often, and once for each."""
    return lambda world: world.servers.calls == world.size(full, small)


def _range_ended(full: int, small: int) -> Callable[[World], bool]:
    """Say whether every row was called once, and the range's part is stored."""
    called = _called(full, small)
    return lambda world: called(world) and _parts(world) == 1


def _parts(world: World) -> int:
    pages = world.cloud.client("s3").get_paginator("list_objects_v2")
    found = pages.paginate(Bucket=BUCKET, Prefix="batches/")
    return sum("/parts/" in each["Key"] for page in found for each in page.get("Contents", ()))


def _planned(files: int) -> Callable[[World], bool]:
    """Return whether the rows of this many files were written, and ranges were sent."""
    return lambda world: (
        _keys(world, "batches/", "rows.jsonl") == files and _queued(world, "RangesQueue") > 0
    )


LOADS: Final = (
    Load(
        "api", "lists of 4,000,000 bytes", api_lists, _answered, ("202", "202", "200"), 28,
    ),
    Load("api", "4,000,000 bytes of empty objects", api_nested, _answered, ("202",), 28),
    Load("api", "largest answer, largest results", api_answers, _answered, ("200",), 28),
    Load("worker", "120 jobs of 4 MB", worker_large, _called(120, 4)),
    Load(
        "ranges", "long first line, 6,000 rows", ranges_long_first_line, _range_ended(6_000, 50),
    ),
    Load("ranges", "8 MiB of lines of one byte", ranges_tiny_lines, _range_ended(1, 1)),
    Load("ranges", "lines of 8 MiB", ranges_largest_lines, _range_ended(4, 4)),
    Load("ranges", "lines of 256 KB at once", ranges_large_lines, _range_ended(60, 60)),
    Load("ranges", "lines of 8 MiB of empty objects", ranges_nested_lines, _range_ended(3, 3)),
    Load("ranges", "answers of 768 KB", ranges_large_answers, _range_ended(150, 30)),
    Load(
        "ranges", "unexpected answers of 768 KB", ranges_answers_beyond, _range_ended(150, 30),
    ),
    Load("batches", "CSV and gzip", batches_files, _planned(3)),
    Load("batches", "documents of 8 MiB", batches_documents, _planned(1)),
    Load(
        "batches", "parts of 75 MB", batches_large_parts,
        lambda world: _keys(world, "out/", "summary.json") == 1,
    ),
    Load(
        "batches", "2,000,000 rows, half repeated", batches_many_rows,
        lambda world: _keys(world, "out/", "summary.json") == 1,
    ),
    Load("upstream", "100,000 results of 4 KB", upstream_results, _goes_on(250, 1)),
    Load("upstream", "60,000 results of 8 KB in one range", upstream_one_range, _goes_on(1, 1)),
    Load("upstream", "4,000 results of 768 KB", upstream_long_answers, _goes_on(40, 1)),
    Load(
        "upstream", "body of 255 MB", upstream_body,
        lambda world: world.servers.body_bytes > world.size(250 * MB, MB),
    ),
    Load(
        "job_ends", "100 records, 6 MB", job_ends_largest,
        lambda world: _queued(world, "WebhooksQueue") == JOBS_OF_AN_EVENT, seconds=60,
    ),
    Load(
        "webhooks", "10 large events, slow receivers", webhooks_slow,
        lambda world: world.servers.webhooks == MESSAGES_OF_AN_EVENT, seconds=60,
    ),
    Load(
        "governor", "10,000 due jobs, 1,000 ranges", governor_due,
        lambda world: _queued(world, "JobsQueue") > 0 and _queued(world, "RangesQueue") > 0,
        seconds=60,
    ),
    Load(
        "dead_letters", "10 messages, 6 MB", dead_letters_largest,
        lambda world: _keys(world, "dead-letters/") == MESSAGES_OF_AN_EVENT, seconds=60,
    ),
)  # fmt: skip


def functions() -> list[str]:
    """Return the functions that are measured, in the order of the table."""
    return list(dict.fromkeys(load.function for load in LOADS))
