"""The usage and the cost of a call.

Prices are US dollars per million tokens, which is the same number as micro-dollars per token. Costs are integer
micro-dollars, rounded half up once per call. The price rows in `data/prices.json` have effective dates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, date, datetime
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

_DATED = re.compile(r"-20\d{6}$")

US_ONLY = Decimal("1.1")
"""Multiplier for `inference_geo: us`. Source: Anthropic's pricing page."""

FAST = Decimal(2)
"""Multiplier for fast mode (`speed: fast`). Source: Anthropic's pricing page."""

BATCH = Decimal("0.5")
"""Multiplier for the batch lane, on every kind of token. Source: Anthropic's pricing page."""

WEB_SEARCH_MICRO_USD = Decimal(10_000)
"""One web search: 10 dollars per 1,000. Source: Anthropic's pricing page."""


def base_model(model: str) -> str:
    """Return the model id without its release date: `claude-haiku-4-5-20251001` is `claude-haiku-4-5`."""
    return _DATED.sub("", model)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and tools one call was billed for, as Claude reports them."""

    input_tokens: int = 0
    """Uncached input, after the last cache breakpoint."""
    cache_creation_input_tokens: int = 0
    cache_creation_1h_input_tokens: int = 0
    """The part of `cache_creation_input_tokens` written for an hour, at a higher price."""
    cache_read_input_tokens: int = 0
    output_tokens: int = 0
    """Includes thinking."""
    web_search_requests: int = 0
    fast: bool = False
    us_only: bool = False

    @property
    def prompt_tokens(self) -> int:
        """All input, cached or not."""
        return self.input_tokens + self.cache_creation_input_tokens + self.cache_read_input_tokens

    @property
    def limited_input_tokens(self) -> int:
        """Input that counts against ITPM: cache reads are free (Anthropic, rate limits)."""
        return self.input_tokens + self.cache_creation_input_tokens

    @classmethod
    def from_message(cls, usage: Mapping[str, Any]) -> Usage:
        """Read the `usage` object of a Message; missing and null counts are 0.

        Tokens of beta `compaction` iterations are not in the top-level sums and are added.
        """
        creation = usage.get("cache_creation") or {}
        tools = usage.get("server_tool_use") or {}
        extra = [
            step
            for step in usage.get("iterations") or []
            if isinstance(step, Mapping) and step.get("type") == "compaction"
        ]

        def count(name: str) -> int:
            return _int(usage.get(name)) + sum(_int(step.get(name)) for step in extra)

        return cls(
            input_tokens=count("input_tokens"),
            cache_creation_input_tokens=count("cache_creation_input_tokens"),
            cache_creation_1h_input_tokens=_int(creation.get("ephemeral_1h_input_tokens")),
            cache_read_input_tokens=count("cache_read_input_tokens"),
            output_tokens=count("output_tokens"),
            web_search_requests=_int(tools.get("web_search_requests")),
            fast=usage.get("speed") == "fast",
            us_only=usage.get("inference_geo") == "us",
        )

    def as_dict(self) -> dict[str, int]:
        """Return the counts under Anthropic's names, zeros included only for the four main kinds."""
        counts = {
            "input_tokens": self.input_tokens,
            "cache_creation_input_tokens": self.cache_creation_input_tokens,
            "cache_read_input_tokens": self.cache_read_input_tokens,
            "output_tokens": self.output_tokens,
        }
        if self.web_search_requests:
            counts["web_search_requests"] = self.web_search_requests
        return counts


