"""Files and batches on the command line: `sluice upload`, `sluice batches`."""
# ruff: noqa: PLC0415 - a command imports its own dependencies, so that --help stays fast

import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scripts.cli import files, terminal
from scripts.cli.errors import CommandFailed, InvalidUsage
from scripts.cli.options import (
    AsJson,
    Deadline,
    FallbackModels,
    Key,
    KeyFile,
    Lane,
    OnUnmeetable,
    Out,
    Url,
    Webhook,
    gateway_at,
)

if TYPE_CHECKING:
    from scripts.cli.client import Gateway, Json

SOONEST_LOOK_SECONDS = 0.5
LATEST_LOOK_SECONDS = 5.0

batches_app = typer.Typer(
    no_args_is_help=True,
    help="Batches, created from files or through the SDKs' Message Batches API.",
)

BatchId = Annotated[str, typer.Argument(help="Batch ID.")]


def upload(  # noqa: PLR0913 - a command line has options
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help='JSON Lines file with one row per line: {"custom_id": ..., "params": {...}}, the format of '
            "Anthropic's Message Batches. CSV and gzip files are also accepted.",
        ),
    ],
    *,
    name: Annotated[
        str | None,
        typer.Option("--name", help="Name of the uploaded file. Default: the local name."),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until the batch ends and show progress.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="With --wait: write the results to this file when the batch has ended; until then, an "
            "existing file is kept. Use - for standard output.",
            allow_dash=True,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Model for rows without a model.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, help="Maximum output tokens for rows without a value."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="Prompt template for a CSV file. {column} inserts a field."),
    ] = None,
    deadline: Deadline = None,
    fallback_model: FallbackModels = None,
    lane: Lane = None,
    on_unmeetable: OnUnmeetable = None,
    webhook: Webhook = None,
    again: Annotated[
        str | None,
        typer.Option(
            "--run",
            help="Run label. Re-running an identical file with the same options requires a new label.",
        ),
    ] = None,
    as_json: AsJson = False,
    url: Url = None,
    key: Key = None,
    key_file: KeyFile = None,
) -> None:
    """Upload a file of any size as a batch. Needs no AWS credentials.

    Prints the batch ID. Re-uploading an identical file with the same options does nothing unless you change --run.
    With --wait, the exit code is 1 if a row fails or a line is invalid.
    """
    from scripts.cli.submission import deadline_at
    from scripts.cli.transfer import bucket

    if out is not None and not wait:
        raise InvalidUsage("--out requires --wait")
    if not file.is_file():
        kind = "a directory" if file.is_dir() else "not a regular file"
        what = kind if file.exists() else "missing"
        raise CommandFailed(f"{file} is {what}; upload takes one file")
    files.refuse_inputs(out, [file, key_file])
    asked = {
        "model": model,
        "max_tokens": max_tokens,
        "prompt": prompt,
        "deadline": deadline_at(deadline, datetime.now(UTC)) if deadline else None,
        "fallback_models": fallback_model,
        "lane": lane,
        "on_unmeetable": on_unmeetable,
        "webhook": webhook,
        "run": again,
    }
    options = {option: value for option, value in asked.items() if value}
    good = True
    with ExitStack() as cleanup:
        gateway = cleanup.enter_context(gateway_at(url, key, key_file))
        sink = cleanup.enter_context(files.writing(out)) if out else None
        store = cleanup.enter_context(bucket())
        batch = store.upload(gateway, file, name or file.name, options, _say_sent)
        terminal.say(f"{file} uploaded as batch {batch['id']}")
        if wait:
            batch = wait_for_end(gateway, batch["id"])
            good = report_end(batch)
        if sink is not None:
            write_file(gateway, batch["id"], "results", sink)
        if as_json:
            terminal.print_json(batch)
        elif sink is None:
            terminal.put(batch["id"])
    if not good or (sink is not None and sink.was_kept):
        raise typer.Exit(1)


