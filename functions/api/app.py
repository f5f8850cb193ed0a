"""Invoked by the HTTP API: authenticates callers and serves jobs, batches, uploads, usage and limits."""

from __future__ import annotations

from base64 import b64decode
from datetime import UTC, date, datetime
from gzip import decompress
from typing import TYPE_CHECKING, Annotated, Any, Final

from aws_lambda_powertools.event_handler import APIGatewayHttpResolver, Response, content_types
from aws_lambda_powertools.event_handler.exceptions import NotFoundError
from aws_lambda_powertools.event_handler.openapi.exceptions import RequestValidationError
from aws_lambda_powertools.event_handler.openapi.params import Body, Header, Path, Query

import sluice
from sluice.api import http
from sluice.domain import errors
from sluice.domain.batches import Batch, Options, Source
from sluice.domain.jobs import State
from sluice.domain.limits import model_group
from sluice.domain.webhooks import signing_secret
from sluice.intake.accounts import Account
from sluice.intake.batches import MOST_INLINE_BYTES, Batches, Create, Link
from sluice.intake.submit import Accepted, Rejected, Sender
from sluice.intake.uploads import Uploads
from sluice.wiring import api as wiring
from sluice.wiring import notices, shared

if TYPE_CHECKING:
    from aws_lambda_powertools.event_handler.middlewares import NextMiddleware
    from aws_lambda_powertools.utilities.typing import LambdaContext

app = APIGatewayHttpResolver(enable_validation=True, json_body_deserializer=http.read_json)

HTTP_OF: Final[dict[type[errors.SluiceError], tuple[int, str]]] = {
    errors.InvalidRequest: (400, "invalid_request_error"),
    errors.Unauthenticated: (401, "authentication_error"),
    errors.JobNotFound: (404, "not_found_error"),
    errors.BatchNotFound: (404, "not_found_error"),
    errors.Conflict: (409, "conflict_error"),
    errors.RequestTooLarge: (413, "request_too_large"),
    errors.StoreBusy: (503, "overloaded_error"),
    errors.Unexpected: (500, "api_error"),
}
"""HTTP status and Anthropic error type of each error. Any other exception is a 500 without details."""

WORTH_SENDING_AGAIN: Final = (errors.StoreBusy, errors.Unexpected)
"""If a whole list is rejected, the first of these found decides the response, so that the client retries."""

MOST_ID: Final = 64
"""Characters of a job id."""

PASSED_OVER: Final = frozenset({"beta"})
"""Ignored query parameters: Anthropic's SDKs add `beta=true` to the calls of their beta resources."""

GROUPINGS: Final = ("day", "model", "lane")


# Requests ------------------------------------------------------------------------------------------------------


def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Answer one request."""
    # Bodies are parsed as JSON whatever the content type: `curl -d` sends a form content type.
    event.setdefault("headers", {})["content-type"] = "application/json"
    if event.get("isBase64Encoded"):
        # Invalid UTF-8 is kept as surrogates and rejected by the validation of the field.
        text = b64decode(event.get("body") or "").decode(errors="surrogateescape")
        event |= {"body": text, "isBase64Encoded": False}
    try:
        return app.resolve(event, context)
    finally:
        shared.telemetry().flush()


def named(app: APIGatewayHttpResolver, next_middleware: NextMiddleware) -> Response[Any]:
    """Put our request id on every answer, as Anthropic does."""
    response = next_middleware(app)
    response.headers["request-id"] = request_id()
    return response


app.use(middlewares=[named])


def checked(app: APIGatewayHttpResolver, next_middleware: NextMiddleware) -> Response[Any]:
    """Check body size, client key and query parameters before the route runs."""
    app.append_context(tenant=tenant_of_request())  # type: ignore[no-untyped-call]
    known = sorted(each.alias for each in app.context["_route"].dependant.query_params)
    unknown = sorted(set(app.current_event.query_string_parameters) - {*known, *PASSED_OVER})
    if unknown:
        accepted = f"use {', '.join(known)}" if known else "this route takes none"
        message = f"{', '.join(unknown)}: unknown query parameter; {accepted}"
        raise errors.InvalidRequest(message)
    return next_middleware(app)


def as_it_is(app: APIGatewayHttpResolver, next_middleware: NextMiddleware) -> Response[Any]:
    """Set a bytes body after Powertools, which treats every body as text."""
    response = next_middleware(app)
    response.body = app.context.pop("body", response.body)
    return response


def tenant_of_request() -> str:
    """Return the tenant of this request; raises RequestTooLarge before it checks the key, or Unauthenticated."""
    event = app.current_event
    size = len((event.body or "").encode(errors="surrogatepass"))
    if size > http.MOST_BYTES:
        raise errors.RequestTooLarge(size, http.MOST_BYTES)
    headers = event.headers
    bearer = headers.get("authorization") or ""
    key = headers.get("x-api-key") or (bearer[7:] if bearer.lower().startswith("bearer ") else "")
    tenant = wiring.client_keys().tenant(key.strip()) if key.strip() else None
    if tenant is None:
        raise errors.Unauthenticated
    return tenant


def account() -> Account:
    """Return the caller's account."""
    return wiring.account(app.context["tenant"])


