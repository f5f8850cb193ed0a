"""One tenant's trouble beside a healthy tenant: the story is played with and without it, and the delays compared.

To add one: write a function that returns the story with the ill tenant in it, and enter it in `TROUBLES`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from sluice.domain.retries import UNSENDABLE
from tests.fakes import MINUTE, SECOND, upstream_key
from tests.simulation.accounts import Home
from tests.simulation.faults import Fault, refused
from tests.simulation.story import Order, Story, Upload
from tests.simulation.upstream import REFUSED_MS, Call, Plan

if TYPE_CHECKING:
    from tests.simulation.world import World

WELL: Final = "acme"
ILL: Final = "zorro"

CALM_MS: Final = 6 * MINUTE
FACTOR: Final = 1.5
"""A healthy tenant's last job may be so many times as late beside the ill one as it is alone."""

SLACK_MS: Final = 45 * SECOND
"""And so much later still: a scheduled run may come between."""


class IllCalls(Fault):
    """All calls of a tenant meet the same, for the first minutes; calls of everybody, if so."""

    def __init__(
        self, meets: Callable[[Call], Plan | None], whose: str = ILL, *, everybody: bool = False
    ) -> None:
        super().__init__(random.Random(0), CALM_MS)  # noqa: S311 - nothing is drawn
        self._meets = meets
        self.whose = whose
        self._everybody = everybody

    def calm(self, world: World) -> None:
        world.pool.pool = [replace(key, api_key=f"{key.api_key}-new") for key in world.pool.pool]

    def reply(self, call: Call) -> Plan | None:
        world: World = call.machine.world
        is_its = self._everybody or world.orders[call.name].tenant == self.whose
        return self._meets(call) if is_its else None


def _rejected(status: int | None, kind: str, message: str = "no", **facts: object) -> Fault:
    def meets(call: Call) -> Plan:
        return Plan(refused(call, status, kind, message, **facts), REFUSED_MS)  # type: ignore[arg-type]

    return IllCalls(meets)


def _ill_orders(story: Story, count: int, **facts: object) -> Story:
    names = [f"{ILL}-{position}" for position in range(count)]
    ill = Order(at_ms=0, names=names, tenant=ILL, **facts)  # type: ignore[arg-type]
    return replace(story, orders=[*story.orders, ill], ill=ILL)


def _own_keys(story: Story, ill: Home) -> Story:
    """Give each tenant a key of its own."""
    well = upstream_key("key-well", tenants=frozenset({WELL}))
    sick = upstream_key("key-ill", tenants=frozenset({ILL}), organization=ill.organization)
    homes = {"key-well": Home("org"), "key-ill": ill}
    return replace(story, keys=[well, sick], homes=homes)


def _with(story: Story, *faults: Fault) -> Story:
    return replace(story, faults=faults)


def overloaded_sibling(story: Story) -> Story:
    """The ill tenant's model is overloaded; it shares its limits with the healthy tenant's."""
    return _with(_ill_orders(story, 30, model="claude-a2"), _rejected(529, "overloaded_error"))


def overloaded_other_model(story: Story) -> Story:
    """The ill tenant's model is overloaded; it has limits of its own."""
    return _with(_ill_orders(story, 30, model="claude-b"), _rejected(529, "overloaded_error"))


def spent_workspace(story: Story) -> Story:
    """The ill tenant's workspace has reached its own spend limit."""
    story = _own_keys(_ill_orders(story, 10), Home("org", "ill"))
    message = "You have reached your specified workspace API usage limits. You will regain access."
    return _with(story, _rejected(400, "invalid_request_error", message))


def throttled_workspace(story: Story) -> Story:
    """The ill tenant's workspace has a rate limit of its own."""
    story = _own_keys(_ill_orders(story, 10), Home("org", "ill"))
    return _with(story, _rejected(429, "rate_limit_error", retry_after_ms=60 * SECOND))


def throttled_organization(story: Story) -> Story:
    """The ill tenant's organization is throttled for long; the healthy one's is another."""
    story = _own_keys(_ill_orders(story, 20), Home("other"))
    return _with(story, _rejected(429, "rate_limit_error", retry_after_ms=10 * MINUTE))


def spent_organization(story: Story) -> Story:
    """The ill tenant's organization has spent its month; the healthy one's is another."""
    story = _own_keys(_ill_orders(story, 20), Home("other"))
    code = "enforced_spend_limit_reached"
    return _with(story, _rejected(429, "rate_limit_error", error_code=code))


def rejected_key(story: Story) -> Story:
    """The ill tenant's key is rejected."""
    story = _own_keys(_ill_orders(story, 20), Home("org"))
    return _with(story, _rejected(401, "authentication_error"))


def refused_requests(story: Story) -> Story:
    """All requests of the ill tenant are bad."""
    return _with(_ill_orders(story, 40), _rejected(400, "invalid_request_error"))


