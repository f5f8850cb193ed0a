"""Message Batches as the story's truth knows them: which were made, what they bill, and who was answered."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from sluice.domain.errors import ResultsInterrupted
from sluice.domain.pricing import Bill, Usage
from sluice.domain.retries import Failure
from sluice.ports.claude import Headers, Refused
from sluice.ports.upstream import (
    Access,
    Counts,
    Created,
    Listed,
    NotFound,
    NotSent,
    ResultRow,
    RowKind,
    Seen,
    Unknown,
    Unreachable,
)
from tests.fakes import MINUTE, SECOND
from tests.simulation.accounts import Home, cost_of
from tests.simulation.machines import Killed, Machine, Through
from tests.upstream_fakes import Message

if TYPE_CHECKING:
    from tests.simulation.world import World

REFUSALS: Final = {
    "spend": Failure("rate_limit_error", "spend", 429, error_code="enforced_spend_limit_reached"),
    "rate": Failure("rate_limit_error", "too many", 429, retry_after_ms=30_000),
    "key": Failure("authentication_error", "invalid x-api-key", 401),
}
ERRORS: Final = {
    "invalid": Failure("invalid_request_error", "no such tool", 400),
    "overloaded": Failure("overloaded_error", "overloaded", 529),
    "internal": Failure("api_error", "internal", 500),
}
UNREACHABLE: Final = Unreachable(Failure("api_error", "no", 503))
PIECE_ROWS: Final = 10
"""Results that are read between two moments at which a machine can die."""


@dataclass(frozen=True, slots=True)
class LaneFacts:
    """What is known of the batch lane before a story begins."""

    gather_ms: int = 2 * MINUTE
    full_requests: int = 30
    """The collector's limit; a body may have two more."""
    minutes: tuple[int, ...] = (7, 20)
    """How long a batch takes, one of these."""
    missing_ms: int = 0
    """A new batch is neither found nor listed for so long."""
    twins: bool = False
    """Another client makes batches of the same size at the same time."""
    errors: float = 0.0
    """The share of requests that err in their batch."""
    refusals: float = 0.0
    """The share of requests that Claude refuses to answer."""

    @property
    def most_requests(self) -> int:
        """No body may have more requests."""
        return self.full_requests + 2


@dataclass(slots=True)
class Request:
    """One request of a batch, and what becomes of it if it is finished."""

    custom_id: str
    name: str
    """The `custom_id` of its row."""
    model: str
    fate: str
    usage: Usage
    text: str

    @property
    def cost(self) -> int:
        """What Claude bills for it at half the price, in micro-dollars."""
        return 0 if self.fate in ERRORS else cost_of(self.model, self.usage, batch=True)

    def row(self) -> ResultRow:
        """Return its line of the results."""
        if self.fate in ERRORS:
            return ResultRow(self.custom_id, RowKind.ERRORED, failure=ERRORS[self.fate])
        message: dict[str, Any] = {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [{"type": "text", "text": self.text}],
            "stop_reason": self.fate,
            "usage": {
                "input_tokens": self.usage.input_tokens,
                "output_tokens": self.usage.output_tokens,
            },
        }
        body = json.dumps(message, separators=(",", ":")).encode()
        return ResultRow(
            self.custom_id, RowKind.SUCCEEDED, body, self.fate, Bill.of_message(message)
        )


@dataclass(slots=True)
class Made(Message):
    """A Message Batch that exists."""

    rows: list[Request] = field(default_factory=list)
    """Empty for a batch of another client."""
    home: Home | None = None
    access: Access | None = None
    reply: str = "created"
    """What its creator heard, or why it heard nothing."""
    asked_at: list[int] = field(default_factory=list)
    """When it was asked to be canceled."""
    reads: list[set[str]] = field(default_factory=list)
    """Of each reading that was not interrupted: the requests whose lines it had."""
    opened: int = 0
    """How often its results were opened."""

    @property
    def read(self) -> set[str]:
        """The requests whose lines were in the last reading that was not interrupted."""
        return self.reads[-1] if self.reads else set()

    @property
    def is_foreign(self) -> bool:
        return not self.rows

    @property
    def prefix(self) -> str:
        """What names the upstream batch in each of its requests."""
        return self.rows[0].custom_id.partition("-")[0]

    def done(self) -> list[Request]:
        """Return the requests that are finished at its end."""
        return [self.rows[number] for number in sorted(self.finished())]

    def billed(self) -> int:
        """Return what Claude bills for it."""
        return sum(each.cost for each in self.done())


