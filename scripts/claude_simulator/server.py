"""The HTTP side: a raw ASGI application with a table of routes, on the loopback interface."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from scripts import local_doors
from scripts.claude_simulator import checks
from scripts.claude_simulator.accounts import Caller, Refused
from scripts.claude_simulator.batch_api import BatchApi
from scripts.claude_simulator.engine import Call, Engine
from scripts.claude_simulator.exchange import Exchange, Handler, encode, is_loopback, not_found
from scripts.claude_simulator.faults import Failure, Place, error_body
from scripts.claude_simulator.limits import SECOND
from scripts.claude_simulator.settings import Model, Settings, SettingsError

HOST: Final = "127.0.0.1"
CONTROL: Final = "/_simulator/"
SSE_TYPE: Final = (b"content-type", b"text/event-stream; charset=utf-8")
SSE_STEP: Final = SECOND // 20  # deltas of a slow answer come no closer together than this
SSE_MOST_STEPS: Final = 200
SSE_FEWEST_STEPS: Final = 4


class PortError(OSError):
    """The port cannot be used; the message is one line."""


class App:
    """The ASGI application."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.batches = BatchApi(engine)
        self.routes: dict[tuple[str, str], Handler] = {
            ("POST", "/v1/messages"): self.create_message,
            ("POST", "/v1/messages/count_tokens"): self.count_tokens,
            ("GET", "/v1/models"): self.list_models,
            ("GET", "/v1/models/{id}"): self.get_model,
            ("GET", "/v1/organizations/rate_limits"): self.organization_rate_limits,
            ("GET", "/v1/organizations/workspaces/{id}/rate_limits"): self.workspace_rate_limits,
            ("GET", "/_simulator/stats"): self.stats,
            ("GET", "/_simulator/ledger"): self.ledger,
            ("POST", "/_simulator/config"): self.configure,
            ("POST", "/_simulator/reset"): self.reset,
            **self.batches.routes(),
        }
        self._paths = {path for _, path in self.routes if "{id}" not in path}
        self._patterns = [path.split("{id}") for _, path in self.routes if "{id}" in path]

    async def __call__(
        self,
        scope: dict[str, Any],
        receive: Callable[[], Awaitable[dict[str, Any]]],
        send: Callable[[dict[str, Any]], Awaitable[None]],
    ) -> None:
        """Answer one request."""
        if (foreign := _foreign(scope)) is not None:
            exchange = Exchange(scope, send, self.engine.request_id(), b"", None, None)
            await exchange.refuse(foreign)
            return
        key, version = _key_and_version(scope["headers"])
        event = await receive()
        body = event.get("body", b"")
        if event.get("more_body"):
            most = self.batches.most_bytes_of(scope["path"]) or checks.MAX_BODY_BYTES
            body = await _rest_of(body, receive, most)
        exchange = Exchange(scope, send, self.engine.request_id(), body, key, version)
        del body  # or it would stay until the answer is sent
        route, exchange.id = self._route(scope["path"])
        handler = self.routes.get((scope["method"], route))
        if handler is not None and _is_unguarded_control(exchange):
            said = "content-type: application/json is required here"
            await exchange.refuse(Refused(Failure(415, "invalid_request_error", said), []))
        elif handler is not None:
            await handler(exchange)
        elif route:
            said = f"{scope['method']} is not allowed for {scope['path']}"
            await exchange.refuse(Refused(Failure(405, "invalid_request_error", said), []))
        else:
            await exchange.refuse(not_found(scope["path"]))

    def _route(self, path: str) -> tuple[str, str]:
        """Return the route a path belongs to, empty for none, and the value of its {id}."""
        if path in self._paths:
            return path, ""
        for before, after in self._patterns:
            found = path[len(before) : len(path) - len(after)]
            if found and "/" not in found and path == f"{before}{found}{after}":
                return f"{before}{{id}}{after}", found
        return "", ""

    # -- Claude's API -----------------------------------------------------------------------

    async def _caller(self, exchange: Exchange, *, admin: bool = False) -> Caller | None:
        """Return who calls; who may not has been refused."""
        authenticate = self.engine.authenticate_admin if admin else self.engine.authenticate
        caller = authenticate(exchange.key, exchange.version)
        if isinstance(caller, Refused):
            await exchange.refuse(caller)
            return None
        return caller

    async def create_message(self, exchange: Exchange) -> None:
        """POST /v1/messages: an answer, as JSON or as events."""
        engine = self.engine
        caller = await self._caller(exchange)
        if caller is None:
            return
        call = engine.message(caller, exchange.body, exchange.request_id)
        if isinstance(call, Refused):
            await exchange.refuse(call)
            return
        exchange.body = b""
        status, delivered = 200, False
        try:
            if call.place is Place.DROP_AFTER:
                await self._sleep_until(call.ends_at)
                status = 0
                exchange.transport.abort()
            elif call.streamed:
                delivered = await self._stream(exchange, call)
            elif call.place is Place.IN_STREAM:
                await self._sleep_until(_halfway(call))
                status = 529
                await exchange.refuse(Refused(_OVERLOADED, engine.answer_headers(call)))
            else:
                if call.ends_at > caller.at:
                    await self._sleep_until(call.ends_at)
                delivered = not exchange.transport.is_closing()
                await exchange.reply(200, call.message(), engine.answer_headers(call))
        finally:
            engine.finish(call, status, delivered=delivered)

    async def count_tokens(self, exchange: Exchange) -> None:
        """POST /v1/messages/count_tokens: the estimate of a request's input tokens."""
        caller = await self._caller(exchange)
        if caller is None:
            return
        counted = self.engine.count_tokens(caller, exchange.body)
        if isinstance(counted, Refused):
            await exchange.refuse(counted)
            return
        await exchange.reply(200, {"input_tokens": counted}, caller.headers)

    async def list_models(self, exchange: Exchange) -> None:
        """GET /v1/models: a page of models, newest first."""
        caller = await self._caller(exchange)
        if caller is None:
            return
        query = exchange.query()
        models = list({model.id: model for model in self.engine.models.values()}.values())
        ids = [model.id for model in models]
        limit = query.get("limit", "20")
        if not limit.isdecimal() or not 1 <= int(limit) <= 1000:  # noqa: PLR2004
            await exchange.refuse(_bad("limit: a number from 1 to 1000", caller))
            return
        start = ids.index(query["after_id"]) + 1 if query.get("after_id") in ids else 0
        end = ids.index(query["before_id"]) if query.get("before_id") in ids else len(ids)
        if "before_id" in query:
            start = max(start, end - int(limit))
        page = models[start : min(end, start + int(limit))]
        more = start > 0 if "before_id" in query else start + len(page) < end
        await exchange.reply(
            200,
            {
                "data": [model_info(model) for model in page],
                "has_more": more,
                "first_id": page[0].id if page else None,
                "last_id": page[-1].id if page else None,
            },
            caller.headers,
        )

    async def get_model(self, exchange: Exchange) -> None:
        """GET /v1/models/{id}: one model, by id or alias."""
        caller = await self._caller(exchange)
        if caller is None:
            return
        model = self.engine.models.get(exchange.id)
        if model is None:
            failure = Failure(404, "not_found_error", f"model: {exchange.id}")
            await exchange.refuse(Refused(failure, caller.headers))
            return
        await exchange.reply(200, model_info(model), caller.headers)

    async def organization_rate_limits(self, exchange: Exchange) -> None:
        """GET /v1/organizations/rate_limits: the limits of the organization, for its admin keys."""
        await self._rate_limits(exchange, None)

    async def workspace_rate_limits(self, exchange: Exchange) -> None:
        """GET /v1/organizations/workspaces/{id}/rate_limits: those of one of its workspaces."""
        await self._rate_limits(exchange, exchange.id)

    async def _rate_limits(self, exchange: Exchange, workspace: str | None) -> None:
        caller = await self._caller(exchange, admin=True)
        if caller is None:
            return
        page = self.engine.rate_limits(caller, exchange.query(), workspace)
        if isinstance(page, Refused):
            await exchange.refuse(page)
            return
        await exchange.reply(200, page, caller.headers)

    # -- answers over time ------------------------------------------------------------------

    async def _sleep_until(self, at: int) -> None:
        nanoseconds = at - self.engine.clock()
        if nanoseconds > 0:
            await asyncio.sleep(nanoseconds / SECOND)

    async def _stream(self, exchange: Exchange, call: Call) -> bool:
        """Send the answer as events at the pace of its tokens; say whether it arrived whole."""
        await self._sleep_until(call.first_token_at)
        await exchange.start(
            200, [*self.engine.answer_headers(call), SSE_TYPE, (b"cache-control", b"no-cache")]
        )
        fails_at = _halfway(call) if call.place is Place.IN_STREAM else None
        buffered: list[bytes] = []
        for at, event in events(call):
            if fails_at is not None and at >= fails_at and event["type"] != "message_start":
                break
            if at > self.engine.clock():
                if buffered:
                    await exchange.write(b"".join(buffered), more=True)
                    buffered.clear()
                await self._sleep_until(at)
            buffered.append(sse(event))
        if fails_at is not None:
            await self._sleep_until(fails_at)
            buffered.append(sse(error_body(_OVERLOADED, exchange.request_id)))
        delivered = not exchange.transport.is_closing() and fails_at is None
        await exchange.write(b"".join(buffered))
        return delivered

    # -- control ----------------------------------------------------------------------------

    async def stats(self, exchange: Exchange) -> None:
        """GET /_simulator/stats: the counts."""
        if is_loopback(exchange):
            starts = exchange.query().get("starts") == "1"
            await exchange.reply(200, self.engine.stats(starts=starts), [])
        else:
            await exchange.refuse(not_found(exchange.scope["path"]))

    async def ledger(self, exchange: Exchange) -> None:
        """GET /_simulator/ledger: every ended call as JSON lines."""
        if not is_loopback(exchange):
            await exchange.refuse(not_found(exchange.scope["path"]))
            return
        await exchange.start(200, [(b"content-type", b"application/x-ndjson")])
        lines: list[str] = []
        for row in self.engine.ledger():
            lines.append(encode(row))
            if len(lines) == 1000:  # noqa: PLR2004
                await exchange.write(("\n".join(lines) + "\n").encode(), more=True)
                lines.clear()
                await asyncio.sleep(0)
        await exchange.write("".join(f"{line}\n" for line in lines).encode())

    async def configure(self, exchange: Exchange) -> None:
        """POST /_simulator/config: changed limits, faults, keys; all of it or nothing."""
        if not is_loopback(exchange):
            await exchange.refuse(not_found(exchange.scope["path"]))
            return
        try:
            self.engine.configure(checks.parse(exchange.body))
        except (SettingsError, checks.RequestError) as error:
            failure = Failure(400, "invalid_request_error", str(error))
            await exchange.refuse(Refused(failure, []))
            return
        await exchange.reply(200, self.engine.settings.model_dump(), [])

    async def reset(self, exchange: Exchange) -> None:
        """POST /_simulator/reset: empty books, full buckets; `?config=1` the first settings too."""
        if not is_loopback(exchange):
            await exchange.refuse(not_found(exchange.scope["path"]))
            return
        self.engine.reset(to_original=exchange.query().get("config") == "1")
        await exchange.reply(200, {"reset": True}, [])


