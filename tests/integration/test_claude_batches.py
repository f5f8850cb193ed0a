"""The adapter for upstream Message Batches: against the simulator, and against upstreams no simulator would play."""

from __future__ import annotations

import gzip
import json
import logging
import re
import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import pytest

from scripts.claude_simulator import Running, read, running
from sluice.adapters.claude_batches import MOST_PAGES, PAGE, SdkUpstreamBatches
from sluice.adapters.claude_results import MOST_LINE_BYTES
from sluice.adapters.system import SystemClock
from sluice.domain.errors import ResultsInterrupted, StoreBusy
from sluice.domain.keys import UpstreamKey
from sluice.domain.pricing import Usage
from sluice.domain.refusals import (
    INVALID,
    KEY_REJECTED,
    NOT_PERMITTED,
    OVERLOADED,
    QUEUE_FULL,
    RAMP,
    RATE_LIMITED,
    SPEND_LIMIT,
    TOO_LARGE,
)
from sluice.domain.retries import ANSWER_TOO_LARGE, UNSENDABLE, meaning
from sluice.ports.claude import Refused
from sluice.ports.upstream import (
    CANCELING,
    ENDED,
    IN_PROGRESS,
    Access,
    Created,
    Listed,
    NotFound,
    NotSent,
    ResultRow,
    RowKind,
    Rows,
    Seen,
    Unknown,
    Unreachable,
    UpstreamBatches,
)

KEY, OTHER_KEY = "sk-ant-test-one", "sk-ant-test-two"
VERSION: Final = "2026-10-21"
SECRET: Final = "what-nobody-may-read"
MEBIBYTE: Final = 1024 * 1024
DAY: Final = 24 * 3600
FAST: Final = {"ttft_seconds": 0, "tokens_per_second": None}


@pytest.fixture
def upstream() -> Iterator[UpstreamBatches]:
    adapter = SdkUpstreamBatches(SystemClock())
    yield adapter
    adapter.close()


@contextmanager
def claude(
    batches: dict[str, Any] | None = None, **organization: Any
) -> Iterator[tuple[Running, Access]]:
    settings = {
        "service": FAST,
        "batches": {"seconds": 0, **(batches or {})},
        "organisations": [{"id": "org-one", "keys": [KEY], **organization}],
    }
    with running(read(settings)) as started:
        yield started, access(started.url)


def access(url: str, key: str = KEY) -> Access:
    return Access(UpstreamKey("main", key, base_url=url), VERSION)


def request(custom_id: str, marker: str | None = None) -> dict[str, Any]:
    metadata = {} if marker is None else {"metadata": {"user_id": f"sim:{marker}"}}
    messages = [{"role": "user", "content": f"{SECRET} {custom_id}"}]
    asked = {"model": "claude-opus-5", "max_tokens": 100, "messages": messages} | metadata
    return {"custom_id": custom_id, "params": asked}


def requests(count: int) -> list[dict[str, Any]]:
    return [request(f"row-{number}") for number in range(count)]


def create(
    upstream: UpstreamBatches, by: Access, asked: list[dict[str, Any]]
) -> Created | Refused | NotSent | Unknown:
    body = json.dumps({"requests": asked}).encode()
    pieces = (body[at : at + 100] for at in range(0, len(body), 100))
    return upstream.create(by, pieces, len(body))


def created(upstream: UpstreamBatches, by: Access, asked: list[dict[str, Any]]) -> Seen:
    outcome = create(upstream, by, asked)
    assert isinstance(outcome, Created), outcome
    return outcome.seen


def seen(outcome: object) -> Seen:
    assert isinstance(outcome, Seen), outcome
    return outcome


def rows(outcome: Rows | NotFound | Refused | Unreachable) -> list[ResultRow]:
    assert not isinstance(outcome, NotFound | Refused | Unreachable), outcome
    return list(outcome)


def listed(outcome: object) -> list[str]:
    assert isinstance(outcome, Listed), outcome
    return [batch.id for batch in outcome.batches]


def advance(simulator: Running, seconds: float) -> int:
    """Move the clock of batches ahead, let the simulator do what is due, and return its time in milliseconds."""
    answer = httpx.post(
        f"{simulator.url}/_simulator/batch_clock", json={"advance_seconds": seconds}
    )
    return round(float(answer.json()["now"]) * 1000)


