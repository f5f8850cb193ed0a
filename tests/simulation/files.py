"""Files of one story: the bucket, the planner, ranges and joins, and who calls them."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from sluice.adapters import job_records
from sluice.bulk import assemble, sections
from sluice.bulk.assemble import Assemble, JoinAtOnce
from sluice.bulk.plan import PlanBatch
from sluice.domain import batches as domain
from sluice.domain import turns
from sluice.domain.batches import Batch, Options, Phase, Progress, RangeState, Tally
from sluice.domain.errors import BatchNotFound, InvalidRequest, StoreBusy
from sluice.domain.jobs import Party
from sluice.domain.times import rfc3339
from sluice.intake.batches import Batches, Create
from sluice.ports.batches import DueRange
from sluice.ports.jobs import Received
from sluice.upkeep.resume import Resume
from sluice.upstream import collect, prepare
from sluice.worker import newcomers, range_windows, ranges
from sluice.worker.newcomers import NoMessages, RunRanges
from sluice.worker.range_claim import RangeTools
from sluice.worker.range_rows import WindowRows
from sluice.worker.ranges import RangePointer, RunRange
from sluice.worker.tools import Tools
from sluice.worker.worker import Worker
from tests.bulk_fakes import MemoryBatches, MemoryBatchQueues, MemoryObjects
from tests.fakes import MINUTE, SECOND, VISIBILITY_MS
from tests.simulation.lane import Lane
from tests.simulation.machines import Machine, Through

if TYPE_CHECKING:
    from tests.simulation.story import Upload
    from tests.simulation.world import World

PLANNER_MS: Final = 15 * MINUTE
FIRST_RETRY_MS: Final = 30 * SECOND
LONGEST_RETRY_MS: Final = 15 * MINUTE
"""The batches function makes a message that failed visible again after this time, doubled each time (see
`adapters/sqs.Hidden`)."""

ALIVE_MS: Final = 90 * SECOND
"""It keeps a message hidden only so far ahead, so that it is soon visible again when the function dies."""

LAST_MS: Final = 15 * SECOND


class StoryBatches(MemoryBatches):
    """The records of batches and ranges; faults strike at every verb."""

    def __init__(self, world: World) -> None:
        super().__init__(world.time.now)
        self.world = world
        self.done: Counter[tuple[str, int]] = Counter()
        """How often each range was written as done."""

    def _do(self, verb: str, about: str = "") -> None:
        self.world.touch(self.name, verb)
        super()._do(verb, about)

    def _put(self, batch: Batch) -> None:
        if batch.batch_id not in self.stored:
            self.world.files.registered(batch)
        super()._put(batch)
        if batch.phase is Phase.ENDED and batch.options.webhook is not None:
            self.world.outbox.wanted[batch.batch_id] = batch.options.webhook

    def due(self, now: int, share: int) -> Sequence[DueRange]:
        return super().due(now, min(share, self.world.story.due_share))

    def replace_range(self, state: RangeState, expected_version: int) -> None:
        super().replace_range(state, expected_version)
        if state.done:
            self.done[state.batch_id, state.number] += 1

    def mark(self, batch_id: str, group: str, member: int, tally: Tally) -> Progress:
        progress = super().mark(batch_id, group, member, tally)
        self.world.note(f"{batch_id[:14]}: {group} {member} is done")
        return progress


class StoryObjects(MemoryObjects):
    """The data bucket; faults strike at every verb."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.joined: Counter[str] = Counter()
        """How often each section's index was written."""
        self.steps: Counter[str] = Counter()
        """How often each step of the end of a batch was done."""

    def _do(self, verb: str, about: str = "") -> None:
        self.world.touch(self.name, verb)
        super()._do(verb, about)

    def put(self, key: str, body: bytes) -> str:
        etag = super().put(key, body)
        if key.endswith(".index"):
            self.joined[key] += 1
        if key.endswith((".repeats", ".counts")):
            self.steps[key] += 1
        return etag


