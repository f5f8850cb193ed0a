"""The command line against the HTTP API's contract, over a real socket."""

import io
import json
import os
import stat
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from scripts.cli import app
from scripts.cli.client import Gateway
from scripts.cli.errors import GatewayRefused, GatewayUnreachable, NotConfigured
from tests.fake_gateway import CLIENT_KEY, FakeGateway, Scripted, running_gateway

REPOSITORY = Path(__file__).resolve().parents[2]
BUSY = Scripted(429, {"message": "Too Many Requests"}, {"retry-after": "0"})


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    def rows(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Ended]


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    with running_gateway() as running:
        yield running


@pytest.fixture
def run(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Run:
    monkeypatch.setenv("SLUICE_URL", gateway.url)
    monkeypatch.setenv("SLUICE_KEY", CLIENT_KEY)

    def run_command(*arguments: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            app.main([str(each) for each in arguments])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return Ended(int(ended.value.code or 0), printed.out, printed.err)

    return run_command


def jobs_file(folder: Path, *prompts: str) -> Path:
    path = folder / "jobs.jsonl"
    path.write_text("".join(job_line(prompt) + "\n" for prompt in prompts), encoding="utf-8")
    return path


def job_line(prompt: str) -> str:
    messages = [{"role": "user", "content": prompt}]
    params = {"model": "claude-haiku-5-5", "max_tokens": 10, "messages": messages}
    return json.dumps({"custom_id": f"my-{prompt}", "params": params})


# ---------------------------------------------------------------- submit


def test_submitting_a_file_prints_the_job_ids(
    run: Run, gateway: FakeGateway, tmp_path: Path
) -> None:
    ended = run("submit", jobs_file(tmp_path, "one", "two"))

    assert 0 == ended.code
    assert list(gateway.jobs) == ended.out.split()
    assert "2 jobs accepted, 0 rejected" in ended.err


def test_many_jobs_travel_in_lists_of_a_hundred(
    run: Run, gateway: FakeGateway, tmp_path: Path
) -> None:
    ended = run("submit", jobs_file(tmp_path, *(f"p{n}" for n in range(250))))

    assert 0 == ended.code
    assert 250 == len(gateway.jobs)
    assert [50, 100, 100] == sorted(len(json.loads(body)["jobs"]) for body in gateway.bodies)
    assert [f"my-p{n}" for n in range(250)] == [
        gateway.jobs[job_id]["custom_id"] for job_id in ended.out.split()
    ]


def test_standard_input_is_read_as_a_file(
    run: Run, gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = io.BytesIO(job_line("typed").encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed))

    ended = run("submit", "-")

    assert 0 == ended.code
    assert ["typed"] == [job["prompt"] for job in gateway.jobs.values()]


def test_a_prompt_becomes_one_job_with_everything_that_was_said(
    run: Run, gateway: FakeGateway
) -> None:
    ended = run(
        *("submit", "--prompt", "Hello", "--model", "claude-opus-5-5", "--max-tokens", 99),
        *("--system", "Be kind.", "--fallback-model", "claude-opus-5", "--metadata", "team=red"),
        *("--deadline", "2099-01-01T00:00:00Z"),
    )

    assert 0 == ended.code
    assert {
        "jobs": [
            {
                "deadline": "2099-01-01T00:00:00Z",
                "fallback_models": ["claude-opus-5"],
                "metadata": {"team": "red"},
                "params": {
                    "model": "claude-opus-5-5",
                    "max_tokens": 99,
                    "messages": [{"role": "user", "content": "Hello"}],
                    "system": "Be kind.",
                },
            }
        ]
    } == json.loads(gateway.bodies[0])


def test_a_prompt_waited_for_prints_its_answer_and_nothing_else(run: Run) -> None:
    ended = run("submit", "--prompt", "Hello", "--wait")

    assert 0 == ended.code
    assert "answer to Hello\n" == ended.out
    assert "1 succeeded, 0 failed" in ended.err
    assert "1/1 done" in ended.err


def test_rejected_and_unreadable_lines_are_reported_and_the_others_are_sent(
    run: Run, gateway: FakeGateway, tmp_path: Path
) -> None:
    path = jobs_file(tmp_path, "good", "bad", "fine")
    path.write_text(path.read_text() + "{oops\n")
    gateway.reject["bad"] = {"type": "invalid_request_error", "message": "params.model: unknown"}

    ended = run("submit", path)

    assert 1 == ended.code
    assert ["good", "fine"] == [job["prompt"] for job in gateway.jobs.values()]
    assert "line 2: invalid_request_error: params.model: unknown" in ended.err
    assert "line 4: invalid_request_error: not valid JSON: Expecting property name" in ended.err
    assert "2 jobs accepted, 2 rejected" in ended.err


def test_a_file_without_one_good_job_gives_each_line_its_reason(
    run: Run, gateway: FakeGateway, tmp_path: Path
) -> None:
    gateway.reject["bad"] = {"type": "invalid_request_error", "message": "params.model: unknown"}

    ended = run("submit", jobs_file(tmp_path, "bad"), "--wait")

    assert 1 == ended.code
    assert "line 1: invalid_request_error: params.model: unknown" in ended.err
    assert "" == ended.out


def test_a_reply_that_gets_lost_makes_no_second_jobs(
    run: Run, gateway: FakeGateway, tmp_path: Path
) -> None:
    gateway.lose_replies = 2

    ended = run("submit", jobs_file(tmp_path, "one", "two"))

    assert 0 == ended.code
    assert 3 == len(gateway.bodies)
    assert 1 == len(set(gateway.idempotency_keys))
    assert 2 == len(gateway.jobs)


def test_a_busy_gateway_is_asked_again_when_it_says(
    run: Run, gateway: FakeGateway, tmp_path: Path
) -> None:
    gateway.script = [BUSY, Scripted(503, "not even JSON", {"retry-after": "0"})]

    ended = run("submit", jobs_file(tmp_path, "one"))

    assert 0 == ended.code
    assert 3 == len(gateway.bodies)
    assert 1 == len(gateway.jobs)


def test_the_same_file_under_the_same_run_key_finds_its_first_jobs(
    run: Run, gateway: FakeGateway, tmp_path: Path
) -> None:
    path = jobs_file(tmp_path, "one", "two")

    first = run("submit", path, "--idempotency-key", "nightly")
    second = run("submit", path, "--idempotency-key", "nightly")

    assert first.out == second.out
    assert ["nightly.0", "nightly.0"] == gateway.idempotency_keys
    assert 2 == len(gateway.jobs)


def test_two_runs_without_a_name_make_jobs_of_their_own(
    run: Run, gateway: FakeGateway, tmp_path: Path
) -> None:
    path = jobs_file(tmp_path, "one")

    run("submit", path)
    run("submit", path)

    assert 2 == len(gateway.jobs)


def test_when_sending_stops_half_way_it_says_how_to_go_on(
    run: Run, gateway: FakeGateway, tmp_path: Path
) -> None:
    error = {"type": "billing_error", "message": "the budget is used up"}
    refused = {"type": "error", "error": error, "request_id": "req_7"}
    gateway.script = [Scripted(402, refused)]

    ended = run(
        *("submit", jobs_file(tmp_path, *(f"p{n}" for n in range(150)))),
        *("--idempotency-key", "nightly"),
    )

    assert 1 == ended.code
    assert "error: billing_error: the budget is used up (HTTP 402, request req_7)" in ended.err
    assert "--idempotency-key nightly to send the rest" in ended.err


def test_accepted_and_rejected_jobs_can_be_had_as_json(
    run: Run, gateway: FakeGateway, tmp_path: Path
) -> None:
    gateway.reject["bad"] = {"type": "invalid_request_error", "message": "no"}

    ended = run("submit", jobs_file(tmp_path, "good", "bad"), "--json", "--idempotency-key", "run")

    assert {
        "idempotency_key": "run",
        "accepted": [{"line": 1, "id": next(iter(gateway.jobs)), "custom_id": "my-good"}],
        "rejected": [{"line": 2, "error": {"type": "invalid_request_error", "message": "no"}}],
    } == json.loads(ended.out)


def test_results_waited_for_are_written_in_the_shape_of_batch_results(
    run: Run, gateway: FakeGateway, tmp_path: Path
) -> None:
    gateway.ending_of["wrong"] = "errored"
    gateway.ending_of["late"] = "expired"
    out = tmp_path / "results.jsonl"

    ended = run("submit", jobs_file(tmp_path, "right", "wrong", "late"), "--wait", "--out", out)

    right, wrong, late = (json.loads(line) for line in out.read_text().splitlines())
    assert 1 == ended.code
    assert "my-right" == right["custom_id"]
    assert "succeeded" == right["result"]["type"]
    assert "answer to right" == right["result"]["message"]["content"][0]["text"]
    assert {
        "type": "errored",
        "error": {
            "type": "error",
            "error": {"type": "invalid_request_error", "message": "max_tokens: too large"},
            "request_id": "req_upstream_1",
        },
    } == wrong["result"]
    assert {"type": "expired"} == late["result"]
    assert "1 succeeded, 2 failed" in ended.err
    assert "" == ended.out


# ---------------------------------------------------------------- lanes


@pytest.mark.parametrize("lane", ["batch", "auto"])
def test_jobs_for_a_lane_are_sent_as_one_batch(
    run: Run, gateway: FakeGateway, tmp_path: Path, lane: str
) -> None:
    file = jobs_file(tmp_path, *(f"{number}" for number in range(150)))
    arguments = ("--on-unmeetable", "refuse", "--webhook", "https://acme.example/")

    ended = run("submit", file, "--lane", lane, "--idempotency-key", "k", *arguments)

    (body,) = map(json.loads, gateway.bodies)
    assert (0, "batch_1\n") == (ended.code, ended.out), ended.err
    assert "150 jobs accepted as batch batch_1, 0 rejected" in ended.err
    assert (lane, "refuse", 150) == (body["lane"], body["on_unmeetable"], len(body["jobs"]))
    assert {"custom_id", "params"} == set(body["jobs"][0])
    assert ("k", "https://acme.example/") == (
        gateway.headers[0]["idempotency-key"],
        gateway.headers[0]["sluice-webhook"],
    )


def test_a_lane_that_is_live_changes_nothing(
    run: Run, gateway: FakeGateway, tmp_path: Path
) -> None:
    ended = run("submit", jobs_file(tmp_path, "one"), "--lane", "live")

    assert 0 == ended.code
    assert ["jobs"] == [name for body in gateway.bodies for name in json.loads(body)]
    assert ended.out.startswith("job_")


def test_rows_of_a_batch_are_named_by_their_lines_and_bad_lines_are_reported(
    run: Run, gateway: FakeGateway, tmp_path: Path
) -> None:
    params = json.loads(job_line("x"))["params"]
    lines = [{"params": params}, {"params": params, "custom_id": "own"}, {"params": params}]
    file = tmp_path / "jobs.jsonl"
    file.write_text("no JSON\n" + "\n".join(map(json.dumps, lines)))

    ended = run("submit", file, "--lane", "batch", "--json")

    (body,) = map(json.loads, gateway.bodies)
    assert ["line-2", "own", "line-4"] == [job["custom_id"] for job in body["jobs"]]
    shown = json.loads(ended.out)
    assert (1, "batch_1", [1]) == (
        ended.code,
        shown["batch"]["id"],
        [each["line"] for each in shown["rejected"]],
    )
    assert "line 1: invalid_request_error: not valid JSON" in ended.err


def test_a_file_without_one_good_job_makes_no_batch(
    run: Run, gateway: FakeGateway, tmp_path: Path
) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_text("no JSON\n")

    ended = run("submit", file, "--lane", "auto")

    assert (1, "", []) == (ended.code, ended.out, gateway.bodies)
    assert "no batch created: 1 line rejected" in ended.err


def test_results_of_a_batch_waited_for_are_written(
    run: Run, gateway: FakeGateway, tmp_path: Path
) -> None:
    results = b'{"custom_id": "my-one", "result": {"type": "canceled"}}\n'
    gateway.result_files["results"] = results
    file, out = jobs_file(tmp_path, "one"), tmp_path / "out.jsonl"

    to_file = run("submit", file, "--lane", "auto", "--wait", "--out", out)
    to_pipe = run("submit", file, "--lane", "auto", "--wait")

    assert (0, 0) == (to_file.code, to_pipe.code)
    assert results == out.read_bytes() == to_pipe.out.encode()


@pytest.mark.parametrize(
    ("result", "out", "err"),
    [
        (
            {"type": "succeeded", "message": {"content": [{"type": "text", "text": "High."}]}},
            "High.\n",
            "",
        ),
        ({"type": "expired"}, "", "expired\n"),
        (
            {"type": "errored", "error": {"type": "error", "error": {"type": "t", "message": "m"}}},
            "",
            "errored: t: m\n",
        ),
    ],
)
def test_a_prompt_for_a_lane_prints_its_answer(
    run: Run, gateway: FakeGateway, result: dict[str, Any], out: str, err: str
) -> None:
    gateway.result_files["results"] = json.dumps({"custom_id": "a", "result": result}).encode()

    ended = run("submit", "--prompt", "How high?", "--lane", "batch", "--wait")

    assert out == ended.out
    assert err in ended.err
    assert "line-1" == json.loads(gateway.bodies[0])["jobs"][0]["custom_id"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--lane", "BATCH"), "Invalid value for '--lane'"),
        (("--lane", ""), "Invalid value for '--lane'"),
        (("--lane", "batch", "--on-unmeetable", "wait"), "Invalid value for '--on-unmeetable'"),
        (("--on-unmeetable", "run"), "--on-unmeetable requires --lane batch or --lane auto"),
        (
            ("--lane", "live", "--on-unmeetable", "run"),
            "--on-unmeetable requires --lane batch or --lane auto",
        ),
        (("--lane", "auto", "--metadata", "a=b"), "--metadata is not supported with --lane auto"),
        (("--lane", "auto", "--webhook", "https://\u00e4/"), "--webhook must be printable ASCII"),
    ],
)
def test_what_goes_with_no_lane_is_refused_before_anything_is_sent(
    run: Run, gateway: FakeGateway, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    ended = run("submit", jobs_file(tmp_path, "one"), *arguments)

    assert (2, []) == (ended.code, gateway.bodies)
    assert words in ended.err


def test_more_than_a_request_may_hold_is_left_to_upload(
    run: Run, gateway: FakeGateway, tmp_path: Path
) -> None:
    file = jobs_file(tmp_path, "x" * 1_000_000, "y" * 1_000_000)

    ended = run("submit", file, "--lane", "batch")

    assert (1, []) == (ended.code, gateway.bodies)
    assert "the jobs exceed 4,000,000 bytes" in ended.err
    assert "use `sluice upload`" in ended.err


def test_an_upload_asks_for_its_lane_and_the_batch_shows_it(
    run: Run, gateway: FakeGateway, tmp_path: Path
) -> None:
    file = jobs_file(tmp_path, "one")

    ended = run("upload", file, "--lane", "auto", "--on-unmeetable", "refuse")

    assert 0 == ended.code
    assert {"lane": "auto", "on_unmeetable": "refuse"} == json.loads(gateway.bodies[0])["options"]


@pytest.mark.parametrize(
    ("lanes", "shown"),
    [
        ({"lane": "auto", "lane_asked": "auto"}, "auto (as asked)"),
        ({"lane": "live", "lane_asked": None}, "live (default of the stack)"),
        (
            {"lane": "batch", "lane_asked": "batch", "on_unmeetable": "refuse"},
            "batch (as asked, refuse if the deadline cannot be met)",
        ),
        ({}, None),
    ],
)
def test_a_batch_is_shown_with_its_lane(
    run: Run, gateway: FakeGateway, lanes: dict[str, Any], shown: str | None
) -> None:
    gateway.parts["first.jsonl"] = b""
    gateway.lanes = lanes

    ended = run("batches", "show", "batch_1")

    assert 0 == ended.code
    assert (shown is not None) == ("lane" in ended.out)
    assert (shown or "") in ended.out


def test_results_waited_for_go_into_a_pipe(run: Run, tmp_path: Path) -> None:
    ended = run("submit", jobs_file(tmp_path, "one", "two"), "--wait")

    assert ["my-one", "my-two"] == sorted(row["custom_id"] for row in ended.rows())


def test_progress_shows_rate_limit_and_cost(run: Run, gateway: FakeGateway, tmp_path: Path) -> None:
    gateway.looks_until_done = 2

    ended = run("submit", jobs_file(tmp_path, "one", "two"), "--wait")

    assert 0 == ended.code
    assert "0/2 done · 0 failed · 2 waiting · 0 running · $0.000000" in ended.err
    assert "2/2 done · 0 failed · 0 waiting · 0 running · limit 600 requests/min" in ended.err
    assert "$0.000246" in ended.err


def test_waiting_survives_a_gateway_that_is_away_for_a_moment(
    run: Run, gateway: FakeGateway, tmp_path: Path
) -> None:
    gateway.looks_until_done = 2
    path = jobs_file(tmp_path, "one")
    run("submit", path, "--idempotency-key", "run")
    gateway.script = [Scripted(202, accepted_reply(gateway)), Scripted(500, "oops")]

    ended = run("submit", path, "--idempotency-key", "run", "--wait")

    assert 0 == ended.code
    assert "succeeded" == ended.rows()[0]["result"]["type"]


def accepted_reply(gateway: FakeGateway) -> dict[str, Any]:
    rows = [
        {"index": index, "status": "accepted", "job": job}
        for index, job in enumerate(gateway.jobs.values())
    ]
    return {"type": "job_list", "accepted": len(rows), "rejected": 0, "data": rows}


def test_a_result_file_that_cannot_be_written_is_found_before_anything_is_sent(
    run: Run, gateway: FakeGateway, tmp_path: Path
) -> None:
    ended = run("submit", "--prompt", "x", "--wait", "--out", tmp_path / "no" / "such" / "folder")

    assert 1 == ended.code
    assert "cannot be written: No such file or directory" in ended.err
    assert [] == gateway.calls


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["submit"], "provide either FILE or --prompt"),
        (["submit", "x.jsonl", "--prompt", "x"], "provide either FILE or --prompt"),
        (["submit", "x.jsonl", "--model", "m"], "require --prompt"),
        (["submit", "--prompt", "x", "--out", "y"], "--out requires --wait"),
        (["submit", "--prompt", "x", "--metadata", "team"], "is not name=value"),
        (["list", "--state", "done"], "'done' is not one of"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(
    run: Run, arguments: list[str], reason: str
) -> None:
    ended = run(*arguments)

    assert 2 == ended.code
    assert reason in " ".join(ended.err.replace("│", " ").split())


def test_a_file_that_is_not_there_is_named(run: Run, tmp_path: Path) -> None:
    ended = run("submit", tmp_path / "nothing.jsonl")

    assert 1 == ended.code
    assert "nothing.jsonl cannot be read: No such file or directory" in ended.err


@pytest.mark.parametrize(("name", "what"), [("", "a directory"), ("nothing.jsonl", "missing")])
def test_an_upload_of_what_is_not_a_file_says_what_it_is(
    run: Run, tmp_path: Path, name: str, what: str
) -> None:
    ended = run("upload", tmp_path / name)

    assert 1 == ended.code
    assert f"{tmp_path / name} is {what}; upload takes one file" in ended.err


# ---------------------------------------------------------------- jobs


def test_a_job_is_shown_with_its_answer_its_attempts_and_its_cost(
    run: Run, gateway: FakeGateway
) -> None:
    run("submit", "--prompt", "Hello", "--wait")

    ended = run("get", next(iter(gateway.jobs)))

    assert 0 == ended.code
    for fact in ("succeeded", "answer to Hello", "req_upstream_1", "$0.000123", "20 output"):
        assert fact in ended.out


def test_a_job_that_failed_is_shown_with_its_error(run: Run, gateway: FakeGateway) -> None:
    gateway.ending_of["Hello"] = "errored"
    waited = run("submit", "--prompt", "Hello", "--wait")

    ended = run("get", next(iter(gateway.jobs)))

    assert (1, "") == (waited.code, waited.out)
    assert "errored: invalid_request_error: max_tokens: too large" in waited.err
    assert "invalid_request_error: max_tokens: too large" in ended.out


def test_a_job_can_be_had_as_the_api_gives_it(run: Run, gateway: FakeGateway) -> None:
    job_id = run("submit", "--prompt", "Hello [bold]").out.strip()

    ended = run("get", job_id, "--json")

    assert gateway.jobs[job_id] == json.loads(ended.out)


def test_text_that_looks_like_markup_is_shown_as_it_is(run: Run, gateway: FakeGateway) -> None:
    run("submit", "--prompt", "[bold red]x[/nonsense] :smile:", "--wait")

    ended = run("get", next(iter(gateway.jobs)))

    assert "answer to [bold red]x[/nonsense] :smile:" in ended.out


def test_an_unknown_job_is_an_error_with_the_request_id(run: Run) -> None:
    ended = run("get", "job_0/../x?y")

    assert (1, "") == (ended.code, ended.out)
    assert "error: not_found_error: no such thing (HTTP 404, request req_gateway_1)\n" == ended.err


def test_results_of_named_jobs_keep_their_order(run: Run, tmp_path: Path) -> None:
    path = jobs_file(tmp_path, *(f"p{n}" for n in range(40)))
    names = [row["id"] for row in run("submit", path, "--wait").rows()]

    ended = run("results", *reversed(names), names[0])

    assert 0 == ended.code
    assert [*reversed(names), names[0]] == [row["id"] for row in ended.rows()]


def test_results_without_names_are_those_of_all_jobs_that_are_done(
    run: Run, gateway: FakeGateway, tmp_path: Path
) -> None:
    gateway.ending_of["p2"] = "errored"
    run("submit", jobs_file(tmp_path, *(f"p{n}" for n in range(120))), "--wait")
    run("submit", "--prompt", "not done")
    out = tmp_path / "all.jsonl"

    everything = run("results", "--out", out)
    errored = run("results", "--state", "errored")

    assert 0 == everything.code
    assert "120 results written to" in everything.err
    assert 120 == len(out.read_text().splitlines())
    assert ["my-p2"] == [row["custom_id"] for row in errored.rows()]


def test_results_of_jobs_not_done_or_not_there_are_reported(run: Run) -> None:
    job_id = run("submit", "--prompt", "Hello").out.strip()

    ended = run("results", job_id, "job_0")

    assert (1, "") == (ended.code, ended.out)
    assert f"{job_id}: not ended: queued" in ended.err
    assert "job_0: job not found" in ended.err


def test_jobs_are_listed_newest_first_as_many_as_asked_for(
    run: Run, gateway: FakeGateway, tmp_path: Path
) -> None:
    run("submit", jobs_file(tmp_path, *(f"p{n}" for n in range(230))))

    listed = run("list", "--limit", 210, "--json")
    table = run("list", "--limit", 2)
    nothing = run("list", "--state", "errored")

    # Lists are sent side by side, so which of them is newest is the gateway's to say.
    newest = [job["custom_id"] for job in reversed(gateway.jobs.values())]
    assert newest[:210] == [job["custom_id"] for job in json.loads(listed.out)["data"]]
    assert newest[0] in table.out
    assert newest[2] not in table.out
    assert ("/jobs?limit=2") in [target for _, target in gateway.calls]
    assert (0, "", "no errored jobs\n") == (nothing.code, nothing.out, nothing.err)


def test_canceling_says_what_became_of_each_job(run: Run, gateway: FakeGateway) -> None:
    waiting = run("submit", "--prompt", "one").out.strip()
    running = run("submit", "--prompt", "two").out.strip()
    gateway.jobs[running]["state"] = "running"

    ended = run("cancel", waiting, "job_0", running)

    assert 1 == ended.code
    assert [
        f"{waiting} canceled",
        f"{running} cancel requested, call in flight",
    ] == ended.out.splitlines()
    assert "job_0: not_found_error" in ended.err


# ---------------------------------------------------------------- usage and limits


def test_usage_is_asked_for_and_shown_as_named(run: Run, gateway: FakeGateway) -> None:
    ended = run(
        *("usage", "--from", "2026-12-01", "--to", "2026-12-02", "--group-by", "model, lane")
    )
    raw = run("usage", "--json")

    query = "/usage?from=2026-12-01&to=2026-12-02&group_by=model%2Clane"
    assert query == gateway.calls[0][1].replace(",", "%2C")
    for fact in ("claude-haiku-5-5", "live", "3,000", "$1.23", "total"):
        assert fact in ended.out
    assert 1_234_567 == json.loads(raw.out)["total"]["cost_micro_usd"]


def test_limits_show_what_is_known_and_what_is_blocked(run: Run, gateway: FakeGateway) -> None:
    gateway.limits[0] |= {
        "blocked_until": "2026-12-01T12:00:30Z",
        "blocked_reason": "rate limited",
        "rate_factor": 0.5,
    }

    ended = run("limits")
    raw = run("limits", "--json")

    for fact in ("org-one/claude-haiku-5-5", "600", "100,000", "learned", "50%", "rate limited"):
        assert fact in ended.out
    assert {"data": gateway.limits} == json.loads(raw.out)


def test_an_empty_list_of_limits_is_shown_in_words(run: Run, gateway: FakeGateway) -> None:
    gateway.limits = []

    ended = run("limits")

    assert (0, "") == (ended.code, ended.out)
    assert "no limit groups yet" in ended.err


# ---------------------------------------------------------------- address and key


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"SLUICE_URL": ""}, "no gateway URL: set SLUICE_URL or --url"),
        ({"SLUICE_KEY": ""}, "no client key: set SLUICE_KEY or --key"),
        ({"SLUICE_URL": "example.org"}, '"example.org" is not a valid gateway URL: set SLUICE_URL'),
        ({"SLUICE_URL": "http://[::1"}, '"http://[::1" is not a valid gateway URL'),
        ({"SLUICE_KEY": "a b"}, "contains invalid characters: set SLUICE_KEY again"),
        ({"SLUICE_KEY": "not_the_right_key"}, "rejected this client key: set SLUICE_KEY"),
        ({"SLUICE_URL": "http://127.0.0.1:9"}, "no response from http://127.0.0.1:9"),
    ],
)
def test_what_is_missing_or_wrong_is_one_line_that_says_what_to_set(
    run: Run, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    ended = run("limits")

    assert (1, "") == (ended.code, ended.out)
    assert said in ended.err
    assert 1 == len(ended.err.splitlines())


@pytest.mark.parametrize(
    "answer",
    [
        Scripted(200, "<html>hello</html>"),
        Scripted(200, {"hello": "world"}),
        Scripted(404, {"message": "Not Found"}),
        Scripted(301, "", {"location": "https://example.org"}),
    ],
)
def test_an_address_that_is_not_a_gateway_is_recognized(
    run: Run, gateway: FakeGateway, answer: Scripted
) -> None:
    gateway.script = [answer]

    ended = run("limits")

    assert 1 == ended.code
    assert "is not a Sluice gateway" in ended.err


def test_options_win_over_the_environment(
    run: Run, gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLUICE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("SLUICE_KEY", "another_key_altogether")

    ended = run("limits", "--url", gateway.url + "/", "--key", CLIENT_KEY)

    assert 0 == ended.code


def test_a_key_comes_from_a_file_which_wins_over_the_environment(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "key"
    file.write_text(f"{CLIENT_KEY}\n")
    monkeypatch.setenv("SLUICE_KEY", "another_key_altogether")

    ended = run("limits", "--key-file", file)

    assert 0 == ended.code, ended.err


def test_a_key_comes_from_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLUICE_KEY")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{CLIENT_KEY}\n".encode())))

    ended = run("limits", "--key-file", "-")

    assert 0 == ended.code, ended.err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is empty"),
        (b"  \n\n", "is empty"),
        (b"sluice_secret_a\nsluice_secret_b\n", "has several lines"),
        ("schlüssel".encode(), "not plain ASCII text"),
    ],
    ids=["missing", "empty", "blank", "several lines", "not ASCII"],
)
def test_the_error_of_a_key_file_without_a_key_is_clear(
    run: Run, tmp_path: Path, content: bytes | None, said: str
) -> None:
    file = tmp_path / "key"
    if content is not None:
        file.write_bytes(content)

    ended = run("limits", "--key-file", file)

    assert 1 == ended.code
    assert f"error: {file} " in ended.err
    assert said in ended.err
    assert "sluice_secret" not in ended.err


