"""The worker, message by message: what each outcome writes, what it leaves to others, and what never happens."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import date
from itertools import pairwise
from statistics import median
from typing import Any, Final

import pytest

from sluice.domain.errors import KeyPoolBroken, NotStorable, StoreBusy
from sluice.domain.jobs import (
    FEW,
    LOSSES_TO_SUSPECT,
    NOT_STORED,
    AttemptOutcome,
    Job,
    Lease,
    State,
    claim,
    request_cancel,
)
from sluice.domain.keys import KeyMark
from sluice.domain.limits import Cost, Seen, block
from sluice.domain.pricing import Spend, Usage
from sluice.domain.retries import INTERNAL, RetryPolicy, next_month
from sluice.domain.waits import (
    BOOKING_MS,
    LEASE_MS,
    LONGEST_DELAY_MS,
    LONGEST_PARK_MS,
    RENEW_MS,
    SCOUT_MS,
    STORE_BUSY_MS,
    STORE_STAY_MS,
    USUAL,
    Waits,
)
from sluice.ports.claude import Answer, CallRequest, Refused
from sluice.ports.jobs import Pointer, Received
from sluice.worker.keys import KEYS_MS
from sluice.worker.limit_books import Admission, Admitted
from sluice.worker.limiter import Limiter
from sluice.worker.queue_source import (
    MOST_WAITING,
    RECEIVE_AT_ONCE,
    REFILL_MS,
    SLOTS,
    WAITING,
)
from tests.fakes import (
    MESSAGE,
    MINUTE,
    NOON,
    ROOMY,
    SECOND,
    Gateway,
    a_job,
    answer,
    known_group,
    paced,
    refused,
    upstream_key,
)

DAY = date(2026, 11, 20)
USED = Usage(input_tokens=10, output_tokens=20)
COST = 10 + 200
"""Of USED on claude-a: one micro-dollar per input token, ten per output token."""

SHORT_BLOCK = refused(429, "rate_limit_error", retry_after_ms=10_000)
RATE_LIMITED = refused(429, "rate_limit_error", retry_after_ms=30_000)
OVERLOADED = refused(529, "overloaded_error")
SERVER_ERROR = refused(500, "api_error", message="boom")
OWN_SPEND_LIMIT = "You have reached your specified API usage limits. More on 2026-12-01."


@pytest.fixture
def gateways() -> Iterator[list[Gateway]]:
    made: list[Gateway] = []
    yield made
    for each in made:
        each.time.close()


class Make:
    """Makes gateways and closes them after the test."""

    def __init__(self, made: list[Gateway]) -> None:
        self._made = made

    def __call__(self, *jobs: Job, **facts: object) -> Gateway:
        gateway = Gateway(*jobs, **facts)  # type: ignore[arg-type]
        self._made.append(gateway)
        return gateway


@pytest.fixture
def make(gateways: list[Gateway]) -> Make:
    return Make(gateways)


def no_accident(gateway: Gateway) -> None:
    """Nothing went wrong that a story did not ask for."""
    assert [] == gateway.events.errors, gateway.events.problems


# Success ---------------------------------------------------------------------------------------------------


def test_a_job_succeeds_with_its_answer_its_usage_and_its_cost(make: Make) -> None:
    gateway = make(a_job())

    assert [] == gateway.once()

    job = gateway.job()
    assert (State.SUCCEEDED, 1, 0, COST) == (
        job.state,
        job.attempts_used,
        job.snoozes,
        job.cost_micro_usd,
    )
    assert USED == job.usage
    assert job.result is not None
    assert MESSAGE == gateway.results.get(job.result)
    assert 0 == gateway.queue.depth()
    no_accident(gateway)


def test_the_call_is_the_job_as_it_was_submitted(make: Make) -> None:
    gateway = make(a_job(anthropic_version="2023-06-01", anthropic_beta="files-api"))

    gateway.once()

    call = gateway.claude.calls[0]
    request = call.request
    assert ("main", "claude-a", b'{"for":"job_1"}') == (request.key.id, request.model, call.body)
    assert ("2023-06-01", "files-api", 100) == (
        request.anthropic_version,
        request.anthropic_beta,
        request.max_tokens,
    )
    assert request.full_window


def test_the_order_of_writes_is_the_promise(make: Make) -> None:
    """Claimed before the call, answer stored before the job is done, ledger and message after."""
    gateway = make(a_job())
    gateway.journal.clear()
    gateway.claude.when = lambda _: gateway.journal.append("Claude: call")

    gateway.once()

    told = [line for line in gateway.journal if "limits" not in line and "receive" not in line]
    assert [
        "the jobs table: get_many",
        "the jobs queue: keep_hidden 1",
        "the params table: get_many job_1",
        "the jobs table: replace job_1 running",
        "Claude: call",
        "the data bucket: put job_1-2",
        "the jobs table: replace job_1 succeeded",
        "the ledger: record 1",
        "the ledger: add_up",
        "the jobs queue: delete 1",
    ] == told


def test_a_call_leaves_one_ledger_row_and_its_sums(make: Make) -> None:
    gateway = make(a_job())

    gateway.once()

    (row,) = gateway.ledger.rows.values()
    assert ("acme", DAY, "job_1", "claude-a", "live", "org", "main") == (
        row.tenant,
        row.day,
        row.job_id,
        row.model,
        row.lane,
        row.organization,
        row.key_id,
    )
    assert ("req_1", "succeeded", True) == (row.request_id, row.outcome, row.certain)
    assert Spend.of_call(USED, COST) == row.spend
    assert {("acme", DAY, "claude-a", "live"): row.spend} == gateway.ledger.sums


def test_sums_are_the_sums_of_the_calls(make: Make) -> None:
    jobs = [a_job(f"job_{n}", tenant=("acme", "zenith")[n % 2]) for n in range(20)]
    gateway = make(*jobs)

    gateway.once()

    assert {("acme", DAY, "claude-a", "live"), ("zenith", DAY, "claude-a", "live")} == set(
        gateway.ledger.sums
    )
    assert {(10, 10 * COST)} == {
        (spend.calls, spend.cost_micro_usd) for spend in gateway.ledger.sums.values()
    }
    assert 20 == len(gateway.ledger.rows)


def test_metrics_describe_each_call(make: Make) -> None:
    usage = Usage(
        input_tokens=10,
        cache_creation_input_tokens=5,
        cache_read_input_tokens=7,
        output_tokens=20,
    )
    gateway = make(a_job(created_at=NOON - 3 * SECOND), script=[answer(usage=usage)])

    gateway.once()

    assert {"JobsSucceeded": 1, "UpstreamCalls": 1} == {
        name: gateway.events.counted(name) for name in ("JobsSucceeded", "UpstreamCalls")
    }
    grouped = {
        "Calls": 1,
        "CallSeconds": 0.5,
        "InputTokens": 15,
        "CacheReadTokens": 7,
        "OutputTokens": 20,
    }
    assert grouped == {
        name: value / 1_000_000
        for (name, group), value in gateway.events.by_group.items()
        if group == "a"
    }
    assert 3 <= gateway.events.counted("StartDelaySeconds") < 4
    assert gateway.job().cost_micro_usd == round(gateway.events.counted("SpendUsd") * 1_000_000)


def test_a_whole_batch_runs_side_by_side(make: Make) -> None:
    """Waiting for Claude is paid once for 50 jobs, not 50 times."""
    gateway = make(*(a_job(f"job_{n}") for n in range(50)), latency_ms=60 * SECOND)
    gateway.know(known_group())

    assert [] == gateway.once()

    assert 50 == len(gateway.claude.answered)
    assert gateway.claude.most_in_flight > 40
    assert gateway.time.now() - NOON < 2 * MINUTE
    no_accident(gateway)


def test_a_large_answer_goes_to_the_bucket(make: Make) -> None:
    gateway = make(a_job())
    gateway.results.inline_bytes = 0

    gateway.once()

    result = gateway.job().result
    assert result is not None
    assert result.object_key in gateway.results.objects


def test_a_job_of_a_model_without_a_price_succeeds_and_the_model_is_logged(make: Make) -> None:
    gateway = make(a_job(model="claude-new"))

    gateway.once()

    assert (State.SUCCEEDED, 0) == (gateway.job().state, gateway.job().cost_micro_usd)
    assert ["model has no price"] == gateway.events.problem_names
    assert 1 == len(gateway.ledger.rows)


# Retry -----------------------------------------------------------------------------------------------------


def test_a_server_error_uses_an_attempt_and_a_short_wait_is_spent_with_the_worker(
    make: Make,
) -> None:
    """A receive and a slot of the queue cost more than a sleep."""
    gateway = make(a_job(), script=[SERVER_ERROR])

    assert [] == gateway.once()

    job = gateway.job()
    assert (State.SUCCEEDED, 2, 0) == (job.state, job.attempts_used, job.snoozes)
    assert (AttemptOutcome.RETRY, 500) == (
        job.attempts[0].outcome,
        job.attempts[0].error and job.attempts[0].error.status,
    )
    first, second = gateway.claude.calls
    assert 500 <= second.at - (first.at + 500) <= 3 * SECOND
    assert [] == gateway.queue.delays


def test_a_wait_longer_than_the_waits_say_is_spent_in_the_queue(make: Make) -> None:
    gateway = make(a_job(), script=[SERVER_ERROR], waits=Waits(rest_ms=0))

    assert ["message-1"] == gateway.once()

    assert 1 == len(gateway.claude.calls)
    assert 1 == len(gateway.queue.delays)


def test_a_job_is_held_for_its_start_no_longer_than_the_waits_say(make: Make) -> None:
    """At 20 a minute the third starts after 3 s or more."""
    gateway = make(*some_jobs(10), waits=Waits(hold_ms=SECOND))
    gateway.know(known_group(seen=paced(20, 1)))

    gateway.once()

    returned = [job_id for job_id, _ in gateway.queue.delays]
    assert 8 <= len(set(returned))
    later = [call for call in gateway.claude.calls if call.at > NOON + 2 * SECOND]
    assert len(later) <= len(returned)


def test_a_wait_for_which_no_time_is_left_is_spent_in_the_queue(make: Make) -> None:
    gateway = make(a_job(), script=[SERVER_ERROR])

    assert ["message-1"] == gateway.once(minutes=1)

    job = gateway.job()
    assert (State.QUEUED, 1, 0) == (job.state, job.attempts_used, job.snoozes)
    ((_, delay),) = gateway.queue.delays
    assert 500 <= delay <= 2 * SECOND
    gateway.drain()
    assert (State.SUCCEEDED, 2) == (gateway.job().state, gateway.job().attempts_used)


def test_a_long_wait_is_spent_in_the_queue(make: Make) -> None:
    """The fourth failure of a job asks for 8 s on average, the fifth for 16."""
    gateway = make(a_job(), script=[SERVER_ERROR] * 5, max_attempts=6, jitter=0.99)

    gateway.once()

    waits = [later.at - sooner.at - 500 for sooner, later in pairwise(gateway.claude.calls)]
    assert len(waits) < 4
    assert max(waits) < 12 * SECOND
    ((_, delay),) = gateway.queue.delays
    assert delay > 10 * SECOND
    gateway.drain()
    assert (State.SUCCEEDED, 6) == (gateway.job().state, gateway.job().attempts_used)


def test_what_is_canceled_while_it_waits_for_another_attempt_is_not_called_again(
    make: Make,
) -> None:
    gateway = make(a_job(), script=[SERVER_ERROR], jitter=0.99)

    async def story() -> None:
        running = asyncio.create_task(gateway.invoke())
        await asyncio.sleep(1)
        ask_to_stop(gateway)
        await running

    gateway.time.run(story())

    assert (State.CANCELED, 1) == (gateway.job().state, len(gateway.claude.calls))


def test_attempts_used_up_end_the_job_with_its_last_error(make: Make) -> None:
    gateway = make(a_job(), max_attempts=3)
    gateway.claude.otherwise = SERVER_ERROR

    gateway.drain()

    job = gateway.job()
    assert (State.ERRORED, 3, 3) == (job.state, job.attempts_used, len(gateway.claude.calls))
    assert job.error == SERVER_ERROR.failure.error
    outcomes = [attempt.outcome for attempt in job.attempts]
    assert [AttemptOutcome.RETRY, AttemptOutcome.RETRY, AttemptOutcome.GIVE_UP] == outcomes
    assert 1 == gateway.events.counted("JobsErrored")
    assert 3 == gateway.events.counted("UpstreamErrors")


@pytest.mark.parametrize(
    ("max_attempts", "ended_by"), [(5, "worker_lost"), (3, "worker_lost"), (2, "attempts_used_up")]
)
def test_a_job_that_lost_workers_while_it_ran_alone_ends_without_a_call(
    make: Make, max_attempts: int, ended_by: str
) -> None:
    job = a_job()
    for turn in range(3):
        at = NOON - 10 * MINUTE + turn
        job = claim(job, f"dead-{turn}", at, at, alone=True)
    if ended_by == "attempts_used_up":
        job = replace(job, attempts=job.attempts[1:], attempts_used=2)
    gateway = make(job, max_attempts=max_attempts)

    gateway.once()

    ended = gateway.job()
    assert State.ERRORED == ended.state
    assert ended.error is not None
    assert ended_by == ended.error.type
    assert any(words in ended.error.message for words in ("workers died", "the worker died"))
    assert AttemptOutcome.LOST == ended.attempts[-1].outcome
    assert [] == gateway.claude.calls


@pytest.mark.parametrize(
    ("usage", "may_be_billed", "rows"),
    [
        # Lost before it was sent: nothing to account for.
        (None, False, []),
        # Sent, and no response arrived: perhaps billed.
        (None, True, [(False, 0)]),
        # Broken off midway: what came is known, what was billed is not.
        (USED, True, [(False, COST)]),
        # Ended, with its usage, in an error.
        (USED, False, [(True, COST)]),
    ],
)
def test_a_lost_connection_is_accounted_for_as_far_as_it_is_known(
    make: Make, usage: Usage | None, *, may_be_billed: bool, rows: list[tuple[bool, int]]
) -> None:
    lost = refused(None, "connection_error", usage=usage, may_be_billed=may_be_billed)
    gateway = make(a_job(), script=[lost])

    gateway.once()

    *written, last = [
        (row.certain, row.spend.cost_micro_usd) for row in gateway.ledger.rows.values()
    ]
    assert rows == written
    assert (True, COST) == last
    assert (State.SUCCEEDED, 2) == (gateway.job().state, gateway.job().attempts_used)


def test_an_output_too_long_for_the_time_left_gets_a_whole_invocation(make: Make) -> None:
    gateway = make(a_job(), script=[refused(None, "output_timeout", may_be_billed=True)])

    gateway.drain()

    assert gateway.job().full_window
    assert State.SUCCEEDED == gateway.job().state
    assert gateway.claude.calls[1].request.full_window


def test_an_output_too_long_for_a_whole_invocation_is_not_retried(make: Make) -> None:
    too_long = refused(None, "output_timeout", usage=USED, had_full_window=True)
    gateway = make(a_job(), script=[too_long])

    gateway.once()

    assert (State.ERRORED, COST) == (gateway.job().state, gateway.job().cost_micro_usd)


# Give up ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_a_bad_request_ends_at_once(make: Make, status: int) -> None:
    gateway = make(a_job(), script=[refused(status, "invalid_request_error", message="odd")])

    assert [] == gateway.once()

    job = gateway.job()
    assert (State.ERRORED, 1) == (job.state, len(gateway.claude.calls))
    assert job.error is not None
    assert ("invalid_request_error", "odd", status) == (
        job.error.type,
        job.error.message,
        job.error.status,
    )


def test_a_job_whose_request_is_missing_ends_without_a_call(make: Make) -> None:
    gateway = make(a_job())
    gateway.params.stored.clear()

    gateway.once()

    job = gateway.job()
    assert job.error is not None
    assert (State.ERRORED, "request_lost", []) == (job.state, job.error.type, gateway.claude.calls)


def test_a_request_that_can_never_be_admitted_ends_with_a_clear_error(make: Make) -> None:
    gateway = make(a_job(input_chars=10_000_000))
    small = {
        "requests": Seen(60, 10),
        "input_tokens": Seen(20_000, 3_000),
        "output_tokens": Seen(8_000, 1_000),
    }
    gateway.know(known_group(seen=small))  # type: ignore[arg-type]

    gateway.once()

    job = gateway.job()
    assert job.error is not None
    assert (State.ERRORED, 400, []) == (job.state, job.error.status, gateway.claude.calls)
    assert "it can never be admitted" in job.error.message


# Snooze: rate limits ---------------------------------------------------------------------------------------


def test_a_429_uses_no_attempt_and_is_waited_out_where_the_job_is(make: Make) -> None:
    gateway = make(a_job(), script=[SHORT_BLOCK])

    assert [] == gateway.once()

    job = gateway.job()
    assert (State.SUCCEEDED, 1, 1) == (job.state, job.attempts_used, job.snoozes)
    assert job.last_snooze is not None
    assert "rate limited" == job.last_snooze.reason
    first, second = gateway.claude.calls
    assert second.at >= first.at + 500 + 10 * SECOND
    assert ["succeeded"] == gateway.ledger.outcomes
    assert [] == gateway.queue.delays
    assert 1 == gateway.events.counted("RateLimited")


def test_a_429_that_names_minutes_is_waited_out_in_the_queue(make: Make) -> None:
    gateway = make(a_job(), script=[refused(429, "rate_limit_error", retry_after_ms=5 * MINUTE)])

    assert ["message-1"] == gateway.once()

    job = gateway.job()
    assert (State.QUEUED, 0, 1, ()) == (job.state, job.attempts_used, job.snoozes, job.attempts)
    ((_, delay),) = gateway.queue.delays
    assert NOON + 5 * MINUTE <= gateway.time.now() + delay <= NOON + 6 * MINUTE
    assert [] == gateway.ledger.outcomes
    gateway.drain()
    assert (State.SUCCEEDED, 1) == (gateway.job().state, gateway.job().attempts_used)


def test_a_429_blocks_the_whole_group_for_other_workers_too(make: Make) -> None:
    gateway = make(a_job("job_1"), a_job("job_2"), a_job("job_3"))
    gateway.know(known_group())
    gateway.claude.script.append(SHORT_BLOCK)
    blocked_until = NOON + 500 + 10 * SECOND

    async def story() -> None:
        first, second, third = (gateway.queue.deliver(1) for _ in range(3))
        running = asyncio.create_task(gateway.invoke(gateway.worker, first))
        await asyncio.sleep(2)
        assert 1 == len(gateway.claude.calls)
        others = [gateway.invoke(gateway.new_worker(), batch) for batch in (second, third)]
        await asyncio.gather(running, *others)

    gateway.time.run(story())

    assert 4 == len(gateway.claude.calls)
    assert all(call.at >= blocked_until for call in gateway.claude.calls[1:])
    assert {(State.SUCCEEDED, 1)} == {
        (job.state, job.attempts_used) for job in gateway.jobs.stored.values()
    }


def test_a_429_stops_jobs_of_other_workers_that_already_sleep_towards_their_start(
    make: Make,
) -> None:
    gateway = make(*(a_job(f"job_{n}") for n in range(20)))
    slow = {
        "requests": Seen(60, 2),
        "input_tokens": Seen(6_000_000, 1_000_000),
        "output_tokens": Seen(6_000_000, 1_000_000),
    }
    gateway.know(known_group(seen=slow))  # type: ignore[arg-type]
    gateway.claude.otherwise = answer(seen={})
    gateway.claude.latency_ms = 200

    async def story() -> None:
        other = gateway.new_worker()
        one, two = gateway.queue.deliver(10), gateway.queue.deliver(10)
        running = asyncio.gather(gateway.invoke(gateway.worker, one), gateway.invoke(other, two))
        await asyncio.sleep(5)
        gateway.claude.script.append(RATE_LIMITED)
        await running

    gateway.time.run(story())

    (blocked,) = [facts["until"] for event, facts in gateway.events.notes
                  if event == "limit group blocked"][:1]  # fmt: skip
    assert isinstance(blocked, int)
    heard = blocked - 30 * SECOND
    within = [call for call in gateway.claude.calls if heard + SECOND < call.at < blocked]
    assert [] == within
    assert all(job.attempts_used <= 1 for job in gateway.jobs.stored.values())
    assert gateway.events.counted("RateLimited") == 1


def test_jobs_that_only_met_429s_have_used_no_attempt(make: Make) -> None:
    gateway = make(a_job(), max_attempts=1)
    gateway.claude.script.extend([RATE_LIMITED] * 15)

    gateway.drain()

    job = gateway.job()
    assert (State.SUCCEEDED, 1, 15) == (job.state, job.attempts_used, job.snoozes)


def test_a_blocked_group_keeps_no_other_group_waiting(make: Make) -> None:
    gateway = make(a_job("job_a"), a_job("job_b", model="claude-b"))
    gateway.know(block(known_group(), NOON + 10 * MINUTE, "rate limited", NOON))

    gateway.once()

    assert (State.QUEUED, State.SUCCEEDED) == (
        gateway.job("job_a").state,
        gateway.job("job_b").state,
    )
    assert 0 == gateway.job("job_a").snoozes


def test_a_job_that_waits_more_than_a_quarter_of_an_hour_leaves_the_queue(make: Make) -> None:
    """Hidden messages would count against the in-flight quota of SQS; the job keeps its attempts."""
    gateway = make(a_job())
    gateway.know(block(known_group(), NOON + 600 * MINUTE, "spend limit", NOON))

    assert [] == gateway.once()

    job = gateway.job()
    assert (State.QUEUED, 0) == (job.state, job.attempts_used)
    assert job.not_before is not None
    assert NOON + LONGEST_DELAY_MS < job.not_before <= gateway.time.now() + LONGEST_PARK_MS
    assert [] == gateway.queue.delays


def test_a_429_that_names_hours_leaves_the_queue_too(make: Make) -> None:
    gateway = make(a_job())
    gateway.claude.script.append(
        refused(429, "rate_limit_error", retry_after_ms=2 * LONGEST_DELAY_MS)
    )

    assert [] == gateway.once()

    job = gateway.job()
    assert (State.QUEUED, 0, 1) == (job.state, job.attempts_used, job.snoozes)
    assert job.not_before is not None
    assert NOON + 2 * LONGEST_DELAY_MS <= job.not_before


# Snooze: money ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "until"),
    [
        (refused(429, error_code="enforced_spend_limit_reached"), next_month(NOON)),
        (
            refused(400, "invalid_request_error", message=OWN_SPEND_LIMIT),
            NOON + 500 + RetryPolicy().spend_recheck_ms,
        ),
        (refused(402, "billing_error"), NOON + 500 + RetryPolicy().spend_recheck_ms),
    ],
)
def test_a_spend_limit_blocks_the_group_and_is_logged(
    make: Make, reply: Refused, until: int
) -> None:
    gateway = make(*(a_job(f"job_{n}") for n in range(3)), a_job("job_b", model="claude-b"))
    gateway.claude.when = lambda request: reply if request.model == "claude-a" else None

    gateway.once()

    group = gateway.limits.stored["org/a"]
    assert "spend limit" == group.blocked_reason
    assert abs(group.blocked_until - until) < MINUTE
    assert "spend limit reached" in gateway.events.problem_names
    assert gateway.events.counted("GroupsParked") >= 1
    assert State.SUCCEEDED == gateway.job("job_b").state
    for number in range(3):
        job = gateway.job(f"job_{number}")
        assert (State.QUEUED, 0) == (job.state, job.attempts_used)


# Keys ------------------------------------------------------------------------------------------------------


def test_a_rejected_key_leaves_the_rotation_and_the_next_is_tried_at_once(make: Make) -> None:
    keys = [upstream_key("old", organization="org-1"), upstream_key("new", organization="org-2")]
    gateway = make(a_job(), keys=keys)
    gateway.claude.when = lambda request: (
        refused(401, "authentication_error") if request.key.id == "old" else None
    )

    assert [] == gateway.once()

    job = gateway.job()
    assert (State.SUCCEEDED, 1) == (job.state, job.attempts_used)
    assert ["old", "new"] == [call.key_id for call in gateway.claude.calls]
    assert keys[0].fingerprint == gateway.limits.known["old"].rejected
    assert (1, 1) == (gateway.pool.reloads, gateway.events.counted("KeysRejected"))
    gateway.submit(a_job("job_2"))
    gateway.once()
    assert "new" == gateway.claude.calls[-1].key_id


def test_another_worker_does_not_try_a_rejected_key(make: Make) -> None:
    keys = [upstream_key("old", organization="org-1"), upstream_key("new", organization="org-2")]
    gateway = make(a_job(), keys=keys)
    gateway.limits.known["old"] = KeyMark("old", rejected=keys[0].fingerprint)

    gateway.time.run(gateway.invoke(gateway.new_worker()))

    assert ["new"] == [call.key_id for call in gateway.claude.calls]


def test_with_every_key_rejected_jobs_wait_for_the_secret_to_change(make: Make) -> None:
    gateway = make(a_job(), script=[refused(401, "authentication_error")])

    assert ["message-1"] == gateway.once()

    job = gateway.job()
    assert (State.QUEUED, 0, 1) == (job.state, job.attempts_used, len(gateway.claude.calls))
    gateway.pool.pool = [upstream_key(api_key="sk-ant-test-fresh")]
    gateway.drain()
    assert State.SUCCEEDED == gateway.job().state


def test_a_key_refused_for_a_model_serves_other_models(make: Make) -> None:
    keys = [upstream_key("a", organization="org-1"), upstream_key("b", organization="org-2")]
    gateway = make(a_job(model="claude-b"), keys=keys)
    gateway.claude.when = lambda request: (
        refused(403, "permission_error")
        if (request.key.id, request.model) == ("a", "claude-b")
        else None
    )

    gateway.once()

    assert ["a", "b"] == [call.key_id for call in gateway.claude.calls]
    assert State.SUCCEEDED == gateway.job().state
    gateway.submit(a_job("job_2"))
    gateway.once()
    assert "a" == gateway.claude.calls[-1].key_id


def test_a_model_refused_to_every_key_ends_the_job(make: Make) -> None:
    gateway = make(a_job(), script=[refused(403, "permission_error")])

    assert [] == gateway.once()

    job = gateway.job()
    assert job.error is not None
    assert (State.ERRORED, "permission_error", 403) == (
        job.state,
        job.error.type,
        job.error.status,
    )
    assert 1 == len(gateway.claude.calls)


def test_one_request_that_is_refused_ends_no_other_job(make: Make) -> None:
    """A 403 is about a file, a beta or a model of this request as often as about the key."""
    keys = [upstream_key("a", organization="org-1"), upstream_key("b", organization="org-2")]
    gateway = make(a_job("job_1"), a_job("job_2"), keys=keys)
    gateway.claude.when = lambda request: (
        refused(403, "permission_error") if b"job_1" in request.body.data else None
    )

    gateway.once()
    gateway.submit(a_job("job_3"))
    gateway.drain()

    assert State.ERRORED == gateway.job("job_1").state
    assert {State.SUCCEEDED} == {gateway.job(name).state for name in ("job_2", "job_3")}


def test_keys_that_change_places_are_learned_again(make: Make) -> None:
    """Setup was run again with the keys in the other order: no job may wait forever for the old groups."""
    gateway = make(
        a_job("job_1"), keys=[upstream_key("a", organization=None, api_key="sk-ant-test-1")]
    )
    gateway.claude.when = lambda request: answer(organization=f"org {request.key.api_key[-1]}")
    gateway.once()

    for number, text in ((2, "sk-ant-test-2"), (3, "sk-ant-test-1"), (4, "sk-ant-test-2")):
        gateway.pool.pool = [upstream_key("a", organization=None, api_key=text)]
        gateway.submit(a_job(f"job_{number}"))
        gateway.drain()

    assert {State.SUCCEEDED} == {job.state for job in gateway.jobs.stored.values()}


def test_an_answer_is_kept_when_the_keys_mark_cannot_be_written(make: Make) -> None:
    gateway = make(a_job(), keys=[upstream_key(organization=None)])
    gateway.claude.otherwise = answer(organization="org-7")
    gateway.limits.break_down("mark")

    assert [] == gateway.once()

    assert State.SUCCEEDED == gateway.job().state
    assert 1 == len(gateway.ledger.rows)


def test_params_that_cannot_be_read_use_no_attempt(make: Make) -> None:
    gateway = make(a_job("job_1"), a_job("job_2"))
    gateway.know(known_group())
    gateway.params.fail_next("get_many")

    assert [] == gateway.once()

    assert {(State.SUCCEEDED, 1)} == {
        (job.state, job.attempts_used) for job in gateway.jobs.stored.values()
    }


def test_requests_of_jobs_that_are_admitted_together_are_read_together(make: Make) -> None:
    gateway = make(*(a_job(f"job_{n}") for n in range(50)))
    gateway.know(known_group())

    gateway.once()

    reads = [line for line in gateway.journal if line.startswith("the params table: get_many")]
    assert len(reads) <= 12
    assert 50 == len(gateway.claude.answered)


def test_a_model_that_no_key_permits_ends_the_job_without_a_call(make: Make) -> None:
    gateway = make(a_job(), keys=[upstream_key(models=frozenset({"claude-b"}))])

    gateway.once()

    job = gateway.job()
    assert job.error is not None
    assert (State.ERRORED, []) == (job.state, gateway.claude.calls)
    assert "no key of the key pool may be used for model claude-a" in job.error.message


def test_an_empty_pool_is_waited_out(make: Make) -> None:
    gateway = make(a_job())
    gateway.pool.pool.clear()

    assert ["message-1"] == gateway.once()

    assert (State.QUEUED, 0) == (gateway.job().state, gateway.job().attempts_used)


@pytest.mark.parametrize("error", [KeyPoolBroken("not JSON"), StoreBusy("Secrets Manager")])
def test_a_broken_pool_is_logged_and_its_jobs_wait(
    make: Make, error: KeyPoolBroken | StoreBusy
) -> None:
    gateway = make(a_job())
    gateway.pool.error = error

    assert ["message-1"] == gateway.once()

    assert "key pool not readable" in gateway.events.problem_names
    assert (State.QUEUED, 0) == (gateway.job().state, gateway.job().attempts_used)
    gateway.pool.error = None
    gateway.drain()
    assert State.SUCCEEDED == gateway.job().state


@pytest.mark.parametrize("verb", ["marks", "models"])
def test_a_busy_table_of_limits_is_no_lack_of_keys(make: Make, verb: str) -> None:
    """The job tries again in the invocation, as for every other store; without a key it waits for a minute."""
    gateway = make(a_job())
    gateway.limits.fail_next(verb)

    assert [] == gateway.once()

    assert State.SUCCEEDED == gateway.job().state
    assert gateway.time.now() - NOON < 3 * STORE_BUSY_MS
    assert ["store busy"] == gateway.events.problem_names


def test_an_organization_is_learned_from_the_first_answer_and_kept_for_all(make: Make) -> None:
    gateway = make(*(a_job(f"job_{n}") for n in range(3)), keys=[upstream_key(organization=None)])
    gateway.claude.otherwise = answer(organization="org-7")

    gateway.once()
    gateway.drain()

    assert "org-7" == gateway.limits.known["main"].organization
    assert {State.SUCCEEDED} == {job.state for job in gateway.jobs.stored.values()}
    assert "org-7" == gateway.limits.stored[f"key:main-{upstream_key().fingerprint[:8]}/a"].moved_to
    gateway.submit(a_job("job_9"))
    gateway.time.run(gateway.invoke(gateway.new_worker()))
    assert "org-7/a" in gateway.limits.stored
    no_accident(gateway)


def test_a_pool_that_names_the_wrong_organization_is_logged(make: Make) -> None:
    gateway = make(a_job(), script=[answer(organization="org-7")])

    gateway.once()

    assert ["key belongs to another organization than the pool says"] == (
        gateway.events.problem_names
    )
    assert State.SUCCEEDED == gateway.job().state


def test_the_group_that_can_start_first_is_chosen(make: Make) -> None:
    keys = [upstream_key("a", organization="org-1"), upstream_key("b", organization="org-2")]
    gateway = make(a_job(), keys=keys)
    gateway.know(block(known_group("org-1"), NOON + MINUTE, "rate limited", NOON))

    gateway.once()

    assert ["b"] == [call.key_id for call in gateway.claude.calls]


@pytest.mark.parametrize(("jitter", "chosen"), [(0.0, "light"), (0.24, "light"), (0.26, "heavy")])
def test_keys_of_one_organization_share_by_weight(make: Make, jitter: float, chosen: str) -> None:
    keys = [upstream_key("light", weight=1), upstream_key("heavy", weight=3)]
    gateway = make(a_job(), keys=keys, jitter=jitter)

    gateway.once()

    assert chosen == gateway.claude.calls[0].key_id


# Overload and refusal --------------------------------------------------------------------------------------


def test_an_overload_uses_no_attempt(make: Make) -> None:
    gateway = make(a_job(), max_attempts=1, script=[OVERLOADED] * 3)

    gateway.drain()

    job = gateway.job()
    assert (State.SUCCEEDED, 1, 3) == (job.state, job.attempts_used, job.snoozes)
    assert 3 == gateway.events.counted("Overloaded")


def test_an_overload_moves_on_to_the_fallback_model_at_once(make: Make) -> None:
    gateway = make(a_job(fallback_models=("claude-b", "claude-c")))
    gateway.claude.when = lambda request: None if request.model == "claude-c" else OVERLOADED

    assert [] == gateway.once()

    job = gateway.job()
    assert ["claude-a", "claude-b", "claude-c"] == [call.model for call in gateway.claude.calls]
    # The stored request names the first one.
    assert [True, False, False] == [call.request.names_model for call in gateway.claude.calls]
    assert (State.SUCCEEDED, 1, "claude-c") == (job.state, job.attempts_used, job.current_model)
    assert "claude-a" == job.model
    assert 10 * 3 + 20 * 30 == job.cost_micro_usd
    assert ["claude-c"] == [row.model for row in gateway.ledger.rows.values()]


def test_a_refusal_moves_on_to_the_fallback_model_and_both_calls_are_paid(make: Make) -> None:
    gateway = make(
        a_job(fallback_models=("claude-b",)), script=[answer(usage=USED, stop_reason="refusal")]
    )

    assert [] == gateway.once()

    job = gateway.job()
    assert (State.SUCCEEDED, 2) == (job.state, job.attempts_used)
    assert [AttemptOutcome.FALLBACK, AttemptOutcome.SUCCEEDED] == [
        attempt.outcome for attempt in job.attempts
    ]
    assert COST + 2 * COST == job.cost_micro_usd
    assert ["refusal", "succeeded"] == gateway.ledger.outcomes


def test_a_refusal_without_a_fallback_is_an_answer(make: Make) -> None:
    gateway = make(a_job(), script=[answer(stop_reason="refusal")])

    assert [] == gateway.once()

    assert State.SUCCEEDED == gateway.job().state
    assert gateway.job().result is not None


def test_a_refusal_with_no_attempt_left_is_an_answer(make: Make) -> None:
    gateway = make(
        a_job(fallback_models=("claude-b",)), max_attempts=1, script=[answer(stop_reason="refusal")]
    )

    gateway.once()

    assert (State.SUCCEEDED, 1) == (gateway.job().state, len(gateway.claude.calls))


# Cancel and deadline ---------------------------------------------------------------------------------------


def test_a_canceled_job_is_not_called(make: Make) -> None:
    gateway = make(a_job())
    gateway.jobs.stored["job_1"] = request_cancel(gateway.job(), NOON)

    assert [] == gateway.once()

    assert (State.CANCELED, []) == (gateway.job().state, gateway.claude.calls)


def ask_to_stop(gateway: Gateway) -> None:
    job = gateway.job()
    gateway.jobs.replace(request_cancel(job, gateway.time.now()), job.version)


def test_a_cancel_during_the_call_stops_it_and_says_it_may_be_billed(make: Make) -> None:
    gateway = make(a_job(), latency_ms=5 * MINUTE)

    async def story() -> None:
        running = asyncio.create_task(gateway.invoke())
        await asyncio.sleep(60)
        ask_to_stop(gateway)
        await running

    gateway.time.run(story())

    job = gateway.job()
    assert (State.CANCELED, 1) == (job.state, len(gateway.claude.stopped))
    assert AttemptOutcome.CANCELED == job.attempts[0].outcome
    (row,) = gateway.ledger.rows.values()
    assert ("canceled", False) == (row.outcome, row.certain)
    assert gateway.time.now() - NOON < 2 * MINUTE
    assert 1 == gateway.events.counted("JobsCanceled")
    assert 0 == gateway.queue.depth()


def test_an_answer_that_crosses_a_cancel_is_kept(make: Make) -> None:
    gateway = make(a_job(), latency_ms=5 * SECOND)

    async def story() -> None:
        running = asyncio.create_task(gateway.invoke())
        await asyncio.sleep(4)
        ask_to_stop(gateway)
        await running

    gateway.time.run(story())

    assert (State.SUCCEEDED, True) == (gateway.job().state, gateway.job().cancel_requested)


def test_a_cancel_that_meets_a_throttled_call_ends_the_job_the_next_time(make: Make) -> None:
    gateway = make(a_job(), script=[RATE_LIMITED], latency_ms=5 * SECOND)

    async def story() -> None:
        running = asyncio.create_task(gateway.invoke())
        await asyncio.sleep(4)
        ask_to_stop(gateway)
        await running

    gateway.time.run(story())
    gateway.drain()

    assert (State.CANCELED, 1) == (gateway.job().state, len(gateway.claude.calls))


def test_a_job_past_its_deadline_expires_without_a_call(make: Make) -> None:
    gateway = make(a_job(deadline=NOON))

    assert [] == gateway.once()

    job = gateway.job()
    assert job.error is not None
    assert (State.EXPIRED, "deadline_exceeded", []) == (
        job.state,
        job.error.type,
        gateway.claude.calls,
    )
    assert 1 == gateway.events.counted("JobsExpired")


def test_a_deadline_that_passes_while_the_job_waits_for_its_start_saves_the_call(
    make: Make,
) -> None:
    gateway = make(a_job(deadline=NOON + 10 * SECOND))
    gateway.know(block(known_group(), NOON + 30 * SECOND, "rate limited", NOON))

    gateway.drain()

    assert (State.EXPIRED, []) == (gateway.job().state, gateway.claude.calls)


def test_not_before_is_respected(make: Make) -> None:
    gateway = make(a_job(not_before=NOON + 5 * MINUTE))

    gateway.drain()

    assert State.SUCCEEDED == gateway.job().state
    assert gateway.claude.calls[0].at >= NOON + 5 * MINUTE


# Messages --------------------------------------------------------------------------------------------------


def test_a_foreign_message_becomes_a_dead_letter_with_the_reason(make: Make) -> None:
    gateway = make()
    gateway.queue.post(body="crunchy armchair")

    assert [] == gateway.once()

    ((message, reason),) = gateway.queue.rejected
    assert ("crunchy armchair", "not a message of Sluice's") == (message.body, reason)
    assert 0 == gateway.queue.depth()


def test_a_message_about_an_unknown_job_becomes_a_dead_letter(make: Make) -> None:
    gateway = make()
    gateway.queue.post(job_id="job_404")

    assert [] == gateway.once()

    assert ["no such job"] == [reason for _, reason in gateway.queue.rejected]


def test_a_message_that_cannot_become_a_dead_letter_is_returned(make: Make) -> None:
    gateway = make()
    gateway.queue.post()
    gateway.queue.fail_next("reject")

    assert 1 == len(gateway.once())

    gateway.drain()
    assert 1 == len(gateway.queue.rejected)


def test_a_canary_is_recorded_without_a_call(make: Make) -> None:
    gateway = make()
    gateway.queue.post(canary="c-1")

    assert [] == gateway.once()

    assert ({"c-1": NOON}, []) == (gateway.limits.canaries, gateway.claude.calls)


def test_a_poison_message_takes_no_other_with_it(make: Make) -> None:
    gateway = make(a_job("job_1"), a_job("job_2"))
    gateway.claude.when = lambda request: (
        ZeroDivisionError("armchair") if b"job_1" in request.body.data else None
    )

    gateway.drain()

    assert State.SUCCEEDED == gateway.job("job_2").state
    assert {"call failed in the gateway"} == set(gateway.events.problem_names)
    poisoned = gateway.job("job_1")
    assert (State.ERRORED, RetryPolicy().max_attempts) == (poisoned.state, poisoned.attempts_used)
    assert poisoned.error is not None
    assert INTERNAL == poisoned.error.type


def test_a_job_twice_in_one_batch_is_called_once(make: Make) -> None:
    gateway = make(a_job())
    gateway.queue.post(job_id="job_1")

    gateway.drain()

    assert (State.SUCCEEDED, 1) == (gateway.job().state, len(gateway.claude.calls))
    assert 1 == len(gateway.ledger.rows)
    no_accident(gateway)


def test_a_job_running_elsewhere_is_left_alone_until_its_lease_has_expired(make: Make) -> None:
    gateway = make(claim(a_job(), "other", NOON, NOON + LEASE_MS))

    assert ["message-1"] == gateway.once()

    ((_, delay),) = gateway.queue.delays
    assert LEASE_MS <= delay <= LEASE_MS + 2 * SECOND
    assert [] == gateway.claude.calls


def test_a_job_whose_worker_died_is_run_again_and_keeps_the_lost_attempt(make: Make) -> None:
    gateway = make(claim(a_job(), "dead", NOON - LEASE_MS, NOON - 1))

    gateway.once()

    job = gateway.job()
    assert (State.SUCCEEDED, 1) == (job.state, job.attempts_used)
    assert [AttemptOutcome.LOST, AttemptOutcome.SUCCEEDED] == [
        attempt.outcome for attempt in job.attempts
    ]


def test_a_finished_job_is_only_acknowledged(make: Make) -> None:
    gateway = make(a_job())
    gateway.once()
    done = gateway.job()
    gateway.time.run(asyncio.sleep(BOOKING_MS / 1000))
    gateway.queue.post(job_id="job_1")

    assert [] == gateway.once()

    assert done == gateway.job()
    assert 1 == len(gateway.claude.calls)


def test_two_workers_with_the_same_job_call_once(make: Make) -> None:
    gateway = make(a_job())
    gateway.queue.post(job_id="job_1")

    async def story() -> None:
        one, two = gateway.queue.deliver(1), gateway.queue.deliver(1)
        await asyncio.gather(
            gateway.invoke(gateway.worker, one), gateway.invoke(gateway.new_worker(), two)
        )

    gateway.time.run(story())
    gateway.drain()

    assert (State.SUCCEEDED, 1) == (gateway.job().state, len(gateway.claude.calls))


# Time ------------------------------------------------------------------------------------------------------


def test_nothing_is_called_that_could_not_end_in_time(make: Make) -> None:
    """Ten seconds are left and the start would come after five: a fresh invocation has more."""
    gateway = make(a_job(max_tokens=8_000))
    gateway.know(block(known_group(), NOON + 5 * SECOND, "rate limited", NOON))

    assert ["message-1"] == gateway.once(minutes=1 / 6)

    job = gateway.job()
    assert (State.QUEUED, [], 0) == (job.state, gateway.claude.calls, job.snoozes)
    gateway.drain()
    assert State.SUCCEEDED == gateway.job().state


def test_jobs_that_cannot_start_soon_go_back_one_behind_the_other(make: Make) -> None:
    """Holding messages costs worker time; returned ones become visible at about the time of their turn."""
    gateway = make(*(a_job(f"job_{n:02}") for n in range(50)))
    slow = {
        "requests": Seen(6, 1),
        "input_tokens": Seen(6_000_000, 1_000_000),
        "output_tokens": Seen(6_000_000, 1_000_000),
    }
    gateway.know(known_group(seen=slow))  # type: ignore[arg-type]
    gateway.claude.otherwise = answer(seen={})

    not_done = gateway.once()

    assert 15 <= len(not_done) < 25
    delays = [delay for _, delay in gateway.queue.delays]
    assert len(not_done) == len(delays)
    assert max(delays) > 4 * MINUTE
    for job in gateway.jobs.stored.values():
        assert (0, State.QUEUED) == (job.attempts_used, job.state) or job.state is State.SUCCEEDED
    gateway.claude.otherwise = answer()
    gateway.drain()
    assert 50 == len(gateway.claude.calls)


def test_no_call_lasts_beyond_the_end_of_the_invocation(make: Make) -> None:
    windows: list[int] = []

    def note(request: CallRequest) -> None:
        windows.append(gateway.time.now() + request.window_ms)

    gateway = make(*(a_job(f"job_{n}") for n in range(5)))
    gateway.claude.when = note

    gateway.once(minutes=14)

    assert {NOON + 14 * MINUTE} == set(windows)


def test_a_heartbeat_keeps_the_lease_of_a_long_call(make: Make) -> None:
    gateway = make(a_job(), latency_ms=10 * MINUTE)
    gateway.queue.post(job_id="job_1")

    async def story() -> None:
        one, two = gateway.queue.deliver(1), gateway.queue.deliver(1)
        running = asyncio.create_task(gateway.invoke(gateway.worker, one))
        for _ in range(9):
            await asyncio.sleep(60)
            lease = gateway.job().lease
            assert lease is not None
            assert lease.until > gateway.time.now() + SECOND
            await gateway.invoke(gateway.new_worker(), two)
        await running

    gateway.time.run(story())

    job = gateway.job()
    assert (State.SUCCEEDED, 1, 1) == (job.state, job.attempts_used, len(gateway.claude.calls))
    no_accident(gateway)


def test_a_heartbeat_survives_a_store_that_is_busy_for_a_while(make: Make) -> None:
    gateway = make(a_job(), latency_ms=5 * MINUTE)

    async def story() -> None:
        running = asyncio.create_task(gateway.invoke())
        await asyncio.sleep(50)
        gateway.jobs.break_down("get")
        await asyncio.sleep(45)
        gateway.jobs.recover()
        await running

    gateway.time.run(story())

    assert (State.SUCCEEDED, 1) == (gateway.job().state, len(gateway.claude.answered))


@pytest.mark.parametrize("verb", ["get", "replace"])
def test_a_call_goes_on_while_its_lease_cannot_be_renewed(make: Make, verb: str) -> None:
    """Nobody else can take the job either, and a call that is stopped may be billed."""
    gateway = make(a_job(), latency_ms=10 * MINUTE)

    async def story() -> list[str]:
        running = asyncio.create_task(gateway.invoke())
        await asyncio.sleep(20)
        gateway.jobs.break_down(verb)
        await asyncio.sleep(3 * LEASE_MS / 1000)
        gateway.jobs.recover()
        return await running

    assert [] == gateway.time.run(story())

    assert (State.SUCCEEDED, 1) == (gateway.job().state, len(gateway.claude.calls))


def test_a_call_whose_lease_is_lost_is_stopped_and_accounted_for(make: Make) -> None:
    gateway = make(a_job(), latency_ms=10 * MINUTE)

    async def story() -> list[str]:
        running = asyncio.create_task(gateway.invoke())
        await asyncio.sleep(20)
        gateway.jobs.break_down("get")
        await asyncio.sleep(LEASE_MS / 1000)
        job, now = gateway.job(), gateway.time.now()
        gateway.jobs.stored["job_1"] = claim(job, "another", now, now + LEASE_MS)
        gateway.jobs.recover()
        return await running

    assert ["message-1"] == gateway.time.run(story())

    (row,) = gateway.ledger.rows.values()
    assert not row.certain
    assert "lease lost during a call" in gateway.events.problem_names
    gateway.drain()
    job = gateway.job()
    assert State.SUCCEEDED == job.state
    assert AttemptOutcome.LOST == job.attempts[0].outcome


def test_a_worker_whose_job_was_taken_over_changes_nothing_and_says_what_it_paid(
    make: Make,
) -> None:
    gateway = make(a_job(), latency_ms=10 * SECOND)

    async def story() -> list[str]:
        running = asyncio.create_task(gateway.invoke())
        await asyncio.sleep(5)
        stolen = replace(gateway.job(), lease=Lease("other", NOON + LEASE_MS), version=9)
        gateway.jobs.stored["job_1"] = stolen
        return await running

    assert ["message-1"] == gateway.time.run(story())

    assert (State.RUNNING, 9) == (gateway.job().state, gateway.job().version)
    (row,) = gateway.ledger.rows.values()
    assert ("succeeded", "lease lost") == (row.outcome, row.note)


# Stores that are busy --------------------------------------------------------------------------------------


def test_an_answer_is_stored_before_its_message_counts_as_done(make: Make) -> None:
    gateway = make(a_job())
    gateway.results.fail_next("put", times=5)
    gateway.jobs.before_replace.extend([lambda: None, lambda: gateway.jobs.fail_next("replace")])

    assert [] == gateway.once()

    assert (State.SUCCEEDED, 1) == (gateway.job().state, len(gateway.claude.calls))
    assert gateway.job().result is not None


def test_a_finish_is_retried_until_the_store_takes_it(make: Make) -> None:
    gateway = make(a_job())
    gateway.claude.when = lambda _: gateway.jobs.fail_next("replace", times=30)

    assert [] == gateway.once()

    assert (State.SUCCEEDED, 1) == (gateway.job().state, len(gateway.claude.calls))
    assert 1 == len(gateway.ledger.rows)


@pytest.mark.parametrize(
    ("receives", "seconds"), [(1, 8), (19, 8), (20, 15), (100, 120), (200, 120), (999, 120)]
)
def test_a_store_that_stays_busy_is_left_alone_for_longer_but_earlier_snoozes_hardly_count(
    make: Make, receives: int, seconds: int
) -> None:
    """A job whose worker was killed, and that had been snoozed before, once waited six minutes (make chaos)."""
    gateway = make(a_job())
    gateway.jobs.break_down("replace")
    (message,) = gateway.queue.deliver()

    gateway.time.run(
        gateway.invoke(messages=[replace(message, receive_count=receives)], minutes=14)
    )

    assert [("job_1", seconds)] == [(job, -(-ms // 1_000)) for job, ms in gateway.queue.delays]


def test_an_outcome_that_cannot_be_stored_in_time_is_in_the_ledger(make: Make) -> None:
    """The one way to be billed twice that no rule can close: so the ledger names it."""
    gateway = make(a_job())
    gateway.claude.when = lambda _: gateway.jobs.break_down("replace")

    assert ["message-1"] == gateway.once()

    assert State.RUNNING == gateway.job().state
    (row,) = gateway.ledger.rows.values()
    assert (Spend.of_call(USED, COST), "outcome not stored") == (row.spend, row.note)


@pytest.mark.parametrize("hours", [0.3, 1.4, 5])
def test_an_outage_of_the_bucket_uses_no_attempt_and_costs_one_more_call(
    make: Make, hours: float
) -> None:
    gateway = make(a_job())
    gateway.results.inline_bytes = 0
    gateway.results.break_down("put")
    ends_at = NOON + int(hours * 60 * MINUTE)

    async def story() -> None:
        asyncio.get_running_loop().call_later(hours * 3_600, gateway.results.recover)
        while not gateway.job().state.is_final:
            due = gateway.queue.next_visible()
            assert due is not None
            await asyncio.sleep(max(0, due - gateway.time.now()) / 1000)
            await gateway.invoke()

    gateway.time.run(story())

    job = gateway.job()
    assert (State.SUCCEEDED, 1, 2 * COST) == (job.state, job.attempts_used, job.cost_micro_usd)
    assert 2 == len(gateway.claude.calls) == len(gateway.ledger.rows)
    assert {NOT_STORED, None} == {row.note for row in gateway.ledger.rows.values()}
    assert gateway.time.now() < ends_at + 16 * MINUTE


def test_the_lease_is_kept_while_an_answer_waits_to_be_stored(make: Make) -> None:
    """Else another worker would make the call again."""
    gateway = make(a_job())
    gateway.claude.when = lambda _: gateway.results.break_down("put")

    async def story() -> list[str]:
        running = asyncio.create_task(gateway.invoke())
        await asyncio.sleep(3 * LEASE_MS / 1000)
        gateway.queue.post(job_id="job_1")
        await gateway.invoke(gateway.new_worker())
        gateway.results.recover()
        return await running

    assert [] == gateway.time.run(story())

    assert (State.SUCCEEDED, 1) == (gateway.job().state, len(gateway.claude.calls))


def test_each_call_has_a_place_of_its_own_for_its_answer(make: Make) -> None:
    """One that comes late must not put its answer in the place of another's."""
    gateway = make(a_job(fallback_models=("claude-b",)), script=[answer(stop_reason="refusal")])
    gateway.results.inline_bytes = 0

    gateway.once()

    assert ["results/job_1-4.json.gz"] == list(gateway.results.objects)