class StoryBatchQueues(MemoryBatchQueues):
    """The queues of ranges and of the planner; they wake every worker that waits for messages."""

    name = "the ranges queue"

    def __init__(self, world: World) -> None:
        super().__init__(world.time.now)
        self.world = world
        self.stirred = asyncio.Event()
        self.planner: dict[str, tuple[int, int, Callable[[Machine], bool]]] = {}
        """By what is to be done: when it is visible, how often it was received, and how it is done."""

    def _do(self, verb: str, about: str = "") -> None:
        self.world.touch(self.name, verb)
        super()._do(verb, about)

    def send_ranges(self, batch: Batch, numbers: Sequence[int]) -> list[int]:
        refused = super().send_ranges(batch, numbers)
        self.stirred.set()
        return refused

    def send_plan(self, batch_id: str, tenant: str) -> None:
        self._do("send_plan", f"{batch_id} of {tenant}")
        self.world.files.post_plan(batch_id)

    def send_join(self, batch_id: str, section: int, tenant: str) -> None:
        self._do("send_join", f"{batch_id} {section} of {tenant}")
        self.world.files.post_join(batch_id, section)

    def put_back(self, delays: Sequence[tuple[Received, int]]) -> None:
        super().put_back(delays)
        self.stirred.set()

    def receive(self) -> RangePointer | None:
        """Return a visible range, of the group with the fewest in flight, as a fair queue does."""
        now = self._now()
        flying = Counter(
            self._group(batch_id, number)
            for _, batch_id, number, at in self.ranges.values()
            if at > now
        )
        visible = sorted(
            (flying[self._group(batch_id, number)], at, name)
            for name, (_, batch_id, number, at) in self.ranges.items()
            if at <= now
        )
        if not visible:
            return None
        name = visible[0][2]
        message, batch_id, number, _ = self.ranges[name]
        self.ranges[name] = (message, batch_id, number, now + VISIBILITY_MS)
        return RangePointer(message, batch_id, number)

    def _group(self, batch_id: str, number: int) -> str:
        batch = self.world.files.batches.stored[batch_id]
        ranges = batch.plan.ranges if batch.plan else 0
        return turns.group_of_range(batch.tenant, batch_id, number, ranges)

    # What a fault can do to messages.

    def show_early(self, rng: random.Random) -> str:
        """Make a range's message visible: it is delivered twice."""
        if not self.ranges:
            return "no range"
        name = rng.choice(list(self.ranges))
        message, batch_id, number, _ = self.ranges[name]
        self.ranges[name] = (message, batch_id, number, self._now())
        self.stirred.set()
        return name

    def lose_one(self, rng: random.Random) -> tuple[str, int] | None:
        """Forget a range's message; return which range it named."""
        if not self.ranges:
            return None
        _, batch_id, number, _ = self.ranges.pop(rng.choice(list(self.ranges)))
        return batch_id, number


class RangeEnvironment:
    """A ranges worker's machine with the worker on it, kept from invocation to invocation until it dies."""

    def __init__(self, world: World, files: Files) -> None:
        self.world = world
        self.files = files
        self.machine = world.machine("ranges", Party.WORKER)
        self.line = world.line(self.machine)
        self.rows: list[WindowRows] = []
        own = self.runner()
        self.run = RunRanges(own, lambda: self.runner(own.worker))

    def runner(self, beside: Worker | None = None) -> RunRange:
        """Return what runs one range at a time."""
        world, files, machine = self.world, self.files, self.machine
        rows = WindowRows(machine)
        self.rows.append(rows)
        tools = Tools(
            jobs=rows,
            params=rows,
            results=rows,
            limits=world.limits,
            keys=world.pool,
            claude=self.line,
            ledger=world.ledger,
            clock=machine,
            jitter=world.rng.random,
            blocking=machine,
            events=world.events,
        )
        range_tools = RangeTools(
            batches=files.batches,
            objects=files.objects,
            queue=JoinAtOnce(lambda: files.assemble(machine), files.queues, world.events),
            backlog=files.queues.backlog,
            returns=NoMessages() if beside else files.queues,
            ledger=world.ledger,
            text_of_job=job_records.as_text,
            job_of_text=job_records.of_text,
            clock=machine,
            blocking=machine,
            events=world.events,
        )
        memory = beside.memory if beside else None
        worker = Worker(tools, world.rules, world.story.budget, memory=memory)
        world.watch(worker.limiter, machine)
        return RunRange(range_tools, worker, rows)


