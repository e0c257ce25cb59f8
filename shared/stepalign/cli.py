"""The ``stepalign`` command. Subcommands come from the entry-point group ``stepalign.commands``.

An entry is a function (a command that takes ``CONFIG`` and dotted overrides) or a :class:`typer.Typer` (a group of
commands). A subcommand whose extra is not installed is listed with what to install.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib.metadata import EntryPoint, entry_points, version
from types import FrameType
from typing import Annotated, Any

import typer

from stepalign.errors import StepalignError

GROUP = "stepalign.commands"
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}

# What each extra brings that its command imports late.
EXTRA_OF = {
    **dict.fromkeys(["fastapi", "uvicorn", "prometheus_client"], "critic"),
    **dict.fromkeys(["torch", "transformers", "safetensors", "tokenizers", "numpy"], "models"),
    **{"peft": "trainer", "gguf": "lab", "httpx_aiohttp": "critic-openai", "vllm": "critic-vllm"},
}

# The order of a table of contents: the whole loop first, then its processes, then what looks inside.
ORDER = [
    *("demo", "run", "probe", "band", "critic", "solver", "trainer", "evaluate"),
    *("report", "compare", "critique", "queue", "lab"),
]

# Processes that another command starts, and that are of no use by hand.
HIDDEN = {"probe-worker"}


def _version(value: bool) -> None:
    if value:
        typer.echo(version("stepalign"))
        raise typer.Exit


def _main(
    show: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train a language model on step-aligned critiques of its own attempts.

    Most commands take a TOML configuration; override any value with --section.key, as in --trainer.steps 50.
    """


def _missing(entry: EntryPoint, error: ModuleNotFoundError) -> Any:
    def command() -> None:
        typer.echo(
            f"'stepalign {entry.name}' needs the module {error.name!r}; install its extra, "
            f"for example: pip install 'stepalign[lab]'",
            err=True,
        )
        raise typer.Exit(1)

    command.__doc__ = f"(not installed: needs {error.name})"
    return command


def _rank(entry: EntryPoint) -> tuple[int, str]:
    return (ORDER.index(entry.name) if entry.name in ORDER else len(ORDER), entry.name)


def build_app() -> typer.Typer:
    """The application with every installed subcommand."""
    app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback()(_main)
    for entry in sorted(entry_points(group=GROUP), key=_rank):
        try:
            target = entry.load()
        except ModuleNotFoundError as error:
            target = _missing(entry, error)
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=entry.name)
        else:
            app.command(entry.name, context_settings=OVERRIDES, hidden=entry.name in HIDDEN)(target)
    return app


def _end(signal_number: int, _frame: FrameType | None) -> None:
    os._exit(128 + signal_number)


def main() -> None:
    """Entry point. An error of ours is one line on stderr and exit code 1; anything else is a traceback."""
    if os.getpid() == 1:
        # The first process of a container has no default action: without a handler SIGTERM would be ignored.
        signal.signal(signal.SIGTERM, _end)
    try:
        build_app()()
    except StepalignError as error:
        print(f"stepalign: {error}", file=sys.stderr)
        sys.exit(1)
    except PermissionError as error:
        print(f"stepalign: {error.filename}: user {os.getuid()} may not read or write this", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if error.name not in EXTRA_OF:
            raise
        extra = EXTRA_OF[error.name]
        print(f"stepalign: the module {error.name!r} is missing: pip install 'stepalign[{extra}]'", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
