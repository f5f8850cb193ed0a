"""Dead letters of a deployed stack: `sluice dead-letters`. They call AWS."""
# ruff: noqa: PLC0415 - boto3 takes half a second to import; only these commands need it

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from scripts.cli import terminal
from scripts.cli.errors import CommandFailed, InvalidUsage
from scripts.cli.options import EndpointUrl, Region, StackName

if TYPE_CHECKING:
    from sluice.upkeep.dead_letters import Candidate, KeptLetter, Redriver

letters_app = typer.Typer(
    no_args_is_help=True, help="Dead letters of a deployed stack. Uses your AWS credentials."
)

Reason = Annotated[
    str | None, typer.Option("--reason", help="Only dead letters whose reason contains this text.")
]


@letters_app.command("list")
def list_letters(
    *,
    stack: StackName,
    reason: Reason = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    region: Region = None,
    endpoint_url: EndpointUrl = None,
) -> None:
    """List dead letters, oldest first, with the reason and the current state of each job."""
    from scripts.cli.deployed import Stack, aws_errors

    redriver = Stack(stack, region, endpoint_url).redriver()
    with aws_errors("read the dead letters"):
        found = redriver.candidates(redriver.letters(reason))
    _print_candidates(found, as_json=as_json, nothing="no dead letters")


@letters_app.command("show")
def show_letter(
    letter: Annotated[
        str, typer.Argument(help="Dead letter ID, as shown by `sluice dead-letters list`.")
    ],
    *,
    stack: StackName,
    region: Region = None,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Show a dead letter as JSON: its raw body, its job record, and whether the job can be redriven.

    The job's request and answer are not shown.
    """
    from scripts.cli.deployed import Stack, aws_errors
    from sluice.api import views

    redriver = Stack(stack, region, endpoint_url).redriver()
    with aws_errors("read the dead letter"):
        (found,) = redriver.candidates(_letters_named(redriver, [letter]))
    job = None if found.job is None else views.job_view(found.job)
    shown = _as_json(found) | {"body": found.letter.body, "job_record": job}
    terminal.print_json(shown)


@letters_app.command("redrive")
def redrive_letters(  # noqa: PLR0913 - a command line has options
    letters: Annotated[
        list[str] | None,
        typer.Argument(help="Dead letter IDs, as shown by `sluice dead-letters list`."),
    ] = None,
    *,
    stack: StackName,
    reason: Reason = None,
    every: Annotated[bool, typer.Option("--all", help="All dead letters.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show what would be redriven and its cost; change nothing."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Skip the confirmation prompt.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    region: Region = None,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Redrive jobs that ended as dead letters: run them again from their stored records.

    First shows the jobs and their estimated cost at list prices. Redriven jobs start within about a
    minute, as fast as the rate limits allow, with a full set of attempts.
    """
    from scripts.cli.deployed import Stack, aws_errors

    if (bool(letters), reason is not None, every).count(True) != 1:
        raise InvalidUsage("provide dead letter IDs, --reason or --all")
    redriver = Stack(stack, region, endpoint_url).redriver()
    with aws_errors("read the dead letters"):
        chosen = _letters_named(redriver, letters) if letters else redriver.letters(reason)
        found = redriver.candidates(chosen)
    able = [each for each in found if each.hindrance is None]
    if dry_run or not able:
        _print_candidates(found, as_json=as_json, nothing="no dead letters")
        _print_estimate(able, "would be redriven")
        return
    if not yes:
        if not sys.stdin.isatty():
            raise CommandFailed("no terminal to confirm on: use --yes, or --dry-run to preview")
        _print_candidates(found, as_json=False, nothing="")
        _print_estimate(able, "would be redriven")
        if not terminal.confirm("Redrive?"):
            return
    with aws_errors("redrive jobs"):
        done = [redriver.redrive(each) for each in able]
    _print_candidates(done, as_json=as_json, nothing="")
    _print_estimate([each for each in done if each.hindrance is None], "redriven")
    if any(each.hindrance is not None for each in done):
        raise typer.Exit(1)


def _letters_named(redriver: "Redriver", names: list[str]) -> "list[KeptLetter]":
    found = []
    for name in names:
        letter = redriver.letter(name)
        if letter is None:
            raise CommandFailed(
                f"dead letter {name} does not exist; run `sluice dead-letters list` to list them"
            )
        found.append(letter)
    return found


def _as_json(found: "Candidate") -> dict[str, object]:
    from sluice.api import views

    letter, job, estimate = found.letter, found.job, found.estimate
    return {
        "letter": letter.message_id,
        "kept_at": views.time(letter.kept_at),
        "reason": letter.reason,
        "receive_count": letter.receive_count,
        "job": letter.job_id,
        "tenant": job.tenant if job else None,
        "state": job.state.value if job else None,
        "redrives": len(job.redrives) if job else 0,
        "redrivable": found.hindrance is None,
        "hindrance": found.hindrance,
        "estimated_cost_micro_usd": estimate.likely if estimate else None,
        "estimated_cost_at_most_micro_usd": estimate.most if estimate else None,
    }


def _print_candidates(found: "list[Candidate]", *, as_json: bool, nothing: str) -> None:
    rows = [_as_json(each) for each in found]
    if as_json:
        terminal.print_json({"data": rows})
    elif rows:
        from scripts.cli import tables

        tables.show(tables.letters_table(rows))
    else:
        terminal.say(nothing)


def _print_estimate(able: "list[Candidate]", what: str) -> None:
    from scripts.cli.progress import dollars
    from sluice.upkeep.dead_letters import Estimate

    total = sum((each.estimate for each in able if each.estimate), Estimate(0, 0))
    unpriced = sum(each.estimate is None for each in able)
    jobs = terminal.counted(len(able), "job")
    without = f"; excludes {terminal.counted(unpriced, 'job')} without a price" if unpriced else ""
    terminal.say(
        f"{jobs} {what}; estimated cost {dollars(total.likely)}, at most {dollars(total.most)} "
        f"(list prices{without})"
        if able
        else f"{jobs} {what}"
    )
