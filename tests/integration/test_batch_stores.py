"""One suite for the stores of batches: the fakes the use cases are tested with, and DynamoDB, S3 and SQS themselves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from botocore.stub import Stubber
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sluice.adapters import aws, s3
from sluice.adapters.batch_records import DynamoBatches
from sluice.adapters.job_records import as_text, of_text
from sluice.adapters.notices import BusNotices
from sluice.adapters.sqs import Hidden, SqsBatchesQueue, SqsRangesQueue
from sluice.domain.batches import (
    Batch,
    Options,
    Plan,
    Progress,
    RangeState,
    Source,
    Tally,
    cancel_batch,
    claim_range,
    plan_batch,
    planned,
    release_range,
    save_chunk,
)
from sluice.domain.errors import InputMissing, InvalidRequest, Stale, StoreBusy
from sluice.domain.jobs import Attempt, Snooze
from sluice.domain.turns import group_of_range
from sluice.ports.batches import BatchStore, DueRange, Newcomer, Objects, Stored, WaitingRanges
from sluice.ports.jobs import Received
from sluice.ports.messages import batch_messages
from sluice.ports.world import Notice
from tests.bulk_fakes import MemoryBatches, MemoryObjects
from tests.fakes import NOON, FrozenClock, RecordingEvents, a_job
from tests.moto_aws import BUCKET, Aws, in_memory

KINDS: Final = ["fake", "aws"]
MIB: Final = 1024 * 1024


class Both(BatchStore, WaitingRanges):
    """One object is both."""


@pytest.fixture(scope="module")
def cloud() -> Iterator[Aws]:
    with in_memory() as running:
        yield running


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A tenant, or the end of an id, that no other test uses: tables outlive a test."""
    return sha256(request.node.name.encode()).hexdigest()[:16]


@pytest.fixture(params=KINDS)
def batches(request: pytest.FixtureRequest, cloud: Aws, name: str) -> Both:
    clock = FrozenClock()
    if request.param == "fake":
        return MemoryBatches(clock.now)  # type: ignore[return-value]
    cloud.create_table(name, like="BatchesTable")
    return DynamoBatches(cloud.dynamodb, name, 30, clock)  # type: ignore[return-value]


@pytest.fixture(params=KINDS)
def objects(request: pytest.FixtureRequest, cloud: Aws) -> Objects:
    return MemoryObjects() if request.param == "fake" else s3.Objects(cloud.s3, BUCKET)


def a_batch(number: int = 1, **facts: object) -> Batch:
    return Batch(
        **{
            "batch_id": f"msgbatch_{number:032x}",
            "tenant": "acme",
            "name": "first",
            "source": Source.FILE,
            "created_at": NOON + number,
            "expires_at": NOON + 1_000_000,
            "input_key": "in/acme/first.jsonl",
            "input_etag": "etag",
        }
        | facts  # type: ignore[arg-type]
    )


# Batches -------------------------------------------------------------------------------------------------------


def test_a_batch_is_stored_once_and_read_as_it_was(batches: Both) -> None:
    options = Options(model="claude-a", fallback_models=("b", "c"), deadline=NOON, run="x")
    batch = a_batch(options=options, due_at=NOON + 5, tally=Tally(succeeded=3))
    batch = plan_batch(batch, planned(1_000, b"ab\n"))

    batches.add(batch)

    assert batch == batches.get(batch.batch_id)
    assert batches.get("msgbatch_none") is None
    with pytest.raises(Stale) as stale:
        batches.add(replace(batch, name="other"))
    assert batch == stale.value.current


def test_a_batch_is_written_only_by_who_saw_its_last_version(batches: Both) -> None:
    batch = a_batch()
    batches.add(batch)
    canceled = cancel_batch(batch, NOON)

    batches.replace(canceled, batch.version)

    with pytest.raises(Stale) as stale:
        batches.replace(cancel_batch(batch, NOON + 1), batch.version)
    assert canceled == stale.value.current
    with pytest.raises(Stale):
        batches.replace(a_batch(99), 1)


