"""The bodies and headers of HTTP requests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import isinf
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, RootModel, TypeAdapter, ValidationError
from pydantic_core import core_schema as core

from sluice.domain.errors import InvalidRequest, SluiceError
from sluice.domain.times import parse_rfc3339
from sluice.domain.webhooks import Network, check_url
from sluice.intake.requests import NOT_AN_OBJECT, TOO_DEEP, JobRequest, explained, is_too_deep
from sluice.intake.submit import Submission

MOST_JOBS: Final = 100
"""Jobs in one POST."""

MOST_ID: Final = 64
"""Characters of a job or batch ID."""

MOST_BYTES: Final = 4_000_000
"""Of a request body. Lambda accepts 6 MB, including the headers and JSON escapes that API Gateway adds."""


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
    if is_too_deep(job):
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
