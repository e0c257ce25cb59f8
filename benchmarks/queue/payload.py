"""Rollouts of about 8 KB: token ids, a text of words, log-probabilities, no two alike."""

from __future__ import annotations

import random

from stepalign.types import FinishReason, Problem
from stepalign_run.rollout import Rollout, SamplingParameters

_WORDS = ["step", "the", "sum", "of", "is", "so", "we", "have", "then", "carry", "multiply", "by", "remainder", "total"]
_PROMPT_TOKENS, _TOKENS, _TEXT_WORDS = 200, 380, 330


def rollouts(count: int, seed: int) -> list[Rollout]:
    """So many, each a group of its own."""
    return [_rollout(f"{seed}/{number}", random.Random(f"{seed} {number}")) for number in range(count)]


def _rollout(name: str, rng: random.Random) -> Rollout:
    ids = [rng.randrange(100, 150_000) for _ in range(_PROMPT_TOKENS + _TOKENS)]
    return Rollout(
        run_id="bench",
        rollout_id=name,
        group_id=name,
        problem=Problem(id=name, question=" ".join(rng.choices(_WORDS, k=60)), answer=str(rng.randrange(1000))),
        policy_version=0,
        prompt_token_ids=ids[:_PROMPT_TOKENS],
        completion_token_ids=ids[_PROMPT_TOKENS:],
        text=" ".join(rng.choices(_WORDS, k=_TEXT_WORDS)),
        finish_reason=FinishReason.STOP,
        sampling=SamplingParameters(temperature=1.1, max_new_tokens=2048, seed=rng.randrange(2**31)),
        behaviour_logprobs=[round(-rng.expovariate(2.0), 4) for _ in range(_TOKENS)],
    )
