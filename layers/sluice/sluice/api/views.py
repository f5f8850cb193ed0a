"""How jobs, batches, usage and limits are shown."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sluice.domain import batches as life_of_batches
from sluice.domain.batches import Phase, Tally
from sluice.domain.breakers import Breaker, pseudonym, refusals_circuit
from sluice.domain.jobs import Attempt, Job
from sluice.domain.limits import DIMENSIONS, FULL_RATE, Group, advanced
from sluice.domain.pricing import Spend, base_model, cost_facts, usd
from sluice.domain.times import rfc3339
from sluice.domain.upstream_batches import UpstreamBatch
from sluice.intake.accounts import UsageRow
from sluice.intake.batches import ARCHIVED_MS, is_archived, status


def time(milliseconds: int | None) -> str | None:
    """Write epoch milliseconds as RFC 3339 in UTC."""
    if milliseconds is None:
        return None
    moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def job_summary(job: Job) -> dict[str, Any]:
    """Show a job in a list."""
    return {
        "id": job.job_id,
        "type": "job",
        "state": job.state.value,
        "custom_id": job.custom_id,
        "lane": job.lane,
        "model": job.model,
        "created_at": time(job.created_at),
        "finished_at": time(job.finished_at),
        "attempts_used": job.attempts_used,
        "snoozes": job.snoozes,
        **cost_facts(job.cost_micro_usd, job.unknown_costs),
    }


def job_view(job: Job, message: str | None = None) -> dict[str, Any]:
    """Show all of a job; `message` is Claude's answer as JSON text."""
    answer = json.loads(message) if message is not None else None
    return {
        **job_summary(job),
        "started_at": time(job.started_at),
        "deadline": time(job.deadline),
        "not_before": time(job.not_before),
        "attempts": [_attempt_view(attempt) for attempt in job.attempts],
        "redrives": [
            {"at": time(each.at), "error": {"type": each.error.type, "message": each.error.message}}
            for each in job.redrives
        ],
        "last_snooze": (
            {"at": time(job.last_snooze.at), "reason": job.last_snooze.reason}
            if job.last_snooze
            else None
        ),
        "usage": job.usage.as_dict() if job.usage else None,
        "uncertain_calls": job.uncertain_calls,
        "message": answer,
        "text": None if answer is None else joined_text(answer),
        "error": ({"type": job.error.type, "message": job.error.message} if job.error else None),
        "metadata": dict(job.metadata),
        "fallback_models": list(job.fallback_models),
        "webhook": job.webhook,
        "cancel_requested": job.cancel_requested,
    }


def _attempt_view(attempt: Attempt) -> dict[str, Any]:
    error = attempt.error
    return {
        "attempt": attempt.number,
        "model": attempt.model,
        "at": time(attempt.at),
        "ended_at": time(attempt.ended_at),
        "outcome": attempt.outcome.value if attempt.outcome else None,
        "error": (
            {"type": error.type, "message": error.message, "status": error.status}
            if error
            else None
        ),
        "request_id": attempt.request_id,
        "usage": attempt.usage.as_dict() if attempt.usage else None,
        "cost_micro_usd": attempt.cost_micro_usd,
    }


def batch_view(batch: life_of_batches.Batch, so_far: Tally, now: int) -> dict[str, Any]:
    """Show a batch with its progress: `so_far` are the sums of the ranges that are done."""
    ended = batch.phase is Phase.ENDED
    state = "planning" if batch.phase is Phase.PLANNING else "running"
    if status(batch) != "in_progress":
        state = status(batch)
    done = so_far.rows + so_far.invalid
    expected = done if ended else max(batch.rows_expected, done)
    eta = None
    if not ended and done:
        eta = now + (now - batch.created_at) * max(0, expected - done) // done
    return {
        "id": batch.batch_id,
        "type": "batch",
        "name": batch.name,
        "source": batch.source.value,
        "state": state,
        "lane": batch.lane,
        "lane_asked": batch.options.lane,
        "on_unmeetable": batch.options.on_unmeetable or "run",
        "lane_decision": None if batch.decision is None else _decision(batch.decision),
        "upstream_batches": None if batch.upstream else [],
        "rows": {
            "expected": expected,
            "done": done,
            "succeeded": so_far.succeeded,
            "errored": so_far.errored,
            "canceled": so_far.canceled,
            "expired": so_far.expired,
            "invalid": so_far.invalid,
            "duplicates": batch.duplicates,
        },
        "calls": so_far.calls,
        "input_tokens": so_far.input_tokens,
        "output_tokens": so_far.output_tokens,
        **cost_facts(so_far.cost_micro_usd, so_far.unknown_costs),
        "saved_micro_usd": so_far.saved_micro_usd,
        "saved_usd": usd(so_far.saved_micro_usd),
        "uncertain_calls": so_far.uncertain_calls,
        "created_at": time(batch.created_at),
        "expires_at": time(batch.expires_at),
        "ended_at": time(batch.ended_at),
        "estimated_end_at": time(eta),
        "webhook": batch.options.webhook,
        "problem": batch.problem,
    }