def test_a_listing_is_newest_first_and_goes_both_ways(batches: Both) -> None:
    made = [a_batch(number) for number in range(1, 8)]
    for batch in made:
        batches.add(batch)
    batches.add(a_batch(50, tenant="other"))
    batches.add(a_batch(51, deleted=True))

    first = batches.listing("acme", 3)
    second = batches.listing("acme", 3, after=first.batches[-1])
    last = batches.listing("acme", 3, after=second.batches[-1])
    back = batches.listing("acme", 2, before=last.batches[0])
    top = batches.listing("acme", 20, before=made[4])

    assert ((*made[:-4:-1],), True) == (first.batches, first.has_more)
    assert ((made[3], made[2], made[1]), True) == (second.batches, second.has_more)
    assert ((made[0],), False) == (last.batches, last.has_more)
    assert ((made[2], made[1]), True) == (back.batches, back.has_more)
    assert ((made[6], made[5]), False) == (top.batches, top.has_more)
    assert () == batches.listing("nobody", 3).batches


# Ranges --------------------------------------------------------------------------------------------------------


def test_a_range_is_on_record_from_its_first_claim(batches: Both) -> None:
    batch = a_batch()
    fresh = batches.range_state(batch, 7)
    assert RangeState(batch.batch_id, 7, "acme") == fresh

    claimed = claim_range(fresh, "one", NOON, NOON + 10)
    batches.replace_range(claimed, 0)
    saved = save_chunk(claimed, "one", NOON + 20, "1-1", rows=())
    saved = replace(saved, losses=2, running=(0, 9), suspects=(9, 70), blamed=(9, 9))
    batches.replace_range(saved, claimed.version)

    assert saved == batches.range_state(batch, 7)
    with pytest.raises(Stale) as stale:
        batches.replace_range(claim_range(fresh, "two", NOON, NOON + 10), 0)
    assert saved == stale.value.current
    with pytest.raises(Stale):
        batches.replace_range(claimed, claimed.version)


def test_a_member_counts_once_however_often_it_is_marked(batches: Both) -> None:
    one, two = Tally(succeeded=99, cost_micro_usd=7), Tally(errored=1)

    batches.mark("msgbatch_m", "section#000000", 3, one)
    again = batches.mark("msgbatch_m", "section#000000", 3, one)
    both = batches.mark("msgbatch_m", "section#000000", 30, two)
    batches.mark("msgbatch_m", "section#000001", 100, one)
    batches.mark("msgbatch_m", "sections", 0, Tally())

    assert Progress(frozenset({3}), one) == again
    assert Progress(frozenset({3, 30}), one + two) == both
    assert {
        "section#000000": Progress(frozenset({3, 30}), one + two),
        "section#000001": Progress(frozenset({100}), one),
    } == batches.groups("msgbatch_m", "section#")
    assert {} == batches.groups("msgbatch_none", "section#")


def test_what_a_running_member_has_so_far_counts_until_it_is_done(batches: Both) -> None:
    group, early, late = "section#000000", Tally(succeeded=10), Tally(succeeded=25, errored=1)
    whole, other = Tally(succeeded=99, errored=1), Tally(canceled=2)

    batches.note_running("msgbatch_r", group, 3, early)
    batches.note_running("msgbatch_r", group, 3, late)
    batches.note_running("msgbatch_r", group, 4, other)
    running = batches.groups("msgbatch_r", group)
    done = batches.mark("msgbatch_r", group, 3, whole)
    batches.note_running("msgbatch_r", group, 3, late)

    assert {group: Progress(frozenset(), Tally(), late + other)} == running
    assert Progress(frozenset({3}), whole, other) == done
    assert {group: Progress(frozenset({3}), whole, other)} == batches.groups("msgbatch_r", group)


def test_a_repeated_create_finds_the_first_ones_batch(batches: Both) -> None:
    assert "a" == batches.name_create("acme", "body", "a", NOON - 10, fresh=True)
    assert "a" == batches.name_create("acme", "body", "b", NOON - 10, fresh=False)
    assert "c" == batches.name_create("acme", "body", "c", NOON - 10, fresh=True)
    assert "c" == batches.name_create("acme", "body", "d", NOON - 10, fresh=False)
    assert "e" == batches.name_create("acme", "body", "e", NOON + 10, fresh=False)
    assert "f" == batches.name_create("acme", "other", "f", NOON - 10, fresh=False)
    assert "g" == batches.name_create("other", "body", "g", NOON - 10, fresh=False)


