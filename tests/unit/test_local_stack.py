"""The parts of the local stack that need no emulator."""

from __future__ import annotations

import io
import json
import socket
import zipfile
from typing import TYPE_CHECKING, Any

import pytest

from scripts.local_stack import LocalStack, StackError, deploy, emulator
from scripts.local_stack.credentials import check_client_key, new_client_key, read_key_pool
from scripts.local_stack.emulator_runner import Gathering, Wake
from scripts.local_stack.stack import REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path

CLAUDE_URL = "http://127.0.0.1:8089"
QUEUE = "http://127.0.0.1:4566/000000000000/jobs"


# ---------------------------------------------------------------- key pool


def test_without_a_key_pool_there_is_one_test_key_for_the_given_claude() -> None:
    pool = read_key_pool(None, CLAUDE_URL)

    assert pool == {
        "keys": [{"id": "local", "api_key": "sk-ant-test-local", "base_url": CLAUDE_URL}]
    }


def test_a_key_pool_file_is_taken_as_it_is(tmp_path: Path) -> None:
    keys = [{"id": "main", "api_key": "sk-ant-test-1", "organization": "org", "weight": 2}]
    file = tmp_path / "keys.json"
    file.write_text(json.dumps({"keys": keys}))

    assert read_key_pool(file, None) == {"keys": keys}


def test_only_keys_without_a_base_url_are_sent_to_the_given_claude() -> None:
    pool: dict[str, Any] = {
        "keys": [
            {"id": "a", "api_key": "sk-ant-test-1", "base_url": None},
            {"id": "b", "api_key": "sk-ant-test-2", "base_url": "http://127.0.0.1:9000"},
        ]
    }

    installed = read_key_pool(pool, CLAUDE_URL)

    assert [key["base_url"] for key in installed["keys"]] == [CLAUDE_URL, "http://127.0.0.1:9000"]
    assert pool["keys"][0]["base_url"] is None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not valid JSON"),
        ("[]", 'must be {"keys": ['),
        ('{"key": []}', 'must be {"keys": ['),
        ('{"keys": {}}', 'must be {"keys": ['),
        ('{"keys": []}', "has no keys"),
        ('{"keys": ["sk-ant-test-1"]}', "key 1 of the pool is not a JSON object"),
        (
            '{"keys": [{"api_key": "sk-ant-test-1", "weight": -1}]}',
            "weight must be an integer of at least 1",
        ),
        ('{"keys": [{"api_key": "sk-ant-test-1", "foo": 1}]}', "unknown fields: foo"),
        (
            '{"keys": [{"id": "a", "api_key": "sk-ant-test-1"}, {"id": "b"}]}',
            "key 2 of the pool has no api_key",
        ),
    ],
)
def test_a_broken_key_pool_file_is_named_in_one_line(
    tmp_path: Path, content: str, said: str
) -> None:
    file = tmp_path / "keys.json"
    file.write_text(content)

    with pytest.raises(StackError) as caught:
        read_key_pool(file, None)

    assert said in str(caught.value)
    assert "keys.json" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "sk-ant" not in str(caught.value)


def test_a_missing_key_pool_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StackError, match=r"nowhere\.json cannot be read: No such file"):
        read_key_pool(tmp_path / "nowhere.json", None)


def test_a_new_client_key_is_one_that_sluice_takes_and_never_the_same() -> None:
    first, second = new_client_key(), new_client_key()

    assert first.startswith("sluice_local_")
    assert first != second
    check_client_key(first)


def test_a_short_client_key_is_refused() -> None:
    with pytest.raises(StackError, match="has 6 characters; the minimum is 16"):
        check_client_key("secret")


