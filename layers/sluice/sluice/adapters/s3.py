"""Large requests, large answers and dead letters in S3."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final

from botocore.exceptions import ClientError

from sluice.adapters import aws
from sluice.adapters.job_records import made
from sluice.domain.batches import Copied, Streamed, parts
from sluice.domain.errors import (
    InputMissing,
    InvalidRequest,
    JobNotFound,
    NotStorable,
    StoreBusy,
)
from sluice.domain.jobs import Result
from sluice.ports.batches import RANK, Stored
from sluice.ports.jobs import Received
from sluice.upkeep.dead_letters import KeptLetter

if TYPE_CHECKING:
    from datetime import datetime

    from mypy_boto3_s3 import S3Client

WHAT: Final = "the data bucket"

LEAST_PART_BYTES: Final = 5 * 1024 * 1024
"""S3's minimum for all parts of an upload but the last."""

PIECE_BYTES: Final = 8 * 1024 * 1024
"""Bytes of a large object read or written per call."""

PARTS_AT_ONCE: Final = 8

MOST_TRIES: Final = 10
"""Tries of a conditional write; each starts from what the writer before has stored."""

_CHANGED_MEANWHILE: Final = frozenset(
    {"PreconditionFailed", "412", "ConditionalRequestConflict", "409", "NoSuchKey", "404"}
)
"""Another writer replaced or deleted the object that a conditional write was to replace.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html
"""

INLINE_BYTES: Final = 8_000
"""Compressed answers up to this size are stored in the job record: an S3 PUT costs as much as 8 KB of writes."""


MOST_INLINE_BYTES: Final = 256_000
"""While the bucket is busy, compressed answers up to this size are stored there too: an item has at most 400 KB."""


