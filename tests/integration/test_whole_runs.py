"""Whole runs in one process: solver and trainer as threads, a real Redis server, the critic behind HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stepalign.commands.application import build_app
from stepalign.errors import ConfigError
from stepalign_lab.pretrain import small_llama
from stepalign_lab.tokenizer import build_tokenizer
from stepalign_run.config import shipped_arms
from support.observed_runs import Bench, Trained, exact_critic

pytestmark = [pytest.mark.slow, pytest.mark.redis]

MODEL_CRITIC = ("--critic.backend", "transformers")


@pytest.fixture(scope="module")
def bench(redis_server: str, cache_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with exact_critic() as (url, recorder):
        yield Bench(tmp_path_factory.mktemp("whole-runs"), redis_server, cache_server, url, recorder)


def trained_by(bench: Bench, critic: tuple[str, ...], *overrides: str) -> Trained:
    """A run whose critic is served with the options ``critic``."""
    return bench.served(critic, lambda served: bench.train((*overrides, "--critic.url", served.url)))


def test_every_arm_is_trained_evaluated_reported_and_compared(bench: Bench) -> None:
    budget = ("--trainer.steps", "2", "--trainer.batch", "8", "--evaluation.every", "2", "--data.checker", "lab")
    folders = {arm: bench.reported("--run.arm", arm, "--run.name", arm, *budget) for arm in shipped_arms()}
    reports = {arm: json.loads((folder / "report.json").read_text()) for arm, folder in folders.items()}
    for arm, report in reports.items():
        rollouts = report["rollouts"]
        assert rollouts["published"] == 16 == rollouts["trained"] + sum(rollouts["skipped"].values()), arm
        assert set(report["arms"]) == {arm} and report["arms"][arm]["validation"].keys() == {"0", "2"}
        assert report["terms"].items() >= reports["null"]["terms"].items(), arm
    compared = CliRunner().invoke(build_app(), ["compare", "--json", *map(str, folders.values())])
    assert compared.exit_code == 0, compared.output
    assert {run["arm"] for run in json.loads(compared.stdout)["runs"]} == set(shipped_arms())


def test_a_random_critic_does_not_become_ready(bench: Bench, tmp_path: Path) -> None:
    critic = tmp_path / "random-critic"
    tokenizer = build_tokenizer(critic=True)
    small_llama(tokenizer, seed=3).save_pretrained(critic)
    tokenizer.save_pretrained(critic)
    with pytest.raises(ConfigError, match="does not tell right steps from wrong ones"):
        trained_by(bench, (*MODEL_CRITIC, "--critic.path", str(critic)), "--trainer.steps", "3")


def test_the_same_seed_trains_the_same_on_a_critic_model(bench: Bench) -> None:
    """Whose batches depend on when requests come. Another seed: test_config_effects.py."""
    first, second = (trained_by(bench, MODEL_CRITIC, "--trainer.steps", "3") for _ in range(2))
    assert sum(outcomes.get("trained", 0) for outcomes in first.column("outcomes")) >= 6
    first.critic_keys, second.critic_keys = [], []
    assert first == second
