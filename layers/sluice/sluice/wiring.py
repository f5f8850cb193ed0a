"""Composition root: the only file that names adapters. Everything is made at first use and kept."""

from __future__ import annotations

import gc
import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

from aws_lambda_powertools import Logger

from sluice.adapters import aws, job_records, system
from sluice.adapters.batch_records import DynamoBatches
from sluice.adapters.dynamodb import (
    DynamoClientKeys,
    DynamoGovernorNotes,
    DynamoJobs,
    DynamoLedger,
    DynamoLimits,
    DynamoParams,
    notes_id,
)
from sluice.adapters.lambdas import LambdaExecutions, LambdaQueueMapping
from sluice.adapters.notices import BusNotices
from sluice.adapters.s3 import DeadLetterObjects, Links, Objects, Results
from sluice.adapters.secrets import SecretHistory, SecretKeyPool, SecretText, WebhookSecrets
from sluice.adapters.sqs import (
    Hidden,
    SqsBatchesQueue,
    SqsInbox,
    SqsQueue,
    SqsRangesQueue,
    depth_of,
)
from sluice.adapters.system import SystemClock, Threads
from sluice.adapters.telemetry import Telemetry, hush
from sluice.bulk.assemble import Assemble
from sluice.bulk.plan import PlanBatch
from sluice.domain.capacity import REFILLED, UNREFILLED
from sluice.domain.errors import StoreBusy
from sluice.domain.jobs import LEASE_MS
from sluice.domain.pricing import PriceList
from sluice.domain.retries import RetryPolicy
from sluice.domain.shares import CEILINGS
from sluice.intake.accounts import Account
from sluice.intake.batches import Batches
from sluice.intake.start_estimate import StartEstimate
from sluice.intake.submit import Submit
from sluice.intake.uploads import LINK_SECONDS, Uploads
from sluice.notices.publish import Publish
from sluice.settings import MAPPINGS, Settings
from sluice.upkeep.dead_letters import TakeDeadLetter
from sluice.upkeep.governor import Governed, Governor
from sluice.upkeep.load_limits import LoadLimits
from sluice.upkeep.resume import Resume
from sluice.upkeep.sweep import Sweep
from sluice.worker.tools import Rules, Tools
from sluice.worker.work import Worker

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient
    from mypy_boto3_lambda import LambdaClient
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_secretsmanager import SecretsManagerClient
    from mypy_boto3_sqs import SQSClient

    from sluice.domain.jobs import Job
    from sluice.notices.deliver import Deliver
    from sluice.ports.jobs import Answers, CallBooks, Inbox, JobRecords, Received, Requests
    from sluice.worker.ranges import RunRange

CLOCK = SystemClock()


SAFETY_MS: Final = 15_000
"""What remains of an invocation for writing down what came, after the last call must have ended."""


LONG_TIMEOUT_MS: Final = 900_000
SHORT_TIMEOUT_MS: Final = 60_000
SHORT: Final = frozenset({"webhooks", "dead letters"})
"""The queues whose function ends after a minute at the latest, as in template.yaml; the others' after 15."""


