"""The same batch, sent to Anthropic's API as the simulator speaks it and to Sluice: the same objects, field by field.

Ids, times and addresses differ by nature. One field differs because it is true: `usage.service_tier` is `standard` at
Sluice, whose rows are calls at full price.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import httpx
import pytest

from scripts.claude_simulator import read, running
from scripts.local_stack import LocalStack

UPSTREAM_KEY: Final = "sk-ant-test-conformance"
CLIENT_KEY: Final = "sluice_conformance"
MODEL: Final = "claude-haiku-5-5"
BATCHES: Final = "/v1/messages/batches"
HELLO: Final = [{"role": "user", "content": "Say hello."}]

TIME: Final = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}\.\d{6}Z")
BY_NATURE: Final = {"id", "request_id", "first_id", "last_id"}

ROWS: Final[dict[str, Any]] = {
    "plain": {"model": MODEL, "max_tokens": 100, "messages": HELLO},
    "cut-short": {"model": MODEL, "max_tokens": 1, "messages": HELLO},
    "with-system": {"model": MODEL, "max_tokens": 64, "system": "Be brief.", "messages": HELLO},
    "metadata": {
        "model": MODEL, "max_tokens": 64, "messages": HELLO, "metadata": {"user_id": "u-1"},
    },
    "unknown-model": {"model": "claude-none", "max_tokens": 64, "messages": HELLO},
    "no-model": {"max_tokens": 64, "messages": HELLO},
    "no-max-tokens": {"model": MODEL, "messages": HELLO},
    "text-max-tokens": {"model": MODEL, "max_tokens": "64", "messages": HELLO},
    "no-messages": {"model": MODEL, "max_tokens": 64},
    "empty-messages": {"model": MODEL, "max_tokens": 64, "messages": []},
    "stream": {"model": MODEL, "max_tokens": 64, "messages": HELLO, "stream": True},
    "unknown-field": {"model": MODEL, "max_tokens": 64, "messages": HELLO, "nonsense": 1},
}  # fmt: skip


@dataclass(frozen=True)
class Api:
    """One of the two."""

    http: httpx.Client

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        answer = self.http.request(method, path, json=body)
        return answer.status_code, answer.json()

    def ended(self, batch_id: str) -> Any:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            _, batch = self.ask("GET", f"{BATCHES}/{batch_id}")
            if batch["processing_status"] == "ended":
                return batch
            time.sleep(0.1)
        pytest.fail("the batch did not end")

    def results(self, batch_id: str) -> dict[str, Any]:
        lines = self.http.get(f"{BATCHES}/{batch_id}/results").text.splitlines()
        rows = [json.loads(line) for line in lines]
        return {row["custom_id"]: row for row in rows}


@pytest.fixture(scope="module")
def apis() -> Iterator[tuple[Api, Api]]:
    organisation = {
        "id": "org-conformance",
        "keys": [UPSTREAM_KEY],
        "limits": {"default": {"rpm": 60_000, "itpm": 60_000_000, "otpm": 60_000_000}},
    }
    settings = {
        "service": {"ttft_seconds": 0.01, "tokens_per_second": None, "output_tokens": 20},
        "organisations": [organisation],
        "batches": {"start_seconds": 1.0, "items_per_second": 1_000.0},
    }
    headers = {"anthropic-version": "2026-10-21"}
    with running(read(settings)) as claude:
        pool = {"keys": [{"id": "main", "api_key": UPSTREAM_KEY, "base_url": claude.url}]}
        stack = LocalStack(key_pool=pool, client_key=CLIENT_KEY, tenant="acme")
        with (
            stack.running() as ready,
            httpx.Client(
                base_url=claude.url,
                headers={**headers, "authorization": f"Bearer {UPSTREAM_KEY}"},
                timeout=30,
            ) as theirs,
            httpx.Client(
                base_url=ready.api_url,
                headers={**headers, "authorization": f"Bearer {CLIENT_KEY}"},
                timeout=30,
            ) as ours,
        ):
            yield Api(theirs), Api(ours)


def alike(value: Any, name: str = "") -> Any:
    """Return the value with whatever differs by nature replaced by its kind."""
    if isinstance(value, dict):
        return {key: alike(each, key) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [alike(each) for each in value]
    if name == "service_tier":
        return "<what was paid>"
    if not isinstance(value, str):
        return value
    if name == "results_url":
        return re.sub(r"^http://[^/]+(/_aws/execute-api/\w+)?|msgbatch_\w+", "<...>", value)
    kind = re.sub(r"_.*", "_<...>", value) if name in BY_NATURE else value
    return TIME.sub("<time>", kind)


OWN_WORDS: Final = {
    "empty-messages": "messages: List should have at least 1 item",
    "stream": "stream: Input should be False",
    "requests.1": "requests.1: duplicate custom_id 'a'; first used by item 0",
    "x": "requests: Field required",
}
"""Where Sluice uses pydantic's words, or names the earlier item, and Claude (as simulated) has its own sentence."""


