"""The environment as one frozen object; nothing else reads `os.environ`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from sluice.domain.waits import USUAL, Waits
from sluice.domain.webhooks import Network, read_networks


class SettingsError(Exception):
    """A setting is missing or has the wrong form."""


@dataclass(frozen=True, slots=True)
class MappingSettings:
    """A mapping from a queue to its workers."""

    uuid: str
    ceiling: int
    """Most workers at once."""


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
    jobs_mapping: MappingSettings | None = None
    """The governor's: the mapping from jobs queue to worker."""
    ranges_mapping: MappingSettings | None = None
    """The governor's: the mapping from ranges queue to ranges function."""

    def governed(self) -> tuple[MappingSettings, MappingSettings]:
        """Return the mappings of jobs and of ranges; raises SettingsError in a function that does not govern."""
        if self.jobs_mapping is None or self.ranges_mapping is None:
            message = (
                "SLUICE_WORKER_MAPPING, SLUICE_MAX_CONCURRENCY, SLUICE_RANGES_MAPPING and "
                "SLUICE_BULK_CONCURRENCY are not all set; the template sets them for the governor alone"
            )
            raise SettingsError(message)
        return self.jobs_mapping, self.ranges_mapping

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

        def mapping(uuid: str, ceiling: str) -> MappingSettings | None:
            if not env.get(uuid) or not env.get(ceiling):
                return None
            return MappingSettings(text(uuid), number(ceiling))

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
            jobs_mapping=mapping("SLUICE_WORKER_MAPPING", "SLUICE_MAX_CONCURRENCY"),
            ranges_mapping=mapping("SLUICE_RANGES_MAPPING", "SLUICE_BULK_CONCURRENCY"),
        )


def _waits(env: Mapping[str, str], name: str) -> Waits:
    try:
        return Waits.from_json(env[name]) if env.get(name) else USUAL
    except ValueError as error:
        message = f'{name} must be waits such as {{"hold_ms": 1000}}: {error}'
        raise SettingsError(message) from None
