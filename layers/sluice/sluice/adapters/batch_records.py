"""Batches and ranges in DynamoDB: one table, told apart by its second key. Shared state is written on a condition."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

from botocore.exceptions import ClientError

from sluice.adapters import aws, job_records
from sluice.adapters.dynamodb import change_if_due, put_if
from sluice.domain.batches import (
    Batch,
    Options,
    Phase,
    Plan,
    Progress,
    RangeState,
    Source,
    Tally,
)
from sluice.domain.errors import Stale
from sluice.ports.batches import BatchPage, DueRange
from sluice.ports.world import Clock

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

    from sluice.adapters.job_records import Item

BATCH: Final = "batch"
WHAT: Final = "the batches table"

_RUNNING: Final = "running_"
"""With a member's number: the attribute of a group that holds the member's sums so far."""

_NOT_DONE: Final = "attribute_not_exists(done) OR NOT contains(done, :number)"
_DUE: Final = ("due_shard", "due_at", "due_tenant", "due_model")


class DynamoBatches:
    """The records of batches and of their ranges."""

    def __init__(
        self, client: DynamoDBClient, table: str, retention_days: int, clock: Clock
    ) -> None:
        self._client = client
        self._table = table
        self._retention_days = retention_days
        self._clock = clock

    def add(self, batch: Batch) -> None:
        """Store a new batch; raises Stale with the batch that has the id already."""
        self._put(self._batch_item(batch), "attribute_not_exists(batch_id)", {}, _batch)

    def get(self, batch_id: str) -> Batch | None:
        """Return the batch as last written (a consistent read)."""
        item = self._get(batch_id, BATCH)
        return _batch(item) if item else None

    def replace(self, batch: Batch, expected_version: int) -> None:
        """Write the batch if its stored version is the expected one; raises Stale otherwise."""
        self._replace(self._batch_item(batch), expected_version, _batch)

    def listing(
        self, tenant: str, limit: int, *, after: Batch | None = None, before: Batch | None = None
    ) -> BatchPage:
        """Return the tenant's batches, newest first: those older than `after`, or the next newer than `before`."""
        condition, values = "tenant = :tenant", {":tenant": {"S": tenant}}
        if after or before:
            condition += f" AND created_key {'<' if after else '>'} :from"
            values[":from"] = {"S": _created_key(after or before)}  # type: ignore[arg-type]
        answer = aws.patiently(
            WHAT,
            self._client.query,
            TableName=self._table,
            IndexName="by_tenant",
            KeyConditionExpression=condition,
            ExpressionAttributeValues=values,
            ScanIndexForward=before is not None,
            Limit=limit + 1,
        )
        found = [_batch(item) for item in answer["Items"]]
        has_more = len(found) > limit
        found = found[:limit]
        return BatchPage(tuple(reversed(found) if before else found), has_more)

    def range_state(self, batch: Batch, number: int) -> RangeState:
        """Return what is known of a range; one that nobody claimed yet has version 0."""
        item = self._get(batch.batch_id, _range_part(number))
        return _range(item) if item else RangeState(batch.batch_id, number, batch.tenant)

    def replace_range(self, state: RangeState, expected_version: int) -> None:
        """Write it if its stored version is the expected one (0: not stored); raises Stale otherwise."""
        item: Item = {
            "batch_id": {"S": state.batch_id},
            "part": {"S": _range_part(state.number)},
            "version": {"N": str(state.version)},
            "record": {"S": json.dumps(asdict(state), separators=(",", ":"))},
            "expires_at": {"N": str(self._expires())},
        }
        if state.not_before is not None:
            name = f"{state.batch_id}#{state.number}"
            item |= _due_item(name, state.not_before, state.tenant, state.model)
        self._replace(item, expected_version, _range)

    def mark(self, batch_id: str, group: str, member: int, tally: Tally) -> Progress:
        """Count a member of a group as done, once however often it is said."""
        numbers = tally.as_dict()
        adds = ", ".join(["done :member", *(f"#{name} :{name}" for name in numbers)])
        key: Any = {"batch_id": {"S": batch_id}, "part": {"S": group}}
        names = {f"#{name}": name for name in numbers} | {"#running": f"{_RUNNING}{member}"}
        try:
            answer = aws.patiently(
                WHAT,
                self._client.update_item,
                TableName=self._table,
                Key=key,
                UpdateExpression=f"SET expires_at = :expires ADD {adds} REMOVE #running",
                ConditionExpression=_NOT_DONE,
                ExpressionAttributeValues={
                    ":member": {"NS": [str(member)]},
                    ":number": {"N": str(member)},
                    ":expires": {"N": str(self._expires())},
                    **{f":{name}": {"N": str(value)} for name, value in numbers.items()},
                },
                ExpressionAttributeNames=names,
                ReturnValues="ALL_NEW",
            )
        except ClientError as error:
            if aws.code(error) != "ConditionalCheckFailedException":
                raise
            return _progress(self._get(batch_id, group) or {})
        return _progress(answer["Attributes"])

    def note_running(self, batch_id: str, group: str, member: int, tally: Tally) -> None:
        """Note the sums of a member so far; does nothing once the member is done."""
        try:
            aws.patiently(
                WHAT,
                self._client.update_item,
                TableName=self._table,
                Key={"batch_id": {"S": batch_id}, "part": {"S": group}},
                UpdateExpression="SET expires_at = :expires, #running = :sums",
                ConditionExpression=_NOT_DONE,
                ExpressionAttributeNames={"#running": f"{_RUNNING}{member}"},
                ExpressionAttributeValues={
                    ":sums": {"S": json.dumps(tally.as_dict(), separators=(",", ":"))},
                    ":number": {"N": str(member)},
                    ":expires": {"N": str(self._expires())},
                },
            )
        except ClientError as error:
            if aws.code(error) != "ConditionalCheckFailedException":
                raise

    def groups(self, batch_id: str, prefix: str) -> Mapping[str, Progress]:
        """Return all groups whose names begin so, by name and in the order of their names."""
        pages = self._client.get_paginator("query").paginate(
            TableName=self._table,
            KeyConditionExpression="batch_id = :batch AND begins_with(part, :prefix)",
            ExpressionAttributeValues={":batch": {"S": batch_id}, ":prefix": {"S": prefix}},
            ConsistentRead=True,
        )
        items = aws.patiently(WHAT, lambda: [x for page in pages for x in page["Items"]])
        return {item["part"]["S"]: _progress(item) for item in items}

    def name_create(self, tenant: str, name: str, batch_id: str, since: int, *, fresh: bool) -> str:
        """Return the batch that a create of this name made after `since`; note `batch_id` when there is none."""
        digest = sha256(f"{tenant}\x00{name}".encode()).hexdigest()
        item: Item = {
            "batch_id": {"S": f"create#{digest}"},
            "part": {"S": "create"},
            "made": {"S": batch_id},
            "at": {"N": str(self._clock.now())},
            "expires_at": {"N": str(self._clock.now() // 1000 + job_records.DAY_SECONDS)},
        }
        if fresh:
            aws.patiently(WHAT, self._client.put_item, TableName=self._table, Item=item)
            return batch_id
        current = put_if(
            self._client,
            self._table,
            item,
            "attribute_not_exists(batch_id) OR #at < :since",
            WHAT,
            {
                "ExpressionAttributeNames": {"#at": "at"},
                "ExpressionAttributeValues": {":since": {"N": str(since)}},
            },
        )
        return batch_id if current is None else current["made"]["S"]

    # For the sweep ---------------------------------------------------------------------------------------------

    def due(self, now: int, limit: int) -> Sequence[DueRange]:
        """Return what is due, longest due first."""
        found: list[DueRange] = []
        for shard in range(job_records.DUE_SHARDS):
            answer = aws.patiently(
                WHAT,
                self._client.query,
                TableName=self._table,
                IndexName="by_due",
                KeyConditionExpression="due_shard = :shard AND due_at <= :now",
                ExpressionAttributeValues={":shard": {"S": str(shard)}, ":now": {"N": str(now)}},
                Limit=max(1, limit // job_records.DUE_SHARDS),
            )
            found.extend(
                DueRange(
                    batch_id=item["batch_id"]["S"],
                    number=_range_number(item["part"]["S"]),
                    tenant=item["due_tenant"]["S"],
                    due_at=int(item["due_at"]["N"]),
                    model=item["due_model"]["S"] if "due_model" in item else None,
                )
                for item in answer["Items"]
            )
        return sorted(found, key=lambda each: (each.due_at, each.batch_id, each.number or -1))

    def postpone(self, due: DueRange, until: int) -> DueRange | None:
        """Take it by one conditional write; None when somebody else was quicker."""
        taken = self._if_due(due, "SET due_at = :until", {":until": {"N": str(until)}})
        return replace(due, due_at=until) if taken else None

    def remove(self, due: DueRange) -> None:
        """Take it out of the index, unless it has gone on already."""
        self._if_due(due, "REMOVE " + ", ".join(_DUE), {})

    def _if_due(self, due: DueRange, change: str, values: Item) -> bool:
        part = BATCH if due.number is None else _range_part(due.number)
        key: Item = {"batch_id": {"S": due.batch_id}, "part": {"S": part}}
        return change_if_due(self._client, self._table, key, due.due_at, change, values, WHAT)

    # Items -----------------------------------------------------------------------------------------------------

    def _get(self, batch_id: str, part: str) -> Item | None:
        answer = aws.patiently(
            WHAT,
            self._client.get_item,
            TableName=self._table,
            Key={"batch_id": {"S": batch_id}, "part": {"S": part}},
            ConsistentRead=True,
        )
        return answer.get("Item")

    def _replace(self, item: Item, expected_version: int, decode: Any) -> None:
        if not expected_version:
            self._put(item, "attribute_not_exists(batch_id)", {}, decode)
            return
        values = {":expected": {"N": str(expected_version)}}
        self._put(item, "version = :expected", {"ExpressionAttributeValues": values}, decode)

    def _put(self, item: Item, condition: str, arguments: dict[str, Any], decode: Any) -> None:
        current = put_if(self._client, self._table, item, condition, WHAT, arguments)
        if current is not None:
            raise Stale(decode(current) if current else None)

    def _batch_item(self, batch: Batch) -> Item:
        item: Item = {
            "batch_id": {"S": batch.batch_id},
            "part": {"S": BATCH},
            "version": {"N": str(batch.version)},
            "record": {"S": json.dumps(asdict(batch), separators=(",", ":"))},
            "expires_at": {"N": str(self._expires(batch.expires_at))},
        }
        if not batch.deleted:
            item["tenant"] = {"S": batch.tenant}
            item["created_key"] = {"S": _created_key(batch)}
        if batch.due_at is not None:
            item |= _due_item(batch.batch_id, batch.due_at, batch.tenant, None)
        return item

    def _expires(self, last_needed: int = 0) -> int:
        days = job_records.waiting_days(self._retention_days)
        return max(self._clock.now(), last_needed) // 1000 + days * job_records.DAY_SECONDS


def _range_part(number: int) -> str:
    return f"range#{number:08d}"


def _range_number(part: str) -> int | None:
    return int(part.partition("#")[2]) if part.startswith("range#") else None


def _created_key(batch: Batch) -> str:
    return f"{batch.created_at:015d}#{batch.batch_id}"


def _due_item(name: str, due_at: int, tenant: str, model: str | None) -> Item:
    item: Item = {
        "due_shard": {"S": str(job_records.due_part(name))},
        "due_at": {"N": str(due_at)},
        "due_tenant": {"S": tenant},
    }
    if model is not None:
        item["due_model"] = {"S": model}
    return item


def _batch(item: Item) -> Batch:
    record: dict[str, Any] = json.loads(item["record"]["S"])
    options = record["options"]
    options["fallback_models"] = tuple(options["fallback_models"])
    plan = record["plan"]
    return job_records.made(
        Batch,
        record
        | {
            "source": Source(record["source"]),
            "phase": Phase(record["phase"]),
            "options": job_records.made(Options, options),
            "plan": None if plan is None else job_records.made(Plan, plan),
            "tally": job_records.made(Tally, record["tally"]),
        },
    )


def _range(item: Item) -> RangeState:
    record: dict[str, Any] = json.loads(item["record"]["S"])
    lists = {name: tuple(value) for name, value in record.items() if isinstance(value, list)}
    return job_records.made(RangeState, record | lists)


def _progress(item: Item) -> Progress:
    numbers = {each.name: int(item[each.name]["N"]) for each in fields(Tally) if each.name in item}
    done = set(item.get("done", {}).get("NS", ()))
    # A member that another release marked as done may have left its attribute.
    running = [
        Tally(**json.loads(value["S"]))
        for name, value in item.items()
        if name.startswith(_RUNNING) and name.removeprefix(_RUNNING) not in done
    ]
    return Progress(len(done), Tally(**numbers), sum(running, Tally()))
