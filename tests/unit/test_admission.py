"""Who is let in: size and client key are checked first, and one client key's flood is its own trouble."""

from collections import Counter

import pytest

from sluice.domain.errors import RequestTooLarge, SluiceError, Throttled, Unauthenticated
from sluice.domain.throttle import Throttle
from sluice.intake.admission import MOST_BYTES, Admission, Caller
from sluice.ports.clients import Recalled
from tests.fakes import NOON, SECOND, FrozenClock

TENANTS = {"sk-ant-test-acme": "acme", "sk-ant-test-quiet": "quiet", "sk-ant-test-late": "late"}


class Keys:
    """The keys of three tenants, and how many lookups there were."""

    def __init__(self) -> None:
        self.lookups: Counter[str] = Counter()
        self.known: dict[str, str | None] = {}

    def recall(self, key: str) -> Recalled:
        return Recalled(f"id of {key}", self.known.get(key), needs_lookup=key not in self.known)

    def tenant(self, key: str) -> str | None:
        if key not in self.known:
            self.lookups[key] += 1
            self.known[key] = TENANTS.get(key)
        return self.known[key]


@pytest.fixture
def clock() -> FrozenClock:
    return FrozenClock(NOON)


@pytest.fixture
def keys() -> Keys:
    return Keys()


@pytest.fixture
def admit(keys: Keys, clock: FrozenClock) -> Admission:
    return Admission(keys, 10, clock)


def outcome(admit: Admission, key: str, size: int = 100) -> str | type[SluiceError]:
    try:
        return admit(key, size).tenant
    except SluiceError as refused:
        return type(refused)


# The bucket ----------------------------------------------------------------------------------------------------


def test_a_burst_then_the_rate() -> None:
    throttle = Throttle(10)

    burst = [throttle.take("a", 1, NOON) for _ in range(201)]

    assert [0] * 200 + [100] == burst
    assert [100, 0, 100] == [throttle.take("a", 1, NOON + at) for at in (0, 100, 100)]


def test_over_an_hour_a_caller_gets_its_rate_and_one_burst() -> None:
    throttle = Throttle(10)

    taken = sum(throttle.take("a", 1, NOON + at) == 0 for at in range(0, 3_600_000, 20))

    assert 36_000 + 200 == pytest.approx(taken, abs=1)


def test_a_request_may_cost_more_than_is_left_and_then_the_bucket_owes_it() -> None:
    throttle = Throttle(10)
    for _ in range(199):
        throttle.take("a", 1, NOON)

    assert 0 == throttle.take("a", 41, NOON)
    assert 4_100 == throttle.take("a", 1, NOON)


def test_a_clock_that_goes_back_gives_nothing_and_takes_nothing() -> None:
    throttle = Throttle(10)
    for _ in range(200):
        throttle.take("a", 1, NOON)

    assert 100 == throttle.take("a", 1, NOON - 60 * SECOND)
    assert 0 == throttle.take("a", 1, NOON - 60 * SECOND + 100)


# The door ------------------------------------------------------------------------------------------------------


def test_size_comes_before_the_key_and_the_key_before_a_lookup(
    admit: Admission, keys: Keys
) -> None:
    with pytest.raises(RequestTooLarge):
        admit("", MOST_BYTES + 1)
    with pytest.raises(Unauthenticated):
        admit("", MOST_BYTES)

    assert not keys.lookups
    assert Caller("id of sk-ant-test-acme", "acme") == admit("sk-ant-test-acme", MOST_BYTES)


def test_one_key_floods_and_another_is_not_affected(admit: Admission, clock: FrozenClock) -> None:
    flood: Counter[object] = Counter()
    quiet: Counter[object] = Counter()
    for _ in range(60):
        clock.at += SECOND
        flood.update(outcome(admit, "sk-ant-test-acme") for _ in range(1_000))
        quiet.update(outcome(admit, "sk-ant-test-quiet") for _ in range(9))

    assert {"quiet": 60 * 9} == quiet
    # The first request is counted among the lookups.
    assert 60 * 10 + 200 == pytest.approx(flood["acme"], abs=11)
    assert 60_000 == flood["acme"] + flood[Throttled]


def test_a_large_body_counts_as_several_requests(admit: Admission) -> None:
    outcome(admit, "sk-ant-test-acme")

    taken = [outcome(admit, "sk-ant-test-acme", 4_000_000) for _ in range(6)]

    assert ["acme"] * 5 + [Throttled] == taken


def test_a_refusal_says_when_to_come_again(admit: Admission, clock: FrozenClock) -> None:
    for _ in range(5):
        admit("sk-ant-test-acme", 100)
    while outcome(admit, "sk-ant-test-acme", 4_000_000) is not Throttled:
        pass

    with pytest.raises(Throttled, match="retry in") as refused:
        admit("sk-ant-test-acme", 100)

    clock.at += (refused.value.retry_after_seconds - 1) * SECOND
    assert Throttled is outcome(admit, "sk-ant-test-acme")
    clock.at += SECOND
    assert "acme" == outcome(admit, "sk-ant-test-acme")


def test_strangers_share_a_bucket_that_is_not_that_of_tenants(
    admit: Admission, keys: Keys, clock: FrozenClock
) -> None:
    assert "acme" == outcome(admit, "sk-ant-test-acme")
    tried: Counter[object] = Counter()
    for second in range(60):
        clock.at += SECOND
        tried.update(outcome(admit, f"sk-ant-test-{second}-{n}") for n in range(500))
        assert "acme" == outcome(admit, "sk-ant-test-acme")

    assert {Unauthenticated: tried[Unauthenticated], Throttled: tried[Throttled]} == tried
    assert 60 * 50 + 1_000 == pytest.approx(keys.lookups.total(), abs=55)


def test_a_revoked_key_that_keeps_asking_costs_no_lookups(admit: Admission, keys: Keys) -> None:
    """It does not use up what a new key needs to be known."""
    tried = {outcome(admit, "sk-ant-test-revoked") for _ in range(5_000)}

    assert {Unauthenticated} == tried
    assert 1 == keys.lookups["sk-ant-test-revoked"]
    assert "late" == outcome(admit, "sk-ant-test-late")
