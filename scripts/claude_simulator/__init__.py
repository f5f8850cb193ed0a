"""The Claude simulator: Claude's API over real HTTP, with true limits, headers and faults.

    python -m scripts.claude_simulator --port 8089 --rpm 600 --keys sk-ant-test-one --fast

It listens on 127.0.0.1 only and prints one JSON line when it is ready. Keys can come from
CLAUDE_SIMULATOR_KEYS and CLAUDE_SIMULATOR_ADMIN_KEYS instead: the list of processes shows none then.
Nothing in it is random: the same seed and the same request get the same answer, whatever arrives
before or beside it.

Claude's API
    POST /v1/messages (JSON and events), POST /v1/messages/count_tokens, GET /v1/models and
    /v1/models/{id}; `x-api-key` or `Authorization: Bearer`; anthropic-version 2023-06-01 or
    2026-10-21.
    Message Batches: POST and GET /v1/messages/batches, GET and DELETE /v1/messages/batches/{id},
    POST .../{id}/cancel, GET .../{id}/results.
    With an admin key: GET /v1/organizations/rate_limits (`group_type`, `model`, `limit`, `page`)
    and /v1/organizations/workspaces/{id}/rate_limits (`include_inherited` besides), each in the
    shape of its version. Other keys get a 401 there, as admin keys get everywhere else.

Limits
    Per organisation and model group three buckets: requests, input tokens, output tokens. Each
    refills continuously at limit/60 per second, up to `burst_seconds` of refill. Input is charged
    as estimated when a call starts, and corrected to input plus cache writes at the first token.
    Output is charged while it is produced: a call is admitted when the level is above zero, and the
    level may fall below it. A refused call takes nothing. The headers of an answer show the
    buckets at the moment the headers are sent.

Message Batches
    Only the shape of `requests` is looked at when a batch is made; each `params` is checked when
    its turn comes, under the version the batch was made with, and errs in its result alone. A
    batch begins after `start_seconds` and takes `seconds`, or its size at `items_per_second`; it
    keeps the speed it was made with. Its requests meet no rate limit and no failure by rate of
    `faults`; they have `errored_rate` and `expired_rate`, and markers. Counts stay `processing`
    until the whole batch has ended. What is not done when a batch is canceled or a day old ends
    canceled or expired. Only keys of its workspace see a batch; results go after 29 days. They
    come in an order the seed decides, which is also the order of the work.
    The queue has room for `queued_requests` of an organisation; a batch that does not fit is a 429.
    The batch clock runs with the others until it is set ahead.

Faults
    By rate in `faults`, or by a marker in `metadata.user_id` such as "sim:529x3,thinking": see
    faults.py for the grammar and every name. Failures that come before the work take nothing and
    are not billed; `drop_after_billing` is billed; `sse_error` charges half an answer to the
    limits and is not billed. A failure by rate is drawn from the seed, the content and the number
    of the call for that content, so a repeated call may succeed. A caller that hangs up is billed
    in full, as its answer is produced all the same.

Configuration (`--config FILE`; every part has a default)
    {"seed": 1,
     "service": {"ttft_seconds": 0.8, "ttft_sigma": 0.3,
                 "tokens_per_second": 80,                null: unlimited
                 "output_tokens": 300, "output_tokens_sigma": 0.6,
                 "input_estimate_percent": 100},
     "service_by_group": {"opus-5": {...}},
     "faults": {"529": 0.02, "drop_after_billing": 0.001, "thinking": 0.1},
     "batches": {"start_seconds": 0, "seconds": null, "items_per_second": 100,    null: at once
                 "cancel_seconds": 1,                    from the cancel to the end
                 "errored_rate": 0, "expired_rate": 0,
                 "create_faults": {"529": 0.01, "drop_after_billing": 0.01},   of the call itself
                 "not_found_seconds": 0,                 a new batch cannot be read for so long
                 "not_found_rate": 0,                    share of reads answered by a 404
                 "results_url": "absolute"},             or "relative"
     "ramp_retry_after_seconds": 5,
     "organisations": [
       {"id": "org-one", "workspace": "wrkspc_default", "keys": ["sk-ant-test-one"],
        "workspaces": {"wrkspc_two": {"keys": [...],     more of them; limits of theirs
                                      "limits": {"opus-5": {"rpm": 50}}}},   hold as well
        "admin_keys": [],                                each begins with sk-ant-admin
        "limits": {"default": {"rpm": 1000, "itpm": 2000000, "otpm": 400000},     null: no limit
                   "opus-5": {...}},
        "input_limit_type": "input_tokens_per_minute_cache_aware",   how the Rate Limits API names
                                                         it; or "input_tokens_per_minute"
        "batch_limits": {"rpm": 1000,                    calls of all batch endpoints
                         "queued_requests": 200000},
        "count_tokens_rpm": 2000,
        "burst_seconds": 60,
        "request_burst_seconds": null,                   1: 60 a minute enforced as 1 a second
        "max_in_flight": null,
        "retry_after": "next_slot",                      or "full", or "none"
        "limit_headers": true,
        "reserve_max_tokens": false,
        "blocked_by": null}],                            or a failure: every call meets it
     "models": {"my-model": {"group": "my-group"}},      beside or over those of models.json
     "revoke_at": {"sk-ant-test-one": 30},               seconds after the start
     "ledger_rows": 1000000}

Pages of other origins
    A request whose Host or Origin is not the simulator's own loopback address is a 403
    (scripts/local_doors.py), and no answer permits another origin to read it. A POST of the
    control below needs `content-type: application/json` besides, else it is a 415.

Control
    GET  /_simulator/stats[?starts=1]    the counts, below
    GET  /_simulator/ledger              every ended call and request of a batch as JSON lines;
                                         `lane` is "live" or "batch"
    POST /_simulator/batch_clock         {"advance_seconds": 86400}: set the batch clock ahead
    POST /_simulator/config              a part of the configuration, laid over the present one:
                                         objects by key, organisations by id. Besides
                                         "revoke": [keys], "unrevoke": [keys] and "revoke_at":
                                         {key: seconds from now}
    POST /_simulator/reset[?config=1]    empty books, full buckets; with config=1 the first
                                         configuration too

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
    "answered" are whole answers, delivered or not. A failure by fault or marker stands in "failed"
    under its name, a refusal by a bucket in "rate_limited" under the bucket's. Token counting has a
    group of its own, "count_tokens", as have the calls of batch endpoints, "batches"; neither is
    part of the sums, nor are the requests in batches. A batch's answer is delivered when its line
    of the results was sent.
    A duplicate is a request body billed more than once, on whichever lane. Bodies are compared by
    `params_hash`: sorted, compact JSON without `stream`. Its first twelve hex digits stand in every
    answer's text.

In the same process: `with running(Settings(...)) as simulator: simulator.url`.
"""

from scripts.claude_simulator.answers import params_hash
from scripts.claude_simulator.server import Running, running
from scripts.claude_simulator.settings import Organisation, Service, Settings, read

__all__ = ["Organisation", "Running", "Service", "Settings", "params_hash", "read", "running"]
