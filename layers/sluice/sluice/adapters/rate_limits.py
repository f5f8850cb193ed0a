"""Anthropic's Rate Limits API, for organizations whose admin key is in the pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import httpx2

from sluice.domain.errors import KeyPoolBroken, StoreBusy
from sluice.domain.keys import AdminKey
from sluice.domain.limits import TOKENS_PER_DAY, KnownLimits

PATH: Final = "/v1/organizations/rate_limits"
VERSION: Final = "2026-10-21"
SECONDS: Final = 10.0
MOST_PAGES: Final = 20

_NAME_OF: Final[Mapping[str, str]] = {
    "requests_per_minute": "requests",
    "input_tokens_per_minute": "input_tokens",
    "input_tokens_per_minute_cache_aware": "input_tokens",
    "output_tokens_per_minute": "output_tokens",
    "tokens_per_day": TOKENS_PER_DAY,
}
"""The limiter types in use. An organization has one of the two input types (Anthropic, Rate Limits API)."""


class HttpRateLimits:
    """The API over HTTP."""

    def load(self, key: AdminKey) -> Sequence[KnownLimits]:
        """Return the limits of each group of models.

        Raises StoreBusy if a retry may succeed, KeyPoolBroken if the key is rejected.
        """
        found: list[KnownLimits] = []
        query = {"group_type": "model_group"}
        with httpx2.Client(timeout=SECONDS) as client:
            for _ in range(MOST_PAGES):
                page = _page(client, key, query)
                found += [_known(each) for each in page["data"] if _is_of_models(each)]
                if not page.get("next_page"):
                    break
                query["page"] = str(page["next_page"])
        return found


def _page(client: httpx2.Client, key: AdminKey, query: Mapping[str, str]) -> Mapping[str, Any]:
    what = "the Rate Limits API"
    headers = {"x-api-key": key.api_key, "anthropic-version": VERSION}
    try:
        answer = client.get(f"{key.base_url}{PATH}", params=query, headers=headers)
        document = answer.json() if answer.is_success else {}
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
        raise StoreBusy(what) from error
    if answer.status_code in {400, 401, 403, 404}:
        raise KeyPoolBroken(
            f"{what} answered {answer.status_code} to the admin key of {key.organization}"
        )
    if not answer.is_success or not isinstance(document.get("data"), list):
        raise StoreBusy(what)
    return dict(document)


def _is_of_models(entry: Any) -> bool:
    """Return whether a group is one of models, not of batches, files or the like; older versions nest the type."""
    kind = entry.get("group_type") or (entry.get("group") or {}).get("type")
    return kind == "model_group" and bool(entry.get("models"))


def _known(entry: Mapping[str, Any]) -> KnownLimits:
    limits: dict[str, int] = {}
    for each in entry.get("limits") or ():
        name, value = _NAME_OF.get(each.get("type", "")), each.get("value")
        if name is not None and isinstance(value, int) and value > 0:
            limits[name] = min(value, limits.get(name, value))
    return KnownLimits(tuple(entry["models"]), tuple(sorted(limits.items())))
