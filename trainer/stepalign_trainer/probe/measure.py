"""What each arm would teach, measured on one batch before anything is trained: the worker of ``stepalign probe``.

The base model is student and self-teacher alike, so nothing here depends on an update. Every context is measured on the
same rollouts, and its samples use the same random numbers as those of the other contexts. Definitions and reasoning:
:mod:`stepalign_trainer.probe.figures`.

Where a rollout errs, and what would have been correct, is told by the critic's critique of it; where that does not
validate, by the exact checker (``data.checker``); else nothing is known, and the rollout is left out and counted. So a
context that shows that very critique has its advantage in ``solution_gain`` by construction.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

from transformers import AutoConfig

from stepalign.critique.trace import Span
from stepalign.errors import ConfigError, GraderError, PromptTooLongError
from stepalign.plugins import Checker, Grader
from stepalign.prompts.content_tokens import content_token_ids
from stepalign.scoring import GradedSample, grade, trace_critique
from stepalign.types import Critique, CritiqueRequest, CritiqueResponse, FinishReason, Verdict
from stepalign_run.config import ArmSection, Config
from stepalign_run.context import ContextKind
from stepalign_run.logging import get_logger
from stepalign_run.policy_store import PolicyStore, file_sha256, weights_sha256
from stepalign_run.probing import (
    ArmFigures,
    ContextFigures,
    CritiqueFigures,
    Estimate,
    ProbePlan,
    ProbeReport,
    StudentFigures,
)
from stepalign_run.queue import Delivery, RolloutQueue
from stepalign_run.rollout import Rollout
from stepalign_trainer.batch.contexts import ContextResult, Contexts
from stepalign_trainer.batch.critiques import CritiqueSource
from stepalign_trainer.batch.examples import teacher_prompt_ids
from stepalign_trainer.batch.scope import TokenGroups, token_groups, token_spans
from stepalign_trainer.generation import Generator
from stepalign_trainer.loop import CLAIM_BLOCK_SECONDS
from stepalign_trainer.objectives.rewards import reward
from stepalign_trainer.probe.figures import ScoredRollout, contrast, differing, estimate, focus, scaled
from stepalign_trainer.update.learner import Learner

log = get_logger(__name__)

PACKAGES = ("stepalign", "torch", "transformers", "peft")
OUTCOME = "skipped:probe"


class RememberedCritiques:
    """A critic that is asked once for each rollout and form of its critique, whatever number of contexts need it."""

    def __init__(self, critic: CritiqueSource) -> None:
        self._critic = critic
        self._answers: dict[CritiqueRequest, CritiqueResponse] = {}

    async def critique(self, request: CritiqueRequest, request_id: str | None = None) -> CritiqueResponse:
        if request not in self._answers:
            self._answers[request] = await self._critic.critique(request, request_id)
        return self._answers[request]


@dataclass(frozen=True)
class Subject:
    """A rollout and what is known of its errors, whatever the teacher sees."""

    rollout: Rollout
    critique: Critique | None
    spans: list[Span]
    groups: TokenGroups
    """Of the scope ``through_first_error``."""


@dataclass(frozen=True)
class Measured:
    """A context's figures, and per rollout what arms are scored from."""

    figures: ContextFigures
    subjects: list[Subject]
    scored: list[ScoredRollout]


async def claim_batch(queue: RolloutQueue, policies: PolicyStore, count: int) -> list[Delivery]:
    """The rollouts of policy version 0, by id; fewer than ``count`` only when some went to the dead letters.

    This is the only consumer of its queue: no one takes its entries over while it works on them.
    """
    batch: list[Delivery] = []
    while len(batch) < count:
        claimed = await queue.claim(count - len(batch), CLAIM_BLOCK_SECONDS)
        batch.extend(claimed)
        if not claimed and await policies.last_sampled() >= 0 and (await queue.status()).length == len(batch):
            break
    return sorted(batch, key=lambda delivery: delivery.rollout.rollout_id)


