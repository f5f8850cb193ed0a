"""The Messages API adapter: the official SDK against the simulator, and against upstreams no simulator would play."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scripts.claude_simulator import Running, read, running
from sluice.adapters.claude import STREAM_FROM_TOKENS, SdkClaude, arguments
from sluice.adapters.claude_answers import limit_headers
from sluice.adapters.claude_bodies import addressed
from sluice.adapters.system import SystemClock
from sluice.domain.keys import UpstreamKey
from sluice.domain.limits import Seen
from sluice.domain.pricing import Usage
from sluice.domain.retries import ANSWER_TOO_LARGE, UNSENDABLE
from sluice.ports.claude import Answer, Body, CallRequest, Headers, Refused
from sluice.worker.memory import BUDGET
from tests.fakes import NOON, SECOND

KEY: Final = "sk-ant-test-one"
VERSION: Final = "2026-10-21"
FAST: Final = {"ttft_seconds": 0, "tokens_per_second": None}
NO_LIMITS: Final = {"default": {"rpm": None, "itpm": None, "otpm": None}}
WAYS: Final = pytest.mark.parametrize("streamed", [False, True], ids=["in one piece", "streamed"])


@pytest.fixture(scope="module")
def claude() -> Iterator[Running]:
    organization = {"id": "org-one", "keys": [KEY], "limits": NO_LIMITS}
    with running(read({"service": FAST, "organisations": [organization]})) as started:
        yield started


@pytest.fixture
async def sdk() -> AsyncIterator[SdkClaude]:
    adapter = SdkClaude(SystemClock())
    yield adapter
    await adapter.close()


def params(marker: str | None = None, **more: Any) -> dict[str, Any]:
    metadata = {} if marker is None else {"metadata": {"user_id": f"sim:{marker}"}}
    messages = [{"role": "user", "content": "How high is the water?"}]
    asked = {"model": "claude-opus-5", "max_tokens": 200, "messages": messages}
    return asked | metadata | more


def request(
    url: str, asked: dict[str, Any], *, streamed: bool = False, window_ms: int = 20_000
) -> CallRequest:
    return CallRequest(
        key=UpstreamKey("main", KEY, base_url=url),
        model=asked["model"],
        body=Body(json.dumps(asked).encode()),
        anthropic_version=VERSION,
        anthropic_beta=None,
        # What decides about streaming; what goes up is what is in the params.
        max_tokens=STREAM_FROM_TOKENS if streamed else 200,
        window_ms=window_ms,
        full_window=False,
    )


def sent_by(claude: Running, asked: dict[str, Any]) -> dict[str, Any]:
    """Return what the simulator answers to plain HTTP, and make it answer the same once more."""
    headers = {"x-api-key": KEY, "anthropic-version": VERSION}
    httpx.post(f"{claude.url}/_simulator/reset", json={})
    sent: dict[str, Any] = httpx.post(
        f"{claude.url}/v1/messages", json=asked, headers=headers
    ).json()
    httpx.post(f"{claude.url}/_simulator/reset", json={})
    return sent


def answered(outcome: Answer | Refused) -> Answer:
    assert isinstance(outcome, Answer), outcome
    return outcome


def refused(outcome: Answer | Refused) -> Refused:
    assert isinstance(outcome, Refused), outcome
    return outcome


# Answers -------------------------------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize(
    "asked",
    [
        params(),
        params("tokens=1"),
        params("thinking"),
        params("redacted_thinking"),
        params("refusal"),
        params("tool_use", tools=[{"name": "gauge", "input_schema": {"type": "object"}}]),
        params("input=5000,cache_read=4000,cache_creation=500"),
        params("tokens=500", max_tokens=20),
    ],
    ids=["text", "short", "thinking", "redacted", "refusal", "tool", "cached", "truncated"],
)
async def test_the_answer_is_what_claude_sent_value_for_value(
    claude: Running, sdk: SdkClaude, asked: dict[str, Any], *, streamed: bool
) -> None:
    sent = sent_by(claude, asked)

    answer = answered(await sdk.send(request(claude.url, asked, streamed=streamed)))

    assert json.loads(answer.message) == sent
    assert answer.usage == Usage.from_message(sent["usage"])
    assert answer.stop_reason == sent["stop_reason"]


@WAYS
async def test_an_answer_names_its_request_the_organization_and_what_is_left(
    sdk: SdkClaude, *, streamed: bool
) -> None:
    limits = {"default": {"rpm": 60, "itpm": 100_000, "otpm": 20_000}}
    organization = {"id": "org-two", "keys": [KEY], "limits": limits}
    with running(read({"service": FAST, "organisations": [organization]})) as claude:
        answer = answered(await sdk.send(request(claude.url, params(), streamed=streamed)))

    assert (answer.request_id or "").startswith("req_")
    assert answer.headers.organization == "org-two"
    left = answer.headers.seen["requests"]
    assert (60, 59) == (left.limit, left.remaining)
    # One request of sixty a minute is back within a second.
    assert left.full_in_ms is not None
    assert 0 <= left.full_in_ms <= 2 * SECOND
    assert set(answer.headers.seen) == {"requests", "input_tokens", "output_tokens"}


async def test_early_headers_are_reported_before_the_answer(sdk: SdkClaude) -> None:
    """A first answer may take minutes, and the limits are unknown before."""
    reported: list[Headers | str] = []
    limits = {"default": {"rpm": 60, "itpm": 100_000, "otpm": 20_000}}
    organization = {"id": "org-two", "keys": [KEY], "limits": limits}
    with running(read({"service": FAST, "organisations": [organization]})) as claude:
        asked = request(claude.url, params("tokens=150,tps=300"))

        answer = answered(await sdk.send(replace(asked, early=True, on_headers=reported.append)))
        reported.append(answer.message)

    early, late = reported
    assert isinstance(early, Headers)
    assert answer.message == late
    assert "org-two" == early.organization
    assert (60, 59) == (early.seen["requests"].limit, early.seen["requests"].remaining)
    assert answer.usage is not None
    assert 150 == answer.usage.output_tokens


async def test_a_refusal_reports_no_headers_early(claude: Running, sdk: SdkClaude) -> None:
    reported: list[Headers] = []
    asked = request(claude.url, params("429,retry_after=7"))

    outcome = refused(await sdk.send(replace(asked, early=True, on_headers=reported.append)))

    assert ([], "org-one") == (reported, outcome.headers.organization)


@pytest.mark.parametrize(
    ("reset", "full_in_ms"),
    [
        ("2026-11-20T12:01:30Z", 90 * SECOND),
        ("2026-11-20T13:00:00+01:00", 0),
        ("2026-11-20T12:00:00.250Z", 250),
        # No times: in the past, days away, of no place on earth, or none at all.
        ("2026-11-20T11:59:59Z", None),
        ("2026-11-30T12:00:00Z", None),
        ("2026-11-20T12:01:30", None),
        ("in a minute", None),
        ("", None),
        (None, None),
    ],
)
def test_the_time_until_a_bucket_is_full_is_read_from_its_reset(
    reset: str | None, full_in_ms: int | None
) -> None:
    prefix = "anthropic-ratelimit-output-tokens"
    headers = {f"{prefix}-limit": "8000", f"{prefix}-remaining": "0"}
    if reset is not None:
        headers[f"{prefix}-reset"] = reset

    read_as = limit_headers(headers, NOON)

    assert Headers(None, {"output_tokens": Seen(8_000, 0, full_in_ms)}) == read_as


async def test_connections_are_kept_between_calls(sdk: SdkClaude) -> None:
    async with upstream(lambda _: json_response(MESSAGE)) as odd:
        for _ in range(3):
            answered(await sdk.send(request(odd.url, params())))

    assert (3, 1) == (len(odd.requests), odd.connections)


# Refusals ------------------------------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize(
    ("marker", "status", "kind", "code", "retry_after_ms"),
    [
        ("429,retry_after=7", 429, "rate_limit_error", None, 7_000),
        ("429,retry_after=0", 429, "rate_limit_error", None, None),
        ("ramp", 429, "rate_limit_error", "ramp_limit_exceeded", 5_000),
        ("spend_cap", 429, "rate_limit_error", "enforced_spend_limit_reached", None),
        ("contract_cap", 429, "rate_limit_error", "contract_spend_limit_reached", None),
        ("on_hold", 400, "invalid_request_error", "organization_on_hold", None),
        ("400", 400, "invalid_request_error", None, None),
        ("401", 401, "authentication_error", None, None),
        ("402", 402, "billing_error", None, None),
        ("403", 403, "permission_error", None, None),
        ("404", 404, "not_found_error", None, None),
        ("409", 409, "conflict_error", None, None),
        ("413", 413, "request_too_large", None, None),
        ("500", 500, "api_error", None, None),
        ("503", 503, "api_error", None, None),
        ("504", 504, "timeout_error", None, None),
        ("529,retry_after=3", 529, "overloaded_error", None, 3_000),
    ],
)
async def test_an_error_keeps_the_words_of_the_api(  # noqa: PLR0913, PLR0917 - a row of a table
    claude: Running,
    sdk: SdkClaude,
    marker: str,
    status: int,
    kind: str,
    code: str | None,
    retry_after_ms: int | None,
    streamed: bool,  # noqa: FBT001
) -> None:
    outcome = refused(await sdk.send(request(claude.url, params(marker), streamed=streamed)))

    failure = outcome.failure
    assert (status, kind, code) == (failure.status, failure.type, failure.error_code)
    assert failure.retry_after_ms == retry_after_ms
    assert failure.message
    assert (failure.request_id or "").startswith("req_")
    assert (failure.usage, failure.may_be_billed) == (None, False)
    assert outcome.headers.organization == "org-one"


async def test_a_429_of_a_bucket_shows_what_the_bucket_holds(sdk: SdkClaude) -> None:
    limits = {"default": {"rpm": 1, "itpm": 100_000, "otpm": 20_000}}
    organization = {"id": "org-one", "keys": [KEY], "limits": limits}
    with running(read({"service": FAST, "organisations": [organization]})) as claude:
        await sdk.send(request(claude.url, params()))
        outcome = refused(await sdk.send(request(claude.url, params())))

    assert outcome.failure.status == 429
    assert 0 < (outcome.failure.retry_after_ms or 0) <= 60_000
    left = outcome.headers.seen["requests"]
    assert (1, 0) == (left.limit, left.remaining)
    assert 0 < (left.full_in_ms or 0) <= 61 * SECOND


async def test_an_error_inside_a_stream_is_the_error_it_names(
    claude: Running, sdk: SdkClaude
) -> None:
    outcome = refused(await sdk.send(request(claude.url, params("sse_error"), streamed=True)))

    failure = outcome.failure
    assert (529, "overloaded_error") == (failure.status, failure.type)
    assert failure.usage is not None
    assert failure.usage.input_tokens > 0
    assert failure.may_be_billed
    assert "requests" not in outcome.headers.seen  # this organization has no limits to show
    assert outcome.headers.organization == "org-one"


@WAYS
@pytest.mark.parametrize("marker", ["drop_before_billing", "drop_after_billing"])
async def test_a_connection_that_dies_may_have_been_billed(
    claude: Running, sdk: SdkClaude, marker: str, *, streamed: bool
) -> None:
    """It cannot be seen from outside whether a dropped request was served."""
    outcome = refused(await sdk.send(request(claude.url, params(marker), streamed=streamed)))

    failure = outcome.failure
    assert ("connection_error", None) == (failure.type, failure.status)
    assert failure.may_be_billed


@WAYS
@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://", "nonsense://there"])
async def test_a_connection_that_was_never_made_is_not_billed(
    sdk: SdkClaude, url: str, *, streamed: bool
) -> None:
    outcome = refused(await sdk.send(request(url, params(), streamed=streamed)))

    assert "connection_error" == outcome.failure.type
    assert not outcome.failure.may_be_billed


async def test_a_call_that_outlasts_its_window_is_ended(claude: Running, sdk: SdkClaude) -> None:
    asked = request(
        claude.url, params("tokens=6000,tps=100", max_tokens=8192), streamed=True, window_ms=700
    )

    outcome = refused(await sdk.send(replace(asked, full_window=True)))

    failure = outcome.failure
    assert ("output_timeout", None) == (failure.type, failure.status)
    assert failure.may_be_billed
    assert failure.had_full_window


@WAYS
async def test_silence_is_no_long_answer(sdk: SdkClaude, *, streamed: bool) -> None:
    """A connection that died without a word gets another attempt, even after a whole window."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    asked = request(url, params(), streamed=streamed, window_ms=200)

    failure = refused(await sdk.send(replace(asked, full_window=True))).failure
    server.close()

    assert ("output_timeout", None, True) == (failure.type, failure.status, failure.may_be_billed)
    assert not failure.had_full_window
    assert failure.usage is None