def test_a_key_is_given_in_one_way(run: Run, tmp_path: Path) -> None:
    both = run("limits", "--key", CLIENT_KEY, "--key-file", tmp_path / "key")
    twice = run("submit", "-", "--key-file", "-")

    assert (2, 2) == (both.code, twice.code)
    assert "--key-file, not both" in both.err
    assert "cannot both read" in twice.err


def test_every_command_with_a_key_takes_it_from_a_file() -> None:
    def commands(group: Any, path: str = "") -> Iterator[tuple[str, Any]]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from commands(command, f"{path}{name} ")
            else:
                yield f"{path}{name}", command

    options = {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in commands(typer.main.get_command(app.app))
    }

    secret = {name: found for name, found in options.items() if found & {"--key", "--client-key"}}
    assert {"submit", "limits", "batches results", "local up"} <= set(secret)
    for name, found in secret.items():
        assert ("--key-file" in found) == ("--key" in found), name
        assert ("--client-key-file" in found) == ("--client-key" in found), name


# ---------------------------------------------------------------- files with answers


@pytest.mark.parametrize("mode", [None, 0o644, 0o666], ids=["new", "0644", "0666"])
@pytest.mark.parametrize("command", ["submit", "results"])
def test_only_the_owner_can_read_a_file_of_results(
    run: Run, tmp_path: Path, command: str, mode: int | None
) -> None:
    out = tmp_path / "results.jsonl"
    if mode is not None:
        out.write_text("of another run, which was longer\n" * 100)
        out.chmod(mode)
    jobs = jobs_file(tmp_path, "one", "two")
    umask = os.umask(0)
    try:
        if command == "submit":
            ended = run("submit", jobs, "--wait", "--out", out)
        else:
            run("submit", jobs, "--wait")
            ended = run("results", "--out", out)
    finally:
        os.umask(umask)

    assert 0 == ended.code, ended.err
    assert "0o600" == oct(stat.S_IMODE(out.stat().st_mode))
    assert 2 == len([json.loads(line) for line in out.read_text().splitlines()])


