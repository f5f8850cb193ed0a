"""The clock and threads of the process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

THREADS = 16
"""Blocking calls in flight per worker; each is a few milliseconds of waiting for DynamoDB or SQS."""


class SystemClock:
    """The system clock."""

    def now(self) -> int:
        """Return epoch milliseconds."""
        return time.time_ns() // 1_000_000

    async def sleep(self, milliseconds: int) -> None:
        """Wait."""
        await asyncio.sleep(milliseconds / 1000)


class Threads:
    """Runs blocking calls in threads, so that they do not block the event loop."""

    def __init__(self, threads: int = THREADS) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="sluice")

    def __call__(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        """Return what the call returns."""
        return asyncio.get_running_loop().run_in_executor(
            self._pool, partial(call, *args, **kwargs)
        )
