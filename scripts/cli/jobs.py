"""Jobs: `sluice submit`, `get`, `results`, `list` and `cancel`."""
# ruff: noqa: PLC0415 - a command imports its own dependencies, so that --help stays fast

import uuid
from collections.abc import Iterable
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import typer

from scripts.cli import files, terminal
from scripts.cli.errors import GatewayRefused, InvalidUsage
from scripts.cli.options import (
    AsJson,
    AskedLane,
    Deadline,
    FallbackModels,
    Key,
    KeyFile,
    OnUnmeetable,
    Out,
    Url,
    Webhook,
    gateway_at,
)

DEFAULT_MODEL = "claude-haiku-5-5"
DEFAULT_MAX_TOKENS = 1024
CANCELS_IN_FLIGHT = 8
LONGEST_IDEMPOTENCY_KEY = 240

JobState = Literal["queued", "running", "succeeded", "errored", "canceled", "expired"]
FinalState = Literal["succeeded", "errored", "canceled", "expired"]


def submit(  # noqa: PLR0913 - a command line has options
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="FILE",
            help='JSON Lines file with one job per line: {"params": {...}, "custom_id": ...}, '
            "the format of Anthropic's Message Batches. Use - for standard input.",
            allow_dash=True,
        ),
    ] = None,
    *,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="Submit one job with this prompt instead of FILE."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help=f"With --prompt: the model. Default: {DEFAULT_MODEL}."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            min=1,
            help=f"With --prompt: the maximum output tokens. Default: {DEFAULT_MAX_TOKENS}.",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="With --prompt: the system prompt.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until every job has ended and show progress.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="With --wait: write the results to this file as JSON lines when all jobs have ended; "
            "until then, an existing file is kept. Use - for standard output.",
            allow_dash=True,
        ),
    ] = None,
    deadline: Deadline = None,
    fallback_model: FallbackModels = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(
            "--metadata", help="Metadata to store with the jobs, as name=value. Repeatable."
        ),
    ] = None,
    lane: Annotated[
        AskedLane | None,
        typer.Option(
            "--lane",
            help="Lane to ask for. With batch or auto, all jobs become one batch, whose ID is printed. Default: live.",
        ),
    ] = None,
    on_unmeetable: OnUnmeetable = None,
    webhook: Webhook = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(
            "--idempotency-key",
            help="Idempotency key. Resending the file with the same key returns the existing jobs. "
            "Default: a new key for each run.",
        ),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print accepted and rejected jobs as JSON (with --wait: results)."
        ),
    ] = False,
    url: Url = None,
    key: Key = None,
    key_file: KeyFile = None,
) -> None:
    """Submit jobs from a file, or one job from --prompt.

    Prints the job IDs. --deadline, --fallback-model, --metadata and --webhook apply to jobs that do not
    set their own. Invalid lines and rejected jobs are reported with their line numbers after all other
    jobs are sent. The exit code is 1 if a line is invalid, a job is rejected or, with --wait, a job does
    not succeed.

    With --lane batch or --lane auto, all jobs become one batch of at most 4 MB, without --metadata, and
    --webhook is that of the batch.
    """
    from scripts.cli.batch_run import BatchRun
    from scripts.cli.run import Submission, prompt_line
    from scripts.cli.submission import deadline_at

    _check_source(file, prompt, key_file, prompt_only=bool(model or max_tokens or system))
    if out is not None and not wait:
        raise InvalidUsage("--out requires --wait")
    files.refuse_inputs(out, [file, key_file])
    if idempotency_key is not None:
        _check_idempotency_key(idempotency_key)
    asked = _lane_asked(lane, on_unmeetable, metadata, webhook)
    defaults: dict[str, object] = {}
    if deadline:
        defaults["deadline"] = deadline_at(deadline, datetime.now(UTC))
    if fallback_model:
        defaults["fallback_models"] = fallback_model
    if metadata:
        defaults["metadata"] = dict(_pair(text) for text in metadata)
    run_key = idempotency_key or f"run-{uuid.uuid4().hex}"
    submission: Submission | BatchRun
    if asked:
        submission = BatchRun(
            run_key,
            defaults,
            asked,
            webhook,
            wait=wait,
            as_json=as_json,
            is_prompt=prompt is not None,
        )
    else:
        if webhook:
            defaults["webhook"] = webhook
        submission = Submission(
            run_key, defaults, wait=wait, as_json=as_json, is_prompt=prompt is not None
        )
    with ExitStack() as cleanup:
        gateway = cleanup.enter_context(gateway_at(url, key, key_file))
        if prompt is None:
            lines: Iterable[bytes] = cleanup.enter_context(files.lines_of(file))
        else:
            lines = [
                prompt_line(
                    prompt, model or DEFAULT_MODEL, max_tokens or DEFAULT_MAX_TOKENS, system
                )
            ]
        # Before anything is sent, so that a path that cannot be written fails early.
        sink = cleanup.enter_context(files.writing(out)) if out else None
        good = submission.run(gateway, lines, sink)
    if not good or (sink is not None and sink.was_kept):
        raise typer.Exit(1)


def get(
    job_id: Annotated[str, typer.Argument(help="Job ID.")],
    *,
    as_json: AsJson = False,
    url: Url = None,
    key: Key = None,
    key_file: KeyFile = None,
) -> None:
    """Show a job: state, attempts, cost, and the answer or error."""
    with gateway_at(url, key, key_file) as gateway:
        job = gateway.job(job_id)
    if as_json:
        terminal.print_json(job)
        return
    from scripts.cli import tables

    tables.show(tables.job_panel(job))


