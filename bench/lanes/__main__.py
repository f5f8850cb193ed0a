"""Play weeks with each policy and print a table: `python -m bench.lanes`. Exit code 1 if a target is missed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Final

from rich.console import Console
from rich.table import Table

from bench.lanes.policies import AllBatch, AllLive, Auto, Clairvoyant, Policy, play
from bench.lanes.week import a_week
from bench.lanes.world import BATCH_MICRO_USD, LIVE_MICRO_USD, Score, World

POLICIES: Final[Mapping[str, Callable[[World], Policy]]] = {
    "all live": AllLive,
    "all batch": AllBatch,
    "auto": Auto,
    "clairvoyant": Clairvoyant,
}
RPM: Final = 4_000

MET_OUTSIDE: Final = 0.999
MET: Final = 0.99
ABOVE_CLAIRVOYANT: Final = 0.08
BELOW_LIVE: Final = 0.40
"""The targets of `auto`."""


def missed(scores: Mapping[str, Score]) -> list[str]:
    """Return the targets that `auto` misses, with the figures."""
    auto, best, live = scores["auto"], scores["clairvoyant"], scores["all live"]
    above = auto.micro_usd / best.micro_usd - 1
    below = 1 - auto.micro_usd / live.micro_usd
    outside = auto.met_outside / auto.outside if auto.outside else 1.0
    met = auto.met / auto.rows
    found = {
        f"deadlines met outside outages: {outside:.3%}, target {MET_OUTSIDE:.1%}": outside
        < MET_OUTSIDE,
        f"deadlines met: {met:.3%}, target {MET:.0%}": met < MET,
        f"more expensive than the clairvoyant by {above:.1%}, target at most {ABOVE_CLAIRVOYANT:.0%}": above
        > ABOVE_CLAIRVOYANT,
        f"cheaper than all live by {below:.1%}, target at least {BELOW_LIVE:.0%}": below
        < BELOW_LIVE,
    }
    return [text for text, is_missed in found.items() if is_missed]


def table(scores: Mapping[str, Score]) -> Table:
    """Return the figures of each policy."""
    made = Table("policy", "deadlines met", "outside outages", "cost", "against all live",
                 "against the clairvoyant", "rows at half price", "rows done twice")  # fmt: skip
    for name, each in scores.items():
        made.add_row(
            name,
            f"{each.met / each.rows:.3%}",
            f"{each.met_outside / max(1, each.outside):.3%}",
            f"${each.micro_usd / 1e6:,.0f}",
            f"{each.micro_usd / scores['all live'].micro_usd - 1:+.1%}",
            f"{each.micro_usd / scores['clairvoyant'].micro_usd - 1:+.1%}",
            f"{each.lanes['batch'] / each.rows:.1%}",
            f"{each.twice:,}",
        )
    rows = scores["all live"].rows
    made.add_row(
        "every row at half price",
        *("", "", f"${rows * BATCH_MICRO_USD / 1e6:,.0f}", f"{BATCH_MICRO_USD / LIVE_MICRO_USD - 1:+.1%}"),
        *(f"{rows * BATCH_MICRO_USD / scores['clairvoyant'].micro_usd - 1:+.1%}", "100.0%", ""),
    )  # fmt: skip
    return made


def parser() -> argparse.ArgumentParser:
    """Return what the command line may name."""
    made = argparse.ArgumentParser(prog="python -m bench.lanes", description=__doc__)
    made.add_argument("--seeds", type=int, default=40, help="weeks that are played (40)")
    made.add_argument("--first-seed", type=int, default=1)
    made.add_argument("--rows", type=int, default=700_000, help="per week (700000)")
    made.add_argument("--days", type=int, default=7, help="per week; two of seven are slow (7)")
    made.add_argument("--each", action="store_true", help="also print a line for each week")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Play the weeks; print the table and the targets that are missed."""
    chosen = parser().parse_args(arguments)
    scores = {name: Score() for name in POLICIES}
    reached = 0
    for seed in range(chosen.first_seed, chosen.first_seed + chosen.seeds):
        week = a_week(seed, chosen.rows, chosen.days)
        played = {name: play(week, RPM, policy).score for name, policy in POLICIES.items()}
        for name, score in played.items():
            scores[name].add(score)
        found = missed(played)
        reached += not found
        if chosen.each:
            print(f"week {seed}: {'; '.join(found) or 'every target is reached'}")
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table(scores))
    print(f"Weeks that reach every target by themselves: {reached} of {chosen.seeds}.")
    found = missed(scores)
    print("\n".join(f"MISSED  {each}" for each in found) or "Every target is reached.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
