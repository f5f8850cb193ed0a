"""How the queues' mappings share the account's Lambda executions, with time as an argument.

An account may run so many executions at once in a region, all functions together: 1,000 as a rule, 10 in many new
accounts. `RESERVED` of them are left to the functions that no queue wakes; the rest is the room of the mappings.

- With room for what every mapping wants, each gets it, and all stay enabled.
- With less, each gets its part: the busy ones first, evenly, and never less than Lambda accepts.
- With too little for that, as many mappings are enabled as fit, with two executions each, and the others are disabled.
  An idle one makes room for one whose queue has messages; when none is idle they take turns, the longest disabled
  first. An odd execution is left to the API, which serves more than one caller at a time.

A mapping that was disabled, or lowered, still has the invocations it had. What they may use is nobody else's until they
must have ended, or nothing is in flight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sluice.domain.capacity import LEAST, Backlog

RESERVED: Final = 3
"""Executions that no queue may use: one each for the API, the governor, and the function behind the stream."""

CEILINGS: Final[Mapping[str, int]] = {
    "batches": 4,  # the sections of a large batch are joined side by side
    "webhooks": 5,  # fifty deliveries at once
    "dead letters": LEAST,  # rare, and in no hurry
    "range dead letters": LEAST,
}
"""The most that a mapping gets whose need does not depend on Claude's limits."""

TURN_MS: Final = 120_000
"""A mapping with messages stays enabled this long before it makes room: a change takes Lambda up to a minute."""

APPLIED_MS: Final = 60_000
"""The time a change of a mapping takes to take hold, at most."""


@dataclass(frozen=True, slots=True)
class Note:
    """What the governor remembers of one mapping from run to run."""

    turned_off_at: int | None = None
    """When the governor switched it off; None while it has not."""
    turned_on_at: int = 0
    """When the governor last switched it on; 0: never."""
    left: int = 0
    """Executions that may be running from before its last change,"""
    left_until: int = 0
    """until then."""

    def left_at(self, now: int) -> int:
        """Return how many executions may still run from before the last change."""
        return self.left if now < self.left_until else 0


@dataclass(frozen=True, slots=True)
class Claim:
    """A mapping that shares the room."""

    name: str
    want: int | None
    """What it would have with room for all; None: it is to be off."""
    present: int
    """Its maximum concurrency now."""
    enabled: bool
    backlog: Backlog
    switched_at: int = 0
    """When the governor switched it on, or off."""
    left: int = 0
    """Executions that may be running from before its last change."""
    fixed: bool = False
    """It cannot be changed in this run, and counts as it is."""
    refills: bool = False
    """Its invocations take further messages themselves, so that disabling it frees nothing for minutes."""

    @property
    def charge(self) -> int:
        """Executions that it may be using now."""
        return max(self.present if self.enabled else 0, self.left)

    @property
    def waits(self) -> bool:
        """Return whether its queue has messages that nobody has taken."""
        return self.backlog.visible > 0

    @property
    def starves(self) -> bool:
        """Return whether messages wait and nobody works on its queue, not even an invocation from before."""
        return self.waits and not self.enabled and not self.left

    @property
    def is_idle(self) -> bool:
        """Return whether its queue is empty, so that none of its invocations is running."""
        return self.backlog.total == 0


@dataclass(frozen=True, slots=True)
class Share:
    """What a mapping gets, and why it is not what it wants."""

    maximum_concurrency: int
    enabled: bool
    reason: str = ""


def room_of(executions: int) -> int:
    """Return what an account's executions leave to the queues; two are the least that a mapping can have."""
    return max(LEAST, executions - RESERVED)


