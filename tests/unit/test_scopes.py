"""Limits and outages as whole jobs meet them: each applies to the narrowest scope that has it, and to no other job."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest

from sluice.domain.batches import Options
from sluice.domain.breakers import STREAK, Breaker
from sluice.domain.jobs import Job, State
from sluice.domain.keys import UpstreamKey
from sluice.domain.limits import Seen, block
from sluice.ports.claude import CallRequest, Headers, Refused
from sluice.worker.worker import Worker
from tests.bulk_fakes import Bulk, a_row, jsonl
from tests.fakes import (
    MINUTE,
    NOON,
    SECOND,
    Gateway,
    Reply,
    a_job,
    answer,
    known_group,
    refused,
    upstream_key,
)

SPENT = "You have reached your specified workspace API usage limits. You will regain access soon."
OVERLOADED = refused(529, "overloaded_error")
BROKEN = refused(500, "api_error")

Make = Callable[..., Gateway]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Gateway] = []

    def one(*jobs: Job, same_limits: bool = False, **facts: object) -> Gateway:
        gateway = Gateway(*jobs, **facts)  # type: ignore[arg-type]
        made.append(gateway)
        if same_limits:
            models = {"claude-a": "a", "claude-b": "a", "claude-c": "c"}
            gateway.rules = replace(gateway.rules, model_groups=models)
            gateway.worker = gateway.new_worker()
        for name in "abc":
            gateway.know(known_group("org", name))
        return gateway

    yield one
    for gateway in made:
        gateway.time.close()


def jobs(name: str, count: int, **facts: object) -> list[Job]:
    return [a_job(f"{name}_{number}", **facts) for number in range(count)]


def delays(gateway: Gateway, name: str) -> list[int]:
    """Return how long the finished jobs of this name took, in milliseconds."""
    return sorted(
        job.finished_at - job.created_at
        for job in gateway.jobs.stored.values()
        if job.job_id.startswith(f"{name}_") and job.finished_at
    )


def run(gateway: Gateway, minutes: float, *workers: Worker) -> None:
    """Let workers run invocation after invocation for some time."""
    end = gateway.time.now() + int(minutes * MINUTE)

    async def one(worker: Worker) -> None:
        while gateway.time.now() < end:
            due = gateway.queue.next_visible()
            if due is None or due > gateway.time.now():
                await asyncio.sleep(0.5)
                continue
            await gateway.invoke(worker)

    async def all_of_them() -> None:
        await asyncio.gather(*map(one, workers or (gateway.worker,)))

    gateway.time.run(all_of_them())


def by_key(replies: dict[str, Reply]) -> Callable[[CallRequest], Reply | None]:
    return lambda request: replies.get(request.key.id)


def by_model(replies: dict[str, Reply]) -> Callable[[CallRequest], Reply | None]:
    return lambda request: replies.get(request.model)


# Workspaces ----------------------------------------------------------------------------------------------------


def own_keys(*names: str, organization: str | None = "org") -> list[UpstreamKey]:
    """Return a key for each of these tenants."""
    return [
        upstream_key(name, tenants=frozenset({name}), organization=organization) for name in names
    ]


def of_workspace(name: str, *, organization: str | None = None) -> Reply:
    return answer(workspace=f"wrkspc_{name}", organization=organization)


REFUSALS = {
    "spent": refused(400, "invalid_request_error", message=SPENT),
    "disabled": refused(403, "permission_error", message="This workspace has been disabled."),
    "its rate limit": refused(
        429, "rate_limit_error", retry_after_ms=10 * MINUTE,
        message="This request would exceed your workspace's rate limit of 60 requests per minute.",
    ),
    "a rate limit": refused(429, "rate_limit_error", retry_after_ms=10 * MINUTE),
    "a payment problem": refused(402, "error"),
    "a quota": refused(429, "rate_limit_error", error_code="insufficient_quota"),
}  # fmt: skip


@pytest.mark.parametrize("is_named", [True, False], ids=["named", "not named"])
@pytest.mark.parametrize("reply", REFUSALS.values(), ids=REFUSALS)
def test_what_one_workspace_is_refused_does_not_stop_another(
    make: Make, reply: Reply, *, is_named: bool
) -> None:
    gateway = make(keys=own_keys("sick", "well"))
    assert isinstance(reply, Refused)
    sick = replace(reply, headers=Headers(workspace="wrkspc_sick" if is_named else None))
    gateway.claude.when = by_key({"sick": sick})
    gateway.submit(*jobs("sick", 50, tenant="sick"))

    for number in range(30):
        gateway.submit(a_job(f"well_{number}", tenant="well", created_at=gateway.time.now()))
        run(gateway, 0.2)

    assert 30 == len(delays(gateway, "well"))
    assert delays(gateway, "well")[-1] < 20 * SECOND
    assert [] == delays(gateway, "sick")
    calls = [call for call in gateway.claude.calls if call.key_id == "sick"]
    assert len(calls) <= 60


def test_a_workspaces_jobs_wait_until_its_time_and_use_no_attempt(make: Make) -> None:
    gateway = make(keys=own_keys("sick", "well"))
    gateway.claude.when = by_key({"sick": REFUSALS["its rate limit"]})
    gateway.submit(*jobs("sick", 5, tenant="sick"), *jobs("well", 5, tenant="well"))

    run(gateway, 1)
    gateway.claude.when = lambda _: None
    run(gateway, 12)

    assert 5 == len(delays(gateway, "sick"))
    assert delays(gateway, "sick")[0] >= 10 * MINUTE
    assert {1} == {gateway.job(f"sick_{n}").attempts_used for n in range(5)}


def test_a_key_whose_organization_is_not_known_yet_blocks_its_workspace_only(make: Make) -> None:
    """Its first response is the refusal, which names both."""
    gateway = make(keys=own_keys("sick", "well", organization=None))
    sick = refused(
        400, "invalid_request_error", message=SPENT, organization="org", workspace="wrkspc_sick"
    )
    gateway.claude.when = by_key({"sick": sick, "well": of_workspace("well", organization="org")})
    gateway.submit(*jobs("sick", 5, tenant="sick"))
    run(gateway, 0.5)
    gateway.submit(*jobs("well", 5, tenant="well", created_at=gateway.time.now()))

    run(gateway, 2)

    assert 5 == len(delays(gateway, "well"))
    assert delays(gateway, "well")[-1] < 20 * SECOND


def test_two_workspaces_refused_in_a_row_stop_their_organization(make: Make) -> None:
    """Neither refusal says whose limit it is."""
    gateway = make(keys=own_keys("one", "two", "three"))
    throttled = refused(429, "rate_limit_error", retry_after_ms=60 * SECOND)
    gateway.claude.when = by_key(dict.fromkeys(("one", "two"), throttled))
    gateway.submit(a_job("one", tenant="one"), a_job("two", tenant="two"))
    run(gateway, 0.2)
    sent = gateway.time.now()
    gateway.claude.when = lambda _: None
    gateway.submit(a_job("three_0", tenant="three", created_at=sent))

    run(gateway, 2)

    assert [True] == [delay > 40 * SECOND for delay in delays(gateway, "three")]


def test_two_workspaces_that_reach_limits_of_their_own_stop_nobody_else(make: Make) -> None:
    gateway = make(keys=own_keys("one", "two", "three"))
    gateway.claude.when = by_key(dict.fromkeys(("one", "two"), REFUSALS["its rate limit"]))
    gateway.submit(a_job("one", tenant="one"), a_job("two", tenant="two"))
    run(gateway, 0.2)
    gateway.submit(a_job("three_0", tenant="three", created_at=gateway.time.now()))

    run(gateway, 2)

    assert [True] == [delay < 5 * SECOND for delay in delays(gateway, "three")]


@pytest.mark.parametrize(
    "sign",
    [
        {"message": "This request would exceed your organization's rate limit."},
        {"seen": {"requests": Seen(1_000, 0)}},
    ],
    ids=["by its message", "by its headers"],
)
def test_a_429_that_is_the_organizations_stops_all_its_workspaces(
    make: Make, sign: dict[str, object]
) -> None:
    gateway = make(keys=own_keys("one", "two"))
    reply = refused(429, "rate_limit_error", retry_after_ms=60 * SECOND, **sign)  # type: ignore[arg-type]
    gateway.claude.when = by_key({"one": reply})
    gateway.submit(a_job("one", tenant="one"))
    run(gateway, 0.2)
    gateway.submit(a_job("two_0", tenant="two", created_at=gateway.time.now()))

    run(gateway, 2)

    assert [True] == [delay > 40 * SECOND for delay in delays(gateway, "two")]


def test_a_job_that_may_use_another_workspace_does_so_at_once(make: Make) -> None:
    """Also those that had chosen the spent one and wait for their start."""
    gateway = make(*jobs("job", 30), keys=[upstream_key("spent"), upstream_key("other")])
    gateway.claude.when = by_key({"spent": REFUSALS["spent"]})

    run(gateway, 1)

    assert 30 == len(delays(gateway, "job"))
    assert delays(gateway, "job")[-1] < 30 * SECOND


def test_a_job_that_may_use_another_organization_does_so_at_once(make: Make) -> None:
    keys = [upstream_key("spent"), upstream_key("other", organization="other")]
    gateway = make(*jobs("job", 30), keys=keys)
    cap = refused(429, "rate_limit_error", error_code="enforced_spend_limit_reached")
    gateway.claude.when = by_key({"spent": cap})

    run(gateway, 2)

    assert 30 == len(delays(gateway, "job"))


def test_a_workspace_with_a_lower_limit_finds_its_own_pace(make: Make) -> None:
    """Its limit is 60 a minute in an organization with thousands; no header says so."""
    gateway = make(keys=own_keys("slow", "fast"), latency_ms=200)
    level, at = 10.0, NOON

    def limited(request: CallRequest) -> Reply | None:
        nonlocal level, at
        if request.key.id != "slow":
            return None
        now = gateway.time.now()
        level, at = min(10.0, level + (now - at) / 1000), now
        if level < 1:
            return refused(429, "rate_limit_error", retry_after_ms=1_000)
        level -= 1
        return None

    gateway.claude.when = limited
    gateway.submit(*jobs("slow", 150, tenant="slow"), *jobs("fast", 50, tenant="fast"))

    run(gateway, 4)

    assert 50 == len(delays(gateway, "fast"))
    assert delays(gateway, "fast")[-1] < 30 * SECOND
    assert 120 <= len(delays(gateway, "slow"))
    slow_calls = [call for call in gateway.claude.calls if call.key_id == "slow"]
    assert len(slow_calls) - len(delays(gateway, "slow")) < 100
    # Most of them until the pace is found, the first time.
    late = [call for call in slow_calls if call.at > NOON + 90 * SECOND]
    assert len(late) < 1.4 * (150 - sum(at < 90 * SECOND for at in delays(gateway, "slow")))


# Models and endpoints ------------------------------------------------------------------------------------------


TROUBLES: dict[str, Reply] = {
    "overloaded": OVERLOADED,
    "5xx": BROKEN,
    "silent": refused(None, "connection_error", may_be_billed=True),
}


@pytest.mark.parametrize("count", [2, 20, 200])
@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
def test_trouble_of_one_model_keeps_no_job_of_its_sibling_waiting(
    make: Make, trouble: Reply, count: int
) -> None:
    gateway = make(*jobs("sick", count), same_limits=True)
    gateway.claude.when = by_model({"claude-a": trouble})

    async def story() -> None:
        running = asyncio.create_task(gateway.invoke())
        await asyncio.sleep(60)
        gateway.submit(*jobs("well", 20, model="claude-b", created_at=gateway.time.now()))
        await asyncio.sleep(4 * 60)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    gateway.time.run(story())

    assert 20 == len(delays(gateway, "well"))
    # Some of the 200 become visible again just then, and are received first.
    assert delays(gateway, "well")[-1] < (15 if count < 100 else 30) * SECOND


def test_one_tenants_requests_that_break_the_endpoint_stop_only_its_own(make: Make) -> None:
    """The same model, the same key: only its requests are answered with 500."""
    gateway = make(*jobs("bad", 40, tenant="mallory"))
    gateway.claude.when = lambda request: BROKEN if b"bad_" in request.body.data else None
    run(gateway, 0.5)
    gateway.submit(*jobs("good", 20, created_at=gateway.time.now()))

    run(gateway, 2)

    assert 20 == len(delays(gateway, "good"))
    assert delays(gateway, "good")[-1] < 10 * SECOND


def test_an_endpoint_that_is_broken_for_everybody_is_left_alone(make: Make) -> None:
    gateway = make(
        *jobs("a", 20), *jobs("b", 20, model="claude-b", tenant="birch"), same_limits=True
    )
    gateway.claude.when = lambda _: BROKEN

    run(gateway, 5)

    # Some calls until the breaker is open, then one probe per pause, which is soon a minute.
    probes = [call for call in gateway.claude.calls if NOON + MINUTE < call.at <= NOON + 5 * MINUTE]
    assert len(probes) <= 6


def test_a_failure_of_another_tenant_releases_none_of_those_that_wait_for_the_endpoint(
    make: Make,
) -> None:
    gateway = make(*jobs("a", 40))
    gateway.claude.when = lambda _: BROKEN
    run(gateway, 1)
    since = gateway.time.now()
    gateway.submit(*jobs("b", 1, tenant="birch", created_at=since))

    run(gateway, 1)

    calls = [call for call in gateway.claude.calls if since <= call.at < since + MINUTE]
    of_a = sum(b"a_" in call.request.body.data for call in calls)
    assert of_a < len(calls)
    # One probe after 5, 10 and 20 s at most.
    assert of_a <= 3


def test_a_broken_endpoint_of_two_is_avoided_probed_and_used_again(make: Make) -> None:
    keys = [
        upstream_key("broken", base_url="https://one.example"),
        upstream_key("works", base_url="https://two.example"),
    ]
    gateway = make(*jobs("job", 60), keys=keys, jitter=0.4)
    gateway.claude.when = by_key({"broken": BROKEN})

    run(gateway, 1)

    assert 60 == len(delays(gateway, "job"))
    gateway.claude.when = lambda _: None
    gateway.submit(*jobs("later", 20, created_at=gateway.time.now()))
    run(gateway, 2)
    gateway.submit(*jobs("last", 20, created_at=gateway.time.now()))
    before = len(gateway.claude.calls)
    run(gateway, 1)

    assert {"broken"} <= {call.key_id for call in gateway.claude.calls[before:]}


@pytest.mark.parametrize("status", [401, 403])
def test_a_rejected_key_stops_only_the_jobs_that_have_no_other(make: Make, status: int) -> None:
    keys = [upstream_key("bad", tenants=frozenset({"sick"})), upstream_key("good")]
    gateway = make(*jobs("sick", 20, tenant="sick"), *jobs("well", 20, tenant="well"), keys=keys)
    gateway.claude.when = by_key({"bad": refused(status, "authentication_error")})

    run(gateway, 2)

    assert 20 == len(delays(gateway, "well"))
    assert delays(gateway, "well")[-1] < 15 * SECOND
    assert 20 == len(delays(gateway, "sick"))


# Fallback models -----------------------------------------------------------------------------------------------


def test_behind_an_open_breaker_fallback_models_are_used_at_once(make: Make) -> None:
    gateway = make(*jobs("first", 10, fallback_models=("claude-b",)))
    gateway.claude.when = by_model({"claude-a": OVERLOADED})
    gateway.drain()
    sent = gateway.time.now()
    gateway.submit(*jobs("late", 20, created_at=sent, fallback_models=("claude-b",)))

    gateway.drain()

    assert 20 == len(delays(gateway, "late"))
    assert delays(gateway, "late")[-1] < 10 * SECOND
    assert {"claude-b"} == {gateway.job(f"late_{n}").attempts[-1].model for n in range(20)}


def test_with_all_models_overloaded_jobs_wait_for_the_last_one(make: Make) -> None:
    gateway = make(*jobs("job", 20, fallback_models=("claude-b", "claude-c")))
    gateway.claude.when = by_model(dict.fromkeys(("claude-a", "claude-b", "claude-c"), OVERLOADED))
    run(gateway, 2)

    assert {State.QUEUED} == {job.state for job in gateway.jobs.stored.values()}
    gateway.claude.when = lambda _: None
    gateway.drain(500)

    assert 20 == len(delays(gateway, "job"))
    assert {"claude-c"} == {job.current_model for job in gateway.jobs.stored.values()}


# Refills -------------------------------------------------------------------------------------------------------


def _makespan(make: Make, others: Sequence[Job], hinder: Callable[[Gateway], None]) -> int:
    """Return how long 3,000 jobs take beside some that cannot start, in milliseconds."""
    gateway = make(latency_ms=10_000)
    hinder(gateway)
    step = 3_000 // len(others) if others else 3_001
    waiting = list(others)
    for number in range(3_000):
        if number % step == 0 and waiting:
            gateway.submit(waiting.pop())
        gateway.submit(a_job(f"well_{number}", model="claude-b"))

    async def one(worker: Worker) -> None:
        while len(delays(gateway, "well")) < 3_000:
            due = gateway.queue.next_visible()
            if due is None or due > gateway.time.now():
                await asyncio.sleep(0.5)
                continue
            await gateway.invoke(worker)

    async def story() -> None:
        await asyncio.gather(*map(one, (gateway.worker, gateway.new_worker())))

    gateway.time.run(story())
    return delays(gateway, "well")[-1]


def _blocked(gateway: Gateway) -> None:
    gateway.know(block(known_group("org", "a"), NOON + 10 * MINUTE, "rate limited", NOON))


@pytest.mark.parametrize(
    ("facts", "hinder"),
    [
        ({}, _blocked),
        ({"model": "claude-c", "max_tokens": 100_000}, lambda _: None),
    ],
    ids=["blocked", "needs a whole invocation"],
)
def test_jobs_that_cannot_start_stop_no_refills(
    make: Make, facts: dict[str, object], hinder: Callable[[Gateway], None]
) -> None:
    alone = _makespan(make, [], hinder)

    beside = _makespan(make, jobs("stuck", 60, **facts), hinder)

    assert beside < 1.2 * alone


# Rows of files -------------------------------------------------------------------------------------------------


@pytest.fixture
def bulk() -> Iterator[Bulk]:
    made = Bulk(keys=own_keys("acme", "birch"))
    for name in "ab":
        made.gateway.know(known_group("org", name))
    yield made
    made.close()


def test_rows_of_a_spent_workspace_wait_and_keep_no_other_file_waiting(bulk: Bulk) -> None:
    bulk.claude.when = by_key({"birch": REFUSALS["spent"]})
    bulk.objects.put("in/birch/spent.jsonl", jsonl(*map(a_row, range(20))))
    bulk.planner.arrived("in/birch/spent.jsonl")
    bulk.upload(jsonl(*map(a_row, range(20))))

    bulk.once(minutes=5)
    bulk.once(minutes=5)

    ended = {each.tenant: each.ended_at for each in bulk.batches.stored.values()}
    assert ended["acme"] is not None
    assert ended["acme"] < NOON + MINUTE
    assert ended["birch"] is None
    assert 0 == bulk.events.counted("JobsErrored")
    assert 20 >= sum(call.key_id == "birch" for call in bulk.claude.calls)


def test_rows_behind_an_open_breaker_use_their_fallback_model(bulk: Bulk) -> None:
    overloaded = {"model claude-a": Breaker(STREAK, NOON + MINUTE)}
    bulk.gateway.know(replace(known_group("org", "a"), circuits=overloaded))
    bulk.add(jsonl(*map(a_row, range(30))), options=Options(fallback_models=("claude-b",)))

    bulk.drain()

    assert bulk.time.now() - NOON < MINUTE
    assert {"claude-b"} == {call.model for call in bulk.claude.calls}
    assert 30 == len(bulk.claude.answered)
