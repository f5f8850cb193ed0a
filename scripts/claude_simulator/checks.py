"""What a Messages request must look like, and how many input tokens it is estimated to hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from scripts.claude_simulator.faults import Failure
from scripts.claude_simulator.settings import Model

VERSIONS: Final = ("2023-06-01", "2026-10-21")
MAX_BODY_BYTES: Final = 32 * 1024 * 1024
MAX_BATCH_BYTES: Final = 256 * 1024 * 1024
MAX_MESSAGES: Final = 100_000
MIN_THINKING_BUDGET: Final = 1024
MAX_BREAKPOINTS: Final = 4
# Tuples, not sets: what a request says there may not be hashable.
ROLES: Final = ("user", "assistant", "system")
THINKING_FORMS: Final = ("adaptive", "enabled", "disabled", "between_tools")

SAMPLING: Final = (("temperature", 1), ("top_p", 1), ("top_k", 1_000_000))
SAMPLING_KEYS: Final = frozenset(key for key, _ in SAMPLING)
COUNTED_KEYS: Final = frozenset(
    (
        *("messages", "model", "cache_control", "mcp_servers", "output_config", "speed", "system"),
        *("thinking", "tool_choice", "tools", "user_profile_id", "context_management"),
    )
)
MESSAGE_KEYS: Final = COUNTED_KEYS | frozenset(
    (
        *("max_tokens", "container", "diagnostics", "inference_geo", "metadata", "service_tier"),
        *("stop_sequences", "stream", *SAMPLING_KEYS),
    )
)
IGNORED_IN_BATCHES: Final = ("fallback_credit_token",)

# An image or a PDF is not counted by the length of its base64 text, but as so many characters.
MEDIA_CHARACTERS: Final = 6000
MESSAGE_OVERHEAD_TOKENS: Final = 4


class RequestError(Exception):
    """A request the API refuses; `failure` is what it answers."""

    def __init__(
        self, message: str, status: int = 400, type_: str = "invalid_request_error"
    ) -> None:
        super().__init__(message)
        self.failure = Failure(status, type_, message)


def check_version(version: str | None) -> str:
    """Return the `anthropic-version`, which must be given and known."""
    if version is None:
        raise RequestError("anthropic-version: header is required")
    if version not in VERSIONS:
        raise RequestError(f'anthropic-version: "{version}" is not a valid version')
    return version


def check_size(body: bytes, most: int) -> None:
    """Refuse a body of more than so many bytes."""
    if len(body) > most:
        raise RequestError(
            "Request exceeds the maximum allowed number of bytes.", 413, "request_too_large"
        )


def parse(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a request body."""
    check_size(body, MAX_BODY_BYTES)
    try:
        params = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError("The request body is not valid JSON.") from error
    if not isinstance(params, dict):
        raise RequestError("The request body must be a JSON object.")
    return params


def check_message(params: dict[str, Any], version: str, models: dict[str, Model]) -> Model:
    """Return the model of a Messages request, or raise what the API would answer."""
    model = _check_common(params, version, models, MESSAGE_KEYS)
    max_tokens = params.get("max_tokens")
    if max_tokens is None:
        raise RequestError("max_tokens: Field required")
    if not isinstance(max_tokens, int) or isinstance(max_tokens, bool):
        raise RequestError("max_tokens: Input should be a valid integer")
    if max_tokens < 0:
        raise RequestError("max_tokens: Input should be greater than or equal to 0")
    if max_tokens > model.max_tokens:
        raise RequestError(
            f"max_tokens: {max_tokens} > {model.max_tokens}, which is the maximum allowed number"
            f" of output tokens for {params['model']}"
        )
    _check_extras(params)
    _check_thinking(params, model, max_tokens)
    return model


def batch_params(raw: bytes) -> dict[str, Any]:
    """Return the params of one of a batch's `requests`, whose shape was checked before."""
    params: dict[str, Any] = json.loads(raw)["params"]
    return params


def check_batch_params(params: dict[str, Any], version: str, models: dict[str, Model]) -> Model:
    """Return the model of a request in a batch, or raise what its result would say."""
    if params.get("stream"):
        raise RequestError("stream: streaming is not supported in a batch")
    if params.get("speed") is not None:
        raise RequestError("speed: not supported in a batch")
    if params.get("max_tokens") == 0:
        raise RequestError("max_tokens: must be greater than 0 in a batch")
    kept = {key: value for key, value in params.items() if key not in IGNORED_IN_BATCHES}
    return check_message(kept, version, models)


