"""What each failure means, kind by kind."""

from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.domain.jobs import JobError
from sluice.domain.refusals import Scope
from sluice.domain.retries import (
    UNSENDABLE,
    Effect,
    Failure,
    FallBack,
    GiveUp,
    Outcome,
    Retry,
    RetryPolicy,
    Snooze,
    Verdict,
    judge,
    next_month,
    overload_backoff_ms,
    retry_backoff_ms,
)
from tests.fakes import NOON, SECOND

POLICY = RetryPolicy(max_attempts=3)
OWN_LIMIT = "You have reached your specified API usage limits. You will regain access on 2026-12-01"
WORKSPACE_LIMIT = "You have reached your specified workspace API usage limits."


def verdict(  # noqa: PLR0913 - what judge asks
    failure: Failure,
    *,
    attempts_used: int = 1,
    snoozes: int = 0,
    has_fallback: bool = False,
    jitter: float = 0.5,
    policy: RetryPolicy = POLICY,
) -> Verdict:
    return judge(
        failure,
        now=NOON,
        attempts_used=attempts_used,
        snoozes=snoozes,
        has_fallback=has_fallback,
        jitter=jitter,
        policy=policy,
    )


def failed(
    status: int | None,
    error_type: str = "error",
    code: str | None = None,
    after_ms: int | None = None,
    message: str = "no",
) -> Failure:
    return Failure(error_type, message, status, error_code=code, retry_after_ms=after_ms)


KINDS: list[tuple[str, Failure, type[Outcome], Effect]] = [
    # The request itself is invalid: a retry would not help.
    ("bad request", failed(400, "invalid_request_error"), GiveUp, Effect.NONE),
    ("not found", failed(404, "not_found_error"), GiveUp, Effect.NONE),
    ("method", failed(405), GiveUp, Effect.NONE),
    ("gone", failed(410), GiveUp, Effect.NONE),
    ("too large", failed(413, "request_too_large"), GiveUp, Effect.NONE),
    ("unprocessable", failed(422), GiveUp, Effect.NONE),
    ("redirect", failed(302), GiveUp, Effect.NONE),
    ("not sendable", failed(None, UNSENDABLE), GiveUp, Effect.NONE),
    # The key is wrong: another one may do.
    ("unauthenticated", failed(401, "authentication_error"), Snooze, Effect.REJECT_KEY),
    ("forbidden", failed(403, "permission_error"), Snooze, Effect.REFUSED_TO_KEY),
    # Money: the group is blocked until a person acts.
    ("billing", failed(402, "billing_error"), Snooze, Effect.PARK_GROUP),
    ("on hold", failed(403, code="organization_on_hold"), Snooze, Effect.PARK_GROUP),
    ("spend cap", failed(429, code="enforced_spend_limit_reached"), Snooze, Effect.PARK_GROUP),
    ("contract cap", failed(429, code="contract_spend_limit_reached"), Snooze, Effect.PARK_GROUP),
    ("own spend limit", failed(400, message=OWN_LIMIT), Snooze, Effect.PARK_GROUP),
    ("workspace limit", failed(400, message=WORKSPACE_LIMIT), Snooze, Effect.PARK_GROUP),
    # Throttled: the whole group waits.
    ("rate limited", failed(429, "rate_limit_error", after_ms=7_000), Snooze, Effect.BLOCK_GROUP),
    ("429 without a time", failed(429, "rate_limit_error"), Snooze, Effect.BLOCK_GROUP),
    ("ramp", failed(429, code="ramp_limit_exceeded", after_ms=9_000), Snooze, Effect.RAMP_GROUP),
    # Everybody's overload.
    ("overloaded", failed(529, "overloaded_error"), Snooze, Effect.MODEL_OVERLOADED),
    ("overloaded midway", failed(None, "overloaded_error"), Snooze, Effect.MODEL_OVERLOADED),
    # May go better next time.
    ("timeout", failed(408), Retry, Effect.NONE),
    ("conflict", failed(409), Retry, Effect.NONE),
    ("too early", failed(425), Retry, Effect.NONE),
    # The same, and perhaps the endpoint does not work at all.
    ("server error", failed(500, "api_error"), Retry, Effect.ENDPOINT_FAILED),
    ("bad gateway", failed(502), Retry, Effect.ENDPOINT_FAILED),
    ("unavailable", failed(503), Retry, Effect.ENDPOINT_FAILED),
    ("gateway timeout", failed(504, "timeout_error"), Retry, Effect.ENDPOINT_FAILED),
    ("unheard of", failed(599), Retry, Effect.ENDPOINT_FAILED),
    ("connection lost", failed(None, "connection_error"), Retry, Effect.ENDPOINT_FAILED),
    # A long answer is not the fault of the endpoint.
    ("out of time", failed(None, "output_timeout"), Retry, Effect.NONE),
]


