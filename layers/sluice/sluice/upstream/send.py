"""Sends the create of an upstream batch, once: its intent is on record before, and a lost reply is looked for after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from sluice.domain import upstream_batches as rules
from sluice.domain.errors import KeyPoolBroken, ResultsInterrupted, StoreBusy
from sluice.domain.keys import KeyMark, UpstreamKey, learned, workspace_of
from sluice.domain.refusals import Consequence, Scope, is_monthly
from sluice.domain.retries import Failure, meaning, next_month
from sluice.domain.upstream_batches import Phase, UpstreamBatch
from sluice.ports.claude import Headers, Refused
from sluice.ports.upstream import (
    Access,
    Created,
    Listed,
    NotFound,
    NotSent,
    Seen,
    Unknown,
    Unreachable,
)
from sluice.ports.upstream_records import open_batches
from sluice.upstream.prepare import TAIL
from sluice.upstream.tools import UpstreamTools

PIECE_BYTES: Final = 1024 * 1024

SPEND_RECHECK_MS: Final = 15 * 60_000
RATE_LIMITED_MS: Final = 60_000
"""Wait after a 429 without `retry-after`: the rate limits of the batch endpoints are per minute."""

MOST_DISPUTES: Final = 4
"""So often a create takes another number of requests because a create beside it has the same."""

Rule = Callable[[UpstreamBatch], UpstreamBatch]


@dataclass(frozen=True, slots=True)
class Wait:
    """The step comes to nothing now."""

    until: int
    """When to try it again (epoch milliseconds)."""
    reason: str


@dataclass(frozen=True, slots=True)
class NeverSent:
    """Upstream will not take this batch, whatever the key: its rows run live, where each is judged alone."""

    reason: str


class Keys:
    """The keys of the pool for one step, with what workers have learned about them."""

    def __init__(self, tools: UpstreamTools) -> None:
        self._tools = tools

    def usable(self, state: UpstreamBatch) -> list[UpstreamKey]:
        """Return the keys that may be used for all rows of a batch."""
        keys, marks = self._read()
        return [
            key
            for key in keys
            if all(key.allows(state.tenant, model) for model in state.models)
            and not (key.id in marks and marks[key.id].rejects(key))
        ]

    def of_batch(self, state: UpstreamBatch) -> Access | None:
        """Return a key that sees a batch that was sent: the one that sent it, else another one of its workspace."""
        keys, marks = self._read()
        same = [key for key in keys if key.id == state.key_id]
        workspace = [key for key in keys if workspace_of(key, marks.get(key.id)) == state.workspace]
        key = next(iter((*same, *workspace)), None)
        return access(state, key) if key else None

    def workspace(self, key: UpstreamKey) -> str:
        """Return the workspace of a key; a placeholder until it is known."""
        return workspace_of(key, self._tools.limits.marks([key.id]).get(key.id))

    def learn(self, key: UpstreamKey, headers: Headers) -> None:
        """Record the organization and the workspace that upstream named."""
        known = self._tools.limits.marks([key.id]).get(key.id)
        mark = learned(key, known, headers.organization, headers.workspace)
        if (headers.organization or headers.workspace) and mark != known:
            self._tools.limits.mark(mark)

    def reject(self, key: UpstreamKey) -> None:
        """Take a key out of rotation: upstream does not know it."""
        known = self._tools.limits.marks([key.id]).get(key.id) or KeyMark(key.id)
        self._tools.limits.mark(replace(known, rejected=key.fingerprint))
        self._tools.events.count("KeysRejected")
        self._tools.events.problem("upstream key rejected", key_id=key.id)
        self._tools.keys.reload()

    def _read(self) -> tuple[Sequence[UpstreamKey], dict[str, KeyMark]]:
        try:
            keys = self._tools.keys.keys()
        except KeyPoolBroken as error:
            raise StoreBusy(f"the key pool ({error})") from error
        return keys, dict(self._tools.limits.marks([key.id for key in keys]))


def access(state: UpstreamBatch, key: UpstreamKey) -> Access:
    """Return what calls for a batch are made with."""
    return Access(key, state.anthropic_version, state.anthropic_beta)


class Send:
    """The create of one upstream batch. `write` writes its record by a rule, and returns it."""

    def __init__(
        self, tools: UpstreamTools, owner: str, write: Callable[[Rule], UpstreamBatch]
    ) -> None:
        self._tools = tools
        self._owner = owner
        self._write = write
        self._keys = Keys(tools)

    def __call__(self, state: UpstreamBatch) -> UpstreamBatch | Wait | NeverSent:
        """Send it with the first key whose organization takes it now."""
        keys = self._keys.usable(state)
        waits: list[Wait] = []
        for key in keys:
            sent = self._with_key(state, key)
            if isinstance(sent, UpstreamBatch) and sent.phase is not Phase.READY:
                return sent
            if isinstance(sent, NeverSent):
                return sent
            if isinstance(sent, Wait):
                waits.append(sent)
            state = self._write(_same)
        if not waits:
            wait = rules.retry_ms(state.tries)
            return Wait(self._tools.clock.now() + wait, "no key of the pool may be used for it")
        return min(waits, key=lambda each: each.until)

    def _with_key(self, state: UpstreamBatch, key: UpstreamKey) -> UpstreamBatch | Wait | NeverSent:
        workspace = self._keys.workspace(key)
        taken = self._taken(state, workspace)
        owner, now = self._owner, self._tools.clock.now()
        state = self._write(
            lambda current: rules.sending(
                rules.without_spares(current, taken), owner, now, key_id=key.id, workspace=workspace
            )
        )
        for _ in range(MOST_DISPUTES):
            # Another one may have chosen the same number of requests since; each sees the other's intent here.
            taken = self._taken(state, workspace)
            if state.requests not in taken or not state.cuts:
                break
            state = self._write(partial(rules.resized, owner=owner, taken=taken))
        body = _body(self._tools, state)
        answer = self._tools.claude.create(access(state, key), body, state.body_bytes + len(TAIL))
        match answer:
            case Created(seen=seen, headers=headers):
                self._keys.learn(key, headers)
                return self._accepted(seen)
            case Unknown(failure=failure):
                self._tools.events.problem(
                    "create without reply", upstream_id=state.upstream_id, error_type=failure.type
                )
                return state
            case NotSent(failure=failure):
                self._write(partial(rules.refused, owner=owner))
                return Wait(self._tools.clock.now() + rules.retry_ms(state.tries), failure.type)
            case Refused(failure=failure, headers=headers):
                self._keys.learn(key, headers)
                self._write(partial(rules.refused, owner=owner))
                return self._refused(state, key, failure)

    def _taken(self, state: UpstreamBatch, workspace: str) -> set[int]:
        """Return the numbers of requests that other open batches of a workspace have."""
        return {
            each.requests
            for each in open_batches(self._tools.records, self._tools.clock.now())
            if each.phase in {Phase.SENDING, Phase.OPEN}
            and each.workspace == workspace
            and each.upstream_id != state.upstream_id
        }

    def _accepted(self, seen: Seen, *, is_confirmed: bool = True) -> UpstreamBatch:
        now = self._tools.clock.now()
        state = self._write(
            lambda current: rules.accepted(
                current, self._owner, seen.id, now, is_confirmed=is_confirmed
            )
        )
        self._tools.events.note(
            "upstream batch created",
            upstream_id=state.upstream_id,
            message_batch_id=seen.id,
            tenant=state.tenant,
            requests=state.requests,
            key_id=state.key_id,
        )
        return state

    def _refused(
        self, state: UpstreamBatch, key: UpstreamKey, failure: Failure
    ) -> Wait | NeverSent:
        """Return what follows from a refusal; another key is tried unless upstream would refuse it with any."""
        row, now = meaning(failure), self._tools.clock.now()
        self._tools.events.problem(
            "create refused",
            upstream_id=state.upstream_id,
            key_id=key.id,
            status=failure.status,
            error_type=failure.type,
            error_code=failure.error_code,
            request_id=failure.request_id,
        )
        match row.consequence:
            case Consequence.PARK if row.scope is Scope.KEY:
                self._keys.reject(key)
                return Wait(now + rules.retry_ms(state.tries), row.reason)
            case Consequence.PARK:
                self._tools.events.count("GroupsParked")
                until = now + max(SPEND_RECHECK_MS, failure.retry_after_ms or 0)
                if is_monthly(failure.error_code):
                    until = min(next_month(now), now + 6 * SPEND_RECHECK_MS)
                return Wait(until, row.reason)
            case Consequence.WAIT:
                return Wait(now + (failure.retry_after_ms or RATE_LIMITED_MS), row.reason)
            case Consequence.END if row.scope is not Scope.KEY:
                # Not the message, which may quote a request: this is logged. Each row learns its own error live.
                return NeverSent(f"its create was refused: {failure.type}")
            case _:
                return Wait(now + rules.retry_ms(state.tries), row.reason)

    # A lost reply ------------------------------------------------------------------------------------------------

    def look_for(self, state: UpstreamBatch) -> UpstreamBatch | Wait:
        """Find the batch of a create whose reply was lost; without one it may be sent again."""
        now = self._tools.clock.now()
        by = self._keys.of_batch(state)
        if by is None:
            return Wait(now + rules.retry_ms(state.tries), "no key of its workspace is in the pool")
        listed = self._tools.claude.since(by, state.sent_at - rules.CLOCKS_APART_MS)
        if not isinstance(listed, Listed):
            return Wait(now + rules.retry_ms(state.tries), "the batches cannot be listed")
        # One that was only taken for another upstream batch's own may be this one's.
        known = {
            each.message_batch_id
            for each in open_batches(self._tools.records, self._tools.clock.now())
            if each.message_batch_id and each.is_confirmed
        }
        found = rules.candidates(state, listed.batches, known)
        if len(found) == 1 and not found[0].is_ended:
            return self._accepted(found[0], is_confirmed=False)
        if found:
            return self._chosen(state, by, found)
        return self._none(state)

    def _none(self, state: UpstreamBatch) -> UpstreamBatch | Wait:
        """Return what follows if no listed batch is ours: once it would be listed by now, it is sent again."""
        if self._tools.clock.now() < rules.searched_until(state):
            return Wait(rules.searched_until(state), "its create had no reply")
        self._tools.events.problem("create sent again", upstream_id=state.upstream_id)
        return self._write(partial(rules.not_found, owner=self._owner))

    def _chosen(
        self, state: UpstreamBatch, by: Access, found: Sequence[Seen]
    ) -> UpstreamBatch | Wait:
        """Choose by the ids in their results: only batches that have ended show any."""
        undecided = 0
        for seen in found:
            ours = self._is_ours(state, by, seen) if seen.is_ended else None
            if ours:
                return self._accepted(seen)
            undecided += ours is None
        if not undecided:
            return self._none(state)
        wait = self._tools.clock.now() + rules.POLL_MS
        return Wait(wait, "several batches may be the one whose create had no reply")

    def _is_ours(self, state: UpstreamBatch, by: Access, seen: Seen) -> bool | None:
        """Return whether the first result of a batch has one of our ids; None if it cannot be read."""
        rows = self._tools.claude.results(by, seen.id)
        if isinstance(rows, NotFound | Refused | Unreachable):
            return None
        try:
            first = next(iter(rows), None)
        except ResultsInterrupted:
            return None
        finally:
            rows.close()
        if first is None:
            # Each batch has results; these ended early.
            return None
        return rules.row_id(first.custom_id or "", state.prefix) is not None


def _same(state: UpstreamBatch) -> UpstreamBatch:
    return state


def _body(tools: UpstreamTools, state: UpstreamBatch) -> Iterator[bytes]:
    at = 0
    while at < state.body_bytes:
        size = min(PIECE_BYTES, state.body_bytes - at)
        piece = tools.objects.read(state.body_key, at, size)
        if not piece:
            return
        yield piece
        at += len(piece)
    yield TAIL
