"""Configuration of a run: one TOML file for every process, overridable by environment and command line.

Precedence, highest first: command line (``--trainer.steps 50``), environment (``STEPALIGN_TRAINER__STEPS=50``), the
file. Unknown keys are refused in all three. Paths of models and problems in the file are relative to the file's folder
(a link is followed first); ``run.dir`` and paths from the command line or the environment to the working directory.
"""

from stepalign_run.config.arm import ArmSection, FixedNegativeSection, GrpoSection, TableSection
from stepalign_run.config.base import Dtype, SamplingSection, Section
from stepalign_run.config.critic import CriticSection, OpenAISection, VllmSection
from stepalign_run.config.loading import known_variables, load_config, shipped_arms, shipped_tables
from stepalign_run.config.run import Config, DataSection, ModelSection, QueueSection, RunSection
from stepalign_run.config.solver import EvaluationSection, SolverSection
from stepalign_run.config.trainer import AlarmsSection, LoraSection, TrainerSection

__all__ = [
    "AlarmsSection",
    "ArmSection",
    "Config",
    "CriticSection",
    "DataSection",
    "Dtype",
    "EvaluationSection",
    "FixedNegativeSection",
    "GrpoSection",
    "LoraSection",
    "ModelSection",
    "OpenAISection",
    "QueueSection",
    "RunSection",
    "SamplingSection",
    "Section",
    "SolverSection",
    "TableSection",
    "TrainerSection",
    "VllmSection",
    "known_variables",
    "load_config",
    "shipped_arms",
    "shipped_tables",
]