class Objects:
    """Objects of the data bucket."""

    def __init__(self, client: S3Client, bucket: str) -> None:
        self._client = client
        self._bucket = bucket

    def put(self, key: str, body: bytes) -> str:
        """Store an object; return its ETag."""
        answer = aws.patiently(
            WHAT, self._client.put_object, Bucket=self._bucket, Key=key, Body=body
        )
        return answer["ETag"].strip('"')

    def get(self, key: str) -> bytes | None:
        """Return an object; None if it does not exist.

        S3 returns 404 only with permission to list the bucket, which the template grants; a 403 is a broken policy.
        """
        try:
            answer = aws.patiently(WHAT, self._client.get_object, Bucket=self._bucket, Key=key)
        except ClientError as error:
            if aws.code(error) in {"NoSuchKey", "404"}:
                return None
            raise
        return answer["Body"].read()

    def head(self, key: str) -> Stored | None:
        """Return the metadata of an object; None if it does not exist."""
        try:
            answer = aws.patiently(WHAT, self._client.head_object, Bucket=self._bucket, Key=key)
        except ClientError as error:
            if aws.code(error) in {"NoSuchKey", "404"}:
                return None
            raise
        return Stored(
            key,
            answer["ContentLength"],
            answer["ETag"].strip('"'),
            _epoch_ms(answer["LastModified"]),
            answer.get("Metadata", {}),
        )

    def read(self, key: str, first: int, size: int, etag: str | None = None) -> bytes:
        """Return a piece of an object; raises InputMissing if it does not exist or has another ETag."""
        if size <= 0:
            return b""
        match: Any = {} if etag is None else {"IfMatch": f'"{etag}"'}

        def fetched() -> bytes:
            # The body is read inside the retried call, because the connection may break.
            answer = self._client.get_object(
                Bucket=self._bucket, Key=key, Range=f"bytes={first}-{first + size - 1}", **match
            )
            return answer["Body"].read()

        try:
            return aws.patiently(WHAT, fetched)
        except ClientError as error:
            if aws.code(error) in {"NoSuchKey", "404", "PreconditionFailed", "412"}:
                raise InputMissing(key) from error
            if aws.code(error) == "InvalidRange":
                return b""
            raise

    def stream(self, key: str) -> Iterator[bytes]:
        """Yield an object piece by piece; raises InputMissing."""
        first = 0
        while piece := self.read(key, first, PIECE_BYTES):
            yield piece
            first += len(piece)
            if len(piece) < PIECE_BYTES:
                return

    def delete(self, keys: Sequence[str]) -> None:
        """Delete up to 1,000 objects, also those that do not exist; raises StoreBusy."""
        answer = aws.patiently(
            WHAT,
            self._client.delete_objects,
            Bucket=self._bucket,
            Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True},
        )
        if answer.get("Errors"):
            raise StoreBusy(WHAT)

    def listing(self, prefix: str) -> Iterator[Stored]:
        """Yield the objects whose keys have this prefix, in order of keys."""
        more: Any = {}
        while True:
            answer = aws.patiently(
                WHAT, self._client.list_objects_v2, Bucket=self._bucket, Prefix=prefix, **more
            )
            for each in answer.get("Contents", ()):
                etag, at = each["ETag"].strip('"'), _epoch_ms(each["LastModified"])
                yield Stored(each["Key"], each["Size"], etag, at)
            if not answer.get("IsTruncated"):
                return
            more = {"ContinuationToken": answer["NextContinuationToken"]}

    def writer(self, key: str) -> ObjectWriter:
        """Return a writer of a new object."""
        return ObjectWriter(self._client, self._bucket, key)

    def link(self, key: str, seconds: int) -> str:
        """Return a presigned URL to read the object, valid for this many seconds."""
        return self._client.generate_presigned_url(
            "get_object", Params={"Bucket": self._bucket, "Key": key}, ExpiresIn=seconds
        )

    def copy(self, source: Stored, key: str) -> str:
        """Copy an object, as it was when its metadata were read; return the copy's ETag. Raises InputMissing."""
        return self._join(key, [source])

    def copy_latest(self, source: Stored, key: str, rank: str) -> bool:
        """Copy an object, unless the object there was copied with a greater rank; return whether it was copied.

        S3 writes only if the object there is still the one whose rank was compared.
        """
        for _ in range(MOST_TRIES):
            there = self.head(key)
            if there is not None and there.rank > rank:
                return False
            unchanged = {"IfMatch": f'"{there.etag}"'} if there else {"IfNoneMatch": "*"}
            try:
                self._join(key, [source], metadata={RANK: rank}, condition=unchanged)
            except ClientError as error:
                if aws.code(error) not in _CHANGED_MEANWHILE:
                    raise
                continue
            return True
        raise StoreBusy(f"{WHAT}, changed concurrently {MOST_TRIES} times,")

    def assemble(self, key: str, sources: Mapping[int, str], sizes: Mapping[int, int]) -> int:
        """Join objects in order into one; return its size. S3 copies large ones, several at once."""
        self._join(key, [Stored(sources[each], size, "", 0) for each, size in sizes.items()])
        return sum(sizes.values())

    def _join(
        self,
        key: str,
        sources: Sequence[Stored],
        *,
        metadata: Mapping[str, str] | None = None,
        condition: Mapping[str, str] | None = None,
    ) -> str:
        """Join objects in order into one; return its ETag. Those with an ETag must still have it.

        Small ones are read and written; S3 copies large ones, several parts at once.
        """
        sizes = {number: source.size for number, source in enumerate(sources)}
        where: Any = {"Bucket": self._bucket, "Key": key}
        facts: Any = {"Metadata": metadata} if metadata else {}
        only_if: Any = condition or {}
        if sum(sizes.values()) < LEAST_PART_BYTES:
            body = b"".join(self._slice(source, 0, source.size) for source in sources)
            put = aws.patiently(
                WHAT, self._client.put_object, **where, **facts, **only_if, Body=body
            )
            return put["ETag"].strip('"')
        upload = aws.patiently(WHAT, self._client.create_multipart_upload, **where, **facts)
        where["UploadId"] = upload["UploadId"]

        def made(numbered: tuple[int, Copied | Streamed]) -> Any:
            number, part = numbered
            if isinstance(part, Copied):
                etag = self._copy_part(where, number, sources[part.section], part)
            else:
                body = b"".join(
                    self._slice(sources[each.section], each.first, each.size)
                    for each in part.slices
                )
                etag = aws.patiently(
                    WHAT, self._client.upload_part, **where, PartNumber=number, Body=body
                )["ETag"]
            return {"PartNumber": number, "ETag": etag}

        try:
            with ThreadPoolExecutor(PARTS_AT_ONCE) as threads:
                numbered = enumerate(parts(sizes, LEAST_PART_BYTES), start=1)
                done = list(threads.map(made, numbered))
            answer = aws.patiently(
                WHAT,
                self._client.complete_multipart_upload,
                **where,
                **only_if,
                MultipartUpload={"Parts": done},
            )
        except BaseException:
            self._client.abort_multipart_upload(**where)
            raise
        return answer["ETag"].strip('"')

    def _slice(self, source: Stored, first: int, size: int) -> bytes:
        return self.read(source.key, first, size, source.etag or None)

    def _copy_part(self, where: Any, number: int, source: Stored, part: Copied) -> str:
        match: Any = {"CopySourceIfMatch": f'"{source.etag}"'} if source.etag else {}
        try:
            copy = aws.patiently(
                WHAT,
                self._client.upload_part_copy,
                **where,
                **match,
                PartNumber=number,
                CopySource={"Bucket": self._bucket, "Key": source.key},
                CopySourceRange=f"bytes={part.first}-{part.first + part.size - 1}",
            )
        except ClientError as error:
            if aws.code(error) in {"NoSuchKey", "404", "PreconditionFailed", "412"}:
                raise InputMissing(source.key) from error
            raise
        return copy["CopyPartResult"]["ETag"]


