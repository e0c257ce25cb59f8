"""Real critics against people's labels, beside their peers: ``benchmarks/results/critic_quality.json``.

    make bench-critic-quality ARGS='--data FOLDER'

The folder holds ``processbench_gsm8k_dev.jsonl``: ProcessBench's GSM8K part with reference solutions and answers.
Prompts and thresholds were chosen on one half of its questions; all figures are read on the other.

- *F1 of the first error*: critics with and without reference solution and answer, beside ProcessBench's critic prompt
  with the same model and information (:mod:`benchmarks.critic_quality.critic_prompt`) and rules without a model
  (:mod:`benchmarks.critic_quality.rules`). Every peer knows whether the answer is right.
- *Valid critiques* of four models in every engine (:mod:`benchmarks.critic_quality.critics`).
- *Speed* beside plain masked decoding (:mod:`benchmarks.critic_quality.speed`).

Each answer is a row under ``benchmarks/results/critic_quality/``; what is there is not asked again. Speed is measured
each time. Exits with 1 when a bound is missed, after writing the file, and when something could not be measured,
without writing. Models: ``make qwen smollm2``; vLLM's environment: ``make test-vllm``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape

from benchmarks import report
from benchmarks.arms_benchmark import ROOT
from benchmarks.comparison_section import markdown_table, replace_section
from benchmarks.critic_quality.cells import (
    BOTH,
    NEITHER,
    NO_ANSWER,
    NO_REFERENCE,
    ROWS,
    Cell,
    judged_rows,
    measure_cell,
    of_half,
)
from benchmarks.critic_quality.critic_prompt import (
    AS_WRITTEN,
    LIKELIEST,
    PROMPTINGS,
    Prompting,
    Variant,
    is_asked,
    made_of,
    measure_peer,
    predicted,
    prompting_of,
)
from benchmarks.critic_quality.critics import MODELS
from benchmarks.critic_quality.peers import FIGURES, Predict, expected_accuracies, expected_right, rules_of
from benchmarks.critic_quality.rows import read_rows
from benchmarks.critic_quality.speed import measure_speed
from benchmarks.errors import BenchError
from benchmarks.report import Bound
from stepalign.errors import StepalignError
from stepalign_report.critic_quality.figures import (
    Sample,
    at_threshold,
    best_threshold,
    critic_figures,
    estimate,
    percent,
)
from stepalign_report.critic_quality.judged import Judged
from stepalign_report.critic_quality.tables import written
from stepalign_report.intervals import Array
from stepalign_run.data import LabelledData, LabelledSolution, load_labelled
from stepalign_run.data.labelled import Half

RESULTS = ROOT / "benchmarks" / "results" / "critic_quality.json"
PAGE = ROOT / "docs" / "critic-quality.md"
DATA = "processbench_gsm8k_dev.jsonl"
MODEL = "qwen-1.5b"
LEAST_F1_RATIO = 1.25
LEAST_SPEEDUP = 2.5
_VALID_LIMIT = 8
_TOLD_LIMIT = 20
_PEER_DEV_LIMIT = 24
_SPEED_ATTEMPTS = 8

MAIN = Cell(MODEL, "transformers")
F1_CELLS = (
    MAIN,
    *(Cell(MODEL, "transformers", told, _TOLD_LIMIT) for told in (NO_ANSWER, NO_REFERENCE, NEITHER)),
    Cell("qwen-0.5b", "transformers"),
    *(Cell("qwen-0.5b", "transformers", told, 2 * _TOLD_LIMIT) for told in (NO_ANSWER, NO_REFERENCE, NEITHER)),
)
DEV_CELLS = {cell.name: replace(cell, half="dev") for cell in F1_CELLS if not cell.told.answer}
"""Of each critic that knows no answer: the cell on which the threshold of its ``p_wrong`` is chosen."""
VALID_CELLS = (
    Cell("smollm2", "transformers", limit=_VALID_LIMIT, erroneous=True),
    Cell("random", "transformers", limit=_VALID_LIMIT, erroneous=True),
    *(Cell(model, "vllm", limit=_VALID_LIMIT, erroneous=True) for model in MODELS),
    *(Cell(model, "llama.cpp", limit=_VALID_LIMIT, erroneous=True) for model in ("qwen-1.5b", "qwen-0.5b", "smollm2")),
    Cell("random", "vllm-server", limit=_VALID_LIMIT, erroneous=True),
)

PEER, PEER_AS_WRITTEN = "critic_prompt", "critic_prompt_as_written"
_PEERS: dict[str, tuple[Variant, ...]] = {PEER: (*AS_WRITTEN, *LIKELIEST), PEER_AS_WRITTEN: AS_WRITTEN}
_OTHERS = ("f1", "f1_ratio_to_best_rule", "f1_ratio_to_peer_as_written")

_console = Console()


class Part(StrEnum):
    CELLS = "cells"
    PEER = "peer"
    SPEED = "speed"


def main(
    data: Annotated[
        Path | None, typer.Option(help=f"Folder with {DATA}, or a file of labelled solutions like it.")
    ] = None,
    output: Annotated[Path, report.output_option("critic_quality")] = RESULTS,
    part: Annotated[
        list[Part] | None, typer.Option(help="Measure this part alone, and write no figures; repeatable.")
    ] = None,
) -> None:
    """Measure real critics."""
    begin, machine = time.monotonic(), report.machine()
    try:
        labelled = _load(data)
        speed = _measure(labelled, part or list(Part))
        if part:
            return
        figures = _figures(labelled)
    except (BenchError, StepalignError) as error:
        _console.print(f"[red]not measured:[/red] {escape(str(error))}")
        raise typer.Exit(1) from error
    bounds = _bounds(figures, speed)
    written_figures = {
        "benchmark": "critic_quality",
        # Which data it was, its digest tells; where they lay is nobody's business.
        "command": "make bench-critic-quality ARGS='--data FOLDER'",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": time.monotonic() - begin,
        "bounds_kept": all(bound.kept for bound in bounds.values()),
        **{name: bound.value for name, bound in bounds.items()},
        "f1": figures["critics"][MAIN.name]["f1"]["value"],
        "f1_ratio_to_best_rule": figures["ratios"][figures["best_rule"]]["value"],
        "f1_ratio_to_peer_as_written": figures["ratios"][PEER_AS_WRITTEN]["value"],
        "bounds": {name: bound.as_dict() for name, bound in bounds.items()},
        "machine": machine,
        "data": {"name": labelled.name, "sha256": labelled.sha256, "half": "test"},
        **figures,
        "speed": speed,
    }
    report.write(output, written_figures)
    report.show(_console, bounds, {name: written_figures[name] for name in _OTHERS})
    if output == RESULTS:
        replace_section(PAGE, "critic-quality", _tables(written_figures))
    _console.print(f"{escape(str(output))}, after {written_figures['seconds']:.0f} s")
    if not written_figures["bounds_kept"]:
        raise typer.Exit(1)


def _load(data: Path | None) -> LabelledData:
    path = None if data is None else data / DATA if data.is_dir() else data
    if path is None or not path.is_file():
        raise BenchError(f"--data must name a folder that holds {DATA}, or such a file; {path} is none")
    return load_labelled(str(path))


def _measure(data: LabelledData, parts: Sequence[Part]) -> dict[str, Any]:
    """Fill in what is missing; the figures of speed."""
    if Part.CELLS in parts:
        for cell in (*F1_CELLS, *DEV_CELLS.values(), *VALID_CELLS):
            measure_cell(cell, data, _console)
    if Part.PEER in parts:
        for prompting in PROMPTINGS:
            _ask_peer(data, "dev", prompting)
        for name, variants in _PEERS.items():
            best = best_variant(data, variants)
            _console.print(f"{name}: {best} is the best on the dev half")
            _ask_peer(data, "test", prompting_of(best))
    return measure_speed(data, _SPEED_ATTEMPTS) if Part.SPEED in parts else {}


def _peer_path(half: Half, prompting: Prompting) -> Path:
    return ROWS / f"critic-prompt-{MODEL}-{prompting}-{half}.jsonl"


def _peer_asked(data: LabelledData, half: Half) -> list[LabelledSolution]:
    """Those that the peer is asked about; of the dev half, on which its variant is chosen, the first of them."""
    asked = [each for each in of_half(data, half) if is_asked(each)]
    return asked[:_PEER_DEV_LIMIT] if half == "dev" else asked


def _ask_peer(data: LabelledData, half: Half, prompting: Prompting) -> None:
    _console.print(f"peer, {prompting}, {half} half")
    measure_peer(MODEL, data, _peer_asked(data, half), prompting, _peer_path(half, prompting))


def peer(data: LabelledData, half: Half, variant: Variant) -> Predict:
    """Where a variant of the peer places the error. Raises BenchError when rows of the half are missing."""
    path = _peer_path(half, prompting_of(variant))
    rows = read_rows(path, made_of(MODEL, data, prompting_of(variant)))
    missing = [each.id for each in _peer_asked(data, half) if each.id not in rows]
    if missing:
        raise BenchError(f"{path} lacks {len(missing)} rows, such as {missing[0]}")
    return lambda solution: predicted(solution, rows.get(solution.id), variant)


def best_variant(data: LabelledData, variants: Sequence[Variant]) -> Variant:
    """The variant that finds most places on the dev half; of equal ones the first."""
    asked = _peer_asked(data, "dev")

    def found(variant: Variant) -> float:
        return sum(expected_right(asked, peer(data, "dev", variant)).values())

    return max(variants, key=found)


def _ratio(ours: Array, theirs: Array) -> dict[str, float] | None:
    """Ours over a peer's, with an interval over the same draws of questions."""
    return estimate(np.divide(ours, theirs, out=np.full_like(ours, np.nan), where=theirs != 0))


