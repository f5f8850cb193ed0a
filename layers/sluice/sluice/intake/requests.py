"""The one validator of requests: jobs, rows of batches and files, options of files, and headers.

Every way to submit uses these types, so that a request is validated the same however it arrives. Sluice validates what
it needs itself; Claude validates the rest of `params`. Messages are those of pydantic, as in Anthropic's API.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from sluice.domain.batches import BOM, MOST_LINE_BYTES, AskedLane, OnUnmeetable, Options
from sluice.domain.errors import InvalidRequest
from sluice.domain.finite_json import FINITE, is_deeper
from sluice.domain.forms import PROBLEM
from sluice.domain.params import not_in_batches
from sluice.domain.rows import BadRow, Line, Row
from sluice.domain.webhooks import Network, check_url

DEEPEST: Final = 100
"""Maximum levels of objects and lists in one job or row, its own level included. A Messages request has about ten."""

CUSTOM_ID: Final = r"^[a-zA-Z0-9_-]{1,64}$"
VERSION: Final = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"
PRINTABLE: Final = r"^[!-~ ]+$"
MESSAGES_URL: Final = "/v1/messages"

TOO_DEEP: Final = f"is nested too deeply: at most {DEEPEST} levels of objects and lists"
NOT_FINITE: Final = "has a number that is NaN, infinite, or beyond the range of a double"
NOT_UNICODE: Final = (
    "has text that is not valid Unicode; use UTF-8 without unpaired surrogate escapes"
)
TOO_MANY_DIGITS: Final = "has a number with too many digits"
UNREADABLE: Final = frozenset({TOO_DEEP, NOT_UNICODE, TOO_MANY_DIGITS})
"""Why JSON cannot be read, other than by a syntax error."""
EARLIEST: Final = datetime(2000, 1, 1, tzinfo=UTC)
TOO_EARLY: Final = "must not be before the year 2000"
A_TIME: Final = "must be an RFC 3339 string with a time zone, such as 2026-12-24T18:00:00Z"


# What is validated ---------------------------------------------------------------------------------------------


def _rfc3339(value: object, parse: ValidatorFunctionWrapHandler) -> datetime | None:
    """Accept text with a time zone only: a number or a local time is ambiguous."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(A_TIME)  # noqa: TRY004 - pydantic reports only this kind
    try:
        datetime.fromisoformat(value)
        time: datetime = parse(value)
        # In UTC the year may be 0 or 10,000, which could be stored and never be shown.
        time = time.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(A_TIME) from None
    if time < EARLIEST:
        raise ValueError(TOO_EARLY)
    return time


def _public(url: str, info: ValidationInfo) -> str:
    """Accept URLs that a webhook may call; the context names the private networks that are allowed."""
    check_url(url, (info.context or {}).get("networks", ()))
    return url


ModelName = Annotated[str, StringConstraints(min_length=1, max_length=256)]
CustomId = Annotated[str, StringConstraints(pattern=CUSTOM_ID)]
Version = Annotated[str, StringConstraints(pattern=VERSION)]
Beta = Annotated[
    # HTTP header values cannot begin or end with a space.
    str, StringConstraints(strip_whitespace=True, max_length=1024, pattern=PRINTABLE)
]
Deadline = Annotated[AwareDatetime | None, WrapValidator(_rfc3339)]
Webhook = Annotated[str, AfterValidator(_public)]
MaxTokens = Annotated[int, Field(ge=0, strict=True)]
"""0 is valid: such a request fills the prompt cache."""
FallbackModels = Annotated[list[ModelName], Field(max_length=5)]
Text = Annotated[str, StringConstraints(min_length=1)]