def _int(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


@dataclass(frozen=True, slots=True)
class Price:
    """One row of the price list: dollars per million tokens for some models from a day on."""

    models: tuple[str, ...]
    starts: date
    input: Decimal
    output: Decimal
    cache_write_5m: Decimal
    cache_write_1h: Decimal
    cache_read: Decimal
    prompt_over: int = 0
    """The row applies to requests whose whole prompt is larger than this many tokens."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Price:
        """Read one row of `data/prices.json`; raises ValueError with the row if it is invalid."""
        try:
            return cls(
                models=tuple(row["models"]),
                starts=date.fromisoformat(row["from"]),
                prompt_over=int(row.get("prompt_over", 0)),
                **{
                    name: Decimal(str(row[name]))
                    for name in (
                        "input",
                        "output",
                        "cache_write_5m",
                        "cache_write_1h",
                        "cache_read",
                    )
                },
            )
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise ValueError(f"not a price row: {row!r} ({error!r})") from error


@dataclass(frozen=True, slots=True)
class PriceList:
    """All price rows."""

    prices: tuple[Price, ...]

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> PriceList:
        """Read the rows of the price file."""
        return cls(tuple(Price.from_row(row) for row in rows))

    def price(self, model: str, day: date, prompt_tokens: int = 0) -> Price | None:
        """Return the row for `model` on `day`: the latest, and of its prompt sizes the highest that applies."""
        name = base_model(model)
        candidates = [
            price
            for price in self.prices
            if name in price.models
            and price.starts <= day
            and (not price.prompt_over or prompt_tokens > price.prompt_over)
        ]
        return max(candidates, key=lambda price: (price.starts, price.prompt_over), default=None)

    def cost_micro_usd(
        self, model: str, usage: Usage, day: date, *, batch: bool = False
    ) -> int | None:
        """Return what the call cost in micro-dollars, or None if the model has no price."""
        price = self.price(model, day, usage.prompt_tokens)
        if price is None:
            return None
        written_5m = usage.cache_creation_input_tokens - usage.cache_creation_1h_input_tokens
        tokens = (
            usage.input_tokens * price.input
            + usage.output_tokens * price.output
            + written_5m * price.cache_write_5m
            + usage.cache_creation_1h_input_tokens * price.cache_write_1h
            + usage.cache_read_input_tokens * price.cache_read
        )
        if usage.us_only:
            tokens *= US_ONLY
        if usage.fast:
            tokens *= FAST
        if batch:
            tokens *= BATCH
        total = tokens + usage.web_search_requests * WEB_SEARCH_MICRO_USD
        return int(total.to_integral_value(ROUND_HALF_UP))


def utc_day(at: int) -> date:
    """Return the UTC day of a time in epoch milliseconds; prices and usage are per UTC day."""
    return datetime.fromtimestamp(at / 1000, UTC).date()


def usd(micro_usd: int) -> str:
    """Format micro-dollars as dollars with six decimals: 1234 is `0.001234`."""
    return f"{Decimal(micro_usd) / 1_000_000:.6f}"


@dataclass(frozen=True, slots=True)
class Spend:
    """Sums over calls. Addition is exact, in any order."""

    calls: int = 0
    input_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens: int = 0
    cost_micro_usd: int = 0

    @classmethod
    def of_call(cls, usage: Usage, cost_micro_usd: int) -> Spend:
        """Return the sums of one call."""
        return cls(
            calls=1,
            input_tokens=usage.input_tokens,
            cache_creation_input_tokens=usage.cache_creation_input_tokens,
            cache_read_input_tokens=usage.cache_read_input_tokens,
            output_tokens=usage.output_tokens,
            cost_micro_usd=cost_micro_usd,
        )

    def __add__(self, other: Spend) -> Spend:
        return Spend(
            *(getattr(self, each.name) + getattr(other, each.name) for each in fields(Spend))
        )

    def as_dict(self) -> dict[str, int]:
        """Return the sums by name."""
        return {each.name: getattr(self, each.name) for each in fields(Spend)}


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One upstream call that was or may have been billed, for an audit against Anthropic's invoice."""

    tenant: str
    day: date
    call_id: str
    """`<job id>#<claim>`: unique per call, and equal if the row is written twice."""
    job_id: str
    model: str
    lane: str
    organization: str | None
    key_id: str
    request_id: str | None
    outcome: str
    spend: Spend
    certain: bool = True
    """False if a call was sent but its usage is unknown; the sums then have what is known."""
    note: str | None = None
