"""The ranges function: rows of one range of a batch."""

from __future__ import annotations

from functools import cache, partial

from sluice.adapters import job_records
from sluice.adapters.sqs import SqsInbox, depth_of
from sluice.adapters.system import Threads
from sluice.bulk.assemble import JoinAtOnce
from sluice.wiring.batch_stores import batches, batches_queue
from sluice.wiring.batches import assemble
from sluice.wiring.shared import CLOCK, settings, sqs, telemetry
from sluice.wiring.stores import ledger, objects
from sluice.wiring.workers import new_worker
from sluice.worker.newcomers import BESIDE_HELD_BYTES, NoMessages, RunRanges
from sluice.worker.range_claim import RangeTools
from sluice.worker.range_rows import WindowRows
from sluice.worker.ranges import RunRange
from sluice.worker.worker import Worker


@cache
def run_ranges() -> RunRanges:
    """Return the use case behind the ranges queue, with a worker for the rows of each range."""
    own = _runner(WindowRows(CLOCK))
    return RunRanges(own, lambda: _runner(WindowRows(CLOCK, BESIDE_HELD_BYTES), own.worker))


def _runner(rows: WindowRows, beside: Worker | None = None) -> RunRange:
    threads = Threads()
    inbox = SqsInbox(
        sqs(),
        settings().ranges_queue_url,
        settings().range_dead_letters_queue_url,
        "the ranges queue",
    )
    tools = RangeTools(
        batches=batches(),
        objects=objects(),
        queue=JoinAtOnce(assemble, batches_queue(), telemetry()),
        backlog=partial(depth_of, sqs(), settings().ranges_queue_url, "the ranges queue"),
        returns=NoMessages() if beside else inbox,
        ledger=ledger(),
        text_of_job=job_records.as_text,
        job_of_text=job_records.of_text,
        clock=CLOCK,
        blocking=threads,
        events=telemetry(),
    )
    worker = new_worker(rows, rows, rows, ledger(), threads, beside)
    return RunRange(tools, worker, rows)
