"""Limits of workspaces: who waits after a refusal, for how long, and at which pace a workspace goes on."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from sluice.domain.workspaces import (
    EQUAL_RATE,
    MIN_RATE,
    MOST_WORKSPACES,
    PACED_MS,
    PROBE_MS,
    REGAIN_MS,
    WITHIN_MS,
    Workspace,
    WorkspaceRefusal,
    answered,
    organization_until,
    refused,
    started,
)
from tests.fakes import MINUTE, NOON, SECOND

NONE: Mapping[str, Workspace] = {}
DAY = 24 * 60 * MINUTE


def throttled(
    *names: str, seconds: int = 10, at: int = NOON, is_said: bool = False
) -> WorkspaceRefusal:
    return WorkspaceRefusal(
        names, at + seconds * SECOND, "rate limited", "key req", is_said=is_said
    )


def spent(name: str, at: int = NOON) -> WorkspaceRefusal:
    return WorkspaceRefusal((name,), at + 15 * MINUTE, "spend limit", is_rate=False)


def test_a_refused_workspace_is_blocked_until_its_time_under_all_its_names() -> None:
    known = refused(NONE, throttled("wrkspc_1", "key:a"), NOON)

    assert {"wrkspc_1", "key:a"} == set(known)
    for each in known.values():
        blocked = each.blocked_until, each.blocked_reason, each.blocked_by
        assert (NOON + 10 * SECOND, "rate limited", "key req") == blocked


def test_after_a_429_a_workspace_goes_on_at_half_its_rate_and_regains_it() -> None:
    """10 ms between two calls of the organization are 20 ms between two of the workspace, and 10 ms a while later."""
    known = refused(NONE, throttled("w"), NOON)
    until = NOON + 10 * SECOND

    assert until == refused(NONE, throttled("w"), NOON)["w"].blocked_until
    assert until + 20 == known["w"].next_start(10, NOON)
    assert EQUAL_RATE // 2 == known["w"].rate(until)
    assert EQUAL_RATE * 3 // 4 == known["w"].rate(until + REGAIN_MS // 2)
    assert EQUAL_RATE == known["w"].rate(until + REGAIN_MS)
    assert until + MINUTE == started(known, "w", until + MINUTE)["w"].last_start
    # At the rate of the organization it has its pace, and no bursts for half an hour.
    last = started(known, "w", until + MINUTE)["w"]
    assert until + MINUTE + 10 == last.next_start(10, until + MINUTE)
    assert until == last.next_start(10, NOON + PACED_MS)
    assert [True, False] == [last.is_slow(at) for at in (until, until + MINUTE)]


def test_429s_of_calls_in_flight_together_lower_the_rate_once() -> None:
    known = refused(NONE, throttled("w"), NOON)

    same = refused(known, throttled("w", at=NOON + 300), NOON + 300)
    longer = refused(known, throttled("w", seconds=60), NOON + 300)

    assert known["w"].blocked_until == same["w"].blocked_until
    assert NOON + MINUTE == longer["w"].blocked_until
    assert known["w"].rate_factor == same["w"].rate_factor == longer["w"].rate_factor


def test_the_rate_has_a_floor_from_which_it_recovers_within_a_quarter_of_an_hour() -> None:
    known: Mapping[str, Workspace] = NONE
    now = NOON
    for _ in range(40):
        known = refused(known, throttled("w", seconds=1, at=now), now)
        now += 1_001

    assert MIN_RATE == known["w"].rate_factor
    assert EQUAL_RATE == known["w"].rate(now + 15 * MINUTE)
    assert EQUAL_RATE == known["w"].rate(now + 365 * DAY)


def test_after_a_spend_limit_single_calls_try_the_workspace_until_one_is_answered() -> None:
    known = refused(NONE, spent("w"), NOON)
    until = NOON + 15 * MINUTE
    probing = started(known, "w", until)

    assert until == known["w"].next_start(10, until)
    assert until + PROBE_MS == probing["w"].next_start(10, until)
    assert until == answered(probing, "w")["w"].next_start(10, until)
    again = refused(probing, spent("w", until), until + SECOND)
    assert until + 15 * MINUTE == again["w"].next_start(10, until + SECOND)


def test_what_is_not_known_of_a_workspace_is_not_recorded() -> None:
    assert NONE is started(NONE, "w", NOON)
    assert NONE is answered(NONE, "w")
    known = refused(NONE, throttled("w"), NOON)
    assert known is answered(known, "w")


# The organization ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "after_ms", "until"),
    [
        (throttled("a"), throttled("b", seconds=30), SECOND, NOON + 10 * SECOND),
        (throttled("a", seconds=60), throttled("b", seconds=30), SECOND, NOON + 30 * SECOND),
        # The first block has ended: only the time of the second counts.
        (throttled("a", seconds=1), throttled("b", seconds=30), 5 * SECOND, NOON + 30 * SECOND),
        (throttled("a", seconds=60), throttled("b", seconds=30), WITHIN_MS, None),
        (throttled("a"), throttled("a"), SECOND, None),
        (throttled("a"), throttled("b", "a"), SECOND, None),
        (throttled("a", is_said=True), throttled("b"), SECOND, None),
        (throttled("a"), throttled("b", is_said=True), SECOND, None),
    ],
)
def test_two_workspaces_refused_in_a_row_speak_for_their_organization(
    first: WorkspaceRefusal, second: WorkspaceRefusal, after_ms: int, until: int | None
) -> None:
    known = refused(NONE, first, NOON)

    assert until == organization_until(known, second, NOON + after_ms)


def test_a_second_name_of_one_workspace_is_no_second_workspace() -> None:
    known = refused(NONE, throttled("wrkspc_1", "key:a"), NOON)

    assert organization_until(known, throttled("wrkspc_1"), NOON) is None


# What is kept ----------------------------------------------------------------------------------------------------


def test_entries_that_say_nothing_any_more_are_dropped() -> None:
    known = refused(refused(NONE, throttled("a"), NOON), spent("b"), NOON)

    def left(at: int) -> set[str]:
        return set(refused(known, throttled("c", at=at), at))

    assert {"a", "b", "c"} == left(NOON + 30 * SECOND)
    assert {"a", "b", "c"} == left(NOON + PACED_MS - 1)
    assert {"b", "c"} == left(NOON + PACED_MS)
    assert {"c"} == left(NOON + 2 * DAY)


def test_only_so_many_workspaces_are_kept() -> None:
    known: Mapping[str, Workspace] = NONE
    for number in range(MOST_WORKSPACES + 50):
        known = refused(known, throttled(f"w{number}", seconds=60 + number), NOON)

    assert MOST_WORKSPACES == len(known)
    assert f"w{MOST_WORKSPACES + 49}" in known
    assert "w0" not in known