def test_a_claim_whose_reply_was_lost_is_a_claim(make: Make) -> None:
    gateway = make(a_job())
    gateway.jobs.lost_replies = 1

    assert [] == gateway.once()

    assert (State.SUCCEEDED, 1) == (gateway.job().state, gateway.job().attempts_used)
    assert 1 == len(gateway.claude.calls)


def test_an_outcome_whose_response_was_lost_is_stored_once_without_an_error(make: Make) -> None:
    gateway = make(a_job())

    def lose(_: object) -> None:
        gateway.jobs.lost_replies = 1

    gateway.claude.when = lose

    assert [] == gateway.once()

    assert State.SUCCEEDED == gateway.job().state
    assert 1 == len(gateway.claude.calls)
    (row,) = gateway.ledger.rows.values()
    assert row.note is None
    assert "lease lost" not in gateway.events.problem_names


def test_a_claim_that_cannot_be_written_makes_no_call(make: Make) -> None:
    gateway = make(a_job())
    gateway.jobs.break_down("replace")

    assert ["message-1"] == gateway.once()

    assert (State.QUEUED, []) == (gateway.job().state, gateway.claude.calls)
    gateway.jobs.recover()
    gateway.drain()
    assert State.SUCCEEDED == gateway.job().state


def test_a_record_that_no_store_takes_is_the_jobs_own_failure(make: Make) -> None:
    """Not a busy store: it would be refused a thousand times."""
    gateway = make(a_job("job_1"), a_job("job_2"))
    gateway.jobs.fail_next("replace", error=NotStorable("the jobs table", "it is too large"))

    assert [] == gateway.once()

    ended = [job for job in gateway.jobs.stored.values() if job.error]
    assert ["record_not_storable"] == [job.error.type for job in ended if job.error]
    assert (1, 1) == (len(ended), len(gateway.claude.calls))


