"""The local stack as a whole: emulator, deployed template, keys, proofs, metrics bridge."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.cli import terminal
from scripts.local_stack import credentials, deploy, proofs
from scripts.local_stack.emf import Bridge
from scripts.local_stack.emulator import (
    REGION,
    Child,
    Client,
    Credentials,
    Emulator,
    StackError,
    check_packages,
    clean_environment,
)
from sluice.domain.shares import RESERVED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import FrameType

REPOSITORY = Path(__file__).resolve().parents[2]
DEFAULT_PORT = 4566
SIMULATOR_SECONDS = 20.0
FEWEST, MOST = 2, 1000
"""Worker invocations at a time, as SQS event source mappings allow them."""
FEWEST_OF_ACCOUNT = RESERVED + FEWEST
"""Executions that an account must allow, for one queue to be served."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A stack that has proved itself."""

    api_url: str
    client_key: str = field(repr=False)
    claude_url: str | None
    """None when only the key pool's own base_urls are used."""
    endpoint_url: str
    """The emulated AWS, for AWS_ENDPOINT_URL or `--endpoint-url`."""
    credentials: Credentials
    """The account's administrator; nobody else's credentials are accepted."""
    resources: Mapping[str, str] = field(repr=False)
    """Logical id -> physical id."""
    outputs: Mapping[str, str] = field(repr=False)
    client: Callable[[str], Client] = field(repr=False)
    """Returns a boto3 client of a service of the emulated AWS."""
    carry_metrics: Callable[[], int] = field(repr=False)
    """Brings metrics logged until now into CloudWatch at once (it happens every 2 s anyway)."""
    ended: Callable[[], str | None] = field(repr=False)
    """Return why the stack has stopped, None while it runs."""


@dataclass(frozen=True, slots=True)
class LocalStack:
    """What to start; `running` starts it.

    With neither `claude_url` nor `key_pool`, the bundled simulator replaces Claude.
    """

    port: int = 0
    """0: any free port."""
    claude_url: str | None = None
    key_pool: Path | Mapping[str, Any] | None = field(default=None, repr=False)
    client_key: str | None = field(default=None, repr=False)
    tenant: str = "local"
    concurrency: int | None = None
    """Worker invocations at a time; None: the template's default."""
    bulk_concurrency: int | None = None
    """The same for ranges of batches."""
    account_concurrency: int | None = None
    """Executions that the emulated account may run at once; None: AWS's usual 1,000."""
    bucket_url: str | None = None
    """Where the functions find S3, when that is to be another address than the rest of the emulated AWS."""
    template: Path = REPOSITORY / "template.yaml"
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of every function beside those of the template, such as SLUICE_WAITS."""
    dynamodb_faults: Path | None = None
    """For chaos runs: a file that says how many of DynamoDB's calls fail (emulator_runner.py)."""
    say: Callable[[str], None] = field(default=lambda _line: None, repr=False)
    """Gets each line of progress."""

    @contextmanager
    def running(self) -> Iterator[Ready]:
        """Start it, prove it, hand it over, and leave no process behind. Raises `StackError`."""
        client_key = self._checked()
        with ExitStack() as cleanup:
            emulator = Emulator(
                self.port,
                dynamodb_faults=self.dynamodb_faults,
                bucket_url=self.bucket_url,
                account_concurrency=self.account_concurrency,
            )
            cleanup.callback(emulator.stop)
            children = [emulator.child]
            simulator = None
            if self.claude_url is None and self.key_pool is None:
                simulator = Simulator()
                cleanup.callback(simulator.stop)
                children.append(simulator.child)

            # Read while the children start; importing the transform takes as long as they do.
            template = deploy.prepared(
                deploy.read_template(self.template),
                concurrency=self.concurrency,
                bulk_concurrency=self.bulk_concurrency,
                public_url=deploy.api_url(emulator.endpoint_url),
                environment=self.environment,
            )
            if self.account_concurrency is None:
                deploy.start_at_ceilings(template)
            emulator.wait_until_it_answers()
            deployed = deploy.deploy(emulator, template, self.template.parent)
            self.say(f"deployed {len(deployed.resources)} resources on {emulator.endpoint_url}")

            claude_url = simulator.url() if simulator else self.claude_url
            pool = credentials.read_key_pool(self.key_pool, claude_url)
            self.say(_about_upstream(pool, simulated=simulator is not None))
            if self.account_concurrency is not None:
                _wake_governor(emulator, deployed)
            _install_keys(emulator, deployed, pool, client_key, self.tenant)

            api = deployed.resources[_api(deployed)]
            api_url = f"{emulator.endpoint_url}/_aws/execute-api/{api}"
            _prove(emulator, deployed, api_url)

            bridge = Bridge(emulator.client, _log_groups(emulator, deployed))
            bridge.start()
            cleanup.callback(bridge.stop)
            yield Ready(
                api_url=api_url,
                client_key=client_key,
                claude_url=claude_url,
                endpoint_url=emulator.endpoint_url,
                credentials=emulator.credentials,
                resources=deployed.resources,
                outputs=deployed.outputs,
                client=emulator.client,
                carry_metrics=bridge.carry,
                ended=lambda: _ended(children),
            )

    def _checked(self) -> str:
        """Find what is wrong before anything starts; return the client key to use."""
        check_packages()
        if self.concurrency is not None and not FEWEST <= self.concurrency <= MOST:
            raise StackError(
                f"concurrency {self.concurrency} is out of range: "
                f"SQS event source mappings allow {FEWEST} to {MOST}"
            )
        if self.account_concurrency is not None and self.account_concurrency < FEWEST_OF_ACCOUNT:
            raise StackError(
                f"account concurrency {self.account_concurrency} is below {FEWEST_OF_ACCOUNT}: "
                f"{RESERVED} for the API, the governor, upstream batches and the stream, {FEWEST} for one queue"
            )
        if self.claude_url is not None and not self.claude_url.startswith(("http://", "https://")):
            raise StackError(
                f"{self.claude_url} is not a URL; it must start with http:// or https://"
            )
        if self.key_pool is not None:
            credentials.read_key_pool(self.key_pool, self.claude_url)
        client_key = self.client_key or credentials.new_client_key()
        credentials.check_client_key(client_key)
        return client_key


