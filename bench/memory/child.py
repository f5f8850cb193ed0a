"""The process in which one function runs: `python -m bench.memory.child FUNCTION EVENTS`; prints what it used as JSON.

EVENTS is a file with one event per line, as Lambda's runtime receives them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.memory.peak import peak_mb

REPORT = "REPORT "
"""The line with this beginning is the result; all others are the function's log."""


@dataclass(frozen=True, slots=True)
class Context:
    """What Lambda reports about an invocation."""

    seconds: float
    aws_request_id: str
    function_name: str = "sluice-bench"
    memory_limit_in_mb: int = 512
    invoked_function_arn: str = "arn:aws:lambda:us-east-1:000000000000:function:sluice-bench"

    def get_remaining_time_in_millis(self) -> int:
        """Return how much of the function's time is left at its start."""
        return int(self.seconds * 1000)


def main() -> None:
    """Run the events, one after the other as an execution environment does."""
    name, events, seconds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    app: Any = import_module(f"functions.{name}.app")
    started_mb, began = peak_mb(), time.monotonic()
    statuses: list[str] = []
    with events.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            answer = app.handler(json.loads(line), Context(seconds, f"invocation-{number}"))
            statuses.append(_status(answer))
    report = {
        "started_mb": started_mb,
        "peak_mb": peak_mb(),
        "seconds": time.monotonic() - began,
        "statuses": statuses,
    }
    print(f"\n{REPORT}{json.dumps(report)}", flush=True)
    # The threads of pools need not end: nothing is left to do.
    os._exit(0)


def _status(answer: object) -> str:
    """Return the HTTP status of an answer, or `done` if no message is returned."""
    if not isinstance(answer, dict):
        return "done"
    if "statusCode" in answer:
        return str(answer["statusCode"])
    return "done" if not answer.get("batchItemFailures") else "not done"


if __name__ == "__main__":
    main()
