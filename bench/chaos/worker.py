"""The worker's handler of a chaos run: the deployed one, with shorter waits, and notes of the jobs it has in hand.

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
from sluice.adapters.sqs import SqsInbox
from sluice.domain import breakers
from sluice.messages import received

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aws_lambda_powertools.utilities.typing import LambdaContext

    from sluice.ports import Received

SETTINGS: dict[str, Any] = json.loads(Path(__file__).with_name("chaos.json").read_text())


def _shorten(module: Any, name: str, value: int) -> None:
    if name not in vars(module):
        raise LookupError(f"{module.__name__}.{name} is gone: the outage would take hours")
    setattr(module, name, value)


# So that an outage's hundred deliveries take minutes. Nothing of what is promised depends on these.
_shorten(work, "HOLD_MS", SETTINGS["hold_ms"])
_shorten(work, "LINGER_MS", 0)
_shorten(work, "REST_MS", 0)
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


def _note_taken(messages: Sequence[Received]) -> None:
    _note(takes={each.job_id: each.receive_count for each in messages if each.job_id})


class NotingInbox(SqsInbox):
    """The worker's own, which notes what it takes besides the batch it was given, and what leaves its hands."""

    def receive(self, most: int, hidden_ms: int) -> Sequence[Received]:
        """Receive, and say what."""
        messages = super().receive(most, hidden_ms)
        _note_taken(messages)
        return messages

    def delete(self, messages: Sequence[Received]) -> None:
        """Delete, and say what."""
        super().delete(messages)
        _note(leaves=[each.job_id for each in messages])

    def put_back(self, delays: Sequence[tuple[Received, int]]) -> None:
        """Put back, and say what."""
        super().put_back(delays)
        _note(leaves=[each.job_id for each, _ in delays])

    def keep_hidden(self, messages: Sequence[Received], milliseconds: int) -> None:
        """Keep them in hand."""
        super().put_back([(message, milliseconds) for message in messages])


vars(wiring)["SqsInbox"] = NotingInbox


def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Run a batch; say before what it is, and after that nothing is left in hand."""
    _note_taken(received(event["Records"]))
    answer: dict[str, Any] = deployed.handler(event, context)
    _note(over=True)
    return answer
