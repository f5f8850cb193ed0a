"""The rules of an upstream batch: who may write, which requests are left out, when it is polled, canceled, given up."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice.domain import upstream_batches as rules
from sluice.domain.errors import LeaseLost, UpstreamBatchBusy
from sluice.domain.upstream_batches import Phase, RowId, Slice, UpstreamBatch
from tests.fakes import MINUTE, NOON

HOUR = 60 * MINUTE


def a_record(**facts: object) -> UpstreamBatch:
    made = UpstreamBatch(
        upstream_id="upstream_" + "0123456789abcdef" * 2,
        tenant="acme",
        slices=(Slice("msgbatch_1", 2, 5),),
        anthropic_version="2026-10-21",
        anthropic_beta=None,
        created_at=NOON,
        expires_at=NOON + 24 * HOUR,
        due_at=NOON,
    )
    return replace(made, **facts)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Shown:
    id: str
    requests: int | None
    created_at: int | None


# Ids -------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**5), st.integers(0, 200_000), st.integers(0, 10**12), st.integers(0, 20))
def test_a_custom_id_is_one_of_anthropics_and_names_its_row(
    member: int, number: int, offset: int, model: int
) -> None:
    name = RowId(member, number, offset, model)
    text = name.text(a_record().prefix)

    # Anthropic, batch processing: 1 to 64 characters of these.
    assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", text)
    assert name == rules.row_id(text, a_record().prefix)


@pytest.mark.parametrize(
    "text",
    [
        *("", "row-1", "456789abcdef", "456789abcdef-1-2-3", "456789abcdef-1-2-3-4-5"),
        *("456789abcdef-1-2-3-x", "456789abcdef-1-2-3-", "456789abcdef-01-2-3-4"),
        *("456789abcdef-1-2-3-²", "x-1-2-3-4", "456789abcdef-1-2-3-" + "9" * 30),
    ],
)
def test_any_other_text_names_none(text: str) -> None:
    assert rules.row_id(text, "456789abcdef") is None


def test_a_repeated_collector_finds_the_upstream_batch_of_the_first() -> None:
    first = Slice("msgbatch_1", 0, 10)

    assert rules.upstream_id_of(first, 3) == rules.upstream_id_of(Slice("msgbatch_1", 0, 20), 3)
    assert rules.upstream_id_of(first, 3) != rules.upstream_id_of(Slice("msgbatch_1", 10, 20), 3)
    assert rules.upstream_id_of(first, 3) != rules.upstream_id_of(Slice("msgbatch_2", 0, 10), 3)
    assert rules.upstream_id_of(first, 3) != rules.upstream_id_of(first, 4), "collected again"


def test_a_slice_has_its_ranges() -> None:
    part = Slice("msgbatch_1", 2, 5)

    assert [2, 3, 4] == list(part.numbers) == [each for each in range(10) if each in part]
    assert 3 == a_record().ranges


# The lease -------------------------------------------------------------------------------------------------------


def test_one_invocation_at_a_time_makes_steps() -> None:
    taken = rules.take(a_record(), "me", NOON)

    with pytest.raises(UpstreamBatchBusy) as busy:
        rules.take(taken, "another", NOON + 1)

    assert taken.lease_until == busy.value.until
    assert "another" == rules.take(taken, "another", taken.lease_until).owner
    assert "me" == rules.take(taken, "me", NOON + 1).owner


@pytest.mark.parametrize(
    "write",
    [
        lambda state: rules.keep(state, "another", NOON),
        lambda state: rules.give_back(state, "another", NOON),
        lambda state: rules.refused(state, "another"),
        lambda state: rules.accepted(state, "another", "msgbatch_up", NOON),
        lambda state: rules.ended(state, "another", NOON),
        lambda state: rules.done(state, "another"),
    ],
)
def test_only_the_owner_writes(write: object) -> None:
    with pytest.raises(LeaseLost):
        write(rules.take(a_record(), "me", NOON))  # type: ignore[operator]


def test_the_lease_lasts_as_long_as_a_create_may_take() -> None:
    sent = rules.sending(
        rules.take(a_record(), "me", NOON), "me", NOON, key_id="a", workspace="home"
    )

    with pytest.raises(UpstreamBatchBusy):
        rules.take(sent, "another", NOON + rules.SENT_WITHIN_MS - 1)


def test_one_whose_lease_ends_is_due() -> None:
    taken = rules.take(a_record(), "me", NOON)

    assert taken.lease_until == taken.due_at
    kept = rules.keep(taken, "me", NOON + 30_000, applied=7)
    assert (NOON + 30_000 + rules.LEASE_MS, 7) == (kept.due_at, kept.applied)
    assert 7 == rules.keep(kept, "me", NOON + 40_000).applied


# The number of requests ------------------------------------------------------------------------------------------


def test_requests_are_left_out_until_no_other_open_batch_has_as_many() -> None:
    state = a_record(requests=5, body_bytes=500, cuts=(400, 300, 200))

    assert state == rules.without_spares(state, {4, 6})
    left = rules.without_spares(state, {5, 4})
    assert (3, 300, (200,)) == (left.requests, left.body_bytes, left.cuts)
    assert state == rules.without_spares(state, {5, 4, 3, 2}), "better equal than empty"


def test_a_create_without_reply_is_looked_for_by_its_time_and_size() -> None:
    state = a_record(requests=5, sent_at=NOON)
    shown = [
        Shown("ours", 5, NOON + 30_000),
        Shown("unknown", None, None),
        Shown("smaller", 4, NOON),
        Shown("older", 5, NOON - 2 * MINUTE),
        Shown("newer", 5, NOON + 30 * MINUTE),
        Shown("known", 5, NOON),
    ]

    found = rules.candidates(state, shown, {"known"})

    assert ["ours", "unknown"] == [each.id for each in found]


# Time ------------------------------------------------------------------------------------------------------------


def test_polls_become_rare_and_frequent_again_near_the_rescue() -> None:
    state = a_record(phase=Phase.OPEN, accepted_at=NOON, rescue_at=NOON + 10 * HOUR)

    assert NOON + MINUTE == rules.next_poll(state, NOON)
    pause = [
        rules.next_poll(state, NOON + hours * HOUR) - (NOON + hours * HOUR) for hours in (1, 2, 5)
    ]
    assert [6 * MINUTE, 12 * MINUTE, 15 * MINUTE] == pause
    near = NOON + 9 * HOUR + 30 * MINUTE
    assert near + 2 * MINUTE == rules.next_poll(state, near)
    last = NOON + 10 * HOUR - 90_000
    assert NOON + 10 * HOUR == rules.next_poll(state, last)
    assert rules.next_poll(state, NOON + 10 * HOUR) > NOON + 10 * HOUR
    canceled = replace(state, canceled_at=near)
    assert near + MINUTE == rules.next_poll(canceled, near)
    assert NOON + 2 * HOUR + 12 * MINUTE == rules.next_poll(
        replace(state, rescue_at=None), NOON + 2 * HOUR
    )


def test_an_open_batch_is_canceled_once_when_it_does_not_end_or_nobody_wants_it() -> None:
    state = a_record(phase=Phase.OPEN, accepted_at=NOON)

    # Anthropic: what is unfinished after 24 hours expires, and the batch ends.
    assert rules.must_be_canceled(state, NOON + 24 * HOUR) is None
    assert "upstream has not ended it after a day" == rules.must_be_canceled(
        state, NOON + 25 * HOUR
    )
    unwanted = rules.ask_cancel(state, "its batch was canceled", NOON + 1)
    assert "its batch was canceled" == rules.must_be_canceled(unwanted, NOON + 1)
    assert unwanted == rules.ask_cancel(unwanted, "again", NOON + 2)
    taken = rules.take(unwanted, "me", NOON + 2)
    canceled = rules.canceled(taken, "me", NOON + 2, "late")
    assert (NOON + 2, "late") == (canceled.canceled_at, canceled.reason)
    assert rules.must_be_canceled(canceled, NOON + 26 * HOUR) is None
    assert canceled == rules.canceled(canceled, "me", NOON + 3, "late")
    done = a_record(phase=Phase.DONE)
    assert done == rules.ask_cancel(done, "late", NOON)
    assert rules.must_be_canceled(done, NOON + 9 * HOUR) is None


def test_a_batch_that_does_not_end_is_given_up_in_time() -> None:
    state = a_record(phase=Phase.OPEN, accepted_at=NOON)

    # Anthropic keeps results for 29 days after the create.
    assert not rules.is_given_up(state, NOON + 27 * 24 * HOUR)
    assert rules.is_given_up(state, NOON + 29 * 24 * HOUR)
    canceled = replace(state, canceled_at=NOON)
    assert not rules.is_given_up(canceled, NOON + 10 * MINUTE)
    assert rules.is_given_up(canceled, NOON + 15 * MINUTE)


def test_steps_are_tried_again_less_and_less_often() -> None:
    waits = [rules.retry_ms(tries) for tries in range(9)]

    assert sorted(waits) == waits
    assert (15_000, 10 * MINUTE) == (waits[0], waits[-1])


def test_after_a_batch_that_was_not_ours_the_search_goes_on() -> None:
    taken = rules.take(a_record(phase=Phase.SENDING), "me", NOON)
    found = rules.accepted(taken, "me", "msgbatch_up", NOON, is_confirmed=False)
    ended = rules.ended(found, "me", NOON + HOUR)

    again = rules.not_ours(ended, "me")

    assert (Phase.SENDING, None, True) == (again.phase, again.message_batch_id, again.is_confirmed)


def test_what_was_planned_last_is_on_record() -> None:
    taken = rules.take(a_record(), "me", NOON)

    revised = rules.revised(taken, "me", NOON + HOUR, "rescue from 13:00")

    assert (NOON + HOUR, "rescue from 13:00") == (revised.rescue_at, revised.reason)
    assert revised == rules.revised(revised, "me", NOON + HOUR, "rescue from 13:00")


def test_its_rows_are_due_at_their_first_deadline() -> None:
    assert NOON + 24 * HOUR == a_record().due
    assert NOON + HOUR == a_record(deadline=NOON + HOUR).due
    assert NOON + 24 * HOUR == a_record(deadline=NOON + 48 * HOUR).due
