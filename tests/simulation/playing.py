"""Play the story of a seed and report the result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tests.simulation.checks import CHECKS, Violation
from tests.simulation.story import story_of
from tests.simulation.world import World


@dataclass(frozen=True, slots=True)
class Played:
    """A story that was played."""

    seed: int
    world: World
    violations: Sequence[Violation]


def play(seed: int) -> Played:
    """Play the story of a seed under every check."""
    world = World(story_of(seed), [check() for check in CHECKS])
    return Played(seed, world, world.run())


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
