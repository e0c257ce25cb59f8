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
    path = folder / "critic.toml"
    values["address_file"] = str(address_file(path))
    path.write_text("[critic]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items()))
    return path


def address_file(config: Path) -> Path:
    return config.with_name("critic.url")


def critic_command(config: Path, *options: str, code: str = COMMAND) -> list[str]:
    return [sys.executable, "-c", code, str(config), *options]


@contextmanager
def critic_process(config: Path, code: str = COMMAND) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command as a process of its own that listens, and its address. It does not outlive the test."""
    url_file = address_file(config)
    process = subprocess.Popen(critic_command(config, code=code), stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: url_file.exists() or process.poll() is not None)
        yield process, url_file.read_text().replace("0.0.0.0", "127.0.0.1")
    finally:
        process.kill()


def ended_with_0(process: subprocess.Popen[str], config: Path) -> str:
    """The log of the process, once it has ended as it should."""
    _, log = process.communicate(timeout=10)
    assert process.returncode == 0, log
    assert not address_file(config).exists()
    return log
