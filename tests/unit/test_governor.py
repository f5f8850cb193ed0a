"""The governor from run to run: what it changes, what it leaves alone, and what it says."""

import json
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice.domain.capacity import ROWS_AT_ONCE, UNREFILLED, Backlog
from sluice.domain.errors import StoreBusy
from sluice.domain.limits import Group, Seen
from sluice.domain.shares import APPLIED_MS, CEILINGS, RESERVED, TURN_MS, Note, room_of
from sluice.settings import MAPPINGS, GovernorSettings, Settings, SettingsError
from sluice.upkeep.governor import DAY_MS, OLD_DAYS, Governed, Governor
from sluice.upkeep.schedule import RUN_MS
from tests.fakes import (
    MINUTE,
    NOON,
    ROOMY,
    SECOND,
    AccountLimit,
    FrozenClock,
    MemoryGovernorNotes,
    MemoryLimits,
    MemoryMapping,
    MemoryQueue,
    PoolWritten,
    RecordingEvents,
    known_group,
)
from tests.unit.test_settings import COMPLETE


class Scene:
    """A deployment with one limit group that keeps four workers busy."""

    def __init__(self, pool_at: int | None = NOON - DAY_MS) -> None:
        self.clock = FrozenClock()
        self.mapping = MemoryMapping()
        self.limits = MemoryLimits()
        self.queue = MemoryQueue(self.clock.now)
        self.notes = MemoryGovernorNotes()
        self.pool = PoolWritten(pool_at)
        self.account = AccountLimit()
        self.events = RecordingEvents()
        jobs = Governed("jobs", self.mapping, self.queue.backlog, self.notes, 20)
        self.governor = self.governor_of(jobs)
        self.know(self.group())

    def governor_of(self, *governed: Governed) -> Governor:
        return Governor(governed, self.limits, self.pool, self.account, self.clock, self.events)

    def group(self, **facts: object) -> Group:
        seen = {**ROOMY, "requests": Seen(600, 10)}
        known = replace(known_group(seen=seen), call_ms=7_500, last_start=self.clock.at)
        return replace(known, **facts)  # type: ignore[arg-type]

    def know(self, group: Group) -> None:
        self.limits.stored[group.id] = group

    def block(self, until: int) -> None:
        self.know(self.group(blocked_until=until, last_start=until))

    def stands(self) -> tuple[int | None, bool]:
        return self.mapping.stored.maximum_concurrency, self.mapping.stored.enabled


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_it_gives_the_mapping_what_the_limits_need_and_says_why(scene: Scene) -> None:
    scene.queue.post(job_id="job_1")

    scene.governor()

    ((event, facts),) = scene.events.notes
    assert (4, True) == scene.stands()
    assert ("concurrency changed", "jobs") == (event, facts["mapping"])
    assert (10, 4) == (facts["from"], facts["to"])
    assert "keep 75 calls in flight" in str(facts["reason"])
    assert (1, 0) == (facts["waiting"], facts["in_flight"])
    assert {"org/a": {"starts_per_minute": 600, "call_ms": 7_500, "blocked_seconds": 0}} == facts[
        "groups"
    ]


def test_what_is_right_is_left_alone_and_not_spoken_of(scene: Scene) -> None:
    scene.governor()
    scene.events.notes.clear()
    scene.mapping.journal.clear()

    scene.governor()

    assert [] == scene.events.notes
    assert ["the worker's mapping: state"] == scene.mapping.journal


def test_never_more_than_the_ceiling(scene: Scene) -> None:
    scene.know(scene.group(call_ms=60_000))

    scene.governor()

    assert (20, True) == scene.stands()


def test_a_mapping_that_is_still_changing_is_left_alone(scene: Scene) -> None:
    scene.mapping.stored = replace(scene.mapping.stored, is_applied=False)

    scene.governor()

    assert (10, True) == scene.stands()
    assert [] == scene.events.notes


def test_a_change_that_is_refused_is_made_the_next_time(scene: Scene) -> None:
    scene.mapping.busy = 1

    scene.governor()
    assert ((10, True), []) == (scene.stands(), scene.events.notes)
    scene.governor()

    assert (4, True) == scene.stands()
    assert 1 == len(scene.events.notes)