def test_a_store_that_is_busy_for_a_while_costs_no_receive(make: Make) -> None:
    """The job of a dead worker goes on as soon as its successor can read and claim it."""
    gateway = make(a_job())
    gateway.jobs.fail_next("replace", times=6)

    assert [] == gateway.once()

    attempt = gateway.job().attempts[0]
    assert (State.SUCCEEDED, 1) == (gateway.job().state, gateway.job().attempts_used)
    assert attempt.at <= NOON + STORE_STAY_MS + 2 * STORE_BUSY_MS


def test_a_claim_that_was_stored_unconfirmed_does_not_block_its_job_for_a_lease(make: Make) -> None:
    gateway = make(a_job())
    gateway.jobs.lost_replies = 1
    # Then the second try of the same write fails.
    gateway.jobs.before_replace.append(lambda: gateway.jobs.fail_next("replace"))

    assert [] == gateway.once()

    job = gateway.job()
    assert (State.SUCCEEDED, 1, 1) == (job.state, job.attempts_used, len(gateway.claude.calls))
    assert job.attempts[0].at <= NOON + STORE_STAY_MS


def test_a_job_that_vanishes_is_acknowledged(make: Make) -> None:
    gateway = make(a_job())
    gateway.jobs.before_replace.append(lambda: gateway.jobs.delete("job_1"))

    assert [] == gateway.once()
    assert [] == gateway.claude.calls


