"""The names of the metrics that the code emits. A test compares them with the dashboard and the alarms."""

from __future__ import annotations

from typing import Final

NAMESPACE: Final = "Sluice"

TOTALS: Final = frozenset(
    {
        "JobsAccepted",
        "JobsSucceeded",
        "JobsErrored",
        "JobsExpired",
        "JobsCanceled",
        "StartDelaySeconds",
        "SpendUsd",
        "UnknownCosts",
        "AccessDenied",
        "KeysRejected",
        "OldKeys",
        "GroupsParked",
        "DeadLetters",
        "UpstreamCalls",
        "RateLimited",
        "Overloaded",
        "UpstreamErrors",
        "WebhooksDelivered",
        "WebhooksGivenUp",
    }
)
"""With the dimension `service` only: the name of the stack."""

BY_MODEL_GROUP: Final = frozenset(
    {"Calls", "CallSeconds", "InputTokens", "CacheReadTokens", "OutputTokens"}
)
"""With the dimensions `service` and `model_group`."""

METRIC_NAMES: Final = TOTALS | BY_MODEL_GROUP

SAMPLED: Final = frozenset({"StartDelaySeconds", "CallSeconds"})
"""Emitted value by value, for percentiles; all others are summed first."""
