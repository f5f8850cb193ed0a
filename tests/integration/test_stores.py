"""One suite for every store: the fakes the use cases are tested with, and DynamoDB and S3 themselves."""

from __future__ import annotations

import gzip
import json
import random
import string
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import fields, replace
from datetime import date, timedelta
from hashlib import sha256
from typing import Any, Final

import pytest
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    ReadTimeoutError,
)
from botocore.stub import Stubber
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sluice.adapters import aws, job_records
from sluice.adapters import dynamodb as dynamo
from sluice.adapters import s3 as objects
from sluice.api.views import job_summary
from sluice.domain.breakers import Breaker
from sluice.domain.client_keys import key_id
from sluice.domain.errors import (
    Conflict,
    InvalidRequest,
    JobNotFound,
    NotStorable,
    Stale,
    StoreBusy,
)
from sluice.domain.jobs import (
    Attempt,
    AttemptOutcome,
    Job,
    JobError,
    Lease,
    Redrive,
    Result,
    Snooze,
    State,
    lost_row,
)
from sluice.domain.keys import KeyMark
from sluice.domain.limits import Group, expires_at, new_group
from sluice.domain.models import KnownModels, with_answer
from sluice.domain.pricing import LedgerRow, Spend, Usage
from sluice.ports.jobs import JobStore, Ledger, Params, ParamsStore, Received, ResultStore
from sluice.ports.limits import MOST_GROUPS, LimitStore
from sluice.upkeep.dead_letters import DeadLetterStore
from tests.bulk_fakes import MemoryObjects
from tests.fakes import (
    NOON,
    FrozenClock,
    MemoryGraveyard,
    MemoryJobs,
    MemoryLedger,
    MemoryLimits,
    MemoryParams,
    MemoryResults,
    a_job,
)
from tests.moto_aws import BUCKET, PEPPER, Aws, in_memory

DAY: Final = date(2026, 11, 20)
DAY_SECONDS: Final = 86_400


