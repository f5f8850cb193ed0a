"""AWS in memory (moto), with the tables, queues, bucket and secrets of template.yaml. No network is reached."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

import pytest
from botocore.awsrequest import AWSResponse
from botocore.compat import HTTPHeaders
from moto import mock_aws
from moto.dynamodb.exceptions import ConditionalCheckFailed
from moto.dynamodb.models import DynamoDBBackend

from sluice.adapters import aws
from sluice.domain.client_keys import key_id, verifier
from tests.expanded_template import template

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_secretsmanager import SecretsManagerClient
    from mypy_boto3_sqs import SQSClient

CREDENTIALS: Final = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_SESSION_TOKEN": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
TABLES: Final = (
    "JobsTable", "ParamsTable", "LimitsTable", "LedgerTable", "UsageTable", "ClientKeysTable",
    "BatchesTable",
)  # fmt: skip
BUCKET: Final = "sluice-data"
STACK: Final = "sluice-of-this-test"
PEPPER: Final = "a pepper of this test"


@dataclass(frozen=True)
class Aws:
    """What is there. Tables are called as their logical ids."""

    dynamodb: DynamoDBClient
    sqs: SQSClient
    s3: S3Client
    secrets: SecretsManagerClient
    jobs_queue: str
    dead_letters_queue: str
    ranges_queue: str
    range_dead_letters_queue: str
    batches_queue: str
    webhooks_queue: str

    def environment(self) -> dict[str, str]:
        """Return what the template sets for every function."""
        return {
            "SLUICE_JOBS_TABLE": "JobsTable",
            "SLUICE_PARAMS_TABLE": "ParamsTable",
            "SLUICE_LIMITS_TABLE": "LimitsTable",
            "SLUICE_LEDGER_TABLE": "LedgerTable",
            "SLUICE_USAGE_TABLE": "UsageTable",
            "SLUICE_CLIENT_KEYS_TABLE": "ClientKeysTable",
            "SLUICE_BATCHES_TABLE": "BatchesTable",
            "SLUICE_DATA_BUCKET": BUCKET,
            "SLUICE_RANGES_QUEUE_URL": self.ranges_queue,
            "SLUICE_RANGE_DEAD_LETTERS_QUEUE_URL": self.range_dead_letters_queue,
            "SLUICE_BATCHES_QUEUE_URL": self.batches_queue,
            "SLUICE_WEBHOOKS_QUEUE_URL": self.webhooks_queue,
            "SLUICE_PUBLIC_URL": "https://sluice.example",
            "SLUICE_JOBS_QUEUE_URL": self.jobs_queue,
            "SLUICE_DEAD_LETTERS_QUEUE_URL": self.dead_letters_queue,
            "SLUICE_KEY_POOL_SECRET": "KeyPoolSecret",
            "SLUICE_PEPPER_SECRET": "ClientKeyPepper",
            "SLUICE_WEBHOOK_SECRET": "WebhookSecret",
            "SLUICE_RETENTION_DAYS": "30",
            "SLUICE_MAX_ATTEMPTS": "5",
            # A test sends its requests faster than any client.
            "SLUICE_CLIENT_REQUESTS_PER_SECOND": "1000",
            "SLUICE_GATHER_SECONDS": "300",
            "SLUICE_DEFAULT_LANE": "live",
            "POWERTOOLS_SERVICE_NAME": STACK,
        }

    def create_table(self, name: str, like: str) -> None:
        """Make a table of its own for one test, with the keys and indexes of one of the template's."""
        self.dynamodb.create_table(TableName=name, **_table(like))

    def add_client_key(self, key: str, tenant: str, **more: Any) -> None:
        """Let a tenant in."""
        self.dynamodb.put_item(
            TableName="ClientKeysTable",
            Item={
                "key_id": {"S": key_id(PEPPER, key)},
                "hash": {"S": verifier(PEPPER, key)},
                "tenant": {"S": tenant},
                "name": {"S": "a test"},
                "created_at": {"S": "2026-11-20T12:00:00Z"},
                **more,
            },
        )

    def set_key_pool(self, *keys: Mapping[str, Any]) -> None:
        """Fill the key pool."""
        self.secrets.put_secret_value(
            SecretId="KeyPoolSecret", SecretString=json.dumps({"keys": keys})
        )

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Return the bucket's objects."""
        found = self.s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        return {
            each["Key"]: self.s3.get_object(Bucket=BUCKET, Key=each["Key"])["Body"].read()
            for each in found
        }


