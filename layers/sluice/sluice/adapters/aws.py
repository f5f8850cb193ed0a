"""Calls to AWS: clients, timeouts, short retries, and the meaning of AWS's errors."""

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

from sluice.domain.errors import NotStorable, StoreBusy

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
    # It takes a tenth of a worker's CPU time, and tests run every call.
    parameter_validation=False,
    # botocore builds its own long one twice per call, which takes as long as signing.
    user_agent="sluice",
    # Only `patiently` below retries.
    retries={"total_max_attempts": 1},
)

S3_CONFIG = Config(
    # The default for presigned URLs is an older signature, which newer regions reject.
    signature_version="s3v4",
    # Clients of presigned URLs do not send checksums.
    request_checksum_calculation="when_required",
)

_TRANSIENT = frozenset(
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


_UNSTORABLE = frozenset(
    {
        "EntityTooLarge",
        "InvalidMessageContents",
        "MaxMessageLengthExceeded",
        "RequestEntityTooLargeException",
        "SerializationException",
        "ValidationException",
    }
)
"""AWS refuses the content of a write: too large, nested too deeply, or not encodable. It would refuse it again."""

MOST_REASON = 500

REFUSED: Counter[str] = Counter()
"""Unreported calls that AWS refused for lack of a permission: their number by operation and resource."""

_NOT_PERMITTED = frozenset({"AccessDenied", "AccessDeniedException", "403"})
"""403 is S3's response to HEAD, which has no body with an error code."""


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
    """Return AWS's error code."""
    return str(error.response.get("Error", {}).get("Code", ""))


def is_transient(error: BaseException) -> bool:
    """Return whether a retry may succeed: throttled, unavailable, or a connection error."""
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return code(error) in _TRANSIENT or status >= 500  # noqa: PLR2004 - HTTP
    return isinstance(error, (BotoConnectionError, HTTPClientError))


def may_be_done(error: BaseException) -> bool:
    """Return whether AWS may have done the call: the response was lost, or was a 5xx."""
    if isinstance(error, ClientError):
        return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500  # noqa: PLR2004 - HTTP
    return not isinstance(error, ConnectTimeoutError | EndpointConnectionError)


def note_refusal(operation: str, what: str) -> None:
    """Count a call that AWS refused, even if its error is handled; `take_refused` returns it for the log."""
    REFUSED[f"{operation} on {what}"] += 1


def take_refused() -> dict[str, int]:
    """Return the calls that AWS refused since the last call of this function."""
    refused = dict(REFUSED)
    REFUSED.clear()
    return refused


def patiently(what: str, call: Callable[..., T], /, **arguments: Any) -> T:
    """Call AWS; retry transient errors up to three times within about a second, then raise StoreBusy(what).

    Raises NotStorable for what AWS will never take, so that it is not mistaken for a busy store.
    """
    doubtful = False

    def is_retried(error: BaseException) -> bool:
        nonlocal doubtful
        if not is_transient(error):
            return False
        doubtful = doubtful or may_be_done(error)
        return True

    attempts = Retrying(
        # A call that timed out is not retried after five seconds.
        stop=stop_after_attempt(4) | stop_after_delay(5),
        wait=wait_random_exponential(multiplier=0.05, max=0.5),
        retry=retry_if_exception(is_retried),
        reraise=True,
    )
    try:
        return attempts(call, **arguments)
    except UnicodeError as error:
        raise NotStorable(what, "it has text that is not valid Unicode") from error
    except (ClientError, BotoCoreError) as error:
        if isinstance(error, ClientError) and code(error) in _UNSTORABLE:
            said = error.response["Error"].get("Message", "")
            raise NotStorable(what, f"{code(error)}: {said[:MOST_REASON]}") from error
        if is_transient(error):
            raise StoreBusy(what, may_be_done=doubtful) from error
        if isinstance(error, ClientError) and code(error) in _NOT_PERMITTED:
            note_refusal(error.operation_name, what)
        raise
