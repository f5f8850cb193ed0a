"""The emulator's own process: ministack, pinned, with its SQS polling brought closer to Lambda's.

Everything in Sluice that knows the inside of ministack is in the files `emulator_*.py` here. In this one
`replace_poll_event` replaces one event, `lift_batch_cap` one function, `pace_streams` one function, `shorten_log_wait`
one default, and `make_dynamodb_fail`, for chaos runs alone, one function. Each first checks that what it changes is
there, because the next release may look different.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import sys
import threading
import time
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from scripts.local_stack import emulator_doors, emulator_sizes
from scripts.local_stack.emulator_concurrency import enforce_account_concurrency
from scripts.local_stack.emulator_fairness import deliver_fairly
from scripts.local_stack.internals import Internals, expect

MINISTACK_VERSION = "1.5.33"
RECEIVE = "_receive_messages_for_esm"
"""The function of ministack that takes a mapping's next batch from its queue."""
STREAMS = "_poll_dynamodb_streams"
"""The function of ministack that reads the streams of all mappings once."""
STREAM_WINDOW_SECONDS = 1.0
FAULTS_VARIABLE = "SLUICE_DYNAMODB_FAULTS"
"""Names a file like {"refuse": 0.5, "lose_reply": 0.05}: shares of DynamoDB's calls, read at each."""
FRAGILE_CALLS = frozenset(
    {
        "BatchExecuteStatement",
        "BatchGetItem",
        "BatchWriteItem",
        "GetItem",
        "PutItem",
        "Query",
        "Scan",
        "UpdateItem",
    }
)
MAX_BATCH = 10_000
"""Messages. Lambda's own ceiling for a standard queue."""


class Gathering:
    """Decides, queue by queue, when a batch is worth an invocation: full, or its window is over."""

    def __init__(self) -> None:
        self._began_at: dict[str, float] = {}

    def due_at(
        self, queue_url: str, *, visible: int, batch_size: int, window_seconds: float, now: float
    ) -> float | None:
        """Return when the batch may go (up to `now`: at once), None while nothing is visible."""
        if visible == 0:
            self._began_at.pop(queue_url, None)
            return None
        began_at = self._began_at.setdefault(queue_url, now)
        return now if visible >= batch_size else began_at + window_seconds

    def taken(self, queue_url: str) -> None:
        """Begin a new window with the next message."""
        self._began_at.pop(queue_url, None)