@app.get(
    "/health",
    summary="Health check",
    description="Requires no client key.",
    tags=["health"],
    responses=http.responses(200, "The gateway is healthy.", http.Health),
)
def health() -> dict[str, str]:
    """Return status and version."""
    return {"status": "ok", "version": sluice.__version__}


@app.post(
    "/jobs",
    summary="Submit jobs",
    description="Accepts one job, or a list of up to 100 jobs that are accepted or rejected individually. "
    "A longer list becomes a batch.",
    status_code=202,
    tags=["jobs"],
    security=http.CLIENT_KEY,
    responses=http.responses(
        202,
        "The jobs are stored and queued. Returns the job, or for a list the outcome of each item.",
        http.SubmittedJob | http.SubmittedList | http.Batch,
        *(400, 401, 409, 413, 503),
    ),
    middlewares=[checked],
)
def submit(  # noqa: PLR0913, PLR0917 - its headers
    body: Annotated[http.SubmitBody, Body()],
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=255,
            description="Idempotency key. Resending the request with the same key returns the existing jobs.",
        ),
    ] = None,
    anthropic_version: Annotated[
        str | None,
        Header(
            pattern=http.VERSION,
            description="API version for the upstream calls. Default: the latest version that Sluice supports.",
        ),
    ] = None,
    anthropic_beta: Annotated[
        str | None,
        Header(
            max_length=1024,
            pattern=http.PRINTABLE,
            description="Beta features; forwarded with the upstream calls.",
        ),
    ] = None,
    sluice_webhook: Annotated[
        str | None,
        Header(
            description="Default `webhook` for jobs that do not set one, or the batch's webhook."
        ),
    ] = None,
    x_stainless_retry_count: Annotated[
        int | None,
        Header(
            ge=0,
            description="Retry count, sent by Anthropic's SDKs. If it is above 0, a job without a custom_id and "
            "without an Idempotency-Key is matched to the same request sent within the last 10 minutes.",
        ),
    ] = None,
) -> Response[Any]:
    """Accept jobs."""
    networks = shared.settings().webhook_networks
    webhook = http.read_webhook(sluice_webhook, networks)
    rows = http.long_list(body.root)
    if rows is not None:
        options = Options(
            anthropic_version=anthropic_version, anthropic_beta=anthropic_beta, webhook=webhook
        )
        asked = Create(
            rows,
            options,
            Source.JOBS,
            idempotency_key=idempotency_key,
            retries=x_stainless_retry_count or 0,
            client=app.current_event.headers.get("user-agent") or "",
        )
        batch = batches().create(asked)
        return answer(202, with_progress(batch), {"Location": f"/batches/{batch.batch_id}"})
    submissions, is_list = http.read_submissions(body.root, networks)
    sender = Sender(
        app.context["tenant"],
        idempotency_key,
        anthropic_version,
        anthropic_beta,
        webhook,
        resends=x_stainless_retry_count,
    )
    outcomes = wiring.submit()(submissions, sender)
    if not is_list:
        (outcome,) = outcomes
        if isinstance(outcome, Rejected):
            raise outcome.error
        return answer(202, _accepted(outcome), {"Location": f"/jobs/{outcome.job.job_id}"})
    data = [
        {"index": index, "status": "accepted", "job": _accepted(outcome)}
        if isinstance(outcome, Accepted)
        else {"index": index, "status": "rejected", "error": error_body(outcome.error)["error"]}
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


def _accepted(outcome: Accepted) -> dict[str, Any]:
    job = outcome.job
    start = None
    if not job.state.is_final:
        group = model_group(job.current_model, shared.model_groups())
        start = wiring.waiting().estimated_start(group)
    return {**http.job_view(job), "estimated_start_at": http.time(start)}


@app.get(
    "/jobs",
    summary="List jobs",
    description="Lists jobs, newest first, or returns the jobs named in `ids`.",
    tags=["jobs"],
    security=http.CLIENT_KEY,
    responses=http.responses(200, "A page of jobs.", http.Listing, 400, 401, 503),
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
        if len(wanted) > http.MOST_JOBS:
            message = f"ids: {len(wanted)} job IDs; the maximum is {http.MOST_JOBS}"
            raise errors.InvalidRequest(message)
        # DynamoDB rejects a batch that contains a longer key, and no job ID is longer.
        known = [each for each in wanted if len(each) <= MOST_ID]
        data = [http.job_summary(job) for job in account().some_jobs(known)]
        return {"data": data, "has_more": False, "next_page": None}
    found = account().listing(state, limit, page)
    return {
        "data": [http.job_summary(job) for job in found.jobs],
        "has_more": found.next_page is not None,
        "next_page": found.next_page,
    }


@app.get(
    "/jobs/<job_id>",
    summary="Show a job",
    description="Returns state, attempts, usage, cost, and Claude's Message once the job has succeeded.",
    tags=["jobs"],
    security=http.CLIENT_KEY,
    responses=http.responses(200, "The job.", http.Job, 400, 401, 404, 503),
    middlewares=[checked],
)
def show_job(job_id: Annotated[str, Path(max_length=MOST_ID)]) -> dict[str, Any]:
    """Show a job."""
    job = account().job(job_id)
    return http.job_view(job, account().message(job))


@app.delete(
    "/jobs/<job_id>",
    summary="Cancel a job",
    description="Cancels a job: guaranteed before the upstream call, best effort during it. "
    "A job that has ended is not changed.",
    tags=["jobs"],
    security=http.CLIENT_KEY,
    responses=http.responses(
        200,
        "The job: `canceled`, or with `cancel_requested` while its call is in flight.",
        http.Job,
        *(400, 401, 404, 503),
    ),
    middlewares=[checked],
)
def cancel_job(job_id: Annotated[str, Path(max_length=MOST_ID)]) -> dict[str, Any]:
    """Cancel a job."""
    job = account().cancel(job_id)
    return http.job_view(job, account().message(job))


@app.get(
    "/usage",
    summary="Show usage and cost",
    description="Covers the days from `from` to `to`, inclusive (UTC). Default: today.",
    tags=["usage"],
    security=http.CLIENT_KEY,
    responses=http.responses(200, "Usage and cost.", http.UsageReport, 400, 401, 503),
    middlewares=[checked],
)
def show_usage(
    first: Annotated[date | None, Query(alias="from", description="First day.")] = None,
    last: Annotated[date | None, Query(alias="to", description="Last day.")] = None,
    group_by: Annotated[
        str, Query(description="Comma-separated list of day, model, lane.")
    ] = "day",
) -> dict[str, Any]:
    """Show usage and cost."""
    today = datetime.now(UTC).date()
    last = last or max(today, first or today)
    first = first or last
    names = [name.strip() for name in group_by.split(",") if name.strip()]
    for name in names:
        if name not in GROUPINGS:
            message = f"group_by: {name!r} is not one of {', '.join(GROUPINGS)}"
            raise errors.InvalidRequest(message)
    rows = account().usage(first, last, names)
    shown: dict[str, Any] = http.usage_view(first.isoformat(), last.isoformat(), names, rows)
    return shown


@app.get(
    "/limits",
    summary="Show rate limits",
    description="Returns each limit group with its limits, remaining capacity and current blocks.",
    tags=["limits"],
    security=http.CLIENT_KEY,
    responses=http.responses(200, "The limit groups.", http.Limits, 400, 401, 503),
    middlewares=[checked],
)
def show_limits() -> dict[str, Any]:
    """Show the limit groups."""
    now = shared.CLOCK.now()
    return {"data": [http.group_view(group, now) for group in account().groups()]}


# Batches, as Anthropic's API has them --------------------------------------------------------------------------

BATCHES: Final = "/v1/messages/batches"


@app.post(
    BATCHES,
    summary="Create a batch",
    description="Anthropic's Message Batches API, run by Sluice's own engine. "
    "A create request that an SDK retries creates no second batch.",
    tags=["batches"],
    security=http.CLIENT_KEY,
    responses=http.responses(200, "The batch.", http.MessageBatch, *(400, 401, 409, 413, 503)),
    middlewares=[checked],
)
def create_batch(  # noqa: PLR0913, PLR0917 - its headers
    body: Annotated[http.BatchBody, Body()],
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=255,
            description="Idempotency key. Resending the request with the same key returns the existing batch.",
        ),
    ] = None,
    anthropic_version: Annotated[str | None, Header(pattern=r"^\d{4}-\d{2}-\d{2}$")] = None,
    anthropic_beta: Annotated[
        str | None,
        Header(
            max_length=1024,
            pattern=r"^[!-~ ]+$",
            description="Beta features; forwarded with the upstream calls.",
        ),
    ] = None,
    sluice_deadline: Annotated[
        str | None,
        Header(
            description="RFC 3339 time. Rows that have not started by then are `expired`. Default: after 24 hours."
        ),
    ] = None,
    sluice_webhook: Annotated[
        str | None,
        Header(description="HTTPS URL to notify on completion, with a signed request."),
    ] = None,
    x_stainless_retry_count: Annotated[
        int,
        Header(
            ge=0,
            description="Retry count, sent by Anthropic's SDKs. Above 0, the request is a retry.",
        ),
    ] = 0,
) -> dict[str, Any]:
    """Create a batch."""
    headers = app.current_event.headers
    asked = Create(
        http.read_requests(body.root),
        Options(
            deadline=http.read_deadline(sluice_deadline),
            anthropic_version=anthropic_version,
            anthropic_beta=anthropic_beta,
            webhook=http.read_webhook(sluice_webhook, shared.settings().webhook_networks),
        ),
        idempotency_key=idempotency_key,
        retries=x_stainless_retry_count,
        client=headers.get("user-agent") or "",
    )
    return shown(batches().create(asked))


