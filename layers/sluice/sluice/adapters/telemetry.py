"""Logs and metrics through Powertools: one JSON line per event, metrics summed per invocation and emitted as EMF."""

from __future__ import annotations

import logging
import sys
import threading
from collections import defaultdict
from typing import Any, Final

from aws_lambda_powertools import Logger
from aws_lambda_powertools.metrics import EphemeralMetrics, MetricUnit

from sluice.adapters import aws
from sluice.ports.metrics import METRIC_NAMES, NAMESPACE, SAMPLED

VALUES_AT_ONCE: Final = 99
"""EMF allows 100 values of a metric in one document; Powertools emits the document at the hundredth."""


CHATTY: Final = ("httpx2", "anthropic")
"""Libraries that log one INFO line per call, with its URL."""


def quiet_libraries() -> None:
    """Log only warnings of chatty libraries; Sluice logs its own lines."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)


class Telemetry:
    """Metrics and logs of one function; call `flush` at the end of every invocation."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._lock = threading.Lock()
        self._values: dict[tuple[str | None, str], list[float]] = defaultdict(list)

    def count(self, metric: str, value: float = 1, model_group: str | None = None) -> None:
        """Add to a metric."""
        if metric not in METRIC_NAMES:
            raise ValueError(f"metric {metric!r} is not in sluice/ports/metrics.py")
        with self._lock:
            values = self._values[model_group, metric]
            if values and metric not in SAMPLED:
                values[0] += value
            else:
                values.append(value)

    def note(self, event: str, **facts: object) -> None:
        """Log a fixed phrase with facts as keys."""
        self._logger.info(event, extra=_known(facts))

    def problem(self, event: str, **facts: object) -> None:
        """Log a fixed phrase as a warning, with the traceback if there is one."""
        self._logger.warning(event, extra=_known(facts), exc_info=sys.exc_info()[0] is not None)

    def flush(self) -> None:
        """Emit all collected metrics: one document for the totals, one per model group.

        Calls that AWS refused are reported here, once per invocation, because their errors may have been handled.
        """
        if refused := aws.take_refused():
            self.problem("AWS refused calls: the function's role lacks a permission", calls=refused)
            self.count("AccessDenied", sum(refused.values()))
        with self._lock:
            values, self._values = self._values, defaultdict(list)
        for model_group in sorted({group for group, _ in values}, key=str):
            of_group = {
                metric: numbers
                for (group, metric), numbers in values.items()
                if group == model_group
            }
            most = max(map(len, of_group.values()))
            for start in range(0, most, VALUES_AT_ONCE):
                self._emit(model_group, of_group, start)

    def _emit(self, model_group: str | None, values: dict[str, list[float]], start: int) -> None:
        # The service is the name of the stack, which the template sets in Powertools' own variable.
        metrics = EphemeralMetrics(namespace=NAMESPACE, service=self._logger.service)
        if model_group is not None:
            metrics.add_dimension("model_group", model_group)
        for metric, numbers in values.items():
            for number in numbers[start : start + VALUES_AT_ONCE]:
                metrics.add_metric(metric, _unit(metric), number)
        metrics.flush_metrics()


def _unit(metric: str) -> MetricUnit:
    if metric.endswith("Seconds"):
        return MetricUnit.Seconds
    return MetricUnit.NoUnit if metric.endswith("Usd") else MetricUnit.Count


def _known(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: fact for name, fact in facts.items() if fact is not None}
