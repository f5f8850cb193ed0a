"""The emulator's doors: each request needs the run's credentials or a function's own, and no web page gets in.

ministack evaluates policies when AUTH=true, and is laxer than AWS around them. Everything here narrows it, and each
function says what AWS does. What stays different is listed in docs/local_stack.md. As in emulator_runner.py, each
function first checks that what it replaces is there, and raises `LookupError` if not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from http import HTTPStatus
from importlib import import_module
from typing import Any, Final
from urllib.parse import parse_qs, quote

from scripts.local_doors import HTTP_PORT, refusal
from scripts.local_stack.internals import Internals, expect

Message = MutableMapping[str, Any]
"""An ASGI message or scope."""
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

HTTP_APIS: Final = "/_aws/execute-api/"
"""Where HTTP APIs answer. On AWS they are public; Sluice's api function checks the client key."""

PARTIQL: Final = {
    "insert": "dynamodb:PartiQLInsert",
    "select": "dynamodb:PartiQLSelect",
    "update": "dynamodb:PartiQLUpdate",
    "delete": "dynamodb:PartiQLDelete",
}
"""The action of a PartiQL statement, by its verb.

https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/ql-iam.html
"""
PARTIQL_TABLE: Final = re.compile(
    r'^\s*(?:insert\s+into|update|delete\s+from|select\b.*?\bfrom)\s+"?([A-Za-z0-9_.-]+)"?'
    r'(?:\."?([A-Za-z0-9_.-]+)"?)?',
    re.IGNORECASE | re.DOTALL,
)


def admit_one_root(key: str) -> None:
    """Let one access key alone be the account's root, and verify its signature like everybody's.

    As released, ministack takes `test`, an empty key and every 12-digit key for root, and does not verify what root
    signed. AWS verifies every signature.
    """
    evaluator: Internals = import_module("ministack.core.iam_evaluator")
    sts: Internals = import_module("ministack.services.sts")
    expect(evaluator, "_is_root_key")
    for module in (evaluator, sts):
        expect(module, "is_root_access_key")
        module.is_root_access_key = lambda candidate: candidate == key
    # Asked only where a signature is to be skipped.
    evaluator._is_root_key = lambda _candidate: False  # noqa: SLF001 - the emulator's inside


BATCHES: Final = {
    "sqs:ChangeMessageVisibilityBatch": "sqs:ChangeMessageVisibility",
    "sqs:DeleteMessageBatch": "sqs:DeleteMessage",
    "sqs:SendMessageBatch": "sqs:SendMessage",
}
"""Calls that AWS authorizes as the call they repeat.

https://docs.aws.amazon.com/AWSSimpleQueueService/latest/SQSDeveloperGuide/sqs-api-permissions-reference.html
"""


ONE_MAPPING: Final = r"/2015-03-31/event-source-mappings/[^/]+/?"
OF_LAMBDA: Final = (
    ("GET", re.compile(ONE_MAPPING), "lambda:GetEventSourceMapping"),
    ("PUT", re.compile(ONE_MAPPING), "lambda:UpdateEventSourceMapping"),
    ("DELETE", re.compile(ONE_MAPPING), "lambda:DeleteEventSourceMapping"),
    ("GET", re.compile(r"/2016-08-19/account-settings/?"), "lambda:GetAccountSettings"),
)
"""Requests to Lambda that ministack names otherwise or not at all, with the names of their operations in AWS's API."""


def name_actions_as_aws() -> None:
    """Authorize calls under the names of AWS's service authorization reference, and no call without a name.

    As released, ministack looks for actions of their own for batch calls of SQS, takes reading one event source mapping
    for listing all, and lets everything through whose name it does not find.
    """
    actions: Internals = import_module("ministack.core.iam_actions")
    name_of = expect(actions, "extract_iam_action", "service", "method", "path")

    def name(service: str, method: str, path: str, *request: Any) -> str:
        if service == "lambda":
            for its_method, its_path, action in OF_LAMBDA:
                if method == its_method and its_path.fullmatch(path):
                    return action
        found: str | None = name_of(service, method, path, *request)
        return BATCHES.get(found, found) if found else f"{service}:UnknownToTheEmulator"

    actions.extract_iam_action = name


