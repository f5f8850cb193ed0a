"""Jobs, requests, limits, ledger and client keys in DynamoDB. Every write of shared state is conditional."""

from __future__ import annotations

import gzip
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from datetime import date
from typing import TYPE_CHECKING, Any, Final, TypeVar
from uuid import uuid4

from botocore.exceptions import ClientError

from sluice.adapters import aws, job_records
from sluice.domain.breakers import Breaker
from sluice.domain.client_keys import key_id, matches
from sluice.domain.errors import Conflict, InvalidRequest, Stale, StoreBusy
from sluice.domain.jobs import DueFor, Job, State
from sluice.domain.keys import KeyMark
from sluice.domain.limits import DIMENSIONS, Bucket, Group
from sluice.domain.pricing import LedgerRow, Spend
from sluice.domain.shares import Note
from sluice.ports.jobs import Due, Page, Params
from sluice.ports.world import Clock

if TYPE_CHECKING:
    from collections.abc import Callable

    from mypy_boto3_dynamodb import DynamoDBClient

    from sluice.adapters.job_records import Item
    from sluice.adapters.s3 import Objects

T = TypeVar("T")

GET_AT_ONCE: Final = 100
"""DynamoDB's limit for BatchGetItem."""

WRITE_AT_ONCE: Final = 25
"""DynamoDB's limit for BatchWriteItem."""

INLINE_BYTES: Final = 350_000
"""Requests above this size, compressed, go to S3: an item holds 400 KB."""

INSERTED_BYTES: Final = 100_000
"""Larger requests, compressed, are not inserted together: 25 of them would be a long call."""

OBJECTS_AT_ONCE: Final = 8

SHORT_DAYS: Final = 60
"""How long the template keeps objects under params/; those of a longer retention stand under long-params/."""

LEARNED_ID: Final = "models#learned"

JOBS_NOTES_ID: Final = "governor#notes"
"""An item of its own, as each other mapping has: a release that governs jobs alone writes this one whole, and would
drop the fields of others."""

NOTE_FIELDS: Final = tuple(field.name for field in fields(Note))


def notes_id(mapping: str) -> str:
    """Return the item that holds the governor's note of a mapping."""
    return JOBS_NOTES_ID if mapping == "jobs" else f"{JOBS_NOTES_ID}#{mapping}"


FILTERED_AT_ONCE: Final = 1_000
"""Items read per query when only one state is wanted."""

LEDGER_DAYS: Final = 400
"""How long ledger rows are kept: a year and a month, so that a year's statement can be checked."""

CANARY_SECONDS: Final = 86_400