def _check_extras(params: dict[str, Any]) -> None:
    if not isinstance(params.get("stream", False), bool):
        raise RequestError("stream: Input should be a valid boolean")
    metadata = params.get("metadata")
    if metadata is not None:
        if not isinstance(metadata, dict):
            raise RequestError("metadata: Input should be a valid dictionary")
        if not isinstance(metadata.get("user_id"), str | None):
            raise RequestError("metadata.user_id: Input should be a valid string")
    sequences = params.get("stop_sequences")
    if sequences is not None and (
        not isinstance(sequences, list) or not all(isinstance(text, str) for text in sequences)
    ):
        raise RequestError("stop_sequences: Input should be a valid list of strings")


def check_count(params: dict[str, Any], version: str, models: dict[str, Model]) -> Model:
    """Return the model of a count_tokens request, or raise what the API would answer."""
    return _check_common(params, version, models, COUNTED_KEYS | SAMPLING_KEYS)


def _check_common(
    params: dict[str, Any], version: str, models: dict[str, Model], keys: frozenset[str]
) -> Model:
    name = params.get("model")
    if name is None:
        raise RequestError("model: Field required")
    if not isinstance(name, str):
        raise RequestError("model: Input should be a valid string")
    model = models.get(name)
    if model is None or model.lifecycle == "retired":
        raise RequestError(f"model: {name}", 404, "not_found_error")
    for key in params:
        if key not in keys:
            raise RequestError(f"{key}: Extra inputs are not permitted")
    _check_sampling(params, version)
    _check_messages(params, version, model)
    _check_system(params.get("system"))
    _check_tools(params.get("tools"))
    return model


def _check_system(system: object) -> None:
    if system is None or isinstance(system, str):
        return
    if not isinstance(system, list):
        raise RequestError("system: Input should be a valid list")
    for index, block in enumerate(system):
        if not isinstance(block, dict) or block.get("type") != "text":
            raise RequestError(f"system.{index}: Input should be a text block")


def _check_tools(tools: object) -> None:
    if tools is None:
        return
    if not isinstance(tools, list):
        raise RequestError("tools: Input should be a valid list")
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict) or not (tool.get("name") or tool.get("type")):
            raise RequestError(f"tools.{index}.name: Field required")


def _check_sampling(params: dict[str, Any], version: str) -> None:
    for key, top in SAMPLING:
        if key not in params:
            continue
        if version != VERSIONS[0]:
            raise RequestError(f"{key}: not supported under anthropic-version {version}")
        value = params[key]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RequestError(f"{key}: Input should be a valid number")
        if not 0 <= value <= top:
            raise RequestError(f"{key}: Input should be between 0 and {top}")


def _check_messages(params: dict[str, Any], version: str, model: Model) -> None:
    messages = params.get("messages")
    if messages is None:
        raise RequestError("messages: Field required")
    if not isinstance(messages, list):
        raise RequestError("messages: Input should be a valid list")
    if not messages:
        raise RequestError("messages: at least one message is required")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"messages: List should have at most {MAX_MESSAGES} items")
    for index, message in enumerate(messages):
        _check_one_message(f"messages.{index}", message, version)
    if messages[-1]["role"] == "assistant" and not model.prefill:
        raise RequestError(
            "This model does not support assistant message prefill. The conversation must end with"
            " a user message."
        )


def _check_one_message(place: str, message: object, version: str) -> None:
    if not isinstance(message, dict):
        raise RequestError(f"{place}: Input should be a valid dictionary")
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{place}.role: Input should be 'user', 'assistant' or 'system'")
    content = message.get("content")
    if content is None:
        raise RequestError(f"{place}.content: Field required")
    if isinstance(content, str):
        if not content:
            raise RequestError(f"{place}: content must be non-empty")
        return
    if not isinstance(content, list) or not content:
        raise RequestError(f"{place}: content must be a string or a non-empty list of blocks")
    for index, block in enumerate(content):
        _check_block(f"{place}.content.{index}", block, role, version)


