"""What requests must look like, and how jobs, usage and limits are shown."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from sluice.api import requests, views
from sluice.domain.breakers import Breaker, pseudonym, refusals_circuit
from sluice.domain.errors import InvalidRequest, RequestTooLarge, Unauthenticated
from sluice.domain.jobs import JobError, Result, State, claim, give_up, snooze, succeed
from sluice.domain.limits import Observation, Seen, block, new_group, observe
from sluice.domain.pricing import Spend, Usage
from sluice.domain.workspaces import Workspace
from sluice.intake.accounts import UsageRow
from sluice.intake.admission import MOST_BYTES
from sluice.intake.submit import Submission
from tests.fakes import MESSAGE, NOON, SECOND, a_job

PARAMS: dict[str, Any] = {
    "model": "claude-a",
    "max_tokens": 64,
    "messages": [{"role": "user", "content": "Two and two?"}],
}


def read(**job: Any) -> Submission:
    submission = requests.read_submission({"params": PARAMS} | job)
    assert isinstance(submission, Submission), submission
    return submission


def complaint(job: object) -> str:
    error = requests.read_submission(job)
    assert isinstance(error, InvalidRequest)
    return str(error)


# Requests --------------------------------------------------------------------------------------------------


def test_a_job_nested_too_deeply_is_refused() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]

    assert "the request is nested too deeply: at most 100 levels" in complaint(
        {"params": PARAMS | {"system": deep}}
    )


@pytest.mark.parametrize(("levels", "is_taken"), [(99, True), (100, True), (101, False)])
def test_a_hundred_levels_are_not_too_deep(levels: int, *, is_taken: bool) -> None:
    deep: Any = {}
    for _ in range(levels - 3):
        deep = {"next": deep} if isinstance(deep, list) else [deep]
    job = {"params": PARAMS | {"system": deep}}

    assert is_taken == isinstance(requests.read_submission(job), Submission)


def test_a_job_needs_only_its_params() -> None:
    assert Submission(PARAMS) == read()


def test_a_job_may_say_more() -> None:
    submission = read(
        custom_id="row-1",
        deadline="2026-11-20T13:00:00+01:00",
        fallback_models=["claude-b"],
        metadata={"run": "7"},
        lane="live",
    )

    assert ("row-1", NOON, ("claude-b",)) == (
        submission.custom_id,
        submission.deadline,
        submission.fallback_models,
    )
    assert {"run": "7"} == submission.metadata


def test_params_go_on_as_they_were_sent() -> None:
    sent = {"unheard_of": {"deep": [1, None]}} | PARAMS | {"temperature": 1}

    submission = read(params=sent)

    assert sent == submission.params
    assert list(sent) == list(submission.params)


def test_stream_false_is_taken_and_left_out() -> None:
    assert PARAMS == read(params=PARAMS | {"stream": False}).params


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ({}, "params: Field required"),
        ([], "Input should be a valid dictionary"),
        ("text", "Input should be a valid dictionary (got 'text')"),
        (None, "Input should be a valid dictionary"),
        ({"params": {}}, "params.model: Field required"),
        ({"params": {"model": "a", "messages": [{}]}}, "params.max_tokens: Field required"),
        (
            {"params": PARAMS | {"max_tokens": "64"}},
            "params.max_tokens: Input should be a valid integer (got '64')",
        ),
        ({"params": PARAMS | {"max_tokens": -1}}, "should be greater than or equal to 0 (got -1)"),
        ({"params": PARAMS | {"max_tokens": 1.5}}, "params.max_tokens: "),
        ({"params": PARAMS | {"max_tokens": True}}, "params.max_tokens: "),
        ({"params": PARAMS | {"messages": []}}, "params.messages: "),
        ({"params": PARAMS | {"messages": "hi"}}, "params.messages: "),
        ({"params": PARAMS | {"messages": ["hi"]}}, "params.messages.0: "),
        ({"params": PARAMS | {"model": ""}}, "params.model: "),
        ({"params": PARAMS | {"stream": True}}, "params.stream: "),
        ({"params": PARAMS, "prams": {}}, "prams: Extra inputs are not permitted"),
        ({"params": PARAMS, "body": {}}, "body: Extra inputs are not permitted"),
        (
            {"params": PARAMS, "model": "claude-a"},
            "Unknown top-level field `model`; move it inside `params`.",
        ),
        (PARAMS, "Unknown top-level fields `model`, `max_tokens`, `messages`; move them inside"),
        (
            PARAMS | {"prams": {}},
            "move them inside `params`. params: Field required; prams: Extra inputs",
        ),
        (
            {"params": PARAMS, "custom_id": "no spaces"},
            "custom_id: String should match pattern '^[a-zA-Z0-9_-]{1,64}$' (got 'no spaces')",
        ),
        ({"params": PARAMS, "custom_id": "x" * 65}, "custom_id: "),
        ({"params": PARAMS, "custom_id": ""}, "custom_id: "),
        ({"params": PARAMS, "custom_id": 7}, "custom_id: "),
        ({"params": PARAMS, "deadline": "2026-11-20T13:00:00"}, "deadline: "),
        ({"params": PARAMS, "deadline": "soon"}, "(got 'soon')"),
        (
            {"params": PARAMS, "deadline": 5},
            "deadline: must be an RFC 3339 string with a time zone",
        ),
        # The year 10,000 in UTC: it could be stored and never be shown.
        ({"params": PARAMS, "deadline": "9999-12-31T23:59:59-14:00"}, "deadline: "),
        # Python reads more forms of a time than pydantic.
        ({"params": PARAMS, "deadline": "2099-W01-1T00:00:00Z"}, "such as 2026-12-24T18:00:00Z"),
        ({"params": PARAMS, "fallback_models": ["m"] * 6}, "fallback_models: "),
        ({"params": PARAMS, "metadata": {"k": 7}}, "metadata.k: "),
        ({"params": PARAMS, "metadata": {str(n): "" for n in range(17)}}, "metadata: "),
        (
            {"params": PARAMS, "lane": "batch"},
            "lane: is one for the whole list; set it beside `jobs` (got 'batch')",
        ),
    ],
)
def test_the_error_of_a_bad_job_says_where_and_why(job: object, words: str) -> None:
    assert words in complaint(job)


def test_many_mistakes_fit_one_line() -> None:
    text = complaint({"params": {}, **{f"odd{n}": n for n in range(9)}})

    assert "; and 7 more" in text
    assert "\n" not in text


def test_long_values_are_not_repeated() -> None:
    assert "x" * 65 not in complaint({"params": PARAMS, "custom_id": "x" * 65})


def test_one_job_or_a_list_of_them() -> None:
    assert requests.read_list({"params": PARAMS}) is None
    listed = requests.read_list({"jobs": [{"params": PARAMS}] * 2})
    assert listed is not None
    assert [{"params": PARAMS}] * 2 == listed.jobs


def test_a_bad_item_keeps_its_place() -> None:
    listed = requests.read_list({"jobs": [{"params": PARAMS}, {}, {"params": PARAMS}]})
    assert listed is not None

    kinds = [type(requests.read_submission(job)) for job in listed.jobs]

    assert [Submission, InvalidRequest, Submission] == kinds


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([], "must be a JSON object"),
        ("text", "must be a JSON object"),
        (None, "must be a JSON object"),
        ({"jobs": []}, "jobs: List should have at least 1 item"),
        ({"jobs": {}}, "jobs: Input should be a valid list"),
        ({"jobs": None}, "jobs: Input should be a valid list"),
        (
            {"jobs": [{"params": PARAMS}], "webhook": "w", "b": 1},
            "webhook: Extra inputs are not permitted (got 'w'); b: Extra inputs",
        ),
        # Also beside a list that runs as a batch.
        ({"jobs": [{"params": PARAMS}] * 101, "webhook": "w"}, "webhook: Extra inputs are not"),
    ],
)
def test_a_bad_envelope_is_refused_as_a_whole(body: object, words: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        requests.read_list(body)
    assert words in str(refused.value)


def test_the_gateways_own_errors_say_what_to_do() -> None:
    too_large = RequestTooLarge(5_000_000, MOST_BYTES)

    assert "the body has 5,000,000 bytes; the limit is 4,000,000. Send fewer" in str(too_large)
    assert (5_000_000, 4_000_000) == (too_large.size, too_large.limit)
    assert "send a valid one as `x-api-key` or `Authorization: Bearer`" in str(Unauthenticated())


# Answers ---------------------------------------------------------------------------------------------------


def test_times_are_rfc_3339_in_utc() -> None:
    assert "2026-11-20T12:00:00.007Z" == views.time(NOON + 7)
    assert views.time(None) is None


def test_a_new_job_is_shown_with_everything_there_will_be() -> None:
    view = views.job_view(a_job(custom_id="row-1", metadata={"run": "7"}))

    assert {"id": "job_1", "type": "job", "state": "queued", "custom_id": "row-1"} == {
        name: view[name] for name in ("id", "type", "state", "custom_id")
    }
    assert ("2026-11-20T12:00:00.000Z", None, None) == (
        view["created_at"],
        view["started_at"],
        view["finished_at"],
    )
    assert ([], None, None, None) == (
        view["attempts"],
        view["message"],
        view["text"],
        view["error"],
    )
    assert (0, {"run": "7"}, False) == (
        view["attempts_used"],
        view["metadata"],
        view["cancel_requested"],
    )


def test_a_finished_job_shows_its_answer_and_its_cost() -> None:
    job = succeed(
        claim(a_job(), "w", NOON, NOON + SECOND),
        "w",
        NOON + 500,
        result=Result(inline=b""),
        usage=Usage(input_tokens=7, output_tokens=3),
        cost_micro_usd=1_234,
        request_id="req_1",
    )

    view = views.job_view(job, MESSAGE)

    assert ("succeeded", 1_234, "0.001234") == (
        view["state"],
        view["cost_micro_usd"],
        view["cost_usd"],
    )
    assert "Four." == view["text"]
    assert 3 == view["usage"]["output_tokens"]
    (attempt,) = view["attempts"]
    assert (1, "claude-a", "succeeded", None, "req_1", 1_234) == (
        attempt["attempt"],
        attempt["model"],
        attempt["outcome"],
        attempt["error"],
        attempt["request_id"],
        attempt["cost_micro_usd"],
    )


def test_a_message_is_shown_value_for_value() -> None:
    message = '{"content":[{"type":"new","odd":[1.0,null,"ü"]}],"unheard_of":{"a":1e400}}'

    view = views.job_view(a_job(), message)

    assert {"type": "new", "odd": [1.0, None, "ü"]} == view["message"]["content"][0]
    assert "" == view["text"]


def test_errors_of_job_and_attempts_are_shown() -> None:
    error = JobError("api_error", "boom", 500)
    job = give_up(claim(a_job(), "w", NOON, NOON + SECOND), "w", NOON, error=error)

    view = views.job_view(job)

    assert {"type": "api_error", "message": "boom"} == view["error"]
    assert {"type": "api_error", "message": "boom", "status": 500} == view["attempts"][0]["error"]


def test_a_snoozed_job_says_why_and_until_when() -> None:
    claimed = claim(a_job(), "w", NOON, NOON + SECOND)
    job = snooze(claimed, "w", NOON, reason="rate limited", not_before=NOON + SECOND)

    view = views.job_view(job)

    assert {"at": "2026-11-20T12:00:00.000Z", "reason": "rate limited"} == view["last_snooze"]
    assert ("2026-11-20T12:00:01.000Z", 1) == (view["not_before"], view["snoozes"])


def test_a_running_attempt_is_shown_without_an_end() -> None:
    (attempt,) = views.job_view(claim(a_job(), "w", NOON, NOON + 1))["attempts"]

    assert (None, None, None) == (attempt["ended_at"], attempt["outcome"], attempt["usage"])


def test_a_summary_is_a_part_of_the_view() -> None:
    job = a_job()

    summary = views.job_summary(job)

    assert summary == {name: views.job_view(job)[name] for name in summary}
    assert not {"message", "attempts", "text"} & set(summary)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab"),
        ({"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]}, "a"),
        ({"content": [{"type": "tool_use", "input": {}}]}, ""),
        ({"content": []}, ""),
        ({"content": "odd"}, ""),
        ({"content": ["odd", {"type": "text"}]}, ""),
        ({}, ""),
    ],
)
def test_the_text_is_the_joined_text_blocks(message: dict[str, Any], text: str) -> None:
    assert text == views.joined_text(message)


def test_a_usage_report_adds_up() -> None:
    rows = [
        UsageRow({"day": "2026-11-19"}, Spend(1, 10, 1, 2, 20, 100)),
        UsageRow({"day": "2026-11-20"}, Spend(2, 5, 0, 0, 5, 1)),
    ]

    view = views.usage_view("2026-11-19", "2026-11-20", ["day"], rows)

    assert ("2026-11-19", "2026-11-20", ["day"]) == (view["from"], view["to"], view["group_by"])
    assert {
        "day": "2026-11-20",
        "calls": 2,
        "input_tokens": 5,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": 5,
        "cost_micro_usd": 1,
        "cost_usd": "0.000001",
        "known_cost_micro_usd": 1,
        "unknown_costs": 0,
        "uncertain_calls": 0,
    } == view["data"][1]
    assert (3, 15, 101, "0.000101") == (
        view["total"]["calls"],
        view["total"]["input_tokens"],
        view["total"]["cost_micro_usd"],
        view["total"]["cost_usd"],
    )


def test_an_empty_report_totals_nothing() -> None:
    assert 0 == views.usage_view("2026-11-20", "2026-11-20", [], [])["total"]["calls"]


# Limits ----------------------------------------------------------------------------------------------------


def test_a_limit_group_shows_what_it_believes() -> None:
    seen = Observation(
        NOON,
        {
            "requests": Seen(600, 100),
            "input_tokens": Seen(60_000, 10_000),
            "output_tokens": Seen(12_000, 2_000),
        },
    )
    group = observe(new_group("org", "a", NOON), seen, NOON)

    view = views.group_view(group, (), "acme", NOON)

    assert ("org/a", "org", "a", True) == (
        view["group"],
        view["organization"],
        view["model_group"],
        view["learned"],
    )
    assert {"requests": 600, "input_tokens": 60_000, "output_tokens": 12_000} == view["limits"]
    assert not {"level", "estimates", "blocked_by"} & view.keys(), "the load of all tenants"
    assert (1.0, None, None) == (
        view["rate_factor"],
        view["blocked_until"],
        view["blocked_reason"],
    )


def test_the_limits_of_an_unused_group_are_not_learned() -> None:
    assert not views.group_view(new_group("org", "a", NOON), (), "acme", NOON)["learned"]


def test_a_block_is_shown_while_it_lasts() -> None:
    group = block(new_group("org", "a", NOON), NOON + SECOND, "rate limited", NOON)

    during, after = (
        views.group_view(group, (), "acme", NOON),
        views.group_view(group, (), "acme", NOON + SECOND),
    )

    until = datetime.fromtimestamp(NOON / 1000 + 1, UTC).isoformat(timespec="milliseconds")
    assert (until.replace("+00:00", "Z"), "rate limited") == (
        during["blocked_until"],
        during["blocked_reason"],
    )
    assert during["rate_factor"] < 1.0
    assert (None, None) == (after["blocked_until"], after["blocked_reason"])


def test_a_group_shows_neither_the_models_of_others_nor_an_endpoint() -> None:
    circuits = {
        "model claude-a": Breaker(5, NOON + SECOND),
        "model claude-secret": Breaker(5, NOON + SECOND),
        "endpoint https://relay.example": Breaker(5, NOON + SECOND),
        "endpoint https://other.example": Breaker(5, NOON + SECOND, tenant=pseudonym("birch")),
        "endpoint https://third.example": Breaker(5, NOON + SECOND, model="claude-secret"),
        refusals_circuit("birch"): Breaker(5, NOON + SECOND),
        refusals_circuit("acme"): Breaker(5, NOON + SECOND),
    }
    workspaces = {
        "wrkspc_secret": Workspace(NOON + SECOND, "spend limit"),
        "wrkspc_past": Workspace(NOON),
    }
    group = replace(new_group("org", "a", NOON), circuits=circuits, workspaces=workspaces)

    view = views.group_view(group, {"claude-a"}, "acme", NOON)

    shown = [each["what"] for each in view["set_aside"]]
    assert ["endpoint", "model claude-a", "refusals", "workspace"] == shown


def test_every_state_has_a_word() -> None:
    assert {"queued", "running", "succeeded", "errored", "canceled", "expired"} == {
        state.value for state in State
    }
