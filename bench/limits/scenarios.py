"""The scenarios as data, with the jobs of each."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from scripts.claude_simulator import answers, checks, settings
from scripts.claude_simulator.faults import FAILURES, NO_SCRIPT, Place, drawn

Json = dict[str, Any]

MODEL: Final = "claude-haiku-5-5"
MOST_CALLS_PER_JOB: Final = 100
FEWEST_WORDS, MOST_WORDS = 30, 200
WORDS: Final = (
    *("lock", "gate", "water", "level", "barge", "keeper", "river", "order", "letter", "parcel"),
    *("invoice", "ticket", "kettle", "review", "harbour", "ledger", "morning", "report"),
    *("summary", "question", "answer", "customer", "delivery", "address", "refund", "city"),
    *("street", "winter", "summer", "price", "colour", "paper", "window", "garden", "bridge"),
    *("market", "station", "signal", "machine"),
)


@dataclass(frozen=True, slots=True)
class Service:
    """How fast answers come and how long they are (lognormal: median and sigma)."""

    ttft_seconds: float = 0.5
    ttft_sigma: float = 0.4
    tokens_per_second: float = 120.0
    output_tokens: float = 60.0
    output_tokens_sigma: float = 0.4


@dataclass(frozen=True, slots=True)
class Organization:
    """One organization upstream, with one key for the client under test."""

    id: str
    requests_per_minute: int
    output_tokens_per_minute: int = 400_000
    input_tokens_per_minute: int = 2_000_000

    @property
    def key(self) -> str:
        """The key of the client under test."""
        return f"sk-ant-test-{self.id}"

    @property
    def stranger_key(self) -> str:
        """The key of another client of this organization."""
        return f"sk-ant-test-{self.id}-stranger"


@dataclass(frozen=True, slots=True)
class Change:
    """A new request limit, at this time after the first submission."""

    after_seconds: float
    organisation: str
    requests_per_minute: int


@dataclass(frozen=True, slots=True)
class Target:
    """The targets for Sluice: minimum score, and maximum 429s per answer."""

    score: float
    rate_limited_per_answer: float


@dataclass(frozen=True, slots=True)
class Scenario:
    """One piece of work, and the upstream that runs it."""

    name: str
    title: str
    jobs: int
    organisations: tuple[Organization, ...]
    service: Service = Service()
    max_tokens: int = 1024
    burst_seconds: float = 10.0
    request_burst_seconds: float | None = None
    """Requests are also held to a bucket of so many seconds that no header shows."""
    retry_after: str = "next_slot"
    faults: Mapping[str, float] = field(default_factory=dict)
    revoked_after_seconds: Mapping[str, float] = field(default_factory=dict)
    """When the key of an organization is revoked."""
    changes: tuple[Change, ...] = ()
    stranger_jobs: int = 0
    """Jobs that another client of the first organization runs at the same time."""
    target: Target | None = None

    def scaled(self, factor: float) -> Scenario:
        """Return a shorter scenario: fewer jobs, and what happens midway earlier."""
        if factor == 1:
            return self
        return replace(
            self,
            jobs=max(1, round(self.jobs * factor)),
            stranger_jobs=round(self.stranger_jobs * factor),
            revoked_after_seconds={
                name: seconds * factor for name, seconds in self.revoked_after_seconds.items()
            },
            changes=tuple(
                replace(change, after_seconds=change.after_seconds * factor)
                for change in self.changes
            ),
        )

    def simulator(self, seed: int) -> Json:
        """Return the simulator's configuration (a revocation comes later: the clock is not running)."""
        return {
            "seed": seed,
            "service": {name: getattr(self.service, name) for name in Service.__slots__},
            "faults": dict(self.faults),
            "organisations": [
                {
                    "id": organisation.id,
                    "keys": [organisation.key, organisation.stranger_key],
                    "limits": {
                        "default": {
                            "rpm": organisation.requests_per_minute,
                            "itpm": organisation.input_tokens_per_minute,
                            "otpm": organisation.output_tokens_per_minute,
                        }
                    },
                    "burst_seconds": self.burst_seconds,
                    "request_burst_seconds": self.request_burst_seconds,
                    "retry_after": self.retry_after,
                }
                for organisation in self.organisations
            ],
        }

    def events(self) -> list[tuple[float, Json]]:
        """Return what is posted to the simulator's configuration, and when, in order."""
        keys = {organisation.id: organisation.key for organisation in self.organisations}
        events: list[tuple[float, Json]] = [
            (seconds, {"revoke": [keys[name]]})
            for name, seconds in self.revoked_after_seconds.items()
        ]
        for change in self.changes:
            limits = {"default": {"rpm": change.requests_per_minute}}
            patch = {"organisations": [{"id": change.organisation, "limits": limits}]}
            events.append((change.after_seconds, patch))
        return sorted(events, key=lambda event: event[0])

    def requests(self, seed: int, *, stranger: bool = False) -> list[Json]:
        """Return the Messages requests of the client under test, or of the stranger; all differ."""
        whose = "stranger" if stranger else "job"
        chance = random.Random(f"{seed} {self.name} {whose}")  # noqa: S311 - not a secret
        return [
            {
                "model": MODEL,
                "max_tokens": self.max_tokens,
                "messages": [{"role": "user", "content": _prompt(f"{whose} {number}", chance)}],
            }
            for number in range(1, (self.stranger_jobs if stranger else self.jobs) + 1)
        ]


