"""Bodies of requests and answers, in pieces: a large body is in memory once, and only as long as needed.

The SDK would parse a request, encode it again and keep both until the answer arrives, and it would read answers of any
size. Therefore it gets a small request, whose body is replaced when it is sent, and answers are read by this module.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from codecs import getincrementaldecoder
from collections.abc import AsyncIterator, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import httpx2

from sluice.domain.finite_json import FINITE, NotFinite, is_deeper
from sluice.ports.claude import CallRequest
from sluice.worker.memory import BUDGET

PIECE_BYTES: Final = 64 * 1024

MOST_ERROR_BYTES: Final = 64 * 1024
"""Maximum bytes of an error body; the rest is not read."""

MOST_PARSED_BYTES: Final = 96 * 1024 * 1024
"""Larger answers are not parsed. Parsed JSON takes up to twenty times its bytes, as for a list of empty lists."""

MOST_LEVELS: Final = 200
"""Levels of objects and lists in an answer. A Message has about ten, and readers of JSON fail at 1,000."""

NODE_BYTES: Final = 80
"""Memory of an element of a list or a member of an object, besides its text."""

_TOKEN: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}\[\]:,]', re.DOTALL)


class AnswerTooLarge(Exception):
    """The answer exceeds the maximum size."""


# Requests ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Member:
    name: bytes
    begins: int
    """The offsets at which its value begins and ends."""
    ends: int


def _members(body: bytes) -> Iterator[_Member]:
    """Yield the members of a JSON object, without parsing their values."""
    depth, name, begins = 0, b"", 0
    for token in _TOKEN.finditer(body):
        kind = body[token.start()]
        if kind in b"{[":
            depth += 1
        elif kind in b"}],":
            if depth == 1 and name:
                yield _Member(name, begins, token.start())
                name = b""
            depth -= kind != ord(",")
        elif depth == 1 and kind == ord(":"):
            begins = token.end()
        elif depth == 1 and not name:
            name = token.group()[1:-1]


def addressed(body: bytes, model: str | None, *, stream: bool) -> Iterator[bytes | memoryview]:
    """Yield a request in pieces with this model, streamed or not, and otherwise unchanged.

    None as model leaves the model unchanged.
    """
    wanted = {} if model is None else {b"model": json.dumps(model).encode()}
    if stream or b'"stream"' in body:
        wanted[b"stream"] = b"true" if stream else b"false"
    cuts: list[tuple[int, int, bytes]] = []
    has_members = b":" in body
    names = [name for name in wanted if b'"%s"' % name in body]
    for member in _members(body) if names else ():
        value = wanted.pop(member.name, None)
        if value is not None:
            cuts.append((member.begins, member.ends, value))
            names.remove(member.name)
        if not names:
            break
    first = body.index(b"{") + 1
    more = b",".join(b'"%s":%s' % each for each in wanted.items())
    cuts.insert(0, (first, first, more + b"," if more and has_members else more))
    view, at = memoryview(body), 0
    for begins, ends, value in cuts:
        yield view[at:begins]
        yield value
        at = ends
    yield view[at:]


class _Upload(httpx2.AsyncByteStream):
    """The body of a request being sent; released with its last piece."""

    def __init__(self, request: CallRequest, *, stream: bool) -> None:
        self._body = request.body
        model = None if request.names_model else request.model
        self._pieces = list(addressed(request.body.data, model, stream=stream))
        self.length = sum(map(len, self._pieces))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        pieces, self._pieces = self._pieces, []
        while pieces:
            piece = pieces.pop(0)
            for start in range(0, len(piece), PIECE_BYTES):
                yield bytes(piece[start : start + PIECE_BYTES])
            del piece
        self._body.release()


# Answers -------------------------------------------------------------------------------------------------------


class Unpacker:
    """Decompresses a body in pieces of at most `PIECE_BYTES`, by its `content-encoding`."""

    def __init__(self, packed: str) -> None:
        packed = packed.strip().lower()
        self._stream = None
        if packed in {"gzip", "x-gzip", "deflate"}:
            self._stream = zlib.decompressobj(
                zlib.MAX_WBITS | 32 if "gzip" in packed else zlib.MAX_WBITS
            )

    @property
    def is_cut_off(self) -> bool:
        """Whether the body is compressed, and its end has not been seen."""
        return self._stream is not None and not self._stream.eof

    def pieces(self, packed: bytes) -> Iterator[bytes]:
        """Yield what the next bytes contain; raises DecodingError."""
        if self._stream is None:
            yield packed
            return
        while packed and not self._stream.eof:
            try:
                yield self._stream.decompress(packed, PIECE_BYTES)
            except zlib.error as error:
                raise httpx2.DecodingError(
                    "the answer does not match its content-encoding"
                ) from error
            packed = self._stream.unconsumed_tail


def pieces_of(response: httpx2.Response) -> Iterator[bytes]:
    """Yield the body of a response, decompressed; raises HTTPError, also if a compressed body ends early."""
    unpacker = Unpacker(response.headers.get("content-encoding", ""))
    for packed in response.iter_raw():
        yield from unpacker.pieces(packed)
    if unpacker.is_cut_off:
        raise httpx2.DecodingError("the compressed body ended early")


class _Download(httpx2.AsyncByteStream):
    """The body of an answer as it arrives, decompressed, up to the limit."""

    def __init__(self, inner: httpx2.AsyncByteStream, packed: str, exchange: Exchange) -> None:
        self._inner = inner
        self._unpacker = Unpacker(packed)
        self._exchange = exchange
        self._utf8 = getincrementaldecoder("utf-8")("replace")

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for packed in self._inner:
            for piece in self._unpacker.pieces(packed):
                allowed = await self._exchange.allowed(piece)
                # The SDK decodes events strictly: one bad byte would lose an answer that is paid.
                valid = self._utf8.decode(allowed).encode()
                if valid:
                    yield valid
                if len(allowed) < len(piece):
                    return

    @property
    def elapsed(self) -> timedelta | None:
        """The duration of the exchange, which the SDK reads."""
        return getattr(self._inner, "elapsed", None)

    async def aclose(self) -> None:
        await self._inner.aclose()


class Exchange:
    """The bodies of one call."""

    def __init__(self, request: CallRequest, *, stream: bool) -> None:
        self._request = request
        self._is_streamed = stream
        self._is_error = False
        self._read = 0
        self._tail = b""

    def send(self, request: httpx2.Request) -> None:
        """Set the body of an HTTP request."""
        upload = _Upload(self._request, stream=self._is_streamed)
        request.stream = upload
        request.headers["content-length"] = str(upload.length)
        # Uncompressed answers cannot be decompression bombs; compressed ones are decompressed in pieces.
        request.headers["accept-encoding"] = "identity"

    def receive(self, response: httpx2.Response) -> None:
        """Limit the body of an HTTP response."""
        self._is_error = response.is_error
        self._is_streamed &= "json" not in response.headers.get("content-type", "")
        packed = response.headers.pop("content-encoding", "identity")
        # JSON is UTF-8, whatever a relay names as charset.
        response.encoding = "utf-8"
        response.stream = _Download(response.stream, packed, self)  # type: ignore[arg-type]

    async def allowed(self, piece: bytes) -> bytes:
        """Wait for memory, and return the part of a piece that may be read; raises AnswerTooLarge.

        Of a stream only one event is in memory, so counting restarts at each blank line; `Growing` counts the Message.
        """
        if self._is_error:
            allowed = piece[: max(0, MOST_ERROR_BYTES - self._read)]
            self._read += len(allowed)
            return allowed
        self._read += len(piece)
        if self._read > BUDGET.most_answer:
            raise AnswerTooLarge
        if self._is_streamed:
            seam = self._tail + piece
            self._tail = seam[-3:]
            blank = max(seam.rfind(b"\n\n"), seam.rfind(b"\n\r\n"), seam.rfind(b"\r\r"))
            if blank >= 0:
                self._read = len(seam) - blank
        await self._request.room(self._read)
        return piece


def object_of(value: object) -> Mapping[str, Any]:
    """Return a JSON object, an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def raw_member(body: bytes, *names: bytes) -> bytes | None:
    """Return the value at a path of member names exactly as it is in the bytes of a valid JSON object.

    None if there is none, or if a name is written with escapes. Of equal names the last one counts, as for `json`.
    """
    begins, ends = 0, len(body)
    for name in names:
        body = body[begins:ends]
        found = [member for member in _members(body) if member.name == name]
        if not found:
            return None
        begins, ends = found[-1].begins, found[-1].ends
    return body[begins:ends].strip()


