"""The batch lane, from outside: SDK batches and files through Message Batches of the simulator, on the local stack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx
import pytest
from anthropic import Anthropic
from anthropic.types.messages import MessageBatch

from scripts.claude_simulator import Running, read, running
from scripts.local_stack import LocalStack, Ready

UPSTREAM_KEY: Final = "sk-ant-test-half-price"
MODEL: Final = "claude-sonnet-5"
PATIENCE_SECONDS: Final = 120.0
SCHEDULE: Final = Path(__file__).parents[2] / "events" / "schedule.json"

Found = TypeVar("Found")


@dataclass(frozen=True)
class Lane:
    """The gateway as a caller sees it, and the stack behind it."""

    http: httpx.Client
    sdk: Anthropic
    ready: Ready
    claude: Running

    def within(self, find: Callable[[], Found | None]) -> Found:
        """Ask again until there is an answer; the governor runs each second instead of each minute."""
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            self.ready.client("lambda").invoke(
                FunctionName=self.ready.resources["GovernorFunction"],
                Payload=SCHEDULE.read_bytes(),
            )
            if found := find():
                return found
            time.sleep(1)
        pytest.fail(f"not within {PATIENCE_SECONDS} s")

    def ended(self, batch_id: str) -> MessageBatch:
        """Wait for the end of a batch."""

        def found() -> MessageBatch | None:
            batch = self.sdk.messages.batches.retrieve(batch_id)
            return batch if batch.ended_at else None

        return self.within(found)

    def stats(self) -> Any:
        return httpx.get(f"{self.claude.url}/_simulator/stats").json()

    def open_requests(self) -> int:
        """Return how many requests upstream works on."""
        return sum(each["request_counts"]["processing"] for each in self.upstream())

    def upstream(self) -> list[Any]:
        """Return the Message Batches that upstream has."""
        answer = httpx.get(
            f"{self.claude.url}/v1/messages/batches",
            headers={"x-api-key": UPSTREAM_KEY, "anthropic-version": "2023-06-01"},
        )
        return list(answer.json()["data"])


@pytest.fixture(scope="module")
def lane() -> Iterator[Lane]:
    limits = {"default": {"rpm": 600, "itpm": 2_000_000, "otpm": 400_000}}
    settings = {
        "service": {"ttft_seconds": 0.1, "tokens_per_second": 1_000, "output_tokens": 50},
        "batches": {"items_per_second": 30},
        "organisations": [{"id": "org-half", "keys": [UPSTREAM_KEY], "limits": limits}],
    }
    with running(read(settings)) as claude:
        keys = [{"id": "main", "api_key": UPSTREAM_KEY, "base_url": claude.url}]
        environment = {"SLUICE_GATHER_SECONDS": "1", "SLUICE_WAITS": '{"poll_ms": 1000}'}
        local = LocalStack(key_pool={"keys": keys}, tenant="acme", environment=environment)
        with (
            local.running() as ready,
            httpx.Client(
                base_url=ready.api_url, headers={"x-api-key": ready.client_key}, timeout=30
            ) as client,
            Anthropic(base_url=ready.api_url, api_key=ready.client_key) as sdk,
        ):
            yield Lane(client, sdk, ready, claude)


def requests(name: str, count: int) -> Any:
    return [
        {
            "custom_id": f"row-{number}",
            "params": {
                "model": MODEL,
                "max_tokens": 64,
                "messages": [{"role": "user", "content": f"Row {number} of {name}"}],
            },
        }
        for number in range(count)
    ]


def test_a_batch_of_the_sdk_costs_half_and_calls_nobody_live(lane: Lane) -> None:
    calls, batches = lane.stats()["requests"], len(lane.upstream())
    batch = lane.sdk.messages.batches.create(
        requests=requests("sdk", 150), extra_headers={"sluice-lane": "batch"}
    )

    ended = lane.ended(batch.id)

    assert 150 == ended.request_counts.succeeded
    results = list(lane.sdk.messages.batches.results(batch.id))
    assert [f"row-{number}" for number in range(150)] == [each.custom_id for each in results]
    assert calls == lane.stats()["requests"], "no live call"
    assert [150] == [
        sum(each["request_counts"].values()) for each in lane.upstream()[: -batches or None]
    ]
    shown = lane.http.get(f"/batches/{batch.id}").json()
    # The usage of each answer at the list price of claude-sonnet-5, $2 and $10 per million tokens, and half of it.
    usage = [each.result.message.usage for each in results if each.result.type == "succeeded"]
    live = sum(2 * each.input_tokens + 10 * each.output_tokens for each in usage)
    assert abs(shown["cost_micro_usd"] - live / 2) <= len(usage)
    assert abs(shown["saved_micro_usd"] - live / 2) <= len(usage)


def test_usage_names_the_lane(lane: Lane) -> None:
    before = _usage(lane)
    batch = lane.sdk.messages.batches.create(
        requests=requests("usage", 20), extra_headers={"sluice-lane": "batch"}
    )
    lane.within(lambda: lane.sdk.messages.batches.retrieve(batch.id).ended_at)

    assert before.get("batch", 0) + 20 == _usage(lane)["batch"]
    assert before.get("live", 0) == _usage(lane).get("live", 0)


def _usage(lane: Lane) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in lane.http.get("/usage", params={"group_by": "lane"}).json()["data"]:
        found[row["lane"]] = found.get(row["lane"], 0) + row["calls"]
    return found


def test_a_file_with_bad_rows_and_rows_for_the_live_lane_ends_in_its_order(lane: Lane) -> None:
    rows = requests("file", 120)
    rows[7]["params"]["speed"] = "fast"
    lines = [json.dumps(each) for each in rows]
    lines[3] = lines[3][:40]
    lane.ready.client("s3").put_object(
        Bucket=lane.ready.resources["DataBucket"],
        Key="in/acme/half.jsonl",
        Body="\n".join(lines).encode(),
        Metadata={"sluice-lane": "batch"},
    )

    def summary() -> Any:
        client = lane.ready.client("s3")
        try:
            answer = client.get_object(
                Bucket=lane.ready.resources["DataBucket"], Key="out/acme/half/summary.json"
            )
        except client.exceptions.NoSuchKey:
            return None
        return json.loads(answer["Body"].read())

    found = lane.within(summary)

    assert ("batch", 1) == (found["lane"], found["counts"]["invalid"])
    assert 119 == found["counts"]["succeeded"] + found["counts"]["errored"]
    assert float(found["saved_usd"]) > 0


def test_an_uploaded_file_is_read_where_it_is(lane: Lane, tmp_path: Path) -> None:
    file = tmp_path / "uploaded.jsonl"
    file.write_text("".join(f"{json.dumps(each)}\n" for each in requests("upload", 10)))
    command = ["upload", str(file), "--lane", "batch", "--url", lane.ready.api_url]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.cli", *command],
        env=os.environ | {"SLUICE_KEY": lane.ready.client_key},
        capture_output=True,
        text=True,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    batch_id = done.stdout.strip()

    lane.within(lambda: lane.http.get(f"/batches/{batch_id}").json()["ended_at"])

    assert 10 == lane.http.get(f"/batches/{batch_id}").json()["rows"]["succeeded"]


def test_a_batch_whose_rows_were_deleted_ends_with_the_reason(lane: Lane) -> None:
    client, bucket = lane.ready.client("s3"), lane.ready.resources["DataBucket"]
    batch = lane.sdk.messages.batches.create(
        requests=requests("deleted", 10), extra_headers={"sluice-lane": "batch"}
    )
    for each in client.list_objects_v2(Bucket=bucket, Prefix=f"batches/{batch.id}/")["Contents"]:
        client.delete_object(Bucket=bucket, Key=each["Key"])

    lane.within(lambda: lane.sdk.messages.batches.retrieve(batch.id).ended_at)

    assert 1 == lane.http.get(f"/batches/{batch.id}").json()["rows"]["invalid"]


def test_a_canceled_batch_keeps_what_was_paid(lane: Lane) -> None:
    batch = lane.sdk.messages.batches.create(
        requests=requests("cancel", 600), extra_headers={"sluice-lane": "batch"}
    )
    lane.within(lane.open_requests)
    lane.sdk.messages.batches.cancel(batch.id)

    ended = lane.ended(batch.id)

    counts = ended.request_counts
    assert 600 == counts.succeeded + counts.canceled
    assert counts.canceled > 0
