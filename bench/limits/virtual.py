"""The same scenarios on a virtual clock: `python -m bench.limits.virtual`. Minutes take seconds, and chance is a seed.

The worker, its limiter and Claude's buckets are the real ones; AWS is the tests' fakes, the network a delay, Lambda a
pump with cold starts. Good for comparing rules under many seeds and numbers of workers; it knows nothing of processor
time, so the figures that count are those of `python -m bench.limits`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from bench.limits.ideal import ideal_seconds
from bench.limits.runners import IN_FLIGHT, Task
from bench.limits.scenarios import HIDDEN, SCENARIOS, Scenario
from bench.limits.scoring import Calls, calls_of, rows_of, score, seconds_until_followed, taken_by
from scripts.claude_simulator import params_hash, settings
from scripts.claude_simulator.accounts import Refused
from scripts.claude_simulator.engine import Call, Engine
from scripts.claude_simulator.faults import Failure as SimulatedFailure
from scripts.claude_simulator.faults import Place
from sluice.adapters import job_records
from sluice.adapters.claude_answers import limit_headers
from sluice.bulk.assemble import Assemble, JoinAtOnce
from sluice.bulk.lane_choice import LaneChoice
from sluice.bulk.plan import PlanBatch
from sluice.domain.batches import Options, Phase
from sluice.domain.keys import UpstreamKey
from sluice.domain.pricing import Usage
from sluice.domain.retries import Failure, RetryPolicy
from sluice.intake.batches import Batches, Create
from sluice.intake.submit import Sender, Submission, Submit
from sluice.ports.claude import Answer, CallRequest, Headers
from sluice.ports.claude import Refused as NoAnswer
from sluice.wiring.shared import model_groups, prices
from sluice.worker.queue_source import RunJobs
from sluice.worker.range_claim import RangeTools
from sluice.worker.range_rows import WindowRows
from sluice.worker.ranges import RunRange
from sluice.worker.tools import Rules, Tools
from sluice.worker.worker import Worker
from tests.bulk_fakes import (
    MemoryBatches,
    MemoryBatchQueues,
    MemoryNotices,
    MemoryObjects,
    MemoryUpstreamRecords,
)
from tests.fakes import (
    DirectCalls,
    MemoryJobs,
    MemoryLedger,
    MemoryLimits,
    MemoryParams,
    MemoryQueue,
    MemoryResults,
    RecordingEvents,
    StaticKeyPool,
    VirtualClock,
    VirtualTime,
)

Json = dict[str, Any]

BATCH: Final = 50
WINDOW_SECONDS: Final = 1.0
"""Both as in template.yaml."""

POLL_SECONDS: Final = 0.1
STORE_MS: Final = 8
NETWORK_SECONDS: Final = 0.01
CORES: Final = 2
COLD_SECONDS: Final = 1.7
"""Imports on a core of one's own."""

POST_SECONDS: Final = 0.25
"""A list of 100 jobs."""

PLAN_SECONDS: Final = 0.2
"""From the create to the range messages, when another function plans."""

JOIN_SECONDS: Final = 0.2
STOP_SECONDS: Final = 885
VERSION: Final = "2026-10-21"
RATE_LIMITED: Final = 429


@dataclass(frozen=True, slots=True)
class Played:
    """What one run came to."""

    scenario: str
    workers: int
    seed: int
    score: float
    seconds: float
    ideal: float
    lost: int
    calls: Calls
    writes_per_1000: float
    receives_per_job: float
    followed: tuple[float | None, ...]


