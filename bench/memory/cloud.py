"""AWS for the memory benchmark: the emulator with the tables, queues, bucket and secrets of template.yaml."""

from __future__ import annotations

import io
import json
import os
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import boto3

from scripts.local_stack.deploy import read_template
from scripts.local_stack.emulator import REGION, Client, Emulator
from sluice.domain.client_keys import key_id, verifier
from sluice.settings import MAPPINGS
from tests.fresh import forget_what_is_wired

ROOT: Final = Path(__file__).resolve().parents[2]
TEMPLATE: Final = ROOT / "template.yaml"
BUCKET: Final = "sluice-data"
PEPPER: Final = "a pepper of this benchmark"
CLIENT_KEY: Final = "sk-ant-test-client-of-the-benchmark"
UPSTREAM_KEY: Final = "sk-ant-test-upstream-of-the-benchmark"
TENANT: Final = "bench"
QUEUES: Final = (
    "JobsQueue",
    "DeadLettersQueue",
    "RangesQueue",
    "RangeDeadLettersQueue",
    "BatchesQueue",
    "WebhooksQueue",
)
_OF_A_TABLE: Final = (
    "BillingMode", "AttributeDefinitions", "KeySchema", "GlobalSecondaryIndexes",
)  # fmt: skip
_RECEIVED: Final = 10
_HIDDEN_SECONDS: Final = 5_400


@dataclass(frozen=True, slots=True)
class Cloud:
    """The emulator, and what a function's process finds in its environment."""

    emulator: Emulator
    environment: Mapping[str, str]
    queues: Mapping[str, str]

    def client(self, service: str) -> Client:
        """Return a client."""
        return self.emulator.client(service)

    def drop(self, key: str, body: bytes) -> None:
        """Put an object into the data bucket."""
        self.client("s3").put_object(Bucket=BUCKET, Key=key, Body=body)

    def received(self, queue: str, most: int) -> dict[str, Any]:
        """Take messages of a queue; return the event in which Lambda would pass them on."""
        records: list[dict[str, Any]] = []
        while len(records) < most:
            some = self.client("sqs").receive_message(
                QueueUrl=self.queues[queue],
                MaxNumberOfMessages=min(_RECEIVED, most - len(records)),
                MessageSystemAttributeNames=["All"],
                VisibilityTimeout=_HIDDEN_SECONDS,
            )
            if not some.get("Messages"):
                break
            records += [
                record(each["MessageId"], each["Body"], each["ReceiptHandle"], each["Attributes"])
                for each in some["Messages"]
            ]
        return {"Records": records}


