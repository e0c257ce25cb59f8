"""The whole loop as processes: real Redis, critic over HTTP, solver, trainer, evaluation."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from benchmarks.arms_benchmark import run_all
from stepalign_launcher.campaign import Campaign
from stepalign_run.config import shipped_arms

REPO = Path(__file__).parents[2]
LAB = REPO / "configs" / "lab.toml"
EXACT_CRITIC = ["--critic.backend", "program", "--critic.checker", "lab"]
Run = Callable[..., Path]

pytestmark = [pytest.mark.slow, pytest.mark.redis]


def command(run_dir: Path, *options: str, config: Path = LAB) -> list[str]:
    return [
        *(sys.executable, "-m", "stepalign.cli", "run", str(config)),
        *("--run.dir", str(run_dir.parent), "--run.name", run_dir.name),
        *options,
    ]


def report_of(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "report.json").read_text())


def processes_of(run_dir: Path) -> list[int]:
    """Every process that names the run on its command line."""
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    lines = [line.split(None, 1) for line in found.splitlines()[1:]]
    return [int(pid) for pid, args in lines if run_dir.name in args and "ps -eo" not in args]


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Run]:
    def run(name: str, *options: str, config: Path = LAB, timeout: float = 280) -> Path:
        run_dir = tmp_path / f"loop-{os.getpid()}-{name}"
        done = subprocess.run(
            command(run_dir, *options, config=config), capture_output=True, text=True, timeout=timeout, cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return run_dir

    yield run


def test_the_loop_trains_the_solver_on_the_critic_models_critiques(loop: Run) -> None:
    run_dir = loop("whole", "--trainer.steps", "20")
    report = report_of(run_dir)
    arm = report["arms"]["stepalign_scoped"]
    assert report["base"]["test"]["avg_at_12"] < 5
    assert arm["validation"]["20"]["avg_at_12"] > 25
    assert arm["test"]["avg_at_12"] > 25
    assert arm["selected_step"] == max(
        (int(s) for s in arm["validation"]), key=lambda s: (arm["validation"][str(s)]["avg_at_12"], -s)
    )
    rollouts = report["rollouts"]
    assert rollouts["published"] == 20 * 32
    assert rollouts["published"] == rollouts["trained"] + sum(rollouts["skipped"].values())
    assert rollouts["trained"] >= 0.95 * rollouts["published"]
    assert sum(report["critiques"].values()) == rollouts["published"]
    # The method's reason: the critique leaves correct tokens alone and is sharp at the error.
    assert abs(arm["first_update"]["advantage_correct"]) < 0.2
    assert arm["first_update"]["advantage_at_error"] < -5
    assert processes_of(run_dir) == []
    # As a power cut leaves it: the address of a server that is gone.
    (run_dir / "redis" / "redis.url").write_text("redis://127.0.0.1:1/0")
    audit = [sys.executable, "-m", "stepalign.cli", "run", "audit", str(run_dir)]
    done = subprocess.run(audit, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "it adds up" in " ".join(done.stdout.split()), done.stdout + done.stderr


def test_the_same_seed_gives_the_same_report_twice_and_another_seed_another(loop: Run) -> None:
    options = ["--trainer.steps", "3", "--evaluation.samples", "4"]
    first, second = (report_of(loop(name, *options)) for name in "ab")
    other = report_of(loop("c", *options, "--run.seed", "5"))
    for report in (first, second, other):
        assert report.pop("wall_seconds") > 0
        report.pop("run")
        report["config"].pop("run")
    assert first == second
    assert first["arms"] != other["arms"]


def test_a_random_critic_is_refused_and_teaches_nothing(loop: Run, tmp_path: Path) -> None:
    from stepalign_lab.pretrain import small_llama
    from stepalign_lab.tokenizer import build_tokenizer

    critic = tmp_path / "random-critic"
    tokenizer = build_tokenizer(critic=True)
    small_llama(tokenizer, seed=3).save_pretrained(critic)
    tokenizer.save_pretrained(critic)
    run_dir = loop("random", "--trainer.steps", "3", "--evaluation.samples", "4", "--critic.path", str(critic))
    report = report_of(run_dir)
    arm = report["arms"]["stepalign_scoped"]
    assert report["rollouts"]["trained"] == 0
    assert sum(report["rollouts"]["skipped"].values()) == 3 * 32
    assert all(reason.startswith("critique_") for reason in report["rollouts"]["skipped"])
    assert arm["validation"]["3"] == arm["validation"]["0"]


def test_an_unreachable_critic_is_waited_for_and_nothing_is_lost(loop: Run, tmp_path: Path) -> None:
    """The critic of another run serves; it comes up only after the trainer has been waiting."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run_dir = tmp_path / f"loop-{os.getpid()}-late"
    url = f"http://127.0.0.1:{port}"
    run = subprocess.Popen(
        command(run_dir, "--trainer.steps", "2", "--evaluation.samples", "2", "--critic.url", url), cwd=tmp_path
    )
    critic = None
    try:
        wait_for(lambda: "the critic is not available" in log_of(run_dir, "trainer"), 120)
        critic = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "stepalign.cli",
                "critic",
                str(LAB),
                "--critic.port",
                str(port),
                *EXACT_CRITIC,
                "--run.dir",
                str(tmp_path / "critic"),
            ],
        )
        assert run.wait(180) == 0
    finally:
        for process in (run, critic):
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait(30)
    rollouts = report_of(run_dir)["rollouts"]
    assert (rollouts["published"], rollouts["trained"]) == (64, 64)


