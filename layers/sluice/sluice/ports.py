"""What the use cases need of the world, as Protocols of a few verbs each.

Stores and queues block; the worker calls them through `Blocking`, which runs them in a thread (and, in a
simulation, at a step of the scheduler). Every implementation, fake or real, passes the same conformance tests.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Protocol, TypeVar

from sluice.domain.batches import Batch, Progress, RangeState, Tally
from sluice.domain.capacity import Backlog, Consumer
from sluice.domain.jobs import DueFor, Job, Result, State
from sluice.domain.keys import AdminKey, KeyMark, UpstreamKey
from sluice.domain.limits import Dimension, Group, KnownLimits, Seen
from sluice.domain.pricing import LedgerRow, Spend, Usage
from sluice.domain.retries import Failure
from sluice.domain.shares import Note

T = TypeVar("T")


class Clock(Protocol):
    """Time."""

    def now(self) -> int:
        """Return the time in epoch milliseconds."""
        ...

    async def sleep(self, milliseconds: int) -> None:
        """Wait."""
        ...


Jitter = Callable[[], float]
"""Returns a uniform random number in [0, 1)."""

RandomBytes = Callable[[int], bytes]


class Blocking(Protocol):
    """Runs a blocking call so that other jobs of the worker go on."""

    def __call__(self, call: Callable[..., T], /, *args: Any) -> Awaitable[T]:
        """Return what `call(*args)` returns, or raise what it raises."""
        ...


@dataclass(frozen=True, slots=True)
class Page:
    """Some jobs of a listing, newest first, and where it goes on (None: nowhere)."""

    jobs: tuple[Job, ...]
    next_page: str | None


class JobRecords(Protocol):
    """The job records as a worker needs them: jobs of the queue, or the rows of a range."""

    def get(self, job_id: str) -> Job | None:
        """Return the job as last written."""
        ...

    def get_many(self, job_ids: Sequence[str]) -> Mapping[str, Job]:
        """Return those of the jobs that exist, by id."""
        ...

    def replace(self, job: Job, expected_version: int) -> None:
        """Write the job if its stored version is the expected one; raises Stale with the present job otherwise."""
        ...


class JobStore(JobRecords, Protocol):
    """The job records."""

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

    def hold(self, due: Due, until: int) -> Due | None:
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

    def bury(self, message: Received, reason: str) -> None:
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


# Batches -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BatchPage:
    """Some batches of a listing, newest first, and whether it goes on."""

    batches: tuple[Batch, ...]
    has_more: bool


class BatchStore(Protocol):
    """The records of batches and of their ranges, and the counting of what is done."""

    def add(self, batch: Batch) -> None:
        """Store a new batch; raises Stale with the batch that has the id already."""
        ...

    def get(self, batch_id: str) -> Batch | None:
        """Return the batch as last written."""
        ...

    def replace(self, batch: Batch, expected_version: int) -> None:
        """Write the batch if its stored version is the expected one; raises Stale with the present one otherwise."""
        ...

    def listing(
        self, tenant: str, limit: int, *, after: Batch | None = None, before: Batch | None = None
    ) -> BatchPage:
        """Return the tenant's batches, newest first: those older than `after`, or the next newer than `before`."""
        ...

    def range_state(self, batch: Batch, number: int) -> RangeState:
        """Return what is known of a range; one that nobody claimed yet has version 0."""
        ...

    def replace_range(self, state: RangeState, expected_version: int) -> None:
        """Write it if its stored version is the expected one (0: not stored); raises Stale otherwise."""
        ...

    def mark(self, batch_id: str, group: str, member: int, tally: Tally) -> Progress:
        """Count a member of a group as done, once however often it is said; return the group as it is then."""
        ...

    def groups(self, batch_id: str, prefix: str) -> Mapping[str, Progress]:
        """Return all groups whose names begin so, by name and in the order of their names."""
        ...

    def name_create(self, tenant: str, name: str, batch_id: str, since: int, *, fresh: bool) -> str:
        """Return the batch that a create of this name made after `since`; note `batch_id` when there is none.

        `fresh`: it is a create of its own whatever went before, and takes the name over.
        """
        ...


class WaitingRanges(Protocol):
    """Ranges and batches that somebody has to look at again, as the sweep sees them."""

    def due(self, now: int, limit: int) -> Sequence[DueRange]:
        """Return what is due, longest due first."""
        ...

    def hold(self, due: DueRange, until: int) -> DueRange | None:
        """Take it: it is due again at `until`, unless released. None when somebody else was quicker."""
        ...

    def release(self, due: DueRange) -> None:
        """Forget that it was due, because its message is sent."""
        ...


@dataclass(frozen=True, slots=True)
class DueRange:
    """A range that waits outside the queue, or a batch that should have gone on by now (`number` is None)."""

    batch_id: str
    number: int | None
    tenant: str
    due_at: int
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Notice:
    """What others hear of a job or batch that has ended."""

    id: str
    """The same however often it is told."""
    kind: str
    """`Job Ended` or `Batch Ended`."""
    at: int
    tenant: str
    facts: Mapping[str, object]
    webhook: str | None = None
    """Where its caller wants to hear of it."""


