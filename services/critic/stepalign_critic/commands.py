"""The command ``stepalign critic``, found through the entry-point group ``stepalign.commands``."""

from __future__ import annotations

from pathlib import Path

import structlog
import typer

from stepalign_critic.server import serve
from stepalign_run.config import load_config
from stepalign_run.logging import configure_logging

# Of the run that a critic may be part of.
_UNREAD = {"model": {"path": "none"}, "data": {"train": "none"}}


def critic(ctx: typer.Context, config: Path = typer.Argument(help="TOML configuration of the run.")) -> None:
    """Serve the critic. Further options override the configuration, as in --critic.port 8300."""
    settings = load_config(config, ctx.args, unread=_UNREAD)
    configure_logging("critic")
    structlog.contextvars.bind_contextvars(run_id=settings.run.name)
    serve(settings)
