"""Lambda: mappings from a queue to its workers, and how many executions the account allows."""

from __future__ import annotations

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
"""The account's limit is read again after this time: AWS raises it on request."""


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
        """Return it as it stands."""
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
        """Change it; False when Lambda still carries out an earlier change."""
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
    """How many executions the account's functions may run at once, at most `at_most`. Read every five minutes."""

    def __init__(self, client: LambdaClient, clock: Clock, at_most: int | None) -> None:
        self._client = client
        self._clock = clock
        self._at_most = at_most
        self._known: tuple[int, int] | None = None

    def at_once(self) -> int:
        """Return it. While it cannot be read, it is what was read last, or else `at_most`."""
        now = self._clock.now()
        if self._known is None or now - self._known[0] >= LIMIT_AGE_MS:
            try:
                answer = aws.patiently("the account's limit", self._client.get_account_settings)
            except (ClientError, StoreBusy):
                if self._known is None and self._at_most is None:
                    raise
            else:
                # Executions that are reserved for other functions are not ours.
                self._known = now, answer["AccountLimit"]["UnreservedConcurrentExecutions"]
        numbers = [self._at_most, self._known[1] if self._known else None]
        return min(number for number in numbers if number is not None)
