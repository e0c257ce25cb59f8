"""The self-distillation loss: forward KL over the full vocabulary, teacher first.

Source: Kara and Ersoy, arXiv 2606.11173; the direction follows OPSD, whose code computes ``KL(teacher ‖ student)``::

    L = 1/|M| · Σ_{t ∈ M} KL( π_θ0(·|x, c, y_<t) ‖ π_θ(·|x, y_<t) )        M: tokens in scope, EOS included
    A_t = log π_θ0(ŷ_t|x, c, y_<t) − log π_θ(ŷ_t|x, y_<t)                  the per-token advantage, a diagnostic

Deviations: none in the formula. Logits are not divided by the sampling temperature. The sum is divided by the token
count of the whole batch by the caller, so the loss does not depend on how the batch is split.

Student and teacher share the output head (adapters never sit on ``lm_head``), so the loss takes *hidden states* and
makes logits for a chunk of tokens at a time; each chunk is recomputed in the backward pass, so memory does not grow
with vocabulary × tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

Head = Callable[[torch.Tensor], torch.Tensor]
"""Hidden states ``[T, H]`` → logits ``[T, V]``."""


@dataclass(frozen=True)
class TokenTerms:
    """Per-token values, each ``[T]`` in nats; only ``kl`` carries gradients, to the student's hidden states."""

    kl: torch.Tensor
    advantage: torch.Tensor
    entropy: torch.Tensor


def forward_kl(teacher_logits: torch.Tensor, student_logits: torch.Tensor) -> torch.Tensor:
    """``KL(teacher ‖ student)`` of each row. Logits ``[T, V]`` of any float type, computed in float32 → ``[T]``."""
    teacher = teacher_logits.float().log_softmax(-1)
    student = student_logits.float().log_softmax(-1)
    return torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def _chunk_terms(
    student_hidden: torch.Tensor, teacher_hidden: torch.Tensor, targets: torch.Tensor, head: Head
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student_logits, teacher_logits = head(student_hidden), head(teacher_hidden)
    kl = forward_kl(teacher_logits, student_logits)
    with torch.no_grad():
        student = student_logits.float().log_softmax(-1)
        teacher = teacher_logits.float().log_softmax(-1)
        chosen = targets.unsqueeze(-1)
        advantage = (teacher.gather(-1, chosen) - student.gather(-1, chosen)).squeeze(-1)
        entropy = -(student.exp() * student).sum(-1)
    return kl, advantage, entropy


def token_terms(
    student_hidden: torch.Tensor, teacher_hidden: torch.Tensor, targets: torch.Tensor, head: Head, chunk: int
) -> TokenTerms:
    """KL, advantage and student entropy of every completion token.

    Args:
        student_hidden: ``[T, H]``, the positions that predict the completion's tokens.
        teacher_hidden: ``[T, H]``, the same under the teacher's prompt; no gradient flows into it.
        targets: ``[T]``, the completion's token ids.
        head: the shared output head.
        chunk: tokens whose logits exist at once.

    Raises ValueError when the lengths differ, and FloatingPointError on a value that is not finite: a missing
    log-probability is an error, never a zero.
    """
    if not len(student_hidden) == len(teacher_hidden) == len(targets):
        raise ValueError(
            f"student, teacher and targets must align token by token, got {len(student_hidden)}, "
            f"{len(teacher_hidden)} and {len(targets)}"
        )
    parts = [
        checkpoint(
            _chunk_terms,
            student_hidden[start : start + chunk],
            teacher_hidden[start : start + chunk].detach(),
            targets[start : start + chunk],
            head,
            use_reentrant=False,
        )
        for start in range(0, len(targets), chunk)
    ]
    kl, advantage, entropy = (torch.cat(values) for values in zip(*parts, strict=True))
    for name, values in (("KL", kl), ("advantage", advantage), ("entropy", entropy)):
        if not torch.isfinite(values).all():
            raise FloatingPointError(f"the {name} of a token is not finite; the update was not applied")
    return TokenTerms(kl=kl, advantage=advantage, entropy=entropy)
