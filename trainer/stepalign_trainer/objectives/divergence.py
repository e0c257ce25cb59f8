"""Student and teacher on the same tokens: divergences, advantages, and losses in chunks.

Source: Kara and Ersoy, arXiv 2606.11173; the direction follows OPSD, whose code computes ``KL(teacher ‖ student)``::

    KL( π_θ0(·|x, c, y_<t) ‖ π_θ(·|x, y_<t) )                              over the full vocabulary, EOS included
    A_t = log π_θ0(ŷ_t|x, c, y_<t) − log π_θ(ŷ_t|x, y_<t)                  the per-token advantage, a diagnostic

Logits are not divided by the sampling temperature.

Student and teacher share the output head (adapters never sit on ``lm_head``), so losses take *hidden states* and
logits are made for a chunk of tokens at a time; each chunk is recomputed in the backward pass, so memory does not grow
with vocabulary × tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from stepalign.errors import NonFiniteError

Head = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states ``[T, H]`` → logits ``[T, V]``."""


@dataclass(frozen=True)
class Predictions:
    """Predictions of student and teacher for a chunk of tokens; all but ``teacher`` carry gradients to the student."""

    student: torch.Tensor
    """Log-probabilities ``[T, V]`` in float32."""
    teacher: torch.Tensor
    """The same of the teacher."""
    logprob: torch.Tensor
    """Log-probability of the completion's token under the student, ``[T]``."""
    kl: torch.Tensor
    """``KL(teacher ‖ student)``, ``[T]``."""


TokenLoss = Callable[[Predictions, slice], torch.Tensor]
"""Losses ``[T]`` of the tokens in the slice."""


@dataclass(frozen=True)
class TokenTerms:
    """Per-token values, each ``[T]`` in nats; only ``loss`` carries gradients, to the student's hidden states."""

    loss: torch.Tensor
    kl: torch.Tensor
    reverse_kl: torch.Tensor
    advantage: torch.Tensor
    entropy: torch.Tensor
    logprob: torch.Tensor
    signal: torch.Tensor
    """1 where the objective pushes the token somewhere, else 0."""


def forward_kl(teacher_logprobs: torch.Tensor, student_logprobs: torch.Tensor) -> torch.Tensor:
    """``KL(teacher ‖ student)`` of each row. Log-probabilities ``[T, V]`` → ``[T]``."""
    return torch.nn.functional.kl_div(student_logprobs, teacher_logprobs, reduction="none", log_target=True).sum(-1)


def reverse_kl(teacher_logprobs: torch.Tensor, student_logprobs: torch.Tensor) -> torch.Tensor:
    """``KL(student ‖ teacher)`` of each row. Log-probabilities ``[T, V]`` → ``[T]``."""
    return forward_kl(student_logprobs, teacher_logprobs)


def predict(student_logits: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor) -> Predictions:
    """From logits ``[T, V]`` of any float type, and token ids ``[T]``."""
    student = student_logits.float().log_softmax(-1)
    teacher = teacher_logits.float().log_softmax(-1)
    logprob = student.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return Predictions(student, teacher, logprob, forward_kl(teacher, student))


def token_terms(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Head,
    chunk: int,
    token_loss: TokenLoss,
    signal: TokenLoss,
) -> TokenTerms:
    """Loss, divergences, advantage and student entropy of every completion token.

    Args:
        student_hidden: ``[T, H]``, the positions that predict the completion's tokens.
        teacher_hidden: ``[T, H]``, the same under the teacher's prompt; no gradient flows into it.
        targets: ``[T]``, the completion's token ids.
        head: the shared output head.
        chunk: tokens whose logits exist at once.
        token_loss: the objective's loss of each token.
        signal: which tokens the objective pushes somewhere.

    Raises ValueError when the lengths differ, and NonFiniteError on a value that is not finite: a missing
    log-probability is an error, never a zero.
    """
    if not len(student_hidden) == len(teacher_hidden) == len(targets):
        raise ValueError(
            f"student, teacher and targets must align token by token, got {len(student_hidden)}, "
            f"{len(teacher_hidden)} and {len(targets)}"
        )

    def terms(
        student: torch.Tensor, teacher: torch.Tensor, chosen: torch.Tensor, start: int
    ) -> tuple[torch.Tensor, ...]:
        predictions = predict(head(student), head(teacher), chosen)
        tokens = slice(start, start + len(chosen))
        loss = token_loss(predictions, tokens)
        with torch.no_grad():
            theirs = predictions.teacher.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
            entropy = -(predictions.student.exp() * predictions.student).sum(-1)
            backward = reverse_kl(predictions.teacher, predictions.student)
        ours = predictions.logprob.detach()
        pushed = signal(predictions, tokens).detach().to(ours.device)
        return loss, predictions.kl.detach(), backward, theirs - ours, entropy, ours, pushed

    parts = [
        checkpoint(
            terms,
            student_hidden[start : start + chunk],
            teacher_hidden[start : start + chunk].detach(),
            targets[start : start + chunk],
            start,
            use_reentrant=False,
        )
        for start in range(0, len(targets), chunk)
    ]
    gathered = TokenTerms(*(torch.cat(values) for values in zip(*parts, strict=True)))
    for name in ("loss", "kl", "advantage", "entropy"):
        if not torch.isfinite(getattr(gathered, name)).all():
            raise NonFiniteError(f"the {name} of a token is not finite")
    return gathered
