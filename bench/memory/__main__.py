"""Run the memory benchmark: `python -m bench.memory`; `--help` names the choices."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.memory import child
from bench.memory.cloud import ROOT, cloud, memory_sizes
from bench.memory.loads import LOADS, Load, World, functions
from bench.memory.servers import servers
from scripts.local_stack.emulator import StackError, clean_environment

PATIENCE_SECONDS: Final = 1_800


@dataclass(frozen=True, slots=True)
class Measured:
    """What one load used."""

    load: Load
    started_mb: int
    """After the imports, before the first event."""
    peak_mb: int
    limit_mb: int
    seconds: float
    problem: str | None = None
    """Why the figures mean nothing."""

    @property
    def verdict(self) -> str:
        """Say whether the function has enough memory for the load."""
        if self.problem is not None:
            return f"FAILED: {self.problem}"
        return "ok" if self.peak_mb < self.limit_mb else "ABOVE"


def parser() -> argparse.ArgumentParser:
    """Return what the command line may name."""
    made = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    made.add_argument("--only", choices=functions(), help="one function")
    made.add_argument("--small", action="store_true", help="loads of seconds, which show no peak")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line names; return the exit status."""
    chosen = parser().parse_args(arguments)
    loads = [each for each in LOADS if chosen.only in {None, each.function}]
    try:
        rows = [measured(each, is_small=chosen.small) for each in loads]
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for line in table(rows):
        print(line)
    return status(rows)


def status(rows: Sequence[Measured]) -> int:
    """Return the exit status: 0 if every function has enough memory for each of its loads."""
    return 0 if all(row.verdict == "ok" for row in rows) else 1


def measured(load: Load, *, is_small: bool) -> Measured:
    """Run one load in a process of its own, with an emulator of its own."""
    print(f"{load.function}: {load.name} ...", file=sys.stderr, flush=True)
    limit_mb = memory_sizes()[load.function]
    with (
        tempfile.TemporaryDirectory(prefix="sluice-memory-") as folder,
        servers() as (obeying, url),
        cloud(url) as made,
    ):
        world = World(made, obeying, url, is_small)
        events = Path(folder) / "events.jsonl"
        with events.open("w", encoding="utf-8") as lines:
            for event in load.events(world):
                lines.write(json.dumps(event) + "\n")
        path = os.pathsep.join(map(str, (ROOT, ROOT / "layers" / "sluice")))
        done = subprocess.run(
            [sys.executable, "-m", child.__name__, load.function, str(events), str(load.seconds)],
            env=clean_environment() | dict(made.environment) | {"PYTHONPATH": path},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        happened = done.returncode == 0 and load.happened(world)
    reports = [
        line.removeprefix(child.REPORT)
        for line in done.stdout.splitlines()
        if line.startswith(child.REPORT)
    ]
    if not reports:
        words = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no report"]
        return Measured(load, 0, 0, limit_mb, 0, words[0])
    report = json.loads(reports[0])
    found = report["statuses"]
    expected = list(load.expected) if len(load.expected) > 1 else [*load.expected] * len(found)
    problem = None
    if found != expected:
        problem = f"ended {', '.join(found)}"
    elif not happened:
        problem = "not all of the work was done"
    return Measured(
        load, report["started_mb"], report["peak_mb"], limit_mb, report["seconds"], problem
    )


def table(rows: Sequence[Measured]) -> list[str]:
    """Return the table, as Markdown."""
    head = (
        "| function | load | MB at its start | peak MB | MemorySize | share | seconds | verdict |"
    )
    lines = [head, "|---|---|---:|---:|---:|---:|---:|---|"]
    return lines + [
        f"| {each.load.function} | {each.load.name} | {each.started_mb} | {each.peak_mb} | "
        f"{each.limit_mb} | {each.peak_mb / each.limit_mb:.0%} | {each.seconds:.0f} | "
        f"{each.verdict} |"
        for each in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
