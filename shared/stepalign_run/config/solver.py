"""The sections of the solver and of evaluations."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from stepalign_run.config.base import SamplingSection
from stepalign_run.fields import Temperature


class SolverSection(SamplingSection):
    batch: Annotated[int, Field(ge=1)] = 32
    """Completions sampled together."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 2048
    """A longer question is refused, never cut."""
    merge_adapter: bool = True
    """Add the adapter to the weights for sampling: faster, exact in float32 only."""


class EvaluationSection(SamplingSection):
    temperature: Temperature = 1.0
    """Sampling temperature of evaluations, reported with the figures."""
    samples: Annotated[int, Field(ge=1)] = 12
    """Completions per problem: n of Avg@k, Maj@k and Pass@k, with k = n."""
    every: Annotated[int, Field(ge=1)] = 10
    """Steps between evaluated checkpoints."""
    batch: Annotated[int, Field(ge=1)] = 64
    """Completions sampled together."""
