"""`make chaos`: the real local stack, 2,000 jobs, and everything that can be broken from outside.

While jobs flow, worker processes are killed with SIGKILL in the middle of their batches, the Claude simulator is
restarted, DynamoDB throttles and loses replies. Then, with no governor to help, Claude is overloaded for every call
until the jobs of that time were received more than a hundred times each. At the end the books of both sides are
compared.

The exit code is 0 when nothing was lost, nothing billed twice without a cause, no dead letter came, and every job of a
killed worker went on within the bound. `--small` shows in a minute that everything works: it kills no worker, because
the jobs of a killed worker become available again only after its lease of two minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from botocore.exceptions import BotoCoreError, ClientError
from rich.console import Console

from bench.chaos.verdict import (
    Deliveries,
    Found,
    Kill,
    Size,
    Take,
    billed_twice,
    killed_calls,
    kills_table,
    not_as_promised,
    recovery,
    table,
)
from scripts.cli.client import Gateway, Json
from scripts.cli.submission import read_jobs, send
from scripts.local_stack import LocalStack, Ready, StackError
from scripts.local_stack.deploy import read_template
from scripts.local_stack.emulator import Child, call, clean_environment, free_port
from sluice.adapters import job_records
from sluice.domain.jobs import Job
from sluice.domain.waits import Waits

REPOSITORY: Final = Path(__file__).resolve().parents[2]
KEY: Final = "sk-ant-test-chaos"
MODEL: Final = "claude-haiku-5-5"
RPM: Final = 1_200
TURNS: Final = 30
"""While jobs are submitted, something may be broken in each of this many turns."""

LIST: Final = 50
"""Most jobs in one submit."""

FEWEST_LISTS: Final = 8
OUTAGE_SECONDS: Final = 1_800
MAX_ATTEMPTS: Final = 20
"""More than the deployment's 5: killing at this rate takes several attempts from some jobs."""

WAITS: Final = Waits(
    hold_ms=1_000,
    linger_ms=0,
    rest_ms=0,
    breaker_pause_ms=300,
    breaker_pause_cap_ms=300,
    overload_base_ms=300,
    overload_cap_ms=300,
)
"""So that an outage's hundred deliveries take minutes and not hours."""

MIDWAY_SECONDS: Final = 1.0
"""A batch this old is in the middle of its work."""

EVERY: Final = {
    "throttle": (5, 0),
    "mend": (5, 2),
    "restart": (8, 4),
    "govern": (12, 0),
    "say": (4, 0),
}
"""In which turns what is done: `(5, 2)` is in the second of every five."""

SMALL: Final = Size(jobs=40, seconds=12, outage_jobs=5, outage_receives=3, kills=False)


@dataclass(slots=True)
class Damage:
    """What was done to the stack."""

    kills: list[Kill] = field(default_factory=list)
    restarts: int = 0
    throttled_seconds: float = 0
    outage_seconds: float = 0
    outage_receives: int = 0


class Simulator:
    """Claude, on one port for the whole run, however often it is restarted."""

    def __init__(self) -> None:
        self._port = free_port(0)
        self.url = f"http://127.0.0.1:{self._port}"
        self._books: list[Json] = []
        self._child = self._started()

    def _started(self) -> Child:
        child = Child(
            "scripts.claude_simulator",
            *("--port", str(self._port), "--rpm", str(RPM), "--keys", KEY),
            *("--ttft", "2", "--tokens-per-second", "0", "--output-tokens", "30"),
            environment=clean_environment(),
        )
        for _ in range(400):
            with suppress(OSError):
                call("GET", f"{self.url}/_simulator/stats")
                return child
            time.sleep(0.05)
        raise RuntimeError(f"the simulator does not start: {child.last_words()}")

    def restart(self) -> None:
        """Kill it with the calls it is serving, and start another one. Interrupted calls are not billed."""
        self._books += self._read()
        self._child.kill()
        self._child = self._started()

    def fail(self, share: float) -> None:
        """Answer 529 to a share of all calls."""
        call("POST", f"{self.url}/_simulator/config", {"faults": {"529": share}})

    def books(self) -> list[Json]:
        """Return every call that ended, also those before a restart."""
        return self._books + self._read()

    def _read(self) -> list[Json]:
        import httpx  # noqa: PLC0415 - only here

        text = httpx.get(f"{self.url}/_simulator/ledger", trust_env=False).text
        return [json.loads(line) for line in text.splitlines()]

    def stop(self) -> None:
        """End it."""
        self._child.kill()


