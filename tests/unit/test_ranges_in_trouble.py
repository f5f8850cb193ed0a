"""Ranges beside busy stores, cancels, deadlines and lost messages: nothing is used up, and nothing waits for long."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from sluice.bulk.sections import PART_MISSING
from sluice.domain.batches import (
    LATE_MS,
    MOST_LOST_READING,
    Batch,
    Options,
    Phase,
    cancel_batch,
)
from sluice.domain.errors import StoreBusy
from sluice.domain.rows import Line
from sluice.ports.claude import CallRequest, Refused
from sluice.upkeep.resume import Resume
from sluice.worker import range_rows, range_windows
from sluice.worker.range_claim import HIDE_MS, LEASE_MS
from sluice.worker.range_windows import DEADLY
from tests.bulk_fakes import Bulk, MemoryBatches, a_row, jsonl, number_in
from tests.fakes import MINUTE, NOON, SECOND, Call, VirtualClock, known_group, refused

HOUR = 60 * MINUTE
LONG = refused(429, "rate_limit_error", retry_after_ms=2 * HOUR)

Make = Callable[..., Bulk]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Bulk] = []

    def one(*script: Any, **facts: Any) -> Bulk:
        made.append(Bulk(*script, **facts))
        made[-1].time.longest_story_ms = 40 * 24 * HOUR
        return made[-1]

    yield one
    for each in made:
        each.close()


def of(count: int) -> bytes:
    return jsonl(*(a_row(number) for number in range(count)))


def kinds(bulk: Bulk) -> Counter[str]:
    return Counter(row["result"]["type"] for row in bulk.results())


def sweep(bulk: Bulk) -> Resume:
    clock, groups = VirtualClock(bulk.time), {"claude-a": "a"}
    limits = bulk.gateway.limits
    return Resume(
        bulk.batches, bulk.batches, bulk.queues, bulk.queues, limits, groups, clock, bulk.events
    )


async def minute_by_minute(bulk: Bulk, at: Callable[[int], None] = lambda _: None) -> None:
    """Run what is due, and the schedule every minute, until the batch has ended; `at` is called with each minute."""
    due_again = sweep(bulk)
    for minute in range(14 * 24 * 60):
        await visible(bulk)
        for batch_id in bulk.queues.plans:
            bulk.planner.plan(batch_id)
        bulk.queues.plans.clear()
        await visible(bulk)
        if bulk.batch.phase is Phase.ENDED:
            return
        at(minute)
        await asyncio.sleep(60)
        due_again(bulk.time.now() + 50 * SECOND)


async def visible(bulk: Bulk) -> None:
    while (due := bulk.queues.next_visible()) is not None and due <= bulk.time.now():
        await bulk.invoke()


# Busy stores -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("store", "verb"), [("objects", "read"), ("batches", "range_state")])
def test_a_store_that_is_busy_for_long_ends_no_row_and_uses_nothing_up(
    make: Make, store: str, verb: str
) -> None:
    bulk = make()
    bulk.upload(of(300))
    broken = getattr(bulk, store)
    broken.break_down(verb)

    async def story() -> None:
        while bulk.time.now() < NOON + HOUR:
            assert not await bulk.invoke()
            due = bulk.queues.next_visible()
            assert due is not None
            assert due <= bulk.time.now() + HIDE_MS
            await asyncio.sleep(max(0, due - bulk.time.now()) / 1000)

    bulk.time.run(story())
    assert all(state.losses == 0 for state in bulk.batches.ranges.values())
    broken.recover()
    bulk.drain()

    assert {"succeeded": 300} == kinds(bulk)
    assert 300 == len(bulk.claude.calls)


@pytest.mark.parametrize("verb", ["get", "range_state", "replace_range"])
def test_one_busy_reply_hides_a_range_for_seconds(make: Make, verb: str) -> None:
    bulk = make()
    bulk.upload(of(10))
    bulk.batches.fail_next(verb)

    assert not bulk.once()

    due = bulk.queues.next_visible()
    assert due is not None
    assert due <= bulk.time.now() + LEASE_MS
    assert ["range not started"] == bulk.events.problem_names


def test_a_message_is_hidden_for_less_than_a_minute_before_anything_is_read(make: Make) -> None:
    bulk = make()
    bulk.upload(of(10))
    seen: list[int | None] = []

    class Watched(MemoryBatches):
        def get(self, batch_id: str) -> Batch | None:
            seen.append(bulk.queues.next_visible())
            return super().get(batch_id)

    bulk.batches.__class__ = Watched

    bulk.once()

    assert seen[0] is not None
    assert seen[0] <= NOON + HIDE_MS


def test_a_queue_that_is_busy_delays_nothing(make: Make) -> None:
    bulk = make()
    bulk.upload(of(10))
    bulk.queues.fail_next("put_back", 1)

    assert bulk.once()

    assert {"succeeded": 10} == kinds(bulk)


@pytest.mark.parametrize("outage_s", [20, 45, 300])
def test_a_bucket_that_takes_no_writes_costs_no_call_and_no_lease(
    make: Make, outage_s: int
) -> None:
    bulk = make(latency_ms=2_000)
    bulk.gateway.know(known_group("org", "a"))
    bulk.upload(of(100))
    bulk.objects.break_down("put")

    async def story() -> None:
        asyncio.get_running_loop().call_later(outage_s, bulk.objects.recover)
        assert await bulk.invoke()

    bulk.time.run(story())

    assert bulk.time.now() < NOON + outage_s * SECOND + MINUTE
    assert {"succeeded": 100} == kinds(bulk)
    assert 100 == len(bulk.claude.calls) == len(bulk.claude.answered)
    assert not {"range lost", "range taken over"} & set(bulk.events.problem_names)


@pytest.mark.parametrize("outage_s", [20, 45, 300])
def test_a_table_that_takes_no_writes_costs_no_call_in_flight(make: Make, outage_s: int) -> None:
    bulk = make(latency_ms=20_000)
    bulk.gateway.know(known_group("org", "a"))
    bulk.upload(of(100))

    async def story() -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(5, lambda: bulk.batches.break_down("replace_range"))
        loop.call_later(5 + outage_s, bulk.batches.recover)
        assert await bulk.invoke()

    bulk.time.run(story())

    assert bulk.time.now() < NOON + outage_s * SECOND + 90 * SECOND
    assert {"succeeded": 100} == kinds(bulk)
    assert 100 == len(bulk.claude.calls) == len(bulk.claude.answered)


def test_no_row_starts_while_the_lease_cannot_be_renewed(make: Make) -> None:
    bulk = make(latency_ms=1_000)
    bulk.gateway.know(known_group("org", "a"))
    bulk.upload(of(100))
    broken_at = NOON + 500

    async def story() -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(0.5, lambda: bulk.batches.break_down("replace_range"))
        loop.call_later(300, bulk.batches.recover)
        await bulk.invoke()

    bulk.time.run(story())
    bulk.drain()

    starts = [call.at for call in bulk.claude.calls]
    assert not [at for at in starts if broken_at + LEASE_MS < at < NOON + 300 * SECOND]
    assert {"succeeded": 100} == kinds(bulk)
    assert 100 == len(bulk.claude.calls)


def test_answers_that_no_store_takes_blame_no_row_and_are_asked_for_again_only_once(
    make: Make,
) -> None:
    """The bucket refuses writes for hours: no invocation after the first one makes a call."""
    bulk = make()
    bulk.upload(of(3))
    bulk.objects.break_down("put")

    async def story() -> None:
        while bulk.time.now() < NOON + 3 * HOUR:
            assert not await bulk.invoke()
            (state,) = bulk.batches.ranges.values()
            assert (0, (), True) == (state.losses, state.blamed, state.dropped)
            due = bulk.queues.next_visible()
            assert due is not None
            await asyncio.sleep(max(0, due - bulk.time.now()) / 1000)

    bulk.time.run(story())
    assert 3 == len(bulk.claude.calls)
    bulk.objects.recover()
    bulk.drain()

    assert {"succeeded": 3} == kinds(bulk)
    assert 6 == len(bulk.claude.calls) == len(bulk.ledger.rows)
    summary, spent = bulk.summary(), [row.spend for row in bulk.ledger.rows.values()]
    assert sum(each.cost_micro_usd for each in spent) == summary["known_cost_micro_usd"]
    assert (6, 0) == (summary["calls"], summary["uncertain_calls"])


@dataclass(frozen=True)
class Doubtful:
    """Two rows: the first call of one may be billed, and it waits for a later invocation; the other goes on."""

    bulk: Bulk

    def said(self, request: CallRequest) -> Refused | None:
        is_first = [each.body for each in self.calls].count(request.body.data) == 1
        if not is_first:
            return None
        if b"Say 0" in bytes(request.body.data):
            return refused(None, may_be_billed=True, retry_after_ms=2 * HOUR)
        return refused(500, retry_after_ms=5 * SECOND)

    @property
    def calls(self) -> Sequence[Call]:
        return self.bulk.claude.calls

    def assert_booked(self, uncertain: int) -> None:
        summary, spent = (
            self.bulk.summary(),
            [each.spend for each in self.bulk.ledger.rows.values()],
        )
        assert {"succeeded": 2} == kinds(self.bulk)
        assert uncertain == sum(each.uncertain_calls for each in spent)
        assert uncertain == summary["uncertain_calls"]
        assert sum(each.cost_micro_usd for each in spent) == summary["known_cost_micro_usd"]


@pytest.fixture
def doubtful(make: Make) -> Doubtful:
    """Return the story, before its first invocation."""
    bulk = make(latency_ms=10_000)
    bulk.gateway.know(known_group("org", "a"))
    bulk.upload(of(2))
    story = Doubtful(bulk)
    bulk.claude.when = story.said
    return story


def test_the_calls_of_a_row_that_waits_when_its_worker_dies_count_in_its_batch(
    doubtful: Doubtful,
) -> None:
    """Its call had ended before the worker noted which rows are in flight for the last time."""
    bulk = doubtful.bulk

    async def story() -> None:
        task = asyncio.create_task(bulk.invoke())
        await asyncio.sleep(20)
        assert 3 == len(bulk.claude.calls)
        await bulk.kill(task)

    bulk.time.run(story())
    bulk.drain()

    # The call of the other row was in flight.
    doubtful.assert_booked(uncertain=2)


def test_the_calls_of_a_row_that_waits_when_no_store_takes_its_record_count_in_its_batch(
    doubtful: Doubtful,
) -> None:
    bulk = doubtful.bulk

    async def story() -> None:
        asyncio.get_running_loop().call_later(5, lambda: bulk.objects.break_down("put"))
        await bulk.invoke()
        (state,) = bulk.batches.ranges.values()
        assert state.dropped

    bulk.time.run(story())
    bulk.objects.recover()
    bulk.drain()

    doubtful.assert_booked(uncertain=1)


def test_an_unexpected_error_of_a_range_is_no_death_of_its_worker(make: Make) -> None:
    bulk = make()
    bulk.upload(of(3))
    bulk.objects.break_down("read", PermissionError("not permitted"))

    async def story() -> None:
        asyncio.get_running_loop().call_later(60, bulk.objects.recover)

    bulk.time.run(story())
    bulk.drain()

    assert {"succeeded": 3} == kinds(bulk)
    assert {"range failed"} == set(bulk.events.problem_names)
    assert bulk.time.now() < NOON + 3 * MINUTE


# Cancels and deadlines -------------------------------------------------------------------------------------


def canceled(bulk: Bulk) -> None:
    bulk.batches.replace(cancel_batch(bulk.batch, bulk.time.now()), bulk.batch.version)


@pytest.mark.parametrize("wait", [LONG, refused(429, "rate_limit_error", retry_after_ms=800_000)])
def test_a_cancel_wakes_the_ranges_that_wait(make: Make, wait: Any) -> None:
    """Parked ones, and those hidden in the queue; all at once, though the limits would let none start."""
    bulk = make()
    bulk.claude.otherwise = wait
    bulk.upload(of(1_000))

    bulk.time.run(minute_by_minute(bulk, lambda minute: canceled(bulk) if minute == 8 else None))

    assert {"canceled": 1_000} == kinds(bulk)
    ended_at, canceled_at = bulk.batch.ended_at or 0, bulk.batch.cancel_initiated_at or 0
    assert 4 * MINUTE > ended_at - canceled_at


def test_a_range_is_not_parked_once_its_batch_is_canceled(make: Make) -> None:
    bulk = make(latency_ms=1_000)
    bulk.claude.otherwise = LONG
    bulk.upload(of(3))

    async def story() -> None:
        asyncio.get_running_loop().call_later(0.5, lambda: canceled(bulk))
        await bulk.invoke()
        await visible(bulk)

    bulk.time.run(story())

    assert {"canceled": 3} == kinds(bulk)
    assert bulk.time.now() < NOON + MINUTE


def test_parked_ranges_of_an_expired_batch_end_without_waiting_for_limits(make: Make) -> None:
    bulk = make()
    bulk.claude.otherwise = LONG
    bulk.add(of(1_000), expires_at=NOON + HOUR)

    bulk.time.run(minute_by_minute(bulk))

    assert {"expired": 1_000} == kinds(bulk)
    assert HOUR <= (bulk.batch.ended_at or 0) - NOON < HOUR + 25 * MINUTE


def test_a_parked_range_wakes_for_the_deadline_of_a_row(make: Make) -> None:
    bulk = make()
    bulk.claude.otherwise = LONG
    row = a_row(1) | {"deadline": "2026-11-20T13:00:00Z"}
    bulk.add(jsonl(row, a_row(2)))

    bulk.once()

    (state,) = bulk.batches.ranges.values()
    assert (NOON + HOUR, None) == (state.not_before, state.model)


@pytest.mark.parametrize("minutes", [1, 10])
def test_a_file_whose_deadline_passed_before_it_was_planned_has_a_result_for_each_row(
    make: Make, minutes: int
) -> None:
    bulk = make()
    bulk.objects.fail_next("read")
    with pytest.raises(StoreBusy):
        bulk.upload(of(3), **{"sluice-deadline": "2026-11-20T12:01:00Z"})
    bulk.time.pass_seconds(60 * minutes)

    bulk.planner.plan(bulk.batch.batch_id)
    bulk.drain()

    assert {"expired": 3} == kinds(bulk)


def test_a_batch_that_expired_while_batches_were_paused_has_a_result_for_each_row(
    make: Make,
) -> None:
    """Its messages were in the queue for longer than the queue keeps them."""
    bulk = make()
    bulk.add(of(300), expires_at=NOON + 24 * HOUR)
    bulk.queues.ranges.clear()
    bulk.time.pass_seconds(20 * 24 * 3_600)

    bulk.time.run(minute_by_minute(bulk))

    assert {"expired": 300} == kinds(bulk)


# Lost messages ---------------------------------------------------------------------------------------------


def lose_one(bulk: Bulk) -> None:
    bulk.queues.ranges.pop(next(iter(bulk.queues.ranges)))


def test_a_lost_message_of_a_range_is_noticed_by_the_next_check(make: Make) -> None:
    bulk = make()
    bulk.gateway.know(known_group("org", "a"))
    bulk.upload(of(300))
    lose_one(bulk)

    bulk.time.run(minute_by_minute(bulk))

    assert {"succeeded": 300} == kinds(bulk)
    assert 300 == len(bulk.claude.calls)
    assert (bulk.batch.ended_at or 0) - NOON < 25 * MINUTE


def test_a_message_lost_while_its_range_waited_is_noticed(make: Make) -> None:
    bulk = make(refused(429, "rate_limit_error", retry_after_ms=600_000))
    bulk.upload(of(1))
    bulk.once()
    lose_one(bulk)

    bulk.time.run(minute_by_minute(bulk))

    assert {"succeeded": 1} == kinds(bulk)
    assert (bulk.batch.ended_at or 0) - NOON < 45 * MINUTE


def test_a_message_lost_after_the_sweep_has_sent_it_is_noticed(make: Make) -> None:
    bulk = make(refused(429, "rate_limit_error", retry_after_ms=HOUR))
    bulk.upload(of(1))
    lost: list[int] = []

    def at(_: int) -> None:
        if not lost and bulk.time.now() > NOON + HOUR and bulk.queues.ranges:
            lost.append(bulk.time.now())
            lose_one(bulk)

    async def story() -> None:
        await bulk.invoke()
        due_again = sweep(bulk)
        while not lost:
            await asyncio.sleep(60)
            due_again(bulk.time.now() + 50 * SECOND)
            bulk.queues.plans.clear()
            at(0)
        await minute_by_minute(bulk)

    bulk.time.run(story())

    assert {"succeeded": 1} == kinds(bulk)
    assert (bulk.batch.ended_at or 0) - lost[0] < 45 * MINUTE


def test_a_range_that_was_done_but_not_counted_is_counted_though_its_message_is_lost(
    make: Make,
) -> None:
    bulk = make()
    bulk.upload(of(3))
    bulk.batches.break_down("mark")

    async def story() -> None:
        await asyncio.wait_for(bulk.invoke(minutes=1), 600)
        lose_one(bulk)
        bulk.batches.recover()
        await minute_by_minute(bulk)

    bulk.time.run(story())

    assert {"succeeded": 3} == kinds(bulk)
    assert 3 == len(bulk.claude.calls)


def test_another_message_of_a_range_that_is_counted_reads_no_results(make: Make) -> None:
    bulk = make(joins_at_once=False)
    bulk.upload(of(300))
    bulk.once()
    (number,) = (each.number for each in bulk.batches.ranges.values())
    bulk.queues.ranges.clear()
    bulk.queues.send_ranges(bulk.batch, [number])
    bulk.objects.break_down("read")

    assert bulk.once()

    assert [] == bulk.events.problem_names


def test_ranges_that_wait_for_limits_are_not_taken_for_lost(make: Make) -> None:
    bulk = make()
    bulk.claude.otherwise = LONG
    bulk.upload(of(300))

    async def story() -> None:
        await visible(bulk)
        for _ in range(5):
            await asyncio.sleep(20 * 60)
            bulk.planner.plan(bulk.batch.batch_id)

    bulk.time.run(story())

    assert {} == bulk.queues.ranges


def test_a_long_queue_is_not_taken_for_lost(make: Make) -> None:
    """Many ranges wait in the queue for hours: none is sent twice."""
    bulk = make()
    bulk.upload(of(4_000))
    before = len(bulk.queues.ranges)
    assert before > 30

    for _ in range(17):
        bulk.time.pass_seconds(20 * 60)
        bulk.planner.plan(bulk.batch.batch_id)

    assert before == len(bulk.queues.ranges)


def test_a_few_lost_messages_are_noticed_beside_a_long_queue(make: Make) -> None:
    bulk = make()
    bulk.upload(of(300))
    lose_one(bulk)
    other = "another batch"
    message = next(iter(bulk.queues.ranges.values()))[0]
    bulk.queues.ranges["stranger"] = (message, other, 0, NOON)

    bulk.time.pass_seconds(20 * 60)
    bulk.planner.plan(bulk.batch.batch_id)

    own = [number for _, batch_id, number, _ in bulk.queues.ranges.values() if batch_id != other]
    assert {0, 1, 2} == set(own)


def test_a_busy_queue_is_not_taken_for_an_empty_one(make: Make) -> None:
    bulk = make()
    bulk.upload(of(4_000))
    before = len(bulk.queues.ranges)
    bulk.queues.break_down("backlog")

    bulk.time.pass_seconds(LATE_MS // 1000)
    bulk.planner.plan(bulk.batch.batch_id)

    assert before == len(bulk.queues.ranges)


def test_a_batch_ends_without_the_part_of_a_range_that_was_deleted(make: Make) -> None:
    bulk = make(joins_at_once=False)
    bulk.upload(of(300))
    while bulk.queues.next_visible() is not None:
        bulk.once()
    del bulk.objects.stored[bulk.batch.part_key(1)]

    bulk.drain()

    found = [row["custom_id"] for row in bulk.results()]
    first = next(number for number, name in enumerate(found) if name != f"row-{number}")
    assert ["row-299"] == found[-1:]
    assert 90 < first < 200 < len(found) < 210
    (error,) = bulk.errors()
    assert (first + 1, PART_MISSING) == (error["line"], error["error"]["message"])


@pytest.mark.parametrize("name", ["first.jsonl", "first.csv"])
def test_a_file_that_is_replaced_after_its_rows_were_kept_runs_as_it_was(
    make: Make, name: str
) -> None:
    """The planner of the first file met a busy store just after that."""
    bulk = make()
    body = of(3) if name.endswith("jsonl") else b"text\nSay 1\nSay 2\nSay 3\n"
    options = {"sluice-model": "claude-a", "sluice-max-tokens": "9", "sluice-prompt": "{text}"}

    bulk.batches.break_down("replace")
    with pytest.raises(StoreBusy):
        bulk.upload(body, name, **options)
    bulk.batches.recover()
    bulk.objects.stored[f"in/acme/{name}"] = b"another file"

    bulk.planner.plan(bulk.batch.batch_id)
    bulk.drain()

    assert {"succeeded": 3} == kinds(bulk)


# Rows ------------------------------------------------------------------------------------------------------


def test_saved_answers_survive_a_change_of_the_input(make: Make) -> None:
    bulk = make()

    def slow(request: CallRequest) -> Any:
        is_third = number_in(request.body.data) == 2
        wait = refused(529, "overloaded_error", retry_after_ms=5 * MINUTE)
        return wait if is_third else None

    bulk.claude.when = slow
    bulk.upload(of(3))
    bulk.once()
    del bulk.objects.stored[bulk.batch.input_key]
    bulk.claude.when = lambda _: None
    bulk.drain()

    assert ["row-0", "row-1"] == [row["custom_id"] for row in bulk.results()][:2]
    assert 2 == bulk.summary()["counts"]["succeeded"]
    assert 420 == bulk.summary()["cost_micro_usd"]


@pytest.mark.parametrize("levels", [101, 1_000, 100_000])
def test_a_row_that_is_nested_deeply_is_the_only_one_to_err(make: Make, levels: int) -> None:
    bulk = make()
    deep = (
        b'{"custom_id": "deep", "params": {"model": "claude-a", "max_tokens": 1, "messages": %s}}'
    )
    bulk.upload(jsonl(a_row(1), deep % (b"[" * levels + b"]" * levels), a_row(2)))

    bulk.drain()

    assert ["row-1", "row-2"] == [
        row["custom_id"] for row in bulk.results() if row["result"]["type"] == "succeeded"
    ]
    assert [2] == [error["line"] for error in bulk.errors()]


class Surprise(Exception):
    """What no rule expects."""


@pytest.mark.parametrize(
    ("module", "name"),
    [(range_windows, "read_row"), (range_rows, "read_row"), (range_rows, "job_record")],
)
def test_any_exception_of_a_row_is_its_result(
    make: Make, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> None:
    """When it is read, when its request is made, and when its result is written."""
    good = vars(module)[name]
    once = [True]

    def bad(*facts: Any) -> Any:
        is_second = any(getattr(each, "custom_id", "") == "row-1" for each in facts) or any(
            b"Say 1" in getattr(each, "text", b"") for each in facts
        )
        if is_second and once:
            once.clear()
            raise Surprise
        return good(*facts)

    monkeypatch.setattr(module, name, bad)
    bulk = make()
    bulk.upload(of(3))

    bulk.drain()

    found = {row["custom_id"]: row["result"]["type"] for row in bulk.results()}
    wrong = found.pop("row-1", None) or bulk.errors()[0]["error"]["type"]
    assert wrong in {"errored", "invalid_request_error"}
    assert {"row-0": "succeeded", "row-2": "succeeded"} == found
    assert bulk.time.now() < NOON + MINUTE
    assert 3 == bulk.summary()["counts"]["lines"]


@pytest.mark.parametrize("most", [10**15, 10**40])
def test_a_row_that_asks_for_any_number_of_tokens_hurts_no_other(make: Make, most: int) -> None:
    bulk = make()
    bulk.gateway.know(known_group("org", "a"))
    bulk.upload(jsonl(a_row(0), a_row(1, max_tokens=most), a_row(2)))

    bulk.time.run(minute_by_minute(bulk))

    assert {"succeeded": 3} == kinds(bulk)
    assert (bulk.batch.ended_at or 0) < NOON + 20 * MINUTE


class WorkerDied(BaseException):
    """As a process ends: no handler of ours sees it."""


def test_a_line_that_no_reader_survives_is_the_only_one_to_err(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parsed JSON can take more memory than the function has."""
    good = vars(range_windows)["read_row"]

    def deadly(line: Line, options: Options) -> Any:
        if b"Say 1" in line.text:
            raise WorkerDied
        return good(line, options)

    monkeypatch.setattr(range_windows, "read_row", deadly)
    bulk = make()
    bulk.upload(of(5))

    async def story() -> int:
        died = 0
        while (due := bulk.queues.next_visible()) is not None:
            await asyncio.sleep(max(0, due - bulk.time.now()) / 1000)
            try:
                await bulk.invoke()
            except WorkerDied:
                died += 1
        return died

    assert 2 + MOST_LOST_READING == bulk.time.run(story())
    assert {"succeeded": 4} == kinds(bulk)
    (error,) = bulk.errors()
    assert (2, DEADLY) == (error["line"], error["error"]["message"])
    assert 4 == len(bulk.claude.calls)
    assert bulk.time.now() < NOON + 5 * MINUTE