def test_a_job_that_vanishes_during_its_call_is_acknowledged_and_paid(make: Make) -> None:
    gateway = make(a_job())
    gateway.claude.when = lambda _: gateway.jobs.delete("job_1")

    assert [] == gateway.once()

    assert 1 == len(gateway.ledger.rows)


def test_a_batch_that_cannot_be_read_at_once_is_read_one_by_one(make: Make) -> None:
    gateway = make(a_job("job_1"), a_job("job_2"))
    gateway.jobs.fail_next("get_many")

    assert [] == gateway.once()

    assert {State.SUCCEEDED} == {job.state for job in gateway.jobs.stored.values()}


def test_a_job_that_cannot_be_read_is_retried(make: Make) -> None:
    gateway = make(a_job("job_1"), a_job("job_2"))
    gateway.jobs.fail_next("get_many")
    gateway.jobs.fail_next("get")

    assert [] == gateway.once()

    assert State.SUCCEEDED == gateway.job("job_1").state


def test_an_unknown_job_becomes_a_dead_letter_even_if_no_record_could_be_read_at_first(
    make: Make,
) -> None:
    gateway = make()
    gateway.queue.post(job_id="job_404")
    gateway.jobs.fail_next("get_many")

    assert ["message-1"] == gateway.once()
    assert ["batch not readable", "job record missing"] == gateway.events.problem_names

    gateway.drain()
    assert ["no such job"] == [reason for _, reason in gateway.queue.rejected]