class Links:
    """Multipart uploads by presigned URLs."""

    def __init__(self, client: S3Client, bucket: str, seconds: int) -> None:
        self._client = client
        self._bucket = bucket
        self._seconds = seconds

    def begin(self, key: str) -> str:
        """Start an upload; return its id."""
        answer = aws.patiently(
            WHAT, self._client.create_multipart_upload, Bucket=self._bucket, Key=key
        )
        return answer["UploadId"]

    def links(self, key: str, upload_id: str, sizes: Mapping[int, int]) -> Mapping[int, str]:
        """Return the presigned PUT URL of each part, by number.

        The header `content-length` is signed, so S3 accepts no other number of bytes.
        """
        where = {"Bucket": self._bucket, "Key": key, "UploadId": upload_id}
        return {
            part: self._client.generate_presigned_url(
                "upload_part",
                Params={**where, "PartNumber": part, "ContentLength": size},
                ExpiresIn=self._seconds,
            )
            for part, size in sizes.items()
        }

    def complete(self, key: str, upload_id: str, etags: Mapping[int, str]) -> None:
        """Complete an upload; raises InvalidRequest if its parts are not valid."""
        done: Any = [{"PartNumber": part, "ETag": etags[part]} for part in sorted(etags)]
        try:
            aws.patiently(
                WHAT,
                self._client.complete_multipart_upload,
                Bucket=self._bucket,
                Key=key,
                UploadId=upload_id,
                MultipartUpload={"Parts": done},
            )
        except ClientError as error:
            if aws.code(error) == "NoSuchUpload" and self._exists(key):
                # Already completed, by a request whose response was lost.
                return
            if aws.code(error) in {
                "NoSuchUpload",
                "InvalidPart",
                "InvalidPartOrder",
                "EntityTooSmall",
            }:
                said = error.response["Error"].get("Message", aws.code(error))
                raise InvalidRequest(f"parts: S3 returned {aws.code(error)}: {said}") from error
            raise

    def abort(self, key: str, upload_id: str) -> None:
        """Discard the parts; does nothing if the upload does not exist."""
        try:
            aws.patiently(
                WHAT,
                self._client.abort_multipart_upload,
                Bucket=self._bucket,
                Key=key,
                UploadId=upload_id,
            )
        except ClientError as error:
            if aws.code(error) != "NoSuchUpload":
                raise

    def _exists(self, key: str) -> bool:
        return Objects(self._client, self._bucket).head(key) is not None


