"""Lines of the results of upstream batches, and batches as upstream shows them: whatever is in them is a value."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, Final, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.adapters.claude_answers import MOST_MESSAGE, MOST_NAME
from sluice.adapters.claude_batches import seen_of
from sluice.adapters.claude_results import row_of
from sluice.domain.pricing import MOST_COUNT, Usage
from sluice.domain.refusals import OVERLOADED
from sluice.domain.retries import ANSWER_TOO_LARGE, Failure, meaning
from sluice.ports.upstream import Counts, ResultRow, RowKind, Seen

MESSAGE: Final[dict[str, Any]] = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-haiku-4-5",
    "content": [{"type": "text", "text": "ok"}],
    "stop_reason": "end_turn",
    "usage": {"input_tokens": 3, "output_tokens": 4},
}
RAW: Final = json.dumps(MESSAGE).encode()


def succeeded(message: bytes) -> bytes:
    return b'{"custom_id":"row","result":{"type":"succeeded","message":' + message + b"}}"


def errored(error: object) -> bytes:
    result = {"type": "errored", "error": error}
    return json.dumps({"custom_id": "row", "result": result}).encode()


def failure_of(row: ResultRow) -> Failure:
    assert row.failure is not None
    return row.failure


# Messages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        succeeded(RAW),
        b'{"custom_id":"row","result":{"message":' + RAW + b',"type":"succeeded"}}',
        b'{"custom_id": "row", "result": {"type": "succeeded", "message": ' + RAW + b"}}",
        b'{"custom_id":"row","result":{"type":"succeeded","message":' + RAW + b',"later":{}}}',
        b'{"custom_id":"row","result":{"type":"succeeded","message":' + RAW + b'},"later":{"x":{}}}',
        b'{ "result" :\t{ "message" : ' + RAW + b' , "type":"succeeded" } , "custom_id" : "row" }',
        # What looks like the message and is not it.
        b'{"custom_id":"row","message":{},"x":{"message":1},"result":{"x":[{"message":2}],"y":"\\"message\\":3",'
        b'"type":"succeeded","message":' + RAW + b"}}",
        # Of equal names the last one counts, as for Python's json.
        b'{"custom_id":"row","result":{},"result":{"type":"succeeded","message":1,"message":' + RAW + b"}}",
    ],
)  # fmt: skip
def test_a_message_is_kept_byte_for_byte(line: bytes) -> None:
    row = row_of(line)

    assert (RowKind.SUCCEEDED, "row", RAW, "end_turn") == (
        row.kind, row.custom_id, row.message, row.stop_reason,
    )  # fmt: skip
    assert Usage(input_tokens=3, output_tokens=4) == row.usage


@given(
    document=st.dictionaries(
        st.sampled_from(["message", "result", "type", "x", 'a"b', "{", "\u2028"]) | st.text(max_size=4),
        st.recursive(
            st.none() | st.booleans() | st.integers(-10**20, 10**20) | st.text()
            | st.floats(allow_nan=False, allow_infinity=False),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        ),
        max_size=5,
    ),
    separators=st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", "\r: ")]),
    is_ascii=st.booleans(),
)  # fmt: skip
def test_any_message_is_kept_byte_for_byte(
    document: dict[str, Any],
    separators: tuple[str, str],
    is_ascii: bool,  # noqa: FBT001
) -> None:
    text = json.dumps({**document, **MESSAGE}, separators=separators, ensure_ascii=is_ascii)
    raw = text.encode("utf-8", "replace")

    assert raw == row_of(succeeded(raw)).message


@pytest.mark.parametrize(
    ("message", "kept"),
    [
        (RAW.replace(b'"ok"', b'"ok \\ud83d"'), True),
        (RAW.replace(b'"ok"', b'"\xff\xfe"'), False),
        (RAW.replace(b"4}", b'4,"x":1e400}'), False),
        (RAW.replace(b"4}", b'4,"x":NaN}'), False),
    ],
    ids=["half a surrogate pair", "no UTF-8", "beyond a double", "no number"],
)
def test_a_message_that_cannot_be_stored_is_written_anew(message: bytes, *, kept: bool) -> None:
    row = row_of(succeeded(message))

    assert row.kind is RowKind.SUCCEEDED
    assert kept == (row.message == message)
    answer = row.answer()
    assert answer is not None
    assert "end_turn" == json.loads(answer.message, parse_constant=no_constant)["stop_reason"]


def test_a_message_under_an_escaped_name_is_written_anew() -> None:
    row = row_of(succeeded(RAW).replace(b'"message":', b'"mess\\u0061ge":', 1))

    assert MESSAGE == json.loads(row.message)


def test_a_message_without_usage_has_no_bill() -> None:
    row = row_of(succeeded(json.dumps({**MESSAGE, "usage": None}).encode()))

    assert (RowKind.SUCCEEDED, None, None) == (row.kind, row.bill, row.usage)


# Errors --------------------------------------------------------------------------------------------------------


def test_an_error_is_that_of_a_live_call() -> None:
    inner = {"type": "overloaded_error", "message": "Overloaded " + "x" * 5_000 + "\ud83d"}
    row = row_of(errored({"type": "error", "error": inner, "request_id": "req_1"}))

    failure = failure_of(row)
    assert (RowKind.ERRORED, "overloaded_error", 529, "req_1", False) == (
        row.kind, failure.type, failure.status, failure.request_id, failure.may_be_billed,
    )  # fmt: skip
    assert OVERLOADED == meaning(failure).reason
    assert len(failure.message) < MOST_MESSAGE + 100


@pytest.mark.parametrize("error", [None, "a reason", 7, [], {}, {"error": None}, {"type": ["x"]}])
def test_an_error_of_any_form_is_one(error: object) -> None:
    row = row_of(errored(error))

    assert RowKind.ERRORED is row.kind
    assert failure_of(row).message


@pytest.mark.parametrize("kind", [RowKind.CANCELED, RowKind.EXPIRED])
def test_a_row_that_was_not_run_has_no_failure(kind: RowKind) -> None:
    line = json.dumps({"custom_id": "row", "result": {"type": kind}}).encode()

    assert ResultRow("row", kind) == row_of(line)


# Broken lines --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "custom_id"),
    [
        (b"{", None),
        (b"\xff", None),
        (b"7", None),
        (b"[]", None),
        (b'{"result":{"type":"expired"}}', None),
        (b'{"custom_id":7,"result":{"type":"expired"}}', None),
        (b'{"custom_id":"a b","result":{"type":"expired"}}', None),
        (b'{"custom_id":"\\ud83d","result":{"type":"expired"}}', None),
        (b'{"custom_id":"' + b"a" * 65 + b'","result":{"type":"expired"}}', None),
        (b'{"custom_id":"row"}', "row"),
        (b'{"custom_id":"row","result":7}', "row"),
        (b'{"custom_id":"row","result":{}}', "row"),
        (b'{"custom_id":"row","result":{"type":"cancelled"}}', "row"),
        (b'{"custom_id":"row","result":{"type":["succeeded"]}}', "row"),
        (b'{"custom_id":"row","result":{"type":"succeeded"}}', "row"),
        (succeeded(b"7"), "row"),
        (succeeded(b'{"type":"error","error":{"type":"api_error"}}'), "row"),
        (b'{"custom_id":"row","result":{"type":"succeeded","message":{"con', "row"),
    ],
)
def test_a_broken_line_is_a_value_that_may_have_been_billed(
    line: bytes, custom_id: str | None
) -> None:
    row = row_of(line)

    assert (RowKind.BROKEN, custom_id) == (row.kind, row.custom_id)
    assert failure_of(row).may_be_billed
    assert ANSWER_TOO_LARGE != failure_of(row).type


@pytest.mark.parametrize(
    "message",
    [
        b"[" * 500 + b"]" * 500,
        b"[" * 100_000,
        b"[" + b"[]," * 1_300_000 + b"0]",
        RAW.replace(b"ok", b"x" * 8 * 1024 * 1024),
    ],
    ids=["deep", "deeper", "many parts", "long"],
)
def test_an_answer_that_is_too_large_keeps_its_custom_id(message: bytes) -> None:
    row = row_of(succeeded(message))

    assert (RowKind.BROKEN, "row", ANSWER_TOO_LARGE, True) == (
        row.kind, row.custom_id, failure_of(row).type, failure_of(row).may_be_billed,
    )  # fmt: skip


# Whatever upstream sends ---------------------------------------------------------------------------------------


def no_constant(name: str) -> NoReturn:
    raise AssertionError(name)


JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters())
    | st.sampled_from(["\ud83d", "x" * 5_000, "succeeded", "errored", 10**400, "2026-11-23T02:13:20Z"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["type", "error", "message", "content", "usage", "input_tokens", "stop_reason", "iterations"])
        | st.text(max_size=3), inner, max_size=4,
    ),
    max_leaves=15,
)  # fmt: skip
RESULT: Final = st.fixed_dictionaries(
    {"type": st.sampled_from(["succeeded", "errored"]) | JSON},
    optional={"message": JSON | JSON.map(lambda more: {**MESSAGE, "usage": more}), "error": JSON},
)
LINE: Final = st.fixed_dictionaries(
    {"custom_id": st.just("row") | JSON, "result": RESULT | JSON}
) | JSON  # fmt: skip


@given(line=LINE.map(lambda document: json.dumps(document).encode()) | st.binary(max_size=100))
def test_any_line_is_a_row_that_can_be_stored(line: bytes) -> None:
    row = row_of(line)

    assert row.custom_id is None or row.custom_id.isascii()
    assert row.stop_reason is None or len(row.stop_reason) <= MOST_NAME
    if row.kind is RowKind.SUCCEEDED:
        json.dumps(json.loads(row.message, parse_constant=no_constant), allow_nan=False)
        for count in (row.usage or Usage()).as_dict().values():
            assert 0 <= count <= 10 * MOST_COUNT
    if row.kind in {RowKind.ERRORED, RowKind.BROKEN}:
        failure = failure_of(row)
        assert len(failure.message) < MOST_MESSAGE + 100
        failure.message.encode()
        assert len(failure.type) <= MOST_NAME


FIELDS: Final = (
    "id",
    "processing_status",
    "request_counts",
    "created_at",
    "ended_at",
    "results_url",
)


@given(document=JSON | st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_any_batch_is_read_without_an_error(document: object) -> None:
    seen = seen_of(document)

    if seen is not None:
        json.dumps(asdict(seen)).encode()
        assert seen.requests is None or 0 <= seen.requests <= 20 * MOST_COUNT
        assert seen == seen_of({**document, "id": seen.id})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("counts", "requests", "known"),
    [
        (
            {"processing": 1, "succeeded": 2, "errored": 3, "canceled": 4, "expired": 5},
            15,
            Counts(1, 2, 3, 4, 5),
        ),
        ({"processing": 1, "paused": 2, "errored": None}, 3, Counts(1)),
        ({"processing": 1, "errored": "2"}, None, Counts(1)),
        ({"processing": True}, None, Counts()),
        ({"processing": 1.5}, None, Counts()),
        ({}, None, Counts()),
        (None, None, Counts()),
    ],
)
def test_requests_are_the_sum_of_all_counts_or_unknown(
    counts: object, requests: int | None, known: Counts
) -> None:
    assert Seen("msgbatch_1", requests=requests, counts=known) == seen_of(
        {"id": "msgbatch_1", "request_counts": counts}
    )
