"""Errors that end a command: each is printed as one line.

CommandFailed
├── InvalidUsage         the command line is invalid; the exit code is 2
├── NotConfigured        the URL or the client key is missing or wrong
├── GatewayUnreachable   no response from the gateway
└── GatewayRefused       the gateway returned an error
"""

from typing import Any


class CommandFailed(Exception):
    """The command cannot continue; the message says why and what to do."""

    exit_code = 1


class InvalidUsage(CommandFailed):
    """The command line is invalid."""

    exit_code = 2


class NotConfigured(CommandFailed):
    """The URL or the client key is missing or wrong."""


class GatewayUnreachable(CommandFailed):
    """No response from the gateway."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(
            f"no response from {url} ({reason}); check SLUICE_URL and that the stack is running"
        )
        self.url = url
        self.reason = reason


class GatewayRefused(CommandFailed):
    """The gateway returned an error."""

    def __init__(
        self,
        status: int,
        error_type: str,
        message: str,
        request_id: str | None,
        data: list[Any] | None = None,
    ) -> None:
        request = f", request {request_id}" if request_id else ""
        super().__init__(f"{error_type}: {message} (HTTP {status}{request})")
        self.status = status
        self.error_type = error_type
        self.message = message
        self.request_id = request_id
        # If a whole list is rejected, the response still has the reason for each job.
        self.data = data
