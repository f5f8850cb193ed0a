"""Which limit group a model uses: its own only if the model is known.

Callers invent model names, or mistype them. If each name had a limit group, names would be stored without end, every
reader of the groups would pay for them, and each would have the rate of a new group. So a model is known if the
deployed data, the key pool or the Rate Limits API names it, or if upstream has answered a call for it. All other models
of one tenant share one group in each organization: a tenant delays only itself with names that do not exist.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from sluice.domain.pricing import base_model

UNKNOWN: Final = "unknown:"
"""Prefix of the model group of a tenant's unknown models."""

MOST_OF_A_TENANT: Final = 10
"""Models that upstream has answered one tenant for, and that no list names. More share the tenant's unknown group: an
upstream that answers for every name must not give out a new limit group for each."""

MOST_ANSWERED: Final = 500
"""The same for all tenants together, about 50 KB."""

KEPT_MS: Final = 30 * 86_400_000
"""An answered model is known for so long; the next answer makes it known again."""


def model_group(model: str, groups: Mapping[str, str], tenant: str) -> str:
    """Return the name of a model's group, by the groups of the known models."""
    return groups.get(base_model(model)) or f"{UNKNOWN}{tenant}"


def is_unknown(model_group: str) -> bool:
    """Return whether a model group has a tenant's unknown models: whose limits are not those of one model."""
    return model_group.startswith(UNKNOWN)


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer of upstream for a model that no list names."""

    tenant: str
    at: int


@dataclass(frozen=True, slots=True)
class KnownModels:
    """The models that are known beside those of the deployed data. Stored as one item under an optimistic lock."""

    version: int = 0
    """0: not stored yet."""
    loaded: Mapping[str, str] = field(default_factory=dict)
    """By model: the group it has in the Rate Limits API, if the deployed data says otherwise or nothing."""
    answered: Mapping[str, Answered] = field(default_factory=dict)

    def groups(self) -> dict[str, str]:
        """Return the model groups, by model."""
        return {model: model for model in self.answered} | dict(self.loaded)


def with_loaded(models: KnownModels, loaded: Mapping[str, str]) -> KnownModels:
    """Replace what the Rate Limits API says."""
    if models.loaded == loaded:
        return models
    return replace(models, version=models.version + 1, loaded=dict(loaded))


def with_answer(
    models: KnownModels, model: str, tenant: str, now: int, taken: Collection[str] = ()
) -> KnownModels:
    """Add a model that upstream has answered a tenant's call for, unless there are too many.

    `taken`: names of groups, which such a model would otherwise share with the models that are in them.
    """
    name = base_model(model)
    if is_unknown(name) or name in taken:
        return models
    kept = {key: each for key, each in models.answered.items() if now - each.at < KEPT_MS}
    of_tenant = sum(each.tenant == tenant for each in kept.values())
    if name in kept or of_tenant >= MOST_OF_A_TENANT or len(kept) >= MOST_ANSWERED:
        return models
    answered = {**kept, name: Answered(tenant, now)}
    return replace(models, version=models.version + 1, answered=answered)
