"""The limiter as a worker uses it: get admitted, wait for the start, settle later, report what responses say.

Behind it a planner reserves blocks of start times for many jobs in one write (`limit_planner`, `limit_writer`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from math import inf
from typing import Self

from sluice.domain.breakers import Breaker
from sluice.domain.errors import StoreBusy
from sluice.domain.keys import PLACEHOLDER
from sluice.domain.limits import (
    DIMENSIONS,
    NO_TIES,
    Cost,
    Settlement,
    block,
    breakers_of,
    circuit_failed,
    circuit_served,
    group_id,
    grown,
    known,
    moved,
    new_group,
    recalled,
    refuse_workspace,
    usual_gap,
    workspace_answered,
)
from sluice.domain.limits import blocked as blocked_for
from sluice.domain.models import is_unknown
from sluice.domain.turns import Owner
from sluice.domain.waits import USUAL, Waits
from sluice.domain.workspaces import WorkspaceRefusal
from sluice.ports.claude import NO_HEADERS, Headers
from sluice.ports.limits import LimitStore
from sluice.ports.world import Blocking, Clock, Events, Jitter
from sluice.worker.limit_books import (
    NOBODY,
    Admission,
    Admitted,
    Books,
    Change,
    Claimant,
    Line,
    Moved,
    Waiter,
    news,
)
from sluice.worker.limit_planner import Planner
from sluice.worker.limit_writer import LimitWriter
from sluice.worker.timeouts import wait_at_most


class Limiter:
    """One worker's access to the shared limits. Use as an async context manager around an invocation."""

    def __init__(  # noqa: PLR0913, PLR0917 - what a limiter needs of the world
        self,
        store: LimitStore,
        blocking: Blocking,
        clock: Clock,
        jitter: Jitter,
        events: Events,
        waits: Waits = USUAL,
    ) -> None:
        self._clock = clock
        self._events = events
        self._waits = waits
        self._line = Line()
        self._writer = LimitWriter(store, blocking, clock, jitter, events, waits, self._line, self)
        self._books = self._writer.books
        self._planner = Planner(self._line, self._writer, clock, jitter, events, waits)
        self._planning: asyncio.Task[None] | None = None
        self._successors: dict[str, str] = {}

    @property
    def writes(self) -> int:
        """Conditional writes tried since the worker started."""
        return self._writer.writes

    @property
    def moved(self) -> Mapping[str, str]:
        """Groups created under a key's name, with the organization that each belongs to."""
        return self._writer.moved

    async def __aenter__(self) -> Self:
        # State of the last invocation is outdated: read again before the first use.
        for books in self._books.values():
            books.read_at = 0
        self._planning = self._planner.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._planner.stop()
        if self._planning is not None:
            await self._planning
            self._planning = None
        self._line.cancel()
        for books in self._books.values():
            if books.due_at < inf or books.unsure:
                try:
                    await self._writer.write(books)
                except StoreBusy:
                    # The group recovers by itself: reserved capacity is refilled over time.
                    self._events.problem("limits table busy", limit_group=books.group.id)

    # The steps of a call -----------------------------------------------------------------------------------------

    async def admit(  # noqa: PLR0913 - the facts of one job
        self,
        claimants: Sequence[Claimant],
        input_chars: int,
        max_tokens: int,
        latest_start: int,
        *,
        owner: Owner = NOBODY,
        may_fall_back: bool = False,
    ) -> Admitted:
        """Wait for a reservation in the group that can start first; Later if none starts by `latest_start`."""
        answer: asyncio.Future[Admitted] = asyncio.get_running_loop().create_future()
        since = self._clock.now()
        waiter = Waiter(
            claimants, input_chars, max_tokens, latest_start, since, answer, owner, may_fall_back
        )
        self._line.waiters.append(waiter)
        self._planner.wake()
        try:
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled():
                given = answer.result()
                if isinstance(given, Admission):
                    self.settle(given, None)
            raise
        finally:
            if waiter in self._line.waiters:
                self._line.waiters.remove(waiter)

    async def wait_for_start(self, admission: Admission) -> bool:
        """Wait until the start time. False if it was revoked: release the reservation and ask again."""
        await wait_at_most(admission.revoked, self._clock, admission.start - self._clock.now())
        if admission.revoked.is_set() or self._is_cut_off(admission):
            return False
        admission.started_at = self._clock.now()
        return True

    def settle(
        self,
        admission: Admission,
        used: Cost | None,
        *,
        answered: bool = False,
        cached: bool = False,
    ) -> None:
        """Report what the call used; None if it was never sent, so that the whole reservation is released.

        `answered`: `used` is the actual usage, from which estimates are learned; `cached`: its input was partly cached.
        """
        assert not admission.is_settled, "a reservation is settled once"
        admission.is_settled = True
        now = self._clock.now()
        call_ms = max(1, now - (admission.started_at or now)) if answered else 0
        books = self._books[admission.claimant.group]
        if admission in books.open:
            books.open.remove(admission)
        if used is None:
            books.give_back(admission.epoch, admission.reserved, now)
        else:
            chars = admission.input_chars if answered and not cached else 0
            books.settlements.append(
                Settlement(admission.epoch, admission.reserved, used, chars, call_ms)
            )
            books.gather(now)
        self._planner.wake(if_idle=True)

    # What responses say -----------------------------------------------------------------------------------------

    def heard(self, admission: Admission, headers: Headers, *, served: bool) -> None:
        """Use a response's headers; `served`: it has an answer.

        Those of an unknown model are not the limits of its group, which has all unknown models of a tenant.
        """
        if is_unknown(admission.claimant.model_group):
            return
        books = self._books[admission.claimant.group]
        now = self._clock.now()
        if headers.seen:
            books.observations.append((now, headers))
            books.urgent = books.urgent or not all(
                known(books.group, dimension, seen) for dimension, seen in headers.seen.items()
            )
        if served and len(headers.seen) < len(DIMENSIONS):
            # Limits that upstream does not report are explored by its answers.
            books.changes.append(partial(grown, workspace=admission.claimant.ties.workspace))
            books.gather(now)
        if served:
            self._workspace_answered(books, admission.claimant.ties.workspace, now)
        if headers.seen or books.urgent:
            books.gather(now)
        self._planner.wake(if_idle=not books.urgent)

    @staticmethod
    def _workspace_answered(books: Books, name: str, now: int) -> None:
        known = books.group.workspaces.get(name)
        if known is not None and known.is_probed:
            books.change(partial(workspace_answered, name=name), now)

    def throttled(  # noqa: PLR0913 - the facts of one 429
        self,
        admission: Admission,
        until: int,
        reason: str,
        *,
        ramp: bool = False,
        headers: Headers = NO_HEADERS,
        request_id: str | None = None,
    ) -> None:
        """Block the whole group until a time: a 429, or a spend limit of the organization."""
        empty = {dimension for dimension, seen in headers.seen.items() if seen.remaining == 0}
        by = " ".join(filter(None, (admission.claimant.key_id, request_id)))
        overdrawn = empty == {"output_tokens"}
        hidden = "requests" in headers.seen and all(
            seen.remaining >= max(1, admission.reserved.of(dimension))
            for dimension, seen in headers.seen.items()
        )
        self._react(
            admission,
            lambda group, now: block(
                group,
                until,
                reason,
                now,
                by=by,
                ramp=ramp,
                overdrawn=overdrawn,
                hidden=hidden and not ramp,
            ),
        )

    def refused_workspace(self, admission: Admission, refusal: WorkspaceRefusal) -> None:
        """Block the workspace of a call, maybe its organization as well."""
        self._react(admission, lambda group, now: refuse_workspace(group, refusal, now))

    def recall(self, admission: Admission) -> None:
        """Revoke all workers' start times in a call's group, because its key is no longer accepted."""
        self._react(admission, recalled)

    def failed(self, admission: Admission, circuit: str, *, is_sure: bool = True) -> None:
        """Count a failure of a model or an endpoint against its circuit breaker.

        `is_sure`: the failure says that it is theirs, and not that of the model or the request.
        """
        change = partial(
            circuit_failed,
            name=circuit,
            ties=NO_TIES if is_sure else admission.claimant.ties,
            was_probe=admission.is_probe,
            waits=self._waits,
        )
        self._react(admission, change)

    def refused(self, admission: Admission, circuit: str) -> Breaker:
        """Count an unknown refusal; return its circuit breaker as it will be with what waits to be written."""
        self.failed(admission, circuit)
        books = self._books[admission.claimant.group]
        return books.foreseen(self._clock.now()).circuits.get(circuit, Breaker())

    def works(self, admission: Admission, circuit: str) -> None:
        """Note that a model or an endpoint has answered a call."""
        if circuit in self._books[admission.claimant.group].group.circuits:
            ties = admission.claimant.ties
            self._react(admission, partial(circuit_served, name=circuit, ties=ties))

    def belongs(self, admission: Admission, organization: str, headers: Headers) -> None:
        """Note the organization of a key, for a group that was created under the key's name.

        The limits in the first response are those of the organization, whose group is created with them.
        """
        claimant = admission.claimant
        opened_by_key = claimant.organization.startswith(PLACEHOLDER)
        if not opened_by_key or claimant.group in self._successors:
            return
        now = self._clock.now()
        self._successors[claimant.group] = self._start(
            organization, claimant.model_group, headers, now
        )
        self._books[claimant.group].change(lambda group, _: moved(group, organization), now)
        self._planner.wake()

    def knows_model(self, organization: str, model_group: str, headers: Headers) -> None:
        """Start the group of a model that was unknown, with the limits in its first answer."""
        self._start(organization, model_group, headers, self._clock.now())
        self.choose_again()

    def choose_again(self) -> None:
        """Have the jobs of unknown models choose their group again, because more models are known now."""
        for waiter in list(self._line.waiters):
            if any(is_unknown(claimant.model_group) for claimant in waiter.claimants):
                self._line.answer(waiter, Moved())
        self._planner.wake()

    def _start(self, organization: str, model_group: str, headers: Headers, now: int) -> str:
        """Create the books of a group, unless there are some, with the limits of a response; return its id."""
        name = group_id(organization, model_group)
        if name not in self._books:
            self._books[name] = Books(new_group(organization, model_group, now), 0)
        if headers.seen and not is_unknown(model_group):
            self._books[name].observations.append((now, headers))
            self._books[name].urgent = True
            self._books[name].gather(now)
        return name

    def drained(self) -> None:
        """Note that the queue is empty: no job waits behind those that workers hold."""
        self._line.drained_at = self._clock.now()

    def _react(self, admission: Admission, change: Change) -> None:
        name = admission.claimant.group
        # The limits in a first response apply to the organization, not only to the key of the call.
        now = self._clock.now()
        for each in dict.fromkeys((name, self._successors.get(name, name))):
            books = self._books[each]
            # A change that does not affect other workers is written with the next reservation.
            before = books.foreseen(now)
            if news(change(before, now)) != news(before):
                books.change(change, now)
            else:
                books.changes.append(change)
                books.gather(now)
        self._planner.wake()

    # What is known ----------------------------------------------------------------------------------------------

    def is_free(self, claimant: Claimant) -> bool:
        """Return whether workspace and endpoint of a key accept calls, as far as this worker knows."""
        books = self._books.get(claimant.group)
        return books is None or claimant.is_free(books.group, self._clock.now())

    def is_blocked(self, admission: Admission) -> bool:
        """Return whether calls like this one are blocked already, as far as this worker knows."""
        group = self._books[admission.claimant.group].group
        return blocked_for(group, admission.claimant.ties)[0] > self._clock.now()

    @property
    def held_back(self) -> int:
        """The number of jobs that wait for their own circuit breaker or workspace, and keep no others waiting."""
        return self._planner.held_back

    def knows(self, admission: Admission) -> bool:
        """Return whether the limits of the call's group are known, and not guessed."""
        return self._books[admission.claimant.group].group.has_answers

    def starts_in(self, milliseconds: int) -> int:
        """Return approximately how many calls can start within a time, in the groups of the held jobs."""
        groups = self._line.counts()
        in_use = [books for name, books in self._books.items() if name in groups or books.open]
        return sum(milliseconds // usual_gap(books.group) for books in in_use)

    def _is_cut_off(self, admission: Admission) -> bool:
        """Return whether a circuit breaker has opened since the reservation, or the workspace was blocked."""
        group, ties = self._books[admission.claimant.group].group, admission.claimant.ties
        if breakers_of(group, ties) and not admission.is_probe:
            return True
        workspace = group.workspaces.get(ties.workspace)
        return workspace is not None and workspace.blocked_until > self._clock.now()