@app.get(
    BATCHES,
    summary="List batches",
    description="Lists batches, newest first, including those created from files.",
    tags=["batches"],
    security=http.CLIENT_KEY,
    responses=http.responses(200, "A page of batches.", http.MessageBatchList, 400, 401, 404, 503),
    middlewares=[checked],
)
def list_batches(
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    after_id: Annotated[str | None, Query(max_length=MOST_ID)] = None,
    before_id: Annotated[str | None, Query(max_length=MOST_ID)] = None,
) -> dict[str, Any]:
    """List batches."""
    page = batches().page(limit, after_id, before_id)
    data = [shown(batch) for batch in page.batches]
    return {
        "data": data,
        "has_more": page.has_more,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }


@app.get(
    f"{BATCHES}/<batch_id>",
    summary="Show a batch",
    description="Same format as Anthropic's API. `request_counts` changes only when the whole batch has ended.",
    tags=["batches"],
    security=http.CLIENT_KEY,
    responses=http.responses(200, "The batch.", http.MessageBatch, 400, 401, 404, 503),
    middlewares=[checked],
)
def show_batch(batch_id: Annotated[str, Path(max_length=MOST_ID)]) -> dict[str, Any]:
    """Show a batch."""
    return shown(batches().get(batch_id))


@app.post(
    f"{BATCHES}/<batch_id>/cancel",
    summary="Cancel a batch",
    description="Cancels waiting rows and stops calls in flight. Completed results are kept.",
    tags=["batches"],
    security=http.CLIENT_KEY,
    responses=http.responses(200, "The batch.", http.MessageBatch, 400, 401, 404, 503),
    middlewares=[checked],
)
def cancel_batch(batch_id: Annotated[str, Path(max_length=MOST_ID)]) -> dict[str, Any]:
    """Cancel a batch."""
    return shown(batches().cancel(batch_id))


