"""Work is taken in turns, so that a large backlog of one owner delays nobody else."""

from sluice.domain.turns import (
    BATCH_BEHIND,
    HALF_LIFE_MS,
    MOST_PORTIONS,
    TENANT_BEHIND,
    Owner,
    Shares,
    group_of_range,
    in_turns,
    portions_after,
    precedence,
)


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


LARGE, SMALL, OTHER = Owner("a", "large"), Owner("a", "small"), Owner("b", "one")


def test_nobody_goes_before_others_who_is_alone_or_has_as_much() -> None:
    alone = portions_after((), 0, [(LARGE, 1_000)])
    equal = portions_after((), 0, [(LARGE, 1_000), (OTHER, 1_000)])

    assert [0, 0] == [precedence((), LARGE), precedence(alone, LARGE)]
    assert [0, 0] == [precedence(equal, LARGE), precedence(equal, OTHER)]


def test_who_had_less_than_its_share_goes_before_others_until_it_has_as_much() -> None:
    portions = portions_after((), 0, [(LARGE, 1_000), (SMALL, 100)])

    assert [0, BATCH_BEHIND] == [precedence(portions, each) for each in (LARGE, SMALL)]
    assert [TENANT_BEHIND, BATCH_BEHIND] == [
        precedence(portions, each) for each in (OTHER, Owner("a"))
    ]
    portions = portions_after(portions, 0, [(OTHER, 1_099)])
    assert TENANT_BEHIND == precedence(portions, OTHER)
    portions = portions_after(portions, 0, [(OTHER, 1)])
    assert 0 == precedence(portions, OTHER)


def test_many_batches_put_a_tenant_before_no_other() -> None:
    many = [(Owner("a", f"msgbatch_{number}"), 10) for number in range(1_000)]
    portions = portions_after((), 0, [*many, (OTHER, 1_000)])

    assert len(portions) == MOST_PORTIONS
    assert precedence(portions, Owner("a", "new")) == BATCH_BEHIND
    assert precedence(portions, Owner("b", "new")) == TENANT_BEHIND


def test_idle_tenants_do_not_make_a_tenant_with_less_appear_to_have_enough() -> None:
    idle = [(Owner(f"idle-{number}"), 10) for number in range(8)]
    portions = portions_after((), 0, [*idle, (LARGE, 1_000), (OTHER, 900)])

    assert [0, TENANT_BEHIND] == [precedence(portions, each) for each in (LARGE, OTHER)]


def test_what_was_taken_counts_half_after_a_while() -> None:
    portions = portions_after((), 0, [(LARGE, 1_000)])

    assert {500} == {part for _, part in portions_after(portions, HALF_LIFE_MS, ())}
    assert () == portions_after(portions, 11 * HALF_LIFE_MS, ())
    assert portions == portions_after(portions, -5_000, ()), "clocks of workers differ"
