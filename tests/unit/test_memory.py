"""The memory a worker spends on requests and answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.worker.memory import (
    ANSWER_FACTOR,
    BUDGET,
    LARGEST_REQUEST_BYTES,
    MEBIBYTE,
    REQUEST_FACTOR,
    Budget,
    Memory,
)
from sluice.worker.queue_source import SLOTS
from tests.fakes import SECOND, VirtualClock, VirtualTime

SMALL = Budget(own=100, shared=3_000, most_answer=500)
LARGE = 600
"""Bytes of a request: of these the budget holds one at a time."""


@pytest.fixture
def time() -> Iterator[VirtualTime]:
    virtual = VirtualTime()
    yield virtual
    virtual.close()


@pytest.fixture
def memory(time: VirtualTime) -> Memory:
    return Memory(VirtualClock(time), SMALL)


def test_the_budget_fits_into_a_worker() -> None:
    """512 MB, of which 120 are imports; the rest is for one answer being parsed, and for what malloc keeps."""
    spent = SLOTS * BUDGET.own + BUDGET.shared + BUDGET.reserve

    assert spent <= 160 * MEBIBYTE


def test_a_small_request_takes_nothing_that_others_want(memory: Memory) -> None:
    with memory.grant() as full, memory.grant() as small:
        assert full.take_now(1_000)

        assert small.take_now(SMALL.own // REQUEST_FACTOR)
        assert not small.take_now(SMALL.own // REQUEST_FACTOR + 1)


def test_a_request_of_unknown_size_is_taken_for_the_largest(memory: Memory) -> None:
    assert memory.wants(LARGEST_REQUEST_BYTES) == memory.wants(0)


def test_a_request_larger_than_the_memory_takes_all_of_it(memory: Memory) -> None:
    with memory.grant() as grant:
        assert grant.take_now(10**9)

        assert SMALL.shared == memory.used


def test_what_is_sent_makes_room_for_the_next_in_line(time: VirtualTime, memory: Memory) -> None:
    order: list[str] = []

    async def wait(name: str, size: int) -> None:
        with memory.grant() as grant:
            assert await grant.take(size, 60 * SECOND)
            order.append(name)
            await asyncio.sleep(1)
            grant.sent()
            # Nobody waits for its answer.
            await asyncio.sleep(100)

    async def story() -> None:
        await asyncio.gather(wait("first", LARGE), wait("second", LARGE), wait("third", 50))

    time.run(story())

    assert ["first", "second", "third"] == order
    assert 0 == memory.used


def test_a_large_request_is_not_passed_by_smaller_ones_again_and_again(
    time: VirtualTime, memory: Memory
) -> None:
    async def story() -> bool:
        with memory.grant() as first, memory.grant() as large, memory.grant() as later:
            assert first.take_now(LARGE)
            waiting = asyncio.ensure_future(large.take(1_000, 60 * SECOND))
            await asyncio.sleep(1)
            passed = later.take_now(50)
            first.sent()
            return passed or not await waiting

    assert not time.run(story())


def test_a_job_that_waits_for_memory_in_vain_does_not_block_those_behind_it(
    time: VirtualTime, memory: Memory
) -> None:
    async def story() -> tuple[bool, bool]:
        with memory.grant() as first, memory.grant() as large, memory.grant() as later:
            assert first.take_now(LARGE)
            waiting = asyncio.ensure_future(large.take(1_000, 5 * SECOND))
            behind = asyncio.ensure_future(later.take(50, 60 * SECOND))
            return await waiting, await behind

    assert (False, True) == time.run(story())
    assert (0, 0) == (memory.used, memory.waiting)


def test_who_is_stopped_while_it_waits_holds_nothing(time: VirtualTime, memory: Memory) -> None:
    async def wait() -> None:
        with memory.grant() as grant:
            await grant.take(LARGE, 60 * SECOND)

    async def story() -> None:
        with memory.grant() as first:
            assert first.take_now(LARGE)
            waiting = asyncio.ensure_future(wait())
            await asyncio.sleep(1)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    time.run(story())

    assert (0, 0) == (memory.used, memory.waiting)


def test_answers_are_read_to_their_end_one_by_one_when_nothing_is_left(
    time: VirtualTime, memory: Memory
) -> None:
    """Each holds half an answer, and none can grow: the one with the reserve goes on, and then the next."""
    done: list[int] = []

    async def read(number: int) -> None:
        with memory.grant() as grant:
            for size in (250, SMALL.most_answer):
                await grant.grow(size)
                await asyncio.sleep(1)
            done.append(number)

    async def story() -> None:
        await asyncio.gather(*(read(number) for number in range(12)))

    time.run(story())

    assert set(range(12)) == set(done)
    assert 0 == memory.used


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5),
            st.sampled_from(["take", "sent", "grow", "leave"]),
            st.integers(1, SMALL.most_answer),
        ),
        max_size=60,
    )
)
def test_the_budget_is_never_exceeded(steps: list[tuple[int, str, int]]) -> None:
    """Whatever comes in which order, what was granted and not given back fits."""
    time = VirtualTime()
    memory = Memory(VirtualClock(time), SMALL)
    grants = [memory.grant() for _ in range(6)]
    requests, answers = dict.fromkeys(range(6), 0), dict.fromkeys(range(6), 0)

    async def grow(number: int, size: int) -> None:
        await grants[number].grow(size)
        answers[number] = max(answers[number], size)

    async def story() -> None:
        growing: list[asyncio.Task[None]] = []
        for number, what, size in steps:
            if what == "take" and grants[number].take_now(size):
                requests[number] = max(requests[number], size)
            elif what == "sent":
                grants[number].sent()
                requests[number] = 0
            elif what == "grow":
                growing.append(asyncio.create_task(grow(number, size)))
            elif what == "leave" and not any(not task.done() for task in growing):
                grants[number].__exit__()
                grants[number] = memory.grant()
                requests[number] = answers[number] = 0
            await asyncio.sleep(0)
            large = sum(size * REQUEST_FACTOR for size in requests.values())
            grown = sum(max(0, size * ANSWER_FACTOR - SMALL.own) for size in answers.values())
            small = SMALL.own * len(grants)
            assert large + grown <= SMALL.shared + SMALL.reserve + small
        for task in growing:
            task.cancel()
        await asyncio.gather(*growing, return_exceptions=True)

    try:
        time.run(story())
    finally:
        time.close()
