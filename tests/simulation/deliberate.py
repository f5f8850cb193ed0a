"""What a deliberate bug is, and how it is put into Sluice for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Bug:
    """One of them: what it does, in words, and how it is applied."""

    what: str
    applied: Callable[[], AbstractContextManager[None]]


@contextmanager
def instead(owner: Any, name: str, bad: object) -> Iterator[None]:
    """Put something else in the place of a function, or a constant, for a while."""
    good = vars(owner)[name]
    setattr(owner, name, bad)
    try:
        yield
    finally:
        setattr(owner, name, good)
