"""The HTTP API's schemas: request validation, and the views of jobs, batches, usage and limits."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from math import isinf
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
    ValidationInfo,
    field_validator,
)
from pydantic_core import core_schema as core

from sluice.domain import batches as life_of_batches
from sluice.domain import jobs as life
from sluice.domain.batches import Phase, Source, Tally
from sluice.domain.errors import InvalidRequest, SluiceError
from sluice.domain.jobs import AttemptOutcome, State
from sluice.domain.limits import DIMENSIONS, FULL_RATE, SCALE, Group, advanced
from sluice.domain.pricing import Spend, usd
from sluice.domain.times import parse_rfc3339, rfc3339
from sluice.domain.webhooks import Network, check_url
from sluice.intake.accounts import UsageRow
from sluice.intake.batches import ARCHIVED_MS, is_archived, status
from sluice.intake.submit import Submission

MOST_JOBS: Final = 100
"""Jobs in one POST."""

MOST_BYTES: Final = 4_000_000
"""Of a request body. Lambda accepts 6 MB, including the headers and JSON escapes that API Gateway adds."""

DEEPEST: Final = 100
"""Levels of objects and lists in one job, itself the first. A Messages request has about ten."""

NOT_AN_OBJECT: Final = 'the body must be a JSON object: one job, or {"jobs": [...]}'
TOO_DEEP: Final = f"nested too deeply: at most {DEEPEST} levels of objects and lists"

CUSTOM_ID: Final = r"^[a-zA-Z0-9_-]{1,64}$"
VERSION: Final = r"^\d{4}-\d{2}-\d{2}$"
PRINTABLE: Final = r"^[!-~ ]+$"
A_TIME: Final = "must be an RFC 3339 string with a time zone, such as 2026-12-24T18:00:00Z"

ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256)]


# Requests ------------------------------------------------------------------------------------------------------


class Params(BaseModel):
    """A Messages API request. Sluice validates only the fields that every request needs; Claude validates the rest."""

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
            pattern=CUSTOM_ID,
            description="Your identifier for the job. Without an Idempotency-Key, resending the same job returns the "
            "existing one.",
        ),
    ] = None
    deadline: Annotated[
        AwareDatetime | None,
        Field(
            description="RFC 3339 time with a time zone. A job that has not started by then is `expired`."
        ),
    ] = None
    fallback_models: Annotated[
        list[ModelName],
        Field(max_length=5, description="Tried in order if the model is overloaded or refuses."),
    ] = []
    metadata: Annotated[
        dict[
            Annotated[str, StringConstraints(min_length=1, max_length=64)],
            Annotated[str, StringConstraints(max_length=512)],
        ],
        Field(max_length=16, description="Stored and returned with the job; not sent to Claude."),
    ] = {}
    lane: Annotated[str, Field(description="Only `live` is supported.")] = "live"
    webhook: Annotated[
        str | None,
        Field(description="HTTPS URL to notify on completion, with a signed request."),
    ] = None

    @field_validator("webhook")
    @classmethod
    def _public(cls, webhook: str | None, info: ValidationInfo) -> str | None:
        if webhook is not None:
            check_url(webhook, (info.context or {}).get("networks", ()))
        return webhook

    @field_validator("deadline", mode="before")
    @classmethod
    def _as_text(cls, deadline: object) -> object:
        if deadline is not None and not isinstance(deadline, str):
            raise ValueError(A_TIME)
        if isinstance(deadline, str):
            try:
                time = datetime.fromisoformat(deadline)
                # In UTC the year may be 10,000, which could be stored and never be shown.
                has_zone = time.tzinfo is not None and time.astimezone(UTC) is not None
            except (ValueError, OverflowError):
                has_zone = False
            if not has_zone:
                raise ValueError(A_TIME)
        return deadline

    @field_validator("lane")
    @classmethod
    def _known_lane(cls, lane: str) -> str:
        if lane != "live":
            message = "must be 'live' or omitted"
            raise ValueError(message)
        return lane


class JobList(BaseModel):
    """Up to 100 jobs; each is accepted or rejected individually."""

    model_config = ConfigDict(extra="forbid")

    jobs: Annotated[list[JobRequest], Field(min_length=1, max_length=MOST_JOBS)]


class SubmitBody(RootModel[Any]):
    """One job, or a list of jobs.

    Items are validated individually later, so that an invalid one does not reject the others.
    """

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: core.CoreSchema, handler: Any) -> Any:
        """Show what is really expected."""
        del schema
        return handler(TypeAdapter(JobRequest | JobList).core_schema)


def read_json(text: str) -> Any:
    """Parse a request body; raises JSONDecodeError, also for NaN, numbers outside the float range and deep nesting."""
    try:
        body = json.loads(text, parse_constant=_no_constant, parse_float=_finite)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise json.JSONDecodeError(TOO_DEEP, "", 0) from error
    except ValueError as error:
        what = str(error) if isinstance(error, _NoNumber) else "a number has too many digits"
        raise json.JSONDecodeError(what, "", 0) from error
    if isinstance(body, list):
        # Powertools would take the first item of a list for the whole body.
        raise json.JSONDecodeError(NOT_AN_OBJECT, "", 0)
    return body


class _NoNumber(ValueError):
    """NaN or an infinity: Python reads and writes them, JSON has none."""


def _no_constant(name: str) -> Any:
    message = f"{name} is not valid JSON"
    raise _NoNumber(message)


def _finite(digits: str) -> float:
    number = float(digits)
    if isinf(number):
        message = f"the number {digits[:20]} is too large"
        raise _NoNumber(message)
    return number


class UploadRequest(BaseModel):
    """A file to upload."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=512, examples=["reviews.jsonl"])]
    bytes: Annotated[int, Field(ge=1, description="Size of the file in bytes.")]
    options: Annotated[
        dict[str, Any],
        Field(description="Defaults for all rows: model, max_tokens, deadline and others."),
    ] = {}


