"""The emulator's fair queues: which groups are noisy, as SQS's Developer guide says."""

from collections import Counter

from scripts.local_stack.emulator_fairness import Groups


def test_a_group_with_much_in_flight_is_noisy() -> None:
    """More than a tenth of the messages in flight, and at least 30 of them."""
    flying = Counter({"much": 31, "fewer": 29, "a tenth": 40, "rest": 300})

    assert {"rest"} == Groups().noisy(flying, 1_000.0)
    assert {"much"} == Groups().noisy(Counter({"much": 31, "fewer": 29}), 1_000.0)
    assert set() == Groups().noisy(Counter({"few": 4}), 1_000.0)


def test_a_group_that_was_processed_for_long_is_noisy() -> None:
    """Four invocations are never 30 messages, but they may be all the time there is."""
    groups = Groups()
    groups.noisy(Counter({"large": 4}), 1_000.0)

    assert {"large"} == groups.noisy(Counter({"large": 4, "small": 1}), 1_020.0)
    assert {"large"} == groups.noisy(Counter({"large": 4}), 1_022.0)


def test_a_group_that_was_noisy_is_quiet_after_a_while() -> None:
    groups = Groups()
    groups.noisy(Counter({"first": 4}), 1_000.0)
    groups.noisy(Counter({"second": 4}), 1_060.0)

    assert {"first", "second"} == groups.noisy(Counter({"second": 4}), 1_061.0 + 60)
    assert {"second"} == groups.noisy(Counter({"second": 4}), 1_061.0 + 600)