class Simulator:
    """The bundled Claude simulator in a child process."""

    def __init__(self) -> None:
        """Start it on a free port."""
        self.child = Child(
            "scripts.claude_simulator",
            "--port",
            "0",
            "--rpm",
            "600",
            environment=clean_environment() | {"CLAUDE_SIMULATOR_KEYS": credentials.TEST_KEY},
            stdout=subprocess.PIPE,
        )

    def url(self) -> str:
        """Return its address when it is ready, or raise `StackError`."""
        # A thread, because reading a pipe cannot be given up after a time. It goes on reading, so
        # that the simulator never waits for a reader.
        lines: queue.Queue[bytes] = queue.Queue()
        threading.Thread(target=self._read_into, args=(lines,), daemon=True).start()
        try:
            return str(json.loads(lines.get(timeout=SIMULATOR_SECONDS))["url"])
        except (queue.Empty, ValueError, KeyError, TypeError) as error:
            raise StackError(
                f"the Claude simulator did not start: {self.child.last_words() or 'no ready line'}"
            ) from error

    def _read_into(self, lines: queue.Queue[bytes]) -> None:
        if self.child.process.stdout is not None:
            for line in self.child.process.stdout:
                lines.put(line)
        lines.put(b"")

    def stop(self) -> None:
        """End it."""
        self.child.kill()


def _about_upstream(pool: credentials.KeyPool, *, simulated: bool) -> str:
    urls = sorted({key.get("base_url") or "the Claude API (billed)" for key in pool["keys"]})
    return f"upstream: {', '.join(urls)}{', the bundled simulator' if simulated else ''}"


def _install_keys(
    emulator: Emulator,
    deployed: deploy.Deployed,
    pool: credentials.KeyPool,
    client_key: str,
    tenant: str,
) -> None:
    credentials.install_key_pool(emulator, deployed.resources["KeyPoolSecret"], pool)
    credentials.install_client_key(
        emulator,
        table=deployed.resources["ClientKeysTable"],
        pepper_secret=deployed.resources["ClientKeyPepper"],
        key=client_key,
        tenant=tenant,
    )


def _wake_governor(emulator: Emulator, deployed: deploy.Deployed) -> None:
    """Do as `sluice setup` does before there is a client key."""
    emulator.client("lambda").invoke(
        FunctionName=deployed.resources["GovernorFunction"], Payload=b"{}"
    )