def test_one_batch_of_a_tenant_has_its_turn_until_it_ends_or_dies(batches: Both) -> None:
    assert batches.take_turn("acme", "a", NOON, NOON + 10)
    assert batches.take_turn("acme", "a", NOON + 1, NOON + 10), "it may continue after a death"
    assert not batches.take_turn("acme", "b", NOON + 9, NOON + 30)
    assert batches.take_turn("other", "c", NOON + 9, NOON + 30)
    batches.end_turn("acme", "b")
    assert not batches.take_turn("acme", "b", NOON + 9, NOON + 30), "not its own turn"
    assert batches.take_turn("acme", "b", NOON + 10, NOON + 30), "the holder has died"
    batches.end_turn("acme", "b")
    assert batches.take_turn("acme", "a", NOON + 11, NOON + 30)


def test_the_latest_batch_of_a_name_is_the_one_accepted_last(batches: Both) -> None:
    one, two, three = (a_batch(number) for number in (1, 2, 3))
    at_once = a_batch(30, created_at=three.created_at)

    found = [batches.latest_of_name(each) for each in (two, one, two, three, at_once, three)]

    wanted = [two, two, two, three, at_once, at_once]
    assert [each.batch_id for each in wanted] == found
    for other in (a_batch(1, name="other"), a_batch(1, tenant="other")):
        assert other.batch_id == batches.latest_of_name(other)


def test_waiting_ranges_and_late_batches_are_due_and_taken_once(batches: Both) -> None:
    batches.add(a_batch(1, due_at=NOON + 20))
    batches.add(a_batch(2, due_at=NOON + 900))
    batches.add(a_batch(3))
    claimed = claim_range(RangeState("msgbatch_r", 7, "acme"), "one", NOON, NOON + 1)
    waiting = release_range(claimed, "one", chunks=(), not_before=NOON + 10, model="claude-a")
    batches.replace_range(waiting, 0)

    first, second = batches.due(NOON + 100, 100)

    assert DueRange("msgbatch_r", 7, "acme", NOON + 10, "claude-a") == first
    assert (a_batch(1).batch_id, None) == (second.batch_id, second.number)
    held = batches.postpone(first, NOON + 50)
    assert held == replace(first, due_at=NOON + 50)
    assert batches.postpone(first, NOON + 60) is None
    batches.remove(first)
    assert 2 == len(batches.due(NOON + 100, 100))
    batches.remove(replace(first, due_at=NOON + 50))
    assert [second] == list(batches.due(NOON + 100, 100))
    assert waiting == batches.range_state(a_batch(batch_id="msgbatch_r"), 7)


def test_newcomers_are_listed_in_turns_of_tenants_until_they_are_welcomed(batches: Both) -> None:
    some = [
        Newcomer(*each)
        for each in (("b", "m1"), ("a", "m3"), ("a", "m2"), ("a-c", "m4"), ("a", "m2"))
    ]
    for each in some:
        batches.announce(each)

    assert Newcomer("a", "m2") == batches.newcomer("")
    assert Newcomer("a-c", "m4") == batches.newcomer("a")
    assert Newcomer("b", "m1") == batches.newcomer("a-c")
    assert batches.newcomer("b") is None
    batches.welcome(Newcomer("a", "m2"))
    batches.welcome(Newcomer("b", "unknown"))
    assert Newcomer("a", "m3") == batches.newcomer("")


def test_ranges_that_were_claimed_are_seen_and_whether_they_are_parked(batches: Both) -> None:
    claimed = claim_range(RangeState("msgbatch_s", 7, "acme"), "one", NOON, NOON + 1)
    parked = release_range(
        replace(claimed, number=8), "one", chunks=(), not_before=NOON + 10, model="claude-a"
    )
    for state in (claimed, parked, replace(parked, number=9), replace(claimed, number=10)):
        batches.replace_range(state, 0)
    batches.remove(DueRange("msgbatch_s", 9, "acme", NOON + 10, "claude-a"))

    seen = batches.seen_ranges("msgbatch_s", range(5, 10))

    assert {7: False, 8: True, 9: False} == {each: seen[each].is_parked for each in seen}
    assert parked == seen[8].state
    assert {} == batches.seen_ranges("msgbatch_t", range(5, 10))


# Objects -------------------------------------------------------------------------------------------------------


