"""`python -m scripts.local_stack`: the same as `sluice local up`, or the emulator alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from scripts.cli_errors import CommandFailed
from scripts.cli_options import secret_of
from scripts.local_stack import DEFAULT_PORT, emulator_alone, up


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(prog="python -m scripts.local_stack", description=__doc__)
    made.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help="port of the API; 0 for any free one"
    )
    made.add_argument("--claude-url", help="Claude's address for keys without a base_url")
    made.add_argument("--key-pool", type=Path, help="JSON file with the upstream keys")
    secret = made.add_mutually_exclusive_group()
    secret.add_argument(
        "--client-key", help="the client key to let in; default: SLUICE_CLIENT_KEY, or a random one"
    )
    secret.add_argument(
        "--client-key-file", type=Path, help="file with that key on one line; - is standard input"
    )
    made.add_argument("--concurrency", type=int, help="worker invocations at a time, 2 to 1000")
    made.add_argument(
        "--account-concurrency",
        type=int,
        help="executions that the account may run at once, from 5",
    )
    made.add_argument(
        "--emulator-alone",
        action="store_true",
        help="the AWS emulator without Sluice; prints the environment variables its callers need",
    )
    return made


def main() -> int:
    """Run what the command line asks for; return the exit code."""
    options = vars(parser().parse_args())
    if options.pop("emulator_alone"):
        return emulator_alone(options["port"])
    try:
        options["client_key"] = secret_of(
            "client-key", options["client_key"], options.pop("client_key_file")
        )
    except CommandFailed as failed:
        sys.exit(f"error: {failed}")
    return up(**options)


if __name__ == "__main__":
    sys.exit(main())
