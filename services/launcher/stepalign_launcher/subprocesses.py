"""Other commands of stepalign, started as a user would start them."""

from __future__ import annotations

import subprocess
import sys

import typer


def stepalign(*arguments: str) -> None:
    """Run ``stepalign ARGUMENTS`` on this terminal. Raises typer.Exit with its exit code when that is not 0."""
    # The order on the terminal is the order in time, also where the output is a file.
    sys.stdout.flush()
    code = subprocess.run([sys.executable, "-m", "stepalign.cli", *arguments], check=False).returncode
    if code:
        raise typer.Exit(code)
