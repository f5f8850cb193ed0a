"""More of what must be true: how soon, how often, with whose key and limits, and at what price.

Most of these bounds hold for workers whose stores work; a story with dead or troubled workers is judged by the others.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from sluice.domain.jobs import DEAD_LETTER, NOT_STORED, AttemptOutcome, Job, State
from sluice.domain.retries import UNSENDABLE, Failure
from tests.fakes import MINUTE, SECOND
from tests.simulation.accounts import INVENTED, MODEL_GROUPS, cost_of, limits_of
from tests.simulation.checks import Check
from tests.simulation.machines import Machine
from tests.simulation.upstream import Call

if TYPE_CHECKING:
    from tests.simulation.world import World, Write

LATE_START_MS: Final = 2 * SECOND
"""Between a worker's last check of the deadline and its call."""

CANCEL_MS: Final = 25 * SECOND
"""A worker looks for a cancel every 15 s; the rest is for its writes."""

EXPIRY_MS: Final = 3 * MINUTE
"""The sweep runs every minute; it may have to leave a job to the next run, and a run takes some time."""

LEAST_BLOCK_MS: Final = 8 * SECOND
"""Shorter pauses cannot be distinguished from the duration of a write."""

OWN_MS: Final = 2 * SECOND
"""A worker that received a 429 makes no more calls after this time."""

OTHERS_MS: Final = 20 * SECOND
"""Neither do the others, after this time: they have to read it."""

SKEW_MS: Final = 5 * SECOND
"""What the clocks of two workers may be apart, and more."""

MOST_CALLS_WHILE_BROKEN: Final = 12
"""In a minute, to a model or an endpoint that has done nothing but fail for a while."""

BROKEN_MS: Final = 30 * SECOND
"""Since the fifth failure in a row: by then every worker knows."""

PROBES_MS: Final = 4 * SECOND
MOST_PROBES: Final = 3
"""The shortest pause between two probes is 5 s. The clocks of their workers may be 6 s apart, and the pause doubles."""

DEAD_LETTER_MS: Final = 10 * MINUTE


def is_healthy(machine: Machine) -> bool:
    """Return whether a worker lives and its stores work."""
    return machine.is_alive and not machine.troubles


class KeysAndModelsAreTheTenants(Check):
    """A call is made with a key its tenant may use, for a model its caller named, within the limits of the key."""

    name = "keys and models are the tenant's"

    def called(self, world: World, call: Call) -> None:
        order, key = world.orders[call.name], call.request.key
        if key.tenants is not None and order.tenant not in key.tenants:
            world.fail(self.name, f"{call.name} of {order.tenant} was called with key {key.id}")
        if call.request.model not in order.models:
            world.fail(self.name, f"{call.name} was sent to {call.request.model}")
        if key.models is not None and call.request.model not in key.models:
            world.fail(self.name, f"key {key.id} was used for {call.request.model}")
        if key.organization is None:
            return
        own = f"{key.organization}/{limits_of(call.request.model)}"
        wanted = {own}
        if call.request.model not in MODEL_GROUPS:
            wanted.add(f"{key.organization}/unknown:{order.tenant}")
        if not any(
            entry.admission.claimant.group in wanted
            and entry.admission.claimant.key_id == key.id
            and entry.machine is call.machine
            and not entry.settled
            for entry in reversed(world.reserved.values())
        ):
            world.fail(self.name, f"call {call.number} has no start time of {own}")


class RejectedKeysAreNotUsed(Check):
    """A worker that saw a key rejected does not use it again."""

    name = "rejected keys are not used"

    def __init__(self) -> None:
        self.rejected: dict[tuple[Machine, str], int] = {}

    def called(self, world: World, call: Call) -> None:
        since = self.rejected.get((call.machine, call.request.key.api_key))
        if since is not None and world.time.now() > since + OWN_MS and is_healthy(call.machine):
            world.fail(self.name, f"call {call.number} with {call.request.key.id}")

    def call_ended(self, world: World, call: Call) -> None:
        reply = call.plan.reply
        if call.fate == "refused" and reply is not None and reply.failure.status == 401:
            self.rejected.setdefault((call.machine, call.request.key.api_key), world.time.now())


