"""Fair queues in the emulator: a standard queue delivers the messages of quiet groups before those of noisy ones.

SQS, Developer guide, "Amazon SQS fair queues": messages of a standard queue may have a `MessageGroupId`. A group is
noisy while it has more than 10 % of the messages in flight and at least 30 of them, or more than 10 % of the recent
processing time. Messages of other groups are delivered first; those of noisy groups follow, and nothing is limited. A
message without a group is a group of its own. ministack stores the group and delivers in order of sending.

AWS does not publish what "recent" is; here processing time counts half after a minute. On AWS all of it is approximate,
because each of many servers knows a part of the queue.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from importlib import import_module
from typing import Any, Final

from scripts.local_stack.internals import Internals, expect

NOISY_SHARE: Final = 0.1
LEAST_IN_FLIGHT: Final = 30
HALF_LIFE_SECONDS: Final = 60.0


class Groups:
    """The groups of one queue."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        """Recent processing time."""
        self._flying: Counter[str] = Counter()
        self._at = 0.0

    def noisy(self, flying: Counter[str], now: float) -> set[str]:
        """Return the noisy groups, given how many messages of each are in flight now."""
        self._pass(now)
        self._flying = flying
        in_flight, seconds = flying.total(), sum(self._seconds.values())
        by_messages = {
            group
            for group, count in flying.items()
            if count >= LEAST_IN_FLIGHT and count > NOISY_SHARE * in_flight
        }
        by_time = {group for group, spent in self._seconds.items() if spent > NOISY_SHARE * seconds}
        return by_messages | by_time

    def _pass(self, now: float) -> None:
        """Add the processing time since the last call, and let the earlier fade."""
        elapsed, self._at = now - self._at, now
        fading = 0.5 ** (elapsed / HALF_LIFE_SECONDS)
        left = {group: spent * fading for group, spent in self._seconds.items()}
        for group, count in self._flying.items():
            left[group] = left.get(group, 0.0) + count * elapsed
        self._seconds = {group: spent for group, spent in left.items() if spent > 0.001}  # noqa: PLR2004 - a millisecond


def deliver_fairly() -> None:
    """Have every standard queue deliver as a fair queue.

    Belongs before `emulator_runner.lift_batch_cap`, which calls the function that this replaces. Raises `LookupError`
    when the emulator does not look as expected.
    """
    sqs: Internals = import_module("ministack.services.sqs")
    collect = expect(sqs, "_collect_msgs", "q", "max_n", "vis_timeout")
    groups_of: dict[str, Groups] = defaultdict(Groups)

    def collect_fairly(queue: dict[str, Any], most: int, visibility_seconds: int) -> Any:
        messages = queue["messages"]
        if queue["is_fifo"] or not any(each.get("group_id") for each in messages):
            return collect(queue, most, visibility_seconds)
        now = time.time()
        flying = Counter(
            _group_of(each)
            for each in messages
            if each.get("receive_count") and each["visible_at"] > now
        )
        noisy = groups_of[queue["attributes"]["QueueArn"]].noisy(flying, now)
        # Sorting is stable: otherwise in order of sending, as before.
        ordered = sorted(messages, key=lambda each: _group_of(each) in noisy)
        return collect({**queue, "messages": ordered}, most, visibility_seconds)

    sqs._collect_msgs = collect_fairly  # noqa: SLF001 - it has no public face


def _group_of(message: dict[str, Any]) -> str:
    return message.get("group_id") or f"alone {message['id']}"
