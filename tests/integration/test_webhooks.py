"""Webhooks through their adapters: real sockets on loopback, a secret of two versions, the stream's records."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from botocore.stub import Stubber
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from sluice.adapters import aws, job_records, web
from sluice.adapters.secrets import POOL_AGE_MS, WebhookSecrets
from sluice.adapters.web import HttpWeb
from sluice.domain.errors import StoreBusy
from sluice.domain.jobs import Result, State
from sluice.domain.webhooks import read_networks
from sluice.notices.deliver import Deliver
from sluice.ports.jobs import Received
from sluice.ports.world import Reply
from sluice.wiring import job_ends
from tests.fakes import NOON, FrozenClock, MemoryQueue, RecordingEvents, a_job
from tests.moto_aws import Aws, in_memory

LOOPBACK = "127.0.0.1"


@dataclass
class Receiver:
    """A receiver of webhooks: keeps the requests, and answers as configured."""

    port: int = 0
    status: int = 204
    headers: dict[str, str] = field(default_factory=dict)
    wait: threading.Event | None = None
    got: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)


@contextmanager
def receiving(tls: ssl.SSLContext | None = None, **facts: Any) -> Iterator[Receiver]:
    receiver = Receiver(**facts)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            receiver.got.append((self.path, headers, body))
            if receiver.wait is not None:
                receiver.wait.wait()
            self.send_response(receiver.status)
            for name, value in receiver.headers.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name
            del format, args

    server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    receiver.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        if receiver.wait is not None:
            receiver.wait.set()
        server.shutdown()
        server.server_close()
        thread.join()


def post(url: str, address: str = LOOPBACK, trust: ssl.SSLContext | None = None) -> Reply:
    headers = {"content-type": "application/json", "webhook-id": "job_1-2"}
    return asyncio.run(HttpWeb(trust).post(url, address, headers, '{"type":"x"}'))


def test_a_message_goes_to_the_address_that_was_checked_under_the_name_it_was_given() -> None:
    with receiving() as receiver:
        reply = post(f"http://acme.example:{receiver.port}/hooks?token=1")

    ((path, headers, body),) = receiver.got
    assert (Reply(204), "/hooks?token=1", b'{"type":"x"}') == (reply, path, body)
    assert f"acme.example:{receiver.port}" == headers["host"]
    assert ("job_1-2", "application/json") == (headers["webhook-id"], headers["content-type"])


def test_a_redirect_is_an_answer_and_not_followed() -> None:
    with receiving() as other, receiving(status=307) as receiver:
        receiver.headers["location"] = f"http://{LOOPBACK}:{other.port}/"

        assert Reply(307) == post(f"http://acme.example:{receiver.port}/")

    assert [] == other.got


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        ("120", 120),
        ("Wed, 21 Oct 2026 07:28:00 GMT", None),
        ("²", None),
        pytest.param("9" * 5_000, None, id="more digits than Python reads"),
    ],
)
def test_a_receiver_may_say_when_it_wants_to_hear_again(said: str, seconds: int | None) -> None:
    with receiving(status=503, headers={"retry-after": said}) as receiver:
        assert Reply(503, seconds) == post(f"http://acme.example:{receiver.port}/")


def test_a_receiver_that_does_not_answer_in_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "SECONDS", 0.2)
    with receiving(wait=threading.Event()) as receiver:
        reply = post(f"http://acme.example:{receiver.port}/")

    assert reply.status is None
    assert reply.problem in {"no answer within 0 s", "ReadTimeout"}


def test_a_receiver_that_is_not_there_is_a_problem_and_no_exception() -> None:
    with receiving() as receiver:
        port = receiver.port

    assert Reply(problem="ConnectError") == post(f"http://acme.example:{port}/")
    assert Reply(problem="ConnectError") == post("https://acme.example/", "::1")
    assert Reply(problem="InvalidURL") == post("https://acme.example:x/")


def test_the_certificate_must_be_of_the_name_whatever_the_address(tmp_path: Path) -> None:
    server, trust = certificate_of("acme.example", tmp_path)
    with receiving(server) as receiver:
        right = post(f"https://acme.example:{receiver.port}/", trust=trust)
        wrong = post(f"https://other.example:{receiver.port}/", trust=trust)
        untrusted = post(f"https://acme.example:{receiver.port}/")

    assert [Reply(204), Reply(problem="ConnectError"), Reply(problem="ConnectError")] == [
        right, wrong, untrusted,
    ]  # fmt: skip
    assert 1 == len(receiver.got)


def certificate_of(host: str, folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return what a server of this name proves itself with, and what trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    public = signed.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    both = folder / "both.pem"
    both.write_bytes(private + public)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(both)
    trust = ssl.create_default_context(cadata=public.decode())
    return server, trust


def test_a_name_leads_to_addresses_or_nowhere() -> None:
    async def addresses(host: str) -> Any:
        return await HttpWeb().addresses(host, 443)

    assert [LOOPBACK] == asyncio.run(addresses(LOOPBACK))
    assert {LOOPBACK, "::1"} & set(asyncio.run(addresses("localhost")))
    assert () == asyncio.run(addresses("no-such-name.invalid"))
    assert () == asyncio.run(addresses("a" * 64 + ".example"))


# The secret ----------------------------------------------------------------------------------------------------


@pytest.fixture
def cloud() -> Iterator[Aws]:
    with in_memory() as running:
        yield running


def test_names_that_hang_do_not_delay_other_lookups_or_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More names than asyncio has threads for; a process waits for those threads at its end."""
    hanging = threading.Event()
    real = socket.getaddrinfo

    def getaddrinfo(host: str, *arguments: Any, **more: Any) -> Any:
        if host.startswith("hang"):
            hanging.wait(30)
        return real(LOOPBACK, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(web, "LOOKUP_SECONDS", 1.0)
    sender = HttpWeb()
    began = time.monotonic()
    took: dict[str, float] = {}

    async def looked_up(host: str) -> Any:
        found = await sender.addresses(host, 443)
        took[host] = time.monotonic() - began
        return found

    async def all_at_once() -> list[Any]:
        names = [f"hang-{n}.example" for n in range(60)]
        return await asyncio.gather(*map(looked_up, [*names, "healthy.example"]))

    found = asyncio.run(all_at_once())
    whole = time.monotonic() - began
    hanging.set()

    assert [()] * 60 + [[LOOPBACK]] == found
    assert took["healthy.example"] < 0.9
    assert whole < 3


def test_a_tenants_hanging_names_do_not_delay_anothers_webhook(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hanging = threading.Event()
    real = socket.getaddrinfo

    def getaddrinfo(host: str, *arguments: Any, **more: Any) -> Any:
        if host != "quiet.example":
            hanging.wait(30)
        return real(LOOPBACK, *arguments, **more)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(web, "LOOKUP_SECONDS", 2.0)
    clock = FrozenClock(NOON)
    queue = MemoryQueue(clock.now)
    networks = read_networks("127.0.0.0/8")
    deliver = Deliver(HttpWeb(), lambda: ("a secret",), queue, networks, clock, RecordingEvents())

    with receiving() as receiver:
        began = time.monotonic()

        def message(number: int, url: str) -> Received:
            body = {"v": 1, "webhook": f"w-{number}", "tenant": "acme", "url": url, "body": "{}"}
            return Received(f"m-{number}", "r", json.dumps(body), None, sent_at=NOON)

        hostile = [message(n, f"http://hostile-{n}.example/") for n in range(9)]
        quiet = message(9, f"http://quiet.example:{receiver.port}/")
        with ThreadPoolExecutor(1) as threads:
            delivered = threads.submit(asyncio.run, deliver([*hostile, quiet]))
            while not receiver.got and time.monotonic() < began + 10:
                time.sleep(0.01)
            waited = time.monotonic() - began
            again = delivered.result()
        hanging.set()

    assert waited < 1.5
    assert [each.message_id for each in hostile] == again


def test_a_secret_that_was_changed_signs_together_with_the_one_before(cloud: Aws) -> None:
    clock = FrozenClock()
    secrets = WebhookSecrets(cloud.secrets, "WebhookSecret", clock)

    assert ("first",) == secrets()

    cloud.secrets.put_secret_value(SecretId="WebhookSecret", SecretString="second")
    clock.at += POOL_AGE_MS - 1
    assert ("first",) == secrets()
    clock.at += 1
    assert ("second", "first") == secrets()


def test_secrets_that_cannot_be_read_again_are_kept(cloud: Aws) -> None:
    """They change once a year; webhooks that wait for Secrets Manager would lose their day."""
    clock = FrozenClock()
    secrets = WebhookSecrets(cloud.secrets, "WebhookSecret", clock)
    with Stubber(cloud.secrets) as stub:
        stub.add_response("get_secret_value", {"SecretString": "first"})
        stub.add_client_error("get_secret_value", "ResourceNotFoundException", "", 400)
        assert ["first"] == list(secrets())
        clock.at += POOL_AGE_MS
        for _ in range(4):
            stub.add_client_error("get_secret_value", "InternalServiceError", "", 500)

        assert ["first"] == list(secrets())
        stub.assert_no_pending_responses()


@pytest.mark.usefixtures("cloud")
def test_a_secret_that_cannot_be_read_is_an_error() -> None:
    secrets = WebhookSecrets(aws.secrets_manager(), "no-such-secret", FrozenClock())

    with pytest.raises(ClientError):
        secrets()


def test_a_secrets_manager_that_is_busy_is_asked_later(cloud: Aws) -> None:
    secrets = WebhookSecrets(cloud.secrets, "WebhookSecret", FrozenClock())
    with Stubber(cloud.secrets) as stub:
        for _ in range(4):
            stub.add_client_error("get_secret_value", "InternalServiceError", "", 500)

        with pytest.raises(StoreBusy, match="Secrets Manager"):
            secrets()


# The stream ----------------------------------------------------------------------------------------------------


def as_streamed(job: Any, number: int) -> dict[str, Any]:
    """A record as Lambda hands it over: JSON, in which bytes are base64 text."""
    item = json.loads(json.dumps(job_records.encode(job, 30), default=lambda _: "H4sIAAAA"))
    keys = {"job_id": item["job_id"]}
    return {
        "eventName": "MODIFY",
        "dynamodb": {"Keys": keys, "SequenceNumber": str(number), "NewImage": item},
    }


def test_the_streams_records_are_the_jobs_that_ended() -> None:
    job = a_job(
        state=State.SUCCEEDED,
        finished_at=NOON,
        result=Result(inline=b"an answer"),
        webhook="https://acme.example/",
    )

    ((number, read),) = job_ends.ended_jobs([as_streamed(job, 7)])

    assert "7" == number
    assert (job.job_id, State.SUCCEEDED, job.webhook) == (read.job_id, read.state, read.webhook)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda change: change.pop("NewImage"),
        lambda change: change["NewImage"].update(state={"S": "of a later release"}),
        lambda change: change["NewImage"].update(record={"S": "no JSON"}),
        lambda change: change["NewImage"].pop("tenant"),
    ],
)
def test_a_record_that_cannot_be_read_does_not_block_others(spoil: Callable[[Any], Any]) -> None:
    job = a_job(state=State.SUCCEEDED, finished_at=NOON)
    bad, good = as_streamed(job, 1), as_streamed(job, 2)
    spoil(bad["dynamodb"])

    assert ["2"] == [number for number, _ in job_ends.ended_jobs([bad, good])]
