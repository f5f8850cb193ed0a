"""The prompt cache: the prefixes an organization sent lately, to count cache reads and writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from scripts.claude_simulator.checks import Prompt
from scripts.claude_simulator.limits import SECOND

FIVE_MINUTES: Final = 300 * SECOND
ONE_HOUR: Final = 3600 * SECOND
MINIMUM_TOKENS: Final = 1024
_SWEEP_ABOVE: Final = 10_000


@dataclass(frozen=True, slots=True)
class InputTokens:
    """The input tokens of a call by kind; their sum is the whole prompt."""

    uncached: int
    written_5m: int = 0
    written_1h: int = 0
    read: int = 0

    @property
    def written(self) -> int:
        """Cache creation input tokens of both lifetimes."""
        return self.written_5m + self.written_1h


class PromptCache:
    """Prefixes by hash, readable once the answer that wrote them has started, until idle too long."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, int, int]] = {}  # hash: (from, until, lifetime)

    def use(self, prompt: Prompt, now: int, first_token: int) -> InputTokens:
        """Split a prompt into read, written and uncached tokens, and remember what it wrote."""
        read = written_5m = written_1h = 0
        usable = [mark for mark in prompt.breakpoints if mark.tokens >= MINIMUM_TOKENS]
        for mark in reversed(usable):
            entry = self._entries.get(mark.prefix_hash)
            if entry is not None and entry[0] <= now < entry[1]:
                read = mark.tokens
                break
        covered = read
        for mark in usable:
            lifetime = ONE_HOUR if mark.one_hour else FIVE_MINUTES
            if mark.tokens > covered:
                if mark.one_hour:
                    written_1h += mark.tokens - covered
                else:
                    written_5m += mark.tokens - covered
                covered = mark.tokens
                old = self._entries.get(mark.prefix_hash)
                started = old[0] if old is not None and old[1] > now else first_token
                started = min(started, first_token)
                self._entries[mark.prefix_hash] = (started, first_token + lifetime, lifetime)
            elif (entry := self._entries.get(mark.prefix_hash)) is not None and entry[1] > now:
                self._entries[mark.prefix_hash] = (entry[0], now + entry[2], entry[2])
        if len(self._entries) > _SWEEP_ABOVE:
            self._entries = {key: entry for key, entry in self._entries.items() if entry[1] > now}
        return InputTokens(prompt.tokens - covered, written_5m, written_1h, read)
