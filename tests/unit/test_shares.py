"""Who may use the account's executions: situations one by one, and laws that hold through any number of runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.domain.capacity import LEAST, Backlog
from sluice.domain.shares import (
    APPLIED_MS,
    CEILINGS,
    RESERVED,
    TURN_MS,
    Claim,
    Note,
    Share,
    room_of,
    share,
)
from tests.fakes import MINUTE, NOON

EMPTY = Backlog()
WAITS = Backlog(visible=100)
RUNNING = Backlog(in_flight=5)
LONG_AGO = NOON - 60 * MINUTE

WANTS = {"jobs": 10, "ranges": 4, **CEILINGS}
"""What the mappings of a deployment with the template's defaults want."""

SEVEN = room_of(11)


def claim(name: str, backlog: Backlog = EMPTY, **facts: object) -> Claim:
    """A mapping of the deployment; enabled at the least that Lambda accepts unless said otherwise."""
    plain = Claim(
        name, WANTS[name], LEAST, enabled=True, backlog=backlog, switched_at=LONG_AGO,
        refills=name == "jobs",
    )  # fmt: skip
    return replace(plain, **facts)  # type: ignore[arg-type]


def off(name: str, backlog: Backlog = WAITS, *, minutes: int = 10, **facts: object) -> Claim:
    """A mapping that was disabled this many minutes ago."""
    return claim(name, backlog, enabled=False, switched_at=NOON - minutes * MINUTE, **facts)


def given_to(room: int, *claims: Claim) -> dict[str, int]:
    """What the mappings get; those that are disabled are left out."""
    shares = share(claims, room, NOON)
    return {name: each.maximum_concurrency for name, each in shares.items() if each.enabled}


def every(backlog: Backlog = EMPTY, **facts: object) -> list[Claim]:
    return [claim(name, backlog, **facts) for name in WANTS]


# With room for all -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backlog", [EMPTY, WAITS], ids=["idle", "busy"])
@pytest.mark.parametrize("executions", [31, 100, 1_000])
def test_with_room_for_all_every_mapping_gets_what_it_wants_and_none_is_disabled(
    executions: int, backlog: Backlog
) -> None:
    shares = share(every(backlog), room_of(executions), NOON)

    assert {name: Share(want, enabled=True) for name, want in WANTS.items()} == shares


def test_thirty_one_executions_are_room_for_all_that_the_template_wants() -> None:
    assert 31 - RESERVED == sum(WANTS.values())


def test_with_less_room_the_busy_ones_share_it_evenly_and_the_idle_ones_stay_enabled() -> None:
    busy = [claim("jobs", WAITS), claim("ranges", WAITS)]
    idle = [claim(name) for name in CEILINGS]

    got = given_to(room_of(21), *busy, *idle)

    # 17 executions: two for each of six mappings, the other five for those that have work.
    assert {"jobs": 5, "ranges": 4} | dict.fromkeys(CEILINGS, 2) == got


def test_alone_the_jobs_get_all_that_the_others_do_not_need() -> None:
    got = given_to(room_of(21), claim("jobs", WAITS), *[claim(each) for each in CEILINGS])

    assert 17 - 4 * LEAST == got["jobs"]


@pytest.mark.parametrize(("executions", "room"), [(1_000, 996), (10, 6), (5, 2), (4, 2), (1, 2)])
def test_four_executions_are_left_alone_as_far_as_lambda_permits(
    executions: int, room: int
) -> None:
    assert room == room_of(executions)


# An account of ten -----------------------------------------------------------------------------------------


def test_of_ten_executions_three_idle_queues_are_served_at_a_time_the_first_of_the_list() -> None:
    got = given_to(SEVEN, *every())

    assert {"jobs": 2, "ranges": 2, "batches": 2} == got


