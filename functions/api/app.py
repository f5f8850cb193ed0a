"""Invoked by the HTTP API: authenticates callers and serves jobs, batches, uploads, usage and limits."""

from __future__ import annotations

from base64 import b64decode
from typing import TYPE_CHECKING, Any, Final

from aws_lambda_powertools.event_handler import APIGatewayHttpResolver, Response
from aws_lambda_powertools.event_handler.exceptions import NotFoundError
from aws_lambda_powertools.event_handler.openapi.exceptions import RequestValidationError
from aws_lambda_powertools.utilities.data_classes import APIGatewayProxyEventV2

from sluice.api import requests
from sluice.api.errors import HTTP_OF
from sluice.domain import errors
from sluice.routes import batches, jobs, message_batches, usage
from sluice.routes.answers import answer, early_refusal, refusal, request_id
from sluice.routes.caller import admitted
from sluice.wiring import shared

if TYPE_CHECKING:
    from aws_lambda_powertools.event_handler.middlewares import NextMiddleware
    from aws_lambda_powertools.utilities.typing import LambdaContext

    from sluice.intake.admission import Caller

PUBLIC: Final = ("GET", "/health")
"""The only route without a client key."""

app = APIGatewayHttpResolver(enable_validation=True, json_body_deserializer=requests.read_json)
for each in (usage, jobs, message_batches, batches):
    app.include_router(each.router)


def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Answer one request: what may not be answered is refused before its body is decoded."""
    seen = APIGatewayProxyEventV2(event)
    caller: Caller | None = None
    try:
        if (seen.http_method, seen.path) != PUBLIC:
            caller = admitted(seen)
        answered = app.resolve(_decoded(event, caller), context)
    except tuple(HTTP_OF) as error:
        answered = early_refusal(error, seen)
    except Exception:  # noqa: BLE001 - such as a pepper that cannot be read
        shared.telemetry().problem("request failed", request_id=seen.request_context.request_id)
        answered = early_refusal(errors.Unexpected(), seen)
    _log(seen, caller, answered["statusCode"])
    shared.telemetry().flush()
    return answered


def _decoded(event: dict[str, Any], caller: Caller | None) -> dict[str, Any]:
    """Return the event with its body as text, None for callers without a key."""
    # Bodies are parsed as JSON whatever the content type: `curl -d` sends a form content type.
    event.setdefault("headers", {})["content-type"] = "application/json"
    if caller is None:
        return event | {"body": None, "isBase64Encoded": False}
    app.append_context(tenant=caller.tenant)  # type: ignore[no-untyped-call]
    if not event.get("isBase64Encoded"):
        return event
    # Invalid UTF-8 is kept as surrogates and rejected by the validation of the field.
    text = b64decode(event.get("body") or "").decode(errors="surrogateescape")
    return event | {"body": text, "isBase64Encoded": False}


def _log(event: APIGatewayProxyEventV2, caller: Caller | None, status: int) -> None:
    """Log who sent the request. The path is in API Gateway's access log, under the same request id."""
    shared.telemetry().note(
        "request",
        request_id=event.request_context.request_id,
        source=event.request_context.http.get("sourceIp"),
        key_id=caller.key_id if caller else None,
        tenant=caller.tenant if caller else None,
        status=status,
    )


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
    """Return the validation error of a malformed request."""
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
