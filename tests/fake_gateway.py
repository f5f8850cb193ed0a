"""Sluice's HTTP API without Sluice: jobs in memory on a loopback port, which end after they have been read.

Knobs: `looks_until_done` (how often a job is read before it ends), `ending_of` (the
final state of a job, by the text of its prompt), `script` (answers that replace the next ones),
`lose_replies` (calls that are carried out, but whose reply is lost).
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qs, quote, unquote, urlsplit

from scripts.local_doors import LocalHandler

Json = dict[str, Any]

CLIENT_KEY = "sluice_test_key_of_a_tenant"
NOW = "2026-12-01T12:00:00Z"
FINAL = ("succeeded", "errored", "canceled", "expired")


@dataclass
class Scripted:
    """An answer that comes in place of the real one."""

    status: int
    body: Json | str
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class FakeGateway:
    """What the gateway holds and what was asked of it."""

    url: str = ""
    looks_until_done: int = 1
    ending_of: dict[str, str] = field(default_factory=dict)
    script: list[Scripted] = field(default_factory=list)
    lose_replies: int = 0
    reject: dict[str, Json] = field(default_factory=dict)
    """Prompt text -> the error its job is rejected with."""
    jobs: dict[str, Json] = field(default_factory=dict)
    looks: dict[str, int] = field(default_factory=dict)
    calls: list[tuple[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    idempotency_keys: list[str] = field(default_factory=list)
    limits: list[Json] = field(
        default_factory=lambda: [
            {
                "group": "org-one/claude-haiku-5-5",
                "organization": "org-one",
                "model_group": "claude-haiku-5-5",
                "limits": {"requests": 600, "input_tokens": 100_000, "output_tokens": None},
                "learned": True,
                "blocked_until": None,
                "blocked_reason": None,
                "rate_factor": 1.0,
            }
        ]
    )
    parts: dict[str, bytes] = field(default_factory=dict)
    """What was uploaded, by file name."""
    result_files: dict[str, bytes] = field(default_factory=dict)
    """`results` and `errors` of the batch that an upload becomes."""
    batch_problem: str | None = None
    lanes: Json = field(default_factory=dict)
    """What the batch shows of its lane."""
    headers: list[dict[str, str]] = field(default_factory=list)
    """Those of each POST, with names in lower case."""
    break_downloads: bool = False
    """Whether downloads end before they are complete."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(  # noqa: C901, PLR0911, PLR0912 - one line per route
        self, method: str, target: str, body: bytes, key: str | None
    ) -> tuple[int, Json]:
        """Carries out one call."""
        parts = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        match method, parts.path.strip("/").split("/"):
            case "POST", ["jobs"]:
                return self._submit(json.loads(body), key)
            case "GET", ["jobs"] if "ids" in query:
                ids = query["ids"].split(",")
                assert len(ids) <= 100
                data = [self._summary(self._look(each)) for each in ids if each in self.jobs]
                return 200, {"data": data, "has_more": False, "next_page": None}
            case "GET", ["jobs"]:
                return 200, self._page(query)
            case "GET", ["jobs", job_id] if unquote(job_id) in self.jobs:
                return 200, self.jobs[job_id]
            case "DELETE", ["jobs", job_id] if job_id in self.jobs:
                return 200, self._cancel(self.jobs[job_id])
            case "POST", ["uploads"]:
                return 200, self._begin(json.loads(body))
            case "PUT", ["bucket", name]:
                self.parts[unquote(name)] = body
                return 200, {}
            case "POST", ["uploads", "complete"]:
                return 200, self._batch(json.loads(body)["name"])
            case "DELETE", ["uploads"]:
                return 200, {}
            case "GET", ["batches", "batch_1"] if self.parts:
                return 200, self._batch(next(iter(self.parts)))
            case "GET", ["batches", "batch_1", "links"]:
                return 200, {
                    kind: f"{self.url}/bucket/{kind}" for kind in ("results", "errors", "summary")
                }
            case "GET", ["usage"]:
                return 200, _usage(query)
            case "GET", ["limits"]:
                return 200, {"data": self.limits}
            case _:
                return 404, _error("not_found_error", "no such thing")

    def _submit(self, body: Json, key: str | None) -> tuple[int, Json]:
        if body.get("lane") in {"batch", "auto"}:
            self.parts["jobs"] = json.dumps(body["jobs"]).encode()
            self.lanes = {"lane": body["lane"], "lane_asked": body["lane"]}
            return 202, {**self._batch("batch_1"), "type": "batch"}
        data: list[Json] = []
        for index, request in enumerate(body["jobs"]):
            prompt = str(request["params"]["messages"][0]["content"])
            if prompt in self.reject:
                data.append({"index": index, "status": "rejected", "error": self.reject[prompt]})
                continue
            job_id = "job_" + hashlib.sha256(f"{key}/{index}".encode()).hexdigest()[:32]
            job = self.jobs.setdefault(job_id, _new_job(job_id, request))
            data.append({"index": index, "status": "accepted", "job": job})
        rejected = sum(entry["status"] == "rejected" for entry in data)
        if rejected == len(data):
            return 400, {**_error("invalid_request_error", "no job was accepted"), "data": data}
        accepted = len(data) - rejected
        return 202, {"type": "job_list", "accepted": accepted, "rejected": rejected, "data": data}

    def _begin(self, body: Json) -> Json:
        put = f"{self.url}/bucket/{quote(body['name'], safe='')}"
        part = {"part": 1, "url": put}
        facts = {"id": "upload_1", "name": body["name"], "parts": 1}
        return {**facts, "part_bytes": 5_000_000, "links": [part]}

    def _batch(self, name: str) -> Json:
        done = self.result_files.get("results", b"").count(b"\n")
        invalid = self.result_files.get("errors", b"").count(b"\n")
        states = {"errored": 0, "canceled": 0, "expired": 0, "duplicates": 0}
        return {
            "id": "batch_1",
            "name": name,
            "state": "ended",
            "rows": {
                "expected": done,
                "done": done,
                "succeeded": done,
                "invalid": invalid,
                **states,
            },
            "problem": self.batch_problem,
            **self.lanes,
            "cost_micro_usd": 0,
            "input_tokens": 0,
            "output_tokens": 0,
            "created_at": NOW,
            "estimated_end_at": None,
            "ended_at": NOW,
            "expires_at": NOW,
        }

    def _look(self, job_id: str) -> Json:
        job = self.jobs[job_id]
        self.looks[job_id] = self.looks.get(job_id, 0) + 1
        if job["state"] not in FINAL:
            job["state"] = "running"
            if self.looks[job_id] >= self.looks_until_done:
                _finish(job, self.ending_of.get(job["prompt"], "succeeded"))
        return job

    def finish(self) -> None:
        """Ends every job, as if it had been waited for."""
        for job in self.jobs.values():
            _finish(job, self.ending_of.get(job["prompt"], "succeeded"))

    @staticmethod
    def _summary(job: Json) -> Json:
        return {name: job[name] for name in job if name not in {"message", "attempts", "text"}}

    def _page(self, query: Json) -> Json:
        jobs = [
            self._summary(job)
            for job in reversed(self.jobs.values())
            if query.get("state") in {None, job["state"]}
        ]
        start, size = int(query.get("page", 0)), int(query["limit"])
        more = start + size < len(jobs)
        return {
            "data": jobs[start : start + size],
            "has_more": more,
            "next_page": str(start + size) if more else None,
        }

    @staticmethod
    def _cancel(job: Json) -> Json:
        if job["state"] == "running":
            job["cancel_requested"] = True
        elif job["state"] == "queued":
            job["state"] = "canceled"
        return job


