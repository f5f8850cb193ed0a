"""The options `lane` and `on_unmeetable`: the same value has the same outcome at every door, and is kept.

Which lanes there are is decided by the glossary: `live`, `batch` and `auto`. What Message Batches reject is copied from
the table of unsupported parameters in Anthropic's guide "Batch processing".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import count
from typing import Any, Final

import pytest

from sluice.adapters.batch_records import DynamoBatches
from sluice.api import document, views
from sluice.api import requests as api
from sluice.bulk.plan import PlanBatch
from sluice.domain.batches import AskedLane, Batch, Options, Phase, Source, Tally, file_batch_id
from sluice.domain.errors import Conflict, InvalidRequest, SluiceError
from sluice.domain.params import not_in_batches
from sluice.domain.upstream_batches import UpstreamBatch
from sluice.intake.batches import Batches, Create
from sluice.intake.requests import (
    ListedJob,
    read_items,
    read_lane,
    read_on_unmeetable,
)
from sluice.intake.uploads import Uploads
from tests.bulk_fakes import Bulk, MemoryLinks, a_row, jsonl
from tests.fakes import MINUTE, NOON, FrozenClock, VirtualClock

PARAMS: Final = {
    "model": "claude-a",
    "max_tokens": 64,
    "messages": [{"role": "user", "content": "Hi"}],
}
JOB: Final = {"params": PARAMS}
LANES: Final = ("live", "batch", "auto")

TEXTS: Final = ("", " ", "BATCH", "Batch", " batch", "batch ", "batch,live", "cheap", "null")
"""Values that are none, as a header or the metadata of an object may carry them."""
OTHERS: Final[tuple[Any, ...]] = (7, 0, True, False, 1.5, ["batch"], [], {"lane": "batch"}, {})
"""Values that are none, in JSON."""

WORDS: Final = {
    "lane": "Input should be 'live', 'batch' or 'auto'",
    "on_unmeetable": "Input should be 'run' or 'refuse'",
}


@pytest.fixture
def bulk() -> Iterator[Bulk]:
    made = Bulk()
    yield made
    made.close()


def planner(bulk: Bulk, default_lane: AskedLane = "live") -> PlanBatch:
    return PlanBatch(
        *(bulk.batches, bulk.objects, bulk.queues, bulk.assemble, ()),
        *(VirtualClock(bulk.time), bulk.events, bulk.upstream, bulk.lanes),
        default_lane=default_lane,
    )


def intake(bulk: Bulk, default_lane: AskedLane = "live") -> Batches:
    drawn = count(1)
    return Batches(
        *("acme", bulk.batches, bulk.objects, bulk.queues, bulk.queues),
        *(VirtualClock(bulk.time), lambda size: next(drawn).to_bytes(size), bulk.events),
        default_lane=default_lane,
    )


# Doors: what each says of a value of a field; None if it takes it ------------------------------------------------

Door = Callable[[Bulk, str, Any], str | None]


def one_job(_: Bulk, field: str, value: Any) -> str | None:
    body = {"lane": "batch", **JOB, field: value}
    alone = _refused(lambda: api.read_batch_of_one(body))
    if alone is not None or field == "on_unmeetable" or value in ("batch", "auto"):
        return alone
    found = api.read_submission(body)
    return str(found) if isinstance(found, SluiceError) else None


def list_of_jobs(_: Bulk, field: str, value: Any) -> str | None:
    return _refused(lambda: api.read_list({"lane": "batch", "jobs": [JOB], field: value}))


def options_of_an_upload(bulk: Bulk, field: str, value: Any) -> str | None:
    door = Uploads(
        *("acme", bulk.objects, MemoryLinks(bulk.objects), bulk.planner, lambda: "a secret"),
        bytes,
    )
    return _refused(lambda: door.start("first.jsonl", 9, {field: value}))


def options_file(bulk: Bulk, field: str, value: Any) -> str | None:
    bulk.objects.put("in/acme/first.options.json", json.dumps({field: value}).encode())
    bulk.upload(jsonl(a_row(1)))
    return bulk.batch.problem


def folder(bulk: Bulk, field: str, value: Any) -> str | None:
    bulk.objects.put("in/acme/docs/a.txt", b"text")
    options = {"prompt": "?", "model": "claude-a", "max_tokens": 9, field: value}
    bulk.upload(json.dumps(options).encode(), "docs/options.json")
    return bulk.batch.problem


def metadata(bulk: Bulk, field: str, value: Any) -> str | None:
    bulk.upload(jsonl(a_row(1)), **{f"sluice-{field.replace('_', '-')}": value})
    return bulk.batch.problem


def header(_: Bulk, field: str, value: Any) -> str | None:
    read: Callable[[str | None], object] = read_lane if field == "lane" else read_on_unmeetable
    return _refused(lambda: read(value))


def _refused(read: Callable[[], object]) -> str | None:
    try:
        read()
    except InvalidRequest as error:
        return str(error)
    return None


JSON_DOORS: Final = (one_job, list_of_jobs, options_of_an_upload, options_file, folder)
DOORS: Final = (*JSON_DOORS, metadata, header)


def without_place(message: str) -> str:
    """Without what names the door: `options.`, or the prefix of a header."""
    return message.removeprefix("options.").removeprefix("sluice-").replace("on-unm", "on_unm")


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
@pytest.mark.parametrize(
    ("field", "value"),
    [*(("lane", lane) for lane in LANES), ("on_unmeetable", "run"), ("on_unmeetable", "refuse")],
)
def test_every_door_takes_the_values_there_are(
    bulk: Bulk, door: Door, field: str, value: str
) -> None:
    assert door(bulk, field, value) is None


@pytest.mark.parametrize("door", JSON_DOORS, ids=lambda door: door.__name__)
@pytest.mark.parametrize("field", WORDS)
def test_null_asks_for_nothing(bulk: Bulk, door: Door, field: str) -> None:
    assert door(bulk, field, None) is None


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
@pytest.mark.parametrize("field", WORDS)
@pytest.mark.parametrize("value", TEXTS)
def test_every_door_refuses_other_text_in_the_same_words(
    bulk: Bulk, door: Door, field: str, value: str
) -> None:
    message = door(bulk, field, value)

    assert f"{field}: {WORDS[field]} (got {value!r})" == without_place(message or "accepted")


@pytest.mark.parametrize("door", JSON_DOORS, ids=lambda door: door.__name__)
@pytest.mark.parametrize("field", WORDS)
@pytest.mark.parametrize("value", OTHERS, ids=repr)
def test_every_door_refuses_other_types_in_the_same_words(
    bulk: Bulk, door: Door, field: str, value: object
) -> None:
    message = door(bulk, field, value)

    # A short value is shown, a list or an object is not.
    shown = f" (got {value!r})" if isinstance(value, int | float) else ""
    assert f"{field}: {WORDS[field]}{shown}" == without_place(message or "accepted")


@pytest.mark.parametrize("field", WORDS)
def test_a_row_has_no_lane_of_its_own(bulk: Bulk, field: str) -> None:
    bulk.upload(jsonl(a_row(1) | {field: "batch"}))
    bulk.drain()

    (error,) = bulk.errors()
    assert f"{field}: Extra inputs are not permitted (got 'batch')" == error["error"]["message"]


# Jobs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lane", ["batch", "auto"])
def test_a_job_of_a_list_names_no_lane(lane: str) -> None:
    in_short = api.read_submission(JOB | {"lane": lane})
    with pytest.raises(InvalidRequest) as in_batch:
        api.as_rows([JOB, JOB | {"lane": lane}])

    assert f"lane: is one for the whole list; set it beside `jobs` (got '{lane}')" == str(in_short)
    assert str(in_batch.value).startswith("jobs.1.lane: not supported in lists of more than 100")
    assert str(in_batch.value).endswith("; set it beside `jobs`")


@pytest.mark.parametrize("lane", [{}, {"lane": None}, {"lane": "live"}], ids=repr)
def test_without_a_batch_nothing_can_be_said_of_unmeetable_deadlines(lane: dict[str, Any]) -> None:
    said = {**lane, "on_unmeetable": "refuse"}
    one = api.read_submission(JOB | said)
    with pytest.raises(InvalidRequest) as refused:
        api.read_list({"jobs": [JOB] * 100, **said})
    long_list = api.read_list({"jobs": [JOB] * 101, **said})

    expected = "on_unmeetable: only a batch has it; set lane to 'batch' or 'auto', or omit it"
    assert f"{expected} (got 'refuse')" == str(one) == str(refused.value)
    assert long_list is not None
    assert ("refuse", True) == (long_list.options.on_unmeetable, long_list.is_batch)


@pytest.mark.parametrize(
    ("body", "is_batch"),
    [
        (JOB, False),
        (JOB | {"lane": "live"}, False),
        (JOB | {"lane": None}, False),
        (JOB | {"lane": "batch"}, True),
        (JOB | {"lane": "auto"}, True),
        ({"jobs": [JOB]}, False),
        ({"jobs": [JOB] * 100, "lane": "live"}, False),
        ({"jobs": [JOB], "lane": "batch"}, True),
        ({"jobs": [JOB], "lane": "auto"}, True),
        ({"jobs": [JOB] * 101}, True),
        ({"jobs": [JOB] * 101, "lane": "live"}, True),
    ],
)
def test_a_request_becomes_a_batch_by_its_lane_or_its_length(
    body: dict[str, Any], *, is_batch: bool
) -> None:
    listed = api.read_list(body)

    found = api.read_batch_of_one(body) is not None if listed is None else listed.is_batch
    assert is_batch == found


def test_one_job_for_a_batch_keeps_what_it_was_sent_with() -> None:
    body = JOB | {
        "lane": "auto",
        "on_unmeetable": "refuse",
        "custom_id": "a",
        "deadline": "2026-11-20T13:00:00Z",
        "fallback_models": ["claude-b"],
        "webhook": "https://acme.example/",
    }

    alone = api.read_batch_of_one(body)

    assert alone is not None
    own = {"lane", "on_unmeetable", "webhook"}
    assert {name: value for name, value in body.items() if name not in own} == alone.row
    assert alone.options == Options(
        deadline=NOON + 60 * MINUTE,
        webhook="https://acme.example/",
        lane="auto",
        on_unmeetable="refuse",
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"metadata": {"run": "7"}}, "metadata: not supported with lane 'batch'; rows of a batch"),
        ({"custom_id": "no spaces"}, "custom_id: String should match pattern"),
        ({"params": {}}, "params.model: Field required"),
        ({"x": 1}, "x: Extra inputs are not permitted (got 1)"),
        ({"webhook": "https://10.0.0.1/"}, "webhook: must not point to a private address"),
    ],
)
def test_one_job_for_a_batch_is_validated_like_any_other(more: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        api.read_batch_of_one(JOB | {"lane": "batch"} | more)

    assert str(refused.value).startswith(words)


@pytest.mark.parametrize(
    ("deadlines", "expected"),
    [
        (["2026-11-25T12:00:00Z", "2026-11-24T12:00:00Z"], NOON + 5 * 24 * 60 * MINUTE),
        (["2026-11-25T12:00:00Z", None], None),
        (["2026-11-25T12:00:00Z", "soon"], None),
        ([None], None),
    ],
)
def test_a_list_for_a_lane_may_wait_until_the_last_deadline_of_its_jobs(
    deadlines: list[str | None], expected: int | None
) -> None:
    jobs = [JOB | {"deadline": deadline} for deadline in deadlines]
    asked, not_asked = api.read_list({"jobs": jobs, "lane": "auto"}), api.read_list({"jobs": jobs})

    assert asked is not None
    assert not_asked is not None
    assert (expected, None) == (asked.options.deadline, not_asked.options.deadline)


def test_a_past_deadline_is_that_of_the_job_or_of_the_header(bulk: Bulk) -> None:
    create = Create([a_row(1)], Options(deadline=NOON))
    found = [
        _refused(lambda source=source: intake(bulk).create(replace(create, source=source)))  # type: ignore[misc]
        for source in (Source.JOBS, Source.MESSAGES_BATCHES)
    ]

    said = "deadline is in the past; send a later time"
    assert [said, f"sluice-deadline: {said}"] == found


# The lane in force -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("default", LANES)
@pytest.mark.parametrize("asked", [None, *LANES])
def test_the_lane_asked_for_is_in_force_otherwise_the_default_of_the_deployment(
    bulk: Bulk, default: AskedLane, asked: AskedLane | None
) -> None:
    bulk.planner = planner(bulk, default)

    created = intake(bulk, default).create(Create([a_row(1)], Options(lane=asked)))
    bulk.upload(jsonl(a_row(1)), **({} if asked is None else {"sluice-lane": asked}))

    (file,) = (each for each in bulk.batches.stored.values() if each.source is Source.FILE)
    expected = (asked, asked or default)
    assert expected == (created.options.lane, created.lane) == (file.options.lane, file.lane)


def test_a_later_default_changes_no_batch(bulk: Bulk) -> None:
    bulk.upload(jsonl(a_row(1)))
    bulk.planner = planner(bulk, "batch")

    bulk.upload(jsonl(a_row(1)))

    assert ("live", None) == (bulk.batch.lane, bulk.batch.options.lane)
    bulk.drain()
    assert ("live", Phase.ENDED) == (bulk.batch.lane, bulk.batch.phase)


@pytest.mark.parametrize(
    ("lane", "options", "shown"),
    [
        ("live", Options(), ("live", None, "run")),
        ("auto", Options(), ("auto", None, "run")),
        ("batch", Options(lane="batch", on_unmeetable="refuse"), ("batch", "batch", "refuse")),
    ],
)
def test_a_batch_shows_the_lane_asked_for_and_the_one_in_force(
    bulk: Bulk, lane: AskedLane, options: Options, shown: tuple[Any, ...]
) -> None:
    bulk.upload(jsonl(a_row(1)))
    view = views.batch_view(replace(bulk.batch, lane=lane, options=options), Tally(), NOON)

    document.Batch.model_validate_json(json.dumps(view), strict=True)
    assert shown == (view["lane"], view["lane_asked"], view["on_unmeetable"])


# Repeats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "problem", "batch_id"),
    [
        (Options(), None, "msgbatch_9f431a0af798a0a57ae688c087e1e9b2"),
        (
            Options(
                model="claude-b",
                max_tokens=7,
                deadline=1_800_000_000_000,
                fallback_models=("claude-c",),
                anthropic_version="2026-10-21",
                anthropic_beta="a",
                prompt="p",
                system="s",
                run="r",
                webhook="https://acme.example/",
            ),
            None,
            "msgbatch_fd48a0f6772fcc8bea41583b583eb7f5",
        ),
        (
            Options(webhook="https://acme.example/"),
            "options.max_tokens: no",
            "msgbatch_86a1940faa1f50271fd1070949f75b60",
        ),
    ],
)
def test_a_file_without_a_lane_has_the_id_that_releases_without_lanes_gave_it(
    options: Options, problem: str | None, batch_id: str
) -> None:
    """The ids were computed by commit c366989, the last one without lanes."""
    found = file_batch_id("acme", "in/acme/reviews.jsonl", "etag-1", options, problem)

    assert batch_id == found


def test_a_file_with_another_lane_is_another_batch(bulk: Bulk) -> None:
    for said in ({}, {"sluice-lane": "batch"}, {"sluice-lane": "auto"}):
        for _ in range(2):
            bulk.upload(jsonl(a_row(1)), **said)
    bulk.upload(jsonl(a_row(1)), **{"sluice-lane": "auto", "sluice-on-unmeetable": "refuse"})

    assert 4 == len(bulk.batches.stored)


def test_a_resent_request_for_another_lane_is_a_conflict_under_its_key(bulk: Bulk) -> None:
    door = intake(bulk)
    asked = Create([a_row(1)], Options(lane="batch"), idempotency_key="k")
    first = door.create(asked)

    again = door.create(asked)
    with pytest.raises(Conflict) as refused:
        door.create(replace(asked, options=Options()))

    assert first.batch_id == again.batch_id
    assert str(refused.value).startswith(
        "this Idempotency-Key was already used with lane 'batch' (now: no lane); send the same lane"
    )


def test_a_retry_of_an_sdk_finds_the_batch_of_its_own_lane(bulk: Bulk) -> None:
    door = intake(bulk)
    live = door.create(Create([a_row(1)], Options()))
    batch = door.create(Create([a_row(1)], Options(lane="batch")))

    again = [
        door.create(Create([a_row(1)], Options(lane=lane), retries=1)).batch_id
        for lane in (None, "batch")
    ]

    assert [live.batch_id, batch.batch_id] == again


# Stored records --------------------------------------------------------------------------------------------------


class OneRecord:
    """A table with the item that was last written."""

    def __init__(self) -> None:
        self.item: dict[str, Any] = {}

    def put_item(self, **request: Any) -> dict[str, Any]:
        self.item = request["Item"]
        return {}

    def get_item(self, **_: Any) -> dict[str, Any]:
        return {"Item": self.item}


def stored(batch: Batch) -> tuple[DynamoBatches, OneRecord]:
    table = OneRecord()
    records = DynamoBatches(table, "T", 30, FrozenClock())  # type: ignore[arg-type]
    records.replace(batch, 1)
    return records, table


def a_batch(**facts: Any) -> Batch:
    return Batch(
        *("msgbatch_1", "acme", "reviews", Source.FILE, NOON, NOON + 5),
        *("in/acme/reviews.jsonl", "e"),
        **facts,
    )


def test_a_batch_is_stored_with_its_lane() -> None:
    batch = a_batch(lane="auto", options=Options(lane="auto", on_unmeetable="refuse"))
    records, _ = stored(batch)

    assert batch == records.get(batch.batch_id)


def test_a_batch_of_a_release_without_lanes_is_live_and_asked_for_none() -> None:
    records, table = stored(a_batch(lane="batch", options=Options(lane="batch")))
    record = json.loads(table.item["record"]["S"])
    del record["lane"], record["options"]["lane"], record["options"]["on_unmeetable"]
    table.item["record"]["S"] = json.dumps(record)

    batch = records.get("msgbatch_1")

    assert a_batch() == batch
    assert ("live", None, None) == (batch.lane, batch.options.lane, batch.options.on_unmeetable)


def test_every_option_but_the_first_ones_has_a_default_that_leaves_ids_as_they_were() -> None:
    """A new option must be added to those that count only if they are set."""
    first = {
        *("model", "max_tokens", "deadline", "fallback_models", "anthropic_version"),
        *("anthropic_beta", "prompt", "system", "run", "webhook"),
    }

    assert {"lane", "on_unmeetable"} == {each.name for each in fields(Options)} - first


# What Message Batches reject -------------------------------------------------------------------------------------

REJECTED: Final[list[tuple[dict[str, Any], str]]] = [
    ({"stream": True}, "stream: true is not supported in Message Batches; remove it"),
    ({"speed": "fast"}, "speed: not supported in Message Batches; remove it"),
    ({"speed": "standard"}, "speed: not supported in Message Batches; remove it"),
    ({"store": True}, "store: not supported in Message Batches; remove it"),
    ({"previous_thread_event_id": "e"}, "previous_thread_event_id: not supported in Message"),
    ({"cache_hint": {}}, "cache_hint: not supported in Message Batches; remove it"),
    ({"context_hint": "x"}, "context_hint: not supported in Message Batches; remove it"),
    ({"research_preview_2026_02": "active"}, "research_preview_2026_02: not supported in"),
    ({"max_tokens": 0}, "max_tokens: 0 is not supported in Message Batches; use at least 1"),
]

TAKEN: Final[list[dict[str, Any]]] = [
    {},
    {"stream": False},
    {"max_tokens": 1},
    {"speed": None, "store": None},
    {"service_tier": "auto", "fallback_credit_token": "x", "metadata": {"speed": "fast"}},
]


@pytest.mark.parametrize(("more", "words"), REJECTED, ids=[str(row[0]) for row in REJECTED])
def test_what_message_batches_reject_is_named(more: dict[str, Any], words: str) -> None:
    assert (not_in_batches(PARAMS | more) or "accepted").startswith(words)


@pytest.mark.parametrize("more", TAKEN, ids=str)
def test_anything_else_is_left_to_claude(more: dict[str, Any]) -> None:
    assert not_in_batches(PARAMS | more) is None


@pytest.mark.parametrize("more", [row[0] for row in REJECTED if "stream" not in row[0]], ids=str)
def test_what_message_batches_reject_is_refused_for_the_lane_batch_only(
    bulk: Bulk, more: dict[str, Any]
) -> None:
    params = PARAMS | more
    problem = f"params.{not_in_batches(params)}, or set lane to 'live' or 'auto'"
    row = {"custom_id": "b", "params": params}
    refused = [
        _refused(lambda: api.read_batch_of_one({"params": params, "lane": "batch"})),
        _refused(lambda: read_items([a_row(1), row], ListedJob, "jobs", "batch")),
        _refused(lambda: intake(bulk).create(Create([a_row(1), row], Options(lane="batch")))),
        _refused(lambda: intake(bulk, "batch").create(Create([row], Options()))),
    ]

    assert [
        problem,
        f"jobs.1.{problem}",
        f"requests.1.{problem}",
        f"requests.0.{problem}",
    ] == refused
    assert {} == bulk.batches.stored
    door = intake(bulk)
    lanes: tuple[AskedLane, ...] = ("live", "auto")
    for lane in lanes:
        assert ["b"] == read_items([row], ListedJob, "jobs", lane)
        assert lane == door.create(Create([row], Options(lane=lane))).lane
    assert api.read_batch_of_one({"params": params, "lane": "auto"}) is not None


def test_a_batch_shows_what_its_lane_came_to(bulk: Bulk) -> None:
    bulk.upload(jsonl(a_row(1)), **{"sluice-lane": "batch"})
    record = UpstreamBatch(
        "upstream_1",
        "acme",
        (),
        "2026-10-21",
        None,
        NOON,
        NOON + 86_400_000,
        requests=7,
        reason="late",
    )

    view = views.batch_view(bulk.batch, Tally(), NOON)
    view["upstream_batches"] = [views.upstream_view(record)]

    document.Batch.model_validate_json(json.dumps(view), strict=True)
    assert ("batch", True) == (view["lane_decision"]["lane"], view["lane_decision"]["is_assured"])
    assert (7, "preparing", "late") == tuple(
        view["upstream_batches"][0][name] for name in ("requests", "state", "reason")
    )
