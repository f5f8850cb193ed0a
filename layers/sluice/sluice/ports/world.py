"""The world outside of AWS and Claude: time, chance, threads, metrics, and those who are notified."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
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

    def __call__(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        """Return what the call returns, or raise what it raises."""
        ...


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

    def publish(self, notices: Sequence[Notice]) -> None:
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
