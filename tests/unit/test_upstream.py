"""The batch lane, step by step: collected, sent, polled, canceled in time, and its results given to the ranges."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from sluice.domain.batches import NO_WORKER, Options, cancel_batch, claim_range
from sluice.domain.batches import Phase as BatchPhase
from sluice.domain.keys import UpstreamKey
from sluice.domain.pricing import Usage, utc_day
from sluice.domain.retries import Failure
from sluice.domain.upstream_batches import Phase, UpstreamBatch
from sluice.ports.upstream import Access, Listed, ResultRow, RowKind
from sluice.ports.upstream_records import UpstreamRecords, open_batches
from sluice.upstream.apply import ApplyResults
from sluice.upstream.results import HELD_BYTES, Sorted, piece_bytes
from tests.bulk_fakes import MemoryObjects, a_row, jsonl
from tests.fakes import MINUTE
from tests.upstream_fakes import HOUR, HalfPrice, answered


@pytest.fixture
def lane() -> Iterator[HalfPrice]:
    found = HalfPrice()
    yield found
    found.bulk.close()


def rows(count: int, first: int = 0) -> bytes:
    return jsonl(*(a_row(number) for number in range(first, first + count)))


def texts(results: list[dict[str, Any]]) -> list[str]:
    return [each["result"]["message"]["content"][0]["text"] for each in results]


def test_a_batch_goes_to_claude_as_one_message_batch_and_ends_in_its_order(
    lane: HalfPrice,
) -> None:
    lane.add(rows(250))

    lane.pass_minutes(25)

    assert ["msgbatch_up0"] == lane.upstream.creates
    assert [f"row-{number}" for number in range(250)] == [
        each["custom_id"] for each in lane.results()
    ]
    assert [f"Say {number}!" for number in range(250)] == texts(lane.results())
    assert BatchPhase.ENDED == lane.bulk.batch.phase
    assert not lane.bulk.claude.calls, "no row was called live"
    assert Phase.DONE == lane.record.phase


def test_rows_cost_half_in_the_batch_and_in_the_ledger(lane: HalfPrice) -> None:
    lane.add(rows(10))

    lane.pass_minutes(25)

    # 1,000 input and 100 output tokens: see the price list of tests.fakes, halved.
    usage = Usage(input_tokens=1000, output_tokens=100)
    live = lane.tools.prices.cost_micro_usd("claude-a", usage, utc_day(lane.time.now()))
    assert live
    tally = lane.bulk.batch.tally
    assert (10 * live // 2, 10 * live // 2) == (tally.cost_micro_usd, tally.saved_micro_usd)
    ledger = lane.bulk.ledger.rows
    assert [("batch", 10, 10 * live // 2)] == [
        (row.lane, row.spend.calls, row.spend.cost_micro_usd) for row in ledger.values()
    ]


def live_rows(lane: HalfPrice) -> list[str]:
    """Return what was asked on the live lane."""
    bodies = [json.loads(call.request.body.data) for call in lane.bulk.claude.calls]
    return sorted(body["messages"][0]["content"] for body in bodies)


# A reply that is lost --------------------------------------------------------------------------------------------


def test_a_batch_whose_create_had_no_reply_is_found_by_its_size_and_not_sent_again(
    lane: HalfPrice,
) -> None:
    lane.upstream.script = ["lost reply"]
    lane.add(rows(30))

    lane.pass_minutes(30)

    assert ["msgbatch_up0"] == lane.upstream.creates
    assert 30 == len(lane.results())
    assert not lane.bulk.claude.calls


def test_a_create_that_made_no_batch_is_sent_again_two_minutes_later(lane: HalfPrice) -> None:
    lane.upstream.script = ["lost reply"]
    lane.upstream.forgets = 1
    lane.add(rows(30))

    lane.pass_minutes(40)

    assert 1 == len(lane.upstream.creates)
    assert 30 == len(lane.results())
    assert "a create whose reply was lost" == lane.record.problem


def test_a_foreign_batch_of_the_same_size_and_time_is_recognized_by_its_results(
    lane: HalfPrice,
) -> None:
    lane.upstream.script = ["lost reply"]
    lane.upstream.forgets = 1
    lane.add(rows(30))
    lane.pass_minutes(6)
    lane.upstream.foreign(30)

    lane.pass_minutes(60)

    assert 1 == len(lane.upstream.creates)
    assert 30 == len(lane.results())
    assert not lane.bulk.claude.calls


def test_of_several_batches_of_the_same_size_the_one_with_our_ids_is_taken(
    lane: HalfPrice,
) -> None:
    lane.upstream.script = ["lost reply"]
    lane.add(rows(30))
    lane.pass_minutes(6)
    lane.upstream.foreign(30)

    lane.pass_minutes(60)

    assert ["msgbatch_up0"] == lane.upstream.creates
    assert 30 == len(lane.results())
    assert not lane.bulk.claude.calls


def test_open_batches_of_a_workspace_have_different_numbers_of_requests(lane: HalfPrice) -> None:
    lane.upstream.minutes = 120
    for number in range(3):
        lane.add(rows(50, 100 * number), f"msgbatch_{number}", tenant=f"tenant-{number}")

    lane.pass_minutes(20)

    assert [48, 49, 50] == sorted(len(each.requests) for each in lane.upstream.batches.values())
    lane.pass_minutes(130)
    for number in range(3):
        assert 50 == len(lane.results(f"msgbatch_{number}"))
    assert 3 == len(lane.bulk.claude.calls), "what was left out runs live"


def test_one_that_dies_between_the_create_and_its_record_sends_nothing_again(
    lane: HalfPrice,
) -> None:
    lane.add(rows(30))
    lane.upstream.after_create = lambda: lane.records.break_down("replace")

    lane.pass_minutes(7)
    assert ["msgbatch_up0"] == lane.upstream.creates
    lane.records.recover()
    lane.upstream.after_create = lambda: None
    lane.pass_minutes(60)

    assert ["msgbatch_up0"] == lane.upstream.creates
    assert 30 == len(lane.results())


def test_of_two_lost_creates_of_one_size_each_gets_its_own_batch(lane: HalfPrice) -> None:
    """The first made none, and takes the other's for its own until its results show whose it is."""
    lane.upstream.script = ["lost reply", "lost reply"]
    lane.upstream.forgets = 1
    lane.add(rows(1))
    lane.add(rows(1, 1), "msgbatch_2", tenant="other")

    lane.pass_minutes(60)

    said = [
        each["params"]["messages"][0]["content"]
        for batch in lane.upstream.batches.values()
        for each in batch.requests
    ]
    assert ["Say 0", "Say 1"] == sorted(said), "each was made once"
    assert (["Say 0!"], ["Say 1!"]) == (texts(lane.results()), texts(lane.results("msgbatch_2")))
    assert not lane.bulk.claude.calls