@pytest.mark.parametrize(
    ("max_tokens", "streamed", "seconds"),
    [(10, False, 120.7), (3_000, False, 320), (8_191, False, 666), (64_000, True, 120)],
)
def test_how_long_a_connection_may_be_silent(
    max_tokens: int, seconds: float, *, streamed: bool
) -> None:
    asked = replace(request("http://127.0.0.1:1", params()), max_tokens=max_tokens)

    timeout = arguments(replace(asked, window_ms=840_000), stream=streamed)["timeout"]

    assert seconds == pytest.approx(timeout.read, abs=0.1)


async def test_what_a_stream_produced_before_its_window_ended_is_counted(
    claude: Running, sdk: SdkClaude
) -> None:
    asked = params("tokens=6000,tps=1000", max_tokens=8192)

    outcome = refused(await sdk.send(request(claude.url, asked, streamed=True, window_ms=700)))

    failure = outcome.failure
    assert "output_timeout" == failure.type
    assert failure.usage is not None
    assert failure.usage.input_tokens > 0
    assert 50 < failure.usage.output_tokens < 6000
    assert not failure.had_full_window
    assert (failure.request_id or "").startswith("req_")
    assert outcome.headers.organization == "org-one"


# What goes up --------------------------------------------------------------------------------------------------


