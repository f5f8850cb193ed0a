"""Writes the job's state machine into docs/state_machine.md, from the table that the code obeys.

python -m scripts.state_machine            writes the diagram and the table
python -m scripts.state_machine --check    exits with 1 if they are out of date
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from sluice.domain.jobs import TRANSITIONS, Rule, State, Transition

PAGE: Final = Path(__file__).parents[1] / "docs" / "state_machine.md"


def drawing(changes: Mapping[Transition, Rule]) -> str:
    """Return the state machine as a mermaid diagram in a Markdown code block."""
    arrows: dict[tuple[State, State], list[str]] = {}
    for change, rule in changes.items():
        for source in rule.sources:
            arrows.setdefault((source, rule.target), []).append(change)
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {State.QUEUED} : submit"]
    lines += [f"    {old} --> {new} : {', '.join(names)}" for (old, new), names in arrows.items()]
    lines += [f"    {state} --> [*]" for state in State if state.is_final]
    return "\n".join([*lines, "```"])


def table(changes: Mapping[Transition, Rule]) -> str:
    """Return the changes as a Markdown table."""
    rows = ["| change | from | to | who | the lease | when |", "|---|---|---|---|---|---|"]
    for change, rule in changes.items():
        sources = ", ".join(f"`{state}`" for state in rule.sources)
        cells = (change, sources, f"`{rule.target}`", ", ".join(rule.who), rule.lease, rule.when)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def redrawn(page: str, name: str, content: str) -> str:
    """Return the page with the content between the markers of that name; raises ValueError without markers."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"the page needs {begin} and, after it, {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"


def up_to_date(page: str) -> str:
    """Return the page as the code has it."""
    return redrawn(redrawn(page, "drawing", drawing(TRANSITIONS)), "changes", table(TRANSITIONS))


def main(arguments: Sequence[str] | None = None) -> int:
    """Write drawing and table, or check them; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.state_machine")
    parser.add_argument(
        "--check", action="store_true", help="compare only; exit 1 if the page is out of date"
    )
    wanted = parser.parse_args(arguments)
    page = PAGE.read_text(encoding="utf-8")
    new = up_to_date(page)
    if page == new:
        return 0
    if wanted.check:
        print(f"{PAGE.name} is out of date: run python -m scripts.state_machine", file=sys.stderr)
        return 1
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
