"""Arguments that the commands of a run have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file; override with --section.key value.")]
