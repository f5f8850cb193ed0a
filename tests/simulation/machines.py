"""Machines that can die: every await of theirs passes through here, and so does every call to a store.

A machine is a worker's environment, or one run of another function. A worker is a coroutine on the story's event
loop. A function that blocks (the api, the sweep) runs in a thread of its own, but never at the same time as anybody
else: the thread hands each of its store calls to the loop and waits, so that the scheduler decides who is next.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final, ParamSpec, Self, TypeVar, cast

from sluice.domain.jobs import Party
from sluice.ports.swap import swap

if TYPE_CHECKING:
    from tests.simulation.world import World

P = ParamSpec("P")
T = TypeVar("T")

SLOWEST_STEP_MS: Final = 24


class Killed(BaseException):
    """The machine was killed; it does nothing more."""


@dataclass(frozen=True, slots=True)
class Point:
    """A call to a store, at the moment before or after it is made."""

    machine: Machine
    store: str
    verb: str
    args: tuple[Any, ...]


class Machine:
    """One process. Its clock may be off; when it dies, its tasks end wherever they are."""

    def __init__(self, world: World, name: str, party: Party, skew_ms: int = 0) -> None:
        self.world = world
        self.name = name
        self.party = party
        self.skew_ms = skew_ms
        self.started_at = world.time.now()
        self.died_at: int | None = None
        self.died_of = ""
        self.troubles: list[str] = []
        """Faults that hit this machine's calls: they may explain what it could not write."""
        self.hangs: list[tuple[int, int]] = []
        """When calls of this machine hung, from and until."""
        self.tasks: dict[asyncio.Task[Any], None] = {}

    @property
    def is_alive(self) -> bool:
        return self.died_at is None

    # The clock port.

    def now(self) -> int:
        return self.world.time.now() + self.skew_ms

    async def sleep(self, milliseconds: int) -> None:
        self.check()
        await asyncio.sleep(max(0, milliseconds) / 1000)
        self.check()

    # The `Blocking` port.

    async def __call__(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Make a store call: some time passes before it and after it, and faults strike at both moments."""
        self.check()
        world = self.world
        is_swap = call is swap
        verb, facts = (args[0], args[1:]) if is_swap else (call, args)
        store = getattr(verb, "__self__", None)
        point = Point(self, getattr(store, "name", "?"), getattr(verb, "__name__", "?"), facts)
        await asyncio.sleep(world.rng.randrange(1, SLOWEST_STEP_MS) / 1000)
        self.check()
        # What has no name is no store, but may use some: faults strike there.
        strikes = hasattr(store, "name")
        if world.strikes and strikes:
            for fault in world.faults:
                await fault.before(point)
            self.check()
        world.writer = self
        try:
            answer = call(*args, **kwargs)
        except Exception as error:
            world.record(self, f"{point.store}: {point.verb} -> {type(error).__name__}")
            raise
        finally:
            world.writer = None
        if is_swap and answer is not facts[0]:
            world.record(self, f"{point.store}: {point.verb} -> Stale")
            return answer
        world.record(self, point.store, point.verb, facts)
        if world.strikes and strikes:
            for fault in world.faults:
                await fault.after(point)
        await asyncio.sleep(world.rng.randrange(1, SLOWEST_STEP_MS) / 1000)
        self.check()
        return answer

    # Life and death.

    def check(self) -> None:
        """Raise Killed if this machine is dead."""
        if self.died_at is not None:
            raise Killed(self.name)

    def kill(self, why: str) -> None:
        """End everything it does."""
        if self.died_at is None:
            self.died_at = self.world.time.now()
            self.died_of = why
            self.world.record(self, f"DIES: {why}")
            self.world.on_death(self)
        for task in self.tasks:
            task.cancel()

    def spawn(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Begin something on this machine: what it begins in turn belongs to the machine as well."""
        context = copy_context()
        context.run(MACHINE.set, self)
        return asyncio.get_running_loop().create_task(work, name=name, context=context)

    async def ended(self) -> None:
        """Return when nothing of a dead machine is left."""
        while self.tasks:
            for task in self.tasks:
                task.cancel()
            await asyncio.wait(list(self.tasks))

    async def run_blocking(self, function: Callable[[], T]) -> T:
        """Run a function that blocks, in a thread that moves only while the loop waits for it."""
        thread = _Thread(function)
        while True:
            request = thread.next_request()
            if isinstance(request, _Done):
                return cast("T", request.value())
            try:
                answer: object = await self(request.call, *request.args, **request.named)
            except BaseException as error:  # noqa: BLE001 - what the call raised is raised in the thread
                if isinstance(error, asyncio.CancelledError):
                    error = Killed(self.name)
                thread.answer(None, error)
            else:
                thread.answer(answer, None)


MACHINE: ContextVar[Machine | None] = ContextVar("MACHINE", default=None)
"""The machine whose task is running."""


def task_factory(
    loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T], **options: Any
) -> asyncio.Task[T]:
    """Make tasks that their machine knows."""
    task = asyncio.Task(work, loop=loop, **options)
    context = options.get("context")
    machine = MACHINE.get() if context is None else context.get(MACHINE)
    if machine is not None:
        machine.tasks[task] = None
        task.add_done_callback(machine.tasks.pop)
    task.add_done_callback(_retrieve_exception)
    return task


def _retrieve_exception(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()


# Threads that take turns with the loop ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Request:
    call: Callable[..., Any]
    args: tuple[Any, ...]
    named: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Done:
    result: object
    error: BaseException | None

    def value(self) -> object:
        if self.error is not None:
            raise self.error
        return self.result


class _Thread:
    current = threading.local()

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._requests: SimpleQueue[_Request | _Done] = SimpleQueue()
        self._answers: SimpleQueue[_Done] = SimpleQueue()
        self._thread = threading.Thread(target=self._body, daemon=True)
        self._thread.start()

    def _body(self) -> None:
        _Thread.current.thread = self
        try:
            done = _Done(self._function(), None)
        except BaseException as error:  # noqa: BLE001 - raised again where the function was asked for
            done = _Done(None, error)
        self._requests.put(done)

    def next_request(self) -> _Request | _Done:
        request = self._requests.get()
        if isinstance(request, _Done):
            self._thread.join()
        return request

    def answer(self, result: object, error: BaseException | None) -> None:
        self._answers.put(_Done(result, error))

    def ask(self, call: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> object:
        self._requests.put(_Request(call, args, named))
        return self._answers.get().value()


class Through:
    """A store as a function that blocks sees it: each call waits until the scheduler makes it."""

    def __init__(self, store: object) -> None:
        self._store = store

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        call = getattr(self._store, verb)

        def ask(*args: Any, **named: Any) -> object:
            return _Thread.current.thread.ask(call, args, named)

        return ask


class OneByOne:
    """Replaces ThreadPoolExecutor inside functions: the order of calls must not depend on real threads."""

    def __init__(self, max_workers: int = 1) -> None:
        del max_workers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @staticmethod
    def submit(function: Callable[..., T], *args: Any) -> Future[T]:
        done: Future[T] = Future()
        try:
            done.set_result(function(*args))
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            done.set_exception(error)
        return done

    @staticmethod
    def map(function: Callable[..., T], *iterables: Any) -> list[T]:
        return [function(*each) for each in zip(*iterables, strict=True)]