class MessageBatches:
    """The truth. Each verb is one call of a machine; faults say what becomes of it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.made: dict[str, Made] = {}
        self.creates: Counter[str] = Counter()
        """How many creates were sent, by what became of them."""
        self.texts: dict[str, str] = {}
        """By the text of an answer: the name of the row that it answers."""
        self._numbers = 0

    def create(self, access: Access, text: bytes) -> Created | Refused | NotSent | Unknown:
        """Make a batch, unless a fault keeps it from being made."""
        fate = self._fate("create") or "created"
        self.creates[fate] += 1
        if fate == "not sent":
            return NotSent(Failure("connection_lost", "not sent"))
        home = self.world.home_of(access.key)
        headers = Headers(home.organization, workspace=home.workspace)
        if fate in REFUSALS:
            return Refused(REFUSALS[fate], headers)
        requests = json.loads(text)["requests"]
        lost = Unknown(Failure("connection_lost", "lost", may_be_billed=True))
        if self.world.facts.twins:
            self._twin(home, len(requests))
        if fate == "never arrived":
            return lost
        made = self._made(home, requests)
        made.access, made.reply = access, fate
        if fate == "killed":
            self._kill("create")
        return lost if fate == "lost reply" else Created(self._seen(made), headers)

    def get(self, access: Access, batch_id: str) -> Seen | NotFound | Refused | Unreachable:
        """Return the state of a batch."""
        if (answer := self._unheard("get", batch_id)) is not None:
            return answer
        made = self._visible(access, batch_id)
        return NotFound(Failure("not_found_error", "no", 404)) if made is None else self._seen(made)

    def cancel(self, access: Access, batch_id: str) -> Seen | NotFound | Refused | Unreachable:
        """Cancel a batch."""
        if (answer := self._unheard("cancel", batch_id)) is not None:
            return answer
        made = self._visible(access, batch_id)
        if made is None:
            return NotFound(Failure("not_found_error", "no", 404))
        if made.is_ended(self.world.time.now()):
            return Refused(Failure("invalid_request_error", "it has ended", 400))
        made.asked_at.append(self.world.time.now())
        made.canceled_at = made.canceled_at or self.world.time.now()
        self.world.note(f"{batch_id} is being canceled")
        return self._seen(made)

    def since(self, access: Access, moment: int) -> Listed | Refused | Unreachable:
        """Return the batches of the key's workspace."""
        if self._fate("list") is not None:
            return UNREACHABLE
        found = [
            self._seen(each)
            for each in self.made.values()
            if each.created_at >= moment and self._visible(access, each.id)
        ]
        return Listed(tuple(reversed(found)))

    def results(
        self, access: Access, batch_id: str
    ) -> tuple[list[ResultRow], bool] | NotFound | Refused | Unreachable:
        """Return the lines of a batch that has ended, and whether the connection breaks behind them."""
        if (answer := self._unheard("results", batch_id)) is not None:
            return answer
        made = self._visible(access, batch_id)
        if made is None or not made.is_ended(self.world.time.now()):
            return NotFound(Failure("not_found_error", "no results", 404))
        made.opened += 1
        if made.is_foreign:
            lines = [ResultRow(each["custom_id"], RowKind.EXPIRED) for each in made.requests]
            return lines, False
        finished = made.finished()
        other = RowKind.CANCELED if made.canceled_at is not None else RowKind.EXPIRED
        rows = [
            each.row() if number in finished else ResultRow(each.custom_id, other)
            for number, each in enumerate(made.rows)
        ]
        self.world.rng.shuffle(rows)
        fate = self._fate("lines")
        if fate is not None:
            rows = rows[: self.world.rng.randrange(len(rows))]
        return rows, fate == "interrupted"

    def was_read(self, batch_id: str, rows: Iterable[ResultRow]) -> None:
        """Take down which lines were read to the end."""
        self.made[batch_id].reads.append({each.custom_id or "" for each in rows})

    # What upstream does ------------------------------------------------------------------------------------------

    def _made(self, home: Home, requests: list[dict[str, Any]]) -> Made:
        world, facts = self.world, self.world.facts
        now = world.time.now()
        order = list(range(len(requests)))
        world.rng.shuffle(order)
        ends_at = now + world.rng.choice(facts.minutes) * MINUTE
        made = Made(f"msgbatch_{len(self.made)}", now, ends_at, requests, home.workspace, order)
        made.home = home
        made.rows = [self._request(each) for each in requests]
        self.made[made.id] = made
        minutes = (ends_at - now) // MINUTE
        world.note(f"{made.id} of {made.prefix} is made: {len(order)} requests, {minutes} minutes")
        return made

    def _request(self, asked: dict[str, Any]) -> Request:
        rng, facts = self.world.rng, self.world.facts
        name = asked["params"]["messages"][0]["content"]
        fate = "end_turn"
        if rng.random() < facts.errors:
            fate = rng.choice(sorted(ERRORS))
        elif rng.random() < facts.refusals:
            fate = "refusal"
        self._numbers += 1
        text = f"{name} by request {self._numbers}"
        self.texts[text] = name
        usage = Usage(input_tokens=rng.randrange(5, 50), output_tokens=rng.randrange(1, 100))
        return Request(asked["custom_id"], name, asked["params"]["model"], fate, usage, text)

    def _twin(self, home: Home, count: int) -> None:
        """Make a batch of another client, of the same size and time."""
        rng, now = self.world.rng, self.world.time.now()
        if rng.random() < 0.5:
            return
        items = [{"custom_id": f"row-{number}", "params": {}} for number in range(count)]
        ends_at = now + rng.choice(self.world.facts.minutes) * MINUTE
        made = Made(
            f"msgbatch_{len(self.made)}", now - rng.randrange(30 * SECOND), ends_at, items,
            home.workspace, list(range(count)), home=home,
        )  # fmt: skip
        self.made[made.id] = made
        self.world.note(f"{made.id} is another client's")

    def _visible(self, access: Access, batch_id: str) -> Made | None:
        made = self.made.get(batch_id)
        if made is None or made.home != self.world.home_of(access.key):
            return None
        is_new = self.world.time.now() - made.created_at < self.world.facts.missing_ms
        return None if is_new else made

    def _seen(self, made: Made) -> Seen:
        is_ended = made.is_ended(self.world.time.now())
        status = "ended" if is_ended else "canceling" if made.canceled_at else "in_progress"
        count, done = len(made.requests), len(made.finished())
        counts = Counts(succeeded=done, expired=count - done) if is_ended else Counts(count)
        return Seen(made.id, status, count, counts, made.created_at, has_results=is_ended)

    # Faults ------------------------------------------------------------------------------------------------------

    def _fate(self, verb: str, batch_id: str = "") -> str | None:
        """Return what the faults make of a call; a machine may die before it is made."""
        world, machine = self.world, self._machine
        if not world.strikes:
            return None
        for fault in world.faults:
            fate = fault.batches(world, verb, batch_id)
            if fate is None:
                continue
            fault.struck += 1
            machine.troubles.append(f"{verb}: {fate}")
            world.record(machine, f"FAULT Message Batches, {verb}: {fate}")
            if fate == "dead":
                self._kill(verb)
            return fate
        return None

    def _unheard(self, verb: str, batch_id: str) -> Unreachable | Refused | NotFound | None:
        fate = self._fate(verb, batch_id)
        if fate == "missing":
            return NotFound(Failure("not_found_error", "flickers", 404))
        return None if fate is None else UNREACHABLE

    def _kill(self, verb: str) -> None:
        self._machine.kill(f"killed at {verb} of Message Batches")
        raise Killed(self._machine.name)

    @property
    def _machine(self) -> Machine:
        machine = self.world.writer
        assert machine is not None
        return machine