class Notices(Protocol):
    """Where others hear of what has ended."""

    def tell(self, notices: Sequence[Notice]) -> None:
        """Tell whoever listens of each at least once; raises StoreBusy."""
        ...


@dataclass(frozen=True, slots=True)
class Webhook:
    """A message for a caller's own server."""

    id: str
    tenant: str
    url: str
    body: str


@dataclass(frozen=True, slots=True)
class Reply:
    """What a caller's server answered; without a status there was no answer, for the `problem`'s sake."""

    status: int | None = None
    retry_after_s: int | None = None
    problem: str | None = None


class Web(Protocol):
    """Other people's servers."""

    async def addresses(self, host: str, port: int) -> Sequence[str]:
        """Return the addresses that a name leads to now; none if it leads nowhere."""
        ...

    async def post(self, url: str, address: str, headers: Mapping[str, str], body: str) -> Reply:
        """Send to this address and to no other, whatever the name leads to meanwhile. Never raises."""
        ...


class SigningSecrets(Protocol):
    """What the secrets of the tenants' webhooks are made of."""

    def __call__(self) -> Sequence[str]:
        """Return the present one, and the one before if there is one: both sign for a while; raises StoreBusy."""
        ...


class RangesQueue(Protocol):
    """The sending side of the ranges queue."""

    def send_ranges(self, batch: Batch, numbers: Sequence[int]) -> list[int]:
        """Send a pointer for each range; return the numbers that were not taken."""
        ...


class BatchesQueue(Protocol):
    """The sending side of the batches queue.

    The function that this queue invokes must not have it: Lambda stops a function that sends to its own queue as a
    recursive loop, and its role does not allow it.
    """

    def send_plan(self, batch_id: str) -> None:
        """Have a batch planned; raises StoreBusy."""
        ...

    def send_join(self, batch_id: str, section: int) -> None:
        """Have a section's results joined; raises StoreBusy."""
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """What is known of an object without reading it."""

    key: str
    size: int
    etag: str
    written_at: int
    metadata: Mapping[str, str] = field(default_factory=dict)


class Writer(Protocol):
    """An object being written, in memory that does not grow with it. Nothing is there until `close`."""

    def write(self, data: bytes) -> None:
        """Write on."""
        ...

    def close(self) -> int:
        """Finish the object; return its size."""
        ...

    def abort(self) -> None:
        """Leave nothing behind; nothing happens after `close`."""
        ...


class Objects(Protocol):
    """The data bucket."""

    def put(self, key: str, body: bytes) -> str:
        """Store an object; return its ETag."""
        ...

    def get(self, key: str) -> bytes | None:
        """Return an object, None when there is none."""
        ...

    def head(self, key: str) -> Stored | None:
        """Return what is known of an object."""
        ...

    def read(self, key: str, first: int, size: int, etag: str | None = None) -> bytes:
        """Return a piece of an object; raises InputGone when it is not there, or not the one with this ETag."""
        ...

    def stream(self, key: str) -> Iterator[bytes]:
        """Yield the object piece by piece; raises InputGone."""
        ...

    def listing(self, prefix: str) -> Iterator[Stored]:
        """Yield the objects whose keys begin so, in the order of their keys."""
        ...

    def writer(self, key: str) -> Writer:
        """Begin an object."""
        ...

    def link(self, key: str, seconds: int) -> str:
        """Return an address from which anybody may read the object for so long."""
        ...

    def assemble(self, key: str, sources: Mapping[int, str], sizes: Mapping[int, int]) -> int:
        """Make one object of several, in order; return its size. Large ones are copied and not read."""
        ...


class PartLinks(Protocol):
    """Uploads by signed links: the parts go into the bucket past us."""

    def begin(self, key: str) -> str:
        """Begin an upload; return its id."""
        ...

    def links(self, key: str, upload_id: str, parts: Sequence[int]) -> Mapping[int, str]:
        """Return where each part is to be PUT, by number."""
        ...

    def complete(self, key: str, upload_id: str, etags: Mapping[int, str]) -> None:
        """Put the parts together; raises InvalidRequest when they do not make an object."""
        ...

    def abort(self, key: str, upload_id: str) -> None:
        """Forget the parts; nothing happens when there is no such upload."""
        ...


class LimitStore(Protocol):
    """What all workers share about limit groups and keys."""

    def load(self, group_ids: Iterable[str]) -> Mapping[str, Group]:
        """Return those of the groups that exist."""
        ...

    def replace(self, group: Group, expected_version: int) -> None:
        """Write if the stored version is the expected one (0: not stored); raises Stale with the present group."""
        ...

    def groups(self) -> Sequence[Group]:
        """Return all groups."""
        ...

    def marks(self, key_ids: Iterable[str]) -> Mapping[str, KeyMark]:
        """Return what is known about the keys."""
        ...

    def mark(self, mark: KeyMark) -> None:
        """Write what is known about a key."""
        ...

    def learned_groups(self) -> Mapping[str, str]:
        """Return which model belongs to which limit group, where upstream says otherwise than our data."""
        ...

    def learn_groups(self, groups: Mapping[str, str]) -> None:
        """Write that."""
        ...

    def canary(self, canary_id: str, now: int) -> None:
        """Note that a probe came through."""
        ...


