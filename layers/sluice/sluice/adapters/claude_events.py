"""A Message that arrives as server-sent events, put together to what it would have been in one piece.

It knows the shape of events and not their vocabulary: a kind of block, delta or field that is newer than this code
ends up in the Message all the same.
"""

from __future__ import annotations

import json
from typing import Any, Final

from sluice.domain.pricing import Usage

CHARS_PER_TOKEN: Final = 3
"""For the part of an output that broke off before its usage came."""

_NOT_OF_THE_MESSAGE: Final = frozenset({"type", "delta", "usage"})


class Growing:
    """The Message so far."""

    def __init__(self) -> None:
        self.document: dict[str, Any] | None = None
        """None until it has begun."""
        self.size = 0
        """About how many bytes it has as JSON."""
        self._inputs: dict[int, str] = {}
        self._chars = 0

    def take(self, event: dict[str, Any], size: int) -> None:
        """Add one event of so many bytes; raises LookupError, TypeError or AttributeError when it does not fit."""
        match event.get("type"):
            case "content_block_delta":
                # Most of a delta is its wrapping.
                texts = [value for value in event["delta"].values() if isinstance(value, str)]
                is_text = len(texts) == len(event["delta"])
                self.size += sum(map(len, texts)) if is_text else size
            case "message_start" | "content_block_start" | "message_delta":
                self.size += size
        match event.get("type"):
            case "message_start":
                self.document = {**event["message"], "content": list(event["message"]["content"])}
            case "content_block_start":
                self._message["content"].insert(event["index"], dict(event["content_block"]))
            case "content_block_delta":
                self._grow(event["index"], event["delta"])
            case "content_block_stop":
                self._close(event["index"])
            case "message_delta":
                self._end(event)
            case _:  # message_stop, pings, and what may come in later versions
                pass

    def usage(self) -> Usage | None:
        """Return what was used so far, output tokens estimated from its length; None before it began."""
        if self.document is None:
            return None
        used = self.document.get("usage")
        counts = dict(used) if isinstance(used, dict) else {}
        counts["output_tokens"] = max(
            int(counts.get("output_tokens") or 0), self._chars // CHARS_PER_TOKEN
        )
        return Usage.from_message(counts)

    @property
    def _message(self) -> dict[str, Any]:
        if self.document is None:
            message = "an event came before message_start"
            raise LookupError(message)
        return self.document

    def _grow(self, index: int, delta: dict[str, Any]) -> None:
        block = self._message["content"][index]
        for name, value in delta.items():
            if name == "type":
                continue
            self._chars += len(value) if isinstance(value, str) else 0
            if name == "partial_json":
                self._inputs[index] = self._inputs.get(index, "") + value
            elif name == "citation":
                block["citations"] = [*(block.get("citations") or []), value]
            elif isinstance(value, str) and isinstance(block.get(name), str):
                block[name] += value
            else:
                block[name] = value

    def _close(self, index: int) -> None:
        text = self._inputs.pop(index, "")
        if text:
            try:
                block_input = json.loads(text)
            except ValueError:
                # A tool input cut off at max_tokens, kept the way Anthropic asks for it to be sent back.
                block_input = {"INVALID_JSON": text}
            self._message["content"][index]["input"] = block_input

    def _end(self, event: dict[str, Any]) -> None:
        message = self._message
        news = {name: event[name] for name in event.keys() - _NOT_OF_THE_MESSAGE} | event["delta"]
        for name, value in news.items():
            if value is not None or name not in message:
                message[name] = value
        # Counts are totals; what is left out or null has not changed.
        used = {
            name: count for name, count in (event.get("usage") or {}).items() if count is not None
        }
        message["usage"] = {**(message.get("usage") or {}), **used}
