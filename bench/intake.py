"""What storing the requests of a list costs: `python -m bench.intake`. One by one as single jobs are, and together.

Both ways go through the local stack's DynamoDB, and the table shows the calls and the processor time of this process,
which does what the API's function does. Calls are counted; of the times only the ratio means anything.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Final, cast
from uuid import uuid4

from rich.console import Console
from rich.table import Table

from scripts.local_stack import LocalStack
from sluice.adapters.dynamodb import DynamoParams
from sluice.adapters.s3 import Objects
from sluice.adapters.system import SystemClock
from sluice.intake.submit import PARALLEL_WRITES, STORED_AT_ONCE
from sluice.ports.jobs import Params

BODY: Final = b'{"model":"claude-haiku-5-5","max_tokens":256,"messages":[]}'
CALLS: Final[Counter[str]] = Counter()
KEY_POOL: Final = {"keys": [{"id": "a", "api_key": "sk-ant-test-intake"}]}


def count_call(event_name: str, **_: object) -> None:
    """Count a call that botocore sends."""
    CALLS[event_name] += 1


def one_by_one(store: DynamoParams, requests: Sequence[Params]) -> None:
    """Store them by conditional puts, side by side."""
    with ThreadPoolExecutor(PARALLEL_WRITES) as threads:
        list(threads.map(store.add, requests))


def together(store: DynamoParams, requests: Sequence[Params]) -> None:
    """Store them by INSERTs in batches."""
    for start in range(0, len(requests), STORED_AT_ONCE):
        some = requests[start : start + STORED_AT_ONCE]
        if len(store.add_new(some)) != len(some):
            raise SystemExit("a request was not stored: the figures mean nothing")


def measured(way: Callable[[Sequence[Params]], None], count: int) -> tuple[int, float]:
    """Return the AWS calls and the processor seconds for `count` new requests."""
    requests = [Params(f"job_{uuid4().hex}", BODY, uuid4().hex * 2) for _ in range(count)]
    calls, began = CALLS.total(), time.process_time()
    way(requests)
    return CALLS.total() - calls, time.process_time() - began


def parser() -> argparse.ArgumentParser:
    """Return what the command line may name."""
    made = argparse.ArgumentParser(prog="python -m bench.intake", description=__doc__)
    made.add_argument("--requests", type=int, default=400, help="stored each way (400)")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both, after a round that warms the connections up, and print the table."""
    count = parser().parse_args(arguments).requests
    stack = LocalStack(key_pool=KEY_POOL, tenant="bench", concurrency=2)
    with stack.running() as ready:
        table = ready.resources["ParamsTable"]
        no_objects = cast(Objects, None)  # for requests above 350 KB
        client = ready.client("dynamodb")
        client.meta.events.register("before-send.dynamodb", count_call)
        store = DynamoParams(client, table, no_objects, SystemClock(), 30)
        ways = {"one by one": partial(one_by_one, store), "together": partial(together, store)}
        for way in ways.values():
            measured(way, count)
        found = {name: measured(way, count) for name, way in ways.items()}
    table_of_both = Table("requests", "AWS calls", "CPU ms each", "ratio")
    first = found["one by one"][1]
    for name, (calls, seconds) in found.items():
        milliseconds = f"{seconds * 1000 / count:.2f}"
        table_of_both.add_row(name, str(calls), milliseconds, f"{seconds / first:.2f}")
    Console(highlight=False).print(table_of_both)


if __name__ == "__main__":
    main()
