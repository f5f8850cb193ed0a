"""One JSON line per event; metrics summed per invocation and emitted as EMF."""

import io
import json
import logging
from typing import Any

import pytest
from aws_lambda_powertools import Logger

from sluice.adapters import aws
from sluice.adapters.telemetry import VALUES_AT_ONCE, Telemetry, hush
from sluice.ports.metrics import BY_MODEL_GROUP, METRIC_NAMES, NAMESPACE, SAMPLED, TOTALS


class Desk:
    def __init__(self, name: str) -> None:
        self.out = io.StringIO()
        # Loggers are kept by name for the life of the process: each test has its own.
        self.telemetry = Telemetry(Logger(service=f"sluice-{name}", stream=self.out))

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.getvalue().splitlines()]


@pytest.fixture
def desk(request: pytest.FixtureRequest) -> Desk:
    return Desk(request.node.name)


def flushed(desk: Desk, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    desk.telemetry.flush()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_an_event_is_one_line_with_its_facts_as_keys(desk: Desk) -> None:
    desk.telemetry.note("job succeeded", job_id="job_1", attempts_used=1, error_type=None)

    (line,) = desk.lines
    assert ("INFO", "job succeeded", "job_1", 1) == (
        line["level"],
        line["message"],
        line["job_id"],
        line["attempts_used"],
    )
    assert "error_type" not in line


def test_a_problem_carries_the_traceback_when_there_is_one(desk: Desk) -> None:
    desk.telemetry.problem("limits table busy")
    try:
        raise ZeroDivisionError("crunchy armchair")  # noqa: TRY301
    except ZeroDivisionError:
        desk.telemetry.problem("worker failed on a job", job_id="job_1")

    plain, traced = desk.lines
    assert ("WARNING", "limits table busy") == (plain["level"], plain["message"])
    assert "exception" not in plain
    assert "crunchy armchair" in traced["exception"]


def test_counts_of_an_invocation_are_summed_up(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(3):
        desk.telemetry.count("UpstreamCalls")
    desk.telemetry.count("SpendUsd", 0.5)
    desk.telemetry.count("SpendUsd", 0.25)

    (document,) = flushed(desk, capsys)

    assert ([3.0], [0.75]) == (document["UpstreamCalls"], document["SpendUsd"])
    (metrics,) = document["_aws"]["CloudWatchMetrics"]
    assert (NAMESPACE, [["service"]]) == (metrics["Namespace"], metrics["Dimensions"])
    assert {"UpstreamCalls": "Count", "SpendUsd": "None"} == {
        each["Name"]: each["Unit"] for each in metrics["Metrics"]
    }


def test_samples_are_kept_value_by_value(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    for seconds in (1.5, 0.5, 2.5):
        desk.telemetry.count("StartDelaySeconds", seconds)

    (document,) = flushed(desk, capsys)

    assert [1.5, 0.5, 2.5] == document["StartDelaySeconds"]
    (metric,) = document["_aws"]["CloudWatchMetrics"][0]["Metrics"]
    assert "Seconds" == metric["Unit"]


def test_more_samples_than_a_document_holds_do_no_harm(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(VALUES_AT_ONCE + 50):
        desk.telemetry.count("CallSeconds", number, "haiku")

    documents = flushed(desk, capsys)

    assert all(len(each["CallSeconds"]) <= VALUES_AT_ONCE for each in documents)


def test_model_groups_have_documents_of_their_own(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    desk.telemetry.count("UpstreamCalls")
    desk.telemetry.count("Calls", 1, "haiku")
    desk.telemetry.count("Calls", 2, "opus")

    documents = flushed(desk, capsys)

    grouped = {each["model_group"]: each["Calls"] for each in documents if "Calls" in each}
    assert {"haiku": [1.0], "opus": [2.0]} == grouped
    for each in documents:
        dimensions = each["_aws"]["CloudWatchMetrics"][0]["Dimensions"][0]
        assert {"service", "model_group"} & set(each) == set(dimensions)


def test_what_was_flushed_is_not_emitted_again(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    desk.telemetry.count("UpstreamCalls")
    assert 1 == len(flushed(desk, capsys))

    assert [] == flushed(desk, capsys)


@pytest.mark.parametrize("library", ["httpx2", "anthropic"])
def test_a_library_that_logs_every_call_is_hushed(library: str) -> None:
    logger = logging.getLogger(library)
    logger.setLevel(logging.INFO)

    hush()

    assert not logger.isEnabledFor(logging.INFO)
    assert logger.isEnabledFor(logging.WARNING)


def test_a_metric_nobody_declared_is_refused(desk: Desk) -> None:
    with pytest.raises(ValueError, match=r"'UpstreamCals' is not in sluice/ports/metrics\.py"):
        desk.telemetry.count("UpstreamCals")


def test_every_metric_is_a_total_or_by_model_group() -> None:
    assert not TOTALS & BY_MODEL_GROUP
    assert TOTALS | BY_MODEL_GROUP == METRIC_NAMES
    assert SAMPLED <= METRIC_NAMES


def test_calls_that_aws_refused_are_logged_and_counted_once(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    aws.note_refusal("BatchGetItem", "the params table")
    aws.note_refusal("BatchGetItem", "the params table")
    aws.note_refusal("SendMessageBatch", "the ranges queue")

    (document,) = flushed(desk, capsys)
    nothing_more = flushed(desk, capsys)

    (line,) = desk.lines
    assert "AWS refused calls: the function's role lacks a permission" == line["message"]
    assert {
        "BatchGetItem on the params table": 2,
        "SendMessageBatch on the ranges queue": 1,
    } == line["calls"]
    assert [3] == document["AccessDenied"]
    assert [] == nothing_more