class Wake(threading.Event):
    """An event whose waiting ends early when something is known to be due.

    The emulator's poll loop waits for this event, or a second. A message that becomes visible in
    200 ms, or a window that closes in 200 ms, would otherwise be found up to a second late.
    """

    def __init__(self) -> None:
        super().__init__()
        self._due_at: float | None = None

    def no_later_than(self, moment: float) -> None:
        """End the next wait at `moment` (seconds since the epoch) at the latest."""
        self._due_at = moment if self._due_at is None else min(self._due_at, moment)

    def clear(self) -> None:
        """Forget the event and what was due; the poll loop calls this before each pass."""
        self._due_at = None
        super().clear()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the event, for `timeout` seconds, or until what is due."""
        if self._due_at is not None:
            until_due = max(0.001, self._due_at - time.time())
            timeout = until_due if timeout is None else min(timeout, until_due)
        return super().wait(timeout)


def replace_poll_event() -> Wake:
    """Replace the event for which the poll loop waits, before the services import it by name.

    Raises `LookupError` when the emulator does not look as expected.
    """
    concurrency: Internals = import_module("ministack.core.concurrency")
    expect(concurrency, "esm_wake")
    wake = Wake()
    concurrency.esm_wake = wake
    sqs: Internals = import_module("ministack.services.sqs")
    lambdas: Internals = import_module("ministack.services.lambda_svc")
    if any(expect(*where) is not wake for where in ((sqs, "esm_wake"), (lambdas, "_esm_wake"))):
        raise LookupError("its services were imported before the poll event was replaced")
    return wake


def lift_batch_cap(wake: Wake) -> None:
    """Let one event source mapping take its whole BatchSize, gathered over its batching window.

    As released, ministack caps every batch at 10 messages and ignores the window. Raises `LookupError` as above.
    """
    sqs: Internals = import_module("ministack.services.sqs")
    lambdas: Internals = import_module("ministack.services.lambda_svc")
    if list(inspect.signature(expect(sqs, RECEIVE)).parameters) != ["queue_url", "max_number"]:
        raise LookupError(f"sqs.{RECEIVE} takes other arguments")
    lock = expect(sqs, "_queues_lock")
    queue_of = expect(sqs, "_get_q")
    drop_expired = expect(sqs, "_expire_retained")
    move_dead_letters = expect(sqs, "_dlq_sweep")
    collect = expect(sqs, "_collect_msgs")
    all_mappings = expect(lambdas, "_iter_all_esms")
    gathering = Gathering()

    def receive_messages_for_esm(queue_url: str, max_number: int) -> list[dict[str, Any]]:
        # Called by the one poll thread, in the context of the mapping's account and region.
        batch_size = min(int(max_number or 1), MAX_BATCH)
        with lock:
            queue = queue_of(queue_url)
            drop_expired(queue)
            move_dead_letters(queue)
            now = time.time()
            later = [at for one in queue["messages"] if (at := one.get("visible_at", 0.0)) > now]
            due_at = gathering.due_at(
                queue_url,
                visible=len(queue["messages"]) - len(later),
                batch_size=batch_size,
                window_seconds=window_of(queue["attributes"].get("QueueArn")),
                now=now,
            )
            if later:
                wake.no_later_than(min(later))
            if due_at is None:
                return []
            if due_at > now:
                wake.no_later_than(due_at)
                return []
            gathering.taken(queue_url)
            visibility_seconds = int(queue["attributes"].get("VisibilityTimeout", "30"))
            batch: list[dict[str, Any]] = collect(queue, batch_size, visibility_seconds)
            return batch

    def window_of(queue_arn: str | None) -> float:
        windows = [
            float(mapping.get("MaximumBatchingWindowInSeconds") or 0)
            for _account, _region, mapping in all_mappings()
            if mapping.get("EventSourceArn") == queue_arn
        ]
        return min(windows, default=0.0)

    setattr(sqs, RECEIVE, receive_messages_for_esm)


def pace_streams() -> None:
    """Read DynamoDB streams once a second, beside the queues and not between them.

    As released, ministack invokes a stream's function for every few records, and no queue is polled meanwhile. A second
    is the window of the one stream mapping there is. Raises `LookupError` as above.
    """
    lambdas: Internals = import_module("ministack.services.lambda_svc")
    poll = expect(lambdas, STREAMS)
    if inspect.signature(poll).parameters:
        raise LookupError(f"lambda_svc.{STREAMS} takes arguments")

    def keep_polling() -> None:
        while True:
            time.sleep(STREAM_WINDOW_SECONDS)
            try:
                poll()
            except Exception as error:  # noqa: BLE001 - as the emulator's own loop: the next second is the next try
                print(f"streams: {error}", file=sys.stderr)

    lambdas.__dict__[STREAMS] = lambda: False
    threading.Thread(target=keep_polling, name="streams", daemon=True).start()


def shorten_log_wait() -> None:
    """Wait 10 ms, not 50 ms, for the first log line of an invocation that logged nothing.

    A line that comes later still is stored with the worker's next invocation. Raises `LookupError`
    as above.
    """
    worker = expect(import_module("ministack.core.lambda_runtime"), "Worker")
    drain = expect(worker, "_drain_stderr_bounded")
    names = list(inspect.signature(drain).parameters)
    if names != ["self", "first_line_wait", "idle_confirm", "hard_cap"]:
        raise LookupError("Worker._drain_stderr_bounded takes other arguments")
    _first_line_wait, idle_confirm, hard_cap = drain.__defaults__
    drain.__defaults__ = (0.010, idle_confirm, hard_cap)


def make_dynamodb_fail(file: Path) -> None:
    """Refuse a share of DynamoDB's calls, and lose the replies of another, as `file` says.

    Refused is as AWS throttles, with nothing done; a lost reply is a 500 after the call was done.
    Raises `LookupError` as above.
    """
    dynamodb: Internals = import_module("ministack.services.dynamodb")
    handle = expect(dynamodb, "handle_request")
    refusal = expect(import_module("ministack.core.responses"), "error_response_json")
    if list(inspect.signature(handle).parameters)[2] != "headers":
        raise LookupError("dynamodb.handle_request takes other arguments")
    chance = random.Random()  # noqa: S311 - chaos, not a secret

    def shares_of(action: str) -> dict[str, float]:
        return json.loads(file.read_text()) if action in FRAGILE_CALLS else {}

    async def handle_or_fail(*arguments: Any) -> Any:
        shares = shares_of(arguments[2].get("x-amz-target", "").rpartition(".")[2])
        if chance.random() < shares.get("refuse", 0):
            return refusal("ProvisionedThroughputExceededException", "chaos: throttled", 400)
        answer = await handle(*arguments)
        if chance.random() < shares.get("lose_reply", 0):
            return refusal("InternalServerError", "chaos: the reply is lost", 500)
        return answer

    dynamodb.handle_request = handle_or_fail


def enforce_permissions() -> None:
    """Serve only what is signed and allowed, as AWS does. Raises `LookupError` as above."""
    emulator_doors.admit_one_root(os.environ["AWS_ACCESS_KEY_ID"])
    emulator_doors.name_actions_as_aws()
    emulator_doors.check_partiql()
    emulator_doors.notify_event_sources()
    emulator_doors.forbid_what_may_not_be_listed()
    emulator_doors.count_loopback_as_tls()
    # Last: it goes in front of everything.
    emulator_doors.guard()


def main() -> None:
    """Check the pin, patch, serve. The settings come from the environment (see emulator.py)."""
    version = metadata.version("ministack")
    if version != MINISTACK_VERSION:
        sys.exit(f"ministack {version} is installed, but this runner requires {MINISTACK_VERSION}")
    try:
        wake = replace_poll_event()
        deliver_fairly()
        lift_batch_cap(wake)
        pace_streams()
        shorten_log_wait()
        enforce_account_concurrency()
        emulator_sizes.enforce()
        enforce_permissions()
        if FAULTS_VARIABLE in os.environ:
            make_dynamodb_fail(Path(os.environ[FAULTS_VARIABLE]))
    except LookupError as error:
        sys.exit(f"cannot apply AWS batch sizes to ministack {version}: {error}")
    sys.argv = sys.argv[:1]
    import_module("ministack.app").main()


if __name__ == "__main__":
    main()
