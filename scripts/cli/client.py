"""A Python client for Sluice's HTTP API: retries idempotent calls, raises typed errors."""

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, Self
from urllib.parse import quote, urlencode

import httpx

from scripts.cli.errors import CommandFailed, GatewayRefused, GatewayUnreachable, NotConfigured

Json = dict[str, Any]

MAX_IDS_PER_LOOK = 100
FINAL_STATES = frozenset({"succeeded", "errored", "canceled", "expired"})

TOO_MANY_REQUESTS = 429
UNAUTHORIZED = 401
# Every call of this client is idempotent: reads, cancels, and submits with an
# Idempotency-Key. So it is retried after a lost response and after these statuses.
RESENT_STATUSES = frozenset({429, 500, 502, 503, 504})

# API Gateway times out an integration after 30 s, so a longer wait is pointless.
ANSWER_TIMEOUT_SECONDS = 35.0
# Before the first response, the URL is probably wrong, so fail quickly.
FIRST_ANSWER_PATIENCE_SECONDS = 1.5
PATIENCE_SECONDS = 60.0
# 429 and 503 ask the client to retry later; they are not failures.
BUSY_PATIENCE_SECONDS = 300.0
LONGEST_BACKOFF_SECONDS = 10.0
WORTH_SAYING_SECONDS = 2.0

# A list may be accepted while some of its jobs are rejected for a transient reason (a store is busy).
PASSING_ERRORS = frozenset({"api_error", "overloaded_error", "rate_limit_error", "timeout_error"})
PASSING_REJECTION_RESENDS = 5


def _ignore(_: str) -> None:
    """Ignore the message."""


