"""One emulated AWS region in a child process of its own, and clients for it.

What the rest of the local stack knows of the emulator is this file's interface: an endpoint URL,
clients, stop.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from scripts.local_stack.emulator_runner import FAULTS_VARIABLE, MINISTACK_VERSION
from scripts.local_stack.recording.recorder import EVERY_CALL_VARIABLE, FOLDER_VARIABLE

if TYPE_CHECKING:
    from botocore.config import Config

HOST = "127.0.0.1"
REGION = "us-east-1"
START_SECONDS = 30.0
"""How long the emulator may take to answer; it usually takes 0.3 s to 1 s."""

LONGEST_FUNCTION_SECONDS = 900
"""Lambda's maximum (AWS Lambda quotas, function timeout)."""

KEPT_VARIABLES = ("PATH", "HOME", "USER", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH")
"""All else stays outside: proxies, real AWS and Anthropic credentials, emulator settings."""

_LEASH = Path(__file__).with_name("leash.py")
_RUNNER = Path(__file__).with_name("emulator_runner.py")
_RECORDING = Path(__file__).with_name("recording")
_LOCAL_HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))


Client = Any
"""A boto3 client: its methods are made at run time."""
Json = Any
"""Something decoded from JSON, or to be encoded."""


class StackError(Exception):
    """The local stack cannot run; the message is the one line to show."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """The only credentials that may administer one run's emulated account."""

    access_key_id: str
    secret_access_key: str = field(repr=False)

    @classmethod
    def new(cls) -> Credentials:
        """Return random ones. They do not look like a real account's: AWS's begin with AKIA or ASIA."""
        return cls(f"LOCAL{secrets.token_hex(8).upper()}", secrets.token_urlsafe(30))

    def as_environment(self) -> dict[str, str]:
        """Return what AWS's tools and SDKs read."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
        }


class Child:
    """A module or file of ours in a process group that dies with us, however we die."""

    def __init__(
        self,
        target: str,
        *arguments: str,
        environment: dict[str, str],
        stdout: int | IO[bytes] = subprocess.DEVNULL,
    ) -> None:
        self.name = Path(target).stem
        self.scratch = Path(tempfile.mkdtemp(prefix="sluice-local-"))
        self.log = self.scratch / "log.txt"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(_LEASH), str(self.scratch), target, *arguments],
                env=environment | {"TMPDIR": str(self.scratch)},
                stdin=subprocess.PIPE,
                stdout=log if stdout == subprocess.DEVNULL else stdout,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        """End the whole process group at once; nothing in it holds anything worth saving."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def last_words(self, lines: int = 1) -> str:
        """Return the last lines it logged, joined by ` | `."""
        with suppress(OSError):
            text = self.log.read_text(errors="replace").splitlines()
            return " | ".join([line.strip() for line in text if line.strip()][-lines:])
        return ""


class Emulator:
    """A running ministack on 127.0.0.1."""

    def __init__(
        self,
        port: int = 0,
        *,
        dynamodb_faults: Path | None = None,
        bucket_url: str | None = None,
        account_concurrency: int | None = None,
    ) -> None:
        """Start it on `port` (0: any free port); it answers a little later.

        `bucket_url`: where the functions find S3, when that is to be another address than the rest of AWS.
        `account_concurrency`: executions that the account may run at once; None: AWS's usual 1,000.
        """
        check_packages()
        self.port = free_port(port)
        self.endpoint_url = f"http://{HOST}:{self.port}"
        self.credentials = Credentials.new()
        self._clients: dict[str, Client] = {}
        self._session: Client = None
        environment = _environment(self.port, self.credentials)
        if dynamodb_faults is not None:
            environment[FAULTS_VARIABLE] = str(dynamodb_faults)
        if account_concurrency is not None:
            environment["LAMBDA_ACCOUNT_CONCURRENCY"] = str(account_concurrency)
        if bucket_url is not None:
            environment["AWS_ENDPOINT_URL_S3"] = bucket_url
        recording = {FOLDER_VARIABLE, EVERY_CALL_VARIABLE} & os.environ.keys()
        if recording:
            environment |= {name: os.environ[name] for name in recording}
            environment["PYTHONPATH"] = str(_RECORDING)
        self.child = Child(str(_RUNNER), environment=environment)

    def wait_until_it_answers(self) -> None:
        """Return when the port answers, if only to refuse us; raise `StackError` when it does not."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            if self.child.process.poll() is not None:
                raise StackError(f"the emulator exited at startup: {self.child.last_words()}")
            with suppress(OSError):
                call("GET", self.endpoint_url)
                return
            if time.monotonic() > deadline:
                raise StackError(
                    f"no response from the emulator on {self.endpoint_url} "
                    f"after {START_SECONDS:.0f} s"
                )
            time.sleep(0.02)

    def client(self, service: str) -> Client:
        """Return the (cached) boto3 client of a service, whatever the user's AWS settings are."""
        if service not in self._clients:
            self._clients[service] = self._boto3_session().client(
                service, endpoint_url=self.endpoint_url, config=_client_config(service)
            )
        return self._clients[service]

    def stop(self) -> None:
        """End the emulator and its Lambda workers."""
        for client in self._clients.values():
            client.close()
        self.child.kill()

    def _boto3_session(self) -> Client:
        if self._session is None:
            import boto3  # noqa: PLC0415 - see check_packages
            import botocore.session  # noqa: PLC0415

            # Each: name in the config file, environment variable, default, conversion. The user's
            # own profile and files are not read.
            core = botocore.session.Session(
                session_vars={
                    "profile": (None, None, None, None),
                    "config_file": (None, None, os.devnull, None),
                    "credentials_file": (None, None, os.devnull, None),
                }
            )
            core.set_credentials(self.credentials.access_key_id, self.credentials.secret_access_key)
            self._session = boto3.Session(botocore_session=core, region_name=REGION)
        return self._session


