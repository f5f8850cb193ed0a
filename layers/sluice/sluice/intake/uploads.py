"""Uploads of a tenant's files: in parts, by presigned URLs, without AWS credentials."""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sluice.bulk.plan import OPTIONS_ENDING, PlanBatch, is_known, stem_of
from sluice.domain.batches import MOST_KEY_BYTES, RESERVED, Batch, upload_prefix
from sluice.domain.errors import InvalidRequest
from sluice.ports.batches import Objects, PartLinks
from sluice.ports.world import RandomBytes

PART_BYTES: Final = 16 * 1024 * 1024
MOST_PARTS: Final = 10_000
MOST_BYTES: Final = 5 * 1024**4
"""S3's own limits."""

LINKS_AT_ONCE: Final = 100
LINK_SECONDS: Final = 3_600

MOST_NAME: Final = 512
_MOST_SHOWN: Final = 80

_ID: Final = re.compile(
    r"(?P<size>[0-9]{1,13})-(?P<token>[0-9a-f]{16})-(?P<signature>[0-9a-f]{32})-(?P<own>.+)"
)


@dataclass(frozen=True, slots=True)
class Upload:
    """A started upload, and the presigned URLs of its first parts."""

    upload_id: str
    name: str
    part_bytes: int
    parts: int
    links: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class PartSizes:
    """The parts of an upload, all of one size but the last."""

    size: int

    @property
    def part_bytes(self) -> int:
        """Bytes of every part but the last."""
        return max(PART_BYTES, -(-self.size // MOST_PARTS))

    @property
    def number(self) -> int:
        """The number of parts."""
        return -(-self.size // self.part_bytes)

    def sizes(self, first: int, last: int) -> dict[int, int]:
        """Return the bytes of some parts, by number."""
        most = self.part_bytes
        return {part: min(most, self.size - (part - 1) * most) for part in range(first, last + 1)}


class Uploads:
    """One tenant's uploads.

    Each upload has a place of its own in the bucket, so that two of one name share neither content nor options.

    The id of an upload has its declared size, its place and a signature, so that the size of every part can be signed
    into its URL without a record of the upload.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - its tools
        self,
        tenant: str,
        objects: Objects,
        links: PartLinks,
        planner: PlanBatch,
        secret: Callable[[], str],
        random_bytes: RandomBytes,
    ) -> None:
        self._tenant = tenant
        self._secret = secret
        self._random_bytes = random_bytes
        self._objects = objects
        self._links = links
        self._planner = planner

    def start(self, name: str, size: int, options: Mapping[str, Any]) -> Upload:
        """Start an upload; its options are stored beside the future file."""
        token = self._random_bytes(8).hex()
        key = self._key(name, token)
        if not 1 <= size <= MOST_BYTES:
            raise InvalidRequest(f"bytes: must be from 1 to {MOST_BYTES:,} (got {size:,})")
        self._planner.read_options(options)
        parts = PartSizes(size)
        if options:
            self._objects.put(f"{stem_of(key)}{OPTIONS_ENDING}", json.dumps(options).encode())
        upload_id = self._links.begin(key)
        sizes = parts.sizes(1, min(parts.number, LINKS_AT_ONCE))
        first = self._links.links(key, upload_id, sizes)
        signed = f"{size}-{token}-{self._signature(key, size, upload_id)}-{upload_id}"
        return Upload(signed, name, parts.part_bytes, parts.number, first)

    def links(self, name: str, upload_id: str, first: int, last: int) -> Mapping[int, str]:
        """Return the presigned URLs of up to a hundred parts."""
        key, parts, own_id = self._opened(name, upload_id)
        if not 1 <= first <= last <= parts.number or last - first >= LINKS_AT_ONCE:
            raise InvalidRequest(
                f"first, last: must be a range of up to {LINKS_AT_ONCE} parts from 1 to {parts.number:,} "
                f"(got {first} to {last})"
            )
        return self._links.links(key, own_id, parts.sizes(first, last))

    def complete(self, name: str, upload_id: str, etags: Mapping[int, str]) -> Batch:
        """Complete the upload, and return the batch of the file."""
        if not etags:
            raise InvalidRequest("parts: List should have at least 1 item")
        key, parts, own_id = self._opened(name, upload_id)
        if sorted(etags) != list(range(1, parts.number + 1)):
            raise InvalidRequest(
                f"parts: must be the parts from 1 to {parts.number:,} (got {len(etags):,})"
            )
        self._links.complete(key, own_id, etags)
        return self._planner.register(key)

    def abort(self, name: str, upload_id: str) -> None:
        """Discard an upload and its parts."""
        key, _, own_id = self._opened(name, upload_id)
        self._links.abort(key, own_id)

    def _opened(self, name: str, upload_id: str) -> tuple[str, PartSizes, str]:
        """Return key, parts and S3's own id of an upload; raises InvalidRequest for an id that was not given out."""
        match = _ID.fullmatch(upload_id)
        key = self._key(name, match["token"] if match else "")
        if match is not None:
            size, own_id = int(match["size"]), match["own"]
            expected = self._signature(key, size, own_id)
            if hmac.compare_digest(expected, match["signature"]):
                return key, PartSizes(size), own_id
        raise InvalidRequest("id: is not the id of an upload of this name; start the upload again")

    def _signature(self, key: str, size: int, upload_id: str) -> str:
        said = f"upload\x00{key}\x00{size}\x00{upload_id}"
        return hmac.digest(self._secret().encode(), said.encode(errors="replace"), "sha256").hex()[
            :32
        ]

    def _key(self, name: str, token: str) -> str:
        key = f"{upload_prefix(self._tenant, token)}{name}"
        problem = _problem_of(name, key)
        if problem is not None:
            raise InvalidRequest(f"name: {name[:_MOST_SHOWN]!r} {problem}")
        return key


def _problem_of(name: str, key: str) -> str | None:
    """Return why an object cannot have a name, or None. Spaces, other scripts and punctuation are fine, as in S3."""
    problems = {
        f"has {len(name):,} characters; the maximum is {MOST_NAME}": len(name) > MOST_NAME,
        "has control characters or other characters that cannot be shown": not name.isprintable(),
        "is too long in UTF-8": len(key.encode(errors="replace")) > MOST_KEY_BYTES,
        "is not a relative path such as 2026/january.jsonl": (
            "\\" in name or not {"", ".", ".."}.isdisjoint(name.split("/"))
        ),
        f"begins with {RESERVED}, which is reserved": name.startswith(RESERVED),
        "does not end with .jsonl, .ndjson or .csv, also with .gz": not is_known(name),
    }
    return next((problem for problem, is_so in problems.items() if is_so), None)
