"""Compare-and-swap: one write, and the bounded loop around it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from sluice.domain.errors import Stale, StoreBusy
from sluice.ports.swap import MOST_TRIES, Deleted, Kept, Written, change, insert, swap


@dataclass(frozen=True)
class Counter:
    """A record of nothing but a number."""

    number: int = 0
    version: int = 1


@dataclass
class Shelf:
    """A store of one counter; `meanwhile` is what other writers do just before each replace."""

    stored: Counter | None = None
    meanwhile: list[Callable[[], None]] = field(default_factory=list)
    writes: int = 0

    def add(self, counter: Counter) -> None:
        if self.stored is not None:
            raise Stale(self.stored)
        self.stored = counter

    def replace(self, counter: Counter, expected_version: int) -> None:
        self.writes += 1
        if self.meanwhile:
            self.meanwhile.pop(0)()
        if self.stored is None or self.stored.version != expected_version:
            raise Stale(self.stored)
        self.stored = counter

    def count(self, by: int = 100) -> None:
        """Count as another writer does."""
        assert self.stored is not None
        self.stored = counted(self.stored, by)

    def delete(self) -> None:
        self.stored = None


def counted(counter: Counter, by: int = 1) -> Counter:
    return replace(counter, number=counter.number + by, version=counter.version + 1)


def test_a_new_record_is_stored() -> None:
    shelf, new = Shelf(), Counter()

    assert insert(shelf.add, new) is new
    assert shelf.stored is new


def test_an_id_that_is_taken_returns_the_record_that_has_it() -> None:
    shelf = Shelf(Counter(number=7))

    assert Counter(number=7) == insert(shelf.add, Counter())


def test_an_equal_record_of_another_writer_is_distinguished_from_the_new_one() -> None:
    earlier, new = Counter(), Counter()

    assert insert(Shelf(earlier).add, new) is earlier


def test_a_swap_over_the_expected_version_is_written() -> None:
    shelf, wanted = Shelf(Counter()), Counter(number=1, version=2)

    assert swap(shelf.replace, wanted, 1) is wanted
    assert shelf.stored is wanted


def test_a_swap_over_another_version_returns_what_is_stored() -> None:
    shelf = Shelf(Counter(number=100, version=2))

    assert Counter(number=100, version=2) == swap(shelf.replace, Counter(1, 2), 1)
    assert Counter(number=100, version=2) == shelf.stored


def test_a_swap_of_a_deleted_record_returns_none() -> None:
    assert swap(Shelf().replace, Counter(1, 2), 1) is None


def test_a_write_whose_response_was_lost_equals_what_is_stored() -> None:
    """The store retried, and met the record that its own first try had written."""
    written, wanted = Counter(number=1, version=2), Counter(number=1, version=2)

    stored = swap(Shelf(written).replace, wanted, 1)

    assert stored == wanted
    assert stored is not wanted  # it may be another writer's as well


def test_a_change_is_written_once() -> None:
    shelf = Shelf(Counter())

    assert Written(Counter(1, 2)) == change(shelf.replace, Counter(), counted, "the counter")
    assert (Counter(1, 2), 1) == (shelf.stored, shelf.writes)


def test_a_change_starts_from_what_other_writers_stored() -> None:
    shelf = Shelf(Counter())
    shelf.meanwhile = [shelf.count, shelf.count]

    assert Written(Counter(201, 4)) == change(shelf.replace, Counter(), counted, "the counter")


def test_a_rule_that_returns_its_argument_writes_nothing() -> None:
    shelf = Shelf(Counter(number=9))

    assert Kept(Counter(9)) == change(shelf.replace, Counter(9), lambda same: same, "the counter")
    assert 0 == shelf.writes


def test_a_rule_may_keep_what_another_writer_stored() -> None:
    shelf = Shelf(Counter())
    shelf.meanwhile = [shelf.count]

    kept = change(
        shelf.replace,
        Counter(),
        lambda current: current if current.number else counted(current),
        "the counter",
    )

    assert Kept(Counter(100, 2)) == kept
    assert Counter(100, 2) == shelf.stored


def test_a_change_of_a_deleted_record_ends() -> None:
    shelf = Shelf(Counter())
    shelf.meanwhile = [shelf.delete]

    assert Deleted() == change(shelf.replace, Counter(), counted, "the counter")


def test_contention_that_does_not_end_is_an_error() -> None:
    shelf = Shelf(Counter())
    shelf.meanwhile = [shelf.count] * MOST_TRIES

    with pytest.raises(StoreBusy, match=r"^the counter, changed concurrently 10 times, is busy"):
        change(shelf.replace, Counter(), counted, "the counter")

    assert MOST_TRIES == shelf.writes


def test_the_last_try_counts() -> None:
    shelf = Shelf(Counter())
    shelf.meanwhile = [shelf.count] * (MOST_TRIES - 1)

    last = change(shelf.replace, Counter(), counted, "the counter")

    assert Written(Counter(901, 11)) == last
