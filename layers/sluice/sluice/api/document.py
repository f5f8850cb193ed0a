"""The schemas of responses, for docs/openapi.json.

No request or response is checked against them at run time, so they are not built there (`defer_build`); tests compare
them with `views`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from sluice.domain.batches import AskedLane, OnUnmeetable, Source
from sluice.domain.jobs import AttemptOutcome, State
from sluice.intake.admission import MOST_BYTES

Time = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
Day = Annotated[str, Field(json_schema_extra={"format": "date"})]
MicroUsd = Annotated[int, Field(description="Millionths of a US dollar.")]
Usd = Annotated[str, Field(description="US dollars with six decimals.", examples=["0.001234"])]
KnownCost = Annotated[int, Field(description="The cost of all calls whose cost is known.")]
UnknownCosts = Annotated[
    int,
    Field(
        description="Billed calls whose cost is unknown: the model has no price, or upstream reported no usage. "
        "Unless 0, cost_micro_usd and cost_usd are null."
    ),
]
UncertainCalls = Annotated[
    int,
    Field(
        description="Calls that may have been billed, because nobody saw how they ended: their worker died, or the "
        "connection was lost. They are not in the cost; the ledger identifies each."
    ),
]


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
    cost_micro_usd: MicroUsd | None
    cost_usd: Usd | None
    known_cost_micro_usd: KnownCost
    unknown_costs: UnknownCosts


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
    uncertain_calls: UncertainCalls
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
    cost_micro_usd: MicroUsd | None
    cost_usd: Usd | None
    known_cost_micro_usd: KnownCost
    unknown_costs: UnknownCosts
    uncertain_calls: UncertainCalls


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


class DayLimit(Shape):
    """A daily limit on input plus output tokens."""

    limit: int


class OpenBreaker(Shape):
    """An overloaded model or a failing endpoint, probed with single calls; or a workspace whose limit is reached."""

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
    tokens_per_day: DayLimit | None
    rate_factor: Annotated[
        float, Field(description="Fraction of the limits that Sluice uses; reduced after 429s.")
    ]
    blocked_until: Time | None
    blocked_reason: str | None
    set_aside: list[OpenBreaker]


class Limits(Shape):
    """The limit groups of the models that this tenant uses."""

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


class LaneDecision(Shape):
    """Which lane a batch was given."""

    lane: Literal["live", "batch"]
    reason: str
    at: Time
    rescue_at: Annotated[
        Time | None,
        Field(description="When unfinished rows were to move to the live lane, as planned then."),
    ]
    is_assured: Annotated[
        bool, Field(description="The live lane had room to run all rows before the deadline.")
    ]
    is_meetable: Annotated[
        bool, Field(description="False: no lane could be relied on to meet the deadline.")
    ]


class UpstreamBatch(Shape):
    """A Message Batch at Anthropic with rows of the batch."""

    id: str
    message_batch_id: Annotated[str | None, Field(description="Its ID at Anthropic.")]
    state: Literal["preparing", "ready", "sending", "open", "ended", "done"]
    requests: int
    created_at: Time | None
    rescue_at: Annotated[
        Time | None, Field(description="When it is canceled unless it ends before, as planned now.")
    ]
    canceled_at: Time | None
    reason: Annotated[str | None, Field(description="Why it is kept, or was canceled.")]
    problem: str | None


class Batch(Shape):
    """A batch with its progress and cost."""

    id: Annotated[str, Field(pattern="^msgbatch_[0-9a-f]{32}$")]
    type: Literal["batch"]
    name: str
    source: Source
    state: Literal["planning", "running", "canceling", "ended"]
    lane: Annotated[
        AskedLane,
        Field(
            description="The lane in force: the one asked for, otherwise the value of `DefaultLane` when the batch was "
            "created."
        ),
    ]
    lane_asked: Annotated[
        AskedLane | None, Field(description="The lane that the request asked for; null for none.")
    ]
    on_unmeetable: Annotated[
        OnUnmeetable,
        Field(
            description="What the request asked for in case no lane can meet its deadline; `run` if nothing. This "
            "release stores it only."
        ),
    ]
    lane_decision: Annotated[
        LaneDecision | None,
        Field(description="What the lane in force came to; null on the lane `live`, and before."),
    ]
    upstream_batches: Annotated[
        list[UpstreamBatch] | None,
        Field(
            description="The last 20 of the batch, newest first; null in a listing, unless there are none."
        ),
    ]
    rows: BatchRows
    calls: int
    input_tokens: int
    output_tokens: int
    cost_micro_usd: MicroUsd | None
    cost_usd: Usd | None
    known_cost_micro_usd: KnownCost
    unknown_costs: UnknownCosts
    saved_micro_usd: Annotated[
        MicroUsd, Field(description="What the rows on the batch lane would have cost more live.")
    ]
    saved_usd: Usd
    uncertain_calls: UncertainCalls
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
    documents: Annotated[
        str | None,
        Field(description="Of a folder of documents: which document has which `custom_id`."),
    ] = None


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
    429: "The client key sends too many requests; retry after `retry-after` seconds.",
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
    """Document a route's responses: its schema and its error statuses, always including 500.

    A route that requires a client key (401) also answers 429.
    """
    headers: dict[str, Any] = {"request-id": _REQUEST_ID}
    if status == 202:  # noqa: PLR2004 - the one that makes something
        headers |= {"Location": _LOCATION, "retry-after": _RETRY_AFTER_SOME}
    answers = {status: {"description": said, "headers": headers, "content": _json(shape)}}
    throttled = {429} if 401 in refusals else set()  # noqa: PLR2004 - HTTP
    for refusal in sorted({*refusals, *throttled, 500}):
        headers = {"request-id": _REQUEST_ID}
        if refusal in {429, 503}:  # those that pass
            headers["retry-after"] = _RETRY_AFTER
        answers[refusal] = {
            "description": REFUSALS[refusal],
            "headers": headers,
            "content": _json(Error),
        }
    return answers


def _json(shape: Any) -> dict[str, Any]:
    return {"application/json": {"model": shape}}
