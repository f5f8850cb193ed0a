"""The table of upstream refusals, with every message known from the field: whose trouble it is, and what follows."""

import re
from pathlib import Path

import pytest

from sluice.domain.refusals import TABLE, Consequence, Scope
from sluice.domain.retries import (
    Effect,
    Failure,
    GiveUp,
    Outcome,
    Retry,
    RetryPolicy,
    Snooze,
    Verdict,
    judge,
    meaning,
    refused_alike,
)
from tests.fakes import NOON, SECOND

ORGANIZATION, WORKSPACE, ACCOUNT, KEY = (
    Scope.ORGANIZATION,
    Scope.WORKSPACE,
    Scope.ACCOUNT,
    Scope.KEY,
)
REQUEST, MODEL, ENDPOINT = Scope.REQUEST, Scope.MODEL, Scope.ENDPOINT
WAIT, PARK, RETRY, END = Consequence.WAIT, Consequence.PARK, Consequence.RETRY, Consequence.END


def verdict(failure: Failure) -> Verdict:
    return judge(
        failure, now=NOON, attempts_used=1, snoozes=0, has_fallback=False, jitter=0.5,
        policy=RetryPolicy(),
    )  # fmt: skip


FIELD: list[tuple[int, str, Scope, Consequence]] = [
    # No credit, and limits on spend. Sources: reports of users, Anthropic's pages, its SDK.
    (400, "Your credit balance is too low to access the Anthropic API.", ORGANIZATION, PARK),
    (400, "Your credit balance is too low.", ORGANIZATION, PARK),
    (403, "Credit balance is too low", ORGANIZATION, PARK),
    (400, "You have reached your specified API usage limits. More on 2026-12-01.", ORGANIZATION, PARK),
    (400, "You have reached your specified workspace API usage limits. More on 2026-12-01.", WORKSPACE, PARK),
    (429, "You have reached your API usage limits.", ACCOUNT, PARK),
    (402, "There is a problem with your payment information.", ACCOUNT, PARK),
    (400, "You're out of extra usage. Add more at claude.ai/settings/usage and keep going.", ACCOUNT, PARK),
    (402, "Insufficient credits", ACCOUNT, PARK),
    (429, "You exceeded your current quota, please check your plan and billing details.", ACCOUNT, PARK),
    # The account.
    (400, "This organization has been disabled.", ORGANIZATION, PARK),
    (401, "This organization has been disabled.", ORGANIZATION, PARK),
    (403, "Your organization has been suspended.", ORGANIZATION, PARK),
    (403, "Your account has been temporarily suspended.", ORGANIZATION, PARK),
    (403, "This workspace has been archived.", WORKSPACE, PARK),
    (403, "Your organization does not have access to Claude.", ORGANIZATION, PARK),
    (403, "Your organization does not have access to Claude. Please login again.", ORGANIZATION, PARK),
    # What a request asks for is its own trouble, although the organization has no access to it.
    (403, "Your organization does not have access to the computer-use-2026-01-01 beta.", KEY, END),
    (400, "This organization does not have permission to use fast mode.", REQUEST, END),
    (404, "Your account does not have access to Claude Mythos 5.", REQUEST, END),
    (403, "OAuth authentication is currently not allowed for this organization.", ORGANIZATION, PARK),
    (403, "Access to Anthropic models is not allowed from unsupported countries or regions.", ORGANIZATION, PARK),
    (400, "Outbound web identity federation is disabled for your account", ORGANIZATION, PARK),
    (404, "Model use case details have not been submitted for this account.", ORGANIZATION, PARK),
    # The key.
    (401, "invalid x-api-key", KEY, PARK),
    (401, "This API key has been disabled.", KEY, PARK),
    (403, "Your API key does not have permission to use the specified resource.", KEY, END),
    # Limits that refill.
    (429, "This request would exceed your organization's rate limit of 400,000 input tokens.", ORGANIZATION, WAIT),
    (429, "This request would exceed the rate limit for your organization (1f0e) of 40,000.", ORGANIZATION, WAIT),
    (429, "This request would exceed your workspace's rate limit of 60 requests per minute.", WORKSPACE, WAIT),
    (429, "This request would exceed your account's rate limit. Please try again later.", ACCOUNT, WAIT),
    (429, "Number of request tokens has exceeded your daily rate limit", ACCOUNT, WAIT),
    (429, "Number of concurrent connections has exceeded your rate limit.", ACCOUNT, WAIT),
    (429, "This request would exceed your organization's limit of 200,000 batch requests in the processing queue.",
     ORGANIZATION, WAIT),
    (429, "Too many tokens, please wait before trying again.", ACCOUNT, WAIT),
    (529, "Overloaded", MODEL, WAIT),
    # The request.
    (429, "Extra usage is required for long context requests.", REQUEST, END),
    (400, "The long context beta is not yet available for this subscription.", REQUEST, END),
    (413, "Request exceeds the maximum size", REQUEST, END),
    (400, "messages.0.content: Input should be a valid list", REQUEST, END),
    (400, "messages.1.content.0.image.source.base64.data: image exceeds 5 MB maximum", REQUEST, END),
    (400, "max_tokens: 300000 > 128000, which is the maximum allowed number of output tokens", REQUEST, END),
    (400, "tools.0.custom.input_schema: JSON schema is invalid", REQUEST, END),
    (400, "metadata.user_id: must be a string", REQUEST, END),
    (400, "prompt is too long: 204643 tokens > 200000 maximum", REQUEST, END),
    (400, "input length and `max_tokens` exceed context limit: 199999 + 9000 > 200000", REQUEST, END),
    (400, "Output blocked by content filtering policy", REQUEST, END),
    (400, "Could not process image", REQUEST, END),
    (400, "Unable to download the file. Please verify the URL and try again.", REQUEST, END),
    (400, "This model does not support assistant message prefill.", REQUEST, END),
    (400, "`temperature` is deprecated for this model.", REQUEST, END),
    (400, "Unexpected value(s) `foo` for the `anthropic-beta` header.", REQUEST, END),
    (400, "Thinking may not be enabled when tool_choice forces tool use.", REQUEST, END),
    (404, "model: claude-nobody", REQUEST, END),
    (422, "body.max_tokens: field required", REQUEST, END),
    # Upstream itself, and what is in between.
    (408, "Request timeout", REQUEST, RETRY),
    (409, "conflict", REQUEST, RETRY),
    (500, "Internal server error", ENDPOINT, RETRY),
    (502, "Bad Gateway", ENDPOINT, RETRY),
    (503, "no healthy upstream", ENDPOINT, RETRY),
    (504, "Gateway timeout", ENDPOINT, RETRY),
]  # fmt: skip