def test_what_is_no_regular_file_keeps_its_mode(run: Run, tmp_path: Path) -> None:
    before = Path(os.devnull).stat().st_mode

    ended = run("submit", jobs_file(tmp_path, "one"), "--wait", "--out", os.devnull)

    assert 0 == ended.code, ended.err
    assert before == Path(os.devnull).stat().st_mode


OLD = "results of yesterday\n"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    file = tmp_path / "results.jsonl"
    file.write_text(OLD)
    return file


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text(job_line("one") + "\n")
    return file


REFUSED = Scripted(400, {"error": {"type": "invalid_request_error", "message": "name: no"}})
FAILED = Scripted(500, "")


@pytest.mark.parametrize(
    ("command", "answers"),
    [
        (["upload", "{rows}", "--wait", "--url", "http://127.0.0.1:9"], []),
        (["upload", "{rows}", "--wait"], [REFUSED]),
        (["batches", "results", "batch_0"], []),
        (["batches", "results", "batch_0", "--errors"], []),
        (["results", "job_0"], []),
        (["results"], []),
        (["submit", "{bad}", "--wait"], []),
        (["submit", "{rows}", "--wait"], [REFUSED]),
        (["submit", "{rows}", "--wait", "--url", "http://127.0.0.1:9"], []),
    ],
    ids=[
        *("upload: gateway down", "upload: name refused", "unknown batch", "unknown batch: errors"),
        *("unknown job", "no ended jobs", "only bad lines", "jobs refused", "submit: gateway down"),
    ],
)
def test_an_existing_file_stays_until_there_is_something_to_write(
    run: Run, gateway: FakeGateway, old: Path, command: list[str], answers: list[Scripted]
) -> None:
    rows = old.with_name("rows.jsonl")
    rows.write_text(job_line("one") + "\n")
    bad = rows.with_name("bad.jsonl")
    bad.write_text("{oops\n")
    gateway.script = answers
    before = {path.name for path in old.parent.iterdir()}

    ended = run(*(each.format(rows=rows, bad=bad) for each in command), "--out", old)

    assert 1 == ended.code
    assert OLD == old.read_text()
    assert before == {path.name for path in old.parent.iterdir()}


