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


def test_the_end_of_a_batch_continues_at_once_until_it_is_done(
    bulk: Bulk, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden_for: list[int] = []

    def change_message_visibility(**said: Any) -> None:
        hidden_for.append(said["VisibilityTimeout"])

    client: Any = SimpleNamespace(change_message_visibility=change_message_visibility)
    monkeypatch.setattr(wiring, "hidden", lambda message: Hidden(client, "url", message))
    ((batch_id, section),) = bulk.queues.joins
    body = json.dumps({"v": 1, "batch_id": batch_id, "join": section})
    record = {"messageId": "m", "receiptHandle": "r", "body": body, "attributes": {}}
    event = {"Records": [{**record, "eventSourceARN": "arn:aws:sqs:us-east-1:1:batches"}]}

    with monkeypatch.context() as short:
        short.setattr(assemble, "END_MS", -1)
        first = app.handler(event, None)  # type: ignore[arg-type]
    second = app.handler(event, None)  # type: ignore[arg-type]

    assert {"batchItemFailures": [{"itemIdentifier": "m"}]} == first
    assert {"batchItemFailures": []} == second
    assert hidden_for.count(0) == 1, "visible at once, and only after the first"
    assert 2 == len(bulk.results())
