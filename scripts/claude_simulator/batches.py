"""Message Batches: what is in them, how far they are, and when they end; the clock is given.

Times are nanoseconds on the batch clock: the engine's clock, and what it was moved ahead by.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from scripts.claude_simulator import answers
from scripts.claude_simulator.accounts import Account, Caller
from scripts.claude_simulator.answers import Planned
from scripts.claude_simulator.books import Row
from scripts.claude_simulator.checks import MAX_BATCH_BYTES, RequestError, check_size
from scripts.claude_simulator.faults import Failure, drawn
from scripts.claude_simulator.limits import SECOND, ceil_div
from scripts.claude_simulator.settings import BatchService, Regimes, Settings

MAX_REQUESTS: Final = 100_000
CUSTOM_ID: Final = re.compile("[a-zA-Z0-9_-]{1,64}")
ITEM_KEYS: Final = {"custom_id", "params"}
EXPIRES_AFTER: Final = 24 * 3600 * SECOND
ARCHIVED_AFTER: Final = 29 * 24 * 3600 * SECOND
LONG_ANSWERS_BETA: Final = "output-300k-2026-03-24"
CANCELED: Final = "canceled"
EXPIRED: Final = "expired"
RESULT_TYPES: Final = ("succeeded", "errored", CANCELED, EXPIRED)
MOST_LISTED: Final = 1000
_PREFIX: Final = "msgbatch_"
_NOT_JSON: Final = "The request body is not valid JSON."
_BLANKS: Final = re.compile(r"[ \t\n\r]*")
_decode = json.JSONDecoder().raw_decode

Ending = Callable[["Batch", "Item", str | None], str]


@dataclass(slots=True)
class Item:
    """One request of a batch: its own JSON until it is of no more use, then how it ended."""

    custom_id: str
    raw: bytes
    outcome: str = ""
    error: Failure | None = None
    planned: Planned | None = None
    row: Row | None = None


@dataclass(slots=True)
class Batch:
    """One batch. Its items stand in the order in which they are worked off and returned."""

    id: str
    number: int
    account: Account
    workspace: str
    key: str
    version: str
    beta: str
    items: list[Item]
    accepted_at: int  # on the engine's clock, as in the ledger
    created_at: int
    service: BatchService
    duration: int
    cancel_initiated_at: int | None = None
    ended_at: int | None = None
    total: int = 0
    done: int = 0
    reads: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.total = len(self.items)

    @property
    def has_long_answers(self) -> bool:
        """Whether the beta for long answers was asked for."""
        return LONG_ANSWERS_BETA in self.beta

    @property
    def starts_at(self) -> int:
        """When the first request begins to be worked on."""
        return self.created_at + round(self.service.start_seconds * SECOND)

    @property
    def finishes_at(self) -> int:
        """When the last request has its answer, if nothing comes between."""
        return self.starts_at + self.duration

    @property
    def expires_at(self) -> int:
        """When what has no answer yet expires."""
        return self.created_at + day_of(self.service.regimes)

    @property
    def over_at(self) -> int:
        """When the batch ends, as things stand."""
        over = min(self.finishes_at, self.expires_at)
        if self.cancel_initiated_at is None:
            return over
        return min(over, self.cancel_initiated_at + round(self.service.cancel_seconds * SECOND))

    @property
    def status(self) -> str:
        """The processing status."""
        if self.ended_at is not None:
            return "ended"
        return "in_progress" if self.cancel_initiated_at is None else "canceling"

    def archived_at(self, now: int) -> int | None:
        """Return when its results went away, None before."""
        at = self.created_at + ARCHIVED_AFTER
        return at if now >= at else None

    def worked_off(self, now: int) -> int:
        """Return how many requests have their answer at `now`; nothing starts after a cancel."""
        until = min(now, self.expires_at)
        if self.cancel_initiated_at is not None:
            until = min(until, self.cancel_initiated_at)
        if until < self.starts_at:
            return 0
        if until >= self.finishes_at:
            return self.total
        return (until - self.starts_at) * self.total // (self.finishes_at - self.starts_at)

    def advance(self, now: int, end: Ending, most: int) -> int:
        """End the requests that are due, at most so many, and the batch after its last; count."""
        answered, over = self.worked_off(now), now >= self.over_at
        last = min(self.total if over else answered, self.done + most)
        fate = EXPIRED if self.cancel_initiated_at is None else CANCELED
        before = self.done
        for position in range(before, last):
            item = self.items[position]
            item.outcome = end(self, item, None if position < answered else fate)
            self.counts[item.outcome] += 1
        self.done = max(before, last)
        if over and self.done == self.total:
            self.ended_at = self.over_at
        return self.done - before

    def as_json(self, now: int, results_url: str) -> dict[str, Any]:
        """Return the batch as the API shows it; counts move only once all of it has ended."""
        ended, archived = self.ended_at is not None, self.archived_at(now)
        counts = {name: self.counts[name] if ended else 0 for name in RESULT_TYPES}
        return {
            "id": self.id,
            "type": "message_batch",
            "processing_status": self.status,
            "request_counts": {"processing": 0 if ended else self.total, **counts},
            "created_at": rfc3339_micros(self.created_at),
            "expires_at": rfc3339_micros(self.expires_at),
            "ended_at": rfc3339_micros(self.ended_at),
            "cancel_initiated_at": rfc3339_micros(self.cancel_initiated_at),
            "archived_at": rfc3339_micros(archived),
            "results_url": results_url if ended and archived is None else None,
        }


class Batches:
    """Every batch there is, by the workspace that alone may see it."""

    def __init__(self, clock: Callable[[], int], id_prefix: str) -> None:
        """Take the engine's clock, and what its ids begin with; ids rise with time."""
        self._clock = clock
        self._id_prefix = id_prefix
        self._ahead = 0
        self._number = 0
        self._creates = 0
        self._by_workspace: dict[tuple[str, str | None], dict[str, Batch]] = {}
        self._open: dict[str, Batch] = {}

    def now(self) -> int:
        """Return the time on the batch clock."""
        return self._clock() + self._ahead

    def move_clock(self, nanoseconds: int) -> None:
        """Set the batch clock ahead."""
        self._ahead += nanoseconds

    def clock_stats(self) -> dict[str, float]:
        """Return the time on the batch clock, and how far ahead it is, in seconds."""
        return {"now": self.now() / SECOND, "ahead_seconds": self._ahead / SECOND}

    # -- what the endpoints do --------------------------------------------------------------

    def create_fault(self, settings: Settings) -> str | None:
        """Return the failure the next create meets."""
        nth = self._creates
        self._creates += 1
        rates = settings.batches.create_faults
        return drawn(rates, answers.chances(settings.seed, "create", nth)[0]) if rates else None

    def create(self, caller: Caller, items: list[Item], beta: str, settings: Settings) -> Batch:
        """Begin a batch."""
        self._number += 1
        key = settings.seed.to_bytes(16, "big", signed=True)
        service, now = settings.batches, self.now()
        duration = (
            service.duration_of(len(items))
            if service.regimes is None
            else drawn_duration(service.regimes, settings.seed, now, self._number)
        )
        batch = Batch(
            id=f"{_PREFIX}{self._id_prefix}{self._number:010x}",
            number=self._number,
            account=caller.account,
            workspace=caller.workspace or "",
            key=caller.key,
            version=caller.version,
            beta=beta,
            items=sorted(
                items,
                key=lambda item: hashlib.blake2b(
                    item.custom_id.encode(), key=key, digest_size=8
                ).digest(),
            ),
            accepted_at=self._clock(),
            created_at=now,
            service=service,
            duration=duration,
        )
        self._of(caller)[batch.id] = batch
        self._open[batch.id] = batch
        counts = caller.account.batches
        counts["created"] += 1
        caller.account.batch_items["requests"] += batch.total
        queued = self.queued(caller.account)
        counts["most_queued_requests"] = max(counts["most_queued_requests"], queued)
        return batch

    def find(self, caller: Caller, batch_id: str) -> Batch:
        """Return a batch of the caller's workspace, or raise a 404."""
        batch = self._of(caller).get(batch_id)
        if batch is None:
            raise _not_found(batch_id)
        return batch

    def read(self, caller: Caller, batch_id: str, settings: Settings) -> Batch:
        """Return a batch as `find` does; one just made, or by bad luck any, may not be found."""
        batch = self.find(caller, batch_id)
        service = settings.batches
        if self.now() - batch.created_at < round(service.not_found_seconds * SECOND):
            raise _not_found(batch_id)
        if service.not_found_rate:
            nth = batch.reads
            batch.reads += 1
            chance = answers.chances(settings.seed, f"read of batch {batch.number}", nth)[0]
            if chance < service.not_found_rate:
                raise _not_found(batch_id)
        return batch

    def page(self, caller: Caller, query: dict[str, str]) -> tuple[list[Batch], bool]:
        """Return the batches a list asks for, newest first, and whether there are more that way."""
        limit, after, before = (
            query.get("limit", "20"),
            query.get("after_id"),
            query.get("before_id"),
        )
        if not limit.isdecimal() or not 1 <= int(limit) <= MOST_LISTED:
            raise RequestError(f"limit: a number from 1 to {MOST_LISTED}")
        if after is not None and before is not None:
            raise RequestError("after_id, before_id: give one of them, not both")
        for name in ("after_id", "before_id"):
            if not query.get(name, _PREFIX).startswith(_PREFIX):
                raise RequestError(f"{name}: {query[name]} is not the id of a batch")
        newest_first = list(reversed(self._of(caller).values()))
        size = int(limit)
        if before is not None:
            newer = [batch for batch in newest_first if batch.id > before]
            return newer[-size:], len(newer) > size
        older = [batch for batch in newest_first if after is None or batch.id < after]
        return older[:size], len(older) > size

    def cancel(self, batch: Batch) -> None:
        """Begin no more of its requests; to cancel it again changes nothing."""
        if batch.ended_at is not None:
            raise RequestError(f"Message batch {batch.id} has ended and cannot be canceled.")
        if batch.cancel_initiated_at is None:
            batch.cancel_initiated_at = self.now()
            batch.account.batches["canceled"] += 1

    def delete(self, caller: Caller, batch: Batch) -> None:
        """Forget an ended batch."""
        if batch.ended_at is None:
            raise RequestError(
                f"Message batch {batch.id} is {batch.status}; it can be deleted once it has ended."
            )
        del self._of(caller)[batch.id]
        caller.account.batches["deleted"] += 1

    def results(self, batch: Batch) -> list[Item]:
        """Return the items of an ended batch, for 29 days."""
        if batch.ended_at is None:
            raise RequestError(f"Message batch {batch.id} is {batch.status}; no results yet.")
        if batch.archived_at(self.now()) is not None:
            batch.items = []
            said = f"Message batch {batch.id} is archived; its results are no longer available."
            raise RequestError(said, 404, "not_found_error")
        return batch.items

    # -- time -------------------------------------------------------------------------------

    def advance(self, end: Ending, most: int | None = None) -> bool:
        """Work off what is due, at most so many requests; say whether more may be due already."""
        now = self.now()
        left = MAX_REQUESTS * (len(self._open) + 1) if most is None else most
        for batch in list(self._open.values()):
            left -= batch.advance(now, end, left)
            if batch.ended_at is not None:
                del self._open[batch.id]
                batch.account.batches["ended"] += 1
            if left <= 0:
                return True
        return False

    def is_idle(self) -> bool:
        """Say whether no batch waits for its end."""
        return not self._open

    def queued(self, account: Account) -> int:
        """Return how many requests of an organization wait in batches."""
        return sum(batch.total - batch.done for batch in self._open_of(account))

    def seconds_to_next_end(self, account: Account) -> int:
        """Return whole seconds, at least one, until the first batch of an organization ends."""
        ends = [batch.over_at for batch in self._open_of(account)]
        return max(1, ceil_div(min(ends) - self.now(), SECOND)) if ends else 1

    def stats(self, account: Account) -> dict[str, int]:
        """Return the counts of an organization's batches."""
        names = ("created", "ended", "canceled", "deleted", "most_queued_requests")
        counts = {name: account.batches[name] for name in names}
        waiting = self._open_of(account)
        return {**counts, "open": len(waiting), "queued_requests": self.queued(account)}

    def _open_of(self, account: Account) -> list[Batch]:
        return [batch for batch in self._open.values() if batch.account is account]

    def _of(self, caller: Caller) -> dict[str, Batch]:
        place = (caller.account.settings.id, caller.workspace)
        return self._by_workspace.setdefault(place, {})