def test_a_long_outage_switches_off_and_on_again_in_time(scene: Scene) -> None:
    scene.block(NOON + 60 * MINUTE)

    scene.governor()
    assert (2, False) == scene.stands()
    assert (10, 0) == (scene.events.notes[0][1]["from"], scene.events.notes[0][1]["to"])
    scene.clock.at = NOON + 58 * MINUTE
    scene.governor()
    assert (2, False) == scene.stands()
    scene.clock.at = NOON + 59 * MINUTE
    scene.governor()

    assert scene.mapping.stored.enabled
    assert scene.notes.at is None
    assert 0 == scene.events.notes[1][1]["from"]


def test_no_job_is_left_in_the_queue_of_a_mapping_that_is_off(scene: Scene) -> None:
    scene.block(NOON + 60 * MINUTE)
    scene.queue.post(job_id="job_1")
    scene.governor()
    assert (2, True) == scene.stands()
    scene.queue.delete(scene.queue.deliver(1))  # parked
    scene.clock.at += MINUTE
    scene.governor()
    assert (2, False) == scene.stands()
    scene.queue.post(job_id="job_2")
    scene.clock.at += MINUTE

    scene.governor()

    assert (2, True) == scene.stands()
    assert scene.notes.at is None


def test_the_note_is_stored_before_the_mapping_is_disabled(scene: Scene) -> None:
    """Else a governor that dies in between leaves a mapping that looks switched off by hand."""
    scene.block(NOON + 60 * MINUTE)
    scene.mapping.fail_next("set")

    with pytest.raises(StoreBusy):
        scene.governor()

    assert NOON == scene.notes.at
    assert scene.mapping.stored.enabled


def test_a_note_of_a_switch_that_was_never_made_is_forgotten(scene: Scene) -> None:
    scene.notes.note = Note(turned_off_at=NOON - MINUTE)

    scene.governor()

    assert scene.notes.at is None


def test_on_again_is_only_forgotten_when_it_is_done(scene: Scene) -> None:
    scene.block(NOON + 60 * MINUTE)
    scene.governor()
    scene.clock.at += 60 * MINUTE
    scene.mapping.busy = 1

    scene.governor()
    assert (NOON, False) == (scene.notes.at, scene.mapping.stored.enabled)
    scene.governor()

    assert (None, True) == (scene.notes.at, scene.mapping.stored.enabled)


def test_what_a_person_switched_off_stays_off(scene: Scene) -> None:
    scene.mapping.stored = replace(scene.mapping.stored, enabled=False)

    scene.governor()

    assert (10, False) == scene.stands()
    assert [] == scene.events.notes


def test_a_new_key_is_tried_though_all_known_groups_are_blocked(scene: Scene) -> None:
    scene.block(NOON + 60 * MINUTE)
    scene.governor()
    scene.clock.at += MINUTE
    scene.pool.at = scene.clock.at - SECOND

    scene.governor()

    assert (2, True) == scene.stands()