def _new_job(job_id: str, request: Json) -> Json:
    return {
        "id": job_id,
        "type": "job",
        "state": "queued",
        "custom_id": request.get("custom_id"),
        "lane": "live",
        "model": request["params"]["model"],
        "created_at": NOW,
        "started_at": None,
        "finished_at": None,
        "deadline": request.get("deadline"),
        "attempts_used": 0,
        "snoozes": 0,
        "attempts": [],
        "usage": None,
        "cost_micro_usd": None,
        "cost_usd": None,
        "message": None,
        "text": None,
        "error": None,
        "metadata": request.get("metadata") or {},
        "fallback_models": request.get("fallback_models") or [],
        "cancel_requested": False,
        # Not part of the API: lets the fake know its jobs.
        "prompt": str(request["params"]["messages"][0]["content"]),
    }


def _finish(job: Json, state: str) -> None:
    job.update(state=state, started_at=NOW, finished_at=NOW, attempts_used=1)
    attempt = {
        "attempt": 1,
        "at": NOW,
        "ended_at": NOW,
        "model": job["model"],
        "outcome": state,
        "error": None,
        "request_id": "req_upstream_1",
        "usage": None,
        "cost_micro_usd": None,
    }
    if state == "succeeded":
        text = f"answer to {job['prompt']}"
        usage = {"input_tokens": 10, "output_tokens": 20}
        message = {"type": "message", "content": [{"type": "text", "text": text}], "usage": usage}
        job.update(message=message, text=text, usage=usage, cost_micro_usd=123)
    elif state == "errored":
        attempt["error"] = {"type": "invalid_request_error", "message": "bad", "status": 400}
        job["error"] = {"type": "invalid_request_error", "message": "max_tokens: too large"}
    job["attempts"] = [attempt]


