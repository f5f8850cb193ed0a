"""Random input with fresh seeds, each compared with an independent reference.

    python -m tests.fuzz --seconds 600                     every kind, in turn
    python -m tests.fuzz --only gzip --seed 4711           one case again

`make test` runs each kind for a second. A case is a function of one `Random`; a failure names its seed.
"""

from __future__ import annotations

import argparse
import gzip
import io
import random
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from sluice.adapters import s3
from sluice.domain.batches import (
    MOST_RANGE_BYTES,
    SAMPLE_BYTES,
    Copied,
    Plan,
    parts,
    planned,
    sample_places,
)
from sluice.domain.forms import BadForm, unpacked
from sluice.domain.rows import lines
from sluice.intake.uploads import MOST_BYTES, MOST_PARTS, PartSizes
from tests.fuzz_files import convert_csv, read_csv, read_jsonl

Case = Callable[[random.Random], None]


def in_pieces(body: bytes, chance: random.Random, most: int) -> Iterator[bytes]:
    """Yield a body in pieces of random sizes."""
    at = 0
    while at < len(body):
        size = chance.randint(1, most)
        yield body[at : at + size]
        at += size


# Gzip: the reference is Python's own module, which reads headers and checksums itself -----------------------------


def a_member(chance: random.Random) -> tuple[bytes, bytes]:
    """Return some content, and a gzip member with it."""
    content = chance.choice(
        [
            b"",
            b"\0" * chance.choice([9, 5_000, 2_500_000]),
            chance.randbytes(chance.randrange(20_000)),
            bytes(chance.choices(b'{"a\n}', k=chance.randrange(3_000))),
        ]
    )
    if chance.random() < 0.5:
        file = io.BytesIO()
        name = chance.choice(["", "rows.jsonl", "ä" * chance.randrange(50)])
        with gzip.GzipFile(name, "wb", chance.randint(0, 9), file, mtime=chance.random()) as member:
            member.write(content)
        return content, file.getvalue()
    packer = zlib.compressobj(
        chance.randint(0, 9), zlib.DEFLATED, 31, strategy=chance.randint(0, 4)
    )
    packed = b""
    for piece in in_pieces(content, chance, 50_000):
        packed += packer.compress(piece)
        if chance.random() < 0.1:
            packed += packer.flush(chance.choice([zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH]))
    return content, packed + packer.flush()


def damaged(packed: bytes, chance: random.Random) -> bytes:
    """Return a file that is cut off, changed in one bit, or followed by something else."""
    at = chance.randrange(len(packed))
    other = chance.randrange(256)
    return chance.choice(
        [
            packed[:at],
            packed[:at] + bytes([packed[at] ^ 1 << chance.randrange(8)]) + packed[at + 1 :],
            packed + bytes([other]) * chance.randint(1, 30),
            packed[:at] + packed[at + 1 :],
        ]
    )


def unpack_gzip(chance: random.Random) -> None:
    """Several members are one file; what Python's module refuses is refused, and nothing is invented."""
    members = [a_member(chance) for _ in range(chance.randint(1, 5))]
    packed = b"".join(member for _, member in members)
    whole = chance.random() < 0.5
    packed = packed if whole else damaged(packed, chance)
    try:
        expected = gzip.decompress(packed)
    except (EOFError, OSError, zlib.error):
        expected = None
    try:
        found = b"".join(unpacked(in_pieces(packed, chance, chance.choice([30, 5_000, 1 << 23]))))
    except BadForm:
        # Zeros behind the last member, and header bits that are reserved, are refused here only.
        assert not whole, "a valid file was refused"
        return
    assert expected is not None, "a damaged file was accepted"
    assert expected == found
    assert not whole or found == b"".join(content for content, _ in members)


# Parts: the reference is the concatenation, and the rules of S3 ----------------------------------------------------


