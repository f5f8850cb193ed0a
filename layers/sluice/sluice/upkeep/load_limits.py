"""Loading limits from the Rate Limits API, for organizations whose admin key is in the pool.

Limits are also learned from responses. The API has them before the first call, and it has tokens per day, which no
header names, and the models that share one limit group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Final

from sluice.domain.errors import KeyPoolBroken, StoreBusy
from sluice.domain.keys import AdminKey
from sluice.domain.limits import Group, KnownLimits, group_id, loaded, new_group
from sluice.domain.models import with_loaded
from sluice.domain.pricing import base_model
from sluice.ports.limits import AdminKeys, LimitStore, RateLimits
from sluice.ports.swap import Written, change
from sluice.ports.world import Clock, Events

EVERY_MS: Final = 3_600_000
"""Changed limits take effect within about an hour (Anthropic, Rate Limits API)."""


class LoadLimits:
    """The use case behind the schedule, together with governor and sweep."""

    def __init__(  # noqa: PLR0913, PLR0917 - its tools
        self,
        admin_keys: AdminKeys,
        rate_limits: RateLimits,
        limits: LimitStore,
        model_groups: Mapping[str, str],
        clock: Clock,
        events: Events,
    ) -> None:
        self._admin_keys = admin_keys
        self._rate_limits = rate_limits
        self._limits = limits
        self._model_groups = model_groups
        self._clock = clock
        self._events = events
        self._loaded_at: int | None = None

    def __call__(self) -> None:
        """Load the limits once an hour. Failures are only logged, because responses name the limits too."""
        now = self._clock.now()
        if self._loaded_at is not None and now - self._loaded_at < EVERY_MS:
            return
        self._loaded_at = now
        try:
            keys = self._admin_keys.admin_keys()
        except (KeyPoolBroken, StoreBusy) as error:
            self._events.problem("key pool not readable", reason=str(error))
            return
        learned: dict[str, str] = {}
        for key in keys:
            try:
                known = self._rate_limits.load(key)
            except (KeyPoolBroken, StoreBusy) as error:
                self._events.problem(
                    "limits not loaded", organization=key.organization, reason=str(error)
                )
                continue
            learned |= self._shared(known)
            self._enter(key, known, {**self._model_groups, **learned}, now)
        if not learned:
            return
        store = self._limits
        rule = partial(with_loaded, loaded=learned)
        if isinstance(change(store.replace_models, store.models(), rule, "known models"), Written):
            self._events.note("model groups learned", groups=learned)

    def _shared(self, known: Sequence[KnownLimits]) -> dict[str, str]:
        """Return the model groups for which the API says something else than the deployed data, or the data nothing."""
        learned: dict[str, str] = {}
        for each in known:
            ours = [_named(model, self._model_groups) for model in each.models]
            # One limit group upstream: use the name that most of its models have, or the first.
            name = max(sorted(set(ours)), key=ours.count, default="")
            learned |= {
                model: name
                for model in map(base_model, each.models)
                if self._model_groups.get(model) != name
            }
        return learned

    def _enter(
        self, key: AdminKey, known: Sequence[KnownLimits], groups: Mapping[str, str], now: int
    ) -> None:
        names = {each: _named(each.models[0], groups) for each in known if each.models}
        ids = [group_id(key.organization, name) for name in names.values()]
        stored = self._limits.load(ids)
        for each, name in names.items():
            self._entered(
                stored.get(group_id(key.organization, name))
                or new_group(key.organization, name, now),
                each,
                now,
            )

    def _entered(self, group: Group, known: KnownLimits, now: int) -> None:
        try:
            result = change(
                self._limits.replace,
                group,
                lambda current: loaded(current, known.limits, now),
                f"limit group {group.id}",
            )
        except StoreBusy as busy:
            self._events.problem("store busy", what=busy.what)
            return
        if isinstance(result, Written):
            self._events.note("limits loaded", limit_group=group.id, limits=dict(known.limits))


def _named(model: str, groups: Mapping[str, str]) -> str:
    """Return the name of the group of a model that upstream names: its own, unless the data says otherwise."""
    name = base_model(model)
    return groups.get(name, name)
