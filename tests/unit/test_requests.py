"""The same request is judged the same at every door: one table of inputs, each sent through all of them.

Expectations come from Anthropic's documentation of Messages and Message Batches: `custom_id` has 1 to 64 letters,
digits, hyphens or underscores and is required in a batch; `max_tokens` 0 is a legal request, which fills the prompt
cache. What cannot be sent as JSON in UTF-8 (RFC 8259: no NaN, no infinity) is rejected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from sluice.api import requests as api
from sluice.domain.batches import Options
from sluice.domain.errors import InvalidRequest, SluiceError
from sluice.domain.forms import csv_rows
from sluice.domain.rows import BadRow, Line, Row
from sluice.intake.requests import (
    BatchRequest,
    Beta,
    ListedJob,
    read_deadline,
    read_items,
    read_options,
    read_row,
    read_webhook,
)

GOOD = '{"model": "claude-a", "max_tokens": 64, "messages": [{"role": "user", "content": "Hi"}]}'
MESSAGES = '"messages": [{"role": "user", "content": "Hi"}]'

Verdict = str | None
"""Why an item is rejected, without its place in a list; None if it is accepted."""


def without_place(message: str) -> str:
    return re.sub(r"^(jobs|requests)\.\d+(\.|: )|^the (body|line) ", "", message)


def post_one(item: str) -> Verdict:
    try:
        body = api.read_json(item)
    except json.JSONDecodeError as error:
        return without_place(
            api.explained_form(
                [{"type": "json_invalid", "loc": ("body", error.pos), "ctx": {"error": error.msg}}]
            )
        )
    assert api.read_list(body) is None
    return _of(api.read_submission(body))


def post_list(item: str) -> Verdict:
    try:
        jobs = api.read_list(api.read_json(f'{{"jobs": [{item}]}}'))
    except json.JSONDecodeError as error:
        return error.msg
    assert jobs is not None
    return _of(api.read_submission(jobs.jobs[0]))


def post_long_list(item: str) -> Verdict:
    others = ", ".join([f'{{"params": {GOOD}}}'] * 100)
    try:
        jobs = api.read_list(api.read_json(f'{{"jobs": [{others}, {item}]}}'))
        assert jobs is not None
        rows = api.as_rows(jobs.jobs)
        read_items(rows, ListedJob, "jobs")
    except json.JSONDecodeError as error:
        return error.msg
    except InvalidRequest as error:
        return without_place(str(error))
    return _row(json.dumps(rows[100]).encode())


def sdk_batch(item: str) -> Verdict:
    try:
        items = api.read_requests(api.read_json(f'{{"requests": [{item}]}}'))
        read_items(items, BatchRequest, "requests")
    except json.JSONDecodeError as error:
        return error.msg
    except InvalidRequest as error:
        return without_place(str(error))
    return _row(json.dumps(items[0]).encode())


def jsonl(item: str) -> Verdict:
    return _row(item.encode(errors="surrogateescape"))


def _of(found: object) -> Verdict:
    return str(found) if isinstance(found, SluiceError) else None


def _row(text: bytes) -> Verdict:
    found = read_row(Line(0, 0, text), Options())
    assert found is not None
    return without_place(found.message) if isinstance(found, BadRow) else None


JOBS = (post_one, post_list, post_long_list)
BATCHES = (sdk_batch, jsonl)
ROWS = (post_long_list, jsonl)
ALL = (*JOBS, *BATCHES)


def item(params: str = GOOD, custom_id: str = '"a"', more: str = "") -> str:
    return f'{{"custom_id": {custom_id}, "params": {params}{more}}}'


def params(**fields: str) -> str:
    return json.dumps(json.loads(GOOD))[:-1] + "".join(
        f', "{name}": {value}' for name, value in fields.items()
    ) + "}"  # fmt: skip


def nested(levels: int) -> str:
    """A job of this many levels: itself, its params, and lists in a field."""
    return item(params(x="[" * (levels - 2) + "]" * (levels - 2)))


TABLE: list[tuple[str, str, Verdict]] = [
    ("a plain request", item(), None),
    ("fields that Sluice does not know", item(params(new_field='{"a": [1.50]}')), None),
    # Numbers
    ("a float in range", item(params(temperature="1e300")), None),
    ("1e400", item(params(temperature="1e400")), "the request has a number that is NaN, inf"),
    ("-1e400", item(params(temperature="-1e400")), "the request has a number that is NaN, inf"),
    ("NaN", item(params(temperature="NaN")), "the request has a number that is NaN, infinite"),
    ("Infinity", item(params(x="[Infinity]")), "the request has a number that is NaN, inf"),
    # Text
    ("an emoji", item(params(system='"\\ud83d\\ude00 \U0001f600"')), None),
    ("half a pair", item(params(system='"\\ud83d"')), "the request has text that is not valid"),
    ("half a pair, name", item(params(**{"\\ude00": "1"})), "the request has text that is not"),
    ("invalid UTF-8", item(params(system='"\udcff"')), "the request has text that is not valid"),
    ("a NUL", item(params(system='"\\u0000"')), None),
    # Depth
    ("100 levels", nested(100), None),
    ("101 levels", nested(101), "the request is nested too deeply: at most 100 levels"),
    ("900 levels", nested(900), "the request is nested too deeply: at most 100 levels"),
    ("many brackets, not deep", item(params(x="[" + "[]," * 200 + "[]]")), None),
    # max_tokens
    ("max_tokens 0", item(params(max_tokens="0")), None),
    ("max_tokens -1", item(params(max_tokens="-1")), "params.max_tokens: Input should be greater"),
    ("max_tokens 1.0", item(params(max_tokens="1.0")), "params.max_tokens: Input should be a val"),
    ("max_tokens true", item(params(max_tokens="true")), "params.max_tokens: Input should be a"),
    ("max_tokens text", item(params(max_tokens='"9"')), "params.max_tokens: Input should be a"),
    ("no max_tokens", item(f'{{"model": "m", {MESSAGES}}}'), "params.max_tokens: Field required"),
    # model
    ("an unknown model", item(params(model='"claude-none-such"')), None),
    ("no model", item(f'{{"max_tokens": 1, {MESSAGES}}}'), "params.model: Field required"),
    ("an empty model", item(params(model='""')), "params.model: String should have at least 1"),
    ("a long model", item(params(model=f'"{"m" * 257}"')), "params.model: String should have at"),
    # messages
    ("empty messages", item(params(messages="[]")), "params.messages: List should have at leas"),
    ("text messages", item(params(messages='"Hi"')), "params.messages: Input should be a valid l"),
    ("a text message", item(params(messages='["Hi"]')), "params.messages.0: Input should be a"),
    ("no messages", item('{"model": "m", "max_tokens": 1}'), "params.messages: Field required"),
    # stream
    ("stream false", item(params(stream="false")), None),
    ("stream true", item(params(stream="true")), "params.stream: Input should be False"),
    ("stream null", item(params(stream="null")), "params.stream: Input should be False"),
    # params
    ("params a list", item("[]"), "params: Input should be a valid dictionary"),
    ("params null", item("null"), "params: Input should be a valid dictionary"),
    ("no params", '{"custom_id": "a"}', "params: Field required"),
    # custom_id
    ("64 characters", item(custom_id=f'"{"x" * 64}"'), None),
    ("65 characters", item(custom_id=f'"{"x" * 65}"'), "custom_id: String should match pattern"),
    ("200 characters", item(custom_id=f'"{"x" * 200}"'), "custom_id: String should match patter"),
    ("a newline", item(custom_id='"a\\n"'), "custom_id: String should match pattern"),
    ("a newline inside", item(custom_id='"a\\nb"'), "custom_id: String should match pattern"),
    ("an umlaut", item(custom_id='"\u00e4"'), "custom_id: String should match pattern"),
    ("another digit", item(custom_id='"\u0661"'), "custom_id: String should match pattern"),
    ("an empty name", item(custom_id='""'), "custom_id: String should match pattern"),
    ("a number as name", item(custom_id="7"), "custom_id: Input should be a valid string"),
    # The whole item
    ("an unknown field", item(more=', "x": 1'), "x: Extra inputs are not permitted (got 1)"),
    ("duplicate keys", item(more=', "custom_id": "b"'), None),
    ("a misplaced field", item(more=', "system": "x"'), "Unknown top-level field `system`; move"),
]


@pytest.mark.parametrize("door", ALL, ids=lambda door: door.__name__)
@pytest.mark.parametrize(
    ("text", "expected"), [row[1:] for row in TABLE], ids=[r[0] for r in TABLE]
)
def test_every_door_says_the_same(
    door: Callable[[str], Verdict], text: str, expected: Verdict
) -> None:
    _assert_verdict(expected, door(text))


def _assert_verdict(expected: Verdict, found: Verdict) -> None:
    if expected is None:
        assert found is None
    else:
        assert (found or "accepted").startswith(expected)


@pytest.mark.parametrize(("_", "text", "expected"), TABLE, ids=[row[0] for row in TABLE])
def test_every_door_says_it_in_the_same_words(_: str, text: str, expected: Verdict) -> None:
    del expected

    assert 1 == len({door(text) for door in ALL})


@pytest.mark.parametrize(
    ("custom_id", "at_jobs", "at_batches"),
    [
        ('"custom_id": null, ', None, "custom_id: Input should be a valid string"),
        ("", None, "custom_id: Field required"),
    ],
    ids=["null", "absent"],
)
def test_a_job_needs_no_custom_id_and_a_row_of_a_batch_does(
    custom_id: str, at_jobs: Verdict, at_batches: Verdict
) -> None:
    text = f'{{{custom_id}"params": {GOOD}}}'

    assert [at_jobs] * 3 == [door(text) for door in JOBS]
    for door in BATCHES:
        _assert_verdict(at_batches, door(text))


DEADLINES = [
    ('"2026-12-24T18:00:00Z"', None),
    ('"2026-12-24T18:00:00.123456+01:00"', None),
    ("null", None),
    ('"2026-12-24T18:00:00"', "deadline: must be an RFC 3339 string with a time zone"),
    ('"2026-W52-4T18:00:00Z"', "deadline: must be an RFC 3339 string with a time zone"),
    ('"9999-12-31T23:59:59-14:00"', "deadline: must be an RFC 3339 string with a time zone"),
    ('"0001-01-01T00:00:00+14:00"', "deadline: must be an RFC 3339 string with a time zone"),
    ('"0001-01-01T00:00:00Z"', "deadline: must not be before the year 2000"),
    ('"1970-01-01T00:00:00Z"', "deadline: must not be before the year 2000"),
    ('"1999-12-31T23:59:59.999Z"', "deadline: must not be before the year 2000"),
    ("1700000000", "deadline: must be an RFC 3339 string with a time zone"),
    ('"1700000000"', "deadline: must be an RFC 3339 string with a time zone"),
    ('"soon"', "deadline: must be an RFC 3339 string with a time zone"),
]


@pytest.mark.parametrize(("value", "expected"), DEADLINES)
def test_a_deadline_is_the_same_wherever_it_is_set(value: str, expected: Verdict) -> None:
    text = item(more=f', "deadline": {value}')
    for door in (post_one, post_list, *ROWS):
        _assert_verdict(expected, door(text))

    _assert_verdict(expected, _options({"deadline": json.loads(value)}))
    _assert_verdict(expected, _header(json.loads(value)))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([], None),
        (["claude-b"] * 5, None),
        (["claude-b"] * 6, "fallback_models: List should have at most 5 items"),
        ([""], "fallback_models.0: String should have at least 1 character"),
        (["m" * 257], "fallback_models.0: String should have at most 256 characters"),
        ([7], "fallback_models.0: Input should be a valid string"),
        ("claude-b", "fallback_models: Input should be a valid list"),
        (None, "fallback_models: Input should be a valid list"),
    ],
)
def test_fallback_models_are_the_same_wherever_they_are_set(
    value: object, expected: Verdict
) -> None:
    text = item(more=f', "fallback_models": {json.dumps(value)}')

    for door in (post_one, post_list, *ROWS):
        _assert_verdict(expected, door(text))
    _assert_verdict(expected, _options({"fallback_models": value}))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, None),
        (64, None),
        (-1, "max_tokens: Input should be greater than or equal to 0"),
        (True, "max_tokens: Input should be a valid integer"),
        ("9", "max_tokens: Input should be a valid integer"),
    ],
)
def test_max_tokens_are_the_same_in_options(value: object, expected: Verdict) -> None:
    _assert_verdict(expected, _options({"max_tokens": value}))


def _header(deadline: Any) -> Verdict:
    try:
        read_deadline(deadline)
    except InvalidRequest as error:
        return str(error).removeprefix("sluice-")
    return None


def _options(said: dict[str, Any]) -> Verdict:
    try:
        read_options(said)
    except InvalidRequest as error:
        return str(error).removeprefix("options.")
    return None


@pytest.mark.parametrize(
    ("beta", "is_sent_as"),
    [
        ("files-api-2025-04-14", "files-api-2025-04-14"),
        ("a,b, c", "a,b, c"),
        # A header value has no spaces at its ends.
        (" a ", "a"),
        ("a\nb", None),
        ("a\r\nx-api-key: stolen", None),
        # Of a trailing line end nothing is sent.
        ("a\n", "a"),
        ("", None),
        ("   ", None),
        ("b\u00eata", None),
        ("a\x7f", None),
        ("\ud83d", None),
        ("x" * 1_025, None),
    ],
)
def test_a_beta_can_be_written_to_the_wire_or_is_refused(beta: str, is_sent_as: str | None) -> None:
    header: TypeAdapter[str] = TypeAdapter(Beta)

    if is_sent_as is None:
        with pytest.raises(ValidationError):
            header.validate_python(beta)
        with pytest.raises(InvalidRequest):
            read_options({"anthropic_beta": beta})
    else:
        assert is_sent_as == header.validate_python(beta)
        assert is_sent_as == read_options({"anthropic_beta": beta}).anthropic_beta


@pytest.mark.parametrize(
    "version", ["newest", "2026-10-21\n", " 2026-10-21", "\u0662026-10-21", ""]
)
def test_a_version_is_a_date(version: str) -> None:
    with pytest.raises(InvalidRequest, match=r"options\.anthropic_version: String should match"):
        read_options({"anthropic_version": version})
    assert "2026-10-21" == read_options({"anthropic_version": "2026-10-21"}).anthropic_version


@pytest.mark.parametrize(
    "url", ["http://acme.example/", "https://10.0.0.1/", "https://acme.example/\n", "https:///", ""]
)
def test_a_webhook_is_refused_in_the_same_words_everywhere(url: str) -> None:
    job = api.read_submission({"params": json.loads(GOOD), "webhook": url})
    with pytest.raises(InvalidRequest) as in_options:
        read_options({"webhook": url})
    with pytest.raises(InvalidRequest) as in_header:
        read_webhook(url)

    assert isinstance(job, InvalidRequest)
    assert str(job) == str(in_options.value).removeprefix("options.")
    assert str(job) == str(in_header.value).removeprefix("sluice-")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "m" * 257),
        ("system", ""),
        ("prompt", 7),
        ("run", ""),
        ("modle", "x"),
        ("system", "half a pair \ud83d"),
        ("max_tokens", float("inf")),
    ],
)
def test_options_that_no_row_could_use_are_refused(field: str, value: object) -> None:
    assert _options({field: value}) is not None


def test_options_that_are_no_object_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="options: Input should be a valid dictionary"):
        read_options([])


@pytest.mark.parametrize(
    ("custom_id", "expected"),
    [
        ("mine", None),
        ("x" * 65, "custom_id: String should match pattern"),
        ('"two\nlines"', "custom_id: String should match pattern"),
        ("", "custom_id: String should match pattern"),
    ],
)
def test_a_csv_column_names_rows_by_the_same_rule(custom_id: str, expected: Verdict) -> None:
    options = Options(prompt="{text}", model="claude-a", max_tokens=1)
    rows = csv_rows([f"custom_id,text\n{custom_id},Hi\n".encode()], options)

    found = read_row(Line(0, 0, b"".join(rows).strip()), options)

    if expected is None:
        assert isinstance(found, Row)
    else:
        assert isinstance(found, BadRow)
        assert found.message.startswith(expected)


def test_a_bad_row_keeps_its_name() -> None:
    """So that it has a result of its own."""
    found = read_row(Line(0, 0, item(params(temperature="1e400")).encode()), Options())

    assert isinstance(found, BadRow)
    assert "a" == found.custom_id


@pytest.mark.parametrize("door", ALL, ids=lambda door: door.__name__)
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        (item(params(x="9" * 5_000)), "a number with too many digits"),
        ("{", "Expecting property name"),
    ],
    ids=["deep", "long number", "half an object"],
)
def test_what_cannot_be_parsed_is_refused_everywhere(
    door: Callable[[str], Verdict], text: str, reason: str
) -> None:
    assert reason in (door(text) or "accepted")
