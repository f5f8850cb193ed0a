"""From a file to ranges, and from ranges to results: once per content, in order, none twice, whatever is repeated."""

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.bulk import assemble, sections
from sluice.bulk import plan as plans
from sluice.domain.batches import (
    LATE_MS,
    LONGEST_MS,
    PLANNING_MS,
    SAMPLES,
    Phase,
    cancel_batch,
    delete_batch,
    end_batch,
    older_file_batch_id,
    planned,
)
from sluice.domain.errors import InvalidRequest, NotItsTurn, StoreBusy
from sluice.domain.rows import Encoded
from sluice.intake.requests import read_options
from tests.bulk_fakes import Bulk, a_row, jsonl
from tests.fakes import MINUTE, NOON, VirtualClock

Make = Callable[..., Bulk]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Bulk] = []

    def one(*script: Any, **facts: Any) -> Bulk:
        made.append(Bulk(*script, **facts))
        return made[-1]

    yield one
    for each in made:
        each.close()


@pytest.fixture
def small_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranges a section, so that a few hundred rows make many."""
    monkeypatch.setattr("sluice.domain.batches.RANGES_PER_SECTION", 2)


def ids(rows: list[dict[str, Any]]) -> list[str]:
    return [row["custom_id"] for row in rows]


# Arriving --------------------------------------------------------------------------------------------------


def test_a_file_is_a_batch_of_its_tenant_by_its_name(make: Make) -> None:
    bulk = make()

    bulk.upload(jsonl(a_row(1)), "2026/january.jsonl")

    batch = bulk.batch
    assert ("acme", "2026/january", "file") == (batch.tenant, batch.name, batch.source)
    assert NOON + LONGEST_MS == batch.expires_at
    assert Phase.RUNNING == batch.phase
    assert 1 == len(bulk.queues.ranges)


def test_the_object_itself_is_not_read_beyond_a_few_samples(make: Make) -> None:
    bulk = make()

    bulk.upload(jsonl(*(a_row(number) for number in range(30_000))))

    reads = [line for line in bulk.gateway.journal if line.startswith("the data bucket: read")]
    size = len(bulk.objects.stored["in/acme/first.jsonl"])
    assert [
        "the data bucket: read in/acme/first.jsonl 0 65536",
        f"the data bucket: read {bulk.batch.rows_key} {size - 65_536} 65536",
    ] == [reads[0], reads[-1]]
    assert SAMPLES == len(reads)
    assert 290 <= len(bulk.queues.ranges) <= 310


@pytest.mark.parametrize(
    "key",
    ["out/acme/first/results.jsonl", "in/acme/first.options.json", "in/first.jsonl", "in/a/b/"],
)
def test_an_object_that_is_not_a_file_of_a_tenant_is_ignored(make: Make, key: str) -> None:
    bulk = make()
    bulk.objects.put(key, b"{}")

    bulk.planner.arrived(key)

    assert {} == bulk.batches.stored
    assert [] == bulk.events.problems


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("first.xlsx", "first.xlsx: files .xlsx cannot be run; use .jsonl, .ndjson or .csv"),
        ("2026/first.xlsx", "2026/first.xlsx: files .xlsx cannot be run"),
        ("first", "first: files without a suffix cannot be run"),
        ("first.pdf", "first.pdf: documents are run by folder; copy them to in/acme/<folder>/"),
        ("options.json", "options.json: documents are run by folder"),
    ],
)
def test_a_file_that_cannot_be_run_is_named_in_errors_and_summary(
    make: Make, name: str, problem: str
) -> None:
    bulk = make()

    bulk.upload(b"PK", name)

    assert name == bulk.batch.name
    assert (bulk.batch.problem or "").startswith(problem)
    for output in ("errors.jsonl", "summary.json"):
        assert problem in bulk.objects.stored[f"out/acme/{name}/{output}"].decode()


def test_files_among_documents_wait_for_the_options_of_the_folder(make: Make) -> None:
    bulk = make()
    options = json.dumps({"prompt": "Say", "model": "claude-a", "max_tokens": 5}).encode()

    bulk.upload(b"A", "docs/a.txt")
    bulk.upload(b"PK", "docs/b.docx")
    bulk.upload(options, "other/options.json")
    bulk.drain()
    known = set(bulk.batches.stored)
    bulk.upload(b"PK", "other/deep/c.png")

    assert known == set(bulk.batches.stored)
    waiting = [event for event, _ in bulk.events.notes if event.startswith("document waits")]
    assert 3 == len(waiting)


def test_a_file_that_was_already_deleted_starts_no_batch(make: Make) -> None:
    bulk = make()

    bulk.planner.arrived("in/acme/first.jsonl")

    assert {} == bulk.batches.stored


def test_the_same_content_runs_once_however_often_its_event_arrives(make: Make) -> None:
    bulk = make()
    rows = jsonl(a_row(1), a_row(2))

    bulk.upload(rows)
    bulk.planner.arrived("in/acme/first.jsonl")
    bulk.drain()
    bulk.upload(rows)
    bulk.drain()

    assert 2 == len(bulk.claude.calls)
    assert ["row-1", "row-2"] == ids(bulk.results())


def test_the_same_content_runs_again_when_asked(make: Make) -> None:
    bulk = make()

    bulk.upload(jsonl(a_row(1)))
    bulk.upload(jsonl(a_row(1)), **{"sluice-run": "second"})
    bulk.drain()

    assert 2 == len(bulk.batches.stored)
    assert 2 == len(bulk.claude.calls)


def test_what_an_older_release_has_run_is_not_run_again(make: Make) -> None:
    """Its ids had no options. A folder is known by the digest of its list of documents."""
    bulk = make()
    folder = "in/acme/docs/"
    for name in ("a.txt", "\u00e4.md"):
        bulk.objects.put(folder + name, name.encode())
    options = b'{"prompt": "?", "model": "claude-a", "max_tokens": 9}'
    bulk.objects.put(f"{folder}options.json", options)

    bulk.planner.arrived(f"{folder}options.json")

    etags = {each.key: each.etag for each in bulk.objects.listing(folder)}
    own = etags.pop(f"{folder}options.json")
    text = json.dumps([own, *([key, etag] for key, etag in etags.items())])
    etag = hashlib.sha256(text.encode()).hexdigest()
    older_id = older_file_batch_id("acme", f"{folder}options.json", etag, None)
    older = replace(bulk.batches.stored.popitem()[1], batch_id=older_id)
    bulk.batches.add(older)

    bulk.planner.arrived(f"{folder}options.json")
    assert older == bulk.batch
    bulk.upload(options.replace(b"?", b"!"), "docs/options.json")
    assert 2 == len(bulk.batches.stored)


def test_other_content_under_the_same_name_is_another_batch(make: Make) -> None:
    bulk = make()

    bulk.upload(jsonl(a_row(1)))
    bulk.drain()
    bulk.upload(jsonl(a_row(2)))

    assert 2 == len(bulk.batches.stored)


# Options ---------------------------------------------------------------------------------------------------


def test_options_beside_the_file_hold_for_rows_that_say_nothing(make: Make) -> None:
    bulk = make()
    options = {"model": "claude-b", "max_tokens": 7, "fallback_models": ["claude-c"]}
    bulk.objects.put("in/acme/first.options.json", json.dumps(options).encode())
    row = a_row(1)
    del row["params"]["model"], row["params"]["max_tokens"]

    bulk.upload(jsonl(row))
    bulk.drain()

    (call,) = bulk.claude.calls
    assert ("claude-b", 7) == (call.model, call.request.max_tokens)


def test_metadata_wins_over_options_beside_the_file(make: Make) -> None:
    bulk = make()
    bulk.objects.put("in/acme/first.options.json", b'{"model": "claude-b", "max_tokens": 7}')

    bulk.upload(
        jsonl({"custom_id": "a", "params": {"messages": []}}),
        **{"sluice-model": "claude-c", "sluice-max-tokens": "9", "sluice-fallback-models": "x, y"},
    )

    options = bulk.batch.options
    assert ("claude-c", 9, ("x", "y")) == (
        options.model,
        options.max_tokens,
        options.fallback_models,
    )


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (b"{", "in/acme/first.options.json is not valid JSON"),
        (b"[]", "in/acme/first.options.json is not a JSON object"),
        (b'{"modle": "x"}', "options.modle: Extra inputs are not permitted"),
        (b'{"max_tokens": -1}', "options.max_tokens: Input should be greater than or equal"),
        (b'{"model": ""}', "options.model: String should have at least 1 character"),
        (b'{"fallback_models": "a"}', "options.fallback_models: Input should be a valid list"),
        (b'{"deadline": "tomorrow"}', "options.deadline: must be an RFC 3339 string"),
        (b'{"deadline": "2026-12-24T18:00:00"}', "options.deadline: must be an RFC 3339 string"),
        (b'{"deadline": 5}', "options.deadline: must be an RFC 3339 string"),
        (b" " * 300_000, "in/acme/first.options.json exceeds"),
    ],
)
def test_options_that_cannot_be_used_end_the_batch_with_a_reason(
    make: Make, options: bytes, problem: str
) -> None:
    bulk = make()
    bulk.objects.put("in/acme/first.options.json", options)

    bulk.upload(jsonl(a_row(1)))

    assert Phase.ENDED == bulk.batch.phase
    assert (bulk.batch.problem or "").startswith(problem)
    assert bulk.errors()[0]["error"]["message"].startswith(problem)
    assert [] == bulk.claude.calls


def test_a_valid_webhook_among_invalid_options_is_notified(make: Make) -> None:
    bulk = make()
    bulk.objects.put(
        "in/acme/first.options.json", b'{"max_tokens": -1, "webhook": "https://acme.example/"}'
    )

    bulk.upload(jsonl(a_row(1)))

    assert (bulk.batch.problem or "").startswith("options.max_tokens: Input should be")
    assert "https://acme.example/" == bulk.batch.options.webhook


def test_a_deadline_expires_rows_that_have_not_started(make: Make) -> None:
    bulk = make()

    bulk.upload(jsonl(a_row(1)), **{"sluice-deadline": "2026-11-20T12:30:00Z"})

    assert NOON + 30 * MINUTE == bulk.batch.expires_at == bulk.batch.options.deadline


def test_options_are_read_or_refused() -> None:
    assert ("a",) == read_options({"fallback_models": ["a"]}).fallback_models
    with pytest.raises(InvalidRequest):
        read_options({"max_tokens": True})
    with pytest.raises(
        InvalidRequest, match=r"options\.webhook: must not point to a private address"
    ):
        read_options({"webhook": "https://10.0.0.1/"})


# Files that cannot be run ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf", "the file is empty"),
        (b"\n \n", "the file is empty"),
        (jsonl(a_row(1)).decode().encode("utf-16"), "the file is UTF-16; save it as UTF-8"),
        (jsonl(a_row(1)).decode().encode("utf-16-le"), "the file is UTF-16; save it as UTF-8"),
        (
            b"PK\x03\x04...",
            "the file is a ZIP archive; upload the JSONL file itself or compress it with gzip",
        ),
    ],
)
def test_a_file_that_as_a_whole_cannot_be_run_says_why(
    make: Make, body: bytes, problem: str
) -> None:
    bulk = make()

    bulk.upload(body)
    bulk.drain()

    assert problem == bulk.batch.problem == bulk.summary()["problem"]
    assert [problem] == [error["error"]["message"] for error in bulk.errors()]
    assert [] == bulk.results()


def test_a_file_that_changed_before_it_was_planned_says_so(make: Make) -> None:
    bulk = make()
    bulk.queues.fail_next("send_ranges", 100)
    with pytest.raises(StoreBusy):
        bulk.add(jsonl(a_row(1)))
    bulk.batches.stored["msgbatch_1"] = replace(bulk.batch, plan=None)
    bulk.objects.put(bulk.batch.input_key, b"other\n")

    bulk.planner.plan("msgbatch_1")

    assert "was deleted or replaced" in (bulk.batch.problem or "")


# Files that cannot be cut ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["first.jsonl.gz", "first.jsonl"])
def test_a_gzipped_file_runs_as_what_it_holds(make: Make, name: str) -> None:
    bulk = make()
    rows: list[Any] = [a_row(number) for number in range(250)]
    rows[100] = b"{broken"

    bulk.upload(gzip.compress(jsonl(*rows)), name)
    bulk.drain()

    assert [f"row-{n}" for n in range(250) if n != 100] == ids(bulk.results())
    assert [101] == [error["line"] for error in bulk.errors()]
    assert ("first", f"in/acme/{name}") == (bulk.batch.name, bulk.summary()["input"])


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_whose_lines_end_with_cr_alone_runs_line_by_line(
    make: Make, *, packed: bool
) -> None:
    bulk = make()
    body = jsonl(a_row(1), b"{broken", a_row(2)).replace(b"\n", b"\r")

    bulk.upload(gzip.compress(body) if packed else body)
    bulk.drain()

    assert ["row-1", "row-2"] == ids(bulk.results())
    assert [2] == [error["line"] for error in bulk.errors()]


def test_a_csv_file_of_other_encoding_says_so(make: Make) -> None:
    bulk = make()
    bulk.objects.put("in/acme/first.options.json", b'{"prompt": "Say {text}"}')

    bulk.upload("text\nx\n".encode("utf-16"), "first.csv")

    assert "the file is UTF-16; save it as UTF-8" == bulk.batch.problem


def test_a_csv_file_that_is_replaced_while_it_is_converted_says_so(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "PIECE_BYTES", 4)
    bulk = make()
    bulk.objects.put("in/acme/first.options.json", b'{"prompt": "Say {text}"}')
    read = bulk.objects.read

    def replaced(key: str, first: int, size: int, etag: str | None = None) -> bytes:
        if first == 8:
            bulk.objects.put(key, b"text\nother\nother\n")
        return read(key, first, size, etag)

    bulk.objects.read = replaced  # type: ignore[method-assign]
    bulk.upload(b"text\nx\ny\nz\n", "first.csv")

    assert "was deleted or replaced" in (bulk.batch.problem or "")


def test_the_rows_of_one_large_file_of_a_tenant_are_made_at_a_time(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four that take ten minutes each would hold all invocations of the function, and so the batches of all tenants."""
    bulk = make()
    packed = gzip.compress(jsonl(a_row(1), a_row(2)))
    small = gzip.compress(jsonl(a_row(3)))
    monkeypatch.setattr(plans, "QUICK_TO_CONVERT_BYTES", len(packed) - 1)
    now = bulk.time.now()
    assert bulk.batches.take_turn("acme", "another", now, now + 15 * MINUTE)

    with pytest.raises(NotItsTurn):
        bulk.upload(packed, "large.jsonl.gz")
    assert Phase.PLANNING == bulk.batch.phase
    bulk.upload(small, "small.jsonl.gz")
    bulk.batches.end_turn("acme", "another")
    bulk.planner.arrived("in/acme/large.jsonl.gz")

    assert {Phase.RUNNING} == {each.phase for each in bulk.batches.stored.values()}
    assert bulk.batches.take_turn("acme", "another", now, now), "the turn has ended"


