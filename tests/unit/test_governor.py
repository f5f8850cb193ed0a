"""The governor from run to run: what it changes, what it leaves alone, and what it says."""

from dataclasses import replace

import pytest

from sluice.domain.errors import StoreBusy
from sluice.domain.limits import Group, Seen
from sluice.governor import DAY_MS, OLD_DAYS, RUN_MS, Governor
from sluice.settings import Settings, SettingsError
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
        self.governor = Governor(
            self.mapping,
            self.limits,
            self.queue,
            self.notes,
            self.pool,
            20,
            self.clock,
            self.events,
        )
        self.know(self.group())

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
    assert "concurrency changed" == event
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


# Its settings ----------------------------------------------------------------------------------------------


def test_the_governors_settings_are_its_own() -> None:
    more = {"SLUICE_WORKER_MAPPING": "a-uuid", "SLUICE_MAX_CONCURRENCY": "20"}

    assert ("a-uuid", 20) == Settings.from_environment(COMPLETE | more).governed()


@pytest.mark.parametrize("name", ["SLUICE_WORKER_MAPPING", "SLUICE_MAX_CONCURRENCY"])
def test_another_function_does_without_them(name: str) -> None:
    more = {"SLUICE_WORKER_MAPPING": "a-uuid", "SLUICE_MAX_CONCURRENCY": "20"}
    settings = Settings.from_environment(COMPLETE | more | {name: ""})

    with pytest.raises(SettingsError, match=f"{name}.* set"):
        settings.governed()


def test_a_ceiling_that_is_no_number_is_named() -> None:
    with pytest.raises(SettingsError, match="SLUICE_MAX_CONCURRENCY must be a whole number"):
        Settings.from_environment(COMPLETE | {"SLUICE_MAX_CONCURRENCY": "many"})
