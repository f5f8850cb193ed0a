"""One scenario with one client: empty books, full buckets, the clock, the score."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import httpx

from bench.limits.doors import DOORS, REFILL_SECONDS, RunFailed, end_processes
from bench.limits.ideal import ideal_seconds
from bench.limits.meters import Meters, Spent
from bench.limits.scenarios import Need, Scenario, need
from bench.limits.scoring import (
    Calls,
    calls_of,
    need_of,
    per_second,
    rows_of,
    score,
    seconds_until_followed,
    taken_by,
)
from scripts.claude_simulator import params_hash
from scripts.local_stack import LocalStack, StackError
from scripts.local_stack.emulator import Child, clean_environment

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parents[2]
LITELLM_PYTHON = ROOT / ".venv-litellm" / "bin" / "python"
START_SECONDS = 120.0
WARM_UP_JOBS = 4
"""Warm-up requests per organization, so that all limits are learned."""
OTHER_SEED = 1_000_003
IN_FLIGHT = {"sdk": 32, "tutorial": 20, "litellm": 32}
STRANGER = "sdk"
CLIENTS = ("sluice", "sdk", "tutorial", "litellm")


class StartFrom(StrEnum):
    """The state of Sluice's functions when the clock starts."""

    WARM = "warm"
    """Each function on the path has answered within the last minute, and the limits are known."""
    COLD = "cold"
    """All their processes have ended; nothing has run on this stack."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a run is made; for clients other than Sluice only the seed counts."""

    seed: int
    workers: int
    door: str = "jobs"
    start: StartFrom = StartFrom.WARM


@dataclass(frozen=True, slots=True)
class Done:
    """What a client reports about itself."""

    began_at: float
    ended_at: float
    done: int
    notes: tuple[str, ...] = ()
    spent: Spent | None = None
    client_cpu_seconds: float | None = None
    workers: int | None = None
    door: str | None = None
    start: StartFrom | None = None


@dataclass(frozen=True, slots=True)
class Followed:
    """How a client adapted to a changed limit."""

    requests_per_minute: int
    seconds: float | None
    """Until the admitted rate was within 10 % of the new limit; None if it never was."""


@dataclass(frozen=True, slots=True)
class Run:
    """One row of the table."""

    scenario: str
    client: str
    jobs: int
    done: int
    seconds: float
    ideal_seconds: float
    """Of this client's work with all of the buckets for it."""
    ideal_seconds_left: float
    """The same with what a stranger left; without a stranger no different."""
    calls: Calls
    starts_per_second: list[int]
    followed: list[Followed] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    spent: Spent | None = None
    client_cpu_seconds: float | None = None
    workers: int | None = None
    """Sluice's concurrent ones; other clients have none."""
    door: str | None = None
    """The API of Sluice that received the work; other clients have none."""
    start: StartFrom | None = None

    @property
    def label(self) -> str:
        """The client's name, with its API and workers."""
        return (
            self.client
            if self.workers is None
            else f"{self.client} {self.door}, {self.workers} workers"
        )

    @property
    def lost(self) -> int:
        """Jobs that did not succeed."""
        return self.jobs - self.done

    @property
    def score(self) -> float:
        """Share of the jobs done x ideal time / time taken, of the capacity left to this client."""
        return score(self.jobs, self.done, self.ideal_seconds_left, self.seconds)

    @property
    def score_alone(self) -> float:
        """The same without a deduction for the stranger."""
        return score(self.jobs, self.done, self.ideal_seconds, self.seconds)


@dataclass(frozen=True, slots=True)
class Task:
    """A scenario's work for one client, and its timeout."""

    scenario: Scenario
    requests: list[Json]
    warm_up_requests: list[Json]
    """Run before the clock starts, and not counted."""
    needs: Need
    stranger_requests: list[Json]
    hard_seconds: float

    @classmethod
    def of(cls, scenario: Scenario, seed: int) -> Self:
        """Return the work of a scenario."""
        requests = scenario.requests(seed)
        strangers = scenario.requests(seed, stranger=True)
        needs = need(scenario, requests, seed)
        whole = needs + need(scenario, strangers, seed)
        hard_seconds = 4 * ideal_seconds(scenario, whole) + 60
        warm_up = replace(scenario, jobs=WARM_UP_JOBS * len(scenario.organisations))
        return cls(
            scenario,
            requests,
            warm_up.requests(seed + OTHER_SEED),
            needs,
            strangers,
            hard_seconds,
        )


def is_available(client: str) -> bool:
    """Return whether this client can be run here."""
    return client != "litellm" or LITELLM_PYTHON.exists()


