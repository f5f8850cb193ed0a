"""A range in windows: whatever its lines and answers are, it ends as if it had been in memory whole."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sluice.domain.batches import (
    Options,
    Plan,
    RangeState,
    Tally,
    cancel_batch,
    plan_batch,
    row_job_id,
)
from sluice.domain.pricing import Usage
from sluice.domain.rows import Record
from sluice.ports.claude import Answer, CallRequest
from sluice.worker import range_rows, range_source, range_windows
from tests.bulk_fakes import Bulk, a_row, jsonl
from tests.fakes import MINUTE, NOON, refused
from tests.unit.test_ranges import ids, kill_after, said

Make = Callable[..., Bulk]
ROWS = 100


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Windows of ten rows, so that a range of a hundred has ten."""
    monkeypatch.setattr(range_windows, "WINDOW_ROWS", 10)
    made: list[Bulk] = []

    def one(*script: Any, **facts: Any) -> Bulk:
        made.append(Bulk(*script, **facts))
        return made[-1]

    yield one
    for each in made:
        each.close()


def numbers(bulk: Bulk) -> list[int]:
    return [int(each.removeprefix("row-")) for each in ids(bulk.results())]


def calls(bulk: Bulk) -> Counter[int]:
    return Counter(int(said(call.request).removeprefix("Say ")) for call in bulk.claude.calls)


def as_one_range(bulk: Bulk, rows: bytes, **facts: Any) -> None:
    """Plan an object as a single range, as a planner does that saw only long lines."""
    batch = bulk.add(rows, **facts)
    plan = Plan(first=0, size=len(rows), range_bytes=len(rows), ranges=1, line_bytes=1)
    bulk.queues.ranges.clear()
    bulk.batches.stored[batch.batch_id] = plan_batch(batch, plan)
    bulk.queues.send_ranges(bulk.batch, [0])


def chunks_of(bulk: Bulk) -> dict[str, bytes]:
    return {key: body for key, body in bulk.objects.stored.items() if "/chunks/" in key}


def test_rows_of_many_windows_have_their_results_in_the_order_of_the_file(make: Make) -> None:
    bulk = make()

    as_one_range(bulk, jsonl(*(a_row(number) for number in range(ROWS))))
    bulk.drain()

    assert list(range(ROWS)) == numbers(bulk)
    assert {1} == set(calls(bulk).values())
    assert ROWS == bulk.summary()["counts"]["lines"] == bulk.summary()["counts"]["succeeded"]
    assert ROWS == bulk.events.counted("JobsAccepted")
    assert [] == bulk.events.errors


def test_no_more_rows_than_a_window_are_in_memory(make: Make) -> None:
    bulk = make()
    in_memory: list[int] = []
    runner = bulk.runner()

    def count(request: CallRequest) -> None:
        del request
        in_memory.append(len(runner.rows.seats()))

    bulk.claude.when = count
    as_one_range(bulk, jsonl(*(a_row(number) for number in range(35))))
    bulk.time.run(bulk.invoke(runner))

    assert {10, 5} == set(in_memory)


def test_a_window_holds_few_large_lines_and_one_of_any_size(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_windows, "WINDOW_BYTES", 1_000)
    bulk = make()
    texts: list[int] = []
    runner = bulk.runner()

    def count(request: CallRequest) -> None:
        del request
        texts.append(sum(len(seat.line.text) for seat in runner.rows.seats()))

    bulk.claude.when = count
    rows = [a_row(1), a_row(2, system="x" * 600), a_row(3, system="x" * 5_000), a_row(4)]
    as_one_range(bulk, jsonl(*rows))
    bulk.time.run(bulk.invoke(runner))

    assert 4 == len(texts)
    assert [True, False, True, True] == [
        size <= 1_000 for size in (texts[0], max(texts), texts[1], texts[3])
    ]