class UploadParts(BaseModel):
    """A range of up to 100 parts of an upload."""

    model_config = ConfigDict(extra="forbid")

    id: Annotated[str, Field(min_length=1, max_length=1024)]
    name: Annotated[str, Field(min_length=1, max_length=512)]
    first: Annotated[int, Field(ge=1)]
    last: Annotated[int, Field(ge=1)]


class UploadedPart(BaseModel):
    """An uploaded part."""

    model_config = ConfigDict(extra="forbid")

    part: Annotated[int, Field(ge=1, le=10_000)]
    etag: Annotated[
        str, Field(min_length=1, max_length=256, description="ETag from the S3 response.")
    ]


class UploadDone(BaseModel):
    """Completes an upload after all parts are sent."""

    model_config = ConfigDict(extra="forbid")

    id: Annotated[str, Field(min_length=1, max_length=1024)]
    name: Annotated[str, Field(min_length=1, max_length=512)]
    parts: Annotated[list[UploadedPart], Field(min_length=1, max_length=10_000)]


class BatchRequest(BaseModel):
    """One row of a batch."""

    model_config = ConfigDict(extra="forbid")

    custom_id: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    params: dict[str, Any]


class BatchRequests(BaseModel):
    """Up to 100,000 rows, within the body size limit."""

    model_config = ConfigDict(extra="forbid")

    requests: Annotated[list[BatchRequest], Field(min_length=1, max_length=100_000)]


class BatchBody(RootModel[Any]):
    """The body of a create request; its items are validated individually later."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: core.CoreSchema, handler: Any) -> Any:
        """Show what is really expected."""
        del schema
        return handler(TypeAdapter(BatchRequests).core_schema)


def long_list(body: object) -> list[object] | None:
    """Return the jobs of a list above the limit as rows of a batch; None for any other body.

    Jobs without a `custom_id` are named by their position. An invalid job is reported in the batch's errors.
    """
    jobs = body.get("jobs") if isinstance(body, dict) else None
    if not isinstance(jobs, list) or len(jobs) <= MOST_JOBS:
        return None
    rows: list[object] = []
    for index, job in enumerate(jobs):
        if not isinstance(job, dict):
            raise InvalidRequest(f"jobs.{index}: Input should be a valid dictionary")
        for name in job:
            if name not in {"params", "custom_id", "deadline", "fallback_models"}:
                raise InvalidRequest(
                    f"jobs.{index}.{name}: not supported in lists of more than {MOST_JOBS} jobs, which run as a batch"
                )
        rows.append({"custom_id": job.get("custom_id") or f"job-{index}", **job})
    return rows


def read_requests(body: object) -> list[object]:
    """Return the items of a create; InvalidRequest for a bad envelope, in Anthropic's words."""
    if not isinstance(body, dict):
        raise InvalidRequest("The request body must be a JSON object.")
    for name in body:
        if name != "requests":
            raise InvalidRequest(f"{name}: Extra inputs are not permitted")
    if "requests" not in body:
        raise InvalidRequest("requests: Field required")
    requests = body["requests"]
    if not isinstance(requests, list):
        raise InvalidRequest("requests: Input should be a valid list")
    return requests


