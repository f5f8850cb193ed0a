"""Ended jobs as JSON Lines, in the format of Anthropic's batch results."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from scripts.cli import terminal
from scripts.cli.client import FINAL_STATES, Gateway, Json
from scripts.cli.errors import GatewayRefused

FETCHES_IN_FLIGHT = 8


def batch_result(job: Json) -> Json:
    """Return an ended job as a row of batch results, with the job's ID added."""
    state = job["state"]
    result: Json = {"type": state}
    if state == "succeeded":
        result["message"] = job["message"]
    elif state == "errored":
        error = job.get("error") or {"type": "api_error", "message": "no reason was recorded"}
        attempts = job.get("attempts") or []
        result["error"] = {
            "type": "error",
            "error": {"type": error["type"], "message": error["message"]},
            "request_id": attempts[-1].get("request_id") if attempts else None,
        }
    return {"custom_id": job.get("custom_id"), "id": job["id"], "result": result}


def line_of(job: Json) -> bytes:
    """Return an ended job as one line of JSON Lines."""
    return terminal.as_json(batch_result(job)).encode() + b"\n"


def fetch(
    gateway: Gateway,
    job_ids: Iterable[str],
    on_missing: Callable[[str, str], None],
) -> Iterator[Json]:
    """Yield each ended job in full, in the order of `job_ids`, with several requests in flight.

    A job that is unknown or has not ended is passed to `on_missing` with the reason.
    """
    names = iter(job_ids)
    with ThreadPoolExecutor(FETCHES_IN_FLIGHT) as pool:

        def ask(count: int) -> Iterator[tuple[str, Future[Json]]]:
            return ((name, pool.submit(gateway.job, name)) for name in islice(names, count))

        # Twice as many as there are threads, so that a slow first request does not idle the others.
        in_flight = deque(ask(2 * FETCHES_IN_FLIGHT))
        while in_flight:
            job_id, future = in_flight.popleft()
            in_flight.extend(ask(1))
            try:
                job = future.result()
            except GatewayRefused as refused:
                if refused.error_type != "not_found_error":
                    raise
                on_missing(job_id, "job not found")
                continue
            if job["state"] in FINAL_STATES:
                yield job
            else:
                on_missing(job_id, f"not ended: {job['state']}")
