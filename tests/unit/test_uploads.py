"""Files through the API: in parts, past us, into the tenant's own place, and a batch at the end."""

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import count

import pytest

from sluice.domain.batches import Batch
from sluice.domain.errors import InvalidRequest
from sluice.intake import uploads
from sluice.intake.uploads import Uploads
from tests.bulk_fakes import Bulk, MemoryLinks, a_row, jsonl

ROWS = jsonl(a_row(1), a_row(2))


@pytest.fixture
def bulk() -> Iterator[Bulk]:
    made = Bulk()
    yield made
    made.close()


@pytest.fixture
def links(bulk: Bulk) -> MemoryLinks:
    return MemoryLinks(bulk.objects)


@pytest.fixture
def door(bulk: Bulk, links: MemoryLinks) -> Uploads:
    return a_door(bulk, links)


def a_door(bulk: Bulk, links: MemoryLinks, tenant: str = "acme") -> Uploads:
    tokens = count(1)
    return Uploads(
        *(tenant, bulk.objects, links, bulk.planner, lambda: "a secret"),
        lambda size: next(tokens).to_bytes(size),
    )


def sent(door: Uploads, links: MemoryLinks, name: str, body: bytes, **options: object) -> Batch:
    """Upload a file whole."""
    started = door.start(name, len(body), options)
    return door.complete(name, started.upload_id, {1: links.send(started.upload_id, 1, body)})


