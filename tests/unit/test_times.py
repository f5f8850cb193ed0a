"""Times as text, as RFC 3339 and Anthropic's API write them."""

import pytest

from sluice.domain.times import from_rfc3339, rfc3339


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


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [
        ("1970-01-01T00:00:00Z", 0),
        # 2024-09-24T18:37:24Z is 1727203044 s after the epoch (`date -u -d`).
        ("2024-09-24T18:37:24.100435Z", 1_727_203_044_100),
        ("2024-09-24T20:37:24.100999+02:00", 1_727_203_044_100),
        ("2024-09-24T18:37:24.100435123Z", 1_727_203_044_100),
        ("1969-12-31T23:59:59.999999Z", -1),
        ("0001-01-01T00:00:00+23:59", -62_135_683_140_000),
        # Without an offset it is not RFC 3339.
        ("2024-09-24T18:37:24", None),
        ("yesterday", None),
        ("", None),
        (None, None),
        (1_727_203_044, None),
    ],
)
def test_only_a_time_with_an_offset_is_read(text: object, milliseconds: int | None) -> None:
    assert milliseconds == from_rfc3339(text)
