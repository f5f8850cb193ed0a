"""What can go wrong. A story draws some of these; each strikes until the story's calm, then stops.

To add one: write a class with any of the hooks and put it into `FAULTS`.

    strike   a concurrent coroutine, for what happens at its own time
    before   at every call to a store, before it is made: raise StoreBusy, kill, or let time pass
    after    the same, when the call is made and its reply is on its way
    touch    at every verb of the stores of files: raise StoreBusy, or kill
    reply    what a call to Claude shall meet; None leaves it to others
    batches  the same for a call to Message Batches
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from sluice.domain.errors import KeyPoolBroken, StoreBusy
from sluice.domain.limits import settle
from sluice.domain.retries import Failure
from sluice.ports.claude import Headers, Refused
from tests.fakes import MINUTE, SECOND
from tests.simulation.machines import Killed, Machine, Point
from tests.simulation.upstream import REFUSED_MS, Call, Plan

if TYPE_CHECKING:
    from tests.simulation.world import World

WRITES: Final = frozenset(
    {
        "add", "replace", "postpone", "watch", "put", "mark", "record", "add_up", "put_back",
        "write", "keep", "keep_hidden", "receive", "delete",
    }
)  # fmt: skip
"""The verbs whose reply can be lost after they were done."""


class Fault:
    """Something that can go wrong; strikes from the beginning of the story to its calm."""

    patience_ms = 0
    """How long after the calm its effects may last."""
    lasts = False
    """It goes on replying to calls after the calm."""
    whose: str | None = None
    """The tenant it troubles; None: everybody."""

    def __init__(self, rng: random.Random, calm_at_ms: int) -> None:
        self.calm_at_ms = calm_at_ms
        self.struck = 0
        """How often it did something."""
        self.rng = random.Random(rng.random())  # noqa: S311 - chance that can be repeated
        self.often = rng.choice((0.02, 0.1, 0.3))
        begins = rng.randrange(calm_at_ms // 2)
        self.window = (begins, begins + rng.randrange(calm_at_ms))

    async def strike(self, world: World) -> None:
        """Happen."""

    async def before(self, point: Point) -> None:
        """Strike at a call before it is made."""

    async def after(self, point: Point) -> None:
        """Strike at a call that was made."""

    def touch(self, world: World, machine: Machine, store: str, verb: str) -> None:
        """Strike inside what a machine does with the stores of files, before a verb."""

    def reply(self, call: Call) -> Plan | None:  # noqa: ARG002 - a hook
        """Say what a call to Claude meets."""
        return None

    def batches(self, world: World, verb: str, batch_id: str) -> str | None:  # noqa: ARG002 - a hook
        """Say what a call to Message Batches meets: `dead` before it is made, or another fate of its verb."""
        return None

    def calm(self, world: World) -> None:
        """Repair what would not recover by itself."""

    def chance(self) -> bool:
        """Return whether to strike now."""
        return self.rng.random() < self.often

    def is_time(self, world: World) -> bool:
        """Return whether an outage is in progress."""
        return self.window[0] <= world.time.now() - world.time.start < self.window[1]

    def hit(self, point: Point, what: str) -> None:
        """Note that a call to a store is hit; it may explain what the machine cannot write."""
        self.struck += 1
        point.machine.troubles.append(what)
        point.machine.world.record(point.machine, f"FAULT {what}", point.verb, point.args)

    def note(self, world: World, what: str) -> None:
        """Note that something happened apart from the calls."""
        self.struck += 1
        world.note(f"FAULT {what}")

    async def now_and_then(self, every_ms: int) -> None:
        """Wait for a random time."""
        await asyncio.sleep(self.rng.randrange(1, 2 * every_ms) / 1000)


# Machines --------------------------------------------------------------------------------------------------


class KilledAtAStoreCall(Fault):
    """A worker, the api or the sweep dies just before a store call, or with the reply on its way."""

    async def before(self, point: Point) -> None:
        self._perhaps(point, "killed before a call")

    async def after(self, point: Point) -> None:
        self._perhaps(point, "killed after a call")

    def _perhaps(self, point: Point, what: str) -> None:
        if self.rng.random() < self.often / 5:
            self.struck += 1
            point.machine.world.record(point.machine, f"FAULT {what}", point.verb, point.args)
            point.machine.kill(what)
            raise Killed(point.machine.name)


class KilledAtAnyMoment(Fault):
    """A worker dies in the middle of anything: a call to Claude, a wait, a frozen pause."""

    async def strike(self, world: World) -> None:
        while True:
            await self.now_and_then(self.calm_at_ms // 6)
            if world.busy:
                self.note(world, "a worker is killed")
                self.rng.choice(world.busy).machine.kill("killed")


class TimedOutInvocation(Fault):
    """A store call hangs for so long that Lambda ends the invocation, or the lease is over."""

    async def before(self, point: Point) -> None:
        if self.rng.random() < self.often / 5:
            self.hit(point, "hangs")
            seconds, now = self.rng.choice((20, 150, 900)), point.machine.world.time.now()
            point.machine.hangs.append((now, now + seconds * SECOND))
            await asyncio.sleep(seconds)


class ClockSkew(Fault):
    """A machine's clock jumps; clocks that are off by up to 3 s are part of every other story anyway."""

    async def strike(self, world: World) -> None:
        while True:
            await self.now_and_then(self.calm_at_ms // 4)
            self.note(world, "clocks jump")
            for environment in world.environments:
                environment.machine.skew_ms = self.rng.randrange(-2 * SECOND, 2 * SECOND)


# The queue -------------------------------------------------------------------------------------------------


class DuplicateDelivery(Fault):
    """SQS delivers a held message again, or there are two messages for one job."""

    async def strike(self, world: World) -> None:
        while True:
            await self.now_and_then(self.calm_at_ms // 8)
            if self.rng.random() < 0.5:
                self.note(world, f"{world.queue.show_early(self.rng)} is visible again")
            elif world.names:
                name = self.rng.choice(sorted(world.names))
                self.note(world, f"a second message for {name}")
                world.queue.post(job_id=world.names[name])


class LateDelivery(Fault):
    """A message that could be received is not, for a while."""

    async def strike(self, world: World) -> None:
        while True:
            await self.now_and_then(self.calm_at_ms // 8)
            late = world.queue.hide_longer(self.rng, self.rng.randrange(10 * MINUTE))
            self.note(world, f"{late} is late")


class VisibilityRunsOut(Fault):
    """Visibility cannot be changed for a while, so that messages become visible in the middle of their calls."""

    async def before(self, point: Point) -> None:
        if point.verb in {"keep_hidden", "put_back"} and self.is_time(point.machine.world):
            self.hit(point, "visibility cannot be changed")
            raise StoreBusy(point.store)


class LostMessage(Fault):
    """A message is lost, for example by an accidental purge."""

    async def strike(self, world: World) -> None:
        while True:
            await self.now_and_then(self.calm_at_ms // 4)
            self.note(world, f"{world.queue.lose_one(self.rng)} is lost")


class PoisonMessage(Fault):
    """Messages that are not ours, and jobs whose answer no worker survives."""

    def __init__(self, rng: random.Random, calm_at_ms: int) -> None:
        super().__init__(rng, calm_at_ms)
        self.poisonous = rng.choice(("job-0-0", "job-1-0", ""))

    async def strike(self, world: World) -> None:
        while True:
            await self.now_and_then(self.calm_at_ms // 4)
            self.note(world, "a message that is not ours")
            world.queue.post(body=self.rng.choice(("", "not JSON", '{"v": 9}')))

    def reply(self, call: Call) -> Plan | None:
        return Plan(latency_ms=500, kills=True) if call.name == self.poisonous else None


class QueueBusy(Fault):
    """The queue takes no messages, or only some."""

    async def before(self, point: Point) -> None:
        if point.verb == "send" and self.is_time(point.machine.world):
            self.hit(point, "the queue takes nothing")
            point.machine.world.queue.fail_next("send")


# Stores ----------------------------------------------------------------------------------------------------


class Throttled(Fault):
    """DynamoDB, S3 or SQS refuse calls now and then: nothing was done."""

    async def before(self, point: Point) -> None:
        if point.store != "the key pool" and self.chance():
            self.hit(point, "throttled")
            raise StoreBusy(point.store)


class StoreOutage(Fault):
    """One store refuses everything for a while."""

    def __init__(self, rng: random.Random, calm_at_ms: int) -> None:
        super().__init__(rng, calm_at_ms)
        self.store = rng.choice(
            (
                "the jobs table",
                "the params table",
                "the limits table",
                "the ledger",
                "the data bucket",
                "the jobs queue",
            )
        )

    async def before(self, point: Point) -> None:
        if point.store == self.store and self.is_time(point.machine.world):
            self.hit(point, "store outage")
            raise StoreBusy(point.store)


class LostReply(Fault):
    """A write is done, and its reply is lost: the caller does not know."""

    async def before(self, point: Point) -> None:
        if point.verb == "send" and self.chance():
            self.hit(point, "lost reply")
            point.machine.world.queue.reply_is_lost = True

    async def after(self, point: Point) -> None:
        if point.verb in WRITES and self.chance():
            self.hit(point, "lost reply")
            if point.verb == "receive":
                point.machine.world.queue.lose_reply(point.machine)
            raise StoreBusy(point.store, may_be_done=True)


class ConditionFails(Fault):
    """Somebody else writes the limit group between read and write, again and again."""

    async def before(self, point: Point) -> None:
        world = point.machine.world
        if point.verb == "replace" and point.store == world.limits.name and self.chance():
            group = world.limits.stored.get(point.args[0].id)
            if group is not None:
                self.struck += 1
                world.record(point.machine, "FAULT the group was changed by somebody else")
                now = world.time.now()
                changed = settle(group, (), now)
                world.limits.stored[group.id] = replace(changed, version=group.version + 1)


class SecretsOutage(Fault):
    """Secrets Manager does not answer, or the secret is not what it should be."""

    def __init__(self, rng: random.Random, calm_at_ms: int) -> None:
        super().__init__(rng, calm_at_ms)
        self.broken = rng.random() < 0.3

    async def before(self, point: Point) -> None:
        if point.store in {"the key pool", "Secrets Manager"} and self.is_time(point.machine.world):
            self.hit(point, "secrets outage")
            if self.broken and point.store == "the key pool":
                raise KeyPoolBroken("no key pool in the secret")
            raise StoreBusy(point.store)


# Claude ----------------------------------------------------------------------------------------------------


def refused(  # noqa: PLR0913 - the facts of one failure
    call: Call,
    status: int | None,
    kind: str,
    message: str = "no",
    *,
    error_code: str | None = None,
    retry_after_ms: int | None = None,
    may_be_billed: bool = False,
) -> Refused:
    """Return a failed call."""
    failure = Failure(
        kind,
        message,
        status,
        error_code,
        retry_after_ms,
        call.request_id,
        may_be_billed=may_be_billed,
    )
    is_named = call.machine.world.story.headers != "none"
    workspace = call.home.workspace if is_named else None
    return Refused(failure, Headers(call.home.organization, workspace=workspace))


class RateLimited(Fault):
    """429: with a time, without one, because usage grew too fast."""

    def reply(self, call: Call) -> Plan | None:
        if not self.chance():
            return None
        code, wait = self.rng.choice(
            ((None, 1_000), (None, 40_000), (None, None), ("ramp_limit_exceeded", 3_000))
        )
        reply = refused(call, 429, "rate_limit_error", error_code=code, retry_after_ms=wait)
        return Plan(reply, REFUSED_MS)


class SpendLimit(Fault):
    """The tier's cap, a limit that the organization set itself, or an unpaid bill: the group is blocked."""

    patience_ms = 9 * 60 * MINUTE

    def __init__(self, rng: random.Random, calm_at_ms: int) -> None:
        super().__init__(rng, calm_at_ms)
        self.kind = rng.choice((0, 1, 1, 2))

    def reply(self, call: Call) -> Plan | None:
        if not self.is_time(call.machine.world):
            return None
        kinds = (
            refused(call, 429, "rate_limit_error", error_code="enforced_spend_limit_reached"),
            refused(
                call, 400, "invalid_request_error",
                "You have reached your specified API usage limits. You will regain access soon.",
            ),
            refused(call, 402, "billing_error"),
        )  # fmt: skip
        return Plan(kinds[self.kind], REFUSED_MS)


class OverloadStorm(Fault):
    """529 for everybody, for a while."""

    def reply(self, call: Call) -> Plan | None:
        if not self.is_time(call.machine.world):
            return None
        return Plan(refused(call, 529, "overloaded_error"), REFUSED_MS)


class ServerErrors(Fault):
    """5xx, 408, 409: a real failure of the attempt."""

    def reply(self, call: Call) -> Plan | None:
        if not self.chance():
            return None
        status = self.rng.choice((500, 502, 504, 408, 409))
        wait = self.rng.choice((None, 2_000))
        return Plan(refused(call, status, "api_error", retry_after_ms=wait), 1_000)


class BadRequest(Fault):
    """Claude will never take this request."""

    def reply(self, call: Call) -> Plan | None:
        if not self.chance():
            return None
        return Plan(refused(call, 400, "invalid_request_error", "no such thing"), REFUSED_MS)


class ConnectionLost(Fault):
    """The connection breaks, before Claude has started or after it has finished: Sluice cannot know which."""

    def reply(self, call: Call) -> Plan | None:
        if not self.chance():
            return None
        billed = self.rng.random() < 0.5
        reply = refused(call, None, "connection_lost", may_be_billed=True)
        return Plan(reply, self.rng.choice((10, 3_000)), billed=billed)


class NoConnection(Fault):
    """No connection is made: certainly nothing is billed."""

    def reply(self, call: Call) -> Plan | None:
        if not self.chance():
            return None
        return Plan(refused(call, None, "connection_failed"), 10)


class SlowAnswers(Fault):
    """Calls that last longer than the lease, or than the invocation."""

    def reply(self, call: Call) -> Plan | None:  # noqa: ARG002
        return Plan(latency_ms=self.rng.choice((100, 250, 700)) * SECOND) if self.chance() else None


class SlowUploads(Fault):
    """Upstream is slow to take a request."""

    def reply(self, call: Call) -> Plan | None:
        if not self.chance():
            return None
        upload_ms = self.rng.choice((500, 5_000, 60_000))
        return Plan(latency_ms=call.machine.world.draw_call_ms(), upload_ms=upload_ms)


class LargeAnswers(Fault):
    """Answers that need more memory than each job has of its own."""

    def reply(self, call: Call) -> Plan | None:
        if self.rng.random() < 0.2:
            return None
        size = self.rng.choice((500, 1_000))
        return Plan(latency_ms=call.machine.world.draw_call_ms(), answer_bytes=size)


class KillerJob(Fault):
    """A job whose answer no worker ever survives; while it is on its way, the others' calls go on."""

    patience_ms = 6 * 60 * MINUTE
    lasts = True

    def __init__(self, rng: random.Random, calm_at_ms: int) -> None:
        super().__init__(rng, calm_at_ms)
        self.name = rng.choice(("job-0-0", "job-1-0"))
        self.after_ms = rng.choice((500, 5_000, 20_000))

    def reply(self, call: Call) -> Plan | None:
        if call.name == self.name:
            return Plan(latency_ms=self.after_ms, kills=True)
        return Plan(latency_ms=self.after_ms + 10 * SECOND)


class Refusals(Fault):
    """Claude refuses to answer; with a fallback model the job goes on there."""

    def reply(self, call: Call) -> Plan | None:  # noqa: ARG002
        return Plan(stop_reason="refusal") if self.chance() else None


class RevokedKey(Fault):
    """401 from a key until it is replaced in the pool; or 403 for some requests."""

    def __init__(self, rng: random.Random, calm_at_ms: int) -> None:
        super().__init__(rng, calm_at_ms)
        self.status = rng.choice((401, 401, 403))
        self.whose = rng.choice(("key-0", "key-1"))

    def reply(self, call: Call) -> Plan | None:
        key = call.request.key
        if key.id != self.whose or key.api_key.endswith("-new"):
            return None
        if self.status == 401 and not self.is_time(call.machine.world):
            return None
        return Plan(refused(call, self.status, "authentication_error"), REFUSED_MS)

    def calm(self, world: World) -> None:
        world.pool.pool = [replace(key, api_key=f"{key.api_key}-new") for key in world.pool.pool]


class Surprise(Fault):
    """The call raises an unexpected exception."""

    def reply(self, call: Call) -> Plan | None:  # noqa: ARG002
        return Plan(latency_ms=100, raises=RuntimeError("surprise")) if self.chance() else None


class OtherTraffic(Fault):
    """Other clients use the organization's limits."""

    async def strike(self, world: World) -> None:
        while True:
            await self.now_and_then(5 * SECOND)
            self.note(world, "somebody else calls")
            for buckets in world.upstream.buckets.values():
                buckets.take(world.time.now(), requests=self.rng.randrange(20), input_tokens=2_000)


class ChangedLimits(Fault):
    """The organization's limits are raised or lowered."""

    async def strike(self, world: World) -> None:
        while True:
            await self.now_and_then(self.calm_at_ms // 4)
            factor = self.rng.choice((0.5, 2))
            self.note(world, f"the organization's limits change by {factor}")
            for buckets in world.upstream.buckets.values():
                buckets.limits = {
                    name: max(60, int(limit * factor)) for name, limit in buckets.limits.items()
                }


# People and schedules --------------------------------------------------------------------------------------


class Canceled(Fault):
    """A caller cancels, at any moment of a job's life."""

    async def strike(self, world: World) -> None:
        while True:
            await self.now_and_then(self.calm_at_ms // 8)
            if world.names:
                name = self.rng.choice(sorted(world.names))
                self.note(world, f"{name} is canceled")
                world.begin(world.cancel(name))


class TwoSweeps(Fault):
    """The schedule fires twice, or more often than it should."""

    async def strike(self, world: World) -> None:
        while True:
            await self.now_and_then(20 * SECOND)
            self.note(world, "two runs of the schedule at once")
            for _ in range(2):
                world.begin(world.tick())


class ParkedByHand(Fault):
    """A group is blocked for longer than a message may wait, so that its jobs are parked and swept."""

    def reply(self, call: Call) -> Plan | None:
        if not self.is_time(call.machine.world):
            return None
        reply = refused(call, 429, "rate_limit_error", retry_after_ms=20 * MINUTE)
        return Plan(reply, REFUSED_MS)


# Faults of stories with several tenants ---------------------------------------------------------------------


class ModelOverloaded(Fault):
    """529 for one model only, for a while."""

    def __init__(self, rng: random.Random, calm_at_ms: int) -> None:
        super().__init__(rng, calm_at_ms)
        self.model = rng.choice(("claude-a", "claude-a2", "claude-b"))
        self.window = (0, calm_at_ms)

    def reply(self, call: Call) -> Plan | None:
        if call.request.model != self.model:
            return None
        return Plan(refused(call, 529, "overloaded_error"), REFUSED_MS)


class EndpointDown(Fault):
    """No connection is made at all, for a while."""

    def reply(self, call: Call) -> Plan | None:
        if not self.is_time(call.machine.world):
            return None
        return Plan(refused(call, None, "connection_failed"), 10)


class LongBlocks(Fault):
    """429 with a time of a minute and more, now and then."""

    def reply(self, call: Call) -> Plan | None:
        if self.rng.random() > 0.05:
            return None
        wait = self.rng.choice((12_000, 60_000, 200_000))
        return Plan(refused(call, 429, "rate_limit_error", retry_after_ms=wait), REFUSED_MS)


class DeadLettered(Fault):
    """A message was delivered too often."""

    async def strike(self, world: World) -> None:
        while True:
            await self.now_and_then(self.calm_at_ms // 6)
            self.note(world, f"{world.queue.make_dead_letter(self.rng)} is a dead letter")


class Redriven(Fault):
    """Messages become dead letters, and an operator redrives their jobs."""

    async def strike(self, world: World) -> None:
        while True:
            await self.now_and_then(self.calm_at_ms // 6)
            self.note(world, f"{world.queue.make_dead_letter(self.rng)} is a dead letter")
            await self.now_and_then(self.calm_at_ms // 6)
            self.note(world, "all dead letters are redriven")
            world.begin(world.redrive())


class StrangeCancel(Fault):
    """A tenant cancels a job that is not its own."""

    async def strike(self, world: World) -> None:
        while True:
            await self.now_and_then(self.calm_at_ms // 6)
            name = self.rng.choice(sorted(world.names)) if world.names else ""
            others = sorted(world.tenants - {world.orders[name].tenant}) if name else []
            if others:
                self.note(world, f"{others[0]} would cancel {name}")
                world.begin(world.cancel(name, others[0]))


FAULTS_OF_TENANTS: Final[Sequence[type[Fault]]] = (
    ModelOverloaded,
    EndpointDown,
    LongBlocks,
    DeadLettered,
    Redriven,
    StrangeCancel,
)

# Files -----------------------------------------------------------------------------------------------------


class FilesThrottled(Fault):
    """The bucket, the batches table and the ranges queue refuse now and then."""

    def touch(self, world: World, machine: Machine, store: str, verb: str) -> None:
        if self.rng.random() < self.often / 2:
            self._busy(world, machine, store, verb)

    def _busy(self, world: World, machine: Machine, store: str, verb: str) -> None:
        self.struck += 1
        machine.troubles.append(f"{store}: {verb} is busy")
        world.record(machine, f"FAULT {store} is busy", verb)
        raise StoreBusy(store)


class FilesOutage(Fault):
    """One store of files refuses everything for a while, or only one verb."""

    def __init__(self, rng: random.Random, calm_at_ms: int) -> None:
        super().__init__(rng, calm_at_ms)
        self.store, self.verbs = rng.choice(
            (
                ("the data bucket", {"read"}),
                ("the data bucket", {"put"}),
                ("the data bucket", {"read", "put", "head", "get", "listing"}),
                ("the batches table", {"get", "range_state"}),
                ("the batches table", {"replace", "replace_range", "mark", "add"}),
                ("the ranges queue", {"send_ranges", "send_join", "send_plan"}),
                ("the ranges queue", {"put_back"}),
            )
        )

    def touch(self, world: World, machine: Machine, store: str, verb: str) -> None:
        if store == self.store and verb in self.verbs and self.is_time(world):
            self.struck += 1
            machine.troubles.append(f"{store}: {verb} is away")
            world.record(machine, f"FAULT {store} is away", verb)
            raise StoreBusy(store)


class KilledOverFiles(Fault):
    """A worker, the planner or the api dies before it uses a store of files."""

    def touch(self, world: World, machine: Machine, store: str, verb: str) -> None:
        if self.rng.random() < self.often / 10:
            self.struck += 1
            world.record(machine, f"FAULT killed before {store}", verb)
            machine.kill(f"killed before {store}: {verb}")
            raise Killed(machine.name)


class KilledRangeWorker(Fault):
    """A ranges worker dies in the middle of anything."""

    async def strike(self, world: World) -> None:
        while True:
            await self.now_and_then(self.calm_at_ms // 6)
            if world.files.busy:
                self.note(world, "a ranges worker is killed")
                self.rng.choice(world.files.busy).machine.kill("killed")


class RangeSeenTwice(Fault):
    """A range is delivered again while somebody runs it."""

    async def strike(self, world: World) -> None:
        while True:
            await self.now_and_then(self.calm_at_ms // 6)
            self.note(world, f"{world.files.queues.show_early(self.rng)} is visible again")


class RangeLost(Fault):
    """The message of a range is lost."""

    async def strike(self, world: World) -> None:
        while True:
            await self.now_and_then(self.calm_at_ms // 3)
            lost = world.files.queues.lose_one(self.rng)
            if lost is not None:
                self.note(world, f"range {lost} is lost")
                world.files.lost.add(lost[0])


class RangeDeadLettered(Fault):
    """The message of a range was delivered too often."""

    async def strike(self, world: World) -> None:
        while True:
            await self.now_and_then(self.calm_at_ms // 4)
            lost = world.files.queues.lose_one(self.rng)
            if lost is not None:
                self.note(world, f"range {lost} is a dead letter")
                world.files.post_again(*lost)


class StrangeBatchCancel(Fault):
    """A tenant cancels a batch that is not its own."""

    async def strike(self, world: World) -> None:
        while True:
            await self.now_and_then(self.calm_at_ms // 6)
            for batch_id, upload in world.files.accepted.items():
                others = sorted(world.tenants - {upload.tenant})
                if others and self.rng.random() < 0.5:
                    self.note(world, f"{others[0]} would cancel {upload.name}")
                    world.begin(world.files.cancel(batch_id, others[0]))
                    break


FAULTS_OF_FILES: Final[Sequence[type[Fault]]] = (
    FilesThrottled,
    FilesOutage,
    KilledOverFiles,
    KilledRangeWorker,
    RangeSeenTwice,
    RangeLost,
    RangeDeadLettered,
    StrangeBatchCancel,
)

FAULTS: Final[Sequence[type[Fault]]] = (
    KilledAtAStoreCall,
    KilledAtAnyMoment,
    TimedOutInvocation,
    ClockSkew,
    DuplicateDelivery,
    LateDelivery,
    VisibilityRunsOut,
    LostMessage,
    PoisonMessage,
    QueueBusy,
    Throttled,
    StoreOutage,
    LostReply,
    ConditionFails,
    SecretsOutage,
    RateLimited,
    SpendLimit,
    OverloadStorm,
    ServerErrors,
    BadRequest,
    ConnectionLost,
    NoConnection,
    SlowAnswers,
    SlowUploads,
    LargeAnswers,
    KillerJob,
    Refusals,
    RevokedKey,
    Surprise,
    OtherTraffic,
    ChangedLimits,
    Canceled,
    TwoSweeps,
    ParkedByHand,
)
