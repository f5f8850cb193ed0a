"""Files and batches on the command line: `sluice upload`, `sluice batches`."""
# ruff: noqa: PLC0415 - what only some commands need is loaded by them, so that --help stays quick

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from scripts import terminal
from scripts.cli_errors import CommandFailed
from scripts.cli_options import (
    AsJson,
    Deadline,
    FallbackModels,
    Key,
    KeyFile,
    Url,
    Webhook,
    gateway_at,
)

if TYPE_CHECKING:
    from scripts.client import Gateway, Json

SOONEST_LOOK_SECONDS = 0.5
LATEST_LOOK_SECONDS = 5.0

batches_app = typer.Typer(
    no_args_is_help=True, help="Batches: files, and what the SDKs' batches calls made."
)

BatchId = Annotated[str, typer.Argument(help="The batch's id.")]
Out = Annotated[Path | None, typer.Option("--out", help="File to write. Default: standard output.")]


def upload(  # noqa: PLR0913 - a command line has options
    file: Annotated[
        Path,
        typer.Argument(
            help='Rows, one JSON object per line: {"custom_id": ..., "params": {...}}, as in Anthropic\'s batches.'
        ),
    ],
    *,
    name: Annotated[
        str | None, typer.Option("--name", help="Its name there. Default: the file's own.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show progress until the end.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="With --wait: write the results here. A single - is standard output."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="For rows that name none.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="For rows that name none.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt", help="For a CSV file: what to ask, with {column} where a field goes."
        ),
    ] = None,
    deadline: Deadline = None,
    fallback_model: FallbackModels = None,
    webhook: Webhook = None,
    again: Annotated[
        str | None,
        typer.Option(
            "--run", help="Any text: the same file runs again under a new one, and only then."
        ),
    ] = None,
    as_json: AsJson = False,
    url: Url = None,
    key: Key = None,
    key_file: KeyFile = None,
) -> None:
    """Upload a file of any size as a batch. Needs no AWS credentials.

    Prints the batch's id. The same file under the same name is not run twice. The exit code is 1
    when a row failed or a line could not run.
    """
    from scripts.batch_files import bucket
    from scripts.submission import deadline_at

    if out is not None and not wait:
        raise typer.BadParameter("--out goes with --wait")
    if not file.is_file():
        raise CommandFailed(f"{file} is no file")
    asked = {
        "model": model,
        "max_tokens": max_tokens,
        "prompt": prompt,
        "deadline": deadline_at(deadline, datetime.now(UTC)) if deadline else None,
        "fallback_models": fallback_model,
        "webhook": webhook,
        "run": again,
    }
    options = {option: value for option, value in asked.items() if value}
    good = True
    with ExitStack() as cleanup:
        gateway = cleanup.enter_context(gateway_at(url, key, key_file))
        sink = cleanup.enter_context(terminal.written_to(out)) if out else None
        batch = bucket().upload(gateway, file, name or file.name, options, _told)
        terminal.say(f"{file} is {batch['id']}")
        if wait:
            batch = _waited_for(gateway, batch["id"])
            good = _judged(batch)
        if sink is not None:
            _write(gateway, batch["id"], "results", sink)
        if as_json:
            terminal.print_json(batch)
        elif sink is None:
            print(batch["id"])
    if not good:
        raise typer.Exit(1)


@batches_app.command("list")
def list_batches(
    *,
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many, at most.")] = 20,
    as_json: AsJson = False,
    url: Url = None,
    key: Key = None,
    key_file: KeyFile = None,
) -> None:
    """List batches, the newest first."""
    with gateway_at(url, key, key_file) as gateway:
        batches = list(islice(gateway.newest_batches(limit), limit))
    if as_json:
        terminal.print_json({"data": batches})
        return
    from scripts import show

    if batches:
        show.console().print(show.batches_table(batches))
    else:
        terminal.say("no batches")