def test_results_of_a_batch_replace_a_file_when_all_are_there(
    run: Run, gateway: FakeGateway, old: Path, rows: Path
) -> None:
    gateway.result_files["results"] = '{"custom_id":"ü"}\n'.encode()

    uploaded = run("upload", rows, "--wait", "--out", old)
    first = old.read_bytes()
    gateway.result_files["results"] *= 2
    fetched = run("batches", "results", "batch_1", "--out", old)

    assert (0, 0) == (uploaded.code, fetched.code), uploaded.err + fetched.err
    assert 2 * first == old.read_bytes() == gateway.result_files["results"]
    assert rows.read_bytes() == gateway.parts["rows.jsonl"]


def test_a_batch_without_results_keeps_the_file_and_one_without_errors_empties_it(
    run: Run, gateway: FakeGateway, old: Path, rows: Path
) -> None:
    """All of no errors is known to be none; yesterday's errors would be taken for today's."""
    uploaded = run("upload", rows, "--wait", "--out", old)
    fetched = run("batches", "results", "batch_1", "--out", old)
    kept = old.read_text()
    errors = run("batches", "results", "batch_1", "--errors", "--out", old)

    assert (1, 1, 0) == (uploaded.code, fetched.code, errors.code)
    assert f"no results; {old} was not written" in fetched.err
    assert (OLD, "") == (kept, old.read_text())
    assert gateway.parts


