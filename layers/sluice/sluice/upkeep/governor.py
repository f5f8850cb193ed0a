"""The governor: once a minute it sets the concurrency of each queue's mapping, and logs why.

Workers get what Claude's limits can keep busy (`capacity.py`), the other mappings a fixed number; all of them share
what the account's Lambda limit leaves (`shares.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from sluice.domain.capacity import (
    LEAST,
    Backlog,
    Consumer,
    Decision,
    decide,
    starts_per_second,
    switched_off_by_hand,
)
from sluice.domain.errors import StoreBusy
from sluice.domain.limits import Group
from sluice.domain.shares import APPLIED_MS, Claim, Note, Share, room_of, share
from sluice.ports.limits import Executions, GovernorNotes, LimitStore, PoolHistory, QueueMapping
from sluice.ports.world import Clock, Events

RUN_MS: Final = 60_000
"""The time from one scheduled run to the next, as in template.yaml."""

DAY_MS: Final = 86_400_000
OLD_DAYS: Final = 90
"""A key pool that was not written for this long holds keys that should be rotated."""


@dataclass(frozen=True, slots=True)
class Governed:
    """A mapping, and what belongs to it alone; Claude's limits and the account's are shared."""

    name: str
    """What its queue holds: the log's word for it."""
    mapping: QueueMapping
    backlog: Callable[[], Backlog]
    notes: GovernorNotes
    ceiling: int
    timeout_ms: int = 900_000
    """An invocation of its function ends after this time at the latest."""
    calls_claude: bool = True
    """How many it needs depends on Claude's limits; otherwise it is the ceiling."""
    refills: bool = False
    """Its invocations take further messages themselves."""


@dataclass(frozen=True, slots=True)
class Present:
    """One mapping in one run: how it is, and what it would have with room for all."""

    governed: Governed
    consumer: Consumer
    backlog: Backlog
    note: Note
    decision: Decision

    def claim(self, now: int) -> Claim:
        """Return what it claims of the account's executions."""
        present = self.consumer.maximum_concurrency or self.governed.ceiling
        enabled, in_flight = self.consumer.enabled, self.backlog.in_flight
        by_hand = not enabled and self.note.turned_off_at is None
        left = present if by_hand else self.note.left_at(now)
        since = self.note.turned_on_at if enabled else self.note.turned_off_at
        return Claim(
            self.governed.name,
            self.decision.maximum_concurrency if self.decision.enabled else None,
            present,
            enabled,
            self.backlog,
            switched_at=since or 0,
            # An invocation has a message in flight until it ends. While a change takes hold, new ones may start.
            left=min(left, in_flight) if self.consumer.is_applied else left,
            fixed=not self.consumer.is_applied,
            refills=self.governed.refills,
        )