@WAYS
async def test_the_request_goes_up_as_it_was_sent_to_us(
    sdk: SdkClaude, monkeypatch: pytest.MonkeyPatch, *, streamed: bool
) -> None:
    """Under its key and no other credential, whatever the environment offers to the SDK."""
    monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", "sk-ant-test-of-the-environment")
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-test-of-the-environment")
    asked = params(
        temperature=0.25,
        stop_sequences=["é", "💧"],
        field_of_next_year={"on": True, "off": None, "n": 1.5},
    )
    async with upstream(lambda _: response_of(MESSAGE, streamed=streamed)) as odd:
        sent = replace(
            request(odd.url, asked, streamed=streamed),
            model="claude-haiku-4-5",
            anthropic_version="2023-06-01",
            anthropic_beta="one-2026-01-01,two-2026-02-02",
        )
        answered(await sdk.send(sent))

    (seen,) = odd.requests
    assert [KEY] == seen.values("x-api-key")
    assert [] == seen.values("authorization")
    assert ["2023-06-01"] == seen.values("anthropic-version")
    assert ["one-2026-01-01,two-2026-02-02"] == seen.values("anthropic-beta")
    assert ("POST", "/v1/messages") == (seen.method, seen.path)
    streaming = {"stream": True} if streamed else {}
    assert {**asked, "model": "claude-haiku-4-5", **streaming} == json.loads(seen.body)


