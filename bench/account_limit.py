"""An account that allows ten executions of Lambda, and work for all queues: `python -m bench.account_limit`.

The local stack as right after a deployment, with an account limit of 10 that is enforced as on AWS. At once come 2,000
jobs whose webhooks go to a slow receiver, and a file of 10,000 rows; a caller asks for GET /health twice a second. The
governor ran once, as `sluice setup` has it, and is then woken by the stack's own schedule.

The exit code is 0 when every GET /health was answered 200 within 5 s, no minute passed without a run of the governor,
the enabled mappings never added up to more than the limit less 3 after its first run, and all jobs, rows and webhooks
were done. `--small` is a smoke of less than a minute, in which this program wakes the governor itself and no time is a
promise. The emulator's own health page is read beside the other one, to show how busy the machine was.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Final

import httpx
from rich.console import Console
from rich.table import Table

from scripts.cli.client import Gateway
from scripts.cli.submission import read_jobs, send
from scripts.local_doors import LocalHandler
from scripts.local_stack import LocalStack, Ready
from scripts.local_stack.emulator import Child, clean_environment
from sluice.domain.shares import room_of

REPOSITORY: Final = Path(__file__).resolve().parents[1]
KEY: Final = "sk-ant-test-account"
TENANT: Final = "bench"
MODEL: Final = "claude-haiku-5-5"
RPM: Final = 3_000
HEALTH_EVERY_SECONDS: Final = 0.5
HEALTH_SECONDS: Final = 5.0
LONGEST_SECONDS: Final = 30.0
GAP_SECONDS: Final = 80.0
"""Between two runs of the governor: a minute, the emulator's schedule that looks every ten seconds, and its retries."""

SAY_SECONDS: Final = 20.0
ACCOUNT: Final = 10


@dataclass(frozen=True, slots=True)
class Load:
    """What comes at once."""

    jobs: int = 2_000
    rows: int = 10_000
    receiver_seconds: float = 2.0
    governs_seconds: float | None = None
    """How often this program wakes the governor; None: the schedule does."""
    patience_seconds: float = 2_400.0
    """After this time what is not done is reported as broken, with what waits where."""

    @property
    def is_small(self) -> bool:
        """Return whether this is a smoke test, which guarantees no time."""
        return self.governs_seconds is not None


SMALL: Final = Load(
    jobs=100, rows=300, receiver_seconds=0.2, governs_seconds=5.0, patience_seconds=200.0
)


@dataclass(slots=True)
class Seen:
    """What was observed."""

    health: list[tuple[float, int, float]] = field(default_factory=list)
    """When it was asked, status (0: none within half a minute) and seconds of each GET /health."""
    emulator: list[float] = field(default_factory=list)
    """Seconds of each request for the emulator's own page, which invokes no function."""
    enabled: list[tuple[float, int]] = field(default_factory=list)
    """When, and what the enabled mappings of queues added up to."""
    delivered: set[str] = field(default_factory=set)
    refused: int = 0
    """Runs of the governor that this program asked for and Lambda refused."""
    troubles: Counter[str] = field(default_factory=Counter)
    """What went wrong while this program looked, by kind of error."""


