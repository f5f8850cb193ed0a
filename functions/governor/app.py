"""Woken every minute: loads limits, sets concurrencies, sends what is due again, starts steps of upstream batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sluice.wiring import governor as wiring
from sluice.wiring import shared

if TYPE_CHECKING:
    from aws_lambda_powertools.utilities.typing import LambdaContext

SAFETY_MS: Final = 10_000
"""What remains of the invocation for the last step of a sweep."""


def handler(event: dict[str, Any], context: LambdaContext) -> None:  # noqa: ARG001 - Lambda's signature
    """Load, govern, sweep jobs, start steps, then sweep ranges; none waits for another to succeed."""
    stop_at = shared.CLOCK.now() + context.get_remaining_time_in_millis() - SAFETY_MS
    try:
        try:
            try:
                wiring.load_limits()()
            finally:
                wiring.governor()()
        finally:
            try:
                wiring.sweep()(stop_at)
            finally:
                try:
                    wiring.start_steps()()
                finally:
                    wiring.resume()(stop_at)
    finally:
        shared.telemetry().flush()
