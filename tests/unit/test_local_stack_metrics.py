"""Metric documents in log lines, and reading each line once."""

from __future__ import annotations

import json
from typing import Any

from scripts.local_stack.emf import VALUES_PER_DATUM, Cursor, metric_data

AT_MS = 1_795_000_000_000


def _document(*directives: dict[str, Any], **fields: object) -> str:
    header = {"Timestamp": AT_MS, "CloudWatchMetrics": list(directives)}
    return json.dumps({"_aws": header, **fields})


def test_a_metric_document_becomes_one_datum() -> None:
    line = _document(
        {
            "Namespace": "Sluice",
            "Dimensions": [["service"]],
            "Metrics": [{"Name": "JobsAccepted", "Unit": "Count"}],
        },
        service="sluice",
        JobsAccepted=3,
        function_name="api",
    )

    assert list(metric_data(line)) == [
        (
            "Sluice",
            {
                "MetricName": "JobsAccepted",
                "Dimensions": [{"Name": "service", "Value": "sluice"}],
                "Unit": "Count",
                "Values": [3.0],
                "Timestamp": AT_MS / 1000,
            },
        )
    ]


def test_a_metric_counts_once_under_each_dimension_set() -> None:
    line = _document(
        {
            "Namespace": "Sluice",
            "Dimensions": [["service"], ["service", "model_group"], []],
            "Metrics": [{"Name": "Calls"}],
        },
        service="sluice",
        model_group="haiku",
        Calls=[1],
    )

    dimensions = [
        {one["Name"]: one["Value"] for one in datum["Dimensions"]}
        for _namespace, datum in metric_data(line)
    ]

    assert dimensions == [{"service": "sluice"}, {"service": "sluice", "model_group": "haiku"}, {}]


def test_a_document_without_dimension_sets_counts_once_without_dimensions() -> None:
    line = _document({"Namespace": "Sluice", "Metrics": [{"Name": "Calls"}]}, Calls=1)

    ((_namespace, datum),) = metric_data(line)

    assert datum["Dimensions"] == []
    assert datum["Unit"] == "None"


def test_several_directives_and_metrics_each_count() -> None:
    line = _document(
        {
            "Namespace": "Sluice",
            "Dimensions": [[]],
            "Metrics": [{"Name": "InputTokens", "Unit": "Count"}, {"Name": "CallSeconds"}],
        },
        {"Namespace": "Other", "Dimensions": [[]], "Metrics": [{"Name": "InputTokens"}]},
        InputTokens=[10, 20],
        CallSeconds=1.5,
    )

    found = [
        (namespace, datum["MetricName"], datum["Values"]) for namespace, datum in metric_data(line)
    ]

    assert found == [
        ("Sluice", "InputTokens", [10.0, 20.0]),
        ("Sluice", "CallSeconds", [1.5]),
        ("Other", "InputTokens", [10.0, 20.0]),
    ]


def test_long_lists_are_cut_into_what_one_datum_may_hold() -> None:
    line = _document(
        {"Namespace": "Sluice", "Dimensions": [[]], "Metrics": [{"Name": "CallSeconds"}]},
        CallSeconds=list(range(VALUES_PER_DATUM + 1)),
    )

    sizes = [len(datum["Values"]) for _namespace, datum in metric_data(line)]

    assert sizes == [VALUES_PER_DATUM, 1]


def test_what_is_no_metric_document_says_nothing() -> None:
    lines = [
        "START RequestId: 1 Version: $LATEST",
        '{"level":"INFO","message":"job succeeded"}',
        '{"_aws": broken',
        '{"_aws": "text"}',
        '["_aws"]',
        _document({"Namespace": "Sluice", "Dimensions": [[]], "Metrics": [{"Name": "Missing"}]}),
        _document(
            {"Namespace": "Sluice", "Dimensions": [[]], "Metrics": [{"Name": "Calls"}]}, Calls="1"
        ),
        _document(
            {"Namespace": "Sluice", "Dimensions": [[]], "Metrics": [{"Name": "Calls"}]}, Calls=True
        ),
    ]

    assert [list(metric_data(line)) for line in lines] == [[]] * len(lines)


def test_each_event_is_given_out_once() -> None:
    cursor = Cursor()
    first = [_event(10_000, "a"), _event(10_000, "a"), _event(12_000, "b")]

    read = [
        cursor.unread(first),
        # The next read overlaps; one event came late, one more line equals an earlier one.
        cursor.unread([*first, _event(10_000, "a"), _event(11_000, "late")]),
        cursor.unread([_event(12_000, "b"), _event(12_000, "b", stream="other")]),
        cursor.unread([]),
    ]

    assert read == [["a", "a", "b"], ["a", "late"], ["b"], []]


def test_reading_begins_two_seconds_behind_the_newest_event() -> None:
    cursor = Cursor()
    assert cursor.start_ms == 0

    cursor.unread([_event(10_000, "a"), _event(60_000, "b")])

    assert cursor.start_ms == 58_000


def _event(timestamp: int, message: str, stream: str = "one") -> dict[str, Any]:
    return {"timestamp": timestamp, "message": message, "logStreamName": stream}
