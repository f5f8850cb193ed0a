"""What has ended, told: as events on the account's default bus, and as webhooks to be delivered."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
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

AT_ONCE: Final = 10
"""Events, or messages, in one call."""

MOST_BYTES: Final = 200_000
"""The same together: EventBridge takes 256 KB, its own words about each event among them."""


class BusNotices:
    """The default event bus, and the queue of webhooks."""

    def __init__(self, bus: EventBridgeClient, sqs: SQSClient, webhooks_url: str) -> None:
        self._bus = bus
        self._sqs = sqs
        self._webhooks_url = webhooks_url

    def tell(self, notices: Sequence[Notice]) -> None:
        """Put an event for each, and a message for each webhook; raises StoreBusy."""
        entries = [
            {"Source": SOURCE, "DetailType": each.kind, "Detail": _json(each.facts)}
            for each in notices
        ]
        for some in _that_fit(entries, "Detail"):
            answer = aws.patiently(BUS, self._bus.put_events, Entries=some)
            if answer.get("FailedEntryCount"):
                raise StoreBusy(BUS)
        wanted = [each for each in notices if each.webhook is not None]
        messages = [
            {
                "Id": str(position),
                "MessageBody": _json(_message(notice)),
                # A fair queue: a tenant whose server is down does not delay the others' webhooks.
                "MessageGroupId": notice.tenant,
            }
            for position, notice in enumerate(wanted)
        ]
        for some in _that_fit(messages, "MessageBody"):
            sent = aws.patiently(
                QUEUE, self._sqs.send_message_batch, QueueUrl=self._webhooks_url, Entries=some
            )
            if sent.get("Failed"):
                raise StoreBusy(QUEUE)


def _that_fit(entries: Sequence[dict[str, str]], part: str) -> Iterator[Any]:
    """Yield the entries in calls that AWS takes: ten, and not too large together."""
    some: list[dict[str, str]] = []
    size = 0
    for entry in entries:
        more = len(entry[part].encode())
        if some and (len(some) == AT_ONCE or size + more > MOST_BYTES):
            yield some
            some, size = [], 0
        some.append(entry)
        size += more
    if some:
        yield some


def _json(document: Mapping[str, object]) -> str:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


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
        "body": _json(payload),
    }
