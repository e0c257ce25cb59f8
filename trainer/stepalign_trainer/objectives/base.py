"""What is minimised: per-token losses, and the weight of each token in the batch.

The loss of a batch is ``Σ_t w_t · ℓ_t``. Weights are known before the first micro-batch, so the loss does not depend on
how the batch is split. Sources::

    forward_kl      ℓ_t = KL(π_θ0(·|x, c, y_<t) ‖ π_θ(·|x, y_<t)), w_t = 1/|M| in scope       arXiv 2606.11173
    grpo            ℓ_t = −min(r_t A, clip(r_t, 1−ε, 1+ε_high) A) + β KL(π_θ ‖ π_θ0)          arXiv 2402.03300
                    r_t = π_θ(y_t)/π_old(y_t); A from the rewards of the rollout's group
    fixed_negative  ℓ_t = −a · π_θ(y_t)/sg(π_θ(y_t)) where π_θ(y_t) < p, else 0               arXiv 2608.31046

GRPO's KL is the full-vocabulary one, not an estimate from the sampled token, and ``w_t`` is 1/(tokens of the batch)
(``token``) or 1/(rollouts · tokens of the rollout) (``sequence``). No logits are divided by the sampling temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from stepalign_trainer.batch.examples import Example
from stepalign_trainer.objectives.divergence import Predictions

SIGNAL_NATS = 0.01
"""A token whose teacher and student are closer than this is pushed nowhere worth mentioning."""


class Objective(Protocol):
    iterations: int
    """Optimizer steps on one batch."""
    floor: float | None
    """What no batch's loss falls below, None where there is no such value. At it there is nothing to learn."""

    def weights(self, examples: Sequence[Example]) -> list[torch.Tensor]:
        """The weight of each token of each example, ``[T_i]``, together 1; all zero for an empty batch."""
        ...

    def begin(self, examples: Sequence[Example], old_logprobs: torch.Tensor | None) -> None:
        """Take a micro-batch; ``old_logprobs [T]`` are those before the first optimizer step, None in that step."""
        ...

    def token_loss(self, predictions: Predictions, tokens: slice) -> torch.Tensor:
        """Losses ``[T]`` of the micro-batch's ``tokens``."""
        ...

    def signal(self, predictions: Predictions, tokens: slice) -> torch.Tensor:
        """Which of the ``tokens`` are pushed somewhere, ``[T]`` of 0 and 1."""
        ...


def _mean_weights(examples: Sequence[Example], normalisation: str) -> list[torch.Tensor]:
    total = sum(len(example.completion) for example in examples)
    sizes = [len(example.completion) for example in examples]
    return [torch.full((n,), 1 / (total if normalisation == "token" else len(examples) * n)) for n in sizes]
