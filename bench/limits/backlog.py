"""A backlog far above the limit, on a virtual clock: `python -m bench.limits.backlog`.

The real worker, limiter, governor and sweep stand before a queue of 100,000 jobs that may start at 50 a minute. The
queue is SQS's as far as it matters here: it hides what is received, holds at most 120,000 messages in flight, and is
fair between message groups (the group with less in flight first). Two hours are played, in three stories:

    steady    the limit is all there is in the way
    blocked   the backlog's limit group answers 429 for ten minutes at a time, and another group has jobs now and then
    capped    the same with a spend limit, which parks the jobs
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import random
import sys
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from rich.console import Console
from rich.table import Table

from bench.limits.virtual import STOP_SECONDS, STORE_MS, VirtualClaude
from scripts.claude_simulator import settings
from scripts.claude_simulator.engine import Engine
from sluice.domain.capacity import Backlog
from sluice.domain.keys import UpstreamKey
from sluice.domain.models import model_group
from sluice.domain.retries import RetryPolicy
from sluice.intake.submit import Sender, Submission, Submit
from sluice.ports.jobs import Pointer, Received
from sluice.upkeep.governor import Governed, Governor
from sluice.upkeep.sweep import Sweep
from sluice.wiring.shared import model_groups, prices
from sluice.worker.queue_source import RunJobs
from sluice.worker.tools import Rules, Tools
from sluice.worker.worker import Worker
from tests.fakes import (
    VISIBILITY_MS,
    AccountLimit,
    DirectCalls,
    MemoryGovernorNotes,
    MemoryJobs,
    MemoryLedger,
    MemoryLimits,
    MemoryMapping,
    MemoryParams,
    MemoryResults,
    PoolWritten,
    RecordingEvents,
    StaticKeyPool,
    VirtualClock,
    VirtualTime,
)

CEILING: Final = 120_000
"""Messages in flight that SQS allows (standard queue)."""

BATCH: Final = 50
MAPPING: Final = 10
"""Workers at the start, as in template.yaml; the governor goes on from there."""

BULK, OTHER = "claude-haiku-5-5", "claude-sonnet-5-5"
OTHER_EVERY_SECONDS: Final = 20
MEMORY_GB: Final = 0.5
STORIES: Final = {
    "steady": "",
    "blocked": "sim:429,retry_after=600",
    "capped": "sim:spend_cap",
}


@dataclass(eq=False, slots=True)
class _Message:
    message_id: str
    job_id: str
    group: str
    receive_count: int = 0


class FairQueue:
    """The jobs queue, large: hides the messages it delivers, counts those in flight, and is fair between groups."""

    def __init__(self, time: VirtualTime) -> None:
        self._time = time
        self._visible: dict[str, deque[_Message]] = defaultdict(deque)
        self._hidden: list[tuple[int, int, _Message]] = []
        self._until: dict[str, int] = {}
        """Of the messages in flight: when each is visible again."""
        self._in_flight: dict[str, int] = defaultdict(int)
        self._count = 0
        self.receives = 0
        self.most_in_flight = 0

    def send(self, jobs: Sequence[Pointer]) -> list[str]:
        """As the port."""
        for job in jobs:
            self._count += 1
            group = f"{job.tenant}/{model_group(job.model, model_groups(), job.tenant)}"
            self._visible[group].append(_Message(f"m{self._count}", job.job_id, group))
        return []

    def deliver(self, most: int, hidden_ms: int = VISIBILITY_MS) -> list[Received]:
        """Receive as the mapping does: the group with the fewest messages in flight first."""
        self._reappear()
        given: list[Received] = []
        groups = sorted((each for each in self._visible if self._visible[each]), key=self._noise)
        for group in groups:
            while self._visible[group] and len(given) < most and len(self._until) < CEILING:
                given.append(self._hide(self._visible[group].popleft(), hidden_ms))
        self.receives += len(given)
        self.most_in_flight = max(self.most_in_flight, len(self._until))
        return given

    def receive(self, most: int, hidden_ms: int) -> list[Received]:
        """Receive as a worker does."""
        return self.deliver(min(most, 10), hidden_ms)

    def put_back(self, delays: Sequence[tuple[Received, int]]) -> None:
        """As the port."""
        for message, delay_ms in delays:
            if message.message_id in self._until:
                self._set_until(self._known(message), self._time.now() + delay_ms)

    def keep_hidden(self, messages: Sequence[Received], milliseconds: int) -> None:
        """As the port."""
        self.put_back([(message, milliseconds) for message in messages])

    def delete(self, messages: Sequence[Received]) -> None:
        """As the port."""
        for message in messages:
            if self._until.pop(message.message_id, None) is not None:
                self._in_flight[message.body] -= 1

    def reject(self, message: Received, reason: str) -> None:
        """Not expected here."""
        raise AssertionError(f"unexpected rejection: {message.message_id}, {reason}")

    def depth(self) -> int:
        """As the port."""
        return self.backlog().total

    def backlog(self) -> Backlog:
        """As the port."""
        self._reappear()
        return Backlog(sum(map(len, self._visible.values())), len(self._until))

    def _noise(self, group: str) -> int:
        return self._in_flight[group]

    def _hide(self, message: _Message, hidden_ms: int) -> Received:
        message.receive_count += 1
        self._in_flight[message.group] += 1
        self._set_until(message, self._time.now() + hidden_ms)
        return Received(
            message.message_id,
            "",
            message.group,
            message.job_id,
            receive_count=message.receive_count,
        )

    def _known(self, message: Received) -> _Message:
        return _Message(
            message.message_id, message.job_id or "", message.body, message.receive_count
        )

    def _set_until(self, message: _Message, until: int) -> None:
        self._until[message.message_id] = until
        self._count += 1
        heapq.heappush(self._hidden, (until, self._count, message))

    def _reappear(self) -> None:
        now = self._time.now()
        while self._hidden and self._hidden[0][0] <= now:
            until, _, message = heapq.heappop(self._hidden)
            if self._until.get(message.message_id) == until:
                del self._until[message.message_id]
                self._in_flight[message.group] -= 1
                self._visible[message.group].append(message)


@dataclass(slots=True)
class Story:
    """What one story came to."""

    name: str
    finished: int = 0
    receives: int = 0
    most_in_flight: int = 0
    invocations: int = 0
    most_alive: int = 0
    alive_seconds: float = 0.0
    parked: int = 0
    delays: list[float] = field(default_factory=list)
    """Seconds the other group's jobs waited for their start."""
    first: tuple[int, int] = (0, 0)
    """Receives and finished jobs of the time before the governor had acted."""