@pytest.mark.parametrize(
    ("age_ms", "reported"),
    [
        (OLD_DAYS * DAY_MS - 1, 0),
        (OLD_DAYS * DAY_MS, 1),
        (OLD_DAYS * DAY_MS + RUN_MS - 1, 1),
        (OLD_DAYS * DAY_MS + RUN_MS, 0),  # said a minute ago
        ((OLD_DAYS + 1) * DAY_MS + 5, 1),
    ],
)
def test_old_keys_are_reported_once_a_day(age_ms: int, reported: int) -> None:
    scene = Scene(pool_at=NOON - age_ms)

    scene.governor()

    assert reported == scene.events.counted("OldKeys")
    assert reported == len(scene.events.problems)
    if reported:
        assert ("upstream keys are old", {"days": age_ms // DAY_MS}) == scene.events.problems[0]


def test_workers_do_not_wait_for_the_age_of_keys(scene: Scene) -> None:
    scene.pool.break_down("changed_at")

    scene.governor()

    assert (4, True) == scene.stands()
    assert ["store busy"] == scene.events.problem_names


# Two mappings ----------------------------------------------------------------------------------------------


class Pair(Scene):
    """The same with ranges besides the jobs: the limit group keeps four workers of either kind busy."""

    def __init__(self, pool_at: int | None = NOON - DAY_MS) -> None:
        super().__init__(pool_at)
        self.ranges = MemoryMapping(concurrency=8, slots=ROWS_AT_ONCE, busy=UNREFILLED)
        self.ranges_waiting = Backlog()
        self.ranges_notes = MemoryGovernorNotes()
        self.governor = self.governor_of(
            Governed("jobs", self.mapping, self.queue.backlog, self.notes, 20),
            Governed("ranges", self.ranges, lambda: self.ranges_waiting, self.ranges_notes, 6),
        )

    def both_stand(self) -> tuple[tuple[int | None, bool], tuple[int | None, bool]]:
        ranges = self.ranges.stored
        return self.stands(), (ranges.maximum_concurrency, ranges.enabled)

    def reported(self) -> list[tuple[object, object, object]]:
        return [(facts["mapping"], facts["from"], facts["to"]) for _, facts in self.events.notes]


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_each_mapping_gets_what_the_whole_limit_needs_and_a_line_of_its_own(pair: Pair) -> None:
    pair.know(pair.group(call_ms=15_000))
    pair.queue.post(job_id="job_1")
    pair.ranges_waiting = Backlog(visible=3, in_flight=2)

    pair.governor()

    # 150 calls in flight: five workers with 30 each, or six with 26, and one in reserve.
    assert ((6, True), (6, True)) == pair.both_stand()
    assert [("jobs", 10, 6), ("ranges", 8, 6)] == pair.reported()
    jobs, ranges = (facts for _, facts in pair.events.notes)
    assert (1, 0, 3, 2) == (
        jobs["waiting"],
        jobs["in_flight"],
        ranges["waiting"],
        ranges["in_flight"],
    )
    assert "6 workers of 50 slots" in str(jobs["reason"])
    assert "7 workers of 120 slots" in str(ranges["reason"])


def test_each_mapping_is_off_while_its_own_queue_is_empty(pair: Pair) -> None:
    pair.block(NOON + 60 * MINUTE)
    pair.ranges_waiting = Backlog(in_flight=1)

    pair.governor()
    assert ((2, False), (2, True)) == pair.both_stand()
    assert (NOON, None) == (pair.notes.at, pair.ranges_notes.at)
    pair.queue.post(job_id="job_1")
    pair.ranges_waiting = Backlog()
    pair.clock.at += MINUTE
    pair.governor()
    assert ((2, True), (2, False)) == pair.both_stand()
    assert (None, NOON + MINUTE) == (pair.notes.at, pair.ranges_notes.at)
    pair.clock.at = NOON + 59 * MINUTE

    pair.governor()

    assert pair.mapping.stored.enabled
    assert pair.ranges.stored.enabled
    assert pair.ranges_notes.at is None


def test_one_mapping_switched_off_by_hand_stays_off_beside_one_the_governor_switched(
    pair: Pair,
) -> None:
    pair.block(NOON + 60 * MINUTE)
    pair.ranges.stored = replace(pair.ranges.stored, enabled=False)
    pair.governor()
    assert ((2, False), (8, False)) == pair.both_stand()
    pair.clock.at += 60 * MINUTE

    pair.governor()

    assert ((4, True), (8, False)) == pair.both_stand()
    assert ["jobs", "jobs"] == [mapping for mapping, _, _ in pair.reported()]
    assert pair.ranges_notes.at is None


@pytest.mark.parametrize("verb", ["state", "set"])
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["jobs"], ((10, True), (4, True))),
        (["ranges"], ((4, True), (8, True))),
        (["jobs", "ranges"], ((10, True), (8, True))),
    ],
)
def test_a_mapping_that_fails_keeps_no_other_from_being_governed(
    pair: Pair, verb: str, names: list[str], expected: object
) -> None:
    for name in names:
        {"jobs": pair.mapping, "ranges": pair.ranges}[name].break_down(verb)

    with pytest.raises(StoreBusy):
        pair.governor()

    assert expected == pair.both_stand()
    assert [("mapping not governed", {"mapping": each}) for each in names] == pair.events.problems


def test_a_note_that_cannot_be_read_keeps_only_its_own_mapping(pair: Pair) -> None:
    pair.notes.break_down("read")

    with pytest.raises(StoreBusy):
        pair.governor()

    assert ((10, True), (4, True)) == pair.both_stand()


def test_a_mapping_that_is_still_changing_holds_up_no_other(pair: Pair) -> None:
    pair.mapping.stored = replace(pair.mapping.stored, is_applied=False)

    pair.governor()

    assert ((10, True), (4, True)) == pair.both_stand()