def test_an_outcome_whose_record_changes_all_the_time_is_accounted_for(make: Make) -> None:
    """Retries of contention are bounded: the call is in the ledger, and the job is checked again later."""
    gateway = make(a_job())

    def overtake() -> None:
        current = gateway.job()
        gateway.jobs.stored["job_1"] = replace(current, version=current.version + 1)

    def contend(_: CallRequest) -> None:
        gateway.jobs.before_replace.extend([overtake] * 10)

    gateway.claude.when = lambda request: None if gateway.claude.calls[1:] else contend(request)

    gateway.time.run(gateway.invoke(minutes=1))

    (row,) = gateway.ledger.rows.values()
    assert ("succeeded", "outcome not stored") == (row.outcome, row.note)
    assert State.RUNNING == gateway.job().state
    assert ["store busy"] == gateway.events.problem_names

    gateway.drain()
    assert State.SUCCEEDED == gateway.job().state


def test_a_ledger_that_is_busy_for_a_moment_gets_its_rows_later(make: Make) -> None:
    gateway = make(a_job())
    gateway.ledger.fail_next("record")

    assert [] == gateway.once()

    assert 1 == len(gateway.ledger.rows)


def test_a_busy_ledger_is_logged_and_stops_no_job(make: Make) -> None:
    gateway = make(a_job())
    gateway.ledger.break_down("record")

    gateway.once()

    assert State.SUCCEEDED == gateway.job().state
    assert "ledger rows not written" in gateway.events.problem_names


