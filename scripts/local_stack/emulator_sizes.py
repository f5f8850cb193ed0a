"""The emulator enforces AWS's sizes: memory, payloads, and what stores and queues take.

As released, ministack is laxer than AWS at the places below, so a job could pass here and fail in an account. One
function implements one limit; each names AWS's documented figure and where it is documented, and checks first that
what it replaces is there. Limits that ministack enforces by itself are pinned by tests/integration/test_aws_limits.py
beside these.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from importlib import import_module
from itertools import islice
from typing import Any, Final

from scripts.local_stack.emulator_memory import limit_memory
from scripts.local_stack.internals import Internals, expect

Answer = tuple[int, dict[str, str], bytes]
"""Status, headers and body, as the emulator's services answer."""

MIB: Final = 1024 * 1024
SYNCHRONOUS_BYTES: Final = 6_291_556
"""What Lambda's own message calls 6 MB."""
ASYNCHRONOUS_BYTES: Final = MIB
HTTP_API_BYTES: Final = 10 * MIB
MESSAGE_BYTES: Final = MIB
LONGEST_DELAY_SECONDS: Final = 900
LONGEST_VISIBILITY_SECONDS: Final = 12 * 3600
IN_FLIGHT: Final = 120_000
EVENTS_BYTES: Final = MIB
SECRET_BYTES: Final = 65_536
BATCH_GET_BYTES: Final = 16 * MIB
BATCH_GET_KEYS: Final = 100
PROJECTIONS: Final = frozenset({"ProjectionExpression", "AttributesToGet"})
RECORD_BYTES: Final = 1_000
"""What a record of an SQS event has beside its body, generously."""
TAKE: Final = "_receive_messages_for_esm"
"""The function of ministack that takes a mapping's next batch from its queue."""
INVOCATION: Final = re.compile(r"/functions/[^/]+/invocations$")


def enforce() -> None:
    """Bring the emulator to AWS's sizes. Raises `LookupError` when it does not look as expected.

    Belongs after `emulator_runner.lift_batch_cap`: these wrap the function that it replaces.
    """
    limit_memory()
    limit_requests()
    limit_responses()
    limit_http_api()
    hide_function_errors()
    limit_messages()
    limit_hiding()
    limit_in_flight()
    limit_queue_batches()
    limit_events()
    limit_secrets()
    limit_batch_get()


# ---------------------------------------------------------------- payloads


def limit_requests() -> None:
    """Refuse an Invoke of more than 6 MB, 1 MB when it is asynchronous, with 413 `RequestTooLargeException`.

    Lambda, API reference, Invoke: "For synchronous invocations, the maximum payload size is 6 MB. For asynchronous
    invocations, the maximum payload size is 1 MB."
    """
    lambdas: Internals = import_module("ministack.services.lambda_svc")
    handle = expect(lambdas, "handle_request", "method", "path", "headers", "body")
    refusal = expect(import_module("ministack.core.responses"), "error_response_json")

    async def handle_within_size(
        method: str, path: str, headers: dict[str, str], body: bytes, query_params: Any
    ) -> Answer:
        if method == "POST" and INVOCATION.search(path):
            event = headers.get("x-amz-invocation-type") == "Event"
            most = ASYNCHRONOUS_BYTES if event else SYNCHRONOUS_BYTES
            if len(body) > most:
                said = f"Request must be smaller than {most} bytes for the InvokeFunction operation"
                answer: Answer = refusal("RequestTooLargeException", said, 413)
                return answer
        answered: Answer = await handle(method, path, headers, body, query_params)
        return answered

    lambdas.handle_request = handle_within_size


