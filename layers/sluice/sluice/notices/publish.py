"""Telling of jobs that have ended: an event for each, and a webhook where its caller wants one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from sluice.domain.errors import StoreBusy
from sluice.domain.jobs import Job
from sluice.domain.pricing import usd
from sluice.domain.times import rfc3339
from sluice.ports.world import Events, Notice, Notices

ENDED: Final = "Job Ended"
"""The event's `detail-type`."""

AT_ONCE: Final = 10
"""Events that the bus takes in one call."""


class Publish:
    """The use case behind the stream of the jobs table."""

    def __init__(self, notices: Notices, events: Events) -> None:
        self._notices = notices
        self._events = events

    def __call__(self, jobs: Sequence[Job]) -> int:
        """Tell of jobs that have ended; return how many, from the first one on, are told: all but when AWS is busy."""
        for start in range(0, len(jobs), AT_ONCE):
            try:
                self._notices.publish([_notice(job) for job in jobs[start : start + AT_ONCE]])
            except StoreBusy as busy:
                self._events.problem("store busy", what=busy.what)
                return start
        return len(jobs)


def _notice(job: Job) -> Notice:
    return Notice(
        # A job that is redriven ends once more: another end, another id.
        id=f"{job.job_id}-{job.version}",
        kind=ENDED,
        at=job.finished_at or job.created_at,
        tenant=job.tenant,
        facts=_facts(job),
        webhook=job.webhook,
    )


def _facts(job: Job) -> Mapping[str, object]:
    """Show what became of a job. Neither the request nor the answer: whoever wants them asks for the job, by key."""
    return {
        "job_id": job.job_id,
        "custom_id": job.custom_id,
        "tenant": job.tenant,
        "state": job.state.value,
        "model": job.current_model,
        "lane": job.lane,
        "error_type": job.error.type if job.error else None,
        "attempts_used": job.attempts_used,
        "usage": job.usage.as_dict() if job.usage else None,
        "cost_micro_usd": job.cost_micro_usd,
        "cost_usd": usd(job.cost_micro_usd),
        "created_at": rfc3339(job.created_at),
        "started_at": rfc3339(job.started_at),
        "finished_at": rfc3339(job.finished_at),
        "metadata": dict(job.metadata),
    }
