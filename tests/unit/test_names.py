"""A name is not an identity: what a batch owns is stored under its id, and `out/` has copies for the latest of each."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from sluice.domain.batches import ERRORS, RESULTS, SUMMARY, Batch, Phase
from sluice.domain.errors import StoreBusy
from sluice.intake.batches import Batches
from sluice.ports.batches import Stored
from tests.bulk_fakes import Bulk, a_row, jsonl
from tests.fakes import MINUTE, VirtualClock, refused

OUTPUTS = (RESULTS, ERRORS, SUMMARY)
MONDAY, TUESDAY = (jsonl(*(a_row(f"{day}-{n}") for n in range(3))) for day in ("monday", "tuesday"))


@pytest.fixture
def bulk() -> Iterator[Bulk]:
    made = Bulk()
    yield made
    made.close()


def accepted(bulk: Bulk, body: bytes, name: str = "reviews.jsonl", **options: str) -> str:
    """Upload a file; return the id of its batch, which has not run yet."""
    known = set(bulk.batches.stored)
    bulk.time.pass_seconds(1)
    bulk.upload(body, name, **{f"sluice-{each}": value for each, value in options.items()})
    (batch_id,) = bulk.batches.stored.keys() - known
    return batch_id


def ids(rows: list[dict[str, Any]]) -> list[str]:
    return [row["custom_id"] for row in rows]


def copied(bulk: Bulk, name: str = "reviews") -> str | None:
    """Return the id of the batch whose outputs are under a name; all three are those of one batch."""
    batches = bulk.batches.stored.values()
    folder = f"out/acme/{name}/"
    found = {each: bulk.objects.stored.get(folder + each) for each in OUTPUTS}
    if set(found.values()) == {None}:
        return None
    (owner,) = (
        batch.batch_id
        for batch in batches
        if found == {each: bulk.objects.stored.get(batch.folder + each) for each in OUTPUTS}
    )
    return owner


def api_of(bulk: Bulk) -> Batches:
    clock = VirtualClock(bulk.time)
    stores = (bulk.batches, bulk.objects, bulk.queues, bulk.queues)
    return Batches("acme", *stores, clock, bytes, bulk.events)


def test_two_files_of_one_name_have_each_its_own_results_errors_and_summary(bulk: Bulk) -> None:
    first = accepted(bulk, MONDAY)
    bulk.drain()
    second = accepted(bulk, TUESDAY + b"{broken\n")
    bulk.drain()

    batches = [bulk.batches.stored[each] for each in (first, second)]
    results = [ids(bulk.results_of(each.batch_id)) for each in batches]
    errors = [bulk.objects.stored[each.errors_key] for each in batches]
    owners = [json.loads(bulk.objects.stored[each.summary_key])["batch_id"] for each in batches]
    assert [[f"row-{day}-{n}" for n in range(3)] for day in ("monday", "tuesday")] == results
    assert [0, 1] == [len(each.splitlines()) for each in errors]
    assert [first, second] == owners
    assert second == copied(bulk)


@pytest.mark.parametrize(
    "other",
    [("reviews.csv", b"text\nx\n"), ("reviews.jsonl", b"PK\x03\x04"), ("reviews.ndjson", b"")],
)
def test_a_file_that_cannot_be_run_empties_no_results_of_its_name(
    bulk: Bulk, other: tuple[str, bytes]
) -> None:
    first = accepted(bulk, MONDAY)
    bulk.drain()

    failed = bulk.batches.stored[accepted(bulk, other[1], other[0])]

    assert failed.problem is not None
    assert 3 == len(bulk.results_of(first))
    assert failed.batch_id == copied(bulk)


def test_an_older_batch_that_ends_later_stays_under_its_id(bulk: Bulk) -> None:
    wait = refused(429, "rate_limit_error", retry_after_ms=20 * MINUTE)
    until = bulk.time.now() + MINUTE
    bulk.claude.when = lambda asked: (
        wait if b"monday" in bytes(asked.body.data) and bulk.time.now() < until else None
    )
    first = accepted(bulk, MONDAY)
    bulk.once()
    bulk.time.pass_seconds(60)
    bulk.gateway.limits.stored.clear()
    second = accepted(bulk, TUESDAY)
    bulk.drain()
    assert second == copied(bulk)

    bulk.time.pass_seconds(25 * 60)
    bulk.queues.send_ranges(bulk.batches.stored[first], [0])
    bulk.drain()

    assert Phase.ENDED == bulk.batches.stored[first].phase
    assert ["row-monday-0", "row-monday-1", "row-monday-2"] == ids(bulk.results_of(first))
    assert second == copied(bulk)


def test_an_older_batch_is_not_copied_while_the_latest_of_its_name_runs(bulk: Bulk) -> None:
    """A program that waits for results of the file it has just uploaded must not find those of an older one."""
    accepted(bulk, MONDAY)
    second = accepted(bulk, TUESDAY)

    bulk.once()

    assert [Phase.ENDED, Phase.RUNNING] == [each.phase for each in bulk.batches.stored.values()]
    assert copied(bulk) is None
    bulk.drain()
    assert second == copied(bulk)


@pytest.mark.parametrize("copies", range(len(OUTPUTS)))
def test_the_latest_batch_stays_whatever_the_order_of_writes(bulk: Bulk, copies: int) -> None:
    """An older batch has copied so many of its outputs when a later one of its name is accepted and ends."""
    bulk.joins_at_once = False
    first = accepted(bulk, MONDAY)
    bulk.once()
    (join,) = bulk.queues.joins
    second: list[str] = []
    copy = bulk.objects.copy_latest

    def overtaken(source: Stored, key: str, rank: str) -> bool:
        if next(numbers) == copies:
            second.append(accepted(bulk, TUESDAY))
            bulk.once()
            bulk.assemble.join(*bulk.queues.joins[-1])
        return copy(source, key, rank)

    numbers = itertools.count()
    bulk.objects.copy_latest = overtaken  # type: ignore[method-assign]
    bulk.assemble.join(*join)

    assert second[0] == copied(bulk)
    assert 3 == len(bulk.results_of(first))


@pytest.mark.parametrize("copies", range(len(OUTPUTS)))
def test_a_batch_whose_function_died_between_copies_copies_all_of_them(
    bulk: Bulk, copies: int
) -> None:
    bulk.joins_at_once = False
    batch_id = accepted(bulk, MONDAY)
    bulk.once()
    copy = bulk.objects.copy_latest
    numbers = itertools.count()

    def dying(source: Stored, key: str, rank: str) -> bool:
        if next(numbers) == copies:
            raise StoreBusy(bulk.objects.name)
        return copy(source, key, rank)

    bulk.objects.copy_latest = dying  # type: ignore[method-assign]
    with pytest.raises(StoreBusy):
        bulk.assemble.join(*bulk.queues.joins[0])
    assert bulk.batch.ended_at is None

    bulk.assemble.join(*bulk.queues.joins[0])

    assert Phase.ENDED == bulk.batch.phase
    assert batch_id == copied(bulk)


def test_a_file_may_be_replaced_while_its_rows_run(bulk: Bulk) -> None:
    """Under the same name, or deleted: the batch has a copy."""
    first = accepted(bulk, MONDAY)
    second = accepted(bulk, TUESDAY)
    bulk.objects.delete(["in/acme/reviews.jsonl"])

    bulk.drain()

    found = [ids(bulk.results_of(each)) for each in (first, second)]
    assert [[f"row-{day}-{n}" for n in range(3)] for day in ("monday", "tuesday")] == found
    assert "in/acme/reviews.jsonl" == bulk.batches.stored[first].given_key


def test_a_file_that_is_replaced_before_it_is_copied_says_so(bulk: Bulk) -> None:
    copy = bulk.objects.copy

    def replaced(source: Stored, key: str) -> str:
        bulk.objects.put(source.key, TUESDAY)
        return copy(source, key)

    bulk.objects.copy = replaced  # type: ignore[method-assign]

    batch_id = accepted(bulk, MONDAY)

    assert "was deleted or replaced" in (bulk.batches.stored[batch_id].problem or "")


def test_a_file_that_is_too_large_to_copy_is_read_where_it_is(
    bulk: Bulk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sluice.bulk.plan.MOST_COPIED_BYTES", 10)

    accepted(bulk, MONDAY)
    bulk.drain()

    assert "in/acme/reviews.jsonl" == bulk.batch.input_key
    assert 3 == len(bulk.results())


@pytest.mark.parametrize(
    "other",
    [
        {"model": "claude-b"},
        {"max-tokens": "7"},
        {"prompt": "Insult: {text}"},
        {"webhook": "https://acme.example/"},
        {"deadline": "2026-11-20T12:30:00Z"},
        {"fallback-models": "claude-b"},
        {"run": "second"},
        {"modle": "claude-b"},
    ],
    ids=str,
)
def test_the_same_content_is_the_same_run_only_under_the_same_options(
    bulk: Bulk, other: dict[str, str]
) -> None:
    first = accepted(bulk, MONDAY)
    bulk.drain()

    second = accepted(bulk, MONDAY, **other)

    assert first != second
    bulk.upload(MONDAY, "reviews.jsonl")
    assert {first, second} == set(bulk.batches.stored)


def test_batches_without_a_file_have_no_copies(bulk: Bulk) -> None:
    bulk.add(MONDAY)
    bulk.drain()

    assert 3 == len(bulk.results())
    assert [] == [key for key in bulk.objects.stored if key.startswith("out/")]


def test_a_batch_whose_copies_would_have_too_long_names_ends_without_them(bulk: Bulk) -> None:
    name = "x" * (1_024 - len("in/acme/.jsonl"))

    accepted(bulk, MONDAY, f"{name}.jsonl")
    bulk.drain()

    assert 3 == len(bulk.results())
    assert [] == [key for key in bulk.objects.stored if key.startswith("out/")]


# Deletion ------------------------------------------------------------------------------------------------------


def test_a_deleted_batch_takes_its_copies_and_no_others(bulk: Bulk) -> None:
    first = accepted(bulk, MONDAY)
    bulk.drain()
    second = accepted(bulk, TUESDAY)
    bulk.drain()
    api = api_of(bulk)

    api.delete(first)
    assert second == copied(bulk)
    api.delete(second)

    assert ["in/acme/reviews.jsonl"] == sorted(bulk.objects.stored)


def test_the_names_of_documents_are_found_and_deleted_with_the_batch(bulk: Bulk) -> None:
    bulk.objects.put("in/acme/docs/a.txt", b"A")
    options = b'{"prompt": "Say", "model": "claude-a", "max_tokens": 5}'
    batch_id = accepted(bulk, options, "docs/options.json")
    bulk.drain()
    batch = bulk.batches.stored[batch_id]

    links = api_of(bulk).links(batch_id)

    assert f"https://bucket.example/{batch.documents_key}?seconds=900" == links["documents"]
    assert "out/acme/docs/documents.jsonl" in bulk.objects.stored
    api_of(bulk).delete(batch_id)
    assert ["in/acme/docs/a.txt", "in/acme/docs/options.json"] == sorted(bulk.objects.stored)


def test_an_older_batch_is_not_copied_after_the_latest_was_deleted(bulk: Bulk) -> None:
    """The rows of the latest were deleted, not those of all earlier batches restored."""
    first = accepted(bulk, MONDAY)
    second = accepted(bulk, TUESDAY)
    bulk.queues.ranges = dict(reversed(bulk.queues.ranges.items()))
    bulk.once()
    api_of(bulk).delete(second)

    bulk.drain()

    assert copied(bulk) is None
    assert 3 == len(bulk.results_of(first))


# Older releases ------------------------------------------------------------------------------------------------


def of_an_older_release(bulk: Bulk, body: bytes) -> Batch:
    """Run a file; return its batch as an older release has left it: its outputs are under its name only."""
    batch = bulk.batches.stored[accepted(bulk, body)]
    bulk.drain()
    batch = bulk.batches.stored[batch.batch_id]
    for name in OUTPUTS:
        del bulk.objects.stored[f"batches/{batch.batch_id}/{name}"]
        bulk.objects.metadata.pop(f"out/acme/reviews/{name}")
    older = replace(batch, by_id=False)
    bulk.batches.stored[batch.batch_id] = older
    bulk.batches.latest.clear()
    return older


def test_a_batch_of_an_older_release_is_read_where_it_is_stored(bulk: Bulk) -> None:
    batch = of_an_older_release(bulk, MONDAY)

    links = api_of(bulk).links(batch.batch_id)

    assert {
        f"https://bucket.example/out/acme/reviews/{name}?seconds=900" for name in OUTPUTS
    } == set(links.values())
    assert 3 == len(bulk.results_of(batch.batch_id))
    api_of(bulk).delete(batch.batch_id)
    assert [] == [key for key in bulk.objects.stored if key.startswith("out/")]


def test_a_batch_of_an_older_release_keeps_its_results_when_a_file_of_its_name_arrives(
    bulk: Bulk,
) -> None:
    older = of_an_older_release(bulk, MONDAY)

    second = accepted(bulk, TUESDAY)
    bulk.drain()

    assert second == copied(bulk)
    assert ["row-monday-0", "row-monday-1", "row-monday-2"] == ids(bulk.results_of(older.batch_id))
    links = api_of(bulk).links(older.batch_id).values()
    assert all(f"/batches/{older.batch_id}/" in link for link in links)
    api_of(bulk).delete(older.batch_id)
    assert second == copied(bulk)


@pytest.mark.parametrize(
    "summary", [b"", b"{", b"[]", b"[" * 100_000, b'{"batch_id": 7}', b'{"batch_id": "none"}']
)
def test_a_foreign_summary_does_not_keep_a_batch_from_its_end(bulk: Bulk, summary: bytes) -> None:
    bulk.objects.put("out/acme/reviews/summary.json", summary)

    batch_id = accepted(bulk, MONDAY)
    bulk.drain()

    assert batch_id == copied(bulk)