@pytest.mark.parametrize(("documents", "tenants"), [(100, set()), (101, {"acme"})])
def test_a_folder_of_many_documents_takes_its_turn(
    make: Make, documents: int, tenants: set[str]
) -> None:
    bulk = make()
    for number in range(documents):
        bulk.objects.put(f"in/acme/notes/{number}.txt", b"a note")
    options = json.dumps({"model": "claude-a", "max_tokens": 5, "prompt": "Sum up {{document}}"})

    bulk.upload(options.encode(), "notes/options.json")

    assert Phase.RUNNING == bulk.batch.phase
    assert tenants == set(bulk.batches.turns)


def test_a_broken_gzip_file_says_so(make: Make) -> None:
    bulk = make()

    bulk.upload(gzip.compress(jsonl(a_row(1)))[:-4], "first.jsonl.gz")

    assert "the gzip file is truncated; upload it again" == bulk.batch.problem


@pytest.mark.parametrize(
    ("bound", "value", "message"),
    [
        ("CONVERT_MS", -1, "could not be converted to rows within"),
        ("MOST_ROWS_BYTES", 1_000, "the rows made from the file exceed 1,000 bytes"),
    ],
)
def test_a_conversion_that_takes_too_long_ends_its_batch_and_leaves_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch, bound: str, value: int, message: str
) -> None:
    """Another invocation would start from nothing, and hold up the files of all tenants once more."""
    monkeypatch.setattr(f"sluice.bulk.plan.{bound}", value)
    bulk = make()

    bulk.upload(gzip.compress(jsonl(*(a_row(number) for number in range(100)))), "first.jsonl.gz")

    assert message in (bulk.batch.problem or "")
    assert Phase.ENDED == bulk.batch.phase
    assert bulk.batch.rows_key not in bulk.objects.stored


