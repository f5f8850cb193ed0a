"""What must stay small: limit groups, rows in memory, and the work that is done again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from sluice.domain.limits import MOST_CIRCUITS, Group
from sluice.domain.models import MOST_OF_A_TENANT
from tests.fakes import SECOND
from tests.simulation.accounts import MODEL_GROUPS, NEW_MODEL
from tests.simulation.bounds import is_healthy
from tests.simulation.checks import Check
from tests.simulation.upstream import Call

if TYPE_CHECKING:
    from tests.simulation.world import World

MOST_REPEATS: Final = 3
"""A step of an end is done once, and perhaps again by invocations beside it that check the batch."""

LEARNED_MS: Final = 20 * SECOND
"""After this time every worker knows a model: it reads the list every 5 s, and reserves 15 s ahead."""


class FewLimitGroups(Check):
    """Whatever names callers invent, a tenant adds few limit groups, and those it shares learn no limits."""

    name = "few limit groups"

    def wrote_group(self, world: World, before: Group | None, after: Group) -> None:
        is_shared = before is not None and after.model_group.startswith("unknown:")
        if is_shared and any(bucket.learned for bucket in (after.requests, after.input_tokens)):
            world.fail(self.name, f"{after.id} has learned the limits of one of its models")
        if len(after.circuits) > MOST_CIRCUITS:
            world.fail(self.name, f"{after.id} has {len(after.circuits)} circuit breakers")

    def ended(self, world: World) -> None:
        named = {group.model_group for group in world.limits.stored.values()}
        others = named - set(MODEL_GROUPS.values()) - {NEW_MODEL}
        shared = {name for name in others if name.startswith("unknown:")}
        tenants = {order.tenant for order in world.orders.values()}
        if len(shared) > len(tenants):
            world.fail(self.name, f"{len(shared)} shared groups of {len(tenants)} tenants")
        # One tenant invents them.
        most = MOST_OF_A_TENANT if world.story.answers_any_model else 0
        if len(others - shared) > most:
            world.fail(self.name, f"{len(others - shared)} groups of models that no list has")


class NewModelsHaveLimitsOfTheirOwn(Check):
    """After its first answer, a model that no list has yet has a limit group."""

    name = "new models have limits of their own"

    def ended(self, world: World) -> None:
        if world.story.answers_any_model:
            # Invented models may have taken the places of the tenant's.
            return
        calls = [call for call in world.upstream.calls if call.request.model == NEW_MODEL]
        known_at = min(
            (
                call.ended_at
                for call in calls
                if call.ended_at and call.fate == "answered" and is_healthy(call.machine)
            ),
            default=None,
        )
        named = {group.model_group for group in world.limits.stored.values()}
        for call in calls:
            if known_at and call.at > known_at + LEARNED_MS and NEW_MODEL not in named:
                world.fail(self.name, f"call {call.number} has the limits of unknown models")


class FewRowsAreInMemory(Check):
    """A ranges worker holds no more rows than a window has, however many its range has."""

    name = "few rows are in memory"

    def called(self, world: World, call: Call) -> None:
        for environment in world.files.environments:
            if environment.machine is not call.machine:
                continue
            held = max(len(rows.unfinished()) for rows in environment.rows)
            if held > world.story.window_rows:
                world.fail(self.name, f"{environment.machine.name} holds {held} rows")


class StepsOfAnEndAreKept(Check):
    """What an invocation has done of the end of a batch, the next one does not do again."""

    name = "steps of an end are kept"

    def ended(self, world: World) -> None:
        if world.has_troubled_functions or world.is_troubled:
            return
        for key, count in world.files.objects.steps.items():
            if count > MOST_REPEATS:
                world.fail(self.name, f"{key} was written {count} times")


SIZE_CHECKS: Final[Sequence[type[Check]]] = (
    FewLimitGroups,
    NewModelsHaveLimitsOfTheirOwn,
    FewRowsAreInMemory,
    StepsOfAnEndAreKept,
)
