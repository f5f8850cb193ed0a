"""The picture: requests admitted per second against the limit, client by client, as an SVG."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from math import ceil
from pathlib import Path

from bench.limits.ideal import supplies
from bench.limits.runners import Run
from bench.limits.scenarios import Scenario

SMOOTHED_SECONDS = 5
X_LABEL_EVERY_SECONDS = 20
COLOURS = ("#8a94a6", "#1769aa", "#d9822b", "#8f398f", "#3d8b57")
"""Of the limit, then of the clients in their order."""
_LEFT_OUT = re.compile(r"<!--.*?-->|/\*.*?\*/|<script.*?</script>", re.DOTALL)
"""Scripts, which a picture in a README cannot run, and comments, which name the day of drawing."""


def smoothed(counts: Sequence[int], seconds: int = SMOOTHED_SECONDS) -> list[float]:
    """Return the mean of each second and those before it, up to so many."""
    return [
        sum(counts[max(0, at - seconds + 1) : at + 1]) / min(seconds, at + 1)
        for at in range(len(counts))
    ]


def draw(path: Path, runs: Sequence[Run], scenario: Scenario) -> None:
    """Write the picture of these runs of one scenario."""
    pygal = import_module("pygal")  # it has no types
    style = import_module("pygal.style")
    longest = max(len(run.starts_per_second) for run in runs)
    limit = sum(supply.by(1e6) - supply.by(1e6 - 1) for supply in supplies(scenario, "requests"))
    lines = {run.label: smoothed(run.starts_per_second) for run in runs}
    highest = max(rate for rates in lines.values() for rate in rates)
    y_labels = [limit * times for times in range(ceil(highest / limit) + 1)]
    chart = pygal.XY(
        js=[],
        show_dots=False,
        stroke_style={"width": 2},
        width=900,
        height=360,
        title=f"{scenario.title}: requests admitted per second (mean of {SMOOTHED_SECONDS} s)",
        x_title="seconds after the first submission",
        range=(0, y_labels[-1]),
        y_labels=y_labels,
        xrange=(0, longest),
        x_labels=list(range(0, longest + 1, X_LABEL_EVERY_SECONDS)),
        legend_at_bottom=True,
        margin=16,
        style=style.Style(
            background="#ffffff",
            plot_background="#ffffff",
            colors=COLOURS,
            font_family="system-ui, sans-serif",
            title_font_size=16,
            label_font_size=12,
            major_label_font_size=12,
            legend_font_size=13,
        ),
    )
    name = f"the limit ({limit:g} a second)"
    chart.add(name, [(0, limit), (longest, limit)], stroke_style={"width": 4})
    for run in runs:
        name = f"{run.label} ({run.score:.0%}, {run.lost} lost)"
        chart.add(name, [(at + 1, rate) for at, rate in enumerate(lines[run.label])])
    chart.uuid = "limits"  # otherwise drawn by chance
    path.write_text(_LEFT_OUT.sub("", chart.render(is_unicode=True)) + "\n", encoding="utf-8")
