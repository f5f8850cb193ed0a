"""Functions of the emulator have the memory their `MemorySize` says, and not more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from scripts.local_stack.internals import Internals, expect

KIB: Final = 1024
MIB: Final = 1024 * KIB
LOOK_SECONDS: Final = 0.05
LOOK_SECONDS_WITHOUT_PROC: Final = 1.0
CHECKS_PER_CHECK_OF_CHILDREN: Final = 20
KILLED: Final = "Error: Runtime exited with error: signal: killed"


class Memory:
    """How much memory processes use, in bytes: on Linux with every peak, elsewhere what `ps` says at the moment."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self.has_proc = (proc / "self" / "status").exists()

    def used_by(self, pids: Iterable[int], *, with_children: bool = False) -> dict[int, int]:
        """Return what each process uses, and on demand its children with it."""
        if not self.has_proc:
            return _by_ps(pids)
        return {
            pid: sum(map(self._peak_of, (pid, *(self.children_of(pid) if with_children else ()))))
            for pid in pids
        }

    def children_of(self, pid: int) -> list[int]:
        """Return the processes a process started, and those they started."""
        found: list[int] = []
        with suppress(OSError, ValueError):
            for task in (self._proc / str(pid) / "task").iterdir():
                for child in (task / "children").read_text().split():
                    found += [int(child), *self.children_of(int(child))]
        return found

    def _peak_of(self, pid: int) -> int:
        """Return the most a process ever had resident; 0 when it has ended."""
        with suppress(OSError, ValueError, IndexError):
            for line in (self._proc / str(pid) / "status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * KIB
        return 0


def _by_ps(pids: Iterable[int]) -> dict[int, int]:
    wanted = ",".join(map(str, pids))
    if not wanted:
        return {}
    said = subprocess.run(
        ["ps", "-o", "pid=,rss=", "-p", wanted],  # noqa: S607 - where it is differs by system
        capture_output=True,
        text=True,
        check=False,
    )
    rows = (line.split() for line in said.stdout.splitlines())
    return {int(pid): int(rss) * KIB for pid, rss in rows}


def size_of(worker: Internals) -> int:
    """Return the memory of a worker's function in bytes."""
    return int(worker.config.get("MemorySize", 128)) * MIB


@dataclass
class Guard:
    """Ends processes that use more than their function has, and knows why they ended."""

    memory: Memory = field(default_factory=Memory)
    ended: dict[int, int] = field(default_factory=dict)
    """Pid -> bytes, of processes ended for their memory whose invocation has not been answered yet."""
    of_thread: threading.local = field(default_factory=threading.local)
    """`used`: bytes, of the invocation this thread ran last."""

    def look(self, workers: Iterable[Internals], *, with_children: bool) -> None:
        """End each worker's process that is above its size."""
        alive = {
            process.pid: worker
            for worker in workers
            if (process := worker._proc) is not None  # noqa: SLF001
            and process.poll() is None
            and process.pid not in self.ended
        }
        for pid, used in self.memory.used_by(alive, with_children=with_children).items():
            if used > size_of(alive[pid]):
                self.end(pid, used)

    def end(self, pid: int, used: int) -> None:
        """End a process and its children at once."""
        self.ended[pid] = used
        for each in (*self.memory.children_of(pid), pid):
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)

    def used_last(self, _func: Any) -> int:
        """Return the megabytes used by the invocation this thread ran last, for its REPORT line."""
        return int(getattr(self.of_thread, "used", 0)) // MIB

    def verdict(self, worker: Internals, request_id: str, log: str | None) -> dict[str, Any] | None:
        """Return the answer of an invocation whose process was ended, or is to be ended now; None for another."""
        process = worker._proc  # noqa: SLF001 - None when it has been ended or has failed
        size = size_of(worker)
        if process is not None and process.poll() is None:
            used = self.of_thread.used = self.memory.used_by([process.pid]).get(process.pid, 0)
            if used > size and process.pid not in self.ended:
                self.end(process.pid, used)
                worker._proc = None  # noqa: SLF001 - not for another invocation
        ended_at = self.ended.pop(worker.last_pid, None)
        if ended_at is None:
            return None
        self.of_thread.used = size  # Lambda, too, never shows more than there is
        said = f"RequestId: {request_id} {KILLED}"
        figures = f"Memory used: {ended_at // MIB} MB, memory size: {size // MIB} MB"
        return {
            "status": "error",
            "error": said,
            "log": "\n".join(filter(None, [log, figures])),
            "trace": f"{said}\nRuntime.ExitError",
        }