def run(scenario: Scenario, client: str, settings: Settings) -> Run:
    """Run one scenario with one client. Raises `StackError` or `RunFailed`."""
    task = Task.of(scenario, settings.seed)
    with ExitStack() as cleanup:
        upstream = cleanup.enter_context(_upstream(scenario, settings.seed))
        start = _Start(upstream, task, cleanup)
        if client == "sluice":
            done = _sluice(task, upstream.url, start, settings)
        else:
            done = _direct(task, upstream.url, client, start)
        start.stop()
        return _scored(task, client, done, upstream)


def _scored(task: Task, client: str, done: Done, upstream: Upstream) -> Run:
    scenario = task.scenario
    rows = [row for row in upstream.ledger() if row["at"] >= done.began_at]
    own = rows_of(rows, [each.key for each in scenario.organisations])
    others = rows_of(rows, [each.stranger_key for each in scenario.organisations])
    starts = upstream.starts()
    calls = calls_of(own, [params_hash(params) for params in task.requests])
    needs = need_of(own, scenario.jobs) if calls.foreign_bodies else task.needs
    turns = [change.after_seconds for change in scenario.changes]
    return Run(
        scenario=scenario.name,
        client=client,
        jobs=scenario.jobs,
        done=done.done,
        seconds=done.ended_at - done.began_at,
        ideal_seconds=ideal_seconds(scenario, needs),
        ideal_seconds_left=ideal_seconds(scenario, needs, taken_by(others, done.began_at)),
        calls=calls,
        starts_per_second=per_second(starts, done.began_at),
        followed=[
            Followed(
                change.requests_per_minute,
                seconds_until_followed(
                    starts,
                    done.began_at + change.after_seconds,
                    change.requests_per_minute / 60,
                    done.began_at + until if until is not None else max(starts, default=0.0),
                ),
            )
            for change, until in zip(scenario.changes, [*turns[1:], None], strict=False)
        ],
        notes=done.notes,
        spent=done.spent,
        client_cpu_seconds=done.client_cpu_seconds,
        workers=done.workers,
        door=done.door,
        start=done.start,
    )


# ---------------------------------------------------------------- upstream


class Upstream:
    """A simulator of one run."""

    def __init__(self, url: str, http: httpx.Client) -> None:
        self.url = url
        self._http = http

    def configure(self, patch: Json) -> None:
        """Change its configuration."""
        self._http.post("/config", json=patch).raise_for_status()

    def ledger(self) -> list[Json]:
        """Return every call that has ended."""
        text = self._http.get("/ledger").raise_for_status().text
        return [json.loads(line) for line in text.splitlines()]

    def starts(self) -> list[float]:
        """Return when calls were admitted, in all organizations, in order of time."""
        stats = self._http.get("/stats", params={"starts": 1}).raise_for_status().json()
        return sorted(
            start
            for organisation in stats["organisations"].values()
            for group in organisation["model_groups"].values()
            for start in group["starts"]
        )


@contextmanager
def _upstream(scenario: Scenario, seed: int) -> Iterator[Upstream]:
    with ExitStack() as cleanup:
        folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="sluice-bench-"))
        config = Path(folder) / "simulator.json"
        config.write_text(json.dumps(scenario.simulator(seed)), encoding="utf-8")
        child = Child(
            *("scripts.claude_simulator", "--port", "0", "--config", str(config)),
            environment=clean_environment(),
            stdout=subprocess.PIPE,
        )
        cleanup.callback(child.kill)
        lines = _Lines(child.process)
        try:
            url = str(json.loads(lines.next(START_SECONDS))["url"])
        except (ValueError, KeyError):
            raise StackError(f"the simulator did not start: {child.last_words()}") from None
        http = httpx.Client(base_url=f"{url}/_simulator", timeout=60, trust_env=False)
        yield Upstream(url, cleanup.enter_context(http))


