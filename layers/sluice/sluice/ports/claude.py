"""The Messages API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from sluice.domain.keys import UpstreamKey
from sluice.domain.limits import Dimension, Seen
from sluice.domain.pricing import Usage
from sluice.domain.retries import Failure


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

    def release(self) -> None:
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
    on_headers: Callable[[Headers], None] = ignore
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
