from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stepalign.errors import ConfigError
from stepalign_run.folder.files import lock_file
from stepalign_run.folder.ownership import OwnFolder
from stepalign_trainer.commands import trainer

LAB = Path(__file__).parents[3] / "configs" / "lab.toml"


def test_a_second_trainer_of_a_run_is_refused(tmp_path: Path) -> None:
    """To the queue it would be the same consumer, and would be given what the first one has claimed."""
    context: Any = SimpleNamespace(args=["--run.dir", str(tmp_path), "--run.name", "one"])
    OwnFolder(tmp_path, "one").claim()
    with (
        lock_file(tmp_path / "one" / ".trainer.lock", ""),
        pytest.raises(ConfigError, match="another trainer works on"),
    ):
        trainer(context, LAB)
