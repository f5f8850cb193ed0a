"""Times as text: RFC 3339, as Anthropic's API writes and reads them. Everywhere else a time is epoch milliseconds."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
EARLIEST_MS: Final = -62_135_596_800_000
"""0001-01-01T00:00:00Z."""
LATEST_MS: Final = 253_402_300_799_999
"""9999-12-31T23:59:59.999Z."""


def rfc3339(milliseconds: int | None) -> str | None:
    """Format epoch milliseconds in UTC with microseconds; None stays None.

    Never raises, because one stored time must not make a whole list unreadable: a time that has no such text is shown
    as the earliest or the latest one that has.
    """
    if milliseconds is None:
        return None
    when = _EPOCH + timedelta(milliseconds=min(max(milliseconds, EARLIEST_MS), LATEST_MS))
    return when.isoformat(timespec="microseconds").replace("+00:00", "Z")


def from_rfc3339(text: object) -> int | None:
    """Return the time of an RFC 3339 text in epoch milliseconds, rounded down; None for anything else."""
    try:
        when = datetime.fromisoformat(text) if isinstance(text, str) else None
    except ValueError:
        return None
    if when is None or when.tzinfo is None:
        return None
    return (when - _EPOCH) // timedelta(milliseconds=1)