class Bucket:
    """The rules of S3 for uploads in parts, over bytes in memory."""

    def __init__(self, least: int) -> None:
        self.least = least
        self.stored: dict[str, bytes] = {}
        self.parts: dict[int, bytes] = {}

    def put_object(self, **said: Any) -> Mapping[str, str]:
        """As S3."""
        self.stored[said["Key"]] = said["Body"]
        return {"ETag": '"1"'}

    def create_multipart_upload(self, **_: Any) -> Mapping[str, str]:
        """As S3."""
        self.parts = {}
        return {"UploadId": "1"}

    def upload_part(self, **said: Any) -> Mapping[str, str]:
        """As S3."""
        self.parts[said["PartNumber"]] = said["Body"]
        return {"ETag": f'"{said["PartNumber"]}"'}

    def upload_part_copy(self, **said: Any) -> Mapping[str, Any]:
        """As S3."""
        first, last = map(int, said["CopySourceRange"].removeprefix("bytes=").split("-"))
        source = self.stored[said["CopySource"]["Key"]]
        assert first <= last < len(source), "beyond the end of the source"
        self.parts[said["PartNumber"]] = source[first : last + 1]
        return {"CopyPartResult": {"ETag": f'"{said["PartNumber"]}"'}}

    def complete_multipart_upload(self, **said: Any) -> Mapping[str, str]:
        """As S3."""
        numbers = [part["PartNumber"] for part in said["MultipartUpload"]["Parts"]]
        assert numbers == sorted(self.parts)
        assert len(numbers) <= MOST_PARTS
        bodies = [self.parts[number] for number in numbers]
        assert all(len(body) >= self.least for body in bodies[:-1]), "a part is too small"
        assert all(bodies), "a part is empty"
        self.stored[said["Key"]] = b"".join(bodies)
        return {"ETag": '"1"'}

    def abort_multipart_upload(self, **_: Any) -> None:
        """As S3."""
        self.parts = {}

    def get_object(self, **said: Any) -> Mapping[str, Any]:
        """As S3."""
        first, last = map(int, said["Range"].removeprefix("bytes=").split("-"))
        return {"Body": io.BytesIO(self.stored[said["Key"]][first : last + 1])}


def write_parts(chance: random.Random) -> None:
    """A writer stores what was written, however it was written."""
    bucket = Bucket(min(s3.PIECE_BYTES, 64))
    body = chance.randbytes(chance.choice([0, 1, 64, 65, 128, chance.randrange(1_000)]))
    writer = s3.ObjectWriter(bucket, "b", "key")  # type: ignore[arg-type]
    with replaced(s3, PIECE_BYTES=64):
        for piece in in_pieces(body, chance, chance.choice([1, 64, 500])):
            writer.write(piece)
        size = writer.close()
    assert len(body) == size
    assert body == bucket.stored["key"]


def join_parts(chance: random.Random) -> None:
    """Joined sections are their concatenation, in parts that S3 takes."""
    least = chance.randint(1, 60)
    bucket = Bucket(least)
    count = chance.randint(1, 30)
    sources = {number: f"s{number}" for number in range(count)}
    for number, key in sources.items():
        bucket.stored[key] = chance.randbytes(
            chance.choice([0, 1, least - 1, least, chance.randrange(5 * least)])
        )
        assert number < count
    sizes = {number: len(bucket.stored[key]) for number, key in sources.items()}
    for part in parts(sizes, least):
        held = 0 if isinstance(part, Copied) else sum(each.size for each in part.slices)
        assert held < 2 * least, "too much in memory at once"
    with replaced(s3, LEAST_PART_BYTES=least):
        total = s3.Objects(bucket, "b").assemble("whole", sources, sizes)  # type: ignore[arg-type]
    whole = b"".join(bucket.stored[key] for key in sources.values())
    assert len(whole) == total
    assert whole == bucket.stored["whole"]


def cut_uploads(chance: random.Random) -> None:
    """The parts of an upload add up to the declared size, within the limits of S3."""
    size = min(MOST_BYTES, int(10 ** chance.uniform(0, 12.8)))
    cut = PartSizes(size)
    sizes = list(cut.sizes(1, cut.number).values())
    assert sum(sizes) == size
    assert 1 <= len(sizes) <= MOST_PARTS
    assert len(set(sizes[:-1])) <= 1 <= sizes[-1] <= cut.part_bytes
    assert s3.LEAST_PART_BYTES <= cut.part_bytes <= 5 * 1024**3


