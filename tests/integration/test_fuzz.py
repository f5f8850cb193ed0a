"""The API under requests made from its own document, well-formed and not: no 5xx, nothing accepted and lost."""

from __future__ import annotations

import io
import json
import random
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, TypeAlias
from urllib.parse import urlsplit

import boto3
import httpx
import pytest
import requests
import schemathesis
from botocore.awsrequest import AWSResponse
from botocore.compat import HTTPHeaders
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from functions.api import app as api_app
from scripts.documents.__main__ import DOCS
from sluice.domain.jobs import DueFor
from sluice.wiring import shared, stores
from tests.fakes import MINUTE
from tests.fresh import forget_what_is_wired
from tests.moto_aws import Aws, in_memory

CLIENT_KEY: Final = "sk-ant-test-fuzz-of-acme"
DOCUMENT: Final = schemathesis.openapi.from_path(DOCS / "openapi.json")
Case: TypeAlias = "schemathesis.Case[Any]"
CHECKS: Final = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
FINE: Final = frozenset({200, 202, 400, 404, 409})
OPERATIONS: Final = [
    ("GET", "/jobs"), ("GET", "/jobs/{job_id}"), ("DELETE", "/jobs/{job_id}"), ("GET", "/usage"),
    ("GET", "/limits"),
]  # fmt: skip


@dataclass(frozen=True)
class Context:
    aws_request_id: str = "fuzz"
    function_name: str = "sluice-api"
    memory_limit_in_mb: int = 512
    invoked_function_arn: str = "arn:aws:lambda:us-east-1:123456789012:function:sluice-api"


@dataclass
class Api:
    """The function behind an API Gateway that passes on whatever is HTTP at all."""

    cloud: Aws
    may_answer: frozenset[int] = FINE
    accepted: set[str] = field(default_factory=set)
    statuses: dict[int, int] = field(default_factory=dict)

    def answer(self, case: Case) -> httpx.Response:
        """Send a case, and check the answer against the document."""
        arguments = case.as_transport_kwargs(base_url="http://gateway")
        request = requests.Request(**arguments).prepare()
        given_headers = {str(k).lower(): _text(v) for k, v in request.headers.items()}
        url = urlsplit(str(request.url))
        event: dict[str, Any] = {
            "version": "2.0",
            "routeKey": "$default",
            "rawPath": url.path,
            "rawQueryString": url.query,
            "headers": {**given_headers, "x-api-key": CLIENT_KEY},
            "requestContext": {
                "requestId": "fuzz",
                "stage": "$default",
                "http": {"method": case.method.upper(), "path": url.path},
            },
            "isBase64Encoded": False,
        }
        if url.query:
            pairs = httpx.QueryParams(url.query)
            event["queryStringParameters"] = {
                name: ",".join(pairs.get_list(name)) for name in pairs
            }
        if request.body is not None:
            assert isinstance(request.body, bytes | str)
            body = request.body if isinstance(request.body, bytes) else request.body.encode()
            event |= {"body": b64encode(body).decode(), "isBase64Encoded": True}
        got = api_app.handler(event, Context())  # type: ignore[arg-type]
        response = httpx.Response(
            got["statusCode"],
            headers=got["headers"],
            text=got["body"],
            request=httpx.Request(case.method, str(request.url)),
        )
        response.elapsed = timedelta()
        self.statuses[response.status_code] = self.statuses.get(response.status_code, 0) + 1
        case.validate_response(response, checks=CHECKS)
        assert response.status_code in self.may_answer
        return response

    def submit(self, case: Case) -> None:
        answered = self.answer(case).json()
        if answered.get("type") == "job":
            self.accepted.add(answered["id"])
        elif answered.get("type") == "job_list":
            self.accepted |= {each["job"]["id"] for each in answered["data"] if "job" in each}

    def stored(self) -> set[str]:
        pages = self.cloud.dynamodb.get_paginator("scan").paginate(TableName="JobsTable")
        return {item["job_id"]["S"] for page in pages for item in page["Items"]}

    def sent(self) -> set[str]:
        found = set()
        while some := self.cloud.sqs.receive_message(
            QueueUrl=self.cloud.jobs_queue, MaxNumberOfMessages=10, VisibilityTimeout=900
        ).get("Messages"):
            found |= {json.loads(each["Body"])["job_id"] for each in some}
        return found


def _text(value: object) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    with in_memory() as cloud:
        for name, value in cloud.environment().items():
            monkeypatch.setenv(name, value)
        cloud.add_client_key(CLIENT_KEY, "acme")
        forget_what_is_wired()
        yield Api(cloud)
        forget_what_is_wired()


def cases(method: str, path: str, mode: GenerationMode) -> st.SearchStrategy[Case]:
    return DOCUMENT[path][method].as_strategy(generation_mode=mode)


def fuzz(examples: int, requests_: st.SearchStrategy[Case], send: Callable[[Case], object]) -> None:
    """Send this many requests, always the same ones."""

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=requests_)
    def one(case: Case) -> None:
        send(case)

    one()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_whatever_is_posted_has_an_answer_and_what_is_accepted_will_run(
    api: Api, mode: GenerationMode
) -> None:
    fuzz(200, cases("POST", "/jobs", mode), api.submit)

    assert api.accepted == api.stored() == api.sent()
    assert api.accepted == set(stores.params().get_many(sorted(api.accepted)))
    assert (len(api.accepted) > 20) or mode is GenerationMode.NEGATIVE


def test_while_aws_refuses_and_loses_calls_what_is_accepted_will_run(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent, or parked for the sweep. What is rejected may be stored: its name finds it, if its caller gave it one."""
    api.may_answer = FINE | {503}
    dice = random.Random(5)  # noqa: S311 - the same troubles every time

    def trouble(**_: Any) -> Any:
        """Before the call: rejected as throttled, or with an unclear result (500)."""
        if dice.random() < 0.4:
            return None
        status = dice.choice([400, 500])
        refused = AWSResponse("https://aws", status, HTTPHeaders(), io.BytesIO())
        facts = {"HTTPStatusCode": status, "HTTPHeaders": {}}
        return refused, {"Error": {"Code": "ThrottlingException"}, "ResponseMetadata": facts}

    session = boto3.Session()
    for call in ("dynamodb.PutItem", "sqs.SendMessageBatch"):
        session.events.register_first(f"before-call.{call}", trouble)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", session)
    forget_what_is_wired()

    fuzz(80, cases("POST", "/jobs", GenerationMode.POSITIVE), api.submit)

    jobs, now = stores.jobs(), shared.CLOCK.now()
    parked = {each.job_id for each in jobs.due(DueFor.CALL, now, 1_000)}
    cared_for = {each.job_id for each in jobs.due(DueFor.CHECK, now + 45 * MINUTE, 1_000)}
    assert api.accepted <= api.stored()
    assert api.accepted <= parked | cared_for, "the sweep knows of each"
    assert parked, "no fault was injected"
    assert api.statuses[503]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_whatever_is_asked_has_an_answer(
    api: Api, method: str, path: str, mode: GenerationMode
) -> None:
    fuzz(30, cases(method, path, mode), api.answer)

    assert api.statuses