def test_a_batch_that_is_listed_late_is_found_beside_a_foreign_one(
    lane: HalfPrice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The foreign one has ended, and its ids are not ours: ours may be listed until two minutes after its create."""
    lane.upstream.script = ["lost reply"]
    lane.add(rows(30))
    whole = lane.upstream.since

    def without_new(access: Access, moment: int) -> Any:
        listed = whole(access, moment)
        assert isinstance(listed, Listed)
        before = lane.time.now() - 90_000
        seen = [
            each
            for each in listed.batches
            if "foreign" in each.id or (each.created_at or 0) < before
        ]
        return Listed(tuple(seen))

    def with_foreign() -> None:
        lane.upstream.minutes = 0.01
        lane.upstream.foreign(30)
        lane.upstream.minutes = 10

    monkeypatch.setattr(lane.upstream, "since", without_new)
    lane.upstream.after_create = with_foreign

    lane.pass_minutes(60)

    assert ["msgbatch_up0"] == lane.upstream.creates
    assert 30 == len(lane.results())
    assert not lane.bulk.claude.calls


def test_results_that_end_before_their_first_line_do_not_say_whose_they_are(
    lane: HalfPrice,
) -> None:
    lane.upstream.script = ["lost reply"]
    lane.add(rows(1))
    lane.pass_minutes(6)
    lane.upstream.foreign(1)
    lane.upstream.short = 2
    lane.pass_minutes(30)

    assert ["msgbatch_up0"] == lane.upstream.creates
    assert ["Say 0!"] == texts(lane.results())
    assert not lane.bulk.claude.calls


def test_creates_at_the_same_moment_take_different_numbers_of_requests(
    lane: HalfPrice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None sees the intents of the others before its own is written."""
    whole, before_intent = open_batches, list[bool]()

    def none_at_first(records: UpstreamRecords, now: int) -> list[UpstreamBatch]:
        before_intent.append(len(before_intent) % 2 == 0)
        return [] if before_intent[-1] else whole(records, now)

    monkeypatch.setattr("sluice.upstream.send.open_batches", none_at_first)
    lane.upstream.minutes = 120
    for number in range(3):
        lane.add(rows(50, 100 * number), f"msgbatch_{number}", tenant=f"tenant-{number}")

    lane.pass_minutes(20)

    assert 3 == len({len(each.requests) for each in lane.upstream.batches.values()})


# What upstream does ----------------------------------------------------------------------------------------------


def test_expired_rows_run_live(lane: HalfPrice) -> None:
    lane.upstream.minutes = 48 * 60
    lane.add(rows(40), expires_at=lane.time.now() + 72 * HOUR)
    lane.time.longest_story_ms = 72 * HOUR

    lane.pass_minutes(25 * 60)

    assert 20 == len(live_rows(lane))
    results = lane.results()
    assert [f"row-{number}" for number in range(40)] == [each["custom_id"] for each in results]
    assert {"succeeded"} == {each["result"]["type"] for each in results}


def test_a_late_batch_is_canceled_in_time_and_its_unfinished_rows_run_live(
    lane: HalfPrice,
) -> None:
    deadline = lane.time.now() + 3 * HOUR
    lane.upstream.minutes = 600
    lane.add(rows(100), expires_at=deadline)

    lane.pass_minutes(180)

    (batch,) = lane.upstream.batches.values()
    assert batch.canceled_at is not None
    finished = {
        batch.requests[number]["params"]["messages"][0]["content"] for number in batch.finished()
    }
    assert 10 < len(finished) < 60
    assert {f"Say {number}" for number in range(100)} - finished == set(live_rows(lane))
    assert {"succeeded"} == {each["result"]["type"] for each in lane.results()}
    assert lane.bulk.batch.ended_at is not None
    assert lane.bulk.batch.ended_at < deadline


def test_a_batch_that_ends_without_results_runs_live(lane: HalfPrice) -> None:
    lane.upstream.without_results = True
    lane.add(rows(10))

    lane.pass_minutes(150)

    assert 10 == len(live_rows(lane))
    assert 10 == len(lane.results())
    uncertain = [row for row in lane.bulk.ledger.rows.values() if row.lane == "batch"]
    assert [("unread", 10)] == [(row.outcome, row.spend.uncertain_calls) for row in uncertain]


def test_a_batch_that_cannot_be_sent_in_time_runs_live(lane: HalfPrice) -> None:
    deadline = lane.time.now() + 2 * HOUR
    lane.upstream.script = ["spend"] * 100
    lane.add(rows(10), expires_at=deadline)

    lane.pass_minutes(115)

    assert [] == lane.upstream.creates
    assert {"succeeded"} == {each["result"]["type"] for each in lane.results()}
    assert lane.bulk.batch.ended_at is not None
    assert lane.bulk.batch.ended_at < deadline


def test_errors_are_judged_as_on_the_live_lane(lane: HalfPrice) -> None:
    errors = {
        "Say 1": Failure("invalid_request_error", "no such tool", 400),
        "Say 2": Failure("overloaded_error", "overloaded", 529),
        "Say 3": Failure("api_error", "internal", 500),
    }

    def answer(params: Mapping[str, Any]) -> dict[str, Any]:
        failure = errors.get(params["messages"][0]["content"])
        return {"type": "errored", "failure": failure} if failure else answered(params)

    lane.upstream.answer = answer
    lane.add(rows(5))

    lane.pass_minutes(40)

    assert ["Say 2", "Say 3"] == live_rows(lane), "what may go better next time"
    kinds = [each["result"]["type"] for each in lane.results()]
    assert ["succeeded", "errored", "succeeded", "succeeded", "succeeded"] == kinds
    assert "no such tool" == lane.results()[1]["result"]["error"]["error"]["message"]


def test_a_refusal_goes_to_the_fallback_model_and_both_calls_are_in_the_cost(
    lane: HalfPrice,
) -> None:
    def answer(params: Mapping[str, Any]) -> dict[str, Any]:
        result = answered(params)
        if params["messages"][0]["content"] == "Say 1":
            result["message"]["stop_reason"] = "refusal"
        return result

    lane.upstream.answer = answer
    lane.add(rows(3), options=Options(fallback_models=("claude-b",)))

    lane.pass_minutes(40)

    (call,) = lane.bulk.claude.calls
    assert ("claude-b", "Say 1") == (
        call.request.model,
        json.loads(call.request.body.data)["messages"][0]["content"],
    )
    assert 4 == lane.bulk.batch.tally.calls


def test_strange_lines_of_the_results_hurt_no_row(lane: HalfPrice) -> None:
    lane.add(rows(10))
    lane.pass_minutes(7)
    (batch,) = lane.upstream.batches.values()
    first = batch.requests[0]["custom_id"]
    broken = Failure("api_error", "no JSON", None, may_be_billed=True)
    lane.upstream.more_lines = [
        ResultRow(None, RowKind.BROKEN, failure=broken),
        ResultRow("somebody-else", RowKind.EXPIRED),
        ResultRow(f"{lane.record.prefix}-9-0-0-0", RowKind.EXPIRED),
        ResultRow(f"{lane.record.prefix}-0-0-0-9", RowKind.EXPIRED),
        ResultRow(first, RowKind.ERRORED, failure=Failure("api_error", "twice", 500)),
    ]

    lane.pass_minutes(30)

    assert [f"Say {number}!" for number in range(10)] == texts(lane.results())
    assert not lane.bulk.claude.calls


def test_a_row_without_a_line_in_the_results_runs_live(lane: HalfPrice) -> None:
    lane.upstream.omits = "Say 7"
    lane.add(rows(10))

    lane.pass_minutes(40)

    assert ["Say 7"] == live_rows(lane)
    assert 10 == len(lane.results())


@pytest.mark.parametrize("what", ["interrupted", "short"])
def test_results_whose_connection_breaks_are_read_again(lane: HalfPrice, what: str) -> None:
    setattr(lane.upstream, what, 2)
    lane.add(rows(10))

    lane.pass_minutes(40)

    assert not lane.bulk.claude.calls
    assert 10 == len(lane.results())
    assert 10 == sum(row.spend.calls for row in lane.bulk.ledger.rows.values())


def test_a_new_batch_may_be_missing_and_polls_may_fail(lane: HalfPrice) -> None:
    lane.upstream.missing_seconds = 90
    lane.upstream.unreachable = 3
    lane.add(rows(10))

    lane.pass_minutes(40)

    assert ["msgbatch_up0"] == lane.upstream.creates
    assert not lane.bulk.claude.calls


@pytest.mark.parametrize("fate", ["spend", "rate", "key", "not sent"])
def test_a_refused_create_is_sent_later_or_with_another_key(lane: HalfPrice, fate: str) -> None:
    lane.upstream.script = [fate]
    lane.bulk.gateway.pool.pool.append(UpstreamKey("second", "sk-ant-test-second"))
    lane.add(rows(10))

    lane.pass_minutes(60)

    assert ["msgbatch_up0"] == lane.upstream.creates
    assert 10 == len(lane.results())
    assert not lane.bulk.claude.calls


def test_the_message_of_a_refused_create_reaches_no_log_and_no_record(lane: HalfPrice) -> None:
    """It may quote a request: `messages.0.content: "my secret" is not ...`."""
    lane.upstream.script = ["invalid"]
    lane.add(rows(10))
    lane.pass_minutes(20)

    said = repr([lane.bulk.events.notes, lane.bulk.events.problems, lane.record])
    assert "my secret" not in said
    assert "its create was refused: invalid_request_error" == lane.record.problem


def test_rows_of_a_create_that_is_invalid_run_live(lane: HalfPrice) -> None:
    lane.upstream.script = ["invalid"]
    lane.add(rows(10))

    lane.pass_minutes(20)

    assert [] == lane.upstream.creates
    assert 10 == len(live_rows(lane)) == len(lane.results())


# What is collected together --------------------------------------------------------------------------------------


def test_small_batches_of_a_tenant_become_one_also_with_equal_custom_ids(lane: HalfPrice) -> None:
    for number in range(4):
        lane.add(rows(20), f"msgbatch_{number}")

    lane.pass_minutes(30)

    assert [80] == [len(each.requests) for each in lane.upstream.batches.values()]
    for number in range(4):
        assert [f"Say {row}!" for row in range(20)] == texts(lane.results(f"msgbatch_{number}"))


@pytest.mark.parametrize(
    "facts",
    [
        {"tenant": "other"},
        {"options": Options(anthropic_version="2023-06-01")},
        {"options": Options(anthropic_beta="a-beta")},
    ],
    ids=["tenant", "version", "beta"],
)
def test_what_may_not_share_a_message_batch_does_not(
    lane: HalfPrice, facts: dict[str, Any]
) -> None:
    lane.add(rows(20))
    lane.add(rows(20), "msgbatch_2", **facts)

    lane.pass_minutes(30)

    assert 2 == len(lane.upstream.batches)
    assert 20 == len(lane.results()) == len(lane.results("msgbatch_2"))


def test_a_large_batch_becomes_several_at_once(
    lane: HalfPrice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sluice.upstream.collect.FULL_REQUESTS", 1_000)
    lane.add(rows(2_500))

    lane.pass_minutes(1)
    assert 2 == len(lane.records.stored), "the full ones"
    lane.pass_minutes(40)

    assert [f"Say {number}!" for number in range(2_500)] == texts(lane.results())
    assert 3 == len(lane.upstream.creates)
    assert not lane.bulk.claude.calls


def test_ranges_of_two_batches_that_share_one_are_collected_once(
    lane: HalfPrice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last range of one batch and the first of the next; all full ones are made by one collector."""
    monkeypatch.setattr("sluice.upstream.collect.FULL_REQUESTS", 10)
    monkeypatch.setattr("sluice.domain.batches.LINES_PER_RANGE", 3)
    lane.add(rows(14))
    lane.add(rows(12, 14), "msgbatch_2")

    lane.pass_minutes(1)
    assert 2 == len(lane.records.stored)
    lane.pass_minutes(40)

    sent = Counter(
        each["params"]["messages"][0]["content"]
        for batch in lane.upstream.batches.values()
        for each in batch.requests
    )
    live = live_rows(lane)
    assert {f"Say {number}": 1 for number in range(26)} == sent + Counter(live)
    assert (14, 12) == (len(lane.results()), len(lane.results("msgbatch_2")))


def test_bad_rows_and_rows_that_no_message_batch_takes_go_their_own_way(lane: HalfPrice) -> None:
    lane.add(
        jsonl(a_row(0), b"{broken", a_row(2, speed="fast"), a_row(3), b"", a_row(5, max_tokens=-1))
    )

    lane.pass_minutes(30)

    (batch,) = lane.upstream.batches.values()
    assert ["Say 0", "Say 3"] == [
        each["params"]["messages"][0]["content"] for each in batch.requests
    ]
    assert ["Say 2"] == live_rows(lane)
    kinds = Counter(each["result"]["type"] for each in lane.results())
    assert {"succeeded": 3, "errored": 1} == kinds


# Stores that fail, and workers that die --------------------------------------------------------------------------


def test_whatever_write_fails_no_row_is_sent_or_billed_twice() -> None:
    """Each run, another write of one of the stores fails once."""
    for verb, count in _writes().items():
        for nth in range(count):
            lane = HalfPrice()
            lane.add(rows(120))
            lane.fail_once(verb, nth)

            lane.pass_minutes(60)

            said = f"{verb} {nth}"
            assert ["msgbatch_up0"] == lane.upstream.creates, said
            assert [f"Say {number}!" for number in range(120)] == texts(lane.results()), said
            assert not lane.bulk.claude.calls, said
            assert 120 == sum(row.spend.calls for row in lane.bulk.ledger.rows.values()), said
            assert 120 == lane.bulk.batch.tally.calls, said
            lane.bulk.close()


def _writes() -> Counter[str]:
    """Count the writes of one undisturbed run."""
    lane = HalfPrice()
    lane.add(rows(120))
    lane.pass_minutes(30)
    found: Counter[str] = lane.written
    lane.bulk.close()
    return found


# Batches that are over -------------------------------------------------------------------------------------------


def cancel(lane: HalfPrice, name: str = "msgbatch_1") -> None:
    """Cancel a batch as the API does, and have the planner check it."""
    lane.bulk.batches.stored[name] = cancel_batch(lane.bulk.batches.stored[name], lane.time.now())
    lane.bulk.planner.plan(name)


def test_a_canceled_batch_is_canceled_upstream_within_a_minute_and_keeps_what_was_paid(
    lane: HalfPrice,
) -> None:
    lane.upstream.minutes = 100
    lane.add(rows(50))
    lane.pass_minutes(30)
    canceled_at = lane.time.now()

    cancel(lane)
    lane.pass_minutes(10)

    (batch,) = lane.upstream.batches.values()
    assert batch.canceled_at is not None
    assert batch.canceled_at - canceled_at <= MINUTE
    kinds = Counter(each["result"]["type"] for each in lane.results())
    assert {"succeeded": len(batch.finished()), "canceled": 50 - len(batch.finished())} == kinds
    assert not lane.bulk.claude.calls


def test_a_cancel_during_a_poll_is_sent_a_minute_later(
    lane: HalfPrice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a batch whose next poll would be due in a quarter of an hour."""
    lane.upstream.minutes = 600
    lane.add(rows(50))
    lane.pass_minutes(200)
    poll, canceled_at = lane.upstream.get, list[int]()

    def canceled_meanwhile(access: Access, batch_id: str) -> Any:
        seen = poll(access, batch_id)
        if not canceled_at:
            canceled_at.append(lane.time.now())
            cancel(lane)
        return seen

    monkeypatch.setattr(lane.upstream, "get", canceled_meanwhile)
    lane.pass_minutes(30)

    (batch,) = lane.upstream.batches.values()
    assert batch.canceled_at is not None
    assert batch.canceled_at - canceled_at[0] <= MINUTE


def test_a_cancel_that_did_not_find_the_batch_is_sent_again(lane: HalfPrice) -> None:
    lane.upstream.minutes = 600
    lane.upstream.cancels_missing = 1
    lane.add(rows(20))
    lane.pass_minutes(10)

    cancel(lane)
    lane.pass_minutes(3)

    (batch,) = lane.upstream.batches.values()
    assert batch.canceled_at is not None
    lane.pass_minutes(10)
    assert 20 == len(lane.results())


def test_a_canceled_batch_beside_another_ends_at_once_and_the_other_goes_on(
    lane: HalfPrice,
) -> None:
    lane.upstream.minutes = 60
    lane.add(rows(20))
    lane.add(rows(20, 20), "msgbatch_2")
    lane.pass_minutes(20)

    cancel(lane)
    lane.pass_minutes(2)

    assert {"canceled"} == {each["result"]["type"] for each in lane.results()}
    (batch,) = lane.upstream.batches.values()
    assert batch.canceled_at is None
    lane.pass_minutes(60)
    assert {"succeeded"} == {each["result"]["type"] for each in lane.results("msgbatch_2")}
    # What the canceled rows cost all the same is on record.
    assert 40 == sum(row.spend.calls for row in lane.bulk.ledger.rows.values())


def test_a_batch_that_is_canceled_while_it_waits_is_never_sent(lane: HalfPrice) -> None:
    lane.add(rows(20))
    lane.pass_minutes(2)

    cancel(lane)
    lane.pass_minutes(20)

    assert [] == lane.upstream.creates
    assert {"canceled"} == {each["result"]["type"] for each in lane.results()}


def test_a_lost_entry_of_the_waiting_list_is_written_again(lane: HalfPrice) -> None:
    lane.add(rows(20))
    lane.records.list.clear()

    lane.pass_minutes(20)
    lane.bulk.planner.plan("msgbatch_1")
    lane.pass_minutes(30)

    assert ["msgbatch_up0"] == lane.upstream.creates
    assert 20 == len(lane.results())


def test_a_check_of_the_batch_sends_no_range_that_is_upstream(lane: HalfPrice) -> None:
    lane.upstream.minutes = 120
    lane.add(rows(250))
    for _ in range(10):
        lane.pass_minutes(10)
        lane.bulk.planner.plan("msgbatch_1")

    assert not lane.bulk.claude.calls
    assert not lane.bulk.queues.ranges
    lane.pass_minutes(60)
    assert 250 == len(lane.results())


def test_the_saving_is_in_the_summary(lane: HalfPrice) -> None:
    lane.add(rows(10))
    lane.pass_minutes(30)

    tally = lane.bulk.batch.tally
    assert tally.cost_micro_usd == tally.saved_micro_usd > 0
    summary = lane.bulk.summary()
    assert ("batch", summary["cost_usd"], summary["cost_usd"]) == (
        summary["lane"],
        summary["saved_usd"],
        summary["cost_on_batch_lane_usd"],
    )


def test_a_range_that_an_invocation_left_when_it_died_gets_its_results_later(
    lane: HalfPrice,
) -> None:
    lane.add(rows(250))
    lane.pass_minutes(15)
    batch = lane.bulk.batch
    for number in (0, 2):
        state = lane.bulk.batches.range_state(batch, number)
        held = claim_range(state, "one that died", lane.time.now(), lane.time.now() + 3 * MINUTE)
        lane.bulk.batches.replace_range(held, state.version)

    lane.pass_minutes(20)

    assert [f"Say {number}!" for number in range(250)] == texts(lane.results())
    assert not lane.bulk.claude.calls
    assert 250 == lane.bulk.batch.tally.calls


def test_invocations_that_die_over_a_range_put_no_blame_on_its_lines(lane: HalfPrice) -> None:
    lane.add(rows(20))
    lane.pass_minutes(10)
    batch = lane.bulk.batch
    for number in range(10):
        state = lane.bulk.batches.range_state(batch, 0)
        at = lane.time.now() + number * MINUTE
        held = claim_range(state, f"{NO_WORKER}{number}", at, at + 1)
        lane.bulk.batches.replace_range(held, state.version)

    lane.pass_minutes(25)

    state = lane.bulk.batches.range_state(batch, 0)
    assert (0, False) == (state.losses, state.is_stuck)
    assert [f"Say {number}!" for number in range(20)] == texts(lane.results())


# The choice of the lane ------------------------------------------------------------------------------------------


def test_auto_takes_the_batch_lane_when_there_is_time(lane: HalfPrice) -> None:
    lane.add(rows(30), lane="auto")
    lane.pass_minutes(30)

    decision = lane.bulk.batch.decision
    assert decision is not None
    assert ("batch", True) == (decision.lane, decision.is_assured)
    assert not lane.bulk.claude.calls
    assert 30 == len(lane.results())


def test_auto_runs_live_when_the_deadline_is_near(lane: HalfPrice) -> None:
    lane.add(rows(30), lane="auto", expires_at=lane.time.now() + 8 * MINUTE)
    lane.pass_minutes(5)

    decision = lane.bulk.batch.decision
    assert decision is not None
    assert "live" == decision.lane
    assert 30 == len(lane.bulk.claude.calls) == len(lane.results())
    assert [] == lane.upstream.creates


def test_a_deadline_that_no_lane_can_meet_is_refused_or_run_with_a_warning(
    lane: HalfPrice,
) -> None:
    soon = lane.time.now() + 3 * MINUTE
    lane.add(rows(2_000), "msgbatch_1", lane="auto", expires_at=soon)
    refusing = Options(on_unmeetable="refuse")
    lane.add(rows(2_000), "msgbatch_2", lane="auto", expires_at=soon, options=refusing)

    run, refused = (lane.bulk.batches.stored[f"msgbatch_{number}"] for number in (1, 2))
    assert run.decision is not None
    assert "warning" in run.decision.reason
    assert BatchPhase.RUNNING == run.phase
    assert BatchPhase.ENDED == refused.phase
    assert refused.problem is not None
    assert refused.problem.startswith("on_unmeetable is refuse")


def test_how_long_upstream_batches_take_is_learned(lane: HalfPrice) -> None:
    before = lane.records.experience.times.law(lane.time.now()).quantile(0.5)
    lane.upstream.minutes = 200
    for number in range(6):
        lane.add(rows(10), f"msgbatch_{number}", tenant=f"tenant-{number}")
    lane.pass_minutes(260)

    after = lane.records.experience.times.law(lane.time.now()).quantile(0.5)
    assert before is not None
    assert after is None or after > 2 * before


def test_how_long_cancels_take_is_learned(lane: HalfPrice) -> None:
    lane.upstream.minutes = 100
    lane.add(rows(50))
    lane.pass_minutes(30)
    cancel(lane)
    lane.pass_minutes(10)

    # Two minutes, seen at the next poll.
    (took,) = lane.records.experience.cancels_ms
    assert 2 * MINUTE <= took <= 3 * MINUTE
    assert took == lane.bulk.lanes.situation().cancel_ms


# What it costs -------------------------------------------------------------------------------------------------


def test_rows_that_succeed_are_counted_and_have_no_line_in_the_log(lane: HalfPrice) -> None:
    lane.add(rows(250))
    lane.pass_minutes(25)

    assert 250 == lane.bulk.events.counted("JobsSucceeded")
    assert not [event for event, _ in lane.bulk.events.notes if event.startswith("job ")]


def test_the_file_of_a_batch_is_read_once_for_the_body_however_many_ranges_it_has(
    lane: HalfPrice,
) -> None:
    lane.add(rows(1_000))
    journal = lane.bulk.gateway.journal
    before = len(journal)

    lane.pass_minutes(7)

    reads = [line for line in journal[before:] if "read batches/msgbatch_1/" in line]
    assert 1 == len(reads)
    assert 1_000 == lane.record.requests


def test_a_batch_whose_objects_cannot_be_deleted_is_done_and_says_so(lane: HalfPrice) -> None:
    lane.add(rows(10))
    lane.bulk.objects.break_down("delete")

    lane.pass_minutes(25)

    assert Phase.DONE == lane.record.phase
    assert ["upstream batch applied"] == [
        event for event, _ in lane.bulk.events.notes if event == "upstream batch applied"
    ]


# Memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [1, 16, 17, 200, 512])
def test_the_pieces_of_all_sorted_runs_fit_into_the_memory_of_results(runs: int) -> None:
    assert runs * piece_bytes(runs) <= HELD_BYTES


def test_sorted_runs_are_merged_in_the_order_of_the_rows_however_long_their_lines_are() -> None:
    objects = MemoryObjects()
    places = [(0, number, offset) for number in range(6) for offset in (0, 70)]
    for run in range(3):
        some = places[run::3]
        facts = b'{"kind":"errored"}'
        objects.stored[f"run-{run}"] = b"".join(
            b"%d\t%d\t%d\t%s\t%s\n" % (*place, facts, b"x" * 2_500_000) for place in some
        )

    merged = Sorted(runs=["run-0", "run-1", "run-2"]).by_range(objects)

    # What is not read of a range is passed over.
    found = [
        (place, next(rows)[0] if place[1] % 2 else [each for each, _ in rows])
        for place, rows in merged
    ]
    assert [((0, number), 0 if number % 2 else [0, 70]) for number in range(6)] == found


def test_results_of_a_range_are_saved_while_they_are_read(lane: HalfPrice) -> None:
    body = rows(30)
    batch = lane.add(body)
    lengths = [len(line) for line in body.splitlines(keepends=True)]
    message = answered({"messages": [{"content": "x" * 1_000_000}], "model": "claude-a"})["message"]
    result = ResultRow(None, RowKind.SUCCEEDED, json.dumps(message).encode(), "end_turn")
    saved: list[int] = []

    def results() -> Iterator[tuple[int, ResultRow]]:
        for number in range(30):
            yield sum(lengths[:number]), result
            saved.append(sum("/chunks/" in key for key in lane.bulk.objects.stored))

    lane.pass_minutes(7)
    ApplyResults(lane.tools, lane.record, "step")(batch, 0, results())

    # 30 MB in pieces of 8 MiB: three are stored before the last result is read.
    assert 3 == saved[-2]
    assert 4 == sum("/chunks/" in key for key in lane.bulk.objects.stored)
