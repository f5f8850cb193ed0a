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


NOT_IN_BATCHES: Final = (
    *("speed", "store", "previous_thread_event_id", "cache_hint", "context_hint"),
    "research_preview_2026_02",
)
"""Fields that Message Batches reject, whatever their value. Source: Anthropic's guide "Batch processing", its table of
unsupported parameters."""


def not_in_batches(params: Mapping[str, Any]) -> str | None:
    """Return the first field of a request that Message Batches reject, and why; None if they accept the request.

    A field that is null counts as absent. Source: Anthropic's guide "Batch processing" (`stream: true`,
    `max_tokens: 0` and the fields in `NOT_IN_BATCHES`).
    """
    if params.get("stream") is True:
        return "stream: true is not supported in Message Batches; remove it"
    if params.get("max_tokens") == 0:
        return "max_tokens: 0 is not supported in Message Batches; use at least 1"
    for name in NOT_IN_BATCHES:
        if params.get(name) is not None:
            return f"{name}: not supported in Message Batches; remove it"
    return None


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