def limit_responses() -> None:
    """Fail an invocation whose answer, as JSON, has more than 6,291,556 bytes: `Function.ResponseSizeTooLarge`.

    Lambda, Quotas: "Invocation payload (request and response): 6 MB each for request and response (synchronous)".
    """
    lambdas: Internals = import_module("ministack.services.lambda_svc")
    warm = expect(lambdas, "_execute_function_warm", "func", "event", "request_id")

    def execute_within_size(func: Any, event: Any, request_id: str) -> dict[str, Any]:
        result: dict[str, Any] = warm(func, event, request_id)
        if result.get("error") or _json_bytes(result.get("body")) <= SYNCHRONOUS_BYTES:
            return result
        said = (
            "Response payload size exceeded maximum allowed payload size "
            f"({SYNCHRONOUS_BYTES} bytes)."
        )
        kind = "Function.ResponseSizeTooLarge"
        log = "\n".join(filter(None, [result.get("log"), f"{kind}: {said}"]))
        return {"body": {"errorMessage": said, "errorType": kind}, "error": True, "log": log}

    lambdas._execute_function_warm = execute_within_size  # noqa: SLF001


def limit_http_api() -> None:
    """Answer for the HTTP API where it does not wait, or does not ask a function at all.

    API Gateway, Quotas of HTTP APIs: payload size 10 MB; integration timeout 30 s at most (`TimeoutInMillis`). A body
    above 10 MB, or an event above Lambda's 6 MB, is a 413; a function that is not done in time is a 503 while it
    goes on. The words of the answers are API Gateway's, which it does not document.
    """
    gateway: Internals = import_module("ministack.services.apigateway")
    execute = expect(
        gateway, "handle_execute", "api_id", "stage", "path", "method", "headers", "body"
    )
    invoke = expect(gateway, "_invoke_lambda_proxy", "integration")
    lambdas: Internals = import_module("ministack.services.lambda_svc")
    in_scope = expect(lambdas, "_execute_function_with_config_scope", "func", "event")
    running: set[asyncio.Task[Answer]] = set()

    class EventTooLarge(Exception):
        """The event is not one that Lambda would take."""

    def execute_in_scope(func: Any, event: Any) -> Any:
        # Called so for API Gateway's proxies and authorizers and for Invoke; the last has been measured as it came.
        if isinstance(event, dict) and "routeKey" in event:
            compact = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
            if len(compact.encode()) > SYNCHRONOUS_BYTES:
                raise EventTooLarge
        return in_scope(func, event)

    async def execute_within_size(*arguments: Any, **more: Any) -> Answer:
        if len(arguments[5] or b"") > HTTP_API_BYTES:
            return _in_gateways_words(413, "Request Too Long")
        answer: Answer = await execute(*arguments, **more)
        return answer

    async def invoke_within_time(integration: dict[str, Any], *rest: Any, **more: Any) -> Answer:
        task: asyncio.Task[Answer] = asyncio.ensure_future(invoke(integration, *rest, **more))
        running.add(task)
        task.add_done_callback(running.discard)
        seconds = min(int(integration.get("timeoutInMillis") or 30_000), 30_000) / 1000
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            task.add_done_callback(lambda late: late.cancelled() or late.exception())
            return _in_gateways_words(503, "Service Unavailable")
        try:
            return task.result()
        except EventTooLarge:
            return _in_gateways_words(413, "Request Too Long")

    lambdas._execute_function_with_config_scope = execute_in_scope  # noqa: SLF001
    gateway.handle_execute = execute_within_size
    gateway._invoke_lambda_proxy = invoke_within_time  # noqa: SLF001


def _in_gateways_words(status: int, message: str) -> Answer:
    body = json.dumps({"message": message}, separators=(",", ":")).encode()
    return status, {"Content-Type": "application/json"}, body


def hide_function_errors() -> None:
    """Answer a failed function with 500 `{"message":"Internal Server Error"}`, as an HTTP API does, not with its error.

    API Gateway, Troubleshooting HTTP API Lambda integrations. As released, the error's own text comes with a 502.
    """
    lambdas: Internals = import_module("ministack.services.lambda_svc")
    to_response = expect(lambdas, "lambda_execute_result_to_api_proxy_response", "exec_result")

    def to_plain_response(exec_result: dict[str, Any]) -> Any:
        if exec_result.get("error") and not exec_result.get("throttle"):
            status, headers, body = _in_gateways_words(500, "Internal Server Error")
            return {"statusCode": status, "headers": headers, "body": body.decode()}, None
        return to_response(exec_result)

    lambdas.lambda_execute_result_to_api_proxy_response = to_plain_response


