"""The checks of a chaos run: a run that loses a job or pays twice fails, whatever its size."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.chaos.__main__ import SMALL, Notes
from bench.chaos.verdict import (
    BOUND_SECONDS,
    Deliveries,
    Found,
    Kill,
    KilledCalls,
    Recovery,
    Size,
    Take,
    billed_twice,
    killed_calls,
    not_as_promised,
    recovery,
)
from sluice.domain.jobs import Attempt, AttemptOutcome, Job
from tests.fakes import NOON, SECOND, a_job

GOOD = Found(
    accepted=40,
    succeeded=40,
    ended_otherwise=0,
    made_twice=0,
    explained=3,
    unexplained=0,
    dead_letters=0,
    workers_killed=0,
    recoveries=(),
    killed_calls=(),
    longest_call_seconds=2.0,
    most_held=9,
    restarts=4,
    throttled_seconds=3.0,
    outage_seconds=8.0,
    outage_receives=4,
)


def called(*request_ids: str) -> Job:
    """A job with an attempt for each call whose outcome it kept."""
    attempts = tuple(
        Attempt(number, "claude-a", NOON, request_id=request_id)
        for number, request_id in enumerate(request_ids, start=1)
    )
    return a_job(custom_id="one", attempts=attempts)


def bill(request_id: str, *, billed: bool = True) -> dict[str, Any]:
    return {"user_id": "one", "request_id": request_id, "billed": billed}


def row(request_id: str | None, note: str | None = None) -> dict[str, Any]:
    return {"job_id": "job_1", "request_id": request_id, "note": note}


@pytest.mark.parametrize(
    ("rows", "books", "expected"),
    [
        # One call, one bill.
        ([row("a")], [bill("a")], (0, 0)),
        # Refused calls cost nothing.
        ([], [bill("a"), bill("b", billed=False)], (0, 0)),
        # The ledger names the call and says why it brought nothing.
        ([row("b", "lease lost")], [bill("a"), bill("b")], (1, 0)),
        # It has the call without saying why: no cause.
        ([row("b")], [bill("a"), bill("b")], (0, 1)),
        # A worker died: its call has no id, and explains one bill only.
        ([row(None, "the worker died during the call")], [bill("a"), bill("b")], (1, 0)),
        ([row(None, "died")], [bill("a"), bill("b"), bill("c")], (1, 1)),
        # Nobody knows of it.
        ([], [bill("a"), bill("b")], (0, 1)),
    ],
)
def test_a_bill_without_a_result_needs_a_row_that_says_why(
    rows: list[dict[str, Any]], books: list[dict[str, Any]], expected: tuple[int, int]
) -> None:
    assert expected == billed_twice([called("a")], rows, books)


def test_recovery_is_the_time_until_the_job_went_on_or_was_killed_again() -> None:
    attempts = (Attempt(1, "claude-a", NOON), Attempt(2, "claude-a", NOON + 150 * SECOND))
    records = {"job_1": a_job(attempts=attempts, finished_at=NOON + 160 * SECOND)}
    kills = [Kill(NOON / 1000 + at, ["job_1"]) for at in (10, 40, 170)]

    # From the first kill to the second, from that to the next attempt; after the third it had ended already.
    found = [each.seconds for each in recovery(kills, records, {})]
    assert [30.0, 110.0] == pytest.approx(found)


def test_closing_the_attempt_of_a_dead_worker_is_a_sign_and_an_unnoted_delivery_shares_the_wait() -> (
    None
):
    """The successor's own attempt is not in the record: it was snoozed."""
    lost = Attempt(
        1, "claude-a", NOON, ended_at=NOON + 250 * SECOND, outcome=AttemptOutcome.LOST, version=2
    )
    records = {"job_1": a_job(attempts=(lost,), finished_at=NOON + 900 * SECOND)}
    kills = [Kill(NOON / 1000 + 10, ["job_1"])]
    start = NOON / 1000
    unnoted = {"job_1": Deliveries([Take(start, 1), Take(start + 249, 3)])}
    returned = {"job_1": Deliveries([Take(start, 1), Take(start + 131, 2)], [start + 140])}

    assert [240.0] == [each.seconds for each in recovery(kills, records, {})]
    assert [120.0] == [each.seconds for each in recovery(kills, records, unnoted)]
    assert [130.0] == [each.seconds for each in recovery(kills, records, returned)]


