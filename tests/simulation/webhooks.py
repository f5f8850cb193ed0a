"""The end of jobs and batches as their callers hear of it: stream, bus, webhooks queue, and the callers' servers."""

from __future__ import annotations

import asyncio
import hmac
import json
from base64 import b64decode, b64encode
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from sluice.domain.jobs import SCHEMA_VERSION, Job, Party
from sluice.notices.deliver import Deliver
from sluice.notices.publish import Publish
from sluice.ports.world import Notice, Reply
from tests.bulk_fakes import MemoryNotices
from tests.fakes import MemoryQueue
from tests.simulation.checks import Check
from tests.simulation.machines import Machine, Through

if TYPE_CHECKING:
    from tests.simulation.world import World

MASTER: Final = "whsec_bWFzdGVyIG9mIHRoZSBzdG9yeQ=="
ADDRESS: Final = "93.184.216.34"
FUNCTION_MS: Final = 60_000
STREAM_RETRY_MS: Final = 2_000


class StoryNotices(MemoryNotices):
    """The event bus, and the webhooks queue behind it."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__()
        self._outbox = outbox

    def publish(self, notices: Sequence[Notice]) -> None:
        super().publish(notices)
        for each in notices:
            if each.webhook is not None:
                self._outbox.post(each)


class Servers:
    """Callers' servers. Some fail for a while; each accepted delivery is recorded."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.accepted: dict[str, list[tuple[Mapping[str, str], str]]] = defaultdict(list)
        """By URL: headers and body of every delivery that was accepted."""

    async def addresses(self, host: str, port: int) -> Sequence[str]:
        del port
        return () if host.startswith("nowhere") else (ADDRESS,)

    async def post(self, url: str, address: str, headers: Mapping[str, str], body: str) -> Reply:
        del address
        world = self._world
        await asyncio.sleep(world.rng.choice((0.05, 0.2, 3)))
        if world.strikes and world.rng.random() < 0.3:
            return world.rng.choice((Reply(500), Reply(503, 20), Reply(problem="timed out")))
        self.accepted[url].append((headers, body))
        return Reply(204)


class Outbox:
    """Everything behind the end of a job."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.notices = StoryNotices(self)
        self.queue = MemoryQueue(world.time.now)
        self.queue.name = "the webhooks queue"
        self.servers = Servers(world)
        self._publishing = False
        self._stirred = asyncio.Event()
        self._stream: list[Job] = []
        self.wanted: dict[str, str] = {}
        """By id: every end that is to be notified, and the URL."""

    @property
    def is_empty(self) -> bool:
        """Whether everything was published and delivered."""
        return not self._stream and self.queue.next_visible() is None

    def ended(self, job: Job) -> None:
        """Take a job that has ended from the stream of the jobs table."""
        self.wanted[f"{job.job_id}-{job.version}"] = job.webhook or ""
        self._stream.append(job)
        if not self._publishing:
            self._publishing = True
            self.world.begin(self._publish())

    def post(self, notice: Notice) -> None:
        """Put a webhook on its queue, in the form that the adapter gives it."""
        body = json.dumps({"type": notice.kind, "data": notice.facts}, default=str)
        message = {
            "v": SCHEMA_VERSION, "webhook": notice.id, "tenant": notice.tenant,
            "url": notice.webhook, "body": body,
        }  # fmt: skip
        self.queue.post(body=json.dumps(message))
        self._stirred.set()

    async def _publish(self) -> None:
        while self._stream:
            some = list(self._stream)

            def publish(_: Machine, jobs: Sequence[Job] = some) -> int:
                return Publish(Through(self.notices), self.world.events)(jobs)

            count = await self.world.function("job-ends", Party.OPERATOR, publish)
            del self._stream[: count or 0]
            if self._stream:
                await asyncio.sleep(STREAM_RETRY_MS / 1000)
        self._publishing = False

    async def poll(self) -> None:
        """Hand visible webhooks to the function that delivers them."""
        while True:
            self._stirred.clear()
            messages = self.queue.deliver(10, 6 * FUNCTION_MS)
            if messages:
                machine = self.world.machine("webhooks", Party.OPERATOR)
                deliver = Deliver(
                    self.servers, lambda: (MASTER,), self.queue, (), machine, self.world.events
                )
                task = machine.spawn(deliver(messages), machine.name)
                await asyncio.wait({task}, timeout=FUNCTION_MS / 1000)
                later = task.result()
                self.queue.delete([each for each in messages if each.message_id not in later])
                continue
            due = self.queue.next_visible()
            pause = None if due is None else max(1, due - self.world.time.now()) / 1000
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stirred.wait(), pause)


class EndsAreNotified(Check):
    """Every requested webhook is delivered, to its own URL and signed for its tenant."""

    name = "ends are notified"

    def ended(self, world: World) -> None:
        outbox = world.outbox
        heard = {
            (headers["webhook-id"], url)
            for url, deliveries in outbox.servers.accepted.items()
            for headers, _ in deliveries
        }
        wanted = set(outbox.wanted.items())
        for name, _ in sorted(wanted - heard):
            world.fail(self.name, f"no notification of {name}")
        for name, url in sorted(heard - wanted):
            world.fail(self.name, f"{url} was notified of {name}")
        for url, deliveries in outbox.servers.accepted.items():
            for headers, body in deliveries:
                tenant = url.removeprefix("https://").partition(".")[0]
                if _signature(headers, body, tenant) not in headers["webhook-signature"].split():
                    world.fail(self.name, f"{url}: not signed for {tenant}")


def _signature(headers: Mapping[str, str], body: str, tenant: str) -> str:
    """Return the signature of Standard Webhooks, by a calculation of its own."""
    secret = b64encode(
        hmac.digest(MASTER.encode(), f"webhooks of {tenant}".encode(), "sha256")
    ).decode()
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.{body}"
    return f"v1,{b64encode(hmac.digest(b64decode(secret), signed.encode(), 'sha256')).decode()}"
