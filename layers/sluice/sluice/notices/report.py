"""Reporting the end of a job: one metric and one log line."""

from __future__ import annotations

from typing import Final

from sluice.domain.jobs import Job, State
from sluice.ports.world import Events

_METRICS: Final = {
    State.SUCCEEDED: "JobsSucceeded",
    State.ERRORED: "JobsErrored",
    State.EXPIRED: "JobsExpired",
    State.CANCELED: "JobsCanceled",
}


def report_end(events: Events, job: Job) -> None:
    """Count a job that has ended, and log it."""
    events.count(_METRICS[job.state])
    events.note(
        f"job {job.state}",
        job_id=job.job_id,
        tenant=job.tenant,
        model=job.current_model,
        attempts_used=job.attempts_used,
        snoozes=job.snoozes,
        error_type=job.error.type if job.error else None,
    )
