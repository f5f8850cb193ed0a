"""The batches function: a message whose work is not done continues at once, and is deleted when it is."""

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from functions.batches import app
from sluice.adapters.sqs import Hidden
from sluice.bulk import assemble
from sluice.wiring import batches as wiring
from sluice.wiring import shared
from tests.bulk_fakes import Bulk, a_row, jsonl
from tests.fakes import MINUTE


@pytest.fixture
def bulk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bulk]:
    """Return a batch whose last section must be joined, behind the function."""
    made = Bulk(joins_at_once=False)
    monkeypatch.setattr(wiring, "assemble", lambda: made.assemble)
    monkeypatch.setattr(shared, "telemetry", lambda: SimpleNamespace(flush=lambda: None))
    made.upload(jsonl(a_row(1), a_row(2)))
    made.once()
    yield made
    made.close()


@pytest.fixture
def hidden_for(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return for how many seconds the message was hidden, one time after the other."""
    seconds: list[int] = []

    def change_message_visibility(**said: Any) -> None:
        seconds.append(said["VisibilityTimeout"])

    client: Any = SimpleNamespace(change_message_visibility=change_message_visibility)
    monkeypatch.setattr(wiring, "hidden", lambda message: Hidden(client, "url", message))
    return seconds


def join(bulk: Bulk) -> dict[str, Any]:
    ((batch_id, section),) = bulk.queues.joins
    body = json.dumps({"v": 1, "batch_id": batch_id, "join": section})
    record = {"messageId": "m", "receiptHandle": "r", "body": body, "attributes": {}}
    return {"Records": [{**record, "eventSourceARN": "arn:aws:sqs:us-east-1:1:batches"}]}


def test_the_end_of_a_batch_continues_at_once_until_it_is_done(
    bulk: Bulk, hidden_for: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    event = join(bulk)

    with monkeypatch.context() as short:
        short.setattr(assemble, "END_MS", -1)
        first = app.handler(event, None)  # type: ignore[arg-type]
    second = app.handler(event, None)  # type: ignore[arg-type]

    assert {"batchItemFailures": [{"itemIdentifier": "m"}]} == first
    assert {"batchItemFailures": []} == second
    assert hidden_for.count(0) == 1, "visible at once, and only after the first"
    assert 2 == len(bulk.results())


def test_the_end_of_a_large_batch_waits_for_its_turn_among_those_of_its_tenant(
    bulk: Bulk, hidden_for: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble, "QUICK_TO_END_RANGES", 0)
    now = bulk.time.now()
    assert bulk.batches.take_turn(bulk.batch.tenant, "another", now, now + MINUTE)

    first = app.handler(join(bulk), None)  # type: ignore[arg-type]
    bulk.batches.end_turn(bulk.batch.tenant, "another")
    second = app.handler(join(bulk), None)  # type: ignore[arg-type]

    assert {"batchItemFailures": [{"itemIdentifier": "m"}]} == first
    assert {"batchItemFailures": []} == second
    assert hidden_for.count(15) == 1
    assert 2 == len(bulk.results())
