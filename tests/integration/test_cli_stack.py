"""`sluice setup`, `sluice keys` and `sluice dead-letters` against the emulated AWS."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from scripts.cli import app
from scripts.cli.deployed import (
    USUAL_CONCURRENCY,
    ask_for_key_pool,
    lambda_limit_report,
    read_key_pool,
)
from scripts.cli.errors import CommandFailed
from scripts.local_stack.emulator import REGION, Emulator
from sluice.adapters.dynamodb import DynamoJobs, DynamoParams
from sluice.adapters.s3 import DeadLetterObjects, Objects
from sluice.adapters.system import SystemClock
from sluice.domain import client_keys
from sluice.domain.jobs import DueFor, Job, JobError, State, finish_waiting
from sluice.ports.jobs import Params, Received
from tests.expanded_template import template
from tests.fakes import a_job

PEPPER = "pepper-of-sixty-four-characters"
TEMPLATE: dict[str, Any] = {
    "Resources": {
        "KeyPoolSecret": {
            "Type": "AWS::SecretsManager::Secret",
            "Properties": {"SecretString": '{"keys": []}'},
        },
        "ClientKeyPepper": {
            "Type": "AWS::SecretsManager::Secret",
            "Properties": {"SecretString": PEPPER},
        },
        "ClientKeysTable": {
            "Type": "AWS::DynamoDB::Table",
            "Properties": {
                "BillingMode": "PAY_PER_REQUEST",
                "AttributeDefinitions": [{"AttributeName": "key_id", "AttributeType": "S"}],
                "KeySchema": [{"AttributeName": "key_id", "KeyType": "HASH"}],
            },
        },
    },
    "Outputs": {
        "ApiUrl": {"Value": "http://127.0.0.1:9"},
        "KeyPoolSecretArn": {"Value": {"Ref": "KeyPoolSecret"}},
        "PepperSecretArn": {"Value": {"Ref": "ClientKeyPepper"}},
        "ClientKeysTableName": {"Value": {"Ref": "ClientKeysTable"}},
    },
}


# With what `sluice dead-letters` reads and writes, as the real template has it.
WITH_JOBS: dict[str, Any] = {
    "Parameters": {"RetentionDays": template()["Parameters"]["RetentionDays"]},
    "Resources": TEMPLATE["Resources"]
    | {name: template()["Resources"][name] for name in ("JobsTable", "ParamsTable", "LimitsTable")}
    | {"DataBucket": {"Type": "AWS::S3::Bucket"}},
    "Outputs": TEMPLATE["Outputs"]
    | {
        f"{name}Name": {"Value": {"Ref": name}}
        for name in ("JobsTable", "ParamsTable", "LimitsTable", "DataBucket")
    },
}


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    started = Emulator()
    try:
        started.wait_until_it_answers()
        yield started
    finally:
        started.stop()


@pytest.fixture(autouse=True)
def aws(emulator: Emulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name, value in emulator.credentials.as_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", emulator.endpoint_url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    yield
    emulator.client("cloudformation").delete_stack(StackName="prod")


@dataclass(frozen=True)
class Deployed:
    """The stack `prod` as AWS holds it."""

    emulator: Emulator
    outputs: dict[str, str]

    def key_pool(self) -> Any:
        secret = self.outputs["KeyPoolSecretArn"]
        value = self.emulator.client("secretsmanager").get_secret_value(SecretId=secret)
        return json.loads(value["SecretString"])

    def client_keys(self) -> list[Any]:
        table = self.outputs["ClientKeysTableName"]
        return list(self.emulator.client("dynamodb").scan(TableName=table)["Items"])


@pytest.fixture
def stack(emulator: Emulator) -> Deployed:
    return deploy(emulator, TEMPLATE)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run_command(*arguments: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app.main([str(each) for each in arguments])
        return Ended(int(ended.value.code or 0), *capsys.readouterr())

    return run_command


def deploy(emulator: Emulator, template: dict[str, Any]) -> Deployed:
    cloudformation = emulator.client("cloudformation")
    cloudformation.create_stack(StackName="prod", TemplateBody=json.dumps(template))
    cloudformation.get_waiter("stack_create_complete").wait(
        StackName="prod", WaiterConfig={"Delay": 1, "MaxAttempts": 20}
    )
    (created,) = cloudformation.describe_stacks(StackName="prod")["Stacks"]
    outputs = {each["OutputKey"]: each["OutputValue"] for each in created.get("Outputs", [])}
    return Deployed(emulator, outputs)


def pool_file(folder: Path, *ids: str) -> Path:
    keys = [{"id": each, "api_key": f"sk-ant-test-{each}"} for each in ids]
    path = folder / "pool.json"
    path.write_text(json.dumps({"keys": keys}), encoding="utf-8")
    return path


def exported(text: str) -> dict[str, str]:
    lines = text.splitlines()
    assert all(line.startswith("export ") for line in lines)
    return dict(line.removeprefix("export ").split("=", 1) for line in lines)


def test_setup_stores_the_key_pool_and_prints_a_client_key_that_is_kept_only_as_hashes(
    run: Run, stack: Deployed, tmp_path: Path
) -> None:
    pool = pool_file(tmp_path, "main", "second")

    ended = run("setup", "--stack", "prod", "--key-pool", pool, "--tenant", "team-red")

    variables = exported(ended.out)
    key = variables["SLUICE_KEY"]
    (row,) = stack.client_keys()
    assert 0 == ended.code
    assert "http://127.0.0.1:9" == variables["SLUICE_URL"]
    assert json.loads(pool.read_text()) == stack.key_pool()
    assert client_keys.key_id(PEPPER, key) == row["key_id"]["S"]
    assert client_keys.matches(PEPPER, key, row["hash"]["S"])
    assert "team-red" == row["tenant"]["S"]
    assert row["disabled"]["BOOL"] is False
    assert key not in json.dumps(row)
    assert key not in ended.err
    assert "sk-ant-test" not in ended.out + ended.err


@pytest.mark.usefixtures("stack")
def test_setup_says_when_the_gateway_does_not_answer_and_keeps_what_it_did(
    run: Run, tmp_path: Path
) -> None:
    ended = run("setup", "--stack", "prod", "--key-pool", pool_file(tmp_path, "main"))

    assert 0 == ended.code
    assert "the gateway is not ready yet: no response from" in ended.err


@pytest.mark.usefixtures("stack")
def test_setup_says_what_the_accounts_lambda_limit_means(run: Run, tmp_path: Path) -> None:
    ended = run("setup", "--stack", "prod", "--key-pool", pool_file(tmp_path, "main"))

    assert (
        "Lambda concurrency limit of this account and region: 1,000; "
        "enough for all queues of this stack (31)"
    ) in ended.err


@pytest.mark.parametrize(
    ("executions", "at_most", "said", "asks"),
    [
        (1_000, 0, "account and region: 1,000; enough for all", False),
        (31, 0, "enough for all queues of this stack (31)", False),
        (30, 0, "this stack can use 31, so its queues share 26", True),
        (16, 0, "so its queues share 12", True),
        (10, 0, "so 3 of its 6 queues run at a time", True),
        # A cap of one's own is no reason to ask AWS for more.
        (1_000, 20, "of which Sluice may use 20 (LambdaConcurrency); this stack can use 31", False),
        (10, 20, "region: 10; this stack can use 31, so 3 of its 6 queues", True),
    ],
)
def test_a_small_limit_is_explained_with_what_to_ask_aws_for(
    executions: int, at_most: int, said: str, *, asks: bool
) -> None:
    first, *more = lambda_limit_report(executions, at_most, 27, 6)

    assert said in first
    assert asks == any("--quota-code L-B99A9384" in line for line in more)


def test_the_usual_concurrency_is_that_of_the_template() -> None:
    parameters = template()["Parameters"]

    assert {name: parameters[name]["Default"] for name in USUAL_CONCURRENCY} == USUAL_CONCURRENCY


def test_setup_run_again_without_a_terminal_keeps_the_upstream_keys(
    run: Run, stack: Deployed, tmp_path: Path
) -> None:
    run("setup", "--stack", "prod", "--key-pool", pool_file(tmp_path, "main", "second"))

    ended = run("setup", "--stack", "prod")

    assert 0 == ended.code
    assert "kept the upstream keys main, second" in ended.err
    assert 2 == len(stack.key_pool()["keys"])
    assert "SLUICE_KEY" in exported(ended.out)


@pytest.mark.usefixtures("stack")
def test_setup_without_a_terminal_and_without_keys_says_what_to_give(run: Run) -> None:
    ended = run("setup", "--stack", "prod")

    assert (1, "") == (ended.code, ended.out)
    assert "use --key-pool FILE" in ended.err


@pytest.mark.usefixtures("stack")
def test_client_keys_can_be_made_listed_and_revoked(run: Run) -> None:
    run("keys", "create", "--stack", "prod", "--tenant", "team-red", "--name", "laptop")
    run("keys", "create", "--stack", "prod", "--tenant", "team-blue")
    before = json.loads(run("keys", "list", "--stack", "prod", "--json").out)["data"]
    red = next(key["key_id"] for key in before if key["tenant"] == "team-red")

    ended = run("keys", "revoke", red, "--stack", "prod")

    after = json.loads(run("keys", "list", "--stack", "prod", "--json").out)["data"]
    table = run("keys", "list", "--stack", "prod")
    assert (0, f"{red} revoked\n") == (ended.code, ended.out)
    assert ["laptop", "team-blue"] == sorted(key["name"] for key in after)
    assert [red] == [key["key_id"] for key in after if key["disabled"]]
    assert not any("hash" in key for key in after)
    assert "revoked" in table.out


@pytest.mark.parametrize("command", [["setup"], ["keys", "create"]])
@pytest.mark.parametrize("tenant", ["team red", "", "t" * 65, "team\n", "käse"])
def test_a_tenant_the_queue_would_refuse_is_refused_at_once(
    run: Run, stack: Deployed, command: list[str], tenant: str
) -> None:
    del stack

    ended = run(*command, "--stack", "prod", "--tenant", tenant)

    assert 1 == ended.code
    assert "is not a valid tenant name: use 1 to 64 letters" in ended.err


@pytest.mark.usefixtures("stack")
def test_revoking_an_unknown_key_creates_none(run: Run) -> None:
    ended = run("keys", "revoke", "0" * 32, "--stack", "prod")

    left = run("keys", "list", "--stack", "prod")
    assert 1 == ended.code
    assert "error: client key 000" in ended.err
    assert (0, "") == (left.code, left.out)


def test_a_stack_that_is_not_there_is_named_with_its_region(run: Run) -> None:
    ended = run("setup", "--stack", "nowhere")

    assert 1 == ended.code
    assert f"error: stack nowhere does not exist in {REGION}" in ended.err


def test_another_kind_of_stack_is_refused(run: Run, emulator: Emulator) -> None:
    deploy(emulator, {"Resources": TEMPLATE["Resources"]})

    ended = run("keys", "list", "--stack", "prod")

    assert 1 == ended.code
    assert "stack prod has no output ApiUrl" in ended.err


def test_without_a_region_it_says_what_to_set(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")

    ended = run("setup", "--stack", "prod")

    assert (1, "error: no AWS region: set --region or AWS_REGION\n") == (ended.code, ended.err)


def test_an_unknown_profile_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")

    ended = run("setup", "--stack", "prod")

    assert 1 == ended.code
    assert 1 == len(ended.err.splitlines())
    assert "set AWS_PROFILE" in ended.err


def test_an_endpoint_that_is_no_address_is_one_line(run: Run) -> None:
    ended = run("setup", "--stack", "prod", "--endpoint-url", "nonsense")

    assert (1, 1) == (ended.code, len(ended.err.splitlines()))
    assert "cannot read stack prod: Invalid endpoint: nonsense" in ended.err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "pool.json is not valid JSON"),
        ("[]", "the key pool must be"),
        ('{"keys": []}', "pool.json has no keys"),
        ('{"keys": [{"id": "a", "api_key": ""}]}', "no api_key"),
        ('{"keys": [{"id": "a", "api_key": "sk-ant-test-x", "modles": []}]}', "modles"),
    ],
)
def test_a_key_pool_that_would_not_work_is_refused_without_showing_keys(
    text: str, reason: str
) -> None:
    with pytest.raises(CommandFailed) as refused:
        read_key_pool(text, "pool.json")

    assert reason in str(refused.value)
    assert "sk-ant" not in str(refused.value)


def test_keys_typed_one_after_another_become_the_key_pool() -> None:
    typed = iter(
        ["sk-ant-test-a ", "sk-ant-test-a", "sk-ant-admin-x", "with space", "sk-ant-test-b", ""]
    )
    said: list[str] = []

    pool = ask_for_key_pool(lambda _: next(typed), said.append)

    assert {
        "keys": [
            {"id": "main", "api_key": "sk-ant-test-a"},
            {"id": "key-2", "api_key": "sk-ant-test-b"},
        ]
    } == pool
    assert 3 == len(said)
    assert not any("sk-ant-test" in line for line in said)


def test_no_key_at_all_changes_nothing() -> None:
    with pytest.raises(CommandFailed, match="nothing was changed"):
        ask_for_key_pool(lambda _: "", lambda _: None)


# Dead letters


def job_id(number: int) -> str:
    return f"job_{number:032x}"


@dataclass(frozen=True)
class Yard:
    """A stack with dead letters: of two jobs, of a job that has continued since, and of no job."""

    jobs: DynamoJobs

    def state(self, number: int) -> Job:
        job = self.jobs.get(job_id(number))
        assert job is not None
        return job


@pytest.fixture
def yard(emulator: Emulator) -> Yard:
    outputs = deploy(emulator, WITH_JOBS).outputs
    dynamodb = emulator.client("dynamodb")
    bucket = Objects(emulator.client("s3"), outputs["DataBucketName"])
    jobs = DynamoJobs(dynamodb, outputs["JobsTableName"], 30)
    params = DynamoParams(dynamodb, outputs["ParamsTableName"], bucket, SystemClock(), 30)
    graveyard = DeadLetterObjects(bucket)
    now = SystemClock().now()
    for number in (1, 2, 3):
        facts = {"model": "claude-haiku-5-5", "input_chars": 3_500, "max_tokens": 1_000}
        job = a_job(job_id(number), created_at=now, **facts)
        reason = "received 1001 times without an end" if number < 3 else "no such job"
        if number < 3:
            error = JobError("dead_letter", reason)
            job = finish_waiting(job, State.ERRORED, now, error)
        jobs.add(job)
        params.add(Params(job.job_id, b"{}", job.request_hash))
        graveyard.keep(Received(f"letter-{number}", "", "{}", job.job_id, sent_at=now), reason)
    graveyard.keep(Received("letter-x", "", "hello", None), "not a message of Sluice's")
    return Yard(jobs)


@pytest.mark.usefixtures("yard")
def test_dead_letters_are_listed_with_what_their_jobs_are_now(run: Run) -> None:
    rows = json.loads(run("dead-letters", "list", "--stack", "prod", "--json").out)["data"]
    table = run("dead-letters", "list", "--stack", "prod", "--reason", "of sluice")

    assert {
        "letter-1": ("errored", True, None),
        "letter-2": ("errored", True, None),
        "letter-3": ("queued", False, "the job is queued"),
        "letter-x": (None, False, "not a Sluice message"),
    } == {row["letter"]: (row["state"], row["redrivable"], row["hindrance"]) for row in rows}
    assert "letter-x" in table.out
    assert "letter-1" not in table.out


@pytest.mark.usefixtures("yard")
def test_a_dead_letter_is_shown_with_its_body_and_its_jobs_record(run: Run) -> None:
    ours = json.loads(run("dead-letters", "show", "letter-1", "--stack", "prod").out)
    foreign = json.loads(run("dead-letters", "show", "letter-x", "--stack", "prod").out)
    missing = run("dead-letters", "show", "letter-9", "--stack", "prod")

    assert (job_id(1), "dead_letter") == (ours["job"], ours["job_record"]["error"]["type"])
    assert ("hello", None) == (foreign["body"], foreign["job_record"])
    assert 1 == missing.code
    assert "dead letter letter-9 does not exist" in missing.err


def test_a_dry_run_shows_what_would_be_redriven_and_its_cost_and_changes_nothing(
    run: Run, yard: Yard
) -> None:
    """For each of two jobs 1,000 tokens at $0.10 a million in, and 300 at $0.50 out, 1,000 at most."""
    ended = run("dead-letters", "redrive", "--all", "--dry-run", "--stack", "prod")

    assert 0 == ended.code
    assert "2 jobs would be redriven; estimated cost $0.000500, at most $0.001200" in ended.err
    assert [State.ERRORED, State.ERRORED] == [yard.state(n).state for n in (1, 2)]


def test_a_redrive_makes_runnable_what_was_chosen_and_nothing_else(run: Run, yard: Yard) -> None:
    ended = run("dead-letters", "redrive", "--reason", "1001", "--yes", "--json", "--stack", "prod")
    again = run("dead-letters", "redrive", "--all", "--yes", "--stack", "prod")

    rows = json.loads(ended.out)["data"]
    assert {(job_id(1), "queued", 1), (job_id(2), "queued", 1)} == {
        (row["job"], row["state"], row["redrives"]) for row in rows
    }
    assert "2 jobs redriven; estimated cost $0.000500" in ended.err
    now = SystemClock().now()
    assert {job_id(1), job_id(2)} == {each.job_id for each in yard.jobs.due(DueFor.CALL, now, 100)}
    assert 0 == yard.state(1).attempts_used
    assert 0 == again.code
    assert "0 jobs would be redriven" in again.err


def test_one_letter_is_redriven_by_its_name(run: Run, yard: Yard) -> None:
    ended = run("dead-letters", "redrive", "letter-2", "--yes", "--stack", "prod")

    assert 0 == ended.code
    assert [State.ERRORED, State.QUEUED] == [yard.state(n).state for n in (1, 2)]


def test_without_a_terminal_nothing_is_redriven_unasked(run: Run, yard: Yard) -> None:
    ended = run("dead-letters", "redrive", "--all", "--stack", "prod")

    assert 1 == ended.code
    assert "use --yes, or --dry-run to preview" in ended.err
    assert State.ERRORED == yard.state(1).state


@pytest.mark.parametrize("chosen", [[], ["letter-1", "--all"], ["--all", "--reason", "x"]])
def test_a_redrive_wants_to_know_of_what(run: Run, chosen: list[str]) -> None:
    ended = run("dead-letters", "redrive", *chosen, "--stack", "prod")

    assert 2 == ended.code
    assert "provide dead letter IDs, --reason or --all" in ended.err


@pytest.mark.usefixtures("stack")
def test_the_error_for_a_stack_without_tables_names_them(run: Run) -> None:
    ended = run("dead-letters", "list", "--stack", "prod")

    assert 1 == ended.code
    assert "stack prod has no output JobsTableName, ParamsTableName" in ended.err
