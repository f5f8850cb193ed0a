"""The limiter as workers use it: blocks of start times, settled later, through one shared record."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from itertools import chain, pairwise, repeat
from typing import Any, ParamSpec, TypeVar

import pytest

from sluice.domain.errors import StoreBusy
from sluice.domain.limits import (
    DIMENSIONS,
    SCALE,
    Cost,
    Dimension,
    Group,
    Seen,
    Ties,
    advanced,
    block,
    group_id,
)
from sluice.domain.turns import Owner
from sluice.ports.claude import Headers
from sluice.worker.limit_books import (
    REFUND_MS,
    SETTLE_MS,
    Admission,
    Admitted,
    Claimant,
    Later,
    Moved,
    TooLarge,
)
from sluice.worker.limit_planner import BLOCK_MS
from sluice.worker.limit_writer import MOST_CONFLICTS, WATCH_MS
from sluice.worker.limiter import Limiter
from tests.fakes import (
    MINUTE,
    NOON,
    SECOND,
    DirectCalls,
    MemoryLimits,
    RecordingEvents,
    VirtualClock,
    VirtualTime,
    known_group,
)

P = ParamSpec("P")
T = TypeVar("T")
PLENTY = Seen(6_000_000, 1_000_000)


def limited(limit: int, burst: int) -> dict[Dimension, Seen]:
    return {"requests": Seen(limit, burst), "input_tokens": PLENTY, "output_tokens": PLENTY}


TIGHT: dict[Dimension, Seen] = {
    "requests": Seen(60, 100),
    "input_tokens": Seen(60_000, 100_000),
    "output_tokens": Seen(60_000, 100_000),
}
"""Large buckets that fill slowly: what is missing from them shows for a while."""


def refilled(levels: Sequence[float], seconds: float) -> list[float]:
    """Levels of a group that TIGHT has taught, after so long without any use."""
    return [
        min(TIGHT[dimension].remaining, level + TIGHT[dimension].limit * seconds / 60)
        for dimension, level in zip(DIMENSIONS, levels, strict=True)
    ]


def claimant(organization: str = "org") -> Claimant:
    return Claimant(group_id(organization, "a"), organization, "a", f"key of {organization}")


class Crew:
    """Some workers on one limits table."""

    def __init__(self) -> None:
        self.time = VirtualTime(longest_story_ms=60 * MINUTE)
        self.store = MemoryLimits()
        self.events = RecordingEvents()
        self.blocking = DirectCalls(latency_ms=5)
        self.started: list[int] = []
        self._hired = 0

    def know(self, group: Group) -> None:
        self.store.stored[group.id] = replace(group, version=group.version + 1)

    def limiter(self, skew_ms: int = 0) -> Limiter:
        clock = VirtualClock(self.time, skew_ms)
        self._hired += 1
        # A worker's name is its first roll.
        rolls = chain([self._hired / 1_000], repeat(0.5))
        return Limiter(self.store, self.blocking, clock, lambda: next(rolls), self.events)

    @property
    def group(self) -> Group:
        return self.store.stored["org/a"]

    def level(self, dimension: Dimension = "requests") -> float:
        now = advanced(self.group, self.time.now())
        return now.bucket(dimension).level / SCALE

    def levels(self) -> list[float]:
        return [self.level(dimension) for dimension in DIMENSIONS]

    async def admit(
        self,
        limiter: Limiter,
        claimants: Sequence[Claimant] = (claimant(),),
        within_ms: int = MINUTE,
        chars: int = 100,
    ) -> Admitted:
        return await limiter.admit(claimants, chars, 100, self.time.now() + within_ms)

    async def call(self, limiter: Limiter, takes_ms: int = 500, used: Cost | None = None) -> None:
        """One job from asking to settling, as often as it is sent back to ask again."""
        while True:
            admitted = await self.admit(limiter, within_ms=30 * MINUTE)
            assert isinstance(admitted, Admission)
            if await limiter.wait_for_start(admitted):
                break
            limiter.settle(admitted, None)
        self.started.append(self.time.now())
        await asyncio.sleep(takes_ms / 1000)
        limiter.settle(admitted, used or admitted.reserved)

    async def refunded(self) -> None:
        """Wait until what was reserved and not used has been given back in the shared record."""
        await asyncio.sleep((REFUND_MS + 200) / 1000)

    async def settled(self) -> None:
        """Wait until everything has been settled, even when no reservation takes it along."""
        await asyncio.sleep((SETTLE_MS + WATCH_MS) / 1000)

    def play(self, story: Callable[[Limiter], Coroutine[Any, Any, T]]) -> T:
        """Run one worker's story inside its invocation."""

        async def invocation() -> T:
            async with self.limiter() as limiter:
                return await story(limiter)

        return self.time.run(invocation())


@pytest.fixture
def crew() -> Iterator[Crew]:
    made = Crew()
    yield made
    made.time.close()


# Admission -------------------------------------------------------------------------------------------------


def test_a_job_is_admitted_with_a_start_time_and_a_reservation(crew: Crew) -> None:
    crew.know(known_group(seen=limited(600, 100)))

    admitted = crew.play(crew.admit)

    assert isinstance(admitted, Admission)
    assert (1, "key of org") == (admitted.reserved.requests, admitted.claimant.key_id)
    assert crew.time.now() - SECOND <= admitted.start <= crew.time.now() + SECOND


