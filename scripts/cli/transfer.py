"""File uploads and result downloads, directly to and from S3 by presigned URL, without the client key."""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx

from scripts.cli.client import Json
from scripts.cli.errors import CommandFailed

PARTS_IN_FLIGHT = 4
PART_TRIES = 5
LINKS_PER_CALL = 100
LONGEST_PAUSE_SECONDS = 10.0
BUCKET_TIMEOUT_SECONDS = 300.0


class Uploads(Protocol):
    """What `Bucket.upload` needs of a gateway."""

    def begin_upload(self, name: str, size: int, options: Mapping[str, object]) -> Json:
        """Start an upload."""

    def part_links(self, upload_id: str, name: str, first: int, last: int) -> Mapping[int, str]:
        """Return presigned URLs for more parts."""

    def complete_upload(self, upload_id: str, name: str, etags: Mapping[int, str]) -> Json:
        """Complete the upload; return its batch."""

    def abort_upload(self, upload_id: str, name: str) -> None:
        """Abort the upload."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """The bucket, through presigned URLs."""

    http: httpx.Client
    sleep: Callable[[float], None] = time.sleep

    def upload(
        self,
        gateway: Uploads,
        file: Path,
        name: str,
        options: Mapping[str, object],
        on_part: Callable[[int, int], None],
    ) -> Json:
        """Upload a file in parts, a few at a time; return its batch. `on_part` gets the bytes sent and the size."""
        size = file.stat().st_size
        upload = gateway.begin_upload(name, size, options)
        try:
            etags = self._send(gateway, file, size, upload, on_part)
            return gateway.complete_upload(upload["id"], name, etags)
        except BaseException:
            gateway.abort_upload(upload["id"], name)
            raise

    def _send(
        self,
        gateway: Uploads,
        file: Path,
        size: int,
        upload: Json,
        on_part: Callable[[int, int], None],
    ) -> dict[int, str]:
        part_bytes = upload["part_bytes"]
        etags: dict[int, str] = {}
        with ThreadPoolExecutor(PARTS_IN_FLIGHT) as pool, file.open("rb") as source:
            going: dict[Future[str], int] = {}
            for part, url in _links(gateway, upload):
                # Read one after the other, so that only the parts in flight are in memory.
                body = source.read(part_bytes)
                going[pool.submit(self._put, url, body)] = part
                if len(going) == PARTS_IN_FLIGHT:
                    done, _ = wait(going, return_when=FIRST_COMPLETED)
                    etags |= {going.pop(each): each.result() for each in done}
                    on_part(min(len(etags) * part_bytes, size), size)
            etags |= {part: each.result() for each, part in going.items()}
        on_part(size, size)
        return etags

    def _put(self, url: str, body: bytes) -> str:
        for failures in range(PART_TRIES):
            if failures:
                self.sleep(min(LONGEST_PAUSE_SECONDS, 0.5 * 2.0**failures))
            try:
                answer = self.http.put(url, content=body)
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
                continue
            if answer.is_success:
                return answer.headers["etag"]
            reason = f"HTTP {answer.status_code}"
            if answer.status_code < 500:  # noqa: PLR2004 - a retry would get the same response
                break
        raise CommandFailed(f"S3 did not accept a part of the file ({reason}); upload it again")

    def download(self, url: str) -> Iterator[bytes]:
        """Yield the content of a file, piece by piece."""
        try:
            with self.http.stream("GET", url) as answer:
                if not answer.is_success:
                    raise CommandFailed(f"cannot download from S3: HTTP {answer.status_code}")
                yield from answer.iter_bytes()
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise CommandFailed(f"the download from S3 failed ({reason}); retry") from None


@contextmanager
def bucket() -> Iterator[Bucket]:
    """Give a bucket over connections of its own, which never carry the client key."""
    timeout = httpx.Timeout(BUCKET_TIMEOUT_SECONDS, connect=10.0)
    with httpx.Client(timeout=timeout) as http:
        yield Bucket(http)


def _links(gateway: Uploads, upload: Json) -> Iterator[tuple[int, str]]:
    links = {each["part"]: each["url"] for each in upload["links"]}
    for part in range(1, upload["parts"] + 1):
        if part not in links:
            last = min(upload["parts"], part + LINKS_PER_CALL - 1)
            links = dict(gateway.part_links(upload["id"], upload["name"], part, last))
        yield part, links[part]
