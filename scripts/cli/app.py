"""The command tree and its entry point."""

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, NoReturn

import typer

from scripts.cli import batches, jobs, letters, local, stack, terminal, usage
from scripts.cli.errors import CommandFailed

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    # Without it, the line breaks of a docstring are kept, whatever the width of the terminal.
    rich_markup_mode="markdown",
    # Local variables in a traceback would show keys.
    pretty_exceptions_enable=False,
    help=(
        "Sluice: a job gateway for Claude in your own AWS account.\n\n"
        "Set SLUICE_URL to the gateway's URL and SLUICE_KEY to your client key, or pass "
        "--key-file. "
        "Results go to standard output, messages to standard error. "
        "Exit codes: 0 success, 1 failure, 2 invalid command line."
    ),
)

app.command()(jobs.submit)
app.command()(jobs.get)
app.command()(jobs.results)
app.command("list")(jobs.list_jobs)
app.command()(jobs.cancel)
app.command()(batches.upload)
app.add_typer(batches.batches_app, name="batches")
app.command()(usage.usage)
app.command("webhook-secret")(usage.webhook_secret)
app.command()(usage.limits)
app.command()(stack.setup)
app.add_typer(stack.keys_app, name="keys")
app.add_typer(letters.letters_app, name="dead-letters")
app.add_typer(local.local_app, name="local")


def _show_version(wanted: bool) -> None:  # noqa: FBT001 - called by Typer
    if wanted:
        try:
            terminal.put(version("sluice"))
        except PackageNotFoundError:
            terminal.put("unknown: not installed")
        raise typer.Exit


@app.callback()
def _options(
    *,
    show_version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version),
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    terminal.prepare()
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        # Typer would print what is wrong with a command line as it is, with whatever a file name contains.
        return app(arguments, prog_name="sluice", standalone_mode=False) or 0
    except typer.TyperException as wrong:
        # Without a message, it has printed the help of a command group.
        if text := wrong.format_message():
            terminal.say(f"error: {text}")
        return wrong.exit_code
    except CommandFailed as failed:
        terminal.say(f"error: {failed}")
        return failed.exit_code
    except typer.Abort:
        terminal.say("aborted")
        return 1