class QueueMapping(Protocol):
    """A mapping: it wakes workers for the messages of a queue."""

    def state(self) -> Consumer:
        """Return it as it stands."""
        ...

    def set(self, maximum_concurrency: int, *, enabled: bool) -> bool:
        """Change it; False when it cannot be changed right now. It takes about a minute to take hold."""
        ...


class GovernorNotes(Protocol):
    """What the governor remembers of one mapping from run to run."""

    def read(self) -> Note:
        """Return what was written last; an empty note if nothing was."""
        ...

    def write(self, note: Note) -> None:
        """Remember this, and nothing else."""
        ...


class Executions(Protocol):
    """Lambda's executions in the account and region."""

    def at_once(self) -> int:
        """Return how many may run at once, of all functions without a number of their own; raises StoreBusy."""
        ...


class PoolHistory(Protocol):
    """What can be known of the key pool without reading it."""

    def changed_at(self) -> int | None:
        """Return when the pool was last written (epoch ms)."""
        ...


class KeyPool(Protocol):
    """The upstream keys."""

    def keys(self) -> Sequence[UpstreamKey]:
        """Return the keys, at most a few minutes old; raises KeyPoolBroken or StoreBusy."""
        ...

    def model_groups(self) -> Mapping[str, str]:
        """Return the pool's word on which model belongs to which limit group; raises as `keys`."""
        ...

    def reload(self) -> None:
        """Read the secret anew at the next call, because a key was rejected."""
        ...


class AdminKeys(Protocol):
    """The admin keys of the pool."""

    def admin_keys(self) -> Sequence[AdminKey]:
        """Return them, at most a few minutes old; raises KeyPoolBroken or StoreBusy."""
        ...


class RateLimits(Protocol):
    """The Rate Limits API."""

    def load(self, key: AdminKey) -> Sequence[KnownLimits]:
        """Return an organisation's limits; raises StoreBusy (later), or KeyPoolBroken (the key is not accepted)."""
        ...


@dataclass(frozen=True, slots=True)
class Headers:
    """What a response said about the organisation and its limits."""

    organization: str | None = None
    seen: Mapping[Dimension, Seen] = field(default_factory=dict)


NO_HEADERS = Headers()


def ignore(headers: Headers) -> None:
    """Nobody listens."""


async def unbounded(size: int) -> None:
    """Nobody counts."""


class Body:
    """A request's JSON in UTF-8, until it is sent: a large one is not to be held while its answer is awaited."""

    __slots__ = ("_data", "_sent")

    def __init__(self, data: bytes, sent: Callable[[], None] | None = None) -> None:
        self._data: bytes | None = data
        self._sent = sent

    @property
    def data(self) -> bytes:
        """The bytes; they must not be kept."""
        if self._data is None:
            message = "the request has been sent"
            raise ValueError(message)
        return self._data

    def let_go(self) -> None:
        """Release it. The sender calls this once all of it is sent, or will not be sent."""
        self._data = None
        if self._sent is not None:
            self._sent()
            self._sent = None


@dataclass(frozen=True, slots=True)
class CallRequest:
    """One upstream call."""

    key: UpstreamKey
    model: str
    body: Body
    anthropic_version: str
    anthropic_beta: str | None
    max_tokens: int
    window_ms: int
    """The call is ended when it takes longer."""
    full_window: bool
    """`window_ms` is as much as an invocation can give."""
    early: bool = False
    """The headers are wanted as soon as they are there, whatever that costs."""
    heard: Callable[[Headers], None] = ignore
    """Is told the headers when they come before the answer."""
    names_model: bool = False
    """The body names `model` already: nobody need look where."""
    room: Callable[[int], Awaitable[None]] = unbounded
    """Is awaited before so many bytes of the answer are held."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A Message, as Claude returned it."""

    message: str
    usage: Usage
    stop_reason: str | None
    request_id: str | None
    headers: Headers = NO_HEADERS


@dataclass(frozen=True, slots=True)
class Refused:
    """A call that brought no answer."""

    failure: Failure
    headers: Headers = NO_HEADERS


class Claude(Protocol):
    """The Messages API."""

    async def send(self, request: CallRequest) -> Answer | Refused:
        """Make the call, once. Errors of upstream and of the network are values, not exceptions."""
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


class ClientKeys(Protocol):
    """Who may submit."""

    def tenant(self, key: str) -> str | None:
        """Return the tenant a client key belongs to, None for an unknown or disabled key. At most 60 s old."""
        ...


class Events(Protocol):
    """Where a worker tells what happened: metrics and one log line per change of state."""

    def count(self, metric: str, value: float = 1, model_group: str | None = None) -> None:
        """Add to a metric."""
        ...

    def note(self, event: str, **facts: object) -> None:
        """Log a fixed phrase with facts as keys. Never a prompt, an answer or a key."""
        ...

    def problem(self, event: str, **facts: object) -> None:
        """As `note`, for what somebody should look at; inside an exception handler it carries the traceback."""
        ...
