"""The table of docs/bounds.md, from the constants of the code: what each step may use at most."""

from __future__ import annotations

from typing import Final

from scripts.documents.markers import replaced, row
from sluice.adapters import claude_answers, claude_bodies, s3
from sluice.api import requests
from sluice.bulk import assemble, plan, sections, turns
from sluice.domain import batches, forms, jobs, limits, models, webhooks
from sluice.domain import turns as owners
from sluice.intake import admission, start_estimate, uploads
from sluice.intake import batches as intake
from sluice.intake import requests as validator
from sluice.ports import limits as ports
from sluice.upkeep import sweep
from sluice.worker import range_rows, range_windows

KIB: Final = 1024
UNITS: Final = ("bytes", "KiB", "MiB", "GiB", "TiB")


def size(count: int) -> str:
    """Return a number of bytes as people write it."""
    for unit in UNITS:
        if count < KIB or count % KIB or unit == UNITS[-1]:
            break
        count //= KIB
    return f"{count:,} {unit}"


def span(milliseconds: int) -> str:
    """Return a time as people write it."""
    if milliseconds % 60_000 == 0:
        return f"{milliseconds // 60_000:,} min"
    return f"{milliseconds // 1000:,} s"


ROWS: Final = (
    (
        "one request to the API",
        f"{size(admission.MOST_BYTES)}; {requests.MOST_JOBS} jobs as single jobs; 28 s",
        "413; a longer list is a batch; 503",
    ),
    (
        "`estimated_start_at` of a submit",
        f"one read of {ports.MOST_GROUPS:,} limit groups in {span(start_estimate.MOST_AGE_MS)}",
        "more groups are left out, and the governor logs `not all limit groups read`",
    ),
    (
        "a job or row, at every door",
        (
            f"{validator.DEEPEST} levels of objects and lists; numbers that a double holds; valid Unicode; a webhook "
            f"URL of {webhooks.MOST_CHARACTERS:,} characters"
        ),
        "400 for this job, or a bad row",
    ),
    (
        "a list of jobs, or a create of the batches API",
        f"{validator.MOST_ROWS:,} rows within the {size(admission.MOST_BYTES)} of a request",
        "400; upload a file",
    ),
    (
        "deleting a batch",
        f"{span(intake.ERASE_MS)} in one request",
        "503; a repeated request continues",
    ),
    (
        "one upload",
        f"{size(uploads.MOST_BYTES)}, {uploads.MOST_PARTS:,} parts, each exactly as large as declared",
        "400; S3 rejects a part of another size",
    ),
    ("options of a file", size(plan.MOST_OPTIONS_BYTES), "the batch ends with the reason"),
    (
        "making rows of a gzip or CSV file, or of a folder",
        (
            f"{size(forms.MOST_ROWS_BYTES)} of rows; CSV: {size(forms.LEAST_ROWS_BYTES)}, or "
            f"{forms.MOST_GROWTH} times the file; {span(plan.CONVERT_MS)}; {size(forms.FEED_BYTES)} "
            f"of gzip at once, in memory for {size(2 * forms.PIECE_BYTES)}"
        ),
        "the batch ends with the reason; nothing is tried again",
    ),
    (
        "planning a file",
        (
            f"{batches.SAMPLES} samples of {size(batches.SAMPLE_BYTES)}; {batches.MOST_ROWS:,} rows, "
            f"as estimated from them; {batches.MOST_RANGES:,} ranges"
        ),
        "more rows: the batch ends with the reason; larger files have longer ranges",
    ),
    (
        "copying a plain JSONL file to its batch",
        size(plan.MOST_COPIED_BYTES),
        "the file is read where it is, and must not change while it runs",
    ),
    (
        "one row of a file: a JSONL line, a CSV record with its prompt, a document with its prompt",
        (
            f"{size(batches.MOST_LINE_BYTES)} as a request; that is a PDF of {forms.MOST_PDF_BYTES:,} "
            "bytes, or text of a little less than the limit"
        ),
        "a bad row, in `errors.jsonl`",
    ),
    (
        "documents of unsupported types",
        f"{batches.MOST_UNSUPPORTED} named in `summary.json`",
        "`errors.jsonl` names all",
    ),
    (
        "names",
        (
            f"an upload: {uploads.MOST_NAME} characters; copies under `out/`: {batches.MOST_KEY_BYTES:,} bytes "
            "with `out/<tenant>/` and `/results.jsonl`"
        ),
        "400; the results are only under the batch's ID",
    ),
    (
        "one range",
        (
            f"about {batches.LINES_PER_RANGE} rows, on the batch lane up to {batches.LINES_ON_BATCH_LANE}; "
            f"{size(batches.MOST_RANGE_BYTES)}, in windows of "
            f"{range_windows.WINDOW_ROWS} rows and {size(range_windows.WINDOW_BYTES)}; "
            f"saved after {size(range_rows.SAVE_BYTES)} or {span(range_rows.SAVE_MS)}"
        ),
        "what has ended is saved; the next invocation continues",
    ),
    (
        "joining a section",
        (
            f"{batches.RANGES_PER_SECTION} ranges; {sections.PARTS_AHEAD + 1} pieces of "
            f"{size(sections.AHEAD_BYTES)} in memory"
        ),
        "each section is kept",
    ),
    (
        "the end of a batch",
        (
            f"steps of {sections.ENTRIES_AT_ONCE:,} `custom_id`s, or of one section; none starts after "
            f"{span(assemble.END_MS)} of an invocation"
        ),
        "each step is kept; other batches get their turn, then it continues",
    ),
    (
        "long steps of one tenant's batches",
        (
            f"one at a time: rows from a file above {size(plan.QUICK_TO_CONVERT_BYTES)} or from more than "
            f"{plan.QUICK_DOCUMENTS} documents, a copy above {size(plan.QUICK_TO_COPY_BYTES)}, the end of a "
            f"batch above {assemble.QUICK_TO_END_RANGES:,} ranges"
        ),
        f"the next one is tried again after {span(turns.NOT_ITS_TURN_MS)}, later after many tries",
    ),
    (
        "results in a response",
        f"{size(intake.MOST_INLINE_BYTES)}, gzipped; {size(assemble.MOST_PACKED_BYTES)} unpacked",
        "a link",
    ),
    (
        "one answer of upstream",
        (
            f"{size(claude_bodies.MOST_PARSED_BYTES)}, {claude_bodies.MOST_LEVELS} levels; of an error "
            f"{size(claude_bodies.MOST_ERROR_BYTES)}, {claude_answers.MOST_MESSAGE:,} characters of text"
        ),
        "`answer_too_large`; the text is cut",
    ),
    (
        "the record of a job",
        (
            f"{jobs.MOST_REMEMBERED} attempts, {jobs.WHOLE_TEXTS} with whole error texts and the others "
            f"with {jobs.SHORT_TEXT} characters; an answer of {size(s3.INLINE_BYTES)}, or "
            f"{size(s3.MOST_INLINE_BYTES)} while the bucket is busy"
        ),
        "older attempts are only in the ledger",
    ),
    (
        "models that no list knows",
        (
            f"one limit group for each tenant and organization; {models.MOST_OF_A_TENANT} of a tenant "
            f"and {models.MOST_ANSWERED} of all become known by an answer"
        ),
        "they stay in the tenant's shared group",
    ),
    (
        "the record of a limit group",
        (
            f"{limits.MOST_CIRCUITS} circuit breakers, reports of {limits.MOST_WORKERS} workers, what "
            f"{owners.MOST_PORTIONS} tenants and batches have had; kept for "
            f"{limits.KEPT_MS // batches.DAY_MS} days"
        ),
        "the oldest are dropped",
    ),
    (
        "one run of the sweep",
        (
            f"{sweep.DUE_SHARE:,} due jobs of each tenant and model, and "
            f"{sweep.UNHEARD_SHARE:,} that were not written for long"
        ),
        "the next run continues",
    ),
)
"""Each step, its bounds, and what happens over them."""


def table() -> str:
    """Return the Markdown table."""
    head = [row("step", "at most", "over it"), "|---|---|---|"]
    return "\n".join([*head, *(row(*each) for each in ROWS)])


def updated(page: str) -> str:
    """Return docs/bounds.md with its table."""
    return replaced(page, "bounds", table())