@dataclass(slots=True)
class Hands:
    """The jobs that one worker process holds."""

    since: float
    job_ids: set[str] = field(default_factory=set)
    hidden: bool = False
    """It has shortened its messages' visibility timeout, which is the first that a worker does with them."""


class Notes:
    """What the workers report about the jobs they hold."""

    def __init__(self, file: Path) -> None:
        self._file = file
        file.touch()
        self._read = 0
        self.hands: dict[int, Hands] = {}
        """By process, for those that have started an invocation and not ended it."""
        self.receives: Counter[str] = Counter()
        self.deliveries: dict[str, Deliveries] = defaultdict(Deliveries)
        """By job."""
        self.most_held = 0

    def look(self) -> None:
        """Read what is new."""
        text = self._file.read_text()
        end = text.rfind("\n") + 1
        for line in text[self._read : end].splitlines():
            note = json.loads(line)
            if "over" in note:
                self.hands.pop(note["pid"], None)
                continue
            hands = self.hands.setdefault(note["pid"], Hands(note["at"]))
            hands.job_ids.difference_update(note.get("leaves", ()))
            hands.hidden |= note.get("hides", False)
            for job_id, count in note.get("takes", {}).items():
                hands.job_ids.add(job_id)
                self.receives[job_id] = max(count, self.receives[job_id])
                self.deliveries[job_id].taken.append(Take(note["at"], count))
            for job_id in note.get("leaves", ()):
                self.deliveries[job_id].returned.append(note["at"])
            self.most_held = max(self.most_held, len(hands.job_ids))
        self._read = end


