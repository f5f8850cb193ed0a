"""The answers: fake, but always the same for the same seed and the same params.

Nothing here depends on the order or the time in which requests arrive. Each answer names the short
hash of the params it answers (`params_hash(params)[:12]`), so that a reader can match the two.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Final

from scripts.claude_simulator.cache import InputTokens
from scripts.claude_simulator.faults import Script, drawn
from scripts.claude_simulator.limits import SECOND, duration_of
from scripts.claude_simulator.settings import Service

SHORT_HASH: Final = 12
REFUSAL_TOKENS: Final = 4
FORCED_TOOL: Final = ("any", "tool")
THINKING_ON: Final = ("enabled", "adaptive")
_NORMAL: Final = NormalDist()
_WORDS: Final = """
    the water waits behind the gate until the level is right and then it flows on as fast as the
    river allows so every barge that came in order leaves in order and nobody at the lock counts a
    barge twice while the keeper writes each passage into the book with its hour and its load
""".split()  # noqa: SIM905  # a list of single words would fill a page
_LOOP_WORDS: Final = 4096
_LOOP: Final = [_WORDS[index * 7 % len(_WORDS)] for index in range(_LOOP_WORDS)]


def params_hash(params: dict[str, Any]) -> str:
    """Return the SHA-256 of the params as sorted, compact JSON without `stream`, in hex.

    It is the identity of a request body everywhere in the simulator: neither the order of keys nor
    blanks count.
    """
    if "stream" in params:
        params = {key: value for key, value in params.items() if key != "stream"}
    canonical = json.dumps(params, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def chances(seed: int, content_hash: str, nth: int = 0) -> tuple[float, ...]:
    """Return eight draws from (0, 1) that depend on seed, content and the call's number only."""
    key = seed.to_bytes(16, "big", signed=True)
    digest = hashlib.blake2b(f"{content_hash}:{nth}".encode(), key=key, digest_size=64).digest()
    return tuple(((number >> 12) + 0.5) / (1 << 52) for number in struct.unpack(">8Q", digest))


def lognormal(median: float, sigma: float, chance: float) -> float:
    """Return the value of a lognormal distribution at that chance; the median where sigma is 0."""
    if sigma == 0 or median == 0:
        return median
    return median * math.exp(sigma * _NORMAL.inv_cdf(chance))


@dataclass(frozen=True, slots=True)
class Plan:
    """How long an answer takes and how long it is."""

    first_token_after: int  # nanoseconds
    output_tokens: int
    millitokens_per_second: int | None
    truncated: bool

    @property
    def duration(self) -> int:
        """Nanoseconds from the call's start to its last token."""
        return self.first_token_after + duration_of(self.output_tokens, self.millitokens_per_second)


@dataclass(frozen=True, slots=True)
class Planned:
    """What the answer to a call that reached the model will be."""

    kind: str
    plan: Plan
    message_id: str


def plan(
    service: Service, script: Script, max_tokens: int, draws: tuple[float, ...], kind: str
) -> Plan:
    """Plan an answer from the service model, what the marker sets, and the draws of its content."""
    wanted = script.settings
    first = wanted.get("slow")
    if first is None:
        first = lognormal(service.ttft_seconds, service.ttft_sigma, draws[0])
    speed = wanted.get("tps", service.tokens_per_second)
    if "tokens" in wanted:
        asked = round(wanted["tokens"])
    elif kind == "refusal":
        asked = REFUSAL_TOKENS
    else:
        length = lognormal(service.output_tokens, service.output_tokens_sigma, draws[1])
        asked = max(1, round(length))
    return Plan(
        first_token_after=round(first * SECOND),
        output_tokens=min(asked, max_tokens),
        millitokens_per_second=round(speed * 1000) or None if speed else None,
        truncated=asked > max_tokens,
    )