class BlocksAreKept(Check):
    """After a 429 with a time nobody calls with these limits before that time.

    They are those of the key's workspace, which its first response names; without such a header those of the key. A key
    that replaces another one in the pool is a new one, also under the same id: it may belong to another workspace.
    """

    name = "blocks are kept"

    def __init__(self) -> None:
        self.blocks: dict[object, list[tuple[Machine, int, int]]] = defaultdict(list)
        self.heard: dict[str, int] = {}
        """When each key was first answered or refused."""

    @staticmethod
    def _whose(world: World, call: Call) -> object:
        home, group = call.group
        return (home if world.story.headers != "none" else call.request.key.api_key), group

    def call_ended(self, world: World, call: Call) -> None:
        reply = call.plan.reply
        if call.fate in {"answered", "refused"}:
            self.heard.setdefault(call.request.key.api_key, world.time.now())
        if call.fate != "refused" or reply is None or reply.failure.status != 429:
            return
        wait = reply.failure.retry_after_ms
        if wait is not None and wait >= LEAST_BLOCK_MS and reply.failure.error_code is None:
            now = world.time.now()
            self.blocks[self._whose(world, call)].append((call.machine, now, now + wait))

    def called(self, world: World, call: Call) -> None:
        now = world.time.now()
        # Whose limits an unknown key draws on is not known to every worker at once.
        if not is_healthy(call.machine) or call.request.key.organization is None:
            return
        heard = self.heard.get(call.request.key.api_key)
        if heard is None or now < heard + OTHERS_MS:
            return
        for machine, since, until in self.blocks.get(self._whose(world, call), ()):
            own = machine is call.machine
            first = since + (OWN_MS if own else OTHERS_MS)
            if is_healthy(machine) and first < now < until - (SECOND if own else SKEW_MS):
                world.fail(
                    self.name,
                    f"call {call.number} for {call.name}, {(until - now) // 1000} s before the end of the block",
                )
                return


def is_endpoints(failure: Failure) -> bool:
    """Return whether a failure says that the endpoint does not work; a 529 says that it does, but not its model."""
    if failure.status is None:
        return failure.type != UNSENDABLE
    return failure.status >= 500 and failure.status != 529


class BrokenModelsAreProbed(Check):
    """A model that is overloaded, and an endpoint that does not answer, get a few probes and no more.

    An endpoint may fail for one model or tenant alone. So the time starts again when a second one fails, of whose calls
    the failures before said little.
    """

    name = "broken models are probed"

    def __init__(self) -> None:
        self.streak: dict[object, int] = defaultdict(int)
        self.since: dict[object, int] = {}
        self.calls: dict[object, list[int]] = defaultdict(list)
        self.models: dict[object, set[str]] = defaultdict(set)
        self.tenants: dict[object, set[str]] = defaultdict(set)
        """Of the failures in a row."""

    @staticmethod
    def _circuits(call: Call) -> tuple[tuple[str, str, str], ...]:
        """Return what may be broken about a call: each limit group finds out for itself."""
        group = (call.home.organization, limits_of(call.request.model))
        return (*group, call.request.model), (*group, "the endpoint")

    def call_ended(self, world: World, call: Call) -> None:
        model, endpoint = self._circuits(call)
        reply = call.plan.reply
        if call.fate == "answered":
            self._works(model)
            self._works(endpoint)
        elif reply is None or call.fate not in {"refused", "lost"}:
            return
        elif is_endpoints(reply.failure):
            self._failed(world, endpoint, call)
        else:
            self._works(endpoint)
            if reply.failure.status == 529:
                self._failed(world, model, call)

    def _works(self, circuit: object) -> None:
        self.streak[circuit] = 0
        self.models[circuit].clear()
        self.tenants[circuit].clear()

    def _failed(self, world: World, circuit: object, call: Call) -> None:
        models, tenants = self.models[circuit], self.tenants[circuit]
        before = len(models), len(tenants)
        models.add(call.request.model)
        tenants.add(world.orders[call.name].tenant)
        is_wider = 1 in before and before != (len(models), len(tenants))
        self.streak[circuit] += 1
        if self.streak[circuit] == 5 or is_wider:
            self.since[circuit] = world.time.now()

    def called(self, world: World, call: Call) -> None:
        now = world.time.now()
        for circuit in self._circuits(call):
            recent = [at for at in self.calls[circuit] if at > now - MINUTE]
            self.calls[circuit] = [*recent, now]
            if self.streak[circuit] < 5 or now < self.since[circuit] + BROKEN_MS + MINUTE:
                continue
            if len(recent) >= MOST_CALLS_WHILE_BROKEN and not world.is_troubled:
                self.calls[circuit].clear()
                world.fail(self.name, f"{len(recent)} calls a minute to {circuit[-1]}")


