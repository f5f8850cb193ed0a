"""Run the benchmark: `python -m bench.limits`; `--help` lists the options."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from types import FrameType

from rich.console import Console

from bench.limits import chart, report
from bench.limits.doors import DOORS, RunFailed
from bench.limits.runners import (
    CLIENTS,
    LITELLM_PYTHON,
    Run,
    Settings,
    StartFrom,
    is_available,
    run,
)
from bench.limits.scenarios import SCENARIOS, Scenario
from scripts.cli.errors import CommandFailed
from scripts.local_stack import StackError

WORKERS = (2, 4, 20)
TABLE_WIDTH = 200


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line names; return the exit status."""
    options = parser()
    chosen = options.parse_args(arguments)
    if chosen.write is not None and (chosen.jobs_scale != 1 or chosen.only):
        options.error("--write is for whole runs: without --only and --jobs-scale")
    # In a file or a pipe the table keeps its full width.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else TABLE_WIDTH)
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    scenarios = [
        scenario.scaled(chosen.jobs_scale)
        for scenario in SCENARIOS
        if not chosen.only or scenario.name in chosen.only
    ]
    runs: list[Run] = []
    status = 0
    try:
        _run_all(scenarios, _available(chosen.clients), chosen, runs)
    except KeyboardInterrupt:
        _say("stopped; nothing is left running")
        status = 130
    except (StackError, RunFailed, CommandFailed) as error:
        _say(f"error: {error}")
        status = 1
    if runs:
        by_name = {scenario.name: scenario for scenario in scenarios}
        about = _about(chosen)
        console.print(report.terminal_table(runs, by_name))
        for line in report.comparisons(runs):
            console.print(line)
        if chosen.json is not None:
            chosen.json.write_text(report.as_json(runs, about), encoding="utf-8")
        if status == 0:
            _write(runs, by_name, about, chosen)
    return status


def _run_all(
    scenarios: list[Scenario], clients: list[str], chosen: argparse.Namespace, runs: list[Run]
) -> None:
    for scenario in scenarios:
        for client, settings in _rows(clients, chosen):
            began = time.monotonic()
            how = f" {settings.door}, {settings.start}" if client == "sluice" else ""
            _say(f"{scenario.name}: {client}{how}, {scenario.jobs:,} jobs")
            done = run(scenario, client, settings)
            runs.append(done)
            _say(
                f"  score {done.score:.1%}, {done.lost} lost, "
                f"{done.calls.rate_limited_per_answer:.3f} 429s per answer, {done.seconds:.1f} s "
                f"(ideal {done.ideal_seconds_left:.1f} s); {time.monotonic() - began:.0f} s in all"
            )
            for line in report.remarks(done, scenario):
                _say(f"  {line}")


def _rows(clients: list[str], chosen: argparse.Namespace) -> Iterator[tuple[str, Settings]]:
    """Yield what runs in each scenario: doors, starts and workers are Sluice's, and another client runs once."""
    for client in clients:
        if client != "sluice":
            yield client, Settings(chosen.seed, chosen.workers[0])
            continue
        for door, workers, start in product(chosen.door, chosen.workers, chosen.start):
            for _ in range(chosen.repeat):
                yield client, Settings(chosen.seed, workers, door, start)


def _write(
    runs: list[Run], by_name: dict[str, Scenario], about: str, chosen: argparse.Namespace
) -> None:
    if chosen.svg is not None:
        chart.draw(chosen.svg, [each.run for each in report.rows(runs)])
        _say(f"drew {chosen.svg}")
    if chosen.write is not None:
        report.write_between_markers(chosen.write, report.markdown(runs, by_name, about))
        _say(f"wrote {chosen.write}")


def _available(clients: list[str]) -> list[str]:
    for client in clients:
        if not is_available(client):
            _say(
                f"{client} is left out: {LITELLM_PYTHON.parent.parent.name} is missing "
                "(bench/requirements-litellm.txt says how to make it)"
            )
    return [client for client in clients if is_available(client)]


def _about(chosen: argparse.Namespace) -> str:
    scale = "" if chosen.jobs_scale == 1 else f", jobs scaled by {chosen.jobs_scale:g}"
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, seed {chosen.seed}"
        f"{scale}; {platform.system()}, {os.cpu_count()} cores, Python {platform.python_version()}."
    )


def parser() -> argparse.ArgumentParser:
    """Return what the command line may name."""
    made = argparse.ArgumentParser(
        prog="python -m bench.limits",
        description="Sluice's limiter and other clients, under real limits, on this machine.",
    )
    names = [scenario.name for scenario in SCENARIOS]
    add = made.add_argument
    add("--only", action="append", choices=names, help="only this scenario (may be repeated)")
    add("--clients", type=_clients, default=list(CLIENTS), help=f"some of {','.join(CLIENTS)}")
    add("--jobs-scale", type=_scale, default=1.0, help="fewer jobs, sooner changes: 0.2 is a smoke")
    add(
        "--workers",
        type=_workers,
        default=[4],
        help="Sluice's concurrent workers, as in 2,4,20 (4)",
    )
    add(
        "--door",
        type=_some_of(*DOORS),
        default=list(DOORS),
        help="how work reaches Sluice: jobs (POST /jobs), batches (messages.batches.create), or both",
    )
    add(
        "--start",
        type=_some_of(*StartFrom),
        default=list(StartFrom),
        help="Sluice's functions when the clock starts: warm, cold, or both",
    )
    add("--repeat", type=int, default=1, help="run Sluice so often and show the median score (1)")
    add("--seed", type=int, default=1, help="of the jobs and of the simulator's chance (1)")
    add("--json", type=Path, metavar="FILE", help="everything that was measured")
    add("--svg", type=Path, metavar="FILE", help="draw jobs lost and 429s per client")
    add("--write", type=Path, metavar="FILE", help="put the table between the markers of FILE")
    return made


def _clients(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in CLIENTS:
            raise argparse.ArgumentTypeError(f"no client {name}; there are {', '.join(CLIENTS)}")
    return names


def _some_of(*names: str) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        chosen = text.split(",")
        for each in chosen:
            if each not in names:
                raise argparse.ArgumentTypeError(f"not {each!r}, but some of {','.join(names)}")
        return chosen

    return read


def _workers(text: str) -> list[int]:
    numbers = {str(each): each for each in WORKERS}
    names = text.split(",")
    for name in names:
        if name not in numbers:
            raise argparse.ArgumentTypeError(f"not {name!r}, but some of {','.join(numbers)}")
    return [numbers[name] for name in names]


def _scale(text: str) -> float:
    scale = float(text)
    if not 0 < scale <= 1:
        raise argparse.ArgumentTypeError("a number above 0, up to 1")
    return scale


def _stop(number: int, frame: FrameType | None) -> None:
    del number, frame
    # A second Ctrl-C must not interrupt the cleaning up.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
