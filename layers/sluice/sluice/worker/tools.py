"""What use cases share: a worker's ports and rules, and how the end of a job is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from sluice.domain.jobs import Job, State
from sluice.domain.pricing import PriceList
from sluice.domain.retries import RetryPolicy
from sluice.domain.waits import USUAL, Waits
from sluice.ports.claude import Claude
from sluice.ports.jobs import Answers, CallBooks, Inbox, JobRecords, Requests
from sluice.ports.limits import KeyPool, LimitStore
from sluice.ports.world import Blocking, Clock, Events, Jitter


@dataclass(frozen=True, slots=True)
class Tools:
    """Everything the worker needs of the world."""

    jobs: JobRecords
    params: Requests
    results: Answers
    inbox: Inbox
    limits: LimitStore
    keys: KeyPool
    claude: Claude
    ledger: CallBooks
    clock: Clock
    jitter: Jitter
    blocking: Blocking
    events: Events


@dataclass(frozen=True, slots=True)
class Rules:
    """What is set for this deployment."""

    policy: RetryPolicy
    prices: PriceList
    model_groups: Mapping[str, str]
    waits: Waits = USUAL


_ENDS: Final = {
    State.SUCCEEDED: "JobsSucceeded",
    State.ERRORED: "JobsErrored",
    State.EXPIRED: "JobsExpired",
    State.CANCELED: "JobsCanceled",
}


def tell_end(events: Events, job: Job) -> None:
    """Count a job that has ended, and log one line of it."""
    events.count(_ENDS[job.state])
    events.note(
        f"job {job.state}",
        job_id=job.job_id,
        tenant=job.tenant,
        model=job.current_model,
        attempts_used=job.attempts_used,
        snoozes=job.snoozes,
        error_type=job.error.type if job.error else None,
    )