@pytest.mark.parametrize(
    ("failure", "outcome", "effect"),
    [pytest.param(*rest, id=name) for name, *rest in KINDS],
)
def test_every_kind_of_failure_has_its_meaning(
    failure: Failure, outcome: type[Outcome], effect: Effect
) -> None:
    given_verdict = verdict(failure)

    assert (outcome, effect) == (type(given_verdict.outcome), given_verdict.effect)


@pytest.mark.parametrize(
    "failure", [pytest.param(failure, id=name) for name, failure, outcome, _ in KINDS
                if outcome is Retry]
)  # fmt: skip
def test_retries_end_with_the_last_attempt(failure: Failure) -> None:
    assert isinstance(verdict(failure, attempts_used=2).outcome, Retry)
    assert isinstance(verdict(failure, attempts_used=3).outcome, GiveUp)


@pytest.mark.parametrize(
    "failure", [pytest.param(failure, id=name) for name, failure, outcome, _ in KINDS
                if outcome is Snooze]
)  # fmt: skip
def test_snoozes_never_end(failure: Failure) -> None:
    last = verdict(failure, attempts_used=3, snoozes=10_000)

    assert isinstance(last.outcome, Snooze)
    assert 0 < last.outcome.after_ms <= 15 * 60 * SECOND


def test_a_400_with_other_words_is_not_a_spend_limit() -> None:
    failure = failed(400, message="messages: You have reached your specified API usage limits")

    assert GiveUp() == verdict(failure).outcome


# Throttled -------------------------------------------------------------------------------------------------


def test_retry_after_is_a_floor_and_the_group_is_blocked_until_it() -> None:
    failure = failed(429, after_ms=7_000)

    sooner, later = verdict(failure, jitter=0.0), verdict(failure, jitter=0.999)

    snooze = Snooze(7_000, "rate limited")
    blocked = Verdict(snooze, Effect.BLOCK_GROUP, NOON + 7_000, scope=Scope.ACCOUNT)
    assert blocked == sooner
    assert isinstance(later.outcome, Snooze)
    assert 7_000 < later.outcome.after_ms < 7_000 + POLICY.throttle_spread_ms
    assert sooner.until == later.until


def test_a_429_that_names_no_time_waits_the_default() -> None:
    assert NOON + POLICY.default_retry_after_ms == verdict(failed(429)).until


# Overloaded ------------------------------------------------------------------------------------------------


def test_an_overload_moves_to_the_fallback_model_at_once() -> None:
    moved = verdict(failed(529, "overloaded_error"), has_fallback=True)

    assert Verdict(FallBack("overloaded"), Effect.MODEL_OVERLOADED) == moved


def test_only_an_overload_falls_back() -> None:
    others = [verdict(failure, has_fallback=True) for name, failure, _, _ in KINDS
              if not name.startswith("overloaded")]  # fmt: skip

    assert not any(isinstance(each.outcome, FallBack) for each in others)


# Money -----------------------------------------------------------------------------------------------------