def test_old_keys_are_reported_once_for_both() -> None:
    pair = Pair(pool_at=NOON - OLD_DAYS * DAY_MS)

    pair.governor()

    assert 1 == pair.events.counted("OldKeys")


# An account with few executions ----------------------------------------------------------------------------


class Six(Scene):
    """A whole deployment, as it is right after its deployment, in an account of ten executions."""

    def __init__(self, executions: int = 10) -> None:
        super().__init__()
        self.account.executions = executions
        self.depths = dict.fromkeys(MAPPINGS, Backlog())
        self.mappings = {name: MemoryMapping(concurrency=2) for name in MAPPINGS}
        self.every_note = {name: MemoryGovernorNotes() for name in MAPPINGS}
        ceilings = {"jobs": 10, "ranges": 4, **CEILINGS}
        self.governor = self.governor_of(
            *[
                Governed(
                    name,
                    self.mappings[name],
                    partial(self.depths.__getitem__, name),
                    self.every_note[name],
                    ceilings[name],
                    timeout_ms=MINUTE if name == "webhooks" else 15 * MINUTE,
                    calls_claude=name in {"jobs", "ranges"},
                    refills=name == "jobs",
                )
                for name in MAPPINGS
            ]
        )
        self.know(self.group(call_ms=60_000))

    def wait(self, *names: str) -> None:
        """Let messages wait in these queues, and the others be empty."""
        for name in MAPPINGS:
            self.depths[name] = Backlog(visible=9) if name in names else Backlog()

    def run(self, times: int = 1) -> dict[str, int | None]:
        """Let the governor run, once a minute; return what it has enabled."""
        for _ in range(times):
            self.clock.at += MINUTE
            self.governor()
        return self.enabled()

    def break_for_one_run(self, name: str, fault: str) -> None:
        """Let something about one mapping fail until it is fixed."""
        mapping, notes = self.mappings[name], self.every_note[name]
        match fault:
            case "busy":
                mapping.busy = 1
            case "unsettled":
                mapping.stored = replace(mapping.stored, is_applied=False)
            case "state" | "set":
                mapping.break_down(fault)
            case _:
                notes.break_down(fault)

    def recover(self) -> None:
        for name, mapping in self.mappings.items():
            mapping.recover()
            mapping.busy = 0
            mapping.stored = replace(mapping.stored, is_applied=True)
            self.every_note[name].recover()

    def enabled(self) -> dict[str, int | None]:
        return {
            name: each.stored.maximum_concurrency
            for name, each in self.mappings.items()
            if each.stored.enabled
        }

    def reasons(self) -> dict[object, str]:
        """Why each mapping was changed last."""
        return {facts["mapping"]: str(facts["reason"]) for _, facts in self.events.notes}


def test_in_an_account_of_a_thousand_a_fresh_deployment_gets_its_ceilings_and_nothing_is_disabled() -> (
    None
):
    six = Six(1_000)

    assert {"jobs": 10, "ranges": 4, **CEILINGS} == six.run()
    assert [None] * 6 == [each.at for each in six.every_note.values()]


def test_where_there_is_room_for_all_the_depth_of_a_queue_that_calls_no_claude_is_not_asked_for() -> (
    None
):
    six = Six(1_000)
    del six.depths["webhooks"]

    six.run()

    assert [] == six.events.problems


def test_of_ten_executions_six_are_given_out_and_idle_mappings_are_disabled_with_a_reason() -> None:
    six = Six()

    assert {"jobs": 2, "ranges": 2, "batches": 2} == six.run()
    # Two for each of three.
    assert 10 - RESERVED == sum(six.enabled().values())  # type: ignore[arg-type]
    off = six.reasons()["webhooks"]
    assert off.endswith("the account limit has room for 3 queues at a time")
    assert 6 == six.events.notes[0][1]["executions_for_queues"]
    assert six.every_note["webhooks"].at == six.clock.at
    six.events.notes.clear()
    assert {"jobs": 2, "ranges": 2, "batches": 2} == six.run(5)
    assert [] == six.events.notes


def test_a_disabled_mapping_is_enabled_in_the_run_that_sees_a_message() -> None:
    six = Six()
    six.run()
    six.wait("jobs", "webhooks")

    assert {"jobs": 2, "ranges": 2, "webhooks": 2} == six.run()
    assert six.every_note["webhooks"].at is None
    assert "messages wait in its queue" in six.reasons()["webhooks"]
    assert "messages wait for webhooks" in six.reasons()["batches"]