def ended(upstream: UpstreamBatches, by: Access, batch_id: str) -> Seen:
    """Ask until the batch has ended, which the simulator does in the background."""
    for _ in range(2_000):
        found = seen(upstream.get(by, batch_id))
        if found.is_ended:
            return found
    raise AssertionError("the batch does not end")


# The life of a batch -------------------------------------------------------------------------------------------


def test_a_batch_is_created_and_its_results_are_those_that_upstream_sends(
    upstream: UpstreamBatches,
) -> None:
    with claude() as (simulator, by):
        before = advance(simulator, 0)
        first = created(upstream, by, requests(30))
        last = ended(upstream, by, first.id)
        found = rows(upstream.results(by, first.id))
        headers = {"x-api-key": KEY, "anthropic-version": VERSION}
        sent = httpx.get(
            f"{simulator.url}/v1/messages/batches/{first.id}/results", headers=headers
        ).content.splitlines()

    assert (30, IN_PROGRESS, False) == (first.requests, first.status, first.has_results)
    assert first.created_at is not None
    assert before <= first.created_at + 1
    assert first.expires_at == first.created_at + DAY * 1000
    assert (30, ENDED, True, 30) == (
        last.requests, last.status, last.has_results, last.counts.succeeded,
    )  # fmt: skip
    assert [row.custom_id for row in found] == [json.loads(line)["custom_id"] for line in sent]
    # Upstream returns them in another order than they were sent in.
    assert [row.custom_id for row in found] != [f"row-{number}" for number in range(30)]
    for row, line in zip(found, sent, strict=True):
        message = json.loads(line)["result"]["message"]
        assert row.kind is RowKind.SUCCEEDED
        assert row.message in line
        assert json.loads(row.message) == message
        assert row.usage == Usage.from_message(message["usage"])
        assert row.stop_reason == message["stop_reason"]


def test_rows_end_in_every_way(upstream: UpstreamBatches) -> None:
    with claude({"seconds": 10 * DAY}) as (simulator, by):
        expiring = created(upstream, by, [request("late")])
        canceled = created(upstream, by, [request("unwanted")])
        canceling = seen(upstream.cancel(by, canceled.id))
        again = seen(upstream.cancel(by, canceled.id))
        advance(simulator, 2)
        ended(upstream, by, canceled.id)
        unwanted = rows(upstream.results(by, canceled.id))
        advance(simulator, DAY)
        last = ended(upstream, by, expiring.id)
        late = rows(upstream.results(by, expiring.id))
    with claude() as (_, by):
        mixed = created(upstream, by, [request("bad", "400"), request("good")])
        ended(upstream, by, mixed.id)
        found = {row.custom_id: row for row in rows(upstream.results(by, mixed.id))}

    assert (CANCELING, CANCELING, False) == (canceling.status, again.status, canceling.is_ended)
    assert canceling.cancel_initiated_at is not None
    assert [("unwanted", RowKind.CANCELED)] == [(row.custom_id, row.kind) for row in unwanted]
    assert [("late", RowKind.EXPIRED)] == [(row.custom_id, row.kind) for row in late]
    assert (1, last.expires_at) == (last.counts.expired, last.ended_at)
    failure = found["bad"].failure
    assert failure is not None
    assert ("invalid_request_error", 400) == (failure.type, failure.status)
    assert "as configured" in failure.message
    answer = found["good"].answer()
    assert answer is not None
    assert json.loads(answer.message)["type"] == "message"
    assert found["bad"].answer() is None


def test_what_upstream_does_not_do_is_refused_with_its_reason(upstream: UpstreamBatches) -> None:
    with claude({"seconds": 10}) as (simulator, by):
        batch = created(upstream, by, requests(2))
        too_early = upstream.results(by, batch.id)
        unknown = upstream.get(by, "msgbatch_nobody")
        advance(simulator, 10)
        ended(upstream, by, batch.id)
        too_late = upstream.cancel(by, batch.id)
        advance(simulator, 29 * DAY)
        archived = seen(upstream.get(by, batch.id))
        deleted = upstream.results(by, batch.id)

    assert isinstance(too_early, Refused)
    assert isinstance(too_late, Refused)
    assert isinstance(unknown, NotFound)
    assert isinstance(deleted, NotFound)
    assert "archived" in deleted.failure.message
    assert (True, False) == (archived.archived_at is not None, archived.has_results)