def share(claims: Sequence[Claim], room: int, now: int) -> dict[str, Share]:
    """Return what each mapping gets. The enabled ones never add up to more than the room, nor does what may be running.

    The order of the claims is their rank among idle mappings: the first stay enabled.
    """
    asking = [each for each in claims if each.want is not None and not each.fixed]
    fixed_on = sum(each.fixed and each.enabled for each in claims)
    places = max(0, room // LEAST - fixed_on)
    starving = sorted((each for each in asking if each.starves), key=lambda each: each.switched_at)
    yielding = _yielding(asking, len(starving), places, room, now)
    staying = [each for each in asking if each.enabled and each not in yielding]
    coming = starving[: max(0, places - len(staying))]
    spare = max(0, places - len(staying) - len(starving))
    others = [each for each in asking if not each.enabled and not each.starves]
    coming += sorted(others, key=lambda each: not each.waits)[:spare]
    taken = sum(each.present for each in claims if each.fixed and each.enabled)
    spare_room = room - taken if len(asking) <= places else 0
    goals = _even(staying + coming, spare_room)
    given, spent = _kept(claims, staying, goals, room)
    budget = room - spent
    for each in coming:
        # What it still has running is counted already.
        cost = max(0, LEAST - each.left)
        if cost > budget:
            # Nobody overtakes it, not even one whose own invocations still hold the room that it waits for.
            break
        budget -= cost
        given[each.name] = LEAST
    _raise(given, goals, {each.name: each.left for each in claims}, budget)
    crowd = _Crowd(
        room, places + fixed_on, len(asking) > places, ", ".join(each.name for each in starving)
    )
    return {each.name: _told(each, given.get(each.name), crowd) for each in claims}


def _yielding(
    asking: Sequence[Claim], starving: int, places: int, room: int, now: int
) -> list[Claim]:
    """Return the enabled mappings that make room: as many as have no place, and as the starving ones need."""
    ranks = {each.name: rank for rank, each in enumerate(asking)}

    def order(each: Claim) -> tuple[bool, int, int, int]:
        state = 2 if each.waits else 0 if each.is_idle else 1
        since = each.switched_at if each.waits else 0
        return _is_slow(each), state, since, -ranks[each.name]

    def may_yield(each: Claim) -> bool:
        if _is_slow(each) and room // LEAST > 1:
            # The others pass their places on within minutes.
            return False
        return not each.waits or now - each.switched_at >= TURN_MS

    on = sorted((each for each in asking if each.enabled), key=order)
    yielding: list[Claim] = []
    for each in on:
        free = places - (len(on) - len(yielding))
        if free < 0 or (starving > free and may_yield(each)):
            yielding.append(each)
    return yielding


def _is_slow(claim: Claim) -> bool:
    return claim.refills and not claim.is_idle


def _even(claims: Sequence[Claim], room: int) -> dict[str, int]:
    """Return how much each is to have: the least, then evenly up to what it wants; busy ones before idle ones."""
    goals = {each.name: LEAST for each in claims}
    left = room - LEAST * len(claims)
    for idle in (False, True):
        # Who has more keeps it: what is moved is not free for a while.
        some = sorted(
            (each for each in claims if each.is_idle == idle), key=lambda each: -each.present
        )
        while left > 0 and (
            short := [each for each in some if goals[each.name] < (each.want or LEAST)]
        ):
            goals[min(short, key=lambda each: goals[each.name]).name] += 1
            left -= 1
    return goals


def _kept(
    claims: Iterable[Claim], staying: Sequence[Claim], goals: Mapping[str, int], room: int
) -> tuple[dict[str, int], int]:
    """Return what those that stay keep, and all that may be running after this run."""
    given: dict[str, int] = {}
    spent = 0
    for each in claims:
        if each.fixed:
            spent += each.charge
            continue
        kept = 0
        if each in staying:
            kept = given[each.name] = min(each.present, goals[each.name])
        # Lowered or disabled, it has what it had until the next run shows otherwise.
        spent += max(kept, 0 if each.is_idle else each.charge)
    return given, min(spent, room)


def _raise(
    given: dict[str, int], goals: Mapping[str, int], left: Mapping[str, int], budget: int
) -> None:
    """Spend the budget on those below their goals, one by one."""
    while short := [name for name in given if given[name] < goals[name]]:
        lowest = min(short, key=given.__getitem__)
        if given[lowest] >= left[lowest]:
            if budget <= 0:
                return
            budget -= 1
        given[lowest] += 1


@dataclass(frozen=True, slots=True)
class _Crowd:
    """What a reason speaks of."""

    room: int
    at_a_time: int
    takes_turns: bool
    starving: str


def _told(claim: Claim, given: int | None, crowd: _Crowd) -> Share:
    if claim.fixed:
        return Share(claim.present, claim.enabled)
    if claim.want is None:
        return Share(claim.present, enabled=False)
    if given is None:
        return Share(claim.present, enabled=False, reason=_why_off(claim, crowd))
    reasons = []
    if crowd.takes_turns and not claim.enabled:
        reasons.append("messages wait in its queue" if claim.waits else "there is room for it")
    if given < claim.want:
        reasons.append(f"{given} of the {crowd.room} executions that the queues may use")
    return Share(given, enabled=True, reason="; ".join(reasons))


def _why_off(claim: Claim, crowd: _Crowd) -> str:
    room = f"the account's limit has room for {crowd.at_a_time} queues at a time"
    if not crowd.starving:
        return room
    state = "its turn is over" if claim.waits else "no message waits in its queue"
    return f"{state}, and messages wait for {crowd.starving}; {room}"