def unsendable_requests(story: Story) -> Story:
    """The ill tenant's requests cannot be written to the wire."""
    return _with(_ill_orders(story, 40), _rejected(None, UNSENDABLE))


def slow_answers(story: Story) -> Story:
    """The ill tenant's answers take minutes."""
    story = _ill_orders(story, 30)
    return _with(story, IllCalls(lambda _: Plan(latency_ms=200 * SECOND)))


def many_jobs(story: Story) -> Story:
    """The ill tenant has submitted many jobs, to limits that both share."""
    story = _ill_orders(story, 100)
    return replace(story, headers="true", limits={**story.limits, "requests": 60})


def _files(story: Story, ill_rows: int) -> Story:
    """Let the healthy tenant have a small file instead of jobs, and the ill one a large one."""
    well = Upload(30 * SECOND, "small", WELL, [f"small-{row}" for row in range(10)])
    ill = Upload(0, "large", ILL, [f"{ILL}-{row}" for row in range(ill_rows)])
    return replace(story, orders=[], uploads=[well, ill], ill=ILL)


def large_file(story: Story) -> Story:
    """The ill tenant has uploaded a large file, to limits that both share."""
    story = replace(_files(story, 100), lines_per_range=10, headers="true")
    return replace(story, limits={**story.limits, "requests": 60})


def _beside_large(  # noqa: PLR0913 - the numbers of a story
    story: Story, whose: str, rows: int, *, fleet: int, rpm: int, small_rows: int, at_ms: int
) -> Story:
    """Let a small file arrive beside a large one of some tenant, which low limits keep in the workers for minutes."""
    story = replace(_files(story, rows), lines_per_range=30, headers="true", fleet=fleet)
    small, large = story.uploads
    lines = [f"small-{row}" for row in range(small_rows)]
    uploads = [replace(small, at_ms=at_ms, lines=lines), replace(large, tenant=whose)]
    limits = {**story.limits, "requests": rpm}
    return replace(story, uploads=uploads, ill_file="large", limits=limits)


def slow_file(story: Story, whose: str = ILL) -> Story:
    """The ranges of a large file occupy all workers for minutes, because the limits are low."""
    return _beside_large(story, whose, 120, fleet=2, rpm=40, small_rows=5, at_ms=10 * SECOND)


def own_slow_file(story: Story) -> Story:
    """The large file is of the same tenant."""
    return slow_file(story, WELL)


def held_file(story: Story, whose: str = ILL) -> Story:
    """All of many workers hold rows of a large file; a small one comes later, and has one of them."""
    return _beside_large(story, whose, 240, fleet=6, rpm=60, small_rows=25, at_ms=60 * SECOND)


def own_held_file(story: Story) -> Story:
    """The large file is of the same tenant."""
    return held_file(story, WELL)


def many_files(story: Story) -> Story:
    """The ill tenant has uploaded many small files beside a large one, to low limits."""
    story = slow_file(story)
    many = [Upload(0, f"one of many {n}", ILL, [f"{ILL}-{n}-0"]) for n in range(12)]
    return replace(story, uploads=[*story.uploads, *many])


def _both_wait(story: Story) -> Story:
    """Let both tenants wait for limits of their own, the ill one with more than a look of the sweep can read."""

    def early(call: Call) -> Plan | None:
        world: World = call.machine.world
        is_early = world.time.now() < world.time.start + MINUTE
        return _blocked(call, 17 * MINUTE) if is_early else None

    story = replace(_own_keys(story, Home("other")), due_share=2, calm_at_ms=50 * MINUTE)
    return _with(story, IllCalls(lambda call: _blocked(call, 16 * MINUTE)), IllCalls(early, WELL))


def _blocked(call: Call, wait_ms: int) -> Plan:
    return Plan(refused(call, 429, "rate_limit_error", retry_after_ms=wait_ms), REFUSED_MS)


def blocked_file(story: Story) -> Story:
    """The ill tenant's file waits outside the queue, in many ranges."""
    return _both_wait(replace(_files(story, 50), lines_per_range=1))


def blocked_jobs(story: Story) -> Story:
    """The ill tenant's jobs wait outside the queue."""
    well = [replace(each, at_ms=30 * SECOND) for each in story.orders]
    return _both_wait(_ill_orders(replace(story, orders=well), 60))


TROUBLES: Final[Mapping[str, Callable[[Story], Story]]] = {
    "an overloaded model of the same limits": overloaded_sibling,
    "an overloaded model": overloaded_other_model,
    "a spent workspace": spent_workspace,
    "a throttled workspace": throttled_workspace,
    "a throttled organization": throttled_organization,
    "a spent organization": spent_organization,
    "a rejected key": rejected_key,
    "refused requests": refused_requests,
    "unsendable requests": unsendable_requests,
    "slow answers": slow_answers,
    "many jobs": many_jobs,
    "a large file": large_file,
    "a blocked file": blocked_file,
    "blocked jobs": blocked_jobs,
}


