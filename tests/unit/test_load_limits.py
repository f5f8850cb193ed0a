"""Limits from the Rate Limits API: known before the first call, never against what answers say."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from sluice.domain.errors import KeyPoolBroken, StoreBusy
from sluice.domain.keys import AdminKey
from sluice.domain.limits import TOKENS_PER_DAY, KnownLimits, new_group
from sluice.upkeep.load_limits import EVERY_MS, LoadLimits
from tests.fakes import NOON, FrozenClock, MemoryLimits, RecordingEvents, known_group

GROUPS = {"claude-a": "a", "claude-a-2": "a", "claude-b": "b", "claude-c": "c"}
LIMITS = (("requests", 1_200), ("input_tokens", 600_000), ("output_tokens", 60_000))


class Pool:
    """Admin keys, one for each organization."""

    def __init__(self, *organizations: str) -> None:
        self.organizations = organizations
        self.error: KeyPoolBroken | StoreBusy | None = None

    def admin_keys(self) -> Sequence[AdminKey]:
        if self.error is not None:
            raise self.error
        return [AdminKey(name, f"sk-ant-test-{name}") for name in self.organizations]


class Upstream:
    """The Rate Limits API of several organizations."""

    def __init__(self) -> None:
        self.known: dict[str, list[KnownLimits] | KeyPoolBroken | StoreBusy] = {}
        self.asked = 0

    def load(self, key: AdminKey) -> Sequence[KnownLimits]:
        self.asked += 1
        known = self.known.get(key.organization, [])
        if isinstance(known, list):
            return known
        raise known


class Scene:
    def __init__(self, *organizations: str) -> None:
        self.pool = Pool(*(organizations or ("org",)))
        self.upstream = Upstream()
        self.limits = MemoryLimits()
        self.clock = FrozenClock()
        self.events = RecordingEvents()
        self.load = LoadLimits(
            self.pool, self.upstream, self.limits, GROUPS, self.clock, self.events
        )

    def says(self, *models: str, organization: str = "org", limits: object = LIMITS) -> None:
        known = self.upstream.known.setdefault(organization, [])
        assert isinstance(known, list)
        known.append(KnownLimits(models, limits))  # type: ignore[arg-type]


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_group_is_known_before_its_first_call(scene: Scene) -> None:
    scene.says("claude-a", "claude-a-2", limits=(*LIMITS, (TOKENS_PER_DAY, 10_000_000)))

    scene.load()

    group = scene.limits.stored["org/a"]
    assert (1_200, 600_000, 60_000) == (
        group.requests.limit,
        group.input_tokens.limit,
        group.output_tokens.limit,
    )
    assert group.day is not None
    assert 10_000_000 == group.day.limit
    assert ["limits loaded"] == [event for event, _ in scene.events.notes]


def test_what_an_answer_has_taught_is_left_alone(scene: Scene) -> None:
    scene.limits.stored["org/a"] = replace(known_group(), version=7)
    scene.says("claude-a")

    scene.load()

    assert replace(known_group(), version=7) == scene.limits.stored["org/a"]
    assert [] == scene.events.notes


def test_limits_are_loaded_once_an_hour(scene: Scene) -> None:
    scene.says("claude-a")
    scene.load()
    scene.clock.at = NOON + EVERY_MS - 1
    scene.load()
    assert 1 == scene.upstream.asked

    scene.clock.at = NOON + EVERY_MS
    scene.load()

    assert 2 == scene.upstream.asked


def test_models_that_share_a_bucket_upstream_share_one_here(scene: Scene) -> None:
    """A new model is in no release of ours, but in the list that upstream gives."""
    scene.says("claude-a", "claude-a-2", "claude-a-3")

    scene.load()
    scene.clock.at += EVERY_MS
    scene.load()

    assert {"claude-a-3": "a"} == scene.limits.models().groups()
    assert {"org/a"} == set(scene.limits.stored)
    assert 1 == scene.limits.journal.count("the limits table: replace_models")


def test_a_model_that_upstream_lists_is_known_under_its_own_name(scene: Scene) -> None:
    scene.says("claude-new-20270101")

    scene.load()

    assert {"claude-new": "claude-new"} == scene.limits.models().groups()
    assert {"org/claude-new"} == set(scene.limits.stored)


def test_models_of_one_group_each_are_left_as_they_are(scene: Scene) -> None:
    scene.says("claude-a", "claude-a-2")
    scene.says("claude-b")

    scene.load()

    assert {} == scene.limits.models().groups()
    assert {"org/a", "org/b"} == set(scene.limits.stored)


@pytest.mark.parametrize("error", [KeyPoolBroken("answered 401"), StoreBusy("the Rate Limits API")])
def test_one_organization_that_cannot_be_asked_keeps_no_other_from_it(
    error: KeyPoolBroken | StoreBusy,
) -> None:
    scene = Scene("first", "second")
    scene.upstream.known["first"] = error
    scene.says("claude-a", organization="second")

    scene.load()

    assert {"second/a"} == set(scene.limits.stored)
    ((event, facts),) = scene.events.problems
    assert ("limits not loaded", "first") == (event, facts["organization"])


@pytest.mark.parametrize("error", [KeyPoolBroken("not JSON"), StoreBusy("Secrets Manager")])
def test_a_pool_that_cannot_be_read_is_reported(
    scene: Scene, error: KeyPoolBroken | StoreBusy
) -> None:
    scene.pool.error = error

    scene.load()

    assert ["key pool not readable"] == scene.events.problem_names


def test_a_concurrent_change_of_the_group_is_kept(scene: Scene) -> None:
    scene.says("claude-a")
    taught = replace(new_group("org", "a", NOON), version=3, call_ms=77)

    def load(_: object) -> dict[str, object]:
        scene.limits.stored["org/a"] = taught
        return {}

    scene.limits.load = load  # type: ignore[assignment,method-assign]

    scene.load()

    group = scene.limits.stored["org/a"]
    assert (4, 77, 1_200) == (group.version, group.call_ms, group.requests.limit)


def test_a_concurrently_deleted_group_is_left_to_the_next_hour(scene: Scene) -> None:
    scene.says("claude-a")
    old = replace(new_group("org", "a", NOON), version=3)
    scene.limits.load = lambda _: {"org/a": old}  # type: ignore[assignment,method-assign]

    scene.load()

    assert {} == scene.limits.stored


def test_a_table_that_is_busy_is_reported(scene: Scene) -> None:
    scene.says("claude-a")
    scene.limits.break_down("replace")

    scene.load()

    assert ["store busy"] == scene.events.problem_names