def test_an_unknown_group_admits_one_call_and_then_slowly_more(crew: Crew) -> None:
    async def story(limiter: Limiter) -> list[Admitted]:
        return await asyncio.gather(*(crew.admit(limiter) for _ in range(3)))

    starts = [each.start for each in crew.play(story) if isinstance(each, Admission)]

    assert starts[0] <= NOON + SECOND
    assert starts[2] - starts[0] >= SECOND


def test_a_worker_reserves_for_many_jobs_in_one_write(crew: Crew) -> None:
    crew.know(known_group(seen=limited(6_000, 1_000)))

    async def story(limiter: Limiter) -> int:
        await asyncio.gather(*(crew.call(limiter) for _ in range(50)))
        return limiter.writes

    assert crew.play(story) <= 12
    assert 50 == len(crew.started)


def test_a_job_that_cannot_start_in_time_learns_when_it_might(crew: Crew) -> None:
    crew.know(block(known_group(), NOON + 10 * MINUTE, "rate limited", NOON))

    answer = crew.play(crew.admit)

    assert isinstance(answer, Later)
    assert "rate limited" == answer.reason
    assert NOON + 10 * MINUTE <= answer.at <= NOON + 11 * MINUTE


def test_jobs_snoozed_together_are_retried_one_after_another(crew: Crew) -> None:
    crew.know(known_group(seen=limited(6, 1)))

    async def story(limiter: Limiter) -> list[Admitted]:
        return await asyncio.gather(*(crew.admit(limiter, within_ms=10_000) for _ in range(30)))

    later = [each.at for each in crew.play(story) if isinstance(each, Later)]

    assert len(later) >= 25
    assert max(later) - min(later) >= 3 * MINUTE


def test_a_request_larger_than_the_bucket_can_ever_hold_is_too_large(crew: Crew) -> None:
    small = Seen(20_000, 3_000)
    crew.know(
        known_group(seen={"requests": PLENTY, "input_tokens": small, "output_tokens": PLENTY})
    )

    answer = crew.play(lambda limiter: crew.admit(limiter, chars=10_000_000))

    assert isinstance(answer, TooLarge)
    assert 20_000 == answer.limit
    assert answer.input_tokens > answer.limit


def test_the_group_that_can_start_first_is_chosen(crew: Crew) -> None:
    crew.know(block(known_group("busy"), NOON + 30 * SECOND, "rate limited", NOON))
    crew.know(known_group("free"))

    answer = crew.play(
        lambda limiter: crew.admit(limiter, claimants=[claimant("busy"), claimant("free")])
    )

    assert isinstance(answer, Admission)
    assert "free" == answer.claimant.organization


def test_unequal_groups_are_used_according_to_their_limits(crew: Crew) -> None:
    crew.know(known_group("small", seen=limited(60, 1)))
    crew.know(known_group("large", seen=limited(600, 10)))
    both = [claimant("small"), claimant("large")]
    used: list[str] = []

    async def one(limiter: Limiter) -> None:
        admitted = await crew.admit(limiter, claimants=both, within_ms=10 * MINUTE)
        assert isinstance(admitted, Admission)
        assert await limiter.wait_for_start(admitted)
        used.append(admitted.claimant.organization)
        limiter.settle(admitted, admitted.reserved)

    async def story(limiter: Limiter) -> None:
        await asyncio.gather(*(one(limiter) for _ in range(220)))

    crew.play(story)

    assert 10 <= used.count("small") <= 40
    assert 150 <= used.count("large")
    assert crew.time.now() - NOON <= 30 * SECOND