def _key_and_version(headers: list[tuple[bytes, bytes]]) -> tuple[str | None, str | None]:
    key = bearer = version = None
    for name, value in headers:
        if name == b"x-api-key":
            key = value.decode("latin-1")
        elif name == b"authorization":
            bearer = value.decode("latin-1")
        elif name == b"anthropic-version":
            version = value.decode("latin-1")
    if key is None and bearer is not None and bearer[:7].lower() == "bearer ":
        key = bearer[7:].strip()
    return key, version


def _foreign(scope: dict[str, Any]) -> Refused | None:
    """Return the refusal of a request that a page of another origin sent."""
    sent: dict[bytes, list[str]] = {}
    for name, value in scope["headers"]:
        if name in (b"host", b"origin"):
            sent.setdefault(name, []).append(value.decode("latin-1"))
    host, origin = (",".join(sent[name]) if name in sent else None for name in (b"host", b"origin"))
    reason = local_doors.refusal(host, origin, scope["server"][1])
    return None if reason is None else Refused(Failure(403, "permission_error", reason), [])


def _is_unguarded_control(exchange: Exchange) -> bool:
    """Whether a call changes the simulator without the content type that no form of a web page can send.

    A browser asks before it sends JSON to another origin, and the simulator never permits it: control stays with
    programs of this machine even where a browser leaves `Origin` out.
    """
    if exchange.scope["method"] != "POST" or not exchange.scope["path"].startswith(CONTROL):
        return False
    return exchange.header(b"content-type").partition(";")[0].strip().lower() != "application/json"