@pytest.fixture(scope="module")
def cloud() -> Iterator[Aws]:
    with in_memory() as running:
        yield running


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A tenant, or a prefix of ids, that no other test uses: tables outlive a test."""
    return f"test-{sha256(request.node.name.encode()).hexdigest()[:16]}"


def data_bucket(cloud: Aws) -> objects.Objects:
    return objects.Objects(cloud.s3, BUCKET)


def dynamo_params(cloud: Aws) -> dynamo.DynamoParams:
    return dynamo.DynamoParams(
        cloud.dynamodb, "ParamsTable", data_bucket(cloud), FrozenClock(), retention_days=30
    )


KINDS: Final = ["fake", "aws"]


@pytest.fixture(params=KINDS)
def jobs(request: pytest.FixtureRequest, cloud: Aws) -> JobStore:
    if request.param == "fake":
        return MemoryJobs()
    return dynamo.DynamoJobs(cloud.dynamodb, "JobsTable", retention_days=30)


@pytest.fixture(params=KINDS)
def params(request: pytest.FixtureRequest, cloud: Aws) -> ParamsStore:
    return MemoryParams() if request.param == "fake" else dynamo_params(cloud)


@pytest.fixture(params=KINDS)
def results(request: pytest.FixtureRequest, cloud: Aws) -> ResultStore:
    return MemoryResults() if request.param == "fake" else objects.Results(data_bucket(cloud))


@pytest.fixture(params=KINDS)
def limits(request: pytest.FixtureRequest, cloud: Aws, name: str) -> LimitStore:
    if request.param == "fake":
        return MemoryLimits()
    cloud.create_table(name, like="LimitsTable")
    return dynamo.DynamoLimits(cloud.dynamodb, name)


@pytest.fixture(params=KINDS)
def ledger(request: pytest.FixtureRequest, cloud: Aws) -> Ledger:
    if request.param == "fake":
        return MemoryLedger()
    return dynamo.DynamoLedger(cloud.dynamodb, "LedgerTable", "UsageTable")


# Jobs ----------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
WORD = st.text(string.ascii_lowercase + "-", min_size=1, max_size=20)
TIME = st.integers(1, 4_000_000_000_000)
COUNT = st.integers(0, 10**9)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


USAGES = st.builds(
    Usage,
    **{each.name: COUNT for each in fields(Usage) if each.name not in {"fast", "us_only"}},
    fast=st.booleans(),
    us_only=st.booleans(),
)
ERRORS = st.builds(JobError, type=WORD, message=TEXT, status=maybe(st.integers(100, 599)))
ATTEMPTS = st.builds(
    Attempt,
    number=st.integers(1, 100),
    model=WORD,
    at=TIME,
    ended_at=maybe(TIME),
    outcome=maybe(st.sampled_from(AttemptOutcome)),
    error=maybe(ERRORS),
    request_id=maybe(WORD),
    usage=maybe(USAGES),
    cost_micro_usd=maybe(COUNT),
    alone=st.booleans(),
    version=COUNT,
    organization=maybe(WORD),
    key_id=WORD,
)
LEDGER_ROWS = st.builds(
    LedgerRow,
    tenant=WORD,
    day=st.dates(date(2026, 1, 1), date(2030, 1, 1)),
    call_id=WORD,
    job_id=WORD,
    model=WORD,
    lane=st.just("live"),
    organization=maybe(WORD),
    key_id=WORD,
    request_id=maybe(WORD),
    outcome=WORD,
    spend=st.builds(Spend, **{each.name: COUNT for each in fields(Spend)}),
    certain=st.booleans(),
    note=maybe(TEXT),
)
FALLBACKS = st.lists(WORD, max_size=3).map(tuple)
JOBS = st.builds(
    Job,
    job_id=st.uuids().map(lambda each: f"job_{each.hex}"),
    tenant=WORD,
    model=WORD,
    created_at=TIME,
    request_hash=WORD,
    input_chars=COUNT,
    max_tokens=st.integers(1, 10**6),
    anthropic_version=WORD,
    anthropic_beta=maybe(WORD),
    lane=st.just("live"),
    request_bytes=st.integers(0, 8 * 1024 * 1024),
    custom_id=maybe(WORD),
    deadline=maybe(TIME),
    fallback_models=FALLBACKS,
    metadata=st.dictionaries(TEXT, TEXT, max_size=3),
    webhook=maybe(WORD),
    state=st.sampled_from(State),
    version=st.integers(1, 1000),
    attempts_used=COUNT,
    snoozes=COUNT,
    last_snooze=maybe(st.builds(Snooze, at=TIME, reason=TEXT)),
    attempts=st.lists(ATTEMPTS, max_size=3).map(tuple),
    fallbacks_used=COUNT,
    not_before=maybe(TIME),
    lease=maybe(st.builds(Lease, owner=WORD, until=TIME)),
    started_at=maybe(TIME),
    finished_at=maybe(TIME),
    cancel_requested=st.booleans(),
    full_window=st.booleans(),
    usage=maybe(USAGES),
    cost_micro_usd=COUNT,
    unknown_costs=COUNT,
    result=maybe(
        st.builds(Result, inline=st.binary(min_size=1, max_size=50))
        | st.builds(Result, object_key=WORD)
    ),
    error=maybe(ERRORS),
    redrives=st.lists(st.builds(Redrive, at=TIME, error=ERRORS), max_size=2).map(tuple),
    uncertain_calls=COUNT,
    unbooked=st.lists(LEDGER_ROWS, max_size=2).map(tuple),
).map(lambda job: replace(job, fallbacks_used=min(job.fallbacks_used, len(job.fallback_models))))


def test_the_strategy_for_jobs_knows_every_field() -> None:
    """So that a new field of Job cannot be forgotten in the store."""
    lean = a_job()
    varied: set[str] = set()

    @settings(max_examples=300, database=None, derandomize=True)
    @given(JOBS)
    def look(job: Job) -> None:
        varied.update(
            each.name for each in fields(Job) if getattr(job, each.name) != getattr(lean, each.name)
        )

    look()

    assert {each.name for each in fields(Job)} - varied == {"lane"}


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(job=JOBS)
def test_a_job_is_read_as_it_was_written(jobs: JobStore, job: Job) -> None:
    earlier = jobs.get(job.job_id)
    if earlier is None:
        jobs.add(job)
    else:  # hypothesis likes to draw an id twice
        job = replace(job, version=earlier.version + 1)
        jobs.replace(job, earlier.version)

    assert job == jobs.get(job.job_id)
    assert {job.job_id: job} == jobs.get_many([job.job_id])


@settings(max_examples=200, deadline=None)
@given(job=JOBS)
def test_a_job_is_the_same_after_encoding(job: Job) -> None:
    assert job == job_records.decode(job_records.encode(job, retention_days=30))


@settings(max_examples=200, deadline=None)
@given(job=JOBS)
def test_fields_of_a_newer_release_are_ignored(job: Job) -> None:
    """So that a roll-back can read what the newer release wrote."""
    item = job_records.encode(job, retention_days=30)

    def more(value: Any) -> Any:
        if isinstance(value, list):
            return [more(each) for each in value]
        if isinstance(value, dict):
            return {name: more(each) for name, each in value.items()} | {"news": 1}
        return value

    record = json.loads(item["record"]["S"])
    newer = {name: value if name == "metadata" else more(value) for name, value in record.items()}
    item["record"] = {"S": json.dumps(newer | {"news": 1})}

    assert job == job_records.decode(item)


@pytest.mark.parametrize(
    ("facts", "retention_days", "expires"),
    [
        ({}, 1, 45 * DAY_SECONDS),
        ({}, 90, 90 * DAY_SECONDS),
        ({"not_before": NOON + 10 * DAY_SECONDS * 1000}, 1, 55 * DAY_SECONDS),
        ({"deadline": NOON + 60 * DAY_SECONDS * 1000}, 1, 105 * DAY_SECONDS),
        (
            {"state": State.RUNNING, "lease": Lease("worker-1", NOON + 44 * DAY_SECONDS * 1000)},
            1,
            89 * DAY_SECONDS,
        ),
        (
            {"last_snooze": Snooze(NOON + 44 * DAY_SECONDS * 1000, "rate limited")},
            1,
            89 * DAY_SECONDS,
        ),
        ({"state": State.SUCCEEDED, "finished_at": NOON + 5_000}, 1, DAY_SECONDS + 5),
    ],
)
def test_a_job_that_has_not_ended_is_kept_far_beyond_its_wait(
    facts: dict[str, Any], retention_days: int, expires: int
) -> None:
    item = job_records.encode(replace(a_job(), created_at=NOON, **facts), retention_days)

    assert str(NOON // 1000 + expires) == item["expires_at"]["N"]


@pytest.mark.parametrize(("retention_days", "days"), [(1, 45), (90, 90)])
def test_a_request_is_kept_as_long_as_its_job_may_wait(
    cloud: Aws, name: str, retention_days: int, days: int
) -> None:
    params = dynamo.DynamoParams(
        cloud.dynamodb, "ParamsTable", data_bucket(cloud), FrozenClock(), retention_days
    )

    params.add(Params(name, b"{}", "hash"))

    item = cloud.dynamodb.get_item(TableName="ParamsTable", Key={"job_id": {"S": name}})["Item"]
    assert str(NOON // 1000 + days * DAY_SECONDS) == item["expires_at"]["N"]


def test_a_name_used_again_does_not_find_a_request_about_to_expire(cloud: Aws, name: str) -> None:
    """Its job expired after 30 days, and the request has 15 days left; the new job may wait longer."""
    clock = FrozenClock(NOON)
    params = dynamo.DynamoParams(cloud.dynamodb, "ParamsTable", data_bucket(cloud), clock, 30)
    key = {"job_id": {"S": name}}

    def expires_in_days() -> int:
        item = cloud.dynamodb.get_item(TableName="ParamsTable", Key=key)["Item"]
        return (int(item["expires_at"]["N"]) - clock.at // 1000) // DAY_SECONDS

    params.add(Params(name, b"{}", "hash-1"))
    clock.at += 31 * DAY_SECONDS * 1000
    assert 14 == expires_in_days()

    params.add(Params(name, b"{}", "hash-1"))

    assert 45 == expires_in_days()
    clock.at += 31 * DAY_SECONDS * 1000
    with pytest.raises(Conflict):
        params.add(Params(name, b"[]", "hash-2"))
    params.add(Params(name, b"[]", "hash-2"), over_leftover=True)
    assert 45 == expires_in_days()
    with pytest.raises(Conflict):
        params.add(Params(name, b"{}", "hash-1"), over_leftover=True)
    assert {name: Params(name, b"[]", "hash-2")} == params.get_many([name])


def test_a_job_that_was_never_added_does_not_exist(jobs: JobStore) -> None:
    assert jobs.get("job_none") is None
    assert {} == jobs.get_many(["job_none"])
    assert {} == jobs.get_many([])


def test_a_second_job_under_an_id_reports_the_first(jobs: JobStore, name: str) -> None:
    first = a_job(name, custom_id="first")
    jobs.add(first)

    with pytest.raises(Stale) as stale:
        jobs.add(a_job(name, custom_id="second"))

    assert first == stale.value.current
    assert first == jobs.get(name)


def test_a_write_on_another_version_than_expected_reports_the_present(
    jobs: JobStore, name: str
) -> None:
    jobs.add(a_job(name))
    taken = a_job(name, version=2, state=State.RUNNING, lease=Lease("one", NOON))
    jobs.replace(taken, 1)

    with pytest.raises(Stale) as stale:
        jobs.replace(a_job(name, version=2, state=State.RUNNING, lease=Lease("two", NOON)), 1)

    assert taken == stale.value.current
    assert taken == jobs.get(name)


def test_only_one_of_two_makes_the_very_same_change(jobs: JobStore, name: str) -> None:
    """Two messages of one job in one batch claim it for one owner in one millisecond; one of them may call Claude."""
    jobs.add(a_job(name))
    taken = a_job(name, version=2, state=State.RUNNING, lease=Lease("one", NOON))
    jobs.replace(taken, 1)

    with pytest.raises(Stale) as stale:
        jobs.replace(taken, 1)
    with pytest.raises(Stale):
        jobs.add(taken)

    assert taken == stale.value.current


def test_a_job_that_is_missing_is_not_written_again(jobs: JobStore, name: str) -> None:
    with pytest.raises(Stale) as stale:
        jobs.replace(a_job(name, version=2), 1)

    assert stale.value.current is None
    assert jobs.get(name) is None


def test_more_jobs_than_one_read_can_bring_all_come(jobs: JobStore, name: str) -> None:
    ids = [f"{name}-{number}" for number in range(230)]
    for job_id in ids:
        jobs.add(a_job(job_id))

    found = jobs.get_many([*ids, ids[0], f"{name}-none"])

    assert set(ids) == set(found)


def listed(jobs: JobStore, tenant: str, state: State | None, limit: int) -> list[list[str]]:
    """The pages of a listing, up to the empty one that DynamoDB may end with."""
    pages, page = [], None
    while True:
        some = jobs.listing(tenant, state, limit, page)
        if some.jobs:
            pages.append([job.job_id for job in some.jobs])
        page = some.next_page
        if page is None:
            return pages


def test_a_listing_is_the_tenants_own_newest_first_page_by_page(jobs: JobStore, name: str) -> None:
    for number in (3, 1, 4, 0, 2):
        jobs.add(a_job(f"{name}-{number}", tenant=name, created_at=NOON + number))
    # Of the same millisecond: by id, so that a page never cuts them apart twice.
    jobs.add(a_job(f"{name}-5a", tenant=name, created_at=NOON + 5))
    jobs.add(a_job(f"{name}-5b", tenant=name, created_at=NOON + 5))
    jobs.add(a_job(f"{name}-other", tenant=f"{name}-other"))

    pages = listed(jobs, name, None, 3)

    assert [["5b", "5a", "4"], ["3", "2", "1"], ["0"]] == [
        [job_id.rpartition("-")[2] for job_id in page] for page in pages
    ]


@pytest.mark.parametrize("limit", [1, 2, 100])
def test_a_listing_of_one_state_leaves_none_out(jobs: JobStore, name: str, limit: int) -> None:
    wanted = []
    for number in range(12):
        state = State.ERRORED if number % 3 == 0 else State.SUCCEEDED
        jobs.add(a_job(f"{name}-{number}", tenant=name, created_at=NOON + number, state=state))
        wanted += [f"{name}-{number}"] if state is State.ERRORED else []

    pages = listed(jobs, name, State.ERRORED, limit)

    assert wanted[::-1] == [job_id for page in pages for job_id in page]
    assert all(len(page) <= limit for page in pages)


def test_a_listing_shows_what_a_summary_needs(jobs: JobStore, name: str) -> None:
    job = a_job(
        name,
        tenant=name,
        custom_id="mine",
        state=State.SUCCEEDED,
        finished_at=NOON + 5,
        attempts_used=2,
        snoozes=3,
        cost_micro_usd=44,
    )
    jobs.add(job)

    (found,) = jobs.listing(name, None, 20, None).jobs

    for each in (
        *("job_id", "tenant", "state", "custom_id", "lane", "model", "created_at"),
        *("finished_at", "attempts_used", "snoozes", "cost_micro_usd"),
    ):
        assert getattr(job, each) == getattr(found, each)


def test_an_empty_listing_is_empty(jobs: JobStore, name: str) -> None:
    assert [] == listed(jobs, name, None, 20)


@pytest.mark.parametrize("page", ["nonsense", "bm9uc2Vuc2U", "é", "I2pvYl8x", "//", "MQ=="])
def test_a_page_that_was_never_given_out_is_refused(jobs: JobStore, page: str) -> None:
    with pytest.raises(InvalidRequest, match="next_page of an earlier response"):
        jobs.listing("anybody", None, 20, page)


def test_a_page_that_ends_behind_no_job_is_refused(cloud: Aws) -> None:
    """DynamoDB would call it a key that is not valid, and we a failure of ours."""
    jobs = dynamo.DynamoJobs(cloud.dynamodb, "JobsTable", retention_days=30)

    with pytest.raises(InvalidRequest):
        jobs.listing("anybody", None, 20, urlsafe_b64encode(b"1#").decode())


def test_a_page_of_another_tenant_shows_nothing_of_it(jobs: JobStore, name: str) -> None:
    for number in range(3):
        jobs.add(a_job(f"{name}-{number}", tenant=f"{name}-a", created_at=NOON + number))
    page = jobs.listing(f"{name}-a", None, 1, None).next_page

    assert () == jobs.listing(f"{name}-b", None, 20, page).jobs


# Dead letters --------------------------------------------------------------------------------------------------


@pytest.fixture(params=KINDS)
def graveyard(request: pytest.FixtureRequest, cloud: Aws) -> DeadLetterStore:
    if request.param == "fake":
        return MemoryGraveyard()
    return objects.DeadLetterObjects(data_bucket(cloud))


def test_a_letter_is_read_as_it_was_kept(graveyard: DeadLetterStore, name: str) -> None:
    ours = Received(f"{name}-1", "receipt", '{"v": 1}', "job_1", receive_count=1_001, sent_at=NOON)
    foreign = Received(f"{name}-2", "receipt", "\x00 ü 💧", None)
    for message, reason in ((ours, "one"), (foreign, "two"), (foreign, "two")):
        graveyard.keep(message, reason)

    first, second = graveyard.letter(f"{name}-1"), graveyard.letter(f"{name}-2")

    assert first is not None
    assert second is not None
    assert ("job_1", "one", 1_001, NOON, '{"v": 1}') == (
        first.job_id, first.reason, first.receive_count, first.sent_at, first.body,
    )  # fmt: skip
    assert (None, "two", "\x00 ü 💧") == (second.job_id, second.reason, second.body)
    assert first.kept_at > 0
    found = [each for each in graveyard.letters() if each.message_id.startswith(name)]
    assert [first, second] == sorted(found, key=lambda each: each.message_id)
    assert graveyard.letter(name) is None, "no letter by the beginning of its name"


def test_more_letters_than_one_page_lists_are_all_found(cloud: Aws, name: str) -> None:
    # On a client of its own, which lists ten at a time.
    client = aws.s3()
    client.meta.events.register(
        "provide-client-params.s3.ListObjectsV2", lambda params, **_: params | {"MaxKeys": 10}
    )
    yard = objects.DeadLetterObjects(objects.Objects(client, BUCKET))
    for number in range(25):
        yard.keep(Received(f"{name}-{number}", "", "", None), "why not")

    assert 25 == sum(each.message_id.startswith(name) for each in yard.letters())
    del cloud


# Requests and answers ------------------------------------------------------------------------------------------


def noise(length: int) -> str:
    """Text that gzip cannot shrink below its alphabet's six bits a letter; always the same."""
    letters = string.ascii_letters + string.digits + "-_"
    return "".join(random.Random(7).choices(letters, k=length))  # noqa: S311 - not a secret


