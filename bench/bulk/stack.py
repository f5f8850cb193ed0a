"""The local stack for benchmarks of batches: a fast simulator, a bucket, and the logs of the functions."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from scripts.claude_simulator import read, running
from scripts.local_stack import LocalStack, Ready

KEY: Final = "sk-ant-test-bench"
TENANT: Final = "bench"
MODEL: Final = "claude-haiku-5-5"
SETTINGS: Final[dict[str, Any]] = {
    "service": {"ttft_seconds": 0.05, "tokens_per_second": None, "output_tokens": 50},
    "organisations": [
        {
            "id": "org-bench",
            "keys": [KEY],
            "limits": {"default": {"rpm": 600_000, "itpm": 600_000_000, "otpm": 600_000_000}},
        }
    ],
}


@dataclass(frozen=True, slots=True)
class Stack:
    """A running stack."""

    ready: Ready
    claude_url: str

    @property
    def bucket(self) -> str:
        """The data bucket's name."""
        return self.ready.resources["DataBucket"]

    def drop(self, name: str, body: bytes, **options: str) -> None:
        """Put a file under `in/`, with options of its batch."""
        self.ready.client("s3").put_object(
            Bucket=self.bucket,
            Key=f"in/{TENANT}/{name}.jsonl",
            Body=body,
            Metadata={f"sluice-{name}": value for name, value in options.items()},
        )

    def of_bucket(self, key: str) -> bytes | None:
        """Return an object; None if it does not exist."""
        client = self.ready.client("s3")
        try:
            body: bytes = client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        except client.exceptions.NoSuchKey:
            return None
        return body

    def logged(self, function: str, word: str, since: float = 0) -> Iterator[dict[str, Any]]:
        """Yield the log lines of a function with a word, from a time on (epoch seconds).

        The emulator gives the first 10,000 lines and no more.
        """
        pages = (
            self.ready.client("logs")
            .get_paginator("filter_log_events")
            .paginate(
                logGroupName=f"/aws/lambda/sluice-local-{function}",
                filterPattern=word,
                startTime=int(since * 1000),
            )
        )
        for page in pages:
            for event in page["events"]:
                try:
                    line = json.loads(event["message"])
                except ValueError:
                    continue
                if isinstance(line, dict):
                    yield line


@contextmanager
def stack(
    bucket_url: str | None = None,
    port: int = 0,
    settings: Mapping[str, Any] = SETTINGS,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Stack]:
    """Start everything, and stop it. `settings` are the simulator's, `environment` is that of every function."""
    with running(read(settings)) as claude:
        pool = {"keys": [{"id": "main", "api_key": KEY, "base_url": claude.url}]}
        local = LocalStack(
            port=port,
            key_pool=pool,
            tenant=TENANT,
            bucket_url=bucket_url,
            environment=environment or {},
        )
        with local.running() as ready:
            yield Stack(ready, claude.url)


def workers(started: Stack, function: str) -> list[int]:
    """Return the processes in which this emulator runs a function."""
    name = f"AWS_LAMBDA_FUNCTION_NAME=sluice-local-{function}".lower().encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().lower()
        except OSError:
            continue
        if name in environment and started.ready.endpoint_url.encode() in environment:
            found.append(int(folder.name))
    return found


def kill_one(started: Stack, function: str) -> bool:
    """Kill a worker while it runs; False if there is none."""
    for process in workers(started, function):
        os.kill(process, signal.SIGKILL)
        return True
    return False


def say(text: str) -> None:
    """Print the progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
