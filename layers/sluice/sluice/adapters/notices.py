"""Events on the account's default bus: what has ended, for whoever has a rule for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from sluice.adapters import aws
from sluice.domain.errors import StoreBusy

if TYPE_CHECKING:
    from mypy_boto3_events import EventBridgeClient

SOURCE: Final = "sluice"
WHAT: Final = "the event bus"


class BusNotices:
    """The default event bus."""

    def __init__(self, client: EventBridgeClient) -> None:
        self._client = client

    def tell(self, kind: str, facts: Mapping[str, object]) -> None:
        """Put an event of this `detail-type`; raises StoreBusy."""
        answer = aws.patiently(
            WHAT,
            self._client.put_events,
            Entries=[{"Source": SOURCE, "DetailType": kind, "Detail": json.dumps(facts)}],
        )
        if answer.get("FailedEntryCount"):
            raise StoreBusy(WHAT)
