"""The message engine: decides every call and keeps the books, without HTTP, sockets or sleeping.

`Engine.message` answers a call at once (`Refused`) or plans it (`Call`); the caller that carries the call
out reports its end with `Engine.finish`. A request of a Message Batch is checked, planned and
composed by the same functions, without buckets: `Engine.advance_batches` does what is due, and
`Engine.result` writes the line of the results. Times are nanoseconds since the epoch.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from scripts.claude_simulator import answers, checks, rate_limits
from scripts.claude_simulator import settings as settings_
from scripts.claude_simulator.accounts import (
    BATCHES_GROUP,
    COUNT_TOKENS_GROUP,
    Account,
    Caller,
    Headers,
    Refused,
)
from scripts.claude_simulator.answers import Answer, Planned
from scripts.claude_simulator.batches import EXPIRED, Batch, Batches, Item
from scripts.claude_simulator.books import Books, Group, Row, Standing, report
from scripts.claude_simulator.cache import InputTokens, PromptCache
from scripts.claude_simulator.faults import (
    FAILURES,
    KINDS,
    Failure,
    MarkerError,
    Place,
    Script,
    drawn,
    error_body,
    read_script,
)
from scripts.claude_simulator.limits import SECOND, Charge, Refusal, ceil_div
from scripts.claude_simulator.settings import Model, Settings


def wall_clock() -> Callable[[], int]:
    """Return a clock: nanoseconds since the epoch that never run backwards."""
    offset = time.time_ns() - time.monotonic_ns()
    return lambda: time.monotonic_ns() + offset


@dataclass(frozen=True, slots=True)
class _Asked:
    """A checked request."""

    row: Row
    model: Model
    params: dict[str, Any]
    prompt: checks.Prompt
    script: Script

    @property
    def prompt_tokens(self) -> int:
        """Input tokens of all kinds, as estimated or as its marker says."""
        return round(self.script.settings.get("input", self.prompt.tokens))

    def input_tokens(self, cache: PromptCache, now: int, first_token_at: int) -> InputTokens:
        """Split the prompt into uncached, written and read tokens."""
        tokens, wanted = self.prompt_tokens, self.script.settings
        if not wanted.keys().isdisjoint(("input", "cache_read", "cache_creation")):
            read = min(tokens, round(wanted.get("cache_read", 0)))
            written = min(tokens - read, round(wanted.get("cache_creation", 0)))
            return InputTokens(tokens - read - written, written, 0, read)
        if not self.prompt.breakpoints:
            return InputTokens(tokens)
        return cache.use(self.prompt, now, first_token_at)


@dataclass(frozen=True, slots=True)
class Call:
    """An admitted call: what to answer, when its first token and its end are due, how it ends."""

    caller: Caller
    group: Group
    row: Row
    message_id: str
    model: Model
    params: dict[str, Any]
    answer: Answer
    place: Place | None
    first_token_at: int
    ends_at: int
    books: Books

    @property
    def streamed(self) -> bool:
        """Whether the caller asked for events."""
        return self.params.get("stream") is True

    def usage(self) -> dict[str, Any]:
        """Return the usage object of the whole answer."""
        return answers.usage(
            self.row.input, self.row.output_tokens, self.answer.thinking_tokens, "standard"
        )

    def message(self) -> dict[str, Any]:
        """Return the whole Message."""
        return answers.message(self.message_id, self.model.id, self.answer, self.usage())


class Engine:
    """Claude as seen by its callers."""

    def __init__(self, settings: Settings, clock: Callable[[], int] | None = None) -> None:
        self.clock = clock or wall_clock()
        self.original = settings
        self.reset(to_original=True)

    # -- control ----------------------------------------------------------------------------

    def reset(self, *, to_original: bool = False) -> None:
        """Forget every call and fill every bucket; calls still running end in the old books."""
        now = self.clock()
        if to_original:
            self.settings = self.original
            self.revoked: dict[str, int] = {}
            self._revoke_at(self.original.revoke_at, now)
        self.books = Books(now, self.settings.ledger_rows)
        self._ids = itertools.count(1)
        self._id_prefix = f"{now // 1000:014x}"
        self.accounts: dict[str, Account] = {}
        self.batches = Batches(self.clock, self._id_prefix)
        self._apply(self.settings, now)

    def configure(self, patch: dict[str, Any]) -> None:
        """Change settings at run time, or raise `SettingsError` and change nothing."""
        now = self.clock()
        patch = dict(patch)
        revoke, unrevoke = patch.pop("revoke", []), patch.pop("unrevoke", [])
        revoke_at = patch.pop("revoke_at", {})
        checked = settings_.read({"revoke_at": revoke_at}).revoke_at
        for names in (revoke, unrevoke):
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise settings_.SettingsError("revoke, unrevoke: must be a list of keys")
        self._apply(settings_.merged(self.settings, patch), now)
        self._revoke_at(checked, now)
        self._revoke_at(dict.fromkeys(revoke, 0.0), now)
        for key in unrevoke:
            self.revoked.pop(key, None)

    def _revoke_at(self, seconds_by_key: dict[str, float], now: int) -> None:
        for key, seconds in seconds_by_key.items():
            self.revoked[key] = now + round(seconds * SECOND)

    def _apply(self, settings: Settings, now: int) -> None:
        self.settings = settings
        self.models = settings_.catalogue(settings)
        self.models_of_long_answers = settings_.with_long_answers(self.models)
        self.keys: dict[str, tuple[Account, str]] = {}
        self.admin_keys: dict[str, Account] = {}
        for organisation in settings.organisations:
            account = self.accounts.get(organisation.id)
            if account is None:
                account = self.accounts[organisation.id] = Account(organisation, now)
            else:
                account.apply(organisation, now)
            for key, workspace in organisation.all_keys().items():
                self.keys[key] = (account, workspace)
            self.admin_keys |= dict.fromkeys(organisation.admin_keys, account)
        self.failure_rates = _rates(settings.faults, FAILURES)
        self.kind_rates = _rates(settings.faults, KINDS)

    # -- calls ------------------------------------------------------------------------------

    def request_id(self) -> str:
        """Return a new `req_...`."""
        return f"req_{self._id_prefix}{next(self._ids):010x}"

    def authenticate(self, key: str | None, version: str | None) -> Caller | Refused:
        """Say who calls; an unknown or revoked key, or a version not known, is refused."""
        found = None if key is None else self.keys.get(key)
        return self._caller(key, version, *(found or (None, None)))

    def authenticate_admin(self, key: str | None, version: str | None) -> Caller | Refused:
        """Say who asks about an organization; every key but its admin keys is refused."""
        return self._caller(key, version, None if key is None else self.admin_keys.get(key), None)

    def _caller(
        self, key: str | None, version: str | None, account: Account | None, workspace: str | None
    ) -> Caller | Refused:
        now = self.clock()
        revoked_at = None if key is None else self.revoked.get(key)
        if key is None or account is None or (revoked_at is not None and revoked_at <= now):
            self.books.counts["unauthenticated"] += 1
            return Refused(FAILURES["401"], [])
        try:
            return Caller(account, workspace, key, checks.check_version(version), now)
        except checks.RequestError as error:
            return Refused(_said(error), account.headers(workspace))

    def rate_limits(
        self, caller: Caller, query: dict[str, str], workspace: str | None
    ) -> dict[str, Any] | Refused:
        """Return a page of the limits of an admin key's organization, or of one workspace of it."""
        organisation = caller.account.settings
        try:
            if workspace is None:
                return rate_limits.of_organization(organisation, self.models, caller.version, query)
            return rate_limits.of_workspace(
                organisation, workspace, self.models, caller.version, query
            )
        except checks.RequestError as error:
            return Refused(_said(error), caller.headers)

    def count_tokens(self, caller: Caller, body: bytes) -> int | Refused:
        """Return the input tokens of a request; free, with a request limit of its own."""
        try:
            params = checks.parse(body)
            model = checks.check_count(params, caller.version, self.models)
            tokens = checks.measure(params, model, cached=False).tokens
        except (checks.RequestError, RecursionError) as error:
            return Refused(_said(error), caller.headers)
        return self._count_call(caller, COUNT_TOKENS_GROUP) or tokens

    def _count_call(self, caller: Caller, name: str) -> Refused | None:
        """Charge a call that has no model to the limit of its kind."""
        group = caller.account.group(name, caller.at)
        group.counts["requests"] += 1
        refusal = group.limits.admit(caller.at, 0, 0)
        if refusal is not None:
            group.counts[f"outcome:rate_limited:{refusal.kind}"] += 1
            return self._rate_limited(refusal, caller, group)
        group.counts["outcome:answered"] += 1
        return None

    def message(self, caller: Caller, body: bytes, request_id: str) -> Call | Refused:
        """Decide a Messages request."""
        account, now = caller.account, caller.at
        self.books.request(now)
        row = Row(now, request_id, account.settings.id, caller.key, "", "", "", None)
        try:
            params = checks.parse(body)
            model = checks.check_message(params, caller.version, self.models)
            asked = _read(row, params, model, cached=b"cache_control" in body)
        except (checks.RequestError, MarkerError, RecursionError) as error:
            failure = _said(error)
            return self._refuse(f"invalid:{failure.status}", failure, row, caller, None)
        group = account.group(model.group, now)
        group.counts["requests"] += 1
        script = asked.script
        failing = self._failing(row.body_hash, script, account.settings.blocked_by)
        if failing is not None and FAILURES[failing].place in {Place.BEFORE, Place.DROP_BEFORE}:
            self.books.calls_of_content[row.body_hash] += 1
            return self._refuse(failing, self._failure(failing, script), row, caller, group)
        if (most := account.settings.max_in_flight) is not None and account.in_flight >= most:
            failure = FAILURES["concurrency"]
            return self._refuse("rate_limited:concurrency", failure, row, caller, group)
        return self._admit(caller, group, asked, failing)

    def _admit(
        self, caller: Caller, group: Group, asked: _Asked, failing: str | None
    ) -> Call | Refused:
        row = asked.row
        now, max_tokens = caller.at, asked.params["max_tokens"]
        service = self.settings.service_by_group.get(group.name, self.settings.service)
        estimate = ceil_div(asked.prompt_tokens * service.input_estimate_percent, 100)
        own = caller.own_limits(group)
        refusal = group.limits.admit(now, estimate, max_tokens, own)
        if refusal is not None:
            row.status, row.outcome = 429, f"rate_limited:{refusal.kind}"
            self.books.write(row, [self.books.counts, group.counts], now)
            return self._rate_limited(refusal, caller, group)

        planned = self._plan(asked)
        plan = planned.plan
        first_token_at = now + plan.first_token_after
        row.input = asked.input_tokens(caller.account.prompt_cache, now, first_token_at)
        row.output_tokens = plan.output_tokens
        row.outcome = "answered" if failing is None else failing
        place = None if failing is None else FAILURES[failing].place
        half = place is Place.IN_STREAM
        charge = Charge(
            estimated_input=estimate,
            input_tokens=row.input.uncached + row.input.written,
            output_tokens=plan.output_tokens // 2 if half else plan.output_tokens,
            max_tokens=max_tokens,
            first_token=first_token_at,
            millitokens_per_second=plan.millitokens_per_second,
        )
        for limits in (group.limits, own):
            if limits is not None:
                limits.run(now, charge)
        caller.account.in_flight += 1
        group.start(now)
        return Call(
            caller=caller,
            group=group,
            row=row,
            message_id=planned.message_id,
            model=asked.model,
            params=asked.params,
            answer=answers.compose(asked.params, row.body_hash, plan, planned.kind),
            place=place,
            first_token_at=first_token_at,
            ends_at=now + plan.duration,
            books=self.books,
        )

    def _plan(self, asked: _Asked) -> Planned:
        """Plan the answer of a call that reached the model."""
        body_hash = asked.row.body_hash
        nth = self.books.calls_of_content[body_hash]
        self.books.calls_of_content[body_hash] += 1
        service = self.settings.service_by_group.get(asked.model.group, self.settings.service)
        draws = answers.chances(self.settings.seed, body_hash)
        kind = answers.kind_of(asked.params, asked.script, self.kind_rates, draws[2])
        plan = answers.plan(service, asked.script, asked.params["max_tokens"], draws, kind)
        return Planned(kind, plan, f"msg_{body_hash[:20]}{nth:04x}")

    def finish(self, call: Call, status: int, *, delivered: bool) -> None:
        """Write down the end of a call: billed unless it failed in its stream, delivered or not."""
        now = self.clock()
        row = call.row
        row.status = status
        row.billed = call.place is not Place.IN_STREAM
        row.delivered = delivered
        call.group.end(now)
        call.caller.account.in_flight -= 1
        call.books.write(row, [call.books.counts, call.group.counts], now)

    def answer_headers(self, call: Call) -> Headers:
        """Return the headers of an answer: the organization and the current limits."""
        return call.caller.limit_headers(call.group, self.clock())

    # -- Message Batches --------------------------------------------------------------------

    def batch_call(self, caller: Caller) -> Refused | None:
        """Charge a call of any batch endpoint to the limit they share."""
        return self._count_call(caller, BATCHES_GROUP)

    def refuse_batch_call(self, caller: Caller, failure: Failure, outcome: str) -> Refused:
        """Return the refusal of a call that its limit had let pass."""
        counts = caller.account.group(BATCHES_GROUP, caller.at).counts
        counts["outcome:answered"] -= 1
        counts[f"outcome:{outcome}"] += 1
        return Refused(failure, caller.headers)

    def create_batch(self, caller: Caller, items: list[Item], beta: str) -> Batch | Refused:
        """Start a batch of requests that are not checked yet, unless the queue has no room for it."""
        account = caller.account
        blocked = account.settings.blocked_by
        if blocked is not None and FAILURES[blocked].place is Place.BEFORE:
            return self.refuse_batch_call(caller, FAILURES[blocked], blocked)
        most = account.settings.batch_limits.queued_requests
        queued = self.batches.queued(account)
        if most is not None and queued + len(items) > most:
            wait = self.batches.seconds_to_next_end(account)
            failure = Failure(
                429,
                "rate_limit_error",
                f"This request would exceed your organization's limit of {most:,} batch requests in"
                f" the processing queue ({queued:,} are queued).",
                retry_after_seconds=None if account.rules.retry_after == "none" else wait,
                should_retry=True,
            )
            return self.refuse_batch_call(caller, failure, "rate_limited:queued_requests")
        return self.batches.create(caller, items, beta, self.settings)

    def advance_batches(self, most: int | None = None) -> bool:
        """Work off what is due, at most so many requests; say whether more is due already."""
        return self.batches.advance(self._end_item, most)

    def _end_item(self, batch: Batch, item: Item, fate: str | None) -> str:
        """Answer a request of a batch, or end it by its fate; return the type of its result."""
        account, now = batch.account, self.clock()
        row = Row(batch.accepted_at, None, account.settings.id, batch.key, "", "", "", None)
        row.batch_id, row.custom_id = batch.id, item.custom_id
        if fate is None:
            fate = self._answer_item(batch, item, row)
        if fate != "succeeded":
            item.raw = b""
        item.row = row
        row.outcome = row.outcome or fate
        self.books.write(row, [account.batch_items], now)
        return fate

    def _answer_item(self, batch: Batch, item: Item, row: Row) -> str:
        models = self.models_of_long_answers if batch.has_long_answers else self.models
        try:
            params = checks.batch_params(item.raw)
            model = checks.check_batch_params(params, batch.version, models)
            asked = _read(row, params, model, cached=b"cache_control" in item.raw)
        except (checks.RequestError, MarkerError, RecursionError) as error:
            item.error = _said(error)
            row.status, row.outcome = item.error.status, f"invalid:{item.error.status}"
            return "errored"
        failing = self._failing_item(asked)
        if failing is not None:
            self.books.calls_of_content[row.body_hash] += 1
        if failing == EXPIRED:
            return EXPIRED
        if failing is not None:
            # A batch has no connection that could break: what would drop one is an error inside.
            item.error = FAILURES[failing if FAILURES[failing].status else "500"]
            row.status, row.outcome = item.error.status, failing
            return "errored"
        item.planned = self._plan(asked)
        now = self.clock()
        row.input = asked.input_tokens(batch.account.prompt_cache, now, now)
        row.output_tokens = item.planned.plan.output_tokens
        row.status, row.outcome, row.billed = 200, "answered", True
        return "succeeded"

    def _failing_item(self, asked: _Asked) -> str | None:
        body_hash = asked.row.body_hash
        nth = self.books.calls_of_content[body_hash]
        forced = asked.script.failure_of_call(nth)
        if forced is not None:
            return forced
        settings = self.settings.batches
        rates = {"500": settings.errored_rate, EXPIRED: settings.expired_rate}
        return drawn(rates, answers.chances(self.settings.seed, body_hash, nth)[4])

    def result(self, item: Item) -> dict[str, Any]:
        """Return the line of a request of an ended batch."""
        result: dict[str, Any] = {"type": item.outcome}
        if item.error is not None:
            result["error"] = error_body(item.error, None)
        elif item.planned is not None and item.row is not None:
            planned, row = item.planned, item.row
            params = checks.batch_params(item.raw)
            answer = answers.compose(params, row.body_hash, planned.plan, planned.kind)
            usage = answers.usage(row.input, row.output_tokens, answer.thinking_tokens, "batch")
            result["message"] = answers.message(planned.message_id, row.model, answer, usage)
        return {"custom_id": item.custom_id, "result": result}

    def delivered(self, batch: Batch, items: Iterable[Item]) -> None:
        """Write down that results were read."""
        for item in items:
            if item.row is not None:
                self.books.deliver(item.row, batch.account.batch_items)

    # -- refusals ---------------------------------------------------------------------------

    def _failing(self, body_hash: str, script: Script, blocked_by: str | None) -> str | None:
        if blocked_by is not None:
            return blocked_by
        if not script.failures and not self.failure_rates:
            return None
        nth = self.books.calls_of_content[body_hash]
        forced = script.failure_of_call(nth)
        if forced is not None or not self.failure_rates:
            return forced
        draws = answers.chances(self.settings.seed, body_hash, nth)
        return drawn(self.failure_rates, draws[3])

    def _failure(self, name: str, script: Script) -> Failure:
        failure = FAILURES[name]
        seconds = failure.retry_after_seconds
        if name == "ramp":
            seconds = self.settings.ramp_retry_after_seconds
        if "retry_after" in script.settings and name in {"429", "529", "ramp", "concurrency"}:
            seconds = round(script.settings["retry_after"]) or None
        if seconds == failure.retry_after_seconds:
            return failure
        return _with_retry_after(failure, seconds)

    def _refuse(
        self, outcome: str, failure: Failure, row: Row, caller: Caller, group: Group | None
    ) -> Refused:
        account = caller.account
        row.status, row.outcome = failure.status, outcome
        counts = account.other if group is None else group.counts
        self.books.write(row, [self.books.counts, counts], caller.at)
        if group is None:
            account.other["requests"] += 1
        if failure.status == 429 and group is not None:  # noqa: PLR2004
            return Refused(failure, caller.limit_headers(group, caller.at))
        return Refused(failure, caller.headers)

    def _rate_limited(self, refusal: Refusal, caller: Caller, group: Group) -> Refused:
        account = caller.account
        failure = Failure(
            429,
            "rate_limit_error",
            _limit_message(refusal, caller, group),
            retry_after_seconds=(
                None if account.rules.retry_after == "none" else refusal.retry_after_seconds
            ),
            should_retry=True,
        )
        return Refused(failure, caller.limit_headers(group, caller.at))

    # -- reports ----------------------------------------------------------------------------

    def stats(self, *, starts: bool = False) -> dict[str, Any]:
        """Return the counts since the start or the last reset."""
        standings = {
            name: Standing(
                account.in_flight,
                account.other,
                list(account.groups.values()),
                self.batches.stats(account),
                account.batch_items,
            )
            for name, account in self.accounts.items()
        }
        found = report(self.books, standings, self.clock(), starts=starts)
        return {**found, "batch_clock": self.batches.clock_stats()}

    def ledger(self) -> Iterator[dict[str, Any]]:
        """Yield every ended call, oldest first."""
        for row in list(self.books.rows):
            yield row.as_json()