def test_an_object_is_read_in_pieces_while_it_is_the_same(objects: Objects, name: str) -> None:
    objects.put(name, b"0123456789")
    stored = objects.head(name)
    assert stored is not None

    assert (10, name) == (stored.size, stored.key)
    assert b"345" == objects.read(name, 3, 3, stored.etag)
    assert b"89" == objects.read(name, 8, 100)
    assert b"" == objects.read(name, 10, 5)
    assert b"" == objects.read(name, 0, 0)
    assert b"0123456789" == b"".join(objects.stream(name))
    objects.put(name, b"other")
    with pytest.raises(InputMissing):
        objects.read(name, 0, 3, stored.etag)


def test_an_object_that_is_not_there_is_none_or_missing(objects: Objects, name: str) -> None:
    assert objects.head(name) is None
    assert objects.get(name) is None
    with pytest.raises(InputMissing):
        objects.read(name, 0, 3)
    with pytest.raises(InputMissing):
        list(objects.stream(name))


@pytest.mark.parametrize("sizes", [[], [3], [5 * MIB, 5 * MIB, 7 * MIB], [1, 8 * MIB, 2 * MIB]])
def test_a_written_object_is_whole_once_it_is_closed(
    objects: Objects, name: str, sizes: list[int]
) -> None:
    pieces = [bytes([number]) * size for number, size in enumerate(sizes)]
    writer = objects.writer(name)
    for piece in pieces:
        writer.write(piece)
    assert objects.head(name) is None

    size = writer.close()
    writer.abort()

    assert sum(sizes) == size
    assert b"".join(pieces) == b"".join(objects.stream(name))


def test_an_aborted_object_leaves_nothing(cloud: Aws, name: str) -> None:
    writer = s3.Objects(cloud.s3, BUCKET).writer(name)
    writer.write(b"x" * 9 * MIB)

    writer.abort()

    assert [] == cloud.s3.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    assert {} == cloud.objects(name)


@pytest.mark.parametrize(
    "sizes",
    [[0], [10, 20, 0], [6 * MIB], [6 * MIB, 7 * MIB, 3], [3, 12 * MIB, 4 * MIB, 4 * MIB, 5 * MIB]],
)
def test_objects_are_put_together_in_their_order(
    objects: Objects, name: str, sizes: list[int]
) -> None:
    bodies = {number: bytes([65 + number]) * size for number, size in enumerate(sizes)}
    for number, body in bodies.items():
        objects.put(f"{name}/{number}", body)

    size = objects.assemble(
        name, {n: f"{name}/{n}" for n in bodies}, {n: len(body) for n, body in bodies.items()}
    )

    assert sum(sizes) == size
    assert b"".join(bodies.values()) == b"".join(objects.stream(name))


def test_large_objects_are_copied_and_never_read(cloud: Aws, name: str) -> None:
    store = s3.Objects(cloud.s3, BUCKET)
    for number in range(3):
        store.put(f"{name}/{number}", b"x" * 6 * MIB)
    read: list[str] = []
    cloud.s3.meta.events.register("before-call.s3.GetObject", lambda **_: read.append("read"))

    store.assemble(name, {n: f"{name}/{n}" for n in range(3)}, dict.fromkeys(range(3), 6 * MIB))

    assert [] == read


def stored(objects: Objects, key: str) -> Stored:
    found = objects.head(key)
    assert found is not None
    return found


@pytest.mark.parametrize("size", [0, 10, 6 * MIB])
def test_a_copy_is_of_what_was_there_when_it_was_looked_up(
    objects: Objects, name: str, size: int
) -> None:
    objects.put(f"{name}/a ü%20+b", b"x" * size)
    source = stored(objects, f"{name}/a ü%20+b")

    etag = objects.copy(source, f"{name}/copy")

    copy = stored(objects, f"{name}/copy")
    assert (etag, size, "") == (copy.etag, copy.size, copy.rank)
    objects.put(source.key, b"y" * (size + 1))
    if size:
        with pytest.raises(InputMissing):
            objects.copy(source, f"{name}/copy")
    assert copy == stored(objects, f"{name}/copy")


