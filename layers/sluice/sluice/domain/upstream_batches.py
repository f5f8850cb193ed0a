"""An upstream batch: a Message Batch at Anthropic, made of ranges of one tenant's batches. It costs half.

Its record names the next step. A step may be repeated by another invocation at any time: the lease keeps two from
doing it at once, and every write is made under an optimistic lock on `version`. What must not be repeated is the
create, because each one is billed: its intent is recorded before it is sent. A create whose reply was lost is looked
for before another is made. Times are epoch milliseconds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from hashlib import sha256
from typing import Final, Protocol, TypeVar

from sluice.domain.errors import LeaseLost, UpstreamBatchBusy
from sluice.domain.limits import Group
from sluice.domain.waits import USUAL

MOST_REQUESTS: Final = 100_000
MOST_BYTES: Final = 256_000_000
"""Limits of a Message Batch (Anthropic, batch processing): requests, and bytes of the body."""

FULL_REQUESTS: Final = 95_000
FULL_BYTES: Final = 230_000_000
"""With a margin, because lines are counted by an estimate. What does not fit all the same runs live."""

SPARE_REQUESTS: Final = 16
"""The last requests that may be left out, so that no two open upstream batches have the same number of them."""

LEASE_MS: Final = 60_000
SENT_WITHIN_MS: Final = 14 * 60_000
"""A create ends within this time, the longest invocation: later than that its worker has died."""

LISTED_AFTER_MS: Final = 2 * 60_000
"""A batch may be missing in listings for seconds after its create (anthropic-sdk-python#1432); it is looked for until
this long after the create."""

CLOCKS_APART_MS: Final = 60_000
"""Upstream's clock may differ from ours by so much."""

EXPIRES_MS: Final = 86_400_000
"""Upstream ends a batch after 24 hours at the latest (Anthropic, batch processing)."""

CANCEL_MS: Final = 2 * 60_000
"""About how long upstream takes to end a canceled batch, if nothing else was seen."""

CANCELED_WITHIN_MS: Final = 15 * 60_000
"""Results of a canceled batch are waited for so long; then its rows run without them."""

POLL_MS: Final = USUAL.poll_ms
LONGEST_POLL_MS: Final = 15 * 60_000
NEAR_MS: Final = 60 * 60_000
NEAR_POLL_MS: Final = 2 * 60_000
"""Polls: at first each minute, then after a tenth of the time that has passed; near the rescue every two minutes."""

STUCK_MS: Final = 25 * 3_600_000
"""Upstream ends a batch within 24 hours (Anthropic, batch processing)."""

KEPT_MS: Final = 28 * 86_400_000
"""Upstream deletes results 29 days after the create (Anthropic, batch processing); the batch is given up before."""


class Phase(StrEnum):
    """The next step of an upstream batch."""

    PREPARING = "preparing"
    """Its body is to be written."""
    READY = "ready"
    """The create is to be sent."""
    SENDING = "sending"
    """A create was or may have been sent, and its reply is not known."""
    OPEN = "open"
    """Upstream works on it."""
    ENDED = "ended"
    """Its results are to be given to its ranges."""
    DONE = "done"
    """Each of its ranges was sent to the live lane, where what has no result runs, and the others only end."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive ranges of a batch."""

    batch_id: str
    first: int
    end: int
    """The number after that of the last range."""

    def __contains__(self, number: int) -> bool:
        return self.first <= number < self.end

    @property
    def numbers(self) -> range:
        """The numbers of its ranges."""
        return range(self.first, self.end)


class Listed(Protocol):
    """A Message Batch as upstream lists it; what it does not say is None."""

    @property
    def id(self) -> str:
        """Its id upstream."""
        ...

    @property
    def requests(self) -> int | None:
        """How many requests it has, which never changes."""
        ...

    @property
    def created_at(self) -> int | None:
        """When it was created, by upstream's clock."""
        ...


@dataclass(frozen=True, slots=True)
class UpstreamBatch:
    """The record of an upstream batch."""

    upstream_id: str
    tenant: str
    slices: tuple[Slice, ...]
    anthropic_version: str
    anthropic_beta: str | None
    created_at: int
    expires_at: int
    """When the first of its rows expires."""
    version: int = 1
    phase: Phase = Phase.PREPARING
    due_at: int | None = None
    """When the next step may be made."""
    owner: str | None = None
    lease_until: int = 0
    expected: int = 0
    """How many rows it has by the estimate of its plans, until its body is written."""
    deadline: int | None = None
    """The first deadline of its rows, as known now."""
    is_assured: bool = True
    """False: it was accepted although the live lane had no room for all its rows."""
    reason: str = ""
    """Why it is kept or canceled: the last revision."""
    requests: int = 0
    """How many requests its create has."""
    body_bytes: int = 0
    cuts: tuple[int, ...] = ()
    """Where the body may end, and how many requests it has less there: the last few requests, last one first."""
    models: tuple[str, ...] = ()
    """Of its requests; a `custom_id` names one by its number."""
    key_id: str | None = None
    workspace: str = ""
    """The key, and its workspace, in which the create was sent. Only keys of the same workspace see the batch."""
    sent_at: int = 0
    sends: int = 0
    """Creates that were sent and may have made a batch: it was neither refused nor looked for in vain."""
    tries: int = 0
    """Steps in a row that came to nothing."""
    message_batch_id: str | None = None
    is_confirmed: bool = True
    """False: it was found by its number of requests; the ids in its results will show whether it is the right one."""
    accepted_at: int | None = None
    rescue_at: int | None = None
    """When it is canceled so that its rows are still in time on the live lane; None: never."""
    canceled_at: int | None = None
    """When we asked upstream to cancel it."""
    wants_cancel: str | None = None
    """Why it is to be canceled."""
    ended_at: int | None = None
    applied: int = 0
    """How many of its ranges were given their results."""
    problem: str | None = None

    @property
    def due(self) -> int:
        """When the first of its rows must have its result."""
        return self.expires_at if self.deadline is None else min(self.deadline, self.expires_at)

    @property
    def prefix(self) -> str:
        """What the `custom_id` of each of its requests begins with: no other batch has it."""
        return self.upstream_id[-12:]

    @property
    def ranges(self) -> int:
        """The number of its ranges."""
        return sum(each.end - each.first for each in self.slices)

    @property
    def folder(self) -> str:
        """Where its objects are."""
        return f"batches/{self.upstream_id}/"

    @property
    def body_key(self) -> str:
        """The object with the body of its create."""
        return f"{self.folder}requests.json"

    def run_key(self, number: int) -> str:
        """The object with a part of its results, in the order of its rows."""
        return f"{self.folder}results/{number:04d}"


@dataclass(frozen=True, slots=True)
class RowId:
    """The row that a `custom_id` of an upstream batch names."""

    member: int
    """The number of its slice."""
    range: int
    offset: int
    model: int = 0
    """The number of its model in the record."""

    def text(self, prefix: str) -> str:
        """Return the `custom_id`: 64 characters at most, of the ones permitted (Anthropic, batch processing)."""
        return f"{prefix}-{self.member}-{self.range}-{self.offset}-{self.model}"


MOST_DIGITS: Final = 18


def row_id(custom_id: str, prefix: str) -> RowId | None:
    """Return the row that a `custom_id` names; None if it is none of ours."""
    start, _, rest = custom_id.partition("-")
    parts = rest.split("-")
    if start != prefix or len(parts) != 4 or not all(_is_number(each) for each in parts):  # noqa: PLR2004
        return None
    return RowId(*map(int, parts))


def _is_number(text: str) -> bool:
    return (
        text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS and str(int(text)) == text
    )


def upstream_id_of(first: Slice, version: int) -> str:
    """Return the id of the upstream batch whose first slice this is, collected from a version of its batch.

    Two collectors at once have the same; what is collected again because it was in no upstream batch has another.
    """
    digest = sha256(f"{first.batch_id}\x00{first.first}\x00{version}".encode()).hexdigest()
    return f"upstream_{digest[:32]}"


# Steps ---------------------------------------------------------------------------------------------------------


def take(state: UpstreamBatch, owner: str, now: int) -> UpstreamBatch:
    """Take the lease; raises UpstreamBatchBusy while another invocation has it."""
    if state.owner not in {None, owner} and state.lease_until > now:
        raise UpstreamBatchBusy(state.upstream_id, state.lease_until)
    return _changed(state, owner=owner, lease_until=now + LEASE_MS, due_at=now + LEASE_MS)


def keep(state: UpstreamBatch, owner: str, now: int, applied: int | None = None) -> UpstreamBatch:
    """Renew the lease, and note how many ranges were given their results."""
    _owned(state, owner)
    applied = state.applied if applied is None else applied
    return _changed(state, lease_until=now + LEASE_MS, due_at=now + LEASE_MS, applied=applied)


def give_back(state: UpstreamBatch, owner: str, due_at: int | None) -> UpstreamBatch:
    """Release the lease: the next step is due at a time."""
    _owned(state, owner)
    return _changed(state, owner=None, lease_until=0, due_at=due_at)


def prepared(  # noqa: PLR0913 - what the create needs to know
    state: UpstreamBatch,
    owner: str,
    *,
    requests: int,
    body_bytes: int,
    cuts: Sequence[int],
    models: Sequence[str],
    deadline: int | None,
) -> UpstreamBatch:
    """Record that the body is stored. Without any request there is nothing to send, and its ranges go on."""
    _owned(state, owner)
    return _changed(
        state,
        phase=Phase.READY if requests else Phase.ENDED,
        requests=requests,
        body_bytes=body_bytes,
        cuts=tuple(cuts),
        models=tuple(models),
        deadline=deadline,
        tries=0,
    )


def without_spares(
    state: UpstreamBatch, taken: Collection[int], *, is_disputed: bool = False
) -> UpstreamBatch:
    """Leave out as many of the last requests as it takes for a number of requests that no other open batch has.

    Upstream shows neither name nor content of a batch that has not ended, so a lost reply is found by this number.
    `is_disputed`: another batch takes the same number at this moment, so each takes one that follows from its own id.
    """
    free = [each for each in range(len(state.cuts) + 1) if state.requests - each not in taken]
    if not free:
        return state
    left_out = free[int(state.upstream_id[-8:], 16) % len(free)] if is_disputed else free[0]
    if not left_out:
        return state
    return replace(
        state,
        requests=state.requests - left_out,
        body_bytes=state.cuts[left_out - 1],
        cuts=state.cuts[left_out:],
    )


def sending(
    state: UpstreamBatch, owner: str, now: int, *, key_id: str, workspace: str
) -> UpstreamBatch:
    """Record that the create is about to be sent."""
    _owned(state, owner)
    return _changed(
        state,
        phase=Phase.SENDING,
        key_id=key_id,
        workspace=workspace,
        sent_at=now,
        sends=state.sends + 1,
        lease_until=now + SENT_WITHIN_MS,
        due_at=now + SENT_WITHIN_MS,
    )


def resized(state: UpstreamBatch, owner: str, taken: Collection[int]) -> UpstreamBatch:
    """Record that a create that is not sent yet takes another number of requests."""
    _owned(state, owner)
    return _changed(without_spares(state, taken, is_disputed=True))


def refused(state: UpstreamBatch, owner: str) -> UpstreamBatch:
    """Record that upstream has certainly not made the batch: it may be sent again."""
    _owned(state, owner)
    return _changed(state, phase=Phase.READY, sends=state.sends - 1, tries=state.tries + 1)


def not_found(state: UpstreamBatch, owner: str) -> UpstreamBatch:
    """Record that a create whose reply was lost made no batch: it may be sent again, and that is on record."""
    _owned(state, owner)
    return _changed(
        state,
        phase=Phase.READY,
        sends=state.sends - 1,
        tries=0,
        problem="a create whose reply was lost",
    )


def accepted(
    state: UpstreamBatch,
    owner: str,
    message_batch_id: str,
    now: int,
    *,
    is_confirmed: bool = True,
) -> UpstreamBatch:
    """Record that upstream has the batch."""
    _owned(state, owner)
    return _changed(
        state,
        phase=Phase.OPEN,
        message_batch_id=message_batch_id,
        is_confirmed=is_confirmed,
        accepted_at=now,
        tries=0,
    )


def ask_cancel(state: UpstreamBatch, reason: str, now: int) -> UpstreamBatch:
    """Have the batch canceled by its next step. One that has ended stays as it is."""
    if state.phase in {Phase.ENDED, Phase.DONE} or state.wants_cancel is not None:
        return state
    return _changed(state, wants_cancel=reason, due_at=min(now, state.due_at or now))


def revised(state: UpstreamBatch, owner: str, rescue_at: int | None, reason: str) -> UpstreamBatch:
    """Record when the batch is to be rescued, as planned now, and why."""
    _owned(state, owner)
    if (state.rescue_at, state.reason) == (rescue_at, reason):
        return state
    return _changed(state, rescue_at=rescue_at, reason=reason)


def canceled(state: UpstreamBatch, owner: str, now: int, reason: str) -> UpstreamBatch:
    """Record that upstream was asked to cancel the batch."""
    _owned(state, owner)
    if state.canceled_at is not None:
        return state
    return _changed(state, canceled_at=now, reason=reason)


def ended(
    state: UpstreamBatch, owner: str, now: int, *, problem: str | None = None
) -> UpstreamBatch:
    """Record that upstream has ended the batch, or that it is given up for a problem: its ranges go on."""
    _owned(state, owner)
    return _changed(
        state, phase=Phase.ENDED, ended_at=now, tries=0, problem=problem or state.problem
    )


def tried(state: UpstreamBatch, owner: str) -> UpstreamBatch:
    """Record that a step came to nothing."""
    _owned(state, owner)
    return _changed(state, tries=state.tries + 1)


def not_ours(state: UpstreamBatch, owner: str) -> UpstreamBatch:
    """Record that the batch that was taken for ours is another one: ours is looked for among the others."""
    _owned(state, owner)
    return _changed(
        state,
        phase=Phase.SENDING,
        message_batch_id=None,
        is_confirmed=True,
        accepted_at=None,
        canceled_at=None,
        ended_at=None,
        tries=0,
    )


def done(state: UpstreamBatch, owner: str) -> UpstreamBatch:
    """Record that each range was sent on."""
    _owned(state, owner)
    return _changed(
        state,
        phase=Phase.DONE,
        owner=None,
        lease_until=0,
        due_at=None,
        applied=state.ranges,
    )


def _owned(state: UpstreamBatch, owner: str) -> None:
    if state.owner != owner:
        raise LeaseLost(state.upstream_id)


def _changed(state: UpstreamBatch, **changes: object) -> UpstreamBatch:
    return replace(state, version=state.version + 1, **changes)  # type: ignore[arg-type]


# Rules ---------------------------------------------------------------------------------------------------------


L = TypeVar("L", bound=Listed)


def candidates(state: UpstreamBatch, listed: Iterable[L], known: Collection[str]) -> list[L]:
    """Return the batches that a create whose reply was lost may have made: of its time and size, and not yet known."""
    first = state.sent_at - CLOCKS_APART_MS
    last = state.sent_at + SENT_WITHIN_MS + CLOCKS_APART_MS
    return [
        each
        for each in listed
        if each.requests in {None, state.requests}
        and (each.created_at is None or first <= each.created_at <= last)
        and each.id not in known
    ]


def searched_until(state: UpstreamBatch) -> int:
    """Return until when a create whose reply was lost is looked for."""
    return state.sent_at + LISTED_AFTER_MS


def is_lost(state: UpstreamBatch, now: int) -> bool:
    """Return whether a create whose reply was lost is looked for no longer: its rows are over, and so is any batch."""
    return now >= max(state.expires_at, state.sent_at + EXPIRES_MS + CANCEL_MS)


def next_poll(state: UpstreamBatch, now: int, poll_ms: int = POLL_MS) -> int:
    """Return when to poll an open batch again: seldom if its rescue is far away and it has run for long."""
    passed = now - (state.accepted_at or now)
    pause = min(LONGEST_POLL_MS, max(poll_ms, passed // 10))
    if state.canceled_at is not None:
        return now + poll_ms
    if state.rescue_at is None:
        return now + pause
    left = state.rescue_at - now
    if left <= NEAR_MS:
        pause = min(pause, NEAR_POLL_MS)
    return min(now + pause, max(now + poll_ms // 2, state.rescue_at))


LEAST_ROWS_PER_MINUTE: Final = 50
"""The pace that is assumed while no limit is known."""


def rows_per_minute(groups: Iterable[Group]) -> int:
    """Return how many rows the live lane starts per minute in its slowest limit group: a rescue may need any."""
    limits = [each.requests.limit for each in groups if each.requests.learned]
    return max(LEAST_ROWS_PER_MINUTE, min(limits, default=0))


def retry_ms(tries: int) -> int:
    """Return after which time a step is tried again that came to nothing so many times in a row."""
    return min(10 * 60_000, 15_000 << min(tries, 6))


def must_be_canceled(state: UpstreamBatch, now: int) -> str | None:
    """Return why an open batch is to be canceled now; None if it is not, or was."""
    if state.phase is not Phase.OPEN or state.canceled_at is not None:
        return None
    if state.wants_cancel is not None:
        return state.wants_cancel
    if now >= (state.accepted_at or now) + STUCK_MS:
        return "upstream has not ended it after a day"
    return None


def is_cancel_due(state: UpstreamBatch) -> bool:
    """Return whether a cancel is wanted that a step can make or ask for at once, also one wanted during a step."""
    is_possible = state.phase in {Phase.PREPARING, Phase.READY, Phase.OPEN}
    return is_possible and state.wants_cancel is not None and state.canceled_at is None


def is_given_up(state: UpstreamBatch, now: int) -> bool:
    """Return whether an open batch is waited for no longer: its cancel, or its end, takes too long."""
    if state.canceled_at is not None:
        return now >= state.canceled_at + CANCELED_WITHIN_MS
    return now >= (state.accepted_at or state.created_at) + KEPT_MS
