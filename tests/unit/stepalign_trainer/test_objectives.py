"""GRPO and the fixed negative advantage against straightforward computations in float64, and by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from stepalign_run.config import FixedNegativeSection, GrpoSection
from stepalign_trainer.batch.examples import Example
from stepalign_trainer.batch.scope import TokenGroups
from stepalign_trainer.objectives.divergence import Predictions, predict
from stepalign_trainer.objectives.fixed_negative import FixedNegative
from stepalign_trainer.objectives.grpo import Grpo, group_advantages
from stepalign_trainer.update.learner import Learner
from support.numeric import relative_error

pytestmark = [pytest.mark.slow, pytest.mark.numeric]

MakeLearner = Callable[..., Learner]
GRPO = ("--run.arm", "grpo", "--trainer.batch", "8", "--arm.group_size", "4", "--trainer.max_grad_norm", "1e9")
CLIPPING = ("--arm.grpo.num_iterations", "2", "--trainer.learning_rate", "3e-3")
ADVANTAGES = [1.5, -0.5, 0.0, -0.7, 0.9]


class Double:
    """The learner's model in float64, through its own forward, one unpadded sequence at a time, with its own AdamW."""

    def __init__(self, learner: Learner) -> None:
        self.model = copy.deepcopy(learner.model).double()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learner.config.trainer.learning_rate, weight_decay=0.0)

    def logprobs(self, example: Example) -> torch.Tensor:
        logits = self.model(input_ids=torch.tensor([example.student_prompt + example.completion])).logits
        return logits[0, len(example.student_prompt) - 1 : -1].log_softmax(-1)

    def base_logprobs(self, example: Example) -> torch.Tensor:
        with torch.no_grad(), self.model.disable_adapter():
            return self.logprobs(example)

    def chosen(self, examples: Sequence[Example]) -> list[torch.Tensor]:
        return [self.logprobs(e)[range(len(e.completion)), e.completion].detach() for e in examples]

    def grpo(
        self, examples: Sequence[Example], old: Sequence[torch.Tensor], settings: GrpoSection
    ) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """The loss, each rollout's ratios, and the mean KL to the base over all tokens."""
        losses, ratios, kls = [], [], []
        low, high = 1 - settings.epsilon, 1 + (settings.epsilon_high or settings.epsilon)
        for example, old_chosen in zip(examples, old, strict=True):
            advantage = example.advantage
            assert advantage is not None
            student, base = self.logprobs(example), self.base_logprobs(example)
            ratio = (student[range(len(example.completion)), example.completion] - old_chosen).exp()
            # A gain is capped from above, a loss of probability from below.
            capped = ratio.clamp(max=high) if advantage > 0 else ratio.clamp(min=low)
            kl = (student.exp() * (student - base)).sum(-1)
            losses.append(settings.beta * kl - capped * advantage)
            ratios.append(ratio.detach())
            kls.append(kl.detach())
        if settings.normalisation == "sequence":
            loss = torch.stack([values.mean() for values in losses]).mean()
        else:
            loss = torch.cat(losses).mean()
        return loss, ratios, torch.cat(kls).mean()

    def step(self, loss: torch.Tensor) -> list[torch.Tensor]:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return [p.grad.clone() for p in self.parameters if p.grad is not None]


@pytest.fixture
def rewarded(examples: list[Example]) -> list[Example]:
    """Rollouts of different lengths with advantages of both signs and 0, as an arm without a teacher reads them."""
    return [
        replace(
            example,
            teacher_prompt=example.student_prompt,
            groups=TokenGroups(len(example.completion), None, aligned=False),
            advantage=advantage,
        )
        for example, advantage in zip(examples, ADVANTAGES, strict=True)
    ]


def gradients(learner: Learner) -> list[torch.Tensor]:
    return [p.grad.double() for p in learner.parameters if p.grad is not None]


