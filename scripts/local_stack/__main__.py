"""`python -m scripts.local_stack`: the same as `sluice local up`, or the emulator alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from scripts.cli.errors import CommandFailed
from scripts.cli.options import secret_of
from scripts.local_stack import DEFAULT_PORT, emulator_alone, up


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    made = argparse.ArgumentParser(prog="python -m scripts.local_stack", description=__doc__)
    made.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help="port to listen on; 0 selects a free port"
    )
    made.add_argument("--claude-url", help="base URL of Claude for keys without a base_url")
    made.add_argument("--key-pool", type=Path, help="JSON file with the upstream keys")
    secret = made.add_mutually_exclusive_group()
    secret.add_argument(
        "--client-key",
        help="client key to accept; default: SLUICE_CLIENT_KEY, or a random key",
    )
    secret.add_argument(
        "--client-key-file",
        type=Path,
        help="file with the client key on one line; - for standard input",
    )
    made.add_argument(
        "--concurrency", type=int, help="maximum concurrent worker invocations, 2 to 1000"
    )
    made.add_argument(
        "--account-concurrency",
        type=int,
        help="Lambda concurrency limit of the account, at least 5",
    )
    made.add_argument(
        "--emulator-alone",
        action="store_true",
        help="run only the AWS emulator; prints the environment variables that its clients need",
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