async def test_no_beta_header_goes_up_when_the_caller_sent_none(sdk: SdkClaude) -> None:
    async with upstream(lambda _: json_response(MESSAGE)) as odd:
        answered(await sdk.send(request(odd.url, params())))

    assert [] == odd.requests[0].values("anthropic-beta")


async def test_a_failed_call_is_not_repeated_by_the_sdk(sdk: SdkClaude) -> None:
    headers = "retry-after: 0\r\nx-should-retry: true\r\n"
    async with upstream(lambda _: json_response({}, status=500, headers=headers)) as odd:
        refused(await sdk.send(request(odd.url, params())))

    assert 1 == len(odd.requests)


# Odd upstreams -------------------------------------------------------------------------------------------------

MESSAGE: Final[dict[str, Any]] = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-opus-5",
    "content": [
        {"type": "thinking", "thinking": "Hm.", "signature": "EuYB"},
        {"type": "text", "text": "Wässrig 💧", "citations": [{"type": "page", "page": 1}]},
        {"type": "tool_use", "id": "toolu_1", "name": "gauge", "input": {"deep": [1, {"x": None}]}},
        {"type": "tool_use", "id": "toolu_2", "name": "nothing", "input": {}},
        {"type": "block_of_next_year", "colour": "blue", "depth": 2.5, "sub": {"a": None}},
        {"type": "compaction", "content": "a summary"},
    ],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "container": {"id": "container_1"},
    "context_management": {"applied_edits": []},
    "field_of_next_year": [1, 2.0, None],
    "usage": {
        "input_tokens": 10,
        "output_tokens": 20,
        "cache_read_input_tokens": 5,
        "iterations": [{"type": "compaction", "input_tokens": 100, "output_tokens": 7}],
        "tokens_of_next_year": 3,
    },
}


def events_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """Cut a Message into events the way the API does, with the late fields late."""
    late = ("stop_reason", "stop_sequence", "container")
    started = {name: value for name, value in message.items() if name != "context_management"}
    started |= dict.fromkeys(late) | {"content": []}
    started["usage"] = {"input_tokens": 10, "output_tokens": 1, "cache_read_input_tokens": 5}
    starts: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
        (
            {"type": "thinking", "thinking": "", "signature": ""},
            [
                {"type": "thinking_delta", "thinking": "H"},
                {"type": "thinking_delta", "thinking": "m."},
                {"type": "signature_delta", "signature": "EuYB"},
            ],
        ),
        (
            {"type": "text", "text": ""},
            [
                {"type": "text_delta", "text": "Wässrig \ud83d"},
                {"type": "text_delta", "text": "\udca7"},
                {"type": "citations_delta", "citation": {"type": "page", "page": 1}},
            ],
        ),
        (
            {"type": "tool_use", "id": "toolu_1", "name": "gauge", "input": {}},
            [
                {"type": "input_json_delta", "partial_json": ""},
                {"type": "input_json_delta", "partial_json": '{"deep": [1, '},
                {"type": "input_json_delta", "partial_json": '{"x": null}]}'},
            ],
        ),
        ({"type": "tool_use", "id": "toolu_2", "name": "nothing", "input": {}}, []),
        (message["content"][4], []),
        (
            {"type": "compaction", "content": None},
            [{"type": "compaction_delta", "content": "a summary"}],
        ),
    ]
    events: list[dict[str, Any]] = [{"type": "message_start", "message": started}, {"type": "ping"}]
    for index, (start, deltas) in enumerate(starts):
        events += [{"type": "content_block_start", "index": index, "content_block": start}]
        events += [
            {"type": "content_block_delta", "index": index, "delta": each} for each in deltas
        ]
        events += [{"type": "content_block_stop", "index": index}, {"type": "event_of_next_year"}]
    ending = {
        "type": "message_delta",
        "delta": {name: message[name] for name in late},
        "usage": {**message["usage"], "cache_read_input_tokens": None},
        "context_management": message["context_management"],
    }
    return [*events, ending, {"type": "message_stop"}]


