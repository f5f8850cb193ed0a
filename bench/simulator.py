"""How many calls a second the simulator answers on one core: `python -m bench.simulator`.

It starts the simulator as its own process, sends unique Messages requests over kept connections,
and prints a table. The last column divides by the processor time the simulator used, so it holds
on a busy machine too. The run ends after so many requests or so many seconds, whichever is first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import uvloop

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-ant-test-bench"


@dataclass(frozen=True, slots=True)
class Round:
    """One kind of load: what each request adds to the plain one, and the simulator's own flags."""

    name: str
    extra: dict[str, Any]
    flags: tuple[str, ...]


ROUNDS = (
    Round("JSON, answered at once", {}, ("--fast",)),
    Round("events, answered at once", {"stream": True}, ("--fast",)),
    Round("JSON, 0.2 s to the first token", {}, ("--ttft", "0.2", "--tokens-per-second", "0")),
    Round("JSON, refused by the limit (429)", {}, ("--fast", "--rpm", "60")),
)


class Client(asyncio.Protocol):
    """One kept connection: sends a request, reads the whole answer, sends the next."""

    def __init__(
        self, bodies: Iterator[bytes], head: bytes, finished: asyncio.Event, until: float
    ) -> None:
        self._bodies = bodies
        self._head = head
        self._finished = finished
        self._until = until
        self._received = b""
        self._transport: asyncio.Transport
        self.answered: dict[int, int] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by class
        self._next()

    def _next(self) -> None:
        body = next(self._bodies, None) if time.monotonic() < self._until else None
        if body is None:
            self._transport.close()
            return
        self._transport.write(self._head + b"%d\r\n\r\n" % len(body) + body)

    def data_received(self, data: bytes) -> None:
        """Take the answer; once it is whole, count it."""
        self._received += data
        head_end = self._received.find(b"\r\n\r\n")
        if head_end < 0:
            return
        head = self._received[:head_end].lower()
        length_at = head.find(b"content-length: ")
        if length_at < 0:  # events come in chunks, and end with an empty one
            whole = self._received.endswith(b"\r\n0\r\n\r\n")
        else:
            length = int(head[length_at + 16 :].split(b"\r\n", 1)[0])
            whole = len(self._received) >= head_end + 4 + length
        if whole:
            status = int(head[9:12])
            self.answered[status] = self.answered.get(status, 0) + 1
            self._received = b""
            self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        """Say that this connection is done."""
        del exc
        self._finished.set()


async def load(
    url: str, kind: Round, requests: int, seconds: float, connections: int
) -> dict[int, int]:
    """Send the load and return the answers by status."""
    host, _, port = url.removeprefix("http://").partition(":")
    head = (
        f"POST /v1/messages HTTP/1.1\r\nhost: {host}:{port}\r\nx-api-key: {KEY}\r\n"
        "anthropic-version: 2026-10-21\r\ncontent-type: application/json\r\ncontent-length: "
    ).encode()
    text = "Summarize in one sentence what a lock keeper does all day. " * 8
    bodies = (
        json.dumps(
            {
                "model": "claude-opus-5",
                "max_tokens": 300,
                "messages": [{"role": "user", "content": f"{number} {text}"}],
                **kind.extra,
            }
        ).encode()
        for number in range(requests)
    )
    until = time.monotonic() + seconds
    clients: list[Client] = []
    ends: list[asyncio.Event] = []
    loop = asyncio.get_running_loop()
    for _ in range(connections):
        finished = asyncio.Event()
        _, client = await loop.create_connection(
            partial(Client, bodies, head, finished, until),
            host,
            int(port),
        )
        clients.append(client)
        ends.append(finished)
    async with asyncio.timeout(seconds + 30):
        for end in ends:
            await end.wait()
    totals: dict[int, int] = {}
    for client in clients:
        for status, count in client.answered.items():
            totals[status] = totals.get(status, 0) + count
    return totals


def cpu_seconds(url: str) -> float:
    """Return the processor time the simulator has used."""
    with urllib.request.urlopen(f"{url}/_simulator/stats", timeout=10) as reply:  # noqa: S310
        return float(json.load(reply)["process_cpu_seconds"])


def measure(kind: Round, requests: int, seconds: float, connections: int) -> tuple[str, ...]:
    """Run one round against a simulator of its own and return a row of the table."""
    limits = () if "--rpm" in kind.flags else ("--rpm", "0")
    command = [sys.executable, "-m", "scripts.claude_simulator", "--port", "0", "--keys", KEY]
    command += [*kind.flags, *limits, "--itpm", "0", "--otpm", "100000000"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            url = json.loads(server.stdout.readline() if server.stdout else "")["url"]
            before, started = cpu_seconds(url), time.monotonic()
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                answers = runner.run(load(url, kind, requests, seconds, connections))
            took, used = time.monotonic() - started, cpu_seconds(url) - before
        finally:
            server.terminate()
    total = sum(answers.values())
    statuses = " ".join(f"{status}:{count}" for status, count in sorted(answers.items()))
    return (
        kind.name,
        statuses,
        f"{took:.1f}",
        f"{total / took:,.0f}",
        f"{used:.1f}",
        f"{total / used:,.0f}",
    )


def parser() -> argparse.ArgumentParser:
    """Return what the command line may name."""
    about = "Requests a second of the simulator on one core."
    made = argparse.ArgumentParser(prog="python -m bench.simulator", description=about)
    made.add_argument("--requests", type=int, default=10_000, help="requests a round (10000)")
    made.add_argument("--seconds", type=float, default=15, help="seconds a round (15)")
    made.add_argument("--connections", type=int, default=200, help="kept connections (200)")
    return made


def main() -> None:
    """Measure every round and print the table."""
    chosen = parser().parse_args()
    heads = ("load", "answers", "seconds", "requests/s", "CPU s", "requests/CPU s")
    rows: list[tuple[str, ...]] = [heads]
    rows += [measure(kind, chosen.requests, chosen.seconds, chosen.connections) for kind in ROUNDS]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


if __name__ == "__main__":
    main()
