"""The probe: figures worked out by hand, and one batch of the lab's solver measured."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import comb, log
from pathlib import Path
from typing import Any

import pytest
import torch

from stepalign.critique.answers import answers_equal
from stepalign.errors import ConfigError
from stepalign.plugins import Checker
from stepalign.types import Critique, CritiqueRequest, CritiqueResponse
from stepalign_lab.checker import exact_critique
from stepalign_run.config import Config
from stepalign_run.probing import ProbePlan, ProbeReport
from stepalign_run.rollout import Rollout
from stepalign_run.testing import MemoryBroker, MemoryPolicyStore, MemoryRolloutQueue
from stepalign_trainer.batch.scope import TokenGroups, token_groups
from stepalign_trainer.batch.spans import token_spans
from stepalign_trainer.probe.arms import Subject
from stepalign_trainer.probe.command import read_plan
from stepalign_trainer.probe.figures import ScoredRollout, contrast, differing, estimate, focus, scaled
from stepalign_trainer.probe.measure import Probe, claim_batch
from stepalign_trainer.probe.samples import ProbeSampler
from support.critic_answers import answer_of

pytestmark = pytest.mark.slow

MakeConfig = Callable[..., Config]
Measure = Callable[..., ProbeReport]

BATCH = ["right", "wrong_step", "missing_step", "wrong_answer", "unfinished"]


def scored(kl: list[float], error: int | None, segment_end: int, advantage: list[float] | None = None) -> ScoredRollout:
    groups = TokenGroups(in_scope=segment_end, first_error=error)
    return ScoredRollout(groups, torch.tensor(advantage or kl), torch.tensor(kl))


def test_focus_is_the_share_of_the_loss_in_the_error_segments() -> None:
    first = scored([0.0, 0.25, 0.5, 0.25, 1.0], error=2, segment_end=4)
    second = scored([1.0, 1.0], error=1, segment_end=2)
    # In the segments: 0.5 + 0.25, and 1.0. On all tokens: 2.0 and 2.0.
    assert focus([first, second], [5, 2]) == pytest.approx(1.75 / 4.0)
    # Up to the end of the segments: 1.0 and 2.0.
    assert focus([first, second], [4, 2]) == pytest.approx(1.75 / 3.0)
    # A scope that ends before the first error, as a random one may.
    assert focus([first, second], [2, 1]) == 0.0
    # A scope that ends inside the segment.
    assert focus([first], [3]) == pytest.approx(0.5 / 0.75)


def test_focus_looks_at_rollouts_with_an_error_only() -> None:
    wrong = scored([1.0, 3.0], error=1, segment_end=2)
    right = scored([5.0, 5.0], error=None, segment_end=2)
    assert focus([wrong, right], [2, 2]) == 0.75
    assert focus([right], [2]) is None


def test_there_is_no_focus_without_a_loss() -> None:
    assert focus([scored([0.0, 0.0, 1e-9], error=1, segment_end=2)], [3]) is None
    assert focus([], []) is None


def test_contrast_is_worked_out_by_hand() -> None:
    wrong = scored([0.0] * 5, error=2, segment_end=4, advantage=[0.0, -0.5, -8.0, -1.0, -3.0])
    right = scored([0.0] * 2, error=None, segment_end=2, advantage=[0.25, -0.05])
    unknown = ScoredRollout(TokenGroups(2, None, aligned=False), torch.tensor([9.0, 9.0]), torch.zeros(2))
    found = contrast([wrong, right, unknown])
    assert found.correct == pytest.approx((0.0 - 0.5 + 0.25 - 0.05) / 4)
    assert found.below == 0.25
    assert found.at_error == -8.0
    # The token at 3 still belongs to the error segment.
    assert found.tail == -3.0
    nothing = contrast([unknown])
    assert (nothing.correct, nothing.below, nothing.at_error, nothing.tail) == (None, None, None, None)


@pytest.mark.parametrize(
    ("right", "samples", "group", "expected"),
    [
        (0, 8, 8, 0.0),
        (8, 8, 8, 0.0),
        (1, 8, 8, 1.0),
        (1, 4, 2, 0.5),  # of 6 pairs 3 hold the right one
        (2, 4, 2, 4 / 6),
        (2, 4, 3, 1.0),
    ],
)
def test_the_share_of_differing_groups_by_hand(right: int, samples: int, group: int, expected: float) -> None:
    assert differing(right, samples, group) == pytest.approx(expected)


@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
def test_the_share_of_differing_groups_is_unbiased(p: float) -> None:
    n, group = 9, 4
    mean = sum(comb(n, c) * p**c * (1 - p) ** (n - c) * differing(c, n, group) for c in range(n + 1))
    assert mean == pytest.approx(1 - p**group - (1 - p) ** group)


def test_fewer_samples_than_a_group_are_refused() -> None:
    with pytest.raises(ValueError, match="a group of 8 needs as many samples"):
        differing(1, 4, 8)


def test_an_estimate_has_the_mean_and_an_interval_over_what_was_sampled() -> None:
    found = estimate([0.0, 0.5, 1.0, 0.5] * 4)
    assert found is not None
    # The standard error is √(0.125 / 16) = 0.088.
    assert found.value == 0.5
    assert found.lower == pytest.approx(0.5 - 1.96 * 0.088, abs=0.03)
    assert found.upper == pytest.approx(0.5 + 1.96 * 0.088, abs=0.03)
    assert estimate([0.0, 0.5, 1.0, 0.5] * 4) == found
    assert estimate([]) is None
    half = scaled(found, 0.5)
    assert (half.value, half.upper) == (0.25, pytest.approx(found.upper / 2, abs=1e-5))


class Critic:
    """The exact critic; it garbles the critiques of attempts that hold ``refuse``."""

    def __init__(self, refuse: str | None = None) -> None:
        self.refuse = refuse
        self.asked = 0

    async def critique(self, request: CritiqueRequest, request_id: str | None = None) -> CritiqueResponse:
        self.asked += 1
        text = exact_critique(request.question, request.split().tagged)
        if self.refuse is not None and self.refuse in request.split().tagged:
            text = "no critique"
        return answer_of(request, text)


@pytest.fixture
def rollouts(rollout_of: Callable[..., Rollout]) -> list[Rollout]:
    """Five attempts at one chain, as if they were of five problems."""
    made: list[Rollout] = []
    for i, name in enumerate(BATCH):
        rollout = rollout_of(name, "length" if name == "unfinished" else "stop", rollout_id=f"r{i}")
        made.append(rollout.model_copy(update={"problem": rollout.problem.model_copy(update={"id": f"p{i}"})}))
    return made


@pytest.fixture
def measure(
    make_config: MakeConfig, make_learner: Callable[..., Any], rollouts: list[Rollout]
) -> Callable[..., ProbeReport]:
    def make(
        *arms: str, critic: Critic | None = None, checker: Checker | None = exact_critique, **plan: Any
    ) -> ProbeReport:
        overrides = ("--evaluation.max_new_tokens", "64", "--trainer.batch", "8")
        sections = {arm: make_config("--run.arm", arm, *overrides).arm for arm in arms}
        learner = make_learner(*overrides)
        probe = Probe(
            learner.config,
            ProbePlan(samples=plan.get("samples", 2), arms=sections),
            learner,
            plan.get("grader", answers_equal),
            critic,
            checker,
        )
        return asyncio.run(probe.measure(rollouts))

    return make


@pytest.mark.numeric
def test_samples_are_the_bases_and_leave_the_model_as_it_was(
    make_learner: Callable[..., Any], rollouts: list[Rollout]
) -> None:
    """Also of a trained student: the adapter is off while they are drawn, and on again afterwards."""
    small, large = (("--solver.batch", size, "--solver.temperature", "4") for size in ("3", "20"))
    learners = [make_learner(*small), make_learner(*large), make_learner(*large, stirred=True)]
    texts: list[list[str]] = []
    for learner in learners:
        configuration = learner.model.get_base_model().generation_config
        before = learner.logits(rollouts[0].prompt_token_ids, rollouts[0].completion_token_ids)
        samples = ProbeSampler(learner).of_student(rollouts, 4)
        texts.append([rollout.text for of_problem in samples for rollout in of_problem])
        assert learner.model.get_base_model().generation_config is configuration
        assert torch.equal(learner.logits(rollouts[0].prompt_token_ids, rollouts[0].completion_token_ids), before)
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == 20 and len(set(texts[0])) > 5


def test_rollouts_that_no_update_could_use_are_counted_and_in_no_figure(
    measure: Measure, rollouts: list[Rollout]
) -> None:
    usable = measure("stepalign_scoped", "refsol", critic=Critic())
    rollouts[1:1] = [
        rollouts[0].model_copy(update={"rollout_id": "other-text", "text": "8"}),
        rollouts[0].model_copy(update={"rollout_id": "other-model", "completion_token_ids": [10**6, 2]}),
        rollouts[0].model_copy(update={"rollout_id": "endless", "completion_token_ids": [7] * 4000}),
    ]
    report = measure("stepalign_scoped", "refsol", critic=Critic())
    assert report.unusable == {"text_is_not_its_tokens": 1, "too_long_for_the_model": 1, "unknown_tokens": 1}
    assert (report.rollouts, report.contexts) == (usable.rollouts, usable.contexts) and usable.unusable == {}


def test_all_contexts_share_their_rollouts_and_one_critique_of_each_form(measure: Measure) -> None:
    critic = Critic()
    report = measure("stepalign_scoped", "stepalign", "full_repetition", "omission", "refsol", "null", critic=critic)
    # As it is meant, with the wrong step quoted, and without the copied steps.
    assert critic.asked == 3 * len(BATCH)
    assert (report.rollouts, report.unlocated) == (5, 0)
    # "right" has no error, and "unfinished" was cut off before one.
    assert report.with_error == 3
    assert report.critiques is not None and report.critiques.refused == {}
    assert report.critiques.validated == {"correct": 1, "incomplete": 1, "incorrect": 2, "unjustified": 1}
    found = {context.kind.value: context for context in report.contexts}
    assert list(found) == ["critique", "reference", "null", "full_repetition", "omission"]
    assert all((context.rollouts, context.left_out, context.solutions) == (5, {}, 5) for context in report.contexts)
    critique, null = found["critique"], found["null"]
    assert critique.solve_rate is not None and critique.solve_rate.value == critique.trace_rate == 1.0
    # The base knows this chain's facts.
    assert null.solve_rate is not None and null.solve_rate.value == 1.0
    assert critique.contrast.at_error is not None and critique.contrast.at_error < -1
    assert critique.contrast.correct == pytest.approx(0, abs=0.05)
    assert critique.solution_gain is not None and critique.solution_gain > 0
    assert null.solution_gain == null.contrast.at_error == null.contrast.tail == null.contrast.correct == 0.0


def test_arms_are_ranked_by_solve_rate_times_focus(measure: Measure) -> None:
    report = measure("null", "stepalign", "fixed_negative", "stepalign_scoped", critic=Critic())
    assert [arm.arm for arm in report.arms] == ["stepalign_scoped", "stepalign", "null", "fixed_negative"]
    scoped, full, null, fixed = report.arms
    assert scoped.solve_rate == full.solve_rate == 1.0
    assert scoped.focus is not None and full.focus is not None and full.focus < scoped.focus
    assert scoped.score is not None and scoped.score.value == scoped.focus
    assert full.score is not None and full.score.value == full.focus > 0
    assert null.score is not None and null.score.value == 0.0 and null.focus is None
    assert null.note == "the teacher says what the student says: there is no loss"
    assert fixed.score is None and fixed.context is None and fixed.note is not None


def test_the_score_falls_with_the_solve_rate(measure: Measure) -> None:
    """A grader that finds half of all that is asked wrong halves the rate, and the score with it."""
    asked = 0

    def every_other(answer: str, known: str) -> bool:
        nonlocal asked
        asked += 1
        return asked % 2 == 0

    arm = measure("stepalign_scoped", critic=Critic(), grader=every_other, checker=None).arms[0]
    assert arm.solve_rate == 0.5 and arm.focus is not None
    assert arm.score is not None and arm.score.value == pytest.approx(0.5 * arm.focus, abs=1e-5)


@pytest.mark.numeric
def test_the_report_is_the_same_twice(measure: Measure) -> None:
    arms = ("stepalign_scoped", "refsol", "shuffled", "grpo")
    first, second = (measure(*arms, critic=Critic()).model_dump_json() for _ in range(2))
    assert first == second
    assert ProbeReport.model_validate_json(first).model_dump_json() == first


def test_a_refused_critique_leaves_its_contexts_and_the_error_is_located(measure: Measure) -> None:
    report = measure("stepalign", "refsol", critic=Critic(refuse="7 * 7 = 8"))
    assert report.critiques is not None and report.critiques.refused == {"unparseable": 1}
    assert report.critiques.share == 0.8
    found = {context.kind.value: context for context in report.contexts}
    assert (found["critique"].rollouts, found["critique"].left_out) == (4, {"critique_unparseable": 1})
    assert (found["reference"].rollouts, found["reference"].solutions) == (5, 5)
    assert (report.with_error, report.unlocated) == (3, 0)


def test_without_a_checker_it_is_left_out_and_counted(measure: Measure) -> None:
    report = measure("stepalign", "refsol", critic=Critic(refuse="7 * 7 = 8"), checker=None)
    found = {context.kind.value: context for context in report.contexts}
    assert (found["reference"].rollouts, found["reference"].solutions) == (5, 4)
    assert found["reference"].trace_rate is None
    assert (report.with_error, report.unlocated) == (2, 1)


def test_without_a_critic_and_a_checker_nothing_is_predicted_of_a_teacher(measure: Measure) -> None:
    report = measure("refsol", checker=None)
    arm = report.arms[0]
    assert report.critiques is None and report.unlocated == 5
    assert arm.solve_rate is not None and arm.focus is None and arm.score is None
    assert arm.note is not None and "set data.checker" in arm.note
    assert report.contexts[0].solution_gain is None


def test_a_context_that_no_rollout_can_have_is_no_prediction(measure: Measure) -> None:
    report = measure("shuffled", critic=Critic(refuse="<step_1>"))
    assert report.contexts[0].rollouts == 0 and report.contexts[0].solve_rate is None
    assert report.arms[0].score is None and report.arms[0].note == "no rollout can have this context"


def test_grpo_scores_the_groups_that_differ_among_the_students_own_samples(measure: Measure) -> None:
    asked = 0

    def one_in_sixteen(answer: str, known: str) -> bool:
        nonlocal asked
        asked += 1
        return asked % 16 == 1

    # Every sample is graded for the solve rate before the rewards are: 5 × 8, then 5 × 8 for each arm.
    report = measure("grpo", grader=one_in_sixteen, checker=None)
    assert report.student is not None and (report.student.problems, report.student.samples) == (5, 8)
    assert report.contexts == [] and report.critiques is None
    assert report.arms[0].focus is None
    # Answers 1, 17, 33 of the 40 rewards are right (or as many as have an answer): every other group has one.
    assert report.arms[0].score is not None and report.arms[0].score.value in (0.4, 0.6)


def test_a_group_of_equal_rewards_scores_0(measure: Measure) -> None:
    arm = measure("grpo", grader=lambda answer, known: False).arms[0]
    assert arm.score is not None and arm.score.value == 0.0


def test_samples_that_the_grader_fails_on_are_counted_and_in_no_rate(measure: Measure) -> None:
    def failing(answer: str, known: str) -> bool:
        raise RuntimeError("broken")

    report = measure("stepalign", "grpo", critic=Critic(), grader=failing, checker=None)
    context = report.contexts[0]
    assert context.grader_errors == 10 and context.solve_rate is None
    assert all(arm.score is None and arm.note is not None for arm in report.arms)


def test_a_correct_solution_is_what_the_solver_would_emit(
    make_learner: Callable[..., Any], rollouts: list[Rollout], critique_of: Callable[[Rollout], Critique]
) -> None:
    learner = make_learner("--evaluation.max_new_tokens", "64")
    plan = ProbePlan(samples=1, arms={"a": learner.config.arm})
    probe = Probe(learner.config, plan, learner, answers_equal, Critic(), None)

    def solution(rollout: Rollout) -> list[int] | None:
        critique, spans = critique_of(rollout), token_spans(rollout, learner.tokenizer)
        groups = token_groups("through_first_error", rollout, critique, spans)
        return probe.solution_ids(Subject(rollout, critique, spans, groups))

    right, wrong, *_, unfinished = rollouts
    assert solution(right) == right.completion_token_ids
    assert solution(wrong) == right.completion_token_ids
    # EOS, too, where the rollout has none.
    assert solution(unfinished) == right.completion_token_ids
    short = make_learner("--evaluation.max_new_tokens", "16")
    probe = Probe(short.config, plan, short, answers_equal, Critic(), None)
    assert solution(right) is None


@pytest.mark.numeric
def test_the_gain_is_the_mean_over_tokens_of_the_log_probability_ratio(
    measure: Measure, make_learner: Callable[..., Any], rollouts: list[Rollout]
) -> None:
    from stepalign_run.context import Context, ContextKind
    from stepalign_trainer.batch.examples import teacher_prompt_ids

    learner = make_learner("--evaluation.max_new_tokens", "64")
    right = rollouts[0].completion_token_ids
    gains: list[float] = []
    for rollout in rollouts:
        context = Context(kind=ContextKind.REFERENCE, text=rollout.problem.reference_solution or "")
        prompts = (teacher_prompt_ids(learner.config, learner.tokenizer, rollout, context), rollout.prompt_token_ids)
        teacher, student = (
            sum(
                log(row.softmax(-1)[token].item())
                for row, token in zip(learner.logits(prompt, right), right, strict=True)
            )
            for prompt in prompts
        )
        gains.append((teacher - student) / len(right))
    found = measure("refsol").contexts[0].solution_gain
    assert found == pytest.approx(sum(gains) / len(gains), abs=1e-4)


def test_a_completion_that_the_model_has_no_positions_for_is_refused(make_learner: Callable[..., Any]) -> None:
    learner = make_learner("--evaluation.max_new_tokens", "400")
    plan = ProbePlan(samples=1, arms={"a": learner.config.arm})
    with pytest.raises(ConfigError, match=r"together are 592, over the model's 512 positions; lower one of them"):
        Probe(learner.config, plan, learner, answers_equal, Critic(), None)


def test_critiques_need_a_critic(measure: Measure) -> None:
    with pytest.raises(ConfigError, match=r"critic\.url is not set"):
        measure("stepalign")


def test_a_missing_plan_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="start it with `stepalign probe`"):
        read_plan(tmp_path / "probe_plan.json")


@pytest.mark.parametrize("content", [b"{}", b"[", b"\xff"])
def test_a_broken_plan_is_refused_without_a_link_to_a_librarys_documentation(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "probe_plan.json").write_bytes(content)
    with pytest.raises(ConfigError, match="start it with `stepalign probe`") as refused:
        read_plan(tmp_path / "probe_plan.json")
    assert "://" not in str(refused.value)


@pytest.mark.parametrize("buried", [0, 1])
def test_the_batch_is_claimed_by_id_and_short_when_a_rollout_is_dead(
    buried: int, make_config: MakeConfig, rollouts: list[Rollout]
) -> None:
    broker, store, settings = MemoryBroker(), MemoryPolicyStore(), make_config().queue

    async def work() -> list[str]:
        solver = MemoryRolloutQueue(broker, "solver", settings)
        for rollout in reversed(rollouts):
            await solver.publish([rollout.model_copy(update={"group_id": rollout.rollout_id})])
        other = MemoryRolloutQueue(broker, "other", settings)
        for delivery in await other.claim(buried, 0) if buried else []:
            await other.dead_letter(delivery.entry_id, "broken")
        await store.announce_sampled(0)
        queue = MemoryRolloutQueue(broker, "probe-worker", settings)
        async with asyncio.timeout(30):
            batch = await claim_batch(queue, store, len(rollouts))
        return [delivery.rollout.rollout_id for delivery in batch]

    assert asyncio.run(work()) == ["r0", "r1", "r2", "r3", "r4"][: 5 - buried]