def test_a_batch_belongs_to_its_workspace(upstream: UpstreamBatches) -> None:
    with claude(workspaces={"wrkspc_two": {"keys": [OTHER_KEY]}}) as (simulator, by):
        batch = created(upstream, by, requests(1))
        other = access(simulator.url, OTHER_KEY)

        assert isinstance(upstream.get(other, batch.id), NotFound)
        assert isinstance(upstream.cancel(other, batch.id), NotFound)
        assert isinstance(upstream.results(other, batch.id), NotFound)
        assert [] == listed(upstream.since(other, 0))


def test_a_new_batch_may_be_missing_for_some_seconds(upstream: UpstreamBatches) -> None:
    with claude({"not_found_seconds": 100}) as (simulator, by):
        batch = created(upstream, by, requests(1))
        early, results = upstream.get(by, batch.id), upstream.results(by, batch.id)
        advance(simulator, 100)
        later = upstream.get(by, batch.id)

    assert isinstance(early, NotFound)
    assert isinstance(results, NotFound)
    assert isinstance(later, Seen)


def test_a_batch_may_flicker(upstream: UpstreamBatches) -> None:
    with claude({"not_found_rate": 0.5}) as (_, by):
        batch = created(upstream, by, requests(1))
        kinds = {type(upstream.get(by, batch.id)) for _ in range(40)}

    assert {Seen, NotFound} == kinds


def test_the_list_has_what_was_created_since_a_moment(upstream: UpstreamBatches) -> None:
    with claude() as (simulator, by):
        created(upstream, by, requests(1))
        moment = advance(simulator, 100)
        wanted = [created(upstream, by, requests(size)).id for size in (2, 3, 4)]
        found = upstream.since(by, moment)

        assert wanted[::-1] == listed(found)
        assert isinstance(found, Listed)
        assert [4, 3, 2] == [batch.requests for batch in found.batches]
        assert [] == listed(upstream.since(by, advance(simulator, 100)))


def test_a_batch_takes_the_time_of_a_regime_that_was_set_while_the_simulator_runs(
    upstream: UpstreamBatches,
) -> None:
    with claude() as (simulator, by):
        regimes = {"speed": 1440, "slow_day_rate": 1}
        httpx.post(f"{simulator.url}/_simulator/config", json={"batches": {"regimes": regimes}})
        batch = created(upstream, by, requests(20))
        advance(simulator, 60)
        last = ended(upstream, by, batch.id)

    # A day in a minute: at least a minute of it, at most the day in which requests expire.
    assert batch.created_at is not None
    assert last.ended_at is not None
    assert 60_000 / 1440 <= last.ended_at - batch.created_at + 1 <= 60_001
    assert last.counts.succeeded + last.counts.expired == 20


def test_several_threads_may_use_one_adapter(upstream: UpstreamBatches) -> None:
    with claude() as (_, by), ThreadPoolExecutor(8) as threads:
        batches = list(
            threads.map(lambda size: created(upstream, by, requests(size)), range(1, 17))
        )
        found = list(threads.map(lambda batch: upstream.get(by, batch.id), batches))

    assert list(range(1, 17)) == [seen(each).requests for each in found]


# A lost reply --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "batches"), [("drop_after_billing", 1), ("drop_before_billing", 0)]
)
def test_after_a_lost_reply_only_the_list_says_whether_the_batch_exists(
    upstream: UpstreamBatches, fault: str, batches: int
) -> None:
    with claude({"create_faults": {fault: 1}}) as (simulator, by):
        moment = advance(simulator, 0) - 1
        outcome = create(upstream, by, requests(7))
        found = upstream.since(by, moment)

    assert isinstance(outcome, Unknown)
    assert (True, None) == (outcome.failure.may_be_billed, outcome.failure.status)
    assert isinstance(found, Listed)
    assert [7] * batches == [batch.requests for batch in found.batches]


