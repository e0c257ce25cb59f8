"""Commands that are pointed at somebody's files: they refuse, and every file is as it was.

A refusal comes before any process starts.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from stepalign_run.folder.files import lock_file
from stepalign_run.folder.layout import RunFolder
from stepalign_run.folder.ownership import Kind, OwnFolder
from support.page_runs import write_run
from support.stacks import LAB, REPO, stepalign

# A run with this critic ends with an error soon after its start.
DOOMED = ["--critic.backend", "program", "--critic.checker", "none-of-these"]
UNREACHABLE = ["--queue.redis_url", "redis://127.0.0.1:1", "--queue.reconnect_seconds", "0"]


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    return subprocess.run(stepalign(*words), capture_output=True, text=True, timeout=120, cwd=folder, env=environment)


def contents(folder: Path) -> dict[str, str | bytes | None]:
    """What is in all files, by path; None for folders, the target for links."""
    found: dict[str, str | bytes | None] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def refused(folder: Path, *words: str) -> str:
    """The message of a command that changes nothing."""
    before = contents(folder)
    done = command(folder, *words)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and done.stderr.startswith("stepalign: ")
    assert contents(folder) == before
    return done.stderr


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A working directory with the files of somebody."""
    files = {
        "thesis/chapter.tex": "mine",
        "thesis/metrics.jsonl": "mine",
        "thesis/evaluation.json": "mine",
        "thesis/checkpoints/step-000001/weights": "mine",
        "thesis/adapters/v000001/weights": "mine",
        "other/run.json": json.dumps({"program": "another", "seed": 1}),
        "other/redis/redis.conf": "mine",
        "note": "mine",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("how", [["--overwrite"], ["--resume"], []])
@pytest.mark.parametrize("name", ["thesis", "other", "note"])
def test_a_run_takes_no_folder_that_is_not_ours(home: Path, name: str, how: list[str]) -> None:
    said = refused(home, "run", str(LAB), "--run.dir", ".", "--run.name", name, *DOOMED, *how)
    assert f"{name} is no folder" in said and "choose another run.name or run.dir" in said


@pytest.mark.parametrize("name", [".", "..", ".git"])
def test_a_run_has_a_folder_of_its_own_below_that_of_all_runs(home: Path, name: str) -> None:
    runs = OwnFolder(home / "runs", "earlier")
    runs.claim()
    # The folder above would be one of ours, even.
    OwnFolder(home.parent, home.name).path.joinpath(Kind.RUN.value).write_text("")
    (home / "runs" / Kind.RUN.value).write_text("")
    said = refused(home, "run", str(LAB), "--run.dir", "runs", "--run.name", name, *DOOMED, "--overwrite")
    assert "run.name" in said


def test_a_link_is_not_replaced(home: Path) -> None:
    elsewhere = OwnFolder(home / "disk", "run")
    elsewhere.claim()
    RunFolder(elsewhere.path).metrics.write_text("figures\n")
    (home / "linked").symlink_to(elsewhere.path)
    # A run's lock lies beside its folder.
    lock_file(RunFolder(home / "linked").lock, "taken").close()
    said = refused(home, "run", str(LAB), "--run.dir", ".", "--run.name", "linked", *DOOMED, "--overwrite")
    assert "linked is a link, which is not replaced" in said


def test_a_run_in_progress_is_not_replaced(home: Path) -> None:
    running = OwnFolder(home, "running")
    running.claim()
    RunFolder(running.path).metrics.write_text("figures\n")
    lock_file(RunFolder(running.path).lock, "taken").close()
    options = ["--run.dir", ".", "--run.name", "running", *DOOMED, "--overwrite"]
    with lock_file(RunFolder(running.path).lock, "taken"):
        assert "running is in use by another" in refused(home, "run", str(LAB), *options)
    with lock_file(RunFolder(running.path).trainer_lock, "taken"):
        assert "running is in use: the lock" in refused(home, "run", str(LAB), *options)


@pytest.mark.redis
def test_a_run_that_failed_at_once_is_moved_aside(home: Path) -> None:
    options = ["run", str(LAB), "--run.dir", ".", "--run.name", "mine", *DOOMED]
    first = command(home, *options)
    assert first.returncode == 1 and "none-of-these" in first.stderr
    folder = RunFolder(home / "mine")
    assert not folder.record.exists()
    (folder.logs / "trainer.log").write_text("of the first\n")
    assert "holds an earlier run named 'mine'" in refused(home, *options)
    again = command(home, *options, "--overwrite")
    assert again.returncode == 1 and "none-of-these" in again.stderr
    (aside,) = home.glob(".replaced/*/mine")
    assert f"the earlier one is kept in {aside.relative_to(home)}, which you may remove" in again.stdout.splitlines()
    assert (aside / "logs" / "trainer.log").read_text() == "of the first\n"
    assert not (folder.logs / "trainer.log").exists()


@pytest.mark.parametrize("process", ["trainer", "solver", "evaluate"])
def test_a_process_of_a_run_writes_to_no_folder_that_is_not_ours(home: Path, process: str) -> None:
    said = refused(home, process, str(LAB), "--run.dir", ".", "--run.name", "thesis", *UNREACHABLE)
    assert "thesis is no folder of a run" in said


@pytest.mark.redis
def test_a_queue_is_drained_into_no_folder_that_is_not_ours(home: Path, redis_server: str) -> None:
    options = ["--run.dir", ".", "--run.name", "thesis", "--queue.redis_url", redis_server]
    assert "thesis is no folder of a run" in refused(home, "queue", "drain", str(LAB), "--yes", *options)


def test_an_audit_starts_no_server_in_a_folder_that_is_not_ours(home: Path) -> None:
    assert "other is no folder of a run" in refused(home, "run", "audit", "other")


def test_a_probe_takes_no_folder_that_is_not_ours(home: Path) -> None:
    shutil.copytree(home / "thesis", home / "thesis-probe")
    options = ["--arm", "null", "--run.dir", ".", "--run.name", "thesis", *DOOMED]
    assert "thesis-probe is no folder of a run" in refused(home, "probe", str(LAB), *options)


@pytest.mark.parametrize("how", [["--overwrite"], ["--resume"], []])
def test_a_demo_takes_no_folder_that_is_not_ours(home: Path, how: list[str]) -> None:
    shutil.copytree(home / "thesis", home / "runs" / "demo")
    said = refused(home, "demo", *how, *DOOMED)
    assert "runs/demo is no folder of a comparison that stepalign has made" in said


def pair_of_runs(folder: Path) -> list[str]:
    return [str(write_run(folder / arm, arm)) for arm in ("grpo", "stepalign_scoped")]


def test_a_comparison_replaces_its_like_alone(home: Path) -> None:
    runs = pair_of_runs(home / "runs")
    for _ in range(2):
        assert command(home, "compare", *runs, "--to", "new").returncode == 0
    for name in ("report.html", "comparison.json"):
        (home / "new" / name).write_text('{"runs": "mine"}')
        said = refused(home, "compare", *runs, "--to", "new")
        assert f"new/{name} is there already and was not made by stepalign" in said
    assert "holds a run, whose page it would replace" in refused(home, "compare", *runs, "--to", runs[0])


def problems(folder: Path, count: int = 1) -> Path:
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n} + 1", "answer": "2"}) + "\n" for n in range(count)))
    return path


