"""Ranges of batches in virtual time: each row is a job, all rows end once, and a dead worker repeats little."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

import pytest

from sluice.bulk import assemble
from sluice.domain import batches
from sluice.domain.batches import SECTIONS, Options, Phase, Tally, cancel_batch
from sluice.domain.capacity import ROWS_AT_ONCE
from sluice.ports.claude import CallRequest
from sluice.ports.jobs import Received
from sluice.worker.limiter import Limiter
from sluice.worker.range_claim import KEEP_MS, LEASE_MS
from sluice.worker.range_source import SAVE_ROWS
from sluice.worker.ranges import RangePointer
from tests.bulk_fakes import Bulk, Deaths, a_row, jsonl
from tests.fakes import MESSAGE, MINUTE, NOON, SECOND, DirectCalls, refused

P = ParamSpec("P")
T = TypeVar("T")

SERVER_ERROR = refused(500, "api_error", message="boom")


@pytest.fixture
def make() -> Iterator[Callable[..., Bulk]]:
    made: list[Bulk] = []

    def one(*script: Any, **facts: Any) -> Bulk:
        made.append(Bulk(*script, **facts))
        return made[-1]

    yield one
    for each in made:
        each.close()


Make = Callable[..., Bulk]


def said(request: CallRequest) -> str:
    text: str = json.loads(request.body.data)["messages"][0]["content"]
    return text


def ids(rows: list[dict[str, Any]]) -> list[str]:
    return [row["custom_id"] for row in rows]


# All is well -----------------------------------------------------------------------------------------------


def test_every_row_has_its_result_in_the_order_of_the_file(make: Make) -> None:
    bulk = make()

    bulk.upload(jsonl(*(a_row(number) for number in range(450))))
    bulk.drain()

    assert [f"row-{number}" for number in range(450)] == ids(bulk.results())
    assert {"type": "succeeded", "message": json.loads(MESSAGE)} == bulk.results()[0]["result"]
    assert 450 == len(bulk.claude.calls) == len(bulk.ledger.rows)
    assert [] == bulk.errors()
    assert [] == bulk.events.errors
    assert 450 == bulk.events.counted("JobsAccepted")


def test_a_row_goes_up_as_it_was_written_with_the_batchs_headers(make: Make) -> None:
    bulk = make()

    options = Options(anthropic_version="2023-06-01", anthropic_beta="files-api")
    bulk.add(jsonl(a_row(1, new_field={"a": 1.5})), options=options)
    bulk.drain()

    (call,) = bulk.claude.calls
    assert {**a_row(1)["params"], "new_field": {"a": 1.5}} == json.loads(call.body)
    assert ("2023-06-01", "files-api", 100) == (
        call.request.anthropic_version,
        call.request.anthropic_beta,
        call.request.max_tokens,
    )


def test_the_summary_counts_rows_tokens_and_cost(make: Make) -> None:
    bulk = make()
    bulk.claude.when = lambda request: (
        refused(400, "invalid_request_error") if said(request) == "Say 1" else None
    )

    bulk.upload(jsonl(a_row(0), a_row(1), b"{", a_row(2)))
    bulk.drain()

    summary = bulk.summary()
    assert {
        "lines": 4,
        "succeeded": 2,
        "errored": 1,
        "canceled": 0,
        "expired": 0,
        "invalid": 1,
        "duplicates": 0,
    } == summary["counts"]
    assert (20, 40) == (summary["tokens"]["input_tokens"], summary["tokens"]["output_tokens"])
    assert 420 == summary["cost_micro_usd"]
    assert "0.000210" == summary["cost_on_batch_lane_usd"]
    assert 3 == summary["calls"]


def test_at_most_the_agreed_number_of_rows_is_started_and_not_saved(make: Make) -> None:
    bulk = make(latency_ms=30_000)

    # One range: its last lines are none of their own.
    bulk.upload(jsonl(*(a_row(number) for number in range(1_000, 1_149))))
    bulk.drain()

    assert 1 == len(bulk.batches.ranges)
    assert ROWS_AT_ONCE // 2 < bulk.claude.most_in_flight <= ROWS_AT_ONCE


# Waiting ---------------------------------------------------------------------------------------------------


def test_a_short_wait_is_spent_in_the_invocation(make: Make) -> None:
    bulk = make(SERVER_ERROR)

    bulk.upload(jsonl(a_row(1), a_row(2)))
    assert bulk.once()
    bulk.drain()

    assert ["succeeded", "succeeded"] == [row["result"]["type"] for row in bulk.results()]
    assert 3 == len(bulk.claude.calls)


def test_a_longer_wait_goes_back_to_the_queue_and_keeps_what_is_done(make: Make) -> None:
    bulk = make()
    bulk.claude.when = lambda request: (
        refused(429, "rate_limit_error", retry_after_ms=300_000)
        if said(request) == "Say 2" and len(bulk.claude.calls) < 3
        else None
    )

    bulk.upload(jsonl(a_row(1), a_row(2)))
    assert not bulk.once()

    assert 250_000 < bulk.queues.delays[-1] <= 310_000
    (state,) = bulk.batches.ranges.values()
    assert (None, 0) == (state.owner, state.losses)
    bulk.drain()
    assert ["row-1", "row-2"] == ids(bulk.results())
    assert Counter({"Say 1": 1, "Say 2": 2}) == Counter(
        said(call.request) for call in bulk.claude.calls
    )


def test_attempts_are_remembered_from_one_invocation_to_the_next(make: Make) -> None:
    bulk = make(max_attempts=2)
    failing = refused(500, "api_error", message="boom", retry_after_ms=120_000)
    bulk.claude.otherwise = failing

    bulk.upload(jsonl(a_row(1)))
    bulk.drain()

    assert 2 == len(bulk.claude.calls)
    assert "boom" in json.dumps(bulk.results()[0]["result"]["error"])
    assert 2 == bulk.summary()["calls"]


def test_a_job_that_waits_more_than_a_quarter_of_an_hour_leaves_the_queue(make: Make) -> None:
    bulk = make(refused(429, "rate_limit_error", retry_after_ms=60 * MINUTE))

    bulk.upload(jsonl(a_row(1)))
    assert bulk.once()

    assert bulk.queues.next_visible() is None
    (due,) = (
        each for each in bulk.batches.due(NOON + 24 * 60 * MINUTE, 10) if each.number is not None
    )
    assert (0, "claude-a") == (due.number, due.model)
    assert due.due_at > NOON + 15 * MINUTE

    async def later() -> None:
        await asyncio.sleep((due.due_at - bulk.time.now()) / 1000)
        bulk.queues.send_ranges(bulk.batch, [0])

    bulk.time.run(later())
    bulk.drain()
    assert ["succeeded"] == [row["result"]["type"] for row in bulk.results()]


def test_rows_of_one_model_do_not_wait_for_those_of_another(make: Make) -> None:
    bulk = make()
    bulk.claude.when = lambda request: (
        refused(429, "rate_limit_error", retry_after_ms=300_000)
        if request.model == "claude-b"
        else None
    )

    bulk.upload(jsonl(*(a_row(n, model=f"claude-{'ab'[n % 2]}") for n in range(10))))
    bulk.once()

    assert {f"Say {n}" for n in range(0, 10, 2)} == {
        said(call.request) for call in bulk.claude.answered
    }


def test_a_slot_is_not_held_by_a_row_whose_start_is_far_away(make: Make) -> None:
    bulk = make()
    bulk.claude.when = lambda request: (
        refused(429, "rate_limit_error", retry_after_ms=600_000)
        if request.model == "claude-b"
        else None
    )

    blocked = [a_row(number, model="claude-b") for number in range(ROWS_AT_ONCE + 10)]
    bulk.upload(jsonl(*blocked, a_row(1_000)))
    bulk.once()

    (answered,) = bulk.claude.answered
    assert "Say 1000" == said(answered.request)
    assert answered.at - NOON < 5 * SECOND


def test_a_row_that_needs_more_time_than_is_left_leaves_the_invocation(make: Make) -> None:
    bulk = make(latency_ms=50_000)

    bulk.upload(jsonl(*(a_row(number, max_tokens=5_000) for number in range(80))))
    bulk.drain()

    assert [f"row-{number}" for number in range(80)] == ids(bulk.results())


# Dying -----------------------------------------------------------------------------------------------------


def kill_after(bulk: Bulk, seconds: float) -> None:
    """Run an invocation and let it die in the middle, without a last word."""

    async def story() -> None:
        task = asyncio.ensure_future(bulk.invoke())
        await asyncio.sleep(seconds)
        await bulk.kill(task)

    bulk.time.run(story())


def test_a_worker_that_dies_repeats_only_what_it_had_not_saved(make: Make) -> None:
    bulk = make(latency_ms=1_000)
    bulk.upload(jsonl(*(a_row(number) for number in range(100))))

    kill_after(bulk, 2.6)
    before = len(bulk.claude.calls)
    bulk.drain()

    calls = Counter(said(call.request) for call in bulk.claude.calls)
    again = sum(count - 1 for count in calls.values())
    assert before > SAVE_ROWS
    assert 0 < again <= ROWS_AT_ONCE
    assert [f"row-{number}" for number in range(100)] == ids(bulk.results())
    assert "range taken over" in bulk.events.problem_names


@pytest.mark.parametrize("seconds", [0.4, 1.05, 2.6, 3.3])
def test_each_call_of_a_worker_that_died_is_in_the_ledger_and_in_the_sums(
    make: Make, seconds: float
) -> None:
    """Those it had booked with their cost; those in flight, or answered and lost with it, as uncertain."""
    bulk = make(latency_ms=1_000)
    bulk.upload(jsonl(*(a_row(number) for number in range(100))))

    kill_after(bulk, seconds)
    bulk.drain()

    rows = list(bulk.ledger.rows.values())
    called = Counter(said(call.request) for call in bulk.claude.calls)
    repeated = sum(count - 1 for count in called.values())
    lost = [row for row in rows if row.outcome == "worker_lost"]
    assert len(bulk.claude.calls) <= len(rows)
    assert repeated - (len(rows) - len(lost) - 100) <= len(lost) <= ROWS_AT_ONCE
    summary, (usage,) = bulk.summary(), bulk.ledger.sums.values()
    assert (usage.calls, usage.cost_micro_usd, usage.uncertain_calls) == (
        summary["calls"],
        summary["known_cost_micro_usd"],
        summary["uncertain_calls"],
    )
    assert (len(rows), len(lost)) == (usage.calls, usage.uncertain_calls)


class LateReplies(DirectCalls):
    """Calls whose callers see the result a while after they were made: the thread has ended, its task waits."""

    async def __call__(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        result = await super().__call__(call, *args, **kwargs)
        await asyncio.sleep(3)
        return result


def test_no_row_is_saved_before_the_ledger_has_its_call(make: Make) -> None:
    """A saved row is not run again: if its worker died then, nobody would book the call."""
    bulk = make()
    bulk.gateway.blocking = LateReplies()
    bulk.upload(jsonl(*(a_row(number) for number in range(30))))
    saved: set[bytes] = set()
    counts: list[tuple[int, int]] = []

    def put(key: str, body: bytes) -> None:
        if "/chunks/" in key:
            saved.update(line for line in body.splitlines() if b'"succeeded"' in line)
            counts.append((len(saved), len(bulk.ledger.rows)))

    bulk.objects.before_put = put
    bulk.drain()

    assert 30 == len(saved)
    assert [] == [(rows, calls) for rows, calls in counts if rows > calls]


def test_a_range_killed_three_times_still_ends_whole(make: Make) -> None:
    bulk = make(latency_ms=700)
    bulk.upload(jsonl(*(a_row(number) for number in range(300))))

    for seconds in (1.7, 2.3, 1.1):
        due = bulk.queues.next_visible()
        assert due is not None

        async def until_due(due: int = due) -> None:
            await asyncio.sleep(max(0, due - bulk.time.now()) / 1000)

        bulk.time.run(until_due())
        kill_after(bulk, seconds)
    bulk.drain()

    assert [f"row-{number}" for number in range(300)] == ids(bulk.results())


def test_a_dead_workers_range_is_visible_and_free_within_a_minute(make: Make) -> None:
    bulk = make(latency_ms=60_000)
    bulk.upload(jsonl(a_row(1)))

    kill_after(bulk, 50)

    due = bulk.queues.next_visible()
    (state,) = bulk.batches.ranges.values()
    assert due is not None
    assert state.lease_until < due <= bulk.time.now() + 60 * SECOND


def test_ordinary_deaths_end_no_row(make: Make) -> None:
    bulk = make(latency_ms=30_000)
    bulk.upload(jsonl(*(a_row(number) for number in range(160))))

    died = bulk.drain_with(Deaths(ordinary={1: 20, 3: 40, 4: 5, 5: 50, 6: 20}))

    assert 5 == died
    assert ["succeeded"] * 160 == [row["result"]["type"] for row in bulk.results()]


def test_two_workers_never_run_one_range(make: Make) -> None:
    bulk = make(latency_ms=5_000)
    bulk.upload(jsonl(a_row(1), a_row(2)))

    async def story() -> list[bool]:
        pointer = bulk.queues.receive()
        assert pointer is not None
        first = asyncio.ensure_future(bulk.invoke(pointer=pointer))
        await asyncio.sleep(1)
        second = await bulk.invoke(pointer=pointer)
        return [await first, second]

    assert [True, False] == bulk.time.run(story())
    assert 2 == len(bulk.claude.calls)


def test_a_worker_that_lost_its_range_stops_and_writes_nothing(make: Make) -> None:
    bulk = make(latency_ms=200_000)
    bulk.upload(jsonl(a_row(1)))

    async def story() -> bool:
        task = asyncio.ensure_future(bulk.invoke())
        await asyncio.sleep(5)
        ((name, state),) = bulk.batches.ranges.items()
        taken = replace(state, owner="another", version=state.version + 1)
        bulk.batches.ranges[name] = taken
        done = await task
        assert taken == bulk.batches.ranges[name]
        return done

    assert not bulk.time.run(story())
    assert 1 == len(bulk.claude.stopped)
    assert "range lost" in bulk.events.problem_names
    assert not [key for key in bulk.objects.stored if "/parts/" in key]


def test_the_lease_is_kept_during_a_long_call(make: Make) -> None:
    bulk = make(latency_ms=10 * MINUTE)
    bulk.upload(jsonl(a_row(1, max_tokens=20_000)))

    assert bulk.once()

    assert 1 == len(bulk.claude.answered)
    assert len(bulk.queues.delays) >= 10 * MINUTE // KEEP_MS - 1
    assert LEASE_MS > 2 * KEEP_MS


def test_a_busy_store_delays_saving_and_loses_nothing(make: Make) -> None:
    bulk = make(latency_ms=100)
    bulk.upload(jsonl(*(a_row(number) for number in range(60))))
    bulk.objects.fail_next("put", 3)

    bulk.drain()

    assert [f"row-{number}" for number in range(60)] == ids(bulk.results())
    assert 60 == len(bulk.claude.calls)


# Ending early ----------------------------------------------------------------------------------------------


def test_a_canceled_batch_makes_no_more_calls_and_keeps_what_it_has(make: Make) -> None:
    bulk = make()
    bulk.upload(jsonl(*(a_row(number) for number in range(250))))

    bulk.once()
    bulk.batches.replace(cancel_batch(bulk.batch, NOON), bulk.batch.version)
    bulk.drain()

    kinds = Counter(row["result"]["type"] for row in bulk.results())
    assert 250 == sum(kinds.values())
    assert len(bulk.claude.calls) == kinds["succeeded"] > 0
    assert kinds["canceled"] == bulk.events.counted("JobsCanceled") > 0


def test_a_cancel_stops_calls_in_flight(make: Make) -> None:
    bulk = make(latency_ms=10 * MINUTE)
    bulk.upload(jsonl(*(a_row(number, max_tokens=20_000) for number in range(3))))

    async def story() -> bool:
        task = asyncio.ensure_future(bulk.invoke())
        await asyncio.sleep(5)
        bulk.batches.replace(cancel_batch(bulk.batch, NOON), bulk.batch.version)
        return await task

    assert bulk.time.run(story())
    bulk.drain()
    assert ["canceled"] * 3 == [row["result"]["type"] for row in bulk.results()]
    assert bulk.time.now() < NOON + MINUTE
    assert 3 == len(bulk.claude.stopped)


def test_rows_that_were_not_started_in_time_expire(make: Make) -> None:
    bulk = make(refused(429, "rate_limit_error", retry_after_ms=120_000))

    bulk.add(jsonl(a_row(1), a_row(2)), expires_at=NOON + MINUTE)
    bulk.drain()

    assert "expired" in {row["result"]["type"] for row in bulk.results()}


def test_a_deadline_of_the_batchs_own_comes_before_its_expiry(make: Make) -> None:
    bulk = make(SERVER_ERROR, jitter=0.9)

    bulk.add(jsonl(a_row(1)), options=Options(deadline=NOON + SECOND))
    bulk.drain()

    assert {"type": "expired"} == bulk.results()[0]["result"]


def test_a_row_moves_to_its_fallback_model(make: Make) -> None:
    bulk = make(refused(529, "overloaded_error"))

    bulk.add(jsonl(a_row(1)), options=Options(fallback_models=("claude-b",)))
    bulk.drain()

    assert ["claude-a", "claude-b"] == [call.model for call in bulk.claude.calls]


# Bad input -------------------------------------------------------------------------------------------------


def test_bad_rows_are_reported_by_line_and_good_ones_run(make: Make) -> None:
    bulk = make()
    rows: list[Any] = [a_row(number) for number in range(230)]
    rows[7] = b"{broken"
    rows[110] = b"\xff\xfe"
    rows[220] = {"custom_id": "not this one!", "params": {}}
    rows[221] = b""
    rows[229] = {"custom_id": "row-229", "params": {"model": "claude-a"}}

    bulk.upload(jsonl(*rows))
    bulk.drain()

    assert [8, 111, 221, 230] == [error["line"] for error in bulk.errors()]
    offsets = [error["offset"] for error in bulk.errors()]
    assert offsets == sorted(offsets)
    data = bulk.objects.stored["in/acme/first.jsonl"]
    assert all(offset == 0 or data[offset - 1] == ord("\n") for offset in offsets)
    assert 225 == len(bulk.claude.calls)
    assert "errored" == bulk.results()[-1]["result"]["type"]


def test_line_ends_byte_order_marks_and_a_missing_last_line_end_do_no_harm(make: Make) -> None:
    bulk = make()
    body = b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(a_row(n)).encode() for n in range(150))

    bulk.upload(body)
    bulk.drain()

    assert [f"row-{number}" for number in range(150)] == ids(bulk.results())
    assert [] == bulk.errors()


@pytest.mark.parametrize("distance", [1, 130])
def test_a_custom_id_used_twice_is_treated_alike_near_and_far(make: Make, distance: int) -> None:
    """The second row may be another request, whose id is a mistake: its answer is kept in the errors."""
    bulk = make()

    rows = [a_row(number) for number in range(distance)]
    bulk.upload(jsonl(*rows, a_row(0, max_tokens=7)))
    bulk.drain()

    assert [row["custom_id"] for row in rows] == ids(bulk.results())
    assert distance + 1 == len(bulk.claude.calls)
    (error,) = bulk.errors()
    assert (distance + 1, "row-0") == (error["line"], error["custom_id"])
    assert "duplicate custom_id 'row-0'; an earlier line has it" == error["error"]["message"]
    assert "succeeded" == error["result"]["type"]
    assert (1, 1) == tuple(bulk.summary()["counts"][name] for name in ("duplicates", "invalid"))


def test_a_file_too_large_to_copy_that_is_replaced_while_it_runs_says_so(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sluice.bulk.plan.MOST_COPIED_BYTES", 10)
    bulk = make()
    bulk.upload(jsonl(*(a_row(number) for number in range(200))))

    bulk.once()
    bulk.objects.put("in/acme/first.jsonl", jsonl(a_row("other")))
    bulk.drain()

    assert "was deleted or replaced while the batch ran" in bulk.errors()[-1]["error"]["message"]


@pytest.mark.parametrize("number", [0, 99])
def test_a_message_without_a_range_becomes_a_dead_letter(make: Make, number: int) -> None:
    bulk = make()
    if number:
        bulk.upload(jsonl(a_row(1)))
    name = bulk.batch.batch_id if number else "msgbatch_none"
    pointer = RangePointer(Received("stray", "", "", None), name, number)

    assert bulk.time.run(bulk.invoke(pointer=pointer))

    assert ["no such range"] == [reason for _, reason in bulk.queues.rejected]


@pytest.mark.parametrize("named", [(None, None), (None, 0), ("msgbatch_of_another_kind", None)])
def test_a_foreign_message_becomes_a_dead_letter_unread(
    make: Make, named: tuple[str | None, int | None]
) -> None:
    """DynamoDB refuses an empty key as a fault of the caller's; range 0 is not what such a message means either."""
    bulk = make()
    bulk.upload(jsonl(a_row(1)))
    bulk.gateway.journal.clear()

    assert bulk.time.run(bulk.invoke(pointer=RangePointer(Received("stray", "", "", None), *named)))

    assert ["not a message of Sluice's"] == [reason for _, reason in bulk.queues.rejected]
    assert not bulk.claude.calls