@pytest.mark.parametrize(
    ("stack", "said"),
    [
        (
            LocalStack(concurrency=1),
            "concurrency 1 is out of range: SQS event source mappings allow 2 to 1000",
        ),
        (
            LocalStack(concurrency=1001),
            "concurrency 1001 is out of range: SQS event source mappings allow 2 to 1000",
        ),
        (LocalStack(claude_url="localhost:8089"), "localhost:8089 is not a URL"),
        (LocalStack(key_pool={"keys": []}), "the key pool has no keys"),
        (LocalStack(client_key="short"), "the client key has 5 characters"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(stack: LocalStack, said: str) -> None:
    with pytest.raises(StackError, match=said), stack.running():
        pass


# ---------------------------------------------------------------- template and packages


def test_a_function_is_packaged_from_its_own_folder_without_bytecode(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("x = 1")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "app.cpython-311.pyc").write_bytes(b"")

    assert _names(deploy.function_zip(tmp_path)) == ["app.py"]


def test_a_layer_is_packaged_as_python_packages_without_what_builds_it(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("anthropic")
    (tmp_path / "sluice" / "data").mkdir(parents=True)
    (tmp_path / "sluice" / "__init__.py").write_text("")
    (tmp_path / "sluice" / "data" / "prices.json").write_text("{}")

    assert _names(deploy.layer_zip(tmp_path)) == [
        "python/sluice/__init__.py",
        "python/sluice/data/prices.json",
    ]


@pytest.mark.parametrize(
    "written",
    [
        10,
        "10",
        {"Ref": "MaxConcurrency"},
        {"Fn::If": ["Usual", 10, {"Ref": "MaxConcurrency"}]},
    ],
)
def test_a_concurrency_becomes_a_number_however_it_is_written(written: object) -> None:
    template = _template(concurrency=written)

    local = deploy.prepared(template, concurrency=None, public_url="http://here")
    deploy.fix_concurrency_type(local)

    scaling = local["Resources"]["Mapping"]["Properties"]["ScalingConfig"]
    assert scaling == {"MaximumConcurrency": 10}


def test_the_local_values_replace_defaults_and_leave_the_template_as_it_was() -> None:
    template = _template(concurrency=2)

    local = deploy.prepared(template, concurrency=7, public_url="http://here")

    defaults = {name: declared["Default"] for name, declared in local["Parameters"].items()}
    assert defaults == {"MaxConcurrency": 7, "MetricMathAlarms": "false", "MaxAttempts": 5}
    assert template["Parameters"]["MaxConcurrency"]["Default"] == "10"


def test_variables_are_added_to_those_of_every_function() -> None:
    template = _template(concurrency=2)
    shared = {"Runtime": "python3.13", "Environment": {"Variables": {"A": "1", "B": "2"}}}
    template["Globals"] = {"Function": shared}

    local = deploy.prepared(
        template, concurrency=None, public_url="http://here", environment={"B": "3", "C": "4"}
    )

    assert local["Globals"]["Function"] == {
        "Runtime": "python3.13",
        "Environment": {"Variables": {"A": "1", "B": "3", "C": "4"}},
    }
    assert shared["Environment"] == {"Variables": {"A": "1", "B": "2"}}


def test_only_tables_that_declare_a_time_to_live_get_one() -> None:
    specification = {"AttributeName": "expires_at", "Enabled": True}
    template = {
        "Resources": {
            "Jobs": {
                "Type": "AWS::DynamoDB::Table",
                "Properties": {"TimeToLiveSpecification": specification},
            },
            "ClientKeys": {"Type": "AWS::DynamoDB::Table", "Properties": {}},
            "Bucket": {"Type": "AWS::S3::Bucket"},
        }
    }

    assert deploy.time_to_live(template) == {"Jobs": specification}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is not valid YAML"),
        ("Parameters: {}", "has no Resources"),
        ("", "has no Resources"),
    ],
)
def test_a_file_that_is_no_template_is_named_in_one_line(
    tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "template.yaml").write_text(text)

    with pytest.raises(StackError) as caught:
        deploy.read_template(tmp_path / "template.yaml")

    assert f"template.yaml {said}" in str(caught.value)
    assert "\n" not in str(caught.value)


def _names(archive: bytes) -> list[str]:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return opened.namelist()


def test_each_mapping_starts_as_the_governor_sets_it_in_an_account_with_room_for_all() -> None:
    local = deploy.prepared(
        deploy.read_template(REPOSITORY / "template.yaml"), concurrency=7, public_url="http://here"
    )

    deploy.start_at_ceilings(local)

    started = {
        name: resource["Properties"]["ScalingConfig"]["MaximumConcurrency"]
        for name, resource in local["Resources"].items()
        if resource["Type"] == "AWS::Lambda::EventSourceMapping"
        and "ScalingConfig" in resource["Properties"]
    }
    assert {
        "WorkerMapping": 7,
        "RangesMapping": 4,
        "BatchesMapping": 4,
        "WebhooksMapping": 5,
        "DeadLettersMapping": 2,
        "RangeDeadLettersMapping": 2,
    } == started


def _template(concurrency: object) -> dict[str, Any]:
    return {
        "Parameters": {
            "MaxConcurrency": {"Type": "Number", "Default": "10"},
            "MetricMathAlarms": {"Type": "String", "Default": "true"},
            "MaxAttempts": {"Type": "Number", "Default": 5},
        },
        "Resources": {
            "Mapping": {
                "Type": "AWS::Lambda::EventSourceMapping",
                "Properties": {"ScalingConfig": {"MaximumConcurrency": concurrency}},
            },
        },
    }


# ---------------------------------------------------------------- emulator


def test_children_know_no_credentials_proxies_or_emulator_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in (
        "AWS_PROFILE",
        "ANTHROPIC_API_KEY",
        "HTTPS_PROXY",
        "LAMBDA_EXECUTOR",
        "PYTHONPATH",
    ):
        monkeypatch.setenv(name, "mine")
    monkeypatch.setenv("PATH", "/bin")

    kept = emulator.clean_environment()

    assert kept["PATH"] == "/bin"
    assert "mine" not in kept.values()


def test_a_port_in_use_is_named_with_the_cure() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]

        with pytest.raises(StackError, match=rf"port {port} .* --port"):
            emulator.free_port(port)


def test_a_port_that_does_not_exist_is_refused() -> None:
    with pytest.raises(StackError, match="port 70000"):
        emulator.free_port(70_000)


def test_batches_wait_until_they_are_full_or_their_window_is_over() -> None:
    gathering = Gathering()
    due_at = [
        # One message: it waits a second for others.
        gathering.due_at(QUEUE, visible=1, batch_size=50, window_seconds=1, now=100.0),
        # A second message does not prolong the wait.
        gathering.due_at(QUEUE, visible=2, batch_size=50, window_seconds=1, now=100.9),
        # A full batch goes at once.
        gathering.due_at(QUEUE, visible=50, batch_size=50, window_seconds=1, now=100.95),
    ]
    gathering.taken(QUEUE)
    due_at += [
        # What stays behind begins a window of its own.
        gathering.due_at(QUEUE, visible=3, batch_size=50, window_seconds=1, now=100.95),
        # Nothing visible: nothing is due, and nothing is remembered.
        gathering.due_at(QUEUE, visible=0, batch_size=50, window_seconds=1, now=101.5),
        gathering.due_at(QUEUE, visible=1, batch_size=50, window_seconds=1, now=105.0),
        # Without a window a message never waits.
        gathering.due_at("other", visible=1, batch_size=10, window_seconds=0, now=105.0),
    ]

    assert due_at == [101.0, 101.0, 100.95, 101.95, None, 106.0, 105.0]


def test_waiting_ends_when_something_is_due_or_happens() -> None:
    wake = Wake()

    wake.no_later_than(0.0)
    assert wake.wait(600) is False

    wake.set()
    assert wake.wait(600) is True
    wake.clear()
    assert wake.wait(0.001) is False
