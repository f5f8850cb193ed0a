"""Play the story of a seed and report the result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tests.simulation.bounds import BOUNDS
from tests.simulation.checks import CHECKS, Check, Violation
from tests.simulation.file_checks import FILE_CHECKS
from tests.simulation.lane_checks import LANE_CHECKS
from tests.simulation.ledger_checks import LEDGER_CHECKS
from tests.simulation.size_checks import SIZE_CHECKS
from tests.simulation.stories import story_of
from tests.simulation.story import START
from tests.simulation.troubles import compared
from tests.simulation.webhooks import EndsAreNotified
from tests.simulation.world import World

ALL_CHECKS: Final[Sequence[type[Check]]] = (
    *CHECKS,
    *BOUNDS,
    *FILE_CHECKS,
    *SIZE_CHECKS,
    *LEDGER_CHECKS,
    *LANE_CHECKS,
    EndsAreNotified,
)


KNOWN: Final[Mapping[str, tuple[str, Sequence[int]]]] = {}
"""Violations that are not fixed yet, by check: the kind of the defect, and seeds of stories that show it.

A test fails when none of them does any more: the entry is removed then.
"""


@dataclass(frozen=True, slots=True)
class Played:
    """A story that was played."""

    seed: int
    world: World
    violations: Sequence[Violation]
    known: Sequence[Violation] = ()
    """Those of `KNOWN`."""


def play(seed: int) -> Played:
    """Play the story of a seed under every check; one with an ill tenant also without it."""
    story = story_of(seed)
    world = World(story, [check() for check in ALL_CHECKS])
    found = world.run()
    if story.ill is not None:
        alone = World(story.without_the_ill(), [check() for check in ALL_CHECKS])
        found = [*found, *alone.run()]
        worse = compared(world, alone)
        if worse is not None:
            found.append(Violation(f"nobody waits because of {story.trouble}", worse, START))
    return Played(
        seed,
        world,
        [each for each in found if each.check not in KNOWN],
        [each for each in found if each.check in KNOWN],
    )


def first_failure(seeds: Iterable[int]) -> Played | None:
    """Return the first story that breaks a promise."""
    for seed in seeds:
        played = play(seed)
        if played.violations:
            return played
    return None


def shown(played: Played) -> str:
    """Return in readable lines what a story broke."""
    faults = ", ".join(type(fault).__name__ for fault in played.world.faults) or "no faults"
    lines = [f"seed {played.seed} ({faults}): {'broken' if played.violations else 'kept'}"]
    lines += [f"    {each.check}: {each.what}" for each in played.violations[:8]]
    return "\n".join(lines)
