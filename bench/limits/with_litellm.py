"""LiteLLM's Router as a client under test, in its own environment: see bench/requirements-litellm.txt.

One deployment per key and ten retries; everything else as it comes.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from bench.limits.child import Call, Json, serve

RETRIES = 10
NAME = "bench"


def prepare(work: Json) -> Call:
    """Build the Router."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no download
    litellm: Any = import_module("litellm")
    litellm.telemetry = False
    litellm.suppress_debug_info = True
    model = work["jobs"][0]["model"]
    router = litellm.Router(
        model_list=[
            {
                "model_name": NAME,
                "litellm_params": {
                    "model": f"anthropic/{model}",
                    "api_key": key,
                    "api_base": work["url"],
                },
            }
            for key in work["keys"]
        ],
        num_retries=RETRIES,
    )

    async def call(number: int, params: Json) -> None:
        del number
        await router.acompletion(**{**params, "model": NAME})

    return call


if __name__ == "__main__":
    serve(prepare)