EXCHANGE: Final[ContextVar[Exchange | None]] = ContextVar("EXCHANGE", default=None)
"""The exchange of the call that the current task makes."""


async def on_request(request: httpx2.Request) -> None:
    """Replace the body of the SDK's request with that of the call."""
    exchange = EXCHANGE.get()
    if exchange is not None:
        exchange.send(request)


async def on_response(response: httpx2.Response) -> None:
    """Limit how much of a response is read."""
    exchange = EXCHANGE.get()
    if exchange is not None:
        exchange.receive(response)


def _clamped(text: str) -> float:
    return min(max(float(text), -sys.float_info.max), sys.float_info.max)


def _constant_clamped(name: str) -> float | None:
    return None if name == "NaN" else _clamped(name)


_CLAMPING: Final = json.JSONDecoder(parse_constant=_constant_clamped, parse_float=_clamped)


def parsed(text: str) -> tuple[Any, bool]:
    """Parse JSON; return the document, and whether all of its numbers could be read as they are.

    Numbers beyond the range of a double become the nearest one, so that an answer that is paid can be written again as
    JSON. Raises ValueError, and AnswerTooLarge for what takes too much memory or is nested too deeply.
    """
    brackets = text.count("[") + text.count("{")
    nodes = text.count(",") + brackets
    if 4 * len(text) + NODE_BYTES * nodes > MOST_PARSED_BYTES:
        raise AnswerTooLarge
    try:
        try:
            document, is_exact = FINITE.decode(text), True
        except NotFinite:
            document, is_exact = _CLAMPING.decode(text), False
    except RecursionError as error:
        raise AnswerTooLarge from error
    if brackets > MOST_LEVELS and is_deeper(document, MOST_LEVELS):
        raise AnswerTooLarge
    return document, is_exact
