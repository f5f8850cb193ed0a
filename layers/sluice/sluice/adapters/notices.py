"""What has ended, told: as events on the account's default bus, and as webhooks to be delivered."""

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
"""Events, or messages, in one call."""

MOST_BYTES: Final = 200_000
"""The same together: EventBridge takes 256 KB, its own words about each event among them."""


_NEVER_TAKEN: Final = frozenset({"InvalidArgument", "MalformedDetail"})
"""EventBridge's errors about an event itself (AWS, PutEvents)."""


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
        """Put an event for each, and a message for each webhook; raises StoreBusy.

        One that AWS will never take is logged and passed over: it must not hold up what ended after it.
        """
        entries = [
            {"Source": SOURCE, "DetailType": each.kind, "Detail": _json(each.facts)}
            for each in notices
        ]
        for some in _that_fit(entries, "Detail"):
            answer = aws.patiently(BUS, self._bus.put_events, Entries=some)
            codes = [each["ErrorCode"] for each in answer["Entries"] if each.get("ErrorCode")]
            hopeless = [code for code in codes if code in _NEVER_TAKEN]
            self._pass_over(BUS, hopeless)
            if answer["FailedEntryCount"] > len(hopeless):
                raise StoreBusy(BUS)
        wanted = [each for each in notices if each.webhook is not None]
        messages = [
            {
                "Id": str(position),
                "MessageBody": _json(_message(notice)),
                # A fair queue: a tenant whose server is down does not delay the others' webhooks.
                "MessageGroupId": message_group(notice.tenant),
            }
            for position, notice in enumerate(wanted)
        ]
        for some in _that_fit(messages, "MessageBody"):
            sent = aws.patiently(
                QUEUE, self._sqs.send_message_batch, QueueUrl=self._webhooks_url, Entries=some
            )
            failed = sent.get("Failed", ())
            self._pass_over(QUEUE, [each["Code"] for each in failed if each["SenderFault"]])
            if not all(each["SenderFault"] for each in failed):
                raise StoreBusy(QUEUE)

    def _pass_over(self, what: str, codes: Sequence[str]) -> None:
        for code in codes:
            self._events.problem("end not told", what=what, code=code)


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
    # In ASCII: a message may not hold every character that a caller's metadata may (SQS, SendMessage).
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