@batches_app.command("list")
def list_batches(
    *,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Maximum number of batches.")] = 20,
    as_json: AsJson = False,
    url: Url = None,
    key: Key = None,
    key_file: KeyFile = None,
) -> None:
    """List batches, newest first."""
    with gateway_at(url, key, key_file) as gateway:
        batches = list(islice(gateway.newest_batches(limit), limit))
    if as_json:
        terminal.print_json({"data": batches})
        return
    from scripts.cli import tables

    if batches:
        tables.show(tables.batches_table(batches))
    else:
        terminal.say("no batches")


@batches_app.command("show")
def show_batch(  # noqa: PLR0913 - a command line has options
    batch_id: BatchId,
    *,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until the batch ends and show progress.")
    ] = False,
    as_json: AsJson = False,
    url: Url = None,
    key: Key = None,
    key_file: KeyFile = None,
) -> None:
    """Show a batch: completed rows, cost and estimated end time."""
    with gateway_at(url, key, key_file) as gateway:
        batch = wait_for_end(gateway, batch_id) if wait else gateway.batch(batch_id)
    if as_json:
        terminal.print_json(batch)
        return
    from scripts.cli import tables

    tables.show(tables.batch_panel(batch))


@batches_app.command("results")
def batch_results(  # noqa: PLR0913 - a command line has options
    batch_id: BatchId,
    *,
    errors: Annotated[
        bool, typer.Option("--errors", help="Fetch the invalid lines, with line numbers, instead.")
    ] = False,
    out: Out = None,
    url: Url = None,
    key: Key = None,
    key_file: KeyFile = None,
) -> None:
    """Fetch the results of an ended batch, in row order."""
    with ExitStack() as cleanup:
        gateway = cleanup.enter_context(gateway_at(url, key, key_file))
        sink = cleanup.enter_context(
            # Without invalid lines the file is empty, and complete.
            files.writing(out, inputs=[key_file], even_if_empty=errors)
        )
        write_file(gateway, batch_id, "errors" if errors else "results", sink)
    if sink.was_kept:
        raise typer.Exit(1)


@batches_app.command("cancel")
def cancel_batch(
    batch_id: BatchId, *, url: Url = None, key: Key = None, key_file: KeyFile = None
) -> None:
    """Cancel a batch. Completed results are kept; calls in flight are stopped."""
    with gateway_at(url, key, key_file) as gateway:
        canceled = gateway.cancel_batch(batch_id)
    terminal.put(f"{batch_id} {canceled['processing_status']}")


def wait_for_end(gateway: "Gateway", batch_id: str) -> "Json":
    """Wait until a batch has ended, and show its progress; return it."""
    from scripts.cli.progress import batch_snapshot
    from scripts.cli.run import display_for

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
            display.note(
                f"the batch keeps running; run `sluice batches show {batch_id} --wait` to wait again"
            )
            raise
        finally:
            gateway.on_wait = terminal.say


def report_end(batch: "Json") -> bool:
    """Report how the batch ended; return whether every row succeeded."""
    from scripts.cli.progress import cost_of

    rows = batch["rows"]
    failed = rows["errored"] + rows["canceled"] + rows["expired"]
    cost = cost_of(batch)
    terminal.say(f"{rows['succeeded']:,} succeeded, {failed:,} failed, {cost}")
    if batch["problem"]:
        terminal.say(f"error: {batch['problem']}")
    elif rows["invalid"]:
        lines = terminal.counted(rows["invalid"], "line")
        terminal.say(
            f"{lines} invalid; run `sluice batches results {batch['id']} --errors` to see why"
        )
    return not failed and not rows["invalid"] and not batch["problem"]


def write_file(gateway: "Gateway", batch_id: str, kind: str, sink: files.Output) -> None:
    """Write a file of an ended batch (`results`, `errors` or `summary`) to an output."""
    from scripts.cli.transfer import bucket

    with bucket() as store:
        for piece in store.download(gateway.batch_links(batch_id)[kind]):
            sink.write(piece)


def _say_sent(sent: int, size: int) -> None:
    if size > 64 * 1024 * 1024:
        terminal.say(f"{sent / 1e6:,.0f} of {size / 1e6:,.0f} MB sent")