@dataclass(frozen=True, slots=True)
class Stack:
    """The state at one moment."""

    ready: Ready
    seen: Seen
    began: float

    def function(self, logical_id: str) -> str:
        """Return a function's name."""
        return self.ready.resources[logical_id]

    def governor_runs(self) -> list[float]:
        """Return when each run of the governor ended (epoch seconds): the emulator logs a run when it ends."""
        pages = (
            self.ready.client("logs")
            .get_paginator("filter_log_events")
            .paginate(
                logGroupName="/aws/lambda/sluice-local-governor", filterPattern='"START RequestId"'
            )
        )
        return sorted(event["timestamp"] / 1000 for page in pages for event in page["events"])

    def throttles(self) -> dict[str, int]:
        """Return how many executions were throttled, by function."""
        cloudwatch = self.ready.client("cloudwatch")
        found = {}
        for logical_id in sorted(self.ready.resources):
            if not logical_id.endswith("Function"):
                continue
            answer = cloudwatch.get_metric_statistics(
                Namespace="AWS/Lambda",
                MetricName="Throttles",
                Dimensions=[{"Name": "FunctionName", "Value": self.function(logical_id)}],
                StartTime=datetime.fromtimestamp(self.began, UTC) - timedelta(minutes=1),
                EndTime=datetime.now(UTC) + timedelta(minutes=1),
                Period=60,
                Statistics=["Sum"],
            )
            count = int(sum(point["Sum"] for point in answer["Datapoints"]))
            if count:
                found[logical_id.removesuffix("Function")] = count
        return found

    def jobs_done(self) -> int:
        """Return how many jobs have succeeded."""
        pages = (
            self.ready.client("dynamodb")
            .get_paginator("scan")
            .paginate(
                TableName=self.ready.resources["JobsTable"],
                FilterExpression="#state = :done",
                ExpressionAttributeNames={"#state": "state"},
                ExpressionAttributeValues={":done": {"S": "succeeded"}},
                Select="COUNT",
            )
        )
        return sum(int(page["Count"]) for page in pages)

    def rows_done(self) -> int:
        """Return how many rows have their result in the finished file."""
        s3, bucket = self.ready.client("s3"), self.ready.resources["DataBucket"]
        listed = s3.list_objects_v2(Bucket=bucket, Prefix=f"out/{TENANT}/rows/summary.json")
        if not listed.get("KeyCount"):
            return 0
        body = s3.get_object(Bucket=bucket, Key=f"out/{TENANT}/rows/results.jsonl")["Body"].read()
        return len(body.splitlines())

    def messages(self) -> dict[str, tuple[int, int]]:
        """Return how many messages of each queue that has any are visible, and in flight."""
        sqs, found = self.ready.client("sqs"), {}
        for logical_id, url in self.ready.resources.items():
            if not logical_id.endswith("Queue"):
                continue
            counts = sqs.get_queue_attributes(
                QueueUrl=url,
                AttributeNames=[
                    "ApproximateNumberOfMessages",
                    "ApproximateNumberOfMessagesNotVisible",
                ],
            )["Attributes"]
            visible = int(counts["ApproximateNumberOfMessages"])
            in_flight = int(counts["ApproximateNumberOfMessagesNotVisible"])
            if visible or in_flight:
                found[logical_id.removesuffix("Queue")] = (visible, in_flight)
        return found

    def last_words(self) -> str:
        """Return the last log lines of every function, to explain a run that did not end."""
        logs, lines = self.ready.client("logs"), []
        for group in logs.describe_log_groups()["logGroups"]:
            name = group["logGroupName"]
            events = logs.filter_log_events(logGroupName=name)["events"][-20:]
            lines += [f"{name} {event['timestamp']} {event['message'].strip()}" for event in events]
        return "\n".join(lines)

    def mappings(self) -> dict[str, int]:
        """Return the concurrency of each enabled mapping of a queue, by function."""
        listed = self.ready.client("lambda").list_event_source_mappings()["EventSourceMappings"]
        return {
            each["EventSourceArn"].rpartition("-")[0].rpartition(":")[2]: each["ScalingConfig"][
                "MaximumConcurrency"
            ]
            for each in listed
            if ":sqs:" in each["EventSourceArn"] and each["State"] == "Enabled"
        }


@contextmanager
def receiver(seen: Seen, seconds: float) -> Iterator[str]:
    """Run a server that accepts webhooks after a delay; yield its address."""

    class Handler(LocalHandler):
        def do_POST(self) -> None:  # noqa: N802 - its name
            """Accept a webhook after a delay."""
            self.rfile.read(int(self.headers["content-length"]))
            time.sleep(seconds)
            seen.delivered.add(str(self.headers["webhook-id"]))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/ended"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def claude() -> Iterator[str]:
    """Run the simulator in a process of its own; yield its address."""
    child = Child(
        "scripts.claude_simulator",
        *("--port", "0", "--rpm", str(RPM), "--keys", KEY),
        *("--ttft", "2", "--tokens-per-second", "0", "--output-tokens", "30"),
        environment=clean_environment(),
        stdout=subprocess.PIPE,
    )
    try:
        line = child.process.stdout.readline() if child.process.stdout else b""
        yield json.loads(line)["url"]
    finally:
        child.kill()