def _decision(decision: life_of_batches.LaneDecision) -> dict[str, Any]:
    return {
        "lane": decision.lane,
        "reason": decision.reason,
        "at": time(decision.at),
        "rescue_at": time(decision.rescue_at),
        "is_assured": decision.is_assured,
        "is_meetable": decision.is_meetable,
    }


def upstream_view(record: UpstreamBatch) -> dict[str, Any]:
    """Show an upstream batch, as far as it concerns the owner of one of its batches."""
    return {
        "id": record.upstream_id,
        "message_batch_id": record.message_batch_id,
        "state": record.phase.value,
        "requests": record.requests or record.expected,
        "created_at": time(record.accepted_at),
        "rescue_at": time(record.rescue_at),
        "canceled_at": time(record.canceled_at),
        "reason": record.reason or None,
        "problem": record.problem,
    }


def part_links(links: Mapping[int, str]) -> list[dict[str, Any]]:
    """Show the presigned URLs of parts."""
    return [{"part": part, "url": url} for part, url in links.items()]


def message_batch(batch: life_of_batches.Batch, now: int, public_url: str) -> dict[str, Any]:
    """Show a batch as Anthropic's API does."""
    ended = batch.phase is Phase.ENDED
    archived = is_archived(batch, now)
    counts = batch.tally if ended else Tally()
    path = f"/v1/messages/batches/{batch.batch_id}/results"
    return {
        "id": batch.batch_id,
        "type": "message_batch",
        "processing_status": status(batch),
        "request_counts": {
            "processing": 0 if ended else batch.rows_expected,
            "succeeded": counts.succeeded,
            "errored": counts.errored,
            "canceled": counts.canceled,
            "expired": counts.expired,
        },
        "created_at": rfc3339(batch.created_at),
        "expires_at": rfc3339(batch.expires_at),
        "ended_at": rfc3339(batch.ended_at),
        "cancel_initiated_at": rfc3339(batch.cancel_initiated_at),
        "archived_at": rfc3339(batch.created_at + ARCHIVED_MS) if archived else None,
        "results_url": f"{public_url}{path}" if ended and not archived else None,
    }


def joined_text(message: Mapping[str, Any]) -> str:
    """Join the text blocks of a Message, whatever other blocks come before them."""
    content = message.get("content")
    if not isinstance(content, list):
        return ""
    return "".join(
        str(block.get("text", ""))
        for block in content
        if isinstance(block, dict) and block.get("type") == "text"
    )


def spend_view(spend: Spend) -> dict[str, Any]:
    """Show sums of calls."""
    return {**spend.as_dict(), **cost_facts(spend.cost_micro_usd, spend.unknown_costs)}


def usage_view(first: str, last: str, group_by: Sequence[str], rows: Sequence[UsageRow]) -> Any:
    """Show a usage report."""
    total = sum((row.spend for row in rows), Spend())
    return {
        "from": first,
        "to": last,
        "group_by": list(group_by),
        "data": [{**row.group, **spend_view(row.spend)} for row in rows],
        "total": spend_view(total),
    }


def _shown_circuit(
    name: str, breaker: Breaker, own_models: Collection[str], tenant: str
) -> str | None:
    """Return what to show of a circuit: nothing of other tenants, and not the address of an endpoint."""
    kind, _, rest = name.partition(" ")
    if kind == "model":
        return name if base_model(rest) in own_models else None
    is_own = breaker.tenant in {"", pseudonym(tenant)} and (
        not breaker.model or base_model(breaker.model) in own_models
    )
    is_others = kind == "refusals" and name != refusals_circuit(tenant)
    return kind if is_own and not is_others else None


def group_view(group: Group, own_models: Collection[str], tenant: str, now: int) -> dict[str, Any]:
    """Show a limit group to a tenant that uses it: its limits, and what its jobs wait for.

    Neither what is left of the limits, nor how large calls are, nor whose call was refused: that is the load of all
    tenants.
    """
    current = advanced(group, now)
    blocked = current.blocked_until > now
    return {
        "group": group.id,
        "organization": group.organization,
        "model_group": group.model_group,
        "limits": {name: group.bucket(name).limit for name in DIMENSIONS},
        "learned": all(group.bucket(name).learned for name in DIMENSIONS),
        "tokens_per_day": current.day and {"limit": current.day.limit},
        "rate_factor": current.rate_factor / FULL_RATE,
        "blocked_until": time(current.blocked_until) if blocked else None,
        "blocked_reason": current.blocked_reason if blocked else None,
        "set_aside": [
            {"what": what, "until": time(max(now, breaker.open_until))}
            for name, breaker in sorted(current.circuits.items())
            if breaker.is_open and (what := _shown_circuit(name, breaker, own_models, tenant))
        ]
        + [
            {"what": "workspace", "until": time(each.blocked_until)}
            for each in current.workspaces.values()
            if each.blocked_until > now
        ],
    }
