"""A throttle for callers: one token bucket per name, in the memory of one process.

It bounds what one caller takes of one execution environment. It knows nothing of other environments: with n of them a
caller gets up to n times the rate (docs/decisions/0033-a-throttle-per-environment.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

BURST_SECONDS: Final = 20
"""A caller that was idle may send as much at once as in this time."""


@dataclass(slots=True)
class _Bucket:
    level: int
    """In thousandths of a request; negative after a request that cost more than was left."""
    updated_at: int


class Throttle:
    """Token buckets of equal size, refilled at `per_second`."""

    def __init__(self, per_second: int) -> None:
        self._per_second = per_second
        self._most = per_second * BURST_SECONDS * 1_000
        self._buckets: dict[str, _Bucket] = {}

    def take(self, name: str, cost: int, now: int) -> int:
        """Take `cost` requests of a bucket that is not empty, and return 0; else return the milliseconds until it is.

        The last request before it is empty may cost more than is left: the bucket owes the rest.
        """
        bucket = self._buckets.setdefault(name, _Bucket(self._most, now))
        # A clock may go back.
        elapsed_ms = max(0, now - bucket.updated_at)
        bucket.level = min(self._most, bucket.level + elapsed_ms * self._per_second)
        bucket.updated_at = now
        if bucket.level < 1_000:  # noqa: PLR2004 - one request
            return -(-(1_000 - bucket.level) // self._per_second)
        bucket.level -= cost * 1_000
        return 0
