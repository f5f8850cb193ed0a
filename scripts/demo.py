"""`make demo`: run Sluice locally, submit 200 jobs against the simulator, and print the results and the cost.

Then a list of 100 jobs with the lane `auto` runs as a Message Batch at half price, which the simulator ends in seconds.

Needs no account and costs nothing. If ANTHROPIC_API_KEY is set and standard input is a terminal, it offers to
send three small jobs to the real API instead.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import cycle, islice
from types import FrameType
from typing import Any

import httpx
import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from scripts.cli import terminal
from scripts.cli.client import Gateway, Json
from scripts.cli.errors import CommandFailed
from scripts.cli.progress import dollars, span
from scripts.cli.run import wait_and_show
from scripts.cli.submission import deadline_at, read_jobs, send
from scripts.local_stack import LocalStack, Ready, StackError
from scripts.local_stack.emulator import Child, clean_environment

JOBS = 200
REQUESTS_PER_MINUTE = 600
# The simulator's bucket holds this much of its limit, so 100 of 600 calls may start at once.
BURST_SECONDS = 10
UPSTREAM_KEY = "sk-ant-test-demo"
SIMULATOR_SECONDS = 30.0
DEADLINE = "5m"
SHOWN_CHARACTERS = 400

BATCH_JOBS = 100
BATCH_SECONDS = 180
# The schedule runs the governor each minute, and batches wait for others; the demo has less patience.
LANE_ENVIRONMENT = {"SLUICE_GATHER_SECONDS": "1", "SLUICE_WAITS": '{"poll_ms": 1000}'}

SMALL, MIDDLE, LARGE = "claude-haiku-5-5", "claude-sonnet-5-5", "claude-opus-5-5"
TASKS = (
    "Summarize support ticket {n} in two sentences: the parcel arrived late.",
    "Translate into French: order {n} has left our warehouse.",
    "Is review {n} positive, negative or mixed? It did what it promised, but it was loud.",
    "Write a product description of at most fifty words for article {n}, a blue kettle.",
    "Extract city, date and amount from invoice {n}: Berlin, 3 May, 120 euros.",
)

REAL_JOBS = 3
REAL_TASKS = (
    "Say hello in one short sentence.",
    "Name a river, nothing else.",
    "What is two plus two? One word.",
)


@dataclass(frozen=True, slots=True)
class Run:
    """The results of a list of jobs."""

    jobs: int
    succeeded: int
    failed: int
    began_at: float
    ended_at: float
    cost_micro_usd: int
    answer: str

    @property
    def seconds(self) -> float:
        """Seconds from the submit to the last answer."""
        return self.ended_at - self.began_at


# ---------------------------------------------------------------- the jobs


def demo_jobs() -> list[Json]:
    """Return 200 jobs of several kinds; all differ, so that a call billed twice is detected."""
    return [_demo_job(number) for number in range(1, JOBS + 1)]


def _demo_job(number: int) -> Json:
    task = TASKS[number % len(TASKS)].format(n=number)
    params: Json = {
        "model": SMALL,
        "max_tokens": 256,
        "messages": [{"role": "user", "content": task}],
    }
    if number % 10 == 0:
        params["model"] = MIDDLE
        params["system"] = "You are a careful clerk. Answer briefly."
    if number % 40 == 0:
        params |= {"model": LARGE, "max_tokens": 1500}
        params["messages"] = [{"role": "user", "content": f"Write chapter {number} of a story."}]
    if number == JOBS // 2:
        params |= {"max_tokens": 2048, "thinking": {"type": "adaptive"}}
    return {"custom_id": f"demo-{number:03}", "params": params, "metadata": {"run": "demo"}}


def _real_jobs() -> list[Json]:
    tasks = islice(cycle(REAL_TASKS), REAL_JOBS)
    return [
        {
            "custom_id": f"real-{number}",
            "params": {
                "model": SMALL,
                "max_tokens": 64,
                "messages": [{"role": "user", "content": task}],
            },
        }
        for number, task in enumerate(tasks, start=1)
    ]


def run_jobs(ready: Ready, jobs: list[Json]) -> Run:
    """Submit the jobs, show progress until they end, and return the results."""
    finished: list[Json] = []
    with Gateway(ready.api_url, ready.client_key, on_wait=terminal.say) as gateway:
        began_at = time.time()
        lines = (json.dumps(job).encode() for job in jobs)
        # The deadline ends the demo whatever fails, such as a rejected key.
        defaults = {"deadline": deadline_at(DEADLINE, datetime.now(UTC))}
        outcome = send(gateway, read_jobs(lines, defaults), f"demo-{uuid.uuid4().hex}")
        if outcome.stopped:
            raise outcome.stopped
        for line in outcome.rejected:
            terminal.say(f"job {line.line}: {line.error_type}: {line.message}")
        wait_and_show(gateway, [job.job_id for job in outcome.accepted], finished.extend)
        done = [job for job in finished if job["state"] == "succeeded"]
        example = gateway.job(done[0]["id"]) if done else None
        failed = [job for job in finished if job["state"] != "succeeded"]
        for job in failed:
            terminal.say(
                f"{job['custom_id']} {job['state']}: {(job.get('error') or {}).get('message')}"
            )
    return Run(
        jobs=len(jobs),
        succeeded=len(done),
        failed=len(jobs) - len(done),
        began_at=began_at,
        ended_at=max((_epoch(job["finished_at"]) for job in finished), default=began_at),
        cost_micro_usd=sum(job.get("cost_micro_usd") or 0 for job in finished),
        answer=(example or {}).get("text") or "no answer",
    )


def _epoch(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


# ---------------------------------------------------------------- against the simulator


def run_batch(ready: Ready) -> Json:
    """Submit a list with the lane `auto`, and return its batch when it has ended."""
    jobs = [{**job, "custom_id": f"batch-{job['custom_id']}"} for job in demo_jobs()[:BATCH_JOBS]]
    listed = [{name: job[name] for name in ("custom_id", "params")} for job in jobs]
    with httpx.Client(
        base_url=ready.api_url, headers={"x-api-key": ready.client_key}, trust_env=False, timeout=30
    ) as client:
        created = client.post("/jobs", json={"jobs": listed, "lane": "auto"}).raise_for_status()
        path = f"/batches/{created.json()['id']}"
        until = time.monotonic() + BATCH_SECONDS
        while time.monotonic() < until:
            ready.client("lambda").invoke(
                FunctionName=ready.resources["GovernorFunction"], Payload=b"{}"
            )
            batch: Json = client.get(path).raise_for_status().json()
            if batch["state"] == "ended":
                return batch
            time.sleep(1)
    raise CommandFailed(f"the batch did not end within {BATCH_SECONDS} s")


@dataclass(frozen=True, slots=True)
class Upstream:
    """What the simulator recorded: it keeps a ledger as Claude's billing would."""

    calls: int
    answered: int
    rate_limited: int
    billed: int
    billed_twice: int
    ideal_seconds: float
    limit_use: float


