"""Which requests our local HTTP servers accept: those of programs on this machine, not those of foreign web pages.

A port on the loopback interface is open to every page in the user's browser. Two headers distinguish a page's requests
from those of a program: a page of another origin sends `Origin` with anything but a simple GET, and a page whose name
was made to resolve to 127.0.0.1 (DNS rebinding) sends its own name as `Host`. A page can change neither. SDKs, curl and
Node send no `Origin`.

No local port sends a CORS permission (`Access-Control-*`), so a page cannot read an answer either. Standard library
only: the emulator's launcher imports this file, too. `LocalHandler` applies the rule to servers of `http.server`.
"""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler
from typing import Final

NAMES: Final = ("127.0.0.1", "localhost", "[::1]")
HTTP_PORT: Final = 80
"""The port that clients leave out of `Host` and `Origin`."""


def refusal(host: str | None, origin: str | None, port: int) -> str | None:
    """Return why the server on `port` rejects a request with these headers, None if it accepts it.

    A header that was not sent is None. A header that was sent twice is rejected if its values are joined by a comma.
    """
    own = {f"{name}:{port}" for name in NAMES} | (set(NAMES) if port == HTTP_PORT else set())
    if host is None:
        return "the Host header is missing"
    if host.lower() not in own:
        return f"the Host header is not a loopback address with port {port}"
    if origin is not None and origin.lower() not in {f"http://{address}" for address in own}:
        return "requests from pages of another origin are refused"
    return None


class LocalHandler(BaseHTTPRequestHandler):
    """A request handler that responds to foreign requests with 403 before any of its methods runs."""

    def parse_request(self) -> bool:
        """Read the head of a request; return False if the request was rejected."""
        if not super().parse_request():
            return False
        port: int = self.connection.getsockname()[1]
        reason = refusal(self._only("host"), self._only("origin"), port)
        if reason is not None:
            self.close_connection = True  # its body is not read
            self.send_error(403, explain=reason)
            return False
        return True

    def _only(self, name: str) -> str | None:
        found = self.headers.get_all(name)
        return None if found is None else ",".join(found)