@pytest.mark.parametrize("packed", [False, True])
def test_a_csv_file_runs_under_its_prompt(make: Make, *, packed: bool) -> None:
    bulk = make()
    options = {"prompt": "Say {word}", "model": "claude-a", "max_tokens": 5}
    bulk.objects.put("in/acme/first.options.json", json.dumps(options).encode())
    body = b'custom_id,word\na,"one\ntwo"\nb,three\nc\n'  # the last one begins in line 5

    bulk.upload(gzip.compress(body) if packed else body, f"first.csv{'.gz' if packed else ''}")
    bulk.drain()

    assert ["a", "b", "c"] == ids(bulk.results())
    said = [json.loads(call.body)["messages"][0]["content"] for call in bulk.claude.calls]
    assert ["Say one\ntwo", "Say three"] == said
    (error,) = bulk.errors()
    assert "the record has 1 fields" in error["error"]["message"]
    assert (5, "c") == (error["line"], error["custom_id"])
    assert "offset" not in error
    assert 5 == bulk.summary()["counts"]["lines"]


def test_a_folder_of_documents_runs_when_its_options_arrive(make: Make) -> None:
    bulk = make()
    for name, text in (("b.txt", b"B"), ("a.md", b"A"), ("sub/c.pdf", b"%PDF")):
        bulk.upload(text, f"docs/{name}")
    assert {} == bulk.batches.stored
    options = {"prompt": "What does {name} say?", "model": "claude-a", "max_tokens": 5}

    bulk.upload(json.dumps(options).encode(), "docs/options.json")
    bulk.drain()

    assert "docs" == bulk.batch.name
    contents = [json.loads(call.body)["messages"][0]["content"] for call in bulk.claude.calls]
    assert [
        ("a.md", "What does a.md say?"),
        ("b.txt", "What does b.txt say?"),
        ("sub/c.pdf", "What does sub/c.pdf say?"),
    ] == [(document["title"], prompt["text"]) for document, prompt in contents]
    names = [
        json.loads(line)
        for line in bulk.objects.stored["out/acme/docs/documents.jsonl"].splitlines()
    ]
    assert ["a.md", "b.txt", "sub/c.pdf"] == [each["document"] for each in names]
    assert ids(bulk.results()) == [each["custom_id"] for each in names]


