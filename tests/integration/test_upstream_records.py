"""One suite for the records of upstream batches: the fake the use cases are tested with, and DynamoDB itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from typing import Final

import pytest

from sluice.adapters.upstream_records import DynamoUpstreamRecords
from sluice.domain.completions import CompletionTimes, Observation
from sluice.domain.errors import Stale
from sluice.domain.upstream_batches import Phase, Slice, UpstreamBatch, accepted, give_back, take
from sluice.ports.upstream_records import DueStep, Learned, UpstreamRecords, Waiting
from tests.bulk_fakes import MemoryUpstreamRecords
from tests.fakes import NOON, FrozenClock
from tests.moto_aws import Aws, in_memory

KINDS: Final = ["fake", "aws"]


@pytest.fixture(scope="module")
def cloud() -> Iterator[Aws]:
    with in_memory() as running:
        yield running


@pytest.fixture(params=KINDS)
def records(request: pytest.FixtureRequest, cloud: Aws) -> UpstreamRecords:
    if request.param == "fake":
        return MemoryUpstreamRecords()
    name = sha256(request.node.name.encode()).hexdigest()[:16]
    cloud.create_table(name, like="BatchesTable")
    return DynamoUpstreamRecords(cloud.dynamodb, name, 30, FrozenClock())


def a_record(number: int = 1, **facts: object) -> UpstreamBatch:
    made = UpstreamBatch(
        upstream_id=f"upstream_{number:032x}",
        tenant="acme",
        slices=(Slice("msgbatch_1", 0, 3), Slice("msgbatch_2", 4, 5)),
        anthropic_version="2026-10-21",
        anthropic_beta=None,
        created_at=NOON,
        expires_at=NOON + 86_400_000,
        due_at=NOON,
        cuts=(30, 20),
        models=("claude-a", "claude-b"),
    )
    return replace(made, **facts)  # type: ignore[arg-type]


def test_what_is_stored_is_what_is_read(records: UpstreamRecords) -> None:
    record = a_record(phase=Phase.OPEN, message_batch_id="msgbatch_up", rescue_at=NOON + 5)
    records.add(record)

    assert record == records.get(record.upstream_id)
    assert records.get("upstream_none") is None


def test_an_id_is_used_once(records: UpstreamRecords) -> None:
    records.add(a_record())

    with pytest.raises(Stale) as stale:
        records.add(a_record(tenant="other"))

    assert a_record() == stale.value.current


def test_a_record_is_written_over_the_version_that_was_read(records: UpstreamRecords) -> None:
    first = a_record()
    records.add(first)
    second = take(first, "me", NOON)
    records.replace(second, first.version)

    with pytest.raises(Stale) as stale:
        records.replace(take(first, "another", NOON), first.version)

    assert second == stale.value.current == records.get(first.upstream_id)


def test_those_that_are_due_come_first_and_those_that_are_done_never(
    records: UpstreamRecords,
) -> None:
    records.add(a_record(1, due_at=NOON + 2))
    records.add(a_record(2, due_at=NOON + 1))
    records.add(a_record(3, due_at=NOON + 9))
    records.add(a_record(4, due_at=None, phase=Phase.DONE))

    first, second = (DueStep(a_record(number).upstream_id, "acme") for number in (2, 1))
    assert [first, second] == list(records.due(NOON + 2, 10))
    assert [first] == list(records.due(NOON + 9, 1))


def test_the_many_of_one_tenant_hide_none_of_another(records: UpstreamRecords) -> None:
    for number in range(1, 6):
        records.add(a_record(number, due_at=NOON + number))
    records.add(a_record(6, due_at=NOON + 6, tenant="other"))

    found = records.due(NOON + 9, 2)

    assert ["acme", "acme", "other"] == [each.tenant for each in found]


def test_one_that_waits_again_is_due_then(records: UpstreamRecords) -> None:
    record = a_record()
    records.add(record)
    taken = take(record, "me", NOON)
    opened = accepted(taken, "me", "msgbatch_up", NOON)
    records.replace(opened, record.version)
    records.replace(give_back(opened, "me", NOON + 60_000), opened.version)

    assert [] == list(records.due(NOON + 59_999, 10))
    assert [DueStep(record.upstream_id, "acme")] == list(records.due(NOON + 60_000, 10))


def test_the_list_is_in_order_of_time_and_a_repeat_changes_nothing(
    records: UpstreamRecords,
) -> None:
    late, early = Waiting("acme", "msgbatch_1", NOON + 1), Waiting("other", "msgbatch_2", NOON)
    for each in (late, early, late):
        records.wait(each)

    assert [early, late] == list(records.waiting(10))
    assert [early] == list(records.waiting(1))

    records.collected(early)
    records.collected(early)
    assert [late] == list(records.waiting(10))


def test_completion_times_are_learned(records: UpstreamRecords) -> None:
    assert Learned() == records.learned()
    seen = [Observation(NOON, NOON + minutes * 60_000, has_ended=True) for minutes in (5, 200)]

    for each in seen:
        records.observe(each)
    for minutes in range(60):
        records.observe(seen[0], minutes * 60_000)

    expected = CompletionTimes().observed(seen[0]).observed(seen[1])
    for _ in range(60):
        expected = expected.observed(seen[0])
    found = records.learned()
    law = found.times.law(NOON + 86_400_000)
    assert law.hazards == pytest.approx(expected.law(NOON + 86_400_000).hazards, abs=0.01)
    assert tuple(minutes * 60_000 for minutes in range(10, 60)) == found.cancels_ms