class Backlogged:
    """The stack before its backlog."""

    def __init__(self, name: str, jobs: int, seed: int) -> None:
        self.story = Story(name)
        self.time = VirtualTime()
        limits = {"default": {"rpm": 50}, "sonnet-5-5": {"rpm": 1000}}
        config = {"organisations": [{"id": "one", "keys": ["sk-ant-test-one"], "limits": limits}]}
        self.engine = Engine(
            settings.read(config),
            clock=lambda: self.time.start * 1_000_000 + round(self.time.seconds * 1e9),
        )
        self.jobs, self.params, self.limits = MemoryJobs(), MemoryParams(), MemoryLimits()
        self.queue, self.mapping = FairQueue(self.time), MemoryMapping(MAPPING, BATCH)
        self.events, self.chance = RecordingEvents(), random.Random(seed)  # noqa: S311 - no secret
        self.count, self.alive, self.marker = jobs, 0, STORIES[name]
        clock = VirtualClock(self.time)
        pool = PoolWritten(self.time.start - 86_400_000)
        self.submit = Submit(
            self.jobs, self.params, self.queue, clock, self.chance.randbytes, self.events
        )
        self.governor = Governor(
            [Governed("jobs", self.mapping, self.queue.backlog, MemoryGovernorNotes(), 100)],
            self.limits,
            pool,
            AccountLimit(),
            clock,
            self.events,
        )
        self.sweep = Sweep(
            self.jobs,
            self.jobs,
            MemoryLedger(),
            self.queue,
            self.limits,
            pool,
            model_groups(),
            clock,
            self.events,
        )
        self.tools = Tools(
            jobs=self.jobs,
            params=self.params,
            results=MemoryResults(),
            limits=self.limits,
            keys=StaticKeyPool(UpstreamKey("one", "sk-ant-test-one")),
            claude=VirtualClaude(self.engine),
            ledger=MemoryLedger(),
            clock=clock,
            jitter=self.chance.random,
            blocking=DirectCalls(STORE_MS),
            events=self.events,
        )

    def play(self, minutes: int) -> Story:
        """Play this many minutes."""
        self._add(BULK, self.count, self.marker)
        try:
            self.time.run(self._play(minutes))
        finally:
            self.time.close()
        story = self.story
        story.receives, story.most_in_flight = self.queue.receives, self.queue.most_in_flight
        everything = self.jobs.stored.values()
        story.finished = sum(job.state.is_final for job in everything)
        story.parked = sum(job.not_before is not None for job in everything)
        story.delays = [
            ((job.started_at or self.time.now()) - job.created_at) / 1000
            for job in everything
            if job.model == OTHER
        ]
        return story

    async def _play(self, minutes: int) -> None:
        tasks = [asyncio.ensure_future(each) for each in (self._pumps(), self._schedule())]
        if self.marker:
            tasks.append(asyncio.ensure_future(self._others()))
        await asyncio.sleep(minutes * 60)
        for each in asyncio.all_tasks():
            if each is not asyncio.current_task():
                each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(5)

    def _add(self, model: str, count: int, marker: str) -> None:
        params = {"model": model, "max_tokens": 200, "messages": [{"role": "user", "content": "?"}]}
        if marker:
            params["metadata"] = {"user_id": marker}
        for at in range(0, count, 1000):
            size = min(1000, count - at)
            self.submit([Submission(params)] * size, Sender("bench"))

    async def _others(self) -> None:
        while True:
            await asyncio.sleep(OTHER_EVERY_SECONDS)
            self._add(OTHER, 1, "")

    async def _schedule(self) -> None:
        while True:
            await asyncio.sleep(60)
            self.governor()
            self.sweep(self.time.now() + 50_000)
            finished = sum(job.state.is_final for job in self.jobs.stored.values())
            if self.time.seconds <= 5 * 60:
                self.story.first = (self.queue.receives, finished)

    async def _pumps(self) -> None:
        """The mapping: as many invocations at a time as it allows, each on a batch of what is visible."""
        idle: list[Worker] = []
        while True:
            await asyncio.sleep(0.25)
            consumer = self.mapping.stored
            while consumer.enabled and self.alive < (consumer.maximum_concurrency or MAPPING):
                messages = self.queue.deliver(BATCH)
                if not messages:
                    break
                worker = idle.pop() if idle else Worker(self.tools, self._rules())
                asyncio.ensure_future(self._invoke(worker, messages, idle))  # noqa: RUF006 - canceled at the end
                self.alive += 1
                self.story.most_alive = max(self.story.most_alive, self.alive)

    async def _invoke(self, worker: Worker, messages: list[Received], idle: list[Worker]) -> None:
        began, owner = self.time.seconds, f"invocation-{self.story.invocations}"
        self.story.invocations += 1
        try:
            stop_at = self.time.now() + STOP_SECONDS * 1000
            not_done = await RunJobs(self.queue, self.jobs, worker)(messages, stop_at, owner)
            self.queue.delete([each for each in messages if each.message_id not in not_done])
        finally:
            self.alive -= 1
            self.story.alive_seconds += self.time.seconds - began
        idle.append(worker)

    @staticmethod
    def _rules() -> Rules:
        return Rules(RetryPolicy(), prices(), model_groups())


