"""One DynamoDB table: consistent reads, conditional writes, and the index of what is due."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar
from uuid import uuid4

from botocore.exceptions import ClientError

from sluice.adapters import aws
from sluice.domain.errors import Stale, StoreBusy
from sluice.domain.turns import Shares

if TYPE_CHECKING:
    from mypy_boto3_dynamodb import DynamoDBClient

    from sluice.adapters.job_records import Item

T = TypeVar("T")
H = TypeVar("H", bound=Hashable)

GET_AT_ONCE: Final = 100
"""DynamoDB's limit for BatchGetItem."""

WRITE_AT_ONCE: Final = 25
"""DynamoDB's limit for BatchWriteItem."""

DUE_AT_ONCE: Final = 1_000
"""Due items read per query: about 200 KB."""

DUE_PAGES: Final = 12
"""Queries per part of the index `by_due` and run, and one more. With eight parts, 100,000 items: 25 MB, which cost two
hundredths of a cent."""

MOST_ROUNDS: Final = 5
"""Calls for what DynamoDB left unprocessed, before the table counts as busy."""


class Table:
    """A table by its name; `what` names it in errors, and `key` is the attribute by which items are read."""

    def __init__(self, client: DynamoDBClient, name: str, what: str, key: str) -> None:
        self._client = client
        self._name = name
        self._what = what
        self._key = key

    # Reads

    def get(self, key: Item, *, consistent: bool = True) -> Item | None:
        """Return an item; None if it does not exist."""
        answer = aws.patiently(
            self._what,
            self._client.get_item,
            TableName=self._name,
            Key=key,
            **({"ConsistentRead": True} if consistent else {}),
        )
        return answer.get("Item")

    def get_many(self, values: Sequence[str]) -> list[Item]:
        """Return the items that exist, by consistent reads."""
        items: list[Item] = []
        for some in chunks(list(dict.fromkeys(values)), GET_AT_ONCE):
            waiting: Any = {
                self._name: {
                    "Keys": [{self._key: {"S": value}} for value in some],
                    "ConsistentRead": True,
                }
            }
            for _ in range(MOST_ROUNDS):
                answer = aws.patiently(
                    self._what, self._client.batch_get_item, RequestItems=waiting
                )
                items.extend(answer["Responses"].get(self._name, ()))
                waiting = answer.get("UnprocessedKeys")
                if not waiting:
                    break
            else:
                raise StoreBusy(self._what)
        return items

    def query(self, **arguments: Any) -> Any:
        """Return the answer to one query: a page."""
        return aws.patiently(self._what, self._client.query, TableName=self._name, **arguments)

    def query_all(self, **arguments: Any) -> list[Item]:
        """Return the items of all pages of a query."""
        pages = self._client.get_paginator("query").paginate(TableName=self._name, **arguments)
        return aws.patiently(self._what, lambda: [x for page in pages for x in page["Items"]])

    def scan(self, most: int, **arguments: Any) -> list[Item]:
        """Return the first items of a scan."""
        pages = self._client.get_paginator("scan").paginate(
            TableName=self._name, PaginationConfig={"MaxItems": most}, **arguments
        )
        return aws.patiently(self._what, lambda: [x for page in pages for x in page["Items"]])

    def due(self, shard: str, now: int, shares: Shares[H], decode: Callable[[Item], H]) -> None:
        """Add the due items of one part of the index `by_due`, longest due first.

        A key of the index has no owner, so one that must be skipped must be read. The reads are bounded: of more than
        `DUE_PAGES` pages, the last one is that of the latest due, so that what is new is seen too.
        """
        arguments: dict[str, Any] = {
            "IndexName": "by_due",
            "KeyConditionExpression": "due_shard = :shard AND due_at <= :now",
            "ExpressionAttributeValues": {":shard": {"S": shard}, ":now": {"N": str(now)}},
            "Limit": DUE_AT_ONCE,
        }
        for _ in range(DUE_PAGES):
            answer = self.query(**arguments)
            for item in answer["Items"]:
                shares.add(decode(item))
            if "LastEvaluatedKey" not in answer:
                return
            arguments["ExclusiveStartKey"] = answer["LastEvaluatedKey"]
        del arguments["ExclusiveStartKey"]
        for item in self.query(**arguments, ScanIndexForward=False)["Items"]:
            shares.add(decode(item))

    # Writes

    def put(self, item: Item) -> None:
        """Write an item, whatever is stored."""
        aws.patiently(self._what, self._client.put_item, TableName=self._name, Item=item)

    def put_all(self, items: Sequence[Item]) -> None:
        """Write items with different keys, whatever is stored."""
        for some in chunks(items, WRITE_AT_ONCE):
            waiting: Any = {self._name: [{"PutRequest": {"Item": item}} for item in some]}
            for _ in range(MOST_ROUNDS):
                answer = aws.patiently(
                    self._what, self._client.batch_write_item, RequestItems=waiting
                )
                waiting = answer.get("UnprocessedItems")
                if not waiting:
                    break
            else:
                raise StoreBusy(self._what)

    def put_if(self, item: Item, condition: str, **arguments: Any) -> Item | None:
        """Write an item if the condition holds; return None, or the stored item if it does not (empty: none).

        A write whose response was lost is retried and then meets itself, which counts as written. A unique mark
        distinguishes it from an equal change that another writer made in the same millisecond.
        """
        item = marked(item)
        try:
            aws.patiently(
                self._what,
                self._client.put_item,
                TableName=self._name,
                Item=item,
                ConditionExpression=condition,
                ReturnValuesOnConditionCheckFailure="ALL_OLD",
                **arguments,
            )
        except ClientError as error:
            if not _is_failed_condition(error):
                raise
            current: Item = error.response.get("Item", {})  # type: ignore[assignment]
            return None if current == item else current
        return None

    def replace(self, item: Item, expected_version: int, decode: Callable[[Item], Any]) -> None:
        """Write an item over its expected version (0: not stored); otherwise raise Stale with the decoded one."""
        condition, values = f"attribute_not_exists({self._key})", {}
        if expected_version:
            condition = "version = :expected"
            values = {"ExpressionAttributeValues": {":expected": {"N": str(expected_version)}}}
        current = self.put_if(item, condition, **values)
        if current is not None:
            raise Stale(decode(current) if current else None)

    def update_if(self, key: Item, change: str, condition: str, **arguments: Any) -> Item | None:
        """Update an item if the condition holds; return its new attributes if asked for, None if it does not hold."""
        try:
            answer = aws.patiently(
                self._what,
                self._client.update_item,
                TableName=self._name,
                Key=key,
                UpdateExpression=change,
                ConditionExpression=condition,
                **arguments,
            )
        except ClientError as error:
            if not _is_failed_condition(error):
                raise
            return None
        return answer.get("Attributes", {})

    def update_if_due(self, key: Item, due_at: int, change: str, values: Item) -> bool:
        """Update an item that is still due at the same time; False if it was changed since."""
        values = {":seen": {"N": str(due_at)}, **values}
        updated = self.update_if(key, change, "due_at = :seen", ExpressionAttributeValues=values)
        return updated is not None

    def delete(self, key: Item) -> None:
        """Delete an item, if it exists."""
        aws.patiently(self._what, self._client.delete_item, TableName=self._name, Key=key)

    def add(self, key: Item, numbers: Mapping[str, int]) -> None:
        """Add to the numbers of an item."""
        aws.patiently(
            self._what,
            self._client.update_item,
            TableName=self._name,
            Key=key,
            UpdateExpression="ADD " + ", ".join(f"{name} :{name}" for name in numbers),
            ExpressionAttributeValues={
                f":{name}": {"N": str(value)} for name, value in numbers.items()
            },
        )

    def insert(self, items: Sequence[Item]) -> set[str]:
        """Insert at most 25 items in one call; return the keys of those that are known to be inserted.

        PartiQL's INSERT is a conditional put that can be sent in batches: a key that is in use fails only its own
        statement, and the price is that of a put (AWS, BatchExecuteStatement). Nothing is known of the others: they may
        exist, have been throttled, or be stored by an earlier try whose response was lost.
        """
        if not items:
            return set()
        statements: Any = [
            {
                "Statement": f'INSERT INTO "{self._name}" VALUE {{{", ".join(f"{name!r}: ?" for name in item)}}}',
                "Parameters": list(item.values()),
            }
            for item in items
        ]
        answer = aws.patiently(
            self._what, self._client.batch_execute_statement, Statements=statements
        )
        for response in answer["Responses"]:
            if response.get("Error", {}).get("Code") == "AccessDenied":
                # A statement without permission fails on its own, in a response with status 200.
                aws.note_refusal("BatchExecuteStatement", self._what)
        return {
            item[self._key]["S"]
            for item, response in zip(items, answer["Responses"], strict=True)
            if "Error" not in response
        }


def marked(item: Item) -> Item:
    """Return the item with a unique mark, by which a write recognizes itself."""
    return {**item, "written_as": {"S": uuid4().hex}}


def chunks(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Yield the values in groups of at most `size`."""
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _is_failed_condition(error: ClientError) -> bool:
    return aws.code(error) == "ConditionalCheckFailedException"
