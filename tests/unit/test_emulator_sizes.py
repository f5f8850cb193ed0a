"""How the local stack measures: processes, events, messages, and whether the emulator is the one it knows."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.local_stack.emulator_memory import MIB, Guard, Memory
from scripts.local_stack.emulator_sizes import (
    SYNCHRONOUS_BYTES,
    entry_bytes,
    fitting,
    message_bytes,
)
from scripts.local_stack.internals import expect

HOLDING = """
import sys
held = b"x" * (int(sys.argv[1]) << 20)
print("holds", flush=True)
sys.stdin.read()
"""
WITHOUT_PROC = Path("/nowhere")


@pytest.fixture
def holding() -> Iterator[Any]:
    """Starts a process that holds this many megabytes, and reports it."""
    started: list[subprocess.Popen[str]] = []

    def start(megabytes: int) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDING, str(megabytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert "holds\n" == process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def worker_of(process: subprocess.Popen[str], megabytes: int) -> Any:
    return SimpleNamespace(_proc=process, last_pid=process.pid, config={"MemorySize": megabytes})


@pytest.mark.parametrize("memory", [Memory(), Memory(WITHOUT_PROC)], ids=["/proc", "ps"])
def test_a_process_is_measured_with_what_it_holds(memory: Memory, holding: Any) -> None:
    process = holding(100)

    used = memory.used_by([process.pid])

    assert 100 * MIB < used[process.pid] < 160 * MIB


@pytest.mark.parametrize("memory", [Memory(), Memory(WITHOUT_PROC)], ids=["/proc", "ps"])
def test_a_process_that_has_ended_uses_nothing(memory: Memory, holding: Any) -> None:
    process = holding(1)
    process.kill()
    process.wait()

    assert 0 == memory.used_by([process.pid]).get(process.pid, 0)
    assert {} == memory.used_by([])


@pytest.mark.parametrize("memory", [Memory(), Memory(WITHOUT_PROC)], ids=["/proc", "ps"])
def test_only_what_is_above_its_size_is_ended(memory: Memory, holding: Any) -> None:
    large, small = holding(200), holding(20)
    above, within = worker_of(large, 128), worker_of(small, 128)
    guard = Guard(memory)

    guard.look([above, within], with_children=True)

    assert -9 == large.wait(10)
    assert small.poll() is None
    verdict = guard.verdict(above, "request-1", "a line")
    assert verdict is not None
    assert (
        "RequestId: request-1 Error: Runtime exited with error: signal: killed" == verdict["error"]
    )
    assert "MB, memory size: 128 MB" in verdict["log"]
    assert 128 == guard.used_last(None)
    assert guard.verdict(within, "request-2", None) is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="ps shows no peaks")
def test_a_peak_that_is_over_still_ends_the_process() -> None:
    spike = "held = b'x' * (200 << 20); del held; print('over', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", spike], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert "over\n" == process.stdout.readline()
        worker = worker_of(process, 128)

        verdict = Guard().verdict(worker, "request-1", None)

        assert verdict is not None
        assert vars(worker)["_proc"] is None, "not for another invocation"
        assert -9 == process.wait(10)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_children_are_found_with_theirs() -> None:
    deep = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    last = "import os; print(os.getpid(), flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", deep, last],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        grandchild = int(process.stdout.readline())

        assert [grandchild] == Memory().children_of(process.pid)
        assert grandchild in Memory().children_of(os.getpid())
        process.communicate("\n")


def test_an_event_takes_as_many_messages_as_stay_below_6_mb() -> None:
    large = "x" * (1024 * 1024)

    assert 5 == fitting([large] * 20, 50)
    assert 3 == fitting([large] * 20, 3)
    assert 50 == fitting(["small"] * 20, 50), "the number alone decides, and the window goes on"
    assert 1 == fitting(["x" * SYNCHRONOUS_BYTES] * 2, 50), "or it would never be taken"
    quoted = fitting(['"' * (1024 * 1024)] * 20, 50)
    assert 2 == quoted, "each quote is two characters in the event"


def test_a_message_counts_with_its_attributes() -> None:
    text = {"DataType": "String", "StringValue": "é"}
    binary = {"DataType": "Binary", "BinaryValue": "AAECAw=="}

    assert 0 == message_bytes({})
    assert 4 == message_bytes({"MessageBody": "éé"})
    assert 1 + 3 + 6 + 2 == message_bytes({"MessageBody": "x", "MessageAttributes": {"why": text}})
    assert 1 + 3 + 6 + 4 == message_bytes(
        {"MessageBody": "x", "MessageAttributes": {"raw": binary}}
    )


def test_an_entry_of_the_bus_counts_what_eventbridge_counts() -> None:
    entry = {"Source": "sluice", "DetailType": "Job", "Detail": json.dumps({"a": 1}), "Time": 0}

    assert 0 == entry_bytes({})
    assert 14 + 6 + 3 + 8 == entry_bytes(entry)
    assert 14 + 6 + 3 + 8 + 5 == entry_bytes({**entry, "Resources": ["arn:x"]})
    assert 14 + 6 + 3 + 8 == entry_bytes({**entry, "EventBusName": "default"}), "not the bus"


def test_an_emulator_that_looks_different_is_found_out() -> None:
    def handle(method: str, path: str) -> None:
        """As a service of it."""

    service = SimpleNamespace(__name__="service", handle=handle)

    assert handle is expect(service, "handle", "method")
    with pytest.raises(LookupError, match=r"service\.other is missing"):
        expect(service, "other")
    with pytest.raises(LookupError, match=r"service\.handle takes other arguments: method, path"):
        expect(service, "handle", "request")