# ---------------------------------------------------------------- queues


def limit_messages() -> None:
    """Count a message's attributes into its size, and refuse a delay above 900 s.

    SQS, API reference, SendMessage and SendMessageBatch: 1,048,576 bytes for a message and for all of a batch
    together, attributes (name, type and value) included; `DelaySeconds` from 0 to 900. Ten entries a batch, and the
    size of bodies alone, ministack enforces by itself.
    """
    sqs: Internals = import_module("ministack.services.sqs")
    handlers = expect(sqs, "_HANDLERS")
    error = expect(sqs, "_Err")
    send = expect(sqs, "_act_send_message", "data", "qurl")
    send_batch = expect(sqs, "_act_send_message_batch", "data", "qurl")
    queue_of = expect(sqs, "_get_q")

    def send_within_limits(data: dict[str, Any], url: str) -> Any:
        delay = data.get("DelaySeconds")
        if delay is not None and not 0 <= int(delay) <= LONGEST_DELAY_SECONDS:
            raise error(
                "InvalidParameterValue",
                f"Value {delay} for parameter DelaySeconds is invalid. "
                f"Reason: DelaySeconds must be >= 0 and <= {LONGEST_DELAY_SECONDS}.",
            )
        queue = queue_of(data.get("QueueUrl", url))
        most = int(queue["attributes"].get("MaximumMessageSize", MESSAGE_BYTES))
        if message_bytes(data) > most:
            raise error(
                "InvalidParameterValue",
                f"One or more parameters are invalid. Reason: Message must be shorter than {most} bytes.",
            )
        return send(data, url)

    def send_batch_within_limits(data: dict[str, Any], url: str) -> Any:
        size = sum(message_bytes(entry) for entry in data.get("Entries", []))
        if size > MESSAGE_BYTES and len(data["Entries"]) <= 10:  # noqa: PLR2004 - more are refused as too many
            raise error(
                "BatchRequestTooLong",
                f"Batch requests cannot be longer than {MESSAGE_BYTES} bytes. You have sent {size} bytes.",
            )
        return send_batch(data, url)

    sqs._act_send_message = send_within_limits  # noqa: SLF001 - the batch calls it by this name
    sqs._act_send_message_batch = send_batch_within_limits  # noqa: SLF001
    handlers["SendMessage"] = send_within_limits
    handlers["SendMessageBatch"] = send_batch_within_limits


def message_bytes(entry: dict[str, Any]) -> int:
    """Return the size of a message as SQS counts it: body, and each attribute's name, type and value."""
    size = len((entry.get("MessageBody") or "").encode())
    for name, attribute in (entry.get("MessageAttributes") or {}).items():
        value = attribute.get("StringValue") or ""
        binary = attribute.get("BinaryValue") or ""  # base64 on the wire
        size += len(name.encode()) + len(str(attribute.get("DataType", "")).encode())
        size += len(str(value).encode()) + len(str(binary).rstrip("=")) * 3 // 4
    return size


