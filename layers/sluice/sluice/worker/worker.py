"""The worker: take jobs from a source, run them side by side, each at the time the limiter gives it, give them back.

A message is either done or continues at a time; nothing else happens to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, assert_never

from sluice.domain import waits
from sluice.domain.errors import StoreBusy
from sluice.domain.jobs import Job
from sluice.domain.waits import Place
from sluice.worker.attempt import Attempt
from sluice.worker.invocation import Again, Done, Ending, Invocation, RequestReader, Wait
from sluice.worker.keys import KeyChoice
from sluice.worker.ledger import Ledger
from sluice.worker.limiter import Limiter
from sluice.worker.memory import BUDGET, Budget, Memory
from sluice.worker.source import Held, Source, Taken
from sluice.worker.tools import Rules, Tools

KEEP_MS: Final = 3_000
"""Pause between two rounds of housekeeping."""

LAST_ROUNDS: Final = 3
"""Tries, at the end of an invocation, to write what a busy store has not accepted."""


class Worker:
    """Runs invocations one after another on one event loop, and keeps what it has learned about limits."""

    def __init__(
        self,
        tools: Tools,
        rules: Rules,
        budget: Budget = BUDGET,
        *,
        memory: Memory | None = None,
    ) -> None:
        """`memory` is that of another worker of the same process, which they share."""
        self.tools = tools
        self.rules = rules
        self.memory = memory or Memory(tools.clock, budget)
        self.limiter = Limiter(
            tools.limits, tools.blocking, tools.clock, tools.jitter, tools.events, rules.waits
        )
        self._ledger = Ledger(tools.ledger, tools.blocking, tools.events)
        self._given_advice: set[str] = set()

    async def book(self) -> None:
        """Write the collected ledger rows, unless the ledger is busy."""
        await self._ledger.keep()

    async def run(self, source: Source, stop_at: int, owner: str) -> None:
        """Run the jobs of a source until it has no more.

        No call lasts beyond `stop_at` (epoch milliseconds). `owner` names this invocation in the leases it takes.
        """
        invocation = Invocation(
            tools=self.tools,
            rules=self.rules,
            limiter=self.limiter,
            keys=KeyChoice(self.tools, self.limiter, self.rules.model_groups, self._given_advice),
            ledger=self._ledger,
            memory=self.memory,
            requests=RequestReader(self.tools),
            held=Held(self.tools.clock, self.memory),
            owner=owner,
            started=self.tools.clock.now(),
            stop_at=stop_at,
        )
        await _Run(invocation, source).run()


class _Run:
    """One invocation's work on a source."""

    def __init__(self, invocation: Invocation, source: Source) -> None:
        self._invocation = invocation
        self._source = source
        self._tools = invocation.tools
        self._events = invocation.tools.events
        self._writing = asyncio.Lock()
        self._taken = 0
        self._given_back = 0

    async def run(self) -> None:
        limiter, held = self._invocation.limiter, self._invocation.held
        writes = limiter.writes
        async with limiter, self._housekeeping():
            while taken := await self._source.take(held):
                self._taken += len(taken)
                for each in taken:
                    task = asyncio.create_task(self._job(each), name=each.message.message_id)
                    held.hold(task)
        self._events.note(
            "batch done",
            messages=self._taken,
            put_back=self._given_back,
            seconds=(self._invocation.now() - self._invocation.started) / 1000,
            limiter_writes=limiter.writes - writes,
            memory_waits=held.memory_waits,
        )

    # Jobs -------------------------------------------------------------------------------------------------------

    async def _job(self, taken: Taken) -> None:
        """Run a job as far as possible in this invocation, then acknowledge or return its message."""
        job = taken.job
        while True:
            ending = await self._attempt(taken, job)
            match ending:
                case Again():
                    job = ending.job
                case Wait() if ending.where is Place.INVOCATION:
                    await self._tools.clock.sleep(ending.until - self._invocation.now())
                    job = ending.job
                case Done() | Wait():
                    return self._release(taken, ending)
                case _:
                    assert_never(ending)

    def _release(self, taken: Taken, ending: Done | Wait) -> None:
        if isinstance(ending, Wait) and ending.where is Place.QUEUE:
            self._given_back += 1
            self._source.give_back(taken.message, ending.until)
        else:
            # Done, or parked: the sweep will send a new message.
            self._source.done(taken.message)

    async def _attempt(self, taken: Taken, job: Job | None) -> Ending:
        """Make one attempt; after any error the job continues later."""
        spread, receives = self._invocation.spread, taken.message.receive_count
        try:
            job = job or await self._tools.blocking(self._tools.jobs.get, taken.job_id)
            if job is not None:
                return await Attempt(self._invocation, taken, job).run()
            # The source decides at its next delivery.
            self._events.problem("job record missing", job_id=taken.job_id)
        except StoreBusy as error:
            self._events.problem("store busy", job_id=taken.job_id, what=error.what)
            delay = waits.STORE_BUSY_MS + spread(waits.STORE_BUSY_MS)
            return self._invocation.until_store(taken.job_id, delay, receives)
        except Exception:  # noqa: BLE001 - after any error the job continues later
            self._events.problem("worker failed on a job", job_id=taken.job_id)
        delay = waits.FAULT_MS + spread(waits.FAULT_MS)
        return self._invocation.in_queue(waits.grown(delay, receives))

    # Housekeeping -----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _housekeeping(self) -> AsyncIterator[None]:
        """Write collected changes every few seconds, and all of them on leaving."""
        keeping = asyncio.create_task(self._keep(), name="housekeeping")
        try:
            yield
        finally:
            # Not during a write: its changes would be lost.
            async with self._writing:
                keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            for left in reversed(range(LAST_ROUNDS)):
                if await self._round(last=left == 0):
                    break
                await self._tools.clock.sleep(KEEP_MS)

    async def _keep(self) -> None:
        while True:
            await self._round()
            await self._tools.clock.sleep(KEEP_MS)

    async def _round(self, *, last: bool = False) -> bool:
        """Write collected changes, ledger rows before their messages are deleted; return whether none is left."""
        async with self._writing:
            is_written = True
            ledger, source = self._invocation.ledger, self._source
            for chore in (ledger.keep, lambda *, last: source.keep(ledger.unwritten, last=last)):
                try:
                    is_written &= await chore(last=last)
                except Exception:  # noqa: BLE001 - the other changes must still be written
                    self._events.problem("housekeeping failed")
                    is_written = False
            return is_written
