"""What Python's JSON parser reads and JSON does not have: infinite numbers, and nesting without end."""

from __future__ import annotations

from json import JSONDecoder
from math import isinf
from typing import Final, NoReturn


class NotFinite(ValueError):
    """A number that Python reads as NaN or infinite (RFC 8259 has neither)."""


def _constant(name: str) -> NoReturn:
    raise NotFinite(name)


def _finite(digits: str) -> float:
    number = float(digits)
    if isinf(number):
        raise NotFinite(digits)
    return number


FINITE: Final = JSONDecoder(parse_constant=_constant, parse_float=_finite)
"""Decodes JSON; raises JSONDecodeError, and NotFinite for a number that no double holds."""


def is_deeper(document: object, levels: int) -> bool:
    """Return whether a document has more levels. Works level by level, so that no depth exceeds the stack."""
    level = [document] if isinstance(document, dict | list) else []
    for _ in range(levels):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return bool(level)
