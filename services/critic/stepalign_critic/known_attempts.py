"""Whether a critic tells right steps from wrong ones, asked before it serves.

With aligned decoding every critique is in form, whatever the model: validity no longer shows a broken one. So a prompt
set may hold known attempts (``known.jsonl``), in pairs that differ in one step, right in the one and wrong in the
other. The critic passes when it finds the wrong one likelier wrong, by a paired t-test over the pairs. A model that
guesses passes one time in fifty.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from statistics import fmean, stdev

LEAST_T = 2.5
"""Student's t of the mean difference; for eight pairs its one-sided p is 0.02."""
_CLOSEST = 1e-9


@dataclass(frozen=True)
class KnownPair:
    """Two tagged attempts that differ from step ``step`` (from 1) on, where the one is right and the other wrong."""

    question: str
    reference_solution: str
    right: str
    wrong: str
    step: int


def known_pairs(version: str) -> list[KnownPair]:
    """The pairs of a prompt set; none where it has none."""
    path = files("stepalign.prompts") / version / "known.jsonl"
    if not path.is_file():
        return []
    return [KnownPair(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def separation(p_right: Sequence[float], p_wrong: Sequence[float]) -> float:
    """Student's t of the differences of log-odds, of each pair's wrong step less its right one."""
    differences = [_log_odds(wrong) - _log_odds(right) for right, wrong in zip(p_right, p_wrong, strict=True)]
    spread = stdev(differences) / math.sqrt(len(differences))
    mean = fmean(differences)
    return mean / spread if spread else math.copysign(math.inf, mean) if mean else 0.0


def separates(p_right: Sequence[float], p_wrong: Sequence[float]) -> bool:
    """Whether the probabilities of wrong steps lie above those of right ones by more than chance."""
    return separation(p_right, p_wrong) >= LEAST_T


def _log_odds(p: float) -> float:
    bounded = min(max(p, _CLOSEST), 1 - _CLOSEST)
    return math.log(bounded) - math.log1p(-bounded)
