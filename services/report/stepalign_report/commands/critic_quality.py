"""``stepalign critic-quality DATA``: how well a critic finds the first wrong step, against people's labels."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from stepalign.client import CriticClient
from stepalign.commands.terminal import Terminal
from stepalign.errors import ConfigError
from stepalign.secret_files import read_secret
from stepalign_report.critic_quality.measure import Choice, CriticAddress, measure
from stepalign_report.critic_quality.rows import Told
from stepalign_report.critic_quality.summary import summary_json
from stepalign_report.critic_quality.tables import quality_tables
from stepalign_run.data import load_labelled
from stepalign_run.data.labelled import Half

_TEMPORARY = 75
_DEFAULT_URL = "http://127.0.0.1:8300"


def critic_quality(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="A file or folder of labelled solutions, or a data set of the Hugging Face hub."
        ),
    ],
    url: Annotated[
        list[str],
        typer.Option(envvar="STEPALIGN_CRITIC__URL", help="Address of the critic; given twice, two side by side."),
    ] = [_DEFAULT_URL],  # noqa: B006
    against: Annotated[
        Path | None, typer.Option(metavar="ROWS", help="Another critic's answers: its rows.jsonl, or the folder of it.")
    ] = None,
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="The folder that keeps answers, figures and a page; a rerun goes on there."),
    ] = Path("runs/critic-quality"),
    split: Annotated[str | None, typer.Option(help="Of a data set in the hub: its split.")] = None,
    without_reference: Annotated[
        bool, typer.Option("--without-reference", help="Tell the critic no reference solution.")
    ] = False,
    without_answer: Annotated[bool, typer.Option("--without-answer", help="Tell the critic no known answer.")] = False,
    half: Annotated[
        Half | None, typer.Option(help="One half of the questions: choose on dev, read the figures on test.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first solutions only.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Most critiques asked for at once.")] = 16,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for each critique, retries included.")] = 120.0,
    api_key_file: Annotated[
        list[Path] | None,
        typer.Option(envvar="STEPALIGN_CRITIC__API_KEY_FILE", help="A file with the API key; twice for two critics."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print critic_quality.json instead of tables.")] = False,
) -> None:
    """Measure a critic against people's labels of the first wrong step."""
    addresses = _addresses(url, api_key_file or [], timeout)
    if against is not None and len(addresses) > 1:
        raise ConfigError("give --url twice or --against, and not both: two critics stand side by side")
    console = Terminal(stderr=as_json)
    labelled = load_labelled(data, split)
    told = Told(reference_solution=not without_reference, answer=not without_answer)
    done = asyncio.run(
        measure(labelled, Choice(half, limit), addresses, told, out, against, concurrency=concurrency, console=console)
    )
    if as_json:
        typer.echo(summary_json(done.summary), nl=False)
    else:
        for table in quality_tables(done.summary):
            console.print(table)
    for remark in done.summary["remarks"]:
        console.print(remark, soft_wrap=True)
    if done.page is not None:
        console.print(f"the page of it: {done.page}; answers and figures are beside it", soft_wrap=True)
    else:
        console.print(f"{out} holds a comparison: its page shows this after the next stepalign compare", soft_wrap=True)
    if done.unanswered:
        reason = next(iter(done.unanswered.values()))
        console.print(
            f"{len(done.unanswered)} calls gave no answer, the first of them: {reason}. The same command asks again; "
            "where they ran out of time, give a longer --timeout or a lower --concurrency",
            soft_wrap=True,
        )
        raise typer.Exit(_TEMPORARY)


def _addresses(urls: list[str], key_files: list[Path], timeout: float) -> list[CriticAddress]:
    """Raises ConfigError for more than two critics, and for keys that do not fit them."""
    if len(urls) > 2:
        raise ConfigError(f"--url is given {len(urls)} times; two critics stand side by side, and no more")
    if len(key_files) not in (0, 1, len(urls)):
        raise ConfigError("give --api-key-file once for all critics, or once for each --url, in their order")
    keys = [read_secret("--api-key-file", path) for path in key_files] or [None]
    of_each = keys * len(urls) if len(keys) == 1 else keys
    return [
        CriticAddress(url, CriticClient(url, api_key=key, timeout=timeout))
        for url, key in zip(urls, of_each, strict=True)
    ]
