"""What must stay light: the SDK and the critic's HTTP layer load no model library."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "vllm", "tokenizers", "peft")
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
    report = f"import sys; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_probe_sees_a_loaded_model_library() -> None:
    assert loaded_after("import sys, types; sys.modules['torch'] = types.ModuleType('torch')") == ["torch"]


@pytest.mark.parametrize(
    "code",
    [
        "import stepalign, stepalign.client, stepalign_run.config, stepalign.prompts, stepalign_run.queue",
        APP_WITH_PROGRAM_BACKEND,
    ],
    ids=["sdk", "app with the program backend"],
)
def test_no_model_library_is_loaded(code: str) -> None:
    assert loaded_after(code) == []
