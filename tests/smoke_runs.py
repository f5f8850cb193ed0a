"""Every command a person can start, and what the gate does with it: a run of seconds, another test, or a reason.

A command is a `make` target or a module that runs (`python -m ...`) of `bench`, `scripts` or `tests`. A new one gets a
row in SMOKE_RUNS; tests/unit/test_smoke_runs.py fails while a command is in none of the three, and
tests/acceptance/test_smoke_runs.py runs the rows.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class SmokeRun:
    """A command at a size of seconds."""

    command: str
    """A module, with its subcommand where it has some."""
    options: str
    """`{folder}` is a folder of its own."""
    shows: str
    """A pattern that what it prints must match: its result, not only its end."""
    seconds: int
    """About how long it takes, so that the long ones start first."""

    def __str__(self) -> str:
        """Return it as a person types it."""
        return f"{self.command} {self.options}".strip()

    def line(self, folder: Path) -> list[str]:
        """Return the command line."""
        words = shlex.split(f"{self.command} {self.options}".replace("{folder}", str(folder)))
        return [sys.executable, "-m", *words]


SMOKE_RUNS: Final = (
    SmokeRun("bench.chaos", "--small", r"billed twice, unexplained +│ 0 calls", 45),
    SmokeRun(
        "bench.bulk kills",
        "--lines 500 --bad 10 --kills 1",
        r"killed a worker(.|\n)* results +49 +490\n",
        50,
    ),
    SmokeRun(
        "bench.bulk half_price",
        "--rows 300",
        r"300 succeeded, in the order of the file\nlive calls: 0\n(.|\n)*all functions: \$\d",
        40,
    ),
    SmokeRun(
        "bench.bulk timeline", "--rows 3 --repeat 1 --cold", r"rows +created(.|\n)* +3 +\d", 15
    ),
    SmokeRun("bench.bulk joins", "--rows 2000", r"rewritten: [\d,]+ rows per second\n", 2),
    SmokeRun("bench.bulk planner", "--gigabytes 0.02", r"messages for ranges: 40\d\n", 6),
    SmokeRun("bench.intake", "--requests 50", r"together +│ 2 ", 7),
    SmokeRun(
        "bench.limits",
        "--only plain --clients sluice,sdk,tutorial --jobs-scale 0.02 --workers 2 --start warm"
        " --json {folder}/runs.json --svg {folder}/limits.svg",
        r"sluice jobs, warm, 30 jobs\n.* 0 lost,(.|\n)*sluice batches, warm, 30 jobs\n.* 0 lost,"
        r"(.|\n)*sdk, 30 jobs\n.* 0 lost,(.|\n)*drew ",
        60,
    ),
    SmokeRun(
        "bench.limits",
        "--only stranger --only changing --clients sdk --jobs-scale 0.03",
        r"stranger: sdk, 30 jobs\n.* 0 lost,",
        14,
    ),
    SmokeRun(
        "bench.limits.virtual",
        "--only faults --only stranger --only changing --jobs-scale 0.05 --workers 2 --seeds 1-2",
        r"stranger +│ batches +│ 2 ",
        5,
    ),
    SmokeRun("bench.limits.chart", "--check", "", 1),
    SmokeRun(
        "bench.lanes",
        "--seeds 2 --rows 50000 --days 2",
        r"clairvoyant +│(.|\n)*Every target is reached\.",
        5,
    ),
    SmokeRun("bench.limits.backlog", "--jobs 300 --minutes 3", r"capped +│ 300 ", 7),
    SmokeRun(
        "bench.simulator",
        "--requests 200 --seconds 2 --connections 10",
        r"JSON, answered at once +200:200 ",
        5,
    ),
    SmokeRun(
        "bench.neighbors",
        "--only bad-rows --rows 60 --repeat 1 --rounds 1 --lead 1",
        r"bad-rows: .*, 0, 0\n",
        50,
    ),
    SmokeRun("bench.account_limit", "--small", r"webhooks delivered +│ 100,", 45),
    SmokeRun("scripts.demo", "", r"200 of 200 jobs(.|\n)*Billed twice +│ 0 calls", 22),
    SmokeRun("scripts.documents", "--check", "", 2),
    SmokeRun("tests.simulation", "--seeds 40 --processes 2", r"20 stories, 0 broke", 2),
    SmokeRun("tests.simulation", "--seed 8", r"seed 8\b", 1),
    SmokeRun("tests.simulation", "--bug settle_twice", r"settle_twice: .*seed \d+", 2),
    SmokeRun("tests.fuzz", "--seconds 1", r"ranges: [\d,]+ cases", 6),
    SmokeRun("tests.aws_calls", "{folder}", r"0 kinds of AWS calls, 0 not permitted", 1),
    SmokeRun("tests.expanded_template", "", r'"AWS::Lambda::Function"', 1),
    SmokeRun("pytest", "tests/unit/test_pricing.py --cov --cov-fail-under=0", r"TOTAL .*\d+%", 3),
)

RUN_BY_OTHER_TESTS: Final[Mapping[str, str]] = {
    "bench.memory": "tests/acceptance/test_bench_memory.py",
    "make build": "tests/acceptance/test_sam.py",
    "make help": "tests/unit/test_smoke_runs.py",
    "make local": "tests/acceptance/test_smoke_runs.py",
    "scripts.claude_simulator": "tests/integration/test_simulator.py",
    "scripts.cli": "tests/acceptance/test_sluice.py",
    "scripts.local_stack": "tests/integration/test_local_stack.py",
}

_GATE: Final = "is the gate, or a part of it"
_PART: Final = "is no command: another program of this list starts it"

EXEMPT: Final[Mapping[str, str]] = {
    "bench.limits.direct": _PART,
    "bench.memory.child": _PART,
    "bench.limits.with_litellm": "LiteLLM has an environment of its own, which is optional",
    "make acceptance": _GATE,
    "make check": _GATE,
    "make clean": "destroys the environment that the gate runs in",
    "make deploy": "needs an AWS account; test_sam.py deploys to the emulator",
    "make integration": _GATE,
    "make lint": _GATE,
    "make lock": "needs uv, and the newest packages there are",
    "make record-calls": "runs the integration and acceptance tests, as the gate does",
    "make security": _GATE,
    "make setup": "makes the environment that the gate runs in",
    "make template": _GATE,
    "make test": _GATE,
    "make types": _GATE,
    "make unit": _GATE,
    "scripts.local_stack.emulator_runner": _PART,
    "scripts.local_stack.leash": _PART,
    "tests.sdk.batches": "is no command: tests/acceptance/test_sdks.py starts it",
}

_MODULE: Final = re.compile(r"python[0-9.]* -m ((?:bench|scripts|tests)[a-z_.]*)([^\n`#|>&]*)")
_TARGET: Final = re.compile(r"(?:^|`)make ([a-z-]+)", re.MULTILINE)
_MAKES_OWN: Final = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"}
_SUBCOMMAND: Final = re.compile(r"[a-z]\w*")


@dataclass(frozen=True, slots=True)
class Documented:
    """A command as a page or the Makefile names it."""

    where: str
    module: str
    words: tuple[str, ...]

    @property
    def command(self) -> str:
        """The module, with its subcommand where it has some."""
        first = self.words[0] if self.words else ""
        return f"{self.module} {first}" if _SUBCOMMAND.fullmatch(first) else self.module


def documented() -> Iterator[Documented]:
    """Yield every module of ours that the pages and the Makefile run, with its options."""
    for path in [*_pages(), ROOT / "bench" / "requirements-litellm.txt"]:
        yield from _commands_in(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    for target in targets():
        yield from _commands_in(f"make {target}", recipe(target))


def _commands_in(where: str, text: str) -> Iterator[Documented]:
    for module, rest in _MODULE.findall(text):
        # Behind a full stop, a comma or two blanks the command is over.
        said = re.split(r"  +|[.,;:)]?$|[.,;:)] ", rest.strip())[0]
        yield Documented(where, module.rstrip("."), tuple(said.split()))


def targets() -> list[str]:
    """Return the targets of the Makefile, also those that its help leaves out."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return re.findall(r"^([a-z][a-z-]*):(?!=)", makefile, re.MULTILINE)


def targets_in_pages() -> set[str]:
    """Return the targets that pages name."""
    return {
        target for path in _pages() for target in _TARGET.findall(path.read_text(encoding="utf-8"))
    }


def recipe(target: str) -> str:
    """Return the commands that make would run for a target."""
    return made("--dry-run", "--no-print-directory", target)


def made(*arguments: str) -> str:
    """Run make; return what it prints."""
    # Without what the make that runs the gate leaves in the environment.
    environment = {name: value for name, value in os.environ.items() if name not in _MAKES_OWN}
    done = subprocess.run(
        ["make", *arguments],  # noqa: S607 - the one that runs the gate
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def programs() -> list[str]:
    """Return every module of `bench`, `scripts` and `tests` that can be run."""
    starts = re.compile(r"^if __name__ == .__main__.:", re.MULTILINE)
    return sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for folder in ("bench", "scripts", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if "node_modules" not in path.parts
        and (path.name == "__main__.py" or starts.search(path.read_text(encoding="utf-8")))
    )


def _pages() -> list[Path]:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    # What the changelog names was a command once.
    return sorted(path for path in pages if path.name != "CHANGELOG.md")
