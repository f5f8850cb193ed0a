"""The whole gateway in memory for one story: real use cases and rules, fakes below them, faults in between."""

from __future__ import annotations

import asyncio
import gc
import json
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

from sluice.bulk import sections as joining
from sluice.domain.errors import JobNotFound, StoreBusy
from sluice.domain.jobs import DueFor, Job, Party
from sluice.domain.keys import UpstreamKey
from sluice.domain.limits import Cost, Group
from sluice.domain.retries import RetryPolicy
from sluice.intake import submit as submitting
from sluice.intake.accounts import Account
from sluice.intake.submit import Accepted, Outcome, Sender, Submit
from sluice.ports.claude import Answer, CallRequest, Refused
from sluice.ports.jobs import Due, Params, Pointer, Received
from sluice.upkeep import dead_letters as burying
from sluice.upkeep import sweep as sweeping
from sluice.upkeep.dead_letters import DeadLetter, Redriver, TakeDeadLetter
from sluice.upkeep.governor import Governed, Governor
from sluice.upkeep.sweep import Sweep
from sluice.worker.limit_books import Admission
from sluice.worker.limiter import Limiter
from sluice.worker.queue_source import RunJobs
from sluice.worker.tools import Rules, Tools
from sluice.worker.worker import Worker
from tests.fakes import (
    MINUTE,
    SECOND,
    VISIBILITY_MS,
    AccountLimit,
    MemoryGovernorNotes,
    MemoryGraveyard,
    MemoryJobs,
    MemoryLedger,
    MemoryLimits,
    MemoryMapping,
    MemoryParams,
    MemoryQueue,
    MemoryResults,
    PoolWritten,
    RecordingEvents,
    StaticKeyPool,
    TimeStandsStill,
    VirtualTime,
    price_list,
)
from tests.simulation.accounts import MODEL_GROUPS, ORGANIZATION, PRICES, Home, limits_of
from tests.simulation.checks import Check, Violation
from tests.simulation.faults import Fault
from tests.simulation.files import Files, cut_as
from tests.simulation.machines import MACHINE, Machine, OneByOne, Through, task_factory
from tests.simulation.message_batches import LaneFacts
from tests.simulation.story import START, Order, Story, Upload
from tests.simulation.upstream import Upstream
from tests.simulation.webhooks import Outbox

T = TypeVar("T")

LAST_MS: Final = 15 * SECOND
"""What a worker keeps of its invocation for writing down what came, as in functions/worker/app.py."""

TICK_MS: Final = MINUTE
"""The time from one scheduled run of governor and sweep to the next."""

FUNCTION_MS: Final = 60 * SECOND
"""A function that is no worker is ended after this time."""

LONGEST_STORY_MS: Final = 30 * 24 * 60 * MINUTE


@dataclass(frozen=True, slots=True)
class Write:
    """One version of a job, and who wrote it over what."""

    at: int
    machine: Machine | None
    before: Job | None
    after: Job


@dataclass(eq=False, slots=True)
class Reserved:
    """One admission of the limiter, and the settlements its worker made."""

    admission: Admission
    machine: Machine
    settled: list[Cost | None] = field(default_factory=list)


class StoryJobs(MemoryJobs):
    """The job records; every write is checked."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.taken: Counter[tuple[str, int]] = Counter()
        """How often a due time was taken, by job and the time it was due."""

    def due(self, why: DueFor, now: int, share: int) -> Sequence[Due]:
        return super().due(why, now, min(share, self.world.story.due_share))

    def postpone(self, due: Due, until: int) -> Due | None:
        taken = super().postpone(due, until)
        if taken is not None:
            version = self.stored[due.job_id].version
            self.taken[f"{due.job_id} v{version}", due.due_at] += 1
        return taken

    def _put(self, job: Job) -> None:
        if not self.world.story.sizes_known:
            job = replace(job, request_bytes=0)
        before = self.stored.get(job.job_id)
        super()._put(job)
        self.world.on_write(before, job)


class _Held(bytes):
    """A request's bytes in a worker's memory: unlike plain bytes they report when they are no longer held."""

    sizes: Counter[int]

    def __del__(self) -> None:
        self.sizes[len(self)] -= 1


class StoryParams(MemoryParams):
    """The requests; what workers hold of them is counted."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        self.held: dict[Machine, Counter[int]] = {}
        """Of each machine: how many requests of each size it holds."""

    def get_many(self, job_ids: Sequence[str]) -> Mapping[str, Params]:
        machine = self.world.writer
        found = super().get_many(job_ids)
        if machine is None:
            return found
        given = {}
        for job_id, params in found.items():
            body = _Held(params.body)
            body.sizes = self.held.setdefault(machine, Counter())
            body.sizes[len(body)] += 1
            given[job_id] = replace(params, body=body)
        self.world.on_bytes(machine)
        return given


