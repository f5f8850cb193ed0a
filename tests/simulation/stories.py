"""The story of each seed. The kinds alternate, so that a few consecutive seeds have all of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Final

from sluice.domain.keys import UpstreamKey
from tests.fakes import MINUTE, SECOND, upstream_key
from tests.simulation.accounts import INVENTED, MODEL_GROUPS, NEW_MODEL, Home
from tests.simulation.faults import (
    FAULTS_OF_FILES,
    FAULTS_OF_TENANTS,
    BadRequest,
    Canceled,
    ConnectionLost,
    Fault,
    FilesThrottled,
    KilledAtAnyMoment,
    KilledAtAStoreCall,
    KilledOverFiles,
    KilledRangeWorker,
    LongBlocks,
    LostReply,
    ModelOverloaded,
    NoConnection,
    OtherTraffic,
    OverloadStorm,
    ParkedByHand,
    RangeSeenTwice,
    RateLimited,
    Refusals,
    RevokedKey,
    ServerErrors,
    SlowAnswers,
    StrangeBatchCancel,
    Throttled,
    TimedOutInvocation,
    TwoSweeps,
)
from tests.simulation.lane_faults import FAULTS_OF_THE_LANE
from tests.simulation.message_batches import LaneFacts
from tests.simulation.story import STATED, Order, Story, Upload, of_single_jobs
from tests.simulation.troubles import AT_LOW_LIMITS, OF_SCOPES, of_neighbors

TENANTS: Final = ("acme", "birch", "cedar")

ALSO_OF_TENANTS: Final[tuple[type[Fault], ...]] = (
    BadRequest,
    Canceled,
    ConnectionLost,
    KilledAtAnyMoment,
    OtherTraffic,
    RateLimited,
    Refusals,
    RevokedKey,
    ServerErrors,
    SlowAnswers,
    Throttled,
    TwoSweeps,
)
"""Those of single jobs that matter to who may do what, and when."""


ALSO_OF_FILES: Final[tuple[type[Fault], ...]] = (
    BadRequest,
    ConnectionLost,
    LongBlocks,
    ModelOverloaded,
    NoConnection,
    OverloadStorm,
    ParkedByHand,
    RateLimited,
    Refusals,
    ServerErrors,
    SlowAnswers,
    Throttled,
    TwoSweeps,
)


ALSO_OF_THE_LANE: Final[tuple[type[Fault], ...]] = (
    ConnectionLost,
    FilesThrottled,
    KilledAtAStoreCall,
    KilledOverFiles,
    KilledRangeWorker,
    LostReply,
    RangeSeenTwice,
    ServerErrors,
    StrangeBatchCancel,
    Throttled,
    TimedOutInvocation,
    TwoSweeps,
)


MILD: Final = frozenset({ConnectionLost, KilledAtAnyMoment, ServerErrors, SlowAnswers, TwoSweeps})
"""Faults that do not keep upstream from answering for a model."""


def of_tenants(seed: int) -> Story:
    """Return a story of several tenants, with keys of their own, organizations and models that share limits."""
    rng = random.Random(f"tenants {seed}")  # noqa: S311 - chance that can be repeated
    calm_at_ms = rng.choice((2, 4, 8)) * MINUTE
    tenants = TENANTS[: rng.choice((2, 2, 3))]
    orders = [
        _order(rng, tenants, number, calm_at_ms)
        for number in range(len(tenants) + rng.randrange(3))
    ]
    kinds = rng.sample(FAULTS_OF_TENANTS, rng.choice((0, 1, 1, 2)))
    kinds += rng.sample(ALSO_OF_TENANTS, rng.choice((0, 0, 1, 2)))
    if rng.random() < 0.2:
        # A crowd, for what only a crowd shows.
        names = [f"crowd-{position}" for position in range(40)]
        orders[0] = replace(orders[0], names=names, deadline_ms=None, fallback_models=())
    keys, homes = _keys(rng, tenants)
    headers = rng.choice(("roomy", "true", "true", "none"))
    if headers == "none":
        homes = {}
        keys = [
            replace(
                key,
                organization=key.organization or "org",
                limits={str(name): limit for name, limit in STATED.items()},
            )
            for key in keys
        ]
    return Story(
        seed=seed,
        orders=orders,
        keys=keys,
        homes=homes,
        faults=[kind(rng, calm_at_ms) for kind in kinds],
        headers=headers,
        limits={
            "requests": rng.choice((120, 600)),
            "input_tokens": 60_000,
            "output_tokens": 30_000,
        },
        fleet=rng.choice((2, 3, 5)),
        batch_size=rng.choice((1, 10, 50)),
        timeouts_ms=rng.choice(((900_000,), (900_000, 120_000))),
        call_ms=rng.choice(((300, 2_000), (1_000, 20_000), (2_000, 90_000))),
        skew_ms=rng.choice((0, 500, 2 * SECOND)),
        due_share=rng.choice((2, 6, 10_000)),
        cached=rng.random() < 0.5,
        calm_at_ms=calm_at_ms,
        patience_ms=9 * 60 * MINUTE,
    )


def of_files(seed: int) -> Story:
    """Return a story of some files of several tenants, cut into small ranges and sections."""
    rng = random.Random(f"files {seed}")  # noqa: S311 - chance that can be repeated
    calm_at_ms = rng.choice((2, 4, 8)) * MINUTE
    tenants = TENANTS[: rng.choice((1, 2, 2, 3))]
    uploads = [
        _upload(rng, tenants[number % len(tenants)], len(tenants), number, calm_at_ms)
        for number in range(rng.choice((1, 2, 3)))
    ]
    if rng.random() < 0.15:
        # Another file under the name of the first.
        first = uploads[0]
        lines = [f"{first.tenant}-again-{position}" for position in range(4)]
        later_ms = rng.choice((SECOND, 20 * SECOND))
        again = replace(first, at_ms=first.at_ms + later_ms, lines=lines, by_api=False)
        uploads.append(replace(again, cancel_after_ms=None, webhook=None))
    kinds = rng.sample(FAULTS_OF_FILES, rng.choice((0, 0, 1, 1, 2)))
    kinds += rng.sample(ALSO_OF_FILES, rng.choice((0, 0, 1, 2)))
    return Story(
        seed=seed,
        orders=[],
        uploads=uploads,
        keys=[upstream_key("key-0")],
        faults=[kind(rng, calm_at_ms) for kind in kinds],
        headers=rng.choice(("roomy", "true")),
        limits={
            "requests": rng.choice((120, 600)),
            "input_tokens": 60_000,
            "output_tokens": 30_000,
        },
        fleet=rng.choice((2, 4, 6)),
        timeouts_ms=rng.choice(((900_000,), (900_000, 120_000))),
        call_ms=rng.choice(((300, 2_000), (1_000, 20_000), (2_000, 90_000))),
        skew_ms=rng.choice((0, 500, 2 * SECOND)),
        due_share=rng.choice((2, 1_000)),
        lines_per_range=rng.choice((1, 3, 5, 100)),
        ranges_per_section=rng.choice((1, 2, 100)),
        calm_at_ms=calm_at_ms,
        patience_ms=7 * 60 * MINUTE,
    )


def of_invented_models(seed: int) -> Story:
    """Return a story of tenants who use models that no list has: some do not exist, and one is new."""
    rng = random.Random(f"models {seed}")  # noqa: S311 - chance that can be repeated
    story = of_tenants(seed)
    invented = [
        Order(at_ms=0, names=[f"by-{model}"], tenant=TENANTS[0], model=model)
        for model in INVENTED[: rng.choice((5, 20))]
    ]
    names = [f"new-{position}" for position in range(rng.choice((2, 30)))]
    new = Order(rng.randrange(MINUTE), names, tenant=rng.choice(TENANTS[:2]), model=NEW_MODEL)
    later = replace(new, at_ms=new.at_ms + MINUTE, names=["new-later"])
    return replace(
        story,
        orders=[*story.orders, *invented, new, later],
        keys=[replace(key, models=None, tenants=None) for key in story.keys],
        faults=[each for each in story.faults if type(each) in MILD],
        answers_any_model=rng.random() < 0.5,
    )


def of_hidden_bursts(seed: int) -> Story:
    """Return a story of many jobs whose limit is enforced by the second, which no header shows."""
    rng = random.Random(f"bursts {seed}")  # noqa: S311 - chance that can be repeated
    names = [f"job-{position}" for position in range(400)]
    return Story(
        seed=seed,
        orders=[Order(at_ms=0, names=names)],
        keys=[upstream_key("key-0")],
        faults=(),
        headers="true",
        hidden_ms=rng.choice((1, 2, 5)) * SECOND,
        limits={"requests": 600, "input_tokens": 600_000, "output_tokens": 600_000},
        fleet=rng.choice((2, 3, 5)),
        batch_size=50,
        call_ms=(300, 2_000),
        skew_ms=rng.choice((0, 500)),
        calm_at_ms=MINUTE,
        patience_ms=9 * 60 * MINUTE,
    )


def of_long_ends(seed: int) -> Story:
    """Return a story of files whose end takes many invocations, and whose ranges take many windows."""
    rng = random.Random(f"ends {seed}")  # noqa: S311 - chance that can be repeated
    story = of_files(seed)
    uploads = [
        replace(
            each,
            lines=[*each.lines, *each.names, each.names[0]],
            fallback_models=(),
            by_api=False,
        )
        for each in {(each.tenant, each.name): each for each in story.uploads}.values()
    ]
    return replace(
        story,
        uploads=uploads,
        lines_per_range=rng.choice((3, 5, 100)),
        ranges_per_section=rng.choice((1, 2)),
        window_rows=rng.choice((2, 5)),
        compared_at_once=rng.choice((2, 5)),
        end_ms=rng.choice((50, 200)),
    )


BAD_LINES: Final = (
    b"",
    b"not JSON",
    b'{"params": 1}',
    b'{"params": {}}',
    b"\xfa\xfe",
    b"[1]",
)


def _upload(rng: random.Random, tenant: str, tenants: int, number: int, calm_at_ms: int) -> Upload:
    model, other = rng.sample(sorted(MODEL_GROUPS), 2)
    count = rng.choice((1, 4, 9, 20))
    lines: list[str | bytes] = [f"{tenant}-{number}-row-{position}" for position in range(count)]
    by_api = rng.random() < 0.3
    if not by_api:
        for _ in range(rng.choice((0, 0, 1, 3))):
            lines.insert(rng.randrange(len(lines) + 1), rng.choice(BAD_LINES))
    return Upload(
        at_ms=rng.randrange(calm_at_ms // 2),
        name=f"file-{number // tenants}",
        tenant=tenant,
        lines=lines,
        model=model,
        fallback_models=(other,) if rng.random() < 0.3 else (),
        deadline_ms=rng.randrange(calm_at_ms, 3 * calm_at_ms) if rng.random() < 0.2 else None,
        cancel_after_ms=rng.randrange(calm_at_ms // 2) if rng.random() < 0.2 else None,
        by_api=by_api,
        webhook=f"https://{tenant}.example/{number}" if rng.random() < 0.3 else None,
    )


def _order(rng: random.Random, tenants: tuple[str, ...], number: int, calm_at_ms: int) -> Order:
    tenant = tenants[number % len(tenants)]
    model, *others = rng.sample(sorted(MODEL_GROUPS), 4)
    return Order(
        at_ms=rng.randrange(calm_at_ms // 2),
        names=[f"{tenant}-{number}-{position}" for position in range(rng.choice((1, 2, 5)))],
        tenant=tenant,
        model=model,
        fallback_models=tuple(others[: rng.choice((0, 0, 1, 2))]),
        deadline_ms=rng.randrange(calm_at_ms * 2) if rng.random() < 0.25 else None,
        cancel_after_ms=rng.randrange(calm_at_ms // 2) if rng.random() < 0.25 else None,
        webhook=f"https://{tenant}.example/{number}" if rng.random() < 0.4 else None,
    )


def _keys(
    rng: random.Random, tenants: tuple[str, ...]
) -> tuple[list[UpstreamKey], dict[str, Home]]:
    """Return a pool: some keys are everybody's, some of one tenant, some for few models; some are not known well."""
    keys: list[UpstreamKey] = []
    homes: dict[str, Home] = {}
    for position in range(rng.choice((1, 2, 3, 4))):
        name = f"key-{position}"
        organization = rng.choice(("org", "org", "other"))
        is_known = rng.random() < 0.7
        key = upstream_key(name, organization=organization if is_known else None)
        homes[name] = Home(organization)
        if rng.random() < 0.4:
            key = replace(key, tenants=frozenset(rng.sample(tenants, rng.choice((1, 2)))))
        if rng.random() < 0.2:
            key = replace(key, models=frozenset(rng.sample(sorted(MODEL_GROUPS), 2)))
        keys.append(key)
    return keys, homes


