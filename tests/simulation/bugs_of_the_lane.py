"""Deliberate bugs on the batch lane: how it is written by hand, and by those who have not thought of a crash."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

from sluice.bulk.lane_choice import LaneChoice
from sluice.bulk.plan import PlanBatch
from sluice.domain import upstream_batches as rules
from sluice.domain.batches import Batch
from sluice.domain.errors import StoreBusy
from sluice.domain.jobs import Job, JobError, give_up
from sluice.domain.pricing import PriceList
from sluice.domain.retries import Failure, GiveUp, Verdict, judge
from sluice.domain.upstream_batches import Phase, UpstreamBatch
from sluice.ports.swap import Deleted, change
from sluice.ports.upstream import ResultRow, Seen
from sluice.ports.upstream_records import Waiting
from sluice.upstream import advance, apply
from sluice.upstream.advance import _Bill, _Steps
from sluice.upstream.apply import ApplyResults, Given
from sluice.upstream.collect import Collect
from sluice.upstream.send import Send, Wait
from tests.fakes import MINUTE
from tests.simulation.bugs_of_limits import in_place_of, nothing
from tests.simulation.deliberate import Bug, instead

NEVER_MS: Final = 90 * 24 * 60 * MINUTE


def _send_again(self: Send, state: UpstreamBatch) -> UpstreamBatch | Wait:
    del state
    return self._write(lambda current: rules.not_found(current, self._owner))


def _take_the_first(self: Send, *facts: Any) -> UpstreamBatch | Wait:
    found: Sequence[Seen] = facts[-1]
    return self._accepted(found[0])


@contextmanager
def _believe_the_first() -> Iterator[None]:
    accepted: Callable[..., Any] = vars(Send)["_accepted"]

    def believed(self: Send, seen: Seen, *, is_confirmed: bool = True) -> Any:
        del is_confirmed
        return accepted(self, seen)

    with instead(Send, "_chosen", _take_the_first), instead(Send, "_accepted", believed):
        yield


@contextmanager
def _forget_the_intent() -> Iterator[None]:
    good = rules.sending

    def sending(state: UpstreamBatch, owner: str, now: int, **facts: Any) -> UpstreamBatch:
        intent = good(state, owner, now, **facts)
        return replace(intent, phase=Phase.READY, lease_until=now + rules.LEASE_MS)

    with instead(rules, "sending", sending):
        yield


@contextmanager
def _count_answers_twice() -> Iterator[None]:
    good: Callable[..., Any] = vars(ApplyResults)["_answered"]

    def answered(self: ApplyResults, job: Job, result: ResultRow, at: int) -> Any:
        after = good(self, job, result, at)
        return replace(after, cost_micro_usd=2 * (after.cost_micro_usd or 0))

    with instead(ApplyResults, "_answered", answered):
        yield


@contextmanager
def _end_rows_without_a_result() -> Iterator[None]:
    good: Callable[..., Any] = vars(ApplyResults)["_after"]

    def after(self: ApplyResults, job: Job, result: ResultRow, at: int) -> Any:
        if result.failure is None and not result.message:
            return give_up(job, self._owner, at, error=JobError("expired", "no result"))
        return good(self, job, result, at)

    with instead(ApplyResults, "_after", after):
        yield


def _judged_for_good(failure: Failure, **facts: Any) -> Verdict:
    return replace(judge(failure, **facts), outcome=GiveUp())


def _kept(state: UpstreamBatch, *_: object) -> UpstreamBatch:
    return state


@contextmanager
def _ignore_a_busy_ledger() -> Iterator[None]:
    good = _Bill.book

    def book(self: _Bill) -> None:
        try:
            good(self)
        except StoreBusy:
            return

    with instead(_Bill, "book", book):
        yield


@contextmanager
def _book_again() -> Iterator[None]:
    good: Callable[..., Any] = vars(_Bill)["_row"]

    def row(self: _Bill, name: str, *facts: Any) -> Any:
        return good(self, f"{name}-{self._state.version}", *facts)

    with instead(_Bill, "_row", row):
        yield


@contextmanager
def _mix_tenants() -> Iterator[None]:
    good: Callable[..., Any] = vars(Collect)["_of_group"]

    def of_group(self: Collect, members: Sequence[tuple[Waiting, Batch]]) -> Any:
        waiting = self._records.waiting(1_000)
        known = [(each, self._known(each)) for each in waiting]
        return good(self, [(each, batch) for each, batch in known if batch] or members)

    with instead(Collect, "_of_group", of_group):
        yield


def _poll_no_more(self: _Steps, reason: str) -> Wait:
    return Wait(self._tools.clock.now() + NEVER_MS, reason)


def _run_all(self: ApplyResults, *_: object) -> Given:
    del self
    return Given.GOES_ON


@contextmanager
def _pay_the_full_price() -> Iterator[None]:
    good: Callable[..., Any] = PriceList.bill_micro_usd

    def bill(self: PriceList, *facts: Any, batch: bool = False) -> Any:
        del batch
        return good(self, *facts)

    with instead(PriceList, "bill_micro_usd", bill):
        yield


@contextmanager
def _not_lost() -> Iterator[None]:
    """Let the steps of an upstream batch write its record without its lease."""

    def write(self: _Steps, rule: Callable[[UpstreamBatch], UpstreamBatch]) -> UpstreamBatch:
        result = change(self._tools.records.replace, self._state, rule, self._state.upstream_id)
        assert not isinstance(result, Deleted)
        self._state = result.record
        return self._state

    with instead(_Steps, "_write", write):
        yield


@contextmanager
def _steal_the_lease() -> Iterator[None]:
    good = rules.take

    def take(state: UpstreamBatch, owner: str, now: int) -> UpstreamBatch:
        return good(replace(state, lease_until=0), owner, now)

    with instead(rules, "take", take), instead(rules, "_owned", nothing), _not_lost():
        yield


@contextmanager
def _forget_who_collected() -> Iterator[None]:
    good: Callable[..., Any] = vars(Collect)["_make"]

    def make(self: Collect, pack: Any, current: dict[str, Batch]) -> Any:
        return good(self, pack, {each.batch_id: each for each, _ in pack.slices} | dict(current))

    def unrepaired(self: Collect, batch: Batch) -> Batch:
        del self
        return batch

    with instead(Collect, "_make", make), instead(Collect, "_repaired", unrepaired):
        yield


def _confirmed(state: UpstreamBatch, owner: str) -> UpstreamBatch:
    """Treat a batch of somebody else as if it had no result of ours."""
    return rules.ended(replace(state, is_confirmed=True), owner, state.ended_at or 0)


BUGS_OF_THE_LANE: Final[Mapping[str, Bug]] = {
    "send_again_at_once": Bug(
        "a create whose reply was lost is sent again without looking for its batch",
        in_place_of(Send, "look_for", _send_again),
    ),
    "adopt_the_first": Bug(
        "the first batch of the right size is taken for that of a lost reply, whatever its ids",
        _believe_the_first,
    ),
    "forget_the_intent": Bug(
        "nothing is on record of a create before it is sent", _forget_the_intent
    ),
    "count_answers_twice": Bug(
        "the sums of a batch have each answer of a Message Batch twice", _count_answers_twice
    ),
    "end_rows_without_a_result": Bug(
        "rows that are canceled or expire in a Message Batch end with an error",
        _end_rows_without_a_result,
    ),
    "take_every_error_for_final": Bug(
        "a row that was overloaded in its Message Batch is not tried again",
        in_place_of(apply, "judge", _judged_for_good),
    ),
    "run_rows_meanwhile": Bug(
        "rows run live while they are in a Message Batch",
        in_place_of(PlanBatch, "_on_batch_lane", lambda *_: []),
    ),
    "never_cancel_late_batches": Bug(
        "a Message Batch that is late is waited for",
        in_place_of(LaneChoice, "revise", lambda *_: None),
    ),
    "ignore_cancels_of_owners": Bug(
        "a Message Batch goes on although all of its owners gave up",
        in_place_of(rules, "ask_cancel", _kept),
    ),
    "ignore_a_busy_ledger": Bug(
        "the ranges of a Message Batch go on although the ledger did not take its bill",
        _ignore_a_busy_ledger,
    ),
    "book_again": Bug("a Message Batch whose results are read again is booked again", _book_again),
    "forget_unread_requests": Bug(
        "requests whose results could not be read are on no record",
        in_place_of(_Bill, "book_unread", nothing),
    ),
    "mix_tenants": Bug("batches of several tenants share a Message Batch", _mix_tenants),
    "take_a_short_result_for_whole": Bug(
        "results that end early are taken for all of them", in_place_of(advance, "MOST_SHORT", 0)
    ),
    "give_results_up_at_once": Bug(
        "results that cannot be read for once are taken for none",
        in_place_of(advance, "MOST_UNREAD", 0),
    ),
    "poll_no_more": Bug(
        "a poll that failed is the last one", in_place_of(_Steps, "_unseen", _poll_no_more)
    ),
    "run_all_again": Bug(
        "the ranges of a Message Batch go on without its results",
        in_place_of(ApplyResults, "__call__", _run_all),
    ),
    "pay_the_full_price": Bug(
        "answers of a Message Batch are booked at the live price", _pay_the_full_price
    ),
    "steal_the_lease": Bug(
        "two invocations make the steps of one upstream batch at once", _steal_the_lease
    ),
    "leave_half_collected": Bug(
        "what a collector that died has left is not repaired", _forget_who_collected
    ),
    "believe_in_a_stranger": Bug(
        "the results of somebody else's batch end the search for ours",
        in_place_of(rules, "not_ours", _confirmed),
    ),
}