def upstream_of(stats: Mapping[str, Any], ledger: list[Json], began_at: float) -> Upstream:
    """Return the simulator's statistics for a run that started at `began_at`."""
    answered: dict[str, list[Json]] = defaultdict(list)
    for row in ledger:
        if row["outcome"] == "answered":
            answered[row["model_group"]].append(row)
    rate, capacity = REQUESTS_PER_MINUTE / 60, REQUESTS_PER_MINUTE / 60 * BURST_SECONDS
    busiest = sorted(row["at"] for row in max(answered.values(), key=len, default=[]))
    allowed = capacity + rate * (busiest[-1] - began_at) if busiest else 1.0
    return Upstream(
        calls=stats["requests"],
        answered=stats["answered"],
        rate_limited=stats["rate_limited"]["total"],
        billed=stats["billed"],
        billed_twice=stats["duplicates"]["extra_calls"],
        ideal_seconds=max(
            (ideal_seconds(rows, rate, capacity) for rows in answered.values()), default=0.0
        ),
        limit_use=len(busiest) / allowed,
    )


def ideal_seconds(calls: list[Json], per_second: float, capacity: float) -> float:
    """Return how long these calls take if each starts as soon as the request limit allows."""
    times = sorted((float(call["at"]), float(call["ended_at"])) for call in calls)
    return max(
        max(0.0, (place - capacity) / per_second) + ended_at - at
        for place, (at, ended_at) in enumerate(times, start=1)
    )


@contextmanager
def _simulator() -> Iterator[str]:
    """Give the URL of a simulator with the demo's limits."""
    child = Child(
        *("scripts.claude_simulator", "--port", "0"),
        *("--rpm", str(REQUESTS_PER_MINUTE), "--burst-seconds", str(BURST_SECONDS)),
        environment=clean_environment() | {"CLAUDE_SIMULATOR_KEYS": UPSTREAM_KEY},
        stdout=subprocess.PIPE,
    )
    try:
        stdout = child.process.stdout
        lines: list[bytes] = []
        # In a thread of its own, because reading from a pipe has no timeout.
        reader = threading.Thread(
            target=lambda: lines.append(stdout.readline() if stdout else b""), daemon=True
        )
        reader.start()
        reader.join(SIMULATOR_SECONDS)
        try:
            url = str(json.loads(lines[0])["url"])
        except (IndexError, ValueError, KeyError):
            raise StackError(f"the simulator did not start: {child.last_words()}") from None
        yield url
    finally:
        child.kill()


