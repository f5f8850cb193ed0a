"""Rows: what a line may look like, what is said of one that cannot be used, and how results are written."""

import json
from dataclasses import replace
from typing import Any

import pytest

from sluice.domain.batches import MOST_LINE_BYTES, Options, Tally
from sluice.domain.jobs import Attempt, Job, JobError, State
from sluice.domain.pricing import Spend, Usage
from sluice.domain.rows import (
    BadRow,
    Line,
    Record,
    Row,
    bad_row_records,
    error_line,
    errored_line,
    job_record,
    lines,
    numbered,
    result_line,
    split,
)
from sluice.intake.requests import read_row
from tests.fakes import NOON, a_job

PARAMS = {"model": "claude-a", "max_tokens": 10, "messages": [{"role": "user", "content": "Hi"}]}


def line(text: bytes | object, **facts: object) -> Line:
    body = text if isinstance(text, bytes) else json.dumps(text).encode()
    return replace(Line(0, 100, body), **facts)  # type: ignore[arg-type]


def read(text: bytes | object, options: Options = Options()) -> Row | BadRow | None:  # noqa: B008 - frozen
    return read_row(line(text), options)


# Reading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [[b"a\nb\n\nc"], [b"a", b"\nb\n", b"", b"\nc"]])
def test_lines_are_split_also_across_pieces_and_without_a_last_end(pieces: list[bytes]) -> None:
    assert [b"a", b"b", b"", b"c"] == list(split(pieces))


@pytest.mark.parametrize(
    "item",
    [
        {"custom_id": "a", "params": PARAMS},
        {"custom_id": "a", "body": PARAMS},
        {"custom_id": "a", "method": "POST", "url": "/v1/messages", "body": PARAMS},
        {"custom_id": "a", "params": {**PARAMS, "stream": False}},
    ],
)
def test_both_shapes_of_a_batch_item_are_understood(item: object) -> None:
    assert Row("a", PARAMS) == read(item)


def test_a_row_may_have_a_deadline_and_fallbacks_of_its_own() -> None:
    more = {"deadline": "2026-11-20T13:00:00+01:00", "fallback_models": ["claude-b"]}

    row = read({"custom_id": "a", "params": PARAMS, **more})

    assert Row("a", PARAMS, NOON, ("claude-b",)) == row


@pytest.mark.parametrize("text", [b"", b"  ", b"\r", b"\xef\xbb\xbf"])
def test_a_blank_line_is_nothing(text: bytes) -> None:
    assert read(text) is None


def test_a_byte_order_mark_before_a_row_is_skipped() -> None:
    text = b"\xef\xbb\xbf" + json.dumps({"custom_id": "a", "params": PARAMS}).encode() + b" \r"

    assert Row("a", PARAMS) == read(text)


