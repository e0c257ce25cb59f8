"""The parts that the sections of the configuration share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator

from stepalign.prompts import OWN_OPTIONS
from stepalign_run.fields import CompletionTokens, Temperature, TopK, TopP, check_travels
from stepalign_run.rollout import SamplingParameters

ENV_PREFIX = "STEPALIGN_"
DELIMITER = "__"
DEVICE = r"^(auto|cpu|mps|cuda(:\d+)?|xpu(:\d+)?)$"


def _leaves_the_rest(options: dict[str, Any]) -> dict[str, Any]:
    taken = sorted(OWN_OPTIONS & options.keys())
    if taken:
        raise ValueError(f"{', '.join(taken)}: the prompts' rendering sets it; remove it")
    return options


TemplateOptions = Annotated[dict[str, Any], AfterValidator(_leaves_the_rest)]
"""Options of a chat template."""


def _takes_path(annotation: Any) -> bool:
    return annotation is Path or any(_takes_path(part) for part in get_args(annotation))


class Section(BaseModel):
    """A table of the configuration: its keys are fixed, and it does not change once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _names_a_path(cls, value: Any, info: ValidationInfo) -> Any:
        """An unset variable of a shell would else be the working directory."""
        if value == "" and info.field_name is not None and _takes_path(cls.model_fields[info.field_name].annotation):
            raise ValueError("the path is empty: name a file or folder, or leave the key out")
        return value

    @field_validator("*")
    @classmethod
    def _travels(cls, value: Any) -> Any:
        """Every value goes into reports and fingerprints; some go to other processes."""
        check_travels(value)
        return value


class Dtype(StrEnum):
    """Number formats of weights."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class SamplingSection(Section):
    """Sampling of completions."""

    temperature: Temperature = 1.1
    """Sampling temperature. The loss does not divide logits by it."""
    top_p: TopP = 1.0
    """Nucleus; 1 is off."""
    top_k: TopK = 0
    """Most likely tokens kept; 0 is off."""
    max_new_tokens: CompletionTokens = 2048
    """Budget of a completion, EOS included."""

    def parameters(self, seed: int) -> SamplingParameters:
        """These settings with a ``seed``, as a rollout records them."""
        shared = self.model_dump(include={"temperature", "top_p", "top_k", "max_new_tokens"})
        return SamplingParameters(seed=seed, **shared)
