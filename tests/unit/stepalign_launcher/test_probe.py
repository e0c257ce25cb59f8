"""A probe on this machine: what it is made of, what it refuses, and which earlier one is of the same settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from stepalign.errors import ConfigError, StepalignError
from stepalign_launcher.probe import LocalProbe, load_arms
from stepalign_run.config import shipped_arms
from stepalign_run.context import ContextKind
from support.probes import probe_report_of

LAB = Path(__file__).parents[3] / "configs" / "lab.toml"


@pytest.fixture
def local(tmp_path: Path) -> Callable[..., LocalProbe]:
    def make(*overrides: str, arms: tuple[str, ...] = ("stepalign", "null"), rollouts: int = 8) -> LocalProbe:
        return LocalProbe(LAB, ["--run.dir", str(tmp_path / "runs"), *overrides], arms, rollouts, samples=2)

    return make


def test_a_probe_has_its_own_run_folder_and_one_rollout_of_each_problem(
    local: Callable[..., LocalProbe], tmp_path: Path
) -> None:
    probe = local("--run.name", "mine", "--trainer.steps", "70", rollouts=400)
    config = probe.config
    assert config.run_dir == tmp_path / "runs" / "mine-probe"
    assert (config.trainer.steps, config.trainer.batch, config.queue.capacity) == (1, 400, 800)
    assert config.arm.group_size == 1
    assert local(rollouts=1000).config.trainer.batch == 500
    assert probe.needs_critic and not local(arms=("refsol", "grpo")).needs_critic


def test_arms_are_those_that_runs_would_have(tmp_path: Path) -> None:
    own = tmp_path / "mine.toml"
    own.write_text('context = "reference"\n', encoding="utf-8")
    found = load_arms(LAB, [], ["grpo", str(own)])
    assert list(found) == ["grpo", "mine"]
    assert found["grpo"].group_size == 8 and found["mine"].context is ContextKind.REFERENCE


@pytest.mark.parametrize(
    ("overrides", "arms", "message"),
    [
        ((), ("nothing",), "there is no arm 'nothing'"),
        ((), ("null", "null"), "two arms are called 'null'"),
        (("--run.arm", "null"), ("null",), "choose them with --arm"),
        (("--run.arm=null",), ("null",), "choose them with --arm"),
        (("--trainer.batch", "12"), ("grpo",), "multiple of arm.group_size"),
        (("--data.train", "none.jsonl"), ("null",), "none.jsonl"),
    ],
)
def test_what_cannot_be_probed_is_refused(
    overrides: tuple[str, ...], arms: tuple[str, ...], message: str, local: Callable[..., LocalProbe]
) -> None:
    with pytest.raises(StepalignError, match=message):
        local(*overrides, arms=arms)


def test_a_run_with_the_probes_name_is_not_replaced(local: Callable[..., LocalProbe]) -> None:
    probe = local()
    probe.own_folder.claim()
    (probe.config.run_dir / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"holds a run; choose another --run\.name"):
        probe.run()
    assert (probe.config.run_dir / "run.json").exists()


def test_an_earlier_probe_is_found_only_for_its_plan_settings_and_weights(
    local: Callable[..., LocalProbe],
) -> None:
    arms = tuple(shipped_arms())
    probe = local(arms=arms)
    report = probe_report_of(probe.config, probe.plan)
    assert probe.stored() is None
    probe.config.run_dir.mkdir(parents=True)
    path = probe.folder.probe
    path.write_text(report.model_dump_json(), encoding="utf-8")
    assert probe.stored() == report
    assert local(arms=arms[1:]).stored() is None
    assert local(arms=arms, rollouts=9).stored() is None
    assert local("--run.seed", "1", arms=arms).stored() is None
    other = report.model_copy(update={"terms": {**report.terms, "base": "of other weights"}})
    path.write_text(other.model_dump_json(), encoding="utf-8")
    assert probe.stored() is None
    path.write_text("{}", encoding="utf-8")
    assert probe.stored() is None