def read_deadline(text: str | None) -> int | None:
    """Return the deadline in epoch milliseconds; InvalidRequest when it is none."""
    if text is None:
        return None
    deadline = parse_rfc3339(text)
    if deadline is None:
        raise InvalidRequest(
            "sluice-deadline: must be RFC 3339 with a time zone, such as 2026-12-24T18:00:00Z "
            f"(got {text!r})"
        )
    return deadline


def read_webhook(url: str | None, networks: Sequence[Network] = ()) -> str | None:
    """Return the header's webhook; InvalidRequest when it is none that may be called."""
    if url is not None:
        try:
            check_url(url, networks)
        except ValueError as error:
            raise InvalidRequest(f"sluice-webhook: {error}") from error
    return url


def read_submissions(
    body: object, networks: Sequence[Network] = ()
) -> tuple[list[Submission | SluiceError], bool]:
    """Return the submissions and whether they came as a list; InvalidRequest for a bad envelope.

    `networks` are those a webhook may go into, beside all public addresses.
    """
    if not isinstance(body, dict):
        raise InvalidRequest(NOT_AN_OBJECT)
    if "jobs" not in body:
        return [read_submission(body, networks)], False
    unknown = sorted(set(body) - {"jobs"})
    if unknown:
        message = f"{', '.join(unknown)}: unknown field next to jobs; set it in each job"
        raise InvalidRequest(message)
    jobs = body["jobs"]
    if not isinstance(jobs, list) or not jobs:
        message = "jobs: must be a list of 1 to 100 jobs"
        raise InvalidRequest(message)
    if len(jobs) > MOST_JOBS:
        message = (
            f"jobs: {len(jobs)} jobs in one request; the maximum is {MOST_JOBS}; send several lists"
        )
        raise InvalidRequest(message)
    return [read_submission(job, networks) for job in jobs], True


def read_submission(job: object, networks: Sequence[Network] = ()) -> Submission | SluiceError:
    """Check one job; return the error instead when its form is wrong."""
    if _is_too_deep(job):
        return InvalidRequest(f"the job is {TOO_DEEP}")
    try:
        json.dumps(job, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return InvalidRequest("the job has text that is not valid Unicode (unpaired surrogate)")
    try:
        request = JobRequest.model_validate(job, context={"networks": networks})
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
        webhook=request.webhook,
    )


def _is_too_deep(job: object) -> bool:
    """Tell whether there are more levels than DEEPEST. Goes by levels, so that no depth is too deep for it."""
    level = [job] if isinstance(job, dict | list) else []
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return bool(level)


PHRASES: Final[Mapping[str, str]] = {
    "missing": "is required",
    "extra_forbidden": "unknown field",
    "string_type": "must be a string",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "int_parsing": "must be an integer",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list",
    "dict_type": "must be a JSON object",
    "model_type": "must be a JSON object",
    "too_short": "has {actual_length} items; the minimum is {min_length}",
    "too_long": "has {actual_length} items; the maximum is {max_length}",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "literal_error": "must be false or omitted: a job returns its answer when it is complete",  # `stream`
    "enum": "must be {expected}",
    "date_from_datetime_parsing": "must be a date, such as 2026-12-24",
    "date_parsing": "must be a date, such as 2026-12-24",
}
"""Messages for pydantic's error types, in place of its own. A type that is not listed keeps pydantic's message."""

PATTERNS: Final[Mapping[str, str]] = {
    CUSTOM_ID: "must be 1 to 64 letters, digits, hyphens or underscores",
    VERSION: "must be a date, such as 2026-10-21",
    PRINTABLE: "must be printable ASCII",
}


