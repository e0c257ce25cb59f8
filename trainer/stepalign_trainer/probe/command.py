"""``stepalign probe-worker``, the process that measures for ``stepalign probe``. Not for use by hand."""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog
import typer
from pydantic import ValidationError

from stepalign.errors import ConfigError
from stepalign.validation import explain
from stepalign_run.commands.arguments import ConfigPath
from stepalign_run.config import load_config
from stepalign_run.folder.files import replace_text
from stepalign_run.logging import configure_logging
from stepalign_run.probing import ProbePlan


def read_plan(path: Path) -> ProbePlan:
    """Raises ConfigError when there is none."""
    try:
        return ProbePlan.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        why = explain(error) if isinstance(error, ValidationError) else error
        raise ConfigError(f"{path} is no plan of a probe; start it with `stepalign probe`: {why}") from None


def probe_worker(ctx: typer.Context, config: ConfigPath) -> None:
    """Measure one batch by the plan in the run's folder. Started by `stepalign probe`."""
    settings = load_config(config, ctx.args)
    configure_logging("probe-worker")
    structlog.contextvars.bind_contextvars(run_id=settings.run.name)
    settings.own_folder.require()
    plan = read_plan(settings.folder.probe_plan)

    from stepalign.plugins import load_checker, load_grader
    from stepalign_models.loading import load_tokenizer
    from stepalign_run.policy_store import PolicyVersion, open_policy_store
    from stepalign_run.queue import open_queue
    from stepalign_trainer.batch.critiques import await_critic, open_critic
    from stepalign_trainer.probe.measure import OUTCOME, Probe, claim_batch
    from stepalign_trainer.update.learner import Learner

    learner = Learner(settings, load_tokenizer(settings.model.path))
    grader = load_grader(settings.data.grader)
    checker = load_checker(settings.data.checker) if settings.data.checker is not None else None
    critic = open_critic(settings.critic) if any(arm.needs_critic for arm in plan.arms.values()) else None
    probe = Probe(settings, plan, learner, grader, critic, checker)

    async def work() -> None:
        queue = open_queue(settings.queue, settings.run.name, consumer="probe-worker")
        policies = open_policy_store(settings.queue, settings.run.name)
        await queue.start()
        try:
            await policies.publish(PolicyVersion(version=0, path="", sha256=""))
            if critic is not None:
                await await_critic(critic)
            batch = await claim_batch(queue, policies, settings.trainer.batch)
            report = await probe.measure([delivery.rollout for delivery in batch])
            replace_text(settings.folder.probe, report.model_dump_json(indent=1) + "\n")
            # Only now: the report that the rollouts were sampled for is on disk.
            await queue.acknowledge({delivery.entry_id: OUTCOME for delivery in batch})
        finally:
            if critic is not None:
                await critic.aclose()
            await policies.close()
            await queue.close()

    asyncio.run(work())
