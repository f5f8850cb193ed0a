"""The simulation as a test: every story keeps every promise, and every deliberate bug is noticed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Final

import pytest

from scripts.documents.markers import replaced
from tests.simulation.bugs import BUGS
from tests.simulation.checks import CHECKS
from tests.simulation.faults import FAULTS
from tests.simulation.playing import first_failure, play, shown

REPOSITORY: Final = Path(__file__).parents[2]
SEEDS: Final = 2_000
FOUND: Final[list[dict[str, Any]]] = json.loads(
    Path(__file__).with_name("found_seeds.json").read_text(encoding="utf-8")
)


def test_every_promise_is_kept_in_every_story() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation", "--seeds", str(SEEDS)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )

    assert 0 == done.returncode, f"{done.stdout}\n{done.stderr}"
    played = sum(map(int, re.findall(r"^(\d+) stories, 0 broke", done.stdout, re.MULTILINE)))
    assert SEEDS == played


@pytest.mark.parametrize("found", FOUND, ids=lambda found: f"{found['seed']}: {found['why']}")
def test_a_story_that_once_broke_a_promise_keeps_it(found: dict[str, Any]) -> None:
    played = play(found["seed"])

    assert [] == played.violations, "\n".join([*played.world.lines(), shown(played)])


@pytest.mark.parametrize("name", BUGS)
def test_a_deliberate_bug_is_noticed(name: str) -> None:
    with BUGS[name].applied():
        found = first_failure(range(1, SEEDS + 1))

    assert found is not None


@pytest.mark.parametrize("name", BUGS)
def test_a_deliberate_bug_is_removed_afterwards(name: str) -> None:
    with BUGS[name].applied():
        pass

    assert first_failure(range(1, 9)) is None


def test_a_story_is_the_same_each_time_it_is_played() -> None:
    """Also in another process, where Python orders its sets in another way."""
    seed = 584
    before = list(play(seed).world.lines())

    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation", "--seed", str(seed)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONHASHSEED": "4711"},
        capture_output=True,
        text=True,
        check=True,
    )

    assert before == list(play(seed).world.lines())
    assert before == done.stdout.splitlines()[: len(before)]


def test_every_deliberate_bug_is_documented() -> None:
    page = (REPOSITORY / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [f"| `{name}` | {bug.what} |" for name, bug in BUGS.items()]

    assert replaced(page, "bugs", "\n".join(["| name | the bug |", "|---|---|", *rows])) == page


def test_faults_and_checks_strike_and_look() -> None:
    """A class that is not entered in its list would never do anything."""
    for listed in (FAULTS, CHECKS):
        base = listed[0].__mro__[-2]
        assert set(listed) == set(base.__subclasses__())


def test_every_fault_strikes() -> None:
    """A fault that waits for a verb that is no longer used would never strike."""
    struck: Counter[type] = Counter()
    missing = [*FAULTS]
    for seed in range(1, 401):
        for fault in play(seed).world.faults:
            struck[type(fault)] += fault.struck
        missing = [kind for kind in FAULTS if struck[kind] < 5]
        if not missing:
            break

    assert [] == [kind.__name__ for kind in missing]
