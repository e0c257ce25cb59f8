"""The loss against values worked out by hand, and the guards around it."""

import math

import pytest
import torch

from stepalign.errors import NonFiniteError
from stepalign_trainer.objectives.divergence import (
    Predictions,
    TokenTerms,
    forward_kl,
    predict,
    reverse_kl,
    token_terms,
)
from support.numeric import assert_close_to_norm

pytestmark = pytest.mark.numeric


def logits(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def terms_of(
    student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, head: torch.nn.Module, chunk: int
) -> TokenTerms:
    """With the KL as the loss."""

    def all_of(predictions: Predictions, tokens: slice) -> torch.Tensor:
        return torch.ones(len(predictions.kl))

    return token_terms(student, teacher, targets, head, chunk, lambda predictions, _: predictions.kl, all_of)


def test_forward_kl_by_hand() -> None:
    # KL(t ‖ s) with t = (1/2, 1/4, 1/4), s = (1/4, 1/2, 1/4): 1/2·ln 2 + 1/4·ln(1/2) = 1/4·ln 2
    value = forward_kl(logits([0.5, 0.25, 0.25]), logits([0.25, 0.5, 0.25]))
    assert value.tolist() == pytest.approx([0.25 * math.log(2)], rel=1e-5)


def test_the_teacher_comes_first() -> None:
    teacher, student = logits([0.9, 0.1]), logits([0.5, 0.5])
    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    reverse = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert forward_kl(teacher, student).item() == pytest.approx(forward, rel=1e-5)
    assert forward_kl(student, teacher).item() == pytest.approx(reverse, rel=1e-5)
    assert reverse_kl(teacher, student).item() == pytest.approx(reverse, rel=1e-5)


def test_logits_need_no_normalisation() -> None:
    teacher, student = logits([0.9, 0.1]), logits([0.5, 0.5])
    predictions = predict(student - 3, teacher + 5, torch.tensor([1]))
    expected = [forward_kl(teacher, student), student, teacher]
    assert_close_to_norm([predictions.kl, predictions.student, predictions.teacher], expected, 1e-5)
    assert predictions.logprob.item() == pytest.approx(math.log(0.5), rel=1e-5)


def test_terms_by_hand_through_the_head() -> None:
    head = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.eye(2))
    student, teacher = logits([0.5, 0.5], [0.2, 0.8]), logits([0.9, 0.1], [0.2, 0.8])
    terms = terms_of(student.requires_grad_(), teacher, torch.tensor([0, 1]), head, chunk=1)
    first = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert terms.kl.tolist() == pytest.approx([first, 0.0], abs=1e-6)
    backward = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert terms.reverse_kl.tolist() == pytest.approx([backward, 0.0], abs=1e-6)
    assert terms.logprob.tolist() == pytest.approx([math.log(0.5), math.log(0.8)], rel=1e-5)
    assert terms.advantage.tolist() == pytest.approx([math.log(0.9 / 0.5), 0.0], abs=1e-6)
    entropy = [math.log(2), -(0.2 * math.log(0.2) + 0.8 * math.log(0.8))]
    assert terms.entropy.tolist() == pytest.approx(entropy, rel=1e-5)


def test_the_gradient_is_student_minus_teacher_whatever_the_chunk() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(4, 7, bias=False)
    hidden, teacher = torch.randn(5, 4), torch.randn(5, 4)
    targets = torch.tensor([0, 1, 2, 3, 4])
    gradients = []
    for chunk in (1, 2, 5, 100):
        student = hidden.clone().requires_grad_()
        terms_of(student, teacher, targets, head, chunk).loss.sum().backward()
        assert student.grad is not None
        gradients.append(student.grad)
    expected = (head(hidden).softmax(-1) - head(teacher).softmax(-1)) @ head.weight
    for gradient in gradients:
        assert_close_to_norm([gradient], [expected], 1e-5)


def test_no_gradient_reaches_the_teacher() -> None:
    head = torch.nn.Linear(3, 4, bias=False)
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    terms_of(student, teacher, torch.tensor([0, 1]), head, chunk=2).loss.sum().backward()
    assert teacher.grad is None and student.grad is not None


def test_a_missing_log_probability_is_an_error() -> None:
    head = torch.nn.Identity()
    broken = torch.tensor([[0.0, float("nan")]])
    with pytest.raises(NonFiniteError, match="not finite"):
        terms_of(torch.zeros(1, 2), broken, torch.tensor([0]), head, chunk=8)
    impossible = torch.tensor([[0.0, -torch.inf]])
    with pytest.raises(NonFiniteError, match="not finite"):
        terms_of(torch.zeros(1, 2), impossible, torch.tensor([1]), head, chunk=8)


def test_misaligned_tokens_are_an_error() -> None:
    with pytest.raises(ValueError, match="token by token"):
        terms_of(torch.zeros(2, 2), torch.zeros(1, 2), torch.tensor([0, 1]), torch.nn.Identity(), chunk=8)
