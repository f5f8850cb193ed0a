"""Options that several commands have, and the gateway they name."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scripts import terminal

if TYPE_CHECKING:
    from scripts.client import Gateway

Url = Annotated[
    str | None, typer.Option("--url", envvar="SLUICE_URL", help="Address of the gateway.")
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key",
        help="Client key. The list of processes shows it: prefer --key-file or the environment variable SLUICE_KEY.",
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--key-file",
        help="File with the client key on one line. A single - is standard input.",
        allow_dash=True,
    ),
]
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


def gateway_at(url: str | None, key: str | None, key_file: Path | None = None) -> "Gateway":
    """Returns the gateway of these options; raises CommandFailed where they are missing."""
    from scripts.client import Gateway  # noqa: PLC0415 - --help does without it

    return Gateway(url, secret_of("key", key, key_file), on_wait=terminal.say)


def secret_of(option: str, given: str | None, file: Path | None) -> str | None:
    """Returns the secret of `--<option>` or `--<option>-file`, else of the variable `SLUICE_<OPTION>`."""
    if given is not None and file is not None:
        raise typer.BadParameter(f"give --{option} or --{option}-file, not both")
    if file is not None:
        return terminal.secret_in(file)
    if given is not None:
        return given
    return os.environ.get(f"SLUICE_{option.upper().replace('-', '_')}") or None