class Governor:
    """The use case behind the schedule, together with the sweep."""

    def __init__(  # noqa: PLR0913, PLR0917 - what it looks at
        self,
        governed: Sequence[Governed],
        limits: LimitStore,
        pool: PoolHistory,
        executions: Executions,
        clock: Clock,
        events: Events,
    ) -> None:
        self._governed = governed
        self._limits = limits
        self._pool = pool
        self._executions = executions
        self._clock = clock
        self._events = events
        self._failure: Exception | None = None

    def __call__(self) -> None:
        """Look, decide, change each mapping if need be. One that fails holds up no other; its error is raised last."""
        now = self._clock.now()
        self._failure = None
        changed_at = self._pool_changed_at()
        if changed_at is not None:
            self._warn_of_old_keys(changed_at, now)
        groups = self._limits.groups()
        room = self._room()
        is_short = room is None or room < sum(each.ceiling for each in self._governed)
        found: dict[str, Present] = {}
        for governed in self._governed:
            present = self._look(governed, groups, changed_at, now, is_short=is_short)
            if present is not None:
                found[governed.name] = present
        claims = [
            found[each.name].claim(now) if each.name in found else _unknown(each)
            for each in self._governed
        ]
        if room is None:
            # Nothing is raised: what they have may be all there is.
            room = sum(each.charge for each in claims)
        self._change(found, share(claims, room, now), groups, room, now, is_short=is_short)
        if self._failure is not None:
            raise self._failure

    def _room(self) -> int | None:
        """Return how many executions the queues may use together; None if that cannot be known now."""
        try:
            return room_of(self._executions.at_once())
        except Exception as error:  # noqa: BLE001 - raised when the mappings have had their turn
            self._events.problem("account limit not read")
            self._failure = error
            return None

    def _look(
        self,
        governed: Governed,
        groups: Sequence[Group],
        changed_at: int | None,
        now: int,
        *,
        is_short: bool,
    ) -> Present | None:
        """Return a mapping as it is; None if that cannot be read."""
        try:
            consumer = governed.mapping.state()
            if not consumer.is_applied and not is_short:
                return None
            # The depth of a queue costs a call, and says nothing of a mapping that has room in any case.
            is_needed = is_short or governed.calls_claude or not consumer.enabled
            backlog = governed.backlog() if is_needed else Backlog()
            note = governed.notes.read()
        except Exception as error:  # noqa: BLE001 - raised when the others have had their turn
            self._not_governed(governed, error)
            return None
        if governed.calls_claude:
            decision = decide(
                groups,
                backlog,
                consumer,
                ceiling=governed.ceiling,
                now=now,
                turned_off=note.turned_off_at is not None,
                pool_changed_at=changed_at,
            )
        elif not consumer.enabled and note.turned_off_at is None:
            decision = switched_off_by_hand(consumer, governed.ceiling)
        else:
            decision = Decision(
                governed.ceiling, enabled=True, reason=f"at most {governed.ceiling}"
            )
        return Present(governed, consumer, backlog, note, decision)

    def _change(  # noqa: PLR0913 - the facts of one run
        self,
        found: dict[str, Present],
        shares: dict[str, Share],
        groups: Sequence[Group],
        room: int,
        now: int,
        *,
        is_short: bool,
    ) -> None:
        """Change what is to be something else. What makes room goes first; where it fails, nobody takes the room."""
        decisions = {name: _agreed(each.decision, shares[name]) for name, each in found.items()}
        is_kept = True
        for name in sorted(found, key=lambda name: _raises(decisions[name], found[name].consumer)):
            present, decision = found[name], decisions[name]
            if not present.consumer.is_applied:
                continue
            raises = _raises(decision, present.consumer)
            if raises and is_short and not is_kept:
                continue
            try:
                is_done = self._set(present, decision, now)
            except Exception as error:  # noqa: BLE001 - raised when the others have had their turn
                self._not_governed(present.governed, error)
                is_done = False
            if not is_done:
                is_kept = is_kept and raises
            elif decision.changes(present.consumer):
                self._report(present, decision, groups, room, now)

    def _set(self, present: Present, decision: Decision, now: int) -> bool:
        """Make one mapping what was decided, and remember it; False if Lambda does not take the change now."""
        governed, consumer, note = present.governed, present.consumer, present.note
        is_off = note.turned_off_at is not None
        if not decision.changes(consumer):
            if decision.enabled and is_off:
                governed.notes.write(replace(note, turned_off_at=None))
            return True
        lowers = not decision.enabled or not _raises(decision, consumer)
        if lowers:
            # Noted first: a mapping that is off without a note counts as switched off by hand, for good.
            had = consumer.maximum_concurrency or governed.ceiling
            note = Note(
                turned_off_at=None if decision.enabled else now,
                turned_on_at=note.turned_on_at,
                left=max(had, note.left_at(now)),
                left_until=now + governed.timeout_ms + APPLIED_MS,
            )
            governed.notes.write(note)
        if not governed.mapping.set(decision.maximum_concurrency, enabled=decision.enabled):
            return False
        if decision.enabled and is_off:
            turned_on_at = note.turned_on_at if consumer.enabled else now
            governed.notes.write(replace(note, turned_off_at=None, turned_on_at=turned_on_at))
        return True

    def _not_governed(self, governed: Governed, error: Exception) -> None:
        self._events.problem("mapping not governed", mapping=governed.name)
        self._failure = error

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

    def _report(
        self, present: Present, decision: Decision, groups: Sequence[Group], room: int, now: int
    ) -> None:
        consumer, backlog = present.consumer, present.backlog
        facts: dict[str, object] = {
            "mapping": present.governed.name,
            "from": (consumer.maximum_concurrency or 0) if consumer.enabled else 0,
            "to": decision.maximum_concurrency if decision.enabled else 0,
            "reason": decision.reason,
            "waiting": backlog.visible,
            "in_flight": backlog.in_flight,
            "executions_for_queues": room,
        }
        if present.governed.calls_claude:
            facts["groups"] = {
                group.id: {
                    "starts_per_minute": round(60 * starts_per_second(group, now)),
                    "call_ms": group.call_ms,
                    "blocked_seconds": max(0, group.blocked_until - now) // 1000,
                }
                for group in groups
                if group.moved_to is None
            }
        self._events.note("concurrency changed", **facts)


def _unknown(governed: Governed) -> Claim:
    """Return the claim of a mapping that could not be read: it may be using all that it may have."""
    return Claim(
        governed.name,
        None,
        LEAST,
        enabled=True,
        backlog=Backlog(),
        left=governed.ceiling,
        fixed=True,
    )


def _agreed(decision: Decision, given: Share) -> Decision:
    """Return the decision as far as there is room for it."""
    if not decision.enabled:
        return decision
    reasons = [decision.reason, given.reason] if given.enabled else [given.reason]
    reason = "; ".join(each for each in reasons if each)
    return Decision(given.maximum_concurrency, given.enabled, reason)


def _raises(decision: Decision, consumer: Consumer) -> bool:
    """Return whether the mapping can run more after the change than before it."""
    if not decision.enabled:
        return False
    present = consumer.maximum_concurrency
    return not consumer.enabled or (present is not None and decision.maximum_concurrency > present)
