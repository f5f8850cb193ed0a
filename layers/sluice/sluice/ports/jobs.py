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
    """Some jobs of a listing, newest first, and where it goes on (None: nowhere)."""

    jobs: tuple[Job, ...]
    next_page: str | None


class JobRecords(Protocol):
    """The job records as an attempt needs them: jobs of the queue, or the rows of a range."""

    def get(self, job_id: str) -> Job | None:
        """Return the job as last written."""
        ...

    def replace(self, job: Job, expected_version: int) -> None:
        """Write the job if its stored version is the expected one; raises Stale with the present job otherwise."""
        ...


class JobStore(JobRecords, Protocol):
    """The job records."""

    def get_many(self, job_ids: Sequence[str]) -> Mapping[str, Job]:
        """Return those of the jobs that exist, by id."""
        ...

    def add(self, job: Job) -> None:
        """Store a new job; raises Stale with the job that has the id already."""
        ...

    def add_new(self, jobs: Sequence[Job]) -> set[str]:
        """Store those of at most 25 jobs whose ids are free; return the ids of those that were.

        What is to become of the others, `add` finds out. Raises StoreBusy; with `may_be_done` when nobody knows which
        of them are stored.
        """
        ...

    def listing(self, tenant: str, state: State | None, limit: int, page: str | None) -> Page:
        """Return the tenant's jobs, newest first; `page` is a `next_page` of before."""
        ...


@dataclass(frozen=True, slots=True)
class Due:
    """A job as the index of due jobs knows it."""

    job_id: str
    tenant: str
    model: str
    """The model its next call goes to."""
    due_at: int
    deadline: int | None = None


class DueJobs(Protocol):
    """The job records again, as the sweep sees them: every job that has not ended, by when it shall be looked at."""

    def due(self, why: DueFor, now: int, limit: int) -> Sequence[Due]:
        """Return the jobs whose time has come, longest due first.

        Of more than `limit` only the longest and the latest due, so that a large backlog does not hide a new one.
        """
        ...

    def postpone(self, due: Due, until: int) -> Due | None:
        """Take the job: it is due again at `until`. None when somebody else was quicker."""
        ...

    def watch(self, due: Due, until: int) -> None:
        """Look at the job again at `until`, in case its message is lost; nothing happens if it has gone on already."""
        ...


@dataclass(frozen=True, slots=True)
class Params:
    """The request as sent: JSON in UTF-8."""

    job_id: str
    body: bytes
    request_hash: str


class Requests(Protocol):
    """The requests as a worker needs them."""

    def get_many(self, job_ids: Sequence[str]) -> Mapping[str, Params]:
        """Return those of the requests that exist, by job id."""
        ...


class ParamsStore(Requests, Protocol):
    """The requests, each written once."""

    def add(self, params: Params) -> None:
        """Store the request; raises Conflict if another one is stored under the id already."""
        ...

    def add_new(self, params: Sequence[Params]) -> set[str]:
        """Store those of at most 25 requests whose ids are free; return the ids of those that surely are stored.

        What became of the others, `add` finds out. Large requests are left to it.
        """
        ...


class Answers(Protocol):
    """The answers as a worker needs them."""

    def put(self, name: str, message: str) -> Result:
        """Store Claude's Message (JSON text) durably, unless it is small enough to travel in the job record.

        `name` is the call's own: the same name may be stored again, and then holds the later Message.
        """
        ...


class ResultStore(Answers, Protocol):
    """The answers."""

    def get(self, result: Result) -> str:
        """Return the Message."""
        ...


@dataclass(frozen=True, slots=True)
class Pointer:
    """What a message of the jobs queue points to, and between whom the queue is to be fair."""

    job_id: str
    tenant: str
    model: str
    """The model its next call goes to."""


class JobQueue(Protocol):
    """The sending side of the jobs queue."""

    def send(self, jobs: Sequence[Pointer]) -> list[str]:
        """Send a message for each job; return the ids of those that were not taken."""
        ...

    def depth(self) -> int:
        """Return about how many messages wait or are at work."""
        ...

    def backlog(self) -> Backlog:
        """Return the same, told apart."""
        ...


@dataclass(frozen=True, slots=True)
class Received:
    """One message as the worker got it. `job_id` is None when the message is not ours, `canary` when it is a probe."""

    message_id: str
    receipt: str
    body: str
    job_id: str | None
    canary: str | None = None
    receive_count: int = 1
    sent_at: int = 0


class Returns(Protocol):
    """Where messages go that a function was given and cannot finish."""

    def put_back(self, delays: Sequence[tuple[Received, int]]) -> None:
        """Make each message visible again after its delay in milliseconds (12 h at most)."""
        ...

    def reject(self, message: Received, reason: str) -> None:
        """Send a message that is not ours to the dead-letter queue, with the reason."""
        ...


class Inbox(Returns, Protocol):
    """The receiving side of the jobs queue."""

    def receive(self, most: int, hidden_ms: int) -> Sequence[Received]:
        """Take up to `most` messages (10 at once) of those visible now, perhaps none, and hide them from others."""
        ...

    def delete(self, messages: Sequence[Received]) -> None:
        """Acknowledge messages that `receive` returned; one that comes back all the same finds its job done."""
        ...

    def keep_hidden(self, messages: Sequence[Received], milliseconds: int) -> None:
        """Let nobody else receive these messages for a time from now, however long they were hidden before."""
        ...


class CallBooks(Protocol):
    """The ledger as a worker needs it."""

    def record(self, rows: Sequence[LedgerRow]) -> None:
        """Write rows; writing one again changes nothing."""
        ...

    def add_up(self, sums: Mapping[tuple[str, date, str, str], Spend]) -> None:
        """Add to the sums per (tenant, day, model, lane)."""
        ...


class Ledger(CallBooks, Protocol):
    """One row per upstream call, and their sums."""

    def spent(self, tenant: str, first: date, last: date) -> Sequence[tuple[date, str, str, Spend]]:
        """Return (day, model, lane, sums) of a tenant from the first day to the last."""
        ...