def record(
    name: str, body: str, receipt: str = "", attributes: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return one record of an SQS event."""
    now = str(int(time.time() * 1000))
    return {
        "messageId": name,
        "receiptHandle": receipt,
        "body": body,
        "attributes": dict(attributes or {"ApproximateReceiveCount": "1", "SentTimestamp": now}),
        "messageAttributes": {},
        "eventSource": "aws:sqs",
    }


def memory_sizes() -> dict[str, int]:
    """Return the megabytes that template.yaml gives each function, by the name of its folder."""
    resources = read_template(TEMPLATE)["Resources"].values()
    functions = [
        each["Properties"] for each in resources if each["Type"] == "AWS::Serverless::Function"
    ]
    return {Path(each["CodeUri"]).name: int(each["MemorySize"]) for each in functions}


@contextmanager
def cloud(claude_url: str) -> Iterator[Cloud]:
    """Run the emulator with everything the functions need, and let this process use it through the wiring."""
    emulator = Emulator()
    try:
        emulator.wait_until_it_answers()
        made = _made(emulator, claude_url)
        before = dict(os.environ)
        os.environ.update(made.environment)
        # The default session keeps the credentials it found first, which are those of an emulator before this one.
        boto3.setup_default_session()
        try:
            yield made
        finally:
            os.environ.clear()
            os.environ.update(before)
            boto3.setup_default_session()
            forget_what_is_wired()
    finally:
        emulator.stop()


def _made(emulator: Emulator, claude_url: str) -> Cloud:
    resources = read_template(TEMPLATE)["Resources"]
    tables = [name for name, each in resources.items() if each["Type"] == "AWS::DynamoDB::Table"]
    for name in tables:
        properties = resources[name]["Properties"]
        wanted = {each: properties[each] for each in _OF_A_TABLE if each in properties}
        emulator.client("dynamodb").create_table(TableName=name, **wanted)
    emulator.client("s3").create_bucket(Bucket=BUCKET)
    sqs = emulator.client("sqs")
    queues = {name: sqs.create_queue(QueueName=name)["QueueUrl"] for name in QUEUES}
    secrets = emulator.client("secretsmanager")
    pool = {"keys": [{"id": "main", "api_key": UPSTREAM_KEY, "base_url": claude_url}]}
    secrets.create_secret(Name="KeyPoolSecret", SecretString=json.dumps(pool))
    secrets.create_secret(Name="ClientKeyPepper", SecretString=PEPPER)
    secrets.create_secret(Name="WebhookSecret", SecretString="first")
    emulator.client("dynamodb").put_item(
        TableName="ClientKeysTable",
        Item={
            "key_id": {"S": key_id(PEPPER, CLIENT_KEY)},
            "hash": {"S": verifier(PEPPER, CLIENT_KEY)},
            "tenant": {"S": TENANT},
            "name": {"S": "the benchmark"},
            "created_at": {"S": "2026-11-20T12:00:00Z"},
        },
    )
    trust = {"Effect": "Allow", "Principal": {"Service": "lambda.amazonaws.com"}}
    document = {"Version": "2012-10-17", "Statement": [{**trust, "Action": "sts:AssumeRole"}]}
    role = emulator.client("iam").create_role(
        RoleName="bench", AssumeRolePolicyDocument=json.dumps(document)
    )["Role"]["Arn"]
    mappings = {
        name: _mapping(emulator, name.replace(" ", "-"), role, queues[_queue_of(name)])
        for name in MAPPINGS
    }
    of_governor = {
        "SLUICE_MAPPINGS": json.dumps(mappings),
        "SLUICE_MAX_CONCURRENCY": "10",
        "SLUICE_BULK_CONCURRENCY": "4",
        "SLUICE_LAMBDA_CONCURRENCY": "0",
        "SLUICE_UPSTREAM_FUNCTION": "upstream",
    }
    return Cloud(emulator, _environment(emulator, queues) | of_governor, queues)


def _queue_of(mapping: str) -> str:
    """Return the logical id of the queue that holds what a mapping is named for."""
    return f"{mapping.title().replace(' ', '')}Queue"


def _mapping(emulator: Emulator, name: str, role: str, queue_url: str) -> str:
    """Make a disabled mapping, for the governor to read."""
    package = io.BytesIO()
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("app.py", "def handler(event, context): pass\n")
    emulator.client("lambda").create_function(
        FunctionName=name,
        Runtime="python3.13",
        Role=role,
        Handler="app.handler",
        Code={"ZipFile": package.getvalue()},
    )
    attributes = emulator.client("sqs").get_queue_attributes(
        QueueUrl=queue_url, AttributeNames=["QueueArn"]
    )
    mapping = emulator.client("lambda").create_event_source_mapping(
        EventSourceArn=attributes["Attributes"]["QueueArn"], FunctionName=name, Enabled=False
    )
    return str(mapping["UUID"])


def _environment(emulator: Emulator, queues: Mapping[str, str]) -> dict[str, str]:
    tables = ("Jobs", "Params", "Limits", "Ledger", "Usage", "ClientKeys", "Batches")
    names = {
        f"SLUICE_{'CLIENT_KEYS' if each == 'ClientKeys' else each.upper()}_TABLE": f"{each}Table"
        for each in tables
    }
    return names | {
        "AWS_ENDPOINT_URL": emulator.endpoint_url,
        **emulator.credentials.as_environment(),
        "AWS_DEFAULT_REGION": REGION,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "SLUICE_DATA_BUCKET": BUCKET,
        "SLUICE_JOBS_QUEUE_URL": queues["JobsQueue"],
        "SLUICE_DEAD_LETTERS_QUEUE_URL": queues["DeadLettersQueue"],
        "SLUICE_RANGES_QUEUE_URL": queues["RangesQueue"],
        "SLUICE_RANGE_DEAD_LETTERS_QUEUE_URL": queues["RangeDeadLettersQueue"],
        "SLUICE_BATCHES_QUEUE_URL": queues["BatchesQueue"],
        "SLUICE_WEBHOOKS_QUEUE_URL": queues["WebhooksQueue"],
        "SLUICE_PUBLIC_URL": "https://sluice.example",
        "SLUICE_KEY_POOL_SECRET": "KeyPoolSecret",
        "SLUICE_PEPPER_SECRET": "ClientKeyPepper",
        "SLUICE_WEBHOOK_SECRET": "WebhookSecret",
        "SLUICE_WEBHOOK_NETWORKS": "127.0.0.0/8",
        "SLUICE_RETENTION_DAYS": "30",
        "SLUICE_MAX_ATTEMPTS": "5",
        "SLUICE_CLIENT_REQUESTS_PER_SECOND": "1000",
        "SLUICE_GATHER_SECONDS": "300",
        "SLUICE_DEFAULT_LANE": "live",
        "POWERTOOLS_SERVICE_NAME": "sluice-bench",
        "POWERTOOLS_LOG_LEVEL": "ERROR",
        "POWERTOOLS_METRICS_DISABLED": "true",
    }
