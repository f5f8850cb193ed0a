"""Draw what differs between the clients, as an SVG: jobs lost, and 429s per answer.

`python -m bench.limits.chart` draws docs/limits.svg again from the results in docs/bench.md; with `--check` it only
reports whether the picture is up to date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Final

from bench.limits import report
from bench.limits.doors import BatchesDoor
from bench.limits.runners import Run
from bench.limits.scenarios import SCENARIOS

DOCS: Final = Path(__file__).parents[2] / "docs"
PAGE: Final = DOCS / "bench.md"
PICTURE: Final = DOCS / "limits.svg"

NAMES: Final = {
    "sluice": "Sluice",
    "sdk": "Anthropic SDK, ten retries",
    "tutorial": "asyncio loop with a key pool",
    "litellm": "LiteLLM Router",
}
USUAL_WORKERS: Final = 4
ROW_OF_TABLE: Final = re.compile(
    r"^\| ([^|]+?) \| (\w+)(?: jobs)?(?:, (\d+) workers)? \| [^|]+ \|(?: [^|]+ \|)? ([\d,]+) \| ([\d.]+) \|",
    re.MULTILINE,
)
"""Scenario, client, workers, jobs lost and 429s per answer. Sluice is shown by its jobs door."""
WIDTH, TOP, ROW, BAR = 900, 76, 38, 20
PANELS: Final = ((250, 220), (590, 220))
"""For each panel, where its bars start and how long the longest one is."""
OURS, THEIRS = "#1769aa", "#c9773a"


@dataclass(frozen=True, slots=True)
class Figures:
    """The result of one client in one scenario."""

    scenario: str
    client: str
    jobs: int
    lost: int
    rate_limited_per_answer: float


@dataclass(frozen=True, slots=True)
class Bar:
    """One client in one panel."""

    client: str
    value: float
    label: str


def of_runs(runs: Iterable[Run]) -> list[Figures]:
    """Return the figures of runs that have just ended."""
    rows = [
        (
            run.workers,
            Figures(
                run.scenario, run.client, run.jobs, run.lost, run.calls.rate_limited_per_answer
            ),
        )
        for run in runs
        if run.door != BatchesDoor.name
    ]
    return _with_usual_workers(rows)


def recorded(page: str) -> list[Figures]:
    """Read the figures from the table that the benchmark wrote to docs/bench.md."""
    table = page.partition(report.BEGIN)[2].partition(report.END)[0]
    by_title = {scenario.title: scenario for scenario in SCENARIOS}
    rows = []
    for title, client, workers, lost, rate_limited in ROW_OF_TABLE.findall(table):
        scenario = by_title[title]
        figures = Figures(
            scenario.name, client, scenario.jobs, int(lost.replace(",", "")), float(rate_limited)
        )
        rows.append((int(workers) if workers else None, figures))
    return _with_usual_workers(rows)


def _with_usual_workers(rows: Sequence[tuple[int | None, Figures]]) -> list[Figures]:
    """Keep one run of Sluice per scenario: the one with about as many workers as usual."""
    counts = {workers for workers, _ in rows if workers is not None}
    shown = min(counts, key=lambda count: abs(count - USUAL_WORKERS), default=None)
    return [figures for workers, figures in rows if workers in {None, shown}]


def picture(figures: Sequence[Figures]) -> str:
    """Draw one bar per client and panel: the sum of the lost jobs, the mean of the 429s."""
    clients = [client for client in NAMES if any(each.client == client for each in figures)]
    jobs = {each.scenario: each.jobs for each in figures}
    lost, refused = [], []
    for client in clients:
        own = [each for each in figures if each.client == client]
        number = sum(each.lost for each in own)
        mean = sum(each.rate_limited_per_answer for each in own) / len(own)
        lost.append(Bar(client, number, f"{number:,}"))
        refused.append(Bar(client, mean, f"{mean:.2f}"))
    scenarios = "1 scenario" if len(jobs) == 1 else f"{len(jobs)} scenarios"
    height = TOP + ROW * len(clients) + 12
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(16, 28, f"Same jobs, same rate limits ({scenarios})", size=18),
        *_panel(0, f"Jobs lost, of {sum(jobs.values()):,}", lost),
        *_panel(1, "429s per answer, mean", refused),
        *(_text(16, _middle(row) + 5, NAMES[client]) for row, client in enumerate(clients)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _panel(number: int, title: str, bars: Sequence[Bar]) -> list[str]:
    left, longest = PANELS[number]
    most = max(bar.value for bar in bars) or 1.0
    parts = [_text(left, 58, title, fill="#52606d")]
    for row, bar in enumerate(bars):
        length = max(2.0, longest * bar.value / most)
        fill = OURS if bar.client == "sluice" else THEIRS
        parts += [
            f'<rect x="{left}" y="{_middle(row) - BAR // 2}" width="{length:.1f}" height="{BAR}" fill="{fill}"/>',
            _text(left + length + 8, _middle(row) + 5, bar.label),
        ]
    return parts


def _middle(row: int) -> int:
    return TOP + ROW * row + ROW // 2


def _text(x: float, y: float, text: str, *, size: int = 15, fill: str = "#1f2933") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}">{escape(text)}</text>'


def draw(path: Path, runs: Iterable[Run]) -> None:
    """Write the picture of these runs."""
    path.write_text(picture(of_runs(runs)), encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """Return the options of the command line."""
    made = argparse.ArgumentParser(prog="python -m bench.limits.chart", description=__doc__)
    made.add_argument("--check", action="store_true", help="only report whether it is up to date")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Draw docs/limits.svg from docs/bench.md; return the exit status."""
    checks = parser().parse_args(arguments).check
    drawn = picture(recorded(PAGE.read_text(encoding="utf-8")))
    if not checks:
        PICTURE.write_text(drawn, encoding="utf-8")
    return int(drawn != PICTURE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
