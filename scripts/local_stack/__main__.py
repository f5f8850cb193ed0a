"""`python -m scripts.local_stack`: the same as `sluice local up`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from scripts.local_stack import DEFAULT_PORT, up

parser = argparse.ArgumentParser(prog="python -m scripts.local_stack", description=__doc__)
parser.add_argument(
    "--port", type=int, default=DEFAULT_PORT, help="port of the API; 0 for any free one"
)
parser.add_argument("--claude-url", help="Claude's address for keys without a base_url")
parser.add_argument("--key-pool", type=Path, help="JSON file with the upstream keys")
parser.add_argument("--client-key", help="the client key to let in; default: a random one")
parser.add_argument("--concurrency", type=int, help="worker invocations at a time, 2 to 1000")
parser.add_argument(
    "--account-concurrency", type=int, help="executions that the account may run at once, from 5"
)
sys.exit(up(**vars(parser.parse_args())))
