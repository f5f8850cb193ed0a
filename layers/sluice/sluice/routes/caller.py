"""Authentication: the check of client key and query parameters, and the use cases of the caller's tenant."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from aws_lambda_powertools.event_handler import APIGatewayHttpResolver, Response
from aws_lambda_powertools.event_handler.api_gateway import BaseRouter

from sluice.api import requests
from sluice.domain import errors
from sluice.intake.accounts import Account
from sluice.intake.batches import Batches
from sluice.intake.uploads import Uploads
from sluice.wiring import api as wiring

if TYPE_CHECKING:
    from aws_lambda_powertools.event_handler.middlewares import NextMiddleware

PASSED_OVER: Final = frozenset({"beta"})
"""Ignored query parameters: Anthropic's SDKs add `beta=true` to the calls of their beta resources."""


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


def tenant_of_request() -> str:
    """Return the tenant of this request; raises RequestTooLarge before it checks the key, or Unauthenticated."""
    event = BaseRouter.current_event
    size = len((event.body or "").encode(errors="surrogatepass"))
    if size > requests.MOST_BYTES:
        raise errors.RequestTooLarge(size, requests.MOST_BYTES)
    headers = event.headers
    bearer = headers.get("authorization") or ""
    key = headers.get("x-api-key") or (bearer[7:] if bearer.lower().startswith("bearer ") else "")
    tenant = wiring.client_keys().tenant(key.strip()) if key.strip() else None
    if tenant is None:
        raise errors.Unauthenticated
    return tenant


def account(router: BaseRouter) -> Account:
    """Return the caller's account."""
    return wiring.account(router.context["tenant"])


def batches(router: BaseRouter) -> Batches:
    """Return the caller's batches."""
    return wiring.batches_of(router.context["tenant"])


def uploads(router: BaseRouter) -> Uploads:
    """Return the caller's uploads."""
    return wiring.uploads_of(router.context["tenant"])