OF_A_MESSAGE: Final = frozenset(
    {
        *("cache_control", "container", "context_management", "inference_geo", "max_tokens"),
        *("mcp_servers", "messages", "model", "output_config", "service_tier", "stop_sequences"),
        *("stream", "system", "temperature", "thinking", "tool_choice", "tools", "top_k", "top_p"),
    }
)
"""Fields of a Messages API request: one of them beside `params` is in the wrong place, not misspelled."""


def explained(errors: Sequence[Mapping[str, Any]], *, of_request: bool = False) -> str:
    """Put pydantic's findings into one line: the field, the problem, and the value if it is short.

    Locations in a whole request start with its part (body, query, header), which is left out.
    """
    misplaced = [] if of_request else [error for error in errors if _is_misplaced(error)]
    if misplaced:
        others = [error for error in errors if not _is_misplaced(error)]
        return " ".join([_moved_inside(misplaced), *([explained(others)] if others else [])])
    parts = []
    for error in errors[:5]:
        where = ".".join(str(part) for part in error["loc"][of_request:])
        if error["type"] == "json_invalid":
            reason, place = error.get("ctx", {}).get("error", ""), error["loc"][-1]
            at = f" at character {place}" if place else ""
            whole = {NOT_AN_OBJECT: NOT_AN_OBJECT, TOO_DEEP: f"the body is {TOO_DEEP}"}
            parts.append(whole.get(reason, f"the body is not valid JSON: {reason}{at}"))
            continue
        if error["type"] == "missing" and not where:
            parts.append(f"the body is empty; {NOT_AN_OBJECT}")
            continue
        value = error.get("input")
        shown = f" (got {value!r})" if _is_short(value) and error["type"] != "missing" else ""
        parts.append(f"{f'{where}:' if where else 'the job'} {_phrase(error)}{shown}")
    more = f"; and {len(errors) - 5} more" if len(errors) > 5 else ""  # noqa: PLR2004 - as above
    return "; ".join(parts) + more


def _is_misplaced(error: Mapping[str, Any]) -> bool:
    """Tell whether a field of a Messages API request is outside `params`."""
    return error["type"] == "extra_forbidden" and next(iter(error["loc"])) in OF_A_MESSAGE


def _moved_inside(misplaced: Sequence[Mapping[str, Any]]) -> str:
    names = ", ".join(f"`{error['loc'][0]}`" for error in misplaced)
    if len(misplaced) == 1:
        return f"Unknown top-level field {names}; move it inside `params`."
    return f"Unknown top-level fields {names}; move them inside `params`."


def _phrase(error: Mapping[str, Any]) -> str:
    kind, context = str(error["type"]), error.get("ctx", {})
    said = PATTERNS.get(context.get("pattern", "")) or PHRASES.get(kind)
    if said is None and kind.startswith(("datetime", "timezone")):
        said = A_TIME
    if said is None:
        return str(error["msg"]).removeprefix("Value error, ")
    return said.format(**context)


def _is_short(value: object) -> bool:
    return isinstance(value, int | float | bool) or (isinstance(value, str) and len(value) <= 64)  # noqa: PLR2004


# Answers -------------------------------------------------------------------------------------------------------


def time(milliseconds: int | None) -> str | None:
    """Write epoch milliseconds as RFC 3339 in UTC."""
    if milliseconds is None:
        return None
    moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def job_summary(job: life.Job) -> dict[str, Any]:
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


def job_view(job: life.Job, message: str | None = None) -> dict[str, Any]:
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
        "message": answer,
        "text": None if answer is None else joined_text(answer),
        "error": ({"type": job.error.type, "message": job.error.message} if job.error else None),
        "metadata": dict(job.metadata),
        "fallback_models": list(job.fallback_models),
        "webhook": job.webhook,
        "cancel_requested": job.cancel_requested,
    }


def _attempt_view(attempt: life.Attempt) -> dict[str, Any]:
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
        "cost_micro_usd": so_far.cost_micro_usd,
        "cost_usd": usd(so_far.cost_micro_usd),
        "created_at": time(batch.created_at),
        "expires_at": time(batch.expires_at),
        "ended_at": time(batch.ended_at),
        "estimated_end_at": time(eta),
        "webhook": batch.options.webhook,
        "problem": batch.problem,
    }


