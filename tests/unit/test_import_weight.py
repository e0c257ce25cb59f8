"""The SDK loads its own dependencies alone; the critic's HTTP layer loads no model library."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "vllm", "tokenizers", "peft")
# rich is left out: httpx takes it for a command line of its own where it is installed.
EXTRAS = ("fastapi", "numpy", "pydantic_settings", "redis", "structlog", "typer")
APP_WITH_PROGRAM_BACKEND = """
from stepalign_run.config import CriticServerSection
from stepalign_critic.app import create_app
from stepalign_critic.backends import create_backend
from stepalign_critic.commands import critic
from stepalign_critic.service import CriticService
section = CriticServerSection(backend="program", checker="lab", prompts="lab-v1")
create_app(CriticService(create_backend(section), section.prompts))
"""


def loaded_after(code: str) -> list[str]:
    report = f"import sys; print(*(name for name in {HEAVY + EXTRAS!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_probe_sees_a_loaded_module() -> None:
    assert loaded_after("import sys, types; sys.modules['torch'] = types.ModuleType('torch')") == ["torch"]


def test_the_sdk_loads_no_module_of_an_extra() -> None:
    assert loaded_after("import stepalign") == []


@pytest.mark.parametrize(
    "code",
    ["import stepalign_run.config, stepalign_run.queue", APP_WITH_PROGRAM_BACKEND],
    ids=["the room of a run", "app with the program backend"],
)
def test_no_model_library_is_loaded(code: str) -> None:
    assert not set(loaded_after(code)) & set(HEAVY)


def test_a_named_subcommand_loads_no_other() -> None:
    code = "from stepalign.commands.application import build_app; build_app('queue')"
    report = "import sys; print(*sorted(name for name in sys.modules if name.startswith('stepalign_')))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert {name.split(".")[0] for name in done.stdout.split()} == {"stepalign_run"}
