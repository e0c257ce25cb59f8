"""The command line: subcommands from entry points, help, errors of one line."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


def stepalign(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stepalign.cli", *arguments], capture_output=True, text=True, timeout=60, cwd=cwd
    )


def test_help_lists_every_subcommand_with_the_loop_first() -> None:
    listed = stepalign("--help").stdout.split("Commands:")[1]
    names = [line.split()[0] for line in listed.splitlines() if line.startswith("  ") and line[2] != " "]
    processes = ["critic", "solver", "trainer", "evaluate"]
    assert names == ["demo", "run", "probe", "band", *processes, "report", "compare", "critique", "queue", "lab"]


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


# A container's first process has id 1. `unshare --pid` would make one, but needs rights that CI has not.
AS_FIRST_PROCESS = """
import os, sys
os.getpid = lambda: 1
from stepalign.cli import main
main()
"""


@pytest.fixture
def waiting_command(tmp_path: Path) -> Iterator[tuple[list[str], socket.socket]]:
    """The arguments of a command that asks a Redis server, and the server's socket, which never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        toml = tmp_path / "run.toml"
        toml.write_text('model.path = "m"\ndata.train = "t"\ncritic.backend = "program"\ncritic.checker = "lab"\n')
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        yield ["queue", "status", str(toml), "--queue.redis_url", url], silent


def exit_code_after(number: signal.Signals, program: list[str], arguments: list[str], silent: socket.socket) -> int:
    with subprocess.Popen([sys.executable, *program, *arguments], stderr=subprocess.DEVNULL) as process:
        try:
            connection, _ = silent.accept()
            with connection:
                process.send_signal(number)
                return process.wait(5)
        finally:
            process.kill()


def test_the_first_process_of_a_container_ends_at_sigterm(
    waiting_command: tuple[list[str], socket.socket],
) -> None:
    assert exit_code_after(signal.SIGTERM, ["-c", AS_FIRST_PROCESS], *waiting_command) == 128 + signal.SIGTERM


def test_any_other_process_dies_of_sigterm_as_usual(waiting_command: tuple[list[str], socket.socket]) -> None:
    assert exit_code_after(signal.SIGTERM, ["-m", "stepalign.cli"], *waiting_command) == -signal.SIGTERM


def test_a_file_that_may_not_be_read_is_one_line_and_exit_code_1() -> None:
    code = (
        "import stepalign.cli as cli\n"
        "def refused(): raise PermissionError(13, 'Permission denied', '/models/model.safetensors')\n"
        "cli.build_app = lambda: refused\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("stepalign: /models/model.safetensors: user ") and done.stderr.count("\n") == 1