class StoryLimits(MemoryLimits):
    """The limit groups; every write is checked."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    def replace(self, group: Group, expected_version: int) -> None:
        before = self.stored.get(group.id)
        super().replace(group, expected_version)
        self.world.on_group(before, group)


class StoryQueue(MemoryQueue):
    """The jobs queue; it wakes every worker that waits for messages."""

    def __init__(self, world: World) -> None:
        super().__init__(world.time.now)
        self.world = world
        self.stirred = asyncio.Event()
        self.reply_is_lost = False
        """The next send is done, but its caller hears that nothing was taken."""
        self._in_flight: Counter[tuple[str, str]] = Counter()
        self.returned: set[str] = set()
        """Receipts that were put back: these messages have a delay of their own."""
        self.late: set[str] = set()
        """Messages that a fault keeps from being received."""
        self.lost: set[str] = set()
        """Job ids of messages that a fault made away with."""
        self._given: dict[Machine | None, Sequence[Received]] = {}
        """By machine: the messages of its last receive."""
        self.unseen: dict[str | None, int] = {}
        """By job id: when its message was last hidden by a receive whose reply was lost."""

    def send(self, jobs: Sequence[Pointer]) -> list[str]:
        unsent = super().send(jobs)
        if self.reply_is_lost:
            self.reply_is_lost = False
            return [job.job_id for job in jobs]
        return unsent

    def post(
        self, *, job_id: str | None = None, canary: str | None = None, body: str = "{}"
    ) -> str:
        self.stirred.set()
        return super().post(job_id=job_id, canary=canary, body=body)

    def put_back(self, delays: Sequence[tuple[Received, int]]) -> None:
        self.world.on_receipts([message for message, _ in delays])
        super().put_back(delays)
        self.returned.update(message.receipt for message, _ in delays)
        self.stirred.set()

    def _order(self, message: Any) -> tuple[int, ...]:
        """As a fair queue delivers: first of the tenant and model with the fewest messages in flight."""
        busy = self._in_flight[self._fair_group(message)] if self._in_flight else 0
        return busy, *super()._order(message)

    def _fair_group(self, message: Any) -> tuple[str, str]:
        job = self.world.jobs.stored.get(message.job_id or "")
        return (job.tenant, limits_of(job.current_model)) if job else ("", "")

    def deliver(self, most: int = 50, hidden_ms: int = VISIBILITY_MS) -> list[Received]:
        if len(self.world.tenants) > 1:
            now = self._now()
            self._in_flight = Counter(
                self._fair_group(each) for each in self._messages.values() if each.visible_at > now
            )
        return super().deliver(most, hidden_ms)

    def keep_hidden(self, messages: Sequence[Received], milliseconds: int) -> None:
        self.world.on_receipts(messages)
        super().keep_hidden(messages, milliseconds)

    def receive(self, most: int, hidden_ms: int) -> list[Received]:
        given = super().receive(most, hidden_ms)
        self._given[self.world.writer] = given
        self.world.on_refill(given)
        return given

    def lose_reply(self, machine: Machine) -> None:
        """Take down that a machine does not see what it has received."""
        for message in self._given.pop(machine, ()):
            self.unseen[message.job_id] = self._now()

    def delete(self, messages: Sequence[Received]) -> None:
        """Acknowledge; a receipt that is not the last one may or may not do."""
        self.world.on_receipts(messages)
        self.world.on_delete(messages)
        super().delete(messages)
        for message in messages:
            if self.world.rng.random() < 0.5:
                self._messages.pop(message.message_id, None)

    # What a fault can do to messages.

    def show_early(self, rng: random.Random) -> str:
        """Make a hidden message visible: it is delivered twice."""
        hidden = [each for each in self._messages.values() if each.visible_at > self._now()]
        if not hidden:
            return "no message"
        message = rng.choice(hidden)
        message.visible_at = self._now()
        self.stirred.set()
        return message.message_id

    def hide_longer(self, rng: random.Random, milliseconds: int) -> str:
        """Keep a message from being received for a while."""
        if not self._messages:
            return "no message"
        message = rng.choice(list(self._messages.values()))
        self.late.add(message.message_id)
        message.visible_at = max(message.visible_at, self._now()) + milliseconds
        return message.message_id

    def lose_one(self, rng: random.Random) -> str:
        """Forget a message."""
        if not self._messages:
            return "no message"
        message = rng.choice(list(self._messages.values()))
        del self._messages[message.message_id]
        self.lost.add(message.job_id or "")
        return message.message_id

    def make_dead_letter(self, rng: random.Random) -> str:
        """Make a message a dead letter, as a queue does that has delivered it too often."""
        ours = [each for each in self._messages.values() if each.job_id is not None]
        if not ours:
            return "no message"
        message = rng.choice(ours)
        del self._messages[message.message_id]
        job_id = message.job_id or ""
        job = self.world.jobs.stored.get(job_id)
        if job is not None:
            was_alone = (
                not self.messages_of(job_id)
                and job.lease is None
                and job.not_before is None
                and not job.state.is_final
            )
            self.world.dead_lettered[job_id] = (self._now(), was_alone)
        received = Received(
            message.message_id, "", message.body, message.job_id, None,
            message.receive_count, message.sent_at,
        )  # fmt: skip
        self.rejected.append((received, None))  # type: ignore[arg-type]
        return message.message_id

    # What a check wants to know.

    def hidden_until(self, message: Received) -> int | None:
        """Return when a message that a worker holds is visible again; None when it is not its any more."""
        return self._messages[message.message_id].visible_at if self.is_held(message) else None

    def messages_of(self, job_id: str, beside: str = "") -> int:
        """Return how many messages a job has, not counting the one with the id `beside`."""
        return sum(
            each.job_id == job_id and message_id != beside
            for message_id, each in self._messages.items()
        )

    def had_message(self, job_id: str) -> bool:
        """Return whether a job was sent, also if a fault has made away with its message since."""
        is_dead_letter = any(message.job_id == job_id for message, _ in self.rejected)
        return is_dead_letter or job_id in self.lost or self.messages_of(job_id) > 0


class StoryPool(StaticKeyPool):
    """The key pool; as an outage of Secrets Manager is a fault of its own, it has a name like a store."""

    name = "the key pool"


class Line:
    """One worker's way to Claude."""

    def __init__(self, upstream: Upstream, machine: Machine) -> None:
        self._upstream = upstream
        self._machine = machine
        self.owner = ""

    async def send(self, request: CallRequest) -> Answer | Refused:
        return await self._upstream.send(self._machine, self.owner, request)