# The law ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("skew_ms", [0, 3_000])
def test_however_many_workers_run_at_the_limit_and_not_above(
    crew: Crew, workers: int, skew_ms: int
) -> None:
    crew.know(known_group(seen=limited(600, 100)))

    async def worker(number: int) -> None:
        async with crew.limiter(skew_ms * (number % 2)) as limiter:
            await asyncio.gather(*(crew.call(limiter) for _ in range(300 // workers)))

    async def story() -> None:
        await asyncio.gather(*(worker(number) for number in range(workers)))

    crew.time.run(story())

    starts = sorted(crew.started)
    assert 300 == len(starts)
    # The burst at once, the rest at ten a second; a margin for what is left alone and for the ends.
    assert starts[-1] - NOON <= 28 * SECOND + skew_ms
    slack = 2 * SECOND + 2 * skew_ms
    for first, begin in enumerate(starts):
        for count, end in enumerate(starts[first:], start=1):
            assert count <= 100 + (end - begin + slack) / 100


def test_slow_groups_share_one_plan_between_workers(crew: Crew) -> None:
    crew.know(known_group(seen=limited(60, 1)))

    async def worker() -> None:
        async with crew.limiter() as limiter:
            await asyncio.gather(*(crew.call(limiter) for _ in range(10)))

    async def story() -> None:
        await asyncio.gather(*(worker() for _ in range(3)))

    crew.time.run(story())

    starts = sorted(crew.started)
    assert 30 == len(starts)
    gaps = [later - sooner for sooner, later in pairwise(starts)]
    assert sum(gap < 500 for gap in gaps) <= 4
    assert starts[-1] - starts[0] <= 45 * SECOND


# Settling --------------------------------------------------------------------------------------------------


def test_a_reservation_that_was_not_used_is_given_back_soon(crew: Crew) -> None:
    crew.know(known_group(seen=TIGHT))
    before = crew.levels()

    async def story(limiter: Limiter) -> list[float]:
        admitted = await crew.admit(limiter)
        assert isinstance(admitted, Admission)
        taken = crew.levels()
        limiter.settle(admitted, None)
        await crew.refunded()
        return taken

    taken = crew.play(story)

    assert all(left < whole for left, whole in zip(taken, before, strict=True))
    assert crew.time.seconds < 1
    assert pytest.approx(refilled(before, crew.time.seconds)) == crew.levels()


@pytest.mark.parametrize(
    ("learned", "output"),
    [
        # No headers report what is left: the usage counts.
        (False, 40_000),
        # Headers reported it while it was produced: only the reservation is in the books.
        (True, 100),
    ],
)
def test_the_books_show_what_was_really_used(crew: Crew, *, learned: bool, output: int) -> None:
    known = known_group(seen=TIGHT)
    half = 50_000 * SCALE
    crew.know(
        replace(
            known,
            input_tokens=replace(known.input_tokens, level=half),
            output_tokens=replace(known.output_tokens, level=half, learned=learned),
        )
    )

    async def story(limiter: Limiter) -> None:
        await crew.call(limiter, takes_ms=0, used=Cost(1, 50_000, 40_000))
        await crew.settled()

    crew.play(story)

    refill = 1_000 * crew.time.seconds
    assert pytest.approx([refill, 50_000 - output + refill]) == crew.levels()[1:]


def test_a_settlement_travels_with_the_next_block(crew: Crew) -> None:
    """A separate write only if no reservation is made for a while."""
    crew.know(known_group(seen=limited(6_000, 1_000)))

    async def story(limiter: Limiter) -> tuple[int, int, int]:
        await crew.call(limiter, takes_ms=0)
        once = limiter.writes
        await asyncio.sleep(SETTLE_MS / 2000)
        await crew.call(limiter, takes_ms=0)
        twice = limiter.writes
        await crew.settled()
        return once, twice, limiter.writes

    assert (1, 2, 3) == crew.play(story)


def test_everything_is_settled_when_the_invocation_ends(crew: Crew) -> None:
    crew.know(
        known_group(seen=TIGHT | limited(6_000, 1_000) | {"input_tokens": TIGHT["input_tokens"]})
    )
    before = crew.level("input_tokens")
    used = Cost(1, 2_000, 10)

    async def story(limiter: Limiter) -> None:
        await asyncio.gather(*(crew.call(limiter, takes_ms=7 * n, used=used) for n in range(40)))

    crew.play(story)

    left = before - 40 * 2_000 + crew.time.seconds * 1_000
    assert pytest.approx(left) == crew.level("input_tokens")


@pytest.mark.parametrize("milliseconds", range(0, 20, 2))
def test_a_job_that_stops_waiting_leaves_nothing_behind(crew: Crew, milliseconds: int) -> None:
    crew.know(known_group(seen=TIGHT))
    before = crew.levels()

    async def story(limiter: Limiter) -> None:
        asking = [asyncio.create_task(crew.admit(limiter)) for _ in range(10)]
        await asyncio.sleep(milliseconds / 1000)
        for each in asking:
            each.cancel()
        for admitted in await asyncio.gather(*asking, return_exceptions=True):
            if isinstance(admitted, Admission):
                limiter.settle(admitted, None)
        await crew.refunded()

    crew.play(story)

    assert crew.time.seconds < 1
    assert pytest.approx(refilled(before, crew.time.seconds)) == crew.levels()


@pytest.mark.parametrize("milliseconds", range(0, 60, 4))
def test_an_invocation_that_ends_in_the_middle_of_a_write_loses_nothing(
    crew: Crew, milliseconds: int
) -> None:
    crew.blocking.latency_ms = 30
    crew.know(known_group(seen=TIGHT))
    before = crew.levels()

    async def story(limiter: Limiter) -> None:
        admitted = await crew.admit(limiter)
        assert isinstance(admitted, Admission)
        limiter.throttled(admitted, crew.time.now() + MINUTE, "rate limited")
        limiter.settle(admitted, None)
        await asyncio.sleep(milliseconds / 1000)

    crew.play(story)

    assert "rate limited" == crew.group.blocked_reason
    expected = refilled(before, crew.time.seconds)
    assert pytest.approx(expected[1:], abs=110) == crew.levels()[1:]
    assert crew.level("input_tokens") >= before[1]


# Learning --------------------------------------------------------------------------------------------------


def test_the_first_answer_teaches_everybody_the_limits(crew: Crew) -> None:
    async def story(limiter: Limiter) -> float:
        admitted = await crew.admit(limiter)
        assert isinstance(admitted, Admission)
        waiting = [asyncio.create_task(crew.call(limiter)) for _ in range(100)]
        await asyncio.sleep(1)
        limiter.heard(admitted, Headers(seen=limited(6_000, 900)), served=True)
        limiter.settle(admitted, admitted.reserved)
        await asyncio.gather(*waiting)
        return crew.time.seconds

    assert crew.play(story) < 10
    assert all(crew.group.bucket(dimension).learned for dimension in DIMENSIONS)
    assert 6_000 == crew.group.requests.limit


def test_a_stranger_on_the_organization_slows_us_down(crew: Crew) -> None:
    crew.know(known_group(seen=limited(600, 100)))

    async def story(limiter: Limiter) -> None:
        admitted = await crew.admit(limiter)
        assert isinstance(admitted, Admission)
        assert await limiter.wait_for_start(admitted)
        limiter.heard(admitted, Headers(seen=limited(600, 2)), served=True)
        limiter.settle(admitted, admitted.reserved)
        await crew.call(limiter, takes_ms=0)

    crew.play(story)

    assert crew.level() <= 2 + 10 * (crew.time.seconds + 0.1)


def test_a_group_that_moved_is_asked_for_again_under_its_own_name(crew: Crew) -> None:
    unknown = claimant("key:main")

    async def ask(limiter: Limiter) -> Admitted:
        while True:
            admitted = await crew.admit(limiter, claimants=[unknown])
            if not isinstance(admitted, Admission):
                return admitted
            if await limiter.wait_for_start(admitted):
                return admitted
            limiter.settle(admitted, None)

    async def story(limiter: Limiter) -> tuple[Mapping[str, str], list[Admitted]]:
        admitted = await crew.admit(limiter, claimants=[unknown])
        assert isinstance(admitted, Admission)
        waiting = [asyncio.create_task(ask(limiter)) for _ in range(3)]
        await asyncio.sleep(0.1)
        limiter.belongs(admitted, "org", Headers("org", limited(600, 100)))
        limiter.settle(admitted, admitted.reserved)
        return limiter.moved, await asyncio.gather(*waiting)

    moved, answers = crew.play(story)

    assert {"key:main/a": "org"} == moved
    assert [Moved()] * 3 == answers
    assert "org" == crew.store.stored["key:main/a"].moved_to
    assert 600 == crew.group.requests.limit


def test_a_job_that_comes_while_groups_are_read_gets_its_turn(crew: Crew) -> None:
    async def story(limiter: Limiter) -> tuple[Admitted, Admitted]:
        first = asyncio.create_task(crew.admit(limiter, claimants=[claimant("one")]))
        await asyncio.sleep(0.007)
        second = asyncio.create_task(crew.admit(limiter, claimants=[claimant("two")]))
        return await asyncio.gather(first, second)

    for each in crew.play(story):
        assert isinstance(each, Admission)


def test_a_429_to_a_keys_first_call_blocks_its_organization(crew: Crew) -> None:
    async def story(limiter: Limiter) -> None:
        admitted = await crew.admit(limiter, claimants=[claimant("key:main")])
        assert isinstance(admitted, Admission)
        limiter.belongs(admitted, "org", Headers("org", limited(600, 100)))
        limiter.throttled(admitted, NOON + MINUTE, "rate limited")
        limiter.settle(admitted, None)
        await asyncio.sleep(1)

    crew.play(story)

    assert NOON + MINUTE == crew.group.blocked_until


def test_a_large_job_is_not_starved_by_small_ones(crew: Crew) -> None:
    """It needs a third of a minute's tokens at once; two workers with small jobs always find room before it."""
    seen: dict[Dimension, Seen] = {
        "requests": Seen(6_000, 1_000),
        "input_tokens": Seen(60_000, 1_000),
        "output_tokens": PLENTY,
    }
    crew.know(known_group(seen=seen))
    started: list[float] = []

    async def small_ones(limiter: Limiter, until: float) -> None:
        while crew.time.seconds < until:
            admitted = await crew.admit(limiter, chars=1_750)
            if isinstance(admitted, Admission) and await limiter.wait_for_start(admitted):
                limiter.settle(admitted, admitted.reserved)

    async def large_one(limiter: Limiter) -> None:
        while not started:
            admitted = await crew.admit(limiter, chars=70_000)
            if isinstance(admitted, Admission) and await limiter.wait_for_start(admitted):
                started.append(crew.time.seconds)
                limiter.settle(admitted, admitted.reserved)

    async def story() -> None:
        async with crew.limiter() as one, crew.limiter() as two:
            busy = [asyncio.create_task(small_ones(one, 300)) for _ in range(20)]
            await asyncio.sleep(1)
            await large_one(two)
            for each in busy:
                each.cancel()
            await asyncio.gather(*busy, return_exceptions=True)

    crew.time.run(story())

    assert started[0] < 120


# Reactions -------------------------------------------------------------------------------------------------


def test_a_429_stops_those_who_already_sleep_towards_their_start(crew: Crew) -> None:
    crew.know(known_group(seen=limited(60, 1)))

    async def story(limiter: Limiter) -> None:
        first = await crew.admit(limiter)
        assert isinstance(first, Admission)
        sleeping = [asyncio.create_task(crew.call(limiter)) for _ in range(5)]
        await asyncio.sleep(1.5)
        before = len(crew.started)
        blocked_at = crew.time.now()
        limiter.throttled(first, blocked_at + 10 * SECOND, "rate limited")
        limiter.settle(first, None)
        await asyncio.gather(*sleeping)
        early = [at for at in crew.started[before:] if at < blocked_at + 10 * SECOND]
        assert [] == early

    crew.play(story)

    assert 5 == len(crew.started)


def test_a_429_stops_other_workers_within_a_second(crew: Crew) -> None:
    crew.know(known_group(seen=limited(60, 1)))

    async def story() -> None:
        async with crew.limiter() as one, crew.limiter() as two:
            first = await crew.admit(one)
            assert isinstance(first, Admission)
            others = [asyncio.create_task(crew.call(two)) for _ in range(10)]
            await asyncio.sleep(3)
            blocked_at = crew.time.now()
            one.throttled(first, blocked_at + 10 * SECOND, "rate limited")
            one.settle(first, None)
            await asyncio.gather(*others)
            late = [
                at for at in crew.started if blocked_at + SECOND < at < blocked_at + 10 * SECOND
            ]
            assert [] == late

    crew.time.run(story())

    assert 10 == len(crew.started)


def test_a_longer_block_is_not_waited_for_by_jobs_that_fill_a_worker(crew: Crew) -> None:
    """They would keep jobs of other groups out."""
    crew.know(block(known_group(), NOON + BLOCK_MS + SECOND, "rate limited", NOON))

    longer = crew.play(crew.admit)

    crew.know(block(known_group(at=crew.time.now()), crew.time.now() + BLOCK_MS, "x", NOON))
    shorter = crew.play(crew.admit)
    assert isinstance(longer, Later)
    assert isinstance(shorter, Admission)


def test_a_block_is_logged_once(crew: Crew) -> None:
    crew.know(known_group(seen=limited(600, 100)))

    async def story(limiter: Limiter) -> None:
        admitted = await crew.admit(limiter)
        assert isinstance(admitted, Admission)
        for _ in range(5):
            limiter.throttled(admitted, NOON + MINUTE, "rate limited")
        limiter.settle(admitted, None)
        await asyncio.sleep(3)

    crew.play(story)

    assert ["limit group blocked"] == [event for event, _ in crew.events.notes]


MODEL = "model claude-a"


def needing(*circuits: str) -> Claimant:
    return replace(claimant(), ties=Ties(circuits))


def test_overloads_in_a_row_set_the_model_aside_for_all_workers_at_once(crew: Crew) -> None:
    """They come together, from calls in flight together: none of them is written before the others are heard."""
    crew.know(known_group(seen=limited(6_000, 1_000)))

    async def story() -> tuple[Admitted, Admitted]:
        async with crew.limiter() as one, crew.limiter() as two:
            calls = [await crew.admit(one, [needing(MODEL)]) for _ in range(5)]
            for each in calls:
                assert isinstance(each, Admission)
                one.failed(each, MODEL)
                one.settle(each, None)
            await asyncio.sleep(0.5)
            this = await crew.admit(two, [needing(MODEL)], within_ms=SECOND)
            other = await crew.admit(two, [needing("model claude-b")], within_ms=SECOND)
            return this, other

    this, other = crew.time.run(story())

    assert isinstance(this, Later)
    assert isinstance(other, Admission)


def test_who_sleeps_towards_a_start_when_a_breaker_opens_does_not_start(crew: Crew) -> None:
    crew.know(known_group(seen=limited(60, 1)))

    async def story(limiter: Limiter) -> list[bool]:
        waiting = [asyncio.create_task(crew.admit(limiter, [needing(MODEL)])) for _ in range(3)]
        admitted = [each for each in await asyncio.gather(*waiting) if isinstance(each, Admission)]
        assert await limiter.wait_for_start(admitted[0])
        for _ in range(5):
            limiter.failed(admitted[0], MODEL)
        await asyncio.sleep(0.1)
        return [await limiter.wait_for_start(each) for each in admitted[1:]]

    assert [False, False] == crew.play(story)


def test_a_successful_probe_admits_the_next_one_and_then_all_calls(crew: Crew) -> None:
    crew.know(known_group(seen=limited(6_000, 1_000)))
    told: list[tuple[float, bool]] = []

    async def one(limiter: Limiter) -> None:
        while True:
            admitted = await crew.admit(limiter, [needing(MODEL)], within_ms=10 * MINUTE)
            assert isinstance(admitted, Admission)
            if await limiter.wait_for_start(admitted):
                break
            limiter.settle(admitted, None)
        told.append((crew.time.seconds, admitted.is_probe))
        await asyncio.sleep(1)
        limiter.works(admitted, MODEL)
        limiter.settle(admitted, admitted.reserved)

    async def story(limiter: Limiter) -> None:
        first = await crew.admit(limiter, [needing(MODEL)])
        assert isinstance(first, Admission)
        for _ in range(5):
            limiter.failed(first, MODEL)
        limiter.settle(first, None)
        await asyncio.gather(*(one(limiter) for _ in range(10)))

    crew.play(story)

    told.sort()
    assert [True, True] + [False] * 8 == [is_probe for _, is_probe in told]
    assert told[1][0] >= told[0][0] + 1
    assert told[2][0] >= told[1][0] + 1


def test_start_times_are_taken_back_when_a_key_is_no_longer_accepted(crew: Crew) -> None:
    crew.know(known_group(seen=limited(60, 1)))

    async def story() -> bool:
        async with crew.limiter() as one, crew.limiter() as two:
            first = await crew.admit(one)
            second = await crew.admit(two)
            assert isinstance(first, Admission)
            assert isinstance(second, Admission)
            sleeping = asyncio.create_task(two.wait_for_start(replace_start(second, 5)))
            one.recall(first)
            return await sleeping

    def replace_start(admission: Admission, seconds: int) -> Admission:
        admission.start += seconds * SECOND
        return admission

    assert not crew.time.run(story())


def test_an_empty_queue_is_recorded_with_the_next_reservation(crew: Crew) -> None:
    crew.know(known_group(seen=limited(6_000, 1_000)))

    async def story(limiter: Limiter) -> None:
        await crew.call(limiter, takes_ms=0)
        for _ in range(5):
            limiter.drained()
        await crew.call(limiter, takes_ms=0)
        assert NOON < crew.group.drained_at <= crew.time.now()
        assert 2 == limiter.writes

    crew.play(story)


def test_at_the_end_of_a_queue_everybody_knows_how_many_jobs_wait(crew: Crew) -> None:
    """A worker that knew only of its own jobs would take them for the last ones. With a queue this is irrelevant."""
    group = known_group(seen=limited(600, 10))
    bound_by_output = replace(group, output_mean=2 * group.output_tokens.limit)
    crew.know(block(bound_by_output, NOON + 14 * SECOND, "x", NOON))

    async def story() -> None:
        async with crew.limiter() as one, crew.limiter() as two:
            waiting = [asyncio.create_task(crew.admit(each)) for each in (one, one, one, two, two)]
            await asyncio.sleep(3)
            assert {} == crew.group.waiting
            one.drained()
            await asyncio.sleep(2)
            assert [2, 3] == sorted(jobs for jobs, _ in crew.group.waiting.values())
            one.drained()
            await asyncio.sleep(2)
            assert 1 == one.writes
            assert 1 == two.writes
            await asyncio.gather(*waiting)
            assert {} == crew.group.waiting

    crew.time.run(story())


def test_an_empty_queue_is_entered_as_of_when_it_was_seen(crew: Crew) -> None:
    """It may have filled by the time something is written."""
    crew.know(known_group(seen=limited(600, 100)))

    async def story(limiter: Limiter) -> None:
        await crew.call(limiter)
        limiter.drained()
        await asyncio.sleep(60)
        await crew.call(limiter)

    crew.play(story)

    assert crew.group.drained_at <= NOON + 2 * SECOND


# Trouble with the store ------------------------------------------------------------------------------------


def test_workers_that_race_for_one_record_all_get_their_turn(crew: Crew) -> None:
    crew.know(known_group(seen=limited(6_000, 1_000)))

    async def worker() -> None:
        async with crew.limiter() as limiter:
            await asyncio.gather(*(crew.call(limiter, takes_ms=100) for _ in range(10)))
            await crew.settled()

    async def story() -> None:
        await asyncio.gather(*(worker() for _ in range(8)))

    crew.time.run(story())

    assert 80 == len(crew.started)
    assert [] == crew.events.errors


@pytest.mark.parametrize("verb", ["load", "replace"])
def test_a_store_that_is_busy_for_a_while_only_delays(crew: Crew, verb: str) -> None:
    crew.know(known_group(seen=limited(600, 100)))
    crew.store.fail_next(verb, times=4)

    async def story(limiter: Limiter) -> None:
        await asyncio.gather(*(crew.call(limiter) for _ in range(20)))
        await crew.settled()

    crew.play(story)

    assert 20 == len(crew.started)
    assert "limits table busy" in crew.events.problem_names


def test_a_block_gets_through_a_store_that_was_busy(crew: Crew) -> None:
    crew.know(known_group(seen=limited(600, 100)))

    async def story(limiter: Limiter) -> None:
        admitted = await crew.admit(limiter)
        assert isinstance(admitted, Admission)
        crew.store.fail_next("replace", times=2)
        limiter.throttled(admitted, NOON + MINUTE, "rate limited")
        limiter.settle(admitted, None)
        await asyncio.sleep(5)

    crew.play(story)

    assert "rate limited" == crew.group.blocked_reason


def test_a_store_that_is_busy_at_the_end_is_logged(crew: Crew) -> None:
    crew.know(known_group(seen=limited(600, 100)))

    async def story(limiter: Limiter) -> None:
        admitted = await crew.admit(limiter)
        assert isinstance(admitted, Admission)
        crew.store.break_down("replace")
        limiter.throttled(admitted, NOON + MINUTE, "rate limited")
        limiter.settle(admitted, None)

    crew.play(story)

    assert "limits table busy" in crew.events.problem_names


class SlowForOthers(DirectCalls):
    """From a moment on, writes of the group `other/a` take their time."""

    is_slow = False

    async def __call__(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        if self.is_slow and any(getattr(each, "id", None) == "other/a" for each in args):
            await asyncio.sleep(10)
        return await super().__call__(call, *args, **kwargs)


def test_no_write_goes_on_after_the_invocation_when_another_one_failed(crew: Crew) -> None:
    """The worker is frozen then: the write would end in its next invocation, if there is one."""
    for organization in ("org", "other"):
        crew.know(known_group(organization, seen=limited(600, 100)))

    crew.blocking = blocking = SlowForOthers()

    async def story() -> set[str]:
        async with crew.limiter() as limiter:
            given = [await crew.admit(limiter, [claimant(each)]) for each in ("org", "other")]
            blocking.is_slow = True
            crew.store.fail_next("replace")
            for admission in given:
                assert isinstance(admission, Admission)
                limiter.throttled(admission, NOON + MINUTE, "rate limited")
                limiter.settle(admission, None)
            await asyncio.sleep(1)
        return {
            each.get_name() for each in asyncio.all_tasks() if each is not asyncio.current_task()
        }

    assert set() == crew.time.run(story())
    reasons = {group.blocked_reason for group in crew.store.stored.values()}
    assert {"rate limited"} == reasons


def test_no_job_waits_longer_than_requested_for_a_busy_store(crew: Crew) -> None:
    crew.time.longest_story_ms = 10 * MINUTE
    crew.store.break_down("load")

    assert isinstance(crew.play(crew.admit), Later)


def test_a_planner_that_fails_raises_in_those_who_wait(crew: Crew) -> None:
    crew.store.fail_next("load", error=ZeroDivisionError("armchair"))

    with pytest.raises(ZeroDivisionError, match="armchair"):
        crew.play(crew.admit)
    assert ["limiter failed"] == crew.events.problem_names


def test_a_deleted_record_is_created_again(crew: Crew) -> None:
    crew.know(known_group(seen=limited(600, 100)))

    async def story(limiter: Limiter) -> None:
        await crew.call(limiter)
        crew.store.stored.clear()
        await crew.call(limiter)

    crew.play(story)

    assert 2 == len(crew.started)
    assert "org/a" in crew.store.stored


def test_a_second_invocation_starts_from_the_current_shared_state(crew: Crew) -> None:
    crew.know(known_group(seen=limited(600, 100)))
    limiter = crew.limiter()

    async def story() -> Admitted:
        async with limiter:
            await crew.call(limiter)
        crew.know(block(crew.group, crew.time.now() + 10 * MINUTE, "spend limit", NOON))
        async with limiter:
            return await crew.admit(limiter)

    answer = crew.time.run(story())

    assert isinstance(answer, Later)
    assert "spend limit" == answer.reason


def test_a_worker_with_nothing_to_do_touches_nothing(crew: Crew) -> None:
    async def story(_: Limiter) -> None:
        await asyncio.sleep(600)

    crew.play(story)

    assert [] == crew.store.journal


@pytest.mark.parametrize("others", [0, 3])
def test_a_write_whose_reply_was_lost_is_entered_once(crew: Crew, others: int) -> None:
    """Its reservations are released, because no call received them; what it settled is not settled again."""
    crew.know(known_group(seen=limited(60, 100)))
    written: list[Group] = []
    genuine = crew.store.replace

    def lose_the_reply(group: Group, expected_version: int) -> None:
        genuine(group, expected_version)
        if not written:
            written.append(group)
            for number in range(others):
                current = crew.store.stored[group.id]
                recent = (*current.recent_writes, f"other.{number}")
                changed = replace(current, version=current.version + 1, recent_writes=recent)
                genuine(changed, current.version)
            raise StoreBusy("the limits table")

    crew.store.replace = lose_the_reply  # type: ignore[method-assign]

    async def story(limiter: Limiter) -> None:
        await asyncio.gather(*(crew.call(limiter) for _ in range(5)))

    before = crew.level()
    crew.play(story)

    # At one a second the bucket is not full again before the end: what is missing is what was taken.
    refilled = (crew.time.now() - NOON) / SECOND
    assert 5 == len(crew.started)
    assert before - 5 + refilled == pytest.approx(crew.level(), abs=0.5)


# An admission as a context manager --------------------------------------------------------------------------------


def settlements(limiter: Limiter) -> list[tuple[Admission, Cost | None]]:
    """Return what is settled with a limiter, as it happens."""
    told: list[tuple[Admission, Cost | None]] = []
    settle = limiter.settle

    def settle_and_record(admission: Admission, used: Cost | None, **facts: bool) -> None:
        told.append((admission, used))
        settle(admission, used, **facts)

    vars(limiter)["settle"] = settle_and_record
    return told


class Armchair(BaseException):
    """What no code expects."""


@pytest.mark.parametrize("is_settled", [False, True])
@pytest.mark.parametrize("error", [None, ZeroDivisionError, asyncio.CancelledError, Armchair])
def test_a_reservation_is_settled_once_whatever_happens(
    crew: Crew, error: type[BaseException] | None, *, is_settled: bool
) -> None:
    crew.know(known_group(seen=limited(600, 100)))
    used = Cost(1, 7, 9)

    async def story(limiter: Limiter) -> list[Cost | None]:
        told = settlements(limiter)
        admitted = await crew.admit(limiter)
        assert isinstance(admitted, Admission)
        with suppress(BaseException), admitted:
            if is_settled:
                admitted.settle(used)
            if error is not None:
                raise error
        return [cost for admission, cost in told if admission is admitted]

    assert [used if is_settled else None] == crew.play(story)


def test_a_reservation_is_never_settled_twice(crew: Crew) -> None:
    crew.know(known_group(seen=limited(600, 100)))

    async def story(limiter: Limiter) -> None:
        admitted = await crew.admit(limiter)
        assert isinstance(admitted, Admission)
        admitted.settle(None)
        with pytest.raises(AssertionError, match="settled once"):
            admitted.settle(admitted.reserved)

    crew.play(story)


def test_a_write_that_always_loses_its_race_gives_up_for_a_while(crew: Crew) -> None:
    """Others write all the time for two minutes; then everything that was gathered is written."""
    crew.know(known_group(seen=limited(600, 100)))
    genuine = crew.store.replace

    def overtaken(group: Group, expected_version: int) -> None:
        if crew.time.now() < NOON + 2 * MINUTE:
            current = crew.store.stored[group.id]
            genuine(replace(current, version=current.version + 1), current.version)
        genuine(group, expected_version)

    crew.store.replace = overtaken  # type: ignore[method-assign]

    async def story(limiter: Limiter) -> int:
        await crew.call(limiter)
        return limiter.writes

    writes = crew.play(story)

    assert 1 == len(crew.started)
    assert crew.started[0] >= NOON + 2 * MINUTE
    assert {"limits table busy"} == set(crew.events.problem_names)
    assert writes > MOST_CONFLICTS


def test_the_owners_of_waiting_jobs_take_turns(crew: Crew) -> None:
    """A worker holds eighty jobs of one tenant when the first of another arrives: one call a second may start."""
    crew.know(known_group(seen=limited(60, 1)))
    started: list[str] = []

    async def job(limiter: Limiter, owner: str) -> None:
        latest = crew.time.now() + 5 * MINUTE
        admitted = await limiter.admit([claimant()], 100, 100, latest, owner=Owner(owner))
        assert isinstance(admitted, Admission)
        await limiter.wait_for_start(admitted)
        started.append(owner)
        limiter.settle(admitted, admitted.reserved)

    async def story() -> None:
        async with crew.limiter() as limiter:
            many = [asyncio.create_task(job(limiter, "many")) for _ in range(80)]
            await asyncio.sleep(5)
            few = [asyncio.create_task(job(limiter, "few")) for _ in range(5)]
            await asyncio.gather(*few)
            for each in many:
                each.cancel()
            await asyncio.gather(*many, return_exceptions=True)

    crew.time.run(story())

    # Start times are reserved up to 18 s ahead.
    assert len(started) <= 5 + 18 + 2 * 5


def others(number: int) -> Owner:
    return Owner("other", f"msgbatch_{number}")


@pytest.mark.parametrize(
    ("owner_of", "after_ms", "count"),
    [
        pytest.param(lambda _: Owner("other", "large"), 0, 30, id="another tenant's"),
        pytest.param(lambda _: Owner("own", "large"), 0, 30, id="its own tenant's"),
        pytest.param(others, 0, 30, id="many batches of another tenant"),
        pytest.param(lambda _: Owner("other", "large"), 20 * SECOND, 30, id="the second one"),
        pytest.param(lambda _: Owner("other", ""), 0, 10, id="few of them"),
    ],
)
def test_a_small_batch_starts_before_a_backlog_that_many_workers_hold(
    crew: Crew, owner_of: Callable[[int], Owner], after_ms: int, count: int
) -> None:
    """Each of ten workers would have a tenth of the starts: 30 rows would take 30 s at ten calls a second."""
    crew.know(known_group(seen=limited(600, 10)))
    small = Owner("own", "small")

    async def job(limiter: Limiter, owner: Owner) -> int:
        latest = crew.time.now() + 5 * MINUTE
        while True:
            admitted = await limiter.admit([claimant()], 100, 100, latest, owner=owner)
            assert isinstance(admitted, Admission)
            if await limiter.wait_for_start(admitted):
                limiter.settle(admitted, admitted.reserved)
                return crew.time.now()
            limiter.settle(admitted, None)

    async def story() -> None:
        async with AsyncExitStack() as stack:
            workers = [await stack.enter_async_context(crew.limiter()) for _ in range(10)]
            many = [
                asyncio.create_task(job(each, owner_of(number)))
                for each in workers
                for number in range(80)
            ]
            await asyncio.sleep(40)
            # The last worker has worked for the backlog as well.
            last = workers[-1]
            for pause in (0, after_ms):
                await asyncio.sleep(pause / 1000)
                began = crew.time.now()
                ends = await asyncio.gather(*(job(last, small) for _ in range(count)))
                assert max(ends) - began < (6 + count // 10) * SECOND
            for each in many:
                each.cancel()
            await asyncio.gather(*many, return_exceptions=True)

    crew.time.run(story())