def test_documents_of_unsupported_types_are_named_in_errors_and_summary(make: Make) -> None:
    bulk = make()
    others = ["c.docx", "data.json", "logo.png", "sub/README"]
    for name in ("a.txt", *others, "b.jsonl", "b.options.json", "sub/options.json"):
        bulk.objects.put(f"in/acme/docs/{name}", b"A")
    options = json.dumps({"prompt": "Say", "model": "claude-a", "max_tokens": 5}).encode()

    bulk.upload(options, "docs/options.json")
    bulk.drain()

    assert 1 == len(bulk.claude.calls)
    assert others == bulk.summary()["unsupported"]
    assert (1, 4) == (bulk.summary()["counts"]["succeeded"], bulk.summary()["counts"]["errored"])
    messages = [error["error"]["message"] for error in bulk.errors()]
    assert others == [message.partition(":")[0] for message in messages]


def test_a_folder_of_many_unsupported_documents_names_some_in_its_summary(make: Make) -> None:
    bulk = make()
    for number in range(30):
        bulk.objects.put(f"in/acme/docs/{number}.docx", b"A")
    options = json.dumps({"prompt": "Say", "model": "claude-a", "max_tokens": 5}).encode()

    bulk.upload(options, "docs/options.json")
    bulk.drain()

    assert (20, 30) == (len(bulk.summary()["unsupported"]), len(bulk.errors()))