class Files:
    """The part of Sluice that runs files, in one story."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.batches = StoryBatches(world)
        self.objects = StoryObjects(world)
        self.lane = Lane(world)
        self.queues = StoryBatchQueues(world)
        self.environments: list[RangeEnvironment] = []
        self.busy: list[RangeEnvironment] = []
        self.accepted: dict[str, Upload] = {}
        """By batch id: what was uploaded, once it is registered or its create was answered."""
        self.dropped: dict[str, Upload] = {}
        """By key: the files in the bucket."""
        self.canceled: dict[str, int] = {}
        self.asked_to_cancel: set[str] = set()
        """By their owners, also if the answer was an error: the cancel may be on record all the same."""
        self.lost: set[str] = set()
        """Batches of which a fault made a message away."""
        self._invocations = 0
        self._posted = 0

    # Callers ------------------------------------------------------------------------------------------------

    async def upload(self, upload: Upload) -> None:
        """Put a file into the bucket, or create a batch through the API; cancel it later, perhaps."""
        await asyncio.sleep(upload.at_ms / 1000)
        if upload.by_api:
            await self._created(upload)
        else:
            self._dropped(upload)
        if upload.cancel_after_ms is not None:
            await asyncio.sleep(upload.cancel_after_ms / 1000)
            for batch_id, each in self.accepted.items():
                if each is upload:
                    await self.cancel(batch_id)

    def _dropped(self, upload: Upload) -> None:
        key = f"in/{upload.tenant}/{upload.name}.jsonl"
        self.objects.stored[key] = b"".join(
            (line if isinstance(line, bytes) else json.dumps(upload.row(line)).encode()) + b"\n"
            for line in upload.lines
        )
        options: dict[str, str] = {}
        if upload.deadline_at is not None:
            options["deadline"] = rfc3339(upload.deadline_at) or ""
        if upload.fallback_models:
            options["fallback-models"] = ",".join(upload.fallback_models)
        if upload.webhook is not None:
            options["webhook"] = upload.webhook
        if upload.lane is not None:
            options["lane"] = upload.lane
        if upload.anthropic_version is not None:
            options["anthropic-version"] = upload.anthropic_version
        if upload.anthropic_beta is not None:
            options["anthropic-beta"] = upload.anthropic_beta
        self.objects.metadata[key] = {f"sluice-{name}": said for name, said in options.items()}
        self.dropped[key] = upload
        self._post(f"arrived {key}", lambda machine: _done(self._planner(machine).arrived, key))

    def registered(self, batch: Batch) -> None:
        """Take down which batch a file became."""
        if batch.input_key in self.dropped:
            self.accepted.setdefault(batch.batch_id, self.dropped[batch.input_key])

    async def _created(self, upload: Upload) -> None:
        items = [upload.row(name) for name in upload.names]
        options = Options(
            deadline=upload.deadline_at,
            fallback_models=upload.fallback_models,
            webhook=upload.webhook,
            lane=upload.lane,
            anthropic_version=upload.anthropic_version,
            anthropic_beta=upload.anthropic_beta,
        )

        def create(machine: Machine) -> str | None:
            try:
                return self._caller(machine, upload.tenant).create(Create(items, options)).batch_id
            except InvalidRequest:
                return None

        batch_id = await self.world.function("api", Party.API, create)
        if batch_id is not None:
            self.accepted[batch_id] = upload

    def was_replaced(self, batch: Batch) -> bool:
        """Return whether another file has taken the place of a batch's own."""
        return self.dropped.get(batch.input_key) is not self.accepted.get(batch.batch_id)

    async def cancel(self, batch_id: str, tenant: str | None = None) -> None:
        """Cancel a batch as a tenant: its own by default."""
        upload = self.accepted[batch_id]

        def ask(machine: Machine) -> bool:
            try:
                self._caller(machine, tenant or upload.tenant).cancel(batch_id)
            except (BatchNotFound, InvalidRequest):
                return False
            return True

        if tenant in {None, upload.tenant}:
            self.asked_to_cancel.add(batch_id)
        if await self.world.function("api", Party.API, ask):
            if tenant not in {None, upload.tenant}:
                self.world.fail("tenants are apart", f"{tenant} could cancel {upload.name}")
            self.canceled.setdefault(batch_id, self.world.time.now())

    def _caller(self, machine: Machine, tenant: str) -> Batches:
        return Batches(
            tenant,
            Through(self.batches),
            Through(self.objects),
            Through(self.queues),
            Through(self.queues),
            machine,
            self.world.rng.randbytes,
            self.world.events,
        )

    # The planner --------------------------------------------------------------------------------------------

    def post_plan(self, batch_id: str) -> None:
        """Send a batch to the planner."""
        self._post(f"plan {batch_id}", lambda machine: _done(self._planner(machine).plan, batch_id))

    def post_join(self, batch_id: str, section: int) -> None:
        """Have a section joined."""
        self._post(
            f"join {batch_id} {section}",
            lambda machine: _done(self._assemble(machine).join, batch_id, section),
        )

    def post_again(self, batch_id: str, number: int) -> None:
        """Deliver a range's dead letter."""
        self._post(
            f"again {batch_id} {number}",
            lambda machine: _done(self._planner(machine).again, batch_id, number),
        )

    def _post(self, what: str, do: Callable[[Machine], bool]) -> None:
        self._posted += 1
        self.queues.planner[f"{what} ({self._posted})"] = (self.world.time.now(), 0, do)
        self.queues.stirred.set()

    def assemble(self, machine: Machine) -> Assemble:
        """Return what joins results inside a ranges worker."""
        notices = self.world.outbox.notices
        return Assemble(self.batches, self.objects, notices, machine, self.world.events)

    def _assemble(self, machine: Machine) -> Assemble:
        return Assemble(
            Through(self.batches),
            Through(self.objects),
            Through(self.world.outbox.notices),
            machine,
            self.world.events,
        )

    def _planner(self, machine: Machine) -> PlanBatch:
        return PlanBatch(
            Through(self.batches),
            Through(self.objects),
            Through(self.queues),
            self._assemble(machine),
            (),
            machine,
            self.world.events,
            Through(self.lane.records),
            self.lane.choice(machine),
        )

    async def _plan(self, what: str, received: int, do: Callable[[Machine], bool]) -> None:
        # Hidden while the function lives, which renews that.
        self.queues.planner[what] = (self.world.time.now() + PLANNER_MS, received + 1, do)
        done, dies = await self._planned(do)
        if done:
            self.queues.planner.pop(what, None)
            return
        pause = min(LONGEST_RETRY_MS, FIRST_RETRY_MS << min(received, 5))
        if dies:
            pause = ALIVE_MS
        elif done is False:
            # What it did is kept, and the next invocation does what is left.
            pause = 0
        self.queues.planner[what] = (self.world.time.now() + pause, received + 1, do)
        self.queues.stirred.set()

    async def _planned(self, do: Callable[[Machine], bool]) -> tuple[bool | None, bool]:
        """Run the batches function; return whether all is done (None: it failed), and whether its machine died."""
        machines: list[Machine] = []

        def body(machine: Machine) -> bool:
            machines.append(machine)
            return do(machine)

        done = await self.world.function("batches", Party.OPERATOR, body, PLANNER_MS)
        return done, any(not each.is_alive for each in machines)

    # Lambda -------------------------------------------------------------------------------------------------

    async def poll(self) -> None:
        """Hand visible messages to the planner and to ranges workers."""
        world = self.world
        while True:
            self.queues.stirred.clear()
            now = world.time.now()
            for what, (at, received, do) in list(self.queues.planner.items()):
                if at <= now:
                    self.queues.planner[what] = (now + PLANNER_MS, received, do)
                    world.begin(self._plan(what, received, do))
            if len(self.busy) < world.story.fleet:
                pointer = self.queues.receive()
                if pointer is not None:
                    world.begin(self._invoke(pointer))
                    await asyncio.sleep(0.1)
                    continue
            times = [at for at, *_ in self.queues.planner.values()]
            if len(self.busy) < world.story.fleet:
                times += [at for *_, at in self.queues.ranges.values()]
            pause = max(1, min(times) - world.time.now()) / 1000 if times else None
            try:
                await asyncio.wait_for(self.queues.stirred.wait(), pause)
            except TimeoutError:
                continue

    async def _invoke(self, pointer: RangePointer) -> None:
        world = self.world
        idle = [each for each in self.environments if each not in self.busy]
        again = bool(idle) and world.rng.random() < 0.8
        if not again:
            self.environments.append(RangeEnvironment(world, self))
        environment = world.rng.choice(idle) if again else self.environments[-1]
        machine = environment.machine
        self.busy.append(environment)
        self._invocations += 1
        owner = environment.line.owner = f"range-invocation-{self._invocations}"
        world.record(machine, f"receives range {pointer.number} of {pointer.batch_id} as {owner}")
        remaining = world.rng.choice(world.story.timeouts_ms)
        stop_at = machine.now() + remaining - min(LAST_MS, remaining // 4)
        task = machine.spawn(environment.run(pointer, stop_at, owner), owner)
        try:
            await asyncio.wait({task}, timeout=remaining / 1000)
            if not task.done():
                machine.kill("the invocation timed out")
            if machine.is_alive:
                self._answered(environment, pointer, task)
        finally:
            self.busy.remove(environment)
            if not machine.is_alive:
                self.environments.remove(environment)
                await machine.ended()
            self.queues.stirred.set()

    def _answered(
        self, environment: RangeEnvironment, pointer: RangePointer, task: asyncio.Task[bool]
    ) -> None:
        machine = environment.machine
        if machine.tasks:
            names = sorted(each.get_name() for each in machine.tasks)
            self.world.fail("nothing goes on in a frozen worker", f"{machine.name}: {names}")
        error = task.exception()
        if isinstance(error, StoreBusy):
            # Lambda reports a failed invocation; the message stays hidden.
            self.world.record(machine, f"failed: {error}")
        elif error is not None:
            self.world.fail("a range always has its result", f"{machine.name}: {error!r}")
        elif task.result():
            self.queues.delete(pointer.message)

    def resume(self, machine: Machine) -> Resume:
        """Return the sweep of batches."""
        return Resume(
            Through(self.batches),
            Through(self.batches),
            Through(self.queues),
            Through(self.queues),
            Through(self.world.limits),
            self.world.rules.model_groups,
            machine,
            self.world.events,
        )

    # The end ------------------------------------------------------------------------------------------------

    @property
    def is_quiet(self) -> bool:
        """Whether a scheduled run would find nothing to do."""
        now = self.world.time.now()
        nothing_due = (
            not self.batches.stored or self.is_done or not MemoryBatches.due(self.batches, now, 1)
        )
        return nothing_due and self.lane.is_quiet

    @property
    def is_done(self) -> bool:
        """Whether every batch has ended and no message is left."""
        ended = all(
            each.phase is Phase.ENDED and each.told for each in self.batches.stored.values()
        )
        is_idle = not (self.queues.planner or self.queues.ranges or self.busy)
        return ended and is_idle and self.lane.is_done


def _done(call: Callable[..., bool | None], *args: Any) -> bool:
    return call(*args) is not False


@contextmanager
def cut_as(story: Any) -> Iterator[None]:
    """Cut files into small ranges and sections, as a story wants: large files have many of both."""
    cut: dict[Any, Mapping[str, int]] = {
        domain: {
            "LINES_PER_RANGE": story.lines_per_range,
            "RANGES_PER_SECTION": story.ranges_per_section,
        },
        range_windows: {"WINDOW_ROWS": story.window_rows},
        sections: {"ENTRIES_AT_ONCE": story.compared_at_once},
        assemble: {"END_MS": story.end_ms},
        # Housekeeping ten times a second would take most of the time of a story.
        ranges: {"TICK_MS": 500},
        newcomers: {"LOOK_MS": 3 * SECOND},
    }
    if story.lane is not None:
        cut |= {
            collect: {"FULL_REQUESTS": story.lane.full_requests},
            prepare: {"MOST_REQUESTS": story.lane.most_requests},
        }
    before = {module: {name: vars(module)[name] for name in cut[module]} for module in cut}
    for module, names in cut.items():
        vars(module).update(names)
    try:
        yield
    finally:
        for module, names in before.items():
            vars(module).update(names)
