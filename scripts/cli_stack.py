"""Commands for a deployed stack: `sluice setup`, `sluice keys` and `sluice dead-letters`. They call AWS."""
# ruff: noqa: PLC0415 - boto3 takes half a second to import; only these commands need it

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scripts import terminal
from scripts.cli_errors import CommandFailed

if TYPE_CHECKING:
    from scripts.setup_stack import KeyPool, Stack
    from sluice.upkeep.dead_letters import Candidate, KeptLetter, Redriver

keys_app = typer.Typer(
    no_args_is_help=True, help="Client keys of a deployed stack. Uses your AWS credentials."
)
letters_app = typer.Typer(
    no_args_is_help=True, help="Dead letters of a deployed stack. Uses your AWS credentials."
)

StackName = Annotated[str, typer.Option("--stack", help="Name of the CloudFormation stack.")]
Region = Annotated[
    str | None,
    typer.Option("--region", help="AWS region. Default: the region of your AWS profile."),
]
EndpointUrl = Annotated[
    str | None,
    typer.Option("--endpoint-url", help="AWS endpoint URL, such as that of the local stack."),
]


def setup(
    *,
    stack: StackName,
    key_pool: Annotated[
        Path | None,
        typer.Option(
            "--key-pool",
            help='JSON file with the upstream keys: {"keys": [{"id", "api_key", ...}]}. Use `-` for '
            "standard input. Default: prompts for the keys with hidden input.",
            allow_dash=True,
        ),
    ] = None,
    tenant: Annotated[
        str, typer.Option("--tenant", help="Tenant of the first client key.")
    ] = "default",
    region: Region = None,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Set up a deployed stack: store your Claude API keys and print the first client key.

    Uses your AWS credentials. A later run keeps the stored upstream keys unless you replace them, and
    creates another client key.
    """
    from scripts.setup_stack import Stack, check_tenant

    check_tenant(tenant)
    deployed = Stack(stack, region, endpoint_url)
    pool = _key_pool_for(deployed, key_pool)
    if pool is not None:
        deployed.write_key_pool(pool)
        keys = terminal.counted(len(pool["keys"]), "upstream key")
        terminal.say(f"stored {keys} in the key pool of {stack}")
    _have_governed(deployed)
    client_key = _print_new_client_key(deployed, tenant, None)
    if endpoint_url is None:
        _try_out(deployed.api_url, client_key)
    else:
        terminal.say(
            "SLUICE_URL above is the AWS URL; for the local stack, use the api_url that it printed"
        )


@keys_app.command("create")
def create_key(
    *,
    stack: StackName,
    tenant: Annotated[str, typer.Option("--tenant", help="Tenant of the key.")],
    name: Annotated[
        str | None, typer.Option("--name", help="Display name of the key. Default: the tenant.")
    ] = None,
    region: Region = None,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Create a client key and print it once. Only its hash is stored."""
    from scripts.setup_stack import Stack

    _print_new_client_key(Stack(stack, region, endpoint_url), tenant, name)


@keys_app.command("list")
def list_keys(
    *,
    stack: StackName,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    region: Region = None,
    endpoint_url: EndpointUrl = None,
) -> None:
    """List client keys: ID, tenant, name, state. The keys themselves are not stored."""
    from scripts.setup_stack import Stack

    keys = Stack(stack, region, endpoint_url).list_client_keys()
    if as_json:
        terminal.print_json({"data": keys})
    elif keys:
        from scripts import show

        show.console().print(show.keys_table(keys))
    else:
        terminal.say("no client keys: run `sluice keys create` to create one")


@keys_app.command("revoke")
def revoke_keys(
    key_ids: Annotated[list[str], typer.Argument(help="Key IDs, as shown by `sluice keys list`.")],
    *,
    stack: StackName,
    region: Region = None,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Revoke client keys. Takes effect within a minute; jobs already submitted keep running."""
    from scripts.setup_stack import Stack

    deployed = Stack(stack, region, endpoint_url)
    for key_id in key_ids:
        deployed.revoke_client_key(key_id)
        print(f"{key_id} revoked")


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
    from scripts.setup_stack import Stack, said_plainly

    redriver = Stack(stack, region, endpoint_url).redriver()
    with said_plainly("read the dead letters"):
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
    from scripts.setup_stack import Stack, said_plainly
    from sluice.api import views

    redriver = Stack(stack, region, endpoint_url).redriver()
    with said_plainly("read the dead letter"):
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
    from scripts.setup_stack import Stack, said_plainly

    if (bool(letters), reason is not None, every).count(True) != 1:
        raise typer.BadParameter("provide dead letter IDs, --reason or --all")
    redriver = Stack(stack, region, endpoint_url).redriver()
    with said_plainly("read the dead letters"):
        chosen = _letters_named(redriver, letters) if letters else redriver.letters(reason)
        found = redriver.candidates(chosen)
    able = [each for each in found if each.hindrance is None]
    if dry_run or not able:
        _print_candidates(found, as_json=as_json, nothing="no dead letters")
        _tell_estimate(able, "would be redriven")
        return
    if not yes:
        if not sys.stdin.isatty():
            raise CommandFailed("no terminal to confirm on: use --yes, or --dry-run to preview")
        _print_candidates(found, as_json=False, nothing="")
        _tell_estimate(able, "would be redriven")
        if not typer.confirm("Redrive?", default=False, err=True):
            return
    with said_plainly("redrive jobs"):
        done = [redriver.redrive(each) for each in able]
    _print_candidates(done, as_json=as_json, nothing="")
    _tell_estimate([each for each in done if each.hindrance is None], "redriven")
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
        from scripts import show

        show.console().print(show.letters_table(rows))
    else:
        terminal.say(nothing)


def _tell_estimate(able: "list[Candidate]", what: str) -> None:
    from scripts.progress import dollars
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


def _key_pool_for(deployed: "Stack", file: Path | None) -> "KeyPool | None":
    """Returns the upstream keys to store, or None to keep those the stack has."""
    from scripts.setup_stack import ask_for_key_pool, read_key_pool

    if file is not None:
        with terminal.lines_of(file) as lines:
            text = b"".join(lines).decode(errors="replace")
        return read_key_pool(text, f"key pool {file}")
    present = deployed.key_pool_ids()
    if not sys.stdin.isatty():
        if present:
            terminal.say(
                f"kept the upstream keys {', '.join(present)}; use --key-pool to replace them"
            )
            return None
        raise CommandFailed("no terminal to prompt for upstream keys: use --key-pool FILE")
    if present:
        there = terminal.counted(len(present), "upstream key")
        question = f"The stack has {there} ({', '.join(present)}). Replace?"
        if not typer.confirm(question, default=False, err=True):
            return None
    terminal.say("Keys of one organization share its rate limits: a second key adds no throughput.")
    return ask_for_key_pool(_ask_hidden, terminal.say)


def _ask_hidden(question: str) -> str:
    answer: str = typer.prompt(question, default="", hide_input=True, show_default=False, err=True)
    return answer


def _print_new_client_key(deployed: "Stack", tenant: str, name: str | None) -> str:
    client_key, key_id = deployed.create_client_key(tenant, name)
    terminal.say(f'client key {key_id} for tenant "{tenant}"; it is shown only once:')
    print(f"export SLUICE_URL={deployed.api_url}")
    print(f"export SLUICE_KEY={client_key}")
    return client_key


def _have_governed(deployed: "Stack") -> None:
    """Reports the account's Lambda limit and applies it before the first submit. A failure is only reported."""
    try:
        for line in deployed.about_executions():
            terminal.say(line)
        deployed.wake_governor()
    except CommandFailed as failed:
        terminal.say(f"{failed}; the governor's next scheduled run is within a minute")


def _try_out(url: str, client_key: str) -> None:
    """Checks URL and key with one call. A failure is only reported."""
    from scripts.client import Gateway

    try:
        with Gateway(url, client_key) as gateway:
            gateway.limits()
    except CommandFailed as failed:
        terminal.say(f"the gateway is not ready yet: {failed}")
    else:
        terminal.say('the gateway is ready; try: sluice submit --prompt "Hello" --wait')
