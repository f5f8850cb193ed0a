"""Batches as a tenant's program makes and sees them: once per create, its own only, and in Anthropic's words."""

import asyncio
import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from sluice.api import document, requests, views
from sluice.domain.batches import Batch, Options, Phase, Source, Tally, delete_batch
from sluice.domain.errors import BatchNotFound, Conflict, InvalidRequest, Stale
from sluice.intake import batches as api
from sluice.intake import requests as validation
from sluice.intake.batches import Batches, Create, Inline, Link
from tests.bulk_fakes import Bulk, a_row, jsonl
from tests.fakes import MINUTE, NOON, VirtualClock

URL = "https://sluice.example"
DAY = 24 * 60 * MINUTE


class Caller:
    """One tenant at the door."""

    def __init__(self, bulk: Bulk, tenant: str = "acme") -> None:
        self.bulk = bulk
        self._drawn = 0
        self.batches = Batches(
            tenant,
            bulk.batches,
            bulk.objects,
            bulk.queues,
            bulk.queues,
            VirtualClock(bulk.time),
            self._random,
            bulk.events,
        )

    def _random(self, count: int) -> bytes:
        self._drawn += 1
        return bytes([self._drawn]) * count

    def create(self, *rows: object, **more: Any) -> Batch:
        options = more.pop("options", Options())
        return self.batches.create(Create(rows or [a_row(1)], options, **more))

    def run(self) -> None:
        """Plan what was created, and run it to the end."""
        while self.bulk.queues.plans:
            self.bulk.planner.plan(self.bulk.queues.plans.pop())
        self.bulk.drain()

    def shown(self, batch_id: str) -> dict[str, Any]:
        return views.message_batch(self.batches.get(batch_id), self.bulk.time.now(), URL)


@pytest.fixture
def bulk() -> Iterator[Bulk]:
    made = Bulk()
    yield made
    made.close()


@pytest.fixture
def caller(bulk: Bulk) -> Caller:
    return Caller(bulk)


# Creating --------------------------------------------------------------------------------------------------


def test_a_create_is_stored_as_the_file_it_would_have_been(caller: Caller) -> None:
    batch = caller.create(a_row(1), a_row(2))

    assert (
        jsonl(a_row(1), a_row(2)).replace(b": ", b":").replace(b", ", b",")
        == (caller.bulk.objects.stored[batch.input_key])
    )
    assert ("messages_batches", 2, NOON + DAY) == (batch.source, batch.rows, batch.expires_at)


def sent(bulk: Bulk) -> list[tuple[str, int]]:
    """The batch and number of every range message in the queue."""
    return [(batch_id, number) for _, batch_id, number, _ in bulk.queues.ranges.values()]


def test_a_create_starts_its_ranges_itself(caller: Caller) -> None:
    batch = caller.create(*(a_row(number) for number in range(250)))

    assert Phase.RUNNING == batch.phase
    assert batch == caller.batches.get(batch.batch_id)
    assert [(batch.batch_id, number) for number in range(3)] == sent(caller.bulk)
    assert [] == caller.bulk.queues.plans


def test_the_planner_starts_the_ranges_of_a_large_create(caller: Caller) -> None:
    """However large it is, the API sends one message for it."""
    rows = [a_row(f"{number:05}") for number in range(100 * (api.MOST_STARTED + 1))]

    batch = caller.create(*rows)

    assert Phase.PLANNING == batch.phase
    assert ([], [batch.batch_id]) == (sent(caller.bulk), caller.bulk.queues.plans)
    caller.bulk.planner.plan(batch.batch_id)
    assert batch.plan is not None
    assert range(batch.plan.ranges) == range(len(sent(caller.bulk)))
    assert Phase.RUNNING == caller.batches.get(batch.batch_id).phase