@WAYS
async def test_what_we_do_not_know_is_kept(sdk: SdkClaude, *, streamed: bool) -> None:
    async with upstream(lambda _: response_of(MESSAGE, streamed=streamed)) as odd:
        answer = answered(await sdk.send(request(odd.url, params(), streamed=streamed)))

    assert MESSAGE == json.loads(answer.message)
    answer.message.encode()  # an emoji cut between two events is no half character afterwards
    assert Usage(input_tokens=110, output_tokens=27, cache_read_input_tokens=5) == answer.usage


async def test_a_tool_input_cut_off_by_max_tokens_is_kept_as_it_is(sdk: SdkClaude) -> None:
    events = [
        {"type": "message_start", "message": {**MESSAGE, "content": [], "stop_reason": None}},
        {"type": "content_block_start", "index": 0, "content_block": MESSAGE["content"][3]},
        {
            "type": "content_block_delta",
            "index": 0,
            "delta": {"type": "input_json_delta", "partial_json": '{"deep": [1'},
        },
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": {}},
    ]
    async with upstream(lambda _: sse_response(events)) as odd:
        answer = answered(await sdk.send(request(odd.url, params(), streamed=True)))

    assert {"INVALID_JSON": '{"deep": [1'} == json.loads(answer.message)["content"][0]["input"]


@WAYS
@pytest.mark.parametrize(
    "body",
    [
        "<html>Welcome</html>",
        "",
        "null",
        "[]",
        '"text"',
        "{}",
        '{"usage": null, "content": []}',
        '{"usage": "much", "content": []}',
        '{"usage": {"output_tokens": 1}}',
        '{"type": "message", "content": "text", "usage": {}}',
    ],
)
async def test_a_200_that_is_not_a_message_is_no_answer(
    sdk: SdkClaude, body: str, *, streamed: bool
) -> None:
    async with upstream(lambda _: http_response(body.encode(), "application/json")) as odd:
        outcome = refused(await sdk.send(request(odd.url, params(), streamed=streamed)))

    assert outcome.failure.type in {"api_error", "connection_error"}
    assert outcome.failure.may_be_billed


@pytest.mark.parametrize(
    "events",
    [
        [{"type": "message_start"}],
        [{"type": "message_start", "message": None}],
        [{"type": "message_start", "message": {"content": None}}],
        [["a", "list"]],
        [None],
        [*events_of(MESSAGE)[:1], {"type": "content_block_delta", "index": 4, "delta": {}}],
        [*events_of(MESSAGE)[:1], {"type": "content_block_start", "index": 0}],
    ],
)
async def test_events_that_do_not_fit_are_no_answer(sdk: SdkClaude, events: list[Any]) -> None:
    async with upstream(lambda _: sse_response(events)) as odd:
        outcome = refused(await sdk.send(request(odd.url, params(), streamed=True)))

    assert (502, "api_error") == (outcome.failure.status, outcome.failure.type)
    assert outcome.failure.may_be_billed