@app.delete(
    f"{BATCHES}/<batch_id>",
    summary="Delete a batch",
    description="Deletes an ended batch.",
    tags=["batches"],
    security=http.CLIENT_KEY,
    responses=http.responses(
        200, "The batch is deleted.", http.DeletedMessageBatch, 400, 401, 404, 503
    ),
    middlewares=[checked],
)
def delete_batch(batch_id: Annotated[str, Path(max_length=MOST_ID)]) -> dict[str, Any]:
    """Delete a batch."""
    batches().delete(batch_id)
    return {"id": batch_id, "type": "message_batch_deleted"}


@app.get(
    f"{BATCHES}/<batch_id>/results",
    summary="Fetch the results of a batch",
    description="Returns JSON Lines in row order, gzipped if the client accepts it. If the results exceed the response "
    "limit, clients that send a bearer token get a redirect to a presigned S3 URL.",
    tags=["batches"],
    security=http.CLIENT_KEY,
    responses=http.responses(200, "The results.", http.ResultLine, 400, 401, 404, 503),
    middlewares=[as_it_is, checked],
)
def batch_results(batch_id: Annotated[str, Path(max_length=MOST_ID)]) -> Response[Any]:
    """Fetch results."""
    headers = app.current_event.headers
    may_follow = not headers.get("x-api-key")
    found = batches().results(batch_id, may_follow=may_follow)
    if isinstance(found, Link):
        return answer(302, {}, {"Location": found.url})
    body, coding = found.packed, {"content-encoding": "gzip"}
    if "gzip" not in (headers.get("accept-encoding") or ""):
        body, coding = decompress(found.packed), {}
        if len(body) > MOST_INLINE_BYTES:
            message = (
                f"the results have {len(body):,} bytes, which exceeds the response limit; "
                "send Accept-Encoding: gzip"
            )
            raise errors.InvalidRequest(message)
    more = {"request-id": request_id(), **coding}
    app.append_context(body=body)  # type: ignore[no-untyped-call]
    return Response(200, content_type="application/x-jsonl", headers=more)