def test_ranges_that_the_queue_did_not_take_are_sent_by_the_planner(caller: Caller) -> None:
    caller.bulk.queues.untaken = [1]

    batch = caller.create(*(a_row(number) for number in range(250)))

    assert Phase.PLANNING == caller.batches.get(batch.batch_id).phase
    assert [batch.batch_id] == caller.bulk.queues.plans
    caller.run()
    assert 250 == len(caller.bulk.results())
    assert 250 == len(caller.bulk.claude.calls)


def test_a_small_batch_is_announced_and_starts_also_if_that_fails(caller: Caller) -> None:
    large = caller.create(*(a_row(number) for number in range(400)))
    small = caller.create(*(a_row(number) for number in range(10)))

    assert {small.batch_id} == {each.batch_id for each in caller.bulk.batches.announced}
    caller.bulk.batches.fail_next("announce")
    other = caller.create(*(a_row(number) for number in range(20)))
    assert ["newcomer not announced"] == caller.bulk.events.problem_names
    assert {large.batch_id, small.batch_id, other.batch_id} == {
        batch_id for batch_id, _ in sent(caller.bulk)
    }


def test_a_create_that_dies_before_it_is_marked_as_started_repeats_no_call(
    caller: Caller,
) -> None:
    caller.bulk.batches.fail_next("replace")

    batch = caller.create(*(a_row(number) for number in range(150)))

    assert Phase.PLANNING == caller.batches.get(batch.batch_id).phase
    (due,) = caller.bulk.batches.due(NOON + api.PLANNED_MS, 10)
    caller.bulk.once()
    # The sweep has it planned, so that all messages are sent again.
    caller.bulk.planner.plan(due.batch_id)
    caller.run()
    assert 150 == len(caller.bulk.results())
    assert 150 == len(caller.bulk.claude.calls)


def test_a_batch_that_is_read_after_its_deadline_keeps_the_answers_it_has(
    caller: Caller,
) -> None:
    """Its ranges may have run while the record still said that it was not started."""
    caller.bulk.batches.fail_next("replace")
    batch = caller.create(
        *(a_row(number) for number in range(150)), options=Options(deadline=NOON + MINUTE)
    )
    caller.bulk.once()
    answered = len(caller.bulk.claude.calls)
    caller.bulk.time.pass_seconds(120)

    caller.bulk.planner.plan(batch.batch_id)
    caller.run()

    ended = caller.batches.get(batch.batch_id)
    assert 0 < answered < 150
    assert (answered, 150 - answered, None) == (
        ended.tally.succeeded,
        ended.tally.expired,
        ended.problem,
    )


def test_a_create_that_is_sent_again_before_it_was_started_starts_it(caller: Caller) -> None:
    for verb in ("send_ranges", "send_plan"):
        caller.bulk.queues.fail_next(verb)
    first = caller.create()

    again = caller.create(retries=1)

    assert (first.batch_id, Phase.RUNNING) == (again.batch_id, again.phase)
    assert [(first.batch_id, 0)] == sent(caller.bulk)


def test_a_created_batch_runs_to_its_results(caller: Caller) -> None:
    batch = caller.create(a_row(1), a_row(2))
    assert {
        "id": batch.batch_id,
        "type": "message_batch",
        "processing_status": "in_progress",
        "request_counts": {
            "processing": 2, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0,
        },
        "created_at": "2026-11-20T12:00:00.000000Z",
        "expires_at": "2026-11-21T12:00:00.000000Z",
        "ended_at": None,
        "cancel_initiated_at": None,
        "archived_at": None,
        "results_url": None,
    } == caller.shown(batch.batch_id)  # fmt: skip

    caller.run()

    ended = caller.shown(batch.batch_id)
    assert "ended" == ended["processing_status"]
    assert {
        "processing": 0, "succeeded": 2, "errored": 0, "canceled": 0, "expired": 0,
    } == ended["request_counts"]  # fmt: skip
    assert f"{URL}/v1/messages/batches/{batch.batch_id}/results" == ended["results_url"]
    assert ended["ended_at"] is not None


