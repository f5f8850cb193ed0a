"""How the queues' event source mappings share the account's concurrent executions, with time as an argument.

The account limit applies to all functions of a region together: usually 1,000 executions, 10 in many new accounts.
`RESERVED` of them are kept for functions that no queue invokes; the rest is the room of the mappings.

- If there is room for what every mapping wants, each gets it, and all stay enabled.
- With less, each gets a share: busy ones first, evenly, and never less than Lambda accepts.
- With too little for that, as many mappings as fit are enabled with two executions each, and the others are disabled.
  An idle one makes room for one whose queue has messages; if none is idle they take turns, the longest disabled first.
  An odd execution is left to the API, which serves several callers at once.

A mapping that was disabled or lowered still has its running invocations. The executions that they may use are not given
to other mappings until they must have ended, or no message is in flight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sluice.domain.capacity import LEAST, Backlog

RESERVED: Final = 4
"""Executions that no queue may use: one each for the API, the governor, upstream batches, and the function of the
stream."""

CEILINGS: Final[Mapping[str, int]] = {
    "batches": 4,  # sections of a large batch are joined in parallel
    "webhooks": 5,  # fifty deliveries at once
    "dead letters": LEAST,  # rare and not urgent
    "range dead letters": LEAST,
}
"""Maximum concurrency of the mappings that do not depend on Claude's limits."""

TURN_MS: Final = 120_000
"""Minimum time that a mapping with messages stays enabled: a change takes Lambda up to a minute."""

APPLIED_MS: Final = 60_000
"""Maximum time until a change of a mapping takes effect."""

assert APPLIED_MS < TURN_MS, "a mapping is in effect for a part of its turn"


@dataclass(frozen=True, slots=True)
class Note:
    """What the governor stores about one mapping between runs."""

    turned_off_at: int | None = None
    """When the governor disabled it; None if it did not."""
    turned_on_at: int = 0
    """When the governor last enabled it; 0: never."""
    left: int = 0
    """Executions that may still run from before its last change."""
    left_until: int = 0
    """The time until which they may run."""

    def left_at(self, now: int) -> int:
        """Return how many executions may still run from before the last change."""
        return self.left if now < self.left_until else 0


@dataclass(frozen=True, slots=True)
class Claim:
    """A mapping that shares the room."""

    name: str
    want: int | None
    """The concurrency it should have if there is room for all; None: disabled."""
    present: int
    """Its current maximum concurrency."""
    enabled: bool
    backlog: Backlog
    switched_at: int = 0
    """When the governor last enabled or disabled it."""
    left: int = 0
    """Executions that may still run from before its last change."""
    fixed: bool = False
    """It cannot be changed in this run, and counts with its current configuration."""
    refills: bool = False
    """Its invocations take more messages themselves, so that disabling it frees no executions for minutes."""

    @property
    def charge(self) -> int:
        """Executions that it may use now."""
        return max(self.present if self.enabled else 0, self.left)

    @property
    def waits(self) -> bool:
        """Return whether its queue has visible messages."""
        return self.backlog.visible > 0

    @property
    def starves(self) -> bool:
        """Return whether messages wait but no invocation of its queue can be running."""
        return self.waits and not self.enabled and not self.left

    @property
    def is_idle(self) -> bool:
        """Return whether its queue has no messages at all, so that none of its invocations is running."""
        return self.backlog.total == 0


@dataclass(frozen=True, slots=True)
class Share:
    """What a mapping gets, and why it is not what it wants, if so."""

    maximum_concurrency: int
    enabled: bool
    reason: str = ""


def room_of(executions: int) -> int:
    """Return the room of the queues in an account limit; at least 2, the minimum of a mapping."""
    return max(LEAST, executions - RESERVED)


def share(claims: Sequence[Claim], room: int, now: int) -> dict[str, Share]:
    """Return what each mapping gets. Neither the enabled ones nor what may still run exceeds the room in total.

    The claims are in order of rank: of idle mappings the first ones stay enabled.
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
        # What still runs of it is counted already.
        cost = max(0, LEAST - each.left)
        if cost > budget:
            # No other mapping overtakes it, even if that one's invocations still use the room.
            break
        budget -= cost
        given[each.name] = LEAST
    _raise(given, goals, {each.name: each.left for each in claims}, budget)
    crowd = _Crowd(
        room, places + fixed_on, len(asking) > places, ", ".join(each.name for each in starving)
    )
    return {each.name: _share_of(each, given.get(each.name), crowd) for each in claims}


def _yielding(
    asking: Sequence[Claim], starving: int, places: int, room: int, now: int
) -> list[Claim]:
    """Return the enabled mappings that must make room: those without a place, and those the starving ones need."""
    ranks = {each.name: rank for rank, each in enumerate(asking)}

    def order(each: Claim) -> tuple[bool, int, int, int]:
        state = 2 if each.waits else 0 if each.is_idle else 1
        since = each.switched_at if each.waits else 0
        return _is_slow(each), state, since, -ranks[each.name]

    def may_yield(each: Claim) -> bool:
        if _is_slow(each) and room // LEAST > 1:
            # The others free their places within minutes.
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
    """Return the goal of each: the minimum, then evenly up to what it wants, busy ones before idle ones."""
    goals = {each.name: LEAST for each in claims}
    left = room - LEAST * len(claims)
    for idle in (False, True):
        # Mappings that have more keep it: executions that change hands are not free for a while.
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
    """Return what the staying mappings keep, and the executions that may run after this run."""
    given: dict[str, int] = {}
    spent = 0
    for each in claims:
        if each.fixed:
            spent += each.charge
            continue
        kept = 0
        if each in staying:
            kept = given[each.name] = min(each.present, goals[each.name])
        # A lowered or disabled mapping counts in full until the next run.
        spent += max(kept, 0 if each.is_idle else each.charge)
    return given, min(spent, room)


def _raise(
    given: dict[str, int], goals: Mapping[str, int], left: Mapping[str, int], budget: int
) -> None:
    """Raise mappings below their goals one by one, within the budget."""
    while short := [name for name in given if given[name] < goals[name]]:
        lowest = min(short, key=given.__getitem__)
        if given[lowest] >= left[lowest]:
            if budget <= 0:
                return
            budget -= 1
        given[lowest] += 1


@dataclass(frozen=True, slots=True)
class _Crowd:
    """The facts of a reason."""

    room: int
    at_a_time: int
    takes_turns: bool
    starving: str


def _share_of(claim: Claim, given: int | None, crowd: _Crowd) -> Share:
    if claim.fixed:
        return Share(claim.present, claim.enabled)
    if claim.want is None:
        return Share(claim.present, enabled=False)
    if given is None:
        return Share(claim.present, enabled=False, reason=_why_off(claim, crowd))
    reasons = []
    if crowd.takes_turns and not claim.enabled:
        reasons.append(
            "messages wait in its queue" if claim.waits else "there is room for another queue"
        )
    if given < claim.want:
        reasons.append(f"{given} of the {crowd.room} executions that the queues may use")
    return Share(given, enabled=True, reason="; ".join(reasons))


def _why_off(claim: Claim, crowd: _Crowd) -> str:
    room = f"the account limit has room for {crowd.at_a_time} queues at a time"
    if not crowd.starving:
        return room
    state = "its turn is over" if claim.waits else "no message waits in its queue"
    return f"{state}, and messages wait for {crowd.starving}; {room}"
