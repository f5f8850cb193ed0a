"""The Message Batches endpoints, and the work behind them: what is due is done bit by bit."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from scripts.claude_simulator.accounts import Caller, Refused
from scripts.claude_simulator.batches import Batch, read_items
from scripts.claude_simulator.checks import MAX_BATCH_BYTES, RequestError, parse
from scripts.claude_simulator.engine import Engine
from scripts.claude_simulator.exchange import Exchange, Handler, encode, is_loopback, not_found
from scripts.claude_simulator.faults import FAILURES, Place
from scripts.claude_simulator.limits import SECOND

PATH: Final = "/v1/messages/batches"
# So much is done before other calls get their turn: a few milliseconds.
ITEMS_AT_ONCE: Final = 50
READ_AT_ONCE: Final = 500
LOOK_AGAIN_SECONDS: Final = 0.02
MOST_SECONDS: Final = 100 * 365 * 24 * 3600
JSONL_TYPE: Final = (b"content-type", b"application/x-jsonl")

Doing = Callable[[Exchange, Caller], Awaitable[None]]


class BatchApi:
    """The handlers of every batch endpoint."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._wake = asyncio.Event()

    def routes(self) -> dict[tuple[str, str], Handler]:
        """Return what serves which path."""
        return {
            ("POST", PATH): self._called(self.create),
            ("GET", PATH): self._called(self.list_batches),
            ("GET", f"{PATH}/{{id}}"): self._called(self.retrieve),
            ("DELETE", f"{PATH}/{{id}}"): self._called(self.delete),
            ("POST", f"{PATH}/{{id}}/cancel"): self._called(self.cancel),
            ("GET", f"{PATH}/{{id}}/results"): self._called(self.results),
            ("POST", "/_simulator/batch_clock"): self.move_clock,
        }

    def most_bytes_of(self, path: str) -> int | None:
        """Return how large a body may be for a path, None for what is usual."""
        return MAX_BATCH_BYTES if path == PATH else None

    async def work(self) -> None:
        """Process batches indefinitely, a few requests at a time."""
        while True:
            if self.engine.advance_batches(ITEMS_AT_ONCE):
                await asyncio.sleep(0)
            elif self.engine.batches.is_idle():
                self._wake.clear()
                await self._wake.wait()
            else:
                await asyncio.sleep(LOOK_AGAIN_SECONDS)

    def _called(self, do: Doing) -> Handler:
        """Return a handler that admits the caller first, and turns what is wrong into an answer."""

        async def handle(exchange: Exchange) -> None:
            engine = self.engine
            caller = engine.authenticate(exchange.key, exchange.version)
            if isinstance(caller, Refused):
                await exchange.refuse(caller)
                return
            refused = engine.batch_call(caller)
            if refused is not None:
                await exchange.refuse(refused)
                return
            try:
                await do(exchange, caller)
            except RequestError as error:
                outcome = f"invalid:{error.failure.status}"
                await exchange.refuse(engine.refuse_batch_call(caller, error.failure, outcome))

        return handle

    async def create(self, exchange: Exchange, caller: Caller) -> None:
        """POST /v1/messages/batches: begin a batch; the params of its requests are read later."""
        engine = self.engine
        name = engine.batches.create_fault(engine.settings)
        place = None if name is None else FAILURES[name].place
        if name is not None and place is not Place.DROP_AFTER:
            await exchange.refuse(engine.refuse_batch_call(caller, FAILURES[name], name))
            return
        items = []
        for item in read_items(exchange.take_body()):
            items.append(item)
            if len(items) % READ_AT_ONCE == 0:
                await asyncio.sleep(0)
        batch = engine.create_batch(caller, items, exchange.header(b"anthropic-beta"))
        if isinstance(batch, Refused):
            await exchange.refuse(batch)
            return
        self._wake.set()
        if place is Place.DROP_AFTER:
            exchange.transport.abort()
            return
        await exchange.reply(200, self._shown(exchange, batch), caller.headers)

    async def retrieve(self, exchange: Exchange, caller: Caller) -> None:
        """GET /v1/messages/batches/{id}: how far a batch is."""
        batch = self.engine.batches.read(caller, exchange.id, self.engine.settings)
        await exchange.reply(200, self._shown(exchange, batch), caller.headers)

    async def list_batches(self, exchange: Exchange, caller: Caller) -> None:
        """GET /v1/messages/batches: a page of the workspace's batches, newest first."""
        page, more = self.engine.batches.page(caller, exchange.query())
        answer = {
            "data": [self._shown(exchange, batch) for batch in page],
            "has_more": more,
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
        }
        await exchange.reply(200, answer, caller.headers)

    async def cancel(self, exchange: Exchange, caller: Caller) -> None:
        """POST /v1/messages/batches/{id}/cancel: begin no more of its requests."""
        batch = self.engine.batches.find(caller, exchange.id)
        self.engine.batches.cancel(batch)
        await exchange.reply(200, self._shown(exchange, batch), caller.headers)

    async def delete(self, exchange: Exchange, caller: Caller) -> None:
        """DELETE /v1/messages/batches/{id}: forget an ended batch."""
        batch = self.engine.batches.find(caller, exchange.id)
        self.engine.batches.delete(caller, batch)
        answer = {"id": batch.id, "type": "message_batch_deleted"}
        await exchange.reply(200, answer, caller.headers)

    async def results(self, exchange: Exchange, caller: Caller) -> None:
        """GET /v1/messages/batches/{id}/results: a JSON line for each request of an ended batch."""
        engine = self.engine
        batch = engine.batches.read(caller, exchange.id, engine.settings)
        items = engine.batches.results(batch)
        await exchange.start(200, [*caller.headers, JSONL_TYPE])
        for start in range(0, len(items), ITEMS_AT_ONCE):
            part = items[start : start + ITEMS_AT_ONCE]
            lines = "".join(f"{encode(engine.result(item))}\n" for item in part)
            await exchange.write(lines.encode(), more=True)
            if exchange.transport.is_closing():
                return
            engine.delivered(batch, part)
            await asyncio.sleep(0)
        await exchange.write(b"")

    def _shown(self, exchange: Exchange, batch: Batch) -> dict[str, Any]:
        url = f"{PATH}/{batch.id}/results"
        if self.engine.settings.batches.results_url == "absolute":
            url = f"http://{exchange.header(b'host')}{url}"
        return batch.as_json(self.engine.batches.now(), url)

    async def move_clock(self, exchange: Exchange) -> None:
        """POST /_simulator/batch_clock: set the clock of all batches ahead by some seconds."""
        if not is_loopback(exchange):
            await exchange.refuse(not_found(exchange.scope["path"]))
            return
        try:
            seconds = _seconds(parse(exchange.body))
        except RequestError as error:
            await exchange.refuse(Refused(error.failure, []))
            return
        self.engine.batches.move_clock(round(seconds * SECOND))
        self._wake.set()
        await exchange.reply(200, self.engine.batches.clock_stats(), [])


def _seconds(asked: dict[str, Any]) -> float:
    seconds: Any = asked.get("advance_seconds")
    is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if is_number and len(asked) == 1 and 0 <= seconds <= MOST_SECONDS:
        return float(seconds)
    raise RequestError('batch_clock: {"advance_seconds": a number from 0 to a hundred years}')