def _client_config(service: str) -> Config:
    from botocore.config import Config  # noqa: PLC0415 - see check_packages

    return Config(
        proxies={},
        retries={"mode": "standard", "total_max_attempts": 2},
        # An invocation is answered when it ends; giving up earlier would also invoke it a second time.
        read_timeout=LONGEST_FUNCTION_SECONDS + 30 if service == "lambda" else 30,
        max_pool_connections=32,
        s3={"addressing_style": "path"},
    )


def check_packages() -> None:
    """Raise `StackError` when this interpreter lacks what the local stack needs.

    Third-party modules are imported where they are used, after this: a missing one gives one clear
    line, and the emulator starts while they load.
    """
    if not Path(sys.executable or "/nowhere").exists():
        raise StackError(
            f"the Python interpreter {sys.executable!r} no longer exists; run `make setup`"
        )
    missing = []
    for name in ("ministack", "aws-sam-translator", "boto3", "anthropic", "aws-lambda-powertools"):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise StackError(f"{sys.executable} lacks {', '.join(missing)}; run `make setup`")
    if (found := metadata.version("ministack")) != MINISTACK_VERSION:
        raise StackError(
            f"ministack {found} is installed, but Sluice requires {MINISTACK_VERSION}; "
            "run `make setup`"
        )


def free_port(port: int) -> int:
    """Return `port`, or any free port for 0; raise `StackError` when it is in use."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise StackError(
                f"port {port} on {HOST} cannot be used ({error}); "
                "use --port to choose another, or 0 for any free port"
            ) from error
        return int(probe.getsockname()[1])


def clean_environment() -> dict[str, str]:
    """Return what a child process may know of our environment."""
    return {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}


def _environment(port: int, credentials: Credentials) -> dict[str, str]:
    return (
        clean_environment()
        | credentials.as_environment()
        | {
            "BIND_HOST": HOST,
            "MINISTACK_HOST": HOST,
            "GATEWAY_PORT": str(port),
            "MINISTACK_REGION": REGION,
            "LOG_LEVEL": "WARNING",
            # Policies are evaluated, and each function has the credentials of its own role.
            "AUTH": "true",
            # Lambda workers inherit these; the emulator adds AWS_ENDPOINT_URL.
            "AWS_DEFAULT_REGION": REGION,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            # AWS's default; the emulator's own shrinks with this machine's memory, and throttles.
            "LAMBDA_ACCOUNT_CONCURRENCY": "1000",
            "LAMBDA_EXECUTOR": "local",
            # Without these it listens on two more ports and removes containers of a local Docker.
            "SFTP_ENABLED": "0",
            "IOT_MTLS_ENABLED": "0",
            "DOCKER_HOST": "unix:///nowhere",
        }
    )


def call(
    method: str,
    url: str,
    body: Json = None,
    headers: dict[str, str] | None = None,
    timeout_seconds: float = 30.0,
) -> tuple[int, Json]:
    """Send one JSON request past every proxy; return status and answer (None when not JSON)."""
    request = urllib.request.Request(  # noqa: S310 - our own loopback addresses
        url,
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"content-type": "application/json"} | (headers or {}),
    )
    try:
        with _LOCAL_HTTP.open(request, timeout=timeout_seconds) as response:
            return response.status, _decoded(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, _decoded(error.read())


def _decoded(content: bytes) -> Json:
    try:
        return json.loads(content)
    except ValueError:
        return None
