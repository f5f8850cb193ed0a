"""Options that several commands have, and the gateway they name."""

from typing import TYPE_CHECKING, Annotated

import typer

from scripts import terminal

if TYPE_CHECKING:
    from scripts.client import Gateway

Url = Annotated[
    str | None, typer.Option("--url", envvar="SLUICE_URL", help="Address of the gateway.")
]
Key = Annotated[str | None, typer.Option("--key", envvar="SLUICE_KEY", help="Client key.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, as the API gives it.")]
Deadline = Annotated[
    str | None,
    typer.Option("--deadline", help="Give up after this: 90m, 2h, 1d or 2026-12-24T18:00:00Z."),
]
FallbackModels = Annotated[
    list[str] | None,
    typer.Option("--fallback-model", help="When the model is overloaded. May be repeated."),
]

Webhook = Annotated[
    str | None, typer.Option("--webhook", help="An https address that is told of the end.")
]


def gateway_at(url: str | None, key: str | None) -> "Gateway":
    """Returns the gateway of these options; raises CommandFailed where they are missing."""
    from scripts.client import Gateway  # noqa: PLC0415 - --help does without it

    return Gateway(url, key, on_wait=terminal.say)