def test_a_message_is_kept_until_the_ledger_has_the_calls_of_its_job(make: Make) -> None:
    """The worker may die; the next receiver of the message then writes the row from the job's record."""
    gateway = make(a_job())
    gateway.ledger.break_down("record")

    assert ["message-1"] == gateway.once()
    gateway.ledger.recover()
    gateway.worker = gateway.new_worker()
    gateway.drain()

    (row,) = gateway.ledger.rows.values()
    (attempt,) = gateway.job().attempts
    assert (attempt.request_id, "succeeded", True) == (row.request_id, row.outcome, row.certain)
    assert [row.spend] == list(gateway.ledger.sums.values())


def test_the_only_message_of_a_job_that_ended_just_now_is_kept(make: Make) -> None:
    """SQS has delivered it twice, and its first receiver may die before it has written the row."""
    gateway = make(a_job())
    gateway.once()
    gateway.ledger.rows.clear()
    gateway.queue.post(job_id="job_1")

    assert ["message-2"] == gateway.once()
    gateway.drain()

    assert ["succeeded"] == gateway.ledger.outcomes


def test_a_message_received_again_adds_no_row_and_no_usage(make: Make) -> None:
    gateway = make(a_job())
    gateway.once()
    before = dict(gateway.ledger.rows), dict(gateway.ledger.sums)
    gateway.time.run(asyncio.sleep(2 * BOOKING_MS / 1000))
    gateway.queue.send([Pointer("job_1", "acme", "claude-a")])

    gateway.once()

    assert before == (gateway.ledger.rows, gateway.ledger.sums)


def test_an_uncertain_call_is_in_the_job_while_the_ledger_is_busy(make: Make) -> None:
    """Before the job can run again: if the worker dies before the ledger is back, the next one writes the row."""
    lost = refused(None, "connection_lost", may_be_billed=True)
    gateway = make(a_job(), script=[lost])
    gateway.ledger.break_down("record_missing")
    gateway.once(minutes=1)

    (waiting,) = (
        job for job in gateway.jobs.history["job_1"] if job.state is State.QUEUED and job.attempts
    )
    assert ["connection_lost"] == [row.outcome for row in waiting.unbooked]
    assert 1 == waiting.uncertain_calls


def test_rows_the_ledger_did_not_take_wait_for_the_workers_next_invocation(make: Make) -> None:
    gateway = make(a_job("job_1"))
    gateway.ledger.break_down("record")
    gateway.once()
    gateway.ledger.recover()
    gateway.submit(a_job("job_2"))

    gateway.once()

    assert {"job_1", "job_2"} == {row.job_id for row in gateway.ledger.rows.values()}
    (total,) = gateway.ledger.sums.values()
    assert 2 == total.calls


def test_a_call_that_may_be_billed_is_in_the_ledger_before_it_can_be_made_again(make: Make) -> None:
    """The worker may die a moment later."""
    lost = refused(None, "connection_lost", may_be_billed=True)
    gateway = make(a_job(), script=[lost])

    gateway.once()

    told = [line for line in gateway.journal if "ledger: record" in line or "queued" in line]
    assert ["the ledger: record_missing 1", "the jobs table: replace job_1 queued"] == told[:2]
    (total,) = gateway.ledger.sums.values()
    assert 2 == total.calls


# Messages ------------------------------------------------------------------------------------------------------


def hidden_for(gateway: Gateway) -> int:
    due = gateway.queue.next_visible()
    assert due is not None
    return due - gateway.time.now()


@pytest.mark.parametrize("dies_after_seconds", [1, 44, 90, 300, 600])
def test_whenever_a_worker_dies_its_messages_become_visible_within_a_lease(
    make: Make, dies_after_seconds: int
) -> None:
    """Also those of jobs it had not started, and not only after the queue's visibility timeout."""
    gateway = make(a_job("job_1"), a_job("job_2"), latency_ms=700_000)

    async def die() -> int:
        invocation = asyncio.create_task(gateway.invoke())
        await asyncio.sleep(dies_after_seconds)
        left = hidden_for(gateway)
        await invocation
        return left

    left = gateway.time.run(die())

    assert LEASE_MS - RENEW_MS - 2 * SECOND <= left <= LEASE_MS


def test_messages_are_hidden_while_their_invocation_runs(make: Make) -> None:
    """Also of jobs that have ended: Lambda deletes them only with the last."""
    gateway = make(a_job("job_1"), a_job("job_2", cancel_requested=True), latency_ms=700_000)
    seen: list[Received] = []

    async def look() -> None:
        invocation = asyncio.create_task(gateway.invoke())
        for _ in range(69):
            await asyncio.sleep(10)
            seen.extend(gateway.queue.deliver())
        await invocation

    gateway.time.run(look())

    assert [] == seen


def test_a_message_returned_early_is_visible_although_its_invocation_still_runs(make: Make) -> None:
    """So that the first worker that polls takes it: here the same one, which has a free slot."""
    early = a_job("job_2", not_before=NOON + 60 * SECOND)
    gateway = make(a_job("job_1"), early, latency_ms=300_000)

    async def look() -> list[State]:
        invocation = asyncio.create_task(gateway.invoke())
        await asyncio.sleep(70)
        found = [gateway.job(name).state for name in ("job_1", "job_2")]
        await invocation
        return found

    assert [State.RUNNING, State.RUNNING] == gateway.time.run(look())


def test_a_second_message_of_a_job_in_the_same_invocation_is_acknowledged(make: Make) -> None:
    gateway = make(a_job())
    gateway.queue.post(job_id="job_1")

    assert [] == gateway.once()

    assert (1, 0) == (len(gateway.claude.calls), gateway.queue.depth())


def test_of_two_messages_of_a_job_that_waits_one_is_left(make: Make) -> None:
    gateway = make(a_job(), script=[refused(429, "rate_limit_error", retry_after_ms=5 * MINUTE)])
    gateway.queue.post(job_id="job_1")

    assert ["message-1"] == gateway.once()

    assert 1 == gateway.queue.depth()


def test_the_ledger_names_a_call_whose_worker_died_before_it_is_made_again(make: Make) -> None:
    dead = claim(a_job(), "dead worker", NOON - 10 * MINUTE, NOON - 8 * MINUTE)
    gateway = make(dead)

    gateway.once()

    lost, made = gateway.ledger.rows.values()
    assert ("worker_lost", "job_1#2", False) == (lost.outcome, lost.call_id, lost.certain)
    assert "succeeded" == made.outcome
    told = [line for line in gateway.journal if "ledger: record" in line or "running" in line]
    assert ["the ledger: record_missing 1", "the jobs table: replace job_1 running"] == told[:2]


def test_messages_that_cannot_be_returned_become_visible_by_themselves(make: Make) -> None:
    gateway = make(a_job(), script=[SERVER_ERROR])
    gateway.queue.break_down("put_back")

    assert ["message-1"] == gateway.once(minutes=1)

    assert "messages not put back" in gateway.events.problem_names
    gateway.queue.recover()
    gateway.drain()
    assert State.SUCCEEDED == gateway.job().state


@pytest.mark.parametrize("latency_ms", range(100, 1_200, 100))
def test_what_is_being_written_when_the_last_job_ends_is_written_to_the_end(
    make: Make, latency_ms: int
) -> None:
    """Whenever the batch ends, also in the middle of the housekeeping's own write."""
    jobs = [a_job(f"job_{n}") for n in range(8)]
    gateway = make(*jobs, latency_ms=latency_ms)
    gateway.blocking.latency_ms = 70
    gateway.know(known_group())
    gateway.claude.when = lambda request: SERVER_ERROR if b"job_7" in request.body.data else None

    gateway.once(minutes=1)

    assert 7 == len(gateway.ledger.rows)
    assert [7] == [spend.calls for spend in gateway.ledger.sums.values()]
    assert ["job_7"] == [job_id for job_id, _ in gateway.queue.delays]


def test_a_limits_table_that_is_busy_to_the_end_returns_the_jobs(make: Make) -> None:
    gateway = make(a_job())
    gateway.time.longest_story_ms = 20 * MINUTE
    gateway.limits.break_down("load")

    assert ["message-1"] == gateway.once()

    assert (State.QUEUED, 0) == (gateway.job().state, gateway.job().attempts_used)
    assert gateway.time.now() <= NOON + 14 * MINUTE


# Taking more messages --------------------------------------------------------------------------------------


def some_jobs(count: int, **facts: object) -> list[Job]:
    return [a_job(f"job_{number:03}", **facts) for number in range(count)]


def states(gateway: Gateway) -> set[State]:
    return {job.state for job in gateway.jobs.stored.values()}


def let_one_take_long(gateway: Gateway, job_id: str) -> None:
    def look(request: CallRequest) -> None:
        gateway.claude.latency_ms = 10 * MINUTE if job_id.encode() in request.body.data else 500

    gateway.claude.when = look


def test_a_batch_does_not_wait_for_its_slowest_job(make: Make) -> None:
    """Its free slots are filled from the queue; what the worker took itself it deletes itself."""
    gateway = make(*some_jobs(200))
    gateway.know(known_group())
    slow = "job_000"

    async def story() -> None:
        running = asyncio.create_task(gateway.invoke())
        await asyncio.sleep(60)
        assert 199 == sum(job.state is State.SUCCEEDED for job in gateway.jobs.stored.values())
        assert 50 == gateway.queue.depth()
        assert State.RUNNING == gateway.job(slow).state
        await running

    let_one_take_long(gateway, slow)

    gateway.time.run(story())

    assert {State.SUCCEEDED} == states(gateway)
    assert 200 == len(gateway.claude.calls) == gateway.queue.receives
    assert 0 == gateway.queue.depth()
    ((_, facts),) = [note for note in gateway.events.notes if note[0] == "batch done"]
    assert (200, 0) == (facts["messages"], facts["put_back"])
    no_accident(gateway)


def test_a_worker_never_holds_more_jobs_than_it_has_slots(make: Make) -> None:
    gateway = make(*some_jobs(300), latency_ms=5 * SECOND)
    gateway.know(known_group())
    held: list[int] = []

    def count(_: CallRequest) -> None:
        ended = sum(job.state.is_final for job in gateway.jobs.stored.values())
        held.append(gateway.queue.receives - ended)

    gateway.claude.when = count
    gateway.once()

    assert 40 < max(held) <= SLOTS
    assert {State.SUCCEEDED} == states(gateway)


@pytest.mark.parametrize(("a_minute", "most"), [(120, WAITING), (600, MOST_WAITING)])
def test_a_worker_takes_no_more_than_can_start_soon(make: Make, a_minute: int, most: int) -> None:
    """What waits in a worker's hands waits for others too; in the queue it does not."""
    gateway = make(*some_jobs(300), latency_ms=200)
    gateway.know(known_group(seen=paced(a_minute, 2)))
    gateway.claude.otherwise = answer(seen={})
    waiting: list[int] = []

    def count(_: CallRequest) -> None:
        ended = sum(job.state.is_final for job in gateway.jobs.stored.values())
        returned = len(gateway.queue.delays)
        waiting.append(gateway.queue.receives - returned - ended - gateway.claude.in_flight)

    gateway.claude.when = count

    gateway.once()

    # The batch brings fifty; more come ten at a time while too few wait, and one that looks around.
    assert max(waiting) <= max(50, most + 10) + 1
    assert most - 10 <= median(waiting[60:220]) <= most + 10
    assert len(waiting) > 200


