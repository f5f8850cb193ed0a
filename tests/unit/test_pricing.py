"""Costs to the micro-dollar, against numbers worked out by hand from Anthropic's price list."""

import json
from datetime import date
from decimal import ROUND_HALF_UP, Decimal
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.domain.pricing import (
    Bill,
    Price,
    PriceList,
    Spend,
    Usage,
    base_model,
    cost_facts,
    half_price,
    usd,
)

DATA = json.loads(files("sluice.data").joinpath("prices.json").read_text(encoding="utf-8"))
PRICES = PriceList.from_rows(DATA["prices"])
DAY = date(2026, 11, 20)
MILLION = 1_000_000


def billed(**usage: Any) -> Bill:
    bill = Bill.of_message({"type": "message", "usage": usage})
    assert bill is not None
    return bill


def cost(model: str, usage: Usage, day: date = DAY, *, batch: bool = False) -> int | None:
    return PRICES.cost_micro_usd(model, usage, day, batch=batch)


@pytest.mark.parametrize(
    ("model", "usage", "micro_usd"),
    [
        # Haiku 4.5: 1 / 5 dollars per million.
        ("claude-haiku-4-5", Usage(input_tokens=MILLION), 1_000_000),
        ("claude-haiku-4-5", Usage(output_tokens=MILLION), 5_000_000),
        ("claude-haiku-4-5", Usage(input_tokens=12, output_tokens=34), 12 + 170),
        # A release date changes nothing.
        ("claude-haiku-4-5-20251001", Usage(input_tokens=12, output_tokens=34), 182),
        # Cache: written for five minutes 1.25, for an hour 2, read 0.10.
        ("claude-haiku-4-5", Usage(cache_creation_input_tokens=1_000), 1_250),
        (
            "claude-haiku-4-5",
            Usage(cache_creation_input_tokens=1_000, cache_creation_1h_input_tokens=1_000),
            2_000,
        ),
        (
            "claude-haiku-4-5",
            Usage(cache_creation_input_tokens=1_000, cache_creation_1h_input_tokens=400),
            600 * 5 // 4 + 400 * 2,
        ),
        ("claude-haiku-4-5", Usage(cache_read_input_tokens=1_000), 100),
        # Haiku 5.5 takes a step up when the whole prompt is above 100,000 tokens, for all its tokens.
        ("claude-haiku-5-5", Usage(input_tokens=100_000, output_tokens=1_000), 10_000 + 500),
        ("claude-haiku-5-5", Usage(input_tokens=100_001, output_tokens=1_000), 50_001 + 2_500),
        (
            "claude-haiku-5-5",
            Usage(input_tokens=1, cache_read_input_tokens=100_000),
            5_001,  # 0.5 + 5,000 micro-dollars, half up
        ),
        # One token at 0.10 dollars a million is a tenth of a micro-dollar: rounded once, at the end.
        ("claude-haiku-5-5", Usage(input_tokens=4), 0),
        ("claude-haiku-5-5", Usage(input_tokens=5), 1),
        ("claude-haiku-5-5", Usage(input_tokens=4, output_tokens=1), 1),
        # Web searches: 10 dollars per thousand, on top.
        ("claude-haiku-4-5", Usage(input_tokens=1, web_search_requests=3), 30_001),
        # More expensive ways: fast doubles, US-only adds a tenth, both together multiply; searches stay.
        ("claude-opus-4-6", Usage(output_tokens=1_000, fast=True), 50_000),
        ("claude-opus-4-6", Usage(output_tokens=1_000, us_only=True), 27_500),
        (
            "claude-opus-4-6",
            Usage(output_tokens=1_000, fast=True, us_only=True, web_search_requests=1),
            55_000 + 10_000,
        ),
        ("claude-fable-5-1", Usage(cache_read_input_tokens=1_000_000), 250_000),
        ("claude-haiku-4-5", Usage(), 0),
    ],
)
def test_a_call_costs_what_the_price_list_says(model: str, usage: Usage, micro_usd: int) -> None:
    assert micro_usd == cost(model, usage)


def test_the_batch_lane_costs_half() -> None:
    usage = Usage(input_tokens=1_000, output_tokens=1_001)

    assert (1_000 + 5_005 + 1) // 2 == cost("claude-haiku-4-5", usage, batch=True)


def test_an_unknown_model_has_no_price_rather_than_a_wrong_one() -> None:
    assert cost("claude-nobody", Usage(input_tokens=5)) is None


