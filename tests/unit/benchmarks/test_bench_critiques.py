"""The critics of ``make bench-critiques`` have configurations that the service takes."""

from __future__ import annotations

import pytest

from benchmarks.arms_benchmark import ROOT
from benchmarks.bench_critiques import CRITICS, DECODING
from stepalign_run.config import load_critic_config


@pytest.mark.parametrize("name", CRITICS)
def test_every_critic_decodes_freely(name: str) -> None:
    critic = CRITICS[name]
    section = load_critic_config(ROOT / critic.task.config, [*DECODING, *critic.overrides]).critic
    assert section.decoding == "free"
