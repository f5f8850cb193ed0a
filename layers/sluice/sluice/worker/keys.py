"""The choice of a key for a job: what the pool permits, and what workers have learned about its keys."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, TypeVar

from sluice.domain.breakers import endpoint_circuit, model_circuit, pseudonym, refusals_circuit
from sluice.domain.errors import KeyPoolBroken, StoreBusy
from sluice.domain.jobs import Job, JobError
from sluice.domain.keys import (
    PLACEHOLDER,
    KeyMark,
    UpstreamKey,
    learned,
    organization_of,
    shared_organizations,
    stated_limits,
    workspace_of,
)
from sluice.domain.limits import Ties, group_id
from sluice.domain.models import is_unknown, model_group, with_answer
from sluice.ports.claude import Headers
from sluice.ports.swap import change
from sluice.worker.limit_books import Claimant, claimant_for
from sluice.worker.limiter import Limiter
from sluice.worker.tools import Tools

T = TypeVar("T")

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
        self._groups_read_at = 0
        self._has_no_place: set[str] = set()
        """Models that were answered but stay unknown, because too many are known."""
        self._marks: dict[str, KeyMark] = {}
        self._own_marks: dict[str, KeyMark] = {}
        self._refusals: dict[str, dict[str, JobError]] = {}
        """By job and key, because a 403 can concern the request as well as the key."""

    async def claimants(self, job: Job) -> list[tuple[Claimant, UpstreamKey]] | JobError:
        """Return one key for each limit group that the job may use; empty while all are rejected, or none is known.

        Raises StoreBusy if what workers have learned about the keys cannot be read: that is no lack of keys.
        """
        try:
            keys = await self._pool()
            name = await self._group_of(job)
        except KeyPoolBroken as error:
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
        for key in allowed:
            if key.id in refusals or self.is_rejected(key):
                continue
            claimant = self._claimant(job, key, name, stated)
            usable.setdefault(claimant.group, []).append((claimant, key))
        return [self._chosen(choices) for choices in usable.values()]

    async def _group_of(self, job: Job) -> str:
        """Return the model group of a job: that of unknown models only if nobody knew it a few seconds ago."""
        name = model_group(job.current_model, self._groups, job.tenant)
        if is_unknown(name):
            async with self._reading:
                if self._tools.clock.now() - self._groups_read_at >= KEYS_MS:
                    await self._read_groups()
            name = model_group(job.current_model, self._groups, job.tenant)
            self._rereads_groups = self._rereads_groups or is_unknown(name)
        return name

    def _claimant(
        self, job: Job, key: UpstreamKey, name: str, stated: Mapping[str, Mapping[str, int]]
    ) -> Claimant:
        """Return the claimant of a job with a key, in the model group of this name."""
        model, mark = job.current_model, self._marks.get(key.id)
        organization = organization_of(key, mark)
        moved_to = self._limiter.moved.get(group_id(organization, name), organization)
        circuits = (
            model_circuit(model),
            endpoint_circuit(key.base_url),
            refusals_circuit(job.tenant),
        )
        return claimant_for(
            moved_to,
            name,
            key.id,
            stated.get(organization),
            Ties(circuits, workspace_of(key, mark), model, pseudonym(job.tenant)),
        )

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

    async def learn(
        self, key: UpstreamKey, organization: str | None, workspace: str | None
    ) -> None:
        """Record the organization and the workspace of a key, for all workers."""
        known = self._marks.get(key.id)
        mark = learned(key, known, organization, workspace)
        if (organization or workspace) and mark != known and await self._marked(mark):
            self._marks[key.id] = self._own_marks[key.id] = mark

    def workspace(self, key: UpstreamKey) -> str | None:
        """Return the workspace of a key; None if no key of the pool may belong to another one of its organization.

        Then the limits of the workspace need not be distinguished from those of the organization.
        """
        workspace, organization = self._home(key)
        homes = map(self._home, self._keys or ())
        is_shared = any(
            other != workspace and (where == organization or where.startswith(PLACEHOLDER))
            for other, where in homes
        )
        return workspace if is_shared else None

    def _home(self, key: UpstreamKey) -> tuple[str, str]:
        mark = self._marks.get(key.id)
        return workspace_of(key, mark), organization_of(key, mark)

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
                keys = await self._of_secret(self._tools.keys.keys)
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

    async def _of_secret(self, read: Callable[[], T]) -> T:
        """Read something of the key pool's secret; raises KeyPoolBroken also if Secrets Manager is busy."""
        try:
            return await self._tools.blocking(read)
        except StoreBusy as busy:
            raise KeyPoolBroken(str(busy)) from busy

    async def _read_groups(self) -> None:
        """Read which models share limits: the deployed data, corrected by upstream, then by the key pool."""
        known = await self._tools.blocking(self._tools.limits.models)
        stated = await self._of_secret(self._tools.keys.model_groups)
        groups = {**known.groups(), **self._model_groups, **known.loaded, **stated}
        self._rereads_groups, self._groups_read_at = False, self._tools.clock.now()
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
        taken = frozenset(self._groups.values())
        rule = partial(with_answer, model=model, tenant=tenant, now=now, taken=taken)
        change(store.replace_models, store.models(), rule, "the known models")

    def _chosen(
        self, choices: Sequence[tuple[Claimant, UpstreamKey]]
    ) -> tuple[Claimant, UpstreamKey]:
        """Choose a key of a limit group whose workspace and endpoint accept calls now, unless there is none."""
        working = [choice for choice in choices if self._limiter.is_free(choice[0])]
        claimant, key = self._by_weight(working or choices)
        return replace(claimant, has_other=bool(working) and len(choices) > 1), key

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
