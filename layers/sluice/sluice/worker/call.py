"""One upstream call, and the heartbeat that keeps its job's lease meanwhile."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

from sluice.domain import jobs as life
from sluice.domain import waits
from sluice.domain.errors import StoreBusy
from sluice.domain.jobs import Job
from sluice.domain.keys import UpstreamKey
from sluice.domain.pricing import utc_day
from sluice.domain.retries import INTERNAL, Failure
from sluice.ports.claude import Answer, Body, CallRequest, Headers, Refused
from sluice.ports.swap import swap
from sluice.worker.invocation import Invocation
from sluice.worker.limit_books import Admission
from sluice.worker.memory import Grant

OTHER_MODELS: Final = "other"
"""Model group, in metrics, of models without a price: callers must not be able to create values of a dimension."""


class Call:
    """One upstream call of a claimed job. Its heartbeat renews the lease, and sees a cancel."""

    def __init__(
        self, invocation: Invocation, job: Job, admission: Admission, key: UpstreamKey
    ) -> None:
        self.invocation = invocation
        self.claimed = job
        """The record as it was claimed."""
        self.job = job
        """The record as last seen."""
        self.admission = admission
        self.key = key
        price = invocation.rules.prices.price(job.current_model, utc_day(invocation.now()))
        self.metric_group = OTHER_MODELS if price is None else admission.claimant.model_group
        self.is_canceled = False
        self._tools = invocation.tools
        self._renewed_at = invocation.now()

    async def make(self, body: Body, grant: Grant) -> Answer | Refused:
        """Make the call. It ends early if the job is canceled or its lease is lost."""
        events, group = self._tools.events, self.metric_group
        started = self.invocation.now()
        call = asyncio.ensure_future(self._tools.claude.send(self._request(body, grant)))
        watch = asyncio.ensure_future(self._watch())
        try:
            await asyncio.wait({call, watch}, return_when=asyncio.FIRST_COMPLETED)
            stopped = Failure("canceled", "stopped during the call", may_be_billed=True)
            answer = self._result(call) if call.done() else Refused(stopped)
        finally:
            for task in (call, watch):
                task.cancel()
            await asyncio.gather(call, watch, return_exceptions=True)
            body.release()
        events.count("UpstreamCalls")
        events.count("Calls", 1, group)
        events.count("CallSeconds", (self.invocation.now() - started) / 1000, group)
        return answer

    def _result(self, call: asyncio.Future[Answer | Refused]) -> Answer | Refused:
        """Return the answer; an error in the gateway is an attempt of this job, not the death of its worker."""
        try:
            return call.result()
        except Exception as error:  # noqa: BLE001 - whatever it was, the claim must be closed
            self._tools.events.problem("call failed in the gateway", job_id=self.job.job_id)
            reason = f"the call failed in the gateway ({type(error).__name__})"
            return Refused(Failure(INTERNAL, reason, may_be_billed=True))

    def _request(self, body: Body, grant: Grant) -> CallRequest:
        invocation, job = self.invocation, self.job
        # The last seconds of the invocation are kept to write the outcome.
        window = max(1_000, invocation.left())
        return CallRequest(
            key=self.key,
            model=job.current_model,
            body=body,
            names_model=job.fallbacks_used == 0,
            anthropic_version=job.anthropic_version,
            anthropic_beta=job.anthropic_beta,
            max_tokens=job.max_tokens,
            window_ms=window,
            full_window=window * 10 >= invocation.whole_ms * 9,
            early=not invocation.limiter.knows(self.admission),
            on_headers=self._heard,
            room=grant.grow,
        )

    def _heard(self, headers: Headers) -> None:
        """Use headers that arrived before their answer."""
        limiter = self.invocation.limiter
        limiter.heard(self.admission, headers, served=False)
        organization = self.invocation.keys.other_organization(
            self.key, self.admission.claimant, headers
        )
        if organization is not None:
            limiter.belongs(self.admission, organization, headers)

    # Heartbeat --------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Renew the lease; return when the job was canceled or another worker has it.

        A busy store stops no call, which may be billed: until the store is back nobody else can take the lease either.
        """
        while True:
            await self._tools.clock.sleep(waits.CANCEL_CHECK_MS)
            with suppress(StoreBusy):
                current = await self._tools.blocking(self._tools.jobs.get, self.job.job_id)
                if current is None or current.lease is None:
                    return
                if current.lease.owner != self.invocation.owner:
                    return
                self.job = current
                if current.cancel_requested:
                    self.is_canceled = True
                    return
                await self.renew_if_due()

    async def renew_if_due(self) -> None:
        """Extend the lease unless this was done recently; raises LeaseLost or StoreBusy."""
        now = self._tools.clock.now()
        if now - self._renewed_at < waits.RENEW_MS - waits.CANCEL_CHECK_MS:
            return
        kept = life.renew(self.job, self.invocation.owner, now + waits.LEASE_MS)
        stored = await self._tools.blocking(swap, self._tools.jobs.replace, kept, self.job.version)
        if stored is kept:
            self._renewed_at = now
        # After a concurrent change the next check decides.
        self.job = stored or self.job