def test_millions_of_bad_lines_are_windows_of_their_own(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_windows, "WINDOW_BAD_BYTES", 2_000)
    bulk = make()

    as_one_range(bulk, jsonl(a_row(0), *([b"?"] * 50), a_row(1), b"", b"?"))
    bulk.drain()

    windows = [key for key in chunks_of(bulk) if b'"error"' in bulk.objects.stored[key]]
    assert len(windows) >= 50 * 300 // 2_000 // 2
    assert [*range(2, 52), 54] == [error["line"] for error in bulk.errors()]
    assert [0, 1] == numbers(bulk)


def test_a_custom_id_of_another_window_of_the_range_has_one_result(make: Make) -> None:
    bulk = make()

    as_one_range(bulk, jsonl(*(a_row(number) for number in range(30)), a_row(3)))
    bulk.drain()

    assert list(range(30)) == numbers(bulk)
    (error,) = bulk.errors()
    assert (31, "row-3") == (error["line"], error["custom_id"])


@pytest.mark.parametrize("seconds", [0.5, 2.6, 4.6, 7.6])
def test_a_worker_that_dies_in_any_window_repeats_none_of_those_before(
    make: Make, seconds: float
) -> None:
    bulk = make(latency_ms=1_000)
    rows = [a_row(number) for number in range(ROWS)]
    rows[77] = a_row(3)

    as_one_range(bulk, jsonl(*rows))
    kill_after(bulk, seconds)
    (state,) = bulk.batches.ranges.values()
    bulk.drain()

    assert [number for number in range(ROWS) if number != 77] == numbers(bulk)
    # Row 3 is in the file twice.
    again = {number for number, count in calls(bulk).items() if count > 1} - {3}
    assert again <= set(range(state.windows * 10, state.windows * 10 + 10))
    assert [78] == [error["line"] for error in bulk.errors()]


def test_rows_that_wait_for_long_give_the_range_back_with_its_windows(make: Make) -> None:
    bulk = make()
    wait = refused(429, "rate_limit_error", retry_after_ms=5 * MINUTE)
    bulk.claude.when = lambda request: wait if said(request) == "Say 15" else None
    as_one_range(bulk, jsonl(*(a_row(number) for number in range(40))))

    assert not bulk.once()
    (state,) = bulk.batches.ranges.values()
    bulk.claude.when = lambda _: None
    bulk.drain()

    assert (1, 10) == (state.windows, state.resume_line)
    assert list(range(40)) == numbers(bulk)
    assert {15: 2} == {number: count for number, count in calls(bulk).items() if count > 1}


def test_an_invocation_that_ends_between_windows_loses_nothing(make: Make) -> None:
    bulk = make(latency_ms=20_000)
    as_one_range(bulk, jsonl(*(a_row(number) for number in range(40))))

    assert not bulk.once(minutes=1)
    bulk.drain()

    assert list(range(40)) == numbers(bulk)
    assert {1} == set(calls(bulk).values())
    assert [] == bulk.events.problems


def test_a_cancel_ends_the_rows_of_later_windows_too(make: Make) -> None:
    bulk = make(latency_ms=5_000)
    as_one_range(bulk, jsonl(*(a_row(number) for number in range(ROWS))))

    async def story() -> bool:
        task = asyncio.ensure_future(bulk.invoke())
        await asyncio.sleep(12)
        bulk.batches.replace(cancel_batch(bulk.batch, NOON), bulk.batch.version)
        return await task

    assert bulk.time.run(story())
    bulk.drain()
    kinds = Counter(row["result"]["type"] for row in bulk.results())
    assert ROWS == sum(kinds.values())
    assert kinds["succeeded"] <= 40
    assert kinds["canceled"] >= 60


def test_a_busy_store_between_windows_delays_them_and_loses_nothing(make: Make) -> None:
    bulk = make(latency_ms=100)
    as_one_range(bulk, jsonl(*(a_row(number) for number in range(40))))

    async def story() -> bool:
        task = asyncio.ensure_future(bulk.invoke())
        for _ in range(8):
            await asyncio.sleep(0.15)
            bulk.objects.fail_next("put")
            bulk.batches.fail_next("replace_range")
        return await task

    bulk.time.run(story())
    bulk.drain()

    assert list(range(40)) == numbers(bulk)
    assert {1} == set(calls(bulk).values())


