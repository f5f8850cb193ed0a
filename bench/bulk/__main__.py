"""Run the benchmark: `python -m bench.bulk kills`, `half_price`, `planner` and others; `--help` names the choices."""

from __future__ import annotations

import argparse
import sys

from bench.bulk import half_price, joins, kills, planner, timeline
from scripts.local_stack import StackError


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(prog="python -m bench.bulk", description=__doc__)
    benches = made.add_subparsers(dest="bench", required=True)
    large = benches.add_parser("kills", help="a large file, workers killed, against a tenth of it")
    large.add_argument("--lines", type=int, default=100_000)
    large.add_argument("--bad", type=int, default=100, help="number of invalid lines")
    large.add_argument(
        "--kills", type=int, default=3, help="number of workers to kill during the run"
    )
    half = benches.add_parser(
        "half_price", help="a large file through Message Batches, and its costs"
    )
    half.add_argument("--rows", type=int, default=250_000)
    huge = benches.add_parser("planner", help="only the planner, on an object that is not stored")
    huge.add_argument("--gigabytes", type=float, default=5.0)
    huge.add_argument("--line-bytes", type=int, default=500)
    steps = benches.add_parser("timeline", help="where the time of a batch goes, step by step")
    steps.add_argument("--rows", type=int, nargs="+", default=[10, 600])
    steps.add_argument("--repeat", type=int, default=3, help="number of runs per median (3)")
    steps.add_argument("--cold", action="store_true", help="end all processes before each batch")
    ends = benches.add_parser("joins", help="only the code that joins the rows of a section")
    ends.add_argument("--rows", type=int, default=100_000)
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen benchmark; return the exit status."""
    chosen = parser().parse_args(arguments)
    try:
        if chosen.bench == "kills":
            return kills.run(chosen.lines, chosen.bad, chosen.kills)
        if chosen.bench == "half_price":
            return half_price.run(chosen.rows)
        if chosen.bench == "timeline":
            return timeline.run(chosen.rows, chosen.repeat, cold=chosen.cold)
        if chosen.bench == "joins":
            return joins.run(chosen.rows)
        return planner.run(int(chosen.gigabytes * 1e9), chosen.line_bytes)
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
