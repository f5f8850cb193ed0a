"""The job ends function: notifies of jobs that have ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from sluice.adapters import job_records
from sluice.notices.publish import Publish
from sluice.wiring.notices import notices
from sluice.wiring.shared import telemetry

if TYPE_CHECKING:
    from sluice.domain.jobs import Job


@cache
def publish() -> Publish:
    """Return the use case behind the stream of the jobs table."""
    return Publish(notices(), telemetry())


def ended_jobs(records: Iterable[Mapping[str, Any]]) -> list[tuple[str, Job]]:
    """Read the records of a stream event: each job, and the sequence number of its record.

    A record that cannot be read is skipped: it would block the records behind it for a day.
    """
    ended = []
    for record in records:
        change = record["dynamodb"]
        try:
            ended.append((change["SequenceNumber"], job_records.of_image(change["NewImage"])))
        except (KeyError, TypeError, ValueError):
            telemetry().problem("ended job not read", job=change.get("Keys"))
    return ended