class VirtualClaude:
    """The simulator's engine behind the port, a network's delay away."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def send(self, request: CallRequest) -> Answer | NoAnswer:
        """Make the call, once."""
        await asyncio.sleep(NETWORK_SECONDS)
        try:
            return await self._sent(request)
        finally:
            await asyncio.sleep(NETWORK_SECONDS)

    async def _sent(self, request: CallRequest) -> Answer | NoAnswer:
        engine = self._engine

        def now() -> int:
            return engine.clock() // 1_000_000

        decided = decide(engine, request.key.api_key, request.body.data)
        request.body.release()
        if isinstance(decided, Refused):
            return NoAnswer(
                _failure(decided.failure), limit_headers(_texts(decided.headers), now())
            )
        try:
            if request.early:
                await asyncio.sleep(max(0, decided.first_token_at - engine.clock()) / 1e9)
                request.on_headers(limit_headers(_texts(engine.answer_headers(decided)), now()))
            await wait_for(engine, decided)
            usage = decided.usage()
            headers = limit_headers(_texts(engine.answer_headers(decided)), now())
        finally:
            engine.finish(decided, 200, delivered=decided.place is None)
        if decided.place is Place.DROP_AFTER:
            return NoAnswer(Failure("connection_error", "cut", may_be_billed=True), Headers())
        message = json.dumps({"content": [], "stop_reason": "end_turn"})
        return Answer(message, Usage.from_message(usage), "end_turn", "req", headers)


def decide(engine: Engine, key: str, body: bytes) -> Call | Refused:
    """Let the engine decide a call."""
    caller = engine.authenticate(key, VERSION)
    if isinstance(caller, Refused):
        return caller
    return engine.message(caller, body, engine.request_id())


async def wait_for(engine: Engine, call: Call) -> None:
    """Wait until the answer has been produced."""
    await asyncio.sleep(max(0, call.ends_at - engine.clock()) / 1e9)


def _texts(headers: list[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in headers}


def _failure(said: SimulatedFailure) -> Failure:
    if not said.status:
        return Failure("connection_error", "cut", may_be_billed=True)
    seconds = said.retry_after_seconds
    return Failure(
        said.type,
        said.message,
        said.status,
        said.error_code,
        None if seconds is None else seconds * 1000,
    )


class Play:
    """One scenario, from the first submission to the last answer."""

    def __init__(self, task: Task, workers: int, seed: int) -> None:
        self.task = task
        self.workers = workers
        self.time = VirtualTime(longest_story_ms=int(task.hard_seconds * 1000) + 3_600_000)
        self.engine = Engine(
            settings.read(task.scenario.simulator(seed)),
            clock=lambda: self.time.start * 1_000_000 + round(self.time.seconds * 1e9),
        )
        self.jobs = MemoryJobs()
        self.limits = MemoryLimits()
        self.queue = MemoryQueue(self.time.now)
        self.params = MemoryParams()
        self.results, self.ledger = MemoryResults(), MemoryLedger()
        self.events = RecordingEvents()
        self.chance = random.Random(seed)  # noqa: S311 - not a secret
        self.made: list[Worker] = []
        self.is_over = False
        self.pool = StaticKeyPool(
            *(UpstreamKey(each.id, each.key) for each in task.scenario.organisations)
        )
        self.idle = [self._new_worker()]
        """Warm workers; one is, because the stack has just proved itself."""
        self.importing = 0

    def run(self, seed: int) -> Played:
        """Play it to the end."""
        try:
            seconds = self.time.run(self._play())
        finally:
            self.time.close()
        return self._scored(seconds, seed)

    async def _play(self) -> float:
        others = [asyncio.ensure_future(each) for each in (self._midway(), self._stranger())]
        pumps = [asyncio.ensure_future(self._pump(each)) for each in range(self.workers)]
        await self._submit()
        while not self._has_ended():
            await asyncio.sleep(0.05)
            if self.time.seconds > self.task.hard_seconds:
                break
        ended = self._ended_at()
        self.is_over = True
        for each in others:
            each.cancel()
        await asyncio.gather(*pumps)
        await asyncio.gather(*others, return_exceptions=True)
        return (ended - self.time.start) / 1000

    def _has_ended(self) -> bool:
        return all(job.state.is_final for job in self.jobs.stored.values())

    def _ended_at(self) -> int:
        return max((job.finished_at or 0 for job in self.jobs.stored.values()), default=0)

    def _done(self) -> int:
        return sum(job.state == "succeeded" for job in self.jobs.stored.values())

    def _receives(self) -> int:
        return self.queue.receives

    async def _submit(self) -> None:
        submit = Submit(
            self.jobs,
            self.params,
            self.queue,
            VirtualClock(self.time),
            self.chance.randbytes,
            self.events,
        )
        asked = [Submission(params) for params in self.task.requests]
        for at in range(0, len(asked), 100):
            await asyncio.sleep(POST_SECONDS)
            submit(asked[at : at + 100], Sender("bench"))

    def _new_worker(self) -> Worker:
        return self._worker_of(self.jobs, self.params, self.results, self.ledger)

    def _worker_of(self, jobs: Any, params: Any, results: Any, ledger: Any) -> Worker:
        tools = Tools(
            jobs=jobs,
            params=params,
            results=results,
            limits=self.limits,
            keys=self.pool,
            claude=VirtualClaude(self.engine),
            ledger=ledger,
            clock=VirtualClock(self.time),
            jitter=self.chance.random,
            blocking=DirectCalls(STORE_MS),
            events=self.events,
        )
        worker = Worker(tools, Rules(RetryPolicy(), prices(), model_groups()))
        self.made.append(worker)
        return worker

    async def _pump(self, number: int) -> None:
        """One of the invocations that may run at a time; like Lambda it takes a warm worker where there is one."""
        for invocation in range(1_000_000):
            messages = await self._batch()
            if not messages:
                return
            worker = await self._environment()
            stop_at = self.time.now() + STOP_SECONDS * 1000
            not_done = await RunJobs(self.queue, self.jobs, worker)(
                messages, stop_at, f"worker-{number}-{invocation}"
            )
            self.queue.delete([each for each in messages if each.message_id not in not_done])
            self.idle.append(worker)

    async def _environment(self) -> Worker:
        if self.idle:
            return self.idle.pop()
        self.importing += 1
        await asyncio.sleep(COLD_SECONDS * max(1.0, self.importing / CORES))
        self.importing -= 1
        return self._new_worker()

    async def _batch(self) -> list[Any]:
        began: float | None = None
        while not self.is_over:
            await asyncio.sleep(POLL_SECONDS * (0.5 + self.chance.random()))
            visible = self.queue.backlog().visible
            if not visible:
                began = None
                continue
            began = self.time.seconds if began is None else began
            if visible >= BATCH or self.time.seconds - began >= WINDOW_SECONDS:
                return self.queue.deliver(BATCH)
        return []

    async def _midway(self) -> None:
        for after_seconds, patch in self.task.scenario.events():
            await asyncio.sleep(max(0.0, after_seconds - self.time.seconds))
            self.engine.configure(patch)

    async def _stranger(self) -> None:
        """Another client as `bench.limits.direct` has it: the SDK with a semaphore."""
        if not self.task.stranger_requests:
            return
        key = self.task.scenario.organisations[0].stranger_key
        gate = asyncio.Semaphore(IN_FLIGHT["sdk"])

        async def one(params: Json) -> None:
            body = json.dumps(params).encode()
            async with gate:
                for _ in range(11):
                    decided = decide(self.engine, key, body)
                    if not isinstance(decided, Refused):
                        await wait_for(self.engine, decided)
                        self.engine.finish(decided, 200, delivered=True)
                        return
                    await asyncio.sleep(decided.failure.retry_after_seconds or 1)

        await asyncio.gather(*(one(params) for params in self.task.stranger_requests))

    def _scored(self, seconds: float, seed: int) -> Played:
        scenario, task = self.task.scenario, self.task
        rows = list(self.engine.ledger())
        own = rows_of(rows, [each.key for each in scenario.organisations])
        others = rows_of(rows, [each.stranger_key for each in scenario.organisations])
        began_at = self.time.start / 1000
        ideal = ideal_seconds(scenario, task.needs, taken_by(others, began_at))
        done = self._done()
        starts = sorted(
            start
            for organisation in self.engine.stats(starts=True)["organisations"].values()
            for group in organisation["model_groups"].values()
            for start in group["starts"]
        )
        self.starts = [start - began_at for start in starts]
        turns = [change.after_seconds for change in scenario.changes]
        writes = sum(worker.limiter.writes for worker in self.made)
        return Played(
            scenario=scenario.name,
            workers=self.workers,
            seed=seed,
            score=score(scenario.jobs, done, ideal, seconds),
            seconds=seconds,
            ideal=ideal,
            lost=scenario.jobs - done,
            calls=calls_of(own, [params_hash(each) for each in task.requests]),
            writes_per_1000=writes * 1000 / max(1, done),
            receives_per_job=self._receives() / max(1, done),
            followed=tuple(
                seconds_until_followed(
                    self.starts,
                    change.after_seconds,
                    change.requests_per_minute / 60,
                    until if until is not None else max(self.starts, default=0.0),
                )
                for change, until in zip(scenario.changes, [*turns[1:], None], strict=False)
            ),
        )


class BatchesPlay(Play):
    """The same through `messages.batches.create`: one batch, its ranges run by the ranges function."""

    def __init__(self, task: Task, workers: int, seed: int) -> None:
        self.rows: dict[Worker, WindowRows] = {}
        super().__init__(task, workers, seed)
        clock = VirtualClock(self.time)
        self.batches = MemoryBatches(self.time.now)
        self.objects = MemoryObjects()
        self.queues = MemoryBatchQueues(self.time.now)
        self.assemble = Assemble(self.batches, self.objects, MemoryNotices(), clock, self.events)
        upstream = MemoryUpstreamRecords()
        self.planner = PlanBatch(
            self.batches, self.objects, self.queues, self.assemble, (), clock, self.events,
            upstream, LaneChoice(upstream, self.limits, self.queues, clock, self.events),
        )  # fmt: skip
        self.invocations = 0

    def _has_ended(self) -> bool:
        return all(each.phase is Phase.ENDED for each in self.batches.stored.values())

    def _ended_at(self) -> int:
        return max((each.ended_at or 0 for each in self.batches.stored.values()), default=0)

    def _done(self) -> int:
        return sum(each.tally.succeeded for each in self.batches.stored.values())

    def _receives(self) -> int:
        return self.invocations

    async def _submit(self) -> None:
        await asyncio.sleep(POST_SECONDS)
        rows = [
            {"custom_id": f"row-{number}", "params": params}
            for number, params in enumerate(self.task.requests)
        ]
        clock = VirtualClock(self.time)
        intake = Batches(
            "bench",
            self.batches,
            self.objects,
            self.queues,
            self.queues,
            clock,
            self.chance.randbytes,
            self.events,
        )
        intake.create(Create(rows, Options()))
        for batch_id in self.queues.plans:
            await asyncio.sleep(PLAN_SECONDS)
            self.planner.plan(batch_id)

    def _new_worker(self) -> Worker:
        rows = WindowRows(VirtualClock(self.time))
        worker = self._worker_of(rows, rows, rows, self.ledger)
        self.rows[worker] = rows
        return worker

    async def _pump(self, number: int) -> None:
        while not self.is_over:
            await asyncio.sleep(POLL_SECONDS * (0.5 + self.chance.random()))
            pointer = self.queues.receive()
            if pointer is None:
                continue
            self.invocations += 1
            worker = await self._environment()
            tools = RangeTools(
                batches=self.batches,
                objects=self.objects,
                queue=JoinAtOnce(lambda: self.assemble, self.queues, self.events),
                backlog=self.queues.backlog,
                returns=self.queues,
                ledger=self.ledger,
                text_of_job=job_records.as_text,
                job_of_text=job_records.of_text,
                clock=VirtualClock(self.time),
                blocking=DirectCalls(STORE_MS),
                events=self.events,
            )
            stop_at = self.time.now() + STOP_SECONDS * 1000
            owner = f"worker-{number}-{self.invocations}"
            if await RunRange(tools, worker, self.rows[worker])(pointer, stop_at, owner):
                self.queues.delete(pointer.message)
            self.idle.append(worker)
            while self.queues.joins:
                joined = self.queues.joins.pop(0)
                await asyncio.sleep(JOIN_SECONDS)
                self.assemble.join(*joined)


PLAYS: Final = {"jobs": Play, "batches": BatchesPlay}
"""By the door that the work comes through."""


def play(scenario: Scenario, workers: int, seed: int, door: str = "jobs") -> Played:
    """Play one scenario."""
    return PLAYS[door](Task.of(scenario, seed), workers, seed).run(seed)


def parser() -> argparse.ArgumentParser:
    """Return what the command line may name."""
    made = argparse.ArgumentParser(prog="python -m bench.limits.virtual", description=__doc__)
    names = [scenario.name for scenario in (*SCENARIOS, *HIDDEN)]
    add = made.add_argument
    add("--only", action="append", choices=names, help="only this scenario (may be repeated)")
    add("--door", default="jobs,batches", help="jobs, batches or both (both)")
    add("--workers", default="4", help="concurrent workers, as in 2,4,20 (4)")
    add("--seeds", default="1", help="as in 1,2,3 or 1-5 (1)")
    add("--jobs-scale", type=float, default=1.0, help="fewer jobs, sooner changes (1.0)")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Play what the command line names, and print a table."""
    chosen = parser().parse_args(arguments)
    table = Table("scenario", "door", "workers", "seed", "score", "seconds", "ideal", "lost", "429s per answer",
                  "billed twice", "avoidable", "writes", "receives", "followed")  # fmt: skip
    status = 0
    for scenario in (*SCENARIOS, *HIDDEN):
        if chosen.only and scenario.name not in chosen.only:
            continue
        scaled = scenario.scaled(chosen.jobs_scale)
        for door, workers, seed in product(
            chosen.door.split(","), _numbers(chosen.workers), _numbers(chosen.seeds)
        ):
            run = play(scaled, workers, seed, door)
            table.add_row(
                run.scenario,
                door,
                str(run.workers),
                str(run.seed),
                f"{run.score:.1%}",
                f"{run.seconds:.1f}",
                f"{run.ideal:.1f}",
                str(run.lost),
                f"{run.calls.rate_limited_per_answer:.3f}",
                str(run.calls.billed_twice),
                str(run.calls.avoidable),
                f"{run.writes_per_1000:.0f}",
                f"{run.receives_per_job:.2f}",
                " ".join("never" if each is None else f"{each:.0f} s" for each in run.followed),
            )
            status = status or (1 if run.lost else 0)
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)
    return status


def _numbers(text: str) -> Iterator[int]:
    for part in text.split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


if __name__ == "__main__":
    sys.exit(main())