def test_the_batchs_options_hold_where_the_row_says_nothing() -> None:
    bare = {"messages": PARAMS["messages"]}
    options = Options(model="claude-b", max_tokens=7, system="Be brief.")

    row = read({"custom_id": "a", "params": {**bare, "max_tokens": 9}}, options)

    expected = {"model": "claude-b", "max_tokens": 9, "system": "Be brief.", **bare}
    assert Row("a", expected) == row


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            b"{",
            "the line is not valid JSON: Expecting property name enclosed in double quotes at character 2",
        ),
        (b"\xff\xfe{", "the line has text that is not valid Unicode; use UTF-8"),
        (
            b'{"custom_id": "\\ud800"}',
            "the request has text that is not valid Unicode; use UTF-8 without unpaired",
        ),
        (b'{"a": NaN}', "the request has a number that is NaN, infinite"),
        (b"[" * 100_000, "the line is nested too deeply: at most 100 levels"),
        (b"[1]", "the line is not a JSON object; use "),
        ({"params": PARAMS}, "custom_id: Field required"),
        (
            {"custom_id": "a b", "params": PARAMS},
            "custom_id: String should match pattern '^[a-zA-Z0-9_-]{1,64}$'",
        ),
        ({"custom_id": 7, "params": PARAMS}, "custom_id: Input should be a valid string"),
        ({"custom_id": "a" * 65, "params": PARAMS}, "custom_id: "),
    ],
)
def test_a_line_without_a_usable_custom_id_is_an_error_only(text: object, message: str) -> None:
    bad = read(text)

    assert isinstance(bad, BadRow)
    assert bad.message.startswith(message)
    assert bad.custom_id is None
    (record,) = bad_row_records(line(b"", number=4), bad)
    assert ("E", 100, 4, Tally(invalid=1)) == (
        record.kind,
        record.offset,
        record.line,
        record.tally,
    )


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({}, "params: Field required"),
        ({"params": []}, "params: Input should be a valid dictionary"),
        (
            {"url": "/v1/complete", "body": {}},
            'method and url: "POST" "/v1/complete" is not supported',
        ),
        ({"method": "GET", "body": {}}, 'method and url: "GET" "/v1/messages" is not supported'),
        ({"params": {**PARAMS, "stream": True}}, "params.stream: Input should be False"),
        (
            {"params": PARAMS, "deadline": "soon"},
            "deadline: must be an RFC 3339 string with a time",
        ),
        (
            {"params": PARAMS, "deadline": 5},
            "deadline: must be an RFC 3339 string with a time zone",
        ),
        ({"params": PARAMS, "deadline": "2026-11-20T13:00"}, "deadline: must be an RFC 3339"),
        ({"params": PARAMS, "fallback_models": "x"}, "fallback_models: Input should be a valid"),
        ({"params": PARAMS, "sluice_problem": "too few fields"}, "too few fields"),
        ({"params": {}}, "params.model: Field required"),
        ({"params": {"model": 7}}, "params.model: Input should be a valid string"),
        ({"params": {"model": ""}}, "params.model: String should have at least 1"),
        ({"params": {"model": "a"}}, "params.max_tokens: Field required"),
        ({"params": {"model": "a", "max_tokens": "1"}}, "params.max_tokens: Input should"),
        ({"params": {"model": "a", "max_tokens": True}}, "params.max_tokens: Input should"),
        ({"params": {**PARAMS, "max_tokens": -1}}, "params.max_tokens: Input should be greater"),
        ({"params": {"model": "a", "max_tokens": 1}}, "params.messages: Field required"),
    ],
)
def test_a_row_with_a_custom_id_has_an_errored_result_as_well(
    item: dict[str, object], message: str
) -> None:
    bad = read({"custom_id": "a", **item})

    assert isinstance(bad, BadRow)
    assert bad.message.startswith(message)
    result, error = bad_row_records(line(b""), bad)
    assert ("R", Tally(errored=1)) == (result.kind, result.tally)
    assert {
        "type": "errored",
        "error": {
            "type": "error",
            "error": {"type": "invalid_request_error", "message": bad.message},
            "request_id": None,
        },
    } == json.loads(result.body)["result"]
    assert ("E", Tally()) == (error.kind, error.tally)
    assert "a" == json.loads(error.body)["custom_id"]


@pytest.mark.parametrize("beyond", [1, 3_000_000])
def test_a_line_above_the_limit_is_an_error_and_not_held_in_memory(beyond: int) -> None:
    data = b"short\n" + b"x" * (MOST_LINE_BYTES + beyond) + b"\nafter\n"

    pieces = [data[at : at + 1_000_000] for at in range(0, len(data), 1_000_000)]
    short, long, after = lines(pieces, 0, len(data), 0)

    assert (b"short", b"after") == (short.text, after.text)
    assert long.too_long
    assert len(long.text) < 1_000
    bad = read_row(long, Options())
    assert isinstance(bad, BadRow)
    assert f"the line exceeds {MOST_LINE_BYTES:,} bytes" == bad.message


@pytest.mark.parametrize(
    ("beginning", "custom_id"),
    [
        (b'{"custom_id": "a-1", "params": "x', "a-1"),
        (b'\xef\xbb\xbf { "custom_id":"a-1" ,"params": "x', "a-1"),
        (b'{"params": {"custom_id": "a-1", "x', None),
        (b'{"custom_id": "a b", "params": "x', None),
        (b'{"custom_id": "a-1', None),
    ],
)
def test_the_error_of_a_line_above_the_limit_has_its_id(
    beginning: bytes, custom_id: str | None
) -> None:
    bad = read_row(line(beginning + b"x" * 100, too_long=True), Options())

    assert isinstance(bad, BadRow)
    assert custom_id == bad.custom_id


def test_the_end_of_a_line_above_the_limit_is_not_searched_for() -> None:
    pieces = iter([b"x" * MOST_LINE_BYTES, b"x", b"not asked for"])

    (long,) = lines(pieces, 0, 10, 0)

    assert long.too_long
    assert [b"not asked for"] == list(pieces)


# Results ---------------------------------------------------------------------------------------------------


