"""The training loop: claim → contexts → update → checkpoint → acknowledge → publish."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from stepalign.errors import NonFiniteError, QueueUnavailableError
from stepalign.plugins import load_grader
from stepalign_run.config import Config
from stepalign_run.fingerprint import fingerprint
from stepalign_run.folder.files import replace_text
from stepalign_run.folder.layout import ADAPTER_FILE
from stepalign_run.logging import get_logger
from stepalign_run.policy_store import PolicyStore, PolicyVersion, file_sha256
from stepalign_run.queue import Delivery, RolloutQueue
from stepalign_trainer.alarms import Alarms
from stepalign_trainer.batch.contexts import Contexts
from stepalign_trainer.batch.item import Item, make_items
from stepalign_trainer.durable.checkpoint import (
    TrainerState,
    check_checkpoint,
    check_run,
    checkpoints,
    load_newest,
    publish_adapter,
    save_checkpoint,
)
from stepalign_trainer.durable.retention import prune
from stepalign_trainer.durable.settlement import Settlement
from stepalign_trainer.durable.step_journal import StepJournal
from stepalign_trainer.token_view import TokenJournal, token_rows
from stepalign_trainer.update.canary import canary_sequence, measure_canary
from stepalign_trainer.update.learner import Learner
from stepalign_trainer.update.metrics import UpdateMetrics

log = get_logger(__name__)

CLAIM_BLOCK_SECONDS = 1.0
# In capacities of the queue. Rollouts that a power cut brings back once they were acknowledged are known by it.
SETTLED_WINDOW = 8


class Trainer:
    """Consumes rollouts and publishes policy versions; version ``v`` is the policy after ``v`` updates."""

    def __init__(
        self,
        config: Config,
        learner: Learner,
        queue: RolloutQueue,
        policies: PolicyStore,
        contexts: Contexts,
        journal: StepJournal,
    ) -> None:
        self.config = config
        self.learner = learner
        self.queue = queue
        self.policies = policies
        self.contexts = contexts
        self.journal = journal
        self.step = 0
        self.fingerprint = fingerprint(config)
        self.canary = canary_sequence(config, learner.tokenizer)
        self.early: list[Delivery] = []
        """Rollouts of policies that are still to come, as after a fall back to an older checkpoint."""
        outcomes = StepJournal(config.folder.outcomes)
        self.settlement = Settlement(queue, outcomes, SETTLED_WINDOW * config.queue.capacity)
        self.alarms = Alarms(config.alarms, config.trainer.max_grad_norm)
        self.tokens = TokenJournal(config.run_dir)
        self.grader = load_grader(config.data.grader)

    async def train(self) -> None:
        """Run to ``trainer.steps``, from the newest whole checkpoint if there is one."""
        await self._resume()
        await self._publish()
        while self.step < self.config.trainer.steps:
            deliveries = await self._claim_batch()
            async with self._alive(deliveries):
                await self._train_on(deliveries)
        await self._settle_the_rest()
        await self.policies.finish()
        log.info("training has finished", step=self.step)

    async def _settle_the_rest(self) -> None:
        """Acknowledge the rollouts that no checkpoint will follow, and those that a kill left behind."""
        newest = checkpoints(self.config.run_dir)
        if self.settlement.held:
            check_checkpoint(newest[-1])
        await self.settlement.finish()
        await self.settlement.stale(self.early)
        while (await self.queue.status()).length:
            claimed = await self.queue.claim(self.config.trainer.batch, CLAIM_BLOCK_SECONDS)
            await self.settlement.stale(await self.settlement.without_known(claimed))

    async def _resume(self) -> None:
        check_run(self.config.run_dir, self.fingerprint, self.config.run.seed, self.config.arm_name)
        state = load_newest(self.learner, self.config.run_dir, self.fingerprint)
        if state is not None:
            self.step = state.step
            log.info("resumed", step=self.step)
        settled, total = ({}, 0) if state is None else (state.settled, state.settled_total)
        await self.settlement.resume(self.step, settled, total)
        self.journal.resume_at(self.step)
        for row in self.journal.rows():
            self.alarms.check(row)
        # Only now: a run that cannot go on keeps the report of its failure.
        (self.config.folder.failure).unlink(missing_ok=True)

    async def _claim_batch(self) -> list[Delivery]:
        """The batch of this step: as many rollouts as it has, fewer only when some went to the dead letters."""
        wanted = self.config.trainer.batch
        batch: list[Delivery] = []
        await self._sort_in(self.early, batch)
        while len(batch) < wanted:
            claimed = await self.queue.claim(wanted - len(batch), CLAIM_BLOCK_SECONDS)
            await self._sort_in([*self.early, *claimed], batch)
            held = self._held(batch)
            await self.queue.heartbeat(held)
            if not claimed:
                await self._see_that_the_policy_is_known()
            if not claimed and await self._no_more_will_come(len(held)):
                log.warning("a short batch: rollouts of this step are dead letters", rollouts=len(batch))
                break
        return sorted(batch, key=lambda delivery: delivery.rollout.rollout_id)

    async def _no_more_will_come(self, held: int) -> bool:
        # Asked in this order: a rollout that is published between the two questions must be seen in the queue.
        whole_batch_published = await self.policies.last_sampled() >= self.step
        return whole_batch_published and (await self.queue.status()).length == held

    async def _see_that_the_policy_is_known(self) -> None:
        """Publish it again when the server has lost it: one that was killed may lack its last seconds."""
        known = await self.policies.latest()
        if known is None or known.version < self.step:
            log.warning("Redis has lost the newest policy; publishing it again", version=self.step)
            await self._publish()

    async def _sort_in(self, deliveries: Sequence[Delivery], batch: list[Delivery]) -> None:
        """Add this step's rollouts to ``batch``, keep the early ones, settle the rest."""
        stale: list[Delivery] = []
        self.early = []
        for delivery in await self.settlement.without_known(deliveries):
            age = self.step - delivery.rollout.policy_version
            if age > 0:
                rollout = delivery.rollout
                log.warning("stale rollout", rollout_id=rollout.rollout_id, policy_version=rollout.policy_version)
                stale.append(delivery)
            else:
                (self.early if age < 0 else batch).append(delivery)
        await self.settlement.stale(stale)

    def _held(self, batch: Sequence[Delivery]) -> list[str]:
        """All entries that are ours and not acknowledged."""
        return [delivery.entry_id for delivery in (*batch, *self.early)] + self.settlement.held

    async def _train_on(self, deliveries: Sequence[Delivery]) -> None:
        rollouts = [delivery.rollout for delivery in deliveries]
        contexts = await self.contexts.fetch(rollouts)
        # In a thread: a grader may take seconds, in which the claims must be kept alive.
        rewards = await asyncio.to_thread(self.learner.objective.rewards, rollouts, self.grader)
        items = make_items(self.config, self.learner.tokenizer, self.learner.limits, deliveries, contexts, rewards)
        try:
            metrics = await self._update(items)
        except NonFiniteError as error:
            raise self._stopped_by(error) from None
        self.step += 1
        self.settlement.settle(self.step, [(item.delivery, item.outcome) for item in items])
        self._record(items, {**metrics.as_row(), **rewards.columns})
        if self.step % self.config.trainer.checkpoint_every == 0 or self.step == self.config.trainer.steps:
            await self._checkpoint()
        await self._publish()

    async def _update(self, items: Sequence[Item]) -> UpdateMetrics:
        """The update, and before it the looks that are taken once. All of it raises NonFiniteError."""
        if self.step == 0:
            # Not on a rollout: it may be one that no model can read.
            self.learner.check_teacher_is_student(*self.canary)
        if self.config.trainer.token_view and self.step in (0, self.config.trainer.steps - 1):
            await asyncio.to_thread(self._show_tokens, items)
        examples = [item.example for item in items if item.example is not None]
        return await asyncio.to_thread(self.learner.update, examples)

    def _record(self, items: Sequence[Item], figures: Mapping[str, Any]) -> None:
        critiques = Counter(
            item.context.critique_outcome for item in items if item.context.critique_outcome is not None
        )
        row: dict[str, Any] = {
            "step": self.step,
            "rollouts": len(items),
            **figures,
            "outcomes": dict(sorted(Counter(item.outcome for item in items).items())),
            "critiques": dict(sorted(critiques.items())),
        }
        row["alarms"] = self.alarms.check(row)
        self.journal.append(row)
        log.info("update", **row)
        for alarm in row["alarms"]:
            log.warning("alarm", alarm=alarm, step=self.step)

    def _show_tokens(self, items: Sequence[Item]) -> None:
        rows = token_rows(self.learner, self.step + 1, items, self.grader, self.config.trainer.token_view)
        self.tokens.replace(self.step + 1, rows)

    def _stopped_by(self, error: NonFiniteError) -> NonFiniteError:
        """Leave a report of the failure, and say how to go on. The batch stays in the queue, unacknowledged."""
        good = f"step {self.step}" if self.step else "the base model"
        message = (
            f"update {self.step + 1} was not applied: {error}. The run has stopped at {good}, and none of its "
            "rollouts is lost. Look at the last rows of metrics.jsonl; then --resume repeats the update, and a lower "
            "trainer.learning_rate or another model.dtype needs a run under another name"
        )
        failure = {"update": self.step + 1, "reason": str(error), "last_good_step": self.step, "at": time.time()}
        replace_text(self.config.folder.failure, json.dumps({**failure, "message": message}, indent=1) + "\n")
        return NonFiniteError(message)

    async def _checkpoint(self) -> None:
        state = TrainerState(
            step=self.step,
            fingerprint=self.fingerprint,
            settled=self.settlement.settled,
            settled_total=self.settlement.total,
        )
        await asyncio.to_thread(save_checkpoint, self.learner, self.config.run_dir, state)
        await self.settlement.checkpointed()
        prune(self.config)

    async def _publish(self) -> None:
        if self.step == 0:
            policy = PolicyVersion(version=0, path="", sha256="")
        else:
            path = await asyncio.to_thread(publish_adapter, self.learner, self.config.run_dir, self.step)
            canary = await asyncio.to_thread(measure_canary, self.learner, self.canary)
            digest = file_sha256(path / ADAPTER_FILE)
            policy = PolicyVersion(version=self.step, path=str(path.resolve()), sha256=digest, canary=canary)
        if not await self.policies.publish(policy):
            log.info("already published, and later versions too", version=self.step)

    @asynccontextmanager
    async def _alive(self, deliveries: Sequence[Delivery]) -> AsyncIterator[None]:
        """Tell the queue that the claimed rollouts are being worked on, however long it takes."""
        over = asyncio.Event()

        async def beat() -> None:
            while not await _within(over, self.config.queue.claim_idle_seconds / 3):
                try:
                    await self.queue.heartbeat(self._held(deliveries))
                except QueueUnavailableError as error:
                    log.warning("no heartbeat", error=str(error))

        task = asyncio.create_task(beat())
        try:
            yield
        finally:
            # Not by cancelling it: a command that is cut off on its way may swallow that, and the beat would go on.
            over.set()
            await task


async def _within(event: asyncio.Event, seconds: float) -> bool:
    """Whether the event is set before so many seconds have passed."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False
