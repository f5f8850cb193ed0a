"""All errors that Sluice raises.

::

    SluiceError
    ├── InvalidRequest       the request is invalid
    ├── Unauthenticated      the client key is missing or unknown
    ├── JobNotFound          the job does not exist for this tenant
    ├── BatchNotFound        the batch does not exist for this tenant
    ├── Conflict             the custom_id or Idempotency-Key was already used for a different request
    ├── RequestTooLarge      the body exceeds the size limit
    ├── Throttled            the client key sends too many requests; retry later
    ├── StoreBusy            a store or queue did not accept the write; retry later
    ├── NotStorable          a record that cannot be written, however often it is tried
    ├── Unexpected           an unexpected exception; the log has the traceback
    ├── Stale                optimistic lock failure: the record changed (carries its current value)
    ├── IllegalTransition    a change of state that the state machine does not allow
    ├── LeaseLost            this worker no longer holds the lease on the job or range
    ├── RangeBusy            another worker holds the lease on the range
    ├── UpstreamBatchBusy    another invocation holds the lease on the upstream batch
    ├── InputMissing         a batch's object was deleted or replaced
    ├── ResultsInterrupted   the connection broke while the results of an upstream batch were read
    └── KeyPoolBroken        the key-pool secret cannot be read or is invalid

``functions/api/app.py`` maps each of them to an HTTP status.
"""

from __future__ import annotations

from typing import Generic, TypeVar

Record = TypeVar("Record")


class SluiceError(Exception):
    """Base class of Sluice's errors."""


class InvalidRequest(SluiceError):
    """The request is invalid; the message says why."""


class Unauthenticated(SluiceError):
    """The client key is missing, unknown or disabled: send a valid one as `x-api-key` or `Authorization: Bearer`."""

    def __init__(self) -> None:
        super().__init__(type(self).__doc__)


class JobNotFound(SluiceError):
    """The job does not exist for this tenant."""

    def __init__(self, job_id: str) -> None:
        super().__init__(
            f"job {job_id!r} does not exist for this client key; use GET /jobs to list jobs"
        )
        self.job_id = job_id


class BatchNotFound(SluiceError):
    """The batch does not exist for this tenant."""

    def __init__(self, batch_id: str) -> None:
        super().__init__(
            f"message_batch: {batch_id} does not exist for this client key; "
            "use GET /v1/messages/batches to list batches"
        )
        self.batch_id = batch_id


class Conflict(SluiceError):
    """The custom_id or Idempotency-Key was already used for a different request."""


class RequestTooLarge(SluiceError):
    """The body exceeds the size limit."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(
            f"the body has {size:,} bytes; the limit is {limit:,}. "
            "Send fewer jobs per list, or upload them as a file with `sluice upload FILE` or POST /uploads"
        )
        self.size = size
        self.limit = limit


class Throttled(SluiceError):
    """The client key sends too many requests; its other requests are not affected."""

    def __init__(self, retry_after_seconds: int) -> None:
        super().__init__(
            f"too many requests with this client key; retry in {retry_after_seconds} s. "
            "Submit up to 100 jobs per request, and read up to 100 with GET /jobs?ids="
        )
        self.retry_after_seconds = retry_after_seconds


class StoreBusy(SluiceError):
    """A store or queue did not accept the write, or its response was lost (`may_be_done`)."""

    def __init__(
        self, what: str, retry_after_seconds: int = 2, *, may_be_done: bool = False
    ) -> None:
        super().__init__(f"{what} is busy; retry in {retry_after_seconds} s")
        self.what = what
        self.retry_after_seconds = retry_after_seconds
        self.may_be_done = may_be_done


class NotItsTurn(SluiceError):
    """Another batch of the tenant is at a long step; this one continues later."""

    def __init__(self, batch_id: str) -> None:
        super().__init__(f"another batch of the tenant goes before {batch_id}")


class NotStorable(SluiceError):
    """A store cannot take a record: it is too large or not encodable. Writing it again would fail again."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(f"{what} cannot take the record: {reason}")
        self.what = what
        self.reason = reason


class Unexpected(SluiceError):
    """Internal error in the gateway. Retry with the same Idempotency-Key or custom_id."""

    def __init__(self) -> None:
        super().__init__(type(self).__doc__)


class Stale(SluiceError, Generic[Record]):
    """Optimistic lock failure: the record changed. `current` is its current value, None if it was deleted."""

    def __init__(self, current: Record | None) -> None:
        super().__init__("the record was changed concurrently")
        self.current = current


class IllegalTransition(SluiceError):
    """A change of state that the state machine does not allow."""

    def __init__(self, job_id: str, current: str, new: str) -> None:
        super().__init__(f"job {job_id} is {current} and cannot become {new}")
        self.job_id = job_id


class LeaseLost(SluiceError):
    """This worker no longer holds the lease."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"the lease on {job_id} was lost")
        self.job_id = job_id


class RangeBusy(SluiceError):
    """Another worker holds the lease on the range until a time (epoch milliseconds)."""

    def __init__(self, batch_id: str, number: int, until: int) -> None:
        super().__init__(f"range {number} of {batch_id} is leased to another worker")
        self.until = until


class UpstreamBatchBusy(SluiceError):
    """Another invocation holds the lease on the upstream batch until a time (epoch milliseconds)."""

    def __init__(self, upstream_id: str, until: int) -> None:
        super().__init__(f"{upstream_id} is leased to another invocation")
        self.until = until


class InputMissing(SluiceError):
    """A batch's object was deleted or replaced."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key} was deleted or replaced while the batch ran")
        self.key = key


class ResultsInterrupted(SluiceError):
    """The connection broke while the results of an upstream batch were read."""

    def __init__(self, batch_id: str, rows: int, reason: str) -> None:
        super().__init__(
            f"the results of {batch_id} broke off after {rows:,} rows ({reason}); read them again from the start"
        )
        self.batch_id = batch_id
        self.rows = rows


class KeyPoolBroken(SluiceError):
    """The key-pool secret cannot be read or is invalid."""
