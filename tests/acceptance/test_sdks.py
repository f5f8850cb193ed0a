"""Anthropic's own SDKs, as published, with Sluice as `base_url`: two generations of each, against the local stack."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from scripts.claude_simulator import read, running
from scripts.local_doors import LocalHandler
from scripts.local_stack import LocalStack, Ready
from scripts.local_stack.emulator import free_port

REPOSITORY: Final = Path(__file__).resolve().parents[2]
SDKS: Final = REPOSITORY / "tests" / "sdk"
UPSTREAM_KEY: Final = "sk-ant-test-sdks"
CLIENT_KEY: Final = "sluice_sdks_of_acme"
NODE: Final = shutil.which("node")

VERSIONS: Final = {
    "python 2": "2.12.0",
    "python 1": "1.17.0",
    "typescript 1": "1.12.0",
    "typescript 0": "0.137.0",
}
BEARERS: Final = ("python 2", "typescript 1")
"""Those that send the key as a bearer token, which they drop when they follow a link to another place."""


def command(sdk: str) -> list[str]:
    """Return how to run a program with an SDK."""
    language, generation = sdk.split()
    if language == "typescript":
        folder = SDKS / f"typescript-{generation}"
        if NODE is None:
            pytest.skip("node is not installed: Anthropic's TypeScript SDK is not tried")
        if not (folder / "node_modules").exists():
            pytest.skip(f"{folder.name} has no node_modules: run `make acceptance`")
        return [NODE, str(SDKS / "batches.mjs"), str(folder)]
    interpreter = sys.executable
    if generation == "1":
        interpreter = str(REPOSITORY / ".venv-sdk1" / "bin" / "python")
        if not Path(interpreter).exists():
            pytest.skip(".venv-sdk1 is not there: run `make acceptance`")
    return [interpreter, str(SDKS / "batches.py")]


def run(sdk: str, *arguments: str) -> Any:
    """Run the program; return what it saw."""
    done = subprocess.run(
        [*command(sdk), *arguments], capture_output=True, text=True, check=False, timeout=120
    )
    assert 0 == done.returncode, done.stderr
    return json.loads(done.stdout)


@dataclass
class Bucket:
    """S3 at an origin of its own: passes everything on, and remembers what it was asked with."""

    to: str = ""
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def fetched_by_link(self) -> list[dict[str, str]]:
        """Return the headers of those who came with a link."""
        return [headers for path, headers in self.asked if "X-Amz-Signature" in path]


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    here = Bucket()

    class Pass(LocalHandler):
        protocol_version = (
            "HTTP/1.1"  # boto3 asks before it sends a body, and waits a second for an answer
        )

        def do_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            here.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}))
            with closing(HTTPConnection(here.to)) as connection:
                # Its Host, too: a link is signed for the address it names.
                connection.request(self.command, self.path, body, dict(self.headers))
                answer = connection.getresponse()
                content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in {"transfer-encoding", "content-length", "connection"}:
                    self.send_header(name, value)
            length = answer.getheader("content-length") if self.command == "HEAD" else None
            self.send_header("content-length", length or str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_any  # noqa: N815 - http.server's names

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Pass)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    here.url = f"http://127.0.0.1:{server.server_port}"
    yield here
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def ready(bucket: Bucket) -> Iterator[Ready]:
    organisation = {
        "id": "org-sdks",
        "keys": [UPSTREAM_KEY],
        "limits": {"default": {"rpm": 60_000, "itpm": 60_000_000, "otpm": 60_000_000}},
    }
    service = {"ttft_seconds": 0.05, "tokens_per_second": None, "output_tokens": 50}
    with running(read({"service": service, "organisations": [organisation]})) as claude:
        pool = {"keys": [{"id": "main", "api_key": UPSTREAM_KEY, "base_url": claude.url}]}
        port = free_port(0)
        bucket.to = f"127.0.0.1:{port}"
        stack = LocalStack(
            port=port,
            key_pool=pool,
            client_key=CLIENT_KEY,
            tenant="acme",
            bucket_url=bucket.url,
        )
        with stack.running() as started:
            yield started


@pytest.fixture(scope="module", params=VERSIONS)
def sdk(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def seen(sdk: str, ready: Ready) -> Any:
    """What the program saw that creates, polls, reads, lists, cancels and deletes."""
    return run(sdk, ready.api_url, CLIENT_KEY)


def test_it_is_the_published_package(sdk: str, seen: Any) -> None:
    assert VERSIONS[sdk] == seen["version"]


def test_a_batch_is_created_polled_and_ends(seen: Any, ready: Ready) -> None:
    created, ended = seen["created"], seen["ended"]

    assert ("message_batch", "in_progress", None) == (
        created["type"],
        created["processing_status"],
        created["results_url"],
    )
    assert {"processing": 12, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0} == created[
        "request_counts"
    ]
    assert "ended" == ended["processing_status"]
    assert {"processing": 0, "succeeded": 11, "errored": 1, "canceled": 0, "expired": 0} == ended[
        "request_counts"
    ]
    assert f"{ready.api_url}/v1/messages/batches/{created['id']}/results" == ended["results_url"]


def test_its_results_are_read_in_order(seen: Any) -> None:
    results = seen["results"]

    assert [f"row-{number}" for number in range(12)] == [each["custom_id"] for each in results]
    assert {"succeeded"} == {each["type"] for each in results if each["custom_id"] != "row-7"}
    assert ("errored", "not_found_error") == (results[7]["type"], results[7]["error"])


def test_batches_are_listed_page_by_page_newest_first(seen: Any) -> None:
    ours = [each for each in seen["paged"] if each in seen["ids"]]

    assert seen["ids"][::-1] == ours


def test_a_batch_is_canceled_and_one_that_ended_deleted(seen: Any) -> None:
    assert "canceling" == seen["canceled"]
    assert {"id": seen["ids"][2], "type": "message_batch_deleted"} == seen["deleted"]
    assert ("NotFoundError", 404, "not_found_error") == (
        seen["missing"]["class"],
        seen["missing"]["status"],
        seen["missing"]["type"],
    )


def test_errors_are_the_sdks_own(seen: Any) -> None:
    assert ("BadRequestError", 400) == (seen["refused"]["class"], seen["refused"]["status"])
    assert "duplicate custom_id" in seen["refused"]["message"]
    assert (413, "request_too_large") == (seen["too_large"]["status"], seen["too_large"]["type"])
    assert "POST /uploads" in seen["too_large"]["message"]
    assert ("AuthenticationError", 401) == (seen["no_key"]["class"], seen["no_key"]["status"])
    assert seen["refused"]["request_id"].startswith("req_")


def test_a_batch_asks_for_its_lane_by_a_header(seen: Any, ready: Ready) -> None:
    shown = [
        httpx.get(f"{ready.api_url}/batches/{batch_id}", headers={"x-api-key": CLIENT_KEY}).json()
        for batch_id in seen["ids"][:2]
    ]

    assert [("live", None), ("batch", "batch")] == [
        (each["lane"], each["lane_asked"]) for each in shown
    ]
    assert ("BadRequestError", 400) == (seen["no_lane"]["class"], seen["no_lane"]["status"])
    assert (
        "sluice-lane: Input should be 'live', 'batch' or 'auto' (got 'cheap')"
        in seen["no_lane"]["message"]
    )


def test_results_too_large_for_an_answer_never_cost_a_client_its_key(
    sdk: str, seen: Any, ready: Ready, bucket: Bucket
) -> None:
    """Bearer clients follow a link to S3 without their key; the others would send it along, and get none."""
    batch_id = seen["created"]["id"]
    ready.client("s3").delete_object(
        Bucket=ready.resources["DataBucket"], Key=f"batches/{batch_id}/results.jsonl.gz"
    )
    before = len(bucket.fetched_by_link())

    found = run(sdk, ready.api_url, CLIENT_KEY, batch_id)

    followed = bucket.fetched_by_link()[before:]
    if sdk in BEARERS:
        assert seen["results"] == found["results"]
        assert 1 == len(followed)
        assert CLIENT_KEY not in json.dumps(followed)
    else:
        assert ("BadRequestError", 400) == (found["error"]["class"], found["error"]["status"])
        assert "Authorization: Bearer" in found["error"]["message"]
        assert [] == followed


def test_a_create_that_is_sent_again_makes_one_batch(ready: Ready) -> None:
    """What the SDKs do when an answer was lost: the same body, and a count."""
    row = {"model": "claude-haiku-5-5", "max_tokens": 8}
    body = {"requests": [{"custom_id": "a", "params": {**row, "messages": []}}]}
    headers = {"authorization": f"Bearer {CLIENT_KEY}", "user-agent": "Anthropic/Python 2.12.0"}

    def create(count: int) -> str:
        answer = httpx.post(
            f"{ready.api_url}/v1/messages/batches",
            json=body,
            headers={**headers, "x-stainless-retry-count": str(count)},
        )
        return str(answer.json()["id"])

    first, again, another = create(0), create(1), create(0)

    assert first == again != another
