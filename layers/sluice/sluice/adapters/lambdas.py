"""Mappings from a queue to its workers, in Lambda."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from botocore.exceptions import ClientError

from sluice.adapters import aws
from sluice.domain.capacity import REFILLED, Consumer

if TYPE_CHECKING:
    from mypy_boto3_lambda import LambdaClient

SETTLED: Final = frozenset({"Enabled", "Disabled"})
OFF: Final = frozenset({"Disabled", "Disabling"})
BUSY: Final = frozenset({"ResourceInUseException", "ResourceConflictException"})


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
            settled=state in SETTLED,
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