@pytest.mark.parametrize("size", [10, 6 * MIB])
def test_a_copy_of_a_greater_rank_stays(objects: Objects, name: str, size: int) -> None:
    sources = {}
    for rank in "123":
        objects.put(f"{name}/{rank}", rank.encode() * size)
        sources[rank] = stored(objects, f"{name}/{rank}")
    objects.put(f"{name}/latest", b"of an older release")

    copied = [objects.copy_latest(sources[each], f"{name}/latest", each) for each in "2132"]

    assert [True, False, True, False] == copied
    assert b"3" * size == objects.get(f"{name}/latest")
    assert objects.copy_latest(sources["3"], f"{name}/latest", "3")


@pytest.mark.parametrize("size", [10, 6 * MIB])
@pytest.mark.parametrize("was_there", [False, True])
@pytest.mark.parametrize("deleted", [False, True])
def test_of_two_writers_at_once_the_greater_rank_wins(
    cloud: Aws, name: str, size: int, *, was_there: bool, deleted: bool
) -> None:
    """Another writer writes between our look and our write; and deletes what it wrote, in some cases."""
    store = s3.Objects(cloud.s3, BUCKET)
    for rank in "012":
        store.put(f"{name}/{rank}", rank.encode() * size)
    sources = {rank: stored(store, f"{name}/{rank}") for rank in "012"}
    if was_there:
        store.copy_latest(sources["0"], f"{name}/latest", "0")
    waiting = [True]

    def between(params: Any, **_: Any) -> None:
        is_ours = {"If-Match", "If-None-Match"} & set(params["headers"])
        if is_ours and waiting:
            waiting.clear()
            store.copy_latest(sources["2"], f"{name}/latest", "2")
            if deleted:
                store.delete([f"{name}/latest"])

    operation = "PutObject" if size < MIB else "CompleteMultipartUpload"
    cloud.s3.meta.events.register(f"before-call.s3.{operation}", between)
    try:
        was_copied = store.copy_latest(sources["1"], f"{name}/latest", "1")
    finally:
        cloud.s3.meta.events.unregister(f"before-call.s3.{operation}", between)

    assert deleted == was_copied
    assert (b"1" if deleted else b"2") * size == store.get(f"{name}/latest")
    assert [] == cloud.s3.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])


def test_objects_are_listed_by_the_beginning_of_their_keys(objects: Objects, name: str) -> None:
    for number in (3, 1, 2):
        objects.put(f"{name}/{number}", b"x" * number)
    objects.put(f"{name}-other", b"")

    found = list(objects.listing(f"{name}/"))

    assert [(f"{name}/{number}", number) for number in (1, 2, 3)] == [
        (each.key, each.size) for each in found
    ]
    first = objects.head(f"{name}/1")
    assert first is not None
    assert first.etag == found[0].etag


def test_a_long_listing_comes_page_by_page(cloud: Aws, name: str) -> None:
    store = s3.Objects(cloud.s3, BUCKET)
    for number in range(1_005):
        store.put(f"{name}/{number:04}", b"")

    assert 1_005 == len(list(store.listing(f"{name}/")))


# Queues --------------------------------------------------------------------------------------------------------


def test_each_range_gets_a_pointer_in_its_tenants_group(cloud: Aws) -> None:
    queue = SqsRangesQueue(cloud.sqs, cloud.ranges_queue)
    batch = a_batch(plan=Plan(0, 6_000, 100, 60, 1))

    assert [] == queue.send_ranges(batch, range(25))

    found = []
    while messages := cloud.sqs.receive_message(
        QueueUrl=cloud.ranges_queue, MaxNumberOfMessages=10, AttributeNames=["All"]
    ).get("Messages"):
        found += messages
    records = [{"messageId": each["MessageId"], "body": each["Body"]} for each in found]
    read = batch_messages(records)
    groups = {
        pointer.range: each["Attributes"]["MessageGroupId"]
        for pointer, each in zip(read, found, strict=True)
    }
    assert {n: group_of_range("acme", batch.batch_id, n, 60) for n in range(25)} == groups
    assert 2 == len(set(groups.values()))
    assert list(range(25)) == sorted(each.range for each in read if each.range is not None)
    assert {batch.batch_id} == {each.batch_id for each in read}
    assert 25 == queue.backlog().total