def text_of_size(size: int) -> str:
    """Text that has exactly `size` bytes when it is gzipped as the stores do it."""
    text = noise(size * 2)
    low, high = size, size * 2
    while high - low > 1:
        middle = (low + high) // 2
        if len(gzip.compress(text[:middle].encode(), compresslevel=6, mtime=0)) <= size:
            low = middle
        else:
            high = middle
    return text[:low]


def test_a_request_is_read_as_it_was_sent(params: ParamsStore, name: str) -> None:
    body = '{"model": "claude-a", "text": "Wässrig 💧 \\u0000", "n": 1.50}'.encode()
    params.add(Params(name, body, "hash-1"))

    assert {name: Params(name, body, "hash-1")} == params.get_many([name, f"{name}-none"])
    assert {} == params.get_many([])


def test_the_same_request_may_be_stored_again_and_another_may_not(
    params: ParamsStore, name: str
) -> None:
    params.add(Params(name, b"{}", "hash-1"))
    params.add(Params(name, b"{}", "hash-1"))

    with pytest.raises(Conflict, match=name):
        params.add(Params(name, b"[]", "hash-2"))

    assert {name: Params(name, b"{}", "hash-1")} == params.get_many([name])


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_a_request_travels_inline_up_to_its_limit(cloud: Aws, name: str, over: int) -> None:
    store = dynamo_params(cloud)
    body = text_of_size(dynamo.INLINE_BYTES + over).encode()

    store.add(Params(name, body, "hash-of-it"))

    assert {name: Params(name, body, "hash-of-it")} == store.get_many([name])
    assert (over > 0) == bool(cloud.objects(f"params/{name}"))


