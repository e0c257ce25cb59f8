"""Configuration: ``load_config`` reads a run's, ``load_critic_config`` that of a critic alone."""

from stepalign_run.config.arm import ArmSection, FixedNegativeSection, GrpoSection, TableSection
from stepalign_run.config.base import Dtype, SamplingSection, Section
from stepalign_run.config.critic import (
    CriticClientSection,
    CriticConfig,
    CriticServerSection,
    OpenAISection,
    RunCriticSection,
    VllmSection,
)
from stepalign_run.config.loading import known_variables, load_config, load_critic_config, shipped_arms, shipped_tables
from stepalign_run.config.run import Config, DataSection, ModelSection, QueueSection, RunSection
from stepalign_run.config.solver import EvaluationSection, SolverSection
from stepalign_run.config.trainer import AlarmsSection, LoraSection, TrainerSection

__all__ = [
    "AlarmsSection",
    "ArmSection",
    "Config",
    "CriticClientSection",
    "CriticConfig",
    "CriticServerSection",
    "DataSection",
    "Dtype",
    "EvaluationSection",
    "FixedNegativeSection",
    "GrpoSection",
    "LoraSection",
    "ModelSection",
    "OpenAISection",
    "QueueSection",
    "RunCriticSection",
    "RunSection",
    "SamplingSection",
    "Section",
    "SolverSection",
    "TableSection",
    "TrainerSection",
    "VllmSection",
    "known_variables",
    "load_config",
    "load_critic_config",
    "shipped_arms",
    "shipped_tables",
]
