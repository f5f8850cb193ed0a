"""Jobs that have lost many workers, kept apart from the others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from sluice.worker.suspects import REFILL_MS, Suspects
from tests.fakes import VirtualTime


class Hand:
    """What a worker holds: suspects, and `others`."""

    def __init__(self, time: VirtualTime) -> None:
        self.others = 0
        self.suspects = 0
        self.in_flight: list[str] = []
        self.seen: list[tuple[str, ...]] = []
        self.apart = Suspects(time.now, lambda: self.others + self.suspects)

    def begin(self, name: str, most: int, seconds: int = 10) -> asyncio.Task[None]:
        self.suspects += 1
        return asyncio.create_task(self._run(name, most, seconds))

    async def _run(self, name: str, most: int, seconds: int) -> None:
        try:
            async with self.apart.turn(most):
                self.in_flight.append(name)
                self.seen.append(tuple(self.in_flight))
                await asyncio.sleep(seconds)
                self.in_flight.remove(name)
        finally:
            self.suspects -= 1
            self.apart.look()


@pytest.fixture
def time() -> Iterator[VirtualTime]:
    virtual = VirtualTime()
    yield virtual
    virtual.close()


@pytest.fixture
def hand(time: VirtualTime) -> Hand:
    return Hand(time)


def test_a_suspect_waits_until_the_worker_holds_nothing_else(time: VirtualTime, hand: Hand) -> None:
    async def story() -> tuple[bool, bool]:
        hand.others = 1
        suspect = hand.begin("suspect", 1)
        await asyncio.sleep(100)
        ran_beside = bool(hand.seen)
        hand.others = 0
        hand.apart.look()
        await suspect
        return ran_beside, bool(hand.seen)

    assert (False, True) == time.run(story())


def test_a_few_run_side_by_side_and_then_each_alone(time: VirtualTime, hand: Hand) -> None:
    async def story() -> None:
        names = [("a", 2), ("b", 2), ("c", 2), ("d", 1), ("e", 1)]
        await asyncio.gather(*(hand.begin(name, most) for name, most in names))

    time.run(story())

    assert [1, 2] == [len(each) for each in hand.seen[:2]]
    assert [("d",), ("e",)] == hand.seen[-2:]
    assert all(len(each) <= 2 for each in hand.seen)


def test_no_more_messages_are_taken_once_a_suspect_runs(time: VirtualTime, hand: Hand) -> None:
    async def story() -> list[int | None]:
        began = time.now()
        said = [hand.apart.refill_until]
        hand.others = 1
        task = hand.begin("suspect", 1)
        await asyncio.sleep(1)
        said.append((hand.apart.refill_until or 0) - began)
        hand.others = 0
        hand.apart.look()
        await asyncio.sleep(1)
        said.append(hand.apart.refill_until)
        await task
        said.append(hand.apart.refill_until)
        return said

    assert [None, REFILL_MS, 0, None] == time.run(story())


def test_a_suspect_that_is_stopped_leaves_its_place_to_the_next(
    time: VirtualTime, hand: Hand
) -> None:
    async def story() -> None:
        first, second = hand.begin("first", 1, 1_000), hand.begin("second", 1, 1_000)
        await asyncio.sleep(1)
        third = hand.begin("third", 1)
        second.cancel()
        await asyncio.sleep(1)
        first.cancel()
        await asyncio.gather(first, second, third, return_exceptions=True)

    time.run(story())

    assert [("first",), ("third",)] == [each[-1:] for each in hand.seen]
