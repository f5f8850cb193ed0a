"""The worker's handler of a chaos run: the deployed one, and notes of the jobs it holds.

Packaged as `app.py`, beside the real one as `deployed.py` (see `__main__.py`). CHAOS_NOTES names the file of the notes:
a log line is read seconds later, and the jobs that a process holds must be known when it is killed.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import deployed  # type: ignore[import-not-found]  # the file that is deployed, in the same folder

from sluice.adapters.sqs import SqsInbox
from sluice.ports.messages import received
from sluice.wiring import worker as wiring

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aws_lambda_powertools.utilities.typing import LambdaContext

    from sluice.ports.jobs import Received

NOTES: Final = Path(os.environ["CHAOS_NOTES"])


def _note(**facts: object) -> None:
    line = json.dumps({"at": time.time(), "pid": os.getpid(), **facts}) + "\n"
    with NOTES.open("a") as notes:
        notes.write(line)


def _note_taken(messages: Sequence[Received]) -> None:
    _note(takes={each.job_id: each.receive_count for each in messages if each.job_id})


class NotingInbox(SqsInbox):
    """The worker's own, which notes what it receives besides the messages of the invocation, and what it returns."""

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
        """Hold them, and say so: from now on they are visible again soon if this process dies."""
        super().put_back([(message, milliseconds) for message in messages])
        _note(hides=True)


# The one name replaced in the code under test: the deployed handler asks wiring for its worker, and must not know of
# this run. Everything else is set through the environment.
if vars(wiring).get("SqsInbox") is not SqsInbox:
    raise LookupError("wiring makes no SqsInbox any more: nothing would be noted")
vars(wiring)["SqsInbox"] = NotingInbox


def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Run an invocation; note the jobs before it, and after it that none is held."""
    _note_taken(received(event["Records"]))
    answer: dict[str, Any] = deployed.handler(event, context)
    _note(over=True)
    return answer