def _figures(data: LabelledData) -> dict[str, Any]:
    ours = Sample(judged_rows(MAIN, data))
    mine = ours.of(lambda _: True).f1
    chosen, dev_half = of_half(data, "test"), of_half(data, "dev")
    peers: dict[str, Predict] = dict(rules_of(dev_half))
    best_rule = max(peers, key=lambda name: float(expected_accuracies(ours, chosen, peers[name])[0][0]))
    variants: dict[str, Variant] = {name: best_variant(data, among) for name, among in _PEERS.items()}
    peers |= {name: peer(data, "test", variant) for name, variant in variants.items()}
    expected = {name: expected_accuracies(ours, chosen, predict) for name, predict in peers.items()}
    cells = (*F1_CELLS, *VALID_CELLS)
    return {
        "critics": {cell.name: _critic(cell, data) for cell in F1_CELLS},
        "peers": {
            name: dict(zip(FIGURES, map(percent, found), strict=True)) | _chosen(name, variants)
            for name, found in expected.items()
        },
        "best_rule": best_rule,
        "ratios": {name: _ratio(mine, found[0]) for name, found in expected.items()},
        "valid": {cell.name: _valid(judged_rows(cell, data)) for cell in cells},
    }


def _chosen(name: str, variants: Mapping[str, Variant]) -> dict[str, str]:
    return {"variant": variants[name]} if name in variants else {}