@pytest.mark.parametrize("length", range(1, len(events_of(MESSAGE)) - 1, 5))
async def test_a_stream_that_stops_early_is_no_answer(sdk: SdkClaude, length: int) -> None:
    async with upstream(lambda _: sse_response(events_of(MESSAGE)[:length])) as odd:
        outcome = refused(await sdk.send(request(odd.url, params(), streamed=True)))

    failure = outcome.failure
    assert ("connection_error", None) == (failure.type, failure.status)
    assert failure.may_be_billed
    assert failure.usage is not None
    assert 10 == failure.usage.input_tokens


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (502, b"<html>Bad Gateway</html>", "api_error"),
        (503, b"", "api_error"),
        (429, b'{"error": "slow down"}', "rate_limit_error"),
        (400, b'{"error": {"type": "invalid_request_error", "details": "none"}}',
         "invalid_request_error"),
        (500, b'{"error": {"type": 5, "message": {"a": 1}, "details": {"error_code": 5}}}',
         "api_error"),
    ],
)  # fmt: skip
async def test_a_relays_own_errors_are_errors_too(
    sdk: SdkClaude, status: int, body: bytes, kind: str
) -> None:
    retry = "retry-after: Wed, 21 Oct 2026 07:28:00 GMT\r\n"
    async with upstream(lambda _: http_response(body, "text/html", status, retry)) as odd:
        outcome = refused(await sdk.send(request(odd.url, params())))

    failure = outcome.failure
    assert (status, kind) == (failure.status, failure.type)
    assert failure.retry_after_ms is None
    assert failure.error_code is None


@pytest.mark.parametrize("value", ["-1", "0", "nan", "inf", "1e9", "soon", "99999999999"])
async def test_a_retry_after_that_makes_no_sense_is_as_good_as_none(
    sdk: SdkClaude, value: str
) -> None:
    headers = f"retry-after: {value}\r\n"
    async with upstream(lambda _: json_response({}, status=429, headers=headers)) as odd:
        outcome = refused(await sdk.send(request(odd.url, params())))

    assert outcome.failure.retry_after_ms is None


async def test_limit_headers_that_make_no_sense_are_not_seen(sdk: SdkClaude) -> None:
    headers = (
        "anthropic-ratelimit-requests-limit: many\r\n"
        "anthropic-ratelimit-requests-remaining: 3\r\n"
        "anthropic-ratelimit-output-tokens-limit: 500\r\n"
    )
    async with upstream(lambda _: json_response(MESSAGE, headers=headers)) as odd:
        answer = answered(await sdk.send(request(odd.url, params())))

    assert ({}, None) == (answer.headers.seen, answer.headers.organization)


async def test_no_failure_shows_the_key(claude: Running, sdk: SdkClaude) -> None:
    for marker in ("400", "401", "500", "529", "sse_error", "drop_after_billing"):
        for streamed in (False, True):
            outcome = await sdk.send(request(claude.url, params(marker), streamed=streamed))

            assert KEY not in repr(outcome)