def day_of(regimes: Regimes | None) -> int:
    """Return the nanoseconds of a day: the time until requests expire."""
    return EXPIRES_AFTER if regimes is None else round(EXPIRES_AFTER / regimes.speed)


def is_slow(regimes: Regimes, seed: int, day: int) -> bool:
    """Say whether a day, counted since the epoch, is a slow one."""
    return answers.chances(seed, "slow day", day)[0] < regimes.slow_day_rate


def drawn_duration(regimes: Regimes, seed: int, created_at: int, number: int) -> int:
    """Return the nanoseconds a batch is worked on: by seed, day and number of the batch only."""
    day = created_at // day_of(regimes)
    regime = regimes.slow if is_slow(regimes, seed, day) else regimes.normal
    chance = answers.chances(seed, f"batch of day {day}", number)[0]
    seconds = answers.lognormal(regime.median_seconds, regime.sigma, chance)
    return round(max(seconds, regime.at_least_seconds) / regimes.speed * SECOND)


def rfc3339_micros(nanoseconds: int | None) -> str | None:
    """Return the time as RFC 3339 in microseconds, `Z` at the end."""
    if nanoseconds is None:
        return None
    second, rest = divmod(nanoseconds, SECOND)
    whole = datetime.fromtimestamp(second, UTC)
    return f"{whole:%Y-%m-%dT%H:%M:%S}.{rest // 1000:06d}Z"


