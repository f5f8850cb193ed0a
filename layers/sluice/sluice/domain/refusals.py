"""What upstream refusals mean: whose trouble each is, and what follows. A table; `retries.judge` acts on it.

Sources: Anthropic's pages on errors and rate limits, the error codes of its SDK (2.14), Claude on AWS, and messages
that users of the API have reported. The first row that fits a failure counts. A message is compared from its beginning
only: further on it may quote the request, and a request must not be able to park its organization.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Scope(StrEnum):
    """Whose trouble a refusal is."""

    REQUEST = "request"
    MODEL = "model"
    KEY = "key"
    WORKSPACE = "workspace"
    ORGANIZATION = "organization"
    ACCOUNT = "account"
    """Workspace or organization: the refusal does not say which."""
    ENDPOINT = "endpoint"


class Consequence(StrEnum):
    """What follows from a refusal."""

    WAIT = "wait"
    """Try again at the time that upstream named; no attempt is used."""
    PARK = "park"
    """Wait until a person has done something, with an alarm; no attempt is used."""
    RETRY = "retry"
    """Try again later; one attempt is used."""
    END = "end"
    """Do not try again."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """One row: a failure fits if everything that is named here fits."""

    scope: Scope
    consequence: Consequence
    reason: str
    """Shown with the waiting job, and in the log."""
    statuses: frozenset[int] = frozenset()
    codes: frozenset[str] = frozenset()
    """`error.details.error_code`."""
    types: frozenset[str] = frozenset()
    begins: str | None = None
    """A regular expression for the beginning of the message, without regard to case."""
    should_retry: bool | None = None
    """`x-should-retry`."""
    named_time: bool | None = None
    """Whether the response has a `retry-after`."""
    is_known: bool = True
    """False: a guess from the status alone. Several of them in a row are taken for trouble of the whole account."""

    def fits(  # noqa: PLR0913 - the facts of a failure
        self,
        *,
        status: int | None,
        kind: str,
        code: str | None,
        message: str,
        should_retry: bool | None,
        named_time: bool,
    ) -> bool:
        """Return whether a failure is of this row."""
        return (
            (not self.statuses or status in self.statuses)
            and (not self.codes or code in self.codes)
            and (not self.types or kind in self.types)
            and (self.should_retry is None or self.should_retry is should_retry)
            and (self.named_time is None or self.named_time is named_time)
            and (self.begins is None or re.match(self.begins, message, re.IGNORECASE) is not None)
        )


def _row(  # noqa: PLR0913 - the columns of the table
    scope: Scope,
    consequence: Consequence,
    reason: str,
    *statuses: int,
    code: str = "",
    type_: str = "",
    begins: str | None = None,
    should_retry: bool | None = None,
    named_time: bool | None = None,
    is_known: bool = True,
) -> Refusal:
    """Return a row; `code` and `type_` are names separated by spaces."""
    return Refusal(
        scope,
        consequence,
        reason,
        frozenset(statuses),
        frozenset(code.split()),
        frozenset(type_.split()),
        begins,
        should_retry,
        named_time,
        is_known,
    )


SPEND_LIMIT: Final = "spend limit"
NO_CREDIT: Final = "no credit"
DISABLED: Final = "account disabled"
NO_ACCESS: Final = "account has no access"
RATE_LIMITED: Final = "rate limited"
QUEUE_FULL: Final = "batch queue full"
RAMP: Final = "rate limited: usage grew too fast"
OVERLOADED: Final = "overloaded"
KEY_REJECTED: Final = "key rejected"
NOT_PERMITTED: Final = "not permitted to the key"
INVALID: Final = "request invalid"
TOO_LARGE: Final = "request too large"

_MONTHLY: Final = "enforced_spend_limit_reached"
_SPENT: Final = "contract_spend_limit_reached linked_organization_spend_limit_reached"
_UNBILLABLE: Final = (
    "linked_organization_billing_unavailable user_profile_not_billable "
    "user_profile_billing_not_authorized"
)
_ON_HOLD: Final = (
    "organization_on_hold parent_organization_required organization_type_not_supported"
)
_NO_CIPHER: Final = (
    "cmek_key_disabled cmek_key_unreachable cmek_key_network_blocked cmek_context_unavailable"
)

_IS_OFF: Final = (
    r"( (has been|was|is))?( \w+)? (disabled|suspended|deactivated|banned|closed|archived|deleted"
    r"|restricted|on hold)"
)
_HAS_NO: Final = (
    r"(this|your|the) (organization|account) (does not|doesn't|do not) have (access|permission)"
)
_FIELD: Final = (
    r"""(?-i:(?!(error|api|upstream|anthropic|account|organization|billing|auth)\w*:)"""
    r"""[`'"]?[a-z_][a-z0-9_`'"-]*([.\[][a-z0-9_\]`'"-]+)*:)( |$)"""
)
"""The path of a field of the request, as in `messages.0.content: ...`."""

_EXCEEDS: Final = (
    r"(this request|you|number of [a-z ]{1,40}) (would exceed|(has|have) exceeded)"
    r" (the rate limits? (for|of) )?(your|the) "
)
"""The beginning of a 429 that says whose limit it is."""

_QUEUE: Final = _EXCEEDS + r"[\w', ]{1,80}\bqueue\b"
"""The beginning of a 429 for too many batch requests in processing. Anthropic documents the limit (rate limits, Message
Batches API), but not its refusal; one that begins otherwise is a rate limit."""

_ABOUT_THE_REQUEST: Final = (
    r"(prompt|input|request|output|image|document|file)s?( body)? (is|are) too (long|large|many)"
    r"|input length and `?max_tokens`? exceed"
    r"|output blocked by content filtering"
    r"|(could not|unable to|failed to) (process|download|parse|decode|read)"
    r"|this model does not support|the model does not support"
    r"|unexpected (value|role|key|field)|(extra inputs|field required|input should)"
    r"|(invalid|missing|unsupported|malformed|too many|expected) [\w`'\"]+"
    r"|[`'\"][\w.-]+[`'\"] |(thinking|tool|tools|tool_use|tool_result|message|messages|prefill|schema) "
    r"|the (request|image|document|file|pdf|tool|schema|conversation|final|last|first) "
)

_ORGANIZATION, _WORKSPACE, _ACCOUNT = Scope.ORGANIZATION, Scope.WORKSPACE, Scope.ACCOUNT
_MODEL = Scope.MODEL
_KEY, _REQUEST, _ENDPOINT = Scope.KEY, Scope.REQUEST, Scope.ENDPOINT
_WAIT, _PARK, _RETRY, _END = (
    Consequence.WAIT,
    Consequence.PARK,
    Consequence.RETRY,
    Consequence.END,
)

TABLE: Final = (
    # Money: a person must pay, or raise a limit.
    _row(_ORGANIZATION, _PARK, SPEND_LIMIT, code=f"{_MONTHLY} {_SPENT}"),
    _row(_ORGANIZATION, _PARK, SPEND_LIMIT, code=_UNBILLABLE),
    _row(_ORGANIZATION, _PARK, SPEND_LIMIT, type_="billing_error"),
    _row(_ACCOUNT, _PARK, SPEND_LIMIT, 402),
    _row(_WORKSPACE, _PARK, SPEND_LIMIT, 400, 403, 429,
         begins=r"you have reached your specified workspace api usage limits"),
    _row(_ORGANIZATION, _PARK, SPEND_LIMIT, 400, 403, 429,
         begins=r"you have reached your specified (api )?usage limits?"),
    _row(_ACCOUNT, _PARK, SPEND_LIMIT, 400, 403, 429,
         begins=r"you have reached your (api )?usage limits?"),
    _row(_ORGANIZATION, _PARK, NO_CREDIT, 400, 401, 403, 429,
         begins=r"(your |the )?(organization'?s? |account'?s? )?credit balance is too low"),
    _row(_ACCOUNT, _PARK, NO_CREDIT, 400, 403, 429,
         begins=r"you('re| are) out of (extra usage|credits?)|insufficient (credits?|balance|funds|quota)"
                r"|you exceeded your current quota"),
    _row(_ACCOUNT, _PARK, NO_CREDIT, code="insufficient_quota billing_hard_limit_reached"),
    # The account: a person must write to support, or change a setting.
    _row(_ORGANIZATION, _PARK, DISABLED, code=_ON_HOLD),
    _row(_ORGANIZATION, _PARK, DISABLED, 400, 401, 403, 404, 429,
         begins=r"(this|your|the) (organization|account)" + _IS_OFF),
    _row(_WORKSPACE, _PARK, DISABLED, 400, 401, 403, 404, 429,
         begins=r"(this|your|the) workspace" + _IS_OFF),
    _row(_ORGANIZATION, _PARK, NO_ACCESS, 400, 401, 403, 404,
         begins=_HAS_NO
                + r"( to( use)? (claude|(the |this )?((claude|anthropic|messages) )?(api|models?|service)))?([.,]|$)"
                r"|oauth authentication is (currently )?not (allowed|supported)"
                r"|access to anthropic models is not allowed from"
                r"|outbound web identity federation is disabled"
                r"|model use case details have not been submitted"),
    _row(_ORGANIZATION, _PARK, NO_ACCESS, code=_NO_CIPHER),
    # A request that is never taken, although its status says "later".
    _row(_REQUEST, _END, "long context not allowed", 400, 429,
         begins=r"extra usage is required for|the long context beta is not"),
    _row(_REQUEST, _END, "refused for good", 429, should_retry=False, named_time=False, is_known=False),
    # Limits that refill.
    _row(_ORGANIZATION, _WAIT, RAMP, code="ramp_limit_exceeded"),
    _row(_ORGANIZATION, _WAIT, QUEUE_FULL, 429, begins=_QUEUE),
    _row(_WORKSPACE, _WAIT, RATE_LIMITED, 429, begins=_EXCEEDS + "workspace"),
    _row(_ORGANIZATION, _WAIT, RATE_LIMITED, 429, begins=_EXCEEDS + "organization"),
    _row(_ACCOUNT, _WAIT, RATE_LIMITED, 429),
    _row(_MODEL, _WAIT, OVERLOADED, 529),
    _row(_MODEL, _WAIT, OVERLOADED, type_="overloaded_error"),
    # The key.
    _row(_KEY, _PARK, KEY_REJECTED, 401),
    _row(_KEY, _END, NOT_PERMITTED, 403,
         begins=r"(your|this|the) (api )?key (does not|doesn't|is not|isn't)"),
    _row(_KEY, _END, NOT_PERMITTED, 403, begins=_HAS_NO),
    _row(_KEY, _END, NOT_PERMITTED, 403, is_known=False),
    # The request.
    _row(_REQUEST, _END, TOO_LARGE, 413),
    _row(_REQUEST, _END, TOO_LARGE, type_="request_too_large"),
    _row(_REQUEST, _END, INVALID, 422),
    _row(_REQUEST, _END, INVALID, 400, 404, begins=_FIELD),
    _row(_REQUEST, _END, INVALID, 400, 404, begins=_HAS_NO),
    _row(_REQUEST, _END, INVALID, 400, begins=_ABOUT_THE_REQUEST),
    # What may pass, and what the status alone says.
    _row(_REQUEST, _RETRY, "may pass", 408, 409, 425),
    _row(_REQUEST, _RETRY, "may pass", *range(400, 500), should_retry=True),
    _row(_REQUEST, _END, "refused", *range(300, 500), is_known=False),
    _row(_ENDPOINT, _RETRY, "endpoint failed"),
)  # fmt: skip
"""The first row that fits counts; the last one fits everything."""


def is_monthly(code: str | None) -> bool:
    """Return whether the limit is that of a tier, which resets on the first of a month (Anthropic, rate limits)."""
    return code == _MONTHLY