def stop_at(remaining_ms: int) -> int:
    """Return when calls of an invocation that lasts so much longer must have ended (epoch milliseconds).

    Short time-outs keep a share of their time, so that a test's two seconds are enough to work in.
    """
    return CLOCK.now() + remaining_ms - min(SAFETY_MS, remaining_ms // 4)


@cache
def settings() -> Settings:
    """Return this deployment's settings."""
    return Settings.from_environment()


@cache
def telemetry() -> Telemetry:
    """Return the function's log and metrics."""
    hush()
    return Telemetry(Logger())


def aws_calls() -> dict[str, int]:
    """Return how often this function called AWS so far, by what the calls were about."""
    return dict(aws.CALLS)


def note_use(before: Mapping[str, int]) -> None:
    """Log what an invocation used: the most memory this function ever held, and the AWS calls since `before`."""
    calls = {what: n for what, count in aws.CALLS.items() if (n := count - before.get(what, 0))}
    telemetry().note("used", peak_mb=system.peak_mb(), aws_calls=calls)


@cache
def _dynamodb() -> DynamoDBClient:
    return aws.dynamodb()


@cache
def _s3() -> S3Client:
    return aws.s3()


@cache
def _sqs() -> SQSClient:
    return aws.sqs()


@cache
def _secrets_manager() -> SecretsManagerClient:
    return aws.secrets_manager()


@cache
def _objects() -> Objects:
    return Objects(_s3(), settings().data_bucket)


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
    pepper = SecretText(_secrets_manager(), settings().pepper_secret, CLOCK)
    return DynamoClientKeys(_dynamodb(), settings().client_keys_table, pepper, CLOCK)


@cache
def _queue() -> SqsQueue:
    return SqsQueue(_sqs(), settings().jobs_queue_url, model_groups())


@cache
def submit() -> Submit:
    """Return the use case behind `POST /jobs`."""
    return Submit(jobs(), _params(), _queue(), CLOCK, os.urandom, telemetry())


@cache
def waiting() -> StartEstimate:
    """Return how long new jobs will probably wait."""
    return StartEstimate(_queue(), limits(), CLOCK, telemetry())


def account(tenant: str) -> Account:
    """Return one tenant's view."""
    return Account(tenant, jobs(), _results(), limits(), _ledger(), CLOCK, telemetry())


@cache
def batches() -> DynamoBatches:
    """Return the records of batches and ranges."""
    return DynamoBatches(_dynamodb(), settings().batches_table, settings().retention_days, CLOCK)


@cache
def _batches_queue() -> SqsBatchesQueue:
    return SqsBatchesQueue(_sqs(), settings().batches_queue_url)


@cache
def _ranges_queue() -> SqsRangesQueue:
    return SqsRangesQueue(_sqs(), settings().ranges_queue_url)


@cache
def assemble() -> Assemble:
    """Return the use case that puts results together."""
    return Assemble(batches(), _objects(), _notices(), CLOCK, telemetry())


@cache
def _notices() -> BusNotices:
    return BusNotices(aws.events(), _sqs(), settings().webhooks_queue_url, telemetry())


@cache
def publish() -> Publish:
    """Return the use case behind the stream of the jobs table."""
    return Publish(_notices(), telemetry())


def ended_jobs(records: Iterable[Mapping[str, Any]]) -> list[tuple[str, Job]]:
    """Read the records of a stream event: each job, and the name of its record.

    A record that nobody can read is passed over: it would keep all those behind it for a day.
    """
    ended = []
    for record in records:
        change = record["dynamodb"]
        try:
            ended.append((change["SequenceNumber"], job_records.of_image(change["NewImage"])))
        except (KeyError, TypeError, ValueError):
            telemetry().problem("ended job not read", job=change.get("Keys"))
    return ended


@cache
def signing_secrets() -> WebhookSecrets:
    """Return what the secrets of webhooks are made of."""
    return WebhookSecrets(_secrets_manager(), settings().webhook_secret, CLOCK)


@cache
def deliver() -> Deliver:
    """Return the use case behind the webhooks queue. The HTTP client is imported only where it is used."""
    from sluice.adapters.web import HttpWeb  # noqa: PLC0415
    from sluice.notices.deliver import Deliver  # noqa: PLC0415

    returns = SqsInbox(
        _sqs(),
        settings().webhooks_queue_url,
        settings().dead_letters_queue_url,
        "the webhooks queue",
    )
    networks = settings().webhook_networks
    return Deliver(HttpWeb(), signing_secrets(), returns, networks, CLOCK, telemetry())


def hidden(message: Received) -> Hidden:
    """Keep a message of the batches queue hidden while it is worked on."""
    return Hidden(_sqs(), settings().batches_queue_url, message)


@cache
def plan_batch() -> PlanBatch:
    """Return the use case that cuts files into ranges."""
    return PlanBatch(
        batches(),
        _objects(),
        _ranges_queue(),
        assemble(),
        settings().webhook_networks,
        CLOCK,
        telemetry(),
    )


def uploads_of(tenant: str) -> Uploads:
    """Return one tenant's uploads."""
    links = Links(_s3(), settings().data_bucket, LINK_SECONDS)
    return Uploads(tenant, _objects(), links, plan_batch())


@cache
def resume() -> Resume:
    """Return the use case that sends ranges again, and looks after batches that stand still."""
    return Resume(
        batches(),
        batches(),
        _ranges_queue(),
        _batches_queue(),
        limits(),
        model_groups(),
        CLOCK,
        telemetry(),
    )


def batches_of(tenant: str) -> Batches:
    """Return one tenant's batches."""
    return Batches(tenant, batches(), _objects(), _batches_queue(), CLOCK, os.urandom, telemetry())


@cache
def take_dead_letter() -> TakeDeadLetter:
    """Return the use case behind the dead-letter queue."""
    return TakeDeadLetter(jobs(), DeadLetterObjects(_objects()), CLOCK, telemetry())


@cache
def _pool_history() -> SecretHistory:
    return SecretHistory(_secrets_manager(), settings().key_pool_secret, CLOCK)


@cache
def _key_pool() -> SecretKeyPool:
    return SecretKeyPool(SecretText(_secrets_manager(), settings().key_pool_secret, CLOCK))


@cache
def load_limits() -> LoadLimits:
    """Return the use case that loads limits. The HTTP client is imported only where it is used."""
    from sluice.adapters.rate_limits import HttpRateLimits  # noqa: PLC0415

    return LoadLimits(_key_pool(), HttpRateLimits(), limits(), model_groups(), CLOCK, telemetry())


@cache
def governor() -> Governor:
    """Return the use case that sets how many invocations each queue's mapping may run at once."""
    own, client = settings().governed(), aws.lambdas()
    governed = [_governed(name, client) for name in MAPPINGS]
    executions = LambdaExecutions(client, CLOCK, own.executions)
    return Governor(governed, limits(), _pool_history(), executions, CLOCK, telemetry())


def _governed(name: str, client: LambdaClient) -> Governed:
    """Return a mapping for the governor, by what its queue holds."""
    from sluice.worker.desk import AT_ONCE  # noqa: PLC0415

    own = settings().governed()
    queue_urls = {
        "jobs": settings().jobs_queue_url,
        "ranges": settings().ranges_queue_url,
        "batches": settings().batches_queue_url,
        "webhooks": settings().webhooks_queue_url,
        "dead letters": settings().dead_letters_queue_url,
        "range dead letters": settings().range_dead_letters_queue_url,
    }
    ceilings = {"jobs": own.max_concurrency, "ranges": own.bulk_concurrency, **CEILINGS}
    is_ranges = name == "ranges"
    return Governed(
        name,
        LambdaQueueMapping(
            client,
            own.mappings[name],
            f"the mapping of {name}",
            slots_per_message=AT_ONCE if is_ranges else 1,
            busy=UNREFILLED if is_ranges else REFILLED,
        ),
        partial(depth_of, _sqs(), queue_urls[name], f"the queue of {name}"),
        DynamoGovernorNotes(_dynamodb(), settings().limits_table, notes_id(name)),
        ceilings[name],
        timeout_ms=SHORT_TIMEOUT_MS if name in SHORT else LONG_TIMEOUT_MS,
        calls_claude=name not in CEILINGS,
        refills=name == "jobs",
    )


@cache
def sweep() -> Sweep:
    """Return the use case that sends parked jobs again."""
    return Sweep(
        jobs(), jobs(), _queue(), limits(), _pool_history(), model_groups(), CLOCK, telemetry()
    )


@cache
def _inbox() -> SqsInbox:
    return SqsInbox(_sqs(), settings().jobs_queue_url, settings().dead_letters_queue_url)


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
    """Return the worker for messages of the jobs queue."""
    return _worker(jobs(), _params(), _results(), _inbox(), _ledger(), Threads())


@cache
def run_range() -> RunRange:
    """Return the use case behind the ranges queue, with a worker for the rows of a range."""
    from sluice.worker.desk import Desk, RowRequests  # noqa: PLC0415
    from sluice.worker.ranges import RangeTools, RunRange  # noqa: PLC0415

    desk = Desk(_ledger(), prices(), CLOCK)
    threads = Threads()
    returns = SqsInbox(
        _sqs(),
        settings().ranges_queue_url,
        settings().range_dead_letters_queue_url,
        "the ranges queue",
    )
    tools = RangeTools(
        batches=batches(),
        objects=_objects(),
        queue=_batches_queue(),
        returns=returns,
        text_of_job=job_records.as_text,
        job_of_text=job_records.of_text,
        clock=CLOCK,
        blocking=threads,
        events=telemetry(),
    )
    rows = _worker(desk, RowRequests(desk), desk, desk, desk, threads)
    return RunRange(tools, rows, desk)


def _worker(  # noqa: PLR0913, PLR0917 - what differs between jobs of the queue and rows of a range
    records: JobRecords,
    requests: Requests,
    answers: Answers,
    inbox: Inbox,
    books: CallBooks,
    threads: Threads,
) -> Worker:
    """Return a worker. Only here the Anthropic SDK is imported: it costs a second and 80 MB."""
    from sluice.adapters.claude import SdkClaude  # noqa: PLC0415

    tools = Tools(
        jobs=records,
        params=requests,
        results=answers,
        inbox=inbox,
        limits=limits(),
        keys=_key_pool(),
        claude=SdkClaude(CLOCK),
        ledger=books,
        clock=CLOCK,
        jitter=random.Random().random,  # noqa: S311 - jitter, not a secret
        blocking=threads,
        events=telemetry(),
    )
    waits = settings().waits
    rules = Rules(
        policy=RetryPolicy(
            max_attempts=settings().max_attempts,
            overload_base_ms=waits.overload_base_ms,
            overload_cap_ms=waits.overload_cap_ms,
        ),
        prices=prices(),
        model_groups=model_groups(),
        waits=waits,
    )
    # 200,000 objects of the SDKs stay for the life of the environment: the collector need not go through them again.
    gc.freeze()
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
