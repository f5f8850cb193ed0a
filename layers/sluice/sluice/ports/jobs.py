"""Jobs, their requests and results, the jobs queue, and the ledger of their calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Protocol

from sluice.domain.capacity import Backlog
from sluice.domain.jobs import DueFor, Job, Result, State
from sluice.domain.pricing import LedgerRow, Spend


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a listing of jobs, newest first, and the token of the next page if there is one."""

    jobs: tuple[Job, ...]
    next_page: str | None


class JobRecords(Protocol):
    """The job records as an attempt needs them: jobs of the queue, or the rows of a range."""

    def get(self, job_id: str) -> Job | None:
        """Return the job as last written."""
        ...

    def replace(self, job: Job, expected_version: int) -> None:
        """Write the job if its stored version is the expected one; otherwise raises Stale with the stored job."""
        ...


class JobStore(JobRecords, Protocol):
    """The job records."""

    def get_many(self, job_ids: Sequence[str]) -> Mapping[str, Job]:
        """Return the jobs that exist, by id."""
        ...

    def add(self, job: Job) -> None:
        """Store a new job; raises Stale with the stored job if its id is in use."""
        ...

    def add_new(self, jobs: Sequence[Job]) -> set[str]:
        """Store those of at most 25 jobs whose ids are not in use; return the ids of the stored ones.

        The caller calls `add` for the others. Raises StoreBusy, with `may_be_done` if it is unknown which are stored.
        """
        ...

    def listing(self, tenant: str, state: State | None, limit: int, page: str | None) -> Page:
        """Return the tenant's jobs, newest first; `page` is the `next_page` of the page before."""
        ...


@dataclass(frozen=True, slots=True)
class Due:
    """A job in the index of due jobs."""

    job_id: str
    tenant: str
    model: str
    """The model its next call goes to."""
    due_at: int
    deadline: int | None = None


class DueJobs(Protocol):
    """The jobs that have not ended, as the sweep sees them: by the time at which they are due."""

    def due(self, why: DueFor, now: int, share: int) -> Sequence[Due]:
        """Return the due jobs, longest due first: about `share` of each tenant and model at most.

        So the backlog of one hides none of another.
        """
        ...

    def postpone(self, due: Due, until: int) -> Due | None:
        """Make the job due again at `until` only; None if another sweep was first."""
        ...

    def forget(self, due: Due) -> None:
        """Remove the job from the index, unless it was written since."""
        ...

    def watch(self, due: Due, until: int) -> None:
        """Make a sent job due again (`due_after_send`), unless it was written since.

        At `until`, in case its message is lost, or at its deadline if that is first.
        """
        ...


@dataclass(frozen=True, slots=True)
class Params:
    """The request as sent: JSON in UTF-8."""

    job_id: str
    body: bytes
    request_hash: str


class Requests(Protocol):
    """The requests that a worker reads."""

    def get_many(self, job_ids: Sequence[str]) -> Mapping[str, Params]:
        """Return the requests that exist, by job id."""
        ...


class ParamsStore(Requests, Protocol):
    """The requests, each written once."""

    def add(self, params: Params, *, over_leftover: bool = False) -> None:
        """Store the request; raises Conflict if a different one is stored under its id.

        One that was stored more than a day ago is stored anew, so that it does not expire before its job. With
        `over_leftover` it may be a different one: the caller knows that its job was deleted.
        """
        ...

    def add_new(self, params: Sequence[Params]) -> set[str]:
        """Store those of at most 25 requests whose ids are not in use; return the ids that are known to be stored.

        The caller calls `add` for the others, among them all large requests.
        """
        ...


class Answers(Protocol):
    """The answers that a worker stores."""

    def put(self, name: str, message: str) -> Result:
        """Store Claude's Message (JSON text) durably, unless it is small enough for the job record.

        `name` is unique per call. Storing it again replaces the Message.
        """
        ...

    def probe(self) -> None:
        """Raise StoreBusy if no answer could be stored now."""
        ...


class ResultStore(Answers, Protocol):
    """The answers."""

    def get(self, result: Result) -> str:
        """Return the Message."""
        ...


@dataclass(frozen=True, slots=True)
class Pointer:
    """The content of a message of the jobs queue, and its fairness group: tenant and model."""

    job_id: str
    tenant: str
    model: str
    """The model its next call goes to."""


class JobQueue(Protocol):
    """Sends messages to the jobs queue."""

    def send(self, jobs: Sequence[Pointer]) -> list[str]:
        """Send a message for each job; return the ids of those that were not accepted."""
        ...

    def depth(self) -> int:
        """Return the approximate number of messages, visible or in flight."""
        ...

    def backlog(self) -> Backlog:
        """Return the approximate numbers of visible, delayed and in-flight messages."""
        ...


@dataclass(frozen=True, slots=True)
class Received:
    """One received message. `job_id` is None for a message that is not Sluice's; `canary` is set for a probe."""

    message_id: str
    receipt: str
    body: str
    job_id: str | None
    canary: str | None = None
    receive_count: int = 1
    sent_at: int = 0


class Returns(Protocol):
    """Returns messages that a function cannot finish."""

    def put_back(self, delays: Sequence[tuple[Received, int]]) -> None:
        """Make each message visible again after its delay in milliseconds, at most 12 hours."""
        ...

    def reject(self, message: Received, reason: str) -> None:
        """Send a message that cannot be processed to the dead-letter queue, with the reason."""
        ...


class Inbox(Returns, Protocol):
    """Receives messages from the jobs queue."""

    def receive(self, most: int, hidden_ms: int) -> Sequence[Received]:
        """Receive up to `most` messages (at most 10) of those visible now, with a visibility timeout of `hidden_ms`."""
        ...

    def delete(self, messages: Sequence[Received]) -> None:
        """Delete messages that `receive` returned; one that is delivered again finds its job done."""
        ...

    def keep_hidden(self, messages: Sequence[Received], milliseconds: int) -> None:
        """Set the visibility timeout of these messages, counted from now."""
        ...


class CallBooks(Protocol):
    """The ledger that a worker writes."""

    def record(self, rows: Sequence[LedgerRow]) -> None:
        """Write rows; writing a row again changes nothing. Raises NotStorable if it cannot take one of them."""
        ...

    def record_missing(self, rows: Sequence[LedgerRow]) -> Sequence[LedgerRow]:
        """Write those rows whose calls have no row yet; return them."""
        ...

    def calls_of(self, tenant: str, days: Sequence[date], job_id: str) -> Sequence[LedgerRow]:
        """Return the rows of a job's calls on these days."""
        ...

    def add_up(self, sums: Mapping[tuple[str, date, str, str], Spend]) -> None:
        """Add to the sums per (tenant, day, model, lane)."""
        ...


class Ledger(CallBooks, Protocol):
    """One row per upstream call, and the usage totals."""

    def spent(self, tenant: str, first: date, last: date) -> Sequence[tuple[date, str, str, Spend]]:
        """Return (day, model, lane, sums) of a tenant from the first day to the last."""
        ...

    def organizations(self, tenant: str, first: date, last: date) -> set[str]:
        """Return the organizations that a tenant's calls were made in, from the first day to the last."""
        ...
