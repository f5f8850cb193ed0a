"""The Messages API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from sluice.domain.keys import UpstreamKey
from sluice.domain.limits import Dimension, Seen
from sluice.domain.pricing import Bill, Usage
from sluice.domain.retries import Failure


@dataclass(frozen=True, slots=True)
class Headers:
    """The organization, the workspace and the limits named by the headers of a response."""

    organization: str | None = None
    seen: Mapping[Dimension, Seen] = field(default_factory=dict)
    workspace: str | None = None


NO_HEADERS = Headers()


def ignore(headers: Headers) -> None:
    """Ignore the headers: the default of `on_headers`."""


async def unbounded(size: int) -> None:
    """Return at once: the default of `room`."""


class Body:
    """The JSON of a request, in UTF-8. It is released once sent, so that it uses no memory during the wait."""

    __slots__ = ("_data", "_sent")

    def __init__(self, data: bytes, sent: Callable[[], None] | None = None) -> None:
        self._data: bytes | None = data
        self._sent = sent

    @property
    def data(self) -> bytes:
        """The bytes; callers must not keep them."""
        if self._data is None:
            raise ValueError("the request has been sent")
        return self._data

    def release(self) -> None:
        """Release the bytes. The sender calls this when all are sent, or will not be sent."""
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
    """Timeout of the call."""
    full_window: bool
    """`window_ms` is the time of a whole invocation."""
    early: bool = False
    """Report the headers as soon as they arrive, at the cost of streaming the answer."""
    on_headers: Callable[[Headers], None] = ignore
    """Called with the headers if they arrive before the answer."""
    names_model: bool = False
    """The body already contains `model`."""
    room: Callable[[int], Awaitable[None]] = unbounded
    """Awaited with a number of bytes before that much of the answer is held in memory."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A Message exactly as received from Claude."""

    message: str
    usage: Usage | None
    """Of all models together; None if upstream does not say."""
    stop_reason: str | None
    request_id: str | None
    headers: Headers = NO_HEADERS
    bill: Bill | None = None
    """The same by model; None: all of it is the model's that was asked."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A call without an answer."""

    failure: Failure
    headers: Headers = NO_HEADERS


class Claude(Protocol):
    """The Messages API."""

    async def send(self, request: CallRequest) -> Answer | Refused:
        """Make one call, without retries. Errors of upstream and of the network are returned, not raised."""
        ...
