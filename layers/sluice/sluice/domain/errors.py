"""Every error Sluice raises on purpose.

::

    SluiceError
    ├── InvalidRequest       the caller's request cannot be accepted as it is
    ├── Unauthenticated      no client key, or one we do not know
    ├── JobNotFound          no such job for this tenant
    ├── BatchNotFound        no such batch for this tenant
    ├── Conflict             the same name or Idempotency-Key stands for another request
    ├── RequestTooLarge      the body is above the size the gateway takes
    ├── StoreBusy            a store or queue did not take the write; try again later
    ├── Unexpected           a fault nobody thought of; the log has it
    ├── Stale                somebody else changed the record first (carries what it is now)
    ├── IllegalTransition    a change of state that the state machine does not know
    ├── LeaseLost            the job or range no longer belongs to this worker
    ├── RangeBusy            the range belongs to another worker until a time
    ├── InputGone            a batch's object is not there any more, or another one stands in its place
    └── KeyPoolBroken        the key-pool secret cannot be read or has the wrong shape

What each of them is in HTTP stands in one table, in ``functions/api/app.py``.
"""

from __future__ import annotations

from typing import Generic, TypeVar

Record = TypeVar("Record")


class SluiceError(Exception):
    """Something Sluice refuses or could not do."""


class InvalidRequest(SluiceError):
    """The request cannot be accepted as it is."""


class Unauthenticated(SluiceError):
    """A valid client key is needed: send it as `x-api-key` or `Authorization: Bearer`."""

    def __init__(self) -> None:
        super().__init__(type(self).__doc__)


class JobNotFound(SluiceError):
    """No such job."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"no job {job_id!r} for this client key; GET /jobs lists what there is")
        self.job_id = job_id


class BatchNotFound(SluiceError):
    """No such batch."""

    def __init__(self, batch_id: str) -> None:
        super().__init__(
            f"message_batch: {batch_id} is not there for this client key; "
            "GET /v1/messages/batches lists those that are"
        )
        self.batch_id = batch_id


class Conflict(SluiceError):
    """The same name stands for another request."""


class RequestTooLarge(SluiceError):
    """The body is above the size the gateway takes."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(
            f"the body has {size:,} bytes, the limit is {limit:,}; "
            "send fewer jobs in one list, or all of them as a file: `sluice upload FILE`, or POST /uploads"
        )
        self.size = size
        self.limit = limit


class StoreBusy(SluiceError):
    """A store or queue did not take the write, or its reply was lost: then `may_be_done` says so."""

    def __init__(
        self, what: str, retry_after_seconds: int = 2, *, may_be_done: bool = False
    ) -> None:
        super().__init__(f"{what} is busy; try again in {retry_after_seconds} s")
        self.what = what
        self.retry_after_seconds = retry_after_seconds
        self.may_be_done = may_be_done


class Unexpected(SluiceError):
    """Something went wrong in the gateway. Send it again under the same Idempotency-Key or custom_id."""

    def __init__(self) -> None:
        super().__init__(type(self).__doc__)


class Stale(SluiceError, Generic[Record]):
    """Somebody else changed the record first; `current` is what it is now, None when gone."""

    def __init__(self, current: Record | None) -> None:
        super().__init__("the record was changed by somebody else")
        self.current = current


class IllegalTransition(SluiceError):
    """A change of state that the state machine does not know."""

    def __init__(self, job_id: str, current: str, new: str) -> None:
        super().__init__(f"job {job_id} is {current} and cannot become {new}")
        self.job_id = job_id


class LeaseLost(SluiceError):
    """The job no longer belongs to this worker."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"the lease on {job_id} was lost")
        self.job_id = job_id


class RangeBusy(SluiceError):
    """The range belongs to another worker until a time (epoch milliseconds)."""

    def __init__(self, batch_id: str, number: int, until: int) -> None:
        super().__init__(f"range {number} of {batch_id} is leased to another worker")
        self.until = until


class InputGone(SluiceError):
    """A batch's object is not there any more, or another one stands in its place."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key} was deleted or replaced while the batch ran")
        self.key = key


class KeyPoolBroken(SluiceError):
    """The key-pool secret cannot be read or has the wrong shape."""
