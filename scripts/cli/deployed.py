"""A deployed stack, as an operator uses it: upstream keys, client keys, dead letters."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import boto3
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    NoRegionError,
    ProfileNotFound,
)

from scripts.cli.errors import CommandFailed
from sluice.adapters import aws
from sluice.adapters.dynamodb import DynamoJobs, DynamoLimits, DynamoParams
from sluice.adapters.s3 import DeadLetterObjects, Objects
from sluice.adapters.system import SystemClock
from sluice.domain import client_keys
from sluice.domain.capacity import LEAST
from sluice.domain.errors import KeyPoolBroken, StoreBusy
from sluice.domain.keys import parse_key_pool
from sluice.domain.shares import CEILINGS, RESERVED, room_of
from sluice.upkeep.dead_letters import Redriver
from sluice.wiring.shared import model_groups, prices

if TYPE_CHECKING:
    from mypy_boto3_cloudformation.type_defs import StackTypeDef
    from mypy_boto3_dynamodb import DynamoDBClient
    from mypy_boto3_secretsmanager import SecretsManagerClient

NEEDED_OUTPUTS = ("ApiUrl", "KeyPoolSecretArn", "PepperSecretArn", "ClientKeysTableName")
USUAL_RETENTION_DAYS = 30  # as in template.yaml
USUAL_CONCURRENCY = {"MaxConcurrency": 10, "BulkConcurrency": 4, "LambdaConcurrency": 0}  # the same
QUOTA = "L-B99A9384"
"""Code of Lambda's concurrent executions in Service Quotas."""
USABLE_STATUSES = ("CREATE_COMPLETE", "UPDATE_COMPLETE", "UPDATE_ROLLBACK_COMPLETE")

