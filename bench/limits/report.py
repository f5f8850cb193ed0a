"""The table: in the terminal, and as a block of docs/bench.md that the benchmark itself writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from bench.limits.runners import Run, StartFrom
from bench.limits.scenarios import Scenario

BEGIN = "<!-- results: written by `python -m bench.limits --write docs/bench.md` -->"
END = "<!-- end of results -->"
HEADS = (
    "scenario",
    "client",
    "score, warm",
    "score, cold",
    "lost",
    "429s per answer",
    "billed twice (avoidable)",
    "seconds (ideal)",
    "CPU s (imports)",
    "limiter writes",
    "receives per job",
    "Lambda GB s",
)
FOLLOW_SECONDS = 30.0
"""How soon Sluice is to follow a changed limit."""
MOST_CPU_SECONDS = 10.0
"""Per 1,000 jobs, imports apart."""
MOST_LIMITER_WRITES = 150.0
"""Per 1,000 jobs in one limit group."""
PER_THOUSAND = "CPU seconds, limiter writes and Lambda GB seconds are per 1,000 jobs done."
DEFINITIONS = (
    "jobs: from the first POST /jobs until the last job has ended. "
    "batches: from messages.batches.create until the batch is `ended`, its results joined."
)
MOST_BEHIND_JOBS = 0.03
MOST_BEHIND_WARM = 0.05
NONE = "–"  # noqa: RUF001 - a dash that reads as one


class NoMarkers(ValueError):
    """The file does not say where the results go."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a run whose functions were warm, and the same from cold."""

    run: Run
    """The warm one, unless there is none; all columns but one are of it."""
    warm: Run | None
    cold: Run | None


def rows(runs: Sequence[Run]) -> list[Row]:
    """Return the lines of the table; of repeated runs the one with the median score counts."""
    lines: dict[tuple[object, ...], dict[StartFrom, list[Run]]] = {}
    for run in runs:
        line = lines.setdefault((run.scenario, run.client, run.door, run.workers), {})
        line.setdefault(run.start or StartFrom.WARM, []).append(run)
    found = []
    for line in lines.values():
        warm, cold = (_median(line[each]) if each in line else None for each in StartFrom)
        shown = warm or cold
        assert shown is not None  # noqa: S101 - a line is made by its first run
        found.append(Row(shown, warm, cold))
    return found