class Client:
    """Message Batches as the upstream function sees them: it reads bodies and results piece by piece."""

    def __init__(self, upstream: MessageBatches) -> None:
        self._upstream: Any = Through(upstream)
        self._truth = upstream

    def create(
        self, access: Access, body: Iterable[bytes], length: int
    ) -> Created | Refused | NotSent | Unknown:
        text = b"".join(body)
        assert len(text) == length
        answer: Created | Refused | NotSent | Unknown = self._upstream.create(access, text)
        return answer

    def get(self, access: Access, batch_id: str) -> Any:
        return self._upstream.get(access, batch_id)

    def cancel(self, access: Access, batch_id: str) -> Any:
        return self._upstream.cancel(access, batch_id)

    def since(self, access: Access, moment: int) -> Any:
        return self._upstream.since(access, moment)

    def results(self, access: Access, batch_id: str) -> Any:
        found = self._upstream.results(access, batch_id)
        if not isinstance(found, tuple):
            return found
        rows, breaks = found
        return _Rows(self._truth, batch_id, rows, breaks=breaks)


class _Rows:
    """Results while they are read."""

    def __init__(
        self, truth: MessageBatches, batch_id: str, rows: list[ResultRow], *, breaks: bool
    ) -> None:
        self._truth = truth
        self._id = batch_id
        self._rows = rows
        self._breaks = breaks

    def __iter__(self) -> Iterator[ResultRow]:
        pause: Any = Through(self)
        for at in range(0, len(self._rows), PIECE_ROWS):
            pause.piece()
            yield from self._rows[at : at + PIECE_ROWS]
        if self._breaks:
            raise ResultsInterrupted(self._id, len(self._rows), "lost")
        self._truth.was_read(self._id, self._rows)

    def piece(self) -> None:
        """Let time pass."""

    def close(self) -> None:
        pass