@pytest.mark.parametrize(
    ("days", "prefix"), [(1, "params"), (60, "params"), (61, "long-params"), (400, "long-params")]
)
def test_a_large_request_is_kept_as_long_as_results_are(
    cloud: Aws, name: str, days: int, prefix: str
) -> None:
    """The template lets objects under the two prefixes expire after 60 days, and after RetentionDays."""
    store = dynamo.DynamoParams(
        cloud.dynamodb, "ParamsTable", data_bucket(cloud), FrozenClock(), days
    )
    body = noise(600_000).encode()

    store.add(Params(name, body, "hash-1"))

    assert 1 == len(cloud.objects(f"{prefix}/{name}"))
    assert {name: Params(name, body, "hash-1")} == store.get_many([name])


def test_another_large_request_under_an_id_does_not_touch_the_first(cloud: Aws, name: str) -> None:
    store = dynamo_params(cloud)
    body = noise(600_000).encode()
    store.add(Params(name, body, "hash-1"))

    with pytest.raises(Conflict):
        store.add(Params(name, body[::-1], "hash-2"))

    assert {name: Params(name, body, "hash-1")} == store.get_many([name])


def test_a_large_request_whose_object_is_missing_is_missing(cloud: Aws, name: str) -> None:
    store = dynamo_params(cloud)
    store.add(Params(name, noise(600_000).encode(), "hash-1"))
    store.add(Params(f"{name}-small", b"{}", "hash-2"))
    for key in cloud.objects(f"params/{name}"):
        cloud.s3.delete_object(Bucket=BUCKET, Key=key)

    assert [f"{name}-small"] == list(store.get_many([name, f"{name}-small"]))


def test_many_requests_are_read_at_once_wherever_each_is_stored(
    params: ParamsStore, name: str
) -> None:
    texts = {f"{name}-{n}": noise(500_000) if n % 50 == 0 else f"[{n}]" for n in range(120)}
    bodies = {job_id: text.encode() for job_id, text in texts.items()}
    for job_id, body in bodies.items():
        params.add(Params(job_id, body, "hash"))

    found = params.get_many(list(bodies))

    assert bodies == {job_id: each.body for job_id, each in found.items()}
    assert all(job_id == each.job_id for job_id, each in found.items())


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_an_answer_travels_inline_up_to_its_limit(
    results: ResultStore, name: str, over: int
) -> None:
    message = text_of_size(objects.INLINE_BYTES + over)

    result = results.put(name, message)

    assert message == results.get(result)
    assert (over > 0) == (result.inline is None)
    assert (over > 0) == (result.object_key == f"results/{name}.json.gz")


def test_an_answer_that_outlived_its_retention_is_not_found(results: ResultStore) -> None:
    with pytest.raises(JobNotFound):
        results.get(Result(object_key="results/none.json.gz"))


@pytest.mark.parametrize("over", [0, 1])
def test_an_answer_that_a_busy_bucket_refuses_travels_inline_if_an_item_holds_it(
    cloud: Aws, name: str, over: int
) -> None:
    """Then nothing is called again."""
    bucket = MemoryObjects()
    store = objects.Results(bucket)  # type: ignore[arg-type]
    bucket.break_down("put")
    message = text_of_size(objects.MOST_INLINE_BYTES + over)

    with pytest.raises(StoreBusy):
        store.probe()
    if over:
        with pytest.raises(StoreBusy):
            store.put(name, message)
        return
    result = store.put(name, message)

    assert message == store.get(result)
    done = replace(a_job(name), result=result)
    dynamo.DynamoJobs(cloud.dynamodb, "JobsTable", retention_days=30).add(done)
    objects.Results(data_bucket(cloud)).probe()


def test_an_answer_may_be_stored_again(results: ResultStore, name: str) -> None:
    message = noise(20_000)
    first = results.put(name, message)

    assert first == results.put(name, message)
    assert message == results.get(first)


# Limits --------------------------------------------------------------------------------------------------------


def a_group(**facts: Any) -> Group:
    return replace(new_group("org", "haiku", NOON), **{"version": 1} | facts)