class _Start:
    """What starts with the clock: the stranger, and the changes of the upstream during the run."""

    def __init__(self, upstream: Upstream, task: Task, cleanup: ExitStack) -> None:
        self._upstream = upstream
        self._events = task.scenario.events()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="midway")
        cleanup.callback(self.stop)
        self._stranger: _Process | None = None
        if task.stranger_requests:
            first = task.scenario.organisations[0]
            self._stranger = _Process(
                sys.executable,
                "bench.limits.direct",
                _work(task, upstream.url, STRANGER, task.stranger_requests, [first.stranger_key]),
            )
            cleanup.callback(self._stranger.kill)
            self._stranger.wait_until_ready()

    def now(self) -> None:
        """Start the clock."""
        if self._stranger is not None:
            self._stranger.go()
        self._thread.start()

    def stop(self) -> None:
        """Stop all of it."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        began = time.monotonic()
        for after_seconds, patch in self._events:
            if self._stopping.wait(max(0.0, began + after_seconds - time.monotonic())):
                return
            self._upstream.configure(patch)


# ---------------------------------------------------------------- Sluice


def _sluice(task: Task, claude_url: str, start: _Start, settings: Settings) -> Done:
    pool = {
        "keys": [
            {"id": organisation.id, "api_key": organisation.key, "base_url": claude_url}
            for organisation in task.scenario.organisations
        ]
    }
    workers = settings.workers
    stack = LocalStack(key_pool=pool, tenant="bench", concurrency=workers, bulk_concurrency=workers)
    with stack.running() as ready, closing(DOORS[settings.door](ready)) as door:
        if settings.start is StartFrom.WARM:
            door.warm_up(task.warm_up_requests, workers)
            time.sleep(REFILL_SECONDS)
        else:
            end_processes(ready, door.functions)
        meters = Meters(ready, door.functions[0], door.queue)
        meters.start()
        try:
            start.now()
            began_at = time.time()
            outcome = door.work(task.requests, began_at + task.hard_seconds)
            spent = meters.read()
        finally:
            meters.stop()
    return Done(
        began_at=began_at,
        ended_at=outcome.ended_at,
        done=outcome.done,
        notes=outcome.notes,
        spent=spent,
        workers=workers,
        door=settings.door,
        start=settings.start,
    )


# ---------------------------------------------------------------- clients that call Claude themselves


def _direct(task: Task, claude_url: str, client: str, start: _Start) -> Done:
    python, module = sys.executable, "bench.limits.direct"
    if client == "litellm":
        python, module = str(LITELLM_PYTHON), "bench.limits.with_litellm"
    keys = [organisation.key for organisation in task.scenario.organisations]
    process = _Process(python, module, _work(task, claude_url, client, task.requests, keys))
    try:
        process.wait_until_ready()
        process.go()
        start.now()
        said = process.result(task.hard_seconds + 30)
    finally:
        process.kill()
    notes = [f"{name} {count}" for name, count in sorted(said["lost_by"].items())]
    if said["unfinished"]:
        notes.append(f"{said['unfinished']} unfinished after {task.hard_seconds:.0f} s")
    return Done(
        began_at=said["began_at"],
        ended_at=said["ended_at"],
        done=said["done"],
        notes=tuple(notes),
        client_cpu_seconds=said["cpu_seconds"],
    )


def _work(
    task: Task, url: str, client: str, requests: Sequence[Json], keys: Sequence[str]
) -> Mapping[str, Any]:
    return {
        "client": client,
        "url": url,
        "keys": keys,
        "jobs": requests,
        "in_flight": IN_FLIGHT[client],
        "hard_seconds": task.hard_seconds,
    }


class _Process:
    """A client in a process of its own; it ends when we do (child.py)."""

    def __init__(self, python: str, module: str, work: Mapping[str, Any]) -> None:
        self._name = work["client"]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by kill()
        self._process = subprocess.Popen(
            [python, "-m", module],
            cwd=ROOT,
            env=clean_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )
        self._lines = _Lines(self._process)
        self._write(json.dumps(work))

    def wait_until_ready(self) -> None:
        """Wait until everything is imported."""
        self._next(START_SECONDS)

    def go(self) -> None:
        """Start its clock."""
        self._write("go")

    def result(self, seconds: float) -> Json:
        """Return its final report."""
        return self._next(seconds)

    def kill(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                pipe.close()

    def _write(self, line: str) -> None:
        if self._process.stdin is not None:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    def _next(self, seconds: float) -> Json:
        line = self._lines.next(seconds)
        try:
            said: Json = json.loads(line)
        except ValueError:
            self._errors.seek(0)
            words = self._errors.read().decode(errors="replace").strip().splitlines()
            last = words[-1] if words else "it said nothing"
            raise RunFailed(f"the {self._name} client failed: {last}") from None
        return said


class _Lines:
    """The lines of a process, read by a thread, because reading a pipe has no timeout."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._queue: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read, args=(process,), daemon=True).start()

    def next(self, seconds: float) -> bytes:
        """Return the next line, empty when none comes."""
        try:
            return self._queue.get(timeout=seconds)
        except queue.Empty:
            return b""

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        if process.stdout is not None:
            for line in process.stdout:
                self._queue.put(line)
        self._queue.put(b"")