@contextmanager
def in_memory() -> Iterator[Aws]:
    """Run AWS in memory."""
    with pytest.MonkeyPatch.context() as environment:
        for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_CONFIG_FILE"):
            environment.delenv(name, raising=False)
        for name, value in CREDENTIALS.items():
            environment.setenv(name, value)
        # A session reads the descriptions of AWS's services: once for all tests, not once for each.
        environment.setattr(DynamoDBBackend, "batch_execute_statement", _insert_all)
        with mock_aws(config={"core": {"reset_boto3_session": False}}):
            yield _deployed()


def _insert_all(
    backend: DynamoDBBackend, statements: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """BatchExecuteStatement of INSERTs, whose parameters moto's own does not read; what a put does stays moto's."""
    responses: list[dict[str, Any]] = []
    for each in statements:
        form = re.fullmatch(r'INSERT INTO "([^"]+)" VALUE \{(.+)\}', each["Statement"])
        assert form, each["Statement"]
        names = re.findall(r"'([^']+)': \?(?:, |$)", form[2])
        item = dict(zip(names, each["Parameters"], strict=True))
        (hash_key,) = backend.get_table(form[1]).table_key_attrs
        try:
            backend.put_item(
                form[1], item, condition_expression=f"attribute_not_exists({hash_key})"
            )
        except ConditionalCheckFailed:
            responses.append({"Error": {"Code": "DuplicateItem", "Message": "duplicate key"}})
        else:
            responses.append({"TableName": form[1]})
    return responses


def _with_conditions(s3: S3Client) -> None:
    """Check the conditions of multipart uploads that moto ignores: If-Match at their end, and on what is copied."""

    def checked(params: Mapping[str, Any], **_: Any) -> Any:
        headers = params["headers"]
        key, etag = unquote(params["url_path"].partition("/")[2]), headers.get("If-Match")
        if "x-amz-copy-source-if-match" in headers:
            key = unquote(headers["x-amz-copy-source"]).partition("/")[2]
            etag = headers["x-amz-copy-source-if-match"]
        if etag is None:
            return None
        listed = s3.list_objects_v2(Bucket=BUCKET, Prefix=key).get("Contents", [])
        found = {each["Key"]: each["ETag"] for each in listed}.get(key)
        if found == etag:
            return None
        code, status = ("PreconditionFailed", 412) if found else ("NoSuchKey", 404)
        parsed = {"Error": {"Code": code, "Message": "as S3 would"}, "ResponseMetadata": {}}
        return AWSResponse(params["url"], status, HTTPHeaders(), None), parsed

    for operation in ("CompleteMultipartUpload", "UploadPartCopy"):
        # Last: a test may write just before the call.
        s3.meta.events.register_last(f"before-call.s3.{operation}", checked)


def _deployed() -> Aws:
    dynamodb, sqs, s3, secrets = aws.dynamodb(), aws.sqs(), aws.s3(), aws.secrets_manager()
    _with_conditions(s3)
    for table in TABLES:
        dynamodb.create_table(TableName=table, **_table(table))
    s3.create_bucket(Bucket=BUCKET)
    secrets.create_secret(Name="KeyPoolSecret", SecretString='{"keys": []}')
    secrets.create_secret(Name="ClientKeyPepper", SecretString=PEPPER)
    secrets.create_secret(Name="WebhookSecret", SecretString="first")
    return Aws(
        dynamodb,
        sqs,
        s3,
        secrets,
        jobs_queue=sqs.create_queue(QueueName="JobsQueue")["QueueUrl"],
        dead_letters_queue=sqs.create_queue(QueueName="DeadLettersQueue")["QueueUrl"],
        ranges_queue=sqs.create_queue(QueueName="RangesQueue")["QueueUrl"],
        range_dead_letters_queue=sqs.create_queue(QueueName="RangeDeadLettersQueue")["QueueUrl"],
        batches_queue=sqs.create_queue(QueueName="BatchesQueue")["QueueUrl"],
        webhooks_queue=sqs.create_queue(QueueName="WebhooksQueue")["QueueUrl"],
    )


@cache
def _table(name: str) -> dict[str, Any]:
    properties = template()["Resources"][name]["Properties"]
    wanted = ("BillingMode", "AttributeDefinitions", "KeySchema", "GlobalSecondaryIndexes")
    return {each: properties[each] for each in wanted if each in properties}
