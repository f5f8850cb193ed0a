"""Rate limits and keys, and the event source mappings that the governor sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from sluice.domain.capacity import Consumer
from sluice.domain.keys import AdminKey, KeyMark, UpstreamKey
from sluice.domain.limits import Group, KnownLimits
from sluice.domain.shares import Note


class LimitStore(Protocol):
    """What all workers share about limit groups and keys."""

    def load(self, group_ids: Iterable[str]) -> Mapping[str, Group]:
        """Return those of the groups that exist."""
        ...

    def replace(self, group: Group, expected_version: int) -> None:
        """Write if the stored version is the expected one (0: not stored); raises Stale with the present group."""
        ...

    def groups(self) -> Sequence[Group]:
        """Return all groups."""
        ...

    def marks(self, key_ids: Iterable[str]) -> Mapping[str, KeyMark]:
        """Return what is known about the keys."""
        ...

    def mark(self, mark: KeyMark) -> None:
        """Write what is known about a key."""
        ...

    def learned_groups(self) -> Mapping[str, str]:
        """Return which model belongs to which limit group, where upstream says otherwise than our data."""
        ...

    def learn_groups(self, groups: Mapping[str, str]) -> None:
        """Write that."""
        ...

    def canary(self, canary_id: str, now: int) -> None:
        """Note that a probe came through."""
        ...


class QueueMapping(Protocol):
    """A mapping: it wakes workers for the messages of a queue."""

    def state(self) -> Consumer:
        """Return it as it stands."""
        ...

    def set(self, maximum_concurrency: int, *, enabled: bool) -> bool:
        """Change it; False when it cannot be changed right now. It takes about a minute to take hold."""
        ...


class GovernorNotes(Protocol):
    """What the governor remembers of one mapping from run to run."""

    def read(self) -> Note:
        """Return what was written last; an empty note if nothing was."""
        ...

    def write(self, note: Note) -> None:
        """Remember this, and nothing else."""
        ...


class Executions(Protocol):
    """Lambda's executions in the account and region."""

    def at_once(self) -> int:
        """Return how many may run at once, of all functions without a number of their own; raises StoreBusy."""
        ...


class PoolHistory(Protocol):
    """What can be known of the key pool without reading it."""

    def changed_at(self) -> int | None:
        """Return when the pool was last written (epoch ms)."""
        ...


class KeyPool(Protocol):
    """The upstream keys."""

    def keys(self) -> Sequence[UpstreamKey]:
        """Return the keys, at most a few minutes old; raises KeyPoolBroken or StoreBusy."""
        ...

    def model_groups(self) -> Mapping[str, str]:
        """Return the pool's word on which model belongs to which limit group; raises as `keys`."""
        ...

    def reload(self) -> None:
        """Read the secret anew at the next call, because a key was rejected."""
        ...


class AdminKeys(Protocol):
    """The admin keys of the pool."""

    def admin_keys(self) -> Sequence[AdminKey]:
        """Return them, at most a few minutes old; raises KeyPoolBroken or StoreBusy."""
        ...


class RateLimits(Protocol):
    """The Rate Limits API."""

    def load(self, key: AdminKey) -> Sequence[KnownLimits]:
        """Return an organisation's limits; raises StoreBusy (later), or KeyPoolBroken (the key is not accepted)."""
        ...
