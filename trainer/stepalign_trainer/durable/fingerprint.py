"""The identity of a run that is continued: all that shapes its weights, but its length and its hardware."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from stepalign.problems import problems_sha256
from stepalign_run.config import Config
from stepalign_run.policy_store import weights_sha256


def fingerprint(config: Config) -> str:
    critic = config.critic if config.arm.needs_critic else None
    content = {
        **shaping_settings(config),
        "base": weights_sha256(config.model.path),
        "problems": problems_sha256(config.data.train),
        "critic_weights": weights_sha256(critic.path) if critic is not None and critic.path is not None else None,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def shaping_settings(config: Config) -> dict[str, Any]:
    """The part of it that is configuration. Models and problems come to it by their content."""
    return {
        "seed": config.run.seed,
        "arm": config.arm_name,
        "condition": config.arm.model_dump(mode="json"),
        "grader": config.data.grader,
        "model": config.model.model_dump(mode="json", exclude={"path", "device"}),
        "critic": config.critic.shaping() if config.arm.needs_critic else None,
        "trainer": config.trainer.model_dump(
            mode="json", exclude={"steps", "checkpoint_every", "keep_checkpoints", "token_view"}
        ),
        "solver": config.solver.model_dump(mode="json", exclude={"batch"}),
    }
