"""Logs as they reach standard error."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HOSTILE = "a\x1b[31mb\u202ec\x9bd"


def logged(configured_by: str, act: str) -> str:
    """Standard error of a process that configures its logs so and then acts, with ``hostile`` and ``log`` at hand."""
    code = (
        "import logging\nfrom stepalign_run.logging import *\n"
        f"{configured_by}\nhostile = {HOSTILE!r}\nlog = get_logger('x')\n{act}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stderr


ACTS = [
    "log.warning('seen', answer=hostile)",
    "log.warning(hostile)",
    "log.warning('seen', answers=[hostile])",
    "try: raise ValueError(hostile)\nexcept ValueError: log.exception('failed')",
]


@pytest.mark.parametrize("act", ACTS)
def test_no_line_to_be_read_steers_the_terminal(act: str) -> None:
    shown = logged("configure_console_logging()", act)
    assert "[31mb" in shown
    assert set("\x1b\u202e\x9b") & set(shown) == set()


@pytest.mark.parametrize("act", [*ACTS, "logging.getLogger('y').warning('%s', hostile)"])
def test_no_line_of_a_process_steers_the_terminal(act: str) -> None:
    shown = logged("configure_logging('x')", act)
    assert set("\x1b\u202e\x9b") & set(shown) == set()
    (line,) = shown.splitlines()
    assert "[31mb" in " ".join(map(str, json.loads(line).values()))