@pytest.mark.parametrize("place", ["note", "problems.jsonl", "thesis", "link"])
def test_problems_are_written_to_a_new_file(home: Path, place: str) -> None:
    problems(home)
    (home / "link").symlink_to(home / "nowhere")
    for words in (["band", str(LAB), "problems.jsonl", "--to", place], ["lab", "sums", place]):
        assert f"{place} is there already, and is left as it is" in refused(home, *words)


def test_an_empty_file_is_filled(home: Path) -> None:
    (home / "sums.jsonl").touch()
    assert command(home, "lab", "sums", "sums.jsonl").returncode == 0
    assert len((home / "sums.jsonl").read_text().splitlines()) == 100


@pytest.mark.parametrize("words", [["build"], ["smollm2"]])
@pytest.mark.parametrize("place", ["thesis", "note"])
def test_models_are_written_to_a_new_folder(home: Path, words: Sequence[str], place: str) -> None:
    assert f"{place} is not empty, and is left as it is" in refused(home, "lab", *words, place)


def test_a_critic_replaces_and_removes_no_file_but_an_address(home: Path) -> None:
    own = ["--critic.backend", "program", "--critic.checker", "lab", "--critic.port", "0"]
    for place in ("note", "thesis"):
        said = refused(home, "critic", str(LAB), *own, "--critic.address_file", place)
        assert f"{place} is there already and was not made by stepalign" in said