@pytest.mark.parametrize(("status", "message", "scope", "consequence"), FIELD)
def test_every_message_known_from_the_field_has_its_meaning(
    status: int, message: str, scope: Scope, consequence: Consequence
) -> None:
    row = meaning(Failure("error", message, status))

    assert (scope, consequence, True) == (row.scope, row.consequence, row.is_known)


@pytest.mark.parametrize(
    ("code", "scope"),
    [
        *((code, ORGANIZATION) for code in (
            "enforced_spend_limit_reached", "contract_spend_limit_reached",
            "linked_organization_spend_limit_reached", "linked_organization_billing_unavailable",
            "organization_on_hold", "cmek_key_disabled", "cmek_key_unreachable",
            "cmek_key_network_blocked",
        )),
        ("insufficient_quota", ACCOUNT),
        ("ramp_limit_exceeded", ORGANIZATION),
    ],
)  # fmt: skip
@pytest.mark.parametrize("status", [400, 403, 429, 503])
def test_a_code_counts_more_than_the_status(status: int, code: str, scope: Scope) -> None:
    row = meaning(Failure("error", "in new words", status, error_code=code))

    assert row.scope is scope
    assert row.consequence is (WAIT if code == "ramp_limit_exceeded" else PARK)


@pytest.mark.parametrize(
    "message",
    [
        "messages.0.content: Input should be a valid list, input was: This organization has been disabled.",
        "metadata: Your credit balance is too low to access the Anthropic API.",
        "max_tokens: You have reached your specified API usage limits",
    ],
)
def test_a_message_that_quotes_the_request_parks_nobody(message: str) -> None:
    given_verdict = verdict(Failure("invalid_request_error", message, 400))

    assert Verdict(GiveUp()) == given_verdict


