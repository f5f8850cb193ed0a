"""The worker for jobs of the queue and for rows of a range. Importing it loads the Anthropic SDK."""

from __future__ import annotations

import gc
import random
from typing import TYPE_CHECKING

from sluice.adapters.claude import SdkClaude
from sluice.domain.retries import RetryPolicy
from sluice.wiring.shared import CLOCK, model_groups, prices, settings, telemetry
from sluice.wiring.stores import key_pool, limits
from sluice.worker.tools import Rules, Tools
from sluice.worker.worker import Worker

if TYPE_CHECKING:
    from sluice.adapters.system import Threads
    from sluice.ports.jobs import Answers, CallBooks, JobRecords, Requests


def new_worker(  # noqa: PLR0913, PLR0917 - its stores
    records: JobRecords,
    requests: Requests,
    answers: Answers,
    books: CallBooks,
    threads: Threads,
    beside: Worker | None = None,
) -> Worker:
    """Return a worker with these stores; `beside` another one of the same process, it shares memory and connections."""
    tools = Tools(
        jobs=records,
        params=requests,
        results=answers,
        limits=limits(),
        keys=key_pool(),
        claude=beside.tools.claude if beside else SdkClaude(CLOCK),
        ledger=books,
        clock=CLOCK,
        jitter=random.Random().random,  # noqa: S311 - jitter, not a secret
        blocking=threads,
        events=telemetry(),
    )
    waits = settings().waits
    rules = Rules(
        policy=RetryPolicy(
            max_attempts=settings().max_attempts,
            overload_base_ms=waits.overload_base_ms,
            overload_cap_ms=waits.overload_cap_ms,
        ),
        prices=prices(),
        model_groups=model_groups(),
        waits=waits,
    )
    # The SDKs' 200,000 objects live as long as the environment: the garbage collector need not scan them again.
    gc.freeze()
    return Worker(tools, rules, memory=beside.memory if beside else None)
