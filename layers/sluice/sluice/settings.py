"""The environment as one frozen object; nothing else reads `os.environ`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

from sluice.domain.waits import USUAL, Waits
from sluice.domain.webhooks import Network, read_networks


class SettingsError(Exception):
    """A setting is missing or has the wrong form."""


@dataclass(frozen=True, slots=True)
class GovernorSettings:
    """What only the governor knows."""

    mappings: Mapping[str, str]
    """The UUID of each queue's mapping, by what the queue holds."""
    max_concurrency: int
    bulk_concurrency: int
    executions: int | None
    """Most executions of Lambda that this deployment may use at once; None: all of the account."""


MAPPINGS = ("jobs", "ranges", "batches", "webhooks", "dead letters", "range dead letters")
"""The queues whose mappings the governor sets. When not all have room, the first of the idle ones stay enabled."""

GOVERNOR_VARIABLES = (
    "SLUICE_MAPPINGS",
    "SLUICE_MAX_CONCURRENCY",
    "SLUICE_BULK_CONCURRENCY",
    "SLUICE_LAMBDA_CONCURRENCY",
)


@dataclass(frozen=True, slots=True)
class Settings:
    """Where this deployment keeps things."""

    jobs_table: str
    params_table: str
    limits_table: str
    ledger_table: str
    usage_table: str
    client_keys_table: str
    batches_table: str
    data_bucket: str
    jobs_queue_url: str
    dead_letters_queue_url: str
    ranges_queue_url: str
    range_dead_letters_queue_url: str
    batches_queue_url: str
    webhooks_queue_url: str
    key_pool_secret: str
    pepper_secret: str
    webhook_secret: str
    public_url: str
    """Where callers reach the API; it stands in answers that name another address."""
    retention_days: int
    max_attempts: int
    webhook_networks: tuple[Network, ...] = ()
    """Networks, beside all public addresses, that webhooks may go into."""
    waits: Waits = USUAL
    """Shorter ones are for tests and benchmarks; the template sets none."""
    governor: GovernorSettings | None = None

    def governed(self) -> GovernorSettings:
        """Return the governor's own settings; raises SettingsError in a function that does not govern."""
        if self.governor is None:
            message = (
                "SLUICE_MAPPINGS, SLUICE_MAX_CONCURRENCY, SLUICE_BULK_CONCURRENCY and "
                "SLUICE_LAMBDA_CONCURRENCY are not all set; the template sets them for the governor alone"
            )
            raise SettingsError(message)
        return self.governor

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read the settings; raises SettingsError with the variable's name."""
        env = os.environ if environment is None else environment

        def text(name: str) -> str:
            value = env.get(name, "")
            if not value:
                message = f"{name} is not set; the template sets it for every function"
                raise SettingsError(message)
            return value

        def number(name: str) -> int:
            value = text(name)
            if not value.isdecimal() or int(value) < 1:
                message = f"{name} must be a whole number from 1 up, got {value!r}"
                raise SettingsError(message)
            return int(value)

        def networks(name: str) -> tuple[Network, ...]:
            try:
                return read_networks(env.get(name, ""))
            except ValueError as error:
                message = f"{name} must be networks such as 10.0.0.0/8,fd00::/8: {error}"
                raise SettingsError(message) from None

        def governor() -> GovernorSettings | None:
            if not all(env.get(name) for name in GOVERNOR_VARIABLES):
                return None
            executions = text("SLUICE_LAMBDA_CONCURRENCY")
            return GovernorSettings(
                _mappings("SLUICE_MAPPINGS", text("SLUICE_MAPPINGS")),
                number("SLUICE_MAX_CONCURRENCY"),
                number("SLUICE_BULK_CONCURRENCY"),
                None if executions == "0" else number("SLUICE_LAMBDA_CONCURRENCY"),
            )

        return cls(
            jobs_table=text("SLUICE_JOBS_TABLE"),
            params_table=text("SLUICE_PARAMS_TABLE"),
            limits_table=text("SLUICE_LIMITS_TABLE"),
            ledger_table=text("SLUICE_LEDGER_TABLE"),
            usage_table=text("SLUICE_USAGE_TABLE"),
            client_keys_table=text("SLUICE_CLIENT_KEYS_TABLE"),
            batches_table=text("SLUICE_BATCHES_TABLE"),
            data_bucket=text("SLUICE_DATA_BUCKET"),
            jobs_queue_url=text("SLUICE_JOBS_QUEUE_URL"),
            dead_letters_queue_url=text("SLUICE_DEAD_LETTERS_QUEUE_URL"),
            ranges_queue_url=text("SLUICE_RANGES_QUEUE_URL"),
            range_dead_letters_queue_url=text("SLUICE_RANGE_DEAD_LETTERS_QUEUE_URL"),
            batches_queue_url=text("SLUICE_BATCHES_QUEUE_URL"),
            webhooks_queue_url=text("SLUICE_WEBHOOKS_QUEUE_URL"),
            public_url=text("SLUICE_PUBLIC_URL").rstrip("/"),
            key_pool_secret=text("SLUICE_KEY_POOL_SECRET"),
            pepper_secret=text("SLUICE_PEPPER_SECRET"),
            webhook_secret=text("SLUICE_WEBHOOK_SECRET"),
            retention_days=number("SLUICE_RETENTION_DAYS"),
            max_attempts=number("SLUICE_MAX_ATTEMPTS"),
            webhook_networks=networks("SLUICE_WEBHOOK_NETWORKS"),
            waits=_waits(env, "SLUICE_WAITS"),
            governor=governor(),
        )


def _mappings(name: str, text: str) -> Mapping[str, str]:
    try:
        found = {queue: str(uuid) for queue, uuid in json.loads(text).items()}
    except (ValueError, AttributeError):
        found = {}
    if found.keys() != set(MAPPINGS) or not all(found.values()):
        message = f"{name} must be a JSON object with a UUID for each of {', '.join(MAPPINGS)}"
        raise SettingsError(message)
    return found


def _waits(env: Mapping[str, str], name: str) -> Waits:
    try:
        return Waits.from_json(env[name]) if env.get(name) else USUAL
    except ValueError as error:
        message = f'{name} must be waits such as {{"hold_ms": 1000}}: {error}'
        raise SettingsError(message) from None
