"""Joining server-sent events into the Message that a call without streaming would return.

It depends on the structure of events, not on their names: unknown kinds of blocks, deltas and fields are kept.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from sluice.adapters.claude_bodies import parsed
from sluice.domain.pricing import Usage

CHARS_PER_TOKEN: Final = 3
"""For an output that broke off before its usage arrived."""

UNFIT: Final = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What reading an event raises that does not fit."""

_NOT_OF_THE_MESSAGE: Final = frozenset({"type", "delta", "usage"})


class Growing:
    """The Message so far."""

    def __init__(self) -> None:
        self.document: dict[str, Any] | None = None
        """None until `message_start`."""
        self.size = 0
        """The approximate size of the Message as JSON."""
        self._inputs: dict[int, str] = {}
        self._chars = 0

    def take(self, event: dict[str, Any], size: int) -> None:
        """Add one event of `size` bytes; raises one of UNFIT if it is invalid."""
        match event.get("type"):
            case "content_block_delta":
                # Most of the bytes of a delta are not text.
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
            case _:  # message_stop, ping, and events of later versions
                pass

    def usage(self) -> Usage | None:
        """Return the usage so far, with output tokens estimated from the length; None before `message_start`."""
        if self.document is None:
            return None
        usage = Usage.from_message(self.document.get("usage"))
        return replace(
            usage, output_tokens=max(usage.output_tokens, self._chars // CHARS_PER_TOKEN)
        )

    @property
    def _message(self) -> dict[str, Any]:
        if self.document is None:
            raise LookupError("an event arrived before message_start")
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
                block_input, _ = parsed(text)
            except ValueError:
                # A tool input cut off at max_tokens, in the form in which Anthropic expects it in a later request.
                block_input = {"INVALID_JSON": text}
            self._message["content"][index]["input"] = block_input

    def _end(self, event: dict[str, Any]) -> None:
        message = self._message
        news = {name: event[name] for name in event.keys() - _NOT_OF_THE_MESSAGE} | event["delta"]
        for name, value in news.items():
            if value is not None or name not in message:
                message[name] = value
        # Counts are totals; missing or null counts have not changed.
        used = {
            name: count for name, count in (event.get("usage") or {}).items() if count is not None
        }
        if used or message.get("usage") is not None:
            message["usage"] = {**(message.get("usage") or {}), **used}
