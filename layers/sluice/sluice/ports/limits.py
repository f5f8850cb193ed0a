"""Rate limits, keys, and the event source mappings that the governor sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Protocol

from sluice.domain.capacity import Consumer
from sluice.domain.keys import AdminKey, KeyMark, UpstreamKey
from sluice.domain.limits import Group, KnownLimits
from sluice.domain.models import KnownModels
from sluice.domain.shares import Note

MOST_GROUPS: Final = 2_000
"""Maximum limit groups that one read of all returns: about 3 MB and 0.3 s. The governor reports when there are more."""


class LimitStore(Protocol):
    """The state of limit groups and keys that all workers share."""

    def load(self, group_ids: Iterable[str]) -> Mapping[str, Group]:
        """Return the groups that exist, by id."""
        ...

    def replace(self, group: Group, expected_version: int) -> None:
        """Write if the stored version is the expected one (0: not stored); else raises Stale with the stored group."""
        ...

    def groups(self) -> Sequence[Group]:
        """Return the groups in use, at most MOST_GROUPS."""
        ...

    def marks(self, key_ids: Iterable[str]) -> Mapping[str, KeyMark]:
        """Return the marks of the keys that have one, by key id."""
        ...

    def mark(self, mark: KeyMark) -> None:
        """Write the mark of a key."""
        ...

    def models(self) -> KnownModels:
        """Return the models that are known beside those of the deployed data; version 0 if none is."""
        ...

    def replace_models(self, models: KnownModels, expected_version: int) -> None:
        """Write if the stored version is the expected one (0: not stored); else raises Stale with the stored ones."""
        ...

    def canary(self, canary_id: str, now: int) -> None:
        """Record that a canary message was received."""
        ...


class QueueMapping(Protocol):
    """The event source mapping of a queue."""

    def state(self) -> Consumer:
        """Return the current configuration."""
        ...

    def set(self, maximum_concurrency: int, *, enabled: bool) -> bool:
        """Change the configuration; False if it cannot be changed now. Takes effect within about a minute."""
        ...


class GovernorNotes(Protocol):
    """What the governor stores about one mapping between runs."""

    def read(self) -> Note:
        """Return the last note; an empty one if there is none."""
        ...

    def write(self, note: Note) -> None:
        """Replace the note."""
        ...


class Executions(Protocol):
    """Lambda's concurrent executions in the account and region."""

    def at_once(self) -> int:
        """Return how many may run at once, except those reserved for single functions; raises StoreBusy."""
        ...


class PoolHistory(Protocol):
    """The metadata of the key pool."""

    def changed_at(self) -> int | None:
        """Return when the pool was last written (epoch ms)."""
        ...


class KeyPool(Protocol):
    """The upstream keys."""

    def keys(self) -> Sequence[UpstreamKey]:
        """Return the keys, at most a few minutes old; raises KeyPoolBroken or StoreBusy."""
        ...

    def model_groups(self) -> Mapping[str, str]:
        """Return the model groups that the pool states, by model; raises as `keys`."""
        ...

    def reload(self) -> None:
        """Make the next call read the secret again, because a key was rejected."""
        ...


class AdminKeys(Protocol):
    """The admin keys of the pool."""

    def admin_keys(self) -> Sequence[AdminKey]:
        """Return the admin keys, at most a few minutes old; raises KeyPoolBroken or StoreBusy."""
        ...


class RateLimits(Protocol):
    """The Rate Limits API."""

    def load(self, key: AdminKey) -> Sequence[KnownLimits]:
        """Return the limits of an organization; raises StoreBusy, or KeyPoolBroken if the key is rejected."""
        ...