def distance(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Of all values together, relative to ``theirs``."""
    return relative_error(*(torch.cat([value.flatten() for value in values]) for values in (ours, theirs)))


@pytest.mark.parametrize("micro_batch", ["2", "8"])
@pytest.mark.parametrize(("normalisation", "beta"), [("token", "0.05"), ("sequence", "0.7"), ("token", "0.0")])
def test_grpo_is_the_full_float64_computation_however_the_batch_is_split(
    make_learner: MakeLearner, rewarded: list[Example], normalisation: str, beta: str, micro_batch: str
) -> None:
    options = ("--arm.grpo.normalisation", normalisation, "--arm.grpo.beta", beta, "--trainer.logit_chunk", "7")
    learner = make_learner(*GRPO, *options, "--trainer.micro_batch", micro_batch, stirred=True)
    reference = Double(learner)
    loss, _, kl = reference.grpo(rewarded, reference.chosen(rewarded), learner.config.arm.grpo)
    expected = reference.step(loss)
    metrics = learner.update(rewarded)
    assert kl > 0.1  # the stirred student is not the base
    assert metrics.loss == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
    assert distance(gradients(learner), expected) < 1e-4
    assert metrics.of_objective["kl_to_base"] == pytest.approx(kl.item(), rel=1e-4)
    assert metrics.of_objective["clip_fraction"] == 0.0
    assert metrics.tokens_in_scope == metrics.tokens
    # All tokens but those of the rollout whose advantage is 0.
    assert metrics.signal_share == pytest.approx(1 - len(rewarded[2].completion) / metrics.tokens)


@pytest.mark.parametrize("high", [None, 1000.0])
def test_the_second_iteration_clips_against_the_policy_before_the_first(
    make_learner: MakeLearner, rewarded: list[Example], high: float | None
) -> None:
    options = () if high is None else ("--arm.grpo.epsilon_high", str(high))
    learner = make_learner(*GRPO, *CLIPPING, *options, "--trainer.micro_batch", "2", stirred=True)
    settings = learner.config.arm.grpo
    reference = Double(learner)
    old = reference.chosen(rewarded)
    first, _, _ = reference.grpo(rewarded, old, settings)
    reference.step(first)
    second, ratios, _ = reference.grpo(rewarded, old, settings)
    expected = reference.step(second)
    metrics = learner.update(rewarded)
    assert metrics.loss == pytest.approx(first.item(), rel=1e-4)  # that of the first iteration
    assert distance(gradients(learner), expected) < 2e-3
    assert distance(learner.parameters, reference.parameters) < 1e-4
    most, least = (clipped_tokens(ratios, 1.2 if high is None else 1 + high, margin) for margin in (1e-3, -1e-3))
    assert least.too_low > 0 and (least.too_high > 0) == (most.too_high > 0) == (high is None)
    # A ratio that is 0.8 or 1.2 but for rounding may be counted either way; there are few of them.
    found = round(metrics.of_objective["clip_fraction"] * metrics.tokens)
    assert sum(least) <= found <= sum(most) <= sum(least) + 2


class Clipped(NamedTuple):
    too_high: int
    too_low: int


def clipped_tokens(ratios: Sequence[torch.Tensor], high: float, margin: float) -> Clipped:
    """The bounds are moved inwards by ``margin``."""
    pairs = list(zip(ratios, ADVANTAGES, strict=True))
    too_high = sum(int((ratio > high - margin).sum()) for ratio, advantage in pairs if advantage > 0)
    too_low = sum(int((ratio < 0.8 + margin).sum()) for ratio, advantage in pairs if advantage < 0)
    return Clipped(too_high, too_low)


def test_clip_higher_lets_more_of_a_gain_through(make_learner: MakeLearner, rewarded: list[Example]) -> None:
    """The same first iteration, another second one."""
    learners = [
        make_learner(*GRPO, *CLIPPING, *options, stirred=True)
        for options in ((), ("--arm.grpo.epsilon_high", "5.0"), ("--arm.grpo.epsilon_high", "0.2"))
    ]
    for learner in learners:
        learner.update(rewarded)
    assert distance(learners[1].parameters, learners[0].parameters) > 1e-3
    assert distance(learners[2].parameters, learners[0].parameters) == 0.0


def predictions_of(probabilities: Sequence[float]) -> tuple[torch.Tensor, Predictions]:
    """Of the first of two tokens; the logits, which take gradients, and what is predicted from them."""
    logits = torch.tensor([[p, 1 - p] for p in probabilities]).log().requires_grad_()
    return logits, predict(logits, logits.detach(), torch.zeros(len(probabilities), dtype=torch.long))


def test_clipping_by_hand() -> None:
    """Ratios 1.5 and 0.5, each under an advantage of 1, of −1 and of 0."""
    ratios, advantages = [1.5, 0.5] * 3, [1.0, 1.0, -1.0, -1.0, 0.0, 0.0]
    logits, predictions = predictions_of([0.4 * ratio for ratio in ratios])
    old = torch.full((6,), math.log(0.4))
    losses, through, counted = {}, {}, {}
    for high in (None, 0.4):
        objective = Grpo(GrpoSection(num_iterations=2, epsilon_high=high, beta=0.0))
        objective.begin([Example("r", [1], [1], [0], Any, False, advantage=a) for a in advantages], old)
        loss = objective.token_loss(predictions, slice(0, 6))
        (gradient,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
        losses[high], through[high] = loss.tolist(), (gradient.abs().sum(-1) > 1e-6).tolist()
        counted[high] = objective.clipped(torch.tensor(advantages), old, predictions.logprob.detach()).tolist()
    assert losses[None] == pytest.approx([-1.2, -0.5, 1.5, 0.8, 0.0, 0.0], abs=1e-6)
    assert losses[0.4] == pytest.approx([-1.4, -0.5, 1.5, 0.8, 0.0, 0.0], abs=1e-6)
    assert through[None] == through[0.4] == [False, True, True, False, False, False]
    assert counted[None] == counted[0.4] == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]


def test_advantages_of_a_group_by_hand() -> None:
    # Mean 1/2, sample deviation sqrt(4 · 1/4 / 3) = 0.57735.
    scaled = group_advantages([1.0, 0.0, 0.0, 1.0], scale=True)
    assert scaled.advantages == pytest.approx([0.5 / 0.57745, -0.5 / 0.57745, -0.5 / 0.57745, 0.5 / 0.57745], rel=1e-5)
    assert scaled.has_signal
    assert group_advantages([1.0, 0.0, 0.0, 0.0], scale=False).advantages == [0.75, -0.25, -0.25, -0.25]


def test_a_rollout_without_a_reward_leaves_the_groups_statistics() -> None:
    with_gap = group_advantages([1.0, None, 0.0, 0.0], scale=True)
    whole = group_advantages([1.0, 0.0, 0.0], scale=True)
    assert with_gap.advantages[1] is None and with_gap.has_signal
    assert [value for value in with_gap.advantages if value is not None] == whole.advantages


@pytest.mark.parametrize("rewards", [[1.0] * 4, [0.0] * 3, [1.0, None, 1.0]])
@pytest.mark.parametrize("scale", [True, False])
def test_equal_rewards_give_no_signal(rewards: list[float | None], scale: bool) -> None:
    result = group_advantages(rewards, scale=scale)
    assert result.advantages == [None if reward is None else 0.0 for reward in rewards] and not result.has_signal


@pytest.mark.parametrize("rewards", [[1.0], [None, 0.0, None], [None, None], []])
def test_fewer_than_two_rewards_make_no_group(rewards: list[float | None]) -> None:
    result = group_advantages(rewards, scale=True)
    assert result.advantages == [None] * len(rewards) and not result.has_signal


def test_a_fixed_negative_advantage_pushes_unlikely_tokens_alone() -> None:
    objective = FixedNegative(FixedNegativeSection(advantage=-2.0, max_probability=0.1))
    logits, predictions = predictions_of([0.05, 0.11, 0.9])
    loss = objective.token_loss(predictions, slice(0, 3))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.tolist() == pytest.approx([2.0, 0.0, 0.0], abs=1e-6)
    assert objective.signal(predictions, slice(0, 3)).tolist() == [1.0, 0.0, 0.0]
    # 2 · ∇ log p: raising the token's logit raises the loss by 2 · (1 − p).
    assert gradient[0].tolist() == pytest.approx([1.9, -1.9], abs=1e-5)
    assert gradient[1:].count_nonzero() == 0


def test_fixed_negative_is_the_full_computation_and_lowers_unlikely_tokens(
    make_learner: MakeLearner, rewarded: list[Example]
) -> None:
    learner = make_learner(
        "--run.arm", "fixed_negative", "--trainer.max_grad_norm", "1e9", "--trainer.micro_batch", "2", stirred=True
    )
    reference = Double(learner)
    before = torch.cat(reference.chosen(rewarded))
    unlikely = before.exp() < 0.1
    assert 5 < unlikely.sum() < len(before) - 5
    values = torch.cat([reference.logprobs(e)[range(len(e.completion)), e.completion] for e in rewarded])
    expected = reference.step(values[unlikely].sum() / len(values))
    metrics = learner.update(rewarded)
    assert distance(gradients(learner), expected) < 1e-4
    assert metrics.signal_share == pytest.approx(unlikely.double().mean().item())
    after = torch.cat(Double(learner).chosen(rewarded))
    assert (after - before)[unlikely].mean() < -0.1
