"""A client under test in its own process: the work on stdin, the result on stdout.

The first input line is the work, the first output line reports that everything is imported; the second
input line starts the clock, the second output line is the result. When stdin closes, the process ends.
Uses only the standard library, because it also runs in other environments.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

Json = dict[str, Any]
Call = Callable[[int, Json], Awaitable[None]]
"""Gets the number of a job and its request; raises when the job is lost."""


def serve(prepare: Callable[[Json], Call]) -> None:
    """Carry out one piece of work with the calls that `prepare` makes, and end the process."""
    lines = _Lines()
    work = json.loads(lines.next())
    with asyncio.Runner() as runner:
        call = runner.run(_prepared(prepare, work))
        print(json.dumps({"ready": True}), flush=True)
        lines.next()
        threading.Thread(target=lines.end_with_starter, daemon=True).start()
        result = runner.run(_run(call, work))
    print(json.dumps(result), flush=True)
    sys.stdout.flush()
    os._exit(0)  # a pooled connection or a thread of a library must not keep us


async def _prepared(prepare: Callable[[Json], Call], work: Json) -> Call:
    return prepare(work)


async def _run(call: Call, work: Json) -> Json:
    gate = asyncio.Semaphore(work["in_flight"])
    lost: dict[str, int] = {}
    done = 0

    async def one(number: int, params: Json) -> None:
        nonlocal done
        async with gate:
            try:
                await call(number, params)
            except Exception as error:  # noqa: BLE001 - whatever it is, this job is lost
                name = type(error).__name__
                lost[name] = lost.get(name, 0) + 1
            else:
                done += 1

    began_at, cpu = time.time(), time.process_time()
    jobs = [asyncio.ensure_future(one(*each)) for each in enumerate(work["jobs"])]
    _, unfinished = await asyncio.wait(jobs, timeout=work["hard_seconds"])
    ended_at = time.time()
    for job in unfinished:
        job.cancel()
    return {
        "began_at": began_at,
        "ended_at": ended_at,
        "done": done,
        "lost_by": lost,
        "unfinished": len(unfinished),
        "cpu_seconds": time.process_time() - cpu,
    }


class _Lines:
    """Lines of stdin, read without a buffer: a thread blocked in a buffered reader aborts an exit."""

    def __init__(self) -> None:
        self._rest = b""

    def next(self) -> str:
        while b"\n" not in self._rest:
            received = os.read(0, 1 << 20)
            if not received:
                os._exit(1)
            self._rest += received
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def end_with_starter(self) -> None:
        while os.read(0, 1024):
            pass
        os._exit(1)
