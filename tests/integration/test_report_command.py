"""``stepalign report`` over a real server and the files that a run's processes leave."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from stepalign.commands.application import build_app
from stepalign.errors import ConfigError
from stepalign_run.config import QueueSection
from stepalign_run.policy_store import Canary, PolicyVersion, RedisPolicyStore
from stepalign_run.queue import RedisRolloutQueue
from stepalign_run.rollout import Rollout

pytestmark = [pytest.mark.redis, pytest.mark.slow]

STEPS = 2
STARTED_AT = 1_700_000_000.0
CANARY = Canary(prompt_token_ids=[1], completion_token_ids=[2], logprobs=[-1.0])
CONFIG = """
[run]
name = "{name}"
dir = "{folder}/runs"
seed = 3
[model]
path = "model"
[data]
train = "train.jsonl"
{evaluation}
[queue]
redis_url = "{url}"
reconnect_seconds = 0
[critic]
backend = "program"
checker = "lab"
[trainer]
steps = 2
batch = 2
[evaluation]
samples = 4
"""
EVALUATION = 'validation = "validation.jsonl"\ntest = "test.jsonl"\n'


def figures(avg: float) -> dict[str, Any]:
    shares = {"avg_at_4": avg, "maj_at_4": avg, "pass_at_4": avg}
    return {**shares, "mean_tokens": 20.0, "format_rate": 100.0, "truncated": 0.0, "problems": 60, "samples": 4}


def update(step: int) -> dict[str, Any]:
    advantages = {"advantage_correct": 0.0, "advantage_correct_below": 0.0, "advantage_at_error": -3.0}
    return {
        "step": step,
        "loss": 1 / step,
        **advantages,
        "advantage_after_error": None,
        "critiques": {"incorrect": 1, "truncated": 1},
        "outcomes": {"skipped:critique_truncated": 1, "trained": 1},
        "alarms": [],
        "rollouts": 2,
        "trained_rollouts": 1,
    }


def by_problem(avg: float) -> dict[str, Any]:
    right = round(avg / 100 * 60)
    correct = [4] * right + [0] * (60 - right)
    majority = [c / 4 for c in correct]
    return {"correct": correct, "graded": [4] * 60, "majority": majority, "trace_correct": None}


class Run:
    """A run's folder and keys, and what its processes do one after the other."""

    def __init__(self, folder: Path, url: str, evaluation: str = "") -> None:
        self.name = f"report-{uuid.uuid4().hex}"
        self.url = url
        self.toml = folder / "run.toml"
        (folder / "train.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n')
        self.toml.write_text(CONFIG.format(name=self.name, folder=folder, url=url, evaluation=evaluation))
        self.folder = folder / "runs" / self.name
        self.report = self.folder / "report.json"

    def begin(self, rollout: Rollout) -> None:
        """One rollout of the first update is trained on, one skipped, one more waits."""
        self.folder.mkdir(parents=True)
        noted = {"fingerprint": "f", "seed": 3, "arm": "stepalign_scoped", "started_at": STARTED_AT, "threads": 5}
        (self.folder / "run.json").write_text(json.dumps(noted))

        async def queue() -> None:
            async with asyncio.timeout(10):
                opened = RedisRolloutQueue(self.url, self.name, "trainer", QueueSection())
                await opened.start()
                await opened.publish([rollout.model_copy(update={"rollout_id": f"r{i}"}) for i in range(3)])
                first, second = await opened.claim(2, 0)
                await opened.acknowledge({first.entry_id: "trained", second.entry_id: "skipped:critique_truncated"})
                await opened.close()

        asyncio.run(queue())
        self.train(1)

    def train(self, step: int) -> None:
        rows = [json.dumps(update(done)) + "\n" for done in range(1, step + 1)]
        self._write("metrics.jsonl", "".join(rows), at=10.0 * step)
        self.in_store("publish", PolicyVersion(version=step, path="/adapter", sha256="0" * 64, canary=CANARY))

    def evaluate(self, *steps: int) -> None:
        content = {
            "validation": {str(step): figures(10.0 * step) for step in (0, *steps)},
            "selected_step": max((0, *steps)),
            "base_test": figures(0.5),
            "selected_test": figures(91.5),
            "problem_ids": {split: [f"p{i}" for i in range(60)] for split in ("validation", "test")},
            "by_problem": {
                "validation": {str(step): by_problem(10.0 * step) for step in (0, *steps)},
                "base_test": by_problem(0.5),
                "selected_test": by_problem(91.5),
            },
            "problems_sha256": {"validation": "v", "test": "t"},
            "temperature": 1.0,
            "max_new_tokens": 64,
        }
        self._write("evaluation.json", json.dumps(content), at=41.26)

    def end_training(self) -> None:
        self.in_store("finish")

    def in_store(self, method: str, *arguments: Any) -> None:
        async def call() -> None:
            store = RedisPolicyStore(self.url, self.name, 3.0)
            await getattr(store, method)(*arguments)
            await store.close()

        asyncio.run(call())

    def _write(self, name: str, text: str, at: float) -> None:
        """``at``: seconds since the run began."""
        scratch = self.folder / f"{name}.new"
        scratch.write_text(text)
        os.utime(scratch, (STARTED_AT + at, STARTED_AT + at))
        os.replace(scratch, self.folder / name)


@pytest.fixture
def run(redis_server: str, tmp_path: Path, make_rollout) -> Run:
    """A run without evaluation, in progress: one of its two updates is made."""
    begun = Run(tmp_path, redis_server)
    begun.begin(make_rollout())
    return begun


@pytest.fixture
def evaluated(redis_server: str, tmp_path: Path, make_rollout) -> Run:
    """A run with evaluation that has trained to its end; its last checkpoint is not evaluated yet."""
    trained = Run(tmp_path, redis_server, EVALUATION)
    trained.begin(make_rollout())
    trained.train(STEPS)
    trained.end_training()
    return trained


def report(run: Run, *options: str) -> Result:
    return CliRunner().invoke(build_app(), ["report", str(run.toml), *options], catch_exceptions=False)


def command(run: Run, *options: str) -> list[str]:
    return [sys.executable, "-m", "stepalign.cli", "report", str(run.toml), *options]


def test_a_run_in_progress_has_no_report_and_says_how_far_it_is(run: Run) -> None:
    done = subprocess.run(command(run), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"stepalign: run '{run.name}' has not ended: 1 of 2 updates are done")
    assert "--follow" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not run.report.exists()


def test_a_run_that_has_not_begun_has_none_of_its_updates(redis_server: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="0 of 2 updates"):
        report(Run(tmp_path, redis_server))


def test_training_that_stopped_early_is_no_end(run: Run) -> None:
    """A run that is prolonged has finished at fewer updates than it has now."""
    run.end_training()
    with pytest.raises(ConfigError, match="has not ended: 1 of 2 updates"):
        report(run)


def test_the_last_update_alone_is_no_end(run: Run) -> None:
    run.train(STEPS)
    with pytest.raises(ConfigError, match="has not ended: 2 of 2 updates"):
        report(run)
    run.end_training()
    assert report(run).exit_code == 0


@pytest.mark.parametrize("steps", [None, (), (1,)])
def test_without_its_last_evaluation_a_run_has_not_ended(evaluated: Run, steps: tuple[int, ...] | None) -> None:
    if steps is not None:
        evaluated.evaluate(*steps)
    with pytest.raises(ConfigError, match="2 of 2 updates are done and its evaluation is not complete"):
        report(evaluated)
    assert not evaluated.report.exists()


def test_an_evaluation_with_another_number_of_samples_is_no_end(evaluated: Run) -> None:
    evaluated.evaluate(1, 2)
    with pytest.raises(ConfigError, match="its evaluation is not complete"):
        report(evaluated, "--evaluation.samples", "5")
    assert report(evaluated).exit_code == 0


def test_a_run_without_evaluation_is_not_said_to_wait_for_it(run: Run) -> None:
    with pytest.raises(ConfigError) as caught:
        report(run)
    assert "evaluation" not in str(caught.value)


def test_the_report_of_a_run_that_has_ended_is_written_and_printed(evaluated: Run) -> None:
    evaluated.evaluate(1, 2)
    done = report(evaluated)
    assert done.exit_code == 0
    assert "stepalign_scoped (step 2)" in done.stdout and "91.5" in done.stdout
    assert f"run {evaluated.name}: 2" in " ".join(done.stdout.split()) and "critique_truncated" in done.stdout
    assert "".join(done.stdout.split()).endswith(f"report:{evaluated.folder / 'report.html'}(41s)")
    assert (evaluated.folder / "report.html").stat().st_size > 10_000
    written = json.loads(evaluated.report.read_text())
    assert (written["run"], written["seed"], written["steps"], written["threads"]) == (evaluated.name, 3, STEPS, 5)
    counts = {"published": 3, "trained": 1, "skipped": {"critique_truncated": 1}, "stale": 0, "dead": 0, "pending": 1}
    assert written["rollouts"] == counts
    assert written["critiques"] == {"incorrect": 2, "truncated": 2}
    assert written["wall_seconds"] == 41.3  # to the last figure, which was the evaluation's
    assert written["base"]["test"] == figures(0.5)
    arm = written["arms"]["stepalign_scoped"]
    assert (arm["selected_step"], arm["test"]) == (2, figures(91.5))
    assert (arm["first_update"]["loss"], arm["last_update"]["loss"]) == (1.0, 0.5)


def test_without_evaluation_the_last_update_is_the_end(run: Run) -> None:
    run.train(STEPS)
    run.end_training()
    assert report(run).exit_code == 0
    written = json.loads(run.report.read_text())
    assert written["wall_seconds"] == 20.0 and "base" not in written


def test_json_is_exactly_the_file(evaluated: Run) -> None:
    evaluated.evaluate(1, 2)
    done = subprocess.run(command(evaluated, "--json"), capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == evaluated.report.read_bytes()


def test_the_same_run_has_the_same_report_every_time(evaluated: Run) -> None:
    evaluated.evaluate(1, 2)
    shown = report(evaluated, "--json").stdout
    assert report(evaluated, "--json").stdout == shown
    assert report(evaluated, "--json", "--follow").stdout == shown  # asks the server once more
    evaluated.report.unlink()
    assert report(evaluated, "--json").stdout == shown == evaluated.report.read_text()


def test_a_report_that_is_there_needs_no_server(evaluated: Run) -> None:
    evaluated.evaluate(1, 2)
    shown = report(evaluated, "--json").stdout
    assert report(evaluated, "--json", "--queue.redis_url", "redis://127.0.0.1:1").stdout == shown


def test_a_local_run_that_has_ended_needs_none_of_its_options(evaluated: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    evaluated.evaluate(1, 2)
    shown = report(evaluated, "--json").stdout
    # Its own server has ended with it.
    evaluated.toml.write_text(evaluated.toml.read_text().replace("redis_url =", "# redis_url ="))
    other = ["--trainer.steps", "9", "--evaluation.samples", "7"]
    again = report(evaluated, "--json", *other)
    assert again.stdout == shown
    assert "started with trainer.steps 2, not 9" in again.stderr
    assert "Avg@4" in report(evaluated, *other).stdout
    # A run that goes on to more updates is not said to have ended.
    after = evaluated.report.stat().st_mtime + 10
    os.utime(evaluated.folder / "metrics.jsonl", (after, after))
    with pytest.raises(ConfigError, match="not in progress"):
        report(evaluated, *other)


def test_a_report_of_an_earlier_end_is_not_taken_for_the_present_one(run: Run) -> None:
    run.train(STEPS)
    run.end_training()
    report(run)
    with pytest.raises(ConfigError, match="2 of 3 updates"):
        report(run, "--trainer.steps", "3")
    # The last update is made again, as after a kill.
    after = run.report.stat().st_mtime + 10
    os.utime(run.folder / "metrics.jsonl", (after, after))
    report(run)
    assert json.loads(run.report.read_text())["wall_seconds"] == round(after - STARTED_AT, 1)


@pytest.mark.parametrize("other", [("--run.arm", "refsol"), ("--run.seed", "4")])
def test_a_report_of_another_arm_or_seed_is_refused(evaluated: Run, other: tuple[str, str]) -> None:
    evaluated.evaluate(1, 2)
    said = f"the run is of arm stepalign_scoped, seed 3; asked for are .*{other[1]}"
    with pytest.raises(ConfigError, match=said):
        report(evaluated, *other)
    assert not evaluated.report.exists()
    report(evaluated)
    with pytest.raises(ConfigError, match=said):
        report(evaluated, *other)


def test_following_ends_with_the_run(redis_server: str, tmp_path: Path, make_rollout) -> None:
    run = Run(tmp_path, redis_server, EVALUATION)
    run.begin(make_rollout())
    with subprocess.Popen(
        command(run, "--follow", "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            assert "step    1" in process.stderr.readline()  # it waits
            run.train(STEPS)
            assert "step    2" in process.stderr.readline()
            run.end_training()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.5)  # a look at the trained but not evaluated run
            assert not run.report.exists()
            run.evaluate(1, 2)
            stdout, stderr = process.communicate(timeout=10)
        finally:
            process.kill()
    assert (process.returncode, stderr) == (0, "")
    assert stdout == run.report.read_text()
    assert json.loads(stdout)["wall_seconds"] == 41.3


def test_a_run_whose_server_is_not_known_is_said_not_to_be_in_progress(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    run.toml.write_text(run.toml.read_text().replace("redis_url =", "# redis_url ="))
    for options in ([], ["--follow"]):
        with pytest.raises(ConfigError, match="not in progress"):
            report(run, *options)


def test_the_embedded_server_of_a_run_in_progress_is_found(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    run.toml.write_text(run.toml.read_text().replace("redis_url =", "# redis_url ="))
    (run.folder / "redis").mkdir()
    (run.folder / "redis" / "redis.url").write_text(f"{run.url}\n")
    with pytest.raises(ConfigError, match="1 of 2 updates"):
        report(run)
