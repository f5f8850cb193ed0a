"""Sluice as a client under test, through each of its doors: `POST /jobs`, and batches through Anthropic's own SDK."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Protocol

from anthropic import Anthropic

from scripts.cli.client import FINAL_STATES, MAX_IDS_PER_LOOK, Gateway
from scripts.cli.submission import read_jobs, send
from scripts.local_stack import Ready, StackError

Json = dict[str, Any]

LOOK_EVERY_SECONDS: Final = 1.0
WARM_UP_SECONDS: Final = 120.0
REFILL_SECONDS: Final = 10.0
"""After the warm-up: its few calls are refilled, and every function has answered within the last minute."""

WARM_UP_RANGES: Final = 200
"""Messages of one warm-up invocation: long enough that concurrent invocations do not share a process."""

ACTIVE_SECONDS: Final = 30.0


class RunFailed(Exception):
    """The run came to nothing; the message is the one line to show."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the work."""

    ended_at: float
    """When the last job ended, or the batch was `ended`: epoch seconds."""
    done: int
    notes: tuple[str, ...] = ()


class Door(Protocol):
    """A way to hand work to Sluice."""

    name: str
    functions: tuple[str, ...]
    """Every function on the path, by logical id; the one that calls Claude comes first."""
    queue: str
    """The queue that the first function takes its work from, by logical id."""

    def work(self, requests: Sequence[Json], until: float) -> Outcome:
        """Submit the requests and wait until all have ended, or until a time."""
        ...

    def warm_up(self, requests: Sequence[Json], workers: int) -> None:
        """Have every function answer, the one that calls Claude in `workers` processes, and the limits learned."""
        ...

    def close(self) -> None:
        """Close connections."""
        ...


class JobsDoor:
    """Lists of 100, each one after the previous one is accepted; ended when the last job has ended."""

    name = "jobs"
    functions = ("WorkerFunction", "ApiFunction")
    queue = "JobsQueue"

    def __init__(self, ready: Ready) -> None:
        self._ready = ready
        self._gateway = Gateway(ready.api_url, ready.client_key)

    def work(self, requests: Sequence[Json], until: float) -> Outcome:
        """As a door does."""
        lines = [json.dumps({"params": params}).encode() for params in requests]
        run_key = f"bench-{uuid.uuid4().hex}"
        outcome = send(self._gateway, read_jobs(lines, {}), run_key, in_flight_at_once=1)
        if outcome.stopped:
            raise outcome.stopped
        ids = [job.job_id for job in outcome.accepted]
        final, seen_until = self._wait(ids, until)
        notes = [
            f"{state} {count}"
            for state in ("errored", "expired", "canceled")
            if (count := sum(job["state"] == state for job in final))
        ]
        if len(final) < len(ids):
            notes.append(f"{len(ids) - len(final)} did not end in time")
        if outcome.rejected:
            notes.append(f"{len(outcome.rejected)} not accepted")
        last = max((_seconds(job["finished_at"]) for job in final), default=0)
        return Outcome(
            ended_at=last if last and len(final) == len(ids) else seen_until,
            done=sum(job["state"] == "succeeded" for job in final),
            notes=tuple(notes),
        )

    def _wait(self, ids: Sequence[str], until: float) -> tuple[list[Json], float]:
        """Return the jobs that have ended, once all have or the time is over."""
        waiting = list(ids)
        final: list[Json] = []
        while waiting and time.time() < until:
            if reason := self._ready.ended():
                raise StackError(reason)
            # Only the oldest: each job records when it ended, so nothing is gained by reading all.
            ended = [
                job
                for job in self._gateway.look(waiting[:MAX_IDS_PER_LOOK])
                if job["state"] in FINAL_STATES
            ]
            final += ended
            names = {job["id"] for job in ended}
            waiting = [job_id for job_id in waiting if job_id not in names]
            if len(ended) < MAX_IDS_PER_LOOK:
                time.sleep(min(LOOK_EVERY_SECONDS, max(0.0, until - time.time())))
        return final, time.time()

    def warm_up(self, requests: Sequence[Json], workers: int) -> None:
        """As a door does: a canary for each worker, at the same time, and a few jobs."""
        canaries = [
            [
                {
                    "messageId": uuid.uuid4().hex,
                    "body": json.dumps({"v": 1, "canary": f"bench-{each}"}),
                }
            ]
            for each in range(workers)
        ]
        _invoke_at_once(self._ready, "WorkerFunction", canaries)
        self.work(requests, time.time() + WARM_UP_SECONDS)

    def close(self) -> None:
        """As a door does."""
        self._gateway.__exit__(None, None, None)


