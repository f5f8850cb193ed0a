"""What the simulator decides about calls, with the clock in the test's hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from scripts.claude_simulator import answers
from scripts.claude_simulator.accounts import Caller, Refused
from scripts.claude_simulator.engine import Call, Engine
from scripts.claude_simulator.limits import SECOND
from scripts.claude_simulator.settings import Service, Settings, SettingsError, merged, read

KEY = "sk-ant-test-one"
VERSION = "2026-10-21"


class Hands:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1_795_400_000 * SECOND

    def __call__(self) -> int:
        return self.now


class Claude:
    """An engine with a hand-moved clock and short ways to call it."""

    def __init__(self, **settings: Any) -> None:
        self.clock = Hands()
        fast = {"ttft_seconds": 0, "tokens_per_second": None, "output_tokens_sigma": 0}
        self.engine = Engine(read({"service": fast, **settings}), self.clock)

    def caller(self, key: str = KEY, version: str | None = VERSION) -> Caller:
        caller = self.engine.authenticate(key, version)
        assert isinstance(caller, Caller)
        return caller

    def ask(self, params: dict[str, Any], key: str = KEY, version: str = VERSION) -> Call | Refused:
        body = json.dumps(params).encode()
        return self.engine.message(self.caller(key, version), body, self.engine.request_id())

    def answered(self, params: dict[str, Any], key: str = KEY) -> Call:
        call = self.ask(params, key)
        assert isinstance(call, Call), call
        self.engine.finish(call, 200, delivered=True)
        return call

    def refused(self, params: dict[str, Any], version: str = VERSION) -> Refused:
        refused = self.ask(params, version=version)
        assert isinstance(refused, Refused)
        return refused


def params(text: str = "hello", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "claude-opus-5", "max_tokens": 100, "messages": messages, **more}


def marked(marker: str, **more: Any) -> dict[str, Any]:
    return params(metadata={"user_id": marker}, **more)


def limited(**limits: Any) -> list[dict[str, Any]]:
    default = {"rpm": None, "itpm": None, "otpm": None} | limits
    return [{"id": "org-one", "keys": [KEY], "limits": {"default": default}}]


def text_of(call: Call) -> str:
    blocks = call.message()["content"]
    return "".join(block.get("text", "") for block in blocks)


def test_the_same_seed_and_content_get_the_same_answer_in_any_order() -> None:
    slow = {"service": {"ttft_seconds": 1}}
    first, second = Claude(**slow), Claude(**slow)
    texts = [f"question {number}" for number in range(8)]
    one = {text: first.answered(params(text)) for text in texts}
    two = {text: second.answered(params(text)) for text in reversed(texts)}

    for text in texts:
        assert one[text].message() == two[text].message()
        assert one[text].ends_at - one[text].caller.at == two[text].ends_at - two[text].caller.at


def test_another_seed_gives_another_length() -> None:
    def lengths(seed: int) -> list[int]:
        claude = Claude(seed=seed, service={"ttft_seconds": 0, "output_tokens": 50})
        return [claude.answered(params(str(n))).row.output_tokens for n in range(10)]

    assert lengths(1) == lengths(1)
    assert lengths(1) != lengths(2)


def test_an_answer_names_the_params_it_answers() -> None:
    asked = params("which one?")

    assert answers.params_hash(asked)[:12] in text_of(Claude().answered(asked))


def test_neither_order_of_keys_nor_stream_changes_the_hash() -> None:
    asked = params()
    turned = dict(reversed(asked.items()))

    assert answers.params_hash(asked) == answers.params_hash({**turned, "stream": True})


def test_an_answer_that_is_cut_says_so() -> None:
    claude = Claude(service={"ttft_seconds": 0, "output_tokens": 500, "output_tokens_sigma": 0})
    cut, whole = claude.answered(params()), claude.answered(params(max_tokens=600))

    assert (cut.answer.stop_reason, cut.row.output_tokens) == ("max_tokens", 100)
    assert (whole.answer.stop_reason, whole.row.output_tokens) == ("end_turn", 500)


def test_service_times_are_lognormal_around_their_median() -> None:
    claude = Claude(service=Service(tokens_per_second=50).model_dump())
    calls = [claude.answered(params(str(number), max_tokens=9000)) for number in range(401)]
    firsts = sorted(call.first_token_at - call.caller.at for call in calls)
    lengths = sorted(call.row.output_tokens for call in calls)

    assert firsts[200] / SECOND == pytest.approx(0.8, rel=0.1)
    assert lengths[200] == pytest.approx(300, rel=0.1)
    call = calls[0]
    assert (call.ends_at - call.first_token_at) / SECOND == call.row.output_tokens / 50


def test_models_of_one_group_share_their_buckets_and_others_do_not() -> None:
    claude = Claude(organisations=limited(rpm=1))
    claude.answered(params(model="claude-opus-4-8"))

    assert isinstance(claude.ask(params(model="claude-opus-4-6")), Refused)
    assert isinstance(claude.ask(params(model="claude-opus-5")), Call)


def test_keys_of_one_organization_share_its_buckets() -> None:
    organisations = limited(rpm=1)
    organisations[0]["keys"] = ["sk-ant-test-one", "sk-ant-test-two"]
    claude = Claude(organisations=organisations)
    claude.answered(params(), "sk-ant-test-one")

    assert isinstance(claude.ask(params("other"), "sk-ant-test-two"), Refused)


def in_two_workspaces(**own: int) -> list[dict[str, Any]]:
    organisations = limited(rpm=4)
    workspace = {"keys": ["sk-ant-test-two"], "limits": {"opus-5": own}}
    organisations[0]["workspaces"] = {"wrkspc_two": workspace}
    return organisations


def test_a_workspace_stays_below_its_own_limit_and_that_of_its_organization() -> None:
    claude = Claude(organisations=in_two_workspaces(rpm=2))
    for text in "ab":
        claude.answered(params(text), "sk-ant-test-two")
    own = claude.ask(params("c"), "sk-ant-test-two")
    for text in "cd":
        claude.answered(params(text))
    shared = claude.ask(params("e"))
    stats = claude.engine.stats()["organisations"]["org-one"]["model_groups"]["opus-5"]

    assert isinstance(own, Refused)
    assert "your workspace's rate limit of 2 requests" in own.failure.message
    assert dict(own.headers)[b"anthropic-ratelimit-requests-limit"] == b"2"
    assert isinstance(shared, Refused)
    assert "your organization's rate limit of 4 requests" in shared.failure.message
    assert dict(shared.headers)[b"anthropic-ratelimit-requests-limit"] == b"4"
    assert stats["workspaces"]["wrkspc_two"]["requests"]["level"] == 0


def test_output_of_a_workspace_is_charged_to_both_limits() -> None:
    organisations = in_two_workspaces(otpm=60)
    organisations[0]["limits"]["default"] = {"otpm": 600}
    claude = Claude(organisations=organisations)
    claude.answered(params(max_tokens=90), "sk-ant-test-two")
    stats = claude.engine.stats()["organisations"]["org-one"]["model_groups"]["opus-5"]

    assert stats["buckets"]["output_tokens"]["level"] == 510
    assert stats["workspaces"]["wrkspc_two"]["output_tokens"]["level"] == -30


def limiting_the_workspace(rpm: int | None) -> dict[str, Any]:
    workspaces = {"wrkspc_two": {"limits": {"opus-5": {"rpm": rpm}}}}
    return {"organisations": [{"id": "org-one", "workspaces": workspaces}]}


def test_limits_of_a_workspace_come_and_go_at_run_time() -> None:
    claude = Claude(organisations=in_two_workspaces(rpm=1))
    claude.answered(params("a"), "sk-ant-test-two")
    claude.engine.configure({"organisations": [{"id": "org-one", "workspaces": {}}]})
    assert isinstance(claude.ask(params("b"), "sk-ant-test-two"), Refused)
    claude.engine.configure(limiting_the_workspace(rpm=None))
    claude.answered(params("b"), "sk-ant-test-two")
    claude.engine.configure(limiting_the_workspace(rpm=1))

    claude.answered(params("c"), "sk-ant-test-two")
    assert isinstance(claude.ask(params("d"), "sk-ant-test-two"), Refused)


def test_a_key_names_its_workspace_in_every_answer() -> None:
    claude = Claude(organisations=in_two_workspaces())
    one, two = (claude.answered(params(key), key) for key in (KEY, "sk-ant-test-two"))

    assert (b"anthropic-workspace-id", b"wrkspc_default") in claude.engine.answer_headers(one)
    assert (b"anthropic-workspace-id", b"wrkspc_two") in claude.engine.answer_headers(two)


def test_a_rate_limited_call_uses_up_none_of_its_scripted_failures() -> None:
    claude = Claude(organisations=limited(rpm=1))
    claude.answered(params())
    asked = marked("sim:sse_errorx1")
    refusals = [claude.refused(asked).failure.status for _ in range(3)]
    claude.clock.now += 60 * SECOND
    first = claude.ask(asked)
    claude.clock.now += 60 * SECOND
    second = claude.ask(asked)

    assert refusals == [429, 429, 429]
    assert isinstance(first, Call)
    assert first.place is not None
    assert isinstance(second, Call)
    assert second.place is None


def test_failures_before_the_work_take_nothing_from_the_limits() -> None:
    claude = Claude(organisations=limited(rpm=2))
    statuses = [claude.refused(marked("sim:529x3")).failure.status for _ in range(3)]

    assert statuses == [529, 529, 529]
    claude.answered(marked("sim:529x3"))
    levels = claude.engine.stats()["organisations"]["org-one"]["model_groups"]["opus-5"]["buckets"]
    assert levels["requests"]["level"] == 1


def test_failures_by_rate_depend_on_content_and_number_of_call_only() -> None:
    def fates(order: list[str]) -> dict[str, list[bool]]:
        claude = Claude(faults={"529": 0.5})
        found: dict[str, list[bool]] = {text: [] for text in order}
        for _ in range(4):
            for text in order:
                found[text].append(isinstance(claude.ask(params(text)), Call))
        return found

    texts = [str(number) for number in range(20)]
    forward, backward = fates(texts), fates(texts[::-1])
    assert forward == backward
    assert 20 < sum(sum(fate) for fate in forward.values()) < 60


def test_a_body_billed_twice_is_a_duplicate() -> None:
    claude = Claude()
    for asked in (params("a"), params("b"), marked("sim:thinking job-7"), params("a")):
        claude.answered(asked)
    claude.answered(marked("sim:thinking job-7"))
    duplicates = claude.engine.stats()["duplicates"]

    assert (duplicates["count"], duplicates["extra_calls"]) == (2, 2)
    assert [example["user_id"] for example in duplicates["examples"]] == [
        None,
        "sim:thinking job-7",
    ]


def test_the_ledger_has_a_row_for_every_ended_call() -> None:
    claude = Claude(organisations=limited(rpm=1))
    claude.answered(params("a"))
    claude.refused(params("b"))
    running = Claude()
    running.ask(params())
    rows = list(claude.engine.ledger())

    assert [(row["status"], row["outcome"], row["billed"]) for row in rows] == [
        (200, "answered", True),
        (429, "rate_limited:requests", False),
    ]
    assert KEY not in json.dumps(rows)
    assert list(running.engine.ledger()) == []
    assert running.engine.stats()["in_flight"] == 1


def test_calls_above_the_number_in_flight_are_refused() -> None:
    organisations = limited()
    organisations[0]["max_in_flight"] = 1
    claude = Claude(organisations=organisations)
    running = claude.ask(params("a"))
    refused = claude.refused(params("b"))
    assert isinstance(running, Call)
    claude.engine.finish(running, 200, delivered=True)

    assert "concurrent" in refused.failure.message
    assert isinstance(claude.ask(params("b")), Call)


def test_a_relay_sends_no_limit_headers() -> None:
    organisations = limited(rpm=1)
    organisations[0]["limit_headers"] = False
    claude = Claude(organisations=organisations)
    call = claude.answered(params())
    headers = claude.engine.answer_headers(call) + claude.refused(params("b")).headers

    assert not [name for name, _ in headers if name.startswith(b"anthropic-ratelimit")]


def test_a_cached_prefix_is_written_once_then_read_and_free_of_the_input_limit() -> None:
    claude = Claude(organisations=limited(itpm=1_000_000))
    system = [{"type": "text", "text": "x" * 40_000, "cache_control": {"type": "ephemeral"}}]
    first = claude.answered(params("one", system=system)).usage()
    claude.clock.now += 60 * SECOND
    second = claude.answered(params("two", system=system)).usage()
    claude.clock.now += 301 * SECOND
    third = claude.answered(params("three", system=system)).usage()

    assert (first["cache_creation_input_tokens"], first["cache_read_input_tokens"]) == (13_000, 0)
    assert (second["cache_creation_input_tokens"], second["cache_read_input_tokens"]) == (0, 13_000)
    assert third["cache_creation_input_tokens"] == 13_000
    assert first["input_tokens"] < 100


def test_a_key_can_be_revoked_at_a_time_and_allowed_again() -> None:
    claude = Claude(revoke_at={KEY: 30})
    claude.answered(params())
    claude.clock.now += 30 * SECOND
    refused = claude.engine.authenticate(KEY, VERSION)
    claude.engine.configure({"unrevoke": [KEY]})

    assert isinstance(refused, Refused)
    assert refused.failure.status == 401
    claude.answered(params())


def test_settings_change_at_run_time_all_or_nothing() -> None:
    claude = Claude(organisations=limited(rpm=60))
    with pytest.raises(SettingsError, match="unknown fault"):
        claude.engine.configure({"organisations": limited(rpm=5), "faults": {"530": 1}})
    assert claude.engine.settings.organisations[0].limits["default"].rpm == 60
    claude.engine.configure(
        {"organisations": [{"id": "org-one", "limits": {"default": {"rpm": 5}}}]}
    )

    organisation = claude.engine.settings.organisations[0]
    assert organisation.limits["default"].rpm == 5
    assert organisation.keys == (KEY,)


def test_every_call_of_a_blocked_organization_fails() -> None:
    organisations = limited()
    organisations[0]["blocked_by"] = "spend_cap"
    claude = Claude(organisations=organisations)
    failure = claude.refused(params()).failure

    assert failure.error_code == "enforced_spend_limit_reached"
    claude.engine.configure({"organisations": [{"id": "org-one", "blocked_by": None}]})
    claude.answered(params())


def test_a_reset_empties_the_books_and_fills_the_buckets() -> None:
    claude = Claude(organisations=limited(rpm=1))
    claude.answered(params())
    claude.engine.reset()

    assert claude.engine.stats()["requests"] == 0
    claude.answered(params())


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"max_tokens": None}, 400, "max_tokens: Field required"),
        ({"max_tokens": "9"}, 400, "valid integer"),
        ({"max_tokens": 200_000}, 400, "maximum allowed number of output tokens"),
        ({"messages": None}, 400, "messages: Field required"),
        ({"messages": []}, 400, "at least one message"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": []}]}, 400, "content"),
        ({"messages": [{"role": "user", "content": ""}]}, 400, "non-empty"),
        ({"messages": [{"role": "assistant", "content": "So"}]}, 400, "prefill"),
        ({"model": None}, 400, "model: Field required"),
        ({"model": "claude-none"}, 404, "model: claude-none"),
        ({"temperature": 1.0}, 400, "temperature"),
        ({"top_k": 5}, 400, "top_k"),
        ({"colour": "red"}, 400, "Extra inputs are not permitted"),
        ({"stream": "yes"}, 400, "stream"),
        ({"system": 5}, 400, "system"),
        ({"tools": [{}]}, 400, "tools.0.name"),
        ({"thinking": {"type": ["adaptive"]}}, 400, "thinking.type"),
        ({"messages": [{"role": ["user"], "content": "hi"}]}, 400, "role"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, 400, "not supported"),
        ({"metadata": {"user_id": "sim:nonsense"}}, 400, "unknown marker"),
        ({"messages": [{"role": "user", "content": "x" * 4_000_000}]}, 400, "prompt is too long"),
    ],
)
def test_a_request_the_api_would_refuse_is_refused(
    changes: dict[str, Any], status: int, said: str
) -> None:
    asked = {name: value for name, value in (params() | changes).items() if value is not None}
    refused = Claude().refused(asked)

    assert (refused.failure.status, said in refused.failure.message) == (status, True)
    assert refused.failure.type == {400: "invalid_request_error", 404: "not_found_error"}[status]


def test_sampling_parameters_pass_under_the_old_version_only() -> None:
    claude, asked = Claude(), params(temperature=0.5, top_p=0.9, top_k=4)

    assert isinstance(claude.ask(asked, version="2023-06-01"), Call)
    assert claude.refused(asked, version="2026-10-21").failure.status == 400


@pytest.mark.parametrize("version", [None, "", "2024-01-01"])
def test_an_unknown_version_is_refused(version: str | None) -> None:
    refused = Claude().engine.authenticate(KEY, version)

    assert isinstance(refused, Refused)
    assert refused.failure.status == 400


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"color": 1}, "color: Extra inputs are not permitted"),
        ({"faults": {"530": 0.1}}, 'unknown fault "530"'),
        ({"faults": {"529": 0.6, "500": 0.6}}, "more than 1"),
        ({"organisations": [{"id": "a"}, {"id": "b"}]}, "duplicate key"),
        ({"organisations": [{"blocked_by": "rain"}]}, 'unknown failure "rain"'),
        ({"organisations": [{"limits": {"default": {"rpm": 0}}}]}, "organisations.0.limits"),
        ([], "valid dictionary"),
    ],
)
def test_a_wrong_configuration_says_where_in_one_line(data: object, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(data)

    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_patch_lays_over_what_it_names_and_nothing_else() -> None:
    settings = merged(Settings(seed=9), {"faults": {"529": 0.5}, "service": {"ttft_seconds": 0}})

    assert (settings.seed, settings.faults) == (9, {"529": 0.5})
    assert (settings.service.ttft_seconds, settings.service.output_tokens) == (0, 300)


def test_a_body_nested_too_deeply_is_refused_and_not_a_crash() -> None:
    claude = Claude()
    deep = '{"a":' * 5000 + "1" + "}" * 5000
    body = json.dumps(params(system="?")).replace(
        '"?"', f'[{{"type":"text","text":"x","y":{deep}}}]'
    )
    refused = claude.engine.message(claude.caller(), body.encode(), "req_1")

    assert isinstance(refused, Refused)
    assert refused.failure.status == 400
