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
from tests.simulation.bugs import BUG_SEEDS, BUGS
from tests.simulation.checks import Check
from tests.simulation.faults import FAULTS, FAULTS_OF_FILES, FAULTS_OF_TENANTS, Fault
from tests.simulation.lane_faults import FAULTS_OF_THE_LANE
from tests.simulation.playing import ALL_CHECKS, KNOWN, first_failure, play, shown
from tests.simulation.stories import story_of
from tests.simulation.troubles import IllCalls

REPOSITORY: Final = Path(__file__).parents[2]
SEEDS: Final = 2_000
"""A deliberate bug must be found within so many stories."""
STORIES: Final = 1_000
"""Played by each run of the tests; `make simulate` plays more."""
ENOUGH: Final = 5
"""A fault that has struck so often does strike."""
FOUND: Final[list[dict[str, Any]]] = json.loads(
    Path(__file__).with_name("found_seeds.json").read_text(encoding="utf-8")
)
BUG_STORIES: Final[dict[str, int]] = json.loads(BUG_SEEDS.read_text(encoding="utf-8"))
ALL_FAULTS: Final[tuple[type[Fault], ...]] = (
    *FAULTS,
    *FAULTS_OF_TENANTS,
    *FAULTS_OF_FILES,
    *FAULTS_OF_THE_LANE,
)


def test_every_promise_is_kept_in_every_story() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation", "--seeds", str(STORIES)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )

    assert 0 == done.returncode, f"{done.stdout}\n{done.stderr}"
    played = sum(map(int, re.findall(r"^(\d+) stories, 0 broke", done.stdout, re.MULTILINE)))
    assert STORIES == played


@pytest.mark.parametrize("found", FOUND, ids=lambda found: f"{found['seed']}: {found['why']}")
def test_a_story_that_once_broke_a_promise_keeps_it(found: dict[str, Any]) -> None:
    played = play(found["seed"])

    assert [] == played.violations, "\n".join([*played.world.lines(), shown(played)])


@pytest.mark.parametrize("name", BUGS)
def test_a_deliberate_bug_is_noticed(name: str) -> None:
    """By the story that is recorded for it; `python -m tests.simulation --record` finds another one."""
    seed = BUG_STORIES[name]

    with BUGS[name].applied():
        found = first_failure([seed])

    assert found is not None
    assert seed <= SEEDS


def test_deliberate_bugs_are_removed_afterwards() -> None:
    """The stories that noticed some of them are clean again."""
    for bug in BUGS.values():
        with bug.applied():
            pass

    assert first_failure(sorted(set(BUG_STORIES.values()))[:20]) is None


@pytest.mark.parametrize("check", KNOWN)
def test_a_known_violation_is_not_fixed_yet(check: str) -> None:
    """When this fails, the defect is fixed: take its entry out of `KNOWN`."""
    _, seeds = KNOWN[check]

    assert any(each.check == check for seed in seeds for each in play(seed).known)


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
    assert {*ALL_FAULTS, IllCalls} == set(Fault.__subclasses__())
    assert set(ALL_CHECKS) == set(Check.__subclasses__())


def test_every_fault_strikes() -> None:
    """One that waits for a verb nobody uses any more would be no fault."""
    struck: Counter[type] = Counter()
    for seed in range(1, SEEDS):
        rare = {kind for kind in ALL_FAULTS if struck[kind] < ENOUGH}
        if not rare:
            break
        if rare.isdisjoint(type(fault) for fault in story_of(seed).faults):
            continue
        for fault in play(seed).world.faults:
            struck[type(fault)] += fault.struck

    assert [] == [kind.__name__ for kind in ALL_FAULTS if struck[kind] < ENOUGH]