def test_following_a_decision_changes_nothing_more() -> None:
    enabled = [claim("jobs"), claim("ranges"), claim("batches")]
    disabled = [off(name, EMPTY) for name in ("webhooks", "dead letters", "range dead letters")]

    got = given_to(SEVEN, *enabled, *disabled)

    assert {"jobs": 2, "ranges": 2, "batches": 2} == got


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        # A message waits: an idle mapping makes room in the same run, the last of the list first.
        (
            [claim("jobs", WAITS), claim("ranges"), claim("batches"), off("webhooks")],
            {"jobs", "ranges", "webhooks"},
        ),
        # One whose messages are all with an invocation makes room before one whose messages wait,
        (
            [claim("jobs", WAITS), claim("ranges", RUNNING), claim("batches", WAITS), off("webhooks")],
            {"jobs", "batches"},  # and its two are free when nothing is in flight any more.
        ),
        (
            [claim("jobs", WAITS), off("ranges", RUNNING, left=2), claim("batches", WAITS),
             off("webhooks")],
            {"jobs", "batches"},
        ),
        (
            [claim("jobs", WAITS), off("ranges", EMPTY), claim("batches", WAITS), off("webhooks")],
            {"jobs", "batches", "webhooks"},
        ),
        # All have messages: who was enabled the longest makes room.
        (
            [claim("jobs", WAITS), claim("ranges", WAITS, switched_at=NOON - 9 * MINUTE),
             claim("batches", WAITS, switched_at=NOON - 5 * MINUTE), off("webhooks")],
            {"jobs", "batches"},
        ),
        # Not yet: its turn has just started.
        (
            [claim("jobs", WAITS), claim("ranges", WAITS, switched_at=NOON - MINUTE),
             claim("batches", WAITS, switched_at=NOON - MINUTE), off("webhooks")],
            {"jobs", "ranges", "batches"},
        ),
        # The jobs' workers refill themselves for minutes: to disable them would free nothing.
        (
            [claim("jobs", RUNNING), claim("ranges", WAITS, switched_at=NOON - TURN_MS),
             claim("batches", WAITS, switched_at=NOON - TURN_MS), off("webhooks")],
            {"jobs", "ranges"},
        ),
        # The jobs' mapping is idle, so that it can make room at once.
        (
            [claim("jobs"), claim("ranges", WAITS), claim("batches", WAITS), off("webhooks")],
            {"ranges", "batches", "webhooks"},
        ),
        # Of two that wait, the one that was disabled the longest comes first.
        (
            [claim("jobs", WAITS), claim("ranges", WAITS, switched_at=NOON),
             off("webhooks", minutes=3), off("dead letters", minutes=4)],
            {"jobs", "ranges", "dead letters"},
        ),
        # A queue whose messages are all hidden needs no invocation now.
        (
            [claim("jobs", WAITS), claim("ranges", WAITS), claim("batches", WAITS),
             off("webhooks", RUNNING)],
            {"jobs", "ranges", "batches"},
        ),
        # There is a free place again: the first of the idle ones has it.
        (
            [claim("jobs", WAITS), off("ranges", EMPTY), off("batches", EMPTY), claim("webhooks")],
            {"jobs", "ranges", "webhooks"},
        ),
    ],
)  # fmt: skip
def test_in_an_account_of_ten_queues_take_turns(claims: list[Claim], expected: set[str]) -> None:
    assert expected == given_to(SEVEN, *claims).keys()


def test_a_raised_limit_enables_all_in_one_run() -> None:
    few = [claim("jobs", WAITS, present=3), *[off(name, EMPTY) for name in WANTS if name != "jobs"]]

    assert WANTS == given_to(room_of(1_000), *few)


def test_a_lowered_limit_disables_what_has_no_place_whatever_waits() -> None:
    claims = [claim(name, WAITS, present=want) for name, want in WANTS.items()]

    got = given_to(SEVEN, *claims)

    assert 3 == len(got)
    assert "jobs" in got
    assert sum(got.values()) <= SEVEN


# What is still running -------------------------------------------------------------------------------------