def test_the_tiers_cap_rests_until_next_month() -> None:
    parked = verdict(failed(429, code="enforced_spend_limit_reached"))

    assert next_month(NOON) == parked.until


@pytest.mark.parametrize(
    "failure",
    [failed(402), failed(400, message=OWN_LIMIT), failed(429, code="contract_spend_limit_reached")],
)
def test_other_money_problems_are_checked_again(failure: Failure) -> None:
    """They end when a person acts."""
    assert NOON + POLICY.spend_recheck_ms == verdict(failure).until


@pytest.mark.parametrize(
    ("now", "first"),
    [
        ("2026-11-20T12:00:00", "2026-12-01"),
        # December: the year turns with the month.
        ("2026-12-01T00:00:00", "2027-01-01"),
        ("2026-12-31T23:59:59.999", "2027-01-01"),
        # The last days of long and short months.
        ("2027-01-31T23:59:59", "2027-02-01"),
        ("2027-02-28T23:59:59", "2027-03-01"),
        ("2028-02-29T12:00:00", "2028-03-01"),
        ("2027-03-31T00:00:00", "2027-04-01"),
    ],
)
def test_next_month_begins_on_the_first_at_midnight_utc(now: str, first: str) -> None:
    moment = int(datetime.fromisoformat(now).replace(tzinfo=UTC).timestamp() * 1000)

    reset = datetime.fromtimestamp(next_month(moment) / 1000, UTC)

    assert f"{first}T00:00:00+00:00" == reset.isoformat()


# Output that cannot end ------------------------------------------------------------------------------------


def test_an_answer_cut_off_by_a_short_window_gets_a_whole_one() -> None:
    outcome = verdict(failed(None, "output_timeout")).outcome

    assert isinstance(outcome, Retry)
    assert outcome.full_window


def test_an_answer_too_long_for_a_whole_window_is_not_retried() -> None:
    failure = Failure("output_timeout", "too long", had_full_window=True)

    assert Verdict(GiveUp()) == verdict(failure)


def test_other_retries_ask_for_no_whole_window() -> None:
    outcome = verdict(failed(500)).outcome

    assert isinstance(outcome, Retry)
    assert not outcome.full_window


# Backoff ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attempts_used", "ceiling_seconds"), [(1, 2), (2, 4), (3, 8), (8, 256), (9, 300), (500, 300)]
)
def test_a_retry_waits_up_to_a_ceiling_that_doubles(
    attempts_used: int, ceiling_seconds: int
) -> None:
    longest = retry_backoff_ms(attempts_used, failed(500), 0.999_999_9, RetryPolicy())

    assert ceiling_seconds * SECOND - 1 == longest


@pytest.mark.parametrize(
    ("snoozes", "ceiling_seconds"), [(0, 1), (1, 2), (5, 32), (8, 256), (9, 300), (10**9, 300)]
)
def test_an_overload_waits_up_to_a_ceiling_that_doubles(snoozes: int, ceiling_seconds: int) -> None:
    longest = overload_backoff_ms(snoozes, failed(529), 0.999_999_9, RetryPolicy())

    assert ceiling_seconds * SECOND - 1 == longest


@settings(deadline=None, derandomize=True)
@given(
    turn=st.integers(0, 60),
    jitter=st.floats(0, 1, exclude_max=True),
    after_ms=st.none() | st.integers(1, 600_000),
)
def test_every_wait_lies_between_its_floor_and_its_ceiling(
    turn: int, jitter: float, after_ms: int | None
) -> None:
    policy = RetryPolicy()
    failure = failed(500, after_ms=after_ms)

    waits = (
        retry_backoff_ms(turn, failure, jitter, policy),
        overload_backoff_ms(turn, failure, jitter, policy),
    )

    for wait in waits:
        assert (after_ms or policy.floor_ms) <= wait <= max(after_ms or 0, 300_000)


def test_the_error_kept_with_an_attempt_is_anthropics() -> None:
    assert JobError("api_error", "boom", 500) == failed(500, "api_error", message="boom").error
