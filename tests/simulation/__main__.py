"""Plays stories by their seeds.

python -m tests.simulation --seeds 20000 --first-seed 1    plays them on all cores; says which broke a promise
python -m tests.simulation --seed 4711                      plays one and prints its history
python -m tests.simulation --bug NAME --seeds 2000          looks for a deliberate bug

The exit code is 0 when every promise was kept (with --bug: when the bug was found).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from itertools import pairwise

from tests.simulation.bugs import BUG_SEEDS, BUGS
from tests.simulation.playing import first_failure, play, shown


def parser() -> argparse.ArgumentParser:
    """Return what the command line may name."""
    made = argparse.ArgumentParser(prog="python -m tests.simulation")
    made.add_argument("--seeds", type=int, default=2_000, help="how many stories")
    made.add_argument("--first-seed", type=int, default=1)
    made.add_argument("--seed", type=int, help="play this one and print its history")
    made.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    made.add_argument("--bug", choices=sorted(BUGS), help="with this deliberate bug")
    made.add_argument(
        "--record", action="store_true", help="find a story for every bug, and keep it"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Play what was asked for; return the exit code."""
    wanted = parser().parse_args(arguments)
    bug = BUGS[wanted.bug].applied() if wanted.bug and not wanted.record else nullcontext()
    if wanted.seed is not None:
        with bug:
            return _one(wanted.seed)
    seeds = range(wanted.first_seed, wanted.first_seed + wanted.seeds)
    if wanted.record:
        return _record([wanted.bug] if wanted.bug else list(BUGS), seeds)
    if wanted.bug:
        with bug:
            found = first_failure(seeds)
        print(f"{wanted.bug}: {shown(found) if found else 'not found'}")
        return 0 if found else 1
    if wanted.processes > 1:
        return _shared(wanted.first_seed, wanted.seeds, wanted.processes)
    return _all(seeds)


def _one(seed: int) -> int:
    played = play(seed)
    for line in played.world.lines():
        print(line)
    print(shown(played))
    return 1 if played.violations else 0


def _record(names: Sequence[str], seeds: Sequence[int]) -> int:
    """Keep the first story that notices each bug; one that still does is kept."""
    known = json.loads(BUG_SEEDS.read_text(encoding="utf-8")) if BUG_SEEDS.exists() else {}
    missing = []
    for name in names:
        with BUGS[name].applied():
            found = first_failure([known[name]] if name in known else [])
            found = found or first_failure(seeds)
        if found is None:
            missing.append(name)
            known.pop(name, None)
        else:
            known[name] = found.seed
        print(f"{name}: {shown(found) if found else 'not found'}", flush=True)
        kept = {each: known[each] for each in BUGS if each in known}
        BUG_SEEDS.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return 1 if missing else 0


def _all(seeds: Iterable[int]) -> int:
    began, count, broken = time.monotonic(), 0, 0
    for seed in seeds:
        played = play(seed)
        count += 1
        if played.violations:
            broken += 1
            print(shown(played), flush=True)
    print(
        f"{count} stories, {broken} broke a promise, {time.monotonic() - began:.0f} s", flush=True
    )
    return 1 if broken else 0


def _shared(first_seed: int, seeds: int, processes: int) -> int:
    """Give each process of its own a part of the seeds, so that none of them shares anything.

    Consecutive ones, which have stories of all kinds: every second one would have those that take long.
    """
    borders = [first_seed + seeds * number // processes for number in range(processes + 1)]
    children = [
        subprocess.Popen(
            [
                sys.executable, "-m", "tests.simulation", "--processes", "1",
                "--first-seed", str(first), "--seeds", str(end - first),
            ]
        )
        for first, end in pairwise(borders)
    ]  # fmt: skip
    return max(child.wait() for child in children)


if __name__ == "__main__":
    sys.exit(main())
