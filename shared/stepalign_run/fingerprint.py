"""The identity of a run that is continued: all that shapes its weights, but its length and its hardware."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from stepalign.errors import ConfigError
from stepalign.problems import problems_sha256
from stepalign_run.config import Config
from stepalign_run.policy_store import weights_sha256

OTHER_RUN = (
    "{} was made with another arm, seed, configuration, problem file or model; resume with the settings of the first, "
    "or start a run under another name"
)


def require_same_run(config: Config) -> None:
    """Raises ConfigError when the run's folder was made with other settings, by the trainer's record.

    To be asked by whoever works on a run before it does: rollouts of other problems in the run's queue would be trained
    on once the run is continued as it was meant to be. A solver may work where the critic's weights are not: there only
    the trainer can tell.
    """
    record = config.folder.record
    weights = config.critic.path if config.arm.needs_critic else None
    if weights is not None and not weights.is_dir():
        return
    if record.exists() and json.loads(record.read_bytes())["fingerprint"] != fingerprint(config):
        raise ConfigError(OTHER_RUN.format(config.run_dir))


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
