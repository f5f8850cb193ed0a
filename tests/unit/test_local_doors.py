"""Whom a local HTTP port answers: programs on this machine, and no page of another origin."""

import pytest

from scripts.local_doors import refusal

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
