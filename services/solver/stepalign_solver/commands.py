"""``stepalign solver``, ``stepalign evaluate`` and ``stepalign band``.

Torch is imported only once the configuration has been read.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import structlog
import typer

from stepalign.errors import ConfigError
from stepalign.problems import load_problems
from stepalign_run.commands.arguments import ConfigPath
from stepalign_run.config import Config, load_config
from stepalign_run.fingerprint import require_same_run
from stepalign_run.folder.outputs import prepare_new_file, write_new_file
from stepalign_run.heartbeat import Heartbeat
from stepalign_run.logging import configure_logging
from stepalign_run.training_problems import load_training_problems

POLL_SECONDS = 0.2


def solver(ctx: typer.Context, config: ConfigPath) -> None:
    """Sample rollouts from the newest policy and publish them."""
    settings = load_config(config, ctx.args)
    configure_logging("solver")
    structlog.contextvars.bind_contextvars(run_id=settings.run.name)
    problems = load_training_problems(settings)
    settings.own_folder.claim()
    require_same_run(settings)

    from stepalign_models.loading import load_policy, load_tokenizer
    from stepalign_models.sampling import Sampler
    from stepalign_run.policy_store import open_policy_store
    from stepalign_run.queue import open_queue
    from stepalign_solver.worker import RolloutWorker

    tokenizer = load_tokenizer(settings.model.path)

    def load_sampler(adapter: Path | None) -> Sampler:
        return Sampler(load_policy(settings.model, adapter, merge=settings.solver.merge_adapter), tokenizer)

    async def work() -> None:
        queue = open_queue(settings.queue, settings.run.name, consumer="solver")
        policies = open_policy_store(settings.queue, settings.run.name)
        await queue.start()
        try:
            async with Heartbeat(settings.run.heartbeat_file).beating():
                await RolloutWorker(settings, queue, policies, problems, tokenizer, load_sampler).run()
        finally:
            await queue.close()
            await policies.close()

    asyncio.run(work())


def evaluate(
    ctx: typer.Context,
    config: ConfigPath,
    follow: Annotated[bool, typer.Option("--follow", help="Wait for checkpoints of a run in progress.")] = False,
) -> None:
    """Score checkpoints on validation, then base and best on test."""
    settings = load_config(config, ctx.args)
    configure_logging("evaluate")
    structlog.contextvars.bind_contextvars(run_id=settings.run.name)
    settings.own_folder.claim()

    from stepalign_solver.evaluation import Evaluator

    wait = (lambda: time.sleep(POLL_SECONDS)) if follow else None
    _print_summary(settings, Evaluator(settings, wait).run())


def _print_summary(settings: Config, summary: dict[str, object]) -> None:
    typer.echo(json.dumps({"run": settings.run.name, **summary}, indent=1))


def band(
    ctx: typer.Context,
    config: ConfigPath,
    candidates: Annotated[
        Path, typer.Argument(metavar="CANDIDATES", help="Problems to choose from: a file or a folder.")
    ],
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="A new file, for the chosen problems (JSONL).")],
    samples: Annotated[int, typer.Option(min=1, help="Completions of the base model per problem.")] = 16,
    at_least: Annotated[int, typer.Option(help="Fewest solved samples of a chosen problem.")] = 0,
    at_most: Annotated[int, typer.Option(help="Most solved samples of a chosen problem.")] = 4,
) -> None:
    """Choose problems by how often the base model solves them; without options the paper's hard band, below 5 of 16."""
    settings = load_config(config, ctx.args)
    configure_logging("band")
    prepare_new_file(to)
    problems = load_problems(candidates)

    from stepalign_solver.band import Band, chosen_rows, solved_counts

    chosen_band = Band(samples, at_least, at_most)
    counts = solved_counts(
        settings, candidates, samples, lambda done, of: typer.echo(f"{done} of {of} samples", err=True)
    )
    rows = chosen_rows(problems, counts, chosen_band)
    if not rows:
        raise ConfigError(
            f"no problem of {candidates} is solved {at_least} to {at_most} times of {samples}; how many are solved how "
            f"often: {dict(sorted(Counter(counts).items()))}"
        )
    write_new_file(to, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    typer.echo(json.dumps({"chosen": len(rows), "of": len(problems), "solved": dict(sorted(Counter(counts).items()))}))
