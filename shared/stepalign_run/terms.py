"""The terms of a run: settings and files that two runs must share to be compared."""

from __future__ import annotations

from typing import Any

from stepalign.problems import problems_sha256
from stepalign_run.config import Config
from stepalign_run.policy_store import weights_sha256

NO_HYPERPARAMETERS = {
    *("steps", "batch", "micro_batch", "logit_chunk", "token_view"),
    *("checkpoint_every", "keep_checkpoints"),
}
"""Keys of ``[trainer]`` that do not shape the weights, or that stand in the terms under a name of their own."""


def run_terms(config: Config) -> dict[str, Any]:
    """The terms by name; ``critic`` is there in arms that ask one."""
    terms: dict[str, Any] = {
        "base": weights_sha256(config.model.path),
        "model": config.model.model_dump(mode="json", exclude={"path", "device"}),
        "hyperparameters": config.trainer.model_dump(mode="json", exclude=NO_HYPERPARAMETERS),
        "train": problems_sha256(config.data.train),
        "grader": config.data.grader,
        "evaluation": config.evaluation.model_dump(mode="json", exclude={"batch"}),
        "sampling": config.solver.parameters(seed=0).model_dump(mode="json", exclude={"seed"}),
        "batch": config.trainer.batch,
        "steps": config.trainer.steps,
    }
    if config.arm.needs_critic:
        critic = config.critic
        terms["critic"] = critic.shaping() | {
            "weights": weights_sha256(critic.path) if critic.path is not None else None
        }
    return terms