def limit_hiding() -> None:
    """Refuse to hide a message for more than 12 hours, counted from when it was received.

    SQS, API reference, ChangeMessageVisibility: "The maximum is 12 hours"; Developer guide, Visibility timeout: the
    12 hours count from the receive, so that changes add up. ministack bounds a queue's own attribute alone.
    """
    sqs: Internals = import_module("ministack.services.sqs")
    handlers = expect(sqs, "_HANDLERS")
    error = expect(sqs, "_Err")
    queue_of = expect(sqs, "_get_q")
    check = expect(sqs, "_validate_batch_entries", "entries", "entry_name")
    change = expect(sqs, "_act_change_visibility", "data", "qurl")
    change_batch = expect(sqs, "_act_change_visibility_batch", "data", "qurl")
    receive = expect(sqs, "_act_receive_message", "data", "qurl")
    collect = expect(sqs, "_collect_msgs")
    take = expect(sqs, TAKE, "queue_url", "max_number")

    def collect_and_stamp(*arguments: Any) -> list[dict[str, Any]]:
        return _stamped(collect(*arguments))

    def take_and_stamp(queue_url: str, max_number: int) -> list[dict[str, Any]]:
        return _stamped(take(queue_url, max_number))

    def change_within_limits(data: dict[str, Any], url: str) -> Any:
        messages = queue_of(data.get("QueueUrl", url))["messages"]
        if (said := _too_long_hidden(messages, data, time.time())) is not None:
            raise error("InvalidParameterValue", said)
        return change(data, url)

    def change_batch_within_limits(data: dict[str, Any], url: str) -> Any:
        entries = data.get("Entries", [])
        check(entries, "ChangeMessageVisibilityBatchRequestEntry")
        messages = queue_of(data.get("QueueUrl", url))["messages"]
        said = {each["Id"]: _too_long_hidden(messages, each, time.time()) for each in entries}
        good = [entry for entry in entries if said[entry["Id"]] is None]
        answer = change_batch({**data, "Entries": good}, url) if good else {}
        failure = {"Code": "InvalidParameterValue", "SenderFault": True}
        bad = [{"Id": name, "Message": text, **failure} for name, text in said.items() if text]
        return {
            "Successful": answer.get("Successful", []),
            "Failed": [*answer.get("Failed", []), *bad],
        }

    async def receive_within_limits(data: dict[str, Any], url: str) -> Any:
        if "VisibilityTimeout" in data:
            said = _too_long_hidden([], data, time.time())
            if said is not None:
                raise error("InvalidParameterValue", said)
        return await receive(data, url)

    sqs._collect_msgs = collect_and_stamp  # noqa: SLF001
    setattr(sqs, TAKE, take_and_stamp)
    handlers["ChangeMessageVisibility"] = change_within_limits
    handlers["ChangeMessageVisibilityBatch"] = change_batch_within_limits
    handlers["ReceiveMessage"] = receive_within_limits


