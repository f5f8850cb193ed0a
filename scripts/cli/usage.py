"""Usage, limits and the webhook secret of a tenant: `sluice usage`, `limits` and `webhook-secret`."""
# ruff: noqa: PLC0415 - a command imports its own dependencies, so that --help stays fast

from typing import Annotated

import typer

from scripts.cli import terminal
from scripts.cli.options import AsJson, Key, KeyFile, Url, gateway_at


def usage(  # noqa: PLR0913 - a command line has options
    *,
    from_day: Annotated[
        str | None, typer.Option("--from", help="First day (UTC), such as 2026-12-01.")
    ] = None,
    to_day: Annotated[
        str | None, typer.Option("--to", help="Last day (UTC), such as 2026-12-31.")
    ] = None,
    group_by: Annotated[
        str | None, typer.Option("--group-by", help="Comma-separated list of day, model, lane.")
    ] = None,
    as_json: AsJson = False,
    url: Url = None,
    key: Key = None,
    key_file: KeyFile = None,
) -> None:
    """Show calls, tokens and cost."""
    named = {"from": from_day, "to": to_day, "group_by": group_by and group_by.replace(" ", "")}
    with gateway_at(url, key, key_file) as gateway:
        used = gateway.usage({name: value for name, value in named.items() if value})
    if as_json:
        terminal.print_json(used)
        return
    from scripts.cli import tables

    tables.show(tables.usage_table(used))


def webhook_secret(*, url: Url = None, key: Key = None, key_file: KeyFile = None) -> None:
    """Print the signing secret of your webhooks, for use with a Standard Webhooks library."""
    with gateway_at(url, key, key_file) as gateway:
        terminal.put(gateway.webhook_secret())


def limits(
    *, as_json: AsJson = False, url: Url = None, key: Key = None, key_file: KeyFile = None
) -> None:
    """Show the limit groups: Claude's rate limits per minute, as learned from its responses."""
    with gateway_at(url, key, key_file) as gateway:
        groups = gateway.limits()
    if as_json:
        terminal.print_json({"data": groups})
        return
    from scripts.cli import tables

    if groups:
        tables.show(tables.limits_table(groups))
    else:
        terminal.say("no limit groups yet: Sluice learns them from the first jobs")
