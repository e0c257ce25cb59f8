"""The update against a straightforward computation, and what it must not touch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from stepalign.errors import ConfigError, NonFiniteError
from stepalign_trainer.batch.examples import Example
from stepalign_trainer.batch.scope import TokenGroups
from stepalign_trainer.update.learner import Learner
from support.numeric import assert_close_to_norm

pytestmark = pytest.mark.numeric

MakeLearner = Callable[..., Learner]
UNCLIPPED = ("--trainer.max_grad_norm", "1e9")
ROUNDING = 2e-5
"""Of a gradient's norm. Rounding is a tenth of it; a scope that is one token longer moves it by more than 1e-2."""


def reference_logits(learner: Learner, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Through the whole model, one unpadded sequence at a time."""
    logits = learner.model(input_ids=torch.tensor([prompt + completion])).logits
    return logits[0, len(prompt) - 1 : -1].double()


def distributions(learner: Learner, example: Example) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities ``[T, V]`` of teacher and student."""
    with torch.no_grad(), learner.model.disable_adapter():
        teacher = reference_logits(learner, example.teacher_prompt, example.completion).log_softmax(-1)
    return teacher, reference_logits(learner, example.student_prompt, example.completion).log_softmax(-1)


def token_kl(learner: Learner, example: Example) -> torch.Tensor:
    teacher, student = distributions(learner, example)
    return (teacher.exp() * (teacher - student)).sum(-1)


def reference_loss(learner: Learner, examples: list[Example]) -> torch.Tensor:
    total = sum(example.groups.in_scope for example in examples)
    return sum(token_kl(learner, e)[: e.groups.in_scope].sum() for e in examples) / total  # pyright: ignore


def gradients(learner: Learner) -> list[torch.Tensor]:
    return [p.grad.clone() for p in learner.parameters if p.grad is not None]


def snapshot(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in learner.model.state_dict().items()}


def scoped(example: Example, tokens: int) -> Example:
    return replace(example, groups=TokenGroups(in_scope=tokens, first_error=None))


def test_loss_and_gradient_are_those_of_the_full_computation(
    make_learner: MakeLearner, examples: list[Example]
) -> None:
    reference = make_learner(stirred=True)
    loss = reference_loss(reference, examples)
    loss.backward()
    learner = make_learner(*UNCLIPPED, "--trainer.micro_batch", "2", stirred=True)
    metrics = learner.update(examples)
    assert loss.item() > 0.1
    assert metrics.loss == pytest.approx(loss.item(), rel=1e-5)
    assert_close_to_norm(gradients(learner), gradients(reference), ROUNDING)
    norm = torch.cat([g.flatten() for g in gradients(reference)]).norm().item()
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("micro_batch", ["1", "2"])
def test_the_loss_does_not_depend_on_how_the_batch_is_split(
    make_learner: MakeLearner, examples: list[Example], micro_batch: str
) -> None:
    whole, split = (
        make_learner(*UNCLIPPED, stirred=True),
        make_learner(*UNCLIPPED, "--trainer.micro_batch", micro_batch, "--trainer.logit_chunk", "5", stirred=True),
    )
    expected, metrics = whole.update(examples), split.update(examples)
    assert metrics.loss == pytest.approx(expected.loss, rel=1e-5)
    assert_close_to_norm(gradients(split), gradients(whole), ROUNDING)


def test_the_loss_does_not_depend_on_the_order(make_learner: MakeLearner, examples: list[Example]) -> None:
    forward, backward = (make_learner("--trainer.micro_batch", "2", stirred=True) for _ in range(2))
    expected, metrics = forward.update(examples), backward.update(examples[::-1])
    assert metrics.loss == pytest.approx(expected.loss, rel=1e-5)
    assert metrics.kl_all_tokens == pytest.approx(expected.kl_all_tokens, rel=1e-5)


def test_tokens_outside_the_scope_get_no_gradient(
    make_learner: MakeLearner, example_of: Callable[..., Example]
) -> None:
    """The update equals that of a completion which ends where the scope ends."""
    whole = example_of("wrong_step")
    assert (whole.groups.in_scope, len(whole.completion)) == (14, 32)
    cut = replace(whole, completion=whole.completion[:14])
    learners = [make_learner(*UNCLIPPED, stirred=True) for _ in range(2)]
    losses = [learner.update([example]).loss for learner, example in zip(learners, (whole, cut), strict=True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_close_to_norm(*map(gradients, learners), ROUNDING)


def test_eos_carries_loss(make_learner: MakeLearner, example_of: Callable[..., Example], tokenizer: Any) -> None:
    example = example_of("right")
    assert example.completion[-1] == tokenizer.eos_token_id and example.groups.in_scope == 32
    with_eos = make_learner(stirred=True).update([example]).loss
    without = make_learner(stirred=True).update([scoped(example, 31)]).loss
    at_eos = token_kl(make_learner(stirred=True), example)[-1].item()
    # Two sums of 32 tokens are subtracted: rounding is relative to them, not to what is left.
    rounding = 1e-6 * 32 * with_eos
    assert at_eos > 10 * rounding
    assert 32 * with_eos - 31 * without == pytest.approx(at_eos, abs=rounding)


def test_only_the_adapter_is_trained(make_learner: MakeLearner, examples: list[Example]) -> None:
    learner = make_learner()
    before = snapshot(learner)
    learner.update(examples)
    learner.update(examples)
    assert all(("lora_" in name) == p.requires_grad for name, p in learner.model.named_parameters())
    assert all(p.grad is None for p in learner.model.parameters() if not p.requires_grad)
    changed = {name for name, value in learner.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_the_teacher_stays_the_initial_policy(make_learner: MakeLearner, examples: list[Example]) -> None:
    learner = make_learner()
    example = examples[0]
    with learner.teacher():
        before = learner.logits(example.teacher_prompt, example.completion)
    student = learner.logits(example.student_prompt, example.completion)
    learner.update(examples)
    with learner.teacher():
        assert torch.equal(learner.logits(example.teacher_prompt, example.completion), before)
    assert not torch.allclose(learner.logits(example.student_prompt, example.completion), student, atol=1e-3)


def test_the_adapter_is_on_again_after_an_exception_in_the_teacher(
    make_learner: MakeLearner, examples: list[Example]
) -> None:
    learner = make_learner(stirred=True)
    example = examples[0]
    student = learner.logits(example.student_prompt, example.completion)
    with pytest.raises(RuntimeError, match="out of memory"), learner.teacher():
        assert not torch.allclose(learner.logits(example.student_prompt, example.completion), student, atol=1e-3)
        raise RuntimeError("out of memory")
    after = learner.logits(example.student_prompt, example.completion)
    assert torch.equal(after, student) and after.requires_grad


def test_teacher_equals_student_until_the_first_update(make_learner: MakeLearner, examples: list[Example]) -> None:
    learner = make_learner()
    check = examples[0].student_prompt, examples[0].completion
    learner.check_teacher_is_student(*check)
    learner.update(examples)
    with pytest.raises(ConfigError, match="differs from the fresh student"):
        learner.check_teacher_is_student(*check)


@pytest.mark.parametrize("nothing", ["no example", "no token in scope"])
def test_an_update_on_nothing_changes_nothing(make_learner: MakeLearner, examples: list[Example], nothing: str) -> None:
    learner = make_learner()
    learner.update(examples)  # so that the optimizer has momentum
    before, optimizer = snapshot(learner), learner.optimizer.state_dict()["state"]
    steps = [state["step"].item() for state in optimizer.values()]
    metrics = learner.update([] if nothing == "no example" else [scoped(e, 0) for e in examples])
    assert (metrics.loss, metrics.grad_norm, metrics.tokens_in_scope) == (0.0, 0.0, 0)
    assert all(torch.equal(value, before[name]) for name, value in learner.model.state_dict().items())
    assert [state["step"].item() for state in learner.optimizer.state_dict()["state"].values()] == steps


def test_values_that_are_not_finite_stop_the_update_before_the_weights(
    make_learner: MakeLearner, examples: list[Example]
) -> None:
    learner = make_learner()
    with torch.no_grad():
        learner.parameters[0].fill_(torch.nan)
    before = snapshot(learner)
    with pytest.raises(NonFiniteError, match="not finite"):
        learner.update(examples)
    for name, value in learner.model.state_dict().items():
        assert torch.equal(value.nan_to_num(nan=9.0), before[name].nan_to_num(nan=9.0))


def test_updates_on_one_example_bring_the_student_to_its_teacher(
    make_learner: MakeLearner, example_of: Callable[..., Example]
) -> None:
    learner = make_learner("--trainer.learning_rate", "5e-3")
    example = example_of("wrong_step")
    losses = [learner.update([example]).loss for _ in range(12)]
    assert losses[-1] < 0.5 * losses[0]


def test_gradients_are_scaled_down_to_the_configured_norm(make_learner: MakeLearner, examples: list[Example]) -> None:
    learner = make_learner("--trainer.max_grad_norm", "0.01", stirred=True)
    metrics = learner.update(examples)
    assert metrics.grad_norm > 0.02  # as it was
    assert torch.cat([g.flatten() for g in gradients(learner)]).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_metrics_count_tokens_and_group_advantages(
    make_learner: MakeLearner, example_of: Callable[..., Example]
) -> None:
    batch = [example_of("wrong_step"), example_of("unfinished", "length")]
    fresh = make_learner(stirred=True)
    metrics = make_learner(stirred=True).update(batch)
    advantages, entropies, kls = [], [], []
    for example in batch:
        teacher, student = distributions(fresh, example)
        chosen = torch.tensor(example.completion).unsqueeze(-1)
        advantages.append((teacher.gather(-1, chosen) - student.gather(-1, chosen)).squeeze(-1).detach())
        entropies.append(-(student.exp() * student).sum(-1).detach())
        kls.append(token_kl(fresh, example).detach())
    # The wrong step's result is token 12 of 32; the other attempt (10 tokens) has no error.
    correct = torch.cat([advantages[0][:12], advantages[1]])
    assert metrics.advantage_correct == pytest.approx(correct.mean().item(), abs=1e-4)
    assert metrics.advantage_correct_below == pytest.approx((correct < -0.1).double().mean().item())
    assert metrics.advantage_at_error == pytest.approx(advantages[0][12].item(), abs=1e-3)
    assert metrics.advantage_after_error == pytest.approx(advantages[0][13:].mean().item(), abs=1e-3)
    assert metrics.first_token_kl == pytest.approx(torch.stack([kls[0][0], kls[1][0]]).mean().item(), abs=1e-4)
    assert metrics.kl_all_tokens == pytest.approx(torch.cat(kls).mean().item(), abs=1e-4)
    assert metrics.entropy == pytest.approx(torch.cat(entropies).mean().item(), abs=1e-4)
    assert (metrics.tokens, metrics.tokens_in_scope, metrics.trained_rollouts) == (42, 24, 2)
    assert (metrics.mean_tokens, metrics.truncated) == (21.0, 0.5)


def test_the_critique_leaves_correct_tokens_alone_and_speaks_at_the_error(
    make_learner: MakeLearner, example_of: Callable[..., Example]
) -> None:
    """The paper's picture, on the shipped solver before any training."""
    metrics = make_learner().update([example_of("wrong_step")])
    assert metrics.advantage_correct is not None and abs(metrics.advantage_correct) < 0.5
    assert metrics.advantage_at_error is not None and metrics.advantage_at_error < -3


def test_a_folder_without_a_model_is_a_configuration_error(make_learner: MakeLearner, tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="there is no model there"):
        make_learner("--model.path", str(tmp_path / "nowhere"))