class Probe:
    """Measures the contexts of a plan on a batch of rollouts. ``critic`` is None where no arm of the plan needs one."""

    def __init__(
        self,
        config: Config,
        plan: ProbePlan,
        learner: Learner,
        grader: Grader,
        critic: CritiqueSource | None,
        checker: Checker | None,
    ) -> None:
        """Raises ConfigError when a teacher's prompt and its completion do not fit the model."""
        self.config = config
        self.plan = plan
        self.learner = learner
        self.grader = grader
        self.critic = RememberedCritiques(critic) if critic is not None else None
        self.checker = checker
        self.generator = Generator(learner.model.get_base_model(), learner.tokenizer)
        positions = getattr(AutoConfig.from_pretrained(config.model.path), "max_position_embeddings", None)
        longest = config.trainer.max_teacher_prompt_tokens + config.evaluation.max_new_tokens
        if positions is not None and longest > positions:
            raise ConfigError(
                f"trainer.max_teacher_prompt_tokens and evaluation.max_new_tokens together are {longest}, over the "
                f"model's {positions} positions; lower one of them"
            )

    @cached_property
    def kinds(self) -> list[ContextKind]:
        """What the self-teachers of the plan's arms see, in the order of the contexts."""
        wanted = {arm.context for arm in self.plan.arms.values() if arm.objective == "forward_kl"}
        return [kind for kind in ContextKind if kind in wanted]

    async def measure(self, rollouts: Sequence[Rollout]) -> ProbeReport:
        """Raises ConfigError when the checker cannot handle a problem, and CriticError as the trainer does."""
        self.learner.check_teacher_is_student(rollouts[0].prompt_token_ids, rollouts[0].completion_token_ids)
        own = await self._contexts(ContextKind.CRITIQUE, rollouts) if self.critic is not None else None
        critiques = [result.critique for result in own] if own is not None else [None] * len(rollouts)
        subjects = [self._subject(rollout, found) for rollout, found in zip(rollouts, critiques, strict=True)]
        measured: dict[ContextKind, Measured] = {}
        for kind in self.kinds:
            measured[kind] = self._measure(kind, subjects, await self._contexts(kind, rollouts))
            log.info("measured", **measured[kind].figures.model_dump(mode="json"))
        samples = self._student_samples(rollouts)
        arms = [self._arm(name, arm, measured, samples) for name, arm in self.plan.arms.items()]
        config = self.config
        return ProbeReport(
            run=config.run.name,
            seed=config.run.seed,
            rollouts=len(rollouts),
            with_error=sum(subject.groups.first_error is not None for subject in subjects),
            unlocated=sum(subject.critique is None for subject in subjects),
            samples=self.plan.samples,
            contexts=[found.figures for found in measured.values()],
            critiques=_count_critiques(own) if own is not None else None,
            student=self._student(samples),
            arms=sorted(arms, key=lambda arm: (arm.score is None, -arm.score.value if arm.score else 0.0, arm.arm)),
            terms={
                "base": weights_sha256(config.model.path),
                "train": file_sha256(config.data.train),
                "grader": config.data.grader,
                "sampling": config.solver.parameters(seed=0).model_dump(mode="json", exclude={"seed"}),
            },
            plan=self.plan,
            config=config.as_report(),
            versions={"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        )

    async def _contexts(self, kind: ContextKind, rollouts: Sequence[Rollout]) -> list[ContextResult]:
        return await Contexts(kind, self.critic, self.config.critic.concurrency).fetch(rollouts)

    def _subject(self, rollout: Rollout, critique: Critique | None) -> Subject:
        if critique is None and self.checker is not None:
            critique = trace_critique(rollout.problem, rollout.text, self.checker)
        spans = token_spans(rollout, self.learner.tokenizer)
        return Subject(rollout, critique, spans, token_groups("through_first_error", rollout, critique, spans))

    def _measure(self, kind: ContextKind, subjects: Sequence[Subject], results: Sequence[ContextResult]) -> Measured:
        left_out: Counter[str] = Counter()
        usable: list[Subject] = []
        prompts: list[list[int]] = []
        for subject, result in zip(subjects, results, strict=True):
            try:
                prompt = self._teacher_prompt(subject.rollout, result)
            except PromptTooLongError:
                left_out["teacher_prompt_too_long"] += 1
                continue
            if prompt is None:
                left_out[result.skip_reason or ""] += 1
                continue
            usable.append(subject)
            prompts.append(prompt)
        scored = [self._scored(subject, prompt) for subject, prompt in zip(usable, prompts, strict=True)]
        gains = [self._gain(subject, prompt) for subject, prompt in zip(usable, prompts, strict=True)]
        known = [gain for gain in gains if gain is not None]
        graded = self._teacher_samples(usable, prompts)
        flat = [sample for samples in graded for sample in samples]
        right = [sample for sample in flat if sample.correct is not None]
        traces = sum(sample.trace_correct is True for sample in right)
        figures = ContextFigures(
            kind=kind,
            rollouts=len(usable),
            left_out=dict(sorted(left_out.items())),
            solve_rate=_solve_rate(graded),
            trace_rate=round(traces / len(right), 6) if self.checker is not None and right else None,
            grader_errors=len(flat) - len(right),
            solution_gain=round(sum(known) / len(known), 6) if known else None,
            solutions=len(known),
            contrast=contrast(scored),
        )
        return Measured(figures, usable, scored)

    def _teacher_prompt(self, rollout: Rollout, result: ContextResult) -> list[int] | None:
        if result.context is None:
            return None
        return teacher_prompt_ids(self.config, self.learner.tokenizer, rollout, result.context)

    def _scored(self, subject: Subject, teacher_prompt: list[int]) -> ScoredRollout:
        rollout = subject.rollout
        terms = self.learner.token_values(rollout.prompt_token_ids, teacher_prompt, rollout.completion_token_ids)
        return ScoredRollout(subject.groups, terms.advantage.cpu(), terms.kl.cpu())

    def _gain(self, subject: Subject, teacher_prompt: list[int]) -> float | None:
        """Nats per token by which the teacher finds the correct solution more likely than the student does."""
        solution = self.solution_ids(subject)
        if solution is None:
            return None
        terms = self.learner.token_values(subject.rollout.prompt_token_ids, teacher_prompt, solution)
        return terms.advantage.mean().item()

    def solution_ids(self, subject: Subject) -> list[int] | None:
        """The critique's text as the solver would emit it, EOS included; None without a critique.

        None, too, for one over ``evaluation.max_new_tokens``, which the solver would not end.
        """
        if subject.critique is None:
            return None
        rollout = subject.rollout
        stopped = rollout.finish_reason is FinishReason.STOP
        eos = rollout.completion_token_ids[-1] if stopped else self.generator.eos_ids[0]
        token_ids = [*content_token_ids(self.learner.tokenizer, subject.critique.text), eos]
        return token_ids if len(token_ids) <= self.config.evaluation.max_new_tokens else None

    def _teacher_samples(self, subjects: Sequence[Subject], prompts: Sequence[list[int]]) -> list[list[GradedSample]]:
        """``plan.samples`` graded samples of each rollout's self-teacher, at the evaluation's temperature."""
        count, settings = self.plan.samples, self.config.evaluation
        with self.learner.teacher():
            completions = self.generator.sample(
                [prompt for prompt in prompts for _ in range(count)],
                [self._stream("teacher", s.rollout.rollout_id, i) for s in subjects for i in range(count)],
                settings,
                settings.batch,
            )
        owners = [subject.rollout.problem for subject in subjects for _ in range(count)]
        graded = [
            grade(c.text, len(c.token_ids), c.finish_reason, problem, self.grader, self.checker)
            for c, problem in zip(completions, owners, strict=True)
        ]
        return [graded[start : start + count] for start in range(0, len(graded), count)]

    def _stream(self, *parts: object) -> str:
        return " ".join(map(str, ("probe", self.config.run.seed, *parts)))

    def _student_samples(self, rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
        """The student's own samples of each problem, as the solver would publish them; none without a GRPO arm.

        As many as the larger of ``plan.samples`` and the largest group: with fewer than a group no estimate of its
        rewards is unbiased.
        """
        groups = [arm.group_size for arm in self.plan.arms.values() if arm.objective == "grpo"]
        if not groups:
            return []
        count, settings = max(self.plan.samples, *groups), self.config.solver
        problems = list({rollout.problem.id: rollout for rollout in rollouts}.values())
        owners = [rollout for rollout in problems for _ in range(count)]
        with self.learner.teacher():
            completions = self.generator.sample(
                [rollout.prompt_token_ids for rollout in owners],
                [self._stream("student", rollout.problem.id, i) for rollout in problems for i in range(count)],
                settings,
                settings.batch,
            )
        sampled = [
            rollout.model_copy(
                update={
                    "completion_token_ids": completion.token_ids,
                    "text": completion.text,
                    "finish_reason": completion.finish_reason,
                    "behaviour_logprobs": None,
                }
            )
            for rollout, completion in zip(owners, completions, strict=True)
        ]
        return [sampled[start : start + count] for start in range(0, len(sampled), count)]

    def _student(self, samples: Sequence[Sequence[Rollout]]) -> StudentFigures | None:
        if not samples:
            return None
        graded = [
            [grade(r.text, len(r.completion_token_ids), r.finish_reason, r.problem, self.grader) for r in of_problem]
            for of_problem in samples
        ]
        return StudentFigures(problems=len(samples), samples=len(samples[0]), solve_rate=_solve_rate(graded))

    def _arm(
        self,
        name: str,
        arm: ArmSection,
        measured: dict[ContextKind, Measured],
        samples: Sequence[Sequence[Rollout]],
    ) -> ArmFigures:
        given: dict[str, Any] = {"arm": name, "objective": arm.objective, "scope": arm.scope}
        none: dict[str, Any] = {**given, "context": None, "solve_rate": None, "focus": None}
        if arm.objective == "fixed_negative":
            return ArmFigures(**none, score=None, note="no prediction: there is neither a teacher nor a reward")
        if arm.objective == "grpo":
            score = self._differing_groups(arm, samples)
            return ArmFigures(**none, score=score, note=None if score else "the grader failed on too many samples")
        of_context = measured[arm.context]
        given["context"] = arm.context
        rate = of_context.figures.solve_rate
        known = [subject.groups.first_error is not None for subject in of_context.subjects]
        if rate is None:
            return ArmFigures(**given, solve_rate=None, focus=None, score=None, note="no rollout can have this context")
        if not any(known):
            note = "no rollout with a known error: set data.checker, or use a critic whose critiques validate"
            return ArmFigures(**given, solve_rate=rate.value, focus=None, score=None, note=note)
        ends = [token_groups(arm.scope, s.rollout, s.critique, s.spans).in_scope for s in of_context.subjects]
        share = focus(of_context.scored, ends)
        note = "the teacher says what the student says: there is no loss" if share is None else None
        score = scaled(rate, share or 0.0)
        return ArmFigures(**given, solve_rate=rate.value, focus=share, score=score, note=note)

    def _differing_groups(self, arm: ArmSection, samples: Sequence[Sequence[Rollout]]) -> Estimate | None:
        """The expected share of groups with differing rewards, over the problems with enough graded samples."""
        chances: list[float] = []
        for of_problem in samples:
            rewards = [value for rollout in of_problem if (value := self._reward(rollout, arm)) is not None]
            if len(rewards) >= arm.group_size:
                chances.append(differing(int(sum(rewards)), len(rewards), arm.group_size))
        return estimate(chances)

    def _reward(self, rollout: Rollout, arm: ArmSection) -> float | None:
        try:
            return reward(rollout, arm.grpo, self.grader)
        except GraderError as error:
            log.warning("no reward", problem=rollout.problem.id, error=str(error))
            return None


def _solve_rate(graded: Sequence[Sequence[GradedSample]]) -> Estimate | None:
    """The mean share of right samples, over what was sampled for: rollouts, or problems. Grader errors are left out."""
    shares: list[float] = []
    for samples in graded:
        known = [float(sample.correct) for sample in samples if sample.correct is not None]
        if known:
            shares.append(sum(known) / len(known))
    return estimate(shares)


def _count_critiques(results: Sequence[ContextResult]) -> CritiqueFigures:
    verdicts = {verdict.value for verdict in Verdict}
    outcomes = Counter(result.critique_outcome or "" for result in results)
    return CritiqueFigures(
        rollouts=len(results),
        validated={name: count for name, count in sorted(outcomes.items()) if name in verdicts},
        refused={name: count for name, count in sorted(outcomes.items()) if name not in verdicts},
    )
