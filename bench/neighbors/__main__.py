"""Run the benchmark of neighbors: `python -m bench.neighbors`; `--help` lists the options."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import httpx
from rich.console import Console
from rich.table import Table

from bench.neighbors.attacks import ATTACKS, Attack, Load
from bench.neighbors.quiet import Waited, measured
from bench.neighbors.side import Side
from scripts.claude_simulator import read, running
from scripts.local_stack import LocalStack, Ready, StackError
from scripts.local_stack.credentials import install_client_key, new_client_key

QUIET, HOSTILE = "quiet", "hostile"
RPM: Final = 600
WORKERS: Final = 4
"""Invocations at a time, for jobs and for ranges: each is a process of this machine."""

MOST_RATIO: Final = 1.5
SLACK_SECONDS: Final = 3.0
"""A longer wait by less than this is the noise of the machine."""


@dataclass(frozen=True, slots=True)
class Row:
    """The medians of one attack."""

    name: str
    attack: Attack
    beside: Waited
    harmless: Waited

    @property
    def failures(self) -> list[str]:
        """What is not as it must be."""
        found = [
            f"{self.name}: {what} {beside:.1f} s, {harmless:.1f} s beside the harmless load"
            for what, beside, harmless in (
                ("p95 start delay", self.beside.p95, self.harmless.p95),
                ("total", self.beside.total, self.harmless.total),
            )
            if beside > MOST_RATIO * harmless and beside - harmless > SLACK_SECONDS
        ]
        lost = self.beside.lost + self.harmless.lost
        twice = self.beside.billed_twice + self.harmless.billed_twice
        if lost:
            found.append(f"{self.name}: {lost} rows and jobs of the quiet tenant did not succeed")
        if twice:
            found.append(f"{self.name}: {twice} calls were billed twice")
        return found


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(prog="python -m bench.neighbors", description=__doc__)
    made.add_argument("--only", action="append", choices=ATTACKS, help="run only this attack")
    made.add_argument("--rows", type=int, default=10_000, help="rows of each load (10000)")
    made.add_argument("--repeat", type=int, default=3, help="number of runs per median (3)")
    made.add_argument("--rounds", type=int, default=3, help="rounds of the quiet tenant (3)")
    made.add_argument(
        "--lead", type=float, default=15.0, help="seconds that the load has before the first (15)"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the attacks and print the table; return 1 if a target is missed."""
    chosen = parser().parse_args(arguments)
    rows: list[Row] = []
    try:
        for name in chosen.only or ATTACKS:
            attack = ATTACKS[name]
            beside = [_once(attack, chosen, attack.load) for _ in range(chosen.repeat)]
            harmless = [_once(attack, chosen, None) for _ in range(chosen.repeat)]
            rows.append(Row(name, attack, _middle(beside), _middle(harmless)))
            print(_line(rows[-1]), flush=True)
    except (StackError, httpx.HTTPError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    Console(width=160).print(_table(rows))
    failures = [each for row in rows for each in row.failures]
    for each in failures:
        print(f"missed: {each}")
    return 1 if failures else 0


def _once(attack: Attack, chosen: argparse.Namespace, load: Load | None) -> Waited:
    """Run one load, harmless by default, and the quiet tenant beside it, on a stack of their own."""
    with _stack(attack.upstream if load else {}) as (ready, claude_url):
        quiet = Side(ready, QUIET, ready.client_key)
        hostile = Side(ready, HOSTILE, new_client_key())
        install_client_key(
            ready,
            table=ready.resources["ClientKeysTable"],
            pepper_secret=ready.resources["ClientKeyPepper"],
            key=hostile.key,
            tenant=HOSTILE,
        )
        # The first calls teach the limits, and start a process of each function.
        measured(Side(ready, "warm", ready.client_key), claude_url, 1)
        side = quiet if load and attack.by_the_quiet_tenant else hostile
        thread = threading.Thread(
            target=load or attack.harmless, args=(side, chosen.rows), daemon=True
        )
        thread.start()
        time.sleep(chosen.lead)
        try:
            return measured(quiet, claude_url, chosen.rounds)
        finally:
            side.stopped.set()
            thread.join(60)


@contextmanager
def _stack(of_hostile: Any) -> Iterator[tuple[Ready, str]]:
    """Start a stack with one organization for both tenants; the hostile one has its own if `of_hostile` is given."""
    limits = {"default": {"rpm": RPM, "itpm": 2_000_000, "otpm": 400_000}}
    shared = {"id": "org-shared", "keys": ["sk-ant-test-shared"], "limits": limits}
    own = {"id": "org-hostile", "keys": ["sk-ant-test-hostile"], "limits": limits, **of_hostile}
    settings = {
        "service": {"ttft_seconds": 0.5, "tokens_per_second": 100, "output_tokens": 50},
        "organisations": [{"request_burst_seconds": 5, **each} for each in (shared, own)],
    }
    with running(read(settings)) as claude:
        keys: list[dict[str, Any]] = [{"id": "shared", "api_key": "sk-ant-test-shared"}]
        if of_hostile:
            keys[0]["tenants"] = [QUIET]
            keys.append({"id": "own", "api_key": "sk-ant-test-hostile", "tenants": [HOSTILE]})
        pool = {"keys": [{**each, "base_url": claude.url} for each in keys]}
        local = LocalStack(
            key_pool=pool, tenant=QUIET, concurrency=WORKERS, bulk_concurrency=WORKERS
        )
        with local.running() as ready:
            yield ready, claude.url


def _middle(runs: Sequence[Waited]) -> Waited:
    """Return the medians of several runs; nothing may be lost or billed twice in any of them."""
    at = median(each.p95 for each in runs)
    return Waited(
        delays=(at,),
        total=median(each.total for each in runs),
        lost=sum(each.lost for each in runs),
        billed_twice=sum(each.billed_twice for each in runs),
    )


HEADS: Final = (
    "attack", "kind", "p95 start delay", "harmless", "ratio", "total", "harmless", "ratio", "lost",
    "billed twice",
)  # fmt: skip


def _cells(row: Row) -> tuple[str, ...]:
    beside, harmless = row.beside, row.harmless
    return (
        row.attack.what,
        row.attack.kind,
        f"{beside.p95:.1f} s",
        f"{harmless.p95:.1f} s",
        f"{beside.p95 / harmless.p95:.2f}",
        f"{beside.total:.1f} s",
        f"{harmless.total:.1f} s",
        f"{beside.total / harmless.total:.2f}",
        f"{beside.lost + harmless.lost}",
        f"{beside.billed_twice + harmless.billed_twice}",
    )


def _line(row: Row) -> str:
    return f"{row.name}: " + ", ".join(_cells(row)[2:])


def _table(rows: Sequence[Row]) -> Table:
    table = Table(*HEADS)
    for row in rows:
        table.add_row(*_cells(row))
    return table


if __name__ == "__main__":
    sys.exit(main())
