"""Run one module or file in this process and end with the process that started it.

    python -P leash.py FOLDER MODULE|FILE.py [ARGUMENT...]

The starter keeps the other end of our standard input open. When the starter dies, however it dies,
that end closes: the scratch FOLDER is removed and this process group (the module and every process
it started) is killed. Needs the standard library only and no import of ours, so that it works
before anything else does.
"""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import sys
import threading
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def main() -> None:
    """Run what the command line names under the watch."""
    folder, target, *arguments = sys.argv[1:]
    threading.Thread(target=_die_with_starter, args=(folder,), daemon=True, name="leash").start()
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "layers" / "sluice")]
    sys.argv = [target, *arguments]
    if target.endswith(".py"):
        runpy.run_path(target, run_name="__main__")
    else:
        runpy.run_module(target, run_name="__main__", alter_sys=True)


def _die_with_starter(folder: str) -> None:
    # Not sys.stdin: a thread blocked in its buffered reader aborts an interpreter that exits.
    while os.read(0, 1024):
        pass
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
