"""Client keys: the credentials tenants send to Sluice, kept only as keyed hashes.

Reading the table does not allow sending requests: both stored values are HMACs under a pepper that is kept in Secrets
Manager.
"""

from __future__ import annotations

import hmac
from base64 import urlsafe_b64encode
from hashlib import sha256

MIN_LENGTH = 16
"""Minimum characters; shorter keys can be guessed and are rejected at creation."""


def new_key(random_bytes: bytes) -> str:
    """Make a client key from at least 24 random bytes: `sluice_` and URL-safe text."""
    if len(random_bytes) < 24:  # noqa: PLR2004 - 192 bits
        raise ValueError(f"a client key requires 24 random bytes, got {len(random_bytes)}")
    return "sluice_" + urlsafe_b64encode(random_bytes).decode().rstrip("=")


def key_id(pepper: str, key: str) -> str:
    """Return the table key under which `key` is looked up: 32 hex digits."""
    return hmac.new(pepper.encode(), key.encode(), sha256).hexdigest()[:32]


def verifier(pepper: str, key: str) -> str:
    """Return what is stored to check `key` against: 64 hex digits."""
    return hmac.new(pepper.encode(), b"verify:" + key.encode(), sha256).hexdigest()


def matches(pepper: str, key: str, stored: str) -> bool:
    """Return whether `key` belongs to the stored verifier, in constant time."""
    return hmac.compare_digest(verifier(pepper, key), stored)
