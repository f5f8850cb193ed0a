"""Authentication: the check of a request before its body is decoded, and the use cases of the caller's tenant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from aws_lambda_powertools.event_handler import APIGatewayHttpResolver, Response

from sluice.domain import errors
from sluice.intake.accounts import Account
from sluice.intake.admission import Caller
from sluice.intake.batches import Batches
from sluice.intake.uploads import Uploads
from sluice.wiring import api as wiring

if TYPE_CHECKING:
    from aws_lambda_powertools.event_handler.api_gateway import BaseRouter
    from aws_lambda_powertools.event_handler.middlewares import NextMiddleware
    from aws_lambda_powertools.utilities.data_classes import APIGatewayProxyEventV2

PASSED_OVER: Final = frozenset({"beta"})
"""Ignored query parameters: Anthropic's SDKs add `beta=true` to the calls of their beta resources."""


def checked(app: APIGatewayHttpResolver, next_middleware: NextMiddleware) -> Response[Any]:
    """Check query parameters before the route runs."""
    known = sorted(each.alias for each in app.context["_route"].dependant.query_params)
    unknown = sorted(set(app.current_event.query_string_parameters) - {*known, *PASSED_OVER})
    if unknown:
        accepted = f"use {', '.join(known)}" if known else "this route takes none"
        message = f"{', '.join(unknown)}: unknown query parameter; {accepted}"
        raise errors.InvalidRequest(message)
    return next_middleware(app)


def admitted(event: APIGatewayProxyEventV2) -> Caller:
    """Return the caller; raises RequestTooLarge, Unauthenticated, Throttled or StoreBusy. The body is not decoded."""
    headers = event.headers
    bearer = headers.get("authorization") or ""
    key = headers.get("x-api-key") or (bearer[7:] if bearer.lower().startswith("bearer ") else "")
    size = _bytes(event.get("body") or "", is_base64=bool(event.get("isBase64Encoded")))
    return wiring.admission()(key.strip(), size)


def _bytes(text: str, *, is_base64: bool) -> int:
    """Return the bytes of a body as the client sent it."""
    if is_base64:
        return len(text) * 3 // 4 - text.count("=", -2)
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


def account(router: BaseRouter) -> Account:
    """Return the caller's account."""
    return wiring.account(router.context["tenant"])


def batches(router: BaseRouter) -> Batches:
    """Return the caller's batches."""
    return wiring.batches_of(router.context["tenant"])


def uploads(router: BaseRouter) -> Uploads:
    """Return the caller's uploads."""
    return wiring.uploads_of(router.context["tenant"])
