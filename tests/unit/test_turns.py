"""Work is taken in turns, so that a large backlog of one owner delays nobody else."""

from sluice.domain.turns import EarlyStarts, Shares, group_of_range, in_turns


def first(item: str) -> str:
    return item[0]


def second(item: str) -> str:
    return item[1]


def test_owners_take_turns_and_each_keeps_its_order() -> None:
    assert ["a1", "b1", "a2", "b2", "a3"] == in_turns(["a1", "a2", "a3", "b1", "b2"], first)


def test_one_owner_or_none_changes_nothing() -> None:
    items = ["c3", "c1", "c2"]

    assert items == in_turns(items, first) == in_turns(items)
    assert [] == in_turns([], first)


def test_what_belongs_to_an_owner_takes_turns_within_it() -> None:
    """Tenant a has the batches x and y: both together have as many turns as the one batch of tenant b."""
    waiting = ["ax1", "ax2", "ax3", "ay1", "bz1", "bz2"]

    assert ["ax1", "bz1", "ay1", "bz2", "ax2", "ax3"] == in_turns(waiting, first, second)


def test_each_owner_has_its_share_of_what_is_read() -> None:
    shares = Shares(first, 2)

    for item in ["a1", "a2", "a2", "a3", "b1", "a4"]:
        shares.add(item)

    assert ["a1", "a2", "b1"] == list(shares.items)


def test_the_first_ranges_of_a_batch_do_not_wait_behind_the_many_of_their_tenant() -> None:
    first = {group_of_range("acme", f"msgbatch_{n}", 4, 51) for n in range(100)}
    later = {group_of_range("acme", f"msgbatch_{n}", 5, 51) for n in range(100)}

    assert {"acme/0", "acme/1", "acme/2", "acme/3"} == first, "few: see SLOTS"
    assert {"acme"} == later
    assert 1 == len({group_of_range("acme", "msgbatch_1", n, 50) for n in range(50)})


def test_an_owner_has_some_early_starts_and_gets_them_back_slowly() -> None:
    early = EarlyStarts()

    assert [True] * 30 + [False] * 2 == [early.take("large", 0) for _ in range(32)]
    assert early.take("small", 0)
    assert not early.take("large", 9_999)
    assert [True, False] == [early.take("large", 10_000) for _ in range(2)]
    assert [True, True, False] == [early.take("large", 30_000) for _ in range(3)]
    assert [True] * 30 + [False] == [early.take("large", 10_000_000) for _ in range(31)]
    assert not early.take("large", 10_009_999)
    assert early.take("large", 10_010_000)
