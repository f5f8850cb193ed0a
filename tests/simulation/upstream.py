"""Claude, as the story's truth knows it: which calls came, which are billed, and whether anybody heard the answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import TYPE_CHECKING, Final

from sluice.domain.limits import DIMENSIONS, Dimension, Seen
from sluice.domain.pricing import Usage
from sluice.domain.retries import Failure
from sluice.ports.claude import Answer, CallRequest, Headers, Refused
from tests.fakes import ROOMY
from tests.simulation.accounts import INVENTED, ORGANIZATION, Home, limits_of
from tests.simulation.machines import Killed, Machine

if TYPE_CHECKING:
    from tests.simulation.world import World

ANSWER_PIECES: Final = 5
SMALL_PIECE: Final = 50
"""Larger pieces of an answer take some time to arrive."""

REFUSED_MS: Final = 150
"""How long a rejected call takes."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What shall become of a call."""

    reply: Refused | None = None
    """None: an answer."""
    latency_ms: int = 1_000
    billed: bool = True
    """For an answer, and for a connection that is lost: whether Claude has done the work by then."""
    raises: Exception | None = None
    kills: bool = False
    """The worker does not survive the answer."""
    stop_reason: str = "end_turn"
    upload_ms: int = 0
    """How long the request takes to be sent."""
    answer_bytes: int = 100


@dataclass(eq=False, slots=True)
class Call:
    """One call, and what became of it."""

    number: int
    name: str
    """The `custom_id` of its job."""
    request: CallRequest
    machine: Machine
    owner: str
    at: int
    plan: Plan = field(default_factory=Plan)
    usage: Usage = field(default_factory=Usage)
    billed: bool = False
    fate: str = "running"
    """Then `answered`, `refused`, `lost`, `timed out`, `stopped` (by its worker) or `died` (with it)."""
    ended_at: int | None = None
    received: int = 0
    """Bytes of the answer that the worker has taken."""
    home: Home = Home(ORGANIZATION)  # noqa: RUF009 - frozen
    """Where its key really belongs."""

    @property
    def group(self) -> tuple[Home, str]:
        """Whose limits it draws on."""
        return self.home, limits_of(self.request.model)

    @property
    def request_id(self) -> str:
        return f"req_{self.number}"

    @property
    def is_snooze(self) -> bool:
        """Return whether it was rejected without using an attempt."""
        if self.fate != "refused" or self.plan.reply is None:
            return False
        failure = self.plan.reply.failure
        return failure.status in {401, 402, 403, 429, 529} or "usage limits" in failure.message


class Buckets:
    """The organization's actual capacity: continuous token buckets."""

    def __init__(
        self, limits: Mapping[Dimension, int], now: int, hidden_ms: int | None = None
    ) -> None:
        """`hidden_ms`: requests are also held to a bucket with so much refill, which no header shows."""
        self.limits = dict(limits)
        self.most_hidden = inf if hidden_ms is None else limits["requests"] * hidden_ms / 60_000
        self.hidden = self.most_hidden
        self.levels = {name: float(limit) for name, limit in limits.items()}
        self.at = now

    def take(self, now: int, **units: int) -> bool:
        """Take a call's requests and input if there is some of everything; output may go below zero."""
        for name, limit in self.limits.items():
            refilled = self.levels[name] + limit * (now - self.at) / 60_000
            self.levels[name] = min(limit, refilled)
        refilled = self.hidden + self.limits["requests"] * (now - self.at) / 60_000
        self.hidden = min(self.most_hidden, refilled)
        self.at = now
        if any(level < 1 for level in (*self.levels.values(), self.hidden)):
            return False
        self.hidden -= 1
        for name in DIMENSIONS:
            self.levels[name] -= units.get(name, 0)
        return True

    def seen(self) -> Mapping[Dimension, Seen]:
        return {
            name: Seen(limit, max(0, int(self.levels[name]))) for name, limit in self.limits.items()
        }


