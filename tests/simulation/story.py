"""The story of a seed: jobs, keys, limits, machines, and which faults will strike."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final

from sluice.bulk.assemble import END_MS
from sluice.bulk.sections import ENTRIES_AT_ONCE
from sluice.domain.batches import LINES_PER_RANGE, RANGES_PER_SECTION, AskedLane
from sluice.domain.keys import UpstreamKey
from sluice.domain.limits import DIMENSIONS, SCALE, Dimension, Group, new_group
from sluice.intake.submit import Submission
from sluice.worker.memory import BUDGET, Budget
from sluice.worker.range_windows import WINDOW_ROWS
from tests.fakes import MINUTE, SECOND, upstream_key
from tests.simulation.accounts import ORGANIZATION, Home
from tests.simulation.faults import FAULTS, Fault
from tests.simulation.message_batches import LaneFacts

START: Final = int(datetime(2026, 11, 30, 21, tzinfo=UTC).timestamp()) * 1000
"""When every story begins: three hours before the end of a day and a month, when spend caps are lifted."""

MODELS: Final = ("claude-a", "claude-b", "claude-c")

TENANT: Final = "acme"

STATED: Final[Mapping[Dimension, int]] = {
    "requests": 600,
    "input_tokens": 600_000,
    "output_tokens": 600_000,
}

OWN_BYTES: Final = 600
"""Of a story's budget: enough for a request without padding."""

DEEP: Final = 10**9
"""A bucket's capacity that is never full, so that every unit can be counted."""


@dataclass(frozen=True, slots=True)
class Order:
    """One submit of a caller."""

    at_ms: int
    names: Sequence[str]
    model: str = "claude-a"
    fallback_models: tuple[str, ...] = ()
    deadline_ms: int | None = None
    """After the beginning of the story."""
    cancel_after_ms: int | None = None
    tries: int = 4
    try_again_ms: int = 7_000
    max_tokens: int = 100
    padding: int = 0
    """Characters that make its requests large."""
    tenant: str = TENANT
    webhook: str | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """The models it may be answered by, in order."""
        return (self.model, *self.fallback_models)

    @property
    def deadline_at(self) -> int | None:
        """Its deadline in epoch milliseconds."""
        return None if self.deadline_ms is None else START + self.deadline_ms

    def submission(self, name: str) -> Submission:
        """Return one of its jobs."""
        return Submission(
            params={
                "model": self.model,
                "max_tokens": self.max_tokens,
                "messages": [{"role": "user", "content": f"{name} {'x' * self.padding}".strip()}],
            },
            custom_id=name,
            deadline=self.deadline_at,
            fallback_models=self.fallback_models,
            webhook=self.webhook,
        )


@dataclass(frozen=True, slots=True)
class Upload:
    """One file of a tenant, or one create of a Messages batch."""

    at_ms: int
    name: str
    tenant: str
    lines: Sequence[str | bytes]
    """A name is a row with this prompt and `custom_id`; bytes are a line as it is."""
    model: str = "claude-a"
    fallback_models: tuple[str, ...] = ()
    deadline_ms: int | None = None
    cancel_after_ms: int | None = None
    by_api: bool = False
    webhook: str | None = None
    max_tokens: int = 100
    lane: AskedLane | None = None
    anthropic_version: str | None = None
    anthropic_beta: str | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """The models it may be answered by, in order."""
        return (self.model, *self.fallback_models)

    @property
    def deadline_at(self) -> int | None:
        """Its deadline in epoch milliseconds."""
        return None if self.deadline_ms is None else START + self.deadline_ms

    @property
    def names(self) -> list[str]:
        """The names of its rows, each once."""
        return list(dict.fromkeys(line for line in self.lines if isinstance(line, str)))

    def row(self, name: str) -> dict[str, object]:
        """Return a row as a line has it."""
        content = [{"role": "user", "content": name}]
        params = {"model": self.model, "max_tokens": self.max_tokens, "messages": content}
        return {"custom_id": name, "params": params}


