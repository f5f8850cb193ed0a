"""The message engine: decides every call and keeps the books, without HTTP, sockets or sleeping.

`Engine.message` answers a call at once (`Refused`) or plans it (`Call`); whoever carries the call
out reports its end with `Engine.finish`. Times are nanoseconds since the epoch. Message Batches can
use the same engine: a row is checked, planned and composed by the same functions, without buckets.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from scripts.claude_simulator import answers, checks, rate_limits
from scripts.claude_simulator import settings as settings_
from scripts.claude_simulator.answers import Answer
from scripts.claude_simulator.books import Books, Group, Row, report
from scripts.claude_simulator.cache import InputTokens, PromptCache
from scripts.claude_simulator.faults import (
    FAILURES,
    KINDS,
    Failure,
    MarkerError,
    Place,
    Script,
    drawn,
    read_script,
)
from scripts.claude_simulator.limits import (
    SECOND,
    Charge,
    LimitGroup,
    Limits,
    Refusal,
    ceil_div,
)
from scripts.claude_simulator.settings import Model, Organisation, Settings

Headers = list[tuple[bytes, bytes]]
COUNT_TOKENS_GROUP: Final = "count_tokens"


def wall_clock() -> Callable[[], int]:
    """Return a clock: nanoseconds since the epoch that never run backwards."""
    offset = time.time_ns() - time.monotonic_ns()
    return lambda: time.monotonic_ns() + offset


class Account:
    """An organisation at run time: its settings, its groups, its prompt cache."""

    def __init__(self, organisation: Organisation, now: int) -> None:
        self.settings = organisation
        self.groups: dict[str, Group] = {}
        self.in_flight = 0
        self.other: Counter[str] = Counter()
        self.prompt_cache = PromptCache()
        self.apply(organisation, now)

    def apply(self, organisation: Organisation, now: int) -> None:
        """Take new settings; the groups keep their levels."""
        self.settings = organisation
        self.rules = organisation.rules()
        for group in self.groups.values():
            group.limits.relimit(self._limits_of(group.name), self.rules, now)
            wanted = self._workspace_limits_of(group.name)
            for name in group.workspaces.keys() - wanted.keys():
                del group.workspaces[name]
            for name, limits in wanted.items():
                if name in group.workspaces:
                    group.workspaces[name].relimit(limits, self.rules, now)
                else:
                    group.workspaces[name] = LimitGroup(limits, self.rules, now)

    def group(self, name: str, now: int) -> Group:
        """Return the model group of that name, with full buckets when it is new."""
        found = self.groups.get(name)
        if found is None:
            workspaces = {
                workspace: LimitGroup(limits, self.rules, now)
                for workspace, limits in self._workspace_limits_of(name).items()
            }
            limits = LimitGroup(self._limits_of(name), self.rules, now)
            found = self.groups[name] = Group(name, limits, workspaces)
        return found

    def _workspace_limits_of(self, name: str) -> dict[str, Limits]:
        if name == COUNT_TOKENS_GROUP:
            return {}
        found = {
            workspace: settings.limits_of(name)
            for workspace, settings in self.settings.workspaces.items()
        }
        return {workspace: limits for workspace, limits in found.items() if limits is not None}

    def _limits_of(self, name: str) -> Limits:
        if name == COUNT_TOKENS_GROUP:
            return Limits(self.settings.count_tokens_rpm, None, None)
        return self.settings.limits_of(name)


@dataclass(frozen=True, slots=True)
class Caller:
    """An authenticated request: whose it is and under which version.

    `workspace` is the one the key belongs to; an admin key belongs to none.
    """

    account: Account
    workspace: str | None
    key: str
    version: str
    at: int

    @property
    def headers(self) -> Headers:
        """Return the headers of every answer."""
        return _identity(self.account, self.workspace)

    def own_limits(self, group: Group) -> LimitGroup | None:
        """Return the buckets its workspace has in a group, if it has any."""
        return None if self.workspace is None else group.workspaces.get(self.workspace)

    def limit_headers(self, group: Group, now: int) -> Headers:
        """Return the headers of every answer, with the limits as they stand at `now`."""
        if not self.account.settings.limit_headers:
            return self.headers
        return [*self.headers, *group.limits.headers(now, self.own_limits(group))]


def _identity(account: Account, workspace: str | None) -> Headers:
    headers = [(b"anthropic-organization-id", account.settings.id.encode())]
    if workspace is not None:
        headers.append((b"anthropic-workspace-id", workspace.encode()))
    return headers


@dataclass(frozen=True, slots=True)
class Refused:
    """A call that ends at once: an error to send, or (`failure.status` 0) a connection to drop."""

    failure: Failure
    headers: Headers


@dataclass(frozen=True, slots=True)
class _Asked:
    """A checked request that may be admitted."""

    caller: Caller
    group: Group
    row: Row
    model: Model
    params: dict[str, Any]
    prompt: checks.Prompt
    script: Script

    @property
    def prompt_tokens(self) -> int:
        """Input tokens of all kinds, as estimated or as its marker says."""
        return round(self.script.settings.get("input", self.prompt.tokens))

    def input_tokens(self, first_token_at: int) -> InputTokens:
        """Split the prompt into uncached, written and read tokens."""
        tokens, wanted = self.prompt_tokens, self.script.settings
        if not wanted.keys().isdisjoint(("input", "cache_read", "cache_creation")):
            read = min(tokens, round(wanted.get("cache_read", 0)))
            written = min(tokens - read, round(wanted.get("cache_creation", 0)))
            return InputTokens(tokens - read - written, written, 0, read)
        if not self.prompt.breakpoints:
            return InputTokens(tokens)
        cache = self.caller.account.prompt_cache
        return cache.use(self.prompt, self.caller.at, first_token_at)


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
        tokens = self.row.input
        usage: dict[str, Any] = {
            "input_tokens": tokens.uncached,
            "cache_creation_input_tokens": tokens.written,
            "cache_read_input_tokens": tokens.read,
            "cache_creation": {
                "ephemeral_5m_input_tokens": tokens.written_5m,
                "ephemeral_1h_input_tokens": tokens.written_1h,
            },
            "output_tokens": self.row.output_tokens,
            "service_tier": "standard",
            "inference_geo": "global",
        }
        if self.answer.thinking_tokens:
            usage["output_tokens_details"] = {"thinking_tokens": self.answer.thinking_tokens}
        return usage

    def message(self) -> dict[str, Any]:
        """Return the whole Message."""
        return answers.message(self.message_id, self.model, self.answer, self.usage())


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
                raise settings_.SettingsError("revoke, unrevoke: a list of keys")
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
        """Say who asks about an organisation; every key but its admin keys is refused."""
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
            return Refused(_said(error), _identity(account, workspace))

    def rate_limits(
        self, caller: Caller, query: dict[str, str], workspace: str | None
    ) -> dict[str, Any] | Refused:
        """Return a page of the limits of an admin key's organisation, or of one workspace of it."""
        organisation = caller.account.settings
        try:
            if workspace is None:
                return rate_limits.of_organisation(organisation, self.models, caller.version, query)
            return rate_limits.of_workspace(
                organisation, workspace, self.models, caller.version, query
            )
        except checks.RequestError as error:
            return Refused(_said(error), caller.headers)

    def count_tokens(self, caller: Caller, body: bytes) -> int | Refused:
        """Return the input tokens of a request; free, with a request limit of its own."""
        account = caller.account
        try:
            params = checks.parse(body)
            model = checks.check_count(params, caller.version, self.models)
            tokens = checks.measure(params, model, cached=False).tokens
        except (checks.RequestError, RecursionError) as error:
            return Refused(_said(error), caller.headers)
        group = account.group(COUNT_TOKENS_GROUP, caller.at)
        group.counts["requests"] += 1
        refusal = group.limits.admit(caller.at, 0, 0)
        if refusal is not None:
            group.counts[f"outcome:rate_limited:{refusal.kind}"] += 1
            return self._rate_limited(refusal, caller, group)
        group.counts["outcome:answered"] += 1
        return tokens

    def message(self, caller: Caller, body: bytes, request_id: str) -> Call | Refused:
        """Decide a Messages request."""
        account, now = caller.account, caller.at
        self.books.request(now)
        row = Row(now, request_id, account.settings.id, caller.key, "", "", "", None)
        try:
            params = checks.parse(body)
            model = checks.check_message(params, caller.version, self.models)
            prompt = checks.measure(params, model, cached=b"cache_control" in body)
            row.user_id = (params.get("metadata") or {}).get("user_id")
            script = read_script(row.user_id)
            row.body_hash = answers.params_hash(params)
        except (checks.RequestError, MarkerError, RecursionError) as error:
            failure = _said(error)
            return self._refuse(f"invalid:{failure.status}", failure, row, caller, None)
        group = account.group(model.group, now)
        group.counts["requests"] += 1
        row.model, row.group = model.id, model.group
        failing = self._failing(row.body_hash, script, account.settings.blocked_by)
        if failing is not None and FAILURES[failing].place in {Place.BEFORE, Place.DROP_BEFORE}:
            self.books.calls_of_content[row.body_hash] += 1
            return self._refuse(failing, self._failure(failing, script), row, caller, group)
        if (most := account.settings.max_in_flight) is not None and account.in_flight >= most:
            failure = FAILURES["concurrency"]
            return self._refuse("rate_limited:concurrency", failure, row, caller, group)
        asked = _Asked(caller, group, row, model, params, prompt, script)
        return self._admit(asked, failing)

    def _admit(self, asked: _Asked, failing: str | None) -> Call | Refused:
        caller, group, row = asked.caller, asked.group, asked.row
        now, max_tokens = caller.at, asked.params["max_tokens"]
        service = self.settings.service_by_group.get(group.name, self.settings.service)
        estimate = ceil_div(asked.prompt_tokens * service.input_estimate_percent, 100)
        own = caller.own_limits(group)
        refusal = group.limits.admit(now, estimate, max_tokens, own)
        if refusal is not None:
            row.status, row.outcome = 429, f"rate_limited:{refusal.kind}"
            self.books.write(row, group, now)
            return self._rate_limited(refusal, caller, group)

        nth = self.books.calls_of_content[row.body_hash]
        self.books.calls_of_content[row.body_hash] += 1
        draws = answers.chances(self.settings.seed, row.body_hash)
        kind = answers.kind_of(asked.params, asked.script, self.kind_rates, draws[2])
        planned = answers.plan(service, asked.script, max_tokens, draws, kind)
        first_token_at = now + planned.first_token_after
        row.input = asked.input_tokens(first_token_at)
        row.output_tokens = planned.output_tokens
        row.outcome = "answered" if failing is None else failing
        place = None if failing is None else FAILURES[failing].place
        half = place is Place.IN_STREAM
        charge = Charge(
            estimated_input=estimate,
            input_tokens=row.input.uncached + row.input.written,
            output_tokens=planned.output_tokens // 2 if half else planned.output_tokens,
            max_tokens=max_tokens,
            first_token=first_token_at,
            millitokens_per_second=planned.millitokens_per_second,
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
            message_id=f"msg_{row.body_hash[:20]}{nth:04x}",
            model=asked.model,
            params=asked.params,
            answer=answers.compose(asked.params, row.body_hash, planned, kind),
            place=place,
            first_token_at=first_token_at,
            ends_at=now + planned.duration,
            books=self.books,
        )

    def finish(self, call: Call, status: int, *, delivered: bool) -> None:
        """Write down the end of a call: billed unless it failed in its stream, delivered or not."""
        now = self.clock()
        row = call.row
        row.status = status
        row.billed = call.place is not Place.IN_STREAM
        row.delivered = delivered
        call.group.end(now)
        call.caller.account.in_flight -= 1
        call.books.write(row, call.group, now)

    def answer_headers(self, call: Call) -> Headers:
        """Return the headers of an answer: the organisation and the limits as they stand now."""
        return call.caller.limit_headers(call.group, self.clock())

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
        self.books.write(row, group, caller.at)
        if group is None:
            account.other["requests"] += 1
            account.other[f"outcome:{outcome}"] += 1
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
        accounts = {
            name: (account.in_flight, account.other, list(account.groups.values()))
            for name, account in self.accounts.items()
        }
        return report(self.books, accounts, self.clock(), starts=starts)

    def ledger(self) -> Iterator[dict[str, Any]]:
        """Yield every ended call, oldest first."""
        for row in list(self.books.rows):
            yield row.as_json()


def _rates(faults: dict[str, float], names: Iterable[str]) -> dict[str, float]:
    return {name: faults[name] for name in names if faults.get(name)}


def _said(error: checks.RequestError | MarkerError | RecursionError) -> Failure:
    if isinstance(error, RecursionError):
        return Failure(400, "invalid_request_error", "The request body is nested too deeply.")
    if isinstance(error, MarkerError):
        return Failure(400, "invalid_request_error", f"metadata.user_id: {error}")
    return Failure(error.status, error.type, error.message)


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
