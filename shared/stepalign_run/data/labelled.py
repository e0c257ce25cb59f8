"""A labelled solution: what every reader of a data set makes of a row."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stepalign.critique.splitting import join_steps
from stepalign.fields import ProblemId, Text, WellFormed
from stepalign.problems.numbers import plain_digits

Half = Literal["dev", "test"]


class LeftOutError(Exception):
    """A row that its data set itself gives no usable label. It is counted under this reason, and is no fault."""


class LabelledSolution(BaseModel):
    """A question, a solution step by step, and the step (from 0) that people call the first wrong one, or None."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: ProblemId
    question: Text
    steps: Annotated[tuple[WellFormed, ...], Field(min_length=1)]
    first_error: Annotated[int, Field(ge=0)] | None
    reference_solution: WellFormed | None = None
    answer: WellFormed | None = None
    generator: WellFormed | None = None
    """The model that wrote the solution."""

    @model_validator(mode="after")
    def _can_be_asked(self) -> LabelledSolution:
        if self.first_error is not None and self.first_error >= len(self.steps):
            raise ValueError(
                f"the first wrong step is {self.first_error}, counted from 0, and there are {len(self.steps)} steps"
            )
        join_steps(self.steps)
        return self

    @property
    def question_key(self) -> str:
        """The same for all solutions of one question, however its blanks are set."""
        return hashlib.sha256(" ".join(self.question.split()).encode()).hexdigest()


def in_half(solution: LabelledSolution, half: Half) -> bool:
    """Whether a solution belongs to the half. All solutions of a question are in one, on every machine and for ever."""
    return (int(solution.question_key[:2], 16) % 2 == 0) == (half == "dev")


def labelled(
    *,
    question: object,
    steps: object,
    first_error: object,
    id: object = None,
    reference_solution: object = None,
    answer: object = None,
    generator: object = None,
) -> LabelledSolution:
    """A solution from the values of a row. ``first_error`` counts from 0; None where every step is right.

    Blank steps are left out, and the label moves with its step. Numbers become text in answers and ids; blank texts
    count as missing. Without an id the solution gets one made from its question and steps. Raises ValueError with
    everything that is wrong.
    """
    kept, place = _without_blank_steps(steps, first_error)
    fields: dict[str, Any] = {"question": question, "steps": kept, "first_error": place}
    fields["answer"] = _answer(answer)
    fields["reference_solution"] = reference_solution if _says_something(reference_solution) else None
    fields["generator"] = generator if _says_something(generator) else None
    fields["id"] = str(id) if isinstance(id, int | str) and not isinstance(id, bool) else id
    if id is None:
        fields["id"] = _made_id(question, kept)
    try:
        return LabelledSolution.model_validate(fields)
    except ValidationError as error:
        raise ValueError("; ".join(_told(item) for item in error.errors())) from None


def _told(item: Any) -> str:
    message = str(item["msg"]).removeprefix("Value error, ")
    place = ".".join(map(str, item["loc"]))
    return f"{place}: {message}" if place else message


def _without_blank_steps(steps: object, first_error: object) -> tuple[object, object]:
    """Steps that say something, and the label as a place among them. What has another type is left to validation."""
    if not isinstance(steps, list | tuple):
        return steps, first_error
    given = list(cast("list[object]", steps))
    blank = [isinstance(step, str) and not step.strip() for step in given]
    kept = tuple(step for step, is_blank in zip(given, blank, strict=True) if not is_blank)
    if not isinstance(first_error, int) or isinstance(first_error, bool) or not 0 <= first_error < len(given):
        return kept, first_error
    if blank[first_error]:
        raise ValueError(
            f"the first wrong step, {first_error} counted from 0, is blank; label a step that says something"
        )
    return kept, first_error - sum(blank[:first_error])


def _says_something(value: object) -> bool:
    return value is not None and not (isinstance(value, str) and not value.strip())


def _answer(value: object) -> object:
    if not _says_something(value):
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return plain_digits(value)
    return value


def _made_id(question: object, steps: object) -> str:
    content = "\x1f".join(
        [str(question), *map(str, cast("tuple[object, ...]", steps) if isinstance(steps, tuple) else ())]
    )
    return "s-" + hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:12]