def test_a_group_is_read_as_it_was_written(limits: LimitStore) -> None:
    group = a_group(
        epoch=3,
        blocked_until=NOON + 5,
        blocked_reason="rate limited",
        rate_factor=900,
        under_way=12,
        under_way_at=NOON,
        warm_since=NOON - 5,
        drained_at=NOON - 7,
        blocked_by="main req_1",
        moved_to="another",
        circuits={"model claude-a": Breaker(5, NOON + 5, 1), "endpoint x": Breaker(1)},
        waiting={"worker": (3, NOON)},
    )
    limits.replace(group, 0)

    assert {"org/haiku": group} == limits.load(["org/haiku", "org/none"])
    assert {} == limits.load([])


def test_fields_of_groups_and_keys_of_a_newer_release_are_ignored(cloud: Aws) -> None:
    limits = dynamo.DynamoLimits(cloud.dynamodb, "LimitsTable")
    group = replace(new_group("newer", "haiku", NOON), version=1)
    limits.replace(group, 0)
    limits.mark(KeyMark("newer"))
    for item_id in ("group#newer/haiku", "key#newer"):
        key = {"id": {"S": item_id}}
        item = cloud.dynamodb.get_item(TableName="LimitsTable", Key=key)["Item"]
        record = json.loads(item["record"]["S"]) | {"news": 1}
        if "requests" in record:
            record["requests"]["news"] = 1
        item["record"] = {"S": json.dumps(record)}
        cloud.dynamodb.put_item(TableName="LimitsTable", Item=item)

    found = limits.load(["newer/haiku"]), limits.marks(["newer"])
    cloud.dynamodb.delete_item(TableName="LimitsTable", Key={"id": {"S": "group#newer/haiku"}})

    assert ({"newer/haiku": group}, {"newer": KeyMark("newer")}) == found


def test_only_one_of_two_may_begin_a_group(limits: LimitStore) -> None:
    """Two workers that thought of the very same change made it once: the other must look again."""
    limits.replace(a_group(), 0)

    with pytest.raises(Stale) as stale:
        limits.replace(a_group(), 0)

    assert a_group() == stale.value.current


def test_only_one_of_two_may_change_a_group(limits: LimitStore) -> None:
    limits.replace(a_group(), 0)
    limits.replace(a_group(version=2), 1)

    with pytest.raises(Stale) as stale:
        limits.replace(a_group(version=2), 1)
    with pytest.raises(Stale):
        limits.replace(a_group(version=9), 8)

    assert a_group(version=2) == stale.value.current


def test_a_group_that_was_deleted_is_reported_as_missing(limits: LimitStore) -> None:
    with pytest.raises(Stale) as stale:
        limits.replace(a_group(version=3), 2)

    assert stale.value.current is None


def test_all_groups_are_shown_in_order_and_nothing_else(limits: LimitStore) -> None:
    limits.mark(KeyMark("main"))
    limits.canary("a-canary", NOON)
    for model_group in ("sonnet", "haiku", "opus"):
        limits.replace(replace(new_group("org", model_group, NOON), version=1), 0)

    assert ["org/haiku", "org/opus", "org/sonnet"] == [group.id for group in limits.groups()]


def test_the_known_models_are_read_as_they_were_written(limits: LimitStore) -> None:
    assert KnownModels() == limits.models()
    models = with_answer(KnownModels(loaded={"claude-a": "haiku"}), "claude-new", "acme", NOON)

    limits.replace_models(models, 0)

    assert models == limits.models()
    with pytest.raises(Stale) as stale:
        limits.replace_models(models, 0)
    assert models == stale.value.current


def test_a_flood_of_groups_does_not_make_a_read_of_all_longer(cloud: Aws) -> None:
    limits = dynamo.DynamoLimits(cloud.dynamodb, "LimitsTable")
    for number in range(MOST_GROUPS + 1):
        limits.replace(replace(new_group("org", f"invented-{number}", NOON), version=1), 0)

    assert MOST_GROUPS == len(limits.groups())


def test_the_item_of_a_group_expires(cloud: Aws) -> None:
    group = replace(new_group("org", "haiku", NOON), version=1)
    dynamo.DynamoLimits(cloud.dynamodb, "LimitsTable").replace(group, 0)

    item = cloud.dynamodb.get_item(TableName="LimitsTable", Key={"id": {"S": "group#org/haiku"}})
    assert str(expires_at(group)) == item["Item"]["expires_at"]["N"]


def test_the_mark_of_a_key_is_read_as_it_was_written(limits: LimitStore) -> None:
    mark = KeyMark("main", "org", "fingerprint", "fingerprint")
    limits.mark(KeyMark("main"))
    limits.mark(mark)

    assert {"main": mark} == limits.marks(["main", "other"])
    assert {} == limits.marks([])


