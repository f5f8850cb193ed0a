"""A deployed stack: `sluice setup` and `sluice keys`. They call AWS."""
# ruff: noqa: PLC0415 - boto3 takes half a second to import; only these commands need it

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scripts.cli import files, terminal
from scripts.cli.errors import CommandFailed
from scripts.cli.options import EndpointUrl, Region, StackName

if TYPE_CHECKING:
    from scripts.cli.deployed import KeyPool, Stack

keys_app = typer.Typer(
    no_args_is_help=True, help="Client keys of a deployed stack. Uses your AWS credentials."
)


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
    from scripts.cli.deployed import Stack, check_tenant

    check_tenant(tenant)
    deployed = Stack(stack, region, endpoint_url)
    pool = _key_pool_for(deployed, key_pool)
    if pool is not None:
        deployed.write_key_pool(pool)
        keys = terminal.counted(len(pool["keys"]), "upstream key")
        terminal.say(f"stored {keys} in the key pool of {stack}")
    _apply_lambda_limit(deployed)
    client_key = _print_new_client_key(deployed, tenant, None)
    if endpoint_url is None:
        _check_gateway(deployed.api_url, client_key)
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
    from scripts.cli.deployed import Stack

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
    from scripts.cli.deployed import Stack

    keys = Stack(stack, region, endpoint_url).list_client_keys()
    if as_json:
        terminal.print_json({"data": keys})
    elif keys:
        from scripts.cli import tables

        tables.show(tables.keys_table(keys))
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
    from scripts.cli.deployed import Stack

    deployed = Stack(stack, region, endpoint_url)
    for key_id in key_ids:
        deployed.revoke_client_key(key_id)
        terminal.put(f"{key_id} revoked")


def _key_pool_for(deployed: "Stack", file: Path | None) -> "KeyPool | None":
    """Return the upstream keys to store, or None to keep the stored ones."""
    from scripts.cli.deployed import ask_for_key_pool, read_key_pool

    if file is not None:
        with files.lines_of(file) as lines:
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
        if not terminal.confirm(question):
            return None
    terminal.say("Keys of one organization share its rate limits: a second key adds no throughput.")
    return ask_for_key_pool(terminal.ask_hidden, terminal.say)


def _print_new_client_key(deployed: "Stack", tenant: str, name: str | None) -> str:
    client_key, key_id = deployed.create_client_key(tenant, name)
    terminal.say(f'client key {key_id} for tenant "{tenant}"; it is shown only once:')
    terminal.put(f"export SLUICE_URL={shlex.quote(deployed.api_url)}")
    terminal.put(f"export SLUICE_KEY={shlex.quote(client_key)}")
    return client_key


def _apply_lambda_limit(deployed: "Stack") -> None:
    """Report the account's Lambda limit and apply it before the first submit. A failure is only reported."""
    try:
        for line in deployed.lambda_limit_report():
            terminal.say(line)
        deployed.wake_governor()
    except CommandFailed as failed:
        terminal.say(f"{failed}; the governor's next scheduled run is within a minute")


def _check_gateway(url: str, client_key: str) -> None:
    """Check the URL and the key with one call. A failure is only reported."""
    from scripts.cli.client import Gateway

    try:
        with Gateway(url, client_key) as gateway:
            gateway.limits()
    except CommandFailed as failed:
        terminal.say(f"the gateway is not ready yet: {failed}")
    else:
        terminal.say('the gateway is ready; try: sluice submit --prompt "Hello" --wait')