def test_a_download_that_breaks_off_keeps_the_file(
    run: Run, gateway: FakeGateway, old: Path, rows: Path
) -> None:
    gateway.result_files["results"] = b'{"custom_id": "a"}\n' * 1000
    run("upload", rows)
    gateway.break_downloads = True

    ended = run("batches", "results", "batch_1", "--out", old)

    assert 1 == ended.code
    assert "error: the download from S3 failed" in ended.err
    assert OLD == old.read_text()


@pytest.mark.parametrize("command", ["submit", "upload"])
def test_output_that_is_the_input_is_refused_before_anything_is_sent(
    run: Run, gateway: FakeGateway, rows: Path, command: str
) -> None:
    before = rows.read_text()
    link = rows.with_name("link")
    link.symlink_to(rows)

    itself = run(command, rows, "--wait", "--out", rows)
    linked = run(command, rows, "--wait", "--out", link)

    assert (2, 2) == (itself.code, linked.code)
    assert f"{rows} is also the input {rows}" in itself.err
    assert f"{link} is also the input {rows}" in linked.err
    assert before == rows.read_text()
    assert [] == gateway.calls


@pytest.mark.parametrize(
    "command",
    [["submit", "{rows}", "--wait"], ["results"], ["batches", "results", "batch_1"]],
    ids=["submit", "results", "batches results"],
)
def test_a_key_file_is_an_input_too(
    run: Run, gateway: FakeGateway, rows: Path, command: list[str]
) -> None:
    key_file = rows.with_name("key")
    key_file.write_text(f"{CLIENT_KEY}\n")
    words = [each.format(rows=rows) for each in command]

    ended = run(*words, "--key-file", key_file, "--out", key_file)

    assert 2 == ended.code
    assert f"{CLIENT_KEY}\n" == key_file.read_text()
    assert [] == gateway.calls


