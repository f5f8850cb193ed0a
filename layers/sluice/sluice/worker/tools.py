"""The ports and rules of a worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sluice.domain.pricing import PriceList
from sluice.domain.retries import RetryPolicy
from sluice.domain.waits import USUAL, Waits
from sluice.ports.claude import Claude
from sluice.ports.jobs import Answers, CallBooks, Inbox, JobRecords, Requests
from sluice.ports.limits import KeyPool, LimitStore
from sluice.ports.world import Blocking, Clock, Events, Jitter


@dataclass(frozen=True, slots=True)
class Tools:
    """Everything the worker needs of the world."""

    jobs: JobRecords
    params: Requests
    results: Answers
    inbox: Inbox
    limits: LimitStore
    keys: KeyPool
    claude: Claude
    ledger: CallBooks
    clock: Clock
    jitter: Jitter
    blocking: Blocking
    events: Events


@dataclass(frozen=True, slots=True)
class Rules:
    """What is set for this deployment."""

    policy: RetryPolicy
    prices: PriceList
    model_groups: Mapping[str, str]
    waits: Waits = USUAL
