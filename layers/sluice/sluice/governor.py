"""The governor: once a minute it gives each mapping the concurrency that the limits can use, and says why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from sluice.domain.capacity import Backlog, Consumer, Decision, decide, starts_per_second
from sluice.domain.errors import StoreBusy
from sluice.domain.limits import Group
from sluice.ports import (
    Clock,
    Events,
    GovernorNotes,
    LimitStore,
    PoolHistory,
    QueueMapping,
)

RUN_MS: Final = 60_000
"""The time from one scheduled run to the next, as in template.yaml."""

DAY_MS: Final = 86_400_000
OLD_DAYS: Final = 90
"""A key pool that was not written for this long holds keys that should be rotated."""


@dataclass(frozen=True, slots=True)
class Governed:
    """A mapping, and what belongs to it alone; the limits are shared."""

    name: str
    """What its queue holds: the log's word for it."""
    mapping: QueueMapping
    backlog: Callable[[], Backlog]
    notes: GovernorNotes
    ceiling: int


class Governor:
    """The use case behind the schedule, together with the sweep."""

    def __init__(
        self,
        governed: Sequence[Governed],
        limits: LimitStore,
        pool: PoolHistory,
        clock: Clock,
        events: Events,
    ) -> None:
        self._governed = governed
        self._limits = limits
        self._pool = pool
        self._clock = clock
        self._events = events

    def __call__(self) -> None:
        """Look, decide, change each mapping if need be. One that fails holds up no other; its error is raised last."""
        now = self._clock.now()
        changed_at = self._pool_changed_at()
        if changed_at is not None:
            self._warn_of_old_keys(changed_at, now)
        groups = self._limits.groups()
        failure: Exception | None = None
        for governed in self._governed:
            try:
                self._govern(governed, groups, changed_at, now)
            except Exception as error:  # noqa: BLE001 - raised when the others have had their turn
                self._events.problem("mapping not governed", mapping=governed.name)
                failure = error
        if failure is not None:
            raise failure

    def _govern(
        self, governed: Governed, groups: Sequence[Group], changed_at: int | None, now: int
    ) -> None:
        consumer = governed.mapping.state()
        if not consumer.settled:
            return
        backlog = governed.backlog()
        turned_off = governed.notes.turned_off_at() is not None
        decision = decide(
            groups,
            backlog,
            consumer,
            ceiling=governed.ceiling,
            now=now,
            turned_off=turned_off,
            pool_changed_at=changed_at,
        )
        if decision.changes(consumer):
            if not decision.enabled:
                # Noted first: a mapping that is off without a note counts as switched off by hand, for good.
                governed.notes.note_turned_off(now)
            if not governed.mapping.set(decision.maximum_concurrency, enabled=decision.enabled):
                return
            self._tell(governed.name, decision, consumer, groups, backlog, now)
        if decision.enabled and turned_off:
            governed.notes.note_turned_off(None)

    def _pool_changed_at(self) -> int | None:
        try:
            return self._pool.changed_at()
        except StoreBusy as busy:
            # The next minute will tell; the workers must not wait for it.
            self._events.problem("store busy", what=busy.what)
            return None

    def _warn_of_old_keys(self, changed_at: int, now: int) -> None:
        """Warn once a day: in the run in which the pool's age reaches another whole day."""
        age = now - changed_at
        if age >= OLD_DAYS * DAY_MS and age // DAY_MS != (age - RUN_MS) // DAY_MS:
            self._events.count("OldKeys")
            self._events.problem("upstream keys are old", days=age // DAY_MS)

    def _tell(  # noqa: PLR0913, PLR0917 - the facts of one change
        self,
        name: str,
        decision: Decision,
        consumer: Consumer,
        groups: Sequence[Group],
        backlog: Backlog,
        now: int,
    ) -> None:
        facts = {
            "mapping": name,
            "from": (consumer.maximum_concurrency or 0) if consumer.enabled else 0,
            "to": decision.maximum_concurrency if decision.enabled else 0,
            "reason": decision.reason,
            "waiting": backlog.visible,
            "in_flight": backlog.in_flight,
            "groups": {
                group.id: {
                    "starts_per_minute": round(60 * starts_per_second(group, now)),
                    "call_ms": group.call_ms,
                    "blocked_seconds": max(0, group.blocked_until - now) // 1000,
                }
                for group in groups
                if group.moved_to is None
            },
        }
        self._events.note("concurrency changed", **facts)
