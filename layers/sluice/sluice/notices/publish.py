"""Publishing the end of jobs: an event for each, and a webhook if its caller gave a URL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from sluice.domain.errors import StoreBusy
from sluice.domain.jobs import Job
from sluice.domain.pricing import cost_facts
from sluice.domain.times import rfc3339
from sluice.ports.world import Events, Notice, Notices

ENDED: Final = "Job Ended"
"""The event's `detail-type`."""

AT_ONCE: Final = 10
"""Events per call to the bus."""


class Publish:
    """The use case behind the stream of the jobs table."""

    def __init__(self, notices: Notices, events: Events) -> None:
        self._notices = notices
        self._events = events

    def __call__(self, jobs: Sequence[Job]) -> int:
        """Publish the end of jobs; return how many, from the first on, were published: fewer if AWS is busy."""
        for start in range(0, len(jobs), AT_ONCE):
            try:
                self._notices.publish([_notice(job) for job in jobs[start : start + AT_ONCE]])
            except StoreBusy as busy:
                self._events.problem("store busy", what=busy.what)
                return start
        return len(jobs)


def _notice(job: Job) -> Notice:
    return Notice(
        # A redriven job ends again, with another id.
        id=f"{job.job_id}-{job.version}",
        kind=ENDED,
        at=job.finished_at or job.created_at,
        tenant=job.tenant,
        facts=_facts(job),
        webhook=job.webhook,
    )


def _facts(job: Job) -> Mapping[str, object]:
    """Return the data of the event. It has no request or answer; clients get those from the API."""
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
        **cost_facts(job.cost_micro_usd, job.unknown_costs),
        "created_at": rfc3339(job.created_at),
        "started_at": rfc3339(job.started_at),
        "finished_at": rfc3339(job.finished_at),
        "metadata": dict(job.metadata),
    }
