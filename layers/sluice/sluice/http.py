"""The HTTP API's shapes: what requests must look like, and how jobs, usage and limits are shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    RootModel,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    field_validator,
)
from pydantic_core import core_schema as core

from sluice.accounts import UsageRow
from sluice.domain.errors import InvalidRequest, SluiceError
from sluice.domain.jobs import Attempt, Job
from sluice.domain.limits import DIMENSIONS, FULL_RATE, SCALE, Group, advanced
from sluice.domain.pricing import Spend, usd
from sluice.submit import Submission

MOST_JOBS: Final = 100
"""Jobs in one POST."""

MOST_BYTES: Final = 4_000_000
"""Of a request body. Lambda takes 6 MB including the headers and JSON escapes that API Gateway adds."""

ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class Params(BaseModel):
    """A Messages API request as it is. Only what every request needs is checked here; Claude checks the rest."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: ModelName
    max_tokens: Annotated[int, Field(ge=1)]
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    stream: Literal[False] = False


class JobRequest(BaseModel):
    """One job."""

    model_config = ConfigDict(extra="forbid")

    params: Params
    custom_id: Annotated[
        str | None,
        Field(
            pattern=r"^[a-zA-Z0-9_-]{1,64}$",
            description="Your own name for the job. Without an Idempotency-Key it also makes a repeat find it.",
        ),
    ] = None
    deadline: Annotated[
        AwareDatetime | None,
        Field(description="RFC 3339, with a time zone. A later job is `expired`."),
    ] = None
    fallback_models: Annotated[
        list[ModelName],
        Field(max_length=5, description="Tried in order when the model is overloaded or refuses."),
    ] = []
    metadata: Annotated[
        dict[
            Annotated[str, StringConstraints(min_length=1, max_length=64)],
            Annotated[str, StringConstraints(max_length=512)],
        ],
        Field(
            max_length=16, description="Kept with the job and shown with it; not sent to Claude."
        ),
    ] = {}
    lane: Annotated[str, Field(description="`live` is the only lane so far.")] = "live"

    @field_validator("lane")
    @classmethod
    def _known_lane(cls, lane: str) -> str:
        if lane != "live":
            message = f"there is no lane {lane!r} yet; leave it out or say 'live'"
            raise ValueError(message)
        return lane


class JobList(BaseModel):
    """Up to 100 jobs; each has its own outcome."""

    model_config = ConfigDict(extra="forbid")

    jobs: Annotated[list[JobRequest], Field(min_length=1, max_length=MOST_JOBS)]


class SubmitBody(RootModel[Any]):
    """One job, or a list of them.

    Items are checked one by one later, so that a bad one does not take the others with it.
    """

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: core.CoreSchema, handler: Any) -> Any:
        """Show what is really expected."""
        del schema
        return handler(TypeAdapter(JobRequest | JobList).core_schema)


def read_submissions(body: object) -> tuple[list[Submission | SluiceError], bool]:
    """Return the submissions and whether they came as a list; raises InvalidRequest for a bad envelope."""
    if not isinstance(body, dict):
        message = 'the body must be a JSON object: one job, or {"jobs": [...]}'
        raise InvalidRequest(message)
    if "jobs" not in body:
        return [read_submission(body)], False
    unknown = sorted(set(body) - {"jobs"})
    if unknown:
        message = f"{', '.join(unknown)}: not known beside jobs"
        raise InvalidRequest(message)
    jobs = body["jobs"]
    if not isinstance(jobs, list) or not jobs:
        message = "jobs: must be a list of 1 to 100 jobs"
        raise InvalidRequest(message)
    if len(jobs) > MOST_JOBS:
        message = (
            f"jobs: {len(jobs)} jobs in one request, the most is {MOST_JOBS}; send several lists"
        )
        raise InvalidRequest(message)
    return [read_submission(job) for job in jobs], True


def read_submission(job: object) -> Submission | SluiceError:
    """Check one job; return the error instead when its form is wrong."""
    try:
        request = JobRequest.model_validate(job)
    except ValidationError as error:
        return InvalidRequest(explained(error.errors(include_url=False)))
    # As it was sent, not as it was parsed: a field we do not know must go up unchanged.
    params = {name: value for name, value in job["params"].items() if name != "stream"}  # type: ignore[index]
    return Submission(
        params=params,
        custom_id=request.custom_id,
        deadline=None if request.deadline is None else int(request.deadline.timestamp() * 1000),
        fallback_models=tuple(request.fallback_models),
        metadata=request.metadata,
        lane=request.lane,
    )


def explained(errors: Sequence[Mapping[str, Any]]) -> str:
    """Put pydantic's findings into one line: where, what, and the value where it is short."""
    parts = []
    for error in errors[:5]:
        where = ".".join(str(part) for part in error["loc"] if part != "body")
        value = error.get("input")
        shown = f" (got {value!r})" if _is_short(value) and error["type"] != "missing" else ""
        what = str(error["msg"]).removeprefix("Value error, ")
        parts.append(f"{where}: {what}{shown}" if where else f"{what}{shown}")
    more = f"; and {len(errors) - 5} more" if len(errors) > 5 else ""  # noqa: PLR2004 - as above
    return "; ".join(parts) + more


def _is_short(value: object) -> bool:
    return isinstance(value, int | float | bool) or (isinstance(value, str) and len(value) <= 64)  # noqa: PLR2004


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
        "cost_micro_usd": job.cost_micro_usd,
        "cost_usd": usd(job.cost_micro_usd),
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
        "last_snooze": (
            {"at": time(job.last_snooze.at), "reason": job.last_snooze.reason}
            if job.last_snooze
            else None
        ),
        "usage": job.usage.as_dict() if job.usage else None,
        "message": answer,
        "text": None if answer is None else joined_text(answer),
        "error": ({"type": job.error.type, "message": job.error.message} if job.error else None),
        "metadata": dict(job.metadata),
        "fallback_models": list(job.fallback_models),
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


def joined_text(message: Mapping[str, Any]) -> str:
    """Join the text blocks of a Message: what callers mean by "the answer", whatever blocks stand before it."""
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
    return {**spend.as_dict(), "cost_usd": usd(spend.cost_micro_usd)}


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


def group_view(group: Group, now: int) -> dict[str, Any]:
    """Show a limit group: what we believe its limits are, what is left, and who is in the way."""
    current = advanced(group, now)
    blocked = current.blocked_until > now
    return {
        "group": group.id,
        "organization": group.organization,
        "model_group": group.model_group,
        "limits": {name: group.bucket(name).limit for name in DIMENSIONS},
        "learned": all(group.bucket(name).learned for name in DIMENSIONS),
        "level": {name: current.bucket(name).level // SCALE for name in DIMENSIONS},
        "estimates": {
            "output_tokens": group.output_estimate,
            "chars_per_token": group.chars_per_1000_tokens / 1000,
        },
        "rate_factor": current.rate_factor / FULL_RATE,
        "blocked_until": time(current.blocked_until) if blocked else None,
        "blocked_reason": current.blocked_reason if blocked else None,
    }