def test_executions_of_a_lowered_mapping_are_not_given_away_until_they_have_ended() -> None:
    """Seven workers refill themselves for up to a quarter of an hour, though the mapping now says three."""
    lowered = given_to(SEVEN, claim("jobs", WAITS, present=7), off("ranges"), off("webhooks"))
    running = claim("jobs", WAITS, present=3, left=7)
    ended = claim("jobs", WAITS, present=3, left=3)

    assert {"jobs": 3} == lowered
    assert {"jobs": 3} == given_to(SEVEN, running, off("ranges"), off("webhooks"))
    assert {"jobs": 3, "ranges": 2, "webhooks": 2} == given_to(
        SEVEN, ended, off("ranges"), off("webhooks")
    )


def test_one_that_is_enabled_again_takes_over_what_it_had_running() -> None:
    again = off("webhooks", left=2)

    assert "webhooks" in given_to(
        6, claim("jobs", WAITS), claim("ranges", WAITS, switched_at=NOON), again
    )


def test_what_is_being_changed_counts_as_it_is_and_is_left_alone() -> None:
    changing = claim("ranges", WAITS, present=5, fixed=True)

    shares = share([claim("jobs", WAITS), changing, off("webhooks")], SEVEN, NOON)

    assert Share(5, enabled=True) == shares["ranges"]
    assert not shares["webhooks"].enabled


def test_what_is_to_be_off_gets_nothing_and_its_room_is_the_others() -> None:
    claims = [
        claim("jobs", want=None),
        claim("ranges", WAITS),
        claim("batches", WAITS),
        off("webhooks"),
    ]

    assert {"ranges": 3, "batches": 2, "webhooks": 2} == given_to(SEVEN, *claims)


def test_what_is_left_is_forgotten_in_time() -> None:
    note = Note(turned_off_at=NOON, left=2, left_until=NOON + MINUTE + APPLIED_MS)

    assert [2, 2, 0] == [
        note.left_at(NOON + after) for after in (0, 2 * MINUTE - 1, MINUTE + APPLIED_MS)
    ]


# Why -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claims", "name", "said"),
    [
        ([claim("jobs", WAITS), claim("ranges", WAITS), off("webhooks")], "jobs", "3 of the 7"),
        (
            [claim("jobs", WAITS), claim("ranges", WAITS), claim("batches"), off("webhooks")],
            "batches",
            "no message waits in its queue, and messages wait for webhooks; the account limit has",
        ),
        (
            [claim("jobs", WAITS), claim("ranges", WAITS), claim("batches", WAITS), off("webhooks")],
            "batches",
            "its turn is over, and messages wait for webhooks; the account limit has room for 3",
        ),
        (
            [claim("jobs", WAITS), claim("ranges"), claim("batches"), off("webhooks")],
            "webhooks",
            "messages wait in its queue; 2 of the 7 executions that the queues may use",
        ),
        (every(), "webhooks", "the account limit has room for 3 queues at a time"),
        ([claim("jobs", WAITS), off("ranges", EMPTY)], "ranges", "2 of the 7"),
        (
            [claim("jobs", WAITS), off("ranges", EMPTY), off("batches", EMPTY), off("webhooks", EMPTY)],
            "ranges",
            "there is room for another queue; 2 of the 7",
        ),
    ],
)  # fmt: skip
def test_a_share_says_why(claims: list[Claim], name: str, said: str) -> None:
    assert share(claims, SEVEN, NOON)[name].reason.startswith(said)


# Laws ------------------------------------------------------------------------------------------------------

RUN = MINUTE


