"""The probe's samples: of the self-teacher under a context, and of the student itself. The adapter is off for both."""

from __future__ import annotations

import random
from collections.abc import Sequence

from stepalign.critique.answers import Grader
from stepalign.plugins import Checker
from stepalign.scoring import GradedSample, grade
from stepalign_models.sampling import Completion, Sampler
from stepalign_run.config import SamplingSection
from stepalign_run.rollout import Rollout
from stepalign_trainer.update.learner import Learner


class ProbeSampler:
    """Its random numbers depend on (run seed, whose sample, rollout or problem, number of the sample) alone."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.sampler = Sampler(learner.model.get_base_model(), learner.tokenizer)

    def of_teacher(
        self,
        rollouts: Sequence[Rollout],
        prompts: Sequence[list[int]],
        count: int,
        grader: Grader,
        checker: Checker | None,
    ) -> list[list[GradedSample]]:
        """``count`` graded samples of each rollout's self-teacher, at the evaluation's temperature."""
        settings = self.learner.config.evaluation
        completions = self._sample(
            [prompt for prompt in prompts for _ in range(count)],
            [self._seed("teacher", rollout.rollout_id, i) for rollout in rollouts for i in range(count)],
            settings,
            settings.batch,
        )
        owners = [rollout.problem for rollout in rollouts for _ in range(count)]
        graded = [
            grade(c.text, len(c.token_ids), c.finish_reason, problem, grader, checker)
            for c, problem in zip(completions, owners, strict=True)
        ]
        return [graded[start : start + count] for start in range(0, len(graded), count)]

    def of_student(self, rollouts: Sequence[Rollout], count: int) -> list[list[Rollout]]:
        """``count`` samples of each problem, as the solver would publish them."""
        settings = self.learner.config.solver
        problems = list({rollout.problem.id: rollout for rollout in rollouts}.values())
        owners = [rollout for rollout in problems for _ in range(count)]
        completions = self._sample(
            [rollout.prompt_token_ids for rollout in owners],
            [self._seed("student", rollout.problem.id, i) for rollout in problems for i in range(count)],
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

    def _sample(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], settings: SamplingSection, batch: int
    ) -> list[Completion]:
        completions: list[Completion] = []
        with self.learner.teacher():
            for start in range(0, len(prompts), batch):
                part = slice(start, start + batch)
                completions += self.sampler.sample(prompts[part], [settings.parameters(seed) for seed in seeds[part]])
        return completions

    def _seed(self, *parts: object) -> int:
        name = " ".join(map(str, ("probe", self.learner.config.run.seed, *parts)))
        return random.Random(name).getrandbits(63)
