"""``stepalign trainer``. Torch is imported only once the configuration has been read."""

from __future__ import annotations

import asyncio

import structlog
import typer

from stepalign_run.commands.arguments import ConfigPath
from stepalign_run.config import Config, load_config
from stepalign_run.folder.files import lock_file
from stepalign_run.heartbeat import Heartbeat
from stepalign_run.logging import configure_logging


def trainer(ctx: typer.Context, config: ConfigPath) -> None:
    """Train on queued rollouts and publish each new policy."""
    settings = load_config(config, ctx.args)
    configure_logging("trainer")
    structlog.contextvars.bind_contextvars(run_id=settings.run.name)
    settings.own_folder.claim()
    # Two trainers would be one consumer to the queue, and train on the same rollouts.
    in_use = f"another trainer works on {settings.run_dir}; a run has one: end it, or give this one another run.name"
    with lock_file(settings.folder.trainer_lock, in_use):
        _train(settings)


def _train(settings: Config) -> None:
    from stepalign.plugins import load_checker, load_grader
    from stepalign_models.loading import load_tokenizer
    from stepalign_run.policy_store import open_policy_store
    from stepalign_run.queue import open_queue
    from stepalign_trainer.batch.contexts import Contexts
    from stepalign_trainer.batch.critiques import await_critic, open_critic
    from stepalign_trainer.durable.step_journal import StepJournal
    from stepalign_trainer.loop import Trainer
    from stepalign_trainer.update.learner import Learner

    learner = Learner(settings, load_tokenizer(settings.model.path))

    async def work() -> None:
        async with Heartbeat(settings.run.heartbeat_file).beating():
            await train()

    async def train() -> None:
        queue = open_queue(settings.queue, settings.run.name, consumer="trainer")
        policies = open_policy_store(settings.queue, settings.run.name)
        await queue.start()
        critic = open_critic(settings.critic) if settings.arm.needs_critic else None
        try:
            if critic is not None:
                await await_critic(critic)
            checker = load_checker(settings.data.checker) if settings.data.checker is not None else None
            grader = load_grader(settings.data.grader)
            contexts = Contexts(settings.arm.context, critic, settings.critic.concurrency, checker, grader)
            trainer = Trainer(settings, learner, queue, policies, contexts, StepJournal(settings.folder.metrics))
            await trainer.train()
        finally:
            if critic is not None:
                await critic.aclose()
            await policies.close()
            await queue.close()

    asyncio.run(work())
