"""Uploads of a tenant's files: in parts, by presigned URLs, without AWS credentials."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sluice.bulk.plan import PlanBatch, is_known, stem_of
from sluice.domain.batches import Batch
from sluice.domain.errors import InvalidRequest
from sluice.ports.batches import Objects, PartLinks

PART_BYTES: Final = 16 * 1024 * 1024
MOST_PARTS: Final = 10_000
MOST_BYTES: Final = 5 * 1024**4
"""S3's own limits."""

LINKS_AT_ONCE: Final = 100
LINK_SECONDS: Final = 3_600

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*(/[A-Za-z0-9][A-Za-z0-9._=+-]*)*")
_MOST_NAME: Final = 512


@dataclass(frozen=True, slots=True)
class Upload:
    """A started upload, and the presigned URLs of its first parts."""

    upload_id: str
    name: str
    part_bytes: int
    parts: int
    links: Mapping[int, str]


class Uploads:
    """One tenant's uploads."""

    def __init__(self, tenant: str, objects: Objects, links: PartLinks, planner: PlanBatch) -> None:
        self._tenant = tenant
        self._objects = objects
        self._links = links
        self._planner = planner

    def start(self, name: str, size: int, options: Mapping[str, Any]) -> Upload:
        """Start an upload; its options are stored beside the future file."""
        key = self._key(name)
        if not 1 <= size <= MOST_BYTES:
            raise InvalidRequest(f"bytes: must be from 1 to {MOST_BYTES:,} (got {size:,})")
        self._planner.read_options(options)
        part_bytes = max(PART_BYTES, -(-size // MOST_PARTS))
        parts = -(-size // part_bytes)
        # Always written, so that options of an earlier file of this name do not apply.
        self._objects.put(
            f"in/{self._tenant}/{stem_of(name)}.options.json", json.dumps(options).encode()
        )
        upload_id = self._links.begin(key)
        first = self._links.links(key, upload_id, range(1, min(parts, LINKS_AT_ONCE) + 1))
        return Upload(upload_id, name, part_bytes, parts, first)

    def links(self, name: str, upload_id: str, first: int, last: int) -> Mapping[int, str]:
        """Return the presigned URLs of up to a hundred parts."""
        if not 1 <= first <= last <= MOST_PARTS or last - first >= LINKS_AT_ONCE:
            raise InvalidRequest(
                f"first, last: must be a range of up to {LINKS_AT_ONCE} parts from 1 to {MOST_PARTS:,} "
                f"(got {first} to {last})"
            )
        return self._links.links(self._key(name), upload_id, range(first, last + 1))

    def complete(self, name: str, upload_id: str, etags: Mapping[int, str]) -> Batch:
        """Complete the upload, and return the batch of the file."""
        key = self._key(name)
        if not etags:
            raise InvalidRequest("parts: List should have at least 1 item")
        self._links.complete(key, upload_id, etags)
        return self._planner.register(key)

    def abort(self, name: str, upload_id: str) -> None:
        """Discard an upload and its parts."""
        self._links.abort(self._key(name), upload_id)

    def _key(self, name: str) -> str:
        if len(name) > _MOST_NAME or not _NAME.fullmatch(name) or not is_known(name):
            raise InvalidRequest(
                f"name: {name[:80]!r} is not a valid file name; "
                "use one such as reviews.jsonl or 2026/january.jsonl"
            )
        return f"in/{self._tenant}/{name}"
