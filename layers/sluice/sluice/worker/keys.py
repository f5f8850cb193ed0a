"""The choice of a key for a job: what the pool permits, and what workers have learned about its keys."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from typing import Final

from sluice.domain.errors import KeyPoolBroken, StoreBusy
from sluice.domain.jobs import Job, JobError
from sluice.domain.keys import (
    KeyMark,
    UpstreamKey,
    organization_of,
    shared_organizations,
    stated_limits,
)
from sluice.domain.limits import group_id
from sluice.domain.models import is_unknown, model_group, with_answer
from sluice.ports.claude import Headers
from sluice.ports.swap import change
from sluice.worker.limit_books import Claimant, claimant_for
from sluice.worker.limiter import Limiter
from sluice.worker.tools import Tools

KEYS_MS: Final = 5_000
"""Maximum age of the key pool and of the key marks of other workers."""


class KeyChoice:
    """One invocation's view of the keys."""

    def __init__(
        self,
        tools: Tools,
        limiter: Limiter,
        model_groups: Mapping[str, str],
        warned_once: set[str],
    ) -> None:
        self._tools = tools
        self._limiter = limiter
        self._warned_once = warned_once
        """Warnings already logged; kept across invocations, so that each is logged once."""
        self._keys: Sequence[UpstreamKey] | None = None
        self._read_at = 0
        self._reading = asyncio.Lock()
        self._model_groups = model_groups
        self._groups: Mapping[str, str] = model_groups
        self._rereads_groups = True
        """A job waits for a model that is unknown here; another worker may have had an answer for it."""
        self._has_no_place: set[str] = set()
        """Models that were answered but stay unknown, because too many are known."""
        self._marks: dict[str, KeyMark] = {}
        self._own_marks: dict[str, KeyMark] = {}
        self._refusals: dict[str, dict[str, JobError]] = {}
        """By job and key, because a 403 can concern the request as well as the key."""

    async def claimants(self, job: Job) -> list[tuple[Claimant, UpstreamKey]] | JobError:
        """Return one key for each limit group that the job may use; empty while all are rejected."""
        try:
            keys = await self._pool()
        except (KeyPoolBroken, StoreBusy) as error:
            self._tools.events.problem("key pool not readable", reason=str(error))
            return []
        model = job.current_model
        allowed = [key for key in keys if key.allows(job.tenant, model)]
        if not allowed:
            if not keys:
                return []
            message = f"no key of the key pool may be used for model {model} by this tenant"
            return JobError("permission_error", message, 403)
        refusals = self._refusals.get(job.job_id, {})
        if refusals and all(key.id in refusals for key in allowed):
            # Every key was tried: the request itself is not permitted.
            return next(iter(refusals.values()))
        usable: dict[str, list[tuple[Claimant, UpstreamKey]]] = {}
        stated = stated_limits(keys, self._marks)
        name = model_group(model, self._groups, job.tenant)
        self._rereads_groups = self._rereads_groups or is_unknown(name)
        for key in allowed:
            if key.id in refusals or self.is_rejected(key):
                continue
            mark = self._marks.get(key.id)
            organization = organization_of(key, mark)
            moved_to = self._limiter.moved.get(group_id(organization, name), organization)
            circuits = (
                model_circuit(model),
                endpoint_circuit(key),
                refusals_circuit(job.tenant),
            )
            claimant = claimant_for(moved_to, name, key.id, stated.get(organization), circuits)
            usable.setdefault(claimant.group, []).append((claimant, key))
        return [self._by_weight(self._working(choices)) for choices in usable.values()]

    def is_rejected(self, key: UpstreamKey) -> bool:
        """Return whether upstream has rejected the current key."""
        mark = self._marks.get(key.id)
        return mark is not None and mark.rejects(key)

    def look_anew(self) -> None:
        """Read the pool and the key marks again before the next choice."""
        self._read_at = 0

    async def reject(self, key: UpstreamKey) -> bool:
        """Take a key out of rotation; False if it already is."""
        known = self._marks.get(key.id) or KeyMark(key.id)
        if known.rejects(key):
            return False
        mark = replace(known, rejected=key.fingerprint)
        self._marks[key.id] = self._own_marks[key.id] = mark
        self._tools.events.count("KeysRejected")
        self._tools.events.problem("upstream key rejected", key_id=key.id)
        self._tools.keys.reload()
        await self._marked(mark)
        self.look_anew()
        return True

    def refused(self, job: Job, key: UpstreamKey, error: JobError) -> None:
        """Remember that this key may not make this job's request, so that another one is tried."""
        self._refusals.setdefault(job.job_id, {})[key.id] = error
        self._tools.events.problem(
            "request refused to a key", job_id=job.job_id, key_id=key.id, model=job.current_model
        )

    def was_refused(self, job: Job) -> bool:
        """Return whether a key may not make this job's request."""
        return job.job_id in self._refusals

    async def learn_organization(self, key: UpstreamKey, organization: str) -> None:
        """Record the organization of a key, for all workers."""
        mark = self._marks.get(key.id) or KeyMark(key.id)
        learned = replace(mark, organization=organization, learned_with=key.fingerprint)
        if learned != mark and await self._marked(learned):
            self._marks[key.id] = self._own_marks[key.id] = learned

    def other_organization(
        self, key: UpstreamKey, claimant: Claimant, headers: Headers
    ) -> str | None:
        """Return the organization whose limits the key uses, if it is not the one the call was admitted for."""
        organization = headers.organization
        if organization is None or organization == claimant.organization:
            return None
        if key.organization is None:
            return organization
        self._tools.events.problem(
            "key belongs to another organization than the pool says",
            key_id=key.id,
            stated=key.organization,
            organization=organization,
        )
        return None

    async def _pool(self) -> Sequence[UpstreamKey]:
        """Return the keys, after reading their marks; both are at most a few seconds old."""
        async with self._reading:
            now = self._tools.clock.now()
            if self._keys is None or now - self._read_at >= KEYS_MS:
                keys = await self._tools.blocking(self._tools.keys.keys)
                marks = await self._tools.blocking(
                    self._tools.limits.marks, [key.id for key in keys]
                )
                if self._rereads_groups:
                    await self._read_groups()
                self._keys, self._read_at = keys, now
                # What this worker has just learned may not have been written yet.
                self._marks = {**marks, **self._own_marks}
                for sentence in shared_organizations(keys, self._marks):
                    if sentence not in self._warned_once:
                        self._warned_once.add(sentence)
                        self._tools.events.note("keys share an organization", advice=sentence)
            return self._keys

    async def _read_groups(self) -> None:
        """Read which models share limits: the deployed data, corrected by upstream, then by the key pool."""
        known = await self._tools.blocking(self._tools.limits.models)
        stated = await self._tools.blocking(self._tools.keys.model_groups)
        groups = {**known.groups(), **self._model_groups, **known.loaded, **stated}
        self._rereads_groups = False
        if groups != self._groups:
            self._groups = groups
            self._limiter.choose_again()

    async def learn_model(self, job: Job) -> str | None:
        """Record for all workers that upstream answers for an unknown model; return its group, None if it has none."""
        model = job.current_model
        if model in self._has_no_place:
            return None
        name = model_group(model, self._groups, job.tenant)
        if not is_unknown(name):
            return name
        try:
            await self._tools.blocking(self._known_with, model, job.tenant)
            await self._read_groups()
        except (KeyPoolBroken, StoreBusy):
            # Its next answer will say it again.
            self._tools.events.problem("model not recorded", model=model)
            return None
        name = model_group(model, self._groups, job.tenant)
        if is_unknown(name):
            self._has_no_place.add(model)
            self._tools.events.problem("too many unknown models", tenant=job.tenant)
            return None
        self._tools.events.note("model known", model=model, limit_group=name)
        return name

    def _known_with(self, model: str, tenant: str) -> None:
        store, now = self._tools.limits, self._tools.clock.now()
        rule = partial(with_answer, model=model, tenant=tenant, now=now)
        change(store.replace_models, store.models(), rule, "the known models")

    def _working(
        self, choices: Sequence[tuple[Claimant, UpstreamKey]]
    ) -> Sequence[tuple[Claimant, UpstreamKey]]:
        """Skip endpoints whose circuit breaker is open, unless there is no other."""
        working = [
            (claimant, key)
            for claimant, key in choices
            if not self._limiter.is_open(claimant.group, endpoint_circuit(key))
        ]
        return working or choices

    def _by_weight(
        self, choices: Sequence[tuple[Claimant, UpstreamKey]]
    ) -> tuple[Claimant, UpstreamKey]:
        point = self._tools.jitter() * sum(key.weight for _, key in choices)
        for choice in choices:
            point -= choice[1].weight
            if point < 0:
                return choice
        return choices[-1]

    async def _marked(self, mark: KeyMark) -> bool:
        try:
            await self._tools.blocking(self._tools.limits.mark, mark)
        except StoreBusy:
            # Another answer will say it again; the one at held must not be lost for it.
            self._tools.events.problem("key mark not written", key_id=mark.key_id)
            return False
        return True


def model_circuit(model: str) -> str:
    """Return the name of a model's breaker."""
    return f"model {model}"


def endpoint_circuit(key: UpstreamKey) -> str:
    """Return the name of an endpoint's breaker."""
    return f"endpoint {key.base_url}"


def refusals_circuit(tenant: str) -> str:
    """Return the name of the breaker for unknown refusals of a tenant's jobs: they must not stop other tenants.

    Not the tenant's name, because limit groups are shown to all tenants.
    """
    return f"refusals {sha256(tenant.encode()).hexdigest()[:12]}"
