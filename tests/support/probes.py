"""The report of a probe, with figures like those of the lab."""

from __future__ import annotations

from typing import Any

from stepalign_run.config import Config
from stepalign_run.context import ContextKind
from stepalign_run.probing import (
    ArmFigures,
    ContextFigures,
    Contrast,
    CritiqueFigures,
    Estimate,
    ProbePlan,
    ProbeReport,
)
from stepalign_run.terms import run_terms


def estimate(value: float, width: float = 0.0) -> Estimate:
    return Estimate(value=value, lower=value - width, upper=value + width)


def arm(name: str, score: float | None, width: float = 0.0, **changes: Any) -> ArmFigures:
    fields: dict[str, Any] = {
        "arm": name,
        "objective": "forward_kl",
        "context": "critique",
        "scope": "full",
        "solve_rate": 1.0,
        "focus": score,
        "score": None if score is None else estimate(score, width),
    }
    return ArmFigures.model_validate(fields | changes)


def probe_report_of(config: Config, plan: ProbePlan) -> ProbeReport:
    """Four arms with scores, one without; one critique in four was refused."""
    terms = run_terms(config)
    contrast = Contrast(correct=0.0, below=0.0, at_error=-14.25, tail=-1.5)
    context = ContextFigures(
        kind=ContextKind.CRITIQUE,
        rollouts=3,
        left_out={"critique_truncated": 1},
        solve_rate=estimate(0.75, 0.125),
        trace_rate=0.5,
        grader_errors=0,
        solution_gain=0.25,
        solutions=3,
        contrast=contrast,
    )
    return ProbeReport(
        run="lab-probe",
        seed=0,
        rollouts=4,
        unusable={},
        with_error=3,
        unlocated=0,
        samples=2,
        contexts=[context],
        critiques=CritiqueFigures(rollouts=4, validated={"incorrect": 3}, refused={"truncated": 1}),
        student=None,
        arms=[
            arm("stepalign_scoped", 0.9, 0.05, scope="through_first_error"),
            arm("stepalign", 0.3),
            arm("refsol", 0.2, context="reference"),
            arm("null", 0.0, context="null", focus=None),
            arm("fixed_negative", None, objective="fixed_negative", context=None, note="no prediction"),
        ],
        terms={key: terms[key] for key in ("base", "train", "grader", "sampling")},
        plan=plan,
        config=config.as_report(),
        versions={},
    )
