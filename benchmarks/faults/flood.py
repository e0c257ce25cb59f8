"""A producer that never waits for a trainer: it offers copies of a rollout under new names as fast as it is let."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from stepalign_run.config import load_config
from stepalign_run.queue import Admission, open_queue
from stepalign_solver.publications import PublicationJournal


def flood(config_path: str, rollouts: int) -> None:
    """Publish so many copies of a rollout of the queue, each a group of its own, and record them as the solver does.

    The model of the copies stays this consumer's until it is silent for too long, as if it had been killed.
    """
    config = load_config(Path(config_path))

    async def work() -> None:
        queue = open_queue(config.queue, config.run.name, "producer")
        journal = PublicationJournal(config.run_dir)
        (model,) = (await queue.claim(1, 10.0))[:1]
        for number in range(rollouts):
            name = f"flood/{number}"
            group = [model.rollout.model_copy(update={"rollout_id": name, "group_id": name})]
            journal.offer(group)
            while (admission := await queue.publish(group)) is Admission.FULL:
                time.sleep(0.01)
            journal.answered(group, admission)
        await queue.close()

    asyncio.run(work())
