"""Benchmarks and other programs run to their results, at a size of seconds (tests/smoke_runs.py lists them).

Their figures mean nothing at this size; that they lose nothing and bill nothing twice holds at any size.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.smoke_runs import ROOT, SMOKE_RUNS, SmokeRun

AT_ONCE = 3
"""They wait most of the time: for a lease, for an emulator, for a limit."""

MOST_SECONDS = 300
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "layers/sluice")))}

Ended = subprocess.CompletedProcess[str]
Runs = dict[SmokeRun, Future[Ended]]


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Runs]:
    """The runs that this session asks for, side by side, the long ones first."""

    def run(row: SmokeRun) -> Ended:
        folder = tmp_path_factory.mktemp("smoke")
        return subprocess.run(
            row.line(folder),
            cwd=ROOT,
            env=ENVIRONMENT | {"COVERAGE_FILE": str(folder / ".coverage")},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=MOST_SECONDS,
            check=False,
        )

    asked = {
        row
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
        if isinstance(row := item.callspec.params["row"], SmokeRun)
    }
    with ThreadPoolExecutor(AT_ONCE) as threads:
        try:
            yield {
                row: threads.submit(run, row) for row in sorted(asked, key=lambda row: -row.seconds)
            }
        finally:
            threads.shutdown(cancel_futures=True)


@pytest.mark.parametrize("row", SMOKE_RUNS, ids=str)
def test_the_command_runs_and_shows_its_result(row: SmokeRun, runs: Runs) -> None:
    ended = runs[row].result()

    assert 0 == ended.returncode, ended.stdout
    assert re.search(row.shows, ended.stdout), ended.stdout


def test_the_local_stack_runs_until_it_is_stopped() -> None:
    """What `make local` starts."""
    with subprocess.Popen(
        [sys.executable, "-m", "scripts.cli", "local", "up", "--port", "0"],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            line = json.loads(process.stdout.readline())
            process.send_signal(signal.SIGTERM)

            assert line["ready"]
            assert 0 == process.wait(MOST_SECONDS)
        finally:
            process.kill()