@pytest.mark.parametrize(
    ("day", "micro_usd"),
    [
        # Sonnet 5.5's cache reads became cheaper on 7 October 2026; not a day earlier, and for good.
        (date(2026, 10, 6), 200_000),
        (date(2026, 10, 7), 100_000),
        (date(2027, 10, 7), 100_000),
    ],
)
def test_prices_hold_from_their_day_on(day: date, micro_usd: int) -> None:
    assert micro_usd == cost("claude-sonnet-5-5", Usage(cache_read_input_tokens=MILLION), day)


def test_a_model_has_no_price_before_its_first_day() -> None:
    assert cost("claude-fable-5-2", Usage(input_tokens=5), date(2026, 11, 8)) is None


def test_every_row_of_the_file_has_the_columns_that_belong_together() -> None:
    """Reading is cheaper than writing, an hour more expensive than five minutes."""
    for price in PRICES.prices:
        assert price.cache_read < price.input < price.cache_write_5m < price.cache_write_1h
        assert price.input < price.output


@pytest.mark.parametrize("spoiled", [{"input": "dear"}, {"from": "soon"}, {"models": None}])
def test_a_row_that_is_no_price_is_shown(spoiled: dict[str, Any]) -> None:
    row = DATA["prices"][0] | spoiled

    with pytest.raises(ValueError, match="not a price row") as wrong:
        Price.from_row(row)
    assert "claude-fable-5-2" in str(wrong.value) or spoiled == {"models": None}


def test_a_row_without_a_column_is_shown() -> None:
    row = {name: value for name, value in DATA["prices"][0].items() if name != "cache_read"}

    with pytest.raises(ValueError, match="cache_read"):
        Price.from_row(row)


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("claude-haiku-4-5-20251001", "claude-haiku-4-5"),
        ("claude-haiku-4-5", "claude-haiku-4-5"),
        ("claude-sonnet-20240229-beta", "claude-sonnet-20240229-beta"),
    ],
)
def test_the_release_date_is_no_part_of_the_name(model: str, base: str) -> None:
    assert base == base_model(model)


# Usage as Claude reports it --------------------------------------------------------------------------------