def results(  # noqa: PLR0913 - a command line has options
    job_ids: Annotated[
        list[str] | None, typer.Argument(help="Job IDs. Default: all ended jobs.")
    ] = None,
    *,
    state: Annotated[
        FinalState | None, typer.Option("--state", help="Only jobs with this final state.")
    ] = None,
    out: Out = None,
    url: Url = None,
    key: Key = None,
    key_file: KeyFile = None,
) -> None:
    """Fetch results as JSON lines, in the format of Anthropic's batch results.

    Each line is {"custom_id", "id", "result": {"type": "succeeded", "message": ...}}; other result types
    are errored (with its error), canceled and expired. If a requested job is unknown or has not ended, it
    is reported and the exit code is 1.
    """
    from scripts.cli.client import FINAL_STATES
    from scripts.cli.results import fetch, line_of

    missing: list[str] = []

    def report(job_id: str, reason: str) -> None:
        terminal.say(f"{job_id}: {reason}")
        missing.append(job_id)

    with ExitStack() as cleanup:
        gateway = cleanup.enter_context(gateway_at(url, key, key_file))
        sink = cleanup.enter_context(files.writing(out, inputs=[key_file]))
        ids = job_ids or (
            job["id"] for job in gateway.newest(state) if job["state"] in FINAL_STATES
        )
        written = 0
        for job in fetch(gateway, ids, report):
            if state in {None, job["state"]}:
                sink.write(line_of(job))
                written += 1
    if out is not None and written:
        terminal.say(f"{terminal.counted(written, 'result')} written to {out}")
    if missing or sink.was_kept:
        raise typer.Exit(1)


def list_jobs(  # noqa: PLR0913 - a command line has options
    *,
    state: Annotated[
        JobState | None, typer.Option("--state", help="Only jobs in this state.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Maximum number of jobs.")] = 20,
    as_json: AsJson = False,
    url: Url = None,
    key: Key = None,
    key_file: KeyFile = None,
) -> None:
    """List jobs, newest first."""
    with gateway_at(url, key, key_file) as gateway:
        jobs = list(islice(gateway.newest(state, limit), limit))
    if as_json:
        terminal.print_json({"data": jobs})
        return
    from scripts.cli import tables

    if jobs:
        tables.show(tables.jobs_table(jobs))
    else:
        terminal.say("no jobs" if state is None else f"no {state} jobs")


def cancel(
    job_ids: Annotated[list[str], typer.Argument(help="IDs of the jobs to cancel.")],
    *,
    url: Url = None,
    key: Key = None,
    key_file: KeyFile = None,
) -> None:
    """Cancel jobs: guaranteed before the upstream call, best effort during it.

    A job whose call is in flight may still succeed, and its call is billed.
    """
    from concurrent.futures import ThreadPoolExecutor

    failed = False
    with gateway_at(url, key, key_file) as gateway, ThreadPoolExecutor(CANCELS_IN_FLIGHT) as pool:

        def canceled(job_id: str) -> str | GatewayRefused:
            try:
                job = gateway.cancel(job_id)
            except GatewayRefused as refused:
                return refused
            asked = job.get("cancel_requested") and job["state"] == "running"
            return "cancel requested, call in flight" if asked else str(job["state"])

        for job_id, became in zip(job_ids, pool.map(canceled, job_ids), strict=True):
            if isinstance(became, GatewayRefused):
                failed = True
                terminal.say(f"{job_id}: {became}")
            else:
                terminal.put(f"{job_id} {became}")
    if failed:
        raise typer.Exit(1)


def _check_source(
    file: Path | None, prompt: str | None, key_file: Path | None, *, prompt_only: bool
) -> None:
    if (file is None) == (prompt is None):
        raise InvalidUsage("provide either FILE or --prompt")
    if file is not None and prompt_only:
        raise InvalidUsage("--model, --max-tokens and --system require --prompt")
    if str(file) == str(key_file) == "-":
        raise InvalidUsage("FILE and --key-file cannot both read standard input")


def _lane_asked(
    lane: str | None, on_unmeetable: str | None, metadata: list[str] | None, webhook: str | None
) -> dict[str, object]:
    """Return the fields of the request that make it a batch; empty for the live lane."""
    if lane in {None, "live"}:
        if on_unmeetable:
            raise InvalidUsage("--on-unmeetable requires --lane batch or --lane auto")
        return {}
    if metadata:
        raise InvalidUsage(
            f"--metadata is not supported with --lane {lane}; rows of a batch have no metadata"
        )
    if webhook and not (webhook.isascii() and webhook.isprintable()):
        # A header carries it.
        raise InvalidUsage("--webhook must be printable ASCII; percent-encode other characters")
    asked: dict[str, object] = {"lane": lane, "on_unmeetable": on_unmeetable}
    return {name: value for name, value in asked.items() if value}


def _check_idempotency_key(key: str) -> None:
    # A header carries it, and each list of the file adds its number.
    if not (key.isascii() and key.isprintable() and 1 <= len(key) <= LONGEST_IDEMPOTENCY_KEY):
        raise InvalidUsage(
            f"--idempotency-key must have 1 to {LONGEST_IDEMPOTENCY_KEY} printable ASCII characters"
        )


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise InvalidUsage(f'--metadata "{text}" is not name=value')
    return name, value
