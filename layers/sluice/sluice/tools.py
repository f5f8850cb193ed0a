"""What the parts of a worker share: the world's ports and this deployment's rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sluice.domain.pricing import PriceList
from sluice.domain.retries import RetryPolicy
from sluice.ports import (
    Answers,
    Blocking,
    CallBooks,
    Claude,
    Clock,
    Events,
    Inbox,
    Jitter,
    JobRecords,
    KeyPool,
    LimitStore,
    Requests,
)


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
