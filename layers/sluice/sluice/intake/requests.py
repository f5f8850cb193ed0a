"""The one validator of requests: what a Messages request and a job must look like, whatever door they come through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
)

from sluice.domain.webhooks import check_url

DEEPEST: Final = 100
"""Levels of objects and lists in one job, itself the first. A Messages request has about ten."""

NOT_AN_OBJECT: Final = 'the body must be a JSON object: one job, or {"jobs": [...]}'
TOO_DEEP: Final = f"nested too deeply: at most {DEEPEST} levels of objects and lists"

CUSTOM_ID: Final = r"^[a-zA-Z0-9_-]{1,64}$"
VERSION: Final = r"^\d{4}-\d{2}-\d{2}$"
PRINTABLE: Final = r"^[!-~ ]+$"
A_TIME: Final = "must be an RFC 3339 string with a time zone, such as 2026-12-24T18:00:00Z"

ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256)]


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


def is_too_deep(job: object) -> bool:
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