def test_what_is_to_be_done_with_a_batch_is_read_as_it_was_sent(cloud: Aws) -> None:
    queue = SqsBatchesQueue(cloud.sqs, cloud.batches_queue)

    queue.send_plan(a_batch(1).batch_id, "acme")
    queue.send_join(a_batch(2).batch_id, 3, "acme")

    got = cloud.sqs.receive_message(
        QueueUrl=cloud.batches_queue, MaxNumberOfMessages=10, AttributeNames=["All"]
    )
    assert {"acme/plan", "acme/join"} == {
        each["Attributes"]["MessageGroupId"] for each in got["Messages"]
    }
    read = batch_messages(
        [{"messageId": each["MessageId"], "body": each["Body"]} for each in got["Messages"]]
    )
    assert {(a_batch(1).batch_id, None), (a_batch(2).batch_id, 3)} == {
        (each.batch_id, each.join) for each in read
    }


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ({"source": "aws.s3", "detail-type": "Object Created"}, None),
        ({"source": "aws.s3", "detail-type": "Object Deleted", "detail": {"object": {"key": "k"}}}, None),
        ({"source": "other", "detail-type": "Object Created", "detail": {"object": {"key": "k"}}}, None),
        ({"source": "aws.s3", "detail-type": "Object Created", "detail": {"object": {"key": "k"}}}, "k"),
        ([], None),
        ({"v": 1, "batch_id": "msgbatch_x"}, None),
    ],
)  # fmt: skip
def test_only_an_object_that_was_created_has_arrived(body: object, key: str | None) -> None:
    (read,) = batch_messages([{"messageId": "m", "body": json.dumps(body)}])

    assert (key, None) == (read.key, read.batch_id)


def seconds_hidden(cloud: Aws, url: str) -> bool:
    """Return whether the queue's only message is hidden now."""
    return not cloud.sqs.receive_message(QueueUrl=url, VisibilityTimeout=0).get("Messages")


def a_message(cloud: Aws, name: str) -> tuple[str, Received]:
    url = cloud.sqs.create_queue(QueueName=name)["QueueUrl"]
    cloud.sqs.send_message(QueueUrl=url, MessageBody="{}")
    (got,) = cloud.sqs.receive_message(QueueUrl=url, VisibilityTimeout=0)["Messages"]
    return url, Received(got["MessageId"], got["ReceiptHandle"], "{}", None)


def test_a_message_is_hidden_while_it_is_processed_and_retried_after_a_failure(
    cloud: Aws, name: str
) -> None:
    url, message = a_message(cloud, name)

    with suppress(RuntimeError), Hidden(cloud.sqs, url, message):
        assert within(lambda: seconds_hidden(cloud, url))
        raise RuntimeError

    assert seconds_hidden(cloud, url)


def test_a_message_whose_work_is_not_done_is_visible_at_once(cloud: Aws, name: str) -> None:
    url, message = a_message(cloud, name)

    with Hidden(cloud.sqs, url, message) as hidden:
        assert within(lambda: seconds_hidden(cloud, url))
        hidden.show()

    assert within(lambda: not seconds_hidden(cloud, url))


def test_a_message_that_cannot_be_hidden_is_processed_all_the_same(cloud: Aws, name: str) -> None:
    url, message = a_message(cloud, name)

    with Hidden(cloud.sqs, url, replace(message, receipt="no such receipt")):
        pass


def within(find: Callable[[], bool]) -> bool:
    """Ask again for a while: the other thread needs a moment."""
    for _ in range(500):
        if find():
            return True
        time.sleep(0.01)
    return False


# Notices -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cloud")
def test_an_event_is_put_on_the_default_bus_or_the_error_is_raised() -> None:
    client = aws.events()
    notices = BusNotices(client, aws.sqs(), "no queue is needed", RecordingEvents())
    reported = [Notice("b", "Batch Ended", 0, "acme", {"batch_id": "b"})]
    entry = {"Source": "sluice", "DetailType": "Batch Ended", "Detail": '{"batch_id":"b"}'}
    with Stubber(client) as stub:
        stub.add_response(
            "put_events",
            {"FailedEntryCount": 0, "Entries": [{"EventId": "1"}]},
            {"Entries": [entry]},
        )
        busy = {"FailedEntryCount": 1, "Entries": [{"ErrorCode": "InternalFailure"}]}
        stub.add_response("put_events", busy, {"Entries": [entry]})

        notices.publish(reported)
        with pytest.raises(StoreBusy):
            notices.publish(reported)