def check_partiql() -> None:
    """Authorize each PartiQL statement by its verb, on its table or index.

    As released, ministack checks `dynamodb:BatchExecuteStatement` on every resource, an action that AWS does not have.
    """
    actions: Internals = import_module("ministack.core.iam_actions")
    of_transactions = expect(actions, "dynamodb_transaction_checks")
    arn_of = expect(actions, "_dynamodb_table_arn")

    def checks(action: str, body: bytes, region: str, account: str) -> list[tuple[str, str]]:
        if action not in {"dynamodb:ExecuteStatement", "dynamodb:BatchExecuteStatement"}:
            found: list[tuple[str, str]] = of_transactions(action, body, region, account)
            return found
        return [
            (verb, f"{arn_of(table, region, account)}{f'/index/{index}' if index else ''}")
            for verb, table, index in partiql_actions(body)
        ]

    actions.dynamodb_transaction_checks = checks


def partiql_actions(body: bytes) -> Iterator[tuple[str, str, str | None]]:
    """Yield action, table and index of each statement in a request; an unreadable one is an action nobody has."""
    asked = json.loads(body or b"{}")
    for one in asked.get("Statements", [asked]):
        statement = str(one.get("Statement", ""))
        verb = statement.split(maxsplit=1)[0].lower() if statement.strip() else ""
        named = PARTIQL_TABLE.match(statement)
        if verb in PARTIQL and named:
            yield PARTIQL[verb], named[1], named[2]
        else:
            yield "dynamodb:PartiQLUnreadable", "unreadable", None


def notify_event_sources() -> None:
    """Give policies the condition key `events:source` of a PutEvents call.

    As released, ministack knows no condition keys of EventBridge, so a grant with a condition never applies. On AWS
    each entry is checked; a call whose entries have different sources has none here, and is refused.
    """
    actions: Internals = import_module("ministack.core.iam_actions")
    of_tags = expect(actions, "request_tag_context")

    def context(service: str, action: str, body: bytes, params: dict[str, Any]) -> dict[str, Any]:
        known: dict[str, Any] = of_tags(service, action, body, params)
        if action == "events:PutEvents":
            sources = {str(each.get("Source")) for each in json.loads(body).get("Entries", ())}
            if len(sources) == 1:
                known = {**known, "events:source": sources.pop()}
        return known

    actions.request_tag_context = context


def forbid_what_may_not_be_listed() -> None:
    """Answer 403 and not 404 for a missing object, to a caller without `s3:ListBucket` on its bucket.

    https://docs.aws.amazon.com/AmazonS3/latest/API/API_GetObject.html, "Permissions".
    """
    app: Internals = import_module("ministack.app")
    handlers = expect(app, "SERVICE_HANDLERS")
    evaluator: Internals = import_module("ministack.core.iam_evaluator")
    enforce = expect(evaluator, "enforce")
    key_of = expect(app, "extract_access_key_id")
    region_of = expect(app, "extract_region")
    handle = handlers["s3"]

    async def handle_s3(
        method: str, path: str, headers: dict[str, str], body: bytes, query: dict[str, Any]
    ) -> Any:
        answer = await handle(method, path, headers, body, query)
        bucket, _, key = path.strip("/").partition("/")
        if answer[0] == HTTPStatus.NOT_FOUND and method in {"GET", "HEAD"} and key:
            may_not_list = enforce(
                key_of(headers, query),
                "s3:ListBucket",
                "s3",
                region_of(headers, query),
                resource_arn=f"arn:aws:s3:::{bucket}",
            )
            if may_not_list:
                return expect(app, "_get_module")("s3")._error(  # noqa: SLF001 - as above
                    "AccessDenied", "Access Denied", 403, path
                )
        return answer

    handlers["s3"] = handle_s3


def count_loopback_as_tls() -> None:
    """Let policies see a call on the loopback interface as one by TLS.

    The bucket's own policy denies everything else, as it should on AWS, where every SDK uses TLS.
    """
    app: Internals = import_module("ministack.app")
    pin = expect(app, "pin_request_origin")
    app.pin_request_origin = lambda address, _is_tls: pin(address, True)  # noqa: FBT003 - its signature


