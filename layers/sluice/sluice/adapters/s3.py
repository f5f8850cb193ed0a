"""Large requests, large answers and dead letters in S3."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from botocore.exceptions import ClientError

from sluice.adapters import aws
from sluice.adapters.job_records import made
from sluice.dead_letters import KeptLetter
from sluice.domain.errors import JobNotFound
from sluice.domain.jobs import Result
from sluice.ports import Received

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

INLINE_BYTES: Final = 8_000
"""Compressed answers up to this size travel in the job record: one S3 PUT costs as much as 8 kilobytes of writes."""


class Objects:
    """Objects of the data bucket."""

    def __init__(self, client: S3Client, bucket: str) -> None:
        self._client = client
        self._bucket = bucket

    def put(self, key: str, body: bytes) -> None:
        """Store an object."""
        aws.patiently(
            "the data bucket", self._client.put_object, Bucket=self._bucket, Key=key, Body=body
        )

    def get(self, key: str) -> bytes | None:
        """Return an object, None when there is none (any more).

        S3 says 404 only to those who may list the bucket, which the template grants; a 403 is a broken policy.
        """
        try:
            answer = aws.patiently(
                "the data bucket", self._client.get_object, Bucket=self._bucket, Key=key
            )
        except ClientError as error:
            if aws.code(error) in {"NoSuchKey", "404"}:
                return None
            raise
        return answer["Body"].read()

    def names(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Return the keys that begin so, each with when it was written (epoch ms)."""
        arguments: dict[str, Any] = {"Bucket": self._bucket, "Prefix": prefix}
        while True:
            page = aws.patiently("the data bucket", self._client.list_objects_v2, **arguments)
            for each in page.get("Contents", ()):
                yield each["Key"], int(each["LastModified"].timestamp() * 1000)
            if not page["IsTruncated"]:
                return
            arguments["ContinuationToken"] = page["NextContinuationToken"]


class Results:
    """Claude's Messages, gzipped: inline in the job record or as an object."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def put(self, name: str, message: str) -> Result:
        """Store a Message durably, unless it is small enough to travel in the job record."""
        body = gzip.compress(message.encode(), compresslevel=6, mtime=0)
        if len(body) <= INLINE_BYTES:
            return Result(inline=body)
        key = f"results/{name}.json.gz"
        self._objects.put(key, body)
        return Result(object_key=key)

    def get(self, result: Result) -> str:
        """Return the Message; raises JobNotFound when its object has outlived its retention."""
        if result.inline is not None:
            return gzip.decompress(result.inline).decode()
        key = result.object_key or ""
        body = self._objects.get(key)
        if body is None:
            raise JobNotFound(key)
        return gzip.decompress(body).decode()


class DeadLetterObjects:
    """The raw bodies of dead letters."""

    PREFIX: Final = "dead-letters/"
    PARALLEL_READS: Final = 16

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def keep(self, message: Received, reason: str) -> None:
        """Store the body with its reason."""
        document = {
            "message_id": message.message_id,
            "job_id": message.job_id,
            "reason": reason,
            "receive_count": message.receive_count,
            "sent_at": message.sent_at,
            "body": message.body,
        }
        self._objects.put(self._key(message.message_id), json.dumps(document).encode())

    def letters(self) -> Iterator[KeptLetter]:
        """Return all that are kept: a list call per thousand, and a read of each."""
        with ThreadPoolExecutor(self.PARALLEL_READS) as threads:
            read = threads.map(lambda name: self._read(*name), self._objects.names(self.PREFIX))
            yield from (letter for letter in read if letter is not None)

    def letter(self, message_id: str) -> KeptLetter | None:
        """Return one of them."""
        key = self._key(message_id)
        found = (at for name, at in self._objects.names(key) if name == key)
        return next((self._read(key, at) for at in found), None)

    def _key(self, message_id: str) -> str:
        return f"{self.PREFIX}{message_id}.json"

    def _read(self, key: str, at: int) -> KeptLetter | None:
        body = self._objects.get(key)
        return None if body is None else made(KeptLetter, {**json.loads(body), "kept_at": at})