def _critic(cell: Cell, data: LabelledData) -> dict[str, Any]:
    sample = Sample(judged_rows(cell, data))
    left_out = ("by_steps", "by_generator", "best_threshold")
    figures = {name: value for name, value in critic_figures(sample).items() if name not in left_out}
    if cell.name in DEV_CELLS:
        threshold = best_threshold(judged_rows(DEV_CELLS[cell.name], data))
        if threshold is not None:
            figures["at_dev_threshold"] = at_threshold(sample, threshold)
    return figures


def _valid(judged: Sequence[Judged]) -> dict[str, Any]:
    failures = sorted(one.failure for one in judged if one.failure is not None)
    return {"critiques": len(judged), "valid": len(judged) - len(failures), "failures": failures}


def _bounds(figures: dict[str, Any], speed: dict[str, Any]) -> dict[str, Bound]:
    valid = figures["valid"].values()
    share = sum(each["valid"] for each in valid) / sum(each["critiques"] for each in valid)
    ratios = figures["ratios"]
    return {
        "valid_share": Bound(share, at_least=1.0),
        "f1_ratio_to_peer": Bound(ratios[PEER]["value"], at_least=LEAST_F1_RATIO),
        "f1_ratio_to_answer_then_uniform": Bound(ratios["answer_then_uniform"]["value"], at_least=LEAST_F1_RATIO),
        "speedup_transformers": Bound(speed["transformers"]["speedup"], at_least=LEAST_SPEEDUP),
        "speedup_vllm": Bound(speed["vllm"]["speedup"], at_least=LEAST_SPEEDUP),
        "differing_transformers": Bound(speed["transformers"]["differing"], at_most=0),
        "differing_transformers_batch_8": Bound(speed["transformers"]["batch_8"]["differing"], at_most=0),
    }


