"""The arithmetic of the limits benchmark: ideal times, scores from the ledger, scenarios as data."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bench.limits import chart, meters, report, scoring
from bench.limits.ideal import NeverDone, Others, Supply, earliest, ideal_seconds, supplies
from bench.limits.runners import Followed, Run, StartFrom, Task
from bench.limits.scenarios import SCENARIOS, Need, Organization, Scenario, Target, need
from scripts.claude_simulator import params_hash, read

ROOT = Path(__file__).parents[2]
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}
KEY = Organization("one", 600).key

SMALL = Scenario(
    name="small",
    title="small",
    jobs=20,
    organisations=(Organization("one", 60, output_tokens_per_minute=600),),
    target=Target(0.9, 0.1),
)


def row(body: str, outcome: str = "answered", **changes: Any) -> Mapping[str, Any]:
    """A call of the ledger, billed unless it was refused."""
    billed = outcome in {"answered", "drop_after_billing"}
    status = 429 if outcome.startswith("rate_limited") else 200
    return {
        "at": 100.0,
        "ended_at": 101.0,
        "key_id": scoring.key_id(KEY),
        "body_hash": body,
        "status": status,
        "outcome": outcome,
        "billed": billed,
        "input_tokens": 10,
        "cache_creation_input_tokens": 5,
        "output_tokens": 20,
    } | changes


def finished(**changes: Any) -> Run:
    values: dict[str, Any] = {
        "scenario": "small",
        "client": "sluice",
        "jobs": 20,
        "done": 20,
        "seconds": 10.0,
        "ideal_seconds": 10.0,
        "ideal_seconds_left": 10.0,
        "calls": scoring.Calls(20, 20, 0, 0, 0, 0),
        "starts_per_second": [],
    }
    return Run(**values | changes)


# ---------------------------------------------------------------- ideal time


def test_what_the_full_bucket_holds_takes_no_time() -> None:
    assert 0.0 == earliest(100, [Supply(100.0, ((0.0, 10.0),))])


def test_what_is_beyond_the_burst_takes_the_time_of_its_refill() -> None:
    assert 140.0 == earliest(1500, [Supply(100.0, ((0.0, 10.0),))])


def test_organizations_share_the_work() -> None:
    buckets = [Supply(10.0, ((0.0, 1.0),)), Supply(30.0, ((0.0, 3.0),))]

    assert 15.0 == earliest(100, buckets)


def test_a_revoked_key_admits_nothing_more() -> None:
    buckets = [Supply(0.0, ((0.0, 1.0),)), Supply(0.0, ((0.0, 1.0), (10.0, 0.0)))]

    # Twenty in the first ten seconds, then one a second.
    assert 15.0 == earliest(25, buckets)


def test_work_that_no_bucket_can_ever_admit_has_no_ideal_time() -> None:
    with pytest.raises(NeverDone):
        earliest(25, [Supply(5.0, ((0.0, 1.0), (10.0, 0.0)))])


def test_a_changed_limit_counts_from_its_moment_on() -> None:
    # Ten a second, from 40 s five a second, from 90 s ten again; a hundred at the start.
    [bucket] = supplies(BY_NAME["changing"], "requests")

    assert (100.0, 500.0, 750.0, 850.0) == tuple(bucket.by(at) for at in (0, 40, 90, 100))


def test_what_a_stranger_took_before_comes_off() -> None:
    bucket = Supply(0.0, ((0.0, 1.0),))
    taken = [(1.0, 1.0), (4.0, 1.0), (7.0, 1.0), (50.0, 1.0)]

    # Five for us and three for the stranger; its last call came too late to matter.
    assert 8.0 == earliest(5, [bucket], taken)


@pytest.mark.parametrize(
    ("work", "seconds"),
    [
        (Need(20, 0, 0), 10.0),  # ten of burst, then one a second
        (Need(1, 0, 400), 30.0),  # a hundred of burst, then ten tokens a second
        (Need(20, 0, 400), 30.0),  # the slowest dimension decides
    ],
)
def test_the_slowest_dimension_decides(work: Need, seconds: float) -> None:
    assert seconds == ideal_seconds(SMALL, work)


def test_output_of_other_clients_reduces_the_capacity_too() -> None:
    others = Others(output_tokens=[(2.0, 100.0)])

    assert 40.0 == ideal_seconds(SMALL, Need(1, 0, 400), others)


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("plain", 140.0),  # (1,500 - 100) / 10
        ("unequal", 70.0),  # (2,000 - 250) / 25
        ("short-burst", 149.0),  # (1,500 - 10) / 10
        ("retry-after-full", 140.0),
        ("changing", 135.0),  # 750 by 90 s, then 450 at 10 a second
        ("stranger", 90.0),  # (1,000 - 100) / 10, had it the limit for itself
    ],
)
def test_scenarios_bound_by_requests_have_the_ideal_time_of_their_requests(
    name: str, seconds: float
) -> None:
    scenario = BY_NAME[name]
    work = need(scenario, scenario.requests(1), 1)

    assert seconds == pytest.approx(ideal_seconds(scenario, work))


def test_the_token_bound_scenario_is_bound_by_tokens() -> None:
    scenario = BY_NAME["tokens"]
    work = need(scenario, scenario.requests(1), 1)

    assert (700 - 333) / 33.3 < 20 < ideal_seconds(scenario, work)
    assert ideal_seconds(scenario, work) == pytest.approx((work.output_tokens - 40_000) / 4_000)


def test_calls_that_are_cut_after_billing_are_part_of_the_work() -> None:
    scenario = BY_NAME["faults"]
    work = need(scenario, scenario.requests(1), 1)

    assert 1000 < work.requests < 1030


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize(
    ("jobs", "done", "ideal", "seconds", "expected"),
    [
        (100, 100, 50.0, 50.0, 1.0),
        (100, 100, 50.0, 100.0, 0.5),
        (100, 50, 50.0, 50.0, 0.5),  # losing half of the jobs is no way to be quick
        (100, 0, 50.0, 50.0, 0.0),
        (100, 0, 50.0, 0.0, 0.0),
    ],
)
def test_the_score_is_the_share_done_times_ideal_by_taken(
    jobs: int, done: int, ideal: float, seconds: float, expected: float
) -> None:
    assert expected == scoring.score(jobs, done, ideal, seconds)


def test_a_run_beside_a_stranger_has_two_scores() -> None:
    run = finished(done=10, seconds=20.0, ideal_seconds=8.0, ideal_seconds_left=16.0)

    assert (0.4, 0.2, 10) == (run.score, run.score_alone, run.lost)


def test_429s_of_all_kinds_are_counted() -> None:
    rows = [
        row("a", "rate_limited:requests"),
        row("a", "rate_limited:concurrency"),
        row("a", "ramp", status=429),
        row("a", "529", status=529),
        row("a"),
        row("b"),
    ]

    calls = scoring.calls_of(rows, ["a", "b"])

    assert (6, 2, 3, 1.5) == (
        calls.calls,
        calls.answered,
        calls.rate_limited,
        calls.rate_limited_per_answer,
    )


@pytest.mark.parametrize(
    ("outcomes", "twice", "avoidable"),
    [
        (["answered"], 0, 0),
        (["answered", "answered"], 1, 1),
        (["drop_after_billing", "answered"], 1, 0),  # it was unknown that it was billed
        (["drop_after_billing", "drop_after_billing", "answered"], 2, 0),
        (["drop_after_billing", "answered", "answered"], 2, 1),
        (["529", "rate_limited:requests", "answered"], 0, 0),
    ],
)
def test_a_cut_after_billing_explains_one_more_billing(
    outcomes: list[str], twice: int, avoidable: int
) -> None:
    calls = scoring.calls_of([row("a", outcome) for outcome in outcomes], ["a"])

    assert (twice, avoidable) == (calls.billed_twice, calls.avoidable)


def test_requests_that_are_none_of_the_work_are_noticed() -> None:
    assert 1 == scoring.calls_of([row("a"), row("b"), row("b")], ["a"]).foreign_bodies


def test_the_work_of_a_client_that_rewrites_requests_is_read_from_its_answers() -> None:
    rows = [
        row("x", "drop_after_billing"),
        row("x"),
        row("y"),
        row("y"),  # paid twice, needed once
        row("z", "rate_limited:requests"),
    ]

    assert Need(3, 45, 60) == scoring.need_of(rows, jobs=2)
    assert Need(6, 90, 120) == scoring.need_of(rows, jobs=4)  # half of the jobs were answered


def test_rows_are_distinguished_by_key() -> None:
    other = Organization("one", 600).stranger_key
    rows = [row("a"), row("b", key_id=scoring.key_id(other))]

    assert ["b"] == [each["body_hash"] for each in scoring.rows_of(rows, [other])]


def test_a_stranger_takes_requests_at_the_start_and_output_at_the_end() -> None:
    rows = [row("a", at=103.0, ended_at=105.0), row("b", "rate_limited:requests", at=104.0)]

    taken = scoring.taken_by(rows, began_at=100.0)

    assert [(3.0, 1.0)] == taken.requests
    assert [(3.0, 15.0)] == taken.input_tokens
    assert [(5.0, 20.0)] == taken.output_tokens


def test_starts_are_counted_by_the_second() -> None:
    assert [2, 0, 1] == scoring.per_second([9.9, 10.0, 10.9, 12.0], began_at=10.0)


def test_nothing_admitted_is_an_empty_row() -> None:
    assert [] == scoring.per_second([], began_at=10.0)


def test_a_changed_limit_is_followed_when_the_next_ten_seconds_keep_to_it() -> None:
    quick = [at / 10 for at in range(1000, 1150)]  # ten a second until 115
    slow = [115 + at / 5 for at in range(200)]  # then five

    # From 114 s on, the next ten seconds hold 10 + 45 calls: within 10 % of fifty.
    assert 2.0 == scoring.seconds_until_followed([*quick, *slow], 112.0, 5.0, until=150.0)


def test_a_limit_that_is_never_followed_says_so() -> None:
    starts = [100 + at / 10 for at in range(1000)]

    assert None is scoring.seconds_until_followed(starts, 110.0, 5.0, until=150.0)


# ---------------------------------------------------------------- scenarios


def test_the_simulator_accepts_every_scenario() -> None:
    for scenario in SCENARIOS:
        assert scenario.burst_seconds == read(scenario.simulator(7)).organisations[0].burst_seconds


def test_no_two_requests_are_alike() -> None:
    scenario = BY_NAME["stranger"]
    requests = [*scenario.requests(1), *scenario.requests(1, stranger=True)]

    assert 1500 == len({params_hash(params) for params in requests})


def test_prompts_have_thirty_to_two_hundred_words() -> None:
    lengths = [
        len(params["messages"][0]["content"].split()) for params in BY_NAME["plain"].requests(1)
    ]

    assert (30, 200) == (min(lengths), max(lengths))


def test_the_same_seed_gives_the_same_work() -> None:
    scenario = BY_NAME["tokens"]

    assert scenario.requests(3) == scenario.requests(3)
    assert scenario.requests(3) != scenario.requests(4)


def test_a_smoke_has_fewer_jobs_and_sooner_changes() -> None:
    small = BY_NAME["changing"].scaled(0.25)

    assert 300 == small.jobs
    assert [10.0, 22.5] == [change.after_seconds for change in small.changes]
    assert {"org-b": 7.5} == BY_NAME["faults"].scaled(0.25).revoked_after_seconds


def test_what_happens_midway_is_posted_in_order() -> None:
    assert [(30.0, {"revoke": ["sk-ant-test-org-b"]})] == BY_NAME["faults"].events()
    assert [40.0, 90.0] == [after for after, _ in BY_NAME["changing"].events()]


def test_a_run_is_broken_off_after_four_times_the_ideal_time_and_a_minute() -> None:
    # The stranger's work takes its share of the time: (1,500 - 100) / 10 = 140 s.
    assert 4 * 140 + 60 == pytest.approx(Task.of(BY_NAME["stranger"], 1).hard_seconds)


# ---------------------------------------------------------------- meters and report


def test_processor_time_is_read_whatever_the_process_is_called() -> None:
    stat = "42 (py) thon)) S 1 42 42 0 -1 4194560 9 0 0 0 150 50 0 0 20 0 1 0 1 1 1"

    assert 2.0 == meters.cpu_seconds(stat, lambda: 100)


def log(stream: str, message: str, at: float) -> Mapping[str, Any]:
    return {"logStreamName": stream, "message": message, "timestamp": at * 1000}


def test_invocations_are_read_from_the_log_with_what_the_worker_noted() -> None:
    note = json.dumps({"message": "batch done", "messages": 50, "limiter_writes": 3})
    report_line = "REPORT RequestId: x\tDuration: 2500 ms\tBilled Duration: 2500 ms"
    events = [
        log("one", "START RequestId: x", 103.0),
        log("two", "START RequestId: y", 103.0),
        log("one", note, 103.0),
        log("one", report_line, 103.0),
        log("two", report_line, 103.0),
        log("one", "START RequestId: z", 101.0),
        log("one", report_line, 101.0),  # it began before the clock did
    ]

    found = list(meters.invocations(events, began_at=100.0))

    assert [2.5, 2.5] == [each.seconds for each in found]
    assert [50] == [batch["messages"] for each in found for batch in each.batches]


def test_sluice_misses_what_it_does_not_reach() -> None:
    run = finished(
        done=19,
        seconds=20.0,
        calls=scoring.Calls(20, 10, 2, 1, 1, 0),
        followed=[Followed(300, 12.0), Followed(600, 31.0), Followed(900, None)],
    )

    assert 6 == len(report.misses(run, SMALL))
    assert [] == report.misses(finished(), SMALL)


@pytest.mark.parametrize(
    ("cpu_seconds", "writes", "missed"),
    [(0.2, 3, 0), (0.21, 3, 1), (0.2, 4, 1), (None, None, 0)],
)
def test_sluice_is_to_stay_within_its_means(
    cpu_seconds: float | None, writes: int | None, missed: int
) -> None:
    spent = meters.Spent(cpu_seconds, 1.0, 4, 2, 10.0, 20, writes, 3)

    # Twenty jobs: 10 s and 150 writes per 1,000 are 0.2 s and 3.
    assert missed == len(report.misses(finished(spent=spent), SMALL))


def test_other_clients_have_nothing_to_reach() -> None:
    assert [] == report.misses(finished(client="sdk", done=0), SMALL)


def test_rows_of_sluice_name_their_workers() -> None:
    [sluice, sdk] = report.rows([finished(workers=20, door="jobs"), finished(client="sdk")])

    assert "sluice jobs, 20 workers" == report.cells(sluice, SMALL)[1]
    assert "sdk" == report.cells(sdk, SMALL)[1]


def test_a_line_shows_the_median_score_of_each_start() -> None:
    runs = [
        finished(workers=4, door="batches", start=start, seconds=seconds)
        for start, seconds in (
            (StartFrom.COLD, 20.0),
            (StartFrom.WARM, 12.5),
            (StartFrom.WARM, 10.0),
            (StartFrom.WARM, 11.0),
        )
    ]

    [line] = report.rows(runs)

    assert ("90.9%", "50.0%") == report.cells(line, SMALL)[2:4]
    assert "11.0 (10.0)" in report.cells(line, SMALL)


def test_batches_behind_jobs_and_cold_behind_warm_are_said() -> None:
    def batches(start: StartFrom, seconds: float) -> Run:
        return finished(workers=4, door="batches", start=start, seconds=seconds)

    jobs = finished(workers=4, door="jobs", start=StartFrom.WARM)

    assert [] == report.comparisons([jobs, batches(StartFrom.WARM, 10.2)])
    [behind_jobs] = report.comparisons([jobs, batches(StartFrom.WARM, 12.5)])
    assert "20.0% behind jobs" in behind_jobs
    [behind_warm] = report.comparisons(
        [batches(StartFrom.WARM, 10.0), batches(StartFrom.COLD, 12.5)]
    )
    assert "cold 20.0% behind warm" in behind_warm


def test_the_table_is_put_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "bench.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", encoding="utf-8")
    block = report.markdown([finished()], {"small": SMALL}, "about")

    report.write_between_markers(page, block)
    report.write_between_markers(page, block)

    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{report.BEGIN}\n\nabout\n")
    assert text.endswith(f"\n{report.END}\nafter\n")
    assert 1 == text.count(
        f"| small | sluice | 100.0% | {report.NONE} | 0 | 0.000 | 0 (0) | 10.0 (10.0) |"
    )
    assert "\nold\n" not in text


def test_a_page_without_markers_is_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "bench.md"
    page.write_text("text", encoding="utf-8")

    with pytest.raises(report.NoMarkers):
        report.write_between_markers(page, "block")


def test_everything_measured_can_be_written_as_json() -> None:
    [row_] = json.loads(report.as_json([finished()], "about"))["runs"]

    assert (1.0, 0, 20) == (row_["score"], row_["lost"], row_["calls"]["answered"])


def test_the_page_names_every_scenario_client_and_column() -> None:
    page = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8")

    assert report.BEGIN in page
    assert report.END in page
    for scenario in SCENARIOS:
        pattern = rf"^\| {re.escape(scenario.title)} \| `{scenario.name}` \| {scenario.jobs:,} \|"
        assert re.search(pattern, page, re.MULTILINE)
    for head in report.HEADS[2:]:
        assert f"\n| {head} |" in page


def test_the_picture_shows_the_recorded_results() -> None:
    page = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8")

    picture = (ROOT / "docs" / "limits.svg").read_text(encoding="utf-8")
    assert chart.picture(chart.recorded(page)) == picture


def test_the_picture_adds_the_lost_jobs_and_takes_the_mean_of_the_429s() -> None:
    calls = scoring.Calls(20, 20, 10, 0, 0, 0)
    runs = [
        finished(scenario="plain", client="sluice", workers=2, done=1),
        finished(scenario="plain", client="sluice", workers=4),
        finished(scenario="plain", client="sdk", done=15, calls=calls),
        finished(scenario="tokens", client="sluice", workers=4),
        finished(scenario="tokens", client="sdk", done=18),
    ]

    texts = re.findall(r">([^<\n]+)</text>", chart.picture(chart.of_runs(runs)))

    assert texts == [
        "Same jobs, same rate limits (2 scenarios)",
        *("Jobs lost, of 40", "0", "7"),
        *("429s per answer, mean", "0.00", "0.25"),
        *("Sluice", "Anthropic SDK, ten retries"),
    ]
