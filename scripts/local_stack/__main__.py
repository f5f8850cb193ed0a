"""`python -m scripts.local_stack`: the same as `sluice local up`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from scripts.cli_errors import CommandFailed
from scripts.cli_options import secret_of
from scripts.local_stack import DEFAULT_PORT, emulator_alone, up

parser = argparse.ArgumentParser(prog="python -m scripts.local_stack", description=__doc__)
parser.add_argument(
    "--port", type=int, default=DEFAULT_PORT, help="port of the API; 0 for any free one"
)
parser.add_argument("--claude-url", help="Claude's address for keys without a base_url")
parser.add_argument("--key-pool", type=Path, help="JSON file with the upstream keys")
secret = parser.add_mutually_exclusive_group()
secret.add_argument(
    "--client-key", help="the client key to let in; default: SLUICE_CLIENT_KEY, or a random one"
)
secret.add_argument(
    "--client-key-file", type=Path, help="file with that key on one line; - is standard input"
)
parser.add_argument("--concurrency", type=int, help="worker invocations at a time, 2 to 1000")
parser.add_argument(
    "--emulator-alone",
    action="store_true",
    help="the AWS emulator without Sluice; prints the environment variables it needs of its callers",
)
options = vars(parser.parse_args())
is_emulator_alone = options.pop("emulator_alone")
try:
    options["client_key"] = secret_of(
        "client-key", options["client_key"], options.pop("client_key_file")
    )
except CommandFailed as failed:
    sys.exit(f"error: {failed}")
if is_emulator_alone:
    sys.exit(emulator_alone(options["port"]))
sys.exit(up(**options))
