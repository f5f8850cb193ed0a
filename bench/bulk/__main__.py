"""Run the bench: `python -m bench.bulk kills` or `planner`; `--help` names the choices."""

from __future__ import annotations

import argparse
import sys

from bench.bulk import kills, planner
from scripts.local_stack import StackError


def parser() -> argparse.ArgumentParser:
    """Return what the command line may name."""
    made = argparse.ArgumentParser(prog="python -m bench.bulk", description=__doc__)
    benches = made.add_subparsers(dest="bench", required=True)
    large = benches.add_parser("kills", help="a large file, workers killed, against a tenth of it")
    large.add_argument("--lines", type=int, default=100_000)
    large.add_argument("--bad", type=int, default=100, help="broken lines among them")
    large.add_argument("--kills", type=int, default=3, help="workers killed on the way")
    huge = benches.add_parser("planner", help="the planner alone, on an object that is not there")
    huge.add_argument("--gigabytes", type=float, default=5.0)
    huge.add_argument("--line-bytes", type=int, default=500)
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line names; return the exit status."""
    chosen = parser().parse_args(arguments)
    try:
        if chosen.bench == "kills":
            return kills.run(chosen.lines, chosen.bad, chosen.kills)
        return planner.run(int(chosen.gigabytes * 1e9), chosen.line_bytes)
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