def test_a_file_in_parts_becomes_a_batch(
    door: Uploads, links: MemoryLinks, bulk: Bulk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "PART_BYTES", 100)
    started = door.start("2026/reviews.jsonl", len(ROWS), {"model": "claude-b"})
    etags = {
        part: links.send(started.upload_id, part, ROWS[100 * (part - 1) : 100 * part])
        for part in range(1, started.parts + 1)
    }

    batch = door.complete("2026/reviews.jsonl", started.upload_id, etags)
    again = door.complete("2026/reviews.jsonl", started.upload_id, etags)

    assert (-(-len(ROWS) // 100), 100) == (started.parts, started.part_bytes)
    assert started.links.keys() == etags.keys()
    assert batch == again == bulk.batch
    assert ("2026/reviews", "claude-b") == (batch.name, batch.options.model)
    bulk.planner.arrived(batch.input_key)
    bulk.drain()
    assert 2 == len(bulk.results())


def test_two_uploads_of_one_name_share_neither_content_nor_options(
    door: Uploads, links: MemoryLinks, bulk: Bulk
) -> None:
    """Also if both were started before the first was completed."""
    monday, tuesday = jsonl(a_row("monday")), jsonl(a_row("tuesday"))
    one = door.start("reviews.jsonl", len(monday), {"model": "claude-b"})
    two = door.start("reviews.jsonl", len(tuesday), {})
    etags = [links.send(each.upload_id, 1, body) for each, body in ((one, monday), (two, tuesday))]

    second = door.complete("reviews.jsonl", two.upload_id, {1: etags[1]})
    first = door.complete("reviews.jsonl", one.upload_id, {1: etags[0]})

    assert ("claude-b", None) == (first.options.model, second.options.model)
    for batch in (first, second):
        bulk.planner.arrived(batch.input_key)
    bulk.drain()
    found = [bulk.results_of(batch.batch_id) for batch in (first, second)]
    assert [["row-monday"], ["row-tuesday"]] == [
        [row["custom_id"] for row in rows] for rows in found
    ]


def test_options_of_an_earlier_file_of_that_name_do_not_hold(
    door: Uploads, links: MemoryLinks, bulk: Bulk
) -> None:
    bulk.objects.put("in/acme/reviews.options.json", b'{"model": "claude-c"}')
    sent(door, links, "reviews.jsonl", ROWS, model="claude-b")

    batch = sent(door, links, "reviews.jsonl", ROWS)

    assert batch.options.model is None


def test_the_same_content_under_other_options_is_another_batch(
    door: Uploads, links: MemoryLinks
) -> None:
    first = sent(door, links, "prompt.jsonl", ROWS, prompt="Praise: {text}", model="claude-a")
    again = sent(door, links, "prompt.jsonl", ROWS, prompt="Praise: {text}", model="claude-a")
    other = sent(door, links, "prompt.jsonl", ROWS, prompt="Insult: {text}", model="claude-a")

    assert first == again
    assert first.batch_id != other.batch_id


def test_a_file_whose_batch_was_deleted_is_not_answered_with_it(
    door: Uploads, links: MemoryLinks, bulk: Bulk
) -> None:
    batch = sent(door, links, "reviews.jsonl", ROWS)
    bulk.batches.stored[batch.batch_id] = replace(batch, deleted=True)

    with pytest.raises(InvalidRequest, match="was deleted; set the option run to run it again"):
        sent(door, links, "reviews.jsonl", ROWS)

    assert batch.batch_id != sent(door, links, "reviews.jsonl", ROWS, run="again").batch_id


def test_a_huge_file_has_larger_parts_and_not_more(door: Uploads) -> None:
    started = door.start("huge.jsonl", 5 * 1024**4, {})

    assert started.parts <= uploads.MOST_PARTS
    assert uploads.LINKS_AT_ONCE == len(started.links)


def test_more_links_are_returned_a_hundred_at_a_time(door: Uploads) -> None:
    started = door.start("huge.jsonl", 10**12, {})

    assert range(101, 201) == range(*_ends(door.links("huge.jsonl", started.upload_id, 101, 200)))
    for first, last in ((0, 5), (5, 4), (1, 101), (9_999, 10_001)):
        with pytest.raises(InvalidRequest, match="must be a range of up to 100 parts"):
            door.links("huge.jsonl", started.upload_id, first, last)


def _ends(links: object) -> tuple[int, int]:
    numbers = sorted(links)  # type: ignore[call-overload]
    return numbers[0], numbers[-1] + 1


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "is not a relative path"),
        ("../other/x.jsonl", "is not a relative path such as 2026/january.jsonl"),
        ("a/./x.jsonl", "is not a relative path"),
        ("/x.jsonl", "is not a relative path"),
        ("a//b.jsonl", "is not a relative path"),
        ("a\\b.jsonl", "is not a relative path"),
        ("x.exe", "does not end with .jsonl, .ndjson or .csv, also with .gz"),
        ("x", "does not end with"),
        ("x.jsonl ", "does not end with"),
        (".uploads/0123456789abcdef/x.jsonl", "begins with .uploads/, which is reserved"),
        ("a\nb.jsonl", "has control characters"),
        ("a\u202eb.jsonl", "has control characters or other characters that cannot be shown"),
        ("\ud800.jsonl", "has control characters"),
        ("x" * 600 + ".jsonl", "has 606 characters; the maximum is 512"),
        ("\U0001f600" * 260 + ".jsonl", "is too long in UTF-8"),
    ],
)
def test_a_name_stays_in_the_tenants_own_place(door: Uploads, name: str, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^name: .* " + re.escape(problem)):
        door.start(name, 10, {})
    with pytest.raises(InvalidRequest, match="name: "):
        door.complete(name, "upload-1", {1: "etag"})


@pytest.mark.parametrize(
    "name",
    [
        *(
            "my reviews (1).jsonl",
            "Prüfung/März.csv",
            "100%.jsonl",
            "a+b&c=d#e?f.jsonl",
            "%2e%2e/x.jsonl",
        ),
        *("日本語 😀.jsonl.gz", ".x.jsonl", '~x\'s "best".ndjson', "x.JSONL", "a/..b/...jsonl"),
    ],
)
def test_a_name_may_be_any_that_a_file_has(
    door: Uploads, links: MemoryLinks, bulk: Bulk, name: str
) -> None:
    batch = sent(door, links, name, ROWS, prompt="{a}")

    assert re.sub(r"(?i)\.(jsonl|csv|ndjson)(\.gz)?$", "", name) == batch.name
    if "csv" not in name and "gz" not in name:
        bulk.planner.arrived(batch.input_key)
        bulk.drain()
        assert 2 == len(bulk.results())
        assert f"out/acme/{batch.name}/results.jsonl" in bulk.objects.stored


def test_an_invalid_upload_is_rejected_before_it_starts(door: Uploads, links: MemoryLinks) -> None:
    with pytest.raises(InvalidRequest, match=r"bytes: must be from 1 to .* \(got 0\)"):
        door.start("x.jsonl", 0, {})
    with pytest.raises(InvalidRequest, match=r"options\.modle: Extra inputs"):
        door.start("x.jsonl", 10, {"modle": "x"})
    assert {} == links.going
    with pytest.raises(InvalidRequest, match="parts: List should have at least 1 item"):
        door.complete("x.jsonl", "upload-1", {})
    started = door.start("x.jsonl", 10, {})
    with pytest.raises(InvalidRequest, match="InvalidPart"):
        door.complete("x.jsonl", started.upload_id, {1: "etag"})


def test_an_aborted_upload_is_forgotten(door: Uploads, links: MemoryLinks) -> None:
    started = door.start("x.jsonl", 10, {})

    door.abort("x.jsonl", started.upload_id)
    door.abort("x.jsonl", started.upload_id)

    assert {} == links.going


def test_every_link_is_for_as_many_bytes_as_were_declared(door: Uploads) -> None:
    part = uploads.PART_BYTES
    started = door.start("reviews.jsonl", 150 * part + 5, {})

    first = started.links
    rest = door.links("reviews.jsonl", started.upload_id, 101, 151)

    sizes = [int(url.rpartition("&")[2]) for url in (*first.values(), *rest.values())]
    assert [part] * 150 + [5] == sizes
    with pytest.raises(InvalidRequest, match=r"parts from 1 to 151 \(got 151 to 152\)"):
        door.links("reviews.jsonl", started.upload_id, 151, 152)


@pytest.mark.parametrize("parts", [{1: "a"}, {1: "a", 2: "b", 3: "c"}, {2: "b", 3: "c"}])
def test_an_upload_has_all_its_parts_and_no_others(door: Uploads, parts: dict[int, str]) -> None:
    started = door.start("reviews.jsonl", uploads.PART_BYTES + 1, {})

    with pytest.raises(InvalidRequest, match="parts: must be the parts from 1 to 2"):
        door.complete("reviews.jsonl", started.upload_id, parts)


def test_an_id_that_was_changed_or_belongs_to_another_is_refused(
    door: Uploads, bulk: Bulk, links: MemoryLinks
) -> None:
    started = door.start("reviews.jsonl", 10, {})
    other = a_door(bulk, links, "other")
    size, token, signature, own_id = started.upload_id.split("-", 3)
    larger = f"10000000000-{token}-{signature}-{own_id}"

    wrong = [own_id, f"{size}-{own_id}", f"-{signature}-{own_id}", f"{size}--{own_id}", larger]
    wrong += [f"{size}-{'f' * 16}-{signature}-{own_id}", f"{size}-{token}-{signature}-upload-2"]
    wrong += ["٣-x-y", "9" * 5_000, "\ud800-\ud800-\ud800", ""]
    for upload_id in wrong:
        with pytest.raises(InvalidRequest, match="id: is not the id of an upload"):
            door.links("reviews.jsonl", upload_id, 1, 1)
    for tenant, name in ((door, "another.jsonl"), (other, "reviews.jsonl")):
        with pytest.raises(InvalidRequest, match="id: is not the id of an upload"):
            tenant.links(name, started.upload_id, 1, 1)
        with pytest.raises(InvalidRequest, match="id: is not the id of an upload"):
            tenant.complete(name, started.upload_id, {1: "etag"})
        with pytest.raises(InvalidRequest, match="id: is not the id of an upload"):
            tenant.abort(name, started.upload_id)
