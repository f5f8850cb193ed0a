"""Sluice on this machine: `sluice local up`."""
# ruff: noqa: PLC0415 - a command imports its own dependencies, so that --help stays fast

from pathlib import Path
from typing import Annotated

import typer

from scripts.cli.errors import CommandFailed
from scripts.cli.options import secret_of

local_app = typer.Typer(no_args_is_help=True, help="Run Sluice on this machine.")


@local_app.command("up")
def local_up(  # noqa: PLR0913 - a command line has options
    *,
    port: Annotated[
        int,
        typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 selects a free port."),
    ] = 4566,
    claude_url: Annotated[
        str | None,
        typer.Option("--claude-url", help="Base URL of Claude for keys without a base_url."),
    ] = None,
    key_pool: Annotated[
        Path | None, typer.Option("--key-pool", help="JSON file with the upstream keys.")
    ] = None,
    client_key: Annotated[
        str | None,
        typer.Option(
            "--client-key",
            help="Client key to accept. Default: a random key. The value is visible in the process list; "
            "prefer --client-key-file or the environment variable SLUICE_CLIENT_KEY.",
        ),
    ] = None,
    client_key_file: Annotated[
        Path | None,
        typer.Option(
            "--client-key-file",
            help="File with the client key on one line. Use - for standard input.",
            allow_dash=True,
        ),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency", min=2, max=1000, help="Maximum concurrent worker invocations."
        ),
    ] = None,
    account_concurrency: Annotated[
        int | None,
        typer.Option(
            "--account-concurrency",
            min=5,
            help="Lambda concurrency limit of the account, such as 10. Default: 1,000.",
        ),
    ] = None,
) -> None:
    """Run Sluice locally until Ctrl-C.

    Without --claude-url and --key-pool, jobs run against the bundled Claude simulator: no account, no
    cost. When the stack is ready, it prints one JSON line: use api_url as SLUICE_URL and client_key as
    SLUICE_KEY.
    """
    client_key = secret_of("client-key", client_key, client_key_file)
    try:
        from scripts.local_stack import up
    except ModuleNotFoundError as error:
        raise CommandFailed(f"the local stack needs {error.name}: run `make setup`") from None
    raise typer.Exit(
        up(
            port=port,
            claude_url=claude_url,
            key_pool=key_pool,
            client_key=client_key,
            concurrency=concurrency,
            account_concurrency=account_concurrency,
        )
    )