def guard() -> None:
    """Put a guard before the whole emulator; see `Guard`."""
    app: Internals = import_module("ministack.app")
    app.app = Guard(expect(app, "app"), _is_verified)


class Guard:
    """Passes on what an HTTP API would serve to anybody, and what is signed by a key of this run; nothing of web pages.

    As released, ministack serves its own administration (`/_ministack/*`: reset, configuration, messages) and unsigned
    S3 calls to everybody, believes query parameters that look like a signature, and permits every page of every
    browser to read its answers. Anyone who can create a function can run programs as the user.
    """

    def __init__(self, app: App, is_verified: Callable[[Message, bytes], bool]) -> None:
        self._app = app
        self._is_verified = is_verified

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it with 403."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = header_values(scope)
        host = headers.get("host", "")
        # Any port that the Host names: a test's proxy before this one passes requests on as they were signed for it.
        # The port is no part of the protection: a page cannot make its own name a loopback address.
        port = host.rpartition(":")[2]
        reason = refusal(host, headers.get("origin"), int(port) if port.isdecimal() else HTTP_PORT)
        if reason is not None:
            await _refuse(send, reason)
            return
        if is_plain(scope) and str(scope["path"]).startswith(HTTP_APIS):
            await self._app(scope, receive, _without_permissions(send))
            return
        body = await _read(receive)
        if body is None:
            return
        if not self._is_verified(scope, body):
            await _refuse(send, "the request is not signed with credentials of this run")
            return
        await self._app(scope, _again(body, receive), _without_permissions(send))


def is_plain(scope: Message) -> bool:
    """Return whether the path is in its canonical form: no `..` or `//` that another router may read differently."""
    path = str(scope["path"])
    return "//" not in path and not {"..", "."} & set(path.split("/"))


def header_values(scope: Message) -> dict[str, str]:
    """Return the headers by lower-case name; the values of one that was sent twice are joined by a comma."""
    values: dict[str, str] = {}
    for name, value in scope.get("headers", ()):
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        values[key] = f"{values[key]},{text}" if key in values else text
    return values


def _is_verified(scope: Message, body: bytes) -> bool:
    """Return whether the request is signed by a key that exists, in its header or as a presigned S3 URL."""
    evaluator: Internals = import_module("ministack.core.iam_evaluator")
    responses: Internals = import_module("ministack.core.responses")
    method, query = scope["method"], scope.get("query_string", b"").decode("latin-1")
    parameters = parse_qs(query, keep_blank_values=True)
    raw_path = scope.get("raw_path") or quote(scope["path"]).encode()
    evaluator.pin_signed_request(
        method, raw_path.decode("latin-1"), parameters, scope.get("headers", [])
    )
    evaluator.pin_signed_body(body)
    request = evaluator._signed_request.get()  # noqa: SLF001 - the emulator's inside
    if request is None:
        return False
    if request.s3_scoped:
        s3: Internals = import_module("ministack.services.s3")
        return (
            s3._verify_presigned_sigv4(  # noqa: SLF001 - as above
                method, scope["path"], header_values(scope), parameters
            )
            is None
        )
    checked = evaluator.authenticate(request.access_key_id, responses.get_account_id())
    return checked is not None and not isinstance(checked, evaluator.AuthError)


async def _read(receive: Receive) -> bytes | None:
    """Read the whole body; None if the caller disconnected."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """Give the body that was read once more, then what comes after it."""
    is_given = False

    async def receive_again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


def _without_permissions(send: Send) -> Send:
    """Leave out every permission for web pages (CORS)."""

    async def send_on(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [
                (name, value)
                for name, value in message.get("headers", ())
                if not name.lower().startswith(b"access-control-")
            ]
            message = {**message, "headers": kept}
        await send(message)

    return send_on


async def _refuse(send: Send, reason: str) -> None:
    body = json.dumps({"__type": "AccessDeniedException", "message": reason}).encode()
    headers = [
        (b"content-type", b"application/x-amz-json-1.0"),
        (b"content-length", str(len(body)).encode()),
        (b"x-amzn-errortype", b"AccessDeniedException"),
        # The rest of a body that was not read would be taken for the next request.
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})
