"""Batches, as Anthropic's Message Batches API has them."""

from __future__ import annotations

from gzip import decompress
from typing import Annotated, Any, Final

from aws_lambda_powertools.event_handler import Response
from aws_lambda_powertools.event_handler.openapi.params import Body, Header, Path, Query
from aws_lambda_powertools.event_handler.router import APIGatewayHttpRouter

from sluice.api import document, requests, views
from sluice.domain import errors
from sluice.domain.batches import Batch, Options
from sluice.intake import requests as validation
from sluice.intake.batches import MOST_INLINE_BYTES, Create, Link
from sluice.routes.answers import answer, as_it_is, request_id
from sluice.routes.caller import batches, checked
from sluice.wiring import shared

router = APIGatewayHttpRouter()  # type: ignore[no-untyped-call]

BATCHES: Final = "/v1/messages/batches"

AskedLane = Annotated[
    str | None,
    Header(
        description="The lane asked for: `live`, `batch` or `auto`. Default: the parameter `DefaultLane`."
    ),
]
OnUnmeetable = Annotated[
    str | None,
    Header(
        description="Whether the batch is to `run` or to be refused (`refuse`) if no lane can meet its deadline. "
        "Default: `run`."
    ),
]


@router.post(
    BATCHES,
    summary="Create a batch",
    description="Anthropic's Message Batches API, run by Sluice's own engine. "
    "A create request that an SDK retries creates no second batch.",
    tags=["batches"],
    security=document.CLIENT_KEY,
    responses=document.responses(
        200, "The batch.", document.MessageBatch, *(400, 401, 409, 413, 503)
    ),
    middlewares=[checked],
)
def create_batch(  # noqa: PLR0913, PLR0917 - its headers
    body: Annotated[requests.BatchBody, Body()],
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=255,
            description="Idempotency key. Resending the request with the same key returns the existing batch.",
        ),
    ] = None,
    anthropic_version: Annotated[validation.Version | None, Header()] = None,
    anthropic_beta: Annotated[
        validation.Beta | None,
        Header(description="Beta features; forwarded with the upstream calls."),
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
    sluice_lane: AskedLane = None,
    sluice_on_unmeetable: OnUnmeetable = None,
    x_stainless_retry_count: Annotated[
        int,
        Header(
            ge=0,
            description="Retry count, sent by Anthropic's SDKs. Above 0, the request is a retry.",
        ),
    ] = 0,
) -> dict[str, Any]:
    """Create a batch."""
    headers = router.current_event.headers
    asked = Create(
        requests.read_requests(body.root),
        Options(
            deadline=validation.read_deadline(sluice_deadline),
            anthropic_version=anthropic_version,
            anthropic_beta=anthropic_beta,
            webhook=validation.read_webhook(sluice_webhook, shared.settings().webhook_networks),
            lane=validation.read_lane(sluice_lane),
            on_unmeetable=validation.read_on_unmeetable(sluice_on_unmeetable),
        ),
        idempotency_key=idempotency_key,
        retries=x_stainless_retry_count,
        client=headers.get("user-agent") or "",
    )
    return shown(batches(router).create(asked))


@router.get(
    BATCHES,
    summary="List batches",
    description="Lists batches, newest first, including those created from files.",
    tags=["batches"],
    security=document.CLIENT_KEY,
    responses=document.responses(
        200, "A page of batches.", document.MessageBatchList, 400, 401, 404, 503
    ),
    middlewares=[checked],
)
def list_batches(
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    after_id: Annotated[str | None, Query(max_length=requests.MOST_ID)] = None,
    before_id: Annotated[str | None, Query(max_length=requests.MOST_ID)] = None,
) -> dict[str, Any]:
    """List batches."""
    page = batches(router).page(limit, after_id, before_id)
    data = [shown(batch) for batch in page.batches]
    return {
        "data": data,
        "has_more": page.has_more,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }


@router.get(
    f"{BATCHES}/<batch_id>",
    summary="Show a batch",
    description="Same format as Anthropic's API. `request_counts` changes only when the whole batch has ended.",
    tags=["batches"],
    security=document.CLIENT_KEY,
    responses=document.responses(200, "The batch.", document.MessageBatch, 400, 401, 404, 503),
    middlewares=[checked],
)
def show_batch(batch_id: Annotated[str, Path(max_length=requests.MOST_ID)]) -> dict[str, Any]:
    """Show a batch."""
    return shown(batches(router).get(batch_id))


@router.post(
    f"{BATCHES}/<batch_id>/cancel",
    summary="Cancel a batch",
    description="Cancels waiting rows and stops calls in flight. Completed results are kept.",
    tags=["batches"],
    security=document.CLIENT_KEY,
    responses=document.responses(200, "The batch.", document.MessageBatch, 400, 401, 404, 503),
    middlewares=[checked],
)
def cancel_batch(batch_id: Annotated[str, Path(max_length=requests.MOST_ID)]) -> dict[str, Any]:
    """Cancel a batch."""
    return shown(batches(router).cancel(batch_id))


@router.delete(
    f"{BATCHES}/<batch_id>",
    summary="Delete a batch",
    description="Deletes an ended batch.",
    tags=["batches"],
    security=document.CLIENT_KEY,
    responses=document.responses(
        200, "The batch is deleted.", document.DeletedMessageBatch, 400, 401, 404, 503
    ),
    middlewares=[checked],
)
def delete_batch(batch_id: Annotated[str, Path(max_length=requests.MOST_ID)]) -> dict[str, Any]:
    """Delete a batch."""
    batches(router).delete(batch_id)
    return {"id": batch_id, "type": "message_batch_deleted"}


@router.get(
    f"{BATCHES}/<batch_id>/results",
    summary="Fetch the results of a batch",
    description="Returns JSON Lines in row order, gzipped if the client accepts it. If the results exceed the response "
    "limit, clients that send a bearer token get a redirect to a presigned S3 URL.",
    tags=["batches"],
    security=document.CLIENT_KEY,
    responses=document.responses(200, "The results.", document.ResultLine, 400, 401, 404, 503),
    middlewares=[as_it_is, checked],
)
def batch_results(batch_id: Annotated[str, Path(max_length=requests.MOST_ID)]) -> Response[Any]:
    """Fetch results."""
    headers = router.current_event.headers
    may_follow = not headers.get("x-api-key")
    found = batches(router).results(batch_id, may_follow=may_follow)
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
    router.append_context(body=body)  # type: ignore[no-untyped-call]
    return Response(200, content_type="application/x-jsonl", headers=more)


def shown(batch: Batch) -> dict[str, Any]:
    """Show a batch in Anthropic's shape."""
    view: dict[str, Any] = views.message_batch(
        batch, shared.CLOCK.now(), shared.settings().public_url
    )
    return view
