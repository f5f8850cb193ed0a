"""The key pool: the upstream keys, and which of them may be used for a job."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from sluice.domain.errors import KeyPoolBroken
from sluice.domain.limits import DIMENSIONS, TOKENS_PER_DAY
from sluice.domain.pricing import base_model

PLACEHOLDER = "key:"
"""Prefix of the placeholder for a key's organization until it is known."""

DEFAULT_BASE_URL = "https://api.anthropic.com"


@dataclass(frozen=True, slots=True)
class UpstreamKey:
    """One Claude API key of the pool. Its text never appears in a repr, a log or an error."""

    id: str
    api_key: str = field(repr=False)
    organization: str | None = None
    """Stated in the pool; otherwise learned from the `anthropic-organization-id` header."""
    base_url: str = DEFAULT_BASE_URL
    models: frozenset[str] | None = None
    tenants: frozenset[str] | None = None
    weight: int = 1
    limits: Mapping[str, int] = field(default_factory=dict)
    """Limits stated in the pool: requests, input_tokens, output_tokens per minute. Upper bounds for learned ones."""

    @property
    def fingerprint(self) -> str:
        """A short digest of the key; it changes if the key of this id is replaced."""
        return sha256(self.api_key.encode()).hexdigest()[:16]

    def allows(self, tenant: str, model: str) -> bool:
        """Return whether the pool permits `tenant` to use this key for `model`."""
        if self.tenants is not None and tenant not in self.tenants:
            return False
        return self.models is None or bool({model, base_model(model)} & self.models)


@dataclass(frozen=True, slots=True)
class AdminKey:
    """An admin key of an organization: used to read limits, not for calls."""

    organization: str
    api_key: str = field(repr=False)
    base_url: str = DEFAULT_BASE_URL


@dataclass(frozen=True, slots=True)
class KeyMark:
    """What all workers have learned about a key."""

    key_id: str
    organization: str | None = None
    learned_with: str | None = None
    """Fingerprint of the key whose responses named these; a different key under the same id may differ."""
    rejected: str | None = None
    """Fingerprint of the key that upstream rejected with 401; another key under the same id is tried again."""
    workspace: str | None = None
    """Learned like the organization."""

    def rejects(self, key: UpstreamKey) -> bool:
        """Return whether upstream has rejected this key."""
        return self.rejected == key.fingerprint


def organization_of(key: UpstreamKey, mark: KeyMark | None) -> str:
    """Return the organization whose limits the key shares; a placeholder for this key until it is known."""
    if key.organization:
        return key.organization
    if mark is not None and mark.organization and mark.learned_with == key.fingerprint:
        return mark.organization
    return _placeholder(key)


def workspace_of(key: UpstreamKey, mark: KeyMark | None) -> str:
    """Return the workspace of a key; a placeholder for this key until it is known."""
    if mark is not None and mark.workspace and mark.learned_with == key.fingerprint:
        return mark.workspace
    return _placeholder(key)


def _placeholder(key: UpstreamKey) -> str:
    # With the fingerprint, so that another key under the same id gets a new placeholder.
    return f"{PLACEHOLDER}{key.id}-{key.fingerprint[:8]}"


def learned(
    key: UpstreamKey, mark: KeyMark | None, organization: str | None, workspace: str | None
) -> KeyMark:
    """Return the mark with what a response named; what it did not name stays, if it was learned with the same key."""
    mark = mark or KeyMark(key.id)
    is_same = mark.learned_with == key.fingerprint
    return replace(
        mark,
        organization=organization or (mark.organization if is_same else None),
        workspace=workspace or (mark.workspace if is_same else None),
        learned_with=key.fingerprint if organization or workspace else mark.learned_with,
    )


def parse_key_pool(document: object) -> tuple[UpstreamKey, ...]:
    """Read the key-pool secret; raises KeyPoolBroken, naming the entry and never a key."""
    if not isinstance(document, Mapping) or not isinstance(document.get("keys"), list):
        raise KeyPoolBroken('the key pool must be {"keys": [{"id": ..., "api_key": ...}, ...]}')
    keys = tuple(_parse_key(position, row) for position, row in enumerate(document["keys"]))
    ids = [key.id for key in keys]
    for key_id in ids:
        if ids.count(key_id) > 1:
            raise KeyPoolBroken(
                f"duplicate key id {key_id!r} in the pool; use a unique id for each key"
            )
    return keys


def parse_admin_keys(document: object) -> tuple[AdminKey, ...]:
    """Read the admin keys of the key-pool secret, which are optional; raises KeyPoolBroken."""
    rows = document.get("admin_keys", []) if isinstance(document, Mapping) else []
    if not isinstance(rows, list):
        raise KeyPoolBroken(
            'admin_keys of the pool must be [{"organization": ..., "api_key": ...}, ...]'
        )
    return tuple(_parse_admin_key(position, row) for position, row in enumerate(rows))


def parse_model_groups(document: object) -> Mapping[str, str]:
    """Read the optional model groups of the key-pool secret: the limit group by model; raises KeyPoolBroken."""
    groups = document.get("model_groups", {}) if isinstance(document, Mapping) else {}
    if isinstance(groups, Mapping) and all(
        isinstance(each, str) and each for pair in groups.items() for each in pair
    ):
        return {base_model(model): group for model, group in groups.items()}
    raise KeyPoolBroken('model_groups of the pool must be {"<model>": "<limit group>", ...}')


