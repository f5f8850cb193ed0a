"""Write the generated documents, or with --check compare them: see `scripts.documents`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from scripts.documents import bounds, cli, openapi, settings, state_machine

DOCS: Final = Path(__file__).parents[2] / "docs"

DOCUMENTS: Final[Mapping[str, Callable[[str], str]]] = {
    "bounds.md": bounds.updated,
    "cli.md": cli.updated,
    "openapi.json": openapi.updated,
    "settings.md": settings.updated,
    "state_machine.md": state_machine.updated,
}
"""File name -> function that takes the current text and returns the text it should have."""


def outdated() -> dict[str, str]:
    """Return the documents that differ from the code, with the text they should have."""
    found = {}
    for name, updated in DOCUMENTS.items():
        path = DOCS / name
        old = path.read_text(encoding="utf-8") if path.exists() else ""
        new = updated(old)
        if new != old:
            found[name] = new
    return found


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(prog="python -m scripts.documents")
    made.add_argument(
        "--check", action="store_true", help="compare only; exit 1 if a document is out of date"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the documents, or check them; return the exit code."""
    check = parser().parse_args(arguments).check
    found = outdated()
    for name, text in found.items():
        if check:
            print(f"docs/{name} is out of date: run python -m scripts.documents", file=sys.stderr)
        else:
            (DOCS / name).write_text(text, encoding="utf-8")
            print(f"docs/{name} written")
    return 1 if check and found else 0


if __name__ == "__main__":
    sys.exit(main())