def test_nothing_is_taken_while_there_is_no_key(make: Make) -> None:
    gateway = make(a_job("job_b", model="claude-b"), *some_jobs(100), latency_ms=5 * MINUTE)
    gateway.pool.pool.clear()

    gateway.once()

    assert 50 == gateway.queue.receives


def test_what_is_behind_a_blocked_backlog_is_looked_for_at_a_slow_pace(make: Make) -> None:
    """Each look is paid, and hides messages; but not all of them are of the blocked group."""
    minutes = 2
    gateway = make(a_job("job_b", model="claude-b"), *some_jobs(1_000), latency_ms=minutes * MINUTE)
    gateway.know(block(known_group(), NOON + 10 * MINUTE, "x", NOON))

    gateway.once()

    looks = minutes * MINUTE // SCOUT_MS
    assert 50 + looks * RECEIVE_AT_ONCE / 2 < gateway.queue.receives
    assert gateway.queue.receives <= 50 + 1.3 * looks * RECEIVE_AT_ONCE


def test_an_invocation_that_can_start_nothing_ends_soon_but_not_at_once(make: Make) -> None:
    """At once it would receive the next fifty, and so a whole backlog in minutes."""
    gateway = make(*some_jobs(50))
    gateway.know(block(known_group(), NOON + 10 * MINUTE, "rate limited", NOON))

    assert 50 == len(gateway.once())

    assert USUAL.linger_ms <= gateway.time.now() - NOON <= USUAL.linger_ms + 5 * SECOND


def test_an_invocation_lingers_no_longer_than_the_waits_say(make: Make) -> None:
    gateway = make(*some_jobs(50), waits=Waits(linger_ms=0))
    gateway.know(block(known_group(), NOON + 10 * MINUTE, "rate limited", NOON))

    assert 50 == len(gateway.once())

    assert gateway.time.now() - NOON < SECOND


def test_jobs_that_wait_for_their_limits_keep_no_job_of_another_group_out(make: Make) -> None:
    """Every few seconds a worker full of them checks whether the queue has a job that need not wait."""
    gateway = make(*some_jobs(50))
    gateway.know(known_group(seen=paced(20, 1)))
    gateway.know(known_group(model_group="b"))
    gateway.claude.otherwise = answer(seen={})

    async def story() -> None:
        running = asyncio.create_task(gateway.invoke())
        await asyncio.sleep(20)
        gateway.submit(a_job("job_b", model="claude-b"))
        await asyncio.sleep(10)
        assert State.SUCCEEDED == gateway.job("job_b").state
        await running

    gateway.time.run(story())

    gateway.drain()
    assert {State.SUCCEEDED} == states(gateway)


def test_a_full_worker_that_sees_a_job_of_another_tenant_takes_all_of_them(make: Make) -> None:
    """One message every 5 s would be 50 s for ten jobs."""
    gateway = make(*some_jobs(40))
    gateway.know(known_group(seen=paced(20, 1)))
    gateway.claude.otherwise = answer(seen={})

    async def story() -> None:
        running = asyncio.create_task(gateway.invoke())
        await asyncio.sleep(20)
        before = gateway.queue.receives
        for number in range(10):
            gateway.submit(a_job(f"job_other_{number}", tenant="other"))
        await asyncio.sleep(SCOUT_MS / 1000 + 2)
        assert before + 10 <= gateway.queue.receives
        await running

    gateway.time.run(story())


def test_a_probing_job_that_must_wait_too_is_returned_at_once(make: Make) -> None:
    gateway = make(*some_jobs(70))
    gateway.know(known_group(seen=paced(20, 1)))
    gateway.claude.otherwise = answer(seen={})

    async def story() -> None:
        running = asyncio.create_task(gateway.invoke())
        await asyncio.sleep(30)
        assert 1 <= len(gateway.queue.delays) <= 30 * SECOND // SCOUT_MS
        await running

    gateway.time.run(story())

    # It did not end the worker's taking of others: more jobs than the first messages were run.
    assert sum(job.state is State.SUCCEEDED for job in gateway.jobs.stored.values()) > 50


def test_a_job_that_was_only_inspected_is_kept_when_it_is_taken_to_be_run(make: Make) -> None:
    gateway = make(*some_jobs(60))
    gateway.know(known_group(seen=paced(20, 1)))
    gateway.claude.otherwise = answer(seen={})
    put_back: list[int] = []

    async def story() -> None:
        running = asyncio.create_task(gateway.invoke())
        for _ in range(2):
            await asyncio.sleep(90)
            put_back.append(len(gateway.queue.delays))
        await running

    gateway.time.run(story())

    # By then the queue is empty, and the worker holds all of them.
    assert 10 <= put_back[0] == put_back[1]
    # Hidden for longer they would be missing when the queue comes to its end.
    assert max(delay for _, delay in gateway.queue.delays) <= SCOUT_MS
    assert {State.SUCCEEDED} == states(gateway)


def test_near_its_end_an_invocation_takes_nothing(make: Make) -> None:
    """Calls need time, and the mapping, and so the governor, is to decide again."""
    gateway = make(a_job(), latency_ms=8 * MINUTE)
    taken: list[int] = []

    async def story() -> None:
        running = asyncio.create_task(gateway.invoke())
        for number in range(10):
            gateway.submit(a_job(f"job_{number}0"))
            await asyncio.sleep(40)
            taken.append(gateway.queue.receives)
        await running

    gateway.time.run(story())

    minutes = REFILL_MS / MINUTE
    assert 1 + minutes * 60 // 40 <= taken[-1] <= 2 + minutes * 60 // 40
    gateway.drain()
    assert {State.SUCCEEDED} == states(gateway)


def test_an_empty_queue_is_asked_once_a_second_while_calls_run(make: Make) -> None:
    gateway = make(a_job(), latency_ms=60 * SECOND)

    async def story() -> None:
        running = asyncio.create_task(gateway.invoke())
        await asyncio.sleep(30)
        gateway.submit(a_job("job_2"))
        await running

    gateway.time.run(story())

    asked = gateway.journal.count("the jobs queue: receive")
    assert 80 <= asked <= 100
    assert gateway.claude.calls[1].at - NOON <= 33 * SECOND
    assert {State.SUCCEEDED} == states(gateway)


def test_a_worker_that_finds_the_queue_empty_reports_it_to_the_others(make: Make) -> None:
    gateway = make(*some_jobs(3), latency_ms=3 * SECOND)
    gateway.know(known_group())

    gateway.once()

    assert gateway.limits.stored["org/a"].drained_at >= NOON


def test_a_queue_that_is_busy_is_asked_again(make: Make) -> None:
    gateway = make(*some_jobs(60))
    gateway.know(known_group())
    let_one_take_long(gateway, "job_000")
    gateway.queue.fail_next("receive", times=2)

    gateway.once()

    assert {State.SUCCEEDED} == states(gateway)
    assert ["store busy"] * 2 == gateway.events.problem_names


def test_what_a_worker_took_and_could_not_finish_is_returned(make: Make) -> None:
    gateway = make(a_job("job_1"), latency_ms=30 * SECOND)
    gateway.claude.when = lambda request: SERVER_ERROR if b"job_2" in request.body.data else None

    async def story() -> list[str]:
        batch = gateway.queue.deliver()
        gateway.submit(a_job("job_2"))
        return await gateway.invoke(messages=batch, minutes=2)

    # Lambda knows nothing of it, so it is not among what was not done.
    assert [] == gateway.time.run(story())

    assert State.QUEUED == gateway.job("job_2").state
    assert ["job_2"] == [job_id for job_id, _ in gateway.queue.delays]
    gateway.claude.when = lambda _: None
    gateway.drain()
    assert {State.SUCCEEDED} == states(gateway)
    assert 0 == gateway.queue.depth()


def test_a_worker_that_dies_before_it_deletes_what_it_took_leaves_a_job_that_is_done(
    make: Make,
) -> None:
    gateway = make(a_job("job_1"), latency_ms=30 * SECOND)
    gateway.queue.break_down("delete")

    async def story() -> None:
        batch = gateway.queue.deliver()
        gateway.submit(a_job("job_2"))
        with suppress(StoreBusy):
            # Lambda's own delete is broken as well.
            await gateway.invoke(messages=batch)

    gateway.time.run(story())

    assert 2 == gateway.queue.depth()
    assert "messages not deleted" in gateway.events.problem_names
    gateway.queue.recover()
    gateway.drain()
    assert 0 == gateway.queue.depth()
    assert {(State.SUCCEEDED, 1)} == {
        (job.state, job.attempts_used) for job in gateway.jobs.stored.values()
    }
    assert 2 == len(gateway.claude.calls) == len(gateway.ledger.rows)


def test_a_delete_that_failed_is_made_again(make: Make) -> None:
    gateway = make(a_job("job_1"), latency_ms=30 * SECOND)
    gateway.queue.fail_next("delete", times=2)

    async def story() -> None:
        batch = gateway.queue.deliver()
        gateway.submit(a_job("job_2"))
        await gateway.invoke(messages=batch)

    gateway.time.run(story())

    assert 0 == gateway.queue.depth()
    no_accident(gateway)


# Headers before the answer ---------------------------------------------------------------------------------


def test_the_first_headers_of_an_unknown_group_are_not_waited_for_until_the_answer(
    make: Make,
) -> None:
    """A first answer may take minutes; at the safe rate fifty jobs would start within fifty seconds."""
    gateway = make(*some_jobs(50), latency_ms=2 * MINUTE)
    gateway.claude.headers_after_ms = 500

    gateway.once()

    last = max(call.at for call in gateway.claude.calls)
    assert last - NOON <= 20 * SECOND
    assert gateway.claude.calls[0].request.early
    assert not gateway.claude.calls[-1].request.early
    no_accident(gateway)


def test_early_headers_name_the_organization_of_the_key(make: Make) -> None:
    gateway = make(*some_jobs(20), keys=[upstream_key(organization=None)], latency_ms=2 * MINUTE)
    gateway.claude.otherwise = answer(organization="org-7")
    gateway.claude.headers_after_ms = 500

    gateway.once()

    assert {State.SUCCEEDED} == states(gateway)
    assert max(call.at for call in gateway.claude.calls) - NOON <= 20 * SECOND
    assert ROOMY["requests"].limit == gateway.limits.stored["org-7/a"].requests.limit
    no_accident(gateway)


# The key pool during an invocation -------------------------------------------------------------------------


def test_the_key_pool_is_read_every_few_seconds_and_not_for_every_job(make: Make) -> None:
    gateway = make(*some_jobs(150))
    gateway.know(known_group())

    gateway.once()

    seconds = (gateway.time.now() - NOON) // SECOND
    marks = gateway.journal.count("the limits table: marks")
    assert 150 == len(gateway.claude.calls)
    assert 1 <= gateway.pool.reads <= 1 + seconds * SECOND // KEYS_MS
    assert marks == gateway.pool.reads


def test_a_key_that_is_put_into_the_pool_is_used_within_seconds(make: Make) -> None:
    gateway = make(a_job("job_1"), keys=[upstream_key("old")], latency_ms=30 * SECOND)

    async def story() -> None:
        running = asyncio.create_task(gateway.invoke())
        await asyncio.sleep(1)
        gateway.pool.pool = [upstream_key("new")]
        await asyncio.sleep(KEYS_MS / 1000)
        gateway.submit(a_job("job_2"))
        await running

    gateway.time.run(story())

    assert ["old", "new"] == [call.key_id for call in gateway.claude.calls]


