"""Reads the stored requests of jobs that start in the same moment together."""

from __future__ import annotations

import asyncio

from sluice.ports.claude import Body
from sluice.ports.jobs import Params
from sluice.worker.memory import Grant
from sluice.worker.tools import Tools


class RequestReader:
    """One invocation's."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._wanted: dict[str, asyncio.Future[Params | None]] = {}

    async def read(self, job_id: str, grant: Grant) -> Body | None:
        """Return the request, None when it is missing. Its memory is given back when it is sent."""
        first = not self._wanted
        wanted = self._wanted.setdefault(job_id, asyncio.get_running_loop().create_future())
        if first:
            await self._tools.clock.sleep(0)
            await self._read_wanted()
        params = await wanted
        return None if params is None else Body(params.body, grant.sent)

    async def _read_wanted(self) -> None:
        wanted, self._wanted = self._wanted, {}
        try:
            found = await self._tools.blocking(self._tools.params.get_many, list(wanted))
        except Exception as error:  # noqa: BLE001 - raised in each that waits
            for future in wanted.values():
                future.set_exception(error)
        else:
            for job_id, future in wanted.items():
                future.set_result(found.get(job_id))
