"""Draws the job's state machine into docs/state_machine.md, from the table that the code obeys.

python -m scripts.state_machine            writes the drawing
python -m scripts.state_machine --check    says whether it is up to date, by the exit code
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from sluice.domain.jobs import TRANSITIONS, State

PAGE: Final = Path(__file__).parents[1] / "docs" / "state_machine.md"
BEGIN: Final = "<!-- drawing:begin -->"
END: Final = "<!-- drawing:end -->"


def drawing(transitions: Mapping[State, Mapping[State, str]]) -> str:
    """Return the state machine as a mermaid diagram in a Markdown code block."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {State.QUEUED} : accepted"]
    for state, onward in transitions.items():
        lines += [f"    {state} --> {new} : {why}" for new, why in onward.items()]
        if state.is_final:
            lines.append(f"    {state} --> [*]")
    return "\n".join([*lines, "```"])


def redrawn(page: str, picture: str) -> str:
    """Return the page with the picture between its markers; raises ValueError without markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page needs {BEGIN} and, after it, {END}")
    return f"{before}{BEGIN}\n{picture}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the drawing, or check it; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m scripts.state_machine")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 when out of date")
    wanted = parser.parse_args(arguments)
    page = PAGE.read_text(encoding="utf-8")
    new = redrawn(page, drawing(TRANSITIONS))
    if page == new:
        return 0
    if wanted.check:
        print(f"{PAGE.name} is out of date: run python -m scripts.state_machine", file=sys.stderr)
        return 1
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
