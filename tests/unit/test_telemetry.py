"""One JSON line per event; metrics summed per invocation and emitted as EMF."""

import io
import json
import logging
from typing import Any

import pytest
from aws_lambda_powertools import Logger

from sluice.adapters import aws
from sluice.adapters.telemetry import VALUES_AT_ONCE, Telemetry, quiet_libraries
from sluice.ports.metrics import BY_MODEL_GROUP, METRIC_NAMES, NAMESPACE, SAMPLED, TOTALS


class Setup:
    def __init__(self, name: str) -> None:
        self.out = io.StringIO()
        # Loggers are kept by name for the life of the process: each test has its own.
        self.telemetry = Telemetry(Logger(service=f"sluice-{name}", stream=self.out))

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.getvalue().splitlines()]


@pytest.fixture
def setup(request: pytest.FixtureRequest) -> Setup:
    return Setup(request.node.name)


def flushed(setup: Setup, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    setup.telemetry.flush()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_an_event_is_one_line_with_its_facts_as_keys(setup: Setup) -> None:
    setup.telemetry.note("job succeeded", job_id="job_1", attempts_used=1, error_type=None)

    (line,) = setup.lines
    assert ("INFO", "job succeeded", "job_1", 1) == (
        line["level"],
        line["message"],
        line["job_id"],
        line["attempts_used"],
    )
    assert "error_type" not in line


def test_a_problem_carries_the_traceback_when_there_is_one(setup: Setup) -> None:
    setup.telemetry.problem("limits table busy")
    try:
        raise ZeroDivisionError("crunchy armchair")  # noqa: TRY301
    except ZeroDivisionError:
        setup.telemetry.problem("worker failed on a job", job_id="job_1")

    plain, traced = setup.lines
    assert ("WARNING", "limits table busy") == (plain["level"], plain["message"])
    assert "exception" not in plain
    assert "crunchy armchair" in traced["exception"]


def test_counts_of_an_invocation_are_summed_up(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        setup.telemetry.count("UpstreamCalls")
    setup.telemetry.count("SpendUsd", 0.5)
    setup.telemetry.count("SpendUsd", 0.25)

    (document,) = flushed(setup, capsys)

    assert ([3.0], [0.75]) == (document["UpstreamCalls"], document["SpendUsd"])
    (metrics,) = document["_aws"]["CloudWatchMetrics"]
    assert (NAMESPACE, [["service"]]) == (metrics["Namespace"], metrics["Dimensions"])
    assert {"UpstreamCalls": "Count", "SpendUsd": "None"} == {
        each["Name"]: each["Unit"] for each in metrics["Metrics"]
    }


def test_samples_are_kept_value_by_value(setup: Setup, capsys: pytest.CaptureFixture[str]) -> None:
    for seconds in (1.5, 0.5, 2.5):
        setup.telemetry.count("StartDelaySeconds", seconds)

    (document,) = flushed(setup, capsys)

    assert [1.5, 0.5, 2.5] == document["StartDelaySeconds"]
    (metric,) = document["_aws"]["CloudWatchMetrics"][0]["Metrics"]
    assert "Seconds" == metric["Unit"]


def test_more_samples_than_a_document_holds_do_no_harm(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(VALUES_AT_ONCE + 50):
        setup.telemetry.count("CallSeconds", number, "haiku")

    documents = flushed(setup, capsys)

    assert all(len(each["CallSeconds"]) <= VALUES_AT_ONCE for each in documents)


def test_model_groups_have_documents_of_their_own(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    setup.telemetry.count("UpstreamCalls")
    setup.telemetry.count("Calls", 1, "haiku")
    setup.telemetry.count("Calls", 2, "opus")

    documents = flushed(setup, capsys)

    grouped = {each["model_group"]: each["Calls"] for each in documents if "Calls" in each}
    assert {"haiku": [1.0], "opus": [2.0]} == grouped
    for each in documents:
        dimensions = each["_aws"]["CloudWatchMetrics"][0]["Dimensions"][0]
        assert {"service", "model_group"} & set(each) == set(dimensions)


def test_what_was_flushed_is_not_emitted_again(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    setup.telemetry.count("UpstreamCalls")
    assert 1 == len(flushed(setup, capsys))

    assert [] == flushed(setup, capsys)


@pytest.mark.parametrize("library", ["httpx2", "anthropic"])
def test_a_library_that_logs_every_call_is_hushed(library: str) -> None:
    logger = logging.getLogger(library)
    logger.setLevel(logging.INFO)

    quiet_libraries()

    assert not logger.isEnabledFor(logging.INFO)
    assert logger.isEnabledFor(logging.WARNING)


def test_an_undeclared_metric_is_rejected(setup: Setup) -> None:
    with pytest.raises(ValueError, match=r"'UpstreamCals' is not in sluice/ports/metrics\.py"):
        setup.telemetry.count("UpstreamCals")


def test_every_metric_is_a_total_or_by_model_group() -> None:
    assert not TOTALS & BY_MODEL_GROUP
    assert TOTALS | BY_MODEL_GROUP == METRIC_NAMES
    assert SAMPLED <= METRIC_NAMES


def test_calls_that_aws_refused_are_logged_and_counted_once(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    aws.note_refusal("BatchGetItem", "the params table")
    aws.note_refusal("BatchGetItem", "the params table")
    aws.note_refusal("SendMessageBatch", "the ranges queue")

    (document,) = flushed(setup, capsys)
    nothing_more = flushed(setup, capsys)

    (line,) = setup.lines
    assert "AWS refused calls: the function's role lacks a permission" == line["message"]
    assert {
        "BatchGetItem on the params table": 2,
        "SendMessageBatch on the ranges queue": 1,
    } == line["calls"]
    assert [3] == document["AccessDenied"]
    assert [] == nothing_more
