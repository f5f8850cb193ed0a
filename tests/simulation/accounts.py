"""What a story takes for granted: where keys belong, which models share limits, and what models cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Final

from sluice.domain.pricing import Usage

ORGANIZATION: Final = "org"

MODEL_GROUPS: Final[Mapping[str, str]] = {
    "claude-a": "a",
    "claude-a2": "a",
    "claude-b": "b",
    "claude-c": "c",
}
"""Two models share the limits of one group."""

NEW_MODEL: Final = "claude-new"
"""It was released today: no list has it yet, and it works."""

INVENTED: Final = tuple(f"claude-{number}" for number in range(20))
"""Models that do not exist; a relay may answer for them all the same."""

PRICES: Final[Mapping[str, int]] = {
    "claude-a": 10,
    "claude-a2": 15,
    "claude-b": 20,
    "claude-c": 30,
    NEW_MODEL: 25,
    **dict.fromkeys(INVENTED, 12),
}
"""Dollars per million output tokens; the others follow from it (see `tests.fakes.price_list`)."""


def limits_of(model: str) -> str:
    """Return whose limits a model really draws on: one that no list has does not share any."""
    return MODEL_GROUPS.get(model, model)


@dataclass(frozen=True, slots=True)
class Home:
    """Where a key of the pool really belongs."""

    organization: str
    workspace: str = "default"


def cost_of(model: str, usage: Usage, *, batch: bool = False) -> int:
    """Return what a call costs in micro-dollars, by a calculation of its own; in a Message Batch it is half."""
    per_token = Decimal(PRICES[model]) / (2 if batch else 1)
    short = usage.cache_creation_input_tokens - usage.cache_creation_1h_input_tokens
    exact = per_token * (
        usage.output_tokens
        + Decimal(usage.input_tokens) / 10
        + Decimal(short) / 8
        + Decimal(usage.cache_creation_1h_input_tokens) / 5
        + Decimal(usage.cache_read_input_tokens) / 100
    )
    return int(exact.quantize(Decimal(1), ROUND_HALF_UP))
