"""Ranges that wait outside their queue are sent at a pace, and every batch is checked until it ends."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest

from sluice.domain.batches import Batch, Phase, RangeState, Source
from sluice.domain.errors import StoreBusy
from sluice.upkeep.resume import Resume, Resumed
from tests.bulk_fakes import Bulk, a_row, jsonl
from tests.fakes import MINUTE, NOON, VirtualClock, answer, known_group, paced, refused

LONG = refused(429, "rate_limit_error", retry_after_ms=60 * MINUTE)
NEVER = NOON + 10**9


@pytest.fixture
def bulk() -> Iterator[Bulk]:
    made = Bulk()
    yield made
    made.close()


def resume(bulk: Bulk) -> Resume:
    return Resume(
        bulk.batches,
        bulk.batches,
        bulk.queues,
        bulk.queues,
        bulk.gateway.limits,
        {"claude-a": "a", "claude-b": "b"},
        VirtualClock(bulk.time),
        bulk.events,
    )


def later(bulk: Bulk, minutes: float) -> None:
    async def story() -> None:
        await asyncio.sleep(minutes * 60)

    bulk.time.run(story())


def park(bulk: Bulk, rows: int) -> None:
    """Have every range of a file wait outside the queue."""
    bulk.claude.otherwise = LONG
    bulk.upload(jsonl(*(a_row(number) for number in range(rows))))
    for _ in range(-(-rows // 100) + 1):
        if bulk.queues.next_visible() is not None:
            bulk.once()
    assert bulk.queues.next_visible() is None
    # The batch itself, which is looked after from time to time, is another story.
    bulk.batches.held[bulk.batch.batch_id, None] = NEVER + 1


def test_a_range_is_sent_when_its_time_has_come(bulk: Bulk) -> None:
    park(bulk, 3)
    assert Resumed() == resume(bulk)(NEVER)

    later(bulk, 61)
    assert Resumed(1, 1, 0) == resume(bulk)(NEVER)
    bulk.claude.otherwise = answer()
    bulk.drain()

    assert 3 == bulk.summary()["counts"]["succeeded"]
    assert Resumed() == resume(bulk)(NEVER)


def test_a_range_is_sent_once_by_two_sweeps_at_once(bulk: Bulk) -> None:
    park(bulk, 3)
    later(bulk, 61)
    (due,) = bulk.batches.due(bulk.time.now(), 10)
    bulk.batches.postpone(due, bulk.time.now() + MINUTE)

    assert not resume(bulk)._send(due, 0)  # noqa: SLF001 - the race itself
    assert {} == bulk.queues.ranges


def test_what_the_queue_does_not_take_is_due_again(bulk: Bulk) -> None:
    park(bulk, 3)
    later(bulk, 61)
    bulk.queues.untaken = [0]

    assert Resumed(1, 0, 0) == resume(bulk)(NEVER)
    assert Resumed() == resume(bulk)(NEVER)
    later(bulk, 3)
    assert Resumed(1, 1, 0) == resume(bulk)(NEVER)


def test_ranges_are_sent_no_faster_than_their_rows_can_start(bulk: Bulk) -> None:
    park(bulk, 1_500)
    waiting = len(bulk.batches.due(NEVER, 100))
    later(bulk, 61)
    # What the first 429s left of a group without limits of its own: some 60 rows a minute.
    bulk.gateway.limits.stored.clear()

    first = resume(bulk)(NEVER)

    assert waiting > 10
    assert (waiting, 1) == (first.due, first.ranges)


def test_ranges_that_wake_for_a_deadline_need_no_limits(bulk: Bulk) -> None:
    bulk.claude.otherwise = LONG
    rows = [a_row(number) | {"deadline": "2026-11-20T12:30:00Z"} for number in range(1_500)]
    bulk.upload(jsonl(*rows))
    while (due := bulk.queues.next_visible()) is not None and due <= bulk.time.now():
        bulk.once()
    later(bulk, 29)
    assert {} == bulk.queues.ranges
    bulk.batches.held[bulk.batch.batch_id, None] = NEVER + 1

    later(bulk, 1)
    swept = resume(bulk)(NEVER)
    bulk.drain()

    assert swept.ranges == swept.due > 10
    assert 1_500 == bulk.summary()["counts"]["expired"]


def test_a_sweep_stops_when_its_time_is_over(bulk: Bulk) -> None:
    park(bulk, 3)
    later(bulk, 61)

    assert Resumed(1, 0, 0) == resume(bulk)(bulk.time.now())


def test_a_batch_that_was_not_planned_is_checked_again(bulk: Bulk) -> None:
    bulk.queues.fail_next("send_ranges", 5)
    with pytest.raises(StoreBusy):
        bulk.upload(jsonl(a_row(1)))
    later(bulk, 21)

    assert Resumed(1, 0, 1) == resume(bulk)(NEVER)

    bulk.planner.plan(bulk.queues.plans.pop())
    bulk.drain()
    assert Phase.ENDED == bulk.batch.phase


def test_a_batch_past_its_time_is_checked_until_it_ends(bulk: Bulk) -> None:
    bulk.add(jsonl(a_row(1)), expires_at=NOON + MINUTE)
    bulk.queues.ranges.clear()
    later(bulk, 30)

    assert Resumed(1, 0, 1) == resume(bulk)(NEVER)
    assert Resumed() == resume(bulk)(NEVER)
    bulk.planner.plan(bulk.queues.plans.pop())
    later(bulk, 21)
    assert Resumed(1, 0, 1) == resume(bulk)(NEVER)
    bulk.planner.plan(bulk.queues.plans.pop())
    bulk.drain()
    assert ["expired"] == [row["result"]["type"] for row in bulk.results()]
    later(bulk, 60)
    assert Resumed() == resume(bulk)(NEVER)


def test_a_batch_taken_by_another_sweep_is_left_to_it(bulk: Bulk) -> None:
    bulk.add(jsonl(a_row(1)), expires_at=NOON + MINUTE)
    later(bulk, 30)
    (due,) = bulk.batches.due(bulk.time.now(), 10)
    bulk.batches.postpone(due, bulk.time.now() + MINUTE)

    assert not resume(bulk)._check(due)  # noqa: SLF001 - the race itself
    assert [] == bulk.queues.plans


def waiting(bulk: Bulk, of: str, count: int, model: str, since: int) -> None:
    """Park ranges of a batch of a tenant (`tenant/batch`), due since some minutes, the first one longest."""
    tenant, _, batch_id = of.partition("/")
    for number in range(count):
        state = RangeState(
            batch_id,
            number,
            tenant,
            version=1,
            claims=1,
            not_before=NOON - since * MINUTE + number,
            model=model,
        )
        bulk.batches.ranges[batch_id, number] = state
    source = Source.MESSAGES_BATCHES
    batch = Batch(batch_id, tenant, batch_id, source, NOON, NEVER, f"in/{batch_id}", "etag")
    bulk.batches.stored[batch_id] = batch


def sent_to(bulk: Bulk) -> list[str]:
    return [batch_id for _, batch_id, _, _ in bulk.queues.ranges.values()]


def test_parked_ranges_of_a_blocked_group_hide_nobody_elses(bulk: Bulk) -> None:
    blocked = replace(known_group(model_group="a"), blocked_until=NOON + 20 * 24 * 60 * MINUTE)
    bulk.gateway.know(blocked)
    bulk.gateway.know(known_group(model_group="b"))
    waiting(bulk, "large/msgbatch_large", 2_000, "claude-a", since=600)
    waiting(bulk, "small/msgbatch_small", 1, "claude-b", since=1)
    lost = Batch(
        "msgbatch_lost", "third", "lost", Source.FILE, NOON, NEVER, "in/x", "etag", due_at=NOON
    )
    bulk.batches.stored["msgbatch_lost"] = lost

    resume(bulk)(NEVER)

    assert ["msgbatch_large", "msgbatch_small"] == sorted(sent_to(bulk))
    assert ["msgbatch_lost"] == bulk.queues.plans


def test_tenants_and_their_batches_take_turns(bulk: Bulk) -> None:
    """300 rows a minute can start: three ranges, beside the first one of each tenant."""
    bulk.gateway.know(known_group(model_group="a", seen=paced(300, 1)))
    waiting(bulk, "large/msgbatch_old", 50, "claude-a", since=600)
    waiting(bulk, "large/msgbatch_new", 50, "claude-a", since=60)
    waiting(bulk, "small/msgbatch_other", 50, "claude-a", since=1)

    resume(bulk)(NEVER)

    assert ["msgbatch_old", "msgbatch_other", "msgbatch_new"] == sent_to(bulk)


def test_every_tenant_finds_out_whether_it_can_go_on(bulk: Bulk) -> None:
    """It may have a key of another organization than the one whose group is blocked."""
    bulk.gateway.know(replace(known_group(model_group="a"), blocked_until=NEVER))
    waiting(bulk, "large/msgbatch_large", 3, "claude-a", since=600)
    waiting(bulk, "small/msgbatch_small", 3, "claude-a", since=1)

    resume(bulk)(NEVER)

    assert ["msgbatch_large", "msgbatch_small"] == sent_to(bulk)
