"""The bodies and headers of HTTP requests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel, TypeAdapter, ValidationError
from pydantic_core import core_schema as core

from sluice.domain.batches import Options
from sluice.domain.errors import InvalidRequest, SluiceError
from sluice.domain.webhooks import Network
from sluice.intake.requests import (
    BATCH_ONLY,
    MOST_ROWS,
    UNREADABLE,
    BatchRequest,
    JobRequest,
    LaneOptions,
    decode,
    explained,
    milliseconds,
    read_deadline,
    read_job,
)
from sluice.intake.submit import Submission

M = TypeVar("M", bound=BaseModel)

MOST_JOBS: Final = 100
"""Maximum jobs in one POST."""

NOT_AN_OBJECT: Final = 'the body must be a JSON object: one job, or {"jobs": [...]}'

MOST_ID: Final = 64
"""Maximum characters of a job or batch ID."""


class JobList(LaneOptions):
    """Up to 100 jobs; each is accepted or rejected individually."""

    jobs: Annotated[list[JobRequest], Field(min_length=1, max_length=MOST_JOBS)]


class SubmitBody(RootModel[Any]):
    """One job, or a list of jobs.

    Items are validated individually later, so that an invalid one does not reject the others.
    """

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: core.CoreSchema, handler: Any) -> Any:
        """Show the actual schema."""
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
        """Show the actual schema."""
        del schema
        return handler(TypeAdapter(BatchRequests).core_schema)


NOT_IN_A_BATCH: Final[Mapping[str, str]] = {
    "lane": "set it beside `jobs`",
    "metadata": "rows have no metadata",
    "on_unmeetable": "set it beside `jobs`",
    "webhook": "use the header sluice-webhook",
}
"""Fields of a job that a row does not have, and what to do instead."""


class ListOfJobs(LaneOptions):
    """The body of a list of jobs, whose items are not parsed: an invalid one does not reject the others."""

    jobs: Annotated[list[Any], Field(min_length=1)]

    @property
    def is_batch(self) -> bool:
        """Whether the list becomes a batch."""
        return self.is_for_batch or len(self.jobs) > MOST_JOBS

    @property
    def options(self) -> Options:
        """The options of the batch. If its lane is asked for, rows may wait until their last deadline."""
        deadline = _last_deadline(self.jobs) if self.is_for_batch else None
        return Options(deadline=deadline, lane=self.lane, on_unmeetable=self.on_unmeetable)


def read_list(body: object) -> ListOfJobs | None:
    """Return a list of jobs; None for a body that is one job. Raises InvalidRequest for a bad envelope."""
    if not isinstance(body, dict):
        raise InvalidRequest(NOT_AN_OBJECT)
    if "jobs" not in body:
        return None
    found = _enveloped(ListOfJobs, body)
    if found.on_unmeetable is not None and not found.is_batch:
        raise InvalidRequest(f"on_unmeetable: {NO_BATCH} (got {found.on_unmeetable!r})")
    return found


def _last_deadline(jobs: Sequence[object]) -> int | None:
    """Return the last deadline; None if a job has none, or an invalid one, with which the list is rejected later."""
    last = None
    for job in jobs:
        said = job.get("deadline") if isinstance(job, dict) else None
        try:
            deadline = read_deadline(said)
        except InvalidRequest:
            return None
        if deadline is None:
            return None
        last = max(deadline, last or deadline)
    return last


NO_BATCH: Final = "only a batch has it; set lane to 'batch' or 'auto', or omit it"


def as_rows(jobs: Sequence[object]) -> list[object]:
    """Return jobs as rows of a batch. Jobs without a `custom_id` are named by their position."""
    rows: list[object] = []
    for index, job in enumerate(jobs):
        if not isinstance(job, dict):
            rows.append(job)
            continue
        for name in sorted(NOT_IN_A_BATCH.keys() & job.keys()):
            raise InvalidRequest(
                f"jobs.{index}.{name}: not supported in lists of more than {MOST_JOBS} jobs or with lane 'batch' or "
                f"'auto', which run as a batch; {NOT_IN_A_BATCH[name]}"
            )
        is_named = job.get("custom_id") is not None
        rows.append(job if is_named else {**job, "custom_id": f"job-{index}"})
    return rows


def read_requests(body: object) -> list[Any]:
    """Return the items of a create request, which are validated later; raises InvalidRequest for a bad envelope."""
    return _enveloped(_Requests, body).requests


class _Requests(BaseModel):
    """The body of a create request, whose items are not parsed."""

    model_config = ConfigDict(extra="forbid")

    requests: list[Any]


def _enveloped(kind: type[M], body: object) -> M:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise InvalidRequest(explained(error.errors(include_url=False))) from error


@dataclass(frozen=True, slots=True)
class BatchOfOne:
    """A job whose lane makes it a batch."""

    row: object
    options: Options


def read_batch_of_one(job: object, networks: Sequence[Network] = ()) -> BatchOfOne | None:
    """Return a job whose lane makes it a batch, None for any other; raises InvalidRequest if it is invalid."""
    if not isinstance(job, dict) or job.get("lane") not in BATCH_ONLY:
        return None
    request = read_job(job, networks)
    if isinstance(request, SluiceError):
        raise request
    if request.metadata:
        raise InvalidRequest(
            f"metadata: not supported with lane {request.lane!r}; rows of a batch have no metadata"
        )
    (row,) = as_rows([{name: job[name] for name in job if name not in NOT_IN_A_BATCH}])
    options = Options(
        deadline=milliseconds(request.deadline),
        webhook=request.webhook,
        lane=request.lane,
        on_unmeetable=request.on_unmeetable,
    )
    return BatchOfOne(row, options)


def read_submission(job: object, networks: Sequence[Network] = ()) -> Submission | SluiceError:
    """Validate one job for the live lane; return the error instead if it is invalid."""
    request = read_job(job, networks)
    if isinstance(request, SluiceError):
        return request
    if request.is_for_batch:
        # One job alone is a batch then, so this is an item of a list.
        return InvalidRequest(
            f"lane: is one for the whole list; set it beside `jobs` (got {request.lane!r})"
        )
    if request.on_unmeetable is not None:
        return InvalidRequest(f"on_unmeetable: {NO_BATCH} (got {request.on_unmeetable!r})")
    # As it was sent, not as it was parsed: an unknown field must reach Claude unchanged.
    params = {name: value for name, value in job["params"].items() if name != "stream"}  # type: ignore[index]
    return Submission(
        params=params,
        custom_id=request.custom_id,
        deadline=milliseconds(request.deadline),
        fallback_models=tuple(request.fallback_models),
        metadata=request.metadata,
        webhook=request.webhook,
    )


def explained_form(errors: Sequence[Mapping[str, Any]]) -> str:
    """Return the errors of a malformed HTTP request as one line.

    Their locations start with the part of the request (body, query, path, header), which is left out.
    """
    for error in errors:
        if error["type"] == "json_invalid":
            reason = error.get("ctx", {}).get("error", "")
            if reason == NOT_AN_OBJECT:
                return NOT_AN_OBJECT
            if reason in UNREADABLE:
                return f"the body {reason}"
            return f"the body is not valid JSON: {reason} at character {error['loc'][-1] + 1}"
        if error["type"] == "missing" and tuple(error["loc"]) == ("body",):
            return f"the body is empty; {NOT_AN_OBJECT}"
    return explained([{**error, "loc": error["loc"][1:]} for error in errors])