def test_a_message_that_is_delivered_again_repeats_no_row(make: Make) -> None:
    """Before its batch ended the section is counted once; afterwards nothing is left to do."""
    bulk = make(joins_at_once=False)
    bulk.upload(jsonl(a_row(1)))

    bulk.once()
    bulk.queues.send_ranges(bulk.batch, [0])
    bulk.once()
    assert 1 == len(bulk.queues.joins), "the worker of the range may be about to send it"
    bulk.time.run(asyncio.sleep(LEASE_MS / 1000))
    bulk.once()
    assert 2 == len(bulk.queues.joins), "it has probably died"
    bulk.drain()
    bulk.queues.send_ranges(bulk.batch, [0])
    bulk.once()

    assert 1 == len(bulk.claude.calls)
    assert 1 == bulk.summary()["counts"]["succeeded"]


def test_a_second_message_of_a_range_does_not_repeat_the_end_of_a_batch(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "LINES_PER_RANGE", 1)
    monkeypatch.setattr(batches, "RANGES_PER_SECTION", 2)
    bulk = make(joins_at_once=False)
    bulk.upload(jsonl(*(a_row(number) for number in range(4))))
    for _ in range(4):
        bulk.once()
    assert [0, 1] == [section for _, section in bulk.queues.joins]
    for section in (0, 1):
        bulk.batches.mark(bulk.batch.batch_id, SECTIONS, section, Tally())

    bulk.queues.send_ranges(bulk.batch, [0, 1, 2, 3])
    for _ in range(4):
        bulk.once()

    assert [0, 1] == [section for _, section in bulk.queues.joins]
    assert bulk.queues.next_visible() is None