AT_LOW_LIMITS: Final[Mapping[str, Callable[[Story], Story]]] = {
    "a slow file": slow_file,
    "a slow file of its own": own_slow_file,
    "many files": many_files,
    "a file in all workers": held_file,
    "a file of its own in all workers": own_held_file,
}


def failing_sibling(story: Story) -> Story:
    """The ill tenant's model answers with 500; it shares its limits with the healthy tenant's."""
    return _with(_ill_orders(story, 30, model="claude-a2"), _rejected(500, "api_error"))


def breaking_requests(story: Story) -> Story:
    """The ill tenant's requests break the connection; its model and key are the healthy tenant's as well."""
    return _with(_ill_orders(story, 30), _rejected(None, "connection_error"))


def overloaded_with_fallback(story: Story) -> Story:
    """The model of both is overloaded; the healthy tenant's jobs have a fallback model."""

    def meets(call: Call) -> Plan | None:
        overloaded = Plan(refused(call, 529, "overloaded_error"), REFUSED_MS)
        return overloaded if call.request.model == "claude-a" else None

    well = [replace(each, fallback_models=("claude-b",)) for each in story.orders]
    story = _ill_orders(replace(story, orders=well), 10)
    return _with(story, IllCalls(meets, everybody=True))


def unpaid_workspace(story: Story) -> Story:
    """The ill tenant's workspace gets a 402, which does not say whose it is."""
    story = _own_keys(_ill_orders(story, 10), Home("org", "ill"))
    return _with(story, _rejected(402, "error"))


def shared_spent_workspace(story: Story) -> Story:
    """Both may use a key of a spent workspace, and the healthy tenant one of another workspace."""

    def meets(call: Call) -> Plan | None:
        message = "You have reached your specified workspace API usage limits."
        spent = Plan(refused(call, 400, "invalid_request_error", message), REFUSED_MS)
        return spent if call.request.key.id == "key-ill" else None

    story = _own_keys(_ill_orders(story, 10), Home("org", "ill"))
    keys = [replace(key, tenants=None) if key.id == "key-ill" else key for key in story.keys]
    return _with(replace(story, keys=keys), IllCalls(meets, everybody=True))


OF_SCOPES: Final[Mapping[str, Callable[[Story], Story]]] = {
    "a failing model of the same limits": failing_sibling,
    "requests that break the connection": breaking_requests,
    "an overloaded model with a fallback": overloaded_with_fallback,
    "an unpaid workspace": unpaid_workspace,
    "a spent workspace of both": shared_spent_workspace,
}


def of_neighbors(seed: int, troubles: Mapping[str, Callable[[Story], Story]] = TROUBLES) -> Story:
    """Return a story of a healthy tenant beside an ill one."""
    rng = random.Random(f"neighbors {seed}")  # noqa: S311 - chance that can be repeated
    name = list(troubles)[seed // 16 % len(troubles)]
    well = [
        Order(
            at_ms=at * SECOND,
            names=[f"{WELL}-{at}-{position}" for position in range(rng.choice((1, 3, 6)))],
            tenant=WELL,
        )
        for at in sorted(rng.sample(range(20, 240), 3))
    ]
    story = Story(
        seed=seed,
        orders=well,
        keys=[upstream_key("key-0")],
        faults=(),
        headers="roomy",
        fleet=rng.choice((2, 3, 5)),
        batch_size=rng.choice((10, 50)),
        call_ms=(1_000, 3_000),
        calm_at_ms=CALM_MS,
        patience_ms=9 * 60 * MINUTE,
        trouble=name,
    )
    return troubles[name](story)


def delays(world: World) -> list[int]:
    """Return how long the jobs and files of the healthy tenant took, in milliseconds."""
    jobs = [
        (job.finished_at or world.time.now()) - job.created_at
        for job in world.jobs.stored.values()
        if job.tenant == WELL
    ]
    files = [
        (batch.ended_at or world.time.now()) - batch.created_at
        for batch in world.files.batches.stored.values()
        if batch.tenant == WELL and batch.name != world.story.ill_file
    ]
    return sorted(jobs + files)


def compared(beside: World, alone: World) -> str | None:
    """Return what is wrong with the healthy tenant's delays; None if nothing is."""
    with_ill, without = delays(beside), delays(alone)
    if len(with_ill) != len(without):
        return f"{len(with_ill)} ends beside the ill tenant, {len(without)} alone"
    if with_ill[-1] > FACTOR * without[-1] + SLACK_MS:
        return (
            f"{with_ill[-1] / 1000:.0f} s beside the ill tenant, {without[-1] / 1000:.0f} s alone"
        )
    return None
