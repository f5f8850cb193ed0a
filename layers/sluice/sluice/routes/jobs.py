"""Submit, list, show and cancel jobs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Final

from aws_lambda_powertools.event_handler import Response
from aws_lambda_powertools.event_handler.openapi.params import Body, Header, Path, Query
from aws_lambda_powertools.event_handler.router import APIGatewayHttpRouter

from sluice.api import document, requests, views
from sluice.api.errors import body_of, retry_after
from sluice.domain import errors
from sluice.domain.batches import Options, Source
from sluice.domain.jobs import State
from sluice.intake import requests as validation
from sluice.intake.batches import Create
from sluice.intake.submit import Accepted, Outcome, Rejected, Sender
from sluice.routes.answers import answer, refusal, request_id
from sluice.routes.batches import with_progress
from sluice.routes.caller import account, batches, checked
from sluice.wiring import api as wiring
from sluice.wiring import shared

router = APIGatewayHttpRouter()  # type: ignore[no-untyped-call]

WORTH_SENDING_AGAIN: Final = (errors.StoreBusy, errors.Unexpected)
"""If a whole list is rejected, the first of these found decides the response, so that the client retries."""


IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        description="Idempotency key. Resending the request with the same key returns the existing jobs.",
    ),
]
AnthropicVersion = Annotated[
    validation.Version | None,
    Header(
        description="API version for the upstream calls. Default: the latest version that Sluice supports."
    ),
]
AnthropicBeta = Annotated[
    validation.Beta | None,
    Header(description="Beta features; forwarded with the upstream calls."),
]
DefaultWebhook = Annotated[
    str | None,
    Header(description="Default `webhook` for jobs that do not set one, or the batch's webhook."),
]
RetryCount = Annotated[
    int | None,
    Header(
        ge=0,
        description="Retry count, sent by Anthropic's SDKs. If it is above 0, a job without a custom_id and "
        "without an Idempotency-Key is matched to the same request sent within the last 10 minutes.",
    ),
]


@router.post(
    "/jobs",
    summary="Submit jobs",
    description="Accepts one job, or a list of up to 100 jobs that are accepted or rejected individually. "
    "A longer list becomes a batch, and so does any request with `lane` set to `batch` or `auto`.",
    status_code=202,
    tags=["jobs"],
    security=document.CLIENT_KEY,
    responses=document.responses(
        202,
        "The jobs are stored and queued. Returns the job, or for a list the outcome of each item.",
        document.SubmittedJob | document.SubmittedList | document.Batch,
        *(400, 401, 409, 413, 503),
    ),
    middlewares=[checked],
)
def submit(  # noqa: PLR0913, PLR0917 - its headers
    body: Annotated[requests.SubmitBody, Body()],
    idempotency_key: IdempotencyKey = None,
    anthropic_version: AnthropicVersion = None,
    anthropic_beta: AnthropicBeta = None,
    sluice_webhook: DefaultWebhook = None,
    x_stainless_retry_count: RetryCount = None,
) -> Response[Any]:
    """Accept jobs."""
    webhook = validation.read_webhook(sluice_webhook, shared.settings().webhook_networks)
    sender = Sender(
        router.context["tenant"],
        idempotency_key,
        anthropic_version,
        anthropic_beta,
        webhook,
        resends=x_stainless_retry_count,
    )
    listed = requests.read_list(body.root)
    if listed is None:
        alone = requests.read_batch_of_one(body.root, shared.settings().webhook_networks)
        if alone is None:
            return _submit_one(body.root, sender)
        return _submit_batch([alone.row], alone.options, sender)
    if listed.is_batch:
        return _submit_batch(requests.as_rows(listed.jobs), listed.options, sender)
    return _submit_list(listed.jobs, sender)


def _submit_one(job: dict[str, Any], sender: Sender) -> Response[Any]:
    (outcome,) = _submit([job], sender)
    if isinstance(outcome, Rejected):
        raise outcome.error
    return answer(202, _accepted(outcome), {"Location": f"/jobs/{outcome.job.job_id}"})


def _submit_list(jobs: Sequence[Any], sender: Sender) -> Response[Any]:
    outcomes = _submit(jobs, sender)
    data = [
        {"index": index, "status": "accepted", "job": _accepted(outcome)}
        if isinstance(outcome, Accepted)
        else {
            "index": index,
            "status": "rejected",
            "error": body_of(outcome.error, request_id())["error"],
        }
        for index, outcome in enumerate(outcomes)
    ]
    rejected = [outcome.error for outcome in outcomes if isinstance(outcome, Rejected)]
    if len(rejected) == len(outcomes):
        again = (
            each for kind in WORTH_SENDING_AGAIN for each in rejected if isinstance(each, kind)
        )
        return refusal(next(again, rejected[0]), data=data)
    counts = {"accepted": len(outcomes) - len(rejected), "rejected": len(rejected)}
    return answer(202, {"type": "job_list", **counts, "data": data}, retry_after(*rejected))


def _submit_batch(rows: Sequence[object], options: Options, sender: Sender) -> Response[Any]:
    asked = Create(
        rows,
        replace(
            options,
            anthropic_version=sender.anthropic_version,
            anthropic_beta=sender.anthropic_beta,
            webhook=options.webhook or sender.webhook,
        ),
        Source.JOBS,
        idempotency_key=sender.idempotency_key,
        retries=sender.resends or 0,
        client=router.current_event.headers.get("user-agent") or "",
    )
    batch = batches(router).create(asked)
    return answer(202, with_progress(batch), {"Location": f"/batches/{batch.batch_id}"})


def _submit(jobs: Sequence[Any], sender: Sender) -> Sequence[Outcome]:
    networks = shared.settings().webhook_networks
    submissions = [requests.read_submission(job, networks) for job in jobs]
    return wiring.submit()(submissions, sender)


def _accepted(outcome: Accepted) -> dict[str, Any]:
    job = outcome.job
    start = None
    if not job.state.is_final:
        start = wiring.waiting().estimated_start(job.current_model, job.tenant)
    return {**views.job_view(job), "estimated_start_at": views.time(start)}


@router.get(
    "/jobs",
    summary="List jobs",
    description="Lists jobs, newest first, or returns the jobs named in `ids`.",
    tags=["jobs"],
    security=document.CLIENT_KEY,
    responses=document.responses(200, "A page of jobs.", document.Listing, 400, 401, 503),
    middlewares=[checked],
)
def list_jobs(
    state: Annotated[State | None, Query(description="Only jobs in this state.")] = None,
    limit: Annotated[int, Query(ge=1, le=100, description="Jobs per page.")] = 20,
    page: Annotated[
        str | None,
        Query(max_length=200, description="Cursor: `next_page` of the previous response."),
    ] = None,
    ids: Annotated[str | None, Query(description="Up to 100 comma-separated job IDs.")] = None,
) -> dict[str, Any]:
    """List jobs."""
    if ids is not None:
        wanted = [each.strip() for each in ids.split(",") if each.strip()]
        if len(wanted) > requests.MOST_JOBS:
            message = f"ids: {len(wanted)} job IDs; the maximum is {requests.MOST_JOBS}"
            raise errors.InvalidRequest(message)
        # DynamoDB rejects a batch that contains a longer key, and no job ID is longer.
        known = [each for each in wanted if len(each) <= requests.MOST_ID]
        data = [views.job_summary(job) for job in account(router).some_jobs(known)]
        return {"data": data, "has_more": False, "next_page": None}
    found = account(router).listing(state, limit, page)
    return {
        "data": [views.job_summary(job) for job in found.jobs],
        "has_more": found.next_page is not None,
        "next_page": found.next_page,
    }


@router.get(
    "/jobs/<job_id>",
    summary="Show a job",
    description="Returns state, attempts, usage, cost, and Claude's Message once the job has succeeded.",
    tags=["jobs"],
    security=document.CLIENT_KEY,
    responses=document.responses(200, "The job.", document.Job, 400, 401, 404, 503),
    middlewares=[checked],
)
def show_job(job_id: Annotated[str, Path(max_length=requests.MOST_ID)]) -> dict[str, Any]:
    """Show a job."""
    job = account(router).job(job_id)
    return views.job_view(job, account(router).message(job))


@router.delete(
    "/jobs/<job_id>",
    summary="Cancel a job",
    description="Cancels a job: guaranteed before the upstream call, best effort during it. "
    "A job that has ended is not changed.",
    tags=["jobs"],
    security=document.CLIENT_KEY,
    responses=document.responses(
        200,
        "The job: `canceled`, or with `cancel_requested` while its call is in flight.",
        document.Job,
        *(400, 401, 404, 503),
    ),
    middlewares=[checked],
)
def cancel_job(job_id: Annotated[str, Path(max_length=requests.MOST_ID)]) -> dict[str, Any]:
    """Cancel a job."""
    job = account(router).cancel(job_id)
    return views.job_view(job, account(router).message(job))
