"""The worker's handler of a chaos run: the deployed one, with shorter waits, and notes of what it has in hand.

Packaged as `app.py`, beside the real one as `deployed.py` and `chaos.json` (see `__main__.py`).
"""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deployed  # type: ignore[import-not-found]  # the file that is deployed, in the same folder

from sluice import wiring, work
from sluice.domain import breakers

if TYPE_CHECKING:
    from aws_lambda_powertools.utilities.typing import LambdaContext

SETTINGS: dict[str, Any] = json.loads(Path(__file__).with_name("chaos.json").read_text())


def _shorten(module: Any, name: str, value: int) -> None:
    if name not in vars(module):
        raise LookupError(f"{module.__name__}.{name} is gone: the outage would take hours")
    setattr(module, name, value)


# So that an outage's hundred deliveries take minutes. Nothing of what is promised depends on these.
_shorten(work, "HOLD_MS", SETTINGS["hold_ms"])
_shorten(breakers, "PAUSE_MS", SETTINGS["pause_ms"])
_shorten(breakers, "PAUSE_CAP_MS", SETTINGS["pause_ms"])
vars(wiring)["RetryPolicy"] = partial(
    vars(wiring)["RetryPolicy"],
    overload_base_ms=SETTINGS["pause_ms"],
    overload_cap_ms=SETTINGS["pause_ms"],
)


def _note(**facts: object) -> None:
    line = json.dumps({"at": time.time(), "pid": os.getpid(), **facts}) + "\n"
    with Path(SETTINGS["notes"]).open("a") as notes:
        notes.write(line)


def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Run a batch; say before what it is, and after that it is over."""
    receives = {
        json.loads(record["body"]).get("job_id", "?"): int(
            record["attributes"]["ApproximateReceiveCount"]
        )
        for record in event["Records"]
    }
    _note(begins=context.aws_request_id, receives=receives)
    answer: dict[str, Any] = deployed.handler(event, context)
    _note(ends=context.aws_request_id)
    return answer
