"""Who calls: organizations at run time, and the answer to those that may not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Final

from scripts.claude_simulator.books import Group
from scripts.claude_simulator.cache import PromptCache
from scripts.claude_simulator.faults import Failure
from scripts.claude_simulator.limits import LimitGroup, Limits
from scripts.claude_simulator.settings import Organization

Headers = list[tuple[bytes, bytes]]
COUNT_TOKENS_GROUP: Final = "count_tokens"
BATCHES_GROUP: Final = "batches"


class Account:
    """An organization at run time: its settings, its groups, its prompt cache.

    `batches` counts Message Batches, `batch_items` their requests and what was billed for them.
    """

    def __init__(self, organisation: Organization, now: int) -> None:
        self.settings = organisation
        self.groups: dict[str, Group] = {}
        self.in_flight = 0
        self.other: Counter[str] = Counter()
        self.batches: Counter[str] = Counter()
        self.batch_items: Counter[str] = Counter()
        self.prompt_cache = PromptCache()
        self.apply(organisation, now)

    def apply(self, organisation: Organization, now: int) -> None:
        """Take new settings; the groups keep their levels."""
        self.settings = organisation
        self.rules = organisation.rules()
        self._headers: dict[str | None, Headers] = {}
        for group in self.groups.values():
            group.limits.relimit(self._limits_of(group.name), self.rules, now)
            wanted = self._workspace_limits_of(group.name)
            for name in group.workspaces.keys() - wanted.keys():
                del group.workspaces[name]
            for name, limits in wanted.items():
                if name in group.workspaces:
                    group.workspaces[name].relimit(limits, self.rules, now)
                else:
                    group.workspaces[name] = LimitGroup(limits, self.rules, now)

    def headers(self, workspace: str | None) -> Headers:
        """Return the headers that name the organization, and a workspace where one is known."""
        found = self._headers.get(workspace)
        if found is None:
            found = [(b"anthropic-organization-id", self.settings.id.encode())]
            if workspace is not None:
                found.append((b"anthropic-workspace-id", workspace.encode()))
            self._headers[workspace] = found
        return found

    def group(self, name: str, now: int) -> Group:
        """Return the model group of that name, with full buckets when it is new."""
        found = self.groups.get(name)
        if found is None:
            workspaces = {
                workspace: LimitGroup(limits, self.rules, now)
                for workspace, limits in self._workspace_limits_of(name).items()
            }
            limits = LimitGroup(self._limits_of(name), self.rules, now)
            found = self.groups[name] = Group(name, limits, workspaces)
        return found

    def _workspace_limits_of(self, name: str) -> dict[str, Limits]:
        if name in {COUNT_TOKENS_GROUP, BATCHES_GROUP}:
            return {}
        found = {
            workspace: settings.limits_of(name)
            for workspace, settings in self.settings.workspaces.items()
        }
        return {workspace: limits for workspace, limits in found.items() if limits is not None}

    def _limits_of(self, name: str) -> Limits:
        if name == COUNT_TOKENS_GROUP:
            return Limits(self.settings.count_tokens_rpm, None, None)
        if name == BATCHES_GROUP:
            return Limits(self.settings.batch_limits.rpm, None, None)
        return self.settings.limits_of(name)


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated request: whose it is and under which version.

    `workspace` is the one the key belongs to; an admin key belongs to none.
    """

    account: Account
    workspace: str | None
    key: str
    version: str
    at: int

    @property
    def headers(self) -> Headers:
        """Return the headers of every answer."""
        return self.account.headers(self.workspace)

    def own_limits(self, group: Group) -> LimitGroup | None:
        """Return the buckets its workspace has in a group, if it has any."""
        return None if self.workspace is None else group.workspaces.get(self.workspace)

    def limit_headers(self, group: Group, now: int) -> Headers:
        """Return the headers of every answer, with the limits as they stand at `now`."""
        if not self.account.settings.limit_headers:
            return self.headers
        return [*self.headers, *group.limits.headers(now, self.own_limits(group))]


@dataclass(frozen=True, slots=True)
class Refused:
    """A call that ends at once: an error to send, or (`failure.status` 0) a connection to drop."""

    failure: Failure
    headers: Headers
