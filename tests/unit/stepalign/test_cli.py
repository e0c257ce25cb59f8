"""The command line: subcommands from entry points, help, errors of one line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points, metadata
from pathlib import Path

import pytest

from stepalign.commands.application import GROUP
from stepalign.commands.extras import EXTRA_OF_COMMAND, EXTRA_OF_MODULE, extra_for
from stepalign.errors import CriticUnavailableError, QueueUnavailableError, StepalignError
from stepalign_critic.errors import BackendDiedError
from stepalign_launcher.redis_server import ServerDiedError


def stepalign(
    *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stepalign.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env={**os.environ, **(env or {})},
    )


def test_help_lists_every_subcommand_with_the_loop_first() -> None:
    listed = stepalign("--help").stdout.split("Commands:")[1]
    names = [line.split()[0] for line in listed.splitlines() if line.startswith("  ") and line[2] != " "]
    processes = ["critic", "solver", "trainer", "evaluate"]
    assert names == [
        "demo",
        "run",
        "probe",
        "band",
        *processes,
        "report",
        "compare",
        "critique",
        "critic-quality",
        "queue",
        "lab",
    ]


def test_the_help_of_run_is_that_of_run_config() -> None:
    shown = stepalign("run", "--help").stdout
    assert "run [OPTIONS] {CONFIG}" in shown and "--overwrite" in shown and "Commands:" not in shown
    assert "run audit [OPTIONS] {RUN}" in stepalign("run", "audit", "--help").stdout


def test_a_subcommand_of_run_that_is_none_is_a_missing_file(tmp_path: Path) -> None:
    done = stepalign("run", "start", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "stepalign: start: there is no such file\n")


def test_an_unknown_key_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[trainer]\nstepz = 1\n")
    done = stepalign("trainer", "run.toml", cwd=tmp_path)
    assert done.returncode == 1
    assert "trainer.stepz: unknown key" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_all_that_is_wrong_is_told_at_once_with_the_nearest_names(tmp_path: Path) -> None:
    (tmp_path / "critic.toml").write_text(
        '[critic]\nbackend = "openai"\nmax_batchs = 1\nmax_queue = 0\n[critic.openai]\ntimeout_second = 3\n[critics]\n'
    )
    done = stepalign("critic", "critic.toml", cwd=tmp_path, env={"STEPALIGN_CRITIC__PROT": "3"})
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    for said in (
        "STEPALIGN_CRITIC__PROT; did you mean STEPALIGN_CRITIC__PORT?",
        "critic.toml: ",
        "critic.max_batchs: unknown key; did you mean max_batch?",
        "critic.max_queue: Input should be greater than or equal to 1",
        "critic.openai.timeout_second: unknown key; did you mean timeout_seconds?",
        "critics: unknown key; did you mean critic?",
    ):
        assert said in done.stderr, done.stderr


def test_a_misspelt_option_is_told_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "critic.toml").write_text('[critic]\nbackend = "program"\nchecker = "lab"\n')
    done = stepalign("critic", "critic.toml", "--critic.prot", "3", cwd=tmp_path)
    assert done.returncode == 1 and "--critic.prot 3; did you mean --critic.port?" in done.stderr


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


def ended_by(error: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command that raises this error."""
    code = (
        "import stepalign.commands.application as application\n"
        "from stepalign.cli import main\n"
        "from stepalign.errors import *\n"
        f"def refused(): raise {error}\n"
        "application.build_app = lambda named: refused\n"
        "main()"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("kind", ["ConfigError", "RuntimeError"])
def test_no_message_of_an_error_steers_the_terminal(kind: str) -> None:
    done = ended_by(f"{kind}('said: \\x1b]0;taken\\x07\\u202eb')")
    assert "said: \ufffd]0;taken\ufffd\ufffdb" in done.stderr
    assert set("\x1b\x07\u202e") & set(done.stderr) == set()


def test_a_file_that_may_not_be_read_is_one_line_and_exit_code_1() -> None:
    done = ended_by("PermissionError(13, 'Permission denied', '/models/model.safetensors')")
    assert done.returncode == 1
    assert done.stderr.startswith("stepalign: /models/model.safetensors: user ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("error", ["ValueError('broken')", "ModuleNotFoundError('broken', name='stepalign.gone')"])
def test_an_error_that_nobody_expected_is_a_traceback_and_exit_code_70(error: str) -> None:
    done = ended_by(error)
    assert done.returncode == os.EX_SOFTWARE
    assert done.stderr.startswith("Traceback") and done.stderr.rstrip().endswith("Error: broken")


@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [
        ("torch", [], "models"),
        ("torch", ["solver", "run.toml"], "solver"),
        ("safetensors", ["run", "run.toml"], "lab"),
        ("torch", ["critic", "run.toml"], "critic-transformers"),
        ("httpx_aiohttp", ["critic", "run.toml"], "critic-openai"),
        ("vllm", ["critic", "run.toml"], "critic-vllm"),
        ("uvicorn", ["critic", "run.toml"], "critic"),
    ],
)
def test_a_missing_module_is_one_line_with_its_extra(module: str, command: list[str], extra: str) -> None:
    done = ended_by(f"ModuleNotFoundError('gone', name={module!r})", *command)
    said = f"stepalign: the module {module!r} is missing: pip install 'stepalign[{extra}]'\n"
    assert (done.returncode, done.stderr) == (1, said)


def without(modules: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command where these modules are not installed."""
    code = f"import sys\nsys.modules.update(dict.fromkeys({modules}))\nfrom stepalign.cli import main\nmain()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("arguments", "extra"), [([], "cli"), (["--help"], "cli"), (["critic", "x.toml"], "critic")])
def test_the_command_without_its_extra_says_how_to_install_it(arguments: list[str], extra: str) -> None:
    done = without(["typer", "rich"], *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"stepalign: the module 'typer' is missing: pip install 'stepalign[{extra}]'\n"


def test_a_subcommand_without_its_extra_is_listed_with_it() -> None:
    listed = without(["fastapi"], "--help").stdout
    (line,) = [line for line in listed.splitlines() if line.startswith("  critic ")]
    assert line.endswith("(not installed: pip install 'stepalign[critic]')")
    done = without(["fastapi"], "critic", "run.toml", "--critic.port", "0")
    assert done.returncode == 1
    assert done.stderr == "'stepalign critic' needs the module 'fastapi': pip install 'stepalign[critic]'\n"


def test_a_module_that_one_command_of_a_group_needs_has_an_extra_of_its_own(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"")
    done = without(["xllamacpp"], "lab", "llama-server", str(model))
    assert done.returncode == 1
    assert done.stderr == "stepalign: the module 'xllamacpp' is missing: pip install 'stepalign[llama-cpp]'\n"


def test_every_subcommand_has_an_extra_that_exists() -> None:
    commands = {entry.name for entry in entry_points(group=GROUP) if entry.dist and entry.dist.name == "stepalign"}
    assert commands == EXTRA_OF_COMMAND.keys()
    provided = set(metadata("stepalign").get_all("Provides-Extra") or [])
    named = {extra_for(module, command) for module in EXTRA_OF_MODULE for command in [*EXTRA_OF_COMMAND, None]}
    assert named <= provided


@pytest.mark.parametrize(
    ("error", "code"),
    [
        *((name, 1) for name in ("ConfigError", "CheckpointError", "NonFiniteError", "PolicyError")),
        *((name, os.EX_TEMPFAIL) for name in ("QueueUnavailableError", "CriticUnavailableError")),
    ],
)
def test_the_exit_code_tells_what_may_pass_from_what_will_not(error: str, code: int) -> None:
    done = ended_by(f"{error}('do this')")
    assert (done.returncode, done.stderr) == (code, "stepalign: do this\n")


def test_only_what_is_away_for_a_while_may_pass() -> None:
    def below(kind: type[StepalignError]) -> Iterator[type[StepalignError]]:
        yield kind
        for derived in kind.__subclasses__():
            yield from below(derived)

    codes = {kind: kind.exit_code for kind in below(StepalignError)}
    passing = {QueueUnavailableError, CriticUnavailableError, ServerDiedError, BackendDiedError}
    assert codes == {kind: os.EX_TEMPFAIL if kind in passing else 1 for kind in codes}


def test_a_server_that_is_away_is_exit_code_75(tmp_path: Path) -> None:
    toml = 'model.path = "m"\ndata.train = "t"\ncritic.backend = "program"\ncritic.checker = "lab"\n'
    (tmp_path / "run.toml").write_text(toml)
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        url = f"redis://127.0.0.1:{reserved.getsockname()[1]}"
    options = ["--queue.redis_url", url, "--queue.reconnect_seconds", "0.1"]
    done = stepalign("queue", "status", "run.toml", *options, cwd=tmp_path)
    assert done.returncode == os.EX_TEMPFAIL
    assert "no Redis server answers" in done.stderr and "Traceback" not in done.stderr
