"""How we call AWS: one place for time-outs, short retries and the meaning of AWS's errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
)
from botocore.exceptions import (
    ConnectionError as BotoConnectionError,
)
from tenacity import (
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_random_exponential,
)

from sluice.domain.errors import StoreBusy

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient
    from mypy_boto3_events import EventBridgeClient
    from mypy_boto3_lambda import LambdaClient
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_secretsmanager import SecretsManagerClient
    from mypy_boto3_sqs import SQSClient

T = TypeVar("T")

CONFIG = Config(
    connect_timeout=2,
    read_timeout=10,
    max_pool_connections=32,
    # A tenth of a worker's processor time goes into it, and every call is made by a line that a test runs.
    parameter_validation=False,
    # botocore puts its own long one together twice for each call, which takes as long as signing it.
    user_agent="sluice",
    # One layer retries: `patiently` below, which knows what is worth it.
    retries={"total_max_attempts": 1},
)

S3_CONFIG = Config(
    # Links are signed in the old way unless told otherwise, which newer regions do not take.
    signature_version="s3v4",
    # A link cannot demand a checksum of whoever uses it.
    request_checksum_calculation="when_required",
)

_PASSING = frozenset(
    {
        "InternalError",
        "InternalFailure",
        "InternalServerError",
        "InternalServiceError",
        "InternalServiceErrorException",
        "LimitExceededException",
        "OverLimit",
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestTimeout",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
        "TransactionInProgressException",
    }
)


CALLS: Counter[str] = Counter()
"""Calls made so far, repeats among them, by what they were about; for benches. Threads may lose a few."""


REFUSED: Counter[str] = Counter()
"""Calls that AWS refused for want of a permission, not reported yet: how often, by operation and what it was about."""

_NOT_PERMITTED = frozenset({"AccessDenied", "AccessDeniedException", "403"})
"""The last is S3's answer to HEAD, which has no body to name an error in."""


def dynamodb() -> DynamoDBClient:
    """Return a DynamoDB client."""
    return boto3.client("dynamodb", config=CONFIG)


def sqs() -> SQSClient:
    """Return an SQS client."""
    return boto3.client("sqs", config=CONFIG)


def s3() -> S3Client:
    """Return an S3 client."""
    return boto3.client("s3", config=CONFIG.merge(S3_CONFIG))


def events() -> EventBridgeClient:
    """Return an EventBridge client."""
    return boto3.client("events", config=CONFIG)


def lambdas() -> LambdaClient:
    """Return a Lambda client."""
    return boto3.client("lambda", config=CONFIG)


def secrets_manager() -> SecretsManagerClient:
    """Return a Secrets Manager client."""
    return boto3.client("secretsmanager", config=CONFIG)


def code(error: ClientError) -> str:
    """Return AWS's name of the error."""
    return str(error.response.get("Error", {}).get("Code", ""))


def is_passing(error: BaseException) -> bool:
    """Return whether the same call may succeed in a moment: throttled, unavailable, connection trouble."""
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return code(error) in _PASSING or status >= 500  # noqa: PLR2004 - HTTP
    return isinstance(error, (BotoConnectionError, HTTPClientError))


def may_be_done(error: BaseException) -> bool:
    """Return whether AWS may have done the call all the same: the reply was lost, or was a 5xx."""
    if isinstance(error, ClientError):
        return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500  # noqa: PLR2004 - HTTP
    return not isinstance(error, ConnectTimeoutError | EndpointConnectionError)


def note_refusal(operation: str, what: str) -> None:
    """Remember a call that AWS refused, whatever becomes of the error; `take_refused` gives it to the log."""
    REFUSED[f"{operation} on {what}"] += 1


def take_refused() -> dict[str, int]:
    """Return what AWS refused since this was last asked."""
    refused = dict(REFUSED)
    REFUSED.clear()
    return refused


def patiently(what: str, call: Callable[..., T], /, **arguments: Any) -> T:
    """Call AWS; hiccups are tried again up to 4 times within about a second, then it is StoreBusy(what)."""
    doubtful = False

    def counted(**arguments: Any) -> T:
        CALLS[what] += 1
        return call(**arguments)

    def is_worth_it(error: BaseException) -> bool:
        nonlocal doubtful
        if not is_passing(error):
            return False
        doubtful = doubtful or may_be_done(error)
        return True

    attempts = Retrying(
        # A call that hangs has taken its time already: no second one after five seconds.
        stop=stop_after_attempt(4) | stop_after_delay(5),
        wait=wait_random_exponential(multiplier=0.05, max=0.5),
        retry=retry_if_exception(is_worth_it),
        reraise=True,
    )
    try:
        return attempts(counted, **arguments)
    except (ClientError, BotoCoreError) as error:
        if is_passing(error):
            raise StoreBusy(what, may_be_done=doubtful) from error
        if isinstance(error, ClientError) and code(error) in _NOT_PERMITTED:
            note_refusal(error.operation_name, what)
        raise
