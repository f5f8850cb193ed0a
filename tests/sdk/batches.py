"""What a program does with Anthropic's Python SDK and batches; run by any version of it, with Sluice as `base_url`.

Prints what it saw as one JSON object. Of Sluice it knows only the header `sluice-lane`.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import anthropic


def main(base_url: str, key: str) -> dict[str, Any]:
    """Create, poll, read, list, cancel, delete."""
    client = anthropic.Anthropic(base_url=base_url, api_key=key)
    batches = client.messages.batches
    created = batches.create(requests=[_request(number) for number in range(12)])
    batch = created
    while batch.processing_status != "ended":
        time.sleep(0.2)
        batch = batches.retrieve(created.id)
    results = _results(client, batch.id)

    second = batches.create(
        requests=[_request(0, "claude-opus-5-5")], extra_headers={"sluice-lane": "batch"}
    )
    canceled = batches.cancel(second.id)
    third = batches.create(requests=[_request(0)])
    paged = [each.id for each in batches.list(limit=1)]
    while (ended := batches.retrieve(third.id)).processing_status != "ended":
        time.sleep(0.2)
    deleted = batches.delete(third.id)
    return {
        "version": anthropic.__version__,
        "created": json.loads(created.model_dump_json()),
        "ended": json.loads(batch.model_dump_json()),
        "results": results,
        "canceled": canceled.processing_status,
        "paged": paged,
        "ids": [created.id, second.id, ended.id],
        "deleted": json.loads(deleted.model_dump_json()),
        "missing": _error(lambda: batches.retrieve(third.id)),
        "refused": _error(lambda: batches.create(requests=[_request(1), _request(1)])),
        "no_lane": _error(
            lambda: batches.create(requests=[_request(1)], extra_headers={"sluice-lane": "cheap"})
        ),
        "too_large": _error(lambda: batches.create(requests=[_request(1, text="x" * 4_100_000)])),
        "no_key": _error(
            lambda: anthropic.Anthropic(
                base_url=base_url, api_key="sk-ant-test-nobody"
            ).messages.batches.retrieve(created.id)
        ),
    }


def only_results(base_url: str, key: str, batch_id: str) -> dict[str, Any]:
    """Read the results of a batch that has ended."""
    client = anthropic.Anthropic(base_url=base_url, api_key=key)
    found: dict[str, Any] = {"results": []}
    found["error"] = _error(lambda: found.update(results=_results(client, batch_id)))
    return found


def _results(client: Any, batch_id: str) -> list[dict[str, Any]]:
    return [
        {
            "custom_id": each.custom_id,
            "type": each.result.type,
            "stop_reason": each.result.message.stop_reason
            if each.result.type == "succeeded"
            else None,
            "error": each.result.error.error.type if each.result.type == "errored" else None,
        }
        for each in client.messages.batches.results(batch_id)
    ]


def _request(number: int, model: str = "claude-haiku-5-5", text: str | None = None) -> Any:
    params = {
        "model": model if number != 7 else "claude-no-such-model",
        "max_tokens": 32,
        "messages": [{"role": "user", "content": text or f"Say {number}."}],
    }
    return {"custom_id": f"row-{number}", "params": params}


def _error(call: Any) -> dict[str, Any]:
    try:
        call()
    except anthropic.APIStatusError as error:
        body: Any = error.body
        return {
            "class": type(error).__name__,
            "status": error.status_code,
            "type": body["error"]["type"],
            "message": body["error"]["message"],
            "request_id": error.request_id,
        }
    return {}


if __name__ == "__main__":
    do = main if len(sys.argv) == 3 else only_results
    sys.stdout.write(json.dumps(do(*sys.argv[1:])))
