"""The bodies and headers of HTTP requests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, RootModel, TypeAdapter, ValidationError
from pydantic_core import core_schema as core

from sluice.domain.errors import InvalidRequest, SluiceError
from sluice.domain.webhooks import Network
from sluice.intake.requests import (
    MOST_ROWS,
    BatchRequest,
    JobRequest,
    decode,
    explained,
    milliseconds,
    read_job,
)
from sluice.intake.submit import Submission

MOST_JOBS: Final = 100
"""Jobs in one POST."""

NOT_AN_OBJECT: Final = 'the body must be a JSON object: one job, or {"jobs": [...]}'

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
    """Parse a request body; raises JSONDecodeError, which Powertools turns into a validation error."""
    try:
        body = decode(text)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise json.JSONDecodeError(str(error), "", 0) from error
    if isinstance(body, list):
        # Powertools would take the first item of a list for the whole body.
        raise json.JSONDecodeError(NOT_AN_OBJECT, "", 0)
    return body


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


class BatchRequests(BaseModel):
    """Up to 100,000 rows, within the body size limit."""

    model_config = ConfigDict(extra="forbid")

    requests: Annotated[list[BatchRequest], Field(min_length=1, max_length=MOST_ROWS)]


class BatchBody(RootModel[Any]):
    """The body of a create request; its items are validated individually later."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: core.CoreSchema, handler: Any) -> Any:
        """Show what is really expected."""
        del schema
        return handler(TypeAdapter(BatchRequests).core_schema)


NOT_IN_A_BATCH: Final = frozenset({"metadata", "lane", "webhook"})
"""Fields of a job that a row does not have."""


def long_list(body: object) -> list[object] | None:
    """Return the jobs of a list above the limit as rows of a batch; None for any other body.

    Jobs without a `custom_id` are named by their position. An invalid job is reported in the batch's errors.
    """
    jobs = body.get("jobs") if isinstance(body, dict) else None
    if not isinstance(jobs, list) or len(jobs) <= MOST_JOBS:
        return None
    rows: list[object] = []
    for index, job in enumerate(jobs):
        fields = job if isinstance(job, dict) else {}
        for name in NOT_IN_A_BATCH & fields.keys():
            raise InvalidRequest(
                f"jobs.{index}.{name}: not supported in lists of more than {MOST_JOBS} jobs, which run as a batch"
            )
        is_named = not isinstance(job, dict) or job.get("custom_id") is not None
        rows.append(job if is_named else {**job, "custom_id": f"job-{index}"})
    return rows


def read_requests(body: object) -> list[Any]:
    """Return the items of a create request; raises InvalidRequest for a bad envelope. Items are validated later."""
    try:
        return _Envelope.model_validate(body).requests
    except ValidationError as error:
        raise InvalidRequest(explained(error.errors(include_url=False))) from error


class _Envelope(BaseModel):
    """The body of a create request, its items unread."""

    model_config = ConfigDict(extra="forbid")

    requests: list[Any]


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
    """Validate one job; return the error instead if it is invalid."""
    request = read_job(job, networks)
    if isinstance(request, SluiceError):
        return request
    # As it was sent, not as it was parsed: a field we do not know must go up unchanged.
    params = {name: value for name, value in job["params"].items() if name != "stream"}  # type: ignore[index]
    return Submission(
        params=params,
        custom_id=request.custom_id,
        deadline=milliseconds(request.deadline),
        fallback_models=tuple(request.fallback_models),
        metadata=request.metadata,
        lane=request.lane,
        webhook=request.webhook,
    )


PARTS: Final = frozenset({"body", "query", "path", "header"})
"""Locations in a whole request start with one of these, which is left out of messages."""


def explained_form(errors: Sequence[Mapping[str, Any]]) -> str:
    """Put the errors of a malformed HTTP request into one line."""
    for error in errors:
        if error["type"] == "json_invalid":
            reason, at = error.get("ctx", {}).get("error", ""), error["loc"][-1]
            if reason == NOT_AN_OBJECT:
                return NOT_AN_OBJECT
            return f"the body is not valid JSON: {reason}" + (f" at character {at}" if at else "")
        if error["type"] == "missing" and error["loc"] == ("body",):
            return f"the body is empty; {NOT_AN_OBJECT}"
    return explained([{**error, "loc": error["loc"][1:]} for error in errors])