# An upstream with scripted responses ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heard:
    """One request as it arrived."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes

    def values(self, name: str) -> list[str]:
        return [value for each, value in self.headers if each.lower() == name]


@dataclass
class Odd:
    """An upstream and what it heard."""

    url: str = ""
    requests: list[Heard] = field(default_factory=list)
    connections: int = 0


def http_response(body: bytes, kind: str, status: int = 200, headers: str = "") -> bytes:
    head = f"HTTP/1.1 {status} OK\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n"
    return (head + headers + "\r\n").encode() + body


def json_response(document: object, status: int = 200, headers: str = "") -> bytes:
    return http_response(json.dumps(document).encode(), "application/json", status, headers)


def sse_response(events: list[Any]) -> bytes:
    kinds = [each.get("type") if isinstance(each, dict) else "odd" for each in events]
    lines = [
        f"event: {kind}\ndata: {json.dumps(event)}\n\n"
        for kind, event in zip(kinds, events, strict=True)
    ]
    return http_response("".join(lines).encode(), "text/event-stream")


def response_of(message: dict[str, Any], *, streamed: bool) -> bytes:
    return sse_response(events_of(message)) if streamed else json_response(message)


@asynccontextmanager
async def upstream(answer: Callable[[Heard], bytes]) -> AsyncIterator[Odd]:
    odd = Odd()
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        odd.connections += 1
        writers.append(writer)
        while (heard := await _heard(reader)) is not None:
            odd.requests.append(heard)
            writer.write(answer(heard))
            await writer.drain()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    odd.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield odd
    finally:
        server.close()
        for writer in writers:
            writer.close()


async def _heard(reader: asyncio.StreamReader) -> Heard | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError:
        return None
    first, *lines = head.strip().split("\r\n")
    headers = [(name, value.strip()) for name, _, value in (line.partition(":") for line in lines)]
    length = next((int(value) for name, value in headers if name.lower() == "content-length"), 0)
    method, path, _ = first.split(" ")
    return Heard(method, path.partition("?")[0], headers, await reader.readexactly(length))


# Sizes ---------------------------------------------------------------------------------------------------------


@WAYS
async def test_a_request_goes_up_byte_for_byte_to_the_model_of_the_call(
    sdk: SdkClaude, *, streamed: bool
) -> None:
    text = 'He said "model": {\\"model\\": [1]}, \\\\ 💧 ' * 9_000
    asked = {
        "metadata": {"model": "not this one", "deep": [{"model": 1}]},
        "model": "claude-opus-5",
        "max_tokens": 7,
        "messages": [{"role": "user", "content": text}],
        "number": 1.50,
    }
    body = json.dumps(asked, ensure_ascii=False, separators=(",", ":")).encode()
    async with upstream(lambda _: response_of(MESSAGE, streamed=streamed)) as odd:
        call = replace(
            request(odd.url, params(), streamed=streamed), model="claude-next", body=Body(body)
        )
        answered(await sdk.send(call))

    (heard,) = odd.requests
    up = heard.body
    wanted = asked | {"model": "claude-next"} | ({"stream": True} if streamed else {})
    assert json.loads(up) == wanted
    assert body[body.index(b'"max_tokens"') :] in up


@pytest.mark.parametrize(
    ("body", "stream", "sent"),
    [
        (b"{}", False, b'{"model":"m"}'),
        (b"{}", True, b'{"model":"m","stream":true}'),
        (b'{"for":"x"}', False, b'{"model":"m","for":"x"}'),
        (b'{"model":"a","stream":true}', False, b'{"model":"m","stream":false}'),
        (b'{"stream":false,"model":"a"}', True, b'{"stream":true,"model":"m"}'),
        (b'{"a":{"stream":1,"model":2},"model":"x"}', True,
         b'{"stream":true,"a":{"stream":1,"model":2},"model":"m"}'),
        (b'{"a":"\\"}","model":"x"}', False, b'{"a":"\\"}","model":"m"}'),
        (b'{"a":["model",":"],"model":null}', False, b'{"a":["model",":"],"model":"m"}'),
    ],
)  # fmt: skip
def test_model_and_stream_are_put_into_a_request_and_nothing_else_is_touched(
    body: bytes, sent: bytes, *, stream: bool
) -> None:
    assert sent == b"".join(addressed(body, "m", stream=stream))


_VALUES: Final = st.none() | st.booleans() | st.integers() | st.text(max_size=5)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_names_its_model_is_not_searched_for_it(*, stream: bool) -> None:
    body = b'{"messages":[{"model":"other"}],"model":"m"}'

    sent = b"".join(addressed(body, None, stream=stream))

    assert sent == (body.replace(b"{", b'{"stream":true,', 1) if stream else body)


# How quickly a busy machine makes up inputs says nothing about them.
@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    asked=st.dictionaries(
        st.sampled_from(["model", "stream", "a", "\\", '"', "{", "é💧"]),
        st.recursive(
            _VALUES,
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.text(max_size=3), inner, max_size=3)
            ),
            max_leaves=5,
        ),
    ),
    stream=st.booleans(),
)
def test_any_request_stays_what_it_was_but_for_model_and_stream(
    asked: dict[str, Any], *, stream: bool
) -> None:
    body = json.dumps(asked, separators=(",", ":")).encode()

    sent = json.loads(b"".join(addressed(body, "claude-next", stream=stream)))

    assert sent.pop("model") == "claude-next"
    assert sent.pop("stream", False) is stream
    assert sent == {name: asked[name] for name in asked if name not in {"model", "stream"}}


async def test_a_request_is_released_when_it_is_sent(sdk: SdkClaude) -> None:
    freed: list[bool] = []
    body = Body(json.dumps(params(padding="x" * 1_000_000)).encode(), lambda: freed.append(True))
    seen: list[bool] = []

    def reply(_: Heard) -> bytes:
        seen.append(bool(freed))
        return response_of(MESSAGE, streamed=False)

    async with upstream(reply) as odd:
        answered(await sdk.send(replace(request(odd.url, params()), body=body)))

    assert [True] == freed
    assert [True] == seen


@pytest.mark.parametrize("beta", ["a\nb", "a\r\nx-api-key: b", " ", "a ", "b\u00eata", "\ud83d"])
async def test_a_header_that_cannot_be_sent_is_the_jobs_failure(sdk: SdkClaude, beta: str) -> None:
    """Not the endpoint's: its circuit breaker would stop the jobs of every tenant."""
    calls: list[Heard] = []

    def never(heard: Heard) -> bytes:
        calls.append(heard)
        return http_response(b"{}", "application/json")

    async with upstream(never) as odd:
        asked = replace(request(odd.url, params()), anthropic_beta=beta)
        outcome = refused(await sdk.send(asked))

    assert [] == calls
    assert (UNSENDABLE, None) == (outcome.failure.type, outcome.failure.status)
    assert "anthropic-beta: " in outcome.failure.message
    assert not outcome.failure.may_be_billed


HUGE: Final = BUDGET.most_answer + 1


