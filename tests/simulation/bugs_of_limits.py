"""Deliberate bugs in how soon, how often, with whose key and at what price: for stories of several tenants."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Final

from sluice.domain import jobs as life
from sluice.domain import limits
from sluice.domain.breakers import Breaker
from sluice.domain.jobs import Job, State, Step
from sluice.domain.keys import UpstreamKey
from sluice.domain.limits import BURST_PACE, FULL_RATE
from sluice.domain.pricing import PriceList, Usage
from sluice.domain.retries import Failure
from sluice.domain.turns import Owner
from sluice.domain.waits import Waits
from sluice.domain.webhooks import GiveUp
from sluice.intake import accounts
from sluice.intake.accounts import Account
from sluice.notices import deliver
from sluice.notices.publish import Publish
from sluice.upkeep import dead_letters
from sluice.upkeep.dead_letters import TakeDeadLetter
from sluice.upkeep.sweep import Sweep
from sluice.worker import keys, limit_books, limit_planner, outcome
from sluice.worker.keys import KeyChoice
from sluice.worker.limiter import Limiter
from sluice.worker.outcome import Outcome
from tests.simulation.deliberate import Bug, instead

Applied = AbstractContextManager[None]


def nothing(*_: object, **__: object) -> None:
    """Do nothing."""


def in_place_of(owner: Any, name: str, bad: object) -> Callable[[], Applied]:
    """Return what puts something else in the place of a function, or a method."""
    return partial(instead, owner, name, bad)


@contextmanager
def judged(change: Callable[[Failure, dict[str, Any]], Failure]) -> Iterator[None]:
    """Have failures judged after a change of what is known of them."""
    good = vars(outcome)["judge"]

    def judge(failure: Failure, **facts: Any) -> Any:
        return good(change(failure, facts), **facts)

    with instead(outcome, "judge", judge):
        yield


def _names_of_the_tenant(owner: Owner) -> tuple[str, str]:
    return owner.tenant, f"{owner.tenant}/"


def _without_time(failure: Failure, _: dict[str, Any]) -> Failure:
    return replace(failure, retry_after_ms=None)


def _without_fallback(failure: Failure, facts: dict[str, Any]) -> Failure:
    facts["has_fallback"] = False
    return failure


@contextmanager
def _start_past_the_deadline() -> Iterator[None]:
    good = life.next_step

    def next_step(job: Job, now: int, max_attempts: int) -> Step:
        return good(replace(job, deadline=None), now, max_attempts)

    with instead(life, "next_step", next_step):
        yield


@contextmanager
def _ignore_a_cancel_during_a_call() -> Iterator[None]:
    good = vars(accounts)["request_cancel"]

    def request_cancel(job: Job, now: int) -> Any:
        return job if job.state is State.RUNNING else good(job, now)

    with instead(accounts, "request_cancel", request_cancel):
        yield


def _for_any_tenant(self: UpstreamKey, tenant: str, model: str) -> bool:
    del tenant
    return self.models is None or model in self.models


def _for_any_model(self: UpstreamKey, tenant: str, model: str) -> bool:
    del model
    return self.tenants is None or tenant in self.tenants


async def _not_rejected(self: KeyChoice, key: UpstreamKey) -> bool:
    del self, key
    return False


@contextmanager
def _priced(change: Callable[[str, Usage], tuple[str, Usage]]) -> Iterator[None]:
    good = PriceList._exact  # noqa: SLF001 - what a bug may do

    def exact(self: PriceList, model: str, usage: Usage, *args: Any, **facts: Any) -> Any:
        return good(self, *change(model, usage), *args, **facts)

    with instead(PriceList, "_exact", exact):
        yield


def _reads_as_input(model: str, usage: Usage) -> tuple[str, Usage]:
    read = usage.cache_read_input_tokens
    return model, replace(usage, cache_read_input_tokens=0, input_tokens=usage.input_tokens + read)


def _writes_for_minutes(model: str, usage: Usage) -> tuple[str, Usage]:
    return model, replace(usage, cache_creation_1h_input_tokens=0)


@contextmanager
def _price_the_model_asked() -> Iterator[None]:
    good = Outcome._cost  # noqa: SLF001 - what a bug may do

    def cost(self: Outcome, *facts: Any) -> int | None:
        call = self._call
        claimed = call.claimed
        call.claimed = replace(claimed, fallbacks_used=0)
        try:
            return good(self, *facts)
        finally:
            call.claimed = claimed

    with instead(Outcome, "_cost", cost):
        yield


@contextmanager
def _sign_for_anybody() -> Iterator[None]:
    good = vars(deliver)["signing_secret"]
    with instead(deliver, "signing_secret", lambda master, _: good(master, "acme")):
        yield


@contextmanager
def _give_webhooks_up() -> Iterator[None]:
    good = vars(deliver)["judge"]

    def judge(status: int | None, *facts: Any) -> Any:
        return good(status, *facts) if status is not None and status < 500 else GiveUp()

    with instead(deliver, "judge", judge):
        yield


@contextmanager
def _publish_some() -> Iterator[None]:
    good = Publish.__call__

    def some(self: Publish, jobs: Any) -> int:
        good(self, jobs[:1])
        return len(jobs)

    with instead(Publish, "__call__", some):
        yield


@contextmanager
def _keep_attempts_at_a_redrive() -> Iterator[None]:
    good = life.redrive

    def redrive(job: Job, now: int) -> Job:
        return replace(good(job, now), attempts_used=job.attempts_used)

    with instead(dead_letters, "redrive", redrive):
        yield


@contextmanager
def _cancel_for_anybody() -> Iterator[None]:
    good = Account.cancel

    def cancel(self: Account, job_id: str) -> Any:
        job = self._jobs.get(job_id)
        if job is not None:
            self._tenant = job.tenant
        return good(self, job_id)

    with instead(Account, "cancel", cancel):
        yield


@contextmanager
def _release_what_waits_for_a_probe() -> Iterator[None]:
    good = vars(limits)["failed"]

    def failed(breaker: Breaker, now: int, waits: Waits, **whose: str) -> Breaker:
        counted: Breaker = good(breaker, now, waits, **whose)
        # As if the failures of others were a reason to try those of before again.
        return replace(counted, streak=2) if counted.others else counted

    with instead(limits, "failed", failed):
        yield


BUGS_OF_LIMITS: Final[Mapping[str, Bug]] = {
    "blame_the_organization": Bug(
        "what a workspace is refused blocks its organization",
        in_place_of(KeyChoice, "workspace", lambda *_: None),
    ),
    "blame_the_endpoint": Bug(
        "failures of one model or tenant open the breaker of the endpoint for all",
        in_place_of(Breaker, "concerns", lambda *_: True),
    ),
    "release_what_waits_for_a_probe": Bug(
        "the failure of another model or tenant closes the breaker of those that failed before",
        _release_what_waits_for_a_probe,
    ),
    "wait_despite_a_fallback": Bug(
        "a job with a fallback model waits behind the breaker of its model",
        in_place_of(limit_planner, "_elsewhere", nothing),
    ),
    "block_nobody": Bug(
        "a 429 does not block its limit group", in_place_of(Limiter, "throttled", nothing)
    ),
    "ignore_retry_after": Bug("`retry-after` is ignored", partial(judged, _without_time)),
    "never_open_a_breaker": Bug(
        "circuit breakers never open", in_place_of(Limiter, "failed", nothing)
    ),
    "never_fall_back": Bug(
        "fallback models are not used after a 529", partial(judged, _without_fallback)
    ),
    "start_past_the_deadline": Bug(
        "jobs start although their deadline has passed", _start_past_the_deadline
    ),
    "leave_deadlines_to_workers": Bug(
        "the sweep does not end jobs past their deadline",
        in_place_of(Sweep, "_expire", lambda *_: False),
    ),
    "ignore_a_cancel_during_a_call": Bug(
        "a cancel does not stop a running call",
        _ignore_a_cancel_during_a_call,
    ),
    "use_keys_of_other_tenants": Bug(
        "the tenants of a key are ignored", in_place_of(UpstreamKey, "allows", _for_any_tenant)
    ),
    "use_keys_for_any_model": Bug(
        "the models of a key are ignored", in_place_of(UpstreamKey, "allows", _for_any_model)
    ),
    "use_limits_of_another_organization": Bug(
        "all keys are admitted by the limits of one organization",
        in_place_of(keys, "organization_of", lambda *_: "org"),
    ),
    "burst_as_before": Bug(
        "a 429 for a burst that no header forbids changes nothing about the next burst",
        in_place_of(limits, "LEAST_PACE", BURST_PACE * FULL_RATE),
    ),
    "share_by_workers": Bug(
        "start times go to whichever worker is quickest, whatever its owners have had",
        in_place_of(limit_books, "precedence", lambda *_: 0),
    ),
    "share_by_tenants_only": Bug(
        "a small batch has no precedence over a large one of the same tenant",
        in_place_of(Owner, "names", property(_names_of_the_tenant)),
    ),
    "use_rejected_keys": Bug(
        "a key that was rejected with 401 is used again",
        in_place_of(KeyChoice, "reject", _not_rejected),
    ),
    "leave_dead_letters_alone": Bug(
        "a dead letter does not end its job",
        in_place_of(TakeDeadLetter, "_ended", lambda *_: True),
    ),
    "keep_attempts_at_a_redrive": Bug(
        "a redriven job keeps the attempts it has used", _keep_attempts_at_a_redrive
    ),
    "price_the_model_asked": Bug(
        "an answer of a fallback model is priced as the model asked", _price_the_model_asked
    ),
    "price_cache_reads_as_input": Bug(
        "cache reads are priced as input", partial(_priced, _reads_as_input)
    ),
    "price_cache_writes_as_short": Bug(
        "cache writes for an hour are priced as those for five minutes",
        partial(_priced, _writes_for_minutes),
    ),
    "sign_for_anybody": Bug("webhooks are signed with the secret of one tenant", _sign_for_anybody),
    "give_webhooks_up": Bug("a webhook is given up after one failed delivery", _give_webhooks_up),
    "publish_some": Bug("of several jobs that ended together one is published", _publish_some),
    "cancel_for_anybody": Bug("a tenant can cancel another's job", _cancel_for_anybody),
}
