"""The destinations of notices, and the signing secrets of webhooks."""

from __future__ import annotations

from functools import cache

from sluice.adapters import aws
from sluice.adapters.notices import BusNotices
from sluice.adapters.secrets import WebhookSecrets
from sluice.wiring.shared import CLOCK, secrets_manager, settings, sqs, telemetry


@cache
def notices() -> BusNotices:
    """Return the event bus and the webhooks queue."""
    return BusNotices(aws.events(), sqs(), settings().webhooks_queue_url, telemetry())


@cache
def signing_secrets() -> WebhookSecrets:
    """Return the secrets from which each tenant's webhook secret is derived."""
    return WebhookSecrets(secrets_manager(), settings().webhook_secret, CLOCK)