class ProbesAreSingle(Check):
    """Calls of a model and tenant that failed five times in a row start seconds apart, until any call is answered.

    Whatever else fails meanwhile: failures of others are no reason to start them together.
    """

    name = "probes are single"

    def __init__(self) -> None:
        self.run: dict[object, tuple[object, int]] = {}
        """Of each limit group: the model and tenant of the last failures, and how many there were."""
        self.broken: dict[object, dict[object, int]] = defaultdict(dict)
        """Of each limit group: the models and tenants that failed so often, and since when."""
        self.starts: dict[object, list[int]] = defaultdict(list)

    @staticmethod
    def _group(call: Call) -> object:
        return call.home.organization, limits_of(call.request.model)

    @staticmethod
    def _own(world: World, call: Call) -> tuple[str, str]:
        return call.request.model, world.orders[call.name].tenant

    def call_ended(self, world: World, call: Call) -> None:
        group, own, reply = self._group(call), self._own(world, call), call.plan.reply
        if call.fate not in {"refused", "lost"}:
            reply = None
        if reply is not None and is_endpoints(reply.failure):
            last, count = self.run.get(group, (own, 0))
            self.run[group] = (own, count + 1 if last == own else 1)
            if self.run[group][1] == 5:
                self.broken[group].setdefault(own, world.time.now())
            return
        # What became of a call that was not answered is not always known; then the count starts again.
        self.run.pop(group, None)
        if reply is not None or call.fate == "answered":
            self.broken[group].clear()

    def called(self, world: World, call: Call) -> None:
        now, group, own = world.time.now(), self._group(call), self._own(world, call)
        # Unknown keys have limit groups of their own, so each is probed.
        starts = self.starts[call.request.key.id, group, own]
        starts[:] = [*(at for at in starts if at > now - PROBES_MS), now]
        since = self.broken[group].get(own)
        if since is None or now < since + BROKEN_MS + PROBES_MS or world.is_troubled:
            return
        if len(starts) > MOST_PROBES:
            starts.clear()
            world.fail(self.name, f"{MOST_PROBES + 1} calls at once of {own}")


class OverloadFallsBack(Check):
    """A job whose model was overloaded is called with a later one of its models, if it has one.

    With the next one, unless that was overloaded before.
    """

    name = "overload falls back"

    def __init__(self) -> None:
        self.last: dict[str, Call] = {}
        self.overloaded: set[str] = set()

    def call_ended(self, world: World, call: Call) -> None:  # noqa: ARG002 - the same signature as the other checks
        reply = call.plan.reply
        if call.fate == "refused" and reply is not None and reply.failure.status == 529:
            self.overloaded.add(call.request.model)

    def called(self, world: World, call: Call) -> None:
        before = self.last.get(call.name)
        self.last[call.name] = call
        if before is None or before.fate != "refused" or not is_healthy(before.machine):
            return
        reply, models = before.plan.reply, world.orders[call.name].models
        is_overload = reply is not None and reply.failure.status == 529
        if is_overload and before.request.model in models[:-1]:
            later = models[models.index(before.request.model) + 1 :]
            if call.request.model not in later:
                world.fail(self.name, f"{call.name} was sent to {call.request.model} again")
            elif skipped := set(later[: later.index(call.request.model)]) - self.overloaded:
                world.fail(self.name, f"{call.name} was not sent to {sorted(skipped)}")


class DeadlinesAreKept(Check):
    """No call begins after a deadline, and a job that waits ends soon after it."""

    name = "deadlines are kept"

    def called(self, world: World, call: Call) -> None:
        deadline = world.orders[call.name].deadline_at
        if deadline is None or call.machine.troubles:
            return
        late = call.machine.now() - deadline
        if late > LATE_START_MS:
            world.fail(self.name, f"{call.name} was called {late / 1000:.1f} s after its deadline")

    def ended(self, world: World) -> None:
        if world.story.faults and (world.is_troubled or world.has_troubled_functions):
            return
        for job in world.jobs.stored.values():
            if job.deadline is None or job.finished_at is None or job.redrives:
                continue
            calls = [each for each in world.upstream.calls if each.name == job.custom_id]
            last = max([job.deadline, job.created_at, *(each.ended_at or 0 for each in calls)])
            if job.finished_at > last + EXPIRY_MS:
                late = (job.finished_at - last) // 1000
                world.fail(self.name, f"{job.custom_id} ended {late} s late, {job.state}")


class CancelsTakeEffect(Check):
    """A job that is canceled ends soon, also in the middle of its call."""

    name = "cancels take effect"

    def __init__(self) -> None:
        self.asked: list[tuple[int, Job]] = []

    def canceled(self, world: World, job: Job) -> None:
        self.asked.append((world.time.now(), job))

    def ended(self, world: World) -> None:
        if world.is_troubled:
            return
        surprised = {each.name for each in world.upstream.calls if each.plan.raises is not None}
        for at, before in self.asked:
            if before.custom_id in surprised:
                continue
            job = world.jobs.stored[before.job_id]
            if before.state.is_final or job.redrives or job.finished_at is None:
                continue
            if job.finished_at > at + CANCEL_MS:
                late = (job.finished_at - at) // 1000
                world.fail(self.name, f"{job.custom_id} ended {late} s after its cancel")


