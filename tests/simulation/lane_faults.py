"""What can go wrong on the batch lane, beside what can go wrong with files and jobs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from sluice.domain.errors import StoreBusy
from tests.simulation.faults import Fault
from tests.simulation.machines import Killed, Machine, Point

if TYPE_CHECKING:
    from tests.simulation.world import World


class CreatesLost(Fault):
    """The reply of a create is lost: some of these creates made a batch, others did not."""

    def batches(self, world: World, verb: str, batch_id: str) -> str | None:
        del world, batch_id
        if verb != "create" or self.rng.random() > 2 * self.often:
            return None
        return self.rng.choice(("lost reply", "lost reply", "never arrived", "not sent"))


class CreatesRefused(Fault):
    """Creates are refused for a while: too many, a spend limit, or a key that was revoked."""

    def __init__(self, rng: random.Random, calm_at_ms: int) -> None:
        super().__init__(rng, calm_at_ms)
        self.why = rng.choice(("spend", "rate", "key"))

    def batches(self, world: World, verb: str, batch_id: str) -> str | None:
        del batch_id
        return self.why if verb == "create" and self.is_time(world) else None

    def calm(self, world: World) -> None:
        if self.why == "key":
            pool = world.pool.pool
            world.pool.pool = [replace(key, api_key=f"{key.api_key}-new") for key in pool]


class KilledAtACreate(Fault):
    """The upstream function dies just before a create, or when the batch is made and nothing says so."""

    def batches(self, world: World, verb: str, batch_id: str) -> str | None:
        del world, batch_id
        if verb != "create" or self.rng.random() > 2 * self.often:
            return None
        return self.rng.choice(("dead", "killed", "killed"))


class BatchesUnreachable(Fault):
    """Polls, cancels, listings and results fail now and then, or a batch is not found for once."""

    def batches(self, world: World, verb: str, batch_id: str) -> str | None:
        del world, batch_id
        if verb in {"create", "lines"} or not self.chance():
            return None
        return "missing" if verb == "get" and self.rng.random() < 0.3 else "unreachable"


class BatchesAway(Fault):
    """The batch endpoints do not answer for a while."""

    def batches(self, world: World, verb: str, batch_id: str) -> str | None:
        del batch_id
        if verb in {"create", "lines"} or not self.is_time(world):
            return None
        return "unreachable"


class ResultsBreak(Fault):
    """Results end early: with an error, or as if that were all."""

    def batches(self, world: World, verb: str, batch_id: str) -> str | None:
        del world, batch_id
        if verb != "lines" or self.rng.random() > 2 * self.often:
            return None
        return self.rng.choice(("interrupted", "short"))


class PoisonBatch(Fault):
    """No machine survives a poll of one tenant's batches."""

    def __init__(self, rng: random.Random, calm_at_ms: int) -> None:
        super().__init__(rng, calm_at_ms)
        self.tenant = rng.choice(("acme", "birch"))

    def batches(self, world: World, verb: str, batch_id: str) -> str | None:
        made = world.files.lane.claude.made.get(batch_id)
        if verb not in {"get", "results"} or made is None or made.is_foreign:
            return None
        return "dead" if world.orders[made.rows[0].name].tenant == self.tenant else None


class KilledOverSteps(Fault):
    """The upstream function, the governor or the planner dies before it uses the records of upstream batches."""

    def touch(self, world: World, machine: Machine, store: str, verb: str) -> None:
        is_step = machine.name.startswith("upstream")
        if (is_step or store == world.files.lane.records.name) and (
            self.rng.random() < self.often / 5
        ):
            self.struck += 1
            world.record(machine, f"FAULT killed before {store}", verb)
            machine.kill(f"killed before {store}: {verb}")
            raise Killed(machine.name)


class RecordsAway(Fault):
    """The records of upstream batches refuse everything for a while, or only writes."""

    def __init__(self, rng: random.Random, calm_at_ms: int) -> None:
        super().__init__(rng, calm_at_ms)
        self.verbs = rng.choice(
            ({"replace", "add", "wait"}, {"get", "due", "waiting"}, {"replace"})
        )

    def touch(self, world: World, machine: Machine, store: str, verb: str) -> None:
        if store == world.files.lane.records.name and verb in self.verbs and self.is_time(world):
            self.struck += 1
            machine.troubles.append(f"{store}: {verb} is away")
            world.record(machine, f"FAULT {store} is away", verb)
            raise StoreBusy(store)


class LedgerAway(Fault):
    """The ledger takes nothing for a while."""

    async def before(self, point: Point) -> None:
        if point.store == "the ledger" and self.is_time(point.machine.world):
            self.hit(point, "the ledger is away")
            raise StoreBusy(point.store)


class StepsTwice(Fault):
    """An invocation of the upstream function is delivered twice, also for a batch that is not due."""

    async def strike(self, world: World) -> None:
        lane = world.files.lane
        while True:
            await self.now_and_then(self.calm_at_ms // 20)
            some = [each.upstream_id for each in lane.open()]
            chosen = self.rng.choice([None, *some, *some])
            self.note(world, "a step is started twice")
            for _ in range(2):
                lane.start(chosen)


class WaitingForgotten(Fault):
    """The entry of a batch that waits for the collector is lost."""

    async def strike(self, world: World) -> None:
        while True:
            await self.now_and_then(self.calm_at_ms // 8)
            waiting = world.files.lane.records.list
            if waiting:
                lost = self.rng.choice(sorted(waiting))
                waiting.discard(lost)
                world.files.lost.add(lost[2])
                self.note(world, f"{lost[2]} waits no more")


FAULTS_OF_THE_LANE: Final[Sequence[type[Fault]]] = (
    CreatesLost,
    CreatesRefused,
    KilledAtACreate,
    BatchesUnreachable,
    BatchesAway,
    ResultsBreak,
    PoisonBatch,
    KilledOverSteps,
    RecordsAway,
    LedgerAway,
    StepsTwice,
    WaitingForgotten,
)