@pytest.mark.parametrize("windows", [0, 2])
def test_a_store_that_is_busy_while_a_range_is_read_errors_no_row(
    make: Make, monkeypatch: pytest.MonkeyPatch, windows: int
) -> None:
    """Its workers do not die: after five minutes nothing says that a row kills them."""
    monkeypatch.setattr(range_windows, "PIECE_BYTES", 1_000)
    bulk = make(latency_ms=1_000)
    as_one_range(bulk, jsonl(*(a_row(number) for number in range(40))))

    async def story() -> None:
        if windows:
            task = asyncio.ensure_future(bulk.invoke())
            await asyncio.sleep(windows * 1.5)
            bulk.objects.break_down("read")
            await task
        bulk.objects.break_down("read")
        end = bulk.time.now() + 5 * MINUTE
        while (due := bulk.queues.next_visible()) is not None and due < end:
            await asyncio.sleep(max(0, due - bulk.time.now()) / 1000)
            assert not await bulk.invoke()

    bulk.time.run(story())
    bulk.objects.recover()
    bulk.drain()

    assert list(range(40)) == numbers(bulk)
    assert {1} == set(calls(bulk).values())
    assert {"range not read"} == set(bulk.events.problem_names)


def test_records_that_are_too_much_to_hold_are_read_back_from_what_was_saved(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_rows, "HELD_BYTES", 2_000)
    monkeypatch.setattr(range_rows, "SAVE_BYTES", 1_500)
    bulk = make(latency_ms=100)
    held: list[int] = []
    runner = bulk.runner()

    def large(request: CallRequest) -> Answer:
        rows = [seat.ended for seat in runner.rows.seats() if seat.ended and seat.ended.chunk]
        held.append(sum(len(each.text) for each in rows if each.text))
        text = f"{said(request)} " * 50
        message = {"content": [{"type": "text", "text": text}], "stop_reason": "end_turn"}
        return Answer(json.dumps(message), Usage(), "end_turn", "req_1")

    bulk.claude.when = large
    as_one_range(bulk, jsonl(*(a_row(number) for number in range(40))))
    bulk.time.run(bulk.invoke(runner))
    bulk.drain()

    assert list(range(40)) == numbers(bulk)
    texts = [row["result"]["message"]["content"][0]["text"] for row in bulk.results()]
    assert [f"Say {number} " * 50 for number in range(40)] == texts
    assert max(held) <= 2_000