class Run:
    """The whole of it."""

    def __init__(self, ready: Ready, simulator: Simulator, folder: Path, size: Size) -> None:
        self._ready = ready
        self._simulator = simulator
        self._faults = folder / "dynamodb.json"
        self.notes = Notes(folder / "notes.jsonl")
        self._size = size
        self._random = random.Random(1)  # noqa: S311 - chaos
        self.accepted: dict[str, str] = {}
        """Job ids and the names they were submitted under."""
        self.damage = Damage()

    # Load --------------------------------------------------------------------------------------------------

    def submit(self, names: Sequence[str]) -> None:
        """Submit jobs, as patiently as any client; the gateway may refuse for a while."""
        lines = [
            json.dumps(
                {
                    "custom_id": name,
                    "params": {
                        "model": MODEL,
                        "max_tokens": 64,
                        "metadata": {"user_id": name},
                        "messages": [{"role": "user", "content": f"Number {name}, please."}],
                    },
                }
            ).encode()
            for name in names
        ]
        with Gateway(self._ready.api_url, self._ready.client_key) as gateway:
            for _ in range(20):
                # The same list under the same key: what a failed POST has stored already is found, and not made twice.
                outcome = send(gateway, read_jobs(lines, {}), f"chaos-{names[0]}")
                self.accepted |= {job.job_id: str(job.custom_id) for job in outcome.accepted}
                if len(outcome.accepted) == len(names):
                    return
                time.sleep(1)
        say(f"{len(names) - len(outcome.accepted)} jobs were not accepted")

    # Damage ------------------------------------------------------------------------------------------------

    def kill_one(self) -> None:
        """Kill a worker that is in the middle of a batch."""
        now = time.time()
        busy = [
            pid
            for pid, hands in self.notes.hands.items()
            if hands.job_ids and hands.hidden and now - hands.since > MIDWAY_SECONDS
        ]
        if not busy:
            return
        pid = self._random.choice(busy)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            # Once more, for what it said last.
            self.notes.look()
            hands = self.notes.hands.pop(pid, Hands(now))
            self.damage.kills.append(Kill(time.time(), sorted(hands.job_ids)))

    def throttle(self, refuse: float, lose_reply: float) -> None:
        """Let DynamoDB refuse a share of all calls, and lose the reply of another."""
        self._faults.write_text(json.dumps({"refuse": refuse, "lose_reply": lose_reply}))

    def flow(self, names: Sequence[str]) -> None:
        """Let jobs flow while everything breaks; return when all have ended, the last of them in peace."""
        most = max(1, min(LIST, len(names) // FEWEST_LISTS))
        pause = self._size.seconds * most / len(names)

        def load() -> None:
            for start in range(0, len(names), most):
                self.submit(names[start : start + most])
                time.sleep(pause)

        loader = threading.Thread(target=load)
        loader.start()
        began = time.monotonic()
        turn, throttled_at = 0, None
        while loader.is_alive():
            turn += 1
            time.sleep(max(0.0, began + turn * self._size.seconds / TURNS - time.monotonic()))
            self.notes.look()
            if self._size.kills:
                self.kill_one()
            if _is_turn("throttle", turn):
                self.throttle(0.5, 0.05)
                throttled_at = time.monotonic()
            if _is_turn("mend", turn) and throttled_at is not None:
                self.throttle(0, 0.02)
                self.damage.throttled_seconds += time.monotonic() - throttled_at
            if _is_turn("restart", turn):
                self._simulator.restart()
                self.damage.restarts += 1
            if _is_turn("govern", turn):
                self.govern()
            if _is_turn("say", turn):
                say(f"{time.monotonic() - began:4.0f} s: {self._progress()}")
        loader.join()
        self.throttle(0, 0)
        self.wait_until_all_ended(began)

    def outage(self, names: Sequence[str]) -> None:
        """Overload Claude for every call until each job was received often, then mend it."""
        self._simulator.fail(1.0)
        began = time.monotonic()
        self.submit(names)
        ours = [job_id for job_id, name in self.accepted.items() if name in set(names)]
        while True:
            time.sleep(2)
            self.notes.look()
            least = min(self.notes.receives[job_id] for job_id in ours)
            if least >= self._size.outage_receives or time.monotonic() - began > OUTAGE_SECONDS:
                break
            if int(time.monotonic() - began) % 20 in {0, 1}:
                say(f"{time.monotonic() - began:4.0f} s of 529s: received {least} times at least")
        self.damage.outage_receives = least
        self.damage.outage_seconds = time.monotonic() - began
        self._simulator.fail(0.0)
        self.wait_until_all_ended(began)

    def govern(self) -> None:
        """Wake governor and sweep, as the schedule does."""
        event = (REPOSITORY / "events" / "schedule.json").read_bytes()
        with suppress(ClientError, BotoCoreError):
            self._ready.client("lambda").invoke(
                FunctionName=self._ready.resources["GovernorFunction"], Payload=event
            )

    def wait_until_all_ended(self, began: float, seconds: float = 600) -> None:
        """Wait for everything that is still in flight, up to the longest time it can take."""
        until = time.monotonic() + seconds
        for look in range(1_000_000):
            left = self.open_jobs()
            if not left or time.monotonic() > until:
                return
            if look % 5 == 0:
                say(f"{time.monotonic() - began:4.0f} s: {left} jobs to go")
                self.govern()
            time.sleep(2)

    # Books -------------------------------------------------------------------------------------------------

    def records(self) -> dict[str, Job]:
        """Return every job record."""
        table = self._ready.resources["JobsTable"]
        items = _patiently(lambda: _scanned(self._ready, table))
        return {job.job_id: job for job in map(job_records.decode, items)}

    def ledger(self) -> list[Json]:
        """Return every row of the ledger."""
        items = _patiently(lambda: _scanned(self._ready, self._ready.resources["LedgerTable"]))
        return [
            {name: next(iter(value.values())) for name, value in item.items()} for item in items
        ]

    def open_jobs(self) -> int:
        """Return how many accepted jobs have not ended."""
        records = self.records()
        ended = sum(
            job_id in records and records[job_id].state.is_final for job_id in list(self.accepted)
        )
        return len(self.accepted) - ended

    def dead_letters(self) -> int:
        """Return how many messages were dead letters."""
        bucket = self._ready.resources["DataBucket"]
        listed = self._ready.client("s3").list_objects_v2(Bucket=bucket, Prefix="dead-letters/")
        return int(listed.get("KeyCount", 0))

    def _progress(self) -> str:
        states = Counter(str(job.state) for job in self.records().values())
        told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
        return f"{len(self.damage.kills)} workers killed; {told}"

    def found(self) -> Found:
        """Compare the books."""
        records, damage = self.records(), self.damage
        ours = [records[job_id] for job_id in self.accepted if job_id in records]
        states = Counter(str(job.state) for job in ours)
        ended = sum(job.state.is_final for job in ours)
        rows, books = self.ledger(), self._simulator.books()
        explained, unexplained = billed_twice(ours, rows, books)
        return Found(
            accepted=len(self.accepted),
            succeeded=states["succeeded"],
            ended_otherwise=ended - states["succeeded"],
            made_twice=len(records.keys() - self.accepted.keys()),
            explained=explained,
            unexplained=unexplained,
            dead_letters=self.dead_letters(),
            workers_killed=len(damage.kills),
            recoveries=recovery(damage.kills, records, self.notes.deliveries),
            killed_calls=killed_calls(damage.kills, records, rows, books),
            longest_call_seconds=max((each["ended_at"] - each["at"] for each in books), default=0),
            most_held=self.notes.most_held,
            restarts=damage.restarts,
            throttled_seconds=damage.throttled_seconds,
            outage_seconds=damage.outage_seconds,
            outage_receives=damage.outage_receives,
        )


def _is_turn(what: str, turn: int) -> bool:
    every, which = EVERY[what]
    return turn % every == which


def _scanned(ready: Ready, table: str) -> list[Any]:
    pages = ready.client("dynamodb").get_paginator("scan").paginate(TableName=table)
    return [item for page in pages for item in page["Items"]]


def _patiently(read: Callable[[], list[Any]]) -> list[Any]:
    """Read through the throttling that we have ordered ourselves."""
    for _ in range(200):
        with suppress(ClientError, BotoCoreError):
            return read()
        time.sleep(0.1)
    return read()


@contextmanager
def stack(simulator: Simulator, folder: Path) -> Iterator[Ready]:
    """Start the local stack with the chaos worker in the place of the deployed one."""
    worker = folder / "worker"
    worker.mkdir()
    shutil.copy(REPOSITORY / "functions" / "worker" / "app.py", worker / "deployed.py")
    shutil.copy(Path(__file__).with_name("worker.py"), worker / "app.py")
    written = read_template(REPOSITORY / "template.yaml")
    for resource in written["Resources"].values():
        properties = resource.get("Properties", {})
        for place in properties.keys() & {"CodeUri", "ContentUri"}:
            properties[place] = str(REPOSITORY / properties[place])
    written["Resources"]["WorkerFunction"]["Properties"]["CodeUri"] = str(worker)
    template = folder / "template.json"
    template.write_text(json.dumps(written))
    (folder / "dynamodb.json").write_text("{}")
    pool = {"keys": [{"id": "chaos", "api_key": KEY, "base_url": simulator.url}]}
    local = LocalStack(
        key_pool=pool,
        concurrency=4,
        template=template,
        environment={
            "SLUICE_WAITS": json.dumps(asdict(WAITS)),
            "SLUICE_MAX_ATTEMPTS": str(MAX_ATTEMPTS),
            "CHAOS_NOTES": str(folder / "notes.jsonl"),
        },
        dynamodb_faults=folder / "dynamodb.json",
        say=say,
    )
    with local.running() as ready:
        yield ready


def say(line: str) -> None:
    """Print progress."""
    print(line, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """Return what the command line may name."""
    made = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__)
    made.add_argument(
        "--small", action="store_true", help="a minute instead of a quarter of an hour"
    )
    for name, what in (
        ("jobs", "jobs in all"),
        ("seconds", "seconds over which they come and everything breaks"),
        ("outage-jobs", "jobs that come during the outage"),
        ("outage-receives", "receives of each of them until it ends"),
    ):
        full, small = (getattr(size, name.replace("-", "_")) for size in (Size(), SMALL))
        made.add_argument(f"--{name}", type=int, help=f"{what} ({full:,}; small {small})")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Do it; return the exit code."""
    chosen = vars(parser().parse_args(arguments))
    size = SMALL if chosen.pop("small") else Size()
    size = replace(size, **{name: n for name, n in chosen.items() if n is not None})
    names = [f"chaos-{number:05}" for number in range(size.jobs)]
    with tempfile.TemporaryDirectory(prefix="sluice-chaos-") as name:
        folder = Path(name)
        simulator = Simulator()
        try:
            with stack(simulator, folder) as ready:
                run = Run(ready, simulator, folder, size)
                run.flow(names[size.outage_jobs :])
                run.outage(names[: size.outage_jobs])
                found = run.found()
        except StackError as error:
            say(f"error: {error}")
            return 1
        finally:
            simulator.stop()
    Console().print(table(found))
    if size.kills:
        Console().print(kills_table(found))
    broken = not_as_promised(size, found)
    for what in broken:
        print(f"NOT AS PROMISED: {what}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