class ObjectWriter:
    """Writes an object in parts; a small one in a single call at the end."""

    def __init__(self, client: S3Client, bucket: str, key: str) -> None:
        self._client = client
        self._where: Any = {"Bucket": bucket, "Key": key}
        self._buffer = bytearray()
        self._size = 0
        self._parts: list[Any] = []
        self._is_open = True

    def write(self, data: bytes) -> None:
        """Append data."""
        self._size += len(data)
        self._buffer += data
        while len(self._buffer) >= PIECE_BYTES:
            with memoryview(self._buffer) as buffer:
                body = bytes(buffer[:PIECE_BYTES])
            del self._buffer[:PIECE_BYTES]
            self._send(body)

    def close(self) -> int:
        """Finish the object; return its size."""
        if not self._parts:
            aws.patiently(WHAT, self._client.put_object, **self._where, Body=bytes(self._buffer))
        else:
            if self._buffer:
                self._send(bytes(self._buffer))
            aws.patiently(
                WHAT,
                self._client.complete_multipart_upload,
                **self._where,
                MultipartUpload={"Parts": self._parts},
            )
        self._is_open = False
        self._buffer.clear()
        return self._size

    def abort(self) -> None:
        """Discard the parts; does nothing after `close`."""
        if self._is_open and self._parts:
            aws.patiently(WHAT, self._client.abort_multipart_upload, **self._where)
        self._is_open = False

    def _send(self, body: bytes) -> None:
        if not self._parts:
            started = aws.patiently(WHAT, self._client.create_multipart_upload, **self._where)
            self._where["UploadId"] = started["UploadId"]
        number = len(self._parts) + 1
        sent = aws.patiently(
            WHAT, self._client.upload_part, **self._where, PartNumber=number, Body=body
        )
        self._parts.append({"PartNumber": number, "ETag": sent["ETag"]})


class Results:
    """Claude's Messages, gzipped: inline in the job record or as an object."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def put(self, name: str, message: str) -> Result:
        """Store a Message durably, unless it is small enough for the job record."""
        try:
            text = message.encode()
        except UnicodeEncodeError as error:
            raise NotStorable(WHAT, "it has text that is not valid Unicode") from error
        body = gzip.compress(text, compresslevel=6, mtime=0)
        if len(body) <= INLINE_BYTES:
            return Result(inline=body)
        key = f"results/{name}.json.gz"
        try:
            self._objects.put(key, body)
        except StoreBusy:
            if len(body) > MOST_INLINE_BYTES:
                raise
            # More expensive than an object, but not lost if the bucket stays busy.
            return Result(inline=body)
        return Result(object_key=key)

    def probe(self) -> None:
        """Raise StoreBusy if no large answer could be stored now."""
        self._objects.put("results/probe", b"")

    def get(self, result: Result) -> str:
        """Return the Message; raises JobNotFound if its object has expired."""
        if result.inline is not None:
            return gzip.decompress(result.inline).decode()
        key = result.object_key or ""
        body = self._objects.get(key)
        if body is None:
            raise JobNotFound(key)
        return gzip.decompress(body).decode()


class DeadLetterObjects:
    """The stored dead letters, one object each."""

    PREFIX: Final = "dead-letters/"
    PARALLEL_READS: Final = 16

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def keep(self, message: Received, reason: str) -> None:
        """Store a message with its reason."""
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
        """Return all letters: one list call per thousand, and one read each."""
        with ThreadPoolExecutor(self.PARALLEL_READS) as threads:
            read = threads.map(self._read, self._objects.listing(self.PREFIX))
            yield from (letter for letter in read if letter is not None)

    def letter(self, message_id: str) -> KeptLetter | None:
        """Return one letter."""
        key = self._key(message_id)
        kept = self._objects.head(key)
        return None if kept is None else self._read(kept)

    def _key(self, message_id: str) -> str:
        return f"{self.PREFIX}{message_id}.json"

    def _read(self, kept: Stored) -> KeptLetter | None:
        body = self._objects.get(kept.key)
        if body is None:
            return None
        return made(KeptLetter, {**json.loads(body), "kept_at": kept.written_at})


def _epoch_ms(at: datetime) -> int:
    return int(at.timestamp() * 1000)
