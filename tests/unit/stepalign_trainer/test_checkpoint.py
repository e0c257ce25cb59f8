"""Checkpoints: whole or not there, and continued bit for bit."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from stepalign.errors import CheckpointError
from stepalign_trainer.batch.examples import Example
from stepalign_trainer.durable.checkpoint import (
    BrokenCheckpointError,
    TrainerState,
    check_run,
    checkpoints,
    load_checkpoint,
    load_newest,
    publish_adapter,
    save_checkpoint,
    write_directory,
)
from stepalign_trainer.durable.settlement import Settled
from stepalign_trainer.update.learner import Learner

pytestmark = pytest.mark.slow

MakeLearner = Callable[..., Learner]


def state(step: int = 1, fingerprint: str = "f") -> TrainerState:
    settled = {"r0": Settled("1-0", "trained"), "r1": Settled("2-0", "skipped:critic_error")}
    return TrainerState(step=step, fingerprint=fingerprint, settled=settled, settled_total=7)


def weights(learner: Learner) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in learner.parameters]


@pytest.fixture
def saved(tmp_path: Path, make_learner: MakeLearner, examples: list[Example]) -> tuple[Learner, Path]:
    """A learner after two updates and its checkpoint."""
    learner = make_learner()
    for _ in range(2):
        learner.update(examples)
    return learner, save_checkpoint(learner, tmp_path, state(step=2))


def test_a_restored_learner_makes_the_same_next_update(
    saved: tuple[Learner, Path], make_learner: MakeLearner, examples: list[Example]
) -> None:
    learner, directory = saved
    restored = make_learner("--run.seed", "9")  # another initialisation
    assert not torch.equal(weights(restored)[0], weights(learner)[0])
    assert load_checkpoint(restored, directory, "f") == state(step=2)
    assert all(map(torch.equal, weights(restored), weights(learner)))
    assert restored.update(examples).loss == learner.update(examples).loss
    assert all(map(torch.equal, weights(restored), weights(learner)))
    moments = [list(one.optimizer.state_dict()["state"].values()) for one in (restored, learner)]
    assert moments[0][0]["step"].item() == 3
    for ours, theirs in zip(*moments, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_without_the_optimizers_state_the_next_update_would_differ(
    saved: tuple[Learner, Path], make_learner: MakeLearner, examples: list[Example]
) -> None:
    learner, directory = saved
    restored = make_learner()
    load_checkpoint(restored, directory, "f")
    restored.optimizer.state.clear()
    for one in (learner, restored):
        one.update(examples)
    assert not all(map(torch.equal, weights(restored), weights(learner)))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "random.pt", "adapter_config.json"])
def test_a_flipped_byte_is_found(saved: tuple[Learner, Path], name: str) -> None:
    learner, directory = saved
    content = bytearray((directory / name).read_bytes())
    content[len(content) // 2] ^= 1
    (directory / name).write_bytes(content)
    with pytest.raises(BrokenCheckpointError, match=f"{name} does not match its checksum"):
        load_checkpoint(learner, directory, "f")


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(settled_total=state["settled_total"] + 1),
        lambda state: state["settled"].update(another=["1-1", "trained"]),
        lambda state: state["files"].pop("random.pt"),
    ],
    ids=["total", "settled", "files"],
)
def test_a_state_that_was_changed_is_found(saved: tuple[Learner, Path], change: Callable[[Any], Any]) -> None:
    learner, directory = saved
    state = json.loads((directory / "state.json").read_text())
    change(state)
    (directory / "state.json").write_text(json.dumps(state))
    with pytest.raises(BrokenCheckpointError, match=r"state\.json does not match its checksum"):
        load_checkpoint(learner, directory, "f")


def test_a_checkpoint_under_another_name_is_found(saved: tuple[Learner, Path]) -> None:
    learner, directory = saved
    other = directory.rename(directory.with_name("step-000099"))
    with pytest.raises(BrokenCheckpointError, match=r"state\.json does not match"):
        load_checkpoint(learner, other, "f")


@pytest.mark.parametrize("name", ["state.json", "optimizer.pt"])
def test_a_missing_file_is_found(saved: tuple[Learner, Path], name: str) -> None:
    learner, directory = saved
    (directory / name).unlink()
    with pytest.raises(BrokenCheckpointError, match="torn or unreadable"):
        load_checkpoint(learner, directory, "f")


def test_a_torn_state_is_found(saved: tuple[Learner, Path]) -> None:
    learner, directory = saved
    text = (directory / "state.json").read_text()
    (directory / "state.json").write_text(text[: len(text) // 2])
    with pytest.raises(BrokenCheckpointError, match="torn or unreadable"):
        load_checkpoint(learner, directory, "f")


def test_another_configuration_is_refused_and_nothing_loaded(
    saved: tuple[Learner, Path], make_learner: MakeLearner
) -> None:
    fresh = make_learner("--run.seed", "9")
    before = weights(fresh)
    with pytest.raises(CheckpointError, match="another arm, seed, configuration"):
        load_checkpoint(fresh, saved[1], "g")
    assert all(map(torch.equal, weights(fresh), before))


def test_the_state_lists_every_file(saved: tuple[Learner, Path]) -> None:
    directory = saved[1]
    listed = set(json.loads((directory / "state.json").read_text())["files"])
    assert listed == {path.name for path in directory.iterdir()} - {"state.json"}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "random.pt"} <= listed


def test_random_numbers_go_on_where_they_were(tmp_path: Path, make_learner: MakeLearner) -> None:
    learner = make_learner()
    torch.rand(3)
    random.random()
    directory = save_checkpoint(learner, tmp_path, state())
    following = torch.rand(3).tolist(), random.random()
    load_checkpoint(learner, directory, "f")
    assert (torch.rand(3).tolist(), random.random()) == following


def test_the_one_before_a_broken_checkpoint_is_used_with_a_warning(
    tmp_path: Path, make_learner: MakeLearner, examples: list[Example]
) -> None:
    learner = make_learner()
    learner.update(examples)
    save_checkpoint(learner, tmp_path, state(9))
    at_nine = weights(learner)
    for step in (10, 11):
        learner.update(examples)
        save_checkpoint(learner, tmp_path, state(step))
    nine, ten, eleven = checkpoints(tmp_path)
    (eleven / "optimizer.pt").write_bytes(b"torn")
    (ten / "state.json").unlink()
    with capture_logs() as logs:
        assert load_newest(learner, tmp_path, "f") == state(9)
    assert [line["checkpoint"] for line in logs if line["log_level"] == "warning"] == ["step-000011", "step-000010"]
    assert all(map(torch.equal, weights(learner), at_nine))
    (nine / "adapter_model.safetensors").unlink()
    assert load_newest(learner, tmp_path, "f") is None


def test_no_checkpoint_yet(tmp_path: Path, make_learner: MakeLearner) -> None:
    assert checkpoints(tmp_path) == [] and load_newest(make_learner(), tmp_path, "f") is None


def test_an_unwritable_checkpoint_leaves_the_one_before_and_takes_no_room(
    saved: tuple[Learner, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``/dev/full`` stands for a disk without room; a run on a small one is in tests/integration/test_faults.py."""
    learner, directory = saved
    monkeypatch.setattr(learner, "save_adapter", lambda folder: (folder / "state.json").symlink_to("/dev/full"))
    with pytest.raises(CheckpointError, match="make room, then --resume"):
        save_checkpoint(learner, tmp_path, state(step=3))
    assert checkpoints(tmp_path) == [directory]
    assert [path.name for path in directory.parent.iterdir()] == [directory.name]


