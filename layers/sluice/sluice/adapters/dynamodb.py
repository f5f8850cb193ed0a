"""Jobs, requests, limits, ledger and client keys in DynamoDB. Every write of shared state is conditional."""

from __future__ import annotations

import gzip
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from datetime import date
from typing import TYPE_CHECKING, Any, Final

from sluice.adapters import job_records
from sluice.adapters.tables import Table, marked
from sluice.domain.breakers import Breaker
from sluice.domain.client_keys import key_id, matches
from sluice.domain.errors import Conflict, InvalidRequest, StoreBusy
from sluice.domain.jobs import DueFor, Job, State, due_after_send
from sluice.domain.keys import KeyMark
from sluice.domain.limits import DIMENSIONS, Bucket, Group, expires_at
from sluice.domain.models import Answered, KnownModels
from sluice.domain.pricing import LedgerRow, Spend
from sluice.domain.shares import Note
from sluice.domain.turns import Shares
from sluice.domain.workspaces import Workspace
from sluice.ports.clients import Recalled
from sluice.ports.jobs import Due, Page, Params
from sluice.ports.limits import MOST_GROUPS
from sluice.ports.world import Clock

if TYPE_CHECKING:
    from collections.abc import Callable

    from mypy_boto3_dynamodb import DynamoDBClient

    from sluice.adapters.job_records import Item
    from sluice.adapters.s3 import Objects

INLINE_BYTES: Final = 350_000
"""Requests above this size, compressed, go to S3: an item holds 400 KB."""

INSERTED_BYTES: Final = 100_000
"""Larger requests, compressed, are not inserted together, because a call with 25 of them would be long."""

OBJECTS_AT_ONCE: Final = 8

SHORT_DAYS: Final = 60
"""How long the template keeps objects under params/; those with a longer retention are under long-params/."""

MODELS_ID: Final = "models#known"

JOBS_NOTES_ID: Final = "governor#notes"
"""The note on jobs has its own item, like each other mapping: a release that governs only jobs replaces this item."""

NOTE_FIELDS: Final = tuple(field.name for field in fields(Note))

FILTERED_AT_ONCE: Final = 1_000
"""Items read per query when a listing is filtered by state."""

MOST_PAGES: Final = 10
"""Queries per page of a filtered listing."""

MOST_NOTED: Final = 10_000
"""Pairs of tenant and organization that an environment remembers."""

LEDGER_DAYS: Final = 400
"""Retention of ledger rows: a year and a month, so that the statement of a year can be checked."""

CANARY_SECONDS: Final = 86_400


def notes_id(mapping: str) -> str:
    """Return the id of the item with the governor's note on a mapping."""
    return JOBS_NOTES_ID if mapping == "jobs" else f"{JOBS_NOTES_ID}#{mapping}"