def _against_simulator(console: Console) -> bool:
    terminal.say(
        f"Starting the Claude simulator ({REQUESTS_PER_MINUTE} requests per minute) and Sluice."
    )
    with _simulator() as claude_url:
        pool = {"keys": [{"id": "demo", "api_key": UPSTREAM_KEY, "base_url": claude_url}]}
        local = LocalStack(
            key_pool=pool, tenant="demo", environment=LANE_ENVIRONMENT, say=terminal.say
        )
        with local.running() as ready:
            terminal.say(f"Submitting {JOBS} jobs.")
            run = run_jobs(ready, demo_jobs())
            upstream = _books(claude_url, run.began_at)
            terminal.say(f"Submitting a list of {BATCH_JOBS} jobs with the lane auto.")
            batch = run_batch(ready)
    console.print(_simulated_table(run, upstream))
    _print_answer(console, run)
    console.print(_batch_table(batch))
    good = run.succeeded == run.jobs and upstream.billed_twice == 0
    return good and batch["rows"]["succeeded"] == BATCH_JOBS


def _books(claude_url: str, began_at: float) -> Upstream:
    with httpx.Client(base_url=f"{claude_url}/_simulator", trust_env=False) as books:
        stats = books.get("/stats").raise_for_status().json()
        ledger = books.get("/ledger").raise_for_status().text
    return upstream_of(stats, [json.loads(line) for line in ledger.splitlines()], began_at)


def _simulated_table(run: Run, upstream: Upstream) -> Table:
    per_answer = upstream.rate_limited / max(1, upstream.answered)
    twice = upstream.billed_twice
    table = _result_table(run)
    table.add_row("429s from Claude", f"{upstream.rate_limited} of {upstream.calls} calls")
    table.add_row("429s per answer", f"{per_answer:.3f}")
    table.add_row("Billed twice", Text(f"{twice} calls", style="red" if twice else "green"))
    table.add_row("Rate-limit utilization", f"{upstream.limit_use:.0%}")
    table.add_row("Elapsed time", f"{run.seconds:.1f} s")
    table.add_row("Ideal elapsed time", f"{upstream.ideal_seconds:.1f} s")
    table.add_row("Cost", f"{dollars(run.cost_micro_usd)} (simulated, at list prices)")
    return table


def _batch_table(batch: Json) -> Table:
    table = Table(title="Half-price lane", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    succeeded = batch["rows"]["succeeded"]
    style = "green" if succeeded == BATCH_JOBS else "red"
    table.add_row("Succeeded", Text(f"{succeeded} of {BATCH_JOBS} rows", style=style))
    table.add_row("Lane", f"{batch['lane_decision']['lane']}, chosen for the lane auto")
    table.add_row("Message Batches", f"{len(batch['upstream_batches'])}")
    cost, saved = batch["cost_micro_usd"] or 0, batch["saved_micro_usd"]
    table.add_row("Cost", f"{dollars(cost)}, and {dollars(cost + saved)} on the live lane")
    table.add_row("Saved", f"{dollars(saved)} (simulated, at list prices)")
    return table


# ---------------------------------------------------------------- against the real API


def _against_claude(console: Console, api_key: str) -> bool:
    terminal.say("Starting Sluice.")
    pool = {"keys": [{"id": "main", "api_key": api_key}]}
    with LocalStack(key_pool=pool, tenant="demo", say=terminal.say).running() as ready:
        run = run_jobs(ready, _real_jobs())
    table = _result_table(run)
    table.add_row("Elapsed time", span(run.seconds))
    table.add_row("Cost", dollars(run.cost_micro_usd))
    console.print(table)
    _print_answer(console, run)
    return run.succeeded == run.jobs


def _confirmed_real_key() -> str | None:
    """Return the real key if it is set, there is a terminal, and the answer is yes."""
    key = os.environ.get("ANTHROPIC_API_KEY")
    if not key or not sys.stdin.isatty() or not sys.stdout.isatty():
        return None
    question = (
        f"ANTHROPIC_API_KEY is set. Send {REAL_JOBS} small jobs to the real API (well below one "
        "cent) instead of the simulator?"
    )
    return key if terminal.confirm(question) else None


# ---------------------------------------------------------------- what is shown


def _result_table(run: Run) -> Table:
    table = Table(title="Results", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row(
        "Succeeded",
        Text(f"{run.succeeded} of {run.jobs} jobs", style="red" if run.failed else "green"),
    )
    table.add_row("Failed", Text(f"{run.failed} jobs", style="red" if run.failed else "green"))
    return table


def _print_answer(console: Console, run: Run) -> None:
    text = run.answer
    if len(text) > SHOWN_CHARACTERS:
        text = f"{text[:SHOWN_CHARACTERS]}…"
    console.print(Panel(Text(terminal.block(text)), title="Sample answer", title_align="left"))


def _stop(number: int, frame: FrameType | None) -> None:
    del number, frame
    # A second Ctrl-C must not interrupt the cleanup.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    """Run the demo; return 0 only if every job succeeded and none was billed twice."""
    console = Console(highlight=False)
    try:
        key = _confirmed_real_key()
        signal.signal(signal.SIGINT, _stop)
        signal.signal(signal.SIGTERM, _stop)
        good = _against_claude(console, key) if key else _against_simulator(console)
    except (CommandFailed, StackError) as error:
        terminal.say(f"error: {error}")
        return 1
    except (KeyboardInterrupt, typer.Abort):
        terminal.say("stopped; all processes have ended")
        return 130
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
