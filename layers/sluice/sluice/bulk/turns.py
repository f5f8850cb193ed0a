"""Long steps of a tenant's batches take turns, so that they occupy one invocation and leave the others to everybody.

A step is at most as long as an invocation. Making the rows of a large file, and the end of a large batch, take minutes,
and the batches function has few invocations: a tenant with as many large files would have all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sluice.domain.batches import Batch
from sluice.domain.errors import NotItsTurn, StoreBusy
from sluice.ports.batches import Turns
from sluice.ports.world import Clock, Events

TURN_MS: Final = 15 * 60_000
"""A turn ends after this time, the longest invocation, if its holder died. The same batch may continue at once."""

NOT_ITS_TURN_MS: Final = 15_000
"""After this time a step is tried again for which another batch had the turn; after many tries a little later."""


@contextmanager
def in_turn(
    turns: Turns, clock: Clock, events: Events, batch: Batch, *, is_long: bool
) -> Iterator[None]:
    """Hold the turn of the batch's tenant during a step, if the step is long.

    Raises NotItsTurn if another batch of the tenant has it, and StoreBusy.
    """
    if not is_long:
        yield
        return
    now = clock.now()
    if not turns.take_turn(batch.tenant, batch.batch_id, now, now + TURN_MS):
        raise NotItsTurn(batch.batch_id)
    try:
        yield
    finally:
        try:
            turns.end_turn(batch.tenant, batch.batch_id)
        except StoreBusy as busy:
            # It ends by itself.
            events.problem("store busy", what=busy.what)
