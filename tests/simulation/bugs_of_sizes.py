"""Deliberate bugs with what has no bound, or does its work from nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from sluice.bulk.sections import Places, Sections
from sluice.domain import models
from sluice.domain.batches import Batch, Plan
from sluice.domain.pricing import base_model
from sluice.worker import keys, limiter, range_windows
from sluice.worker.keys import KeyChoice
from sluice.worker.range_windows import Windows
from tests.simulation.bugs_of_limits import in_place_of
from tests.simulation.deliberate import Bug, instead


def _own_group(model: str, groups: Mapping[str, str], _: str) -> str:
    name = base_model(model)
    return groups.get(name, name)


async def _learn_nothing(*_: object) -> None:
    return None


@contextmanager
def _without_windows() -> Iterator[None]:
    good: Callable[..., Any] = vars(Windows)["next"]

    def all_rows(self: Windows) -> Any:
        with instead(range_windows, "WINDOW_ROWS", 10**9):
            return good(self)

    with instead(Windows, "next", all_rows):
        yield


def _all_shares(_: Sections, __: Batch, shares: int) -> list[int]:
    return list(range(shares))


def _all_sections(_: Sections, __: Batch, sections: list[int]) -> set[int]:
    return set(sections)


def _ignore_repeats(*_: object) -> dict[int, Places]:
    return {}


def _search_nothing(self: Sections, batch: Batch, _: Plan, share: int, __: int) -> None:
    self._objects.put(batch.section_key(share, "repeats"), b"")


BUGS_OF_SIZES: Final = {
    "give_each_name_a_limit_group": Bug(
        "each model name that a caller invents has limits of its own",
        in_place_of(keys, "model_group", _own_group),
    ),
    "know_every_name": Bug(
        "a relay that answers for every name makes any number of them known",
        in_place_of(models, "MOST_OF_A_TENANT", 10**9),
    ),
    "never_know_a_new_model": Bug(
        "a model that no list has shares the limits of unknown models for good",
        in_place_of(KeyChoice, "learn_model", _learn_nothing),
    ),
    "learn_the_limits_of_unknown_models": Bug(
        "the limits of one model become those of all unknown models",
        in_place_of(limiter, "is_unknown", lambda _: False),
    ),
    "hold_a_whole_range": Bug("all rows of a range are in memory at once", _without_windows),
    "search_from_nothing": Bug(
        "each invocation searches all custom_ids of a batch again",
        in_place_of(Sections, "unsearched", _all_shares),
    ),
    "finish_from_nothing": Bug(
        "each invocation finishes all sections of a batch again",
        in_place_of(Sections, "unfinished", _all_sections),
    ),
    "forget_repeats": Bug(
        "what a search has found is forgotten by the next invocation",
        in_place_of(Sections, "repeated", _ignore_repeats),
    ),
    "search_nothing": Bug(
        "a search that was interrupted counts as done",
        in_place_of(Sections, "search", _search_nothing),
    ),
}
