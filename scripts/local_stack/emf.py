"""The metrics bridge: turn the metric documents in the functions' logs into CloudWatch metrics.

Lambda does this on AWS (embedded metric format); the emulator stores the log lines and no more.
"""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

Datum = dict[str, Any]

VALUES_PER_DATUM = 150
DATA_PER_CALL = 500
OVERLAP_MS = 2_000
"""How far behind the newest event the next read begins: parallel invocations log out of order."""


def metric_data(message: str) -> Iterator[tuple[str, Datum]]:
    """Yield (namespace, datum for PutMetricData) for every metric in one log line, if any.

    A metric counts once under each of the document's dimension sets; a list is many samples.
    """
    if '"_aws"' not in message:
        return
    try:
        document = json.loads(message)
    except ValueError:
        return
    header = document.get("_aws") if isinstance(document, dict) else None
    if not isinstance(header, dict):
        return
    for directive in header.get("CloudWatchMetrics", ()):
        for dimension_set in directive.get("Dimensions") or [[]]:
            dimensions = [
                {"Name": name, "Value": str(document[name])}
                for name in dimension_set
                if name in document
            ]
            for metric in directive.get("Metrics", ()):
                values = _numbers(document.get(metric["Name"]))
                for start in range(0, len(values), VALUES_PER_DATUM):
                    datum: Datum = {
                        "MetricName": metric["Name"],
                        "Dimensions": dimensions,
                        "Unit": metric.get("Unit", "None"),
                        "Values": values[start : start + VALUES_PER_DATUM],
                    }
                    if "Timestamp" in header:
                        datum["Timestamp"] = header["Timestamp"] / 1000
                    yield directive["Namespace"], datum


def _numbers(value: object) -> list[float]:
    values = value if isinstance(value, list) else [value]
    return [
        float(one) for one in values if isinstance(one, int | float) and not isinstance(one, bool)
    ]


class Cursor:
    """Where reading of one log group stands: gives each event out once, in whatever order."""

    def __init__(self) -> None:
        self.start_ms = 0
        self._given: dict[tuple[str, int, str, int], None] = {}

    def unread(self, events: Iterable[Mapping[str, Any]]) -> list[str]:
        """Return the messages not given out before, and move on."""
        messages: list[str] = []
        met: dict[tuple[str, int, str], int] = {}
        for event in events:
            line = (event.get("logStreamName", ""), event["timestamp"], event["message"])
            met[line] = met.get(line, 0) + 1
            mark = (*line, met[line])
            if mark not in self._given:
                self._given[mark] = None
                messages.append(event["message"])
        newest = max((mark[1] for mark in self._given), default=0)
        self.start_ms = max(self.start_ms, newest - OVERLAP_MS)
        self._given = {mark: None for mark in self._given if mark[1] >= self.start_ms}
        return messages


class Bridge:
    """A thread that carries new metric documents over, every `interval_seconds`, until stopped."""

    def __init__(
        self, client: Callable[[str], Any], log_groups: Iterable[str], interval_seconds: float = 2.0
    ) -> None:
        self._logs = client("logs")
        self._cloudwatch = client("cloudwatch")
        self._cursors = {group: Cursor() for group in log_groups}
        self._interval_seconds = interval_seconds
        self._stopping = threading.Event()
        self._one_at_a_time = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True, name="metrics-bridge")

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End; what was logged since the last pass is not carried over (call `carry` for that)."""
        self._stopping.set()
        self._thread.join(timeout=5)

    def carry(self) -> int:
        """Carry over what is new now; return the number of data sent."""
        sent = 0
        with self._one_at_a_time:
            for group, cursor in self._cursors.items():
                by_namespace: dict[str, list[Datum]] = {}
                for message in cursor.unread(self._events(group, cursor.start_ms)):
                    for namespace, datum in metric_data(message):
                        by_namespace.setdefault(namespace, []).append(datum)
                for namespace, data in by_namespace.items():
                    for start in range(0, len(data), DATA_PER_CALL):
                        self._cloudwatch.put_metric_data(
                            Namespace=namespace, MetricData=data[start : start + DATA_PER_CALL]
                        )
                    sent += len(data)
        return sent

    def _events(self, group: str, start_ms: int) -> Iterator[Mapping[str, Any]]:
        with suppress(self._logs.exceptions.ResourceNotFoundException):  # nothing logged yet
            for page in self._logs.get_paginator("filter_log_events").paginate(
                logGroupName=group, startTime=start_ms, filterPattern='"_aws"'
            ):
                yield from page["events"]

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_seconds):
            with suppress(Exception):  # metrics are a convenience here: the next pass tries again
                self.carry()
