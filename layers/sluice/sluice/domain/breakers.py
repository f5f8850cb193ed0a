"""Circuit breakers: a model or endpoint that keeps failing gets no calls but single probes, until it works again.

A limit group has one for each model that is overloaded (529) and one for each endpoint that does not work (lost
connections, 5xx). They are independent of rate limits: buckets and rates do not change. Times are epoch milliseconds.

A 5xx does not say whose trouble it is. While all failures in a row came from one model, or from one tenant's requests,
the breaker of an endpoint concerns only that model or that tenant. Failures of other calls widen it. Until there are
enough of them, it stays open for the calls it concerned: more failures are no reason to release these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Final

from sluice.domain.waits import USUAL, Waits

STREAK: Final = 5
"""Consecutive failures that open a breaker; fewer affect only their own jobs."""

PROBES: Final = 2
"""Consecutive successful probes that close it."""


@dataclass(frozen=True, slots=True)
class Breaker:
    """The breaker of a model or endpoint that has failed recently."""

    streak: int = 0
    """Consecutive failures."""
    open_until: int = 0
    """No calls before this time; then one probe."""
    proved: int = 0
    """Consecutive successful probes since it opened."""
    model: str = ""
    tenant: str = ""
    """The one model, and the one tenant, that all failures in a row came from; empty: several."""
    others: int = 0
    """While it is open: consecutive failures of calls that it does not concern."""
    other_models: bool = False
    other_tenants: bool = False
    """Whether some of those were of another model, or another tenant."""

    @property
    def is_open(self) -> bool:
        """Return whether calls must wait or be probes."""
        return self.streak >= STREAK

    def concerns(self, model: str, tenant: str) -> bool:
        """Return whether the failures say anything about a call."""
        return self.model in {"", model} and self.tenant in {"", tenant}


def failed(
    breaker: Breaker, now: int, waits: Waits = USUAL, *, model: str = "", tenant: str = ""
) -> Breaker:
    """Count a failure. From the fifth in a row the breaker is open: for 5 s, then 10, 20, ... up to a minute."""
    if not breaker.streak:
        counted = Breaker(streak=1, model=model, tenant=tenant)
    elif breaker.concerns(model, tenant):
        counted = replace(breaker, streak=breaker.streak + 1, proved=0)
    else:
        noted = replace(
            breaker,
            others=breaker.others + 1,
            other_models=breaker.other_models or breaker.model not in {"", model},
            other_tenants=breaker.other_tenants or breaker.tenant not in {"", tenant},
        )
        counted = _widened(noted)
        if breaker.is_open and not counted.is_open:
            return noted
    if not counted.is_open:
        return counted
    until = now + _pause(counted.streak, waits)
    return replace(counted, open_until=max(breaker.open_until, until))


def served(breaker: Breaker, *, model: str = "", tenant: str = "") -> Breaker | None:
    """Count a success; None if the breaker is closed, so that no record is needed."""
    if not _widened(breaker).concerns(model, tenant):
        return breaker
    alone = replace(breaker, others=0, other_models=False, other_tenants=False)
    if not breaker.concerns(model, tenant):
        return alone
    if not breaker.is_open or breaker.proved + 1 >= PROBES:
        return None
    return replace(alone, proved=breaker.proved + 1, open_until=0)


def _widened(breaker: Breaker) -> Breaker:
    """Return the breaker that also concerns the other calls that failed.

    Its own failures are one piece of evidence that the trouble is wider, however many they were.
    """
    return Breaker(
        streak=1 + breaker.others,
        model="" if breaker.other_models else breaker.model,
        tenant="" if breaker.other_tenants else breaker.tenant,
    )


def probed(breaker: Breaker, start: int, waits: Waits = USUAL) -> Breaker:
    """Allow one probe of an open breaker at `start`. The next one starts after a pause, or once this one succeeds."""
    return replace(breaker, open_until=start + _pause(breaker.streak, waits))


def _pause(streak: int, waits: Waits) -> int:
    doublings = min(max(0, streak - STREAK), 10)
    return min(waits.breaker_pause_cap_ms, waits.breaker_pause_ms << doublings)


def model_circuit(model: str) -> str:
    """Return the name of a model's breaker."""
    return f"model {model}"


def endpoint_circuit(base_url: str) -> str:
    """Return the name of an endpoint's breaker."""
    return f"endpoint {base_url}"


def is_endpoint(circuit: str) -> bool:
    """Return whether a breaker is that of an endpoint."""
    return circuit.startswith(endpoint_circuit(""))


def refusals_circuit(tenant: str) -> str:
    """Return the name of the breaker for unknown refusals of a tenant's jobs: they must not stop other tenants."""
    return f"refusals {pseudonym(tenant)}"


def pseudonym(tenant: str) -> str:
    """Return what a limit group calls a tenant. Not its name, because limit groups are shown to all tenants."""
    return sha256(tenant.encode()).hexdigest()[:12]
