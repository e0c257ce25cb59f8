"""How far a run has come, as its server and its folder say."""

from __future__ import annotations

from dataclasses import dataclass

from stepalign_run.config import Config
from stepalign_run.folder.jsonl import read_object
from stepalign_run.folder.stored import last_figure_at, read_record
from stepalign_run.policy_store import open_policy_store
from stepalign_run.queue import QueueStatus, open_queue, resolve_url


@dataclass(frozen=True)
class RunState:
    queue: QueueStatus
    finished: bool
    """Whether every process has done its part."""
    started_at: float
    """When the trainer first began, in seconds since 1970; 0 before that."""
    ended_at: float
    """When the last figure was written."""
    threads: int


async def read_state(config: Config) -> RunState:
    """Ask the run's server and look into its folder.

    Raises ConfigError when no server is known, and for the folder of another run.
    """
    record = read_record(config)
    settings = config.queue.model_copy(update={"redis_url": resolve_url(config)})
    queue = open_queue(settings, config.run.name, consumer="report")
    policies = open_policy_store(settings, config.run.name)
    try:
        status, ended, latest = await queue.status(), await policies.finished(), await policies.latest()
    finally:
        await queue.close()
        await policies.close()
    trained = ended and latest is not None and latest.version >= config.trainer.steps
    return RunState(
        queue=status,
        finished=trained and _is_evaluated(config),
        started_at=record["started_at"] if record else 0.0,
        ended_at=last_figure_at(config),
        threads=record["threads"] if record else 0,
    )


def _is_evaluated(config: Config) -> bool:
    if config.data.validation is None or config.data.test is None:
        return True
    evaluation = read_object(config.folder.evaluation)
    # A resumed run may ask for another number of samples than an earlier session scored.
    last = evaluation.get("validation", {}).get(str(config.trainer.steps), {})
    return f"avg_at_{config.evaluation.samples}" in last