def _read(row: Row, params: dict[str, Any], model: Model, *, cached: bool) -> _Asked:
    """Measure a checked request and read its marker; name it in its row."""
    prompt = checks.measure(params, model, cached=cached)
    row.user_id = (params.get("metadata") or {}).get("user_id")
    script = read_script(row.user_id)
    row.body_hash = answers.params_hash(params)
    row.model, row.group = model.id, model.group
    return _Asked(row, model, params, prompt, script)


def _rates(faults: dict[str, float], names: Iterable[str]) -> dict[str, float]:
    return {name: faults[name] for name in names if faults.get(name)}


def _said(error: checks.RequestError | MarkerError | RecursionError) -> Failure:
    if isinstance(error, RecursionError):
        return Failure(400, "invalid_request_error", "The request body is nested too deeply.")
    if isinstance(error, MarkerError):
        return Failure(400, "invalid_request_error", f"metadata.user_id: {error}")
    return error.failure


def _with_retry_after(failure: Failure, seconds: int | None) -> Failure:
    return Failure(
        failure.status,
        failure.type,
        failure.message,
        failure.error_code,
        seconds,
        failure.should_retry,
        failure.place,
    )


def _limit_message(refusal: Refusal, caller: Caller, group: Group) -> str:
    own = caller.own_limits(group) if refusal.by_workspace else None
    limits = (own or group.limits).limits
    limit, what = {
        "input_tokens": (limits.input_tokens, "input tokens per minute"),
        "output_tokens": (limits.output_tokens, "output tokens per minute"),
    }.get(refusal.kind, (limits.requests, "requests per minute"))
    whose = "workspace" if own is not None else "organization"
    return (
        f"This request would exceed your {whose}'s rate limit of {limit:,} {what}"
        f" (org: {caller.account.settings.id}, model group: {group.name})."
    )