_OVERLOADED: Final = Failure(529, "overloaded_error", "Overloaded")


def _bad(message: str, caller: Caller) -> Refused:
    return Refused(Failure(400, "invalid_request_error", message), caller.headers)


def _halfway(call: Call) -> int:
    return (call.first_token_at + call.ends_at) // 2


async def _rest_of(
    body: bytes, receive: Callable[[], Awaitable[dict[str, Any]]], most: int
) -> bytes:
    """Read to the end; of a body that is too large nothing is kept, its length is refused."""
    parts = [body]
    size = len(body)
    more = True
    while more:
        event = await receive()
        part = event.get("body", b"")
        size += len(part)
        parts.append(part)
        if size > most:
            parts.clear()
        more = bool(event.get("more_body"))
    return bytes(most + 1) if size > most else b"".join(parts)


def model_info(model: Model) -> dict[str, Any]:
    """Return the model as `GET /v1/models` shows it."""
    return {
        "type": "model",
        "id": model.id,
        "display_name": model.display_name or model.id,
        "line": model.line,
        "created_at": model.created_at,
        "lifecycle": model.lifecycle,
        "deprecated_at": None,
        "retires_at": model.retires_at,
        "max_input_tokens": model.max_input_tokens,
        "max_tokens": model.max_tokens,
        "capabilities": None,
    }


