"""The usage and the cost of a call.

Prices are US dollars per million tokens, which is the same number as micro-dollars per token. Costs are integer
micro-dollars, rounded half up once per call. The price rows in `data/prices.json` have effective dates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, date, datetime
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, Final

_DATED = re.compile(r"-20\d{6}$")
_ADDED = re.compile(r"-v\d+(?::\d+)?$")

US_ONLY = Decimal("1.1")
"""Multiplier for `inference_geo: us`. Source: Anthropic's pricing page."""

FAST = Decimal(2)
"""Multiplier for fast mode (`speed: fast`). Source: Anthropic's pricing page."""

LIVE_LANE: Final = "live"
BATCH_LANE: Final = "batch"
"""The lanes, as the ledger and the usage name them: calls of the Messages API, and Message Batches."""

BATCH = Decimal("0.5")
"""Multiplier for the batch lane, on every kind of token. Source: Anthropic's pricing page."""

WEB_SEARCH_MICRO_USD = Decimal(10_000)
"""One web search: 10 dollars per 1,000. Source: Anthropic's pricing page."""


def base_model(model: str) -> str:
    """Return the model id without its release date: `claude-haiku-4-5-20251001` is `claude-haiku-4-5`."""
    return _DATED.sub("", model)


def _listed(model: str) -> str:
    """Return a model id as the price list has it, without what Bedrock, Vertex AI and relays add to it."""
    plain = _ADDED.sub("", model).replace("@", "-")
    return base_model(plain[max(0, plain.find("claude-")) :])


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
    def is_billed(self) -> bool:
        """Whether anything was used that has a price."""
        return any(getattr(self, name) for name in _COUNTS)

    @property
    def limited_input_tokens(self) -> int:
        """Input that counts against ITPM: cache reads are free (Anthropic, rate limits)."""
        return self.input_tokens + self.cache_creation_input_tokens

    @classmethod
    def from_message(cls, usage: object) -> Usage:
        """Read the `usage` object of a Message, or one of its iterations; what is no count is 0."""
        said = _object(usage)
        written = _int(said.get("cache_creation_input_tokens"))
        written_1h = _int(_object(said.get("cache_creation")).get("ephemeral_1h_input_tokens"))
        return cls(
            input_tokens=_int(said.get("input_tokens")),
            cache_creation_input_tokens=written,
            cache_creation_1h_input_tokens=min(written_1h, written),
            cache_read_input_tokens=_int(said.get("cache_read_input_tokens")),
            output_tokens=_int(said.get("output_tokens")),
            web_search_requests=_int(
                _object(said.get("server_tool_use")).get("web_search_requests")
            ),
            fast=said.get("speed") == "fast",
            us_only=said.get("inference_geo") == "us",
        )

    def __add__(self, other: Usage) -> Usage:
        sums = {name: getattr(self, name) + getattr(other, name) for name in _COUNTS}
        return replace(self, **sums)

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


_COUNTS: Final = (
    "input_tokens",
    "cache_creation_input_tokens",
    "cache_creation_1h_input_tokens",
    "cache_read_input_tokens",
    "output_tokens",
    "web_search_requests",
)

MOST_COUNT: Final = 10**9
"""A larger count is no count: what a call uses is bounded by its context of about a million tokens."""


def _int(value: object) -> int:
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return value if is_count and 0 < value <= MOST_COUNT else 0  # type: ignore[operator,return-value]


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _has_counts(usage: object) -> bool:
    """Return whether a usage object has the two counts that are always there (Anthropic, Messages)."""
    said = _object(usage)
    return all(
        type(said.get(name)) is int and 0 <= said[name] <= MOST_COUNT
        for name in ("input_tokens", "output_tokens")
    )


@dataclass(frozen=True, slots=True)
class Charge:
    """What one model was used for in a call."""

    model: str | None
    """As upstream names it; None: the model that served the call."""
    usage: Usage


@dataclass(frozen=True, slots=True)
class Bill:
    """What one call is billed for: its iterations, each at the price of the model that ran it.

    A server-side fallback, an advisor and a compaction are iterations of their own. With `message` iterations the
    list is complete; without, it has what the top-level counts leave out (Anthropic: refusals and fallback, advisor
    tool, compaction).
    """

    served_by: str | None
    """The model that upstream names in the Message."""
    charges: tuple[Charge, ...]
    is_legible: bool = True
    """Whether all iterations could be read. Otherwise the cost is unknown."""

    @property
    def usage(self) -> Usage:
        """The sum over all models."""
        first, *others = (charge.usage for charge in self.charges or (Charge(None, Usage()),))
        return sum(others, first)

    @classmethod
    def of_message(cls, message: Mapping[str, Any]) -> Bill | None:
        """Read what a Message says of its usage; None if it does not say."""
        said = message.get("usage")
        if not _has_counts(said):
            return None
        named = message.get("model")
        served_by = named if isinstance(named, str) else None
        top = Usage.from_message(said)
        listed = _object(said).get("iterations") or []
        steps = [step for step in listed if _has_counts(step)] if isinstance(listed, list) else []
        billed = [step for at, step in enumerate(steps) if not _is_declined(step, steps[at + 1 :])]
        is_complete = any(step.get("type") in _SAMPLED for step in steps)
        charges = [] if is_complete else [Charge(None, top)]
        charges += [
            Charge(
                model if isinstance(model := step.get("model"), str) else None,
                replace(
                    Usage.from_message(step),
                    fast=top.fast and step.get("type") != "advisor_message",
                    us_only=top.us_only,
                ),
            )
            for step in billed
        ]
        if is_complete:
            charges = _with_hours(charges, billed, top)
            charges.append(Charge(None, Usage(web_search_requests=top.web_search_requests)))
        return cls(
            served_by,
            tuple(charge for charge in charges if charge.usage.is_billed),
            isinstance(listed, list) and len(steps) == len(listed),
        )


