"""Times as text, as RFC 3339 and Anthropic's API write them."""

import pytest

from sluice.domain.times import rfc3339


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0, "1970-01-01T00:00:00.000000Z"),
        (1_795_176_000_000, "2026-11-20T12:00:00.000000Z"),
        (1_795_176_000_001, "2026-11-20T12:00:00.001000Z"),
        (None, None),
        (253_402_300_799_999, "9999-12-31T23:59:59.999000Z"),
        # Written by an earlier release, or by hand.
        (253_402_300_800_000, "9999-12-31T23:59:59.999000Z"),
        (10**30, "9999-12-31T23:59:59.999000Z"),
        (-62_135_596_800_001, "0001-01-01T00:00:00.000000Z"),
        (-(10**30), "0001-01-01T00:00:00.000000Z"),
    ],
)
def test_a_time_is_written_in_utc_with_microseconds(
    milliseconds: int | None, text: str | None
) -> None:
    assert text == rfc3339(milliseconds)
