"""Refusals and records as whole jobs meet them: what is parked, what ends, what is billed, and who is not touched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from sluice.api.views import job_view
from sluice.domain.breakers import STREAK, refusals_circuit
from sluice.domain.errors import NotStorable
from sluice.domain.jobs import State
from sluice.domain.pricing import Bill, Charge, Usage
from sluice.domain.retries import INTERNAL
from tests.fakes import MINUTE, NOON, Gateway, a_job, answer, refused

UNKNOWN = refused(400, "invalid_request_error", message="Words nobody has seen before.")
NO_CREDIT = refused(
    400, "invalid_request_error",
    message="Your credit balance is too low to access the Anthropic API.",
)  # fmt: skip


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    made = Gateway()
    yield made
    made.time.close()


def states(gateway: Gateway, *names: str) -> list[State]:
    return [gateway.job(name).state for name in names]


# Account-wide refusals ------------------------------------------------------------------------------------------


def test_no_credit_parks_the_file_with_an_alarm_and_it_runs_once_somebody_has_paid(
    gateway: Gateway,
) -> None:
    names = [f"job_{n}" for n in range(20)]
    gateway.submit(*(a_job(name) for name in names))
    gateway.claude.when = lambda _: NO_CREDIT

    gateway.once()

    assert {State.QUEUED} == set(states(gateway, *names))
    assert {0} == {gateway.job(name).attempts_used for name in names}
    assert 1 <= gateway.events.counted("GroupsParked")
    assert "account refused by upstream" in gateway.events.problem_names
    assert "no credit" == gateway.limits.stored["org/a"].blocked_reason

    gateway.claude.when = lambda _: None
    gateway.time.pass_seconds(16 * 60)
    gateway.submit(a_job("later"))
    gateway.drain()

    assert State.SUCCEEDED == gateway.job("later").state


def test_unknown_refusals_in_a_row_park_the_rest_of_the_file(gateway: Gateway) -> None:
    """The account may be in trouble: a few jobs end with the reason, the others wait for a person."""
    names = [f"job_{n}" for n in range(30)]
    gateway.submit(*(a_job(name) for name in names))
    gateway.claude.when = lambda _: UNKNOWN

    gateway.once()

    ended = [name for name in names if gateway.job(name).state is State.ERRORED]
    assert STREAK - 1 == len(ended)
    assert {"Words nobody has seen before."} == {
        job.error.message for name in ended if (job := gateway.job(name)).error
    }
    assert "unknown refusals in a row" in gateway.events.problem_names
    assert "Words nobody" not in repr(gateway.events.problems)  # it may quote the request
    assert 1 <= gateway.events.counted("GroupsParked")
    assert {0} == {gateway.job(name).attempts_used for name in set(names) - set(ended)}

    gateway.claude.when = lambda _: None
    gateway.drain()

    assert {State.SUCCEEDED} == set(states(gateway, *(set(names) - set(ended))))


def test_one_tenants_unknown_refusals_do_not_stop_another_tenant(gateway: Gateway) -> None:
    bad = [f"bad_{n}" for n in range(20)]
    good = [f"good_{n}" for n in range(20)]
    gateway.submit(*(a_job(name, tenant="mallory") for name in bad))
    gateway.submit(*(a_job(name) for name in good))
    gateway.claude.when = lambda request: UNKNOWN if b"bad_" in request.body.data else None

    gateway.once()

    assert {State.SUCCEEDED} == set(states(gateway, *good))
    assert max(gateway.job(name).finished_at or 0 for name in good) < NOON + MINUTE


def test_refusals_between_answers_are_those_of_their_jobs(gateway: Gateway) -> None:
    names = [f"job_{n}" for n in range(10)]
    odd = [f"odd_{n}" for n in range(10)]
    for pair in zip(names, odd, strict=True):
        gateway.submit(*(a_job(name) for name in pair))
        gateway.claude.when = lambda request: UNKNOWN if b"odd_" in request.body.data else None
        gateway.drain()

    assert {State.ERRORED} == set(states(gateway, *odd))
    assert 0 == gateway.events.counted("GroupsParked")


def test_requests_that_are_known_to_be_invalid_end_however_many_they_are(gateway: Gateway) -> None:
    names = [f"job_{n}" for n in range(30)]
    gateway.submit(*(a_job(name) for name in names))
    gateway.claude.when = lambda _: refused(
        400, "invalid_request_error", message="max_tokens: 300000 > 128000"
    )

    gateway.drain()

    assert {State.ERRORED} == set(states(gateway, *names))
    assert 0 == gateway.events.counted("GroupsParked")


def test_a_429_about_one_request_stops_only_its_job(gateway: Gateway) -> None:
    gateway.submit(a_job("long"), *(a_job(f"job_{n}") for n in range(5)))
    never = refused(
        429, "rate_limit_error", message="Extra usage is required for long context requests."
    )
    gateway.claude.when = lambda request: never if b"long" in request.body.data else None

    gateway.once()

    assert State.ERRORED == gateway.job("long").state
    assert {State.SUCCEEDED} == set(states(gateway, *(f"job_{n}" for n in range(5))))
    assert 0 == gateway.limits.stored["org/a"].blocked_until


def test_limit_groups_do_not_name_tenants() -> None:
    assert "acme" not in refusals_circuit("acme")
    assert refusals_circuit("acme") != refusals_circuit("zenith")


# What cannot be stored, and what fails in the gateway ----------------------------------------------------------


def test_an_answer_that_no_store_takes_ends_its_job_and_is_billed_once(gateway: Gateway) -> None:
    gateway.submit(a_job())
    gateway.results.break_down("put", NotStorable("the data bucket", "it is too large"))

    gateway.drain()

    job = gateway.job()
    assert State.ERRORED == job.state
    assert job.error is not None
    assert "result_not_storable" == job.error.type
    assert "it is too large" in job.error.message
    assert (1, 210) == (len(gateway.claude.calls), job.cost_micro_usd)
    assert job.usage is not None
    assert 1 == len(gateway.ledger.rows)


def test_a_record_that_no_store_takes_ends_without_what_is_too_large(gateway: Gateway) -> None:
    gateway.submit(a_job())
    stored = gateway.jobs.replace

    def strict(job: Any, expected_version: int) -> None:
        if job.result is not None:
            raise NotStorable("the jobs table", "the item is too large")
        stored(job, expected_version)

    gateway.jobs.replace = strict  # type: ignore[method-assign]

    gateway.drain()

    job = gateway.job()
    assert (State.ERRORED, 210, 1) == (job.state, job.cost_micro_usd, len(gateway.claude.calls))
    assert job.error is not None
    assert "result_not_storable" == job.error.type


def test_an_error_in_the_gateway_is_neither_upstreams_nor_the_workers(gateway: Gateway) -> None:
    gateway.submit(a_job())
    gateway.claude.when = lambda _: ZeroDivisionError("armchair")

    gateway.drain()

    job = gateway.job()
    assert State.ERRORED == job.state
    assert {INTERNAL} == {attempt.error.type for attempt in job.attempts if attempt.error}
    assert {} == gateway.limits.stored["org/a"].circuits


# Costs ---------------------------------------------------------------------------------------------------------


def test_a_call_without_usage_is_made_once_and_its_cost_is_unknown(gateway: Gateway) -> None:
    gateway.submit(a_job())
    gateway.claude.when = lambda _: replace(answer(), usage=None)

    gateway.drain()

    job = gateway.job()
    assert (State.SUCCEEDED, 1, 1) == (job.state, len(gateway.claude.calls), job.unknown_costs)
    assert 1 == gateway.events.counted("UnknownCosts")
    assert "upstream reports no usage" in gateway.events.problem_names
    shown = job_view(job)
    assert (None, None, 0, 1, None) == (
        shown["cost_micro_usd"], shown["cost_usd"], shown["known_cost_micro_usd"],
        shown["unknown_costs"], shown["usage"],
    )  # fmt: skip
    (row,) = gateway.ledger.rows.values()
    assert (0, 1) == (row.spend.cost_micro_usd, row.spend.unknown_costs)


def test_a_model_without_a_price_has_an_unknown_cost(gateway: Gateway) -> None:
    gateway.submit(a_job(model="claude-new"))

    gateway.drain()

    job = gateway.job()
    assert (State.SUCCEEDED, 0, 1) == (job.state, job.cost_micro_usd, job.unknown_costs)
    assert job.usage is not None


def test_a_call_is_billed_at_the_price_of_the_models_that_ran(gateway: Gateway) -> None:
    gateway.submit(a_job())
    bill = Bill(
        "claude-b",
        (Charge(None, Usage(input_tokens=1_000)), Charge("claude-a", Usage(output_tokens=1))),
    )
    gateway.claude.when = lambda _: replace(answer(usage=bill.usage), bill=bill)
    day = gateway.rules.prices.prices[0].starts
    prices = gateway.rules.prices
    wanted = prices.bill_micro_usd("claude-a", bill, day)

    gateway.drain()

    assert wanted == gateway.job().cost_micro_usd
