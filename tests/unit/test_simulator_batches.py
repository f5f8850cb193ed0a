"""What the simulator makes of Message Batches, with the clock in the test's hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from scripts.claude_simulator.accounts import Caller, Refused
from scripts.claude_simulator.batches import Batch, drawn_duration, is_slow, read_items
from scripts.claude_simulator.checks import RequestError
from scripts.claude_simulator.engine import Call, Engine
from scripts.claude_simulator.limits import SECOND
from scripts.claude_simulator.settings import Regime, Regimes, SettingsError, read

KEY, OTHER_KEY = "sk-ant-test-one", "sk-ant-test-two"
OLD, NEW = "2023-06-01", "2026-10-21"
HOUR = 3600 * SECOND
DAY = 24 * HOUR


class Hands:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1_795_400_000 * SECOND

    def __call__(self) -> int:
        return self.now


class Claude:
    """An engine with a hand-moved clock and short ways to send batches."""

    def __init__(self, **settings: Any) -> None:
        self.clock = Hands()
        service = {"ttft_seconds": 0, "tokens_per_second": None, "output_tokens_sigma": 0}
        batches = {"seconds": 10, **settings.pop("batches", {})}
        self.engine = Engine(read({"service": service, "batches": batches, **settings}), self.clock)

    def caller(self, key: str = KEY, version: str = NEW) -> Caller:
        caller = self.engine.authenticate(key, version)
        assert isinstance(caller, Caller)
        return caller

    def try_create(
        self, requests: list[dict[str, Any]], key: str = KEY, version: str = NEW, beta: str = ""
    ) -> Batch | Refused:
        caller = self.caller(key, version)
        refused = self.engine.batch_call(caller)
        assert refused is None
        items = list(read_items(json.dumps({"requests": requests}).encode()))
        return self.engine.create_batch(caller, items, beta)

    def create(self, requests: list[dict[str, Any]], version: str = NEW, beta: str = "") -> Batch:
        batch = self.try_create(requests, version=version, beta=beta)
        assert isinstance(batch, Batch), batch
        return batch

    def shown(self, batch: Batch) -> dict[str, Any]:
        return batch.as_json(self.engine.batches.now(), "somewhere")

    def after(self, seconds: float) -> None:
        """Let time pass and do what is due."""
        self.clock.now += round(seconds * SECOND)
        self.engine.advance_batches()

    def results(self, batch: Batch) -> dict[str, dict[str, Any]]:
        lines = [self.engine.result(item) for item in self.engine.batches.results(batch)]
        return {line["custom_id"]: line["result"] for line in lines}

    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = self.engine.stats()["organisations"]["org-one"]["batches"]
        return found


def params(text: str = "hello", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "claude-opus-5", "max_tokens": 100, "messages": messages, **more}


def request(custom_id: str, **more: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "params": params(custom_id, **more)}


def requests(count: int) -> list[dict[str, Any]]:
    return [request(f"row-{number}") for number in range(count)]


def types(results: dict[str, dict[str, Any]]) -> dict[str, int]:
    found = [result["type"] for result in results.values()]
    return {name: found.count(name) for name in sorted(set(found))}


def organisation(**more: Any) -> list[dict[str, Any]]:
    return [{"id": "org-one", "keys": [KEY], **more}]


# -- a life -----------------------------------------------------------------------------------


def test_a_new_batch_is_all_processing_and_has_a_day() -> None:
    claude = Claude()
    shown = claude.shown(claude.create(requests(3)))

    assert shown == {
        "id": shown["id"],
        "type": "message_batch",
        "processing_status": "in_progress",
        "request_counts": {
            "processing": 3,
            "succeeded": 0,
            "errored": 0,
            "canceled": 0,
            "expired": 0,
        },
        "created_at": "2026-11-23T02:13:20.000000Z",
        "expires_at": "2026-11-24T02:13:20.000000Z",
        "ended_at": None,
        "cancel_initiated_at": None,
        "archived_at": None,
        "results_url": None,
    }
    assert shown["id"].startswith("msgbatch_")


def test_counts_stay_as_they_were_until_the_whole_batch_ends() -> None:
    claude = Claude()
    batch = claude.create(requests(10))
    claude.after(9.9)
    before = claude.shown(batch)
    claude.after(0.1)
    after = claude.shown(batch)

    assert before["request_counts"]["processing"] == 10
    assert claude.stats()["items"]["answered"] == 10
    assert after["request_counts"] == {
        "processing": 0,
        "succeeded": 10,
        "errored": 0,
        "canceled": 0,
        "expired": 0,
    }
    assert (after["processing_status"], after["results_url"]) == ("ended", "somewhere")
    assert after["ended_at"] == "2026-11-23T02:13:30.000000Z"


def test_a_batch_is_worked_off_evenly_and_in_the_ledger_as_it_goes() -> None:
    claude = Claude(batches={"seconds": None, "items_per_second": 2, "start_seconds": 5})
    claude.create(requests(10))
    done = []
    for seconds in (5, 1, 1, 2):
        claude.after(seconds)
        done.append(len(list(claude.engine.ledger())))

    assert done == [0, 2, 4, 8]
    assert claude.stats()["queued_requests"] == 2


def test_a_batch_that_takes_no_time_still_waits_for_its_start() -> None:
    claude = Claude(batches={"seconds": None, "items_per_second": None, "start_seconds": 5})
    batch = claude.create(requests(4))
    claude.after(4)
    assert claude.shown(batch)["processing_status"] == "in_progress"
    claude.after(1)
    assert claude.shown(batch)["processing_status"] == "ended"
    assert types(claude.results(batch)) == {"succeeded": 4}


def test_the_pace_is_kept_when_only_so_many_are_done_at_once() -> None:
    claude = Claude(batches={"seconds": 0})
    batch = claude.create(requests(7))

    assert [claude.engine.advance_batches(3) for _ in range(4)] == [True, True, False, False]
    assert batch.status == "ended"


def test_an_answer_in_a_batch_is_the_answer_of_the_messages_api() -> None:
    claude, live = Claude(), Claude()
    asked = params("the same", thinking={"type": "adaptive"})
    batch = claude.create([{"custom_id": "one", "params": asked}])
    claude.after(10)
    message = claude.results(batch)["one"]["message"]
    body = json.dumps(asked).encode()
    call = live.engine.message(live.caller(), body, "req_1")

    assert isinstance(call, Call)
    assert message["usage"].pop("service_tier") == "batch"
    expected = call.message()
    assert expected["usage"].pop("service_tier") == "standard"
    assert message == expected


def test_results_are_in_an_order_that_the_seed_decides() -> None:
    def order(seed: int, asked: list[dict[str, Any]]) -> list[str]:
        claude = Claude(seed=seed)
        batch = claude.create(asked)
        claude.after(10)
        return list(claude.results(batch))

    asked = requests(20)
    names = [one["custom_id"] for one in asked]
    assert sorted(order(1, asked)) == sorted(names)
    assert order(1, asked) != names
    assert order(1, asked) == order(1, asked[::-1])
    assert order(1, asked) != order(2, asked)


def test_a_batch_takes_nothing_from_the_limits_of_messages() -> None:
    limits = {"default": {"rpm": 1, "itpm": 100, "otpm": 100}}
    claude = Claude(organisations=organisation(limits=limits))
    batch = claude.create(requests(50))
    claude.after(10)
    call = claude.engine.message(claude.caller(), json.dumps(params()).encode(), "req_1")

    assert types(claude.results(batch)) == {"succeeded": 50}
    assert isinstance(call, Call)


# -- what is wrong with a request shows at the end ----------------------------------------------


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"stream": True}, "stream"),
        ({"speed": "fast"}, "speed"),
        ({"store": True}, "store"),
        ({"previous_thread_event_id": "x"}, "previous_thread_event_id"),
        ({"cache_hint": {}}, "cache_hint"),
        ({"context_hint": {}}, "context_hint"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 200_000}, "maximum allowed number of output tokens"),
        ({"temperature": 1.0}, "not supported under anthropic-version 2026-10-21"),
        ({"messages": []}, "at least one message"),
        ({"metadata": {"user_id": "sim:nonsense"}}, "unknown marker"),
    ],
)
def test_params_that_may_not_be_are_errored_at_the_end(more: dict[str, Any], said: str) -> None:
    claude = Claude()
    batch = claude.create([request("bad", **more), request("good")])
    claude.after(10)
    results = claude.results(batch)
    error = results["bad"]["error"]

    assert results["good"]["type"] == "succeeded"
    assert results["bad"]["type"] == "errored"
    assert (error["type"], error["request_id"]) == ("error", None)
    assert error["error"]["type"] == "invalid_request_error"
    assert said in error["error"]["message"]
    assert claude.shown(batch)["request_counts"]["errored"] == 1


def test_an_unknown_model_is_not_found_in_its_result_only() -> None:
    claude = Claude()
    batch = claude.create([request("none", model="claude-none")])
    claude.after(10)

    assert claude.results(batch)["none"]["error"]["error"] == {
        "type": "not_found_error",
        "message": "model: claude-none",
    }


def test_the_version_of_a_batch_holds_for_its_requests() -> None:
    claude = Claude()
    old, new = (
        claude.create([request(f"v-{version}", temperature=0.5)], version) for version in (OLD, NEW)
    )
    claude.after(10)

    assert claude.results(old)[f"v-{OLD}"]["type"] == "succeeded"
    assert claude.results(new)[f"v-{NEW}"]["type"] == "errored"


def test_a_fallback_credit_is_accepted_and_ignored() -> None:
    claude = Claude()
    batch = claude.create([request("credit", fallback_credit_token="sk-ant-test-credit")])
    claude.after(10)

    assert claude.results(batch)["credit"]["type"] == "succeeded"


@pytest.mark.parametrize(
    ("model", "expected"), [("claude-opus-5", "succeeded"), ("claude-haiku-4-5", "errored")]
)
def test_the_beta_for_long_answers_permits_more_output_for_newer_models(
    model: str, expected: str
) -> None:
    claude = Claude()
    asked = [request("long", model=model, max_tokens=300_000)]
    batch = claude.create(asked, beta="output-300k-2026-03-24")
    claude.after(10)

    assert claude.results(batch)["long"]["type"] == expected


# -- faults -----------------------------------------------------------------------------------


# -- completion times -------------------------------------------------------------------------


def share_beyond(seconds: float, median: float, sigma: float) -> float:
    """Return the share of a lognormal distribution beyond a time, from the error function."""
    return math.erfc(math.log(seconds / median) / (sigma * math.sqrt(2))) / 2


@pytest.mark.parametrize(
    ("slow_day_rate", "median", "sigma", "published"),
    [
        # Minutes at 95 %, and the shares beyond 1 h, 6 h and 24 h, as reports of users were summed up.
        (0, 7, 1.68, (110, 0.10, 0.01, 0.0007)),
        (1, 21, 2.2, (13 * 60, 0.32, 0.10, 0.03)),
    ],
    ids=["normal", "slow"],
)
@pytest.mark.parametrize("speed", [1, 60])
def test_completion_times_are_those_that_users_report(
    slow_day_rate: float,
    median: float,
    sigma: float,
    published: tuple[float, float, float, float],
    speed: float,
) -> None:
    regimes = Regimes(speed=speed, slow_day_rate=slow_day_rate)
    count = 40_000
    minutes = sorted(
        drawn_duration(regimes, 1, number * HOUR, number) / 60 / SECOND * speed
        for number in range(count)
    )

    assert minutes[0] == pytest.approx(1)
    assert minutes[count // 2] == pytest.approx(median, rel=0.03)
    assert minutes[count * 95 // 100] == pytest.approx(published[0], rel=0.05)
    for hours, rounded in zip((1, 6, 24), published[1:], strict=True):
        expected = share_beyond(hours * 60, median, sigma)
        deviation = math.sqrt(expected * (1 - expected) / count)
        found = sum(each > hours * 60 for each in minutes) / count
        assert found == pytest.approx(expected, abs=4 * deviation)
        # The table has one or two digits.
        assert expected == pytest.approx(rounded, rel=0.15)


def test_the_regime_is_that_of_the_day_and_two_of_seven_days_are_slow() -> None:
    slow = [is_slow(Regimes(), 1, day) for day in range(7_000)]
    fast, late = (
        Regimes(normal=always(60), slow=always(3600), slow_day_rate=rate) for rate in (0, 1)
    )
    mixed = Regimes(normal=always(60), slow=always(3600))
    day = slow.index(True)

    assert sum(slow) == pytest.approx(2_000, abs=150)
    assert {60 * SECOND} == {drawn_duration(fast, 1, number, number) for number in range(9)}
    assert {HOUR} == {drawn_duration(late, 1, number, number) for number in range(9)}
    assert {HOUR} == {drawn_duration(mixed, 1, day * DAY + hour * HOUR, 7) for hour in range(24)}
    assert {1, 60} == {
        drawn_duration(mixed, 1, number * DAY, 7) // (60 * SECOND) for number in range(20)
    }


def always(seconds: float) -> Regime:
    return Regime(median_seconds=seconds, sigma=0, at_least_seconds=0)


def test_a_completion_time_depends_on_seed_day_and_number_only() -> None:
    regimes = Regimes()
    first = drawn_duration(regimes, 1, 0, 1)

    assert first == drawn_duration(regimes, 1, DAY - 1, 1)
    others = {drawn_duration(regimes, *each) for each in ((2, 0, 1), (1, DAY, 1), (1, 0, 2))}
    assert first not in others
    assert 3 == len(others)


def test_a_batch_takes_the_time_of_its_regime_and_its_requests_end_evenly() -> None:
    regimes = {"speed": 60, "slow_day_rate": 0, "normal": {"median_seconds": 6000, "sigma": 0}}
    claude = Claude(batches={"regimes": regimes})
    batch = claude.create(requests(10))
    claude.engine.configure({"batches": {"regimes": {"speed": 1}}})
    claude.after(50)
    half = claude.stats()["items"]["answered"]
    claude.after(49.9)
    before = batch.status
    claude.after(0.1)

    assert (5, "in_progress", "ended") == (half, before, batch.status)


def test_requests_expire_after_the_day_of_their_regime() -> None:
    sure = {"median_seconds": 2 * 86_400, "sigma": 0}
    claude = Claude(batches={"regimes": {"speed": 1440, "normal": sure, "slow": sure}})
    batch = claude.create(requests(10))
    claude.after(60)

    assert "ended" == batch.status
    assert {"expired": 5, "succeeded": 5} == types(claude.results(batch))
    assert claude.shown(batch)["expires_at"] == "2026-11-23T02:14:20.000000Z"


def test_requests_err_and_expire_by_rate_and_the_seed_says_which() -> None:
    def fates(seed: int) -> dict[str, str]:
        claude = Claude(seed=seed, batches={"errored_rate": 0.3, "expired_rate": 0.2})
        batch = claude.create(requests(200))
        claude.after(10)
        return {name: result["type"] for name, result in claude.results(batch).items()}

    one = fates(1)
    counts = [list(one.values()).count(name) for name in ("succeeded", "errored", "expired")]
    assert one == fates(1) != fates(2)
    assert 80 < counts[0] < 120
    assert 40 < counts[1] < 80
    assert 20 < counts[2] < 60


def test_faults_change_while_a_batch_runs_and_its_speed_does_not() -> None:
    claude = Claude()
    batch = claude.create(requests(10))
    claude.after(5)
    claude.engine.configure({"batches": {"errored_rate": 1, "seconds": 3600}})
    claude.after(5)

    assert types(claude.results(batch)) == {"errored": 5, "succeeded": 5}


@pytest.mark.parametrize(
    ("marker", "error"),
    [
        ("529", "overloaded_error"),
        ("500", "api_error"),
        ("sse_error", "overloaded_error"),
        ("drop_before_billing", "api_error"),  # no connection that could break
    ],
)
def test_a_marker_fails_a_request_once(marker: str, error: str) -> None:
    claude = Claude()
    asked = [request("marked", metadata={"user_id": f"sim:{marker}x1"})]
    first, second = claude.create(asked), claude.create(asked)
    claude.after(10)

    assert claude.results(first)["marked"]["error"]["error"]["type"] == error
    assert claude.results(second)["marked"]["type"] == "succeeded"


def test_a_kind_of_answer_can_be_asked_for() -> None:
    claude = Claude()
    batch = claude.create([request("no", metadata={"user_id": "sim:refusal"})])
    claude.after(10)

    assert claude.results(batch)["no"]["message"]["stop_reason"] == "refusal"


# -- cancel, expire, archive, delete --------------------------------------------------------------


def test_a_canceled_batch_ends_with_what_it_had_done() -> None:
    claude = Claude()
    batch = claude.create(requests(10))
    claude.after(4)
    claude.engine.batches.cancel(batch)
    canceling = claude.shown(batch)
    claude.after(0.9)
    still = claude.shown(batch)
    claude.after(0.1)

    assert canceling["processing_status"] == still["processing_status"] == "canceling"
    assert canceling["cancel_initiated_at"] == "2026-11-23T02:13:24.000000Z"
    assert still["request_counts"]["processing"] == 10
    assert claude.shown(batch)["processing_status"] == "ended"
    assert claude.shown(batch)["ended_at"] == "2026-11-23T02:13:25.000000Z"
    assert types(claude.results(batch)) == {"canceled": 6, "succeeded": 4}
    assert {"type": "canceled"} in claude.results(batch).values()


def test_to_cancel_twice_changes_nothing_and_an_ended_batch_cannot_be() -> None:
    claude = Claude()
    batch = claude.create(requests(2))
    claude.engine.batches.cancel(batch)
    claude.after(0.5)
    claude.engine.batches.cancel(batch)
    initiated = batch.cancel_initiated_at
    claude.after(0.5)

    assert initiated == claude.clock.now - SECOND
    with pytest.raises(RequestError, match="has ended"):
        claude.engine.batches.cancel(batch)


def test_what_is_not_done_after_a_day_expires() -> None:
    claude = Claude(batches={"seconds": 48 * 3600})
    batch = claude.create(requests(10))
    claude.after(24 * 3600 - 1)
    before = batch.status
    claude.after(1)

    assert (before, batch.status) == ("in_progress", "ended")
    assert claude.shown(batch)["ended_at"] == claude.shown(batch)["expires_at"]
    assert types(claude.results(batch)) == {"expired": 5, "succeeded": 5}


def test_the_batch_clock_can_be_moved_and_the_books_stay_on_time() -> None:
    claude = Claude(batches={"seconds": 48 * 3600})
    batch = claude.create(requests(2))
    claude.engine.batches.move_clock(DAY)
    claude.engine.advance_batches()
    row = next(claude.engine.ledger())

    assert batch.status == "ended"
    assert row["ended_at"] == row["at"] == claude.clock.now / SECOND
    assert claude.engine.stats()["batch_clock"]["ahead_seconds"] == 86_400


def test_results_go_after_29_days_and_the_batch_stays() -> None:
    claude = Claude()
    batch = claude.create(requests(2))
    claude.after(10)
    claude.engine.batches.move_clock(29 * DAY - 11 * SECOND)
    kept = len(claude.results(batch))
    claude.after(1)
    shown = claude.shown(batch)

    assert kept == 2
    assert shown["results_url"] is None
    assert shown["archived_at"] == "2026-12-22T02:13:20.000000Z"
    assert shown["request_counts"]["succeeded"] == 2
    assert claude.engine.batches.find(claude.caller(), batch.id) is batch
    with pytest.raises(RequestError, match="archived") as caught:
        claude.results(batch)
    assert caught.value.failure.status == 404


def test_results_and_delete_wait_for_the_end() -> None:
    claude = Claude()
    batch, caller = claude.create(requests(2)), claude.caller()
    for too_early in (
        claude.engine.batches.results,
        lambda b: claude.engine.batches.delete(caller, b),
    ):
        with pytest.raises(RequestError, match="in_progress") as caught:
            too_early(batch)
        assert caught.value.failure.status == 400
    claude.after(10)
    claude.engine.batches.delete(caller, batch)

    with pytest.raises(RequestError) as deleted:
        claude.engine.batches.find(caller, batch.id)
    assert deleted.value.failure.status == 404


# -- who sees what, and when ---------------------------------------------------------------------


def test_only_keys_of_the_same_workspace_see_a_batch() -> None:
    organisations = organisation(workspaces={"wrkspc_two": {"keys": [OTHER_KEY]}})
    organisations[0]["keys"].append("sk-ant-test-three")
    organisations.append({"id": "org-two", "keys": ["sk-ant-test-four"]})
    claude = Claude(organisations=organisations)
    batch = claude.create(requests(1))
    batches = claude.engine.batches

    assert batches.find(claude.caller("sk-ant-test-three"), batch.id) is batch
    for stranger in (OTHER_KEY, "sk-ant-test-four"):
        with pytest.raises(RequestError):
            batches.find(claude.caller(stranger), batch.id)
        assert batches.page(claude.caller(stranger), {}) == ([], False)


def test_a_batch_just_made_may_not_be_found_yet() -> None:
    claude = Claude(batches={"not_found_seconds": 2})
    batch, caller = claude.create(requests(1)), claude.caller()
    with pytest.raises(RequestError) as caught:
        claude.engine.batches.read(caller, batch.id, claude.engine.settings)
    claude.after(2)

    assert caught.value.failure.status == 404
    assert claude.engine.batches.read(caller, batch.id, claude.engine.settings) is batch


def test_a_batch_may_flicker_and_the_seed_says_when() -> None:
    def reads(seed: int) -> list[bool]:
        claude = Claude(seed=seed, batches={"not_found_rate": 0.5})
        batch, caller = claude.create(requests(1)), claude.caller()
        seen = []
        for _ in range(40):
            try:
                claude.engine.batches.read(caller, batch.id, claude.engine.settings)
                seen.append(True)
            except RequestError:
                seen.append(False)
        return seen

    assert reads(1) == reads(1) != reads(2)
    assert 10 < sum(reads(1)) < 30


def test_lists_are_newest_first_and_go_both_ways() -> None:
    claude = Claude()
    ids = [claude.create(requests(1)).id for _ in range(7)][::-1]

    def page(**query: str) -> tuple[list[str], bool]:
        found, more = claude.engine.batches.page(claude.caller(), query)
        return [batch.id for batch in found], more

    assert page() == (ids, False)
    assert page(limit="3") == (ids[:3], True)
    assert page(limit="3", after_id=ids[2]) == (ids[3:6], True)
    assert page(limit="3", after_id=ids[5]) == (ids[6:], False)
    assert page(limit="3", before_id=ids[5]) == (ids[2:5], True)
    assert page(limit="3", before_id=ids[2]) == (ids[:2], False)


def test_a_page_goes_on_after_a_batch_that_was_deleted() -> None:
    claude = Claude(batches={"seconds": 0})
    older, deleted = claude.create(requests(1)), claude.create(requests(1))
    claude.engine.advance_batches()
    claude.engine.batches.delete(claude.caller(), deleted)

    page, more = claude.engine.batches.page(claude.caller(), {"after_id": deleted.id})
    assert (page, more) == ([older], False)


@pytest.mark.parametrize(
    "query",
    [
        {"limit": "0"},
        {"limit": "1001"},
        {"limit": "many"},
        {"after_id": "job_1"},
        {"after_id": "msgbatch_1", "before_id": "msgbatch_2"},
    ],
)
def test_a_list_that_makes_no_sense_is_refused(query: dict[str, str]) -> None:
    claude = Claude()
    with pytest.raises(RequestError):
        claude.engine.batches.page(claude.caller(), query)


# -- limits of their own ---------------------------------------------------------------------------


def test_calls_of_all_batch_endpoints_share_one_limit() -> None:
    claude = Claude(organisations=organisation(batch_limits={"rpm": 2}))
    refused = [claude.engine.batch_call(claude.caller()) for _ in range(3)]
    group = claude.engine.stats()["organisations"]["org-one"]["model_groups"]["batches"]

    assert refused[:2] == [None, None]
    assert isinstance(refused[2], Refused)
    assert (refused[2].failure.status, refused[2].failure.retry_after_seconds) == (429, 30)
    assert group["rate_limited"] == {"total": 1, "requests": 1}
    assert isinstance(
        claude.engine.message(claude.caller(), json.dumps(params()).encode(), "req_1"), Call
    )


def test_the_queue_has_room_for_so_many_requests_of_all_workspaces() -> None:
    workspaces = {"wrkspc_two": {"keys": [OTHER_KEY]}}
    limits = {"queued_requests": 10}
    claude = Claude(organisations=organisation(batch_limits=limits, workspaces=workspaces))
    claude.create(requests(6))
    refused = claude.try_create(requests(5), OTHER_KEY)
    claude.after(2)
    accepted = claude.try_create(requests(5), OTHER_KEY)

    assert isinstance(refused, Refused)
    assert (refused.failure.status, refused.failure.type) == (429, "rate_limit_error")
    assert refused.failure.retry_after_seconds == 10
    assert "10 batch requests" in refused.failure.message
    assert isinstance(accepted, Batch)
    stats = claude.engine.stats()["organisations"]["org-one"]["model_groups"]["batches"]
    assert stats["rate_limited"] == {"total": 1, "queued_requests": 1}
    assert stats["answered"] == 2


def test_a_blocked_organization_starts_no_batch() -> None:
    claude = Claude(organisations=organisation(blocked_by="spend_cap"))
    refused = claude.try_create(requests(1))

    assert isinstance(refused, Refused)
    assert refused.failure.error_code == "enforced_spend_limit_reached"


# -- books ---------------------------------------------------------------------------------------


def test_every_request_of_a_batch_has_a_row_in_the_ledger() -> None:
    claude = Claude()
    asked = [request("good"), request("bad", max_tokens=0), request("late"), request("later")]
    batch = claude.create(asked)
    claude.after(5)
    claude.engine.batches.cancel(batch)
    claude.after(1)
    rows = list(claude.engine.ledger())
    one = next(row for row in rows if row["outcome"] == "answered")

    assert {row["custom_id"] for row in rows} == {"good", "bad", "late", "later"}
    assert {(row["lane"], row["batch_id"], row["request_id"]) for row in rows} == {
        ("batch", batch.id, None)
    }
    assert sorted(row["outcome"] for row in rows if not row["billed"])[:2] == ["canceled"] * 2
    assert (one["status"], one["billed"], one["delivered"]) == (200, True, False)
    assert one["output_tokens"] == 100
    assert KEY not in json.dumps(rows)


def test_the_counts_of_batches_stand_beside_those_of_calls() -> None:
    claude = Claude(batches={"expired_rate": 1})
    claude.create(requests(3))
    claude.after(10)
    stats = claude.engine.stats()

    assert (stats["requests"], stats["billed"], stats["ledger"]["rows"]) == (0, 0, 3)
    items = claude.stats().pop("items")
    assert (items["requests"], items["expired"], items["canceled"]) == (3, 3, 0)
    assert claude.stats() == {
        "created": 1,
        "ended": 1,
        "canceled": 0,
        "deleted": 0,
        "open": 0,
        "queued_requests": 0,
        "most_queued_requests": 3,
        "items": items,
    }


def test_results_that_were_read_are_delivered_once() -> None:
    claude = Claude()
    batch = claude.create(requests(3))
    claude.after(10)
    for _ in range(2):
        claude.engine.delivered(batch, claude.engine.batches.results(batch)[:2])

    items = claude.stats()["items"]
    assert (items["delivered"], items["undelivered"], items["billed"]) == (2, 1, 3)


def test_a_body_billed_in_a_batch_and_live_is_a_duplicate() -> None:
    claude = Claude()
    asked = request("twice")
    claude.create([asked])
    claude.after(10)
    call = claude.engine.message(claude.caller(), json.dumps(asked["params"]).encode(), "req_1")
    assert isinstance(call, Call)
    claude.engine.finish(call, 200, delivered=True)

    assert claude.engine.stats()["duplicates"]["extra_calls"] == 1


def test_a_reset_forgets_every_batch() -> None:
    claude = Claude()
    batch = claude.create(requests(1))
    claude.engine.batches.move_clock(DAY)
    claude.engine.reset()

    with pytest.raises(RequestError):
        claude.engine.batches.find(claude.caller(), batch.id)
    assert claude.engine.stats()["batch_clock"]["ahead_seconds"] == 0


# -- the body of a create ----------------------------------------------------------------------------


def test_requests_are_read_whatever_the_blanks_and_kept_as_they_came() -> None:
    body = ' {\n"requests" : [ {"custom_id":"a",\r\n "params":{"x":"\\u00e9é"} } , \t{"params":{},"custom_id":"b"}]\n} '
    items = list(read_items(body.encode()))

    assert [item.custom_id for item in items] == ["a", "b"]
    assert json.loads(items[0].raw) == {"custom_id": "a", "params": {"x": "éé"}}


def test_custom_ids_may_have_64_letters() -> None:
    body = json.dumps({"requests": [request("x" * 64), request("A_b-9")]})

    assert [item.custom_id for item in read_items(body.encode())] == ["x" * 64, "A_b-9"]


ONE = '{"custom_id": "a", "params": {}}'


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("", "must be a JSON object"),
        ("[]", "must be a JSON object"),
        ("{}", "requests: Field required"),
        ('{"requests": 5}', "requests: Input should be a valid list"),
        ('{"requests": []}', "at least 1 item"),
        ('{"requests": [5]}', "requests.0: Input should be a valid dictionary"),
        ('{"requests": [{"params": {}}]}', "requests.0.custom_id: Field required"),
        (f'{{"requests": [{ONE}, {ONE}]}}', 'requests.1.custom_id: "a" is not unique'),
        ('{"requests": [{"custom_id": "a"}]}', "requests.0.params: Field required"),
        ('{"requests": [{"custom_id": "a", "params": []}]}', "requests.0.params: Input"),
        ('{"requests": [{"custom_id": "a", "params": {}, "x": 1}]}', "requests.0.x: Extra"),
        (f'{{"requests": [{ONE}], "model": "x"}}', "model: Extra inputs"),
        (f'{{"requests": [{ONE}], "requests": [{ONE}]}}', "requests: Extra inputs"),
        (f'{{"requests": [{ONE}]', "not valid JSON"),
        (f'{{"requests": [{ONE}', "not valid JSON"),
        (f'{{"requests": [{ONE}]}} more', "not valid JSON"),
        (f'{{"requests": [{ONE} {ONE}]}}', "not valid JSON"),
        ('{"requests": [' + '{"a":' * 9000 + "1" + "}" * 9000 + "]}", "not valid JSON"),
        ("\udcff", "not valid JSON"),
    ],
)
def test_a_create_that_makes_no_sense_is_refused_at_once(body: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        list(read_items(body.encode(errors="surrogateescape")))

    assert caught.value.failure.status == 400
    assert said in caught.value.failure.message


@pytest.mark.parametrize("custom_id", ["", "a b", "ä", "x" * 65, "a\n", 5])
def test_a_bad_custom_id_is_refused_at_once(custom_id: object) -> None:
    body = json.dumps({"requests": [{"custom_id": custom_id, "params": {}}]})
    with pytest.raises(RequestError, match=r"requests.0.custom_id: String should match pattern"):
        list(read_items(body.encode()))


def test_a_batch_of_more_than_100_000_is_refused() -> None:
    item = '{"custom_id":"%d","params":{}}'
    body = '{"requests":[' + ",".join(item % number for number in range(100_001)) + "]}"
    with pytest.raises(RequestError, match="at most 100000"):
        list(read_items(body.encode()))


@pytest.mark.parametrize(
    "batches",
    [
        {"errored_rate": 0.6, "expired_rate": 0.6},
        {"create_faults": {"rain": 0.1}},
        {"create_faults": {"sse_error": 0.1}},
        {"items_per_second": 0},
        {"results_url": "nowhere"},
        {"regimes": {"speed": 0}},
        {"regimes": {"slow_day_rate": 1.1}},
        {"regimes": {"normal": {"median_seconds": 0, "sigma": 1}}},
        {"regimes": {"fast": {}}},
    ],
)
def test_a_wrong_configuration_is_refused(batches: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="batches"):
        read({"batches": batches})
