"""What every function uses: clock, settings, log and metrics, AWS clients, prices and model groups."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

from aws_lambda_powertools import Logger

from sluice.adapters import aws
from sluice.adapters.system import SystemClock
from sluice.adapters.telemetry import Telemetry, quiet_libraries
from sluice.domain.pricing import PriceList
from sluice.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_secretsmanager import SecretsManagerClient
    from mypy_boto3_sqs import SQSClient

CLOCK: Final = SystemClock()

SAFETY_MS: Final = 15_000
"""Time kept at the end of an invocation to store results, after the last call must have ended."""


def stop_at(remaining_ms: int) -> int:
    """Return when the calls of an invocation with this much time left must have ended (epoch milliseconds).

    With a short timeout only a share of it is kept, so that a test with two seconds has time left for calls.
    """
    return CLOCK.now() + remaining_ms - min(SAFETY_MS, remaining_ms // 4)


@cache
def settings() -> Settings:
    """Return this deployment's settings."""
    return Settings.from_environment()


@cache
def telemetry() -> Telemetry:
    """Return the function's log and metrics."""
    quiet_libraries()
    return Telemetry(Logger())


@cache
def dynamodb() -> DynamoDBClient:
    """Return the client for DynamoDB."""
    return aws.dynamodb()


@cache
def s3() -> S3Client:
    """Return the client for S3."""
    return aws.s3()


@cache
def sqs() -> SQSClient:
    """Return the client for SQS."""
    return aws.sqs()


@cache
def secrets_manager() -> SecretsManagerClient:
    """Return the client for Secrets Manager."""
    return aws.secrets_manager()


@cache
def prices() -> PriceList:
    """Return the price list."""
    return PriceList.from_rows(_data("prices.json")["prices"])


@cache
def model_groups() -> dict[str, str]:
    """Return the name of each deployed model's limit group: of those with a price, and of those that share one."""
    priced = {model: model for price in prices().prices for model in price.models}
    shared = _data("model_groups.json")["groups"]
    return priced | {model: row["group"] for row in shared for model in row["models"]}


def _data(name: str) -> Any:
    return json.loads(files("sluice.data").joinpath(name).read_text(encoding="utf-8"))