class Upstream:
    """The Messages API of one story."""

    def __init__(self, world: World, headers: str, limits: Mapping[Dimension, int]) -> None:
        self.world = world
        self.headers = headers
        """`none` as of a relay, `roomy`, or `true` from the buckets."""
        self.limits = limits
        self.buckets: dict[str, Buckets] = {}
        self.calls: list[Call] = []

    async def send(self, machine: Machine, owner: str, request: CallRequest) -> Answer | Refused:
        """Serve one call as its plan says."""
        world, rng = self.world, self.world.rng
        name = json.loads(request.body.data)["messages"][0]["content"].split()[0]
        call = Call(len(self.calls) + 1, name, request, machine, owner, world.time.now())
        self.calls.append(call)
        call.usage = Usage(input_tokens=rng.randrange(5, 50), output_tokens=rng.randrange(1, 100))
        if world.story.cached:
            call.usage = replace(
                call.usage,
                cache_creation_input_tokens=rng.randrange(200, 400),
                cache_creation_1h_input_tokens=rng.randrange(200),
                cache_read_input_tokens=rng.randrange(9_000),
            )
        call.home = world.home_of(request.key)
        for check in world.checks:
            check.called(world, call)
        call.plan = self._plan(call)
        world.record(
            machine, f"call {call.number} for {name} ({request.model}, key {request.key.id})"
        )
        goes_on_alone = rng.random() < 0.5
        try:
            answer = await self._served(call)
            machine.check()
        except (asyncio.CancelledError, Killed):
            call.fate = "stopped" if machine.is_alive else "died"
            if call.plan.reply is None and call.plan.raises is None and goes_on_alone:
                call.billed = True
            raise
        finally:
            call.ended_at = world.time.now()
            billed = ", billed" if call.billed else ""
            world.record(machine, f"call {call.number} for {name}: {call.fate}{billed}")
            for check in world.checks:
                check.call_ended(world, call)
        return answer

    def _plan(self, call: Call) -> Plan:
        world = self.world
        plan = None
        for fault in world.faults:
            plan = fault.reply(call) if world.strikes or fault.lasts else None
            if plan is not None:
                fault.struck += 1
                break
        # No fault makes a model exist: one that delays an answer leaves it the refusal that it is.
        is_answer = plan is None or (plan.reply is None and plan.raises is None)
        if is_answer and call.request.model in INVENTED and not world.story.answers_any_model:
            text = f"model: {call.request.model}"
            failure = Failure("not_found_error", text, 404, request_id=call.request_id)
            return Plan(Refused(failure), REFUSED_MS, billed=False)
        if plan is not None:
            return plan
        if self.headers == "true" and not self._bucket(call).take(
            world.time.now(), requests=1, input_tokens=call.usage.input_tokens
        ):
            failure = Failure(
                "rate_limit_error",
                "too fast",
                429,
                retry_after_ms=1_000,
                request_id=call.request_id,
            )
            return Plan(Refused(failure, self._headers(call)), REFUSED_MS)
        return Plan(latency_ms=world.draw_call_ms())

    async def _served(self, call: Call) -> Answer | Refused:
        plan, window = call.plan, call.request.window_ms
        if plan.upload_ms:
            await asyncio.sleep(min(plan.upload_ms, window) / 1000)
        call.request.body.release()
        if plan.latency_ms > window:
            await asyncio.sleep(window / 1000)
            call.fate = "timed out"
            call.billed = True
            failure = Failure(
                "output_timeout",
                "no end within the time of the invocation",
                request_id=call.request_id,
                may_be_billed=True,
                had_full_window=call.request.full_window,
            )
            return Refused(failure)
        await self._thought_about(call)
        if plan.raises is not None:
            call.fate = "lost"
            raise plan.raises
        if plan.reply is not None:
            call.billed = plan.reply.failure.may_be_billed and plan.billed
            call.fate = "lost" if plan.reply.failure.status is None else "refused"
            return plan.reply
        call.billed = True
        if self.headers == "true":
            self._bucket(call).levels["output_tokens"] -= call.usage.output_tokens
        headers = self._headers(call)
        for _ in range(ANSWER_PIECES):
            size = call.received + -(-plan.answer_bytes // ANSWER_PIECES)
            try:
                async with asyncio.timeout(window / 1000):
                    await call.request.room(size)
            except TimeoutError:
                call.fate = "timed out"
                failure = Failure("output_timeout", "no room for the answer", may_be_billed=True)
                return Refused(failure, headers)
            call.received = size
            self.world.on_bytes(call.machine)
            if plan.answer_bytes > ANSWER_PIECES * SMALL_PIECE:
                await asyncio.sleep(self.world.rng.randrange(1, 8_000) / 1000)
        # The answer is being sent; it may arrive late, or after its caller has ended.
        await asyncio.sleep(self.world.rng.randrange(1, 40) / 1000)
        if plan.kills:
            call.machine.kill("the answer is poison")
        call.fate = "answered"
        text = f"{call.name} by call {call.number}"
        message = {"content": [{"type": "text", "text": text}], "stop_reason": plan.stop_reason}
        return Answer(json.dumps(message), call.usage, plan.stop_reason, call.request_id, headers)

    async def _thought_about(self, call: Call) -> None:
        """Wait for the latency; report the headers early if the call asks for it."""
        latency_ms = call.plan.latency_ms
        early_ms = latency_ms // 3 if self._has_early_headers(call) else 0
        if early_ms:
            await asyncio.sleep(early_ms / 1000)
            call.request.on_headers(self._headers(call))
        await asyncio.sleep((latency_ms - early_ms) / 1000)

    def _has_early_headers(self, call: Call) -> bool:
        plan = call.plan
        return call.request.early and plan.reply is None and plan.raises is None and not plan.kills

    def _bucket(self, call: Call) -> Buckets:
        home, group = call.group
        name = f"{home.organization}/{home.workspace}/{group}"
        if name not in self.buckets:
            hidden_ms = self.world.story.hidden_ms
            self.buckets[name] = Buckets(self.limits, self.world.time.now(), hidden_ms)
        return self.buckets[name]

    def _headers(self, call: Call) -> Headers:
        if self.headers == "none":
            return Headers()
        if self.headers == "roomy":
            return Headers(call.home.organization, ROOMY, call.home.workspace)
        seen = self._bucket(call).seen()
        return Headers(call.home.organization, seen, call.home.workspace)