def reason(message: str) -> str:
    """Return the first problem a message names, as Claude names it: its field within the request, without the value."""
    first = message.partition("; ")[0].removeprefix("params.")
    return re.sub(r" \(got .*\)$| after validation, not 0$", "", first)


def requests(rows: dict[str, Any]) -> dict[str, Any]:
    return {"requests": [{"custom_id": name, "params": params} for name, params in rows.items()]}


@pytest.fixture(scope="module")
def lives(apis: tuple[Api, Api]) -> tuple[Any, Any]:
    """A batch's whole life at each of the two."""
    told = []
    for api in apis:
        status, created = api.ask("POST", BATCHES, requests(ROWS))
        ended = api.ended(created["id"])
        told.append(
            {
                "status": status,
                "created": created,
                "ended": ended,
                "list": api.ask("GET", f"{BATCHES}?limit=1"),
                "results": api.results(created["id"]),
                "delete": api.ask("DELETE", f"{BATCHES}/{created['id']}"),
                "after": api.ask("GET", f"{BATCHES}/{created['id']}")[0],
            }
        )
    return told[0], told[1]


@pytest.mark.parametrize("moment", ["status", "created", "ended", "list", "delete", "after"])
def test_a_batch_is_shown_in_the_same_objects_throughout_its_life(
    lives: tuple[Any, Any], moment: str
) -> None:
    theirs, ours = lives

    assert alike(theirs[moment]) == alike(ours[moment])


@pytest.mark.parametrize("row", ROWS)
def test_a_row_has_the_same_result(lives: tuple[Any, Any], row: str) -> None:
    theirs, ours = (life["results"][row] for life in lives)
    # Claude names no request in a batch's errors; the id of the call that failed is of use.
    if theirs["result"]["type"] == "errored":
        theirs["result"]["error"]["request_id"] = ours["result"]["error"]["request_id"]
        said, own = (each["result"]["error"]["error"] for each in (theirs, ours))
        own["message"] = reason(own["message"])
        said["message"] = OWN_WORDS.get(row, said["message"])

    assert alike(theirs) == alike(ours)


def test_a_row_that_fills_the_prompt_cache_runs(apis: tuple[Api, Api]) -> None:
    """Claude rejects it in a batch, because the cache expires before the batch runs; here it is an ordinary request."""
    row = {"model": MODEL, "max_tokens": 0, "messages": HELLO}
    found = []
    for api in apis:
        _, created = api.ask("POST", BATCHES, requests({"warm": row}))
        api.ended(created["id"])
        found.append(api.results(created["id"])["warm"]["result"]["type"])

    assert ["errored", "succeeded"] == found


def test_the_service_tier_is_the_one_that_was_billed(lives: tuple[Any, Any]) -> None:
    tiers = [
        life["results"]["plain"]["result"]["message"]["usage"]["service_tier"] for life in lives
    ]

    assert ["batch", "standard"] == tiers


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"requests": {}},
        {"requests": []},
        {"requests": [7]},
        {"requests": [{"params": {}}]},
        {"requests": [{"custom_id": "a b", "params": {}}]},
        {"requests": [{"custom_id": "a"}]},
        {"requests": [{"custom_id": "a", "params": []}]},
        {"requests": [{"custom_id": "a", "params": {}, "x": 1}]},
        {"requests": [{"custom_id": "a", "params": {}}] * 2},
        {"x": 1},
    ],
    ids=lambda body: json.dumps(body)[:60],
)
def test_a_create_is_refused_for_the_same_reason(apis: tuple[Api, Api], body: Any) -> None:
    theirs, ours = (api.ask("POST", BATCHES, body) for api in apis)

    said, own = theirs[1]["error"], ours[1]["error"]
    is_duplicate = "duplicate custom_id" in own["message"]
    own["message"] = own["message"] if is_duplicate else reason(own["message"])
    said["message"] = OWN_WORDS.get(
        said["message"].partition(":")[0].removesuffix(".custom_id"), said["message"]
    )
    assert alike(theirs) == alike(ours)


def test_a_cancel_is_answered_alike(apis: tuple[Api, Api]) -> None:
    answers = []
    for api in apis:
        _, created = api.ask("POST", BATCHES, requests({"plain": ROWS["plain"]}))
        answers.append(api.ask("POST", f"{BATCHES}/{created['id']}/cancel"))

    assert alike(answers[0]) == alike(answers[1])


@pytest.mark.parametrize("path", ["", "/results", "/cancel"])
def test_an_unknown_batch_is_not_found(apis: tuple[Api, Api], path: str) -> None:
    method = "POST" if path == "/cancel" else "GET"

    theirs, ours = (api.ask(method, f"{BATCHES}/msgbatch_none{path}") for api in apis)

    for status, body in (theirs, ours):
        assert (404, "not_found_error") == (status, body["error"]["type"])
        assert body["error"]["message"].startswith("message_batch: msgbatch_none")