# Batches with their progress, and files -----------------------------------------------------------------------


@app.get(
    "/batches",
    summary="List batches with their progress",
    description="Lists batches, newest first.",
    tags=["batches"],
    security=http.CLIENT_KEY,
    responses=http.responses(200, "A page of batches.", http.BatchListing, 400, 401, 404, 503),
    middlewares=[checked],
)
def list_progress(
    limit: Annotated[int, Query(ge=1, le=100, description="Batches per page.")] = 20,
    page: Annotated[
        str | None,
        Query(max_length=MOST_ID, description="Cursor: `next_page` of the previous response."),
    ] = None,
) -> dict[str, Any]:
    """List batches."""
    found = batches().page(limit, page, None)
    return {
        "data": [with_progress(batch) for batch in found.batches],
        "has_more": found.has_more,
        "next_page": found.batches[-1].batch_id if found.has_more else None,
    }


@app.get(
    "/batches/<batch_id>",
    summary="Show a batch with its progress",
    description="Returns completed rows, tokens, cost and estimated end time.",
    tags=["batches"],
    security=http.CLIENT_KEY,
    responses=http.responses(200, "The batch.", http.Batch, 400, 401, 404, 503),
    middlewares=[checked],
)
def show_progress(batch_id: Annotated[str, Path(max_length=MOST_ID)]) -> dict[str, Any]:
    """Show a batch."""
    return with_progress(batches().get(batch_id))


