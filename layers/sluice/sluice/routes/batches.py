"""Batches with their progress, and uploads of files."""

from __future__ import annotations

from typing import Annotated, Any, Final

from aws_lambda_powertools.event_handler.openapi.params import Body, Path, Query
from aws_lambda_powertools.event_handler.router import APIGatewayHttpRouter

from sluice.api import document, requests, views
from sluice.domain.batches import Batch
from sluice.domain.upstream_batches import UpstreamBatch
from sluice.routes.caller import batches, checked, uploads
from sluice.wiring import batch_stores, shared

MOST_SHOWN: Final = 20
"""Upstream batches in a response."""

router = APIGatewayHttpRouter()  # type: ignore[no-untyped-call]


@router.get(
    "/batches",
    summary="List batches with their progress",
    description="Lists batches, newest first.",
    tags=["batches"],
    security=document.CLIENT_KEY,
    responses=document.responses(
        200, "A page of batches.", document.BatchListing, 400, 401, 404, 503
    ),
    middlewares=[checked],
)
def list_progress(
    limit: Annotated[int, Query(ge=1, le=100, description="Batches per page.")] = 20,
    page: Annotated[
        str | None,
        Query(
            max_length=requests.MOST_ID, description="Cursor: `next_page` of the previous response."
        ),
    ] = None,
) -> dict[str, Any]:
    """List batches."""
    found = batches(router).page(limit, page, None)
    return {
        "data": [with_progress(batch) for batch in found.batches],
        "has_more": found.has_more,
        "next_page": found.batches[-1].batch_id if found.has_more else None,
    }


@router.get(
    "/batches/<batch_id>",
    summary="Show a batch with its progress",
    description="Returns completed rows, tokens, cost and estimated end time.",
    tags=["batches"],
    security=document.CLIENT_KEY,
    responses=document.responses(200, "The batch.", document.Batch, 400, 401, 404, 503),
    middlewares=[checked],
)
def show_progress(batch_id: Annotated[str, Path(max_length=requests.MOST_ID)]) -> dict[str, Any]:
    """Show a batch."""
    batch = batches(router).get(batch_id)
    return with_progress(batch) | {
        "upstream_batches": [views.upstream_view(each) for each in _upstream_of(batch)]
    }


@router.get(
    "/batches/<batch_id>/links",
    summary="Get download links for a batch",
    description="Presigned URLs for the results, errors and summary of an ended batch; they expire in 15 minutes.",
    tags=["batches"],
    security=document.CLIENT_KEY,
    responses=document.responses(200, "The links.", document.BatchLinks, 400, 401, 404, 503),
    middlewares=[checked],
)
def batch_links(batch_id: Annotated[str, Path(max_length=requests.MOST_ID)]) -> dict[str, Any]:
    """Get links."""
    return dict(batches(router).links(batch_id))


@router.post(
    "/uploads",
    summary="Start an upload",
    description="Starts a multipart upload of a file of any size; requires no AWS credentials. PUT each part to its "
    "presigned URL, with exactly `part_bytes` bytes (the last part: the rest) and without the client key, "
    "and keep the ETag of each response.",
    tags=["uploads"],
    security=document.CLIENT_KEY,
    responses=document.responses(
        200, "The upload with its first presigned URLs.", document.Upload, 400, 401, 413, 503
    ),
    middlewares=[checked],
)
def begin_upload(body: Annotated[requests.UploadRequest, Body()]) -> dict[str, Any]:
    """Start an upload."""
    started = uploads(router).start(body.name, body.bytes, body.options)
    return {
        "type": "upload",
        "id": started.upload_id,
        "name": started.name,
        "part_bytes": started.part_bytes,
        "parts": started.parts,
        "links": views.part_links(started.links),
    }


@router.post(
    "/uploads/parts",
    summary="Get more upload URLs",
    description="Returns presigned URLs for up to 100 parts.",
    tags=["uploads"],
    security=document.CLIENT_KEY,
    responses=document.responses(200, "Presigned URLs.", document.UploadLinks, 400, 401, 413, 503),
    middlewares=[checked],
)
def upload_parts(body: Annotated[requests.UploadParts, Body()]) -> dict[str, Any]:
    """Get more links."""
    return {
        "links": views.part_links(uploads(router).links(body.name, body.id, body.first, body.last))
    }


@router.post(
    "/uploads/complete",
    summary="Complete an upload",
    description="Joins the parts and creates a batch from the file. Safe to retry.",
    tags=["uploads"],
    security=document.CLIENT_KEY,
    responses=document.responses(200, "The batch.", document.Batch, 400, 401, 413, 503),
    middlewares=[checked],
)
def complete_upload(body: Annotated[requests.UploadDone, Body()]) -> dict[str, Any]:
    """Complete an upload."""
    etags = {part.part: part.etag for part in body.parts}
    return with_progress(uploads(router).complete(body.name, body.id, etags))


@router.delete(
    "/uploads",
    summary="Abort an upload",
    description="Deletes the parts uploaded so far.",
    tags=["uploads"],
    security=document.CLIENT_KEY,
    responses=document.responses(
        200, "The upload is aborted.", document.AbortedUpload, 400, 401, 503
    ),
    middlewares=[checked],
)
def abort_upload(
    upload_id: Annotated[str, Query(alias="id", max_length=1024)],
    name: Annotated[str, Query(max_length=512)],
) -> dict[str, Any]:
    """Abort an upload."""
    uploads(router).abort(name, upload_id)
    return {"type": "upload_aborted", "id": upload_id}


def _upstream_of(batch: Batch) -> list[UpstreamBatch]:
    ids = [upstream_id for upstream_id, _, _ in reversed(batch.upstream)]
    found = map(batch_stores.upstream_records().get, ids[:MOST_SHOWN])
    return [each for each in found if each is not None]


def with_progress(batch: Batch) -> dict[str, Any]:
    """Show a batch with its progress."""
    view: dict[str, Any] = views.batch_view(
        batch, batches(router).progress(batch), shared.CLOCK.now()
    )
    return view