LANE_MINUTES: Final = (
    (7,),
    (7, 20, 45),
    (20, 90, 200),
    (60, 600),
    (7, 60, 2_000),
)
"""How long the Message Batches of a story take: minutes, hours, or so long that they expire."""

LANE_HOURS: Final = (1, 2, 4, 10)


def of_the_lane(seed: int) -> Story:
    """Return a story of batches on the batch lane, beside some on the live lane."""
    rng = random.Random(f"lane {seed}")  # noqa: S311 - chance that can be repeated
    calm_at_ms = rng.choice((20, 60, 120)) * MINUTE
    tenants = TENANTS[: rng.choice((1, 2, 2, 3))]
    uploads = [
        _lane_upload(rng, tenants[number % len(tenants)], number, calm_at_ms)
        for number in range(rng.choice((1, 2, 3, 5)))
    ]
    kinds = rng.sample(FAULTS_OF_THE_LANE, rng.choice((0, 1, 1, 2, 3)))
    kinds += rng.sample(ALSO_OF_THE_LANE, rng.choice((0, 0, 1)))
    keys = [upstream_key("key-0"), upstream_key("key-1")][: rng.choice((1, 2))]
    if len(keys) > 1 and rng.random() < 0.5:
        keys[1] = replace(keys[1], organization="other")
    return Story(
        seed=seed,
        orders=[],
        uploads=uploads,
        keys=keys,
        faults=[kind(rng, calm_at_ms) for kind in kinds],
        headers="roomy",
        lane=LaneFacts(
            gather_ms=rng.choice((0, 1, 3)) * MINUTE,
            full_requests=rng.choice((4, 10, 30)),
            minutes=rng.choice(LANE_MINUTES),
            missing_ms=rng.choice((0, 0, 2_000, 90_000)),
            twins=rng.random() < 0.3,
            errors=rng.choice((0, 0, 0.1)),
            refusals=rng.choice((0, 0, 0.1)),
        ),
        fleet=rng.choice((2, 4)),
        call_ms=rng.choice(((300, 2_000), (1_000, 20_000))),
        skew_ms=rng.choice((0, 500, 2 * SECOND)),
        lines_per_range=rng.choice((1, 3, 5, 100)),
        ranges_per_section=rng.choice((2, 100)),
        calm_at_ms=calm_at_ms,
        patience_ms=40 * 60 * MINUTE,
    )


