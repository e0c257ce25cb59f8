"""``report.json``: the figures of a run. One model for the process that writes it and for all that read it.

Figures are in percent unless their name says otherwise. Except for ``wall_seconds`` the report is the same for the same
seed, configuration, machine and thread count.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stepalign.errors import ConfigError
from stepalign_run.folder.files import replace_text
from stepalign_run.folder.layout import RunFolder

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Figures = dict[str, int | float]
"""Figures by name, such as ``avg_at_12``; counts stay whole numbers."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Marks(_Part):
    """Results of each problem's samples; lists in the order of the problems."""

    correct: list[Count]
    graded: list[Count] | None = None
    """Samples that the grader could grade; unset, all of them."""
    majority: list[Share]
    trace_correct: list[Count] | None = None
    """Samples in which every step is right; unset without ``data.checker``."""


class ProblemIds(_Part):
    validation: Annotated[list[str], Field(min_length=1)]
    test: Annotated[list[str], Field(min_length=1)]


class BaseMarks(_Part):
    test: Marks
    validation: Marks


class ByProblem(_Part):
    """The figures problem by problem, for paired intervals."""

    ids: ProblemIds
    base: BaseMarks
    validation: dict[int, Marks]
    """By step."""
    test: Marks
    """Of the selected checkpoint."""


class UpdateFigures(_Part):
    """An update's loss and advantages (nats); None where no token is in the group."""

    loss: float | None
    advantage_correct: float | None
    advantage_correct_below: float | None
    advantage_at_error: float | None
    advantage_after_error: float | None


class ArmReport(_Part):
    objective: str
    context: str
    scope: str
    condition: dict[str, Any]
    """All keys of the arm."""
    first_update: UpdateFigures | None
    last_update: UpdateFigures | None
    validation: dict[int, Figures] | None = None
    """By step; this and the next fields are set once the run is evaluated."""
    selected_step: int | None = None
    test: Figures | None = None
    """Of the selected checkpoint."""


class Rollouts(_Part):
    """Outcomes of the published rollouts. ``skipped`` counts by reason."""

    published: Count
    trained: Count
    skipped: dict[str, Count]
    stale: Count
    dead: Count
    pending: Count


class Alarm(_Part):
    first_step: int
    updates: Count
    """Updates that raised it."""


class BaseReport(_Part):
    """The base model before any update."""

    test: Figures
    validation: Figures


class EvaluationSettings(_Part):
    temperature: float
    max_new_tokens: int


@dataclass(frozen=True)
class Evaluated:
    """The parts of a report that only an evaluated run has."""

    base: BaseReport
    by_problem: ByProblem
    validation: dict[int, Figures]
    selected_step: int
    test: Figures


class Report(_Part):
    """``report.json``. The keys with a default are there only once the run is evaluated, and then all of them."""

    run: str
    seed: int
    steps: Count
    """Updates that were made."""
    arms: Annotated[dict[str, ArmReport], Field(min_length=1, max_length=1)]
    """The run's arm under its name."""
    rollouts: Rollouts
    critiques: dict[str, Count]
    """Critiques by verdict or by reason of refusal."""
    alarms: dict[str, Alarm]
    terms: dict[str, Any]
    """Settings and files that two runs must share to be compared: :func:`stepalign_run.terms.run_terms`."""
    config: dict[str, Any]
    threads: int
    wall_seconds: float
    """From the run's first start to its last figure; the pause before a ``--resume`` counts too."""
    versions: dict[str, str]
    base: BaseReport | None = None
    evaluation: EvaluationSettings | None = None
    chance: Figures | None = None
    """Figures of a uniform guesser; None where the number of possible answers is not known."""
    by_problem: ByProblem | None = None

    @property
    def arm_name(self) -> str:
        (name,) = self.arms
        return name

    @property
    def arm(self) -> ArmReport:
        return self.arms[self.arm_name]

    @property
    def evaluated(self) -> Evaluated | None:
        """Base, checkpoints and selected checkpoint; None without an evaluation."""
        base, by_problem, arm = self.base, self.by_problem, self.arm
        if base is None or by_problem is None or arm.validation is None or arm.selected_step is None or not arm.test:
            return None
        return Evaluated(base, by_problem, arm.validation, arm.selected_step, arm.test)

    @model_validator(mode="after")
    def _evaluated_as_a_whole(self) -> Report:
        arm = f"arms.{self.arm_name}"
        parts = {
            "base": self.base,
            "evaluation": self.evaluation,
            "by_problem": self.by_problem,
            f"{arm}.validation": self.arm.validation,
            f"{arm}.selected_step": self.arm.selected_step,
            f"{arm}.test": self.arm.test,
        }
        missing = [name for name, part in parts.items() if part is None]
        if missing and len(missing) < len(parts):
            raise ValueError(f"an evaluated run has all of {', '.join(parts)}; missing: {', '.join(missing)}")
        return self

    def as_json(self) -> str:
        """The file's text, with a stable order."""
        return json.dumps(self.model_dump(mode="json", exclude_unset=True), indent=1, sort_keys=True) + "\n"


class UnreadableReportError(ConfigError):
    """A file that is no report of this version, or cannot be read at all."""


def write_report(folder: RunFolder, report: Report) -> None:
    replace_text(folder.report, report.as_json())


def read_report(folder: RunFolder) -> Report:
    """The report of a finished run.

    Raises ConfigError when there is none, and UnreadableReportError when it cannot be read; both name the remedy.
    """
    path = folder.report
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"{folder.path}: there is no {path.name} in it; give the folder of a run that has ended, as in runs/demo/*/"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UnreadableReportError(
            f"{path} cannot be read ({error}); make it readable, or write it again with `stepalign report`"
        ) from error
    try:
        return Report.model_validate_json(text)
    except ValidationError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: ValidationError, prefix: str = "") -> UnreadableReportError:
    """The error for a file that is no report; ``prefix`` is the dotted place of the validated part."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = prefix + ".".join(str(part) for part in first["loc"])
    return UnreadableReportError(
        f"{path} is no report of a run ({place + ': ' if place else ''}{first['msg']}); write it again with "
        "`stepalign report`"
    )