def test_versions_and_betas_of_the_create_go_upstream(caller: Caller) -> None:
    options = Options(anthropic_version="2023-06-01", anthropic_beta="files-api")

    caller.create(options=options)
    caller.run()

    (call,) = caller.bulk.claude.calls
    assert ("2023-06-01", "files-api") == (
        call.request.anthropic_version,
        call.request.anthropic_beta,
    )


def test_each_create_is_a_batch_of_its_own(caller: Caller) -> None:
    assert caller.create().batch_id != caller.create().batch_id


def test_a_create_that_an_sdk_sends_again_finds_its_batch(caller: Caller) -> None:
    first = caller.create(client="python")

    again = caller.create(client="python", retries=1)
    other_program = caller.create(client="typescript", retries=1)
    other_rows = caller.create(a_row(2), client="python", retries=1)
    other_beta = caller.create(client="python", retries=1, options=Options(anthropic_beta="x"))

    assert first == again
    assert 4 == len({each.batch_id for each in (first, other_program, other_rows, other_beta)})


def test_a_create_whose_first_try_died_halfway_is_finished_by_the_second(caller: Caller) -> None:
    caller.bulk.batches.fail_next("add")
    with pytest.raises(Exception, match="busy"):
        caller.create()

    batch = caller.create(retries=1)
    again = caller.create(retries=2)

    assert batch == again
    assert 1 == len(caller.bulk.batches.stored)


def test_a_repeat_long_after_is_another_create(caller: Caller) -> None:
    first = caller.create()
    caller.bulk.time.pass_seconds(api.RETRY_MS / 1000 + 1)

    assert first.batch_id != caller.create(retries=1).batch_id


def test_an_idempotency_key_names_a_batch_for_good(caller: Caller) -> None:
    first = caller.create(idempotency_key="monday")
    caller.run()

    again = caller.create(idempotency_key="monday")

    assert first.batch_id == again.batch_id
    assert Phase.ENDED == again.phase
    assert [] == caller.bulk.queues.plans
    with pytest.raises(Conflict, match="was already used for a different batch"):
        caller.create(a_row(2), idempotency_key="monday")
    assert first.batch_id != Caller(caller.bulk, "other").create(idempotency_key="monday").batch_id


def test_a_deadline_may_be_nearer_or_farther_than_a_day(caller: Caller) -> None:
    near = caller.create(options=Options(deadline=NOON + MINUTE))
    far = caller.create(options=Options(deadline=NOON + 3 * DAY))
    never = caller.create(options=Options(deadline=NOON + 99 * DAY))

    assert [NOON + MINUTE, NOON + 3 * DAY, NOON + 13 * DAY] == [
        each.expires_at for each in (near, far, never)
    ]
    with pytest.raises(InvalidRequest, match="sluice-deadline: deadline is in the past"):
        caller.create(options=Options(deadline=NOON))


