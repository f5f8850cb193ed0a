"""The HTTP API's document, docs/openapi.json, as `functions/api/app.py` declares it."""

from __future__ import annotations

import json
from typing import Any, Final

from aws_lambda_powertools.event_handler.openapi.models import APIKey, HTTPBearer

import sluice
from functions.api.app import app

ABOUT: Final = (
    "A job gateway for Claude. Submit Messages API requests as jobs and fetch Claude's answers when they are "
    "complete. Jobs run as fast as your rate limits allow, and each is billed once."
)


def document() -> dict[str, Any]:
    """Return the OpenAPI document of `functions/api/app.py`, in an order that only changes with the API."""
    text = app.get_openapi_json_schema(
        title="Sluice",
        version=sluice.__version__,
        description=ABOUT,
        security_schemes={
            "x-api-key": APIKey.model_validate(
                {"name": "x-api-key", "in": "header", "description": "A Sluice client key."}
            ),
            "bearer": HTTPBearer(
                description="The same client key, sent as `Authorization: Bearer`."
            ),
        },
    )
    found: dict[str, Any] = json.loads(text)
    for operations in found["paths"].values():
        for operation in operations.values():
            # Powertools documents its own answer to a request of wrong form; ours is a 400 in Anthropic's shape.
            del operation["responses"]["422"]
            operation["responses"] = dict(sorted(operation["responses"].items()))
    schemas = found["components"]["schemas"]
    for powertools_own in ("HTTPValidationError", "ValidationError", "ResponseValidationError"):
        del schemas[powertools_own]
    found["paths"] = dict(sorted(found["paths"].items()))
    return found


def updated(_: str = "") -> str:
    """Return the text of docs/openapi.json."""
    return json.dumps(document(), indent=1, ensure_ascii=False) + "\n"