def part_links(links: Mapping[int, str]) -> list[dict[str, Any]]:
    """Show where parts go."""
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
            "call_seconds": group.call_ms / 1000,
        },
        "tokens_per_day": current.day
        and {"limit": current.day.limit, "level": current.day.level // current.day.scale},
        "rate_factor": current.rate_factor / FULL_RATE,
        "blocked_until": time(current.blocked_until) if blocked else None,
        "blocked_reason": current.blocked_reason if blocked else None,
        "blocked_by": current.blocked_by if blocked else None,
        "set_aside": [
            {"what": name, "until": time(max(now, breaker.open_until))}
            for name, breaker in sorted(current.circuits.items())
            if breaker.is_open
        ],
    }


# The document --------------------------------------------------------------------------------------------------
#
# What the functions above return, as shapes for docs/openapi.json. No request is ever checked against them, so they
# cost nothing at run time (`defer_build`); tests hold both together.

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
Day = Annotated[str, Field(json_schema_extra={"format": "date"})]
MicroUsd = Annotated[int, Field(description="Millionths of a US dollar.")]
Usd = Annotated[str, Field(description="US dollars with six decimals.", examples=["0.001234"])]


class Shape(BaseModel):
    """A response schema."""

    model_config = ConfigDict(extra="forbid", defer_build=True)


class Health(Shape):
    """The gateway's status."""

    status: Literal["ok"]
    version: str


class ErrorBody(Shape):
    """Error type, as in Anthropic's API, and message."""

    type: Annotated[str, Field(examples=["invalid_request_error", "not_found_error"])]
    message: str


class Item(Shape):
    """The outcome of one item of a list: `job` if it was accepted, `error` if it was rejected."""

    index: int
    status: Literal["accepted", "rejected"]
    job: SubmittedJob | None = None
    error: ErrorBody | None = None


class Error(Shape):
    """An error in Anthropic's format."""

    type: Literal["error"]
    error: ErrorBody
    request_id: str
    data: Annotated[
        list[Item] | None,
        Field(description="Only if every job of a list was rejected: the error of each job."),
    ] = None


class JobError(Shape):
    """Why a job did not succeed."""

    type: str
    message: str


class AttemptError(JobError):
    """Why an attempt failed."""

    status: Annotated[int | None, Field(description="HTTP status, if upstream responded.")]


