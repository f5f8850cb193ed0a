"""The memory benchmark runs, and fails if a function needs more memory than it has."""

import pytest

from bench.memory.__main__ import Measured, main, measured, status, table
from bench.memory.cloud import memory_sizes
from bench.memory.loads import LOADS, Load, functions
from tests.unit.test_template import FUNCTIONS, ROOT

FIRST = {load.function: load for load in reversed(LOADS)}


def test_every_function_has_a_load() -> None:
    folders = {path.parent.name for path in ROOT.glob("functions/*/app.py")}

    assert folders == set(functions()) == set(memory_sizes())
    assert len(FUNCTIONS) == len(folders)


@pytest.mark.parametrize("load", FIRST.values(), ids=str)
def test_a_small_load_is_carried_by_each_function(load: Load) -> None:
    found = measured(load, is_small=True)

    assert "ok" == found.verdict
    assert 30 < found.started_mb <= found.peak_mb < found.limit_mb


def a_row(**facts: object) -> Measured:
    known: dict[str, object] = {"load": LOADS[0], "started_mb": 40, "peak_mb": 100}
    return Measured(**known | {"limit_mb": 512, "seconds": 1.0} | facts)  # type: ignore[arg-type]


def test_a_peak_above_what_the_function_has_fails_the_run() -> None:
    rows = [a_row(), a_row(peak_mb=512)]

    assert (0, 1) == (status(rows[:1]), status(rows))
    assert ["ok", "ABOVE"] == [line.split("|")[-2].strip() for line in table(rows)[2:]]


def test_a_load_that_was_not_carried_fails_the_run_whatever_its_peak() -> None:
    row = a_row(problem="not all of the work was done")

    assert 1 == status([row])
    assert "FAILED: not all of the work was done" == row.verdict


def test_an_unknown_function_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "nobody"])

    assert "invalid choice" in capsys.readouterr().err
