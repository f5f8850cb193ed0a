"""The governor: sets the concurrency of each queue's event source mapping once a minute, and logs why.

Workers get the concurrency that Claude's limits can keep busy (`capacity.py`), the other mappings a constant. All share
what the account limit leaves (`shares.py`).
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
from sluice.ports.limits import (
    MOST_GROUPS,
    Executions,
    GovernorNotes,
    LimitStore,
    PoolHistory,
    QueueMapping,
)
from sluice.ports.world import Clock, Events
from sluice.upkeep.schedule import RUN_MS

DAY_MS: Final = 86_400_000
OLD_DAYS: Final = 90
"""Keys of a pool that was not written for this long should be rotated."""


@dataclass(frozen=True, slots=True)
class Governed:
    """One event source mapping, with its queue and its stored note."""

    name: str
    """What its queue holds; the name in the log."""
    mapping: QueueMapping
    backlog: Callable[[], Backlog]
    notes: GovernorNotes
    ceiling: int
    timeout_ms: int = 900_000
    """The timeout of its function."""
    calls_claude: bool = True
    """Its concurrency depends on Claude's limits; otherwise it is the ceiling."""
    refills: bool = False
    """Its invocations take more messages themselves."""


@dataclass(frozen=True, slots=True)
class Present:
    """One mapping in one run: its current state, and the decision if there is room for all."""

    governed: Governed
    consumer: Consumer
    backlog: Backlog
    note: Note
    decision: Decision

    def claim(self, now: int) -> Claim:
        """Return its claim to the account's executions."""
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
            # An invocation has a message in flight until it ends. Until a change takes effect, new ones may start.
            left=min(left, in_flight) if self.consumer.is_applied else left,
            fixed=not self.consumer.is_applied,
            refills=self.governed.refills,
        )


class Governor:
    """The use case behind the schedule, together with the sweep."""

    def __init__(  # noqa: PLR0913, PLR0917 - its tools
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
        """Read, decide, and change each mapping if necessary. An error does not stop the others; it is raised last."""
        now = self._clock.now()
        self._failure = None
        changed_at = self._pool_changed_at()
        if changed_at is not None:
            self._warn_of_old_keys(changed_at, now)
        groups = self._limits.groups()
        if len(groups) >= MOST_GROUPS:
            self._events.problem("not all limit groups read", read=len(groups))
        room = self._room()
        is_short = room is None or room < sum(each.ceiling for each in self._governed)
        found: dict[str, Present] = {}
        for governed in self._governed:
            present = self._read(governed, groups, changed_at, now, is_short=is_short)
            if present is not None:
                found[governed.name] = present
        claims = [
            found[each.name].claim(now) if each.name in found else _unknown(each)
            for each in self._governed
        ]
        if room is None:
            # Without a known limit no mapping is raised: the present sum may be all that the account has.
            room = sum(each.charge for each in claims)
        self._change(found, share(claims, room, now), groups, room, now, is_short=is_short)
        if self._failure is not None:
            raise self._failure

    def _room(self) -> int | None:
        """Return how many executions the queues may use together; None if it cannot be read."""
        try:
            return room_of(self._executions.at_once())
        except Exception as error:  # noqa: BLE001 - raised after all mappings are done
            self._events.problem("account limit not read")
            self._failure = error
            return None

    def _read(
        self,
        governed: Governed,
        groups: Sequence[Group],
        changed_at: int | None,
        now: int,
        *,
        is_short: bool,
    ) -> Present | None:
        """Return the current state of a mapping; None if it cannot be read."""
        try:
            consumer = governed.mapping.state()
            if not consumer.is_applied and not is_short:
                return None
            # Reading the depth of a queue costs a call, and is not needed if there is room for all.
            is_needed = is_short or governed.calls_claude or not consumer.enabled
            backlog = governed.backlog() if is_needed else Backlog()
            note = governed.notes.read()
        except Exception as error:  # noqa: BLE001 - raised after the others are done
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
        """Change the mappings that differ: first those that make room. If that fails, none is raised."""
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
            except Exception as error:  # noqa: BLE001 - raised after the others are done
                self._not_governed(present.governed, error)
                is_done = False
            if not is_done:
                is_kept = is_kept and raises
            elif decision.changes(present.consumer):
                self._report(present, decision, groups, room, now)

    def _set(self, present: Present, decision: Decision, now: int) -> bool:
        """Apply a decision to one mapping and store the note; False if Lambda does not accept the change now."""
        governed, consumer, note = present.governed, present.consumer, present.note
        is_off = note.turned_off_at is not None
        if not decision.changes(consumer):
            if decision.enabled and is_off:
                governed.notes.write(replace(note, turned_off_at=None))
            return True
        lowers = not decision.enabled or not _raises(decision, consumer)
        if lowers:
            # The note is stored first: without it a disabled mapping counts as disabled by hand, and stays disabled.
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
            # The next run tries again; the workers must not wait for it.
            self._events.problem("store busy", what=busy.what)
            return None

    def _warn_of_old_keys(self, changed_at: int, now: int) -> None:
        """Warn once a day, in the run in which the age of the pool reaches another whole day."""
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
    """Return the claim of a mapping that could not be read: it may use its whole ceiling."""
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
    """Return the decision, limited to the share of the mapping."""
    if not decision.enabled:
        return decision
    reasons = [decision.reason, given.reason] if given.enabled else [given.reason]
    reason = "; ".join(each for each in reasons if each)
    return Decision(given.maximum_concurrency, given.enabled, reason)


def _raises(decision: Decision, consumer: Consumer) -> bool:
    """Return whether the decision raises the concurrency of the mapping."""
    if not decision.enabled:
        return False
    present = consumer.maximum_concurrency
    return not consumer.enabled or (present is not None and decision.maximum_concurrency > present)
