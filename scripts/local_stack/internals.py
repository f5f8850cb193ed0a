"""How the launcher reaches into the emulator: what it replaces must be there, and look as expected."""

from __future__ import annotations

import inspect
from typing import Any

Internals = Any
"""A module or object of the emulator, which has no types."""


def expect(owner: Internals, name: str, *arguments: str) -> Internals:
    """Return a part of a module or class; raise `LookupError` when it is missing or takes other first arguments."""
    if not hasattr(owner, name):
        raise LookupError(f"{owner.__name__}.{name} is missing")
    found = getattr(owner, name)
    if arguments:
        names = list(inspect.signature(found).parameters)
        if names[: len(arguments)] != list(arguments):
            raise LookupError(f"{owner.__name__}.{name} takes other arguments: {', '.join(names)}")
    return found