@pytest.mark.usefixtures("cloud")
def test_a_requested_webhook_is_enqueued_or_the_error_is_raised() -> None:
    bus, sqs = aws.events(), aws.sqs()
    notices = BusNotices(bus, sqs, "https://queue", RecordingEvents())
    reported = [
        Notice("b", "Batch Ended", NOON, "acme", {"batch_id": "b"}),
        Notice("j-2", "Job Ended", NOON, "acme", {"job_id": "j"}, "https://acme.example/"),
    ]
    body = '{"type":"job.ended","timestamp":"2026-11-20T12:00:00.000000Z","data":{"job_id":"j"}}'
    message = {
        "v": 1,
        "webhook": "j-2",
        "tenant": "acme",
        "url": "https://acme.example/",
        "body": body,
    }
    text = json.dumps(message, separators=(",", ":"))
    entry = {"Id": "0", "MessageBody": text, "MessageGroupId": "acme"}
    asked = {"QueueUrl": "https://queue", "Entries": [entry]}
    failed = {"Id": "0", "SenderFault": False, "Code": "InternalError"}
    with Stubber(bus) as of_bus, Stubber(sqs) as of_queue:
        for _ in range(2):
            of_bus.add_response("put_events", {"FailedEntryCount": 0, "Entries": []})
        of_queue.add_response("send_message_batch", {"Successful": [], "Failed": []}, asked)
        of_queue.add_response("send_message_batch", {"Successful": [], "Failed": [failed]}, asked)

        notices.publish(reported)
        with pytest.raises(StoreBusy, match="webhooks queue"):
            notices.publish(reported)


@pytest.mark.usefixtures("cloud")
def test_an_event_that_aws_will_never_accept_is_skipped_and_blocks_no_other() -> None:
    bus, sqs, events = aws.events(), aws.sqs(), RecordingEvents()
    notices = BusNotices(bus, sqs, "https://queue", events)
    reported = [Notice("j-2", "Job Ended", NOON, "acme", {"job_id": "j"}, "https://acme.example/")]
    malformed = {"FailedEntryCount": 1, "Entries": [{"ErrorCode": "MalformedDetail"}]}
    failed = {"Id": "0", "SenderFault": True, "Code": "InvalidMessageContents"}
    with Stubber(bus) as of_bus, Stubber(sqs) as of_queue:
        of_bus.add_response("put_events", malformed)
        of_queue.add_response("send_message_batch", {"Successful": [], "Failed": [failed]})

        notices.publish(reported)

    assert ["end not published", "end not published"] == events.problem_names


@pytest.mark.usefixtures("cloud")
def test_metadata_may_hold_what_a_message_may_not_and_a_tenant_what_a_group_may_not() -> None:
    bus, sqs = aws.events(), aws.sqs()
    url = sqs.create_queue(QueueName="w")["QueueUrl"]
    facts = {"metadata": {"note": "\uffff\u6c34"}}

    BusNotices(bus, sqs, url, RecordingEvents()).publish(
        [Notice("j-2", "Job Ended", NOON, "My Team", facts, "https://acme.example/")]
    )

    (message,) = sqs.receive_message(QueueUrl=url)["Messages"]
    assert message["Body"].isascii()
    assert facts == json.loads(json.loads(message["Body"])["body"])["data"]


@pytest.mark.usefixtures("cloud")
def test_ends_with_much_metadata_go_in_as_many_calls_as_aws_needs() -> None:
    """One event too many for a call would hold up the stream for a day."""
    bus, sqs = aws.events(), aws.sqs()
    reported = [
        Notice(
            f"j-{n}", "Job Ended", NOON, "acme", {"note": "\u6c34" * 9_000}, "https://a.example/"
        )
        for n in range(23)
    ]
    sizes: dict[str, list[tuple[int, int]]] = {"events": [], "sqs": []}

    def look(model: Any, params: Any, **_: Any) -> None:
        entries = params.get("Entries", ())
        size = sum(
            len(each.get("Detail", each.get("MessageBody", "")).encode()) for each in entries
        )
        sizes["events" if model.name == "PutEvents" else "sqs"].append((len(entries), size))

    bus.meta.events.register("provide-client-params.eventbridge.PutEvents", look)
    sqs.meta.events.register("provide-client-params.sqs.SendMessageBatch", look)
    url = sqs.create_queue(QueueName="w")["QueueUrl"]

    BusNotices(bus, sqs, url, RecordingEvents()).publish(reported)

    for calls in sizes.values():
        assert 23 == sum(count for count, _ in calls)
        assert all(count <= 10 and size <= 256_000 for count, size in calls)


