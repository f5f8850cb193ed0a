"""What the governor starts for the batch lane each minute."""

from __future__ import annotations

import pytest

from sluice.domain.errors import StoreBusy
from sluice.domain.upstream_batches import Slice, UpstreamBatch
from sluice.ports.upstream_records import Waiting
from sluice.upkeep.start_steps import StartSteps
from tests.bulk_fakes import MemoryUpstreamRecords
from tests.fakes import NOON, FrozenClock, RecordingEvents


class Started:
    def __init__(self) -> None:
        self.ids: list[str | None] = []
        self.busy: set[str | None] = set()

    def start(self, upstream_id: str | None) -> None:
        if upstream_id in self.busy:
            raise StoreBusy("the upstream function")
        self.ids.append(upstream_id)


class Account:
    def __init__(self, executions: int) -> None:
        self.executions = executions
        self.reads = 0

    def at_once(self) -> int:
        self.reads += 1
        return self.executions


def due(records: MemoryUpstreamRecords, count: int, tenant: str = "acme") -> list[str]:
    ids = [f"upstream_{tenant}_{number:02d}" for number in range(count)]
    for number, upstream_id in enumerate(ids):
        records.add(
            UpstreamBatch(
                upstream_id=upstream_id,
                tenant=tenant,
                slices=(Slice("msgbatch_1", 0, 1),),
                anthropic_version="2026-10-21",
                anthropic_beta=None,
                created_at=NOON,
                expires_at=NOON,
                due_at=NOON - 1_000 + number,
            )
        )
    return ids


def run(records: MemoryUpstreamRecords, started: Started, account: Account) -> RecordingEvents:
    events = RecordingEvents()
    StartSteps(records, started, account, FrozenClock(), events)()
    return events


def test_nothing_runs_while_nothing_is_due() -> None:
    records, started, account = MemoryUpstreamRecords(), Started(), Account(1_000)
    records.add(
        UpstreamBatch("upstream_later", "acme", (), "2026-10-21", None, NOON, NOON, due_at=NOON + 1)
    )

    run(records, started, account)

    assert [] == started.ids
    assert 0 == account.reads


def test_each_batch_that_is_due_gets_an_invocation_and_so_does_the_collector() -> None:
    records, started = MemoryUpstreamRecords(), Started()
    ids = due(records, 3)
    records.wait(Waiting("acme", "msgbatch_1", NOON))

    run(records, started, Account(1_000))

    assert [*ids, None] == started.ids


@pytest.mark.parametrize(("executions", "expected"), [(10, 1), (150, 3), (1_000, 20), (5_000, 20)])
def test_a_small_account_keeps_its_executions_for_others(executions: int, expected: int) -> None:
    records, started = MemoryUpstreamRecords(), Started()
    ids = due(records, 30)

    run(records, started, Account(executions))

    assert ids[:expected] == started.ids


def test_one_that_cannot_be_started_delays_no_other() -> None:
    records, started = MemoryUpstreamRecords(), Started()
    ids = due(records, 3)
    started.busy = {ids[0]}

    run(records, started, Account(1_000))

    assert ids[1:] == started.ids


def test_the_many_of_one_tenant_do_not_delay_the_one_of_another() -> None:
    records, started = MemoryUpstreamRecords(), Started()
    due(records, 500)
    (quiet,) = due(records, 1, "quiet")

    run(records, started, Account(1_000))

    assert 20 == len(started.ids)
    assert quiet in started.ids[:2]
