"""The Typer application. Subcommands come from the entry-point group ``stepalign.commands``.

An entry is a function (a command that takes ``CONFIG`` and dotted overrides) or a :class:`typer.Typer` (a group of
commands). A subcommand whose extra is not installed is listed with the way to install it.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points, version
from inspect import signature
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from stepalign.commands.extras import extra_for, how_to_install

GROUP = "stepalign.commands"
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}

# The order of a table of contents: the whole loop first, then its processes, then the commands that look inside.
ORDER = [
    *("demo", "run", "probe", "band", "critic", "solver", "trainer", "evaluate"),
    *("report", "compare", "critique", "critic-quality", "queue", "lab"),
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


def _missing(entry: EntryPoint, error: ModuleNotFoundError) -> Any:
    """A command in the place of one that cannot be loaded. It takes any arguments, and says how to go on."""
    extra = extra_for(error.name, entry.name)
    remedy = f": {how_to_install(extra)}" if extra is not None else ""

    def command(ctx: typer.Context) -> None:
        typer.echo(f"'stepalign {entry.name}' needs the module {error.name!r}{remedy}", err=True)
        raise typer.Exit(1)

    command.__doc__ = f"(not installed{remedy or f': needs {error.name}'})"
    return command


def _rank(name: str) -> tuple[int, str]:
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


class _InOrder(TyperGroup):
    """Typer lists groups of commands after the commands."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(self.commands, key=_rank)


def build_app(named: str | None = None) -> typer.Typer:
    """The application with every installed subcommand, or with the one that is ``named``, if there is such a one.

    A process that starts one subcommand need not import all the others.
    """
    app = typer.Typer(
        cls=_InOrder,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_main)
    entries = entry_points(group=GROUP)
    for entry in [entry for entry in entries if entry.name == named] or entries:
        try:
            target = entry.load()
        except ModuleNotFoundError as error:
            target = _missing(entry, error)
        if isinstance(target, typer.Typer):
            app.add_typer(target, name=entry.name)
        else:
            # A command without overrides refuses unknown options.
            settings = OVERRIDES if "ctx" in signature(target).parameters else None
            app.command(entry.name, context_settings=settings, hidden=entry.name in HIDDEN)(target)
    return app