def stated_limits(
    keys: Iterable[UpstreamKey], marks: Mapping[str, KeyMark]
) -> dict[str, dict[str, int]]:
    """Return the limits that the pool configures per organization: the lowest value of all its keys."""
    stated: dict[str, dict[str, int]] = {}
    for key in keys:
        limits = stated.setdefault(organization_of(key, marks.get(key.id)), {})
        for name, limit in key.limits.items():
            limits[name] = min(limit, limits.get(name, limit))
    return stated


def shared_organizations(keys: Iterable[UpstreamKey], marks: Mapping[str, KeyMark]) -> list[str]:
    """Return a warning for each organization with several keys: they add no capacity."""
    by_organization: dict[str, list[str]] = {}
    for key in keys:
        organization = organization_of(key, marks.get(key.id))
        by_organization.setdefault(organization, []).append(key.id)
    return [
        f"keys {', '.join(ids)} belong to organization {organization}: "
        "they share its limits, so a second key adds no capacity"
        for organization, ids in by_organization.items()
        if len(ids) > 1
    ]


def _parse_admin_key(position: int, value: object) -> AdminKey:
    where = f"admin key {position + 1} of the pool"
    row = _object(value, where, {"organization", "api_key", "base_url"})
    organization = _text(row, "organization", where)
    if organization is None:
        raise KeyPoolBroken(f"{where} has no organization; set it")
    return AdminKey(organization, _api_key(row, where), _base_url(row, where))


def _object(value: object, where: str, fields: set[str]) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise KeyPoolBroken(f"{where} is not a JSON object")
    unknown = set(value) - fields
    if unknown:
        raise KeyPoolBroken(f"{where} has unknown fields: {', '.join(sorted(unknown))}")
    return value


def _api_key(row: Mapping[str, Any], where: str) -> str:
    api_key = row.get("api_key")
    if isinstance(api_key, str) and api_key.strip() and api_key.isascii():
        return api_key.strip()
    is_missing = not isinstance(api_key, str) or not api_key.strip()
    raise KeyPoolBroken(
        f"{where} has {'no api_key' if is_missing else 'an api_key that is not ASCII text'}"
    )


def _base_url(row: Mapping[str, Any], where: str) -> str:
    base_url = _text(row, "base_url", where) or DEFAULT_BASE_URL
    try:
        parts = urlsplit(base_url)
        host, is_valid = parts.hostname or "", parts.port != 0
    except ValueError:
        raise KeyPoolBroken(f"{where}: base_url is not a valid URL") from None
    if host and is_valid and (parts.scheme == "https" or _is_plain_here(parts.scheme, host)):
        return base_url.rstrip("/")
    # The URL itself is not shown, because it may contain a password.
    raise KeyPoolBroken(
        f"{where}: base_url must start with https:// and name a host; "
        "http:// is permitted only for a loopback address, because key and prompts would be sent unencrypted"
    )


def _is_plain_here(scheme: str, host: str) -> bool:
    """Return whether the endpoint is called unencrypted, but without leaving this machine."""
    if scheme != "http":
        return False
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _parse_key(position: int, value: object) -> UpstreamKey:
    where = f"key {position + 1} of the pool"
    row = _object(
        value,
        where,
        {"id", "api_key", "organization", "base_url", "models", "tenants", "weight", "limits"},
    )
    api_key = _api_key(row, where)
    weight = row.get("weight") or 1
    if not isinstance(weight, int) or weight < 1:
        raise KeyPoolBroken(f"{where}: weight must be an integer of at least 1, got {weight!r}")
    return UpstreamKey(
        id=_text(row, "id", where) or f"key-{position + 1}",
        api_key=api_key,
        organization=_text(row, "organization", where),
        base_url=_base_url(row, where),
        models=_names(row, "models", where),
        tenants=_names(row, "tenants", where),
        weight=weight,
        limits=_limits(row, where),
    )


def _limits(row: Mapping[str, Any], where: str) -> Mapping[str, int]:
    value = row.get("limits") or {}
    if not isinstance(value, Mapping) or not set(value) <= {*DIMENSIONS, TOKENS_PER_DAY}:
        names = f"{', '.join(DIMENSIONS)} per minute, and {TOKENS_PER_DAY}"
        raise KeyPoolBroken(f"{where}: limits supports {names}; got {value!r}")
    for name, limit in value.items():
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
            raise KeyPoolBroken(
                f"{where}: limits.{name} must be an integer of at least 1, got {limit!r}"
            )
    return dict(value)


def _text(row: Mapping[str, Any], name: str, where: str) -> str | None:
    value = row.get(name)
    if value is None or (isinstance(value, str) and value):
        return value
    raise KeyPoolBroken(f"{where}: {name} must be a non-empty string, got {value!r}")


def _names(row: Mapping[str, Any], name: str, where: str) -> frozenset[str] | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        return frozenset(value)
    raise KeyPoolBroken(f"{where}: {name} must be a non-empty list of strings, got {value!r}")
