"""Panels and tables for a person. What they show comes from other systems, so each escapes it first (`terminal`)."""

from datetime import datetime

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from scripts.cli import terminal
from scripts.cli.client import FINAL_STATES, Json
from scripts.cli.progress import cost_of, dollars

STATE_STYLES = {
    "succeeded": "green",
    "errored": "red",
    "expired": "red",
    "canceled": "yellow",
    "running": "cyan",
    "queued": "default",
}
WIDTH_WITHOUT_TERMINAL = 160


def show(made: Panel | Table) -> None:
    """Print a panel or a table to standard output; a pipe is wide enough not to truncate it."""
    console = Console(highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, emoji=False, markup=False, width=WIDTH_WITHOUT_TERMINAL)
    console.print(made)


def job_panel(job: Json) -> Panel:
    """Return a job: state, attempts, cost, and the answer or error."""
    answer, job = job.get("text"), terminal.safe(job)
    parts: list[Table | Text] = [_facts_table(job)]
    if job.get("attempts"):
        parts += [Text(), _attempts_table(job["attempts"])]
    if job.get("error"):
        parts += [Text(), Text(f"{job['error']['type']}: {job['error']['message']}", style="red")]
    if answer:
        parts += [Text(), Text(terminal.block(answer))]
    return Panel(Group(*parts), title=Text(job["id"]), title_align="left")


def _facts_table(job: Json) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    waits_for_cancel = job.get("cancel_requested") and job["state"] not in FINAL_STATES
    asked = " (cancel requested)" if waits_for_cancel else ""
    style = STATE_STYLES.get(job["state"], "default")
    table.add_row("state", Text(job["state"] + asked, style=style))
    facts = {name: job.get(name) for name in ("custom_id", "model", "lane")}
    for name in ("created_at", "started_at", "finished_at", "deadline", "estimated_start_at"):
        facts[name] = moment(job[name]) if job.get(name) else None
    facts["fallback"] = ", ".join(job.get("fallback_models") or [])
    pairs = (job.get("metadata") or {}).items()
    facts["metadata"] = ", ".join(f"{name}={value}" for name, value in pairs)
    redriven = f", redriven {len(job['redrives'])} times" if job.get("redrives") else ""
    facts["attempts"] = f"{job['attempts_used']} used, {job['snoozes']} snoozes{redriven}"
    facts["usage"] = _usage_text(job.get("usage") or {})
    cost = cost_of(job)
    facts["cost"] = None if cost == "-" else cost
    for name, fact in facts.items():
        if fact:
            table.add_row(name, Text(fact))
    return table


def _usage_text(usage: Json) -> str:
    names = {
        "input_tokens": "input",
        "cache_creation_input_tokens": "cache written",
        "cache_read_input_tokens": "cache read",
        "output_tokens": "output",
    }
    return ", ".join(
        f"{usage[name]:,} {word}" for name, word in names.items() if usage.get(name) is not None
    )


def _attempts_table(attempts: list[Json]) -> Table:
    table = Table("attempt", "at", "model", "outcome", "request", "error", box=None, pad_edge=False)
    for attempt in attempts:
        error = attempt.get("error")
        table.add_row(
            str(attempt["attempt"]),
            moment(attempt["at"]),
            attempt.get("model") or "-",
            attempt.get("outcome") or "running",
            attempt.get("request_id") or "-",
            Text(f"{error['type']}: {error['message']}" if error else ""),
        )
    return table


def jobs_table(jobs: list[Json]) -> Table:
    """Return a row per job."""
    table = Table("job", "custom_id", "state", "model", "created", "finished", box=None)
    table.add_column("attempts", justify="right")
    table.add_column("cost", justify="right")
    for job in terminal.safe(jobs):
        table.add_row(
            job["id"],
            job.get("custom_id") or "-",
            Text(job["state"], style=STATE_STYLES.get(job["state"], "default")),
            job.get("model") or "-",
            moment(job["created_at"]),
            moment(job["finished_at"]) if job.get("finished_at") else "-",
            str(job.get("attempts_used", 0)),
            cost_of(job),
        )
    return table


def usage_table(usage: Json) -> Table:
    """Return a row per group and a total."""
    usage = terminal.safe(usage)
    groups: list[str] = list(usage["group_by"])
    numbers = (
        ("calls", "calls"),
        ("input_tokens", "input"),
        ("cache_creation_input_tokens", "cache written"),
        ("cache_read_input_tokens", "cache read"),
        ("output_tokens", "output"),
    )
    table = Table(*groups, box=None, show_footer=False)
    for _, title in numbers:
        table.add_column(title, justify="right")
    table.add_column("cost", justify="right")
    for row in usage["data"]:
        table.add_row(
            *(str(row.get(name) or "-") for name in groups),
            *(f"{row.get(name) or 0:,}" for name, _ in numbers),
            cost_of(row),
        )
    total = usage["total"]
    if usage["data"]:
        table.add_section()
    table.add_row(
        *(("total", *("" for _ in groups[1:])) if groups else ()),
        *(f"{total.get(name) or 0:,}" for name, _ in numbers),
        cost_of(total),
        style="bold",
    )
    return table