def _not_found(batch_id: str) -> RequestError:
    return RequestError(f"message_batch: {batch_id}", 404, "not_found_error")


# -- the body of a create -------------------------------------------------------------------


def read_items(body: bytes) -> Iterator[Item]:
    """Yield each of a create's `requests` after a check of its shape; its params stay unread.

    Requests are decoded one by one and kept as the bytes they came in: a whole body of 100,000 as
    Python objects would take a multiple of its size. The first thing wrong is raised.
    """
    check_size(body, MAX_BATCH_BYTES)
    try:
        text = _Text(body.decode())
    except UnicodeDecodeError as error:
        raise RequestError(_NOT_JSON) from error
    del body
    if not text.take("{"):
        raise RequestError("The request body must be a JSON object.")
    found = False
    if not text.take("}"):
        while True:
            name = text.value()
            text.expect(":")
            if name != "requests" or found:
                raise RequestError(f"{name}: Extra inputs are not permitted")
            found = True
            yield from _items(text)
            if text.take("}"):
                break
            text.expect(",")
    text.end()
    if not found:
        raise RequestError("requests: Field required")


def _items(text: _Text) -> Iterator[Item]:
    if not text.take("["):
        raise RequestError("requests: Input should be a valid list")
    if text.take("]"):
        raise RequestError("requests: List should have at least 1 item")
    seen: set[str] = set()
    while True:
        start = text.start()
        item = text.value()
        place = f"requests.{len(seen)}"
        if len(seen) == MAX_REQUESTS:
            raise RequestError(f"requests: List should have at most {MAX_REQUESTS} items")
        custom_id = _custom_id(place, item)
        if custom_id in seen:
            raise RequestError(f'{place}.custom_id: "{custom_id}" is not unique in this batch')
        seen.add(custom_id)
        yield Item(custom_id, text.since(start))
        if text.take("]"):
            return
        text.expect(",")


