"""Times as text: RFC 3339, as Anthropic's API writes and reads them. Everywhere else a time is epoch milliseconds."""

from __future__ import annotations

from datetime import UTC, datetime


def rfc3339(milliseconds: int | None) -> str | None:
    """Format epoch milliseconds in UTC with microseconds; None stays None."""
    if milliseconds is None:
        return None
    when = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return when.isoformat(timespec="microseconds").replace("+00:00", "Z")


def parse_rfc3339(value: object) -> int | None:
    """Return epoch milliseconds; None for anything but RFC 3339 text with a time zone."""
    if not isinstance(value, str):
        return None
    try:
        when = datetime.fromisoformat(value)
    except ValueError:
        return None
    return None if when.tzinfo is None else int(when.timestamp() * 1000)