class DynamoJobs:
    """The job records."""

    def __init__(self, client: DynamoDBClient, table: str, retention_days: int) -> None:
        self._table = Table(client, table, "the jobs table", "job_id")
        self._retention_days = retention_days

    def add(self, job: Job) -> None:
        """Store a new job; raises Stale with the stored job if its id is in use."""
        self.replace(job, 0)

    def add_new(self, jobs: Sequence[Job]) -> set[str]:
        """Store the jobs whose ids are not in use, in one call; return the ids that are known to be stored by it.

        Raises StoreBusy, with `may_be_done` if some may be stored.
        """
        items = [marked(job_records.encode(job, self._retention_days)) for job in jobs]
        doubt: StoreBusy | None = None
        try:
            done = self._table.insert(items)
        except StoreBusy as busy:
            if not busy.may_be_done:
                raise
            done, doubt = set(), busy
        unsure = [item for item in items if item["job_id"]["S"] not in done]
        if not unsure:
            return done
        # A call whose response was lost was retried, and then met its own items.
        try:
            stored = self._table.get_many([item["job_id"]["S"] for item in unsure])
        except StoreBusy as busy:
            raise StoreBusy(busy.what, may_be_done=True) from doubt or busy
        return done | {item["job_id"]["S"] for item in unsure if item in stored}

    def get(self, job_id: str) -> Job | None:
        """Return the job as last written (a consistent read)."""
        item = self._table.get({"job_id": {"S": job_id}})
        return job_records.decode(item) if item is not None else None

    def get_many(self, job_ids: Sequence[str]) -> Mapping[str, Job]:
        """Return the jobs that exist (consistent reads)."""
        items = self._table.get_many(job_ids)
        return {job.job_id: job for job in map(job_records.decode, items)}

    def replace(self, job: Job, expected_version: int) -> None:
        """Write the job if its stored version is the expected one; otherwise raises Stale."""
        item = job_records.encode(job, self._retention_days)
        self._table.replace(item, expected_version, job_records.decode)

    def listing(self, tenant: str, state: State | None, limit: int, page: str | None) -> Page:
        """Return the tenant's jobs, newest first. With a state, a page may be shorter than `limit`."""
        arguments: dict[str, Any] = {
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
        # DynamoDB filters items after it has read them: read on until the page is full, but not indefinitely.
        for _ in range(MOST_PAGES):
            if last:
                arguments["ExclusiveStartKey"] = last
            answer = self._table.query(
                **arguments, Limit=limit if state is None else FILTERED_AT_ONCE
            )
            jobs.extend(map(job_records.decode, answer["Items"]))
            last = answer.get("LastEvaluatedKey")
            if len(jobs) >= limit or not last:
                break
        if len(jobs) > limit:
            jobs = jobs[:limit]
            last = _index_key(jobs[-1])
        return Page(tuple(jobs), _page(last) if last else None)

    def due(self, why: DueFor, now: int, share: int) -> Sequence[Due]:
        """Return the due jobs, longest due first: about `share` of each tenant and model at most."""
        found: list[Due] = []
        for part in range(job_records.DUE_SHARDS):
            shares = Shares[Due](lambda each: (each.tenant, each.model), job_records.part_of(share))
            self._table.due(job_records.due_shard(why, part), now, shares, _due)
            found += shares.items
        return sorted(found, key=lambda each: (each.due_at, each.job_id))

    def postpone(self, due: Due, until: int) -> Due | None:
        """Make the job due again at `until` only; None if another sweep was first."""
        is_first = self._update_if_due(due, "SET due_at = :until", {":until": {"N": str(until)}})
        return replace(due, due_at=until) if is_first else None

    def forget(self, due: Due) -> None:
        """Remove the job from the index, unless it was written since."""
        self._update_if_due(due, "REMOVE due_at, due_shard", {})

    def watch(self, due: Due, until: int) -> None:
        """Make a sent job due again at `until`, or at its deadline if that is first, unless it was written since."""
        why, at = due_after_send(due.deadline, until)
        shard = job_records.due_shard(why, job_records.due_part(due.job_id))
        values: Item = {":until": {"N": str(at)}, ":shard": {"S": shard}}
        self._update_if_due(due, "SET due_at = :until, due_shard = :shard", values)

    def _update_if_due(self, due: Due, change: str, values: Item) -> bool:
        """Change only the attributes of the index; the job record stays as it is."""
        return self._table.update_if_due({"job_id": {"S": due.job_id}}, due.due_at, change, values)


def _due(item: Item) -> Due:
    return Due(
        job_id=item["job_id"]["S"],
        tenant=item["tenant"]["S"],
        model=item["due_model"]["S"],
        due_at=int(item["due_at"]["N"]),
        deadline=int(item["due_deadline"]["N"]) if "due_deadline" in item else None,
    )


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
        self._table = Table(client, table, "the params table", "job_id")
        self._objects = objects
        self._clock = clock
        self._retention_days = retention_days

    def add(self, params: Params, *, over_leftover: bool = False) -> None:
        """Store the request; raises Conflict if a different one is stored under its id.

        One that was stored more than a day ago is stored anew, with a later expiry. With `over_leftover` it may be a
        different one: no submit that is in progress can have stored it.
        """
        body = _packed(params)
        days = job_records.waiting_days(self._retention_days)
        item = self._item(params, body if len(body) <= INLINE_BYTES else None)
        if len(body) > INLINE_BYTES:
            # The hash is part of the key, so that a different request with the same id does not overwrite it.
            prefix = "params" if days <= SHORT_DAYS else "long-params"
            key = f"{prefix}/{params.job_id}-{params.request_hash[:16]}.json.gz"
            self._objects.put(key, body)
            item["object_key"] = {"S": key}
        fresh_until = int(item["expires_at"]["N"]) - job_records.DAY_SECONDS
        values: Item = {":fresh": {"N": str(fresh_until)}}
        renewed = "expires_at < :fresh"
        if not over_leftover:
            renewed += " AND request_hash = :hash"
            values[":hash"] = {"S": params.request_hash}
        current = self._table.put_if(
            item,
            f"attribute_not_exists(job_id) OR ({renewed})",
            ExpressionAttributeValues=values,
        )
        if current and current["request_hash"]["S"] != params.request_hash:
            raise Conflict(f"a different request is stored for job {params.job_id}")

    def add_new(self, params: Sequence[Params]) -> set[str]:
        """Store the requests whose ids are not in use, in one call; return the ids known to be stored by it."""
        items = [
            self._item(each, body)
            for each in params
            if len(body := _packed(each)) <= INSERTED_BYTES
        ]
        return self._table.insert(items)

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
        """Return the requests that exist, by job id."""
        items = self._table.get_many(job_ids)
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
    """Limit groups, key marks and canaries in one table; the first part of `id` distinguishes them."""

    def __init__(self, client: DynamoDBClient, table: str) -> None:
        self._table = Table(client, table, "the limits table", "id")

    def load(self, group_ids: Iterable[str]) -> Mapping[str, Group]:
        """Return the groups that exist, by id."""
        items = self._table.get_many([f"group#{group}" for group in group_ids])
        return {group.id: group for group in map(_group, items)}

    def replace(self, group: Group, expected_version: int) -> None:
        """Write if the stored version is the expected one (0: not stored); otherwise raises Stale."""
        item: Item = {
            "id": {"S": f"group#{group.id}"},
            "kind": {"S": "group"},
            "version": {"N": str(group.version)},
            "record": {"S": json.dumps(asdict(group), separators=(",", ":"))},
            "expires_at": {"N": str(expires_at(group))},
        }
        self._table.replace(item, expected_version, _group)

    def groups(self) -> Sequence[Group]:
        """Return the groups in use, at most MOST_GROUPS."""
        items = self._table.scan(
            MOST_GROUPS,
            FilterExpression="kind = :group",
            ExpressionAttributeValues={":group": {"S": "group"}},
        )
        return sorted(map(_group, items), key=lambda group: group.id)

    def marks(self, key_ids: Iterable[str]) -> Mapping[str, KeyMark]:
        """Return the marks of the keys that have one, by key id."""
        items = self._table.get_many([f"key#{key}" for key in key_ids])
        records = [json.loads(item["record"]["S"]) for item in items]
        return {record["key_id"]: job_records.made(KeyMark, record) for record in records}

    def mark(self, mark: KeyMark) -> None:
        """Write the mark of a key; the last writer wins, as all write the same."""
        self._table.put(
            {
                "id": {"S": f"key#{mark.key_id}"},
                "kind": {"S": "key"},
                "record": {"S": json.dumps(asdict(mark))},
            }
        )

    def models(self) -> KnownModels:
        """Return the models that are known beside those of the deployed data; version 0 if none is."""
        items = self._table.get_many([MODELS_ID])
        return _models(items[0]) if items else KnownModels()

    def replace_models(self, models: KnownModels, expected_version: int) -> None:
        """Write if the stored version is the expected one (0: not stored); otherwise raises Stale."""
        item: Item = {
            "id": {"S": MODELS_ID},
            "version": {"N": str(models.version)},
            "record": {"S": json.dumps(asdict(models), separators=(",", ":"))},
        }
        self._table.replace(item, expected_version, _models)

    def canary(self, canary_id: str, now: int) -> None:
        """Record that a canary message was received."""
        self._table.put(
            {
                "id": {"S": f"canary#{canary_id}"},
                "at": {"N": str(now)},
                "expires_at": {"N": str(now // 1000 + CANARY_SECONDS)},
            }
        )


class DynamoGovernorNotes:
    """The governor's note on one mapping, in an item of the limits table."""

    def __init__(self, client: DynamoDBClient, table: str, item_id: str) -> None:
        self._table = Table(client, table, "the limits table", "id")
        self._key: Item = {"id": {"S": item_id}}

    def read(self) -> Note:
        """Return the last note; an empty one if there is none."""
        item = self._table.get(self._key) or {}
        return Note(**{name: int(item[name]["N"]) for name in NOTE_FIELDS if name in item})

    def write(self, note: Note) -> None:
        """Replace the note."""
        facts = {name: getattr(note, name) for name in NOTE_FIELDS}
        self._table.put(
            self._key | {name: {"N": str(fact)} for name, fact in facts.items() if fact}
        )


class DynamoLedger:
    """One row per upstream call, and sums per tenant, day, model and lane."""

    def __init__(self, client: DynamoDBClient, rows_table: str, sums_table: str) -> None:
        self._rows = Table(client, rows_table, "the ledger", "call_id")
        self._sums = Table(client, sums_table, "the usage table", "tenant")
        self._noted: set[tuple[str, str]] = set()
        """The buckets of organizations that this environment has noted, by tenant."""

    def record(self, rows: Sequence[LedgerRow]) -> None:
        """Write rows; writing a row again changes nothing."""
        # DynamoDB rejects a request that has the same row twice.
        items = {(row.tenant, row.day, row.call_id): _ledger_item(row) for row in rows}
        self._rows.put_all(list(items.values()))
        self._note_organizations(rows)

    def _note_organizations(self, rows: Sequence[LedgerRow]) -> None:
        """Note in whose organizations each tenant's calls are made, once a day and environment."""
        places = {
            (row.tenant, f"organization#{row.day}#{row.organization}")
            for row in rows
            if row.organization
        }
        for tenant, bucket in places - self._noted:
            self._sums.add({"tenant": {"S": tenant}, "bucket": {"S": bucket}}, {"calls": 0})
            if len(self._noted) >= MOST_NOTED:
                self._noted.clear()
            self._noted.add((tenant, bucket))

    def organizations(self, tenant: str, first: date, last: date) -> set[str]:
        """Return the organizations that the tenant's calls were made in, from the first day to the last."""
        items = self._sums.query_all(
            KeyConditionExpression="tenant = :tenant AND #bucket BETWEEN :first AND :last",
            ExpressionAttributeNames={"#bucket": "bucket"},
            ExpressionAttributeValues={
                ":tenant": {"S": tenant},
                ":first": {"S": f"organization#{first}#"},
                ":last": {"S": f"organization#{last}$"},  # "$" sorts right after "#"
            },
        )
        return {item["bucket"]["S"].split("#", 2)[2] for item in items}

    def record_missing(self, rows: Sequence[LedgerRow]) -> Sequence[LedgerRow]:
        """Write those rows whose calls have no row yet; return them."""
        absent = "attribute_not_exists(call_id)"
        return [row for row in rows if self._rows.put_if(_ledger_item(row), absent) is None]

    def calls_of(self, tenant: str, days: Sequence[date], job_id: str) -> Sequence[LedgerRow]:
        """Return the rows of a job's calls on these days."""
        items = [
            item
            for day in days
            for item in self._rows.query_all(
                KeyConditionExpression="tenant_day = :tenant_day AND begins_with(call_id, :calls)",
                ExpressionAttributeValues={
                    ":tenant_day": {"S": f"{tenant}#{day}"},
                    ":calls": {"S": f"{job_id}#"},
                },
                ConsistentRead=True,
            )
        ]
        return [_ledger_row(item) for item in items]

    def add_up(self, sums: Mapping[tuple[str, date, str, str], Spend]) -> None:
        """Add to the sums."""
        for (tenant, day, model, lane), spend in sums.items():
            key: Item = {"tenant": {"S": tenant}, "bucket": {"S": f"{day}#{model}#{lane}"}}
            self._sums.add(key, spend.as_dict())

    def spent(self, tenant: str, first: date, last: date) -> Sequence[tuple[date, str, str, Spend]]:
        """Return (day, model, lane, sums) from the first day to the last."""
        items = self._sums.query_all(
            KeyConditionExpression="tenant = :tenant AND #bucket BETWEEN :first AND :last",
            ExpressionAttributeNames={"#bucket": "bucket"},
            ExpressionAttributeValues={
                ":tenant": {"S": tenant},
                ":first": {"S": f"{first}#"},
                ":last": {"S": f"{last}$"},  # "$" sorts right after "#"
            },
        )
        rows = []
        for item in items:
            # The model name may contain "#" if the upstream is a proxy.
            day, rest = item["bucket"]["S"].split("#", 1)
            model, lane = rest.rsplit("#", 1)
            rows.append((date.fromisoformat(day), model, lane, _spend(item)))
        return rows


class DynamoClientKeys:
    """Client keys by keyed hash; each is read at most once a minute."""

    CACHE_MS: Final = 60_000
    MOST_UNKNOWN: Final = 10_000

    def __init__(
        self, client: DynamoDBClient, table: str, pepper: Callable[[], str], clock: Clock
    ) -> None:
        self._table = Table(client, table, "the client keys table", "key_id")
        self._pepper = pepper
        self._clock = clock
        self._tenants: dict[str, tuple[int, str]] = {}
        """When each key was read, and its tenant. There are only as many as there are keys."""
        self._unknown: dict[str, int] = {}
        """When each unknown key was read. Strangers invent them, so they are few and do not replace known ones."""

    def recall(self, key: str) -> Recalled:
        """Return what is known of the key, without a call."""
        name, now = key_id(self._pepper(), key), self._clock.now()
        if name in self._tenants:
            at, tenant = self._tenants[name]
            return Recalled(name, tenant, needs_lookup=now - at >= self.CACHE_MS)
        read_at = self._unknown.get(name)
        is_old = read_at is None or now - read_at >= self.CACHE_MS
        return Recalled(name, None, needs_lookup=is_old)

    def tenant(self, key: str) -> str | None:
        """Return the tenant of a client key, None for an unknown or disabled one."""
        recalled = self.recall(key)
        if not recalled.needs_lookup:
            return recalled.tenant
        name, now = recalled.key_id, self._clock.now()
        item = self._table.get({"key_id": {"S": name}}, consistent=False)
        tenant = None
        if item is not None and matches(self._pepper(), key, item["hash"]["S"]):
            disabled = bool(item.get("disabled", {}).get("BOOL", False))
            tenant = None if disabled else item["tenant"]["S"]
        self._tenants.pop(name, None)
        if tenant is not None:
            self._tenants[name] = now, tenant
            return tenant
        if len(self._unknown) >= self.MOST_UNKNOWN:
            self._unknown.clear()
        self._unknown[name] = now
        return None


def _group(item: Item) -> Group:
    record = json.loads(item["record"]["S"])
    for dimension in DIMENSIONS:
        record[dimension] = job_records.made(Bucket, record[dimension])
    record["recent_writes"] = tuple(record.get("recent_writes", ()))
    record["portions"] = tuple((name, part) for name, part in record.get("portions", ()))
    record["waiting"] = {name: tuple(said) for name, said in record.get("waiting", {}).items()}
    if record.get("day"):
        record["day"] = job_records.made(Bucket, record["day"])
    record["circuits"] = {
        name: job_records.made(Breaker, breaker)
        for name, breaker in record.get("circuits", {}).items()
    }
    record["workspaces"] = {
        name: job_records.made(Workspace, workspace)
        for name, workspace in record.get("workspaces", {}).items()
    }
    return job_records.made(Group, record)


def _models(item: Item) -> KnownModels:
    record = json.loads(item["record"]["S"])
    record["answered"] = {
        model: job_records.made(Answered, each) for model, each in record["answered"].items()
    }
    return job_records.made(KnownModels, record)


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
    numbers = row.spend.as_dict()
    for name in ("unknown_costs", "uncertain_calls"):
        if not numbers[name]:
            del numbers[name]
    item |= {name: {"N": str(number)} for name, number in numbers.items()}
    item["certain"] = {"BOOL": row.certain}
    day_start = (row.day - date(1970, 1, 1)).days * job_records.DAY_SECONDS
    item["expires_at"] = {"N": str(day_start + LEDGER_DAYS * job_records.DAY_SECONDS)}
    return item


def _ledger_row(item: Item) -> LedgerRow:
    def text(name: str) -> str | None:
        return item[name]["S"] if name in item else None

    tenant, _, day = item["tenant_day"]["S"].rpartition("#")
    return LedgerRow(
        tenant=tenant,
        day=date.fromisoformat(day),
        call_id=item["call_id"]["S"],
        job_id=item["job_id"]["S"],
        model=text("model") or "",
        lane=text("lane") or "",
        organization=text("organization"),
        key_id=text("key_id") or "",
        request_id=text("request_id"),
        outcome=text("outcome") or "",
        spend=_spend(item),
        certain=item["certain"]["BOOL"],
        note=text("note"),
    )


def _spend(item: Item) -> Spend:
    names = (each.name for each in fields(Spend))
    return Spend(**{name: int(item[name]["N"]) for name in names if name in item})


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
            raise ValueError(text)  # noqa: TRY301 - reported below
    except ValueError as error:
        raise InvalidRequest(f"page: {page!r} is not a next_page of an earlier response") from error
    return {
        "job_id": {"S": job_id},
        "tenant": {"S": tenant},
        "created_key": {"S": text},
    }