def _custom_id(place: str, item: object) -> str:
    if not isinstance(item, dict):
        raise RequestError(f"{place}: Input should be a valid dictionary")
    custom_id = item.get("custom_id")
    if custom_id is None:
        raise RequestError(f"{place}.custom_id: Field required")
    if not isinstance(custom_id, str) or CUSTOM_ID.fullmatch(custom_id) is None:
        raise RequestError(
            f"{place}.custom_id: String should match pattern '^{CUSTOM_ID.pattern}$'"
        )
    if "params" not in item:
        raise RequestError(f"{place}.params: Field required")
    if not isinstance(item["params"], dict):
        raise RequestError(f"{place}.params: Input should be a valid dictionary")
    for key in item:
        if key not in ITEM_KEYS:
            raise RequestError(f"{place}.{key}: Extra inputs are not permitted")
    return custom_id


class _Text:
    """JSON text that is read from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def start(self) -> int:
        """Pass over blanks; return where the next thing begins."""
        found = _BLANKS.match(self._text, self._at)
        self._at = self._at if found is None else found.end()
        return self._at

    def take(self, token: str) -> bool:
        """Pass over the token if it comes next; say whether it did."""
        here = self._text.startswith(token, self.start())
        self._at += len(token) if here else 0
        return here

    def expect(self, token: str) -> None:
        """Pass over the token, which must come next."""
        if not self.take(token):
            raise RequestError(_NOT_JSON)

    def value(self) -> object:
        """Return the value that comes next."""
        try:
            value, self._at = _decode(self._text, self.start())
        except (ValueError, RecursionError) as error:
            raise RequestError(_NOT_JSON) from error
        found: object = value
        return found

    def since(self, start: int) -> bytes:
        """Return what was read since then."""
        return self._text[start : self._at].encode()

    def end(self) -> None:
        """Nothing but blanks may follow."""
        if self.start() != len(self._text):
            raise RequestError(_NOT_JSON)
