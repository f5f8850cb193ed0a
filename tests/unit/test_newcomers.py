"""A small batch starts within seconds although all invocations hold ranges of a large one."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace

import pytest

from sluice.domain.batches import Batch, Phase
from sluice.ports.batches import Newcomer
from sluice.ports.claude import CallRequest
from sluice.worker.newcomers import BESIDE, MOST_BYTES
from tests.bulk_fakes import Bulk, a_row, jsonl
from tests.fakes import NOON, SECOND, Reply, answer, known_group, paced

LARGE, SMALL = "in/acme/large.jsonl", "in/zenith/small.jsonl"


@pytest.fixture
def bulk() -> Iterator[Bulk]:
    """One call a second may start."""
    made = Bulk()
    limit_to(made, 60)
    yield made
    made.close()


def limit_to(bulk: Bulk, rpm: int) -> None:
    bulk.gateway.limits.stored.clear()
    bulk.gateway.know(known_group(seen=paced(rpm, 1)))
    bulk.claude.otherwise = answer(seen=paced(rpm, 1))


def arrive(bulk: Bulk, key: str, rows: int, first: int = 0) -> Batch:
    bulk.objects.put(key, jsonl(*(a_row(first + number) for number in range(rows))))
    bulk.planner.arrived(key)
    return of(bulk, key)


def of(bulk: Bulk, key: str) -> Batch:
    batches = bulk.batches.stored.values()
    return next(each for each in batches if key in {each.input_key, each.given_key})


class Story:
    """One invocation that runs a range of a large batch; a small one arrives after ten seconds."""

    def __init__(self, bulk: Bulk, small: str = SMALL) -> None:
        self.bulk = bulk
        self.small = small
        self.first_call: dict[bool, int] = {}
        """Of rows from number 1,000 on, and of the others."""
        before = bulk.claude.when

        def called(request: CallRequest) -> Reply | None:
            content = json.loads(bytes(request.body.data))["messages"][0]["content"]
            is_small = int(content.removeprefix("Say ")) >= 1_000
            self.first_call.setdefault(is_small, bulk.time.now())
            return before(request)

        bulk.claude.when = called

    def play(self, rows: int = 10) -> None:
        self.bulk.time.run(self._play(rows))

    async def _play(self, rows: int) -> None:
        arrive(self.bulk, LARGE, 500)
        invocation = asyncio.create_task(self.bulk.invoke(self.bulk.runners()))
        await asyncio.sleep(10)
        arrive(self.bulk, self.small, rows, first=1_000)
        await invocation

    @property
    def delay_ms(self) -> int:
        return self.first_call[True] - NOON - 10 * SECOND


@pytest.mark.parametrize(("rpm", "most"), [(60, 1 + 15), (300, 1 + 4)])
@pytest.mark.parametrize("small", [SMALL, "in/acme/small.jsonl"])
def test_a_small_batch_starts_beside_a_large_one(
    bulk: Bulk, small: str, rpm: int, most: int
) -> None:
    """Of another tenant, or of the same: after the start times that are reserved already."""
    limit_to(bulk, rpm)
    story = Story(bulk, small)

    story.play()

    ended = of(bulk, small)
    assert story.delay_ms <= most * SECOND
    assert Phase.ENDED == ended.phase
    assert (10, 0) == (ended.tally.succeeded, ended.tally.errored)
    assert (ended.ended_at or 0) - NOON < 40 * SECOND
    assert Phase.RUNNING == of(bulk, LARGE).phase


def test_the_message_of_a_newcomer_finds_its_range_done(bulk: Bulk) -> None:
    Story(bulk).play()
    bulk.drain()

    assert Phase.ENDED == of(bulk, LARGE).phase
    assert 510 == len(bulk.claude.calls), "each row was called once"
    assert set() == bulk.batches.announced


def test_an_invocation_runs_few_newcomers_at_a_time(bulk: Bulk) -> None:
    async def story() -> None:
        arrive(bulk, LARGE, 500)
        invocation = asyncio.create_task(bulk.invoke(bulk.runners()))
        for number in range(5):
            arrive(bulk, f"in/tenant-{number}/small.jsonl", 30, first=1_000 * (number + 1))
        await asyncio.sleep(8)
        owned = [each for each in bulk.batches.ranges.values() if each.owner is not None]
        assert 1 + BESIDE == len(owned)
        await invocation

    bulk.time.run(story())


def test_one_tenant_does_not_take_all_room_for_newcomers(bulk: Bulk) -> None:
    async def story() -> None:
        arrive(bulk, LARGE, 500)
        invocation = asyncio.create_task(bulk.invoke(bulk.runners()))
        for number in range(6):
            arrive(bulk, f"in/a-flood/{number}.jsonl", 30, first=1_000 + 100 * number)
        await asyncio.sleep(8)
        assert 2 == sum(each.owner is not None for each in bulk.batches.ranges.values())
        small = arrive(bulk, "in/zenith/small.jsonl", 5, first=5_000)
        await asyncio.sleep(2)
        assert bulk.batches.ranges[small.batch_id, 0].owner is not None
        await invocation

    bulk.time.run(story())


def test_tenants_take_turns_as_newcomers(bulk: Bulk) -> None:
    """Whatever the order of their names, and however many batches one of them has."""

    async def story() -> None:
        arrive(bulk, LARGE, 500)
        invocation = asyncio.create_task(bulk.invoke(bulk.runners()))
        for number in range(6):
            arrive(bulk, f"in/a-flood/{number}.jsonl", 5, first=1_000 + 10 * number)
        arrive(bulk, "in/zenith/small.jsonl", 5, first=5_000)
        await asyncio.sleep(5)
        assert of(bulk, "in/zenith/small.jsonl").batch_id in {
            each.batch_id for each in bulk.batches.ranges.values()
        }
        await invocation

    bulk.time.run(story())


def test_a_batch_that_others_have_claimed_is_no_newcomer(bulk: Bulk) -> None:
    async def story() -> None:
        arrive(bulk, LARGE, 500)
        invocation = asyncio.create_task(bulk.invoke(bulk.runners()))
        small = arrive(bulk, SMALL, 5, first=1_000)
        bulk.batches.ranges[small.batch_id, 0] = replace(
            bulk.batches.range_state(small, 0), version=1, claims=1
        )
        bulk.batches.announced.add(Newcomer("birch", "msgbatch_deleted"))
        await asyncio.sleep(3)
        assert set() == bulk.batches.announced
        await invocation

    bulk.time.run(story())


def test_a_large_range_waits_for_an_invocation_of_its_own(bulk: Bulk) -> None:
    body = jsonl(*({**a_row(n), "padding": "x" * (MOST_BYTES // 90)} for n in range(1_000, 1_100)))

    async def story() -> None:
        arrive(bulk, LARGE, 500)
        invocation = asyncio.create_task(bulk.invoke(bulk.runners()))
        bulk.objects.put(SMALL, body)
        bulk.planner.arrived(SMALL)
        await asyncio.sleep(5)
        assert (of(bulk, SMALL).batch_id, 0) not in bulk.batches.ranges
        await invocation

    bulk.time.run(story())


def test_trouble_with_newcomers_is_not_the_ranges(bulk: Bulk) -> None:
    bulk.batches.break_down("newcomer")

    Story(bulk).play()

    assert "newcomers not read" in bulk.events.problem_names
    assert (of(bulk, LARGE).batch_id, 0) in bulk.batches.ranges
    assert bulk.batches.ranges[of(bulk, LARGE).batch_id, 0].done


def test_a_newcomer_that_cannot_be_removed_from_the_list_runs_once(bulk: Bulk) -> None:
    bulk.batches.fail_next("welcome")

    Story(bulk).play()

    assert "newcomer not removed" in bulk.events.problem_names
    assert Phase.ENDED == of(bulk, SMALL).phase
    bulk.drain()
    assert 510 == len(bulk.claude.calls)


def test_a_range_that_has_lost_workers_runs_alone(bulk: Bulk) -> None:
    """Otherwise the search for a row that kills its workers would blame the wrong ones."""
    arrive(bulk, LARGE, 500)
    large = of(bulk, LARGE)
    for number in range(5):
        state = replace(bulk.batches.range_state(large, number), version=1, claims=1)
        bulk.batches.ranges[large.batch_id, number] = replace(state, owner="dead", lease_until=NOON)

    async def story() -> None:
        invocation = asyncio.create_task(bulk.invoke(bulk.runners()))
        await asyncio.sleep(1)
        small = arrive(bulk, SMALL, 5, first=1_000)
        await asyncio.sleep(10)
        assert (small.batch_id, 0) not in bulk.batches.ranges
        await invocation

    bulk.time.run(story())
