"""The planner on an object that is not stored: its size is stated, its bytes are generated when they are read."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from email.utils import formatdate
from http.client import HTTPConnection
from http.server import ThreadingHTTPServer
from typing import Any, Final

from bench.bulk.calls import counting
from bench.bulk.stack import MODEL, TENANT, Stack, say, stack, workers
from bench.memory.peak import peak_mb
from scripts.local_doors import LocalHandler
from scripts.local_stack.emulator import free_port

NAME: Final = "huge"
COPY: Final = "rows.jsonl"
"""Name of the batch's own copy, which the planner has S3 make."""
ETAG: Final = '"of-what-is-not-there"'
PATIENCE_SECONDS: Final = 600


def run(size: int, line_bytes: int) -> int:
    """Plan the object once; print time and memory."""
    port = free_port(0)
    line = _line(line_bytes)
    with (
        counting() as calls_of,
        _bucket(f"127.0.0.1:{port}", size, line) as url,
        stack(bucket_url=url, port=port) as started,
    ):
        _hold_ranges(started)
        say(f"planning {size / 1e9:,.1f} GB, {size // line_bytes:,} lines")
        began = time.time()
        _announce(started)
        seconds, peak = _used(started, began)
        calls = calls_of("batches")
        sqs = started.ready.client("sqs")
        attributes = sqs.get_queue_attributes(
            QueueUrl=started.ready.resources["RangesQueue"],
            AttributeNames=["ApproximateNumberOfMessages"],
        )
        messages = int(attributes["Attributes"]["ApproximateNumberOfMessages"])
    print(f"one invocation: {seconds:.1f} s, {peak} MB at most")
    print(f"messages for ranges: {messages:,}")
    print(
        f"AWS calls: {sum(calls.values()):,} ({', '.join(f'{n:,} {w}' for w, n in calls.items())})"
    )
    return 0 if messages else 1


def _line(size: int) -> bytes:
    row = {
        "custom_id": "row",
        "params": {"model": MODEL, "max_tokens": 64, "messages": [{"role": "user", "content": ""}]},
    }
    text = json.dumps(row)
    padding = size - 1 - len(text)
    return text.replace('"content": ""', f'"content": "{"x" * padding}"').encode() + b"\n"


def _hold_ranges(started: Stack) -> None:
    """Disable the mapping of the ranges queue: only the planner is measured."""
    started.ready.client("lambda").update_event_source_mapping(
        UUID=started.ready.resources["RangesMapping"], Enabled=False
    )


def _announce(started: Stack) -> None:
    """Send the event of the arrived object, as EventBridge does."""
    event = {
        "source": "aws.s3",
        "detail-type": "Object Created",
        "detail": {
            "bucket": {"name": started.bucket},
            "object": {"key": f"in/{TENANT}/{NAME}.jsonl"},
        },
    }
    started.ready.client("sqs").send_message(
        QueueUrl=started.ready.resources["BatchesQueue"], MessageBody=json.dumps(event)
    )


def _used(started: Stack, since: float) -> tuple[float, int]:
    """Wait for the planner; return its seconds, and the peak memory of its process in megabytes."""
    end = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < end:
        planned = list(started.logged("batches", "planned", since))
        created = list(started.logged("batches", "created", since))
        if planned and created:
            peak = max(map(peak_mb, workers(started, "batches")))
            return _at(planned[-1]) - _at(created[-1]), peak
        time.sleep(0.2)
    raise TimeoutError("the planner did not end")


def _at(line: dict[str, Any]) -> float:
    moment, _, milliseconds = line["timestamp"].partition(",")
    whole = time.mktime(time.strptime(moment, "%Y-%m-%d %H:%M:%S"))
    return whole + int(milliseconds[:3]) / 1000


class _Serve(LocalHandler):
    """Serves S3: one object is generated when it is read, and its copy; all other requests are forwarded."""

    protocol_version = "HTTP/1.1"
    emulator = ""
    size = 0
    line = b""
    is_copied = False

    def do_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        path = self.path.partition("?")[0]
        if not path.endswith((f"/{COPY}", f"/{NAME}.jsonl")):
            self._forward(body)
        elif self.command not in {"HEAD", "GET"}:
            self._copy()
        elif path.endswith(f"/{COPY}") and not self.is_copied:
            self._answer(404, b"")
        else:
            self._make()

    def _forward(self, body: bytes) -> None:
        connection = HTTPConnection(self.emulator)
        # Its Host, too: a link is signed for the address it names.
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        content = answer.read()
        self._answer(answer.status, content, answer.getheaders())
        connection.close()

    def _copy(self) -> None:
        """Answer the calls of a copy in parts, of which nothing is kept."""
        type(self).is_copied = True
        if self.command == "PUT":
            kind = "CopyPartResult"
        elif "?uploads" in self.path:
            kind = "InitiateMultipartUploadResult"
        else:
            kind = "CompleteMultipartUploadResult"
        answer = f"<{kind}><UploadId>copy</UploadId><ETag>{ETAG}</ETag></{kind}>"
        self._answer(200, answer.encode())

    def _make(self) -> None:
        first, last = 0, self.size - 1
        asked = self.headers.get("range")
        if asked:
            first, last = (int(each) for each in asked.removeprefix("bytes=").split("-"))
        is_head = self.command == "HEAD"
        content = b"" if is_head else _piece(self.line, first, min(last, self.size - 1))
        facts = [("etag", ETAG), ("last-modified", formatdate(usegmt=True))]
        length = len(content) if asked else self.size
        self._answer(206 if asked else 200, content, facts, length)

    def _answer(
        self,
        status: int,
        content: bytes,
        headers: Sequence[tuple[str, str]] = (),
        length: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in {"transfer-encoding", "content-length", "connection"}:
                self.send_header(name, value)
        self.send_header("content-length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_any  # noqa: N815 - http.server's names

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def _bucket(emulator: str, size: int, line: bytes) -> Iterator[str]:
    """Serve S3 with the object, of so many bytes of this line."""
    handler = type("Serve", (_Serve,), {"emulator": emulator, "size": size, "line": line})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _piece(line: bytes, first: int, last: int) -> bytes:
    start = first % len(line)
    wanted = last - first + 1
    copies = -(-(start + wanted) // len(line))
    return (line * copies)[start : start + wanted]