def test_jobs_that_wait_for_their_start_are_not_sent_with_a_key_that_was_rejected(
    make: Make,
) -> None:
    keys = [upstream_key("old", organization="org-1"), upstream_key("new", organization="org-2")]
    gateway = make(*some_jobs(20), keys=keys)
    for key in keys:
        gateway.know(known_group(key.organization or "", seen=paced(60, 2)))
    gateway.claude.when = lambda request: (
        refused(401, "authentication_error") if request.key.id == "old" else answer(seen={})
    )

    gateway.once()

    assert 1 == [call.key_id for call in gateway.claude.calls].count("old")
    assert {State.SUCCEEDED} == states(gateway)


# Breakers --------------------------------------------------------------------------------------------------


def test_a_model_that_is_overloaded_is_probed_and_its_jobs_keep_their_attempts(make: Make) -> None:
    gateway = make(*some_jobs(30), max_attempts=1)
    gateway.know(known_group())
    until = NOON + MINUTE
    gateway.claude.when = lambda _: OVERLOADED if gateway.time.now() < until else None

    gateway.drain()

    assert {(State.SUCCEEDED, 1)} == {
        (job.state, job.attempts_used) for job in gateway.jobs.stored.values()
    }
    during = [call for call in gateway.claude.calls if NOON + 5 * SECOND < call.at < until]
    assert 1 <= len(during) <= 10


def test_an_endpoint_that_fails_is_skipped_while_another_one_serves(make: Make) -> None:
    keys = [
        upstream_key("dead", base_url="http://127.0.0.1:1"),
        upstream_key("good", base_url="http://127.0.0.1:2"),
    ]
    gateway = make(*some_jobs(100), keys=keys, max_attempts=50, jitter=0.25)
    gateway.know(known_group())
    gateway.claude.when = lambda request: SERVER_ERROR if request.key.id == "dead" else None

    gateway.drain()

    tried = [call.key_id for call in gateway.claude.calls]
    assert {State.SUCCEEDED} == states(gateway)
    assert 100 == tried.count("good")
    assert tried.count("dead") <= 60


# Everything together ---------------------------------------------------------------------------------------


def test_no_job_is_lost_and_none_is_done_without_its_answer(make: Make) -> None:
    """A bad day: every kind of trouble, several workers, and every job ends once with its result kept."""
    jobs = [a_job(f"job_{n:02}", fallback_models=("claude-b",) * (n % 3 == 0)) for n in range(60)]
    keys = [upstream_key("k1", organization="org-1"), upstream_key("k2", organization="org-2")]
    gateway = make(*jobs, keys=keys, max_attempts=50)
    gateway.blocking.latency_ms = 5
    troubles: list[Answer | Refused] = [
        RATE_LIMITED,
        OVERLOADED,
        SERVER_ERROR,
        refused(None, "connection_error"),
        refused(None, "connection_error", may_be_billed=True),
        answer(stop_reason="refusal"),
        refused(429, "rate_limit_error", error_code="ramp_limit_exceeded", retry_after_ms=2_000),
        refused(409),
    ]
    for number in range(120):
        gateway.claude.script.append(troubles[number % 8] if number % 3 else answer())
    for number in range(20):
        gateway.queue.post(job_id=f"job_{number:02}")

    async def story() -> None:
        workers = [gateway.worker, gateway.new_worker(-2_000), gateway.new_worker(3_000)]
        for turn in range(200):
            due = gateway.queue.next_visible()
            if due is None:
                return
            await asyncio.sleep(max(0, due - gateway.time.now()) / 1000)
            if turn < 40:
                gateway.jobs.fail_next("replace", times=turn % 3)
                gateway.limits.fail_next("replace", times=turn % 3)
                gateway.results.fail_next("put", times=turn % 2)
            batches = [(worker, gateway.queue.deliver(20)) for worker in workers]
            await asyncio.gather(
                *(gateway.invoke(worker, batch) for worker, batch in batches if batch)
            )

    gateway.time.run(story())

    assert 0 == gateway.queue.depth()
    for job in gateway.jobs.stored.values():
        assert State.SUCCEEDED == job.state
        assert job.result is not None
        written = gateway.jobs.history[job.job_id]
        assert 1 == sum(each.state.is_final for each in written)
        assert [each.version for each in written] == sorted({each.version for each in written})
    assert 60 == sum(row.outcome == "succeeded" for row in gateway.ledger.rows.values())


# Memory ------------------------------------------------------------------------------------------------------

LARGE: Final = 8_000_000
"""Bytes of a request; the shared memory holds four such at a time."""


def test_large_requests_go_up_a_few_at_a_time_and_their_answers_are_awaited_together(
    make: Make,
) -> None:
    gateway = make(latency_ms=60 * SECOND)
    gateway.know(known_group("org", "a"))
    gateway.claude.upload_ms = 2 * SECOND
    gateway.submit(*(a_job(f"job_{n}", request_bytes=LARGE) for n in range(12)))

    gateway.once()

    began = Counter(call.at // SECOND for call in gateway.claude.calls)
    assert 12 == len(gateway.claude.answered)
    assert 4 == max(began.values())
    assert 12 == gateway.claude.most_in_flight
    assert 0 == gateway.worker.memory.used
    no_accident(gateway)


def test_small_jobs_do_not_wait_for_large_ones_before_them(make: Make) -> None:
    gateway = make(latency_ms=1 * SECOND)
    gateway.know(known_group("org", "a"))
    small = {f"job_small-{n}" for n in range(30)}
    gateway.claude.when = lambda request: _slow(gateway, request)
    gateway.submit(
        *(a_job(f"job_{n}", request_bytes=LARGE) for n in range(20)),
        *(a_job(name, tenant="other") for name in sorted(small)),
    )
    began = gateway.time.now()

    gateway.once()

    late = [name for name in small if (gateway.job(name).finished_at or 0) - began > 10 * SECOND]
    assert [] == late
    no_accident(gateway)


def _slow(gateway: Gateway, request: CallRequest) -> None:
    gateway.claude.upload_ms = 0 if b"small" in request.body.data else 20 * SECOND


def test_a_job_that_waits_for_memory_has_no_start_time_that_others_need(make: Make) -> None:
    gateway = make(latency_ms=1 * SECOND)
    gateway.know(known_group("org", "a"))
    gateway.claude.upload_ms = 25 * SECOND
    gateway.submit(*(a_job(f"job_{n}", request_bytes=LARGE) for n in range(8)))
    reserved = _reservations(gateway.worker.limiter)

    async def story() -> tuple[int, int]:
        running = asyncio.create_task(gateway.invoke())
        await asyncio.sleep(15)
        seen = len(reserved), gateway.worker.memory.waiting
        await running
        return seen

    assert (4, 4) == gateway.time.run(story())
    assert 8 == len(gateway.claude.answered)


def _reservations(limiter: Limiter) -> set[Admission]:
    """Return the admissions that are not settled, as they change."""
    reserved: set[Admission] = set()
    admit, settle = limiter.admit, limiter.settle

    async def admit_and_record(*args: Any, **named: Any) -> Admitted:
        given = await admit(*args, **named)
        if isinstance(given, Admission):
            reserved.add(given)
        return given

    def settle_and_record(admission: Admission, used: Cost | None, **facts: bool) -> None:
        reserved.remove(admission)
        settle(admission, used, **facts)

    vars(limiter).update(admit=admit_and_record, settle=settle_and_record)
    return reserved


def test_a_large_job_that_gets_no_memory_goes_back_to_the_queue(make: Make) -> None:
    gateway = make(latency_ms=1 * SECOND)
    gateway.know(known_group("org", "a"))
    gateway.claude.upload_ms = 5 * MINUTE
    gateway.submit(*(a_job(f"job_{n}", request_bytes=LARGE) for n in range(5)))

    async def story() -> int:
        running = asyncio.create_task(gateway.invoke())
        await asyncio.sleep(2 * MINUTE // SECOND)
        waiting = gateway.worker.memory.waiting
        await running
        return waiting

    assert gateway.time.run(story()) in {0, 1}
    gateway.drain()
    assert 5 == len(gateway.claude.answered)
    assert {1} == {job.attempts_used for job in gateway.jobs.stored.values()}


def test_a_request_of_unknown_size_is_run_as_a_large_one(make: Make) -> None:
    gateway = make(a_job())
    gateway.jobs.stored["job_1"] = replace(gateway.job(), request_bytes=0)

    gateway.once()

    assert State.SUCCEEDED == gateway.job().state


# Killers -----------------------------------------------------------------------------------------------------


def test_a_job_no_worker_survives_takes_no_other_job_with_it(make: Make) -> None:
    gateway = make(latency_ms=MINUTE)
    gateway.know(known_group("org", "a"))
    gateway.know(known_group("org", "b"))
    innocent = [a_job(f"job_{n}", tenant="other") for n in range(20)]
    gateway.submit(a_job("job_killer", model="claude-b"), *innocent)

    gateway.time.run(_killed_by(gateway, "job_killer"))

    ends = Counter(gateway.job(job.job_id).state for job in innocent)
    assert {State.SUCCEEDED: 20} == ends
    killer = gateway.job("job_killer")
    assert killer.error is not None
    assert (State.ERRORED, "worker_lost") == (killer.state, killer.error.type)
    lost = [attempt.alone for attempt in killer.attempts]
    assert [False] * 4 + [True] * 3 == lost
    # Every call that a dead worker made is in the ledger.
    rows = [row for row in gateway.ledger.rows.values() if row.outcome == "worker_lost"]
    attempts = [each for job in gateway.jobs.stored.values() for each in job.attempts]
    assert len(rows) == sum(each.outcome is AttemptOutcome.LOST for each in attempts)


async def _killed_by(gateway: Gateway, job_id: str) -> None:
    """Invoke workers until all jobs have ended; one dies 5 s after it began to call for this job."""
    while not all(job.state.is_final for job in gateway.jobs.stored.values()):
        due = gateway.queue.next_visible()
        assert due is not None
        await asyncio.sleep(max(0, due - gateway.time.now()) / 1000)
        before = len(gateway.claude.calls)
        worker = asyncio.create_task(gateway.invoke(gateway.new_worker()))
        while not worker.done():
            await asyncio.sleep(1)
            began = [
                call.at for call in gateway.claude.calls[before:] if job_id.encode() in call.body
            ]
            if began and gateway.time.now() - began[0] >= 5 * SECOND:
                for task in asyncio.all_tasks() - {asyncio.current_task()}:
                    task.cancel()
                await asyncio.gather(worker, return_exceptions=True)


def test_jobs_lost_by_a_few_ordinary_kills_still_run_side_by_side(make: Make) -> None:
    gateway = make(latency_ms=10 * SECOND)
    gateway.know(known_group("org", "a"))
    for number in range(40):
        job = a_job(f"job_{number}")
        for turn in range(LOSSES_TO_SUSPECT - 1):
            at = NOON - 10 * MINUTE + turn
            job = claim(job, f"dead-{turn}", at, at)
        gateway.submit(job)

    gateway.once()

    assert 40 == len(gateway.claude.answered)
    assert gateway.claude.most_in_flight > 2 * FEW


def test_suspects_wait_for_the_others_and_healthy_jobs_do_not_wait_for_them(make: Make) -> None:
    gateway = make(latency_ms=20 * SECOND)
    gateway.know(known_group("org", "a"))
    suspect = a_job("job_suspect")
    for turn in range(LOSSES_TO_SUSPECT + 1):
        at = NOON - 10 * MINUTE + turn
        suspect = claim(suspect, f"dead-{turn}", at, at)
    gateway.submit(suspect, *(a_job(f"job_{n}") for n in range(30)))

    gateway.once()

    last = max(gateway.claude.calls, key=lambda call: call.at)
    assert b"job_suspect" in last.body
    others = max(call.at for call in gateway.claude.calls if call is not last)
    assert last.at >= others + 20 * SECOND
    assert gateway.job("job_suspect").attempts[-1].alone
    assert 31 == len(gateway.claude.answered)
    no_accident(gateway)
