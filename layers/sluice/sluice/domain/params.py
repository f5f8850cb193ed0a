"""The params of a job, which are the body of its Messages request: as bytes, and as a number of characters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

NEWEST_VERSION: Final = "2026-10-21"
"""The newest `anthropic-version` that Sluice supports; sent upstream for jobs that name none."""

IMAGE_CHARS: Final = 5_600
"""About 1,600 tokens, as for a large image, at 3.5 characters per token."""

MOST_MEDIA_CHARS: Final = 100_000
"""Maximum for all media of a request: under 30,000 tokens, the rate at which a new limit group starts."""


def request_body(params: Mapping[str, Any]) -> bytes:
    """Return a request as it is stored and sent; raises UnicodeEncodeError."""
    return json.dumps(params, ensure_ascii=False, separators=(",", ":")).encode()


def input_chars(params: Mapping[str, Any]) -> int:
    """Count the characters that become input tokens.

    The length of base64 data says little about its tokens. An image counts as the characters of about 1,600 tokens
    whatever its size; a document as one character per 60 bytes, but at least as much as an image. All data of a request
    together counts for at most `MOST_MEDIA_CHARS`, so that this estimate alone never makes a request too large for a
    limit group: the actual usage is settled after the call.
    """
    media = 0

    def count(value: object) -> int:
        nonlocal media
        if isinstance(value, str):
            return len(value)
        if isinstance(value, Mapping):
            data = value.get("data")
            if value.get("type") == "base64" and isinstance(data, str):
                is_image = str(value.get("media_type")).startswith("image/")
                media += IMAGE_CHARS if is_image else max(IMAGE_CHARS, len(data) * 3 // 4 // 60)
                return 0
            return sum(map(count, value.values()))
        if isinstance(value, Sequence):
            return sum(map(count, value))
        return 1

    text = sum(count(params.get(name, "")) for name in ("system", "messages", "tools"))
    return text + min(media, MOST_MEDIA_CHARS)
