"""What holds for every run of the tests: the longest files start first, and AWS calls are compared with permissions.

A run records which AWS calls the functions make, and fails when the template does not permit one.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Final

import pytest

from scripts.local_stack.permissions import grants
from scripts.local_stack.recording.recorder import FOLDER_VARIABLE, install
from tests import aws_calls
from tests.expanded_template import expanded_template

HANDLERS: Final = re.compile(r"functions\.(\w+)\.app")
"""The modules whose handlers tests run in this process."""

WHOLE: Final = ("tests/integration", "tests/acceptance")
"""The folders whose tests drive functions; run as a whole, they use every grant."""

LONGEST: Final = (
    "tests/acceptance/test_smoke_runs.py",
    "tests/simulation/test_simulation.py",
    "tests/acceptance/test_bulk.py",
    "tests/acceptance/test_sluice.py",
    "tests/acceptance/test_sam.py",
    "tests/integration/test_functions.py",
)
"""The files that take longest. `make test` runs each in one process, and ends late when a long one starts late."""

assert all(Path(__file__).parents[1].joinpath(each).is_file() for each in LONGEST)

running: list[str] = []
"""The function whose handler runs in this process."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-calls",
        action="store_true",
        help="write the AWS calls of this run to tests/fixtures/aws_calls.json, in place of comparing them",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not _is_one_of_several(config):
        made = tempfile.mkdtemp(prefix="sluice-aws-calls-")
        config.add_cleanup(lambda: shutil.rmtree(made, ignore_errors=True))
        os.environ[FOLDER_VARIABLE] = made
    folder = Path(os.environ[FOLDER_VARIABLE])
    install(folder, lambda: running[-1] if running else None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    turns = {name: turn for turn, name in enumerate(LONGEST)}
    items.sort(key=lambda item: turns.get(item.nodeid.partition("::")[0], len(turns)))


def pytest_collection_finish() -> None:
    for name, module in list(sys.modules.items()):
        if found := HANDLERS.fullmatch(name):
            vars(module)["handler"] = _noted(_logical_id(found[1]), vars(module)["handler"])


def _noted(function: str, handler: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(handler)
    def noted(*arguments: Any) -> Any:
        running.append(function)
        try:
            return handler(*arguments)
        finally:
            running.pop()

    return noted


def _logical_id(folder: str) -> str:
    return "".join(word.title() for word in folder.split("_")) + "Function"


def _is_one_of_several(config: pytest.Config) -> bool:
    """Return whether this is a worker process of pytest-xdist."""
    return hasattr(config, "workerinput")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if _is_one_of_several(session.config):
        return
    calls = aws_calls.read(Path(os.environ[FOLDER_VARIABLE]))
    if session.config.getoption("--record-calls"):
        aws_calls.write(calls)
        return
    expanded = expanded_template()
    permitted = grants(expanded)
    wanted = aws_calls.needs(calls)
    found = list(aws_calls.missing(wanted, permitted))
    found += [
        f"not recorded yet (make record-calls): {call}"
        for call in sorted(calls - aws_calls.recorded())
    ]
    if exitstatus == pytest.ExitCode.OK and _is_whole(session.config):
        found += aws_calls.unused([*wanted, *aws_calls.needed_by_aws(expanded)], permitted)
    if found:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        session.config.get_terminal_writer().line("\n".join(["", *found]), red=True)


def _is_whole(config: pytest.Config) -> bool:
    """Return whether all tests that drive functions were selected."""
    narrowed = config.getoption("keyword") or config.getoption("markexpr")
    named = {each.rstrip("/") for each in config.args}
    return not narrowed and ("tests" in named or named.issuperset(WHOLE))
