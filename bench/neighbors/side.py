"""A tenant of the local stack, with what it can do to it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from scripts.local_stack import Ready

MODEL: Final = "claude-haiku-5-5"
TIMEOUT_SECONDS: Final = 60.0

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Side:
    """One tenant, and for a hostile one everything that an outsider reaches."""

    ready: Ready
    tenant: str
    key: str
    stopped: threading.Event = field(default_factory=threading.Event)
    """The measurement is over: loads that go on end."""

    def row(self, name: str, **params: Any) -> Json:
        """Return a row or job whose call is found again by its name."""
        content = [{"role": "user", "content": f"What does {name} say?"}]
        own = {"model": MODEL, "max_tokens": 64, "messages": content}
        user = {"user_id": f"{self.tenant}-{name}"}
        return {"custom_id": f"{self.tenant}-{name}", "params": {**own, "metadata": user, **params}}

    def rows(self, name: str, count: int) -> list[Json]:
        """Return so many rows."""
        return [self.row(f"{name}-{number}") for number in range(count)]

    def upload(self, name: str, lines: Iterable[Json | str]) -> None:
        """Put a file under `in/`. Text is a line as it is."""
        texts = (each if isinstance(each, str) else json.dumps(each) for each in lines)
        self.put(f"{name}.jsonl", "".join(f"{text}\n" for text in texts).encode())

    def put(self, name: str, body: bytes) -> None:
        """Put a file of any kind under `in/`."""
        self.ready.client("s3").put_object(
            Bucket=self.ready.resources["DataBucket"], Key=f"in/{self.tenant}/{name}", Body=body
        )

    def create(self, rows: Sequence[Json]) -> str:
        """Create a batch by the Message Batches API; return its id."""
        answer = self.send("POST", "/v1/messages/batches", json.dumps({"requests": rows}).encode())
        return str(answer.raise_for_status().json()["id"])

    def submit(self, jobs: Sequence[Json]) -> list[str]:
        """Submit single jobs; return their ids."""
        body = json.dumps({"jobs": jobs}).encode()
        answer = self.send("POST", "/jobs", body).raise_for_status().json()
        return [str(each["job"]["id"]) for each in answer["data"]]

    def get(self, path: str) -> Json:
        """Return what a GET answers."""
        answer: Json = self.send("GET", path).raise_for_status().json()
        return answer

    def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """Send any request, with the tenant's key unless `headers` say otherwise."""
        return httpx.request(
            method,
            f"{self.ready.api_url}{path}",
            content=body,
            headers={"content-type": "application/json", "x-api-key": self.key, **(headers or {})},
            timeout=TIMEOUT_SECONDS,
            trust_env=False,
        )