def ended(state: State, **facts: Any) -> Job:
    return a_job(custom_id="a", state=state, **facts)


def test_a_result_has_claudes_message_as_it_came_on_one_line() -> None:
    text = result_line("a", ended(State.SUCCEEDED), '{\n  "id": "msg_1",\r\n"new_field": 1.50}')

    assert "\n" not in text
    assert '"new_field": 1.50' in text
    assert {"type": "succeeded", "message": {"id": "msg_1", "new_field": 1.5}} == json.loads(text)[
        "result"
    ]


@pytest.mark.parametrize("state", [State.CANCELED, State.EXPIRED])
def test_a_row_that_never_ran_says_so(state: State) -> None:
    text = result_line("a", ended(state), None)

    assert {"custom_id": "a", "result": {"type": state.value}} == json.loads(text)


def test_an_errored_result_has_upstreams_reason_and_request_id() -> None:
    attempt = Attempt(1, "claude-a", 0, request_id="req_1")
    error = JobError("invalid_request_error", "messages: no", 400)
    job = ended(State.ERRORED, error=error, attempts=(attempt,))

    result = json.loads(result_line("a", job, None))["result"]

    assert "errored" == result["type"]
    assert {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "messages: no"},
        "request_id": "req_1",
    } == result["error"]


def test_an_error_type_of_sluice_is_reported_as_one_that_clients_know() -> None:
    own = json.loads(errored_line("a", JobError("attempts_used_up", "5 attempts failed")))
    none = json.loads(result_line("a", ended(State.ERRORED), None))

    assert ("api_error", "5 attempts failed") == tuple(own["result"]["error"]["error"].values())
    assert "api_error" == none["result"]["error"]["error"]["type"]


def test_a_record_travels_as_a_line() -> None:
    record = Record("R", 7, 3, "a", Tally(succeeded=1, output_tokens=5), '{"x":\t"y"}')

    assert record == Record.decoded(record.encoded())


def test_an_ended_job_goes_into_the_sums() -> None:
    used = Usage(input_tokens=3, output_tokens=4, web_search_requests=1)
    job = ended(
        State.SUCCEEDED,
        usage=used,
        cost_micro_usd=11_000,
        attempts=(Attempt(1, "claude-a", 0), Attempt(2, "claude-a", 0, cost_micro_usd=10_600)),
    )

    record = job_record(2, 50, job, "{}", Spend())

    assert (
        Tally(
            succeeded=1,
            calls=2,
            input_tokens=3,
            output_tokens=4,
            cost_micro_usd=11_000,
            # A web search costs a cent on each lane, tokens are half price in a batch.
            other_lane_micro_usd=10_300,
        )
        == record.tally
    )
    assert ("R", 50, 2, "a") == (record.kind, record.offset, record.line, record.custom_id)
    assert Tally(canceled=1) == job_record(0, 0, ended(State.CANCELED), None, Spend()).tally


def test_a_row_of_the_batch_lane_says_what_it_saved() -> None:
    used = Usage(input_tokens=3, output_tokens=4, web_search_requests=1)
    attempts = (Attempt(1, "claude-a", 0, cost_micro_usd=10_300),)
    job = ended(State.SUCCEEDED, usage=used, cost_micro_usd=10_300, attempts=attempts, lane="batch")

    tally = job_record(2, 50, job, "{}", Spend()).tally

    # 600 micro-dollars of tokens live.
    assert (10_300, 10_300, 300) == (
        tally.cost_micro_usd,
        tally.other_lane_micro_usd,
        tally.saved_micro_usd,
    )


def test_an_error_gets_its_line_number_when_it_is_known() -> None:
    (record,) = bad_row_records(line(b""), BadRow("bad"))

    assert {
        "line": 12,
        "offset": 100,
        "error": {"type": "invalid_request_error", "message": "bad"},
    } == json.loads(numbered(record.body, 12))


def test_an_error_of_a_converted_file_has_no_offset() -> None:
    error = json.loads(numbered(error_line(7, "no good", "a"), 3, with_offset=False))

    assert (3, "a", False) == (error["line"], error["custom_id"], "offset" in error)


def test_an_answer_that_was_paid_for_is_not_lost_with_its_row() -> None:
    result = result_line("a", ended(State.SUCCEEDED), '{"id":"msg_1"}')

    error = json.loads(error_line(7, "twice", "a", result))

    assert {"type": "succeeded", "message": {"id": "msg_1"}} == error["result"]