@pytest.mark.parametrize(
    ("booked", "later", "expected"),
    [
        ({"job_1#2"}, [131], (1, 1, 1)),
        (set(), [131], (1, 0, 1)),
        ({"job_1#2"}, [], (1, 1, 0)),
    ],
)
def test_the_calls_in_flight_at_a_kill_are_in_the_ledger_and_made_again(
    booked: set[str], later: list[int], expected: tuple[int, int, int]
) -> None:
    """A job that was held and not in flight at the time counts only as held."""
    lost = Attempt(
        1, "claude-a", NOON, ended_at=NOON + 130 * SECOND, outcome=AttemptOutcome.LOST, version=2
    )
    records = {
        "job_1": a_job(custom_id="one", attempts=(lost,)),
        "job_2": a_job("job_2", custom_id="two"),
    }
    calls = [NOON / 1000 + at for at in (1, *later)]

    (found,) = killed_calls(
        [Kill(NOON / 1000 + 5, ["job_1", "job_2"])],
        records,
        [{"call_id": each} for each in booked],
        [{"user_id": "one", "at": at} for at in calls],
    )

    assert (2, *expected) == (found.held, found.in_flight, found.named, found.repeated)
    assert found.agree is (expected == (1, 1, 1))


@pytest.mark.parametrize(
    ("worse", "reason"),
    [
        ({"accepted": 39, "succeeded": 39}, "40 jobs accepted"),
        ({"succeeded": 39}, "no job lost"),
        ({"succeeded": 39, "ended_otherwise": 1}, "every job succeeded"),
        ({"made_twice": 1}, "no job made twice"),
        ({"unexplained": 1}, "nothing billed twice without a cause"),
        ({"dead_letters": 1}, "no dead letter"),
        (
            {"recoveries": (Recovery(1.0), Recovery(BOUND_SECONDS + 1))},
            f"recovery within {BOUND_SECONDS:.0f} s",
        ),
        (
            {"recoveries": (Recovery(BOUND_SECONDS + 33, is_suspect=True),)},
            "recovery of suspects within their bound",
        ),
        (
            {"killed_calls": (KilledCalls(3, 2, 2, 1),)},
            "calls in flight at a kill are in the ledger and are those made again",
        ),
        ({"outage_receives": 2}, "3 receives in the outage"),
        ({"most_held": 0}, "workers seen holding jobs"),
    ],
)
def test_a_small_run_fails_for_a_promise_that_is_not_kept(
    worse: dict[str, Any], reason: str
) -> None:
    assert [] == not_as_promised(SMALL, GOOD)
    assert reason in not_as_promised(SMALL, replace(GOOD, **worse))


def test_only_a_small_run_kills_no_worker() -> None:
    assert ["workers killed"] == not_as_promised(replace(SMALL, kills=Size().kills), GOOD)


def test_notes_say_which_jobs_each_worker_holds(tmp_path: Path) -> None:
    file = tmp_path / "notes.jsonl"
    notes = Notes(file)
    said = [
        {"at": 1.0, "pid": 7, "takes": {"a": 1, "b": 3}},
        {"at": 2.0, "pid": 8, "takes": {"c": 1}},
        {"at": 2.5, "pid": 7, "hides": True},
        {"at": 3.0, "pid": 7, "leaves": ["a"]},
        {"at": 4.0, "pid": 8, "over": True},
    ]
    file.write_text("\n".join(json.dumps(each) for each in said) + '\n{"at": 5.0, "pi')

    notes.look()

    assert {7: {"b"}} == {pid: hands.job_ids for pid, hands in notes.hands.items()}
    assert notes.hands[7].hidden
    assert (3, 2) == (notes.receives["b"], notes.most_held)
