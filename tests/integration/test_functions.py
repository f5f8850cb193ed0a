"""The functions as Lambda calls them: real events in, AWS in memory around them, the simulator for Claude."""

from __future__ import annotations

import io
import json
import logging
import random
import re
import string
import sys
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode

import boto3
import pytest
from botocore.awsrequest import AWSResponse
from botocore.compat import HTTPHeaders
from pydantic import TypeAdapter

from functions.api import app as api_app
from functions.dead_letters import app as dead_letters_app
from functions.job_ends import app as job_ends_app
from functions.webhooks import app as webhooks_app
from functions.worker import app as worker_app
from scripts.claude_simulator import Running, read, running
from scripts.documents import openapi
from sluice.adapters.claude import SdkClaude
from sluice.adapters.sqs import SqsInbox
from sluice.api import document, views
from sluice.api.errors import HTTP_OF
from sluice.domain import waits
from sluice.domain.client_keys import key_id
from sluice.domain.errors import StoreBusy
from sluice.domain.jobs import DueFor, Job, Lease, State, claim, redrive
from sluice.domain.webhooks import signing_secret
from sluice.intake.admission import MOST_BYTES
from sluice.ports.metrics import BY_MODEL_GROUP, METRIC_NAMES, NAMESPACE, TOTALS
from sluice.wiring import shared, stores, workers
from sluice.wiring import worker as wiring
from tests.fresh import forget_what_is_wired
from tests.moto_aws import PEPPER, STACK, Aws, in_memory

EVENTS: Final = Path(__file__).resolve().parents[2] / "events"
UPSTREAM_KEY: Final = "sk-ant-test-sentinel-upstream"
CLIENT_KEY: Final = "sk-ant-test-sentinel-of-acme"
OTHER_KEY: Final = "sk-ant-test-sentinel-of-other"
DISABLED_KEY: Final = "sk-ant-test-sentinel-disabled"
PROMPT: Final = "The sentinel prompt: how high is the water?"
ANSWER: Final = re.compile(r"Answer [0-9a-f]{12}")
OF_OTHERS: Final = frozenset(
    {"AccessDenied", "OldKeys", "UnknownCosts", "WebhooksDelivered", "WebhooksGivenUp"}
)
"""Emitted by what the story does not call; they have tests of their own."""

ROOMY: Final = {"default": {"rpm": 60_000, "itpm": 60_000_000, "otpm": 60_000_000}}

SHAPES: Final[dict[tuple[str, str], TypeAdapter[Any]]] = {
    ("GET", "/health"): TypeAdapter(document.Health),
    ("POST", "/jobs"): TypeAdapter(document.SubmittedJob | document.SubmittedList | document.Batch),
    ("GET", "/batches/{id}"): TypeAdapter(document.Batch),
    ("POST", "/v1/messages/batches"): TypeAdapter(document.MessageBatch),
    ("GET", "/jobs"): TypeAdapter(document.Listing),
    ("GET", "/jobs/{id}"): TypeAdapter(document.Job),
    ("DELETE", "/jobs/{id}"): TypeAdapter(document.Job),
    ("GET", "/webhooks/secret"): TypeAdapter(document.WebhookSecret),
    ("GET", "/usage"): TypeAdapter(document.UsageReport),
    ("GET", "/limits"): TypeAdapter(document.Limits),
}
ERROR: Final = TypeAdapter(document.Error)


@dataclass(frozen=True)
class Context:
    """What Lambda reports about an invocation."""

    aws_request_id: str = "11111111-2222-3333-4444-555555555555"
    function_name: str = "sluice"
    memory_limit_in_mb: int = 512
    invoked_function_arn: str = "arn:aws:lambda:us-east-1:123456789012:function:sluice"
    milliseconds: int = 120_000

    def get_remaining_time_in_millis(self) -> int:
        return self.milliseconds


@dataclass(frozen=True)
class Answered:
    """One answer of the API."""

    status: int
    body: Any
    headers: dict[str, str]

    @property
    def error(self) -> tuple[int, str]:
        return self.status, self.body["error"]["type"]

    @property
    def message(self) -> str:
        return str(self.body["error"]["message"])