class BatchesDoor:
    """One `messages.batches.create` with Anthropic's SDK; ended when the batch is `ended`."""

    name = "batches"
    functions = ("RangesFunction", "BatchesFunction", "ApiFunction")
    queue = "RangesQueue"

    def __init__(self, ready: Ready) -> None:
        self._ready = ready
        self._sdk = Anthropic(base_url=ready.api_url, api_key=ready.client_key)

    def work(self, requests: Sequence[Json], until: float) -> Outcome:
        """As a door does."""
        return self._ended(self._create(requests), len(requests), until)

    def _create(self, requests: Sequence[Json]) -> str:
        rows: Any = [
            {"custom_id": f"row-{number}", "params": params}
            for number, params in enumerate(requests)
        ]
        return self._sdk.messages.batches.create(requests=rows).id

    def _ended(self, batch_id: str, rows: int, until: float) -> Outcome:
        while time.time() < until:
            if reason := self._ready.ended():
                raise StackError(reason)
            batch = self._sdk.messages.batches.retrieve(batch_id)
            if batch.ended_at is not None:
                counts = batch.request_counts
                notes = [
                    f"{state} {count}"
                    for state in ("errored", "expired", "canceled")
                    if (count := getattr(counts, state))
                ]
                return Outcome(batch.ended_at.timestamp(), counts.succeeded, tuple(notes))
            time.sleep(LOOK_EVERY_SECONDS)
        return Outcome(time.time(), 0, (f"a batch of {rows} rows did not end in time",))

    def warm_up(self, requests: Sequence[Json], workers: int) -> None:
        """As a door does: a small batch, then messages of it to every worker at the same time."""
        batch_id = self._create(requests)
        self._ended(batch_id, len(requests), time.time() + WARM_UP_SECONDS)
        # A range of a batch that has ended is answered at once.
        body = json.dumps({"v": 1, "batch_id": batch_id, "range": 0})
        records = [{"messageId": uuid.uuid4().hex, "body": body} for _ in range(WARM_UP_RANGES)]
        _invoke_at_once(self._ready, "RangesFunction", [records] * workers)

    def close(self) -> None:
        """As a door does."""
        self._sdk.close()


DOORS: Final = {door.name: door for door in (JobsDoor, BatchesDoor)}
"""By name: `--door`."""


def end_processes(ready: Ready, functions: Sequence[str]) -> None:
    """End all processes of functions, as Lambda does when their configuration changes."""
    client = ready.client("lambda")
    names = [ready.resources[each] for each in functions]
    for name in names:
        same = client.get_function_configuration(FunctionName=name)["Timeout"]
        client.update_function_configuration(FunctionName=name, Timeout=same)
    until = time.monotonic() + ACTIVE_SECONDS
    for name in names:
        while client.get_function_configuration(FunctionName=name)["State"] != "Active":
            if time.monotonic() > until:
                raise RunFailed(f"{name} did not become active again")
            time.sleep(0.05)


def _invoke_at_once(ready: Ready, function: str, events: Sequence[Sequence[Json]]) -> None:
    """Invoke a function with the records of each event, all at once, so that each needs a process of its own."""
    name, client = ready.resources[function], ready.client("lambda")

    def invoke(records: Sequence[Json]) -> None:
        answer = client.invoke(FunctionName=name, Payload=json.dumps({"Records": records}))
        if answer.get("FunctionError"):
            said = answer["Payload"].read().decode()[:200]
            raise RunFailed(f"{function} failed to start: {said}")

    with ThreadPoolExecutor(len(events)) as threads:
        list(threads.map(invoke, events))


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()