class Gateway:
    """A gateway and one client key. Threads may share it."""

    def __init__(  # noqa: PLR0913 - the last four are the outside world
        self,
        url: str | None,
        key: str | None,
        *,
        on_wait: Callable[[str], None] = _ignore,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.url = _checked_url(url)
        self.on_wait = on_wait
        self._sleep = sleep
        self._clock = clock
        self._jitter = jitter
        self._has_answered = False
        self._http = httpx.Client(
            base_url=self.url,
            headers={"x-api-key": _checked_key(key), "accept": "application/json"},
            timeout=httpx.Timeout(ANSWER_TIMEOUT_SECONDS, connect=5.0),
        )

    def __enter__(self) -> Self:
        """Keep the connections open until the block ends."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self._http.close()

    def submit(self, body: bytes, idempotency_key: str) -> list[Json]:
        """Create the jobs of a list, once per idempotency key; return the outcome of each."""
        headers = {"content-type": "application/json", "idempotency-key": idempotency_key}
        for resend in range(PASSING_REJECTION_RESENDS + 1):
            entries = self._rows(self._call("POST", "/jobs", content=body, headers=headers))
            passing = any(_is_passing(entry) for entry in entries)
            if not passing or resend == PASSING_REJECTION_RESENDS:
                break
            # Resend the whole list: a job is identified by its position in it.
            self._sleep(self._backoff_seconds(resend + 2))
        return entries

    def submit_batch(self, body: bytes, headers: Mapping[str, str]) -> Json:
        """Create a batch from a list of jobs, once per Idempotency-Key in the headers; return it."""
        headers = {"content-type": "application/json", **headers}
        return self._call("POST", "/jobs", content=body, headers=headers)

    def job(self, job_id: str) -> Json:
        """Return a job with its attempts and its answer."""
        return self._call("GET", f"/jobs/{_quoted(job_id)}")

    def look(self, job_ids: Sequence[str]) -> list[Json]:
        """Return the summaries of up to 100 jobs; unknown jobs are omitted."""
        return self._rows(self._call("GET", "/jobs", query={"ids": ",".join(job_ids)}))

    def newest(self, state: str | None = None, page_size: int = 100) -> Iterator[Json]:
        """Yield the summaries of all jobs, newest first, in pages of up to 100."""
        query: dict[str, str] = {"limit": str(min(100, page_size))}
        if state:
            query["state"] = state
        return self._pages("/jobs", query)

    def _pages(self, path: str, query: dict[str, str]) -> Iterator[Json]:
        while True:
            page = self._call("GET", path, query=query)
            yield from self._rows(page)
            if not page.get("has_more") or not page.get("next_page"):
                return
            query["page"] = str(page["next_page"])

    def cancel(self, job_id: str) -> Json:
        """Cancel a job: guaranteed before the upstream call, best effort during it."""
        return self._call("DELETE", f"/jobs/{_quoted(job_id)}")

    def batch(self, batch_id: str) -> Json:
        """Return a batch with its progress."""
        return self._call("GET", f"/batches/{_quoted(batch_id)}")

    def newest_batches(self, page_size: int = 100) -> Iterator[Json]:
        """Yield all batches, newest first, in pages of up to 100."""
        return self._pages("/batches", {"limit": str(min(100, page_size))})

    def batch_links(self, batch_id: str) -> Json:
        """Return presigned URLs of the files of an ended batch."""
        return self._call("GET", f"/batches/{_quoted(batch_id)}/links")

    def cancel_batch(self, batch_id: str) -> Json:
        """Cancel a batch."""
        return self._call("POST", f"/v1/messages/batches/{_quoted(batch_id)}/cancel")

    def begin_upload(self, name: str, size: int, options: Mapping[str, object]) -> Json:
        """Start an upload; a repeated call starts another one, which is never completed."""
        return self._send("/uploads", {"name": name, "bytes": size, "options": options})

    def part_links(self, upload_id: str, name: str, first: int, last: int) -> Mapping[int, str]:
        """Return presigned URLs for some parts of an upload."""
        asked = {"id": upload_id, "name": name, "first": first, "last": last}
        links = self._send("/uploads/parts", asked)["links"]
        return {each["part"]: each["url"] for each in links}

    def complete_upload(self, upload_id: str, name: str, etags: Mapping[int, str]) -> Json:
        """Complete an upload; return its batch."""
        parts = [{"part": part, "etag": etag} for part, etag in sorted(etags.items())]
        return self._send("/uploads/complete", {"id": upload_id, "name": name, "parts": parts})

    def abort_upload(self, upload_id: str, name: str) -> None:
        """Abort an upload."""
        self._call("DELETE", "/uploads", query={"id": upload_id, "name": name})

    def usage(self, query: Mapping[str, str]) -> Json:
        """Return tokens and cost, grouped."""
        return self._call("GET", "/usage", query=query)

    def limits(self) -> list[Json]:
        """Return all limit groups."""
        return self._rows(self._call("GET", "/limits"))

    def webhook_secret(self) -> str:
        """Return the signing secret of this tenant's webhooks."""
        return str(self._call("GET", "/webhooks/secret")["secret"])

    def _send(self, path: str, body: object) -> Json:
        headers = {"content-type": "application/json"}
        return self._call("POST", path, content=json.dumps(body).encode(), headers=headers)

    def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Json:
        if query:
            path = f"{path}?{urlencode(query, errors='surrogatepass')}"
        started = self._clock()
        failure: CommandFailed
        for resend in count():
            try:
                response = self._http.request(method, path, content=content, headers=headers)
            except httpx.TransportError as error:
                failure = GatewayUnreachable(self.url, str(error) or type(error).__name__)
                patience = PATIENCE_SECONDS if self._has_answered else FIRST_ANSWER_PATIENCE_SECONDS
                pause = self._backoff_seconds(resend)
            else:
                self._has_answered = True
                if response.is_success:
                    return self._decoded(response)
                failure = self._refusal(response)
                if response.status_code not in RESENT_STATUSES:
                    raise failure
                busy = response.status_code in {429, 503}
                patience = BUSY_PATIENCE_SECONDS if busy else PATIENCE_SECONDS
                named = _retry_after_seconds(response)
                pause = self._backoff_seconds(resend) if named is None else named
            if self._clock() - started + pause > patience:
                raise failure
            if pause >= WORTH_SAYING_SECONDS:
                self.on_wait(f"{failure}; retrying in {pause:.0f} s")
            self._sleep(pause)
        raise AssertionError  # pragma: no cover (count() has no end)

    def _backoff_seconds(self, resend: int) -> float:
        """Return the backoff: 0.2 s, doubled each time up to 10 s, half of it random."""
        longest = min(LONGEST_BACKOFF_SECONDS, 0.2 * 2.0 ** min(resend, 10))
        return longest * (0.5 + self._jitter() / 2)

    def _decoded(self, response: httpx.Response) -> Json:
        try:
            body = response.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise NotConfigured(self._not_sluice(response.status_code))
        return body

    def _rows(self, body: Json) -> list[Json]:
        rows = body.get("data")
        if not isinstance(rows, list):
            raise NotConfigured(self._not_sluice(httpx.codes.OK))
        return rows

    def _refusal(self, response: httpx.Response) -> CommandFailed:
        """Return the error that a response means, whether Sluice or API Gateway wrote it."""
        status = response.status_code
        try:
            body = response.json()
        except ValueError:
            body = None
        body = body if isinstance(body, dict) else {}
        error = body.get("error")
        if not isinstance(error, dict):
            # Not Sluice's format: the response is from API Gateway, or not from Sluice at all.
            if status in RESENT_STATUSES or status == httpx.codes.REQUEST_ENTITY_TOO_LARGE:
                message = str(body.get("message") or response.reason_phrase)
                request_id = response.headers.get("apigw-requestid")
                kind = "rate_limit_error" if status == TOO_MANY_REQUESTS else "api_error"
                return GatewayRefused(status, kind, message, request_id)
            return NotConfigured(self._not_sluice(status))
        refused = GatewayRefused(
            status,
            str(error.get("type", "api_error")),
            str(error.get("message", "no message")),
            body.get("request_id") or response.headers.get("request-id"),
            body.get("data"),
        )
        if status == UNAUTHORIZED:
            return NotConfigured(
                f"{self.url} rejected this client key: set SLUICE_KEY or --key ({refused})"
            )
        return refused

    def _not_sluice(self, status: int) -> str:
        return (
            f"{self.url} is not a Sluice gateway (HTTP {status}): "
            "set SLUICE_URL or --url to the stack's ApiUrl"
        )


def _checked_url(url: str | None) -> str:
    if not url:
        raise NotConfigured(
            "no gateway URL: set SLUICE_URL or --url "
            "(`sluice setup` and `sluice local up` print it)"
        )
    try:
        parts = httpx.URL(url)
    except (httpx.InvalidURL, UnicodeError):
        parts = httpx.URL("")
    if parts.scheme not in {"http", "https"} or not parts.host:
        raise NotConfigured(
            f'"{url}" is not a valid gateway URL: set SLUICE_URL or --url to https://...'
        )
    return url.rstrip("/")


def _checked_key(key: str | None) -> str:
    if not key:
        raise NotConfigured(
            "no client key: set SLUICE_KEY or --key "
            "(`sluice setup` and `sluice keys create` create one)"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise NotConfigured("the client key contains invalid characters: set SLUICE_KEY again")
    return key


def _quoted(name: str) -> str:
    """Return a name for a path, also one from a command line that is not valid UTF-8."""
    return quote(name, safe="", errors="surrogatepass")


def _is_passing(entry: Json) -> bool:
    return entry["status"] == "rejected" and entry["error"]["type"] in PASSING_ERRORS


def _retry_after_seconds(response: httpx.Response) -> float | None:
    """Return the seconds of retry-after, or None (Sluice does not use the date form)."""
    named = response.headers.get("retry-after", "")
    return float(named) if named.isdigit() else None