@dataclass
class Gateway:
    """The functions with everything around them."""

    cloud: Aws
    invocations: int = 0
    answers: list[Answered] = field(default_factory=list)

    def call(  # noqa: PLR0913 - what a request may have
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        key: str | None = CLIENT_KEY,
        headers: dict[str, str] | None = None,
        query: dict[str, str] | None = None,
        text: str | bytes | None = None,
    ) -> Answered:
        """Ask the API; what it says must be what docs/openapi.json promises."""
        name = "api_get.json" if body is None and text is None else "api_submit.json"
        event = json.loads((EVENTS / name).read_text())
        event["rawPath"] = event["requestContext"]["http"]["path"] = path
        event["requestContext"]["http"]["method"] = method
        del event["headers"]["x-api-key"]
        event["headers"].pop("idempotency-key", None)
        event["headers"] |= ({"x-api-key": key} if key else {}) | (headers or {})
        if query:
            event["rawQueryString"] = urlencode(query)
            event["queryStringParameters"] = dict(parse_qsl(event["rawQueryString"]))
        if isinstance(text, bytes):
            event |= {"body": b64encode(text).decode(), "isBase64Encoded": True}
        elif text is not None or body is not None:
            event["body"] = json.dumps(body) if text is None else text
        answer = api_app.handler(event, self.context())  # type: ignore[arg-type]
        answered = Answered(answer["statusCode"], json.loads(answer["body"]), answer["headers"])
        self._check(method, path, answered)
        self.answers.append(answered)
        return answered

    @staticmethod
    def _check(method: str, path: str, answered: Answered) -> None:
        route = re.sub(r"^/(jobs|batches)/.+", r"/\1/{id}", path)
        assert "application/json" == answered.headers["Content-Type"]
        assert answered.headers["request-id"].startswith("req_")
        shape = SHAPES[method, route] if answered.status < 300 else ERROR
        shape.validate_json(json.dumps(answered.body), strict=True)
        if answered.status >= 300:
            assert answered.headers["request-id"] == answered.body["request_id"]
            assert "Traceback" not in json.dumps(answered.body)

    def submit(self, *jobs: dict[str, Any]) -> list[str]:
        """Have jobs accepted; return their ids."""
        answered = self.call("POST", "/jobs", {"jobs": jobs})
        assert 202 == answered.status, answered
        assert 0 == answered.body["rejected"], answered
        return [item["job"]["id"] for item in answered.body["data"]]

    def job(self, job_id: str) -> Any:
        return self.call("GET", f"/jobs/{job_id}").body

    def context(self, milliseconds: int = 120_000) -> Context:
        self.invocations += 1
        return Context(aws_request_id=f"invocation-{self.invocations}", milliseconds=milliseconds)

    def run_worker(self, milliseconds: int = 120_000) -> list[str]:
        """Hand what is on the jobs queue to the worker, up to a batch of 50; return what it gave back."""
        return self._invoke_with_messages(
            self.cloud.jobs_queue,
            lambda event: worker_app.handler(event, self.context(milliseconds)),  # type: ignore[arg-type]
        )

    def run_dead_letters(self) -> list[str]:
        """Hand what is on the dead-letter queue to its function."""
        return self._invoke_with_messages(
            self.cloud.dead_letters_queue,
            lambda event: dead_letters_app.handler(event, self.context()),  # type: ignore[arg-type]
        )

    def run_webhooks(self) -> list[str]:
        """Hand what is on the webhooks queue to its function."""
        return self._invoke_with_messages(
            self.cloud.webhooks_queue,
            lambda event: webhooks_app.handler(event, self.context()),  # type: ignore[arg-type]
        )

    def _invoke_with_messages(
        self, url: str, handler: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> list[str]:
        records: list[dict[str, Any]] = []
        while len(records) < 50:
            some = self.cloud.sqs.receive_message(
                QueueUrl=url,
                MaxNumberOfMessages=10,
                MessageSystemAttributeNames=["All"],
                MessageAttributeNames=["All"],
                VisibilityTimeout=5_400,
            ).get("Messages", [])
            if not some:
                break
            records += [
                {
                    "messageId": each["MessageId"],
                    "receiptHandle": each["ReceiptHandle"],
                    "body": each["Body"],
                    "attributes": each["Attributes"],
                    "messageAttributes": {
                        name: {"stringValue": value["StringValue"], "dataType": value["DataType"]}
                        for name, value in each.get("MessageAttributes", {}).items()
                    },
                    "eventSource": "aws:sqs",
                }
                for each in some
            ]
        answer = handler({"Records": records})
        assert {"batchItemFailures"} == set(answer)
        failures = [failure["itemIdentifier"] for failure in answer["batchItemFailures"]]
        assert all({"itemIdentifier"} == set(each) for each in answer["batchItemFailures"])
        for each in records:
            if each["messageId"] not in failures:
                self.cloud.sqs.delete_message(QueueUrl=url, ReceiptHandle=each["receiptHandle"])
        return failures


@pytest.fixture(scope="module")
def claude() -> Iterator[Running]:
    organisation = {"id": "org-one", "keys": [UPSTREAM_KEY], "limits": ROOMY}
    service = {"ttft_seconds": 0, "tokens_per_second": None}
    with running(read({"service": service, "organisations": [organisation]})) as started:
        yield started


@pytest.fixture
def gateway(claude: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    with in_memory() as cloud:
        monkeypatch.setenv("POWERTOOLS_LOG_LEVEL", "INFO")
        for name, value in cloud.environment().items():
            monkeypatch.setenv(name, value)
        cloud.add_client_key(CLIENT_KEY, "acme")
        cloud.add_client_key(OTHER_KEY, "other")
        cloud.add_client_key(DISABLED_KEY, "acme", disabled={"BOOL": True})
        cloud.set_key_pool({"id": "main", "api_key": UPSTREAM_KEY, "base_url": claude.url})
        _start_new_environment()
        yield Gateway(cloud)
        _start_new_environment()


@pytest.fixture
def said(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Everything the functions print from here on: log lines and metrics."""
    del gateway
    printed: list[str] = []

    def everything() -> str:
        printed.extend(capsys.readouterr())
        return "".join(printed)

    return everything


class Stdout(io.StringIO):
    """Where stdout is now: Powertools keeps the first one for good, and pytest changes it from test to test."""

    def write(self, text: str) -> int:
        return sys.stdout.write(text)


def _start_new_environment() -> None:
    """Forget what the functions keep between invocations, as a new execution environment does."""
    if wiring.run_jobs.cache_info().currsize:
        sdk = wiring.run_jobs().worker.tools.claude
        assert isinstance(sdk, SdkClaude)
        worker_app._loop.run_until_complete(sdk.close())  # noqa: SLF001 - they belong to this loop
    forget_what_is_wired()
    shared.telemetry()
    for handler in logging.getLogger(STACK).handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.stream = Stdout()


def params(marker: str | None = None, **more: Any) -> dict[str, Any]:
    metadata = {} if marker is None else {"metadata": {"user_id": f"sim:{marker}"}}
    messages = [{"role": "user", "content": PROMPT}]
    return {"model": "claude-haiku-5-5", "max_tokens": 20, "messages": messages, **metadata, **more}


def a_job(
    marker: str | None = None, model: str = "claude-haiku-5-5", **more: Any
) -> dict[str, Any]:
    return {"params": params(marker, model=model), **more}


def throttle(
    operation: str,
    monkeypatch: pytest.MonkeyPatch,
    service: str = "dynamodb",
    only: Callable[[bytes], bool] = lambda _: True,
) -> None:
    """Let AWS refuse operations (names, spaces between) as throttled, where the body is so. They are not done."""

    def refuse(params: dict[str, Any], **_: Any) -> Any:
        if not only(params["body"]):
            return None
        metadata = {"HTTPStatusCode": 400, "HTTPHeaders": {}}
        error = {"Code": "ThrottlingException", "Message": "Rate exceeded"}
        refused = AWSResponse(params["url"], 400, HTTPHeaders(), io.BytesIO())
        return refused, {"Error": error, "ResponseMetadata": metadata}

    _with_hooks(
        [f"before-call.{service}.{name}" for name in operation.split()], refuse, monkeypatch
    )


def lose_replies(
    operation: str,
    monkeypatch: pytest.MonkeyPatch,
    service: str = "dynamodb",
    only: Callable[[bytes], bool] = lambda _: True,
) -> None:
    """Let AWS do an operation from now on and its answer be lost on the way, every time."""

    class Raw(io.BytesIO):
        def stream(self, **_: Any) -> Iterator[bytes]:
            yield self.read()

    def lose(request: Any, **_: Any) -> Any:
        # Moto's answer comes second and is dropped; what it has done is done.
        return AWSResponse(request.url, 500, HTTPHeaders(), Raw()) if only(request.body) else None

    _with_hooks([f"before-send.{service}.{operation}"], lose, monkeypatch)


def _with_hooks(
    events: Sequence[str], hook: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = boto3.Session()
    for event in events:
        session.events.register_first(event, hook)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", session)
    _start_new_environment()


# The API -------------------------------------------------------------------------------------------------------


def test_health_needs_no_key(gateway: Gateway) -> None:
    answered = gateway.call("GET", "/health", key=None)

    assert (200, {"status": "ok", "version": "0.1.0"}) == (answered.status, answered.body)


def test_the_recorded_events_are_answered(gateway: Gateway) -> None:
    gateway.cloud.add_client_key("sk-ant-test-client-key-of-acme", "acme")
    submit, get = (json.loads((EVENTS / f"api_{x}.json").read_text()) for x in ("submit", "get"))

    accepted = api_app.handler(submit, gateway.context())  # type: ignore[arg-type]
    missing = api_app.handler(get, gateway.context())  # type: ignore[arg-type]

    assert (202, 404) == (accepted["statusCode"], missing["statusCode"])
    assert "moons-of-mars" == json.loads(accepted["body"])["custom_id"]


def test_a_job_is_accepted_with_its_place_and_everything_it_was_sent_with(gateway: Gateway) -> None:
    answered = gateway.call(
        "POST",
        "/jobs",
        a_job(
            custom_id="mine",
            deadline="2099-01-01T00:00:00+01:00",
            fallback_models=["claude-haiku-4-5"],
            metadata={"project": "almanac"},
            lane="live",
        ),
    )

    job = answered.body
    assert 202 == answered.status
    assert f"/jobs/{job['id']}" == answered.headers["Location"]
    assert ("queued", "mine", "live") == (job["state"], job["custom_id"], job["lane"])
    assert "2098-12-31T23:00:00.000Z" == job["deadline"]
    assert ["claude-haiku-4-5"] == job["fallback_models"]
    assert {"project": "almanac"} == job["metadata"]
    assert job == gateway.job(job["id"]) | {"estimated_start_at": job["estimated_start_at"]}


@pytest.mark.parametrize(
    "headers",
    [{"authorization": f"Bearer {CLIENT_KEY}"}, {"authorization": f"bearer  {CLIENT_KEY} "},
     {"x-api-key": f" {CLIENT_KEY} "}],
)  # fmt: skip
def test_a_client_key_may_be_sent_in_either_header(
    gateway: Gateway, headers: dict[str, str]
) -> None:
    assert 200 == gateway.call("GET", "/jobs", key=None, headers=headers).status


STRANGERS: Final[list[dict[str, str]]] = [
    {},
    {"x-api-key": ""},
    {"x-api-key": "  "},
    {"x-api-key": "sk-ant-test-unknown-key"},
    {"x-api-key": DISABLED_KEY},
    {"x-api-key": CLIENT_KEY[:-1]},
    {"x-api-key": "é" * 20},
    {"authorization": CLIENT_KEY},
    {"authorization": f"Basic {CLIENT_KEY}"},
    {"authorization": "Bearer "},
]


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/jobs"), ("GET", "/jobs"), ("GET", "/jobs/job_1"), ("DELETE", "/jobs/job_1"),
     ("GET", "/usage"), ("GET", "/limits")],
)  # fmt: skip
def test_without_a_good_client_key_nothing_is_answered(
    gateway: Gateway, method: str, path: str
) -> None:
    body = a_job() if method == "POST" else None
    for headers in STRANGERS:
        answered = gateway.call(method, path, body, key=None, headers=headers)

        assert (401, "authentication_error") == answered.error
        assert "x-api-key" in answered.message


def test_an_unauthenticated_caller_learns_nothing_about_the_schema(gateway: Gateway) -> None:
    assert 401 == gateway.call("POST", "/jobs", text="{", key=None).status
    assert 401 == gateway.call("GET", "/jobs", query={"limit": "many"}, key=None).status


@pytest.mark.parametrize("as_bytes", [False, True], ids=["text", "base64"])
@pytest.mark.parametrize(
    ("megabytes", "key", "status"),
    [(3.9, None, 401), (3.9, "sk-ant-test-unknown-key", 401), (5.8, None, 413), (5.8, CLIENT_KEY, 413)],
)  # fmt: skip
def test_a_body_that_is_not_let_in_is_not_decoded(  # noqa: PLR0913 - a table
    gateway: Gateway,
    monkeypatch: pytest.MonkeyPatch,
    megabytes: float,
    key: str | None,
    status: int,
    *,
    as_bytes: bool,
) -> None:
    """A megabyte of JSON takes 50 MB and a quarter of a second to parse, so strangers must not get that far."""

    def decoded(*_: object, **__: object) -> None:
        raise AssertionError("the body was decoded")

    monkeypatch.setattr(api_app, "b64decode", decoded)
    monkeypatch.setattr(api_app.app, "resolve", decoded)
    text = '{"jobs": [' + "[]," * int(megabytes * 1_000_000 / 3) + "[]]}"

    answered = gateway.call("POST", "/jobs", text=text.encode() if as_bytes else text, key=key)

    assert status == answered.status


def test_the_health_check_ignores_a_body(gateway: Gateway) -> None:
    assert 200 == gateway.call("GET", "/health", text=b"\xff" * 1_000, key=None).status


def test_without_a_key_nobody_learns_which_routes_there_are(gateway: Gateway) -> None:
    assert 401 == gateway.call("GET", "/nothing", key=None).status
    assert 401 == gateway.call("POST", "/health", key=None).status
    assert 404 == gateway.call("GET", "/nothing").status


@pytest.mark.parametrize(
    ("deadline", "status"),
    [
        ("0001-01-01T00:00:00Z", 400),
        ("0001-01-01T00:00:00-14:00", 400),
        ("1969-12-31T23:59:59.9999Z", 400),
        ("2001-01-01T00:00:00Z", 400),
        ("9999-12-31T23:59:59.999999Z", 202),
        ("9999-12-31T23:59:59.999999+00:01", 202),
    ],
)
def test_no_deadline_makes_a_list_unreadable(gateway: Gateway, deadline: str, status: int) -> None:
    assert status == gateway.call("POST", "/jobs", a_job(deadline=deadline)).status
    jobs = [a_job(custom_id=f"row-{n}", deadline=deadline) for n in range(101)]
    listed = gateway.call("POST", "/jobs", {"jobs": jobs})
    assert listed.status in {status, 202}
    assert (
        202 == gateway.call("POST", "/jobs", {"jobs": [a_job(), a_job(deadline=deadline)]}).status
    )

    assert 200 == gateway.call("GET", "/jobs").status
    for listed_job in gateway.call("GET", "/jobs").body["data"]:
        assert gateway.job(listed_job["id"])["id"] == listed_job["id"]


def test_one_tenants_flood_is_not_anothers(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_CLIENT_REQUESTS_PER_SECOND", "1")
    _start_new_environment()

    flood = [gateway.call("GET", "/jobs") for _ in range(60)]
    others = [gateway.call("GET", "/jobs", key=OTHER_KEY) for _ in range(20)]

    assert {200} == {each.status for each in others}
    refused = [each for each in flood if each.status != 200]
    assert 30 < len(refused) < 60
    assert {(429, "rate_limit_error")} == {each.error for each in refused}
    assert {"1"} == {each.headers["retry-after"] for each in refused}


def test_each_request_is_logged_with_who_sent_it(gateway: Gateway, said: Callable[[], str]) -> None:
    gateway.call("GET", "/jobs")
    gateway.call("GET", "/jobs", key="sk-ant-test-unknown-sentinel")

    lines = [json.loads(line) for line in said().splitlines() if '"message":"request"' in line]
    facts = [
        {name: line[name] for name in ("source", "tenant", "key_id", "status") if name in line}
        for line in lines
    ]
    known = key_id(PEPPER, CLIENT_KEY)
    assert [
        {"source": "203.0.113.7", "tenant": "acme", "key_id": known, "status": 200},
        {"source": "203.0.113.7", "status": 401},
    ] == facts


BAD: Final[list[tuple[str, Any, str]]] = [
    ("malformed", '{"params": ', "the body is not valid JSON: Expecting value at character 12"),
    ("empty", "", "the body is empty"),
    ("null", "null", "the body is empty"),
    ("NaN", '{"params": NaN}', "the request has a number that is NaN"),
    ("infinite", '{"params": -1e400}', "beyond the range of a double"),
    ("deep job", {"params": params(system=json.loads("[" * 200 + "]" * 200))}, "the request is nested too deeply"),
    ("deep", "[" * 100_000, "the body is nested too deeply: at most 100 levels"),
    ("long number", "9" * 5_000, "the body has a number with too many digits"),
    ("bytes", b'{"params": "\xff"}', "not valid Unicode"),
    ("half a pair", '{"params": {"model": "\\ud83d"}}', "not valid Unicode"),
    ("a list", "[]", "must be a JSON object"),
    ("a list of jobs", [a_job(), a_job()], "must be a JSON object"),
    ("a text", '"params"', "must be a JSON object"),
    ("nothing", {}, "params: Field required"),
    ("unknown field", a_job(prioirty=1), "prioirty: Extra inputs are not permitted (got 1)"),
    ("field of params", {**a_job(), "model": "m"}, "Unknown top-level field `model`; move it inside `params`."),
    ("params left out", params(),
     "Unknown top-level fields `model`, `max_tokens`, `messages`; move them inside `params`."),
    ("no max_tokens", {"params": {"model": "m", "messages": [{}]}},
     "params.max_tokens: Field required"),
    ("no model", {"params": {"max_tokens": 1, "messages": [{}]}}, "params.model: Field required"),
    ("no messages", {"params": {"model": "m", "max_tokens": 1}}, "params.messages: Field required"),
    ("empty messages", {"params": params(messages=[])}, "params.messages: List should have at least 1 item"),
    ("text for a number", {"params": params(max_tokens="20")},
     "params.max_tokens: Input should be a valid integer (got '20')"),
    ("a float", {"params": params(max_tokens=1.5)}, "params.max_tokens"),
    ("below zero", {"params": params(max_tokens=-1)}, "greater than or equal to 0 (got -1)"),
    ("number for a model", {"params": params(model=5)}, "params.model: Input should be a valid string (got 5)"),
    ("streaming", {"params": params(stream=True)}, "params.stream: Input should be False"),
    ("params a text", {"params": "hello"}, "params: Input should be a valid dictionary"),
    ("custom_id", a_job(custom_id="not/mine"), "custom_id: String should match pattern"),
    ("unknown lane", a_job(lane="BATCH"), "lane: Input should be 'live', 'batch' or 'auto' (got 'BATCH')"),
    ("not for batches", {"params": params(speed="fast"), "lane": "batch"},
     "params.speed: not supported in Message Batches; remove it, or set lane to 'live' or 'auto'"),
    ("listed, not for batches", {"jobs": [a_job(), {"params": params(max_tokens=0)}], "lane": "batch"},
     "jobs.1.params.max_tokens: 0 is not supported in Message Batches"),
    ("no zone", a_job(deadline="2099-01-01T00:00:00"), "deadline: must be an RFC 3339 string with a time zone"),
    ("no time", a_job(deadline="tomorrow"), "deadline: must be an RFC 3339 string with a time zone"),
    ("past", a_job(deadline="2020-01-01T00:00:00Z"), "deadline is in the past"),
    ("metadata", a_job(metadata={"n": 1}), "metadata.n: Input should be a valid string (got 1)"),
    ("fallbacks", a_job(fallback_models=["m"] * 6), "fallback_models: List should have at most 5 items"),
    ("empty list", {"jobs": []}, "jobs: List should have at least 1 item"),
    ("no list", {"jobs": a_job()}, "jobs: Input should be a valid list"),
    ("beside", {"jobs": [a_job()], "webhook": "w"}, "webhook: Extra inputs are not permitted (got 'w')"),
    ("list of rubbish", {"jobs": [5]}, "Input should be a valid dictionary (got 5)"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_the_error_of_a_bad_request_says_what_is_wrong_with_it(
    gateway: Gateway, body: Any, message: str
) -> None:
    if isinstance(body, str | bytes):
        answered = gateway.call("POST", "/jobs", text=body)
    else:
        answered = gateway.call("POST", "/jobs", body)

    assert (400, "invalid_request_error") == answered.error
    assert message in answered.message
    assert PROMPT not in answered.message
    assert [] == gateway.call("GET", "/jobs").body["data"]


def test_an_item_that_cannot_be_sent_rejects_no_other(gateway: Gateway) -> None:
    bad = ['{"params": {"temperature": 1e400}}', '{"params": {"x": "\\ud83d"}}', '{"params": NaN}']
    good = json.dumps(a_job())

    answered = gateway.call("POST", "/jobs", text=f'{{"jobs": [{good}, {", ".join(bad)}, {good}]}}')

    assert (202, 2, 3) == (
        answered.status,
        answered.body["accepted"],
        answered.body["rejected"],
    )
    assert ["accepted", *["rejected"] * 3, "accepted"] == [
        each["status"] for each in answered.body["data"]
    ]


def test_a_request_that_only_fills_the_cache_is_run(gateway: Gateway, claude: Running) -> None:
    claude.engine.reset()
    (job_id,) = gateway.submit({"params": params(max_tokens=0)})

    gateway.run_worker()

    assert "succeeded" == gateway.job(job_id)["state"]
    assert 1 == claude.engine.stats()["billed"]


def test_the_error_of_an_unknown_query_parameter_lists_the_known_ones(gateway: Gateway) -> None:
    typo = gateway.call("GET", "/jobs", query={"limits": "5", "state": "queued"})
    posted = gateway.call("POST", "/jobs", a_job(), query={"dry_run": "true"})
    stranger = gateway.call("GET", "/jobs", query={"limits": "5"}, key=None)

    assert "limits: unknown query parameter; use ids, limit, page, state" == typo.message
    assert "dry_run: unknown query parameter; this route takes none" == posted.message
    assert (400, 400, 401) == (typo.status, posted.status, stranger.status)
    assert 200 == gateway.call("GET", "/jobs", query={"beta": "true"}).status, "as SDKs send it"
    assert [] == gateway.call("GET", "/jobs").body["data"]


@pytest.mark.parametrize(
    "headers",
    [
        {"idempotency-key": "k" * 256},
        {"idempotency-key": ""},
        {"anthropic-version": "newest"},
        {"anthropic-version": "\u0662026-10-21"},
        {"anthropic-beta": "bêta"},
        {"anthropic-beta": "a\nb"},
        {"anthropic-beta": " "},
    ],
)
def test_the_error_of_a_bad_header_names_it(gateway: Gateway, headers: dict[str, str]) -> None:
    answered = gateway.call("POST", "/jobs", a_job(), headers=headers)

    assert 400 == answered.status
    assert next(iter(headers)) in answered.message


@pytest.mark.parametrize("as_bytes", [False, True], ids=["text", "base64"])
def test_a_body_of_five_megabytes_is_too_large(gateway: Gateway, *, as_bytes: bool) -> None:
    text = json.dumps({"params": params(system="x" * 5_000_000)})

    answered = gateway.call("POST", "/jobs", text=text.encode() if as_bytes else text)

    assert (413, "request_too_large") == answered.error
    assert "the limit is 4,000,000" in answered.message
    assert "Send fewer jobs per list" in answered.message


def test_a_body_is_measured_as_it_was_sent_not_as_the_gateway_encodes_it(gateway: Gateway) -> None:
    text = json.dumps({"params": params(system="x" * 3_500_000)}).encode()

    assert 202 == gateway.call("POST", "/jobs", text=text).status


@pytest.mark.parametrize("over", [-1, 0, 1])
@pytest.mark.parametrize("as_bytes", [False, True], ids=["text", "base64"])
def test_a_body_of_exactly_the_limit_is_taken(
    gateway: Gateway, over: int, *, as_bytes: bool
) -> None:
    """In bytes, of which an umlaut has two."""
    frame = json.dumps({"params": params(system="")}, ensure_ascii=False)
    filling = MOST_BYTES - len(frame.encode()) + over
    text = frame.replace('"system": ""', f'"system": "{"ü" * (filling // 2)}{"x" * (filling % 2)}"')
    assert MOST_BYTES + over == len(text.encode())

    answered = gateway.call("POST", "/jobs", text=text.encode() if as_bytes else text)

    assert (413 if over > 0 else 202) == answered.status


LIMITS: Final[list[tuple[str, int, Callable[[int], dict[str, Any]]]]] = [
    ("custom_id", 64, lambda n: a_job(custom_id="x" * n)),
    ("metadata", 16, lambda n: a_job(metadata={f"k{each}": "" for each in range(n)})),
    ("name in metadata", 64, lambda n: a_job(metadata={"k" * n: ""})),
    ("value in metadata", 512, lambda n: a_job(metadata={"k": "💧" * n})),
    ("fallback_models", 5, lambda n: a_job(fallback_models=["m"] * n)),
    ("name of a fallback model", 256, lambda n: a_job(fallback_models=["m" * n])),
    ("model", 256, lambda n: {"params": params(model="m" * n)}),
    ("nesting", 100, lambda n: {"params": params(system=json.loads("[" * (n - 2) + "]" * (n - 2)))}),
]  # fmt: skip


@pytest.mark.parametrize("over", [-1, 0, 1])
@pytest.mark.parametrize(("most", "body"), [x[1:] for x in LIMITS], ids=[x[0] for x in LIMITS])
def test_a_limit_takes_what_it_says_and_no_more(
    gateway: Gateway, most: int, body: Callable[[int], dict[str, Any]], over: int
) -> None:
    answered = gateway.call("POST", "/jobs", body(most + over))

    assert (400 if over > 0 else 202) == answered.status, answered.body


def test_a_list_of_more_than_a_hundred_jobs_becomes_a_batch(gateway: Gateway) -> None:
    small, answered = (
        gateway.call("POST", "/jobs", {"jobs": [a_job() for _ in range(many)]})
        for many in (100, 101)
    )

    assert (202, "job_list") == (small.status, small.body["type"])
    assert (202, "batch", "jobs", 101) == (
        answered.status,
        answered.body["type"],
        answered.body["source"],
        answered.body["rows"]["expected"],
    )
    assert f"/batches/{answered.body['id']}" == answered.headers["Location"]


def test_a_long_list_sent_again_by_an_sdk_is_the_same_batch(gateway: Gateway) -> None:
    sent = [
        gateway.call(
            "POST", "/jobs", {"jobs": [a_job()] * 101}, headers={"x-stainless-retry-count": count}
        )
        for count in ("0", "1", "0")
    ]

    first, again, another = (each.body["id"] for each in sent)
    assert first == again != another


LANES: Final = [("batch", None), ("auto", "refuse")]


@pytest.mark.parametrize(("lane", "on_unmeetable"), LANES)
@pytest.mark.parametrize("rows", [None, 1, 101], ids=["one job", "list of one", "long list"])
def test_jobs_with_a_lane_become_a_batch_whatever_their_number(
    gateway: Gateway, rows: int | None, lane: str, on_unmeetable: str | None
) -> None:
    asked = {"lane": lane} | ({"on_unmeetable": on_unmeetable} if on_unmeetable else {})
    body = a_job() | asked if rows is None else {"jobs": [a_job()] * rows, **asked}

    answered = gateway.call("POST", "/jobs", body)

    shown = gateway.call("GET", answered.headers["Location"]).body
    assert (202, "batch", rows or 1) == (
        answered.status,
        answered.body["type"],
        answered.body["rows"]["expected"],
    )
    assert (lane, lane, on_unmeetable or "run") == tuple(
        shown[name] for name in ("lane", "lane_asked", "on_unmeetable")
    )
    assert [] == gateway.call("GET", "/jobs").body["data"]


@pytest.mark.parametrize(("lane", "on_unmeetable"), LANES)
def test_a_batch_of_an_sdk_asks_for_its_lane_by_headers(
    gateway: Gateway, lane: str, on_unmeetable: str | None
) -> None:
    headers = {"sluice-lane": lane} | (
        {"sluice-on-unmeetable": on_unmeetable} if on_unmeetable else {}
    )

    created = gateway.call(
        "POST", "/v1/messages/batches", {"requests": [a_job(custom_id="a")]}, headers=headers
    )

    shown = gateway.call("GET", f"/batches/{created.body['id']}").body
    assert (lane, lane, on_unmeetable or "run") == tuple(
        shown[name] for name in ("lane", "lane_asked", "on_unmeetable")
    )


@pytest.mark.parametrize("value", ["", "BATCH", "batch,live", "cheap"])
def test_a_header_that_names_no_lane_is_refused(gateway: Gateway, value: str) -> None:
    answers = [
        gateway.call(
            "POST",
            "/v1/messages/batches",
            {"requests": [a_job(custom_id="a")]},
            headers={name: value},
        )
        for name in ("sluice-lane", "sluice-on-unmeetable")
    ]

    assert [(400, "invalid_request_error")] * 2 == [each.error for each in answers]
    assert [
        f"sluice-lane: Input should be 'live', 'batch' or 'auto' (got {value!r})",
        f"sluice-on-unmeetable: Input should be 'run' or 'refuse' (got {value!r})",
    ] == [each.message for each in answers]


@pytest.mark.parametrize("default", ["live", "batch", "auto"])
def test_the_default_lane_is_that_of_batches_and_leaves_single_jobs_live(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, default: str
) -> None:
    monkeypatch.setenv("SLUICE_DEFAULT_LANE", default)
    _start_new_environment()

    one = gateway.call("POST", "/jobs", a_job())
    short = gateway.call("POST", "/jobs", {"jobs": [a_job()] * 100})
    long_list = gateway.call("POST", "/jobs", {"jobs": [a_job()] * 101})
    asked = gateway.call("POST", "/jobs", {"jobs": [a_job()] * 101, "lane": "live"})

    assert ("job", "live") == (one.body["type"], one.body["lane"])
    assert "job_list" == short.body["type"]
    assert (default, None) == (long_list.body["lane"], long_list.body["lane_asked"])
    assert ("live", "live") == (asked.body["lane"], asked.body["lane_asked"])


def test_one_job_for_a_lane_sent_again_is_the_same_batch(gateway: Gateway) -> None:
    headers = {"idempotency-key": "k"}
    first, again = (
        gateway.call("POST", "/jobs", a_job(lane="auto"), headers=headers) for _ in range(2)
    )
    other = gateway.call("POST", "/jobs", a_job(lane="batch"), headers=headers)

    assert first.body["id"] == again.body["id"]
    assert 409 == other.status
    assert "already used with lane 'auto' (now: lane 'batch')" in other.message


def test_a_webhook_of_one_job_is_its_batchs(gateway: Gateway) -> None:
    own = gateway.call(
        "POST",
        "/jobs",
        a_job(lane="batch", webhook="https://own.example/"),
        headers={"sluice-webhook": "https://all.example/"},
    )

    assert "https://own.example/" == own.body["webhook"]


@pytest.mark.parametrize("over", [-1, 0, 1])
@pytest.mark.parametrize(("name", "most"), [("idempotency-key", 255), ("anthropic-beta", 1_024)])
def test_a_header_may_be_as_long_as_documented(
    gateway: Gateway, name: str, most: int, over: int
) -> None:
    answered = gateway.call("POST", "/jobs", a_job(), headers={name: "x" * (most + over)})

    assert (400 if over > 0 else 202) == answered.status


def noise(length: int) -> str:
    """Text that does not compress below six bits a letter."""
    letters = string.ascii_letters + string.digits + "-_"
    return "".join(random.Random(7).choices(letters, k=length))  # noqa: S311 - not a secret


def test_a_request_too_large_for_a_message_travels_by_pointer(
    gateway: Gateway, claude: Running
) -> None:
    """SQS takes 1 MiB in one message and in one call; ours are of one size, whatever the request has."""
    claude.engine.reset()
    (job_id,) = gateway.submit(a_job() | {"params": params(system=noise(3_000_000))})
    (small,) = gateway.submit(a_job())
    kept = gateway.cloud.objects(f"params/{job_id}")

    bodies = [
        each["Body"]
        for each in gateway.cloud.sqs.receive_message(
            QueueUrl=gateway.cloud.jobs_queue, MaxNumberOfMessages=10, VisibilityTimeout=0
        )["Messages"]
    ]
    gateway.run_worker()

    assert 1 == len(kept)
    assert 2 == len(bodies)
    assert all(len(body) < 100 for body in bodies)
    assert ["succeeded"] * 2 == [gateway.job(each)["state"] for each in (job_id, small)]
    assert 2 == claude.engine.stats()["billed"]


def test_an_answer_too_large_for_a_record_is_returned_like_any_other(gateway: Gateway) -> None:
    long_name = noise(20_000)
    tools = [{"name": long_name, "input_schema": {"type": "object"}}]
    large, small = gateway.submit(
        {"params": params(tools=tools, tool_choice={"type": "any"})}, a_job()
    )
    gateway.run_worker()

    shown = gateway.job(large)
    assert [f"results/{large}-2.json.gz"] == list(gateway.cloud.objects("results/"))
    assert ("succeeded", "tool_use") == (shown["state"], shown["message"]["stop_reason"])
    assert [long_name] == [
        x["name"] for x in shown["message"]["content"] if x["type"] == "tool_use"
    ]
    assert shown.keys() == gateway.job(small).keys()


def test_a_body_that_is_not_json_can_be_too_large_too(gateway: Gateway) -> None:
    assert 413 == gateway.call("POST", "/jobs", text="[" * 4_000_001).status


def test_a_base64_body_is_a_body(gateway: Gateway) -> None:
    body = {"params": params(system="Wässrig 💧")}

    answered = gateway.call("POST", "/jobs", text=json.dumps(body, ensure_ascii=False).encode())

    assert 202 == answered.status


def test_each_item_of_a_list_has_its_own_outcome(gateway: Gateway) -> None:
    items = [
        a_job(custom_id="one"),
        {"params": {"model": "m"}},
        a_job(custom_id="one"),
        a_job(deadline="2020-01-01T00:00:00Z"),
        a_job(metadata={"emoji": "💧"}),
    ]

    answered = gateway.call("POST", "/jobs", {"jobs": items})

    body = answered.body
    assert (202, 2, 3) == (answered.status, body["accepted"], body["rejected"])
    assert "Location" not in answered.headers
    assert ["accepted", "rejected", "rejected", "rejected", "accepted"] == [
        item["status"] for item in body["data"]
    ]
    assert list(range(5)) == [item["index"] for item in body["data"]]
    assert "duplicate custom_id 'one'; first used by item 0" in body["data"][2]["error"]["message"]
    assert 2 == len(gateway.call("GET", "/jobs").body["data"])


def test_a_list_with_nothing_good_in_it_is_a_bad_request_item_by_item(gateway: Gateway) -> None:
    answered = gateway.call("POST", "/jobs", {"jobs": [{}, a_job(lane="batch")]})

    assert (400, "invalid_request_error") == answered.error
    assert ["rejected", "rejected"] == [item["status"] for item in answered.body["data"]]


def test_a_repeat_under_an_idempotency_key_finds_the_first_jobs(gateway: Gateway) -> None:
    headers = {"idempotency-key": "one, two"}
    jobs = {"jobs": [a_job(), a_job()]}

    first = gateway.call("POST", "/jobs", jobs, headers=headers).body
    again = gateway.call("POST", "/jobs", jobs, headers=headers).body
    other = gateway.call("POST", "/jobs", jobs, headers={"idempotency-key": "one, three"}).body

    ids = [[item["job"]["id"] for item in each["data"]] for each in (first, again, other)]
    assert ids[0] == ids[1]
    assert not set(ids[0]) & set(ids[2])
    changed = gateway.call("POST", "/jobs", a_job(model="claude-opus-5"), headers=headers)
    assert (409, "conflict_error") == changed.error


def test_a_custom_id_used_twice_is_a_conflict_and_a_repeat_is_not(gateway: Gateway) -> None:
    first = gateway.call("POST", "/jobs", a_job(custom_id="mine"))
    repeat = gateway.call("POST", "/jobs", a_job(custom_id="mine"))
    another = gateway.call("POST", "/jobs", a_job(custom_id="mine", metadata={"a": "b"}))
    of_another_tenant = gateway.call("POST", "/jobs", a_job(custom_id="mine"), key=OTHER_KEY)

    assert first.body["id"] == repeat.body["id"] != of_another_tenant.body["id"]
    assert (409, "conflict_error") == another.error
    assert "custom_id 'mine' was already used for a different request" in another.message


def test_another_tenants_job_does_not_exist(gateway: Gateway) -> None:
    (job_id,) = gateway.submit(a_job())

    for method in ("GET", "DELETE"):
        answered = gateway.call(method, f"/jobs/{job_id}", key=OTHER_KEY)
        assert (404, "not_found_error") == answered.error
    assert [] == gateway.call("GET", "/jobs", key=OTHER_KEY).body["data"]
    assert [] == gateway.call("GET", "/jobs", query={"ids": job_id}, key=OTHER_KEY).body["data"]
    assert "queued" == gateway.job(job_id)["state"]


@pytest.mark.parametrize(
    "job_id", ["job_none", "%2e%2e", "job_" + "é" * 9, "x" * 65, "a b", "a,b", "%00"]
)
def test_a_job_that_is_not_there_is_not_found(gateway: Gateway, job_id: str) -> None:
    assert gateway.call("GET", f"/jobs/{job_id}").status in {400, 404}


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/"), ("PUT", "/jobs"), ("POST", "/health"), ("GET", "/jobs/a/b"), ("GET", "/v1")],
)
def test_what_is_not_served_is_not_found(gateway: Gateway, method: str, path: str) -> None:
    answered = gateway.call(method, path)

    assert (404, "not_found_error") == answered.error
    assert f"{method} {path} does not exist" in answered.message


def test_jobs_are_listed_page_by_page_and_by_state_and_by_id(gateway: Gateway) -> None:
    ids = gateway.submit(*[a_job() for _ in range(5)])
    gateway.call("DELETE", f"/jobs/{ids[0]}")

    first = gateway.call("GET", "/jobs", query={"limit": "3"}).body
    rest = gateway.call("GET", "/jobs", query={"limit": "3", "page": first["next_page"]}).body
    canceled = gateway.call("GET", "/jobs", query={"state": "canceled"}).body
    wanted = [ids[3], "job_none", "x" * 3_000, ids[1], ids[3]]
    named = gateway.call("GET", "/jobs", query={"ids": ",".join(wanted)}).body

    assert (3, True) == (len(first["data"]), first["has_more"])
    assert set(ids) == {job["id"] for page in (first, rest) for job in page["data"]}
    assert (False, None) == (rest["has_more"], rest["next_page"])
    assert [ids[0]] == [job["id"] for job in canceled["data"]]
    assert [ids[3], ids[1]] == [job["id"] for job in named["data"]]


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/jobs", {"limit": "0"}),
        ("/jobs", {"limit": "101"}),
        ("/jobs", {"limit": "many"}),
        ("/jobs", {"state": "sleeping"}),
        ("/jobs", {"page": "nonsense"}),
        ("/jobs", {"page": "MSM"}),
        ("/jobs", {"page": "x" * 300}),
        ("/jobs", {"ids": ",".join(["job_1"] * 101)}),
        ("/usage", {"from": "yesterday"}),
        ("/usage", {"from": "2026-11-02", "to": "2026-11-01"}),
        ("/usage", {"from": "2020-01-01", "to": "2026-11-01"}),
        ("/usage", {"group_by": "day,tenant"}),
        ("/jobs", {"cursor": "x"}),
        ("/jobs/job_1", {"verbose": "1"}),
        ("/usage", {"by": "day"}),
        ("/limits", {"model": "claude-haiku-5-5"}),
    ],
)
def test_a_bad_query_is_rejected_with_its_name(
    gateway: Gateway, path: str, query: dict[str, str]
) -> None:
    answered = gateway.call("GET", path, query=query)

    assert (400, "invalid_request_error") == answered.error
    name = "from" if path == "/usage" and "from" in query else next(iter(query))
    assert name in answered.message


def test_a_job_is_canceled_before_its_call_and_never_called(
    gateway: Gateway, claude: Running
) -> None:
    (job_id,) = gateway.submit(a_job())
    billed = claude.engine.books.counts["billed"]

    canceled = gateway.call("DELETE", f"/jobs/{job_id}")
    again = gateway.call("DELETE", f"/jobs/{job_id}")
    assert [] == gateway.run_worker()

    assert ("canceled", True) == (canceled.body["state"], canceled.body["cancel_requested"])
    assert canceled.body == again.body == gateway.job(job_id)
    assert billed == claude.engine.books.counts["billed"]


def test_a_running_job_is_asked_to_stop(gateway: Gateway) -> None:
    (job_id,) = gateway.submit(a_job())
    job = stores.jobs().get(job_id)
    assert job is not None
    lease = Lease("somebody", shared.CLOCK.now() + 60_000)
    stores.jobs().replace(
        replace(job, state=State.RUNNING, lease=lease, version=job.version + 1), job.version
    )

    answered = gateway.call("DELETE", f"/jobs/{job_id}")

    assert ("running", True) == (answered.body["state"], answered.body["cancel_requested"])


def test_a_busy_store_is_reported_with_a_time_to_retry(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job_id,) = gateway.submit(a_job())
    throttle("GetItem", monkeypatch)

    answered = gateway.call("GET", f"/jobs/{job_id}")

    assert (503, "overloaded_error") == answered.error
    assert "2" == answered.headers["retry-after"]


def test_a_busy_store_rejects_what_it_did_not_take(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    throttle("PutItem BatchExecuteStatement", monkeypatch)

    one = gateway.call("POST", "/jobs", a_job())
    some = gateway.call("POST", "/jobs", {"jobs": [{}, *[a_job() for _ in range(20)]]})

    # The status of a list is that of a retryable item; each item has its own error.
    for answered in (one, some):
        assert (503, "overloaded_error") == answered.error
        assert "2" == answered.headers["retry-after"]
    kinds = [item["error"]["type"] for item in some.body["data"]]
    assert ["invalid_request_error", *["overloaded_error"] * 20] == kinds
    assert [] == gateway.call("GET", "/jobs").body["data"]


def test_of_a_list_that_was_half_taken_each_item_says_so(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlucky = b"unlucky"
    throttle("PutItem BatchExecuteStatement", monkeypatch, only=lambda body: unlucky in body)
    jobs = [a_job(metadata={"is": "unlucky" if n % 2 else "lucky"}) for n in range(20)]

    answered = gateway.call("POST", "/jobs", {"jobs": jobs})

    body = answered.body
    assert (202, 10, 10) == (answered.status, body["accepted"], body["rejected"])
    assert "2" == answered.headers["retry-after"]
    assert ["accepted", "rejected"] * 10 == [item["status"] for item in body["data"]]
    assert 10 == len(gateway.call("GET", "/jobs").body["data"])
    assert [] == gateway.run_worker()
    assert {"succeeded"} == {
        gateway.job(item["job"]["id"])["state"] for item in body["data"] if "job" in item
    }


def test_a_busy_queue_costs_no_job_and_no_500(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does not take is parked: the sweep sends it."""
    throttle("SendMessageBatch", monkeypatch, service="sqs")

    answered = gateway.call("POST", "/jobs", {"jobs": [a_job() for _ in range(20)]})

    assert (202, 20) == (answered.status, answered.body["accepted"])
    due = stores.jobs().due(DueFor.CALL, shared.CLOCK.now(), 100)
    assert {each.job_id for each in due} == {item["job"]["id"] for item in answered.body["data"]}


@pytest.mark.parametrize(
    ("service", "operation", "what", "number"),
    [
        ("dynamodb", "PutItem", b"JobsTable", 1),
        ("dynamodb", "BatchExecuteStatement", b"JobsTable", 10),
        ("sqs", "SendMessageBatch", b"", 10),
    ],
)
def test_a_lost_reply_costs_no_job_and_makes_none_twice(  # noqa: PLR0913, PLR0917 - a story with a place
    gateway: Gateway,
    claude: Running,
    monkeypatch: pytest.MonkeyPatch,
    service: str,
    operation: str,
    what: bytes,
    number: int,
) -> None:
    """Stored and called rejected, a job would run all the same, and again when its caller tries again."""
    claude.engine.reset()
    with monkeypatch.context() as lossy:
        lose_replies(operation, lossy, service, lambda body: what in body)
        answered = gateway.call("POST", "/jobs", {"jobs": [a_job() for _ in range(number)]})
    _start_new_environment()

    assert (202, number) == (answered.status, answered.body["accepted"])
    gateway.run_worker()  # of several messages about a job, one is acknowledged and the others are returned
    states = [gateway.job(item["job"]["id"])["state"] for item in answered.body["data"]]
    assert (number * ["succeeded"], number) == (states, claude.engine.stats()["billed"])


def test_a_submit_is_answered_even_if_its_start_cannot_be_estimated(gateway: Gateway) -> None:
    gateway.cloud.dynamodb.delete_table(TableName="LimitsTable")

    answered = gateway.call("POST", "/jobs", a_job())

    assert (202, None) == (answered.status, answered.body["estimated_start_at"])


def test_a_webhook_is_a_jobs_own_or_the_requests(gateway: Gateway) -> None:
    answered = gateway.call(
        "POST",
        "/jobs",
        {"jobs": [a_job(), a_job(webhook="https://own.example/")]},
        headers={"sluice-webhook": "https://all.example/"},
    )

    shown = [gateway.job(item["job"]["id"])["webhook"] for item in answered.body["data"]]
    assert ["https://all.example/", "https://own.example/"] == shown


def test_a_long_lists_webhook_is_the_batchs(gateway: Gateway) -> None:
    answered = gateway.call(
        "POST",
        "/jobs",
        {"jobs": [a_job()] * 101},
        headers={"sluice-webhook": "https://all.example/"},
    )

    assert "https://all.example/" == answered.body["webhook"]


def test_a_webhook_to_a_private_address_is_rejected_in_every_field(gateway: Gateway) -> None:
    private = "https://10.0.0.1/"

    answers = [
        gateway.call("POST", "/jobs", a_job(webhook=private)),
        gateway.call("POST", "/jobs", a_job(), headers={"sluice-webhook": private}),
    ]

    assert [(400, "invalid_request_error")] * 2 == [each.error for each in answers]
    assert [
        "webhook: must not point to a private address (10.0.0.1) (got 'https://10.0.0.1/')",
        "sluice-webhook: must not point to a private address (10.0.0.1) (got 'https://10.0.0.1/')",
    ] == [each.message for each in answers]


def test_each_tenant_is_shown_the_secret_of_its_webhooks_and_no_other(gateway: Gateway) -> None:
    secrets = [
        gateway.call("GET", "/webhooks/secret", key=key).body["secret"]
        for key in (CLIENT_KEY, CLIENT_KEY, OTHER_KEY)
    ]

    assert signing_secret("first", "acme") == secrets[0] == secrets[1] != secrets[2]


def test_an_end_in_the_stream_becomes_a_webhook_that_waits_for_its_receiver(
    gateway: Gateway, said: Callable[[], str]
) -> None:
    event = json.loads((EVENTS / "stream_job_ended.json").read_text())

    answer = job_ends_app.handler(event, gateway.context())  # type: ignore[arg-type]

    assert {"batchItemFailures": []} == answer
    assert 1 == len(gateway.run_webhooks()), "hooks.acme.example leads nowhere"
    log = said()
    assert "the host name does not resolve" in log
    assert "https://hooks.acme.example" not in log


def test_a_stream_record_that_could_not_be_published_is_retried_from_that_job(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = json.loads((EVENTS / "stream_job_ended.json").read_text())
    (record,) = event["Records"]
    throttle("PutEvents", monkeypatch, "eventbridge")

    answer = job_ends_app.handler(event, gateway.context())  # type: ignore[arg-type]

    number = record["dynamodb"]["SequenceNumber"]
    assert {"batchItemFailures": [{"itemIdentifier": number}]} == answer


def test_the_recorded_webhook_is_tried(gateway: Gateway) -> None:
    event = json.loads((EVENTS / "sqs_webhook.json").read_text())
    # A delivery as old as the recording would not be retried.
    event["Records"][0]["attributes"]["SentTimestamp"] = str(shared.CLOCK.now())
    # Whether its receipt is one of this queue's does not matter to the function.
    answer = webhooks_app.handler(event, gateway.context())  # type: ignore[arg-type]

    (failure,) = answer["batchItemFailures"]
    assert event["Records"][0]["messageId"] == failure["itemIdentifier"]


def test_an_sdk_that_sends_again_makes_no_second_job(gateway: Gateway) -> None:
    first, again, other = (
        gateway.call("POST", "/jobs", a_job(), headers={"x-stainless-retry-count": count})
        for count in ("0", "1", "0")
    )

    assert first.body["id"] == again.body["id"] != other.body["id"]
    assert 2 == len(gateway.call("GET", "/jobs").body["data"])


def test_a_submit_makes_as_many_calls_to_aws_whatever_waits_already(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its latency is theirs, so it does not grow with the backlog."""
    calls: list[str] = []
    session = boto3.Session()
    session.events.register("before-call", lambda model, **_: calls.append(model.name))
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", session)

    def cost_of(*jobs: dict[str, Any]) -> Counter[str]:
        _start_new_environment()
        calls.clear()
        gateway.submit(*jobs)
        return Counter(calls)

    one, many = [a_job()], [a_job() for _ in range(100)]
    before = cost_of(*one), cost_of(*many)
    for _ in range(5):
        gateway.submit(*many)
    after = cost_of(*one), cost_of(*many)

    around = {
        "GetSecretValue": 1,
        "GetItem": 1,
        "GetQueueAttributes": 1,
        "Scan": 1,
        "BatchGetItem": 1,
    }
    assert before == after
    assert around | {"PutItem": 2, "SendMessageBatch": 1} == before[0]
    assert around | {"BatchExecuteStatement": 8, "SendMessageBatch": 10} == before[1]


def test_a_surprise_says_nothing_to_the_caller_and_all_to_the_log(
    gateway: Gateway, said: Callable[[], str]
) -> None:
    gateway.cloud.dynamodb.delete_table(TableName="LimitsTable")

    answered = gateway.call("GET", "/limits")

    assert (500, "api_error") == answered.error
    assert "Limits" not in answered.message
    assert answered.body["request_id"] in said()
    assert "ResourceNotFoundException" in said()


# The worker ----------------------------------------------------------------------------------------------------


def test_a_job_goes_through_and_shows_everything(gateway: Gateway) -> None:
    marker = "thinking,input=50,cache_read=10,tokens=20"
    (job_id,) = gateway.submit(a_job(marker))

    assert [] == gateway.run_worker()

    job = gateway.job(job_id)
    (attempt,) = job["attempts"]
    assert ("succeeded", 1, 0) == (job["state"], job["attempts_used"], job["snoozes"])
    assert ["thinking", "text"] == [block["type"] for block in job["message"]["content"]]
    assert job["message"]["content"][1]["text"] == job["text"]
    assert ANSWER.match(job["text"])
    assert (40, 10, 20) == tuple(
        job["usage"][each] for each in ("input_tokens", "cache_read_input_tokens", "output_tokens")
    )
    assert 0 < job["cost_micro_usd"] == attempt["cost_micro_usd"]
    assert ("succeeded", job["usage"]) == (attempt["outcome"], attempt["usage"])
    assert attempt["request_id"].startswith("req_")
    usage = gateway.call("GET", "/usage", query={"group_by": "model,lane"}).body
    assert job["cost_micro_usd"] == usage["total"]["cost_micro_usd"]
    assert [("claude-haiku-5-5", "live", 1)] == [
        (row["model"], row["lane"], row["calls"]) for row in usage["data"]
    ]


def test_the_limits_that_an_answer_taught_are_shown(gateway: Gateway) -> None:
    gateway.submit(a_job())
    assert {"data": []} == gateway.call("GET", "/limits").body
    gateway.run_worker()

    (group,) = gateway.call("GET", "/limits").body["data"]

    assert "org-one" == group["organization"]
    assert group["learned"]
    assert 60_000 == group["limits"]["requests"]


def test_a_batch_of_fifty_runs_side_by_side_and_each_is_billed_once(
    gateway: Gateway, claude: Running
) -> None:
    claude.engine.reset()
    ids = gateway.submit(*[a_job(f"slow=0.3 {number}") for number in range(50)])

    assert [] == gateway.run_worker()

    states = {gateway.job(job_id)["state"] for job_id in ids}
    stats = claude.engine.stats()
    assert {"succeeded"} == states
    assert (50, 0) == (stats["billed"], stats["duplicates"]["count"])
    assert 1 < stats["organisations"]["org-one"]["model_groups"]["haiku-5-5"]["most_in_flight"]


def test_two_messages_of_one_job_in_one_batch_make_one_call(
    gateway: Gateway, claude: Running
) -> None:
    claude.engine.reset()
    ids = gateway.submit(*[a_job("slow=0.2", custom_id=f"twice-{number}") for number in range(10)])
    for job_id in ids:
        gateway.cloud.sqs.send_message(
            QueueUrl=gateway.cloud.jobs_queue, MessageBody=json.dumps({"v": 1, "job_id": job_id})
        )

    gateway.run_worker()

    assert 10 == claude.engine.stats()["billed"]
    assert {("succeeded", 1)} == {
        (job["state"], job["attempts_used"]) for job in map(gateway.job, ids)
    }


def test_only_unfinished_messages_are_returned(gateway: Gateway) -> None:
    good, bad, failing, throttled = gateway.submit(
        a_job("tokens=1"),
        a_job("400", model="claude-opus-5"),
        a_job("503x1", model="claude-sonnet-5"),
        a_job("429x1,retry_after=30", model="claude-opus-4-8"),
    )

    # No time is left to wait for another try.
    failures = gateway.run_worker(milliseconds=60_000)

    assert 2 == len(failures)
    assert "succeeded" == gateway.job(good)["state"]
    refused = gateway.job(bad)
    assert ("errored", "invalid_request_error") == (refused["state"], refused["error"]["type"])
    tries = gateway.job(failing)
    assert ("queued", 1) == (tries["state"], tries["attempts_used"])
    assert [(503, "retry")] == [(a["error"]["status"], a["outcome"]) for a in tries["attempts"]]
    waiting = gateway.job(throttled)
    assert ("queued", 0, 1) == (waiting["state"], waiting["attempts_used"], waiting["snoozes"])


def test_a_job_that_only_met_429s_has_used_no_attempt(gateway: Gateway) -> None:
    gateway.submit(a_job())  # whose answer names the organization of the key
    gateway.run_worker()
    (job_id,) = gateway.submit(a_job("429x1,retry_after=30"))

    (failure,) = gateway.run_worker()

    job = gateway.job(job_id)
    assert failure
    assert ("queued", 0, 1) == (job["state"], job["attempts_used"], job["snoozes"])
    assert [] == job["attempts"]
    (group,) = gateway.call("GET", "/limits").body["data"]
    assert "rate limited" == group["blocked_reason"]


def test_a_worker_reads_its_job_again_and_again_during_a_call(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it notices a cancel, and that its lease is lost. Its role must allow the read."""
    monkeypatch.setattr(waits, "CANCEL_CHECK_MS", 50)
    (job_id,) = gateway.submit(a_job("slow=1"))

    assert [] == gateway.run_worker()

    assert "succeeded" == gateway.job(job_id)["state"]


def test_a_canary_tests_the_wiring_without_a_call(gateway: Gateway, claude: Running) -> None:
    claude.engine.reset()
    gateway.cloud.sqs.send_message(
        QueueUrl=gateway.cloud.jobs_queue, MessageBody='{"v": 1, "canary": "test-1"}'
    )

    assert [] == gateway.run_worker()

    key = {"id": {"S": "canary#test-1"}}
    assert "Item" in gateway.cloud.dynamodb.get_item(TableName="LimitsTable", Key=key)
    assert 0 == claude.engine.stats()["requests"]


FOREIGN: Final = ["hello", '{"v": 1, "job_id": "job_' + "0" * 32 + '"}', '{"v": 7}', "[" * 100_000]


def test_a_message_that_is_not_ours_is_kept_with_its_reason(gateway: Gateway) -> None:
    (job_id,) = gateway.submit(a_job())
    for body in FOREIGN:
        gateway.cloud.sqs.send_message(QueueUrl=gateway.cloud.jobs_queue, MessageBody=body)

    assert [] == gateway.run_worker()
    assert [] == gateway.run_dead_letters()

    assert "succeeded" == gateway.job(job_id)["state"]
    letters = [json.loads(text) for text in gateway.cloud.objects("dead-letters/").values()]
    assert set(FOREIGN) == {letter["body"] for letter in letters}
    assert {"not a message of Sluice's", "no such job"} == {letter["reason"] for letter in letters}


def test_the_recorded_batch_is_answered(gateway: Gateway) -> None:
    """Its jobs are unknown here, so it ends on the dead-letter queue, whole."""
    event = json.loads((EVENTS / "sqs_two_jobs.json").read_text())

    answer = worker_app.handler(event, gateway.context())  # type: ignore[arg-type]

    assert {"batchItemFailures": []} == answer
    assert [] == gateway.run_dead_letters()
    assert 2 == len(gateway.cloud.objects("dead-letters/"))


def test_a_worker_that_dies_while_it_starts_leaves_its_messages_to_others_soon(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the time of a lease, here none, and not after the queue's 90 minutes."""
    (job_id,) = gateway.submit(a_job())
    with monkeypatch.context() as patch:
        patch.setattr(wiring, "LEASE_MS", 0)
        patch.setattr(workers, "prices", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gateway.run_worker()

    assert [] == gateway.run_worker()
    assert "succeeded" == gateway.job(job_id)["state"]


def test_a_worker_that_cannot_reach_its_queue_at_first_still_runs_its_jobs(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job_id,) = gateway.submit(a_job())

    def busy(*_: object) -> None:
        raise StoreBusy("the jobs queue")

    monkeypatch.setattr(SqsInbox, "keep_hidden", busy)

    assert [] == gateway.run_worker()
    assert "succeeded" == gateway.job(job_id)["state"]


def test_a_worker_without_a_readable_pool_gives_its_messages_back(gateway: Gateway) -> None:
    gateway.cloud.secrets.put_secret_value(SecretId="KeyPoolSecret", SecretString=UPSTREAM_KEY)
    (job_id,) = gateway.submit(a_job())

    (failure,) = gateway.run_worker()

    assert failure
    assert ("queued", 0) == tuple(gateway.job(job_id)[x] for x in ("state", "attempts_used"))


# Dead letters --------------------------------------------------------------------------------------------------


def test_a_dead_letter_ends_its_job_and_keeps_its_body(gateway: Gateway) -> None:
    event = json.loads((EVENTS / "sqs_dead_letter.json").read_text())
    record = event["Records"][0]
    job_id = json.loads(record["body"])["job_id"]
    stores.jobs().add(
        Job(job_id, "acme", "claude-haiku-5-5", shared.CLOCK.now(), "h", 1, 1, "2026-10-21")
    )

    answer = dead_letters_app.handler(event, gateway.context())  # type: ignore[arg-type]
    again = dead_letters_app.handler(event, gateway.context())  # type: ignore[arg-type]

    job = gateway.job(job_id)
    assert {"batchItemFailures": []} == answer == again
    assert ("errored", "dead_letter") == (job["state"], job["error"]["type"])
    assert "received 1001 times without being deleted" == job["error"]["message"]
    (text,) = gateway.cloud.objects("dead-letters/").values()
    assert record["body"] == json.loads(text)["body"]


def test_a_job_that_has_ended_is_not_changed_by_its_dead_letter(gateway: Gateway) -> None:
    (job_id,) = gateway.submit(a_job())
    gateway.call("DELETE", f"/jobs/{job_id}")
    body = json.dumps({"v": 1, "job_id": job_id})
    gateway.cloud.sqs.send_message(QueueUrl=gateway.cloud.dead_letters_queue, MessageBody=body)

    assert [] == gateway.run_dead_letters()

    assert "canceled" == gateway.job(job_id)["state"]
    assert 1 == len(gateway.cloud.objects("dead-letters/"))


def test_a_dead_letter_whose_job_is_running_is_received_again(gateway: Gateway) -> None:
    (job_id,) = gateway.submit(a_job())
    job = stores.jobs().get(job_id)
    assert job is not None
    running = claim(job, "somebody", shared.CLOCK.now(), shared.CLOCK.now() + 60_000)
    stores.jobs().replace(running, job.version)
    body = json.dumps({"v": 1, "job_id": job_id})
    gateway.cloud.sqs.send_message(QueueUrl=gateway.cloud.dead_letters_queue, MessageBody=body)

    assert 1 == len(gateway.run_dead_letters())

    assert "running" == gateway.job(job_id)["state"]
    assert {} == gateway.cloud.objects("dead-letters/")


def test_a_redriven_job_runs_and_shows_its_past(gateway: Gateway) -> None:
    (job_id,) = gateway.submit(a_job())
    gateway.cloud.sqs.purge_queue(QueueUrl=gateway.cloud.jobs_queue)
    body = json.dumps({"v": 1, "job_id": job_id})
    gateway.cloud.sqs.send_message(QueueUrl=gateway.cloud.dead_letters_queue, MessageBody=body)
    gateway.run_dead_letters()
    dead = stores.jobs().get(job_id)
    assert dead is not None
    stores.jobs().replace(redrive(dead, shared.CLOCK.now()), dead.version)
    gateway.cloud.sqs.send_message(QueueUrl=gateway.cloud.jobs_queue, MessageBody=body)

    assert [] == gateway.run_worker()

    job = gateway.job(job_id)
    assert ("succeeded", 1) == (job["state"], job["attempts_used"])
    (entry,) = job["redrives"]
    assert "dead_letter" == entry["error"]["type"]


def test_a_dead_letter_that_cannot_be_stored_is_received_again(gateway: Gateway) -> None:
    gateway.cloud.s3.delete_bucket(Bucket="sluice-data")
    for body in ("one", "two"):
        gateway.cloud.sqs.send_message(QueueUrl=gateway.cloud.dead_letters_queue, MessageBody=body)

    assert 2 == len(gateway.run_dead_letters())


# What is said --------------------------------------------------------------------------------------------------


def a_little_of_everything(gateway: Gateway) -> None:
    """A story in which each metric has its turn, and each kind of log line as well."""
    gateway.submit(
        a_job("tokens=5"),
        a_job("400", model="claude-opus-5"),
        a_job("429x1,retry_after=1", model="claude-sonnet-5-5"),
        a_job("529x1", model="claude-sonnet-5"),
        a_job("500x1", model="claude-opus-4-8"),
        a_job("spend_cap", model="claude-fable-5"),
    )
    deadline = shared.CLOCK.now() + 1_000
    (canceled, _) = gateway.submit(a_job(), a_job(deadline=views.time(deadline)))
    gateway.call("DELETE", f"/jobs/{canceled}")
    while shared.CLOCK.now() <= deadline:
        time.sleep(0.01)
    gateway.cloud.sqs.send_message(QueueUrl=gateway.cloud.jobs_queue, MessageBody=PROMPT)
    gateway.run_worker()
    gateway.submit(a_job("401", model="claude-opus-5-5"))
    gateway.run_worker()
    gateway.run_dead_letters()


def test_every_metric_is_emitted_and_every_emitted_one_is_valid(
    gateway: Gateway, said: Callable[[], str]
) -> None:
    a_little_of_everything(gateway)

    documents = [json.loads(line) for line in said().splitlines() if '"_aws"' in line]
    seen: set[str] = set()
    for each in documents:
        seen |= valid_metrics(each)
    assert METRIC_NAMES - OF_OTHERS == seen


def valid_metrics(document: dict[str, Any]) -> set[str]:
    """Check one EMF document against CloudWatch's rules; return the names of its metrics."""
    about = document["_aws"]
    assert isinstance(about["Timestamp"], int)
    (directive,) = about["CloudWatchMetrics"]
    assert NAMESPACE == directive["Namespace"]
    (dimensions,) = directive["Dimensions"]
    assert all(isinstance(document[name], str) and document[name] for name in dimensions)
    assert STACK == document["service"]
    names = {metric["Name"] for metric in directive["Metrics"]}
    assert names
    by_group = set(dimensions) == {"service", "model_group"}
    assert by_group or {"service"} == set(dimensions)
    assert names <= (BY_MODEL_GROUP if by_group else TOTALS)
    for metric in directive["Metrics"]:
        assert {"Name", "Unit"} == set(metric)
        assert metric["Unit"] in {"Count", "Seconds", "None"}
        value = document[metric["Name"]]
        values = value if isinstance(value, list) else [value]
        assert 1 <= len(values) <= 100
        assert all(isinstance(each, int | float) and each >= 0 for each in values)
    return names


def test_no_prompt_answer_or_key_is_ever_logged(gateway: Gateway, said: Callable[[], str]) -> None:
    """Not even where something goes wrong with it in its hands."""
    a_little_of_everything(gateway)
    for row in BAD:
        if isinstance(row[1], dict):
            gateway.call("POST", "/jobs", row[1])
    gateway.call("GET", "/jobs", key=DISABLED_KEY)
    (job_id,) = gateway.submit(a_job())
    gateway.cloud.secrets.put_secret_value(
        SecretId="KeyPoolSecret", SecretString=f'{{"keys": ["{UPSTREAM_KEY}"]}}'
    )
    _start_new_environment()
    gateway.run_worker()
    gateway.cloud.dynamodb.delete_table(TableName="ParamsTable")
    gateway.call("POST", "/jobs", a_job())

    printed = said()
    assert job_id
    assert "job not stored" in printed  # the log has been caught at all
    assert "job succeeded" in printed
    assert PROMPT not in printed
    assert "sentinel" not in printed
    assert not ANSWER.search(printed)


def test_more_values_than_a_document_holds_are_all_emitted(said: Callable[[], str]) -> None:
    for _ in range(250):
        shared.telemetry().count("CallSeconds", 0.5, "haiku-5-5")
    for _ in range(100):
        shared.telemetry().count("StartDelaySeconds", 2)
    shared.telemetry().flush()

    documents = [json.loads(line) for line in said().splitlines() if '"_aws"' in line]
    values = [value for each in documents for value in each.get("CallSeconds", [])]
    delays = [value for each in documents for value in each.get("StartDelaySeconds", [])]
    assert [0.5] * 250 == values
    assert [2] * 100 == delays
    for each in documents:
        valid_metrics(each)


# The document --------------------------------------------------------------------------------------------------


def test_the_document_promises_our_errors_and_no_others() -> None:
    document = openapi.document()

    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert {"200", "202"} & set(operation["responses"])
            assert "422" not in operation["responses"]
            for status, response in operation["responses"].items():
                schema = response["content"]["application/json"]["schema"]
                assert (int(status) >= 400) == (schema.get("$ref", "").endswith("/Error"))
            assert (path == "/health") == ("security" not in operation)
    assert {"x-api-key", "bearer"} == set(document["components"]["securitySchemes"])


def test_what_the_error_table_knows_is_documented() -> None:
    assert {status for status, _ in HTTP_OF.values()} | {500} == set(document.REFUSALS)
