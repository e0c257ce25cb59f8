"""Rollouts: the solver publishes them, the trainer trains on them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stepalign.fields import Identifier, TokenId, WellFormed
from stepalign.types import SCHEMA_VERSION, FinishReason, Problem, Wire
from stepalign_run.fields import (
    CompletionTokens,
    LogProbability,
    RunName,
    SampleSeed,
    Temperature,
    TopK,
    TopP,
    Version,
)


class SamplingParameters(Wire):
    """How completions are sampled. ``top_p = 1`` and ``top_k = 0`` switch the filters off."""

    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    max_new_tokens: CompletionTokens
    seed: SampleSeed


class Rollout(Wire):
    """One sampled solution. The token ids are the truth; ``text`` is their decoding without EOS, never re-tokenized.

    ``behaviour_logprobs`` are the natural-log probabilities of the completion tokens under the policy that sampled
    them, at the sampling temperature and after its filters.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    run_id: RunName
    rollout_id: Identifier
    group_id: Identifier
    problem: Problem
    policy_version: Version
    prompt_token_ids: Annotated[list[TokenId], Field(min_length=1)]
    completion_token_ids: Annotated[list[TokenId], Field(min_length=1)]
    text: WellFormed
    finish_reason: FinishReason
    sampling: SamplingParameters
    behaviour_logprobs: list[LogProbability] | None = None

    @model_validator(mode="after")
    def _lengths_agree(self) -> Rollout:
        if self.behaviour_logprobs is not None and len(self.behaviour_logprobs) != len(self.completion_token_ids):
            raise ValueError("behaviour_logprobs must hold one value per completion token; none may be missing")
        return self