def test_a_folder_runs_again_when_a_document_changed_and_not_otherwise(make: Make) -> None:
    bulk = make()
    options = json.dumps({"prompt": "Say", "model": "claude-a", "max_tokens": 5}).encode()
    bulk.objects.put("in/acme/docs/a.txt", b"A")
    bulk.upload(options, "docs/options.json")
    bulk.upload(options, "docs/options.json")
    assert 1 == len(bulk.batches.stored)

    bulk.objects.put("in/acme/docs/a.txt", b"another")
    bulk.upload(options, "docs/options.json")

    assert 2 == len(bulk.batches.stored)


def test_a_folder_without_a_prompt_says_so(make: Make) -> None:
    bulk = make()
    bulk.objects.put("in/acme/docs/a.txt", b"A")

    bulk.upload(b'{"model": "claude-a"}', "docs/options.json")

    assert (bulk.batch.problem or "").startswith('in/acme/docs/options.json requires a "prompt"')


def test_a_file_that_could_not_be_planned_in_time_ends(make: Make) -> None:
    bulk = make()
    bulk.objects.fail_next("read")
    with pytest.raises(StoreBusy):
        bulk.add(jsonl(a_row(1)), expires_at=NOON + MINUTE)
    bulk.time.pass_seconds(60 + PLANNING_MS // 1000)

    bulk.planner.plan("msgbatch_1")

    assert Phase.ENDED == bulk.batch.phase
    assert "the file could not be planned before its rows expired" == bulk.batch.problem


def test_a_file_whose_ranges_could_not_be_sent_in_time_ends_with_expired_rows(make: Make) -> None:
    bulk = make()
    bulk.queues.fail_next("send_ranges", 5)
    with pytest.raises(StoreBusy):
        bulk.add(jsonl(a_row(1)), expires_at=NOON + MINUTE)
    bulk.time.pass_seconds(60)

    bulk.planner.plan("msgbatch_1")
    bulk.drain()

    assert Phase.ENDED == bulk.batch.phase
    assert [{"type": "expired"}] == [row["result"] for row in bulk.results()]


# Sending ---------------------------------------------------------------------------------------------------


def test_ranges_that_the_queue_did_not_take_are_sent_again(make: Make) -> None:
    bulk = make()
    bulk.queues.untaken = [1, 2, 2]

    bulk.upload(jsonl(*(a_row(number) for number in range(400))))

    assert set(range(4)) == {number for _, _, number, _ in bulk.queues.ranges.values()}


def test_a_planner_that_died_goes_on_where_it_was_with_the_same_ranges(make: Make) -> None:
    bulk = make()
    bulk.queues.fail_next("send_ranges", 5)
    with pytest.raises(StoreBusy):
        bulk.upload(jsonl(*(a_row(number) for number in range(400))))
    plan = bulk.batch.plan

    bulk.planner.arrived("in/acme/first.jsonl")
    bulk.drain()

    assert plan == bulk.batch.plan
    assert 400 == len(bulk.results()) == len(bulk.claude.calls)


@pytest.mark.usefixtures("small_sections")
def test_ranges_whose_messages_were_lost_are_sent_again(make: Make) -> None:
    bulk = make()
    bulk.add(jsonl(*(a_row(number) for number in range(800))))
    bulk.queues.ranges = {
        name: waiting for name, waiting in bulk.queues.ranges.items() if waiting[2] in {0, 1, 4}
    }
    bulk.drain()
    bulk.planner.plan("msgbatch_1")
    assert {} == bulk.queues.ranges

    bulk.time.pass_seconds(LATE_MS // 1000)
    bulk.planner.plan("msgbatch_1")
    bulk.drain()

    assert {"succeeded"} == {row["result"]["type"] for row in bulk.results()}
    assert [f"row-{number}" for number in range(800)] == ids(bulk.results())
    assert ["ranges lost"] == bulk.events.problem_names


@pytest.mark.usefixtures("small_sections")
def test_a_section_whose_message_was_lost_is_joined_by_the_planner(
    make: Make,
) -> None:
    bulk = make()
    bulk.upload(jsonl(*(a_row(number) for number in range(300))))
    while bulk.queues.next_visible() is not None:
        bulk.once()
    bulk.queues.joins.clear()

    bulk.planner.plan(bulk.batch.batch_id)

    assert [] == bulk.queues.joins
    assert [f"row-{number}" for number in range(300)] == ids(bulk.results())
    assert 300 == len(bulk.claude.calls)


@pytest.mark.usefixtures("small_sections")
def test_sections_that_there_is_no_time_to_join_are_left_to_the_next_check(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bulk = make()
    bulk.upload(jsonl(*(a_row(number) for number in range(300))))
    while bulk.queues.next_visible() is not None:
        bulk.once()
    bulk.queues.joins.clear()

    monkeypatch.setattr(plans, "JOIN_MS", -1)
    bulk.planner.plan(bulk.batch.batch_id)
    phase = bulk.batch.phase
    monkeypatch.undo()
    monkeypatch.setattr("sluice.domain.batches.RANGES_PER_SECTION", 2)
    bulk.planner.plan(bulk.batch.batch_id)

    assert Phase.RUNNING == phase
    assert [f"row-{number}" for number in range(300)] == ids(bulk.results())


def test_a_dead_letter_of_a_range_is_sent_again_and_counted(make: Make) -> None:
    bulk = make()
    bulk.upload(jsonl(a_row(1)))
    bulk.queues.ranges.clear()

    bulk.planner.again(bulk.batch.batch_id, 0)
    bulk.drain()

    assert ["row-1"] == ids(bulk.results())
    assert 1 == bulk.events.counted("DeadLetters")
    bulk.planner.again(bulk.batch.batch_id, 0)
    assert {} == bulk.queues.ranges


def test_an_unknown_batch_is_skipped(make: Make) -> None:
    bulk = make()

    bulk.planner.plan("msgbatch_none")
    bulk.planner.again("msgbatch_none", 0)
    bulk.assemble.join("msgbatch_none", 0)

    assert {} == bulk.queues.ranges


def test_rows_that_ended_before_the_planner_did_are_not_run_again(make: Make) -> None:
    bulk = make()
    bulk.queues.fail_next("send_ranges", 5)
    with pytest.raises(StoreBusy):
        bulk.upload(jsonl(a_row(1)))
    bulk.queues.send_ranges(bulk.batch, [0])
    bulk.drain()

    bulk.planner.plan(bulk.batch.batch_id)

    assert Phase.ENDED == bulk.batch.phase


# Joining ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_sections")
def test_results_of_many_sections_are_in_order_and_errors_numbered_through(make: Make) -> None:
    bulk = make()
    rows: list[Any] = [a_row(number) for number in range(900)]
    for number in (3, 250, 251, 777):
        rows[number] = b"{broken %d" % number

    bulk.upload(jsonl(*rows))
    bulk.drain()

    assert bulk.batch.plan is not None
    assert bulk.batch.plan.sections >= 4
    expected = [f"row-{n}" for n in range(900) if n not in {3, 250, 251, 777}]
    assert expected == ids(bulk.results())
    assert [4, 251, 252, 778] == [error["line"] for error in bulk.errors()]


@pytest.mark.usefixtures("small_sections")
def test_a_custom_id_repeated_across_ranges_and_sections_is_found_at_the_end(make: Make) -> None:
    bulk = make()
    rows = [a_row(number) for number in range(900)]
    rows[150] = a_row(5)
    rows[700] = a_row(5)
    rows[701] = a_row(300)

    bulk.upload(jsonl(*rows))
    bulk.drain()

    found = ids(bulk.results())
    assert 897 == len(found) == len(set(found))
    assert [(151, "row-5"), (701, "row-5"), (702, "row-300")] == [
        (error["line"], error["custom_id"]) for error in bulk.errors()
    ]
    assert all("succeeded" == error["result"]["type"] for error in bulk.errors())
    counts = bulk.summary()["counts"]
    assert (897, 3, 3) == (counts["succeeded"], counts["invalid"], counts["duplicates"])
    assert 900 * 210 == bulk.summary()["cost_micro_usd"]


@pytest.mark.usefixtures("small_sections")
def test_repeated_custom_ids_are_found_share_by_share(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large batch not all custom_ids are in memory at once."""
    monkeypatch.setattr(sections, "ENTRIES_AT_ONCE", 10)
    bulk = make()
    rows = [a_row(number % 400) for number in range(800)]

    bulk.upload(jsonl(*rows))
    bulk.drain()

    assert [f"row-{number}" for number in range(400)] == ids(bulk.results())
    assert 400 == bulk.batch.duplicates


class Weary(VirtualClock):
    """A clock on which every reading takes a minute, as if each step of an end did."""

    readings = 0

    def now(self) -> int:
        self.readings += 1
        return super().now() + self.readings * MINUTE


@pytest.mark.usefixtures("small_sections")
def test_the_end_of_a_large_batch_takes_several_invocations_and_no_step_twice(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It used to start from nothing in each invocation: above some size it never ended."""
    monkeypatch.setattr(sections, "ENTRIES_AT_ONCE", 20)
    bulk = make(joins_at_once=False)
    rows: list[Any] = [a_row(number % 700) for number in range(900)]
    rows[3] = b"{broken"
    bulk.upload(jsonl(*rows))
    while bulk.queues.ranges:
        bulk.once()
    bulk.assemble = assemble.Assemble(
        bulk.batches, bulk.objects, bulk.notices, Weary(bulk.time), bulk.events
    )
    bulk.gateway.journal.clear()

    done = [bulk.assemble.join(*join) for join in bulk.queues.joins]
    while not done[-1]:
        assert len(done) < 50
        done.append(bulk.assemble.join(*bulk.queues.joins[-1]))

    assert done.count(False) >= 3
    ended = [f"row-{number}" for number in range(700)]
    ended.remove("row-3")
    assert sorted([*ended, "row-3"]) == sorted(ids(bulk.results())), (
        "the second row-3 is the only one"
    )
    assert 199 == bulk.batch.duplicates
    lines = [error["line"] for error in bulk.errors()]
    assert [4, *(line for line in range(701, 901) if line != 704)] == lines
    searches = [line for line in bulk.gateway.journal if "put" in line and ".repeats" in line]
    finished = [line for line in bulk.gateway.journal if "put" in line and ".counts" in line]
    assert 45 == len(searches) == len(set(searches))
    assert len(finished) == len(set(finished)) >= 2


@pytest.mark.usefixtures("small_sections")
@pytest.mark.parametrize("death", range(1, 22, 4))
def test_an_end_that_dies_at_any_write_is_continued(make: Make, death: int) -> None:
    bulk = make(joins_at_once=False)
    rows: list[Any] = [a_row(number % 350) for number in range(400)]
    rows[7] = b"{broken"
    bulk.upload(jsonl(*rows))
    while bulk.queues.ranges:
        bulk.once()
    writes = 0
    objects_put = bulk.objects.put

    def dying(key: str, body: bytes) -> str:
        nonlocal writes
        writes += 1
        if writes == death:
            raise StoreBusy("the data bucket")
        return objects_put(key, body)

    bulk.objects.put = dying  # type: ignore[method-assign]
    for join in bulk.queues.joins:
        with suppress(StoreBusy):
            bulk.assemble.join(*join)
    for join in bulk.queues.joins:
        bulk.assemble.join(*join)

    assert 350 == len(ids(bulk.results())) == len(set(ids(bulk.results())))
    assert 49 == bulk.batch.duplicates
    assert 50 == len(bulk.errors())


def test_a_file_of_too_many_rows_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sluice.bulk.plan.MOST_ROWS", 100)
    bulk = make()

    bulk.upload(jsonl(*(a_row(number) for number in range(101))))

    assert "rows; the maximum is 100. Split it into several files" in (bulk.batch.problem or "")


@pytest.mark.usefixtures("small_sections")
def test_joining_again_changes_nothing(make: Make) -> None:
    bulk = make()
    bulk.upload(jsonl(*(a_row(number % 350) for number in range(400))))
    bulk.drain()
    before = dict(bulk.objects.stored)

    ended = bulk.batch
    bulk.assemble.join(ended.batch_id, 0)
    bulk.batches.stored[ended.batch_id] = replace(ended, phase=Phase.RUNNING)
    bulk.assemble.join(ended.batch_id, 0)

    changed = {key for key in before if before[key] != bulk.objects.stored[key]}
    assert {key for key in changed if not key.endswith("summary.json")} == set()
    assert ended.tally == bulk.batch.tally


def test_an_assembler_that_dies_at_the_end_is_followed_by_one_that_ends_it(make: Make) -> None:
    bulk = make(joins_at_once=False)
    bulk.upload(jsonl(a_row(1), a_row(2)))
    bulk.once()
    (join,) = bulk.queues.joins
    bulk.batches.fail_next("groups")
    with pytest.raises(StoreBusy):
        bulk.assemble.join(*join)

    bulk.assemble.join(*join)

    assert ["row-1", "row-2"] == ids(bulk.results())


def test_a_cancel_that_comes_while_results_are_joined_stays_on_record(make: Make) -> None:
    bulk = make(joins_at_once=False)
    bulk.upload(jsonl(a_row(1)))
    bulk.once()
    stale = bulk.batch
    bulk.batches.replace(cancel_batch(stale, NOON + 7), stale.version)
    ended = end_batch(stale, NOON + 9, stale.tally, 0, 0)

    bulk.assemble._write(stale, ended)  # noqa: SLF001 - the race itself

    assert (Phase.ENDED, NOON + 7) == (bulk.batch.phase, bulk.batch.cancel_initiated_at)


def test_small_results_are_kept_gzipped_and_large_ones_are_not(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    bulk = make()
    bulk.upload(jsonl(a_row(1)))
    bulk.drain()
    assert bulk.batch.packed_key in bulk.objects.stored

    monkeypatch.setattr(assemble, "MOST_PACKED_BYTES", 10)
    bulk.upload(jsonl(a_row(2)), "second.jsonl")
    bulk.drain()

    assert 1 == len([key for key in bulk.objects.stored if key.endswith(".gz")])


# Notifications ---------------------------------------------------------------------------------------------


def test_an_ended_batch_is_published_once(make: Make) -> None:
    bulk = make()

    bulk.upload(jsonl(a_row(1)), **{"sluice-webhook": "https://acme.example/hook"})
    bulk.drain()
    bulk.assemble.join(bulk.batch.batch_id, 0)
    bulk.planner.plan(bulk.batch.batch_id)

    (told,) = bulk.notices.told
    assert ("Batch Ended", bulk.summary()) == (told.kind, told.facts)
    assert (bulk.batch.batch_id, bulk.batch.ended_at) == (told.id, told.at)
    assert "https://acme.example/hook" == told.webhook
    assert bulk.batch.due_at is None


def test_a_notification_that_failed_is_sent_again(make: Make) -> None:
    bulk = make(joins_at_once=False)
    bulk.upload(jsonl(a_row(1)))
    bulk.once()
    bulk.notices.fail_next("publish")
    with pytest.raises(StoreBusy):
        bulk.assemble.join(*bulk.queues.joins[0])

    bulk.time.pass_seconds(120)
    (due,) = bulk.batches.due(bulk.time.now(), 10)
    bulk.planner.plan(due.batch_id)

    assert 1 == len(bulk.notices.told)
    assert [] == list(bulk.batches.due(bulk.time.now() + 10**9, 10))


def test_a_batch_deleted_before_its_notification_is_published_all_the_same(make: Make) -> None:
    bulk = make(joins_at_once=False)
    bulk.upload(jsonl(a_row(1)))
    bulk.once()
    bulk.notices.fail_next("publish")
    with pytest.raises(StoreBusy):
        bulk.assemble.join(*bulk.queues.joins[0])
    ended = bulk.batch
    bulk.batches.replace(delete_batch(ended), ended.version)

    bulk.assemble.notify(ended)

    assert 1 == len(bulk.notices.told)
    assert bulk.batch.deleted


def test_a_plan_is_for_lines_as_long_as_those_of_the_sample() -> None:
    assert 1 == planned(10, b"0123456789").ranges


# Memory ----------------------------------------------------------------------------------------------------


def test_parts_of_any_size_are_joined_piece_by_piece(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sections, "AHEAD_BYTES", 1_000)
    bulk = make(joins_at_once=False)
    rows: list[Any] = [a_row(number) for number in range(300)]
    rows[7] = b"{"
    bulk.upload(jsonl(*rows))
    while bulk.queues.next_visible() is not None:
        bulk.once()
    bulk.gateway.journal.clear()

    bulk.drain()

    sizes = [
        int(line.rsplit(" ", 1)[1])
        for line in bulk.gateway.journal
        if line.startswith("the data bucket: read") and "/parts/" in line
    ]
    assert {1_000} == set(sizes)
    assert len(sizes) > 2 * len(bulk.batches.ranges)
    assert [f"row-{number}" for number in range(300) if number != 7] == ids(bulk.results())
    assert [8] == [error["line"] for error in bulk.errors()]


@given(st.sets(st.integers(0, 500)))
def test_places_are_those_that_were_added(added: set[int]) -> None:
    places = sections.Places()
    for place in added:
        places.add(place)

    assert added == {place for place in range(510) if place in places}
    assert bool(added) == bool(places)


@given(st.lists(st.integers(0, 10**9), max_size=50))
def test_an_index_is_its_entries_in_order_behind_a_table_of_counts(offsets: list[int]) -> None:
    index = sections.Index()
    entries = []
    for place, offset in enumerate(offsets):
        record = Encoded("R", offset, place, f"row-{offset % 7}", b"{}", b"")
        index.add(record, place)
        digest = hashlib.sha256(record.custom_id.encode()).digest()[: sections.HASH_BYTES]
        entries.append(digest + offset.to_bytes(8) + place.to_bytes(4))

    written = b"".join(index.pieces())

    before = [sum(entry[0] < byte for entry in entries) for byte in range(256)]
    assert b"".join(count.to_bytes(4) for count in before) == written[: sections.TABLE_BYTES]
    assert b"".join(sorted(entries)) == written[sections.TABLE_BYTES :]
