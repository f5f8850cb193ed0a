"""The webhooks function: delivers notices to callers' servers."""

from __future__ import annotations

from functools import cache

from sluice.adapters.sqs import SqsInbox
from sluice.adapters.web import HttpWeb
from sluice.notices.deliver import Deliver
from sluice.wiring.notices import signing_secrets
from sluice.wiring.shared import CLOCK, settings, sqs, telemetry


@cache
def deliver() -> Deliver:
    """Return the use case behind the webhooks queue."""
    returns = SqsInbox(
        sqs(),
        settings().webhooks_queue_url,
        settings().dead_letters_queue_url,
        "the webhooks queue",
    )
    networks = settings().webhook_networks
    return Deliver(HttpWeb(), signing_secrets(), returns, networks, CLOCK, telemetry())