def sse(event: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return f"event: {event['type']}\ndata: {encode(event)}\n\n".encode()


def events(call: Call) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the events of a streamed answer, each with the time it is due."""
    message = call.message()
    usage = message["usage"]
    started = {**message, "content": [], "stop_reason": None, "stop_details": None}
    started["usage"] = {**usage, "output_tokens": min(1, usage["output_tokens"])}
    started["usage"].pop("output_tokens_details", None)
    first, end = call.first_token_at, call.ends_at
    yield first, {"type": "message_start", "message": started}
    pieces = [_pieces(block, end - first, len(call.answer.blocks)) for block in call.answer.blocks]
    total = sum(len(deltas) for _, deltas in pieces) or 1
    sent = 0
    for index, (start, deltas) in enumerate(pieces):
        at = first + (end - first) * sent // total
        yield at, {"type": "content_block_start", "index": index, "content_block": start}
        if index == 0:
            yield at, {"type": "ping"}
        for delta in deltas:
            sent += 1
            at = first + (end - first) * sent // total
            yield at, {"type": "content_block_delta", "index": index, "delta": delta}
        yield at, {"type": "content_block_stop", "index": index}
    ending = {
        "stop_reason": message["stop_reason"],
        "stop_sequence": None,
        "stop_details": message["stop_details"],
        "container": None,
    }
    names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    cumulative = {name: usage[name] for name in (*names, "output_tokens")}
    if "output_tokens_details" in usage:
        cumulative["output_tokens_details"] = usage["output_tokens_details"]
    yield end, {"type": "message_delta", "delta": ending, "usage": cumulative}
    yield end, {"type": "message_stop"}


def _pieces(
    block: dict[str, Any], duration: int, blocks: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a block's empty start and the deltas that fill it."""
    steps = max(SSE_FEWEST_STEPS, min(SSE_MOST_STEPS, duration // SSE_STEP)) // blocks or 1
    if block["type"] == "text":
        deltas = [{"type": "text_delta", "text": part} for part in _parts(block["text"], steps)]
        return {"type": "text", "text": ""}, deltas
    if block["type"] == "thinking":
        deltas = [
            {"type": "thinking_delta", "thinking": part}
            for part in _parts(block["thinking"], steps)
        ]
        deltas.append({"type": "signature_delta", "signature": block["signature"]})
        return {"type": "thinking", "thinking": "", "signature": ""}, deltas
    if block["type"] == "tool_use":
        parts = _parts(encode(block["input"]), 2)
        return {**block, "input": {}}, [
            {"type": "input_json_delta", "partial_json": part} for part in ("", *parts)
        ]
    return block, []


def _parts(text: str, count: int) -> list[str]:
    size = max(1, -(-len(text) // count))
    return [text[index : index + size] for index in range(0, len(text), size)]


# -- serving --------------------------------------------------------------------------------


class _Connection(HttpToolsProtocol):
    """uvicorn's protocol, with the connection in reach of the application, which may cut it."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"] = {"transport": self.transport}


class _Server(uvicorn.Server):
    """uvicorn's server, which ends quietly on a signal and says when it listens."""

    def __init__(self, app: App, config: uvicorn.Config, listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._app = app
        self._listening = listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._working = asyncio.create_task(self._app.batches.work())
        self._listening()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._working.cancel()
        await super().shutdown(sockets=sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def bind(port: int) -> socket.socket:
    """Return a socket bound to the loopback interface, or raise `PortError`."""
    if not 0 <= port <= 65535:  # noqa: PLR2004
        raise PortError(f"port {port} is not valid; use --port with a number from 0 to 65535")
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((HOST, port))
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise PortError(f"port {port} is in use; use --port to choose another") from error
        raise PortError(f"port {port} cannot be used: {error.strerror}") from error
    return bound


def url_of(bound: socket.socket) -> str:
    """Return the address of a bound socket."""
    return f"http://{HOST}:{bound.getsockname()[1]}"


def serve(engine: Engine, bound: socket.socket, listening: Callable[[], None]) -> None:
    """Serve until SIGTERM or Ctrl-C; `listening` is called once requests are answered."""
    _run(_server(engine, listening), bound)


def _server(engine: Engine, listening: Callable[[], None]) -> _Server:
    app = App(engine)
    config = uvicorn.Config(
        app,
        http=_Connection,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=4096,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
    )
    return _Server(app, config, listening)


def _run(server: _Server, bound: socket.socket) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(server.serve(sockets=[bound]))
    bound.close()


@dataclass(frozen=True, slots=True)
class Running:
    """A simulator that is running inside this process."""

    url: str
    engine: Engine


@contextlib.contextmanager
def running(settings: Settings | None = None, port: int = 0) -> Iterator[Running]:
    """Run a simulator in a thread of this process while the `with` block runs."""
    bound = bind(port)
    engine = Engine(settings or Settings())
    ready = threading.Event()
    server = _server(engine, ready.set)
    thread = threading.Thread(
        target=_run, args=(server, bound), name="claude-simulator", daemon=True
    )
    thread.start()
    if not ready.wait(10):
        raise TimeoutError("the simulator did not start within 10 s")
    try:
        yield Running(url_of(bound), engine)
    finally:
        server.should_exit = True
        thread.join(10)


def fail(message: str) -> int:
    """Print one line on stderr and return exit status 1."""
    sys.stderr.write(f"claude_simulator: {message}\n")
    return 1