def _stamped(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    now = time.time()
    for message in messages:
        message["received_at"] = now
    return messages


def _too_long_hidden(
    messages: list[dict[str, Any]], data: dict[str, Any], now: float
) -> str | None:
    """Return why a message may not be hidden for so long, None when it may."""
    seconds = int(data.get("VisibilityTimeout", 30))
    said = f"Value {seconds} for parameter VisibilityTimeout is invalid. Reason: "
    if not 0 <= seconds <= LONGEST_VISIBILITY_SECONDS:
        return f"{said}Must be between 0 and {LONGEST_VISIBILITY_SECONDS}, if provided."
    handle = data.get("ReceiptHandle")
    received_at = next(
        (each.get("received_at", now) for each in messages if handle == each["receipt_handle"]), now
    )
    # A second of grace: asking for the full 12 hours takes a moment itself.
    if seconds and now + seconds > received_at + LONGEST_VISIBILITY_SECONDS + 1:
        limit = f"[{LONGEST_VISIBILITY_SECONDS} seconds]"
        return f"{said}Total VisibilityTimeout for the message is beyond the limit {limit}"
    return None


def limit_in_flight() -> None:
    """Give out no message while 120,000 of a queue are in flight: `OverLimit`, and nothing for a mapping.

    SQS, Developer guide, Quotas: about 120,000 in-flight messages for a standard queue, above them ReceiveMessage
    answers `OverLimit`. Here the figure is exact.
    """
    sqs: Internals = import_module("ministack.services.sqs")
    handlers = expect(sqs, "_HANDLERS")
    error = expect(sqs, "_Err")
    collect = expect(sqs, "_collect_msgs")
    queue_of = expect(sqs, "_get_q")
    receive = handlers["ReceiveMessage"]
    take = expect(sqs, TAKE, "queue_url", "max_number")

    def room(queue: dict[str, Any]) -> int:
        if len(queue["messages"]) < IN_FLIGHT:
            return IN_FLIGHT  # no need to count
        now = time.time()
        flying = sum(
            1
            for message in queue["messages"]
            if message["receive_count"] > 0 and message["visible_at"] > now
        )
        return max(0, IN_FLIGHT - flying)

    def collect_within_room(queue: dict[str, Any], most: int, visibility_seconds: int) -> Any:
        return collect(queue, min(most, room(queue)), visibility_seconds)

    async def receive_within_room(data: dict[str, Any], url: str) -> Any:
        queue = queue_of(data.get("QueueUrl", url))
        if not queue["is_fifo"] and room(queue) == 0:
            raise error("OverLimit", f"Too many messages in flight: {IN_FLIGHT} are the most.")
        return await receive(data, url)

    def take_within_room(queue_url: str, max_number: int) -> Any:
        free = room(queue_of(queue_url))
        return take(queue_url, min(int(max_number or 1), free)) if free else []

    sqs._collect_msgs = collect_within_room  # noqa: SLF001
    setattr(sqs, TAKE, take_within_room)
    handlers["ReceiveMessage"] = receive_within_room


def limit_queue_batches() -> None:
    """End the batch of an SQS event source mapping before its event has 6 MB.

    Lambda, Using Lambda with Amazon SQS, Polling and batching behavior: a batch is complete, too, when its payload
    reaches 6 MB. As released, only the number of messages counts.
    """
    sqs: Internals = import_module("ministack.services.sqs")
    queue_of = expect(sqs, "_get_q")
    take = expect(sqs, TAKE, "queue_url", "max_number")

    def take_within_payload(queue_url: str, max_number: int) -> Any:
        most, now = int(max_number or 1), time.time()
        messages = queue_of(queue_url)["messages"]
        bodies = (each["body"] for each in messages if each.get("visible_at", 0) <= now)
        return take(queue_url, fitting(bodies, most))

    setattr(sqs, TAKE, take_within_payload)


def fitting(bodies: Iterable[str], most: int) -> int:
    """Return how many messages an event may have: `most`, or as many of these as keep it below 6 MB."""
    size = 0
    for number, body in enumerate(islice(bodies, most)):
        size += len(json.dumps(body, ensure_ascii=False).encode()) + RECORD_BYTES
        if size > SYNCHRONOUS_BYTES:
            return max(1, number)
    return most


# ---------------------------------------------------------------- stores and buses


def limit_events() -> None:
    """Refuse PutEvents whose entries have more than 1 MB together.

    EventBridge, User guide, PutEvents event entry size: time, source, detail type, detail and resources count; the
    total must be less than 1 MB (256 KB until January 2026). Ten entries, ministack enforces by itself.
    """
    events: Internals = import_module("ministack.services.eventbridge")
    put = expect(events, "_put_events", "data", "allow_aws_source")
    refusal = expect(import_module("ministack.core.responses"), "error_response_json")

    def put_within_size(data: dict[str, Any], allow_aws_source: bool = False) -> Any:  # noqa: FBT001, FBT002 - theirs
        if sum(entry_bytes(entry) for entry in data.get("Entries", [])) > EVENTS_BYTES:
            said = "Total size of the entries in the request is over the limit."
            return refusal("ValidationException", said, 400)
        return put(data, allow_aws_source)

    events._put_events = put_within_size  # noqa: SLF001


def entry_bytes(entry: dict[str, Any]) -> int:
    """Return the size of an entry of PutEvents as EventBridge counts it."""
    texts = [entry.get(name) or "" for name in ("Source", "DetailType", "Detail")]
    texts += [resource or "" for resource in entry.get("Resources") or ()]
    return (14 if entry.get("Time") is not None else 0) + sum(len(text.encode()) for text in texts)


def limit_secrets() -> None:
    """Refuse a secret value of more than 65,536 bytes.

    Secrets Manager, Quotas: secret value size 65,536 bytes; the API's `SecretString` has this maximum length.
    """
    secrets: Internals = import_module("ministack.services.secretsmanager")
    refusal = expect(import_module("ministack.core.responses"), "error_response_json")

    def within_size(handler: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
        def handle(data: dict[str, Any]) -> Any:
            if len((data.get("SecretString") or "").encode()) > SECRET_BYTES:
                said = (
                    "1 validation error detected: Value at 'secretString' failed to satisfy constraint: "
                    f"Member must have length less than or equal to {SECRET_BYTES}"
                )
                return refusal("ValidationException", said, 400)
            return handler(data)

        return handle

    for name in ("_create_secret", "_put_secret_value", "_update_secret"):
        handler = expect(secrets, name, "data")
        setattr(secrets, name, within_size(handler))


def limit_batch_get() -> None:
    """Answer BatchGetItem with 16 MB at most, the other keys as unprocessed; refuse more than 100 keys in all.

    DynamoDB, API reference, BatchGetItem: "up to 16 MB of data, which can contain as many as 100 items", and
    "Too many items requested for the BatchGetItem call". As released, sizes do not count, and 100 keys of each table
    pass. ministack enforces the other limits by itself: item 400 KB, BatchWriteItem 25 requests, BatchExecuteStatement
    25 statements, transactions of 100 actions and 4 MB, pages of 1 MB. 25 writes of 400 KB stay below the 16 MB of
    BatchWriteItem.
    """
    dynamodb: Internals = import_module("ministack.services.dynamodb")
    get = expect(dynamodb, "_batch_get_item", "data")
    size_of = expect(dynamodb, "_item_size_bytes")
    refusal = expect(import_module("ministack.core.responses"), "error_response_json")

    def stored_bytes(name: str, key: dict[str, Any]) -> int:
        answer = get({"RequestItems": {name: {"Keys": [key]}}})
        items = json.loads(answer[2]).get("Responses", {}).get(name, [])
        return sum(size_of(item) for item in items)

    def get_within_size(data: dict[str, Any]) -> Any:
        asked = data.get("RequestItems") or {}
        keys = [
            (name, key)
            for name, each in asked.items()
            if isinstance(each, dict)
            for key in each.get("Keys") or ()
        ]
        if len(keys) > BATCH_GET_KEYS:
            said = "Too many items requested for the BatchGetItem call"
            return refusal("ValidationException", said, 400)
        answer = get(data)
        projected = any(each.keys() & PROJECTIONS for each in asked.values())
        if answer[0] != HTTPStatus.OK or (not projected and len(answer[2]) <= BATCH_GET_BYTES):
            return answer  # as JSON an item is never smaller than it is stored
        within, size = 0, 0
        for name, key in keys:
            size += stored_bytes(name, key)
            if size > BATCH_GET_BYTES:
                break
            within += 1
        if within == len(keys):
            return answer
        first = get({**data, "RequestItems": _only(asked, keys[:within])})
        body = json.loads(first[2])
        body["UnprocessedKeys"] = _only(asked, keys[within:])
        return (*first[:2], json.dumps(body, ensure_ascii=False).encode())

    dynamodb._batch_get_item = get_within_size  # noqa: SLF001


def _only(asked: dict[str, Any], keys: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Return the part of a BatchGetItem that is about these keys."""
    chosen: dict[str, Any] = {}
    for name, key in keys:
        chosen.setdefault(name, {**asked[name], "Keys": []})["Keys"].append(key)
    return chosen


# ---------------------------------------------------------------- what all have


def _json_bytes(value: Any) -> int:
    """Return the size of a value as Python's Lambda runtime writes it."""
    return len(json.dumps(value, ensure_ascii=False).encode())