def _tables(figures: dict[str, Any]) -> str:
    def row(name: str, told: str, found: dict[str, Any]) -> list[str]:
        rows = str(found["rows"]) if "rows" in found else ""
        return [name, told, rows, *(written(found[key], 1) for key in ("f1", "on_erroneous", "on_correct"))]

    lines: list[list[str]] = []
    for cell in F1_CELLS:
        found, title = figures["critics"][cell.name], MODELS[cell.model].title
        lines.append(row(title, _told(cell), found))
        if "at_dev_threshold" in found:
            at = found["at_dev_threshold"]
            lines.append(
                row(f"{title}, `wrong_threshold` {at['threshold']:g}", _told(cell), at | {"rows": found["rows"]})
            )
    for name, found in figures["peers"].items():
        title = f"rule `{name}`"
        if "variant" in found:
            title = f"ProcessBench's critic prompt, `{found['variant']}`, {MODELS[MODEL].title}"
        lines.append(row(title, _told(MAIN), found))
    quality = markdown_table(["critic", "told", "solutions", "F1", "on erroneous", "on correct"], lines)
    ratios = markdown_table(
        ["F1 of ours over that of", "ratio"],
        [[f"`{name}`", written(ratio, 2)] for name, ratio in figures["ratios"].items()],
    )
    valid = markdown_table(
        ["critic", "engine", "valid"],
        [
            [MODELS[cell.model].title, cell.engine, f"{found['valid']} of {found['critiques']}"]
            for cell in (*F1_CELLS, *VALID_CELLS)
            if cell.told == BOTH
            for found in [figures["valid"][cell.name]]
        ],
    )
    speed = figures["speed"]
    speeds = markdown_table(
        [
            "engine",
            "tokens/s",
            "plain, tokens/s",
            "speedup",
            "critiques that differ",
            "and where two tokens are as good",
        ],
        [_speed_row("transformers", speed["transformers"]), _speed_row("vllm", speed["vllm"])],
    )
    return "\n\n".join((quality, ratios, valid, speeds))


def _told(cell: Cell) -> str:
    return ", ".join(name.replace("_solution", "") for name, given in cell.told if given) or "neither"


def _speed_row(name: str, speed: dict[str, Any]) -> list[str]:
    plain = speed.get("reference_tokens", speed["tokens"]) / speed["reference_seconds"]
    differing, ties = str(speed["differing"]), str(speed.get("ties", "–"))
    return [
        name,
        f"{speed['tokens'] / speed['seconds']:.1f}",
        f"{plain:.1f}",
        f"{speed['speedup']:.2f}",
        differing,
        ties,
    ]


if __name__ == "__main__":
    typer.run(main)