class Usage(Shape):
    """Tokens of one call, by type."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    web_search_requests: int | None = None


class Attempt(Shape):
    """One attempt of an upstream call. Waiting for a rate limit uses no attempt."""

    attempt: int
    model: str
    at: Time
    ended_at: Time | None
    outcome: AttemptOutcome | None
    error: AttemptError | None
    request_id: Annotated[
        str | None, Field(description="Anthropic's request ID, for support cases.")
    ]
    usage: Usage | None
    cost_micro_usd: MicroUsd | None


class Redrive(Shape):
    """An operator redrove the job after it ended; `attempts_used` counts from this time."""

    at: Time
    error: Annotated[JobError, Field(description="The error with which the job had ended.")]


class LastSnooze(Shape):
    """The last time the job returned to the queue without using an attempt."""

    at: Time
    reason: str


class JobSummary(Shape):
    """A job as shown in lists."""

    id: Annotated[str, Field(pattern="^job_[0-9a-f]{32}$")]
    type: Literal["job"]
    state: State
    custom_id: str | None
    lane: str
    model: str
    created_at: Time
    finished_at: Time | None
    attempts_used: int
    snoozes: int
    cost_micro_usd: MicroUsd
    cost_usd: Usd


class Job(JobSummary):
    """A job with all its fields."""

    started_at: Time | None
    deadline: Time | None
    not_before: Annotated[
        Time | None, Field(description="The job is not started before this time.")
    ]
    attempts: list[Attempt]
    redrives: list[Redrive]
    last_snooze: LastSnooze | None
    usage: Usage | None
    message: Annotated[
        dict[str, Any] | None,
        Field(description="Claude's Message, unchanged, including fields unknown to Sluice."),
    ]
    text: Annotated[str | None, Field(description="The text blocks of `message`, joined.")]
    error: JobError | None
    metadata: dict[str, str]
    fallback_models: list[str]
    webhook: Annotated[str | None, Field(description="URL to notify on completion.")]
    cancel_requested: bool


class SubmittedJob(Job):
    """An accepted job."""

    estimated_start_at: Annotated[
        Time | None, Field(description="Estimated start time; null if unknown.")
    ]


class SubmittedList(Shape):
    """The outcome of a list of jobs."""

    type: Literal["job_list"]
    accepted: int
    rejected: int
    data: list[Item]


class Listing(Shape):
    """A page of jobs, newest first."""

    data: list[JobSummary]
    has_more: bool
    next_page: Annotated[
        str | None, Field(description="Cursor for the next page; pass it as `page`.")
    ]


class Sums(Shape):
    """Totals over calls."""

    calls: int
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    cost_micro_usd: MicroUsd
    cost_usd: Usd


class UsageGroup(Sums):
    """Totals of one group; it has the fields of `day`, `model` and `lane` named in `group_by`."""

    day: Day | None = None
    model: str | None = None
    lane: str | None = None


class UsageReport(Shape):
    """Usage and cost."""

    first: Annotated[Day, Field(alias="from")]
    last: Annotated[Day, Field(alias="to")]
    group_by: list[Literal["day", "model", "lane"]]
    data: list[UsageGroup]
    total: Sums


class PerDimension(Shape):
    """One number per limit type."""

    requests: int
    input_tokens: int
    output_tokens: int


class Estimates(Shape):
    """Estimates used to reserve capacity for the next call."""

    output_tokens: int
    chars_per_token: float
    call_seconds: float


class DayLimit(Shape):
    """A daily limit on input plus output tokens."""

    limit: int
    level: int


class SetAside(Shape):
    """An open circuit breaker: an overloaded model or a failing endpoint, probed with single calls."""

    what: Annotated[str, Field(examples=["model claude-haiku-5-5"])]
    until: Time


class LimitGroup(Shape):
    """An organization and the models that share its rate limit."""

    group: Annotated[str, Field(examples=["org-id/haiku-5-5"])]
    organization: str
    model_group: str
    limits: Annotated[PerDimension, Field(description="Per minute.")]
    learned: Annotated[
        bool, Field(description="False until the first response reports the limits.")
    ]
    level: Annotated[
        PerDimension,
        Field(description="Remaining capacity; negative if it is reserved for later starts."),
    ]
    estimates: Estimates
    tokens_per_day: DayLimit | None
    rate_factor: Annotated[
        float, Field(description="Fraction of the limits that Sluice uses; reduced after 429s.")
    ]
    blocked_until: Time | None
    blocked_reason: str | None
    blocked_by: Annotated[
        str | None, Field(description="The upstream key and the request ID of the rejected call.")
    ]
    set_aside: list[SetAside]


class Limits(Shape):
    """All limit groups in use."""

    data: list[LimitGroup]


class PartLink(Shape):
    """Presigned upload URL for one part; expires in one hour."""

    part: int
    url: str


class Upload(Shape):
    """A started upload."""

    type: Literal["upload"]
    id: str
    name: str
    part_bytes: Annotated[int, Field(description="Size of every part except the last.")]
    parts: int
    links: Annotated[list[PartLink], Field(description="Presigned URLs of the first 100 parts.")]


class UploadLinks(Shape):
    """Presigned URLs of more parts."""

    links: list[PartLink]


class AbortedUpload(Shape):
    """An aborted upload."""

    type: Literal["upload_aborted"]
    id: str


class BatchRows(Shape):
    """Row counts so far."""

    expected: Annotated[int, Field(description="An estimate until the batch ends.")]
    done: int
    succeeded: int
    errored: int
    canceled: int
    expired: int
    invalid: Annotated[int, Field(description="Lines that are not valid rows.")]
    duplicates: int


class Batch(Shape):
    """A batch with its progress and cost."""

    id: Annotated[str, Field(pattern="^msgbatch_[0-9a-f]{32}$")]
    type: Literal["batch"]
    name: str
    source: Source
    state: Literal["planning", "running", "canceling", "ended"]
    rows: BatchRows
    calls: int
    input_tokens: int
    output_tokens: int
    cost_micro_usd: MicroUsd
    cost_usd: Usd
    created_at: Time
    expires_at: Time
    ended_at: Time | None
    estimated_end_at: Annotated[
        Time | None, Field(description="Estimated from the progress so far; null if unknown.")
    ]
    webhook: Annotated[str | None, Field(description="URL to notify on completion.")]
    problem: Annotated[str | None, Field(description="Why the whole file could not run.")]


class BatchListing(Shape):
    """A page of batches, newest first."""

    data: list[Batch]
    has_more: bool
    next_page: Annotated[
        str | None, Field(description="Cursor for the next page; pass it as `page`.")
    ]


class BatchLinks(Shape):
    """Presigned download URLs of an ended batch's files; they expire in 15 minutes."""

    results: str
    errors: str
    summary: str


