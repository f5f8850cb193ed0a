"""The port of client keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Recalled:
    """What is known of a client key without a call."""

    key_id: str
    tenant: str | None
    """The tenant when the key was last looked up, also if that is too long ago."""
    needs_lookup: bool
    """Whether the next lookup of the key makes a call."""


class ClientKeys(Protocol):
    """The client keys of all tenants."""

    def recall(self, key: str) -> Recalled:
        """Return what is known of the key, without a call."""
        ...

    def tenant(self, key: str) -> str | None:
        """Return the tenant of the key, None for an unknown or disabled one; raises StoreBusy."""
        ...
