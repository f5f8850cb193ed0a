"""The grammar of the simulator's markers, and faults by rate."""

from __future__ import annotations

import pytest

from scripts.claude_simulator.faults import (
    FAILURES,
    NO_SCRIPT,
    MarkerError,
    Script,
    drawn,
    read_script,
)


@pytest.mark.parametrize(
    ("user_id", "expected"),
    [
        (None, NO_SCRIPT),
        ("user-17", NO_SCRIPT),  # somebody's real user id
        ("sim:529", Script((("529", None),))),
        ("sim:529x3", Script((("529", 3),))),
        ("sim:529x3,500x1 job-17", Script((("529", 3), ("500", 1)))),
        ("sim:drop_after_billing", Script((("drop_after_billing", None),))),
        ("sim:thinking", Script(kind="thinking")),
        ("sim:slow=30,tokens=5", Script(settings={"slow": 30.0, "tokens": 5.0})),
        ("sim:429x2,retry_after=7", Script((("429", 2),), settings={"retry_after": 7.0})),
    ],
)
def test_a_marker_is_read(user_id: str | None, expected: Script) -> None:
    assert read_script(user_id) == expected


@pytest.mark.parametrize(
    "user_id",
    [
        "sim:",
        "sim:530",
        "sim:529x",
        "sim:x3",
        "sim:529x-1",
        "sim:slow=fast",
        "sim:speed=3",
        "sim:,",
    ],
)
def test_an_invalid_marker_is_rejected(user_id: str) -> None:
    with pytest.raises(MarkerError):
        read_script(user_id)


def test_failures_occur_in_their_order_and_then_end() -> None:
    script = read_script("sim:529x2,500x1")

    assert [script.failure_of_call(nth) for nth in range(5)] == ["529", "529", "500", None, None]


def test_a_failure_without_a_count_never_ends() -> None:
    assert read_script("sim:529x1,500").failure_of_call(1000) == "500"


def test_a_draw_hits_each_fault_by_its_share() -> None:
    rates = {"529": 0.2, "500": 0.1}

    assert [drawn(rates, chance) for chance in (0.0, 0.19, 0.2, 0.29, 0.31, 0.99)] == [
        "529",
        "529",
        "500",
        "500",
        None,
        None,
    ]


def test_the_spend_caps_name_their_code_and_no_time_to_retry() -> None:
    spend_cap, ramp = FAILURES["spend_cap"], FAILURES["ramp"]

    assert (spend_cap.status, spend_cap.error_code) == (429, "enforced_spend_limit_reached")
    assert spend_cap.retry_after_seconds is None
    assert (ramp.status, ramp.error_code) == (429, "ramp_limit_exceeded")
    assert ramp.retry_after_seconds is not None