def _usage(query: Json) -> Json:
    numbers = {
        "calls": 3,
        "input_tokens": 3000,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 5,
        "output_tokens": 700,
        "cost_micro_usd": 1_234_567,
        "cost_usd": "1.234567",
    }
    group_by = query.get("group_by", "day,model").split(",")
    row = {"day": "2026-12-01", "model": "claude-haiku-5-5", "lane": "live"}
    return {
        "from": query.get("from", "2026-12-01"),
        "to": query.get("to", "2026-12-01"),
        "group_by": group_by,
        "data": [{name: row[name] for name in group_by} | numbers],
        "total": numbers,
    }


def _error(kind: str, message: str) -> Json:
    error = {"type": kind, "message": message}
    return {"type": "error", "error": error, "request_id": "req_gateway_1"}


class _Handler(LocalHandler):
    protocol_version = "HTTP/1.1"
    gateway: ClassVar[FakeGateway]

    def _serve(self) -> None:
        gateway = self.gateway
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        with gateway.lock:
            gateway.calls.append((self.command, self.path))
            key = self.headers.get("idempotency-key")
            if self.command == "POST":
                gateway.bodies.append(body)
                gateway.idempotency_keys.append(key or "")
                gateway.headers.append({name.lower(): each for name, each in self.headers.items()})
            if gateway.script:
                scripted = gateway.script.pop(0)
                self._reply(scripted.status, scripted.body, scripted.headers)
                return
            if self.command == "GET" and self.path.startswith("/bucket/"):
                content = gateway.result_files.get(self.path.rpartition("/")[2], b"")
                if gateway.break_downloads:
                    self.close_connection = True
                    self.send_response(200)
                    self.send_header("content-length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content[: len(content) // 2])
                    return
                self._reply(200, content)
                return
            if self.command != "PUT" and self.headers.get("x-api-key") != CLIENT_KEY:
                self._reply(401, _error("authentication_error", "this client key is not known"))
                return
            status, answer = gateway.answer(self.command, self.path, body, key)
            if gateway.lose_replies:
                gateway.lose_replies -= 1
                self.close_connection = True
                return
        self._reply(status, answer)

    do_GET = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815 - http.server's names

    def _reply(
        self, status: int, body: Json | str | bytes, headers: dict[str, str] | None = None
    ) -> None:
        text = json.dumps(body) if isinstance(body, dict) else body
        encoded = text.encode() if isinstance(text, str) else text
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("content-type", "application/json")
        self.send_header("etag", '"1"')
        self.send_header("content-length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, *_: object) -> None:
        """Stays quiet."""


@contextmanager
def running_gateway() -> Iterator[FakeGateway]:
    """Serves a fresh fake until the block ends."""
    gateway = FakeGateway()
    handler = type("Handler", (_Handler,), {"gateway": gateway})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    gateway.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield gateway
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
