"""The dependency rule: functions, wiring, adapters, use cases, domain; never up. A table says who knows whom."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAYER = ROOT / "layers" / "sluice"

# Standard modules that bring in the world: clocks, chance, processes, files, networks. `datetime`
# and `asyncio` are not among them, a value of time being no clock; CLOCKS_AND_SLEEPS is for those.
# PURE are the harmless parts of others.
WORLD = {
    *{"glob", "http", "io", "multiprocessing", "os", "pathlib", "random", "secrets", "select"},
    *{"shutil", "signal", "socket", "sqlite3", "ssl", "subprocess", "tempfile", "time", "urllib"},
    "uuid",
}
PURE = ("urllib.parse",)
CLOCKS_AND_SLEEPS = {
    *{"datetime.now", "datetime.utcnow", "datetime.today", "date.today"},
    *{"asyncio.sleep", "asyncio.run", "loop.time"},
}


@dataclass(frozen=True)
class Floor:
    """What one floor of the house may import."""

    ours: tuple[str, ...] = ()
    """Packages and modules of this project, itself included."""
    others: frozenset[str] | None = frozenset()
    """Top-level packages from elsewhere; None is any."""
    world: bool = False
    """Whether it may touch clocks, chance, files and networks through the standard library."""


MAY_IMPORT: dict[str, set[str]] = {
    "domain": set(),
    "ports": {"domain"},
    # The use cases, from those that need no other to those that do.
    "bulk": {"domain", "ports", "intake.requests"},
    "intake": {"domain", "ports", "bulk"},
    "worker": {"domain", "ports", "notices", "intake.requests"},
    "upkeep": {"domain", "ports", "notices"},
    "upstream": {"domain", "ports", "notices", "intake.requests", "worker", "bulk.lane_choice"},
    "notices": {"domain", "ports"},
    "api": {"domain", "intake", "bulk"},
    "adapters": {
        *{"domain", "ports"},
        *{"bulk", "worker", "upkeep"},
    },
    "settings": {"domain"},
}
"""Which folders and modules of the layer each of them may import; everything in it is known to the composition root."""

WORLDLY = {"adapters", "settings"}
OTHERS: dict[str, frozenset[str] | None] = {
    "adapters": None,
    "api": frozenset({"pydantic", "pydantic_core"}),
    "intake": frozenset({"pydantic"}),
    "notices": frozenset({"standardwebhooks"}),
}
"""Packages from elsewhere that a folder may import; None is any."""

SETTINGS = Floor(ours=("sluice.settings", "sluice.domain"), world=True)
WIRING = Floor(
    ours=("sluice",),
    others=frozenset({"aws_lambda_powertools"}),
    world=True,
)
FUNCTION = Floor(
    ours=tuple(
        f"sluice.{each}" for each in (*(MAY_IMPORT.keys() - {"adapters"}), "wiring", "routes")
    ),
    others=frozenset({"aws_lambda_powertools"}),
    world=True,
)

FILES = sorted(
    path.relative_to(ROOT)
    for folder in (LAYER / "sluice", ROOT / "functions")
    for path in folder.rglob("*.py")
)


def floor_of(path: Path) -> Floor:
    if path.parts[0] == "functions":
        return FUNCTION
    subject = path.relative_to("layers/sluice/sluice").parts[0].removesuffix(".py")
    match subject:
        case "routes":
            # Handlers of one function each: Lambda loads app.py as a file, so what it shares is in the layer.
            return FUNCTION
        case "wiring":
            return WIRING
        case "settings":
            return SETTINGS
        case "__init__" | "data":
            return Floor()
        case _:
            return Floor(
                ours=tuple(f"sluice.{each}" for each in (subject, *MAY_IMPORT[subject])),
                others=OTHERS.get(subject, frozenset()),
                world=subject in WORLDLY,
            )


def imports(node: ast.AST) -> Iterator[str]:
    """Every module imported anywhere below a node, `from a import b` as a.b."""
    for each in ast.walk(node):
        if isinstance(each, ast.Import):
            yield from (name.name for name in each.names)
        elif isinstance(each, ast.ImportFrom):
            module = "." * each.level + (each.module or "")
            yield from (f"{module}.{name.name}" for name in each.names)


def imports_for_types(tree: ast.Module) -> set[str]:
    """The modules imported under `if TYPE_CHECKING`, which are not loaded."""
    return {
        module
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for module in imports(node)
    }


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def below(module: str, allowed: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down_only(path: Path) -> None:
    floor = floor_of(path)

    tree = parse(path)
    for module in imports(tree):
        top = module.partition(".")[0]
        assert top, f"{path} imports relatively ({module}); say the whole name"
        if top in {"functions", "scripts", "sluice", "tests"}:
            assert module == "sluice" or below(module, floor.ours), f"{path} imports {module}"
        elif top in sys.stdlib_module_names:
            allowed = floor.world or top not in WORLD or below(module, PURE)
            assert allowed, f"{path} imports {module}: pass it in instead"
        elif module not in imports_for_types(tree):
            assert floor.others is None or top in floor.others, f"{path} imports {module}"


def test_lambda_has_every_package_that_is_imported() -> None:
    """What only the development environment has is imported for types alone."""
    lock = (LAYER / "requirements.txt").read_text(encoding="utf-8")
    in_lambda = {name.replace("-", "_") for name in re.findall(r"^([\w.-]+)==", lock, re.MULTILINE)}
    distributions = packages_distributions()
    loaded = {
        module.partition(".")[0]
        for tree in map(parse, FILES)
        for module in set(imports(tree)) - imports_for_types(tree)
    } - {"sluice", *sys.stdlib_module_names}

    missing = {
        top
        for top in loaded
        if not in_lambda & {name.replace("-", "_") for name in distributions.get(top, [])}
    }

    assert set() == missing


@pytest.mark.parametrize("path", [path for path in FILES if not floor_of(path).world], ids=str)
def test_time_comes_as_an_argument(path: Path) -> None:
    called = {
        ast.unparse(node.func) for node in ast.walk(parse(path)) if isinstance(node, ast.Call)
    }

    assert set() == called & CLOCKS_AND_SLEEPS


@pytest.mark.parametrize(
    "path", [path for path in FILES if floor_of(path) is not SETTINGS], ids=str
)
def test_only_settings_reads_the_environment(path: Path) -> None:
    text = {
        ast.unparse(node) for node in ast.walk(parse(path)) if isinstance(node, ast.Attribute)
    } | set(imports(parse(path)))

    assert set() == text & {"os.environ", "os.getenv", "os.environb"}


HEAVY = {"anthropic", "boto3", "httpx2", "openapi_pydantic", "pydantic", "standardwebhooks"}
"""Packages that cost a cold start most: the Claude SDK alone 0.8 s and 77 MB."""
LOADED: dict[str, set[str]] = {
    "api": {"boto3", "pydantic"},
    "batches": {"boto3", "pydantic"},
    "dead_letters": {"boto3"},
    "governor": {"boto3", "httpx2"},
    "job_ends": {"boto3"},
    "ranges": {"anthropic", "boto3", "httpx2", "pydantic"},
    "upstream": {"anthropic", "boto3", "httpx2", "pydantic"},
    "webhooks": {"boto3", "httpx2", "standardwebhooks"},
    # The SDK comes with the first worker, once its messages are held.
    "worker": {"boto3"},
}
"""Which of them each function loads when it starts."""


def test_every_function_is_in_the_table_of_what_is_loaded() -> None:
    functions = {path.parent.name for path in ROOT.glob("functions/*/app.py")}

    assert functions == set(LOADED)


@pytest.mark.parametrize("function", LOADED)
def test_a_function_loads_only_what_it_needs(function: str) -> None:
    source = f"import sys, functions.{function}.app; print(*sys.modules)"
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("AWS", "SLUICE"))
    }

    done = subprocess.run(
        [sys.executable, "-c", source],
        env=environment | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, LAYER)))},
        capture_output=True,
        text=True,
        check=False,
    )

    assert (0, "") == (done.returncode, done.stderr)
    assert LOADED[function] == HEAVY & set(done.stdout.split())
