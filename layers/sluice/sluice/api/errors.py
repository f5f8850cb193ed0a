"""Errors as HTTP: status, Anthropic's error type, body and headers."""

from __future__ import annotations

from typing import Any, Final

from sluice.domain import errors

HTTP_OF: Final[dict[type[errors.SluiceError], tuple[int, str]]] = {
    errors.InvalidRequest: (400, "invalid_request_error"),
    errors.Unauthenticated: (401, "authentication_error"),
    errors.JobNotFound: (404, "not_found_error"),
    errors.BatchNotFound: (404, "not_found_error"),
    errors.Conflict: (409, "conflict_error"),
    errors.RequestTooLarge: (413, "request_too_large"),
    errors.NotStorable: (400, "invalid_request_error"),
    errors.Throttled: (429, "rate_limit_error"),
    errors.StoreBusy: (503, "overloaded_error"),
    errors.Unexpected: (500, "api_error"),
}
"""HTTP status and Anthropic error type of each error. Any other exception is a 500 without details."""


def status_of(error: errors.SluiceError) -> int:
    """Return the HTTP status of an error."""
    status, _ = HTTP_OF[type(error)]
    return status


def body_of(error: errors.SluiceError, request_id: str) -> dict[str, Any]:
    """Show an error in Anthropic's format."""
    _, kind = HTTP_OF[type(error)]
    return {
        "type": "error",
        "error": {"type": kind, "message": str(error)},
        "request_id": request_id,
    }


def headers_of(error: errors.SluiceError) -> dict[str, str]:
    """Return the headers that say whether and when to retry."""
    headers = retry_after(error)
    if isinstance(error, errors.Conflict):
        # Anthropic's SDKs retry a 409; retrying this one is pointless.
        headers["x-should-retry"] = "false"
    return headers


def retry_after(*refused: errors.SluiceError) -> dict[str, str]:
    """Return the retry-after header if one of the errors is retryable."""
    seconds = [
        each.retry_after_seconds
        for each in refused
        if isinstance(each, errors.StoreBusy | errors.Throttled)
    ]
    return {"retry-after": str(max(seconds))} if seconds else {}
