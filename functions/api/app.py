"""Invoked by the HTTP API: authenticates callers and serves jobs, batches, uploads, usage and limits."""

from __future__ import annotations

from base64 import b64decode
from typing import TYPE_CHECKING, Any

from aws_lambda_powertools.event_handler import APIGatewayHttpResolver, Response
from aws_lambda_powertools.event_handler.exceptions import NotFoundError
from aws_lambda_powertools.event_handler.openapi.exceptions import RequestValidationError

from sluice.api import requests
from sluice.api.errors import HTTP_OF
from sluice.domain import errors
from sluice.routes import batches, jobs, message_batches, usage
from sluice.routes.answers import answer, refusal, request_id
from sluice.routes.caller import tenant_of_request
from sluice.wiring import shared

if TYPE_CHECKING:
    from aws_lambda_powertools.event_handler.middlewares import NextMiddleware
    from aws_lambda_powertools.utilities.typing import LambdaContext

app = APIGatewayHttpResolver(enable_validation=True, json_body_deserializer=requests.read_json)
for each in (usage, jobs, message_batches, batches):
    app.include_router(each.router)


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
    return refusal(errors.InvalidRequest(requests.explained_form(error.errors())))


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