def _lane_upload(rng: random.Random, tenant: str, number: int, calm_at_ms: int) -> Upload:
    upload = _upload(rng, tenant, 1, number, calm_at_ms)
    hours = rng.choice(LANE_HOURS) if rng.random() < 0.4 else None
    # Each name once: what is sent again is known by its name.
    rows = rng.choice((1, 4, 9, 20, 40))
    lines: list[str | bytes] = [f"{tenant}-{number}-row-{position}" for position in range(rows)]
    if not upload.by_api:
        lines.insert(rng.randrange(len(lines) + 1), rng.choice(BAD_LINES))
    return replace(
        upload,
        at_ms=rng.choice((0, MINUTE, calm_at_ms // 4)) + rng.randrange(MINUTE),
        lines=lines,
        deadline_ms=None if hours is None else hours * 60 * MINUTE,
        cancel_after_ms=rng.randrange(2 * calm_at_ms) if rng.random() < 0.25 else None,
        lane=None if rng.random() < 0.1 else "batch",
        anthropic_version="2023-06-01" if rng.random() < 0.1 else None,
        anthropic_beta="a-beta" if rng.random() < 0.15 else None,
    )


KINDS: Final[Mapping[tuple[int, int], Callable[[int], Story]]] = {
    (4, 2): of_tenants,
    (8, 3): of_files,
    (16, 7): of_neighbors,
    (64, 15): partial(of_neighbors, troubles=AT_LOW_LIMITS),
    (64, 25): of_invented_models,
    (64, 63): partial(of_neighbors, troubles=OF_SCOPES),
    (64, 53): of_long_ends,
    (64, 41): of_hidden_bursts,
    (16, 0): of_the_lane,
    (16, 9): of_the_lane,
    (64, 21): of_the_lane,
    (64, 33): of_the_lane,
}
"""By divisor and remainder of the seed."""


def story_of(seed: int) -> Story:
    """Return the story of a seed."""
    kinds = (kind for (divisor, rest), kind in KINDS.items() if seed % divisor == rest)
    return next(kinds, of_single_jobs)(seed)