_SAMPLED: Final = frozenset({"message", "fallback_message"})


def _is_declined(step: Mapping[str, Any], later: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether an iteration is the try of a model that declined before any output, which is not billed."""
    return (
        step.get("type") == "message"
        and step.get("output_tokens") == 0
        and any(each.get("type") == "fallback_message" for each in later)
    )


def _with_hours(
    charges: Sequence[Charge], steps: Sequence[Mapping[str, Any]], top: Usage
) -> list[Charge]:
    """Apply the top-level split of cache writes to the sampled iterations that have none of their own."""
    sampled = [step.get("type") in _SAMPLED for step in steps]
    left = top.cache_creation_1h_input_tokens - sum(
        charge.usage.cache_creation_1h_input_tokens
        for charge, is_sampled in zip(charges, sampled, strict=True)
        if is_sampled
    )
    split = []
    for charge, step, is_sampled in zip(charges, steps, sampled, strict=True):
        usage = charge.usage
        if is_sampled and not isinstance(step.get("cache_creation"), Mapping) and left > 0:
            hours = min(left, usage.cache_creation_input_tokens)
            left -= hours
            usage = replace(usage, cache_creation_1h_input_tokens=hours)
        split.append(replace(charge, usage=usage))
    return split


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
        name = _listed(model)
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
        """Return what usage of one model costs in micro-dollars, or None if it has no price."""
        return self.bill_micro_usd(model, Bill(None, (Charge(None, usage),)), day, batch=batch)

    def bill_micro_usd(
        self, asked: str, bill: Bill | None, day: date, *, batch: bool = False
    ) -> int | None:
        """Return what a call costs in micro-dollars; None if its usage, or the price of one of its models, is unknown.

        `asked` is the model of the request, for a Message that does not name the one that served it.
        """
        if bill is None or not bill.is_legible:
            return None
        costs = [
            self._exact(charge.model or bill.served_by or asked, charge.usage, day, batch=batch)
            for charge in bill.charges
        ]
        known = [cost for cost in costs if cost is not None]
        if len(known) < len(costs):
            return None
        return int(sum(known, Decimal()).to_integral_value(ROUND_HALF_UP))

    def _exact(self, model: str, usage: Usage, day: date, *, batch: bool) -> Decimal | None:
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
        return tokens + usage.web_search_requests * WEB_SEARCH_MICRO_USD


def half_price(usage: Usage, cost_micro_usd: int) -> int:
    """Return what a call of this cost would cost in a batch: tokens are half price there, tools are not."""
    tools = usage.web_search_requests * int(WEB_SEARCH_MICRO_USD)
    return -(-max(0, cost_micro_usd - tools) // 2) + min(tools, cost_micro_usd)


def full_price(usage: Usage, cost_micro_usd: int) -> int:
    """Return what a request that cost so much in a batch would cost in a call: twice its tokens, tools are the same."""
    tools = min(usage.web_search_requests * int(WEB_SEARCH_MICRO_USD), cost_micro_usd)
    return 2 * (cost_micro_usd - tools) + tools


def utc_day(at: int) -> date:
    """Return the UTC day of a time in epoch milliseconds; prices and usage are per UTC day."""
    return datetime.fromtimestamp(at / 1000, UTC).date()


def usd(micro_usd: int) -> str:
    """Format micro-dollars as dollars with six decimals: 1234 is `0.001234`."""
    return f"{Decimal(micro_usd) / 1_000_000:.6f}"


def cost_facts(micro_usd: int, unknown_costs: int) -> dict[str, int | str | None]:
    """Return a cost as every door shows it: null, not a number too low, when the cost of a call is unknown."""
    is_known = not unknown_costs
    return {
        "cost_micro_usd": micro_usd if is_known else None,
        "cost_usd": usd(micro_usd) if is_known else None,
        "known_cost_micro_usd": micro_usd,
        "unknown_costs": unknown_costs,
    }


@dataclass(frozen=True, slots=True)
class Spend:
    """Sums over calls. Addition is exact, in any order."""

    calls: int = 0
    input_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens: int = 0
    cost_micro_usd: int = 0
    unknown_costs: int = 0
    """Calls that were billed, but whose cost is unknown: no price, or upstream reported no usage."""
    uncertain_calls: int = 0
    """Calls that may have been billed: nobody saw how they ended."""

    @classmethod
    def of_call(cls, usage: Usage, cost_micro_usd: int | None, *, certain: bool = True) -> Spend:
        """Return the sums of one call; None: its cost is unknown."""
        return cls(
            calls=1,
            input_tokens=usage.input_tokens,
            cache_creation_input_tokens=usage.cache_creation_input_tokens,
            cache_read_input_tokens=usage.cache_read_input_tokens,
            output_tokens=usage.output_tokens,
            cost_micro_usd=cost_micro_usd or 0,
            unknown_costs=int(cost_micro_usd is None),
            uncertain_calls=int(not certain),
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

    def bare(self) -> LedgerRow:
        """Return the row without what callers or upstream have named: no store refuses it."""
        return replace(
            self, model="", organization=None, request_id=None, outcome="", note="not storable"
        )


def added_up(rows: Iterable[LedgerRow]) -> dict[tuple[str, date, str, str], Spend]:
    """Return the sums of rows per tenant, day, model and lane."""
    sums: dict[tuple[str, date, str, str], Spend] = {}
    for row in rows:
        key = (row.tenant, row.day, row.model, row.lane)
        sums[key] = sums.get(key, Spend()) + row.spend
    return sums
