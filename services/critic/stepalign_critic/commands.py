"""The command ``stepalign critic``, found through the entry-point group ``stepalign.commands``."""

from __future__ import annotations

from pathlib import Path

import typer

from stepalign_critic.process import serve
from stepalign_run.config import load_critic_config
from stepalign_run.logging import configure_logging

CONFIG = typer.Argument(help="TOML configuration of a critic; of a run's, the section [critic] is read.")


def critic(ctx: typer.Context, config: Path = CONFIG) -> None:
    """Serve the critic. Further options override the configuration, as in --critic.port 8300."""
    settings = load_critic_config(config, ctx.args)
    configure_logging("critic")
    serve(settings.critic)
