"""The training loop: claim → contexts → update → checkpoint → publish → acknowledge."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from stepalign.config import Config
from stepalign.errors import CheckpointError, NonFiniteError, PromptTooLongError, QueueUnavailableError
from stepalign.files import replace_text
from stepalign.logging import get_logger
from stepalign.plugins import load_grader
from stepalign.policy_store import PolicyStore, PolicyVersion, file_sha256, weights_sha256
from stepalign.queue import Delivery, RolloutQueue
from stepalign.types import Rollout
from stepalign_trainer.alarms import Alarms
from stepalign_trainer.checkpoint import (
    ADAPTER,
    TrainerState,
    check_run,
    latest_checkpoint,
    load_checkpoint,
    publish_adapter,
    save_checkpoint,
)
from stepalign_trainer.contexts import ContextResult, Contexts
from stepalign_trainer.examples import Example, build_example
from stepalign_trainer.journal import MetricsJournal
from stepalign_trainer.learner import Learner, UpdateMetrics
from stepalign_trainer.rewards import Rewards, reward_batch
from stepalign_trainer.token_view import TokenJournal, token_row

log = get_logger(__name__)

CLAIM_BLOCK_SECONDS = 1.0
TRAINED = "trained"
STALE = "stale"
FAILURE = "failure.json"


def fingerprint(config: Config) -> str:
    """What must be the same for a run to be continued: all that shapes its weights, but its length and its hardware."""
    shaping = config.trainer.model_dump(mode="json", exclude={"steps", "keep_checkpoints", "token_view"})
    critic = config.critic if config.arm.needs_critic else None
    content = {
        "seed": config.run.seed,
        "arm": config.arm_name,
        "condition": config.arm.model_dump(mode="json"),
        "grader": config.data.grader,
        "base": weights_sha256(config.model.path),
        "model": config.model.model_dump(mode="json", exclude={"path", "device"}),
        "problems": file_sha256(config.data.train),
        "critic": critic.shaping() if critic is not None else None,
        "critic_weights": weights_sha256(critic.path) if critic is not None and critic.path is not None else None,
        "trainer": shaping,
        "solver": config.solver.model_dump(mode="json", exclude={"batch"}),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class Trainer:
    """Consumes rollouts and publishes policy versions; version ``v`` is the policy after ``v`` updates."""

    def __init__(
        self,
        config: Config,
        learner: Learner,
        queue: RolloutQueue,
        policies: PolicyStore,
        contexts: Contexts,
        journal: MetricsJournal,
    ) -> None:
        self.config = config
        self.learner = learner
        self.queue = queue
        self.policies = policies
        self.contexts = contexts
        self.journal = journal
        self.step = 0
        self.fingerprint = fingerprint(config)
        self.settled: dict[str, str] = {}
        self.alarms = Alarms(config.alarms, config.trainer.max_grad_norm)
        self.tokens = TokenJournal(config.run_dir)
        self.grader = load_grader(config.data.grader)

    async def train(self) -> None:
        """Run to ``trainer.steps``, from the newest checkpoint if there is one."""
        self._resume()
        await self._publish()
        while self.step < self.config.trainer.steps:
            deliveries = await self._claim_batch()
            async with self._alive(deliveries):
                await self._train_on(deliveries)
        await self._settle_the_rest()
        await self.policies.finish()
        log.info("training has finished", step=self.step)

    async def _settle_the_rest(self) -> None:
        """Acknowledge what a kill left between the last checkpoint and its acknowledgement."""
        while (await self.queue.status()).length:
            claimed = await self.queue.claim(self.config.trainer.batch, CLAIM_BLOCK_SECONDS)
            await self._keep_fresh(claimed)

    def _resume(self) -> None:
        check_run(self.config.run_dir, self.fingerprint, self.config.run.seed, self.config.arm_name)
        directory = latest_checkpoint(self.config.run_dir)
        if directory is not None:
            state = load_checkpoint(self.learner, directory, self.fingerprint)
            self.step, self.settled = state.step, state.settled
            log.info("resumed", step=self.step, checkpoint=directory.name)
        self.journal.resume_at(self.step)
        for row in self.journal.rows():
            self.alarms.check(row)
        # Only now: a run that cannot go on keeps the report of what stopped it.
        (self.config.run_dir / FAILURE).unlink(missing_ok=True)

    async def _claim_batch(self) -> list[Delivery]:
        """The batch of this step: as many rollouts as it has, fewer only when some went to the dead letters."""
        wanted = self.config.trainer.batch
        batch: list[Delivery] = []
        while len(batch) < wanted:
            claimed = await self.queue.claim(wanted - len(batch), CLAIM_BLOCK_SECONDS)
            batch.extend(await self._keep_fresh(claimed))
            if batch:
                await self.queue.heartbeat([delivery.entry_id for delivery in batch])
            if not claimed and await self._no_more_will_come(len(batch)):
                log.warning("a short batch: rollouts of this step are dead letters", rollouts=len(batch))
                break
        return sorted(batch, key=lambda delivery: delivery.rollout.rollout_id)

    async def _no_more_will_come(self, held: int) -> bool:
        # Asked in this order: what is published between the two questions must be seen in the queue.
        whole_batch_published = await self.policies.last_sampled() >= self.step
        return whole_batch_published and (await self.queue.status()).length == held

    async def _keep_fresh(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Acknowledge what a checkpoint already holds, and what another policy sampled; return the rest."""
        fresh: list[Delivery] = []
        settled: dict[str, str] = {}
        for delivery in deliveries:
            rollout = delivery.rollout
            if rollout.rollout_id in self.settled:
                settled[delivery.entry_id] = self.settled[rollout.rollout_id]
            elif self.step - rollout.policy_version > self.config.trainer.max_staleness:
                log.warning("stale rollout", rollout_id=rollout.rollout_id, policy_version=rollout.policy_version)
                settled[delivery.entry_id] = STALE
            else:
                fresh.append(delivery)
        if settled:
            await self.queue.acknowledge(settled)
        return fresh

    async def _train_on(self, deliveries: Sequence[Delivery]) -> None:
        results = await self.contexts.fetch([delivery.rollout for delivery in deliveries])
        rewards = self._rewards([delivery.rollout for delivery in deliveries])
        examples, outcomes = self._examples(deliveries, results, rewards)
        try:
            metrics = await self._update(deliveries, results, examples)
        except NonFiniteError as error:
            raise self._stopped_by(error) from None
        self.step += 1
        self.settled = {d.rollout.rollout_id: outcome for d, outcome in zip(deliveries, outcomes, strict=True)}
        self._record(metrics, outcomes, results, rewards)
        await self._checkpoint()
        await self._publish()
        # Only now: the checkpoint that contains these rollouts is durable.
        await self.queue.acknowledge({d.entry_id: outcome for d, outcome in zip(deliveries, outcomes, strict=True)})

    async def _update(
        self, deliveries: Sequence[Delivery], results: Sequence[ContextResult], examples: Sequence[Example]
    ) -> UpdateMetrics:
        """The update, and before it what is looked at once. All of it raises NonFiniteError."""
        if self.step == 0 and deliveries:
            first = deliveries[0].rollout
            self.learner.check_teacher_is_student(first.prompt_token_ids, first.completion_token_ids)
        if self.config.trainer.token_view and self.step in (0, self.config.trainer.steps - 1):
            await asyncio.to_thread(self._show_tokens, deliveries, results)
        return await asyncio.to_thread(self.learner.update, examples)

    def _rewards(self, rollouts: Sequence[Rollout]) -> Rewards | None:
        """The rewards of the batch; None in arms without."""
        if self.config.arm.objective != "grpo":
            return None
        return reward_batch(rollouts, self.config.arm.grpo, self.grader)

    def _examples(
        self, deliveries: Sequence[Delivery], results: Sequence[ContextResult], rewards: Rewards | None
    ) -> tuple[list[Example], list[str]]:
        examples: list[Example] = []
        outcomes: list[str] = []
        for delivery, result in zip(deliveries, results, strict=True):
            rollout = delivery.rollout
            refusal = result.skip_reason if rewards is None else rewards.skip_reasons.get(rollout.rollout_id)
            if result.context is None or refusal is not None:
                outcomes.append(f"skipped:{refusal}")
                continue
            advantage = None if rewards is None else rewards.advantages[rollout.rollout_id]
            try:
                example = build_example(
                    self.config, self.learner.tokenizer, rollout, result.context, result.critique, advantage
                )
            except PromptTooLongError as error:
                log.warning("skipped", rollout_id=rollout.rollout_id, error=str(error))
                outcomes.append("skipped:teacher_prompt_too_long")
                continue
            examples.append(example)
            outcomes.append(TRAINED)
        return examples, outcomes

    def _record(
        self,
        metrics: UpdateMetrics,
        outcomes: Sequence[str],
        results: Sequence[ContextResult],
        rewards: Rewards | None,
    ) -> None:
        critiques = Counter(result.critique_outcome for result in results if result.critique_outcome is not None)
        row: dict[str, Any] = {
            "step": self.step,
            "rollouts": len(outcomes),
            **metrics.as_row(),
            **(rewards.as_row() if rewards is not None else {}),
            "outcomes": dict(sorted(Counter(outcomes).items())),
            "critiques": dict(sorted(critiques.items())),
        }
        row["alarms"] = self.alarms.check(row)
        self.journal.append(row)
        log.info("update", **row)
        for alarm in row["alarms"]:
            log.warning("alarm", alarm=alarm, step=self.step)

    def _show_tokens(self, deliveries: Sequence[Delivery], results: Sequence[ContextResult]) -> None:
        # Every problem once before any a second time: groups hold rollouts that are much alike.
        seen: Counter[str] = Counter()
        ranked: list[tuple[int, Rollout, ContextResult]] = []
        for delivery, result in zip(deliveries, results, strict=True):
            problem = delivery.rollout.problem.id
            ranked.append((seen[problem], delivery.rollout, result))
            seen[problem] += 1
        shown = sorted(ranked, key=lambda item: item[0])[: self.config.trainer.token_view]
        rows = [token_row(self.learner, self.step + 1, rollout, result, self.grader) for _, rollout, result in shown]
        self.tokens.replace(self.step + 1, rows)

    def _stopped_by(self, error: NonFiniteError) -> NonFiniteError:
        """Leave a report of the failure, and say how to go on. The batch stays in the queue, unacknowledged."""
        checkpoint = latest_checkpoint(self.config.run_dir)
        good = f"step {self.step}" + (f" ({checkpoint})" if checkpoint is not None else ", the base model")
        message = (
            f"update {self.step + 1} was not applied: {error}. The run has stopped at {good}, and none of its "
            "rollouts is lost. Look at the last rows of metrics.jsonl; then --resume repeats the update, and a lower "
            "trainer.learning_rate or another model.dtype needs a run under another name"
        )
        failure = {"update": self.step + 1, "reason": str(error), "last_good_step": self.step, "at": time.time()}
        replace_text(self.config.run_dir / FAILURE, json.dumps({**failure, "message": message}, indent=1) + "\n")
        return NonFiniteError(message)

    async def _checkpoint(self) -> None:
        state = TrainerState(step=self.step, fingerprint=self.fingerprint, settled=self.settled)
        keep = self.config.trainer.keep_checkpoints
        await asyncio.to_thread(save_checkpoint, self.learner, self.config.run_dir, state, keep)

    async def _publish(self) -> None:
        if self.step == 0:
            policy = PolicyVersion(version=0, path="", sha256="")
        else:
            path = await asyncio.to_thread(publish_adapter, self.learner, self.config.run_dir, self.step)
            policy = PolicyVersion(version=self.step, path=str(path.resolve()), sha256=file_sha256(path / ADAPTER))
        if not await self.policies.publish(policy):
            raise CheckpointError(
                f"step {self.step} lies behind the policy that was already published: its rollouts are gone, so the "
                "run cannot go on from there; start again with --overwrite"
            )

    @asynccontextmanager
    async def _alive(self, deliveries: Sequence[Delivery]) -> AsyncIterator[None]:
        """Tell the queue that the claimed rollouts are being worked on, however long it takes."""
        held = [delivery.entry_id for delivery in deliveries]

        async def beat() -> None:
            while True:
                await asyncio.sleep(self.config.queue.claim_idle_seconds / 3)
                try:
                    await self.queue.heartbeat(held)
                except QueueUnavailableError as error:
                    log.warning("no heartbeat", error=str(error))

        task = asyncio.create_task(beat())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