# ---------------------------------------------------------------- text from elsewhere

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe"
HALF_EMOJI = "half an emoji: \ud83d"


def printable(text: str) -> bool:
    """Whether a terminal obeys nothing in a text beside its line breaks and tabs."""
    text = text.replace("\n", "").replace("\t", "")
    return all(each.isprintable() or unicodedata.category(each) == "Zs" for each in text)


def test_an_answer_with_half_a_surrogate_pair_is_escaped_in_json_and_replaced_in_text(
    run: Run, gateway: FakeGateway, tmp_path: Path
) -> None:
    """The rule: JSON is lossless, and a person gets a replacement character."""
    out = tmp_path / "results.jsonl"
    jobs = jobs_file(tmp_path, "one", HALF_EMOJI, "two")

    waited = run("submit", jobs, "--wait", "--out", out)
    text = run("submit", "--prompt", HALF_EMOJI, "--wait")
    piped = run("submit", jobs, "--wait")
    job_id = next(each for each, job in gateway.jobs.items() if job["prompt"] == HALF_EMOJI)
    shown, raw = run("get", job_id), run("get", job_id, "--json")
    fetched = run("results", job_id)

    answers = {
        row["custom_id"]: row["result"]["message"]["content"][0]["text"]
        for row in map(json.loads, out.read_bytes().splitlines())
    }
    assert [0] * 6 == [each.code for each in (waited, text, piped, shown, raw, fetched)]
    assert {f"my-{each}": f"answer to {each}" for each in ("one", HALF_EMOJI, "two")} == answers
    assert 3 == len(piped.rows())
    assert "answer to half an emoji: \N{REPLACEMENT CHARACTER}\n" == text.out
    assert "answer to half an emoji: \N{REPLACEMENT CHARACTER}" in shown.out
    assert gateway.jobs[job_id] == json.loads(raw.out)
    assert f"answer to {HALF_EMOJI}" == fetched.rows()[0]["result"]["message"]["content"][0]["text"]