# Ranges: the reference is `bytes.split` ---------------------------------------------------------------------------


def read_ranges(chance: random.Random) -> None:
    """Each line is read once, by the range in which it starts, whatever its length and the pieces that are read."""
    lengths = chance.choice([[0, 1, 2], [0, 5, 40], [1, 300], [70_000, 3, 5, 8, 1]])
    end = chance.choice([b"\n", b"\r\n"])
    body = chance.choice([b"", b"\xef\xbb\xbf"]) + b"".join(
        bytes(chance.choices(b"x\r\xc3\xa4 {}", k=chance.choice(lengths))).strip(b"\r") + end
        for _ in range(chance.randrange(60))
    )
    if chance.random() < 0.3:
        body += b"last"
    plan = planned_of(body)
    assert plan.ranges == 0 or plan.range_bytes <= MOST_RANGE_BYTES
    if chance.random() < 0.7:
        some = chance.randint(1 + len(body) // 300, max(1, len(body)))
        plan = Plan(plan.first, plan.size, some, -(-(plan.size - plan.first) // some), 1)
    found = []
    for number in range(plan.ranges):
        start, stop = plan.bounds(number)
        base = max(plan.first, start - 1)
        mine = list(
            lines(
                in_pieces(body[base:], chance, chance.choice([7, 70_000])), start, stop, plan.first
            )
        )
        assert [line.number for line in mine] == list(range(len(mine)))
        found += [(line.offset, line.text) for line in mine]
    expected, offset = [], plan.first
    texts = body[plan.first :].split(b"\n")
    for text in texts if texts[-1] else texts[:-1]:
        expected.append((offset, text.removesuffix(b"\r")))
        offset += len(text) + 1
    assert expected == found


def planned_of(body: bytes) -> Plan:
    """Return the plan of a file."""
    samples = [body[at : at + SAMPLE_BYTES] for at in sample_places(len(body))]
    return planned(len(body), *samples)


# Running ----------------------------------------------------------------------------------------------------------

CASES: Final[Mapping[str, Case]] = {
    "gzip": unpack_gzip,
    "writer": write_parts,
    "join": join_parts,
    "uploads": cut_uploads,
    "ranges": read_ranges,
    "csv": read_csv,
    "csv_files": convert_csv,
    "jsonl": read_jsonl,
}


class replaced:  # noqa: N801 - used like a function
    """Sets names of a module for the time of a block."""

    def __init__(self, module: object, **names: object) -> None:
        self._module = module
        self._names = names

    def __enter__(self) -> None:
        self._before = {name: getattr(self._module, name) for name in self._names}
        self._set(self._names)

    def __exit__(self, *_: object) -> None:
        self._set(self._before)

    def _set(self, names: Mapping[str, object]) -> None:
        for name, value in names.items():
            setattr(self._module, name, value)


def run(name: str, seconds: float, first_seed: int) -> int:
    """Run a kind for some seconds, at least once; return how many cases it was."""
    until, count = time.monotonic() + seconds, 0
    while not count or time.monotonic() < until:
        seed = first_seed + count
        try:
            CASES[name](random.Random(seed))  # noqa: S311 - cases, not secrets
        except Exception as error:
            error.add_note(f"again: python -m tests.fuzz --only {name} --seed {seed}")
            raise
        count += 1
    return count


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    options = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    options.add_argument(
        "--seconds", type=float, default=0, help="for each kind (default: one case)"
    )
    options.add_argument("--seed", type=int, help="of the first case (default: a fresh one)")
    options.add_argument("--only", choices=CASES, help="one kind")
    return options


def main() -> None:
    """Run."""
    asked = parser().parse_args()
    seed = random.SystemRandom().randrange(2**40) if asked.seed is None else asked.seed
    for name in [asked.only] if asked.only else CASES:
        count = run(name, asked.seconds, seed)
        sys.stdout.write(f"{name}: {count:,} cases from seed {seed}, all as the reference\n")


if __name__ == "__main__":
    main()
