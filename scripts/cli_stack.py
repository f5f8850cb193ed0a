"""Commands for a deployed stack: `sluice setup`, `sluice keys` and `sluice dead-letters`. They speak to AWS."""
# ruff: noqa: PLC0415 - boto3 takes half a second to load; only these commands pay for it

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scripts import terminal
from scripts.cli_errors import CommandFailed

if TYPE_CHECKING:
    from scripts.setup_stack import KeyPool, Stack
    from sluice.dead_letters import Candidate, KeptLetter, Redriver

keys_app = typer.Typer(no_args_is_help=True, help="Client keys of a deployed stack.")
letters_app = typer.Typer(
    no_args_is_help=True, help="Dead letters of a deployed stack. Uses your AWS credentials."
)

StackName = Annotated[str, typer.Option("--stack", help="Name of the CloudFormation stack.")]
Region = Annotated[
    str | None, typer.Option("--region", help="AWS region. Default: that of your AWS profile.")
]
EndpointUrl = Annotated[
    str | None,
    typer.Option("--endpoint-url", help="Another address for AWS, such as the local stack's."),
]


def setup(
    *,
    stack: StackName,
    key_pool: Annotated[
        Path | None,
        typer.Option(
            "--key-pool",
            help='File with the upstream keys: {"keys": [{"id", "api_key", ...}]}. `-` reads '
            "standard input. Default: asks for them, hidden.",
            allow_dash=True,
        ),
    ] = None,
    tenant: Annotated[
        str, typer.Option("--tenant", help="Who the first client key is for.")
    ] = "default",
    region: Region = None,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Make a freshly deployed stack ready: store Claude API keys, print a first client key.

    Uses your AWS credentials. Run again, it keeps the upstream keys unless told otherwise, and
    makes another client key.
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
            "SLUICE_URL is the address in AWS; the local stack's is api_url of its own line"
        )


