"""Which queues each function's code can send to: none that invokes it, and none that its role does not grant."""

import ast
import gc
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import pytest

from sluice.adapters import sqs
from sluice.settings import MAPPINGS
from sluice.wiring import batches
from tests.expanded_template import template
from tests.fresh import forget_what_is_wired
from tests.moto_aws import in_memory

ROOT = Path(__file__).parents[2]
ADAPTERS = ROOT / "layers" / "sluice" / "sluice" / "adapters"
ROUTES = ROOT / "layers" / "sluice" / "sluice" / "routes"
RESOURCES = template()["Resources"]

FUNCTIONS = sorted(path.parent.name for path in ROOT.glob("functions/*/app.py"))
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "account": ("acme",),
    "batches_of": ("acme",),
    "uploads_of": ("acme",),
}
"""Of those parts of the wiring that make something for each request."""

NOT_BUILT = {"ended_jobs", "hidden", "hold_while_starting"}
"""What handlers call of the wiring that makes nothing to keep; none of it sends."""

NEVER_USED = {("api", "WebhooksQueue")}
"""An upload is put on record by the planner, which the API never has end anything."""


def senders() -> dict[str, set[str]]:
    """Return the classes that send to queues, with the attributes that hold the addresses they send to."""
    found: dict[str, set[str]] = {}
    for path in ADAPTERS.glob("*.py"):
        for made in ast.walk(ast.parse(path.read_text())):
            if not isinstance(made, ast.ClassDef):
                continue
            text = ast.unparse(made)
            if "send_message" not in text:
                continue
            for call in ast.walk(made):
                if isinstance(call, ast.Call) and "send_message" in ast.unparse(call):
                    found.setdefault(made.name, set()).update(
                        keyword.value.attr
                        for keyword in call.keywords
                        if keyword.arg == "QueueUrl" and isinstance(keyword.value, ast.Attribute)
                    )
    return found


SENDERS = senders()
MadeLater = type(batches.assemble)
"""A part of the wiring that is made when it is first used."""


def parts_of(thing: Any) -> Sequence[Any]:
    """Return what a thing of ours holds; nothing of the libraries', and no module's globals."""
    if isinstance(thing, Mapping):
        return [*thing.keys(), *thing.values()]
    if isinstance(thing, list | tuple | set | frozenset):
        return list(thing)
    if isinstance(thing, MethodType | partial | MadeLater):
        return [thing()] if isinstance(thing, MadeLater) else gc.get_referents(thing)
    if isinstance(thing, FunctionType):
        return [cell.cell_contents for cell in thing.__closure__ or ()]
    if type(thing).__module__.startswith("sluice"):
        slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
        named = [getattr(thing, name) for name in slots if hasattr(thing, name)]
        return [*named, *getattr(thing, "__dict__", {}).values()]
    return []


def reachable(roots: Sequence[Any]) -> Iterator[Any]:
    seen: dict[int, Any] = {}
    todo = list(roots)
    while todo:
        thing = todo.pop()
        if id(thing) not in seen:
            seen[id(thing)] = thing
            todo.extend(parts_of(thing))
            yield thing


def built_for(function: str) -> list[Any]:
    """Build all that a handler asks the wiring for."""
    wiring = importlib.import_module(f"sluice.wiring.{function}")
    sources = [ROOT / "functions" / function / "app.py"]
    if "sluice.routes" in sources[0].read_text():
        sources += ROUTES.glob("*.py")
    names = {
        node.attr
        for source in sources
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "wiring"
    }
    makers = {name: getattr(wiring, name) for name in names - NOT_BUILT}
    return [
        make(*ARGUMENTS.get(name, ())) if callable(make) else make for name, make in makers.items()
    ]


def sends_to(function: str) -> set[str]:
    """Return the queues, by logical id, that anything a function builds can send to."""
    return {
        getattr(thing, attribute).rpartition("/")[2]
        for thing in reachable(built_for(function))
        for attribute in SENDERS.get(type(thing).__name__, ())
    }


def logical_id(function: str) -> str:
    return "".join(word.title() for word in function.split("_")) + "Function"


def granted(function: str) -> set[str]:
    """Return the queues that the function's role may send to."""
    policies = RESOURCES[logical_id(function)]["Properties"]["Policies"]
    return {
        statement["Resource"]["Fn::GetAtt"][0]
        for policy in policies
        for statement in policy["Statement"]
        if "sqs:SendMessage" in statement["Action"]
    }


def invoked_by(function: str) -> set[str]:
    """Return the queues that invoke a function."""
    return {
        each["Properties"]["EventSourceArn"]["Fn::GetAtt"][0]
        for each in RESOURCES.values()
        if each["Type"] == "AWS::Lambda::EventSourceMapping"
        and each["Properties"]["FunctionName"]["Fn::GetAtt"][0] == logical_id(function)
    }


@pytest.fixture
def _deployed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with in_memory() as cloud:
        mappings = {
            "SLUICE_MAPPINGS": json.dumps(dict.fromkeys(MAPPINGS, "uuid")),
            "SLUICE_MAX_CONCURRENCY": "10",
            "SLUICE_BULK_CONCURRENCY": "4",
            "SLUICE_LAMBDA_CONCURRENCY": "0",
            "SLUICE_UPSTREAM_FUNCTION": "upstream",
        }
        for name, value in (cloud.environment() | mappings).items():
            monkeypatch.setenv(name, value)
        forget_what_is_wired()
        yield
        forget_what_is_wired()


def test_every_class_that_sends_is_known_with_its_queue() -> None:
    assert {"SqsQueue", "SqsRangesQueue", "SqsBatchesQueue", "SqsInbox"} <= set(SENDERS)
    assert all(SENDERS.values())
    assert {"_dead_letters_url"} == SENDERS[sqs.SqsInbox.__name__]


@pytest.mark.usefixtures("_deployed")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_function_can_send_to_the_queue_that_invokes_it(function: str) -> None:
    """Its role does not grant it, and Lambda would stop it as a recursive loop."""
    assert set() == sends_to(function) & invoked_by(function)


@pytest.mark.usefixtures("_deployed")
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_role_grants_just_the_queues_that_its_function_can_send_to(function: str) -> None:
    used = {name for name in sends_to(function) if (function, name) not in NEVER_USED}

    assert granted(function) == used
