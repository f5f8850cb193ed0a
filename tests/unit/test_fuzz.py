"""Fresh random input in every run, for a second of each kind; `python -m tests.fuzz` runs longer."""

import os
import random

import pytest

from tests import fuzz

SECONDS = float(os.environ.get("FUZZ_SECONDS", "1"))


@pytest.mark.parametrize("name", fuzz.CASES)
def test_random_input_is_read_as_the_reference_reads_it(name: str) -> None:
    seed = random.SystemRandom().randrange(2**40)

    assert fuzz.run(name, SECONDS, seed) > 0


def test_a_failure_names_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(chance: random.Random) -> None:
        assert chance.random() > 2

    monkeypatch.setattr(fuzz, "CASES", {"gzip": broken})

    with pytest.raises(AssertionError) as failed:
        fuzz.run("gzip", 1, 7)
    assert ["again: python -m tests.fuzz --only gzip --seed 7"] == failed.value.__notes__