class DynamoJobs:
    """The job records."""

    def __init__(self, client: DynamoDBClient, table: str, retention_days: int) -> None:
        self._client = client
        self._table = table
        self._retention_days = retention_days

    def add(self, job: Job) -> None:
        """Store a new job; raises Stale with the job that has the id already."""
        self._put(job, "attribute_not_exists(job_id)", {})

    def add_new(self, jobs: Sequence[Job]) -> set[str]:
        """Store those jobs whose ids are free, in one call; return the ids surely stored by it.

        Raises StoreBusy; with `may_be_done` when some may be stored all the same.
        """
        items = [_marked(job_records.encode(job, self._retention_days)) for job in jobs]
        doubt: StoreBusy | None = None
        try:
            done = insert(self._client, self._table, items, "the jobs table")
        except StoreBusy as busy:
            if not busy.may_be_done:
                raise
            done, doubt = set(), busy
        unsure = [item for item in items if item["job_id"]["S"] not in done]
        if not unsure:
            return done
        # A call whose reply was lost was tried again, and then met itself.
        ids = [item["job_id"]["S"] for item in unsure]
        try:
            there = _get_many(self._client, self._table, "job_id", ids, "the jobs table")
        except StoreBusy as busy:
            raise StoreBusy(busy.what, may_be_done=True) from doubt or busy
        return done | {item["job_id"]["S"] for item in unsure if item in there}

    def get(self, job_id: str) -> Job | None:
        """Return the job as last written (a consistent read)."""
        answer = aws.patiently(
            "the jobs table",
            self._client.get_item,
            TableName=self._table,
            Key={"job_id": {"S": job_id}},
            ConsistentRead=True,
        )
        return job_records.decode(answer["Item"]) if "Item" in answer else None

    def get_many(self, job_ids: Sequence[str]) -> Mapping[str, Job]:
        """Return those of the jobs that exist (consistent reads)."""
        items = _get_many(self._client, self._table, "job_id", job_ids, "the jobs table")
        return {job.job_id: job for job in map(job_records.decode, items)}

    def replace(self, job: Job, expected_version: int) -> None:
        """Write the job if its stored version is the expected one; raises Stale otherwise."""
        self._put(job, "version = :expected", {":expected": {"N": str(expected_version)}})

    def listing(self, tenant: str, state: State | None, limit: int, page: str | None) -> Page:
        """Return the tenant's jobs, newest first. With a state, pages may be short of `limit`, never wrong."""
        arguments: dict[str, Any] = {
            "TableName": self._table,
            "IndexName": "by_tenant",
            "KeyConditionExpression": "tenant = :tenant",
            "ExpressionAttributeValues": {":tenant": {"S": tenant}},
            "ScanIndexForward": False,
        }
        if state is not None:
            arguments["FilterExpression"] = "#state = :state"
            arguments["ExpressionAttributeNames"] = {"#state": "state"}
            arguments["ExpressionAttributeValues"][":state"] = {"S": state}
        last: Any = _unpage(page, tenant) if page else None
        jobs: list[Job] = []
        # A filter drops items after they were read: read on until the page is full, but not for ever.
        for _ in range(10):
            if last:
                arguments["ExclusiveStartKey"] = last
            arguments["Limit"] = limit if state is None else FILTERED_AT_ONCE
            answer = aws.patiently("the jobs table", self._client.query, **arguments)
            jobs.extend(map(job_records.decode, answer["Items"]))
            last = answer.get("LastEvaluatedKey")
            if len(jobs) >= limit or not last:
                break
        if len(jobs) > limit:
            jobs = jobs[:limit]
            last = _index_key(jobs[-1])
        return Page(tuple(jobs), _page(last) if last else None)

    def due(self, why: DueFor, now: int, limit: int) -> Sequence[Due]:
        """Return the jobs whose time has come, longest due first; of many those at both ends."""
        share = max(1, limit // job_records.DUE_SHARDS // 2)
        found: dict[str, Due] = {}
        for part in range(job_records.DUE_SHARDS):
            shard = job_records.due_shard(why, part)
            some = self._due(shard, now, share, longest_first=True)
            if len(some) == share:
                some += self._due(shard, now, share, longest_first=False)
            found |= {each.job_id: each for each in some}
        return sorted(found.values(), key=lambda each: (each.due_at, each.job_id))

    def postpone(self, due: Due, until: int) -> Due | None:
        """Take a due job by one conditional write; None when somebody else was quicker."""
        taken = self._if_due(due, "SET due_at = :until", {":until": {"N": str(until)}})
        return replace(due, due_at=until) if taken else None

    def watch(self, due: Due, until: int) -> None:
        """Move the job to the jobs that are looked at in case their message is lost, unless it has gone on already."""
        shard = job_records.due_shard(DueFor.CHECK, job_records.due_part(due.job_id))
        values: Item = {":until": {"N": str(until)}, ":shard": {"S": shard}}
        self._if_due(due, "SET due_at = :until, due_shard = :shard", values)

    def _due(self, shard: str, now: int, limit: int, *, longest_first: bool) -> list[Due]:
        answer = aws.patiently(
            "the jobs table",
            self._client.query,
            TableName=self._table,
            IndexName="by_due",
            KeyConditionExpression="due_shard = :shard AND due_at <= :now",
            ExpressionAttributeValues={":shard": {"S": shard}, ":now": {"N": str(now)}},
            ScanIndexForward=longest_first,
            Limit=limit,
        )
        return [
            Due(
                job_id=item["job_id"]["S"],
                tenant=item["tenant"]["S"],
                model=item["due_model"]["S"],
                due_at=int(item["due_at"]["N"]),
                deadline=int(item["due_deadline"]["N"]) if "due_deadline" in item else None,
            )
            for item in answer["Items"]
        ]

    def _if_due(self, due: Due, change: str, values: Item) -> bool:
        """Change when a job is due; the job record itself stays untouched."""
        key: Item = {"job_id": {"S": due.job_id}}
        return change_if_due(
            self._client, self._table, key, due.due_at, change, values, "the jobs table"
        )

    def _put(self, job: Job, condition: str, values: Item) -> None:
        item = job_records.encode(job, self._retention_days)
        arguments: dict[str, Any] = {"ExpressionAttributeValues": values} if values else {}
        current = put_if(self._client, self._table, item, condition, "the jobs table", arguments)
        if current is not None:
            raise Stale(job_records.decode(current) if current else None)


class DynamoParams:
    """The requests, gzipped: inline, or in S3 when they are large."""

    def __init__(
        self,
        client: DynamoDBClient,
        table: str,
        objects: Objects,
        clock: Clock,
        retention_days: int,
    ) -> None:
        self._client = client
        self._table = table
        self._objects = objects
        self._clock = clock
        self._retention_days = retention_days

    def add(self, params: Params) -> None:
        """Store the request; raises Conflict if another one is stored under the id already."""
        body = _packed(params)
        days = job_records.waiting_days(self._retention_days)
        item = self._item(params, body if len(body) <= INLINE_BYTES else None)
        if len(body) > INLINE_BYTES:
            # The hash is part of the name, so that another request under the same id cannot overwrite it.
            prefix = "params" if days <= SHORT_DAYS else "long-params"
            key = f"{prefix}/{params.job_id}-{params.request_hash[:16]}.json.gz"
            self._objects.put(key, body)
            item["object_key"] = {"S": key}
        current = put_if(
            self._client, self._table, item, "attribute_not_exists(job_id)", "the params table", {}
        )
        if current and current["request_hash"]["S"] != params.request_hash:
            message = f"another request is stored for job {params.job_id}"
            raise Conflict(message)

    def add_new(self, params: Sequence[Params]) -> set[str]:
        """Store those requests whose ids are free, in one call; return the ids surely stored by it."""
        items = [
            self._item(each, body)
            for each in params
            if len(body := _packed(each)) <= INSERTED_BYTES
        ]
        return insert(self._client, self._table, items, "the params table")

    def _item(self, params: Params, body: bytes | None) -> Item:
        days = job_records.waiting_days(self._retention_days)
        expires = self._clock.now() // 1000 + days * job_records.DAY_SECONDS
        item: Item = {
            "job_id": {"S": params.job_id},
            "request_hash": {"S": params.request_hash},
            "expires_at": {"N": str(expires)},
        }
        if body is not None:
            item["body"] = {"B": body}
        return item

    def get_many(self, job_ids: Sequence[str]) -> Mapping[str, Params]:
        """Return those of the requests that exist, by job id."""
        items = _get_many(self._client, self._table, "job_id", job_ids, "the params table")
        large = {
            item["job_id"]["S"]: item["object_key"]["S"] for item in items if "object_key" in item
        }
        bodies = {item["job_id"]["S"]: bytes(item["body"]["B"]) for item in items if "body" in item}
        if large:
            with ThreadPoolExecutor(OBJECTS_AT_ONCE) as threads:
                objects = threads.map(self._objects.get, large.values())
                bodies |= {
                    name: body
                    for name, body in zip(large, objects, strict=True)
                    if body is not None
                }
        return {
            name: Params(name, gzip.decompress(bodies.pop(name)), item["request_hash"]["S"])
            for item in items
            if (name := item["job_id"]["S"]) in bodies
        }


def _packed(params: Params) -> bytes:
    return gzip.compress(params.body, compresslevel=6, mtime=0)


class DynamoLimits:
    """Limit groups, key marks and canaries in one table, told apart by the first part of `id`."""

    def __init__(self, client: DynamoDBClient, table: str) -> None:
        self._client = client
        self._table = table

    def load(self, group_ids: Iterable[str]) -> Mapping[str, Group]:
        """Return those of the groups that exist."""
        ids = [f"group#{group}" for group in group_ids]
        items = _get_many(self._client, self._table, "id", ids, "the limits table")
        return {group.id: group for group in map(_group, items)}

    def replace(self, group: Group, expected_version: int) -> None:
        """Write if the stored version is the expected one (0: not stored); raises Stale otherwise."""
        item: Item = {
            "id": {"S": f"group#{group.id}"},
            "kind": {"S": "group"},
            "version": {"N": str(group.version)},
            "record": {"S": json.dumps(asdict(group), separators=(",", ":"))},
        }
        condition, arguments = "attribute_not_exists(id)", {}
        if expected_version:
            condition = "version = :expected"
            arguments = {"ExpressionAttributeValues": {":expected": {"N": str(expected_version)}}}
        current = put_if(self._client, self._table, item, condition, "the limits table", arguments)
        if current is not None:
            raise Stale(_group(current) if current else None)

    def groups(self) -> Sequence[Group]:
        """Return all groups; there are few."""
        pages = self._client.get_paginator("scan").paginate(
            TableName=self._table,
            FilterExpression="kind = :group",
            ExpressionAttributeValues={":group": {"S": "group"}},
        )
        items = aws.patiently(
            "the limits table", lambda: [x for page in pages for x in page["Items"]]
        )
        return sorted(map(_group, items), key=lambda group: group.id)

    def marks(self, key_ids: Iterable[str]) -> Mapping[str, KeyMark]:
        """Return what is known about the keys."""
        ids = [f"key#{key}" for key in key_ids]
        items = _get_many(self._client, self._table, "id", ids, "the limits table")
        records = [json.loads(item["record"]["S"]) for item in items]
        return {record["key_id"]: job_records.made(KeyMark, record) for record in records}

    def mark(self, mark: KeyMark) -> None:
        """Write what is known about a key; the last writer wins, for all say the same."""
        aws.patiently(
            "the limits table",
            self._client.put_item,
            TableName=self._table,
            Item={
                "id": {"S": f"key#{mark.key_id}"},
                "kind": {"S": "key"},
                "record": {"S": json.dumps(asdict(mark))},
            },
        )

    def learned_groups(self) -> Mapping[str, str]:
        """Return which model belongs to which limit group, where upstream says otherwise than our data."""
        items = _get_many(self._client, self._table, "id", [LEARNED_ID], "the limits table")
        groups: dict[str, str] = json.loads(items[0]["record"]["S"]) if items else {}
        return groups

    def learn_groups(self, groups: Mapping[str, str]) -> None:
        """Write that; the last writer wins, for all read the same list."""
        aws.patiently(
            "the limits table",
            self._client.put_item,
            TableName=self._table,
            Item={"id": {"S": LEARNED_ID}, "record": {"S": json.dumps(dict(groups))}},
        )

    def canary(self, canary_id: str, now: int) -> None:
        """Note that a probe came through."""
        aws.patiently(
            "the limits table",
            self._client.put_item,
            TableName=self._table,
            Item={
                "id": {"S": f"canary#{canary_id}"},
                "at": {"N": str(now)},
                "expires_at": {"N": str(now // 1000 + CANARY_SECONDS)},
            },
        )


class DynamoGovernorNotes:
    """What the governor remembers of one mapping, in an item of the limits table."""

    def __init__(self, client: DynamoDBClient, table: str, item_id: str) -> None:
        self._client = client
        self._table = table
        self._key: Item = {"id": {"S": item_id}}

    def read(self) -> Note:
        """Return what was written last; an empty note if nothing was."""
        answer = aws.patiently(
            "the limits table",
            self._client.get_item,
            TableName=self._table,
            Key=self._key,
            ConsistentRead=True,
        )
        item = answer.get("Item", {})
        return Note(**{name: int(item[name]["N"]) for name in NOTE_FIELDS if name in item})

    def write(self, note: Note) -> None:
        """Remember this, and nothing else."""
        facts = {name: getattr(note, name) for name in NOTE_FIELDS}
        item = self._key | {name: {"N": str(fact)} for name, fact in facts.items() if fact}
        aws.patiently("the limits table", self._client.put_item, TableName=self._table, Item=item)


class DynamoLedger:
    """One row per call, and sums per tenant, day, model and lane."""

    def __init__(self, client: DynamoDBClient, rows_table: str, sums_table: str) -> None:
        self._client = client
        self._rows_table = rows_table
        self._sums_table = sums_table

    def record(self, rows: Sequence[LedgerRow]) -> None:
        """Write rows; writing one again changes nothing."""
        for some in _chunks(list(rows), WRITE_AT_ONCE):
            # The same row twice in one request is an error to DynamoDB.
            items = {(row.tenant, row.day, row.call_id): _ledger_item(row) for row in some}
            waiting: Any = {
                self._rows_table: [{"PutRequest": {"Item": item}} for item in items.values()]
            }
            for _ in range(5):
                answer = aws.patiently(
                    "the ledger", self._client.batch_write_item, RequestItems=waiting
                )
                waiting = answer.get("UnprocessedItems")
                if not waiting:
                    break
            else:
                what = "the ledger"
                raise StoreBusy(what)

    def add_up(self, sums: Mapping[tuple[str, date, str, str], Spend]) -> None:
        """Add to the sums."""
        for (tenant, day, model, lane), spend in sums.items():
            numbers = spend.as_dict()
            aws.patiently(
                "the usage table",
                self._client.update_item,
                TableName=self._sums_table,
                Key={"tenant": {"S": tenant}, "bucket": {"S": f"{day}#{model}#{lane}"}},
                UpdateExpression="ADD " + ", ".join(f"{name} :{name}" for name in numbers),
                ExpressionAttributeValues={
                    f":{name}": {"N": str(value)} for name, value in numbers.items()
                },
            )

    def spent(self, tenant: str, first: date, last: date) -> Sequence[tuple[date, str, str, Spend]]:
        """Return (day, model, lane, sums) from the first day to the last."""
        pages = self._client.get_paginator("query").paginate(
            TableName=self._sums_table,
            KeyConditionExpression="tenant = :tenant AND #bucket BETWEEN :first AND :last",
            ExpressionAttributeNames={"#bucket": "bucket"},
            ExpressionAttributeValues={
                ":tenant": {"S": tenant},
                ":first": {"S": f"{first}#"},
                ":last": {"S": f"{last}$"},  # "$" sorts right after "#"
            },
        )
        items = aws.patiently(
            "the usage table", lambda: [x for page in pages for x in page["Items"]]
        )
        rows = []
        for item in items:
            # A relay may name its models as it likes.
            day, rest = item["bucket"]["S"].split("#", 1)
            model, lane = rest.rsplit("#", 1)
            numbers = {
                each.name: int(item[each.name]["N"]) for each in fields(Spend) if each.name in item
            }
            rows.append((date.fromisoformat(day), model, lane, Spend(**numbers)))
        return rows


class DynamoClientKeys:
    """Client keys by keyed hash, each looked up at most once a minute."""

    CACHE_MS: Final = 60_000
    MOST_CACHED: Final = 10_000

    def __init__(
        self, client: DynamoDBClient, table: str, pepper: Callable[[], str], clock: Clock
    ) -> None:
        self._client = client
        self._table = table
        self._pepper = pepper
        self._clock = clock
        self._cache: dict[str, tuple[int, str | None]] = {}

    def tenant(self, key: str) -> str | None:
        """Return the tenant of a client key, None for an unknown or disabled one."""
        pepper = self._pepper()
        name = key_id(pepper, key)
        now = self._clock.now()
        cached = self._cache.get(name)
        if cached is not None and now - cached[0] < self.CACHE_MS:
            return cached[1]
        answer = aws.patiently(
            "the client keys table",
            self._client.get_item,
            TableName=self._table,
            Key={"key_id": {"S": name}},
        )
        item = answer.get("Item")
        tenant = None
        if item is not None and matches(pepper, key, item["hash"]["S"]):
            disabled = bool(item.get("disabled", {}).get("BOOL", False))
            tenant = None if disabled else item["tenant"]["S"]
        if len(self._cache) >= self.MOST_CACHED:
            self._cache.clear()
        self._cache[name] = (now, tenant)
        return tenant


def _chunks(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def change_if_due(  # noqa: PLR0913, PLR0917 - one conditional write
    client: DynamoDBClient,
    table: str,
    key: Item,
    due_at: int,
    change: str,
    values: Item,
    what: str,
) -> bool:
    """Change an item that is still due when it was; False when it has gone on."""
    try:
        aws.patiently(
            what,
            client.update_item,
            TableName=table,
            Key=key,
            UpdateExpression=change,
            ConditionExpression="due_at = :seen",
            ExpressionAttributeValues={":seen": {"N": str(due_at)}, **values},
        )
    except ClientError as error:
        if aws.code(error) != "ConditionalCheckFailedException":
            raise
        return False
    return True


def put_if(  # noqa: PLR0913, PLR0917 - one conditional write
    client: DynamoDBClient,
    table: str,
    item: Item,
    condition: str,
    what: str,
    arguments: dict[str, Any],
) -> Item | None:
    """Put if the condition holds; return None, or the item that stands there instead (empty when there is none).

    A write whose reply was lost is tried again and then meets itself: that counts as done. Its mark tells it from
    the very same change made by somebody else in the same millisecond, which must not count as done.
    """
    item = _marked(item)
    try:
        aws.patiently(
            what,
            client.put_item,
            TableName=table,
            Item=item,
            ConditionExpression=condition,
            ReturnValuesOnConditionCheckFailure="ALL_OLD",
            **arguments,
        )
    except ClientError as error:
        if aws.code(error) != "ConditionalCheckFailedException":
            raise
        current: Item = error.response.get("Item", {})  # type: ignore[assignment]
        return None if current == item else current
    return None


def _marked(item: Item) -> Item:
    """Return the item with a mark of its own, by which a write that meets itself is known."""
    return {**item, "written_as": {"S": uuid4().hex}}


def insert(client: DynamoDBClient, table: str, items: Sequence[Item], what: str) -> set[str]:
    """Insert at most 25 items in one call; return the job ids of those that were not there and are now.

    PartiQL's INSERT is the conditional put that comes in batches: an id that is taken is that statement's error alone,
    and it costs what a put costs (AWS, BatchExecuteStatement). Of the others nothing is known: they may be there
    already, refused for now, or stored by an earlier try whose reply was lost.
    """
    if not items:
        return set()
    statements: Any = [
        {
            "Statement": f'INSERT INTO "{table}" VALUE {{{", ".join(f"{name!r}: ?" for name in item)}}}',
            "Parameters": list(item.values()),
        }
        for item in items
    ]
    answer = aws.patiently(what, client.batch_execute_statement, Statements=statements)
    for response in answer["Responses"]:
        if response.get("Error", {}).get("Code") == "AccessDenied":
            # A statement that the role may not run is refused by itself, in an answer of 200.
            aws.note_refusal("BatchExecuteStatement", what)
    return {
        item["job_id"]["S"]
        for item, response in zip(items, answer["Responses"], strict=True)
        if "Error" not in response
    }


def _get_many(
    client: DynamoDBClient, table: str, key: str, values: Sequence[str], what: str
) -> list[Item]:
    items: list[Item] = []
    for some in _chunks(list(dict.fromkeys(values)), GET_AT_ONCE):
        waiting: Any = {
            table: {"Keys": [{key: {"S": value}} for value in some], "ConsistentRead": True}
        }
        for _ in range(5):
            answer = aws.patiently(what, client.batch_get_item, RequestItems=waiting)
            items.extend(answer["Responses"].get(table, ()))
            waiting = answer.get("UnprocessedKeys")
            if not waiting:
                break
        else:
            raise StoreBusy(what)
    return items


def _group(item: Item) -> Group:
    record = json.loads(item["record"]["S"])
    for dimension in DIMENSIONS:
        record[dimension] = job_records.made(Bucket, record[dimension])
    record["recent_writes"] = tuple(record.get("recent_writes", ()))
    record["waiting"] = {name: tuple(said) for name, said in record.get("waiting", {}).items()}
    if record.get("day"):
        record["day"] = job_records.made(Bucket, record["day"])
    record["circuits"] = {
        name: job_records.made(Breaker, breaker)
        for name, breaker in record.get("circuits", {}).items()
    }
    return job_records.made(Group, record)


def _ledger_item(row: LedgerRow) -> Item:
    texts = {
        "tenant_day": f"{row.tenant}#{row.day}",
        "call_id": row.call_id,
        "job_id": row.job_id,
        "model": row.model,
        "lane": row.lane,
        "organization": row.organization,
        "key_id": row.key_id,
        "request_id": row.request_id,
        "outcome": row.outcome,
        "note": row.note,
    }
    item: Item = {name: {"S": text} for name, text in texts.items() if text}
    item |= {name: {"N": str(number)} for name, number in row.spend.as_dict().items()}
    item["certain"] = {"BOOL": row.certain}
    day_start = (row.day - date(1970, 1, 1)).days * job_records.DAY_SECONDS
    item["expires_at"] = {"N": str(day_start + LEDGER_DAYS * job_records.DAY_SECONDS)}
    return item


def _index_key(job: Job) -> Item:
    return {
        "job_id": {"S": job.job_id},
        "tenant": {"S": job.tenant},
        "created_key": {"S": job_records.created_key(job)},
    }


def _page(last: Mapping[str, Any]) -> str:
    text = last["created_key"]["S"]
    return urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _unpage(page: str, tenant: str) -> Item:
    try:
        text = urlsafe_b64decode(page + "=" * (-len(page) % 4)).decode()
        created, job_id = text.split("#")
        if not created.isdigit() or not job_id:
            raise ValueError(text)  # noqa: TRY301 - said below, once
    except ValueError as error:
        message = f"page: {page!r} is not a next_page of an earlier answer"
        raise InvalidRequest(message) from error
    return {
        "job_id": {"S": job_id},
        "tenant": {"S": tenant},
        "created_key": {"S": text},
    }
