"""Batches and ranges in one DynamoDB table, distinguished by its sort key. Writes of shared state are conditional."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

from sluice.adapters import job_records
from sluice.adapters.tables import Table
from sluice.domain.batches import (
    Batch,
    LaneDecision,
    Options,
    Phase,
    Plan,
    Progress,
    RangeState,
    Source,
    Tally,
)
from sluice.domain.turns import Shares
from sluice.ports.batches import BatchPage, DueRange, Newcomer, SeenRange
from sluice.ports.world import Clock

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

    from sluice.adapters.job_records import Item

BATCH: Final = "batch"
NEWCOMERS: Final = "newcomers"
"""The partition with the list of newcomers; its sort keys are tenant and batch."""

_RUNNING: Final = "running_"
"""With a member's number: the attribute of a group that holds the member's sums so far."""

_NOT_DONE: Final = "attribute_not_exists(done) OR NOT contains(done, :number)"
_DUE: Final = ("due_shard", "due_at", "due_tenant", "due_model")


class DynamoBatches:
    """The records of batches and of their ranges."""

    def __init__(
        self, client: DynamoDBClient, table: str, retention_days: int, clock: Clock
    ) -> None:
        self._table = Table(client, table, "the batches table", "batch_id")
        self._retention_days = retention_days
        self._clock = clock

    def add(self, batch: Batch) -> None:
        """Store a new batch; raises Stale with the stored batch if its id is in use."""
        self.replace(batch, 0)

    def get(self, batch_id: str) -> Batch | None:
        """Return the batch as last written (a consistent read)."""
        item = self._get(batch_id, BATCH)
        return _batch(item) if item else None

    def replace(self, batch: Batch, expected_version: int) -> None:
        """Write the batch if its stored version is the expected one; otherwise raises Stale."""
        self._table.replace(self._batch_item(batch), expected_version, _batch)

    def listing(
        self, tenant: str, limit: int, *, after: Batch | None = None, before: Batch | None = None
    ) -> BatchPage:
        """Return the tenant's batches, newest first: those older than `after`, or the next newer than `before`."""
        condition, values = "tenant = :tenant", {":tenant": {"S": tenant}}
        if after or before:
            condition += f" AND created_key {'<' if after else '>'} :from"
            values[":from"] = {"S": (after or before).rank}  # type: ignore[union-attr]
        answer = self._table.query(
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
        """Return the state of a range; its version is 0 if it was never claimed."""
        item = self._get(batch.batch_id, _range_part(number))
        return _range(item) if item else RangeState(batch.batch_id, number, batch.tenant)

    def seen_ranges(self, batch_id: str, numbers: range) -> Mapping[int, SeenRange]:
        """Return those of consecutive ranges that were ever claimed."""
        items = self._table.query_all(
            KeyConditionExpression="batch_id = :batch AND part BETWEEN :first AND :last",
            ExpressionAttributeValues={
                ":batch": {"S": batch_id},
                ":first": {"S": _range_part(numbers[0])},
                ":last": {"S": _range_part(numbers[-1])},
            },
            ConsistentRead=True,
        )
        found = [SeenRange(_range(item), "due_at" in item) for item in items]
        return {each.state.number: each for each in found}

    def replace_range(self, state: RangeState, expected_version: int) -> None:
        """Write the state if its stored version is the expected one (0: not stored); otherwise raises Stale."""
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
        self._table.replace(item, expected_version, _range)

    def mark(self, batch_id: str, group: str, member: int, tally: Tally) -> Progress:
        """Count a member of a group as done, only once even if repeated; return the progress of the group."""
        numbers = tally.as_dict()
        adds = ", ".join(["done :member", *(f"#{name} :{name}" for name in numbers)])
        names = {f"#{name}": name for name in numbers} | {"#running": f"{_RUNNING}{member}"}
        counted = self._table.update_if(
            {"batch_id": {"S": batch_id}, "part": {"S": group}},
            f"SET expires_at = :expires ADD {adds} REMOVE #running",
            _NOT_DONE,
            ExpressionAttributeValues={
                ":member": {"NS": [str(member)]},
                ":number": {"N": str(member)},
                ":expires": {"N": str(self._expires())},
                **{f":{name}": {"N": str(value)} for name, value in numbers.items()},
            },
            ExpressionAttributeNames=names,
            ReturnValues="ALL_NEW",
        )
        return _progress(counted if counted is not None else self._get(batch_id, group) or {})

    def note_running(self, batch_id: str, group: str, member: int, tally: Tally) -> None:
        """Note the sums of a member so far; does nothing once the member is done."""
        self._table.update_if(
            {"batch_id": {"S": batch_id}, "part": {"S": group}},
            "SET expires_at = :expires, #running = :sums",
            _NOT_DONE,
            ExpressionAttributeNames={"#running": f"{_RUNNING}{member}"},
            ExpressionAttributeValues={
                ":sums": {"S": json.dumps(tally.as_dict(), separators=(",", ":"))},
                ":number": {"N": str(member)},
                ":expires": {"N": str(self._expires())},
            },
        )

    def groups(self, batch_id: str, prefix: str) -> Mapping[str, Progress]:
        """Return the progress of all groups whose names have this prefix, by name, in order of names."""
        items = self._table.query_all(
            KeyConditionExpression="batch_id = :batch AND begins_with(part, :prefix)",
            ExpressionAttributeValues={":batch": {"S": batch_id}, ":prefix": {"S": prefix}},
            ConsistentRead=True,
        )
        return {item["part"]["S"]: _progress(item) for item in items}

    def latest_of_name(self, batch: Batch) -> str:
        """Record the batch as the latest of its tenant and name, unless a later one is; return the latest one's id."""
        digest = sha256(f"{batch.tenant}\x00{batch.name}".encode()).hexdigest()
        item: Item = {
            "batch_id": {"S": f"name#{digest}"},
            "part": {"S": "name"},
            "latest": {"S": batch.batch_id},
            "rank": {"S": batch.rank},
            "expires_at": {"N": str(self._expires(batch.expires_at))},
        }
        current = self._table.put_if(
            item,
            "attribute_not_exists(batch_id) OR #rank <= :rank",
            ExpressionAttributeNames={"#rank": "rank"},
            ExpressionAttributeValues={":rank": item["rank"]},
        )
        return batch.batch_id if current is None else current["latest"]["S"]

    def name_create(self, tenant: str, name: str, batch_id: str, since: int, *, fresh: bool) -> str:
        """Return the id of the batch created under this name after `since`; else record and return `batch_id`."""
        digest = sha256(f"{tenant}\x00{name}".encode()).hexdigest()
        item: Item = {
            "batch_id": {"S": f"create#{digest}"},
            "part": {"S": "create"},
            "made": {"S": batch_id},
            "at": {"N": str(self._clock.now())},
            "expires_at": {"N": str(self._clock.now() // 1000 + job_records.DAY_SECONDS)},
        }
        if fresh:
            self._table.put(item)
            return batch_id
        current = self._table.put_if(
            item,
            "attribute_not_exists(batch_id) OR #at < :since",
            ExpressionAttributeNames={"#at": "at"},
            ExpressionAttributeValues={":since": {"N": str(since)}},
        )
        return batch_id if current is None else current["made"]["S"]

    # Turns -----------------------------------------------------------------------------------------------------

    def take_turn(self, tenant: str, batch_id: str, now: int, until: int) -> bool:
        """Give the tenant's turn to a batch until a time; False if another batch has it now."""
        free = "attribute_not_exists(batch_id) OR held_until <= :now OR holder = :holder"
        return self._hold(tenant, batch_id, until, free, {":now": {"N": str(now)}})

    def end_turn(self, tenant: str, batch_id: str) -> None:
        """End the turn, if the batch has it."""
        self._hold(tenant, batch_id, 0, "holder = :holder", {})

    def _hold(self, tenant: str, batch_id: str, until: int, condition: str, values: Item) -> bool:
        """Write who has a tenant's turn, and until when, if the condition holds; return whether it does."""
        item: Item = {
            "batch_id": {"S": f"turn#{tenant}"},
            "part": {"S": "turn"},
            "holder": {"S": batch_id},
            "held_until": {"N": str(until)},
            "expires_at": {"N": str(self._clock.now() // 1000 + job_records.DAY_SECONDS)},
        }
        values = {":holder": item["holder"], **values}
        return self._table.put_if(item, condition, ExpressionAttributeValues=values) is None

    # Newcomers -------------------------------------------------------------------------------------------------

    def announce(self, newcomer: Newcomer) -> None:
        """Add a batch to the list of newcomers."""
        self._table.put({**_listed(newcomer), "expires_at": {"N": str(self._expires())}})

    def newcomer(self, after: str) -> Newcomer | None:
        """Return the first newcomer of the tenant behind this one; None behind the last."""
        # "$" sorts right after "#", and before all that names of tenants consist of.
        found = self._table.query(
            KeyConditionExpression="batch_id = :list AND part > :after",
            ExpressionAttributeValues={":list": {"S": NEWCOMERS}, ":after": {"S": f"{after}$"}},
            Limit=1,
        )["Items"]
        return Newcomer(*found[0]["part"]["S"].split("#")) if found else None

    def welcome(self, newcomer: Newcomer) -> None:
        """Remove a batch from the list of newcomers, if it is there."""
        self._table.delete(_listed(newcomer))

    # For the sweep ---------------------------------------------------------------------------------------------

    def due(self, now: int, share: int) -> Sequence[DueRange]:
        """Return what is due, longest due first: about `share` of each tenant and model at most."""
        found: list[DueRange] = []
        for shard in range(job_records.DUE_SHARDS):
            shares = Shares[DueRange](
                lambda each: (each.tenant, each.model), job_records.part_of(share)
            )
            self._table.due(str(shard), now, shares, _due)
            found += shares.items
        return sorted(found, key=lambda each: (each.due_at, each.batch_id, each.number or -1))

    def postpone(self, due: DueRange, until: int) -> DueRange | None:
        """Make it due again at `until` only; None if another sweep was first."""
        is_first = self._update_if_due(due, "SET due_at = :until", {":until": {"N": str(until)}})
        return replace(due, due_at=until) if is_first else None

    def remove(self, due: DueRange) -> None:
        """Remove it from the index, unless it was written since."""
        self._update_if_due(due, "REMOVE " + ", ".join(_DUE), {})

    def _update_if_due(self, due: DueRange, change: str, values: Item) -> bool:
        part = BATCH if due.number is None else _range_part(due.number)
        key: Item = {"batch_id": {"S": due.batch_id}, "part": {"S": part}}
        return self._table.update_if_due(key, due.due_at, change, values)

    # Items -----------------------------------------------------------------------------------------------------

    def _get(self, batch_id: str, part: str) -> Item | None:
        return self._table.get({"batch_id": {"S": batch_id}, "part": {"S": part}})

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
            item["created_key"] = {"S": batch.rank}
        if batch.due_at is not None:
            item |= _due_item(batch.batch_id, batch.due_at, batch.tenant, None)
        return item

    def _expires(self, last_needed: int = 0) -> int:
        return job_records.expiry(self._clock.now(), last_needed, self._retention_days)


def _listed(newcomer: Newcomer) -> Item:
    return {
        "batch_id": {"S": NEWCOMERS},
        "part": {"S": f"{newcomer.tenant}#{newcomer.batch_id}"},
    }


def _range_part(number: int) -> str:
    return f"range#{number:08d}"


def _range_number(part: str) -> int | None:
    return int(part.partition("#")[2]) if part.startswith("range#") else None


def _due(item: Item) -> DueRange:
    return DueRange(
        batch_id=item["batch_id"]["S"],
        number=_range_number(item["part"]["S"]),
        tenant=item["due_tenant"]["S"],
        due_at=int(item["due_at"]["N"]),
        model=item["due_model"]["S"] if "due_model" in item else None,
    )


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
            "unsupported": tuple(record.get("unsupported", ())),
            "decision": _decision(record.get("decision")),
            "upstream": tuple(map(tuple, record.get("upstream", ()))),
        },
    )


def _decision(record: dict[str, Any] | None) -> LaneDecision | None:
    return None if record is None else job_records.made(LaneDecision, record)


def _tuple(values: list[Any]) -> tuple[Any, ...]:
    return tuple(_tuple(each) if isinstance(each, list) else each for each in values)


def _range(item: Item) -> RangeState:
    record: dict[str, Any] = json.loads(item["record"]["S"])
    lists = {name: _tuple(value) for name, value in record.items() if isinstance(value, list)}
    return job_records.made(RangeState, record | lists)


def _progress(item: Item) -> Progress:
    numbers = {each.name: int(item[each.name]["N"]) for each in fields(Tally) if each.name in item}
    done = set(item.get("done", {}).get("NS", ()))
    # A member that another release marked as done may have left its attribute.
    running = [
        Tally.of(json.loads(value["S"]))
        for name, value in item.items()
        if name.startswith(_RUNNING) and name.removeprefix(_RUNNING) not in done
    ]
    return Progress(frozenset(map(int, done)), Tally(**numbers), sum(running, Tally()))
