"""The ``stepalign`` command. Subcommands come from the entry-point group ``stepalign.commands``.

An entry is a function (a command that takes ``CONFIG`` and dotted overrides) or a :class:`typer.Typer` (a group of
commands). A subcommand whose extra is not installed is listed with what to install.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from importlib.metadata import EntryPoint, entry_points, version
from inspect import signature
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

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
HIDDEN = {"probe-report", "probe-worker"}


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


def _install(module: str | None) -> str:
    extra = EXTRA_OF.get(module or "", "lab")
    return f"install stepalign with its extra {extra!r}, as in pip install -e '.[{extra}]' where its repository is"


def _missing(entry: EntryPoint, error: ModuleNotFoundError) -> Any:
    def command(ctx: typer.Context) -> None:
        typer.echo(f"'stepalign {entry.name}' needs the module {error.name!r}: {_install(error.name)}", err=True)
        raise typer.Exit(1)

    command.__doc__ = f"(not installed: needs {error.name})"
    return command


def _rank(name: str) -> tuple[int, str]:
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


class _InOrder(TyperGroup):
    """Typer lists groups of commands after the commands."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=_rank)


def build_app() -> typer.Typer:
    """The application with every installed subcommand."""
    app = typer.Typer(
        cls=_InOrder,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_main)
    for entry in entry_points(group=GROUP):
        try:
            target = entry.load()
        except ModuleNotFoundError as error:
            target = _missing(entry, error)
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=entry.name)
        else:
            # What takes no overrides refuses what it does not know.
            settings = OVERRIDES if "ctx" in signature(target).parameters else None
            app.command(entry.name, context_settings=settings, hidden=entry.name in HIDDEN)(target)
    return app


def _end(signal_number: int, _frame: FrameType | None) -> None:
    os._exit(128 + signal_number)


def _refusal(error: Exception) -> str | None:
    """The one line that says what to change, None for an error that nobody expected."""
    if isinstance(error, StepalignError):
        return str(error)
    if isinstance(error, PermissionError):
        return f"{error.filename}: user {os.getuid()} may not read or write this"
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRA_OF:
        return f"the module {error.name!r} is missing: {_install(error.name)}"
    return None


def main() -> None:
    """Entry point. An error of ours is one line on stderr and its own exit code; any other a traceback and 70.

    A supervisor tells from the code whether to start the process again.
    """
    if os.getpid() == 1:
        # The first process of a container has no default action: without a handler SIGTERM would be ignored.
        signal.signal(signal.SIGTERM, _end)
    try:
        build_app()()
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None:
            traceback.print_exc()
            sys.exit(os.EX_SOFTWARE)
        print(f"stepalign: {refusal}", file=sys.stderr)
        sys.exit(error.exit_code if isinstance(error, StepalignError) else 1)


if __name__ == "__main__":
    main()
