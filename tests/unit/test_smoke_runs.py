"""Every command a person can start is run by the gate, at a size of seconds, or has a reason why not."""

import argparse
import importlib
from collections.abc import Callable

import pytest

from tests.smoke_runs import (
    EXEMPT,
    ROOT,
    RUN_BY_OTHER_TESTS,
    SMOKE_RUNS,
    Documented,
    documented,
    made,
    programs,
    recipe,
    targets,
    targets_in_pages,
)

RUN = {row.command for row in SMOKE_RUNS} | RUN_BY_OTHER_TESTS.keys()
KNOWN = RUN | EXEMPT.keys()
DOCUMENTED = [*dict.fromkeys(documented())]
PLACEHOLDERS = {"NAME": "settle_twice"}
"""What a page leaves to the reader, and a value for it."""


def module_of(command: str) -> str:
    return command.split(maxsplit=1)[0]


def parser_of(module: str) -> Callable[[], argparse.ArgumentParser] | None:
    """The function that makes a program's parser, by this repository's convention."""
    found = importlib.import_module(module)
    if hasattr(found, "__path__"):
        found = importlib.import_module(f"{module}.__main__")
    parser: Callable[[], argparse.ArgumentParser] | None = getattr(found, "parser", None)
    return parser


@pytest.mark.parametrize("program", programs())
def test_every_program_is_run_or_has_a_reason_why_not(program: str) -> None:
    assert program in {module_of(command) for command in KNOWN}


@pytest.mark.parametrize("named", DOCUMENTED, ids=lambda named: f"{named.where}: {named.command}")
def test_every_documented_command_is_run_or_has_a_reason_why_not(named: Documented) -> None:
    assert named.command in KNOWN


@pytest.mark.parametrize("target", targets())
def test_every_target_runs_what_is_run_here_or_has_a_reason_why_not(target: str) -> None:
    if f"make {target}" in KNOWN:
        return
    commands = {each.command for each in DOCUMENTED if each.where == f"make {target}"}
    if ".venv/bin/pytest " in recipe(target):
        commands.add("pytest")

    assert commands
    assert commands <= RUN


@pytest.mark.parametrize("named", DOCUMENTED, ids=lambda named: f"{named.where}: {named.command}")
def test_the_program_understands_the_options_that_are_documented(named: Documented) -> None:
    parser = parser_of(named.module)
    words = [PLACEHOLDERS.get(word, word) for word in named.words]
    if parser is None:
        assert [] == words, f"{named.module} has no function parser() to try them on"
        return
    parser().parse_args([word for word in words if word != "--help"])


def test_nothing_is_listed_that_is_not_there() -> None:
    there = {*programs(), *(f"make {target}" for target in targets()), "pytest"}

    assert set() == {each for each in KNOWN if each not in there and module_of(each) not in there}


def test_nothing_is_listed_twice() -> None:
    assert set() == RUN & EXEMPT.keys()


@pytest.mark.parametrize(("command", "test"), RUN_BY_OTHER_TESTS.items())
def test_another_test_that_runs_a_command_names_it(command: str, test: str) -> None:
    assert command.rpartition(".")[2].rpartition(" ")[2] in (ROOT / test).read_text("utf-8")


def test_make_alone_lists_the_targets_that_are_for_a_person() -> None:
    listed = [line.split()[1] for line in made("help").splitlines()]

    assert listed
    assert set() == targets_in_pages() - set(listed)
    assert set() == set(listed) - set(targets())
