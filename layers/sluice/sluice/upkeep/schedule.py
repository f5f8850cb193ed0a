"""The schedule that all of upkeep shares, as in template.yaml. A test compares them."""

from __future__ import annotations

from typing import Final

RUN_MS: Final = 60_000
"""The time from one scheduled run to the next, and the maximum duration of a run."""

UNSENT_MS: Final = 120_000
"""What a run has taken, but not confirmed as sent, is due again after this time."""

assert RUN_MS < UNSENT_MS, "a run that still sends is not overtaken by the next one"
