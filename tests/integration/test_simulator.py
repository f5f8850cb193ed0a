"""The simulator over a real socket, driven by the official SDK and by plain HTTP."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import Anthropic
from anthropic.types import TextBlock
from anthropic.types.messages import MessageBatch
from anthropic.types.shared.contract_spend_limit_reached_error import (
    ContractSpendLimitReachedError,
)
from anthropic.types.shared.enforced_spend_limit_reached_error import (
    EnforcedSpendLimitReachedError,
)
from anthropic.types.shared.ramp_limit_exceeded_error import RampLimitExceededError

from scripts.claude_simulator import Running, params_hash, read, running

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-ant-test-one"
VERSION = "2026-10-21"
FAST = {"ttft_seconds": 0, "tokens_per_second": None}


@contextlib.contextmanager
def simulator(**settings: Any) -> Iterator[Running]:
    with running(read({"service": FAST, **settings})) as started:
        yield started


@pytest.fixture(scope="module")
def claude() -> Iterator[Running]:
    """One simulator without limits for the tests that need none."""
    limits = {"default": {"rpm": None, "itpm": None, "otpm": None}}
    with simulator(organisations=[{"keys": [KEY], "limits": limits}]) as started:
        yield started


@contextlib.contextmanager
def sdk(claude: Running, key: str = KEY) -> Iterator[Anthropic]:
    with Anthropic(api_key=key, base_url=claude.url, max_retries=0) as client:
        yield client


def limited(**limits: Any) -> list[dict[str, Any]]:
    default = {"rpm": None, "itpm": None, "otpm": None} | limits
    return [{"id": "org-one", "keys": [KEY], "limits": {"default": default}}]


def params(text: str = "hello", marker: str | None = None, **more: Any) -> dict[str, Any]:
    metadata = {} if marker is None else {"metadata": {"user_id": marker}}
    messages = [{"role": "user", "content": text}]
    return {
        "model": "claude-opus-5",
        "max_tokens": 100,
        "messages": messages,
        **metadata,
        **more,
    }


def post(
    claude: Running, asked: dict[str, Any], headers: dict[str, str] | None = None
) -> httpx.Response:
    plain = {"x-api-key": KEY, "anthropic-version": VERSION}
    return httpx.post(
        f"{claude.url}/v1/messages", json=asked, headers=plain if headers is None else headers
    )


def stats(claude: Running, query: str = "") -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{claude.url}/_simulator/stats{query}").json()
    return found


def ledger(claude: Running) -> list[dict[str, Any]]:
    lines = httpx.get(f"{claude.url}/_simulator/ledger").text.splitlines()
    return [json.loads(line) for line in lines]


def ended_call(claude: Running) -> dict[str, Any]:
    """Return the first call in the ledger, waiting for its end."""
    for _ in range(500):
        if rows := ledger(claude):
            return rows[0]
        time.sleep(0.01)
    raise TimeoutError("no call ended within 5 s")


def test_the_sdk_creates_a_message(claude: Running) -> None:
    asked = params("create")
    with sdk(claude) as client:
        raw = client.messages.with_raw_response.create(**asked)
    message = raw.parse()

    assert message.content[0].type == "text"
    assert params_hash(asked)[:12] in message.content[0].text
    assert message.stop_reason in {"end_turn", "max_tokens"}
    assert message.usage.output_tokens > 0
    assert raw.headers["request-id"] == raw.request_id
    assert raw.headers["anthropic-organization-id"] == "org-one"
    assert raw.headers["anthropic-workspace-id"].startswith("wrkspc_")


async def test_the_async_sdk_creates_messages_side_by_side(claude: Running) -> None:
    async with anthropic.AsyncAnthropic(api_key=KEY, base_url=claude.url, max_retries=0) as client:
        first = await client.messages.create(**params("side"))
        second = await client.messages.create(**params("by side"))

    assert first.content != second.content


def test_a_streamed_answer_is_the_same_as_the_whole_one(claude: Running) -> None:
    asked = params("stream")
    with sdk(claude) as client:
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            kinds = [event.type for event in stream]
            streamed = stream.get_final_message()

    assert streamed.content[0].to_dict() == whole.content[0].to_dict()
    assert streamed.stop_reason == whole.stop_reason
    assert streamed.usage.output_tokens == whole.usage.output_tokens
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"


def test_events_come_in_the_order_of_the_api(claude: Running) -> None:
    asked = params("events", "sim:slow=0,tps=2000,tokens=100", stream=True)
    text = post(claude, asked).text
    events = [line.removeprefix("event: ") for line in text.splitlines() if line[:6] == "event:"]
    shape = [kind for at, kind in enumerate(events) if at == 0 or events[at - 1] != kind]

    assert shape == [
        "message_start",
        "content_block_start",
        "ping",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    data = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    assert data[0]["message"]["usage"]["output_tokens"] == 1
    assert data[-2]["usage"]["output_tokens"] == 100


def test_tokens_are_counted(claude: Running) -> None:
    asked = params("x" * 1000)
    with sdk(claude) as client:
        counted = client.messages.count_tokens(model=asked["model"], messages=asked["messages"])
        message = client.messages.create(**asked)

    assert counted.input_tokens == message.usage.input_tokens == 333


def test_models_are_listed_over_several_pages(claude: Running) -> None:
    with sdk(claude) as client:
        ids = [model.id for model in client.models.list(limit=4)]
        one = client.models.retrieve("claude-haiku-4-5")
        with pytest.raises(anthropic.NotFoundError):
            client.models.retrieve("claude-none")

    assert len(ids) == len(set(ids)) > 8
    assert "claude-opus-5" in ids
    assert one.id == "claude-haiku-4-5-20251001"


@pytest.mark.parametrize(
    "credential", [{"x-api-key": KEY}, {"authorization": f"Bearer {KEY}"}], ids=str
)
@pytest.mark.parametrize("version", ["2023-06-01", "2026-10-21"])
def test_both_credentials_and_both_versions_work(
    claude: Running, credential: dict[str, str], version: str
) -> None:
    reply = post(claude, params(), {**credential, "anthropic-version": version})

    assert reply.status_code == 200


@pytest.mark.parametrize("version", [{}, {"anthropic-version": "2025-01-01"}], ids=str)
def test_a_missing_or_unknown_version_is_refused(claude: Running, version: dict[str, str]) -> None:
    reply = post(claude, params(), {"x-api-key": KEY, **version})

    assert reply.status_code == 400
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_an_unknown_key_is_rejected_before_the_organization_is_known(claude: Running) -> None:
    with (
        sdk(claude, "sk-ant-test-nobody") as client,
        pytest.raises(anthropic.AuthenticationError) as caught,
    ):
        client.messages.create(**params())

    assert "anthropic-organization-id" not in caught.value.response.headers
    assert caught.value.request_id is not None


def test_an_error_has_the_shape_of_the_api(claude: Running) -> None:
    reply = post(claude, params(model="claude-none"))

    assert reply.status_code == 404
    assert reply.json() == {
        "type": "error",
        "error": {"type": "not_found_error", "message": "model: claude-none"},
        "request_id": reply.headers["request-id"],
    }


def test_sampling_parameters_are_refused_under_the_new_version(claude: Running) -> None:
    with sdk(claude) as client, pytest.raises(anthropic.BadRequestError):
        client.messages.create(**params(), extra_body={"temperature": 1.0})


def test_a_429_names_the_limit_and_the_time_of_a_retry() -> None:
    with simulator(organisations=limited(rpm=2, itpm=20_000, otpm=8000)) as claude:
        with sdk(claude) as client:
            first = client.messages.with_raw_response.create(**params("a"))
            client.messages.create(**params("b"))
            with pytest.raises(anthropic.RateLimitError) as caught:
                client.messages.create(**params("c"))
        group = stats(claude)["organisations"]["org-one"]["model_groups"]["opus-5"]

    assert type(caught.value) is anthropic.RateLimitError
    headers = caught.value.response.headers
    assert first.headers["anthropic-ratelimit-requests-remaining"] == "1"
    assert headers["anthropic-ratelimit-requests-limit"] == "2"
    assert headers["anthropic-ratelimit-requests-remaining"] == "0"
    assert headers["anthropic-ratelimit-input-tokens-remaining"] == "20000"
    assert headers["anthropic-ratelimit-tokens-limit"] == "28000"
    assert headers["anthropic-ratelimit-requests-reset"].endswith("Z")
    assert 1 <= int(headers["retry-after"]) <= 30
    assert headers["x-should-retry"] == "true"
    assert group["rate_limited"] == {"total": 1, "requests": 1}
    assert group["billed"] == 2


@pytest.mark.parametrize(
    ("marker", "error", "retry_after"),
    [
        ("529", anthropic.OverloadedError, None),
        ("500", anthropic.InternalServerError, None),
        ("503", anthropic.InternalServerError, None),
        ("504", anthropic.InternalServerError, None),
        ("402", anthropic.APIStatusError, None),
        ("403", anthropic.PermissionDeniedError, None),
        ("413", anthropic.APIStatusError, None),
        ("429,retry_after=9", anthropic.RateLimitError, "9"),
        ("concurrency", anthropic.RateLimitError, "1"),
        ("ramp", RampLimitExceededError, "5"),
        ("spend_cap", EnforcedSpendLimitReachedError, None),
        ("contract_cap", ContractSpendLimitReachedError, None),
        ("self_limit", anthropic.BadRequestError, None),
    ],
)
def test_a_marker_forces_a_failure(
    claude: Running, marker: str, error: type[anthropic.APIStatusError], retry_after: str | None
) -> None:
    with sdk(claude) as client, pytest.raises(error) as caught:
        client.messages.create(**params(marker=f"sim:{marker}"))

    assert caught.value.response.headers.get("retry-after") == retry_after
    assert caught.value.request_id == caught.value.response.headers["request-id"]


def test_scripted_overloads_end_after_their_count(claude: Running) -> None:
    asked = params("through", "sim:529x2")
    replies = [post(claude, asked).status_code for _ in range(3)]

    assert replies == [529, 529, 200]


@pytest.mark.parametrize(("place", "billed"), [("before", False), ("after", True)])
def test_a_dropped_connection_may_have_been_billed(
    claude: Running, place: str, *, billed: bool
) -> None:
    asked = params("drop", f"sim:drop_{place}_billing")
    with sdk(claude) as client, pytest.raises(anthropic.APIConnectionError):
        client.messages.create(**asked)
    row = next(row for row in ledger(claude) if row["body_hash"] == params_hash(asked))

    assert (row["status"], row["billed"], row["delivered"]) == (0, billed, False)


def test_an_error_may_follow_a_200(claude: Running) -> None:
    asked = params("half", "sim:sse_error,slow=0,tps=1000,tokens=100")
    received: list[str] = []
    with (
        sdk(claude) as client,
        pytest.raises(anthropic.APIStatusError) as caught,
        client.messages.stream(**asked) as stream,
    ):
        received.extend(event.type for event in stream)

    assert "content_block_delta" in received
    assert caught.value.response.status_code == 200
    assert caught.value.type == "overloaded_error"


def test_thinking_comes_before_the_text(claude: Running) -> None:
    asked = params("think", thinking={"type": "adaptive"})
    with sdk(claude) as client:
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()
        redacted = client.messages.create(**params("think", "sim:redacted_thinking"))

    assert [block.type for block in whole.content] == ["thinking", "text"]
    assert [block.to_dict() for block in streamed.content] == [
        block.to_dict() for block in whole.content
    ]
    assert [block.type for block in redacted.content] == ["redacted_thinking", "text"]
    assert whole.usage.output_tokens_details is not None


def test_a_refusal_is_an_answer(claude: Running) -> None:
    with sdk(claude) as client:
        message = client.messages.create(**params("refuse", "sim:refusal"))
        with client.messages.stream(**params("refuse", "sim:refusal")) as stream:
            streamed = stream.get_final_message()

    assert message.stop_reason == streamed.stop_reason == "refusal"
    assert message.stop_details is not None
    assert message.stop_details.type == "refusal"


def test_a_tool_is_used_when_one_must_be(claude: Running) -> None:
    tools = [{"name": "weather", "input_schema": {"type": "object"}}]
    asked = params("tool", tools=tools, tool_choice={"type": "any"})
    with sdk(claude) as client:
        whole = client.messages.create(**asked)
        with client.messages.stream(**asked) as stream:
            streamed = stream.get_final_message()

    assert whole.stop_reason == "tool_use"
    assert [block.to_dict() for block in streamed.content] == [
        block.to_dict() for block in whole.content
    ]


def test_a_caller_that_hangs_up_is_billed_and_not_delivered() -> None:
    with simulator() as claude:
        asked = params("hang up", "sim:slow=0.3")
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{claude.url}/v1/messages",
                json=asked,
                headers={"x-api-key": KEY, "anthropic-version": VERSION},
                timeout=0.1,
            )
        row = ended_call(claude)

    assert (row["billed"], row["delivered"]) == (True, False)


def test_a_body_billed_twice_is_reported(claude: Running) -> None:
    asked = params("twice", "sim:thinking job-9")
    post(claude, asked)
    post(claude, asked)
    examples = stats(claude)["duplicates"]["examples"]

    assert {
        "body_hash": params_hash(asked),
        "user_id": "sim:thinking job-9",
        "billed": 2,
    } in examples


ADMIN_KEY = "sk-ant-admin-test-one"


@contextlib.contextmanager
def administered() -> Iterator[Running]:
    """A simulator with an admin key and a second workspace."""
    two = {"keys": ["sk-ant-test-two"], "limits": {"opus-5": {"rpm": 7}}}
    organisation = limited(rpm=60, itpm=50_000)[0]
    organisation |= {"admin_keys": [ADMIN_KEY], "workspaces": {"wrkspc_two": two}}
    with simulator(organisations=[organisation]) as started:
        yield started


def test_the_sdk_reads_the_rate_limits_of_an_organization() -> None:
    with administered() as claude, sdk(claude, ADMIN_KEY) as client:
        every = list(client.organization.rate_limits.list(limit=3))
        batch = list(client.organization.rate_limits.list(group_type="batch"))
        opus = list(client.organization.rate_limits.list(model="claude-opus-5"))
        with pytest.raises(anthropic.NotFoundError):
            client.organization.rate_limits.list(model="claude-none")

    assert len({entry.id for entry in every}) == len(every) > 8
    assert [entry.group.type for entry in batch] == ["batch"]
    assert opus[0].models == ["claude-opus-5"]
    assert {limit.type: limit.value for limit in opus[0].limits} == {
        "requests_per_minute": 60,
        "input_tokens_per_minute_cache_aware": 50_000,
    }


def test_the_sdk_reads_the_rate_limits_of_a_workspace() -> None:
    with administered() as claude, sdk(claude, ADMIN_KEY) as client:
        limits = client.organization.workspaces.rate_limits
        own = list(limits.list("wrkspc_two"))
        every = list(limits.list("wrkspc_two", include_inherited=True, limit=5))
        with pytest.raises(anthropic.NotFoundError):
            limits.list("wrkspc_none")

    assert [(entry.models, entry.limits[0].value) for entry in own] == [(["claude-opus-5"], 7)]
    assert own[0].limits[0].org_limit == 60
    assert own[0].limits[0].source.type == "workspace"
    assert len(every) > 8


def test_the_old_version_of_the_rate_limits_has_its_own_shape() -> None:
    with administered() as claude:
        reply = httpx.get(
            f"{claude.url}/v1/organizations/rate_limits?model=claude-opus-5",
            headers={"x-api-key": ADMIN_KEY, "anthropic-version": "2023-06-01"},
        )

    assert reply.json()["data"][0]["group_type"] == "model_group"
    assert reply.headers["anthropic-organization-id"] == "org-one"
    assert "anthropic-workspace-id" not in reply.headers


def test_admin_keys_and_others_open_different_doors() -> None:
    with administered() as claude:
        with sdk(claude) as client, pytest.raises(anthropic.AuthenticationError):
            client.organization.rate_limits.list()
        with sdk(claude, ADMIN_KEY) as client, pytest.raises(anthropic.AuthenticationError):
            client.messages.create(**params())
        httpx.post(f"{claude.url}/_simulator/config", json={"revoke": [ADMIN_KEY]})
        with sdk(claude, ADMIN_KEY) as client, pytest.raises(anthropic.AuthenticationError):
            client.organization.rate_limits.list()


def requests(*names: str, **more: Any) -> list[Any]:
    return [{"custom_id": name, "params": params(name, **more)} for name in names]


def ended(client: Anthropic, batch_id: str) -> MessageBatch:
    """Return the batch once it has ended."""
    for _ in range(500):
        batch = client.messages.batches.retrieve(batch_id)
        if batch.processing_status == "ended":
            return batch
        time.sleep(0.01)
    raise TimeoutError("the batch did not end within 5 s")


def advance(claude: Running, seconds: float) -> None:
    reply = httpx.post(f"{claude.url}/_simulator/batch_clock", json={"advance_seconds": seconds})
    reply.raise_for_status()


@contextlib.contextmanager
def batching(**batches: Any) -> Iterator[Running]:
    with simulator(batches={"seconds": 0.2, "cancel_seconds": 0, **batches}) as started:
        yield started


def test_the_sdk_takes_a_batch_through_its_life() -> None:
    with batching(seconds=3600) as claude, sdk(claude) as client:
        created = client.messages.batches.create(
            requests=requests("a", "b", "c") + requests("bad", max_tokens=0)
        )
        with pytest.raises(anthropic.AnthropicError, match="No `results_url`"):
            client.messages.batches.results(created.id)
        advance(claude, 3600)
        batch = ended(client, created.id)
        results = {
            line.custom_id: line.result for line in client.messages.batches.results(batch.id)
        }
        deleted = client.messages.batches.delete(batch.id)
        with pytest.raises(anthropic.NotFoundError):
            client.messages.batches.retrieve(batch.id)

    assert (created.processing_status, created.request_counts.processing) == ("in_progress", 4)
    assert (created.expires_at - created.created_at).total_seconds() == 24 * 3600
    assert (batch.request_counts.succeeded, batch.request_counts.errored) == (3, 1)
    assert batch.results_url == f"{claude.url}/v1/messages/batches/{batch.id}/results"
    assert set(results) == {"a", "b", "c", "bad"}
    one, bad = results["a"], results["bad"]
    assert one.type == "succeeded"
    assert one.message.usage.service_tier == "batch"
    assert isinstance(one.message.content[0], TextBlock)
    assert params_hash(params("a"))[:12] in one.message.content[0].text
    assert bad.type == "errored"
    assert bad.error.error.type == "invalid_request_error"
    assert bad.error.request_id is None
    assert (deleted.id, deleted.type) == (batch.id, "message_batch_deleted")


def test_the_sdk_cancels_a_batch_and_reads_what_was_done() -> None:
    with batching(seconds=3600, cancel_seconds=1800) as claude, sdk(claude) as client:
        batch = client.messages.batches.create(requests=requests(*"abcdefgh"))
        advance(claude, 1800)
        canceling = client.messages.batches.cancel(batch.id)
        advance(claude, 1800)
        counts = ended(client, batch.id).request_counts
        types = [line.result.type for line in client.messages.batches.results(batch.id)]

    assert canceling.processing_status == "canceling"
    assert canceling.cancel_initiated_at is not None
    assert (counts.succeeded, counts.canceled) == (4, 4)
    assert sorted(types) == ["canceled"] * 4 + ["succeeded"] * 4


def test_the_sdk_lists_batches_in_both_directions() -> None:
    with batching() as claude, sdk(claude) as client:
        batches = client.messages.batches
        ids = [batches.create(requests=requests("a")).id for _ in range(5)][::-1]
        forward = [batch.id for batch in batches.list(limit=2)]
        back = [batch.id for batch in batches.list(limit=2, before_id=ids[4])]

    assert forward == ids
    assert sorted(back) == sorted(ids[:4])


async def test_the_async_sdk_reads_results() -> None:
    with batching(seconds=0) as claude:
        async with anthropic.AsyncAnthropic(api_key=KEY, base_url=claude.url) as client:
            batch = await client.messages.batches.create(requests=requests("a", "b"))
            with sdk(claude) as other:
                ended(other, batch.id)
            lines = [line async for line in await client.messages.batches.results(batch.id)]

    assert {line.custom_id for line in lines} == {"a", "b"}


def test_results_are_lines_without_a_blank_one_and_may_be_relative() -> None:
    headers = {"x-api-key": KEY, "anthropic-version": "2023-06-01"}
    with batching(results_url="relative") as claude, sdk(claude) as client:
        reply = httpx.post(
            f"{claude.url}/v1/messages/batches",
            json={"requests": requests(*(f"row-{number}" for number in range(120)))},
            headers=headers,
        )
        batch = ended(client, reply.json()["id"])
        text = httpx.get(f"{claude.url}{batch.results_url}", headers=headers).text
        through_the_sdk = list(client.messages.batches.results(batch.id))
        items = stats(claude)["organisations"]["org-one"]["batches"]["items"]
        lanes = {(row["lane"], row["batch_id"]) for row in ledger(claude)}

    assert batch.results_url == f"/v1/messages/batches/{batch.id}/results"
    assert text.endswith("}\n")
    names = [json.loads(line)["custom_id"] for line in text.removesuffix("\n").split("\n")]
    assert len(set(names)) == len(names) == len(through_the_sdk) == 120
    assert names != sorted(names, key=lambda name: int(name[4:]))
    assert (items["billed"], items["delivered"]) == (120, 120)
    assert lanes == {("batch", batch.id)}


def test_batches_stay_in_their_workspace() -> None:
    with administered() as claude:
        with sdk(claude) as client:
            batch = client.messages.batches.create(requests=requests("a"))
        with sdk(claude, "sk-ant-test-two") as stranger:
            seen = list(stranger.messages.batches.list())
            doors = stranger.messages.batches
            for door in (doors.retrieve, doors.cancel, doors.delete, doors.results):
                with pytest.raises(anthropic.NotFoundError):
                    door(batch.id)

    assert seen == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"requests": []}, "at least 1 item"),
        ({"requests": requests("a", "a")}, "not unique"),
        ({"requests": requests("not good")}, "custom_id"),
    ],
)
def test_a_batch_of_the_wrong_shape_is_refused_at_once(body: dict[str, Any], said: str) -> None:
    headers = {"authorization": f"Bearer {KEY}", "anthropic-version": VERSION}
    with batching() as claude:
        reply = httpx.post(f"{claude.url}/v1/messages/batches", json=body, headers=headers)
        counts = stats(claude)["organisations"]["org-one"]

    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
    assert said in reply.json()["error"]["message"]
    assert reply.json()["request_id"] == reply.headers["request-id"]
    assert counts["model_groups"]["batches"]["invalid"] == 1
    assert counts["batches"]["created"] == 0


def test_a_batch_body_above_256_mb_is_too_large_and_one_above_32_is_not() -> None:
    headers = {"x-api-key": KEY, "anthropic-version": VERSION}
    megabyte = b" " * (1024 * 1024)
    fits = json.dumps({"requests": requests("a")}).encode()
    with batching() as claude:
        url = f"{claude.url}/v1/messages/batches"
        too_large = httpx.post(url, content=(megabyte for _ in range(257)), headers=headers)
        large = httpx.post(url, content=(*(megabyte for _ in range(40)), fits), headers=headers)

    assert (too_large.status_code, large.status_code) == (413, 200)
    assert too_large.json()["error"]["type"] == "request_too_large"


def test_a_batch_may_not_be_found_right_after_its_create() -> None:
    with batching(not_found_seconds=60) as claude, sdk(claude) as client:
        batch = client.messages.batches.create(requests=requests("a"))
        with pytest.raises(anthropic.NotFoundError):
            client.messages.batches.retrieve(batch.id)
        advance(claude, 60)

        assert ended(client, batch.id).id == batch.id


def test_a_create_whose_response_is_lost_creates_a_batch_all_the_same() -> None:
    with batching(create_faults={"drop_after_billing": 1}) as claude:
        with sdk(claude) as client, pytest.raises(anthropic.APIConnectionError):
            client.messages.batches.create(requests=requests("a"))
        with sdk(claude) as client:
            lost = list(client.messages.batches.list())

    assert len(lost) == 1


def test_a_create_can_be_made_to_fail() -> None:
    with batching(create_faults={"529": 1}) as claude, sdk(claude) as client:
        with pytest.raises(anthropic.OverloadedError):
            client.messages.batches.create(requests=requests("a"))

        assert list(client.messages.batches.list()) == []


def test_a_full_queue_is_a_429() -> None:
    organisation = limited()[0] | {"batch_limits": {"queued_requests": 2}}
    slow = {"seconds": 3600}
    with simulator(organisations=[organisation], batches=slow) as claude, sdk(claude) as client:
        client.messages.batches.create(requests=requests("a"))
        with pytest.raises(anthropic.RateLimitError) as caught:
            client.messages.batches.create(requests=requests("b", "c"))

    assert caught.value.response.headers["retry-after"] == "3600"


@pytest.mark.parametrize("body", [{}, {"advance_seconds": -1}, {"advance_seconds": "1"}])
def test_the_batch_clock_only_goes_ahead(claude: Running, body: dict[str, Any]) -> None:
    reply = httpx.post(f"{claude.url}/_simulator/batch_clock", json=body)

    assert reply.status_code == 400
    assert "advance_seconds" in reply.json()["error"]["message"]


def test_limits_faults_and_keys_change_at_run_time() -> None:
    with simulator(organisations=limited(rpm=1)) as claude:
        before = [post(claude, params(text)).status_code for text in "ab"]
        unlimited = {"organisations": limited()}
        httpx.post(f"{claude.url}/_simulator/config", json=unlimited).raise_for_status()
        after = post(claude, params("c")).status_code
        httpx.post(f"{claude.url}/_simulator/config", json={"faults": {"529": 1}, "revoke": []})
        failing = post(claude, params("d")).status_code
        httpx.post(f"{claude.url}/_simulator/config", json={"revoke": [KEY]})
        revoked = post(claude, params("e")).status_code
        wrong = httpx.post(f"{claude.url}/_simulator/config", json={"faults": {"rain": 1}})
        httpx.post(f"{claude.url}/_simulator/reset?config=1", json={})
        fresh = [post(claude, params(text)).status_code for text in "ab"]
        counted = stats(claude, "?starts=1")

    assert before == fresh == [200, 429]
    assert (after, failing, revoked) == (200, 529, 401)
    assert wrong.status_code == 400
    assert 'unknown fault "rain"' in wrong.json()["error"]["message"]
    assert counted["requests"] == 2
    assert len(counted["organisations"]["org-one"]["model_groups"]["opus-5"]["starts"]) == 1


@pytest.mark.parametrize(
    "foreign",
    [
        {"origin": "http://attacker.example"},
        {"origin": "null"},
        {"host": "attacker.example"},
        {"host": "127.0.0.1:1"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/messages"),
        ("GET", "/v1/models"),
        ("GET", "/_simulator/stats"),
        ("GET", "/_simulator/ledger"),
        ("POST", "/_simulator/config"),
        ("POST", "/_simulator/reset?config=1"),
        ("OPTIONS", "/v1/messages"),
    ],
)
def test_a_page_of_another_origin_is_refused_everywhere(
    claude: Running, method: str, path: str, foreign: dict[str, str]
) -> None:
    good = {"x-api-key": KEY, "anthropic-version": VERSION, "content-type": "application/json"}

    reply = httpx.request(method, f"{claude.url}{path}", content=b"{}", headers=good | foreign)

    assert (403, "permission_error") == (reply.status_code, reply.json()["error"]["type"])
    assert not [name for name in reply.headers if name.startswith("access-control-")]


def test_two_host_headers_are_refused(claude: Running) -> None:
    own = claude.url.removeprefix("http://")
    with contextlib.closing(http.client.HTTPConnection(own, timeout=10)) as connection:
        connection.putrequest("GET", "/_simulator/stats", skip_host=True)
        connection.putheader("Host", own)
        connection.putheader("Host", "attacker.example")
        connection.endheaders()

        status = connection.getresponse().status

    assert status in {400, 403}


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_page_and_a_program_of_the_simulators_own_address_are_answered(
    claude: Running, name: str
) -> None:
    own = f"{name}:{claude.url.rpartition(':')[2]}"

    reply = httpx.get(
        f"{claude.url}/_simulator/stats", headers={"host": own, "origin": f"http://{own}"}
    )

    assert 200 == reply.status_code
    assert not [name for name in reply.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
@pytest.mark.parametrize("path", ["config", "reset", "batch_clock"])
def test_control_takes_nothing_a_form_of_a_page_could_send(
    claude: Running, path: str, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    body = json.dumps({"faults": {"529": 1}, "advance_seconds": 1})

    reply = httpx.post(f"{claude.url}/_simulator/{path}", content=body, headers=headers)

    assert 415 == reply.status_code
    assert 200 == post(claude, params()).status_code


def test_many_callers_at_once_never_break_the_limit() -> None:
    with simulator(organisations=limited(rpm=600)) as claude:

        def call(number: int) -> None:
            with httpx.Client() as client:
                for index in range(100):
                    client.post(
                        f"{claude.url}/v1/messages",
                        json=params(f"{number} {index}"),
                        headers={"x-api-key": KEY, "anthropic-version": VERSION},
                    )

        callers = [threading.Thread(target=call, args=(number,)) for number in range(8)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        counted = stats(claude, "?starts=1")
        starts = counted["organisations"]["org-one"]["model_groups"]["opus-5"]["starts"]

    assert counted["requests"] == 800
    assert len(starts) + counted["rate_limited"]["total"] == 800
    assert 600 <= len(starts) <= 600 + 10 * (starts[-1] - starts[0]) + 1e-6


def test_an_unknown_path_or_method_is_answered_in_shape(claude: Running) -> None:
    missing = httpx.get(f"{claude.url}/v1/nothing")
    wrong = httpx.get(f"{claude.url}/v1/messages")

    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
    assert wrong.status_code == 405


def test_a_body_above_32_mb_is_too_large(claude: Running) -> None:
    reply = post(claude, params("x" * (32 * 1024 * 1024)))

    assert reply.status_code == 413
    assert reply.json()["error"]["type"] == "request_too_large"


def start(*flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "scripts.claude_simulator", *flags]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_the_program_reports_when_it_is_ready_and_stops_on_a_signal(stop: signal.Signals) -> None:
    with start("--port", "0", "--fast", "--rpm", "600", "--keys", "sk-ant-test-two") as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        reply = httpx.post(
            f"{ready['url']}/v1/messages",
            json=params(),
            headers={"x-api-key": "sk-ant-test-two", "anthropic-version": VERSION},
        )
        process.send_signal(stop)
        output, errors = process.communicate(timeout=10)

    assert ready["ready"] is True
    assert reply.headers["anthropic-ratelimit-requests-limit"] == "600"
    assert (process.returncode, output, errors) == (0, "", "")


def test_the_program_takes_an_admin_key_and_the_time_of_a_batch() -> None:
    with start("--port", "0", "--admin-keys", ADMIN_KEY, "--batch-seconds", "0") as process:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        with Anthropic(api_key=ADMIN_KEY, base_url=url) as client:
            limits = list(client.organization.rate_limits.list(model="claude-opus-5"))
        with Anthropic(api_key=KEY, base_url=url) as client:
            batch = client.messages.batches.create(
                requests=requests(*(f"row-{number}" for number in range(1000)))
            )
            counts = ended(client, batch.id).request_counts
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=10)

    assert len(limits) == 1
    assert counts.succeeded == 1000
    assert process.returncode == 0


def test_a_port_in_use_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with start("--port", str(port)) as process:
            output, errors = process.communicate(timeout=10)

    assert (process.returncode, output) == (1, "")
    assert errors == f"claude_simulator: port {port} is in use; use --port to choose another\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ('{"faults": {"rain": 1}}', 'unknown fault "rain"'),
        ('{"organisations": [{"keys": 5}]}', "organisations.0.keys"),
    ],
)
def test_a_wrong_configuration_is_one_clear_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "simulator.json"
    file.write_text(text)
    with start("--port", "0", "--config", str(file)) as process:
        _, errors = process.communicate(timeout=10)

    assert process.returncode == 1
    assert said in errors
    assert errors.count("\n") == 1