@pytest.mark.parametrize(
    ("failure", "outcome", "effect"),
    [
        # A 429 that never passes: only when upstream says so, and names no time.
        (Failure("rate_limit_error", "no", 429, should_retry=False), GiveUp, Effect.NONE),
        (Failure("rate_limit_error", "no", 429, should_retry=True), Snooze, Effect.BLOCK_GROUP),
        (Failure("rate_limit_error", "no", 429, retry_after_ms=9, should_retry=False), Snooze, Effect.BLOCK_GROUP),
        (Failure("overloaded_error", "no", 529, should_retry=False), Snooze, Effect.MODEL_OVERLOADED),
        (Failure("error", "no", 400, should_retry=True), Retry, Effect.NONE),
        (Failure("error", "no", 400, should_retry=False), GiveUp, Effect.NONE),
    ],
)  # fmt: skip
def test_x_should_retry_decides_where_the_status_does_not(
    failure: Failure, outcome: type[Outcome], effect: Effect
) -> None:
    given_verdict = verdict(failure)

    assert (outcome, effect) == (type(given_verdict.outcome), given_verdict.effect)


@pytest.mark.parametrize(
    "failure",
    [
        Failure("invalid_request_error", "Words nobody has seen before.", 400),
        Failure("invalid_request_error", "litellm.BadRequestError: AnthropicException - credit", 400),
        Failure("invalid_request_error", "error: the account is in arrears", 400),
        Failure("rate_limit_error", "never again", 429, should_retry=False),
        Failure("permission_error", "Request not allowed", 403),
        Failure("not_found_error", "404 page not found", 404),
        Failure("api_error", "Moved", 307),
    ],
)  # fmt: skip
def test_what_is_known_by_its_status_only_is_a_guess(failure: Failure) -> None:
    assert not verdict(failure).is_known


def test_a_refusal_that_several_jobs_met_uses_no_attempt() -> None:
    outcome = refused_alike(RetryPolicy()).outcome

    assert isinstance(outcome, Snooze)
    assert outcome.after_ms >= 30 * SECOND


def test_a_blocked_group_waits_at_least_as_long_as_upstream_says() -> None:
    hour = 3_600 * SECOND
    parked = verdict(Failure("billing_error", "no", 402, retry_after_ms=hour))

    assert (Effect.PARK_GROUP, NOON + hour) == (parked.effect, parked.until)


def test_every_row_can_be_met_and_the_last_one_fits_everything() -> None:
    """A row behind a wider one would never count."""
    met = {id(meaning(Failure("error", message, status))) for status, message, _, _ in FIELD}
    met |= {
        id(meaning(Failure(kind, "no", 418, error_code=code, should_retry=retry)))
        for row in TABLE
        for kind in (*row.types, "error")
        for code in (*row.codes, None)
        for retry in (row.should_retry, None)
    }
    met |= {
        id(meaning(Failure("error", "no", status, should_retry=retry)))
        for status in (403, 429)
        for retry in (False, None)
    }

    assert [] == [row for row in TABLE if id(row) not in met]
    assert (None, frozenset()) == (TABLE[-1].begins, TABLE[-1].statuses)


def test_no_pattern_takes_long_on_a_long_message() -> None:
    """Messages are cut to 2,000 characters; hostile ones must not take long either."""
    for text in ("a" * 2_000, "a." * 1_000, "[0]" * 600, "this organization " * 100, "`" * 2_000):
        for row in TABLE:
            if row.begins is not None:
                re.match(row.begins, text, re.IGNORECASE)


def test_the_documents_show_the_table() -> None:
    page = Path("docs/reliability.md").read_text(encoding="utf-8")

    for reason in {row.reason for row in TABLE}:
        assert f"| {reason} |" in page
