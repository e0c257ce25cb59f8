"""What makes a run another run, and what does not."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stepalign.errors import ConfigError
from stepalign_run.config import Config, load_config, shipped_arms
from stepalign_run.fingerprint import fingerprint, require_same_run, shaping_settings

LAB = Path(__file__).parents[3] / "configs" / "lab.toml"
OF_THE_LAB = {
    "fixed_negative": "c7c155b89b7f1648",
    "full_repetition": "7e4b8f496ede8e48",
    "grpo": "7cfa2ce7ca2ee6d5",
    "grpo_unleashed": "ff9015348615c50b",
    "null": "b57242b2deb2b662",
    "omission": "c05784d80796043e",
    "other_problem": "fed9a18648b86af9",
    "random_step_scope": "290e8b13115e5da3",
    "refsol": "021abab9d38f85f7",
    "shuffled": "724d186fe493c158",
    "stepalign": "710b306431aa8fc2",
    "stepalign_scoped": "ddd643f30bfe1c70",
}
"""Digests of the settings that shape the lab's runs. Another one means that no run made before can be resumed."""


def test_every_shipped_arm_has_its_digest() -> None:
    assert sorted(OF_THE_LAB) == shipped_arms()


@pytest.mark.parametrize("arm", OF_THE_LAB)
def test_the_settings_that_shape_a_run_of_the_lab_have_not_changed(arm: str) -> None:
    settings = shaping_settings(load_config(LAB, ["--run.arm", arm], environ={}))
    assert hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16] == OF_THE_LAB[arm]


@pytest.mark.parametrize("table", ["", "[table]\nrank = 5\n", '[table]\nagainst = { paper = ["refsol"] }\n'])
def test_the_place_of_an_arm_in_tables_leaves_the_fingerprint(
    make_config: Callable[..., Config], tmp_path: Path, table: str
) -> None:
    prints: set[str] = set()
    for folder, content in (("bare", ""), ("placed", table)):
        arm = tmp_path / folder / "mine.toml"
        arm.parent.mkdir()
        arm.write_text(f'context = "reference"\n{content}')
        prints.add(fingerprint(make_config("--run.arm", str(arm))))
    assert len(prints) == 1


@pytest.mark.parametrize(
    "change",
    [
        ("--run.seed", "1"),
        ("--run.arm", "stepalign"),
        ("--trainer.batch", "2"),
        ("--data.grader", "math"),
        ("--critic.grader", "math"),
        ("--trainer.lora.rank", "8"),
        ("--solver.temperature", "0.9"),
        ("--model.chat_template_options", '{"enable_thinking": false}'),
        ("--model.teacher_chat_template_options", '{"enable_thinking": true}'),
    ],
)
def test_what_shapes_the_weights_shapes_the_fingerprint(
    make_config: Callable[..., Config], change: tuple[str, str]
) -> None:
    assert fingerprint(make_config(*change)) != fingerprint(make_config())


def test_length_and_place_of_a_run_leave_the_fingerprint(make_config: Callable[..., Config]) -> None:
    others = [
        ("--trainer.steps", "9"),
        ("--trainer.keep_checkpoints", "5"),
        ("--trainer.checkpoint_every", "2"),
        ("--solver.batch", "1"),
    ]
    assert {fingerprint(make_config(*change)) for change in others} == {fingerprint(make_config())}


@pytest.mark.parametrize("changed", ["model", "critic", "problems"])
def test_other_weights_or_problems_are_another_run(
    make_config: Callable[..., Config], tmp_path: Path, model_path: Path, changed: str
) -> None:
    def changed_file(source: Path, name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(source, folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        return folder

    problems = tmp_path / "other.jsonl"
    problems.write_text('{"question": "2 + 2", "answer": "4"}\n', encoding="utf-8")
    other = {
        "model": lambda: ("--model.path", str(changed_file(model_path, "other-model"))),
        "critic": lambda: ("--critic.path", str(changed_file(model_path, "other-critic"))),
        "problems": lambda: ("--data.train", str(problems)),
    }[changed]()
    assert fingerprint(make_config(*other)) != fingerprint(make_config())


def test_who_lacks_the_critics_weights_leaves_the_comparison_to_the_trainer(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    there, elsewhere = make_config("--critic.path", str(tmp_path)), make_config("--critic.path", str(tmp_path / "none"))
    record = there.folder.record
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"fingerprint": fingerprint(there)}))
    require_same_run(there)
    record.write_text(json.dumps({"fingerprint": "another"}))
    require_same_run(elsewhere)
    with pytest.raises(ConfigError, match="was made with another arm"):
        require_same_run(there)


def test_problems_are_known_by_their_content(make_config: Callable[..., Config], tmp_path: Path) -> None:
    """Packed they are the same; a folder of them is another list, which changes with each of its files."""
    folder, packed = tmp_path / "problems", tmp_path / "train.jsonl.gz"
    content = (tmp_path / "train.jsonl").read_bytes()
    packed.write_bytes(gzip.compress(content))
    assert fingerprint(make_config("--data.train", str(packed))) == fingerprint(make_config())
    folder.mkdir()
    found: set[str] = set()
    for name in ("a.jsonl", "b.jsonl.gz"):
        (folder / name).write_bytes(content)
        found.add(fingerprint(make_config("--data.train", str(folder))))
    assert len(found) == 2
