"""Publishing notifications of completion: events on the default bus, and messages of the webhooks queue."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from sluice.adapters import aws
from sluice.adapters.sqs import message_group
from sluice.domain.errors import StoreBusy
from sluice.domain.jobs import SCHEMA_VERSION
from sluice.domain.times import rfc3339
from sluice.ports.world import Events, Notice

if TYPE_CHECKING:
    from mypy_boto3_events import EventBridgeClient
    from mypy_boto3_sqs import SQSClient

SOURCE: Final = "sluice"
BUS: Final = "the event bus"
QUEUE: Final = "the webhooks queue"

AT_ONCE: Final = 10
"""Maximum events or messages per call."""

MOST_BYTES: Final = 200_000
"""Maximum bytes per call: EventBridge accepts 256 KB, including its own fields of each event."""


_NEVER_ACCEPTED: Final = frozenset({"InvalidArgument", "MalformedDetail"})
"""EventBridge's errors about a single event (AWS, PutEvents)."""


class BusNotices:
    """The default event bus, and the queue of webhooks."""

    def __init__(
        self, bus: EventBridgeClient, sqs: SQSClient, webhooks_url: str, events: Events
    ) -> None:
        self._bus = bus
        self._sqs = sqs
        self._webhooks_url = webhooks_url
        self._events = events

    def publish(self, notices: Sequence[Notice]) -> None:
        """Publish an event for each, and a message for each webhook; raises StoreBusy.

        An event that AWS will never accept is logged and skipped, so that it does not block those after it.
        """
        entries = [
            {"Source": SOURCE, "DetailType": each.kind, "Detail": _json(each.facts)}
            for each in notices
        ]
        for some in _that_fit(entries, "Detail"):
            answer = aws.patiently(BUS, self._bus.put_events, Entries=some)
            codes = [each["ErrorCode"] for each in answer["Entries"] if each.get("ErrorCode")]
            rejected = [code for code in codes if code in _NEVER_ACCEPTED]
            self._skip(BUS, rejected)
            if answer["FailedEntryCount"] > len(rejected):
                raise StoreBusy(BUS)
        wanted = [each for each in notices if each.webhook is not None]
        messages = [
            {
                "Id": str(position),
                "MessageBody": _json(_message(notice)),
                # Fair queue: a tenant whose receiver is down does not delay the webhooks of others.
                "MessageGroupId": message_group(notice.tenant),
            }
            for position, notice in enumerate(wanted)
        ]
        for some in _that_fit(messages, "MessageBody"):
            sent = aws.patiently(
                QUEUE, self._sqs.send_message_batch, QueueUrl=self._webhooks_url, Entries=some
            )
            failed = sent.get("Failed", ())
            self._skip(QUEUE, [each["Code"] for each in failed if each["SenderFault"]])
            if not all(each["SenderFault"] for each in failed):
                raise StoreBusy(QUEUE)

    def _skip(self, what: str, codes: Sequence[str]) -> None:
        for code in codes:
            self._events.problem("end not published", what=what, code=code)


def _that_fit(entries: Sequence[dict[str, str]], part: str) -> Iterator[Any]:
    """Yield the entries in groups that AWS accepts in one call: at most ten, and not too large."""
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
    # In ASCII, because SQS does not accept every character that metadata may have (SendMessage).
    return json.dumps(document, separators=(",", ":"))


def _message(notice: Notice) -> dict[str, object]:
    payload = {
        "type": notice.kind.lower().replace(" ", "."),
        "timestamp": rfc3339(notice.at),
        "data": notice.facts,
    }
    return {
        "v": SCHEMA_VERSION,
        "webhook": notice.id,
        "tenant": notice.tenant,
        "url": notice.webhook,
        "body": _json(payload),
    }