@app.get(
    "/batches/<batch_id>/links",
    summary="Get download links for a batch",
    description="Presigned URLs for the results, errors and summary of an ended batch; they expire in 15 minutes.",
    tags=["batches"],
    security=http.CLIENT_KEY,
    responses=http.responses(200, "The links.", http.BatchLinks, 400, 401, 404, 503),
    middlewares=[checked],
)
def batch_links(batch_id: Annotated[str, Path(max_length=MOST_ID)]) -> dict[str, Any]:
    """Get links."""
    return dict(batches().links(batch_id))


@app.post(
    "/uploads",
    summary="Start an upload",
    description="Starts a multipart upload of a file of any size; requires no AWS credentials. PUT each part to its "
    "presigned URL, without the client key, and keep the ETag of each response.",
    tags=["uploads"],
    security=http.CLIENT_KEY,
    responses=http.responses(
        200, "The upload with its first presigned URLs.", http.Upload, 400, 401, 413, 503
    ),
    middlewares=[checked],
)
def begin_upload(body: Annotated[http.UploadRequest, Body()]) -> dict[str, Any]:
    """Start an upload."""
    begun = uploads().begin(body.name, body.bytes, body.options)
    return {
        "type": "upload",
        "id": begun.upload_id,
        "name": begun.name,
        "part_bytes": begun.part_bytes,
        "parts": begun.parts,
        "links": http.part_links(begun.links),
    }


@app.post(
    "/uploads/parts",
    summary="Get more upload URLs",
    description="Returns presigned URLs for up to 100 parts.",
    tags=["uploads"],
    security=http.CLIENT_KEY,
    responses=http.responses(200, "Presigned URLs.", http.UploadLinks, 400, 401, 413, 503),
    middlewares=[checked],
)
def upload_parts(body: Annotated[http.UploadParts, Body()]) -> dict[str, Any]:
    """Get more links."""
    return {"links": http.part_links(uploads().links(body.name, body.id, body.first, body.last))}


@app.post(
    "/uploads/complete",
    summary="Complete an upload",
    description="Joins the parts and creates a batch from the file. Safe to retry.",
    tags=["uploads"],
    security=http.CLIENT_KEY,
    responses=http.responses(200, "The batch.", http.Batch, 400, 401, 413, 503),
    middlewares=[checked],
)
def complete_upload(body: Annotated[http.UploadDone, Body()]) -> dict[str, Any]:
    """Complete an upload."""
    etags = {part.part: part.etag for part in body.parts}
    return with_progress(uploads().complete(body.name, body.id, etags))


@app.delete(
    "/uploads",
    summary="Abort an upload",
    description="Deletes the parts uploaded so far.",
    tags=["uploads"],
    security=http.CLIENT_KEY,
    responses=http.responses(200, "The upload is aborted.", http.AbortedUpload, 400, 401, 503),
    middlewares=[checked],
)
def abort_upload(
    upload_id: Annotated[str, Query(alias="id", max_length=1024)],
    name: Annotated[str, Query(max_length=512)],
) -> dict[str, Any]:
    """Abort an upload."""
    uploads().abort(name, upload_id)
    return {"type": "upload_aborted", "id": upload_id}


