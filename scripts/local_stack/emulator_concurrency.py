"""What follows in the emulator when the account's limit of concurrent executions is reached, brought to AWS's behavior.

ministack counts executions, refuses those above LAMBDA_ACCOUNT_CONCURRENCY as AWS does, and GetAccountSettings returns
that number. What becomes of a refused execution differs:

- API Gateway answers 503 {"message": "Service Unavailable"}; ministack passes Lambda's own 429 on.
- A batch from a queue is tried again until its visibility timeout ends; then its messages are visible again, and have
  been received once more. ministack gives the batch up at once, with its messages hidden for as long.
- An event (of a schedule, or a rule) is tried again after 1, 2, 4 ... seconds until it is too old. ministack drops it.

A stream needs no change: ministack reads the same records again after a second.
"""

from __future__ import annotations

import inspect
import json
import time
from contextvars import ContextVar
from importlib import import_module
from typing import Any

Internals = Any
"""A module or object of the emulator, which has no types."""
FIRST_RETRY_SECONDS = 1.0
LONGEST_EVENT_RETRY_SECONDS = 300.0
LONGEST_BATCH_RETRY_SECONDS = 10.0
"""AWS does not publish how long it waits before it tries a batch again."""
DEFAULT_EVENT_AGE_SECONDS = 21_600
EXPECTED: dict[str, list[str]] = {
    "_execute_function": ["func", "event"],
    "_execution_record_for_config": ["func", "config"],
    "_get_func_record_for_ref": ["function_ref"],
    "_run_sqs_batch": ["esm", "func_rec", "event", "batch", "queue_url", "queue_name"],
    "invoke_async_with_retry": ["func", "event"],
    "lambda_execute_result_to_api_proxy_response": ["exec_result"],
}
"""The functions of ministack's lambda_svc that are called or replaced here, with their arguments."""

_patience: ContextVar[tuple[float, float]] = ContextVar("_patience", default=(0.0, 0.0))
"""Until when a refused execution of this context is tried again, and the longest pause between two tries."""


def enforce_account_concurrency() -> None:
    """Give a refused execution the consequences it has on AWS.

    Raises `LookupError` when the emulator does not look as expected.
    """
    lambdas: Internals = import_module("ministack.services.lambda_svc")
    events: Internals = import_module("ministack.services.eventbridge")
    for name, arguments in EXPECTED.items():
        _expect(lambdas, name, arguments)
    _expect(events, "_dispatch_to_lambda", ["arn", "payload"])
    _try_again(lambdas)
    _keep_batches(lambdas)
    _keep_events(lambdas, events)
    _answer_503(lambdas)


def _try_again(lambdas: Internals) -> None:
    execute = lambdas._execute_function  # noqa: SLF001 - it has no public face

    def execute_patiently(func: Any, event: Any) -> Any:
        until, longest = _patience.get()
        pause = FIRST_RETRY_SECONDS
        while True:
            result = execute(func, event)
            if not result.get("throttle") or time.time() + pause > until:
                return result
            time.sleep(pause)
            pause = min(longest, 2 * pause)

    lambdas._execute_function = execute_patiently  # noqa: SLF001


def _keep_batches(lambdas: Internals) -> None:
    run = lambdas._run_sqs_batch  # noqa: SLF001

    def run_patiently(*arguments: Any) -> None:
        batch = arguments[EXPECTED["_run_sqs_batch"].index("batch")]
        hidden_until = min((message["visible_at"] for message in batch), default=0.0)
        token = _patience.set((hidden_until, LONGEST_BATCH_RETRY_SECONDS))
        try:
            run(*arguments)
        finally:
            _patience.reset(token)

    lambdas._run_sqs_batch = run_patiently  # noqa: SLF001


def _keep_events(lambdas: Internals, events: Internals) -> None:
    invoke = lambdas.invoke_async_with_retry

    def invoke_patiently(func: Any, event: Any) -> None:
        configs = func.get("event_invoke_configs") or {}
        config = func.get("event_invoke_config") or configs.get("$LATEST") or {}
        age = float(config.get("MaximumEventAgeInSeconds") or DEFAULT_EVENT_AGE_SECONDS)
        token = _patience.set((time.time() + age, LONGEST_EVENT_RETRY_SECONDS))
        try:
            invoke(func, event)  # in a thread, which copies this context
        finally:
            _patience.reset(token)

    def dispatch_to_lambda(arn: str, payload: str) -> None:
        try:
            event = json.loads(payload)
        except (TypeError, ValueError):
            event = {"body": payload}
        func, config, _name = lambdas._get_func_record_for_ref(arn)  # noqa: SLF001
        if func and config:
            record = lambdas._execution_record_for_config(func, config)  # noqa: SLF001
            invoke_patiently(record, event)

    lambdas.invoke_async_with_retry = invoke_patiently
    events._dispatch_to_lambda = dispatch_to_lambda  # noqa: SLF001


def _answer_503(lambdas: Internals) -> None:
    answer = lambdas.lambda_execute_result_to_api_proxy_response

    def answer_as_api_gateway(exec_result: Any) -> Any:
        if not exec_result.get("throttle"):
            return answer(exec_result)
        headers = {"Content-Type": "application/json"}
        body = json.dumps({"message": "Service Unavailable"})
        return {"statusCode": 503, "headers": headers, "body": body}, None

    lambdas.lambda_execute_result_to_api_proxy_response = answer_as_api_gateway


def _expect(module: Internals, name: str, arguments: list[str]) -> None:
    if not hasattr(module, name):
        raise LookupError(f"{module.__name__}.{name} is missing")
    if list(inspect.signature(getattr(module, name)).parameters) != arguments:
        raise LookupError(f"{module.__name__}.{name} takes other arguments")
