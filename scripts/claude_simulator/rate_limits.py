"""The Rate Limits API: what an organization and its workspaces may use, as an admin key reads it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final

from scripts.claude_simulator.checks import VERSIONS, RequestError
from scripts.claude_simulator.limits import Limits
from scripts.claude_simulator.settings import Model, Organization, Workspace

GROUP_TYPES: Final = ("batch", "files", "model_group", "skills", "token_count", "web_search")
MOST_PER_PAGE: Final = 1000
_CURSOR: Final = "page_"


@dataclass(frozen=True, slots=True)
class Entry:
    """The limits of one group: a family of models, or a part of the API that no model names.

    `limits` are those of the organization, `overrides` those of the workspace asked for.
    """

    type: str
    name: str
    display_name: str
    models: tuple[str, ...] | None
    limits: dict[str, int]
    overrides: dict[str, int]

    def group(self) -> dict[str, Any]:
        """Return the group as version 2026-10-21 describes it."""
        found = {"type": self.type, "id": _id("rlg", self.name)}
        return found | ({"display_name": self.display_name} if self.models else {})

    def of_organization(self, organisation: str, version: str) -> dict[str, Any]:
        """Return the entry of the organization's list."""
        limits = [{"type": kind, "value": value} for kind, value in self.limits.items()]
        entry = {"type": "rate_limit", **self._described(version), "limits": limits}
        if version != VERSIONS[0]:
            entry["id"] = self._id(organisation)
        return entry

    def of_workspace(
        self, organisation: str, workspace: str, version: str, *, inherited: bool
    ) -> dict[str, Any]:
        """Return the entry of a workspace's list: its overrides, and what it inherits if wanted."""
        limits = []
        for kind in (*self.limits, *(kind for kind in self.overrides if kind not in self.limits)):
            org_limit, own = self.limits.get(kind), self.overrides.get(kind)
            if own is None and not inherited:
                continue
            limit: dict[str, Any] = {"type": kind, "value": org_limit if own is None else own}
            limit["org_limit"] = org_limit
            if version != VERSIONS[0]:
                limit["source"] = {"type": "organization" if own is None else "workspace"}
            limits.append(limit)
        entry = {"type": "workspace_rate_limit", **self._described(version), "limits": limits}
        if version != VERSIONS[0]:
            entry |= {"rate_limit_id": self._id(organisation), "workspace_id": workspace}
        return entry

    def _described(self, version: str) -> dict[str, Any]:
        models = None if self.models is None else list(self.models)
        if version == VERSIONS[0]:
            return {"group_type": self.type, "models": models}
        return {"group": self.group(), "models": models}

    def _id(self, organisation: str) -> str:
        return _id("rl", f"{organisation} {self.name}")


def of_organization(
    organisation: Organization, models: dict[str, Model], version: str, query: dict[str, str]
) -> dict[str, Any]:
    """Return a page of the organization's limits, or raise what the API would answer."""
    found = _entries(organisation, models, None)
    if (name := query.get("model")) is not None:
        found = [entry for entry in found if entry.models is not None and name in entry.models]
        if not found:
            raise RequestError(f"model: {name}", 404, "not_found_error")
    found = _of_type(found, query)
    return _page([entry.of_organization(organisation.id, version) for entry in found], query)


def of_workspace(
    organisation: Organization,
    workspace: str,
    models: dict[str, Model],
    version: str,
    query: dict[str, str],
) -> dict[str, Any]:
    """Return a page of a workspace's limits, or raise what the API would answer."""
    if workspace != organisation.workspace and workspace not in organisation.workspaces:
        raise RequestError(f"workspace_id: {workspace}", 404, "not_found_error")
    if "model" in query:
        raise RequestError("model: Extra inputs are not permitted")
    inherited = query.get("include_inherited", "false")
    if inherited not in {"true", "false"}:
        raise RequestError("include_inherited: Input should be a valid boolean")
    own = organisation.workspaces.get(workspace)
    found = _of_type(_entries(organisation, models, own), query)
    entries = [
        entry.of_workspace(organisation.id, workspace, version, inherited=inherited == "true")
        for entry in found
    ]
    return _page([entry for entry in entries if entry["limits"]], query)


def _entries(
    organisation: Organization, models: dict[str, Model], workspace: Workspace | None
) -> list[Entry]:
    """Return every group with a limit: the families of models, then the Batches API and counting."""
    families: dict[str, list[Model]] = {}
    for model in {model.id: model for model in models.values()}.values():
        if model.lifecycle != "retired":
            families.setdefault(model.group, []).append(model)
    input_type = organisation.input_limit_type
    entries = [
        Entry(
            "model_group",
            group,
            _display_name(group, family),
            tuple(sorted(name for model in family for name in (model.id, *model.aliases))),
            _named(input_type, organisation.limits_of(group)),
            _named(input_type, None if workspace is None else workspace.limits_of(group)),
        )
        for group, family in families.items()
    ]
    batch = _named(input_type, Limits(organisation.batch_limits.rpm, None, None))
    if (queued := organisation.batch_limits.queued_requests) is not None:
        batch["enqueued_batch_requests"] = queued
    counting = _named(input_type, Limits(organisation.count_tokens_rpm, None, None))
    entries.append(Entry("batch", "batch", "", None, batch, {}))
    entries.append(Entry("token_count", "token_count", "", None, counting, {}))
    return [entry for entry in entries if entry.limits or entry.overrides]


def _named(input_type: str, limits: Limits | None) -> dict[str, int]:
    if limits is None:
        return {}
    named = {
        "requests_per_minute": limits.requests,
        input_type: limits.input_tokens,
        "output_tokens_per_minute": limits.output_tokens,
    }
    return {kind: value for kind, value in named.items() if value is not None}


def _display_name(group: str, family: list[Model]) -> str:
    """Return the name of the only model, or what the names of a family begin with: Opus 4.x."""
    names = [model.display_name for model in family]
    if len(names) == 1:
        return names[0] or group
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    shared = "".join(letters[0] for letters in same).rstrip(" .")
    return f"{shared}.x" if shared else group


def _of_type(entries: list[Entry], query: dict[str, str]) -> list[Entry]:
    wanted = query.get("group_type")
    if wanted is None:
        return entries
    if wanted not in GROUP_TYPES:
        raise RequestError(f"group_type: Input should be one of {', '.join(GROUP_TYPES)}")
    return [entry for entry in entries if entry.type == wanted]


def _page(entries: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
    """Return what `limit` and `page` leave; without a limit everything."""
    limit, cursor = query.get("limit"), query.get("page", f"{_CURSOR}0")
    if limit is not None and not (limit.isdecimal() and 1 <= int(limit) <= MOST_PER_PAGE):
        raise RequestError(f"limit: a number from 1 to {MOST_PER_PAGE}")
    start = cursor.removeprefix(_CURSOR)
    if not cursor.startswith(_CURSOR) or not start.isdecimal():
        raise RequestError("page: not a cursor of an earlier answer")
    begin = int(start)
    end = len(entries) if limit is None else begin + int(limit)
    more = f"{_CURSOR}{end}" if end < len(entries) else None
    return {"data": entries[begin:end], "next_page": more}


def _id(prefix: str, name: str) -> str:
    return f"{prefix}_01{hashlib.sha256(name.encode()).hexdigest()[:22]}"
