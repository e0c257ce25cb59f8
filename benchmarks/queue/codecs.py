"""The time to turn a rollout into bytes and back, by library.

``pydantic`` is the queue's codec: every field is validated on the way in. ``orjson`` writes and reads the JSON, and
pydantic validates the result, so it is as strict. ``msgspec`` checks types by a struct of its own, and no other rule of
the wire type (bounds, lengths that must agree, unknown fields): less than the queue promises.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import orjson

from stepalign_run.queue.codec import decode, encode
from stepalign_run.rollout import Rollout


class _Sampling(msgspec.Struct):
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    seed: int


class _Problem(msgspec.Struct):
    id: str
    question: str
    answer: str
    reference_solution: str | None
    source: str | None
    metadata: dict[str, Any]


class _Rollout(msgspec.Struct):
    schema_version: int
    run_id: str
    rollout_id: str
    group_id: str
    problem: _Problem
    policy_version: int
    prompt_token_ids: list[int]
    completion_token_ids: list[int]
    text: str
    finish_reason: str
    sampling: _Sampling
    behaviour_logprobs: list[float] | None


_decode_struct = msgspec.json.Decoder(_Rollout).decode
CODECS: dict[str, tuple[Callable[[Rollout], bytes], Callable[[bytes], Any]]] = {
    "pydantic": (encode, decode),
    "orjson": (
        lambda rollout: orjson.dumps(rollout.model_dump(mode="json")),
        lambda payload: Rollout.model_validate(orjson.loads(payload)),
    ),
    "msgspec": (lambda rollout: msgspec.json.encode(rollout.model_dump()), _decode_struct),
}


def measure_codecs(rollouts: Sequence[Rollout], rounds: int = 7) -> dict[str, dict[str, float]]:
    """Microseconds per rollout for ``encode`` and ``decode``, medians over rounds in which the codecs take turns."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"encode": [], "decode": []} for name in CODECS}
    for _ in range(rounds):
        for name, (write, read) in CODECS.items():
            begin = time.perf_counter()
            payloads = [write(rollout) for rollout in rollouts]
            written = time.perf_counter()
            for payload in payloads:
                read(payload)
            seconds[name]["encode"].append(written - begin)
            seconds[name]["decode"].append(time.perf_counter() - written)
    return {
        name: {step: statistics.median(values) / len(rollouts) * 1e6 for step, values in of_codec.items()}
        for name, of_codec in seconds.items()
    }
