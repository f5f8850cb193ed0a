"""The Claude simulator: Claude's API over real HTTP, with rate limits, headers and faults.

    python -m scripts.claude_simulator --port 8089 --rpm 600 --keys sk-ant-test-one --fast

It listens on 127.0.0.1 only and prints one JSON line when it is ready. Keys can come from
CLAUDE_SIMULATOR_KEYS and CLAUDE_SIMULATOR_ADMIN_KEYS instead, so that the process list does not show
them. It is deterministic: the same seed and the same request get the same answer, whatever other
requests it receives.

Claude's API
    POST /v1/messages (JSON and events), POST /v1/messages/count_tokens, GET /v1/models and
    /v1/models/{id}; `x-api-key` or `Authorization: Bearer`; anthropic-version 2023-06-01 or
    2026-10-21.
    Message Batches: POST and GET /v1/messages/batches, GET and DELETE /v1/messages/batches/{id},
    POST .../{id}/cancel, GET .../{id}/results.
    With an admin key: GET /v1/organizations/rate_limits (`group_type`, `model`, `limit`, `page`)
    and /v1/organizations/workspaces/{id}/rate_limits (also `include_inherited`), each in the
    format of its version. Other keys get a 401 there, and admin keys get a 401 on all other routes.

Limits
    Each organization and model group has three buckets: requests, input tokens, output tokens. Each
    refills continuously at limit/60 per second, up to `burst_seconds` of refill. Input is charged
    by estimate when a call starts, and corrected to input plus cache writes at the first token.
    Output is charged as it is produced: a call is admitted if the level is above zero, and the
    level may become negative. A rejected call is not charged. Response headers show the buckets
    at the time the headers are sent.

Message Batches
    Creating a batch validates only the structure of `requests`. Each `params` is validated when its
    request runs, under the version of the create call; an invalid one errors only its own result. A
    batch starts after `start_seconds` and takes a time of its `regimes`; without these `seconds`, or
    its size at `items_per_second`. It keeps the speed it was created with, and its requests end at a
    uniform rate within its time. Rate limits and the failure rates of `faults` do not apply to
    its requests; `errored_rate`, `expired_rate` and markers do. Counts stay `processing`
    until the whole batch has ended. Requests that are not complete end canceled when the batch is
    canceled, or expired after one day. Only keys of the batch's workspace can read it; results are
    deleted after 29 days. The seed determines the processing order, which is also the results order.
    The queue holds `queued_requests` per organization; a batch that exceeds it gets a 429.
    The batch clock follows the real clock until it is advanced.

    `regimes` are completion times as users report them, whatever the size of a batch. Each day of the
    batch clock is slow by `slow_day_rate`. A batch takes a lognormal time by the regime of its day: on
    normal days a median of 7 minutes (95 % within 110 minutes, 10 % beyond 1 h, 0.07 % beyond 24 h), on
    slow days of 21 minutes (95 % within 13 h, 32 % beyond 1 h, 3 % beyond 24 h), and at least 60 s. The
    times are determined by the seed, the day and the number of the batch. `speed` divides all of them,
    the day of a regime, and the day until requests expire: with 60, a slow day lasts 24 minutes. It does
    not divide `start_seconds` and `cancel_seconds`; a cancel takes about 120 s at Anthropic.

Faults
    By rate in `faults`, or by a marker in `metadata.user_id` such as "sim:529x3,thinking": see
    faults.py for the grammar and all names. Failures before processing are not charged to the limits
    and not billed; `drop_after_billing` is billed; `sse_error` charges half an answer to the
    limits and is not billed. A failure by rate depends on the seed, the content and the call count
    for that content, so a retry may succeed. A caller that disconnects is billed in full, because
    its answer is still produced.

Configuration (`--config FILE`; every part has a default)
    {"seed": 1,
     "service": {"ttft_seconds": 0.8, "ttft_sigma": 0.3,
                 "tokens_per_second": 80,                null: unlimited
                 "output_tokens": 300, "output_tokens_sigma": 0.6,
                 "input_estimate_percent": 100},
     "service_by_group": {"opus-5": {...}},
     "faults": {"529": 0.02, "drop_after_billing": 0.001, "thinking": 0.1},
     "batches": {"start_seconds": 0, "seconds": null, "items_per_second": 100,    null: at once
                 "regimes": null,                        or completion times; {} has these defaults:
                            {"speed": 1, "slow_day_rate": 0.2857,    0: all days are normal; 1: slow
                             "normal": {"median_seconds": 420, "sigma": 1.68, "at_least_seconds": 60},
                             "slow": {"median_seconds": 1260, "sigma": 2.2, "at_least_seconds": 60}},
                 "cancel_seconds": 1,                    from cancel to end
                 "errored_rate": 0, "expired_rate": 0,
                 "create_faults": {"529": 0.01, "drop_after_billing": 0.01},   of the create call
                 "not_found_seconds": 0,                 a new batch returns 404 for this time
                 "not_found_rate": 0,                    share of reads that return 404
                 "results_url": "absolute"},             or "relative"
     "ramp_retry_after_seconds": 5,
     "organisations": [
       {"id": "org-one", "workspace": "wrkspc_default", "keys": ["sk-ant-test-one"],
        "workspaces": {"wrkspc_two": {"keys": [...],     more workspaces; their limits
                                      "limits": {"opus-5": {"rpm": 50}}}},   apply in addition
        "admin_keys": [],                                each starts with sk-ant-admin
        "limits": {"default": {"rpm": 1000, "itpm": 2000000, "otpm": 400000},     null: no limit
                   "opus-5": {...}},
        "input_limit_type": "input_tokens_per_minute_cache_aware",   name in the Rate Limits API;
                                                         or "input_tokens_per_minute"
        "batch_limits": {"rpm": 1000,                    calls of all batch endpoints
                         "queued_requests": 200000},
        "count_tokens_rpm": 2000,
        "burst_seconds": 60,
        "request_burst_seconds": null,                   1: 60 a minute enforced as 1 a second
        "max_in_flight": null,
        "retry_after": "next_slot",                      or "full", or "none"
        "limit_headers": true,
        "reserve_max_tokens": false,
        "blocked_by": null}],                            or a failure that every call gets
     "models": {"my-model": {"group": "my-group"}},      adds to or overrides models.json
     "revoke_at": {"sk-ant-test-one": 30},               seconds after the start
     "ledger_rows": 1000000}

Pages of other origins
    A request whose Host or Origin is not the simulator's own loopback address gets a 403
    (scripts/local_doors.py), and no response permits another origin to read it. A POST to the
    control routes below also requires `content-type: application/json`; otherwise it gets a 415.

Control
    GET  /_simulator/stats[?starts=1]    the counts described below
    GET  /_simulator/ledger              all ended calls and batch requests as JSON lines;
                                         `lane` is "live" or "batch"
    POST /_simulator/batch_clock         {"advance_seconds": 86400}: advance the batch clock
    POST /_simulator/config              a partial configuration, merged into the current one:
                                         objects by key, organizations by id. Also accepts
                                         "revoke": [keys], "unrevoke": [keys] and "revoke_at":
                                         {key: seconds from now}
    POST /_simulator/reset[?config=1]    clear the ledger, refill the buckets; with config=1 also
                                         restore the initial configuration

Stats (times in epoch seconds)
    {"now", "started_at", "process_cpu_seconds", "first_request_at", "last_request_at",
     "in_flight", "unauthenticated", COUNTS,
     "duplicates": {"count", "extra_calls", "examples": [{"body_hash", "user_id", "billed"}]},
     "ledger": {"rows", "kept"},
     "batch_clock": {"now", "ahead_seconds"},
     "organisations": {ID: {
       "in_flight", "without_model_group": COUNTS,
       "model_groups": {GROUP: {
         COUNTS, "in_flight", "most_in_flight", "first_start_at", "last_start_at", "last_end_at",
         "starts"?: [times], "workspaces"?: {ID: as buckets, where a workspace has its own},
         "buckets": {"requests" | "burst" | "input_tokens" | "output_tokens":
                     {"limit", "capacity", "level"}}}},
       "batches": {"created", "open", "ended", "canceled", "deleted", "queued_requests",
                   "most_queued_requests", "items": COUNTS and "canceled", "expired"}}}}
    COUNTS = "requests", "answered", "rate_limited": {"total", "requests"?, "input_tokens"?,
       "output_tokens"?, "burst"?, "concurrency"?}, "overloaded" (529), "failed": {FAILURE: n},
       "invalid", "billed", "delivered", "undelivered", and of the billed calls "input_tokens",
       "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens".
    "answered" counts complete answers, delivered or not. A failure by fault or marker is counted in
    "failed" under its name, a rejection by a bucket in "rate_limited" under the bucket's name. Token
    counting and the calls of batch endpoints have their own groups, "count_tokens" and "batches". The
    totals exclude both groups and the requests in batches. A batch's answer counts as delivered when
    its results line is sent.
    A duplicate is a request body billed more than once, on either lane. Bodies are compared by
    `params_hash`: sorted, compact JSON without `stream`. Every answer's text contains its first
    twelve hex digits.

In the same process: `with running(Settings(...)) as simulator: simulator.url`.
"""

from scripts.claude_simulator.answers import params_hash
from scripts.claude_simulator.server import Running, running
from scripts.claude_simulator.settings import Organization, Service, Settings, read

__all__ = ["Organization", "Running", "Service", "Settings", "params_hash", "read", "running"]
