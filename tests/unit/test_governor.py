"""The governor from run to run: what it changes, what it leaves alone, and what it says."""

from dataclasses import replace

import pytest

from sluice.desk import AT_ONCE
from sluice.domain.capacity import UNREFILLED, Backlog
from sluice.domain.errors import StoreBusy
from sluice.domain.limits import Group, Seen
from sluice.governor import DAY_MS, OLD_DAYS, RUN_MS, Governed, Governor
from sluice.settings import MappingSettings, Settings, SettingsError
from tests.fakes import (
    MINUTE,
    NOON,
    ROOMY,
    SECOND,
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
        self.events = RecordingEvents()
        jobs = Governed("jobs", self.mapping, self.queue.backlog, self.notes, 20)
        self.governor = self.governor_of(jobs)
        self.know(self.group())

    def governor_of(self, *governed: Governed) -> Governor:
        return Governor(governed, self.limits, self.pool, self.clock, self.events)

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
    scene.mapping.stored = replace(scene.mapping.stored, settled=False)

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
    scene.queue.delete(scene.queue.hand_over(1))  # parked
    scene.clock.at += MINUTE
    scene.governor()
    assert (2, False) == scene.stands()
    scene.queue.post(job_id="job_2")
    scene.clock.at += MINUTE

    scene.governor()

    assert (2, True) == scene.stands()
    assert scene.notes.at is None


def test_the_note_stands_before_the_mapping_is_off(scene: Scene) -> None:
    """Else a governor that dies in between leaves a mapping that looks switched off by hand."""
    scene.block(NOON + 60 * MINUTE)
    scene.mapping.fail_next("set")

    with pytest.raises(StoreBusy):
        scene.governor()

    assert NOON == scene.notes.at
    assert scene.mapping.stored.enabled


def test_a_note_of_a_switch_that_was_never_made_is_forgotten(scene: Scene) -> None:
    scene.notes.at = NOON - MINUTE

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
    ("age_ms", "told"),
    [
        (OLD_DAYS * DAY_MS - 1, 0),
        (OLD_DAYS * DAY_MS, 1),
        (OLD_DAYS * DAY_MS + RUN_MS - 1, 1),
        (OLD_DAYS * DAY_MS + RUN_MS, 0),  # said a minute ago
        ((OLD_DAYS + 1) * DAY_MS + 5, 1),
    ],
)
def test_old_keys_are_told_once_a_day(age_ms: int, told: int) -> None:
    scene = Scene(pool_at=NOON - age_ms)

    scene.governor()

    assert told == scene.events.counted("OldKeys")
    assert told == len(scene.events.problems)
    if told:
        assert ("upstream keys are old", {"days": age_ms // DAY_MS}) == scene.events.problems[0]


def test_workers_do_not_wait_for_the_age_of_keys(scene: Scene) -> None:
    scene.pool.break_down("changed_at")

    scene.governor()

    assert (4, True) == scene.stands()
    assert ["store busy"] == scene.events.problem_names


# Two mappings ----------------------------------------------------------------------------------------------


class Pair(Scene):
    """The same with ranges beside the jobs: the limit group keeps four workers of either kind busy."""

    def __init__(self, pool_at: int | None = NOON - DAY_MS) -> None:
        super().__init__(pool_at)
        self.ranges = MemoryMapping(concurrency=8, slots=AT_ONCE, busy=UNREFILLED)
        self.ranges_waiting = Backlog()
        self.ranges_notes = MemoryGovernorNotes()
        self.governor = self.governor_of(
            Governed("jobs", self.mapping, self.queue.backlog, self.notes, 20),
            Governed("ranges", self.ranges, lambda: self.ranges_waiting, self.ranges_notes, 6),
        )

    def both_stand(self) -> tuple[tuple[int | None, bool], tuple[int | None, bool]]:
        ranges = self.ranges.stored
        return self.stands(), (ranges.maximum_concurrency, ranges.enabled)

    def told(self) -> list[tuple[object, object, object]]:
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
    assert [("jobs", 10, 6), ("ranges", 8, 6)] == pair.told()
    jobs, ranges = (facts for _, facts in pair.events.notes)
    assert (1, 0, 3, 2) == (
        jobs["waiting"],
        jobs["in_flight"],
        ranges["waiting"],
        ranges["in_flight"],
    )
    assert "6 workers of 50 slots" in str(jobs["reason"])
    assert "7 workers of 64 slots" in str(ranges["reason"])


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
    assert ["jobs", "jobs"] == [mapping for mapping, _, _ in pair.told()]
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
    pair.notes.break_down("turned_off_at")

    with pytest.raises(StoreBusy):
        pair.governor()

    assert ((10, True), (4, True)) == pair.both_stand()


def test_a_mapping_that_is_still_changing_holds_up_no_other(pair: Pair) -> None:
    pair.mapping.stored = replace(pair.mapping.stored, settled=False)

    pair.governor()

    assert ((10, True), (4, True)) == pair.both_stand()


def test_old_keys_are_told_once_for_both() -> None:
    pair = Pair(pool_at=NOON - OLD_DAYS * DAY_MS)

    pair.governor()

    assert 1 == pair.events.counted("OldKeys")


# Its settings ----------------------------------------------------------------------------------------------


GOVERNED = {
    "SLUICE_WORKER_MAPPING": "a-uuid",
    "SLUICE_MAX_CONCURRENCY": "20",
    "SLUICE_RANGES_MAPPING": "another-uuid",
    "SLUICE_BULK_CONCURRENCY": "6",
}


def test_the_governors_settings_are_its_own() -> None:
    settings = Settings.from_environment(COMPLETE | GOVERNED)

    assert (
        MappingSettings("a-uuid", 20),
        MappingSettings("another-uuid", 6),
    ) == settings.governed()


@pytest.mark.parametrize("name", GOVERNED)
def test_another_function_does_without_them(name: str) -> None:
    settings = Settings.from_environment(COMPLETE | GOVERNED | {name: ""})

    with pytest.raises(SettingsError, match=f"{name}.* set"):
        settings.governed()


@pytest.mark.parametrize("name", ["SLUICE_MAX_CONCURRENCY", "SLUICE_BULK_CONCURRENCY"])
def test_a_ceiling_that_is_no_number_is_named(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} must be a whole number"):
        Settings.from_environment(COMPLETE | GOVERNED | {name: "many"})
