"""`sam build` makes what Lambda runs; `sam deploy` makes a stack that answers (on the emulator)."""

import json
import os
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.local_stack.emulator import Emulator

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / ".venv-sam" / "bin"
LAMBDA = ROOT / ".aws-sam" / "build"
LAYER = LAMBDA / "SluiceLayer" / "python"
FUNCTIONS = {"ApiFunction", "DeadLettersFunction", "GovernorFunction", "WorkerFunction"}

AARCH64 = 183  # e_machine of the ELF header
ANSWER_SECONDS = 60  # generous: a cold start on a busy machine

NOWHERE = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}


def environment(**more: str) -> dict[str, str]:
    """The caller's environment without his AWS account and without the make that runs us."""
    mine = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("AWS_", "SLUICE_", "MAKE", "MFLAGS"))
    }
    tools = {"SAM_CLI_TELEMETRY": "0", "PYTHON": str(TOOLS / "python")}
    return mine | NOWHERE | tools | more


def sam(*arguments: str, **more: str) -> str:
    """Runs the SAM CLI in the repository and returns what it printed; it must succeed."""
    assert (TOOLS / "sam").exists(), "no SAM CLI here; `make acceptance` installs it"
    done = subprocess.run(
        [TOOLS / "sam", *arguments],
        cwd=ROOT,
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def built() -> None:
    """What `make build` makes."""
    sam("build")


def get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=ANSWER_SECONDS) as answer:  # noqa: S310  # loopback
        return json.load(answer)


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    """An AWS emulator that enforces permissions, without what our launcher repairs in a template."""
    started = Emulator()
    try:
        started.wait_until_it_answers()
        yield started
    finally:
        started.stop()


@pytest.fixture(scope="module")
def outputs(emulator: Emulator) -> dict[str, str]:
    """The outputs of a stack deployed by the SAM CLI alone, as samconfig.toml's [local] says."""
    sam("build", "--config-env", "local", SLUICE_BUILD_PLATFORM="local")
    credentials = emulator.credentials.as_environment()
    sam("deploy", "--config-env", "local", AWS_ENDPOINT_URL=emulator.endpoint_url, **credentials)
    found = emulator.client("cloudformation").describe_stacks(StackName="sluice-local")
    return {each["OutputKey"]: each["OutputValue"] for each in found["Stacks"][0]["Outputs"]}


def test_the_template_is_valid() -> None:
    assert "is a valid SAM Template" in sam("validate", "--lint")


@pytest.mark.usefixtures("built")
def test_a_function_is_its_handler_and_nothing_else() -> None:
    """Not a byte of development: the rest is in the layer."""
    contents = {
        name: [str(path.relative_to(LAMBDA / name)) for path in (LAMBDA / name).rglob("*")]
        for name in FUNCTIONS
    }

    assert {name: ["app.py"] for name in FUNCTIONS} == contents


@pytest.mark.usefixtures("built")
def test_the_layer_holds_the_locked_packages_and_ours() -> None:
    lock = (ROOT / "layers/sluice/requirements.txt").read_text()
    locked = set(re.findall(r"^([\w.-]+)==([\w.]+)", lock, re.MULTILINE))
    installed = {
        tuple(path.name.removesuffix(".dist-info").replace("_", "-").rsplit("-", 1))
        for path in LAYER.glob("*.dist-info")
    }

    assert locked == installed
    assert (LAYER / "sluice" / "__init__.py").exists()


@pytest.mark.usefixtures("built")
def test_the_layer_is_for_lambda_whatever_machine_built_it() -> None:
    machines = {
        path.name: int.from_bytes(path.read_bytes()[18:20], "little")
        for path in LAYER.rglob("*.so*")
    }

    assert any(name.startswith("_pydantic_core.cpython-313-") for name in machines)
    assert {AARCH64} == set(machines.values())
    assert all(path.match("*.cpython-313.pyc") for path in LAYER.rglob("*.pyc"))
    assert not list(LAYER.rglob("tests"))


@pytest.mark.usefixtures("built")
def test_the_layer_leaves_room() -> None:
    """Lambda refuses more than 250 MB, functions and layers together."""
    megabytes = sum(path.stat().st_size for path in LAYER.rglob("*") if path.is_file()) / 1e6

    assert megabytes < 125


def test_a_deployed_stack_is_healthy(emulator: Emulator, outputs: dict[str, str]) -> None:
    api_id = outputs["ApiUrl"].removeprefix("https://").partition(".")[0]

    health = get(f"{emulator.endpoint_url}/_aws/execute-api/{api_id}/$default/health")

    assert "ok" == health["status"]


def test_a_deployed_queue_reaches_the_worker(emulator: Emulator, outputs: dict[str, str]) -> None:
    """The worker notes a canary in the limits table: proof of queue, mapping and layer."""
    limits = emulator.client("dynamodb")
    canary = {"id": {"S": "canary#acceptance"}}
    emulator.client("sqs").send_message(
        QueueUrl=outputs["JobsQueueUrl"], MessageBody='{"v": 1, "canary": "acceptance"}'
    )

    deadline = time.monotonic() + ANSWER_SECONDS
    noted = False
    while not noted and time.monotonic() < deadline:
        noted = "Item" in limits.get_item(TableName=outputs["LimitsTableName"], Key=canary)
        time.sleep(0.1)

    assert noted


def test_the_next_step_is_a_command_of_ours(outputs: dict[str, str]) -> None:
    assert "sluice setup --stack sluice-local" == outputs["NextStep"]