def _prompt(name: str, chance: random.Random) -> str:
    count = chance.randint(FEWEST_WORDS, MOST_WORDS) - 2
    return f"{name} {' '.join(chance.choices(WORDS, k=count))}"


@dataclass(frozen=True, slots=True)
class Need:
    """What the buckets must admit for a list of requests to be answered."""

    requests: int
    input_tokens: int
    output_tokens: int

    def __add__(self, other: Need) -> Need:
        return Need(
            self.requests + other.requests,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
        )


def need(scenario: Scenario, requests: list[Json], seed: int) -> Need:
    """Return what these requests take, calls that are cut after billing and made again included.

    The simulator's chance depends on the seed and the content alone, so this is known beforehand.
    """
    chosen = settings.read(scenario.simulator(seed))
    model = settings.catalogue(chosen)[MODEL]
    failures = {name: rate for name, rate in chosen.faults.items() if name in FAILURES}
    total = Need(0, 0, 0)
    for params in requests:
        content = answers.params_hash(params)
        planned = answers.plan(
            chosen.service, NO_SCRIPT, params["max_tokens"], answers.chances(seed, content), "text"
        )
        calls = _calls_through_the_buckets(seed, content, failures)
        tokens = checks.measure(params, model, cached=False).tokens
        total += Need(calls, calls * tokens, calls * planned.output_tokens)
    return total


def _calls_through_the_buckets(seed: int, content: str, failures: dict[str, float]) -> int:
    calls = 0
    for nth in range(MOST_CALLS_PER_JOB):
        failure = drawn(failures, answers.chances(seed, content, nth)[3]) if failures else None
        if failure is None:
            return calls + 1
        if FAILURES[failure].place not in {Place.BEFORE, Place.DROP_BEFORE}:
            calls += 1
    return calls


# The service, prompts, limits and faults are those of the figures Sluice is compared with: time to
# first token median 0.5 s, sigma 0.4; 120 tokens a second; outputs median 60, sigma 0.4; prompts of
# 30 to 200 words; buckets of 10 s.
_ONE = (Organization("one", 600),)

SCENARIOS: Final = (
    Scenario(
        name="plain",
        title="600 RPM, burst 10 s",
        jobs=1500,
        organisations=_ONE,
        target=Target(0.97, 0.01),
    ),
    Scenario(
        name="tokens",
        title="output-token bound, heavy tail",
        jobs=700,
        organisations=(Organization("one", 2000, output_tokens_per_minute=240_000),),
        service=Service(tokens_per_second=200.0, output_tokens=300.0, output_tokens_sigma=1.2),
        max_tokens=4096,
        target=Target(0.92, 0.05),
    ),
    Scenario(
        name="unequal",
        title="4 unequal organisations",
        jobs=2000,
        organisations=tuple(Organization(f"org-{rpm}", rpm) for rpm in (100, 200, 400, 800)),
        target=Target(0.95, 0.01),
    ),
    Scenario(
        name="faults",
        title="faults, one key revoked midway",
        jobs=1000,
        organisations=tuple(Organization(f"org-{name}", 300) for name in ("a", "b", "c")),
        faults={"529": 0.10, "drop_before_billing": 0.01, "drop_after_billing": 0.01},
        revoked_after_seconds={"org-b": 30.0},
        target=Target(0.91, 0.02),
    ),
    Scenario(
        name="stranger",
        title="limit shared with a stranger",
        jobs=1000,
        organisations=_ONE,
        stranger_jobs=500,
        target=Target(0.95, 0.3),
    ),
    Scenario(
        name="short-burst",
        title="burst of 1 s",
        jobs=1500,
        organisations=_ONE,
        burst_seconds=1.0,
        target=Target(0.96, 0.01),
    ),
    Scenario(
        name="retry-after-full",
        title="`retry-after` until the bucket is full",
        jobs=1500,
        organisations=_ONE,
        retry_after="full",
        target=Target(0.96, 0.01),
    ),
    Scenario(
        name="changing",
        title="limit halved, later doubled",
        jobs=1200,
        organisations=_ONE,
        changes=(Change(40.0, "one", 300), Change(90.0, "one", 600)),
    ),
)

HIDDEN: Final = tuple(
    Scenario(
        name=f"hidden-{seconds}",
        title=f"600 RPM, at most {seconds} s of them at once, which no header shows",
        jobs=1500,
        organisations=_ONE,
        burst_seconds=60.0,
        request_burst_seconds=float(seconds),
    )
    for seconds in (1, 5)
)
"""Upstream may enforce 60 requests per minute as one per second (Anthropic, rate limits): on the virtual clock only."""
