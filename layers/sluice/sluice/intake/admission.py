"""Who is let in: what is checked of a request before its body is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sluice.domain.errors import RequestTooLarge, Throttled, Unauthenticated
from sluice.domain.throttle import Throttle
from sluice.ports.clients import ClientKeys
from sluice.ports.world import Clock

MOST_BYTES: Final = 4_000_000
"""Of a request body. Lambda accepts 6 MB, including the headers and JSON escapes that API Gateway adds."""

BYTES_PER_REQUEST: Final = 100_000
"""A larger body counts as several requests: the largest takes about forty times the CPU time of a small one."""

LOOKUPS_PER_SECOND: Final = 50
"""Of keys this process does not know, all together: about a quarter of its time, at 5 ms each."""

STRANGERS: Final = "strangers"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request: the id of the client key, and its tenant."""

    key_id: str
    tenant: str


class Admission:
    """Checks size, client key and rate of each request."""

    def __init__(self, keys: ClientKeys, per_second: int, clock: Clock) -> None:
        self._keys = keys
        self._throttle = Throttle(per_second)
        self._lookups = Throttle(LOOKUPS_PER_SECOND)
        self._clock = clock

    def __call__(self, key: str, size: int) -> Caller:
        """Return the caller; raises RequestTooLarge, Unauthenticated, Throttled or StoreBusy.

        Each key known to this process has its own bucket. The lookups of all other keys share one, so that strangers
        who try keys use up neither the table nor the buckets of tenants.
        """
        if size > MOST_BYTES:
            raise RequestTooLarge(size, MOST_BYTES)
        if not key:
            raise Unauthenticated
        recalled = self._keys.recall(key)
        wait_ms, now = 0, self._clock.now()
        if recalled.tenant is not None:
            wait_ms = self._throttle.take(recalled.key_id, 1 + size // BYTES_PER_REQUEST, now)
        elif recalled.needs_lookup:
            wait_ms = self._lookups.take(STRANGERS, 1, now)
        if wait_ms:
            raise Throttled(-(-wait_ms // 1_000))
        tenant = self._keys.tenant(key)
        if tenant is None:
            raise Unauthenticated
        return Caller(recalled.key_id, tenant)