def test_a_crash_while_writing_leaves_the_old_directory(tmp_path: Path) -> None:
    target = tmp_path / "checkpoints" / "step-000001"
    write_directory(target, lambda directory: (directory / "a").write_text("old") and None)

    def crash(directory: Path) -> None:
        (directory / "a").write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_directory(target, crash)
    assert (target / "a").read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    write_directory(target, lambda directory: (directory / "b").write_text("new") and None)
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in target.parent.iterdir()] == ["step-000001"]


def test_a_published_adapter_is_never_written_again(
    tmp_path: Path, make_learner: MakeLearner, examples: list[Example]
) -> None:
    learner = make_learner()
    path = publish_adapter(learner, tmp_path, 7)
    content = (path / "adapter_model.safetensors").read_bytes()
    assert publish_adapter(learner, tmp_path, 7) == path == tmp_path / "adapters" / "v000007"
    learner.update(examples)
    with pytest.raises(CheckpointError, match="another adapter"):
        publish_adapter(learner, tmp_path, 7)
    assert (path / "adapter_model.safetensors").read_bytes() == content
    other = publish_adapter(learner, tmp_path, 8)
    assert (other / "adapter_model.safetensors").read_bytes() != content


def test_a_run_notes_its_identity_its_start_and_its_number_of_threads(tmp_path: Path) -> None:
    before = time.time()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        check_run(tmp_path / "runs" / "new", "f", seed=7, arm="a")
    finally:
        torch.set_num_threads(threads)
    noted = json.loads((tmp_path / "runs" / "new" / "run.json").read_text())
    assert before <= noted.pop("started_at") <= time.time()
    assert noted == {"fingerprint": "f", "seed": 7, "arm": "a", "threads": threads + 1}
    assert [path.name for path in (tmp_path / "runs" / "new").iterdir()] == ["run.json"]


def test_a_resumed_run_keeps_what_the_first_has_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_run(tmp_path, "f", seed=7, arm="a")
    noted = (tmp_path / "run.json").read_text()
    monkeypatch.setattr("time.time", lambda: 4e9)
    check_run(tmp_path, "f", seed=7, arm="a")
    assert (tmp_path / "run.json").read_text() == noted


def test_the_folder_of_another_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    check_run(tmp_path, "f", seed=7, arm="a")
    noted = (tmp_path / "run.json").read_text()
    with pytest.raises(CheckpointError, match="another arm, seed, configuration"):
        check_run(tmp_path, "g", seed=7, arm="a")
    assert (tmp_path / "run.json").read_text() == noted
