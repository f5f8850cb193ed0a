"""What goes over the wire to Claude and comes back, in pieces: a large body is held once, and only as long as needed.

The SDK would parse a request, write it anew and keep both until the answer is there; and it reads the whole of whatever
an upstream sends. So it is given a small request, whose body is put in the place of its own on the way out, and an
answer passes through here on the way in.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import AsyncIterator, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import httpx2

from sluice.ports.claude import CallRequest
from sluice.worker.memory import BUDGET

PIECE_BYTES: Final = 64 * 1024

MOST_ERROR_BYTES: Final = 64 * 1024
"""Of an error's body; the rest is not read."""

MOST_PARSED_BYTES: Final = 96 * 1024 * 1024
"""An answer that would be larger than this once parsed is not. A list of empty lists takes twenty times its bytes."""

NODE_BYTES: Final = 80
"""What an element of a list, or a member of an object, takes beside its text."""

_TOKEN: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}\[\]:,]', re.DOTALL)


class AnswerTooLarge(Exception):
    """Upstream sends more than any answer can have."""


# Requests ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Member:
    name: bytes
    begins: int
    """Where its value begins and ends."""
    ends: int


def _members(body: bytes) -> Iterator[_Member]:
    """Yield the members of an object as `json.dumps` writes it, without parsing what is inside."""
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
    """Yield a request in pieces as it goes up: to this model, streamed or not, and otherwise byte for byte.

    None as model: to the one it names.
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
    """A request's body on its way; let go with its last piece."""

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


class _Download(httpx2.AsyncByteStream):
    """Reads an answer's bytes as they arrive, unpacked, up to the limit."""

    def __init__(self, inner: httpx2.AsyncByteStream, packed: str, exchange: Exchange) -> None:
        self._inner = inner
        self._unpacker = None
        if packed in {"gzip", "x-gzip", "deflate"}:
            self._unpacker = zlib.decompressobj(
                zlib.MAX_WBITS | 32 if "gzip" in packed else zlib.MAX_WBITS
            )
        self._exchange = exchange

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for packed in self._inner:
            async for piece in self._unpacked(packed):
                allowed = await self._exchange.allowed(piece)
                if allowed:
                    yield allowed
                if len(allowed) < len(piece):
                    return

    async def _unpacked(self, packed: bytes) -> AsyncIterator[bytes]:
        unpacker = self._unpacker
        if unpacker is None:
            yield packed
            return
        while packed and not unpacker.eof:
            try:
                yield unpacker.decompress(packed, PIECE_BYTES)
            except zlib.error as error:
                message = "the answer is not what its content-encoding says"
                raise httpx2.DecodingError(message) from error
            packed = unpacker.unconsumed_tail

    @property
    def elapsed(self) -> timedelta | None:
        """How long the exchange took, as the SDK asks for it."""
        return getattr(self._inner, "elapsed", None)

    async def aclose(self) -> None:
        await self._inner.aclose()


class Exchange:
    """One call's bodies."""

    def __init__(self, request: CallRequest, *, stream: bool) -> None:
        self._request = request
        self._is_streamed = stream
        self._is_error = False
        self._read = 0
        self._tail = b""

    def send(self, request: httpx2.Request) -> None:
        """Put the body into an HTTP request."""
        upload = _Upload(self._request, stream=self._is_streamed)
        request.stream = upload
        request.headers["content-length"] = str(upload.length)
        # What is not packed cannot be a bomb; an upstream that packs all the same is unpacked in pieces.
        request.headers["accept-encoding"] = "identity"

    def receive(self, response: httpx2.Response) -> None:
        """Watch over an HTTP response."""
        self._is_error = response.is_error
        packed = response.headers.pop("content-encoding", "identity").strip().lower()
        response.stream = _Download(response.stream, packed, self)  # type: ignore[arg-type]

    async def allowed(self, piece: bytes) -> bytes:
        """Return what may be read of a piece, when there is room for it; raises AnswerTooLarge.

        Of a stream an event is held at a time, so it is counted anew from each blank line on; the Message that grows
        from them is counted where it grows.
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


EXCHANGE: Final[ContextVar[Exchange | None]] = ContextVar("EXCHANGE", default=None)
"""Of the call that the present task makes."""


async def on_request(request: httpx2.Request) -> None:
    """Let the call's own body go up."""
    exchange = EXCHANGE.get()
    if exchange is not None:
        exchange.send(request)


async def on_response(response: httpx2.Response) -> None:
    """Limits how much of a response is read."""
    exchange = EXCHANGE.get()
    if exchange is not None:
        exchange.receive(response)


def parsed(text: str) -> object:
    """Return what JSON says; raises ValueError, and AnswerTooLarge for what would take too much memory."""
    nodes = sum(text.count(mark) for mark in ",[{")
    if 4 * len(text) + NODE_BYTES * nodes > MOST_PARSED_BYTES:
        raise AnswerTooLarge
    return json.loads(text)