class Params(BaseModel):
    """A Messages API request. Sluice validates only the fields that every request needs; Claude validates the rest."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: ModelName
    max_tokens: MaxTokens
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    stream: Literal[False] = False


BATCH_ONLY: Final = ("batch", "auto")
"""Lanes on which only batches run."""


class LaneOptions(BaseModel):
    """The lane that is asked for, wherever it is asked for."""

    model_config = ConfigDict(extra="forbid")

    lane: Annotated[
        AskedLane | None,
        Field(
            description="The lane asked for. With `batch` or `auto`, the request becomes a batch, whatever its number "
            "of jobs. Default: `live` for single jobs and lists of up to 100, the parameter `DefaultLane` for longer "
            "lists. For a list, set it beside `jobs`.",
        ),
    ] = None
    on_unmeetable: Annotated[
        OnUnmeetable | None,
        Field(
            description="For a batch: whether it is to `run` or to be refused (`refuse`) if no lane can meet its "
            "deadline. Default: `run`. For a list, set it beside `jobs`.",
        ),
    ] = None

    @property
    def is_for_batch(self) -> bool:
        """Whether a request with these options becomes a batch, whatever its number of jobs."""
        return self.lane in BATCH_ONLY


class JobRequest(LaneOptions):
    """One job."""

    model_config = ConfigDict(extra="forbid")

    params: Params
    custom_id: Annotated[
        CustomId | None,
        Field(
            description="Your identifier for the job. Without an Idempotency-Key, resending the same job returns the "
            "existing one.",
        ),
    ] = None
    deadline: Annotated[
        Deadline,
        Field(
            description="RFC 3339 time with a time zone. A job that has not started by then is `expired`."
        ),
    ] = None
    fallback_models: Annotated[
        FallbackModels,
        Field(description="Tried in order if the model is overloaded or refuses."),
    ] = []
    metadata: Annotated[
        dict[
            Annotated[str, StringConstraints(min_length=1, max_length=64)],
            Annotated[str, StringConstraints(max_length=512)],
        ],
        Field(max_length=16, description="Stored and returned with the job; not sent to Claude."),
    ] = {}
    webhook: Annotated[
        Webhook | None,
        Field(description="HTTPS URL to notify on completion, with a signed request."),
    ] = None


class RowRequest(BaseModel):
    """One row of a batch or a file."""

    model_config = ConfigDict(extra="forbid")

    custom_id: CustomId
    params: Params
    deadline: Deadline = None
    fallback_models: FallbackModels = []


class BatchRequest(BaseModel):
    """One row of a batch."""

    model_config = ConfigDict(extra="forbid")

    custom_id: CustomId
    params: dict[str, Any]


class ListedJob(BatchRequest):
    """One job of a list that runs as a batch."""

    deadline: Deadline = None
    fallback_models: FallbackModels = []


class FileOptions(LaneOptions):
    """Defaults for the rows of a file, and how the file runs."""

    model: ModelName | None = None
    max_tokens: MaxTokens | None = None
    deadline: Deadline = None
    fallback_models: FallbackModels = []
    anthropic_version: Version | None = None
    anthropic_beta: Beta | None = None
    prompt: Text | None = None
    system: Text | None = None
    run: Text | None = None
    webhook: Webhook | None = None


# JSON ----------------------------------------------------------------------------------------------------------


_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")
"""In UTF-8, half a surrogate pair can occur only as an escape."""


def decode(text: str) -> Any:
    """Parse JSON; raises JSONDecodeError, or ValueError with one of UNREADABLE.

    Text that is not valid Unicode and numbers that are not finite are read: `unsendable` finds them in the job or row
    that has them, so that they affect no other.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    except json.JSONDecodeError as error:
        if not _is_unicode(text):
            raise ValueError(NOT_UNICODE) from error
        raise
    except ValueError as error:
        raise ValueError(TOO_MANY_DIGITS) from error


def unread(error: ValueError) -> str:
    """Return why `decode` failed."""
    if isinstance(error, json.JSONDecodeError):
        return f"is not valid JSON: {error.msg} at character {error.pos + 1}"
    return str(error)


