"""Message Batches upstream: the batches that Sluice creates at Anthropic.

How a call ended is a value, because the caller decides by it whether a batch may exist. Times are epoch milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol

from sluice.domain.keys import UpstreamKey
from sluice.domain.pricing import Bill, Usage
from sluice.domain.retries import Failure
from sluice.ports.claude import NO_HEADERS, Answer, Headers, Refused

IN_PROGRESS: Final = "in_progress"
CANCELING: Final = "canceling"
ENDED: Final = "ended"


@dataclass(frozen=True, slots=True)
class Access:
    """What every call is made with. A batch is visible only to the keys of its workspace (Anthropic, workspaces)."""

    key: UpstreamKey
    anthropic_version: str
    """Use the version with which the batch was created: it determines the format of its results."""
    anthropic_beta: str | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """The requests of a batch by state. Upstream keeps all of them in `processing` until the whole batch has ended."""

    processing: int = 0
    succeeded: int = 0
    errored: int = 0
    canceled: int = 0
    expired: int = 0


@dataclass(frozen=True, slots=True)
class Seen:
    """An upstream batch as upstream shows it. What is missing or makes no sense is None."""

    id: str
    status: str = ""
    """IN_PROGRESS, CANCELING, ENDED, or any other text: a state that this version does not know, and not an end."""
    requests: int | None = None
    """The sum of all counts, which never changes. None if upstream does not say."""
    counts: Counts = field(default_factory=Counts)
    created_at: int | None = None
    expires_at: int | None = None
    cancel_initiated_at: int | None = None
    ended_at: int | None = None
    archived_at: int | None = None
    has_results: bool = False
    """Upstream names a URL of the results: the batch has ended, and the results are not deleted yet."""

    @property
    def is_ended(self) -> bool:
        """Whether no request of the batch will change any more."""
        return self.status == ENDED


# How a call ended ----------------------------------------------------------------------------------------------
# `Refused` is that of `ports.claude`: upstream answered that it does not do it. `retries.meaning(refused.failure)` says
# whose trouble it is: rate limit, full queue, spend limit, key, permission, size, an invalid request, overload.


@dataclass(frozen=True, slots=True)
class Created:
    """The batch exists."""

    seen: Seen
    headers: Headers = NO_HEADERS


@dataclass(frozen=True, slots=True)
class NotSent:
    """No batch was created: upstream has not received the whole body."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Unknown:
    """The batch may exist: the whole body was sent, and nothing said what happened to it."""

    failure: Failure
    headers: Headers = NO_HEADERS


@dataclass(frozen=True, slots=True)
class NotFound:
    """Upstream does not know the batch, or not yet: a new one may be missing for some seconds, and flicker later."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Unreachable:
    """No usable answer: no connection, a server error, or a body that is not what was asked for. Try again later."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Listed:
    """All batches of the workspace since a time, newest first, also those of other clients."""

    batches: tuple[Seen, ...]


# Results -------------------------------------------------------------------------------------------------------


class RowKind(StrEnum):
    """How a request of a batch ended."""

    SUCCEEDED = "succeeded"
    ERRORED = "errored"
    CANCELED = "canceled"
    EXPIRED = "expired"
    BROKEN = "broken"
    """The line of the results cannot be used: no JSON, an unknown type, no Message, or too large."""


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One line of the results, in the order of upstream, which is any."""

    custom_id: str | None
    """None if a broken line does not have one that a request can have."""
    kind: RowKind
    message: bytes = b""
    """Of a succeeded row: the Message as received, byte for byte. Written anew only where it is not JSON that can be
    stored (invalid UTF-8, or numbers that no double holds), as for a live answer."""
    stop_reason: str | None = None
    bill: Bill | None = None
    """Of a succeeded row; None if upstream does not say."""
    failure: Failure | None = None
    """Of an errored or broken row, cut to size as for a live call. A broken row may have been billed, and so may one
    of type ANSWER_TOO_LARGE, which no repeat would make smaller."""

    @property
    def usage(self) -> Usage | None:
        """Of all models together; None if upstream does not say."""
        return self.bill.usage if self.bill else None

    def answer(self) -> Answer | None:
        """Return what a live call would have returned; None if the row did not succeed."""
        if self.kind is not RowKind.SUCCEEDED:
            return None
        text = self.message.decode()
        return Answer(text, self.usage, self.stop_reason, None, NO_HEADERS, self.bill)


class Rows(Protocol):
    """The results of a batch, while they are read. Close them unless they are read to their end."""

    def __iter__(self) -> Iterator[ResultRow]:
        """Yield each line once, also those whose custom_id was already seen; holds one line at a time.

        Raises ResultsInterrupted if the connection breaks: read the results again from the start.
        """
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


class UpstreamBatches(Protocol):
    """Message Batches, without retries. Neither keys nor bodies are in what is returned, raised or logged."""

    def create(
        self, access: Access, body: Iterable[bytes], length: int
    ) -> Created | Refused | NotSent | Unknown:
        """Create a batch from a JSON body of `length` bytes, which is read once and piece by piece.

        What `body` raises is raised; then no batch was created. Nor is one if the body is shorter or longer.
        """
        ...

    def get(self, access: Access, batch_id: str) -> Seen | NotFound | Refused | Unreachable:
        """Return the state of a batch."""
        ...

    def cancel(self, access: Access, batch_id: str) -> Seen | NotFound | Refused | Unreachable:
        """Cancel a batch; canceling it again changes nothing. One that has ended is refused: get it."""
        ...

    def since(self, access: Access, moment: int) -> Listed | Refused | Unreachable:
        """Return all batches of the key's workspace that were created at `moment` or later, or whose time is unknown.

        The list is complete, or it is not returned.
        """
        ...

    def results(self, access: Access, batch_id: str) -> Rows | NotFound | Refused | Unreachable:
        """Open the results of an ended batch. Compare the number of rows with `Seen.requests`."""
        ...
