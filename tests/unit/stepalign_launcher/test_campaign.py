"""Arms × seeds: which runs are missing, which can go on, and what is compared. The runs are finished folders."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from stepalign.errors import ConfigError
from stepalign_launcher.campaign import Campaign, started
from stepalign_launcher.commands.demo import lab_configuration
from support.page_runs import write_run

ARMS = ["grpo", "stepalign_scoped"]


def campaign(folder: Path, arms: list[str] = ARMS, seeds: tuple[int, ...] = (0,), *overrides: str) -> Campaign:
    return Campaign(lab_configuration(), arms, seeds, folder, overrides)


def finish(made: Campaign, index: int, **changes: Any) -> Path:
    """The folder of a member, as if its run had ended."""
    member = made.members[index]
    config = made.config(member)
    folder = write_run(config.run_dir, config.arm_name, member.seed, name=member.name)
    report = json.loads((folder / "report.json").read_text())
    report["config"] = config.as_report() | changes
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "run.json").write_text(json.dumps({"arm": config.arm_name, "seed": member.seed}))
    return folder


def test_every_arm_runs_with_every_seed_in_a_folder_of_its_own(tmp_path: Path) -> None:
    made = campaign(tmp_path, ARMS, (3, 4), "--trainer.steps", "7")
    assert [(m.arm, m.seed, m.name) for m in made.members] == [
        ("grpo", 3, "grpo-3"),
        ("stepalign_scoped", 3, "stepalign_scoped-3"),
        ("grpo", 4, "grpo-4"),
        ("stepalign_scoped", 4, "stepalign_scoped-4"),
    ]
    config = made.config(made.members[2])
    assert (config.run_dir, config.run.seed, config.arm.objective) == (tmp_path / "grpo-4", 4, "grpo")
    assert config.trainer.steps == 7


def test_an_arm_of_ones_own_is_a_file(tmp_path: Path) -> None:
    arm = tmp_path / "late.toml"
    arm.write_text('context = "critique"\nscope = "random_step"\n')
    (member,) = campaign(tmp_path / "runs", [str(arm)]).members
    assert member.name == "late-0"


@pytest.mark.parametrize("taken", [["--run.arm", "null"], ["--run.seed=3"], ["--run.name", "x"]])
def test_what_a_campaign_sets_itself_is_refused(tmp_path: Path, taken: list[str]) -> None:
    with pytest.raises(ConfigError, match="choose with --arm and --seed"):
        campaign(tmp_path, ARMS, (0,), *taken)


def test_an_unknown_arm_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no arm 'gpro'"):
        campaign(tmp_path, ["stepalign", "gpro"])


def test_runs_that_have_ended_are_kept_and_the_others_are_outstanding(tmp_path: Path) -> None:
    made = campaign(tmp_path)
    finish(made, 0)
    assert [member.name for member in made.outstanding()] == ["stepalign_scoped-0"]
    assert not made.begun(made.members[1])
    assert started(tmp_path) == (["grpo"], [0])


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    made = campaign(tmp_path)
    folder = finish(made, 0)
    (folder / "report.json").unlink()
    assert made.begun(made.members[0])
    assert [member.name for member in made.outstanding()] == ["grpo-0", "stepalign_scoped-0"]


def test_a_report_older_than_its_figures_does_not_count(tmp_path: Path) -> None:
    made = campaign(tmp_path)
    folder = finish(made, 0)
    os.utime(folder / "report.json", (1, 1))
    assert not made.finished(made.members[0])


def test_a_longer_budget_makes_a_run_outstanding_again(tmp_path: Path) -> None:
    finish(campaign(tmp_path), 0)
    assert len(list(campaign(tmp_path, ARMS, (0,), "--trainer.steps", "200").outstanding())) == 2


def test_a_run_of_other_settings_is_neither_compared_nor_thrown_away(tmp_path: Path) -> None:
    finish(campaign(tmp_path), 0)
    other = campaign(tmp_path, ARMS, (0,), "--trainer.learning_rate", "0.5")
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        list(other.outstanding())
    assert (tmp_path / "grpo-0" / "report.json").exists()


def test_only_the_runs_that_have_ended_are_compared(tmp_path: Path) -> None:
    made = campaign(tmp_path, ARMS, (0, 1))
    folders = [finish(made, index) for index in (0, 1, 2)]
    assert made.ended() == folders


@pytest.mark.parametrize("arms", [["null", "grpo", "null"], ["a/x.toml", "b/x.toml"]])
def test_two_runs_of_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arms: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "x.toml").write_text("")
    with pytest.raises(ConfigError, match="asked for twice"):
        campaign(tmp_path / "runs", arms)
    with pytest.raises(ConfigError, match="asked for twice"):
        campaign(tmp_path / "runs", ["null"], (1, 1))


def test_an_unreadable_report_is_written_anew_by_going_on_with_its_run(tmp_path: Path) -> None:
    made = campaign(tmp_path)
    path = finish(made, 0) / "report.json"
    report = json.loads(path.read_text())
    del report["config"]
    path.write_text(json.dumps(report))
    assert not made.finished(made.members[0]) and made.begun(made.members[0])
