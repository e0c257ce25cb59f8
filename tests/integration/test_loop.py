"""The whole loop as processes: real Redis, critic over HTTP, solver, trainer, evaluation."""

from __future__ import annotations

import asyncio
import json
import shlex
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.arms_benchmark import run_all
from stepalign_launcher.campaign import Campaign
from stepalign_run.config import QueueSection
from stepalign_run.folder.ownership import Kind, OwnFolder
from stepalign_run.queue import RedisRolloutQueue
from stepalign_run.rollout import Rollout
from support.stacks import EXACT_CRITIC, LAB, SMALL, Stack, report_of, stepalign, without_evaluation

MakeStack = Callable[..., Stack]

pytestmark = [pytest.mark.slow, pytest.mark.redis]


def test_the_loop_trains_the_solver_on_the_critic_models_critiques(stack: MakeStack) -> None:
    run = stack("whole", "--trainer.steps", "20", "--evaluation.samples", "4").finished()
    report = run.report()
    arm = report["arms"]["stepalign_scoped"]
    assert report["base"]["test"]["avg_at_4"] < 5
    assert arm["validation"]["20"]["avg_at_4"] > 25
    assert arm["test"]["avg_at_4"] > 25
    assert arm["selected_step"] == max(
        (int(s) for s in arm["validation"]), key=lambda s: (arm["validation"][str(s)]["avg_at_4"], -s)
    )
    rollouts = report["rollouts"]
    assert rollouts["published"] == 20 * 32
    assert rollouts["published"] == rollouts["trained"] + sum(rollouts["skipped"].values())
    assert rollouts["trained"] >= 0.95 * rollouts["published"]
    assert sum(report["critiques"].values()) == rollouts["published"]
    # The method's reason: the critique leaves correct tokens alone and is sharp at the error.
    assert abs(arm["first_update"]["advantage_correct"]) < 0.2
    assert arm["first_update"]["advantage_at_error"] < -5
    # As a power cut leaves it: the address of a server that is gone.
    (run.dir / "redis" / "redis.url").write_text("redis://127.0.0.1:1/0")
    audit = stepalign("run", "audit", str(run.dir))
    done = subprocess.run(audit, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "it adds up" in " ".join(done.stdout.split()), done.stdout + done.stderr


def test_an_unreachable_critic_is_waited_for_and_nothing_is_lost(stack: MakeStack, tmp_path: Path) -> None:
    """The critic of another run serves; it comes up only after the trainer has been waiting."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    run = stack(
        "late",
        *("--trainer.steps", "2", "--trainer.batch", "8", "--critic.url", f"http://127.0.0.1:{port}"),
        config=without_evaluation(tmp_path),
    ).start()
    run.wait(lambda: "the critic is not available" in run.log("trainer"), "the trainer's complaint")
    serve = stepalign("critic", str(LAB), *EXACT_CRITIC, "--critic.port", port, "--run.dir", str(tmp_path / "critic"))
    with subprocess.Popen(serve) as critic:
        try:
            assert run.ended() == 0, run.said
        finally:
            critic.terminate()
    rollouts = run.report()["rollouts"]
    assert (rollouts["published"], rollouts["trained"]) == (16, 16)


def test_the_demo_is_continued_added_to_or_replaced_as_it_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "demo"

    def demo(steps: int, *options: str) -> subprocess.CompletedProcess[str]:
        command = stepalign("demo", *options, "--trainer.steps", str(steps), *SMALL, *EXACT_CRITIC)
        return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)

    def reports() -> dict[str, dict[str, Any]]:
        return {path.parent.name: report_of(path.parent) for path in folder.glob("*/report.json")}

    def written() -> dict[str, int]:
        return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("*/report.json")}

    OwnFolder(folder.parent, folder.name, Kind.COMPARISON).claim()
    OwnFolder(folder, "null-9").claim()
    earlier = folder / "null-9"
    (earlier / "run.json").write_text('{"arm": "null", "seed": 9}')
    arms = ("--arm", "grpo", "--arm", "stepalign_scoped")
    unsaid = demo(1, *arms, "--seed", "4")
    assert unsaid.returncode == 1 and "--resume continues it or adds to it, --overwrite replaces it" in unsaid.stderr
    both = demo(1, *arms, "--resume", "--overwrite")
    assert both.returncode == 1 and "give one of them" in both.stderr
    assert {path.name for path in folder.iterdir()} == {Kind.COMPARISON.value, "null-9"}

    first = demo(1, *arms, "--overwrite", "--seed", "4")
    assert first.returncode == 0, first.stderr
    assert "stepalign_scoped − grpo" in first.stdout and "one seed proves nothing" in first.stdout
    (aside,) = folder.parent.glob(".replaced/*/demo")
    assert not earlier.exists() and (aside / "null-9" / "run.json").exists()
    assert f"the earlier one is kept in {aside.relative_to(tmp_path)}" in first.stdout
    # As these runs were made, without which the next would be refused.
    hints = [line for line in first.stdout.splitlines() if "demo --resume" in line]
    assert len(hints) == 2 and all(
        line.endswith(shlex.join(["--trainer.steps", "1", *SMALL, *EXACT_CRITIC])) for line in hints
    )
    assert set(reports()) == {"grpo-4", "stepalign_scoped-4"}
    of_grpo, of_scoped = (reports()[name]["terms"] for name in ("grpo-4", "stepalign_scoped-4"))
    assert of_scoped.pop("critic")["backend"] == "program" and of_scoped == of_grpo
    assert {report["rollouts"]["published"] for report in reports().values()} == {8}
    comparison = json.loads((folder / "comparison.json").read_text())
    assert {run["run"] for run in comparison["runs"]} == set(reports())
    assert "grpo-4" in (folder / "report.html").read_text()

    before = written()
    again = demo(1, *arms, "--resume")
    assert again.returncode == 0, again.stderr
    other = demo(1, *arms, "--resume", "--trainer.learning_rate", "0.5")
    assert other.returncode == 1 and "holds a run with other settings" in other.stderr
    assert written() == before

    more = demo(2, "--arm", "stepalign_scoped", "--arm", "null", "--resume")
    assert more.returncode == 0, more.stderr
    assert {name: (report["steps"], report["rollouts"]["published"]) for name, report in reports().items()} == {
        "grpo-4": (1, 8),
        "stepalign_scoped-4": (2, 16),
        "null-4": (2, 16),
    }


def test_overwrite_replaces_a_run_on_a_shared_server(
    redis_server: str, stack: MakeStack, tmp_path: Path, make_rollout: Callable[..., Rollout]
) -> None:
    options = ["--trainer.steps", "1", "--trainer.batch", "8", "--queue.redis_url", redis_server]
    run = stack("shared", *options, config=without_evaluation(tmp_path))

    async def leave_an_earlier_run() -> None:
        queue = RedisRolloutQueue(redis_server, run.dir.name, "solver", QueueSection())
        await queue.start()
        await queue.publish([make_rollout()])
        await queue.close()

    asyncio.run(leave_an_earlier_run())
    assert "the Redis server holds an earlier run" in run.refusal()
    assert run.finished("--overwrite").report()["rollouts"]["published"] == 8
    refused = run.refusal()
    assert f"{run.dir} holds an earlier run" in refused and "--overwrite" in refused
    assert (run.dir / "report.json").exists()


def test_a_benchmark_runs_its_arms_two_at_a_time(tmp_path: Path) -> None:
    """What ``make bench-lab`` does, with two arms at a small budget. Every arm: test_whole_runs.py."""
    options = ["--trainer.steps", "20", "--evaluation.every", "20", *SMALL, *EXACT_CRITIC]
    campaign = Campaign(LAB, ["null", "stepalign_scoped"], [0], tmp_path, options)
    assert run_all(campaign, jobs=2) == []
    compare = stepalign("compare", "--json", *map(str, campaign.ended()))
    compared = json.loads(subprocess.run(compare, capture_output=True, text=True, timeout=60, check=True).stdout)
    assert {run["arm"] for run in compared["runs"]} == {"null", "stepalign_scoped"}
    reports = {member.arm: report_of(campaign.config(member).run_dir) for member in campaign.members}
    for arm, report in reports.items():
        rollouts = report["rollouts"]
        assert rollouts["published"] == 160 == rollouts["trained"] + sum(rollouts["skipped"].values()), arm
        assert report["terms"].items() >= reports["null"]["terms"].items(), arm
    trace = {arm: report["arms"][arm]["test"]["trace_at_2"] for arm, report in reports.items()}
    assert trace["stepalign_scoped"] > 10 > trace["null"]