def _median(runs: Sequence[Run]) -> Run:
    return sorted(runs, key=lambda run: run.score)[len(runs) // 2]


def comparisons(runs: Sequence[Run]) -> list[str]:
    """Return where batches are behind jobs, or a cold start behind a warm one, by more than they may be."""
    found = rows(runs)
    jobs = {
        (row.run.scenario, row.run.workers): row.warm for row in found if row.run.door == "jobs"
    }
    said = []
    for row in found:
        name = f"{row.run.scenario}, {row.run.label}"
        other = jobs.get((row.run.scenario, row.run.workers))
        if row.run.door == "batches" and row.warm and other:
            behind = other.score - row.warm.score
            if behind > MOST_BEHIND_JOBS:
                said.append(f"{name}: missed: {behind:.1%} behind jobs, at most 3% wanted")
        if row.warm and row.cold and row.warm.score - row.cold.score > MOST_BEHIND_WARM:
            behind = row.warm.score - row.cold.score
            said.append(f"{name}: missed: cold {behind:.1%} behind warm, at most 5% wanted")
    return said


def cells(row: Row, scenario: Scenario) -> tuple[str, ...]:
    """Return the cells of one line."""
    run, calls = row.run, row.run.calls
    return (
        scenario.title,
        run.label,
        _score(row.warm, scenario),
        _score(row.cold, scenario),
        f"{run.lost:,}",
        f"{calls.rate_limited_per_answer:.3f}",
        f"{calls.billed_twice} ({calls.avoidable})",
        f"{run.seconds:.1f} ({run.ideal_seconds_left:.1f})",
        *_spent(run),
    )


def _score(run: Run | None, scenario: Scenario) -> str:
    if run is None:
        return NONE
    percent = f"{run.score:.1%}"
    if scenario.stranger_jobs:
        percent = f"{percent} of what is left, {run.score_alone:.1%} of all"
    return percent


def _spent(run: Run) -> tuple[str, str, str, str]:
    done = max(1, run.done)
    spent = run.spent
    if spent is None:
        return _per_thousand(run.client_cpu_seconds, done, 1), NONE, NONE, NONE
    imports = ""
    if spent.import_cpu_seconds is not None:
        imports = f" ({spent.processes} x {spent.import_cpu_seconds:.1f})"
    writes = spent.limiter_writes
    return (
        _per_thousand(spent.cpu_seconds, done, 1) + imports,
        _per_thousand(spent.limiter_versions if writes is None else writes, done, 0),
        NONE if spent.receives is None else f"{spent.receives / done:.2f}",
        _per_thousand(spent.lambda_gb_seconds, done, 0),
    )


def _per_thousand(amount: float | None, done: int, digits: int) -> str:
    return NONE if amount is None else f"{amount * 1000 / done:,.{digits}f}"


def misses(run: Run, scenario: Scenario) -> list[str]:
    """Return what Sluice was to reach and did not; other clients are to reach nothing."""
    if run.client != "sluice":
        return []
    missed = []
    target = scenario.target
    if target is not None and run.score < target.score:
        missed.append(f"score {run.score:.1%}, at least {target.score:.0%} wanted")
    if target is not None and run.calls.rate_limited_per_answer > target.rate_limited_per_answer:
        missed.append(
            f"{run.calls.rate_limited_per_answer:.3f} 429s per answer, "
            f"at most {target.rate_limited_per_answer:g} wanted"
        )
    if run.lost:
        missed.append(f"{run.lost} jobs lost, none wanted")
    if run.calls.avoidable:
        missed.append(f"{run.calls.avoidable} avoidable double billings, none wanted")
    missed += _overspent(run, scenario)
    for each in run.followed:
        if each.seconds is None or each.seconds > FOLLOW_SECONDS:
            took = "never" if each.seconds is None else f"only after {each.seconds:.1f} s"
            missed.append(f"{took} at the new limit of {each.requests_per_minute} RPM")
    return missed


def _overspent(run: Run, scenario: Scenario) -> list[str]:
    if run.spent is None:
        return []
    thousands = max(1, run.done) / 1000
    missed = []
    if (run.spent.cpu_seconds or 0.0) > MOST_CPU_SECONDS * thousands:
        missed.append(
            f"{(run.spent.cpu_seconds or 0.0) / thousands:.1f} CPU seconds per 1,000 jobs, "
            f"at most {MOST_CPU_SECONDS:g} wanted"
        )
    writes = run.spent.limiter_writes or 0
    if len(scenario.organisations) == 1 and writes > MOST_LIMITER_WRITES * thousands:
        missed.append(
            f"{writes / thousands:.0f} limiter writes per 1,000 jobs, "
            f"at most {MOST_LIMITER_WRITES:g} wanted"
        )
    return missed


def remarks(run: Run, scenario: Scenario) -> list[str]:
    """Return the notes on a run."""
    said = [
        f"at the new limit of {each.requests_per_minute} RPM within 10 % "
        + ("never" if each.seconds is None else f"after {each.seconds:.1f} s")
        for each in run.followed
    ]
    said += run.notes
    if run.calls.foreign_bodies:
        said.append("rewrites its requests: the ideal time is that of the answers it got")
    said += [f"missed: {miss}" for miss in misses(run, scenario)]
    return [f"{scenario.name}, {run.label}: {text}" for text in said]


def terminal_table(runs: Sequence[Run], scenarios: Mapping[str, Scenario]) -> Table:
    """Return the table for the terminal."""
    table = Table(caption=f"{PER_THOUSAND}\n{DEFINITIONS}", caption_justify="left")
    for number, head in enumerate(HEADS):
        table.add_column(head, justify="left" if number < 2 else "right")  # noqa: PLR2004
    last = None
    for row in rows(runs):
        run = row.run
        if last is not None and run.scenario != last:
            table.add_section()
        last = run.scenario
        scenario = scenarios[run.scenario]
        style = "red" if misses(run, scenario) else ""
        table.add_row(*(Text(cell, style=style) for cell in cells(row, scenario)))
    return table


def markdown(runs: Sequence[Run], scenarios: Mapping[str, Scenario], about: str) -> str:
    """Return the same as Markdown."""
    lines = [about, "", _row(HEADS), _row(["---"] * 2 + ["---:"] * (len(HEADS) - 2))]
    found = rows(runs)
    lines += [_row(cells(row, scenarios[row.run.scenario])) for row in found]
    lines += ["", PER_THOUSAND, "", DEFINITIONS]
    said = [line for row in found for line in remarks(row.run, scenarios[row.run.scenario])]
    said += comparisons(runs)
    if said:
        lines += ["", *(f"- {line}" for line in said)]
    return "\n".join(lines)


def _row(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"


def write_between_markers(path: Path, block: str) -> None:
    """Put the block between the file's markers, in place of the last one."""
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise NoMarkers(f"{path} has no lines {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n\n{block}\n\n{END}{after}", encoding="utf-8")


def as_json(runs: Sequence[Run], about: str) -> str:
    """Return everything that was measured."""
    rows = [
        asdict(run) | {"lost": run.lost, "score": run.score, "score_alone": run.score_alone}
        for run in runs
    ]
    return json.dumps({"about": about, "runs": rows}, indent=1) + "\n"
