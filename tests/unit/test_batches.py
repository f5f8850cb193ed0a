"""A batch's arithmetic: every byte belongs to one range, every line to one of them, every part is large enough."""

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.domain.batches import (
    FEW_LATE,
    LATE_MS,
    LOSSES_UNTIL_ALONE,
    MOST_COPY_BYTES,
    MOST_LOST_ALONE,
    MOST_LOST_READING,
    MOST_RANGE_BYTES,
    MOST_RANGES,
    NOTIFY_MS,
    QUIET_MS,
    RANGES_PER_SECTION,
    SAMPLE_BYTES,
    SAMPLES,
    WATCH_MS,
    Batch,
    Copied,
    Options,
    Phase,
    Plan,
    RangeState,
    Source,
    Streamed,
    Tally,
    cancel_batch,
    claim_range,
    delete_batch,
    end_batch,
    end_window,
    fail_batch,
    file_batch_id,
    finish_range,
    is_held,
    is_over,
    keep_range,
    killers,
    late_ms,
    lost_ranges,
    mark_notified,
    mark_sent,
    moved_by_id,
    named_batch_id,
    note_reading,
    note_running,
    older_file_batch_id,
    parts,
    plan_batch,
    planned,
    prefix_of_upload,
    random_batch_id,
    release_range,
    row_job_id,
    sample_places,
    save_chunk,
    start_batch,
    unreadable,
    upload_prefix,
    usual_rows,
)
from sluice.domain.errors import LeaseLost, RangeBusy
from sluice.domain.rows import lines

NOON = 1_795_176_000_000


def a_batch(**facts: object) -> Batch:
    return Batch(
        **{
            "batch_id": "msgbatch_1",
            "tenant": "acme",
            "name": "first",
            "source": Source.FILE,
            "created_at": NOON,
            "expires_at": NOON + 1000,
            "input_key": "in/acme/first.jsonl",
            "input_etag": "etag",
        }
        | facts  # type: ignore[arg-type]
    )


# Planning --------------------------------------------------------------------------------------------------


def test_a_range_is_about_a_hundred_lines() -> None:
    plan = planned(5_000_000_000, b"x" * 499 + b"\n" + b"y" * 499 + b"\n" + b"z" * 17)

    assert (500, 50_000, 100_000, 1_000) == (
        plan.line_bytes,
        plan.range_bytes,
        plan.ranges,
        plan.sections,
    )
    assert 10_000_000 == plan.estimated_rows


@pytest.mark.parametrize(
    ("lines", "ranges"), [(250, 3), (10_000, 100), (20_000, 100), (40_000, 100), (400_000, 1_000)]
)
def test_on_the_batch_lane_ranges_are_longer_if_there_are_a_hundred(
    lines: int, ranges: int
) -> None:
    line = b"x" * 99 + b"\n"

    plan = planned(lines * 100, line * 600, lane="batch")

    assert ranges == plan.ranges


def test_each_byte_is_in_the_range_whose_bounds_it_is_between() -> None:
    plan = Plan(first=3, size=100, range_bytes=7, ranges=14, line_bytes=1)

    for number in range(plan.ranges):
        start, end = plan.bounds(number)
        assert {number} == {plan.range_at(offset) for offset in range(start, end)}


def test_a_byte_order_mark_belongs_to_no_range() -> None:
    plan = planned(3 + 4, b"\xef\xbb\xbfabc\n")

    assert (3, 7) == plan.bounds(0)
    assert 1 == plan.ranges


@pytest.mark.parametrize(
    ("lines", "ranges"),
    [(1, [1]), (99, [99]), (149, [149]), (150, [100, 50]), (249, [125, 124]), (700, [100] * 7)],
)
def test_the_last_lines_are_no_range_of_their_own(lines: int, ranges: list[int]) -> None:
    """It would wait for the end of the others, and run alone."""
    body = b"xxxxxxxxx\n" * lines

    plan = planned(len(body), body)

    bounds = [plan.bounds(number) for number in range(plan.ranges)]
    assert ranges == [-(-end // 10) - -(-start // 10) for start, end in bounds]


@pytest.mark.parametrize("sample", [b"", b"\xef\xbb\xbf"])
def test_an_empty_object_has_no_range(sample: bytes) -> None:
    assert 0 == planned(len(sample), sample).ranges


def test_lines_longer_than_the_sample_still_make_ranges_that_fit_into_memory() -> None:
    plan = planned(10**9, b"x" * 65_536)

    assert 6_553_600 == plan.range_bytes
    assert MOST_RANGE_BYTES == planned(10**9, b"x" * 500_000 + b"\n").range_bytes


def test_a_first_line_longer_than_a_sample_does_not_decide_how_long_lines_are() -> None:
    head, others = b"x" * 65_536, [b"y" * 99 + b"\n"] * 655
    plan = planned(10**7, head, *[b"".join(others)] * 7)

    assert 100 <= plan.line_bytes <= 120


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, 10**6, 10**12])
def test_samples_are_of_the_start_of_the_end_and_of_places_between_them(size: int) -> None:
    places = sample_places(size)

    assert 1 <= len(places) <= SAMPLES
    assert [0, max(0, size - SAMPLE_BYTES)] == [places[0], places[-1]]
    assert places == sorted(set(places))