@pytest.mark.parametrize("fault", ["500", "503", "504"])
def test_a_server_error_does_not_say_whether_the_batch_exists(
    upstream: UpstreamBatches, fault: str
) -> None:
    with claude({"create_faults": {fault: 1}}) as (_, by):
        outcome = create(upstream, by, requests(1))

    assert isinstance(outcome, Unknown)
    assert int(fault) == outcome.failure.status
    assert outcome.headers.organization == "org-one"


# Refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason", "names_time"),
    [
        ("spend_cap", SPEND_LIMIT, False),
        ("contract_cap", SPEND_LIMIT, False),
        ("self_limit", SPEND_LIMIT, False),
        ("402", SPEND_LIMIT, False),
        ("ramp", RAMP, True),
        ("429", RATE_LIMITED, True),
        ("529", OVERLOADED, False),
        ("401", KEY_REJECTED, False),
        ("403", NOT_PERMITTED, False),
        ("413", TOO_LARGE, False),
    ],
)
def test_a_refused_create_is_classified(
    upstream: UpstreamBatches, fault: str, reason: str, *, names_time: bool
) -> None:
    with claude({"create_faults": {fault: 1}}) as (_, by):
        outcome = create(upstream, by, requests(1))
        found = upstream.since(by, 0)

    assert isinstance(outcome, Refused)
    assert reason == meaning(outcome.failure).reason
    assert names_time == (outcome.failure.retry_after_ms is not None)
    assert [] == listed(found)


def test_a_full_queue_is_not_a_rate_limit(upstream: UpstreamBatches) -> None:
    with claude({"seconds": 100}, batch_limits={"queued_requests": 5}) as (_, by):
        created(upstream, by, requests(3))
        outcome = create(upstream, by, requests(3))

    assert isinstance(outcome, Refused)
    assert QUEUE_FULL == meaning(outcome.failure).reason
    # The first batch ends within 100 s.
    assert outcome.failure.retry_after_ms is not None
    assert 0 < outcome.failure.retry_after_ms <= 100_000


def test_all_calls_share_a_rate_limit(upstream: UpstreamBatches) -> None:
    with claude(batch_limits={"rpm": 1}) as (_, by):
        batch = created(upstream, by, requests(1))
        outcomes = [
            create(upstream, by, requests(1)),
            upstream.get(by, batch.id),
            upstream.cancel(by, batch.id),
            upstream.since(by, 0),
            upstream.results(by, batch.id),
        ]

    for outcome in outcomes:
        assert isinstance(outcome, Refused), outcome
        assert RATE_LIMITED == meaning(outcome.failure).reason


def test_an_invalid_body_is_refused(upstream: UpstreamBatches) -> None:
    with claude() as (_, by):
        twice = create(upstream, by, [request("same"), request("same")])
        nothing = upstream.create(by, [b"", b"{}"], 2)

    assert isinstance(twice, Refused)
    assert "not unique" in twice.failure.message
    assert isinstance(nothing, Refused)
    assert INVALID == meaning(nothing.failure).reason


def test_a_header_that_cannot_be_sent_is_refused_without_a_call(upstream: UpstreamBatches) -> None:
    by = Access(UpstreamKey("main", KEY, base_url="http://127.0.0.1:9"), VERSION, "beta\nevil")

    outcome = create(upstream, by, requests(1))

    assert isinstance(outcome, Refused)
    assert UNSENDABLE == outcome.failure.type


# Upstreams that no simulator plays -----------------------------------------------------------------------------


