"""The rules' F1 with intervals, on a file of labelled solutions.

python -m benchmarks.critic_quality.peers --data processbench_gsm8k.jsonl --half test
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from benchmarks.arms_benchmark import run_as_program
from benchmarks.critic_quality.rules import (
    NO_STEP,
    Distribution,
    best_fixed_place,
    fixed,
    given_the_answer,
    uniform,
    unseen_number,
)
from stepalign.commands.terminal import Table, Terminal
from stepalign_report.critic_quality.figures import Sample, f1, percent
from stepalign_report.critic_quality.judged import Judged
from stepalign_report.critic_quality.tables import written
from stepalign_report.intervals import Array
from stepalign_run.data import LabelledSolution, in_half, load_labelled
from stepalign_run.data.labelled import Half

Predict = Callable[[LabelledSolution], Distribution]
FIGURES = ("f1", "on_erroneous", "on_correct")


def rules_of(dev: Sequence[LabelledSolution]) -> dict[str, Predict]:
    """The rules by name; what a rule has to choose, it chooses on ``dev``."""
    place = fixed(best_fixed_place(dev))
    return {
        "answer_then_uniform": lambda solution: given_the_answer(solution, uniform),
        "best_fixed_place": lambda solution: given_the_answer(solution, place),
        "first_unseen_number": lambda solution: given_the_answer(solution, unseen_number),
    }


def expected_right(solutions: Sequence[LabelledSolution], predict: Predict) -> dict[str, float]:
    """The probability of each solution's label, by the solution's id."""
    labels = [NO_STEP if one.first_error is None else one.first_error for one in solutions]
    return {one.id: predict(one).get(label, 0.0) for one, label in zip(solutions, labels, strict=True)}


def expected_accuracies(
    sample: Sample, solutions: Sequence[LabelledSolution], predict: Predict
) -> tuple[Array, Array, Array]:
    """F1 and the accuracies on erroneous and on correct solutions, ``[1 + R]`` over the draws of ``sample``."""
    right = expected_right(solutions, predict)
    on_erroneous = sample.mean(lambda one: right[one.id] if one.label != NO_STEP else None)
    on_correct = sample.mean(lambda one: right[one.id] if one.label == NO_STEP else None)
    return f1(on_erroneous, on_correct), on_erroneous, on_correct


def expected_figures(solutions: Sequence[LabelledSolution], predict: Predict) -> dict[str, dict[str, float] | None]:
    """F1 and its two accuracies in percent, with intervals over questions, of the expected accuracy of each row."""
    sample = Sample([_labelled(one, NO_STEP if one.first_error is None else one.first_error) for one in solutions])
    return dict(zip(FIGURES, map(percent, expected_accuracies(sample, solutions, predict)), strict=True))


def _labelled(solution: LabelledSolution, label: int) -> Judged:
    """The row of a sample, in which only question and label count."""
    return Judged(
        id=solution.id,
        question=solution.question_key,
        steps=len(solution.steps),
        generator=solution.generator,
        label=label,
        called=None,
        failure=None,
        prompt_tokens=None,
        completion_tokens=None,
        seconds=0.0,
    )


def peers(solutions: Sequence[LabelledSolution], half: Half | None) -> dict[str, dict[str, Any]]:
    """The figures of every rule by name, read on ``half`` or on all solutions; choices are made on the dev half."""
    dev = [one for one in solutions if in_half(one, "dev")]
    read = [one for one in solutions if half is None or in_half(one, half)]
    return {name: expected_figures(read, predict) for name, predict in rules_of(dev).items()}


def main(
    data: Annotated[str, typer.Option(help="A file of labelled solutions with known answers.")],
    half: Annotated[Half | None, typer.Option(help="Read the figures on one half of the questions.")] = None,
) -> None:
    """Print what rules without a model reach that are told the known answer."""
    found = peers(load_labelled(data).solutions, half)
    table = Table("rules that are told the answer", caption="percent, in brackets 95 % intervals over questions")
    for heading, number in (("rule", False), ("F1", True), ("on erroneous", True), ("on correct", True)):
        table.add_column(heading, number=number)
    for name, figures in found.items():
        table.add_row(name, *(written(figures[key], 1) for key in FIGURES))
    Terminal().print(table)


if __name__ == "__main__":
    run_as_program(main)
