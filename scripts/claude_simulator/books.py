"""The books: what is counted and listed of every call, and the report made from it."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from scripts.claude_simulator.cache import InputTokens
from scripts.claude_simulator.faults import FAILURES
from scripts.claude_simulator.limits import SECOND, UNIT, Bucket, LimitGroup

DUPLICATE_EXAMPLES: Final = 20
NO_TOKENS: Final = InputTokens(0)


@dataclass(slots=True)
class Group:
    """One organization's model group: its buckets, those of its workspaces, and its counts."""

    name: str
    limits: LimitGroup
    workspaces: dict[str, LimitGroup] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
    most_in_flight: int = 0
    last_end: int | None = None
    starts: list[int] = field(default_factory=list)

    def start(self, now: int) -> None:
        """Count a call that was admitted."""
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        self.starts.append(now)

    def end(self, now: int) -> None:
        """Count a call that ended."""
        self.in_flight -= 1
        self.last_end = now


@dataclass(slots=True)
class Row:
    """One line of the ledger, written when the call, or the request of a batch, has ended."""

    at: int
    request_id: str | None
    organization: str
    key: str
    model: str
    group: str
    body_hash: str
    user_id: str | None
    status: int = 0
    outcome: str = ""
    ended_at: int = 0
    input: InputTokens = NO_TOKENS
    output_tokens: int = 0
    billed: bool = False
    delivered: bool = False
    batch_id: str | None = None
    custom_id: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the row as the ledger endpoint prints it."""
        return {
            "at": self.at / SECOND,
            "ended_at": self.ended_at / SECOND,
            "request_id": self.request_id,
            "organization": self.organization,
            "key_id": key_id(self.key),
            "model": self.model,
            "model_group": self.group,
            "body_hash": self.body_hash,
            "user_id": self.user_id,
            "lane": "live" if self.batch_id is None else "batch",
            "batch_id": self.batch_id,
            "custom_id": self.custom_id,
            "status": self.status,
            "outcome": self.outcome,
            "billed": self.billed,
            "delivered": self.delivered,
            "input_tokens": self.input.uncached if self.billed else 0,
            "cache_creation_input_tokens": self.input.written if self.billed else 0,
            "cache_read_input_tokens": self.input.read if self.billed else 0,
            "output_tokens": self.output_tokens if self.billed else 0,
        }


class Books:
    """What is counted since the start or the last reset."""

    def __init__(self, now: int, ledger_rows: int) -> None:
        self.started_at = now
        self.counts: Counter[str] = Counter()
        self.rows: deque[Row] = deque(maxlen=ledger_rows)
        self.rows_written = 0
        self.calls_of_content: Counter[str] = Counter()
        self.billed_of_content: Counter[str] = Counter()
        self.duplicates: dict[str, str | None] = {}
        self.first_request: int | None = None
        self.last_request: int | None = None

    def request(self, now: int) -> None:
        """Count a request that arrived."""
        self.counts["requests"] += 1
        if self.first_request is None:
            self.first_request = now
        self.last_request = now

    def write(self, row: Row, tallies: Iterable[Counter[str]], now: int) -> None:
        """Close a row: put it into the ledger and the counts."""
        row.ended_at = now
        self.rows.append(row)
        self.rows_written += 1
        for counts in tallies:
            counts[f"outcome:{row.outcome}"] += 1
            if row.billed:
                counts["billed"] += 1
                counts["input_tokens"] += row.input.uncached
                counts["cache_creation_input_tokens"] += row.input.written
                counts["cache_read_input_tokens"] += row.input.read
                counts["output_tokens"] += row.output_tokens
                counts["delivered" if row.delivered else "undelivered"] += 1
        if row.billed:
            self.billed_of_content[row.body_hash] += 1
            if self.billed_of_content[row.body_hash] > 1:
                self.duplicates.setdefault(row.body_hash, row.user_id)

    def deliver(self, row: Row, counts: Counter[str]) -> None:
        """Note that the answer of a closed row arrived after all."""
        if row.billed and not row.delivered:
            row.delivered = True
            counts["delivered"] += 1
            counts["undelivered"] -= 1


@dataclass(frozen=True, slots=True)
class Standing:
    """The state of an organization: its calls in flight, what met no model, its groups, its batches."""

    in_flight: int
    other: Counter[str]
    groups: list[Group]
    batches: dict[str, int]
    batch_items: Counter[str]


def report(
    books: Books,
    organisations: dict[str, Standing],
    now: int,
    *,
    starts: bool,
) -> dict[str, Any]:
    """Return the stats."""
    more_than_once = [
        {
            "body_hash": body_hash,
            "user_id": user_id,
            "billed": books.billed_of_content[body_hash],
        }
        for body_hash, user_id in itertools.islice(books.duplicates.items(), DUPLICATE_EXAMPLES)
    ]
    return {
        "now": now / SECOND,
        "started_at": books.started_at / SECOND,
        "process_cpu_seconds": time.process_time(),
        "first_request_at": _seconds(books.first_request),
        "last_request_at": _seconds(books.last_request),
        "in_flight": sum(standing.in_flight for standing in organisations.values()),
        "unauthenticated": books.counts["unauthenticated"],
        **_counts(books.counts),
        "duplicates": {
            "count": len(books.duplicates),
            "extra_calls": sum(
                books.billed_of_content[body_hash] - 1 for body_hash in books.duplicates
            ),
            "examples": more_than_once,
        },
        "ledger": {"rows": books.rows_written, "kept": len(books.rows)},
        "organisations": {
            name: {
                "in_flight": standing.in_flight,
                "without_model_group": _counts(standing.other),
                "model_groups": {
                    group.name: _group_stats(group, now, starts=starts) for group in standing.groups
                },
                "batches": {**standing.batches, "items": _item_counts(standing.batch_items)},
            }
            for name, standing in organisations.items()
        },
    }


def key_id(key: str) -> str:
    """Return a name for a key that does not give the key away."""
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def _seconds(nanoseconds: int | None) -> float | None:
    return None if nanoseconds is None else nanoseconds / SECOND


def _counts(counts: Counter[str]) -> dict[str, Any]:
    outcomes = {
        name.removeprefix("outcome:"): count
        for name, count in counts.items()
        if name.startswith("outcome:")
    }
    limited = {
        name.removeprefix("rate_limited:"): count
        for name, count in outcomes.items()
        if name.startswith("rate_limited:")
    }
    invalid = sum(count for name, count in outcomes.items() if name.startswith("invalid:"))
    failed = {name: count for name, count in outcomes.items() if name in FAILURES}
    return {
        "requests": counts["requests"],
        "answered": outcomes.get("answered", 0),
        "rate_limited": {"total": sum(limited.values()), **limited},
        "overloaded": failed.get("529", 0),
        "failed": failed,
        "invalid": invalid,
        "billed": counts["billed"],
        "delivered": counts["delivered"],
        "undelivered": counts["undelivered"],
        "input_tokens": counts["input_tokens"],
        "cache_creation_input_tokens": counts["cache_creation_input_tokens"],
        "cache_read_input_tokens": counts["cache_read_input_tokens"],
        "output_tokens": counts["output_tokens"],
    }


def _item_counts(counts: Counter[str]) -> dict[str, Any]:
    ended = {name: counts[f"outcome:{name}"] for name in ("canceled", "expired")}
    return {**_counts(counts), **ended}


def _bucket_stats(limits: LimitGroup, now: int) -> dict[str, Any]:
    limits.advance(now)
    buckets: dict[str, Bucket | None] = {
        "requests": limits.requests,
        "burst": limits.burst,
        "input_tokens": limits.input_tokens,
        "output_tokens": limits.output_tokens,
    }
    return {
        name: {
            "limit": bucket.limit,
            "capacity": bucket.capacity / UNIT,
            "level": bucket.level / UNIT,
        }
        for name, bucket in buckets.items()
        if bucket is not None
    }


def _group_stats(group: Group, now: int, *, starts: bool) -> dict[str, Any]:
    report = {
        **_counts(group.counts),
        "in_flight": group.in_flight,
        "most_in_flight": group.most_in_flight,
        "first_start_at": _seconds(group.starts[0]) if group.starts else None,
        "last_start_at": _seconds(group.starts[-1]) if group.starts else None,
        "last_end_at": _seconds(group.last_end),
        "buckets": _bucket_stats(group.limits, now),
    }
    if group.workspaces:
        report["workspaces"] = {
            name: _bucket_stats(limits, now) for name, limits in group.workspaces.items()
        }
    if starts:
        report["starts"] = [start / SECOND for start in group.starts]
    return report
