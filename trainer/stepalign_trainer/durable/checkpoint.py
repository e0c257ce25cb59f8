"""Checkpoints that are whole or not there, and adapters under names that are never used twice.

Layout of a run's folder::

    adapters/v000012/        adapter_model.safetensors, adapter_config.json: policy version 12, PEFT's format
    checkpoints/step-000012/ the same adapter, optimizer.pt, random.pt, state.json (written last)

A directory is written beside its place, synced, and renamed into it; ``state.json`` lists the SHA-256 of every file
and has one of its own.
The learning rate is constant, so the optimizer's state is the schedule's too.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from stepalign.errors import CheckpointError
from stepalign_run.fingerprint import OTHER_RUN
from stepalign_run.folder.files import replace_text
from stepalign_run.folder.layout import ADAPTER_FILE, RunFolder
from stepalign_run.logging import get_logger
from stepalign_run.policy_store import file_sha256
from stepalign_trainer.durable.settlement import Settled
from stepalign_trainer.update.learner import Learner

STATE = "state.json"
OPTIMIZER = "optimizer.pt"
RANDOM = "random.pt"

_log = get_logger(__name__)


class BrokenCheckpointError(CheckpointError):
    """A checkpoint that is torn or corrupt."""


@dataclass(frozen=True)
class TrainerState:
    """The contents of a checkpoint besides weights, optimizer and random states.

    ``step`` is the policy version too. ``settled`` holds the newest of the ``settled_total`` rollouts.
    """

    step: int
    fingerprint: str
    settled: dict[str, Settled]
    settled_total: int


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_directory(target: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write a directory, then sync it and rename it to ``target``, replacing an earlier one."""
    scratch = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        fill(scratch)
        for path in scratch.rglob("*"):
            if path.is_file():
                _sync(path)
        _sync(scratch)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(scratch, target)
    finally:
        # After an error it would hold the room that a full disk needs.
        shutil.rmtree(scratch, ignore_errors=True)
    _sync(target.parent)


def check_run(run_dir: Path, fingerprint: str, seed: int, arm: str) -> None:
    """Note the run's identity, its start and its threads. Raises CheckpointError when the folder holds another one."""
    path = RunFolder(run_dir).record
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
    target = RunFolder(run_dir).adapter(version)
    with _room_for(target):
        if not target.is_dir():
            write_directory(target, learner.save_adapter)
            return target
        with tempfile.TemporaryDirectory(dir=run_dir) as scratch:
            learner.save_adapter(Path(scratch))
            if file_sha256(Path(scratch) / ADAPTER_FILE) != file_sha256(target / ADAPTER_FILE):
                raise CheckpointError(f"{target} holds another adapter than this step's; start again with --overwrite")
    return target


@contextmanager
def _room_for(target: Path) -> Iterator[None]:
    """Raises CheckpointError when the disk does not take ``target``."""
    try:
        yield
    # torch's writer and safetensors report a full disk by errors of their own.
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"{target} cannot be written ({error}). The rollouts of this update are still in the queue and the "
            "checkpoint before it is whole: make room, then --resume"
        ) from error


def save_checkpoint(learner: Learner, run_dir: Path, state: TrainerState) -> Path:
    """Write a checkpoint. Raises CheckpointError when the disk takes none; those before it stay as they are."""

    def fill(directory: Path) -> None:
        learner.save_adapter(directory)
        torch.save(learner.optimizer.state_dict(), directory / OPTIMIZER)
        torch.save(_random_states(), directory / RANDOM)
        files = {path.name: file_sha256(path) for path in sorted(directory.iterdir()) if path.is_file()}
        content = {**asdict(state), "policy_version": state.step, "files": files}
        content["sha256"] = _digest(content)
        (directory / STATE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    target = RunFolder(run_dir).checkpoint(state.step)
    with _room_for(target):
        write_directory(target, fill)
    return target


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the contents of ``state.json``, its own checksum left out."""
    said = {name: value for name, value in content.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def checkpoints(run_dir: Path) -> list[Path]:
    """All of a run, the oldest first, whole or not."""
    return list(RunFolder(run_dir).checkpoints_by_step().values())


def load_newest(learner: Learner, run_dir: Path, fingerprint: str) -> TrainerState | None:
    """Restore the newest checkpoint that is whole; None when there is none at all, or none but broken ones.

    Every broken one is warned about. Raises CheckpointError for one of another configuration.
    """
    for directory in reversed(checkpoints(run_dir)):
        try:
            return load_checkpoint(learner, directory, fingerprint)
        except BrokenCheckpointError as error:
            _log.warning(
                "a checkpoint is broken; the one before it is used", checkpoint=directory.name, error=str(error)
            )
    return None


def load_checkpoint(learner: Learner, directory: Path, fingerprint: str) -> TrainerState:
    """Restore weights, optimizer and random states.

    Raises BrokenCheckpointError when torn or corrupt, CheckpointError when of another configuration.
    """
    state = check_checkpoint(directory)
    if state.fingerprint != fingerprint:
        raise CheckpointError(OTHER_RUN.format(directory))
    _load_adapter(learner, load_file(directory / ADAPTER_FILE))
    learner.optimizer.load_state_dict(torch.load(directory / OPTIMIZER, weights_only=True, map_location=learner.device))
    _restore_random_states(torch.load(directory / RANDOM, weights_only=True))
    return state


def check_checkpoint(directory: Path) -> TrainerState:
    """Read a checkpoint back and compare its checksums. Raises BrokenCheckpointError when one differs."""
    try:
        content: dict[str, Any] = json.loads((directory / STATE).read_text(encoding="utf-8"))
        state = TrainerState(
            step=content["step"],
            fingerprint=content["fingerprint"],
            settled={rollout_id: Settled(*settled) for rollout_id, settled in content["settled"].items()},
            settled_total=content["settled_total"],
        )
        checksums = {name: file_sha256(directory / name) for name in content["files"]}
        own = content["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenCheckpointError(f"{directory}: torn or unreadable ({error})") from None
    broken = [name for name, digest in content["files"].items() if checksums[name] != digest]
    if own != _digest(content) or directory.name != RunFolder(directory.parent.parent).checkpoint(state.step).name:
        broken.append(STATE)
    if broken:
        raise BrokenCheckpointError(f"{directory}: {', '.join(broken)} does not match its checksum")
    return state


def _random_states() -> dict[str, Any]:
    """Of every generator that an update could draw from."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
    }


def _restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    # Another machine may have another number of devices.
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)
    random.setstate(states["python"])


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
