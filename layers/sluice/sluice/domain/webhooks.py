"""Webhooks: permitted destinations, signatures and the schedule of retries.

Deliveries are signed according to Standard Webhooks (https://www.standardwebhooks.com): headers `webhook-id`,
`webhook-timestamp` and `webhook-signature`, an HMAC-SHA256 with a secret that begins with `whsec_`.
"""

from __future__ import annotations

import hmac
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Final
from urllib.parse import SplitResult, urlsplit

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MOST_CHARACTERS: Final = 2_048
"""Maximum length of a URL."""

SECOND_MS: Final = 1_000
MINUTE_MS: Final = 60 * SECOND_MS
HOUR_MS: Final = 60 * MINUTE_MS

PAUSES_MS: Final = (
    5 * SECOND_MS,
    MINUTE_MS,
    5 * MINUTE_MS,
    30 * MINUTE_MS,
    2 * HOUR_MS,
    5 * HOUR_MS,
    10 * HOUR_MS,
    10 * HOUR_MS,
)
"""Pause after the first failed delivery, the second, and so on."""

PATIENCE_MS: Final = sum(PAUSES_MS)
"""Retries end after about 28 hours. The age decides, because the queue also counts receives without a delivery."""

LONGEST_PAUSE_MS: Final = 12 * HOUR_MS - MINUTE_MS
"""Maximum pause, whatever `retry-after` says: SQS hides a message for at most 12 hours."""

assert max(PAUSES_MS) <= LONGEST_PAUSE_MS < PATIENCE_MS, (
    "every pause fits into a visibility timeout"
)

STOP_STATUS: Final = 410
"""The status with which a receiver stops deliveries (Standard Webhooks)."""

_TRANSLATED: Final = (ip_network("64:ff9b::/96"), ip_network("::/96"))
"""IPv6 addresses that end in the IPv4 address to which they are translated (RFC 6052, RFC 4291)."""

_TRANSLATED_SOMEHOW: Final = ip_network("64:ff9b:1::/48")
"""IPv6 addresses in which each network chooses the position of the IPv4 address (RFC 8215)."""


@dataclass(frozen=True, slots=True)
class Retry:
    """The delivery failed; the next one is due after a pause."""

    after_ms: int


@dataclass(frozen=True, slots=True)
class Delivered:
    """The receiver accepted the delivery."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The delivery failed, and there are no more retries."""


def check_url(url: str, networks: Sequence[Network] = ()) -> None:
    """Check the form of a webhook URL; raises ValueError with a message for the caller.

    `networks` are private networks that the operator permits; if there are any, plain http is permitted. The addresses
    of the host name are checked before each delivery, not here.
    """
    schemes = ("https", "http") if networks else ("https",)
    is_text = url.isascii() and url.isprintable() and " " not in url
    if len(url) > MOST_CHARACTERS or not is_text:
        raise ValueError(
            f"must be a URL of at most {MOST_CHARACTERS:,} printable ASCII characters without spaces"
        )
    parts = _split(url)
    if parts is None:
        raise ValueError("must have a valid host and, if given, a port from 1 to 65535")
    if parts.scheme not in schemes or not parts.hostname:
        raise ValueError(
            f"must start with {' or '.join(f'{each}://' for each in schemes)} and have a host"
        )
    if parts.username is not None or parts.fragment:
        raise ValueError("must not contain a user name or a #fragment")
    if any(not label for label in parts.hostname.split(".")):
        raise ValueError(f"host has an empty label ({parts.hostname})")
    address = as_address(parts.hostname)
    is_plain = parts.scheme == "http"
    if address is not None and not may_be_called(address, networks, plainly=is_plain):
        raise ValueError(f"must not point to a private address ({parts.hostname})")


def may_be_called(
    address: Address, networks: Sequence[Network] = (), *, plainly: bool = False
) -> bool:
    """Return whether deliveries to an address are permitted: a public one, or one in the operator's `networks`.

    `plainly`: over http, which is permitted only in the operator's networks. A public address that routers translate
    to a private one counts as private.
    """
    real = _embedded(address)
    if any(each in network for network in networks for each in (address, real)):
        return True
    is_local = isinstance(real, IPv6Address) and (real.is_site_local or real in _TRANSLATED_SOMEHOW)
    return not plainly and real.is_global and not real.is_multicast and not is_local


def as_address(host: str) -> Address | None:
    """Return the address of a host in numeric form; None for a name."""
    try:
        return ip_address(host)
    except ValueError:
        return None


def read_networks(text: str) -> tuple[Network, ...]:
    """Return the networks of a comma-separated list; raises ValueError for anything else."""
    return tuple(ip_network(each.strip(), strict=False) for each in text.split(",") if each.strip())


def signing_secret(master: str, tenant: str) -> str:
    """Return the secret of a tenant, derived from the deployment's: none is stored, and none reveals another."""
    digest = hmac.digest(master.encode(), f"webhooks of {tenant}".encode(), "sha256")
    return f"whsec_{b64encode(digest).decode()}"


def judge(
    status: int | None, receive_count: int, age_ms: int, retry_after_s: int | None = None
) -> Delivered | Retry | GiveUp:
    """Return the verdict on one delivery.

    `status` is None if there was no response; `receive_count` and `age_ms` are those of the queue's message. Only 2xx
    is a success: redirects are not followed, because they would bypass the check of the address.
    """
    if status is not None and 200 <= status < 300:  # noqa: PLR2004 - HTTP
        return Delivered()
    if status == STOP_STATUS or age_ms >= PATIENCE_MS:
        return GiveUp()
    pause = PAUSES_MS[min(max(0, receive_count - 1), len(PAUSES_MS) - 1)]
    return Retry(min(LONGEST_PAUSE_MS, max(pause, (retry_after_s or 0) * SECOND_MS)))


def _split(url: str) -> SplitResult | None:
    """Return the parts of a URL, None if it has no valid host or port."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    return None if port == 0 else parts


def _embedded(address: Address) -> Address:
    """Return the IPv4 address to which an IPv6 address is translated, else the address itself."""
    if isinstance(address, IPv4Address):
        return address
    if any(address in network for network in _TRANSLATED):
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    teredo = address.teredo[1] if address.teredo else None
    return address.ipv4_mapped or address.sixtofour or teredo or address