@pytest.mark.parametrize(
    "command",
    [
        ["get", "{job}"],
        ["get", "{job}", "--json"],
        ["list"],
        ["list", "--json"],
        ["results"],
        ["results", "job_" + ESCAPES],
        ["cancel", "{job}"],
        ["submit", "--prompt", ESCAPES, "--wait"],
        ["submit", "--prompt", "refused", "--wait"],
        ["submit", "no" + ESCAPES],
        ["submit", "--prompt", "x", "--metadata", ESCAPES],
        ["upload", "no" + ESCAPES],
        ["upload", "{file}"],
        ["upload", "{file}", "--json"],
        ["batches", "show", "batch_1"],
        ["batches", "show", "batch_1", "--wait"],
        ["batches", "results", "batch_1"],
        ["limits"],
        ["limits", "--json"],
        ["limits", "--url", "http://127.0.0.1:9/" + ESCAPES],
        ["limits", "--key-file", "no" + ESCAPES],
        ["list", "--state", ESCAPES],
        ["list", "--" + ESCAPES],
        [ESCAPES],
        ["batches", ESCAPES],
    ],
    ids=lambda words: " ".join(words).replace(ESCAPES, "HOSTILE"),
)
def test_nothing_from_elsewhere_reaches_the_terminal_raw(
    run: Run, gateway: FakeGateway, tmp_path: Path, command: list[str]
) -> None:
    """Answers, names, errors, files and the command line itself, which may name what others have named."""
    file = tmp_path / f"{ESCAPES}.jsonl"
    file.write_text(job_line(ESCAPES) + "\n")
    gateway.result_files["results"] = f'{{"custom_id": "{ESCAPES[:0]}\x9b31m\u202e"}}\n'.encode()
    gateway.reject["refused"] = {"type": ESCAPES, "message": f"line\n{ESCAPES}"}
    gateway.batch_problem = ESCAPES
    gateway.limits[0] |= {"group": ESCAPES, "blocked_until": ESCAPES, "blocked_reason": ESCAPES}
    run("submit", file)
    gateway.finish()
    run("upload", file)
    job = next(iter(gateway.jobs))

    ended = run(*(each.format(job=job, file=file) for each in command))

    assert ended.out + ended.err
    assert printable(ended.out), ascii(ended.out)
    assert printable(ended.err), ascii(ended.err)


@pytest.mark.parametrize(
    "command",
    [
        *(["get"], ["cancel"], ["results"], ["batches", "show"], ["batches", "results"]),
        *(["batches", "cancel"], ["usage", "--from"], ["usage", "--url"], ["usage", "--key"]),
        *(["submit"], ["upload"], ["list", "--state"], ["submit", "--prompt", "x", "--deadline"]),
        ["submit", "--prompt", "x", "--idempotency-key"],
    ],
    ids=" ".join,
)
def test_words_that_are_not_utf8_are_errors_and_no_tracebacks(
    run: Run, gateway: FakeGateway, command: list[str]
) -> None:
    gateway.script = [Scripted(404, {"error": {"type": "not_found_error", "message": "no"}})]

    ended = run(*command, os.fsdecode(b"caf\xe9"))

    assert ended.code in {1, 2}
    assert 1 == len(ended.err.splitlines())