def limits_table(groups: list[Json]) -> Table:
    """Return a row per limit group: limits per minute, and current blocks."""
    table = Table("limit group", box=None)
    for title in ("requests", "input tokens", "output tokens"):
        table.add_column(title, justify="right")
    for title in ("source", "rate", "blocked"):
        table.add_column(title)
    for group in terminal.safe(groups):
        limits = group.get("limits") or {}
        table.add_row(
            group["group"],
            *(
                "-" if limits.get(name) is None else f"{limits[name]:,}"
                for name in ("requests", "input_tokens", "output_tokens")
            ),
            "learned" if group.get("learned") else "default",
            f"{group.get('rate_factor', 1.0):.0%}",
            Text("\n".join(_waits(group)), style="yellow"),
        )
    return table


def _waits(group: Json) -> list[str]:
    """Return a line for each block on a limit group: until when, why, and the source."""
    lines = []
    if group.get("blocked_until"):
        why = group.get("blocked_reason")
        lines.append(f"group until {moment(group['blocked_until'])}" + (f" ({why})" if why else ""))
    lines += [
        f"{each['what']} until {moment(each['until'])}" for each in group.get("set_aside") or ()
    ]
    return lines


def keys_table(keys: list[Json]) -> Table:
    """Return a row per client key."""
    table = Table("key ID", "tenant", "name", "created", "state", box=None)
    for key in terminal.safe(keys):
        table.add_row(
            key["key_id"],
            key["tenant"],
            key.get("name") or "-",
            moment(key["created_at"]) if key.get("created_at") else "-",
            Text("revoked", style="red") if key.get("disabled") else Text("active"),
        )
    return table


def letters_table(letters: list[Json]) -> Table:
    """Return a row per dead letter."""
    table = Table("letter", "stored", "reason", "job", "job state", box=None)
    table.add_column("estimate", justify="right")
    table.add_column("redrivable")
    for letter in terminal.safe(letters):
        state = letter["state"]
        cost = letter["estimated_cost_micro_usd"]
        table.add_row(
            letter["letter"],
            moment(letter["kept_at"]),
            Text(letter["reason"]),
            letter["job"] or "-",
            Text(state, style=STATE_STYLES.get(state, "default")) if state else "-",
            "-" if cost is None else dollars(cost),
            Text(letter["hindrance"] or "yes"),
        )
    return table


def moment(text: str) -> str:
    """Return a time of the API in the local time zone, and any other text unchanged."""
    try:
        return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return text


def batches_table(batches: list[Json]) -> Table:
    """Return a row per batch."""
    table = Table("batch", "name", "state", "rows", "failed", "created", "cost", box=None)
    for batch in terminal.safe(batches):
        rows = batch["rows"]
        about = "" if batch["state"] == "ended" else "~"
        failed = rows["errored"] + rows["canceled"] + rows["expired"] + rows["invalid"]
        table.add_row(
            batch["id"],
            Text(batch["name"]),
            batch["state"],
            f"{rows['done']:,} of {about}{rows['expected']:,}",
            f"{failed:,}",
            moment(batch["created_at"]),
            cost_of(batch),
        )
    return table


def batch_panel(batch: Json) -> Panel:
    """Return a batch: state, rows, cost."""
    batch = terminal.safe(batch)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    rows = batch["rows"]
    about = "" if batch["state"] == "ended" else "about "
    counts = ", ".join(
        f"{rows[name]:,} {name}"
        for name in ("succeeded", "errored", "canceled", "expired", "invalid", "duplicates")
        if rows[name]
    )
    facts = {
        "name": batch["name"],
        "state": batch["state"],
        "lane": _lane_of(batch),
        "lane chosen": _decision_of(batch),
        "upstream batches": _upstream_of(batch),
        "rows": f"{rows['done']:,} of {about}{rows['expected']:,}",
        "row states": counts,
        "tokens": f"{batch['input_tokens']:,} input, {batch['output_tokens']:,} output",
        "cost": cost_of(batch),
        "saved": f"${batch['saved_usd']}" if batch.get("saved_micro_usd") else None,
        "problem": batch["problem"],
    }
    for name in ("created_at", "estimated_end_at", "ended_at", "expires_at"):
        facts[name] = moment(batch[name]) if batch[name] else None
    for name, fact in facts.items():
        if fact:
            table.add_row(name, Text(str(fact)))
    return Panel(table, title=Text(batch["id"]), title_align="left")


def _decision_of(batch: Json) -> str | None:
    """Return which lane a batch was given, and why."""
    decision = batch.get("lane_decision")
    return decision and f"{decision['lane']}: {decision['reason']}"


def _upstream_of(batch: Json) -> str | None:
    """Return a line for each upstream batch."""
    lines = [
        f"{each['requests']:,} requests, {each['state']}"
        + (f" ({each['problem'] or each['reason']})" if each["problem"] or each["reason"] else "")
        for each in batch.get("upstream_batches") or ()
    ]
    return "\n".join(lines) or None


def _lane_of(batch: Json) -> str | None:
    """Return the lane in force and where it comes from; None for a gateway that has no lanes."""
    lane = batch.get("lane")
    if lane is None:
        return None
    refuses = batch.get("on_unmeetable") == "refuse"
    origin = "as asked" if batch.get("lane_asked") else "default of the stack"
    return f"{lane} ({origin}{', refuse if the deadline cannot be met' if refuses else ''})"
