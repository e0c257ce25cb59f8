"""The command line: subcommands from entry points, help, errors of one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def stepalign(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stepalign.cli", *arguments], capture_output=True, text=True, timeout=60, cwd=cwd
    )


def test_help_lists_every_subcommand_with_the_loop_first() -> None:
    listed = stepalign("--help").stdout.split("Commands:")[1]
    names = [line.split()[0] for line in listed.splitlines() if line.startswith("  ") and line[2] != " "]
    assert names == ["demo", "run", "critic", "solver", "trainer", "evaluate", "report", "queue", "lab"]


def test_an_unknown_key_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[trainer]\nstepz = 1\n")
    done = stepalign("trainer", "run.toml", cwd=tmp_path)
    assert done.returncode == 1
    assert "trainer.stepz: unknown key" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("process", ["trainer", "solver", "critic", "evaluate"])
def test_each_process_names_a_missing_file(process: str, tmp_path: Path) -> None:
    done = stepalign(process, "none.toml", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "stepalign: none.toml: there is no such file\n"


def test_version() -> None:
    from importlib.metadata import version

    assert stepalign("--version").stdout.strip() == version("stepalign")


def test_a_folder_in_place_of_the_configuration_is_named(tmp_path: Path) -> None:
    done = stepalign("run", ".", cwd=tmp_path)
    assert done.returncode == 1
    assert "cannot be read as a TOML file" in done.stderr and "Traceback" not in done.stderr