@dataclass
class Queue:
    """One queue in a play of many runs: its messages, its mapping, and the invocations it has."""

    name: str
    want: int
    drains: int
    """Runs until the invocations of a disabled mapping have ended."""
    is_fed: bool
    """Messages always wait."""
    enabled: bool = True
    present: int = LEAST
    switched_at: int = 0
    left: int = 0
    left_runs: int = 0
    last_served: int = 0

    def running(self) -> int:
        """The most invocations that it may have."""
        return max(self.present if self.enabled else 0, self.left if self.left_runs else 0)

    def claim(self) -> Claim:
        in_flight = self.running() if self.is_fed or self.left_runs else 0
        left = self.left if self.left_runs else 0
        return Claim(
            self.name,
            self.want,
            self.present,
            self.enabled,
            Backlog(visible=100 if self.is_fed else 0, in_flight=in_flight),
            self.switched_at,
            left,
            refills=self.name == "jobs",
        )

    def follow(self, given: Share, now: int) -> None:
        """Do what the governor and Lambda do between two runs."""
        had = self.running()
        self.left_runs = max(0, self.left_runs - 1)
        kept = given.maximum_concurrency if given.enabled else 0
        if kept < (self.present if self.enabled else 0) and self.is_fed:
            self.left, self.left_runs = had, max(self.left_runs, self.drains)
        if given.enabled != self.enabled:
            self.switched_at = now
        self.enabled, self.present = given.enabled, given.maximum_concurrency


QUEUES = st.tuples(
    *[
        st.builds(
            Queue,
            name=st.just(name),
            want=st.integers(LEAST, want),
            drains=st.integers(0, 3),
            is_fed=st.booleans(),
        )
        for name, want in WANTS.items()
    ]
)
ROOMS = st.integers(LEAST, 30)


def play(queues: Sequence[Queue], room: int, run: int) -> None:
    now = NOON + run * RUN
    shares = share([each.claim() for each in queues], room, now)
    for each in queues:
        each.follow(shares[each.name], now)
        if each.enabled:
            each.last_served = run


@settings(max_examples=150, deadline=None)
@given(QUEUES, ROOMS, st.data())
def test_the_enabled_mappings_and_what_still_runs_never_exceed_the_room(
    queues: Sequence[Queue], room: int, data: st.DataObject
) -> None:
    # As deployed: at the least each, and nothing running.
    for each in queues:
        each.is_fed = False
    play(queues, room, 0)
    for run in range(1, 30):
        for each in queues:
            each.is_fed = data.draw(st.booleans())
        play(queues, room, run)

        assert sum(each.present for each in queues if each.enabled) <= room
        assert sum(each.running() for each in queues) <= room


@settings(max_examples=50, deadline=None)
@given(QUEUES, ROOMS)
def test_every_queue_with_messages_is_served_again_and_again(
    queues: Sequence[Queue], room: int
) -> None:
    # A turn is two runs, and what was running takes so many more to end; each of the others may come first.
    longest = max(each.drains for each in queues)
    bound = len(queues) * (TURN_MS // RUN + longest + 2)
    for run in range(4 * bound):
        play(queues, room, run)

        for each in queues:
            assert not each.is_fed or run - each.last_served <= bound, each.name


@settings(max_examples=150, deadline=None)
@given(QUEUES, st.integers(12, 30))
def test_with_two_executions_for_each_queue_none_is_ever_disabled(
    queues: Sequence[Queue], room: int
) -> None:
    for run in range(20):
        play(queues, room, run)

        assert all(each.enabled for each in queues)


@settings(max_examples=150, deadline=None)
@given(QUEUES, st.integers(sum(WANTS.values()), 1_000))
def test_with_room_for_all_every_mapping_gets_what_it_wants(
    queues: Sequence[Queue], room: int
) -> None:
    play(queues, room, 0)

    assert [each.want for each in queues] == [each.present for each in queues]


@settings(max_examples=150, deadline=None)
@given(QUEUES, ROOMS)
def test_the_room_is_used_when_enough_is_wanted(queues: Sequence[Queue], room: int) -> None:
    for each in queues:
        each.is_fed = False
    for run in range(3):
        play(queues, room, run)

    used = sum(each.present for each in queues if each.enabled)
    wanted = sum(each.want for each in queues)
    # Where not all have room each has two, and an odd execution is left to the API.
    assert (min(room, wanted) if room >= LEAST * len(queues) else room // LEAST * LEAST) == used
