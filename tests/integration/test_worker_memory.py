"""The memory of a real worker process, against an upstream in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

REPOSITORY: Final = Path(__file__).parents[2]

MOST_MB: Final = 430
"""Of the 512 of WorkerFunction, which also holds AWS's SDK and what a process here does without."""

UPSTREAM: Final = r"""
import asyncio, json, sys
ANSWER_BYTES, SECONDS = int(sys.argv[1]), float(sys.argv[2])
text = "\N{DROPLET}" + "x" * ANSWER_BYTES
message = {
    "id": "msg_1", "type": "message", "role": "assistant", "model": "m", "stop_reason": "end_turn",
    "content": [{"type": "text", "text": text}], "usage": {"input_tokens": 9, "output_tokens": 5},
}
answer = json.dumps(message, ensure_ascii=False).encode()
limits = "".join(
    f"anthropic-ratelimit-{name}-limit: 6000000\r\nanthropic-ratelimit-{name}-remaining: 1000000\r\n"
    for name in ("requests", "input-tokens", "output-tokens")
)
head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n{limits}content-length: {len(answer)}\r\n\r\n"
async def serve(reader, writer):
    try:
        while True:
            asked = await reader.readuntil(b"\r\n\r\n")
            left = int(asked.lower().partition(b"content-length:")[2].split()[0])
            while left:
                left -= len(await reader.read(min(left, 1 << 20)))
            await asyncio.sleep(SECONDS)
            writer.write(head.encode() + answer)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        return
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 21)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""

WORKER: Final = r"""
import asyncio, json, os, sys
from base64 import b64encode
from dataclasses import replace
from bench.memory.peak import peak_mb
from sluice.adapters.claude import SdkClaude
from sluice.adapters.system import SystemClock, Threads
from sluice.ports.jobs import Params
from sluice.worker.queue_source import RunJobs
from sluice.worker.tools import Tools
from sluice.worker.worker import Worker
from tests.fakes import Gateway, a_job, known_group, upstream_key

port, sizes, known = int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3] == "known"

HEAD = '{"model":"claude-a","max_tokens":9,"messages":[{"role":"user","content":[{"type":"text","text":"\N{DROPLET}"},'
HEAD += '{"type":"image","source":{"data":"'

def body(size):
    packed = os.urandom(size * 3 // 4)  # as a store hands it out, compressed: held until it is unpacked
    return b"".join([HEAD.encode(), b64encode(packed), b'"}}]}]}'])

class MadeWhenRead:
    '''Requests count only while the worker holds them, as those in a store do.'''
    def get_many(self, ids):
        return {name: Params(name, body(sizes[int(name[4:])]), "h") for name in ids}

async def main():
    gateway = Gateway(keys=[upstream_key(base_url=f"http://127.0.0.1:{port}")])
    clock = SystemClock()
    now = clock.now()
    gateway.queue._now = clock.now
    gateway.know(known_group("org", "a", at=now))
    for number, size in enumerate(sizes):
        job = a_job(f"job_{number}", created_at=now, input_chars=5_600, request_bytes=size + 200 if known else 0)
        gateway.jobs.add(job)
        gateway.queue.post(job_id=job.job_id)
    tools = Tools(
        jobs=gateway.jobs, params=MadeWhenRead(), results=gateway.results,
        limits=gateway.limits, keys=gateway.pool, claude=SdkClaude(clock), ledger=gateway.ledger,
        clock=clock, jitter=lambda: 0.5, blocking=Threads(), events=gateway.events,
    )
    run_jobs = RunJobs(gateway.queue, gateway.jobs, Worker(tools, gateway.rules))
    while any(not job.state.is_final for job in gateway.jobs.stored.values()):
        batch = gateway.queue.deliver(50)
        not_done = await run_jobs(batch, clock.now() + 300_000, "me")
        gateway.queue.delete([each for each in batch if each.message_id not in not_done])
        await asyncio.sleep(0.1)
    states = [str(job.state) for job in gateway.jobs.stored.values()]
    print(json.dumps({"peak_mb": peak_mb(), "succeeded": states.count("succeeded")}))

asyncio.run(main())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures with /proc")
@pytest.mark.parametrize(
    ("sizes", "answer_bytes", "known"),
    [
        ([4_000_000] * 120, 100, "known"),
        ([4_000_000] * 60, 100, "unknown"),
        ([8_000_000, 200, 1_000_000, 200, 200, 90_000] * 20, 200_000, "known"),
        ([200] * 120, 1_000_000, "known"),
        ([200] * 20, 8_000_000, "known"),
    ],
    ids=["large", "of unknown size", "mixed", "long answers", "longest answers"],
)
def test_a_worker_stays_within_its_memory(sizes: list[int], answer_bytes: int, known: str) -> None:
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY / 'layers' / 'sluice'}:{REPOSITORY}"}
    with subprocess.Popen(
        [sys.executable, "-c", UPSTREAM, str(answer_bytes), "2"], stdout=subprocess.PIPE, text=True
    ) as upstream:
        assert upstream.stdout is not None
        try:
            port = upstream.stdout.readline().strip()
            done = subprocess.run(
                [sys.executable, "-c", WORKER, port, json.dumps(sizes), known],
                cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False,
                timeout=240,
            )  # fmt: skip
        finally:
            upstream.kill()

    assert 0 == done.returncode, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert len(sizes) == seen["succeeded"]
    assert seen["peak_mb"] < MOST_MB