def log_of(run_dir: Path, process: str) -> str:
    path = run_dir / "logs" / f"{process}.log"
    return path.read_text() if path.exists() else ""


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)


SIX_STEPS = ["--trainer.steps", "6", "--evaluation.samples", "2", "--evaluation.every", "3", *EXACT_CRITIC]


def losses_of(run_dir: Path) -> list[float]:
    return [json.loads(row)["loss"] for row in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted_losses(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_dir = folder / f"loop-{os.getpid()}-whole-run"
    done = subprocess.run(command(run_dir, *SIX_STEPS), capture_output=True, text=True, timeout=200, cwd=folder)
    assert done.returncode == 0, done.stderr
    return losses_of(run_dir)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_its_run_and_resume_finishes_it(
    tmp_path: Path, how: signal.Signals, uninterrupted_losses: list[float]
) -> None:
    run_dir = tmp_path / f"loop-{os.getpid()}-{how.name}"
    options = SIX_STEPS
    run = subprocess.Popen(command(run_dir, *options), cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    metrics = run_dir / "metrics.jsonl"
    wait_for((run_dir / "redis" / "redis.url").exists, 60)
    port = urlsplit((run_dir / "redis" / "redis.url").read_text().strip()).port
    assert port is not None
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2, 120)
    run.send_signal(how)
    output, _ = run.communicate(timeout=30)
    assert how is signal.SIGKILL or (run.returncode == 130 and "continue with --resume" in output)
    wait_for(lambda: processes_of(run_dir) == [] and not listens(port), 30)
    assert not (run_dir / "report.json").exists()

    refused = subprocess.run(command(run_dir, *options), capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 1 and "--resume" in refused.stderr
    resumed = subprocess.run(
        command(run_dir, "--resume", *options), capture_output=True, text=True, timeout=200, cwd=tmp_path
    )
    assert resumed.returncode == 0, resumed.stderr
    report = report_of(run_dir)
    rollouts = report["rollouts"]
    assert report["steps"] == 6
    assert (rollouts["published"], rollouts["trained"], rollouts["pending"]) == (192, 192, 0)
    assert losses_of(run_dir) == uninterrupted_losses


def test_the_demo_compares_its_arms_and_is_continued_added_to_or_replaced_as_it_is_told(tmp_path: Path) -> None:
    arms = ["--arm", "grpo", "--arm", "stepalign_scoped"]
    budget = ["--trainer.steps", "2"]
    folder = tmp_path / "runs" / "demo"

    def demo(*more: str) -> subprocess.CompletedProcess[str]:
        options = [*arms, *more, *budget, "--evaluation.samples", "2", *EXACT_CRITIC]
        command = [sys.executable, "-m", "stepalign.cli", "demo", *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)

    def reports() -> dict[str, dict[str, Any]]:
        return {path.parent.name: report_of(path.parent) for path in folder.glob("*/report.json")}

    first = demo("--seed", "4")
    assert first.returncode == 0, first.stderr
    assert "stepalign_scoped − grpo" in first.stdout and "one seed proves nothing" in first.stdout
    assert set(reports()) == {"grpo-4", "stepalign_scoped-4"}
    of_grpo, of_scoped = (reports()[name]["terms"] for name in ("grpo-4", "stepalign_scoped-4"))
    assert of_scoped.pop("critic")["backend"] == "program" and of_scoped == of_grpo
    assert {report["rollouts"]["published"] for report in reports().values()} == {64}
    comparison = json.loads((folder / "comparison.json").read_text())
    assert {run["run"] for run in comparison["runs"]} == set(reports())
    assert "grpo-4" in (folder / "report.html").read_text()

    before = {name: (folder / name / "report.json").stat().st_mtime_ns for name in reports()}
    again = demo("--resume")
    assert again.returncode == 0, again.stderr
    assert {name: (folder / name / "report.json").stat().st_mtime_ns for name in reports()} == before
    unsaid = demo("--seed", "5")
    assert unsaid.returncode == 1 and "--resume continues it or adds to it, --overwrite replaces it" in unsaid.stderr
    assert {name: (folder / name / "report.json").stat().st_mtime_ns for name in reports()} == before
    both = demo("--resume", "--overwrite")
    assert both.returncode == 1 and "give one of them" in both.stderr
    other = demo("--resume", "--trainer.learning_rate", "0.5")
    assert other.returncode == 1 and "holds a run with other settings" in other.stderr
    budget[1] = "3"
    longer = demo("--resume")
    assert longer.returncode == 0, longer.stderr
    assert {(report["steps"], report["rollouts"]["published"]) for report in reports().values()} == {(3, 96)}
    budget[1] = "1"
    arms[:] = ["--arm", "null"]
    more = demo("--resume", "--seed", "5")
    assert more.returncode == 0, more.stderr
    assert set(reports()) == {"grpo-4", "stepalign_scoped-4", "null-5"}
    fresh = demo("--overwrite", "--seed", "5")
    assert fresh.returncode == 0, fresh.stderr
    assert set(reports()) == {"null-5"}


def test_overwrite_replaces_a_run_on_a_shared_server(redis_server: str, loop: Run, tmp_path: Path) -> None:
    options = ["--trainer.steps", "1", "--evaluation.samples", "2", "--queue.redis_url", redis_server, *EXACT_CRITIC]
    run_dir = loop("shared", *options)
    refused = subprocess.run(command(run_dir, *options), capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 1 and "--overwrite" in refused.stderr
    assert (run_dir / "report.json").exists()
    shutil.rmtree(run_dir)
    refused = subprocess.run(command(run_dir, *options), capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 1 and "the Redis server holds an earlier run" in refused.stderr
    report = report_of(loop("shared", *options, "--overwrite"))
    assert report["rollouts"]["published"] == 32


@pytest.mark.timeout(1500)
def test_every_arm_trains_for_twenty_updates_and_is_compared(tmp_path: Path) -> None:
    """What ``make bench-lab`` does, at a small budget: real processes, two runs at a time."""
    budget = ["--trainer.steps", "20", "--trainer.batch", "8"]
    options = [*budget, "--evaluation.samples", "2", "--evaluation.every", "20"]
    campaign = Campaign(REPO / "configs" / "lab.toml", shipped_arms(), [0], tmp_path, [*options, *EXACT_CRITIC])
    assert run_all(campaign, jobs=2) == []
    comparison = campaign.compare()
    assert {arm.name for arm in comparison.arms} == set(shipped_arms())
    reports = {member.arm: report_of(campaign.config(member).run_dir) for member in campaign.members}
    for arm, report in reports.items():
        rollouts = report["rollouts"]
        assert rollouts["published"] == 160 == rollouts["trained"] + sum(rollouts["skipped"].values()), arm
        assert report["terms"].items() >= reports["null"]["terms"].items(), arm
    trace = {arm: report["arms"][arm]["test"]["trace_at_2"] for arm, report in reports.items()}
    assert trace["stepalign_scoped"] > 10 > trace["null"]
