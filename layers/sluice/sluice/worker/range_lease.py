"""The record of one range while an invocation holds its lease."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

from sluice.domain.batches import (
    Batch,
    RangeState,
    end_window,
    finish_range,
    keep_range,
    note_running,
    release_range,
    save_chunk,
)
from sluice.domain.errors import LeaseLost
from sluice.ports.batches import BatchStore
from sluice.ports.swap import swap
from sluice.ports.world import Blocking, Clock

LEASE_MS: Final = 30_000
KEEP_MS: Final = 10_000
"""How often the owner renews its lease, hides its message anew, and checks whether the batch was canceled."""

HIDE_MS: Final = 40_000
"""Visibility timeout of a range's message. The lease of a dead worker has run out when the message is visible again."""

assert 2 * KEEP_MS < LEASE_MS < HIDE_MS

Rule = Callable[[RangeState], RangeState]


class RangeLease:
    """A claimed range. Every write renews the lease, on the condition that no other worker took it."""

    def __init__(  # noqa: PLR0913, PLR0917 - a range, its owner, and three ports
        self,
        batch: Batch,
        state: RangeState,
        owner: str,
        store: BatchStore,
        clock: Clock,
        blocking: Blocking,
    ) -> None:
        self.batch = batch
        self.state = state
        self._owner = owner
        self._store = store
        self._clock = clock
        self._blocking = blocking
        self._changing = threading.Lock()

    @property
    def until(self) -> int:
        """When a lease that is renewed now runs out."""
        return self._clock.now() + LEASE_MS

    async def keep(self) -> None:
        """Renew it."""
        until = self.until
        await self.change(lambda state: keep_range(state, self._owner, until))

    async def save_chunk(self, name: str, rows: set[int]) -> None:
        """Add a chunk with the records of some rows."""
        until = self.until
        await self.change(
            lambda state: save_chunk(state, self._owner, lease_until=until, chunk=name, rows=rows)
        )

    async def end_window(
        self, name: str, others: Sequence[str], resume_at: int, resume_line: int
    ) -> None:
        """Replace the chunks of a window by one with all its records; `others` hold records of later rows."""
        until = self.until
        await self.change(
            lambda state: end_window(
                state,
                self._owner,
                lease_until=until,
                window=name,
                others=others,
                resume_at=resume_at,
                resume_line=resume_line,
            )
        )

    async def finish(self) -> None:
        """Note that the range's part is stored."""
        await self.change(lambda state: finish_range(state, self._owner))

    async def release(
        self, chunks: Sequence[str], not_before: int | None = None, model: str | None = None
    ) -> None:
        """Give the range back with its saved chunks; out of its queue with a `not_before`."""
        kept = tuple(chunks)
        await self.change(
            lambda state: release_range(
                state, self._owner, chunks=kept, not_before=not_before, model=model
            )
        )

    async def change(self, rule: Rule) -> None:
        """Write a change of the record; raises LeaseLost when another worker has the range."""
        await self._blocking(self.change_now, rule)

    def change_now(self, rule: Rule) -> None:
        """As `change`, in a thread: one after the other, for each is a change of the one before."""
        with self._changing:
            changed = rule(self.state)
            if changed is self.state:
                return
            if swap(self._store.replace_range, changed, self.state.version) != changed:
                raise LeaseLost(f"{changed.batch_id}, range {changed.number}")
            self.state = changed

    def as_running(self, running: Callable[[], Sequence[int]]) -> Rule:
        """Return the change that notes which rows are running at the time of the write."""
        return lambda state: note_running(state, self._owner, running())