@dataclass
class Odd:
    """A server that answers each connection with the next bytes, or as a function of the request's head says."""

    sock: socket.socket
    answers: list[bytes | Callable[[bytes], bytes]] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)
    bodies: list[int] = field(default_factory=list)
    early: bool = False
    """Answer without reading the body."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.sock.getsockname()[1]}"

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.sock.accept()
            except OSError:
                return
            with connection, suppress(ConnectionError):  # a client that has read enough
                self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        received = b""
        while b"\r\n\r\n" not in received:
            more = connection.recv(65_536)
            if not more:
                return
            received += more
        head, _, rest = received.partition(b"\r\n\r\n")
        self.heads.append(head)
        length = re.search(rb"(?i)^content-length: *(\d+)", head, re.MULTILINE)
        wanted, size = int(length.group(1)) if length else 0, len(rest)
        while size < wanted and not self.early:
            more = connection.recv(MEBIBYTE)
            if not more:
                break
            size += len(more)
        self.bodies.append(size)
        if self.answers and (size == wanted or self.early):
            answer = self.answers.pop(0)
            connection.sendall(answer if isinstance(answer, bytes) else answer(head))


@pytest.fixture
def odd() -> Iterator[Odd]:
    server = Odd(socket.create_server(("127.0.0.1", 0)))
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    yield server
    server.sock.shutdown(socket.SHUT_RDWR)
    server.sock.close()
    thread.join(10)


def says(body: bytes, status: int = 200, **headers: str) -> bytes:
    named = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in named.items())
    return f"HTTP/1.1 {status} X\r\n{lines}\r\n".encode() + body


BATCH: Final[dict[str, Any]] = {
    "id": "msgbatch_1",
    "type": "message_batch",
    "processing_status": "in_progress",
    "request_counts": {"processing": 2, "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0},
    "created_at": "2026-11-23T02:13:20.000000Z",
    "results_url": None,
}


def shown(**more: Any) -> bytes:
    return json.dumps({**BATCH, **more}).encode()


def test_a_large_body_is_sent_with_its_length_in_flat_memory(
    upstream: UpstreamBatches, odd: Odd
) -> None:
    size, piece = 120 * MEBIBYTE, MEBIBYTE
    odd.answers = [says(shown())] * 2
    upstream.create(access(odd.url), [b"{}"], 2)  # so that what loads once is not counted
    tracemalloc.start()
    try:
        outcome = upstream.create(
            access(odd.url), (bytes(piece) for _ in range(size // piece)), size
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert isinstance(outcome, Created)
    assert [2, size] == odd.bodies
    head = odd.heads[-1].lower()
    assert f"content-length: {size}".encode() in head
    assert b"transfer-encoding" not in head
    assert f"x-api-key: {KEY}".encode() in head
    assert b"authorization" not in head
    # The piece being sent, the one after it, and what the server of this process receives.
    assert peak < 8 * MEBIBYTE


def test_a_connection_that_is_not_made_has_sent_nothing(upstream: UpstreamBatches) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        by = access(f"http://127.0.0.1:{free.getsockname()[1]}")

    outcome = create(upstream, by, requests(1))
    assert isinstance(outcome, NotSent)
    assert not outcome.failure.may_be_billed
    assert isinstance(upstream.get(by, "msgbatch_1"), Unreachable)
    assert isinstance(upstream.since(by, 0), Unreachable)
    assert isinstance(upstream.results(by, "msgbatch_1"), Unreachable)


@pytest.mark.parametrize(
    ("pieces", "said"), [(1, "the body has 100 bytes"), (3, "the body has at least 300 bytes")]
)
def test_a_body_of_another_length_is_never_sent_to_its_end(
    upstream: UpstreamBatches, odd: Odd, pieces: int, said: str
) -> None:
    odd.answers = [says(shown())]

    outcome = upstream.create(access(odd.url), [bytes(100)] * pieces, 200)

    assert isinstance(outcome, NotSent)
    assert outcome.failure.message.startswith(said)
    assert all(size < 200 for size in odd.bodies)


def test_a_body_that_cannot_be_read_raises_why_and_creates_nothing(
    upstream: UpstreamBatches, odd: Odd
) -> None:
    def body() -> Iterator[bytes]:
        yield bytes(100)
        raise StoreBusy("the data bucket")

    odd.answers = [says(shown())]

    with pytest.raises(StoreBusy, match="the data bucket"):
        upstream.create(access(odd.url), body(), 200)

    assert all(size < 200 for size in odd.bodies)


def test_a_connection_that_breaks_during_the_body_has_not_created_a_batch(
    upstream: UpstreamBatches, odd: Odd
) -> None:
    odd.early = True  # and without an answer: the connection is closed after the head

    outcome = upstream.create(
        access(odd.url), (bytes(MEBIBYTE) for _ in range(100)), 100 * MEBIBYTE
    )

    assert isinstance(outcome, NotSent)


def test_a_connection_that_closes_after_the_body_leaves_the_batch_unknown(
    upstream: UpstreamBatches, odd: Odd
) -> None:
    outcome = create(upstream, access(odd.url), requests(1))

    assert isinstance(outcome, Unknown)


@pytest.mark.parametrize(
    "answer",
    [
        says(b""),
        says(b"not JSON"),
        says(b"[1]"),
        says(b'{"id": null}'),
        says(b'{"id": "\\ud83d"}'),
        says(b"[" * 100_000),
        says(b'{"id": "' + b"x" * 9 * MEBIBYTE + b'"}'),
        says(b'{"type":"error","error":{"type":"api_error","message":"oh"}}'),
        says(b"<html>Bad Gateway</html>", 502),
        says(b"", 524),
        says(b"", 408),
        b"HTTP/1.1 200 X\r\ncontent-length: 100\r\n\r\nhalf",
        says(b"\x1f\x8b garbage", 200, content_encoding="gzip"),
        b"not HTTP at all\r\n\r\n",
    ],
)
def test_an_answer_that_says_nothing_leaves_the_batch_unknown(
    upstream: UpstreamBatches, odd: Odd, answer: bytes
) -> None:
    odd.answers = [answer] * 4
    by = access(odd.url)

    assert isinstance(create(upstream, by, requests(1)), Unknown)
    assert isinstance(upstream.get(by, "msgbatch_1"), Unreachable)
    assert isinstance(upstream.cancel(by, "msgbatch_1"), Unreachable)
    assert isinstance(upstream.since(by, 0), Unreachable)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}', 200, OVERLOADED),
        (b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}', 503, OVERLOADED),
        (b'{"type":"error","error":{"type":"request_too_large","message":"no"}}', 413, TOO_LARGE),
        (b"<html>413 Request Entity Too Large</html>", 413, TOO_LARGE),
        (b"x" * 9 * MEBIBYTE, 413, TOO_LARGE),
        (b'{"error":{"message":"You have reached your specified workspace API usage limits."}}', 400, SPEND_LIMIT),
    ],
)  # fmt: skip
def test_an_odd_refusal_is_one(
    upstream: UpstreamBatches, odd: Odd, body: bytes, status: int, reason: str
) -> None:
    odd.answers = [says(body, status)]

    outcome = create(upstream, access(odd.url), requests(1))

    assert isinstance(outcome, Refused)
    assert reason == meaning(outcome.failure).reason
    assert len(outcome.failure.message) < 2_100


def test_another_batch_than_the_one_asked_for_is_not_taken_for_it(
    upstream: UpstreamBatches, odd: Odd
) -> None:
    odd.answers = [says(shown(id="msgbatch_2"))]

    assert isinstance(upstream.get(access(odd.url), "msgbatch_1"), Unreachable)


def test_missing_fields_are_none_and_unknown_states_are_kept(
    upstream: UpstreamBatches, odd: Odd
) -> None:
    odd.answers = [
        says(b'{"id": "msgbatch_1"}'),
        says(shown(processing_status="cancelling", created_at="soon", request_counts={"later": 3})),
        says(shown(request_counts={"processing": -1}, processing_status=7, ended_at=12)),
    ]
    bare, strange, wrong = (seen(upstream.get(access(odd.url), "msgbatch_1")) for _ in range(3))

    assert bare == Seen("msgbatch_1")
    assert ("cancelling", False, None, 3) == (
        strange.status, strange.is_ended, strange.created_at, strange.requests,
    )  # fmt: skip
    assert ("", None, None) == (wrong.status, wrong.requests, wrong.ended_at)


# The list ------------------------------------------------------------------------------------------------------


def page(numbers: list[int], *, more: object = True) -> bytes:
    """Return a page of batches, each created at the second of its number."""
    data = [
        {**BATCH, "id": f"msgbatch_{number}", "created_at": f"2026-11-23T00:00:{number:02}Z"}
        for number in numbers
    ]
    return says(json.dumps({"data": data, "has_more": more}).encode())


SECOND_3: Final = 1_795_392_003_000
"""2026-11-23T00:00:03Z."""


def test_the_list_is_read_page_by_page_until_older_batches(
    upstream: UpstreamBatches, odd: Odd
) -> None:
    odd.answers = [page([6, 5]), page([4, 3]), page([2, 1]), page([0], more=False)]

    found = upstream.since(access(odd.url), SECOND_3)

    assert [f"msgbatch_{number}" for number in (6, 5, 4, 3)] == listed(found)
    asked = [re.search(rb"GET (\S+)", head) for head in odd.heads]
    paths = [each.group(1).decode() for each in asked if each]
    assert paths == [
        f"/v1/messages/batches?limit={PAGE}",
        f"/v1/messages/batches?limit={PAGE}&after_id=msgbatch_5",
        f"/v1/messages/batches?limit={PAGE}&after_id=msgbatch_3",
    ]


@pytest.mark.parametrize(
    "answers",
    [
        [page([6, 5]), page([6, 5])],
        [page([6, 5]), page([])],
        [page([6, 5]), says(b"{}")],
        [page([6, 5]), says(b"", 500)],
        [page([6, 5])],
        [says(json.dumps({"data": [BATCH, {"id": None}], "has_more": False}).encode())],
        [page([59 - number]) for number in range(MOST_PAGES)],
    ],
    ids=["same page", "empty page", "no page", "error", "closed", "no id", "no end"],
)
def test_a_list_that_is_not_complete_is_not_returned(
    upstream: UpstreamBatches, odd: Odd, answers: list[bytes | Callable[[bytes], bytes]]
) -> None:
    odd.answers = answers

    assert isinstance(upstream.since(access(odd.url), SECOND_3), Unreachable)


def test_a_batch_without_a_time_may_be_new(upstream: UpstreamBatches, odd: Odd) -> None:
    data = [{"id": "msgbatch_9"}]
    odd.answers = [says(json.dumps({"data": data}).encode())]

    assert ["msgbatch_9"] == listed(upstream.since(access(odd.url), SECOND_3))


# Results -------------------------------------------------------------------------------------------------------

MESSAGE: Final = (
    b'{ "type":"message", "role":"assistant","model":"claude-opus-5" ,"content":[{"type":"text",'
    b'"text":"\\u00e9 \xc3\xa9 \\ud83d"}],"stop_reason":"end_turn","usage":{"input_tokens":3,"output_tokens":4.0e0}}'
)


def line(custom_id: str, message: bytes = MESSAGE) -> bytes:
    return b'{"custom_id":"%s","result":{"type":"succeeded","message":%s}}' % (
        custom_id.encode(), message,
    )  # fmt: skip


def in_chunks(body: bytes, size: int = 7, *, to_the_end: bool = True) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunks + (
        b"0\r\n\r\n" if to_the_end else b""
    )  # fmt: skip


def test_lines_are_read_wherever_they_are_cut(upstream: UpstreamBatches, odd: Odd) -> None:
    body = b"\xef\xbb\xbf" + line("a") + b"\r\n\r\n \n" + line("b") + b"\n\n" + line("a")
    odd.answers = [in_chunks(body, size) for size in (1, 7, 10_000)]

    for _ in range(3):
        found = rows(upstream.results(access(odd.url), "msgbatch_1"))

        # A repeated custom_id is the caller's to judge.
        assert ["a", "b", "a"] == [row.custom_id for row in found]
        assert {MESSAGE} == {row.message for row in found}


def test_compressed_results_are_read(upstream: UpstreamBatches, odd: Odd) -> None:
    packed = gzip.compress(line("a") + b"\n" + line("b"))
    odd.answers = [says(packed, content_encoding="gzip")]

    found = rows(upstream.results(access(odd.url), "msgbatch_1"))

    assert ["a", "b"] == [row.custom_id for row in found]
    assert b"accept-encoding: identity" in odd.heads[0].lower()


@pytest.mark.parametrize(
    "answer",
    [
        in_chunks(line("a") + b"\n" + line("b"), to_the_end=False),
        b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n" + line("a") + b"\n" + line("b"),
        b"HTTP/1.1 200 OK\r\n\r\n" + line("a") + b"\n" + line("b")[:-20],
        in_chunks(line("a") + b'\n{"type":"error","error":{"type":"api_error","message":"x"}}'),
        says(gzip.compress(line("a") + b"\n" + line("b") * 99)[:-60], content_encoding="gzip"),
    ],
    ids=["chunks", "length", "half a line", "error", "compressed"],
)
def test_results_that_break_off_raise_an_error(
    upstream: UpstreamBatches, odd: Odd, answer: bytes
) -> None:
    odd.answers = [answer]
    outcome = upstream.results(access(odd.url), "msgbatch_1")
    assert not isinstance(outcome, NotFound | Refused | Unreachable)

    with pytest.raises(ResultsInterrupted, match=r"msgbatch_1 .* read them again from the start"):
        list(outcome)


def test_a_line_without_end_is_bounded_and_keeps_its_custom_id(
    upstream: UpstreamBatches, odd: Odd
) -> None:
    huge = line("huge", b'{"content":"%s"}' % (b"x" * (40 * MEBIBYTE)))
    body = line("a") + b"\n" + huge + b"\n" + line("b") + b"\n"
    odd.answers = [says(body), says(line("a") + b"\n" + huge)]
    tracemalloc.start()
    try:
        found = rows(upstream.results(access(odd.url), "msgbatch_1"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    last = rows(upstream.results(access(odd.url), "msgbatch_1"))[-1]

    assert ["a", "huge", "b"] == [row.custom_id for row in found]
    for row in (found[1], last):
        assert (RowKind.BROKEN, "huge") == (row.kind, row.custom_id)
        assert row.failure is not None
        assert (ANSWER_TOO_LARGE, True) == (row.failure.type, row.failure.may_be_billed)
    # The line while it is collected and cut, not the 40 MiB of it.
    assert peak < 3 * MOST_LINE_BYTES


def test_many_results_are_read_in_flat_memory(upstream: UpstreamBatches, odd: Odd) -> None:
    with claude() as (_, by):
        batch = created(upstream, by, requests(3_000))
        ended(upstream, by, batch.id)
        tracemalloc.start()
        try:
            outcome = upstream.results(by, batch.id)
            assert not isinstance(outcome, NotFound | Refused | Unreachable)
            sizes = [len(row.message) for row in outcome]
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()

    assert 3_000 == len(sizes)
    assert [] == odd.heads
    assert peak < sum(sizes)


def test_results_can_be_closed_before_their_end(upstream: UpstreamBatches, odd: Odd) -> None:
    odd.answers = [in_chunks(line("a") + b"\n" + line("b") + b"\n")]
    outcome = upstream.results(access(odd.url), "msgbatch_1")
    assert not isinstance(outcome, NotFound | Refused | Unreachable)

    assert next(iter(outcome)).custom_id == "a"
    outcome.close()


# Secrets -------------------------------------------------------------------------------------------------------


def test_the_key_goes_to_no_other_host(upstream: UpstreamBatches, odd: Odd) -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        elsewhere.settimeout(0)
        url = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/results"
        odd.answers = [
            says(shown(results_url=url, processing_status="ended")),
            says(line("a")),
            says(b"", 302, location=url),
            says(b"", 307, location=url),
        ]
        by = access(odd.url)
        assert seen(upstream.get(by, "msgbatch_1")).has_results
        assert ["a"] == [row.custom_id for row in rows(upstream.results(by, "msgbatch_1"))]
        assert isinstance(upstream.results(by, "msgbatch_1"), Unreachable)
        assert isinstance(create(upstream, by, requests(1)), Unknown)

        with pytest.raises(BlockingIOError):
            elsewhere.accept()


def test_neither_key_nor_body_is_in_what_is_returned_raised_or_logged(
    upstream: UpstreamBatches, odd: Odd, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    by = access(odd.url)
    odd.answers = [
        says(shown()),
        says(b"no", 401),
        b"",
        says(b"garbage"),
        in_chunks(line("a") + b"\n" + line(SECRET), to_the_end=False),
    ]
    outcomes: list[object] = [create(upstream, by, requests(3)) for _ in range(4)]
    found = upstream.results(by, "msgbatch_1")
    assert not isinstance(found, NotFound | Refused | Unreachable)
    with pytest.raises(ResultsInterrupted) as raised:
        list(found)

    said = repr([*outcomes, by, raised.value, raised.value.__cause__]) + caplog.text
    assert [Created, Refused, Unknown, Unknown] == [type(outcome) for outcome in outcomes]
    assert KEY not in said
    assert SECRET not in said
