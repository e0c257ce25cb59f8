"""The wheel and the sdist of this checkout, and environments that hold a wheel and nothing of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).parents[2]


@dataclass(frozen=True)
class Archives:
    """``wheel`` is made from the sdist, as an installation from it would; ``direct`` from the tree."""

    tracked: list[str]
    sdist: Path
    wheel: Path
    direct: Path


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and the folder in which its programs run."""

    root: Path
    folder: Path

    def run(self, program: str, *arguments: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """Run ``bin/PROGRAM``, which sees nothing of this repository."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        command = [str(self.root / "bin" / program), *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=seconds
        )

    def printed(self, code: str, *arguments: str) -> str:
        """The output of Python code that must not fail."""
        done = self.run("python", "-c", code, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout


def tool(*arguments: str | Path) -> None:
    """Run a module of the test environment. Its output comes with a failure."""
    done = subprocess.run([sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def copy_tracked(names: list[str], destination: Path) -> None:
    """Copy files and links: a checkout has caches and runs besides, which no archive may depend on."""
    for name in names:
        target = destination / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPO / name, target, follow_symlinks=False)


def build_archives(folder: Path) -> Archives:
    """Build from the tracked files, without isolation: the dev extra has the build backend, so no index is asked."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    tracked = [name for name in listed.split("\0") if name and os.path.lexists(REPO / name)]
    copy_tracked(tracked, folder / "tree")
    tool("build", "--no-isolation", "--outdir", folder / "dist", folder / "tree")
    tool("build", "--no-isolation", "--wheel", "--outdir", folder / "direct", folder / "tree")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    (direct,) = (folder / "direct").glob("*.whl")
    return Archives(tracked, sdist, wheel, direct)


def make_environment(folder: Path, *requirements: str | Path) -> Environment:
    """An environment without pip, into which the test environment's pip installs the tested versions."""
    root, empty = folder / "environment", folder / "empty"
    empty.mkdir()
    venv.create(root, symlinks=True)
    python = root / "bin" / "python"
    tool("pip", "--python", python, "install", "--quiet", "--constraint", REPO / "constraints.txt", *requirements)
    return Environment(root, empty)
