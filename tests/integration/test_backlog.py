"""A backlog far above the limit, in small: the promises that `python -m bench.limits.backlog` shows at full size."""

import pytest

from bench.limits.backlog import Backlogged
from sluice.domain.capacity import LEAST


def test_a_backlog_at_fifty_a_minute_does_not_churn() -> None:
    story = Backlogged("steady", jobs=3_000, seed=1).play(minutes=20)

    assert story.finished > 900, "50 a minute, and what had been saved up"
    assert story.receives <= 3 * story.finished
    assert story.most_in_flight <= 1_000
    assert story.alive_seconds <= (LEAST + 1) * 20 * 60 + 8 * 180, "ten until the governor acts"


@pytest.mark.parametrize("name", ["blocked", "capped"])
def test_jobs_of_a_blocked_group_do_not_keep_others_waiting(name: str) -> None:
    story = Backlogged(name, jobs=3_000, seed=1).play(minutes=15)

    assert 40 <= len(story.delays)
    assert max(story.delays) <= 30