def test_a_benchmark_replaces_its_own_figures_alone(home: Path) -> None:
    (home / "figures.json").write_text('{"benchmark": "lb"}')
    before = contents(home)
    for place in ("note", "figures.json"):
        words = [sys.executable, "-m", "benchmarks.bench_faults", "--output", str(home / place)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=REPO)
        assert done.returncode == 2 and "was not made by" in " ".join(done.stderr.split()), done.stderr
    assert contents(home) == before


def test_make_clean_removes_no_environment_of_another_place(home: Path) -> None:
    for named in ([f"VENV={home}", f"VLLM_VENV={home}"], []):
        shown = subprocess.run(
            ["make", "--dry-run", "clean", *named],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=REPO,
            env={**os.environ, "VENV": str(home)},
            check=True,
        ).stdout
        assert "rm -rf .venv" in shown and str(home) not in shown


@pytest.mark.parametrize(
    "words",
    [
        ["run", str(LAB), "--run.dir", "note", "--run.name", "x", *DOOMED],
        ["run", str(LAB), "--run.dir", "/dev/null", "--run.name", "x", *DOOMED],
        ["run", str(LAB), "--run.dir", "a" * 300, "--run.name", "x", *DOOMED],
        ["run", str(LAB), "--run.dir", "/proc/none", "--run.name", "x", *DOOMED],
        ["probe", str(LAB), "--run.dir", "note", "--run.name", "x", *DOOMED],
        ["report", str(LAB), "--run.dir", "note", "--run.name", "x"],
        ["lab", "sums", "note/x"],
        ["lab", "sums", "/proc/none/x"],
        ["lab", "build", "/proc/none"],
    ],
    ids=lambda words: "-".join(words[:4:3]),
)
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(home: Path, words: list[str]) -> None:
    said = refused(home, *words)
    assert "cannot be made" in said or "can be no folder" in said


@pytest.mark.parametrize("option", ["--problems", "--data.train", "--data.test", "--critic.path"])
def test_an_empty_path_is_not_the_working_directory(home: Path, option: str) -> None:
    (home / "settings.json").write_text('[{"question": "private", "answer": "1"}]')
    assert "the path is empty" in refused(home, "run", str(LAB), option, "", "--run.name", "z", *DOOMED)


@pytest.mark.parametrize(
    "words", [["run", str(LAB), "--resume"], ["solver", str(LAB), *UNREACHABLE]], ids=lambda w: w[0]
)
def test_a_run_with_other_settings_is_refused_before_anything_is_published(home: Path, words: list[str]) -> None:
    """Rollouts of other problems would wait in its queue, and be trained on once it is continued as it should be."""
    earlier = OwnFolder(home / "runs", "earlier")
    earlier.claim()
    noted = {"fingerprint": "of other problems", "seed": 0, "arm": "stepalign_scoped", "started_at": 0.0, "threads": 1}
    (earlier.path / "run.json").write_text(json.dumps(noted), encoding="utf-8")
    before = contents(earlier.path)
    done = command(home, *words, "--run.dir", "runs", "--run.name", "earlier")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stdout + done.stderr
    assert "was made with another arm, seed, configuration, problem file or model" in done.stderr
    assert contents(earlier.path) == before


def test_a_run_is_continued_or_replaced_and_not_both(home: Path) -> None:
    said = refused(home, "run", str(LAB), "--run.name", "x", "--resume", "--overwrite", *DOOMED)
    assert "give one of them" in said