@app.get(
    "/webhooks/secret",
    summary="Get the webhook signing secret",
    description="All webhooks of this tenant are signed with this secret, following Standard Webhooks.",
    tags=["webhooks"],
    security=http.CLIENT_KEY,
    responses=http.responses(200, "The signing secret.", http.WebhookSecret, 401, 503),
    middlewares=[checked],
)
def webhook_secret() -> dict[str, str]:
    """Show the secret."""
    present, *_ = notices.signing_secrets()()
    return {"type": "webhook_secret", "secret": signing_secret(present, app.context["tenant"])}


def uploads() -> Uploads:
    """Return the caller's uploads."""
    return wiring.uploads_of(app.context["tenant"])


def with_progress(batch: Batch) -> dict[str, Any]:
    """Show a batch with its progress."""
    view: dict[str, Any] = http.batch_view(batch, batches().progress(batch), shared.CLOCK.now())
    return view


def batches() -> Batches:
    """Return the caller's batches."""
    return wiring.batches_of(app.context["tenant"])


def shown(batch: Batch) -> dict[str, Any]:
    """Show a batch in Anthropic's shape."""
    view: dict[str, Any] = http.message_batch(
        batch, shared.CLOCK.now(), shared.settings().public_url
    )
    return view


# Answers -------------------------------------------------------------------------------------------------------


def answer(status: int, body: object, headers: dict[str, str] | None = None) -> Response[Any]:
    """Make a JSON response that carries our request id, as Anthropic's do."""
    return Response(
        status_code=status,
        content_type=content_types.APPLICATION_JSON,
        body=body,
        headers={"request-id": request_id(), **(headers or {})},
    )


def request_id() -> str:
    """Return the id of this request."""
    return f"req_{app.current_event.request_context.request_id}"


def error_body(error: errors.SluiceError) -> dict[str, Any]:
    """Show one of our errors in Anthropic's shape."""
    _, kind = HTTP_OF[type(error)]
    return {
        "type": "error",
        "error": {"type": kind, "message": str(error)},
        "request_id": request_id(),
    }


def refusal(error: errors.SluiceError, **more: object) -> Response[Any]:
    """Answer with one of our errors."""
    status, _ = HTTP_OF[type(error)]
    headers = retry_after(error)
    if isinstance(error, errors.Conflict):
        # Anthropic's SDKs retry a 409; retrying this one is pointless.
        headers["x-should-retry"] = "false"
    return answer(status, {**error_body(error), **more}, headers)


def retry_after(*refused: errors.SluiceError) -> dict[str, str]:
    """Return the retry-after header if one of the errors is retryable."""
    seconds = [each.retry_after_seconds for each in refused if isinstance(each, errors.StoreBusy)]
    return {"retry-after": str(max(seconds))} if seconds else {}


@app.exception_handler(list(HTTP_OF))  # type: ignore[untyped-decorator]
def on_our_error(error: errors.SluiceError) -> Response[Any]:
    """Answer with an error of ours."""
    return refusal(error)


@app.exception_handler(RequestValidationError)  # type: ignore[untyped-decorator]
def on_bad_form(error: RequestValidationError) -> Response[Any]:
    """Return the validation error of a malformed request, but only to authenticated callers."""
    try:
        tenant_of_request()
    except errors.SluiceError as refused:
        return refusal(refused)
    return refusal(errors.InvalidRequest(http.explained(error.errors(), of_request=True)))


@app.not_found
def on_unknown_route(_: NotFoundError) -> Response[Any]:
    """Return 404 for an unknown path or method."""
    event = app.current_event
    message = f"{event.http_method} {event.path} does not exist; see docs/openapi.json"
    body = {"type": "error", "error": {"type": "not_found_error", "message": message}}
    return answer(404, {**body, "request_id": request_id()})


@app.exception_handler(Exception)  # type: ignore[untyped-decorator]
def on_surprise(_: Exception) -> Response[Any]:
    """Return 500 for an unexpected exception: the traceback goes to the log, the request ID to the caller."""
    shared.telemetry().problem("request failed", request_id=request_id())
    return refusal(errors.Unexpected())
