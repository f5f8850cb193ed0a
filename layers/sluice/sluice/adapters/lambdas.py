"""Lambda: the event source mappings of the queues, the account limit, and invocations of the upstream function."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from botocore.exceptions import ClientError

from sluice.adapters import aws
from sluice.domain.capacity import REFILLED, Consumer
from sluice.domain.errors import StoreBusy
from sluice.ports.world import Clock

if TYPE_CHECKING:
    from mypy_boto3_lambda import LambdaClient

STABLE: Final = frozenset({"Enabled", "Disabled"})
OFF: Final = frozenset({"Disabled", "Disabling"})
BUSY: Final = frozenset({"ResourceInUseException", "ResourceConflictException"})

LIMIT_AGE_MS: Final = 300_000
"""The account limit is read again after this time, because AWS raises it on request."""


class LambdaQueueMapping:
    """One event source mapping, by its UUID; `what` names it in errors."""

    def __init__(
        self,
        client: LambdaClient,
        uuid: str,
        what: str,
        *,
        slots_per_message: int = 1,
        busy: float = REFILLED,
    ) -> None:
        self._client = client
        self._uuid = uuid
        self._what = what
        self._slots_per_message = slots_per_message
        self._busy = busy

    def state(self) -> Consumer:
        """Return the current configuration."""
        found = aws.patiently(self._what, self._client.get_event_source_mapping, UUID=self._uuid)
        state = found["State"]
        return Consumer(
            maximum_concurrency=found.get("ScalingConfig", {}).get("MaximumConcurrency"),
            enabled=state not in OFF,
            slots=found["BatchSize"] * self._slots_per_message,
            busy=self._busy,
            is_applied=state in STABLE,
        )

    def set(self, maximum_concurrency: int, *, enabled: bool) -> bool:
        """Change the configuration; False if Lambda still applies an earlier change."""
        try:
            aws.patiently(
                self._what,
                self._client.update_event_source_mapping,
                UUID=self._uuid,
                Enabled=enabled,
                ScalingConfig={"MaximumConcurrency": maximum_concurrency},
            )
        except ClientError as error:
            if aws.code(error) not in BUSY:
                raise
            return False
        return True


class LambdaExecutions:
    """The concurrent executions of the account, but at most `at_most`; read every five minutes."""

    def __init__(self, client: LambdaClient, clock: Clock, at_most: int | None) -> None:
        self._client = client
        self._clock = clock
        self._at_most = at_most
        self._known: tuple[int, int] | None = None

    def at_once(self) -> int:
        """Return the number; if it cannot be read, the last one read, or else `at_most`."""
        now = self._clock.now()
        if self._known is None or now - self._known[0] >= LIMIT_AGE_MS:
            try:
                answer = aws.patiently("the account limit", self._client.get_account_settings)
            except (ClientError, StoreBusy):
                if self._known is None and self._at_most is None:
                    raise
            else:
                # Without executions that are reserved for single functions.
                self._known = now, answer["AccountLimit"]["UnreservedConcurrentExecutions"]
        numbers = [self._at_most, self._known[1] if self._known else None]
        return min(number for number in numbers if number is not None)


class LambdaSteps:
    """Starts invocations of the upstream function."""

    def __init__(self, client: LambdaClient, name: str) -> None:
        self._client = client
        self._name = name

    def start(self, upstream_id: str | None) -> None:
        """Have the next step of an upstream batch made, or batches collected if None; raises StoreBusy."""
        event = {} if upstream_id is None else {"upstream_id": upstream_id}
        aws.patiently(
            "the upstream function",
            self._client.invoke,
            FunctionName=self._name,
            InvocationType="Event",
            Payload=json.dumps(event).encode(),
        )