def test_usage_is_read_from_a_message() -> None:
    usage = Usage.from_message(
        {
            "input_tokens": 10,
            "cache_creation_input_tokens": 30,
            "cache_creation": {"ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 20},
            "cache_read_input_tokens": 40,
            "output_tokens": 50,
            "server_tool_use": {"web_search_requests": 2},
            "speed": "fast",
            "inference_geo": "us",
        }
    )

    assert Usage(10, 30, 20, 40, 50, 2, fast=True, us_only=True) == usage
    assert (80, 40) == (usage.prompt_tokens, usage.limited_input_tokens)


@pytest.mark.parametrize(
    "reported",
    [
        {},
        {"input_tokens": None, "cache_creation": None, "server_tool_use": None, "iterations": None},
        {"input_tokens": "7", "output_tokens": -3, "iterations": ["odd", {"type": "message"}]},
    ],
)
def test_missing_null_and_odd_counts_are_nothing(reported: dict[str, Any]) -> None:
    assert Usage() == Usage.from_message(reported)


def test_compaction_is_billed_on_top_of_the_sums() -> None:
    bill = billed(
        input_tokens=100,
        output_tokens=10,
        iterations=[
            {"type": "compaction", "input_tokens": 1_000, "output_tokens": 50},
            {"type": "message", "input_tokens": 100, "output_tokens": 10},
        ],
    )

    assert (1_100, 60) == (bill.usage.input_tokens, bill.usage.output_tokens)


# Dollars per million tokens, from Anthropic's published list: input, output, written for 5 minutes, for an hour, read.
PUBLISHED = {
    "claude-fable-5": ("10", "50", "12.5", "20", "1"),
    "claude-opus-4-8": ("5", "25", "6.25", "10", "0.5"),
    "claude-haiku-4-5": ("1", "5", "1.25", "2", "0.1"),
}


def by_hand(*parts: tuple[str, int, int, int, int, int]) -> int:
    """Return what (model, input, output, written for 5 minutes, for an hour, read) cost in all, in micro-dollars."""
    total = sum(
        (Decimal(price) * count for model, *counts in parts
         for price, count in zip(PUBLISHED[model], counts, strict=True)),
        Decimal(),
    )  # fmt: skip
    return int(total.to_integral_value(ROUND_HALF_UP))


def step(
    kind: str, into: int, out: int, *, model: str | None = None, **more: Any
) -> dict[str, Any]:
    named = {} if model is None else {"model": model}
    counts = {"cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
    return {"type": kind, "input_tokens": into, "output_tokens": out, **counts, **named, **more}


def split(five_minutes: int, hour: int) -> dict[str, int]:
    return {"ephemeral_5m_input_tokens": five_minutes, "ephemeral_1h_input_tokens": hour}


BILLS: list[tuple[str, str, str, dict[str, Any], int]] = [
    (
        "a fallback that served after a model declined without output, which is not billed",
        "claude-fable-5", "claude-opus-4-8",
        {"input_tokens": 412, "output_tokens": 264, "iterations": [
            step("message", 412, 0, model="claude-fable-5"),
            step("fallback_message", 412, 264, model="claude-opus-4-8"),
        ]},
        by_hand(("claude-opus-4-8", 412, 264, 0, 0, 0)),
    ),
    (
        "a model that declined in the middle of its output is billed too",
        "claude-fable-5", "claude-opus-4-8",
        {"input_tokens": 2, "output_tokens": 13_658, "cache_read_input_tokens": 79_214, "iterations": [
            step("message", 2, 578, model="claude-fable-5", cache_creation_input_tokens=10_421,
                 cache_read_input_tokens=72_769),
            step("fallback_message", 2, 13_658, model="claude-opus-4-8", cache_read_input_tokens=79_214),
        ]},
        by_hand(("claude-fable-5", 2, 578, 10_421, 0, 72_769),
                ("claude-opus-4-8", 2, 13_658, 0, 0, 79_214)),
    ),
    (
        "an advisor, and the turns around it",
        "claude-haiku-4-5", "claude-haiku-4-5",
        {"input_tokens": 412, "output_tokens": 531, "iterations": [
            step("message", 412, 89),
            step("advisor_message", 823, 1_612, model="claude-opus-4-8"),
            step("message", 1_348, 442, cache_read_input_tokens=412),
        ]},
        by_hand(("claude-haiku-4-5", 1_760, 531, 0, 0, 412), ("claude-opus-4-8", 823, 1_612, 0, 0, 0)),
    ),
    (
        "cache written for an hour by a compaction, and by the message without a split of its own",
        "claude-haiku-4-5", "claude-haiku-4-5",
        {"input_tokens": 10, "output_tokens": 10, "cache_creation_input_tokens": 1_000,
         "cache_creation": split(0, 1_000), "iterations": [
            step("compaction", 0, 0, cache_creation_input_tokens=1_000_000,
                 cache_creation=split(0, 1_000_000)),
            step("message", 10, 10, cache_creation_input_tokens=1_000),
        ]},
        by_hand(("claude-haiku-4-5", 10, 10, 0, 1_001_000, 0)),
    ),
    (
        "both lifetimes, split between two turns",
        "claude-haiku-4-5", "claude-haiku-4-5",
        {"input_tokens": 3, "output_tokens": 7, "cache_creation_input_tokens": 900,
         "cache_creation": split(600, 300), "iterations": [
            step("message", 1, 3, cache_creation_input_tokens=500, cache_creation=split(500, 0)),
            step("message", 2, 4, cache_creation_input_tokens=400),
        ]},
        by_hand(("claude-haiku-4-5", 3, 7, 600, 300, 0)),
    ),
    (
        "a compaction alone is added to the top-level counts",
        "claude-haiku-4-5", "claude-haiku-4-5",
        {"input_tokens": 10, "output_tokens": 20, "iterations": [step("compaction", 100, 7)]},
        by_hand(("claude-haiku-4-5", 110, 27, 0, 0, 0)),
    ),
    (
        "no iterations: the model that served, whatever was asked",
        "claude-fable-5", "claude-opus-4-8", {"input_tokens": 100, "output_tokens": 10},
        by_hand(("claude-opus-4-8", 100, 10, 0, 0, 0)),
    ),
    (
        "a name as Bedrock and relays write it",
        "claude-opus-4-8", "global.anthropic.claude-opus-4-8-20260401-v1:0",
        {"input_tokens": 100, "output_tokens": 10},
        by_hand(("claude-opus-4-8", 100, 10, 0, 0, 0)),
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "served", "usage", "micro_usd"),
    [pytest.param(*rest, id=name) for name, *rest in BILLS],
)
def test_a_bill_has_every_iteration_at_the_price_of_its_model(
    asked: str, served: str, usage: dict[str, Any], micro_usd: int
) -> None:
    bill = Bill.of_message({"model": served, "usage": usage})

    assert micro_usd == PRICES.bill_micro_usd(asked, bill, DAY)


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        {"input_tokens": 5},
        {"input_tokens": 5, "output_tokens": None},
        {"input_tokens": 5, "output_tokens": 10**12},
        {"input_tokens": True, "output_tokens": 5},
        {"input_tokens": 5, "output_tokens": 5, "iterations": "many"},
        {"input_tokens": 5, "output_tokens": 5, "iterations": [step("message", 5, 5), "odd"]},
        {"input_tokens": 5, "output_tokens": 5, "iterations": [
            step("message", 5, 5), step("advisor_message", 1, 1, model="claude-nobody")]},
    ],
)  # fmt: skip
def test_what_is_not_known_has_no_cost_rather_than_a_wrong_one(usage: Any) -> None:
    bill = Bill.of_message({"model": "claude-haiku-4-5", "usage": usage})

    assert PRICES.bill_micro_usd("claude-haiku-4-5", bill, DAY) is None


