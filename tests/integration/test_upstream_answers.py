"""Whatever an upstream sends, the outcome can be stored, shown and logged, and is classified the same each way."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any, Final, NoReturn

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sluice.adapters import job_records
from sluice.adapters.claude import STREAM_FROM_TOKENS, SdkClaude
from sluice.adapters.claude_answers import (
    LONGEST_WAIT_MS,
    MOST_MESSAGE,
    MOST_NAME,
    fit,
    retry_after_ms,
)
from sluice.adapters.system import SystemClock
from sluice.domain import jobs as life
from sluice.domain.jobs import JobError
from sluice.domain.keys import UpstreamKey
from sluice.domain.pricing import MOST_COUNT, Spend, Usage
from sluice.domain.retries import ANSWER_TOO_LARGE
from sluice.domain.waits import LEASE_MS
from sluice.ports.claude import Answer, Body, CallRequest, Refused
from tests.fakes import NOON, SECOND, a_job

HALF_EMOJI: Final = "\ud83d"
MESSAGE: Final[dict[str, Any]] = {
    "id": "msg_test",
    "type": "message",
    "role": "assistant",
    "model": "claude-haiku-4-5",
    "content": [{"type": "text", "text": "ok"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 3, "output_tokens": 4},
}


@dataclass
class Upstream:
    """An upstream that answers every call with the same bytes."""

    runner: asyncio.Runner
    claude: SdkClaude
    port: int = 0
    response: bytes = b""
    calls: int = 0

    def send(self, *, streamed: bool = False) -> Answer | Refused:
        """Make one call."""
        request = CallRequest(
            key=UpstreamKey("main", "sk-ant-test", base_url=f"http://127.0.0.1:{self.port}"),
            model="claude-haiku-4-5",
            body=Body(b'{"model":"claude-haiku-4-5","max_tokens":10,"messages":[]}'),
            anthropic_version="2026-10-21",
            anthropic_beta=None,
            max_tokens=STREAM_FROM_TOKENS if streamed else 10,
            window_ms=20_000,
            full_window=False,
        )
        return self.runner.run(self.claude.send(request))

    def says(
        self,
        body: bytes,
        status: int = 200,
        headers: dict[str, str] | None = None,
        *,
        streamed: bool = False,
    ) -> Answer | Refused:
        """Make a call that gets this response."""
        lines = {"content-type": "application/json", **(headers or {})}
        lines |= {"content-length": str(len(body)), "connection": "close"}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self.response = f"HTTP/1.1 {status} X\r\n{head}\r\n".encode("latin-1") + body
        return self.send(streamed=streamed)


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with asyncio.Runner() as runner:
        up = Upstream(runner, SdkClaude(SystemClock()))

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.split(b":")[1])
                for line in head.split(b"\r\n")
                if line.lower().startswith(b"content-length")
            )
            await reader.readexactly(length)
            up.calls += 1
            writer.write(up.response)
            await writer.drain()
            writer.close()

        async def start() -> asyncio.Server:
            return await asyncio.start_server(serve, "127.0.0.1", 0)

        server = runner.run(start())
        up.port = server.sockets[0].getsockname()[1]
        yield up
        server.close()
        runner.run(up.claude.close())


def events_of(message: dict[str, Any]) -> bytes:
    """Return a Message as a stream."""
    start = {**message, "content": [], "stop_reason": None}
    events: list[dict[str, Any]] = [{"type": "message_start", "message": start}]
    for index, block in enumerate(message["content"]):
        events.append({"type": "content_block_start", "index": index, "content_block": block})
        events.append({"type": "content_block_stop", "index": index})
    delta = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    events.append({"type": "message_delta", "delta": delta, "usage": message["usage"]})
    return stream_of([*events, {"type": "message_stop"}])


def stream_of(events: list[Any]) -> bytes:
    return b"".join(b"event: e\ndata: " + json.dumps(each).encode() + b"\n\n" for each in events)


def failure_of(outcome: Answer | Refused) -> Any:
    assert isinstance(outcome, Refused), outcome
    return outcome.failure


def no_constant(name: str) -> NoReturn:
    raise AssertionError(name)


def check_storable(outcome: Answer | Refused) -> None:
    """Store the outcome as a worker does, and check that everything in it is bounded."""
    claimed = life.claim(a_job(), "worker", NOON, NOON + LEASE_MS)
    if isinstance(outcome, Answer):
        gzip.compress(outcome.message.encode())
        document = json.loads(outcome.message, parse_constant=no_constant)
        json.dumps(document, allow_nan=False)
        assert isinstance(document["content"], list)
        names = [outcome.stop_reason, outcome.request_id, outcome.headers.organization]
        usage = outcome.usage
        ended = life.succeed(
            claimed, "worker", NOON, result=life.Result(b"x"), usage=usage, cost_micro_usd=1,
            request_id=outcome.request_id,
        )  # fmt: skip
    else:
        failure = outcome.failure
        names = [failure.type, failure.error_code, failure.request_id, outcome.headers.organization]
        usage = failure.usage
        assert failure.message
        assert len(failure.message) < MOST_MESSAGE + 100
        assert failure.retry_after_ms is None or 0 < failure.retry_after_ms < LONGEST_WAIT_MS
        ended = life.give_up(
            claimed, "worker", NOON, error=failure.error, request_id=failure.request_id, usage=usage
        )
    for name in names:
        assert name is None or (len(name) <= MOST_NAME and name.isascii() and name.isprintable())
    for number in (usage or Usage()).as_dict().values():
        assert 0 <= number <= 10 * MOST_COUNT
    Spend.of_call(usage or Usage(), 0)
    item = job_records.encode(ended, 30)
    assert len(json.dumps(item, default=str).encode()) < 40_000
    assert ended.error == job_records.decode(item).error


JSON: Final = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.sampled_from([HALF_EMOJI, "\x1b[31m", "x" * 5_000, "error", "message", 10**400]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(
            ["type", "error", "message", "details", "error_code", "content", "usage", "model",
             "detail", "loc", "msg", "code", "request_id", "stop_reason", "iterations", "index",
             "input_tokens", "output_tokens", "cache_creation", "delta", "content_block"]
        ) | st.text(max_size=5),
        inner,
        max_size=6,
    ),
    max_leaves=25,
)  # fmt: skip
ABOUT_A_MESSAGE: Final = st.fixed_dictionaries(
    {"type": st.just("message"), "content": st.lists(JSON, max_size=3) | JSON},
    optional={"usage": JSON, "stop_reason": JSON, "model": JSON, "role": JSON},
)
EVENT: Final = st.fixed_dictionaries(
    {"type": st.sampled_from(
        ["message_start", "content_block_start", "content_block_delta", "content_block_stop",
         "message_delta", "message_stop", "ping", "error"]) | JSON},
    optional={"index": st.integers() | JSON, "delta": JSON, "content_block": JSON, "usage": JSON,
              "message": ABOUT_A_MESSAGE, "error": JSON},
)  # fmt: skip


def written(document: object) -> bytes:
    return json.dumps(document).encode()


BODIES: Final = (
    st.binary(max_size=300)
    | JSON.map(written)
    | ABOUT_A_MESSAGE.map(written)
    | st.lists(EVENT | JSON, max_size=8).map(stream_of)
    | st.lists(EVENT, max_size=6).map(lambda events: events_of(MESSAGE)[:200] + stream_of(events))
)
HEADERS: Final = st.dictionaries(
    st.sampled_from(
        ["content-type", "retry-after", "retry-after-ms", "x-should-retry", "request-id", "date",
         "anthropic-organization-id", "anthropic-ratelimit-requests-limit", "content-encoding",
         "anthropic-ratelimit-requests-remaining", "anthropic-ratelimit-requests-reset"]),
    st.text(st.characters(min_codepoint=33, max_codepoint=255, exclude_characters="\x7f"), max_size=40)
    | st.sampled_from(
        ["text/html; charset=utf-16", "application/json; charset=hex", "text/event-stream", "9" * 500,
         "1e400", "-1", "Wed, 21 Oct 9999 07:28:00 GMT", "gzip", "0", "٣", "9999-12-31T23:59:59Z"])
    .map(lambda text: text.encode("utf-8").decode("latin-1")),
    max_size=4,
)  # fmt: skip


@settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "150")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    body=BODIES,
    status=st.sampled_from(
        [200, 200, 200, 201, 204, 302, 400, 401, 403, 404, 413, 429, 500, 529, 599]
    ),
    headers=HEADERS,
    streamed=st.booleans(),
)
def test_anything_an_upstream_sends_can_be_stored(
    upstream: Upstream,
    body: bytes,
    status: int,
    headers: dict[str, str],
    streamed: bool,  # noqa: FBT001
) -> None:
    outcome = upstream.says(body if status != 204 else b"", status, headers, streamed=streamed)

    check_storable(outcome)


# Errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        # Half a surrogate pair, as a JSON escape and as the bytes that some encoders write.
        (400, rb'{"error":{"type":"invalid_request_error","message":"cut here: \ud83d"}}',
         "invalid_request_error", "cut here: \ufffd"),
        (400, b'{"error":{"type":"invalid_request_error","message":"cut: \xed\xa0\xbd"}}',
         "invalid_request_error", "cut: \ufffd\ufffd\ufffd"),
        # Control characters and direction overrides never reach a terminal.
        (400, rb'{"error":{"message":"red \u001b[31m \u202e!"}}',
         "invalid_request_error", "red \ufffd[31m \ufffd!"),
        # Other APIs' and relays' error documents.
        (400, b'{"error":"plain text reason","code":400}', "invalid_request_error", "plain text reason"),
        (422, b'{"detail":[{"loc":["body","max_tokens"],"msg":"field required"}]}',
         "invalid_request_error", "body.max_tokens: field required"),
        (400, b'[{"error":{"code":400,"message":"bad","status":"INVALID_ARGUMENT"}}]',
         "INVALID_ARGUMENT", "bad"),
        (429, b'{"__type":"ThrottlingException","message":"Too many tokens"}',
         "ThrottlingException", "Too many tokens"),
        (403, b'{"Message":"not authorized"}', "permission_error", "not authorized"),
        (400, b'{"errors":[{"message":"one"},{"message":"two"}]}', "invalid_request_error", "one; two"),
        (503, b'{"detail":"no healthy upstream"}', "api_error", "no healthy upstream"),
        # Error pages, and no error document at all.
        (502, b"<html><head><title>502</title></head><body>Bad <b>Gateway</b></body></html>",
         "api_error", "502 Bad Gateway"),
        (503, b"upstream connect error\n", "api_error", "upstream connect error"),
        (500, b"", "api_error", "upstream answered 500"),
        # Wrong types.
        (400, b'{"type":"error","error":{"type":null,"message":null},"request_id":null}',
         "invalid_request_error", "upstream answered 400"),
        (529, b'{"error":{"type":["a"],"message":{"b":{}}}}', "overloaded_error", "upstream answered 529"),
        # An error after a 200.
        (200, b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}',
         "overloaded_error", "Overloaded"),
        (200, b'{"error":{"message":"no route","type":"invalid_request_error"}}',
         "invalid_request_error", "no route"),
    ],
)  # fmt: skip
def test_every_error_is_read_as_one(  # noqa: PLR0913, PLR0917 - a row of a table
    upstream: Upstream,
    status: int,
    body: bytes,
    kind: str,
    message: str,
    streamed: bool,  # noqa: FBT001
) -> None:
    outcome = upstream.says(body, status, streamed=streamed)

    failure = failure_of(outcome)
    assert (kind, message) == (failure.type, failure.message)
    check_storable(outcome)


@pytest.mark.parametrize(
    ("kind", "status"),
    [("overloaded_error", 529), ("invalid_request_error", 400), ("rate_limit_error", 429),
     ("a_new_one", 500)],
)  # fmt: skip
@pytest.mark.parametrize("streamed", [False, True])
def test_an_error_inside_a_200_has_the_status_of_its_type(
    upstream: Upstream, kind: str, status: int, *, streamed: bool
) -> None:
    error = {"type": "error", "error": {"type": kind, "message": "the reason"}}
    body, headers = json.dumps(error).encode(), {}
    if streamed:
        body, headers = stream_of([error]), {"content-type": "text/event-stream"}

    failure = failure_of(upstream.says(body, 200, headers, streamed=streamed))

    assert (status, kind, "the reason") == (failure.status, failure.type, failure.message)


@pytest.mark.parametrize("size", [3_000, 600_000])
def test_a_long_message_is_cut(upstream: Upstream, size: int) -> None:
    """Also when only the beginning of its document is read."""
    reason = "messages.0.content: Input should be a valid list, input was: " + "A" * size
    error = {"type": "error", "error": {"type": "invalid_request_error", "message": reason}}

    failure = failure_of(upstream.says(json.dumps(error).encode(), 400))

    assert "invalid_request_error" == failure.type
    assert failure.message.startswith(reason[:MOST_MESSAGE])
    assert failure.message.endswith("characters in all)")
    assert len(failure.message) < MOST_MESSAGE + 100


@given(st.text(st.characters()), st.integers(1, 50))
def test_cut_text_is_valid_and_says_how_long_it_was(text: str, most: int) -> None:
    cut = fit(text, most)

    cut.encode()
    assert len(cut) <= most + 40
    if len(text.strip()) > most:
        assert f"({len(text.strip()):,} characters in all)" in cut


# Answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streamed", [False, True])
def test_an_answer_without_usage_is_an_answer(upstream: Upstream, *, streamed: bool) -> None:
    message = {**MESSAGE, "usage": None}
    body = events_of(message) if streamed else json.dumps(message).encode()
    headers = {"content-type": "text/event-stream"} if streamed else {}

    outcome = upstream.says(body, 200, headers, streamed=streamed)

    assert isinstance(outcome, Answer)
    assert (message, None, None) == (json.loads(outcome.message), outcome.usage, outcome.bill)


def test_a_relay_that_does_not_stream_is_read_all_the_same(upstream: Upstream) -> None:
    outcome = upstream.says(json.dumps(MESSAGE).encode(), streamed=True)

    assert isinstance(outcome, Answer)
    assert MESSAGE == json.loads(outcome.message)


@pytest.mark.parametrize("streamed", [False, True])
def test_bytes_that_are_no_text_are_replaced_in_an_answer_that_is_paid(
    upstream: Upstream, *, streamed: bool
) -> None:
    message = {**MESSAGE, "content": [{"type": "text", "text": "a?b"}]}
    body = events_of(message) if streamed else json.dumps(message).encode()
    headers = {"content-type": "text/event-stream"} if streamed else {}

    outcome = upstream.says(body.replace(b"a?b", b"a\xffb"), 200, headers, streamed=streamed)

    assert isinstance(outcome, Answer)
    assert "a\ufffdb" == json.loads(outcome.message)["content"][0]["text"]


def test_json_is_utf_8_whatever_the_charset(upstream: Upstream) -> None:
    body = json.dumps(
        {**MESSAGE, "content": [{"type": "text", "text": "café €"}]}, ensure_ascii=False
    )
    latin = {"content-type": "application/json; charset=ISO-8859-1"}

    outcome = upstream.says(body.encode(), headers=latin)

    assert isinstance(outcome, Answer)
    assert "café €" == json.loads(outcome.message)["content"][0]["text"]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("number", "read"), [("1e999", 1.7976931348623157e308), ("NaN", None)])
def test_numbers_that_json_does_not_have_do_not_make_an_answer_unreadable(
    upstream: Upstream, number: str, read: float | None, *, streamed: bool
) -> None:
    block = {"type": "tool_use", "id": "toolu_1", "name": "gauge", "input": {"x": "NUMBER"}}
    message = {**MESSAGE, "content": [block]}
    body = events_of(message) if streamed else json.dumps(message).encode()
    headers = {"content-type": "text/event-stream"} if streamed else {}

    outcome = upstream.says(
        body.replace(b'"NUMBER"', number.encode()), 200, headers, streamed=streamed
    )

    assert isinstance(outcome, Answer)
    document = json.loads(outcome.message, parse_constant=no_constant)
    assert {"x": read} == document["content"][0]["input"]


def test_numbers_of_an_answer_stay_as_they_are(upstream: Upstream) -> None:
    body = b'{"type":"message","content":[{"type":"tool_use","input":{"a":0.1234567890123456789,"b":1.0,"c":1E2}}]}'

    outcome = upstream.says(body)

    assert isinstance(outcome, Answer)
    assert body.decode() == outcome.message


@pytest.mark.parametrize("depth", [150, 300, 100_000])
def test_an_answer_nested_too_deeply_is_too_large(upstream: Upstream, depth: int) -> None:
    """Readers of the answer would fail on it, wherever they are."""
    nested = b"[" * depth + b"]" * depth
    body = json.dumps({**MESSAGE, "x": "DEEP"}).encode().replace(b'"DEEP"', nested)

    outcome = upstream.says(body)

    if depth < 200:
        assert isinstance(outcome, Answer)
    else:
        assert ANSWER_TOO_LARGE == failure_of(outcome).type


# Headers -------------------------------------------------------------------------------------------------------


def at(seconds: float) -> str:
    moment = datetime.fromtimestamp(NOON / 1000, UTC) + timedelta(seconds=seconds)
    return format_datetime(moment, usegmt=True)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "20000"}, 20),
        ({"retry-after": at(45)}, 45),
        # The longest counts: whichever was meant is never undercut.
        ({"retry-after": "2", "retry-after-ms": "20000"}, 20),
        ({"retry-after": "30", "retry-after-ms": "1"}, 30),
        # A date by upstream's own clock, when that is behind or ahead of ours.
        ({"retry-after": at(45), "date": at(-15)}, 60),
        ({"retry-after": at(45), "date": at(30)}, 45),
        ({"retry-after": at(-5), "date": at(-35)}, 30),
        # What makes no sense.
        ({"retry-after": at(-5)}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-1", "retry-after-ms": "nan"}, None),
        ({"retry-after": "Wed, 21 Oct 9999 07:28:00 GMT"}, None),
        ({}, None),
    ],
)
def test_the_time_that_upstream_names_is_never_undercut(
    headers: dict[str, str], seconds: float | None
) -> None:
    wanted = None if seconds is None else seconds * SECOND

    assert wanted == retry_after_ms(headers, NOON)


@pytest.mark.parametrize(("sent", "read"), [("true", True), ("false", False), ("maybe", None)])
def test_x_should_retry_is_read(upstream: Upstream, sent: str, read: bool | None) -> None:  # noqa: FBT001
    failure = failure_of(upstream.says(b"{}", 429, {"x-should-retry": sent}))

    assert failure.should_retry is read


def test_identifiers_that_are_none_are_ignored(upstream: Upstream) -> None:
    outcome = upstream.says(
        b"{}", 400, {"request-id": "r" * 500, "anthropic-organization-id": "org \xff"}
    )

    assert (None, None) == (failure_of(outcome).request_id, outcome.headers.organization)


def test_a_key_that_cannot_be_sent_is_the_keys_trouble() -> None:
    """Not the endpoint's, which serves other keys too."""
    request = CallRequest(
        key=UpstreamKey("main", "sk-ant-test\n"), model="m", body=Body(b"{}"),
        anthropic_version="2026-10-21", anthropic_beta=None, max_tokens=1, window_ms=1_000,
        full_window=False,
    )  # fmt: skip

    failure = failure_of(asyncio.run(SdkClaude(SystemClock()).send(request)))

    assert (401, "authentication_error") == (failure.status, failure.type)
    assert "sk-ant" not in failure.message


def test_errors_of_jobs_are_those_of_upstream(upstream: Upstream) -> None:
    failure = failure_of(upstream.says(b'{"error":{"message":"no"}}', 400))

    assert JobError("invalid_request_error", "no", 400) == failure.error
