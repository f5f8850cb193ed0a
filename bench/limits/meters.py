"""What Sluice's workers spent during a run: processor time, limiter writes, receives, Lambda time.

Processor time is read from /proc for the emulator's worker processes, so Linux only. A process that has
answered a canary has imported everything and built the worker: what it had used when the clock started is
the price of the imports, and is taken off every process.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.local_stack import Ready

PROC = Path("/proc")
LOOK_EVERY_SECONDS = 1.0
QUIET_SECONDS = 15.0
"""How long the last invocations may take to end after the last job has."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What the workers spent between the first submission and the last answer."""

    cpu_seconds: float | None
    """Without imports; None where there is no /proc."""
    import_cpu_seconds: float | None
    """Of one worker process."""
    processes: int
    invocations: int
    lambda_gb_seconds: float
    receives: int | None
    """Messages handed to invocations; None when the workers do not say."""
    limiter_writes: int | None
    """Conditional writes of limit groups, lost races included; None when the workers do not say."""
    limiter_versions: int
    """Writes of limit groups that took effect, from the groups' own version numbers."""


class Meters:
    """Reads the meters of one local stack. `start` when the clock starts, `read` at the end."""

    def __init__(self, ready: Ready, function: str, queue: str) -> None:
        """Read those of the function that calls Claude, by its and its queue's logical ids."""
        self._ready = ready
        self._function = ready.resources[function]
        self._queue_url = ready.resources[queue]
        self._is_bulk = function == "RangesFunction"
        configuration = ready.client("lambda").get_function_configuration(
            FunctionName=self._function
        )
        self._memory_gb = configuration["MemorySize"] / 1024
        self._log_group = (
            configuration.get("LoggingConfig", {}).get("LogGroup")
            or f"/aws/lambda/{self._function}"
        )
        self._cpu = _ProcessTimes(self._function, ready.endpoint_url)
        self._began_at = 0.0
        self._versions = 0

    def start(self) -> None:
        """Begin a measurement."""
        self._versions = self._group_versions()
        self._cpu.start()
        self._began_at = time.time()

    def stop(self) -> None:
        """End the thread that watches processes."""
        self._cpu.stop()

    def read(self) -> Spent:
        """Wait until the last invocations have ended, and return what was spent since `start`."""
        self._wait_until_quiet()
        cpu_seconds, import_seconds, processes = self._cpu.read()
        found = list(invocations(self._log_events(), self._began_at))
        batches = [batch for each in found for batch in each.batches]
        return Spent(
            cpu_seconds=cpu_seconds,
            import_cpu_seconds=import_seconds,
            processes=processes,
            invocations=len(found),
            lambda_gb_seconds=sum(each.seconds for each in found) * self._memory_gb,
            # A message is a range there, and an invocation runs one.
            receives=len(found) if self._is_bulk else _total(batches, "messages"),
            limiter_writes=_total(batches, "limiter_writes"),
            limiter_versions=self._group_versions() - self._versions,
        )

    def _wait_until_quiet(self) -> None:
        sqs, queue_url = self._ready.client("sqs"), self._queue_url
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        until = time.monotonic() + QUIET_SECONDS
        while time.monotonic() < until:
            found = sqs.get_queue_attributes(QueueUrl=queue_url, AttributeNames=names)
            if not any(int(found["Attributes"][name]) for name in names):
                return
            time.sleep(0.2)

    def _log_events(self) -> Iterator[Mapping[str, Any]]:
        pages = self._ready.client("logs").get_paginator("filter_log_events")
        for page in pages.paginate(
            logGroupName=self._log_group, startTime=int(self._began_at * 1000)
        ):
            yield from page["events"]

    def _group_versions(self) -> int:
        pages = self._ready.client("dynamodb").get_paginator("scan")
        return sum(
            int(item["version"]["N"])
            for page in pages.paginate(TableName=self._ready.resources["LimitsTable"])
            for item in page["Items"]
            if item["id"]["S"].startswith("group#")
        )


@dataclass(frozen=True, slots=True)
class Invocation:
    """One invocation as the log has it."""

    seconds: float
    batches: tuple[Mapping[str, Any], ...]
    """The facts the worker noted at its end."""


def invocations(events: Iterable[Mapping[str, Any]], began_at: float) -> Iterator[Invocation]:
    """Yield the invocations that began after that time; each ends with Lambda's REPORT line."""
    notes: dict[str, list[Mapping[str, Any]]] = {}
    for event in events:
        stream, message = event["logStreamName"], event["message"]
        if message.startswith("START "):
            notes[stream] = []
        elif message.startswith("REPORT "):
            seconds = _duration_seconds(message)
            batches = notes.pop(stream, [])
            if event["timestamp"] / 1000 - seconds >= began_at - 1:
                yield Invocation(seconds, tuple(batches))
        elif '"batch done"' in message:
            with suppress(ValueError):
                notes.setdefault(stream, []).append(json.loads(message))


def _duration_seconds(report: str) -> float:
    """Return the duration in a line like `REPORT RequestId: x<tab>Duration: 12 ms<tab>...`."""
    for part in report.split("\t"):
        name, _, value = part.partition(": ")
        if name == "Duration":
            return float(value.removesuffix(" ms")) / 1000
    return 0.0


def _total(batches: Iterable[Mapping[str, Any]], fact: str) -> int | None:
    numbers = [int(batch[fact]) for batch in batches if fact in batch]
    return sum(numbers) if numbers else None


class _ProcessTimes:
    """The processor time of the emulator's processes of one function."""

    def __init__(self, function: str, endpoint_url: str) -> None:
        self._marks = (
            f"AWS_LAMBDA_FUNCTION_NAME={function}".encode(),
            f"AWS_ENDPOINT_URL={endpoint_url}".encode(),
        )
        self._before: dict[int, float] = {}
        self._now: dict[int, float] = {}
        self._others: set[int] = set()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="process-times")

    def start(self) -> None:
        self._look()
        self._before = dict(self._now)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def read(self) -> tuple[float | None, float | None, int]:
        """Return the processor seconds without imports, those of one process's imports, processes."""
        self.stop()
        self._look()
        if not self._before:
            return None, None, len(self._now)
        imports = sum(self._before.values()) / len(self._before)
        spent = sum(
            max(0.0, seconds - self._before.get(process, imports))
            for process, seconds in self._now.items()
        )
        return spent, imports, len(self._now)

    def _run(self) -> None:
        # A process that ends takes its time with it, so what it had used is noted while it lives.
        while not self._stopping.wait(LOOK_EVERY_SECONDS):
            self._look()

    def _look(self) -> None:
        if not PROC.is_dir():
            return
        alive = {int(each.name) for each in PROC.iterdir() if each.name.isdigit()}
        for process in alive - self._others:
            with suppress(OSError, ValueError):
                if process not in self._now and not self._is_ours(process):
                    self._others.add(process)
                    continue
                self._now[process] = cpu_seconds((PROC / str(process) / "stat").read_text())
        self._others &= alive

    def _is_ours(self, process: int) -> bool:
        environment = (PROC / str(process) / "environ").read_bytes().split(b"\0")
        return all(mark in environment for mark in self._marks)


def cpu_seconds(stat: str, ticks_per_second: Callable[[], int] | None = None) -> float:
    """Return the user and system time in a line of /proc/PID/stat."""
    # The name in brackets may hold blanks; what follows the last bracket does not.
    fields = stat.rpartition(")")[2].split()
    ticks = ticks_per_second() if ticks_per_second else os.sysconf("SC_CLK_TCK")
    return (int(fields[11]) + int(fields[12])) / ticks
