"""The walk of a job in docs/architecture.md: each function exists, and a job visits them in that order."""

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import CodeType, FrameType, FunctionType

from sluice.domain.jobs import State
from sluice.intake.accounts import Account
from sluice.intake.submit import Accepted, Sender, Submission, Submit
from tests.fakes import Gateway, VirtualClock

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LAYER = ROOT / "layers" / "sluice" / "sluice"
MOST_LINES = 12

WALK = PAGE.partition("## The walk of a job\n")[2].partition("\n## ")[0]
STEPS = re.findall(r"^\d+\. `([\w.]+):([\w.]+)`", WALK, re.MULTILINE)


def code_of(module: str, name: str) -> CodeType:
    """Find the code of a function, or of a class whose objects are called as one."""
    found: object = import_module(f"sluice.{module}")
    for part in name.split("."):
        found = getattr(found, part)
    function = vars(found)["__call__"] if isinstance(found, type) else found
    assert isinstance(function, FunctionType), f"{module}:{name}"
    return function.__code__


@contextmanager
def visits() -> Iterator[list[CodeType]]:
    """Record every Python function that is called, in all threads."""
    seen: list[CodeType] = []

    def note(frame: FrameType, event: str, _argument: object) -> None:
        if event == "call":
            seen.append(frame.f_code)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def test_the_walk_names_a_function_in_each_of_its_few_lines() -> None:
    lines = re.findall(r"^\d+\. ", WALK, re.MULTILINE)

    assert 0 < len(lines) == len(STEPS) <= MOST_LINES


def test_a_job_walks_as_the_page_says() -> None:
    gateway = Gateway()
    clock = VirtualClock(gateway.time)
    submit = Submit(gateway.jobs, gateway.params, gateway.queue, clock, bytes, gateway.events)
    account = Account(
        *("acme", gateway.jobs, gateway.results, gateway.limits, gateway.ledger),
        *(clock, gateway.events),
    )
    params = {"model": "claude-a", "max_tokens": 10, "messages": [{"role": "user", "content": "x"}]}

    with visits() as seen:
        (outcome,) = submit([Submission(params=params)], Sender("acme"))
        assert isinstance(outcome, Accepted)
        gateway.once()
        job = account.job(outcome.job.job_id)
    gateway.time.close()

    assert job.state is State.SUCCEEDED
    wanted = [code_of(module, name) for module, name in STEPS]
    first = {code: seen.index(code) for code in wanted if code in seen}
    assert [code.co_qualname for code in wanted if code not in first] == []
    assert sorted(wanted, key=first.__getitem__) == wanted


def test_every_folder_of_the_layer_is_on_the_page() -> None:
    folders = {path.name for path in LAYER.iterdir() if path.is_dir() and any(path.glob("*.py"))}

    assert folders == set(re.findall(r"^\| `(\w+)/` \|", PAGE, re.MULTILINE))


def test_every_file_that_the_page_names_exists() -> None:
    named = re.findall(r"`([\w/.-]+\.(?:py|json|yaml))`", PAGE)

    assert named
    assert [
        name for name in named if not (ROOT / name).exists() and not (LAYER / name).exists()
    ] == []