def test_a_stretch_of_blank_lines_does_not_make_a_file_look_too_long() -> None:
    lines, blank = (b"y" * 999 + b"\n") * 65, b"\n" * SAMPLE_BYTES

    assert 1_000_000 == usual_rows(10**9, [lines] * 7 + [blank])
    assert 10**9 == usual_rows(10**9, [blank] * 7 + [lines])
    assert 0 == usual_rows(0, [b""])


def test_an_enormous_object_has_longer_ranges_and_not_more() -> None:
    plan = planned(10**12, b"x\n")

    assert plan.ranges <= MOST_RANGES


def test_ranges_of_a_section_stand_in_a_row() -> None:
    plan = Plan(first=0, size=1_050, range_bytes=5, ranges=210, line_bytes=1)

    assert 3 == plan.sections
    assert range(200, 210) == plan.members(2)
    assert 2 == plan.section_of(205)
    assert RANGES_PER_SECTION == len(plan.members(0))


LINE = st.binary(max_size=12).map(lambda text: text.replace(b"\n", b"~"))


@given(
    texts=st.lists(LINE, max_size=30),
    ends=st.booleans(),
    bom=st.booleans(),
    range_bytes=st.integers(1, 40),
    piece=st.integers(1, 9),
)
def test_each_line_is_read_whole_by_the_range_in_which_it_begins(
    *, texts: list[bytes], ends: bool, bom: bool, range_bytes: int, piece: int
) -> None:
    head = b"\xef\xbb\xbf" if bom else b""
    data = head + b"\n".join(texts) + (b"\n" if ends and texts else b"")
    first, size = len(head), len(data)
    ranges = -(-(size - first) // range_bytes)
    plan = Plan(first, size, range_bytes, ranges, 1)

    found = []
    for number in range(ranges):
        start, end = plan.bounds(number)
        base = max(first, start - 1)
        read = (data[at : at + piece] for at in range(base, size, piece))
        mine = list(lines(read, start, end, first))
        assert all(start <= line.offset < end for line in mine)
        assert list(range(len(mine))) == [line.number for line in mine]
        found += [(line.offset, line.text) for line in mine]

    expected = []
    offset = first
    pieces = data[first:].split(b"\n")
    for text in pieces if pieces[-1] else pieces[:-1]:
        expected.append((offset, text.removesuffix(b"\r")))
        offset += len(text) + 1
    assert expected == found


# Parts of the results --------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 60), max_size=30), st.integers(1, 25))
def test_parts_hold_every_byte_once_in_order_and_none_but_the_last_is_small(
    sizes: list[int], least: int
) -> None:
    by_section = dict(enumerate(sizes))

    made = list(parts(by_section, least))

    reported = [
        each for part in made for each in (part.slices if isinstance(part, Streamed) else [part])
    ]
    whole = [(n, at) for n, size in by_section.items() for at in range(size)]
    assert whole == [(s.section, at) for s in reported for at in range(s.first, s.first + s.size)]
    lengths = [
        sum(each.size for each in part.slices) if isinstance(part, Streamed) else part.size
        for part in made
    ]
    assert all(length >= least for length in lengths[:-1])
    assert all(
        length < 2 * least
        for part, length in zip(made, lengths, strict=True)
        if isinstance(part, Streamed)
    )


def test_a_section_above_what_s3_copies_at_once_is_copied_in_pieces() -> None:
    size = MOST_COPY_BYTES + 1

    made = list(parts({0: size}, 5))

    half = size // 2 + 1
    assert [Copied(0, 0, half), Copied(0, half, size - half)] == made


# The batch's life ------------------------------------------------------------------------------------------


def test_a_batch_goes_from_planning_to_running_to_ended() -> None:
    plan = planned(10, b"a\n")
    batch = plan_batch(a_batch(), plan)
    running = start_batch(batch, NOON + 3)
    ended = end_batch(running, NOON + 5, Tally(succeeded=3), 1, 77)

    assert (Phase.PLANNING, plan, 2) == (batch.phase, batch.plan, batch.version)
    assert Phase.RUNNING == running.phase
    assert NOON + 3 + WATCH_MS == running.due_at
    assert (Phase.ENDED, NOON + 5 + NOTIFY_MS, NOON + 5, 1, 77) == (
        ended.phase,
        ended.due_at,
        ended.ended_at,
        ended.duplicates,
        ended.results_bytes,
    )
    assert ended is start_batch(ended, NOON)
    reported = mark_notified(ended)
    assert (True, None) == (reported.told, reported.due_at)


def test_a_batch_is_over_once_it_is_canceled_or_has_expired() -> None:
    canceled = cancel_batch(a_batch(), NOON + 1)

    assert [False, True] == [is_over(a_batch(), at) for at in (NOON + 999, NOON + 1000)]
    assert is_over(canceled, NOON + 1)
    assert NOON + 1 + NOTIFY_MS == canceled.due_at


def test_messages_that_were_sent_again_are_noted_until_the_batch_ends() -> None:
    ended = end_batch(a_batch(), NOON, Tally(), 0, 0)

    assert NOON + 3 == start_batch(a_batch(), NOON + 3).sent_at
    assert NOON + 5 == mark_sent(a_batch(), NOON + 5).sent_at
    assert ended is mark_sent(ended, NOON + 5)


def test_how_many_rows_there_are_is_estimated_until_the_end() -> None:
    batch = a_batch()

    assert 0 == batch.rows_expected
    assert 5 == plan_batch(batch, planned(10, b"a\n")).rows_expected
    assert 9 == a_batch(rows=9).rows_expected
    assert 7 == end_batch(batch, NOON, Tally(succeeded=3, errored=4), 0, 0).rows_expected


def test_a_cancel_is_noted_once_and_only_while_the_batch_goes_on() -> None:
    canceled = cancel_batch(a_batch(), NOON + 1)

    assert NOON + 1 == canceled.cancel_initiated_at
    assert canceled is cancel_batch(canceled, NOON + 2)
    ended = end_batch(a_batch(), NOON, Tally(), 0, 0)
    assert ended is cancel_batch(ended, NOON)


def test_a_batch_that_cannot_be_run_says_why() -> None:
    failed = fail_batch(a_batch(), NOON, "the file is empty")

    assert (Phase.ENDED, "the file is empty", 1) == (
        failed.phase,
        failed.problem,
        failed.tally.invalid,
    )
    assert delete_batch(failed).deleted


def test_ids_are_those_of_a_repeat() -> None:
    first = file_batch_id("acme", "in/acme/x.jsonl", "etag", Options(), None)

    assert first == file_batch_id("acme", "in/acme/x.jsonl", "etag", Options(), None)
    assert first != file_batch_id("acme", "in/acme/x.jsonl", "etag", Options(run="again"), None)
    assert first != file_batch_id("acme", "in/acme/x.jsonl", "etag", Options(), "bad options")
    assert first != older_file_batch_id("acme", "in/acme/x.jsonl", "etag", None)
    assert first != named_batch_id("acme", "in/acme/x.jsonl")
    assert "msgbatch_" + "01" * 16 == random_batch_id(b"\x01" * 16)
    assert row_job_id(first, 0) != row_job_id(first, 1)


def test_ids_of_an_older_release_are_known() -> None:
    """As releases before those with options in the id computed it."""
    text = "file\x00acme\x00in/acme/x.jsonl\x00etag\x00again"

    assert f"msgbatch_{hashlib.sha256(text.encode()).hexdigest()[:32]}" == older_file_batch_id(
        "acme", "in/acme/x.jsonl", "etag", "again"
    )


def test_an_upload_has_a_place_of_its_own() -> None:
    prefix = upload_prefix("acme", "00ff")

    assert prefix == prefix_of_upload(f"{prefix}2026/january.jsonl")
    for other in ("in/acme/.uploads/x.jsonl", "in/acme/a/.uploads/00ff/x.jsonl", "batches/x"):
        assert prefix_of_upload(other) is None


def test_everything_of_a_batch_is_stored_under_its_id() -> None:
    batch = a_batch(name="2026/january", source=Source.FILE)
    ended = end_batch(batch, NOON, Tally(), 0, 0)
    of_an_older_release = replace(ended, by_id=False)

    assert "batches/msgbatch_1/" == batch.folder == ended.folder
    assert "batches/msgbatch_1/results.jsonl" == ended.results_key
    assert "batches/msgbatch_1/errors.jsonl" == ended.errors_key
    assert "batches/msgbatch_1/summary.json" == ended.summary_key
    assert "out/acme/2026/january/" == batch.named_folder == of_an_older_release.folder
    assert ended.folder == moved_by_id(of_an_older_release).folder
    assert moved_by_id(ended) is ended
    assert {
        "batches/msgbatch_1/results.jsonl.gz",
        "batches/msgbatch_1/parts/00000007",
        "batches/msgbatch_1/chunks/00000007/1-2",
        "batches/msgbatch_1/sections/000003.index",
    } == {
        batch.packed_key,
        batch.part_key(7),
        batch.chunk_key(7, "1-2"),
        batch.section_key(3, "index"),
    }


def test_the_results_of_files_are_copied_unless_s3_could_not_name_the_copies() -> None:
    room = 1_024 - len("out/acme//results.jsonl")
    names = ("x" * room, "x" * (room + 1), "ü" * (room // 2), "ü" * (room // 2 + 1))

    assert [True, False, True, False] == [
        a_batch(name=name, source=Source.FILE).has_copy for name in names
    ]
    assert not a_batch(source=Source.JOBS).has_copy


@pytest.mark.parametrize(
    ("file", "has_offsets"),
    [("x.jsonl", True), ("x.jsonl.gz", True), ("x.CSV.gz", False), ("docs/options.json", False)],
)
def test_rows_have_the_offsets_of_a_file_that_has_lines(file: str, *, has_offsets: bool) -> None:
    batch = a_batch(input_key="batches/msgbatch_1/rows.jsonl", given_key=f"in/acme/{file}")

    assert has_offsets == batch.has_offsets
    assert (batch.rows_key, "batches/msgbatch_1/documents.jsonl") == (
        batch.input_key,
        batch.documents_key,
    )


def test_a_later_batch_has_a_greater_rank() -> None:
    first = a_batch()

    assert first.rank < replace(first, batch_id="msgbatch_2").rank
    assert first.rank < replace(first, batch_id="msgbatch_0", created_at=first.created_at + 1).rank


def test_sums_are_exact_and_say_no_zeros() -> None:
    total = Tally(succeeded=2, cost_micro_usd=5) + Tally(succeeded=1, expired=1)

    assert {"succeeded": 3, "expired": 1, "cost_micro_usd": 5} == total.as_dict()
    assert 4 == total.rows


# Ranges ----------------------------------------------------------------------------------------------------


def a_range(**facts: object) -> RangeState:
    return replace(RangeState("msgbatch_1", 7, "acme"), **facts)  # type: ignore[arg-type]


def test_a_range_is_claimed_by_one_worker_at_a_time() -> None:
    claimed = claim_range(a_range(), "one", NOON, NOON + 60)

    assert ("one", 1, 1, 0) == (claimed.owner, claimed.version, claimed.claims, claimed.losses)
    with pytest.raises(RangeBusy) as busy:
        claim_range(claimed, "two", NOON + 59, NOON + 100)
    assert NOON + 60 == busy.value.until


def lost_with(state: RangeState, *running: int) -> RangeState:
    """Return the range after the loss of a worker that had these rows in flight, claimed again."""
    noted = note_running(state, str(state.owner), running)
    return claim_range(noted, f"after-{noted.version}", NOON, 0)


def test_each_loss_narrows_the_search_for_a_killer() -> None:
    state = claim_range(a_range(), "one", NOON, 0)
    found = []
    for running in ((), (10, 20, 30), (20, 30), (20,)):
        state = lost_with(state, *running)
        found.append((state.losses, state.suspects, state.blamed))

    assert [
        (1, (), ()),
        (2, (10, 20, 30), ()),
        (3, (20, 30), ()),
        (3, (30,), (20,)),
    ] == found
    assert () == state.running
    saved = save_chunk(state, str(state.owner), NOON + 99, "5-1", rows=[30])
    assert (0, (), (20,), ("5-1",)) == (saved.losses, saved.suspects, saved.blamed, saved.chunks)


def test_a_row_ends_errored_after_three_losses_alone() -> None:
    state = claim_range(a_range(losses=3), "one", NOON, 0)
    for _ in range(MOST_LOST_ALONE):
        assert not killers(state)
        state = lost_with(state, 20)

    assert {20} == killers(state)
    ended = save_chunk(state, str(state.owner), NOON + 99, "5-1", rows=[20])
    assert not killers(ended)


def test_a_row_that_is_alone_by_chance_is_not_blamed_before_the_search_has_narrowed() -> None:
    state = claim_range(a_range(), "one", NOON, 0)
    for _ in range(LOSSES_UNTIL_ALONE):
        state = lost_with(state, 20)

    assert (3, (20,), ()) == (state.losses, state.suspects, state.blamed)


def test_a_worker_that_dies_with_no_row_in_flight_blames_none() -> None:
    state = a_range(owner="one", losses=3, suspects=(20, 30), blamed=(10,))

    after = lost_with(state)

    assert (3, (20, 30), (10,)) == (after.losses, after.suspects, after.blamed)


def test_a_line_that_kills_its_readers_is_found_and_left_out() -> None:
    """No row is in flight when a worker dies of a line that it reads."""
    state = claim_range(a_range(), "first", NOON, 0)
    first = claim_range(state, "second", NOON, 0)
    assert not first.is_stuck
    state = claim_range(first, "third", NOON, 0)
    assert state.is_stuck
    for number in range(MOST_LOST_READING):
        assert frozenset() == unreadable(state)
        state = note_reading(state, str(state.owner), 50)
        assert state is note_reading(state, str(state.owner), 50)
        state = claim_range(state, f"reader-{number}", NOON, 0)

    assert {50} == unreadable(state)
    assert (None, ()) == (state.reading, state.blamed)


def test_a_line_is_not_blamed_once_its_window_is_read() -> None:
    stuck = claim_range(a_range(is_stuck=True, losses=1), "one", NOON, 0)
    read = note_reading(note_reading(stuck, "one", 50), "one", None)

    assert () == claim_range(note_running(read, "one", (70,)), "two", NOON, 0).unread
    released = release_range(note_reading(stuck, "one", 50), "one", chunks=())
    assert () == claim_range(released, "two", NOON, 0).unread


def test_a_search_goes_on_after_a_worker_that_gave_the_range_back() -> None:
    state = a_range(owner="one", losses=2, running=(20,), suspects=(20, 30), blamed=(10,))

    again = claim_range(release_range(state, "one", chunks=()), "two", NOON, 0)

    assert (2, (), (20, 30), (10,)) == (
        again.losses,
        again.running,
        again.suspects,
        again.blamed,
    )


def test_a_released_range_is_anybodys_and_no_loss() -> None:
    state = claim_range(a_range(), "one", NOON, NOON + 60)
    kept = keep_range(state, "one", NOON + 90)
    released = release_range(kept, "one", chunks=["1-1"], not_before=NOON + 5, model="claude-a")
    again = claim_range(released, "two", NOON + 1, NOON + 61)

    assert NOON + 90 == kept.lease_until
    assert (None, ("1-1",), NOON + 5, "claude-a") == (
        released.owner,
        released.chunks,
        released.not_before,
        released.model,
    )
    assert (2, 0, None, None) == (again.claims, again.losses, again.not_before, again.model)


def test_a_message_is_late_from_when_it_was_last_expected() -> None:
    batch = a_batch(sent_at=NOON + 10)
    claimed = claim_range(a_range(), "one", NOON, NOON + 60)
    released = release_range(claimed, "one", chunks=(), expected_at=NOON + 90)

    assert [True, False] == [is_held(claimed, NOON + at) for at in (59, 60)]
    assert [90, 40, 10, 0] == [
        late_ms(batch, a_range(), NOON + 100),
        late_ms(batch, claimed, NOON + 100),
        late_ms(batch, released, NOON + 100),
        late_ms(batch, released, NOON + 80),
    ]
    assert 100 == late_ms(a_batch(), a_range(), NOON + 100)


def test_messages_are_lost_when_they_are_late_and_none_waits() -> None:
    late = {1: LATE_MS, 2: LATE_MS - 1}

    assert [1] == lost_ranges(a_batch(sent_at=NOON), late, is_queue_empty=True)
    assert [1] == lost_ranges(a_batch(sent_at=NOON), late, is_queue_empty=False)


@pytest.mark.parametrize(
    ("count", "sent_after_ms", "first_ms"),
    [
        (FEW_LATE, 0, LATE_MS),
        (FEW_LATE, 2 * LATE_MS, 2 * LATE_MS),
        (FEW_LATE + 1, 0, QUIET_MS),
        (FEW_LATE + 1, 2 * QUIET_MS, 2 * QUIET_MS),
    ],
)
def test_in_a_long_queue_many_messages_are_lost_only_after_hours(
    count: int, sent_after_ms: int, first_ms: int
) -> None:
    """And again after twice the time."""
    batch = a_batch(sent_at=NOON + sent_after_ms)

    found = [
        lost_ranges(batch, dict.fromkeys(range(count), ms), is_queue_empty=False)
        for ms in (first_ms - 1, first_ms)
    ]

    assert [[], list(range(count))] == found


def test_dropped_answers_are_remembered_until_something_is_saved() -> None:
    claimed = claim_range(a_range(), "one", NOON, NOON + 60)
    dropped = release_range(claimed, "one", chunks=(), dropped=True)
    again = claim_range(dropped, "two", NOON, NOON + 60)

    assert again.dropped
    assert not save_chunk(again, "two", NOON, "2-1", ()).dropped


def test_calls_of_rows_that_wait_are_remembered_until_the_rows_are_saved() -> None:
    """Unlike those of rows in flight they have all ended, and no row is suspected because of them."""
    claimed = claim_range(a_range(), "one", NOON, NOON + 60)
    noted = note_running(claimed, "one", rows=[5], called=[7, 9])

    again = claim_range(noted, "two", NOON + 60, NOON + 120)
    saved = save_chunk(again, "two", NOON + 120, "2-1", rows=[7])

    assert (((5, 1, NOON + 60),), ()) == (again.lost, again.called)
    assert ((7, 1, NOON + 60), (9, 1, NOON + 60)) == again.unsaved
    assert ((9, 1, NOON + 60),) == saved.unsaved


@pytest.mark.parametrize(("dropped", "lost"), [(False, []), (True, [5])])
def test_calls_of_rows_that_wait_are_remembered_when_a_range_is_released(
    dropped: bool,  # noqa: FBT001 - a parameter of the test
    lost: list[int],
) -> None:
    claimed = claim_range(a_range(), "one", NOON, NOON + 60)
    noted = note_running(claimed, "one", rows=[5, 7])

    released = release_range(noted, "one", chunks=(), dropped=dropped, called=[7])

    assert ((7, 1, NOON + 60),) == released.unsaved
    assert lost == [row for row, *_ in released.lost]


def test_a_window_that_has_ended_takes_the_place_of_its_chunks() -> None:
    state = a_range(owner="one", chunks=("w1", "1-2", "1-3"), windows=1, losses=2)
    state = replace(state, running=(1,), suspects=(1, 2), blamed=(3,))

    ended = end_window(state, "one", NOON + 60, "w2", others=["1-3"], resume_at=700, resume_line=7)

    assert (("w1", "w2", "1-3"), 2, 700, 7, 0) == (
        ended.chunks,
        ended.windows,
        ended.resume_at,
        ended.resume_line,
        ended.losses,
    )
    assert ((), (), ()) == (ended.running, ended.suspects, ended.blamed)
    with pytest.raises(LeaseLost):
        end_window(state, "two", NOON, "w2", others=(), resume_at=1, resume_line=1)


def test_only_the_owner_writes() -> None:
    state = claim_range(a_range(), "one", NOON, NOON + 60)

    with pytest.raises(LeaseLost):
        keep_range(state, "two", NOON)
    with pytest.raises(LeaseLost):
        save_chunk(state, "two", NOON, "x", rows=())
    with pytest.raises(LeaseLost):
        note_running(state, "two", [7])
    with pytest.raises(LeaseLost):
        release_range(state, "two", chunks=())
    with pytest.raises(LeaseLost):
        finish_range(state, "two")
    done = finish_range(save_chunk(state, "one", NOON, "1-1", rows=()), "one")
    assert (True, None, ()) == (done.done, done.owner, done.chunks)


def test_options_are_empty_unless_given() -> None:
    assert Options() == a_batch().options
