"""``critic_quality.json``: one critic, or two side by side, against the labels of a data set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepalign.errors import ConfigError
from stepalign.types import CriticIdentity
from stepalign_report.critic_quality.figures import Sample, comparison_figures, critic_figures
from stepalign_report.critic_quality.judged import judge
from stepalign_report.critic_quality.rows import Row, Told
from stepalign_report.intervals import BOOTSTRAP_SEED, LEVEL
from stepalign_run.data import LabelledData, LabelledSolution
from stepalign_run.data.labelled import Half
from stepalign_run.folder.files import replace_text
from stepalign_run.folder.outputs import require_own_file

VERSION = 1
LABELS = ("A", "B")


@dataclass(frozen=True)
class Measured:
    """A critic, what it was told, and its answers by the solution's id."""

    critic: CriticIdentity
    told: Told
    rows: Mapping[str, Row]


def summarise(
    data: LabelledData,
    chosen: Sequence[LabelledSolution],
    measured: Sequence[Measured],
    *,
    half: Half | None,
    limit: int | None,
) -> dict[str, Any]:
    """The figures of one or two critics on the ``chosen`` solutions, and of two the comparison.

    Raises ConfigError when a critic has answered none of them.
    """
    critics: list[dict[str, Any]] = []
    judged_of = []
    for label, each in zip(LABELS, measured, strict=False):
        judged = [judge(solution, each.rows[solution.id]) for solution in chosen if solution.id in each.rows]
        if not judged:
            raise ConfigError(f"critic {each.critic.model} has answered none of the {len(chosen)} solutions")
        judged_of.append(judged)
        figures = critic_figures(Sample(judged), knows_answers=each.told.answer)
        head = {"label": label, "critic": each.critic.model_dump(), "told": each.told.model_dump()}
        critics.append({**head, "unanswered": len(chosen) - len(judged), "figures": figures})
    return {
        "critic_quality": VERSION,
        "data": {
            "name": data.name,
            "formats": list(data.formats),
            "sha256": data.sha256,
            "solutions": len(data.solutions),
            "left_out": data.left_out,
        },
        "chosen": {"half": half, "limit": limit, "solutions": len(chosen)},
        "bootstrap": {"level": LEVEL, "seed": BOOTSTRAP_SEED},
        "critics": critics,
        "comparison": comparison_figures(*judged_of) if len(judged_of) > 1 else None,
        "remarks": _remarks(data, critics),
    }


def summary_json(summary: dict[str, Any]) -> str:
    """The file's text."""
    return json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Write the file. Raises NotOursError as :func:`require_own_summary`."""
    require_own_summary(path)
    replace_text(path, summary_json(summary))


def read_summary(path: Path) -> dict[str, Any] | None:
    """The summary in a file; None where there is no file. Raises ConfigError when it is something else."""
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    if not _is_summary(text):
        raise ConfigError(f"{path} is no report of critic-quality; move it away, or run critic-quality again")
    return json.loads(text)


def require_own_summary(path: Path) -> None:
    """Raises NotOursError when a file is there that is no summary of ours."""
    require_own_file(path, _is_summary, "move it away, or give another --out")


def _is_summary(text: str) -> bool:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("critic_quality") == VERSION and "critics" in found


def _remarks(data: LabelledData, critics: Sequence[dict[str, Any]]) -> list[str]:
    """Caveats that a reader needs before believing the figures."""
    found = [f"left out of the data, {count}: {reason}" for reason, count in data.left_out.items()]
    for each in critics:
        figures = each["figures"]
        whose = "" if len(critics) == 1 else f"{each['label']}: "
        if each["unanswered"]:
            found.append(f"{whose}{each['unanswered']} solutions have no answer yet and are in no figure; run it again")
        if figures["f1"] is None:
            missing = "correct" if figures["erroneous"] else "erroneous"
            found.append(f"{whose}there is no F1 without {missing} solutions")
    return found