def unsendable(item: object) -> str | None:
    """Return why an object cannot be sent as JSON in UTF-8, or None."""
    if is_deeper(item, DEEPEST):
        return TOO_DEEP
    try:
        json.dumps(item, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        return NOT_UNICODE
    except ValueError:
        return NOT_FINITE
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# Jobs, options and headers -------------------------------------------------------------------------------------


def read_job(job: object, networks: Sequence[Network] = ()) -> JobRequest | InvalidRequest:
    """Validate one job. `networks` are the private networks that a webhook may call."""
    problem = unsendable(job)
    if problem is not None:
        return InvalidRequest(f"the request {problem}")
    try:
        request = JobRequest.model_validate(job, context={"networks": networks})
    except ValidationError as error:
        return InvalidRequest(explained(error.errors(include_url=False)))
    problem = lane_problem(job["params"], request.lane)  # type: ignore[index]
    return request if problem is None else InvalidRequest(problem)


def read_options(said: object, networks: Sequence[Network] = ()) -> Options:
    """Return the options of a file; raises InvalidRequest."""
    problem = unsendable(said)
    if problem is not None:
        raise InvalidRequest(f"options: the file {problem}")
    try:
        found = FileOptions.model_validate(said, context={"networks": networks})
    except ValidationError as error:
        raise InvalidRequest(
            explained(error.errors(include_url=False), "options", of_item=False)
        ) from error
    facts = dict(found) | {
        "deadline": milliseconds(found.deadline),
        "fallback_models": tuple(found.fallback_models),
    }
    return Options(**facts)


_DEADLINE: Final[TypeAdapter[datetime | None]] = TypeAdapter(Deadline)
_WEBHOOK: Final[TypeAdapter[str | None]] = TypeAdapter(Webhook | None)
_LANE: Final[TypeAdapter[AskedLane | None]] = TypeAdapter(AskedLane | None)
_ON_UNMEETABLE: Final[TypeAdapter[OnUnmeetable | None]] = TypeAdapter(OnUnmeetable | None)


def read_deadline(text: str | None) -> int | None:
    """Return the header's deadline in epoch milliseconds; raises InvalidRequest."""
    try:
        return milliseconds(_DEADLINE.validate_python(text))
    except ValidationError as error:
        raise InvalidRequest(
            explained(error.errors(include_url=False), "sluice-deadline")
        ) from error


def read_webhook(url: str | None, networks: Sequence[Network] = ()) -> str | None:
    """Return the header's webhook; raises InvalidRequest for one that may not be called."""
    try:
        return _WEBHOOK.validate_python(url, context={"networks": networks})
    except ValidationError as error:
        raise InvalidRequest(
            explained(error.errors(include_url=False), "sluice-webhook")
        ) from error


def read_lane(text: str | None) -> AskedLane | None:
    """Return the header's lane; raises InvalidRequest."""
    try:
        return _LANE.validate_python(text)
    except ValidationError as error:
        raise InvalidRequest(explained(error.errors(include_url=False), "sluice-lane")) from error


def read_on_unmeetable(text: str | None) -> OnUnmeetable | None:
    """Return what the header says of deadlines that no lane can meet; raises InvalidRequest."""
    try:
        return _ON_UNMEETABLE.validate_python(text)
    except ValidationError as error:
        raise InvalidRequest(
            explained(error.errors(include_url=False), "sluice-on-unmeetable")
        ) from error


def milliseconds(time: datetime | None) -> int | None:
    """Return epoch milliseconds, rounded down: as a float the last instant of the year 9999 is in the year 10,000."""
    return None if time is None else (time - _EPOCH) // timedelta(milliseconds=1)


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


# Items of a batch ----------------------------------------------------------------------------------------------

MOST_ROWS: Final = 100_000

_ITEMS: Final[TypeAdapter[list[Any]]] = TypeAdapter(
    Annotated[list[Any], Field(min_length=1, max_length=MOST_ROWS)]
)


def read_items(
    items: Sequence[object], kind: type[BatchRequest], place: str, lane: AskedLane = "live"
) -> list[str]:
    """Return the `custom_id` of each item of a new batch; raises InvalidRequest for the first that is invalid.

    `params` are validated with the row, as Anthropic does: an invalid request is the error of its row alone. Only
    on the lane `batch`, a request that Message Batches reject is refused here, because it could not run there.
    """
    here = place
    try:
        _ITEMS.validate_python(items)
        custom_ids = []
        for position, item in enumerate(items):
            here = f"{place}.{position}"
            problem = unsendable(item)
            if problem is not None:
                raise InvalidRequest(f"{here}: the request {problem}")
            request = kind.model_validate(item)
            problem = lane_problem(request.params, lane)
            if problem is not None:
                raise InvalidRequest(f"{here}.{problem}")
            custom_ids.append(request.custom_id)
    except ValidationError as error:
        raise InvalidRequest(explained(error.errors(include_url=False), here)) from error
    return custom_ids


def lane_problem(params: Mapping[str, Any], lane: AskedLane | None) -> str | None:
    """Return why a request cannot run on the lane that is in force; None if it can. `auto` runs any request."""
    problem = not_in_batches(params) if lane == "batch" else None
    return None if problem is None else f"params.{problem}, or set lane to 'live' or 'auto'"


# Rows ----------------------------------------------------------------------------------------------------------


_NAMED_FIRST: Final = re.compile(rb'\s*\{\s*"custom_id"\s*:\s*"([a-zA-Z0-9_-]{1,64})"\s*,')
"""The beginning of a row that is not parsed because it is too long, if its `custom_id` comes first."""


def read_row(line: Line, options: Options) -> Row | BadRow | None:
    """Return the row in a line, or why it cannot run; None for a blank line."""
    if line.too_long:
        named = _NAMED_FIRST.match(line.text.removeprefix(BOM))
        custom_id = named[1].decode() if named else None
        return BadRow(f"the line exceeds {MOST_LINE_BYTES:,} bytes", custom_id)
    text = line.text.removeprefix(BOM).strip()
    if not text:
        return None
    try:
        item, problem = _parsed(text)
    except ValueError as error:
        return BadRow(f"the line {unread(error)}")
    if not isinstance(item, dict):
        return BadRow('the line is not a JSON object; use {"custom_id": ..., "params": {...}}')
    if problem is None:
        try:
            return _row(item, options)
        except ValidationError as error:
            problem = explained(error.errors(include_url=False))
        except InvalidRequest as error:
            problem = str(error)
    custom_id = item.get("custom_id")
    is_named = isinstance(custom_id, str) and re.fullmatch(CUSTOM_ID[1:-1], custom_id)
    return BadRow(problem, custom_id if is_named else None)


def _parsed(text: bytes) -> tuple[Any, str | None]:
    """Return a line's value and why it cannot be sent; checks the value only if its text gives a reason."""
    suspect = text.count(b"[") + text.count(b"{") > DEEPEST or _SURROGATE.search(text) is not None
    try:
        words = text.decode()
    except UnicodeDecodeError:
        words, suspect = text.decode(errors="surrogateescape"), True
    try:
        item = FINITE.decode(words)
    except (ValueError, RecursionError):
        item, suspect = decode(words), True
    problem = unsendable(item) if suspect else None
    return item, None if problem is None else f"the request {problem}"


def _row(item: Mapping[str, Any], options: Options) -> Row:
    """Validate a row, in Anthropic's format or the older one with `method`, `url` and `body`."""
    if PROBLEM in item:
        raise InvalidRequest(str(item[PROBLEM]))
    said = dict(item)
    if "body" in said and said.get("params") is None:
        method, url = said.pop("method", "POST"), said.pop("url", MESSAGES_URL)
        if method != "POST" or url != MESSAGES_URL:
            shown = f"{json.dumps(method)} {json.dumps(url)}"[:80]
            raise InvalidRequest(
                f"method and url: {shown} is not supported; use POST {MESSAGES_URL}"
            )
        said["params"] = said.pop("body")
    params = said.get("params")
    if isinstance(params, dict):
        params = said["params"] = completed(params, options)
    request = RowRequest.model_validate(said)
    # As it was sent, not as it was parsed: an unknown field must reach Claude unchanged.
    params = {name: value for name, value in said["params"].items() if name != "stream"}
    return Row(
        request.custom_id, params, milliseconds(request.deadline), tuple(request.fallback_models)
    )


def completed(params: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Return a request with the batch's options for the fields that it does not set."""
    defaults = {
        "model": options.model,
        "max_tokens": options.max_tokens,
        "system": options.system,
    }
    return {name: value for name, value in defaults.items() if value is not None} | dict(params)


# Errors --------------------------------------------------------------------------------------------------------

OF_A_MESSAGE: Final = frozenset(
    {
        *("cache_control", "container", "context_management", "inference_geo", "max_tokens"),
        *("mcp_servers", "messages", "model", "output_config", "service_tier", "stop_sequences"),
        *("stream", "system", "temperature", "thinking", "tool_choice", "tools", "top_k", "top_p"),
    }
)
"""Fields of a Messages API request: one of them next to `params` is in the wrong place, not misspelled."""

MOST_SHOWN: Final = 5
"""Maximum errors in one message."""
MOST_VALUE: Final = 64
"""Maximum characters of a value that a message shows."""
_OUR_CLASS: Final = re.compile(r" or instance of \w+$")


def explained(errors: Sequence[Mapping[str, Any]], place: str = "", *, of_item: bool = True) -> str:
    """Return pydantic's errors as one line: the field, the problem, and the value if it is short.

    `of_item`: they are about a job or a row, whose fields of a Messages request belong inside `params`.
    """
    misplaced = [error for error in errors if of_item and _is_misplaced(error)]
    others = [error for error in errors if error not in misplaced]
    where = f"{place}: " if place else ""
    parts = [where + _moved_inside(misplaced)] if misplaced else []
    if others:
        more = len(others) - MOST_SHOWN
        shown = "; ".join(_line(error, place) for error in others[:MOST_SHOWN])
        parts.append(shown + (f"; and {more} more" if more > 0 else ""))
    return " ".join(parts)


def _line(error: Mapping[str, Any], place: str) -> str:
    where = ".".join(str(part) for part in (place, *error["loc"]) if part != "")
    # The validators above raise ValueError; a model names its Python class.
    said = _OUR_CLASS.sub("", str(error["msg"]).removeprefix("Value error, "))
    value = error.get("input")
    shown = f" (got {value!r})" if _is_short(value) and error["type"] != "missing" else ""
    return f"{where}: {said}{shown}" if where else f"{said}{shown}"


def _is_misplaced(error: Mapping[str, Any]) -> bool:
    """Return whether a field of a Messages API request is outside `params`."""
    return (
        error["type"] == "extra_forbidden"
        and len(error["loc"]) == 1
        and error["loc"][0] in OF_A_MESSAGE
    )


def _moved_inside(misplaced: Sequence[Mapping[str, Any]]) -> str:
    names = ", ".join(f"`{error['loc'][0]}`" for error in misplaced)
    if len(misplaced) == 1:
        return f"Unknown top-level field {names}; move it inside `params`."
    return f"Unknown top-level fields {names}; move them inside `params`."


def _is_short(value: object) -> bool:
    return isinstance(value, int | float | bool) or (
        isinstance(value, str) and len(value) <= MOST_VALUE
    )
