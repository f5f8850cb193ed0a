"""The worker function: jobs of the jobs queue."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

from sluice.adapters.sqs import SqsInbox
from sluice.adapters.system import Threads
from sluice.domain.errors import StoreBusy
from sluice.domain.waits import LEASE_MS
from sluice.wiring.shared import settings, sqs, telemetry
from sluice.wiring.stores import jobs, ledger, params, results

if TYPE_CHECKING:
    from sluice.ports.jobs import Received
    from sluice.worker.queue_source import RunJobs


@cache
def _inbox() -> SqsInbox:
    return SqsInbox(sqs(), settings().jobs_queue_url, settings().dead_letters_queue_url)


def hold_while_starting(messages: Sequence[Received]) -> None:
    """Shorten the messages' visibility timeout before the worker is made, which takes a second or two the first time.

    If this environment dies meanwhile, they become visible after a lease, and not after the queue's own timeout.
    """
    if run_jobs.cache_info().currsize:
        return
    try:
        _inbox().keep_hidden(messages, LEASE_MS)
    except StoreBusy:
        # The worker does it again at once.
        telemetry().problem("messages not held", messages=len(messages))


@cache
def run_jobs() -> RunJobs:
    """Return the use case behind the jobs queue, with its worker."""
    # The imports inside a function: loading the SDK takes a second, and the messages are held first.
    from sluice.wiring.workers import new_worker  # noqa: PLC0415
    from sluice.worker.queue_source import RunJobs  # noqa: PLC0415

    worker = new_worker(jobs(), params(), results(), ledger(), Threads())
    return RunJobs(_inbox(), jobs(), worker)
