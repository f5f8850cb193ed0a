"""Costs to the micro-dollar, against numbers worked out by hand from Anthropic's price list."""

import json
from datetime import date
from importlib.resources import files
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.domain.pricing import Bill, Price, PriceList, Spend, Usage, base_model, usd

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
