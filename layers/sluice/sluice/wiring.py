"""Composition root: the only file that names adapters. Everything is made at first use and kept."""

from __future__ import annotations

import json
import os
import random
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from aws_lambda_powertools import Logger

from sluice.accounts import Account
from sluice.adapters import aws
from sluice.adapters.dynamodb import (
    DynamoClientKeys,
    DynamoGovernorNotes,
    DynamoJobs,
    DynamoLedger,
    DynamoLimits,
    DynamoParams,
)
from sluice.adapters.lambdas import LambdaWorkerMapping
from sluice.adapters.s3 import DeadLetterObjects, Objects, Results
from sluice.adapters.secrets import SecretHistory, SecretKeyPool, SecretText
from sluice.adapters.sqs import SqsInbox, SqsQueue
from sluice.adapters.system import SystemClock, Threads
from sluice.adapters.telemetry import Telemetry, hush
from sluice.dead_letters import TakeDeadLetter
from sluice.domain.errors import StoreBusy
from sluice.domain.pricing import PriceList
from sluice.domain.retries import RetryPolicy
from sluice.governor import Governor
from sluice.load_limits import LoadLimits
from sluice.settings import Settings
from sluice.submit import Submit, Waiting
from sluice.sweep import Sweep
from sluice.work import LEASE_MS, Rules, Tools, Worker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mypy_boto3_dynamodb import DynamoDBClient

    from sluice.ports import Received

CLOCK = SystemClock()


@cache
def settings() -> Settings:
    """Return this deployment's settings."""
    return Settings.from_environment()


@cache
def telemetry() -> Telemetry:
    """Return the function's log and metrics."""
    hush()
    return Telemetry(Logger())


@cache
def _dynamodb() -> DynamoDBClient:
    return aws.dynamodb()


@cache
def _objects() -> Objects:
    return Objects(aws.s3(), settings().data_bucket)


@cache
def jobs() -> DynamoJobs:
    """Return the job records."""
    return DynamoJobs(_dynamodb(), settings().jobs_table, settings().retention_days)


@cache
def _params() -> DynamoParams:
    return DynamoParams(
        _dynamodb(), settings().params_table, _objects(), CLOCK, settings().retention_days
    )


@cache
def _results() -> Results:
    return Results(_objects())


@cache
def limits() -> DynamoLimits:
    """Return the shared limits."""
    return DynamoLimits(_dynamodb(), settings().limits_table)


@cache
def _ledger() -> DynamoLedger:
    return DynamoLedger(_dynamodb(), settings().ledger_table, settings().usage_table)


@cache
def client_keys() -> DynamoClientKeys:
    """Return who may submit."""
    pepper = SecretText(aws.secrets_manager(), settings().pepper_secret, CLOCK)
    return DynamoClientKeys(_dynamodb(), settings().client_keys_table, pepper, CLOCK)


@cache
def _queue() -> SqsQueue:
    return SqsQueue(aws.sqs(), settings().jobs_queue_url, model_groups())


@cache
def submit() -> Submit:
    """Return the use case behind `POST /jobs`."""
    return Submit(jobs(), _params(), _queue(), CLOCK, os.urandom, telemetry())


@cache
def waiting() -> Waiting:
    """Return how long new jobs will probably wait."""
    return Waiting(_queue(), limits(), CLOCK, telemetry())


def account(tenant: str) -> Account:
    """Return one tenant's view."""
    return Account(tenant, jobs(), _results(), limits(), _ledger(), CLOCK, telemetry())


@cache
def take_dead_letter() -> TakeDeadLetter:
    """Return the use case behind the dead-letter queue."""
    return TakeDeadLetter(jobs(), DeadLetterObjects(_objects()), CLOCK, telemetry())


@cache
def _pool_history() -> SecretHistory:
    return SecretHistory(aws.secrets_manager(), settings().key_pool_secret, CLOCK)


@cache
def _key_pool() -> SecretKeyPool:
    return SecretKeyPool(SecretText(aws.secrets_manager(), settings().key_pool_secret, CLOCK))


@cache
def load_limits() -> LoadLimits:
    """Return the use case that loads limits. The HTTP client is imported only where it is used."""
    from sluice.adapters.rate_limits import HttpRateLimits  # noqa: PLC0415

    return LoadLimits(_key_pool(), HttpRateLimits(), limits(), model_groups(), CLOCK, telemetry())


@cache
def governor() -> Governor:
    """Return the use case that sets how many workers may run."""
    mapping, ceiling = settings().governed()
    return Governor(
        LambdaWorkerMapping(aws.lambdas(), mapping),
        limits(),
        _queue(),
        DynamoGovernorNotes(_dynamodb(), settings().limits_table),
        _pool_history(),
        ceiling,
        CLOCK,
        telemetry(),
    )


@cache
def sweep() -> Sweep:
    """Return the use case that sends parked jobs again."""
    return Sweep(
        jobs(), jobs(), _queue(), limits(), _pool_history(), model_groups(), CLOCK, telemetry()
    )


@cache
def _inbox() -> SqsInbox:
    return SqsInbox(aws.sqs(), settings().jobs_queue_url, settings().dead_letters_queue_url)


def hold_while_starting(messages: Sequence[Received]) -> None:
    """Shorten the messages' visibility before the worker is made, which takes a second or two the first time.

    If this environment dies meanwhile, they come back with the lease, and not with the queue's visibility timeout.
    """
    if worker.cache_info().currsize:
        return
    try:
        _inbox().keep_hidden(messages, LEASE_MS)
    except StoreBusy:
        # The worker does it again at once.
        telemetry().problem("messages not held", messages=len(messages))


@cache
def worker() -> Worker:
    """Return the worker. Only here the Anthropic SDK is imported: it costs a second and 80 MB."""
    from sluice.adapters.claude import SdkClaude  # noqa: PLC0415

    tools = Tools(
        jobs=jobs(),
        params=_params(),
        results=_results(),
        inbox=_inbox(),
        limits=limits(),
        keys=_key_pool(),
        claude=SdkClaude(CLOCK),
        ledger=_ledger(),
        clock=CLOCK,
        jitter=random.Random().random,  # noqa: S311 - jitter, not a secret
        blocking=Threads(),
        events=telemetry(),
    )
    rules = Rules(
        policy=RetryPolicy(max_attempts=settings().max_attempts),
        prices=prices(),
        model_groups=model_groups(),
    )
    return Worker(tools, rules)


@cache
def prices() -> PriceList:
    """Return the price list."""
    return PriceList.from_rows(_data("prices.json")["prices"])


@cache
def model_groups() -> dict[str, str]:
    """Return which limit group's name each known model has."""
    return {
        model: row["group"]
        for row in _data("model_groups.json")["groups"]
        for model in row["models"]
    }


def _data(name: str) -> Any:
    return json.loads(files("sluice.data").joinpath(name).read_text(encoding="utf-8"))
