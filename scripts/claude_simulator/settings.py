"""What can be configured, read from JSON; the first thing that is wrong gets one clear message."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from scripts.claude_simulator.faults import FAILURES, KINDS, Place
from scripts.claude_simulator.limits import SECOND, Limits, Rules

PerMinute = Annotated[int, Field(ge=1)] | None
Seconds = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(ge=0, le=1)]
InputLimitType = Literal["input_tokens_per_minute_cache_aware", "input_tokens_per_minute"]
LONG_ANSWER_TOKENS = 300_000
MAY_ANSWER_LONG_FROM = 128_000


class SettingsError(ValueError):
    """The configuration is wrong; the message is one line that says where and why."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LimitSettings(_Part):
    """Limits per minute of one model group; null is no limit of that kind."""

    rpm: PerMinute = 1000
    itpm: PerMinute = 2_000_000
    otpm: PerMinute = 400_000

    def limits(self) -> Limits:
        """Return them in the words of the arithmetic."""
        return Limits(self.rpm, self.itpm, self.otpm)


class WorkspaceLimitSettings(_Part):
    """Lower limits a workspace sets for one model group; null leaves the organization's alone."""

    rpm: PerMinute = None
    itpm: PerMinute = None
    otpm: PerMinute = None

    def limits(self) -> Limits:
        """Return them in the words of the arithmetic."""
        return Limits(self.rpm, self.itpm, self.otpm)


class Workspace(_Part):
    """One more workspace of an organization, with keys of its own."""

    keys: tuple[str, ...] = ()
    limits: dict[str, WorkspaceLimitSettings] = Field(default_factory=dict)

    def limits_of(self, group: str) -> Limits | None:
        """Return the limits it sets for a model group, or by `default` for each."""
        found = self.limits.get(group) or self.limits.get("default")
        return None if found is None else found.limits()


class BatchLimitSettings(_Part):
    """Limits of the Message Batches API, shared by all models; null is no limit of that kind."""

    rpm: PerMinute = 1000
    queued_requests: Annotated[int, Field(ge=1)] | None = 200_000


class Regime(_Part):
    """How long batches of one day take: lognormal, and never less than `at_least_seconds`."""

    median_seconds: Annotated[float, Field(gt=0)]
    sigma: Annotated[float, Field(ge=0, le=5)]
    at_least_seconds: Seconds = 60.0


class Regimes(_Part):
    """Completion times as users report them: of normal and of slow days, whatever the size of a batch.

    `speed` divides all of it: the times, the day they belong to, and the day after which requests expire.
    """

    speed: Annotated[float, Field(gt=0, le=86_400)] = 1.0
    slow_day_rate: Rate = 2 / 7
    normal: Regime = Regime(median_seconds=7 * 60, sigma=1.68)
    slow: Regime = Regime(median_seconds=21 * 60, sigma=2.2)


class BatchService(_Part):
    """How Message Batches are worked off; a batch keeps the speed it began with.

    A batch takes a time of its `regimes`, or else `seconds`, whatever its size, or by `items_per_second`; null is at
    once.
    """

    regimes: Regimes | None = None

    start_seconds: Seconds = 0.0
    seconds: Seconds | None = None
    items_per_second: Annotated[float, Field(gt=0)] | None = 100.0
    cancel_seconds: Seconds = 1.0
    errored_rate: Rate = 0.0
    expired_rate: Rate = 0.0
    create_faults: dict[str, Rate] = Field(default_factory=dict)
    not_found_seconds: Seconds = 0.0
    not_found_rate: Rate = 0.0
    results_url: Literal["absolute", "relative"] = "absolute"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for name in self.create_faults:
            if name not in FAILURES or FAILURES[name].place is Place.IN_STREAM:
                message = f'create_faults: "{name}" is not a failure of a non-streaming call'
                raise ValueError(message)
        for rates in (self.create_faults.values(), (self.errored_rate, self.expired_rate)):
            if sum(rates) > 1:
                message = "create_faults, or errored_rate and expired_rate, add up to more than 1"
                raise ValueError(message)
        return self

    def duration_of(self, items: int) -> int:
        """Return the nanoseconds a batch of so many requests is worked on."""
        if self.seconds is not None:
            return round(self.seconds * SECOND)
        return 0 if self.items_per_second is None else round(items / self.items_per_second * SECOND)


