"""What the bar shows and when waiting looks again, on a clock that only these tests move."""

import io
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, Self

import pytest

from scripts.cli.bar import LiveBar
from scripts.cli.errors import CommandFailed, GatewayRefused, GatewayUnreachable
from scripts.cli.progress import PlainLines, Snapshot, Tally, dollars, span, wait_for

LIMITS = [
    {"model_group": "haiku", "learned": True, "limits": {"requests": 600}},
    {"model_group": "opus", "learned": True, "limits": {"requests": 50}},
    {"model_group": "sonnet", "learned": True, "limits": {"requests": None}},
    {"model_group": "fable", "learned": False, "limits": {"requests": 60}},
]


def job(job_id: str, state: str, model: str = "haiku", cost: int | None = None) -> dict[str, Any]:
    return {"id": job_id, "state": state, "model": model, "cost_micro_usd": cost}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds, 3))
        self.now += seconds


class Recorder:
    def __init__(self) -> None:
        self.shown: list[Snapshot] = []
        self.notes: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def show(self, snapshot: Snapshot, now: float) -> None:
        assert now >= 0
        self.shown.append(snapshot)

    def note(self, text: str) -> None:
        self.notes.append(text)


class TimedGateway:
    """Its jobs are done from a given time on; `failures` come first."""

    def __init__(self, clock: Clock, done_at: Callable[[str], float]) -> None:
        self._clock = clock
        self._done_at = done_at
        self.failures: list[CommandFailed] = []
        self.looked_for: list[list[str]] = []

    def look(self, job_ids: Sequence[str]) -> list[dict[str, Any]]:
        self.looked_for.append(list(job_ids))
        if self.failures:
            raise self.failures.pop(0)
        return [
            job(each, "succeeded" if self._clock.now >= self._done_at(each) else "running")
            for each in job_ids
        ]

    def limits(self) -> list[dict[str, Any]]:
        return LIMITS


def test_counts_follow_the_jobs() -> None:
    tally = Tally(["a", "b", "c", "d"], 0.0)

    finished = tally.note(
        [job("a", "succeeded", cost=100), job("b", "errored", cost=None), job("c", "running")], 1.0
    )
    shown = tally.snapshot(1.0)

    assert ["a", "b"] == [each["id"] for each in finished]
    assert (1, 1, 1, 1) == (shown.succeeded, shown.failed, shown.running, shown.waiting)
    assert (2, 4, 100) == (shown.done, shown.total, shown.cost_micro_usd)


def test_a_job_that_is_done_counts_once_however_often_it_is_seen() -> None:
    tally = Tally(["a"], 0.0)
    tally.note([job("a", "succeeded", cost=100)], 1.0)

    again = tally.note([job("a", "succeeded", cost=100), job("stranger", "succeeded")], 2.0)

    assert [] == again
    assert 100 == tally.snapshot(2.0).cost_micro_usd
    assert 1 == tally.snapshot(2.0).done


def test_the_rate_is_that_of_the_last_twenty_seconds() -> None:
    tally = Tally((f"job{n}" for n in range(300)), 0.0)
    tally.note((job(f"job{n}", "succeeded") for n in range(200)), 5.0)
    tally.note((job(f"job{n}", "succeeded") for n in range(200, 220)), 30.0)

    shown = tally.snapshot(30.0)

    assert 60.0 == shown.per_minute
    assert 80.0 == shown.eta_seconds


def test_there_is_no_rate_before_there_is_something_to_measure() -> None:
    tally = Tally(["a", "b"], 0.0)
    tally.note([job("a", "succeeded")], 1.0)

    shown = tally.snapshot(1.0)

    assert shown.per_minute is None
    assert shown.eta_seconds is None


def test_a_handful_of_answers_promises_no_end() -> None:
    tally = Tally((f"job{n}" for n in range(100)), 0.0)
    tally.note((job(f"job{n}", "succeeded") for n in range(9)), 10.0)
    nine = tally.snapshot(10.0).eta_seconds
    tally.note([job("job9", "succeeded")], 10.0)

    assert nine is None
    assert 90.0 == tally.snapshot(10.0).eta_seconds


def test_a_job_that_never_ran_does_not_count_as_a_request() -> None:
    tally = Tally(["a", "b"], 0.0)
    tally.note([job("a", "canceled"), job("b", "expired")], 5.0)

    shown = tally.snapshot(10.0)

    assert 0.0 == shown.per_minute
    assert 2 == shown.failed


def test_the_limit_is_the_sum_over_the_groups_the_jobs_draw_on() -> None:
    tally = Tally(["a", "b"], 0.0, group_of=lambda model: model.removesuffix("-5"))
    tally.note_limits(LIMITS)
    before = tally.snapshot(0.0).limit_per_minute
    tally.note([job("a", "running", "haiku-5")], 1.0)
    one = tally.snapshot(1.0).limit_per_minute
    tally.note([job("b", "running", "opus-5")], 2.0)
    both = tally.snapshot(2.0).limit_per_minute
    tally.note([job("b", "running", "fable-5")], 3.0)
    guessed = tally.snapshot(3.0).limit_per_minute

    # A limit that is not learned yet is a guess, and not shown as a limit.
    assert (None, 600, 650, 650) == (before, one, both, guessed)


