"""Critiques by a real model on a laptop: llama.cpp's server, the critic service before it, and its command-line client.

Each is what a user starts by hand (README.md); here they find free ports and end together.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from stepalign.errors import StepalignError
from stepalign_lab.llama_server import LlamaServer

_START_SECONDS, _ANSWER_SECONDS = 60, 600
_CLI = [sys.executable, "-m", "stepalign.cli"]
_ALIGNED, _REFUSED = 0, 2
"""Exit codes of ``stepalign critique``."""


class DemoError(StepalignError):
    """A part of the demo that has failed; its own words are on the terminal, or in the named file."""


def show_critiques(server: LlamaServer, config: Path, requests: Path, log: Callable[[str], None]) -> None:
    """Ask for the critique of each line of ``requests`` in turn, and print it as soon as it is there.

    Raises DemoError when the critic does not start and when a request gets no answer. An answer that is refused is one.
    """
    lines = [line for line in requests.read_text(encoding="utf-8").splitlines() if line.strip()]
    aligned, began = 0, time.monotonic()
    with _critic(server, config) as url:
        for number, line in enumerate(lines, start=1):
            log(f"{number} of {len(lines)}, after {time.monotonic() - began:.0f} s")
            options = ["--url", url, "--timeout", str(_ANSWER_SECONDS)]
            code = subprocess.run([*_CLI, "critique", "-", *options], input=line, text=True, check=False).returncode
            if code not in (_ALIGNED, _REFUSED):
                raise DemoError(f"line {number} of {requests} got no answer (exit code {code})")
            aligned += code == _ALIGNED
    log(f"{aligned} of {len(lines)} critiques align with their attempt; {time.monotonic() - began:.0f} s")


@contextmanager
def _critic(server: LlamaServer, config: Path) -> Generator[str]:
    """The address of a critic before ``server``, which ends with the block."""
    with tempfile.TemporaryDirectory(prefix="stepalign-demo-") as folder:
        address, journal = Path(folder) / "address", Path(folder) / "critic.log"
        options = {
            "--critic.openai.base_url": server.url,
            "--critic.openai.model": server.model,
            "--critic.port": "0",
            "--critic.address_file": str(address),
        }
        with journal.open("wb") as out:
            command = [*_CLI, "critic", str(config), *(word for option in options.items() for word in option)]
            process = subprocess.Popen(command, stderr=out)
            try:
                _await(address, process, journal)
                yield address.read_text(encoding="utf-8")
            finally:
                process.terminate()
                process.wait()


def _await(address: Path, process: subprocess.Popen[bytes], journal: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not address.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise DemoError(f"the critic did not start: {journal.read_text(encoding='utf-8')[-2000:]}")
        time.sleep(0.1)
