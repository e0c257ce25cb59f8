"""The critic's command as a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.critic_servers import wait_until

COMMAND = """
import typer
from stepalign_critic.commands import critic
app = typer.Typer(pretty_exceptions_enable=False)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(critic)
app()
"""


def write_config(folder: Path, **critic: Any) -> Path:
    values = {"backend": "program", "checker": "lab", "prompts": "lab-v1", "port": 0, **critic}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    path = folder / "critic.toml"
    path.write_text(
        f'[run]\nname = "test"\ndir = {json.dumps(str(folder / "runs"))}\n'
        '[model]\npath = "model"\n[data]\ntrain = "train.jsonl"\n[critic]\n' + "\n".join(lines)
    )
    return path


def critic_command(config: Path, *options: str, code: str = COMMAND) -> list[str]:
    return [sys.executable, "-c", code, str(config), *options]


@contextmanager
def critic_process(config: Path, code: str = COMMAND) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command as a process of its own that listens, and its address. It does not outlive the test."""
    url_file = config.parent / "runs" / "test" / "critic.url"
    process = subprocess.Popen(critic_command(config, code=code), stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: url_file.exists() or process.poll() is not None)
        yield process, url_file.read_text().replace("0.0.0.0", "127.0.0.1")
    finally:
        process.kill()


def ended_with_0(process: subprocess.Popen[str], config: Path) -> str:
    """What the process logged, once it has ended as it should."""
    _, log = process.communicate(timeout=10)
    assert process.returncode == 0, log
    assert not (config.parent / "runs" / "test" / "critic.url").exists()
    return log
