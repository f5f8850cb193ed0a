"""The played week: its numbers, what upstream charges there, and that a missed target is reported."""

import random
from dataclasses import replace

import pytest

from bench.lanes.__main__ import missed
from bench.lanes.policies import AllBatch, AllLive, Clairvoyant, Policy, play, value_of_time
from bench.lanes.week import DAY, HOUR, MINUTE, NORMAL, SLOW, File, Week, a_week
from bench.lanes.world import CANCEL, TICK, Batch, Failed, Score, World

QUIET = Week(1, (), frozenset(), (), (-1, -1))
"""A week without files and troubles."""


def a_file(rows: int = 1_000, minutes: int = 60) -> File:
    return File(0, rows, 0, minutes * MINUTE)


def a_world(*files: File, **facts: object) -> World:
    return World(replace(QUIET, files=files, **facts), 4_000)  # type: ignore[arg-type]


def passed(world: World, minutes: float) -> None:
    for _ in range(round(minutes * MINUTE) // TICK):
        world.tick()


# The week


def test_the_week_has_the_rows_and_deadlines_of_the_benchmark() -> None:
    week = a_week(1, 700_000, 7)
    minutes = [(each.rows, (each.due - each.at) / MINUTE) for each in week.files]

    assert 700_000 == sum(rows for rows, _ in minutes)
    for share, shortest, longest in ((0.2, 30, 60), (0.3, 60, 240), (0.5, 240, 1440)):
        rows = sum(rows for rows, each in minutes if shortest <= each < longest)
        assert rows / 700_000 == pytest.approx(share, abs=0.08)
    assert all(0 <= each.at < 7 * DAY for each in week.files)
    assert 2 == len(week.slow_days)
    assert [20 * MINUTE] * 2 == [end - start for start, end in week.outages]
    assert HOUR == week.capped[1] - week.capped[0]


def test_a_seed_is_a_week() -> None:
    assert a_week(7, 5_000, 2) == a_week(7, 5_000, 2)
    assert a_week(7, 5_000, 2) != a_week(8, 5_000, 2)


@pytest.mark.parametrize(
    ("day", "within_an_hour", "beyond_six"), [(0, 0.90, 0.01), (1, 0.68, 0.10)]
)
def test_normal_and_slow_days_are_the_published_ones(
    day: int, within_an_hour: float, beyond_six: float
) -> None:
    week = replace(QUIET, slow_days=frozenset({1}))
    times = [week.takes(str(each), day * DAY) for each in range(20_000)]

    assert min(times) == MINUTE
    assert sum(each <= HOUR for each in times) / 20_000 == pytest.approx(within_an_hour, abs=0.01)
    assert sum(each > 6 * HOUR for each in times) / 20_000 == pytest.approx(beyond_six, abs=0.005)


def test_deadlines_right_after_an_outage_are_excused_and_later_ones_are_not() -> None:
    week = replace(QUIET, outages=((100 * MINUTE, 120 * MINUTE),))

    assert [False, True, True, False] == [
        week.is_excused(each * MINUTE) for each in (99, 100, 149, 150)
    ]


# Upstream and the live lane


def test_the_live_lane_starts_4_000_rows_a_minute_in_order() -> None:
    first, second = a_file(4_000, 1), replace(a_file(4_000, 2), number=1)
    world = a_world(first, second)
    world.send_live(first, 4_000)
    world.send_live(second, 4_000)

    passed(world, 1)
    assert 4_000 == world.ahead
    passed(world, 1)

    # The last 15 s of each file's minute are answered after the deadline.
    assert (8_000, 6_000) == (world.score.rows, world.score.met)
    assert 8_000 * 7_000 == world.score.micro_usd


def test_rows_finish_evenly_and_those_of_a_canceled_batch_that_did_not_are_free() -> None:
    batch = Batch("a", a_file(), 1_000, 0, 40 * MINUTE)
    world = a_world(batch.file)
    world.batches["a"] = batch
    passed(world, 10)
    world.cancel(batch)

    assert not world.has_ended(batch)
    passed(world, CANCEL / MINUTE)
    assert world.has_ended(batch)
    assert 750 == world.read(batch, world.now)
    assert 250 * 3_500 == world.score.micro_usd
    assert not world.is_over


def test_a_batch_expires_after_a_day() -> None:
    batch = Batch("a", a_file(), 1_000, 0, 4 * DAY)

    assert DAY == batch.ends_at
    assert 250 == batch.done


def test_in_an_outage_everything_fails_and_with_the_spend_cap_only_new_work() -> None:
    world = a_world(a_file(), outages=((0, MINUTE),), capped=(2 * MINUTE, 3 * MINUTE))
    batch = Batch("a", a_file(), 10, 0, HOUR)
    world.batches["a"] = batch
    world.send_live(a_file(), 10)
    for call in (world.has_ended, world.cancel):
        with pytest.raises(Failed):
            call(batch)
    with pytest.raises(Failed):
        world.create("b", a_file(), 10)
    world.now = 2 * MINUTE
    passed(world, 0.5)

    with pytest.raises(Failed):
        world.create("b", a_file(), 10)
    assert not world.has_ended(batch)
    assert 10 == world.ahead


def test_upstream_accepts_no_more_than_its_queue_holds() -> None:
    world = a_world()
    for number in range(5):
        world.create(f"{number}", a_file(), 100_000)

    with pytest.raises(Failed):
        world.create("more", a_file(), 1)


# Policies


def test_all_live_costs_the_full_price_and_all_batch_half_of_it() -> None:
    week = replace(QUIET, files=(a_file(10_000, 60),))

    live, batch = (play(week, 4_000, each).score for each in (AllLive, AllBatch))

    assert (10_000, 70_000_000) == (live.met, live.micro_usd)
    assert (10_000, 35_000_000) == (batch.rows, batch.micro_usd)
    assert 0 == live.twice == batch.twice


@pytest.mark.parametrize("regime", [NORMAL, SLOW])
def test_the_clairvoyant_knows_what_another_upstream_batch_is_worth(
    regime: tuple[int, float],
) -> None:
    """Compared with dice: of two minutes only one more batch can be made of four, so the first two times decide."""
    values = value_of_time(*regime)
    chance = random.Random(1)  # noqa: S311 - no secret
    times = [
        max(1.0, chance.lognormvariate(0, regime[1]) * regime[0] / MINUTE) for _ in range(40_000)
    ]

    two = sum(min(1.0, 2 / each) for each in times) / len(times)
    four = sum(max(min(1.0, 4 / each), two) for each in times) / len(times)

    assert (two, four) == pytest.approx((values[2], values[4]), abs=0.01)
    assert sorted(values) == [*values]


class Keeps(Clairvoyant):
    """A clairvoyant that never makes a second batch."""

    def consider(self, batch: Batch) -> None:
        """Keep it."""
        self.late[batch.name] = batch


def test_a_second_batch_never_costs_the_clairvoyant_more() -> None:
    def cost(policy: type[Policy]) -> int:
        total = Score()
        for seed in range(1, 4):
            total.add(play(a_week(seed, 30_000, 2), 4_000, policy).score)
        assert total.met_outside == total.outside
        return total.micro_usd

    assert cost(Clairvoyant) <= cost(Keeps)


# The targets


def score(live: int, batch: int, met: int = 1_000, outside: int = 1_000) -> Score:
    made = Score(1_000, met, 1_000, outside)
    made.lanes.update(live=live, batch=batch)
    return made


def test_reached_targets_are_not_reported() -> None:
    scores = {
        "all live": score(1_000, 0),
        "auto": score(100, 900, 990, 999),
        "clairvoyant": score(20, 980),
    }

    assert [] == missed(scores)


def test_every_missed_target_is_reported_with_its_figure() -> None:
    scores = {
        "all live": score(1_000, 0),
        "auto": score(300, 700, 989, 998),
        "clairvoyant": score(0, 1_000),
    }

    outside, met, above, below = missed(scores)

    assert "outside outages: 99.800%, target 99.9%" in outside
    assert "met: 98.900%, target 99%" in met
    assert "by 30.0%, target at most 8%" in above
    assert "by 35.0%, target at least 40%" in below