class WebhookSecret(Shape):
    """The signing secret of a tenant's webhooks."""

    type: Literal["webhook_secret"]
    secret: Annotated[
        str, Field(pattern="^whsec_", description="For use with a Standard Webhooks library.")
    ]


class RequestCounts(Shape):
    """Row counts. All rows are `processing` until the whole batch has ended."""

    processing: int
    succeeded: int
    errored: int
    canceled: int
    expired: int


class MessageBatch(Shape):
    """A batch in Anthropic's format."""

    id: Annotated[str, Field(pattern="^msgbatch_[0-9a-f]{32}$")]
    type: Literal["message_batch"]
    processing_status: Literal["in_progress", "canceling", "ended"]
    request_counts: RequestCounts
    created_at: Time
    expires_at: Time
    ended_at: Time | None
    cancel_initiated_at: Time | None
    archived_at: Time | None
    results_url: Annotated[
        str | None, Field(description="URL of this gateway. Null until the batch has ended.")
    ]


class MessageBatchList(Shape):
    """A page of batches, newest first."""

    data: list[MessageBatch]
    has_more: bool
    first_id: str | None
    last_id: str | None


class ResultLine(Shape):
    """One line of the results."""

    custom_id: str
    result: Annotated[
        dict[str, Any],
        Field(
            description="`type` is succeeded, errored, canceled or expired, as in Anthropic's API."
        ),
    ]


class DeletedMessageBatch(Shape):
    """A deleted batch."""

    id: str
    type: Literal["message_batch_deleted"]


REFUSALS: Final[Mapping[int, str]] = {
    400: "The request is invalid; the message names the field.",
    401: "The client key is missing, unknown or disabled.",
    404: "The job or batch does not exist for this client key.",
    409: "The custom_id or Idempotency-Key was already used for a different request.",
    413: f"The body exceeds {MOST_BYTES:,} bytes.",
    500: "Internal error; search the log for this request_id.",
    503: "A data store is busy; retry after `retry-after` seconds.",
}

_REQUEST_ID: Final = {"description": "ID of this request.", "schema": {"type": "string"}}
_RETRY_AFTER: Final = {
    "description": "Seconds to wait before a retry.",
    "schema": {"type": "integer"},
}
_RETRY_AFTER_SOME: Final = {
    "description": "Seconds to wait before resending the jobs rejected with `overloaded_error`.",
    "schema": {"type": "integer"},
}
_LOCATION: Final = {
    "description": "Path of the job or batch; not set for a list of jobs.",
    "schema": {"type": "string", "examples": ["/jobs/job_0123456789abcdef0123456789abcdef"]},
}

CLIENT_KEY: Final[list[dict[str, list[str]]]] = [{"x-api-key": []}, {"bearer": []}]
"""Either of the two ways to send a client key."""


def responses(status: int, said: str, shape: Any, *refusals: int) -> dict[int, Any]:
    """Document a route's responses: its schema and its error statuses (always including 500)."""
    headers: dict[str, Any] = {"request-id": _REQUEST_ID}
    if status == 202:  # noqa: PLR2004 - the one that makes something
        headers |= {"Location": _LOCATION, "retry-after": _RETRY_AFTER_SOME}
    answers = {status: {"description": said, "headers": headers, "content": _json(shape)}}
    for refusal in sorted({*refusals, 500}):
        headers = {"request-id": _REQUEST_ID}
        if refusal == 503:  # noqa: PLR2004 - the one that passes
            headers["retry-after"] = _RETRY_AFTER
        answers[refusal] = {
            "description": REFUSALS[refusal],
            "headers": headers,
            "content": _json(Error),
        }
    return answers


def _json(shape: Any) -> dict[str, Any]:
    return {"application/json": {"model": shape}}
