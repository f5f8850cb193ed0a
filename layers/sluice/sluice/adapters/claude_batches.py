"""Message Batches through the official SDK, without its retries: each call is made once, and its end is a value.

The SDK sends a body from an iterator of bytes, and gives each response unread; its own methods would encode the whole
body at once, and would follow `results_url`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final
from urllib.parse import quote

import anthropic
import httpx2
from anthropic import Anthropic, DefaultHttpxClient, Omit

from sluice.adapters.claude import unsendable, version_headers
from sluice.adapters.claude_answers import (
    Partial,
    connection_lost,
    identifier,
    is_error,
    refusal,
    refusal_of,
)
from sluice.adapters.claude_bodies import (
    MOST_ERROR_BYTES,
    AnswerTooLarge,
    Unpacker,
    object_of,
    parsed,
    pieces_of,
)
from sluice.adapters.claude_results import SdkRows
from sluice.domain.keys import UpstreamKey
from sluice.domain.pricing import MOST_COUNT
from sluice.domain.refusals import Consequence, Scope
from sluice.domain.retries import UNSENDABLE, Failure, meaning
from sluice.domain.times import from_rfc3339
from sluice.ports.claude import Headers, Refused
from sluice.ports.upstream import (
    Access,
    Counts,
    Created,
    Listed,
    NotFound,
    NotSent,
    Seen,
    Unknown,
    Unreachable,
)
from sluice.ports.world import Clock
from sluice.worker.memory import MEBIBYTE

PATH: Final = "/v1/messages/batches"

CREATE_SECONDS: Final = 300.0
"""Maximum silence after the body of a create: upstream validates up to 256 MB before it answers."""

SILENCE_SECONDS: Final = 60.0
"""Maximum silence of any other call, and of the results between two reads."""

PAGE: Final = 1_000
"""Batches per page of the list, the maximum (Anthropic, list Message Batches): all batch endpoints share few RPM."""

MOST_PAGES: Final = 20

MOST_DOCUMENT_BYTES: Final = 8 * MEBIBYTE
"""Maximum size of a batch, or of a page of batches; a page of the maximum length has less than 1 MB."""

_EFFECT_UNKNOWN: Final = frozenset({408, 499})
"""Statuses of proxies that stopped waiting; upstream may have finished."""


class SdkUpstreamBatches:
    """One SDK client per key, all with one pool of connections. Usable from several threads."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._clients: dict[tuple[str, str], Anthropic] = {}
        self._http = DefaultHttpxClient(
            # A connection that upstream closes while it is idle would leave the end of a create unknown.
            limits=httpx2.Limits(max_keepalive_connections=0),
            follow_redirects=False,
            event_hooks={"response": [_shorten_error]},
        )

    def create(
        self, access: Access, body: Iterable[bytes], length: int
    ) -> Created | Refused | NotSent | Unknown:
        """Create a batch from a JSON body of `length` bytes, which is read once and piece by piece."""
        upload = _Upload(body, length)
        outcome = self._asked(access, "post", PATH, upload)
        if upload.problem is not None:
            raise upload.problem
        if upload.wrong_length is not None:
            return NotSent(Failure(UNSENDABLE, upload.wrong_length))
        if isinstance(outcome, Refused):
            return _not_created(outcome, upload)
        seen, headers = seen_of(outcome.document), outcome.headers
        if seen is not None:
            return Created(seen, headers)
        return Unknown(_unusable(outcome), headers)

    def get(self, access: Access, batch_id: str) -> Seen | NotFound | Refused | Unreachable:
        """Return the state of a batch."""
        return self._one(access, "get", batch_id)

    def cancel(self, access: Access, batch_id: str) -> Seen | NotFound | Refused | Unreachable:
        """Cancel a batch; canceling it again changes nothing. One that has ended is refused: get it."""
        return self._one(access, "post", batch_id, "/cancel")

    def since(self, access: Access, moment: int) -> Listed | Refused | Unreachable:
        """Return all batches of the workspace that were created at `moment` or later, or whose time is unknown."""
        found: dict[str, Seen] = {}
        query: dict[str, object] = {"limit": PAGE}
        for _ in range(MOST_PAGES):
            outcome = self._asked(access, "get", PATH, query=query)
            if isinstance(outcome, Refused):
                return outcome if _is_decided(outcome) else Unreachable(outcome.failure)
            page = _page_of(outcome.document)
            if page is None:
                return Unreachable(_unusable(outcome))
            fresh = {each.id: each for each in page.batches if each.id not in found}
            found |= {name: each for name, each in fresh.items() if not _is_before(each, moment)}
            if not page.has_more or any(_is_before(each, moment) for each in page.batches):
                return Listed(tuple(found.values()))
            if not fresh:
                break
            query["after_id"] = page.batches[-1].id
        return Unreachable(Failure("api_error", "upstream's list of batches does not end", 502))

    def results(self, access: Access, batch_id: str) -> SdkRows | NotFound | Refused | Unreachable:
        """Open the results of an ended batch.

        The path is the documented one. `results_url` is never followed, and neither is a redirect: the key would be
        sent to the host that it names.
        """
        accept = {"Accept": "application/binary"}
        opened = self._sent(access, "get", _path(batch_id, "/results"), headers=accept)
        if isinstance(opened, Refused):
            return _not_seen(opened)
        return SdkRows(batch_id, opened)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _one(
        self, access: Access, method: str, batch_id: str, action: str = ""
    ) -> Seen | NotFound | Refused | Unreachable:
        outcome = self._asked(access, method, _path(batch_id, action))
        if isinstance(outcome, Refused):
            return _not_seen(outcome)
        seen = seen_of(outcome.document)
        if seen is None or seen.id != batch_id:
            return Unreachable(_unusable(outcome))
        return seen

    def _asked(
        self,
        access: Access,
        method: str,
        path: str,
        upload: _Upload | None = None,
        query: Mapping[str, object] | None = None,
    ) -> _Said | Refused:
        """Make a call that is answered with one document, and read it."""
        response = self._sent(access, method, path, upload, query)
        if isinstance(response, Refused):
            return response
        partial = Partial()
        partial.take_headers(response.headers, self._clock.now())
        try:
            document = _document(response)
        except httpx2.HTTPError as error:
            return connection_lost(error, partial)
        finally:
            response.close()
        if is_error(document):
            return refusal(document, response.status_code, partial, response.headers)
        return _Said(document, partial)

    def _sent(  # noqa: PLR0913, PLR0917 - the parts of a request
        self,
        access: Access,
        method: str,
        path: str,
        upload: _Upload | None = None,
        query: Mapping[str, object] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx2.Response | Refused:
        """Make a call; return the response with its body unread. Errors of upstream and of the network are returned."""
        problem = unsendable(access.key, access.anthropic_version, access.anthropic_beta)
        if problem is not None:
            return Refused(problem)
        own: dict[str, str | Omit] = {
            "Authorization": Omit(),
            # Uncompressed answers cannot be decompression bombs; compressed ones are decompressed in pieces.
            "Accept-Encoding": "identity",
            **version_headers(access.anthropic_version, access.anthropic_beta),
            **(headers or {}),
        }
        silence = SILENCE_SECONDS
        if upload is not None:
            # With its length named, the body is not sent in chunks.
            own |= {"Content-Type": "application/json", "Content-Length": str(upload.length)}
            silence = CREATE_SECONDS
        options: Any = {
            "headers": own,
            "params": query or {},
            "timeout": httpx2.Timeout(SILENCE_SECONDS, connect=5.0, read=silence),
        }
        partial = Partial()
        try:
            client = self._client(access.key)
            if method == "get":
                return client.get(path, cast_to=httpx2.Response, options=options, stream=True)
            return client.post(
                path, cast_to=httpx2.Response, content=upload, options=options, stream=True
            )
        except anthropic.APIStatusError as error:
            said = error.response
            return refusal_of(
                error.status_code, said.headers, said.content, partial, self._clock.now()
            )
        except (anthropic.APIConnectionError, httpx2.HTTPError, httpx2.InvalidURL) as error:
            return connection_lost(error, partial)

    def _client(self, key: UpstreamKey) -> Anthropic:
        client = self._clients.get((key.base_url, key.api_key))
        if client is None:
            client = self._clients[key.base_url, key.api_key] = Anthropic(
                base_url=key.base_url,
                # Never sent. The key that is sent is a header of the client, because the SDK logs those of a call at
                # level DEBUG.
                api_key="set-by-header",
                default_headers={"X-Api-Key": key.api_key},
                max_retries=0,
                http_client=self._http,
            )
        return client


def _path(batch_id: str, action: str = "") -> str:
    return f"{PATH}/{quote(batch_id, safe='')}{action}"


# Bodies --------------------------------------------------------------------------------------------------------


class _Upload:
    """The body of a create. Its last piece is sent only once the body is known to have the length that was announced.

    Until then upstream has an incomplete request, which it must not process (RFC 9112, section 8).
    """

    def __init__(self, pieces: Iterable[bytes], length: int) -> None:
        self.length = length
        self.is_complete = False
        """The last piece was given to the connection."""
        self.problem: Exception | None = None
        """What reading the body raised."""
        self.wrong_length: str | None = None
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        held, size = b"", 0
        try:
            for piece in self._pieces:
                size += len(piece)
                if size > self.length:
                    break
                if held and piece:
                    yield held
                held = piece or held
        except Exception as error:
            self.problem = error
            raise
        if size != self.length:
            some = "at least " if size > self.length else ""
            self.wrong_length = f"the body has {some}{size:,} bytes and {self.length:,} were announced; write it anew"
            raise _WrongLength
        self.is_complete = True
        yield held


class _WrongLength(Exception):
    """The body does not have the length that was announced."""


class _Beginning(httpx2.SyncByteStream):
    """The beginning of an error body, decompressed."""

    def __init__(self, inner: httpx2.SyncByteStream, unpacker: Unpacker) -> None:
        self._inner = inner
        self._unpacker = unpacker

    def __iter__(self) -> Iterator[bytes]:
        left = MOST_ERROR_BYTES
        for packed in self._inner:
            for piece in self._unpacker.pieces(packed):
                yield piece[:left]
                left -= len(piece)
                if left <= 0:
                    return

    def close(self) -> None:
        self._inner.close()


def _shorten_error(response: httpx2.Response) -> None:
    """Limit the body of an error, which the SDK reads to its end."""
    if not response.is_success:
        unpacker = Unpacker(response.headers.pop("content-encoding", ""))
        response.stream = _Beginning(response.stream, unpacker)  # type: ignore[arg-type]


def _document(response: httpx2.Response) -> object:
    """Return the JSON document of a response, None for anything else; raises HTTPError."""
    body = bytearray()
    for piece in pieces_of(response):
        body += piece
        if len(body) > MOST_DOCUMENT_BYTES:
            return None
    try:
        return parsed(body.decode("utf-8-sig", "replace"))[0]
    except (ValueError, AnswerTooLarge):
        return None


# Batches -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Said:
    """The document of a response with status 2xx."""

    document: object
    partial: Partial

    @property
    def headers(self) -> Headers:
        return self.partial.headers


@dataclass(frozen=True, slots=True)
class _Page:
    batches: tuple[Seen, ...]
    has_more: bool


def seen_of(document: object) -> Seen | None:
    """Return the batch that a document describes, whatever is missing in it; None without a usable ID."""
    said = object_of(document)
    batch_id = identifier(said.get("id"))
    if batch_id is None:
        return None
    counts = object_of(said.get("request_counts"))
    return Seen(
        id=batch_id,
        status=identifier(said.get("processing_status")) or "",
        requests=_sum(counts),
        counts=Counts(*(_count(counts.get(name)) or 0 for name in Counts.__slots__)),
        created_at=from_rfc3339(said.get("created_at")),
        expires_at=from_rfc3339(said.get("expires_at")),
        cancel_initiated_at=from_rfc3339(said.get("cancel_initiated_at")),
        ended_at=from_rfc3339(said.get("ended_at")),
        archived_at=from_rfc3339(said.get("archived_at")),
        has_results=bool(said.get("results_url")),
    )


def _page_of(document: object) -> _Page | None:
    """Return a page of the list; None unless all of its entries have a usable ID, because one may be ours."""
    said = object_of(document)
    data = said.get("data")
    if not isinstance(data, list):
        return None
    batches = [seen for seen in map(seen_of, data) if seen is not None]
    if len(batches) < len(data):
        return None
    more = said.get("has_more")
    has_more = more if isinstance(more, bool) else len(data) >= PAGE
    return _Page(tuple(batches), has_more)


def _is_before(seen: Seen, moment: int) -> bool:
    return seen.created_at is not None and seen.created_at < moment


def _count(value: object) -> int | None:
    if value is None:
        return 0
    is_count = isinstance(value, int) and not isinstance(value, bool)
    return value if is_count and 0 <= value <= MOST_COUNT else None  # type: ignore[operator,return-value]


def _sum(counts: Mapping[str, object]) -> int | None:
    """Return the sum of all counts, also of those that this version does not know; None if one makes no sense."""
    values = [_count(value) for value in counts.values()]
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


# Endings -------------------------------------------------------------------------------------------------------


def _unusable(said: _Said) -> Failure:
    return Failure(
        "api_error",
        "upstream answered 200 with a body that is not the batch asked for",
        status=502,
        request_id=said.partial.request_id,
    )


def _is_decided(refused: Refused) -> bool:
    """Return whether upstream has said no. A server error and a lost connection do not say what happened."""
    failure = refused.failure
    if failure.status is None:
        # Nothing was sent, and nothing will be: a header has an unusable value.
        return not failure.may_be_billed and failure.type != "connection_error"
    return failure.status not in _EFFECT_UNKNOWN and meaning(failure).scope is not Scope.ENDPOINT


def _not_created(refused: Refused, upload: _Upload) -> Refused | NotSent | Unknown:
    if _is_decided(refused):
        return refused
    failure = replace(refused.failure, may_be_billed=upload.is_complete)
    if failure.status is None and not refused.failure.may_be_billed:
        return NotSent(replace(failure, may_be_billed=False))
    return Unknown(failure, refused.headers) if upload.is_complete else NotSent(failure)


def _not_seen(refused: Refused) -> NotFound | Refused | Unreachable:
    if not _is_decided(refused):
        return Unreachable(refused.failure)
    failure = refused.failure
    is_missing = failure.status == 404  # noqa: PLR2004 - HTTP
    if is_missing and meaning(failure).consequence is not Consequence.PARK:
        return NotFound(failure)
    return refused