def test_a_program_without_a_terminal_and_without_unicode_gets_json(
    gateway: FakeGateway, tmp_path: Path
) -> None:
    jobs = jobs_file(tmp_path, "déjà vu", HALF_EMOJI, "🙂", ESCAPES)
    environment = {"SLUICE_URL": gateway.url, "SLUICE_KEY": CLIENT_KEY}
    plain = {
        "LC_ALL": "C",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONUTF8": "0",
        "PATH": os.environ["PATH"],
    }

    done = subprocess.run(
        [sys.executable, "-m", "scripts.cli", "submit", str(jobs), "--wait"],
        cwd=REPOSITORY,
        env=plain | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )

    texts = {
        json.loads(line)["result"]["message"]["content"][0]["text"]
        for line in done.stdout.splitlines()
    }
    assert 0 == done.returncode, done.stderr
    assert {f"answer to {each}" for each in ("déjà vu", HALF_EMOJI, "🙂", ESCAPES)} == texts
    assert not set(range(32)) & set(done.stdout + done.stderr) - {10}


# ---------------------------------------------------------------- the client itself


class Sleeps:
    """A clock that sleeping moves, and what was slept."""

    def __init__(self) -> None:
        self.now = 0.0
        self.seconds: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.now += seconds


def patient_client(url: str, sleeps: Sleeps, notes: list[str] | None = None) -> Gateway:
    return Gateway(
        url,
        CLIENT_KEY,
        on_wait=(notes if notes is not None else []).append,
        sleep=sleeps.sleep,
        clock=sleeps.clock,
        jitter=lambda: 1.0,
    )


def test_the_wait_the_gateway_names_is_waited_and_said(gateway: FakeGateway) -> None:
    sleeps, notes = Sleeps(), list[str]()
    gateway.script = [Scripted(429, {"message": "Too Many Requests"}, {"retry-after": "17"})]

    with patient_client(gateway.url, sleeps, notes) as client:
        client.limits()

    assert [17.0] == sleeps.seconds
    assert 1 == len(notes)
    assert "Too Many Requests" in notes[0]
    assert "17 s" in notes[0]


def test_without_a_named_wait_the_pauses_double_up_to_ten_seconds(gateway: FakeGateway) -> None:
    sleeps = Sleeps()
    gateway.script = [Scripted(503, "") for _ in range(8)]

    with patient_client(gateway.url, sleeps) as client:
        client.limits()

    assert [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0] == [round(each, 3) for each in sleeps.seconds]


def test_a_gateway_that_stays_busy_ends_the_patience(gateway: FakeGateway) -> None:
    sleeps = Sleeps()
    gateway.script = [Scripted(429, "", {"retry-after": "100"}) for _ in range(9)]

    with patient_client(gateway.url, sleeps) as client, pytest.raises(GatewayRefused) as refused:
        client.limits()

    assert 429 == refused.value.status
    assert [100.0, 100.0, 100.0] == sleeps.seconds


def test_polling_stops_soon_for_an_address_that_never_answered_and_later_for_one_that_did(
    gateway: FakeGateway,
) -> None:
    never, once = Sleeps(), Sleeps()

    with patient_client("http://127.0.0.1:9", never) as client, pytest.raises(GatewayUnreachable):
        client.limits()
    with patient_client(gateway.url, once) as client:
        client.limits()
        gateway.lose_replies = 1000
        with pytest.raises(GatewayUnreachable):
            client.limits()

    assert never.now <= 1.5
    assert 50.0 < once.now <= 60.0


def test_a_wrong_request_is_not_sent_twice(gateway: FakeGateway) -> None:
    with patient_client(gateway.url, Sleeps()) as client, pytest.raises(GatewayRefused):
        client.job("job_0")

    assert 1 == len(gateway.calls)


def test_a_rejection_that_passes_is_met_by_sending_the_list_again(gateway: FakeGateway) -> None:
    sleeps = Sleeps()
    busy = {"type": "api_error", "message": "the jobs table is busy"}
    entry = {"index": 0, "status": "rejected", "error": busy}
    reply = {"type": "job_list", "accepted": 0, "rejected": 1, "data": [entry]}
    gateway.script = [Scripted(202, reply), Scripted(202, reply)]
    body = ('{"jobs":[' + job_line("one") + "]}").encode()

    with patient_client(gateway.url, sleeps) as client:
        (taken,) = client.submit(body, "run.0")

    assert "accepted" == taken["status"]
    assert ["run.0", "run.0", "run.0"] == gateway.idempotency_keys
    assert 2 == len(sleeps.seconds)


def test_a_client_without_an_address_cannot_be_made() -> None:
    with pytest.raises(NotConfigured):
        Gateway(None, CLIENT_KEY)


# ---------------------------------------------------------------- starting up


def test_help_loads_neither_boto3_nor_httpx_nor_the_local_stack() -> None:
    code = (
        "import sys, scripts.cli.app\n"
        "names = ('boto3', 'botocore', 'httpx', 'rich.live', 'scripts.local_stack')\n"
        "print([name for name in names if name in sys.modules])"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )

    assert "[]\n" == done.stdout, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["submit"],
        ["get"],
        ["results"],
        ["list"],
        ["cancel"],
        ["usage"],
        ["limits"],
        ["setup"],
        ["keys", "create"],
        ["keys", "list"],
        ["keys", "revoke"],
        ["local", "up"],
    ],
)
def test_every_command_has_help(run: Run, command: list[str]) -> None:
    ended = run(*command, "--help")

    assert 0 == ended.code
    assert "Usage:" in ended.out


def test_the_version_is_one_word(run: Run) -> None:
    assert 0 == run("--version").code
