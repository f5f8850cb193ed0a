"""Everything else: time, randomness, threads, metrics and logs, notifications, client keys."""

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
    """Runs a blocking call without blocking the other jobs of the worker."""

    def __call__(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        """Return what the call returns, or raise what it raises."""
        ...


@dataclass(frozen=True, slots=True)
class Notice:
    """The notification that a job or batch has ended."""

    id: str
    """Stable across repeated deliveries."""
    kind: str
    """`Job Ended` or `Batch Ended`."""
    at: int
    tenant: str
    facts: Mapping[str, object]
    webhook: str | None = None
    """URL to notify on completion."""


class Notices(Protocol):
    """Publishes notifications."""

    def publish(self, notices: Sequence[Notice]) -> None:
        """Publish each notification at least once; raises StoreBusy."""
        ...


@dataclass(frozen=True, slots=True)
class Webhook:
    """A webhook to deliver."""

    id: str
    tenant: str
    url: str
    body: str


@dataclass(frozen=True, slots=True)
class Reply:
    """The response of a receiver; without a status there was none, for the reason in `problem`."""

    status: int | None = None
    retry_after_s: int | None = None
    problem: str | None = None


class Web(Protocol):
    """Sends webhooks to receivers."""

    async def addresses(self, host: str, port: int) -> Sequence[str]:
        """Return the addresses of a host name now; empty if it has none."""
        ...

    async def post(self, url: str, address: str, headers: Mapping[str, str], body: str) -> Reply:
        """Send to this address only, even if the name now has others. Never raises."""
        ...


class SigningSecrets(Protocol):
    """The deployment's webhook secrets, from which those of the tenants are derived."""

    def __call__(self) -> Sequence[str]:
        """Return the current secret, and the previous one during a rotation: both sign. Raises StoreBusy."""
        ...


class Events(Protocol):
    """Metrics, and one log line per change of state."""

    def count(self, metric: str, value: float = 1, model_group: str | None = None) -> None:
        """Add to a metric."""
        ...

    def note(self, event: str, **facts: object) -> None:
        """Log a fixed phrase with facts as keys. Never a prompt, an answer or a key."""
        ...

    def problem(self, event: str, **facts: object) -> None:
        """Log a fixed phrase as an error; inside an exception handler with the traceback."""
        ...