@contextmanager
def repeated(seconds: float, look: Callable[[], None], troubles: Counter[str]) -> Iterator[None]:
    """Repeat a function in its own thread until the block ends, counting its exceptions."""
    over = threading.Event()

    def keep_looking() -> None:
        while not over.is_set():
            began = time.monotonic()
            try:
                look()
            except Exception as error:  # noqa: BLE001 - a thread that ended here would leave the rest of the run unwatched
                troubles[f"{look.__name__}: {type(error).__name__}"] += 1
            over.wait(max(0.0, seconds - (time.monotonic() - began)))

    thread = threading.Thread(target=keep_looking)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def params(text: str) -> dict[str, Any]:
    """Return a small request."""
    message = {"role": "user", "content": text}
    return {"model": MODEL, "max_tokens": 64, "messages": [message]}


def warm_up(ready: Ready) -> None:
    """Let the API's function start for two callers: here, unlike on AWS, a start waits for the cores of all others."""

    def ask() -> None:
        httpx.get(f"{ready.api_url}/health", trust_env=False, timeout=LONGEST_SECONDS)

    callers = [threading.Thread(target=ask) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()


def submit(ready: Ready, jobs: int, webhook: str) -> int:
    """Submit jobs as any client does; return how many were accepted."""
    lines = [
        json.dumps(
            {"custom_id": f"job-{number}", "webhook": webhook, "params": params(f"Job {number}.")}
        ).encode()
        for number in range(jobs)
    ]
    with Gateway(ready.api_url, ready.client_key) as gateway:
        outcome = send(gateway, read_jobs(lines, {}), "account-limit", in_flight_at_once=1)
    return len(outcome.accepted)


def drop_file(ready: Ready, rows: int) -> None:
    """Put the file under `in/`."""
    lines = [
        json.dumps({"custom_id": f"row-{number}", "params": params(f"Row {number}.")})
        for number in range(rows)
    ]
    ready.client("s3").put_object(
        Bucket=ready.resources["DataBucket"],
        Key=f"in/{TENANT}/rows.jsonl",
        Body=("\n".join(lines) + "\n").encode(),
    )


def watch(stack: Stack, load: Load, webhook: str) -> tuple[int, float]:
    """Bring the load and wait for its end; return the jobs taken, and the seconds."""
    client = httpx.Client(trust_env=False, timeout=LONGEST_SECONDS)

    def ask_for_health() -> None:
        began, at = time.monotonic(), time.time()
        try:
            status = client.get(f"{stack.ready.api_url}/health").status_code
        except httpx.HTTPError:
            status = 0
        stack.seen.health.append((at, status, time.monotonic() - began))

    def check_emulator() -> None:
        began = time.monotonic()
        with suppress(httpx.HTTPError):
            client.get(f"{stack.ready.endpoint_url}/_ministack/health")
        stack.seen.emulator.append(time.monotonic() - began)

    def add_mappings_up() -> None:
        stack.seen.enabled.append((time.time(), sum(stack.mappings().values())))

    def govern() -> None:
        client = stack.ready.client("lambda")
        try:
            client.invoke(
                FunctionName=stack.function("GovernorFunction"),
                Payload=(REPOSITORY / "events" / "schedule.json").read_bytes(),
            )
        except client.exceptions.TooManyRequestsException:
            stack.seen.refused += 1

    troubles = stack.seen.troubles
    began = time.monotonic()
    with (
        repeated(HEALTH_EVERY_SECONDS, ask_for_health, troubles),
        repeated(HEALTH_EVERY_SECONDS, check_emulator, troubles),
        repeated(1.0, add_mappings_up, troubles),
        repeated(load.governs_seconds, govern, troubles) if load.governs_seconds else nullcontext(),
    ):
        drop_file(stack.ready, load.rows)
        taken = submit(stack.ready, load.jobs, webhook)
        said = 0.0
        while time.monotonic() - began < load.patience_seconds:
            jobs, rows = stack.jobs_done(), stack.rows_done()
            delivered = len(stack.seen.delivered)
            if jobs == load.jobs and rows == load.rows and delivered >= load.jobs:
                break
            if time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                say(
                    f"{time.monotonic() - began:4.0f} s: {jobs:,} jobs, {rows:,} rows, "
                    f"{delivered:,} webhooks; {stack.mappings()}; {stack.messages()}"
                )
            time.sleep(1)
        else:
            say(f"after {load.patience_seconds:.0f} s: {stack.mappings()}; {stack.messages()}")
            say(stack.last_words())
    client.close()
    return taken, time.monotonic() - began


def verdict(stack: Stack, load: Load, taken: int, seconds: float) -> tuple[Table, list[str]]:
    """Return the table, and the promises that were broken."""
    seen, runs = stack.seen, stack.governor_runs()
    statuses = Counter(status for _, status, _ in seen.health)
    worst = max((each for *_, each in seen.health), default=0.0)
    middle = median([each for *_, each in seen.health] or [0.0])
    marks = [stack.began, *runs, stack.began + seconds]
    gap = max(after - before for before, after in pairwise(marks))
    first = min(runs, default=stack.began + seconds)
    most = max((total for at, total in seen.enabled if at > first + HEALTH_SECONDS), default=0)
    jobs, rows, room = stack.jobs_done(), stack.rows_done(), room_of(ACCOUNT)
    throttles = stack.throttles()
    facts: Mapping[str, str] = {
        "account limit": f"{ACCOUNT} executions, {room} for the queues",
        "seconds until all was done": f"{seconds:.0f}",
        "GET /health": f"{len(seen.health)}, by status {dict(statuses)}",
        "GET /health, median and worst": f"{middle:.2f} s, {worst:.2f} s (at most 5)",
        "the emulator's own page, worst": f"{max(seen.emulator, default=0.0):.2f} s",
        "runs of the governor": f"{len(runs)}, {60 * len(runs) / seconds:.2f} a minute",
        "longest time without a run": f"{gap:.0f} s",
        "enabled mappings, most together": f"{most} (at most {room})",
        "jobs done": f"{jobs:,} of {load.jobs:,}",
        "rows done": f"{rows:,} of {load.rows:,}",
        "webhooks delivered": f"{len(seen.delivered):,}, each after {load.receiver_seconds:g} s",
        "troubles of this program": ", ".join(f"{each} {n}" for each, n in seen.troubles.items())
        or "none",
        "throttled executions": ", ".join(f"{each} {n}" for each, n in throttles.items()) or "none",
    }
    table = Table("account limit", "", title="Results", title_justify="left")
    for name, value in facts.items():
        table.add_row(name, value)
    promises = {
        "every GET /health is answered 200": statuses.keys() == {HTTPStatus.OK},
        "every GET /health is answered within 5 s": worst <= HEALTH_SECONDS or load.is_small,
        "the governor runs every minute": gap <= GAP_SECONDS or load.is_small,
        "no run of the governor is throttled": not seen.refused,
        "the enabled mappings keep within the limit less 3": 0 < most <= room,
        "every job is accepted and done": taken == jobs == load.jobs,
        "every row is done": rows == load.rows,
        "every webhook is delivered": len(seen.delivered) >= load.jobs,
    }
    bad = [
        f"{status} after {each:.1f} s, {at - stack.began:.0f} s into the run"
        for at, status, each in seen.health
        if status != HTTPStatus.OK or each > HEALTH_SECONDS
    ]
    say(f"health not as guaranteed: {bad}")
    say(f"runs of the governor ended at: {[round(at - stack.began) for at in runs]} s")
    return table, [promise for promise, is_kept in promises.items() if not is_kept]


def say(line: str) -> None:
    """Print progress."""
    print(line, file=sys.stderr, flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(prog="python -m bench.account_limit", description=__doc__)
    made.add_argument("--small", action="store_true", help="a smoke of less than a minute")
    return made


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    load = SMALL if parser().parse_args(arguments).small else Load()
    seen = Seen()
    with claude() as claude_url, receiver(seen, load.receiver_seconds) as webhook:
        pool = {"keys": [{"id": "main", "api_key": KEY, "base_url": claude_url}]}
        local = LocalStack(key_pool=pool, tenant=TENANT, account_concurrency=ACCOUNT, say=say)
        with local.running() as ready:
            warm_up(ready)
            stack = Stack(ready, seen, time.time())
            taken, seconds = watch(stack, load, webhook)
            table, broken = verdict(stack, load, taken, seconds)
    Console(highlight=False, width=100).print(table)
    for promise in broken:
        print(f"BROKEN: {promise}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
