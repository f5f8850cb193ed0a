"""Delivering webhooks: signed, to public addresses only, with retries for a day, at least once each."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Final, assert_never
from urllib.parse import urlsplit

from standardwebhooks.webhooks import Webhook as Signer

from sluice.domain.errors import StoreBusy
from sluice.domain.webhooks import (
    Delivered,
    GiveUp,
    Network,
    Retry,
    as_address,
    check_url,
    judge,
    may_be_called,
    signing_secret,
)
from sluice.ports.jobs import Received, Returns
from sluice.ports.messages import webhook_of
from sluice.ports.world import Clock, Events, Reply, SigningSecrets, Web, Webhook

UNEXPECTED_MS: Final = 60_000
"""Pause after an unexpected error; after a hundred receives the message becomes a dead letter."""

SLOW_MS: Final = 10_000
"""A delivery without an answer after this time makes its tenant slow. An invocation waits for its slowest delivery."""

SLOW_FOR_MS: Final = 60_000
"""Slow tenants are served quickly or not at all for this time; then one delivery may again take its full time."""

SHORT_SECONDS: Final = 2.0
"""The time for a delivery of a slow tenant. The retry after a failure is as usual."""

REFUSED: Final = "the host resolves to an address that is not permitted"


class Deliver:
    """The use case behind the webhooks queue."""

    def __init__(  # noqa: PLR0913, PLR0917 - its tools
        self,
        web: Web,
        secrets: SigningSecrets,
        returns: Returns,
        networks: Sequence[Network],
        clock: Clock,
        events: Events,
    ) -> None:
        self._web = web
        self._secrets = secrets
        self._returns = returns
        self._networks = networks
        self._clock = clock
        self._events = events
        self._slow: dict[str, int] = {}
        """Until when each tenant is slow, in this environment."""

    async def __call__(self, messages: Sequence[Received]) -> list[str]:
        """Deliver concurrently; return the ids of the messages to retry. Raises StoreBusy before the first delivery."""
        secrets = self._secrets()
        pauses = await asyncio.gather(*(self._tried(each, secrets) for each in messages))
        later = [
            (message, pause)
            for message, pause in zip(messages, pauses, strict=True)
            if pause is not None
        ]
        try:
            self._returns.put_back(later)
        except StoreBusy as busy:
            # They are retried after the visibility timeout of the queue.
            self._events.problem("store busy", what=busy.what)
        return [message.message_id for message, _ in later]

    async def _tried(self, message: Received, secrets: Sequence[str]) -> int | None:
        """Deliver one webhook; return the pause before the retry, None if there is none. Never raises."""
        try:
            return await self._pause(message, secrets)
        except Exception:  # noqa: BLE001 - one webhook must not delay the others
            self._events.problem(
                "unexpected error delivering webhook", message_id=message.message_id
            )
            return UNEXPECTED_MS

    async def _pause(self, message: Received, secrets: Sequence[str]) -> int | None:
        webhook = webhook_of(message)
        if webhook is None:
            self._returns.reject(message, "not a webhook of Sluice's")
            return None
        reply = await self._in_time(webhook, secrets)
        age_ms = self._clock.now() - message.sent_at
        verdict = judge(reply.status, message.receive_count, age_ms, reply.retry_after_s)
        if reply.problem == REFUSED:
            # A retry would not help: the owner of the name can let it resolve to any address.
            verdict = GiveUp()
        match verdict:
            case Delivered():
                self._events.count("WebhooksDelivered")
                return None
            case GiveUp():
                self._events.count("WebhooksGivenUp")
                self._log("webhook given up", webhook, reply)
                return None
            case Retry(after_ms=after):
                self._log("webhook failed", webhook, reply)
                return after
            case _:
                assert_never(verdict)

    async def _in_time(self, webhook: Webhook, secrets: Sequence[str]) -> Reply:
        """Send, and wait for the answer: not for long if the tenant's receivers have just kept others waiting.

        So a tenant whose receivers never answer occupies this environment for one full delivery a minute.
        """
        started = self._clock.now()
        is_slow = self._slow.get(webhook.tenant, 0) > started
        try:
            async with asyncio.timeout(SHORT_SECONDS if is_slow else None):
                reply = await self._sent(webhook, secrets)
        except TimeoutError:
            return Reply(
                problem=f"no answer within {SHORT_SECONDS:.0f} s, after others without an answer"
            )
        now = self._clock.now()
        if reply.status is None and now - started >= SLOW_MS:
            self._slow = {tenant: until for tenant, until in self._slow.items() if until > now}
            self._slow[webhook.tenant] = now + SLOW_FOR_MS
        return reply

    async def _sent(self, webhook: Webhook, secrets: Sequence[str]) -> Reply:
        try:
            check_url(webhook.url, self._networks)
        except ValueError:
            # It was accepted while more networks were permitted.
            return Reply(problem=REFUSED)
        parts = urlsplit(webhook.url)
        is_plain = parts.scheme == "http"
        port = parts.port or (80 if is_plain else 443)
        found = await self._web.addresses(parts.hostname or "", port)
        if not found:
            return Reply(problem="the host name does not resolve")
        # All of them, because the receiver must not choose which one is used.
        if not all(self._is_open(each, plainly=is_plain) for each in found):
            return Reply(problem=REFUSED)
        headers = self._headers(webhook, secrets)
        return await self._web.post(webhook.url, found[0], headers, webhook.body)

    def _is_open(self, text: str, *, plainly: bool) -> bool:
        address = as_address(text)
        return address is not None and may_be_called(address, self._networks, plainly=plainly)

    def _headers(self, webhook: Webhook, secrets: Sequence[str]) -> Mapping[str, str]:
        now = datetime.fromtimestamp(self._clock.now() / 1000, UTC)
        signatures = (
            Signer(signing_secret(master, webhook.tenant)).sign(webhook.id, now, webhook.body)
            for master in secrets
        )
        return {
            "content-type": "application/json",
            "user-agent": "Sluice",
            "webhook-id": webhook.id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": " ".join(signatures),
        }

    def _log(self, event: str, webhook: Webhook, reply: Reply) -> None:
        """Log a failure, without the URL, which may contain a secret."""
        self._events.note(
            event,
            webhook_id=webhook.id,
            tenant=webhook.tenant,
            host=urlsplit(webhook.url).hostname,
            status=reply.status,
            problem=reply.problem,
        )