def parser() -> argparse.ArgumentParser:
    """Return what the command line may name."""
    made = argparse.ArgumentParser(prog="python -m bench.limits.backlog", description=__doc__)
    made.add_argument("--only", choices=list(STORIES), action="append", help="may be repeated")
    made.add_argument("--jobs", type=int, default=100_000, help="in the backlog (100000)")
    made.add_argument("--minutes", type=int, default=120, help="played (120)")
    made.add_argument("--seed", type=int, default=1)
    return made


def main(arguments: list[str] | None = None) -> int:
    """Play the stories and print a table."""
    chosen = parser().parse_args(arguments)
    table = Table("story", "jobs", "finished", "receives per finished job", "most in flight",
                  "most alive", "alive on average", "GB s per 1,000 jobs", "parked", "others waited, s")  # fmt: skip
    for name in chosen.only or STORIES:
        told = Backlogged(name, chosen.jobs, chosen.seed).play(chosen.minutes)
        table.add_row(
            name,
            f"{chosen.jobs:,}",
            f"{told.finished:,}",
            f"{told.receives / max(1, told.finished):.2f}",
            f"{told.most_in_flight:,}",
            str(told.most_alive),
            f"{told.alive_seconds / 60 / chosen.minutes:.1f}",
            f"{told.alive_seconds * MEMORY_GB * 1000 / max(1, told.finished):,.0f}",
            f"{told.parked:,}",
            f"{max(told.delays):.1f}" if told.delays else "",
        )
    Console(highlight=False, width=None if sys.stdout.isatty() else 160).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