def kind_of(params: dict[str, Any], script: Script, rates: dict[str, float], chance: float) -> str:
    """Return the kind of answer: forced, drawn, asked for by the request, or `text`."""
    forced = script.kind or drawn(rates, chance)
    if forced is not None:
        return forced
    choice = params.get("tool_choice")
    if params.get("tools") and isinstance(choice, dict) and choice.get("type") in FORCED_TOOL:
        return "tool_use"
    thinking = params.get("thinking")
    if isinstance(thinking, dict) and thinking.get("type") in THINKING_ON:
        return "thinking"
    return "text"


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: its content blocks and how it ended."""

    blocks: tuple[dict[str, Any], ...]
    stop_reason: str
    stop_details: dict[str, Any] | None
    thinking_tokens: int


def compose(params: dict[str, Any], content_hash: str, planned: Plan, kind: str) -> Answer:
    """Write the answer of that kind and length."""
    short = content_hash[:SHORT_HASH]
    stop_reason = "max_tokens" if planned.truncated else "end_turn"
    if params["max_tokens"] == 0:
        return Answer((), "max_tokens", None, 0)
    if kind == "refusal":
        details = {
            "type": "refusal",
            "category": "general_harms",
            "explanation": f"The simulator was configured to refuse {short}.",
        }
        return Answer((), "refusal", details, 0)
    blocks: list[dict[str, Any]] = []
    thinking_tokens = 0
    if kind in {"thinking", "redacted_thinking"}:
        thinking_tokens = planned.output_tokens // 2
        blocks.append(_thinking(params, content_hash, thinking_tokens, kind))
    blocks.append(
        {"type": "text", "text": fake_text(content_hash, planned.output_tokens - thinking_tokens)}
    )
    if kind == "tool_use":
        blocks.append(
            {
                "type": "tool_use",
                "id": f"toolu_{content_hash[:24]}",
                "name": _tool_name(params),
                "input": {"answer": short},
            }
        )
        stop_reason = "tool_use"
    return Answer(tuple(blocks), stop_reason, None, thinking_tokens)


def fake_text(content_hash: str, tokens: int) -> str:
    """Return text of about so many words that begins with the short hash of what it answers."""
    head = f"Answer {content_hash[:SHORT_HASH]}:"
    count = max(1, tokens - 2)
    start = int(content_hash[:3], 16)  # 0 to 4095: where in the loop of words this answer begins
    words = _LOOP[start : start + count]
    while len(words) < count:
        words = words + _LOOP[: count - len(words)]
    return f"{head} {' '.join(words)}."


def _thinking(params: dict[str, Any], content_hash: str, tokens: int, kind: str) -> dict[str, Any]:
    opaque = base64.b64encode(bytes.fromhex(content_hash)).decode()
    if kind == "redacted_thinking":
        return {"type": "redacted_thinking", "data": f"Erkf{opaque}"}
    form = params.get("thinking")
    omitted = isinstance(form, dict) and form.get("display") == "omitted"
    text = "" if omitted else f"Let me think about it: {fake_text(content_hash, tokens)}"
    return {"type": "thinking", "thinking": text, "signature": f"EuYB{opaque}"}


def _tool_name(params: dict[str, Any]) -> str:
    choice = params.get("tool_choice")
    if isinstance(choice, dict) and isinstance(choice.get("name"), str):
        return str(choice["name"])
    tools = params.get("tools") or [{}]
    return str(tools[0].get("name", "simulated_tool"))


def usage(
    tokens: InputTokens, output_tokens: int, thinking_tokens: int, tier: str
) -> dict[str, Any]:
    """Return the usage object of an answer of that service tier."""
    found: dict[str, Any] = {
        "input_tokens": tokens.uncached,
        "cache_creation_input_tokens": tokens.written,
        "cache_read_input_tokens": tokens.read,
        "cache_creation": {
            "ephemeral_5m_input_tokens": tokens.written_5m,
            "ephemeral_1h_input_tokens": tokens.written_1h,
        },
        "output_tokens": output_tokens,
        "service_tier": tier,
        "inference_geo": "global",
    }
    if thinking_tokens:
        found["output_tokens_details"] = {"thinking_tokens": thinking_tokens}
    return found


def message(message_id: str, model: str, answer: Answer, usage: dict[str, Any]) -> dict[str, Any]:
    """Return the Message object as the API would send it."""
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": list(answer.blocks),
        "stop_reason": answer.stop_reason,
        "stop_sequence": None,
        "stop_details": answer.stop_details,
        "container": None,
        "usage": usage,
    }
