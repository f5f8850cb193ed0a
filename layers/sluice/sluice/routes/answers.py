"""Responses in Anthropic's format."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

from aws_lambda_powertools.event_handler import APIGatewayHttpResolver, Response, content_types
from aws_lambda_powertools.event_handler.api_gateway import BaseRouter

from sluice.api.errors import body_of, headers_of, status_of
from sluice.domain import errors

if TYPE_CHECKING:
    from aws_lambda_powertools.event_handler.middlewares import NextMiddleware
    from aws_lambda_powertools.utilities.data_classes import APIGatewayProxyEventV2


def as_it_is(app: APIGatewayHttpResolver, next_middleware: NextMiddleware) -> Response[Any]:
    """Set a bytes body after Powertools, which treats every body as text."""
    response = next_middleware(app)
    response.body = app.context.pop("body", response.body)
    return response


def answer(status: int, body: object, headers: dict[str, str] | None = None) -> Response[Any]:
    """Make a JSON response with Sluice's request id, as Anthropic's have one."""
    return Response(
        status_code=status,
        content_type=content_types.APPLICATION_JSON,
        body=body,
        headers={"request-id": request_id(), **(headers or {})},
    )


def request_id() -> str:
    """Return the id of this request."""
    event = cast("APIGatewayProxyEventV2", BaseRouter.current_event)
    return f"req_{event.request_context.request_id}"


def early_refusal(error: errors.SluiceError, event: APIGatewayProxyEventV2) -> dict[str, Any]:
    """Answer with one of our errors, without routing the request."""
    named = f"req_{event.request_context.request_id}"
    headers = {
        "Content-Type": content_types.APPLICATION_JSON,
        "request-id": named,
        **headers_of(error),
    }
    body = json.dumps(body_of(error, named), separators=(",", ":"))
    return {
        "statusCode": status_of(error),
        "headers": headers,
        "cookies": [],
        "body": body,
        "isBase64Encoded": False,
    }


def refusal(error: errors.SluiceError, **more: object) -> Response[Any]:
    """Return the response to one of Sluice's errors."""
    return answer(status_of(error), {**body_of(error, request_id()), **more}, headers_of(error))
