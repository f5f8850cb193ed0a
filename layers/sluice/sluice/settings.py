"""The environment as one frozen object; nothing else reads `os.environ`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from sluice.domain.batches import AskedLane
from sluice.domain.waits import USUAL, Waits
from sluice.domain.webhooks import Network, read_networks


class SettingsError(Exception):
    """A setting is missing or invalid."""


@dataclass(frozen=True, slots=True)
class GovernorSettings:
    """The settings of the governor."""

    mappings: Mapping[str, str]
    """The UUID of the event source mapping of each queue, by what the queue holds."""
    max_concurrency: int
    bulk_concurrency: int
    executions: int | None
    """Maximum concurrent Lambda executions of this deployment; None: the account limit."""
    upstream_function: str
    """The function that makes the steps of upstream batches."""


MAPPINGS = ("jobs", "ranges", "batches", "webhooks", "dead letters", "range dead letters")
"""The queues whose mappings the governor sets, in order of rank: of idle mappings the first ones stay enabled."""

GOVERNOR_VARIABLES = (
    "SLUICE_MAPPINGS",
    "SLUICE_MAX_CONCURRENCY",
    "SLUICE_BULK_CONCURRENCY",
    "SLUICE_LAMBDA_CONCURRENCY",
    "SLUICE_UPSTREAM_FUNCTION",
)


@dataclass(frozen=True, slots=True)
class Settings:
    """The resources and options of this deployment."""

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
    """The base URL of the API, for links in its responses."""
    retention_days: int
    max_attempts: int
    client_requests_per_second: int
    """Sustained requests of one client key to one execution environment of the API function."""
    gather_seconds: int
    """How long a batch on the batch lane waits for others to fill an upstream batch with it."""
    default_lane: AskedLane
    """The lane of batches that ask for none."""
    webhook_networks: tuple[Network, ...] = ()
    """Networks to which webhooks are permitted, besides all public addresses."""
    waits: Waits = USUAL
    """Shorter waits are for tests and benchmarks; the template sets none."""
    governor: GovernorSettings | None = None

    def governed(self) -> GovernorSettings:
        """Return the settings of the governor; raises SettingsError in any other function."""
        if self.governor is None:
            raise SettingsError(
                f"{', '.join(GOVERNOR_VARIABLES)} are not all set; the template sets them only for the governor"
            )
        return self.governor

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read the settings; raises SettingsError with the variable's name."""
        read = _Reader(os.environ if environment is None else environment)
        return cls(
            jobs_table=read.text("SLUICE_JOBS_TABLE"),
            params_table=read.text("SLUICE_PARAMS_TABLE"),
            limits_table=read.text("SLUICE_LIMITS_TABLE"),
            ledger_table=read.text("SLUICE_LEDGER_TABLE"),
            usage_table=read.text("SLUICE_USAGE_TABLE"),
            client_keys_table=read.text("SLUICE_CLIENT_KEYS_TABLE"),
            batches_table=read.text("SLUICE_BATCHES_TABLE"),
            data_bucket=read.text("SLUICE_DATA_BUCKET"),
            jobs_queue_url=read.text("SLUICE_JOBS_QUEUE_URL"),
            dead_letters_queue_url=read.text("SLUICE_DEAD_LETTERS_QUEUE_URL"),
            ranges_queue_url=read.text("SLUICE_RANGES_QUEUE_URL"),
            range_dead_letters_queue_url=read.text("SLUICE_RANGE_DEAD_LETTERS_QUEUE_URL"),
            batches_queue_url=read.text("SLUICE_BATCHES_QUEUE_URL"),
            webhooks_queue_url=read.text("SLUICE_WEBHOOKS_QUEUE_URL"),
            public_url=read.text("SLUICE_PUBLIC_URL").rstrip("/"),
            key_pool_secret=read.text("SLUICE_KEY_POOL_SECRET"),
            pepper_secret=read.text("SLUICE_PEPPER_SECRET"),
            webhook_secret=read.text("SLUICE_WEBHOOK_SECRET"),
            retention_days=read.number("SLUICE_RETENTION_DAYS"),
            max_attempts=read.number("SLUICE_MAX_ATTEMPTS"),
            client_requests_per_second=read.number("SLUICE_CLIENT_REQUESTS_PER_SECOND"),
            gather_seconds=read.number("SLUICE_GATHER_SECONDS"),
            default_lane=read.lane("SLUICE_DEFAULT_LANE"),
            webhook_networks=read.networks("SLUICE_WEBHOOK_NETWORKS"),
            waits=read.waits("SLUICE_WAITS"),
            governor=read.governor(),
        )


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads environment variables; each method raises SettingsError with the variable's name."""

    environment: Mapping[str, str]

    def text(self, name: str) -> str:
        value = self.environment.get(name, "")
        if not value:
            raise SettingsError(f"{name} is not set; the template sets it for every function")
        return value

    def number(self, name: str) -> int:
        value = self.text(name)
        if not value.isdecimal() or int(value) < 1:
            raise SettingsError(f"{name} must be an integer of at least 1, got {value!r}")
        return int(value)

    def lane(self, name: str) -> AskedLane:
        value = self.text(name)
        lanes: tuple[AskedLane, ...] = get_args(AskedLane)
        for lane in lanes:
            if value == lane:
                return lane
        raise SettingsError(f"{name} must be one of {', '.join(lanes)}, got {value!r}")

    def networks(self, name: str) -> tuple[Network, ...]:
        try:
            return read_networks(self.environment.get(name, ""))
        except ValueError as error:
            raise SettingsError(
                f"{name} must be networks such as 10.0.0.0/8,fd00::/8: {error}"
            ) from None

    def waits(self, name: str) -> Waits:
        text = self.environment.get(name)
        try:
            return Waits.from_json(text) if text else USUAL
        except ValueError as error:
            raise SettingsError(
                f'{name} must be waits such as {{"hold_ms": 1000}}: {error}'
            ) from None

    def mappings(self, name: str) -> Mapping[str, str]:
        try:
            found = {queue: str(uuid) for queue, uuid in json.loads(self.text(name)).items()}
        except (ValueError, AttributeError):
            found = {}
        if found.keys() != set(MAPPINGS) or not all(found.values()):
            raise SettingsError(
                f"{name} must be a JSON object with a UUID for each of {', '.join(MAPPINGS)}"
            )
        return found

    def governor(self) -> GovernorSettings | None:
        if not all(self.environment.get(name) for name in GOVERNOR_VARIABLES):
            return None
        is_account_limit = self.text("SLUICE_LAMBDA_CONCURRENCY") == "0"
        return GovernorSettings(
            self.mappings("SLUICE_MAPPINGS"),
            self.number("SLUICE_MAX_CONCURRENCY"),
            self.number("SLUICE_BULK_CONCURRENCY"),
            None if is_account_limit else self.number("SLUICE_LAMBDA_CONCURRENCY"),
            self.text("SLUICE_UPSTREAM_FUNCTION"),
        )