TENANT = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""Valid tenant names. The name becomes part of an SQS message group ID, which allows no spaces."""

KeyPool = dict[str, Any]


class Stack:
    """A deployed stack, found by its name through CloudFormation."""

    def __init__(
        self, name: str, region: str | None = None, endpoint_url: str | None = None
    ) -> None:
        with aws_errors(f"read stack {name}"):
            self._session = boto3.Session(region_name=region)
            self._endpoint_url = endpoint_url
            found = self._read(name)
        outputs = {each["OutputKey"]: each["OutputValue"] for each in found.get("Outputs", [])}
        missing = [output for output in NEEDED_OUTPUTS if output not in outputs]
        if missing:
            raise CommandFailed(
                f"stack {name} has no output {', '.join(missing)}: check that it is a Sluice stack"
            )
        self.name = name
        self.outputs = outputs
        self.parameters = {
            each["ParameterKey"]: each["ParameterValue"] for each in found.get("Parameters", [])
        }
        self.api_url = outputs["ApiUrl"]
        self._key_pool_secret = outputs["KeyPoolSecretArn"]
        self._pepper_secret = outputs["PepperSecretArn"]
        self._keys_table = outputs["ClientKeysTableName"]

    def _read(self, name: str) -> "StackTypeDef":
        cloudformation = self._session.client("cloudformation", endpoint_url=self._endpoint_url)
        try:
            found = cloudformation.describe_stacks(StackName=name)["Stacks"]
        except ClientError as error:
            if error.response["Error"]["Code"] != "ValidationError":
                raise
            found = []
        if not found:
            region = self._session.region_name
            raise CommandFailed(
                f"stack {name} does not exist in {region}: deploy it first, or set --region"
            )
        if found[0]["StackStatus"] not in USABLE_STATUSES:
            raise CommandFailed(
                f"stack {name} is {found[0]['StackStatus']}: "
                "wait for the deployment to finish, or fix it"
            )
        return found[0]

    def redriver(self) -> Redriver:
        """Return the use case of `sluice dead-letters`, with this stack's tables and bucket."""
        names = ("JobsTableName", "ParamsTableName", "LimitsTableName", "DataBucketName")
        missing = [name for name in names if name not in self.outputs]
        if missing:
            raise CommandFailed(
                f"stack {self.name} has no output {', '.join(missing)}: deploy the current release"
            )
        days = int(self.parameters.get("RetentionDays", USUAL_RETENTION_DAYS))
        jobs, params, limits, bucket = (self.outputs[name] for name in names)
        with aws_errors("reach the stack's data"):
            dynamodb = self._session.client(
                "dynamodb", endpoint_url=self._endpoint_url, config=aws.CONFIG
            )
            s3 = self._session.client("s3", endpoint_url=self._endpoint_url, config=aws.CONFIG)
        objects, clock = Objects(s3, bucket), SystemClock()
        return Redriver(
            DynamoJobs(dynamodb, jobs, days),
            DynamoParams(dynamodb, params, objects, clock, days),
            DynamoLimits(dynamodb, limits),
            DeadLetterObjects(objects),
            prices(),
            model_groups(),
            clock,
        )

    @property
    def _secrets(self) -> "SecretsManagerClient":
        return self._session.client("secretsmanager", endpoint_url=self._endpoint_url)

    @property
    def _dynamodb(self) -> "DynamoDBClient":
        return self._session.client("dynamodb", endpoint_url=self._endpoint_url)

    def executions(self) -> int:
        """Return the account's limit on concurrent Lambda executions in this region."""
        client = self._session.client("lambda", endpoint_url=self._endpoint_url)
        with aws_errors("read the account's Lambda limit"):
            return client.get_account_settings()["AccountLimit"]["UnreservedConcurrentExecutions"]

    def wake_governor(self) -> None:
        """Invoke the governor, so that it sets all concurrencies before its first scheduled run."""
        name = self.outputs.get("GovernorFunctionName")
        if name is None:
            return  # a release before 0.2 has no such output
        client = self._session.client("lambda", endpoint_url=self._endpoint_url)
        with aws_errors("invoke the governor"):
            answer = client.invoke(FunctionName=name, Payload=b"{}")
        if "FunctionError" in answer:
            raise CommandFailed("the governor failed; check its log")

    def lambda_limit_report(self) -> list[str]:
        """Return what the account's Lambda limit means for this stack, as lines."""
        numbers = {
            name: int(self.parameters.get(name, usual)) for name, usual in USUAL_CONCURRENCY.items()
        }
        at_most = numbers.pop("LambdaConcurrency")
        wanted = sum(numbers.values()) + sum(CEILINGS.values())
        return lambda_limit_report(self.executions(), at_most, wanted, len(numbers) + len(CEILINGS))

    def key_pool_ids(self) -> list[str]:
        """Return the IDs of the stored upstream keys; none if the pool is invalid."""
        with aws_errors("read the key pool"):
            text = self._secrets.get_secret_value(SecretId=self._key_pool_secret)["SecretString"]
        try:
            return [key.id for key in parse_key_pool(json.loads(text))]
        except (KeyPoolBroken, ValueError):
            return []

    def write_key_pool(self, pool: Mapping[str, Any]) -> None:
        """Store `pool` as the stack's upstream keys."""
        with aws_errors("write the key pool"):
            self._secrets.put_secret_value(
                SecretId=self._key_pool_secret, SecretString=json.dumps(pool)
            )

    def create_client_key(
        self,
        tenant: str,
        name: str | None = None,
        *,
        random_bytes: Callable[[int], bytes] = os.urandom,
    ) -> tuple[str, str]:
        """Return a new client key and its ID. Only hashes of the key are stored."""
        check_tenant(tenant)
        key = client_keys.new_key(random_bytes(32))
        with aws_errors("read the pepper"):
            pepper = self._secrets.get_secret_value(SecretId=self._pepper_secret)["SecretString"]
        key_id = client_keys.key_id(pepper, key)
        with aws_errors("store the client key"):
            self._dynamodb.put_item(
                TableName=self._keys_table,
                Item={
                    "key_id": {"S": key_id},
                    "hash": {"S": client_keys.verifier(pepper, key)},
                    "tenant": {"S": tenant},
                    "name": {"S": name or tenant},
                    "created_at": {"S": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")},
                    "disabled": {"BOOL": False},
                },
                ConditionExpression="attribute_not_exists(key_id)",
            )
        return key, key_id

    def list_client_keys(self) -> list[dict[str, Any]]:
        """Return all client keys without their hashes, oldest first."""
        keys: list[dict[str, Any]] = []
        with aws_errors("list the client keys"):
            pages = self._dynamodb.get_paginator("scan").paginate(TableName=self._keys_table)
            for page in pages:
                keys += [
                    {
                        "key_id": item["key_id"].get("S", ""),
                        "tenant": item["tenant"].get("S", ""),
                        "name": item.get("name", {}).get("S"),
                        "created_at": item.get("created_at", {}).get("S"),
                        "disabled": bool(item.get("disabled", {}).get("BOOL")),
                    }
                    for item in page["Items"]
                ]
        return sorted(keys, key=lambda key: (key["created_at"] or "", key["key_id"]))

    def revoke_client_key(self, key_id: str) -> None:
        """Disable a client key; its jobs keep running."""
        with aws_errors("revoke the client key"):
            try:
                self._dynamodb.update_item(
                    TableName=self._keys_table,
                    Key={"key_id": {"S": key_id}},
                    UpdateExpression="SET disabled = :yes",
                    ConditionExpression="attribute_exists(key_id)",
                    ExpressionAttributeValues={":yes": {"BOOL": True}},
                )
            except ClientError as error:
                if error.response["Error"]["Code"] != "ConditionalCheckFailedException":
                    raise
                raise CommandFailed(
                    f"client key {key_id} does not exist; run `sluice keys list` to list key IDs"
                ) from None


def lambda_limit_report(executions: int, at_most: int, wanted: int, queues: int) -> list[str]:
    """Return what a Lambda concurrency limit means for queues that want `wanted` executions; `at_most` 0 is no cap."""
    counted = f"Lambda concurrency limit of this account and region: {executions:,}"
    if at_most and at_most < executions:
        counted += f", of which Sluice may use {at_most:,} (LambdaConcurrency)"
    room = room_of(min(executions, at_most) if at_most else executions)
    all_in_all = wanted + RESERVED
    if room >= wanted:
        return [f"{counted}; enough for all queues of this stack ({all_in_all:,})"]
    at_a_time = room // LEAST
    if at_a_time >= queues:
        meaning = f"its queues share {room:,}"
    else:
        meaning = (
            f"{at_a_time} of its {queues} queues run at a time, "
            "and the others wait a few minutes for their turn"
        )
    lines = [f"{counted}; this stack can use {all_in_all:,}, so {meaning}"]
    if executions < all_in_all:
        lines.append(
            'to request a quota increase (free; Service Quotas, "Concurrent executions"): '
            "aws service-quotas request-service-quota-increase --service-code lambda "
            f"--quota-code {QUOTA} --desired-value 1000"
        )
    return lines


def check_tenant(tenant: str) -> None:
    """Raise CommandFailed if the tenant's name is invalid."""
    if not TENANT.fullmatch(tenant):
        raise CommandFailed(
            f"{tenant!r} is not a valid tenant name: "
            "use 1 to 64 letters, digits, hyphens and underscores"
        )


def read_key_pool(text: str, source: str) -> KeyPool:
    """Return the key pool in `text`; raise CommandFailed with the reason, which never contains a key."""
    try:
        pool = json.loads(text)
        keys = parse_key_pool(pool)
    except json.JSONDecodeError as error:
        raise CommandFailed(
            f"{source} is not valid JSON: {error.msg} in line {error.lineno}, column {error.colno}"
        ) from None
    except KeyPoolBroken as error:
        raise CommandFailed(f"{source}: {error}") from None
    if not keys:
        raise CommandFailed(f"{source} has no keys; add at least one Claude API key")
    return dict(pool)


def ask_for_key_pool(ask: Callable[[str], str], say: Callable[[str], None]) -> KeyPool:
    """Return a key pool of the keys entered at the prompt, until an empty line."""
    keys: list[str] = []
    while True:
        key = ask(f"Claude API key {len(keys) + 1} (hidden; empty line to finish)").strip()
        if not key:
            break
        reason = _wrong_with_key(key, keys)
        if reason:
            say(reason)
            continue
        keys.append(key)
    if not keys:
        raise CommandFailed(
            "no upstream key entered: nothing was changed; jobs need at least one key"
        )
    return {
        "keys": [
            {"id": "main" if number == 1 else f"key-{number}", "api_key": key}
            for number, key in enumerate(keys, start=1)
        ]
    }


def _wrong_with_key(key: str, others: list[str]) -> str | None:
    if not key.isascii() or not key.isprintable() or " " in key:
        return "The key contains invalid characters; copy it again."
    if key.startswith("sk-ant-admin"):
        return "This is an admin key, which cannot send messages; enter an API key (sk-ant-api...)."
    if key in others:
        return "This key was already entered."
    return None


@contextmanager
def aws_errors(doing: str) -> Iterator[None]:
    """Turn AWS errors into CommandFailed; `doing` is what failed, such as `read the key pool`."""
    try:
        yield
    except NoRegionError:
        raise CommandFailed("no AWS region: set --region or AWS_REGION") from None
    except NoCredentialsError:
        raise CommandFailed(
            "no AWS credentials: sign in first (`aws sso login`), or set AWS_PROFILE"
        ) from None
    except ProfileNotFound as error:
        raise CommandFailed(f"{error}: set AWS_PROFILE to an existing profile") from None
    except ClientError as error:
        facts = error.response["Error"]
        code, message = facts.get("Code", "error"), facts.get("Message", "")
        raise CommandFailed(f"cannot {doing}: AWS returned {code}: {message}") from None
    except StoreBusy as busy:
        raise CommandFailed(f"cannot {doing}: {busy.what} is busy; retry") from None
    except (BotoCoreError, ValueError) as error:
        # ValueError: an invalid endpoint URL.
        raise CommandFailed(f"cannot {doing}: {error}") from None