@batches_app.command("show")
def show_batch(  # noqa: PLR0913 - a command line has options
    batch_id: BatchId,
    *,
    wait: Annotated[bool, typer.Option("--wait", help="Show progress until the end.")] = False,
    as_json: AsJson = False,
    url: Url = None,
    key: Key = None,
    key_file: KeyFile = None,
) -> None:
    """Show one batch: rows done, cost, and when it will probably end."""
    with gateway_at(url, key, key_file) as gateway:
        batch = _waited_for(gateway, batch_id) if wait else gateway.batch(batch_id)
    if as_json:
        terminal.print_json(batch)
        return
    from scripts import show

    show.console().print(show.batch_panel(batch))


@batches_app.command("results")
def batch_results(  # noqa: PLR0913 - a command line has options
    batch_id: BatchId,
    *,
    errors: Annotated[
        bool, typer.Option("--errors", help="The lines that could not run, with their numbers.")
    ] = False,
    out: Out = None,
    url: Url = None,
    key: Key = None,
    key_file: KeyFile = None,
) -> None:
    """Fetch the results of a batch that has ended, in the order of its rows."""
    with ExitStack() as cleanup:
        gateway = cleanup.enter_context(gateway_at(url, key, key_file))
        sink = cleanup.enter_context(terminal.written_to(out or Path("-")))
        _write(gateway, batch_id, "errors" if errors else "results", sink)


@batches_app.command("cancel")
def cancel_batch(
    batch_id: BatchId, *, url: Url = None, key: Key = None, key_file: KeyFile = None
) -> None:
    """Cancel a batch. What was answered stays; calls under way are stopped."""
    with gateway_at(url, key, key_file) as gateway:
        canceled = gateway.cancel_batch(batch_id)
    typer.echo(f"{batch_id} {canceled['processing_status']}")


def _waited_for(gateway: "Gateway", batch_id: str) -> "Json":
    from scripts.progress import batch_snapshot
    from scripts.submit_run import display_for

    pause = SOONEST_LOOK_SECONDS
    with display_for(sys.stderr) as display:
        gateway.on_wait = display.note
        try:
            while True:
                batch = gateway.batch(batch_id)
                display.show(batch_snapshot(batch, datetime.now(UTC)), time.monotonic())
                if batch["state"] == "ended":
                    return batch
                time.sleep(pause)
                pause = min(LATEST_LOOK_SECONDS, pause * 1.2)
        except KeyboardInterrupt:
            display.note(f"the batch goes on; `sluice batches show {batch_id} --wait` waits again")
            raise
        finally:
            gateway.on_wait = terminal.say


def _judged(batch: "Json") -> bool:
    """Tells how the batch ended, and whether all is well."""
    from scripts.progress import dollars

    rows = batch["rows"]
    failed = rows["errored"] + rows["canceled"] + rows["expired"]
    cost = dollars(batch["cost_micro_usd"])
    terminal.say(f"{rows['succeeded']:,} succeeded, {failed:,} failed, {cost}")
    if batch["problem"]:
        terminal.say(f"error: {batch['problem']}")
    elif rows["invalid"]:
        lines = terminal.counted(rows["invalid"], "line")
        terminal.say(f"{lines} could not run: `sluice batches results {batch['id']} --errors`")
    return not failed and not rows["invalid"] and not batch["problem"]


def _write(gateway: "Gateway", batch_id: str, kind: str, sink: TextIO) -> None:
    sink.writelines(_texts(gateway, batch_id, kind))
    sink.flush()


def _texts(gateway: "Gateway", batch_id: str, kind: str) -> Iterator[str]:
    import codecs

    from scripts.batch_files import bucket

    # A piece may end in the middle of a character.
    decoder = codecs.getincrementaldecoder("utf-8")()
    for piece in bucket().download(gateway.batch_links(batch_id)[kind]):
        yield decoder.decode(piece)


def _told(sent: int, size: int) -> None:
    if size > 64 * 1024 * 1024:
        terminal.say(f"{sent / 1e6:,.0f} of {size / 1e6:,.0f} MB sent")
