"""What ends a command early: each is printed as one line, and the exit code is 1.

CommandFailed
├── NotConfigured        the address or the client key is missing or wrong
├── GatewayUnreachable   no answer came
└── GatewayRefused       the gateway answered with an error
"""

from typing import Any


class CommandFailed(Exception):
    """The command cannot go on; the message says why and what to do."""


class NotConfigured(CommandFailed):
    """The address or the client key is missing or wrong."""


class GatewayUnreachable(CommandFailed):
    """No answer came from the gateway."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"no answer from {url} ({reason}); is SLUICE_URL right and the stack up?")
        self.url = url
        self.reason = reason


class GatewayRefused(CommandFailed):
    """The gateway answered with an error."""

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
        # A refused list of jobs still says, job by job, why.
        self.data = data
