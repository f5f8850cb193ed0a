"""Whom a local HTTP port answers: programs on this machine, and no page of another origin."""

import http.client
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from scripts.local_doors import LocalHandler, refusal

ROOT = Path(__file__).parents[2]

PORT = 8089


@pytest.mark.parametrize(
    "host", ["127.0.0.1:8089", "localhost:8089", "LocalHost:8089", "[::1]:8089"]
)
def test_a_program_on_this_machine_is_answered(host: str) -> None:
    assert refusal(host, None, PORT) is None


@pytest.mark.parametrize(
    "origin", ["http://127.0.0.1:8089", "http://localhost:8089", "http://[::1]:8089"]
)
def test_a_page_of_the_port_itself_is_answered(origin: str) -> None:
    assert refusal("127.0.0.1:8089", origin, PORT) is None


@pytest.mark.parametrize(
    "host",
    [
        "attacker.example",
        "attacker.example:8089",
        "127.0.0.1.attacker.example:8089",
        "localhost.attacker.example:8089",
        "127.0.0.1",
        "127.0.0.1:80",
        "127.0.0.1:8088",
        "127.0.0.1:80890",
        "127.0.0.1:8089,attacker.example",
        "attacker@127.0.0.1:8089",
        "0.0.0.0:8089",
        "localhost.:8089",
        "::1:8089",
        " 127.0.0.1:8089",
        "",
    ],
)
def test_a_name_made_to_resolve_to_this_machine_is_refused(host: str) -> None:
    assert refusal(host, None, PORT) == "the Host header is not a loopback address with port 8089"


def test_a_request_without_a_host_is_refused() -> None:
    assert refusal(None, None, PORT) == "the Host header is missing"


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "",
        "http://attacker.example",
        "http://127.0.0.1:8089.attacker.example",
        "http://localhost:3000",
        "http://127.0.0.1",
        "https://127.0.0.1:8089",
        "http://127.0.0.1:8089/",
        "file://",
        "chrome-extension://abcdefgh",
        "http://127.0.0.1:8089, http://attacker.example",
    ],
)
def test_a_page_of_another_origin_is_refused(origin: str) -> None:
    assert "requests from pages of another origin are refused" == refusal(
        "127.0.0.1:8089", origin, PORT
    )


def test_port_80_may_be_left_out_as_clients_do() -> None:
    assert refusal("localhost", "http://localhost", 80) is None
    assert refusal("localhost:80", "http://localhost:80", 80) is None
    assert refusal("attacker.example", None, 80) is not None


class Answering(LocalHandler):
    def do_any(self) -> None:
        self.send_response(204)
        self.end_headers()

    do_GET = do_POST = do_anything = do_any  # noqa: N815 - http.server's names

    def log_message(self, *_: object) -> None:
        """Stays quiet."""


@pytest.fixture
def server() -> Iterator[int]:
    answering = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    thread = threading.Thread(target=answering.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield answering.server_port
    answering.shutdown()
    thread.join()
    answering.server_close()


@pytest.mark.parametrize("method", ["GET", "POST", "anything"])
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 204),
        ({"Origin": "http://attacker.example"}, 403),
        ({"Host": "attacker.example"}, 403),
    ],
)
def test_a_handler_refuses_before_any_of_its_methods_runs(
    server: int, method: str, headers: dict[str, str], status: int
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server, timeout=10)

    connection.request(method, "/", headers=headers)

    answer = connection.getresponse()
    assert status == answer.status
    assert not [name for name, _ in answer.getheaders() if name.lower().startswith("access-c")]
    connection.close()


def test_every_server_in_the_repository_applies_the_rule() -> None:
    """Receivers of webhooks in tests stand for servers elsewhere, which have names of their own."""
    elsewhere = {"tests/integration/test_webhooks.py", "tests/acceptance/test_bulk.py"}
    open_ones = {
        str(path.relative_to(ROOT))
        for folder in ("scripts", "bench", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if "(BaseHTTPRequestHandler)" in path.read_text(encoding="utf-8")
    }

    assert {"scripts/local_doors.py", "tests/unit/test_local_doors.py"} | elsewhere == open_ones