@WAYS
@pytest.mark.parametrize("kind", ["plain", "packed", "packed small"])
async def test_an_answer_without_end_is_an_error_of_its_job(
    sdk: SdkClaude, kind: str, *, streamed: bool
) -> None:
    text = b'data: {"x": "' if streamed else b'{"x": "'
    body = text + b"x" * (HUGE * (10 if kind == "packed" else 1))
    headers = "" if kind == "plain" else "content-encoding: gzip\r\n"
    body = body if kind == "plain" else gzip.compress(body)
    async with upstream(lambda _: http_response(body, "text/html", 200, headers)) as odd:
        outcome = refused(await sdk.send(request(odd.url, params(), streamed=streamed)))

    assert (ANSWER_TOO_LARGE, None) == (outcome.failure.type, outcome.failure.status)
    assert outcome.failure.may_be_billed


async def test_many_events_are_no_large_answer(sdk: SdkClaude) -> None:
    """What a stream says beside its text is not held."""
    events = events_of(MESSAGE)
    pings = [{"type": "ping", "padding": "x" * 60_000}] * (HUGE // 50_000)
    async with upstream(lambda _: sse_response([*events[:3], *pings, *events[3:]])) as odd:
        answer = answered(await sdk.send(request(odd.url, params(), streamed=True)))

    assert MESSAGE == json.loads(answer.message)


async def test_a_message_that_grows_without_end_is_an_error_of_its_job(sdk: SdkClaude) -> None:
    events = events_of(MESSAGE)
    delta = {"type": "text_delta", "text": "x" * 100_000}
    more = [{"type": "content_block_delta", "index": 1, "delta": delta}] * (HUGE // 100_000 + 1)
    at = next(n for n, each in enumerate(events) if each.get("index") == 1) + 1
    async with upstream(lambda _: sse_response([*events[:at], *more, *events[at:]])) as odd:
        outcome = refused(await sdk.send(request(odd.url, params(), streamed=True)))

    assert ANSWER_TOO_LARGE == outcome.failure.type


async def test_an_answer_of_countless_small_parts_is_not_parsed(sdk: SdkClaude) -> None:
    body = b'{"content":[' + b"[]," * 1_500_000 + b"1]}"
    async with upstream(lambda _: http_response(body, "application/json")) as odd:
        outcome = refused(await sdk.send(request(odd.url, params())))

    assert ANSWER_TOO_LARGE == outcome.failure.type


@WAYS
async def test_an_error_without_end_is_that_error(sdk: SdkClaude, *, streamed: bool) -> None:
    body = b"<html>" + b"x" * HUGE
    retry = "retry-after: 7\r\n"
    async with upstream(lambda _: http_response(body, "text/html", 429, retry)) as odd:
        outcome = refused(await sdk.send(request(odd.url, params(), streamed=streamed)))

    assert (429, 7_000) == (outcome.failure.status, outcome.failure.retry_after_ms)
    assert len(outcome.failure.message) < 100_000


@WAYS
async def test_an_answer_that_is_packed_unasked_is_read(sdk: SdkClaude, *, streamed: bool) -> None:
    _, _, body = response_of(MESSAGE, streamed=streamed).partition(b"\r\n\r\n")
    kind = "text/event-stream" if streamed else "application/json"
    async with upstream(
        lambda _: http_response(gzip.compress(body), kind, 200, "content-encoding: gzip\r\n")
    ) as odd:
        answer = answered(await sdk.send(request(odd.url, params(), streamed=streamed)))

    assert MESSAGE == json.loads(answer.message)
    (heard,) = odd.requests
    wanted = [value for name, value in heard.headers if name.lower() == "accept-encoding"]
    assert wanted == ["identity"]


async def test_the_room_for_an_answer_is_asked_for_as_it_comes(sdk: SdkClaude) -> None:
    asked: list[int] = []

    async def room(size: int) -> None:
        asked.append(size)

    message = MESSAGE | {"content": [{"type": "text", "text": "x" * 500_000}]}
    async with upstream(lambda _: response_of(message, streamed=False)) as odd:
        answered(await sdk.send(replace(request(odd.url, params()), room=room)))

    assert asked == sorted(asked)
    assert len(asked) > 3
    assert max(asked) == len(json.dumps(message))


async def test_a_redirect_is_not_followed(sdk: SdkClaude) -> None:
    """Key and prompt are for this host alone."""
    async with (
        upstream(lambda _: response_of(MESSAGE, streamed=False)) as other,
        upstream(
            lambda _: http_response(b"", "text/html", 307, f"location: {other.url}/v1/messages\r\n")
        ) as odd,
    ):
        refused(await sdk.send(request(odd.url, params())))

    assert [] == other.requests