def test_what_a_person_switched_off_stays_off_in_a_small_account_and_its_room_is_the_others() -> (
    None
):
    six = Six()
    jobs = six.mappings["jobs"]
    jobs.stored = replace(jobs.stored, enabled=False)
    six.wait(*MAPPINGS)

    for _ in range(10):
        assert "jobs" not in six.run()
    assert six.every_note["jobs"].at is None


def test_six_queues_with_messages_all_have_their_turn_within_minutes() -> None:
    six = Six()
    six.run()
    six.wait(*MAPPINGS)
    served: set[str] = set()

    for _ in range(10):
        served |= six.run().keys()
        assert sum(six.enabled().values()) <= 7  # type: ignore[arg-type]
        assert "jobs" in six.enabled()

    assert set(MAPPINGS) == served


def test_the_room_of_a_mapping_that_still_works_is_given_away_when_it_has_ended() -> None:
    six = Six()
    six.run()
    six.wait("jobs", "ranges", "batches", "webhooks")
    six.depths["batches"] = Backlog(visible=9, in_flight=2)

    assert {"jobs": 2, "ranges": 2} == six.run()
    assert {"jobs": 2, "ranges": 2} == six.run()
    six.wait("jobs", "ranges", "webhooks")
    assert {"jobs": 2, "ranges": 2, "webhooks": 2} == six.run()


def test_messages_that_are_hidden_for_hours_hold_no_room_when_their_invocations_must_have_ended() -> (
    None
):
    six = Six()
    six.run()
    six.wait("jobs", "ranges", "webhooks")
    six.run()
    six.wait("jobs", "ranges", "batches")
    six.depths["webhooks"] = Backlog(in_flight=40)

    assert {"jobs": 2, "ranges": 2} == six.run()
    assert six.every_note["webhooks"].note.left_until == six.clock.at + MINUTE + APPLIED_MS
    assert {"jobs": 2, "ranges": 2} == six.run()
    assert {"jobs": 2, "ranges": 2, "batches": 2} == six.run()


def test_a_turn_lasts_two_runs() -> None:
    six = Six()
    six.run()
    six.wait("jobs", "ranges", "batches", "webhooks")

    seen = ["webhooks" in six.run() for _ in range(6)]

    assert 2 == TURN_MS // RUN_MS
    assert [False, True, True, False, False, True] == seen


def test_a_refused_change_keeps_its_executions_and_no_other_mapping_gets_them() -> None:
    six = Six()
    six.run()
    six.wait("jobs", "webhooks")
    six.mappings["batches"].busy = 1

    assert {"jobs": 2, "ranges": 2, "batches": 2} == six.run()
    assert {"jobs": 2, "ranges": 2, "webhooks": 2} == six.run()


def test_a_change_that_takes_hold_counts_as_it_is() -> None:
    six = Six()
    six.run()
    batches = six.mappings["batches"]
    batches.stored = replace(batches.stored, is_applied=False)
    six.mappings["ranges"].stored = replace(six.mappings["ranges"].stored, is_applied=False)
    six.wait("webhooks")

    assert {"ranges": 2, "batches": 2, "webhooks": 2} == six.run()


def test_a_mapping_that_cannot_be_read_may_be_using_all_it_may_have() -> None:
    six = Six()
    six.run()
    six.wait("jobs", "ranges", "batches", "webhooks")
    six.mappings["jobs"].fail_next("state")

    with pytest.raises(StoreBusy):
        six.run()

    assert {"jobs": 2, "ranges": 2} == six.enabled()
    assert [("mapping not governed", {"mapping": "jobs"})] == six.events.problems


def test_without_the_accounts_limit_nothing_is_raised_and_the_run_fails() -> None:
    six = Six(1_000)
    six.account.break_down("at_once")

    with pytest.raises(StoreBusy):
        six.run()
    assert dict.fromkeys(MAPPINGS, 2) == six.enabled()
    assert ["account limit not read"] == six.events.problem_names
    six.account.recover()

    assert {"jobs": 10, "ranges": 4, **CEILINGS} == six.run()


def test_a_raised_limit_is_used_in_the_run_that_sees_it() -> None:
    six = Six()
    six.run()
    six.account.executions = 1_000

    assert {"jobs": 10, "ranges": 4, **CEILINGS} == six.run()
    assert [None] * 6 == [each.at for each in six.every_note.values()]


