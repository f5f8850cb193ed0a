"""A job as a DynamoDB item: a few attributes that DynamoDB itself uses, and the rest as one JSON text."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from datetime import date
from hashlib import sha256
from typing import TYPE_CHECKING, Any, TypeVar

from sluice.domain.jobs import (
    SCHEMA_VERSION,
    Attempt,
    AttemptOutcome,
    DueFor,
    Job,
    JobError,
    Lease,
    Redrive,
    Result,
    Snooze,
    State,
    due,
)
from sluice.domain.pricing import LedgerRow, Spend, Usage

if TYPE_CHECKING:
    from mypy_boto3_dynamodb.type_defs import AttributeValueTypeDef

    Item = dict[str, AttributeValueTypeDef]

T = TypeVar("T")

DAY_SECONDS = 86_400
WAITING_DAYS = 45
"""Minimum retention of requests and of jobs that have not ended: far longer than the 14 days of a message."""

DUE_SHARDS = 8
"""Parts of the index `by_due` per reason: a part accepts 1,000 writes a second, and a whole backlog may be parked."""

_FLAT_TEXT = ("job_id", "tenant", "state", "model", "lane", "custom_id", "webhook")
_FLAT_NUMBERS = (
    "version", "created_at", "finished_at", "cost_micro_usd", "attempts_used", "snoozes",
)  # fmt: skip
_APART = frozenset({*_FLAT_TEXT, *_FLAT_NUMBERS, "result", "unbooked"})
_DEFAULTS: dict[str, object] = {
    each.name: each.default for each in fields(Job) if each.name not in _APART
}


def created_key(job: Job) -> str:
    """Return the sort key of listings: creation time, then id."""
    return f"{job.created_at:015d}#{job.job_id}"


def due_part(job_id: str) -> int:
    """Return the number of the part of the index `by_due` that has the job."""
    return sha256(job_id.encode()).digest()[0] % DUE_SHARDS


def part_of(share: int) -> int:
    """Return how many due items to take from each part of the index `by_due`, to get about `share` of them."""
    return -(-share // DUE_SHARDS)


def due_shard(why: DueFor, part: int) -> str:
    """Return the name of a part of the index `by_due`. For compatibility, those of parked jobs are only a number."""
    return str(part) if why is DueFor.CALL else f"{why}{part}"


def encode(job: Job, retention_days: int) -> Item:
    """Return the item; `expires_at` is when DynamoDB may delete it, in epoch seconds."""
    item: Item = {
        "created_key": {"S": created_key(job)},
        "expires_at": {"N": str(_expires_at(job, retention_days))},
        "schema": {"N": str(SCHEMA_VERSION)},
        "record": {"S": _record(job)},
    }
    for name in _FLAT_TEXT:
        text = getattr(job, name)
        if text is not None:
            item[name] = {"S": str(text)}
    for name in _FLAT_NUMBERS:
        number = getattr(job, name)
        # The index of listings has the flat attributes only: without a cost there, it is unknown.
        is_unknown = name == "cost_micro_usd" and job.unknown_costs
        if number is not None and not is_unknown:
            item[name] = {"N": str(number)}
    next_check = due(job)
    if next_check is not None:
        why, at = next_check
        item["due_shard"] = {"S": due_shard(why, due_part(job.job_id))}
        item["due_at"] = {"N": str(at)}
        item["due_model"] = {"S": job.current_model}
        if job.deadline is not None:
            item["due_deadline"] = {"N": str(job.deadline)}
    if job.result is not None:
        if job.result.inline is not None:
            item["result"] = {"B": job.result.inline}
        if job.result.object_key is not None:
            item["result_key"] = {"S": job.result.object_key}
    return item


def as_text(job: Job) -> str:
    """Return a job without a result as one line of text."""
    return json.dumps(encode(job, 0), separators=(",", ":"))


def of_text(text: str) -> Job:
    """Return the job of a text from `as_text`."""
    return decode(json.loads(text))


def waiting_days(retention_days: int) -> int:
    """Return the retention in days of what a job needs to run."""
    return max(retention_days, WAITING_DAYS)


def expiry(now: int, last_needed: int, retention_days: int) -> int:
    """Return when an item of waiting work expires, in epoch seconds; times are epoch milliseconds."""
    return max(now, last_needed) // 1000 + waiting_days(retention_days) * DAY_SECONDS


def made(kind: type[T], record: dict[str, Any]) -> T:
    """Return the dataclass of a record; unknown fields, which a newer release may have written, are ignored."""
    known = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in record.items() if name in known})


def decode(item: Item) -> Job:
    """Return the job of an item, or of its projection in the listing index, which has no record."""
    record = json.loads(item["record"]["S"]) if "record" in item else {}
    flat: dict[str, Any] = {name: item[name]["S"] for name in _FLAT_TEXT if name in item}
    flat |= {name: int(item[name]["N"]) for name in _FLAT_NUMBERS if name in item}
    flat["state"] = State(flat["state"])
    if "cost_micro_usd" not in flat:
        flat["cost_micro_usd"] = record.get("known_cost_micro_usd", 0)
        flat["unknown_costs"] = record.get("unknown_costs", 1)
    result = None
    if "result" in item or "result_key" in item:
        inline = item.get("result", {}).get("B")
        result = Result(
            inline=None if inline is None else bytes(inline),
            object_key=item.get("result_key", {}).get("S"),
        )
    return Job(
        **flat,
        result=result,
        request_hash=record.get("request_hash", ""),
        input_chars=record.get("input_chars", 0),
        max_tokens=record.get("max_tokens", 0),
        anthropic_version=record.get("anthropic_version", ""),
        anthropic_beta=record.get("anthropic_beta"),
        request_bytes=record.get("request_bytes", 0),
        deadline=record.get("deadline"),
        fallback_models=tuple(record.get("fallback_models", ())),
        metadata=record.get("metadata", {}),
        last_snooze=_maybe(Snooze, record.get("last_snooze")),
        attempts=tuple(_attempt(each) for each in record.get("attempts", ())),
        fallbacks_used=record.get("fallbacks_used", 0),
        not_before=record.get("not_before"),
        lease=_maybe(Lease, record.get("lease")),
        started_at=record.get("started_at"),
        cancel_requested=record.get("cancel_requested", False),
        full_window=record.get("full_window", False),
        usage=_maybe(Usage, record.get("usage")),
        uncertain_calls=record.get("uncertain_calls", 0),
        unbooked=tuple(_row(each) for each in record.get("unbooked", ())),
        error=_maybe(JobError, record.get("error")),
        redrives=tuple(
            Redrive(each["at"], made(JobError, each["error"]))
            for each in record.get("redrives", ())
        ),
    )


def of_image(image: Item) -> Job:
    """Return the job of an item in the table's stream, without its result, whose bytes are text there."""
    return decode({name: value for name, value in image.items() if name != "result"})