def _check_block(place: str, block: object, role: str, version: str) -> None:
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        raise RequestError(f"{place}.type: Field required")
    is_text = block["type"] == "text"
    if is_text and not isinstance(block.get("text"), str):
        raise RequestError(f"{place}.text: Field required")
    if is_text and not block["text"]:
        raise RequestError("messages: text content blocks must be non-empty")
    if version == VERSIONS[0]:
        return
    if role == "assistant" and block["type"] == "document":
        raise RequestError(f"{place}: document is not allowed in an assistant message")
    if role == "user" and is_text and block.get("citations"):
        raise RequestError(f"{place}.citations: must be empty")


def _check_thinking(params: dict[str, Any], model: Model, max_tokens: int) -> None:
    thinking = params.get("thinking")
    if thinking is None:
        return
    form = thinking.get("type") if isinstance(thinking, dict) else None
    if form not in THINKING_FORMS:
        raise RequestError("thinking.type: Input should be 'adaptive', 'enabled' or 'disabled'")
    if form not in model.thinking:
        raise RequestError(f"thinking.type: '{form}' is not supported by {params['model']}")
    if form == "enabled":
        budget = thinking.get("budget_tokens")
        if not isinstance(budget, int) or budget < MIN_THINKING_BUDGET:
            raise RequestError(
                "thinking.enabled.budget_tokens: Input should be greater than or equal to 1024"
            )
        if budget >= max_tokens:
            raise RequestError("max_tokens: must be greater than thinking.budget_tokens")


@dataclass(frozen=True, slots=True)
class Breakpoint:
    """A cache breakpoint: the tokens up to it, the hash of the prefix, how long it lives."""

    tokens: int
    prefix_hash: str
    one_hour: bool


@dataclass(frozen=True, slots=True)
class Prompt:
    """The input side of a request: its tokens, and its cache breakpoints in their order."""

    tokens: int
    breakpoints: tuple[Breakpoint, ...] = ()


def measure(params: dict[str, Any], model: Model, *, cached: bool) -> Prompt:
    """Estimate the input tokens of a request from its characters.

    `cached` says whether the request mentions `cache_control`; without it nothing is hashed.
    """
    characters = 0
    found: list[Breakpoint] = []
    digest = hashlib.sha256(model.id.encode())
    for block in _blocks(params):
        characters += _characters(block)
        if cached:
            control = block.get("cache_control") if isinstance(block, dict) else None
            digest.update(_canonical_block(block))
            if isinstance(control, dict):
                tokens = _tokens(characters, model)
                found.append(Breakpoint(tokens, digest.hexdigest(), control.get("ttl") == "1h"))
    total = _tokens(characters, model)
    if cached and isinstance(params.get("cache_control"), dict):
        one_hour = params["cache_control"].get("ttl") == "1h"
        found.append(Breakpoint(total, digest.hexdigest(), one_hour))
    if len(found) > MAX_BREAKPOINTS:
        raise RequestError(
            f"A maximum of {MAX_BREAKPOINTS} blocks with cache_control may be provided."
            f" Found {len(found)}."
        )
    tokens = total + MESSAGE_OVERHEAD_TOKENS * (1 + len(params["messages"]))
    if tokens > model.max_input_tokens:
        raise RequestError(
            f"prompt is too long: {tokens} tokens > {model.max_input_tokens} maximum"
        )
    return Prompt(tokens, tuple(found))


def _blocks(params: dict[str, Any]) -> Iterator[object]:
    """Yield the parts of a prompt in the order in which the cache sees them."""
    yield from params.get("tools") or ()
    system = params.get("system")
    if isinstance(system, str):
        yield system
    else:
        yield from system or ()
    for message in params["messages"]:
        content = message["content"]
        if isinstance(content, str):
            yield content
        else:
            yield from content


def _tokens(characters: int, model: Model) -> int:
    return -(-characters * model.tokens_per_1000_characters // 1000)


def _characters(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        source = value.get("source")
        if isinstance(source, dict) and source.get("type") != "text":
            return MEDIA_CHARACTERS
        return sum(
            _characters(item) + (0 if key in {"text", "content"} else len(key))
            for key, item in value.items()
            if key not in {"type", "cache_control"}
        )
    if isinstance(value, list):
        return sum(_characters(item) for item in value)
    return 4


def _canonical_block(block: object) -> bytes:
    if isinstance(block, dict):
        block = {key: value for key, value in block.items() if key != "cache_control"}
    return json.dumps(block, sort_keys=True, separators=(",", ":")).encode()