def _prove(emulator: Emulator, deployed: deploy.Deployed, api_url: str) -> None:
    canary = proofs.send_canary(
        emulator, deployed
    )  # first: the worker starts while the rest is proved
    proofs.time_to_live_is_on(emulator, deployed)
    proofs.concurrency_is_a_number(emulator, deployed)
    proofs.health_answers(emulator, deployed, api_url)
    proofs.wrong_key_is_refused(emulator, deployed, api_url)
    proofs.canary_arrives(emulator, deployed, canary)


def _api(deployed: deploy.Deployed) -> str:
    found: list[str] = [
        logical_id
        for logical_id, resource in deployed.template["Resources"].items()
        if resource["Type"] == "AWS::ApiGatewayV2::Api"
    ]
    if len(found) != 1:
        raise StackError(f"the template has {len(found)} HTTP APIs, expected 1")
    return found[0]


def _log_groups(emulator: Emulator, deployed: deploy.Deployed) -> list[str]:
    functions = [
        deployed.resources[logical_id]
        for logical_id, resource in deployed.template["Resources"].items()
        if resource["Type"] == "AWS::Lambda::Function"
    ]
    configurations = [
        emulator.client("lambda").get_function_configuration(FunctionName=function)
        for function in functions
    ]
    return sorted(
        {
            configuration.get("LoggingConfig", {}).get("LogGroup")
            or f"/aws/lambda/{configuration['FunctionName']}"
            for configuration in configurations
        }
    )


def _ended(children: list[Child]) -> str | None:
    for child in children:
        if child.process.poll() is not None:
            return f"{child.name} ended unexpectedly: {child.last_words()}"
    return None


# ---------------------------------------------------------------- command line


class _Stopped(BaseException):
    """Somebody asked us to stop."""


def up(  # noqa: PLR0913 - the options of a command
    *,
    port: int = DEFAULT_PORT,
    claude_url: str | None = None,
    key_pool: Path | None = None,
    client_key: str | None = None,
    concurrency: int | None = None,
    account_concurrency: int | None = None,
) -> int:
    """Run the local stack until SIGTERM or Ctrl-C; return the exit code.

    Prints one JSON line on stdout when everything is proved, everything else on stderr.
    """
    return serve(
        LocalStack(
            port=port,
            claude_url=claude_url,
            key_pool=key_pool,
            client_key=client_key,
            concurrency=concurrency,
            account_concurrency=account_concurrency,
            say=terminal.say,
        )
    )


def emulator_alone(port: int) -> int:
    """Run the emulator without Sluice, as `up` does; print the environment that the AWS CLI and SAM need for it."""

    def run() -> str:
        emulator = Emulator(port)
        try:
            emulator.wait_until_it_answers()
            variables = emulator.credentials.as_environment() | {
                "AWS_ENDPOINT_URL": emulator.endpoint_url,
                "AWS_DEFAULT_REGION": REGION,
            }
            lines = [f"export {name}={value}" for name, value in variables.items()]
            print("\n".join(lines), flush=True)
            return _reason(lambda: _ended([emulator.child]))
        finally:
            emulator.stop()

    return _until_stopped(run)


def serve(stack: LocalStack) -> int:
    """Run `stack` as `up` does."""
    began = time.monotonic()

    def run() -> str:
        with stack.running() as ready:
            terminal.say(f"ready after {time.monotonic() - began:.1f} s; press Ctrl-C to stop")
            line = {
                "ready": True,
                "api_url": ready.api_url,
                "client_key": ready.client_key,
                "claude_url": ready.claude_url,
                "endpoint_url": ready.endpoint_url,
                # What the AWS CLI and `--endpoint-url` need; made for this run, and worthless after it.
                "environment": ready.credentials.as_environment(),
            }
            print(json.dumps(line), flush=True)
            return _reason(ready.ended)

    return _until_stopped(run)


def _reason(ended: Callable[[], str | None]) -> str:
    """Wait until something has ended; return why."""
    while (reason := ended()) is None:
        time.sleep(0.5)
    return reason


def _until_stopped(run: Callable[[], str]) -> int:
    """Run what returns only the reason why it failed, until somebody asks us to stop; return the exit code."""
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, _stop) for number in signals}
    try:
        terminal.say(f"error: {run()}")
    except StackError as error:
        terminal.say(f"error: {error}")
    except _Stopped:
        return 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 1


def _stop(number: int, frame: FrameType | None) -> None:
    del frame
    for other in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the clean-up
    raise _Stopped(number)