@dataclass(frozen=True, slots=True)
class Story:
    """Everything that is known before a story begins."""

    seed: int
    orders: Sequence[Order]
    keys: Sequence[UpstreamKey]
    faults: Sequence[Fault]
    headers: str = "roomy"
    hidden_ms: int | None = None
    """Upstream holds requests to a bucket with so much refill, which no header shows."""
    limits: Mapping[Dimension, int] = field(default_factory=lambda: dict(STATED))
    groups: Sequence[Group] = ()
    """Limit groups that are known already."""
    counted: bool = False
    """Every unit of the limiter's capacity is counted in this story."""
    fleet: int = 3
    batch_size: int = 50
    timeouts_ms: Sequence[int] = (900_000,)
    call_ms: Sequence[int] = (1_000,)
    skew_ms: int = 0
    large_answers: bool = False
    budget: Budget = BUDGET
    """The worker's, for what it holds of requests and answers."""
    sizes_known: bool = True
    """Jobs are recorded with the sizes of their requests; an earlier release did without."""
    calm_at_ms: int = 5 * MINUTE
    patience_ms: int = 150 * MINUTE
    """How long after the last fault everything may take to come right."""
    uploads: Sequence[Upload] = ()
    homes: Mapping[str, Home] = field(default_factory=dict)
    """By key id, where that is not what the pool states."""
    due_share: int = 10_000
    """Due things of one tenant and model that one run of a sweep may read."""
    lines_per_range: int = LINES_PER_RANGE
    ranges_per_section: int = RANGES_PER_SECTION
    cached: bool = False
    """Usage has cached input."""
    answers_any_model: bool = False
    """Upstream is a relay that answers for every model name."""
    window_rows: int = WINDOW_ROWS
    """Rows of a range that are in memory at once."""
    compared_at_once: int = ENTRIES_AT_ONCE
    """`custom_id`s that are compared in one step of the end of a batch."""
    end_ms: int = END_MS
    """How long an invocation starts steps of the end of a batch."""
    lane: LaneFacts | None = None
    """The batch lane, where the story has one."""
    ill: str | None = None
    """The tenant that is in trouble: the others must not wait because of it."""
    ill_file: str = ""
    """The name of a file that counts as the ill tenant's, although it may be the healthy tenant's own."""
    trouble: str = ""
    """Its trouble."""

    def without_the_ill(self) -> Story:
        """Return the same story as the other tenants would have it alone."""
        return replace(
            self,
            orders=[each for each in self.orders if each.tenant != self.ill],
            uploads=[
                each
                for each in self.uploads
                if each.tenant != self.ill and each.name != self.ill_file
            ],
            faults=[each for each in self.faults if each.whose != self.ill],
            ill=None,
        )


def of_single_jobs(seed: int) -> Story:
    """Return a story of one tenant, a few jobs, and any faults."""
    rng = random.Random(f"story {seed}")  # noqa: S311 - chance that can be repeated
    calm_at_ms = rng.choice((1, 2, 4, 8)) * MINUTE
    orders = [_order(rng, number, calm_at_ms) for number in range(rng.randrange(1, 4))]
    # Few kinds of fault at once, often: each then strikes in many states that the others would have hidden.
    kinds = rng.sample(FAULTS, min(len(FAULTS), rng.choice((0, 1, 1, 2, 2, 3, 4, 6))))
    faults = [kind(rng, calm_at_ms) for kind in kinds]
    counted = rng.random() < 0.25
    headers = "none" if counted else rng.choice(("roomy", "true", "true", "none"))
    keys = _keys(rng, stated=headers == "none")
    groups = [_countable(organization, name) for organization in ("org", "other") for name in "abc"]
    rpm = rng.choice((60, 120, 600))
    # What was drawn before there was a budget is drawn as it was.
    sizes = random.Random(f"sizes {seed}")  # noqa: S311 - chance that can be repeated
    if sizes.random() < 0.5:
        orders = [replace(order, padding=sizes.choice((0, 300, 900, 2_000))) for order in orders]
    return Story(
        seed=seed,
        orders=orders,
        keys=keys,
        faults=faults,
        headers=headers,
        limits={
            "requests": rpm,
            "input_tokens": 30_000,
            "output_tokens": rng.choice((3_000, 60_000)),
        },
        groups=groups if counted else (),
        counted=counted,
        fleet=rng.choice((2, 2, 3, 5)),
        batch_size=rng.choice((1, 3, 50)),
        timeouts_ms=rng.choice(((900_000,), (900_000, 120_000), (60_000, 30_000))),
        call_ms=rng.choice(((300, 2_000), (1_000, 20_000), (500, 90_000), (2_000, 200_000))),
        skew_ms=rng.choice((0, 0, 500, 3 * SECOND)),
        large_answers=rng.random() < 0.2,
        budget=Budget(own=OWN_BYTES, shared=sizes.choice((3_000, 6_000)), most_answer=1_000),
        sizes_known=sizes.random() < 0.8,
        calm_at_ms=calm_at_ms,
        patience_ms=max([150 * MINUTE, *(fault.patience_ms for fault in faults)]),
    )


def _order(rng: random.Random, number: int, calm_at_ms: int) -> Order:
    names = [f"job-{number}-{position}" for position in range(rng.choice((1, 1, 2, 4)))]
    model, *others = rng.sample(MODELS, 3)
    return Order(
        at_ms=rng.randrange(calm_at_ms // 2),
        names=names,
        model=model,
        fallback_models=tuple(others[: rng.choice((0, 0, 0, 1, 2))]),
        deadline_ms=rng.randrange(calm_at_ms * 2) if rng.random() < 0.15 else None,
        cancel_after_ms=rng.randrange(calm_at_ms) if rng.random() < 0.2 else None,
    )


def _keys(rng: random.Random, *, stated: bool) -> list[UpstreamKey]:
    limits = dict(STATED) if stated else {}
    organizations = rng.choice(
        ((ORGANIZATION,), (ORGANIZATION, ORGANIZATION), (ORGANIZATION, "other"))
    )
    return [
        upstream_key(f"key-{position}", organization=organization, limits=limits)
        for position, organization in enumerate(organizations)
    ]


def _countable(organization: str, model_group: str) -> Group:
    group = new_group(
        organization, model_group, START, {str(name): limit for name, limit in STATED.items()}
    )
    deep = {
        name: replace(group.bucket(name), capacity=DEEP, level=10_000 * SCALE)
        for name in DIMENSIONS
    }
    return replace(group, version=1, **deep)  # type: ignore[arg-type]