def _expires_at(job: Job, retention_days: int) -> int:
    """Return the expiry: after the end of an ended job, else after the latest known time of its wait."""
    if job.state.is_final:
        return (job.finished_at or job.created_at) // 1000 + retention_days * DAY_SECONDS
    times = (
        job.created_at,
        job.not_before,
        job.deadline,
        job.lease.until if job.lease else None,
        job.last_snooze.at if job.last_snooze else None,
    )
    latest = max(time for time in times if time is not None)
    return latest // 1000 + waiting_days(retention_days) * DAY_SECONDS


def _record(job: Job) -> str:
    """Return the other fields as JSON, without defaults, because DynamoDB bills by the kilobyte."""
    rest: dict[str, object] = {}
    for name, default in _DEFAULTS.items():
        value = getattr(job, name)
        if value in (default, {}):
            continue
        rest[name] = _plain(value)
    if job.unknown_costs:
        rest["known_cost_micro_usd"] = job.cost_micro_usd
    if job.unbooked:
        rest["unbooked"] = [_row_facts(each) for each in job.unbooked]
    return json.dumps(rest, separators=(",", ":"), ensure_ascii=False)


def _plain(value: Any) -> object:
    if isinstance(value, Usage | Lease | Snooze | JobError | Attempt | Redrive):
        return {
            name: _plain(each) if isinstance(each, dict) else each
            for name, each in asdict(value).items()
            if each is not None and (each != 0 or name == "cost_micro_usd")
        }
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value


def _maybe(kind: Any, value: dict[str, Any] | None) -> Any:
    return None if value is None else made(kind, value)


def _attempt(value: dict[str, Any]) -> Attempt:
    outcome = value.get("outcome")
    return Attempt(
        number=value["number"],
        model=value["model"],
        at=value["at"],
        ended_at=value.get("ended_at"),
        outcome=AttemptOutcome(outcome) if outcome else None,
        error=_maybe(JobError, value.get("error")),
        request_id=value.get("request_id"),
        usage=_maybe(Usage, value.get("usage")),
        cost_micro_usd=value.get("cost_micro_usd"),
        alone=value.get("alone", False),
        version=value.get("version", 0),
        organization=value.get("organization"),
        key_id=value.get("key_id", ""),
    )


def _row_facts(row: LedgerRow) -> dict[str, object]:
    spend = {name: number for name, number in row.spend.as_dict().items() if number}
    return {**asdict(row), "day": row.day.isoformat(), "spend": spend}


def _row(facts: dict[str, Any]) -> LedgerRow:
    day, spend = date.fromisoformat(facts["day"]), made(Spend, facts["spend"])
    return made(LedgerRow, {**facts, "day": day, "spend": spend})