class Organization(_Part):
    """One organization: its keys, its limits, and how it enforces and reports them.

    `keys` belong to `workspace`, the default one; it cannot set limits of its own.
    """

    id: str = Field(default="org-one", min_length=1)
    workspace: str = "wrkspc_default"
    keys: tuple[str, ...] = ("sk-ant-test-one",)
    workspaces: dict[str, Workspace] = Field(default_factory=dict)
    admin_keys: tuple[Annotated[str, Field(pattern="^sk-ant-admin")], ...] = ()
    limits: dict[str, LimitSettings] = Field(default_factory=dict)
    input_limit_type: InputLimitType = "input_tokens_per_minute_cache_aware"
    batch_limits: BatchLimitSettings = BatchLimitSettings()
    count_tokens_rpm: PerMinute = 2000
    burst_seconds: Annotated[float, Field(gt=0, le=3600)] = 60.0
    request_burst_seconds: Annotated[float, Field(gt=0, le=3600)] | None = None
    retry_after: Literal["next_slot", "full", "none"] = "next_slot"
    limit_headers: bool = True
    reserve_max_tokens: bool = False
    max_in_flight: Annotated[int, Field(ge=1)] | None = None
    blocked_by: str | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.blocked_by is not None and self.blocked_by not in FAILURES:
            message = (
                f'blocked_by: unknown failure "{self.blocked_by}"; use one of {", ".join(FAILURES)}'
            )
            raise ValueError(message)
        if self.workspace in self.workspaces:
            message = (
                f"workspaces: {self.workspace} is the default workspace; set it in workspace only"
            )
            raise ValueError(message)
        return self

    def all_keys(self) -> dict[str, str]:
        """Return every key that may call Claude, with the workspace it belongs to."""
        keys = dict.fromkeys(self.keys, self.workspace)
        for name, workspace in self.workspaces.items():
            keys |= dict.fromkeys(workspace.keys, name)
        return keys

    def limits_of(self, group: str) -> Limits:
        """Return the limits of a model group: its own, or `default`, or the Start tier's."""
        found = self.limits.get(group) or self.limits.get("default") or LimitSettings()
        return found.limits()

    def rules(self) -> Rules:
        """Return how the buckets behave, in the words of the arithmetic."""
        short = self.request_burst_seconds
        return Rules(
            burst=round(self.burst_seconds * SECOND),
            request_burst=None if short is None else round(short * SECOND),
            retry_after=self.retry_after,
            reserve_max_tokens=self.reserve_max_tokens,
        )


class Service(_Part):
    """How fast answers come and how long they are: lognormal around a median, fixed if sigma is 0.

    A `tokens_per_second` of null is unlimited: the whole answer comes with its first token.
    """

    ttft_seconds: Seconds = 0.8
    ttft_sigma: Annotated[float, Field(ge=0, le=5)] = 0.3
    tokens_per_second: Annotated[float, Field(ge=0.001)] | None = 80.0
    output_tokens: Annotated[float, Field(ge=1)] = 300.0
    output_tokens_sigma: Annotated[float, Field(ge=0, le=5)] = 0.6
    input_estimate_percent: Annotated[int, Field(ge=1, le=1000)] = 100


class Model(_Part):
    """One model: the group whose buckets it shares, its bounds, and what it accepts."""

    id: str
    group: str
    aliases: tuple[str, ...] = ()
    display_name: str = ""
    line: str | None = None
    created_at: str = "1970-01-01T00:00:00Z"
    lifecycle: Literal["active", "deprecated", "retired"] = "active"
    retires_at: str | None = None
    max_input_tokens: Annotated[int, Field(ge=1)] = 1_000_000
    max_tokens: Annotated[int, Field(ge=1)] = 128_000
    tokens_per_1000_characters: Annotated[int, Field(ge=1)] = 325
    thinking: tuple[str, ...] = ("adaptive", "disabled", "between_tools")
    prefill: bool = False