def test_no_more_answers_are_expected_at_once_than_fit_into_memory(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(range_windows, "WINDOW_ROWS", 50)
    monkeypatch.setattr(range_source, "ANSWERS_BYTES", 10 * 4_000)
    small, large = make(latency_ms=1_000), make(latency_ms=1_000)

    as_one_range(small, jsonl(*(a_row(number, max_tokens=100) for number in range(50))))
    small.drain()
    as_one_range(large, jsonl(*(a_row(number, max_tokens=1_000) for number in range(50))))
    large.drain()

    assert small.claude.most_in_flight > 40
    assert 10 == large.claude.most_in_flight


def test_a_range_that_lost_workers_runs_fewer_rows_at_once(make: Make) -> None:
    """If it is their answers that kill the workers, a few of them fit; if it is one row, the others are saved."""
    bulk = make(latency_ms=30_000)
    bulk.upload(jsonl(*(a_row(number) for number in range(9))))
    started = []

    for _ in range(4):
        due = bulk.queues.next_visible()
        assert due is not None

        async def until_due(due: int = due) -> None:
            await asyncio.sleep(max(0, due - bulk.time.now()) / 1000)

        bulk.time.run(until_due())
        before = len(bulk.claude.calls)
        kill_after(bulk, 12)
        started.append(len(bulk.claude.calls) - before)

    assert min(started[:2]) > 7
    assert [7, 1] == started[2:]


# What the version before windows stored ------------------------------------------------------------------------


def test_chunks_of_the_version_before_are_restored_whichever_window_their_rows_are_in(
    make: Make,
) -> None:
    bulk = make()
    rows = jsonl(*(a_row(number) for number in range(40)))
    as_one_range(bulk, rows)
    saved = [2, 17, 31, 5]
    offsets = [0]
    for line in rows.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    records = [
        Record("R", offsets[n], n, f"row-{n}", Tally(succeeded=1), _result(n)).encoded()
        for n in saved
    ]
    key = bulk.batch.chunk_key(0, "1-1")
    bulk.objects.put(key, b"".join(records))
    state = RangeState(bulk.batch.batch_id, 0, "acme", version=3, claims=1, chunks=("1-1",))
    bulk.batches.ranges[bulk.batch.batch_id, 0] = state

    bulk.drain()

    assert list(range(40)) == numbers(bulk)
    assert set(range(40)) - set(saved) == set(calls(bulk))
    kept = [row for row in bulk.results() if row["custom_id"] in {f"row-{n}" for n in saved}]
    assert {"saved"} == {row["result"]["message"]["id"] for row in kept}


def _result(number: int) -> str:
    return json.dumps(
        {
            "custom_id": f"row-{number}",
            "result": {"type": "succeeded", "message": {"id": "saved", "content": []}},
        }
    )


def test_a_part_that_begins_with_its_count_of_lines_is_joined_as_before(make: Make) -> None:
    bulk = make()
    bulk.upload(jsonl(a_row(1), b"?", a_row(2)))
    records = [
        Record("H", 0, 0, "", Tally(lines=3), ""),
        Record("R", 0, 0, "row-1", Tally(succeeded=1), _result(1)),
        Record("E", 9, 1, "", Tally(invalid=1), '{"offset":9,"error":{}}'),
        Record("R", 20, 2, "row-2", Tally(succeeded=1), _result(2)),
    ]
    bulk.objects.put(bulk.batch.part_key(0), b"".join(each.encoded() for each in records))
    done = RangeState(bulk.batch.batch_id, 0, "acme", version=4, claims=1, done=True)
    bulk.batches.ranges[bulk.batch.batch_id, 0] = done

    bulk.drain()

    assert [1, 2] == numbers(bulk)
    assert [2] == [error["line"] for error in bulk.errors()]
    counts = bulk.summary()["counts"]
    assert (3, 2, 1) == (counts["lines"], counts["succeeded"], counts["invalid"])
    assert [] == bulk.claude.calls


# The object cannot be read any more ----------------------------------------------------------------------------


def test_answers_that_were_saved_outlive_the_file(make: Make) -> None:
    bulk = make()
    wait = refused(529, "overloaded_error", retry_after_ms=5 * MINUTE)
    bulk.claude.when = lambda request: wait if said(request) == "Say 25" else None
    as_one_range(bulk, jsonl(*(a_row(number) for number in range(30))))

    bulk.once()
    answered = len(bulk.claude.answered)
    del bulk.objects.stored[bulk.batch.input_key]
    bulk.drain()

    assert answered == 29 == len(bulk.results())
    (error,) = bulk.errors()
    assert "was deleted or replaced while the batch ran" in error["error"]["message"]


def test_a_job_keeps_the_id_that_its_byte_offset_gives_it(make: Make) -> None:
    bulk = make()
    rows = jsonl(*(a_row(number) for number in range(25)))

    as_one_range(bulk, rows, options=Options())
    bulk.drain()

    offset = rows.index(b'{"custom_id": "row-24"')
    assert row_job_id(bulk.batch.batch_id, offset) in {
        row.job_id for row in bulk.ledger.rows.values()
    }
