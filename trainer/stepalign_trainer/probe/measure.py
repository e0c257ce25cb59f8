"""The teaching of each arm, measured on one batch before anything is trained: the worker of ``stepalign probe``.

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
from functools import cached_property
from importlib.metadata import version

from transformers import AutoConfig

from stepalign.critique.answers import Grader
from stepalign.errors import ConfigError, UnusableRolloutError
from stepalign.plugins import Checker
from stepalign.problems import problems_sha256
from stepalign.prompts.content_tokens import content_token_ids
from stepalign.scoring import grade
from stepalign.types import Critique, CritiqueRequest, CritiqueResponse, FinishReason, Verdict
from stepalign_run.config import Config
from stepalign_run.context import ContextKind
from stepalign_run.logging import get_logger
from stepalign_run.policy_store import PolicyStore, weights_sha256
from stepalign_run.probing import (
    ContextFigures,
    CritiqueFigures,
    ProbePlan,
    ProbeReport,
    StudentFigures,
)
from stepalign_run.queue import Delivery, RolloutQueue
from stepalign_run.rollout import Rollout
from stepalign_trainer.batch.contexts import ContextResult, Contexts, checked_critique
from stepalign_trainer.batch.critiques import CritiqueSource
from stepalign_trainer.batch.examples import check_readable, teacher_prompt_ids
from stepalign_trainer.batch.scope import token_groups
from stepalign_trainer.batch.spans import token_spans
from stepalign_trainer.loop import CLAIM_BLOCK_SECONDS
from stepalign_trainer.probe.arms import Measured, Subject, score_arm
from stepalign_trainer.probe.figures import ScoredRollout, contrast, solve_rate
from stepalign_trainer.probe.samples import ProbeSampler
from stepalign_trainer.update.canary import canary_sequence
from stepalign_trainer.update.learner import Learner

log = get_logger(__name__)

PACKAGES = ("stepalign", "torch", "transformers", "peft")
OUTCOME = "skipped:probe"


class RememberedCritiques:
    """A critic that is asked once for each rollout and form of its critique, by any number of contexts."""

    def __init__(self, critic: CritiqueSource) -> None:
        self._critic = critic
        self._answers: dict[CritiqueRequest, CritiqueResponse] = {}

    async def critique(self, request: CritiqueRequest, request_id: str | None = None) -> CritiqueResponse:
        if request not in self._answers:
            self._answers[request] = await self._critic.critique(request, request_id)
        return self._answers[request]


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
        self.samples = ProbeSampler(learner)
        positions = getattr(AutoConfig.from_pretrained(config.model.path), "max_position_embeddings", None)
        longest = config.trainer.max_teacher_prompt_tokens + config.evaluation.max_new_tokens
        if positions is not None and longest > positions:
            raise ConfigError(
                f"trainer.max_teacher_prompt_tokens and evaluation.max_new_tokens together are {longest}, over the "
                f"model's {positions} positions; lower one of them"
            )

    @cached_property
    def kinds(self) -> list[ContextKind]:
        """The kinds of context of the plan's arms, in the order of the enumeration."""
        wanted = {arm.context for arm in self.plan.arms.values() if arm.needs.teacher}
        return [kind for kind in ContextKind if kind in wanted]

    async def measure(self, rollouts: Sequence[Rollout]) -> ProbeReport:
        """Raises ConfigError when the checker cannot handle a problem, and CriticError as the trainer does."""
        self.learner.check_teacher_is_student(*canary_sequence(self.config, self.learner.tokenizer))
        own = await self._contexts(ContextKind.CRITIQUE, rollouts) if self.critic is not None else None
        critiques = [result.critique for result in own] if own is not None else [None] * len(rollouts)
        unusable: Counter[str] = Counter()
        subjects: list[Subject] = []
        for rollout, critique in zip(rollouts, critiques, strict=True):
            try:
                subjects.append(self._subject(rollout, critique))
            except UnusableRolloutError as error:
                log.warning("left out", rollout_id=rollout.rollout_id, reason=error.reason.value, error=str(error))
                unusable[error.reason.value] += 1
        rollouts = [subject.rollout for subject in subjects]
        measured: dict[ContextKind, Measured] = {}
        for kind in self.kinds:
            measured[kind] = self._measure(kind, subjects, await self._contexts(kind, rollouts))
            log.info("measured", **measured[kind].figures.model_dump(mode="json"))
        samples = self._student_samples(rollouts)
        arms = [score_arm(name, arm, measured, samples, self.grader) for name, arm in self.plan.arms.items()]
        config = self.config
        return ProbeReport(
            run=config.run.name,
            seed=config.run.seed,
            rollouts=len(rollouts),
            unusable=dict(sorted(unusable.items())),
            with_error=sum(subject.groups.first_error is not None for subject in subjects),
            unlocated=sum(subject.critique is None for subject in subjects),
            samples=self.plan.samples,
            contexts=[found.figures for found in measured.values()],
            critiques=_count_critiques(own) if own is not None else None,
            student=self._student(samples),
            arms=sorted(arms, key=lambda arm: (arm.score is None, -arm.score.value if arm.score else 0.0, arm.arm)),
            terms={
                "base": weights_sha256(config.model.path),
                "train": problems_sha256(config.data.train),
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
            critique = checked_critique(rollout, self.checker, self.grader)
        check_readable(rollout, rollout.prompt_token_ids, self.learner.limits)
        spans = token_spans(rollout, self.learner.tokenizer)
        return Subject(rollout, critique, spans, token_groups("through_first_error", rollout, critique, spans))

    def _measure(self, kind: ContextKind, subjects: Sequence[Subject], results: Sequence[ContextResult]) -> Measured:
        left_out: Counter[str] = Counter()
        usable: list[Subject] = []
        prompts: list[list[int]] = []
        for subject, result in zip(subjects, results, strict=True):
            try:
                prompt = self._teacher_prompt(subject.rollout, result)
            except UnusableRolloutError as error:
                left_out[error.reason.value] += 1
                continue
            if prompt is None:
                left_out[result.skip_reason or ""] += 1
                continue
            usable.append(subject)
            prompts.append(prompt)
        scored = [self._scored(subject, prompt) for subject, prompt in zip(usable, prompts, strict=True)]
        gains = [self._gain(subject, prompt) for subject, prompt in zip(usable, prompts, strict=True)]
        known = [gain for gain in gains if gain is not None]
        owners = [subject.rollout for subject in usable]
        graded = self.samples.of_teacher(owners, prompts, self.plan.samples, self.grader, self.checker)
        flat = [sample for samples in graded for sample in samples]
        right = [sample for sample in flat if sample.correct is not None]
        traces = sum(sample.trace_correct is True for sample in right)
        figures = ContextFigures(
            kind=kind,
            rollouts=len(usable),
            left_out=dict(sorted(left_out.items())),
            solve_rate=solve_rate(graded),
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
        prompt = teacher_prompt_ids(self.config, self.learner.tokenizer, rollout, result.context)
        check_readable(rollout, prompt, self.learner.limits)
        return prompt

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
        eos = rollout.completion_token_ids[-1] if stopped else self.samples.sampler.eos_ids[0]
        token_ids = [*content_token_ids(self.learner.tokenizer, subject.critique.text), eos]
        return token_ids if len(token_ids) <= self.config.evaluation.max_new_tokens else None

    def _student_samples(self, rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
        """The student's own samples of each problem; none where no arm needs rewards.

        As many as the larger of ``plan.samples`` and the largest group: with fewer than a group no estimate of its
        rewards is unbiased.
        """
        groups = [arm.group_size for arm in self.plan.arms.values() if arm.needs.rewards]
        return self.samples.of_student(rollouts, max(self.plan.samples, *groups)) if groups else []

    def _student(self, samples: Sequence[Sequence[Rollout]]) -> StudentFigures | None:
        if not samples:
            return None
        graded = [
            [grade(r.text, len(r.completion_token_ids), r.finish_reason, r.problem, self.grader) for r in of_problem]
            for of_problem in samples
        ]
        return StudentFigures(problems=len(samples), samples=len(samples[0]), solve_rate=solve_rate(graded))


def _count_critiques(results: Sequence[ContextResult]) -> CritiqueFigures:
    verdicts = {verdict.value for verdict in Verdict}
    outcomes = Counter(result.critique_outcome or "" for result in results)
    return CritiqueFigures(
        rollouts=len(results),
        validated={name: count for name, count in sorted(outcomes.items()) if name in verdicts},
        refused={name: count for name, count in sorted(outcomes.items()) if name not in verdicts},
    )
