"""Checkpoints that are whole or not there, and adapters under names that are never used twice.

Layout of a run's folder::

    adapters/v000012/        adapter_model.safetensors, adapter_config.json: policy version 12, PEFT's format
    checkpoints/step-000012/ the same adapter, optimizer.pt, state.json (step, settled rollouts, checksums; last)

A directory is written beside its place, synced, and renamed into it; ``state.json`` lists the SHA-256 of every file.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from stepalign.errors import CheckpointError
from stepalign.files import replace_text
from stepalign.policy_store import file_sha256
from stepalign_trainer.learner import Learner

STATE = "state.json"
OPTIMIZER = "optimizer.pt"
ADAPTER = "adapter_model.safetensors"
RUN = "run.json"
OTHER_RUN = (
    "{} was made with another arm, seed, configuration, problem file or model; resume with the settings of the first, "
    "or start a run under another name"
)


@dataclass(frozen=True)
class TrainerState:
    """What a checkpoint knows besides weights. ``settled`` maps the rollout ids of its step to their outcome."""

    step: int
    fingerprint: str
    settled: dict[str, str]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_directory(target: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write a directory, then sync it and rename it to ``target``, replacing what is there."""
    scratch = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    fill(scratch)
    for path in scratch.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync(scratch)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(scratch, target)
    _sync(target.parent)


def check_run(run_dir: Path, fingerprint: str, seed: int, arm: str) -> None:
    """Note what the run is, and when and how it begins. Raises CheckpointError when the folder holds another one."""
    path = run_dir / RUN
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8"))["fingerprint"] != fingerprint:
            raise CheckpointError(OTHER_RUN.format(run_dir))
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    content = {
        "fingerprint": fingerprint,
        "seed": seed,
        "arm": arm,
        "started_at": time.time(),
        "threads": torch.get_num_threads(),
    }
    replace_text(path, json.dumps(content) + "\n")


def publish_adapter(learner: Learner, run_dir: Path, version: int) -> Path:
    """Write policy version ``version``. One that a resumed run had already published must be equal to it.

    Raises CheckpointError when it is not: a name is never used for two adapters.
    """
    target = run_dir / "adapters" / f"v{version:06d}"
    if not target.is_dir():
        write_directory(target, learner.save_adapter)
        return target
    with tempfile.TemporaryDirectory(dir=run_dir) as scratch:
        learner.save_adapter(Path(scratch))
        if file_sha256(Path(scratch) / ADAPTER) != file_sha256(target / ADAPTER):
            raise CheckpointError(f"{target} holds another adapter than this step's; start again with --overwrite")
    return target


def save_checkpoint(learner: Learner, run_dir: Path, state: TrainerState, keep: int) -> Path:
    """Write a checkpoint, then remove all but the newest ``keep``."""

    def fill(directory: Path) -> None:
        learner.save_adapter(directory)
        torch.save(learner.optimizer.state_dict(), directory / OPTIMIZER)
        files = {path.name: file_sha256(path) for path in sorted(directory.iterdir()) if path.is_file()}
        content = {
            "step": state.step,
            "fingerprint": state.fingerprint,
            "settled": state.settled,
            "files": files,
        }
        (directory / STATE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    folder = run_dir / "checkpoints"
    target = folder / f"step-{state.step:06d}"
    write_directory(target, fill)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return target


def latest_checkpoint(run_dir: Path) -> Path | None:
    found = sorted((run_dir / "checkpoints").glob("step-*"))
    return found[-1] if found else None


def load_checkpoint(learner: Learner, directory: Path, fingerprint: str) -> TrainerState:
    """Restore weights and optimizer. Raises CheckpointError when torn, corrupt, or of another configuration."""
    try:
        content: dict[str, Any] = json.loads((directory / STATE).read_text(encoding="utf-8"))
        step, settled, made_by = content["step"], content["settled"], content["fingerprint"]
        checksums = {name: file_sha256(directory / name) for name in content["files"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory}: torn or unreadable ({error}); start again with --overwrite") from None
    broken = [name for name, digest in content["files"].items() if checksums[name] != digest]
    if broken:
        names = ", ".join(broken)
        raise CheckpointError(f"{directory}: {names} does not match its checksum; start again with --overwrite")
    if made_by != fingerprint:
        raise CheckpointError(OTHER_RUN.format(directory))
    _load_adapter(learner, load_file(directory / ADAPTER))
    learner.optimizer.load_state_dict(torch.load(directory / OPTIMIZER, weights_only=True, map_location=learner.device))
    return TrainerState(step=step, fingerprint=fingerprint, settled=settled)


def _load_adapter(learner: Learner, weights: dict[str, torch.Tensor]) -> None:
    own = {
        name.replace(".default.weight", ".weight"): parameter
        for name, parameter in learner.model.named_parameters()
        if parameter.requires_grad
    }
    if own.keys() != weights.keys():
        raise CheckpointError("the checkpoint's adapter has other layers than this model")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
