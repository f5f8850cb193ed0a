"""What a run was worth: counted from the simulator's ledger, which is what a provider's bill shows."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.limits.ideal import Others
from bench.limits.scenarios import Need

Row = Mapping[str, Any]

RATE_LIMITED = 429
FOLLOW_WINDOW_SECONDS = 10.0
FOLLOW_STEP_SECONDS = 0.5
FOLLOW_WITHIN = 0.10


def score(jobs: int, done: int, ideal_seconds: float, seconds: float) -> float:
    """Return the share of the jobs done x ideal time / time taken."""
    if jobs <= 0 or seconds <= 0:
        return 0.0
    return done / jobs * ideal_seconds / seconds


@dataclass(frozen=True, slots=True)
class Calls:
    """One client's calls as the ledger has them."""

    calls: int
    answered: int
    rate_limited: int
    billed_twice: int
    """Calls billed beyond the first for the same request."""
    avoidable: int
    """Those of them that no connection cut after billing explains."""
    foreign_bodies: int
    """Requests other than those given: this client rewrites them."""

    @property
    def rate_limited_per_answer(self) -> float:
        """429s of all kinds for each whole answer."""
        return self.rate_limited / max(1, self.answered)


def key_id(key: str) -> str:
    """Return the name the ledger has for a key."""
    return hashlib.sha256(key.encode()).hexdigest()[:12]


def rows_of(rows: Iterable[Row], keys: Iterable[str]) -> list[Row]:
    """Return the rows of calls made with these keys."""
    names = {key_id(key) for key in keys}
    return [row for row in rows if row["key_id"] in names]


def calls_of(rows: Sequence[Row], bodies: Iterable[str]) -> Calls:
    """Count one client's rows; `bodies` are the hashes of the requests it was given."""
    billed: Counter[str] = Counter()
    cut: Counter[str] = Counter()
    for row in rows:
        if row["billed"]:
            billed[row["body_hash"]] += 1
            if row["outcome"] == "drop_after_billing":
                cut[row["body_hash"]] += 1
    extra = {body: count - 1 for body, count in billed.items() if count > 1}
    known = set(bodies)
    return Calls(
        calls=len(rows),
        answered=sum(row["outcome"] == "answered" for row in rows),
        rate_limited=sum(row["status"] == RATE_LIMITED for row in rows),
        billed_twice=sum(extra.values()),
        avoidable=sum(max(0, count - cut[body]) for body, count in extra.items()),
        foreign_bodies=len({row["body_hash"] for row in rows if row["body_hash"]} - known),
    )


def need_of(rows: Iterable[Row], jobs: int) -> Need:
    """Return what a client's own requests need, from their answers and what was cut after billing.

    For clients that rewrite their requests: the lengths of the answers are drawn anew for them. What
    was never answered counts as the mean of what was.
    """
    billed = [row for row in rows if row["billed"]]
    cut = [row for row in billed if row["outcome"] == "drop_after_billing"]
    answered = {row["body_hash"]: row for row in billed if row["outcome"] == "answered"}
    needed = [*cut, *answered.values()]
    times = jobs / max(1, len(answered))
    return Need(
        round(times * len(needed)),
        round(
            times * sum(row["input_tokens"] + row["cache_creation_input_tokens"] for row in needed)
        ),
        round(times * sum(row["output_tokens"] for row in needed)),
    )


def taken_by(rows: Iterable[Row], began_at: float) -> Others:
    """Return what these calls took from the buckets, as the ideal time of another client counts it."""
    admitted = [row for row in rows if row["billed"]]
    starts = sorted(row["at"] - began_at for row in admitted)
    return Others(
        requests=[(at, 1.0) for at in starts],
        input_tokens=sorted(
            (
                row["at"] - began_at,
                float(row["input_tokens"] + row["cache_creation_input_tokens"]),
            )
            for row in admitted
        ),
        output_tokens=sorted(
            (row["ended_at"] - began_at, float(row["output_tokens"])) for row in admitted
        ),
    )


def per_second(starts: Iterable[float], began_at: float) -> list[int]:
    """Return how many calls were admitted in each second after the start."""
    seconds = [int(start - began_at) for start in starts if start >= began_at]
    counts = Counter(seconds)
    return [counts[second] for second in range(max(seconds, default=-1) + 1)]


def seconds_until_followed(
    starts: Sequence[float], changed_at: float, per_second_now: float, until: float
) -> float | None:
    """Return how long after the change the admitted rate came within 10 % of the new limit.

    The rate is that of the 10 s that follow; None when no such 10 s end before `until`.
    """
    after = 0.0
    while changed_at + after + FOLLOW_WINDOW_SECONDS <= until:
        begin = changed_at + after
        count = sum(begin <= start < begin + FOLLOW_WINDOW_SECONDS for start in starts)
        if abs(count / FOLLOW_WINDOW_SECONDS - per_second_now) <= FOLLOW_WITHIN * per_second_now:
            return after
        after += FOLLOW_STEP_SECONDS
    return None
