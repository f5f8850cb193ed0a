"""The ports of a worker, and the settings of this deployment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sluice.domain.pricing import PriceList
from sluice.domain.retries import RetryPolicy
from sluice.domain.waits import USUAL, Waits
from sluice.ports.claude import Claude
from sluice.ports.jobs import Answers, CallBooks, JobRecords, Requests
from sluice.ports.limits import KeyPool, LimitStore
from sluice.ports.world import Blocking, Clock, Events, Jitter


@dataclass(frozen=True, slots=True)
class Tools:
    """The ports of a worker. The first four differ between jobs of the queue and rows of a range."""

    jobs: JobRecords
    params: Requests
    results: Answers
    ledger: CallBooks
    limits: LimitStore
    keys: KeyPool
    claude: Claude
    clock: Clock
    jitter: Jitter
    blocking: Blocking
    events: Events


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings of this deployment."""

    policy: RetryPolicy
    prices: PriceList
    model_groups: Mapping[str, str]
    waits: Waits = USUAL
