"""Health, usage and cost, rate limits, and the signing secret of webhooks."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Annotated, Any, Final

from aws_lambda_powertools.event_handler.openapi.params import Query
from aws_lambda_powertools.event_handler.router import APIGatewayHttpRouter

import sluice
from sluice.api import document, views
from sluice.domain import errors
from sluice.domain.webhooks import signing_secret
from sluice.routes.caller import account, checked
from sluice.wiring import notices, shared

router = APIGatewayHttpRouter()  # type: ignore[no-untyped-call]

GROUPINGS: Final = ("day", "model", "lane")


@router.get(
    "/health",
    summary="Health check",
    description="Requires no client key.",
    tags=["health"],
    responses=document.responses(200, "The gateway is healthy.", document.Health),
)
def health() -> dict[str, str]:
    """Return status and version."""
    return {"status": "ok", "version": sluice.__version__}


@router.get(
    "/usage",
    summary="Show usage and cost",
    description="Covers the days from `from` to `to`, inclusive (UTC). Default: today.",
    tags=["usage"],
    security=document.CLIENT_KEY,
    responses=document.responses(200, "Usage and cost.", document.UsageReport, 400, 401, 503),
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
    rows = account(router).usage(first, last, names)
    shown: dict[str, Any] = views.usage_view(first.isoformat(), last.isoformat(), names, rows)
    return shown


@router.get(
    "/limits",
    summary="Show rate limits",
    description="Returns the limit groups of the models you use, in the organizations that made your calls in the "
    "last 30 days, with their limits and current blocks.",
    tags=["limits"],
    security=document.CLIENT_KEY,
    responses=document.responses(200, "The limit groups.", document.Limits, 400, 401, 503),
    middlewares=[checked],
)
def show_limits() -> dict[str, Any]:
    """Show the limit groups."""
    now, own = shared.CLOCK.now(), account(router)
    models = own.models()
    groups = own.groups(shared.model_groups(), models)
    tenant = router.context["tenant"]
    return {"data": [views.group_view(group, models, tenant, now) for group in groups]}


@router.get(
    "/webhooks/secret",
    summary="Get the webhook signing secret",
    description="All webhooks of this tenant are signed with this secret, following Standard Webhooks.",
    tags=["webhooks"],
    security=document.CLIENT_KEY,
    responses=document.responses(200, "The signing secret.", document.WebhookSecret, 401, 503),
    middlewares=[checked],
)
def webhook_secret() -> dict[str, str]:
    """Show the secret."""
    present, *_ = notices.signing_secrets()()
    return {"type": "webhook_secret", "secret": signing_secret(present, router.context["tenant"])}
