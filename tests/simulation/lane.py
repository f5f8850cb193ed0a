"""The batch lane of one story: the records of upstream batches, and the function that makes their steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sluice.adapters import job_records
from sluice.bulk.lane_choice import LaneChoice
from sluice.domain.jobs import Party
from sluice.domain.upstream_batches import Phase, UpstreamBatch
from sluice.upkeep.start_steps import StartSteps
from sluice.upstream.advance import Advance
from sluice.upstream.collect import Collect
from sluice.upstream.tools import UpstreamTools
from tests.bulk_fakes import MemoryUpstreamRecords
from tests.fakes import MINUTE
from tests.simulation.machines import Machine, Through
from tests.simulation.message_batches import Client, MessageBatches

if TYPE_CHECKING:
    from tests.simulation.world import World

INVOCATION_MS: Final = 15 * MINUTE
STOP_MS: Final = 14 * MINUTE


@dataclass(frozen=True, slots=True)
class Taken:
    """One invocation that took the lease of an upstream batch."""

    upstream_id: str
    due_at: int
    at: int


class StoryUpstreamRecords(MemoryUpstreamRecords):
    """The records of upstream batches; faults strike at every verb."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.taken: list[Taken] = []

    def _do(self, verb: str, about: str = "") -> None:
        self.world.touch(self.name, verb)
        super()._do(verb, about)

    def replace(self, record: UpstreamBatch, expected_version: int) -> None:
        before = self.stored.get(record.upstream_id)
        super().replace(record, expected_version)
        if before is not None and before.phase is not record.phase:
            self.world.note(f"{record.prefix} is {record.phase}")
        if before is not None and record.owner not in {None, before.owner}:
            due_at = max(before.due_at or self.world.time.now(), before.lease_until)
            self.taken.append(Taken(record.upstream_id, due_at, self.world.time.now()))


class Account:
    """Lambda's concurrent executions."""

    def at_once(self) -> int:
        """As many as AWS permits usually."""
        return 1_000


class Lane:
    """The upstream function and what starts it."""

    name = "the upstream function"

    def __init__(self, world: World) -> None:
        self.world = world
        self.records = StoryUpstreamRecords(world)
        self.claude = MessageBatches(world)
        self.running = 0
        self.machines: dict[str | None, list[Machine]] = {}
        """Those that made steps, by upstream batch."""
        self._invocations = 0

    def start_steps(self, machine: Machine) -> StartSteps:
        """Return the governor's part."""
        executions = Account()
        return StartSteps(
            Through(self.records), Through(self), executions, machine, self.world.events
        )

    def choice(self, machine: Machine) -> LaneChoice:
        """Return what chooses lanes, and plans rescues."""
        world = self.world
        return LaneChoice(
            Through(self.records),
            Through(world.limits),
            Through(world.files.queues),
            machine,
            world.events,
        )

    def start(self, upstream_id: str | None) -> None:
        """Invoke the upstream function, and do not wait for it."""
        self.world.begin(self._invoke(upstream_id))

    async def _invoke(self, upstream_id: str | None) -> None:
        self._invocations += 1
        owner = f"step-{self._invocations}"

        def step(machine: Machine) -> None:
            self.machines.setdefault(upstream_id, []).append(machine)
            stop_at = machine.now() + STOP_MS
            if upstream_id is None:
                self._collect(machine)(stop_at)
            else:
                self._advance(machine)(upstream_id, stop_at, owner)

        self.running += 1
        try:
            await self.world.function("upstream", Party.OPERATOR, step, INVOCATION_MS)
        finally:
            self.running -= 1

    def _collect(self, machine: Machine) -> Collect:
        files, facts = self.world.files, self.world.facts
        records: Any = Through(self.records)
        return Collect(records, Through(files.batches), facts.gather_ms, machine, self.world.events)

    def _advance(self, machine: Machine) -> Advance:
        world, files = self.world, self.world.files
        limits: Any = Through(world.limits)
        return Advance(
            UpstreamTools(
                records=Through(self.records),
                batches=Through(files.batches),
                objects=Through(files.objects),
                queue=Through(files.queues),
                claude=Client(self.claude),
                keys=Through(world.pool),
                limits=limits,
                ledger=Through(world.ledger),
                prices=world.rules.prices,
                policy=world.rules.policy,
                poll_ms=MINUTE,
                lanes=self.choice(machine),
                text_of_job=job_records.as_text,
                job_of_text=job_records.of_text,
                clock=machine,
                events=world.events,
            )
        )

    def open(self) -> Sequence[UpstreamBatch]:
        """Return the upstream batches that are not done."""
        return [each for each in self.records.stored.values() if each.phase is not Phase.DONE]

    @property
    def is_quiet(self) -> bool:
        """Whether a scheduled run would find nothing to do."""
        now = self.world.time.now()
        return not self.records.list and not any(
            each.due_at is not None and each.due_at <= now for each in self.records.stored.values()
        )

    @property
    def is_done(self) -> bool:
        """Whether no upstream batch has a step to make."""
        return not self.open() and not self.running