class Environment:
    """A worker's machine with the worker on it, kept from invocation to invocation until it dies."""

    def __init__(self, world: World, machine: Machine) -> None:
        self.machine = machine
        self.line = Line(world.upstream, machine)
        self.held: dict[str, Received] = {}
        """The messages of the present invocation, by receipt."""
        self.invoked_at = 0
        tools = Tools(
            jobs=world.jobs,
            params=world.params,
            results=world.results,
            limits=world.limits,
            keys=world.pool,
            claude=self.line,
            ledger=world.ledger,
            clock=machine,
            jitter=world.rng.random,
            blocking=machine,
            events=world.events,
        )
        self.worker = Worker(tools, world.rules, world.story.budget)
        world.watch(self.worker.limiter, machine)


class World:
    """One story as it happens."""

    def __init__(self, story: Story, checks: Sequence[Check]) -> None:
        self.story = story
        self.rng = random.Random(story.seed)  # noqa: S311 - chance that can be repeated
        self.time = VirtualTime(START, LONGEST_STORY_MS)
        self.time.make_tasks_with(task_factory)
        self.faults: Sequence[Fault] = story.faults
        self.checks = checks
        self.violations: list[Violation] = []
        self.strikes = bool(story.faults)
        """Faults still strike."""
        self.history: list[tuple[int, str, str, str, tuple[Any, ...]]] = []
        self.writer: Machine | None = None

        self.jobs = StoryJobs(self)
        self.params = StoryParams(self)
        self.results = MemoryResults(inline_bytes=60 if story.large_answers else 8_000)
        self.limits = StoryLimits(self)
        for group in story.groups:
            self.limits.stored[group.id] = group
        self.ledger = MemoryLedger()
        self.queue = StoryQueue(self)
        self.pool = StoryPool(*story.keys)
        self.mapping = MemoryMapping(concurrency=story.fleet)
        self.notes = MemoryGovernorNotes()
        self.pool_written = PoolWritten(START - 24 * 60 * MINUTE)
        self.graveyard = MemoryGraveyard(self.time.now)
        self.graveyard.name = "the graveyard"
        self.outbox = Outbox(self)
        self.files = Files(self)
        self.events = RecordingEvents()
        self.upstream = Upstream(self, story.headers, story.limits)
        self.rules = Rules(
            policy=RetryPolicy(),
            prices=price_list(**{model: str(price) for model, price in PRICES.items()}),
            model_groups=MODEL_GROUPS,
        )
        asked: list[Order | Upload] = [*story.orders, *story.uploads]
        self.orders = {name: each for each in asked for name in each.names}
        """By the name of each job and row: who asked for it, and how."""
        self.tenants = {each.tenant for each in self.orders.values()}
        self.machines: list[Machine] = []
        self.worker_machines: list[Machine] = []
        self.dead_lettered: dict[str, tuple[int, bool]] = {}
        """By job id: when a fault made its message a dead letter, and whether it had no other."""

        self.writes: list[Write] = []
        self.reserved: dict[int, Reserved] = {}
        self.accepted: dict[str, Order] = {}
        """By job id: what was answered with 202."""
        self.names: dict[str, str] = {}
        """Job ids by `custom_id`, of everything that was ever stored."""
        self.dead: list[Machine] = []
        self.environments: list[Environment] = []
        self.busy: list[Environment] = []
        self.seen_dead_letters = 0
        self._invocations = 0
        self._machines = 0
        self._running: dict[asyncio.Task[Any], None] = {}

    def watch(self, limiter: Limiter, machine: Machine) -> None:
        """Take down every admission of a limiter and its settlement."""
        admit, settle = limiter.admit, limiter.settle

        async def admit_and_record(*args: Any, **named: Any) -> Any:
            given = await admit(*args, **named)
            if isinstance(given, Admission):
                self.reserved.setdefault(id(given), Reserved(given, machine))
            return given

        def settle_and_record(admission: Admission, used: Cost | None, **named: Any) -> None:
            entry = self.reserved.setdefault(id(admission), Reserved(admission, machine))
            entry.settled.append(used)
            settle(admission, used, **named)

        vars(limiter).update(admit=admit_and_record, settle=settle_and_record)

    def line(self, machine: Machine) -> Line:
        """Return a worker's way to Claude."""
        return Line(self.upstream, machine)

    def touch(self, store: str, verb: str) -> None:
        """Let faults strike at a verb of a store of files; raises StoreBusy, or Killed."""
        if self.strikes and self.writer is not None:
            for fault in self.faults:
                fault.touch(self, self.writer, store, verb)

    # The story ---------------------------------------------------------------------------------------------

    def run(self) -> list[Violation]:
        """Play the story to its end; return what was wrong with it."""
        collecting = gc.isenabled()
        gc.disable()
        try:
            with _one_by_one(), cut_as(self.story):
                self.time.run(self._play())
        except TimeStandsStill as error:
            self.fail("the story ends", str(error))
        finally:
            self.time.close()
            if collecting:
                gc.enable()
        return self.violations

    async def _play(self) -> None:
        ticks = asyncio.create_task(self._tick())
        lambda_service = asyncio.create_task(self._poll())
        services = [asyncio.create_task(each) for each in self._services()]
        clients = [asyncio.create_task(self._client(order)) for order in self.story.orders]
        clients += [asyncio.create_task(self.files.upload(each)) for each in self.story.uploads]
        strikes = [asyncio.create_task(fault.strike(self)) for fault in self.faults]
        try:
            await asyncio.sleep(self.story.calm_at_ms / 1000)
            self._calm()
            for task in strikes:
                task.cancel()
            await asyncio.gather(*clients)
            await self._drained()
        finally:
            for task in (ticks, lambda_service, *services, *clients, *strikes):
                task.cancel()
            tasks = (ticks, lambda_service, *services, *clients, *strikes)
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._all_ended()
        for check in self.checks:
            check.ended(self)

    def _services(self) -> Iterator[Coroutine[Any, Any, None]]:
        """Yield what runs beside the jobs, where the story has any of it."""
        if any(order.webhook is not None for order in self.orders.values()):
            yield self.outbox.poll()
        if self.story.uploads:
            yield self.files.poll()

    def _calm(self) -> None:
        """No more faults: from here on everything must come right by itself."""
        self.strikes = False
        self.queue.recover()
        self.queue.reply_is_lost = False
        for fault in self.faults:
            fault.calm(self)
        self.note("CALM: no more faults")

    async def _drained(self) -> None:
        """Wait until every stored job has ended; say so if it takes longer than anything can."""
        calm_at = self.time.now()
        while True:
            open_jobs = [job for job in self.jobs.stored.values() if not job.state.is_final]
            if not open_jobs and not self.busy and self._queue_is_empty() and self._rest_is_done():
                return
            late = self.time.now() - calm_at
            if late > self.story.patience_ms:
                for job in open_jobs:
                    self.fail("every job ends", f"{self.name_of(job.job_id)} is still {job.state}")
                if not open_jobs and not self._queue_is_empty():
                    self.fail("the queue empties", f"{self.queue.depth()} messages are left")
                return
            await asyncio.sleep(1 if late < 10 * MINUTE else 60)

    def _rest_is_done(self) -> bool:
        owes = any(why is DueFor.BOOKS for why, _ in self.jobs.due_jobs.values())
        return self.outbox.is_empty and self.files.is_done and not owes

    def _queue_is_empty(self) -> bool:
        return self.queue.next_visible() is None

    async def _all_ended(self) -> None:
        while self._running:
            await asyncio.wait(list(self._running))

    # Lambda ------------------------------------------------------------------------------------------------

    def begin(self, work: Any) -> asyncio.Task[Any]:
        """Run something concurrently; the story does not end before it has ended."""
        # It belongs to no machine, also if a machine caused it.
        nobodys = copy_context()
        nobodys.run(MACHINE.set, None)
        task = asyncio.create_task(work, context=nobodys)
        self._running[task] = None
        task.add_done_callback(self._running.pop)
        return task

    async def _poll(self) -> None:
        """Hand visible messages to workers, as the event source mapping does."""
        while True:
            self.queue.stirred.clear()
            consumer = self.mapping.stored
            most = min(consumer.maximum_concurrency or 0, self.story.fleet)
            now = self.time.now()
            due = self.queue.next_visible()
            free = consumer.enabled and len(self.busy) < most
            if free and due is not None and due <= now:
                batch = self.queue.deliver(self.story.batch_size)
                self.begin(self._invoke(batch))
                await asyncio.sleep(0.1)
                continue
            pause: float | None = 1.0
            if not self.busy and (due is None or due > now):
                pause = None if due is None else (due - now) / 1000
            try:
                await asyncio.wait_for(self.queue.stirred.wait(), pause)
            except TimeoutError:
                continue

    async def _invoke(self, batch: Sequence[Received]) -> None:
        idle = [each for each in self.environments if each not in self.busy]
        again = bool(idle) and self.rng.random() < 0.8
        environment = self.rng.choice(idle) if again else self._new_environment()
        machine = environment.machine
        self.busy.append(environment)
        self._invocations += 1
        owner = f"invocation-{self._invocations}"
        environment.line.owner = owner
        environment.held = {message.receipt: message for message in batch}
        environment.invoked_at = self.time.now()
        who = " ".join(self.about(message) for message in batch)
        self.record(machine, f"receives {who} as {owner}")
        remaining = self.rng.choice(self.story.timeouts_ms)
        stop_at = machine.now() + remaining - min(LAST_MS, remaining // 4)
        task = machine.spawn(
            RunJobs(self.queue, self.jobs, environment.worker)(batch, stop_at, owner), owner
        )
        try:
            await asyncio.wait({task}, timeout=remaining / 1000)
            if not task.done():
                machine.kill("the invocation timed out")
            if machine.is_alive:
                self._answered(environment, batch, task)
        finally:
            self.busy.remove(environment)
            if not machine.is_alive:
                self.environments.remove(environment)
                await machine.ended()
            environment.held = {}
            self.queue.stirred.set()

    def _answered(
        self, environment: Environment, batch: Sequence[Received], task: asyncio.Task[list[str]]
    ) -> None:
        """Delete what is done, as Lambda does after an invocation; all of it stays when the invocation failed."""
        machine = environment.machine
        if machine.tasks:
            names = sorted(task.get_name() for task in machine.tasks)
            self.fail("nothing goes on in a frozen worker", f"{machine.name}: {names}")
        error = task.exception()
        if error is not None:
            self.fail("a batch always has its result", f"{machine.name}: {error!r}")
            return
        if environment.worker.memory.used:
            left = environment.worker.memory.used
            self.fail("memory is given back", f"{machine.name} keeps {left} bytes")
        not_done = task.result()
        for message in batch:
            if message.message_id not in not_done:
                self.acknowledge(machine, message)

    def acknowledge(self, machine: Machine, message: Received) -> None:
        """Delete a message."""
        self.record(machine, f"done with {self.about(message)}")
        self.queue.delete([message])

    def _new_environment(self) -> Environment:
        machine = self.machine("worker", Party.WORKER)
        environment = Environment(self, machine)
        self.environments.append(environment)
        return environment

    def machine(self, kind: str, party: Party) -> Machine:
        """Start a machine, with a clock of its own."""
        self._machines += 1
        skew = self.rng.randrange(-self.story.skew_ms, self.story.skew_ms + 1)
        machine = Machine(self, f"{kind}-{self._machines}", party, skew)
        self.machines.append(machine)
        if party is Party.WORKER:
            self.worker_machines.append(machine)
        return machine

    async def function(
        self, kind: str, party: Party, body: Callable[[Machine], T], most_ms: int = FUNCTION_MS
    ) -> T | None:
        """Run a function that blocks on a machine of its own; None when the machine dies."""
        machine = self.machine(kind, party)
        task = machine.spawn(machine.run_blocking(lambda: body(machine)), machine.name)
        await asyncio.wait({task}, timeout=most_ms / 1000)
        if not task.done():
            machine.kill("the function timed out")
        if not machine.is_alive:
            await machine.ended()
            return None
        try:
            return task.result()
        except StoreBusy as busy:
            self.record(machine, f"failed: {busy}")
            return None
        except Exception as error:  # noqa: BLE001 - what it is, is the finding
            self.fail("a function always has its result", f"{machine.name}: {error!r}")
            return None

    # What is not a worker ----------------------------------------------------------------------------------

    async def _tick(self) -> None:
        """Govern and sweep once a minute; dead letters are taken as they come."""
        while True:
            await asyncio.sleep(TICK_MS / 1000)
            if self._is_quiet():
                continue
            self.begin(self.tick())
            for message, reason in self.queue.rejected[self.seen_dead_letters :]:
                self.begin(self._dead_letter(message, reason))
            self.seen_dead_letters = len(self.queue.rejected)

    def _is_quiet(self) -> bool:
        """Return whether a run would find nothing to do."""
        now = self.time.now()
        due = min((each.due_at for _, each in self.jobs.due_jobs.values()), default=None)
        visible = self.queue.next_visible()
        return (
            not self.busy
            and self.mapping.stored.enabled
            and self.notes.at is None
            and len(self.queue.rejected) == self.seen_dead_letters
            and self.files.is_quiet
            and (due is None or due > now)
            and (visible is None or visible > now + TICK_MS)
        )

    async def tick(self) -> None:
        """One scheduled run."""
        await self.function("governor", Party.SWEEP, self._govern_and_sweep)

    def _govern_and_sweep(self, machine: Machine) -> None:
        limits, queue, pool = Through(self.limits), Through(self.queue), Through(self.pool_written)
        jobs: Any = Through(self.jobs)
        mapping, notes = Through(self.mapping), Through(self.notes)
        governor = Governor(
            [Governed("jobs", mapping, queue.backlog, notes, self.story.fleet)],
            limits,
            pool,
            AccountLimit(),
            machine,
            self.events,
        )
        sweep = Sweep(
            jobs,
            jobs,
            Through(self.ledger),
            queue,
            limits,
            pool,
            self.rules.model_groups,
            machine,
            self.events,
        )
        stop_at = machine.now() + 50 * SECOND
        try:
            governor()
        finally:
            try:
                sweep(stop_at)
            finally:
                try:
                    if self.story.lane is not None:
                        self.files.lane.start_steps(machine)()
                finally:
                    if self.story.uploads:
                        self.files.resume(machine)(stop_at)

    async def _dead_letter(self, message: Received, reason: str) -> None:
        def take(machine: Machine) -> bool:
            use_case = TakeDeadLetter(
                Through(self.jobs),
                Through(self.graveyard),
                Through(self.ledger),
                machine,
                self.events,
            )
            return use_case(DeadLetter(message, reason))

        taken: bool | None = False
        while not taken:
            taken = await self.function("dead-letters", Party.DEAD_LETTERS, take)
            await asyncio.sleep(6)

    async def redrive(self) -> None:
        """Have an operator make the jobs of all dead letters runnable again."""

        def again(machine: Machine) -> int:
            redriver = Redriver(
                Through(self.jobs), Through(self.params), Through(self.limits),
                Through(self.graveyard), self.rules.prices, self.rules.model_groups, machine,
            )  # fmt: skip
            found = redriver.candidates(redriver.letters())
            return sum(redriver.redrive(each).hindrance is None for each in found)

        await self.function("operator", Party.OPERATOR, again)

    async def _client(self, order: Order) -> None:
        """A caller: submits, tries again when nothing was answered, perhaps cancels."""
        await asyncio.sleep(order.at_ms / 1000)
        waiting = list(order.names)
        for _ in range(order.tries):
            await self._submitted(order, waiting)
            waiting = [name for name in waiting if name not in self._accepted_names()]
            if not waiting:
                break
            await asyncio.sleep(order.try_again_ms / 1000)
        if order.cancel_after_ms is not None:
            await asyncio.sleep(order.cancel_after_ms / 1000)
            await self.cancel(order.names[0])

    def _accepted_names(self) -> set[str]:
        return {self.name_of(job_id) for job_id in self.accepted}

    async def _submitted(self, order: Order, names: Sequence[str]) -> None:
        def post(machine: Machine) -> list[Outcome]:
            use_case = Submit(
                Through(self.jobs),
                Through(self.params),
                Through(self.queue),
                machine,
                self.rng.randbytes,
                self.events,
            )
            return use_case([order.submission(name) for name in names], Sender(order.tenant))

        outcomes = await self.function("api", Party.API, post)
        for name, outcome in zip(names, outcomes or (), strict=False):
            if isinstance(outcome, Accepted):
                job_id = outcome.job.job_id
                self.accepted[job_id] = order
                self.note(f"{name} is accepted")
                for check in self.checks:
                    check.accepted(self, job_id)
            else:
                self.note(f"{name} is refused: {outcome.error}")

    async def cancel(self, name: str, tenant: str | None = None) -> None:
        """Cancel a job, as its caller may at any time; another tenant may not."""
        if name not in self.names:
            return

        before = self.jobs.stored[self.names[name]]

        def ask(machine: Machine) -> bool:
            account = Account(
                tenant or before.tenant,
                Through(self.jobs),
                Through(self.results),
                Through(self.limits),
                Through(self.ledger),
                machine,
                self.events,
            )
            try:
                account.cancel(self.names[name])
            except JobNotFound:
                return False
            return True

        if not await self.function("api", Party.API, ask):
            return
        if tenant not in {None, before.tenant}:
            self.fail("tenants are apart", f"{tenant} could cancel {name}")
        else:
            for check in self.checks:
                check.canceled(self, before)

    # What is taken down ------------------------------------------------------------------------------------

    def on_write(self, before: Job | None, after: Job) -> None:
        """Take down a new version of a job."""
        if before is None and after.custom_id is not None:
            self.names[after.custom_id] = after.job_id
        write = Write(self.time.now(), self.writer, before, after)
        self.writes.append(write)
        if after.state.is_final and after.webhook is not None:
            self.outbox.ended(after)
        for check in self.checks:
            check.wrote(self, write)

    def on_group(self, before: Group | None, after: Group) -> None:
        """Take down a new version of a limit group."""
        for check in self.checks:
            check.wrote_group(self, before, after)

    def on_bytes(self, machine: Machine) -> None:
        """Take down that a worker holds more of a request or an answer than before."""
        for check in self.checks:
            check.holds_more(self, machine)

    def on_receipts(self, messages: Sequence[Received]) -> None:
        """Take down which receipts a worker uses."""
        if self.writer is not None:
            for check in self.checks:
                check.used_receipts(self, self.writer, messages)

    def on_refill(self, messages: Sequence[Received]) -> None:
        """Take down which messages a worker took itself."""
        environment = self.environment_of(self.writer) if self.writer is not None else None
        if environment is not None:
            environment.held.update((message.receipt, message) for message in messages)

    def on_delete(self, messages: Sequence[Received]) -> None:
        """Take down which messages are about to be deleted."""
        for check in self.checks:
            for message in messages:
                check.acknowledged(self, message)

    def on_death(self, machine: Machine) -> None:
        """Take down a death."""
        self.dead.append(machine)
        for check in self.checks:
            check.died(self, machine)

    def fail(self, check: str, what: str) -> None:
        """Note that a promise was broken."""
        self.violations.append(Violation(check, what, self.time.now()))
        self.note(f"BROKEN: {check}: {what}")

    def note(self, text: str) -> None:
        """Add a line to the history that belongs to no machine."""
        self.history.append((self.time.now(), "", text, "", ()))

    def record(
        self, machine: Machine, what: str, verb: str = "", args: tuple[Any, ...] = ()
    ) -> None:
        """Add a line to the history."""
        self.history.append((self.time.now(), machine.name, what, verb, args))

    @property
    def is_troubled(self) -> bool:
        """Whether any worker died, or met a store that was busy."""
        return any(each.died_at is not None or each.troubles for each in self.worker_machines)

    @property
    def has_troubled_functions(self) -> bool:
        """Whether any function died, or met a store that was busy."""
        return any(each.died_at is not None or each.troubles for each in self.machines)

    @property
    def facts(self) -> LaneFacts:
        """Return what the story says of the batch lane."""
        assert self.story.lane is not None
        return self.story.lane

    def home_of(self, key: UpstreamKey) -> Home:
        """Return where a key really belongs, whatever the pool says."""
        return self.story.homes.get(key.id) or Home(key.organization or ORGANIZATION)

    def environment_of(self, machine: Machine) -> Environment | None:
        """Return the environment that a worker's machine is."""
        return next((each for each in self.environments if each.machine is machine), None)

    def name_of(self, job_id: str) -> str:
        """Return the `custom_id` a job is called by in this story."""
        job = self.jobs.stored.get(job_id)
        return (job.custom_id if job else None) or job_id

    def about(self, message: Received) -> str:
        """Return a message in few words."""
        what = self.name_of(message.job_id) if message.job_id else "a strange message"
        return f"{what} ({message.receipt})"

    def draw_call_ms(self) -> int:
        """Return how long an ordinary call takes."""
        return self.rng.choice(self.story.call_ms)

    def lines(self) -> Iterator[str]:
        """Return the history in readable lines."""
        for at, who, what, verb, args in self.history:
            seconds = (at - START) / 1000
            clock = datetime.fromtimestamp(at / 1000, UTC).strftime("%d %H:%M:%S")
            detail = f": {verb} {self._shown(verb, args)}" if verb else ""
            yield f"{clock} {seconds:12.3f}  {who:15} {what}{detail}".rstrip()

    def _shown(self, verb: str, args: tuple[Any, ...]) -> str:
        return ", ".join(self._word(verb, each) for each in args)

    def _word(self, verb: str, value: Any) -> str:  # noqa: PLR0911 - one line per kind
        if isinstance(value, Job):
            lease = f" until {(value.lease.until - START) / 1000:.0f} s" if value.lease else ""
            owner = f" by {value.lease.owner}{lease}" if value.lease else ""
            return (
                f"{value.custom_id} v{value.version} {value.state}{owner} "
                f"attempts {value.attempts_used} snoozes {value.snoozes}"
            )
        if isinstance(value, Group):
            return f"{value.id} v{value.version}"
        if isinstance(value, str):
            return self.name_of(value)
        if isinstance(value, tuple | list):
            return "[" + ", ".join(self._word(verb, each) for each in value) + "]"
        if isinstance(value, Received):
            return self.about(value)
        job_id = getattr(value, "job_id", None)
        if isinstance(job_id, str):
            return self.name_of(job_id)
        return json.dumps(value) if isinstance(value, int | None) else type(value).__name__


WITH_THREADS: Final = (submitting, sweeping, burying, joining)


@contextmanager
def _one_by_one() -> Iterator[None]:
    before = [vars(module)["ThreadPoolExecutor"] for module in WITH_THREADS]
    for module in WITH_THREADS:
        vars(module)["ThreadPoolExecutor"] = OneByOne
    try:
        yield
    finally:
        for module, executor in zip(WITH_THREADS, before, strict=True):
            vars(module)["ThreadPoolExecutor"] = executor
