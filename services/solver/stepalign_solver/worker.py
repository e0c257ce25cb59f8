"""The rollout worker: samples the batch of each policy version and publishes it.

Synchronous: the batch of update ``v`` is sampled by policy ``v``, then the worker waits for version ``v + 1``. Sampling
seeds come from (run seed, problem, policy version, sample), so a worker that was killed and started again samples the
same rollouts, and the queue refuses those that it already holds. What it offers to the queue and what became of it is
written to ``published.jsonl``, by which an audit checks the queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from stepalign.types import Problem
from stepalign_models.sampling import Completion, stable_seed
from stepalign_run.config import Config, Dtype
from stepalign_run.logging import get_logger
from stepalign_run.policy_store import PolicyStore, PolicyVersion, verify_adapter, verify_canary
from stepalign_run.queue import Admission, RolloutQueue
from stepalign_run.rollout import Rollout
from stepalign_solver.prompts import StudentPrompts
from stepalign_solver.publications import PublicationJournal
from stepalign_solver.schedule import Draw, ProblemSchedule

log = get_logger(__name__)


FULL_WAIT_SECONDS = 0.2


# Nats, in the mean over the canary's tokens. In 32 bits a merged adapter differs by 1e-5. In 16 bits nothing is merged,
# but another device rounds otherwise: 20 units of rounding are four to six times the difference of SmolLM2, with logits
# of up to 41, from itself in 32 bits (0.035 and 0.003; single tokens 0.3 and 0.01).
CANARY_TOLERANCE = {Dtype.FLOAT32: 3e-4, Dtype.BFLOAT16: 0.15, Dtype.FLOAT16: 0.02}


class CompletionSampler(Protocol):
    def sample(self, prompts: Any, parameters: Any) -> list[Completion]: ...

    def logprobs(self, prompt: list[int], completion: list[int]) -> list[float]: ...


class RolloutWorker:
    def __init__(
        self,
        config: Config,
        queue: RolloutQueue,
        policies: PolicyStore,
        problems: list[Problem],
        tokenizer: Any,
        load_sampler: Callable[[Path | None], CompletionSampler],
    ) -> None:
        self.publications = PublicationJournal(config.run_dir)
        self.config = config
        self.queue = queue
        self.policies = policies
        self.load_sampler = load_sampler
        self.prompts = StudentPrompts(config, tokenizer, problems, config.data.train)
        self.schedule = ProblemSchedule(problems, config.trainer.batch, config.run.seed, config.arm.group_size)

    async def run(self, poll_seconds: float = 0.01) -> None:
        """Serve versions until the trainer says that it has finished."""
        served = -1
        steps = self.config.trainer.steps
        while True:
            # A finished run that is prolonged counts as finished until the trainer publishes again.
            ended = await self.policies.finished()
            policy = await self.policies.latest()
            if ended and policy is not None and policy.version >= steps:
                break
            if policy is None or policy.version >= steps:
                await asyncio.sleep(poll_seconds)
                continue
            if policy.version <= served and await self._still_knows(served):
                await asyncio.sleep(poll_seconds)
                continue
            await self.serve(policy)
            served = policy.version
        log.info("training has finished", served_version=served)

    async def _still_knows(self, served: int) -> bool:
        """Whether the server has the announced rollouts. One that was killed may have lost its last seconds."""
        known = await self.policies.last_sampled() >= served
        if not known:
            log.warning("Redis has lost what was published last; publishing it again", policy_version=served)
        return known

    async def serve(self, policy: PolicyVersion) -> None:
        """Sample and publish the batch of one policy version."""
        sampler = await asyncio.to_thread(self._load, policy)
        draws = self.schedule.draws(policy.version)
        size = self.config.solver.batch
        waiting: list[Rollout] = []
        for start in range(0, len(draws), size):
            waiting += await asyncio.to_thread(self._sample, sampler, policy.version, draws[start : start + size])
            whole = len(waiting) - len(waiting) % self.config.arm.group_size
            for first in range(0, whole, self.config.arm.group_size):
                await self._publish(waiting[first : first + self.config.arm.group_size])
            waiting = waiting[whole:]
        self.publications.sync()
        await self.policies.announce_sampled(policy.version)
        log.info("published", policy_version=policy.version, rollouts=len(draws))

    def _load(self, policy: PolicyVersion) -> CompletionSampler:
        """The sampler of a policy. Raises PolicyError when it does not hold the published adapter."""
        verify_adapter(policy)
        sampler = self.load_sampler(Path(policy.path) if policy.path else None)
        if policy.canary is not None:
            found = sampler.logprobs(policy.canary.prompt_token_ids, policy.canary.completion_token_ids)
            verify_canary(policy, found, CANARY_TOLERANCE[self.config.model.dtype])
        return sampler

    def _sample(self, sampler: CompletionSampler, version: int, draws: list[Draw]) -> list[Rollout]:
        seed = self.config.run.seed
        parameters = [
            self.config.solver.parameters(stable_seed(seed, draw.problem.id, version, draw.sample)) for draw in draws
        ]
        completions = sampler.sample([self.prompts.token_ids[draw.problem.id] for draw in draws], parameters)
        return [
            Rollout(
                run_id=self.config.run.name,
                rollout_id=f"v{version:06d}/{draw.problem.id}/{draw.sample}",
                group_id=f"v{version:06d}/{draw.problem.id}/{draw.group}",
                problem=draw.problem,
                policy_version=version,
                prompt_token_ids=self.prompts.token_ids[draw.problem.id],
                completion_token_ids=completion.token_ids,
                text=completion.text,
                finish_reason=completion.finish_reason,
                sampling=parameters_,
                behaviour_logprobs=completion.logprobs,
            )
            for draw, completion, parameters_ in zip(draws, completions, parameters, strict=True)
        ]

    async def _publish(self, group: list[Rollout]) -> None:
        waiting = False
        self.publications.offer(group)
        while True:
            admission = await self.queue.publish(group)
            if admission is not Admission.FULL:
                break
            if not waiting:
                log.info("the queue is full; waiting", group_id=group[0].group_id)
                waiting = True
            await asyncio.sleep(FULL_WAIT_SECONDS)
        self.publications.answered(group, admission)
        if admission is Admission.DUPLICATE:
            log.info("already published", group_id=group[0].group_id)