def test_a_canary_leaves_its_mark_for_a_day(cloud: Aws) -> None:
    dynamo.DynamoLimits(cloud.dynamodb, "LimitsTable").canary("one", NOON)

    found = cloud.dynamodb.get_item(TableName="LimitsTable", Key={"id": {"S": "canary#one"}})
    assert {
        "id": {"S": "canary#one"},
        "at": {"N": str(NOON)},
        "expires_at": {"N": str(NOON // 1000 + 86_400)},
    } == found["Item"]


# Ledger --------------------------------------------------------------------------------------------------------


def a_row(tenant: str, call_id: str = "job_1#1", **facts: Any) -> LedgerRow:
    row = LedgerRow(
        tenant=tenant,
        day=DAY,
        call_id=call_id,
        job_id="job_1",
        model="claude-a",
        lane="live",
        organization="org",
        key_id="main",
        request_id="req_1",
        outcome="succeeded",
        spend=Spend(1, 2, 3, 4, 5, 6),
    )
    return replace(row, **facts)


def test_a_tenants_organizations_are_those_of_its_calls(ledger: Ledger, name: str) -> None:
    """Usage reports do not show them."""
    row = lost_row(a_job(tenant=name), "2", "claude-a", NOON, "")
    other = lost_row(a_job(tenant=f"{name}-other"), "2", "claude-a", NOON, "")
    ledger.record([replace(row, organization="org-1"), replace(other, organization="org-2")])
    day = row.day

    assert {"org-1"} == ledger.organizations(name, day, day)
    assert set() == ledger.organizations(name, day + timedelta(1), day + timedelta(2))
    assert [] == list(ledger.spent(name, day - timedelta(9), day))


def test_a_row_is_written_only_if_its_call_has_none(ledger: Ledger, name: str) -> None:
    row = lost_row(a_job(name, tenant=name), "2", "claude-a", NOON, "")
    better = replace(row, outcome="succeeded", key_id="main", certain=True, note=None)

    assert [row] == list(ledger.record_missing([row]))
    ledger.record([better])

    assert [] == list(ledger.record_missing([row]))
    assert [better] == list(ledger.calls_of(name, [row.day], name))
    assert [] == list(ledger.calls_of(name, [row.day + timedelta(1)], name))


def test_sums_add_up(ledger: Ledger, name: str) -> None:
    one, two = Spend(1, 10, 20, 30, 40, 50), Spend(2, 1, 2, 3, 4, 5)
    ledger.add_up({(name, DAY, "claude-a", "live"): one, (name, DAY, "claude-b", "live"): two})
    ledger.add_up({(name, DAY, "claude-a", "live"): two})

    assert [
        (DAY, "claude-a", "live", Spend(3, 11, 22, 33, 44, 55)),
        (DAY, "claude-b", "live", two),
    ] == sorted(ledger.spent(name, DAY, DAY), key=lambda row: row[1])


def test_sums_are_shown_from_the_first_day_to_the_last(ledger: Ledger, name: str) -> None:
    for days in range(-2, 3):
        ledger.add_up({(name, DAY + timedelta(days), "claude-a", "live"): Spend(calls=1)})
        ledger.add_up({(f"{name}-other", DAY, "claude-a", "live"): Spend(calls=1)})

    spent = ledger.spent(name, DAY - timedelta(1), DAY + timedelta(1))

    assert [-1, 0, 1] == sorted((row[0] - DAY).days for row in spent)


@pytest.mark.parametrize("model", ["relay#1/model", "#", "a#b#c", "$"])
def test_a_model_may_be_called_anything(ledger: Ledger, name: str, model: str) -> None:
    ledger.add_up({(name, DAY, model, "live"): Spend(calls=1)})

    assert [(DAY, model, "live", Spend(calls=1))] == list(ledger.spent(name, DAY, DAY))


def ledger_items(cloud: Aws, tenant: str) -> list[dict[str, Any]]:
    found = cloud.dynamodb.query(
        TableName="LedgerTable",
        KeyConditionExpression="tenant_day = :day",
        ExpressionAttributeValues={":day": {"S": f"{tenant}#{DAY}"}},
    )
    return list(found["Items"])


def test_one_row_per_call_however_often_it_is_written(cloud: Aws, name: str) -> None:
    store = dynamo.DynamoLedger(cloud.dynamodb, "LedgerTable", "UsageTable")
    rows = [a_row(name, f"job_{number}#1") for number in range(60)]

    store.record([*rows, rows[0]])
    store.record(rows[:3])

    assert 60 == len(ledger_items(cloud, name))


def test_a_row_holds_what_an_audit_asks_for(cloud: Aws, name: str) -> None:
    store = dynamo.DynamoLedger(cloud.dynamodb, "LedgerTable", "UsageTable")

    store.record([a_row(name, certain=False, note="lost", request_id=None)])

    (item,) = ledger_items(cloud, name)
    assert {
        "tenant_day": {"S": f"{name}#2026-11-20"},
        "call_id": {"S": "job_1#1"},
        "job_id": {"S": "job_1"},
        "model": {"S": "claude-a"},
        "lane": {"S": "live"},
        "organization": {"S": "org"},
        "key_id": {"S": "main"},
        "outcome": {"S": "succeeded"},
        "note": {"S": "lost"},
        "calls": {"N": "1"},
        "input_tokens": {"N": "2"},
        "cache_creation_input_tokens": {"N": "3"},
        "cache_read_input_tokens": {"N": "4"},
        "output_tokens": {"N": "5"},
        "cost_micro_usd": {"N": "6"},
        "certain": {"BOOL": False},
        "expires_at": {"N": "1829692800"},
    } == item


# Client keys ---------------------------------------------------------------------------------------------------


def client_keys(cloud: Aws, clock: FrozenClock) -> dynamo.DynamoClientKeys:
    return dynamo.DynamoClientKeys(cloud.dynamodb, "ClientKeysTable", lambda: PEPPER, clock)


def test_a_client_key_belongs_to_its_tenant(cloud: Aws, name: str) -> None:
    key = f"sk-ant-test-{name}"
    cloud.add_client_key(key, "acme")
    cloud.add_client_key(f"{key}-disabled", "acme", disabled={"BOOL": True})
    cloud.add_client_key(f"{key}-enabled", "acme", disabled={"BOOL": False})
    keys = client_keys(cloud, FrozenClock())

    assert "acme" == keys.tenant(key)
    assert "acme" == keys.tenant(f"{key}-enabled")
    assert keys.tenant(f"{key}-disabled") is None
    assert keys.tenant(f"{key}-unknown") is None


def test_a_record_of_another_key_authenticates_no_caller(cloud: Aws, name: str) -> None:
    """An attacker who can write the table but does not know the pepper cannot make a key."""
    key = f"sk-ant-test-{name}"
    cloud.add_client_key(key, "acme", hash={"S": "0" * 64})

    assert client_keys(cloud, FrozenClock()).tenant(key) is None


def test_a_revoked_key_is_refused_within_a_minute(cloud: Aws, name: str) -> None:
    key, clock = f"sk-ant-test-{name}", FrozenClock()
    cloud.add_client_key(key, "acme")
    keys = client_keys(cloud, clock)
    keys.tenant(key)
    cloud.dynamodb.delete_item(
        TableName="ClientKeysTable", Key={"key_id": {"S": key_id(PEPPER, key)}}
    )

    clock.at += 59_999
    assert "acme" == keys.tenant(key)
    clock.at += 1
    assert keys.tenant(key) is None


def test_strangers_who_try_many_keys_do_not_make_a_tenants_key_unknown(
    cloud: Aws, name: str
) -> None:
    key = f"sk-ant-test-{name}"
    cloud.add_client_key(key, "acme")
    keys = client_keys(cloud, FrozenClock())
    keys.MOST_UNKNOWN = 5  # type: ignore[misc]
    keys.tenant(key)

    for n in range(20):
        keys.tenant(f"{key}-{n}")

    assert not keys.recall(key).needs_lookup
    assert "acme" == keys.recall(key).tenant
    assert keys.recall(f"{key}-0").needs_lookup, "only the last few are remembered"
    assert not keys.recall(f"{key}-19").needs_lookup


# When AWS does not do as it should -----------------------------------------------------------------------------

Verb = Callable[[Any], object]

BUSY: Final = [
    ("ThrottlingException", 400),
    ("ProvisionedThroughputExceededException", 400),
    ("InternalServerError", 500),
    ("SomethingNew", 503),
]


def client_error(code: str, status: int) -> ClientError:
    facts: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(facts, "PutItem")


@pytest.fixture
def client(cloud: Aws) -> Any:  # noqa: ARG001 - its credentials
    return aws.dynamodb()


VERBS: Final[list[tuple[str, str, Callable[[Any], object]]]] = [
    ("jobs.add", "put_item", lambda c: dynamo.DynamoJobs(c, "T", 30).add(a_job())),
    ("jobs.get", "get_item", lambda c: dynamo.DynamoJobs(c, "T", 30).get("a")),
    ("jobs.get_many", "batch_get_item", lambda c: dynamo.DynamoJobs(c, "T", 30).get_many(["a"])),
    ("jobs.replace", "put_item", lambda c: dynamo.DynamoJobs(c, "T", 30).replace(a_job(), 1)),
    ("jobs.listing", "query", lambda c: dynamo.DynamoJobs(c, "T", 30).listing("a", None, 1, None)),
    ("limits.load", "batch_get_item", lambda c: dynamo.DynamoLimits(c, "T").load(["a"])),
    ("limits.replace", "put_item", lambda c: dynamo.DynamoLimits(c, "T").replace(a_group(), 0)),
    ("limits.groups", "scan", lambda c: dynamo.DynamoLimits(c, "T").groups()),
    ("limits.marks", "batch_get_item", lambda c: dynamo.DynamoLimits(c, "T").marks(["a"])),
    ("limits.mark", "put_item", lambda c: dynamo.DynamoLimits(c, "T").mark(KeyMark("a"))),
    ("limits.models", "batch_get_item", lambda c: dynamo.DynamoLimits(c, "T").models()),
    (
        "limits.replace_models",
        "put_item",
        lambda c: dynamo.DynamoLimits(c, "T").replace_models(KnownModels(version=1), 0),
    ),
    ("limits.canary", "put_item", lambda c: dynamo.DynamoLimits(c, "T").canary("a", NOON)),
    ("ledger.record", "batch_write_item",
     lambda c: dynamo.DynamoLedger(c, "T", "S").record([a_row("a")])),
    ("ledger.add_up", "update_item",
     lambda c: dynamo.DynamoLedger(c, "T", "S").add_up({("a", DAY, "m", "live"): Spend()})),
    ("ledger.spent", "query", lambda c: list(dynamo.DynamoLedger(c, "T", "S").spent("a", DAY, DAY))),
    ("client keys", "get_item",
     lambda c: dynamo.DynamoClientKeys(c, "T", lambda: PEPPER, FrozenClock()).tenant("k")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("operation", "verb"), [row[1:] for row in VERBS], ids=[r[0] for r in VERBS]
)
def test_a_throttled_store_is_busy_after_four_tries(
    client: Any, operation: str, verb: Verb
) -> None:
    with Stubber(client) as stub:
        for code, status in BUSY:
            stub.add_client_error(operation, code, http_status_code=status)

        with pytest.raises(StoreBusy):
            verb(client)

        stub.assert_no_pending_responses()


def test_a_hiccup_is_not_noticed(client: Any) -> None:
    with Stubber(client) as stub:
        stub.add_client_error("get_item", "ThrottlingException", http_status_code=400)
        stub.add_response("get_item", {"Item": job_records.encode(a_job(), 30)})

        assert a_job() == dynamo.DynamoJobs(client, "T", 30).get("job_1")


def test_what_will_never_work_is_not_tried_again(client: Any) -> None:
    with Stubber(client) as stub:
        stub.add_client_error("get_item", "AccessDeniedException", http_status_code=400)

        with pytest.raises(client.exceptions.ClientError, match="AccessDenied"):
            dynamo.DynamoJobs(client, "T", 30).get("job_1")

        stub.assert_no_pending_responses()


class LosesReplies:
    """DynamoDB's client: one operation is done, and its reply is lost on the way, as often as `to_lose` says."""

    def __init__(self, operation: str) -> None:
        self._client = aws.dynamodb()
        self._operation = operation
        self.to_lose = 0

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)
        if name != self._operation:
            return call

        def lossy(**arguments: Any) -> Any:
            answer = call(**arguments)
            if self.to_lose:
                self.to_lose -= 1
                raise client_error("InternalServerError", 500)
            return answer

        return lossy


def test_a_write_whose_reply_was_lost_counts_as_done(cloud: Aws, name: str) -> None:
    """The second try meets the first one's item, and sees that it is its own."""
    client = LosesReplies("put_item")
    jobs = dynamo.DynamoJobs(client, "JobsTable", retention_days=30)  # type: ignore[arg-type]
    jobs.add(a_job(name))
    client.to_lose = 1

    jobs.replace(a_job(name, version=2, state=State.RUNNING), 1)

    assert not client.to_lose
    assert a_job(name, version=2, state=State.RUNNING) == jobs.get(name)
    del cloud


def test_of_jobs_stored_together_those_whose_ids_are_taken_are_left(
    jobs: JobStore, name: str
) -> None:
    taken = a_job(f"{name}-1", custom_id="first")
    jobs.add(taken)

    stored = jobs.add_new([a_job(f"{name}-{number}", tenant="o'neil") for number in range(25)])

    assert {f"{name}-{number}" for number in range(25)} - {f"{name}-1"} == stored
    assert taken == jobs.get(f"{name}-1")
    assert a_job(f"{name}-2", tenant="o'neil") == jobs.get(f"{name}-2")
    assert set() == jobs.add_new([a_job(f"{name}-2")])
    assert set() == jobs.add_new([])


def test_of_requests_stored_together_those_whose_ids_are_taken_are_left(
    params: ParamsStore, name: str
) -> None:
    params.add(Params(f"{name}-0", '{"first":"é"}'.encode(), "hash-0"))

    stored = params.add_new(
        [Params(f"{name}-{number}", b'{"second":"?"}', "hash") for number in range(3)]
    )

    assert {f"{name}-1", f"{name}-2"} == stored
    found = params.get_many([f"{name}-0", f"{name}-1"])
    assert '{"first":"é"}'.encode() == found[f"{name}-0"].body
    assert Params(f"{name}-1", b'{"second":"?"}', "hash") == found[f"{name}-1"]


def test_large_requests_are_not_stored_together(cloud: Aws, name: str) -> None:
    noise = random.Random(7).randbytes(dynamo.INSERTED_BYTES + 1).hex()  # noqa: S311 - no gzip gets below its bytes

    stored = dynamo_params(cloud).add_new(
        [Params(f"{name}-0", noise.encode(), "h"), Params(f"{name}-1", b"{}", "h")]
    )

    assert {f"{name}-1"} == stored


@pytest.mark.parametrize("replies_lost", [1, 4])
def test_jobs_stored_together_by_a_call_whose_reply_was_lost_are_known_by_their_marks(
    cloud: Aws, name: str, replies_lost: int
) -> None:
    client = LosesReplies("batch_execute_statement")
    jobs = dynamo.DynamoJobs(client, "JobsTable", retention_days=30)  # type: ignore[arg-type]
    jobs.add(a_job(f"{name}-0"))
    client.to_lose = replies_lost

    assert {f"{name}-1", f"{name}-2"} == jobs.add_new([a_job(f"{name}-{n}") for n in range(3)])
    assert not client.to_lose
    del cloud


def test_whether_jobs_were_stored_together_may_stay_unknown(name: str) -> None:
    client = aws.dynamodb()
    jobs = dynamo.DynamoJobs(client, "JobsTable", retention_days=30)

    with Stubber(client) as stub:
        for _ in range(4):
            stub.add_client_error("batch_execute_statement", "InternalServerError", "", 500)
        for _ in range(4):
            stub.add_client_error("batch_get_item", "ThrottlingException", "", 400)
        with pytest.raises(StoreBusy) as unknown:
            jobs.add_new([a_job(name)])
        for _ in range(4):
            stub.add_client_error("batch_execute_statement", "ThrottlingException", "", 400)
        with pytest.raises(StoreBusy) as refused:
            jobs.add_new([a_job(name)])

    assert unknown.value.may_be_done
    assert not refused.value.may_be_done


@pytest.mark.parametrize(
    "error",
    [ConnectTimeoutError(endpoint_url="https://aws"), ReadTimeoutError(endpoint_url="https://aws")],
)
def test_a_store_that_does_not_answer_is_busy(error: Exception) -> None:
    def call(**_: Any) -> None:
        raise error

    with pytest.raises(StoreBusy, match="the store is busy"):
        aws.patiently("the store", call)


@pytest.mark.parametrize(
    ("errors", "may_be_done"),
    [
        # Refused before anything was done, every time.
        ([ConnectTimeoutError(endpoint_url="https://aws")], False),
        ([EndpointConnectionError(endpoint_url="https://aws")], False),
        ([client_error("ThrottlingException", 400)], False),
        # Nobody knows, and the later tries do not show it either.
        ([ReadTimeoutError(endpoint_url="https://aws"), client_error("Throttling", 400)], True),
        ([client_error("InternalServerError", 500), client_error("Throttling", 400)], True),
    ],
)
def test_a_busy_store_says_whether_it_may_have_done_it(
    errors: list[Exception], *, may_be_done: bool
) -> None:
    said = iter(errors + errors[-1:] * 3)

    def call(**_: Any) -> None:
        raise next(said)

    with pytest.raises(StoreBusy) as busy:
        aws.patiently("the store", call)

    assert may_be_done == busy.value.may_be_done


@pytest.mark.parametrize(
    ("code", "status"), [("AccessDeniedException", 400), ("AccessDenied", 403), ("403", 403)]
)
def test_what_aws_refuses_is_noted_for_the_log(code: str, status: int) -> None:
    """S3 answers a HEAD without a body, so its error has the status for a name."""
    aws.take_refused()

    def call(**_: Any) -> None:
        raise client_error(code, status)

    with pytest.raises(ClientError):
        aws.patiently("the store", call)

    assert {"PutItem on the store": 1} == aws.take_refused()
    assert {} == aws.take_refused()


@pytest.mark.parametrize("code", ["ConditionalCheckFailedException", "ThrottlingException"])
def test_no_other_answer_counts_as_refused(code: str) -> None:
    aws.take_refused()

    def call(**_: Any) -> None:
        raise client_error(code, 400)

    with pytest.raises((ClientError, StoreBusy)):
        aws.patiently("the store", call)

    assert {} == aws.take_refused()


def test_a_statement_that_aws_refuses_is_noted_though_the_answer_is_200(client: Any) -> None:
    aws.take_refused()
    error = {"Code": "AccessDenied", "Message": "User is not authorized"}
    with Stubber(client) as stub:
        stub.add_response("batch_execute_statement", {"Responses": [{"Error": error}]})
        stub.add_response("batch_get_item", {"Responses": {"T": []}, "UnprocessedKeys": {}})
        jobs = dynamo.DynamoJobs(client, "T", 30)
        with suppress(StoreBusy):
            jobs.add_new([a_job("job_1")])

    assert {"BatchExecuteStatement on the jobs table": 1} == aws.take_refused()


def test_what_a_batch_left_over_is_asked_for_again(client: Any) -> None:
    one, two = a_job("job_1"), a_job("job_2")
    left_over = {"T": {"Keys": [{"job_id": {"S": "job_2"}}], "ConsistentRead": True}}
    with Stubber(client) as stub:
        stub.add_response(
            "batch_get_item",
            {"Responses": {"T": [job_records.encode(one, 30)]}, "UnprocessedKeys": left_over},
        )
        stub.add_response(
            "batch_get_item",
            {"Responses": {"T": [job_records.encode(two, 30)]}, "UnprocessedKeys": {}},
            {"RequestItems": left_over},
        )

        found = dynamo.DynamoJobs(client, "T", 30).get_many(["job_1", "job_2"])

        assert {"job_1": one, "job_2": two} == found


def test_rows_a_batch_left_over_indefinitely_are_busy_and_not_forgotten(client: Any) -> None:
    left_over = {"T": [{"PutRequest": {"Item": {"tenant_day": {"S": "a"}}}}]}
    with Stubber(client) as stub:
        for _ in range(5):
            stub.add_response("batch_write_item", {"UnprocessedItems": left_over})

        with pytest.raises(StoreBusy, match="the ledger"):
            dynamo.DynamoLedger(client, "T", "S").record([a_row("a")])

        stub.assert_no_pending_responses()


# What no store takes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code", ["ValidationException", "SerializationException", "EntityTooLarge"]
)
def test_a_record_that_aws_refuses_is_not_taken_for_a_busy_store(client: Any, code: str) -> None:
    """It would be tried again until the invocation ends, and then by the next worker."""
    with Stubber(client) as stub:
        stub.add_client_error("put_item", code, "too large" * 200, http_status_code=400)

        with pytest.raises(NotStorable, match="the jobs table cannot take the record") as refused:
            dynamo.DynamoJobs(client, "T", 30).replace(a_job(), 1)

        stub.assert_no_pending_responses()
    assert len(str(refused.value)) < 1_000


def test_a_job_above_the_size_of_an_item_cannot_be_stored(cloud: Aws, name: str) -> None:
    jobs = dynamo.DynamoJobs(cloud.dynamodb, "JobsTable", 30)

    with pytest.raises(NotStorable):
        jobs.add(a_job(name, metadata={"large": "x" * 450_000}))


def test_an_answer_that_is_no_unicode_cannot_be_stored(cloud: Aws) -> None:
    with pytest.raises(NotStorable, match="Unicode"):
        objects.Results(data_bucket(cloud)).put("job_1-1", "half an emoji: \ud83d")


def test_an_unknown_cost_is_unknown_in_listings_too(cloud: Aws, name: str) -> None:
    """The index of listings has no record, only a few attributes."""
    jobs = dynamo.DynamoJobs(cloud.dynamodb, "JobsTable", 30)
    job = a_job(name, tenant=name, cost_micro_usd=7, unknown_costs=2)
    jobs.add(job)

    (listed,) = jobs.listing(name, None, 10, None).jobs

    assert job == jobs.get(name)
    assert listed.unknown_costs
    assert job_summary(listed)["cost_micro_usd"] is None
