"""Whatever a newer release adds to a stored record or a message, at any level, this release reads it as before.

Decision 0016: during a deployment and after a rollback an older release reads what a newer one wrote.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from io import BytesIO
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.adapters import job_records
from sluice.adapters.batch_records import _RUNNING as RUNNING
from sluice.adapters.batch_records import DynamoBatches
from sluice.adapters.dynamodb import (
    DynamoClientKeys,
    DynamoGovernorNotes,
    DynamoJobs,
    DynamoLedger,
    DynamoLimits,
    DynamoParams,
)
from sluice.adapters.s3 import DeadLetterObjects, Objects
from sluice.domain.batches import Batch, Options, Plan, Progress, RangeState, Source, Tally
from sluice.domain.breakers import Breaker
from sluice.domain.client_keys import key_id, verifier
from sluice.domain.jobs import (
    Attempt,
    AttemptOutcome,
    DueFor,
    JobError,
    Lease,
    Redrive,
    Snooze,
    State,
)
from sluice.domain.keys import KeyMark
from sluice.domain.pricing import Spend, Usage
from sluice.domain.rows import Record
from sluice.domain.shares import Note
from sluice.domain.workspaces import Workspace
from sluice.ports.jobs import Params, Received
from sluice.ports.messages import batch_messages, received, webhook_of
from sluice.worker.range_claim import Sums
from tests.fakes import NOON, FrozenClock, a_job, known_group

BY_NAME: Final = frozenset({"metadata", "circuits", "waiting", "stated", "workspaces"})
"""Maps whose names are data, not fields: what is in them is shown or used."""

NEWS: Final = st.dictionaries(
    st.from_regex(r"news_[a-z_]{1,8}", fullmatch=True),
    st.recursive(
        st.none() | st.booleans() | st.integers(0, 10**6) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=4,
    ),
    min_size=1,
    max_size=2,
)
"""Fields that this release does not know."""

COUNTS: Final = st.dictionaries(
    st.from_regex(r"news_[a-z_]{1,8}", fullmatch=True), st.integers(1, 9), min_size=1, max_size=2
)
"""Counters that this release does not know."""


@dataclass
class Table:
    """A DynamoDB client: it keeps the last item that was written, and every read returns that item."""

    item: dict[str, Any] = field(default_factory=dict)

    def put_item(self, **call: Any) -> Any:
        self.item = call["Item"]
        return {}

    def get_item(self, **_: Any) -> Any:
        return {"Item": self.item}

    def batch_get_item(self, **call: Any) -> Any:
        return {"Responses": {name: [self.item] for name in call["RequestItems"]}}

    def query(self, **_: Any) -> Any:
        return {"Items": [self.item]}

    def get_paginator(self, _: str) -> Table:
        return self

    def paginate(self, **_: Any) -> Any:
        return [{"Items": [self.item]}]

    def put_object(self, **call: Any) -> Any:
        self.item = json.loads(call["Body"])
        return {"ETag": '"e"'}

    def get_object(self, **_: Any) -> Any:
        return {"Body": BytesIO(json.dumps(self.item).encode())}

    def head_object(self, **_: Any) -> Any:
        at = date(2026, 11, 20)
        return {"ContentLength": 1, "ETag": '"e"', "LastModified": _Midnight(at)}

    def add(self, news: Mapping[str, Any]) -> None:
        """Add fields to the item: next to its attributes, and at every level of its record."""
        if "record" in self.item:
            record = json.loads(self.item["record"]["S"])
            self.item["record"] = {"S": json.dumps(more(record, news))}
        self.item |= {name: {"S": json.dumps(value)} for name, value in news.items()}


@dataclass(frozen=True)
class _Midnight:
    day: date

    def timestamp(self) -> float:
        return (self.day - date(1970, 1, 1)).days * 86_400.0


def more(value: Any, news: Mapping[str, Any]) -> Any:
    """Add fields at every level."""
    if isinstance(value, list):
        return [more(each, news) for each in value]
    if isinstance(value, dict):
        return {
            name: {key: more(inner, news) for key, inner in each.items()}
            if name in BY_NAME
            else more(each, news)
            for name, each in value.items()
        } | dict(news)
    return value


ERROR: Final = JobError("api_error", "no", 500)
JOB: Final = a_job(
    state=State.RUNNING,
    custom_id="one",
    metadata={"run": "7"},
    fallback_models=("claude-b",),
    attempts=(
        Attempt(1, "claude-a", NOON, NOON + 1, AttemptOutcome.RETRY, ERROR, "req_1", Usage(1, 2)),
    ),
    usage=Usage(1, 2),
    last_snooze=Snooze(NOON, "rate limited"),
    lease=Lease("worker", NOON + 5),
    error=ERROR,
    redrives=(Redrive(NOON, ERROR),),
)
GROUP: Final = replace(
    known_group(),
    version=1,
    day=known_group().requests,
    circuits={"model claude-a": Breaker(5, NOON + 5, 1, "claude-a", "a tenant", 1)},
    workspaces={"wrkspc_1": Workspace(NOON + 5, "spend limit", "key req", NOON, 500, NOON)},
    waiting={"worker": (3, NOON)},
    stated={"requests": 5},
    portions=(("0123abcd", 5), ("0123abcd/4567abcd", 5)),
    recent_writes=("a", "b"),
)
BATCH: Final = Batch(
    "msgbatch_1", "acme", "reviews", Source.FILE, NOON, NOON + 5, "in/acme/reviews.jsonl", "e",
    options=Options(model="claude-a", fallback_models=("claude-b",)),
    plan=Plan(0, 5, 5, 1, 5), tally=Tally(lines=1), due_at=NOON,
)  # fmt: skip
RANGE: Final = RangeState(
    "msgbatch_1", 0, "acme", 1, "worker", NOON, chunks=("1-abc",), not_before=NOON,
    model="claude-a", running=(1,), suspects=(1, 2), blamed=(3,),
)  # fmt: skip
KEY: Final = "sk-ant-test-acme"
LETTER: Final = Received("m-1", "r", "{}", None)


def _jobs(table: Any) -> DynamoJobs:
    return DynamoJobs(table, "T", 30)


def _batches(table: Any) -> DynamoBatches:
    return DynamoBatches(table, "T", 30, FrozenClock())


def _keys(table: Any) -> str | None:
    return DynamoClientKeys(table, "T", lambda: "pepper", FrozenClock()).tenant(KEY)


def _letters(table: Any) -> DeadLetterObjects:
    return DeadLetterObjects(Objects(table, "B"))


def _params(table: Any) -> DynamoParams:
    return DynamoParams(table, "T", Objects(table, "B"), FrozenClock(), 30)


STORED: Final[dict[str, tuple[Callable[[Any], object], Callable[[Any], object]]]] = {
    "job": (lambda t: _jobs(t).replace(JOB, 1), lambda t: _jobs(t).get("job_1")),
    "job in a list": (
        lambda t: _jobs(t).replace(JOB, 1),
        lambda t: _jobs(t).listing("acme", None, 9, None),
    ),
    "due job": (
        lambda t: _jobs(t).replace(JOB, 1),
        lambda t: _jobs(t).due(DueFor.CHECK, NOON, 9),
    ),
    "request": (
        lambda t: _params(t).add(Params("job_1", b"{}", "hash")),
        lambda t: _params(t).get_many(["job_1"]),
    ),
    "limit group": (
        lambda t: DynamoLimits(t, "T").replace(GROUP, 1),
        lambda t: (DynamoLimits(t, "T").load([GROUP.id]), DynamoLimits(t, "T").groups()),
    ),
    "key mark": (
        lambda t: DynamoLimits(t, "T").mark(KeyMark("main", "org", "f", "g")),
        lambda t: DynamoLimits(t, "T").marks(["main"]),
    ),
    "governor's note": (
        lambda t: DynamoGovernorNotes(t, "T", "n").write(Note(1, 2, 3, 4)),
        lambda t: DynamoGovernorNotes(t, "T", "n").read(),
    ),
    "batch": (
        lambda t: _batches(t).replace(BATCH, 1),
        lambda t: (_batches(t).get("msgbatch_1"), _batches(t).listing("acme", 5)),
    ),
    "range": (
        lambda t: _batches(t).replace_range(RANGE, 1),
        lambda t: (_batches(t).range_state(BATCH, 0), _batches(t).due(NOON, 1)),
    ),
    "progress": (
        lambda t: t.put_item(
            Item={"part": {"S": "section#1"}, "done": {"NS": ["1"]}, "lines": {"N": "7"}}
        ),
        lambda t: _batches(t).groups("msgbatch_1", "section#"),
    ),
    "name of a create": (
        lambda t: _batches(t).name_create("acme", "n", "msgbatch_1", NOON, fresh=True),
        lambda t: t.item["made"]["S"],
    ),
    "client key": (
        lambda t: t.put_item(
            Item={
                "key_id": {"S": key_id("pepper", KEY)},
                "hash": {"S": verifier("pepper", KEY)},
                "tenant": {"S": "acme"},
            }
        ),
        _keys,
    ),
    "usage": (
        lambda t: t.put_item(
            Item={
                "bucket": {"S": "2026-11-20#claude-a#live"},
                **{name: {"N": str(n)} for name, n in Spend(calls=1).as_dict().items()},
            }
        ),
        lambda t: DynamoLedger(t, "R", "S").spent("acme", date(2026, 11, 20), date(2026, 11, 20)),
    ),
    "dead letter": (
        lambda t: _letters(t).keep(LETTER, "why"),
        lambda t: _letters(t).letter("m-1"),
    ),
}


@pytest.mark.parametrize("kind", STORED)
def test_unknown_fields_of_a_stored_record_are_ignored_at_every_level(kind: str) -> None:
    write, read = STORED[kind]
    before = Table()
    write(before)
    expected = read(before)
    assert expected

    @settings(max_examples=40, deadline=None, database=None)
    @given(NEWS)
    def same(news: Mapping[str, Any]) -> None:
        table = Table()
        write(table)
        table.add(news)
        assert expected == read(table)

    same()


@settings(max_examples=100, deadline=None, database=None)
@given(NEWS)
def test_unknown_fields_of_a_parked_row_are_ignored(news: Mapping[str, Any]) -> None:
    item = json.loads(job_records.as_text(JOB))
    record = more(json.loads(item["record"]["S"]), news)
    item |= {"record": {"S": json.dumps(record)}, **{name: {"S": "x"} for name in news}}

    assert JOB == job_records.of_text(json.dumps(item))


@settings(max_examples=100, deadline=None, database=None)
@given(COUNTS)
def test_unknown_counters_of_a_row_are_ignored(counts: Mapping[str, int]) -> None:
    record = Record("R", 5, 1, "one", Tally(lines=1, succeeded=1), '{"a":1}')
    sums = json.dumps({**record.tally.as_dict(), **counts})
    line = f'R\t5\t1\tone\t{sums}\t{{"a":1}}\n'.encode()

    assert record == Record.decoded(line)
    added = Sums()
    added.add(line)
    assert record.tally == added.tally


@settings(max_examples=100, deadline=None, database=None)
@given(COUNTS)
def test_unknown_counters_of_a_running_range_are_ignored(counts: Mapping[str, int]) -> None:
    table = Table()
    tally = Tally(lines=7, succeeded=5)
    noted = {**tally.as_dict(), **counts}
    table.item = {"part": {"S": "section#1"}, f"{RUNNING}3": {"S": json.dumps(noted)}}

    assert {"section#1": Progress(frozenset(), Tally(), tally)} == _batches(table).groups(
        "msgbatch_1", "s"
    )


@settings(max_examples=100, deadline=None, database=None)
@given(NEWS)
def test_unknown_fields_of_a_message_are_ignored(news: Mapping[str, Any]) -> None:
    def record(body: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"messageId": "m", "body": json.dumps({**news, "v": 1, **body}), "attributes": {}}

    job = {"job_id": f"job_{'0' * 32}"}
    batch = {"batch_id": f"msgbatch_{'0' * 32}", "range": 5}
    webhook = {"webhook": "w", "tenant": "acme", "url": "https://a.example/", "body": "{}"}

    assert [job["job_id"]] == [each.job_id for each in received([record(job)])]
    (read,) = batch_messages([record(batch)])
    assert (batch["batch_id"], 5) == (read.batch_id, read.range)
    (message,) = received([record(webhook)])
    assert webhook_of(message) is not None


def test_the_sample_job_has_every_part_of_a_record() -> None:
    """So that no level is left out."""
    record = json.loads(job_records.encode(JOB, 30)["record"]["S"])

    assert {"attempts", "usage", "last_snooze", "lease", "error", "redrives"} <= record.keys()
    assert {"error", "usage"} <= record["attempts"][0].keys()
