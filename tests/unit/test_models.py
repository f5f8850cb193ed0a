"""Known and unknown models: names that callers invent cost nobody else anything, and new models work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from sluice.domain.jobs import Job
from sluice.domain.limits import SAFE_START
from sluice.domain.models import (
    KEPT_MS,
    MOST_ANSWERED,
    MOST_OF_A_TENANT,
    KnownModels,
    is_unknown,
    model_group,
    with_answer,
    with_loaded,
)
from sluice.wiring.shared import model_groups
from tests.fakes import (
    NOON,
    ROOMY,
    SECOND,
    Gateway,
    a_job,
    answer,
    known_group,
    refused,
    upstream_key,
)

# Rules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("claude-a-1", "claude-a.x"),
        ("claude-a-1-20260101", "claude-a.x"),
        ("claude-new", "unknown:acme"),
        ("claude-new-20260101", "unknown:acme"),
        ("Claude-A-1", "unknown:acme"),
        ("unknown:other", "unknown:acme"),
        ("", "unknown:acme"),
    ],
)
def test_known_models_have_a_group_and_unknown_ones_share_the_tenants(
    model: str, name: str
) -> None:
    assert name == model_group(model, {"claude-a-1": "claude-a.x"}, "acme")


def test_every_model_with_a_price_is_known() -> None:
    assert not any(
        is_unknown(model_group(model, model_groups(), "acme")) for model in model_groups()
    )
    assert "claude-haiku-5-5" == model_group("claude-haiku-5-5-20261001", model_groups(), "acme")
    assert "claude-opus-4.x" == model_group("claude-opus-4-8", model_groups(), "acme")


def test_an_answered_model_is_known_by_its_name_without_the_date() -> None:
    models = with_answer(KnownModels(), "claude-new-20270101", "acme", NOON)

    assert {"claude-new": "claude-new"} == models.groups()
    assert 1 == models.version
    assert models is with_answer(models, "claude-new", "other", NOON)


def test_what_the_rate_limits_api_says_takes_precedence_over_an_answer() -> None:
    models = with_answer(KnownModels(), "claude-new", "acme", NOON)

    listed = with_loaded(models, {"claude-new": "claude-a.x"})

    assert {"claude-new": "claude-a.x"} == listed.groups()
    assert listed is with_loaded(listed, {"claude-new": "claude-a.x"})


def test_a_tenant_makes_few_models_known_and_no_other_tenant_fewer() -> None:
    models = KnownModels()
    for number in range(1_000):
        models = with_answer(models, f"invented-{number}", "hostile", NOON)
    assert MOST_OF_A_TENANT == len(models.groups())

    models = with_answer(models, "claude-new", "acme", NOON)

    assert "claude-new" in models.groups()


@pytest.mark.parametrize("model", ["unknown:other", "claude-a.x", "claude-a.x-20270101"])
def test_a_model_named_like_a_limit_group_does_not_join_it(model: str) -> None:
    """A relay may answer for any name."""
    models = with_answer(KnownModels(), model, "acme", NOON, taken={"claude-a.x"})

    assert {} == models.groups()


def test_the_list_of_all_tenants_is_bounded() -> None:
    models = KnownModels()
    for number in range(2 * MOST_ANSWERED):
        models = with_answer(models, f"model-{number}", f"tenant-{number}", NOON)

    assert MOST_ANSWERED == len(models.groups())


def test_models_that_were_answered_long_ago_make_room() -> None:
    models = KnownModels()
    for number in range(MOST_OF_A_TENANT):
        models = with_answer(models, f"model-{number}", "acme", NOON)

    later = with_answer(models, "claude-new", "acme", NOON + KEPT_MS)

    assert {"claude-new"} == set(later.groups())


# In the worker ---------------------------------------------------------------------------------------------------


Make = Callable[..., Gateway]


@pytest.fixture
def make() -> Iterator[Make]:
    """Return what makes gateways, which are closed after the test."""
    made: list[Gateway] = []

    def one(*jobs: Job, **facts: Any) -> Gateway:
        made.append(Gateway(*jobs, **facts))
        return made[-1]

    yield one
    for each in made:
        each.time.close()


def names_of(gateway: Gateway) -> set[str]:
    """Return the stored limit groups."""
    return set(gateway.limits.stored)


def test_invented_models_store_one_group_for_their_tenant(make: Make) -> None:
    jobs = [a_job(f"job_{n}", model=f"invented-{n}") for n in range(100)]
    gateway = make(*jobs)
    gateway.claude.when = lambda _: refused(404, "not_found_error", message="model: invented")

    gateway.drain()

    assert {"errored"} == {gateway.job(job.job_id).state.value for job in jobs}
    assert {"org/unknown:acme"} == names_of(gateway)
    assert KnownModels() == gateway.limits.known_models


def test_an_upstream_that_answers_for_every_name_gives_out_few_groups(make: Make) -> None:
    jobs = [a_job(f"job_{n}", model=f"invented-{n}") for n in range(60)]
    gateway = make(*jobs)

    gateway.drain()

    assert {"succeeded"} == {gateway.job(job.job_id).state.value for job in jobs}
    assert len(names_of(gateway)) <= MOST_OF_A_TENANT + 1
    starts = sorted(call.at for call in gateway.claude.calls)
    assert starts[-1] - starts[0] >= (60 - 2 * MOST_OF_A_TENANT) * SECOND, (
        "the pace of one new group"
    )


def test_no_tenant_uses_the_limits_of_another_groups_name() -> None:
    jobs = [a_job(f"job_{n}", model=name) for n, name in enumerate(("a", "unknown:other"))]
    gateway = Gateway(*jobs)

    gateway.drain()
    gateway.time.close()

    assert {"org/unknown:acme"} == names_of(gateway)


def test_a_new_model_has_its_own_limits_after_its_first_answer(make: Make) -> None:
    jobs = [a_job(f"job_{n}", model="claude-new") for n in range(200)]
    gateway = make(*jobs, keys=[upstream_key(organization="org")])
    gateway.claude.when = lambda _: answer(organization="org")

    gateway.drain()

    assert {"succeeded"} == {gateway.job(job.job_id).state.value for job in jobs}
    stored = gateway.limits.stored
    assert ROOMY["requests"].limit == stored["org/claude-new"].requests.limit
    assert SAFE_START["requests"] == stored["org/unknown:acme"].requests.limit
    assert gateway.time.now() - NOON < 30 * SECOND


def test_a_new_model_is_known_to_a_worker_that_runs_already(make: Make) -> None:
    gateway = make(a_job(model="claude-new"))
    gateway.claude.when = lambda _: answer(organization="org")
    gateway.drain()

    gateway.submit(a_job("job_2", model="claude-new"))
    other = gateway.new_worker()
    gateway.time.run(gateway.invoke(other))

    groups = [call.request.model for call in gateway.claude.calls]
    assert ["claude-new", "claude-new"] == groups
    assert {"org/claude-new", "org/unknown:acme"} == names_of(gateway)


def test_a_model_that_another_worker_has_made_known_has_its_own_limits_at_once(make: Make) -> None:
    """Also if this invocation ran only known models before, and has just read the key pool for one of them."""
    gateway = make(a_job(), latency_ms=40 * SECOND)

    async def later_jobs() -> None:
        invocation = asyncio.create_task(gateway.invoke())
        await asyncio.sleep(10)
        gateway.submit(a_job("job_2", model="claude-b"))
        await asyncio.sleep(2)
        known = with_answer(KnownModels(), "claude-new", "other", gateway.time.now())
        gateway.limits.known_models = known
        gateway.submit(a_job("job_3", model="claude-new"))
        await invocation

    gateway.time.run(later_jobs())

    assert gateway.job("job_3").state == "succeeded"
    assert {"org/a", "org/b", "org/claude-new"} == names_of(gateway)


def test_a_model_answered_by_a_key_without_an_organization_belongs_to_the_learned_one(
    make: Make,
) -> None:
    gateway = make(a_job(model="claude-new"), keys=[upstream_key(organization=None)])
    gateway.claude.when = lambda _: answer(organization="org-9")
    gateway.drain()

    gateway.submit(a_job("job_2", model="claude-new"))
    gateway.drain()

    assert gateway.job("job_2").state == "succeeded"
    assert "org-9/claude-new" in names_of(gateway)


def test_unknown_models_of_one_tenant_do_not_delay_those_of_another(make: Make) -> None:
    hostile = [a_job(f"job_{n}", model=f"invented-{n}", tenant="hostile") for n in range(10)]
    gateway = make(*hostile, a_job("job_own", model="claude-new", tenant="acme"))
    gateway.know(replace(known_group("org", "unknown:hostile"), blocked_until=NOON + 600 * SECOND))

    gateway.once()

    first = next(call for call in gateway.claude.calls if call.request.model == "claude-new")
    assert first.at - NOON < 2 * SECOND


def test_a_busy_store_does_not_keep_an_answer_from_its_job(make: Make) -> None:
    gateway = make(a_job(model="claude-new"))
    gateway.limits.fail_next("replace_models", times=5)

    gateway.drain()

    assert gateway.job().state == "succeeded"
    assert "model not recorded" in [what for what, _ in gateway.events.problems]
