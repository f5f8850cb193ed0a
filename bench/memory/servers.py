"""Loopback servers for the memory benchmark: a Claude whose answers are as large as asked for, and a slow receiver.

It has one Message Batch, which has ended, with the results that the load names.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from typing import Any, Final

from scripts.local_doors import LocalHandler

HOST: Final = "127.0.0.1"
EVENT_CHARACTERS: Final = 8_000
"""Of text in one event of a streamed answer."""

TEXT: Final = "How high is the water? It rises by a foot an hour, they say. "
EMOJI: Final = "\N{WATER WAVE}"
"""One in an answer, and Python needs four bytes for every character of it."""

_LIMITS: Final = {
    f"anthropic-ratelimit-{dimension}-{fact}": "1000000000"
    for dimension in ("requests", "input-tokens", "output-tokens")
    for fact in ("limit", "remaining")
}
BATCHES: Final = "/v1/messages/batches"
MESSAGE_BATCH: Final = "msgbatch_bench"
PIECE_BYTES: Final = 1024 * 1024
WEBHOOK: Final = "/webhook"
RECEIVER_SECONDS: Final = 5.0
RECEIVER_BYTES: Final = 16 * 1024 * 1024


class Servers:
    """Both servers. The load that runs configures what they do."""

    def __init__(self) -> None:
        self.answer_bytes = 1_000
        self.answer_seconds = 0.0
        self.calls = 0
        self.webhooks = 0
        self.body_bytes = 0
        """Of creates of Message Batches."""
        self.results: Callable[[], Iterator[bytes]] = lambda: iter(())
        """The lines of the results of the Message Batch."""
        self._counting = threading.Lock()

    def count(self, path: str) -> None:
        """Note a call of Claude, or a delivery."""
        with self._counting:
            if path == WEBHOOK:
                self.webhooks += 1
            else:
                self.calls += 1

    def text(self) -> str:
        """Return the text of an answer."""
        return EMOJI + (TEXT * (self.answer_bytes // len(TEXT) + 1))[: self.answer_bytes]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


@contextmanager
def servers() -> Iterator[tuple[Servers, str]]:
    """Run both; yield what they obey and their address. A webhook goes to `/webhook` there."""
    made = Servers()
    server = _Server((HOST, 0), type("Handler", (_Handler,), {"made": made}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield made, f"http://{HOST}:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(LocalHandler):
    protocol_version = "HTTP/1.1"
    made: Servers

    def do_POST(self) -> None:  # noqa: N802 - its name
        if self.path == BATCHES:
            self._receive_create()
            self._send("application/json", json.dumps(_batch("in_progress")).encode())
            return
        body = self.rfile.read(int(self.headers["content-length"]))
        self.made.count(self.path)
        if self.path == WEBHOOK:
            time.sleep(RECEIVER_SECONDS)
            self._send("text/plain", b"x" * RECEIVER_BYTES)
            return
        time.sleep(self.made.answer_seconds)
        if json.loads(body).get("stream") is True:
            self._send("text/event-stream", b"".join(_events(self.made.text())))
        else:
            content = [{"type": "text", "text": self.made.text()}]
            message = {**_message(), "content": content, "stop_reason": "end_turn"}
            self._send("application/json", json.dumps(message, ensure_ascii=False).encode())

    def do_GET(self) -> None:  # noqa: N802 - its name
        if self.path.endswith("/results"):
            self._send_results()
        elif self.path.startswith(f"{BATCHES}/"):
            self._send("application/json", json.dumps(_batch("ended")).encode())
        else:
            self._send("application/json", b'{"data": [], "has_more": false}')

    def _receive_create(self) -> None:
        """Read the body of a create piece by piece, and count its bytes."""
        left = int(self.headers["content-length"])
        while left and (piece := self.rfile.read(min(left, PIECE_BYTES))):
            left -= len(piece)
            self.made.body_bytes += len(piece)

    def _send_results(self) -> None:
        self.send_response(200)
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        for line in self.made.results():
            self.wfile.write(line)

    def _send(self, kind: str, content: bytes) -> None:
        self.send_response(200)
        headers = {
            **_LIMITS,
            "content-type": kind,
            "content-length": str(len(content)),
            "request-id": f"req_{self.made.calls}",
            "anthropic-organization-id": "org-bench",
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(content)
        except OSError:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Nobody reads it."""


def _message() -> dict[str, Any]:
    return {
        "id": "msg_bench",
        "type": "message",
        "role": "assistant",
        "model": "claude-haiku-5-5",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 20, "output_tokens": 20},
    }


def succeeded(custom_id: str, text: str) -> bytes:
    """Return a line of the results of a Message Batch."""
    message = {**_message(), "content": [{"type": "text", "text": text}], "stop_reason": "end_turn"}
    document = {"custom_id": custom_id, "result": {"type": "succeeded", "message": message}}
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _batch(status: str) -> dict[str, Any]:
    return {
        "id": MESSAGE_BATCH,
        "type": "message_batch",
        "processing_status": status,
        "request_counts": {"processing": 1},
        "created_at": "2026-11-30T12:00:00Z",
        "expires_at": "2026-12-01T12:00:00Z",
    }


def _events(text: str) -> Iterator[bytes]:
    yield _event({"type": "message_start", "message": _message()})
    block = {"type": "text", "text": ""}
    yield _event({"type": "content_block_start", "index": 0, "content_block": block})
    for at in range(0, len(text), EVENT_CHARACTERS):
        delta = {"type": "text_delta", "text": text[at : at + EVENT_CHARACTERS]}
        yield _event({"type": "content_block_delta", "index": 0, "delta": delta})
    yield _event({"type": "content_block_stop", "index": 0})
    end = {"stop_reason": "end_turn", "stop_sequence": None}
    usage = {"output_tokens": 20}
    yield _event({"type": "message_delta", "delta": end, "usage": usage})
    yield _event({"type": "message_stop"})


def _event(document: dict[str, Any]) -> bytes:
    text = json.dumps(document, ensure_ascii=False)
    return f"event: {document['type']}\ndata: {text}\n\n".encode()
