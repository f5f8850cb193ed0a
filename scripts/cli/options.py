"""Options shared by several commands, and the gateway that they select."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from scripts.cli import files, terminal
from scripts.cli.errors import InvalidUsage

if TYPE_CHECKING:
    from scripts.cli.client import Gateway

Url = Annotated[str | None, typer.Option("--url", envvar="SLUICE_URL", help="URL of the gateway.")]
Key = Annotated[
    str | None,
    typer.Option(
        "--key",
        help="Client key. The value is visible in the process list; prefer --key-file or the environment variable "
        "SLUICE_KEY.",
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        "--key-file",
        help="File with the client key on one line. Use - for standard input.",
        allow_dash=True,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the API's JSON.")]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="Output file, replaced when all results are there. Default: standard output.",
        allow_dash=True,
    ),
]
Deadline = Annotated[
    str | None,
    typer.Option(
        "--deadline",
        help="Do not start after this time; the job expires. A duration (90m, 2h, 1d) or a time "
        "(2026-12-24T18:00:00Z).",
    ),
]
FallbackModels = Annotated[
    list[str] | None,
    typer.Option(
        "--fallback-model",
        help="Model to use if the requested one is overloaded or refuses. Repeatable.",
    ),
]
Webhook = Annotated[
    str | None, typer.Option("--webhook", help="HTTPS URL to notify on completion.")
]

AskedLane = Literal["live", "batch", "auto"]
Lane = Annotated[
    AskedLane | None,
    typer.Option(
        "--lane",
        help="Lane to ask for. Default: the stack's parameter DefaultLane.",
    ),
]
OnUnmeetable = Annotated[
    Literal["run", "refuse"] | None,
    typer.Option(
        "--on-unmeetable",
        help="Whether the batch is to run or to be refused if no lane can meet its deadline. Default: run. This "
        "release stores it only.",
    ),
]

StackName = Annotated[str, typer.Option("--stack", help="Name of the CloudFormation stack.")]
Region = Annotated[
    str | None,
    typer.Option("--region", help="AWS region. Default: the region of your AWS profile."),
]
EndpointUrl = Annotated[
    str | None,
    typer.Option("--endpoint-url", help="AWS endpoint URL, such as that of the local stack."),
]


def gateway_at(url: str | None, key: str | None, key_file: Path | None = None) -> "Gateway":
    """Return the gateway that the options select; raise CommandFailed if one is missing."""
    from scripts.cli.client import Gateway  # noqa: PLC0415 - not needed for --help

    return Gateway(url, secret_of("key", key, key_file), on_wait=terminal.say)


def secret_of(option: str, given: str | None, file: Path | None) -> str | None:
    """Return the secret of `--<option>` or `--<option>-file`, otherwise of the variable `SLUICE_<OPTION>`."""
    if given is not None and file is not None:
        raise InvalidUsage(f"provide --{option} or --{option}-file, not both")
    if file is not None:
        return files.secret_in(file)
    if given is not None:
        return given
    return os.environ.get(f"SLUICE_{option.upper().replace('-', '_')}") or None