def test_workers_that_were_started_before_the_limit_was_known_hold_their_room() -> None:
    """Ten workers may run for a quarter of an hour, so that no other mapping may be enabled."""
    six = Six()
    jobs = six.mappings["jobs"]
    jobs.stored = replace(jobs.stored, maximum_concurrency=10)
    for name in ("ranges", "webhooks"):
        six.every_note[name].note = Note(turned_off_at=NOON)
        six.mappings[name].stored = replace(six.mappings[name].stored, enabled=False)
    six.wait("jobs", "ranges", "webhooks")
    six.depths["jobs"] = Backlog(visible=900, in_flight=1_200)

    for _ in range(16):
        assert {"jobs": 2} == {"jobs": six.run()["jobs"]}
        assert {"ranges", "webhooks"}.isdisjoint(six.enabled())
    assert {"ranges", "webhooks"} <= six.run(2).keys()


FAULTS = st.tuples(
    st.sampled_from(MAPPINGS),
    st.sampled_from(["state", "set", "read", "write", "busy", "unsettled"]),
)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([5, 8, 10, 13, 20]),
    st.lists(st.tuples(st.sets(st.sampled_from(MAPPINGS)), st.lists(FAULTS, max_size=3)), max_size=15),
    st.sets(st.sampled_from(MAPPINGS)),
)  # fmt: skip
def test_whatever_fails_no_mapping_is_lost_and_in_peace_every_queue_is_served(
    executions: int, runs: list[tuple[set[str], list[tuple[str, str]]]], waiting: set[str]
) -> None:
    """A mapping that is off without a note would count as switched off by hand, and stay off for good."""
    six = Six(executions)
    six.run()
    for names, faults in runs:
        six.wait(*names)
        for name, fault in faults:
            six.break_for_one_run(name, fault)
        with suppress(StoreBusy):
            six.run()
        six.recover()

        assert sum(six.enabled().values()) <= room_of(executions)  # type: ignore[arg-type]
        for name, each in six.mappings.items():
            assert each.stored.enabled or six.every_note[name].at is not None
    six.wait(*waiting)
    served: set[str] = set()
    for _ in range(len(MAPPINGS) * (TURN_MS // RUN_MS + 2) + 15):
        served |= six.run().keys()

    assert waiting <= served


# Its settings ----------------------------------------------------------------------------------------------


GOVERNED = {
    "SLUICE_MAPPINGS": json.dumps({name: f"uuid of {name}" for name in MAPPINGS}),
    "SLUICE_MAX_CONCURRENCY": "20",
    "SLUICE_BULK_CONCURRENCY": "6",
    "SLUICE_LAMBDA_CONCURRENCY": "0",
    "SLUICE_UPSTREAM_FUNCTION": "upstream",
}


@pytest.mark.parametrize(("executions", "expected"), [("0", None), ("50", 50)])
def test_the_governors_settings_are_its_own(executions: str, expected: int | None) -> None:
    own = GOVERNED | {"SLUICE_LAMBDA_CONCURRENCY": executions}

    found = Settings.from_environment(COMPLETE | own)

    uuids = {name: f"uuid of {name}" for name in MAPPINGS}
    assert GovernorSettings(uuids, 20, 6, expected, "upstream") == found.governed()


@pytest.mark.parametrize("name", GOVERNED)
def test_another_function_does_without_them(name: str) -> None:
    found = Settings.from_environment(COMPLETE | GOVERNED | {name: ""})

    with pytest.raises(SettingsError, match=f"{name}.* set"):
        found.governed()


@pytest.mark.parametrize(
    "name", ["SLUICE_MAX_CONCURRENCY", "SLUICE_BULK_CONCURRENCY", "SLUICE_LAMBDA_CONCURRENCY"]
)
def test_a_number_that_is_none_is_named(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} must be an integer"):
        Settings.from_environment(COMPLETE | GOVERNED | {name: "many"})


@pytest.mark.parametrize(
    "text",
    ["no JSON", "[]", '{"jobs": "a"}', json.dumps(dict.fromkeys(MAPPINGS, ""))],
)
def test_mappings_without_a_uuid_for_each_queue_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"SLUICE_MAPPINGS must be .* for each of jobs, ranges"):
        Settings.from_environment(COMPLETE | GOVERNED | {"SLUICE_MAPPINGS": text})