@keys_app.command("create")
def create_key(
    *,
    stack: StackName,
    tenant: Annotated[str, typer.Option("--tenant", help="Who the key is for.")],
    name: Annotated[
        str | None, typer.Option("--name", help="A word to know the key by. Default: the tenant.")
    ] = None,
    region: Region = None,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Make a client key and print it, once: only its hash is kept."""
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
    """List client keys: id, tenant, name, state. The keys themselves are not kept anywhere."""
    from scripts.setup_stack import Stack

    keys = Stack(stack, region, endpoint_url).list_client_keys()
    if as_json:
        terminal.print_json({"data": keys})
    elif keys:
        from scripts import show

        show.console().print(show.keys_table(keys))
    else:
        terminal.say("no client keys: `sluice keys create` makes one")


@keys_app.command("revoke")
def revoke_keys(
    key_ids: Annotated[list[str], typer.Argument(help="Key ids, as `sluice keys list` shows.")],
    *,
    stack: StackName,
    region: Region = None,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Revoke client keys, within a minute. Jobs they submitted go on."""
    from scripts.setup_stack import Stack

    deployed = Stack(stack, region, endpoint_url)
    for key_id in key_ids:
        deployed.revoke_client_key(key_id)
        print(f"{key_id} revoked")


Reason = Annotated[
    str | None, typer.Option("--reason", help="Only letters whose reason holds these words.")
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
    """List dead letters, oldest first: why each died, and what its job is now."""
    from scripts.setup_stack import Stack, said_plainly

    redriver = Stack(stack, region, endpoint_url).redriver()
    with said_plainly("read the dead letters"):
        found = redriver.candidates(redriver.letters(reason))
    _print_candidates(found, as_json=as_json, nothing="no dead letters")


@letters_app.command("show")
def show_letter(
    letter: Annotated[str, typer.Argument(help="Letter, as `sluice dead-letters list` shows.")],
    *,
    stack: StackName,
    region: Region = None,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Show a dead letter as JSON, with its raw body, its job's record, and whether that can be redriven.

    The job's request and answer are not shown.
    """
    from scripts.setup_stack import Stack, said_plainly
    from sluice import http

    redriver = Stack(stack, region, endpoint_url).redriver()
    with said_plainly("read the dead letter"):
        (found,) = redriver.candidates(_letters_named(redriver, [letter]))
    job = None if found.job is None else http.job_view(found.job)
    shown = _as_json(found) | {"body": found.letter.body, "job_record": job}
    terminal.print_json(shown)


@letters_app.command("redrive")
def redrive_letters(  # noqa: PLR0913 - a command line has options
    letters: Annotated[
        list[str] | None, typer.Argument(help="Letters, as `sluice dead-letters list` shows.")
    ] = None,
    *,
    stack: StackName,
    reason: Reason = None,
    every: Annotated[bool, typer.Option("--all", help="All letters.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be redriven, and its cost.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    region: Region = None,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Make jobs that ended by a dead letter runnable again, from their records.

    Shows first which, and what they would cost: an estimate by the price list. They start within
    about a minute, as fast as the limits allow, with all their attempts.
    """
    from scripts.setup_stack import Stack, said_plainly

    if (bool(letters), reason is not None, every).count(True) != 1:
        raise typer.BadParameter("give letters, --reason or --all")
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
            raise CommandFailed("there is no terminal to ask: give --yes, or --dry-run to look")
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
                f"there is no dead letter {name}; `sluice dead-letters list` shows what there is"
            )
        found.append(letter)
    return found


def _as_json(found: "Candidate") -> dict[str, object]:
    from sluice import http

    letter, job, estimate = found.letter, found.job, found.estimate
    return {
        "letter": letter.message_id,
        "kept_at": http.time(letter.kept_at),
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
    from sluice.dead_letters import Estimate

    total = sum((each.estimate for each in able if each.estimate), Estimate(0, 0))
    unpriced = sum(each.estimate is None for each in able)
    jobs = terminal.counted(len(able), "job")
    without = (
        f", {terminal.counted(unpriced, 'job')} without a price not counted" if unpriced else ""
    )
    terminal.say(
        f"{jobs} {what}; estimated cost {dollars(total.likely)}, at most {dollars(total.most)} "
        f"(by the price list{without})"
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
            terminal.say(f"kept the upstream keys {', '.join(present)}; --key-pool replaces them")
            return None
        raise CommandFailed("there is no terminal to ask for upstream keys: give --key-pool FILE")
    if present:
        there = terminal.counted(len(present), "upstream key")
        question = f"The stack has {there} ({', '.join(present)}). Replace?"
        if not typer.confirm(question, default=False, err=True):
            return None
    terminal.say("Keys of one organization share its limits: a second one adds no speed.")
    return ask_for_key_pool(_ask_hidden, terminal.say)


def _ask_hidden(question: str) -> str:
    answer: str = typer.prompt(question, default="", hide_input=True, show_default=False, err=True)
    return answer


def _print_new_client_key(deployed: "Stack", tenant: str, name: str | None) -> str:
    client_key, key_id = deployed.create_client_key(tenant, name)
    terminal.say(f'client key {key_id} for tenant "{tenant}"; it is shown this once:')
    print(f"export SLUICE_URL={deployed.api_url}")
    print(f"export SLUICE_KEY={client_key}")
    return client_key


def _have_governed(deployed: "Stack") -> None:
    """Says what the account's Lambda limit means, and has it kept before anybody can submit. What fails is said."""
    try:
        for line in deployed.about_executions():
            terminal.say(line)
        deployed.wake_governor()
    except CommandFailed as failed:
        terminal.say(f"{failed}; the governor runs within a minute by itself")


def _try_out(url: str, client_key: str) -> None:
    """Proves address and key with one call; what goes wrong is said and fails nothing."""
    from scripts.client import Gateway

    try:
        with Gateway(url, client_key) as gateway:
            gateway.limits()
    except CommandFailed as failed:
        terminal.say(f"the gateway does not answer as it should yet: {failed}")
    else:
        terminal.say('the gateway answers; try: sluice submit --prompt "Hello" --wait')