class CostsAddUp(Check):
    """Attempts, jobs and ledger rows have the prices of an independent calculation, and the jobs' owners."""

    name = "costs add up"

    def ended(self, world: World) -> None:
        calls = {call.request_id: call for call in world.upstream.calls}
        lost: Counter[str] = Counter()
        died = {
            f"{job.job_id}#{attempt.version}"
            for job in world.jobs.stored.values()
            for attempt in job.attempts
            if attempt.outcome is AttemptOutcome.LOST
        }
        for row in world.ledger.rows.values():
            # Its answer was paid for, and no store took it to the end of the invocation. If its worker died before it
            # wrote this into the job, the job has a call that may have been billed instead.
            is_known = row.note == NOT_STORED and row.call_id not in died
            lost[row.job_id] += row.spend.cost_micro_usd if is_known else 0
        for job in world.jobs.stored.values():
            spent = lost[job.job_id] + sum(each.cost_micro_usd or 0 for each in job.attempts)
            if job.cost_micro_usd != spent:
                world.fail(self.name, f"{job.custom_id} cost {job.cost_micro_usd}, not {spent}")
            for attempt in job.attempts:
                call = calls.get(attempt.request_id or "")
                if call is None or call.fate != "answered":
                    continue
                right = cost_of(call.request.model, call.usage)
                if (attempt.cost_micro_usd, attempt.usage) != (right, call.usage):
                    world.fail(self.name, f"{job.custom_id}: {attempt.cost_micro_usd}, not {right}")
        for row in world.ledger.rows.values():
            call = calls.get(row.request_id or "")
            if call is None:
                continue
            right = cost_of(call.request.model, call.usage) if call.fate == "answered" else 0
            found = (row.tenant, row.model, row.key_id, row.spend.cost_micro_usd)
            wanted = (
                world.orders[call.name].tenant, call.request.model, call.request.key.id, right,
            )  # fmt: skip
            if found != wanted:
                world.fail(self.name, f"the row of call {call.number} has {found}, not {wanted}")


class JobsErrForACauseOfTheirOwn(Check):
    """A job errors for what Claude said to its own calls, or its own dead letter."""

    name = "jobs err for a cause of their own"

    def ended(self, world: World) -> None:
        said: dict[str, set[int | None]] = defaultdict(set)
        for call in world.upstream.calls:
            if call.plan.reply is not None:
                said[call.name].add(call.plan.reply.failure.status)
        for job in world.jobs.stored.values():
            if job.state is not State.ERRORED or job.error is None:
                continue
            status = job.error.status
            if status == 403 and not _has_key(world, job):
                continue
            if status is not None and status not in said[job.custom_id or ""]:
                world.fail(self.name, f"{job.custom_id}: {job.error}")
            if job.error.type == DEAD_LETTER and job.job_id not in world.dead_lettered:
                world.fail(self.name, f"{job.custom_id}: {job.error}")


def _has_key(world: World, job: Job) -> bool:
    return any(
        (key.tenants is None or job.tenant in key.tenants)
        and (key.models is None or job.current_model in key.models)
        for key in world.story.keys
    )


class DeadLettersEndTheirJobs(Check):
    """A job whose message became a dead letter ends soon, unless it has another one or is to get one."""

    name = "dead letters end their jobs"

    def __init__(self) -> None:
        self.ends: dict[str, list[int]] = defaultdict(list)

    def wrote(self, world: World, write: Write) -> None:
        del world
        if write.after.state.is_final:
            self.ends[write.after.job_id].append(write.at)

    def ended(self, world: World) -> None:
        if world.is_troubled or world.has_troubled_functions:
            return
        for job_id, (at, was_alone) in world.dead_lettered.items():
            soon = any(end <= at + DEAD_LETTER_MS for end in self.ends[job_id])
            if was_alone and not soon:
                world.fail(self.name, f"{world.name_of(job_id)} went on without a message")


class FewAreRefused(Check):
    """Where upstream's headers say what is left, few calls are refused for being too many."""

    name = "few are refused"

    def ended(self, world: World) -> None:
        if world.story.headers != "true" or world.story.faults:
            return
        answers = sum(call.fate == "answered" for call in world.upstream.calls)
        refused = sum(
            call.fate == "refused" and call.request.model not in INVENTED
            for call in world.upstream.calls
        )
        if refused > 2 + answers / 20:
            world.fail(self.name, f"{refused} refusals beside {answers} answers")


BOUNDS: Final[Sequence[type[Check]]] = (
    KeysAndModelsAreTheTenants,
    RejectedKeysAreNotUsed,
    BlocksAreKept,
    BrokenModelsAreProbed,
    ProbesAreSingle,
    OverloadFallsBack,
    DeadlinesAreKept,
    CancelsTakeEffect,
    CostsAddUp,
    JobsErrForACauseOfTheirOwn,
    DeadLettersEndTheirJobs,
    FewAreRefused,
)
