"""Secrets: the key pool and the pepper of the client keys. Their texts never reach a log or an error."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from botocore.exceptions import ClientError

from sluice.adapters import aws
from sluice.domain.errors import KeyPoolBroken, StoreBusy
from sluice.domain.keys import (
    AdminKey,
    UpstreamKey,
    parse_admin_keys,
    parse_key_pool,
    parse_model_groups,
)
from sluice.ports.world import Clock

if TYPE_CHECKING:
    from mypy_boto3_secretsmanager import SecretsManagerClient

POOL_AGE_MS: Final = 300_000
RELOAD_AT_MOST_EVERY_MS: Final = 10_000
"""Many rejected keys at once cause one read of the secret, not one per job."""


class SecretText:
    """The text of one secret, cached for `age_ms`."""

    def __init__(
        self, client: SecretsManagerClient, name: str, clock: Clock, age_ms: int = POOL_AGE_MS
    ) -> None:
        self._client = client
        self._name = name
        self._clock = clock
        self._age_ms = age_ms
        self._text: str | None = None
        self._read_at = 0

    def __call__(self) -> str:
        """Return the text; raises StoreBusy, or KeyPoolBroken if the secret cannot be read."""
        now = self._clock.now()
        if self._text is None or now - self._read_at >= self._age_ms:
            try:
                answer: Mapping[str, Any] = aws.patiently(
                    "Secrets Manager", self._client.get_secret_value, SecretId=self._name
                )
            except ClientError as error:
                raise KeyPoolBroken(
                    f"the secret {self._name} cannot be read: {aws.code(error)}"
                ) from None
            if "SecretString" not in answer:
                raise KeyPoolBroken(f"the secret {self._name} is binary; store it as text")
            self._text = answer["SecretString"]
            self._read_at = now
        return self._text

    def forget(self) -> None:
        """Make the next call read the secret again, unless it was read just now."""
        if self._clock.now() - self._read_at >= RELOAD_AT_MOST_EVERY_MS:
            self._text = None


class WebhookSecrets:
    """The webhook secret of the deployment: its current and its previous version."""

    STAGES: Final = ("AWSCURRENT", "AWSPREVIOUS")

    def __init__(self, client: SecretsManagerClient, name: str, clock: Clock) -> None:
        self._client = client
        self._name = name
        self._clock = clock
        self._known: tuple[int, tuple[str, ...]] | None = None

    def __call__(self) -> Sequence[str]:
        """Return both versions, current first, at most five minutes old, or older if they cannot be read.

        Raises StoreBusy if they were never read.
        """
        now = self._clock.now()
        if self._known is None or now - self._known[0] >= POOL_AGE_MS:
            try:
                texts = tuple(self._version(stage) for stage in self.STAGES)
            except StoreBusy:
                if self._known is None:
                    raise
                texts = self._known[1]
            self._known = now, tuple(text for text in texts if text is not None)
        return self._known[1]

    def _version(self, stage: str) -> str | None:
        try:
            answer = aws.patiently(
                "Secrets Manager",
                self._client.get_secret_value,
                SecretId=self._name,
                VersionStage=stage,
            )
        except ClientError as error:
            if stage != self.STAGES[0] and aws.code(error) == "ResourceNotFoundException":
                # The secret was never changed.
                return None
            raise
        return str(answer["SecretString"])


class SecretHistory:
    """When the key-pool secret was written, without its text; read every five minutes."""

    def __init__(self, client: SecretsManagerClient, name: str, clock: Clock) -> None:
        self._client = client
        self._name = name
        self._clock = clock
        self._known: tuple[int, int] | None = None

    def changed_at(self) -> int:
        """Return when the secret was last written (epoch ms)."""
        now = self._clock.now()
        if self._known is None or now - self._known[0] >= POOL_AGE_MS:
            answer = aws.patiently(
                "Secrets Manager", self._client.describe_secret, SecretId=self._name
            )
            self._known = now, int(answer["LastChangedDate"].timestamp() * 1000)
        return self._known[1]


class SecretKeyPool:
    """The content of the key-pool secret."""

    def __init__(self, secret: SecretText) -> None:
        self._secret = secret
        self._parsed: tuple[str, _Pool] | None = None

    def keys(self) -> Sequence[UpstreamKey]:
        """Return the keys, at most five minutes old; raises KeyPoolBroken or StoreBusy."""
        return self._pool().keys

    def admin_keys(self) -> Sequence[AdminKey]:
        """Return the admin keys; raises as `keys`."""
        return self._pool().admin_keys

    def model_groups(self) -> Mapping[str, str]:
        """Return the model groups that the pool states, by model; raises as `keys`."""
        return self._pool().model_groups

    def reload(self) -> None:
        """Make the next call read the secret again, because a key was rejected."""
        self._secret.forget()

    def _pool(self) -> _Pool:
        text = self._secret()
        if self._parsed is None or self._parsed[0] != text:
            try:
                document = json.loads(text)
            except ValueError:
                raise KeyPoolBroken("the key-pool secret is not JSON") from None
            pool = _Pool(
                parse_key_pool(document), parse_admin_keys(document), parse_model_groups(document)
            )
            self._parsed = (text, pool)
        return self._parsed[1]


@dataclass(frozen=True, slots=True)
class _Pool:
    keys: tuple[UpstreamKey, ...]
    admin_keys: tuple[AdminKey, ...]
    model_groups: Mapping[str, str]