# In line -----------------------------------------------------------------------------------------------------


def test_the_longest_rows_start_first(make: Make) -> None:
    bulk = make()
    tokens = [5, 900, 5, 40, 900]
    rows = [a_row(number) for number in range(len(tokens))]
    for row, most in zip(rows, tokens, strict=True):
        row["params"]["max_tokens"] = most

    bulk.upload(jsonl(*rows))
    bulk.drain()

    assert [900, 900, 40, 5, 5] == [call.request.max_tokens for call in bulk.claude.calls]
    assert [f"row-{number}" for number in range(len(tokens))] == ids(bulk.results())


def test_all_rows_of_a_range_wait_in_line(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last rows of a batch can start together only if the limiter knows of all of them."""
    waiting: list[int] = []
    admit = Limiter.admit

    async def counted(self: Limiter, *arguments: Any, **named: Any) -> Any:
        waiting.append(1)
        try:
            return await admit(self, *arguments, **named)
        finally:
            most.append(len(waiting))
            waiting.pop()

    most: list[int] = []
    monkeypatch.setattr(Limiter, "admit", counted)
    bulk = make(latency_ms=5_000)
    bulk.upload(jsonl(*(a_row(number) for number in range(100))))

    bulk.drain()

    assert 90 < max(most)
    assert bulk.claude.most_in_flight <= ROWS_AT_ONCE
    assert 100 == len(bulk.results()) == len(bulk.claude.calls)


@pytest.mark.parametrize("behind", [0, 1])
def test_the_last_rows_of_a_range_are_reported_as_the_last(
    make: Make, monkeypatch: pytest.MonkeyPatch, behind: int
) -> None:
    """Unless another range waits in the queue."""
    said: list[int] = []
    bulk = make()
    monkeypatch.setattr(Limiter, "drained", lambda _: said.append(bulk.time.now()))
    bulk.upload(jsonl(*(a_row(number) for number in range(100))))
    if behind:
        bulk.upload(jsonl(a_row(1_000)), "second.jsonl")

    bulk.once()

    assert bool(behind) != bool(said)


# Joining at once ---------------------------------------------------------------------------------------------


def test_the_invocation_that_ends_a_small_batch_joins_it(make: Make) -> None:
    bulk = make()
    bulk.upload(jsonl(*(a_row(number) for number in range(250))))
    assert bulk.batch.plan is not None

    for _ in range(bulk.batch.plan.ranges):
        bulk.once()

    assert [] == bulk.queues.joins
    assert [f"row-{number}" for number in range(250)] == ids(bulk.results())
    assert 1 == len(bulk.notices.told)


@pytest.mark.parametrize(
    ("name", "limit"), [("MOST_RANGES_AT_ONCE", 2), ("MOST_TOKENS_AT_ONCE", 100)]
)
def test_a_larger_batch_is_joined_by_the_batches_function(
    make: Make, monkeypatch: pytest.MonkeyPatch, name: str, limit: int
) -> None:
    monkeypatch.setattr(assemble, name, limit)
    bulk = make()
    bulk.upload(jsonl(*(a_row(number) for number in range(250))))

    while bulk.queues.next_visible() is not None:
        bulk.once()

    assert [(bulk.batch.batch_id, 0)] == bulk.queues.joins
    assert Phase.RUNNING == bulk.batch.phase
    bulk.drain()
    assert 250 == len(bulk.results())


@pytest.mark.parametrize(
    ("store", "verb"),
    [
        ("objects", "head"),
        ("batches", "groups"),
        ("notices", "publish"),
    ],
)
def test_a_join_that_fails_is_left_to_the_batches_function(
    make: Make, store: str, verb: str
) -> None:
    bulk = make()
    bulk.upload(jsonl(a_row(1)))
    getattr(bulk, store).fail_next(verb)

    bulk.once()

    assert [(bulk.batch.batch_id, 0)] == bulk.queues.joins
    assert ["batch not joined at once"] == bulk.events.problem_names
    bulk.drain()
    assert ["row-1"] == ids(bulk.results())
    assert 1 == len(bulk.claude.calls) == len(bulk.notices.told)


def test_a_worker_that_dies_while_it_joins_is_followed_by_one_that_ends_the_batch(
    make: Make,
) -> None:
    """Also if the queue of the batches function is unreachable: the range's message is returned."""
    bulk = make()
    bulk.upload(jsonl(a_row(1)))
    bulk.objects.before_put = died = Dies()

    died.on = bulk.batch.results_key
    with pytest.raises(WorkerDied):
        bulk.once()
    assert Phase.RUNNING == bulk.batch.phase
    died.on = None
    bulk.drain()

    assert ["row-1"] == ids(bulk.results())
    assert 1 == len(bulk.claude.calls) == len(bulk.notices.told)


class WorkerDied(BaseException):
    """As a process ends: no handler of ours sees it."""


class Dies:
    """Ends the worker when it writes an object."""

    on: str | None = None

    def __call__(self, key: str, _: bytes) -> None:
        if key == self.on:
            raise WorkerDied
