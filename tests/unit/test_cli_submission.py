"""Lines to lists to accepted jobs, without a network."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from scripts.cli.errors import CommandFailed, GatewayRefused, GatewayUnreachable
from scripts.cli.submission import (
    MAX_BYTES_PER_LIST,
    Line,
    Rejected,
    body_of_batch,
    deadline_at,
    pack,
    read_jobs,
    send,
    within_one_request,
)

JOB = b'{"params": {"model": "m", "messages": []}}'
NOON = datetime(2026, 12, 1, 12, tzinfo=UTC)


class ScriptedGateway:
    """Accepts every job, unless `answer` says otherwise for a call."""

    def __init__(self, answer: Callable[[int, list[Any]], Any] | None = None) -> None:
        self.lists: dict[str, list[Any]] = {}
        self._answer = answer

    def submit(self, body: bytes, idempotency_key: str) -> list[dict[str, Any]]:
        jobs = json.loads(body)["jobs"]
        self.lists[idempotency_key] = jobs
        number = int(idempotency_key.rpartition(".")[2])
        answer = self._answer and self._answer(number, jobs)
        if isinstance(answer, Exception):
            raise answer
        return answer or [
            {"index": index, "status": "accepted", "job": {"id": f"job_{number}_{index}"}}
            for index in range(len(jobs))
        ]


def read(*lines: bytes, **defaults: object) -> list[Line | Rejected]:
    return list(read_jobs(lines, defaults))


def numbered_lines(count: int, size: int = 0) -> list[Line]:
    return [Line(number, b" " * size + b"{}", None) for number in range(1, count + 1)]


def test_a_job_keeps_its_line_number_across_empty_lines() -> None:
    items = read(b"\n", JOB, b"  \r\n", JOB)

    assert [2, 4] == [item.line if isinstance(item, Rejected) else item.number for item in items]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"params": ', "not valid JSON: Expecting value at column 11"),
        (b"\xff\xfe{}", "not UTF-8 text"),
        (b"[1]", 'not a JSON object; a line is {"params": {...}}'),
        (b'{"custom_id": "a"}', 'no "params" object; a line is: {"params": {...}}'),
        # The commonest slip: the request itself, not wrapped.
        (
            b'{"model": "m", "messages": []}',
            'no "params" object; wrap the request: {"params": {...}}',
        ),
        (b'{"params": {"x": NaN}}', "not valid JSON: NaN is not a number that a double holds"),
        (
            b'{"params": {"x": -Infinity}}',
            "not valid JSON: -Infinity is not a number that a double holds",
        ),
        (b'{"params": {"x": 1e400}}', "not valid JSON: 1e400 is not a number that a double holds"),
        (b'{"params": ' + b"[" * 200_000, "not usable JSON: nested too deeply"),
    ],
)
def test_a_line_that_is_no_job_says_why(line: bytes, reason: str) -> None:
    items = read(JOB, line)

    assert items[1:] == [Rejected(2, "invalid_request_error", reason)]


def test_a_file_that_begins_with_a_byte_order_mark_is_read() -> None:
    (item,) = read(b"\xef\xbb\xbf" + JOB)

    assert isinstance(item, Line)


def test_a_custom_id_used_twice_is_rejected_the_second_time() -> None:
    line = b'{"custom_id": "a", "params": {}}'

    first, second = read(line, line)

    assert isinstance(first, Line)
    assert second == Rejected(
        2, "invalid_request_error", 'duplicate custom_id "a"; first used in line 1'
    )


def test_what_the_line_says_wins_over_the_defaults_and_metadata_is_merged() -> None:
    line = b'{"params": {}, "deadline": "own", "metadata": {"a": "own"}}'

    (item,) = read(line, deadline="default", metadata={"a": "default", "b": "default"})

    assert isinstance(item, Line)
    assert json.loads(item.body) == {
        "params": {},
        "deadline": "own",
        "metadata": {"a": "own", "b": "default"},
    }


@pytest.mark.parametrize("text", ["déjà vu 你好", "\ud800 half a pair"])
def test_any_text_arrives_as_it_was(text: str) -> None:
    (item,) = read(json.dumps({"params": {"text": text}}).encode())

    assert isinstance(item, Line)
    assert text == json.loads(item.body)["params"]["text"]


def test_a_job_larger_than_a_list_may_be_is_rejected_here() -> None:
    (item,) = read(json.dumps({"params": {"text": "x" * MAX_BYTES_PER_LIST}}).encode())

    assert isinstance(item, Rejected)
    assert "request_too_large" == item.error_type


def test_lists_hold_a_hundred_jobs() -> None:
    lists = list(pack(numbered_lines(250)))

    assert [100, 100, 50] == [len(each) for each in lists]


def test_lists_stay_below_four_megabytes() -> None:
    lists = list(pack(numbered_lines(10, size=1_000_000)))

    assert [3, 3, 3, 1] == [len(each) for each in lists]


def test_a_list_may_be_exactly_as_large_as_allowed() -> None:
    bodies = [b"x" * (MAX_BYTES_PER_LIST // 2 - 6), b"x" * (MAX_BYTES_PER_LIST // 2 - 6)]
    whole = len(b'{"jobs":[' + b",".join(bodies) + b"]}")

    lists = list(pack(Line(1, body, None) for body in bodies))

    assert MAX_BYTES_PER_LIST == whole
    assert 1 == len(lists)


def test_each_list_has_its_own_key_derived_from_that_of_the_run() -> None:
    gateway = ScriptedGateway()

    outcome = send(gateway, numbered_lines(250), "run")

    assert {"run.0": 100, "run.1": 100, "run.2": 50} == {
        key: len(jobs) for key, jobs in gateway.lists.items()
    }
    assert list(range(1, 251)) == [job.line for job in outcome.accepted]
    assert outcome.stopped is None


def test_bad_lines_are_reported_and_good_ones_are_sent() -> None:
    gateway = ScriptedGateway()

    outcome = send(gateway, read_jobs([JOB, b"nonsense", JOB], {}), "run")

    assert [1, 3] == [job.line for job in outcome.accepted]
    assert [2] == [line.line for line in outcome.rejected]


def test_a_job_the_gateway_rejects_is_reported_with_its_line() -> None:
    def second_is_bad(_: int, jobs: list[Any]) -> list[Any]:
        error = {"type": "invalid_request_error", "message": "no such model"}
        accepted = {"index": 0, "status": "accepted", "job": {"id": "job_a"}}
        return [accepted, {"index": 1, "status": "rejected", "error": error}][: len(jobs)]

    outcome = send(ScriptedGateway(second_is_bad), read_jobs([b"", JOB, JOB], {}), "run")

    assert [Rejected(3, "invalid_request_error", "no such model")] == outcome.rejected
    assert ["job_a"] == [job.job_id for job in outcome.accepted]


def test_a_list_refused_as_a_whole_says_so_for_each_of_its_lines() -> None:
    refused = GatewayRefused(413, "request_too_large", "too large", None)

    outcome = send(ScriptedGateway(lambda *_: refused), numbered_lines(2), "run")

    assert [1, 2] == [line.line for line in outcome.rejected]
    assert outcome.stopped is None


def test_a_list_of_which_no_job_was_accepted_gives_each_its_own_reason() -> None:
    error = {"type": "invalid_request_error", "message": "no such model"}
    rows = [{"index": 0, "status": "rejected", "error": error}]
    refused = GatewayRefused(400, "invalid_request_error", "none accepted", None, rows)

    outcome = send(ScriptedGateway(lambda *_: refused), numbered_lines(1), "run")

    assert [Rejected(1, "invalid_request_error", "no such model")] == outcome.rejected


@pytest.mark.parametrize(
    "failure",
    [
        GatewayRefused(402, "billing_error", "budget used up", "req_1"),
        GatewayUnreachable("http://127.0.0.1:9", "refused"),
    ],
)
def test_sending_stops_at_what_the_next_list_would_meet_too(failure: CommandFailed) -> None:
    gateway = ScriptedGateway(lambda number, _: None if number == 0 else failure)

    outcome = send(gateway, numbered_lines(2000), "run")

    assert failure is outcome.stopped
    assert 100 == len(outcome.accepted)
    assert len(gateway.lists) < 20


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("90m", "2026-12-01T13:30:00Z"),
        ("2h", "2026-12-01T14:00:00Z"),
        ("1d12h", "2026-12-03T00:00:00Z"),
        ("30s", "2026-12-01T12:00:30Z"),
        ("2026-12-24T18:00:00Z", "2026-12-24T18:00:00Z"),
        ("2026-12-24T18:00:00+01:00", "2026-12-24T17:00:00Z"),
    ],
)
def test_a_deadline_is_a_span_or_a_time(text: str, at: str) -> None:
    assert at == deadline_at(text, NOON)


@pytest.mark.parametrize("text", ["soon", "", "2026-12-24T18:00:00", "12", "9999999999d"])
def test_any_other_deadline_is_refused(text: str) -> None:
    with pytest.raises(CommandFailed, match="deadline"):
        deadline_at(text, NOON)


# Batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_has_all_lines_and_names_those_without_a_custom_id() -> None:
    named, other = b'{"custom_id": "a", "params": {}}', b'{"custom_id": 7, "params": {}}'
    null = b'{"custom_id": null, "params": {}}'

    good, rejected = within_one_request(read(JOB, named, other, b"no JSON", null))
    body = json.loads(body_of_batch(good, {"lane": "auto"}))

    # An invalid custom_id is left to the gateway, which says why.
    assert ["line-1", "a", 7, "line-5"] == [job["custom_id"] for job in body["jobs"]]
    assert ("auto", [4]) == (body["lane"], [each.line for each in rejected])


def test_a_file_of_any_size_is_refused_once_it_exceeds_a_request() -> None:
    read_so_far = 0

    def endless() -> Iterator[Line]:
        nonlocal read_so_far
        while True:
            read_so_far += 1
            yield Line(read_so_far, b'"' + b"x" * 999_998 + b'"', "a")

    with pytest.raises(CommandFailed, match="the jobs exceed 4,000,000 bytes"):
        within_one_request(endless())

    assert 4 == read_so_far