class Settings(_Part):
    """The whole configuration."""

    seed: int = 1
    service: Service = Service()
    service_by_group: dict[str, Service] = Field(default_factory=dict)
    faults: dict[str, Rate] = Field(default_factory=dict)
    batches: BatchService = BatchService()
    ramp_retry_after_seconds: Annotated[int, Field(ge=1)] = 5
    organisations: tuple[Organization, ...] = (Organization(),)
    models: dict[str, Model] = Field(default_factory=dict)
    revoke_at: dict[str, Seconds] = Field(default_factory=dict)
    ledger_rows: Annotated[int, Field(ge=0)] = 1_000_000

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        known = (*FAILURES, *KINDS)
        for name in self.faults:
            if name not in known:
                message = f'faults: unknown fault "{name}"; use one of {", ".join(known)}'
                raise ValueError(message)
        for names, sort in ((FAILURES, "failures"), (KINDS, "kinds of answer")):
            if sum(self.faults.get(name, 0.0) for name in names) > 1:
                message = f"faults: the rates of {sort} add up to more than 1"
                raise ValueError(message)
        seen: dict[str, str] = {}
        for organisation in self.organisations:
            extra = [key for part in organisation.workspaces.values() for key in part.keys]
            for key in (*organisation.keys, *extra, *organisation.admin_keys):
                if key in seen:
                    message = (
                        f"organisations: duplicate key {key} ({seen[key]} and {organisation.id})"
                    )
                    raise ValueError(message)
                seen[key] = organisation.id
        ids = [organisation.id for organisation in self.organisations]
        if len(set(ids)) < len(ids):
            message = "organisations: duplicate id"
            raise ValueError(message)
        return self


def read(data: object) -> Settings:
    """Return the settings written in `data`, or raise `SettingsError`."""
    try:
        return Settings.model_validate(_with_model_ids(data))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        text = first["msg"].removeprefix("Value error, ")
        raise SettingsError(f"{place}: {text}" if place else text) from error


def read_file(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or raise `SettingsError`."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        message = f"{path}: {error.strerror}"
        raise SettingsError(message) from error
    except ValueError as error:
        message = f"{path}: not valid JSON ({error})"
        raise SettingsError(message) from error
    if not isinstance(data, dict):
        message = f"{path}: not a JSON object"
        raise SettingsError(message)
    return data


def merged(settings: Settings, patch: object) -> Settings:
    """Return the settings with `patch` over them: objects by key, organizations by id."""
    if not isinstance(patch, dict):
        message = "not a JSON object"
        raise SettingsError(message)
    base = settings.model_dump()
    patch = dict(patch)
    organisations = {organisation["id"]: organisation for organisation in base["organisations"]}
    changes = patch.pop("organisations", [])
    if not isinstance(changes, list):
        message = "organisations: not a list"
        raise SettingsError(message)
    for change in changes:
        if not isinstance(change, dict) or not isinstance(change.get("id"), str):
            message = "organisations: each needs an id"
            raise SettingsError(message)
        organisations[change["id"]] = _laid_over(organisations.get(change["id"], {}), change)
    base["organisations"] = list(organisations.values())
    return read(_laid_over(base, patch))


def _laid_over(base: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for name, value in patch.items():
        old = result.get(name)
        result[name] = (
            _laid_over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return result


def _with_model_ids(data: object) -> object:
    if isinstance(data, dict) and isinstance(data.get("models"), dict):
        models = {
            name: {"id": name, **model} if isinstance(model, dict) else model
            for name, model in data["models"].items()
        }
        return {**data, "models": models}
    return data


@cache
def known_models() -> tuple[Model, ...]:
    """Return the models Claude's API offers, newest first (`models.json`)."""
    text = Path(__file__).with_name("models.json").read_text("utf-8")
    return tuple(Model.model_validate(model) for model in json.loads(text))


def catalogue(settings: Settings) -> dict[str, Model]:
    """Return every model by id and alias: the known ones, with those of the settings over them."""
    by_id = {model.id: model for model in known_models()} | settings.models
    return {name: model for model in by_id.values() for name in (model.id, *model.aliases)}


def with_long_answers(models: dict[str, Model]) -> dict[str, Model]:
    """Return the models as the beta for long answers in batches allows them: up to 300k tokens."""
    return {
        name: model.model_copy(update={"max_tokens": LONG_ANSWER_TOKENS})
        if model.max_tokens >= MAY_ANSWER_LONG_FROM
        else model
        for name, model in models.items()
    }