def test_waiting_ends_when_every_job_is_done_and_hands_each_on_once() -> None:
    clock, display, done = Clock(), Recorder(), list[str]()
    gateway = TimedGateway(clock, float)

    last = wait_for(
        gateway,
        ["1", "2", "3"],
        display=display,
        on_finished=lambda jobs: done.extend(each["id"] for each in jobs),
        clock=clock,
        sleep=clock.sleep,
    )

    assert ["1", "2", "3"] == done
    assert 3 == last.succeeded
    assert 600 == display.shown[-1].limit_per_minute


def test_looks_are_seldom_while_nothing_happens_and_frequent_again_when_something_does() -> None:
    clock, done_at = Clock(), {"a": 30.0, "b": 30.0, "c": 32.0}
    gateway = TimedGateway(clock, done_at.__getitem__)

    wait_for(gateway, done_at, display=Recorder(), clock=clock, sleep=clock.sleep)

    assert [0.5, 0.75, 1.125, 1.688] == clock.slept[:4]
    assert 5.0 == max(clock.slept)
    assert [5.0, 5.0, 2.5] == clock.slept[-3:]


def test_only_unfinished_jobs_are_polled_a_hundred_at_a_time() -> None:
    clock = Clock()
    names = [f"{n}" for n in range(150)]
    gateway = TimedGateway(clock, lambda each: 0.0 if int(each) < 140 else 2.0)

    wait_for(gateway, names, display=Recorder(), clock=clock, sleep=clock.sleep)

    assert [50, 100] == sorted(len(each) for each in gateway.looked_for[:2])
    assert {10} == {len(each) for each in gateway.looked_for[2:]}


def test_thousands_of_jobs_are_polled_in_turn_and_less_often() -> None:
    clock = Clock()
    gateway = TimedGateway(clock, lambda _: 0.0)
    names = [f"{n}" for n in range(2500)]

    wait_for(gateway, names, display=Recorder(), clock=clock, sleep=clock.sleep)

    assert sorted(names) == sorted(each for names in gateway.looked_for for each in names)
    assert [0.5, 5.0, 5.0] == clock.slept


def test_a_gateway_that_is_unreachable_for_a_while_only_prolongs_the_wait() -> None:
    clock, display = Clock(), Recorder()
    gateway = TimedGateway(clock, lambda _: 0.0)
    gateway.failures = [
        GatewayUnreachable("http://127.0.0.1:9", "refused"),
        GatewayRefused(503, "api_error", "busy", None),
    ]

    last = wait_for(gateway, ["a"], display=display, clock=clock, sleep=clock.sleep)

    assert 1 == last.succeeded
    assert 2 == len(display.notes)


def test_a_key_revoked_in_the_meantime_ends_the_wait() -> None:
    clock = Clock()
    gateway = TimedGateway(clock, lambda _: 0.0)
    gateway.failures = [GatewayRefused(403, "permission_error", "no", None)]

    with pytest.raises(GatewayRefused):
        wait_for(gateway, ["a"], display=Recorder(), clock=clock, sleep=clock.sleep)


def test_a_gateway_that_stays_unreachable_ends_the_wait() -> None:
    clock = Clock()
    gateway = TimedGateway(clock, lambda _: 0.0)
    gateway.failures = [GatewayUnreachable("http://127.0.0.1:9", "refused") for _ in range(1000)]

    with pytest.raises(GatewayUnreachable):
        wait_for(gateway, ["a"], display=Recorder(), clock=clock, sleep=clock.sleep)

    assert 900.0 < clock.now < 950.0


def test_plain_lines_are_printed_every_five_seconds_and_at_the_end() -> None:
    stream = io.StringIO()
    lines = PlainLines(stream, now=lambda: datetime(2026, 12, 1, 12))  # noqa: DTZ001 - local
    tally = Tally(["a", "b"], 0.0)

    with lines:
        for second in (0.0, 1.0, 4.0, 5.0):
            lines.show(tally.snapshot(second), second)
        tally.note([job("a", "succeeded"), job("b", "errored")], 6.0)
        lines.show(tally.snapshot(6.0), 6.0)

    assert 3 == len(stream.getvalue().splitlines())
    assert stream.getvalue().splitlines()[-1] == (
        "12:00:00  2/2 done · 1 failed · 0 waiting · 0 running · 20 requests/min · $0.000000"
    )


def test_a_batch_whose_size_is_not_known_yet_is_no_batch_that_is_done() -> None:
    stream = io.StringIO()
    lines = PlainLines(stream)
    unknown = Tally([], 0.0).snapshot(0.0)

    for second in (0.0, 1.0, 2.0):
        lines.show(unknown, second)

    assert 1 == len(stream.getvalue().splitlines())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")],
)
def test_a_span_is_written_in_the_units_a_person_would_use(seconds: float, text: str) -> None:
    assert text == span(seconds)


@pytest.mark.parametrize(
    ("micro_usd", "text"), [(0, "$0.000000"), (123, "$0.000123"), (4_205_000, "$4.20")]
)
def test_money_is_written_exactly_while_it_is_little(micro_usd: int, text: str) -> None:
    assert text == dollars(micro_usd)


def test_a_terminal_gets_a_bar_and_the_counts_below_it() -> None:
    stream = io.StringIO()
    tally = Tally(["a", "b"], 0.0)
    tally.note([job("a", "succeeded", cost=123)], 1.0)

    with LiveBar(stream) as bar:
        bar.note("the gateway was away [for a moment]")
        bar.show(tally.snapshot(1.0), 1.0)

    assert "the gateway was away [for a moment]" in stream.getvalue()
    assert "1/2 done  50%" in stream.getvalue()
    assert "1 waiting" in stream.getvalue()
    assert "$0.000123" in stream.getvalue()