def test_a_busy_queue_does_not_lose_a_batch(caller: Caller) -> None:
    for verb in ("send_ranges", "send_plan"):
        caller.bulk.queues.fail_next(verb)

    batch = caller.create()

    (due,) = caller.bulk.batches.due(NOON + api.PLANNED_MS, 10)
    assert (batch.batch_id, None) == (due.batch_id, due.number)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "requests: List should have at least 1 item"),
        ([7], "requests.0: Input should be a valid dictionary"),
        ([{"params": {}}], "requests.0.custom_id: Field required"),
        ([{"custom_id": "a b", "params": {}}], "requests.0.custom_id: String should match pattern"),
        ([{"custom_id": "a"}], "requests.0.params: Field required"),
        ([{"custom_id": "a", "params": 1}], "requests.0.params: Input should be a valid dict"),
        ([{"custom_id": "a", "params": {}, "x": 1}], "requests.0.x: Extra inputs are not perm"),
        ([a_row(1), a_row(1)], "requests.1: duplicate custom_id 'row-1'; first used by item 0"),
        (
            [{"custom_id": "a", "params": {"x": "\ud800"}}],
            "requests.0: the request has text that is not",
        ),
    ],
)
def test_errors_of_a_create_use_the_messages_of_anthropics_api(
    caller: Caller, rows: list[object], message: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        caller.batches.create(Create(rows, Options()))

    assert str(refused.value).startswith(message)
    assert {} == caller.bulk.batches.stored


def test_no_more_rows_than_anthropic_takes(caller: Caller) -> None:
    with pytest.raises(InvalidRequest, match="requests: List should have at most 100000 items"):
        caller.batches.create(Create([a_row(1)] * 100_001, Options()))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "Input should be a valid dictionary"),
        ({}, "requests: Field required"),
        ({"requests": {}}, "requests: Input should be a valid list"),
        ({"requests": [], "x": 1}, "x: Extra inputs are not permitted (got 1)"),
    ],
)
def test_an_envelope_is_checked_in_anthropics_words(body: object, message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        requests.read_requests(body)

    assert message == str(refused.value)


def test_a_deadline_header_is_a_time_with_a_zone() -> None:
    assert validation.read_deadline(None) is None
    assert NOON == validation.read_deadline("2026-11-20T13:00:00+01:00")
    with pytest.raises(InvalidRequest, match="sluice-deadline: must be an RFC 3339 string"):
        validation.read_deadline("tomorrow")


# Looking ---------------------------------------------------------------------------------------------------


def test_no_tenant_sees_batches_of_others(caller: Caller) -> None:
    batch = caller.create()
    other = Caller(caller.bulk, "other")

    with pytest.raises(BatchNotFound, match=f"message_batch: {batch.batch_id} does not exist"):
        other.batches.get(batch.batch_id)
    with pytest.raises(BatchNotFound):
        other.batches.cancel(batch.batch_id)
    assert () == other.batches.page(20, None, None).batches


def test_a_list_goes_from_page_to_page(caller: Caller) -> None:
    made = []
    for number in range(5):
        caller.bulk.time.pass_seconds(1)
        made.append(caller.create(a_row(number)))

    first = caller.batches.page(2, None, None)
    second = caller.batches.page(2, first.batches[-1].batch_id, None)
    newer = caller.batches.page(2, None, second.batches[0].batch_id)

    assert ((made[4], made[3]), True) == (first.batches, first.has_more)
    assert ((made[2], made[1]), True) == (second.batches, second.has_more)
    assert ((made[4], made[3]), False) == (newer.batches, newer.has_more)
    with pytest.raises(InvalidRequest, match="not both"):
        caller.batches.page(2, "a", "b")


def test_progress_is_what_ranges_have_brought(caller: Caller) -> None:
    batch = caller.create(*(a_row(number) for number in range(230)))

    caller.bulk.once()

    halfway = caller.batches.progress(caller.batches.get(batch.batch_id))
    assert 0 < halfway.rows < 230
    assert 210 * halfway.rows == halfway.cost_micro_usd
    caller.run()
    assert 230 == caller.batches.progress(caller.batches.get(batch.batch_id)).rows


def test_progress_counts_the_rows_of_a_range_that_is_running(caller: Caller) -> None:
    bulk = caller.bulk
    bulk.claude.latency_ms = 10_000
    bulk.claude.when = lambda _: bulk.time.pass_seconds(0.1)
    batch = caller.create(*(a_row(number) for number in range(100)))
    seen: list[int] = []

    async def story() -> None:
        running = asyncio.ensure_future(bulk.invoke())
        while not running.done():
            seen.append(caller.batches.progress(caller.batches.get(batch.batch_id)).rows)
            await asyncio.sleep(0.5)
        await running

    bulk.time.run(story())

    assert [0, *sorted(seen[1:])] == seen
    assert any(0 < rows < 100 for rows in seen)
    assert 100 == caller.batches.progress(caller.batches.get(batch.batch_id)).rows


# Ending ----------------------------------------------------------------------------------------------------


def test_a_canceled_batch_is_canceling_and_then_ended(caller: Caller) -> None:
    batch = caller.create(*(a_row(number) for number in range(3)))

    caller.bulk.queues.plans.clear()
    canceled = caller.batches.cancel(batch.batch_id)
    assert [batch.batch_id] == caller.bulk.queues.plans, "its parked ranges are to be woken"
    again = caller.batches.cancel(batch.batch_id)

    assert "canceling" == caller.shown(batch.batch_id)["processing_status"]
    assert "2026-11-20T12:00:00.000000Z" == caller.shown(batch.batch_id)["cancel_initiated_at"]
    assert canceled == again
    caller.run()
    ended = caller.shown(batch.batch_id)
    assert ("ended", 3) == (ended["processing_status"], ended["request_counts"]["canceled"])
    with pytest.raises(InvalidRequest, match="has ended and cannot be canceled"):
        caller.batches.cancel(batch.batch_id)


def test_a_cancel_applies_to_the_current_state_of_the_batch(caller: Caller) -> None:
    batch = caller.create()
    newer = replace(batch, version=7)
    caller.bulk.batches.fail_next("replace", error=Stale(newer))
    caller.bulk.batches.stored[batch.batch_id] = newer

    assert 8 == caller.batches.cancel(batch.batch_id).version


def test_a_batch_deleted_in_the_meantime_is_not_found(caller: Caller) -> None:
    batch = caller.create()
    caller.bulk.batches.fail_next("replace", error=Stale(None))

    with pytest.raises(BatchNotFound):
        caller.batches.cancel(batch.batch_id)


def test_only_an_ended_batch_can_be_deleted(caller: Caller) -> None:
    batch = caller.create()
    with pytest.raises(InvalidRequest, match="is in_progress; it can be deleted once it has end"):
        caller.batches.delete(batch.batch_id)
    caller.run()

    caller.batches.delete(batch.batch_id)

    with pytest.raises(BatchNotFound):
        caller.batches.get(batch.batch_id)
    assert () == caller.batches.page(20, None, None).batches


def test_a_delete_that_another_request_did_first_succeeds(caller: Caller) -> None:
    batch = caller.create()
    caller.run()
    deleted = delete_batch(caller.batches.get(batch.batch_id))
    caller.bulk.batches.fail_next("replace", error=Stale(deleted))

    caller.batches.delete(batch.batch_id)


def test_a_delete_applies_to_the_current_state_of_the_batch(caller: Caller) -> None:
    batch = caller.create()
    caller.run()
    newer = replace(caller.batches.get(batch.batch_id), version=70)
    caller.bulk.batches.fail_next("replace", error=Stale(newer))
    caller.bulk.batches.stored[batch.batch_id] = newer

    caller.batches.delete(batch.batch_id)

    deleted = caller.bulk.batches.stored[batch.batch_id]
    assert (True, 71) == (deleted.deleted, deleted.version)


# Results ---------------------------------------------------------------------------------------------------


def test_results_are_in_the_answer_while_they_fit(caller: Caller) -> None:
    batch = caller.create(a_row(1), a_row(2))
    with pytest.raises(InvalidRequest, match="is in_progress; no results yet"):
        caller.batches.results(batch.batch_id, may_follow=True)
    caller.run()

    found = caller.batches.results(batch.batch_id, may_follow=False)

    assert isinstance(found, Inline)
    rows = [json.loads(line) for line in gzip.decompress(found.packed).splitlines()]
    assert ["row-1", "row-2"] == [row["custom_id"] for row in rows]


def test_large_results_are_a_link_for_those_who_drop_their_key_and_for_no_others(
    caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = caller.create()
    caller.run()
    monkeypatch.setattr(api, "MOST_INLINE_BYTES", 10)

    found = caller.batches.results(batch.batch_id, may_follow=True)

    assert Link(f"https://bucket.example/{batch.results_key}?seconds=900") == found
    with pytest.raises(InvalidRequest, match="Authorization: Bearer") as refused:
        caller.batches.results(batch.batch_id, may_follow=False)
    assert f"sluice batches results {batch.batch_id}" in str(refused.value)


def test_results_are_archived_after_29_days(caller: Caller) -> None:
    batch = caller.create()
    caller.run()
    ended = caller.batches.get(batch.batch_id)
    caller.bulk.batches.stored[batch.batch_id] = replace(ended, created_at=NOON - 29 * DAY)

    shown = caller.shown(batch.batch_id)

    assert shown["results_url"] is None
    assert "2026-11-20T12:00:00.000000Z" == shown["archived_at"]
    with pytest.raises(BatchNotFound):
        caller.batches.results(batch.batch_id, may_follow=True)


def test_a_file_is_listed_among_the_others(caller: Caller) -> None:
    caller.bulk.upload(jsonl(a_row(1)))

    (batch,) = caller.batches.page(20, None, None).batches

    assert "first" == batch.name


# Long lists of jobs ----------------------------------------------------------------------------------------


def test_a_long_list_of_jobs_becomes_a_batch(caller: Caller) -> None:
    jobs: list[Any] = [{"params": a_row(number)["params"]} for number in range(150)]
    jobs[7] |= {"custom_id": "mine", "deadline": "2026-11-21T12:00:00Z", "fallback_models": ["b"]}
    rows = requests.as_rows(jobs)

    batch = caller.create(*rows, source=Source.JOBS)
    caller.run()

    names = [row["custom_id"] for row in caller.bulk._jsonl(batch.results_key)]  # noqa: SLF001
    assert [*(f"job-{n}" for n in range(7)), "mine", *(f"job-{n}" for n in range(8, 150))] == names
    assert ("jobs", 150) == (batch.source, batch.rows)


@pytest.mark.parametrize("body", [{}, {"params": {}}])
def test_other_bodies_are_no_list(body: object) -> None:
    assert requests.read_list(body) is None


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (7, "jobs.100: Input should be a valid dictionary"),
        (
            {"params": {}, "metadata": {}},
            "jobs.100.metadata: not supported in lists of more than 100 jobs",
        ),
    ],
)
def test_what_a_row_cannot_have_is_refused_at_once(
    caller: Caller, job: object, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        caller.create(*requests.as_rows([{"params": {}}] * 100 + [job]), source=Source.JOBS)


def test_a_batch_is_shown_with_its_progress_and_when_it_will_end(caller: Caller) -> None:
    batch = caller.create(*(a_row(number) for number in range(200)))
    so_far = Tally(succeeded=40, invalid=10, cost_micro_usd=1_234_567)

    running = views.batch_view(caller.batches.get(batch.batch_id), so_far, NOON + 10 * MINUTE)
    caller.run()
    ended = caller.batches.get(batch.batch_id)
    shown = views.batch_view(ended, ended.tally, NOON + DAY)

    assert ("running", 200, 50, "1.234567") == (
        running["state"],
        running["rows"]["expected"],
        running["rows"]["done"],
        running["cost_usd"],
    )
    assert "2026-11-20T12:40:00.000Z" == running["estimated_end_at"]
    assert ("ended", 200, 200, None) == (
        shown["state"],
        shown["rows"]["expected"],
        shown["rows"]["done"],
        shown["estimated_end_at"],
    )
    planning = replace(batch, phase=Phase.PLANNING)
    assert "planning" == views.batch_view(planning, Tally(), NOON)["state"]
    document.Batch.model_validate_json(json.dumps(shown), strict=True)
    document.MessageBatch.model_validate_json(json.dumps(caller.shown(batch.batch_id)), strict=True)


def test_links_lead_to_the_three_files_of_a_batch(caller: Caller) -> None:
    batch = caller.create()
    with pytest.raises(InvalidRequest, match="no results yet"):
        caller.batches.links(batch.batch_id)
    caller.run()

    links = caller.batches.links(batch.batch_id)

    assert {"results", "errors", "summary"} == links.keys()
    assert f"https://bucket.example/{batch.errors_key}?seconds=900" == links["errors"]
