"""The job's state machine in docs/state_machine.md, from the table that the code obeys."""

from __future__ import annotations

from collections.abc import Mapping

from scripts.documents.markers import replaced, row
from sluice.domain.jobs import TRANSITIONS, Rule, State, Transition


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
        who = ", ".join(rule.who)
        rows.append(row(change, sources, f"`{rule.target}`", who, rule.lease, rule.when))
    return "\n".join(rows)


def updated(page: str) -> str:
    """Return the page with the diagram and the table of the code."""
    with_drawing = replaced(page, "drawing", drawing(TRANSITIONS))
    return replaced(with_drawing, "changes", table(TRANSITIONS))