# Rows that wait ------------------------------------------------------------------------------------------------


@given(
    attempts=st.integers(0, 3),
    snoozes=st.integers(0, 5),
    not_before=st.none() | st.integers(0, 10**13),
)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_a_row_that_waits_is_the_same_job_afterwards(
    attempts: int, snoozes: int, not_before: int | None
) -> None:
    job = a_job(
        custom_id="row-1",
        attempts_used=attempts,
        attempts=tuple(Attempt(number + 1, "claude-a", NOON) for number in range(attempts)),
        snoozes=snoozes,
        last_snooze=Snooze(NOON, "rate limited") if snoozes else None,
        not_before=not_before,
    )

    text = as_text(job)

    assert "\n" not in text
    assert job == of_text(text)


# Links ---------------------------------------------------------------------------------------------------------


def put(url: str, body: bytes) -> str:
    """PUT to a signed link, as anybody can; return the ETag."""
    answer = requests.put(url, data=body, timeout=10)
    assert 200 == answer.status_code
    return answer.headers["etag"]


def test_parts_are_uploaded_by_presigned_urls_and_become_an_object(cloud: Aws, name: str) -> None:
    links = s3.Links(cloud.s3, BUCKET, 60)
    upload = links.begin(name)
    where = links.links(name, upload, {1: 5 * MIB, 2: 3})
    etags = {1: put(where[1], b"x" * 5 * MIB), 2: put(where[2], b"end")}

    links.complete(name, upload, etags)
    links.complete(name, upload, etags)

    assert 5 * MIB + 3 == len(cloud.objects(name)[name])
    assert {"X-Amz-Signature", "partNumber"} <= set(parse_qs(urlsplit(where[1]).query))


def test_parts_that_make_no_object_are_the_callers_fault(cloud: Aws, name: str) -> None:
    links = s3.Links(cloud.s3, BUCKET, 60)
    upload = links.begin(name)

    with pytest.raises(InvalidRequest, match="parts: S3 returned InvalidPart"):
        links.complete(name, upload, {1: '"no such part"'})
    links.abort(name, upload)


@pytest.mark.usefixtures("cloud")
def test_an_upload_that_is_missing_is_done_when_its_object_is_there(name: str) -> None:
    """The emulated S3 does not know what to say here."""
    client = aws.s3()
    links = s3.Links(client, BUCKET, 60)
    with Stubber(client) as stub:
        stub.add_client_error("complete_multipart_upload", "NoSuchUpload", "missing")
        there = {
            "ContentLength": 1,
            "ETag": '"x"',
            "LastModified": datetime(2026, 7, 1, tzinfo=UTC),
        }
        stub.add_response("head_object", there)
        stub.add_client_error("complete_multipart_upload", "NoSuchUpload", "missing")
        stub.add_client_error("head_object", "404")
        stub.add_client_error("abort_multipart_upload", "NoSuchUpload")

        links.complete(name, "upload", {1: "x"})
        with pytest.raises(InvalidRequest, match="parts: S3 returned NoSuchUpload: missing"):
            links.complete(name, "upload", {1: "x"})
        links.abort(name, "upload")


def test_objects_are_deleted_together_also_those_that_are_not_there(cloud: Aws, name: str) -> None:
    store = s3.Objects(cloud.s3, BUCKET)
    keys = [f"{name}/{number}" for number in range(5)]
    for key in keys:
        store.put(key, b"x")

    store.delete([*keys[:3], f"{name}/none"])
    store.delete([*keys[:3], f"{name}/none"])

    assert keys[3:] == [each.key for each in store.listing(name)]


def test_results_are_read_by_a_link(cloud: Aws, name: str) -> None:
    store = s3.Objects(cloud.s3, BUCKET)
    store.put(name, b"results")

    assert b"results" == requests.get(store.link(name, 60), timeout=10).content
