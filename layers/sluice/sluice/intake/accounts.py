"""A tenant's jobs and usage."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from sluice.domain.errors import InvalidRequest, JobNotFound
from sluice.domain.jobs import Job, State, request_cancel
from sluice.domain.limits import Group
from sluice.domain.models import model_group
from sluice.domain.pricing import Spend, base_model
from sluice.ports.jobs import JobStore, Ledger, Page, ResultStore
from sluice.ports.limits import LimitStore
from sluice.ports.swap import Deleted, Kept, Written, change
from sluice.ports.world import Clock, Events

LONGEST_REPORT_DAYS = 366

USED_DAYS = 30
"""A model that a tenant was billed for within these days is one of its own, and so is an organization."""
USED_JOBS = 100
"""Newest jobs whose models are a tenant's own before they were called."""


@dataclass(frozen=True, slots=True)
class UsageRow:
    """The sums of one group of a usage report."""

    group: Mapping[str, str]
    spend: Spend


class Account:
    """The account of one tenant. The jobs of other tenants do not exist here."""

    def __init__(  # noqa: PLR0913, PLR0917 - its tools
        self,
        tenant: str,
        jobs: JobStore,
        results: ResultStore,
        limits: LimitStore,
        ledger: Ledger,
        clock: Clock,
        events: Events,
    ) -> None:
        self._tenant = tenant
        self._jobs = jobs
        self._results = results
        self._limits = limits
        self._ledger = ledger
        self._clock = clock
        self._events = events

    def job(self, job_id: str) -> Job:
        """Return a job; raises JobNotFound."""
        job = self._jobs.get(job_id)
        if job is None or job.tenant != self._tenant:
            raise JobNotFound(job_id)
        return job

    def message(self, job: Job) -> str | None:
        """Return Claude's Message as JSON text, None if there is none."""
        return self._results.get(job.result) if job.result else None

    def some_jobs(self, job_ids: Sequence[str]) -> list[Job]:
        """Return the jobs that exist, in the order of the ids."""
        found = self._jobs.get_many(list(dict.fromkeys(job_ids)))
        return [
            found[job_id]
            for job_id in dict.fromkeys(job_ids)
            if job_id in found and found[job_id].tenant == self._tenant
        ]

    def listing(self, state: State | None, limit: int, page: str | None) -> Page:
        """Return the tenant's jobs, newest first."""
        return self._jobs.listing(self._tenant, state, limit, page)

    def cancel(self, job_id: str) -> Job:
        """Cancel a job: guaranteed before the upstream call, best effort during it. A final job stays as it is."""
        canceled = change(
            self._jobs.replace,
            self.job(job_id),
            lambda job: request_cancel(job, self._clock.now()),
            f"job {job_id}",
        )
        match canceled:
            case Written(job):
                if job.state is State.CANCELED:
                    self._events.count("JobsCanceled")
                return job
            case Kept(job):
                return job
            case Deleted():
                raise JobNotFound(job_id)

    def usage(self, first: date, last: date, group_by: Sequence[str]) -> list[UsageRow]:
        """Return the usage from the first day to the last, grouped by any of `day`, `model` and `lane`."""
        if last < first:
            raise InvalidRequest(f"to: {last} is before from ({first})")
        if (last - first).days >= LONGEST_REPORT_DAYS:
            raise InvalidRequest(f"from/to: a report covers at most {LONGEST_REPORT_DAYS} days")
        sums: dict[tuple[str, ...], Spend] = {}
        for day, model, lane, spend in self._ledger.spent(self._tenant, first, last):
            names = {"day": day.isoformat(), "model": model, "lane": lane}
            key = tuple(names[name] for name in group_by)
            sums[key] = sums.get(key, Spend()) + spend
        return [
            UsageRow(dict(zip(group_by, key, strict=True)), spend)
            for key, spend in sorted(sums.items())
        ]

    def models(self) -> set[str]:
        """Return the models this tenant uses: those of its newest jobs, and those it was billed for lately."""
        first, today = self._lately()
        billed = {model for _, model, _, _ in self._ledger.spent(self._tenant, first, today)}
        newest = self._jobs.listing(self._tenant, None, USED_JOBS, None).jobs
        return {base_model(model) for model in billed | {job.model for job in newest}}

    def groups(self, known: Mapping[str, str], models: Collection[str]) -> Sequence[Group]:
        """Return the limit groups of these models in the organizations that made the tenant's calls lately.

        If all groups are of one organization, it makes the calls of everybody. `known` are the deployed model groups,
        by model.
        """
        groups = {**known, **self._limits.models().groups()}
        own = {model_group(model, groups, self._tenant) for model in models}
        present = [group for group in self._limits.groups() if group.moved_to is None]
        organizations = {group.organization for group in present}
        if len(organizations) > 1:
            organizations = self._ledger.organizations(self._tenant, *self._lately())
        return [
            group
            for group in present
            if group.model_group in own and group.organization in organizations
        ]

    def _lately(self) -> tuple[date, date]:
        today = datetime.fromtimestamp(self._clock.now() / 1000, UTC).date()
        return today - timedelta(days=USED_DAYS), today
