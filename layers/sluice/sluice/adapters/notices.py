"""What has ended, told: as events on the account's default bus, and as webhooks to be delivered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from sluice.adapters import aws
from sluice.assemble import moment
from sluice.domain.errors import StoreBusy
from sluice.domain.jobs import SCHEMA_VERSION
from sluice.ports import Notice

if TYPE_CHECKING:
    from mypy_boto3_events import EventBridgeClient
    from mypy_boto3_sqs import SQSClient

SOURCE: Final = "sluice"
BUS: Final = "the event bus"
QUEUE: Final = "the webhooks queue"


class BusNotices:
    """The default event bus, and the queue of webhooks."""

    def __init__(self, bus: EventBridgeClient, sqs: SQSClient, webhooks_url: str) -> None:
        self._bus = bus
        self._sqs = sqs
        self._webhooks_url = webhooks_url

    def tell(self, notices: Sequence[Notice]) -> None:
        """Put an event for each of up to ten, and a message for each webhook; raises StoreBusy."""
        entries: Any = [
            {"Source": SOURCE, "DetailType": each.kind, "Detail": json.dumps(each.facts)}
            for each in notices
        ]
        answer = aws.patiently(BUS, self._bus.put_events, Entries=entries)
        if answer.get("FailedEntryCount"):
            raise StoreBusy(BUS)
        wanted = [each for each in notices if each.webhook is not None]
        if wanted:
            self._enqueue(wanted)

    def _enqueue(self, notices: Sequence[Notice]) -> None:
        entries: Any = [
            {
                "Id": str(position),
                "MessageBody": json.dumps(_message(notice)),
                # A fair queue: a tenant whose server is down does not delay the others' webhooks.
                "MessageGroupId": notice.tenant,
            }
            for position, notice in enumerate(notices)
        ]
        answer = aws.patiently(
            QUEUE, self._sqs.send_message_batch, QueueUrl=self._webhooks_url, Entries=entries
        )
        if answer.get("Failed"):
            raise StoreBusy(QUEUE)


def _message(notice: Notice) -> dict[str, object]:
    payload = {
        "type": notice.kind.lower().replace(" ", "."),
        "timestamp": moment(notice.at),
        "data": notice.facts,
    }
    return {
        "v": SCHEMA_VERSION,
        "webhook": notice.id,
        "tenant": notice.tenant,
        "url": notice.webhook,
        "body": json.dumps(payload, separators=(",", ":")),
    }
