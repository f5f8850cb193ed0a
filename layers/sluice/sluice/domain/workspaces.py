"""Limits of workspaces: what upstream has refused to one workspace of an organization, and at which pace it goes on.

A workspace can have rate and spend limits below those of its organization. No header reports them, so they are only
known from refusals. While a workspace is blocked, or slower than its organization, the calls of other workspaces are
not affected. A limit group has an entry for each workspace that was refused recently. Times are epoch milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

EQUAL_RATE: Final = 1_000_000
"""The rate of a workspace is in millionths of its organization's, which may be thousands of times as fast."""

MIN_RATE: Final = 100
RATE_AFTER_REFUSAL: Final = 500
"""Thousandths of the rate that remain after a 429: the limit is unknown, and may be far below the organization's."""

REGAIN_MS: Final = 50_000
"""Time in which a lowered rate doubles."""

PROBE_MS: Final = 30_000
"""Time between two calls that try whether a workspace that was parked works again, unless one of them is answered."""

PACED_MS: Final = 1_800_000
"""For so long after a 429 a workspace's calls start no faster than its organization's limit is refilled. Its own limit
may be enforced by the second (Anthropic, rate limits), which no header shows."""

WITHIN_MS: Final = 10_000
"""Two workspaces refused within this time, without a word whose limit it was: it is their organization's."""

SAME_EVENT_MS: Final = 500
"""A block that ends at most this much later than the current one is the same event, seen by another worker."""

PARKED_MS: Final = 86_400_000
"""After this time without a further refusal nobody uses a workspace that was parked."""

MOST_WORKSPACES: Final = 100
"""Entries kept per limit group (Anthropic permits 100 workspaces), those that matter longest."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """A workspace that was refused recently."""

    blocked_until: int = 0
    blocked_reason: str | None = None
    blocked_by: str | None = None
    """The key and the request id of the response that caused the block."""
    refused_at: int = 0
    """When it was last refused without a word whose limit it was."""
    rate_factor: int = EQUAL_RATE
    """Of the time when its last block ended."""
    last_start: int = 0
    paced_until: int = 0
    """Until then its calls start in even intervals at most as fast as the organization's limit."""
    is_probed: bool = False
    """It was parked, for money or by its owner, and has answered no call since."""

    def rate(self, now: int) -> int:
        """Return the present rate, in millionths of the organization's."""
        doublings, rest = divmod(max(0, now - self.blocked_until), REGAIN_MS)
        regained = (self.rate_factor << min(doublings, 20)) * (REGAIN_MS + rest) // REGAIN_MS
        return min(EQUAL_RATE, regained)

    def is_slow(self, now: int) -> bool:
        """Return whether its calls wait longer than those of other workspaces."""
        at = max(now, self.blocked_until)
        return at > now or self.is_probed or self.rate(at) < EQUAL_RATE

    def next_start(self, gap: int, now: int) -> int:
        """Return when its next call may start; `gap` is the time between two calls at the organization's rate."""
        if self.is_probed:
            return max(self.blocked_until, self.last_start + PROBE_MS)
        rate = self.rate(max(now, self.blocked_until))
        if rate >= EQUAL_RATE and now >= self.paced_until:
            return self.blocked_until
        return max(self.blocked_until, self.last_start + gap * EQUAL_RATE // rate)


@dataclass(frozen=True, slots=True)
class WorkspaceRefusal:
    """One refusal of a workspace."""

    names: tuple[str, ...]
    """What the workspace is called: by upstream first, then by workers that have not learned that yet."""
    until: int
    reason: str
    by: str | None = None
    is_said: bool = True
    """Upstream says that the limit is the workspace's."""
    is_rate: bool = True
    """A limit that refills, not one of money."""


def refused(
    known: Mapping[str, Workspace], refusal: WorkspaceRefusal, now: int
) -> Mapping[str, Workspace]:
    """Return the workspaces after a refusal. 429s of calls that were in flight together lower the rate once."""
    changed = dict(known)
    for name in refusal.names:
        before = known.get(name, Workspace())
        is_blocked = before.blocked_until > now
        after = before
        if not is_blocked or refusal.until > before.blocked_until + SAME_EVENT_MS:
            rate = before.rate(now)
            if refusal.is_rate and not is_blocked:
                rate = max(MIN_RATE, rate * RATE_AFTER_REFUSAL // 1000)
            after = replace(
                before,
                blocked_until=refusal.until,
                blocked_reason=refusal.reason,
                blocked_by=refusal.by,
                rate_factor=rate,
                last_start=refusal.until if refusal.is_rate else 0,
                paced_until=now + PACED_MS if refusal.is_rate else before.paced_until,
                is_probed=before.is_probed or not refusal.is_rate,
            )
        if not refusal.is_said and name == refusal.names[0]:
            after = replace(after, refused_at=now)
        changed[name] = after
    return _latest(changed, now)


def organization_until(
    known: Mapping[str, Workspace], refusal: WorkspaceRefusal, now: int
) -> int | None:
    """Return until when the whole organization waits after a refusal that does not say whose limit it is, if it does.

    Two workspaces refused in a row speak for a limit of the organization. It waits for the shorter of the two times:
    each of the two waits for its own in any case.
    """
    if refusal.is_said:
        return None
    others = [
        each
        for name, each in known.items()
        if name not in refusal.names and each.refused_at > now - WITHIN_MS
    ]
    if not others:
        return None
    return min(
        [refusal.until, *(each.blocked_until for each in others if each.blocked_until > now)]
    )


def started(known: Mapping[str, Workspace], name: str, start: int) -> Mapping[str, Workspace]:
    """Note a start in a workspace."""
    if name not in known:
        return known
    return {**known, name: replace(known[name], last_start=start)}


def answered(known: Mapping[str, Workspace], name: str) -> Mapping[str, Workspace]:
    """Note an answer to a call of a workspace."""
    if name not in known or not known[name].is_probed:
        return known
    return {**known, name: replace(known[name], is_probed=False)}


def _latest(workspaces: Mapping[str, Workspace], now: int) -> Mapping[str, Workspace]:
    """Drop the entries that say nothing any more, and the oldest if there are too many."""
    kept = {
        name: each
        for name, each in workspaces.items()
        if each.blocked_until > now
        or each.refused_at > now - WITHIN_MS
        or (each.is_probed and each.blocked_until > now - PARKED_MS)
        or each.rate(now) < EQUAL_RATE
        or each.paced_until > now
    }
    names: Iterable[str] = sorted(kept, key=lambda name: kept[name].blocked_until)
    return {name: kept[name] for name in list(names)[-MOST_WORKSPACES:]}
