"""Rows that kill their workers: only they end, and few calls of other rows are repeated."""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest

from sluice.domain.batches import (
    LOSSES_UNTIL_ALONE,
    MOST_LOST_ALONE,
    RangeState,
    cancel_batch,
    claim_range,
    row_job_id,
)
from sluice.domain.capacity import ROWS_AT_ONCE
from sluice.ports.claude import CallRequest, Refused
from sluice.worker import range_windows
from tests.bulk_fakes import Bulk, Deaths, KillsAt, a_row, jsonl, number_in
from tests.fakes import MINUTE, NOON, refused
from tests.unit.test_windows import as_one_range

Make = Callable[..., Bulk]
ROWS = 100
WORKERS = LOSSES_UNTIL_ALONE + MOST_LOST_ALONE
"""Lost to one killer at most."""

REPEATED = ROWS_AT_ONCE + 30 + 7 - 3
"""Maximum calls of innocent rows lost to one killer: those in flight with it while 120, 30 and 7 rows ran at once."""


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Windows of fifty rows, so that a range of a hundred has two."""
    monkeypatch.setattr(range_windows, "WINDOW_ROWS", 50)
    made: list[Bulk] = []

    def one(rows: int = ROWS, expires_at: int = NOON + 24 * 60 * MINUTE, **facts: Any) -> Bulk:
        made.append(Bulk(**facts))
        body = jsonl(*(a_row(number) for number in range(rows)))
        as_one_range(made[-1], body, expires_at=expires_at)
        return made[-1]

    yield one
    for each in made:
        each.close()


def by_end(bulk: Bulk) -> dict[str, set[int]]:
    ends: dict[str, set[int]] = {}
    for row in bulk.results():
        number = int(row["custom_id"].removeprefix("row-"))
        ends.setdefault(row["result"]["type"], set()).add(number)
    return ends


def calls(bulk: Bulk) -> Counter[int]:
    return Counter(number_in(bytes(call.request.body.data)) for call in bulk.claude.calls)


def job_id_of(bulk: Bulk, number: int) -> str:
    lines = bulk.objects.stored[bulk.batch.input_key].splitlines(keepends=True)
    return row_job_id(bulk.batch.batch_id, sum(map(len, lines[:number])))


def lost(bulk: Bulk, *suspects: int, blamed: tuple[int, ...] = ()) -> None:
    """Record the range as one that lost three workers, the last with these rows in flight."""
    lines = bulk.objects.stored[bulk.batch.input_key].splitlines(keepends=True)
    offset_of = [sum(map(len, lines[:number])) for number in range(len(lines))]
    bulk.batches.ranges[bulk.batch.batch_id, 0] = RangeState(
        bulk.batch.batch_id,
        0,
        "acme",
        version=7,
        losses=LOSSES_UNTIL_ALONE,
        claims=3,
        suspects=tuple(offset_of[number] for number in suspects),
        lost=tuple((offset_of[number], 3, NOON) for number in suspects),
        blamed=tuple(offset_of[number] for number in blamed),
    )


STORIES = [
    pytest.param(Deaths({0}), id="the first row"),
    pytest.param(Deaths({23}), id="a row in the middle"),
    pytest.param(Deaths({49}), id="the last row of a window"),
    pytest.param(Deaths({50}), id="the first row of the second window"),
    pytest.param(Deaths({99}), id="the last row"),
    pytest.param(Deaths({7, 31}), id="two rows of a window"),
    pytest.param(Deaths({3, 4, 5}), id="three rows side by side"),
    pytest.param(Deaths({0, 49, 50, 99}), id="the first and last rows of two windows"),
    pytest.param(Deaths(set(range(0, 100, 10))), id="every tenth row"),
    pytest.param(Deaths({23}, after_ms=0), id="at once"),
    pytest.param(Deaths({23}, after_ms=20_000), id="after a long call"),
    pytest.param(Deaths({23}, KillsAt.REQUEST), id="before its call"),
    pytest.param(Deaths({23, 60}, KillsAt.SAVE), id="after its call, when it is saved"),
    pytest.param(Deaths({23}, ordinary={1: 2.0, 3: 1.0, 6: 3.0}), id="between ordinary deaths"),
]


@pytest.mark.parametrize("latency_ms", [200, 30_000])
@pytest.mark.parametrize("deaths", STORIES)
def test_only_a_row_that_kills_its_workers_ends_errored(
    make: Make, deaths: Deaths, latency_ms: int
) -> None:
    bulk = make(latency_ms=latency_ms)

    died = bulk.drain_with(deaths)

    killers = set(deaths.killers)
    assert {"errored": killers, "succeeded": set(range(ROWS)) - killers} == by_end(bulk)
    ordinary = len(deaths.ordinary)
    # An ordinary death may restart the search.
    assert died <= len(killers) * WORKERS + ordinary * (1 + LOSSES_UNTIL_ALONE)
    called = calls(bulk)
    again = sum(called[number] - 1 for number in set(range(ROWS)) - killers)
    assert again <= (len(killers) + ordinary) * REPEATED
    errors = [row["result"]["error"]["error"] for row in bulk.results() if "error" in row["result"]]
    reason = f"worker_lost: {MOST_LOST_ALONE} workers died while each ran nothing but this row"
    assert all(error["message"].startswith(reason) for error in errors)
    assert len(killers) == len(errors)


def test_no_call_of_another_row_is_lost_once_rows_run_one_at_a_time(make: Make) -> None:
    bulk = make(latency_ms=30_000)

    died = bulk.drain_with(Deaths({3}, after_ms=10_000))

    called = calls(bulk)
    assert (WORKERS, WORKERS) == (died, called[3])
    # Lost with each of the first three workers, then called alone, and saved before the killer began.
    assert {LOSSES_UNTIL_ALONE + 1} == {called[number] for number in range(7) if number != 3}
    assert LOSSES_UNTIL_ALONE == max(called[number] for number in range(7, ROWS))


def test_the_ledger_names_every_call_of_a_killer_once(make: Make) -> None:
    bulk = make(latency_ms=2_000)
    bulk.drain_with(Deaths({3, 70}))

    rows = [row for row in bulk.ledger.rows.values() if row.outcome == "worker_lost"]

    assert {False} == {row.certain for row in rows}
    named = Counter(row.job_id for row in rows)
    called = calls(bulk)
    killers = [named[job_id_of(bulk, number)] for number in (3, 70)]
    assert [called[3], called[70]] == killers
    assert len(rows) == bulk.summary()["uncertain_calls"]


def test_a_ledger_that_is_busy_delays_a_range_whose_worker_died(make: Make) -> None:
    bulk = make(rows=3, latency_ms=2_000)
    lost(bulk, 0, blamed=(0, 0))
    bulk.ledger.fail_next("calls_of", 2)

    bulk.drain()

    assert {"succeeded": {0, 1, 2}} == by_end(bulk)
    assert "range not read" in bulk.events.problem_names
    assert 1 == sum(row.outcome == "worker_lost" for row in bulk.ledger.rows.values())


def test_a_killer_is_found_though_rows_wait_for_longer_than_an_invocation(make: Make) -> None:
    bulk = make(latency_ms=2_000)
    waited: set[int] = set()

    def once(request: CallRequest) -> Refused | None:
        number = number_in(bytes(request.body.data))
        if number > 9 or number in waited:
            return None
        waited.add(number)
        return refused(429, "rate_limit_error", retry_after_ms=5 * MINUTE)

    bulk.claude.when = once
    died = bulk.drain_with(Deaths({5, 30}, after_ms=900))

    assert {"errored": {5, 30}, "succeeded": set(range(ROWS)) - {5, 30}} == by_end(bulk)
    assert died <= 2 * WORKERS


def test_a_busy_table_blames_no_row(make: Make) -> None:
    bulk = make(latency_ms=2_000)
    bulk.time.run(first_losses(bulk))

    async def story() -> None:
        await asyncio.sleep(1)
        for _ in range(20):
            bulk.batches.fail_next("replace_range")
            await asyncio.sleep(0.7)

    async def both() -> None:
        await asyncio.gather(story(), bulk.invoke())

    bulk.time.run(both())
    bulk.drain()

    assert {"succeeded": set(range(ROWS))} == by_end(bulk)
    (state,) = bulk.batches.ranges.values()
    assert () == state.blamed


def test_a_cancel_ends_the_search(make: Make) -> None:
    bulk = make(latency_ms=30_000)
    bulk.time.run(first_losses(bulk))
    bulk.batches.replace(cancel_batch(bulk.batch, bulk.time.now()), bulk.batch.version)

    bulk.drain_with(Deaths({0}))

    assert {"canceled": set(range(ROWS))} == by_end(bulk)


def test_rows_expire_during_a_search(make: Make) -> None:
    bulk = make(rows=10, expires_at=NOON + 5 * MINUTE, latency_ms=30_000)

    bulk.drain_with(Deaths({0}, after_ms=15_000))

    ends = by_end(bulk)
    assert 0 in ends["expired"]
    assert set(range(10)) == ends["expired"] | ends["succeeded"]


async def first_losses(bulk: Bulk) -> None:
    """Lose three workers, so that the next one runs one row at a time."""
    for _ in range(LOSSES_UNTIL_ALONE):
        due = bulk.queues.next_visible()
        assert due is not None
        await asyncio.sleep(max(0, due - bulk.time.now()) / 1000)
        task = asyncio.create_task(bulk.invoke())
        await asyncio.sleep(1)
        await bulk.kill(task)
    due = bulk.queues.next_visible()
    assert due is not None
    await asyncio.sleep(max(0, due - bulk.time.now()) / 1000)


def test_suspects_run_first_and_all_others_at_once_after_them(make: Make) -> None:
    bulk = make(latency_ms=2_000)
    lost(bulk, 30, 31)

    bulk.drain()

    in_order = [number_in(bytes(call.request.body.data)) for call in bulk.claude.calls]
    assert [30, 31, 0, 1] == in_order[:4]
    assert bulk.claude.most_in_flight > 16


def test_rows_that_run_one_at_a_time_do_not_wait_to_be_saved(make: Make) -> None:
    bulk = make(rows=20, latency_ms=500)
    lost(bulk)

    bulk.drain()

    assert 1 == bulk.claude.most_in_flight
    assert bulk.time.now() - NOON < 20 * 1_000


def test_a_row_that_waits_after_its_call_is_not_blamed_for_a_death(make: Make) -> None:
    bulk = make(rows=1, latency_ms=500)
    bulk.claude.when = lambda _: refused(429, "rate_limit_error", retry_after_ms=50_000)
    lost(bulk)

    async def story() -> None:
        task = asyncio.create_task(bulk.invoke())
        await asyncio.sleep(20)
        await bulk.kill(task)
        await asyncio.sleep(60)

    bulk.time.run(story())
    (state,) = bulk.batches.ranges.values()
    after = claim_range(state, "next", bulk.time.now(), bulk.time.now() + 1)

    assert 1 == len(bulk.claude.calls)
    assert () == after.blamed


@pytest.mark.parametrize("losses", [1, 4])
def test_a_range_that_lost_workers_with_the_version_before_goes_on(make: Make, losses: int) -> None:
    """The version before recorded no rows in flight, and counted up to four workers."""
    bulk = make(latency_ms=2_000)
    bulk.batches.ranges[bulk.batch.batch_id, 0] = RangeState(
        bulk.batch.batch_id, 0, "acme", version=7, owner="dead", claims=5, losses=losses
    )

    died = bulk.drain_with(Deaths({23, 70}))

    assert {"errored": {23, 70}, "succeeded": set(range(ROWS)) - {23, 70}} == by_end(bulk)
    assert died <= 2 * WORKERS


@pytest.mark.parametrize("seed", range(15))
def test_killers_are_found_whatever_else_happens(make: Make, seed: int) -> None:
    """Rows that wait in the invocation or out of it, ordinary deaths, and several killers, at random."""
    rng = Random(seed)  # noqa: S311 - a story, not a secret
    bulk = make(latency_ms=rng.choice([200, 2_000, 30_000]))
    waits = {rng.randrange(ROWS): rng.choice([5, 50, 300, 800]) for _ in range(10)}

    def once(request: CallRequest) -> Refused | None:
        seconds = waits.pop(number_in(bytes(request.body.data)), None)
        if seconds is None:
            return None
        return refused(429, "rate_limit_error", retry_after_ms=seconds * 1_000)

    bulk.claude.when = once
    killers = {rng.randrange(ROWS) for _ in range(rng.choice([1, 2, 5]))}
    ordinary = {rng.randrange(1, 12): rng.choice([1, 5, 20, 50]) for _ in range(2)}
    deaths = Deaths(killers, rng.choice(list(KillsAt)), rng.choice([0, 300, 10_000]), ordinary)
    died = bulk.drain_with(deaths)

    assert {"errored": killers, "succeeded": set(range(ROWS)) - killers} == by_end(bulk)
    assert died <= len(killers) * WORKERS + len(ordinary) * (1 + LOSSES_UNTIL_ALONE)
