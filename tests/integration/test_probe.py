"""``stepalign probe`` as processes: real Redis, exact critic over HTTP, solver, worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
LAB = REPO / "configs" / "lab.toml"

pytestmark = [pytest.mark.slow, pytest.mark.redis]


def test_a_probe_ranks_arms_and_leaves_a_run_of_its_name_alone(redis_server: str, tmp_path: Path) -> None:
    name = f"probed-{os.getpid()}"
    settings = [
        *("--run.dir", str(tmp_path), "--run.name", name),
        *("--queue.redis_url", redis_server, "--critic.backend", "program", "--critic.checker", "lab"),
    ]
    (tmp_path / name).mkdir()
    (tmp_path / name / "run.json").write_text("{}", encoding="utf-8")
    arms = ["null", "refsol", "stepalign", "stepalign_scoped", "grpo", "fixed_negative"]

    def stepalign(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "stepalign.cli", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    chosen = [word for arm in arms for word in ("--arm", arm)]
    printed = stepalign("probe", str(LAB), "--rollouts", "6", "--samples", "2", "--json", *chosen, *settings)
    report = json.loads(printed)
    folder = tmp_path / f"{name}-probe"
    assert json.loads((folder / "probe.json").read_text(encoding="utf-8")) == report
    assert report["rollouts"] == 6 and sum(report["critiques"]["validated"].values()) == 6
    assert [context["kind"] for context in report["contexts"]] == ["critique", "reference", "null"]
    ranked = [arm["arm"] for arm in report["arms"]]
    assert [arm for arm in ranked if arm != "grpo"] == [
        "stepalign_scoped",
        "stepalign",
        "refsol",
        "null",
        "fixed_negative",
    ]
    assert report["arms"][0]["score"]["value"] > 0.9

    status = ["queue", "status", str(LAB), "--json", *settings[:6], "--run.name", folder.name]
    queue = json.loads(stepalign(*status))
    assert (queue["published"], queue["skipped"], queue["length"]) == (6, {"probe": 6}, 0)
    assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["run.json"]
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert not [line for line in running.splitlines() if name in line and "ps -eo" not in line]
