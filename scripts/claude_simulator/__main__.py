"""Start the simulator: `python -m scripts.claude_simulator`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from scripts.claude_simulator import server, settings
from scripts.claude_simulator.engine import Engine

KEYS_VARIABLE = "CLAUDE_SIMULATOR_KEYS"
ADMIN_KEYS_VARIABLE = "CLAUDE_SIMULATOR_ADMIN_KEYS"
"""Where keys come from when they are not to show in the list of processes."""

# flag, the setting of the single organization, its type, help text
ORGANIZATION_FLAGS = (
    (
        "--burst-seconds",
        "burst_seconds",
        float,
        "capacity of every bucket, in seconds of refill (60)",
    ),
    (
        "--request-burst-seconds",
        "request_burst_seconds",
        float,
        "a second, stricter request bucket",
    ),
    (
        "--max-in-flight",
        "max_in_flight",
        int,
        "maximum concurrent calls; more get a 429 (no limit)",
    ),
    (
        "--retry-after",
        "retry_after",
        str,
        "retry-after of a 429: next_slot (default), full or none",
    ),
)
LIMIT_FLAGS = (
    ("--rpm", "rpm", "requests per minute and model group (1000)"),
    ("--itpm", "itpm", "input tokens per minute and model group (2000000)"),
    ("--otpm", "otpm", "output tokens per minute and model group (400000)"),
)
SERVICE_FLAGS = (
    ("--ttft", "ttft_seconds", "median seconds to the first token (0.8)"),
    ("--tokens-per-second", "tokens_per_second", "output speed, 0 for unlimited (80)"),
    ("--output-tokens", "output_tokens", "median output tokens per response (300)"),
)


def main(arguments: list[str] | None = None) -> int:
    """Serve until stopped; return the exit status."""
    flags = _parser().parse_args(arguments)
    try:
        chosen = settings.read(_data(flags))
        bound = server.bind(flags.port)
    except (settings.SettingsError, server.PortError) as error:
        return server.fail(str(error))
    _allow_many_connections()
    engine = Engine(chosen)
    url = server.url_of(bound)

    def listening() -> None:
        keys = [key for organisation in chosen.organisations for key in organisation.keys]
        ready = {"ready": True, "url": url, "pid": os.getpid(), "keys": keys}
        print(json.dumps(ready), flush=True)

    server.serve(engine, bound, listening)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.claude_simulator",
        description="Simulates Claude's API on 127.0.0.1, with rate limits, headers and faults.",
    )
    add = parser.add_argument
    add("--port", type=int, default=8089, help="port to listen on, 0 for a free one (8089)")
    add("--config", type=Path, help="JSON configuration file; the package docstring describes it")
    add("--seed", type=int, help="random seed (1)")
    add(
        "--keys",
        default=os.environ.get(KEYS_VARIABLE),
        help=f"comma-separated API keys of one organization ({KEYS_VARIABLE}, or sk-ant-test-one)",
    )
    add(
        "--admin-keys",
        default=os.environ.get(ADMIN_KEYS_VARIABLE),
        help="comma-separated admin keys of the organization, starting with sk-ant-admin "
        f"({ADMIN_KEYS_VARIABLE}, or none)",
    )
    for flag, _, text in LIMIT_FLAGS:
        add(flag, type=int, help=f"{text}; 0 for no limit")
    for flag, _, kind, text in ORGANIZATION_FLAGS:
        add(flag, type=kind, help=text)
    add(
        "--no-limit-headers",
        action="store_true",
        help="send no rate-limit headers, as some relays do",
    )
    add(
        "--reserve-max-tokens",
        action="store_true",
        help="charge OTPM by max_tokens instead of actual output (the former rule)",
    )
    for flag, _, text in SERVICE_FLAGS:
        add(flag, type=float, help=text)
    add(
        "--batch-seconds", type=float, help="duration of a batch (default: 100 requests per second)"
    )
    add(
        "--fast",
        action="store_true",
        help="respond without delay (--ttft 0 --tokens-per-second 0 --batch-seconds 0)",
    )
    add(
        "--fault",
        action="append",
        default=[],
        metavar="NAME=RATE",
        help="fault rate, such as 529=0.02; repeatable",
    )
    return parser


def _data(flags: argparse.Namespace) -> dict[str, Any]:
    """Return the configuration: the file, with the flags over it."""
    data = settings.read_file(flags.config) if flags.config is not None else {}
    organisation = _organization(flags)
    if organisation:
        if "organisations" in data:
            raise settings.SettingsError(
                f"{flags.config}: defines organizations; omit --keys and the rate-limit flags"
            )
        data["organisations"] = [organisation]
    if flags.seed is not None:
        data["seed"] = flags.seed
    service = _given(flags, [(name, setting) for name, setting, _ in SERVICE_FLAGS])
    if flags.fast:
        service = {"ttft_seconds": 0, "tokens_per_second": 0, **service}
        data["batches"] = {"seconds": 0, "cancel_seconds": 0, **data.get("batches", {})}
    if service.get("tokens_per_second") == 0:
        service["tokens_per_second"] = None
    if service:
        data["service"] = {**data.get("service", {}), **service}
    if flags.batch_seconds is not None:
        data["batches"] = {**data.get("batches", {}), "seconds": flags.batch_seconds}
    for fault in flags.fault:
        name, _, rate = fault.partition("=")
        try:
            data.setdefault("faults", {})[name] = float(rate)
        except ValueError as error:
            raise settings.SettingsError(f"--fault {fault}: not NAME=RATE") from error
    return data


def _organization(flags: argparse.Namespace) -> dict[str, Any]:
    organisation = _given(flags, [(name, setting) for name, setting, _, _ in ORGANIZATION_FLAGS])
    limits = _given(flags, [(name, setting) for name, setting, _ in LIMIT_FLAGS])
    if limits:
        limits = {name: limit or None for name, limit in limits.items()}
        organisation["limits"] = {"default": limits}
    if flags.keys is not None:
        organisation["keys"] = [key for key in flags.keys.split(",") if key]
    if flags.admin_keys is not None:
        organisation["admin_keys"] = [key for key in flags.admin_keys.split(",") if key]
    if flags.no_limit_headers:
        organisation["limit_headers"] = False
    if flags.reserve_max_tokens:
        organisation["reserve_max_tokens"] = True
    return organisation


def _given(flags: argparse.Namespace, names: list[tuple[str, str]]) -> dict[str, Any]:
    values = {setting: getattr(flags, flag[2:].replace("-", "_")) for flag, setting in names}
    return {setting: value for setting, value in values.items() if value is not None}


def _allow_many_connections() -> None:
    """Raise the number of open files to what the system allows."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    sys.exit(main())
