"""SECURITY.md: each line of the threat model names the test that shows it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = re.findall(r"`(tests/\w+/\w+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text())


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_every_test_that_is_named_exists(file: str, name: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    found = {
        each.name for each in tree.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
    }

    assert name in found


def test_every_line_of_the_threat_model_names_a_test() -> None:
    model = (ROOT / "SECURITY.md").read_text().partition("## Threat model")[2]
    model = model.partition("## Out of scope")[0]
    lines = [line for line in model.splitlines() if re.match(r"\| (?!can |---)", line)]

    assert len(lines) > 25
    for line in lines:
        assert re.search(r"`tests/\w+/\w+\.py::\w+`", line), line