def test_a_model_that_served_and_has_no_price_is_not_priced_as_the_one_asked() -> None:
    bill = Bill.of_message(
        {"model": "claude-nobody", "usage": {"input_tokens": 5, "output_tokens": 5}}
    )

    assert PRICES.bill_micro_usd("claude-haiku-4-5", bill, DAY) is None


def test_web_searches_are_billed_once_beside_iterations() -> None:
    bill = billed(
        input_tokens=1, output_tokens=1, server_tool_use={"web_search_requests": 3},
        iterations=[step("message", 1, 1)],
    )  # fmt: skip

    assert 30_006 == PRICES.bill_micro_usd("claude-haiku-4-5", bill, DAY)


@given(usage=st.builds(Usage, *[st.integers(0, 10**6)] * 2))
def test_a_batch_costs_half_of_the_tokens(usage: Usage) -> None:
    live = PRICES.cost_micro_usd("claude-haiku-4-5", usage, DAY)
    assert live is not None

    batch = PRICES.cost_micro_usd("claude-haiku-4-5", usage, DAY, batch=True)

    assert batch is not None
    assert abs(batch - half_price(usage, live)) <= 1


def test_an_unknown_cost_is_null_and_counted() -> None:
    known, unknown = cost_facts(1_234, 0), cost_facts(1_234, 2)

    assert (1_234, "0.001234", 0) == (
        known["cost_micro_usd"],
        known["cost_usd"],
        known["unknown_costs"],
    )
    assert {
        "cost_micro_usd": None, "cost_usd": None, "known_cost_micro_usd": 1_234, "unknown_costs": 2,
    } == unknown  # fmt: skip
    assert 1 == (Spend.of_call(Usage(), None) + Spend.of_call(Usage(), 5)).unknown_costs


def test_usage_is_shown_under_anthropics_names() -> None:
    shown = {
        "input_tokens": 1,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": 2,
    }

    assert shown == Usage(input_tokens=1, output_tokens=2).as_dict()
    assert 3 == Usage(web_search_requests=3).as_dict()["web_search_requests"]


# Sums ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("micro_usd", "text"),
    [(0, "0.000000"), (1, "0.000001"), (1_234, "0.001234"), (12_000_000, "12.000000")],
)
def test_money_is_shown_with_six_decimals(micro_usd: int, text: str) -> None:
    assert text == usd(micro_usd)


def test_large_sums_are_exact() -> None:
    assert "9007199254.740993" == usd(9_007_199_254_740_993)


spends = st.builds(Spend, *[st.integers(0, 10**12)] * 6)


@settings(deadline=None, derandomize=True)
@given(spends, spends, spends)
def test_sums_are_the_same_in_any_order(one: Spend, two: Spend, three: Spend) -> None:
    assert (one + two) + three == three + (two + one)
    assert one == one + Spend()


def test_one_call_adds_its_tokens_and_its_cost() -> None:
    usage = Usage(1, 2, 1, 3, 4)

    spend = Spend.of_call(usage, 99) + Spend.of_call(usage, 1)

    assert {
        "calls": 2,
        "input_tokens": 2,
        "cache_creation_input_tokens": 4,
        "cache_read_input_tokens": 6,
        "output_tokens": 8,
        "cost_micro_usd": 100,
        "unknown_costs": 0,
        "uncertain_calls": 0,
    } == spend.as_dict()


@settings(deadline=None, derandomize=True)
@given(
    st.builds(
        Usage,
        input_tokens=st.integers(0, 10**6),
        cache_read_input_tokens=st.integers(0, 10**6),
        output_tokens=st.integers(0, 10**6),
    )
)
def test_more_tokens_never_cost_less(usage: Usage) -> None:
    more = Usage(
        input_tokens=usage.input_tokens + 1,
        cache_read_input_tokens=usage.cache_read_input_tokens,
        output_tokens=usage.output_tokens + 1,
    )

    for model in ("claude-haiku-5-5", "claude-sonnet-5-5", "claude-opus-5-5"):
        less_cost, more_cost = cost(model, usage), cost(model, more)
        assert less_cost is not None
        assert more_cost is not None
        assert less_cost <= more_cost