def limit_memory() -> None:
    """End a function's process that uses more than its `MemorySize`, as Lambda does: with SIGKILL, and without reuse.

    Lambda, Configure function memory: 128 to 10,240 MB. What it says of an ended one: errorType `Runtime.ExitError`,
    "RequestId: ... Error: Runtime exited with error: signal: killed" in answer and log (Lambda, Troubleshoot execution
    issues). The messages of an SQS batch become visible again when their visibility timeout ends.

    A thread reads the kernel's own peak (`VmHWM`) every 50 ms, and again at the end of each invocation:
    no peak is missed, however short, though one shorter than 50 ms is ended after the fact. Children count every
    second. Where there is no /proc (macOS), `ps` is asked once a second for the process alone: shorter peaks pass.
    What counts is the resident size, the Python interpreter included, as in Lambda's "Max Memory Used".
    """
    runtime: Internals = import_module("ministack.core.lambda_runtime")
    lambdas: Internals = import_module("ministack.services.lambda_svc")
    workers: dict[str, list[Internals]] = expect(runtime, "_workers")
    lock = expect(runtime, "_lock")
    worker_class = expect(runtime, "Worker")
    invoke = expect(worker_class, "invoke", "self", "event", "request_id")
    expect(lambdas, "_probe_peak_memory_mb", "func")
    guard = Guard()

    def invoke_within_memory(
        worker: Internals, event: Any, request_id: str, **more: Any
    ) -> dict[str, Any]:
        guard.of_thread.used = 0
        try:
            answer: dict[str, Any] = invoke(worker, event, request_id, **more)
        except Exception:  # its start failed, perhaps because it was ended
            if (killed := guard.verdict(worker, request_id, None)) is not None:
                return killed
            raise
        return guard.verdict(worker, request_id, answer.get("log")) or answer

    def keep_looking() -> None:
        looks = 0
        while True:
            time.sleep(LOOK_SECONDS if guard.memory.has_proc else LOOK_SECONDS_WITHOUT_PROC)
            looks += 1
            with lock:
                every = [worker for pool in workers.values() for worker in pool]
            try:
                guard.look(every, with_children=looks % CHECKS_PER_CHECK_OF_CHILDREN == 0)
            except Exception as error:  # noqa: BLE001 - as the emulator's own loops: the next look is the next try
                print(f"memory: {error}", file=sys.stderr)

    _remember_pids(worker_class)
    _name_the_error(lambdas)
    worker_class.invoke = invoke_within_memory
    lambdas._probe_peak_memory_mb = guard.used_last  # noqa: SLF001 - as released: the most any child ever used
    threading.Thread(target=keep_looking, name="memory", daemon=True).start()


def _remember_pids(worker_class: Internals) -> None:
    """Keep in `last_pid` which process a worker had last: it lets go of one that has ended."""

    def get(worker: Internals) -> Any:
        return worker.__dict__.get("_process")

    def put(worker: Internals, process: Any) -> None:
        worker.__dict__["_process"] = process
        if process is not None:
            worker.last_pid = process.pid

    worker_class.last_pid = None
    worker_class._proc = property(get, put)  # noqa: SLF001


def _name_the_error(lambdas: Internals) -> None:
    """Give an ended invocation Lambda's error type, which the emulator derives from the message."""
    warm = expect(lambdas, "_execute_function_warm", "func", "event", "request_id")

    def execute_and_name(func: Any, event: Any, request_id: str) -> dict[str, Any]:
        result: dict[str, Any] = warm(func, event, request_id)
        if result.get("error"):
            body: dict[str, Any] = result["body"]
            if str(body.get("errorMessage")).endswith(KILLED):
                body["errorType"] = "Runtime.ExitError"
        return result

    lambdas._execute_function_warm = execute_and_name  # noqa: SLF001
